"""Check the benchmark itself with real runs of this commit: no false alarms, and planted regressions are caught.

    python benchmarks/self_check.py BUNDLE --sts sts-test.tsv --output reports/self-check
    python benchmarks/self_check.py planted 0.15 BUNDLE …

Compares the same code with itself several times: `compare.py` must raise no alarm. Then it compares with engine runs
that take 15 % longer, and with a wrong pooling: it must raise one. The last line of standard output is one JSON object;
exit status 1 if a comparison is wrong.

The second form is the slowed side: it takes the arguments of `run.py` after the slowdown, and each engine run takes
longer by this share of its time, asleep. Neither the runtime nor `run.py` knows about it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from benchmarks import run as benchmark
from benchmarks.compare import Verdict, compare
from benchmarks.report.storage import Report, read_report
from mirror_runtime import Encoder
from mirror_runtime.bundle import Pooling, read_manifest
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.engines import Engine
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.packing import PackedRows
from mirror_runtime.selection import choose
from mirror_runtime.vectors import Vectors

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD = 0.07
PLANTED = 0.15
BARE_ENCODER = (
    *("config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)
"""The files of an encoder without its head."""

RUN = ("run.py",)
QUICK = ("--suite", "latency", "throughput", "--quick", "--rounds", "5")


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    sts: Annotated[Path, typer.Option(help="A sentence similarity set, to judge the pooling by.")],
    output: Annotated[Path, typer.Option(help="New folder for the reports of all runs.")] = Path("reports/self-check"),
    pairs: Annotated[int, typer.Option(min=1, help="Comparisons of the same code with itself.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Of each side of a comparison, interleaved, as in CI.")] = 5,
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
) -> None:
    """Compare this commit with itself, and with itself made worse on purpose."""
    manifest = read_manifest(bundle)
    name, resolved, _ = choose(manifest, engine, precision)
    artifact = ("--engine", name.value, "--precision", resolved.value)
    if manifest.encoder.pooling is Pooling.CLS:
        raise InputError(f"{bundle} has cls pooling, which is the wrong pooling to plant: use another bundle")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output {output} is not empty: choose another folder")
    output.mkdir(parents=True, exist_ok=True)

    def speed(title: str, *planted: str) -> tuple[list[Report], list[Report]]:
        """Measure both sides in interleaved runs, the head with a planted slowdown if there is one."""
        sides: tuple[list[Report], list[Report]] = [], []
        for number in range(1, runs + 1):
            for side, label, script in zip(sides, ("base", "head"), (RUN, planted or RUN), strict=True):
                side.append(_measure(script, bundle, output / title / f"{label}-{number}", *QUICK, *artifact))
        return sides

    comparisons = [(f"same code, {pair}", False, partial(speed, f"same-{pair}")) for pair in range(1, pairs + 1)]
    slower = partial(speed, "slower", "self_check.py", "planted", str(PLANTED))
    comparisons.append((f"engine runs {100 * PLANTED:.0f} % longer", True, slower))
    comparisons.append(("wrong pooling", True, partial(_poolings, bundle, sts, output)))
    trials = {name: judge(name, *measure(), expected=expected) for name, expected, measure in comparisons}
    right = sum(trial["right"] for trial in trials.values())
    sys.stdout.write(json.dumps({"right": right, "of": len(trials), "trials": trials}) + "\n")
    if right < len(trials):
        raise typer.Exit(1)


def judge(name: str, base: Sequence[Report], head: Sequence[Report], *, expected: bool) -> dict[str, Any]:
    """Return the metrics that got worse or are missing, each with its ratio, and whether that was expected."""
    alarms = [
        f"{change.metric} ({change.ratio:.3f})"
        for change in compare(base, head, threshold=THRESHOLD)
        if change.verdict in (Verdict.WORSE, Verdict.LOST)
    ]
    right = bool(alarms) == expected
    sys.stderr.write(f"{'right' if right else 'WRONG'}: {name}: {'; '.join(alarms) or 'no alarm'}\n")
    return {"alarms": alarms, "right": right}


def call(script: str, *arguments: object) -> None:
    """Run a script of this repository to its end.

    Raises:
        EngineError: it failed; the message is its last line.
    """
    command = (sys.executable, ROOT / script, *arguments)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(f"{script} ended with status {done.returncode}: {last[0]}")


def _measure(script: Sequence[str], bundle: Path, folder: Path, *options: object) -> Report:
    """Run `run.py`, or this script with a slowdown, in a process of its own."""
    name, *arguments = script
    call(f"benchmarks/{name}", *arguments, bundle, *options, "--output", folder)
    return read_report(folder)


def _poolings(bundle: Path, sts: Path, output: Path) -> tuple[list[Report], list[Report]]:
    """Judge the bundle, and the same weights exported with the first token's vector instead of the mean."""
    bare, wrong = output / "bare-encoder", output / "wrong-pooling-bundle"
    bare.mkdir()
    for name in BARE_ENCODER:  # without the files that record the pooling: the exporter refuses to contradict them
        if (bundle / name).is_file():
            shutil.copy(bundle / name, bare / name)
    call("export/to_onnx.py", bare, "--output", wrong, "--pooling", "cls", "--precision", "fp32")
    options = ("--suite", "quality", "--sts", sts, "--engine", "onnxruntime", "--precision", "fp32")
    base = _measure(RUN, bundle, output / "pooling" / "base", *options)
    head = _measure(RUN, wrong, output / "pooling" / "head", *options)
    for folder in (bare, wrong):
        shutil.rmtree(folder)
    return [base], [head]


def slow_down(engine: Engine, share: float) -> None:
    """Make every run of an engine sleep for a share of its own time: 0.15 turns 10 ms into 11.5 ms."""
    unchanged = engine.run

    def run_slowly(rows: PackedRows) -> Vectors:
        began = time.perf_counter()
        vectors = unchanged(rows)
        time.sleep(share * (time.perf_counter() - began))
        return vectors

    setattr(engine, "run", run_slowly)  # noqa: B010 - mypy rejects an assignment to a method


def run_planted(share: float, arguments: Sequence[str]) -> int:
    """Plant the slowdown in every encoder that this process loads, run the benchmark, and return its status."""
    load = Encoder.load

    def load_slowed(*values: Any, **options: Any) -> Encoder:
        encoder = load(*values, **options)
        slow_down(encoder.engine, share)
        return encoder

    with patch.object(Encoder, "load", load_slowed):
        return benchmark.main(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when every comparison is right, 1 when one is wrong, 2 on a user's mistake; that of `run.py` when planted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["planted"]:
        return run_planted(float(arguments[1]), arguments[2:])
    return run_command(application(run), arguments, "benchmarks/self_check.py")


if __name__ == "__main__":
    sys.exit(main())
