"""A corpus on Ray workers gets the vectors of one encoder, and a resumed run encodes the missing shards only."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from mirror_runtime import Encoder, InputError
from mirror_runtime.cli.main import main
from mirror_runtime.corpus import encode_ray
from mirror_runtime.corpus.corpus import BadTexts, open_corpus
from mirror_runtime.corpus.encode_file import EncodeProgress
from mirror_runtime.corpus.encode_ray import encode_with_ray

OPTIONS: dict[str, Any] = {"workers": 2, "load_options": {"engine": "fake"}, "shard_rows": 300}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"row {i} {'word ' * (i % 17)}\n" for i in range(1000)))
    return path


class Rows(list):
    """Stands in for a Ray data set: it maps in this process."""

    def map_batches(self, worker, fn_constructor_args, batch_size, compute):
        encode = worker(*fn_constructor_args)
        results = (encode({name: np.array([value]) for name, value in row.items()}) for row in self)
        return Rows({name: values[0] for name, values in result.items()} for result in results)

    def iter_rows(self):
        return iter(self)


@pytest.fixture
def ray_in_process(monkeypatch):
    data = SimpleNamespace(
        DataContext=SimpleNamespace(get_current=SimpleNamespace),
        ActorPoolStrategy=lambda size: None,
        from_items=lambda items, override_num_blocks: Rows(items),
    )
    ray = SimpleNamespace(data=data, is_initialized=lambda: True, exceptions=SimpleNamespace(RayError=OSError))
    monkeypatch.setattr(encode_ray, "require", lambda *_: ray)


def vectors(folder: Path) -> np.ndarray:
    files = sorted(folder.iterdir())
    return np.concatenate([np.float32(parquet.read_table(file)["embedding"].to_pylist()) for file in files])


def expected(bundle: Path, corpus: Path) -> np.ndarray:
    with Encoder.load(bundle, engine="fake") as encoder:
        return encoder.encode(corpus.read_text().splitlines())


def test_the_command_writes_a_folder_of_shards(ray_in_process, bundle, corpus, tmp_path, capsys):
    arguments = ["encode", str(bundle), str(corpus), "-o", str(tmp_path / "out"), "--engine", "fake"]
    assert main([*arguments, "--engine-pool", "ray", "--workers", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["texts"], report["workers"], report["output"]) == (1000, 2, str(tmp_path / "out"))
    np.testing.assert_array_equal(vectors(tmp_path / "out"), expected(bundle, corpus))


def test_a_resumed_run_encodes_the_missing_shards_and_only_with_the_same_settings(
    ray_in_process, bundle, corpus, tmp_path
):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps({"text": f"row {i}" if i != 777 else None}) + "\n" for i in range(1000)))
    with pytest.raises(InputError, match="line 778: is NoneType"):
        encode_with_ray(bundle, open_corpus([broken]), tmp_path / "out", **OPTIONS)
    partial = tmp_path / "out.partial"
    assert sorted(file.stem for file in partial.glob("*.parquet")) == ["part-000000", "part-000001", "part-000003"]
    with pytest.raises(InputError, match="unfinished run with other settings"):
        encode_with_ray(bundle, open_corpus([corpus]), tmp_path / "out", **OPTIONS)
    kept = (partial / "part-000001.parquet").stat().st_mtime_ns
    progress: list[EncodeProgress] = []
    encode_with_ray(
        bundle, open_corpus([broken]), tmp_path / "out", **OPTIONS, bad_texts=BadTexts.ZERO, on_progress=progress.append
    )
    assert [(now.texts, now.failed) for now in progress] == [(700, 0), (1000, 1)]
    assert (tmp_path / "out" / "part-000001.parquet").stat().st_mtime_ns == kept
    assert np.flatnonzero(~vectors(tmp_path / "out").any(1)).tolist() == [777]
    assert not partial.exists()
    with pytest.raises(InputError, match="exists"):
        encode_with_ray(bundle, open_corpus([broken]), tmp_path / "out", **OPTIONS)


ON_LOOPBACK = """
import fcntl, socket, struct, sys
from pathlib import Path
from mirror_runtime.corpus.encode_ray import encode_with_ray
from mirror_runtime.corpus.corpus import open_corpus

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:  # SIOCSIFFLAGS: IFF_UP
    fcntl.ioctl(device, 0x8914, struct.pack("16sh14x", b"lo", 1))
bundle, corpus, output = map(Path, sys.argv[1:])
options = {"workers": 2, "load_options": {"engine": "fake"}, "shard_rows": 300}
assert encode_with_ray(bundle, open_corpus([corpus]), output, **options).texts == 1000
"""


@pytest.mark.slow  # starts Ray
def test_two_real_workers_encode_a_corpus(bundle, corpus, tmp_path):
    """In a network namespace with a loopback device only, because Ray listens on the machine's address."""
    if find_spec("ray") is None:
        pytest.skip("the extra `ray` is not installed")
    namespace = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("no network namespace can be made here, and Ray would listen on the machine's own address")
    command = [*namespace, sys.executable, "-c", ON_LOOPBACK, bundle, corpus, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4
    np.testing.assert_array_equal(vectors(tmp_path / "out"), expected(bundle, corpus))
