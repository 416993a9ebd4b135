"""CTranslate2's encoder with pooling in numpy, as its documentation shows it. Runs in its own environment."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Library, Model, in_length_order, open_tokenizer, read_head, serve

COPIED = ("tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json")
"""Files that encoding needs and the converter does not copy."""


def export(model: str, backend: str, output: str, texts: Sequence[str]) -> None:
    """Convert the weights. They are quantised at loading, from the same file."""
    converter = import_module("ctranslate2.converters").TransformersConverter(model)
    converter.convert(output)
    for name in COPIED:
        target = Path(output) / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(model) / name, target)


def open_model(model: str, backend: str) -> Model:
    """Load the converted model, computing in the type that `backend` names."""
    encoder = import_module("ctranslate2").Encoder(model, device="cpu", compute_type=backend)
    tokenizer = open_tokenizer(model)
    pooling, normalize = read_head(model)

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        import numpy as np

        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        vectors: Any = None
        for batch in in_length_order([len(one) for one in ids], batch_size):
            hidden = np.array(encoder.forward_batch([ids[at] for at in batch]).last_hidden_state)
            lengths = np.array([len(ids[at]) for at in batch])
            if pooling == "mean":
                mask = np.arange(hidden.shape[1]) < lengths[:, None]
                pooled = np.einsum("nld,nl->nd", hidden, mask.astype(hidden.dtype)) / lengths[:, None]
            else:
                pooled = hidden[:, 0]
            if vectors is None:
                vectors = np.empty((len(ids), hidden.shape[2]), np.float32)
            vectors[batch] = pooled
        if normalize:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    return Model(encode=encode, precision=str(encoder.compute_type), threads=None)


if __name__ == "__main__":
    packages = ("ctranslate2", "transformers", "torch", "tokenizers", "numpy")
    sys.exit(serve(Library(open=open_model, packages=packages, export=export), sys.argv[1:]))
