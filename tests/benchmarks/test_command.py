import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, latency, scaling, serving
from benchmarks.gateway import running_gateway
from benchmarks.peers.protocol import time_calls
from benchmarks.point import Point
from benchmarks.results import read_report
from benchmarks.run import main
from benchmarks.throughput import Rounds
from benchmarks.timed import timed
from benchmarks.training_suite import REFERENCE_PARTY
from export.bundle.build import Request, build
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Pooling, Precision, read_manifest
from mirror_runtime.errors import MissingExtra, ServerError
from mirror_runtime.host import usable_cores
from mirror_runtime.triton.server.processes import alive
from mirror_runtime.vectors import cosines
from tests.support.paths import ROOT


@pytest.fixture
def bundle(make_bundle, make_artifact) -> Path:
    folder = make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))
    (folder / "config.json").write_text('{"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16}')
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"the quick brown fox number {i} {'jumps ' * (i % 9)}\n" for i in range(60)))
    return path


def last_json(out: str) -> dict[str, object]:
    result: dict[str, object] = json.loads(out.splitlines()[-1])
    return result


def test_a_run_writes_a_report_and_ends_in_one_json_line(bundle, texts, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "latency", "throughput", "--quick", "--rounds", "2", "--texts", str(texts)]
    assert main([*arguments, "--output", str(output)]) == 0
    line = last_json(capsys.readouterr().out)
    report = read_report(output)
    assert not report.partial
    assert line["report"] == str(output / "report.json")
    assert [result.tokens for result in report.latency] == [8, 16, 32, 64]  # the bundle's limit is 64
    assert all(len(result.samples_ms) == 60 for result in report.latency)
    (rate,) = report.throughput
    assert len(rate.samples_s) == 2
    assert (rate.texts, rate.tokens) == (60, round(report.workload.tokens_mean * 60))
    assert 0 < rate.row_fill <= 1
    assert rate.ceiling_share is None
    assert [failure.reason for failure in report.failures] == ["no ceiling is measured for fake fp32"]
    assert (output / "report.md").is_file()


def test_every_round_of_a_real_engine_has_its_yardstick(tiny_bundle, texts, tmp_path):
    output = tmp_path / "out"
    arguments = [
        str(tiny_bundle),
        "--suite",
        "latency",
        "throughput",
        "--quick",
        "--rounds",
        "3",
        "--texts",
        str(texts),
    ]
    assert main([*arguments, "--engine", "onnxruntime", "--precision", "fp32", "--output", str(output)]) == 0
    report = read_report(output)
    assert [len(rate.yardstick_s) for rate in report.throughput] == [3]
    assert [len(result.yardstick_ms) for result in report.latency] == [3] * len(report.latency)
    assert all(len(one.in_yardsticks) == len(one.samples) for one in timed(report))


def test_a_planted_slowdown_is_measured_and_recorded(bundle, texts, tmp_path):
    rates = []
    for share in ("0", "40"):
        output = tmp_path / share
        arguments = [str(bundle), "--suite", "throughput", "--quick", "--rounds", "2", "--texts", str(texts)]
        assert main([*arguments, "--planted-slowdown", share, "--output", str(output)]) == 0
        report = read_report(output)
        assert report.settings.planted_slowdown == float(share)
        rates.append(report.throughput[0].texts_per_s)
    assert rates[0] > 2 * rates[1]


def test_startup_is_measured_in_fresh_processes(bundle, texts, tmp_path):
    output = tmp_path / "out"
    assert (
        main([str(bundle), "--suite", "startup", "--rounds", "1", "--texts", str(texts), "--output", str(output)]) == 0
    )
    (result,) = read_report(output).startup
    assert result.party == "mirror_runtime fake fp32"
    assert len(result.samples_s) == 5


def test_scaling_is_measured_in_fresh_processes(bundle, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "QUICK_SIZES", (20, 60))
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "scaling", "--quick", "--rounds", "2", "--texts", str(texts)]
    assert main([*arguments, "--output", str(output)]) == 0
    report = read_report(output)
    assert not report.failures
    (result,) = report.scaling
    assert [(size.texts, len(size.samples_s)) for size in result.sizes] == [(20, 1), (60, 1)]
    assert all(size.peak_bytes >= size.first_bytes > 10_000_000 for size in result.sizes)
    assert [one.cores for one in result.cores] == scaling.cores_to_try(usable_cores())
    assert all(one.cpu_share <= one.cores + 0.2 for one in result.cores)
    callers = result.callers
    assert callers is not None
    assert (callers.callers, callers.texts, len(callers.callers_samples_s)) == (100, 60, 2)
    queue = callers.queue
    assert queue.sent == queue.max_waiting + 20 * 100
    assert queue.answered == queue.accepted == queue.sent - queue.refused
    assert queue.refused > 0
    assert queue.min_cosine > 0.999999
    assert queue.refused_p50_ms is not None
    assert queue.refused_max_ms is not None
    assert queue.refused_max_ms >= queue.refused_p50_ms > 0
    assert f"scaling fake fp32, {scaling.CALLERS} callers" in report.finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_valid_report_marked_as_partial(bundle, texts, tmp_path, monkeypatch, capsys, number):
    run, calls = Rounds.run, []
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what runs in the background

    def interrupted(self: Rounds) -> None:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            time.sleep(10)  # the signal comes meanwhile
        run(self)

    monkeypatch.setattr(Rounds, "run", interrupted)
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "throughput", "--rounds", "9", "--texts", str(texts), "--output", str(output)]
    try:
        assert main(arguments) == 130
    finally:
        assert signal.signal(signal.SIGINT, ignored) is signal.SIG_IGN
    report = read_report(output)
    assert report.partial
    assert len(report.throughput[0].samples_s) == 2
    assert "**Partial" in (output / "report.md").read_text()
    assert last_json(capsys.readouterr().out)["partial"] is True


def test_an_interrupted_run_goes_on_where_it_stopped(bundle, texts, tmp_path, monkeypatch, capsys):
    run, turn, calls, turns = Rounds.run, time_calls, [], []

    def interrupted(self: Rounds) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(Rounds, "run", interrupted)
    monkeypatch.setattr(latency, "time_calls", lambda *arguments: turns.append(1) or turn(*arguments))
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "latency", "throughput", "--quick", "--rounds", "3", "--texts", str(texts)]
    arguments += ["--output", str(output)]
    assert main(arguments) == 130
    before, measured = read_report(output), len(turns)
    assert main([*arguments, "--seed", "7", "--resume"]) == 2
    assert "settings of the interrupted run" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    after = read_report(output)
    assert len(turns) == measured == 12  # four lengths, three rounds: none of them again
    assert after.latency == before.latency
    assert [len(r.samples_s) for r in (before.throughput[0], after.throughput[0])] == [1, 3]
    assert (after.partial, after.started, len(after.resumed)) == (False, before.started, 1)
    assert after.wall_s > before.wall_s
    assert main([*arguments, "--resume"]) == 2
    assert "is complete" in capsys.readouterr().err


def test_a_real_ctrl_c_does_the_same(bundle, texts, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "benchmarks/run.py", str(bundle), "--suite", "throughput", "--rounds", "100000"]
    with subprocess.Popen(
        [*command, "--texts", str(texts), "--output", str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # One thread for what runs before the rounds: then the number of threads says when they have begun.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"},
        # A runner that puts us into the background makes its children ignore Ctrl-C: a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + 60
            threads = Path(f"/proc/{process.pid}/task")
            while time.monotonic() < deadline and len(list(threads.iterdir())) < 3:
                time.sleep(0.2)  # the encoder's thread beside the progress bar's: rounds are running
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert read_report(output).partial
    assert last_json(out)["partial"] is True


def test_an_engine_that_is_not_in_the_library_is_a_failed_point(make_bundle, make_artifact, texts, tmp_path, capsys):
    bundle = make_bundle(
        artifacts=(make_artifact(EngineName.TENSORRT, Precision.FP16), make_artifact(EngineName.FAKE, Precision.FP32))
    )
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "throughput", "--rounds", "1", "--texts", str(texts), "--output", str(output)]
    assert main(arguments) == 0
    report = read_report(output)
    assert "tensorrt fp16" in {failure.party for failure in report.failures if failure.suite == "load"}
    assert [result.point.name for result in report.throughput] == ["fake fp32"]
    assert main([*arguments, "--engine", "tensorrt"]) == 1  # nothing could be measured, and that is said
    assert last_json(capsys.readouterr().out)["throughput"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{absent}"], "is not a bundle"),
        (["{bundle}", "--engine", "openvino"], "nothing matches --engine"),
        (["{bundle}", "--texts", "{absent}"], "cannot be read"),
        (["{bundle}", "--output", "{bundle}"], "holds no report to replace"),
        (["{bundle}", "--peer-env", "nobody=x"], "NAME=DIR"),
        (["{bundle}", "--suite", "peers", "--peer", "nobody"], "known are sentence-transformers"),
        (["--suite", "peers", "--peer", "plain-loop", "ctranslate2", "{absent}"], "is not a bundle"),
        (["{bundle}", "--suite", "quality"], "needs --sts or --words"),
        (["{bundle}", "--suite", "quality", "--sts", "{absent}"], "cannot be read"),
        (["{bundle}", "--resume"], "--resume: "),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(bundle, tmp_path, arguments, message):
    names = {"bundle": bundle, "absent": tmp_path / "absent"}
    command = [sys.executable, "benchmarks/run.py", *(argument.format(**names) for argument in arguments)]
    if "--output" not in arguments:
        command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_training_lets_our_recipe_and_the_published_one_take_turns(bundle, texts, tiny_bert, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"the cat no. {i} is playing the guitar with number {i * 7}\n" for i in range(450)))
    pairs = tmp_path / "pairs.tsv"
    rows = [f"x\t{i % 6}\tthe cat no. {i} is playing\tthe dog no. {i % 5} is singing\n" for i in range(20)]
    pairs.write_text("subset\tscore\tsentence1\tsentence2\n" + "".join(rows))
    output = tmp_path / "out"
    command = [str(bundle), "--suite", "training", "--quick", "--texts", str(texts), "--output", str(output)]
    command += ["--base", str(tiny_bert), "--corpus", str(corpus), "--sts", str(pairs), "--training-seeds", "1"]
    assert main(command) == 0
    report = read_report(output)
    assert not report.failures
    ours, reference = report.training
    assert (ours.party, reference.party) == ("mirror-runtime, recipe sentence", REFERENCE_PARTY)
    for result in report.training:
        (run,) = result.runs
        assert (result.texts, run.seed) == (200, 42)
        assert run.seconds > 0
        assert run.mean == pytest.approx(run.spearman["pairs"])
    assert main([*command[:-4], "--training-seeds", "1"]) == 2  # no set to judge by


PERF_ANALYZER = """#!/usr/bin/env python3
import sys
with open(sys.argv[sys.argv.index("-f") + 1], "w") as table:
    table.write("Concurrency,Inferences/Second,p50 latency,p99 latency\\n1,100,2000,3000\\n")
"""


@pytest.mark.serving
def test_serving_is_measured_on_a_real_triton(bundle, texts, tmp_path, monkeypatch):
    shares = (0.2, 30.0, 40.0)
    pace = serving.Pace(closed_s=0.2, open_s=1.0, window_s=0.2, shares=shares, calm_s=0.3, overload_s=1.0)
    monkeypatch.setattr(serving, "QUICK", pace)
    program = tmp_path / "env" / "bin" / "perf_analyzer"
    program.parent.mkdir(parents=True)
    program.write_text(PERF_ANALYZER)
    program.chmod(0o755)
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "serving", "--quick", "--rounds", "2", "--texts", str(texts)]
    arguments += ["--output", str(output), "--peer-env", f"perf_analyzer={tmp_path / 'env'}"]
    assert main(arguments) == 0
    report = read_report(output)
    served, gateway = report.serving
    assert (served.name, gateway.name) == ("fake fp32", "fake fp32, http, gateway")
    assert served.server.startswith("triton 2.")
    assert [(loop.concurrency, loop.texts_a_request) for loop in served.closed] == list(serving.LOOPS)
    for loop in served.closed:
        assert (len(loop.rounds_texts_per_s), loop.errors) == (2, 0)
        assert loop.server is not None
        assert loop.server.compute_ms > 0
        assert loop.p50_ms <= loop.p99_ms <= loop.p999_ms
    alone, _, crowd, batches = (loop.server.texts_per_execution for loop in served.closed if loop.server is not None)
    assert alone == pytest.approx(1.0)
    assert crowd > 1.0
    assert batches >= 32
    kept = [arrived.kept_up for arrived in served.open]
    assert kept in ([True, False], [False])  # after the first rate that was too much none is tried; a busy machine
    assert served.knee_per_s == (served.open[0].offered_per_s if kept[0] else None)  # may miss the lowest, too
    assert [run.texts_per_s for run in served.perf_analyzer] == [100.0] * 4
    overload = served.overload
    assert overload is not None
    assert overload.max_tokens_in_flight == 32768
    assert overload.maximum_texts_per_s > 0
    assert overload.accepted + overload.refused + overload.errors == round(
        overload.offered_texts_per_s * overload.seconds / overload.texts_a_request
    )
    assert overload.errors == 0
    assert min(overload.resident_before_bytes, overload.resident_after_bytes) > 50_000_000
    assert gateway.server.startswith("mirror gateway ")
    assert [(loop.concurrency, loop.texts_a_request) for loop in gateway.closed] == list(serving.GATEWAY_LOOPS)
    assert [(len(loop.rounds_texts_per_s), loop.errors) for loop in gateway.closed] == [(2, 0)] * 3
    assert (gateway.open, gateway.perf_analyzer, gateway.overload) == ((), (), None)
    assert not [failure for failure in report.failures if failure.suite == "serving"]


def test_a_server_that_cannot_be_had_is_a_failed_point(bundle, texts, tmp_path, monkeypatch):
    def nothing(*_arguments: object) -> None:
        raise MissingExtra("pytriton", "triton")

    def broken(*_arguments: object) -> None:
        raise ServerError("mirror gateway ended with status 2")

    monkeypatch.setattr(serving, "Server", nothing)
    monkeypatch.setattr(serving, "running_gateway", broken)
    output = tmp_path / "out"
    arguments = [str(bundle), "--suite", "serving", "--quick", "--texts", str(texts), "--output", str(output)]
    assert main([*arguments, "--peer-env", f"perf_analyzer={tmp_path}"]) == 1
    reasons = {failure.party: failure.reason for failure in read_report(output).failures}
    assert "pip install 'mirror-runtime[triton]'" in reasons["fake fp32"]
    assert reasons["fake fp32, http, gateway"] == "mirror gateway ended with status 2"
    assert "holds no perf_analyzer" in reasons["perf_analyzer"]


def point(bundle: Path) -> Point:
    (artifact,) = read_manifest(bundle).artifacts
    return Point(engine=artifact.engine, precision=artifact.precision, artifact=artifact.path, parity=artifact.parity)


def test_a_gateway_is_a_process_that_is_gone_at_the_end(bundle, monkeypatch):
    monkeypatch.setenv("MIRROR_API_KEY", "of the user, who serves")
    with running_gateway(bundle, point(bundle)) as gateway:
        assert alive(gateway.pid)
        with gateway.connect() as caller, Encoder.load(bundle, engine="fake") as encoder:
            np.testing.assert_allclose(caller.encode(["a"], 1), encoder.encode(["a"]), atol=1e-6)
            assert caller.read("/info")["engine"] == "fake"
    assert not Path(f"/proc/{gateway.pid}").exists()
    with pytest.raises(KeyError), running_gateway(bundle, point(bundle)) as gateway:
        raise KeyError
    assert not Path(f"/proc/{gateway.pid}").exists()


def test_a_gateway_that_does_not_start_is_named(bundle):
    with (
        pytest.raises(ServerError, match=r"mirror gateway ended with status 2; its log ends:\n.*nowhere"),
        running_gateway(bundle / "nowhere", point(bundle)),
    ):
        pass


@pytest.fixture(scope="module")
def wrongly_pooled(tiny_bert, tmp_path_factory) -> Path:
    """The tiny BERT's bundle, had somebody taken the wrong token for the mean."""
    output = tmp_path_factory.mktemp("wrong") / "bundle"
    texts = ("", "the cat sat on the mat.", "a man is playing a guitar", *"abcdefgh")
    build(
        Request(encoder=str(tiny_bert), output=output, pooling=Pooling.CLS, texts=texts, precisions=(Precision.FP32,))
    )
    return output


@pytest.mark.slow
def test_a_wrong_pooling_is_caught_by_quality_and_compare(tiny_bundle, wrongly_pooled, texts, tmp_path, capsys):
    # People who agree with the right pooling: what it ranks first, they do.
    words = ["cat", "dog", "man", "guitar", "river", "mat"]
    pairs = [(f"the {a} sat on a {b}", f"a {c} is playing the {a}") for a in words for b in words for c in words[:3]]
    with Encoder.load(tiny_bundle, engine="onnxruntime") as encoder:
        left, right = (encoder.encode([pair[side] for pair in pairs]) for side in (0, 1))
    scores = cosines(left, right)
    people = tmp_path / "people.tsv"
    rows = [f"{score:.6f}\t{a}\t{b}\n" for score, (a, b) in zip(scores, pairs, strict=True)]
    people.write_text("score\tsentence1\tsentence2\n" + "".join(rows), encoding="utf-8")
    for name, bundle in (("base", tiny_bundle), ("same", tiny_bundle), ("wrong", wrongly_pooled)):
        arguments = [str(bundle), "--suite", "quality", "--texts", str(texts), "--sts", str(people)]
        assert main([*arguments, "--engine", "onnxruntime", "--output", str(tmp_path / name)]) == 0
    report = read_report(tmp_path / "base")
    assert report.quality[0].mean.value > 99.9
    assert report.quality[0].baseline == "onnxruntime fp32"
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "same")]) == 0
    capsys.readouterr()
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "wrong")]) == 1
    assert "quality, onnxruntime fp32, people" in capsys.readouterr().err
