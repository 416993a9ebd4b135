"""OpenVINO: a shape is only used if its vectors are right on all streams, and a cached graph changes speed only."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.graph.trace import export_graph
from mirror_runtime import BundleError, Encoder, EngineError
from mirror_runtime.bundle import EngineName, Layout, Pooling, Precision, sha256_file
from mirror_runtime.cache import cache_folder
from mirror_runtime.engines import load_engine, openvino_engine, openvino_rewrite
from mirror_runtime.host import has_bf16
from mirror_runtime.packing import PackedRows, ShapeSet, pack
from mirror_runtime.vectors import cosines
from tests.runtime.isolated import start
from tests.support.trace_cache import cached_traces

# All different: equal ones are computed once, and a single row has a single stream.
TEXTS = [f"the cat sat on the mat {'dog ' * (i % 30)}{'a ' * (i // 30)}" for i in range(120)]


@pytest.fixture
def damage(monkeypatch):
    """Make one stream of the first `times` models compute other vectors, as a damaged copy of the weights would."""

    def plant(times):
        make, compiled = openvino_engine._Slot.of, []

        def of(request, names):
            slot = make(request, names)
            compiled.append(slot)
            if len(compiled) % 2 == 0 and len(compiled) <= 2 * times:
                return openvino_engine._Slot(slot.request, slot.inputs, cast(Any, _Damaged(slot.output)))
            return slot

        monkeypatch.setattr(openvino_engine._Slot, "of", of)
        return compiled

    return plant


def load(bundle):
    return Encoder.load(bundle, engine="openvino", precision="fp32", streams=2, cache_dir=None)


class _Damaged:
    def __init__(self, output):
        self._output = output

    def __array__(self, dtype=None, copy=None):
        return self._output + np.float32(0.5)

    def __getitem__(self, key):
        return np.asarray(self)[key]


def test_a_load_makes_a_tensor_while_no_other_thread_does(tiny_bundle, monkeypatch):
    """Two threads that make a process's first tensors deadlock, but rarely: 12 processes without it did not."""
    import openvino

    lock, real = threading.Lock(), openvino.Tensor
    held: list[bool] = []
    monkeypatch.setattr(openvino_engine, "_FIRST_TENSORS", lock)
    monkeypatch.setattr(openvino, "Tensor", lambda array: (held.append(lock.locked()), real(array))[1])
    with load(tiny_bundle):
        assert held == [True]


def test_streams_that_disagree_are_compiled_again_and_the_log_says_so(tiny_bundle, damage, caplog):
    with Encoder.load(tiny_bundle, engine="onnxruntime", precision="fp32") as encoder:
        expected = encoder.encode(TEXTS)
    damage(1)
    with caplog.at_level(logging.WARNING), load(tiny_bundle) as encoder:
        vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert "streams disagree" in caplog.text


def test_streams_that_never_agree_are_an_error_that_names_the_cure(tiny_bundle, damage):
    damage(100)
    with (
        load(tiny_bundle) as encoder,
        pytest.raises(EngineError, match=r"different vectors for one batch, 3 times in a row: run .* with streams=1"),
    ):
        encoder.encode(TEXTS)


def taking(seconds, clock):
    """A request that takes these seconds by its thread's clock, round by round."""
    return Mock(wait=Mock(side_effect=lambda: setattr(clock, "now", next(seconds))))


@pytest.fixture
def clock(monkeypatch):
    """A clock a thread, so that the machine's load decides nothing."""
    clock = threading.local()
    monkeypatch.setattr(openvino_engine, "time", Mock(perf_counter=lambda: getattr(clock, "now", 0.0)))
    return clock


def test_what_openvino_cannot_run_is_an_engine_error():
    request = Mock(wait=Mock(side_effect=RuntimeError("Exception from src/inference")))
    slot = openvino_engine._Slot(request, {"input_ids": np.ones((4, 64), np.int64)}, np.ones(0, np.float32))
    with pytest.raises(EngineError, match=r"openvino failed on rows \(4, 64\): Exception from src"):
        slot.run()


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        ([(0.2, 0.2, 0.2), (0.2, 0.2, 0.2)], 1),
        ([(0.2, 0.2, 0.2), (0.5, 0.2, 0.2)], 2),  # one stream ran both
        ([(0.2, 0.2, 0.2), (0.5, 0.5, 0.5)], 3),
        ([(0.002, 0.002, 0.002), (0.002, 0.002, 0.002)], 3),  # too quick to tell
    ],
)
def test_streams_are_compared_until_all_have_run(seconds, rounds, clock):
    output = np.ones((2, 4, 8), np.float32)
    requests = [taking(iter(each), clock) for each in seconds]
    slots = [openvino_engine._Slot(request, {}, output) for request in requests]
    ids = np.ones((2, 16), np.int64)
    rows = PackedRows(input_ids=ids, position_ids=ids, segment_ids=ids)
    assert openvino_engine._agree(slots, rows)
    assert [request.start_async.call_count for request in requests] == [rounds, rounds]
    others = [openvino_engine._Slot(taking(iter([0.05]), clock), {}, output + i) for i in range(2)]
    assert not openvino_engine._agree(others, rows)


def test_a_signal_after_two_encoders_are_closed_is_only_a_signal(tiny_bundle):
    process = start("interrupt_after_two_encoders", tiny_bundle)
    assert process.communicate()[0] == "interrupted\n"
    assert process.returncode == 0


@pytest.mark.trace
@pytest.mark.skipif(not has_bf16(), reason="the CPU has no bf16")
def test_cls_of_every_row_length_is_right_in_bf16(minilm, tmp_path):
    ignored = shutil.ignore_patterns("modules.json", "[0-9]_*", "sentence_bert*", "*.onnx")  # its own head
    plain = shutil.copytree(minilm, tmp_path / "plain", ignore=ignored, copy_function=os.symlink)
    config = json.loads((minilm / "config.json").read_text())
    (plain / "config.json").unlink()
    (plain / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))  # tracing six takes long
    source, graph = resolve(str(plain), pooling=Pooling.CLS), tmp_path / "model_packed.onnx"
    with cached_traces():
        export_graph(Reference.load(source), Layout.PACKED, graph)
    exact = load_engine(EngineName.ONNXRUNTIME, Precision.FP32, graph, spec=source.spec)
    engine = load_engine(EngineName.OPENVINO, Precision.BF16, graph, spec=source.spec)
    shape_set = ShapeSet.up_to(128, length_multiple=engine.length_multiple)
    ids = np.random.default_rng(0).integers(1000, 20_000, 128)
    pairs = []
    for tokens in range(3, 80, 5):
        (batch,) = pack(ids[:tokens], np.array([tokens]), shape_set)
        pairs.append([one.run(batch.rows)[0, 0] for one in (exact, engine)])
    found, expected = np.array(pairs).swapaxes(0, 1)
    assert cosines(found, expected).min() > 0.9995


SOME = ["the cat sat on the mat", "a dog", "", *("word " * n for n in range(1, 70, 7))]


def vectors(bundle: Path, cache: Path | None) -> np.ndarray:
    with Encoder.load(bundle, engine="openvino", precision="fp32", cache_dir=cache) as encoder:
        return encoder.encode(SOME)


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> np.ndarray:
    return vectors(tiny_bundle, None)


def test_the_first_load_fills_it_and_the_second_reads_it_with_the_same_bits(tiny_bundle, tmp_path, expected):
    assert vectors(tiny_bundle, tmp_path).tobytes() == expected.tobytes()
    (weights,) = tmp_path.rglob("graph.bin")
    before = weights.stat().st_mtime_ns
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "onnx/model_packed.onnx").write_bytes(b"not read any more")
    assert vectors(bundle, tmp_path).tobytes() == expected.tobytes()
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("graph.xml", lambda whole: whole[: len(whole) // 2]),
        ("graph.bin", lambda whole: whole[: len(whole) // 2]),
        ("graph.bin", lambda whole: whole + bytes(64)),  # OpenVINO itself would accept this one
        ("graph.bin", lambda whole: whole[:5000] + bytes(2000) + whole[7000:]),
        ("sha256.json", lambda whole: whole[: len(whole) // 2]),
    ],
)
def test_a_damaged_one_is_made_again(tiny_bundle, tmp_path, expected, caplog, name, damage):
    vectors(tiny_bundle, tmp_path)
    (file,) = tmp_path.rglob(name)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert vectors(tiny_bundle, tmp_path).tobytes() == expected.tobytes()
    assert "is damaged" in caplog.text
    caplog.clear()
    assert vectors(tiny_bundle, tmp_path).tobytes() == expected.tobytes()
    assert "is damaged" not in caplog.text


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["onnx/model_packed.onnx", "tokenizer.json"])
def test_a_damaged_bundle_does_not_load_and_is_not_cached(tiny_bundle, tmp_path, engine, name):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    whole = (bundle / name).read_bytes()
    (bundle / name).write_bytes(whole[:5000] + bytes(2000) + whole[7000:])
    with pytest.raises(BundleError, match=f"corrupted: {name} differ"):
        Encoder.load(bundle, engine=engine, precision="fp32", cache_dir=tmp_path / "cache")
    assert not list(tmp_path.rglob("graph.bin"))


def test_another_release_has_its_own_and_one_that_cannot_be_written_is_done_without(tiny_bundle, tmp_path, expected):
    vectors(tiny_bundle, tmp_path)
    (file,) = tmp_path.rglob("graph.xml")
    assert file.parent.name.endswith(sha256_file(Path(openvino_rewrite.__file__))[:12])
    file.parent.rename(file.parent.with_name("openvino-1.0"))
    assert vectors(tiny_bundle, tmp_path).tobytes() == expected.tobytes()
    assert len(list(tmp_path.rglob("graph.xml"))) == 2
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert vectors(tiny_bundle, blocked).tobytes() == expected.tobytes()


def test_the_users_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "mirror-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("auto") == tmp_path / "home" / ".cache" / "mirror-runtime"
    assert cache_folder("elsewhere") == Path("elsewhere")
    assert cache_folder(None) is None
    monkeypatch.setattr(Path, "home", staticmethod(lambda: (_ for _ in ()).throw(RuntimeError)))
    assert cache_folder("auto") is None, "a container's user may have none; auto does without"
