"""Another encoder as a teacher: its vectors of a corpus, computed once and kept, fitted to the student's width."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from encoders.card import Card
from encoders.pooling import make_dense
from encoders.reference import Reference
from encoders.source import ResolvedEncoder, resolve
from encoders.write import write_layout
from evaluation.served import is_remote, is_served, open_served
from evaluation.vectors import Encode, encode_distinct
from mirror_runtime.bundle import (
    MANIFEST_FILE,
    Activation,
    Dense,
    hash_files,
    read_manifest,
    sha256_file,
    to_json,
)
from mirror_runtime.bundle import fingerprint as space_of
from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.folders import replace_file
from mirror_runtime.vectors import unit_rows
from training.checkpoint import fingerprint
from training.hardware import Hardware

FOLDER = "teachers"
"""In the user's cache folder: files of vectors. Any may be removed."""

KEPT_TEXTS = 4096
"""Texts of a file: all that a killed run loses. BERT-base encoded about 30 a second and core (2026-11-30, busy AMX)."""


def teacher_vectors(
    name: str, texts: Sequence[str], hardware: Hardware, on_progress: Callable[[int, int], None]
) -> torch.Tensor:
    """Encode texts with a teacher, or read the vectors of an earlier run with the same teacher and texts.

    Args:
        name: a folder or hub name of an encoder that records its pooling, which PyTorch runs in the run's precision;
            a bundle, BUNDLE:PRECISION, an endpoint or a Triton server, see `open_served`. Vectors of the last two are
            not kept, since what serves them may change.
        texts: distinct.
        hardware: processes share the texts.
        on_progress: called with the numbers of encoded texts, at least so many, and of all texts.

    Returns:
        float32 [texts, dim], unit length, on the CPU.

    Raises:
        MirrorError: the teacher cannot be loaded or reached.
    """
    identity, parts = _identity(name, hardware), []
    with ExitStack() as around:

        @functools.cache
        def teacher() -> Encode:  # not opened if all vectors are kept
            return _open(name, hardware, around)

        for start in range(0, len(texts), KEPT_TEXTS):
            part = texts[start : start + KEPT_TEXTS]

            def encode(own: Sequence[str], start: int = start) -> NDArray[np.float32]:
                found = encode_distinct(
                    teacher(), own, f"the teacher {name}", lambda done, _: on_progress(start + done, len(texts))
                )
                return np.stack([found[text] for text in own])

            parts.append(_part(encode, part, hardware, _cached(identity, part)))
    return torch.cat(parts)


def _part(encode: Encode, texts: Sequence[str], hardware: Hardware, path: Path | None) -> torch.Tensor:
    try:
        kept = load_file(path)["vectors"] if path and path.is_file() else None
    except Exception:  # a damaged file, whatever the library calls it
        kept = None
    if hardware.gather(torch.tensor([kept is not None])).all():
        assert kept is not None
        return torch.from_numpy(kept)
    most = -(-len(texts) // hardware.processes)
    own = [texts[i % len(texts)] for i in range(hardware.rank * most, (hardware.rank + 1) * most)]
    found = unit_rows(encode(own)).astype(np.float32)
    vectors = hardware.gather(torch.from_numpy(found))[: len(texts)].cpu()
    if path is not None and hardware.writes:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path, shared=True) as beside:
                save_file({"vectors": vectors.numpy()}, beside)
        except (OSError, InputError) as error:
            logging.getLogger(__name__).warning("the teacher's vectors are not kept: %s", error)
    return vectors


def load_teacher(name: str) -> tuple[Reference, str, Card]:
    """Load the PyTorch encoder behind a teacher's name, which gives its tokenizer, and name its vector space.

    Returns:
        The encoder; the fingerprint that its bundle has, or will have if it is exported as it is; and its card.

    Raises:
        MirrorError: it is behind a server, or cannot be loaded.
    """
    if is_remote(name):
        raise InputError(f"{name} is a server, which has no tokenizer to read: pass the encoder's folder or bundle")
    folder = name if not is_served(name) or Path(name).is_dir() else name.rpartition(":")[0]
    source = _resolve(folder)
    reference = Reference.load(source)
    if (Path(folder) / MANIFEST_FILE).is_file():
        return reference, read_manifest(Path(folder)).fingerprint, source.card
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer, dense = reference.model, reference.tokenizer, reference.dense
        write_layout(Path(scratch), model=model, tokenizer=tokenizer, spec=source.spec, dense=dense, card="")
        return reference, space_of(source.spec, hash_files(Path(scratch))), source.card


def fit_width(vectors: torch.Tensor, width: int) -> torch.Tensor:
    """Cut vectors to a width along the principal axes of their second moments, or fill them up with zeros.

    Filling changes no cosine. Cutting changes cosines the least of all linear maps, since the axes are not centred.
    """
    dim = vectors.shape[1]
    if dim <= width:
        return torch.nn.functional.pad(vectors, (0, width - dim))
    _, axes = torch.linalg.eigh(vectors.T @ vectors)  # ascending
    cut: torch.Tensor = vectors @ axes[:, -width:]
    return cut


def add_dense(reference: Reference, width: int, seed: int) -> Reference:
    """Put a dense layer to another width behind an encoder's pooling, with random orthogonal weights."""
    layers = reference.spec.dense
    before = layers[-1].out_features if layers else int(reference.model.config.hidden_size)  # without `truncate_dim`
    dense = Dense(in_features=before, out_features=width, bias=False, activation=Activation.IDENTITY)
    weight = torch.empty(width, before)
    nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(
        reference,
        spec=dataclasses.replace(reference.spec, dense=(*reference.spec.dense, dense), dim=width),
        dense=(*reference.dense, make_dense(dense, weight, None)),
    )


def _open(name: str, hardware: Hardware, around: ExitStack) -> Encode:
    if served := open_served(name, around):
        return served[0]
    reference = Reference.load(_resolve(name))
    around.enter_context(hardware.autocast())
    return reference.encode_unnormalized


def _resolve(name: str) -> ResolvedEncoder:
    try:
        return resolve(name)
    except BundleError as error:
        raise InputError(f"the teacher {name} must be an encoder that records its pooling: {error}") from error


def _identity(name: str, hardware: Hardware) -> list[str] | None:
    """Return everything that determines a teacher's vectors; None if it is not known."""
    if is_served(name):
        folders = [Path(name if Path(name).is_dir() else name.rpartition(":")[0])]
        parts = [name.removeprefix(str(folders[0]))]
    else:
        source = _resolve(name)
        folders = [source.folder, *source.dense]
        parts = [json.dumps(to_json(source.spec)), hardware.precision.value]
    if not all(folder.is_dir() for folder in folders):
        return None
    files = (file for folder in folders for file in sorted(folder.iterdir()))
    return parts + [f"{file.name} {sha256_file(file)}" for file in files if file.suffix in (".safetensors", ".json")]


def _cached(identity: list[str] | None, texts: Sequence[str]) -> Path | None:
    """Return the file of these texts' vectors; None if they are not kept."""
    root = cache_folder(AUTO_CACHE)
    if root is None or identity is None:
        return None
    return root / FOLDER / f"{fingerprint(part.encode() for part in [*identity, *texts])[:32]}.safetensors"
