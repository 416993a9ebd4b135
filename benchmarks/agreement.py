"""One reference of agreement for all parties: the bundle's own fp32 vectors of the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.plan import Plan, Runner, Suite, load_encoder, packed_variants
from benchmarks.recorder import Recorder
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import MirrorError
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

    Args:
        plan: of the run; vectors are kept in its scratch folder.
        name: of the texts, such as "workload": the same name must mean the same texts.
        texts: to encode.
        recorder: for failures.
        suite: that needs the reference.
        runners: loaded variants, used where fp32 is among them.

    Returns:
        None, with a failure in the record, where the bundle has no fp32 artifact that runs here.
    """
    file = plan.scratch / f"fp32_{name}.npz"
    if file.is_file():
        with np.load(file) as saved:
            return Reference(party=str(saved["party"]), vectors=saved["vectors"])
    with _fp32_runner(plan, runners, recorder, suite) as runner:
        if runner is None:
            return None
        try:
            vectors = encode_components(plan, runner, texts)
        except MirrorError as error:
            recorder.fail(suite.value, f"reference {runner.variant.name}", error)
            return None
    np.savez(file, party=runner.variant.name, vectors=vectors)
    return Reference(party=runner.variant.name, vectors=vectors)


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
    if reference is None:
        return
    found = cosines(vectors, reference.vectors)
    recorder.record(suite.value, party, METRIC, found.min(), figures={"mean": float(found.mean())})


@contextmanager
def _fp32_runner(plan: Plan, runners: Sequence[Runner], recorder: Recorder, suite: Suite) -> Iterator[Runner | None]:
    """Yield the bundle's fp32 on ONNX Runtime, or else on another engine, loaded if it is not among `runners`."""
    fp32 = [variant for variant in packed_variants(plan.manifest) if variant.precision is Precision.FP32]
    fp32.sort(key=lambda variant: variant.engine is not EngineName.ONNXRUNTIME)
    ready = {runner.variant.name: runner for runner in runners}
    for variant in fp32:
        if variant.name in ready:
            yield ready[variant.name]
            return
    for variant in fp32:
        try:
            encoder = load_encoder(plan, variant)
        except MirrorError as error:
            recorder.fail(suite.value, f"reference {variant.name}", error)
            continue
        with encoder:
            yield Runner(variant=variant, encoder=encoder)
        return
    if not fp32:
        recorder.fail(suite.value, "reference", "the bundle has no fp32 artifact to compare with")
    yield None
