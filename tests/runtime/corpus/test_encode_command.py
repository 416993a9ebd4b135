import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from mirror_runtime import Encoder
from mirror_runtime.cli.main import main
from tests.runtime.corpus.conftest import ROWS


def arguments(bundle: Path, source: Path, output: Path, *more: str) -> list[str]:
    return ["encode", str(bundle), str(source), "-o", str(output), "--engine", "fake", *more]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_parquet_holds_vectors_token_counts_and_truncation_and_an_empty_file_no_rows(bundle, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"body": "short"}) + "\n" + json.dumps({"body": "word " * 99}) + "\n")
    assert main(arguments(bundle, source, tmp_path / "out.parquet", "--text-column", "body")) == 0
    assert last_json(capsys)["truncated"] == 1
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["truncated"] == [False, True]
    assert table["tokens"] == [3, 101]
    with Encoder.load(bundle, engine="fake") as encoder:
        np.testing.assert_array_equal(np.float32(table["embedding"]), encoder.encode(["short", "word " * 99]))
    source = tmp_path / "in.txt"
    source.write_bytes(b"")
    for name in ("out.npy", "out.parquet"):
        assert main(arguments(bundle, source, tmp_path / name)) == 0
        assert last_json(capsys)["texts"] == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 8)


@pytest.mark.process
def test_a_run_resumed_after_a_kill_writes_the_array_of_an_uninterrupted_run(bundle, corpus, tmp_path, capsys):
    assert main(arguments(bundle, corpus, tmp_path / "whole.npy")) == 0
    assert last_json(capsys)["texts"] == ROWS
    with Encoder.load(bundle, engine="fake") as encoder:
        expected = encoder.encode(corpus.read_text().splitlines())
    np.testing.assert_array_equal(np.load(tmp_path / "whole.npy"), expected)
    assert not list(tmp_path.glob("*.partial"))

    output = tmp_path / "killed.npy"
    state = tmp_path / "killed.npy.partial" / "state.json"
    command = [sys.executable, "-m", "mirror_runtime.cli", *arguments(bundle, corpus, output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: make the corpus longer"
    assert 0 < json.loads(state.read_text())["progress"]["texts"] < ROWS
    assert not output.exists()
    with (tmp_path / "killed.npy.partial" / "vectors").open("ab") as torn:
        torn.write(b"half a row")
    assert main(arguments(bundle, corpus, output)) == 0
    assert 0 < int(str(last_json(capsys)["resumed_after"])) < ROWS
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_an_unfinished_run_with_other_settings_and_a_second_writer_are_refused(bundle, corpus, tmp_path, capsys):
    output = tmp_path / "out.npy"
    corpus.write_bytes(corpus.read_bytes() + b"\xff\n")
    assert main(arguments(bundle, corpus, output)) == 2
    assert f"line {ROWS + 1}: not UTF-8" in capsys.readouterr().err
    assert not output.exists()
    assert main(arguments(bundle, corpus, output, "--long-texts", "chunk")) == 2
    assert "long_texts was 'truncate' and is 'chunk'" in capsys.readouterr().err
    with (tmp_path / "out.npy.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments(bundle, corpus, tmp_path / "out.npy")) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_bad_rows_stop_the_run_or_get_zero_vectors(bundle, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": null}\n{"text": "lone \\ud800"}\n{"text": "b"}\n')
    assert main(arguments(bundle, source, tmp_path / "out.npy")) == 2
    assert "row 2: is NoneType, not str" in capsys.readouterr().err
    assert main(arguments(bundle, source, tmp_path / "out.npy", "--bad-texts", "zero")) == 0
    assert last_json(capsys)["failed"] == 2
    assert np.load(tmp_path / "out.npy").any(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("folder", "source", "output", "message"),
    [
        ("bundle", "absent.txt", "out.npy", "does not exist"),
        ("bundle", "in.txt", "out.csv", "output must end in .npy or .parquet"),
        ("bundle", "in.txt", "no/such/out.npy", "directory does not exist"),
        (".", "in.txt", "out.npy", "is not a bundle"),
    ],
)
def test_mistakes_get_one_line_and_status_2(bundle, tmp_path, capsys, folder, source, output, message):
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "bundle").symlink_to(bundle)
    assert main(arguments(tmp_path / folder, tmp_path / source, tmp_path / output)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
