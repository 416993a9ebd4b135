"""Hold our own figures against a stopwatch that is not ours: hyperfine, around whole processes.

    python benchmarks/agree.py BUNDLE

One command loads the bundle and encodes some texts, another encodes twice as many: what the second takes longer is the
time of these texts, whatever loading takes. That is compared with what `benchmarks/run.py --suite latency throughput`
reports, in rounds that take turns. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer

from benchmarks.encode_passes import BATCH, SINGLE
from benchmarks.latency import TEXTS_A_LENGTH
from benchmarks.results import Report, read_report
from benchmarks.summary import median
from benchmarks.workload import bundle_tokenizer, load_workload, texts_of_length
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Precision, read_manifest
from mirror_runtime.cli.run import application, run_command, truncations_counted_elsewhere
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.selection import choose

FOLDER = Path(__file__).resolve().parent
TOKENS = 16
"""Of the single texts."""

CURE = "hyperfine is not on PATH: install it (Debian, Ubuntu: apt-get install hyperfine; others: its GitHub releases)"


@dataclass(kw_only=True)
class Figure:
    """One figure, measured in both ways.

    Attributes:
        name: what it is.
        unit: of both sides.
        texts: file of the texts of a pass.
        way: of `benchmarks.encode_passes`.
        passes: of the shorter command; the longer one makes twice as many.
        per_pass: from the seconds of one pass to the figure.
        reported: from our report to the figure.
        outside: by hyperfine, one a round.
        ours: by our report, likewise.
    """

    name: str
    unit: str
    texts: Path
    way: str
    passes: int
    per_pass: Callable[[float], float]
    reported: Callable[[Report], float]
    outside: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Our figure over hyperfine's, the median of the rounds' own: both of a round met the same machine."""
        return median([ours / outside for ours, outside in zip(self.ours, self.outside, strict=True)])


def run(
    bundle: Annotated[Path, typer.Argument(help="The folder that export/to_onnx.py wrote.", show_default=False)],
    engine: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the bundle, or auto.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="How often both take turns.")] = 3,
    passes: Annotated[
        int, typer.Option(min=1, help="Over the texts, of the shorter command. More give a steadier difference.")
    ] = 8,
    tolerance: Annotated[float, typer.Option(min=0.0, help="0.1 lets the figures differ by a tenth.")] = 0.1,
) -> None:
    """Say how far our throughput and latency are from hyperfine's; exit status 1 if farther than allowed."""
    program = shutil.which("hyperfine")
    if program is None:
        raise InputError(CURE)
    manifest = read_manifest(bundle)
    name, runs_in, _ = choose(manifest, engine, precision)
    with tempfile.TemporaryDirectory(prefix="mirror-bench-") as folder, truncations_counted_elsewhere():
        scratch = Path(folder)
        figures = _figures(bundle, manifest.encoder.max_tokens, passes, scratch)
        for round_ in range(rounds):
            report = _report(bundle, name, runs_in, scratch / f"report-{round_}")
            for figure in figures:
                seconds = _seconds_of_a_pass(program, (str(bundle), name.value, runs_in.value), figure, scratch)
                figure.outside.append(figure.per_pass(seconds))
                figure.ours.append(figure.reported(report))
                sys.stderr.write(
                    f"round {round_ + 1}: {figure.name}: {figure.ours[-1]:.4g} {figure.unit} reported, "
                    f"{figure.outside[-1]:.4g} by hyperfine\n"
                )
    apart = [figure for figure in figures if not 1 / (1 + tolerance) <= figure.ratio <= 1 + tolerance]
    for figure in figures:
        verdict = "apart" if figure in apart else "agree"
        sys.stderr.write(f"{name.value} {runs_in.value}, {figure.name}: ratio {figure.ratio:.3f}: {verdict}\n")
    line = {f.name: {"unit": f.unit, "ours": f.ours, "hyperfine": f.outside, "ratio": f.ratio} for f in figures}
    sys.stdout.write(json.dumps(line) + "\n")
    if apart:
        raise typer.Exit(1)


def _figures(bundle: Path, max_tokens: int, passes: int, scratch: Path) -> list[Figure]:
    """Give what is compared, over the texts that a quick run takes."""
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, max_tokens)
    workload = load_workload(None, tokenizer, quick=True, seed=0).texts
    single = texts_of_length(workload, tokenizer, TOKENS, count=TEXTS_A_LENGTH, seed=0)
    files = scratch / "workload.json", scratch / "single.json"
    for file, texts in zip(files, (workload, single), strict=True):
        file.write_text(json.dumps(texts), encoding="utf-8")
    calls_a_pass = len(single)
    return [
        Figure(
            name="throughput",
            unit="texts/s",
            texts=files[0],
            way=BATCH,
            passes=passes,
            per_pass=lambda seconds: len(workload) / seconds,
            reported=lambda report: report.throughput[0].texts_per_s,
        ),
        Figure(
            name=f"latency, {TOKENS} tokens",
            unit="ms",
            texts=files[1],
            way=SINGLE,
            passes=max(1, passes * len(workload) // (4 * calls_a_pass)),  # takes about as long as the other
            per_pass=lambda seconds: 1e3 * seconds / calls_a_pass,
            # The mean: it is what a difference of whole processes gives.
            reported=lambda report: float(np.mean(next(r.samples_ms for r in report.latency if r.tokens == TOKENS))),
        ),
    ]


def _report(bundle: Path, engine: EngineName, precision: Precision, output: Path) -> Report:
    """Let `benchmarks/run.py` measure, in a process of its own."""
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        str(bundle),
        "--suite",
        "latency",
        "throughput",
        "--quick",
        "--rounds=5",
    ]
    _call([*command, "--engine", engine.value, "--precision", precision.value, "--output", str(output)])
    return read_report(output)


def _seconds_of_a_pass(program: str, artifact: Sequence[str], figure: Figure, scratch: Path) -> float:
    """Let hyperfine time both commands, and give what one pass more takes."""
    medians = []
    for passes in (figure.passes, 2 * figure.passes):
        table = scratch / "hyperfine.json"
        script = (sys.executable, str(FOLDER / "encode_passes.py"))
        timed = shlex.join([*script, *artifact, str(figure.texts), str(passes), figure.way])
        _call([program, "--shell=none", "--runs=3", "--style=none", f"--export-json={table}", timed])
        (result,) = json.loads(table.read_text(encoding="utf-8"))["results"]
        medians.append(float(result["median"]))
    return (medians[1] - medians[0]) / figure.passes


def _call(command: Sequence[str]) -> None:
    """Run a command to its end.

    Raises:
        EngineError: it failed; the message is its last line.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(f"{Path(command[0]).name} ended with status {done.returncode}: {last[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when the figures agree, 1 when they do not, 2 on a mistake of the caller's.
    """
    return run_command(application(run), argv, "benchmarks/agree.py")


if __name__ == "__main__":
    sys.exit(main())
