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

from benchmarks.blocks import NONE, Table
from benchmarks.markdown import table_lines
from benchmarks.results import Report, read_report
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NO_REPORT = "none yet"
_BLOCK = re.compile(r"(<!-- benchmark: )(.+?)( -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


def render_table(report: Report) -> str:
    """Return conditions and table as Markdown: parties by rate, as ratios to the fastest peer, with quality beside it.

    Ratios, because parties that took turns share the machine's mood; an absolute rate of a busy machine means nothing.

    Raises:
        InputError: the report has no peers to compare with.
    """
    if not report.peers:
        raise InputError("the report has no peers: run benchmarks/run.py with --suite peers startup quality")
    best = max(r.texts_per_s for r in report.peers)
    work, host = report.workload, report.host
    conditions = (
        f"{work.texts:,} texts (mean {work.tokens_mean:.1f} tokens), {report.subject.base_model}, tokenising included, "
        f"one interleaved run on {host.cores_usable} cores of an {host.cpu_model} ({report.started[:10]}), each party "
        "at its best batch size:"
    )
    quality = {result.party: f"{result.mean.value:.2f}" for result in report.quality}
    rows = [
        (
            r.texts_per_s,
            (
                f"**Mirror Runtime, {r.point.name}**",
                r.point.precision.value,
                f"**{r.texts_per_s / best:.2f} x**",
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
                f"{r.texts_per_s / best:.2f} x",
                quality.get(r.name, NONE),
            ),
        )
        for r in report.peers
    ]
    head = ("party", "computes in", "rate", "Spearman x 100")
    rows.sort(key=lambda row: -row[0])
    table = Table(head, [cells for _, cells in rows])
    return f"{conditions}\n\n{table_lines(table.head, table.rows)}\n\n{_note(report)}\n"


def _note(report: Report) -> str:
    sets = ", ".join(one.name for one in report.quality_sets)
    scores = f" Spearman is the mean over {sets}." if sets else ""
    return f"Rates are medians, as ratios to the fastest peer.{scores}"


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
