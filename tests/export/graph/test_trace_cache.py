"""The tests' cache of traces and bundles: a hit is what a real trace gives, and a changed source or key misses."""

import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.graph import trace
from mirror_runtime.bundle import Layout, Pooling
from tests.support import trace_cache
from tests.support.paths import ROOT


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_cache, "FOLDER", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.trace
def test_a_cached_graph_is_byte_for_byte_the_real_one(tiny_bert, tmp_path, monkeypatch):
    reference = Reference.load(resolve(str(tiny_bert), pooling=Pooling.MEAN))  # the cache has it for other tests
    with trace_cache.cached_traces():
        trace.export_graph(reference, Layout.PACKED, tmp_path / "cached.onnx")
        monkeypatch.setattr(trace, "_trace", trace._trace.real)  # type: ignore[attr-defined]
        trace.export_graph(reference, Layout.PACKED, tmp_path / "real.onnx")
    assert (tmp_path / "cached.onnx").read_bytes() == (tmp_path / "real.onnx").read_bytes()


def test_an_entry_is_made_once_for_each_key_and_what_fails_leaves_none(empty_cache):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text("content")

    first = trace_cache.cached_folder("kind", "export.graph.trace", "a", make)
    assert trace_cache.cached_folder("kind", "export.graph.trace", "a", make) == first
    assert trace_cache.cached_folder("kind", "export.graph.trace", "b", make) != first
    assert (first / "file").read_text() == "content"
    assert len(made) == 2

    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("half way")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="half way"):
            trace_cache.cached_folder("kind", "export.graph.trace", "c", fail)
    assert not [path for path in empty_cache.rglob("*") if path.name == "half"]


def test_sources_are_what_a_module_imports():
    found = {path.relative_to(ROOT).as_posix() for path in trace_cache.sources("export.graph.trace")}
    assert {"export/graph/heads.py", "encoders/families.py", "runtime/mirror_runtime/vectors.py"} <= found
    assert not [path for path in found if "gateway" in path or "triton" in path]
    everything = {path.relative_to(ROOT).as_posix() for path in trace_cache.sources("export.to_onnx")}
    assert {"export/precision/quantize.py", "runtime/mirror_runtime/packing.py"} <= everything
