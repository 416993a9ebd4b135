"""Temporary files that a killed process leaves: the next one clears them, and nothing else."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mirror_runtime.triton.server import workspace
from mirror_runtime.triton.server.workspace import Workspace

SERVER = "import time; print('runs', flush=True); time.sleep(60)"


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Folders that stand in for the temporary one, for /tmp and for /dev/shm."""
    for name in ("temporary", "tmp", "shm"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(workspace, "_TRITONS_FOLDERS", tmp_path / "tmp")
    monkeypatch.setattr(workspace, "SHARED_MEMORY", tmp_path / "shm")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill(killed: Workspace) -> None:
    """Lose the lock, as a killed process does."""
    os.close(killed._lock)


def test_the_next_process_clears_what_a_killed_one_left_and_nothing_of_the_living(places):
    killed, living = Workspace(), Workspace()
    for each in (killed, living):
        (each.folder / "log").write_text("a log")
        (places / "shm" / f"mirror_{each.token}_region").touch()
    (places / "temporary" / "mirror-serve-of-somebody").touch()
    (places / "tmp" / "python_env_killed").mkdir()
    killed.claim_python_environment()
    (places / "tmp" / "python_env_living").mkdir()
    kill(killed)
    with contextlib.closing(Workspace()) as mine:
        assert names(places / "shm") == [f"mirror_{living.token}_region"]
        assert names(places / "tmp") == ["python_env_living"]
        kept = {living.folder.name, mine.folder.name, "mirror-serve-of-somebody"}
        assert set(names(places / "temporary")) == kept
    living.close()
    assert names(places / "temporary") == ["mirror-serve-of-somebody"]
    assert names(places / "shm") == []


def test_a_python_environment_is_claimed_only_if_it_is_certain_whose_it_is(places):
    (places / "tmp" / "python_env_earlier").mkdir()
    mine = Workspace()
    for name in ("python_env_a", "python_env_b"):
        (places / "tmp" / name).mkdir()
    mine.claim_python_environment()
    mine.close()
    assert names(places / "tmp") == ["python_env_a", "python_env_b", "python_env_earlier"]


@pytest.mark.process
def test_a_server_that_outlived_its_supervisor_is_ended(places):
    killed = Workspace()
    program = places / "tritonserver"
    program.symlink_to(sys.executable)
    bystander = subprocess.Popen([sys.executable, "-c", SERVER, str(killed.folder)], stdout=subprocess.PIPE)
    server = subprocess.Popen([program, "-c", SERVER, f"--backend-directory={killed.folder}"], stdout=subprocess.PIPE)
    try:
        for process in (bystander, server):
            assert process.stdout is not None
            assert process.stdout.readline() == b"runs\n"
        kill(killed)
        Workspace().close()
        assert server.wait(5) == -9
        assert bystander.poll() is None, "only Triton's processes are ours"
    finally:
        for process in (bystander, server):
            process.kill()
            process.communicate()
