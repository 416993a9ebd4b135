"""The schema of run folders and bundles, the contract between training, export and the runtime.

A *run folder* (written by training) holds weights, a tokenizer and `encoder.json`, an `EncoderSpec`.
A *bundle* (written by export) holds the same plus exported graphs and `manifest.json`, a `Manifest`.
Both files are read strictly, see `strict_json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from mirror_runtime.errors import BundleError
from mirror_runtime.strict_json import ADDED, read_json, read_object
from mirror_runtime.strict_json import from_json as from_json  # re-exported, as are to_json and write_json
from mirror_runtime.strict_json import to_json as to_json
from mirror_runtime.strict_json import write_json as write_json

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
ENCODER_FILE = "encoder.json"
CANARIES_FILE = "canaries.json"
TOKENIZER_FILE = "tokenizer.json"
TWIN_FOLDER = "twin"
"""In a bundle: holds the bundle of its static twin, see `mirror_runtime.twins`."""

TOKENS_PER_SLOT = 4
"""A packed row of L tokens has L // 4 slots: at most so many texts share the row. The graph computes this from L."""

MOST_TOKENS = 1 << 20
"""Bound of lengths and dimensions in files: beyond it a number is damage, which would take all memory."""

LARGEST_FLOAT32 = 3.4028235e38

SPACELESS = ("base_model", "revision", "trained_dims", "trained_depths", "twin_of")
"""Fields of an `EncoderSpec` that determine no vector."""


class Pooling(str, Enum):
    """How token vectors are combined into one vector. Recorded with the weights, never guessed."""

    MEAN = "mean"
    """Mean over the text's own tokens (mask-weighted): what every current library calls mean."""
    CLS = "cls"
    """The first token's vector."""
    MEAN_PADDED = "mean_padded"
    """Mean over the text padded to `pad_to`: the published Mirror-BERT checkpoints' "mean". A different vector."""
    MAX = "max"
    """The largest value of each component over the text's tokens."""
    WEIGHTED_MEAN = "weighted_mean"
    """Mean with weights 1, 2, 3, … by position (SGPT, equation 2)."""
    LAST = "last"
    """The last token's vector."""
    MASK = "mask"
    """The vector at the mask token that `template` puts into every text (PromptBERT, section 4)."""
    DITTO = "ditto"
    """Mean weighted by each token's attention to itself in one head (Ditto, section 3.2). The weights are divided by
    their sum, unlike in the published code; cosines are the same."""
    RERANK = "rerank"
    """A cross-encoder's: the first token of a query and a text in one sequence, and `dense` makes one score of it."""
    TOKENS = "tokens"
    """None: every token of the text keeps a vector of its own, special tokens too, for late interaction (ColBERT,
    section 3.2). `dense`, `dim` and `normalize` apply to each."""


ONE_TOKEN = (Pooling.CLS, Pooling.LAST, Pooling.MASK, Pooling.RERANK)
"""Poolings that read one token of each text, so that the last layer need not compute the others."""


class VectorType(str, Enum):
    """The number format of the vectors that a graph returns."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"
    """round(x / int8_scale), between -127 and 127: one scale for all components, so int8 vectors have true cosines."""
    BINARY = "binary"
    """One bit per component, 1 if positive; eight to a uint8, the first component in the highest bit."""


class Activation(str, Enum):
    """The activation function after a dense layer of the head."""

    IDENTITY = "identity"
    TANH = "tanh"
    RELU = "relu"
    GELU = "gelu"


class Precision(str, Enum):
    """The number format of the matrix products."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class EngineName(str, Enum):
    """A library that executes artifacts."""

    ONNXRUNTIME = "onnxruntime"
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    """ONNX Runtime's CUDA provider."""
    ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"
    """ONNX Runtime's TensorRT provider, which builds an engine when a shape first occurs."""
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    FAKE = "fake"


class Layout(str, Enum):
    """How texts are arranged in a graph's inputs."""

    PADDED = "padded"
    """One text per row, with padding."""
    PACKED = "packed"
    """Several texts per row, separated by segment ids."""


@dataclass(frozen=True, kw_only=True)
class Ditto:
    """The attention head whose diagonal weights the tokens (Ditto, section 3.2). Both numbers count from 0."""

    layer: int
    head: int


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer of the head. Whitening is one.

    The weights of layer i are in `<i + 2>_Dense/model.safetensors`, as `linear.weight` [out_features, in_features] and
    `linear.bias`, where sentence-transformers keeps them.
    """

    in_features: int
    out_features: int
    bias: bool
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Everything except weights and tokenizer that determines a text's vector.

    The steps: `template`, tokens, transformer, mean over `layers`, `pooling`, `dense`, the first `dim` components,
    `normalize`, `vector_type`.

    Attributes:
        base_model: the weights' name on the hub or folder name.
        revision: its commit, or None for a local folder.
        family: `model_type` of the Hugging Face configuration, such as "bert".
        pooling: how token vectors are combined.
        normalize: whether the vector is scaled to unit L2 norm.
        max_tokens: longest input in tokens, special tokens included.
        dim: components of the vector. If the head has more, the vector is cut (Matryoshka).
        pad_to: length that `mean_padded` pads to, in tokens; None for every other pooling.
        layers: the layers whose outputs are averaged before pooling, as indices of Hugging Face's `hidden_states`: 0
            the embeddings, 1 the first layer, -1 the last.
        ditto: the attention head that weights the tokens of pooling `ditto`; None for every other pooling.
        dense: linear layers after pooling, in order.
        template: text around every text, such as 'query: {text}'; None for no template. Truncation removes tokens of
            the text, never of the template.
        vector_type: the number format of the vectors that the graph returns.
        int8_scale: of `vector_type` int8; None for every other.
        trained_dims: numbers of leading components, fewer than `dim`, for which the encoder was trained too
            (Matryoshka), ascending. They and the depths determine no vector.
        trained_depths: numbers of layers, fewer than all, for which it was trained too, ascending.
        twin_of: the fingerprint of the encoder in whose vector space a static twin's vectors lie; None for every other.
    """

    base_model: str
    revision: str | None
    family: str
    pooling: Pooling
    normalize: bool
    max_tokens: int
    dim: int
    pad_to: int | None = None
    layers: tuple[int, ...] = (-1,)
    ditto: Ditto | None = None
    dense: tuple[Dense, ...] = ()
    template: str | None = None
    vector_type: VectorType = VectorType.FLOAT32
    int8_scale: float | None = None
    trained_dims: tuple[int, ...] = field(default=(), metadata=ADDED)
    trained_depths: tuple[int, ...] = field(default=(), metadata=ADDED)
    twin_of: str | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.max_tokens < 3:
            raise BundleError(f"max_tokens is {self.max_tokens}: a text needs at least 3 ([CLS] token [SEP])")
        if self.dim < 1:
            raise BundleError(f"dim is {self.dim}: it must be positive")
        if max(self.max_tokens, self.dim, self.pad_to or 0) > MOST_TOKENS:
            raise BundleError(f"max_tokens, dim or pad_to is over {MOST_TOKENS}, more than any encoder has")
        if (self.pooling is Pooling.MEAN_PADDED) != (self.pad_to is not None):
            raise BundleError(f"pad_to is {self.pad_to} with pooling {self.pooling.value}: set it for mean_padded only")
        if (self.pooling is Pooling.DITTO) != (self.ditto is not None):
            raise BundleError(f"ditto is {self.ditto} with pooling {self.pooling.value}: set it for ditto only")
        if self.pooling is Pooling.MASK and self.template is None:
            raise BundleError("pooling mask needs a template with the mask token, such as '{text} means [MASK].'")
        if self.scores_pairs and (self.dim > 1 or not self.dense or self.normalize or self.template):
            raise BundleError("pooling rerank computes one number of a pair: dim 1 after dense layers, as it is")
        if not self.layers:
            raise BundleError("layers is empty: name at least one, such as -1 for the last")
        if self.template is not None and self.template.count("{text}") != 1:
            raise BundleError(f"template is {self.template!r}: it must contain {{text}} once")
        self._check_trained()
        self._check_dense()
        self._check_vector_type()

    def _check_trained(self) -> None:
        for name, numbers in (("trained_dims", self.trained_dims), ("trained_depths", self.trained_depths)):
            if list(numbers) != sorted({*numbers}) or min(numbers, default=1) < 1:
                raise BundleError(f"{name} is {list(numbers)}: it must hold ascending positive numbers")
        if self.dim <= max(self.trained_dims, default=0):
            raise BundleError(f"trained_dims holds {self.trained_dims[-1]}: vectors have {self.dim} components")

    @property
    def scores_pairs(self) -> bool:
        """Whether it is a reranker: the input is a query and a text, the vector one score, see `reranker.Reranker`."""
        return self.pooling is Pooling.RERANK

    @property
    def per_token(self) -> bool:
        """Whether each token has a vector and the text has none, see `Encoder.encode_tokens`."""
        return self.pooling is Pooling.TOKENS

    def _check_dense(self) -> None:
        for first, second in zip(self.dense, self.dense[1:], strict=False):
            if first.out_features != second.in_features:
                raise BundleError(
                    f"a dense layer has {first.out_features} outputs, but the next one {second.in_features} inputs"
                )
        if self.dense and self.dim > self.dense[-1].out_features:
            raise BundleError(f"dim is {self.dim}, more than the {self.dense[-1].out_features} outputs of dense")

    def _check_vector_type(self) -> None:
        if self.per_token and self.vector_type is not VectorType.FLOAT32:
            raise BundleError(f"pooling tokens has float32 vectors, not {self.vector_type.value}")
        if (self.vector_type is VectorType.INT8) != (self.int8_scale is not None):
            raise BundleError(
                f"int8_scale is {self.int8_scale} with {self.vector_type.value} vectors: set it for int8 only"
            )
        if self.int8_scale is not None and not 0 < self.int8_scale < float("inf"):
            raise BundleError(f"int8_scale is {self.int8_scale}: it must be a positive number")
        if self.vector_type is VectorType.BINARY and self.dim % 8:
            raise BundleError(f"dim is {self.dim}: binary vectors need a multiple of 8")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph. A dimension is a number, or a name if it is free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class StsScore:
    """The result on an evaluation set of scored pairs: Spearman correlation of cosines and human scores, in points."""

    name: str
    pairs: int
    sha256: str  # of the set's file
    reference: float  # of the reference's vectors, -100 to 100
    artifact: float  # of the artifact's vectors


@dataclass(frozen=True, kw_only=True)
class Parity:
    """An artifact's vectors compared with the reference at export, on ragged real text."""

    reference: str  # such as "PyTorch 2.13.0 fp32"
    texts: int
    texts_sha256: str  # of the texts, joined by newlines
    min_cosine: float  # the worst text's
    mean_cosine: float
    max_abs_diff: float  # of one component
    floor: float  # the smallest `min_cosine` allowed
    neighbour_cosine: float  # batch invariance: the worst between a text's vectors alone and in a batch
    spearman: float  # of pair similarities with the reference's, over random pairs of the texts
    top10_overlap: float  # mean share of each text's ten nearest texts that are also the reference's
    sts: tuple[StsScore, ...] = ()  # quality, for each evaluation set passed to the exporter


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One way to run the encoder: a graph file with the engine and the precision that were proven with it."""

    path: str  # relative to the bundle
    engine: EngineName
    precision: Precision  # to run in: OpenVINO lowers an fp32 file to bf16 by itself
    layout: Layout
    inputs: tuple[TensorSpec, ...]  # in the graph's order
    outputs: tuple[TensorSpec, ...]
    size: int  # bytes of the graph and of the weights beside it
    parity: Parity  # measured with this engine in this precision
    toolchain: Mapping[str, str]  # versions of the libraries that made and measured it


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A text and its reference vector. `mirror verify` computes it again on the serving machine."""

    text: str
    vector: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(abs(number) > LARGEST_FLOAT32 for number in self.vector):
            raise BundleError("its vector has a number beyond float32: copy or export the bundle again")


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The content of `canaries.json`."""

    canaries: tuple[Canary, ...]

    def __post_init__(self) -> None:
        if len({len(canary.vector) for canary in self.canaries}) > 1:
            raise BundleError("its vectors have different lengths: copy or export the bundle again")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`, written last: a folder without it is not a bundle."""

    format_version: int
    created_by: str  # the producer and its version
    encoder: EncoderSpec
    fingerprint: str  # of weights, tokenizer and encoder: equal ones mean the same vector space
    files: Mapping[str, str]  # sha256 of every other file of the bundle, by relative path
    artifacts: tuple[Artifact, ...]  # the ways to run it


def read_encoder(folder: Path) -> EncoderSpec:
    """Read `encoder.json` of a run folder."""
    return read_json(EncoderSpec, folder / ENCODER_FILE, f"{folder} is not a run folder")


def read_canaries(bundle: Path) -> tuple[Canary, ...]:
    """Read the canary texts and reference vectors of a bundle."""
    return read_json(Canaries, bundle / CANARIES_FILE, f"{bundle} has no canaries").canaries


def read_manifest(bundle: Path) -> Manifest:
    """Read `manifest.json` of a bundle, without checking hashes: see `check_files`.

    Raises:
        BundleError: the folder is not a bundle, or its manifest is malformed or of another format version.
    """
    path = bundle / MANIFEST_FILE
    data = read_object(path, f"{bundle} is not a bundle")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {version!r}; this mirror_runtime reads {FORMAT_VERSION}. "
            "Export the encoder again, or install the matching version"
        )
    manifest = from_json(Manifest, data, str(path))
    for relative in (*manifest.files, *(a.path for a in manifest.artifacts)):
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise BundleError(f"{path} names {relative!r}, which lies outside the bundle")
    return manifest


def sha256_file(path: Path) -> str:
    """Hash a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """Hash every file of a folder and of those in it, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def sha256_texts(texts: Iterable[str]) -> str:
    """Hash texts joined by newlines, as 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(texts).encode("utf-8")).hexdigest()


def fingerprint(spec: EncoderSpec, files: Mapping[str, str]) -> str:
    """Name a vector space by 16 hexadecimal digits: a hash of weights, tokenizer and spec.

    The origin of the weights (`base_model`, `revision`, `twin_of`) and what else they were trained for are left out:
    the same weights have the same vector space. Only the `files`' hashes of safetensors files, the head's included, and
    of the tokenizer count.
    """
    own = {k: v for k, v in files.items() if not k.startswith(f"{TWIN_FOLDER}/")}
    counted = {k: v for k, v in own.items() if k == TOKENIZER_FILE or k.endswith(".safetensors")}
    vector = {k: v for k, v in to_json(spec).items() if k not in SPACELESS}
    text = json.dumps([counted, vector], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_files(bundle: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Compare files of a bundle with the manifest's sha256; a `BundleError` names those that differ.

    By default all files, else those of the names that the manifest lists.
    """
    expected = {name: digest for name, digest in manifest.files.items() if names is None or name in names}
    missing = [name for name in expected if not (bundle / name).is_file()]
    if missing:
        raise BundleError(f"{bundle} lacks {', '.join(missing)}: copy or export it again")
    changed = [name for name, digest in expected.items() if sha256_file(bundle / name) != digest]
    if changed:
        raise BundleError(
            f"{bundle} is corrupted: {', '.join(changed)} differ from the manifest. Copy or export it again"
        )
