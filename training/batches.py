"""The batches of a run: examples in the order of the seed, their views tokenised and packed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from encoders.reference import Reference
from mirror_runtime.errors import InputError
from training.augment import Document, Example, MaskViews, mask_span, mask_span_literally, repeat_tokens
from training.documents import draw_views
from training.hardware import Hardware
from training.objective import Objective, Variant
from training.packed import POOLINGS, PackedTexts, pack, row_length
from training.recipe import TuneConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The texts of one step."""

    packed: PackedTexts  # this process's texts: first views, then second views if the objective has them
    texts: int  # number of this process's examples
    groups: torch.Tensor  # int64 [examples of all processes]: equal for texts that are the same to the model
    layers: torch.Tensor  # int64 [this process's examples]: layer drawn for each, 0 for the embeddings
    tokens: int  # of all views and processes


def batches(
    reference: Reference, data: Sequence[Example], config: TuneConfig, hardware: Hardware, skip: int = 0
) -> Iterator[Batch]:
    """Yield this process's part of the batches of a run, which are the same in every run with the same seed.

    The first `skip` batches are drawn and not prepared, because an earlier run has finished them.
    """
    limit = min(config.max_tokens, reference.spec.max_tokens)
    reference = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, max_tokens=limit))
    rng = random.Random(config.seed)
    depth: int = reference.model.config.num_hidden_layers
    draws_layers = config.objective is Objective.SELF_GUIDED and config.variant is not Variant.OPT3
    # Second views repeat tokens; pairs never do.
    repeats = config.repetition > 0 and config.objective is Objective.MIRROR and isinstance(data[0], str)
    done = 0
    for _ in range(config.epochs):
        order = rng.sample(data, len(data))
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            examples = order[start : start + config.batch_size]
            views = [_views(example, reference, config, rng) for example in examples]
            layers = [rng.randint(0, depth) for _ in examples] if draws_layers else []
            # Drawn here although tokens are repeated later: a skipped batch must advance the generator equally.
            seeds = [rng.getrandbits(32) for _ in examples] if repeats else []
            done += 1
            if done > skip:
                yield _prepare(views, layers, seeds, reference, config, hardware)


def check(reference: Reference, data: Sequence[Example], config: TuneConfig, hardware: Hardware) -> None:
    """Check that the recipe can be used with this encoder, corpus and hardware.

    Raises:
        InputError: the head cannot be tuned, the corpus is smaller than a batch, the processes cannot share a batch
            evenly, the tokenizer has no mask token, or the objective needs single texts and gets pairs.
    """
    spec = reference.spec
    if spec.pooling not in POOLINGS or spec.dense:
        head = "dense layers behind its pooling" if spec.dense else f"pooling {spec.pooling.value}"
        raise InputError(
            f"an encoder with {head} cannot be tuned: use {', '.join(pooling.value for pooling in POOLINGS)} without "
            "dense layers"
        )
    if spec.template is not None:
        raise InputError(f"an encoder with the template {spec.template!r} cannot be tuned: use one without")
    if len(data) < config.batch_size:
        raise InputError(
            f"the corpus has {len(data)} distinct lines, fewer than one batch of {config.batch_size}: "
            "add text or lower --batch-size"
        )
    if config.batch_size % hardware.processes:
        raise InputError(f"--batch-size is {config.batch_size}: {hardware.processes} processes cannot share it evenly")
    pairs = not isinstance(data[0], str)
    if pairs and config.objective is Objective.SELF_GUIDED:
        raise InputError("--objective self-guided learns from single texts, not from pairs: use --objective mirror")
    masks = config.mask_length > 0 and not config.reference_masking and not pairs
    if masks and reference.tokenizer.mask_token is None:
        raise InputError("the tokenizer has no mask token: set --mask-length 0")


def _views(example: Example, reference: Reference, config: TuneConfig, rng: random.Random) -> tuple[str, str]:
    if isinstance(example, Document):
        first, second = draw_views(example, config.views, rng)
        if first != second:
            return first, second
        example = first
    if not isinstance(example, str):
        return example
    if config.reference_masking:
        return example, mask_span_literally(example, config.mask_length, rng)
    mask = str(reference.tokenizer.mask_token)
    second = mask_span(example, mask, config.mask_length, rng)
    if config.mask_views is MaskViews.SECOND:
        return example, second
    return mask_span(example, mask, config.mask_length, rng), second


def _prepare(
    views: Sequence[tuple[str, str]],
    layers: Sequence[int],
    seeds: Sequence[int],
    reference: Reference,
    config: TuneConfig,
    hardware: Hardware,
) -> Batch:
    firsts = reference.tokenize([first for first, _ in views])
    if config.objective is Objective.SELF_GUIDED:
        sides, groups = [firsts], group(firsts)
    else:
        seconds = reference.tokenize([second for _, second in views])
        groups = group(firsts, seconds)
        if seeds:
            seconds = [
                repeat_tokens(ids, config.repetition, config.max_tokens, random.Random(seed))
                for ids, seed in zip(seconds, seeds, strict=True)
            ]
        sides = [firsts, seconds]
    share = hardware.share(len(views))
    return Batch(
        packed=pack(
            [ids for side in sides for ids in side[share]],
            length=row_length(reference.spec.pad_to or config.max_tokens),
            pad_id=int(reference.tokenizer.pad_token_id),
            pad_to=reference.spec.pad_to,
        ),
        texts=len(views) // hardware.processes,
        groups=groups,
        layers=torch.tensor(layers[share], dtype=torch.int64),
        tokens=sum(len(ids) for side in sides for ids in side),
    )


def group(*sides: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return a group number for each example, int64 [examples], equal for examples that share a text.

    Distinct lines may be equal to the model if they differ in case, in white space, or only after the limit. In a
    corpus of pairs a text may have several partners, which must not be negatives of each other. `sides` are the token
    ids of the examples' first views, and of their second views.
    """
    parents = list(range(len(sides[0])))

    def root(example: int) -> int:
        while parents[example] != example:
            example = parents[example]
        return example

    seen: dict[tuple[int, ...], int] = {}
    for side in sides:
        for example, ids in enumerate(side):
            one, other = sorted((root(example), root(seen.setdefault(tuple(ids), example))))
            parents[other] = one
    return torch.tensor([root(example) for example in range(len(parents))])
