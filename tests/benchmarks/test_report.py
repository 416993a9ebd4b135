"""report.json is strict and whole; tables, plots and page show the record's figures and nothing else."""

import dataclasses
import json
import re
from functools import partial

import pytest
from matplotlib.patches import Rectangle

from benchmarks.page import main as page_main
from benchmarks.page import render_page
from benchmarks.report import plots
from benchmarks.report.document import build_document, headline, render_markdown, unsteady_parties, write_folder
from benchmarks.report.plots import draw, drawable
from benchmarks.report.record import Better, Measurement
from benchmarks.report.storage import MOST_KEPT, read_report, thin
from mirror_runtime.errors import InputError
from tests.benchmarks.conftest import PEER, VARIANT
from tests.support.paths import ROOT

REPORTS = sorted((ROOT / "benchmarks" / "reports").iterdir())


@pytest.fixture
def two_plots(monkeypatch):
    """Draw two of the plots only: each takes a second."""
    monkeypatch.setattr(plots, "PLOTS", {name: plots.PLOTS[name] for name in ("pareto", "lengths")})


def with_facts(report, **facts):
    return dataclasses.replace(report, facts=dataclasses.replace(report.facts, **facts))


def test_a_report_survives_the_way_through_its_folder(report, tmp_path, two_plots):
    write_folder(report, tmp_path / "out")
    assert read_report(tmp_path / "out") == report
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"report.json", "report.md", "pareto.png", "lengths.png"}
    assert '"samples": [0.0, 1.0, 2.0, 3.0]' in (tmp_path / "out" / "report.json").read_text()
    assert page_main([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    write_folder(with_facts(report, partial=True), tmp_path / "out")
    assert read_report(tmp_path / "out").facts.partial
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda data: data.update(schema_version=6), "schema_version 6; this program reads 7"),
        (lambda data: data.update(more=1), "unknown more"),
        (lambda data: data["facts"].pop("wall_s") and None, "missing wall_s"),
        (lambda data: data.update(measurements={}), "measurements is {}; expected"),
        (lambda data: data["measurements"].append(data["measurements"][0]), "repeats an earlier one"),
        (lambda data: data["measurements"][0].update(samples=[]), "has no samples"),
        (lambda data: data["measurements"][0].update(samples=[float("nan")]), "not finite"),
        (lambda data: data["measurements"][0].update(better="sideways"), "sideways"),
        (lambda data: data["measurements"].append(3), r"measurements\[\d+\] is 3"),
        (lambda data: data["failures"][0].update(why=""), "unknown why"),
        (lambda data: "{", "is not JSON"),
        (lambda data: "[]", "holds list"),
    ],
)
def test_a_malformed_report_is_refused_with_file_and_cause(report, save, tmp_path, mistake, message):
    save(report, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(mistake(data) or json.dumps(data))
    with pytest.raises(InputError, match=rf"report\.json.*{message}"):
        read_report(tmp_path)


def test_thinning_keeps_figures_extremes_and_the_pairing_with_the_reference():
    timed = partial(Measurement, suite="s", party="p", metric="m", unit="ms", better=Better.LOWER)
    samples = tuple(float((i * 7919) % 4001) for i in range(4000))
    full = timed(samples=samples)
    kept = thin(full)
    assert len(kept.samples) == MOST_KEPT
    assert (kept.total, kept.samples[0], kept.samples[-1]) == (4000, min(samples), max(samples))
    for name in ("min", "p50", "p90", "p99", "p99.9", "max", "mean"):
        assert kept.figure(name) == full.figure(name)
    assert thin(kept) == kept
    rounds = thin(timed(samples=(*[1.0] * 300, *[2.0] * 300), reference=(0.1, 0.2)))
    assert rounds.samples == (*[1.0] * 50, *[2.0] * 50)
    paired = dataclasses.replace(full, unit="")
    assert thin(paired) is paired


def test_conditions_state_what_was_set_on_the_machine(report):
    host = dataclasses.replace(
        report.facts.host, affinity=(), cpu_quota_cores=None, memory_limit_bytes=None, clocks_mhz=(),
        load_1min_start=3.0,
    )  # fmt: skip
    text = render_markdown(with_facts(report, host=host, partial=True, resumed=("2026-01-02",)))
    for words in (
        "| Limits of the process | logical cores any; no CPU quota; no memory limit |",
        "| Clocks | not stated by the system; governor: ",
        "busy before the first measurement",
        "**Partial: the run was interrupted.**",
        "interrupted, continued 2026-01-02",
    ):
        assert words in text


@pytest.mark.parametrize(
    "row",
    [
        "| Clocks | 2,600 to 3,100 MHz before the first measurement; governor: not stated by the system |",
        "| Limits of the process | logical cores 0, 2; CPU quota of 1.5 cores; memory limit of 8.0 GiB |",
        "| Variables that change threads | `OMP_NUM_THREADS=2` |",
        "| openvino bf16 | 2 | [1024, 384] x [384, 1536] | 21 | 500 |",
        "| 2 | 256 | 32 | 26.8 | 25.6 |",
        "| openvino bf16 | 200 | 166 to 250 | 3,000 | 3 | 0.999800 | 0.999700 |",
        "| 64 | 256 | 8,192 |",
        "| openvino bf16 | 8 | 1.50 | 1.90 | 1.99 | 2.00 | 0.38 | 25 % | 2 | 0.999800 |",
        "| openvino bf16 | 78.00 (76.00 to 80.00) | 78.00 (76.00 to 80.00) | -0.25 (-0.50 to 0.00) |",
        "| openvino bf16 | triton | 8 | 1 | 300 | 25.0 | 29.0 | 29.9 | 30.0 | 2 | 312 |",
        "| openvino bf16 | gateway | 8 | 1 | 300 | 25.0 | 29.0 | 29.9 | 30.0 | 2 | – |",
        "| openvino bf16 | 1.2 | 350 | 525.0 | 665.0 | 696.5 | 699.7 | 2 | no |",
        "| openvino bf16 | 1.05 | 1.00 to 1.10 | 2 | 234 | 0.999800 |",
        "| openvino bf16 | – | bf16 | – | 200 | 166 to 250 | 3 | 0.999800 | 0.999700 |",
        "| st torch | 5 | float32 | 8 | 95 | 90 to 100 | 2 | – | 0.999900 |",
        "| st torch | 2.10 (2.00 to 2.20) |",
        "| mirror-runtime, recipe sentence | 32.0 | 30.0 to 34.0 | 71.75 | 71.00 to 72.50 |",
        "| peers | st onnx | no \\| such file |",
        "| training | all | not requested |",
        "| all | onnxruntime fp32 | left out by --engine or --precision |",
    ],
)
def test_tables_are_filled_from_the_record(report, row):
    assert row in render_markdown(report).splitlines()


def test_rounds_far_apart_are_named(report, change):
    assert unsteady_parties(report) == [f"{VARIANT} (throughput)", f"{VARIANT} (peers)"]
    steady = change(report, "texts per second", lambda one: dataclasses.replace(one, samples=(0.5, 0.52, 0.57)))
    assert unsteady_parties(steady) == []
    assert "not steady" in render_markdown(report)
    assert "not steady" not in render_markdown(steady)


def test_the_last_line_has_a_figure_of_every_measurement_and_no_samples(report, tmp_path):
    line = json.loads(json.dumps(headline(report, tmp_path), allow_nan=False))
    (rate,) = (one for one in line["figures"] if (one["suite"], one["metric"]) == ("throughput", "texts per second"))
    assert rate == {
        "suite": "throughput", "party": VARIANT, "conditions": {}, "metric": "texts per second", "unit": "1/s",
        "median": 200.0,
    }  # fmt: skip
    assert (line["schema_version"], line["failures"]) == (7, 1)


def plotted(figure) -> dict[str, list[tuple[float, float]]]:
    """Return the points of a figure's lines by their labels, the number of a mark left out."""
    (axes,) = figure.axes
    return {
        re.sub(r"^\d+  ", "", line.get_label()): list(zip(*map(list, line.get_data()), strict=True))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("pareto", {VARIANT: [(78.0, 200.0)], PEER: [(78.25, 95.0)]}),
        ("latency", {f"{VARIANT}, p50": [(8.0, 1.5)], f"{VARIANT}, p99": [(8.0, 1.99)]}),
        ("lengths", {VARIANT: [(8.0, 4096.0), (64.0, 8192.0)]}),
        ("serving", {f"{VARIANT}, p99": [(150.0, 298.5), (350.0, 696.5)], f"{VARIANT}, p50": [(150, 225), (350, 525)]}),
    ],
)
def test_plots_show_the_figures_of_the_record(report, name, points):
    assert plotted(draw(name, report)) == points


def test_bars_have_the_medians_of_the_rounds_beside_peers(report):
    (axes,) = draw("throughput", report).axes
    assert [bar.get_bbox().x1 for bar in axes.patches if isinstance(bar, Rectangle)] == [95.0, 200.0]


def test_the_page_has_every_section_needs_no_network_and_shows_hostile_text_as_text(report, two_plots):
    subject = dataclasses.replace(report.facts.subject, name="<script>alert(1)</script>")
    page = render_page(with_facts(report, subject=subject))
    titles = [title for title, _ in build_document(report)]
    assert (titles[:4], titles[-1]) == (["Conditions", "Ceilings", "Throughput", "Latency of one text"], "Limits")
    assert re.findall(r">([^<]+)</h2>", page) == titles
    assert page.count("<figure ") == 2
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "no | such" in page
    labels = re.findall(r'role="region" aria-label="([^"]+)"', page)
    assert len(labels) == len(set(labels)) > len(titles)  # a screen reader must be able to distinguish them


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_committed_reports_are_readable_and_their_text_is_that_of_the_record(folder):
    report = read_report(folder)
    assert (folder / "report.md").read_text() == render_markdown(report)
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "report.md",
        *(f"{name}.png" for name in drawable(report)),
    }


def test_committed_reports_are_small():
    assert sum(path.stat().st_size for folder in REPORTS for path in folder.iterdir()) < 1_500_000
