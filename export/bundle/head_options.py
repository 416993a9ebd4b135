"""Extend an encoder's recorded head: whitening, fewer dimensions, another vector type."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from encoders.pooling import make_dense
from encoders.reference import Reference
from export.bundle.whitening import WHITENING_FILE, fit_whitening
from export.proof.proof_texts import parity_texts
from mirror_runtime.bundle import Activation, Dense, Ditto, VectorType, sha256_texts, write_json
from mirror_runtime.errors import InputError

CALIBRATION_TEXTS = 256
"""Short texts to measure the scale of int8 vectors on."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What is added after the recorded head, in this order.

    Attributes:
        whiten: texts to fit a whitening on; the vectors are then normalised.
        whiten_dim: directions that the whitening keeps; None for all.
        dim: number of leading components to keep (Matryoshka); None for all.
        vector_type: data type of the output; None for the recorded one.
    """

    whiten: tuple[str, ...] | None = None
    whiten_dim: int | None = None
    dim: int | None = None
    vector_type: VectorType | None = None

    def __post_init__(self) -> None:
        if self.whiten_dim is not None and self.whiten is None:
            raise InputError("--whiten-dim needs a whitening: pass --whiten CORPUS too")
        if self.dim is not None and self.dim < 1:
            raise InputError(f"--dim is {self.dim}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WhiteningRecord:
    """The content of `whitening.json`: the texts that a whitening was fitted on.

    Attributes:
        texts: number of texts.
        texts_sha256: hash of the texts, joined by newlines.
        dim: directions kept.
        variance: share of the corpus's variance in these directions.
    """

    texts: int
    texts_sha256: str
    dim: int
    variance: float


def parse_layers(option: str) -> tuple[int, ...]:
    """Parse layers from the command line: numbers with commas, negative from the end.

    Raises:
        InputError: a part is not a number.
    """
    try:
        return tuple(map(int, option.split(",")))
    except ValueError:
        raise InputError(f"--layers {option}: must be numbers with commas, such as --layers 1,-1") from None


def parse_ditto(option: str) -> Ditto:
    """Parse the attention head of Ditto, LAYER:HEAD.

    Raises:
        InputError: the option has another form.
    """
    layer, _, head = option.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise InputError(f"--ditto {option}: must be LAYER:HEAD, counted from 0, such as 0:9")
    return Ditto(layer=int(layer), head=int(head))


def extend_head(reference: Reference, options: HeadOptions) -> tuple[Reference, WhiteningRecord | None]:
    """Extend an encoder's head.

    Returns:
        The encoder with the new head, and the record of its whitening, if it has a new one.

    Raises:
        InputError: there are too few texts, the encoder has fewer components than requested, or its vectors are
            already rounded.
    """
    record = None
    if options.whiten is not None:
        reference, record = whiten(reference, options.whiten, options.whiten_dim)
    if options.dim is not None:
        if options.dim > reference.spec.dim:
            raise InputError(f"--dim is {options.dim}: the vectors have {reference.spec.dim} components")
        reference = _replace_spec(reference, dim=options.dim)
    kind = options.vector_type
    if kind is not None and kind is not reference.spec.vector_type:
        reference = _with_vector_type(reference, kind)
    return reference, record


def whiten(reference: Reference, texts: Sequence[str], dim: int | None = None) -> tuple[Reference, WhiteningRecord]:
    """Fit a whitening on texts and append it to the head as one dense layer, followed by normalisation.

    Raises:
        InputError: there are too few texts, or the encoder's vectors are already cut or rounded.
    """
    spec = reference.spec
    vectors = reference.encode_uncut(texts)
    width = vectors.shape[1]
    if spec.dim != width or spec.vector_type is not VectorType.FLOAT32:
        raise InputError(f"{spec.base_model} has cut or rounded vectors: whiten the encoder that it was exported from")
    fit = fit_whitening(vectors, dim or width)
    dense = Dense(in_features=width, out_features=len(fit.bias), bias=True, activation=Activation.IDENTITY)
    layer = make_dense(dense, torch.from_numpy(fit.weight), torch.from_numpy(fit.bias))
    whitened = dataclasses.replace(
        reference,
        spec=dataclasses.replace(spec, dense=(*spec.dense, dense), dim=len(fit.bias), normalize=True),
        dense=(*reference.dense, layer),
    )
    return whitened, WhiteningRecord(
        texts=len(texts), texts_sha256=sha256_texts(texts), dim=len(fit.bias), variance=round(fit.variance, 6)
    )


def write_record(record: WhiteningRecord, folder: Path) -> None:
    """Write the record of a whitening beside the encoder."""
    write_json(record, folder / WHITENING_FILE)


def _with_vector_type(reference: Reference, kind: VectorType) -> Reference:
    if reference.spec.vector_type is not VectorType.FLOAT32:
        raise InputError(
            f"{reference.spec.base_model} records {reference.spec.vector_type.value} vectors, which cannot become "
            f"{kind.value}: export the encoder that it was exported from"
        )
    scale = None
    if kind is VectorType.INT8:
        # The largest component of real text becomes 127: nothing is clipped, and rounding errors are below 0.4 % of it.
        largest = np.abs(reference.encode(parity_texts(short=CALIBRATION_TEXTS, medium=8, long=1))).max()
        scale = float(np.float32(largest / 127))
    return _replace_spec(reference, vector_type=kind, int8_scale=scale)


def _replace_spec(reference: Reference, **changes: object) -> Reference:
    return dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **changes))  # type: ignore[arg-type]
