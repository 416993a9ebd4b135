"""Files of precisions other than fp32: their names, how they are made from the fp32 graphs, and what proves them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encoders.families import FAMILIES
from export.graph.trace import Graph
from export.precision.calibration import Calibration
from export.precision.half_precision import HALVES, write_half
from export.precision.quantize import plan_quantization, write_quantized, write_quantized_for_gpu
from mirror_runtime.bundle import EncoderSpec, EngineName, Layout, Precision
from mirror_runtime.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The files of one precision, by layout; a missing layout is not written."""

    files: Mapping[Layout, str] = field(default_factory=dict)
    gpu_files: Mapping[Layout, str] = field(default_factory=dict)  # for TensorRT and CUDA: the other operators are fp16
    engines: tuple[EngineName, ...] = (EngineName.ONNXRUNTIME,)  # prove the packed file; ONNX Runtime proves all others
    aliases: tuple[str, ...] = ()  # additional names of the padded file that other tools look for


VARIANTS: Mapping[Precision, Variant] = {
    Precision.FP16: Variant(files={Layout.PADDED: "model_fp16.onnx", Layout.PACKED: "model_packed_fp16.onnx"}),
    # ONNX Runtime has no bf16 on the CPU. OpenVINO runs this file as it runs the fp32 file in bf16.
    Precision.BF16: Variant(files={Layout.PACKED: "model_packed_bf16.onnx"}, engines=(EngineName.OPENVINO,)),
    Precision.INT8: Variant(
        # transformers.js, optimum and infinity look for the first name, sentence-transformers' users for the alias.
        files={Layout.PADDED: "model_quantized.onnx", Layout.PACKED: "model_packed_int8.onnx"},
        gpu_files={Layout.PACKED: "model_packed_gpu_int8.onnx"},
        engines=(EngineName.ONNXRUNTIME, EngineName.OPENVINO),
        aliases=("model_qint8_avx512_vnni.onnx",),
    ),
    Precision.FP8: Variant(gpu_files={Layout.PACKED: "model_packed_fp8.onnx"}),
}


def write_variant(
    folder: Path,
    graphs: Mapping[Layout, Graph],
    precision: Precision,
    *,
    spec: EncoderSpec,
    calibration: Sequence[str] | None,
    gpu: bool = False,
) -> Iterator[Graph]:
    """Write the files of one precision beside the fp32 graphs; each is checked.

    Args:
        folder: the unfinished bundle, which holds the tokenizer.
        graphs: the fp32 graphs.
        precision: a key of `VARIANTS`.
        spec: of the encoder.
        calibration: texts to measure scales on; None for the built-in ones. Half precision needs none.
        gpu: also write the files for GPUs.

    Raises:
        EngineError: the precision cannot hold the weights.
        InputError: the calibration texts cannot be encoded.
    """
    variant = VARIANTS[precision]
    if FAMILIES[spec.family].is_static:
        raise EngineError(
            f"{precision.value} of a static encoder is not supported: it has no matrix product to make faster"
        )
    if precision in HALVES:
        for layout, name in variant.files.items():
            path = graphs[layout].path.with_name(name)
            yield write_half(graphs[layout], path, precision)
        return
    packed = graphs[Layout.PACKED].path
    measured = Calibration.run(packed, folder, spec, calibration)
    plan = plan_quantization(packed, measured, precision)
    for layout, name in variant.files.items():
        path = graphs[layout].path.with_name(name)
        yield write_quantized(graphs[layout], path, plan)
    for layout, name in variant.gpu_files.items() if gpu or not variant.files else ():
        path = graphs[layout].path.with_name(name)
        yield write_quantized_for_gpu(graphs[layout], path, plan)


def provers(graph: Graph, precision: Precision) -> tuple[EngineName, ...]:
    """Return the engines that prove a file of `write_variant`."""
    variant = VARIANTS[precision]
    for_cpu = graph.layout is Layout.PACKED and graph.path.name not in variant.gpu_files.values()
    return variant.engines if for_cpu else (EngineName.ONNXRUNTIME,)


def write_aliases(path: Path, precision: Precision) -> None:
    """Write a proven padded file under its additional names: hard links where the file system has them, else copies."""
    for name in VARIANTS[precision].aliases if precision in VARIANTS else ():
        alias = path.with_name(name)
        try:
            os.link(path, alias)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, alias)
