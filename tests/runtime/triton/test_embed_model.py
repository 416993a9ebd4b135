"""The model that Triton runs, with a stand-in for the module that only Triton's stub process has."""

import importlib
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from export.pair import main as pair
from mirror_runtime import EngineError, InputError, bulk_room
from mirror_runtime.bundle import read_manifest
from mirror_runtime.tokenizer import LongTexts
from mirror_runtime.triton.model import batching, scheduler
from mirror_runtime.triton.model.draining import DRAIN_VARIABLE, drained_file
from mirror_runtime.triton.model.log import TritonHandler
from mirror_runtime.triton.model.request_options import check_trained
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.repository.render import render_config
from mirror_runtime.twins import Speed
from tests.support.fake_bundles import FINGERPRINT, TWIN, EngineGate, change_bundle
from tests.support.fake_triton import (
    FakeFamily,
    FakeLogger,
    FakeRequest,
    FakeTensor,
    FakeTritonError,
    NewFakeResponse,
    fake_backend_utils,
)
from tests.support.mirror_serve import wait_until

SPEEDS = (None, "fast", "full")


@pytest.fixture
def pb_utils(monkeypatch):
    module = fake_backend_utils()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    yield module
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    sys.modules.pop("mirror_runtime.triton.model.embed_model", None)
    logging.getLogger("mirror_runtime").handlers = []
    logging.getLogger("mirror_runtime.encoder").setLevel(logging.NOTSET)


@pytest.fixture
def start(pb_utils, make_bundle):
    """Start the model on a bundle for the fake engine."""
    models: list[Any] = []

    def starting(bundle: Path | None = None, **options: Any) -> Any:
        model = new_model()
        model.initialize(arguments(bundle or make_bundle(), ServingOptions(**{"engine": "fake", **options})))
        models.append(model)
        return model

    yield starting
    for model in models:
        model.finalize()


def new_model() -> Any:
    """Create the model from a fresh import, which binds the present `pb_utils`."""
    sys.modules.pop("mirror_runtime.triton.model.embed_model", None)
    return importlib.import_module("mirror_runtime.triton.model.embed_model").TritonPythonModel()


def arguments(bundle: Path, options: ServingOptions) -> dict[str, str]:
    """Return what Triton passes to `initialize` for a bundle in the version folder."""
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
    """Return each request's response, from the call itself or from a worker."""
    returned = model.execute(requests)
    for request, response in zip(requests, returned, strict=True):
        if response is None:
            assert request.answered.wait(10), "an accepted request got no reply"
        else:
            assert not request.answered.is_set(), "two replies"
            request.response = response
    return [request.response for request in requests]


def closed_gate(model: Any, monkeypatch: pytest.MonkeyPatch) -> EngineGate:
    """Hold the engine. Every request goes to the workers, because none is small enough."""
    monkeypatch.setattr(scheduler, "INLINE_TOKENS", 0)
    gate = EngineGate(model.encoder.engine)
    gate.close()
    return gate


def test_small_batches_are_answered_within_the_call(start):
    model = start(streams=2, long_texts=LongTexts.CHUNK)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert model.encoder.engine.streams == 2
    requests = [FakeRequest(b"one"), FakeRequest(b"\xff"), FakeRequest(b"two", b"three")]
    one, bad, two = model.execute(requests)
    assert not any(request.answered.is_set() for request in requests)
    assert (bad.error.code, bad.output_tensors) == (FakeTritonError.INVALID_ARG, [])
    assert [t.name for t in one.output_tensors] == ["EMBEDDING", "TOKENS", "TRUNCATED"]
    expected = model.encoder.encode(["one", "two", "three"])
    served = np.concatenate([response.output_tensors[0].array for response in (one, two)])
    np.testing.assert_array_equal(served, expected)
    assert model._schedulers[Speed.FULL].budget.in_flight == 0
    assert model._schedulers[Speed.FULL].counts["admitted"] == 3


@pytest.mark.parametrize("options", [{}, {"precision": "fp32", "streams": 1, "row_tokens": 64, "batch_tokens": 1024}])
def test_a_twin_answers_what_asks_for_it_under_its_own_name_and_within_its_own_limits(
    start, make_bundle, monkeypatch, options
):
    bundle, outputs = make_bundle(), ("EMBEDDING", "TOKENS", "TRUNCATED", "FINGERPRINT")
    assert pair([str(bundle), str(change_bundle(make_bundle(name="twin"), twin_of=FINGERPRINT))]) == 0
    model = start(bundle, **options)
    twin = model.encoder.at("fast")
    run = twin.engine.run
    monkeypatch.setattr(twin.engine, "run", lambda rows: -run(rows))
    requests = [FakeRequest(b"one", outputs=outputs, **({} if speed is None else {"speed": speed})) for speed in SPEEDS]
    for speed, response in zip(SPEEDS, serve(model, *requests), strict=True):
        space, sign = (TWIN, -1) if speed == "fast" else (FINGERPRINT, 1)
        assert response.output_tensors[3].array.tolist() == [[space.encode()]]
        np.testing.assert_array_equal(response.output_tensors[0].array, sign * model.encoder.encode(["one"]))
    gate = closed_gate(model, monkeypatch)
    waiting = FakeRequest(b"busy")
    assert model.execute([waiting]) == [None]
    (quick,) = serve(model, FakeRequest(b"one", speed="fast"))
    assert quick.error is None
    assert not waiting.answered.is_set()
    draining = threading.Thread(target=model._drain)
    draining.start()
    gate.open()
    draining.join(10)
    assert waiting.answered.is_set()
    late = [FakeRequest(b"late", speed=speed) for speed in ("full", "fast")]
    assert {one.error.code for one in serve(model, *late)} == {FakeTritonError.UNAVAILABLE}


@pytest.mark.parametrize("options", [{}, {"precision": "fp32", "streams": 1, "row_tokens": 64, "batch_tokens": 1024}])
def test_an_invariant_model_packs_one_text_a_row(start, options):
    assert start(**options, invariant=True).encoder.rows.startswith("one text")


def test_newer_servers_get_the_fingerprint_as_a_parameter_too_and_too_much_text_is_rejected(start, pb_utils):
    pb_utils.InferenceResponse = NewFakeResponse
    model = start()
    (response,) = serve(model, FakeRequest(b"one", b"two", outputs=["EMBEDDING", "FINGERPRINT"]))
    output = response.output_tensors[-1]
    assert (output.name, output.array.tolist()) == ("FINGERPRINT", [[b"0123456789abcdef"]] * 2)
    assert response.parameters == {"fingerprint": "0123456789abcdef"}
    (response,) = serve(model, FakeRequest(b"x" * 4_000_000, b"x" * 4_000_001))
    assert response.error.code == FakeTritonError.INVALID_ARG
    assert "has 8000001 bytes of text: send at most 8000000" in str(response.error)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"speed": "fast"}, "parameter 'speed' is 'fast': no static twin runs here"),
        ({"speed": ["slow"]}, "parameter 'speed' is ['slow']: it must be full or fast"),
        ({"truncat": True}, r"unknown parameter 'truncat': known are dimensions, prompt, query, speed, truncate"),
        ({"truncate": "no"}, "'truncate' is 'no': it must be true"),
        ({"dimensions": 9}, "'dimensions' is 9: this encoder's vectors may have 8; name those that it was trained for"),
        ({"dimensions": 4}, "'dimensions' is 4: this encoder's vectors may have 8; name those that it was trained for"),
        ({"prompt": "x" * 1001}, "'prompt' has 1001 characters: it may have 1000"),
        ({"x" * 500: 1}, "unknown parameter 'xxx"),
    ],
)
def test_invalid_parameters_are_rejected_by_name(start, parameters, message):
    model = start()
    bad, good = serve(model, FakeRequest(b"one", **parameters), FakeRequest(b"one"))
    assert bad.error.code == FakeTritonError.INVALID_ARG
    assert message in str(bad.error)
    assert len(str(bad.error)) < 200
    assert good.error is None


@pytest.mark.parametrize("inline", [512, 0], ids=["within the call", "by a worker"])
def test_a_reply_that_cannot_be_written_fails_alone(start, pb_utils, monkeypatch, inline):
    def full(name, array):
        if len(array) == 2:
            raise RuntimeError("/dev/shm/triton_python_backend_shm_region_1 is full")
        return FakeTensor(name, array)

    pb_utils.Tensor = full
    monkeypatch.setattr(scheduler, "INLINE_TOKENS", inline)
    model = start()
    one, two = serve(model, FakeRequest(b"a"), FakeRequest(b"b", b"c"))
    assert one.error is None
    assert str(two.error) == "the reply could not be written; the server's log says why"
    assert "is full" in FakeLogger.lines[-1]


def test_larger_batches_and_those_that_arrive_meanwhile_go_to_the_workers(start, monkeypatch):
    model = start(streams=1)
    gate = closed_gate(model, monkeypatch)
    monkeypatch.setattr(scheduler, "INLINE_TOKENS", 60)
    large, small = FakeRequest(b"word " * 48), FakeRequest(b"word")  # an estimated 62 and 3 tokens
    assert model.execute([large]) == [None]
    assert model.execute([small]) == [None]
    gate.open()
    assert large.answered.wait(10)
    assert small.answered.wait(10)
    while model._schedulers[Speed.FULL].budget.in_flight:
        time.sleep(0.001)
    assert model.execute([FakeRequest(b"word")])[0].error is None


def test_expired_and_cancelled_requests_are_not_computed(start, monkeypatch):
    model = start(streams=1)
    gate = closed_gate(model, monkeypatch)
    busy = [FakeRequest(b"busy"), FakeRequest(b"busy")]
    for request in busy:  # one after the other, so that each occupies one of the two workers
        model.execute([request])
        time.sleep(0.02)
    late, cancelled, live = FakeRequest(b"late", timeout_us=20_000), FakeRequest(b"cancelled"), FakeRequest(b"live")
    model.execute([late, cancelled, live])
    cancelled.cancelled = True
    time.sleep(0.1)
    gate.open()
    assert all(request.answered.wait(10) for request in (*busy, late, cancelled, live))
    assert late.response.error.code == FakeTritonError.UNAVAILABLE
    assert "timeout of 20000 µs was over" in str(late.response.error)
    assert cancelled.response.error.code == FakeTritonError.CANCELLED
    assert live.response.error is None
    assert gate.runs == 3
    assert model._schedulers[Speed.FULL].budget.in_flight == 0


def words(requests: int, each: int = 200) -> FakeRequest:
    """Build a request of different texts of an estimated 62 tokens; 200 of them are a dozen slices."""
    return FakeRequest(*(f"{requests} {i} {'word ' * 48}".encode() for i in range(each)))


def test_small_requests_overtake_large_ones_and_a_large_one_is_answered_whole(start, monkeypatch):
    monkeypatch.setattr(scheduler, "INLINE_TOKENS", 0)
    model = start(streams=1)
    order: list[str] = []
    run = model.encoder.engine.run

    def slow(rows):
        time.sleep(0.01)
        return run(rows)

    monkeypatch.setattr(model.encoder.engine, "run", slow)
    large = [words(number) for number in range(2)]
    bad = FakeRequest(*([b"good " * 40] * 60), b"bad \xff", *([b"good " * 40] * 60))
    small = [FakeRequest(b"small %d" % i) for i in range(8)]
    for name, requests in (("large", [*large, bad]), ("small", small)):
        for request in requests:
            monkeypatch.setattr(
                request, "send", lambda *a, send=request.send, name=name, **k: (order.append(name), send(*a, **k))
            )
            assert model.execute([request]) == [None]
    assert all(request.answered.wait(20) for request in [*large, bad, *small])
    assert order[:8] == ["small"] * 8
    for number, request in enumerate(large):
        texts = [raw.decode() for raw in words(number).tensors[0].array[:, 0]]
        np.testing.assert_array_equal(request.response.output_tensors[0].array, model.encoder.encode(texts))
        assert request.response.output_tensors[1].array.shape == (200, 1)
    assert "text 60: not valid UTF-8" in str(bad.response.error)
    assert model._schedulers[Speed.FULL].budget.in_flight == 0


def test_large_requests_leave_small_ones_their_budget_and_are_not_shut_out_by_them(start, monkeypatch):
    model = start(streams=1, max_tokens_in_flight=3000)
    gate = closed_gate(model, monkeypatch)
    large, refused, small = words(1), words(2), FakeRequest(b"small")
    assert model.execute([large]) == [None]
    assert model.execute([refused])[0].error.code == FakeTritonError.UNAVAILABLE
    assert model.execute([small]) == [None], "a small one is accepted"
    run = model.encoder.engine.run
    monkeypatch.setattr(model.encoder.engine, "run", lambda rows: (time.sleep(0.01), run(rows))[1])
    gate.open()
    assert small.answered.wait(10)
    ends = time.monotonic() + 10
    while not large.answered.wait(0.001) and time.monotonic() < ends:
        model.execute([FakeRequest(b"small")])  # so often that one always waits
    assert large.response.error is None


@pytest.mark.parametrize(("before", "most"), [(b"ready?", 1024), (b"a small one", 256)])
def test_large_requests_run_in_full_batches_unless_small_ones_come(start, monkeypatch, before, most):
    """A health check comes every second, and is not a small caller."""
    monkeypatch.setattr(bulk_room, "BULK_S", 0.0)
    model = start(streams=1)
    sizes: list[int] = []

    def recording(encoder, requests, long_texts):
        sizes.append(sum(request.estimated_tokens(1000) for request in requests))
        return batching.embed(encoder, requests, long_texts)

    monkeypatch.setattr(scheduler, "embed", recording)
    serve(model, FakeRequest(before))
    sizes.clear()
    serve(model, words(1))
    assert most // 2 < max(sizes) <= most


def test_vectors_are_cut_only_to_dimensions_that_the_encoder_was_trained_for(start):
    model = start(dimensions=(4,))
    cut, whole, refused = serve(model, *(FakeRequest(b"one", dimensions=n) for n in (4, 8, 5)))
    assert [r.output_tensors[0].array.shape for r in (cut, whole)] == [(1, 4), (1, 8)]
    assert "this encoder's vectors may have 4, 8" in str(refused.error)
    with pytest.raises(InputError, match="--dimensions 8: this encoder's vectors have 8; choose fewer"):
        check_trained((4, 8), model.encoder.spec)


def test_a_repeated_failure_is_logged_once_a_minute_with_its_count(pb_utils, monkeypatch):
    clock = [0.0]
    package = logging.getLogger("mirror_runtime")
    monkeypatch.setattr(package, "handlers", [TritonHandler(pb_utils, lambda: clock[0])])
    log = package.getChild("some.module")
    for second in (0, 1, 2, 61):
        clock[0] = second
        log.error("a batch of %d failed", second)
        log.warning("another") if second == 1 else None
    assert FakeLogger.lines == [
        "embed: a batch of 0 failed",
        "embed: another",
        "embed: 2 more of mirror_runtime.some.module: a batch of %d failed",
        "embed: a batch of 61 failed",
    ]


def test_a_model_that_drains_answers_what_it_accepted_rejects_the_rest_and_says_when_it_is_done(
    start, monkeypatch, tmp_path
):
    monkeypatch.setenv(DRAIN_VARIABLE, str(tmp_path / "drain"))
    model = start()
    gate = closed_gate(model, monkeypatch)
    accepted = FakeRequest(b"accepted")
    assert model.execute([accepted]) == [None]
    (tmp_path / "drain").touch()
    wait_until(lambda: model.execute([FakeRequest(b"late")])[0] is not None)
    monkeypatch.setattr(scheduler, "INLINE_TOKENS", 512)  # a call that could compute it at once rejects it as well
    (late,) = model.execute([FakeRequest(b"late")])
    assert (late.error.code, str(late.error)) == (FakeTritonError.UNAVAILABLE, "the server is stopping: try again")
    done = drained_file(tmp_path / "drain", os.getpid())
    assert not done.exists()
    gate.open()
    wait_until(done.exists)
    assert accepted.response.error is None


def test_a_model_has_not_drained_while_its_last_reply_is_unsent(start, monkeypatch):
    model = start()
    gate = closed_gate(model, monkeypatch)
    request, sending, may_send = FakeRequest(b"accepted"), threading.Event(), threading.Event()
    write = model._response

    def slow(*result: Any, **names: Any) -> Any:
        sending.set()
        assert may_send.wait(10)
        return write(*result, **names)

    monkeypatch.setattr(model, "_response", slow)
    assert model.execute([request]) == [None]
    gate.open()
    assert sending.wait(10)
    assert model._schedulers[Speed.FULL].budget.in_flight == 0
    draining = threading.Thread(target=model._schedulers[Speed.FULL].drain)
    draining.start()
    draining.join(0.1)
    assert draining.is_alive()
    may_send.set()
    draining.join(10)
    assert request.answered.is_set()


def test_unloading_answers_the_accepted_requests(start, monkeypatch):
    model = start()
    gate = closed_gate(model, monkeypatch)
    requests = [FakeRequest(b"word") for _ in range(20)]
    assert model.execute(requests) == [None] * 20
    threading.Timer(0.05, gate.open).start()
    model._schedulers[Speed.FULL].close()
    assert all(request.response.error is None for request in requests)


def test_an_engine_failure_fails_every_request_and_is_quoted_only_in_the_log(start, monkeypatch):
    model = start()
    broken = EngineError("/a/path/onnx/model_packed.onnx broke")
    monkeypatch.setattr(model.encoder.engine, "run", Mock(side_effect=broken))
    responses = serve(model, FakeRequest(b"one"), FakeRequest(b"two"))
    assert [a.error.code for a in responses] == [FakeTritonError.INTERNAL] * 2
    assert [str(a.error) for a in responses] == ["encoding failed; the server's log says why"] * 2
    assert "model_packed.onnx broke" in FakeLogger.lines[-1]
    assert "Traceback" in FakeLogger.lines[-1]


def test_metrics_count_requests_by_outcome(pb_utils, make_bundle, monkeypatch):
    model = new_model()
    model.initialize(arguments(make_bundle(), ServingOptions(engine="fake", max_tokens_in_flight=60)))
    gate = closed_gate(model, monkeypatch)
    accepted = FakeRequest(b"word " * 40)
    assert [r is None for r in model.execute([accepted, FakeRequest(b"word " * 40)])] == [True, False]
    gate.open()
    assert accepted.answered.wait(10)
    model.finalize()
    outcomes = {m.labels["outcome"]: m.value for m in FakeFamily.made["mirror_requests_total"]}
    assert outcomes == {"admitted": 1, "refused": 1, "expired": 0, "cancelled": 0, "failed": 0}
    names = ("mirror_tokens_total", "mirror_batches_total", "mirror_tokens_in_flight", "mirror_row_fill")
    values = [FakeFamily.made[name][0].value for name in names]
    assert values == [42, 1, 0, pytest.approx(42 / 48)]
    assert FakeFamily.made["mirror_tokens_total"][0].labels["model"] == "embed"


def test_a_bundle_without_the_engine_or_of_another_vector_space_ends_in_one_message(pb_utils, make_bundle):
    bundle = make_bundle()
    with pytest.raises(RuntimeError, match="the bundle has no packed artifact for engine onnxruntime"):
        new_model().initialize(arguments(bundle, ServingOptions(engine="onnxruntime")))
    promised = arguments(bundle, ServingOptions(engine="fake"))
    text = (bundle / "manifest.json").read_text().replace("0123456789abcdef", "fedcba9876543210")
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(RuntimeError, match="promises vectors of 0123456789abcdef and the bundle has fedcba98"):
        new_model().initialize(promised)
