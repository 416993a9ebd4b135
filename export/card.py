"""A bundle's model card: what it is, what was measured of it, how to load it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mirror_runtime.bundle import Artifact, EncoderSpec, Layout, Manifest, VectorType
from training.layout import beyond_sentence_transformers

CARD_FILE = "README.md"

MARK = "<!-- written by the exporter from here on -->"
"""Everything below it is made anew when artifacts are added."""


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write what a manifest says into a bundle's README.md, below what is there already; a certificate is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / CARD_FILE
    above = path.read_text(encoding="utf-8").partition(MARK)[0]
    card = certificate_card(manifest.encoder, manifest.artifacts, manifest.fingerprint)
    path.write_text(f"{above}{MARK}\n{card}", encoding="utf-8")


def certificate_card(spec: EncoderSpec, artifacts: Sequence[Artifact], fingerprint: str) -> str:
    """Give the card's body in Markdown; the front matter is the layout's.

    Args:
        spec: what decides a vector.
        artifacts: the proven ones, at least one; all were compared with the same texts.
        fingerprint: of the vector space.
    """
    parity = artifacts[0].parity
    return f"""
# {spec.base_model}, exported

{_description(spec)} The pooled head is inside the graphs.

Vector space **`{fingerprint}`**: a hash of weights, tokenizer and head. Vectors of encoders with the same fingerprint \
can be compared; an index made with another one has to be made again.

## Certificate

Measured when this folder was made, on {parity.texts:,} ragged texts (sha256 `{parity.texts_sha256[:16]}…`), against \
{parity.reference}, with the engine and the options that serve. An artifact below its floor is not here.

{_certificates(artifacts)}

*Worst cosine*: of any text with the reference's vector. *Alone*: the worst cosine between a text's vector by itself \
and among others. *Ranks*: Spearman correlation of similarities with the reference's. *Top 10*: share of a text's ten \
nearest that are also the reference's.
{_quality(artifacts)}
`mirror verify` on this folder checks every file and recomputes stored vectors on the machine that serves.

## Use

```python
from mirror_runtime import Encoder

vectors = Encoder.load("path/to/this/folder").encode(["some text"])
```
{_other_libraries(spec, artifacts)}"""


def _description(spec: EncoderSpec) -> str:
    kind = "numbers" if spec.vector_type is VectorType.FLOAT32 else f"components ({spec.vector_type.value})"
    parts = [f"{spec.dim} {kind} a text", f"pooling {spec.pooling.value}"]
    if spec.layers != (-1,):
        parts.append(f"layers {', '.join(map(str, spec.layers))} averaged")
    if spec.dense:
        parts.append(f"{len(spec.dense)} dense layer{'s' * (len(spec.dense) > 1)} after it")
    parts.append("unit length" if spec.normalize else "not normalised")
    if spec.template is not None:
        parts.append(f"every text set into `{spec.template}`")
    return f"{', '.join(parts)}, texts of up to {spec.max_tokens} tokens."


def _certificates(artifacts: Sequence[Artifact]) -> str:
    lines = [
        "| file | engine | precision | MB | floor | worst cosine | mean cosine | largest difference | alone | ranks "
        "| top 10 |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for artifact in artifacts:
        parity = artifact.parity
        lines.append(
            f"| `{artifact.path}` | {artifact.engine.value} | {artifact.precision.value} | {artifact.size / 1e6:.1f} "
            f"| {parity.floor} | {_rounded_down(parity.min_cosine)} | {_rounded_down(parity.mean_cosine)} "
            f"| {parity.max_abs_diff:.1e} | {_rounded_down(parity.neighbour_cosine)} | {parity.spearman:.4f} "
            f"| {parity.top10_overlap:.1%} |"
        )
    return "\n".join(lines)


def _rounded_down(cosine: float) -> str:
    """Show six digits, rounded down: 0.9999997 is no claim of 1. What float32 cannot tell from 1 is 1."""
    return f"{math.floor((cosine + 1e-9) * 1e6) / 1e6:.6f}"


def _quality(artifacts: Sequence[Artifact]) -> str:
    names = list(dict.fromkeys(score.name for artifact in artifacts for score in artifact.parity.sts))
    if not names:
        return ""
    lines = [
        "",
        "Spearman correlation with people's scores, in points:",
        "",
        "| set | pairs | PyTorch | " + " | ".join(_short_name(artifact) for artifact in artifacts) + " |",
        "|---|--:|--:|" + "--:|" * len(artifacts),
    ]
    for name in names:
        # An artifact that was added later may have been measured on other sets.
        measured = [{score.name: score for score in artifact.parity.sts}.get(name) for artifact in artifacts]
        figures = " | ".join("" if score is None else f"{score.artifact:.2f}" for score in measured)
        known = next(score for score in measured if score is not None)
        lines.append(f"| {name} | {known.pairs:,} | {known.reference:.2f} | {figures} |")
    return "\n".join([*lines, ""])


def _short_name(artifact: Artifact) -> str:
    return f"{artifact.engine.value} {artifact.precision.value} {artifact.layout.value}"


def _other_libraries(spec: EncoderSpec, artifacts: Sequence[Artifact]) -> str:
    padded = [artifact.path for artifact in artifacts if artifact.layout is Layout.PADDED]
    graphs = next((path for path in padded if path.endswith(".onnx")), None)
    found = []
    if not beyond_sentence_transformers(spec):
        found.append(
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'vectors = SentenceTransformer("path/to/this/folder").encode(["some text"])\n```'
        )
    if graphs is not None:
        found.append(
            f"`{graphs}` gives token vectors first and `sentence_embedding`, the pooled ones, second: any ONNX runtime "
            "runs it."
        )
    return "".join(f"\n{part}\n" for part in found)
