"""Chained matrix products in an engine's own library, which `ceilings` and `reference_speed` time.

Each chain multiplies rows by a matrix and by a second one that restores their width, alternately, in the precision of
an artifact and compiled as the runtime compiles one. In int8 the products are those of our int8 graphs: static
symmetric activation ranges and per-column weight scales; each product takes 8-bit numbers and passes 8-bit numbers on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

_LEVELS = 255
_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.INT8: "f32"}
"""Precision of everything that is not quantised; in a chain of int8 products that is nothing."""


@dataclass(frozen=True)
class Matrices:
    """The factors: `x` [rows, inner] times `there` [inner, outer], times `back` [outer, inner], and so on."""

    x: NDArray[np.float32]
    there: NDArray[np.float32]
    back: NDArray[np.float32]

    @classmethod
    def draw(cls, rows: int, inner: int, outer: int) -> Matrices:
        """Draw matrices that keep the variance of what they multiply, so that no chain overflows or vanishes."""
        random = np.random.default_rng(0)

        def weights(rows: int, columns: int) -> NDArray[np.float32]:
            return random.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(rows))

        there, back = weights(inner, outer), weights(outer, inner)
        return cls(random.standard_normal((rows, inner), dtype=np.float32), there, back)

    @property
    def flop(self) -> int:
        """Operations of one run of the chain."""
        rows, inner = self.x.shape
        return PAIRS * 2 * (2 * rows * inner * self.there.shape[1])


def quantize(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise a matrix symmetrically to 8 bits, with a scale for each column."""
    scales: NDArray[np.float32] = (np.abs(matrix).max(axis=0) / 127).astype(np.float32)
    return np.round(matrix / scales).astype(np.int8), scales


def seconds_of(work: Callable[[], object], runs: int) -> tuple[float, ...]:
    """Run some work so many times, and return the seconds of each run."""
    samples = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        samples.append(time.perf_counter() - began)
    return tuple(samples)


def repeated(
    engine: EngineName, precision: Precision, matrices: Matrices, *, streams: int, turns: int
) -> tuple[Callable[[], None], int]:
    """Return a function that runs the chain as the runtime runs an encoder, and the chains that one call runs.

    Args:
        engine: openvino runs one chain on each stream at once, onnxruntime uses all cores for one.
        precision: of an artifact.
        matrices: the factors.
        streams: of openvino: one per core fills the machine, a single one uses all cores.
        turns: runs of each stream.

    Raises:
        EngineError: there is no chain for this engine and precision, or it cannot be compiled here.
    """
    if engine is EngineName.OPENVINO:
        compiled = compile_openvino(precision, matrices, threads=usable_cores(), streams=streams)
        requests = [compiled.create_infer_request() for _ in range(streams)]
        for request in requests:
            request.get_input_tensor(0).data[...] = matrices.x

        def turn() -> None:
            for request in requests:
                request.start_async()
            for request in requests:
                request.wait()

    elif engine is EngineName.ONNXRUNTIME:
        streams = 1
        session = onnxruntime_session(precision, matrices, usable_cores())

        def turn() -> None:
            session.run(None, {"x0": matrices.x})

    else:
        raise EngineError(f"no ceiling is measured for {engine.value} {precision.value}")

    def run() -> None:
        for _ in range(turns):
            turn()

    return run, turns * streams


def compile_openvino(precision: Precision, matrices: Matrices, *, threads: int, streams: int) -> Any:
    """Compile the chain.

    Args:
        precision: fp32, bf16 or int8.
        matrices: the factors.
        threads: of all streams together.
        streams: chains that can run at once.

    Returns:
        An `openvino.CompiledModel`.

    Raises:
        EngineError: there is no chain in this precision, or it cannot be compiled here.
    """
    if precision not in _HINTS:
        raise EngineError(f"no ceiling is measured for openvino {precision.value}")
    openvino, opset13 = require("openvino", "openvino"), require("openvino.opset13", "openvino")
    parameter = opset13.parameter(list(matrices.x.shape), np.float32)
    ends = [opset13.constant(side) for side in (np.float32(-RANGE), np.float32(RANGE))]
    node = parameter
    for weights in (matrices.there, matrices.back) * PAIRS:
        if precision is Precision.INT8:
            node = opset13.fake_quantize(node, *ends, *ends, _LEVELS)
            values, scales = quantize(weights)
            factor = opset13.multiply(
                opset13.convert(opset13.constant(values), "f32"), opset13.constant(scales[None, :])
            )
        else:
            factor = opset13.constant(weights)
        node = opset13.matmul(node, factor, False, False)
    settings = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
    }
    try:
        return shared_core().compile_model(openvino.Model([node], [parameter]), "CPU", settings)
    except RuntimeError as error:
        raise EngineError(f"openvino cannot compile the ceiling's products: {error}") from error


def onnx_model(precision: Precision, matrices: Matrices) -> bytes:
    """Build the chain as an ONNX file: in int8 with QuantizeLinear and DequantizeLinear around each product.

    Raises:
        EngineError: there is no chain in this precision.
    """
    if precision not in (Precision.FP32, Precision.INT8):
        raise EngineError(f"no ceiling is measured for onnxruntime {precision.value}")
    onnx, helper = require("onnx", "bench"), require("onnx.helper", "bench")
    numpy_helper = require("onnx.numpy_helper", "bench")
    nodes, constants = (_int8_nodes if precision is Precision.INT8 else _float_nodes)(helper, matrices)
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(matrices.x.shape))
        for name in ("x0", nodes[-1].output[0])
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], initializers)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return model


def onnxruntime_session(precision: Precision, matrices: Matrices, threads: int, optimized: str = "") -> Any:
    """Open the chain in ONNX Runtime with all cores on one call, as the runtime uses the machine.

    Args:
        precision: fp32 or int8.
        matrices: the factors.
        threads: of one call.
        optimized: file to write the optimised graph to; empty for none.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        EngineError: there is no chain in this precision.
    """
    model = onnx_model(precision, matrices)
    onnxruntime = require("onnxruntime", "cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # no warning that an optimised graph is for this machine only: so are ceilings
    options.optimized_model_filepath = optimized
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the runtime has it
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _float_nodes(helper: Any, matrices: Matrices) -> tuple[list[Any], dict[str, NDArray[Any]]]:
    constants: dict[str, NDArray[Any]] = {"there": matrices.there, "back": matrices.back}
    nodes = [
        helper.make_node("MatMul", [f"x{at}", weights], [f"x{at + 1}"])
        for at, weights in enumerate(list(constants) * PAIRS)
    ]
    return nodes, constants


def _int8_nodes(helper: Any, matrices: Matrices) -> tuple[list[Any], dict[str, NDArray[Any]]]:
    constants: dict[str, NDArray[Any]] = {
        "scale": np.asarray(2 * RANGE / (_LEVELS - 1), np.float32),
        "zero": np.asarray(0, np.int8),
    }
    nodes = []
    for name, matrix in (("there", matrices.there), ("back", matrices.back)):
        values, scales = quantize(matrix)
        constants |= {name: values, f"{name}_scale": scales, f"{name}_zero": np.zeros(len(scales), np.int8)}
        nodes.append(
            helper.make_node("DequantizeLinear", [name, f"{name}_scale", f"{name}_zero"], [f"{name}_wide"], axis=1)
        )
    for at, weights in enumerate(("there", "back") * PAIRS):
        nodes += [
            helper.make_node("QuantizeLinear", [f"x{at}", "scale", "zero"], [f"q{at}"]),
            helper.make_node("DequantizeLinear", [f"q{at}", "scale", "zero"], [f"d{at}"]),
            helper.make_node("MatMul", [f"d{at}", f"{weights}_wide"], [f"x{at + 1}"]),
        ]
    return nodes, constants
