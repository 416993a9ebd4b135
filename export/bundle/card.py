"""A bundle's model card: what it is, what was measured of it, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from encoders.write import beyond_sentence_transformers
from export.bundle.words import head_in_words, markdown_table, rounded_down, short_name
from mirror_runtime.bundle import Artifact, EncoderSpec, Layout, Manifest, VectorType

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
    return f"{spec.dim} {kind} a text, pooling {head_in_words(spec)}, texts of up to {spec.max_tokens} tokens."


def _certificates(artifacts: Sequence[Artifact]) -> str:
    head = ("file", "engine", "precision", "MB", "floor", "worst cosine", "mean cosine", "largest difference", "alone",
            "ranks", "top 10")  # fmt: skip
    rows = [
        (
            f"`{artifact.path}`",
            artifact.engine.value,
            artifact.precision.value,
            f"{artifact.size / 1e6:.1f}",
            str(artifact.parity.floor),
            rounded_down(artifact.parity.min_cosine),
            rounded_down(artifact.parity.mean_cosine),
            f"{artifact.parity.max_abs_diff:.1e}",
            rounded_down(artifact.parity.neighbour_cosine),
            f"{artifact.parity.spearman:.4f}",
            f"{artifact.parity.top10_overlap:.1%}",
        )
        for artifact in artifacts
    ]
    return markdown_table(head, rows, left=3)


def _quality(artifacts: Sequence[Artifact]) -> str:
    names = list(dict.fromkeys(score.name for artifact in artifacts for score in artifact.parity.sts))
    if not names:
        return ""
    rows = []
    for name in names:
        # An artifact that was added later may have been measured on other sets.
        measured = [{score.name: score for score in artifact.parity.sts}.get(name) for artifact in artifacts]
        figures = ("" if score is None else f"{score.artifact:.2f}" for score in measured)
        known = next(score for score in measured if score is not None)
        rows.append((name, f"{known.pairs:,}", f"{known.reference:.2f}", *figures))
    table = markdown_table(("set", "pairs", "PyTorch", *map(short_name, artifacts)), rows, left=1)
    return f"\nSpearman correlation with people's scores, in points:\n\n{table}\n"


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
