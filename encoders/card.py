"""What the model card beside an encoder says that must not be lost: its license, its languages and its story."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CARD_FILE = "README.md"

RUN_MARK = "<!-- about the files of this run from here on -->"
"""Ends the story in a run folder's card: how the encoder was made, and whether that helped."""

TERMS = ("license", "license_name", "license_link", "language")
"""Keys of a card's front matter that hold for an encoder made from this one."""

FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """A model card."""

    terms: Mapping[str, Any] = field(default_factory=dict)  # those of `TERMS` that its front matter has
    body: str = ""  # Markdown below the front matter

    @property
    def story(self) -> str:
        """How a run of ours made this encoder; empty for any other encoder's card."""
        story, mark, _ = self.body.partition(RUN_MARK)
        return story if mark else ""


def read_card(folder: Path) -> Card:
    """Read an encoder's card. A card that is missing or cannot be read is empty: it decides no vector."""
    try:
        text = (folder / CARD_FILE).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return Card()
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, so its license is not passed on: %s", folder / CARD_FILE, error)
        return Card()
    found = FRONT_MATTER.match(text)
    if found is None:
        return Card(body=text)
    body = text[found.end() :]
    try:
        values = yaml.load(found[1], yaml.BaseLoader)  # texts only: Norwegian, `no`, is not false
    except yaml.YAMLError as error:
        log.warning("%s: its front matter is not YAML, so its license is not passed on: %s", folder / CARD_FILE, error)
        return Card(body=body)
    known = values if isinstance(values, dict) else {}
    return Card({key: known[key] for key in TERMS if known.get(key)}, body)


def front_matter(values: Mapping[str, Any]) -> str:
    """Return a card's front matter, with the line that ends it."""
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n\n"
