"""`--recipe auto`: rivals on one budget, chosen on one half of the held-out texts and measured on the other."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from evaluation.statistics import Bootstrap
from mirror_runtime.bundle import Pooling
from training import run
from training.checkpoint import Step
from training.corpus import CorpusRequest, read_corpus
from training.gate import split_corpus
from training.job import Job, ProbeChoice, RunObserver
from training.own import read_own
from training.recipe import RECIPES, RIVALS, Device, Recipe, TuneConfig, TunePrecision
from training.tune import main

pytestmark = pytest.mark.tunes

ANIMALS = ("cat", "dog", "man", "river", "mat", "guitar")
OPTIONS = ("--recipe", "auto", "--documents", "--pooling", "mean", "--batch-size", "16", "--max-tokens", "48")


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.gate.MIN_TEXTS", 60)
    monkeypatch.setattr("training.own.FEWEST", 50)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    pairs = [(f"the {a} no. {i}", f"a number {i} sat on the {a}. It is playing.") for i in range(24) for a in ANIMALS]
    path.write_text("".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in pairs))
    return path


def probed(monkeypatch: pytest.MonkeyPatch, shares: Sequence[float]) -> list[list[str]]:
    """Replace the probe's measurements, in order, by shares of 50 questions; return the questions of each."""
    asked: list[list[str]] = []
    left: Iterator[float] = iter(shares)

    def measured(probes: Any, *_: Any) -> Any:
        asked.append([question for probe in probes for question in probe.questions])
        right = int(50 * next(left))
        return [Bootstrap().mean("probe", "own", "parts, MRR", np.repeat([1, 0], [right, 50 - right]))]

    monkeypatch.setattr("training.gate.evaluate_probes", measured)
    return asked


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ((0.2, 0.5, 0.9, 0.3, 0.9), "mirror+"),
        ((0.2, 0.9, 0.5, 0.3, 0.1), "documents"),  # chosen, and on the other half worse
        ((0.2, 0.22, 0.22, 0.3, 0.3), None),  # gains that may be chance
    ],
)
def test_the_best_rival_or_the_base_is_written_with_the_reason(
    tiny_bert, corpus, tmp_path, capsys, monkeypatch, shares, chosen
):
    asked = probed(monkeypatch, shares)
    folder = tmp_path / "run"
    files = ["--base", str(tiny_bert), "--corpus", str(corpus), "--output", str(folder)]
    assert main([*files, *OPTIONS]) == (3 if shares[-1] < shares[-2] else 0)
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["chosen"], list(result["trials"])) == (chosen, list(RIVALS[True]))
    assert (result["gate"]["before"], result["gate"]["after"]) == (30, 100 * shares[-1])
    assert set(asked[0]).isdisjoint(asked[-1])
    assert [len(one) for one in asked] == [50] * 5
    assert f"chosen: {chosen or 'the base as it is'} (" in " ".join(captured.err.split())
    report = json.loads((folder / "train.json").read_text())
    card = (folder / "README.md").read_text()
    assert "## Which recipe?\n\nchosen: " in card
    same = all(
        np.array_equal(value, load_file(tiny_bert / "model.safetensors")[name])
        for name, value in load_file(folder / "model.safetensors").items()
    )
    assert same == (chosen is None)
    assert (folder / "loss.png").exists() == (chosen is not None)
    if chosen is None:
        assert (result["steps"], result["loss"], report["settings"]) == (0, None, None)
        assert "left as it is" in card
        assert "while tuning" not in card
    else:
        assert report["settings"]["views"] == [view.value for view in RIVALS[True][chosen].views]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == result["steps"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--probe", "none"), "--recipe auto and --seeds choose by the probe"),
        (
            ("--sample", "119"),
            "119 distinct texts are too few .* pass 120 or more, or --probe none, with a recipe other",
        ),
        (("--teacher", "x"), "--teacher is learnt from single texts, not from --documents"),
        (("--max-tokens", "65"), "--max-tokens is 65"),
        (("--pairs",), "pass one of them"),
    ],
)
def test_what_auto_cannot_use_is_one_error(tiny_bert, corpus, tmp_path, capsys, more, message):
    files = ["--base", str(tiny_bert), "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    assert main([*files, *OPTIONS, *more]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_seeds_and_the_average_of_their_weights_are_rivals(tiny_bert, corpus, tmp_path, capsys, monkeypatch):
    for name, value in (("COMMON_WORDS", 8), ("RARE", (2, 40)), ("MIN_ITEMS", 30)):
        monkeypatch.setattr(f"evaluation.probes.{name}", value)
    asked = probed(monkeypatch, (0.2, 0.5, 0.5, 0.9, 0.3, 0.9))
    files = ["--base", str(tiny_bert), "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    options = [one for one in OPTIONS if one not in ("--recipe", "auto")]
    assert main([*files, *options, "--seeds", "2", "--seed", "5", "--lr", "1e-3", "--probe", "content"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["chosen"], list(result["trials"])) == (
        "documents.soup",
        ["documents.5", "documents.6", "documents.soup"],
    )
    assert all(one["probe"] == "content" for one in (*result["trials"].values(), result["gate"]))
    assert all("sat on the" in question for question in asked[0]), "texts, not titles"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, result["steps"] + 1))
    seconds = [json.loads(line)["sec"] for line in lines]
    assert seconds == sorted(seconds)
    soup = load_file(tmp_path / "run" / "model.safetensors")
    alone = []
    for seed in ("5", "6"):
        probed(monkeypatch, (0.2, 0.9, 0.3, 0.9))
        monkeypatch.setattr("training.tune.RIVALS", {True: {"documents": RECIPES[Recipe.DOCUMENTS]}})
        again = ["--recipe", "auto", "--seed", seed, "--lr", "1e-3", "--overwrite"]
        assert main([*files, *options, *again]) == 0
        alone.append(load_file(tmp_path / "run" / "model.safetensors"))
    assert any(not np.array_equal(alone[0][name], alone[1][name]) for name in soup)
    for name, weight in soup.items():
        np.testing.assert_allclose(weight, (alone[0][name] + alone[1][name]) / 2, atol=1e-6)


class Stopped(RunObserver):
    def __init__(self) -> None:
        self.rivals = 0

    def on_start(self, start):
        self.rivals += 1

    def on_step(self, step: Step) -> None:
        if self.rivals == 2 and step.step == 4:
            raise KeyboardInterrupt


def test_a_killed_choice_resumes_to_the_same_weights(tiny_bert, corpus, tmp_path):
    small = TuneConfig(batch_size=8, lr=1e-3, max_tokens=48, device=Device.CPU, precision=TunePrecision.FP32)
    rivals = {"slow": dataclasses.replace(small, lr=1e-5), "fast": small}
    job = Job(
        base=str(tiny_bert),
        pooling=Pooling.MEAN,
        corpus=CorpusRequest(files=(str(corpus),), documents=True),
        output=tmp_path / "run",
        config=small,
        rivals=rivals,
        checkpoint_every=2,
        probe=ProbeChoice.AUTO,
    )
    with pytest.raises(KeyboardInterrupt):
        run.tune(job, Stopped())
    assert sorted(path.name for path in tmp_path.glob(".run*")) == [".run.fast.checkpoint", ".run.slow.checkpoint"]
    resumed = run.tune(job)
    assert not list(tmp_path.glob(".run*"))
    whole = run.tune(dataclasses.replace(job, output=tmp_path / "whole", checkpoint_every=None))
    assert {name: one.after for name, one in resumed.trials.items()} == {
        name: one.after for name, one in whole.trials.items()
    }
    names = ("model.safetensors", "encoder.json")
    assert all((tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


@pytest.mark.parametrize("options", [("--scored-pairs",), ("--teacher", "x")])
def test_auto_refuses_labels_and_a_teacher(tiny_bert, corpus, tmp_path, capsys, options):
    files = ["--base", str(tiny_bert), "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    assert main([*files, "--recipe", "auto", *options]) == 2
    assert "--recipe auto has no recipe for labels or a teacher" in capsys.readouterr().err


def test_a_rival_masks_nothing_where_the_tokenizer_has_no_mask_token(tiny_bert, corpus, tmp_path, capsys, monkeypatch):
    probed(monkeypatch, (0.2, 0.5, 0.9, 0.3, 0.9))
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    config = base / "tokenizer_config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "mask_token": None}))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    files = ["--base", str(base), "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    assert main([*files, *OPTIONS]) == 0, capsys.readouterr().err
    settings = json.loads((tmp_path / "run" / "train.json").read_text())["settings"]
    assert (settings["mask_length"], settings["repetition"]) == (0, 0.3)


def test_halves_are_twice_what_one_run_holds_out(corpus):
    whole = read_own([str(corpus)])
    documents = read_corpus(CorpusRequest(files=(str(corpus),), documents=True))
    rest, halves = split_corpus(documents, 2)
    held = [one for half in halves for one in half]
    assert (len(held), len(rest.examples)) == (100, len(whole) - 100)
    assert set(split_corpus(documents)[1][0]) < set(held)
    assert set(held) == {type(held[0])(*one) for one in held if one in whole}
