"""Find the real tritonserver inside the nvidia-pytriton wheel, and the environment it needs."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import mirror_runtime
from mirror_runtime.errors import MissingExtra, ServerError
from mirror_runtime.triton.repository.container import container_command

OLDEST_GLIBC = (2, 35)
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Paths inside the wheel."""

    binary: Path  # the `tritonserver` executable
    python_backend: Path  # folder with the Python backend's library and utilities
    stub: Path  # the executable that embeds Python, built for this interpreter's version
    libraries: Path  # folder with the shared libraries that all of them need


def find_distribution() -> Distribution:
    """Find the wheel without importing it. If this machine cannot run it, the error shows how to use the container."""
    check_platform()
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise MissingExtra("pytriton", "triton")
    root = Path(spec.origin).parent
    server = root / "tritonserver"
    found = Distribution(
        binary=server / "bin" / "tritonserver",
        python_backend=server / "backends" / "python",
        stub=server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub",
        libraries=root.parent / "nvidia_pytriton.libs",
    )
    if not found.binary.is_file():
        raise ServerError(f"pytriton has no tritonserver for this platform. {_use_container()}")
    if not found.stub.is_file():
        raise ServerError(f"the installed nvidia-pytriton has no Python backend for Python {_PYTHON}: use 3.10 to 3.13")
    return found


def server_environment(distribution: Distribution) -> dict[str, str]:
    """Build an environment in which tritonserver's stub uses this interpreter, its packages and this source root."""
    bin_folder = str(Path(sys.executable).parent)
    packages = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
    if site.ENABLE_USER_SITE:
        packages[site.getusersitepackages()] = None
    # This package first, so that the server runs the same code as an editable install or a copy on PYTHONPATH.
    source_root = str(Path(mirror_runtime.__file__).parents[1])
    additions = {
        "PATH": [bin_folder],
        "PYTHONPATH": list(dict.fromkeys([source_root, *packages])),
        "LD_LIBRARY_PATH": [str(distribution.libraries), *_libpython_folder()],
    }
    environment = dict(os.environ)
    for name, folders in additions.items():
        inherited = [environment[name]] if environment.get(name) else []
        environment[name] = os.pathsep.join([*folders, *inherited])
    return environment


def _libpython_folder() -> list[str]:
    """Return the folder that the loader must search for libpython; empty if it finds it anyway."""
    name = f"libpython{_PYTHON}.so.1.0"
    folder = sysconfig.get_config_var("LIBDIR")
    if folder and (Path(folder) / name).is_file():
        return [str(folder)]
    if ctypes.util.find_library(f"python{_PYTHON}"):
        return []
    raise ServerError(
        f"Triton's Python backend embeds Python through {name}, which is not on this machine: install it "
        f"(Debian and Ubuntu: apt install libpython{_PYTHON}), or use a Python built with --enable-shared"
    )


def check_platform() -> None:
    """Check that the wheel's server can run on this system; if not, the error shows how to use the container."""
    machine = f"{platform.system()} {platform.machine()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ServerError(f"the tritonserver wheel runs on Linux x86-64; this is {machine}. {_use_container()}")
    version = _glibc_version()
    if version is None or version < OLDEST_GLIBC:
        have = "none" if version is None else ".".join(map(str, version))
        need = ".".join(map(str, OLDEST_GLIBC))
        raise ServerError(
            f"the tritonserver wheel needs glibc {need} or newer; this machine has {have}. {_use_container()}"
        )


def _glibc_version() -> tuple[int, int] | None:
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):  # not glibc
        return None
    match = re.search(r"(\d+)\.(\d+)", text or "")
    return (int(match[1]), int(match[2])) if match else None


def _use_container() -> str:
    return (
        "Serve in the container instead: python export/to_triton.py BUNDLE --output REPO, then\n"
        + container_command("REPO", "CLONE")
    )
