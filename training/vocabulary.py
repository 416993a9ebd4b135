"""Cut an encoder's vocabulary to the tokens of a corpus. All other words fall back to pieces of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from encoders.families import FAMILIES
from encoders.reference import Reference
from encoders.static import load_static_tokenizer
from encoders.supported import CUTTABLE
from encoders.write import SPECIAL_TOKENS
from mirror_runtime.errors import BundleError, InputError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")

TEXTS_AT_ONCE = 4096


def cut_vocabulary(reference: Reference, texts: Sequence[str]) -> Reference:
    """Return an encoder without the tokens that occur in none of the texts.

    Special and added tokens stay, and single characters, so that a word that was made of tokens is still made of
    tokens. The texts have the same tokens as before, and so the same vectors, although the tokens have new numbers.

    Raises:
        InputError: its tokenizer is of another kind than `CUTTABLE`.
        BundleError: the texts' tokens would change.
    """
    base = reference.spec.base_model
    state = json.loads(reference.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    kind = state["model"]["type"]
    if kind not in CUTTABLE:
        raise InputError(
            f"{base} has a {kind} tokenizer, whose tokens build each other: only {' and '.join(CUTTABLE)} can be cut"
        )
    before = Tokenizer.from_str(json.dumps(state))
    kept = {token for ids, _ in _encoded(before, texts) for token in ids}
    kept |= _required(state, before.get_vocab(with_added_tokens=False))
    if FAMILIES[reference.spec.family].skips_padding:  # whose positions start behind the padding token's number
        kept |= {*range(int(reference.tokenizer.pad_token_id) + 1)}
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    _renumber(state, numbers)
    after = Tokenizer.from_str(json.dumps(state))
    for (ids, tokens), (new_ids, new_tokens) in zip(_encoded(before, texts), _encoded(after, texts), strict=True):
        if tokens != new_tokens or [numbers[one] for one in ids] != new_ids:
            raise BundleError(f"{base}: with fewer tokens, {' '.join(tokens[:20])!r} would be tokenised differently")
    return dataclasses.replace(reference, model=_cut_table(reference, numbers), tokenizer=_rebuilt(reference, after))


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        for one in tokenizer.encode_batch(texts[start : start + TEXTS_AT_ONCE]):
            yield one.ids, one.tokens


def _required(state: Mapping[str, Any], pieces: Mapping[str, int]) -> set[int]:
    """Return those of a tokenizer's own `pieces` that must stay whatever the texts, and its added tokens.

    A token with a character that is not a token by itself stays as well: nothing could take its place.
    """
    model = state["model"]
    mark = model.get("continuing_subword_prefix") or ""

    def letters(piece: str) -> list[str]:
        inner = bool(mark) and piece.startswith(mark) and piece != mark
        text = piece.removeprefix(mark) if inner else piece
        return [f"{mark if inner or i else ''}{letter}" for i, letter in enumerate(text)]

    alone = {
        number
        for piece, number in pieces.items()
        if len(letters(piece)) == 1 or BYTE.fullmatch(piece) or not all(letter in pieces for letter in letters(piece))
    }
    unknown = model["unk_id"] if "unk_id" in model else pieces.get(model["unk_token"])
    return alone | {one["id"] for one in state["added_tokens"]} | (set() if unknown is None else {unknown})


def _renumber(state: dict[str, Any], numbers: Mapping[int, int]) -> None:
    """Replace the numbers of tokens everywhere in a `tokenizer.json`, and drop the tokens without a new one."""
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in numbers]
        model["unk_id"] = numbers.get(model["unk_id"])
    for one in state["added_tokens"]:
        one["id"] = numbers[one["id"]]
    for step in _steps(state["post_processor"]):
        for special in step.get("special_tokens", {}).values():
            special["ids"] = [numbers[old] for old in special["ids"]]
        for name in ("cls", "sep"):
            if name in step:
                step[name][1] = numbers[step[name][1]]


def _steps(processor: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    if processor is None:
        return ()
    return processor["processors"] if processor["type"] == "Sequence" else (processor,)


def _rebuilt(reference: Reference, backend: Tokenizer) -> PreTrainedTokenizerBase:
    if reference.is_static:
        return load_static_tokenizer(backend)
    old = reference.tokenizer
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        model_max_length=old.model_max_length,
        model_input_names=old.model_input_names,
        padding_side=old.padding_side,
        **{name: str(token) for name in SPECIAL_TOKENS if (token := getattr(old, name)) is not None},
    )


def _cut_table(reference: Reference, numbers: Mapping[int, int]) -> Any:
    model: Any = copy.deepcopy(reference.model)
    table = model.get_input_embeddings().weight
    rows = nn.Parameter(table.detach()[torch.tensor(list(numbers))].clone(), requires_grad=table.requires_grad)
    for module in model.modules():
        if getattr(module, "weight", None) is table:
            module.weight, module.num_embeddings = rows, len(numbers)
            if module.padding_idx is not None:
                module.padding_idx = numbers.get(module.padding_idx)
    config = model.config
    for name, value in vars(config).items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, numbers.get(value))
    config.vocab_size = len(numbers)
    return model
