"""A complete benchmark report, for the tests of what is done with one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.machine_results import Bandwidth, Ceiling, Host
from benchmarks.peer_results import Comparison, PeerResult, SingleTexts, SweepPoint, TrainingResult, TrainingRun
from benchmarks.point import Point
from benchmarks.quality_results import Estimate, QualityResult, QualitySet, SetScore
from benchmarks.results import (
    REPORT_FILE,
    SCHEMA_VERSION,
    Failure,
    LatencyResult,
    LengthResult,
    Report,
    Settings,
    Source,
    StartupResult,
    Subject,
    Suite,
    ThroughputResult,
    WorkloadInfo,
)
from benchmarks.scaling_results import CallersResult, CoresResult, FullQueue, ScalingResult, SizeResult
from benchmarks.serving_results import GRPC, ClosedLoop, OpenLoop, Overload, PerfAnalyzerRun, ServerTimes, ServingResult
from mirror_runtime.bundle import EngineName, Parity, Precision, write_json

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


def _quality(party: str, ours: bool, cosines: tuple[float, ...], spearman: float) -> QualityResult:
    figure = Estimate(value=spearman, low=spearman - 2, high=spearman + 2)
    delta = Estimate(value=-0.25, low=-0.5, high=0.0)
    return QualityResult(
        party=party,
        ours=ours,
        baseline="onnxruntime fp32",
        scores=(SetScore(name="pairs", cosines=cosines, spearman=figure, delta=delta),),
        mean=figure,
        mean_delta=delta,
        top10_overlap=0.97,
        texts=8,
    )


SERVED = ServingResult(
    engine=EngineName.OPENVINO,
    precision=Precision.BF16,
    server="triton 2.51.0",
    protocol=GRPC,
    in_process_texts_per_s=400.0,
    closed=(
        ClosedLoop(
            concurrency=8,
            texts_a_request=1,
            rounds_texts_per_s=(290.0, 300.0, 310.0),
            texts_per_s=300.0,
            requests=2,
            samples_ms=(20.0, 30.0),
            p50_ms=25.0,
            p90_ms=29.0,
            p99_ms=29.9,
            p999_ms=29.99,
            errors=0,
            server=ServerTimes(queue_ms=3.0, compute_ms=11.0, texts_per_execution=3.5),
        ),
    ),
    open=(
        OpenLoop(
            offered_per_s=150.0, achieved_per_s=150.0, requests=2, samples_ms=(5.0, 7.0), p50_ms=6.0, p90_ms=6.8,
            p99_ms=7.0, p999_ms=7.0, errors=0, unsent=0, kept_up=True, server=None,
        ),
        OpenLoop(
            offered_per_s=350.0, achieved_per_s=301.0, requests=2, samples_ms=(50.0, 900.0), p50_ms=475.0, p90_ms=815.0,
            p99_ms=891.5, p999_ms=899.2, errors=1, unsent=12, kept_up=False, server=None,
        ),
    ),
    perf_analyzer=(
        PerfAnalyzerRun(concurrency=8, texts_a_request=1, texts_per_s=312.5, p50_ms=24.0, p99_ms=31.0),
    ),
    overload=Overload(
        texts_a_request=16, seconds=4.0, max_tokens_in_flight=32768, maximum_texts_per_s=350.0, calm_p99_ms=60.5,
        offered_texts_per_s=700.0, goodput_texts_per_s=343.0, accepted=2, accepted_samples_ms=(1800.0, 2000.0),
        accepted_p50_ms=1900.0, accepted_p99_ms=1998.0, refused=1, refused_samples_ms=(3.5,), refused_p50_ms=3.5,
        refused_p99_ms=3.5, errors=0, lag_p99_ms=1.25, resident_before_bytes=400 * 2**20,
        resident_after_bytes=405 * 2**20, recovery_s=2.125,
    ),
)  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(
        schema_version=SCHEMA_VERSION,
        partial=False,
        started="2026-01-01T00:00:00+00:00",
        resumed=(),
        finished=("latency 8", "latency", "throughput", "startup", "quality", "peers", "training"),
        wall_s=12.0,
        host=Host(
            cpu_model="a CPU",
            cores_online=4,
            cores_usable=2,
            affinity=(0, 2),
            cpu_quota_cores=1.5,
            memory_limit_bytes=2**33,
            cpu_flags=("avx512_bf16",),
            clocks_mhz=(2600.0, 3100.0),
            governor=None,
            thread_environment={"OMP_NUM_THREADS": "2"},
            memory_bytes=2**34,
            os="Linux",
            python="3.11",
            load_1min_start=0.1,
        ),
        versions={"openvino": "2026.4"},
        source=Source(commit=None, dirty=None),
        subject=Subject(
            name="bundle",
            fingerprint="0123",
            base_model="m",
            max_tokens=64,
            dim=8,
            artifacts=("openvino bf16", "onnxruntime fp32"),
            flop_per_token=21_000_000,
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
            distinct=99,
        ),
        settings=Settings(
            suites=(Suite.LATENCY, Suite.PEERS),
            points=("openvino bf16",),
            peers=("fastembed",),
            sets_sha256=("1" * 64,),
            training=None,
            quick=False,
            rounds=3,
            seed=0,
            planted_slowdown=0.0,
        ),
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
        bandwidth=Bandwidth(
            threads=2,
            array_bytes=2**28,
            cache_bytes=2**25,
            read_samples_s=(0.01, 0.012),
            copy_samples_s=(0.02, 0.022),
            read_gb_per_s=26.8,
            copy_gb_per_s=25.6,
        ),
        latency=(
            LatencyResult(
                point=POINT,
                streams=2,
                tokens=8,
                floor_ms=0.375,
                samples_ms=(1.0, 2.0),
                p50_ms=1.5,
                p90_ms=1.9,
                p99_ms=1.99,
                p999_ms=2.0,
            ),
        ),
        throughput=(RATE,),
        lengths=(
            LengthResult(point=POINT, tokens=8, texts=256, samples_s=(0.5,), texts_per_s=512.0, tokens_per_s=4096.0),
            LengthResult(point=POINT, tokens=64, texts=256, samples_s=(2.0,), texts_per_s=128.0, tokens_per_s=8192.0),
        ),
        startup=(
            StartupResult(
                party="mirror_runtime",
                min_cosine=None,
                samples_s=(1.0,),
                median_s=1.0,
                first_vector_bytes=123_000_000,
                texts=100,
                peak_bytes=234_000_000,
                installed_bytes=345_000_000,
            ),
        ),
        quality_sets=(QualitySet(name="pairs", group="sts", sha256="1" * 64, scores=(0.0, 1.0, 2.0, 3.0)),),
        quality=(
            _quality("openvino bf16", True, (0.1, 0.2, 0.3, 0.4), 78.0),
            _quality("st torch", False, (0.1, 0.2, 0.3, 0.4), 78.25),
        ),
        serving=(SERVED,),
        ours_beside_peers=(RATE,),
        peers=(
            PeerResult(
                peer="st",
                backend="torch",
                version="5",
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
        single_texts=(
            SingleTexts(
                party="openvino bf16", ours=True, tokens=16, samples_ms=(1.0, 2.0), p50_ms=1.5, p90_ms=1.9, p99_ms=1.99
            ),
            SingleTexts(
                party="st torch", ours=False, tokens=16, samples_ms=(6.0, 8.0), p50_ms=7.0, p90_ms=7.8, p99_ms=7.98
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
        scaling=(
            ScalingResult(
                point=POINT,
                sizes=(
                    SizeResult(
                        texts=1000,
                        tokens=17_000,
                        samples_s=(0.39, 0.41),
                        us_per_text=400.0,
                        first_bytes=300_000_000,
                        peak_bytes=310_000_000,
                    ),
                    SizeResult(
                        texts=16_000,
                        tokens=272_000,
                        samples_s=(6.0,),
                        us_per_text=375.0,
                        first_bytes=300_000_000,
                        peak_bytes=320_000_000,
                    ),
                ),
                cores=(
                    CoresResult(
                        cores=1,
                        streams=1,
                        texts=100,
                        samples_s=(1.0, 1.0),
                        cpu_s=(0.99, 0.98),
                        texts_per_s=100.0,
                        cpu_share=0.99,
                    ),
                    CoresResult(
                        cores=2,
                        streams=2,
                        texts=100,
                        samples_s=(0.55, 0.5),
                        cpu_s=(1.0, 0.9),
                        texts_per_s=190.0,
                        cpu_share=1.8,
                    ),
                ),
                callers=CallersResult(
                    callers=100,
                    texts=100,
                    offline_samples_s=(0.4, 0.4),
                    callers_samples_s=(0.5, 0.5),
                    share=0.8,
                    queue=FullQueue(
                        max_waiting=500,
                        sent=2500,
                        accepted=900,
                        answered=900,
                        min_cosine=0.999999,
                        refused_samples_ms=(0.1, 0.3),
                        refused_p50_ms=0.2,
                        refused_max_ms=0.3,
                    ),
                ),
            ),
        ),
        failures=(Failure(suite="peers", party="st onnx", reason="no | such\nfile"),),
    )


@pytest.fixture
def save() -> Callable[[Report, Path], None]:
    """Write a report folder without drawings: they take seconds, and few tests look at them."""

    def write(report: Report, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(report, folder / REPORT_FILE)

    return write
