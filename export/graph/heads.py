"""The pooling heads of `EncoderSpec` as modules inside both graphs: token vectors in, text vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from encoders.layers import Pick
from encoders.reference import Reference
from mirror_runtime.bundle import ONE_TOKEN, TOKENS_PER_SLOT, EncoderSpec, Pooling, VectorType
from mirror_runtime.vectors import LARGEST_INT8

EPSILON = 1e-12
"""The smallest norm to divide by, as in `torch.nn.functional.normalize`."""


@dataclass(frozen=True)
class Segments:
    """Where the texts of a batch lie in its rows, in a form that both layouts share."""

    tokens: torch.Tensor  # bool [R, K, L]: the tokens of text k in row r, without padding
    padded_tokens: torch.Tensor  # bool [R, K, L]: the same with the padding that belongs to the text
    positions: torch.Tensor  # int64 [R, L]: 0, 1, … within each text

    @classmethod
    def from_packed(cls, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> Segments:
        """Locate the texts of packed rows: K = L // `TOKENS_PER_SLOT` slots, of which the last are mostly empty."""
        numbers = torch.arange(1, segment_ids.shape[1] // TOKENS_PER_SLOT + 1)[None, :, None]
        rows = segment_ids[:, None, :]
        return cls(tokens=rows == numbers, padded_tokens=rows.abs() == numbers, positions=position_ids)

    @classmethod
    def from_padded(cls, attention_mask: torch.Tensor) -> Segments:
        """Locate the single text of each padded row: K = 1."""
        tokens = attention_mask.to(torch.bool)[:, None, :]
        positions = torch.arange(attention_mask.shape[1])[None, :].expand_as(attention_mask)
        return cls(tokens=tokens, padded_tokens=torch.ones_like(tokens), positions=positions)

    def without(self, dropped: torch.Tensor) -> Segments:
        """Leave out tokens that do not count, bool [R, L]."""
        return replace(self, tokens=self.tokens & ~dropped[:, None, :])

    def token_at(self, index: int) -> torch.Tensor:
        """Locate token number `index` of each text, counted from its end if negative: bool [R, K, L]."""
        positions = self.positions[:, None, :]
        if index < 0:
            positions = positions - self.tokens.sum(-1, keepdim=True)
        return self.tokens & (positions == index)


class PickTokens:
    """Select one position of each text: a `Pick`, see `encoders.layers`.

    `where` is bool [R, K, L], at most one True for each text; without one, the row's first position is selected.
    """

    def __init__(self, where: torch.Tensor) -> None:
        rows, slots, length = where.shape
        starts = torch.arange(rows)[:, None] * length
        self._index = (where.to(torch.float32).argmax(-1) + starts).flatten()
        self._rows, self._slots = rows, slots

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Select from float [R, n, L, X]; returns [R, n, K, X]."""
        # Positions are rows of a table: a Gather, which every engine has, instead of a product that would be quantised.
        table = values.transpose(1, 2).flatten(0, 1)
        chosen = table.index_select(0, self._index)
        return chosen.reshape(self._rows, self._slots, *chosen.shape[1:]).transpose(1, 2)


class Head(nn.Module):
    """Everything between token vectors and the graph's output."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.spec = reference.spec
        self.dense = nn.ModuleList(reference.dense)
        self.index = token_index(reference)
        self.static, self.dropped = reference.is_static, reference.dropped

    @property
    def attentions_of(self) -> int | None:
        """The layer whose attention probabilities the head reads; None where it reads none."""
        return None if self.spec.ditto is None else self.spec.ditto.layer

    def counted(self, segments: Segments, input_ids: torch.Tensor) -> Segments:
        """Leave out the token that does not count, if there is one: see `Reference.dropped`."""
        return segments if self.dropped is None else segments.without(input_ids == self.dropped)

    def token_pick(self, segments: Segments) -> Pick | None:
        """Return the selection of the last layer's rows that the head needs; None where it needs all of them."""
        return None if self.index is None else PickTokens(segments.token_at(self.index))

    def forward(
        self,
        states: Sequence[torch.Tensor],
        segments: Segments,
        *,
        pruned: bool,
        probabilities: torch.Tensor | None,
    ) -> torch.Tensor:
        """Pool each text and convert its vector to the final form.

        Args:
            states: the embeddings and the output of each layer, float [R, L, width].
            segments: where the texts lie.
            pruned: whether the last layer holds one token for each text only, [R, K, width].
            probabilities: attention of the layer that Ditto reads, float [R, heads, L, L].

        Returns:
            [R, K, width of the vector type]; zeros for slots without a text. For `tokens` [R, L, width]; zeros for
            places without a token.
        """
        if self.spec.per_token:
            pooled = _average([states[layer] for layer in self.spec.layers])
        else:
            pooled = self._pool(states, segments, pruned, probabilities)
        for layer in self.dense:
            pooled = layer(pooled)
        pooled = pooled[..., : self.spec.dim]
        # Dense layers with a bias, and the selected first position, leave values in empty slots. A text without tokens,
        # which only static encoders have, is a slot with padding.
        held = segments.padded_tokens if self.static else segments.tokens
        held = held.any(1).unsqueeze(-1) if self.spec.per_token else held.any(-1, keepdim=True)
        pooled = pooled * held.to(pooled.dtype)
        if self.spec.normalize:
            pooled = pooled / (pooled * pooled).sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
        return _convert(pooled, self.spec)

    def _pool(
        self,
        states: Sequence[torch.Tensor],
        segments: Segments,
        pruned: bool,
        probabilities: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.index is not None:
            pick = PickTokens(segments.token_at(self.index))
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
        empty = ~segments.tokens.any(-1, keepdim=True)
        return (weights @ hidden) / (weights.sum(-1, keepdim=True) + empty.to(hidden.dtype))

    def _weights(self, hidden: torch.Tensor, segments: Segments, probabilities: torch.Tensor | None) -> torch.Tensor:
        """Compute the weight of each token in a weighted mean, float [R, K, L]."""
        if self.spec.pooling is Pooling.MEAN_PADDED:
            return segments.padded_tokens.to(hidden.dtype)
        weights = segments.tokens.to(hidden.dtype)
        if self.spec.pooling is Pooling.WEIGHTED_MEAN:
            return weights * (segments.positions + 1).to(hidden.dtype)[:, None, :]
        if self.spec.ditto is not None:
            assert probabilities is not None
            places = torch.arange(hidden.shape[1])
            diagonal = (places[:, None] == places[None, :]).to(hidden.dtype)
            return weights * (probabilities[:, self.spec.ditto.head] * diagonal).sum(-1)[:, None, :]
        return weights

    def _maximum(self, hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Compute each text's largest components: a running maximum within texts, read at their last tokens.

        Each step doubles the distance covered, so no array has more elements than the token vectors. Comparing every
        slot with every token would need K times as many.
        """
        reach = 1
        while reach < self.spec.max_tokens:
            # The token `reach` places earlier belongs to the same text where the position is at least `reach`.
            before = nn.functional.pad(hidden, (0, 0, reach, 0))[:, : hidden.shape[1]]
            same = (segments.positions >= reach)[:, :, None]
            hidden = torch.where(same, torch.maximum(hidden, before), hidden)
            reach *= 2
        return PickTokens(segments.token_at(-1))(hidden[:, None])[:, 0]


def token_index(reference: Reference) -> int | None:
    """Return the index of the token that a pooling reads, negative from the text's end; None where it reads several.

    The part between the template's mask token and the nearer end of the string has the same tokens for every text,
    because the tokenizer splits the string at the mask token first.
    """
    pooling = reference.spec.pooling
    if pooling not in ONE_TOKEN:
        return None
    if pooling is not Pooling.MASK:
        return -1 if pooling is Pooling.LAST else 0
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


def _convert(vectors: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """Convert components to the spec's vector type; zeros stay zeros."""
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
