"""A Python-backend model that refuses every request: it takes the place of `embed` while a server drains.

Run inside Triton's stub, as a file of its own: nothing of ours is imported, so that it loads in a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that Triton's Python backend looks for by name."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request with UNAVAILABLE (HTTP 503): clients take it elsewhere, or try again later."""
        error = pb_utils.TritonError("the server is stopping: try again", pb_utils.TritonError.UNAVAILABLE)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
