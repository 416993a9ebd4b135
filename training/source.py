"""Find an encoder: in a run folder, a sentence-transformers folder, a plain Hugging Face folder or on a hub."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mirror_runtime.bundle import ENCODER_FILE, TOKENIZER_FILE, EncoderSpec, Pooling, read_encoder
from mirror_runtime.errors import BundleError, InputError

FAMILIES = ("bert",)
"""`model_type` values that the packed forward and the exported graphs are proven with."""

UNLIMITED = 10**9
"""transformers writes a `model_max_length` of about 1e30 where it knows no limit."""

POOLING_MODES = {"mean": Pooling.MEAN, "cls": Pooling.CLS}
"""The modes of sentence-transformers that we have, by their new names."""

MODULES = ("Transformer", "Pooling", "Normalize")

LEGACY_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Source:
    """An encoder on disk, checked and ready to load.

    Attributes:
        folder: holds `config.json`, safetensors weights and `tokenizer.json`.
        spec: everything besides weights and tokenizer that decides a vector.
    """

    folder: Path
    spec: EncoderSpec


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a sentence-transformers folder says about its head."""

    folder: Path
    pooling: Pooling
    normalize: bool
    max_tokens: int | None


def resolve(
    name_or_path: str,
    *,
    revision: str | None = None,
    pooling: Pooling | None = None,
    max_tokens: int | None = None,
    normalize: bool | None = None,
) -> Source:
    """Find an encoder and say exactly what it computes. Nothing that changes a vector is guessed.

    Args:
        name_or_path: a run folder, a sentence-transformers folder, a plain Hugging Face folder, or a hub name.
        revision: branch, tag or commit of a hub name.
        pooling: needed for a plain folder; elsewhere it must agree with what is recorded.
        max_tokens: replaces the recorded limit; it may not exceed the position table.
        normalize: replaces what is recorded; a plain folder records no normalisation.

    Raises:
        BundleError: nothing loadable is there, or it contradicts the arguments. The message names the cure.
    """
    root, commit = _locate(name_or_path, revision)
    base_model = name_or_path if commit is not None else root.resolve().name
    if (root / ENCODER_FILE).is_file():
        spec = read_encoder(root)
        config = _check_weights(root)
        _check_spec(spec, config, root)
        _check_pooling(pooling, spec.pooling, root)
    else:
        recorded = _read_modules(root) if (root / "modules.json").is_file() else None
        folder = recorded.folder if recorded else root
        config = _check_weights(folder)
        if recorded:
            _check_pooling(pooling, recorded.pooling, root)
            pooling, normalize = recorded.pooling, recorded.normalize if normalize is None else normalize
        if pooling is None:
            raise BundleError(
                f"{name_or_path} does not record its pooling: say --pooling mean or --pooling cls "
                f"({', '.join(p.value for p in Pooling)} are known; the model's card names the right one)"
            )
        limit = max_tokens or (recorded.max_tokens if recorded else None) or _token_limit(folder, config)
        spec = EncoderSpec(
            base_model=base_model,
            revision=commit,
            family=config["model_type"],
            pooling=pooling,
            normalize=bool(normalize),
            max_tokens=limit,
            dim=config["hidden_size"],
            pad_to=limit if pooling is Pooling.MEAN_PADDED else None,
        )
        root = folder
    spec = dataclasses.replace(
        spec,
        max_tokens=spec.max_tokens if max_tokens is None else max_tokens,
        normalize=spec.normalize if normalize is None else normalize,
    )
    _check_limits(spec, config, root)
    return Source(root, spec)


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, str | None]:
    """Give the folder, and the commit where it came from a hub."""
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        if revision is not None:
            raise InputError(
                f"--revision {revision} is for hub names, and {name_or_path} is a local folder: leave it out"
            )
        return path, None
    if path.is_file():
        raise BundleError(f"{name_or_path} is a file: give the folder that holds config.json")
    if not name_or_path or name_or_path[0] in "./~\\" or name_or_path.count("/") > 1:
        raise BundleError(f"{name_or_path!r} does not exist: give an encoder's folder or a hub name such as owner/name")
    return _download(name_or_path, revision)


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
                ignore_patterns=["onnx/*", "openvino/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise BundleError(
            f"{name}{at} is no folder here and cannot be fetched from the model hub: check the name and the network, "
            f"or give a local folder ({type(error).__name__})"
        ) from error
    return folder, folder.name  # the cache keeps each snapshot in a folder named by its commit


def _read_modules(root: Path) -> _Recorded:
    """Read a sentence-transformers folder in either of its two schemas."""
    modules = read_json(root / "modules.json", list)
    folder, pooling, normalize = root, None, False
    for module in modules:
        kind, where = module["type"].rsplit(".", 1)[-1], root / module.get("path", "")
        if not module["type"].startswith("sentence_transformers.") or kind not in (
            "Transformer",
            "Pooling",
            "Normalize",
        ):
            raise BundleError(
                f"{root} has a module {module['type']}: only sentence_transformers' Transformer, Pooling and Normalize "
                "can be reproduced"
            )
        if kind == "Transformer":
            folder = where
        elif kind == "Pooling":
            pooling = _read_pooling(where / "config.json")
        else:
            normalize = True
    if pooling is None:
        raise BundleError(f"{root}/modules.json has no Pooling module: this is no encoder of one vector a text")
    _check_prompt(root)
    return _Recorded(folder=folder, pooling=pooling, normalize=normalize, max_tokens=_read_max_seq_length(folder))


def _read_pooling(path: Path) -> Pooling:
    config = read_json(path, dict)
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    if not modes:
        modes = [new for old, new in LEGACY_POOLING_KEYS.items() if config.get(old)]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise BundleError(
            f"{path} asks for pooling {' + '.join(modes) or 'none'}: {' or '.join(POOLING_MODES)} can be reproduced"
        )
    return POOLING_MODES[modes[0]]


def _read_max_seq_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return None
    config = read_json(path, dict)
    if config.get("do_lower_case"):
        normalizer = read_json(folder / TOKENIZER_FILE, dict).get("normalizer") or {}
        if not normalizer.get("lowercase"):
            raise BundleError(
                f"{path} lower-cases texts before a cased tokenizer: put the lower-casing into tokenizer.json instead"
            )
    limit = config.get("max_seq_length")
    return limit if isinstance(limit, int) else None


def _check_prompt(root: Path) -> None:
    path = root / "config_sentence_transformers.json"
    config = read_json(path, dict) if path.is_file() else {}
    name = config.get("default_prompt_name")
    if name and (config.get("prompts") or {}).get(name):
        raise BundleError(
            f"{path} puts the prompt {name!r} before every text, which is not reproduced: set default_prompt_name to "
            "null and write the prompt into the texts"
        )


def _check_weights(folder: Path) -> dict[str, Any]:
    """Give `config.json` of a folder whose weights and tokenizer are of a kind that we load."""
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} is no encoder: it has no config.json")
    config: dict[str, Any] = read_json(folder / "config.json", dict)
    _check_family(config, folder)
    if not any(folder.glob("model*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise BundleError(
                f"{folder} has pickled weights only, which can run code when they are opened: convert them to "
                "model.safetensors (save_pretrained in a trusted place does it)"
            )
        raise BundleError(f"{folder} has no weights: model.safetensors is missing")
    if not (folder / TOKENIZER_FILE).is_file():
        raise BundleError(
            f"{folder} has no tokenizer.json: save the fast tokenizer beside the weights "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return config


def _check_family(config: dict[str, Any], folder: Path) -> None:
    known = ", ".join(FAMILIES)
    if "auto_map" in config:
        raise BundleError(
            f"{folder} needs code of its own (auto_map in config.json), which is never run: take a {known} model"
        )
    family, names = config.get("model_type"), config.get("architectures") or []
    if config.get("is_decoder") or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise BundleError(
            f"{folder} is a causal language model ({', '.join(names) or family}): take an encoder of the {known} family"
        )
    if family not in FAMILIES:
        raise BundleError(f"{folder} has model_type {family!r}: the supported family is {known}")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise BundleError(f"{folder} has {positions} position embeddings: only absolute ones are supported")
    for key in ("hidden_size", "max_position_embeddings"):
        if not isinstance(config.get(key), int):
            raise BundleError(f"{folder}/config.json has no {key}: it is not a complete {family} configuration")


def _token_limit(folder: Path, config: dict[str, Any]) -> int:
    """Give the tokenizer's limit, bounded by the position table."""
    path = folder / "tokenizer_config.json"
    limit = read_json(path, dict).get("model_max_length") if path.is_file() else None
    positions: int = config["max_position_embeddings"]
    return min(int(limit), positions) if isinstance(limit, (int, float)) and limit < UNLIMITED else positions


def _check_spec(spec: EncoderSpec, config: dict[str, Any], folder: Path) -> None:
    for name, said, found in (("dim", spec.dim, config["hidden_size"]), ("family", spec.family, config["model_type"])):
        if said != found:
            raise BundleError(f"{folder}: {ENCODER_FILE} says {name} {said} and config.json {found}: tune it again")


def _check_pooling(asked: Pooling | None, recorded: Pooling, folder: Path) -> None:
    if asked is not None and asked is not recorded:
        raise BundleError(f"{folder} was made with pooling {recorded.value}, not {asked.value}: leave --pooling out")


def _check_limits(spec: EncoderSpec, config: dict[str, Any], folder: Path) -> None:
    positions = config["max_position_embeddings"]
    if max(spec.max_tokens, spec.pad_to or 0) > positions:
        raise BundleError(f"{folder} has {positions} positions, fewer than the {spec.max_tokens} tokens asked for")
    if spec.pad_to is not None and spec.max_tokens > spec.pad_to:
        raise BundleError(f"{folder} pads to {spec.pad_to} tokens, fewer than the {spec.max_tokens} tokens asked for")


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file of the Hugging Face world whose top level is a `kind`.

    Raises:
        BundleError: it is missing, unreadable, no JSON, or something else than a `kind`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, kind):
        _wrong(path, data, kind)
    return data


def _wrong(path: Path, data: object, kind: type) -> NoReturn:
    raise BundleError(f"{path} holds a {type(data).__name__} where a {kind.__name__} is expected")
