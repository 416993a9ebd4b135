"""The Python-backend model `embed`, which Triton loads as `mirror_runtime.triton.model.TritonPythonModel`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the model on first use, because it needs modules that exist only inside Triton."""
    if name == "TritonPythonModel":
        from mirror_runtime.triton.model.embed_model import TritonPythonModel

        return TritonPythonModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
