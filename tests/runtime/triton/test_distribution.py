"""Finding tritonserver: missing requirements are reported before it starts."""

import ctypes.util
import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path

import pytest

import mirror_runtime
from mirror_runtime.errors import MissingExtra, ServerError
from mirror_runtime.triton.server.distribution import find_distribution, server_environment


@pytest.mark.serving
def test_the_installed_wheel_has_every_part():
    found = find_distribution()
    assert os.access(found.binary, os.X_OK)
    assert os.access(found.stub, os.X_OK)
    assert (found.python_backend / "libtriton_python.so").is_file()
    assert any(found.libraries.glob("libtritonserver*"))


def test_a_missing_wheel_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install .*\[triton\]'"):
        find_distribution()


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (platform, "system", "Darwin", "runs on Linux x86-64; this is Darwin"),
        (platform, "machine", "aarch64", "this is Linux aarch64"),
        (os, "confstr", "glibc 2.31", "needs glibc 2.35 or newer; this machine has 2.31"),
        (os, "confstr", "", "this machine has none"),
    ],
)
def test_an_unfit_machine_is_offered_the_container(monkeypatch, owner, name, value, message):
    monkeypatch.setattr(owner, name, lambda *_: value)
    with pytest.raises(ServerError) as caught:
        find_distribution()
    assert message in str(caught.value)
    assert "docker run" in str(caught.value)


@pytest.mark.serving
def test_a_missing_shared_libpython_is_reported_with_its_cure(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: "/nowhere")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ServerError, match="apt install libpython3"):
        server_environment(find_distribution())


@pytest.mark.serving
def test_the_model_process_sees_this_package_first_and_keeps_the_callers_paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/callers/path")
    environment = server_environment(find_distribution())
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(Path(mirror_runtime.__file__).parents[1])
    assert paths[-1] == "/callers/path"
    assert os.environ["PYTHONPATH"] == "/callers/path", "the caller's environment stays unchanged"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
