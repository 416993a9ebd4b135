"""Encoders with fewer layers than they were loaded with."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from encoders.families import FAMILIES
from encoders.layers import layers_of
from encoders.reference import Reference
from mirror_runtime.errors import InputError


def at_depth(reference: Reference, depth: int) -> Reference:
    """Return an encoder of the first `depth` layers, for which it was trained, with the same head.

    Raises:
        InputError: it has fewer layers, or was not trained for this depth.
    """
    spec, whole = reference.spec, len(layers_of(reference.model))
    if depth == whole:
        return reference
    if depth not in spec.trained_depths:
        trained = ", ".join(map(str, (*spec.trained_depths, whole)))
        hint = "" if spec.trained_depths else " alone: tune.py --depths trains it for others"
        raise InputError(f"--depth {depth}: {spec.base_model} was trained for {trained}{hint}")
    shallower = tuple(other for other in spec.trained_depths if other < depth)
    spec = dataclasses.replace(spec, trained_depths=shallower)
    return dataclasses.replace(keep_layers(reference, range(depth)), spec=spec)


def keep_layers(reference: Reference, layers: Sequence[int]) -> Reference:
    """Return an encoder of some layers, counted from 0, with the same head; it records no trained depths or dimensions.

    Raises:
        InputError: it has no such layers, none is named, or its layers share weights.
        BundleError: the head reads a layer that is not left.
    """
    base, family = reference.spec.base_model, FAMILIES[reference.spec.family]
    whole = len(layers_of(reference.model))
    if family.layers is None or family.group is not None:
        raise InputError(f"{base} has no layers of their own weights ({reference.spec.family}): none can be left out")
    if not layers or not all(0 <= layer < whole for layer in layers) or list(layers) != sorted({*layers}):
        raise InputError(
            f"layers {' '.join(map(str, layers))}: {base} has layers 0 to {whole - 1}; name some, in ascending order"
        )
    model: Any = copy.deepcopy(reference.model)
    parent, _, name = family.layers.rpartition(".")
    found = layers_of(model)
    setattr(model.get_submodule(parent), name, nn.ModuleList(found[layer] for layer in layers))
    model.config.num_hidden_layers = len(layers)
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kinds[layer] for layer in layers]
    spec = dataclasses.replace(reference.spec, trained_depths=(), trained_dims=())
    return dataclasses.replace(reference, model=model, spec=spec)
