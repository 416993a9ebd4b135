"""An encoder's prompts: what its makers put before queries or documents, by name, as in sentence-transformers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.strict_json import load_json

PROMPTS_FILE = "config_sentence_transformers.json"

INPUT_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("query", "search_query"), ("query",))
    | dict.fromkeys(("document", "passage", "search_document"), ("document", "passage", "corpus"))
)
"""The prompts for what a text is, by that and its names in other APIs: its own name's, else the first that there is."""


def read_prompts(folder: Path, files: Container[str] = (PROMPTS_FILE,)) -> dict[str, str]:
    """Return the prompts of a bundle or a sentence-transformers folder; none if it records none.

    `files` are the names of a bundle's files, whose hashes were checked: another one is not read.

    Raises:
        BundleError: the file is malformed.
    """
    path = folder / PROMPTS_FILE
    config = load_json(path) if PROMPTS_FILE in files and path.is_file() else {}
    prompts = config.get("prompts") or {} if isinstance(config, dict) else None
    if not isinstance(prompts, dict) or not all(isinstance(one, str) for one in prompts.values()):
        raise BundleError(f"{path}: prompts must be texts by name")
    return prompts


def choose_prompt(
    prompts: Mapping[str, str] | None, template: str | None, *, name: str | None = None, input_type: str | None = None
) -> str:
    """Return what to put before a text: a prompt by its name, or the one for what the text is, if there is one.

    `prompts` is None if they are unknown; `template` is the text that the encoder itself puts around every text.

    Raises:
        InputError: the prompts are unknown, none has that name, or the encoder puts another before every text.
    """
    if name is None and input_type is None:
        return ""
    if prompts is None:
        raise InputError(
            "the prompts of this encoder are unknown here: put one before each text, or serve the bundle without Triton"
        )
    if name is not None and name not in prompts:
        known = ", ".join(map(repr, prompts)) or "none"
        raise InputError(f"this encoder has no prompt {name[:100]!r}: its prompts are {known}")
    names = (name,) if name is not None else (input_type or "", *INPUT_TYPES.get(input_type or "", ()))
    prompt = next((prompts[one] for one in names if one in prompts), None)
    if prompt is None or template is None:
        return prompt or ""
    if template != f"{prompt}{{text}}":
        raise InputError("this encoder puts a prompt of its own before every text, which a named one cannot replace")
    return ""


def prompted(texts: Iterable[object], prompt: str) -> Iterable[object]:
    """Put a prompt before every text; anything else stays, for the encoder to report."""
    if not prompt or isinstance(texts, (str, bytes)):
        return texts
    return (prompt + text if isinstance(text, str) else text for text in texts)
