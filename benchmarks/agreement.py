"""One reference of agreement for all parties: the bundle's own fp32 vectors of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.plan import Plan, Runner, Suite, load_encoder, packed_variants
from benchmarks.recorder import Recorder
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.vectors import components, cosines

METRIC = "worst cosine to fp32"

Components = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The fp32 vectors: float32 [texts, dim], and the variant that computed them."""

    party: str
    vectors: Components


def fp32_reference(
    plan: Plan, name: str, texts: Sequence[str], recorder: Recorder, suite: Suite, runners: Sequence[Runner] = ()
) -> Reference | None:
    """Encode texts with the bundle's fp32, or reuse the vectors that an earlier suite of the run computed.

    Among `runners` are loaded variants: fp32 is used if it is there, else loaded, first on ONNX Runtime. None, with a
    failure in the record, where the bundle has no fp32 artifact that runs here. The same name must mean the same texts.
    """
    file = plan.scratch / f"fp32_{name}.npz"
    if file.is_file():
        with np.load(file) as saved:
            return Reference(party=str(saved["party"]), vectors=saved["vectors"])
    ready = {runner.variant.name: nullcontext(runner.encoder) for runner in runners}
    fp32 = [variant for variant in packed_variants(plan.manifest) if variant.precision is Precision.FP32]
    fp32.sort(key=lambda variant: (variant.name not in ready, variant.engine is not EngineName.ONNXRUNTIME))
    for variant in fp32:
        with recorder.failing(suite.value, f"reference {variant.name}"):
            with ready.get(variant.name) or load_encoder(plan, variant) as encoder:
                vectors = components(encoder.encode(texts), plan.manifest.encoder)
            np.savez(file, party=variant.name, vectors=vectors)
            return Reference(party=variant.name, vectors=vectors)
    if not fp32:
        recorder.fail(suite.value, "reference", "the bundle has no fp32 artifact to compare with")
    return None


def encode_components(plan: Plan, runner: Runner, texts: Sequence[str]) -> Components:
    """Encode texts, and convert the vectors to their components, float32 [texts, dim].

    Raises:
        MirrorError: a text or the engine failed.
    """
    return components(runner.encoder.encode(texts), plan.manifest.encoder)


def record_agreement(
    recorder: Recorder, suite: Suite, party: str, vectors: Components, reference: Reference | None
) -> None:
    """Record a party's worst and mean cosine to the reference over the workload; nothing without a reference."""
    if reference is not None:
        found = cosines(vectors, reference.vectors)
        recorder.record(suite.value, party, METRIC, found.min(), figures={"mean": float(found.mean())})
