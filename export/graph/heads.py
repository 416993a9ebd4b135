"""The heads of `EncoderSpec` as modules that both graphs hold: token vectors in, text vectors of the final type out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from encoders.families import Pick
from encoders.reference import Reference
from mirror_runtime.bundle import ONE_TOKEN, TOKENS_PER_SLOT, EncoderSpec, Pooling, VectorType
from mirror_runtime.vectors import LARGEST_INT8

EPSILON = 1e-12
"""Smallest norm divided by, as `torch.nn.functional.normalize` has it."""


@dataclass(frozen=True)
class Segments:
    """Where the texts of a batch lie in its rows: the same for both layouts.

    Attributes:
        own: bool [R, K, L]: the tokens of text k in row r, without padding.
        slots: bool [R, K, L]: the same with the padding that belongs to the text.
        positions: int64 [R, L]: 0, 1, … within each text.
    """

    own: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def packed(cls, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> Segments:
        """Find the texts of packed rows, K = L // `TOKENS_PER_SLOT` of them, the last ones mostly empty."""
        numbers = torch.arange(1, segment_ids.shape[1] // TOKENS_PER_SLOT + 1)[None, :, None]
        rows = segment_ids[:, None, :]
        return cls(own=rows == numbers, slots=rows.abs() == numbers, positions=position_ids)

    @classmethod
    def padded(cls, attention_mask: torch.Tensor) -> Segments:
        """Find the one text of each padded row, K = 1."""
        own = attention_mask.to(torch.bool)[:, None, :]
        positions = torch.arange(attention_mask.shape[1])[None, :].expand_as(attention_mask)
        return cls(own=own, slots=torch.ones_like(own), positions=positions)

    def at(self, index: int) -> torch.Tensor:
        """Find each text's token number `index`, negative from its end: bool [R, K, L]."""
        positions = self.positions[:, None, :]
        if index < 0:
            positions = positions - self.own.sum(-1, keepdim=True)
        return self.own & (positions == index)


class PickTokens:
    """Takes one position for each text out of rows: a `Pick`, see `encoders.families`.

    Args:
        where: bool [R, K, L], at most one True a text; a text without any gets the row's first position.
    """

    def __init__(self, where: torch.Tensor) -> None:
        rows, slots, length = where.shape
        starts = torch.arange(rows)[:, None] * length
        self._index = (where.to(torch.float32).argmax(-1) + starts).flatten()
        self._rows, self._slots = rows, slots

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Take float [R, n, L, X], give [R, n, K, X]."""
        # One row of a table for each position: Gather, which every engine has, and no product to be quantised.
        table = values.transpose(1, 2).flatten(0, 1)
        chosen = table.index_select(0, self._index)
        return chosen.reshape(self._rows, self._slots, *chosen.shape[1:]).transpose(1, 2)


class Head(nn.Module):
    """Everything between token vectors and the graph's output.

    Args:
        reference: whose head it is.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.spec = reference.spec
        self.dense = nn.ModuleList(reference.dense)
        self.index = token_index(reference)

    @property
    def attentions_of(self) -> int | None:
        """The layer whose attention the head reads."""
        return None if self.spec.ditto is None else self.spec.ditto.layer

    def picked(self, segments: Segments) -> Pick | None:
        """Say which rows of the last layer are enough; None where all are needed."""
        return None if self.index is None else PickTokens(segments.at(self.index))

    def forward(
        self,
        states: Sequence[torch.Tensor],
        segments: Segments,
        *,
        pruned: bool,
        probabilities: torch.Tensor | None,
    ) -> torch.Tensor:
        """Pool each text and bring its vector into the final form.

        Args:
            states: of the embeddings and of each layer, float [R, L, width].
            segments: where the texts lie.
            pruned: whether the last layer's holds one token for each text, [R, K, width].
            probabilities: of the layer that Ditto reads, float [R, heads, L, L].

        Returns:
            [R, K, width of the vector type]; zeros for slots without a text.
        """
        pooled = self._pool(states, segments, pruned, probabilities)
        for layer in self.dense:
            pooled = layer(pooled)
        pooled = pooled[..., : self.spec.dim]
        # Dense layers with a bias, and a picked first position, give empty slots something.
        pooled = pooled * segments.own.any(-1, keepdim=True).to(pooled.dtype)
        if self.spec.normalize:
            pooled = pooled / (pooled * pooled).sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
        return _typed(pooled, self.spec)

    def _pool(
        self,
        states: Sequence[torch.Tensor],
        segments: Segments,
        pruned: bool,
        probabilities: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.index is not None:
            pick = PickTokens(segments.at(self.index))
            last = len(states) - 1
            return _average(
                [
                    states[layer] if pruned and layer % len(states) == last else pick(states[layer][:, None])[:, 0]
                    for layer in self.spec.layers
                ]
            )
        hidden = _average([states[layer] for layer in self.spec.layers])
        if self.spec.pooling is Pooling.MAX:
            return self._maximum(hidden, segments)
        weights = self._weights(hidden, segments, probabilities)
        empty = ~segments.own.any(-1, keepdim=True)
        return (weights @ hidden) / (weights.sum(-1, keepdim=True) + empty.to(hidden.dtype))

    def _weights(self, hidden: torch.Tensor, segments: Segments, probabilities: torch.Tensor | None) -> torch.Tensor:
        """Give the weights of a mean's tokens, float [R, K, L]."""
        if self.spec.pooling is Pooling.MEAN_PADDED:
            return segments.slots.to(hidden.dtype)
        weights = segments.own.to(hidden.dtype)
        if self.spec.pooling is Pooling.WEIGHTED_MEAN:
            return weights * (segments.positions + 1).to(hidden.dtype)[:, None, :]
        if self.spec.ditto is not None:
            assert probabilities is not None
            places = torch.arange(hidden.shape[1])
            diagonal = (places[:, None] == places[None, :]).to(hidden.dtype)
            return weights * (probabilities[:, self.spec.ditto.head] * diagonal).sum(-1)[:, None, :]
        return weights

    def _maximum(self, hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Give each text's largest components: a running maximum within texts, read at their last tokens.

        Each step doubles the reach, so that no array has more elements than the token vectors, where comparing every
        slot with every token has K times as many.
        """
        reach = 1
        while reach < self.spec.max_tokens:
            # A token `reach` places ahead is of the same text where the position is not smaller than that.
            before = nn.functional.pad(hidden, (0, 0, reach, 0))[:, : hidden.shape[1]]
            same = (segments.positions >= reach)[:, :, None]
            hidden = torch.where(same, torch.maximum(hidden, before), hidden)
            reach *= 2
        return PickTokens(segments.at(-1))(hidden[:, None])[:, 0]


def token_index(reference: Reference) -> int | None:
    """Give the number of the token that a pooling reads, negative from the text's end; None where it reads several.

    What lies between the template's mask token and the near end of the string is tokenised the same whatever the text
    is: the mask token splits the string before the tokenizer's model sees it.
    """
    pooling = reference.spec.pooling
    if pooling not in ONE_TOKEN:
        return None
    if pooling is not Pooling.MASK:
        return 0 if pooling is Pooling.CLS else -1
    assert reference.spec.template is not None
    before, _, _ = reference.spec.template.partition("{text}")
    (ids,) = reference.tokenize([""])
    at = ids.index(reference.tokenizer.mask_token_id)
    return at if str(reference.tokenizer.mask_token) in before else at - len(ids)


def _average(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    total = layers[0]
    for layer in layers[1:]:
        total = total + layer
    return total / len(layers) if len(layers) > 1 else total


def _typed(vectors: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """Bring components to the spec's vector type; zeros stay zeros."""
    if spec.vector_type is VectorType.FLOAT16:
        return vectors.to(torch.float16)
    if spec.vector_type is VectorType.INT8:
        assert spec.int8_scale is not None
        return (vectors / spec.int8_scale).round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    if spec.vector_type is VectorType.BINARY:
        # Sums of powers of two up to 255: exact in every precision.
        bits = (vectors > 0).to(vectors.dtype).reshape(*vectors.shape[:-1], spec.dim // 8, 8)
        return (bits * torch.tensor([2.0**bit for bit in range(7, -1, -1)])).sum(-1).to(torch.uint8)
    return vectors
