"""Find an encoder: a run folder, a sentence-transformers folder, a plain Hugging Face folder, or a hub name."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.card import CARD_FILE, Card, read_card
from encoders.families import FAMILIES
from encoders.rerankers import is_classifier, score_layers
from encoders.sentence_transformers import PROMPT, RecordedEncoder, dense_folder, read_json, read_modules, readable
from encoders.static_folder import is_model2vec, read_model2vec, table_width
from encoders.supported import check_config
from mirror_runtime.bundle import (
    ENCODER_FILE,
    TOKENIZER_FILE,
    Ditto,
    EncoderSpec,
    Pooling,
    read_encoder,
    sha256_file,
    to_json,
)
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.prompts import read_prompts

DEFAULT_TOKENS = 512
"""Limit of an encoder that records none, although it has more positions: shapes are compiled and proven up to it."""

UNLIMITED = 10**9
"""transformers writes a `model_max_length` of about 1e30 if it knows no limit."""


@dataclass(frozen=True)
class ResolvedEncoder:
    """An encoder on disk, checked and ready to load."""

    folder: Path  # holds `config.json`, safetensors weights and `tokenizer.json`
    spec: EncoderSpec  # everything except weights and tokenizer that decides a vector
    dense: tuple[Path, ...] = ()  # folders of the weights of the head's dense layers, in order
    published: Path | None = None  # what its owner's library reads as exactly this encoder; None if none does
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by name; the default one is in the template
    card: Card = dataclasses.field(default_factory=Card)

    @property
    def identity(self) -> list[str]:
        """Everything that decides a vector: the settings, and hashes of weights, tokenizer and configuration."""
        settings = json.dumps([to_json(self.spec), dict(self.prompts)])
        return [settings, *(line for folder in (self.folder, *self.dense) for line in hashed(folder))]


def hashed(folder: Path) -> list[str]:
    """Return the name and hash of every file of weights or settings in a folder."""
    files = (file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json"))
    return [f"{file.name} {sha256_file(file)}" for file in files]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Parts of a head that a caller requests or a folder records. None leaves a part to the record."""

    pooling: Pooling | None = None  # required for a plain folder
    layers: tuple[int, ...] | None = None  # whose outputs are averaged; a plain folder takes the last
    ditto: Ditto | None = None  # the attention head of pooling `ditto`
    template: str | None = None  # text around every text


def resolve(
    name_or_path: str,
    *,
    revision: str | None = None,
    pooling: Pooling | None = None,
    max_tokens: int | None = None,
    normalize: bool | None = None,
    head: HeadSpec | None = None,
    text_vectors: bool = True,
) -> ResolvedEncoder:
    """Find an encoder and determine exactly what it computes. Nothing that changes a vector is guessed.

    Args:
        name_or_path: a run folder, a sentence-transformers folder, a plain Hugging Face folder, or a hub name.
        revision: branch, tag or commit of a hub name.
        pooling: required for a plain folder; elsewhere it must agree with the record.
        max_tokens: replaces the recorded limit; it may not exceed the position table.
        normalize: replaces the record; a plain folder records no normalisation.
        head: the other parts of the head; its pooling counts if `pooling` is None. It must agree with the record,
            except that an encoder without a template may get one.
        text_vectors: whether texts must have vectors: else it may be a cross-encoder, or have vectors of tokens.

    Raises:
        BundleError: no loadable encoder is there, or it contradicts the arguments. The message names the cure.
    """
    root, commit = _locate(name_or_path, revision)
    requested = head or HeadSpec()
    requested = dataclasses.replace(requested, pooling=pooling or requested.pooling)
    with readable(root):
        source = _read(name_or_path, root, commit, requested, max_tokens, normalize)
    if source.spec.scores_pairs and text_vectors:
        raise BundleError(
            f"{name_or_path} is a cross-encoder, which has no vectors: export it as a reranker with export/to_onnx.py, "
            "or read it as an encoder with --pooling mean"
        )
    if source.spec.per_token and text_vectors:
        raise BundleError(
            f"{name_or_path} with pooling tokens has no vector of a text: only export/to_onnx.py takes it; name "
            "another pooling, such as --pooling mean"
        )
    return source


def _read(
    name_or_path: str,
    root: Path,
    commit: str | None,
    requested: HeadSpec,
    max_tokens: int | None,
    normalize: bool | None,
) -> ResolvedEncoder:
    """Read the folder of an encoder; see `resolve`."""
    published = root
    base_model = name_or_path if commit is not None else root.resolve().name
    dense: tuple[Path, ...] = ()
    recorded: RecordedEncoder | None = None
    spec = read_encoder(root) if (root / ENCODER_FILE).is_file() else None
    # The tokens of an encoder that pools them are those of its transformer alone.
    if spec is not None and (requested.pooling is not Pooling.TOKENS or spec.per_token):
        config = _check_weights(root)
        _check_spec(spec, config, root)
        known = HeadSpec(pooling=spec.pooling, layers=spec.layers, ditto=spec.ditto, template=spec.template)
        _check_head(requested, known, root)
        dense = () if spec.scores_pairs else tuple(root / dense_folder(i) for i in range(len(spec.dense)))
    else:
        if requested.pooling in (None, Pooling.RERANK) and is_classifier(_config_of(root)):
            requested = dataclasses.replace(requested, pooling=Pooling.RERANK)
        elif is_model2vec(root):  # its modules.json lets sentence-transformers read it, with unknown tokens
            recorded = read_model2vec(root)
        elif (root / "modules.json").is_file():
            recorded = read_modules(root, tokens=requested.pooling is Pooling.TOKENS)
        folder = recorded.folder if recorded else root
        config = _check_weights(folder, recorded.family if recorded else None)
        if recorded:
            known = HeadSpec(pooling=recorded.pooling, layers=(-1,), template=recorded.template)
            _check_head(requested, known, root)
            requested = dataclasses.replace(requested, pooling=recorded.pooling)
            dense = recorded.dense_folders
        spec = _new_spec(name_or_path, folder, config, recorded, requested, max_tokens)
        spec = dataclasses.replace(spec, base_model=base_model, revision=commit)
        root = folder
    recorded_spec = spec
    spec = dataclasses.replace(
        spec,
        max_tokens=spec.max_tokens if max_tokens is None else max_tokens,
        normalize=spec.normalize if normalize is None else normalize,
        template=spec.template or requested.template,
    )
    _check_limits(spec, config, root)
    known_elsewhere = (published / "modules.json").is_file() or (recorded is not None and recorded.family is not None)
    known_elsewhere = (known_elsewhere or spec.scores_pairs) and not spec.per_token
    unchanged = max_tokens is None and spec == recorded_spec and known_elsewhere
    prompts = {name: text for name, text in read_prompts(published).items() if name != PROMPT}
    prompts |= recorded.prefixes if recorded is not None else {}
    if recorded is not None and not recorded.takes_prompt:  # its makers leave a prompt's tokens out
        prompts = {}
    return ResolvedEncoder(root, spec, dense, published if unchanged else None, prompts, read_card(published))


def _new_spec(
    name: str,
    folder: Path,
    config: dict[str, Any],
    recorded: RecordedEncoder | None,
    head: HeadSpec,
    max_tokens: int | None,
) -> EncoderSpec:
    """Build the spec of an encoder without an `encoder.json`."""
    pooling = head.pooling or (Pooling.DITTO if head.ditto else None)
    if pooling is None:
        raise BundleError(
            f"{name} does not record its pooling: add --pooling mean or --pooling cls "
            f"({', '.join(p.value for p in Pooling)} are known; the model's card names the right one)"
        )
    limit = max_tokens or (recorded.max_tokens if recorded else None) or _token_limit(folder, config)
    dense = recorded.dense if recorded else ()
    family: str = config["model_type"]
    if pooling is Pooling.RERANK:
        dense = score_layers(config, config[FAMILIES[family].dim], folder)
    dim = dense[-1].out_features if dense else config[FAMILIES[family].dim]
    return EncoderSpec(
        base_model=name,
        revision=None,
        family=family,
        pooling=pooling,
        normalize=recorded.normalize if recorded else pooling is Pooling.TOKENS,  # late interaction compares cosines
        max_tokens=limit,
        dim=min(dim, (recorded.dim if recorded else None) or dim),
        pad_to=limit if pooling is Pooling.MEAN_PADDED else None,
        layers=head.layers or (-1,),
        ditto=head.ditto,
        dense=dense,
        template=(recorded.template if recorded else None) or head.template,
    )


def _config_of(folder: Path) -> dict[str, Any]:
    """Read `config.json` where there is one."""
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    return config


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the folder, and its commit if it came from a hub."""
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        if revision is not None:
            raise InputError(
                f"--revision {revision} is for hub names, and {name_or_path} is a local folder: leave it out"
            )
        return path, None
    if path.is_file():
        raise BundleError(f"{name_or_path} is a file: pass the folder that holds config.json")
    if not name_or_path or name_or_path[0] in "./~\\" or name_or_path.count("/") > 1:
        raise BundleError(f"{name_or_path!r} does not exist: pass an encoder's folder or a hub name such as owner/name")
    return _download(name_or_path, revision)


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", CARD_FILE],
                ignore_patterns=["onnx/*", "openvino/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise BundleError(
            f"{name}{at} is not a local folder and cannot be fetched from the model hub: check the name and the "
            f"network, or pass a local folder ({type(error).__name__})"
        ) from error
    return folder, folder.name  # the cache keeps each snapshot in a folder named by its commit


def _check_weights(folder: Path, static: str | None = None) -> dict[str, Any]:
    """Check that family, weights and tokenizer of a folder can be loaded; return its `config.json`.

    Published folders of the family `static` have no such file, or one without sizes.
    """
    config: dict[str, Any] = {"model_type": static}
    if static is None:
        if not (folder / "config.json").is_file():
            raise BundleError(f"{folder} is not an encoder: it has no config.json")
        config = read_json(folder / "config.json", dict)
        check_config(config, folder)
    if (folder / "adapter_config.json").is_file():
        raise BundleError(
            f"{folder} has an adapter (adapter_config.json) beside or in place of full weights: merge it first "
            "(peft's merge_and_unload, then save_pretrained)"
        )
    if not any(folder.glob("model*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise BundleError(
                f"{folder} has only pickled weights, which can run code when they are opened: convert them to "
                "model.safetensors (save_pretrained in a trusted place does it)"
            )
        raise BundleError(f"{folder} has no weights: model.safetensors is missing")
    if not (folder / TOKENIZER_FILE).is_file():
        raise BundleError(
            f"{folder} has no tokenizer.json: save the fast tokenizer beside the weights "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    return config if static is None else config | {FAMILIES[static].dim: table_width(folder)}


def _token_limit(folder: Path, config: dict[str, Any]) -> int:
    """Return the tokenizer's limit, bounded by the positions, and by `DEFAULT_TOKENS` with a notice."""
    path = folder / "tokenizer_config.json"
    limit = read_json(path, dict).get("model_max_length") if path.is_file() else None
    possible = _positions(config)
    if FAMILIES[config["model_type"]].is_static:
        limit = None  # its own library reads the limit elsewhere, and where there is none cuts nothing
    if isinstance(limit, (int, float)) and limit < UNLIMITED:
        possible = min(int(limit), possible)
    if possible > DEFAULT_TOKENS:
        most = "any number of" if possible == UNLIMITED else str(possible)
        _notice(f"{folder} could take {most} tokens: the limit is {DEFAULT_TOKENS}; --max-tokens raises it")
    return min(possible, DEFAULT_TOKENS)


@functools.cache
def _notice(message: str) -> None:
    """Warn once: an encoder is resolved several times."""
    logging.getLogger(__name__).warning(message)


def _positions(config: dict[str, Any]) -> int:
    """Return the tokens of the longest text that has positions."""
    family = FAMILIES[config["model_type"]]
    if family.longest is None:
        return UNLIMITED
    positions: int = config[family.longest]
    return positions - family.first_position(config)


def _check_spec(spec: EncoderSpec, config: dict[str, Any], folder: Path) -> None:
    family: str = config["model_type"]
    width = config[FAMILIES[family].dim]
    if spec.family != family:
        raise BundleError(
            f"{folder}: {ENCODER_FILE} has family {spec.family} and config.json {family}: a mix of two encoders"
        )
    if not spec.dense and spec.dim > width:
        raise BundleError(f"{folder}: {ENCODER_FILE} has dim {spec.dim} and config.json {width}: a mix of two encoders")


def _check_head(requested: HeadSpec, recorded: HeadSpec, folder: Path) -> None:
    for field in dataclasses.fields(HeadSpec):
        value, known = getattr(requested, field.name), getattr(recorded, field.name)
        if value in (None, known) or (field.name == "template" and known is None):
            continue
        raise BundleError(
            f"{folder} was made with {field.name} {_text(known)}, not {_text(value)}: leave --{field.name} out"
        )


def _text(value: object) -> str:
    return str(value.value if isinstance(value, Pooling) else value)


def _check_limits(spec: EncoderSpec, config: dict[str, Any], folder: Path) -> None:
    positions = _positions(config)
    if max(spec.max_tokens, spec.pad_to or 0) > positions:
        raise BundleError(f"{folder} has {positions} positions, fewer than the {spec.max_tokens} tokens requested")
    if spec.pad_to is not None and spec.max_tokens > spec.pad_to:
        raise BundleError(f"{folder} pads to {spec.pad_to} tokens, fewer than the {spec.max_tokens} tokens requested")
