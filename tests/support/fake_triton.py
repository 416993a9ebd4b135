"""A stand-in for `triton_python_backend_utils`, which only Triton's stub process has, and for its requests."""

import json
import threading
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


def tensor(*texts: bytes) -> NDArray[Any]:
    return np.array(texts, dtype=np.object_).reshape(-1, 1)


class FakeTritonError(Exception):
    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = 3, 1, 14, 8

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class FakeTensor:
    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class FakeResponse:
    output_tensors: list[FakeTensor] = field(default_factory=list)
    error: FakeTritonError | None = None


@dataclass
class NewFakeResponse(FakeResponse):
    """The response of servers after 2.51. Like the backend's own class, it names its parameters in the docstring."""

    parameters: dict[str, str] = field(default_factory=dict)


NewFakeResponse.__init__.__doc__ = "__init__(self, output_tensors, error, parameters) -> None"


class FakeLogger:
    lines: ClassVar[list[str]] = []

    log_info = log_warn = log_error = staticmethod(lines.append)


class FakeMetric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels, self.value = labels, 0.0

    def increment(self, more: float) -> None:
        self.set(self.value + more)

    def set(self, value: float) -> None:
        self.value = value


class FakeFamily:
    COUNTER, GAUGE = "counter", "gauge"
    made: ClassVar[dict[str, list[FakeMetric]]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.metrics = self.made.setdefault(name, [])

    def Metric(self, labels: dict[str, str]) -> FakeMetric:
        self.metrics.append(FakeMetric(labels))
        return self.metrics[-1]


class FakeRequest:
    """One request, its response sender, and its response."""

    def __init__(self, *texts: bytes, outputs=("EMBEDDING", "TOKENS", "TRUNCATED"), timeout_us=0, **parameters) -> None:
        self.tensors = [FakeTensor("TEXT", tensor(*texts))]
        self.parameters = partial(json.dumps, parameters)
        self.timeout = lambda: timeout_us
        self.requested_output_names = lambda: set(outputs)
        self.get_response_sender = lambda: self
        self.cancelled = False
        self.answered = threading.Event()
        self.response: Any = None

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Any, flags: int) -> None:
        assert flags == 1, "every reply is the last one"
        assert not self.answered.is_set(), "one reply per request"
        self.response = response
        self.answered.set()


def fake_backend_utils() -> Any:
    """Build the module, with an empty log and no metrics."""
    FakeLogger.lines.clear()
    FakeFamily.made.clear()
    return SimpleNamespace(
        TritonError=FakeTritonError,
        TritonModelException=RuntimeError,
        Tensor=FakeTensor,
        InferenceResponse=FakeResponse,
        Logger=FakeLogger,
        MetricFamily=FakeFamily,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: next(t for t in request.tensors if t.name == name),
    )
