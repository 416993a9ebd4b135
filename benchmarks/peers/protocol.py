"""A peer's end of the line-JSON protocol, the same for every library.

Runs in a peer's environment, so it imports only the standard library. One JSON object a line on standard input,
one on standard output for each:

    {"op": "export", "model": DIR, "backend": B, "output": DIR, "texts": FILE}
        -> {"seconds": s}
    {"op": "load", "model": DIR, "backend": B, "texts": FILE}
        -> {"load_seconds": s, "versions": {...}, "precision": "...", "threads": n or null}
    {"op": "encode", "batch_size": n, "limit": n or null}
        -> {"seconds": s, "texts": n}
    {"op": "single", "texts": FILE, "calls": n}
        -> {"samples_ms": [...]}
    {"op": "dump", "batch_size": n, "output": FILE.npy, "texts": FILE or null}
        -> {"texts": n}

A texts file is a JSON list of strings; `dump` without one encodes those of `load`, and writes vectors [n, dim] in the
library's own number type. A failure is answered with {"error": "..."} and the worker goes on; end of input ends it.
Everything that libraries write to standard output goes to standard error.

With the arguments `start DIR BACKEND FILE` the script loads the model, encodes one text, prints `ready BYTES`, encodes
the file's texts, prints `done BYTES` and ends. The bytes are the process's peak resident memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Answer = dict[str, Any]

WARM_CALLS = 3
"""Untimed calls before single texts are timed: the other parties have just used the caches and cores."""

START_BATCH = 32
"""Texts per batch after a start: the default of most libraries."""


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        encode: takes texts and a batch size and returns vectors [n, dim] in any array-like type.
        precision: number format that the library reports to compute in.
        threads: that the library reports to use; None if it does not report them.
    """

    encode: Callable[[Sequence[str], int], Any]
    precision: str
    threads: int | None


@dataclass(frozen=True)
class Library:
    """A library, as its peer's script describes it.

    Attributes:
        open: a model's folder and a backend to a loaded model, everything at the library's defaults.
        packages: whose versions are reported.
        export: model, backend, output folder, sample texts: saves what the backend loads, as the library advises. None
            for a library that reads the bundle's own files.
    """

    open: Callable[[str, str], Model]
    packages: tuple[str, ...]
    export: Callable[[str, str, str, Sequence[str]], None] | None = None


class Worker:
    """The operations, named as in the protocol."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._model: Model | None = None
        self._texts: list[str] = []

    def export(self, model: str, backend: str, output: str, texts: str) -> Answer:
        """Save the files that the backend loads."""
        if self._library.export is None:
            raise ValueError(f"{backend} needs no export")
        began = time.perf_counter()
        self._library.export(model, backend, output, read_json(texts))
        return {"seconds": time.perf_counter() - began}

    def load(self, model: str, backend: str, texts: str) -> Answer:
        """Load the model and the texts."""
        self._texts = read_json(texts)
        began = time.perf_counter()
        self._model = self._library.open(model, backend)
        self._model.encode(self._texts[:1], 1)  # some compile at the first call: a user waits for that too
        return {
            "load_seconds": time.perf_counter() - began,
            "versions": _versions(self._library.packages),
            "precision": self._model.precision,
            "threads": self._model.threads,
        }

    def encode(self, batch_size: int, limit: int | None) -> Answer:
        """Encode the first `limit` texts (None: all) and measure the seconds."""
        model, texts = self._loaded(), self._texts[:limit]
        began = time.perf_counter()
        model.encode(texts, batch_size)
        return {"seconds": time.perf_counter() - began, "texts": len(texts)}

    def single(self, texts: str, calls: int) -> Answer:
        """Encode one text per call, in turn, and measure each call's milliseconds."""
        model = self._loaded()
        return {"samples_ms": time_calls(lambda one: model.encode(one, 1), read_json(texts), calls)}

    def dump(self, batch_size: int, output: str, texts: str | None = None) -> Answer:
        """Write the vectors of all texts, [n, dim]."""
        import numpy as np

        chosen = self._texts if texts is None else read_json(texts)
        np.save(output, np.asarray(self._loaded().encode(chosen, batch_size)))
        return {"texts": len(chosen)}

    def _loaded(self) -> Model:
        if self._model is None:
            raise RuntimeError("nothing is loaded")
        return self._model


def serve(library: Library, arguments: Sequence[str]) -> int:
    """Answer requests until the input ends, or perform one start."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if arguments:
        _, folder, backend, texts = arguments
        model = library.open(folder, backend)
        assert len(model.encode(["How long does the first vector take?"], 1)) == 1
        answers.write(f"ready {peak_bytes()}\n")
        answers.flush()
        model.encode(read_json(texts), START_BATCH)
        answers.write(f"done {peak_bytes()}\n")
        answers.flush()
        return 0
    worker = Worker(library)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("op"))(**request)
        except Exception as error:  # the process's edge: the driver decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


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


def peak_bytes() -> int:
    """Return the process's peak resident memory. getrusage's figure would include the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def read_json(path: str | Path) -> Any:
    """Read a file of UTF-8 JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def in_length_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the positions of texts in batches, longest first: little padding, and the largest batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def open_tokenizer(model: str) -> Any:
    """Open a bundle's tokenizer with its own limit and without padding."""
    from importlib import import_module

    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.enable_truncation(read_json(Path(model) / "tokenizer_config.json")["model_max_length"])
    tokenizer.no_padding()
    return tokenizer


def read_head(model: str) -> tuple[str, bool]:
    """Read a sentence-transformers folder's pooling ("mean" or "cls") and whether it normalises.

    Raises:
        ValueError: it pools in another way.
    """
    pooling = read_json(Path(model) / "1_Pooling" / "config.json")
    kinds = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    chosen = [kind for key, kind in kinds.items() if pooling.get(key)]
    modules = [module["type"].rsplit(".", 1)[-1] for module in read_json(Path(model) / "modules.json")]
    if len(chosen) != 1 or not set(modules) <= {"Transformer", "Pooling", "Normalize"}:
        raise ValueError("this peer supports only mean and cls pooling")
    return chosen[0], "Normalize" in modules


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
