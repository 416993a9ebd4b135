import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.markdown import render_markdown
from benchmarks.plots import drawable
from benchmarks.report import check_output, headline, write_report
from benchmarks.results import read_report
from benchmarks.sections import noisy_parties, sections
from benchmarks.serving_results import GATEWAY
from benchmarks.webpage import render_webpage
from mirror_runtime.errors import InputError


def test_a_report_survives_the_way_through_the_file(report, tmp_path):
    write_report(report, tmp_path / "out")
    assert read_report(tmp_path / "out") == report
    assert '"scores": [0.0, 1.0, 2.0, 3.0]' in (tmp_path / "out" / "report.json").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "latency.png",
        "latency_cdf.png",
        "lengths.png",
        "pareto.png",
        "report.html",
        "report.json",
        "report.md",
        "scaling.png",
        "serving.png",
        "throughput.png",
        "training.png",
    ]


def test_conditions_say_what_was_set_on_the_machine(report):
    text = render_markdown(report, {})
    assert "| Clocks | 2,600 to 3,100 MHz before the first measurement; governor: not given by the system |" in text
    assert "| Limits of the process | logical cores 0, 2; CPU quota of 1.5 cores; memory limit of 8.0 GiB |" in text
    assert "| Variables that change threads | `OMP_NUM_THREADS=2` |" in text
    free = dataclasses.replace(report.host, affinity=(), cpu_quota_cores=None, memory_limit_bytes=None, clocks_mhz=())
    text = render_markdown(dataclasses.replace(report, host=free), {})
    assert "| Limits of the process | logical cores any; no CPU quota; no memory limit |" in text
    assert "| Clocks | not given by the system; governor: " in text


def test_memory_and_the_floor_of_a_text_stand_beside_what_was_measured(report):
    text = render_markdown(report, {})
    assert "| read | 26.8 | 13.4 |" in text
    assert "an array of 256 MiB; the last cache holds 32 MiB" in text
    assert "| openvino bf16 | 8 | 1.50 | 1.90 | 1.99 | 2.00 | 0.38 | 25 % | 2 | 0.999800 |" in text
    assert json.loads(json.dumps(headline(report, Path())))["memory"]["read_gb_per_s"] == 26.8


def test_training_is_shown_as_medians_with_their_spread_and_a_ratio_of_times(report):
    text = render_markdown(report, {})
    assert "| mirror-runtime, recipe sentence | 32.0 | 75.00 (74.00 to 76.00) | 68.50 (68.00 to 69.00) |" in text
    assert "published recipe takes 20.0 times as long as mirror-runtime, recipe sentence" in text


def test_a_report_of_another_schema_is_refused(report, save, tmp_path):
    save(report, tmp_path / "out")
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


def test_only_a_report_is_replaced(report, save, tmp_path):
    save(report, tmp_path / "out")
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
    assert "| st torch | 2.10 (2.00 to 2.20) | 0.999700 | 0.999900 |" in text
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
    assert page.count("<figure ") == len(drawable(report)) == 8
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "<script" not in page
    assert "no | such" in page
    labels = re.findall(r'role="region" aria-label="([^"]+)"', page)
    assert len(labels) == len(set(labels)) > len(sections(report))  # who hears them must be able to tell them apart


def test_the_page_shows_hostile_text_as_text(report):
    hostile = dataclasses.replace(report, subject=dataclasses.replace(report.subject, name="<script>alert(1)</script>"))
    page = render_webpage(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_quality_and_serving_are_shown_with_what_they_are_beside(report):
    text = render_markdown(report, {})
    assert "| openvino bf16 | 78.00 (76.00 to 80.00) | 78.00 (76.00 to 80.00) | -0.25 (-0.50 to +0.00) | 97 % |" in text
    assert "Deltas and top-10 overlap are to onnxruntime fp32" in text
    assert "400 texts/s in process without a server; the best closed loop reaches 75 % of that; up to 150 " in text
    assert "| 8 x 1 | 300 | 25.0 | 29.0 | 29.9 | 30.0 | 3.0 | 11.0 | 3.5 | 2 | 0 | 312 | 24.0 | 0.96 |" in text
    assert "| 350 | 301 | 475.0 | 815.0 | 891.5 | 899.2 | – | – | – | 2 | 1 | no, 12 never sent |" in text


def test_the_overload_is_shown_with_its_conditions(report):
    text = render_markdown(report, {})
    assert "| 700 | 343 | 98 % | 2 | 1900.0 | 1998.0 | 1 | 3.5 | 3.5 | 0 | 1.2 | 400 | 405 | 2.12 |" in text
    for condition in ("for 4 s", "16 texts", "twice the 350 texts/s", "32,768 tokens at once", "within 60.5 ms"):
        assert condition in text
    (served,) = report.serving
    lost = dataclasses.replace(served.overload, refused_p50_ms=None, refused_p99_ms=None, recovery_s=None)
    text = render_markdown(dataclasses.replace(report, serving=(dataclasses.replace(served, overload=lost),)), {})
    assert "| 1 | – | – | 0 | 1.2 | 400 | 405 | not |" in text


def test_the_gateway_is_told_from_triton(report):
    (served,) = report.serving
    gateway = dataclasses.replace(served, server="mirror gateway 1", protocol=GATEWAY, open=(), overload=None)
    both = dataclasses.replace(report, serving=(served, gateway))
    text = render_markdown(both, {})
    assert "**openvino bf16**, triton 2.51.0, grpc: 400 texts/s" in text
    assert "**openvino bf16**, mirror gateway 1, http, gateway: 400 texts/s in process without a server; the" in text
    assert "no rate was kept up with" not in text  # none was tried
    assert (served.name, gateway.name) == ("openvino bf16", "openvino bf16, http, gateway")
    points = [line["point"] for line in headline(both, Path())["serving"]]
    assert points == ["openvino bf16", "openvino bf16, http, gateway"]


def test_limits_name_everything_that_was_left_out_and_why(report):
    text = render_markdown(report, {})
    for row in (
        "| peers | st onnx | no \\| such file |",
        "| training | all | not asked for |",
        "| all | onnxruntime fp32 | left out by --engine or --precision |",
        "| peers | CTranslate2 | left out by --peer or --quick |",
    ):
        assert row in text
    assert "| peers | fastembed |" not in text
    assert "Latency's p99 rests on fewer than 1000 samples" in text
    assert "sentence similarity alone" in text


def test_rounds_far_apart_are_said(report):
    assert noisy_parties(report) == ["openvino bf16 (throughput)", "openvino bf16 (beside peers)"]
    calm = dataclasses.replace(report.throughput[0], samples_s=(0.5, 0.52, 0.57))
    steady = dataclasses.replace(report, throughput=(calm,), ours_beside_peers=())
    assert noisy_parties(steady) == []
    assert "not steady" in render_markdown(report, {})
    assert "not steady" not in render_markdown(steady, {})


def test_a_continued_run_says_so(report):
    text = render_markdown(dataclasses.replace(report, resumed=("2026-01-02T00:00:00+00:00",)), {})
    assert "interrupted, continued 2026-01-02T00:00:00+00:00" in text
