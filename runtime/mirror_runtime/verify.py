"""Check a bundle on this machine: the hashes of its files, its fingerprint, and its canaries on each engine."""

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
from mirror_runtime.canaries import CanaryComparison, CanaryVerdict, canary_vectors, compare_canaries
from mirror_runtime.encoder import Encoder
from mirror_runtime.engines import installed
from mirror_runtime.errors import BundleError, EngineError
from mirror_runtime.pairs import canary_items
from mirror_runtime.twins import find_twin


@dataclass(frozen=True, kw_only=True)
class ArtifactCheck:
    """The canaries of one artifact on this machine."""

    artifact: Artifact
    comparison: CanaryComparison | None  # with the stored vectors; None where it could not run
    problem: str  # why it could not run, or how its vectors differ; empty where it passed

    @property
    def ran(self) -> bool:
        """Return whether the engine produced vectors."""
        return self.comparison is not None

    @property
    def agrees(self) -> bool:
        """Return whether the vectors agree with the stored ones."""
        return self.comparison is not None and self.comparison.verdict is CanaryVerdict.AGREES


def verify(bundle: Path, *, expected_fingerprint: str | None = None) -> tuple[ArtifactCheck, ...]:
    """Check every file's hash and the fingerprint, then run the canaries through every packed artifact.

    This distinguishes files that changed since the export (`BundleError`: corrupted), intact files of another vector
    space (`BundleError`, with both fingerprints), and vectors that come out differently on this machine (a comparison
    with `CanaryVerdict.DRIFTED`, or `CanaryVerdict.ANOTHER_MODEL` if rounding cannot explain the difference).

    Args:
        bundle: the folder.
        expected_fingerprint: the required vector space, such as the one that an index was built with; None for any.

    Returns:
        A result for each packed artifact, and for those of a static twin. One whose engine is not installed, or whose
        precision this CPU lacks, did not run; its `problem` has the reason.

    Raises:
        BundleError: see above.
    """
    manifest = read_manifest(bundle)
    if expected_fingerprint not in (None, manifest.fingerprint):
        raise BundleError(
            f"{bundle} is another model: its vector space is {manifest.fingerprint}, not {expected_fingerprint}. "
            "Use the bundle that the vectors were made with, or encode again"
        )
    check_files(bundle, manifest)
    check_fingerprint(manifest)
    twin = find_twin(bundle, manifest)
    own = tuple(_check(bundle, manifest, a) for a in manifest.artifacts if a.layout is Layout.PACKED)
    return own if twin is None else own + verify(twin)


def check_fingerprint(manifest: Manifest) -> None:
    """Check that a manifest's fingerprint is that of the weights, the tokenizer and the head that it lists."""
    found = fingerprint(manifest.encoder, manifest.files)
    if found != manifest.fingerprint:
        raise BundleError(
            f"the bundle contains another model: weights, tokenizer and head have the fingerprint {found}, but the "
            f"manifest has {manifest.fingerprint}. Export the encoder again"
        )


def _check(bundle: Path, manifest: Manifest, artifact: Artifact) -> ArtifactCheck:
    if not installed(artifact.engine):
        return ArtifactCheck(artifact=artifact, comparison=None, problem=f"{artifact.engine.value} is not installed")
    canaries = read_canaries(bundle)
    try:
        # By its path, because a bundle may have several artifacts for one engine and precision.
        with Encoder.of_graph(bundle, manifest, artifact.engine, artifact.precision, artifact.path) as encoder:
            items = canary_items(encoder.spec, [canary.text for canary in canaries])
            vectors = canary_vectors(encoder.encode_detailed(items), encoder.spec)
    except EngineError as error:
        return ArtifactCheck(artifact=artifact, comparison=None, problem=str(error))
    comparison = compare_canaries(vectors, canaries, artifact.parity.floor)
    return ArtifactCheck(artifact=artifact, comparison=comparison, problem=comparison.problem)
