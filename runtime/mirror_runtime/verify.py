"""Recompute a bundle's proof on this machine: file hashes first, then the canaries through each engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirror_runtime.bundle import Artifact, Layout, check_files, read_canaries, read_manifest
from mirror_runtime.encoder import Encoder
from mirror_runtime.engines import installed
from mirror_runtime.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One artifact's canaries on this machine.

    Attributes:
        artifact: what was run.
        min_cosine: the worst canary against its stored vector; None where it could not be run.
        problem: why it could not be run or failed; empty where it passed.
        ran: whether the engine produced vectors.
    """

    artifact: Artifact
    min_cosine: float | None
    problem: str
    ran: bool


def verify(bundle: Path) -> tuple[Check, ...]:
    """Check every file's hash, then run the canaries through every packed artifact.

    Returns:
        A result for each packed artifact. One whose engine is not installed, or whose precision this CPU lacks, has
        `ran` False and the reason in `problem`.

    Raises:
        BundleError: a file is missing or differs from the manifest: the bundle is corrupted.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    return tuple(_check(bundle, a) for a in manifest.artifacts if a.layout is Layout.PACKED)


def _check(bundle: Path, artifact: Artifact) -> Check:
    if not installed(artifact.engine):
        return Check(artifact=artifact, min_cosine=None, problem=f"{artifact.engine.value} is not installed", ran=False)
    canaries = read_canaries(bundle)
    try:
        with Encoder.load(bundle, engine=artifact.engine.value, precision=artifact.precision.value) as encoder:
            vectors = encoder.encode(canary.text for canary in canaries).astype(np.float64)
    except EngineError as error:
        return Check(artifact=artifact, min_cosine=None, problem=str(error), ran=False)
    expected = np.array([canary.vector for canary in canaries], np.float64)
    if not np.isfinite(vectors).all():
        return Check(artifact=artifact, min_cosine=None, problem="vectors are not finite on this machine", ran=True)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    worst = float(((vectors * expected).sum(1) / np.maximum(norms, 1e-12)).min())
    drifted = worst < artifact.parity.floor
    problem = f"vectors drifted: cosine {worst:.6f} is below {artifact.parity.floor}" if drifted else ""
    return Check(artifact=artifact, min_cosine=worst, problem=problem, ran=True)
