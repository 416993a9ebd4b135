"""Write the README's table of parties from a committed report, or see that it still says what the report says.

    python benchmarks/readme_table.py benchmarks/reports/2026-11-21-epyc-2-cores     # writes
    python benchmarks/readme_table.py --check                                        # exit status 1 if it differs

The table stands between `<!-- benchmark: FOLDER -->` and `<!-- /benchmark -->`; the first names the report.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import our rooms from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from benchmarks.blocks import NONE, Table, cosine_text
from benchmarks.markdown import table_lines
from benchmarks.results import Report, read_report
from mirror_runtime.bundle import Precision
from mirror_runtime.commandline import application, run_command
from mirror_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NO_REPORT = "none yet"
_BLOCK = re.compile(r"(<!-- benchmark: )(.+?)( -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


def render_table(report: Report) -> str:
    """Give conditions and table as Markdown: parties by rate, with start, agreement and quality beside it.

    Raises:
        InputError: the report has no peers to compare with.
    """
    if not report.peers:
        raise InputError("the report has no peers: run benchmarks/run.py with --suite peers startup quality")
    work, host = report.workload, report.host
    conditions = (
        f"{work.texts:,} texts (mean {work.tokens_mean:.1f} tokens), {report.subject.base_model}, tokenising included, "
        f"one interleaved run on {host.cores_usable} cores of an {host.cpu_model} ({report.started[:10]}), each party "
        "at its best batch size:"
    )
    quality = {result.party: f"{result.mean.value:.2f}" for result in report.quality}
    starts = {result.party: f"{result.median_s:.1f} s" for result in report.startup}
    rows = [
        (
            r.texts_per_s,
            (
                f"**Mirror Runtime, {r.point.name}**",
                r.point.precision.value,
                f"**{r.texts_per_s:,.0f}**",
                starts.get(f"mirror_runtime {r.point.name}", NONE),
                cosine_text(r.point.parity.min_cosine),
                quality.get(r.point.name, NONE),
            ),
        )
        for r in report.ours_beside_peers
    ]
    rows += [
        (
            r.texts_per_s,
            (
                f"{r.peer} {r.version}, {r.backend}",
                r.precision,
                f"{r.texts_per_s:,.0f}",
                starts.get(r.name, NONE),
                _agreement(report, r.name),
                quality.get(r.name, NONE),
            ),
        )
        for r in report.peers
    ]
    head = ("party", "computes in", "texts/s", "start to first vector", "worst cosine", "Spearman x 100")
    rows.sort(key=lambda row: -row[0])
    table = Table(head, [cells for _, cells in rows])
    return f"{conditions}\n\n{table_lines(table.head, table.rows)}\n\n{_note(report)}\n"


def _agreement(report: Report, peer: str) -> str:
    """Give a peer's worst cosine to our fp32, or where that was not measured to the nearest of ours."""
    found = [c for c in report.comparisons if c.peer == peer]
    exact = [c for c in found if c.point.precision is Precision.FP32] or found
    return cosine_text(max(c.min_cosine for c in exact)) if exact else NONE


def _note(report: Report) -> str:
    sets = ", ".join(one.name for one in report.quality_sets)
    scores = f" Spearman is the mean over {sets}." if sets else ""
    return f"Worst cosine: ours to PyTorch fp32 when the artifact was exported, a peer's to ours in this run.{scores}"


def run(
    report: Annotated[Path | None, typer.Argument(help="Report folder to write the table of.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a table differs.")] = False,
    readme: Annotated[Path, typer.Option(help="The file that holds the table.")] = ROOT / "README.md",
) -> None:
    """Write the table of REPORT into the README, or check the one that is there."""
    if check == (report is not None):
        raise InputError("give a report folder to write its table, or --check")
    text = readme.read_text(encoding="utf-8")
    found = _BLOCK.search(text)
    if found is None:
        raise InputError(f"{readme} has no table: put <!-- benchmark: {NO_REPORT} --> and <!-- /benchmark --> into it")
    if report is not None:
        named = report.resolve()
        if not named.is_relative_to(readme.resolve().parent):
            raise InputError(f"{report} is not below {readme.parent}: commit the report first")
        folder = named.relative_to(readme.resolve().parent).as_posix()
        block = f"{found[1]}{folder}{found[3]}{render_table(read_report(named))}{found[5]}"
        readme.write_text(text[: found.start()] + block + text[found.end() :], encoding="utf-8")
        return
    if found[2] == NO_REPORT:
        sys.stderr.write(f"{readme.name}: its table is of no report yet, so there is nothing to compare\n")
        return
    if found[4] != render_table(read_report(readme.parent / found[2])):
        sys.stderr.write(
            f"error: {readme.name}'s table is not that of {found[2]}: python benchmarks/readme_table.py {found[2]}\n"
        )
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when the table is written or right, 1 when it differs, 2 on a mistake of the caller's.
    """
    return run_command(application(run), argv, "benchmarks/readme_table.py")


if __name__ == "__main__":
    sys.exit(main())
