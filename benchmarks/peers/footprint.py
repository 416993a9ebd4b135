"""The disk space of a party's packages."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import mirror_runtime
from benchmarks.peers.installed import installed_bytes, normal
from mirror_runtime.bundle import EngineName
from mirror_runtime.errors import PeerError

SCRIPT = Path(__file__).resolve().parent / "installed.py"
PACKAGE = "mirror-runtime"

EXTRAS = {EngineName.ONNXRUNTIME: "cpu", EngineName.OPENVINO: "openvino"}
"""Extras of `pip install 'mirror-runtime[…]'` for the engines of a CPU."""


@cache
def our_bytes(engine: EngineName) -> int:
    """Return the bytes of `pip install 'mirror-runtime[EXTRA]'` and its dependencies; 0 without an extra."""
    if engine not in EXTRAS:
        return 0
    needed = needed_by(PACKAGE, EXTRAS[engine])
    # This checkout may be installed in place: then the installer's list does not include our own files.
    ours = sum(file.stat().st_size for file in Path(mirror_runtime.__file__).parent.rglob("*") if file.is_file())
    return ours + installed_bytes(needed - {PACKAGE})


@cache
def environment_bytes(python: Path) -> int:
    """Return the bytes of all packages of a peer's environment.

    Raises:
        PeerError: its Python cannot list them.
    """
    done = subprocess.run((python, "-I", SCRIPT), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(f"{python} cannot list its packages: {done.stderr.strip()[-300:]}")
    return int(done.stdout)


def needed_by(package: str, *extras: str) -> frozenset[str]:
    """Return the names of a package and its dependencies, as far as they are installed."""
    found: set[str] = set()
    waiting = [(package, extras)]
    for name, chosen in waiting:  # which grows
        try:
            requires = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        found.add(normal(name))
        for line in requires:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*chosen, "")):
                dependency = need.name, tuple(sorted(need.extras))
                waiting += [dependency] if dependency not in waiting else []
    return frozenset(found)
