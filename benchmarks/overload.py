"""What a server does with twice the work it can do, and how soon it is itself again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.load import requests_of
from benchmarks.overload_sender import RECOVERY_S, TIMEOUT_S, Order, Sent
from benchmarks.serving_results import Overload
from benchmarks.summary import percentile, thin
from mirror_runtime.bundle import from_json, to_json
from mirror_runtime.errors import BundleError, ServerError
from mirror_runtime.triton.server.processes import group_members, resident_bytes
from mirror_runtime.triton.server.server import launcher

TEXTS_A_REQUEST = 16
"""Single texts would cost the sender more than the server, on the same cores."""

CALLERS = 8
"""Of the closed loop that finds the maximum: enough that none of the server's cores waits for one."""

ROOT = Path(__file__).resolve().parents[1]
_SLACK_S = 60.0

Carry = Callable[[Order], Sent]
"""Carries out an order."""


def run_overload(
    url: str,
    texts: Sequence[str],
    *,
    leader: int,
    calm_s: float,
    seconds: float,
    seed: int,
    max_tokens_in_flight: int,
    carry: Carry | None = None,
) -> Overload:
    """Send a Triton too much, from a process of its own.

    Args:
        url: host and port of its gRPC.
        texts: to send.
        leader: the server's process id, which leads the group of its processes.
        calm_s: how long each of the two measures before takes, in seconds.
        seconds: for how long too much is sent.
        seed: of the arrivals.
        max_tokens_in_flight: the server's bound, for the result.
        carry: what carries out the order; None starts a process.

    Raises:
        ServerError: the sender failed, or none of the requests was answered.
    """
    order = Order(
        url=url,
        requests=tuple(tuple(request) for request in requests_of(texts, TEXTS_A_REQUEST)),
        callers=CALLERS,
        calm_s=calm_s,
        seconds=seconds,
        seed=seed,
    )
    before = resident_bytes(group_members(leader))
    sent = (carry or carry_in_process)(order)
    after = resident_bytes(group_members(leader))
    if not sent.accepted_ms:
        raise ServerError(f"nobody was answered while there was too much to do: {sent.reason or 'all were refused'}")
    size = len(order.requests[0])
    return Overload(
        texts_a_request=size,
        seconds=seconds,
        max_tokens_in_flight=max_tokens_in_flight,
        maximum_texts_per_s=sent.maximum_texts_per_s,
        calm_p99_ms=percentile(sent.calm_ms, 99),
        offered_texts_per_s=sent.offered * size / seconds,
        goodput_texts_per_s=len(sent.accepted_ms) * size / sent.wall_s,
        accepted=len(sent.accepted_ms),
        accepted_samples_ms=thin(sent.accepted_ms),
        accepted_p50_ms=percentile(sent.accepted_ms, 50),
        accepted_p99_ms=percentile(sent.accepted_ms, 99),
        refused=len(sent.refused_ms),
        refused_samples_ms=thin(sent.refused_ms),
        refused_p50_ms=percentile(sent.refused_ms, 50) if sent.refused_ms else None,
        refused_p99_ms=percentile(sent.refused_ms, 99) if sent.refused_ms else None,
        errors=sent.errors,
        lag_p99_ms=percentile(sent.lag_ms, 99),
        resident_before_bytes=before,
        resident_after_bytes=after,
        recovery_s=sent.recovery_s,
    )


def carry_in_process(order: Order) -> Sent:
    """Carry out an order in a process of its own.

    Raises:
        ServerError: it ended without a result; the message holds the last line it wrote.
    """
    longest_s = 2 * order.calm_s + order.seconds + RECOVERY_S + 2 * TIMEOUT_S + _SLACK_S
    try:
        done = subprocess.run(
            [*launcher(), sys.executable, "-m", "benchmarks.overload_sender"],
            cwd=ROOT,  # where -m finds it
            input=json.dumps(to_json(order)),
            capture_output=True,
            encoding="utf-8",
            timeout=longest_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"the overload's sender was not done after {longest_s:.0f} s") from error
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise ServerError(f"the overload's sender ended with status {done.returncode}: {last}")
    try:
        return from_json(Sent, json.loads(done.stdout), "the sender's result")
    except (ValueError, BundleError) as error:
        raise ServerError(f"the overload's sender gave no result: {error}") from error
