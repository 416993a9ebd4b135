"""The process's only `openvino.Core`."""

from __future__ import annotations

from functools import cache
from typing import Any

from mirror_runtime.extras import require


def shared_core() -> Any:
    """Return the `openvino.Core` that this whole process compiles with.

    With two of them the next signal may kill the process: each installs a stack for signal handlers, and the last one
    to be destroyed restores its predecessor's, whose memory has been freed (2026.4.1).
    """
    return _core_of(require("openvino", "openvino"))


@cache
def _core_of(openvino: Any) -> Any:
    return openvino.Core()
