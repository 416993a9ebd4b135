"""Write the README's table of parties from a committed report, or check that it matches the report.

    python benchmarks/readme_table.py benchmarks/reports/2026-11-21-epyc-2-cores     # writes
    python benchmarks/readme_table.py --check                                        # exit status 1 if it differs

The table stands between `<!-- benchmark: FOLDER -->` and `<!-- /benchmark -->`; the first names the report.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from benchmarks.report.storage import Report, read_report
from benchmarks.report.tables import NONE, table_lines
from benchmarks.suites.quality import MEAN
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- benchmark: )(.+?)( -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


def render_table(report: Report) -> str:
    """Return conditions and table as Markdown: parties by rate, as ratios to the fastest peer, with quality beside it.

    Ratios, because interleaved parties share the machine's state; an absolute rate of a busy machine means nothing.
    Agreement is shown only where every party has a cosine to the same reference, the bundle's own fp32.

    Raises:
        InputError: the report has no peers to compare with.
    """
    facts = report.facts
    rates = sorted(report.select("peers", "texts per second"), key=lambda one: -one.median)
    best = max((one.median for one in rates if report.library(one.party)), default=None)
    if best is None:
        raise InputError("the report has no peers: run benchmarks/run.py with --suite peers startup quality")
    quality = {one.party: f"{one.median:.2f}" for one in report.select("quality", "Spearman x 100", set=MEAN)}
    cosines = {one.party: f"{one.figure('min'):.6f}" for one in report.select("peers", "worst cosine to fp32")}
    agreement = all(one.party in cosines for one in rates)
    rows = []
    for one in rates:
        name, ratio = one.party, f"{one.median / best:.2f} x"
        if title := report.library(name):
            shown = f"{title} {one.conditions.get('version', '')}, {name.removeprefix(f'{title} ')}"
        else:
            shown, ratio = f"**Mirror Runtime, {name}**", f"**{ratio}**"
        precision = str(one.conditions.get("computes in", NONE))
        rows.append((shown, precision, ratio, quality.get(name, NONE), *([cosines[name]] if agreement else [])))
    head = ("party", "computes in", "rate", "Spearman x 100", *(["worst cosine to fp32"] if agreement else []))
    conditions = (
        f"{facts.workload.texts:,} texts (mean {facts.workload.tokens_mean:.1f} tokens), {facts.subject.base_model}, "
        f"tokenising included, one interleaved run on {facts.host.cores_usable} cores of an {facts.host.cpu_model} "
        f"({facts.started[:10]}), each party at its best batch size:"
    )
    sets = ", ".join(str(one.conditions["set"]) for one in report.select("quality", "score"))
    scores = f" Spearman is the mean over {sets}." if sets else ""
    return f"{conditions}\n\n{table_lines(head, rows)}\n\nRates are medians, as ratios to the fastest peer.{scores}\n"


def run(
    report: Annotated[Path | None, typer.Argument(help="Report folder to write the table of.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the table differs.")] = False,
    readme: Annotated[Path, typer.Option(help="The file that holds the table.")] = ROOT / "README.md",
) -> None:
    """Write the table of REPORT into the README, or check the present one."""
    if check == (report is not None):
        raise InputError("name a report folder to write its table, or use --check")
    text = readme.read_text(encoding="utf-8")
    found = _BLOCK.search(text)
    if found is None:
        raise InputError(f"{readme} has no table: add <!-- benchmark: FOLDER --> and <!-- /benchmark -->")
    named = found[2] if report is None else os.path.relpath(report.resolve(), readme.resolve().parent)
    if named.startswith(".."):
        raise InputError(f"{report} is not below {readme.parent}: commit the report first")
    block = f"{found[1]}{named}{found[3]}{render_table(read_report(readme.parent / named))}{found[5]}"
    if report is not None:
        readme.write_text(text[: found.start()] + block + text[found.end() :], encoding="utf-8")
    elif block != found[0]:
        sys.stderr.write(
            f"error: {readme.name}'s table differs from {named}: run python benchmarks/readme_table.py {named}\n"
        )
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when the table is written or matches, 1 when it differs, 2 on a user error."""
    return run_command(application(run), argv, "benchmarks/readme_table.py")


if __name__ == "__main__":
    sys.exit(main())
