"""Refuse configurations that no description in `encoders.families` can state, by the name of the part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from encoders.families import FAMILIES, Family
from mirror_runtime.errors import BundleError

FOREIGN_PARTS: Mapping[str, str] = {
    "alibi": "ALiBi positions",
    "use_alibi": "ALiBi positions",
    "alibi_starting_size": "ALiBi positions",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "lora_adaptations": "adapters",
    "adapters": "adapters",
    "conv_kernel_size": "a convolution between layers",
    "attn_logit_softcapping": "a soft cap on attention scores",
    "use_task_id": "task embeddings",
}
"""Keys of `config.json` that are set if the encoder has a part that no description can state."""

CUTTABLE = ("WordPiece", "Unigram")
"""Tokenizers that find the tokens of a word among all of them, so that a vocabulary can be cut. BPE builds long tokens
from rarer, shorter ones."""

ROTATION_KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies do not depend on the text."""

ROTATED_SHARES = ("partial_rotary_factor", "rotary_emb_fraction", "rotary_pct")
"""Keys of the share of a head that rotary positions turn; all of it is supported."""

PARTS: Mapping[str, tuple[tuple[str, ...], Callable[[Family], object]]] = {
    "rotary positions": (("rope_theta", "rope_parameters", "rotary_emb_base"), lambda f: f.rotary),
    "relative positions": (("relative_attention_num_buckets",), lambda f: f.relative_bias),
    "disentangled positions": (("position_buckets", "pos_att_type"), lambda f: f.disentangled),
    "an attention window": (("sliding_window", "local_attention"), lambda f: f.windowed),
    "grouped keys and values": (("num_key_value_heads",), lambda f: f.words == "embed_tokens"),
    "RMSNorm": (("rms_norm_eps",), lambda f: f.layer.attention_residual.pre_norm),
    "shared layers": (("num_hidden_groups",), lambda f: f.group),
    "a narrower embedding table": (("embedding_size",), lambda f: len(f.embedding_steps) > 2),
}
"""Parts that descriptions have: the keys that tell of them, and whether a family has them."""


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Check that a `config.json` describes an encoder of `FAMILIES` and nothing that its description leaves out.

    Code of the folder (`auto_map`) is never run: a family that transformers knows is loaded by the native class.

    Raises:
        BundleError: it names the part that is not supported.
    """
    name = config.get("model_type", "")
    family = FAMILIES.get(name)
    architectures = config.get("architectures") or []
    causal = any(str(model).endswith(("ForCausalLM", "LMHeadModel")) for model in architectures)
    if config.get("is_decoder") or (causal and not (family and family.is_language_model)):
        raise BundleError(
            f"{folder} is a causal language model ({', '.join(architectures) or name}): use an encoder of "
            f"a supported family ({', '.join(FAMILIES)})"
        )
    if family is None:
        raise BundleError(f"{folder} {_unknown(config, name)}")
    for key, allowed in family.requires.items():
        if config.get(key) not in allowed:
            raise BundleError(
                f"{folder}/config.json has {key} {config.get(key)!r}, and only {allowed[0]!r} is supported"
            )
    if parts := sorted({part for key, part in FOREIGN_PARTS.items() if config.get(key)}):
        raise BundleError(f"{folder}/config.json states {', '.join(parts)}, which is not supported")
    _check_rotations(config, folder)
    for size in filter(None, (family.dim, family.longest)):
        if not isinstance(config.get(size), int):
            raise BundleError(f"{folder}/config.json has no {size}: it is not a complete {name} configuration")


def _check_rotations(config: Mapping[str, Any], folder: Path) -> None:
    if kinds := sorted(set(_rotation_kinds(config)) - set(ROTATION_KINDS)):
        raise BundleError(
            f"{folder}/config.json scales rotary positions by {', '.join(kinds)}: "
            f"{', '.join(ROTATION_KINDS)} are supported"
        )
    for part in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        stated = part if isinstance(part, Mapping) else {}
        for key in ROTATED_SHARES:
            if stated.get(key) not in (None, 1):
                raise BundleError(f"{folder}/config.json has {key} {stated[key]}: only whole heads are rotated here")


def _unknown(config: Mapping[str, Any], name: str) -> str:
    """Describe a family without an entry: its parts that are known, and the family that has most of them."""
    code = " and code of its own (auto_map), which is never run" if "auto_map" in config else ""
    text = f"has model_type {name!r}{code}: the supported families are {', '.join(FAMILIES)}"
    known = {part for part, (keys, _) in PARTS.items() if any(config.get(key) for key in keys)}
    if not known:
        return text

    def shared(family: Family) -> int:
        own = {part for part, (_, has) in PARTS.items() if has(family)}
        return len(own & known) - len(own ^ known)

    nearest = max(FAMILIES, key=lambda other: shared(FAMILIES[other]))
    return f"{text}. It has {', '.join(sorted(known))}; the nearest family is {nearest} (encoders/families.py)"


def _rotation_kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the kinds of rotary positions, in the old and in the new key, of the model or of each kind of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        stated = config.get(key)
        for value in (stated, *stated.values()) if isinstance(stated, dict) else ():
            if isinstance(value, dict) and (kind := value.get("rope_type") or value.get("type")):
                yield str(kind)
