"""The PyTorch fp32 reference of an encoder, which proofs compare every artifact's vectors with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from encoders.families import FAMILIES
from encoders.layers import layer_names, layers_of
from encoders.pooling import Tokens, finish, linear_layers, load_dense, make_dense, pool, project, rounded
from encoders.rerankers import CLASSIFIER
from encoders.sentence_transformers import read_json, readable
from encoders.source import ResolvedEncoder
from encoders.static import load_static_model, load_static_tokenizer, unknown_token
from encoders.write import SPECIAL_TOKENS
from mirror_runtime.bundle import TOKENIZER_FILE, EncoderSpec, Pooling
from mirror_runtime.errors import BundleError
from mirror_runtime.packing import ranges
from mirror_runtime.pairs import items_for
from mirror_runtime.tokenizer import Item

HEADS = frozenset({"cls", "lm_head", "classifier", "score", "pooler", "head", "decoder", "predictions"})
"""Weights with these prefixes belong to heads that no encoder here uses."""

PADDED_TEXTS, PADDED_TOKENS = 32, 4096
"""Maximum texts, and maximum tokens including padding, of a padded batch: 32 texts of 128 tokens, 8 of 512."""

PADDED_FILL = 0.85
"""Minimum share of a padded batch's tokens that are not padding: if lengths grow fast, batches end early."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An encoder as Hugging Face runs it: fp32, evaluation mode, one padded text a row.

    Raises:
        BundleError: the model or the tokenizer lacks an input of the head, or the dense layers do not fit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: EncoderSpec
    dense: tuple[nn.Sequential, ...] = ()  # the head's dense layers, as `spec.dense` describes them

    def __post_init__(self) -> None:
        config: Any = self.model.config
        depth, heads, width = len(layers_of(self.model)), config.num_attention_heads, config.hidden_size
        spec, name = self.spec, self.spec.base_model
        for layer in spec.layers:
            if not -depth - 1 <= layer <= depth:
                raise BundleError(f"{name} has {depth} layers and no layer {layer}: layer 0 is the embeddings")
        if max(spec.trained_depths, default=0) >= max(1, depth):
            raise BundleError(f"{name} has {depth} layers, and records that it was trained for {spec.trained_depths}")
        if spec.ditto is not None and not (0 <= spec.ditto.layer < depth and 0 <= spec.ditto.head < heads):
            raise BundleError(
                f"{name} has {depth} layers of {heads} heads, and no head {spec.ditto.layer}:{spec.ditto.head}: "
                "both count from 0"
            )
        if len(self.dense) != len(spec.dense):
            raise BundleError(f"{name} has {len(self.dense)} dense layers where {len(spec.dense)} are recorded")
        if spec.dense and spec.dense[0].in_features != width:
            raise BundleError(
                f"{name} has vectors of {width} components and its dense layer reads {spec.dense[0].in_features}"
            )
        if spec.dim > (spec.dense[-1].out_features if spec.dense else width):
            raise BundleError(f"{name} has vectors of {width} components, fewer than {spec.dim}")
        self._check_tokens(spec, name)

    def _check_tokens(self, spec: EncoderSpec, name: str) -> None:
        if spec.per_token and self.is_static:
            raise BundleError(f"{name} is static: its tokens' vectors are a table, and pooling tokens needs no bundle")
        if spec.pooling is Pooling.MEAN_PADDED and self._hides_from_padding():
            raise BundleError(f"{name} has padding that does not see its text: pooling mean_padded is not supported")
        taken = len(self.tokenizer((spec.template or "").replace("{text}", ""))["input_ids"])
        if not taken and not self.is_static:
            raise BundleError(f"{name} adds no special token to a text, so an empty text would have no vector")
        if spec.template is not None and taken >= spec.max_tokens:
            raise BundleError(
                f"{name}: the prompt takes {taken} of {spec.max_tokens} tokens with the special ones, and leaves no "
                "room for a text: shorten the prompt or raise the limit"
            )
        if spec.pooling is Pooling.MASK and (spec.template or "").count(self.tokenizer.mask_token or "\0") != 1:
            raise BundleError(
                f"pooling mask needs {self.tokenizer.mask_token or 'a mask token'} once in the template, "
                f"which is {spec.template!r}"
            )

    @classmethod
    def load(cls, source: ResolvedEncoder) -> Reference:
        """Load weights (as fp32) and tokenizer of a resolved encoder.

        Raises:
            BundleError: the forward pass needs a weight or a special token that is missing.
        """
        with readable(source.folder):
            model, spec = load_model(source), source.spec
            if spec.scores_pairs:
                layers = zip(spec.dense, linear_layers(model), strict=True)
                dense = [make_dense(one, layer.weight, layer.bias) for one, layer in layers]
                model = cast(PreTrainedModel, model.base_model)
            else:
                dense = [load_dense(one, folder) for one, folder in zip(spec.dense, source.dense, strict=True)]
            reference = cls(model=model, tokenizer=load_tokenizer(source), spec=spec, dense=tuple(dense))
            reference._check_vocabulary()
            # A config may only fail when it computes.
            if not np.isfinite(reference.encode(items_for(spec, ["one text"]))).all():
                raise BundleError(f"{source.folder} computes NaN or infinity for the text 'one text'")
        return reference

    @property
    def is_static(self) -> bool:
        """Whether the encoder is a table of token vectors: see `encoders.static`."""
        return FAMILIES[self.spec.family].is_static

    @cached_property
    def dropped(self) -> int | None:
        """The token that does not count among a text's tokens; None for nearly all encoders."""
        return unknown_token(self.tokenizer.backend_tokenizer) if FAMILIES[self.spec.family].drops_unknown else None

    def _hides_from_padding(self) -> bool:
        """Whether padding does not attend to the whole text, so that its vectors are an accident of the library."""
        if FAMILIES[self.model.config.model_type].disentangled is not None:
            return True
        name = layer_names(self.model).attention
        attentions = [layer.get_submodule(name) for layer in layers_of(self.model)]
        return any(
            getattr(attention, "is_causal", False) or getattr(attention, "sliding_window", None) is not None
            for attention in attentions
        )

    def _check_vocabulary(self) -> None:
        """Check that the embedding table has a row for every token: once a load, as a vocabulary takes long to list."""
        table: Any = self.model.get_input_embeddings()
        rows = table.num_embeddings
        token, largest = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if largest >= rows:
            raise BundleError(
                f"{self.spec.base_model}: tokenizer.json has the token {token!r} with id {largest}, and the embedding "
                f"table has {rows} rows: resize it (resize_token_embeddings) or save the right tokenizer"
            )

    def encode(self, texts: Sequence[Item]) -> NDArray[np.float32]:
        """Encode texts. A reranker takes pairs of a query and a text, and returns their scores as one component.

        Texts longer than `spec.max_tokens` are truncated. Texts of similar length share a batch, which only saves time.

        Returns:
            float32 [n, dim], in the order of the texts: the values that the vector type represents. For `tokens`
            [tokens of all texts, dim], text after text: see `vector_counts`.
        """
        return self._encode(texts, lambda pooled: rounded(finish(pooled, self.dense, self.spec), self.spec))

    def vector_counts(self, texts: Sequence[Item]) -> NDArray[np.int64]:
        """Return the number of vectors of each text, [n]: its tokens for pooling `tokens`, else 1."""
        if not self.spec.per_token:
            return np.ones(len(texts), np.int64)
        return np.array([*map(len, self.tokenize([str(text) for text in texts]))], np.int64)

    def encode_uncut(self, texts: Sequence[Item]) -> NDArray[np.float32]:
        """Encode texts to float32 [n, width], through the last dense layer: neither cut nor normalised nor rounded."""
        return self._encode(texts, lambda pooled: project(pooled, self.dense))

    def encode_unnormalized(self, texts: Sequence[Item]) -> NDArray[np.float32]:
        """Encode texts to float32 [n, dim], through the cut: neither normalised nor rounded to the vector type."""
        return self.encode_uncut(texts)[:, : self.spec.dim]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's token ids: template and text together, including special tokens.

        A text with too many tokens loses tokens that lie wholly within the text, from its end.
        """
        if not texts:
            return []
        limit, template = min(self.spec.max_tokens, self.spec.pad_to or self.spec.max_tokens), self.spec.template
        if template is None:
            ids: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
            return ids
        encoded = self.tokenizer(
            [template.replace("{text}", text) for text in texts],
            truncation=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        begin = template.index("{text}")
        rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        return [_truncate(row, spans, added, begin, begin + len(text), limit) for text, row, spans, added in rows]

    def _tokenize_pairs(self, pairs: Sequence[Item]) -> tuple[list[list[int]], list[list[int]]]:
        """Return each pair's token ids and token types; a long pair loses tokens of its longer part."""
        queries, texts = zip(*pairs, strict=True) if pairs else ((), ())
        joined: Any = self.tokenizer(
            list(queries), list(texts), truncation=True, max_length=self.spec.max_tokens, return_token_type_ids=True
        )
        return joined["input_ids"], joined["token_type_ids"]

    def _encode(self, texts: Sequence[Item], head: Callable[[torch.Tensor], torch.Tensor]) -> NDArray[np.float32]:
        if self.spec.scores_pairs:
            ids, types = self._tokenize_pairs(texts)
        else:
            ids, types = self.tokenize([str(text) for text in texts]), []
        lengths = np.array([self.spec.pad_to or len(row) for row in ids], np.int64)
        order = list(padded_batches(lengths))
        parts = []
        for batch in order:
            with torch.inference_mode():
                tokens = self._run([ids[i] for i in batch], [types[i] for i in batch if types])
                parts.append(head(pool(tokens, self.spec)))
        if not parts:
            return np.zeros((0, self.spec.dim), np.float32)
        vectors = torch.cat(parts).float()  # under bf16 autocast a head may end in bf16, which NumPy does not have
        done = np.concatenate(order)
        counts = lengths if self.spec.per_token else np.ones_like(lengths)
        starts = np.empty_like(counts)
        starts[done] = np.cumsum(counts[done]) - counts[done]
        array: NDArray[np.float32] = vectors[torch.from_numpy(ranges(starts, counts))].numpy()
        return array

    def _run(self, ids: list[list[int]], types: list[list[int]]) -> Tokens:
        spec = self.spec
        length = spec.pad_to or max(1, *map(len, ids))
        padding = [0 if self.is_static else self.tokenizer.pad_token_id]
        input_ids = torch.tensor([row + padding * (length - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        options: dict[str, Any] = {}
        if types and FAMILIES[spec.family].token_types:
            options["token_type_ids"] = torch.tensor([row + [0] * (length - len(row)) for row in types])
        marked = attention = None
        if spec.pooling is Pooling.MASK:
            marked = self._marked(input_ids)
        if spec.ditto is None:
            out = self.model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, **options)
        else:
            with eager_attention(self.model):
                out = self.model(
                    input_ids=input_ids, attention_mask=mask, output_hidden_states=True, output_attentions=True
                )
            attention = out.attentions[spec.ditto.layer][:, spec.ditto.head]
        if self.dropped is not None:
            mask = mask * (input_ids != self.dropped)
        return Tokens(states=out.hidden_states, mask=mask, marked=marked, attention=attention)

    def _marked(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Find the template's mask token, the first or last one of each row: a text may contain mask tokens too."""
        assert self.spec.template is not None
        begin, _, _ = self.spec.template.partition("{text}")
        found: torch.Tensor = input_ids == self.tokenizer.mask_token_id
        if str(self.tokenizer.mask_token) in begin:
            return found & (found.cumsum(dim=1) == 1)
        return found & (found.flip(1).cumsum(dim=1).flip(1) == 1)


def padded_batches(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of texts, by ascending length, in batches that the limits above allow.

    A text of more than `PADDED_TOKENS` tokens is a batch by itself.
    """
    order = np.argsort(lengths, kind="stable")
    begin = used = 0
    for at, length in enumerate(lengths[order].tolist()):
        size, used = at + 1 - begin, used + length
        padded = size * length
        if size > 1 and (size > PADDED_TEXTS or padded > PADDED_TOKENS or used < PADDED_FILL * padded):
            yield order[begin:at]
            begin, used = at, length
    if order.size:
        yield order[begin:]


def _truncate(
    ids: list[int], offsets: list[tuple[int, int]], added: list[int], begin: int, end: int, limit: int
) -> list[int]:
    """Drop tokens within characters `begin` to `end`, the last ones first, until `limit` are left."""
    droppable = [i for i, (a, b) in enumerate(offsets) if not added[i] and begin <= a and b <= end]
    dropped = set(droppable[len(droppable) - max(0, len(ids) - limit) :] if len(ids) > limit else ())
    return [token for i, token in enumerate(ids) if i not in dropped]


def load_model(source: ResolvedEncoder) -> PreTrainedModel:
    """Load the encoder's weights as fp32, in evaluation mode.

    Raises:
        BundleError: the file lacks weights of the encoder, which would keep random values.
    """
    if FAMILIES[source.spec.family].is_static:
        return _finite(load_static_model(source.folder, source.spec.family), source)
    try:
        with _quiet_transformers():
            loader = CLASSIFIER if source.spec.scores_pairs else FAMILIES[source.spec.family].loader
            load: Any = getattr(transformers, loader).from_pretrained
            model, loading = load(
                source.folder,
                trust_remote_code=False,  # the native class, also where the folder names code
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except KeyError as error:
        raise BundleError(f"{source.folder}/config.json names {error}, which transformers does not know") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"the weights in {source.folder} cannot be loaded: {error}") from error
    missing = {name for name in loading["missing_keys"] if not name.startswith("pooler.")}
    if missing or loading["mismatched_keys"]:
        names = sorted(missing) or sorted(str(key) for key in loading["mismatched_keys"])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise BundleError(f"{source.folder} lacks weights of the model in config.json: {', '.join(names[:3])}{more}")
    foreign = [name for name in loading["unexpected_keys"] if name.split(".")[0] not in HEADS]
    if foreign and hasattr(model.config, "auto_map"):
        raise BundleError(
            f"{source.folder} names code of its own (auto_map), which is never run, and has weights that transformers' "
            f"{type(model).__name__} lacks: {', '.join(sorted(foreign)[:3])}"
        )
    if loading["missing_keys"]:
        model.pooler = None  # it has no weights in the file, and no pooling reads it
    return _finite(model.eval(), source)


def _finite(model: PreTrainedModel, source: ResolvedEncoder) -> PreTrainedModel:
    if bad := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise BundleError(f"the weights in {source.folder} hold NaN or infinite numbers: {', '.join(bad[:3])}")
    return model


def load_tokenizer(source: ResolvedEncoder) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer exactly as `tokenizer.json` defines it, which is the file that all other tools read.

    The family's tokenizer class only supplies the names of the special tokens: transformers 5 rebuilds its classes from
    their vocabulary, and splits some texts differently from the file.

    Raises:
        BundleError: it cannot be loaded, or has no padding token.
    """
    path = source.folder / TOKENIZER_FILE
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise BundleError(f"{path} is not a tokenizer: {error}") from error
    if FAMILIES[source.spec.family].is_static:
        return load_static_tokenizer(backend)
    try:
        with _quiet_transformers():
            known = AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, use_fast=True, trust_remote_code=False
            )
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend,
            model_max_length=known.model_max_length,
            model_input_names=known.model_input_names,
            **{name: str(token) for name in SPECIAL_TOKENS if (token := getattr(known, name)) is not None},
        )
    except (OSError, ValueError) as error:
        raise BundleError(f"the tokenizer in {source.folder} cannot be loaded: {error}") from error
    check_settings(source.folder, backend, known)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        raise BundleError(f"the tokenizer in {source.folder} has no padding token: add one")
    return tokenizer


def check_settings(folder: Path, file: Tokenizer, known: PreTrainedTokenizerBase) -> None:
    """Raise where `tokenizer_config.json`, which transformers reads too, contradicts `tokenizer.json`.

    Every engine, server and client here reads `tokenizer.json` alone, as other tools do; transformers does not, so a
    contradiction means other vectors than the encoder's author has.

    Raises:
        BundleError: they differ in case, in added tokens, or in the side on which long texts are cut.
    """
    problem = ""
    cased, lower = ("A Quick FOX", "a quick fox")
    ids = file.encode(cased, add_special_tokens=False).ids
    theirs = known(cased, add_special_tokens=False)["input_ids"]
    both = file.encode(lower, add_special_tokens=False).ids, known(lower, add_special_tokens=False)["input_ids"]
    if ids != theirs and both[0] == both[1]:
        problem = f"{TOKENIZER_FILE} {'lower-cases' if ids == both[0] else 'keeps the case of'} texts"
    path = folder / "tokenizer_config.json"
    config = read_json(path, dict) if path.is_file() else {}
    named = {str(token.get("content")) for token in (config.get("added_tokens_decoder") or {}).values()}
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key) or ()
        named |= set(map(str, extra.values() if isinstance(extra, dict) else extra))
    added = {token.content for token in file.get_added_tokens_decoder().values()}
    if unknown := sorted(named - added):
        problem = f"{TOKENIZER_FILE} does not have the added tokens {', '.join(map(repr, unknown[:3]))}"
    if known.truncation_side != "right":
        problem = f"truncation_side is {known.truncation_side!r}, and only the end of long texts can be cut"
    if problem:
        raise BundleError(
            f"{path} contradicts {TOKENIZER_FILE}: {problem}. Load the tokenizer with "
            "transformers, check which is right, and save it again with save_pretrained"
        )


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model to attention in matrix products, which returns probabilities, while the block runs."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers while the block runs: it warns of the unused head of a masked language model."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
