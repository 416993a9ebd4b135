"""A report as one web page that needs no network: the sections of report.md, with the plots inside.

python benchmarks/page.py reports/mine     # writes reports/mine/report.html
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from benchmarks.report.document import PARTIAL, Image, build_document
from benchmarks.report.plots import draw
from benchmarks.report.storage import Report, read_report
from benchmarks.report.tables import Grid
from mirror_runtime.cli.run import application, run_command

PAGE_FILE = "report.html"
TEMPLATES = Path(__file__).resolve().parent / "report"
TEMPLATE_FILE = "page.html.jinja"


def render_page(report: Report) -> str:
    """Render a report as an HTML document."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"inline": _inline, "anchor": lambda title: re.sub(r"\W+", "-", title.lower())}
    environment.tests |= {"grid": lambda block: isinstance(block, Grid), "image": lambda b: isinstance(b, Image)}

    def picture(name: str) -> str:
        target = io.BytesIO()
        # The same bytes for the same figure; its text is outlines, for pages where the font is missing.
        draw(name, report).savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(target.getvalue()).decode()}"

    return environment.get_template(TEMPLATE_FILE).render(
        name=report.facts.subject.name,
        status=PARTIAL if report.facts.partial else "",
        parts=build_document(report),
        picture=picture,
    )


def _inline(text: str) -> Markup:
    """Escape text, and mark up its `code` and **emphasis**."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", marked, flags=re.DOTALL))


def write_page(report: Report, folder: Path) -> None:
    """Write the page into a report's folder."""
    (folder / PAGE_FILE).write_text(render_page(report), encoding="utf-8")


def run(
    report: Annotated[Path, typer.Argument(help="Report folder to write the page into.", show_default=False)],
) -> None:
    """Write REPORT/report.html."""
    write_page(read_report(report), report)
    sys.stdout.write(f"{report / PAGE_FILE}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 on success, 2 on a user error."""
    return run_command(application(run), argv, "benchmarks/page.py")


if __name__ == "__main__":
    sys.exit(main())
