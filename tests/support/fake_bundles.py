"""Bundles for the fake engine and a gate in front of it; specs, artifacts and plan cards with every field filled in."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror_runtime.bundle import (
    CANARIES_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Activation,
    Artifact,
    Canaries,
    Dense,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Parity,
    Pooling,
    Precision,
    TensorSpec,
    read_manifest,
    sha256_file,
    write_json,
)
from mirror_runtime.engines.plan_card import PlanCard
from mirror_runtime.plan import Goal, HostIdentity, HostPlan

NAMES = ("input_ids", "position_ids", "segment_ids")
"""Inputs of a packed graph."""

FINGERPRINT = "0123456789abcdef"
"""Of bundles for the fake engine."""
TWIN = "fedcba9876543210"
"""Of a twin."""

EQUAL = dict.fromkeys(("min_cosine", "mean_cosine", "neighbour_cosine", "spearman", "top10_overlap"), 1.0)
PROOF: dict[str, Any] = {"reference": "tests", "texts": 1, "texts_sha256": "0" * 64, "floor": 0.99999}
PARITY = Parity(max_abs_diff=0.0, **PROOF, **EQUAL)  # type: ignore[arg-type]


RERANKER: dict[str, Any] = {
    **{"dim": 1, "pooling": Pooling.RERANK, "normalize": False},
    "dense": (Dense(in_features=8, out_features=1, bias=True, activation=Activation.IDENTITY),),
}
"""Fields of a reranker's spec."""


def encoder_spec(**changes: Any) -> EncoderSpec:
    """Build the spec of a mean-pooling BERT with 64 tokens and 8 dimensions, or with other fields."""
    fields = {"base_model": "fake", "revision": None, "family": "bert", "pooling": Pooling.MEAN, "normalize": True}
    return EncoderSpec(**{**fields, "max_tokens": 64, "dim": 8, **changes})


def artifact(engine: EngineName, precision: Precision, layout: Layout = Layout.PACKED, **changes: Any) -> Artifact:
    """Build an artifact entry; what it names need not exist."""
    fields: dict[str, Any] = {
        "path": "onnx/model_packed.onnx",
        "inputs": tuple(TensorSpec(name=name, dtype="int64", shape=("rows", "length")) for name in NAMES),
        "outputs": (TensorSpec(name="embedding", dtype="float32", shape=("rows", "length // 4", 8)),),
        "size": 1,
        "parity": PARITY,
        "toolchain": {"onnx": "1"},
    }
    return Artifact(**{**fields, "engine": engine, "precision": precision, "layout": layout, **changes})


def plan_card(shapes: tuple[tuple[int, int], ...], **changes: Any) -> PlanCard:
    """Build the card of a TensorRT plan with a static profile for each shape."""
    fields: dict[str, Any] = {
        **{"format_version": 1, "tensorrt": "11.4.0.106", "gpu": "NVIDIA L4", "compute_capability": "8.9"},
        **{"platform": "Linux x86_64", "precision": Precision.FP16, "layout": Layout.PACKED},
        **{"onnx": "model_packed_fp16.onnx", "onnx_sha256": "0" * 64, "plan_sha256": "0" * 64},
        "inputs": tuple(TensorSpec(name=name, dtype="int64", shape=(-1, -1)) for name in NAMES),
        "outputs": (TensorSpec(name="embedding", dtype="float32", shape=(-1, -1, 8)),),
        "profiles": tuple({name: (shape, shape, shape) for name in NAMES} for shape in shapes),
        **{"level": 3, "workspace_gib": None, "version_compatible": False, "hardware": "none"},
        **{"layers": 2, "fused_attention": 1, "min_cosine": None, "build_s": 1.0},
    }
    return PlanCard(**{**fields, **changes})


def host_plan(**changes: Any) -> HostPlan:
    """Build the plan of some machine for bundles of the fake engine, without a choice."""
    host = HostIdentity(cpu="a CPU", features="0", cores=8, gpu="")
    fields: dict[str, Any] = {"format_version": 2, "goal": Goal.THROUGHPUT, "floor": 0.999, "texts": 100, "rounds": 3}
    return HostPlan(**{**fields, "fingerprint": FINGERPRINT, "host": host, "versions": {}, **changes})


def write_fake_bundle(
    tokenizer: Path, folder: Path, max_tokens: int = 64, dim: int = 8, artifacts: tuple[Artifact, ...] = (), **spec: Any
) -> Path:
    """Write a bundle without graphs, for the fake engine: a manifest and a tokenizer, of an encoder with this spec."""
    folder.mkdir()
    shutil.copy(tokenizer / TOKENIZER_FILE, folder)
    write_json(Canaries(canaries=()), folder / CANARIES_FILE)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by="tests",
        encoder=encoder_spec(max_tokens=max_tokens, dim=dim, **spec),
        fingerprint=FINGERPRINT,
        files={file: sha256_file(folder / file) for file in (TOKENIZER_FILE, CANARIES_FILE)},
        artifacts=artifacts,
    )
    write_json(manifest, folder / MANIFEST_FILE)
    return folder


def change_bundle(bundle: Path, fingerprint: str = TWIN, **spec: Any) -> Path:
    """Change a manifest's fingerprint and fields of its encoder."""
    manifest = read_manifest(bundle)
    changed = replace(manifest, encoder=replace(manifest.encoder, **spec), fingerprint=fingerprint)
    write_json(changed, bundle / MANIFEST_FILE)
    return bundle


def busy_texts() -> list[bytes]:
    """256 different texts of 62 tokens each: equal ones would be computed once."""
    letters = "abcdefghijklmnop"
    return [f"{a} {b} {'busy ' * 58}".encode() for a in letters for b in letters]


class EngineGate:
    """Stands in front of an engine: runs wait while it is closed, and raise `failure` if it is set."""

    def __init__(self, engine: Any) -> None:
        self.failure: Exception | None = None
        self.runs = 0
        self.run_engine = engine.run
        self._open = threading.Event()
        self._open.set()
        engine.run = self._run

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def _run(self, rows: NDArray[np.int64]) -> Any:
        self.runs += 1
        assert self._open.wait(20)
        if self.failure is not None:
            raise self.failure
        return self.run_engine(rows)
