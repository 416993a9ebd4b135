"""Recompute a bundle's proof on this machine: its files, its vector space's name, its canaries on each engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mirror_runtime.bundle import (
    Artifact,
    Layout,
    Manifest,
    check_files,
    fingerprint,
    read_canaries,
    read_manifest,
)
from mirror_runtime.canaries import CanaryComparison, CanaryVerdict, compare_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.engines import installed
from mirror_runtime.errors import BundleError, EngineError
from mirror_runtime.vectors import components


@dataclass(frozen=True, kw_only=True)
class ArtifactCheck:
    """One artifact's canaries on this machine.

    Attributes:
        artifact: what was run.
        comparison: what came of it; None where it could not be run.
        problem: why it could not be run, or what the comparison found; empty where it passed.
    """

    artifact: Artifact
    comparison: CanaryComparison | None
    problem: str

    @property
    def ran(self) -> bool:
        """Whether the engine produced vectors."""
        return self.comparison is not None

    @property
    def agrees(self) -> bool:
        """Whether the vectors are those that the bundle stores."""
        return self.comparison is not None and self.comparison.verdict is CanaryVerdict.AGREES


def verify(bundle: Path, *, expected_fingerprint: str | None = None) -> tuple[ArtifactCheck, ...]:
    """ArtifactCheck every file's hash and the fingerprint, then run the canaries through every packed artifact.

    Three things are told apart: files that changed since the export (`BundleError`, corrupted), whole files of another
    vector space (`BundleError`, naming both fingerprints), and vectors that this machine computes otherwise (a
    comparison with `CanaryVerdict.DRIFTED`, or `CanaryVerdict.ANOTHER_MODEL` where that is beyond any rounding).

    Args:
        bundle: the folder.
        expected_fingerprint: of the vector space that is wanted, such as the one an index was made with.

    Returns:
        A result for each packed artifact. One whose engine is not installed, or whose precision this CPU lacks, did
        not run, and `problem` says why.

    Raises:
        BundleError: see above.
    """
    manifest = read_manifest(bundle)
    if expected_fingerprint not in (None, manifest.fingerprint):
        raise BundleError(
            f"{bundle} is another model: its vector space is {manifest.fingerprint} where {expected_fingerprint} is "
            "expected. Take the bundle that the vectors were made with, or make them again"
        )
    check_files(bundle, manifest)
    check_fingerprint(manifest)
    return tuple(_check(bundle, manifest, a) for a in manifest.artifacts if a.layout is Layout.PACKED)


def check_fingerprint(manifest: Manifest) -> None:
    """See that a manifest's fingerprint names the weights, the tokenizer and the head that it lists.

    Raises:
        BundleError: it names others.
    """
    found = fingerprint(manifest.encoder, manifest.files)
    if found != manifest.fingerprint:
        raise BundleError(
            f"the bundle holds another model than it says: weights, tokenizer and head have the fingerprint {found}, "
            f"and the manifest says {manifest.fingerprint}. Export the encoder again"
        )


def _check(bundle: Path, manifest: Manifest, artifact: Artifact) -> ArtifactCheck:
    if not installed(artifact.engine):
        return ArtifactCheck(artifact=artifact, comparison=None, problem=f"{artifact.engine.value} is not installed")
    canaries = read_canaries(bundle)
    try:
        # This very file: a bundle may have several for one engine and precision.
        with Encoder.of_graph(bundle, manifest, artifact.engine, artifact.precision, artifact.path) as encoder:
            vectors = components(encoder.encode(canary.text for canary in canaries), encoder.spec)
    except EngineError as error:
        return ArtifactCheck(artifact=artifact, comparison=None, problem=str(error))
    comparison = compare_canaries(vectors, canaries, artifact.parity.floor)
    return ArtifactCheck(artifact=artifact, comparison=comparison, problem=comparison.problem)
