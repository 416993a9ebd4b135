"""The libraries as data, in libraries.json: peers with their backends, consumers of a bundle, and their commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SCRIPT = FOLDER / "libraries.py"


class PeerSpec(NamedTuple):
    """A peer: a new one needs a requirements file, a function in `libraries.py`, and an entry in libraries.json.

    Attributes:
        name: of its environment, its requirements file and its entry in `LIBRARIES`.
        title: as its makers write it.
        backends: each with the package whose version counts.
        exports: backends that need files which the bundle may lack, each with a file that shows they are there.
        slow: it takes tens of seconds to load.
    """

    name: str
    title: str
    backends: Mapping[str, str]
    exports: Mapping[str, str]
    slow: bool = False

    @property
    def quick(self) -> bool:
        """Whether a quick run measures it by default: it converts nothing and loads fast."""
        return not self.exports and not self.slow


class Consumer(NamedTuple):
    """A library that loads a bundle unchanged: a new one needs a function in `libraries.py` and an entry likewise.

    Attributes:
        title: as its makers write it.
        library: of `libraries.LIBRARIES`.
        backend: of the library.
        environment: names its requirements file and its folder among the environments.
        suffixes: of the padded graphs that it loads; empty if it reads the weights.
    """

    title: str
    library: str
    backend: str
    environment: str
    suffixes: tuple[str, ...]


class PeerBackend(NamedTuple):
    """One backend of an installed peer, and the package whose version counts.

    The model is the bundle, or a copy with the files that the backend needs.
    """

    party: str
    command: tuple[str, ...]
    model: Path
    name: str
    package: str


def worker_command(python: Path, library: str) -> tuple[str, ...]:
    """Return the command of a library's worker. Isolated mode keeps our folder and the user's packages out of it."""
    return str(python), "-I", str(SCRIPT), library


_DATA = json.loads((FOLDER / "libraries.json").read_text(encoding="utf-8"))
PEERS = tuple(PeerSpec(**peer) for peer in _DATA["peers"])
CONSUMERS = tuple(Consumer._make([*names, tuple(suffixes)]) for *names, suffixes in _DATA["consumers"])
