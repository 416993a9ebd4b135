"""The model repositories of `triton_models/`, for all-MiniLM-L6-v2 on 8 cores and without its bundle.

`python -m tests.support.example_repositories` writes them anew.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from mirror_runtime.bundle import FORMAT_VERSION, EngineName, Manifest, Precision, TensorSpec
from mirror_runtime.triton.model.backend_model import (
    BackendModel,
    find_artifact,
    packed_shape_set,
    render_backend_config,
)
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.triton.repository.render import MODEL_SOURCE, render_config, render_warmup
from tests.support.fake_bundles import artifact, encoder_spec, plan_card
from tests.support.paths import ROOT

COMMITTED = ROOT / "triton_models"
CORES = 8
PRECISIONS = {
    Backend.ONNXRUNTIME: Precision.FP32,
    Backend.ONNXRUNTIME_CUDA: Precision.FP16,
    Backend.OPENVINO: Precision.BF16,
    Backend.TENSORRT: Precision.FP16,
}
EMBEDDING = TensorSpec(name="embedding", dtype="float32", shape=("rows", "length // 4", 384))

MINILM = Manifest(
    format_version=FORMAT_VERSION,
    created_by="tests",
    encoder=encoder_spec(base_model="sentence-transformers/all-MiniLM-L6-v2", max_tokens=256, dim=384),
    fingerprint="0123456789abcdef",
    files={},
    artifacts=tuple(
        artifact(EngineName(backend.value), precision, outputs=(EMBEDDING,))
        for backend, precision in PRECISIONS.items()
    ),
)


def example(backend: Backend) -> Mapping[str, bytes]:
    """Render the files of one repository."""
    options = ServingOptions(backend=backend)
    files = {"embed/1/model.py": MODEL_SOURCE.encode()}
    if backend is Backend.PYTHON:
        files |= {f"embed/warmup/{name}": content for name, content in render_warmup(MINILM).items()}
        return {**files, "embed/config.pbtxt": render_config(MINILM, options).encode()}
    chosen = find_artifact(MINILM, options)
    shapes = packed_shape_set(MINILM, options).shapes()
    streams = {Backend.ONNXRUNTIME: 1, Backend.OPENVINO: CORES}.get(backend, 2)
    card = plan_card(shapes) if backend is Backend.TENSORRT else None
    model = BackendModel(artifact=chosen, backend=backend, shapes=shapes, streams=streams, card=card)
    embed = ServingOptions(backend=backend, engine=backend.value, precision=chosen.precision.value, streams=streams)
    configs = {
        "embed/config.pbtxt": render_config(MINILM, embed).encode(),
        "encoder/config.pbtxt": render_backend_config(model, CORES).encode(),
    }
    return {**files, **configs}


def committed(backend: Backend) -> Mapping[str, bytes]:
    """Read the files of one committed repository."""
    folder = COMMITTED / backend.value
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of one repository."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    for each in Backend:
        shutil.rmtree(COMMITTED / each.value, ignore_errors=True)
        write(COMMITTED / each.value, example(each))
