"""The table of candidates: every faster form of an encoder that the project can make, and the commands that make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from string import Formatter
from typing import Any

from mirror_runtime.bundle import Precision

ENCODER = "encoder"
"""Name of the candidate that all others are compared with: the encoder as it is."""

SHORTEST = 32
"""Components of the shortest vectors that are tried."""


class Kind(str, Enum):
    """What is changed to make an encoder faster, or its vectors smaller."""

    PRECISION = "precision"
    """The encoder itself, in every precision that this CPU can prove. Always made."""
    VECTORS = "vectors"
    """Vectors of 8-bit integers and of single bits."""
    ELASTIC = "elastic"
    """The encoder, tuned so that its first layers and its vectors' first components serve alone."""
    SHRINK = "shrink"
    """An encoder of half of the layers, with the corpus's vocabulary, which learns the encoder's vectors."""
    TWIN = "twin"
    """A static table in the encoder's vector space."""
    STUDENT = "student"
    """Another encoder that learns the encoder's vectors."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bundle to be made, and the ways to run it that are measured.

    In the commands, `{here}` is the candidate's folder, `{source}` the encoder as the user named it, `{base-1}` the
    first base of students, `{NAME}` the folder of an earlier candidate, and `{corpus}` and `{calibration}` are files of
    texts, one a line. They write `{here}/bundle`.
    """

    name: str  # of its folder
    kind: Kind
    commands: tuple[tuple[str, ...], ...]  # scripts of this repository with their arguments, run in turn
    precisions: tuple[Precision, ...]  # to measure
    dimensions: tuple[int, ...] = ()  # shorter vectors to measure too, for which the encoder was trained

    @property
    def places(self) -> set[str]:
        """The names of its placeholders except `here`."""
        fields = (field for command in self.commands for word in command for _, field, *_ in Formatter().parse(word))
        return set(filter(None, fields)) - {"here"}


def candidates(
    kinds: Sequence[Kind],
    *,
    layers: int,
    dim: int,
    bf16: bool,
    cuttable: bool = True,
    trained_dims: Sequence[int] = (),
    trained_depths: Sequence[int] = (),
    students: int = 0,
) -> tuple[Candidate, ...]:
    """List the candidates of some kinds, each after those that it needs.

    Args:
        kinds: to make.
        layers: of the encoder; 0 for a table of token vectors, which has fp32 and its vectors alone.
        dim: components of its vectors.
        bf16: whether this CPU can prove bf16.
        cuttable: whether its vocabulary can be cut to a corpus.
        trained_dims: shorter vectors for which it was trained; where it was, no elastic one is tuned.
        trained_depths: fewer layers for which it was trained, likewise.
        students: number of other encoders that learn from it.
    """
    exact = (Precision.FP32,)
    fast = (*[Precision.BF16] * bf16, Precision.INT8) if layers else exact
    dims = tuple(d for d in (dim // 6, dim // 3, dim * 2 // 3) if d >= SHORTEST)
    depths = tuple(dict.fromkeys(d for d in (layers // 3, layers // 2) if d))
    table: list[Candidate] = []

    def add(
        name: str, kind: Kind, *commands: tuple[str, ...], precisions: Sequence[Precision] = fast, **more: Any
    ) -> None:
        table.append(Candidate(name=name, kind=kind, commands=commands, precisions=tuple(precisions), **more))

    every = tuple(dict.fromkeys((*exact, *fast)))
    whole = _bundle("{source}", every)
    add(ENCODER, Kind.PRECISION, whole, precisions=every, dimensions=tuple(trained_dims))
    for kind in ("int8", "binary"):
        made = _bundle("{source}", fast[:1], "--vector-type", kind)
        add(f"{kind}-vectors", Kind.VECTORS, made, precisions=fast[:1])
    if layers:
        elastic = "{source}"
        if not (trained_dims or trained_depths):
            elastic = "{elastic}/run"
            lengths = ("--matryoshka", *map(str, dims)) if dims else ()
            tune = _learn("{source}", *lengths, *(("--depths", *map(str, depths)) if depths else ()))
            add("elastic", Kind.ELASTIC, tune, _bundle("{here}/run", fast), dimensions=dims)
        for depth in trained_depths if elastic == "{source}" else depths:
            add(f"depth-{depth}", Kind.ELASTIC, _bundle(elastic, fast, "--depth", str(depth)))
        smaller = ("--depth", str(max(1, layers // 2)), *(("--vocabulary", "{corpus}") if cuttable else ()))
        shrink = ("training/shrink.py", "{source}", *smaller, "--output", "{here}/shrunk")
        add("shrunk", Kind.SHRINK, shrink, _learn("{here}/shrunk"), _bundle("{here}/run", fast))
        twin = ("training/twin.py", "{encoder}/bundle", "--corpus", "{corpus}", "--output", "{here}/run")
        add("twin", Kind.TWIN, twin, _bundle("{here}/run", exact), precisions=exact)
    for number in range(1, students + 1):
        add(f"student-{number}", Kind.STUDENT, _learn(f"{{base-{number}}}"), _bundle("{here}/run", fast))
    return tuple(one for one in table if one.kind in {*kinds, Kind.PRECISION})


def _learn(base: str, *more: str) -> tuple[str, ...]:
    """Tune a base to return the encoder's vectors, which its bundle computes faster than PyTorch."""
    options = ("--teacher", "{encoder}/bundle", "--corpus", "{corpus}", "--probe", "none", "--output", "{here}/run")
    return ("training/tune.py", "--base", base, *options, *more)


def _bundle(source: str, precisions: Sequence[Precision], *more: str) -> tuple[str, ...]:
    """Export to several precisions; the scales of int8 are measured on the corpus."""
    calibration = ("--calibration", "{calibration}") if Precision.INT8 in precisions else ()
    names = (one.value for one in precisions)
    return ("export/to_onnx.py", source, "--output", "{here}/bundle", "--precision", *names, *calibration, *more)
