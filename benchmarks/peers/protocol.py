"""A peer's end of the line-JSON protocol, the same for every library.

Runs in a peer's environment, so it imports only the standard library. A line `{"op": "encode", "batch_size": 8, …}` on
standard input calls that method of `Worker`; what it returns, or `{"error": "..."}`, is a line on standard output.
After an error the worker goes on; end of input ends it. What libraries write to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

Answer = dict[str, Any]
Encode = Callable[[Sequence[str], int], Any]
"""Texts and a batch size to vectors [n, dim] in any array-like type."""

WARM_CALLS = 3
"""Untimed calls before single texts are timed: the other parties have just used the caches and cores."""

PACKAGES = (
    *("sentence-transformers", "fastembed", "ctranslate2", "infinity-emb", "optimum", "optimum-intel", "optimum-onnx"),
    *("transformers", "torch", "openvino", "nncf", "onnxruntime", "tokenizers", "numpy"),
)
"""Whose versions are reported, where they are installed."""

INSTALLERS = frozenset({"pip", "setuptools", "wheel"})
"""In every environment, and not needed by the programs that run there."""


class Model(NamedTuple):
    """A loaded model, the number format that its library reports to compute in, and the threads, where it does."""

    encode: Encode
    precision: str = "float32"
    threads: int | None = None


Open = Callable[[str, str, str], Model]
"""A folder, a backend and a file of the folder ("" for the backend's usual one) to a model, all else at defaults."""

Export = Callable[[str, str, str, Sequence[str]], None]
"""Folder, backend, output folder, sample texts: saves what the backend loads, as the library advises."""


class Worker:
    """The operations."""

    def __init__(self, open_model: Open, export: Export | None) -> None:
        self._open = open_model
        self._export = export
        self._model: Model | None = None
        self._texts: list[str] = []

    def export(self, model: str, backend: str, output: str, texts: list[str]) -> Answer:
        """Save the files that the backend loads."""
        assert self._export is not None
        self._export(model, backend, output, texts)
        return {}

    def load(self, model: str, backend: str, texts: list[str]) -> Answer:
        """Load the texts and the model; `backend` may be followed by a space and a file of the model."""
        self._texts = texts
        began = time.perf_counter()
        name, _, file = backend.partition(" ")
        self._model = loaded = self._open(model, name, file)
        loaded.encode(self._texts[:1], 1)  # some compile at the first call: a user waits for that too
        seconds = time.perf_counter() - began
        return {"load_seconds": seconds, "precision": loaded.precision, "threads": loaded.threads}

    def versions(self) -> Answer:
        """Return the versions of `PACKAGES`."""
        versions = {}
        for package in PACKAGES:
            with suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        return {"versions": versions}

    def size(self) -> Answer:
        """Return the bytes of all packages of this environment: a large one takes a second."""
        return {"bytes": installed_bytes()}

    def encode(self, batch_size: int, limit: int | None) -> Answer:
        """Encode the first `limit` texts (None: all) and measure the seconds."""
        encode, texts = self._encode, self._texts[:limit]
        began = time.perf_counter()
        encode(texts, batch_size)
        return {"seconds": time.perf_counter() - began}

    def single(self, texts: list[str], calls: int) -> Answer:
        """Encode one text a call, in turn, and measure the milliseconds of each."""
        encode = self._encode
        return {"samples_ms": time_calls(lambda one: encode(one, 1), texts, calls)}

    def dump(self, batch_size: int, output: str, texts: list[str]) -> Answer:
        """Write the vectors of texts, [n, dim], in the library's own number type."""
        import numpy as np

        np.save(output, np.asarray(self._encode(texts, batch_size)))
        return {}

    @property
    def _encode(self) -> Encode:
        if self._model is None:
            raise RuntimeError("nothing is loaded")
        return self._model.encode


def serve(open_model: Open, export: Export | None) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(open_model, export)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("op"))(**request)
        except Exception as error:  # the process's edge: the driver decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def time_calls(encode: Callable[[list[str]], Any], texts: Sequence[str], calls: int) -> list[float]:
    """Time `calls` calls with one text each, in milliseconds, after some that warm up."""
    for text in texts[:WARM_CALLS]:
        encode([text])
    samples = []
    for call in range(calls):
        one = [texts[call % len(texts)]]
        began = time.perf_counter()
        encode(one)
        samples.append(1e3 * (time.perf_counter() - began))
    return samples


def read_json(path: str | Path) -> Any:
    """Read a file of UTF-8 JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def installed_bytes(names: Collection[str] | None = None) -> int:
    """Add up the files of the packages (None: all but the installers), compiled Python included."""
    total = 0
    for package in metadata.distributions():
        name = normal(package.metadata["Name"])
        if name in INSTALLERS if names is None else name not in names:
            continue
        paths = (Path(str(package.locate_file(file))) for file in package.files or ())
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return name.lower().replace("_", "-").replace(".", "-")
