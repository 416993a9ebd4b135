"""What this machine can run, and the traps that cost people afternoons."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.errors import InputError, ServerError
from mirror_runtime.host import BF16_FLAGS, cpu_flags, cpu_model, memory_bytes, usable_cores
from mirror_runtime.plan import read_plan, staleness
from mirror_runtime.triton.server.distribution import check_platform

PACKAGES = (
    "numpy",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "cuda-bindings",
    "tritonclient",
    "nvidia-pytriton",
)
_SHM = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `mirror doctor` found.

    Attributes:
        machine: facts, in the order to show them.
        packages: installed version of each package of interest, or None.
        abilities: what this machine can do, with the reason where it cannot.
        problems: what is wrong, each with its cure; empty on a healthy machine.
    """

    machine: Mapping[str, str]
    packages: Mapping[str, str | None]
    abilities: Mapping[str, str]
    problems: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at the machine and the installed packages. Imports no engine."""
    packages = {name: _version(name) for name in PACKAGES}
    gpu = shutil.which("nvidia-smi") is not None
    bf16 = sorted(BF16_FLAGS & cpu_flags())
    glibc = platform.libc_ver()[1]
    machine = {
        "system": f"{platform.system()} {platform.machine()}" + (f", glibc {glibc}" if glibc else ""),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": f"{usable_cores()} usable",
        "cpu features": ", ".join(
            sorted(f for f in cpu_flags() if f.startswith(("amx", "avx512_", "avx2", "avx_vnni")))
        ),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "gpu": "an NVIDIA driver is present" if gpu else "none seen",
        **_kept(cache_folder(AUTO_CACHE)),
    }
    return Diagnosis(
        machine=machine,
        packages=packages,
        abilities={
            "onnxruntime fp32": _needs(packages, "onnxruntime", "cpu", also="onnxruntime-gpu"),
            "openvino fp32": _needs(packages, "openvino", "openvino"),
            "openvino bf16": _needs(packages, "openvino", "openvino")
            if bf16
            else "no: the CPU lacks bf16 instructions",
            "tensorrt": _tensorrt(packages) if gpu else "no: no NVIDIA GPU is seen",
            "onnxruntime cuda": _needs(packages, "onnxruntime-gpu", "gpu") if gpu else "no: no NVIDIA GPU is seen",
            "onnxruntime tensorrt": _provider(packages) if gpu else "no: no NVIDIA GPU is seen",
            "local tritonserver": _local_server(packages),
            "triton client": _needs(packages, "tritonclient", "client"),
        },
        problems=tuple(_problems(packages)),
    )


def _kept(cache: Path | None) -> dict[str, str]:
    """Say what lies in the user's cache: converted graphs, and plans with what is wrong with each."""
    if cache is None:
        return {"cache": "none: this user has no home folder, so graphs are parsed at every start"}
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    facts = {"cache": f"{cache}, {size / 1e6:,.0f} MB" if size else f"{cache}, empty"}
    for path in sorted((cache / "plans").glob("*.json")):
        try:
            plan = read_plan(path)
        except InputError:
            facts[f"plan {path.stem}"] = "cannot be read: run mirror plan again"
            continue
        way = f"{plan.chosen.engine.value} {plan.chosen.precision.value} for {plan.goal.value}"
        stale = staleness(plan, plan.fingerprint)
        facts[f"plan {path.stem}"] = f"{way}, not followed: {stale}" if stale else way
    return facts


def _problems(packages: Mapping[str, str | None]) -> list[str]:
    problems = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them"
        )
    numpy = packages["numpy"] or ""
    if packages["nvidia-pytriton"] and not numpy.startswith("1."):
        problems.append(f"nvidia-pytriton wants numpy below 2 and {numpy} is installed: pip install 'numpy<2'")
    if not any(packages[name] for name in ("onnxruntime", "onnxruntime-gpu", "openvino")):
        problems.append("no engine is installed: pip install 'mirror-runtime[openvino]' or 'mirror-runtime[cpu]'")
    if _SHM.is_dir():
        free = shutil.disk_usage(_SHM).free
        if free < 64 * 2**20:
            problems.append(
                f"/dev/shm has {free >> 20} MiB free and Triton needs 64: enlarge it (docker: --shm-size=1g)"
            )
        left = sorted(p.name for p in _SHM.glob("mirror_*"))
        if left:
            problems.append(
                f"/dev/shm holds {len(left)} regions of a Mirror server ({left[0]} …): remove them if none runs"
            )
    return problems


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tensorrt(packages: Mapping[str, str | None]) -> str:
    """A plan needs TensorRT and, to move arrays, NVIDIA's CUDA bindings."""
    needs = (_needs(packages, name, "tensorrt") for name in ("tensorrt", "cuda-bindings"))
    return next((need for need in needs if need != "yes"), "yes")


def _provider(packages: Mapping[str, str | None]) -> str:
    """ONNX Runtime's wheels link TensorRT 10, and go on without the provider where only 11 is there."""
    installed = packages["tensorrt"]
    if packages["onnxruntime-gpu"] and installed and not installed.startswith("10."):
        return f"no: it wants TensorRT 10 and {installed} is installed: pip install 'tensorrt<11'"
    return _needs(packages, "onnxruntime-gpu", "gpu")


def _local_server(packages: Mapping[str, str | None]) -> str:
    try:
        check_platform()
    except ServerError as error:
        return f"no: {error}"
    return _needs(packages, "nvidia-pytriton", "triton")


def _needs(packages: Mapping[str, str | None], package: str, extra: str, also: str | None = None) -> str:
    if packages[package] or (also and packages[also]):
        return "yes"
    return f"no: pip install 'mirror-runtime[{extra}]'"
