"""The model that Triton runs, with a stand-in for the module that only Triton's stub process has."""

import importlib
import json
import logging
import os
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror_runtime import Encoder, EngineError
from mirror_runtime.bundle import read_manifest
from mirror_runtime.errors import InputError
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model import scheduler as queueing
from mirror_runtime.triton.model.batching import EmbedRequest, EmbedResult, Failure, FailureKind, answer
from mirror_runtime.triton.model.instances import share
from mirror_runtime.triton.model.request_options import RequestOptions
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import render_config


def answers(outcomes: list[EmbedResult | Failure]) -> list[EmbedResult]:
    assert all(isinstance(outcome, EmbedResult) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, EmbedResult)]


def tensor(*texts: bytes) -> NDArray[Any]:
    return np.array(texts, dtype=np.object_).reshape(-1, 1)


def question(*texts: bytes, **wishes: Any) -> EmbedRequest:
    return EmbedRequest(texts=tensor(*texts), wishes=RequestOptions(**wishes))


class CountingEncoder(Encoder):
    calls = 0

    def begin(self, *arguments, **named):
        type(self).calls += 1
        return super().begin(*arguments, **named)


@pytest.fixture
def encoder(make_bundle):
    with CountingEncoder.load(make_bundle(max_tokens=16), engine="fake") as encoder:
        CountingEncoder.calls = 0
        yield encoder


def test_all_requests_share_one_call_and_get_their_own_vectors(encoder):
    asked = [question(b"one"), question("zwei Häuser".encode(), b""), question(b"three")]
    outcomes = answers(answer(encoder, asked, LongTexts.TRUNCATE))
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
    asked = [question(b"good"), question(b"fine", raw), question(b"other")]
    good, bad, other = answer(encoder, asked, LongTexts.TRUNCATE)
    assert isinstance(bad, Failure)
    assert bad.kind is FailureKind.INVALID_ARG
    assert bad.message.startswith(f"text 1: {reason}")
    served = np.concatenate([outcome.vectors for outcome in answers([good, other])])
    np.testing.assert_array_equal(served, encoder.encode(["good", "other"]))


def test_a_text_the_encoder_refuses_fails_its_request_with_its_own_position(encoder):
    asked = [question(b"a", b"b"), question(b"c", b"long " * 50), question(b"d")]
    first, second, third = answer(encoder, asked, LongTexts.ERROR)
    assert isinstance(second, Failure)
    assert second.message.startswith("text 1: has 52 tokens and the encoder takes 16")
    np.testing.assert_array_equal(answers([first, third])[1].vectors, encoder.encode(["d"]))


def test_each_request_has_its_own_policy_for_long_texts(encoder):
    long = b"long " * 50
    asked = [
        question(long, long_texts=LongTexts.TRUNCATE),
        question(long, long_texts=LongTexts.ERROR),
        question(long),
        question(b"short", long_texts=LongTexts.ERROR),
    ]
    cut, refused, chunked, short = answer(encoder, asked, LongTexts.CHUNK)
    assert isinstance(refused, Failure)
    cut, chunked, short = answers([cut, chunked, short])
    assert cut.truncated.all()
    np.testing.assert_array_equal(cut.vectors, encoder.encode([long.decode()]))
    assert not chunked.truncated.any()
    assert not np.array_equal(chunked.vectors, cut.vectors)
    np.testing.assert_array_equal(short.vectors, encoder.encode(["short"]))
    assert encoder.calls == 3, "one for the four requests, two for the comparisons"


def test_dimensions_and_prompt_are_each_requests_own(encoder):
    plain, cut, prompted = answers(
        answer(
            encoder,
            [question(b"text"), question(b"text", dimensions=3), question(b"text", prompt="query: ")],
            LongTexts.TRUNCATE,
        )
    )
    assert cut.vectors.shape == (1, 3)
    expected = plain.vectors[:, :3] / np.linalg.norm(plain.vectors[:, :3])
    np.testing.assert_allclose(cut.vectors, expected, rtol=1e-6)
    np.testing.assert_array_equal(prompted.vectors, encoder.encode(["query: text"]))
    assert prompted.tokens[0, 0] == plain.tokens[0, 0] + 2


def test_nothing_but_bad_requests_calls_no_engine(encoder):
    outcomes = answer(encoder, [question(b"\xff"), question(b"\xfe")], LongTexts.TRUNCATE)
    assert [isinstance(o, Failure) and o.kind for o in outcomes] == [FailureKind.INVALID_ARG] * 2
    assert encoder.calls == 0


def test_the_guess_counts_what_will_run_and_what_must_be_read():
    assert question(b"a" * 40, b"").tokens(64) == 12 + 2
    assert question(b"a" * 128_000).tokens(64) == 64 + 1000
    assert question(b"a" * 40, prompt="b" * 20).tokens(64) == 17


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [([0, 1, 2, 3], 2, [[0, 1], [2, 3]]), ([2, 5, 7], 2, [[2], [5, 7]]), ([4], 1, [[4]])],
)
def test_instances_share_the_cores_without_overlap(cores, count, shares):
    assert [share(cores, number, count) for number in range(count)] == shares


def test_more_instances_than_cores_are_refused():
    with pytest.raises(InputError, match="3 instances on 2 cores"):
        share([0, 1], 0, 3)


# The rest drives TritonPythonModel itself.


class FakeTritonError(Exception):
    INVALID_ARG = 3
    INTERNAL = 1
    UNAVAILABLE = 14
    CANCELLED = 8

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
class NewFakeResponse:
    """As servers after 2.51 have it; the backend's own class says so in its docstring too."""

    output_tensors: list[FakeTensor] = field(default_factory=list)
    error: FakeTritonError | None = None
    parameters: dict[str, str] = field(default_factory=dict)


NewFakeResponse.__init__.__doc__ = "__init__(self, output_tensors, error, parameters) -> None"


class FakeLogger:
    lines: ClassVar[list[str]] = []

    log_info = log_warn = log_error = staticmethod(lines.append)


class FakeMetric:
    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.value = 0.0

    def increment(self, more: float) -> None:
        self.value += more

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
    """One request, its answer, and the sender that brings it."""

    def __init__(self, *texts: bytes, outputs=("EMBEDDING", "TOKENS", "TRUNCATED"), timeout_us=0, **parameters) -> None:
        self.tensors = [FakeTensor("TEXT", tensor(*texts))]
        self.outputs, self.timeout_us, self.given = outputs, timeout_us, parameters
        self.gone = False
        self.answered = threading.Event()
        self.response: Any = None

    def parameters(self) -> str:
        return json.dumps(self.given)

    def timeout(self) -> int:
        return self.timeout_us

    def requested_output_names(self) -> set[str]:
        return set(self.outputs)

    def get_response_sender(self):
        return self

    def is_cancelled(self) -> bool:
        return self.gone

    def send(self, response: Any, flags: int) -> None:
        assert flags == 1, "every answer is the last one"
        assert not self.answered.is_set(), "one answer a request"
        self.response = response
        self.answered.set()


@pytest.fixture
def pb_utils(monkeypatch):
    FakeLogger.lines.clear()
    FakeFamily.made.clear()
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.TritonError = FakeTritonError
    module.TritonModelException = RuntimeError
    module.Tensor = FakeTensor
    module.InferenceResponse = FakeResponse
    module.Logger = FakeLogger
    module.MetricFamily = FakeFamily
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.get_input_tensor_by_name = lambda request, name: next(t for t in request.tensors if t.name == name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    yield module
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    sys.modules.pop("mirror_runtime.triton.model.embed_model", None)
    logging.getLogger("mirror_runtime").handlers = []
    logging.getLogger("mirror_runtime.encoder").setLevel(logging.NOTSET)


@pytest.fixture
def start(pb_utils):
    models: list[Any] = []

    def starting(bundle: Path, options: ServingOptions) -> Any:
        sys.modules.pop("mirror_runtime.triton.model.embed_model", None)
        model = importlib.import_module("mirror_runtime.triton.model.embed_model").TritonPythonModel()
        model.initialize(arguments(bundle, options))
        models.append(model)
        return model

    yield starting
    for model in models:
        model.finalize()


def arguments(bundle: Path, options: ServingOptions) -> dict[str, str]:
    """Give what Triton passes to `initialize` for a bundle that lies in the version folder."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    text = render_config(read_manifest(bundle), options, bundle=bundle.name)
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    return {
        "model_config": json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)),
        "model_repository": str(bundle.parent.parent),
        "model_name": "embed",
        "model_version": bundle.parent.name,
        "model_instance_name": "embed_0_0",
    }


def serve(model: Any, *requests: FakeRequest) -> list[Any]:
    """Give each request's response, however it came."""
    returned = model.execute(requests)
    for request, response in zip(requests, returned, strict=True):
        if response is None:
            assert request.answered.wait(10), "a request that was taken got no answer"
        else:
            assert not request.answered.is_set(), "answered twice"
            request.response = response
    return [request.response for request in requests]


class Brake:
    """Holds the engine until it is let go; the workers' alone, for nothing is little enough to be answered at once."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(queueing, "AT_ONCE_TOKENS", 0)
        self.run = model.encoder.engine.run
        self.go = threading.Event()
        self.ran = 0
        monkeypatch.setattr(model.encoder.engine, "run", self.held)

    def held(self, rows: Any) -> Any:
        assert self.go.wait(10)
        self.ran += 1
        return self.run(rows)


def test_the_model_serves_the_bundle_beside_it(start, make_bundle):
    bundle = make_bundle()
    model = start(bundle, ServingOptions(engine="fake", streams=2, long_texts=LongTexts.CHUNK))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert model.encoder.engine.streams == 2
    responses = serve(model, FakeRequest(b"one"), FakeRequest(b"\xff"), FakeRequest(b"two", b"three"))
    assert responses[1].error.code == FakeTritonError.INVALID_ARG
    assert not responses[1].output_tensors
    assert [t.name for t in responses[0].output_tensors] == ["EMBEDDING", "TOKENS", "TRUNCATED"]
    with Encoder.load(bundle, engine="fake") as encoder:
        expected = encoder.encode(["two", "three"])
    np.testing.assert_array_equal(responses[2].output_tensors[0].array, expected)


def test_the_vector_space_is_named_where_it_is_asked_for(start, make_bundle):
    model = start(make_bundle(), ServingOptions(engine="fake"))
    (response,) = serve(model, FakeRequest(b"one", b"two", outputs=["EMBEDDING", "FINGERPRINT"]))
    named = response.output_tensors[-1]
    assert (named.name, named.array.tolist()) == ("FINGERPRINT", [[b"0123456789abcdef"]] * 2)


def test_newer_servers_get_it_as_a_response_parameter_too(start, pb_utils, make_bundle):
    pb_utils.InferenceResponse = NewFakeResponse
    (response,) = serve(start(make_bundle(), ServingOptions(engine="fake")), FakeRequest(b"one"))
    assert response.parameters == {"fingerprint": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"truncat": True}, r"unknown parameter 'truncat': known are dimensions, prompt, truncate"),
        ({"truncate": "no"}, "'truncate' is 'no': it is true"),
        ({"dimensions": 9}, "'dimensions' is 9: it is a number from 1 to 8"),
        ({"dimensions": True}, "'dimensions' is True"),
        ({"dimensions": 0}, "'dimensions' is 0"),
        ({"prompt": 5}, "'prompt' is 5"),
        ({"prompt": "x" * 1001}, "'prompt' has 1001 characters: it may have 1000"),
        ({"x" * 500: 1}, "unknown parameter 'xxx"),
    ],
)
def test_wrong_parameters_are_refused_by_name(start, make_bundle, parameters, message):
    model = start(make_bundle(), ServingOptions(engine="fake"))
    bad, good = serve(model, FakeRequest(b"one", **parameters), FakeRequest(b"one"))
    assert bad.error.code == FakeTritonError.INVALID_ARG
    assert message in str(bad.error)
    assert len(str(bad.error)) < 200
    assert good.error is None


def test_what_is_little_goes_back_with_its_call(start, make_bundle):
    bundle = make_bundle()
    model = start(bundle, ServingOptions(engine="fake", streams=1))
    requests = [FakeRequest(b"one"), FakeRequest(b"\xff"), FakeRequest(b"two", b"three")]
    one, bad, more = model.execute(requests)
    assert not any(request.answered.is_set() for request in requests)
    assert bad.error.code == FakeTritonError.INVALID_ARG
    with Encoder.load(bundle, engine="fake") as encoder:
        expected = encoder.encode(["one", "two", "three"])
    served = np.concatenate([response.output_tensors[0].array for response in (one, more)])
    np.testing.assert_array_equal(served, expected)
    assert model._gate.in_flight == 0
    assert model._desk.counts["admitted"] == 3


@pytest.mark.parametrize("at_once", [512, 0], ids=["with its call", "by a worker"])
def test_an_answer_that_cannot_be_written_fails_alone(start, pb_utils, make_bundle, monkeypatch, at_once):
    def full(name, array):
        if len(array) == 2:
            raise RuntimeError("/dev/shm/triton_python_backend_shm_region_1 is full")
        return FakeTensor(name, array)

    pb_utils.Tensor = full
    monkeypatch.setattr(queueing, "AT_ONCE_TOKENS", at_once)
    model = start(make_bundle(), ServingOptions(engine="fake"))
    one, two = serve(model, FakeRequest(b"a"), FakeRequest(b"b", b"c"))
    assert one.error is None
    assert str(two.error) == "the answer could not be written; the server's log says why"
    assert "is full" in FakeLogger.lines[-1]


def test_what_is_more_waits_for_the_workers_and_so_does_what_comes_beside_it(start, make_bundle, monkeypatch):
    model = start(make_bundle(), ServingOptions(engine="fake", streams=1))
    brake = Brake(model, monkeypatch)
    monkeypatch.setattr(queueing, "AT_ONCE_TOKENS", 60)
    much, little = FakeRequest(b"word " * 48), FakeRequest(b"word")  # 62 and 3 tokens, as guessed
    assert model.execute([much]) == [None]
    assert model.execute([little]) == [None]
    brake.go.set()
    assert much.answered.wait(10)
    assert little.answered.wait(10)
    while model._gate.in_flight:
        time.sleep(0.001)
    assert model.execute([FakeRequest(b"word")])[0].error is None


def test_a_request_that_takes_too_long_to_read_is_refused(start, make_bundle):
    model = start(make_bundle(), ServingOptions(engine="fake"))
    (response,) = serve(model, FakeRequest(b"x" * 4_000_000, b"x" * 4_000_001))
    assert response.error.code == FakeTritonError.INVALID_ARG
    assert "has 8000001 bytes of text: send at most 8000000" in str(response.error)


def test_what_does_not_fit_is_refused_at_once_and_room_comes_back(start, make_bundle, monkeypatch):
    model = start(make_bundle(), ServingOptions(engine="fake", max_tokens_in_flight=100))
    brake = Brake(model, monkeypatch)
    taken = [FakeRequest(b"word " * 40), FakeRequest(b"word " * 20)]  # 53 and 27 tokens, as guessed
    assert model.execute(taken) == [None, None]
    refused = FakeRequest(b"word " * 20)
    began = time.monotonic()
    (response,) = model.execute([refused])
    assert time.monotonic() - began < 0.1
    assert response.error.code == FakeTritonError.UNAVAILABLE
    assert "80 tokens are in flight and 27 more would exceed 100; retry after" in str(response.error)
    brake.go.set()
    assert all(request.answered.wait(10) for request in taken)
    assert serve(model, FakeRequest(b"word " * 20))[0].error is None


def test_a_request_larger_than_the_limit_is_served_when_nothing_else_is(start, make_bundle):
    model = start(make_bundle(), ServingOptions(engine="fake", max_tokens_in_flight=1))
    assert serve(model, FakeRequest(*[b"word"] * 50))[0].error is None


def test_what_came_too_late_or_is_not_wanted_any_more_is_not_computed(start, make_bundle, monkeypatch):
    model = start(make_bundle(), ServingOptions(engine="fake", streams=1))
    brake = Brake(model, monkeypatch)
    busy = [FakeRequest(b"busy"), FakeRequest(b"busy")]
    for request in busy:  # one after the other: each keeps one of the two workers
        model.execute([request])
        time.sleep(0.02)
    late, gone, wanted = FakeRequest(b"late", timeout_us=20_000), FakeRequest(b"gone"), FakeRequest(b"wanted")
    model.execute([late, gone, wanted])
    gone.gone = True
    time.sleep(0.1)
    brake.go.set()
    assert all(request.answered.wait(10) for request in (*busy, late, gone, wanted))
    assert late.response.error.code == FakeTritonError.UNAVAILABLE
    assert "timeout of 20000 µs was over" in str(late.response.error)
    assert gone.response.error.code == FakeTritonError.CANCELLED
    assert wanted.response.error is None
    assert brake.ran == 3
    assert model._gate.in_flight == 0


def test_unloading_answers_what_was_taken(pb_utils, start, make_bundle, monkeypatch):
    model = start(make_bundle(), ServingOptions(engine="fake"))
    brake = Brake(model, monkeypatch)
    requests = [FakeRequest(b"word") for _ in range(20)]
    assert model.execute(requests) == [None] * 20
    threading.Timer(0.05, brake.go.set).start()
    model._desk.close()
    assert all(request.response.error is None for request in requests)


def test_a_failing_engine_fails_every_waiter_and_tells_the_log_alone(start, make_bundle, monkeypatch):
    bundle = make_bundle()
    model = start(bundle, ServingOptions(engine="fake"))

    def broken(_: object) -> None:
        raise EngineError(f"{bundle}/onnx/model_packed.onnx broke")

    monkeypatch.setattr(model.encoder.engine, "run", broken)
    responses = serve(model, FakeRequest(b"one"), FakeRequest(b"two"))
    assert [a.error.code for a in responses] == [FakeTritonError.INTERNAL] * 2
    assert [str(a.error) for a in responses] == ["encoding failed; the server's log says why"] * 2
    assert "model_packed.onnx broke" in FakeLogger.lines[-1]
    assert "Traceback" in FakeLogger.lines[-1]


def test_metrics_say_what_became_of_requests(pb_utils, make_bundle, monkeypatch):
    sys.modules.pop("mirror_runtime.triton.model.embed_model", None)
    model = importlib.import_module("mirror_runtime.triton.model.embed_model").TritonPythonModel()
    model.initialize(arguments(make_bundle(), ServingOptions(engine="fake", max_tokens_in_flight=60)))
    brake = Brake(model, monkeypatch)
    taken = FakeRequest(b"word " * 40)
    assert [r is None for r in model.execute([taken, FakeRequest(b"word " * 40)])] == [True, False]
    brake.go.set()
    assert taken.answered.wait(10)
    model.finalize()
    values = {m.labels["outcome"]: m.value for m in FakeFamily.made["mirror_requests_total"]}
    assert values == {"admitted": 1, "refused": 1, "expired": 0, "cancelled": 0, "failed": 0}
    assert FakeFamily.made["mirror_tokens_total"][0].value == 42
    assert FakeFamily.made["mirror_batches_total"][0].value == 1
    assert FakeFamily.made["mirror_row_fill"][0].value == pytest.approx(42 / 48)
    assert FakeFamily.made["mirror_tokens_in_flight"][0].value == 0
    assert FakeFamily.made["mirror_tokens_total"][0].labels["model"] == "embed"


def test_a_bundle_that_cannot_be_loaded_ends_in_one_message(start, make_bundle):
    with pytest.raises(RuntimeError, match="the bundle has no packed artifact for engine onnxruntime"):
        start(make_bundle(), ServingOptions(engine="onnxruntime"))


def test_a_bundle_of_another_vector_space_than_the_repository_promises_is_refused(pb_utils, make_bundle):
    bundle = make_bundle()
    given = arguments(bundle, ServingOptions(engine="fake"))
    text = (bundle / "manifest.json").read_text().replace("0123456789abcdef", "fedcba9876543210")
    (bundle / "manifest.json").write_text(text)
    model = importlib.import_module("mirror_runtime.triton.model.embed_model").TritonPythonModel()
    with pytest.raises(RuntimeError, match="promises vectors of 0123456789abcdef and the bundle gives fedcba98"):
        model.initialize(given)
