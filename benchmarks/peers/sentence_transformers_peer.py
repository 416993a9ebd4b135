"""sentence-transformers as a long-lived worker. Runs in its own environment and imports nothing of ours.

Protocol: one JSON object a line on standard input, one on standard output, in turn.

    {"op": "export", "model": DIR, "backend": B, "output": DIR}  -> {"seconds": s}
    {"op": "load", "model": DIR, "backend": B, "texts": FILE}    -> {"load_seconds": s, "versions": {...},
                                                                     "precision": "...", "threads": n or null}
    {"op": "encode", "batch_size": n, "limit": n or null}        -> {"seconds": s, "texts": n}
    {"op": "dump", "batch_size": n, "output": FILE.npy}          -> {"texts": n}

The texts file is a JSON list of strings. A failure gives {"error": "..."} and the worker goes on; end of input ends it.
Everything that libraries write to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module, metadata
from typing import Any

Answer = dict[str, Any]

PACKAGES = (
    "sentence-transformers",
    "transformers",
    "torch",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
    "openvino",
    "onnxruntime",
    "numpy",
)


class Peer:
    """The loaded model and its texts."""

    def __init__(self) -> None:
        self._model: Any = None
        self._texts: list[str] = []

    def export(self, model: str, backend: str, output: str) -> Answer:
        """Save the model with the backend's files, as the library advises, so that loading does not convert again."""
        began = time.perf_counter()
        _open(model, backend).save_pretrained(output)
        return {"seconds": time.perf_counter() - began}

    def load(self, model: str, backend: str, texts: str) -> Answer:
        """Load the model with everything at its defaults."""
        with open(texts, encoding="utf-8") as stream:
            self._texts = json.load(stream)
        began = time.perf_counter()
        self._model = _open(model, backend)
        # Some backends compile at the first call: a user waits for that too.
        self._model.encode(self._texts[:1], show_progress_bar=False)
        return {
            "load_seconds": time.perf_counter() - began,
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "precision": _precision(self._model, backend),
            "threads": _threads(self._model, backend),
        }

    def encode(self, batch_size: int, limit: int | None) -> Answer:
        """Encode the first `limit` texts (None: all) and give the seconds."""
        texts = self._texts[:limit]
        began = time.perf_counter()
        self._model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return {"seconds": time.perf_counter() - began, "texts": len(texts)}

    def dump(self, batch_size: int, output: str) -> Answer:
        """Write the vectors of all texts, float32 [n, dim]."""
        import numpy as np

        vectors = self._model.encode(self._texts, batch_size=batch_size, show_progress_bar=False)
        np.save(output, np.asarray(vectors, np.float32))
        return {"texts": len(self._texts)}


def _open(model: str, backend: str) -> Any:
    library: Any = import_module("sentence_transformers")  # nothing of it is needed before the first request
    return library.SentenceTransformer(model, backend=backend, device="cpu", local_files_only=True)


def _precision(model: Any, backend: str) -> str:
    """Name what the backend computes in, by asking it."""
    inner = model[0].auto_model
    if backend == "openvino":
        return str(inner.request.get_property("INFERENCE_PRECISION_HINT").to_string())
    if backend == "onnx":
        return "float32"  # ONNX Runtime computes in what the file holds, and this file holds fp32
    return str(next(inner.parameters()).dtype).removeprefix("torch.")


def _threads(model: Any, backend: str) -> int | None:
    if backend == "openvino":
        return int(model[0].auto_model.request.get_property("INFERENCE_NUM_THREADS"))
    if backend == "torch":
        return int(sys.modules["torch"].get_num_threads())  # loaded by the library
    return None  # ONNX Runtime's default is one a physical core, and it does not tell


def main() -> int:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        operation = getattr(peer, request.pop("op"))
        try:
            answer = operation(**request)
        except Exception as error:  # the process's edge: the driver decides what a failure means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
