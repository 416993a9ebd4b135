"""What the caller asks of a head on top of what the encoder records: whitening, cut, vector type."""

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


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What is added behind the recorded head, in this order.

    Attributes:
        whiten: texts to fit a whitening on; the vectors are then normalised.
        whiten_dim: directions that it keeps; None keeps all.
        dim: components to keep, the first ones (Matryoshka).
        vector_type: of the output.
    """

    whiten: tuple[str, ...] | None = None
    whiten_dim: int | None = None
    dim: int | None = None
    vector_type: VectorType | None = None

    def __post_init__(self) -> None:
        if self.whiten_dim is not None and self.whiten is None:
            raise InputError("--whiten-dim says how many directions whitening keeps: give --whiten CORPUS with it")
        if self.dim is not None and self.dim < 1:
            raise InputError(f"--dim is {self.dim}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The content of `whitening.json`: what a whitening was fitted on.

    Attributes:
        texts: how many.
        texts_sha256: hash of the texts, joined by newlines.
        dim: directions kept.
        variance: share of the corpus's variance that they hold.
    """

    texts: int
    texts_sha256: str
    dim: int
    variance: float


def parse_layers(word: str) -> tuple[int, ...]:
    """Read layers as they are written on the command line: numbers with commas, negative from the end.

    Raises:
        InputError: a part is no number.
    """
    try:
        return tuple(map(int, word.split(",")))
    except ValueError:
        raise InputError(f"--layers {word}: give numbers with commas, such as --layers 1,-1") from None


def parse_ditto(word: str) -> Ditto:
    """Read the attention head of Ditto as LAYER:HEAD.

    Raises:
        InputError: it is something else.
    """
    layer, _, head = word.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise InputError(f"--ditto {word}: give LAYER:HEAD from 0, such as 0:9")
    return Ditto(layer=int(layer), head=int(head))


def add(reference: Reference, additions: HeadOptions) -> tuple[Reference, Fitted | None]:
    """Extend an encoder's head.

    Returns:
        The encoder with the new head, and what its whitening was fitted on, if it got one.

    Raises:
        InputError: the texts do not suffice, the encoder has fewer components than asked for, or its vectors are
            rounded already.
    """
    fitted = None
    if additions.whiten is not None:
        reference, fitted = whiten(reference, additions.whiten, additions.whiten_dim)
    if additions.dim is not None:
        if additions.dim > reference.spec.dim:
            raise InputError(f"--dim is {additions.dim}: the vectors have {reference.spec.dim} components")
        reference = _replaced(reference, dim=additions.dim)
    kind = additions.vector_type
    if kind is not None and kind is not reference.spec.vector_type:
        reference = _typed(reference, kind)
    return reference, fitted


def whiten(reference: Reference, texts: Sequence[str], dim: int | None = None) -> tuple[Reference, Fitted]:
    """Fit a whitening on texts and put it behind the head as one dense layer, followed by normalisation.

    Raises:
        InputError: the texts do not suffice, or the encoder's vectors are cut or rounded already.
    """
    spec = reference.spec
    vectors = reference.encode_uncut(texts)
    width = vectors.shape[1]
    if spec.dim != width or spec.vector_type is not VectorType.FLOAT32:
        raise InputError(f"{spec.base_model} gives cut or rounded vectors: whiten the encoder that it was made from")
    fit = fit_whitening(vectors, dim or width)
    described = Dense(in_features=width, out_features=len(fit.bias), bias=True, activation=Activation.IDENTITY)
    layer = make_dense(described, torch.from_numpy(fit.weight), torch.from_numpy(fit.bias))
    whitened = dataclasses.replace(
        reference,
        spec=dataclasses.replace(spec, dense=(*spec.dense, described), dim=len(fit.bias), normalize=True),
        dense=(*reference.dense, layer),
    )
    return whitened, Fitted(
        texts=len(texts), texts_sha256=sha256_texts(texts), dim=len(fit.bias), variance=round(fit.variance, 6)
    )


def write_fitted(fitted: Fitted, folder: Path) -> None:
    """Write what a whitening was fitted on beside the encoder."""
    write_json(fitted, folder / WHITENING_FILE)


def _typed(reference: Reference, kind: VectorType) -> Reference:
    if reference.spec.vector_type is not VectorType.FLOAT32:
        raise InputError(
            f"{reference.spec.base_model} records {reference.spec.vector_type.value} vectors, which cannot become "
            f"{kind.value}: export the encoder it was made from"
        )
    scale = None
    if kind is VectorType.INT8:
        # The largest component of real text falls on 127: nothing is clipped, and rounding stays below 0.4 % of it.
        largest = np.abs(reference.encode(parity_texts(short=CALIBRATION_TEXTS, medium=8, long=1))).max()
        scale = float(np.float32(largest / 127))
    return _replaced(reference, vector_type=kind, int8_scale=scale)


def _replaced(reference: Reference, **changes: object) -> Reference:
    return dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **changes))  # type: ignore[arg-type]
