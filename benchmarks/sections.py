"""What a report says to people: sections of tables with their conditions and caveats beside them, ceilings first.

`benchmarks.markdown` and `benchmarks.webpage` write these down; neither adds a figure of its own.
"""

from __future__ import annotations

from benchmarks.blocks import NONE, Block, Section, Table
from benchmarks.machine_results import Host
from benchmarks.peer_specs import PEERS
from benchmarks.results import Report, Suite
from benchmarks.sections_others import peers, quality, training
from benchmarks.sections_scaling import scaling
from benchmarks.sections_serving import serving
from benchmarks.sections_speed import ceilings, latency, startup, throughput

STEADY = 0.15
"""How far apart the slowest and the fastest round of the same work may be before the report says so."""

FEWEST_FOR_P99 = 1000


def sections(report: Report) -> list[Section]:
    """Give the sections of a report that it has content for, conditions and ceilings first."""
    parts = (
        _conditions, ceilings, throughput, latency, quality, serving, startup, scaling, peers, training, limits,
    )  # fmt: skip
    return [section for part in parts if (section := part(report)) is not None]


def status(report: Report) -> str:
    """Give the sentence that must be read before any figure; empty for a complete report."""
    if not report.partial:
        return ""
    return (
        "**Partial: the run was interrupted.** What is here was measured, some of it in fewer rounds than asked for; "
        "what is missing was not."
    )


def _conditions(report: Report) -> Section | None:
    host, work, subject, source = report.host, report.workload, report.subject, report.source
    commit = NONE if source.commit is None else source.commit[:12] + (" with local changes" if source.dirty else "")
    rows = [
        ("Machine", f"{host.cpu_model}, {host.cores_usable} of {host.cores_online} logical cores usable"),
        ("CPU features", ", ".join(host.cpu_flags) or NONE),
        ("Clocks", _clocks(host)),
        ("Memory", f"{host.memory_bytes / 2**30:.1f} GiB"),
        ("Limits of the process", _limits_of(host)),
        (
            "Variables that change threads",
            ", ".join(f"`{name}={value}`" for name, value in host.thread_environment.items()) or "none set",
        ),
        ("System", f"{host.os}, Python {host.python}"),
        ("Load average before", f"{host.load_1min_start:.2f} (1 min)"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("Commit", commit),
        (
            "Bundle",
            f"{subject.name}, fingerprint `{subject.fingerprint}`, from {subject.base_model}, "
            f"{subject.dim} dimensions, up to {subject.max_tokens} tokens",
        ),
        (
            "Workload",
            f"{work.texts} texts ({work.source}), {work.distinct} of them distinct; "
            f"tokens: mean {work.tokens_mean:.1f}, p50 {work.tokens_p50:.0f}, "
            f"p90 {work.tokens_p90:.0f}, max {work.tokens_max}; {work.truncated} truncated; sha256 "
            f"`{work.texts_sha256[:16]}`",
        ),
        (
            "Run",
            f"{report.started}, {report.wall_s:.0f} s, suites {', '.join(s.value for s in report.settings.suites)}, "
            f"{report.settings.rounds} rounds, seed {report.settings.seed}{', quick' * report.settings.quick}"
            + "".join(f"; interrupted, continued {moment}" for moment in report.resumed),
        ),
    ]
    text = "Every party runs with its default threads, which may use all usable cores."
    if host.load_1min_start > 0.5:
        text += (
            f" **The machine was busy before the first measurement (load average {host.load_1min_start:.2f}): "
            "compare parties within this report, and trust no absolute figure.**"
        )
    if unsteady := noisy_parties(report):
        text += (
            f" **The machine was not steady: the slowest and fastest rounds of {', '.join(unsteady)} are more than "
            f"{100 * STEADY:.0f} % apart. Medians and intervals carry that; measure again on a quiet machine before "
            "small differences count.**"
        )
    if report.settings.planted_slowdown:
        text += (
            f" **Every engine run in this process took {100 * report.settings.planted_slowdown:.0f} % longer on "
            "purpose: this report tests `benchmarks/compare.py` and says nothing of the runtime.**"
        )
    if report.settings.quick:
        text += " A quick run has few samples: use it to see that all works, not to decide."
    return Section("Conditions", (Table((), rows), text))


def _clocks(host: Host) -> str:
    """Write the cores' clocks and what sets them."""
    low, high = min(host.clocks_mhz, default=0.0), max(host.clocks_mhz, default=0.0)
    spread = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"
    clocks = f"{spread} MHz before the first measurement" if host.clocks_mhz else "not given by the system"
    return f"{clocks}; governor: {host.governor or 'not given by the system'}"


def _limits_of(host: Host) -> str:
    """Write what affinity and control groups leave of the machine."""
    cores = ", ".join(map(str, host.affinity)) or "any"
    quota = "no CPU quota" if host.cpu_quota_cores is None else f"CPU quota of {host.cpu_quota_cores:g} cores"
    limit = host.memory_limit_bytes
    memory = "no memory limit" if limit is None else f"memory limit of {limit / 2**30:.1f} GiB"
    return f"logical cores {cores}; {quota}; {memory}"


def noisy_parties(report: Report) -> list[str]:
    """Name the parties whose rounds, each the same work, differ by more than `STEADY`."""
    rounds = [
        *((f"{r.point.name} (throughput)", r.samples_s) for r in report.throughput),
        *((f"{r.point.name} (beside peers)", r.samples_s) for r in report.ours_beside_peers),
        *((r.name, r.samples_s) for r in report.peers),
        *((f"{r.party} (startup)", r.samples_s) for r in report.startup),
    ]
    return [name for name, samples in rounds if max(samples) > (1 + STEADY) * min(samples)]


def limits(report: Report) -> Section:
    """Say what was not measured and why, from what the report holds."""
    settings = report.settings
    rows = [(f.suite, f.party, f.reason.replace("\n", " ")) for f in report.failures]
    rows += [(suite.value, "all", "not asked for") for suite in Suite if suite not in settings.suites]
    left_out = [name for name in report.subject.artifacts if name not in settings.points]
    rows += [("all", name, "left out by --engine or --precision") for name in left_out]
    if Suite.PEERS in settings.suites:
        rows += [("peers", s.title, "left out by --peer or --quick") for s in PEERS if s.title not in settings.peers]
    notes = [
        "One machine, one bundle, one workload: other processors, lengths of text and encoders may order parties "
        "differently. Clocks were not fixed and threads not swept: every party ran with its defaults.",
    ]
    if report.throughput and not report.ceilings:
        notes.append("No ceiling was measured: shares of it are missing.")
    if any(len(r.samples_ms) < FEWEST_FOR_P99 for r in report.latency):
        notes.append(f"Latency's p99 rests on fewer than {FEWEST_FOR_P99} samples, and p99.9 on one or two.")
    if report.quality and all(one.group == "sts" for one in report.quality_sets):
        notes.append("Quality is measured on sentence similarity alone: no retrieval set with people's judgements.")
    if report.serving:
        notes.append("The server was asked over loopback from the same machine: no network, and no second machine.")
    blocks: list[Block] = [Table(("suite", "party", "why it was not measured"), rows)] if rows else []
    return Section("Limits", (*blocks, *notes))
