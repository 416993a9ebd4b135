"""The command that serves a model repository in NVIDIA's container."""

from __future__ import annotations

import shlex
from pathlib import Path

from mirror_runtime.bundle import EngineName
from mirror_runtime.engines import ON_GPU
from mirror_runtime.triton.repository.options import Backend

CONTAINER_IMAGE = "nvcr.io/nvidia/tritonserver:26.11-py3"
"""Newest on 2026-11-30. deploy/Dockerfile has the reasons for a floor."""

_EXTRAS = {
    EngineName.ONNXRUNTIME.value: "[cpu]",
    EngineName.OPENVINO.value: "[openvino]",
    EngineName.TENSORRT.value: "[tensorrt]",
    EngineName.ONNXRUNTIME_CUDA.value: "[gpu]",
    EngineName.ONNXRUNTIME_TENSORRT.value: "[gpu]",
}
"""What an engine needs in the container. `auto` takes one of both CPU engines."""


def container_command(
    repository: Path | str,
    source: Path | str,
    *,
    engine: str = "auto",
    backend: Backend = Backend.PYTHON,
) -> str:
    """Return the shell command that serves a model repository in NVIDIA's container.

    The sources, a clone of this project, are mounted read-only and copied in the container, because building a package
    writes beside its sources. Triton's own backends need no engine packages. What runs on GPUs gets them all.
    """
    packages = f"'/tmp/mirror{_EXTRAS.get(engine, '[cpu,openvino]')}'" if backend is Backend.PYTHON else "'/tmp/mirror'"
    if engine == EngineName.ONNXRUNTIME_TENSORRT.value:
        packages += " 'tensorrt<11'"  # the version that ONNX Runtime's wheel links
    gpus = " --gpus=all" if backend.on_gpu or engine in {name.value for name in ON_GPU} else ""
    server = "tritonserver --model-repository=/models --model-control-mode=none --disable-auto-complete-config"
    inside = (
        "mkdir /tmp/mirror && cp -r /src/pyproject.toml /src/README.md /src/LICENSE /src/runtime /tmp/mirror"
        f" && pip install --quiet {packages} && exec {server}"
    )
    ports = " ".join(f"-p 127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002))
    return (
        f"docker run --rm{gpus} --shm-size=1g {ports} -e PIP_BREAK_SYSTEM_PACKAGES=1 -e ORT_DISABLE_TELEMETRY=1"
        f" -v {shlex.quote(f'{repository}:/models:ro')} -v {shlex.quote(f'{source}:/src:ro')}"
        f' {CONTAINER_IMAGE} sh -c "{inside}"'
    )
