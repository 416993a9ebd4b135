"""The engines by themselves: the plain loop that one writes without a framework. Runs in its own environment.

Tokenise everything, sort by length, cut into batches, pad each batch to its longest text, run the bundle's padded
graph, whose output is the vector. `openvino` runs one batch at a time; `openvino-async` keeps several under way with
OpenVINO's own queue and its throughput hint, as its documentation recommends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Library, Model, in_length_order, open_tokenizer, read_json, serve

FILE = "onnx/model.onnx"
OUTPUT = "sentence_embedding"

Feed = dict[str, Any]
Run = Callable[[Iterable[Feed]], list[Any]]
"""Maps batches to the vectors of each, in the order of the batches."""


def open_model(model: str, backend: str) -> Model:
    """Load the padded graph into one engine."""
    file = str(Path(model) / FILE)
    run, names, precision, threads = {
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "openvino-async": _openvino_async,
    }[backend](file)
    tokenizer, pad = open_tokenizer(model), _pad_id(model)

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        import numpy as np

        encodings = tokenizer.encode_batch(list(texts))
        batches = in_length_order([len(encoding) for encoding in encodings], batch_size)
        found = run(_feed([encodings[at] for at in batch], names, pad) for batch in batches)
        vectors = np.empty((len(encodings), found[0].shape[1]), np.float32)
        for batch, part in zip(batches, found, strict=True):
            vectors[batch] = part
        return vectors

    return Model(encode=encode, precision=precision, threads=threads)


def _onnxruntime(file: str) -> tuple[Run, list[str], str, int | None]:
    session = import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda feeds: [session.run([OUTPUT], feed)[0] for feed in feeds], names, "float32", None


def _openvino(file: str) -> tuple[Run, list[str], str, int | None]:
    compiled = import_module("openvino").Core().compile_model(file, "CPU")
    names = [value.get_any_name() for value in compiled.inputs]
    return lambda feeds: [compiled(feed)[OUTPUT] for feed in feeds], names, *_properties(compiled)


def _openvino_async(file: str) -> tuple[Run, list[str], str, int | None]:
    library = import_module("openvino")
    compiled = library.Core().compile_model(file, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = library.AsyncInferQueue(compiled)
    found: dict[int, Any] = {}

    def done(request: Any, at: int) -> None:
        found[at] = request.get_tensor(OUTPUT).data.copy()  # the next batch overwrites the tensor

    queue.set_callback(done)

    def run(feeds: Iterable[Feed]) -> list[Any]:
        found.clear()
        for at, feed in enumerate(feeds):
            queue.start_async(feed, at)
        queue.wait_all()
        return [found[at] for at in range(len(found))]

    return run, [value.get_any_name() for value in compiled.inputs], *_properties(compiled)


def _properties(compiled: Any) -> tuple[str, int]:
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return str(precision), int(compiled.get_property("INFERENCE_NUM_THREADS"))


def _pad_id(model: str) -> int:
    return int(read_json(Path(model) / "config.json").get("pad_token_id") or 0)


def _feed(encodings: Sequence[Any], names: Sequence[str], pad: int) -> Feed:
    import numpy as np

    shape = (len(encodings), max(len(encoding) for encoding in encodings))
    feed = {"input_ids": np.full(shape, pad, np.int64)}
    feed |= {name: np.zeros(shape, np.int64) for name in names if name != "input_ids"}
    for row, encoding in enumerate(encodings):
        feed["input_ids"][row, : len(encoding)] = encoding.ids
        feed["attention_mask"][row, : len(encoding)] = 1
    return feed


if __name__ == "__main__":
    packages = ("onnxruntime", "openvino", "tokenizers", "numpy")
    sys.exit(serve(Library(open=open_model, packages=packages), sys.argv[1:]))
