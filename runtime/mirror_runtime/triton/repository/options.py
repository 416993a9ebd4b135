"""Options for serving a bundle, and how a model's configuration stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.engines import ON_GPU
from mirror_runtime.errors import InputError
from mirror_runtime.plan import HostPlan, Setting
from mirror_runtime.selection import AUTO
from mirror_runtime.tokenizer import LongTexts


class Backend(str, Enum):
    """Which Triton backend runs the graph."""

    PYTHON = "python"
    """The engine runs inside `embed`: one model."""
    ONNXRUNTIME = "onnxruntime"
    """A second model, `encoder`, runs in Triton's ONNX Runtime backend; likewise for the others."""
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    """ONNX Runtime's backend on a GPU, with its CUDA provider."""
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"

    @property
    def on_gpu(self) -> bool:
        """Whether the backend runs its model on a GPU."""
        return self is not Backend.PYTHON and EngineName(self.value) in ON_GPU


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Options for serving a bundle.

    Attributes:
        engine: an engine's name, or "auto".
        precision: a precision, or "auto".
        streams: parallel executions in an instance; None leaves it to the engine.
        long_texts: policy for texts over the encoder's `max_tokens` in requests that name none.
        max_batch_size: maximum number of texts per request and per call of the model.
        row_tokens: length of a standard row; None for that of a plan on the serving machine, or the default.
        batch_tokens: tokens of a full batch; None like `row_tokens`; set both or neither.
        instances: processes that run the model, each on its own share of the cores.
        max_tokens_in_flight: most tokens of accepted, unanswered requests in all instances together; more are rejected.
        backend: runs the graph.
        dimensions: shorter vectors that requests may choose, as numbers of leading components; empty for those that
            the encoder records that it was trained for (Matryoshka).
        invariant: make a text's vector equal to the bit whatever else is encoded, see `Encoder.load`.
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
    dimensions: tuple[int, ...] = ()
    invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "streams", "row_tokens", "batch_tokens", "instances", "max_tokens_in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if (self.row_tokens is None) != (self.batch_tokens is None):
            raise InputError("row_tokens and batch_tokens belong together: set both or neither")
        if self.row_tokens is not None and (AUTO in (self.engine, self.precision) or self.streams is None):
            raise InputError("row_tokens and batch_tokens require engine, precision and streams as well")
        if self.invariant and self.backend is not Backend.PYTHON:
            raise InputError(f"--invariant is not possible with the backend {self.backend.value}: choose python")

    @property
    def setting(self) -> Setting | None:
        """The complete setting that these options name; None if they leave something open."""
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
        """Fill open options (engine, precision, streams and rows) from a plan.

        Raises:
            InputError: the plan belongs to another bundle, or accepted no setting that fits these options.
        """
        if plan.fingerprint != fingerprint:
            raise InputError(
                f"the plan is for the bundle {plan.fingerprint}, not {fingerprint}: make one for this bundle"
            )
        chosen = plan.best(self.engine, self.precision)
        if chosen is None:
            raise InputError(
                f"the plan accepted nothing for engine {self.engine}, precision {self.precision}: choose others"
            )
        return replace(
            self,
            engine=chosen.engine.value,
            precision=chosen.precision.value,
            streams=self.streams or chosen.streams,
            row_tokens=self.row_tokens or chosen.row_tokens,
            batch_tokens=self.batch_tokens or chosen.batch_tokens,
        )

    def to_parameters(self) -> dict[str, str]:
        """Return the options that the model needs, as parameters of `config.pbtxt`."""
        values = {name: value for name, value in vars(self).items() if name != "max_batch_size"}
        values["dimensions"] = ",".join(map(str, self.dimensions)) or None
        values["invariant"] = str(self.invariant).lower()
        return {name: AUTO if value is None else str(getattr(value, "value", value)) for name, value in values.items()}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, str], max_batch_size: int) -> ServingOptions:
        """Parse what `to_parameters` wrote; a KeyError or ValueError means another version of this project wrote it."""
        # Repositories from before these options have no such parameters.
        trained, invariant = parameters.get("dimensions", AUTO), parameters.get("invariant", "false")
        return cls(
            engine=parameters["engine"],
            precision=parameters["precision"],
            streams=_parse_optional(parameters["streams"]),
            long_texts=LongTexts(parameters["long_texts"]),
            max_batch_size=max_batch_size,
            row_tokens=_parse_optional(parameters["row_tokens"]),
            batch_tokens=_parse_optional(parameters["batch_tokens"]),
            instances=int(parameters["instances"]),
            max_tokens_in_flight=int(parameters["max_tokens_in_flight"]),
            backend=Backend(parameters["backend"]),
            dimensions=() if trained == AUTO else tuple(map(int, trained.split(","))),
            invariant=invariant == "true",
        )


def _parse_optional(text: str) -> int | None:
    return None if text == AUTO else int(text)
