"""How a bundle is served, and how that is written into a model's configuration and read from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import InputError
from mirror_runtime.plan import HostPlan, Setting
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts


class Backend(str, Enum):
    """What runs the graph behind `embed`."""

    PYTHON = "python"
    """The engine lives in `embed` itself: one model."""
    ONNXRUNTIME = "onnxruntime"
    """A second model, `encoder`, in Triton's ONNX Runtime backend; so with the others."""
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How a bundle is served.

    Attributes:
        engine: an engine's name, or "auto".
        precision: a precision, or "auto".
        streams: how many executions run side by side in an instance; None leaves it to the engine.
        long_texts: what happens to texts over the encoder's `max_tokens`, where a request does not say.
        max_batch_size: most texts a request, and most that Triton hands over at once.
        row_tokens: length of the everyday row; None for what a plan on the serving machine says, or the usual one.
        batch_tokens: tokens of a full batch; None as for `row_tokens`, and both or neither are given.
        instances: processes that run the model, each on its own share of the cores.
        max_tokens_in_flight: of requests taken and not answered, in all instances together; more are refused.
        backend: what runs the graph.
    """

    engine: str = AUTO
    precision: str = AUTO
    streams: int | None = None
    long_texts: LongTexts = LongTexts.TRUNCATE
    max_batch_size: int = 256
    row_tokens: int | None = None
    batch_tokens: int | None = None
    instances: int = 1
    max_tokens_in_flight: int = 32768
    backend: Backend = Backend.PYTHON

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "streams", "row_tokens", "batch_tokens", "instances", "max_tokens_in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if (self.row_tokens is None) != (self.batch_tokens is None):
            raise InputError("row_tokens and batch_tokens belong together: give both or neither")
        if self.row_tokens is not None and (AUTO in (self.engine, self.precision) or self.streams is None):
            raise InputError("row_tokens and batch_tokens need engine, precision and streams to be named too")

    @property
    def setting(self) -> Setting | None:
        """The one way to run that these options name; None where they leave something open."""
        if self.row_tokens is None or self.batch_tokens is None or self.streams is None:
            return None
        return Setting(
            engine=EngineName(self.engine),
            precision=Precision(self.precision),
            streams=self.streams,
            row_tokens=self.row_tokens,
            batch_tokens=self.batch_tokens,
        )

    def follow(self, plan: HostPlan, fingerprint: str) -> ServingOptions:
        """Take engine, precision, streams and rows from a plan, as far as these options leave them open.

        Args:
            plan: what `mirror plan` measured on the machine that will serve.
            fingerprint: the bundle's.

        Raises:
            InputError: the plan is another bundle's, or accepted nothing of what is asked for.
        """
        if plan.fingerprint != fingerprint:
            raise InputError(f"the plan is for the bundle {plan.fingerprint}, not {fingerprint}: make one for this one")
        chosen = plan.best(self.engine, self.precision)
        if chosen is None:
            asked = f"engine {self.engine}, precision {self.precision}"
            raise InputError(f"the plan accepted nothing for {asked}: ask for something else")
        return replace(
            self,
            engine=chosen.engine.value,
            precision=chosen.precision.value,
            streams=self.streams or chosen.streams,
            row_tokens=self.row_tokens or chosen.row_tokens,
            batch_tokens=self.batch_tokens or chosen.batch_tokens,
        )

    def to_parameters(self) -> dict[str, str]:
        """Write what the model itself must know, as the strings of `config.pbtxt`."""
        return {
            "engine": self.engine,
            "precision": self.precision,
            "streams": _written(self.streams),
            "long_texts": self.long_texts.value,
            "row_tokens": _written(self.row_tokens),
            "batch_tokens": _written(self.batch_tokens),
            "instances": str(self.instances),
            "max_tokens_in_flight": str(self.max_tokens_in_flight),
            "backend": self.backend.value,
        }

    @classmethod
    def of_parameters(cls, said: Mapping[str, str], max_batch_size: int) -> ServingOptions:
        """Read what `to_parameters` wrote.

        Raises:
            KeyError: a parameter is missing: an older version of this project wrote the configuration.
            ValueError: a parameter is none of ours.
        """
        return cls(
            engine=said["engine"],
            precision=said["precision"],
            streams=_read(said["streams"]),
            long_texts=LongTexts(said["long_texts"]),
            max_batch_size=max_batch_size,
            row_tokens=_read(said["row_tokens"]),
            batch_tokens=_read(said["batch_tokens"]),
            instances=int(said["instances"]),
            max_tokens_in_flight=int(said["max_tokens_in_flight"]),
            backend=Backend(said["backend"]),
        )


def _written(number: int | None) -> str:
    return AUTO if number is None else str(number)


def _read(text: str) -> int | None:
    return None if text == AUTO else int(text)
