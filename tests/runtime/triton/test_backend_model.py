"""The second model's configuration, checked against the observed rules of Triton's own backends."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tritonclient.grpc.model_config_pb2 as triton_proto
from google.protobuf import text_format

from mirror_runtime.bundle import EngineName, Manifest, Pooling, Precision, read_manifest, to_json
from mirror_runtime.engines.plan_card import card_path
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.packing import ShapeSet
from mirror_runtime.triton.model.backend_model import BackendModel, packed_shape_set, render_backend_config
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from tests.support.fake_bundles import NAMES, artifact, plan_card

SHAPES = ShapeSet.up_to(64).shapes()


@pytest.fixture
def manifest(make_bundle) -> Callable[..., tuple[Path, Manifest]]:
    def make(engine: EngineName, *precisions: Precision) -> tuple[Path, Manifest]:
        path = "tensorrt/model_packed.plan" if engine is EngineName.TENSORRT else "onnx/model_packed.onnx"
        bundle = make_bundle(artifacts=tuple(artifact(engine, precision, path=path) for precision in precisions))
        return bundle, read_manifest(bundle)

    return make


def rendered(bundle: Path, manifest: Manifest, cores: int = 8, **options) -> triton_proto.ModelConfig:
    model = BackendModel.of(bundle, manifest, ServingOptions(**options), cores)
    return text_format.Parse(render_backend_config(model, cores), triton_proto.ModelConfig())


def write_card(bundle: Path, shapes: tuple[tuple[int, int], ...]) -> None:
    (bundle / "tensorrt").mkdir(exist_ok=True)
    path = card_path(bundle / "tensorrt" / "model_packed.plan")
    path.write_text(json.dumps(to_json(plan_card(shapes))))


@pytest.mark.parametrize(
    ("backend", "engine", "precision", "file"),
    [
        (Backend.ONNXRUNTIME, EngineName.ONNXRUNTIME, Precision.FP32, "model.onnx"),
        (Backend.OPENVINO, EngineName.OPENVINO, Precision.BF16, "model.onnx"),
        (Backend.TENSORRT, EngineName.TENSORRT, Precision.FP16, "model.plan"),
        (Backend.ONNXRUNTIME_CUDA, EngineName.ONNXRUNTIME_CUDA, Precision.FP16, "model.onnx"),
    ],
)
def test_every_backend_gets_complete_batches_of_any_shape_and_is_warmed_up(manifest, backend, engine, precision, file):
    bundle, read = manifest(engine, precision)
    write_card(bundle, SHAPES)
    config = rendered(bundle, read, backend=backend, streams=2)
    names = (config.name, config.backend, config.default_model_filename)
    assert names == ("encoder", backend.value.removesuffix("-cuda"), file)
    # OpenVINO's backend cannot batch rows of varying length, and there is nothing left to batch.
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        (name, triton_proto.TYPE_INT64, [-1, -1]) for name in NAMES
    ]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("embedding", triton_proto.TYPE_FP32, [-1, -1, 8])
    ]
    assert config.version_policy.latest.num_versions == 1
    warm = {tuple(warmup.inputs["segment_ids"].dims) for warmup in config.model_warmup}
    assert warm == set(SHAPES)
    assert all(warmup.batch_size == 1 and set(warmup.inputs) == set(NAMES) for warmup in config.model_warmup)
    assert all(each.zero_data for warmup in config.model_warmup for each in warmup.inputs.values())


@pytest.mark.parametrize(("streams", "cores"), [(1, 8), (2, 8), (3, 8), (8, 8)])
def test_onnxruntime_instances_share_the_cores(manifest, streams, cores):
    bundle, read = manifest(EngineName.ONNXRUNTIME, Precision.FP32)
    config = rendered(bundle, read, cores, backend=Backend.ONNXRUNTIME, streams=streams)
    (group,) = config.instance_group
    assert group.kind == triton_proto.ModelInstanceGroup.KIND_CPU
    assert group.count == streams, "without a count there would be two"
    threads = int(config.parameters["intra_op_thread_count"].string_value)
    assert threads >= 1
    assert streams * threads <= cores, "0 or more would give each instance every core"
    assert config.parameters["inter_op_thread_count"].string_value == "1"


def test_openvino_streams_are_its_instances_and_share_the_cores(manifest):
    bundle, read = manifest(EngineName.OPENVINO, Precision.BF16)
    config = rendered(bundle, read, 4, backend=Backend.OPENVINO)
    settings = {key: value.string_value for key, value in config.parameters.items()}
    assert settings == {"NUM_STREAMS": "4", "INFERENCE_NUM_THREADS": "4", "HINT_BF16": "YES"}
    assert config.instance_group[0].count == 4


def test_tensorrt_has_every_profile_and_a_cuda_graph_for_every_shape(manifest):
    bundle, read = manifest(EngineName.TENSORRT, Precision.FP16)
    write_card(bundle, SHAPES)
    config = rendered(bundle, read, backend=Backend.TENSORRT)
    (group,) = config.instance_group
    assert (group.kind, group.count) == (triton_proto.ModelInstanceGroup.KIND_GPU, 2)
    assert list(group.profile) == [str(number) for number in range(len(SHAPES))]
    assert config.optimization.cuda.graphs
    specs = config.optimization.cuda.graph_spec
    assert {tuple(spec.input["input_ids"].dim) for spec in specs} == set(SHAPES)
    assert all(spec.batch_size == 0 and set(spec.input) == set(NAMES) for spec in specs)
    assert not config.parameters
    write_card(bundle, SHAPES[:-1])
    with pytest.raises(EngineError, match=r"no static profile for rows \(16, 64\)"):
        rendered(bundle, read, backend=Backend.TENSORRT)


def test_onnxruntime_on_a_gpu_keeps_fp32_and_captures_nothing(manifest):
    bundle, read = manifest(EngineName.ONNXRUNTIME_CUDA, Precision.FP32)
    config = rendered(bundle, read, 1, backend=Backend.ONNXRUNTIME_CUDA)
    (group,) = config.instance_group
    assert (group.kind, group.count) == (triton_proto.ModelInstanceGroup.KIND_GPU, 2), "cores do not bound it"
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    assert not config.optimization.cuda.graphs
    assert not config.parameters


def test_options_that_a_backend_does_not_support_are_rejected(manifest):
    bundle, read = manifest(EngineName.OPENVINO, Precision.FP32, Precision.INT8)
    for precision, message in (("fp32", "no setting for fp32"), ("int8", "certificate is of the rewritten graph")):
        with pytest.raises(InputError, match=message):
            rendered(bundle, read, backend=Backend.OPENVINO, precision=precision)
    with pytest.raises(EngineError, match="the bundle has none"):
        rendered(bundle, read, backend=Backend.TENSORRT)
    with pytest.raises(InputError, match="runs engine openvino, not fake"):
        rendered(bundle, read, backend=Backend.OPENVINO, engine="fake")


def test_one_of_several_precisions_must_be_named(manifest):
    bundle, read = manifest(EngineName.ONNXRUNTIME, Precision.FP32, Precision.INT8)
    with pytest.raises(EngineError, match=r"the bundle has fp32, int8\. Name one"):
        rendered(bundle, read, backend=Backend.ONNXRUNTIME)
    config = rendered(bundle, read, backend=Backend.ONNXRUNTIME, precision="int8")
    assert config.backend == "onnxruntime"
    with pytest.raises(InputError, match="9 streams on 8 cores"):
        rendered(bundle, read, backend=Backend.ONNXRUNTIME, precision="int8", streams=9)


@pytest.mark.parametrize(
    ("pooling", "backend", "short"),
    [
        (Pooling.CLS, Backend.OPENVINO, [16, 32]),
        (Pooling.MEAN, Backend.OPENVINO, [16, 32, 48]),
        (Pooling.CLS, Backend.ONNXRUNTIME, [16, 32, 48]),
    ],
)
def test_openvino_runs_one_token_heads_in_lengths_that_it_gets_right(manifest, pooling, backend, short):
    _, made = manifest(EngineName.OPENVINO, Precision.BF16)
    changed = dataclasses.replace(made, encoder=dataclasses.replace(made.encoder, pooling=pooling))
    shape_set = packed_shape_set(changed, ServingOptions(backend=backend))
    assert [length for _, length in shape_set.shapes() if length < 64] == short
