"""What the NVIDIA driver says of this machine, with a stand-in for its library."""

import pytest
from cuda.bindings import driver as real

from mirror_runtime import gpu
from mirror_runtime.errors import EngineError
from tests.support.fake_gpu import FakeDriver, install_driver


def test_the_driver_names_the_gpu(monkeypatch):
    install_driver(monkeypatch, FakeDriver())
    found = gpu.this_gpu()
    assert str(found) == "NVIDIA L4 (8.9)"
    assert found.cuda == (13, 4)


def test_the_driver_is_called_by_its_own_names_and_numbers():
    for name in (name for name in vars(FakeDriver) if name.startswith("cu")):
        assert callable(getattr(real, name))
    attributes = real.CUdevice_attribute
    assert attributes(gpu._MAJOR).name == "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"
    assert attributes(gpu._MINOR).name == "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"
    statuses = {"CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}
    assert {real.CUresult(status).name for status in gpu._CURES} == statuses


@pytest.mark.parametrize(
    ("driver", "device", "message"),
    [
        (None, None, "no NVIDIA GPU was found"),
        (None, ("0x8086", "0x030000"), "no NVIDIA GPU was found"),
        (None, ("0x10de", "0x020000"), "no NVIDIA GPU was found"),  # a network card
        (None, ("0x10de", "0x030200"), "its driver .* is not here.*--gpus=all"),
        (FakeDriver(100), ("0x10de", "0x030200"), "shows this process no GPU: see CUDA_VISIBLE_DEVICES"),
        (FakeDriver(803), None, "different versions"),
        (FakeDriver(999), None, r"does not start \(CUDA error 999\)"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, tmp_path, driver, device, message):
    install_driver(monkeypatch, driver)
    monkeypatch.setattr(gpu, "_BUS", tmp_path)
    for name, text in zip(("vendor", "class"), device or (), strict=False):
        (tmp_path / "0000:01:00.0").mkdir(exist_ok=True)
        (tmp_path / "0000:01:00.0" / name).write_text(f"{text}\n")
    with pytest.raises(EngineError, match=message):
        gpu.this_gpu()


def test_models_are_read_without_starting_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_MODULE", tmp_path)
    assert gpu.gpu_models() == ""
    for place in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text("Model: \t\t NVIDIA L4\nIRQ:   \t\t 42\n")
    assert gpu.gpu_models() == "NVIDIA L4, NVIDIA L4"
