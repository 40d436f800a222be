"""Attacks that take their time, against the limits as they are: tests/test_attacks.py has the quick ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from harness import Backend
from raw_http import connect, post, read_answers, request
from test_attacks import (
    CHUNKED,
    LINE,
    PLAIN,
    POST,
    fill,
    is_answered,
    neighbour,
    reader,
    slowest_gives_way,
    statuses,
    trickle,
)
from test_attacks import twin as twin
from waiting import wait_until

HEAD = b"GET /api/health HTTP/1.1\r\nX: "
BODY = request(POST, PLAIN, "Content-Length: 1000000")
SLOW = {"heads": HEAD, "bodies": BODY, "chunks": CHUNKED + b"100000\r\n"}


@pytest.mark.parametrize("what", SLOW)
def test_500_slow_senders_get_408_after_10_seconds(backend: Backend, twin: Backend, what: str) -> None:
    with neighbour(backend, twin), ExitStack() as stack:
        slow = [stack.enter_context(connect(backend.url, seconds=10)) for _ in range(500)]
        began = time.monotonic()
        for connection in slow:
            connection.sendall(SLOW[what])
        trickle(slow, b"x", 0.3, 8 - (time.monotonic() - began))
        early = any(map(is_answered, slow))
        assert not (early and time.monotonic() - began < 10)
        trickle(slow, b"x", 0.3, 10)
        assert statuses(slow) == [408] * 500


def test_a_body_at_5_kb_a_second_is_served_however_long_it_takes(backend: Backend) -> None:
    """The limit is 4 KiB/s on average once 10 s have passed."""
    data = post(f"{LINE}\n" * 7_000, kind="text/plain")
    with connect(backend.url) as connection:
        began, sent = time.monotonic(), 0
        while sent < len(data):
            due = int((time.monotonic() - began) * 5_000) + 1  # after a pause of this process all that is due by then
            connection.sendall(data[sent:due])
            sent = due
            threading.Event().wait(0.2)
        assert time.monotonic() - began > 20
        assert read_answers(connection, 1)[0][0] == 201


def test_a_reader_at_10_kb_a_second_is_served_to_its_end(backend: Backend) -> None:
    fill(backend, 40_000, 400)
    with reader(backend, 10_000) as export:
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 90 or export.outcome, 100, "90 s", poll=0.5)
        assert not export.outcome
        export.hurry.set()
        export.join(60)
        assert (export.outcome, export.records) == ("whole", 40_000)
    assert "cut off" not in backend.printed


def test_the_slowest_reader_of_the_last_minute_gives_way(start_backend: Callable[..., Backend]) -> None:
    backend = start_backend(THREADS=8)
    fill(backend, 400_000, 400)  # 240 MB: the quick ones are still at it after a minute and a half
    slowest_gives_way(backend, 60, 400_000)
