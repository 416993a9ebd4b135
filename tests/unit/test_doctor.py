import pytest

from mirror_runtime import doctor
from mirror_runtime.cli import main


def test_this_machine_can_run_what_setup_installed(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    diagnosis = doctor.diagnose()
    assert diagnosis.abilities["onnxruntime fp32"] == "yes"
    assert diagnosis.abilities["openvino fp32"] == "yes"


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, "overwrite each other's files"),
        ({"openvino": "1", "numpy": "2.1", "nvidia-pytriton": "0.7"}, "wants numpy below 2"),
        ({}, "no engine is installed"),
    ],
)
def test_known_traps_are_named_with_their_cure(monkeypatch, capsys, installed, problem):
    monkeypatch.setattr(doctor, "_version", installed.get)
    assert main(["doctor"]) == 1
    assert any(problem in found for found in doctor.diagnose().problems)
    assert "problem:" in capsys.readouterr().out
