"""The command `mirror doctor`: what this machine can run, and known traps with their cures."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mirror_runtime.cache import AUTO_CACHE, cache_folder
from mirror_runtime.cli.run import print_json
from mirror_runtime.errors import EngineError, InputError, ServerError, install_command
from mirror_runtime.gpu import Gpu, this_gpu
from mirror_runtime.host import BF16_FLAGS, cpu_flags, cpu_model, memory_bytes, usable_cores
from mirror_runtime.plan import read_plan, staleness
from mirror_runtime.triton.server.distribution import check_platform

PACKAGES = (
    "mirror-runtime",
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
    """The result of `diagnose`."""

    machine: Mapping[str, str]  # facts, in the order to show them
    packages: Mapping[str, str | None]  # installed version of each of `PACKAGES`, or None
    abilities: Mapping[str, str]  # what this machine can run: "yes", or "no: " and the reason
    problems: tuple[str, ...]  # each with its cure; empty on a healthy machine


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine can run, and name known traps. Exit status 1 when there is a problem."""
    diagnosis = diagnose()
    if as_json:
        print_json(asdict(diagnosis))
    else:
        _print_tables(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


def _print_tables(diagnosis: Diagnosis) -> None:
    console = Console(markup=False, highlight=False)  # an extra in brackets is not a style
    for title, facts in (
        ("machine", diagnosis.machine),
        ("packages", {name: found or "not installed" for name, found in diagnosis.packages.items()}),
        ("can run", diagnosis.abilities),
    ):
        table = Table(title=title, show_header=False, title_justify="left", box=None)
        for name, value in facts.items():
            table.add_row(f"  {name}", Text(value))
        console.print(table)
    for problem in diagnosis.problems:
        console.print("problem:", problem, soft_wrap=True)
    if not diagnosis.problems:
        console.print("no problems found")


def diagnose() -> Diagnosis:
    """Inspect the machine and the installed packages, without importing an engine."""
    packages = {name: _version(name) for name in PACKAGES}
    gpu = _gpu()
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
        "gpu": gpu if isinstance(gpu, str) else f"{gpu}, its driver runs CUDA {gpu.cuda[0]}.{gpu.cuda[1]}",
        **_cache_facts(cache_folder(AUTO_CACHE)),
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
            "openvino int8": _needs(packages, "openvino", "openvino"),
            "tensorrt": _on_gpu(packages, gpu, "tensorrt", "tensorrt", "cuda-bindings"),
            "onnxruntime cuda": _on_gpu(packages, gpu, "gpu", "onnxruntime-gpu"),
            "onnxruntime tensorrt": _on_gpu(packages, gpu, "gpu", "onnxruntime-gpu", tensorrt=True),
            "local tritonserver": _local_server(packages),
            "triton client": _needs(packages, "tritonclient", "client"),
        },
        problems=tuple(_problems(packages)),
    )


def _cache_facts(cache: Path | None) -> dict[str, str]:
    """Describe the user's cache: its size, and each plan with the reason if it is not followed."""
    if cache is None:
        return {"cache": "none: this user has no home folder, so graphs are parsed at each start"}
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    facts = {"cache": f"{cache}, {size / 1e6:,.0f} MB" if size else f"{cache}, empty"}
    for path in sorted((cache / "plans").glob("*.json")):
        try:
            plan = read_plan(path)
        except InputError:
            facts[f"plan {path.stem}"] = "cannot be read: run mirror plan again"
            continue
        chosen = f"{plan.chosen.engine.value} {plan.chosen.precision.value} for {plan.goal.value}"
        stale = staleness(plan, plan.fingerprint)
        facts[f"plan {path.stem}"] = f"{chosen}, not followed: {stale}" if stale else chosen
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
        problems.append(f"nvidia-pytriton needs numpy below 2, and {numpy} is installed: pip install 'numpy<2'")
    if not any(packages[name] for name in ("onnxruntime", "onnxruntime-gpu", "openvino")):
        problems.append(f"no engine is installed: {install_command('openvino')} (or the extra cpu)")
    if _SHM.is_dir():
        free = shutil.disk_usage(_SHM).free
        if free < 64 * 2**20:
            problems.append(
                f"{_SHM} has {free >> 20} MiB free, and Triton needs 64: enlarge it (docker: --shm-size=1g)"
            )
        # The name holds the process id of the region's server.
        left = sorted(p.name for p in _SHM.glob("mirror_*_*") if not Path("/proc", p.name.split("_")[1]).exists())
        if left:
            problems.append(f"killed servers left shared memory: rm {' '.join(f'{_SHM}/{name}' for name in left)}")
    return problems


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> Gpu | str:
    """Return the GPU, or what is missing for one."""
    try:
        return this_gpu()
    except EngineError as error:
        return str(error)


def _on_gpu(
    packages: Mapping[str, str | None], gpu: Gpu | str, extra: str, *needed: str, tensorrt: bool = False
) -> str:
    """List all that an engine for GPUs lacks: packages of its extra, a GPU, a driver that is new enough.

    With `tensorrt` it also needs TensorRT 10, which ONNX Runtime's wheels link; 11 does not serve.
    """
    absent = [name for name in needed if not packages[name]]
    missing = [f"{' and '.join(absent)}: {install_command(extra)}"] if absent else []
    if tensorrt and not (packages["tensorrt"] or "").startswith("10."):
        missing.append(f"TensorRT 10 (here: {packages['tensorrt'] or 'none'}): pip install 'tensorrt<11'")
    if isinstance(gpu, str):
        missing.append("an NVIDIA GPU (see gpu above)")
    elif (major := _cuda_major(needed[0])) > gpu.cuda[0]:
        missing.append(f"a driver for CUDA {major} (here: {gpu.cuda[0]}.{gpu.cuda[1]})")
    return f"no: it needs {'; '.join(missing)}" if missing else "yes"


def _cuda_major(package: str) -> int:
    """Return the CUDA version that an installed package is built for, as its requirements say; 0 if they do not."""
    try:
        needs = " ".join(requires(package) or ())
    except PackageNotFoundError:
        return 0
    found = re.search(r"nvidia-cuda-runtime[^;,]*?(\d+)\.|tensorrt_cu(\d+)", needs)
    return int(found[1] or found[2]) if found else 0


def _local_server(packages: Mapping[str, str | None]) -> str:
    try:
        check_platform()
    except ServerError as error:
        return f"no: {error}"
    return _needs(packages, "nvidia-pytriton", "triton")


def _needs(packages: Mapping[str, str | None], package: str, extra: str, also: str | None = None) -> str:
    if packages[package] or (also and packages[also]):
        return "yes"
    return f"no: {install_command(extra)}"
