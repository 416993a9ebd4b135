"""OpenVINO's core, one for the whole process."""

from __future__ import annotations

from functools import cache
from typing import Any

from mirror_runtime.extras import require


def shared_core() -> Any:
    """Give the `openvino.Core` that everything in this process compiles with.

    With a second one, which goes after the first, the next signal kills the process: each puts a stack for signal
    handlers in place, and the last to go puts back its predecessor's, whose memory is gone (2026.4.1).

    Raises:
        MissingExtra: openvino is not installed.
    """
    return _core_of(require("openvino", "openvino"))


@cache
def _core_of(openvino: Any) -> Any:
    return openvino.Core()
