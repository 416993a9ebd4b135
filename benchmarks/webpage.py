"""A report as one web page that needs no network: the same sections as the Markdown, with its drawings inside."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from benchmarks.blocks import Plot, Section, Table
from benchmarks.plots import DARK, LIGHT, draw, drawable, svg
from benchmarks.results import Report
from benchmarks.sections import sections, status

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d4d9; --soft: #f3f5f7; --link: #0b5394; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #15181c; --line: #3a4048; --soft: #1f242a; --link: #6cb6ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.table { overflow-x: auto; }
.table + .table { margin-top: 1rem; }
.table:focus-visible, figure:focus-visible, a:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .7rem; border: 1px solid var(--line); text-align: left; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; }
th { background: var(--soft); }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
code { background: var(--soft); padding: 0 .2em; overflow-wrap: anywhere; }
@media (max-width: 40rem) { figure { overflow-x: auto; } img { max-width: none; width: 36rem; } }
.warning { padding: .75rem 1rem; border-left: .4rem solid #c04f00; background: var(--soft); }
"""


def render_webpage(report: Report) -> str:
    """Render a report as an HTML document."""
    name = escape(report.subject.name)
    parts = sections(report)
    drawings = set(drawable(report))
    links = "".join(f'<li><a href="#{_anchor(part)}">{escape(part.title)}</a></li>' for part in parts)
    warning = f'<p class="warning" role="note">{_inline(status(report))}</p>' if status(report) else ""
    body = "".join(
        f'<section aria-labelledby="{_anchor(part)}"><h2 id="{_anchor(part)}">{escape(part.title)}</h2>'
        f"{_blocks(report, part, drawings)}</section>\n"
        for part in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No script, no network: whoever opens a report from a stranger need not trust it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f'<link rel="icon" href="data:,">\n<title>Benchmark of {name}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n<header><h1>Benchmark of {name}</h1>{warning}<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f"</header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _blocks(report: Report, section: Section, drawings: set[str]) -> str:
    written, tables = [], 0
    for block in section.blocks:
        if isinstance(block, Table):
            tables += 1
            written.append(_table(block.head, block.rows, f"{section.title}, table {tables}"))
        elif isinstance(block, Plot):
            written.append(_figure(report, block) if block.name in drawings else "")
        else:
            written.append(f"<p>{_inline(block)}</p>")
    return "".join(written)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        "<tr>"
        + f'<th scope="row">{_inline(first)}</th>'
        + "".join(f"<td>{_inline(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    # Focusable, because a wide table scrolls inside its frame and must do so from the keyboard too.
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table>{top}<tbody>{lines}</tbody></table></div>"
    )


def _figure(report: Report, plot: Plot) -> str:
    light, dark = (_data_uri(svg(draw(plot.name, report, theme))) for theme in (LIGHT, DARK))
    caption = escape(plot.caption)
    return (
        # Focusable for the same reason: on a phone a drawing keeps a size at which its text can be read.
        f'<figure tabindex="0"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{caption}; the figures are in this section\'s table"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data_uri(text: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode("ascii")


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z]+", "-", section.title.lower())


def _inline(text: str) -> str:
    """Escape a text and turn its `code` and **emphasis** into elements."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", marked)
