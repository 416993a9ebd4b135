"""A bundle's model card, and the wording of heads and artifacts in tables. Importing it does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from encoders.card import CARD_FILE
from evaluation.statistics import Estimate, Verdict
from mirror_runtime.bundle import (
    Activation,
    Artifact,
    EncoderSpec,
    EngineName,
    Layout,
    Manifest,
    Precision,
    VectorType,
    to_json,
)
from mirror_runtime.errors import BundleError
from mirror_runtime.strict_json import read_json

WHITENING_FILE = "whitening.json"
"""Records in a bundle what its whitening was fitted on. The weights are those of the last dense layer."""

WITNESS_FILE = "witness.json"
"""Records in a bundle what sentence-transformers computed from the same encoder, where it was installed."""

PROBES_FILE = "probes.json"
"""Records in a bundle what its artifacts cost on the user's own texts, where the export was given some."""

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

TOKEN_LEGEND = """\
*Worst cosine*: the smallest cosine of any token's vector to the reference's. *Batch invariance*: the smallest cosine \
between a token's vectors when its text is encoded by itself and among other texts. *Ranks*: Spearman correlation of \
tokens' similarities with the reference's. *Top 10*: the share of a token's ten nearest that the reference has too."""

TOKEN_USE = """\
from mirror_runtime import Encoder

(one,) = Encoder.load("path/to/this/folder").encode_tokens(["some text"])  # one.vectors, one.offsets"""

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


@dataclass(frozen=True, kw_only=True)
class ProbeCost:
    """An artifact's figure on a probe beside the encoder's before its head was cut or rounded, both times 100."""

    path: str  # of the artifact, as are engine and precision
    engine: EngineName
    precision: Precision
    probe: str  # and its measure, such as "content, accuracy"
    items: int  # questions
    before: float
    after: float
    gain: Estimate  # with its paired interval

    def __str__(self) -> str:
        return f"{self.probe} goes from {self.before:.1f} to {self.after:.1f} ({self.gain:+})"

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval of the difference is below zero."""
        return Verdict.of(self.gain) is Verdict.WORSE


@dataclass(frozen=True, kw_only=True)
class ProbeCosts:
    """The content of `PROBES_FILE`."""

    reference: str  # what `before` was measured with, such as "PyTorch 2.13.0 fp32, 384 numbers a text"
    texts_sha256: str  # of the probes' texts, joined by newlines
    costs: tuple[ProbeCost, ...]

    def of(self, artifact: Artifact) -> dict[str, ProbeCost]:
        """Return an artifact's costs by probe; none if it was added later."""
        key = (artifact.path, artifact.engine, artifact.precision)
        return {cost.probe: cost for cost in self.costs if (cost.path, cost.engine, cost.precision) == key}


NO_COSTS = ProbeCosts(reference="", texts_sha256="", costs=())


def read_costs(bundle: Path) -> ProbeCosts:
    """Read `PROBES_FILE` of a bundle; without it there are no costs."""
    file = bundle / PROBES_FILE
    return read_json(ProbeCosts, file, "no probes") if file.is_file() else NO_COSTS


def write_card(folder: Path, manifest: Manifest, bundle: Path | None = None) -> None:
    """Write a manifest's content to a bundle's README.md, below what is there; it replaces an earlier certificate.

    `bundle` holds the records of witness and probes, if `folder` does not.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / CARD_FILE
    try:
        above = path.read_text(encoding="utf-8").partition(MARK)[0]
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 at byte {error.start}: convert or remove it") from error
    found = (bundle or folder) / WITNESS_FILE
    seen = read_json(Testimony, found, "no witness") if found.is_file() else None
    costs = read_costs(bundle or folder)
    card = certificate_card(manifest.encoder, manifest.artifacts, manifest.fingerprint, seen, costs)
    path.write_text(f"{above}{MARK}\n{card}", encoding="utf-8")


def certificate_card(
    spec: EncoderSpec,
    artifacts: Sequence[Artifact],
    fingerprint: str,
    witness: Testimony | None = None,
    costs: ProbeCosts = NO_COSTS,
) -> str:
    """Return the card's body in Markdown, without front matter, for artifacts that were compared on the same texts.

    `witness` and `costs` are the content of `WITNESS_FILE` and `PROBES_FILE`.
    """
    parity = artifacts[0].parity
    legend, use = VECTOR_LEGEND, VECTOR_USE
    if spec.scores_pairs:
        legend, use = SCORE_LEGEND, SCORE_USE
    elif spec.per_token:
        legend, use = TOKEN_LEGEND, TOKEN_USE
    return f"""
# {spec.base_model}, exported

{_description(spec)} The graphs include the pooling head.

Vector space **`{fingerprint}`**: a hash of weights, tokenizer and head. Vectors of encoders with the same fingerprint \
can be compared. An index built with another fingerprint must be rebuilt.
{_twin(spec)}
## Certificate

Measured when this folder was written, on {parity.texts:,} ragged texts (sha256 `{parity.texts_sha256[:16]}…`), \
against {parity.reference}, with the engine and options used for serving. Artifacts below their floor are not included.

{_certificates(artifacts)}

{legend}
{_quality(artifacts)}{_own_texts(artifacts, costs)}{_witness(witness)}
`mirror verify` on this folder checks every file and recomputes stored vectors on the serving machine.

## Use

```python
{use}
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


def summary(artifact: Artifact, costs: Mapping[str, ProbeCost] | None = None) -> dict[str, object]:
    """Return an artifact, its certificate and its costs by probe for a command's JSON report."""
    names = ("items", "before", "after", "gain")
    probes = {name: {key: to_json(cost)[key] for key in names} for name, cost in (costs or {}).items()}
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
        "probes": probes,
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


def _twin(spec: EncoderSpec) -> str:
    if spec.twin_of is None:
        return ""
    return (
        f"\nThis is the static twin of the encoder `{spec.twin_of}`: its vectors approximate that encoder's, and can "
        "search an index of them.\n"
    )


def _description(spec: EncoderSpec) -> str:
    if spec.scores_pairs:
        return (
            f"One score per pair of a query and a text, {describe_head(spec)}, up to {spec.max_tokens} tokens together."
        )
    if spec.per_token:
        return f"{spec.dim} numbers per token, {describe_head(spec)}, texts of up to {spec.max_tokens} tokens."
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


def _own_texts(artifacts: Sequence[Artifact], costs: ProbeCosts) -> str:
    if not costs.costs:
        return ""
    rows = []
    for probe, known in {cost.probe: cost for cost in costs.costs}.items():
        found = [costs.of(artifact).get(probe) for artifact in artifacts]
        rows.append(
            (probe, f"{known.items:,}", f"{known.before:.2f}", *(f"{one.gain:+}" if one else "" for one in found))
        )
    table = markdown_table(("probe", "questions", "before", *map(short_name, artifacts)), rows, left=1)
    return (
        f"\nOn the maker's own texts, without labels: points of each probe before ({costs.reference}), and what each "
        "artifact adds, with its paired 95 % interval. It costs something where the whole interval is below zero.\n\n"
        f"{table}\n"
    )


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
        second = "`token_embeddings`, the head's" if spec.per_token else "`sentence_embedding`, the pooled vectors"
        sections.append(
            f"Any ONNX runtime can run `{graph}`. Its first output holds the transformer's token vectors, its second, "
            f"{second}."
        )
    return "".join(f"\n{section}\n" for section in sections)
