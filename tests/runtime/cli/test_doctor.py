import json
import os
import re

import pytest

from mirror_runtime.cli import doctor
from mirror_runtime.cli.main import main
from tests.support.fake_gpu import FakeDriver, install_driver


def test_this_machine_can_run_the_engines_of_the_setup(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    abilities = json.loads(capsys.readouterr().out)["abilities"]
    assert abilities["onnxruntime fp32"] == abilities["openvino fp32"] == "yes"


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, "overwrite each other's files"),
        ({"openvino": "1", "numpy": "2.1", "nvidia-pytriton": "0.7"}, "needs numpy below 2"),
        ({}, "no engine is installed"),
    ],
)
def test_known_traps_are_named_with_their_cure(monkeypatch, capsys, installed, problem):
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr(doctor, "install_command", lambda extra: f"pip install '.[{extra}]'")
    assert main(["doctor"]) == 1
    assert any(problem in found for found in doctor.diagnose().problems)
    shown = capsys.readouterr().out
    assert "problem:" in shown
    assert installed or "pip install '.[openvino]'" in shown  # brackets are not taken for a style


def test_only_the_regions_of_dead_servers_are_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SHM", tmp_path)
    (tmp_path / f"mirror_{os.getpid()}_ab_1").touch()
    before = doctor.diagnose().problems
    (tmp_path / "mirror_999999999_ab_1").touch()
    assert [problem for problem in doctor.diagnose().problems if problem not in before] == [
        f"killed servers left shared memory: rm {tmp_path}/mirror_999999999_ab_1"
    ]


GPU_PACKAGES = {"tensorrt": "11.4.0.106", "cuda-bindings": "13.5.0", "onnxruntime-gpu": "1.31.1"}
CUDA_13 = ["nvidia-cuda-nvrtc~=13.0; extra == 'cuda'", "nvidia-cuda-runtime~=13.0; extra == 'cuda'"]


@pytest.mark.parametrize(
    ("installed", "driver", "abilities"),
    [
        (
            {},
            FakeDriver(),
            {"tensorrt": r"tensorrt and cuda-bindings: .*\[tensorrt\]'$", "onnxruntime cuda": r"\[gpu\]'$"},
        ),
        ({"tensorrt": "11.4.0.106"}, FakeDriver(), {"tensorrt": r"needs cuda-bindings: .*\[tensorrt\]"}),
        (GPU_PACKAGES, FakeDriver(), {"tensorrt": "yes", "onnxruntime cuda": "yes"}),
        (GPU_PACKAGES, FakeDriver(), {"onnxruntime tensorrt": r"no: it needs TensorRT 10 \(here: 11\.4\.0\.106\)"}),
        (GPU_PACKAGES | {"tensorrt": "10.16.1.11"}, FakeDriver(), {"onnxruntime tensorrt": "yes"}),
        (GPU_PACKAGES, FakeDriver(cuda=12080), {"onnxruntime cuda": r"a driver for CUDA 13 \(here: 12\.8\)"}),
        (
            GPU_PACKAGES,
            FakeDriver(100),
            {"tensorrt": "an NVIDIA", "onnxruntime cuda": "an NVIDIA", "gpu": "shows this process no GPU"},
        ),
        ({}, None, {"tensorrt": r"cuda-bindings: .*; an NVIDIA GPU \(see gpu", "onnxruntime cuda": "an NVIDIA GPU"}),
    ],
)
def test_all_that_an_engine_for_gpus_lacks_is_named(monkeypatch, installed, driver, abilities):
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr(doctor, "requires", lambda package: CUDA_13)
    install_driver(monkeypatch, driver)
    diagnosis = doctor.diagnose()
    found = {**diagnosis.machine, **diagnosis.abilities}
    for name, pattern in abilities.items():
        assert re.search(pattern, found[name]), found[name]
