"""Check the benchmark itself with real runs of this commit: no false alarms, and a planted slowdown is seen.

    python benchmarks/self_check.py BUNDLE --output reports/self-check
    python benchmarks/self_check.py planted 0.15 BUNDLE …

Compares the same code with itself several times: `compare.py` must raise no alarm. Then it compares with engine runs
that take 15 % longer: it must raise one. The last line of standard output is one JSON object; exit status 1 if a
comparison is wrong.

The second form is the slowed side: it takes the arguments of `run.py` after the slowdown, and each engine run takes
longer by this share of its time, asleep. Neither the runtime nor `run.py` knows about it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from benchmarks import run as benchmark
from benchmarks.compare import Verdict, compare
from benchmarks.report.storage import Report, read_report
from benchmarks.workers import run_to_end
from mirror_runtime import Encoder
from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError
from mirror_runtime.packing import PackedRows
from mirror_runtime.selection import choose
from mirror_runtime.vectors import Vectors

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD = 0.07
PLANTED = 0.15
RUN = ("benchmarks/run.py",)
SLOWED_RUN = ("benchmarks/self_check.py", "planted", str(PLANTED))
QUICK = ("--suite", "latency", "throughput", "--quick", "--rounds", "5")


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    output: Annotated[Path, typer.Option(help="New folder for the reports of all runs.")] = Path("reports/self-check"),
    pairs: Annotated[int, typer.Option(min=1, help="Comparisons of the same code with itself.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Of each side of a comparison, interleaved, as in CI.")] = 5,
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
) -> None:
    """Compare this commit with itself, and with itself made slower on purpose."""
    name, resolved, _ = choose(read_manifest(bundle), engine, precision)
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output {output} is not empty: choose another folder")
    options = (*QUICK, "--engine", name.value, "--precision", resolved.value)

    def measure(script: Sequence[str], folder: Path) -> Report:
        path, *arguments = script
        command = (sys.executable, ROOT / path, *arguments, bundle.resolve(), *options, "--output", folder.resolve())
        run_to_end([*map(str, command)], Path(path).name)
        return read_report(folder)

    trials, wrong = {}, 0
    for title in (*(f"same-{pair}" for pair in range(1, pairs + 1)), "slower"):
        planted, sides = title == "slower", dict[str, list[Report]](base=[], head=[])
        for number in range(1, runs + 1):  # both sides interleaved
            for label, side in sides.items():
                script = SLOWED_RUN if planted and label == "head" else RUN
                side.append(measure(script, output / title / f"{label}-{number}"))
        trials[title] = found = alarms(**sides)
        right = bool(found) == planted
        wrong += not right
        sys.stderr.write(f"{'right' if right else 'WRONG'}: {title}: {'; '.join(found) or 'no alarm'}\n")
    sys.stdout.write(json.dumps({"right": len(trials) - wrong, "of": len(trials), "alarms": trials}) + "\n")
    if wrong:
        raise typer.Exit(1)


def alarms(base: Sequence[Report], head: Sequence[Report]) -> list[str]:
    """Return the metrics that got worse or are missing, each with its ratio."""
    return [
        f"{change.metric} ({change.ratio:.3f})"
        for change in compare(base, head, threshold=THRESHOLD)
        if change.verdict in (Verdict.WORSE, Verdict.LOST)
    ]


def run_slowed(share: float, arguments: Sequence[str]) -> int:
    """Run the benchmark with a slowdown in every encoder that this process loads, and return its status.

    Every run of an engine sleeps for a share of its own time: 0.15 turns 10 ms into 11.5 ms.
    """
    load = Encoder.load

    def load_slowed(*values: Any, **options: Any) -> Encoder:
        encoder = load(*values, **options)
        unchanged = encoder.engine.run

        def run_slowly(rows: PackedRows) -> Vectors:
            began = time.perf_counter()
            vectors = unchanged(rows)
            time.sleep(share * (time.perf_counter() - began))
            return vectors

        setattr(encoder.engine, "run", run_slowly)  # noqa: B010 - mypy rejects an assignment to a method
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
        return run_slowed(float(arguments[1]), arguments[2:])
    return run_command(application(run), arguments, "benchmarks/self_check.py")


if __name__ == "__main__":
    sys.exit(main())
