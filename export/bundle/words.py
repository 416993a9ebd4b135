"""How bundles and artifacts are told of in cards, tables and reports. Light: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mirror_runtime.bundle import Activation, Artifact, EncoderSpec, to_json


def head_in_words(spec: EncoderSpec, *, whitened: bool = False) -> str:
    """Say how token vectors become a text's, such as "mean, layers 1, -1 averaged, dense to 256, unit length".

    Args:
        spec: the encoder's.
        whitened: whether its last dense layer is a whitening.
    """
    parts = [spec.pooling.value]
    if spec.ditto is not None:
        parts = [f"ditto {spec.ditto.layer}:{spec.ditto.head}"]
    if spec.pad_to is not None:
        parts = [f"{spec.pooling.value} to {spec.pad_to} tokens"]
    if spec.layers != (-1,):
        parts.append(f"layers {', '.join(map(str, spec.layers))} averaged")
    for i, dense in enumerate(spec.dense, start=1):
        name = "whitened" if whitened and i == len(spec.dense) else "dense"
        then = "" if dense.activation is Activation.IDENTITY else f" and {dense.activation.value}"
        parts.append(f"{name} to {dense.out_features}{then}")
    parts.append("unit length" if spec.normalize else "not normalised")
    if spec.template is not None:
        parts.append(f"every text set into `{spec.template}`")
    return ", ".join(parts)


def short_name(artifact: Artifact) -> str:
    """Name an artifact by what runs it, such as "openvino bf16 packed"."""
    return f"{artifact.engine.value} {artifact.precision.value} {artifact.layout.value}"


def rounded_down(cosine: float) -> str:
    """Show six digits, rounded down: 0.9999997 is no claim of 1. What float32 cannot tell from 1 is 1."""
    return f"{math.floor((cosine + 1e-9) * 1e6) / 1e6:.6f}"


def summary(artifact: Artifact) -> dict[str, object]:
    """Give an artifact and its certificate for a command's JSON report."""
    return {
        "path": artifact.path,
        "engine": artifact.engine.value,
        "precision": artifact.precision.value,
        "layout": artifact.layout.value,
        "size": artifact.size,
        "min_cosine": artifact.parity.min_cosine,
        "floor": artifact.parity.floor,
        "neighbour_cosine": artifact.parity.neighbour_cosine,
        "spearman": artifact.parity.spearman,
        "top10_overlap": artifact.parity.top10_overlap,
        "sts": to_json(artifact.parity.sts),
    }


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Write a Markdown table.

    Args:
        head: names of the columns.
        rows: as many cells each.
        left: how many columns are words; the rest are figures, which stand at the right.
    """
    rule = "|" + "---|" * left + "--:|" * (len(head) - left)
    first, *others = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows))
    return "\n".join([first, rule, *others])
