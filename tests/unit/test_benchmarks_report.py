import dataclasses
import json
import re

import pytest

from benchmarks.markdown import render_markdown
from benchmarks.plots import drawable
from benchmarks.report import check_output, headline, write_report
from benchmarks.results import read_report
from benchmarks.sections import sections
from benchmarks.webpage import render_webpage
from mirror_runtime.errors import InputError


def test_a_report_survives_the_way_through_the_file(report, tmp_path):
    write_report(report, tmp_path / "out")
    assert read_report(tmp_path / "out") == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "latency.png",
        "latency_cdf.png",
        "quality.png",
        "report.html",
        "report.json",
        "report.md",
        "throughput.png",
        "training.png",
    ]


def test_training_is_shown_as_medians_with_their_spread_and_a_ratio_of_times(report):
    text = render_markdown(report, {})
    assert "| mirror-runtime, recipe sentence | 32.0 | 75.00 (74.00 to 76.00) | 68.50 (68.00 to 69.00) |" in text
    assert "published recipe takes 20.0 times as long as mirror-runtime, recipe sentence" in text


def test_a_report_of_another_schema_is_refused(report, tmp_path):
    write_report(report, tmp_path / "out")
    file = tmp_path / "out" / "report.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "schema_version": 99}))
    with pytest.raises(InputError, match="schema_version 99"):
        read_report(tmp_path / "out")
    del data["wall_s"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="missing wall_s"):
        read_report(tmp_path / "out")
    file.write_text("{")
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(tmp_path / "out")


def test_only_a_report_is_replaced(report, tmp_path):
    write_report(report, tmp_path / "out")
    write_report(dataclasses.replace(report, partial=True), tmp_path / "out")
    assert read_report(tmp_path / "out").partial
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="holds no report"):
        write_report(report, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "file")


def test_the_text_has_ceilings_first_and_parity_beside_each_figure(report):
    text = render_markdown(report, {"latency": "latency.png"})
    order = [text.index(head) for head in ("## Conditions", "## Ceilings", "## Throughput", "## Latency", "## Peers")]
    assert order == sorted(order)
    for rate in ("| openvino bf16 | 200 |", "| openvino bf16 | 8 | 1.50 |", "| mirror_runtime openvino bf16 | bf16 |"):
        (line,) = (line for line in text.splitlines() if line.startswith(rate))
        assert line.endswith("| 0.999800 |")
    assert "| st torch (5) | float32 | 8 | 95 |" in text
    assert "| peers | st onnx | no \\| such file |" in text
    assert "Partial" not in text
    assert "busy" not in text


def test_the_text_says_what_spoils_the_figures(report):
    spoiled = dataclasses.replace(
        report,
        partial=True,
        host=dataclasses.replace(report.host, load_1min_start=3.0),
        throughput=(dataclasses.replace(report.throughput[0], ceiling_share=1.4),),
    )
    text = render_markdown(spoiled, {})
    for caveat in ("**Partial: the run was interrupted.**", "busy before the first measurement", "above 100 %"):
        assert caveat in text


def test_the_last_line_has_figures_and_no_samples(report, tmp_path):
    line = json.dumps(headline(report, tmp_path), allow_nan=False)
    assert "samples" not in line
    assert json.loads(line)["comparisons"] == [
        {"ours": "openvino bf16", "peer": "st torch", "ratio": 2.1, "min_cosine": 0.9997}
    ]


def test_the_page_has_every_table_and_drawing_and_asks_the_network_for_nothing(report):
    page = render_webpage(report)
    for section in sections(report):
        assert f">{section.title}</h2>" in page
    assert page.count("<figure>") == len(drawable(report)) == 5
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "<script" not in page
    assert "no | such" in page


def test_the_page_shows_hostile_text_as_text(report):
    hostile = dataclasses.replace(report, subject=dataclasses.replace(report.subject, name="<script>alert(1)</script>"))
    page = render_webpage(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
