"""sentence-transformers, each backend opened as its documentation says. Runs in its own environment.

The int8 variants come from the library's own export functions: dynamic for ONNX; static for OpenVINO, calibrated on
texts of the workload itself, which favours it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: nothing of ours may shadow a library
from benchmarks.peers.protocol import Library, Model, serve

SUFFIX = "peer_int8"
FILES = {"onnx-int8": f"model_{SUFFIX}.onnx", "openvino-int8": f"openvino_model_{SUFFIX}.xml"}
"""Distinct names: a bundle may have our int8 under the library's usual ones."""

CALIBRATION_TEXTS = 300
"""The library's default."""

PACKAGES = (
    *("sentence-transformers", "transformers", "torch", "optimum", "optimum-intel", "optimum-onnx"),
    *("openvino", "nncf", "onnxruntime", "numpy"),
)


def open_model(model: str, backend: str) -> Model:
    """Load the folder with everything at its defaults."""
    loaded = _load(model, backend)

    def encode(texts: Sequence[str], batch_size: int) -> Any:
        return loaded.encode(list(texts), batch_size=batch_size, show_progress_bar=False)

    encode(["compiled at the first call"], 1)
    return Model(encode=encode, precision=_precision(loaded, backend), threads=_threads(loaded, backend))


def export(model: str, backend: str, output: str, texts: Sequence[str]) -> None:
    """Save the model with the backend's files, so that loading does not convert again."""
    library: Any = import_module("sentence_transformers")
    loaded = _load(model, _engine(backend))
    loaded.save_pretrained(output)
    if backend == "onnx-int8":
        library.export_dynamic_quantized_onnx_model(loaded, _onnx_configuration(), output, file_suffix=SUFFIX)
    elif backend == "openvino-int8":
        samples = Path(output) / "calibration"
        samples.mkdir()
        lines = (json.dumps({"text": text}) + "\n" for text in texts[:CALIBRATION_TEXTS])
        (samples / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        library.export_static_quantized_openvino_model(
            loaded,
            None,
            output,
            dataset_name=str(samples),
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
            file_suffix=SUFFIX,
        )


def _load(model: str, backend: str) -> Any:
    library: Any = import_module("sentence_transformers")  # not needed before the first request
    options = {"model_kwargs": {"file_name": FILES[backend]}} if backend in FILES else {}
    return library.SentenceTransformer(model, backend=_engine(backend), device="cpu", local_files_only=True, **options)


def _engine(backend: str) -> str:
    return backend.removesuffix("-int8")


def _onnx_configuration() -> str:
    """Return the library's configuration name for this CPU."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return "avx512_vnni" if "avx512_vnni" in flags else "avx512" if "avx512f" in flags else "avx2"


def _precision(model: Any, backend: str) -> str:
    """Return the number format that the backend computes in, from the backend itself where it reports it."""
    inner = model[0].auto_model
    if _engine(backend) == "openvino":
        rest = str(inner.request.get_property("INFERENCE_PRECISION_HINT").to_string())
        return f"int8, rest {rest}" if backend in FILES else rest
    if _engine(backend) == "onnx":
        return f"int8 ({_onnx_configuration()})" if backend in FILES else "float32"  # of the file
    return str(next(inner.parameters()).dtype).removeprefix("torch.")


def _threads(model: Any, backend: str) -> int | None:
    if _engine(backend) == "openvino":
        return int(model[0].auto_model.request.get_property("INFERENCE_NUM_THREADS"))
    if _engine(backend) == "torch":
        return int(sys.modules["torch"].get_num_threads())  # loaded by the library
    return None  # ONNX Runtime's default is one per physical core, and it does not report it


if __name__ == "__main__":
    sys.exit(serve(Library(open=open_model, packages=PACKAGES, export=export), sys.argv[1:]))
