"""A small complete benchmark report, and a plan, for the tests of what is done with them."""

import dataclasses
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from benchmarks.plan import EncoderShape, Plan, select_variants
from benchmarks.recorder import Recorder
from benchmarks.report.facts import Facts, Host, Settings, Source, Subject
from benchmarks.report.record import Better, Condition, Failure, Measurement
from benchmarks.report.storage import REPORT_FILE, Report, write_report
from benchmarks.workload import WorkloadFacts, bundle_tokenizer, load_workload
from mirror_runtime.bundle import TOKENIZER_FILE, EngineName, Precision, read_manifest

VARIANT, PEER = "openvino bf16", "st torch"

FACTS = Facts(
    started="2026-01-01T00:00:00+00:00",
    partial=False,
    resumed=(),
    wall_s=12.0,
    host=Host(
        cpu_model="a CPU", cores_online=4, cores_usable=2, affinity=(0, 2), cpu_quota_cores=1.5,
        memory_limit_bytes=2**33, cpu_flags=("avx512_bf16",), clocks_mhz=(2600.0, 3100.0), governor=None,
        thread_environment={"OMP_NUM_THREADS": "2"}, memory_bytes=2**34, os="Linux", python="3.11",
        load_1min_start=0.1,
    ),
    versions={"openvino": "2026.4"},
    source=Source(commit=None, dirty=None),
    subject=Subject(
        name="bundle", fingerprint="0123", base_model="m", max_tokens=64, dim=8,
        artifacts=(VARIANT, "onnxruntime fp32"), flop_per_token=21_000_000,
    ),
    workload=WorkloadFacts(
        source="texts.txt", texts=100, texts_sha256="0" * 64, tokens_mean=15.0, tokens_p50=13.0, tokens_p90=22.0,
        tokens_max=60, truncated=0, distinct=99,
    ),
    settings=Settings(
        suites=("latency", "peers"), variants=(VARIANT,), peers=("st",), sets_sha256=("1" * 64,), training=None,
        quick=False, rounds=3, seed=0,
    ),
)  # fmt: skip


def measurements() -> tuple[Measurement, ...]:
    """Return at least one measurement of every suite."""
    recorder = Recorder()
    fact = recorder.record

    higher, lower = (partial(fact, better=better) for better in (Better.HIGHER, Better.LOWER))
    quality = {"set": "pairs", "sha256": "1" * 16}
    fact("bundle", VARIANT, "worst cosine of export", 0.9998)
    ceiling: dict[str, Condition] = {"threads": 2, "best shape": "[1024, 384] x [384, 1536]", "MFLOP per token": 21.0}
    fact("ceilings", VARIANT, "matrix products", 400.0, 500.0, unit="GFLOP/s", conditions=ceiling)
    memory: dict[str, Condition] = {"threads": 2, "array MiB": 256.0, "last cache MiB": 32.0}
    fact("ceilings", "memory", "memory read", 26.8, 22.0, unit="GB/s", conditions=memory)
    fact("ceilings", "memory", "memory copied", 25.6, unit="GB/s", conditions=memory)
    tokens: dict[str, Condition] = {"tokens": 8}
    lower("latency", VARIANT, "time per text", 1.0, 2.0, unit="ms", conditions=tokens)
    fact("latency", VARIANT, "floor", 0.375, unit="ms", conditions=tokens)
    for suite, computes in (("throughput", {}), ("peers", {"computes in": "bf16"})):
        higher(suite, VARIANT, "texts per second", 200.0, 250.0, 166.0, unit="1/s", conditions=computes)
        fact(suite, VARIANT, "tokens per second", 3000.0, unit="1/s")
        fact(suite, VARIANT, "worst cosine to fp32", 0.9997)
    for length, rate in ((8, 4096.0), (64, 8192.0)):
        conditions: dict[str, Condition] = {"tokens": length, "texts": 256}
        fact("throughput", VARIANT, "tokens per second", rate, unit="1/s", conditions=conditions)
    peer: dict[str, Condition] = {"version": "5", "computes in": "float32", "batch size": 8}
    higher("peers", PEER, "texts per second", 100.0, 90.0, unit="1/s", conditions=peer)
    fact("peers", PEER, "worst cosine to fp32", 0.9999)
    ours: dict[str, Condition] = {"ours": VARIANT}
    fact("peers", PEER, "our rate over its rate", 2.1, conditions=ours, figures={"low": 2.0, "high": 2.2})
    lower("startup", VARIANT, "time to the first vector", 1.0, 1.1, unit="s")
    fact("startup", VARIANT, "peak memory", 234e6, unit="B")
    fact("quality", "people", "score", 0.0, 1.0, 2.0, 3.0, conditions=quality)
    higher("quality", VARIANT, "cosine of pairs", 0.1, 0.2, 0.3, 0.4, conditions=quality)
    for party, value in ((VARIANT, 78.0), (PEER, 78.25)):
        for name in ("pairs", "mean"):
            interval = {"low": value - 2, "high": value + 2}
            fact("quality", party, "Spearman x 100", value, conditions={"set": name}, figures=interval)
        difference, mean = {"low": -0.5, "high": -0.001}, {"set": "mean"}
        fact("quality", party, "Spearman x 100, difference to fp32", -0.25, conditions=mean, figures=difference)
    for server in ("triton", "gateway"):
        loop: dict[str, Condition] = {"server": server, "loop": "closed", "callers": 8, "texts per request": 1}
        higher("serving", VARIANT, "texts per second", 290.0, 300.0, 310.0, unit="1/s", conditions=loop)
        fact("serving", VARIANT, "time per request", 20.0, 30.0, unit="ms", conditions=loop)
    analyzer = {**loop, "server": "triton", "client": "perf_analyzer"}
    fact("serving", VARIANT, "texts per second", 312.5, unit="1/s", conditions=analyzer)
    for share, offered, kept in ((0.5, 150.0, 1.0), (1.2, 350.0, 0.0)):
        arrivals: dict[str, Condition] = {"server": "triton", "loop": "open", "share": share}
        fact("serving", VARIANT, "offered per second", offered, unit="1/s", conditions=arrivals)
        fact("serving", VARIANT, "time per request", offered, 2 * offered, unit="ms", conditions=arrivals)
        fact("serving", VARIANT, "kept up", kept, conditions=arrivals)
    recipe = "mirror-runtime, recipe sentence"
    lower("training", recipe, "time to the saved folder", 30.0, 34.0, unit="s")
    fact("training", recipe, "Spearman x 100", 71.0, 72.5, unit="points", conditions={"set": "mean"})
    return recorder.measurements


@pytest.fixture(scope="session")
def report() -> Report:
    return Report(
        facts=FACTS,
        measurements=measurements(),
        failures=(Failure(suite="peers", party="st onnx", reason="no | such\nfile"),),
    )


@pytest.fixture
def change() -> Callable[..., Report]:
    """Replace what `make` returns for the measurements of a metric; None drops one."""

    def changed(report: Report, metric: str, make: Callable[[Measurement], Measurement | None]) -> Report:
        found = (make(one) if one.metric == metric else one for one in report.measurements)
        return dataclasses.replace(report, measurements=tuple(one for one in found if one is not None))

    return changed


@pytest.fixture
def save() -> Callable[[Report, Path], None]:
    """Write a report folder without plots: they take seconds, and few tests look at them."""

    def write(report: Report, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_report(report, folder / REPORT_FILE)

    return write


@pytest.fixture
def progress() -> Progress:
    return Progress(TextColumn(""), console=Console(file=io.StringIO()))


@pytest.fixture
def bundle(make_bundle, make_artifact) -> Path:
    folder = make_bundle(artifacts=(make_artifact(EngineName.FAKE, Precision.FP32),))
    sizes = '"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16'
    (folder / "config.json").write_text(f'{{"model_type": "bert", {sizes}}}')
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"the quick brown fox number {i} {'jumps ' * (i % 9)}\n" for i in range(60)))
    return path


@pytest.fixture
def plan(bundle, texts, tmp_path) -> Plan:
    """A quick run of the fake engine."""
    manifest = read_manifest(bundle)
    tokenizer = bundle_tokenizer(bundle / TOKENIZER_FILE, manifest.encoder.max_tokens)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Plan(
        bundle=bundle,
        manifest=manifest,
        variants=select_variants(manifest, (), ()),
        workload=load_workload(texts, tokenizer, quick=True, seed=0),
        suites=(),
        rounds=2,
        seed=0,
        quick=True,
        shape=EncoderShape(layers=1, hidden=128, intermediate=256),
        scratch=scratch,
    )
