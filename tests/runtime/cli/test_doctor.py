import json
import os

import pytest

from mirror_runtime.cli import doctor
from mirror_runtime.cli.main import main


def test_this_machine_can_run_the_engines_of_the_setup(monkeypatch, capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    abilities = json.loads(capsys.readouterr().out)["abilities"]
    assert abilities["onnxruntime fp32"] == abilities["openvino fp32"] == "yes"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.diagnose().abilities["tensorrt"] == "no: no NVIDIA GPU was found"


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
        f"a killed server left 1 regions: rm {tmp_path}/mirror_999999999_ab_1 and the like"
    ]


@pytest.mark.parametrize(
    ("installed", "abilities"),
    [
        ({}, {"tensorrt": "[tensorrt]", "onnxruntime cuda": "[gpu]"}),
        ({"tensorrt": "11.4.0.106"}, {"tensorrt": "[tensorrt]"}),
        ({"tensorrt": "11.4.0.106", "cuda-bindings": "13.5.0"}, {"tensorrt": "yes"}),
        (
            {"tensorrt": "11.4.0.106", "onnxruntime-gpu": "1.31.1"},
            {"onnxruntime cuda": "yes", "onnxruntime tensorrt": "needs TensorRT 10, and 11.4.0.106"},
        ),
        ({"tensorrt": "10.16.1.11", "onnxruntime-gpu": "1.31.1"}, {"onnxruntime tensorrt": "yes"}),
    ],
)
def test_the_packages_that_a_gpu_needs_are_named(monkeypatch, installed, abilities):
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found = doctor.diagnose().abilities
    assert all(part in found[name] for name, part in abilities.items())
