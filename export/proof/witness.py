"""An independent witness: its owner's library reads the same folder, and its vectors are compared with the reference.

That is sentence-transformers, and model2vec for its own folders.

A certificate compares an artifact with our own reading of the encoder's folder. What that reading gets wrong, the
certificate cannot see: only another reader can.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders.reference import Reference
from export.bundle.card import Testimony
from export.proof.proof_texts import CANARIES, EDGE_CASES, parity_texts
from mirror_runtime.pairs import items_for
from mirror_runtime.tokenizer import Item
from mirror_runtime.vectors import agreement, quoted

PACKAGES = {"model2vec": "model2vec"}
"""The libraries that read a family, where it is not sentence-transformers."""

FLOOR = 0.99999
"""Both compute in fp32 with the same weights: 1e-6 is rounding, and one other token is 1e-3."""

CLOSE = 1e-4
"""Largest relative difference in length: a missing normalisation keeps every cosine."""


def library(family: str) -> str:
    """Return the name of the package that reads published folders of a family."""
    return PACKAGES.get(family, "sentence-transformers")


def available(family: str) -> bool:
    """Return whether the package that reads a family is installed."""
    return find_spec(library(family).replace("-", "_")) is not None


def question(folder: Path, reference: Reference, texts: Sequence[str] = ()) -> Testimony | None:
    """Compare the reference's vectors with those that the owner's library computes from the same folder.

    Args:
        folder: as its owner published it.
        reference: our own reading of it, without any override of what the folder records.
        texts: to compare; by default four dozen ragged ones and the edge cases.

    Returns:
        None where a static encoder's limit leaves no text to compare.
    """
    texts = tuple(texts) or (*CANARIES, *EDGE_CASES, *parity_texts(24, 8, 2))
    items: Sequence[Item] = items_for(reference.spec, texts)
    package, limit = library(reference.spec.family), reference.spec.max_tokens
    if reference.is_static:  # sentence-transformers cuts nothing, and model2vec no text with as few characters
        counts = map(len, reference.tokenize(texts))
        short = (
            count < limit and (package != "model2vec" or len(text) <= limit)
            for text, count in zip(texts, counts, strict=True)
        )
        items = texts = tuple(compress(texts, short))
    version = f"{package} {metadata.version(package)}"
    ours = reference.encode(items)
    if not ours.any():  # no text that nobody cuts has tokens: zeros would agree with anybody's
        return None
    try:
        theirs = np.asarray(_encode(package, folder, items, pairs=reference.spec.scores_pairs), np.float32)
    except Exception as error:  # whatever it raises about a folder is its opinion of the folder
        problem = f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Testimony(version=version, texts=len(texts), min_cosine=0.0, problem=problem)
    if theirs.shape != ours.shape:
        problem = f"its vectors have {theirs.shape[1]} components and ours {ours.shape[1]}"
        return Testimony(version=version, texts=len(texts), min_cosine=0.0, problem=problem)
    lengths = [np.linalg.norm(vectors, axis=1) for vectors in (ours, theirs)]
    similar = agreement(ours, theirs)
    # A score may be near 0, and its agreement covers its size.
    far = (ours.shape[1] > 1) & (np.abs(lengths[0] - lengths[1]) > CLOSE * np.maximum(*lengths))
    worst = int(similar.argmin())
    problem = ""
    if not similar[worst] >= FLOOR:
        problem = f"cosine {similar[worst]:.6f} for {quoted(items[worst])}"
    elif far.any():
        at = int(far.argmax())
        problem = f"length {lengths[1][at]:.4f} where ours is {lengths[0][at]:.4f} for {texts[at][:60]!r}"
    return Testimony(version=version, texts=len(texts), min_cosine=float(similar[worst]), problem=problem)


def _encode(package: str, folder: Path, texts: Sequence[Item], *, pairs: bool) -> Any:
    # Imported only here: it takes two seconds, and exports of other folders do not need it.
    if package == "model2vec":
        return import_module(package).StaticModel.from_pretrained(str(folder)).encode(list(texts))
    if pairs:
        cross = import_module("sentence_transformers").CrossEncoder(str(folder), device="cpu", local_files_only=True)
        logits = cross.predict(list(texts), batch_size=1, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return np.reshape(logits, (-1, 1))
    peer = import_module("sentence_transformers").SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # One text a batch: where it pads on the left, its own vectors depend on their neighbours.
    return peer.encode(list(texts), batch_size=1, show_progress_bar=False)
