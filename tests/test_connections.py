"""A POST is served twice, to be read and to be answered, on connections that pipeline, do not read, or go away."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
import requests
from harness import STORING_LOCK, Backend, Postgres, Service, driver
from raw_http import connect, post, read_answers
from scraping import refusals
from waiting import wait_until

SECONDS = 60
PLAIN = {"Content-Type": "text/plain"}


@pytest.mark.parametrize("count", [2, 50, 400])
def test_pipelined_requests_of_every_kind_get_their_own_answers_in_their_order(backend: Backend, count: int) -> None:
    ids = [str(uuid.uuid4()) for _ in range(count)]
    requests_, wanted = [], []
    for n, record_id in enumerate(ids):
        line = {"id": record_id, "log": f"192.0.2.1 GET /{n} 200"}
        kind = n % 5
        if kind == 0:  # small: served by the loop
            requests_.append(post(json.dumps(line)))
            wanted.append((201, record_id))
        elif kind == 1:  # large: served by a thread
            filler = [{"log": f"192.0.2.1 GET /{n}/{m}/{'x' * 100} 200"} for m in range(50)]
            requests_.append(post(json.dumps([line, *filler])))
            wanted.append((201, '"accepted": 51'))
        elif kind == 2:
            requests_.append(post(json.dumps({"id": record_id, "log": "nothing"})))
            wanted.append((400, "4 fields"))
        elif kind == 3:
            requests_.append(b"GET /api/health HTTP/1.1\r\nHost: a\r\n\r\n")
            wanted.append((200, "successful"))
        else:
            requests_.append(post("\n".join([f"192.0.2.1 GET /{n} 200"] * 2), kind="text/plain"))
            wanted.append((201, '"accepted": 2'))
    with connect(backend.url) as connection:
        sender = threading.Thread(target=connection.sendall, args=(b"".join(requests_),))
        sender.start()
        answers = read_answers(connection, count)
        sender.join()
    for (status, body), (wanted_status, text) in zip(answers, wanted, strict=True):
        assert status == wanted_status, body
        assert text in body.decode()
    stored = {record["id"] for record in backend.records()}
    assert {record_id for n, record_id in enumerate(ids) if n % 5 < 2} <= stored
    assert len(stored) == sum((1, 51, 0, 0, 2)[n % 5] for n in range(count))


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("good", [0, 1], ids=["400", "201"])
def test_who_pipelines_and_reads_no_answer_holds_up_nobody_else(backend: Backend, batches: int, good: int) -> None:
    bad = "\U0001f600" * 80 + " GET / 200\n"  # 12 bytes each in the answer: 10 MB for a batch, more than buffers take
    batch = post("192.0.2.1 GET / 200\n" * good + bad * 9_999, kind="text/plain")
    large = "\n".join([f"192.0.2.3 GET /{'x' * 1000} 200"] * 10)
    with connect(backend.url, receive_buffer=4096) as connection:
        everything = batch * batches + post('{"log": "192.0.2.1 GET /behind 200"}') * 20
        sender = threading.Thread(target=connection.sendall, args=[everything])
        sender.start()
        assert connection.recv(1, socket.MSG_PEEK)
        for n in range(20):
            body = {"json": {"log": f"192.0.2.2 GET /{n} 200"}} if n % 2 else {"data": large}
            answer = requests.post(backend.data_url, **body, headers=None if n % 2 else PLAIN, timeout=SECONDS)
            assert answer.status_code == 201
        behind = sum(record["log"]["uri"] == "/behind" for record in backend.records())
        assert behind == 0 or batches == 1  # nothing more is read from it, but what came along with the batch is served
        answers = read_answers(connection, batches + 20)
        sender.join()
    assert [status for status, _ in answers] == [201 if good else 400] * batches + [201] * 20
    assert [len(json.loads(body)["rejected"]) for _, body in answers[:batches]] == [9_999] * batches
    assert len(backend.records()) == batches * good + 20 + 10 + 100


def test_who_goes_away_before_the_commit_costs_nobody_an_answer(backend: Backend) -> None:
    ids = [str(uuid.uuid4()) for _ in range(40)]
    with psycopg.connect(backend.database_url) as holder, ThreadPoolExecutor(20) as pool:
        holder.execute(STORING_LOCK)
        gone = [connect(backend.url) for _ in range(20)]
        for connection, record_id in zip(gone, ids[:20], strict=True):
            connection.sendall(post(json.dumps({"id": record_id, "log": "192.0.2.1 GET / 200"})))
        staying = [
            pool.submit(
                requests.post, backend.data_url, json={"id": name, "log": "192.0.2.1 GET / 200"}, timeout=SECONDS
            )
            for name in ids[20:]
        ]
        wait_until(lambda: waiting_to_store(backend) > 0, SECONDS, "a statement that waits")
        for connection in gone:
            connection.close()
        assert requests.get(f"{backend.url}/api/health", timeout=SECONDS).ok  # nobody waits in a thread
        holder.rollback()
        answers = [answer.result(SECONDS) for answer in staying]
    assert [answer.status_code for answer in answers] == [201] * 20
    assert [answer.json()["id"] for answer in answers] == ids[20:]
    wait_until(lambda: len(backend.records()) == 40, SECONDS, "the records of those who are gone")
    assert {record["id"] for record in backend.records()} == set(ids)


def waiting_to_store(backend: Backend) -> int:
    with psycopg.connect(backend.database_url, autocommit=True) as watcher:
        row = watcher.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
        ).fetchone()
        assert row is not None
        return int(row[0])


def test_more_posts_than_threads_wait_for_a_commit_and_reading_goes_on(start_backend: Callable[..., Backend]) -> None:
    backend = start_backend(THREADS=2)
    lines = [{"log": f"192.0.2.1 GET /{n} 200"} for n in range(60)]
    with psycopg.connect(backend.database_url) as holder, ThreadPoolExecutor(60) as pool:
        holder.execute(STORING_LOCK)
        posts = [pool.submit(requests.post, backend.data_url, json=line, timeout=SECONDS) for line in lines]
        wait_until(lambda: waiting_to_store(backend) > 0, SECONDS, "a statement that waits")
        assert backend.records() == []
        holder.rollback()
        assert [one.result(SECONDS).status_code for one in posts] == [201] * 60
    assert len(backend.records()) == 60


# The same backend, but it does not give up a reader
PATIENT = """
import backend

backend.STALL_SECONDS = 3600
sys.exit(backend.main([]))
"""


@pytest.mark.slow
def test_while_all_places_for_large_exports_are_taken_only_large_exports_are_refused(
    start: Callable[..., Service], postgres: Postgres, tmp_path: Path
) -> None:
    program = driver(tmp_path, "patient.py", PATIENT)
    backend = start(program, HOST="127.0.0.1", BACKEND_PORT=0, DATABASE_URL=postgres.create_logs())
    url = backend.wait_for_line(r"listening on (http://\S+)")[1]
    data_url = f"{url}/api/data"
    lines = "".join(f"192.0.2.1 GET /{n}/{'x' * 900} 200\n" for n in range(9_000)).encode()
    for _ in range(2):
        requests.post(data_url, data=lines, headers=PLAIN, timeout=SECONDS)
    done = threading.Event()

    def ask(query: str) -> set[int]:
        """Again and again; the answers."""
        statuses = set()
        with requests.Session() as session:
            while not done.is_set():
                statuses.add(session.get(f"{data_url}{query}", timeout=SECONDS).status_code)
        return statuses

    with ExitStack() as readers, ThreadPoolExecutor(200) as crowd:
        for _ in range(16):
            reader = readers.enter_context(connect(url))
            reader.sendall(b"GET /api/data HTTP/1.1\r\nHost: a\r\n\r\n")
            assert reader.recv(12) == b"HTTP/1.1 200"
        try:
            small = [crowd.submit(ask, "?limit=5") for _ in range(180)]
            large = [crowd.submit(ask, "") for _ in range(20)]
            took = []
            for _ in range(3):
                began = time.monotonic()
                assert requests.post(data_url, data=lines[:9_210], headers=PLAIN, timeout=SECONDS).ok
                assert requests.get(f"{url}/readyz", timeout=SECONDS).ok
                took.append(time.monotonic() - began)
            assert min(took) < 5  # a stall of the machine holds up one of them
            refused = requests.get(data_url, timeout=SECONDS)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "1"
            assert "limit=4000" in refused.json()["detail"]
            assert "Link" not in refused.headers  # nothing was given, so nothing follows
            assert refusals(url).keys() == {"export_places"}
            assert backend.printed.count("places for large exports taken: all 16; answering 503") == 1
        finally:
            done.set()
        assert set.union(*(one.result(SECONDS) for one in small)) == {200}
        assert set.union(*(one.result(SECONDS) for one in large)) == {503}
        readers.close()
        wait_until(lambda: requests.get(data_url, timeout=SECONDS).ok, what="a place")


def test_continue_is_said_to_who_expects_it_and_the_answer_follows(backend: Backend) -> None:
    with connect(backend.url) as connection:
        request = post('{"log": "192.0.2.1 GET / 200"}', "Expect: 100-continue")
        head, _, body = request.partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert read_answers(connection, 1)[0][0] == 201


def test_a_chunked_body_is_read_whatever_its_size(backend: Backend) -> None:
    for count in (1, 9_000):
        chunks = (f"192.0.2.1 GET /{n} 200\n".encode() for n in range(count))
        answer = requests.post(backend.data_url, data=chunks, headers={"Content-Type": "text/plain"}, timeout=SECONDS)
        assert answer.json()["accepted"] == count


def test_sigterm_ends_the_backend_while_an_export_goes_on_that_nobody_reads(backend: Backend) -> None:
    lines = "".join(f"192.0.2.1 GET /{n}/{'x' * 900} 200\n" for n in range(9_000)).encode()
    for _ in range(3):
        requests.post(backend.data_url, data=lines, headers={"Content-Type": "text/plain"}, timeout=SECONDS)
    with connect(backend.url) as connection:
        connection.sendall(b"GET /api/data HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert backend.end(20) == 0


def test_a_post_that_waits_when_the_backend_is_ended_is_told_to_come_again(backend: Backend) -> None:
    with psycopg.connect(backend.database_url) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(STORING_LOCK)
        waiting = pool.submit(requests.post, backend.data_url, json={"log": "192.0.2.1 GET / 200"}, timeout=SECONDS)
        wait_until(lambda: waiting_to_store(backend) > 0, SECONDS, "a statement that waits")
        assert backend.end(20) == 0
        answer = waiting.result(SECONDS)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


@pytest.mark.slow
def test_a_session_of_postgresql_that_is_silent_is_kept_alive_by_the_minute(
    start_backend: Callable[..., Backend],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:  # a server that says nothing
        port = server.getsockname()[1]
        backend = start_backend(DATABASE_URL=f"postgresql://a@127.0.0.1:{port}/a?sslmode=disable&gssencmode=disable")
        pool.submit(requests.get, backend.data_url, timeout=SECONDS)
        with server.accept()[0] as session:
            assert session.recv(4096)
            wait_until(lambda: 0 < seconds_to_keep_alive(port) <= 60, 4, "a timer that keeps it alive")


def seconds_to_keep_alive(port: int) -> float:
    """Until the kernel asks on a connection to that port whether its other end is there; 0 if it does not mean to."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        kind, _, ticks = fields[5].partition(":")
        if fields[2].endswith(f":{port:04X}") and kind == "02":
            return int(ticks, 16) / os.sysconf("SC_CLK_TCK")
    return 0
