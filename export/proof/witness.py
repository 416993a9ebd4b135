"""An independent witness: sentence-transformers reads the same folder, and its vectors are compared with the reference.

A certificate compares an artifact with our own reading of the encoder's folder. What that reading gets wrong, the
certificate cannot see: only another reader can.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from encoders.reference import Reference
from export.bundle.card import Testimony
from export.proof.proof_texts import CANARIES, EDGE_CASES, parity_texts
from mirror_runtime.vectors import cosines

PACKAGE = "sentence_transformers"
FLOOR = 0.99999
"""Both compute in fp32 with the same weights: 1e-6 is rounding, and one other token is 1e-3."""

CLOSE = 1e-4
"""Largest relative difference in length: a missing normalisation keeps every cosine."""


def available() -> bool:
    """Return whether sentence-transformers is installed."""
    return find_spec(PACKAGE) is not None


def question(folder: Path, reference: Reference, texts: Sequence[str] = ()) -> Testimony:
    """Compare the reference's vectors with those that sentence-transformers computes from the same folder.

    Args:
        folder: with `modules.json`, as its owner published it.
        reference: our own reading of it, without any override of what the folder records.
        texts: to compare; by default four dozen ragged ones and the edge cases.
    """
    # Imported only here: it takes two seconds, and exports of other folders do not need it.
    from sentence_transformers import SentenceTransformer

    texts = tuple(texts) or (*CANARIES, *EDGE_CASES, *parity_texts(24, 8, 2))
    version = metadata.version("sentence-transformers")
    ours = reference.encode(texts)
    try:
        peer: Any = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        # One text a batch: where it pads on the left, its own vectors depend on their neighbours.
        theirs = np.asarray(peer.encode(list(texts), batch_size=1, show_progress_bar=False), np.float32)
    except Exception as error:  # whatever it raises about a folder is its opinion of the folder
        problem = f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Testimony(version=version, texts=len(texts), min_cosine=0.0, problem=problem)
    if theirs.shape != ours.shape:
        problem = f"its vectors have {theirs.shape[1]} components and ours {ours.shape[1]}"
        return Testimony(version=version, texts=len(texts), min_cosine=0.0, problem=problem)
    lengths = [np.linalg.norm(vectors, axis=1) for vectors in (ours, theirs)]
    similar = np.where((lengths[0] == 0) & (lengths[1] == 0), 1.0, cosines(ours, theirs))
    far = np.abs(lengths[0] - lengths[1]) > CLOSE * np.maximum(*lengths)
    worst = int(similar.argmin())
    problem = ""
    if not similar[worst] >= FLOOR:
        problem = f"cosine {similar[worst]:.6f} for {texts[worst][:60]!r}"
    elif far.any():
        at = int(far.argmax())
        problem = f"length {lengths[1][at]:.4f} where ours is {lengths[0][at]:.4f} for {texts[at][:60]!r}"
    return Testimony(version=version, texts=len(texts), min_cosine=float(similar[worst]), problem=problem)
