"""The process's only `openvino.Core`, and its cache of ONNX graphs in OpenVINO's own format.

A graph is rewritten when it is read: see `openvino_rewrite`. A cached graph is parsed and rewritten once; afterwards
its weights are mapped from disk. Keeping it does not change any vector, not even in the last bit; the rewriting does in
int8 (worst cosine 0.9976). It saves the parsing and a copy of the weights in every process: mapped pages are shared by
all processes of a machine, and the system can drop them when memory is short.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import sha256_file
from mirror_runtime.engines import openvino_rewrite
from mirror_runtime.engines.openvino_rewrite import rewrite
from mirror_runtime.errors import InputError, MirrorError
from mirror_runtime.extras import require
from mirror_runtime.folders import whole_folder
from mirror_runtime.strict_json import load_json

_log = logging.getLogger(__name__)

_GRAPH, _WEIGHTS, _HASHES = "graph.xml", "graph.bin", "sha256.json"


def shared_core() -> Any:
    """Return the `openvino.Core` that this whole process compiles with.

    With two of them the next signal may kill the process: each installs a stack for signal handlers, and the last one
    to be destroyed restores its predecessor's, whose memory has been freed (2026.4.1).
    """
    return _core_of(require("openvino", "openvino"))


@functools.cache
def _core_of(openvino: Any) -> Any:
    return openvino.Core()


def read_graph(graph: Path, cache: Path | None, before_reading: Callable[[], None] = lambda: None) -> Any:
    """Read and rewrite a graph; an ONNX file through `cache`, a folder of its own, named after its content, or None.

    `before_reading` checks the file before it is read or converted; the cached files have hashes of their own. If the
    cache cannot be written, is damaged or belongs to another release of OpenVINO or another rewriting, the ONNX file is
    read, which only takes longer; the reason is logged. OpenVINO raises a RuntimeError if the graph itself cannot be
    read.
    """
    core = shared_core()
    if cache is None or graph.suffix != ".onnx":
        before_reading()
        return rewrite(core.read_model(graph))
    openvino = require("openvino", "openvino")
    revision = sha256_file(Path(openvino_rewrite.__file__))[:12]
    folder = cache / f"openvino-{openvino.get_version().replace('/', '-')}-rewritten-{revision}"
    kept = _read(core, folder)
    if kept is not None:
        return kept
    before_reading()
    model = rewrite(core.read_model(graph))
    if not (folder / _HASHES).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # the remains of a cached graph
    try:
        with whole_folder(folder, overwrite=True, marker=_HASHES) as partial:
            openvino.save_model(model, partial / _GRAPH, compress_to_fp16=False)
            hashes = {name: sha256_file(partial / name) for name in (_GRAPH, _WEIGHTS)}
            (partial / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
    except (InputError, OSError, RuntimeError) as error:  # disk full, no permission, or another process is writing it
        _log.info("the graph is not cached: %s", error)
        return model
    return _read(core, folder) or model


def _read(core: Any, folder: Path) -> Any | None:
    """Read a cached graph; None if there is none or it is damaged."""
    if not (folder / _HASHES).is_file():
        return None
    try:
        hashes = load_json(folder / _HASHES)
        if hashes == {name: sha256_file(folder / name) for name in (_GRAPH, _WEIGHTS)}:
            return core.read_model(folder / _GRAPH)
        reason = "its files have changed"
    except (MirrorError, OSError, RuntimeError) as error:
        reason = str(error)
    _log.warning("the cached graph in %s is damaged (%s) and is written again", folder, reason)
    return None
