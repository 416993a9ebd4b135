"""Turns, lanes and buffers: no caller and no large request keeps others from being answered."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mirror_runtime.client.exchange import Served
from mirror_runtime.errors import ServerError, TextError
from mirror_runtime.gateway import scheduler as scheduling
from mirror_runtime.gateway.buffers import FREE_BYTES, Buffers
from mirror_runtime.gateway.errors import Refusal
from mirror_runtime.gateway.fair_queue import FairQueue
from mirror_runtime.gateway.middleware import _pieces
from mirror_runtime.gateway.scheduler import Scheduler
from tests.support.fake_bundles import EngineGate
from tests.support.gateways import running
from tests.support.mirror_serve import wait_until

LONG = "word " * 20_000


class Backend:
    """Encodes a text as its length, after a moment, and notes what it was asked for."""

    cached = None
    tokens_at_once = slice_tokens = 1024

    def __init__(self) -> None:
        self.card: Any = SimpleNamespace(most_tokens=256)
        self.asked: list[list[str]] = []
        self.fingerprints: list[str | None] = ["old"] * 1000
        self.failing = "none"
        self.release = asyncio.Event()
        self.release.set()

    async def encode(self, texts):
        self.asked.append(list(texts))
        fingerprint = self.fingerprints.pop(0)
        await self.release.wait()
        await asyncio.sleep(0)
        if self.failing in texts:
            raise ServerError("out of cheese")
        errors = {i: TextError(i, "is bad") for i, text in enumerate(texts) if text == "bad"}
        lengths = np.array([len(text) for text in texts])
        return Served(
            vectors=lengths[:, None].astype(np.float32),
            tokens=lengths,
            truncated=lengths > 1024,
            errors=errors,
            fingerprint=fingerprint,
        )

    async def aclose(self) -> None:
        raise AssertionError("nobody closes it")


def run(main):
    return asyncio.run(main(Backend()))


async def order_of(queue: FairQueue, asked: list[tuple[str, int]]) -> str:
    """Return the callers in the order in which their slices started."""
    started = ""

    async def work(caller: str, cost: int) -> None:
        nonlocal started
        async with queue.turn(caller, cost):
            started += caller
            await asyncio.sleep(0)

    await asyncio.gather(*(work(*one) for one in asked))
    return started


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        ([("a", 10)] * 6 + [("b", 10)] * 2, "aababaaa"),
        ([("a", 40), ("a", 40), ("b", 10), ("c", 10)], "abca"),
        ([("a", 10)] * 4 + [("b", 20)] * 2, "aaabab"),
        ([("a", 500), ("b", 500)], "ab"),  # more than the capacity runs alone
    ],
)
def test_callers_take_turns_by_the_cost_of_their_slices(asked, order):
    assert asyncio.run(order_of(FairQueue(lambda: 10, 100), asked)) == order


def test_a_cancelled_slice_gives_its_turn_and_its_room_back():
    async def main() -> None:
        queue = FairQueue(lambda: 10, 100)

        async def work(seconds: float) -> None:
            async with queue.turn("a", 10):
                await asyncio.sleep(seconds)

        running, waiting, last = (asyncio.ensure_future(work(s)) for s in (60, 0, 0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert not last.done()
        running.cancel()
        await asyncio.wait([last], timeout=5)
        assert last.done()
        assert queue.running == 0

    asyncio.run(main())


def test_cancelled_slices_neither_pile_up_nor_block_others_nor_cost_their_caller():
    async def main() -> None:
        queue, order, release = FairQueue(lambda: 10, 100), "", asyncio.Event()

        async def work(caller: str, cost: int) -> None:
            nonlocal order
            async with queue.turn(caller, cost):
                order += caller
                await release.wait()

        def begin(caller: str, cost: int) -> asyncio.Task[None]:
            return asyncio.ensure_future(work(caller, cost))

        async def cancel(*tasks: asyncio.Task[None]) -> None:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        running, head, behind = begin("r", 5), begin("a", 6), begin("a", 4)
        await asyncio.sleep(0)
        assert order == "r"
        await cancel(head)
        await asyncio.sleep(0)
        assert order == "ra", "a slice that has left blocks another that fits"
        leaving, rival = [begin("a", 7) for _ in range(100)], begin("b", 20)
        await asyncio.sleep(0)
        await cancel(*leaving)
        assert len(queue._waiting) <= 3
        last = begin("a", 6)
        await asyncio.sleep(0)
        release.set()
        await asyncio.wait_for(asyncio.gather(running, behind, rival, last), 5)
        assert order == "raab", "the cost of slices that have left counts"
        assert queue.running == len(queue._waiting) == 0

    asyncio.run(main())


def test_a_full_queue_admits_each_caller_to_an_equal_share():
    queue = FairQueue(lambda: 10, 8)
    assert queue.fits("flood", 8)
    with queue.admitted("flood", 8):
        assert not queue.fits("flood", 1)
        assert queue.fits("small", 4)
        assert not queue.fits("small", 5)
        with queue.admitted("small", 4):
            assert not queue.fits("small", 1)
            assert queue.texts == 12
    assert queue.texts == 0


def test_slices_are_joined_in_order_with_their_errors_and_long_texts_apart():
    async def main(backend: Backend) -> None:
        texts = ["x" * (i % 50 * 40) for i in range(300)]
        texts[10], texts[250], texts[100] = "bad", "bad", LONG
        served = await Scheduler(backend, 1000).encode(texts, "a")
        assert served.tokens.tolist() == [len(text) for text in texts]
        assert served.vectors[:, 0].tolist() == served.tokens.tolist()
        assert {i: error.index for i, error in served.errors.items()} == {10: 10, 250: 250}
        assert np.flatnonzero(served.truncated).tolist() == [i for i, text in enumerate(texts) if len(text) > 1024]
        assert [LONG] in backend.asked
        assert len(backend.asked) > 20

    run(main)


def test_slices_of_a_replaced_model_are_encoded_again():
    async def main(backend: Backend) -> None:
        texts = [f"{i} " + "x" * 2000 for i in range(12)]  # 4 slices of 3 texts
        backend.fingerprints = ["old", "old", "new", "new", "new", "new"]
        served = await Scheduler(backend, 100).encode(texts, "a")
        assert served.fingerprint == "new"
        assert [len(asked) for asked in backend.asked] == [3] * 6
        assert backend.asked[4:] == backend.asked[:2]
        backend.fingerprints = ["old", None, "new", None, "new"]  # of rejected texts, nothing was sent
        assert (await Scheduler(backend, 100).encode(texts, "a")).fingerprint == "new"
        assert len(backend.asked) == 6 + 5
        backend.fingerprints = [None] * 4
        assert (await Scheduler(backend, 100).encode(texts, "a")).fingerprint is None
        backend.fingerprints = [str(i) for i in range(100)]
        with pytest.raises(Refusal, match="again and again"):
            await Scheduler(backend, 100).encode(texts, "a")

    run(main)


def test_a_failed_slice_ends_its_request_alone():
    async def main(backend: Backend) -> None:
        scheduler = Scheduler(backend, 1000)
        backend.failing = "fail"
        texts = ["fail", *("x" * 4000 for _ in range(200))]
        with pytest.raises(ServerError, match="cheese"):
            await scheduler.encode(texts, "a")
        asked = len(backend.asked)
        await scheduler.encode(["fine"], "a")
        assert len(backend.asked) <= asked + 2
        assert scheduler.texts == scheduler.load.in_flight == 0
        assert scheduler.idle_s() is None

    run(main)


def test_cancelled_slices_are_not_progress_and_idle_time_is_not_theirs(monkeypatch):
    clock: Any = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(scheduling, "time", clock)

    async def main(backend: Backend) -> None:
        scheduler = Scheduler(backend, 100)

        async def cancelled_after(seconds: float) -> float | None:
            task = asyncio.ensure_future(scheduler.encode(["a"], "impatient"))
            await asyncio.sleep(0)
            clock.now += seconds
            found = scheduler.idle_s()
            task.cancel()
            await asyncio.wait([task])
            assert scheduler.idle_s() is None
            clock.now += 60
            return found

        backend.release.clear()
        assert [await cancelled_after(4) for _ in range(3)] == [4, 8, 12]
        backend.release.set()
        await scheduler.encode(["a"], "b")
        backend.release.clear()
        assert await cancelled_after(4) == 4
        scheduler.note_progress()
        assert await cancelled_after(4) == 4

    run(main)


@pytest.mark.parametrize("caller", ["the same caller", "another"])
def test_a_small_request_passes_a_large_one(caller):
    async def main(backend: Backend) -> None:
        scheduler = Scheduler(backend, 10_000)
        await scheduler.encode(["small"], caller)  # small requests come now
        backend.release.clear()
        large = asyncio.ensure_future(scheduler.encode(["x" * 2000] * 2000, "the same caller"))
        very_long = [asyncio.ensure_future(scheduler.encode([LONG], "the same caller")) for _ in range(4)]
        await asyncio.sleep(0.01)
        assert len(backend.asked) == 3, "one slice and one very long text are at the backend"
        small = asyncio.ensure_future(scheduler.encode(["small"], caller))
        await asyncio.sleep(0)
        assert backend.asked[-1] == ["small"]
        backend.release.set()
        await asyncio.gather(small, large, *very_long)

    run(main)


def test_a_large_body_is_refused_unread_while_large_requests_fill_the_queue(gateway_bundle):
    with running(gateway_bundle, max_batch=1000, max_in_flight=1000) as gateway:
        gate = EngineGate(gateway.encoder.engine)
        gate.close()
        threads = []
        for status in (413, 429):  # beside 500 texts it is read, beside 1,000 it is not
            texts = [f"{i} " + "word " * 60 for i in range(500)]
            threads.append(threading.Thread(target=gateway.embed, args=(texts,)))
            threads[-1].start()
            wait_until(lambda: gateway.service.scheduler.texts == 500 * len(threads))
            reply = gateway.send("POST", "/embed", b"{" * 100_000, {"Content-Type": "application/json"})
            assert reply.status == status
        small = threading.Thread(target=gateway.embed, args=("small",))
        small.start()
        wait_until(lambda: gateway.service.scheduler.texts == 1001)
        gate.open()
        for thread in (*threads, small):
            thread.join(20)


def test_buffers_are_shared_and_small_requests_are_free():
    buffers = Buffers(1_000_000)
    big, same, other, alone = (buffers.hold(caller) for caller in ("a", "a", "b", "c"))
    big.add(FREE_BYTES + 400_000)
    with pytest.raises(Refusal, match="fill the gateway's buffers"):
        same.add(FREE_BYTES + 200_000)
    same.add(FREE_BYTES)
    other.add(FREE_BYTES + 450_000)
    with pytest.raises(Refusal):
        alone.add(FREE_BYTES + 200_000)
    for held in (big, same, other):
        held.release()
    alone.add(5_000_000)  # more than all, but alone
    alone.release()
    assert not buffers.by_caller


def test_pieces_of_an_answer_do_not_keep_the_whole():
    body = bytes(range(256)) * 1000
    pieces = [piece["body"] for piece in _pieces({"type": "http.response.body", "body": body})]
    assert b"".join(pieces) == body
    assert {type(piece) for piece in pieces} == {bytes}
    assert max(map(len, pieces)) <= 65_536


def test_floods_of_large_requests_keep_neither_small_ones_nor_health_waiting(gateway_bundle):
    """Large requests are in flight all the time; small ones are answered before the engine has done a tenth of them."""
    with running(gateway_bundle) as gateway:
        gate = EngineGate(gateway.encoder.engine)
        run_engine = gate.run_engine
        gate.run_engine = lambda rows: (time.sleep(0.02), run_engine(rows))[1]
        ended: list[float] = []
        bodies = [[f"{i} {j} " + "word " * 370 for j in range(150)] for i in range(2)] + ["word " * 100_000]

        def flood(body: object) -> None:
            reply = gateway.send(
                "POST", "/embed", json.dumps({"inputs": body}).encode(), {"Content-Type": "application/json"}
            )
            assert reply.status == 200, reply.body
            ended.append(time.monotonic())

        assert gateway.embed("small requests come now").status == 200
        threads = [threading.Thread(target=flood, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        wait_until(lambda: gateway.service.scheduler.texts > 150)
        waits = []
        for i in range(7):
            began = time.monotonic()
            assert gateway.embed(f"small {i}").status == 200
            assert gateway.send("GET", "/health").status == 200
            waits.append(time.monotonic() - began)
        assert not ended[1:], "the large requests ended too early to prove anything"
        for thread in threads:
            thread.join(60)
        assert len(ended) == 3
        assert sorted(waits)[3] < 0.5
