"""Faults that take their time: outages longer than every time-out, crowds of silent readers, backlogs of millions.

`make test-slow` runs these; `make test` has the quick ones, in tests/test_faults.py.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import requests
from fakes import proxy_to, some_lines
from harness import (
    Backend,
    Postgres,
    Service,
    backend_with,
    count_lines,
    driver,
    is_stopped,
    journal_ids,
    line_of,
    new_postgres,
    past_the_guard,
    peak_memory_bytes,
    stop,
)
from test_faults import STOPPED_IN_MID_WRITE, assert_equal_everywhere, grow, store_many
from waiting import wait_until

Start = Callable[..., Service]
StartBackend = Callable[..., Backend]

SECONDS = 120
ANSWER_SECONDS = 15  # the backend's own 10 s, and 5 for a busy machine
OUTAGE_SECONDS = 35  # longer than each wait for an answer: the client's is 30 s
CONNECTIONS = 30  # of the victim
MIB = 1024**2
LINE = f"192.0.2.1 OPTIONS /{'a' * 32} 200"  # no client's line takes more room
CONFIRMED: list[str] = []  # ids of lines that were posted here and answered 201
BACKLOG = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT ('00000000-0000-8000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
       %(after)s::timestamptz + n * interval '1 microsecond',
       '192.0.2.1', 'GET', '/backlog/' || n, 200
  FROM generate_series(1, %(count)s) AS n
"""


@pytest.fixture(scope="module")
def victim() -> Iterator[Postgres]:
    """A PostgreSQL with few connections that the tests of this file may ill-treat."""
    with new_postgres() as cluster:
        with psycopg.connect(cluster.url("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET max_connections = {CONNECTIONS}".encode())
        cluster.stop()
        cluster.start()
        yield cluster


# ---- PostgreSQL in trouble ------------------------------------------------------------------------------------------


class Answer:
    """What a request got, and after how many seconds."""

    def __init__(self, method: str, url: str, **arguments: Any) -> None:
        began = time.monotonic()
        try:
            self.reply: requests.Response | None = requests.request(method, url, timeout=SECONDS, **arguments)
        except requests.RequestException as error:
            self.reply, self.error = None, error
        self.seconds = time.monotonic() - began

    @property
    def refused(self) -> bool:
        """503, with the time to wait."""
        return self.reply is not None and self.reply.status_code == 503 and "Retry-After" in self.reply.headers

    def __repr__(self) -> str:
        return f"{self.reply.status_code if self.reply is not None else self.error} after {self.seconds:.1f} s"


def post(backend: Backend, line: str = LINE) -> Answer:
    answer = Answer("POST", backend.data_url, json={"id": str(uuid.uuid4()), "log": line})
    if answer.reply is not None and answer.reply.status_code == 201:
        CONFIRMED.append(answer.reply.json()["id"])
    return answer


def get(backend: Backend) -> Answer:
    return Answer("GET", f"{backend.data_url}?limit=5")


def assert_refused(backend: Backend) -> None:
    """POST and GET at once, several of each, are told in time to come again; the process is healthy meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(request, backend) for request in (post, get) * 4]
        wait_until(lambda: healthy(backend) and all(answer.done() for answer in answers), SECONDS, "answers", poll=0.2)
    results = [answer.result() for answer in answers]
    assert all(result.refused and result.seconds < ANSWER_SECONDS for result in results), results


def healthy(backend: Backend) -> bool:
    answer = Answer("GET", f"{backend.url}/api/health")
    assert answer.reply is not None, answer
    assert answer.reply.status_code == 200, answer
    assert answer.seconds < 5, answer  # it does not wait for what takes 8 s and more
    return True


def assert_heals(backend: Backend) -> None:
    """Within a time for the clients' patience, without a restart."""
    wait_until(lambda: get(backend).reply.status_code == 200, SECONDS, "an answer to GET", poll=0.2)  # type: ignore[union-attr]
    wait_until(lambda: post(backend).reply.status_code == 201, SECONDS, "an answer to POST", poll=0.2)  # type: ignore[union-attr]
    assert backend.process.poll() is None


@pytest.fixture
def under_load(
    start: Start, start_backend: StartBackend, victim: Postgres, journal: Path, shared: Path
) -> Iterator[Backend]:
    """A backend on the victim with a client and an exporter at work; at the end all of it is equal."""
    CONFIRMED.clear()
    backend = start_backend(DATABASE_URL=victim.create_logs())
    client = start("client.py", URL=backend.data_url, LOG_FILE=journal, THREADS_AMOUNT=4, REQUEST_DELAY_LIMIT=40)
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=50)
    grow(shared, 200)
    yield backend
    grow(shared, 200)
    assert client.end() == 0
    records = backend.records()
    assert set(CONFIRMED) <= {record["id"] for record in records}, "a line that was confirmed is not there"
    wait_until(lambda: count_lines(shared) >= len(records), SECONDS, "all records in the shared file", poll=0.1)
    posted = Path(f"{journal}.and-posted")  # this test has posted lines of its own
    ours = Counter(map(line_of, records)) - Counter(journal.read_text().splitlines())
    assert set(ours) <= {LINE}
    posted.write_text(journal.read_text() + "".join(f"{line}\n" for line in ours.elements()))
    assert_equal_everywhere(posted, backend, shared)
    assert exporter.end() == 0
    assert backend.printed.count("back after") < 10, backend.printed


def test_while_postgresql_is_stopped_requests_are_told_to_come_again_and_then_all_heals(
    under_load: Backend, victim: Postgres
) -> None:
    victim.pause()
    try:
        began = time.monotonic()
        assert_refused(under_load)
        wait_until(lambda: healthy(under_load) and time.monotonic() - began > OUTAGE_SECONDS, poll=0.2, timeout=SECONDS)
        assert_refused(under_load)
    finally:
        victim.resume()
    assert_heals(under_load)


def test_while_postgresql_is_out_of_connections_requests_are_told_to_come_again_and_then_all_heals(
    under_load: Backend, victim: Postgres
) -> None:
    with ExitStack() as stack:
        watcher = stack.enter_context(psycopg.connect(victim.url("postgres"), autocommit=True))

        def take_all() -> bool:
            """Ends the backend's sessions and takes what is free, the superuser's places too; if all are ours."""
            watcher.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'log-pipeline'"
            )
            with suppress(psycopg.OperationalError):
                while True:
                    connections.append(stack.enter_context(psycopg.connect(victim.url("postgres"))))
            return len(connections) + 1 == CONNECTIONS  # with the watcher's

        connections: list[psycopg.Connection[Any]] = []
        stop(under_load.pid)  # or it would take a place again
        wait_until(take_all, SECONDS, "all connections", poll=0.5)
        under_load.kill(signal.SIGCONT)
        assert_refused(under_load)
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            psycopg.connect(victim.url("postgres"))
    assert_heals(under_load)


def test_while_postgresql_is_out_of_disk_nothing_is_confirmed_reading_goes_on_and_then_all_heals(
    under_load: Backend, victim: Postgres
) -> None:
    """No file of its processes may grow beyond the size that the table has now; the log's segments are smaller."""
    with past_the_guard(under_load.database_url) as connection:
        connection.execute("ALTER TABLE logs SET (autovacuum_enabled = FALSE)")
        with connection.transaction():  # rows that nobody ever sees, and that take room
            connection.execute(BACKLOG, {"after": "2026-01-01Z", "count": 300_000})
            connection.execute("DELETE FROM logs WHERE uri LIKE '/backlog/%'")
        row = connection.execute("SELECT pg_relation_size('logs')").fetchone()
        assert row is not None
        assert row[0] > 16 * MIB
    victim.limit_file_size(row[0])
    try:
        wait_until(lambda: not post_confirmed(under_load), SECONDS, "the end of its room", poll=0)
        assert "could not extend" in under_load.printed or "too large" in under_load.printed, under_load.printed
        answer = post(under_load)
        assert answer.refused, answer
        assert answer.seconds < ANSWER_SECONDS
        healthy(under_load)
        reading = get(under_load)
        assert reading.reply is not None
        assert reading.reply.status_code == 200
    finally:
        victim.limit_file_size(None)
    assert_heals(under_load)


def post_confirmed(backend: Backend) -> bool:
    answer = post(backend)
    assert answer.reply is not None, answer
    assert answer.reply.status_code in (201, 503), answer
    return answer.reply.status_code == 201


# ---- Late answers ---------------------------------------------------------------------------------------------------


def test_an_answer_that_comes_after_the_clients_time_out_makes_no_copy(
    start: Start, start_backend: StartBackend, journal: Path, shared: Path
) -> None:
    backend = start_backend()
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=50)
    with proxy_to(backend) as proxy:
        proxy.delay_next(OUTAGE_SECONDS)
        client = start("client.py", URL=proxy.data_url, LOG_FILE=journal, THREADS_AMOUNT=4, REQUEST_DELAY_LIMIT=40)
        wait_until(lambda: count_lines(shared) > 0, SECONDS, "a record: it is committed, and the client is not told")
        assert not journal.with_name("logs.txt.position").exists()
        grow(shared, 1000)  # all that the client has journalled meanwhile, after its time-out
        wait_until(lambda: proxy.late == 1, SECONDS, "the late answer, which nobody waits for any more")
        assert client.end() == 0
    assert_equal_everywhere(journal, backend, shared)
    assert exporter.end() == 0


def test_the_answer_to_a_post_may_be_cut_at_any_byte(
    start: Start, start_backend: StartBackend, shared: Path, tmp_path: Path
) -> None:
    """Answers are shorter than 300 bytes; in a longer stretch the next one is cut. Four clients share the work."""
    backend = start_backend()
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    journals = [tmp_path / f"logs-{n}.txt" for n in range(4)]
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        proxies = [stack.enter_context(proxy_to(backend)) for _ in journals]
        clients = [
            start("client.py", URL=proxy.data_url, LOG_FILE=journal, THREADS_AMOUNT=4, REQUEST_DELAY_LIMIT=20)
            for proxy, journal in zip(proxies, journals, strict=True)
        ]

        def cut(n: int) -> None:
            position = Path(f"{journals[n]}.position")
            for cuts, kept in enumerate(range(n, 300, 4)):
                proxies[n].cut_next(kept)
                wait_until(lambda: proxies[n].cuts > cuts, SECONDS, "the cut", poll=0.001)  # noqa: B023
                known = position.read_bytes() if position.exists() else b""
                # an answer that comes through: else the client would wait longer and longer
                wait_until(lambda: position.exists() and position.read_bytes() != known, SECONDS, "an answer")  # noqa: B023

        for done in [pool.submit(cut, n) for n in range(4)]:
            done.result()
        assert [client.end() for client in clients] == [0] * 4
    everything = tmp_path / "all.txt"
    everything.write_bytes(b"".join(journal.read_bytes() for journal in journals))
    assert_equal_everywhere(everything, backend, shared)
    wanted = {key: line for journal in journals for key, line in journal_ids(journal).items()}
    assert {record["id"]: line_of(record) for record in backend.records()} == wanted
    assert exporter.end() == 0


# ---- Silent readers -------------------------------------------------------------------------------------------------


def test_40_readers_who_open_a_large_export_and_do_not_read_hold_up_nobody_and_are_cut_off(
    start: Start, postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.create_logs()
    store_many(url, 300_000)
    backend = start(backend_with(tmp_path, STALL_SECONDS=10), HOST="127.0.0.1", BACKEND_PORT=0, DATABASE_URL=url)
    address = backend.wait_for_line(r"listening on (http://\S+)")[1]
    data_url = f"{address}/api/data"
    with ExitStack() as stack:

        def open_export() -> socket.socket:
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(SECONDS)
            one.connect((urlsplit(address).hostname, urlsplit(address).port))
            one.sendall(b"GET /api/data HTTP/1.1\r\nHost: a\r\nAccept: application/x-ndjson\r\n\r\n")
            return one

        silent = [open_export() for _ in range(40)]
        for _ in range(20):
            answer = Answer("POST", data_url, json={"log": LINE})
            assert answer.reply is not None, answer
            assert answer.reply.status_code == 201, answer
            assert answer.seconds < 5, answer
            small = Answer("GET", f"{data_url}?limit=5")
            assert small.reply is not None, small
            assert len(small.reply.json()) == 5, small
            assert small.seconds < 5, small
            assert Answer("GET", f"{address}/api/health").seconds < 5

        cut_off = "cut off 127.0.0.1: it took nothing of its reply"
        wait_until(lambda: backend.printed.count(cut_off) >= 16, SECONDS, "the end of all who hold a place")
        outcomes: Counter[str] = Counter()
        for one in silent:  # cut off, or refused, or served whole: a place came free when the first ones were cut off
            received = bytearray()
            with suppress(ConnectionResetError):
                while not received.startswith(b"HTTP/1.1 503") and (piece := one.recv(MIB)):
                    received += piece
            if received.endswith(b"\r\n0\r\n\r\n"):
                assert received.count(b'{"id":"') >= 300_000
                outcomes["whole"] += 1
            else:
                assert len(received) < 5 * MIB
                outcomes[received[9:12].decode()] += 1
        assert set(outcomes) <= {"200", "503", "whole"}
        assert outcomes["200"] >= 16
    answers = [requests.get(f"{data_url}?limit=1", timeout=SECONDS).status_code for _ in range(40)]
    assert answers == [200] * 40  # every place is free again
    assert backend.end() == 0


SLOW_REQUESTS = (
    b"POST /api/data HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
    + f"Content-Length: {len(LINE)}\r\n\r\n{LINE}".encode(),
    b"GET /api/data?limit=1 HTTP/1.1\r\nHost: a\r\n\r\n",
)


def test_100_clients_that_send_a_byte_a_minute_hold_up_nobody_and_are_told_408(backend: Backend) -> None:
    """Half of them have not sent their head, the others not their body."""
    address = (str(urlsplit(backend.url).hostname), int(urlsplit(backend.url).port or 0))
    posted = 0
    with ExitStack() as stack, ThreadPoolExecutor(100) as pool:
        slow = [(stack.enter_context(socket.create_connection(address)), SLOW_REQUESTS[n % 2]) for n in range(100)]
        began = time.monotonic()
        for one, request in slow:
            one.settimeout(SECONDS)
            one.sendall(request[:-2])
        statuses = [pool.submit(one.recv, 12) for one, _ in slow]
        while not all(status.done() for status in statuses):
            answer = post(backend)
            assert answer.reply is not None, answer
            assert answer.reply.status_code == 201, answer
            assert answer.seconds < 5, answer
            posted += 1
            assert healthy(backend)
            threading.Event().wait(0.5)
        assert 10 <= time.monotonic() - began < 30
        assert [status.result()[8:] for status in statuses] == [b" 408"] * 100
    assert len(backend.records()) == posted


# ---- Millions -------------------------------------------------------------------------------------------------------


def assert_flat(service: Service, limit_bytes: int) -> None:
    peak = peak_memory_bytes(service.pid)
    assert peak < limit_bytes, f"{service.script}: {peak / MIB:.0f} MiB"


def test_behind_an_instance_stopped_in_mid_write_5_million_records_take_little_memory_and_are_written_whole(
    start: Start, start_backend: StartBackend, shared: Path, tmp_path: Path
) -> None:
    """The lock's holder is stopped for longer than any time-out: nobody writes beside it, and nobody gives up."""
    backend = start_backend()
    post(backend)
    settings = {"URL": backend.data_url, "DIRECTORY": shared.parent, "REQUEST_DELAY": 50}
    sleeper = start(driver(tmp_path, "stopped.py", STOPPED_IN_MID_WRITE), **settings)
    wait_until(lambda: is_stopped(sleeper.pid), SECONDS, "the stop")
    half = shared.read_bytes()
    assert 0 < len(half) < 100
    exporter = start("background.py", **settings)
    first = backend.records()[0]
    with past_the_guard(backend.database_url) as connection:
        connection.execute(BACKLOG, {"after": first["created"], "count": 5_000_000})
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 65, SECONDS, "65 s", poll=0.5)
    assert shared.read_bytes() == half
    assert peak_memory_bytes(exporter.pid) > 40 * MIB  # it has fetched what it may
    sleeper.kill(signal.SIGTERM)  # one of them is enough to write the rest: it ends when its own write has
    sleeper.kill(signal.SIGCONT)
    assert sleeper.process.wait(SECONDS) == 0
    last = b'"uri":"/backlog/5000000","status_code":200}}\n'

    def ends_with_the_last() -> bool:
        with shared.open("rb") as file:
            file.seek(max(0, shared.stat().st_size - len(last)))
            return file.read() == last

    wait_until(ends_with_the_last, 600, "all records in the file", poll=0.5)
    assert_flat(exporter, 150 * MIB)
    assert_flat(backend, 100 * MIB)
    assert exporter.end() == 0
    with shared.open("rb") as file:
        assert json.loads(next(file)) == first
        for number, line in enumerate(file, 1):
            assert b'"id":"00000000-0000-8000-8000-%012x"' % number in line
            assert b'"uri":"/backlog/%d"' % number in line
    assert number == 5_000_000


def test_an_export_of_a_million_records_as_one_array_takes_little_memory(start_backend: StartBackend) -> None:
    backend = start_backend()
    with past_the_guard(backend.database_url) as connection:
        connection.execute(BACKLOG, {"after": "2026-01-01Z", "count": 1_000_000})
    records = 0
    tail = b""
    with requests.get(backend.data_url, stream=True, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_content(1 << 20):
            records += (tail[-5:] + piece).count(b'{"id"') - tail[-5:].count(b'{"id"')
            tail = piece[-10:] if len(piece) >= 10 else tail + piece
    assert records == 1_000_000
    assert tail.endswith(b"}}]\n")
    assert_flat(backend, 100 * MIB)


def test_a_crowd_of_large_batches_while_the_database_does_not_answer_takes_bounded_memory(
    start_backend: StartBackend,
) -> None:
    lines = [f"192.0.2.1 GET /{'x' * 1600} 200"] * 9_900  # 16 MB
    body = "\n".join(lines).encode()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, ThreadPoolExecutor(40) as crowd:
        backend = start_backend(DATABASE_URL=f"postgresql://x@127.0.0.1:{silent.getsockname()[1]}/x")
        headers = {"Content-Type": "text/plain"}
        answers = list(crowd.map(lambda _: Answer("POST", backend.data_url, data=body, headers=headers), range(40)))
    assert all(answer.refused for answer in answers), answers
    assert_flat(backend, 200 * MIB)


def test_a_million_lines_without_a_backend_take_little_memory_and_are_all_delivered(
    start: Start, start_backend: StartBackend, journal: Path, tmp_path: Path
) -> None:
    source = tmp_path / "access.log"
    lines = some_lines(1_000_000)
    source.write_text("".join(f"{line}\n" for line in lines))
    backend = start_backend()
    port = urlsplit(backend.url).port
    assert backend.end() == 0
    client = start("client.py", URL=backend.data_url, LOG_FILE=journal, SOURCE=source)
    size = source.stat().st_size
    wait_until(
        lambda: journal.exists() and journal.stat().st_size == size, SECONDS, "all lines in the journal", poll=0.2
    )
    client.wait_for_line("backend unreachable: .*Connection refused")
    assert_flat(client, 100 * MIB)
    again = start_backend(DATABASE_URL=backend.database_url, BACKEND_PORT=port)
    position = journal.with_name("logs.txt.position")
    wait_until(lambda: position.exists() and str(size) in position.read_text(), 600, "the acknowledgement", poll=0.2)
    assert_flat(client, 100 * MIB)
    assert_flat(again, 100 * MIB)
    assert client.end() == 0
    client.wait_for_line("stopped; 1000000 lines delivered, 0 refused, 0 bytes left")
    with psycopg.connect(again.database_url) as connection, connection.cursor("stored") as stored:
        stored.execute("SELECT concat_ws(' ', host(ip), method, uri, status_code) FROM logs ORDER BY created")
        assert [line for (line,) in stored] == lines
