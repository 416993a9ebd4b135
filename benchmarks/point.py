"""One way our runtime runs a bundle: what figures are about."""

from __future__ import annotations

from dataclasses import dataclass

from mirror_runtime.bundle import EngineName, Parity, Precision


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way our runtime runs the bundle, with the parity its export proved."""

    engine: EngineName
    precision: Precision
    artifact: str
    parity: Parity

    @property
    def name(self) -> str:
        """Engine and precision, such as "openvino bf16"."""
        return f"{self.engine.value} {self.precision.value}"
