"""The model that Triton runs, with a stand-in for the module that only Triton's stub process has."""

import importlib
import json
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror_runtime import Encoder, EngineError
from mirror_runtime.bundle import read_manifest
from mirror_runtime.tokens import LongTexts
from mirror_runtime.triton.batching import Answer, Failure, FailureKind, answer
from mirror_runtime.triton.repository import ServingOptions, render_config


def answers(outcomes: list[Answer | Failure]) -> list[Answer]:
    assert all(isinstance(outcome, Answer) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Answer)]


def tensor(*texts: bytes) -> NDArray[Any]:
    return np.array(texts, dtype=np.object_).reshape(-1, 1)


class CountingEncoder(Encoder):
    calls = 0

    def encode_detailed(self, texts):
        type(self).calls += 1
        return super().encode_detailed(texts)


@pytest.fixture
def encoder(make_bundle):
    CountingEncoder.calls = 0
    with CountingEncoder.load(make_bundle(max_tokens=16), engine="fake", long_texts="error") as encoder:
        yield encoder


def test_all_requests_share_one_call_and_get_their_own_vectors(encoder):
    outcomes = answers(answer(encoder, [tensor(b"one"), tensor("zwei Häuser".encode(), b""), tensor(b"three")]))
    assert encoder.calls == 1
    expected = encoder.encode(["one", "zwei Häuser", "", "three"])
    np.testing.assert_array_equal(np.concatenate([o.vectors for o in outcomes]), expected)
    assert [o.vectors.shape for o in outcomes] == [(1, 8), (2, 8), (1, 8)]
    assert [o.tokens.shape for o in outcomes] == [(1, 1), (2, 1), (1, 1)]
    assert outcomes[1].tokens.dtype == np.int32
    assert outcomes[1].truncated.dtype == np.bool_


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(b"\xff\xfe", "not valid UTF-8 (byte 0xff at offset 0)"), (b"\xed\xa0\x80", "not valid UTF-8")],
    ids=["stray byte", "encoded surrogate"],
)
def test_invalid_utf8_fails_its_request_alone(encoder, raw, reason):
    good, bad, other = answer(encoder, [tensor(b"good"), tensor(b"fine", raw), tensor(b"other")])
    assert isinstance(bad, Failure)
    assert bad.kind is FailureKind.INVALID_ARG
    assert bad.message.startswith(f"text 1: {reason}")
    served = np.concatenate([outcome.vectors for outcome in answers([good, other])])
    np.testing.assert_array_equal(served, encoder.encode(["good", "other"]))


def test_a_text_the_encoder_refuses_fails_its_request_with_its_own_position(encoder):
    first, second, third = answer(encoder, [tensor(b"a", b"b"), tensor(b"c", b"long " * 50), tensor(b"d")])
    assert isinstance(second, Failure)
    assert second.message.startswith("text 1: has 52 tokens and the encoder takes 16")
    np.testing.assert_array_equal(answers([first, third])[1].vectors, encoder.encode(["d"]))


def test_nothing_but_bad_requests_calls_no_engine(encoder):
    outcomes = answer(encoder, [tensor(b"\xff"), tensor(b"\xfe")])
    assert [isinstance(o, Failure) and o.kind for o in outcomes] == [FailureKind.INVALID_ARG] * 2
    assert encoder.calls == 0


# The rest drives TritonPythonModel itself.


class FakeTritonError(Exception):
    INVALID_ARG = 3
    INTERNAL = 1

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


class FakeLogger:
    lines: ClassVar[list[str]] = []

    log_info = log_error = staticmethod(lines.append)


@pytest.fixture
def model_class(monkeypatch):
    FakeLogger.lines.clear()
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.TritonError = FakeTritonError
    module.TritonModelException = RuntimeError
    module.Tensor = FakeTensor
    module.InferenceResponse = FakeResponse
    module.Logger = FakeLogger
    module.get_input_tensor_by_name = lambda request, name: next(t for t in request if t.name == name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.delitem(sys.modules, "mirror_runtime.triton.model", raising=False)
    yield importlib.import_module("mirror_runtime.triton.model").TritonPythonModel
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    sys.modules.pop("mirror_runtime.triton.model", None)


def arguments(bundle: Path, options: ServingOptions) -> dict[str, str]:
    """Give what Triton passes to `initialize` for a bundle that lies in the version folder."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    text = render_config(read_manifest(bundle), options, bundle=bundle.name)
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    return {
        "model_config": json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)),
        "model_repository": str(bundle.parent.parent),
        "model_version": bundle.parent.name,
    }


def request(*texts: bytes) -> list[FakeTensor]:
    return [FakeTensor("TEXT", tensor(*texts))]


def test_the_model_serves_the_bundle_beside_it(model_class, make_bundle):
    bundle = make_bundle()
    model = model_class()
    model.initialize(arguments(bundle, ServingOptions(engine="fake", streams=2, long_texts=LongTexts.CHUNK)))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert model.encoder.engine.streams == 2
    responses = model.execute([request(b"one"), request(b"\xff"), request(b"two", b"three")])
    assert responses[1].error.code == FakeTritonError.INVALID_ARG
    assert not responses[1].output_tensors
    assert [t.name for t in responses[0].output_tensors] == ["EMBEDDING", "TOKENS", "TRUNCATED"]
    with Encoder.load(bundle, engine="fake") as encoder:
        expected = encoder.encode(["two", "three"])
    np.testing.assert_array_equal(responses[2].output_tensors[0].array, expected)
    model.finalize()


def test_a_failing_engine_fails_every_waiter_and_tells_the_log_alone(model_class, make_bundle, monkeypatch):
    bundle = make_bundle()
    model = model_class()
    model.initialize(arguments(bundle, ServingOptions(engine="fake")))

    def broken(_: object) -> None:
        raise EngineError(f"{bundle}/onnx/model_packed.onnx broke")

    monkeypatch.setattr(model.encoder.engine, "run", broken)
    responses = model.execute([request(b"one"), request(b"two")])
    assert [a.error.code for a in responses] == [FakeTritonError.INTERNAL] * 2
    assert [str(a.error) for a in responses] == ["encoding failed; the server's log says why"] * 2
    assert "model_packed.onnx broke" in FakeLogger.lines[-1]
    assert "Traceback" in FakeLogger.lines[-1]


def test_a_bundle_that_cannot_be_loaded_ends_in_one_message(model_class, make_bundle):
    bundle = make_bundle()
    with pytest.raises(RuntimeError, match="the bundle has no packed artifact for engine onnxruntime"):
        model_class().initialize(arguments(bundle, ServingOptions(engine="onnxruntime")))


def test_a_bundle_of_another_vector_space_than_the_repository_promises_is_refused(model_class, make_bundle):
    bundle = make_bundle()
    given = arguments(bundle, ServingOptions(engine="fake"))
    text = (bundle / "manifest.json").read_text().replace("0123456789abcdef", "fedcba9876543210")
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(RuntimeError, match="promises vectors of 0123456789abcdef and the bundle gives fedcba98"):
        model_class().initialize(given)
