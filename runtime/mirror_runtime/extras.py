"""Import optional packages on first use: without their telemetry, and with an error that says how to install them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, cast

from mirror_runtime.errors import EngineError, MissingExtra

_TELEMETRY = {"onnxruntime": ("ORT_DISABLE_TELEMETRY", "1"), "ray": ("RAY_USAGE_STATS_ENABLED", "0")}
"""Variables that silence a package which otherwise reports its use. One that the user has set stays as it is."""


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package, with the package's telemetry off.

    Args:
        module: dotted name, such as "pyarrow.parquet".
        extra: the extra of `mirror-runtime` that installs it.

    Raises:
        MissingExtra: it is not installed.
        EngineError: it is installed but cannot be loaded, for example next to another package's version.
    """
    package = module.split(".")[0]
    _disable_telemetry(package)
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != package:
            raise EngineError(f"{package} needs {error.name}, which is not installed") from error
        raise MissingExtra(package, extra) from error
    except ImportError as error:
        raise EngineError(f"{package} is installed but cannot be loaded: {error}") from error


def _disable_telemetry(package: str) -> None:
    """Keep a package from reporting its use and from writing an identifier into the user's home folder."""
    if package in _TELEMETRY:
        os.environ.setdefault(*_TELEMETRY[package])
    elif package == "openvino":
        # `import openvino` sends an event. It has no switch: without this module it takes a stub of its own.
        cast("dict[str, Any]", sys.modules).setdefault("openvino_telemetry", None)
