"""The second model, `encoder`: a packed graph in one of Triton's own backends, and its `config.pbtxt`.

`embed` sends it complete batches of packed rows, so its `max_batch_size` is 0: there is nothing left to batch. The
OpenVINO backend requires that too, because it cannot batch rows of varying length, and Triton adds no queueing delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision, TensorSpec
from mirror_runtime.engines.openvino_engine import length_multiple_of
from mirror_runtime.engines.plan_card import PlanCard, read_card
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.packing import BLOCK, ROW_TOKENS, TOKEN_BUDGET, ShapeSet
from mirror_runtime.selection import AUTO
from mirror_runtime.triton.repository.options import Backend, ServingOptions

ENCODER_NAME = "encoder"

_TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
}

_CONFIG = """\
# Rendered from a bundle's manifest by mirror_runtime.triton.model.backend_model: change that file, not this one.
name: "{name}"
backend: "{backend}"
default_model_filename: "{file}"
# Requests are batches of packed rows already.
max_batch_size: 0
input [
{inputs}
]
output [
{outputs}
]
version_policy {{ latest {{ num_versions: 1 }} }}
{instances}
# Every shape that packing produces, so that no request waits for a compilation.
model_warmup [
{warmup}
]
{extra}"""


_TRITONS = {Backend.ONNXRUNTIME_CUDA: "onnxruntime"}
"""Triton's names of backends, where they differ."""

_CUDA = """\
optimization {
  execution_accelerators {
    gpu_execution_accelerator [
      # fp32 stays fp32. No CUDA graphs: they repeat one shape at fixed addresses, and Triton's buffers move.
      { name: "cuda" parameters { key: "use_tf32" value: "0" } }
    ]
  }
}
"""


@dataclass(frozen=True, kw_only=True)
class BackendModel:
    """The model that runs the graph behind `embed`."""

    artifact: Artifact  # the packed graph, or the TensorRT plan
    backend: Backend
    shapes: tuple[tuple[int, int], ...]  # (rows, row length) of every batch that `embed` sends
    streams: int  # batches that run in parallel
    card: PlanCard | None = None  # of the TensorRT plan; None for graphs

    @property
    def file(self) -> str:
        """File name of the graph in the model's version folder."""
        return "model.plan" if self.backend is Backend.TENSORRT else "model.onnx"

    @classmethod
    def of(cls, bundle: Path, manifest: Manifest, options: ServingOptions, cores: int) -> BackendModel:
        """Choose the artifact, shapes and streams for a machine with `cores` cores."""
        artifact = find_artifact(manifest, options)
        # On a GPU one batch is copied while another is computed.
        default = 2 if options.backend.on_gpu else {Backend.ONNXRUNTIME: 1, Backend.OPENVINO: cores}[options.backend]
        streams = options.streams or default
        if not options.backend.on_gpu and streams > cores:
            raise InputError(f"{streams} streams on {cores} cores would slow each other down: use {cores}")
        card = read_card(bundle / artifact.path) if options.backend is Backend.TENSORRT else None
        if any(len(tensor.shape) != 2 for tensor in artifact.inputs):
            raise EngineError(f"{artifact.path} has ragged attention, which runs with the backend python only")
        shape_set = packed_shape_set(manifest, options)
        missing = [shape for shape in shape_set.shapes() if card is not None and shape not in _static_shapes(card)]
        if missing:
            raise EngineError(
                f"{artifact.path} has no static profile for rows {missing[0]}: build it with export/to_tensorrt.py"
            )
        return cls(artifact=artifact, backend=options.backend, shapes=shape_set.shapes(), streams=streams, card=card)


def packed_shape_set(manifest: Manifest, options: ServingOptions) -> ShapeSet:
    """Return the shapes into which `embed` packs."""
    spec = manifest.encoder
    return ShapeSet.up_to(
        spec.pad_to or spec.max_tokens,
        base=options.row_tokens or ROW_TOKENS,
        budget=options.batch_tokens or TOKEN_BUDGET,
        length_multiple=length_multiple_of(spec.pooling) if options.backend is Backend.OPENVINO else BLOCK,
    )


def find_artifact(manifest: Manifest, options: ServingOptions) -> Artifact:
    """Find the packed artifact that a backend runs."""
    engine = EngineName(options.backend.value)  # a backend runs the artifacts of the engine of its name
    if options.engine not in (AUTO, engine.value):
        raise InputError(f"the backend {options.backend.value} runs engine {engine.value}, not {options.engine}")
    packed = [a for a in manifest.artifacts if a.engine is engine and a.layout is Layout.PACKED]
    fitting = [a for a in packed if options.precision in (AUTO, a.precision.value)]
    if not fitting or (options.precision == AUTO and len({a.precision for a in fitting}) > 1):
        present = ", ".join(a.precision.value for a in packed) or "none"
        raise EngineError(
            f"the backend {options.backend.value} needs one packed artifact of {engine.value} and precision "
            f"{options.precision}; the bundle has {present}. Name one with --precision, or export it"
        )
    if options.backend is Backend.OPENVINO and fitting[0].precision is Precision.FP32:
        raise InputError(
            "Triton's OpenVINO backend has no setting for fp32: on CPUs with bf16 it would compute in bf16. "
            "Choose bf16, or the backend python"
        )
    if options.backend is Backend.OPENVINO and fitting[0].precision is Precision.INT8:
        raise InputError(
            "Triton's OpenVINO backend runs the int8 graph as it was exported, and its certificate is of the rewritten "
            "graph, whose vectors differ (see openvino_rewrite). Choose bf16, or the backend python"
        )
    return fitting[0]


def render_backend_config(model: BackendModel, cores: int) -> str:
    """Render the `config.pbtxt` of the model; its streams share the `cores` of the machine that will serve."""
    artifact = model.artifact
    return _CONFIG.format(
        name=ENCODER_NAME,
        backend=_TRITONS.get(model.backend, model.backend.value),
        file=model.file,
        inputs=",\n".join(_tensor(tensor) for tensor in artifact.inputs),
        outputs=",\n".join(_tensor(tensor) for tensor in artifact.outputs),
        instances=_instances(model),
        warmup=",\n".join(_warmup(shape, artifact.inputs) for shape in model.shapes),
        extra=_parameters(model, cores) + (_CUDA if model.backend is Backend.ONNXRUNTIME_CUDA else _cuda_graphs(model)),
    )


def _tensor(tensor: TensorSpec) -> str:
    dims = ", ".join(str(d) if isinstance(d, int) else "-1" for d in tensor.shape)
    return f'  {{ name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ] }}'


def _instances(model: BackendModel) -> str:
    """Render the instance group: without a count, Triton starts two for ONNX Runtime, each on every core."""
    if model.card is None:
        kind = "KIND_GPU" if model.backend.on_gpu else "KIND_CPU"
        return f"instance_group [\n  {{ kind: {kind} count: {model.streams} }}\n]"
    profiles = ", ".join(f'"{number}"' for number in range(len(model.card.profiles)))
    return f"instance_group [\n  {{ kind: KIND_GPU count: {model.streams} profile: [ {profiles} ] }}\n]"


def _warmup(shape: tuple[int, int], inputs: Sequence[TensorSpec]) -> str:
    rows, length = shape
    zeros = "\n".join(
        f'    inputs {{ key: "{tensor.name}" value: {{ data_type: {_TYPES[tensor.dtype]} '
        f"dims: [ {rows}, {length} ] zero_data: true }} }}"
        for tensor in inputs
    )
    return f'  {{\n    name: "{rows} rows of {length}"\n    batch_size: 1\n{zeros}\n  }}'


def _parameters(model: BackendModel, cores: int) -> str:
    """Render the backend's settings: parallel batches share the threads and never multiply them."""
    if model.backend is Backend.ONNXRUNTIME:
        settings = {"intra_op_thread_count": str(max(1, cores // model.streams)), "inter_op_thread_count": "1"}
    elif model.backend is Backend.OPENVINO:
        settings = {"NUM_STREAMS": str(model.streams), "INFERENCE_NUM_THREADS": str(cores), "HINT_BF16": "YES"}
    else:
        return ""
    lines = ",\n".join(f'  {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in settings.items())
    return f"parameters [\n{lines}\n]\n"


def _cuda_graphs(model: BackendModel) -> str:
    if model.card is None:
        return ""
    specs = ",\n".join(
        "      { batch_size: 0 "
        + " ".join(
            f'input {{ key: "{tensor.name}" value: {{ dim: [ {rows}, {length} ] }} }}'
            for tensor in model.artifact.inputs
        )
        + " }"
        for rows, length in model.shapes
    )
    return f"optimization {{\n  cuda {{\n    graphs: true\n    graph_spec [\n{specs}\n    ]\n  }}\n}}\n"


def _static_shapes(card: PlanCard) -> set[tuple[int, ...]]:
    """Return the shapes for which a plan has a static profile."""
    shapes = [next(iter(profile.values())) for profile in card.profiles]
    return {smallest for smallest, _, largest in shapes if smallest == largest}
