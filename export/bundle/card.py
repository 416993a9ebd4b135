"""A bundle's model card, and the wording of heads and artifacts in tables. Importing it does not import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror_runtime.bundle import Activation, Artifact, EncoderSpec, Layout, Manifest, VectorType, to_json
from mirror_runtime.errors import BundleError
from mirror_runtime.strict_json import read_json

CARD_FILE = "README.md"

WHITENING_FILE = "whitening.json"
"""Records in a bundle what its whitening was fitted on. The weights are those of the last dense layer."""

WITNESS_FILE = "witness.json"
"""Records in a bundle what sentence-transformers computed from the same encoder, where it was installed."""

MARK = "<!-- written by the exporter from here on -->"
"""Everything below this line is rewritten when artifacts are added."""

COLUMNS = (
    *("file", "engine", "precision", "MB", "floor", "worst cosine", "mean cosine", "largest difference"),
    *("batch invariance", "ranks", "top 10"),
)


VECTOR_LEGEND = """\
*Worst cosine*: the smallest cosine of any text's vector to the reference's. *Batch invariance*: the smallest cosine \
between a text's vectors when encoded by itself and among other texts. *Ranks*: Spearman correlation of similarities \
with the reference's. *Top 10*: the share of each text's ten nearest texts that the reference has too."""

SCORE_LEGEND = """\
Scores have no direction: in place of a cosine stands 1 - d² / 2, with d the difference from the reference's score in \
standard deviations of all scores. *Largest difference* is that of one raw score. *Batch invariance*: of a pair's \
scores by itself and among others. *Ranks*: Spearman correlation with the reference's scores. *Top 10*: the share of \
the ten highest scores that the reference has too."""

VECTOR_USE = """\
from mirror_runtime import Encoder

vectors = Encoder.load("path/to/this/folder").encode(["some text"])"""

SCORE_USE = """\
from mirror_runtime import Reranker

scores = Reranker.load("path/to/this/folder").scores("a query", ["some text"])"""


@dataclass(frozen=True, kw_only=True)
class Testimony:
    """What the witness found: the content of `WITNESS_FILE`."""

    version: str  # of the library, such as "sentence-transformers 6.2.0"
    texts: int  # compared
    min_cosine: float
    problem: str  # how its vectors differ; empty where they agree


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write a manifest's content to a bundle's README.md, below what is there; it replaces an earlier certificate.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / CARD_FILE
    try:
        above = path.read_text(encoding="utf-8").partition(MARK)[0]
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 at byte {error.start}: convert or remove it") from error
    found = folder / WITNESS_FILE
    seen = read_json(Testimony, found, "no witness") if found.is_file() else None
    card = certificate_card(manifest.encoder, manifest.artifacts, manifest.fingerprint, seen)
    path.write_text(f"{above}{MARK}\n{card}", encoding="utf-8")


def certificate_card(
    spec: EncoderSpec, artifacts: Sequence[Artifact], fingerprint: str, witness: Testimony | None = None
) -> str:
    """Return the card's body in Markdown, without front matter, for artifacts that were compared on the same texts.

    `witness` is the content of `WITNESS_FILE`.
    """
    parity = artifacts[0].parity
    return f"""
# {spec.base_model}, exported

{_description(spec)} The graphs include the pooling head.

Vector space **`{fingerprint}`**: a hash of weights, tokenizer and head. Vectors of encoders with the same fingerprint \
can be compared. An index built with another fingerprint must be rebuilt.

## Certificate

Measured when this folder was written, on {parity.texts:,} ragged texts (sha256 `{parity.texts_sha256[:16]}…`), \
against {parity.reference}, with the engine and options used for serving. Artifacts below their floor are not included.

{_certificates(artifacts)}

{SCORE_LEGEND if spec.scores_pairs else VECTOR_LEGEND}
{_quality(artifacts)}{_witness(witness)}
`mirror verify` on this folder checks every file and recomputes stored vectors on the serving machine.

## Use

```python
{SCORE_USE if spec.scores_pairs else VECTOR_USE}
```
{_other_libraries(spec, artifacts)}"""


def describe_head(spec: EncoderSpec, *, whitened: bool = False) -> str:
    """Describe how token vectors become a text's vector, such as "mean, dense to 256, unit length".

    With `whitened`, the last dense layer is a whitening.
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
        activation = "" if dense.activation is Activation.IDENTITY else f" and {dense.activation.value}"
        parts.append(f"{name} to {dense.out_features}{activation}")
    parts.append("unit length" if spec.normalize else "not normalised")
    if spec.template is not None:
        parts.append(f"every text set into `{spec.template}`")
    return ", ".join(parts)


def short_name(artifact: Artifact) -> str:
    """Return an artifact's engine, precision and layout, such as "openvino bf16 packed"."""
    return f"{artifact.engine.value} {artifact.precision.value} {artifact.layout.value}"


def round_down(cosine: float) -> str:
    """Format a cosine with six digits, rounded down, so that 0.9999997 is not shown as 1.

    What float32 cannot distinguish from 1 is 1.
    """
    return f"{math.floor((cosine + 1e-9) * 1e6) / 1e6:.6f}"


def summary(artifact: Artifact) -> dict[str, object]:
    """Return an artifact and its certificate for a command's JSON report."""
    return {
        "path": artifact.path,
        "engine": artifact.engine.value,
        "precision": artifact.precision.value,
        "layout": artifact.layout.value,
        "size": artifact.size,
        "min_cosine": artifact.parity.min_cosine,
        "floor": artifact.parity.floor,
        "max_abs_diff": artifact.parity.max_abs_diff,
        "neighbour_cosine": artifact.parity.neighbour_cosine,
        "spearman": artifact.parity.spearman,
        "top10_overlap": artifact.parity.top10_overlap,
        "sts": to_json(artifact.parity.sts),
    }


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Format a Markdown table: `left` leading columns are aligned left, the others hold figures."""
    rule = "|" + "---|" * left + "--:|" * (len(head) - left)
    first, *others = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows))
    return "\n".join([first, rule, *others])


def _witness(found: Testimony | None) -> str:
    """Describe what an independent reader of the encoder's folder computed."""
    if found is None:
        return ""
    who = f"{found.version}, reading the encoder's own folder,"
    if found.problem:
        return f"\n**{who} computes other vectors**: {found.problem}. They were accepted at export.\n"
    return f"\n{who} computes the reference's vectors: worst cosine {found.min_cosine:.6f} of {found.texts} texts.\n"


def _description(spec: EncoderSpec) -> str:
    if spec.scores_pairs:
        return (
            f"One score per pair of a query and a text, {describe_head(spec)}, up to {spec.max_tokens} tokens together."
        )
    kind = "numbers" if spec.vector_type is VectorType.FLOAT32 else f"components ({spec.vector_type.value})"
    return f"{spec.dim} {kind} per text, pooling {describe_head(spec)}, texts of up to {spec.max_tokens} tokens."


def _certificates(artifacts: Sequence[Artifact]) -> str:
    rows = [
        (
            f"`{artifact.path}`",
            artifact.engine.value,
            artifact.precision.value,
            f"{artifact.size / 1e6:.1f}",
            str(artifact.parity.floor),
            round_down(artifact.parity.min_cosine),
            round_down(artifact.parity.mean_cosine),
            f"{artifact.parity.max_abs_diff:.1e}",
            round_down(artifact.parity.neighbour_cosine),
            f"{artifact.parity.spearman:.4f}",
            f"{artifact.parity.top10_overlap:.1%}",
        )
        for artifact in artifacts
    ]
    return markdown_table(COLUMNS, rows, left=3)


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
    return f"\nSpearman correlation with human scores, in points:\n\n{table}\n"


def _other_libraries(spec: EncoderSpec, artifacts: Sequence[Artifact]) -> str:
    from encoders.write import beyond_sentence_transformers  # loads torch, which only exports have

    padded = [artifact.path for artifact in artifacts if artifact.layout is Layout.PADDED]
    graph = next((path for path in padded if path.endswith(".onnx")), None)
    sections = []
    if spec.scores_pairs:
        sections.append(
            "```python\nfrom sentence_transformers import CrossEncoder\n\n"
            'scores = CrossEncoder("path/to/this/folder").predict([("a query", "some text")])\n```'
        )
    elif not beyond_sentence_transformers(spec):
        sections.append(
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'vectors = SentenceTransformer("path/to/this/folder").encode(["some text"])\n```'
        )
    if graph is not None:
        sections.append(
            f"Any ONNX runtime can run `{graph}`. Its first output holds token vectors, its second, "
            "`sentence_embedding`, the pooled vectors."
        )
    return "".join(f"\n{section}\n" for section in sections)
