"""A Python-backend model that rejects every request: it replaces `embed` while a server drains.

Triton's stub process runs this file on its own. It imports nothing of this package, so that it loads in a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that Triton's Python backend looks for by name."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request with UNAVAILABLE (HTTP 503): clients send it elsewhere, or try again later."""
        error = pb_utils.TritonError("the server is stopping: try again", pb_utils.TritonError.UNAVAILABLE)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
