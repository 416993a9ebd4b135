"""A yardstick is of the engine and precision beside which it stands, and as large as what it stands beside."""

import dataclasses

import pytest

from benchmarks import yardstick
from benchmarks.ceilings import EncoderShape
from benchmarks.session import Results
from benchmarks.yardstick import BATCHES, SINGLES, beside_batches, beside_one_text
from mirror_runtime.bundle import EngineName, Precision
from mirror_runtime.errors import EngineError
from mirror_runtime.host import usable_cores
from mirror_runtime.packing import TOKEN_BUDGET

SHAPE = EncoderShape(layers=1, hidden=128, intermediate=256)


@pytest.fixture
def point(report):
    return dataclasses.replace(report.latency[0].point, engine=EngineName.OPENVINO, precision=Precision.FP32)


def with_ceiling(point, report) -> Results:
    return Results(ceilings={(point.engine, point.precision): report.ceilings[0]})


@pytest.mark.parametrize("engine", [EngineName.OPENVINO, EngineName.ONNXRUNTIME])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_it_takes_longer_for_more(point, report, engine, precision):
    point = dataclasses.replace(point, engine=engine, precision=precision)
    results = with_ceiling(point, report)
    short, long = (beside_one_text(point, SHAPE, tokens, results) for tokens in (16, 512))
    batches = beside_batches(point, SHAPE, results)
    assert not results.failures
    assert short is not None
    assert long is not None
    assert batches is not None
    assert 0 < short() < long()
    assert batches() > short()


@pytest.mark.parametrize("one_text", [True, False])
def test_it_has_the_rows_and_streams_of_what_it_stands_beside(point, report, monkeypatch, one_text):
    made, calls = [], []

    def repeated(engine, precision, matrices, *, streams, turns):
        made.append((engine, precision, matrices.x.shape, matrices.there.shape, streams, turns))
        return lambda: calls.append(1), turns * streams

    monkeypatch.setattr(yardstick, "repeated", repeated)
    results = with_ceiling(point, report)
    measure = beside_one_text(point, SHAPE, 48, results) if one_text else beside_batches(point, SHAPE, results)
    assert measure is not None
    rows, streams = (48, 1) if one_text else (TOKEN_BUDGET, usable_cores())
    assert made == [(point.engine, point.precision, (rows, 128), (128, 256), streams, 1)]
    calls.clear()  # those that warm it up
    assert measure() >= 0
    assert len(calls) == (SINGLES if one_text else BATCHES)


def test_what_has_no_ceiling_has_no_yardstick(point, report):
    results = with_ceiling(point, report)
    other = dataclasses.replace(point, precision=Precision.INT8)
    assert beside_batches(point, None, results) is None
    assert beside_one_text(point, None, 16, results) is None
    assert beside_batches(other, SHAPE, results) is None
    assert beside_one_text(other, SHAPE, 16, results) is None
    assert not results.failures  # the ceiling's own failure says why


def test_products_that_cannot_be_compiled_are_a_failure(point, report, monkeypatch):
    def repeated(*_, **__):
        raise EngineError("openvino cannot compile the products")

    monkeypatch.setattr(yardstick, "repeated", repeated)
    results = with_ceiling(point, report)
    assert beside_one_text(point, SHAPE, 16, results) is None
    (failure,) = results.failures
    assert (failure.suite, failure.reason) == ("latency", "openvino cannot compile the products")
