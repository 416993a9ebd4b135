"""A run from names to a folder: its content, and that a failed run leaves nothing."""

import dataclasses
import errno
import json
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.card import read_card
from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import read_sets
from evaluation.similarity import Group
from mirror_runtime.bundle import Pooling
from mirror_runtime.errors import EngineError, InputError, MissingExtra
from mirror_runtime.prompts import PROMPTS_FILE
from training import run, run_folder
from training.checkpoint import Step
from training.corpus import CorpusRequest
from training.hardware import choose_hardware
from training.job import Job, ProbeChoice, RunObserver, Start
from training.recipe import Device, TuneConfig, TunePrecision
from training.run import tune
from training.run_folder import draw_curve
from training.tune import main

pytestmark = pytest.mark.tunes

SMALL = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48, device=Device.CPU, precision=TunePrecision.FP32)
EXTRA = r"is not installed: pip install .*\[train\]'"
DISK = r"needs about \d+ MiB, and its disk has 1 MiB left"
ONE_MIB = SimpleNamespace(free=2**20)
FULL = OSError(errno.ENOSPC, "No space left on device")


class Recorder(RunObserver):
    def __init__(self) -> None:
        self.started: list[Start] = []
        self.steps: list[Step] = []
        self.evaluated: dict[str, list[tuple[int, int]]] = {}

    def on_start(self, start: Start) -> None:
        self.started.append(start)

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_progress(self, encoder: str, done: int, total: int) -> None:
        self.evaluated.setdefault(encoder, []).append((done, total))


@pytest.fixture
def job(tiny_bert: Path, tmp_path: Path) -> Job:
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(f"the cat no. {i} is playing the guitar by a river\n" for i in range(40)))
    request, output = CorpusRequest(files=(str(corpus),)), tmp_path / "out" / "run"
    return Job(base=str(tiny_bert), pooling=Pooling.MEAN, corpus=request, output=output, config=SMALL)


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    path = tmp_path / "some-sts.tsv"
    texts = ["The cat no. 3 is playing the guitar, by a river!", "a dog", "a man sat", "mat", "on the mat", "a cat"]
    rows = [f"{(i * 7) % 6}\t{texts[i % 6]}\t{texts[(i * i + 1) % 6]}\n" for i in range(30)]
    path.write_text("score\tsentence1\tsentence2\n" + "".join(rows))
    return path


def test_prompts_of_the_base_stay(job: Job, tiny_bert: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    (base / PROMPTS_FILE).write_text(json.dumps({"prompts": {"query": "find: "}}))
    tune(dataclasses.replace(job, base=str(base)))
    assert resolve(str(job.output)).prompts == {"query": "find: "}


def test_an_evaluated_run_reports_before_and_after(job: Job, sts: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder()
    evaluated: dict[str, Any] = {"sets": {Group.STS: read_sets(str(sts))}, "tensorboard": True, "checkpoint_every": 3}
    summary = tune(dataclasses.replace(job, **evaluated), recorder)
    folder = job.output
    assert [path.name for path in folder.parent.iterdir()] == ["run"]  # the checkpoint is gone, too
    assert [step.step for step in recorder.steps] == [1, 2, 3, 4, 5]
    assert {name: progress[-1] for name, progress in recorder.evaluated.items()} == {"before": (6, 6), "after": (6, 6)}
    assert summary.before is not None
    assert summary.after is not None
    assert summary.before.results[0].spearman != summary.after.results[0].spearman

    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["before"] == summary.before.to_json()
    assert evaluation["after"] == summary.after.to_json()
    assert evaluation["overlap"] == [{"file": "some-sts", "texts": 6, "found": 1, "share": 0.1667}]
    report = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert report["settings"]["seed"] == 42
    assert report["corpus"]["tokens"] == {"texts": 40, "p50": 16, "p95": 16, "max": 16, "over": 0.0, "max_tokens": 48}
    assert report["corpus"]["files"][0]["name"] == "text.txt"
    assert report["result"]["sts_after"] == round(summary.after.results[0].spearman.value, 3)
    card = (folder / "README.md").read_text(encoding="utf-8")
    values = [str(measured.results[0].spearman) for measured in (summary.before, summary.after)]
    row = next(line for line in card.splitlines() if line.startswith("| some-sts | 30 "))
    assert row.startswith(f"| some-sts | 30 | {values[0]} | {values[1]} | ")
    assert row.endswith("| 16.7% |")
    assert "![loss](loss.png)" in card

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [scalar.value for scalar in events.Scalars("loss")] == pytest.approx([s.loss for s in recorder.steps])
    assert events.Scalars("spearman/some-sts")[0].value == pytest.approx(summary.after.results[0].spearman.value)

    with Image.open(folder / "loss.png") as image:
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    ours = Reference.load(resolve(str(folder))).encode(["the cat", "a river runs"])
    theirs = SentenceTransformer(str(folder), device="cpu").encode(["the cat", "a river runs"])
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_a_corpus_of_pairs_and_a_curve_of_one_step(job: Job, tmp_path: Path) -> None:
    draw_curve([Step(step=1, loss=2.0, tokens=3, seconds=0.1)], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"the cat no. {i}\ta dog no. {i}\n" for i in range(20)))
    recorder = Recorder()
    base = shutil.copytree(job.base, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    corpus = CorpusRequest(files=(str(pairs),), pairs=True)
    tune(dataclasses.replace(job, base=str(base), corpus=corpus), recorder)
    assert recorder.started[0].corpus.examples[1] == ("the cat no. 1", "a dog no. 1")
    assert len(recorder.steps) == 2
    card = read_card(job.output)
    assert card.terms == {"license": "mit"}
    assert "20 pairs of texts" in card.story
    assert "loss.png" not in card.story


def test_a_stopped_run_resumes_and_reports_its_checkpoint(job: Job) -> None:
    class Stopped(Recorder):
        def on_step(self, step: Step) -> None:
            super().on_step(step)
            if step.step == 4:
                raise KeyboardInterrupt

    job = dataclasses.replace(job, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        tune(job, Stopped())
    assert [path.name for path in job.output.parent.iterdir()] == [".run.checkpoint"]
    recorder = Recorder()
    tune(job, recorder)
    assert recorder.started[0].checkpoint == job.output.with_name(".run.checkpoint")
    assert [path.name for path in job.output.parent.iterdir()] == ["run"]
    whole = dataclasses.replace(job, output=job.output.with_name("whole"), checkpoint_every=None)
    tune(whole)
    for name in ("model.safetensors", "encoder.json"):
        assert (job.output / name).read_bytes() == (whole.output / name).read_bytes()
    losses = [json.loads(line)["loss"] for line in (whole.output / "metrics.jsonl").read_text().splitlines()]
    assert losses == [step.loss for step in recorder.steps]


@pytest.mark.parametrize(
    ("module", "function", "error", "expected", "message"),
    [
        (run_folder, "write_layout", FULL, InputError, r"run cannot be written: No space left on device .*Nothing was"),
        (run_folder, "draw_curve", FULL, InputError, r"run cannot be written: No space left on device .*Nothing was"),
        (run, "train", torch.OutOfMemoryError("out of memory"), EngineError, "set --micro-batch-tokens"),
    ],
)
def test_full_disks_and_full_devices_are_one_clear_error(job, monkeypatch, module, function, error, expected, message):
    monkeypatch.setattr(module, function, Mock(side_effect=error))
    with pytest.raises(expected, match=message):
        tune(job)
    assert list(job.output.parent.iterdir()) == []


def test_a_file_that_cannot_be_written_whole_leaves_nothing(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel limits file sizes, as a full disk or a quota would; safetensors writes past Python's files."""
    options = ["--base", job.base, "--corpus", job.corpus.files[0], "--output", str(job.output), "--pooling", "mean"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # Python ignores SIGXFSZ
    try:
        status = main([*options, "--batch-size", "8", "--max-tokens", "48", "--probe", "none"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "run cannot be written: " in line
    assert "File too large" in line
    assert "Traceback" not in captured.err
    assert list(job.output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda patch: patch.setattr(shutil, "disk_usage", lambda _: ONE_MIB), {}, DISK),
        (lambda patch: None, {"output": Path("/proc/nothing/run")}, "/proc/nothing/run cannot be written"),
        (lambda patch: patch.setitem(sys.modules, "tensorboard", None), {"tensorboard": True}, EXTRA),
        (lambda patch: patch.setitem(sys.modules, "matplotlib.figure", None), {}, EXTRA),
        (lambda patch: None, {"config": dataclasses.replace(SMALL, batch_size=50)}, "40 distinct lines, fewer than"),
    ],
    ids=["disk", "folder", "tensorboard", "matplotlib", "recipe"],
)
def test_what_a_run_will_lack_is_an_error_before_the_first_step(job, monkeypatch, spoil, changes, message):
    spoil(monkeypatch)
    recorder = Recorder()
    with pytest.raises((InputError, MissingExtra), match=message):
        tune(dataclasses.replace(job, **changes), recorder)
    assert recorder.started == []
    assert not [*job.output.parent.glob("*")]


def test_other_processes_train_and_write_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    second = dataclasses.replace(choose_hardware(Device.CPU, TunePrecision.FP32), rank=1, processes=2)
    used: list[Any] = []
    monkeypatch.setattr(run, "choose_hardware", lambda *_: second)

    def train(reference: Any, data: Any, config: Any, hardware: Any, on_step: Any, *_: Any) -> None:
        used.append(hardware)
        on_step(Step(step=1, loss=1.0, tokens=1, seconds=1.0))

    monkeypatch.setattr(run, "train", train)
    recorder = Recorder()
    summary = tune(job, recorder)
    assert (used, summary.steps, summary.start.hardware.writes) == ([second], 1, False)
    assert (recorder.started, recorder.steps) == ([], [])
    assert not job.output.parent.exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_no_process_waits_while_another_measures_the_base(job, monkeypatch, processes):
    events: list[str] = []
    measured: list[Any] = []

    class Gate:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.before = lambda reference: (events.append("before"), measured.append(reference))
            self.after = lambda reference: (events.append("after"), measured.append(reference), None)[-1]

    def train(reference: Any, data: Any, config: Any, hardware: Any, on_step: Any, *_: Any) -> None:
        events.append("train")
        on_step(Step(step=1, loss=1.0, tokens=1, seconds=1.0))

    hardware = dataclasses.replace(choose_hardware(Device.CPU, TunePrecision.FP32), processes=processes)
    monkeypatch.setattr(run, "choose_hardware", lambda *_: hardware)
    monkeypatch.setattr(run, "split_corpus", lambda corpus, _: (corpus, [[]]))
    monkeypatch.setattr(run, "Gate", Gate)
    monkeypatch.setattr(run, "train", train)
    tune(dataclasses.replace(job, probe=ProbeChoice.AUTO))
    assert events == ["train", "before", "after"]
    assert measured[0] is not measured[1]
