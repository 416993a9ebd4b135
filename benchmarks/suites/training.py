"""Suite `training`: our recipes and the published one, each from process start to a saved folder, then its scores."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from benchmarks.plan import Plan, Suite, steps, take_turns
from benchmarks.recorder import Recorder
from benchmarks.report.record import Better
from benchmarks.suites.quality import MEAN
from benchmarks.workers import run_to_end
from mirror_runtime.bundle import Pooling, sha256_file
from mirror_runtime.errors import InputError

SUITE = Suite.TRAINING.value
ROOT = Path(__file__).resolve().parents[2]
REFERENCE_PARTY = "published recipe (padded, fp32)"
REFERENCE_SCRIPT = ROOT / "benchmarks" / "peers" / "mirror_bert_recipe.py"
QUICK_TEXTS = 200
FIRST_SEED = 42


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is tuned, on what, and how it is judged.

    Attributes:
        base: folder of a masked language model.
        corpus: text, one per line.
        sts, words: similarity sets, in layouts that training/evaluate.py reads.
        pooling: mean or cls.
        recipes: of training/tune.py, each run with so many seeds.
        reference_seeds: of the published recipe, which takes many times as long; 0 leaves it out.
        quick: tune on the first `QUICK_TEXTS` texts only.
    """

    base: Path
    corpus: Path
    sts: tuple[Path, ...]
    words: tuple[Path, ...]
    pooling: Pooling
    recipes: tuple[str, ...]
    seeds: int
    reference_seeds: int
    quick: bool

    def __post_init__(self) -> None:
        if not self.sts and not self.words:
            raise InputError("suite training needs --sts or --words: a tuning time without a score means nothing")
        if self.pooling not in (Pooling.MEAN, Pooling.CLS):
            raise InputError(f"suite training compares mean or cls pooling, not {self.pooling.value}")

    def describe(self) -> str:
        """Return what is tuned and how often in words: a continued run must do the same."""
        try:
            corpus = sha256_file(self.corpus)
        except OSError as error:
            raise InputError(f"--corpus {self.corpus} cannot be read: {error.strerror}") from error
        return (
            f"{self.base.name} on {self.corpus.name} ({corpus[:16]}), {self.pooling.value}, recipes "
            f"{' '.join(self.recipes)}, {self.seeds} seeds, {self.reference_seeds} of the published recipe"
        )


class Trainer(NamedTuple):
    """A command that tunes; `{seed}` and `{output}` in it are filled in."""

    party: str
    seeds: int
    command: tuple[str, ...]


def run_training(plan: Plan, recorder: Recorder, progress: Progress) -> None:
    """Interleave the recipes, one seed a round, and judge every folder with training/evaluate.py.

    A party that fails is recorded with its reason; the others go on.
    """
    tuning = plan.training
    if tuning is None:
        return
    corpus, texts = _corpus(tuning, plan.scratch.resolve())

    def turns(trainer: Trainer) -> Callable[[int], None]:
        fact = partial(recorder.record, SUITE, trainer.party)
        seconds: list[float] = []
        scores: dict[str, list[float]] = defaultdict(list)

        def turn(round_: int) -> None:
            if round_ >= trainer.seeds:
                return
            took_s, found = _run(trainer, FIRST_SEED + round_, tuning, plan.scratch)
            seconds.append(took_s)
            for name, score in found.items():
                scores[name].append(score)
                fact("Spearman x 100", *scores[name], unit="points", conditions={"set": name})
            fact("time to the saved folder", *seconds, unit="s", better=Better.LOWER)
            fact("100 - mean Spearman", *(100 - mean for mean in scores[MEAN]), unit="points", better=Better.LOWER)
            fact("seed", *range(FIRST_SEED, FIRST_SEED + round_ + 1))
            fact("texts", texts)

        return turn

    trainers = _trainers(tuning, corpus)
    rounds = max(trainer.seeds for trainer in trainers)
    with steps(progress, SUITE, len(trainers) * rounds) as done:
        parties = {trainer.party: turns(trainer) for trainer in trainers}
        take_turns(parties, rounds, lambda name, error: recorder.fail(SUITE, name, error), done)


def _corpus(plan: TrainingPlan, scratch: Path) -> tuple[Path, int]:
    """Return the corpus to tune on and its number of texts."""
    try:
        texts = list(dict.fromkeys(filter(None, map(str.strip, plan.corpus.read_text(encoding="utf-8").split("\n")))))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--corpus {plan.corpus} cannot be read as UTF-8 text: {error}") from error
    if not plan.quick:
        return plan.corpus.resolve(), len(texts)
    short = scratch / plan.corpus.name
    short.write_text("\n".join(texts[:QUICK_TEXTS]) + "\n", encoding="utf-8")
    return short, min(len(texts), QUICK_TEXTS)


def _trainers(plan: TrainingPlan, corpus: Path) -> list[Trainer]:
    common = (
        *("--base", str(plan.base.resolve()), "--corpus", str(corpus), "--output", "{output}"),
        *("--pooling", plan.pooling.value, "--seed", "{seed}"),
    )
    tune = (sys.executable, str(ROOT / "training" / "tune.py"), *common, "--probe", "none", "--recipe")
    ours = [Trainer(f"mirror-runtime, recipe {recipe}", plan.seeds, (*tune, recipe)) for recipe in plan.recipes]
    reference = Trainer(REFERENCE_PARTY, plan.reference_seeds, (sys.executable, str(REFERENCE_SCRIPT), *common))
    return [*ours, reference] if reference.seeds else ours


def _run(trainer: Trainer, seed: int, plan: TrainingPlan, scratch: Path) -> tuple[float, dict[str, float]]:
    """Tune once; return the seconds and the Spearman x 100 of each set and of their mean."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        output, report = (Path(folder).resolve() / name for name in ("run", "evaluation.json"))
        command = [part.format(seed=seed, output=output) for part in trainer.command]
        began = time.perf_counter()
        run_to_end(command, Path(command[1]).name)
        seconds = time.perf_counter() - began
        judge = [sys.executable, str(ROOT / "training" / "evaluate.py"), str(output), "--output", str(report)]
        judge += ["--pooling", plan.pooling.value]
        for option, files in (("--sts", plan.sts), ("--words", plan.words)):
            judge += [option, *(str(file.resolve()) for file in files)] if files else []
        run_to_end(judge, Path(judge[1]).name)
        found = json.loads(report.read_text(encoding="utf-8"))["encoders"][0]
        return seconds, {**{result["name"]: result["spearman"] for result in found["sets"]}, MEAN: found["mean"]}
