"""Write an encoder as a folder that sentence-transformers, text-embeddings-inference and our own export load.

The schema is the older one of sentence-transformers, which its releases 5 and 6 still read and other servers require.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from encoders.card import CARD_FILE, front_matter
from encoders.families import FAMILIES
from encoders.pooling import linear_layers
from encoders.rerankers import CLASSIFIER
from encoders.sentence_transformers import (
    ACTIVATION_CLASSES,
    LEGACY_POOLING_KEYS,
    POOLING_MODES,
    PROMPT,
    WEIGHTS_FILE,
    dense_folder,
)
from mirror_runtime.bundle import (
    ENCODER_FILE,
    TOKENIZER_FILE,
    Activation,
    Dense,
    EncoderSpec,
    Pooling,
    VectorType,
    write_json,
)
from mirror_runtime.folders import umask

SPECIAL_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token", "eos_token")

TRUNCATION_LEFTOVERS = (
    "max_length",
    "stride",
    "truncation_side",
    "truncation_strategy",
    "padding_side",
    "pad_to_multiple_of",
)
"""Keys that earlier calls leave in `tokenizer_config.json`. fastembed truncates at `max_length`."""

FOLDER_LEFTOVERS = ("is_local", "local_files_only", "name_or_path", "auto_map")
"""Keys that describe where the tokenizer was loaded from."""

RERANKER_TAGS: tuple[str, ...] = ("sentence-transformers", "cross-encoder", "reranker")
CARD_TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "text-embeddings-inference")


def write_layout(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EncoderSpec,
    card: str,
    dense: Sequence[nn.Sequential] = (),
    prompts: Mapping[str, str] | None = None,
    terms: Mapping[str, Any] | None = None,
) -> None:
    """Write weights (fp32), tokenizer, head and `encoder.json`.

    A head that sentence-transformers lacks (see `beyond_sentence_transformers`) gets no `modules.json`, so that no
    tool pools differently without notice; the card explains it.

    Args:
        folder: is created if needed. Writing is not atomic: see `mirror_runtime.folders`.
        model: the encoder.
        tokenizer: its fast tokenizer.
        spec: everything except weights and tokenizer that decides a vector.
        card: the model card's text, without front matter.
        dense: the head's dense layers, as `spec.dense` describes them.
        prompts: by name.
        terms: license and languages of the base, as `encoders.card` reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, _classifier_of(model, dense) if spec.scores_pairs else model)
    _write_tokenizer(folder, tokenizer, spec)
    if spec.scores_pairs:  # a plain folder, which sentence-transformers' CrossEncoder reads
        (folder / CARD_FILE).write_text(_front_matter(spec, terms or {}) + card.strip() + "\n", encoding="utf-8")
        write_json(spec, folder / ENCODER_FILE)
        return
    for index, (described, layer) in enumerate(zip(spec.dense, dense, strict=True)):
        _write_dense(folder / dense_folder(index), described, layer.state_dict())
    lacking = beyond_sentence_transformers(spec)
    if lacking:
        card += (
            f"\n\nThis encoder has {lacking}. sentence-transformers cannot express that, so this folder has no "
            "`modules.json`: read it with Mirror Runtime.\n"
        )
    else:
        _write_modules(folder, spec, model.config.hidden_size)
    _write_settings(folder, spec, prompts or {})
    (folder / CARD_FILE).write_text(_front_matter(spec, terms or {}) + card.strip() + "\n", encoding="utf-8")
    write_json(spec, folder / ENCODER_FILE)


def beyond_sentence_transformers(spec: EncoderSpec) -> str:
    """Name the part of a head that sentence-transformers has no module for; empty if it has modules for all."""
    if FAMILIES[spec.family].drops_unknown:
        return "a mean that leaves unknown tokens out (`model2vec`)"
    if spec.pooling is Pooling.MEAN_PADDED:
        return f"an average over the text padded to {spec.pad_to} tokens (`mean_padded`)"
    if spec.pooling not in (*POOLING_MODES.values(), Pooling.RERANK):
        return f"the pooling `{spec.pooling.value}`"
    if spec.layers != (-1,):
        return f"an average of layers {', '.join(map(str, spec.layers))}"
    if spec.template is not None and not spec.template.endswith("{text}"):
        return f"the template `{spec.template}`, which continues after the text"
    if spec.vector_type in (VectorType.INT8, VectorType.BINARY):
        return f"{spec.vector_type.value} vectors"
    return ""


def _write_weights(folder: Path, model: PreTrainedModel) -> None:
    state = model.state_dict()
    tied: dict[int, str] = {}
    for name, value in state.items():
        tied.setdefault(value.data_ptr(), name)  # weights that two modules share are written once
    weights = {name: state[name].detach().cpu().float().contiguous() for name in tied.values()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o666 & ~umask())  # safetensors creates it private
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    for name in ("_name_or_path", "torch_dtype", "is_decoder", "add_cross_attention"):
        config.pop(name, None)
    _dump(folder / "config.json", config | {"dtype": "float32"})


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        state = json.loads((Path(scratch) / TOKENIZER_FILE).read_text(encoding="utf-8"))
        config = json.loads((Path(scratch) / "tokenizer_config.json").read_text(encoding="utf-8"))
    _dump(folder / TOKENIZER_FILE, state | {"truncation": None, "padding": None}, indent=None)
    for name in (*TRUNCATION_LEFTOVERS, *FOLDER_LEFTOVERS):
        config.pop(name, None)
    special = {name: str(token) for name in SPECIAL_TOKENS if (token := getattr(tokenizer, name)) is not None}
    config |= special | {
        # With this class, and few others, releases 4 and 5 of transformers read tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": tokenizer.model_input_names,
        "model_max_length": spec.max_tokens,
    }
    _dump(folder / "tokenizer_config.json", config)
    _dump(folder / "special_tokens_map.json", special)
    if state["model"]["type"] == "WordPiece":
        vocabulary: Mapping[str, int] = state["model"]["vocab"]
        lines = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
        (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_dense(folder: Path, dense: Dense, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a dense layer in the format of sentence-transformers; `weights` are those of a `make_dense` module."""
    folder.mkdir(exist_ok=True)
    named = {name.replace("0.", "linear.", 1): value.contiguous() for name, value in weights.items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o666 & ~umask())
    _dump(
        folder / "config.json",
        {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": dense.bias,
            "activation_function": ACTIVATION_CLASSES[dense.activation],
        },
    )


def _write_modules(folder: Path, spec: EncoderSpec, width: int) -> None:
    static = FAMILIES[spec.family].is_static
    names = [("", "StaticEmbedding")] if static else [("", "Transformer"), ("1_Pooling", "Pooling")]
    names += [(dense_folder(i), "Dense") for i in range(len(spec.dense))]
    uncut = spec.dense[-1].out_features if spec.dense else width
    if spec.dim < uncut:
        # sentence-transformers records no cut, but a dense layer with an identity matrix keeps the first components.
        cut = Dense(in_features=uncut, out_features=spec.dim, bias=False, activation=Activation.IDENTITY)
        names.append((dense_folder(len(spec.dense)), "Dense"))
        _write_dense(folder / names[-1][0], cut, {"0.weight": torch.eye(spec.dim, uncut)})
    if spec.normalize:
        names.append((f"{len(names)}_Normalize", "Normalize"))
    _dump(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(names)
        ],
    )
    for path, _ in names:
        (folder / path).mkdir(exist_ok=True)
    if static:  # neither cuts texts nor pools: the limit is the tokenizer's
        return
    mode = next(name for name, pooling in POOLING_MODES.items() if pooling is spec.pooling)
    _dump(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width}
        | {key: name == mode for key, name in LEGACY_POOLING_KEYS.items()}
        | {"include_prompt": True},
    )
    # Lower-casing by sentence-transformers stays off: tokenizer.json already does what the model was trained with.
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": spec.max_tokens, "do_lower_case": False})


def _write_settings(folder: Path, spec: EncoderSpec, prompts: Mapping[str, str]) -> None:
    template = spec.template or ""  # sentence-transformers has no prompt after the text
    prompt = template.removesuffix("{text}") if template.endswith("{text}") else None
    _dump(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {},
            "prompts": {**prompts} if prompt is None else {**prompts, PROMPT: prompt},
            "default_prompt_name": None if prompt is None else PROMPT,
            "similarity_fn_name": "cosine",
        },
    )


def _front_matter(spec: EncoderSpec, terms: Mapping[str, Any]) -> str:
    unsupported = bool(beyond_sentence_transformers(spec))
    known = RERANKER_TAGS if spec.scores_pairs else CARD_TAGS
    return front_matter(
        {
            **terms,
            "library_name": "transformers" if unsupported else "sentence-transformers",
            "pipeline_tag": "text-ranking" if spec.scores_pairs else "sentence-similarity",
            # Only a hub name is a valid base_model there.
            **({} if spec.revision is None else {"base_model": spec.base_model}),
            "tags": list(CARD_TAGS[1:3] if unsupported else known),
        }
    )


def _dump(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _classifier_of(model: PreTrainedModel, dense: Sequence[nn.Sequential]) -> PreTrainedModel:
    """Put an encoder and its head's dense layers together to a classification model, as its owner published it."""
    whole: PreTrainedModel = getattr(transformers, CLASSIFIER).from_config(model.config)
    whole.base_model.load_state_dict(model.state_dict())
    for layer, found in zip(linear_layers(whole), dense, strict=True):
        layer.load_state_dict(found[0].state_dict())
    return whole
