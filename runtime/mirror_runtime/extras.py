"""Import optional packages on first use, with an error that says how to install them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mirror_runtime.errors import EngineError, MissingExtra


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: dotted name, such as "pyarrow.parquet".
        extra: the extra of `mirror-runtime` that installs it.

    Raises:
        MissingExtra: it is not installed.
        EngineError: it is installed but cannot be loaded, for example next to another package's version.
    """
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != package:
            raise EngineError(f"{package} needs {error.name}, which is not installed") from error
        raise MissingExtra(package, extra) from error
    except ImportError as error:
        raise EngineError(f"{package} is installed but cannot be loaded: {error}") from error
