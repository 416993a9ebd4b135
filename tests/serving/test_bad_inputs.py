"""Invalid requests over HTTP and gRPC: the error for each, and that the server stays healthy.

Triton's own answers are recorded as they are, even if another status would be better (500 for malformed JSON, 200 for
an empty body): clients have to know them, and a new version that behaves differently shows here.
"""

import http.client
import json
import os
import random
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mirror_runtime import Encoder
from mirror_runtime.triton import Server

pytestmark = pytest.mark.serving

FUZZED = int(os.environ.get("MIRROR_FUZZED_REQUESTS", "100"))
"""Number of random requests; 10,000 take some minutes."""

LEAK = re.compile(r"Traceback|\.py\b|(?:^|[\s'\"(=])/(?:[\w.+-]+/)+")
"""A traceback or a path of the server's machine."""


def prefixed(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


@dataclass(frozen=True)
class Answer:
    status: str
    message: str


@dataclass(frozen=True)
class Http:
    """One HTTP request, and the expected status and message."""

    name: str
    status: int
    message: str
    body: bytes = b""
    path: str = "/v2/models/embed/infer"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grpc:
    """One gRPC request, and the expected status and message."""

    name: str
    status: str
    message: str
    texts: tuple[bytes, ...] = (b"a",)
    raw: tuple[bytes, ...] | None = None
    shape: tuple[int, ...] | None = None
    datatype: str = "BYTES"
    tensor: str = "TEXT"
    outputs: tuple[str, ...] = ()
    model: str = "embed"
    version: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    def message_of(self) -> Any:
        shape = self.shape or (len(self.texts), 1)
        request = service_pb2.ModelInferRequest(model_name=self.model, model_version=self.version)
        request.inputs.add(name=self.tensor, datatype=self.datatype, shape=shape)
        request.raw_input_contents.extend((prefixed(*self.texts),) if self.raw is None else self.raw)
        for name in self.outputs:
            request.outputs.add(name=name)
        for name, value in self.parameters.items():
            kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
            setattr(request.parameters[name], kind, value)
        return request


def body(*data: Any, shape: Any = None, datatype: str = "BYTES", name: str = "TEXT", **more: Any) -> bytes:
    tensor = {"name": name, "shape": shape or [len(data), 1], "datatype": datatype, "data": list(data)}
    return json.dumps({"inputs": [tensor], **more}).encode()


def binary(raw: bytes, size: int | None = None, length: str | None = None, shape: Any = (1, 1)) -> dict[str, Any]:
    size = len(raw) if size is None else size
    tensor = {"name": "TEXT", "shape": list(shape), "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return {"body": head + raw, "headers": {"Inference-Header-Content-Length": length or str(len(head))}}


LONG = "word " * 100

HTTP = [
    Http("malformed JSON", 500, "parse", b'{"inputs": ['),
    Http("not JSON", 500, "parse", b"hello"),
    Http("an array", 500, "", b"[1, 2]"),
    Http("no inputs", 500, "inputs", b"{}"),
    Http("empty inputs", 400, "expected 1 inputs", b'{"inputs": []}'),
    Http("inputs of the wrong type", 500, "", b'{"inputs": 5}'),
    Http("input without a name", 500, "name", b'{"inputs": [{"shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]}'),
    Http("a number for a text", 500, "", body(5)),
    Http("null for a text", 500, "", body(None)),
    Http("an object for a text", 500, "", body({"a": 1})),
    Http("unknown input", 400, "unexpected inference input 'WORDS'", body("a", name="WORDS")),
    Http("another type", 400, "expects 'BYTES'", body(1, datatype="INT32")),
    Http("unknown type", 400, "", body("a", datatype="TEXTS")),
    Http("no batch dimension", 400, "shape", body("a", shape=[1])),
    Http("three dimensions", 400, "shape", body("a", shape=[1, 1, 1])),
    Http("two columns", 400, "shape", body("a", "b", shape=[1, 2])),
    Http("over max_batch_size", 400, "batch-size must be <= 256", body(*["a"] * 257)),
    Http("batch of 0", 400, "", body(shape=[0, 1])),
    Http("negative shape", 500, "", body("a", shape=[-1, 1])),
    Http("fewer texts than the shape says", 400, "", body("a", shape=[2, 1])),
    Http("more texts than the shape says", 400, "", body("a", "b", shape=[1, 1])),
    Http("unknown output", 400, "unexpected inference output 'SUMMARY'", body("a", outputs=[{"name": "SUMMARY"}])),
    Http(
        "unknown parameter",
        400,
        "known are dimensions, prompt, query, speed, truncate",
        body("a", parameters={"normalise": True}),
    ),
    Http("truncate as a string", 400, "'truncate' is 'no'", body("a", parameters={"truncate": "no"})),
    Http("dimensions of 0", 400, "this encoder's vectors may have 16", body("a", parameters={"dimensions": 0})),
    Http("too many dimensions", 400, "'dimensions' is 17", body("a", parameters={"dimensions": 17})),
    Http("dimensions as a string", 400, "'dimensions' is '8'", body("a", parameters={"dimensions": "8"})),
    Http("half a dimension", 400, "'dimensions' is 1.5", body("a", parameters={"dimensions": 1.5})),
    Http("a number as prompt", 400, "'prompt' is 5", body("a", parameters={"prompt": 5})),
    Http("a book as prompt", 400, "may have 1000", body("a", parameters={"prompt": "x" * 1001})),
    Http("a list as parameter", 400, "", body("a", parameters={"prompt": ["a"]})),
    Http("a reserved parameter", 400, "triton_", body("a", parameters={"triton_x": 1})),
    Http("a long text, not to be cut", 400, "has 102 tokens", body(LONG, parameters={"truncate": False})),
    Http("invalid UTF-8", 400, "text 0: not valid UTF-8 (byte 0xff at offset 0)", **binary(prefixed(b"\xff"))),
    Http("an encoded surrogate", 400, "text 0: not valid UTF-8", **binary(prefixed(b"\xed\xa0\x80"))),
    Http("binary size beyond the body", 400, "", **binary(prefixed(b"a"), size=500)),
    Http("binary size short of the body", 400, "", **binary(prefixed(b"abc"), size=2)),
    Http("text longer than its tensor", 400, "", **binary(struct.pack("<I", 1000) + b"a")),
    Http("half a length", 400, "", **binary(b"\x01\x00")),
    Http("JSON length beyond the body", 400, "", **binary(prefixed(b"a"), length="99999")),
    Http("JSON length below zero", 400, "", **binary(prefixed(b"a"), length="-5")),
    Http("unknown model", 404, "unknown model", body("a"), path="/v2/models/embedd/infer"),
    Http("unknown version", 404, "version", body("a"), path="/v2/models/embed/versions/7/infer"),
    Http("version that is not a number", 404, "", body("a"), path="/v2/models/embed/versions/new/infer"),
    Http("unknown path", 404, "", body("a"), path="/v2/models/embed/encode"),
    Http("GET", 405, "", b"", method="GET"),
]

GRPC = [
    Grpc("unknown input", "INVALID_ARGUMENT", "unexpected inference input 'WORDS'", tensor="WORDS"),
    Grpc("another type", "INVALID_ARGUMENT", "expects 'BYTES'", raw=(b"\0\0\0\0",), datatype="INT32"),
    Grpc("unknown type", "INVALID_ARGUMENT", "", datatype="TEXTS"),
    Grpc("no batch dimension", "INVALID_ARGUMENT", "shape", shape=(1,)),
    Grpc("two columns", "INVALID_ARGUMENT", "shape", texts=(b"a", b"b"), shape=(1, 2)),
    Grpc("over max_batch_size", "INVALID_ARGUMENT", "batch-size must be <= 256", texts=(b"a",) * 257),
    Grpc("negative shape", "INVALID_ARGUMENT", "", shape=(-1, 1)),
    Grpc("fewer texts than the shape says", "INVALID_ARGUMENT", "expected 2", shape=(2, 1)),
    Grpc("more texts than the shape says", "INVALID_ARGUMENT", "", texts=(b"a", b"b"), shape=(1, 1)),
    Grpc("no data", "INVALID_ARGUMENT", "", raw=()),
    Grpc("text longer than its tensor", "INVALID_ARGUMENT", "", raw=(struct.pack("<I", 1000) + b"a",)),
    Grpc("half a length", "INVALID_ARGUMENT", "", raw=(b"\x01\x00",)),
    Grpc("invalid UTF-8", "INVALID_ARGUMENT", "text 1: not valid UTF-8 (byte 0xff at", (b"a", b"bad \xff")),
    Grpc("unknown output", "INVALID_ARGUMENT", "unexpected inference output 'SUMMARY'", outputs=("SUMMARY",)),
    Grpc("unknown parameter", "INVALID_ARGUMENT", "known are dimensions, prompt", parameters={"normalise": True}),
    Grpc("truncate as a number", "INVALID_ARGUMENT", "'truncate' is 0: it must be true", parameters={"truncate": 0}),
    Grpc("negative dimensions", "INVALID_ARGUMENT", "'dimensions' is -1", parameters={"dimensions": -1}),
    Grpc("dimensions as a truth", "INVALID_ARGUMENT", "'dimensions' is True", parameters={"dimensions": True}),
    Grpc("a long text", "INVALID_ARGUMENT", "text 0: has 102", (LONG.encode(),), parameters={"truncate": False}),
    Grpc("unknown model", "NOT_FOUND", "unknown model", model="embedd"),
    Grpc("no model", "NOT_FOUND", "", model=""),
    Grpc("unknown version", "NOT_FOUND", "version", version="7"),
    Grpc("version that is not a number", "INVALID_ARGUMENT", "version", version="new"),
]


VALID: dict[str, Any] = {"name": "", "status": "OK", "message": ""}
OUTPUTS = ("EMBEDDING", "TOKENS", "TRUNCATED", "FINGERPRINT")


class Wire:
    """Sends anything to a server and returns its answer."""

    def __init__(self, server: Server) -> None:
        unlimited = [("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=unlimited)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._http = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)

    def http(self, path: str, content: bytes, headers: dict[str, str], method: str = "POST") -> Answer:
        """Send one HTTP request; a connection that the server closes after an error is opened again."""
        self._http.request(method, path, content, headers)
        response = self._http.getresponse()
        return Answer(str(response.status), response.read().decode("utf-8", errors="replace"))

    def grpc(self, message: Any) -> Answer:
        try:
            self._stub.ModelInfer(message, timeout=30)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())
        return Answer("OK", "")

    def close(self) -> None:
        self._channel.close()
        self._http.close()


@pytest.fixture(scope="module")
def wire(server: Server) -> Iterator[Wire]:
    wire = Wire(server)
    yield wire
    wire.close()


@pytest.fixture(scope="module")
def healthy(server: Server, fake_bundle: Path) -> Iterator[Callable[[], None]]:
    """A check that the server is alive and still returns the right vectors."""
    texts = ["still", "here?"]
    with Encoder.load(fake_bundle, engine="fake") as encoder:
        expected = encoder.encode(texts)
    with server.client() as client:

        def check() -> None:
            server.check()
            np.testing.assert_array_equal(client.encode(texts), expected)

        yield check


@pytest.mark.parametrize("bad", [*HTTP, *GRPC], ids=lambda bad: f"{type(bad).__name__}: {bad.name}")
def test_invalid_requests_get_a_clear_error(wire: Wire, healthy: Callable[[], None], bad: Http | Grpc) -> None:
    if isinstance(bad, Http):
        answer = wire.http(bad.path, bad.body, bad.headers, bad.method)
    else:
        answer = wire.grpc(bad.message_of())
    assert (answer.status, bad.message in answer.message) == (str(bad.status), True), answer
    assert not LEAK.search(answer.message)
    healthy()


def test_odd_but_valid_requests_are_answered(wire: Wire, healthy: Callable[[], None]) -> None:
    for text in ("", " ", "\0", "a\0b", "🏠" * 50, "x" * 100_000):
        assert wire.http("/v2/models/embed/infer", body(text), {}).status == "200", text[:10]
    assert wire.grpc(Grpc(**VALID, texts=(LONG.encode(),), parameters={"truncate": True}).message_of()).status == "OK"
    # Triton reads the whole body as the tensor if the JSON's length is not a number, and the first of two tensors.
    assert wire.http("/v2/models/embed/infer", *binary(prefixed(b"a"), length="many").values()).status == "200"
    assert wire.grpc(Grpc(**VALID, raw=(prefixed(b"a"), prefixed(b"b"))).message_of()).status == "OK"
    whole = {"truncate": True, "dimensions": 16, "prompt": ""}
    assert wire.http("/v2/models/embed/infer", body("a", parameters=whole), {}).status == "200"
    # An empty body is one empty text to Triton.
    assert wire.http("/v2/models/embed/infer", b"", {}).status == "200"
    healthy()


@pytest.mark.parametrize("size", [5_000_000, 9_000_000])
def test_a_large_body_is_answered_or_rejected(wire: Wire, healthy: Callable[[], None], size: int) -> None:
    text = "\x7f" * size  # a control character, which the tokenizer removes quickly
    rejection = "" if size < 8_000_000 else "has 9000000 bytes of text: send at most 8000000 in one"
    answer = wire.grpc(Grpc(**VALID, texts=(text.encode(),)).message_of())
    assert (answer.status, rejection in answer.message) == ("INVALID_ARGUMENT" if rejection else "OK", True)
    for content, headers in ((body(text), {}), (binary(prefixed(text.encode())).values())):
        answer = wire.http("/v2/models/embed/infer", content, headers)
        assert (answer.status, rejection in answer.message) == ("400" if rejection else "200", True)
    healthy()


class Fuzz:
    """Random requests, many of them nearly valid. The same seed gives the same requests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def grpc(self) -> Any:
        pick = self._random
        texts = tuple(self._bytes() for _ in range(pick.choice([0, 1, 1, 1, 1, 1, 2, 5])))
        return Grpc(
            **VALID,
            texts=texts,
            raw=pick.choice([None] * 8 + [(), (self._bytes(),), (self._bytes(), self._bytes())]),
            shape=pick.choice([None] * 8 + [(len(texts),), (1, 1), (pick.randint(-3, 300), pick.randint(-1, 2))]),
            datatype=pick.choice(["BYTES"] * 20 + ["INT32", "FP32", "", "bytes"]),
            tensor=pick.choice(["TEXT"] * 20 + ["", "text", "TEXT\0"]),
            outputs=tuple(pick.sample([*OUTPUTS, "X"], pick.choice([0, 0, 1, 4]))),
            model=pick.choice(["embed"] * 30 + ["", "embed/", "../embed"]),
            version=pick.choice([""] * 20 + ["1", "0", "-1", "x", "99999999999999999999"]),
            parameters={self._name(): self._value() for _ in range(pick.choice([0, 0, 0, 0, 1, 3]))},
        ).message_of()

    def http(self) -> tuple[str, bytes, dict[str, str]]:
        pick = self._random
        texts = [self._bytes().decode("utf-8", errors="replace") for _ in range(pick.choice([0, 1, 1, 1, 2]))]
        count = pick.choice([0, 0, 0, 1, 2])
        parameters = {self._name(): pick.choice([self._value(), None, [], {}]) for _ in range(count)}
        content = body(*texts, parameters=parameters)
        headers: dict[str, str] = {}
        if pick.random() < 0.3:
            size, length = pick.choice([None, None, 0, 7, 10_000]), pick.choice([None, None, "0", "9"])
            content, headers = binary(self._bytes(), size=size, length=length).values()
        if pick.random() < 0.3:
            spoilt = bytearray(content)
            for _ in range(pick.randint(1, 8)):
                spoilt[pick.randrange(len(spoilt))] = pick.randrange(256)
            content = bytes(spoilt)
        if pick.random() < 0.1:
            content = content[: pick.randrange(1, len(content))]
        path = pick.choice(["/v2/models/embed/infer"] * 8 + ["/v2/models/embed/versions/1/infer", "/v2/models//infer"])
        return path, content, headers

    def _bytes(self) -> bytes:
        pick = self._random
        size = pick.choice([0, 1, 3, 20, 200, 3000])
        return pick.choice([pick.randbytes(size), b"word " * (size // 5), "ü🏠\0".encode() * (size // 7)])

    def _name(self) -> str:
        words = ["truncate", "dimensions", "prompt", "timeout", "priority", "sequence_id", "triton_a"]
        return self._random.choice([*words, "", "é\0", "x" * 300])

    def _value(self) -> Any:
        return self._random.choice([True, False, 0, 1, 8, -1, 2**62, 0.5, "", "a", "\0", "x" * 2000])


def test_random_requests_are_all_answered(wire: Wire, healthy: Callable[[], None]) -> None:
    fuzz = Fuzz(seed=6)
    statuses: Counter[str] = Counter()
    for number in range(FUZZED):
        answer = wire.grpc(fuzz.grpc()) if number % 2 else wire.http(*fuzz.http())
        assert answer.status not in ("DEADLINE_EXCEEDED", "CANCELLED"), f"request {number} was not answered: {answer}"
        if answer.status not in ("OK", "200"):
            assert not LEAK.search(answer.message), (number, answer)
        statuses[answer.status] += 1
        if number % 100 == 99:
            healthy()
    healthy()
    assert min(statuses[status] for status in ("OK", "200", "400", "INVALID_ARGUMENT")) > FUZZED // 50, statuses
