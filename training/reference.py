"""The plain PyTorch definition of an encoder: what every artefact's vectors are compared with."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoTokenizer, BertModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mirror_runtime.bundle import EncoderSpec, Pooling
from mirror_runtime.errors import BundleError
from training.source import Source


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An encoder as Hugging Face runs it: fp32, evaluation mode, one padded text a row.

    Attributes:
        model: gives `last_hidden_state`.
        tokenizer: the fast tokenizer.
        spec: pooling, normalisation and limits.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: EncoderSpec

    @classmethod
    def load(cls, source: Source) -> Reference:
        """Load weights (as fp32) and tokenizer of a resolved encoder.

        Raises:
            BundleError: a weight or a special token that the forward pass needs is missing.
        """
        return cls(model=load_model(source), tokenizer=load_tokenizer(source), spec=source.spec)

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Encode texts.

        Texts longer than `spec.max_tokens` are truncated. Texts of like length share a batch, which changes nothing
        but the time it takes.

        Returns:
            float32 [n, dim], in the order of the texts.
        """
        vectors = np.zeros((len(texts), self.spec.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), batch_size):
            chosen = order[start : start + batch_size]
            vectors[chosen] = self._encode_batch([texts[i] for i in chosen])
        return vectors

    def _encode_batch(self, texts: list[str]) -> NDArray[np.float32]:
        pad_to = self.spec.pad_to
        batch = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.spec.max_tokens if pad_to is None else min(self.spec.max_tokens, pad_to),
            padding=True,
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if pad_to is not None:
            missing = pad_to - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, missing), value=self.tokenizer.pad_token_id)
            mask = torch.nn.functional.pad(mask, (0, missing))
        with torch.inference_mode():
            hidden = self.model(
                input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)
            ).last_hidden_state
            vectors = pool(hidden, mask, self.spec.pooling, pad_to)
            if self.spec.normalize:
                vectors = torch.nn.functional.normalize(vectors, dim=1)
        array: NDArray[np.float32] = vectors.numpy()
        return array


def pool(
    hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: Pooling, pad_to: int | None = None
) -> torch.Tensor:
    """Turn token vectors into one vector a text.

    Args:
        hidden: float [batch, length, dim].
        attention_mask: int [batch, length], 1 on the text's own tokens.
        pooling: see `Pooling`.
        pad_to: for `mean_padded`: the length that must have been padded to.

    Returns:
        float [batch, dim], not normalised.

    Raises:
        ValueError: `mean_padded` of another length than `pad_to`: it would be a different vector.
    """
    if pooling is Pooling.CLS:
        return hidden[:, 0]
    if pooling is Pooling.MEAN_PADDED:
        if hidden.shape[1] != pad_to:
            raise ValueError(f"mean_padded over {hidden.shape[1]} positions, but pad_to is {pad_to}")
        return hidden.mean(dim=1)
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def load_model(source: Source) -> PreTrainedModel:
    """Load the encoder's weights as fp32, in evaluation mode.

    Raises:
        BundleError: the file lacks weights of the encoder, which would be left at random values.
    """
    try:
        with _quiet_transformers():
            load: Any = BertModel.from_pretrained
            model, loading = load(
                source.folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"the weights in {source.folder} cannot be loaded: {error}") from error
    missing = {name for name in loading["missing_keys"] if not name.startswith("pooler.")}
    if missing or loading["mismatched_keys"]:
        names = ", ".join(sorted(missing) or sorted(str(key) for key in loading["mismatched_keys"]))
        raise BundleError(f"{source.folder} lacks weights that config.json asks for: {names}")
    if loading["missing_keys"]:
        model.pooler = None  # no weights were given for it and no pooling of ours reads it
    model.eval()
    return model  # type: ignore[no-any-return]


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer.

    Raises:
        BundleError: it cannot be loaded, or has no padding token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, use_fast=True)
    except (OSError, ValueError) as error:
        raise BundleError(f"the tokenizer in {source.folder} cannot be loaded: {error}") from error
    tokenizer.padding_side = "right"
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise BundleError(f"the tokenizer in {source.folder} must be a fast one with a padding token")
    return tokenizer


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep loading silent: transformers lists the unused head of a masked language model as if that were a fault."""
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
