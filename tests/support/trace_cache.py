"""Keep slow, deterministic results of exports on disk between test runs: graph traces and whole bundles.

An entry is found by a hash of everything that can change it: the source files that its modules import, the versions of
the libraries, this machine's processor, and a key of the caller's. Two processes may use the cache at the same time.
`MIRROR_TEST_CACHE` names the folder (default: `.pytest_cache/mirror` in the repository); deleting it is always safe.
"""

import ast
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.stopwatch import shared_work

FOLDER = Path(os.environ.get("MIRROR_TEST_CACHE") or ROOT / ".pytest_cache" / "mirror")

ROOMS = {"mirror_runtime": ROOT / "runtime" / "mirror_runtime"} | {
    room: ROOT / room for room in ("encoders", "evaluation", "export", "training")
}

LIBRARIES = (
    *("torch", "transformers", "onnx", "onnxscript", "optimum", "tokenizers", "safetensors", "numpy", "ml_dtypes"),
    *("onnxruntime", "openvino"),
)

KEPT_SOURCES = 3
"""States of the sources whose entries are kept, of each kind: a bundle takes 270 MB."""


def cached_folder(kind: str, module: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` filled, in this run or an earlier one. Never write into it: copy it first.

    Args:
        kind: names the kind of entry, such as "minilm-bundle"; a folder name.
        module: the module whose code makes the entry; all project modules that it imports count as its sources.
        key: everything else that decides the content, such as options or a hash of the weights.
        make: fills an empty folder.
    """
    states = FOLDER / kind
    state = states / sources_hash(module)
    entry = state / hashlib.sha256(key.encode()).hexdigest()[:24]
    state.mkdir(parents=True, exist_ok=True)
    with shared_work(), _locked(entry.with_suffix(".lock")):
        if not entry.is_dir():
            _forget_old_states(states)
            beside = Path(mkdtemp(prefix=f".{entry.name}-", dir=state))
            try:
                make(beside)
                os.replace(beside, entry)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    os.utime(state)
    return entry


@contextmanager
def cached_traces() -> Iterator[None]:
    """Read PyTorch's translation of a module from the cache while the block runs.

    Only the call of `torch.onnx.export` is left out: everything after it runs. The key holds the whole module: its
    weights, structure and configuration, the head's spec, and the contract of inputs and outputs. Traces that must be
    made share PyTorch's table of operators: building it took 1.5 of 6 seconds each time (2026-12-01).
    """
    import onnx
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from export.graph import trace

    real = getattr(trace._trace, "real", trace._trace)

    def cached(wrapper: Any, contract: trace.Signature) -> onnx.ModelProto:
        def make(folder: Path) -> None:
            (folder / "graph.onnx").write_bytes(real(wrapper, contract).SerializeToString())

        made = cached_folder("traces", "export.graph.trace", _wrapper_key(wrapper, contract), make)
        return onnx.load(made / "graph.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_trace", cached)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_operators()))
        cached.real = real  # type: ignore[attr-defined]
        yield


@functools.cache
def _operators() -> Callable[..., Any]:
    """Return PyTorch's function that builds the table of ONNX operators; each version's is built once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return functools.cache(ONNXRegistry.from_torchlib)


@functools.cache
def sources_hash(module: str) -> str:
    """Hash what decides an entry besides its key: a module's sources, the libraries, Python, and the processor."""
    digest = hashlib.sha256()
    for path in sources(module):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    for library in LIBRARIES:
        try:
            digest.update(f"{library} {version(library)}\n".encode())
        except PackageNotFoundError:
            digest.update(f"{library} is not installed\n".encode())
    digest.update(f"{platform.python_version()} {_processor()}".encode())
    return digest.hexdigest()[:24]


def sources(module: str) -> tuple[Path, ...]:
    """List the project's files that a module imports, directly or not, at its top or inside functions; itself first."""
    start = _file_of(module)
    if start is None:
        raise ValueError(f"{module} is not a module of this project")
    found: dict[Path, None] = {start: None}
    todo = [start]
    while todo:
        for name in _imported(todo.pop()):
            path = _file_of(name)
            if path is not None and path not in found:
                found[path] = None
                todo.append(path)
    # The packages that hold these modules run too; what they import for their own users does not count.
    packages = {parent / "__init__.py" for path in found for parent in path.parents if parent != ROOT}
    return (*found, *sorted(path for path in packages - found.keys() if ROOT in path.parents and path.is_file()))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                if not alias.name.startswith("__"):  # such as a version, which its package holds
                    yield from (node.module, f"{node.module}.{alias.name}")


def _file_of(name: str) -> Path | None:
    room, *rest = name.split(".")
    if room not in ROOMS:
        return None
    place = ROOMS[room].joinpath(*rest)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _wrapper_key(wrapper: Any, contract: object) -> str:
    """Hash a module that is to be traced: an encoder with one head or several."""
    digest = hashlib.sha256()
    settings = {name: value for name, value in vars(wrapper).items() if isinstance(value, (bool, int, str))}
    heads = [(module.spec, module.index) for module in wrapper.modules() if hasattr(module, "spec")]
    # The representation of a module is its structure: every layer with its sizes and activation.
    digest.update(repr((type(wrapper).__name__, settings, contract, heads, wrapper)).encode())
    digest.update(wrapper.encoder.config.to_json_string().encode())
    for name, tensor in (*wrapper.named_parameters(), *wrapper.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _processor() -> str:
    """Name the processor and its instructions: proofs depend on it, and bf16 is proven only where the CPU has it."""
    if not (facts := Path("/proc/cpuinfo")).exists():
        return platform.processor()
    lines = facts.read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _forget_old_states(folder: Path) -> None:
    states = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in states[:-KEPT_SOURCES]:
        if time.time() - path.stat().st_mtime > 3600:  # another run may be reading it
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
