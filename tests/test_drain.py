"""Draining: a backend that is told to stop says so to a proxy, and cuts off nothing that was sent to it meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from haproxy import HAProxy, running_haproxy
from harness import Backend, Postgres, backend_with, children_of, execute, is_running, is_stopped, kept_port, stop
from load import Load
from nginx import is_listening
from raw_http import Answer, connect, exchange, post, read_to_end, request, split_answers
from waiting import wait_until

SECONDS = 60
LONG = 600  # seconds of draining that no test waits for
READYZ = request("GET /readyz HTTP/1.1")
HEALTH = request("GET /api/health HTTP/1.1")
NOTHING_LEFT = "stopped; 0 requests and 0 lines were left without an answer"


def a_post(*headers: str) -> bytes:
    return post(json.dumps({"id": str(uuid.uuid4()), "log": "192.0.2.1 GET / 200"}), *headers)


def say(connection: socket.socket, data: bytes) -> Answer:
    """Sends a request; its answer, which may come in pieces and has a Content-Length."""
    connection.sendall(data)
    received = b""
    while True:
        piece = connection.recv(65536)
        assert piece, f"closed after {received!r}"
        received += piece
        head, end, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if end and length and len(body) >= int(length[1]):
            [answer] = split_answers(received)
            return answer


def assert_last(answers: Sequence[Answer], status: int = 201) -> None:
    """All are what they should be, and the last one says that it is."""
    assert [answer.status for answer in answers] == [status] * len(answers), answers
    assert [answer.headers.get("connection") for answer in answers] == [None] * (len(answers) - 1) + ["close"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_backend_told_to_stop_is_not_ready_at_once_and_serves_on(
    start_backend: Callable[..., Backend], workers: int
) -> None:
    backend = start_backend(WORKERS=workers, DRAIN_SECONDS=LONG)
    wait_until(lambda: workers == 1 or len(children_of(backend.pid)) == workers, SECONDS, "all workers")
    with connect(backend.url) as used, connect(backend.url) as idle:
        for connection in (used, idle):
            assert "connection" not in say(connection, HEALTH).headers
        assert exchange(backend.url, request("GET /readyz HTTP/1.1", "Connection: close"))[0].status == 200
        os.killpg(backend.pid, signal.SIGINT)  # as a terminal does: to the workers too
        wait_until(lambda: backend.printed.count(f"draining for {LONG} s") == workers, SECONDS, "all workers")
        for _ in range(8 * workers):
            assert_last(exchange(backend.url, READYZ), 503)
            assert_last(exchange(backend.url, a_post()))
        used.sendall(a_post())
        assert_last(split_answers(read_to_end(used)))
        used.close()
        assert select.select([idle], [], [], 0)[0] == []  # nothing to read, not even an end
        backend.kill(signal.SIGTERM)  # a second one
        assert backend.process.wait(SECONDS) == 0
        assert read_to_end(idle) == b""
    assert backend.printed.count(NOTHING_LEFT) == workers


def test_draining_ends_by_itself_after_its_seconds(start_backend: Callable[..., Backend]) -> None:
    backend = start_backend(WORKERS=2, DRAIN_SECONDS=1)
    wait_until(lambda: exchange(backend.url, a_post("Connection: close"))[0].status == 201, SECONDS, "a worker")
    began = time.monotonic()
    assert backend.end(SECONDS) == 0
    assert time.monotonic() - began >= 1


def test_workers_whose_parent_has_died_do_not_drain(start_backend: Callable[..., Backend]) -> None:
    backend = start_backend(WORKERS=2, DRAIN_SECONDS=LONG)
    wait_until(lambda: len(children_of(backend.pid)) == 2, SECONDS, "two workers")
    workers = children_of(backend.pid)
    backend.kill()
    wait_until(lambda: not any(map(is_running, workers)), SECONDS, "the end of the workers")


def test_what_has_come_when_a_backend_stops_is_answered_before_it_ends(
    start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(script=backend_with(tmp_path, SHUTDOWN_SECONDS=2 * SECONDS, ANSWER_SECONDS=SECONDS))
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(backend.url)) for _ in range(20)]
        for connection in idle:
            say(connection, HEALTH)
        stop(backend.pid)
        waiting = [stack.enter_context(connect(backend.url)) for _ in range(20)]
        for connection in (*idle, *waiting):
            connection.sendall(a_post() + a_post() + a_post())
        backend.kill(signal.SIGTERM)
        os.kill(backend.pid, signal.SIGCONT)
        for connection in (*idle, *waiting):
            answers = split_answers(read_to_end(connection))
            assert_last(answers)
            assert len(answers) == 3
    assert backend.process.wait(SECONDS) == 0
    assert NOTHING_LEFT in backend.printed


POST_OF_100_KB = post("192.0.2.1 GET / 200\n" * 5_000, kind="text/plain")


@pytest.mark.parametrize("parts", [(0,), (40, 50_000)], ids=["a connection only", "head and body"])
def test_a_request_of_which_a_part_has_come_is_read_to_its_end(
    start_backend: Callable[..., Backend], tmp_path: Path, parts: Sequence[int]
) -> None:
    backend = start_backend(script=backend_with(tmp_path, SHUTDOWN_SECONDS=2 * SECONDS, ANSWER_SECONDS=SECONDS))
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(backend.url)) for _ in parts]
        for connection, part in zip(connections, parts, strict=True):
            connection.sendall(POST_OF_100_KB[:part])
        assert exchange(backend.url, request("GET /api/health HTTP/1.1", "Connection: close"))[0].status == 200
        backend.kill(signal.SIGTERM)
        wait_until(lambda: not is_listening(int(urlsplit(backend.url).port or 0)), SECONDS, "the closed port")
        for connection, part in zip(connections, parts, strict=True):
            connection.sendall(POST_OF_100_KB[part:])
            assert_last(split_answers(read_to_end(connection)))
            connection.close()
    assert backend.process.wait(SECONDS) == 0
    assert NOTHING_LEFT in backend.printed


# The same backend, but once its port is closed it stops until it is sent SIGCONT
STOPS = """
import os
import signal
import backend

stop_listening = backend.Server._stop_listening

def stop(server):
    stop_listening(server)
    os.kill(os.getpid(), signal.SIGSTOP)

backend.Server._stop_listening = stop
"""


def test_a_request_that_comes_when_nothing_is_in_hand_any_more_is_answered(
    start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(script=backend_with(tmp_path, STOPS, SHUTDOWN_SECONDS=2 * SECONDS))
    with connect(backend.url) as idle:
        assert say(idle, HEALTH).status == 200
        backend.kill(signal.SIGTERM)
        wait_until(lambda: is_stopped(backend.pid), SECONDS, "the end of its last but one look")
        idle.sendall(a_post())
        os.kill(backend.pid, signal.SIGCONT)
        assert_last(split_answers(read_to_end(idle)))
    assert backend.process.wait(SECONDS) == 0


def test_a_request_that_does_not_come_to_its_end_is_refused_by_503(
    start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(script=backend_with(tmp_path, SHUTDOWN_SECONDS=1.2))
    with connect(backend.url) as connection:
        assert say(connection, HEALTH).status == 200
        connection.sendall(a_post()[:-5])
        backend.kill(signal.SIGTERM)
        [answer] = split_answers(read_to_end(connection))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "stopping; nothing was stored" in json.loads(answer.body)["detail"]
    assert backend.process.wait(SECONDS) == 0


# ---- Behind HAProxy -------------------------------------------------------------------------------------------------


def restart(backend: Backend, starting: Callable[..., Backend], proxy: HAProxy, name: str) -> Backend:
    """SIGTERM, and another one as soon as the proxy does not list it any more; then a new one in its place."""
    backend.kill(signal.SIGTERM)
    proxy.wait_until(name, "DOWN")
    backend.kill(signal.SIGTERM)
    assert backend.process.wait(SECONDS) == 0
    assert backend.printed.count(NOTHING_LEFT) == int(backend.settings.get("WORKERS", 1)), backend.printed
    again = starting(**backend.settings)
    proxy.wait_until(name, "UP")
    return again


# So that a busy machine is not taken for one that fails
PATIENT = {"timeout connect 2s": "timeout connect 60s", "timeout check 2s": "timeout check 60s"}
# A proxy that depends on the backend more than the one that is shipped: it keeps connections and shares them among all
# clients, and hides nothing by a retry. It checks ten times as often, to save time.
DEMANDING = {
    "option http-server-close": "http-reuse always",
    "(?m)^    retries 3$": "    retries 0",
    "option redispatch 1": "no option redispatch",
    "retry-on conn-failure empty-response": "retry-on none",
    "inter 1s fastinter 500ms": "inter 100ms fastinter 50ms",
}


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "changes"), [(20, DEMANDING), (3, {})], ids=["demanding", "as shipped"])
def test_rolling_restarts_behind_haproxy_cut_off_no_request(
    start_backend: Callable[..., Backend], postgres: Postgres, tmp_path: Path, rounds: int, changes: Mapping[str, str]
) -> None:
    url = postgres.create_logs()
    with ExitStack() as stack:
        places = [stack.enter_context(kept_port()) for _ in range(3)]
        ports = [place.getsockname()[1] for place in places]
        backends = [
            start_backend(DATABASE_URL=url, DRAIN_SECONDS=LONG, BACKEND_PORT=port, WORKERS=workers)
            for port, workers in zip(ports, (1, 2, 1), strict=True)
        ]
        proxy = stack.enter_context(running_haproxy(tmp_path / "haproxy", ports, {**PATIENT, **changes}))
        names = list(proxy.servers())
        for name in names:
            proxy.wait_until(name, "UP")
        with Load(proxy.url) as load:
            for _, n in itertools.product(range(rounds), range(3)):
                backends[n] = restart(backends[n], start_backend, proxy, names[n])
                assert load.failures == []
        assert load.failures == []
        assert proxy.faults() == {}
        assert all(int(server["hrsp_2xx"]) > 10 * rounds for server in proxy.servers().values())
    stored = Counter(uri for (uri,) in execute(url, "SELECT uri FROM logs"))
    assert stored == load.sent
