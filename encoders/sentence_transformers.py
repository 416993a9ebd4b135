"""Read the head of a sentence-transformers folder: `modules.json` in either of its two schemas."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import TOKENIZER_FILE, Activation, Dense, Pooling
from mirror_runtime.errors import BundleError

POOLING_MODES = {
    "mean": Pooling.MEAN,
    "cls": Pooling.CLS,
    "max": Pooling.MAX,
    "weightedmean": Pooling.WEIGHTED_MEAN,
    "lasttoken": Pooling.LAST,
}
"""The supported modes of sentence-transformers, by their new names."""

LEGACY_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

ACTIVATION_CLASSES = {
    Activation.IDENTITY: "torch.nn.modules.linear.Identity",
    Activation.TANH: "torch.nn.modules.activation.Tanh",
    Activation.RELU: "torch.nn.modules.activation.ReLU",
    Activation.GELU: "torch.nn.modules.activation.GELU",
}
"""Their class names in sentence-transformers folders."""

KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
"""The supported modules, in their required order."""

PROMPT = "template"
"""The prompt's name in a written folder, for a template that only precedes the text."""


def dense_folder(index: int) -> str:
    """Return the name of a dense layer's folder in run folders and bundles."""
    return f"{index + 2}_Dense"


@dataclass(frozen=True, kw_only=True)
class RecordedEncoder:
    """The encoder that a folder records."""

    folder: Path  # holds the transformer
    pooling: Pooling  # of the token vectors
    dense: tuple[Dense, ...]  # layers after it
    dense_folders: tuple[Path, ...]  # of their weights
    normalize: bool  # whether vectors are scaled to unit length
    max_tokens: int | None  # None if no limit is recorded
    template: str | None  # the default prompt; None if the folder has none


def read_modules(root: Path) -> RecordedEncoder:
    """Read a sentence-transformers folder.

    Raises:
        BundleError: the folder is malformed, or has a module or setting that is not supported.
    """
    found: list[tuple[str, Path]] = []
    for module in read_json(root / "modules.json", list):
        package, kind = module["type"].split(".", 1)[0], module["type"].rsplit(".", 1)[-1]
        if package != "sentence_transformers" or kind not in KINDS:
            raise BundleError(
                f"{root} has a module {module['type']}: only sentence_transformers' {', '.join(KINDS[:-1])} and "
                f"{KINDS[-1]} are supported"
            )
        found.append((kind, root / module.get("path", "")))
    order = [kind for kind, _ in found]
    if "Pooling" not in order:
        raise BundleError(f"{root}/modules.json has no Pooling module, so it has no single vector for a text")
    if order != sorted(order, key=KINDS.index) or any(order.count(kind) > 1 for kind in KINDS if kind != "Dense"):
        raise BundleError(f"{root}/modules.json lists {', '.join(order)}: the order must be {', '.join(KINDS)}")
    folder = next((path for kind, path in found if kind == "Transformer"), root)
    pooling, takes_prompt = _read_pooling(next(path for kind, path in found if kind == "Pooling") / "config.json")
    dense = tuple(path for kind, path in found if kind == "Dense")
    return RecordedEncoder(
        folder=folder,
        pooling=pooling,
        dense=tuple(_read_dense(path / "config.json") for path in dense),
        dense_folders=dense,
        normalize="Normalize" in order,
        max_tokens=_read_max_seq_length(folder),
        template=_read_prompt(root, takes_prompt),
    )


def _read_pooling(path: Path) -> tuple[Pooling, bool]:
    """Return the pooling and whether it covers a prompt's tokens."""
    config = read_json(path, dict)
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    if not modes:
        modes = [new for old, new in LEGACY_POOLING_KEYS.items() if config.get(old)]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise BundleError(
            f"{path} has pooling {' + '.join(modes) or 'none'}: it must be one of {', '.join(POOLING_MODES)}"
        )
    return POOLING_MODES[modes[0]], bool(config.get("include_prompt", True))


def _read_dense(path: Path) -> Dense:
    config = read_json(path, dict)
    name = config.get("activation_function", ACTIVATION_CLASSES[Activation.TANH])
    activation = next((kind for kind, known in ACTIVATION_CLASSES.items() if known == name), None)
    if activation is None:
        known = ", ".join(kind.value for kind in Activation)
        raise BundleError(f"{path} has the activation {name}: it must be one of {known}")
    slots = {config.get(key) or "sentence_embedding" for key in ("module_input_name", "module_output_name")}
    if slots != {"sentence_embedding"} or config.get("use_residual"):
        raise BundleError(f"{path} reads or writes something other than the text's vector, which is not supported")
    sizes = config.get("in_features"), config.get("out_features")
    if not all(isinstance(size, int) for size in sizes):
        raise BundleError(f"{path} has no integers in_features and out_features")
    return Dense(
        in_features=config["in_features"],
        out_features=config["out_features"],
        bias=bool(config.get("bias", True)),
        activation=activation,
    )


def _read_max_seq_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return None
    config = read_json(path, dict)
    if config.get("do_lower_case"):
        normalizer = read_json(folder / TOKENIZER_FILE, dict).get("normalizer") or {}
        if not normalizer.get("lowercase"):
            raise BundleError(
                f"{path} lower-cases texts before a cased tokenizer: move the lower-casing into tokenizer.json"
            )
    limit = config.get("max_seq_length")
    return limit if isinstance(limit, int) else None


def _read_prompt(root: Path, takes_prompt: bool) -> str | None:
    """Return the default prompt as a template."""
    path = root / "config_sentence_transformers.json"
    config = read_json(path, dict) if path.is_file() else {}
    name = config.get("default_prompt_name")
    prompt = (config.get("prompts") or {}).get(name) if name else None
    if not prompt:
        return None
    if not takes_prompt:
        raise BundleError(
            f"{path} puts the prompt {name!r} before every text and its pooling leaves the prompt out, which is not "
            "supported: set default_prompt_name to null"
        )
    return f"{prompt}{{text}}"


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file of a Hugging Face folder and check the type of its top level.

    Raises:
        BundleError: the file is missing, unreadable or not JSON, or its top level is not a `kind`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, kind):
        raise BundleError(f"{path} holds a {type(data).__name__}, not a {kind.__name__}")
    return data
