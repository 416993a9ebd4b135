"""A corpus over two local Ray workers gives what one encoder gives, and goes on where it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mirror_runtime import Encoder, InputError
from mirror_runtime.corpus.encode_file import EncodeProgress
from mirror_runtime.corpus.encode_ray import encode_with_ray
from mirror_runtime.corpus.files import CorpusFile

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
FAKE = {"engine": "fake"}


@pytest.fixture
def bundle(make_bundle) -> Path:
    return make_bundle()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"row {i} {'word ' * (i % 17)}\n" for i in range(1000)))
    return path


def vectors(folder: Path) -> np.ndarray:
    files = sorted(folder.iterdir())
    return np.concatenate([np.float32(parquet.read_table(file)["embedding"].to_pylist()) for file in files])


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_parts_cover_every_row_once_and_in_order(tmp_path, kind):
    texts = [f"text {i}" for i in range(25)]
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=4)
    else:
        path.write_text("".join((json.dumps({"text": t}) if kind == "jsonl" else t) + "\n" for t in texts))
    source = CorpusFile(path=path)
    parts = list(source.shards(10))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [text for part in parts for text in source.texts(part)] == texts
    assert [part.first for part in parts] == [sum(p.rows for p in parts[:i]) for i in range(len(parts))]
    assert sum(source.shard_size(part) for part in parts) == source.size
    assert next(iter(CorpusFile(path=path).shards(10**9))).rows == 25


LOOPBACK_ONLY = """
import fcntl, socket, struct, sys
import pytest
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:  # SIOCSIFFLAGS: IFF_UP
    fcntl.ioctl(device, 0x8914, struct.pack("16sh14x", b"lo", 1))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1]]))
"""


@pytest.fixture
def loopback_only(request: pytest.FixtureRequest) -> bool:
    """Run the test in a network of its own, which has a loopback device alone: Ray listens on the machine's address.

    The test asks whether it is there already; if not, it has been run there by now and has nothing left to do.
    """
    if "MIRROR_TESTS_LOOPBACK_ONLY" in os.environ:
        return True
    apart = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode != 0:
        pytest.skip("no network namespace can be made here, and Ray would listen on the machine's own address")
    test = f"{Path(__file__)}::{request.node.name}"
    done = subprocess.run(
        [*apart, sys.executable, "-c", LOOPBACK_ONLY, test],
        capture_output=True,
        text=True,
        env=os.environ | {"MIRROR_TESTS_LOOPBACK_ONLY": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own deprecations and unclosed sockets
def test_two_workers_encode_go_on_and_name_a_bad_row(loopback_only, bundle, corpus, tmp_path):
    if not loopback_only:
        return
    reports: list[EncodeProgress] = []
    output = tmp_path / "out"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        broken = tmp_path / "broken.jsonl"
        broken.write_text("".join(json.dumps({"text": f"row {i}" if i != 777 else None}) + "\n" for i in range(1000)))
        with pytest.raises(InputError, match="row 778: is NoneType"):
            encode_with_ray(
                bundle, CorpusFile(path=broken), tmp_path / "bad", workers=1, load_options=FAKE, shard_rows=300
            )
        assert (tmp_path / "bad.partial").is_dir()

        done = encode_with_ray(bundle, CorpusFile(path=corpus), output, workers=2, load_options=FAKE, shard_rows=300)
        assert done.texts == 1000
        with Encoder.load(bundle, engine="fake") as encoder:
            expected = encoder.encode(corpus.read_text().splitlines())
        np.testing.assert_array_equal(vectors(output), expected)
        assert len(list(output.iterdir())) == 4
        with pytest.raises(InputError, match="exists"):
            encode_with_ray(bundle, CorpusFile(path=corpus), output, workers=2, load_options=FAKE)

        second = tmp_path / "second.partial"  # as if killed before its third part
        output.rename(second)
        state = json.loads((tmp_path / "bad.partial" / "state.json").read_text())
        stat = corpus.stat()
        state |= {"input": str(corpus.resolve()), "input_bytes": stat.st_size, "input_mtime_ns": stat.st_mtime_ns}
        (second / "state.json").write_text(json.dumps(state))
        (second / "part-000002.parquet").unlink()
        kept = (second / "part-000001.parquet").stat().st_mtime_ns
        encode_with_ray(
            bundle,
            CorpusFile(path=corpus),
            tmp_path / "second",
            workers=1,
            load_options=FAKE,
            shard_rows=300,
            on_progress=reports.append,
        )
        assert [report.texts for report in reports] == [700, 1000]
        assert (tmp_path / "second" / "part-000001.parquet").stat().st_mtime_ns == kept
        np.testing.assert_array_equal(vectors(tmp_path / "second"), expected)
        assert not list(tmp_path.glob("out*"))

        with pytest.raises(InputError, match="unfinished run with other settings"):
            encode_with_ray(
                bundle, CorpusFile(path=corpus), tmp_path / "bad", workers=1, load_options=FAKE, shard_rows=300
            )
    finally:
        ray.shutdown()
