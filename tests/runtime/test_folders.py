import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mirror_runtime.errors import InputError
from mirror_runtime.folders import named_os_errors, replace_file, whole_folder
from tests.runtime.isolated import start


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (shutil.SameFileError("a and b are the same file"), "x: a and b are the same file"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "b: No space left on device (free some"),
        (OSError("None of the pages can be read"), "x: None of the pages can be read"),
    ],
)
def test_messages_of_the_operating_system_name_the_file(error, message):
    with pytest.raises(InputError, match=re.escape(message)), named_os_errors(Path("x")):
        raise error


def refuses(output: Path, message: str, overwrite: bool = False) -> None:
    with pytest.raises(InputError, match=message), whole_folder(output, overwrite=overwrite, marker="all"):
        pass


def fail_half_way(path: Path) -> None:
    path.write_text("half")
    raise OSError("the disk is full")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    with pytest.raises(InputError, match="full"), whole_folder(output, marker="all") as folder:
        fail_half_way(folder / "half")
    assert list(output.parent.iterdir()) == []
    with whole_folder(output, marker="all") as folder:
        (folder / "all").write_text("x")
        assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["run"]
    (tmp_path / "plain").mkdir()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_in_use_is_refused_and_replaced_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with whole_folder(output, marker="all") as folder:  # an empty folder is not in use
        (folder / "old").write_text("x")
    refuses(output, "not empty.*--overwrite")
    with whole_folder(output, overwrite=True, marker="old") as folder:
        (folder / "new").write_text("x")
        assert (output / "old").exists()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "is a file")
    refuses(tmp_path / "file" / "run", "cannot be written")
    if sys.platform == "linux":
        refuses(Path("/proc/run"), "cannot be written")


@pytest.mark.process
def test_a_killed_writer_leaves_nothing_that_the_next_one_does_not_remove(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start("hold_half_a_folder", output)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        refuses(output, "another process is writing")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not output.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with whole_folder(output, marker="all") as folder:
        (folder / "all").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in output.iterdir()] == ["all"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(InputError, match="full"), replace_file(path, shared=shared) as beside:
        fail_half_way(beside)
    assert path.read_text() == "old"
    with replace_file(path, shared=shared) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert (str(os.getpid()) in beside.name) is shared
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    output = tmp_path / "home"
    output.mkdir()
    (output / "precious").write_text("x")
    refuses(output, "it has no all", overwrite=True)
    assert [path.name for path in output.iterdir()] == ["precious"]
