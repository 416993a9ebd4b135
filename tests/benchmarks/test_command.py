"""benchmarks/run.py: reports, failures, interrupts and mistakes."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.peers.protocol import time_calls
from benchmarks.report.record import Measurement
from benchmarks.report.storage import Report, read_report
from benchmarks.run import main
from benchmarks.suites import latency, startup, training
from benchmarks.suites.throughput import Rounds
from benchmarks.suites.training import REFERENCE_PARTY, Trainer
from benchmarks.workers import run_to_end
from export.bundle.build import Request, build
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Pooling, Precision
from mirror_runtime.vectors import cosines
from tests.support.trace_cache import cached_traces
from training import evaluate, tune


def last_json(out: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def one(report: Report, suite: str, metric: str, **conditions) -> Measurement:
    found = report.select(suite, metric, **conditions)
    return min(found, key=lambda measurement: len(measurement.conditions))


@pytest.fixture
def run(bundle, texts, tmp_path):
    """Run the command on the fake engine, and return its status and the folder of its report."""

    def command(*arguments: str, bundle: Path = bundle, name: str = "out") -> tuple[int, Path]:
        output = tmp_path / name
        return main([str(bundle), *arguments, "--texts", str(texts), "--output", str(output)]), output

    return command


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Draw nothing, for plots take a second each and have tests of their own, and read little memory."""
    monkeypatch.setattr("benchmarks.report.plots.PLOTS", {})
    monkeypatch.setattr("benchmarks.machine.ceilings.FEWEST_BYTES", 2**20)
    monkeypatch.setattr("benchmarks.machine.ceilings.CACHES", 0)


def test_a_run_writes_a_report_and_ends_in_one_json_line(run, capsys):
    status, output = run("--suite", "latency", "throughput", "--quick", "--rounds", "2", "--page")
    assert status == 0
    line = last_json(capsys.readouterr().out)
    report = read_report(output)
    assert not report.facts.partial
    assert line["report"] == str(output / "report.json")
    times = report.select("latency", "time per text")
    assert [time.conditions["tokens"] for time in times] == [8, 16, 32, 64]  # the bundle's limit is 64
    assert all(time.total == 60 for time in times)
    rate = one(report, "throughput", "texts per second")
    assert len(rate.samples) == 2
    assert one(report, "throughput", "tokens per second").median == pytest.approx(
        rate.median * report.facts.workload.tokens_mean
    )
    assert 0 < one(report, "throughput", "row fill").median <= 1
    assert one(report, "throughput", "worst cosine to fp32").median == pytest.approx(1.0)
    assert not report.select("throughput", "share of ceiling")
    assert [failure.reason for failure in report.failures] == ["no ceiling is measured for fake fp32"]
    assert {path.name for path in output.iterdir()} == {"report.json", "report.md", "report.html"}
    assert not output.with_name("out.unfinished").exists()


def test_every_round_of_a_real_engine_has_its_reference(run, tiny_bundle):
    status, output = run(
        "--suite", "latency", "throughput", "--quick", "--rounds", "3", "--engine", "onnxruntime",
        "--precision", "fp32", bundle=tiny_bundle,
    )  # fmt: skip
    assert status == 0
    report = read_report(output)
    judged = [*report.select("latency", "time per text"), *report.select("throughput", "texts per second")]
    assert [len(one.reference) for one in judged] == [3] * len(judged)
    assert all(len(one.samples) % 3 == 0 for one in judged)


@pytest.mark.process
def test_startup_is_measured_in_fresh_processes(run):
    status, output = run("--suite", "startup", "--quick", "--rounds", "2")
    report = read_report(output)
    assert status == 0
    assert not report.failures
    assert one(report, "startup", "time to the first vector").total == startup.QUICK_ROUNDS
    assert one(report, "startup", "peak memory").median >= one(report, "startup", "memory at the first vector").median


@pytest.fixture
def interrupt(monkeypatch):
    """Make a round of suite throughput receive a signal, and those after it run again."""
    run_round = Rounds.run

    def prepare(at: int, number: signal.Signals) -> None:
        calls = []

        def interrupted(self: Rounds) -> None:
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), number)
                time.sleep(10)  # the signal arrives meanwhile
            run_round(self)

        monkeypatch.setattr(Rounds, "run", interrupted)

    return prepare


def test_an_interrupt_leaves_a_partial_report_that_continues_after_its_last_finished_suite(
    run, interrupt, monkeypatch, capsys
):
    turn, turns = time_calls, []
    monkeypatch.setattr(latency, "time_calls", lambda *arguments: turns.append(1) or turn(*arguments))
    arguments = ["--suite", "latency", "throughput", "--quick", "--rounds", "3"]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for background processes
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            interrupt(2, number)
            status, output = run(*arguments)
            assert status == 130
            assert last_json(capsys.readouterr().out)["partial"] is True
            assert "**Partial" in (output / "report.md").read_text()
    finally:
        assert signal.signal(signal.SIGINT, ignored) is signal.SIG_IGN
    before = read_report(output)
    assert len(turns) == 24  # four lengths, three rounds, two runs
    for change, reason in ((["--seed", "7"], "settings of the interrupted run"), (["--engine", "x"], "x")):
        assert run(*arguments, *change, "--resume")[0] == 2
        assert reason in capsys.readouterr().err
    assert run(*arguments, "--resume")[0] == 0
    after = read_report(output)
    assert len(turns) == 24  # none of them again
    assert after.select("latency") == before.select("latency")
    rates = [one(report, "throughput", "texts per second") for report in (before, after)]
    assert [len(rate.samples) for rate in rates] == [1, 3]
    assert (before.facts.partial, after.facts.partial) == (True, False)
    assert (after.facts.started, len(after.facts.resumed)) == (before.facts.started, 1)
    assert after.facts.wall_s > before.facts.wall_s
    assert run(*arguments, "--resume")[0] == 2
    assert "start anew" in capsys.readouterr().err


def test_only_an_interrupted_runs_folder_is_deleted(run, tmp_path, capsys):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("")
    assert run("--suite", "throughput", "--quick")[0] == 2
    assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "out.unfinished" / "thesis.txt").exists()


def test_an_engine_that_is_not_installed_is_a_failed_variant(run, make_bundle, make_artifact, capsys):
    artifacts = (make_artifact(EngineName.TENSORRT, Precision.FP16), make_artifact(EngineName.FAKE, Precision.FP32))
    bundle = make_bundle(artifacts=artifacts, name="two")
    status, output = run("--suite", "throughput", "--rounds", "1", bundle=bundle)
    assert status == 0
    report = read_report(output)
    assert "tensorrt fp16" in {failure.party for failure in report.failures if failure.suite == "throughput"}
    assert {one.party for one in report.select("throughput")} == {"fake fp32"}
    status, _ = run("--suite", "throughput", "--rounds", "1", "--engine", "tensorrt", bundle=bundle)
    assert status == 1  # nothing could be measured
    assert {figure["suite"] for figure in last_json(capsys.readouterr().out)["figures"]} <= {"bundle", "ceilings"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{absent}"], "is not a bundle"),
        (["{bundle}", "--engine", "openvino"], "nothing matches --engine"),
        (["{bundle}", "--texts", "{absent}"], "cannot be read"),
        (["{bundle}", "--output", "{bundle}"], "has no report to replace"),
        (["{bundle}", "--output", "{bundle}/config.json"], "is a file"),
        (["{bundle}", "--peer-env", "nobody=x"], "NAME=DIR"),
        (["{bundle}", "--suite", "peers", "--peer", "nobody"], "must be one of sentence-transformers"),
        (["--suite", "peers", "--peer", "plain-loop", "ctranslate2", "{absent}"], "is not a bundle"),
        (["{bundle}", "--suite", "quality"], "needs --sts or --words"),
        (["{bundle}", "--suite", "quality", "--sts", "{absent}"], "absent"),
        (["{bundle}", "--suite", "training"], "needs --base and --corpus"),
        (["{bundle}", "--suite", "training", "--base", "{absent}", "--corpus", "{absent}"], "needs --sts or --words"),
        (["{bundle}", "--resume"], "--resume: "),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(bundle, tmp_path, capsys, arguments, message):
    names = {"bundle": bundle, "absent": tmp_path / "absent"}
    command = [argument.format(**names) for argument in arguments]
    if "--output" not in arguments:
        command += ["--output", str(tmp_path / "out")]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.fixture
def tuning_files(tmp_path) -> list[str]:
    corpus, pairs = tmp_path / "corpus.txt", tmp_path / "pairs.tsv"
    corpus.write_text("".join(f"the cat no. {i} is playing the guitar with number {i * 7}\n" for i in range(450)))
    rows = [f"{i % 6}\tthe cat no. {i} is playing\tthe dog no. {i % 5} is singing\n" for i in range(20)]
    pairs.write_text("score\tsentence1\tsentence2\n" + "".join(rows))
    return ["--corpus", str(corpus), "--sts", str(pairs)]


def test_training_interleaves_our_recipe_and_the_published_one(run, monkeypatch, tmp_path, tuning_files):
    """The commands are replaced: a real tuning is `test_training_runs_for_real`."""
    order = []

    def tune(trainer: Trainer, seed: int, *_: object) -> tuple[float, dict[str, float]]:
        order.append((trainer.party, seed))
        return 10.0 + seed, {"pairs": 70.0, "mean": 70.0}

    monkeypatch.setattr(training, "_run", tune)
    options = ["--suite", "training", "--quick", "--base", str(tmp_path), *tuning_files]
    status, output = run(*options, "--training-seeds", "2")
    report = read_report(output)
    assert (status, report.failures) == (0, ())
    ours = "mirror-runtime, recipe sentence"
    assert order == [(ours, 42), (REFERENCE_PARTY, 42), (ours, 43)]
    assert one(report, "training", "time to the saved folder").samples == (52.0, 53.0)
    assert one(report, "training", "100 - mean Spearman").samples == (30.0, 30.0)
    assert one(report, "training", "texts").median == 200


@pytest.mark.slow  # two tuning runs, one in a process of its own
def test_training_runs_for_real(run, tiny_bert, tuning_files, monkeypatch):
    def run_command(command: Sequence[str], name: str) -> None:
        """Run ours in this process: another one would import PyTorch for five seconds, and other tests start it."""
        ours = {"tune.py": tune.main, "evaluate.py": evaluate.main}
        if name not in ours:
            run_to_end(command, name)
        else:
            assert ours[name](command[2:]) == 0

    monkeypatch.setattr(training, "run_to_end", run_command)
    status, output = run("--suite", "training", "--quick", "--base", str(tiny_bert), *tuning_files)
    report = read_report(output)
    assert (status, report.failures) == (0, ())
    assert {one.party for one in report.select("training")} == {"mirror-runtime, recipe sentence", REFERENCE_PARTY}
    assert all(-100 <= one.median <= 100 for one in report.select("training", "Spearman x 100", set="mean"))


@pytest.mark.slow  # an export and three runs
def test_a_wrong_pooling_is_caught_by_quality_and_compare(run, tiny_bert, tiny_bundle, tmp_path, capsys):
    wrong = tmp_path / "wrongly-pooled"  # with the first token's vector in place of the mean
    texts = ("", "the cat sat on the mat.", "a man is playing a guitar", *"abcdefgh")
    request = Request(
        encoder=str(tiny_bert), output=wrong, pooling=Pooling.CLS, texts=texts, precisions=(Precision.FP32,)
    )
    with cached_traces():
        build(request)
    # People who agree with the right pooling.
    words = ["cat", "dog", "man", "guitar", "river", "mat"]
    pairs = [(f"the {a} sat on a {b}", f"a {c} is playing the {a}") for a in words for b in words for c in words[:3]]
    with Encoder.load(tiny_bundle, engine="onnxruntime") as encoder:
        left, right = (encoder.encode([pair[side] for pair in pairs]) for side in (0, 1))
    people = tmp_path / "people.tsv"
    rows = [f"{score:.6f}\t{a}\t{b}\n" for score, (a, b) in zip(cosines(left, right), pairs, strict=True)]
    people.write_text("score\tsentence1\tsentence2\n" + "".join(rows), encoding="utf-8")
    for name, bundle in (("base", tiny_bundle), ("same", tiny_bundle), ("wrong", wrong)):
        options = ["--suite", "quality", "--sts", str(people), "--engine", "onnxruntime"]
        assert run(*options, bundle=bundle, name=name)[0] == 0
    mean = one(read_report(tmp_path / "base"), "quality", "Spearman x 100", set="mean")
    assert mean.median > 99.9
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "same")]) == 0
    capsys.readouterr()
    assert compare.main([str(tmp_path / "base"), str(tmp_path / "wrong")]) == 1
    assert "quality, onnxruntime fp32, people" in capsys.readouterr().err
