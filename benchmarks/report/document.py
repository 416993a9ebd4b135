"""A report as sections of text, tables and plots, which `markdown` and `page` write down; neither adds a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.plan import Suite
from benchmarks.report.facts import Host
from benchmarks.report.plots import PLOTS, drawable
from benchmarks.report.sections import SECTIONS, Section
from benchmarks.report.storage import Report
from benchmarks.report.tables import NONE, Grid, build_grid

STEADY = 0.15
"""Relative distance of the slowest and the fastest round of the same work from which on the report warns."""

ROUND_METRICS = ("texts per second", "time to the first vector")
"""Metrics with one sample per round of the same work."""


@dataclass(frozen=True)
class Image:
    """A plot, by its name in `plots.PLOTS`."""

    name: str
    caption: str


Block: TypeAlias = "str | Grid | Image"
"""Text with `code` and **emphasis**, a table or a plot."""


@dataclass(frozen=True)
class Part:
    """A title and the blocks below it."""

    title: str
    blocks: tuple[Block, ...]


def build_document(report: Report) -> list[Part]:
    """Return the sections that the report has content for, conditions first and limits last."""
    plots = set(drawable(report))
    parts = [_part(report, section, plots) for section in SECTIONS]
    return [_conditions(report), *(part for part in parts if part is not None), _limits(report)]


def status(report: Report) -> str:
    """Return the warning that must be read before any figure; empty for a complete report."""
    if not report.facts.partial:
        return ""
    return (
        "**Partial: the run was interrupted.** What is here was measured, some of it in fewer rounds than requested; "
        "what is missing was not."
    )


def unsteady_parties(report: Report) -> list[str]:
    """Name the parties whose rounds, each the same work, differ by more than `STEADY`."""
    rounds = [one for one in report.measurements if one.metric in ROUND_METRICS and one.suite != "serving"]
    return [f"{one.party} ({one.suite})" for one in rounds if one.figure("max") > (1 + STEADY) * one.figure("min")]


def _part(report: Report, section: Section, plots: set[str]) -> Part | None:
    blocks: list[Block] = []
    for table in section.tables:
        grid = build_grid(report, section.suite, table)
        if grid is not None:
            blocks += [grid, *([table.text] if table.text else [])]
    if not blocks:
        return None
    images = [Image(name, PLOTS[name].caption) for name in section.plots if name in plots]
    return Part(section.title, (*([section.text] if section.text else []), *blocks, *images))


def _conditions(report: Report) -> Part:
    facts = report.facts
    host, work, subject, source, settings = facts.host, facts.workload, facts.subject, facts.source, facts.settings
    commit = NONE if source.commit is None else source.commit[:12] + (" with local changes" if source.dirty else "")
    variables = ", ".join(f"`{name}={value}`" for name, value in host.thread_environment.items())
    rows: Mapping[str, str] = {
        "Machine": f"{host.cpu_model}, {host.cores_usable} of {host.cores_online} logical cores usable",
        "CPU features": ", ".join(host.cpu_flags) or NONE,
        "Clocks": _clocks(host),
        "Memory": f"{host.memory_bytes / 2**30:.1f} GiB",
        "Limits of the process": _process_limits(host),
        "Variables that change threads": variables or "none set",
        "System": f"{host.os}, Python {host.python}",
        "Load average before": f"{host.load_1min_start:.2f} (1 min)",
        "Versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        "Commit": commit,
        "Bundle": f"{subject.name}, fingerprint `{subject.fingerprint}`, from {subject.base_model}, "
        f"{subject.dim} dimensions, up to {subject.max_tokens} tokens",
        "Workload": f"{work.texts} texts ({work.source}), {work.distinct} of them distinct; tokens: mean "
        f"{work.tokens_mean:.1f}, p50 {work.tokens_p50:.0f}, p90 {work.tokens_p90:.0f}, max {work.tokens_max}; "
        f"{work.truncated} truncated; sha256 `{work.texts_sha256[:16]}`",
        "Tuning": settings.training or NONE,
        "Run": f"{facts.started}, {facts.wall_s:.0f} s, suites {', '.join(settings.suites)}, {settings.rounds} rounds, "
        f"seed {settings.seed}{', quick' * settings.quick}"
        + "".join(f"; interrupted, continued {moment}" for moment in facts.resumed),
    }
    text = "Every party runs with its default threads, which may use all usable cores."
    if host.load_1min_start > 0.5:
        text += (
            f" **The machine was busy before the first measurement (load average {host.load_1min_start:.2f}): compare "
            "parties within this report, and trust no absolute figure.**"
        )
    if unsteady := unsteady_parties(report):
        text += (
            f" **The machine was not steady: the slowest and fastest rounds of {', '.join(unsteady)} are more than "
            f"{100 * STEADY:.0f} % apart. Medians and intervals include that; measure again on a quiet machine before "
            "small differences count.**"
        )
    if settings.quick:
        text += " A quick run has few samples: use it to check that everything works, not to decide."
    return Part("Conditions", (Grid((), [row for row in rows.items() if row[1] != NONE]), text))


def _clocks(host: Host) -> str:
    low, high = min(host.clocks_mhz, default=0.0), max(host.clocks_mhz, default=0.0)
    spread = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"
    clocks = f"{spread} MHz before the first measurement" if host.clocks_mhz else "not stated by the system"
    return f"{clocks}; governor: {host.governor or 'not stated by the system'}"


def _process_limits(host: Host) -> str:
    cores = ", ".join(map(str, host.affinity)) or "any"
    quota = "no CPU quota" if host.cpu_quota_cores is None else f"CPU quota of {host.cpu_quota_cores:g} cores"
    limit = host.memory_limit_bytes
    memory = "no memory limit" if limit is None else f"memory limit of {limit / 2**30:.1f} GiB"
    return f"logical cores {cores}; {quota}; {memory}"


def _limits(report: Report) -> Part:
    """List what was not measured, and why."""
    settings = report.facts.settings
    rows = [(one.suite, one.party, one.reason.replace("\n", " ")) for one in report.failures]
    rows += [(suite.value, "all", "not requested") for suite in Suite if suite.value not in settings.suites]
    left_out = [name for name in report.facts.subject.artifacts if name not in settings.variants]
    rows += [("all", name, "left out by --engine or --precision") for name in left_out]
    note = (
        "One machine, one bundle, one workload: other processors, text lengths and encoders may order parties "
        "differently. Clocks were not fixed and threads not swept: every party ran with its defaults."
    )
    grids: list[Block] = [Grid(("suite", "party", "why it was not measured"), rows)] if rows else []
    return Part("Limits", (*grids, note))
