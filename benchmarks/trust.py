"""Does the benchmark cry wolf, and does it cry when there is one? Real runs of this very commit say so.

    python benchmarks/trust.py BUNDLE --sts sts-test.tsv --output reports/trust

Runs the same code against itself some times: `compare.py` must raise no alarm. Then with every engine run 15 % longer,
and on a bundle with a wrong pooling: it must raise one. The last line of standard output is one JSON object; exit
status 1 if anything is not as it should be.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from benchmarks.changes import Change, Verdict
from benchmarks.compare import compare
from benchmarks.results import Report, read_report
from mirror_runtime.bundle import EngineName, Pooling, Precision, read_manifest
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.selection import choose

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD = 0.07
PLANTED = 0.15
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
BARE = ("config.json", "model.safetensors", *TOKENIZER)
"""What an encoder is without its head."""

QUICK = ("--quick", "--rounds", "5")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One comparison and what it should say.

    Attributes:
        name: what was compared.
        alarms: metrics that got worse or are gone, each with its ratio.
        expected: whether there should be any.
    """

    name: str
    alarms: tuple[str, ...]
    expected: bool

    @property
    def right(self) -> bool:
        """Whether the comparison said what it should."""
        return bool(self.alarms) == self.expected


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How reports are made: one artifact, quick runs in turns.

    Attributes:
        artifact: options of `benchmarks/run.py` that choose it.
        runs: of each side of a comparison.
        output: where reports are kept.
    """

    bundle: Path
    artifact: tuple[str, ...]
    runs: int
    output: Path

    def speed(self, name: str, *planted: str) -> tuple[list[Report], list[Report]]:
        """Measure both sides in turns, the second with more options."""
        sides: tuple[list[Report], list[Report]] = [], []
        for run in range(self.runs):
            for side, (title, options) in zip(sides, (("base", ()), ("head", planted)), strict=True):
                folder = self.output / name / f"{title}-{run + 1}"
                side.append(self.report(self.bundle, folder, "latency", "throughput", *QUICK, *options))
        return sides

    def report(self, bundle: Path, folder: Path, *suites_and_options: str) -> Report:
        """Let `benchmarks/run.py` measure, in a process of its own."""
        script = ROOT / "benchmarks" / "run.py"
        call(sys.executable, script, bundle, "--suite", *suites_and_options, *self.artifact, "--output", folder)
        return read_report(folder)


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    sts: Annotated[Path, typer.Option(help="A sentence similarity set, to judge the pooling by.")],
    output: Annotated[Path, typer.Option(help="Folder for the reports of all runs; made anew.")] = Path(
        "reports/trust"
    ),
    pairs: Annotated[int, typer.Option(min=1, help="Comparisons of the same code with itself.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Of each side of a comparison, in turns, as in CI.")] = 5,
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
) -> None:
    """Compare this commit with itself, and with itself made worse on purpose."""
    manifest = read_manifest(bundle)
    name, runs_in, _ = choose(manifest, engine, precision)
    if manifest.encoder.pooling is Pooling.CLS:
        raise InputError(f"{bundle} pools by cls, which is what this plants as the wrong pooling: take another bundle")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output {output} is not empty: choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    speed = Runs(bundle=bundle, artifact=_options(name, runs_in), runs=runs, output=output)
    trials = []
    for pair in range(pairs):
        trials.append(judge(f"same code, {pair + 1}", *speed.speed(f"same-{pair + 1}"), expected=False))
    slower = speed.speed("slower", "--planted-slowdown", str(PLANTED))
    trials.append(judge(f"engine runs {100 * PLANTED:.0f} % longer", *slower, expected=True))
    trials.append(judge("wrong pooling", *_poolings(bundle, sts, output), expected=True))
    right = sum(trial.right for trial in trials)
    line = {trial.name: {"alarms": trial.alarms, "right": trial.right} for trial in trials}
    sys.stdout.write(json.dumps({"right": right, "of": len(trials), "trials": line}) + "\n")
    if right < len(trials):
        raise typer.Exit(1)


def judge(name: str, base: Sequence[Report], head: Sequence[Report], *, expected: bool) -> Trial:
    """Compare two sides and say on standard error whether the verdict is right."""
    changes = compare(base, head, threshold=THRESHOLD)
    trial = Trial(name=name, alarms=tuple(_alarm(c) for c in changes if _is_alarm(c)), expected=expected)
    said = "; ".join(trial.alarms) or "no alarm"
    sys.stderr.write(f"{'right' if trial.right else 'WRONG'}: {name}: {said}\n")
    return trial


def call(*command: object) -> None:
    """Run a command to its end.

    Raises:
        EngineError: it failed; the message is its last line.
    """
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(f"{Path(str(command[1])).name} ended with status {done.returncode}: {last[0]}")


def _poolings(bundle: Path, sts: Path, output: Path) -> tuple[list[Report], list[Report]]:
    """Judge the bundle, and the same weights exported as if their vector were that of the first token."""
    bare, wrong = output / "bare-encoder", output / "wrong-pooling-bundle"
    bare.mkdir()
    for name in BARE:  # without the files that record the pooling: the exporter refuses to contradict them
        if (bundle / name).is_file():
            shutil.copy(bundle / name, bare / name)
    call(
        *(sys.executable, ROOT / "export" / "to_onnx.py", bare, "--output", wrong),
        *("--pooling", Pooling.CLS.value, "--precision", Precision.FP32.value),
    )
    runs = Runs(bundle=bundle, artifact=_options(EngineName.ONNXRUNTIME, Precision.FP32), runs=1, output=output)
    right, other = (
        runs.report(which, output / "pooling" / title, "quality", "--sts", str(sts))
        for which, title in ((bundle, "base"), (wrong, "head"))
    )
    for folder in (bare, wrong):
        shutil.rmtree(folder)
    return [right], [other]


def _options(engine: EngineName, precision: Precision) -> tuple[str, ...]:
    return "--engine", engine.value, "--precision", precision.value


def _is_alarm(change: Change) -> bool:
    return change.verdict in (Verdict.WORSE, Verdict.LOST)


def _alarm(change: Change) -> str:
    return f"{change.metric} ({change.ratio:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when every comparison said what it should, 1 when one did not, 2 on a mistake of the caller's.
    """
    return run_command(application(run), argv, "benchmarks/trust.py")


if __name__ == "__main__":
    sys.exit(main())
