"""The batches of a run: examples in the order of the seed, their views tokenised and packed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from encoders.reference import Reference
from mirror_runtime.errors import InputError
from training.augment import (
    Document,
    Example,
    MaskViews,
    Scored,
    mask_span,
    mask_span_literally,
    repeat_tokens,
    texts_of,
)
from training.documents import draw_views
from training.elastic import check_elastic
from training.hardware import Hardware
from training.hybrid import HybridScores
from training.packed import POOLINGS, PackedTexts, pack, row_length
from training.recipe import SCORED, SINGLE, Objective, TuneConfig, Variant
from training.trained import check_trained


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The texts of one step."""

    packed: PackedTexts  # this process's texts: first views, then second views if the objective has them, then others
    texts: int  # number of this process's examples
    sides: int  # most texts of an example of any process
    places: torch.Tensor  # int64 [this process's texts]: example x sides + side of each
    groups: torch.Tensor  # int64 [examples of all processes]: equal for texts that are the same to the model
    # int64 [examples of all processes, sides - 2]: the group of a hard negative, -1 for none; -2 where there is none
    negatives: torch.Tensor
    targets: torch.Tensor  # float32 [examples of all processes, …]: scores, or a teacher's vectors
    layers: torch.Tensor  # int64 [this process's examples]: layer drawn for each, 0 for the embeddings
    tokens: int  # of all views and processes


def batches(
    reference: Reference,
    data: Sequence[Example],
    config: TuneConfig,
    hardware: Hardware,
    skip: int = 0,
    targets: torch.Tensor | HybridScores | None = None,
) -> Iterator[Batch]:
    """Yield this process's part of the batches of a run, which are the same in every run with the same seed.

    The first `skip` batches are drawn and not prepared, because an earlier run has finished them. `targets` are a
    teacher's vectors of the data, float32 [examples, dim], or scores of documents, which also order them.
    """
    limit = min(config.max_tokens, reference.spec.max_tokens)
    reference = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, max_tokens=limit))
    rng = random.Random(config.seed)
    depth: int = reference.model.config.num_hidden_layers
    draws_layers = config.objective is Objective.SELF_GUIDED and config.variant is not Variant.OPT3
    # Second views of one text repeat tokens; pairs never do.
    repeats = config.repetition > 0 and config.objective is Objective.MIRROR
    targets = targets_of(data) if targets is None else targets
    done = 0
    for _ in range(config.epochs):
        if isinstance(targets, HybridScores):
            order = targets.order(config.batch_size, rng)
        else:
            order = rng.sample(range(len(data)), len(data))
        for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
            examples = order[start : start + config.batch_size]
            drawn = [_drawn(data[example], config, rng) for example in examples]
            views = [_views(one, reference, config, rng) for one in drawn]
            layers = [rng.randint(0, depth) for _ in examples] if draws_layers else []
            # Drawn here although tokens are repeated later: a skipped batch must advance the generator equally.
            seeds = {i: rng.getrandbits(32) for i, one in enumerate(drawn) if repeats and isinstance(one, str)}
            done += 1
            if done > skip:
                batch = _prepare(views, layers, seeds, reference, config, hardware)
                yield batch if targets is None else dataclasses.replace(batch, targets=targets[examples])


def targets_of(data: Sequence[Example]) -> torch.Tensor | None:
    """Return the scores of scored pairs, float32 [examples]; None for other data."""
    scores = [example.score for example in data if isinstance(example, Scored)]
    return torch.tensor(scores) if scores else None


def check(reference: Reference, data: Sequence[Example], config: TuneConfig, hardware: Hardware) -> None:
    """Check that the recipe can be used with this encoder, corpus and hardware.

    Raises:
        InputError: the head cannot be tuned, the corpus is smaller than a batch, the processes cannot share a batch
            evenly, the tokenizer has no mask token, or the objective needs single texts and gets pairs.
    """
    spec = reference.spec
    if spec.pooling not in POOLINGS:
        raise InputError(
            f"an encoder with pooling {spec.pooling.value} cannot be tuned: use "
            f"{', '.join(pooling.value for pooling in POOLINGS)}"
        )
    if spec.template is not None:
        raise InputError(f"an encoder with the template {spec.template!r} cannot be tuned: use one without")
    if len(data) < config.batch_size:
        raise InputError(
            f"the corpus has {len(data)} distinct {'lines' if isinstance(data[0], str) else 'examples'}, fewer than "
            f"one batch of {config.batch_size}: add text or lower --batch-size"
        )
    if config.batch_size % hardware.processes:
        raise InputError(f"--batch-size is {config.batch_size}: {hardware.processes} processes cannot share it evenly")
    _check_objective(spec.dense != (), data, config.objective)
    check_trained(reference.model, config.train_layers, config.lora, spec.layers)
    check_elastic(reference, config)
    # The views of a document may be one text.
    masks = config.mask_length > 0 and not config.reference_masking and isinstance(data[0], (str, Document))
    if masks and reference.tokenizer.mask_token is None:
        raise InputError("the tokenizer has no mask token: set --mask-length 0")


def _check_objective(dense: bool, data: Sequence[Example], objective: Objective) -> None:
    scored = isinstance(data[0], Scored)
    name = f"--objective {objective.value}"
    if objective is Objective.HYBRID and not isinstance(data[0], Document):
        raise InputError(f"{name} learns from titles and texts: pass --documents")
    if objective in SINGLE and not isinstance(data[0], str):
        raise InputError(f"{name} learns from single texts, not from pairs: use --objective mirror")
    if objective in SCORED and not scored:
        raise InputError(f"{name} learns from scored pairs: pass --scored-pairs, with columns score and two texts")
    if scored and objective not in SCORED:
        raise InputError(f"{name} learns nothing from scores: use --objective cosent or angle")
    if scored and len({example.score for example in data if isinstance(example, Scored)}) < 2:
        raise InputError("the corpus has one score for all pairs: scores must differ")
    if dense and objective is Objective.SELF_GUIDED:
        raise InputError(f"{name} cannot tune an encoder with dense layers behind its pooling: use --objective mirror")


def _drawn(example: Example, config: TuneConfig, rng: random.Random) -> Example:
    """Return a document's views, or the text that both of them are; other examples as they are."""
    if not isinstance(example, Document):
        return example
    first, second = draw_views(example, config.views, rng)
    return first if first == second else (first, second)


def _views(example: Example, reference: Reference, config: TuneConfig, rng: random.Random) -> tuple[str, ...]:
    if not isinstance(example, str):
        return texts_of(example)
    if config.objective in SINGLE:
        return (example,)
    if config.reference_masking:
        return example, mask_span_literally(example, config.mask_length, rng)
    mask = str(reference.tokenizer.mask_token)
    second = mask_span(example, mask, config.mask_length, rng)
    if config.mask_views is MaskViews.SECOND:
        return example, second
    return mask_span(example, mask, config.mask_length, rng), second


def _prepare(
    views: Sequence[tuple[str, ...]],
    layers: Sequence[int],
    seeds: Mapping[int, int],
    reference: Reference,
    config: TuneConfig,
    hardware: Hardware,
) -> Batch:
    sides = max(map(len, views))
    slots = [(one, side) for side in range(sides) for one, texts in enumerate(views) if side < len(texts)]
    tokens = dict(zip(slots, reference.tokenize([views[one][side] for one, side in slots]), strict=True))
    groups = group(*([tokens[one, side] for one in range(len(views))] for side in range(min(sides, 2))))
    negatives = _negative_groups(tokens, groups, sides)
    for one, seed in seeds.items():
        tokens[one, 1] = repeat_tokens(tokens[one, 1], config.repetition, config.max_tokens, random.Random(seed))
    share = hardware.share(len(views))
    own = [(one, side) for one, side in slots if share.start <= one < share.stop]
    return Batch(
        packed=pack(
            [tokens[slot] for slot in own],
            length=row_length(reference.spec.pad_to or config.max_tokens),
            pad_id=int(reference.tokenizer.pad_token_id),
            pad_to=reference.spec.pad_to,
        ),
        texts=len(views) // hardware.processes,
        sides=sides,
        places=torch.tensor([(one - share.start) * sides + side for one, side in own]),
        groups=groups,
        negatives=negatives,
        targets=torch.empty(0),
        layers=torch.tensor(layers[share], dtype=torch.int64),
        tokens=sum(map(len, tokens.values())),
    )


def _negative_groups(tokens: Mapping[tuple[int, int], Sequence[int]], groups: torch.Tensor, sides: int) -> torch.Tensor:
    """Return `Batch.negatives`: a hard negative may be the text of an example, even of its own."""
    known = {tuple(ids): int(groups[one]) for (one, side), ids in tokens.items() if side < 2}
    found = torch.full((len(groups), max(0, sides - 2)), -2)
    for (one, side), ids in tokens.items():
        if side >= 2:
            found[one, side - 2] = known.get(tuple(ids), -1)
    return found


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
