"""Extend an encoder's recorded head: whitening, fewer dimensions, another vector type."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.pooling import make_dense
from encoders.reference import Reference
from export.proof.proof_texts import parity_texts
from mirror_runtime.bundle import Activation, Dense, Ditto, VectorType, sha256_texts
from mirror_runtime.errors import InputError

CALIBRATION_TEXTS = 256
"""Short texts to measure the scale of int8 vectors on."""

SMALLEST_SHARE = 1e-8
"""Share of the largest variance: a direction with less is noise, which dividing by its deviation would amplify."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What is added after the recorded head, in this order."""

    whiten: tuple[str, ...] | None = None  # texts to fit a whitening on; the vectors are then normalised
    whiten_dim: int | None = None  # directions that the whitening keeps; None for all
    dim: int | None = None  # number of leading components to keep (Matryoshka); None for all
    vector_type: VectorType | None = None  # None for the recorded one

    def __post_init__(self) -> None:
        if self.whiten_dim is not None and self.whiten is None:
            raise InputError("--whiten-dim needs a whitening: pass --whiten CORPUS too")


@dataclass(frozen=True, kw_only=True)
class WhiteningRecord:
    """The content of `whitening.json`: the texts that a whitening was fitted on."""

    texts: int
    texts_sha256: str  # of the texts, joined by newlines
    dim: int
    variance: float  # share of the corpus's variance in the kept directions


def parse_layers(option: str) -> tuple[int, ...]:
    """Parse layers from the command line: numbers with commas, negative from the end."""
    try:
        return tuple(map(int, option.split(",")))
    except ValueError:
        raise InputError(f"--layers {option}: must be numbers with commas, such as --layers 1,-1") from None


def parse_ditto(option: str) -> Ditto:
    """Parse the attention head of Ditto, LAYER:HEAD."""
    layer, _, head = option.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise InputError(f"--ditto {option}: must be LAYER:HEAD, counted from 0, such as 0:9")
    return Ditto(layer=int(layer), head=int(head))


def extend_head(reference: Reference, options: HeadOptions) -> tuple[Reference, WhiteningRecord | None]:
    """Extend an encoder's head; return it with the record of its whitening, if it has a new one.

    Raises:
        InputError: there are too few texts, the encoder has fewer components than requested, or its vectors are
            already rounded.
    """
    record = None
    if options.whiten is not None:
        reference, record = whiten(reference, options.whiten, options.whiten_dim)
        reference = _replace_spec(reference, twin_of=None)  # it has left the teacher's space
    if options.dim is not None:
        reference = _cut(reference, options.dim)
    kind = options.vector_type
    if kind is not None and kind is not reference.spec.vector_type:
        reference = _with_vector_type(reference, kind)
    return reference, record


def _cut(reference: Reference, dim: int) -> Reference:
    spec = reference.spec
    if dim > spec.dim:
        raise InputError(f"--dim is {dim}: the vectors have {spec.dim} components")
    if spec.trained_dims and dim not in (*spec.trained_dims, spec.dim):
        raise InputError(f"--dim is {dim}: {spec.base_model} was trained for {', '.join(map(str, spec.trained_dims))}")
    return _replace_spec(reference, dim=dim, trained_dims=tuple(one for one in spec.trained_dims if one < dim))


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
        # Whitened components and the states of earlier layers were not trained for.
        spec=dataclasses.replace(
            spec, dense=(*spec.dense, dense), dim=len(fit.bias), normalize=True, trained_dims=(), trained_depths=()
        ),
        dense=(*reference.dense, layer),
    )
    return whitened, WhiteningRecord(
        texts=len(texts), texts_sha256=sha256_texts(texts), dim=len(fit.bias), variance=round(fit.variance, 6)
    )


@dataclass(frozen=True)
class Whitening:
    """The linear layer y = weight x + bias."""

    weight: NDArray[np.float32]  # [dim, width]
    bias: NDArray[np.float32]  # [dim]
    variance: float  # share of the corpus's variance in the kept directions, 0 to 1


def fit_whitening(vectors: NDArray[np.float32], dim: int) -> Whitening:
    """Fit a BERT-whitening (Su et al. 2021) on vectors [n, width], pooled and not normalised.

    After it the vectors have mean 0 and covariance 1. It keeps the `dim` directions of largest variance: with mean m
    and covariance U diag(s) U^T, row i of the weight is U[:, i] / sqrt(s[i]) and the bias is -weight m.

    Raises:
        InputError: there are too few vectors, or they span fewer directions.
    """
    count, width = vectors.shape
    if not 1 <= dim <= width:
        raise InputError(f"--whiten-dim is {dim}: the vectors have {width} components, so it must be 1 to {width}")
    if count <= dim:
        raise InputError(
            f"{count} texts cannot determine {dim} directions: whiten on more text, or with a smaller --whiten-dim"
        )
    exact = vectors.astype(np.float64)
    mean = exact.mean(0)
    centred = exact - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / count)  # ascending
    kept = variances[::-1][:dim]
    spanned = int((kept > SMALLEST_SHARE * variances[-1]).sum())
    if spanned < dim:
        raise InputError(
            f"the texts' vectors span only {spanned} directions: whiten on more varied text, or pass "
            f"--whiten-dim {spanned} or less"
        )
    weight = (directions[:, ::-1][:, :dim] / np.sqrt(kept)).T
    return Whitening(
        weight=weight.astype(np.float32),
        bias=(-weight @ mean).astype(np.float32),
        variance=float(kept.sum() / variances.sum()),
    )


def _with_vector_type(reference: Reference, kind: VectorType) -> Reference:
    if reference.spec.vector_type is not VectorType.FLOAT32:
        raise InputError(
            f"{reference.spec.base_model} records {reference.spec.vector_type.value} vectors, which cannot become "
            f"{kind.value}: export the encoder that it was exported from"
        )
    scale, trained = None, reference.spec.trained_dims
    if kind is VectorType.BINARY:
        trained = tuple(dim for dim in trained if dim % 8 == 0)  # whole bytes
    if kind is VectorType.INT8:
        # The largest component of real text becomes 127: nothing is clipped, and rounding errors are below 0.4 % of it.
        largest = np.abs(reference.encode(parity_texts(short=CALIBRATION_TEXTS, medium=8, long=1))).max()
        scale = float(np.float32(largest / 127))
    return _replace_spec(reference, vector_type=kind, int8_scale=scale, trained_dims=trained)


def _replace_spec(reference: Reference, **changes: object) -> Reference:
    return dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **changes))  # type: ignore[arg-type]
