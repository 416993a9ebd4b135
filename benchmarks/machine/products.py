"""Chained matrix products in an engine's own library, which `ceilings` times.

A chain multiplies rows by a matrix and by a second one that restores their width, alternately, in the precision of an
artifact and compiled as the runtime compiles one. In int8 the products are those of our int8 graphs: static symmetric
activation ranges and per-column weight scales; each product takes 8-bit numbers and passes 8-bit numbers on. Both
engines read the same ONNX graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.engines.openvino_core import shared_core
from mirror_runtime.errors import EngineError
from mirror_runtime.extras import require
from mirror_runtime.host import usable_cores

PAIRS = 6
"""Pairs of products in one chain: enough to make the library's call overhead small."""

RANGE = 4.0
"""Range of int8 activations, to both sides: they are normally distributed with a standard deviation of 1."""

CHAINS = {
    EngineName.OPENVINO: {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.INT8: "f32"},
    EngineName.ONNXRUNTIME: {Precision.FP32: "", Precision.INT8: ""},
}
"""The chains that exist, each with OpenVINO's hint for what is not quantised: in a chain of int8 that is nothing."""


class Sizes(NamedTuple):
    """Of the factors: [rows, inner] times [inner, outer], times [outer, inner], and so on."""

    rows: int
    inner: int
    outer: int

    @property
    def flop(self) -> int:
        """Operations of one run of the chain."""
        return PAIRS * 2 * (2 * self.rows * self.inner * self.outer)


def seconds_of(work: Callable[[], object], runs: int) -> tuple[float, ...]:
    """Run some work so many times, and return the seconds of each run."""
    samples = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return tuple(samples)


def repeated(
    engine: EngineName, precision: Precision, sizes: Sizes, *, streams: int, turns: int
) -> tuple[Callable[[], object], int]:
    """Return a function that runs the chain as the runtime runs an encoder, and the operations of one call.

    OpenVINO runs a chain on each stream at once: one stream per core fills the machine, a single one uses all cores.
    ONNX Runtime uses all cores for one chain. Each stream runs it `turns` times.

    Raises:
        EngineError: there is no chain for this engine and precision, or it cannot be compiled here.
    """
    if precision not in CHAINS.get(engine, {}):
        raise EngineError(f"no ceiling is measured for {engine.value} {precision.value}")
    x = _normal(sizes.rows, sizes.inner)
    if engine is EngineName.ONNXRUNTIME:
        session = onnxruntime_session(precision, sizes, usable_cores())
        return lambda: [session.run(None, {"x0": x}) for _ in range(turns)], turns * sizes.flop
    compiled = compile_openvino(precision, sizes, threads=usable_cores(), streams=streams)
    requests = [compiled.create_infer_request() for _ in range(streams)]
    for request in requests:
        request.get_input_tensor(0).data[...] = x

    def run() -> None:
        for _ in range(turns):
            for request in requests:
                request.start_async()
            for request in requests:
                request.wait()

    return run, turns * streams * sizes.flop


def compile_openvino(precision: Precision, sizes: Sizes, *, threads: int, streams: int) -> Any:
    """Compile the chain, and return an `openvino.CompiledModel` with so many threads of all streams together."""
    settings = {
        "INFERENCE_PRECISION_HINT": CHAINS[EngineName.OPENVINO][precision],
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
    }
    core, model = shared_core(), onnx_chain(precision, sizes)
    try:
        return core.compile_model(core.read_model(model), "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot compile the ceiling's products: {error}") from error


def onnxruntime_session(precision: Precision, sizes: Sizes, threads: int, optimized: str = "") -> Any:
    """Open the chain in an `onnxruntime.InferenceSession` with all threads on one call, as the runtime uses them.

    The optimised graph is written to the file `optimized`, if it is named.
    """
    onnxruntime = require("onnxruntime", "cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # no warning that an optimised graph is for this machine only: so are ceilings
    options.optimized_model_filepath = optimized
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the runtime has it
    return onnxruntime.InferenceSession(onnx_chain(precision, sizes), options, providers=["CPUExecutionProvider"])


def onnx_chain(precision: Precision, sizes: Sizes) -> bytes:
    """Build the chain: in int8 with QuantizeLinear and DequantizeLinear before each product."""
    onnx, helper = require("onnx", "bench"), require("onnx.helper", "bench")
    int8 = precision is Precision.INT8
    nodes: list[Any] = []
    constants: dict[str, Any] = {"scale": np.float32(RANGE / 127), "zero": np.int8(0)} if int8 else {}

    def node(kind: str, *inputs: str, to: str, **attributes: int) -> str:
        nodes.append(helper.make_node(kind, inputs, [to], **attributes))
        return to

    for name, rows, columns in (("there", sizes.inner, sizes.outer), ("back", sizes.outer, sizes.inner)):
        # They keep the variance of what they multiply, so that no chain overflows or vanishes.
        matrix = _normal(rows, columns) / np.float32(rows**0.5)
        if int8:
            scales = np.abs(matrix).max(axis=0) / np.float32(127)
            rounded = np.round(matrix / scales).astype(np.int8)
            constants |= {f"{name}8": rounded, f"{name}_scale": scales, f"{name}_zero": np.zeros(columns, np.int8)}
            node("DequantizeLinear", f"{name}8", f"{name}_scale", f"{name}_zero", to=name, axis=1)
        else:
            constants[name] = matrix
    last = "x0"
    for at, weights in enumerate(("there", "back") * PAIRS, 1):
        if int8:
            last = node("QuantizeLinear", last, "scale", "zero", to=f"q{at}")
            last = node("DequantizeLinear", last, "scale", "zero", to=f"d{at}")
        last = node("MatMul", last, weights, to=f"x{at}")
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes[:2]) for name in ("x0", last)]
    initializers = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], initializers)
    opset = helper.make_opsetid("", 17)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())


def _normal(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng((rows, columns)).standard_normal((rows, columns), np.float32)
