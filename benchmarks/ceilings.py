"""The ceiling before the figures: how fast the engine's own library multiplies bare matrices on this machine.

A throughput is then shown as a share of what the hardware and library could give at best. The operations counted are
those of the encoder's matrix products on useful tokens; attention, embeddings and all elementwise work are left out,
so that a share of 1 is out of reach.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.results import Ceiling
from benchmarks.session import Plan, Results, steps
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import BundleError, EngineError, MirrorError
from mirror_runtime.extras import require
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

PAIRS = 6
"""Chained products there and back in one model: enough to make the library's call overhead small."""
REPETITIONS = 8

_OPENVINO_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}

Sample = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes that decide the cost of a token: layers, hidden width, width of the feed-forward layer."""

    layers: int
    hidden: int
    intermediate: int

    @property
    def flop_per_token(self) -> int:
        """Operations of one token: 2 for each weight of the four attention and two feed-forward matrices."""
        return 2 * self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate)


def read_shape(bundle: Path) -> EncoderShape:
    """Read the encoder's sizes from the bundle's config.json (BERT's key names).

    Raises:
        BundleError: the file is missing or lacks a key.
    """
    path = bundle / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return EncoderShape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
        )
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path} does not give the encoder's sizes: {error} is missing") from error


def measure_ceilings(plan: Plan, shape: EncoderShape, results: Results, progress: Progress) -> None:
    """Measure one ceiling for each engine and precision of the plan; what cannot be measured becomes a failure."""
    if results.has("ceilings"):
        return
    with steps(progress, "ceilings", len(plan.points)) as done:
        for point in plan.points:
            try:
                results.ceilings[point.engine, point.precision] = measure_ceiling(point.engine, point.precision, shape)
            except MirrorError as error:
                results.fail("ceilings", point.name, error)
            done(point.name)
    results.finish("ceilings")


def measure_ceiling(engine: EngineName, precision: Precision, shape: EncoderShape) -> Ceiling:
    """Measure the library's best rate over the encoder's own matrix shapes, on all usable cores.

    The rows are as many as a full batch of the runtime has tokens.

    Raises:
        EngineError: there is no ceiling for this engine and precision.
    """
    outers = sorted({shape.hidden, 3 * shape.hidden, shape.intermediate})
    candidates = [_measure(engine, precision, shape.hidden, outer) for outer in outers]
    return max(candidates, key=lambda ceiling: ceiling.gflop_per_s)


def _measure(engine: EngineName, precision: Precision, inner: int, outer: int) -> Ceiling:
    random = np.random.default_rng(0)
    there = _weights(random, inner, outer)
    back = _weights(random, outer, inner)
    x = random.standard_normal((TOKEN_BUDGET, inner), dtype=np.float32)
    threads = usable_cores()
    if engine is EngineName.OPENVINO and precision in _OPENVINO_HINTS:
        run, calls = _openvino(precision, x, there, back, threads)
    elif engine is EngineName.ONNXRUNTIME and precision is Precision.FP32:
        run, calls = _onnxruntime(x, there, back, threads)
    else:
        raise EngineError(f"no ceiling is measured for {engine.value} {precision.value}")
    run()
    samples = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    flop = calls * PAIRS * 2 * (2 * TOKEN_BUDGET * inner * outer)
    return Ceiling(
        engine=engine,
        precision=precision,
        threads=threads,
        rows=TOKEN_BUDGET,
        inner=inner,
        outer=outer,
        flop_per_sample=flop,
        samples_s=tuple(samples),
        gflop_per_s=flop / min(samples) / 1e9,
    )


def _weights(random: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """Draw a matrix that keeps the variance of what it multiplies, so that no chain overflows or dies out."""
    return random.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(rows))


def _openvino(
    precision: Precision, x: NDArray[np.float32], there: NDArray[np.float32], back: NDArray[np.float32], threads: int
) -> tuple[Sample, int]:
    """Chain products in OpenVINO, one stream a core: the way the runtime fills the machine."""
    openvino, opset13 = require("openvino", "openvino"), require("openvino.opset13", "openvino")
    parameter = opset13.parameter(list(x.shape), np.float32)
    node, w, v = parameter, opset13.constant(there), opset13.constant(back)
    for _ in range(PAIRS):
        node = opset13.matmul(opset13.matmul(node, w, False, False), v, False, False)
    settings = {
        "INFERENCE_PRECISION_HINT": _OPENVINO_HINTS[precision],
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
    }
    calls = 2 * threads
    try:
        compiled = openvino.Core().compile_model(openvino.Model([node], [parameter]), "CPU", settings)
        queue = openvino.AsyncInferQueue(compiled, threads)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot compile the ceiling's products: {error}") from error

    def run() -> None:
        for _ in range(calls):
            queue.start_async([x], share_inputs=True)
        queue.wait_all()

    return run, calls


def _onnxruntime(
    x: NDArray[np.float32], there: NDArray[np.float32], back: NDArray[np.float32], threads: int
) -> tuple[Sample, int]:
    """Chain products in ONNX Runtime, all cores on one call: the way the runtime fills the machine."""
    onnxruntime, onnx = require("onnxruntime", "cpu"), require("onnx", "bench")
    helper, numpy_helper = require("onnx.helper", "bench"), require("onnx.numpy_helper", "bench")
    nodes = []
    for at in range(PAIRS):
        nodes.append(helper.make_node("MatMul", [f"x{at}", "there"], [f"y{at}"]))
        nodes.append(helper.make_node("MatMul", [f"y{at}", "back"], [f"x{at + 1}"]))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(f"x{PAIRS}", onnx.TensorProto.FLOAT, list(x.shape))],
        [numpy_helper.from_array(there, "there"), numpy_helper.from_array(back, "back")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the runtime has it
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    calls = 2

    def run() -> None:
        for _ in range(calls):
            session.run(None, {"x0": x})

    return run, calls
