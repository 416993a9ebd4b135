"""One library loads one bundle and encodes texts. Runs in that library's environment and imports nothing of ours.

    python worker.py CONSUMER BUNDLE FILE TEXTS.json OUTPUT.npy

FILE is the graph to load, relative to the bundle; "" for a library that reads the weights. TEXTS.json is a list of
strings. The vectors [n, dim] go to OUTPUT.npy, and the last line of standard output is {"versions": {...}}, or
{"error": "..."} with exit status 1. Nothing is read from the bundle but what its library's users have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

BATCH = 4
"""Smaller than the number of texts, and several texts: padding and batching are part of what is compared."""


def sentence_transformers_torch(bundle: Path, file: str, texts: list[str]) -> Any:
    """Load the folder with everything at its defaults."""
    return _sentence_transformers(bundle, texts)


def sentence_transformers_onnx(bundle: Path, file: str, texts: list[str]) -> Any:
    """Load one graph through the ONNX backend."""
    options = {"file_name": file, "provider": "CPUExecutionProvider"}
    return _sentence_transformers(bundle, texts, backend="onnx", model_kwargs=options)


def sentence_transformers_openvino(bundle: Path, file: str, texts: list[str]) -> Any:
    """Load one IR through the OpenVINO backend."""
    return _sentence_transformers(bundle, texts, backend="openvino", model_kwargs={"file_name": file})


def optimum_onnx(bundle: Path, file: str, texts: list[str]) -> Any:
    """Load one graph as optimum-onnx's model of arbitrary outputs, with transformers' tokenizer."""
    runtime, transformers = import_module("optimum.onnxruntime"), import_module("transformers")
    model = runtime.ORTModelForCustomTasks.from_pretrained(
        bundle, subfolder=str(Path(file).parent), file_name=Path(file).name, local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle, local_files_only=True)

    def encode(batch: Sequence[str]) -> Any:
        feed = tokenizer(list(batch), padding=True, truncation=True, return_tensors="np")
        return model(**{name: feed[name] for name in model.input_names if name in feed})["sentence_embedding"]

    return _in_batches(encode, _templated(bundle, texts))


def fastembed(bundle: Path, file: str, texts: list[str]) -> Any:
    """Register the folder as a model of the user's own, described as `1_Pooling` and `modules.json` have it."""
    library, sources = import_module("fastembed"), import_module("fastembed.common.model_description")
    pooling = _json(bundle / "1_Pooling/config.json")
    kinds = {"pooling_mode_mean_tokens": "MEAN", "pooling_mode_cls_token": "CLS"}
    modules = [module["type"].rsplit(".", 1)[-1] for module in _json(bundle / "modules.json")]
    library.TextEmbedding.add_custom_model(
        model=bundle.name,
        pooling=sources.PoolingType[next(kind for key, kind in kinds.items() if pooling.get(key))],
        normalization="Normalize" in modules,
        sources=sources.ModelSource(hf="unused/unused"),
        dim=pooling["word_embedding_dimension"],
        model_file=file,
    )
    model = library.TextEmbedding(bundle.name, specific_model_path=str(bundle))
    return list(model.embed(_templated(bundle, texts), batch_size=BATCH))


def onnxruntime(bundle: Path, file: str, texts: list[str]) -> Any:
    """Run one graph in a session with default options."""
    library = import_module("onnxruntime")
    session = library.InferenceSession(str(bundle / file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return _in_batches(
        lambda batch: session.run(["sentence_embedding"], _feed(bundle, batch, names))[0], _templated(bundle, texts)
    )


def openvino(bundle: Path, file: str, texts: list[str]) -> Any:
    """Compile one graph or IR with default options."""
    library = import_module("openvino")
    model = library.Core().compile_model(str(bundle / file), "CPU")
    names = [value.get_any_name() for value in model.inputs]
    return _in_batches(
        lambda batch: model(_feed(bundle, batch, names))["sentence_embedding"], _templated(bundle, texts)
    )


CONSUMERS = {
    function.__name__: function
    for function in (
        sentence_transformers_torch,
        sentence_transformers_onnx,
        sentence_transformers_openvino,
        optimum_onnx,
        fastembed,
        onnxruntime,
        openvino,
    )
}

PACKAGES = (
    "sentence-transformers",
    "transformers",
    "torch",
    "optimum-onnx",
    "optimum-intel",
    "fastembed",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "numpy",
)


def _sentence_transformers(bundle: Path, texts: list[str], **options: Any) -> Any:
    library = import_module("sentence_transformers")
    model = library.SentenceTransformer(str(bundle), device="cpu", local_files_only=True, **options)
    return model.encode(texts, batch_size=BATCH, show_progress_bar=False)


def _templated(bundle: Path, texts: list[str]) -> list[str]:
    """Put texts into the encoder's template, as its card says; sentence-transformers has it as a prompt."""
    template = _json(bundle / "encoder.json")["template"] or "{text}"
    return [template.replace("{text}", text) for text in texts]


def _feed(bundle: Path, texts: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Tokenise a batch with the folder's own limit and padding token."""
    import numpy as np

    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(bundle / "tokenizer.json"))
    config = _json(bundle / "tokenizer_config.json")
    pad = config["pad_token"]
    tokenizer.enable_truncation(config["model_max_length"])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    encodings = tokenizer.encode_batch(list(texts))
    found = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }
    return {name: np.array(found[name], np.int64) for name in names}


def _in_batches(encode: Any, texts: Sequence[str]) -> Iterator[Any]:
    for at in range(0, len(texts), BATCH):
        yield from encode(texts[at : at + BATCH])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(argv: Sequence[str]) -> int:
    """Encode, write the vectors, and say which versions did it."""
    consumer, bundle, file, texts, output = argv
    try:
        import numpy as np

        vectors = CONSUMERS[consumer](Path(bundle), file, _json(Path(texts)))
        np.save(output, np.stack([np.asarray(vector) for vector in vectors]))
        answer: dict[str, Any] = {"versions": _versions()}
    except Exception as error:  # the process's edge: the driver reports what the library said
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
