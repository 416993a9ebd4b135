"""Too much work: what counts as what, and when a server has recovered. The servers here are fakes that sleep."""

import asyncio
import inspect
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import overload_sender
from benchmarks.load import arrivals, requests_of
from benchmarks.overload import carry_in_process, run_overload
from benchmarks.overload_sender import Order, Sent, send
from mirror_runtime.cli.serve import serve
from mirror_runtime.errors import OverloadedError, ServerError
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.server.processes import resident_bytes

ORDER = Order(url="", requests=(("a", "b"), ("c", "d")), callers=4, calm_s=0.2, seconds=0.6, seed=0)


class Backend:
    """Answers requests in turn, `seconds` each, and refuses what would be more than `room`."""

    def __init__(self, seconds=0.01, room=8, grudge=0.0):
        self.seconds, self.room, self.grudge = seconds, room, grudge
        self.waiting = self.refused = self.answered = self.most = 0
        self.first_refusal = 0.0
        self._free_at = 0.0

    async def encode(self, texts, batch_size):
        assert batch_size == len(texts) == 2
        now = time.perf_counter()
        if self.waiting >= self.room:
            self.refused += 1
            self.first_refusal = self.first_refusal or now
            raise OverloadedError("full", 0.01)
        slow = self.first_refusal and now < self.first_refusal + self.grudge
        self._free_at = max(now, self._free_at) + self.seconds * (3 if slow else 1)
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await asyncio.sleep(self._free_at - now)
        self.waiting -= 1
        self.answered += 1


def test_what_the_server_can_do_is_answered_and_the_rest_is_refused_at_once():
    backend = Backend()
    sent = asyncio.run(send(ORDER, backend))
    assert 100 < sent.maximum_texts_per_s <= 210  # two texts every 10 ms
    assert sent.offered == round(2 * sent.maximum_texts_per_s / 2 * 0.6)
    assert len(sent.accepted_ms) + len(sent.refused_ms) == sent.offered
    assert len(sent.lag_ms) == sent.offered
    assert sent.errors == 0
    # The room is taken up, and then every second request is one too many.
    assert 0.15 < len(sent.refused_ms) / sent.offered < 0.6
    assert np.median(sent.refused_ms) < 10 < np.median(sent.accepted_ms)
    assert 0.6 <= sent.wall_s < 1.0
    assert 10 <= np.median(sent.calm_ms) < 20
    assert sent.recovery_s is not None
    assert sent.recovery_s < 0.5


def test_time_counts_from_the_moment_a_request_was_due():
    # The whole process stalls for 0.3 s while requests are sent: those due meanwhile are late, and say so. From then
    # on the server is so fast that nothing else can make a request slow.
    class Stalling(Backend):
        async def encode(self, texts, batch_size):
            if self.waiting == ORDER.callers and self.seconds > 0:  # more than the closed loop ever had
                self.seconds = 0.0
                time.sleep(0.3)
            await super().encode(texts, batch_size)

    sent = asyncio.run(send(ORDER, Stalling(room=1000)))
    late = len([lag for lag in sent.lag_ms if lag > 100])
    assert late > ORDER.callers + 5  # those due in the stall, not only those under way in it
    assert len([sample for sample in sent.accepted_ms if sample > 100]) >= late


def test_nothing_is_refused_without_a_bound_and_the_wait_grows():
    sent = asyncio.run(send(ORDER, Backend(room=10**6)))
    assert not sent.refused_ms
    assert len(sent.accepted_ms) == sent.offered
    assert max(sent.accepted_ms) > 400  # the last one waits behind half of them all
    assert sent.wall_s > 1.0  # goodput is over the time that all took


def test_a_server_that_stays_slow_has_recovered_only_when_it_is_fast_again():
    backend = Backend(grudge=1.5)
    sent = asyncio.run(send(ORDER, backend))
    assert sent.recovery_s is not None
    assert 0.4 < sent.recovery_s < 1.5


def test_a_server_that_is_never_itself_again_has_not_recovered(monkeypatch):
    monkeypatch.setattr(overload_sender, "RECOVERY_S", 0.3)
    sent = asyncio.run(send(ORDER, Backend(grudge=60)))
    assert sent.recovery_s is None


def test_failures_are_neither_answers_nor_refusals():
    class Shaky(Backend):
        async def encode(self, texts, batch_size):
            await super().encode(texts, batch_size)
            if self.most > 5 and self.answered % 3 == 0:
                raise ServerError("every third")

    sent = asyncio.run(send(ORDER, Shaky()))
    assert sent.errors > 0
    assert sent.reason == "every third"
    assert len(sent.accepted_ms) + len(sent.refused_ms) + sent.errors == sent.offered


def test_callers_that_are_too_many_for_the_server_find_its_maximum_nevertheless():
    sent = asyncio.run(send(ORDER, Backend(room=2)))  # four callers
    assert 100 < sent.maximum_texts_per_s <= 210


SENT = Sent(
    calm_ms=(10.0, 12.0),
    maximum_texts_per_s=320.0,
    offered=40,
    accepted_ms=(30.0, 50.0),
    refused_ms=(1.0, 3.0),
    lag_ms=(0.5, 0.5),
    errors=1,
    reason="once",
    wall_s=2.0,
    recovery_s=0.75,
)


def measured(carry):
    texts = [f"text {n}" for n in range(40)]
    return run_overload(
        "here:1", texts, leader=os.getpgid(0), calm_s=0.1, seconds=1.0, seed=3, max_tokens_in_flight=99, carry=carry
    )


def test_what_was_sent_becomes_rates_and_percentiles():
    orders = []

    def carry(order):
        orders.append(order)
        return SENT

    found = measured(carry)
    (order,) = orders
    assert [len(request) for request in order.requests] == [16, 16]
    assert (order.url, order.seconds, order.seed) == ("here:1", 1.0, 3)
    assert (found.texts_a_request, found.max_tokens_in_flight) == (16, 99)
    assert found.offered_texts_per_s == 40 * 16 / 1.0
    assert found.goodput_texts_per_s == 2 * 16 / 2.0
    assert found.goodput_share == pytest.approx(16 / 320)
    assert (found.accepted, found.accepted_p50_ms) == (2, 40.0)
    assert (found.refused, found.refused_p50_ms, found.errors) == (2, 2.0, 1)
    assert found.calm_p99_ms == pytest.approx(11.98)
    assert (found.lag_p99_ms, found.recovery_s) == (0.5, 0.75)
    assert found.resident_before_bytes > 10_000_000  # these tests' own processes
    assert found.resident_after_bytes > 10_000_000


def test_where_nobody_is_answered_there_is_no_figure():
    nothing = {**vars(SENT), "accepted_ms": ()}
    with pytest.raises(ServerError, match="nobody was answered"):
        measured(lambda order: Sent(**nothing))


def test_a_sender_that_fails_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        port = unused.getsockname()[1]
        order = Order(url=f"127.0.0.1:{port}", requests=(("a",),), callers=1, calm_s=0.1, seconds=0.1, seed=0)
        with pytest.raises(ServerError, match=rf"sender ended with status 1: .*127\.0\.0\.1:{port}"):
            carry_in_process(order)


def test_memory_is_that_of_living_processes():
    program = "import sys; kept = b'x' * 50_000_000; print('kept', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        held = resident_bytes([process.pid])
        assert 50_000_000 < held < 100_000_000
        assert resident_bytes([process.pid, process.pid]) == pytest.approx(2 * held, rel=0.01)
        process.kill()
    assert resident_bytes([process.pid]) == 0


def test_the_bound_is_the_one_that_people_get():
    shown = inspect.signature(serve).parameters["max_tokens_in_flight"].default
    assert shown == ServingOptions().max_tokens_in_flight


def test_requests_are_of_one_size_and_arrivals_are_in_order():
    assert requests_of(["a", "b", "c", "d", "e"], 2) == [["a", "b"], ["c", "d"]]
    assert requests_of(["a"], 2) == [["a"]]
    moments = arrivals(100, 2.0, seed=1)
    assert moments == sorted(moments) == arrivals(100, 2.0, seed=1)
    assert len(moments) == 200
    assert 0 <= moments[0] < moments[-1] < 2.0
    assert len(arrivals(0.01, 1.0, seed=0)) == 1
