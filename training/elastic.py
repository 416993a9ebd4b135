"""Encoders that also work with fewer components and fewer layers (2D Matryoshka, Li et al. 2024).

A step runs all layers once. The head is also applied to the states after earlier layers, and the loss is the mean over
every combination of depth and number of leading components: unlike the published code, which draws one of each a step,
because the loss costs little beside the layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from encoders.families import FAMILIES
from encoders.layers import layers_of
from encoders.reference import Reference
from mirror_runtime.errors import InputError
from training.recipe import TuneConfig


def elastic_loss(
    depths: list[torch.Tensor],
    dims: tuple[int, ...],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    distil: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Compute the mean of a loss over depths and numbers of components, plus the mean distance to the full depth.

    Args:
        depths: float [examples, sides, dim] after all layers, then after each number of first layers.
        dims: numbers of leading components, besides all.
        loss_of: the loss of such vectors, of any number of components.
        distil: the distance of an earlier depth's vectors to the full depth's, which get no gradient; None for none.
    """
    losses = [loss_of(vectors[..., :dim]) for vectors in depths for dim in (vectors.shape[-1], *dims)]
    loss = torch.stack(losses).mean()
    if distil is None or len(depths) == 1:
        return loss
    whole = depths[0].detach()
    return loss + torch.stack([distil(vectors, whole) for vectors in depths[1:]]).mean()


def trained_dims(config: TuneConfig, reference: Reference) -> tuple[int, ...]:
    """Return the numbers of leading components, fewer than all, that a run trains for, ascending."""
    return tuple(sorted({*config.matryoshka} - {reference.spec.dim}))


def trained_depths(config: TuneConfig, reference: Reference) -> tuple[int, ...]:
    """Return the numbers of first layers, fewer than all, that a run trains for, ascending."""
    return tuple(sorted({*config.depths} - {len(layers_of(reference.model))}))


def check_elastic(reference: Reference, config: TuneConfig) -> None:
    """Check that an encoder can be trained for a run's dimensions and depths.

    Raises:
        InputError: it has fewer, shares weights between layers, or the run leaves an early depth untrained.
    """
    spec, whole = reference.spec, len(layers_of(reference.model))
    if max(config.matryoshka, default=0) > spec.dim:
        raise InputError(f"--matryoshka {max(config.matryoshka)}: the encoder's vectors have {spec.dim} components")
    if not config.depths:
        return
    if max(config.depths) > whole:
        raise InputError(f"--depths {max(config.depths)}: the encoder has {whole} layers")
    if FAMILIES[spec.family].group is not None:
        raise InputError(f"--depths: an encoder of the family {spec.family} shares its layers' weights: leave it out")
    lowest = min(config.depths)
    if not all(-lowest - 1 <= layer <= lowest for layer in spec.layers):
        raise InputError(f"--depths {lowest}: the encoder pools layer {max(spec.layers, key=abs)}, which it would lack")
    if config.train_layers is not None and lowest <= whole - config.train_layers:
        raise InputError(
            f"--train-layers {config.train_layers} leaves the first {whole - config.train_layers} layers as they are, "
            f"and so depth {lowest}: raise one of them"
        )
