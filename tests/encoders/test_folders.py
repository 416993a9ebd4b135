"""A matrix of odd model folders: we compute what sentence-transformers computes from each, or refuse it by name.

Each folder is a small BERT with one or two files changed, as repositories of the last years have them. Silent
differences are the fault that this file exists for: a refusal must name the setting, and never come from a traceback.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoders.reference import Reference
from encoders.sentence_transformers import ACTIVATION_CLASSES, LEGACY_POOLING_KEYS, POOLING_MODES, TRANSFORMER_FILES
from encoders.source import resolve
from mirror_runtime.bundle import Activation, Pooling
from mirror_runtime.errors import BundleError
from tests.support.tiny_encoders import write_pylate

Change = Callable[[Path], object]

TEXTS = ("the cat sat on the mat.", "A Man is Playing a Guitar", "", "dog river " * 40, "newword the mat", "cat")
"""Ragged, with upper case, a word that some folders add to their tokenizer, and one beyond every limit."""

ST = "sentence_transformers.models."


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def put(name: str, value: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    return change


def merge(name: str, **values: object) -> Change:
    """Set keys of a JSON file, which may be absent."""
    return lambda folder: put(name, (read(folder / name) if (folder / name).is_file() else {}) | values)(folder)


def modules(*kinds: str) -> Change:
    """List modules: the Transformer in the root, the others in folders of their number."""
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": ST + kind}
        for i, kind in enumerate(kinds)
    ]
    return put("modules.json", listed)


def all_of(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def pooling(**config: object) -> Change:
    return put("1_Pooling/config.json", {"word_embedding_dimension": 32, **config})


def dense(activation: str, *, bias: bool = True, **more: object) -> Change:
    def change(folder: Path) -> None:
        modules("Transformer", "Pooling", "Dense")(folder)
        config = {"in_features": 32, "out_features": 8, "bias": bias, "activation_function": activation, **more}
        put("2_Dense/config.json", config)(folder)
        weights = {"linear.weight": torch.linspace(-1, 1, 256).reshape(8, 32)} | (
            {"linear.bias": torch.ones(8)} if bias else {}
        )
        save_file(weights, folder / "2_Dense" / "model.safetensors")

    return change


def settings(**values: object) -> Change:
    """Write the settings of the Transformer module."""
    return put(TRANSFORMER_FILES[0], values)


def options(**values: object) -> Change:
    """Write the options of the whole model."""
    return put(CONFIG, values)


def tokenizer(**values: object) -> Change:
    """Change top-level parts of tokenizer.json."""
    return merge("tokenizer.json", **values)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def move_transformer(folder: Path) -> None:
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name != "modules.json":
            path.rename(inner / path.name)
    listed = read(folder / "modules.json")
    listed[0]["path"] = "0_Transformer"
    put("modules.json", listed)(folder)


FLAGS: dict[str, object] = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": False}
CASED: dict[str, object] = {"type": "BertNormalizer", **FLAGS}
LOWER = {"type": "Lowercase"}
ADDED = {"content": "newword"} | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
BERT_FILE, CONFIG = TRANSFORMER_FILES[0], "config_sentence_transformers.json"
PROMPTS = {"query": "the cat ", "own": "a dog "}

FOLDERS: dict[str, Change] = {
    **{f"limit in {name}": put(name, {"max_seq_length": 9}) for name in TRANSFORMER_FILES},
    **{
        f"lower case in {name}, cased tokenizer": all_of(
            put(name, {"do_lower_case": True}), tokenizer(normalizer=CASED)
        )
        for name in TRANSFORMER_FILES[:3]
    },
    "first settings file empty, second counts": all_of(
        put(BERT_FILE, {}), put(TRANSFORMER_FILES[2], {"max_seq_length": 9})
    ),
    "two settings files, the first counts": all_of(
        settings(max_seq_length=12), put(TRANSFORMER_FILES[2], {"max_seq_length": 9})
    ),
    "lower case, tokenizer lower-cases": settings(do_lower_case=True),
    "lower case, Lowercase normalizer": all_of(settings(do_lower_case=True), tokenizer(normalizer=LOWER)),
    "lower case, Lowercase in a sequence": all_of(
        settings(do_lower_case=True),
        tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, LOWER]}),
    ),
    "limit null": settings(max_seq_length=None),
    "limit beyond the positions": settings(max_seq_length=100),
    "limit as text": settings(max_seq_length="9"),
    "tokenizer_args limit": settings(tokenizer_args={"model_max_length": 9}),
    "processor_kwargs limit": settings(processor_kwargs={"model_max_length": 9}),
    "processor_kwargs limit before max_seq_length": settings(
        max_seq_length=20, processor_kwargs={"model_max_length": 9}
    ),
    "tokenizer_args before processor_kwargs": settings(
        tokenizer_args={"model_max_length": 9}, processor_kwargs={"model_max_length": 20}
    ),
    "processor_kwargs lower case, cased tokenizer": all_of(
        settings(processor_kwargs={"do_lower_case": True}), tokenizer(normalizer=CASED)
    ),
    "processor_kwargs keeps case, uncased tokenizer": settings(processor_kwargs={"do_lower_case": False}),
    "processor_kwargs truncates left": settings(processor_kwargs={"truncation_side": "left"}),
    "processor_kwargs truncates right": settings(processor_kwargs={"truncation_side": "right"}),
    "processor_kwargs pads left": settings(processor_kwargs={"padding_side": "left"}),
    "processor_kwargs without special tokens": settings(processor_kwargs={"add_special_tokens": False}),
    "processor_kwargs of another kind": settings(processor_kwargs={"strip_accents": True}),
    "model_args dtype": settings(model_args={"torch_dtype": "float32"}),
    "model_args half precision": settings(model_args={"torch_dtype": "float16"}),
    "model_kwargs attention": settings(model_kwargs={"attn_implementation": "eager"}),
    "model_kwargs of another kind": settings(model_kwargs={"num_hidden_layers": 1}),
    "config_kwargs fewer layers": settings(config_kwargs={"num_hidden_layers": 1}),
    "config_args other epsilon": settings(config_args={"layer_norm_eps": 0.1}),
    "processing_kwargs limit": settings(processing_kwargs={"text": {"max_length": 9, "truncation": True}}),
    "feature extraction": settings(transformer_task="feature-extraction"),
    "fill mask": settings(transformer_task="fill-mask"),
    "modality of text": settings(
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    ),
    "pooler output as tokens": settings(
        modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}},
        module_output_name="sentence_embedding",
    ),
    "unpadded inputs": settings(unpad_inputs=True),
    "settings not JSON": lambda folder: (folder / BERT_FILE).write_text("{"),
    "settings a list": put(BERT_FILE, []),
    "tokenizer_config: lower case, cased tokenizer": all_of(
        tokenizer(normalizer=CASED), merge("tokenizer_config.json", do_lower_case=True, tokenizer_class="BertTokenizer")
    ),
    "tokenizer_config: cased, lower-casing tokenizer": merge(
        "tokenizer_config.json", do_lower_case=False, tokenizer_class="BertTokenizer"
    ),
    "tokenizer_config: lower case as the tokenizer": merge(
        "tokenizer_config.json", do_lower_case=True, tokenizer_class="BertTokenizer"
    ),
    "tokenizer_config: limit": merge("tokenizer_config.json", model_max_length=9),
    "tokenizer_config: huge limit": merge("tokenizer_config.json", model_max_length=int(1e30)),
    "tokenizer_config: truncation side": merge("tokenizer_config.json", truncation_side="left"),
    "tokenizer_config: padding side": merge("tokenizer_config.json", padding_side="left"),
    "tokenizer_config: an added token": merge("tokenizer_config.json", added_tokens_decoder={"74": ADDED}),
    "tokenizer_config: extra special tokens": merge("tokenizer_config.json", extra_special_tokens=["newword"]),
    "tokenizer_config: a word as a special token": merge("tokenizer_config.json", additional_special_tokens=["cat"]),
    "tokenizer_config: absent": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "tokenizer.json: truncation and padding": tokenizer(
        truncation={"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
    ),
    "tokenizer.json: cased alone": tokenizer(normalizer=CASED),
    "tokenizer.json: no normalizer": tokenizer(normalizer=None),
    "tokenizer.json: absent": lambda folder: (folder / "tokenizer.json").unlink(),
    "truncate_dim": options(truncate_dim=8),
    "truncate_dim beyond the width": options(truncate_dim=99),
    "truncate_dim before Normalize": all_of(modules("Transformer", "Pooling", "Normalize"), options(truncate_dim=8)),
    "truncate_dim null": options(truncate_dim=None),
    "default prompt": options(prompts=PROMPTS, default_prompt_name="own"),
    "default prompt without a text": options(prompts={}, default_prompt_name="query"),
    "default prompt that is not there": options(prompts=PROMPTS, default_prompt_name="typo"),
    "default prompt beyond the limit": options(prompts={"own": "dog " * 99}, default_prompt_name="own"),
    "prompts without a default": options(prompts=PROMPTS, default_prompt_name=None),
    "default prompt outside the pooling": all_of(
        options(prompts=PROMPTS, default_prompt_name="own"), pooling(pooling_mode="mean", include_prompt=False)
    ),
    **{f"pooling {mode}": pooling(pooling_mode=mode) for mode in (*POOLING_MODES, "mean_sqrt_len_tokens")},
    **{
        f"old pooling {old}": pooling(pooling_mode_mean_tokens=False, **{old: True})
        for old in LEGACY_POOLING_KEYS
        if old != "pooling_mode_mean_tokens"
    },
    "old pooling: two modes": pooling(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True),
    "old pooling: nothing is true": pooling(pooling_mode_mean_tokens=False),
    "pooling: nothing stated": pooling(),
    "pooling: two modes": pooling(pooling_mode=["mean", "max"]),
    "pooling: a list of one": pooling(pooling_mode=["cls"]),
    "modules: Dropout": all_of(
        modules("Transformer", "Pooling", "Dropout"), put("2_Dropout/config.json", {"dropout": 0.5})
    ),
    "modules: Normalize": modules("Transformer", "Pooling", "Normalize"),
    "modules: Normalize twice": modules("Transformer", "Pooling", "Normalize", "Normalize"),
    "modules: LayerNorm": modules("Transformer", "Pooling", "LayerNorm"),
    "modules: Dense after Normalize": modules("Transformer", "Pooling", "Normalize", "Dense"),
    "modules: LSTM": modules("Transformer", "LSTM", "Pooling"),
    "modules: without a type": put("modules.json", [{"idx": 0, "name": "0", "path": ""}]),
    "modules: strings": put("modules.json", ["Transformer", "Pooling"]),
    "modules: a path outside": put(
        "modules.json", [{"idx": 0, "name": "0", "path": "../x", "type": f"{ST}Transformer"}]
    ),
    "modules: the transformer in its own folder": move_transformer,
    **{f"dense {kind.value}": dense(ACTIVATION_CLASSES[kind]) for kind in Activation},
    "dense without bias": dense(ACTIVATION_CLASSES[Activation.IDENTITY], bias=False),
    "dense that writes elsewhere": dense(ACTIVATION_CLASSES[Activation.IDENTITY], module_output_name=""),
    "dense of tokens": dense(ACTIVATION_CLASSES[Activation.IDENTITY], module_input_name="token_embeddings"),
    "dense without a width": dense(ACTIVATION_CLASSES[Activation.IDENTITY], in_features=None),
    "dense with a residual": dense(ACTIVATION_CLASSES[Activation.IDENTITY], use_residual=True),
    "dense, another activation": dense("torch.nn.modules.activation.SiLU"),
    "adapter beside the weights": put("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x"}),
    "NaN in the weights": weights(lambda tensors: tensors["embeddings.word_embeddings.weight"][5].fill_(float("nan"))),
    "infinity in the weights": weights(
        lambda tensors: tensors["encoder.layer.0.output.dense.bias"].fill_(float("inf"))
    ),
    "weights missing": weights(lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight")),
    "config: relative positions": merge("config.json", position_embedding_type="relative_key"),
    "config: another activation": merge("config.json", hidden_act="relu"),
    "config: unknown activation": merge("config.json", hidden_act="mystery"),
    "config: pad_token_id null": merge("config.json", pad_token_id=None),
    "config: wrong vocab_size": merge("config.json", vocab_size=999),
    "config: fewer rows than tokens": all_of(
        merge("config.json", vocab_size=30),
        weights(
            lambda tensors: tensors.update(
                {"embeddings.word_embeddings.weight": tensors["embeddings.word_embeddings.weight"][:30].clone()}
            )
        ),
    ),
}

REFUSALS_NAME = {
    "config_kwargs fewer layers": "num_hidden_layers",
    "tokenizer_config: truncation side": "truncation_side",
    "processor_kwargs truncates left": "truncation_side",
    "tokenizer_config: an added token": "newword",
    "truncate_dim before Normalize": "truncate_dim",
    "default prompt that is not there": "typo",
    "adapter beside the weights": "adapter_config",
    "NaN in the weights": "NaN",
    "weights missing": "encoder.layer.1.output.dense.weight",
    "config: fewer rows than tokens": "embedding",
    "modules: Dense after Normalize": "Normalize, Dense: the order must be",
    "modules: LSTM": "sentence_transformers.models.LSTM",
    "pooling: two modes": "pooling mean + max",
    "old pooling: two modes": "pooling max + mean",
    "dense of tokens": "something other than the text's vector",
    "dense with a residual": "something other than the text's vector",
    "dense without a width": "no integers in_features",
    "dense, another activation": "SiLU: it must be one of identity, tanh, relu, gelu",
}
"""What the message of a refusal must contain, for the settings where that is not obvious."""


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    made = Path(shutil.copytree(tiny_bert, tmp_path / "encoder"))
    all_of(modules("Transformer", "Pooling"), pooling(pooling_mode="mean"))(made)
    return made


def ours(folder: Path) -> np.ndarray:
    return Reference.load(resolve(str(folder))).encode(TEXTS)


@pytest.mark.slow  # a hundred folders, each loaded twice
@pytest.mark.parametrize("name", FOLDERS)
def test_the_vectors_are_those_of_sentence_transformers_or_the_folder_is_refused(folder: Path, name: str) -> None:
    from sentence_transformers import SentenceTransformer  # seconds, which no fast test needs

    FOLDERS[name](folder)
    try:
        found, refusal = ours(folder), ""
    except BundleError as error:
        found, refusal = np.zeros(0), str(error)
    if refusal:
        assert REFUSALS_NAME.get(name, "") in refusal
        assert folder.name in refusal
        return
    assert name not in REFUSALS_NAME
    # One text a batch: where it pads on the left, its vectors depend on the neighbours, and ours never do.
    expected = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), batch_size=1)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pooling_tokens_reads_a_folder_up_to_its_pooling_and_pylates_as_recorded(folder):
    dense(ACTIVATION_CLASSES[Activation.TANH])(folder)
    plain = resolve(str(folder), pooling=Pooling.TOKENS, text_vectors=False).spec
    assert (plain.pooling, plain.dense, plain.dim, plain.normalize) == (Pooling.TOKENS, (), 32, True)
    write_pylate(folder)
    source = resolve(str(folder), text_vectors=False)
    assert (source.spec.pooling, source.spec.dim) == (Pooling.TOKENS, 8)
    assert source.prompts == {"query": "[Q] ", "document": "[D] "}
    with pytest.raises(BundleError, match="has no vector of a text"):
        resolve(str(folder))
    merge("config_sentence_transformers.json", attend_to_expansion_tokens=True)(folder)
    with pytest.raises(BundleError, match="attend_to_expansion_tokens"):
        resolve(str(folder), text_vectors=False)
