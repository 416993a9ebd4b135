"""Write an encoder as a folder that sentence-transformers, text-embeddings-inference and our own export load.

The schema is the older one of sentence-transformers, which its releases 5 and 6 still read and other servers require.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mirror_runtime.bundle import ENCODER_FILE, TOKENIZER_FILE, EncoderSpec, Pooling, write_json
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
"""Keys that earlier calls leave in `tokenizer_config.json`. fastembed cuts at `max_length`."""

FOLDER_LEFTOVERS = ("is_local", "local_files_only", "name_or_path", "auto_map")
"""Keys that describe the machine the tokenizer was loaded on."""

CARD_TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "text-embeddings-inference")


def write_layout(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EncoderSpec,
    card: str,
) -> None:
    """Write weights (fp32), tokenizer, pooling and `encoder.json`.

    `mean_padded` has no equivalent in sentence-transformers, so such a folder gets no `modules.json`: a tool that would
    pool otherwise then has to be told so, and the card says it.

    Args:
        folder: is made if need be. Writing is not atomic: see `mirror_runtime.folders`.
        model: the encoder.
        tokenizer: its fast tokenizer.
        spec: what decides a vector.
        card: the model card's text; the front matter is put before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, model)
    _write_tokenizer(folder, tokenizer, spec)
    if spec.pooling is Pooling.MEAN_PADDED:
        card += (
            f"\n\nThis encoder averages over the text padded to {spec.pad_to} tokens (`mean_padded`). "
            "sentence-transformers cannot express that, so this folder has no `modules.json`: "
            "read it with Mirror Runtime.\n"
        )
    else:
        _write_modules(folder, spec)
    (folder / "README.md").write_text(_front_matter(spec) + card.strip() + "\n", encoding="utf-8")
    write_json(spec, folder / ENCODER_FILE)


def _write_weights(folder: Path, model: PreTrainedModel) -> None:
    weights = {name: value.detach().cpu().float().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o666 & ~umask())  # safetensors makes it private
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
    _dump(folder / "tokenizer_config.json", config | special | {"model_max_length": spec.max_tokens})
    _dump(folder / "special_tokens_map.json", special)
    if state["model"]["type"] == "WordPiece":
        vocabulary: Mapping[str, int] = state["model"]["vocab"]
        lines = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
        (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_modules(folder: Path, spec: EncoderSpec) -> None:
    names = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * spec.normalize
    _dump(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(names)
        ],
    )
    for path, _ in names:
        (folder / path).mkdir(exist_ok=True)
    _dump(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": spec.dim,
            "pooling_mode_cls_token": spec.pooling is Pooling.CLS,
            "pooling_mode_mean_tokens": spec.pooling is Pooling.MEAN,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": True,
        },
    )
    # sentence-transformers' own lower-casing stays off: tokenizer.json already does what the model was trained with
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": spec.max_tokens, "do_lower_case": False})
    _dump(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {},
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _front_matter(spec: EncoderSpec) -> str:
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity"]
    if spec.pooling is Pooling.MEAN_PADDED:
        lines[1:2] = ["library_name: transformers"]
    if spec.revision is not None:  # only a hub name is a valid base_model there
        lines.append(f"base_model: {spec.base_model}")
    tags = [tag for tag in CARD_TAGS if spec.pooling is not Pooling.MEAN_PADDED or tag in CARD_TAGS[1:3]]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", "", ""])


def _dump(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
