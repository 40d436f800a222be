"""What attackers try, and a well-behaved client beside each of them, whose POSTs and /readyz stay quick.

Each attack runs against a backend of its own, on loopback, bounded in time and number. The client asks in turn the
attacked backend and a twin that nobody attacks: what the machine does to both is no fault of the attacked one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import requests
from harness import Backend, backend_with, children_of, cpu_seconds, is_running, kept_port, peak_memory_bytes, stop
from raw_http import connect, exchange, post, read_answers, read_to_end, request, split_answers
from scraping import refusals
from waiting import wait_until

SECONDS = 60
MIB = 1024**2
MEMORY_BYTES = 200 * MIB
NOISE_SECONDS = 0.01  # a POST goes through three threads; one that computes holds up each by a switch interval
LONGEST_SECONDS = {"POST": 1.0, "readyz": 1.0, "health": 0.5}
ROUNDS = 40  # of the well-behaved client during an attack, at least
PLAIN = "Content-Type: text/plain"
POST = "POST /api/data HTTP/1.1"
CHUNKED = request(POST, PLAIN, "Transfer-Encoding: chunked")
LINE = "192.0.2.1 GET /a 200"
CLOSE = "Connection: close"
ASKED = {
    "POST": post(json.dumps({"log": LINE}), CLOSE),
    "readyz": request("GET /readyz HTTP/1.1", CLOSE),
    "health": request("GET /api/health HTTP/1.1", CLOSE),
}

StartBackend = Callable[..., Backend]

# ---- The well-behaved client ----------------------------------------------------------------------------------------


class Neighbour(threading.Thread):
    """Asks the attacked backend and its twin in turn, each time on a new connection, until it is told to stop."""

    def __init__(self, attacked: Backend, twin: Backend, kinds: Sequence[str], statuses: set[int]) -> None:
        super().__init__(daemon=True)
        self._urls = {"attacked": attacked.url, "twin": twin.url}
        self._kinds, self._statuses = kinds, statuses
        self._pid = attacked.pid
        self._over = threading.Event()
        self.errors: list[str] = []
        self.rounds = 0
        self.before = self._new_table()
        self.during = self._new_table()
        for _ in range(ROUNDS):
            self.ask_all(self.before)
        self._times_before = scheduled(self._pid)

    def _new_table(self) -> dict[tuple[str, str], list[float]]:
        return {(whom, kind): [] for whom in self._urls for kind in self._kinds}

    def run(self) -> None:
        while not self._over.is_set():
            self.ask_all(self.during)
            self.rounds += 1
            self._over.wait(0.005)

    def ask_all(self, table: dict[tuple[str, str], list[float]]) -> None:
        for whom, kind in table:
            began = time.monotonic()
            try:
                [answer] = exchange(self._urls[whom], ASKED[kind])
                if whom == "attacked" and answer.status not in self._statuses:
                    self.errors.append(f"{kind}: {answer.status} {answer.body[:200]!r}")
            except (AssertionError, OSError, ValueError) as error:
                self.errors.append(f"{kind} of the {whom}: {error!r}")
            table[whom, kind].append(time.monotonic() - began)

    def stay(self, rounds: int = ROUNDS) -> None:
        """Returns when it has asked so many times more: how long an attack is kept up."""
        enough = self.rounds + rounds
        wait_until(lambda: self.rounds >= enough, SECONDS, "the well-behaved client's answers")

    def finish(self) -> None:
        self._over.set()
        self.join(SECONDS)

    def faults(self) -> list[str]:
        """Where its requests were not answered well and quickly."""
        found = self.errors[:5]
        ran, waited = (after - before for after, before in zip(scheduled(self._pid), self._times_before, strict=True))
        slowness = 1 + waited / max(ran, 0.001)  # that the machine let it wait for a CPU is no fault of its own
        for kind in self._kinds:
            times, twins = self.during["attacked", kind], self.during["twin", kind]
            usual = max(statistics.median(self.before["attacked", kind]), statistics.median(twins))
            median, longest = statistics.median(times), max(times)
            slow = median > (2 * usual + NOISE_SECONDS) * slowness
            if slow or longest > LONGEST_SECONDS[kind] * slowness + max(twins):
                found.append(
                    f"{kind}: median {median * 1000:.1f} ms, usually {usual * 1000:.1f} ms;"
                    f" longest {longest:.3f} s, that of the twin {max(twins):.3f} s; {slowness:.1f} times slowed down"
                )
        return found


def scheduled(pid: int) -> tuple[float, float]:
    """Seconds that a process's threads have run, and that they have waited for a CPU (Linux, sched-stats)."""
    run = waited = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            fields = (thread / "schedstat").read_text().split()
            run, waited = run + int(fields[0]), waited + int(fields[1])
    return run / 1e9, waited / 1e9


@contextmanager
def neighbour(
    attacked: Backend, twin: Backend, kinds: Sequence[str] = ("POST", "readyz"), statuses: Sequence[int] = (200, 201)
) -> Iterator[Neighbour]:
    """A client beside an attack; at the end all its requests were answered, and quickly, in flat memory."""
    client = Neighbour(attacked, twin, kinds, set(statuses))
    client.start()
    try:
        yield client
    finally:
        client.finish()
    assert attacked.process.poll() is None
    faults = client.faults()
    if (peak := peak_memory_bytes(attacked.pid)) >= MEMORY_BYTES:
        faults.append(f"{peak / MIB:.0f} MiB of memory")
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def twin(start_shared: StartBackend) -> Backend:
    return start_shared()


@pytest.fixture
def start_with(start_backend: StartBackend, tmp_path: Path) -> StartBackend:
    """Starts a backend with other limits: start_with(HEAD_SECONDS=2)."""
    return lambda before="", **constants: start_backend(script=backend_with(tmp_path, before, **constants))


def send(connection: socket.socket, data: bytes) -> bool:
    """Whether the server still took it."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def trickle(connections: Sequence[socket.socket], piece: bytes, pause_seconds: float, seconds: float) -> None:
    """A piece on each, a pause, and so on for a time, or until nobody takes any more."""
    left, over = list(connections), time.monotonic() + seconds
    while left and time.monotonic() < over:
        left = [connection for connection in left if not is_answered(connection) and send(connection, piece)]
        threading.Event().wait(pause_seconds)


def is_answered(connection: socket.socket) -> bool:
    """Whether an answer, or the end, has come on a connection that is waited on by nobody else."""
    timeout = connection.gettimeout()
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        connection.settimeout(timeout)
    return True


def statuses(connections: Sequence[socket.socket]) -> list[int]:
    """The status of the one answer on each, and its end."""
    return [answer.status for connection in connections for answer in split_answers(read_to_end(connection))]


# ---- Slow senders ---------------------------------------------------------------------------------------------------


def test_slow_heads_get_408_and_hold_up_nobody(start_with: StartBackend, twin: Backend) -> None:
    backend = start_with(HEAD_SECONDS=2)
    with neighbour(backend, twin), ExitStack() as stack:
        slow = [stack.enter_context(connect(backend.url)) for _ in range(200)]
        idle = stack.enter_context(connect(backend.url))
        began = time.monotonic()
        for connection in slow:
            connection.sendall(b"GET /api/health HTTP/1.1\r\nX: ")
        while True:
            patient = stack.enter_context(connect(backend.url))
            first_sent = time.monotonic()
            patient.sendall(ASKED["health"][:20])
            trickle(slow, b"x", 0.1, 0.5)
            patient.sendall(ASKED["health"][20:])
            if time.monotonic() - first_sent < 1:  # in time, with as much again for a backend that has to wait itself
                break
        assert statuses([patient]) == [200]
        trickle(slow, b"x", 0.1, SECONDS)
        assert statuses(slow) == [408] * 200
        assert time.monotonic() - began >= 2
        idle.sendall(ASKED["health"])  # nothing of a head had come, so it was not late
        assert statuses([idle]) == [200]


@pytest.mark.parametrize("chunked", [False, True])
def test_slow_bodies_get_408_and_hold_up_nobody(start_with: StartBackend, twin: Backend, chunked: bool) -> None:
    backend = start_with(BODY_GRACE_SECONDS=1)
    head = CHUNKED if chunked else request(POST, PLAIN, "Content-Length: 1000000")
    with neighbour(backend, twin), ExitStack() as stack:
        slow = [stack.enter_context(connect(backend.url)) for _ in range(100)]
        for connection in slow:
            connection.sendall(head + b"64\r\n" * chunked)
        trickle(slow, b"x", 0.1, SECONDS)
        assert statuses(slow) == [408] * 100


def test_a_body_that_keeps_the_pace_is_served_however_long_it_takes(start_with: StartBackend) -> None:
    backend = start_with(BODY_GRACE_SECONDS=1)
    body = f"{LINE}\n" * 3_000  # 63 KB
    data = post(body, kind="text/plain")
    with connect(backend.url) as connection:
        began = time.monotonic()
        connection.sendall(data[:21_000])  # a lead of 5 s, for a machine that pauses
        for start in range(21_000, len(data), 1_400):
            connection.sendall(data[start : start + 1_400])
            threading.Event().wait(0.1)
        [(status, answer)] = read_answers(connection, 1)
        assert time.monotonic() - began > 2
    assert status == 201
    assert json.loads(answer)["accepted"] == 3_000


# ---- Chunks ---------------------------------------------------------------------------------------------------------

ENDLESS = {
    "size": (b"", b"0" * 65536),
    "extension": (b"5;", b"a" * 65536),
    "trailer": (b"0\r\nX: ", b"a" * 65536),
    "trailer of many lines": (b"0\r\n", b"X: a\r\n" * 10_000),
}


@pytest.mark.parametrize("part", ENDLESS)
def test_a_chunks_line_or_a_trailer_that_never_ends_gets_400(backend: Backend, twin: Backend, part: str) -> None:
    """At first as fast as the server takes it, then a byte at a time: each must not cost as much as all before it."""
    begin, piece = ENDLESS[part]
    with neighbour(backend, twin) as client, ExitStack() as stack:
        attackers = [stack.enter_context(connect(backend.url)) for _ in range(4)]
        over = threading.Event()

        def attack(connection: socket.socket) -> None:
            connection.sendall(CHUNKED + begin)
            for _ in range(256):
                if not send(connection, piece):
                    return
            while not over.is_set() and send(connection, piece[:1]):
                over.wait(0.005)

        with ThreadPoolExecutor(4) as pool:
            attacks = [pool.submit(attack, connection) for connection in attackers]
            try:
                client.stay()
            finally:
                over.set()
            for one in attacks:
                one.result(SECONDS)
        assert statuses(attackers) == [400] * 4


@pytest.mark.parametrize("size", [8_000, 9_000])
@pytest.mark.parametrize("part", ["extension", "trailer"])
def test_a_chunks_line_or_a_trailer_has_8_kib_at_most_however_it_comes(backend: Backend, part: str, size: int) -> None:
    line = f"{LINE}\n".encode()
    chunk, filler = b"%x" % len(line), b"a" * size
    shapes = {
        "extension": b"%b;%b\r\n%b\r\n0\r\n\r\n" % (chunk, filler, line),
        "trailer": b"%b\r\n%b\r\n0\r\nX: %b\r\n\r\n" % (chunk, line, filler),
    }
    with connect(backend.url) as connection:
        connection.sendall(CHUNKED)
        for n in range(len(shapes[part])):
            if not send(connection, shapes[part][n : n + 1]):
                break
        [(status, _)] = read_answers(connection, 1)
    assert status == (201 if size < 8192 else 400)


def test_a_million_chunks_of_one_byte_are_read_and_hold_up_nobody(backend: Backend, twin: Backend) -> None:
    body = f"192.0.2.1 GET /{'x' * 104} 200\n".encode() * 8_000
    assert len(body) > 980_000
    data = CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with neighbour(backend, twin) as client, connect(backend.url) as connection:
        connection.sendall(data)
        [(status, answer)] = read_answers(connection, 1)
        client.stay(5)
    assert (status, json.loads(answer)["accepted"]) == (201, 8_000)


STUPID_HEADS = {
    "a long authority": b"GET a://" + b"1" * 24_000 + b" y HTTP/1.1\r\nHost: a\r\n\r\n",
    "blanks in a header": b"GET / HTTP/1.1\r\nHost: a\r\nX:" + b" " * 24_000 + b"\x01\r\n\r\n",
    "blanks in a coding": b"GET / HTTP/1.0\r\nTransfer-Encoding: a" + b" " * 24_000 + b"b\r\n\r\n",
    "tabs": b"GET / HTTP/1.1\r\nHost: a\r\nX: a" + b"\t" * 24_000 + b"\x01\r\n\r\n",
    "thousands of headers": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 60_000,
}


@pytest.mark.parametrize("head", STUPID_HEADS)
def test_a_head_that_is_made_to_be_slow_holds_up_nobody(backend: Backend, twin: Backend, head: str) -> None:
    with neighbour(backend, twin) as client:
        for _ in range(5):
            [answer] = exchange(backend.url, STUPID_HEADS[head])
            assert answer.status in (400, 404, 431)
        client.stay(5)


def test_a_flood_of_line_feeds_before_a_request_holds_up_nobody(backend: Backend, twin: Backend) -> None:
    with neighbour(backend, twin) as client, connect(backend.url) as connection:
        for _ in range(40):
            connection.sendall(b"\r\n" * 30_000)
        client.stay(5)
        connection.sendall(ASKED["readyz"])
        assert read_answers(connection, 1)[0][0] == 200


@pytest.mark.slow
def test_who_pipelines_and_does_not_read_takes_no_room_from_others(backend: Backend, twin: Backend) -> None:
    page = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as stack, neighbour(backend, twin) as client:
        for n in range(400):
            connection = stack.enter_context(connect(backend.url))
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.send((page if n % 2 else CLOSE_AT_ONCE) + b"x" * 100_000)
            if n % 20 == 0:
                client.stay(1)
        client.stay(10)


CLOSE_AT_ONCE = b"GET /api/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


# Requests of a few KB that cost more than thousands of usual ones
SMALL_AND_EXPENSIVE = {
    "empty lines": post("\n" * 4_096, kind="text/plain"),
    "lines of a letter": post("a\n" * 2_048, kind="text/plain"),
    "numbers": post("[" + "0," * 2_046 + "0]"),
    "headers": request("GET /api/health HTTP/1.1", *(f"a{n}:b" for n in range(3_500))),
}


@pytest.mark.parametrize("what", SMALL_AND_EXPENSIVE)
def test_a_hundred_who_pipeline_expensive_requests_hold_up_nobody(backend: Backend, twin: Backend, what: str) -> None:
    kinds = ("POST", "readyz", "health")
    with neighbour(backend, twin, kinds) as client, ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(connect(backend.url))
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.send(SMALL_AND_EXPENSIVE[what] * 3)
        client.stay(5)


@pytest.mark.parametrize(("count", "status"), [(100, 200), (101, 431)])
def test_a_request_has_100_headers_at_most(backend: Backend, count: int, status: int) -> None:
    more = [f"X-{n}: a" for n in range(count - 2)]
    [answer] = exchange(backend.url, request("GET /api/health HTTP/1.1", CLOSE, *more))
    assert answer.status == status
    assert status == 200 or b"100 headers" in answer.body


# ---- Large bodies ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bodies_of_16_mb_that_stall_by_the_dozen_share_64_mb(backend: Backend, twin: Backend) -> None:
    head = request(POST, PLAIN, f"Content-Length: {16 * MIB}")
    with neighbour(backend, twin) as client, ExitStack() as stack:
        stalled = []
        for _ in range(12):
            connection = stack.enter_context(connect(backend.url))
            stalled.append(connection)
            connection.sendall(head)
            for _ in range(159):
                if not send(connection, b"x" * 100_000):
                    break
            client.stay(4)
            assert held_on_disk(backend.pid) <= 64 * MIB
        wait_until(lambda: sum(map(is_answered, stalled)) >= 8, SECONDS, "refusals: at most four fit into 64 MB")
        client.stay(10)
        refused = [connection for connection in stalled if is_answered(connection)]
        assert len(refused) < 12  # the room there is, is given
        answers = [split_answers(read_to_end(connection))[0] for connection in refused]
        assert {answer.status for answer in answers} == {503}
        assert all("retry-after" in answer.headers for answer in answers)


def held_on_disk(pid: int) -> int:
    """Bytes of files that a process has open and that have no name any more."""
    size = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(entry).endswith(" (deleted)"):
                size += entry.stat().st_size
    return size


@pytest.mark.slow
def test_a_crowd_of_40_bodies_of_16_mb_while_the_database_is_away_is_told_to_come_again(
    start_backend: StartBackend, twin: Backend
) -> None:
    body = "\n".join([f"192.0.2.1 GET /{'x' * 1600} 200"] * 9_900)
    data = post(body, CLOSE, kind="text/plain")
    with kept_port() as place, ThreadPoolExecutor(40) as crowd:
        backend = start_backend(DATABASE_URL=f"postgresql://x@127.0.0.1:{place.getsockname()[1]}/x")
        assert exchange(backend.url, ASKED["POST"])[0].status == 503  # from now on the outage is known
        assert exchange(backend.url, ASKED["readyz"])[0].status == 503
        with neighbour(backend, twin, statuses=(200, 503)) as client:
            answers = list(crowd.map(lambda _: exchange(backend.url, data), range(40)))
            client.stay(10)
    assert {answer.status for [answer] in answers} == {503}
    assert all("retry-after" in answer.headers for [answer] in answers)


def filled(piece: str, begin: str = "[", end: str = "]") -> str:
    """A document of just under 16 MiB."""
    count = (16 * MIB - len(begin) - len(end)) // len(piece.encode())
    return f"{begin}{(piece * count).removesuffix(',')}{end}"


GOOD = f"192.0.2.1 GET /{'x' * 1600} 200\n"
EXPENSIVE: dict[str, tuple[Callable[[], str], str, int]] = {
    "empty lists": (lambda: filled("[],"), "application/json", 400),
    "empty objects": (lambda: filled("{},"), "application/json", 400),
    "empty texts": (lambda: filled('"",'), "application/json", 400),
    "numbers": (lambda: filled("1.5,"), "application/json", 400),
    "nested lists": (lambda: filled("[[[[]]]],"), "application/json", 400),
    "members": (lambda: filled('"":[],', "{", '"a":0}'), "application/json", 400),
    "a list in a line": (lambda: filled("[],", '[{"log":[', "]}]"), "application/json", 400),
    "a text without an end": (lambda: '"' + '\\"' * 8_000_000 + "," * 80_001, "application/json", 400),
    "a backslash at the end": (lambda: "," * 80_001 + '"' + "\\\\" * 8_000_000 + "\\", "application/json", 400),
    "escapes": (lambda: filled("\\u00e9", '[{"log":"', '"}]'), "application/json", 400),
    "line feeds": (lambda: filled("\n", "", ""), "text/plain", 400),
    "short lines": (lambda: filled("a\n", "", ""), "text/plain", 400),
    "words": (lambda: filled("a ", "", ""), "text/plain", 400),
    "an emoji": (lambda: "192.0.2.1 GET /\U0001f600 200\n" + GOOD * 9_990, "text/plain", 201),
    "an emoji in JSON": (
        lambda: json.dumps([{"log": "192.0.2.1 GET /\U0001f600 200"}, *[{"log": GOOD}] * 9_900], ensure_ascii=False),
        "application/json",
        201,
    ),
}


def test_a_text_that_never_ends_is_read_once_however_many_quotes_it_has(backend: Backend) -> None:
    """Were each of them taken for the start of another text, this would take a minute."""
    data = post('"' + '\\"' * 80_000 + "," * 80_001, CLOSE)
    assert [answer.status for answer in exchange(backend.url, data, 10)] == [400]


@pytest.mark.slow
@pytest.mark.parametrize("document", EXPENSIVE)
def test_an_expensive_document_takes_little_memory_and_holds_up_nobody(
    backend: Backend, twin: Backend, document: str
) -> None:
    make, kind, status = EXPENSIVE[document]
    data = post(make(), CLOSE, kind=kind)
    with neighbour(backend, twin, ("POST", "readyz", "health")) as client:
        for _ in range(3):
            assert [answer.status for answer in exchange(backend.url, data)] == [status]
        client.stay(10)


# ---- Readers --------------------------------------------------------------------------------------------------------

FILL = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), '2026-01-01Z'::timestamptz + n * interval '1 microsecond', '192.0.2.1', 'GET',
       '/' || n || repeat('x', %(size)s), 200
  FROM generate_series(1, %(count)s) AS n
"""


def fill(backend: Backend, count: int, uri_bytes: int) -> None:
    """Records straight into the table, as a restore would put them there."""
    with psycopg.connect(backend.database_url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(FILL, {"count": count, "size": uri_bytes})


def test_36_connections_that_pipeline_40_unread_windows_hold_no_thread(backend: Backend, twin: Backend) -> None:
    fill(backend, 4_000, 100)
    window = request("GET /api/data?limit=4000 HTTP/1.1")
    with neighbour(backend, twin) as client, ExitStack() as stack:
        silent = [stack.enter_context(connect(backend.url, receive_buffer=4096)) for _ in range(36)]
        for connection in silent:
            connection.sendall(window * 40)
        for connection in silent:
            assert connection.recv(12) == b"HTTP/1.1 200"
        client.stay()
        for _ in range(10):
            [answer] = exchange(backend.url, request("GET /api/data?limit=4000 HTTP/1.1", CLOSE))
            assert (answer.status, answer.body.count(b'{"id"')) == (200, 4_000)


def test_pipelined_windows_that_are_read_all_come_in_their_order(backend: Backend) -> None:
    fill(backend, 4_000, 100)
    with connect(backend.url) as connection:
        windows = b"".join(request(f"GET /api/data?limit={n} HTTP/1.1") for n in range(3_980, 4_001))
        connection.sendall(windows)
        answers = read_answers(connection, 21)
    assert [body.count(b'{"id"') for _, body in answers] == list(range(3_980, 4_001))


@pytest.mark.slow
def test_8_exports_at_once_of_records_with_8_kb_take_little_memory(backend: Backend, twin: Backend) -> None:
    fill(backend, 60_000, 8_000)
    export = request("GET /api/data HTTP/1.1", "Accept: application/x-ndjson")
    with neighbour(backend, twin) as client, ThreadPoolExecutor(8) as pool:

        def read(wanted: int) -> int:
            received = 0
            with connect(backend.url) as connection:
                connection.sendall(export)
                while received < wanted and (piece := connection.recv(MIB)):
                    received += len(piece)
            return received

        assert min(pool.map(read, [60 * MIB] * 8)) >= 60 * MIB
        client.stay(10)


@pytest.mark.slow
def test_who_reads_slowly_is_served_to_the_end_and_who_reads_nothing_is_cut_off(start_with: StartBackend) -> None:
    backend = start_with(STALL_SECONDS=2)
    fill(backend, 40_000, 400)  # more than the kernel keeps for a reader
    export = request("GET /api/data HTTP/1.1", "Accept: application/x-ndjson", CLOSE)
    with connect(backend.url, receive_buffer=4096) as silent, connect(backend.url, receive_buffer=4096) as steady:
        silent.sendall(export)
        steady.sendall(export)
        received, began = bytearray(), time.monotonic()
        while time.monotonic() - began < 7:  # more than three times the limit
            received += steady.recv(2_000)
            threading.Event().wait(0.05)
        backend.wait_for_line("cut off", SECONDS)
        assert backend.printed.count("cut off") == 1
        assert refusals(backend.url) == {"reader_stalled": 1}
        while piece := steady.recv(MIB):
            received += piece
        assert bytes(received).endswith(b"\r\n0\r\n\r\n")
        assert received.count(b'{"id"') == 40_000
        with suppress(ConnectionError):
            rest = b""
            while piece := silent.recv(MIB):
                rest = rest[-10:] + piece
            assert not rest.endswith(b"\r\n0\r\n\r\n")


@contextmanager
def reader(backend: Backend, bytes_per_second: int) -> Iterator[Export]:
    """Opens a large export and reads it at that pace, until it is told to read the rest."""
    with connect(backend.url, receive_buffer=4096) as connection:
        connection.sendall(request("GET /api/data HTTP/1.1", "Accept: application/x-ndjson", CLOSE))
        export = Export(connection, bytes_per_second)
        export.start()
        try:
            yield export
        finally:
            export.hurry.set()
            export.join(SECONDS)


class Export(threading.Thread):
    """The reading of an export; `outcome` is "whole", "cut" or the status of a refusal."""

    def __init__(self, connection: socket.socket, bytes_per_second: int) -> None:
        super().__init__(daemon=True)
        self._connection, self._piece = connection, bytes_per_second // 20
        self.hurry = threading.Event()
        self.records = self.received = 0
        self.outcome = ""

    def run(self) -> None:
        tail = b""
        with suppress(ConnectionError):
            while piece := self._connection.recv(MIB if self.hurry.is_set() else self._piece):
                self.received += len(piece)
                self.records += (tail[-4:] + piece).count(b'{"id"')
                tail = tail[-20:] + piece
                self.hurry.wait(0.05)
        whole = tail.endswith(b"\r\n0\r\n\r\n")
        self.outcome = "whole" if whole else "cut" if self.records else tail[9:12].decode()


def slowest_gives_way(backend: Backend, minute: float, count: int) -> None:
    """Of four readers on four places the slowest is cut off when a fifth one asks, and only then."""
    with ExitStack() as stack:
        quick = [stack.enter_context(reader(backend, 200_000)) for _ in range(2)]
        slow = stack.enter_context(reader(backend, 20_000))
        quick.append(stack.enter_context(reader(backend, 200_000)))
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 1.5 * minute, 3 * minute + 10, "readers that are known")
        assert not any(one.outcome for one in (*quick, slow)), "nobody has asked for their places"
        assert "cut off" not in backend.printed
        small = requests.get(f"{backend.data_url}?limit=5", timeout=SECONDS)
        assert small.status_code == 200
        refused = requests.get(backend.data_url, timeout=SECONDS)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")

        def is_served() -> bool:
            answer = requests.get(backend.data_url, timeout=SECONDS)
            assert answer.status_code in (200, 503)
            return answer.status_code == 200 and len(answer.json()) == count

        wait_until(is_served, SECONDS, "a place", poll=0.2)
        for one in (slow, *quick):
            one.hurry.set()
            one.join(SECONDS)
        assert [one.outcome for one in quick] == ["whole"] * 3
        assert [one.records for one in quick] == [count] * 3
        assert slow.outcome == "cut"
        assert refusals(backend.url).keys() == {"export_places", "slowest_export"}
        assert backend.printed.count("cut off") == 1


@pytest.mark.slow
def test_while_all_places_are_taken_and_somebody_waits_the_slowest_reader_gives_way(start_with: StartBackend) -> None:
    backend = start_with(before="import os\nos.environ['THREADS'] = '8'\n", PACE_SECONDS=2)
    fill(backend, 40_000, 400)
    slowest_gives_way(backend, 2, 40_000)


# ---- Crowds ---------------------------------------------------------------------------------------------------------

FEW_DESCRIPTORS = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"


def test_past_the_limit_of_connections_the_oldest_idle_ones_give_way(start_with: StartBackend, twin: Backend) -> None:
    backend = start_with(before=FEW_DESCRIPTORS)
    with neighbour(backend, twin) as client:
        assert resource.prlimit(backend.pid, resource.RLIMIT_NOFILE) == (256, 256)
        printed = len(backend.printed)
        with ExitStack() as stack:
            idle = []
            for n in range(400):
                idle.append(stack.enter_context(connect(backend.url)))
                if n % 2:  # some have been served before
                    idle[-1].sendall(request("GET /api/health HTTP/1.1"))
                    assert read_answers(idle[-1], 1)[0][0] == 200
            used = cpu_seconds(backend.pid)
            began = time.monotonic()
            client.stay()
            share = (cpu_seconds(backend.pid) - used) / (time.monotonic() - began)
            assert share < 0.7, f"{share:.0%} of a CPU"  # the client's own requests take a third
            gone = [is_answered(connection) for connection in reversed(idle)]  # more of the older ones may go meanwhile
            assert gone == sorted(gone), "the oldest go first"
            assert 150 < sum(gone) < 390
            lines = told(backend, printed)
            assert len(lines) == 1, lines
            assert "connections" in lines[0]
            assert refusals(backend.url)["connection_limit"] >= sum(gone)
        wait_until(lambda: len(told(backend, printed)) == 2, SECONDS, "a line that says it is over")
        client.stay(10)
    assert len(told(backend, printed)) == 2, backend.printed[printed:]


def told(backend: Backend, start: int) -> list[str]:
    """The lines that it printed since, but for its progress."""
    return [line for line in backend.printed[start:].splitlines() if " lines stored (" not in line]


def test_while_idle_connections_fill_the_limit_nothing_is_spun_on(start_with: StartBackend) -> None:
    backend = start_with(before=FEW_DESCRIPTORS)
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(backend.url))
        assert exchange(backend.url, ASKED["readyz"])[0].status == 200
        used, began = cpu_seconds(backend.pid), time.monotonic()
        wait_until(lambda: time.monotonic() - began > 2, what="two seconds")
        assert cpu_seconds(backend.pid) - used < 0.4


# ---- Workers --------------------------------------------------------------------------------------------------------


def test_a_stopped_worker_does_not_keep_the_others_alive_after_sigterm(start_backend: StartBackend) -> None:
    backend = start_backend(WORKERS=2)
    wait_until(lambda: len(children_of(backend.pid)) == 2, what="two workers")
    workers = children_of(backend.pid)
    stop(workers[0])
    began = time.monotonic()
    try:
        backend.kill(signal.SIGTERM)
        backend.process.wait(SECONDS)
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - began < 20  # 5 s, and what a busy machine needs
    assert not any(map(is_running, workers))
    assert any(str(workers[0]) in line and "kill" in line for line in backend.printed.splitlines()), backend.printed
