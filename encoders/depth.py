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
from mirror_runtime.bundle import EncoderSpec
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

    Layers that the head counts from the first are the same ones under new numbers; the last is the last that is left.

    Raises:
        InputError: it has no such layers, none is named, its layers share weights, or the head reads another one.
    """
    base, family = reference.spec.base_model, FAMILIES[reference.spec.family]
    whole = len(layers_of(reference.model))
    if family.layers is None or family.group is not None:
        raise InputError(f"{base} has no layers of their own weights ({reference.spec.family}): none can be left out")
    if not layers or not all(0 <= layer < whole for layer in layers) or list(layers) != sorted({*layers}):
        raise InputError(
            f"layers {' '.join(map(str, layers))}: {base} has layers 0 to {whole - 1}; name some, in ascending order"
        )
    spec = dataclasses.replace(_renumbered(reference.spec, layers), trained_depths=(), trained_dims=())
    model: Any = copy.deepcopy(reference.model)
    parent, _, name = family.layers.rpartition(".")
    found = layers_of(model)
    setattr(model.get_submodule(parent), name, nn.ModuleList(found[layer] for layer in layers))
    model.config.num_hidden_layers = len(layers)
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kinds[layer] for layer in layers]
    return dataclasses.replace(reference, model=model, spec=spec)


def _renumbered(spec: EncoderSpec, layers: Sequence[int]) -> EncoderSpec:
    states = {0: 0} | {layer + 1: number for number, layer in enumerate(layers, 1)}  # of the embeddings, of each layer
    read = [*spec.layers, *([] if spec.ditto is None else [spec.ditto.layer + 1])]
    if missing := [state for state in read if state > 0 and state not in states]:
        raise InputError(
            f"the head of {spec.base_model} reads layer {missing[0] - 1} (counted from 0): keep that layer"
        )
    ditto = spec.ditto and dataclasses.replace(spec.ditto, layer=states[spec.ditto.layer + 1] - 1)
    return dataclasses.replace(spec, layers=tuple(states.get(state, state) for state in spec.layers), ditto=ditto)
