"""infinity's engine in this process, PyTorch underneath. Runs in its own environment."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Library, Model, serve


class Engine:
    """The engine, restarted for each batch size, which is an argument of its constructor.

    The driver never times the first call with a batch size.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._loop = asyncio.new_event_loop()
        self._engine: Any = None
        self._batch_size = 0

    def encode(self, texts: Sequence[str], batch_size: int) -> Any:
        """Pass all texts to the engine at once: it forms the batches."""
        if batch_size != self._batch_size:
            self._start(batch_size)
        vectors, _ = self._loop.run_until_complete(self._engine.embed(sentences=list(texts)))
        return vectors

    def _start(self, batch_size: int) -> None:
        library = import_module("infinity_emb")
        if self._engine is not None:
            self._loop.run_until_complete(self._engine.astop())
        arguments = library.EngineArgs(
            model_name_or_path=self._model, engine="torch", device="cpu", batch_size=batch_size
        )
        self._engine = library.AsyncEmbeddingEngine.from_args(arguments)
        self._loop.run_until_complete(self._engine.astart())
        self._batch_size = batch_size


def open_model(model: str, backend: str) -> Model:
    """Start the engine with one text per batch; the first real call restarts it."""
    engine = Engine(model)
    engine.encode(["start"], 1)
    return Model(encode=engine.encode, precision="float32", threads=int(sys.modules["torch"].get_num_threads()))


if __name__ == "__main__":
    packages = ("infinity-emb", "sentence-transformers", "transformers", "torch", "numpy")
    sys.exit(serve(Library(open=open_model, packages=packages), sys.argv[1:]))
