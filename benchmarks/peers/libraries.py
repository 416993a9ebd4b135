"""How each library opens a bundle, as its documentation shows it. Runs in that library's environment.

python -I benchmarks/peers/libraries.py NAME

The functions import their library when they are called: no environment has them all. They read only the files of the
bundle that the library's users have, and put texts into the encoder's template, as its card says; sentence-transformers
has that as a prompt.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Encode, Export, Model, Open, read_json, serve

GRAPH = "onnx/model.onnx"
OUTPUT = "sentence_embedding"

INT8_SUFFIX = "peer_int8"
INT8_FILES = {"onnx-int8": f"model_{INT8_SUFFIX}.onnx", "openvino-int8": f"openvino_model_{INT8_SUFFIX}.xml"}
"""Of sentence-transformers: distinct names, since a bundle may have our int8 under the library's usual ones."""

CALIBRATION_TEXTS = 300
"""The default of sentence-transformers."""

COPIED = ("tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json", "encoder.json")
"""Files that encoding needs and CTranslate2's converter does not copy."""

RunBatches = Callable[[Iterable[list[Any]]], list[Any]]
"""Maps batches of `tokenizers.Encoding` to the vectors of each, in the order of the batches."""


def sentence_transformers(folder: str, backend: str, file: str) -> Model:
    """Load the folder with everything at its defaults but the backend and its file."""
    engine, name = backend.removesuffix("-int8"), file or INT8_FILES.get(backend)
    options: dict[str, Any] = {"model_kwargs": {"file_name": name}} if name else {}
    model = import_module("sentence_transformers").SentenceTransformer(
        folder, backend=engine, device="cpu", local_files_only=True, **options
    )

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        return model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)

    encode(["compiled at the first call"], 1)
    inner, int8 = model[0].auto_model, backend in INT8_FILES
    if engine == "openvino":
        precision, threads = _openvino_properties(inner.request)
        return Model(encode, f"int8, rest {precision}" if int8 else precision, threads)
    if engine == "onnx":  # its default is one thread per physical core, and it does not report them
        return Model(encode, f"int8 ({_onnx_configuration()})" if int8 else "float32")  # of the file
    precision = str(next(inner.parameters()).dtype).removeprefix("torch.")
    return Model(encode, precision, int(sys.modules["torch"].get_num_threads()))


def export_sentence_transformers(folder: str, backend: str, output: str, texts: Sequence[str]) -> None:
    """Save the model with the backend's files, so that loading does not convert again.

    The int8 variants come from the library's own functions: dynamic for ONNX; static for OpenVINO, calibrated on texts
    of the workload itself, which favours it.
    """
    library: Any = import_module("sentence_transformers")
    engine = backend.removesuffix("-int8")
    loaded = library.SentenceTransformer(folder, backend=engine, device="cpu", local_files_only=True)
    loaded.save_pretrained(output)
    if backend == "onnx-int8":
        configuration = _onnx_configuration()
        library.export_dynamic_quantized_onnx_model(loaded, configuration, output, file_suffix=INT8_SUFFIX)
    elif backend == "openvino-int8":
        samples = Path(output) / "calibration"
        samples.mkdir()
        lines = (json.dumps({"text": text}) + "\n" for text in texts[:CALIBRATION_TEXTS])
        (samples / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        library.export_static_quantized_openvino_model(
            loaded, None, output, dataset_name=str(samples), dataset_config_name="default", dataset_split="train",
            column_name="text", file_suffix=INT8_SUFFIX,
        )  # fmt: skip


def fastembed(folder: str, _backend: str, file: str) -> Model:
    """Register the folder as a custom model, described as `1_Pooling` and `modules.json` state it."""
    library, sources = import_module("fastembed"), import_module("fastembed.common.model_description")
    pooling, normalize = _head(folder)
    library.TextEmbedding.add_custom_model(
        model="bundle",
        pooling=sources.PoolingType[pooling.upper()],
        normalization=normalize,
        sources=sources.ModelSource(hf="unused/unused"),
        dim=read_json(Path(folder) / "1_Pooling" / "config.json")["word_embedding_dimension"],
        model_file=file or GRAPH,
    )
    model, templated = library.TextEmbedding("bundle", specific_model_path=folder), _template(folder)
    return Model(lambda texts, batch_size: list(model.embed(templated(texts), batch_size=batch_size)))


def ctranslate2(folder: str, backend: str, _file: str) -> Model:
    """Load the converted model, computing in the type that `backend` names; pooling is in numpy."""
    encoder = import_module("ctranslate2").Encoder(folder, device="cpu", compute_type=backend)
    pooling, normalize = _head(folder)

    def vectors(batch: list[Any]) -> Any:
        import numpy as np

        hidden = np.array(encoder.forward_batch([one.ids for one in batch]).last_hidden_state)
        if pooling == "mean":
            lengths = np.array([len(one) for one in batch], hidden.dtype)[:, None]
            mask = (np.arange(hidden.shape[1]) < lengths).astype(hidden.dtype)
            pooled = np.einsum("nld,nl->nd", hidden, mask) / lengths
        else:
            pooled = hidden[:, 0]
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if normalize else pooled

    encode = _plain_loop(folder, lambda batches: [vectors(batch) for batch in batches])
    return Model(encode, str(encoder.compute_type))


def convert_to_ctranslate2(folder: str, _backend: str, output: str, _texts: Sequence[str]) -> None:
    """Convert the weights. They are quantised at loading, from the same file."""
    import_module("ctranslate2.converters").TransformersConverter(folder).convert(output)
    for name in COPIED:
        target = Path(output) / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / name, target)


def infinity(folder: str, _backend: str, _file: str) -> Model:
    """Start the engine in this process, and restart it for each batch size, an argument of its constructor.

    The driver never times the first call with a batch size.
    """
    library, loop = import_module("infinity_emb"), import_module("asyncio").new_event_loop()
    running: dict[int, Any] = {}  # the engine, by its batch size

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        if batch_size not in running:
            for engine in running.values():
                loop.run_until_complete(engine.astop())
            running.clear()
            arguments = library.EngineArgs(
                model_name_or_path=folder, engine="torch", device="cpu", batch_size=batch_size
            )  # fmt: skip
            running[batch_size] = library.AsyncEmbeddingEngine.from_args(arguments)
            loop.run_until_complete(running[batch_size].astart())
        # It forms the batches by itself.
        vectors, _ = loop.run_until_complete(running[batch_size].embed(sentences=list(texts)))
        return vectors

    encode(["start"], 1)
    return Model(encode, threads=int(sys.modules["torch"].get_num_threads()))


def optimum_onnx(folder: str, _backend: str, file: str) -> Model:
    """Load one graph as optimum-onnx's model of arbitrary outputs, with transformers' tokenizer."""
    runtime, transformers = import_module("optimum.onnxruntime"), import_module("transformers")
    model = runtime.ORTModelForCustomTasks.from_pretrained(
        folder, subfolder=str(Path(file).parent), file_name=Path(file).name, local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    templated = _template(folder)

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        prepared, vectors = templated(texts), []
        for at in range(0, len(prepared), batch_size):
            feed = tokenizer(prepared[at : at + batch_size], padding=True, truncation=True, return_tensors="np")
            vectors += list(model(**{name: feed[name] for name in model.input_names if name in feed})[OUTPUT])
        return vectors

    return Model(encode)


def engine_loops(folder: str, backend: str, file: str) -> Model:
    """Run the bundle's padded graph, whose output is the vector, in the loop that one writes without a framework.

    `openvino` runs one batch at a time; `openvino-async` keeps several under way with OpenVINO's own queue and its
    throughput hint, as its documentation recommends.
    """
    path = str(Path(folder) / (file or GRAPH))
    if backend == "onnxruntime":
        session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = _feeder(folder, [value.name for value in session.get_inputs()])
        return Model(
            _plain_loop(folder, lambda batches: [session.run([OUTPUT], feed(batch))[0] for batch in batches])
        )  # fmt: skip
    library, is_async = import_module("openvino"), backend == "openvino-async"
    settings = {"PERFORMANCE_HINT": "THROUGHPUT"} if is_async else {}
    compiled = library.Core().compile_model(path, "CPU", settings)
    feed = _feeder(folder, [value.get_any_name() for value in compiled.inputs])
    properties = _openvino_properties(compiled)
    if not is_async:
        return Model(_plain_loop(folder, lambda batches: [compiled(feed(one))[OUTPUT] for one in batches]), *properties)
    queue, found = library.AsyncInferQueue(compiled), dict[int, Any]()

    def done(request: Any, at: int) -> None:
        found[at] = request.get_tensor(OUTPUT).data.copy()  # the next batch overwrites the tensor

    def run(batches: Iterable[list[Any]]) -> list[Any]:
        for at, batch in enumerate(batches):
            queue.start_async(feed(batch), at)
        queue.wait_all()
        return [found.pop(at) for at in sorted(found)]

    queue.set_callback(done)
    return Model(_plain_loop(folder, run), *properties)


def _plain_loop(folder: str, run: RunBatches) -> Encode:
    """Tokenise everything, sort by length, cut into batches, run them, and restore the order of the texts."""
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.enable_truncation(read_json(Path(folder) / "tokenizer_config.json")["model_max_length"])
    tokenizer.no_padding()
    templated = _template(folder)

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        import numpy as np

        encodings = tokenizer.encode_batch(templated(texts))
        # Longest first: little padding, and the largest batch fails at once.
        order = sorted(range(len(encodings)), key=lambda at: -len(encodings[at]))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        found = run([encodings[at] for at in batch] for batch in batches)
        vectors = np.empty((len(encodings), found[0].shape[1]), found[0].dtype)
        for batch, part in zip(batches, found, strict=True):
            vectors[batch] = part
        return vectors

    return encode


def _feeder(folder: str, names: Sequence[str]) -> Callable[[list[Any]], dict[str, Any]]:
    """Return a function that pads a batch to its longest text."""
    pad = read_json(Path(folder) / "config.json").get("pad_token_id") or 0

    def feed(batch: list[Any]) -> dict[str, Any]:
        import numpy as np

        shape = len(batch), max(len(encoding) for encoding in batch)
        arrays = {name: np.full(shape, pad if name == "input_ids" else 0, np.int64) for name in names}
        for row, encoding in enumerate(batch):
            arrays["input_ids"][row, : len(encoding)] = encoding.ids
            arrays["attention_mask"][row, : len(encoding)] = 1
        return arrays

    return feed


def _head(folder: str) -> tuple[str, bool]:
    """Read a sentence-transformers folder's pooling ("mean" or "cls") and whether it normalises."""
    pooling = read_json(Path(folder) / "1_Pooling" / "config.json")
    kinds = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    chosen = [kind for key, kind in kinds.items() if pooling.get(key)]
    modules = [module["type"].rsplit(".", 1)[-1] for module in read_json(Path(folder) / "modules.json")]
    if len(chosen) != 1 or not set(modules) <= {"Transformer", "Pooling", "Normalize"}:
        raise ValueError("this peer supports only mean and cls pooling")
    return chosen[0], "Normalize" in modules


def _template(folder: str) -> Callable[[Sequence[str]], list[str]]:
    template = read_json(Path(folder) / "encoder.json")["template"] or "{text}"
    return list if template == "{text}" else lambda texts: [template.replace("{text}", text) for text in texts]


def _openvino_properties(compiled: Any) -> tuple[str, int]:
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return str(precision), int(compiled.get_property("INFERENCE_NUM_THREADS"))


def _onnx_configuration() -> str:
    """Return the name of sentence-transformers' quantisation for this CPU."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "avx512_vnni" if "avx512_vnni" in flags else "avx512" if "avx512f" in flags else "avx2"


LIBRARIES: dict[str, Open] = {
    "sentence_transformers": sentence_transformers,
    "fastembed": fastembed,
    "ctranslate2": ctranslate2,
    "engine_loops": engine_loops,
    "infinity": infinity,
    "optimum_onnx": optimum_onnx,
}
EXPORTS: dict[str, Export] = {
    "sentence_transformers": export_sentence_transformers,
    "ctranslate2": convert_to_ctranslate2,
}

if __name__ == "__main__":
    serve(LIBRARIES[sys.argv[1]], EXPORTS.get(sys.argv[1]))
