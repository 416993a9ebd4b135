"""A graph with the engine and precision that are to be proven together, and its entry in the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from export.graph.trace import Graph, graph_files
from mirror_runtime.bundle import Artifact, EngineName, Layout, Parity, Precision, TensorSpec
from mirror_runtime.extras import require


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A graph, an engine and a precision that are to be proven together.

    Attributes:
        path: the graph, relative to the unfinished bundle.
        layout: padded or packed.
        engine: the engine that runs it.
        precision: the precision in which it runs.
        inputs: in the graph's order.
        outputs: in the graph's order.
    """

    path: str
    layout: Layout
    engine: EngineName
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, folder: Path, graph: Graph, engine: EngineName, precision: Precision) -> Candidate:
        """Create a candidate from a graph inside `folder`, the finished or unfinished bundle."""
        return cls(
            path=graph.path.absolute().relative_to(folder.absolute()).as_posix(),
            layout=graph.layout,
            engine=engine,
            precision=precision,
            inputs=graph.inputs,
            outputs=graph.outputs,
        )

    def certified(
        self, folder: Path, parity: Parity, *, path: str | None = None, engine_module: str | None = None
    ) -> Artifact:
        """Return the manifest's entry.

        Args:
            folder: the finished or unfinished bundle.
            parity: the result of the proof.
            path: the graph's path in the finished bundle, where it differs.
            engine_module: record the version that this module states, instead of the version of the engine's package:
                containers bring TensorRT without package metadata.
        """
        toolchain = {name: version(name) for name in ("torch", "transformers", "onnx")}
        if engine_module is None:
            toolchain[self.engine.value] = version(self.engine.value)
        else:
            toolchain[engine_module] = str(require(engine_module, engine_module).__version__)
        return Artifact(
            path=path or self.path,
            engine=self.engine,
            precision=self.precision,
            layout=self.layout,
            inputs=self.inputs,
            outputs=self.outputs,
            size=sum(file.stat().st_size for file in graph_files(folder / self.path)),
            parity=parity,
            toolchain=toolchain,
        )

    def __str__(self) -> str:
        return f"{self.engine.value} {self.precision.value} {self.layout.value}"
