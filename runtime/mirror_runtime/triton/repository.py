"""Render a Triton model repository from a bundle's manifest."""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mirror_runtime.bundle import EngineName, Layout, Manifest, VectorType, check_files, read_manifest
from mirror_runtime.errors import EngineError, InputError
from mirror_runtime.tokens import LongTexts
from mirror_runtime.vectors import width_of

MODEL_NAME = "embed"
CONTAINER_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"

DATA_TYPES: Mapping[VectorType, str] = MappingProxyType(
    {
        VectorType.FLOAT32: "TYPE_FP32",
        VectorType.FLOAT16: "TYPE_FP16",
        VectorType.INT8: "TYPE_INT8",
        VectorType.BINARY: "TYPE_UINT8",
    }
)
"""What Triton calls the numbers of a vector."""

MODEL_SOURCE = '''\
"""What Triton loads: the model itself ships in the mirror_runtime package."""

from mirror_runtime.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_CONFIG = """\
# Rendered from a bundle's manifest by mirror_runtime.triton.repository: change that file, not this one.
name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
input [
  {{ name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }}
]
output [
  {{ name: "EMBEDDING" data_type: {data_type} dims: [ {width} ] }},
  {{ name: "TOKENS" data_type: TYPE_INT32 dims: [ 1 ] }},
  {{ name: "TRUNCATED" data_type: TYPE_BOOL dims: [ 1 ] }}
]
# Empty on purpose: a queue size, a timeout or a priority makes Triton stall requests for up to 500 ms.
dynamic_batching {{ }}
instance_group [
  {{ kind: KIND_CPU count: 1 }}
]
model_warmup [
  {{
    name: "one short text"
    batch_size: 1
    inputs {{ key: "TEXT" value: {{ data_type: TYPE_STRING dims: [ 1 ] input_data_file: "short" }} }}
  }},
  {{
    name: "one long text"
    batch_size: 1
    inputs {{ key: "TEXT" value: {{ data_type: TYPE_STRING dims: [ 1 ] input_data_file: "long" }} }}
  }}
]
parameters [
{parameters}
]
"""


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How a bundle is served.

    Attributes:
        engine: an engine's name, or "auto".
        precision: a precision, or "auto".
        streams: how many executions run side by side; None leaves it to the engine.
        long_texts: what happens to texts over the encoder's `max_tokens`.
        max_batch_size: most texts that Triton puts into one execution.
    """

    engine: str = "auto"
    precision: str = "auto"
    streams: int | None = None
    long_texts: LongTexts = LongTexts.TRUNCATE
    max_batch_size: int = 256

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise InputError(f"max_batch_size is {self.max_batch_size}: it must be at least 1")
        if self.streams is not None and self.streams < 1:
            raise InputError(f"streams is {self.streams}: it must be at least 1")


def render_config(manifest: Manifest, options: ServingOptions, *, bundle: str = "bundle") -> str:
    """Give the text of `config.pbtxt`.

    Args:
        manifest: the bundle's.
        options: how to serve it.
        bundle: the bundle's folder, absolute or relative to the version folder `embed/1`.
    """
    parameters = {
        "bundle": bundle,
        "engine": options.engine,
        "precision": options.precision,
        "streams": "auto" if options.streams is None else str(options.streams),
        "long_texts": options.long_texts.value,
        "fingerprint": manifest.fingerprint,
    }
    return _CONFIG.format(
        name=MODEL_NAME,
        max_batch_size=options.max_batch_size,
        data_type=DATA_TYPES[manifest.encoder.vector_type],
        width=width_of(manifest.encoder),
        parameters=",\n".join(
            f'  {{ key: "{key}" value: {{ string_value: "{_quoted(value)}" }} }}' for key, value in parameters.items()
        ),
    )


def render_warmup(manifest: Manifest) -> dict[str, bytes]:
    """Give the warm-up files by name: real text, since Triton's own random strings come out empty.

    The long text stays far below `max_tokens`, so that it passes whatever the policy for long texts is.
    """
    long = " ".join(["the"] * max(1, manifest.encoder.max_tokens // 4))
    return {"short": _length_prefixed("The house is warm."), "long": _length_prefixed(long)}


def write_model(manifest: Manifest, folder: Path, options: ServingOptions, *, bundle: str = "bundle") -> None:
    """Write the model's folder, all but the bundle, into an existing empty `folder`."""
    (folder / "1").mkdir()
    (folder / "warmup").mkdir()
    (folder / "1" / "model.py").write_text(MODEL_SOURCE, encoding="utf-8")
    for name, content in render_warmup(manifest).items():
        (folder / "warmup" / name).write_bytes(content)
    (folder / "config.pbtxt").write_text(render_config(manifest, options, bundle=bundle), encoding="utf-8")


def write_repository(
    bundle: Path, repository: Path, options: ServingOptions, *, link: bool = False, overwrite: bool = False
) -> Path:
    """Write `repository/embed`, which holds its own copy of the bundle and can be moved anywhere.

    The folder appears whole or not at all.

    Args:
        bundle: what to serve; its files are compared with the manifest's hashes first.
        repository: the model repository; made where absent.
        options: how to serve it.
        link: share the bundle's files by hard links where the file system allows it.
        overwrite: replace a model folder that is there already.

    Returns:
        The model's folder.

    Raises:
        BundleError: `bundle` is no bundle, or a file of it is missing or changed.
        EngineError: the bundle has no artifact for the engine and precision asked for.
        InputError: the model's folder exists and `overwrite` is not set, or cannot be written.
    """
    manifest = read_manifest(bundle)
    _check_choice(manifest, options)
    check_files(bundle, manifest)
    target = repository / MODEL_NAME
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists: choose another --output, or pass --overwrite")
    try:
        repository.mkdir(parents=True, exist_ok=True)
        # Beside the repository's models would be a model to Triton if a kill left it there: keep it out of the way.
        scratch = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=repository.resolve().parent))
    except OSError as error:
        raise InputError(f"{repository} cannot be written: {error.strerror}") from error
    try:
        fresh = scratch / MODEL_NAME
        fresh.mkdir()
        write_model(manifest, fresh, options)
        shutil.copytree(bundle, fresh / "1" / "bundle", copy_function=_link_or_copy if link else shutil.copy2)
        if target.exists():
            os.replace(target, scratch / "replaced")
        os.replace(fresh, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch)
    return target


def write_temporary_repository(bundle: Path, repository: Path, options: ServingOptions) -> None:
    """Write a repository that refers to the bundle where it lies instead of copying it.

    Raises:
        BundleError: `bundle` is no bundle.
    """
    manifest = read_manifest(bundle)
    folder = repository / MODEL_NAME
    folder.mkdir()
    write_model(manifest, folder, options, bundle=str(bundle.resolve()))


def container_command(repository: Path | str, source: Path | str, *, engine: str = "auto") -> str:
    """Give the one shell command that serves a model repository in NVIDIA's container.

    The sources are mounted read-only and copied inside, because building a package writes beside its sources.

    Args:
        repository: the model repository on the host.
        source: a clone of this project on the host.
        engine: which engine's packages to install; "auto" installs both CPU engines.
    """
    extras = {EngineName.ONNXRUNTIME.value: "cpu", EngineName.OPENVINO.value: "openvino"}.get(engine, "cpu,openvino")
    inside = (
        "mkdir /tmp/mirror && cp -r /src/pyproject.toml /src/README.md /src/LICENSE /src/runtime /tmp/mirror"
        f" && pip install --quiet '/tmp/mirror[{extras}]'"
        " && exec tritonserver --model-repository=/models --model-control-mode=none --disable-auto-complete-config"
    )
    ports = " ".join(f"-p 127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002))
    return (
        f"docker run --rm --shm-size=1g {ports} -e PIP_BREAK_SYSTEM_PACKAGES=1"
        f" -v {shlex.quote(f'{repository}:/models:ro')} -v {shlex.quote(f'{source}:/src:ro')}"
        f' {CONTAINER_IMAGE} sh -c "{inside}"'
    )


def _check_choice(manifest: Manifest, options: ServingOptions) -> None:
    """See that what is asked for is in the bundle; whether it runs is for the machine that will serve to say."""
    if options.engine == EngineName.FAKE.value:
        return
    packed = [(a.engine.value, a.precision.value) for a in manifest.artifacts if a.layout is Layout.PACKED]
    if not any(options.engine in ("auto", e) and options.precision in ("auto", p) for e, p in packed):
        proven = ", ".join(f"{e} {p}" for e, p in packed) or "none"
        raise EngineError(
            f"the bundle has no packed artifact for engine {options.engine}, precision {options.precision}; "
            f"it has {proven}. Ask for one of these or export it"
        )


def _length_prefixed(text: str) -> bytes:
    """Encode one element of a BYTES tensor: its length as 4 little-endian bytes, then the bytes."""
    raw = text.encode("utf-8")
    return struct.pack("<I", len(raw)) + raw


def _quoted(text: str) -> str:
    """Escape a text for a protobuf text-format string in double quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links: --link promises sharing only where possible
        shutil.copy2(source, target)
