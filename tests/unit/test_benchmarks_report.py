import dataclasses
import json

import pytest

from benchmarks.markdown import render_markdown
from benchmarks.report import check_output, headline, write_report
from benchmarks.results import (
    SCHEMA_VERSION,
    Ceiling,
    Comparison,
    Failure,
    Host,
    LatencyResult,
    PeerResult,
    Point,
    Report,
    Settings,
    Source,
    StartupResult,
    Subject,
    Suite,
    SweepPoint,
    ThroughputResult,
    WorkloadInfo,
    read_report,
)
from mirror_runtime.bundle import EngineName, Parity, Precision
from mirror_runtime.errors import InputError

PARITY = Parity(
    reference="PyTorch fp32",
    texts=3,
    texts_sha256="0" * 64,
    min_cosine=0.9998,
    mean_cosine=0.9999,
    max_abs_diff=0.01,
    floor=0.9995,
    neighbour_cosine=1.0,
    spearman=1.0,
    top10_overlap=1.0,
)
POINT = Point(engine=EngineName.OPENVINO, precision=Precision.BF16, artifact="onnx/model_packed.onnx", parity=PARITY)
RATE = ThroughputResult(
    point=POINT,
    streams=2,
    texts=100,
    tokens=1500,
    samples_s=(0.5, 0.4, 0.6),
    texts_per_s=200.0,
    texts_per_s_min=166.6,
    texts_per_s_max=250.0,
    tokens_per_s=3000.0,
    row_fill=0.98,
    ceiling_share=0.6,
    tokenize_share=0.1,
    pack_share=0.02,
    infer_share=1.9,
    unpack_share=0.01,
)


@pytest.fixture
def report() -> Report:
    return Report(
        schema_version=SCHEMA_VERSION,
        partial=False,
        started="2026-01-01T00:00:00+00:00",
        wall_s=12.0,
        host=Host(
            cpu_model="a CPU",
            cores_online=4,
            cores_usable=2,
            cpu_flags=("avx512_bf16",),
            memory_bytes=2**34,
            os="Linux",
            python="3.11",
            load_1min_start=0.1,
        ),
        versions={"openvino": "2026.4"},
        source=Source(commit=None, dirty=None),
        subject=Subject(
            name="bundle", fingerprint="0123", base_model="m", max_tokens=64, dim=8, flop_per_token=21_000_000
        ),
        workload=WorkloadInfo(
            source="texts.txt",
            texts=100,
            texts_sha256="0" * 64,
            tokens_mean=15.0,
            tokens_p50=13.0,
            tokens_p90=22.0,
            tokens_max=60,
            truncated=0,
        ),
        settings=Settings(suites=(Suite.LATENCY, Suite.PEERS), quick=False, rounds=3, seed=0),
        ceilings=(
            Ceiling(
                engine=EngineName.OPENVINO,
                precision=Precision.BF16,
                threads=2,
                rows=1024,
                inner=384,
                outer=1536,
                flop_per_sample=10**10,
                samples_s=(0.02, 0.03),
                gflop_per_s=500.0,
            ),
        ),
        latency=(
            LatencyResult(point=POINT, streams=2, tokens=8, samples_ms=(1.0, 2.0), p50_ms=1.5, p90_ms=1.9, p99_ms=1.99),
        ),
        throughput=(RATE,),
        startup=(StartupResult(party="mirror_runtime", min_cosine=None, samples_s=(1.0,), median_s=1.0),),
        ours_beside_peers=(RATE,),
        peers=(
            PeerResult(
                peer="st",
                backend="torch",
                precision="float32",
                threads=2,
                versions={"st": "5"},
                load_s=3.0,
                sweep=(SweepPoint(batch_size=8, texts=50, seconds=1.0),),
                batch_size=8,
                texts=100,
                samples_s=(1.0, 1.1),
                texts_per_s=95.0,
                texts_per_s_min=90.0,
                texts_per_s_max=100.0,
            ),
        ),
        comparisons=(
            Comparison(
                point=POINT,
                peer="st torch",
                ratio=2.1,
                ratio_low=2.0,
                ratio_high=2.2,
                min_cosine=0.9997,
                mean_cosine=0.9999,
            ),
        ),
        failures=(Failure(suite="peers", party="st onnx", reason="no | such\nfile"),),
    )


def test_a_report_survives_the_way_through_the_file(report, tmp_path):
    write_report(report, tmp_path / "out")
    assert read_report(tmp_path / "out") == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "latency.png",
        "report.json",
        "report.md",
        "throughput.png",
    ]


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
    text = render_markdown(report, ["latency.png"])
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
        throughput=(dataclasses.replace(RATE, ceiling_share=1.4),),
    )
    text = render_markdown(spoiled, [])
    for caveat in ("**Partial: the run was interrupted.**", "busy before the first measurement", "above 100 %"):
        assert caveat in text


def test_the_last_line_has_figures_and_no_samples(report, tmp_path):
    line = json.dumps(headline(report, tmp_path), allow_nan=False)
    assert "samples" not in line
    assert json.loads(line)["comparisons"] == [
        {"ours": "openvino bf16", "peer": "st torch", "ratio": 2.1, "min_cosine": 0.9997}
    ]
