"""What Triton loads: the model itself ships in the mirror_runtime package."""

from mirror_runtime.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
