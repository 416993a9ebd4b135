"""No engine reports its use: an audit hook sees every address that Python looks up, and the home folder stays empty."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.addaudithook(lambda event, found: event in ("socket.getaddrinfo", "socket.connect") and print(event, found))
from mirror_runtime import Encoder
for engine in ("onnxruntime", "openvino"):
    with Encoder.load(sys.argv[1], engine=engine, cache_dir=None) as encoder:
        encoder.encode(["a man is playing a guitar"])
"""


@pytest.mark.process
def test_engines_contact_nobody_and_leave_nothing_in_the_home_folder(tiny_bundle, tmp_path):
    inherited = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    command = [sys.executable, "-c", SCRIPT, str(tiny_bundle)]
    done = subprocess.run(command, env=inherited | home, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [str(path) for path in Path(tmp_path).rglob("*")] == []
