"""Consumers of a bundle, each opened as its documentation says. Runs in that library's environment.

It speaks the peers' protocol with `backend` being a consumer's name and the graph that it loads, relative to the
bundle, such as "onnxruntime onnx/model.onnx"; without a graph the library reads the weights. It reads only the files of
the bundle that the library's users have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Library, Model, read_head, read_json, serve

Encode = Callable[[Sequence[str], int], Any]
"""Texts and a batch size to vectors [n, dim]."""

PACKAGES = (
    *("sentence-transformers", "transformers", "torch", "optimum-onnx", "optimum-intel"),
    *("fastembed", "onnxruntime", "openvino", "tokenizers", "numpy"),
)


def sentence_transformers(bundle: Path, **options: Any) -> Encode:
    """Load the folder, with everything but the backend's options at its defaults."""
    library: Any = import_module("sentence_transformers")
    model = library.SentenceTransformer(str(bundle), device="cpu", local_files_only=True, **options)
    return lambda texts, batch_size: model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)


def optimum_onnx(bundle: Path, file: str) -> Encode:
    """Load one graph as optimum-onnx's model of arbitrary outputs, with transformers' tokenizer."""
    runtime, transformers = import_module("optimum.onnxruntime"), import_module("transformers")
    model = runtime.ORTModelForCustomTasks.from_pretrained(
        bundle, subfolder=str(Path(file).parent), file_name=Path(file).name, local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle, local_files_only=True)

    def encode_batch(batch: list[str]) -> Any:
        feed = tokenizer(batch, padding=True, truncation=True, return_tensors="np")
        return model(**{name: feed[name] for name in model.input_names if name in feed})["sentence_embedding"]

    return _in_batches(encode_batch, bundle)


def fastembed(bundle: Path, file: str) -> Encode:
    """Register the folder as a custom model, described as `1_Pooling` and `modules.json` state it."""
    library, sources = import_module("fastembed"), import_module("fastembed.common.model_description")
    pooling, normalize = read_head(str(bundle))
    library.TextEmbedding.add_custom_model(
        model=bundle.name,
        pooling=sources.PoolingType[pooling.upper()],
        normalization=normalize,
        sources=sources.ModelSource(hf="unused/unused"),
        dim=read_json(bundle / "1_Pooling/config.json")["word_embedding_dimension"],
        model_file=file,
    )
    model = library.TextEmbedding(bundle.name, specific_model_path=str(bundle))
    return lambda texts, batch_size: list(model.embed(_templated(bundle, texts), batch_size=batch_size))


def onnxruntime(bundle: Path, file: str) -> Encode:
    """Run one graph in a session with default options."""
    session = import_module("onnxruntime").InferenceSession(str(bundle / file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return _in_batches(lambda batch: session.run(["sentence_embedding"], _feed(bundle, batch, names))[0], bundle)


def openvino(bundle: Path, file: str) -> Encode:
    """Compile one graph or IR with default options."""
    model = import_module("openvino").Core().compile_model(str(bundle / file), "CPU")
    names = [value.get_any_name() for value in model.inputs]
    return _in_batches(lambda batch: model(_feed(bundle, batch, names))["sentence_embedding"], bundle)


_CPU = {"provider": "CPUExecutionProvider"}
CONSUMERS: dict[str, Callable[[Path, str], Encode]] = {
    "sentence_transformers_torch": lambda bundle, file: sentence_transformers(bundle),
    "sentence_transformers_onnx": lambda bundle, file: sentence_transformers(
        bundle, backend="onnx", model_kwargs={"file_name": file, **_CPU}
    ),
    "sentence_transformers_openvino": lambda bundle, file: sentence_transformers(
        bundle, backend="openvino", model_kwargs={"file_name": file}
    ),
    "optimum_onnx": optimum_onnx,
    "fastembed": fastembed,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def open_model(model: str, backend: str) -> Model:
    """Open the bundle in the consumer that `backend` names."""
    consumer, _, file = backend.partition(" ")
    return Model(encode=CONSUMERS[consumer](Path(model), file), precision="", threads=None)


def _templated(bundle: Path, texts: Sequence[str]) -> list[str]:
    """Put texts into the encoder's template, as its card says; sentence-transformers has it as a prompt."""
    template = read_json(bundle / "encoder.json")["template"] or "{text}"
    return [template.replace("{text}", text) for text in texts]


def _feed(bundle: Path, texts: list[str], names: Sequence[str]) -> dict[str, Any]:
    """Tokenise a batch with the folder's own limit and padding token."""
    import numpy as np

    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(bundle / "tokenizer.json"))
    config = read_json(bundle / "tokenizer_config.json")
    pad = config["pad_token"]
    tokenizer.enable_truncation(config["model_max_length"])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    encodings = tokenizer.encode_batch(texts)
    found = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }
    return {name: np.array(found[name], np.int64) for name in names}


def _in_batches(encode_batch: Callable[[list[str]], Any], bundle: Path) -> Encode:
    def encode(texts: Sequence[str], batch_size: int) -> list[Any]:
        prepared = _templated(bundle, texts)
        starts = range(0, len(prepared), batch_size)
        return [vector for start in starts for vector in encode_batch(prepared[start : start + batch_size])]

    return encode


if __name__ == "__main__":
    sys.exit(serve(Library(open=open_model, packages=PACKAGES), sys.argv[1:]))
