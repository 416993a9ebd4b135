"""What only a GPU can tell: rate and parity of each way to run an encoder there. It begins nothing after 8 minutes.

    python benchmarks/gpu.py --output reports/gpu      # on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --device cpu --tiny       # rehearses every step in seconds

report.json and report.md are written after every step; the same command goes on after the last finished one. The last
line of standard output is one JSON object with the figures. The exit status is 1 where a step was not
measured, other than for a package that is not installed, or where vectors are below the floor of their precision.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.gpu_passes import (
    BASE,
    MINILM,
    SIZES,
    TINY,
    Pass,
    Prepared,
    Replayed,
    encoder_folder,
    packed_vectors,
    padded_pass,
    parity_floor,
    varlen_pass,
)
from benchmarks.machine.host import MEASURED_WITH, ROOT, describe_run, installed_versions
from benchmarks.recorder import Recorder
from benchmarks.report.document import check_output, headline, write_folder
from benchmarks.report.facts import Facts, Settings, Subject
from benchmarks.report.record import Better
from benchmarks.report.storage import REPORT_FILE, Report, resumed_report
from benchmarks.workers import run_to_end
from benchmarks.workload import WorkloadFacts
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.cli.run import application, run_command
from mirror_runtime.engines import load_engine
from mirror_runtime.errors import MissingExtra
from mirror_runtime.extras import require
from mirror_runtime.gpu import this_gpu
from mirror_runtime.stdlib_texts import standard_library
from mirror_runtime.vectors import cosines

SUITE, MACHINE, TUNING = "gpu", "machine", "training/tune.py"
ROUNDS = 5
COSINE = "worst cosine to fp32"
TUNED_TEXTS = 10_000


class Device(str, Enum):
    """Where PyTorch computes."""

    CUDA = "cuda"
    CPU = "cpu"


def run(
    output: Annotated[Path, typer.Option(help="Folder; a report there is continued.")] = Path("reports/gpu"),
    device: Annotated[Device, typer.Option(help="cpu is a rehearsal.")] = Device.CUDA,
    tiny: Annotated[bool, typer.Option("--tiny", help="A random encoder of two layers, and few texts.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no step after so many minutes.")] = 8.0,
    batch_tokens: Annotated[int, typer.Option(min=64, help="Of a full batch on the device.")] = 16384,
    tune: Annotated[bool, typer.Option(help="Also tune an encoder of BERT-base's size.")] = True,
) -> None:
    """Measure every way to run an encoder on this GPU, and write one report."""
    began, console, missing = time.monotonic(), Console(stderr=True, highlight=False), 0
    gpu = str(this_gpu()) if device is Device.CUDA else "no GPU: a rehearsal"
    models = (TINY,) if tiny else (MINILM, BASE)
    check_output(output)
    with tempfile.TemporaryDirectory(prefix="mirror-gpu-") as folder:
        scratch = Path(folder)
        prepared = {model: Prepared.of(model, scratch, batch_tokens, tiny=tiny) for model in models}
        options = (f"device {device.value}", f"batches of {batch_tokens} tokens")
        facts = _facts(gpu, options, tiny, prepared[models[0]].facts)
        earlier = Report(facts=facts, measurements=(), failures=())
        if (output / REPORT_FILE).is_file():
            earlier = resumed_report(output, facts)
        recorder = Recorder(earlier.measurements)

        def so_far() -> Report:
            now = replace(earlier.facts, partial=False, wall_s=earlier.facts.wall_s + time.monotonic() - began)
            return Report(facts=now, measurements=recorder.measurements, failures=tuple(recorder.failures))

        done = {(one.party, one.conditions["model"]) for one in recorder.measurements}
        steps = [
            ("bf16 products", MACHINE, partial(_products, recorder, device.value, tiny)),
            *(
                (party, model, partial(_measure, recorder, party, prepared[model], build, device.value))
                for model in models
                for party, build in _parties(prepared[model], device.value, tiny, scratch)
            ),
            *([(TUNING, models[-1], partial(_tune, recorder, models[-1], scratch, tiny))] if tune else []),
        ]
        for party, model, step in steps:
            if (party, model) in done:
                continue
            if time.monotonic() - began >= 60 * minutes:
                recorder.fail(SUITE, f"{party} ({model})", "no time was left: run the same command again")
                continue
            console.print(f"{time.monotonic() - began:6.1f} s  {model}: {party}", markup=False)
            # Whatever a library raises on its first contact with a GPU must not end the run.
            with recorder.failing(SUITE, f"{party} ({model})", Exception):
                try:
                    step()
                except MissingExtra:
                    missing += 1
                    raise
            write_folder(so_far(), output)
        report = so_far()
        write_folder(report, output)
    sys.stdout.write(json.dumps({"gpu": gpu, **headline(report, output)}, allow_nan=False) + "\n")
    wrong = [one for one in report.select(SUITE, COSINE) if not one.median >= parity_floor(one.party)]
    for one in wrong:
        console.print(f"{one.party}: worst cosine {one.median:.6f}, below {parity_floor(one.party)}", markup=False)
    if wrong or len(report.failures) > missing:
        raise typer.Exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when all is measured and right, 1 if not, 2 on a user's mistake, 130 if interrupted."""
    return run_command(application(run), argv, "benchmarks/gpu.py")


def _parties(prepared: Prepared, device: str, tiny: bool, scratch: Path) -> list[tuple[str, Callable[[], Pass]]]:
    """List who is measured on a model: the name, and what builds its pass. Their reference is fp32 on the CPU."""
    half = torch.float16

    def packed(dtype: torch.dtype, compiled: bool = False) -> Pass:
        forward = partial(packed_vectors, prepared.encoder(device, dtype))
        return prepared.packed_pass(Replayed(torch.compile(forward, dynamic=False) if compiled else forward, device))

    def engine(name: EngineName, precision: Precision) -> Pass:
        plan = name is EngineName.TENSORRT
        require("tensorrt" if plan else "onnxruntime", "tensorrt" if plan else "gpu")
        graph = prepared.tensorrt_plan(precision, scratch) if plan else prepared.graph(precision, scratch).path
        return prepared.packed_pass(load_engine(name, precision, graph, spec=prepared.reference.spec).run)

    def sentence_transformers() -> Pass:
        library = require("sentence_transformers", "test")
        encoder = library.SentenceTransformer(
            str(prepared.folder), device=device, model_kwargs={"dtype": half}, local_files_only=True
        )
        options = {"batch_size": 256, "normalize_embeddings": True, "show_progress_bar": False}
        return lambda: np.asarray(encoder.encode(list(prepared.texts), **options), np.float32)

    cuda = device == "cuda"
    ours = EngineName.ONNXRUNTIME_CUDA if cuda else EngineName.ONNXRUNTIME
    return [
        ("PyTorch packed fp32", lambda: packed(torch.float32)),
        ("PyTorch packed fp16", lambda: packed(half)),
        ("PyTorch packed bf16", lambda: packed(torch.bfloat16)),
        *([] if tiny else [("PyTorch packed fp16, compiled", lambda: packed(half, compiled=True))]),
        ("PyTorch varlen attention fp16", lambda: varlen_pass(prepared, device, half)),
        ("PyTorch padded fp16", lambda: padded_pass(prepared, device, half)),
        ("sentence-transformers fp16, tokenising included", sentence_transformers),
        *((f"{ours.value} {p.value}", partial(engine, ours, p)) for p in (Precision.FP32, Precision.FP16)),
        ("tensorrt fp16", partial(engine, EngineName.TENSORRT, Precision.FP16)),
    ]


def _measure(recorder: Recorder, party: str, prepared: Prepared, build: Callable[[], Pass], device: str) -> None:
    """Build a party, compare its vectors with those of the reference on the CPU, and time its passes."""
    with torch.inference_mode():
        if device == "cuda":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()  # of the device: engines other than PyTorch allocate for themselves
        began = time.perf_counter()
        encode = build()
        vectors = encode()
        ready = time.perf_counter() - began
        if prepared.vectors is None:
            prepared.vectors = prepared.reference.encode(prepared.texts)
        worst = float(cosines(vectors, prepared.vectors).min())
        samples = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            encode()
            samples.append(time.perf_counter() - began)
    rates = [prepared.tokens / seconds for seconds in samples]
    products = [one for one in recorder.measurements if one.party == "bf16 products"]
    fact = partial(recorder.record, SUITE, party, conditions={"model": prepared.model})
    fact("tokens per second", *rates, unit="1/s", better=Better.HIGHER)
    fact(COSINE, worst)
    fact("time until ready", ready, unit="s")
    if products:
        flop_per_s = float(np.median(rates)) * SIZES[prepared.model].flop_per_token
        fact("share of products", flop_per_s / products[0].figure("max") / 1e9)
    if device == "cuda":
        fact("memory", free - torch.cuda.mem_get_info()[0], unit="B")


def _products(recorder: Recorder, device: str, tiny: bool) -> None:
    """Measure bare bf16 matrix products in the sizes of BERT-base."""
    rows, inner, outer, repeats = (64, 32, 128, 2) if tiny else (16384, 768, 3072, 50)
    x, w = (torch.randn(a, b, device=device, dtype=torch.bfloat16) for a, b in ((rows, inner), (inner, outer)))
    rates = []
    for _ in range(1 + ROUNDS):  # the first warms up
        began = time.perf_counter()
        for _ in range(repeats):
            y = x @ w
        float(y[0, 0])  # waits for the device
        rates.append(repeats * 2 * rows * inner * outer / (time.perf_counter() - began) / 1e9)
    recorder.record(
        SUITE, "bf16 products", "matrix products", *rates[1:], unit="GFLOP/s", conditions={"model": MACHINE}
    )


def _tune(recorder: Recorder, model: str, scratch: Path, tiny: bool) -> None:
    """Tune an encoder on sentences, from process start to the saved folder."""
    lines = dict.fromkeys(line.strip() for item in standard_library() for line in item.text.splitlines())
    texts = [line for line in lines if len(line.split()) >= 3][: 200 if tiny else TUNED_TEXTS]
    (scratch / "corpus.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    options = ["--base", encoder_folder(model, scratch), "--corpus", scratch / "corpus.txt", "--pooling", "mean"]
    command = [sys.executable, ROOT / TUNING, *options, "--probe", "none", "--output", scratch / "tuned"]
    began = time.perf_counter()
    run_to_end([str(part) for part in command], "tune.py")
    took = time.perf_counter() - began
    recorder.record(SUITE, TUNING, "time", took, unit="s", conditions={"model": model, "texts": len(texts)})


def _facts(gpu: str, options: tuple[str, ...], tiny: bool, workload: WorkloadFacts) -> Facts:
    subject = Subject(
        name=", ".join((gpu, *options)), fingerprint="", base_model=MINILM, max_tokens=0, dim=0, artifacts=(),
        flop_per_token=None,
    )  # fmt: skip
    settings = Settings(
        suites=(SUITE,), variants=options, peers=("sentence-transformers",), sets_sha256=(), training=None,
        quick=tiny, rounds=ROUNDS, seed=0,
    )  # fmt: skip
    packages = (*MEASURED_WITH, "torch", "sentence-transformers")
    return describe_run(subject, workload, settings, {"gpu": gpu, **installed_versions(packages)})


if __name__ == "__main__":
    sys.exit(main())
