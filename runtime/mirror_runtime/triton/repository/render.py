"""Render a Triton model repository from a bundle's manifest."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mirror_runtime.bundle import MANIFEST_FILE, TOKENIZER_FILE, Manifest, check_files, read_manifest
from mirror_runtime.client.protocol import DATA_TYPES, MODEL_NAME
from mirror_runtime.encoded import check_text_vectors
from mirror_runtime.errors import InputError
from mirror_runtime.folders import os_error_message
from mirror_runtime.host import usable_cores
from mirror_runtime.selection import choose
from mirror_runtime.tokenizer import SPECIAL_TOKENS_FILE
from mirror_runtime.triton.model.backend_model import ENCODER_NAME, BackendModel, render_backend_config
from mirror_runtime.triton.model.request_options import check_trained
from mirror_runtime.triton.repository.options import Backend, ServingOptions
from mirror_runtime.vectors import width_of

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
  {{ name: "TRUNCATED" data_type: TYPE_BOOL dims: [ 1 ] }},
  {{ name: "FINGERPRINT" data_type: TYPE_STRING dims: [ 1 ] }}
]
version_policy {{ latest {{ num_versions: 1 }} }}
# Empty on purpose: a queue size, a timeout or a priority makes Triton stall requests for up to 500 ms. What is too much
# the model refuses itself.
dynamic_batching {{ }}
# Off on purpose: its key leaves request parameters out, and server 2.51 keeps errors in it, as empty answers.
response_cache {{ enable: false }}
# Each instance is a process with an engine of its own, bound to its share of the cores.
instance_group [
  {{ kind: KIND_CPU count: {instances} }}
]
{warmup}parameters [
{parameters}
]
"""


_WARMUP = """\
model_warmup [
  {
    name: "one short text"
    batch_size: 1
    inputs { key: "TEXT" value: { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "short" } }
  },
  {
    name: "one long text"
    batch_size: 1
    inputs { key: "TEXT" value: { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "long" } }
  }
]
"""


def render_config(manifest: Manifest, options: ServingOptions, *, bundle: str = "bundle") -> str:
    """Render `config.pbtxt`; `bundle` is a path, absolute or relative to the version folder `embed/1`.

    Raises:
        InputError: a trained cut is not one of the encoder's, or the encoder has no vector of a text.
    """
    check_text_vectors(manifest.encoder)
    options = replace(options, dimensions=options.dimensions or manifest.encoder.trained_dims)
    check_trained(options.dimensions, manifest.encoder)
    parameters = {
        "bundle": bundle,
        **options.to_parameters(),
        "fingerprint": manifest.fingerprint,
        # For services in front of the model, such as the gateway.
        "base_model": manifest.encoder.base_model,
        "max_tokens": str(manifest.encoder.max_tokens),
        "normalize": str(manifest.encoder.normalize).lower(),
        "pooling": manifest.encoder.pooling.value,
    }
    return _CONFIG.format(
        name=MODEL_NAME,
        max_batch_size=options.max_batch_size,
        data_type=DATA_TYPES[manifest.encoder.vector_type],
        width=width_of(manifest.encoder),
        instances=options.instances,
        # With a second model there is none: models cannot reach each other before the server is ready, which waits for
        # the warm-up. A reranker's texts need a query, which is a parameter, and warm-ups have none.
        warmup=_WARMUP if options.backend is Backend.PYTHON and not manifest.encoder.scores_pairs else "",
        parameters=",\n".join(
            # JSON escapes a string as protobuf's text format does.
            f'  {{ key: "{key}" value: {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}'
            for key, value in parameters.items()
        ),
    )


def render_warmup(manifest: Manifest) -> dict[str, bytes]:
    """Return the contents of the warm-up files by name: real text, because Triton's random strings are empty.

    The long text stays far below `max_tokens`, so that every policy for long texts accepts it.
    """
    long = " ".join(["the"] * max(1, manifest.encoder.max_tokens // 4))
    return {"short": _length_prefixed("The house is warm."), "long": _length_prefixed(long)}


def write_model(manifest: Manifest, folder: Path, options: ServingOptions, *, bundle: str = "bundle") -> None:
    """Write the model's files, without the bundle, into an existing empty `folder`."""
    (folder / "1").mkdir()
    (folder / "warmup").mkdir()
    (folder / "1" / "model.py").write_text(MODEL_SOURCE, encoding="utf-8")
    for name, content in render_warmup(manifest).items():
        (folder / "warmup" / name).write_bytes(content)
    (folder / "config.pbtxt").write_text(render_config(manifest, options, bundle=bundle), encoding="utf-8")


def write_repository(
    bundle: Path,
    repository: Path,
    options: ServingOptions,
    *,
    link: bool = False,
    overwrite: bool = False,
    cores: int | None = None,
) -> Path:
    """Write `repository/embed` with its own copy of the bundle, and return that folder, which can be moved anywhere.

    For one of Triton's own backends, also write `repository/encoder` with the graph; then `embed` contains only the
    files for tokenising. Each folder appears complete or not at all.

    Args:
        bundle: the bundle to serve; its files are checked against the manifest's hashes first.
        repository: the model repository; created if missing.
        options: how to serve it.
        link: share the bundle's files by hard links if the file system allows it.
        overwrite: replace existing model folders.
        cores: of the machine that will serve, for Triton's own backends; None for this machine's.
    """
    manifest = read_manifest(bundle)
    cores = cores or usable_cores()
    encoder = None
    if options.backend is Backend.PYTHON:
        choose(manifest, options.engine, options.precision, elsewhere=True)
    else:
        encoder = BackendModel.of(bundle, manifest, options, cores)
        chosen = encoder.artifact
        options = replace(
            options, engine=chosen.engine.value, precision=chosen.precision.value, streams=encoder.streams
        )
    check_files(bundle, manifest)
    target = repository / MODEL_NAME
    present = [repository / name for name in (ENCODER_NAME, MODEL_NAME) if (repository / name).exists()]
    if present and not overwrite:
        raise InputError(f"{present[-1]} exists: choose another --output, or pass --overwrite")
    try:
        repository.mkdir(parents=True, exist_ok=True)
        # Not inside the repository, where Triton would load the folder as a model if a kill left it behind.
        scratch = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=repository.resolve().parent))
    except OSError as error:
        raise InputError(f"{repository} cannot be written: {error.strerror}") from error
    try:
        fresh = scratch / MODEL_NAME
        fresh.mkdir()
        write_model(manifest, fresh, options)
        copy = link_or_copy if link else shutil.copy2
        if encoder is None:
            shutil.copytree(bundle, fresh / "1" / "bundle", copy_function=copy)
        else:
            _copy_for_tokenizing(bundle, fresh / "1" / "bundle")
            _write_encoder(bundle, scratch / ENCODER_NAME, encoder, cores, copy)
        _put_in_place(scratch, repository)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {os_error_message(error)}") from error
    finally:
        shutil.rmtree(scratch)
    return target


def write_temporary_repository(bundle: Path, repository: Path, options: ServingOptions) -> None:
    """Write a repository that refers to the bundle in its place instead of copying it."""
    if options.backend is not Backend.PYTHON:
        raise InputError(f"the backend {options.backend.value} runs only in NVIDIA's container: choose python")
    manifest = read_manifest(bundle)
    folder = repository / MODEL_NAME
    folder.mkdir()
    write_model(manifest, folder, options, bundle=str(bundle.resolve()))


def _put_in_place(scratch: Path, repository: Path) -> None:
    """Replace the models by the new ones, and remove an `encoder` that is no longer used."""
    for name in (ENCODER_NAME, MODEL_NAME):
        if (repository / name).exists():
            os.replace(repository / name, scratch / f"replaced-{name}")
        if (scratch / name).exists():
            os.replace(scratch / name, repository / name)


def _copy_for_tokenizing(bundle: Path, folder: Path) -> None:
    """Copy the files of a bundle that `embed` needs when the graph runs in another model."""
    folder.mkdir()
    for name in (MANIFEST_FILE, TOKENIZER_FILE, SPECIAL_TOKENS_FILE):
        if (bundle / name).exists():  # the last one exists only if the pooling reads padding
            shutil.copy2(bundle / name, folder)


def _write_encoder(
    bundle: Path, folder: Path, encoder: BackendModel, cores: int, copy: Callable[[str, str], object]
) -> None:
    (folder / "1").mkdir(parents=True)
    graph = bundle / encoder.artifact.path
    copy(str(graph), str(folder / "1" / encoder.file))
    weights = graph.with_name(f"{graph.name}_data")  # large graphs refer to their weights by this name
    if weights.exists():
        copy(str(weights), str(folder / "1" / weights.name))
    (folder / "config.pbtxt").write_text(render_backend_config(encoder, cores), encoding="utf-8")


def _length_prefixed(text: str) -> bytes:
    """Encode one element of a BYTES tensor: its length as 4 little-endian bytes, then the bytes."""
    raw = text.encode("utf-8")
    return struct.pack("<I", len(raw)) + raw


def link_or_copy(source: str, target: str) -> None:
    """Copy a file for `shutil.copytree`, by a hard link if possible."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
