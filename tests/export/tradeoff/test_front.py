"""A front: what is made, kept and made again, how points are timed, drawn and chosen, and one whole run."""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.held_out import text_hash
from export import front
from export.tradeoff import build, measure
from export.tradeoff.candidates import ENCODER, Candidate, Kind, candidates
from export.tradeoff.choose import Row, choose, pareto
from export.tradeoff.make import DONE_FILE, CandidateError, Made, Place, Record, make, run_script
from export.tradeoff.measure import Figure, Point, Quality, Speed, measure_speeds
from export.tradeoff.report import Front, draw
from mirror_runtime import Encoder
from mirror_runtime.bundle import MANIFEST_FILE, Precision, read_manifest, write_json
from mirror_runtime.errors import InputError
from tests.support.paths import ROOT
from tests.support.tiny_encoders import write_tiny_encoder
from training.job import REPORT_FILE

TO_ONNX = "export/to_onnx.py"

FACTS = {"cores": 1, "cpu": "a CPU"}


def candidate(name: str = "some", *commands: str, dimensions: tuple[int, ...] = ()) -> Candidate:
    lines = tuple(tuple(one.split()) for one in commands or ("export/to_onnx.py {source} --output {here}/bundle",))
    precisions = (Precision.FP32,)
    return Candidate(name=name, kind=Kind.VECTORS, commands=lines, precisions=precisions, dimensions=dimensions)


def row(name: str, rate: float, value: float, bytes_: int = 100) -> Row:
    record = Record(seconds=1, commands=(), refused={})
    made = Made(candidate=candidate(name), folder=Path(), digest="", record=record)
    gain = value - 80
    figures: dict[str, Any] = {"value": value, "value_low": value, "value_high": value, "share": value / 0.8}
    figures |= {"gain": gain, "gain_low": gain - 1, "gain_high": gain + 1, "samples": 100}
    probe = Figure(task="probe", set="own", metric="content, accuracy", **figures)
    better = replace(probe, metric="halves, MRR", gain=gain + 1)
    sizes: dict[str, Any] = {"vector_bytes": bytes_, "bundle_bytes": 1}
    quality = Quality(results=(better, probe), top10=1, cosine=None, certified=1, **sizes)
    speed = Speed(rates=(rate,), singles_ms=(1.0,))
    return Row(point=Point(made=made, precision=Precision.FP32), quality=quality, speed=speed, ratio=1)


ROWS = [row(ENCODER, 100, 80), row("slower", 90, 79), row("half", 200, 79.2), row("cut", 200, 79.2, 50)]
ROWS += [row("tiny", 900, 60), row("worse", 800, 59)]


def test_a_labelled_set_that_loses_more_than_the_probes_decides():
    probe = ROWS[0].quality.results[-1]
    labelled = replace(probe, task="retrieval", set="cranfield", metric="nDCG@10", gain=-14.0)
    lossy = replace(ROWS[2], quality=replace(ROWS[2].quality, results=(probe, labelled)))
    assert (lossy.loss, lossy.lost) == (14.0, "cranfield nDCG@10")
    assert choose([ROWS[0], lossy], 1, None)[0] is ROWS[0]


def test_the_front_is_what_no_other_beats_and_of_equals_the_shortest():
    assert [one.point.made.candidate.name for one in pareto(ROWS)] == ["tiny", "cut", ENCODER]


@pytest.mark.parametrize(
    ("max_loss", "min_speed", "chosen"),
    [
        (1, None, "cut fp32 (200 texts/s, 0.8 points of content below the encoder [-0.2, 1.8]) is the fastest that"),
        (0.5, None, "encoder fp32"),
        (30, None, "tiny fp32"),
        (None, 150, "cut fp32 (200 texts/s"),
        (None, 500, "tiny fp32 (900 texts/s, 20.0 points of content below the encoder [19.0, 21.0]) is the best"),
        (1, 150, "cut fp32"),
        (None, 1000, "no candidate encodes 1,000 texts/s: the nearest is tiny fp32 (900"),
        (1, 500, "no candidate loses at most 1 points and encodes 500 texts/s: the nearest is cut fp32"),
        (-1, None, "no candidate loses at most -1 points: the nearest is encoder fp32"),
    ],
)
def test_the_choice_and_its_reason_or_the_nearest(max_loss, min_speed, chosen):
    try:
        found, reason = choose(ROWS, max_loss, min_speed)
        assert reason.startswith(found.point.name)
    except InputError as error:
        reason = str(error)
    assert reason.startswith(chosen)


def test_no_name_of_the_picture_covers_another_or_a_mark():
    rows = [row(f"candidate number {i}", 100 * 1.02 ** (i % 4), 70 + i / 3) for i in range(14)]
    figure = draw(Front(encoder="x", rows=(row(ENCODER, 90, 80), *rows), failed={}, facts=FACTS))
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 15
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    marks = axes.transData.transform([(one.speed.texts_per_s, one.worst.gain) for one in rows])
    assert not [mark for mark in marks for box in boxes if box.contains(*mark)]


def test_speeds_are_medians_of_interleaved_rounds():
    now = 0.0
    turns: list[str] = []
    alone: list[str] = []

    def encoder(name: str, seconds: float) -> Callable[[Sequence[str]], object]:
        def encode(texts: Sequence[str]) -> None:
            nonlocal now
            alone.extend(texts if len(texts) == 1 else ())
            slow = 9 if len(turns) > 8 and name == "a" and turns.count("a") % 7 == 0 else 1
            now += slow * seconds * len(texts)
            turns.extend([name] * (len(texts) > 1))

        return encode

    texts = ["x" * length for length in range(1, 41)]
    found = measure_speeds({"a": encoder("a", 0.01), "b": encoder("b", 0.0001)}, texts, clock=lambda: now)
    assert found["a"].texts_per_s == pytest.approx(100)
    assert found["b"].texts_per_s == pytest.approx(10_000)
    assert found["b"].over(found["a"]) == pytest.approx(100)
    assert found["b"].p50_ms == pytest.approx(0.1)
    assert {len(text) for text in alone} >= {1, 40}, "from the shortest to the longest"
    rounds = [name for name, _ in itertools.groupby(turns[2:])]
    assert rounds == ["a", "b"] * measure.ROUNDS
    assert turns.count("b") > 50 * measure.ROUNDS, "a fast one is encoded until the round is long enough"


class Commands:
    """Stands for the commands: copies a bundle, or ends as its script says."""

    def __init__(self, bundle: Path | None = None) -> None:
        self.ran: list[str] = []
        self.bundle = bundle

    def __call__(self, words: Sequence[str], log: Path, on_line: Callable[[str], None]) -> int:
        self.ran.append(words[0])
        here = Path(words[words.index("--output") + 1])
        if words[0] == "kill":
            raise KeyboardInterrupt
        if words[0] == "fail":
            on_line("Traceback")
            on_line("error: it has no weights")
            on_line("error: nor layers")
            return 2
        if words[0] == TO_ONNX and "--lines" in words:
            for line in words[words.index("--lines") + 1 :]:
                on_line(line)
            return 1
        if self.bundle:
            shutil.copytree(self.bundle, here)
        else:
            here.mkdir()
            (here / MANIFEST_FILE).write_text("{}")
        on_line('{"refused": [{"artifact": "openvino int8 packed", "asked": true, "reason": "its cosine is 0.5"}]}')
        return 1


def test_what_is_there_is_kept_until_an_input_changes_and_what_a_kill_left_is_made_anew(tmp_path):
    run, places = Commands(), {"source": Place("/e", "1")}
    first = make(candidate(), tmp_path, places, run=run)
    assert first.record.refused == {"openvino int8 packed": "its cosine is 0.5"}
    assert make(candidate(), tmp_path, places, run=run) == first
    assert len(run.ran) == 1
    with pytest.raises(KeyboardInterrupt):
        make(
            candidate("some", "export/to_onnx.py --output {here}/bundle", "kill --output {here}/x"),
            tmp_path,
            {},
            run=run,
        )
    assert (tmp_path / "some" / "bundle").is_dir(), "killed between two commands"
    again = make(candidate(), tmp_path, {"source": Place("/e", "2")}, run=run)
    assert again.digest != first.digest
    assert run.ran == ["export/to_onnx.py"] * 2 + ["kill", "export/to_onnx.py"]
    (done := tmp_path / "some" / DONE_FILE).write_text(done.read_text().replace('"seconds"', '"minutes"'))
    assert make(candidate(), tmp_path, {"source": Place("/e", "2")}, run=run).record.refused == first.record.refused
    assert len(run.ran) == 5, "a record of another version does not count"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (
            "fail --output {here}/bundle",
            r"fail ended with status 2: it has no weights; nor layers \(see .*some\.log\)",
        ),
        (
            f"{TO_ONNX} --output {{here}}/x --lines Traceback ValueError:x",
            r"status 1: ValueError:x \(see .*some\.log\)",
        ),
        (f"{TO_ONNX} --output {{here}}/x --lines", r"status 1: it printed nothing \(see .*some\.log\)"),
        (f"{TO_ONNX} --output {{here}}/x --lines []", r"status 1: \[\] \(see "),
        ("export/to_onnx.py --output {here}/elsewhere", "its commands wrote no bundle"),
        ("export/to_onnx.py {elastic}/run --output {here}/bundle", "needs elastic, which failed"),
    ],
)
def test_a_failed_candidate_is_one_error_and_leaves_its_log_alone(tmp_path, command, problem):
    with pytest.raises(CandidateError, match=problem):
        make(candidate("some", command), tmp_path, {}, run=Commands())
    assert [path.name for path in tmp_path.iterdir() if path.name != "some.log"] == []


@pytest.mark.process
def test_a_command_is_a_process_whose_lines_arrive_and_are_kept(tmp_path):
    lines: list[str] = []
    assert run_script(["export/certificates.py", "./nowhere"], tmp_path / "log", lines.append) == 2
    assert lines[-1].endswith("manifest.json does not exist")
    assert (tmp_path / "log").read_text().split("\n")[:-1] == lines


@pytest.fixture
def texts_file(tmp_path: Path) -> Path:
    """Texts of common and of rare words."""
    rng, path = random.Random(0), tmp_path / "texts.txt"
    words = ["".join(pair) for pair in itertools.product("abcdefghijklmnop", repeat=2)]
    lines = (" ".join([*rng.choices(words[:100], k=5), *rng.choices(words[100:], k=2)]) for _ in range(400))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def whole(tiny_bundle, texts_file, tmp_path, monkeypatch) -> Callable[..., tuple[int, Commands]]:
    """Run the command on copies of the tiny bundle in place of what its commands would write."""
    monkeypatch.setattr(measure, "ROUND_S", 0.001)
    bundle = shutil.copytree(tiny_bundle, tmp_path / "trained")
    manifest = read_manifest(bundle)
    spec = replace(manifest.encoder, trained_dims=(8, 16))
    write_json(replace(manifest, encoder=spec), bundle / MANIFEST_FILE)
    table = [candidate(ENCODER, dimensions=(8,)), candidate("broken", "fail --output {here}/bundle"), candidate("twin")]
    monkeypatch.setattr(build, "candidates", lambda *_, **__: table)

    def run(*options: str) -> tuple[int, Commands]:
        commands = Commands(bundle)
        monkeypatch.setattr(build.build, "__defaults__", (lambda *_: None, commands))
        files = ["--corpus", str(texts_file), "--output", str(tmp_path / "front")]
        return front.main([str(tiny_bundle), *files, *options]), commands

    return run


def test_a_whole_front_is_written_kept_and_chosen_from(whole, tmp_path, capsys, monkeypatch):
    status, commands = whole("--max-loss", "0")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert len(commands.ran) == 3
    output = tmp_path / "front"
    report = json.loads(shown.out.splitlines()[-1])
    assert report["failed"]["broken"].startswith("fail ended with status 2: it has no weights")
    found = json.loads((output / "front.json").read_text())
    probe = {one["point"]: one for one in found["records"] if one["metric"] == "content, accuracy"}
    assert set(probe) == {"encoder fp32", "encoder fp32, 8 dims", "twin fp32"}
    assert probe["twin fp32"]["gain"] == probe["encoder fp32"]["gain"] == 0
    halves = {one["point"]: one["share"] for one in found["records"] if one["metric"] == "halves, MRR"}
    assert halves["twin fp32"] == halves["encoder fp32"] == 100 != halves["encoder fp32, 8 dims"]
    assert found["chosen"]["point"] == report["point"]
    sizes = {one["point"]: one["value"] for one in found["records"] if one["metric"] == "vector"}
    assert (sizes["encoder fp32"], sizes["encoder fp32, 8 dims"]) == (128, 32)
    cosine = {one["point"]: one["value"] for one in found["records"] if one["metric"] == "cosine to the encoder"}
    assert cosine == {"encoder fp32": pytest.approx(1), "twin fp32": pytest.approx(1)}, "a cut has another width"
    page = (output / "report.md").read_text()
    assert page.split("\n")[2].startswith("Within 1 point of the encoder, ")
    assert "- broken: fail ended" in page
    assert (output / "front.png").read_bytes().startswith(b"\x89PNG")
    held_out = 200
    assert len((output / "texts" / "corpus.txt").read_text().splitlines()) == found["facts"]["texts"] - held_out
    with Encoder.load(output / "chosen") as encoder:
        assert encoder.encode(["a cat"]).shape == (1, 32)

    speeds = (output / "measured" / "speeds.json").read_bytes()
    quality = output / "measured" / "encoder-fp32.json"
    kept = quality.read_bytes()
    quality.write_bytes(kept.replace(b'"top10"', b'"top"'))
    status, commands = whole("--min-speed", "1e9")
    assert status == 2
    assert "no candidate encodes 1,000,000,000 texts/s: the nearest is " in capsys.readouterr().err
    assert commands.ran == ["fail"], "only what failed is tried again"
    assert (output / "measured" / "speeds.json").read_bytes() == speeds
    assert quality.read_bytes() == kept, "an older record is made again"
    assert not (output / "chosen").exists(), "it was another call's"
    monkeypatch.setattr(build, "installed_versions", lambda: {"openvino": "2"})
    assert whole()[0] == 0
    assert (output / "measured" / "speeds.json").read_bytes() != speeds, "measured with other libraries"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--students", "x", "--candidates", "vectors"], "add student to --candidates"),
        (["--corpus", "absent.txt"], "absent.txt cannot be read"),
        (["--output", "{tmp}"], "holds something else"),
        (["--max-loss", "-1"], "--max-loss -1 is impossible: pass a number from 0 to 100"),
        (["--max-loss", "101"], "--max-loss 101 is impossible"),
        (["--min-speed", "nan"], "--min-speed nan is impossible: pass a number from 0 to 1,000,000,000"),
        (["--students", "{tmp}/absent"], "absent' does not exist"),
    ],
)
def test_bad_input_is_one_clear_error(whole, tmp_path, capsys, options, problem):
    status, commands = whole(*(option.format(tmp=tmp_path) for option in options))
    assert (status, commands.ran) == (2, [])
    shown = capsys.readouterr().err
    assert problem in shown
    assert shown.count("error: ") == 1


def test_a_run_is_measured_on_what_it_held_out_and_settings_of_every_encoder_count(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_bundle, tmp_path / "run")
    texts = tuple(f"text number {i}" for i in range(400))
    request = build.Request(encoder="~/run", students=(str(tiny_bundle),), texts=texts, output=tmp_path)
    assert len(build._held_out(request)) == 200
    (tmp_path / "run" / REPORT_FILE).write_text(json.dumps({"held_out": [*map(text_hash, texts[:60])]}))
    assert set(build._held_out(request)) == set(texts[:60])

    sources = [build._resolve(name) for name in (request.encoder, *request.students)]
    before = build._places(request, sources, texts[:60], tmp_path)
    assert before["source"].path == str(tmp_path / "run")
    sources = [replace(one, spec=replace(one.spec, normalize=not one.spec.normalize)) for one in sources]
    after = build._places(request, sources, texts[:60], tmp_path)
    assert {name for name, place in after.items() if place != before[name]} == {"source", "base-1"}


def test_a_reranker_is_refused_by_name(tmp_path):
    write_tiny_encoder("bert", folder := tmp_path / "cross", labels=1)
    with pytest.raises(InputError, match="cross is a reranker with scores of pairs, and none of texts to compare"):
        build.build(build.Request(encoder=str(folder), texts=(), output=tmp_path / "front"))


def test_too_few_texts_are_refused_before_anything_is_made(whole, texts_file, capsys):
    texts_file.write_text("".join(f"{line}\n" for line in texts_file.read_text().splitlines()[:150]))
    assert whole()[0] == 2
    assert "texts are too few to hold 200 out: pass 2,000 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "bf16"), [(6, True), (1, False), (0, True)])
def test_every_candidate_comes_after_those_it_needs(layers, bf16):
    known = {"source", "corpus", "calibration", "base-1"}
    for one in candidates(list(Kind), layers=layers, dim=384, bf16=bf16, students=1):
        assert one.places <= known, one.name
        known.add(one.name)
        assert all((ROOT / command[0]).is_file() for command in one.commands)
        assert bf16 or Precision.BF16 not in one.precisions
        assert one.precisions == (Precision.FP32,) or layers
    for cuttable in (True, False):
        (_, shrunk) = candidates([Kind.SHRINK], layers=6, dim=384, bf16=True, cuttable=cuttable)
        assert ("--vocabulary" in shrunk.commands[0]) is cuttable
    only = candidates([Kind.VECTORS], layers=6, dim=384, bf16=True)
    assert {one.kind for one in only} == {Kind.PRECISION, Kind.VECTORS}
