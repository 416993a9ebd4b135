"""The cached graph changes speed only: vectors are bit-identical, whatever the state of the cache."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import Encoder
from mirror_runtime.cache import cache_folder

TEXTS = ["the cat sat on the mat", "a dog", "", *("word " * n for n in range(1, 70, 7))]


def vectors(bundle: Path, cache: Path | None) -> np.ndarray:
    with Encoder.load(bundle, engine="openvino", precision="fp32", cache_dir=cache) as encoder:
        return encoder.encode(TEXTS)


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
        ("sizes.json", lambda whole: whole[: len(whole) // 2]),
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


def test_another_release_has_its_own_and_one_that_cannot_be_written_is_done_without(tiny_bundle, tmp_path, expected):
    vectors(tiny_bundle, tmp_path)
    (file,) = tmp_path.rglob("graph.xml")
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
