"""A complete benchmark report, for the tests of what is done with one."""

import pytest

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
    TrainingResult,
    TrainingRun,
    WorkloadInfo,
)
from mirror_runtime.bundle import EngineName, Parity, Precision

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
        training=(
            TrainingResult(
                party="mirror-runtime, recipe sentence",
                base="mlm",
                pooling="mean",
                corpus="corpus.txt",
                texts=100,
                runs=(
                    TrainingRun(seed=42, seconds=30.0, spearman={"a": 74.0, "b": 68.0}, mean=71.0),
                    TrainingRun(seed=43, seconds=34.0, spearman={"a": 76.0, "b": 69.0}, mean=72.5),
                ),
                median_s=32.0,
            ),
            TrainingResult(
                party="published recipe",
                base="mlm",
                pooling="mean",
                corpus="corpus.txt",
                texts=100,
                runs=(TrainingRun(seed=42, seconds=640.0, spearman={"a": 73.0, "b": 67.0}, mean=70.0),),
                median_s=640.0,
            ),
        ),
        failures=(Failure(suite="peers", party="st onnx", reason="no | such\nfile"),),
    )
