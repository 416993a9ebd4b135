"""The committed repositories of Triton's own backends, read by the wheel's tritonserver, which has none of them."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest

from mirror_runtime.triton import Server
from mirror_runtime.triton.repository.options import Backend
from mirror_runtime.triton.server.distribution import find_distribution, server_environment
from mirror_runtime.triton.server.processes import kill_group
from tests.support.example_repositories import committed, write

pytestmark = pytest.mark.serving

OWN = [backend for backend in Backend if backend is not Backend.PYTHON]


@pytest.fixture(scope="module")
def reasons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a server on each `encoder` and on one with a misspelt field; return why each was not loaded."""
    folder = tmp_path_factory.mktemp("examples")
    for backend in OWN:
        config = committed(backend)["encoder/config.pbtxt"].decode()
        file = "model.plan" if backend is Backend.TENSORRT else "model.onnx"
        files = {"config.pbtxt": config.replace('"encoder"', f'"{backend.value}"').encode(), f"1/{file}": b"no weights"}
        write(folder / backend.value, files)
    broken = config.replace('"encoder"', '"misspelt"').replace("instance_group", "instances_group")
    write(folder / "misspelt", {"config.pbtxt": broken.encode(), "1/model.plan": b"no weights"})
    ports = Server(folder)
    ports._take_ports()
    wheel = find_distribution()
    options = ["--model-control-mode=none", "--disable-auto-complete-config", "--exit-on-error=false"]
    options += ["--allow-grpc=false", "--allow-metrics=false", "--http-address=127.0.0.1"]
    command = [str(wheel.binary), f"--model-repository={folder}", f"--http-port={ports.http_port}", *options]
    process = subprocess.Popen(
        command, env=server_environment(wheel), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
    )
    try:
        yield index(f"http://127.0.0.1:{ports.http_port}/v2/repository/index")
    finally:
        kill_group(process.pid)
        process.wait()


def index(url: str) -> dict[str, str]:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=10) as answer:
                return {model["name"]: model.get("reason", "") for model in json.load(answer)}
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


@pytest.mark.parametrize("backend", OWN)
def test_triton_reads_every_configuration_and_misses_only_its_backend(reasons: dict[str, str], backend: Backend):
    name = backend.value.removesuffix("-cuda")
    assert f"unable to find backend library for backend '{name}'" in reasons[backend.value]


def test_a_misspelt_field_is_not_read_at_all(reasons: dict[str, str]):
    assert reasons["misspelt"] == ""
