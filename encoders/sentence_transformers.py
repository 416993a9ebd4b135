"""Read the head of a sentence-transformers folder: `modules.json` in either of its two schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import TOKENIZER_FILE, Activation, Dense, Pooling
from mirror_runtime.errors import BundleError, MirrorError, one_line
from mirror_runtime.strict_json import load_json

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

WEIGHTS_FILE = "model.safetensors"

KINDS = ("Transformer", "StaticEmbedding", "Pooling", "Dense", "Normalize")
"""The supported modules, in their required order. Dropout does nothing at inference and may stand anywhere."""

TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where sentence-transformers 6 looks for the Transformer module's settings; the first that is not empty counts."""

NO_EFFECT = {
    "model": {"attn_implementation", "add_pooling_layer", "unpad_inputs", "low_cpu_mem_usage", "trust_remote_code"},
    "processor": {"use_fast", "padding_side", "clean_up_tokenization_spaces", "trust_remote_code"},
    "config": {"trust_remote_code"},
}
"""Arguments of the Transformer module that change no vector, by where sentence-transformers passes them."""

OLD_ARGUMENTS = {"model": "model_args", "processor": "tokenizer_args", "config": "config_args"}

DEFAULT_PROMPTS = ("query", "document")
"""Names that every sentence-transformers model knows, empty unless the folder fills them."""

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
    dim: int | None  # components that are kept; None for all
    template: str | None  # the default prompt; None if the folder has none
    takes_prompt: bool  # whether the pooling covers a prompt's tokens
    family: str | None = None  # of a static encoder, whose folder does not state it
    prefixes: Mapping[str, str] = field(default_factory=dict)  # what PyLate puts before queries and documents


def read_modules(root: Path, *, tokens: bool = False) -> RecordedEncoder:
    """Read a sentence-transformers folder.

    A folder without a Pooling module, such as PyLate's (ColBERT), records pooling `tokens`. With `tokens` it is read
    so anyway: up to its Pooling module, with unit vectors.

    Raises:
        BundleError: the folder is malformed, or has a module or setting that is not supported.
    """
    found = _list_modules(root)
    order = [kind for kind, _ in found]
    static = order[:1] == ["StaticEmbedding"] and "Pooling" not in order
    tokens |= order[:1] == ["Transformer"] and "Pooling" not in order
    if tokens and "Pooling" in order:
        found = found[: order.index("Pooling")]
        order = [kind for kind, _ in found]
    if order != sorted(order, key=KINDS.index) or any(order.count(kind) > 1 for kind in KINDS if kind != "Dense"):
        raise BundleError(f"{root}/modules.json lists {', '.join(order)}: the order must be {', '.join(KINDS)}")
    if "StaticEmbedding" in order and not static:
        raise BundleError(f"{root}/modules.json lists {', '.join(order)}: a StaticEmbedding has nothing to pool")
    folder = next((path for kind, path in found if kind in KINDS[:2]), root)
    pooling, takes_prompt = (Pooling.TOKENS if tokens else Pooling.MEAN), True
    if not static and not tokens:
        pooling, takes_prompt = _read_pooling(next(path for kind, path in found if kind == "Pooling") / "config.json")
    dense = tuple(path for kind, path in found if kind == "Dense")
    config_file = root / "config_sentence_transformers.json"
    config = read_json(config_file, dict) if config_file.is_file() else {}
    normalize = "Normalize" in order or tokens
    if config.get("attend_to_expansion_tokens"):
        raise BundleError(f"{config_file} has attend_to_expansion_tokens, with which padding changes vectors")
    return RecordedEncoder(
        folder=folder,
        pooling=pooling,
        dense=tuple(_read_dense(path / "config.json") for path in dense),
        dense_folders=dense,
        normalize=normalize,
        max_tokens=_read_truncation(folder) if static else _read_transformer(folder),
        dim=_read_dim(config.get("truncate_dim"), config_file, normalize=normalize),
        template=_read_prompt(config, config_file, takes_prompt),
        takes_prompt=takes_prompt,
        family="static" if static else None,
        prefixes={name: config[f"{name}_prefix"] for name in DEFAULT_PROMPTS if config.get(f"{name}_prefix")},
    )


def _list_modules(root: Path) -> list[tuple[str, Path]]:
    """Return kind and folder of each module that counts."""
    found: list[tuple[str, Path]] = []
    for module in read_json(root / "modules.json", list):
        name = module.get("type") if isinstance(module, dict) else None
        path = module.get("path", "") if isinstance(module, dict) else None
        if not isinstance(name, str) or not isinstance(path, str):
            raise BundleError(f"{root}/modules.json has the entry {module!r}: it needs a type and a path")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise BundleError(f"{root}/modules.json has the path {path!r}, which leaves the folder")
        package, kind = name.split(".", 1)[0], name.rsplit(".", 1)[-1]
        if (package, kind) != ("pylate", "Dense") and (
            package != "sentence_transformers" or kind not in (*KINDS, "Dropout")
        ):
            raise BundleError(
                f"{root} has a module {name}: only sentence_transformers' {', '.join(KINDS[:-1])} and "
                f"{KINDS[-1]} are supported"
            )
        if kind != "Dropout" and (kind, "Normalize") != (found[-1][0] if found else "", kind):
            found.append((kind, root / path))  # a second Normalize changes nothing
    return found


def _read_pooling(path: Path) -> tuple[Pooling, bool]:
    """Return the pooling and whether it covers a prompt's tokens."""
    config = read_json(path, dict)
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    if not modes:
        modes = [new for old, new in LEGACY_POOLING_KEYS.items() if config.get(old)] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise BundleError(
            f"{path} has pooling {' + '.join(map(str, modes))}: it must be one of {', '.join(POOLING_MODES)}"
        )
    return POOLING_MODES[modes[0]], bool(config.get("include_prompt", True))


def _read_dense(path: Path) -> Dense:
    config = read_json(path, dict)
    name = config.get("activation_function", ACTIVATION_CLASSES[Activation.TANH])
    activation = next((kind for kind, known in ACTIVATION_CLASSES.items() if known == name), None)
    if activation is None:
        known = ", ".join(kind.value for kind in Activation)
        raise BundleError(f"{path} has the activation {name}: it must be one of {known}")
    reads = config.get("module_input_name", "sentence_embedding")
    writes = config.get("module_output_name")  # None: what it reads
    if (reads, writes or reads) != ("sentence_embedding",) * 2 or writes == "" or config.get("use_residual"):
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


def _read_transformer(folder: Path) -> int | None:
    """Return the recorded limit in tokens, after a check that every other setting is one that we obey.

    sentence-transformers passes these settings on to transformers (`Transformer.load_config` and `__init__`, release
    6.2): an argument `model_max_length` of the tokenizer counts before `max_seq_length`.
    """
    paths = [folder / name for name in TRANSFORMER_FILES]
    found = ((path, read_json(path, dict)) for path in paths if path.is_file())
    path, config = next(((path, config) for path, config in found if config), (paths[0], dict[str, Any]()))
    arguments: dict[str, dict[str, Any]] = {}
    for kind, old in OLD_ARGUMENTS.items():
        arguments[kind] = dict(config.get(old) or config.get(f"{kind}_kwargs") or {})
    limit = arguments["processor"].pop("model_max_length", config.get("max_seq_length"))
    lower_case = arguments["processor"].pop("do_lower_case", None)
    for name in ("dtype", "torch_dtype"):  # half the bits are other vectors
        if str(arguments["model"].get(name)).removeprefix("torch.") in ("None", "auto", "float32"):
            arguments["model"].pop(name, None)
    if arguments["processor"].get("truncation_side") == "right":
        del arguments["processor"]["truncation_side"]
    refused = [
        f"{kind} argument {name}" for kind, given in arguments.items() for name in given.keys() - NO_EFFECT[kind]
    ]
    text = (config.get("modality_config") or {}).get("text", {"method_output_name": "last_hidden_state"})
    for name, wanted, value in (
        ("transformer_task", ("feature-extraction", None), config.get("transformer_task")),
        ("module_output_name", ("token_embeddings", None), config.get("module_output_name")),
        ("modality_config of text", ("last_hidden_state",), (text or {}).get("method_output_name")),
        ("processing_kwargs", (None, {}), config.get("processing_kwargs")),
    ):
        refused += [] if value in wanted else [f"{name} {value!r}"]
    if refused:
        raise BundleError(f"{path} has {', '.join(sorted(refused))}, which changes vectors and is not supported")
    if config.get("do_lower_case") or lower_case is not None:
        lower = bool(config.get("do_lower_case") or lower_case)
        _check_case(path, folder / TOKENIZER_FILE, lower=lower, stated=lower_case)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise BundleError(f"{path} has the limit {limit!r}: it must be a number of tokens")
    return limit


def _read_truncation(folder: Path) -> int | None:
    """Return the limit in a static encoder's tokenizer, where sentence-transformers leaves it on."""
    truncation = read_json(folder / TOKENIZER_FILE, dict).get("truncation") or {}
    if truncation.get("direction", "Right") != "Right":
        raise BundleError(f"{folder}/{TOKENIZER_FILE} cuts long texts on the left: only their end can be cut")
    limit: int | None = truncation.get("max_length")
    return limit


def _check_case(path: Path, tokenizer: Path, *, lower: bool, stated: object) -> None:
    """Check that a tokenizer treats case as stated. Its file, which is megabytes, is read only for this."""
    lowers = lower_cases(read_json(tokenizer, dict).get("normalizer"))
    if lower and not lowers:
        raise BundleError(
            f"{path} lower-cases texts before a cased tokenizer: move the lower-casing into {TOKENIZER_FILE} (a "
            "Lowercase normalizer)"
        )
    if stated is False and lowers:
        raise BundleError(f"{path} keeps the case of texts and {TOKENIZER_FILE} lower-cases: make them agree")


def lower_cases(normalizer: Any) -> bool:
    """Return whether a `normalizer` of tokenizer.json lower-cases text."""
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "Sequence":
        return any(map(lower_cases, normalizer.get("normalizers", ())))
    return normalizer.get("type") == "Lowercase" or bool(normalizer.get("lowercase"))


def _read_dim(dim: object, path: Path, *, normalize: bool) -> int | None:
    if dim is None:
        return None
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise BundleError(f"{path} has truncate_dim {dim!r}: it must be a number of components")
    if normalize:
        raise BundleError(
            f"{path} has truncate_dim {dim} and modules.json normalises before that cut, so vectors have no unit "
            "length: set truncate_dim to null and pass --dim, which normalises after the cut"
        )
    return dim


def _read_prompt(config: dict[str, Any], path: Path, takes_prompt: bool) -> str | None:
    """Return the default prompt as a template."""
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is not None and name not in (*prompts, *DEFAULT_PROMPTS):
        known = ", ".join(map(repr, prompts)) or "none"
        raise BundleError(f"{path} has default_prompt_name {name!r}, and its prompts are {known}: name one of them")
    prompt = prompts.get(name) if name else None
    if not prompt:
        return None
    if not takes_prompt:
        raise BundleError(
            f"{path} puts the prompt {name!r} before every text and its pooling leaves the prompt out, which is not "
            "supported: set default_prompt_name to null"
        )
    return f"{prompt}{{text}}"


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn whatever the readers of three libraries raise about a malformed folder into a `BundleError` of one line."""
    try:
        yield
    except MirrorError as error:
        if folder.name in str(error):
            raise
        raise BundleError(f"{folder}: {error}") from error
    except BaseException as error:
        # tokenizers panics, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(
            f"{folder} cannot be read as an encoder: {type(error).__name__}: {one_line(error)}"
        ) from error


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file of a Hugging Face folder and check the type of its top level.

    Raises:
        BundleError: the file is missing, unreadable or not JSON, or its top level is not a `kind`.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing")
    data = load_json(path)
    if not isinstance(data, kind):
        raise BundleError(f"{path} holds a {type(data).__name__}, not a {kind.__name__}")
    return data
