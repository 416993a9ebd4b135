import contextlib
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from mirror_runtime import Encoder
from mirror_runtime.cli.main import main
from mirror_runtime.corpus import encode_file
from mirror_runtime.engines.fake import FakeEngine

ROWS = 9000
"""More than two windows of the encoder, so that a run can be killed between them."""


def arguments(bundle: Path, source: Path, output: Path, *more: str) -> list[str]:
    return ["encode", str(bundle), str(source), "-o", str(output), "--engine", "fake", *more]


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_parquet_holds_vectors_token_counts_and_truncation_and_an_empty_file_no_rows(bundle, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"body": "short"}) + "\n" + json.dumps({"body": "word " * 99}) + "\n")
    assert main(arguments(bundle, source, tmp_path / "out.parquet", "--column", "body")) == 0
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


def test_a_reranker_is_refused_once_and_before_anything_is_written(reranker_bundle, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a\nb\n")
    assert main(arguments(reranker_bundle, tmp_path / "in.txt", tmp_path / "out.npy", "--bad-texts", "zero")) == 2
    assert "fake is a reranker, which scores pairs and has no vectors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.process
def test_a_run_resumed_after_a_kill_writes_the_array_of_an_uninterrupted_run(bundle, tmp_path, capsys):
    corpus = tmp_path / "in.txt"
    corpus.write_text("".join(f"row {i} {'word ' * (i % 17)}\n" for i in range(ROWS)))
    assert main(arguments(bundle, corpus, tmp_path / "whole.npy")) == 0
    assert last_json(capsys)["texts"] == ROWS
    with Encoder.load(bundle, engine="fake") as encoder:
        expected = encoder.encode(corpus.read_text().splitlines())
    np.testing.assert_array_equal(np.load(tmp_path / "whole.npy"), expected)
    assert not list(tmp_path.glob("*.partial"))

    output = tmp_path / "killed.npy"
    windows = tmp_path / "killed.npy.partial" / "windows"
    command = [sys.executable, "-m", "mirror_runtime.cli", *arguments(bundle, corpus, output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (windows.exists() and windows.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: make the corpus longer"
    assert not output.exists()
    with (tmp_path / "killed.npy.partial" / "vectors").open("ab") as torn:
        torn.write(b"half a row")
    assert main(arguments(bundle, corpus, output)) == 0
    assert 0 < int(str(last_json(capsys)["resumed_after"])) < ROWS
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.fixture(scope="module")
def stopped(bundle, tmp_path_factory) -> Path:
    """A folder with `in.txt`, its vectors `whole.npy`, and a run that stopped in the middle, at a line bad by then."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    folder.mkdir()
    source = folder / "in.txt"
    lines = [f"row {i} {'word ' * (i % 17)}\n".encode() for i in range(1500)]
    source.write_bytes(b"".join(lines))
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.setattr(encode_file, "WINDOW", 100)
        assert main(arguments(bundle, source, folder / "whole.npy")) == 0
        source.write_bytes(b"".join([*lines[:750], b"\xff" + lines[750][1:], *lines[751:]]))
        os.utime(source, ns=times)
        assert main(arguments(bundle, source, folder / "out.npy")) == 2
    assert "line 751: not UTF-8" in errors.getvalue()
    source.write_bytes(b"".join(lines))
    os.utime(source, ns=times)
    return Path(shutil.copytree(folder, folder.with_name("kept")))


@pytest.fixture
def unfinished(stopped, monkeypatch) -> Path:
    """The stopped run where it ran, as it was then: its folder."""
    monkeypatch.setattr(encode_file, "WINDOW", 100)
    folder = stopped.with_name("run")
    shutil.rmtree(folder)
    return Path(shutil.copytree(stopped, folder))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("vectors", lambda whole: whole[:-700]),
        ("vectors", lambda whole: whole[:5000] + bytes(64) + whole[5064:]),
        ("vectors", lambda whole: b""),
        ("tokens", lambda whole: whole[:-8]),
        ("truncated", lambda whole: bytes([1]) + whole[1:]),
        ("windows", lambda whole: whole[:-3]),
        ("windows", lambda whole: b""),
        ("windows", lambda whole: whole + b"torn"),
        ("windows", lambda whole: b"\xff" * 8 + whole[8:]),  # more rows than memory
        ("windows", lambda whole: whole[:16] + b"\x07" + whole[17:]),  # another count of truncated texts
        ("windows", lambda whole: whole + bytes(72)),
        ("state.json", None),  # lost: nothing else is taken over
    ],
)
def test_what_was_damaged_since_is_computed_again(bundle, capsys, unfinished, name, damage):
    file = unfinished / "out.npy.partial" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    assert main(arguments(bundle, unfinished / "in.txt", unfinished / "out.npy")) == 0
    assert (unfinished / "out.npy").read_bytes() == (unfinished / "whole.npy").read_bytes()
    assert last_json(capsys)["resumed_after"] in range(0, 600, 100)


def test_rows_that_became_zeros_are_not_taken_over_silently(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode_file, "WINDOW", 50)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text('{"text": "a"}\n{"text": null}\n' + '{"text": "b"}\n' * 400 + "torn\n")
    assert main(arguments(bundle, source, output, "--bad-texts", "zero")) == 2
    assert "line 403: not JSON" in capsys.readouterr().err
    assert main(arguments(bundle, source, output)) == 2
    assert "holds zero vectors of 1 bad rows: go on with --bad-texts zero" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["stop", "zero"])
def test_vectors_that_are_not_finite_stop_the_run_whatever_the_policy(bundle, tmp_path, capsys, monkeypatch, policy):
    source = tmp_path / "in.txt"
    source.write_text("a\nb\n")
    broken = lambda self, rows: np.full((rows.shape[0], rows.shape[1] // 4, 8), np.nan, np.float32)  # noqa: E731
    monkeypatch.setattr(FakeEngine, "run", broken)
    assert main(arguments(bundle, source, tmp_path / "out.npy", "--bad-texts", policy)) == 2
    assert "line 1 has a vector with NaN or infinity: run mirror verify" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


def test_a_folder_of_somebody_else_is_left_alone(bundle, tmp_path, capsys):
    folder = tmp_path / "out.npy.partial"
    folder.mkdir()
    (tmp_path / "in.txt").write_text("a\n")
    (folder / "precious.txt").write_text("mine")
    assert main(arguments(bundle, tmp_path / "in.txt", tmp_path / "out.npy")) == 2
    assert "holds precious.txt, which is not of a run" in capsys.readouterr().err
    assert (folder / "precious.txt").read_text() == "mine"


def test_an_unfinished_run_with_another_input_or_other_settings_and_a_second_writer_are_refused(
    bundle, capsys, unfinished
):
    source, output = unfinished / "in.txt", unfinished / "out.npy"
    assert main(arguments(bundle, source, output, "--long-texts", "chunk")) == 2
    assert "long_texts was 'truncate' and is 'chunk'" in capsys.readouterr().err
    with (unfinished / "out.npy.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments(bundle, source, output)) == 2
    assert "another process is writing" in capsys.readouterr().err
    times = source.stat()
    source.write_bytes(b"X" + source.read_bytes()[1:])
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(arguments(bundle, source, output)) == 2
    assert "has changed since the unfinished run in out.npy.partial: delete that" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{}", b"{"])
def test_a_state_that_is_not_one_is_named(bundle, capsys, unfinished, content):
    (unfinished / "out.npy.partial" / "state.json").write_bytes(content)
    assert main(arguments(bundle, unfinished / "in.txt", unfinished / "out.npy")) == 2
    assert "state.json is unreadable" in capsys.readouterr().err


def test_a_file_that_may_not_grow_ends_in_one_message_and_the_next_run_resumes(bundle, tmp_path, capsys, unfinished):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = arguments(bundle, unfinished / "in.txt", tmp_path / "out.npy")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        assert main(run) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "out.npy.partial: File too large (raise the limit on file sizes (ulimit -f)" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.npy").exists()
    assert main(run) == 0
    assert int(str(last_json(capsys)["resumed_after"])) > 0
    assert (tmp_path / "out.npy").read_bytes() == (unfinished / "whole.npy").read_bytes()


@pytest.mark.parametrize("link", ["same", "symlink", "hard link", "other spelling"])
def test_the_input_is_never_replaced_by_its_vectors(bundle, tmp_path, capsys, link):
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), source)
    before = source.read_bytes()
    if link == "symlink":
        output.symlink_to(source)
    elif link == "hard link":
        output.hardlink_to(source)
    else:
        output = source if link == "same" else tmp_path / "." / ".." / tmp_path.name / "in.parquet"
    assert main(arguments(bundle, source, output)) == 2
    assert "is the input itself" in capsys.readouterr().err
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["out.npy", "sub/out.npy"])
def test_an_output_in_the_input_folder_is_refused(bundle, tmp_path, capsys, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "in.txt").write_text("a\n")
    assert main(arguments(bundle, tmp_path, tmp_path / name)) == 2
    assert "lies in the input folder" in capsys.readouterr().err


def test_an_output_that_is_a_link_is_written_through(bundle, tmp_path):
    (tmp_path / "in.txt").write_text("a\nb\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.npy").symlink_to(tmp_path / "elsewhere" / "real.npy")
    assert main(arguments(bundle, tmp_path / "in.txt", tmp_path / "out.npy")) == 0
    assert (tmp_path / "out.npy").is_symlink()
    assert np.load(tmp_path / "elsewhere" / "real.npy").shape == (2, 8)


def test_bad_rows_stop_the_run_or_get_zero_vectors(bundle, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": null}\n{"text": "lone \\ud800"}\n{"text": "b"}\n')
    assert main(arguments(bundle, source, tmp_path / "out.npy")) == 2
    assert "line 2: is NoneType, not str" in capsys.readouterr().err
    assert main(arguments(bundle, source, tmp_path / "out.npy", "--bad-texts", "zero")) == 0
    assert last_json(capsys)["failed"] == 2
    assert np.load(tmp_path / "out.npy").any(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("folder", "source", "output", "message"),
    [
        ("bundle", "absent.txt", "out.npy", "No such file"),
        ("bundle", "in.txt", "out.csv", "output must end in .npy, .parquet"),
        ("bundle", "in.txt", "no/such/out.npy", "directory does not exist"),
        ("bundle", "in.txt", "folder.npy", "is a directory"),
        (".", "in.txt", "out.npy", "is not a bundle"),
    ],
)
def test_mistakes_get_one_line_and_status_2(bundle, tmp_path, capsys, folder, source, output, message):
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "bundle").symlink_to(bundle)
    assert main(arguments(tmp_path / folder, tmp_path / source, tmp_path / output)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
