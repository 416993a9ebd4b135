"""fastembed, with the bundle registered as a custom model. Runs in its own environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Library, Model, read_head, read_json, serve

FILE = "onnx/model.onnx"


def open_model(model: str, backend: str) -> Model:
    """Describe the folder to the library and load its padded graph."""
    library, description = import_module("fastembed"), import_module("fastembed.common.model_description")
    pooling, normalize = read_head(model)
    library.TextEmbedding.add_custom_model(
        model="bundle",
        pooling=description.PoolingType[pooling.upper()],
        normalization=normalize,
        sources=description.ModelSource(hf="unused/unused"),
        dim=read_json(Path(model) / "1_Pooling" / "config.json")["word_embedding_dimension"],
        model_file=FILE,
    )
    loaded = library.TextEmbedding("bundle", specific_model_path=model)

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        return list(loaded.embed(texts, batch_size=batch_size))

    return Model(encode=encode, precision="float32", threads=None)


if __name__ == "__main__":
    packages = ("fastembed", "onnxruntime", "tokenizers", "numpy")
    sys.exit(serve(Library(open=open_model, packages=packages), sys.argv[1:]))
