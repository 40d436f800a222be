"""Where PostgreSQL or the way to it is not as it should be: an answer is true, or it is a 503 that says what to do."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from harness import STORING_LOCK, Backend, Postgres, backend_with, new_postgres, past_the_guard, standby_of
from waiting import wait_until

import backend as service

SECONDS = 60
LINE = "1.2.3.4 GET /a 200"
StartBackend = Callable[..., Backend]


def post(backend: Backend, document: Any) -> requests.Response:
    return requests.post(backend.data_url, json=document, timeout=SECONDS)


def new_item(line: str = LINE) -> dict[str, str]:
    return {"id": str(uuid.uuid4()), "log": line}


# ---- An answer that is lost after the commit ------------------------------------------------------------------------


class CuttingSocket:
    """Passes connections on to PostgreSQL. Once told to, it cuts the next one that stores, when the answer has come."""

    def __init__(self, upstream: str, folder: Path) -> None:
        self.cuts = 0
        self.cut_next = False
        self._upstream = upstream
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """A close alone leaves the thread in accept(): restarted by a stop signal, that has the next path's socket."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._upstream)
                marked = threading.Event()
                for source, target, asks in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(source, target, asks, marked), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, asks: bool, marked: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if asks and self.cut_next and b"store_logs_v2" in data:
                    self.cut_next = False
                    marked.set()
                elif not asks and marked.is_set():  # PostgreSQL answers when the commit is done
                    self.cuts += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cutting(postgres: Postgres, start_backend: StartBackend, tmp_path: Path) -> Iterator[tuple[Backend, CuttingSocket]]:
    url = postgres.create_logs()
    folder = Path(os.path.relpath(tmp_path)) if len(str(tmp_path)) > 80 else tmp_path  # a socket's path is short
    cutter = CuttingSocket(f"{postgres.socket_folder}/.s.PGSQL.5432", folder)
    yield start_backend(DATABASE_URL=url.replace(postgres.socket_folder, str(tmp_path))), cutter
    cutter.close()


@pytest.mark.parametrize("first", [True, False], ids=["first statement", "later"])
def test_a_batch_whose_answer_was_lost_after_the_commit_has_the_counts_of_the_first_try(
    cutting: tuple[Backend, CuttingSocket], first: bool
) -> None:
    backend, cutter = cutting
    if not first:
        assert post(backend, new_item()).status_code == 201
    cutter.cut_next = True
    answer = requests.post(
        backend.data_url, data=f"{LINE}\n" * 3, headers={"Content-Type": "text/plain"}, timeout=SECONDS
    )
    assert cutter.cuts == 1
    assert answer.json() == {"accepted": 3, "duplicates": 0, "rejected": []}
    assert len(backend.records()) == 3 + (not first)


def test_of_lines_that_were_sent_before_a_lost_answer_tells_the_new_ones_apart(
    cutting: tuple[Backend, CuttingSocket],
) -> None:
    backend, cutter = cutting
    old, new, other = [new_item(), new_item()], [new_item(), new_item(), new_item()], new_item()
    assert post(backend, [*old, other]).status_code == 201
    cutter.cut_next = True
    answer = post(backend, [old[0], *new, old[1], {**other, "log": "1.2.3.4 PUT /other 200"}])
    assert (answer.status_code, cutter.cuts) == (201, 1)
    body = answer.json()
    assert (body["accepted"], body["duplicates"], [item["index"] for item in body["rejected"]]) == (3, 2, [5])
    cutter.cut_next = True
    assert post(backend, [*old, *new]).json() == {"accepted": 0, "duplicates": 5, "rejected": []}
    assert cutter.cuts == 2
    assert len(backend.records()) == 6


def test_a_line_whose_answer_was_lost_after_the_commit_is_new_and_sent_again_it_is_not(
    cutting: tuple[Backend, CuttingSocket],
) -> None:
    backend, cutter = cutting
    item = new_item()
    for status in (201, 200):
        cutter.cut_next = True
        answer = post(backend, item)
        assert answer.status_code == status
        [record] = backend.records()
        assert answer.json() == {"id": record["id"], "created": record["created"]}
    assert cutter.cuts == 2


def test_what_another_process_stored_is_no_first_try_of_a_session_that_was_lost(
    cutting: tuple[Backend, CuttingSocket], start_backend: StartBackend, postgres: Postgres
) -> None:
    backend, _ = cutting
    assert post(backend, new_item()).status_code == 201
    name = backend.database_url.split("/")[3].split("?")[0]
    other = start_backend(DATABASE_URL=postgres.url(name))
    for is_batch in (False, True):
        pause = 0.05
        while True:
            document = [new_item() for _ in range(3)] if is_batch else new_item()
            assert post(other, document).status_code == 201
            stored = time.monotonic()
            time.sleep(pause)  # how long before it was there
            with psycopg.connect(postgres.url(name), autocommit=True) as connection:
                connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({STORING_SESSIONS.replace(';', '')}) AS a")
            sent = time.monotonic()
            answer = post(backend, document)
            if time.monotonic() - sent < sent - stored:  # it knows when it sent a line as exactly as the answer is fast
                break
            pause *= 2
            assert pause < SECONDS, "no answer was fast enough to tell"
        if is_batch:
            assert answer.json() == {"accepted": 0, "duplicates": 3, "rejected": []}
        else:
            assert answer.status_code == 200


# ---- A commit that is less than it should be ------------------------------------------------------------------------

WAITING_FOR_STANDBY = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"


@contextmanager
def standby_that_never_comes(postgres: Postgres) -> Iterator[None]:
    """A commit waits for a synchronous standby."""
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:

        def set_names(change: str, names: str) -> None:
            connection.execute(f"ALTER SYSTEM {change}".encode())
            connection.execute("SELECT pg_reload_conf()")
            wait_until(lambda: connection.execute("SHOW synchronous_standby_names").fetchone() == (names,), SECONDS)

        try:
            set_names("SET synchronous_standby_names = 'nobody'", "nobody")
            yield
        finally:
            set_names("RESET synchronous_standby_names", "")


@pytest.mark.parametrize("level", ["notice", "error"])
def test_a_line_that_did_not_reach_the_synchronous_standby_is_not_confirmed(
    postgres: Postgres, start_backend: StartBackend, level: str
) -> None:
    """PostgreSQL says so in a warning, also where warnings are switched off."""
    url = postgres.create_logs()
    with psycopg.connect(url, autocommit=True) as watcher, ThreadPoolExecutor(1) as pool:
        watcher.execute(f"ALTER DATABASE {watcher.info.dbname} SET client_min_messages = {level}".encode())
        backend, item = start_backend(DATABASE_URL=url), new_item()
        assert post(backend, item).status_code == 201

        def waits() -> bool:
            return watcher.execute(f"SELECT {WAITING_FOR_STANDBY}".encode()).fetchone() is not None

        with standby_that_never_comes(postgres):
            for document in (new_item(), item):  # also one that is stored already waits for the standby
                waiting = pool.submit(post, backend, document)
                wait_until(waits, SECONDS, "a commit that waits for the standby")
                watcher.execute(f"SELECT pg_cancel_backend(pid) {WAITING_FOR_STANDBY}".encode())
                assert waiting.result(SECONDS).status_code == 503
        assert post(backend, item).status_code == 200
        assert len(backend.records()) == 2


def test_a_line_whose_commit_fails_is_not_confirmed(start_backend: StartBackend) -> None:
    backend = start_backend()
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        connection.execute(FAIL_AT_COMMIT)
        item = new_item()
        assert post(backend, item).status_code == 503
        connection.execute("DROP TRIGGER too_late ON logs")
    assert post(backend, item).status_code == 201
    backend.wait_for_line(r"database \(storing\) failing: too late")


FAIL_AT_COMMIT = """
CREATE FUNCTION too_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'too late'; END $$;
CREATE CONSTRAINT TRIGGER too_late AFTER INSERT ON logs DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION too_late();
"""


@pytest.mark.slow
def test_while_transaction_ids_run_out_lines_are_stored_and_the_log_says_so_once(start_backend: StartBackend) -> None:
    with new_postgres() as postgres:
        url = postgres.create_logs()
        postgres.stop()
        leave_transaction_ids(postgres, 20_000_000)
        postgres.start()
        backend = start_backend(DATABASE_URL=url)
        for status in (201, 201):
            assert post(backend, new_item()).status_code == status
        assert post(backend, [new_item(), new_item()]).json() == {"accepted": 2, "duplicates": 0, "rejected": []}
        backend.wait_for_line("must be vacuumed within")
        assert backend.printed.count("must be vacuumed within") == 1
        assert "storing fails" not in backend.printed


def leave_transaction_ids(postgres: Postgres, count: int) -> None:
    """As many are left until the oldest one would be reused. PostgreSQL stops 3 million before that."""
    next_id = 2**31 + 3 - count  # 3 is the first one
    data = Path(postgres.socket_folder)
    owner = data.stat()
    status_file = data / "pg_xact" / f"{next_id // (32 * 8192 * 4):04X}"  # of 32 pages, 4 transactions a byte
    status_file.write_bytes(bytes(32 * 8192))
    os.chown(status_file, owner.st_uid, owner.st_gid)
    command = [str(postgres.programs / "pg_resetwal"), "-x", str(next_id), "-f", str(data)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=owner.st_uid, group=owner.st_gid, cwd=data)


# ---- The connection -------------------------------------------------------------------------------------------------


def test_what_the_connection_string_says_itself_goes_first(postgres: Postgres, start_backend: StartBackend) -> None:
    own = "connect_timeout=3&keepalives_idle=7&application_name=mine&client_encoding=LATIN1&target_session_attrs=any"
    url = postgres.create_logs()
    backend = start_backend(DATABASE_URL=f"{url}&{own}")
    assert post(backend, new_item("1.2.3.4 GET /\u65e5\u672c 200")).status_code == 201
    assert [record["log"]["uri"] for record in backend.records()] == ["/\u65e5\u672c"]
    with psycopg.connect(url) as connection:
        names = connection.execute(
            "SELECT array_agg(DISTINCT application_name) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        ).fetchone()
    assert names == (["mine"],)


def test_another_table_of_the_name_in_the_search_path_takes_no_part(
    postgres: Postgres, start_backend: StartBackend
) -> None:
    url = postgres.create_logs()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA others")
        connection.execute("CREATE TABLE others.logs (id integer)")
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path = others, public".encode())
    backend = start_backend(DATABASE_URL=url)
    assert post(backend, new_item()).status_code == 201
    assert len(backend.records()) == 1


# ---- A statement that takes too long --------------------------------------------------------------------------------

STORING_SESSIONS = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'log-pipeline' AND query LIKE '%store_logs%'
"""


def storing_session(connection: psycopg.Connection[Any]) -> int:
    [[pid]] = connection.execute(STORING_SESSIONS).fetchall()
    return int(pid)


@pytest.mark.parametrize("by", ["the backend", "an operator"])
def test_a_statement_that_is_cancelled_is_a_503_and_no_outage(
    start_backend: StartBackend, tmp_path: Path, by: str
) -> None:
    backend = start_backend(script=backend_with(tmp_path, STATEMENT_SECONDS=2.0 if by == "the backend" else 8.0))
    assert post(backend, new_item()).status_code == 201
    with (
        psycopg.connect(backend.database_url) as holder,
        psycopg.connect(backend.database_url, autocommit=True) as watcher,
        ThreadPoolExecutor(1) as pool,
    ):
        session = storing_session(watcher)
        holder.execute(STORING_LOCK)
        waiting = pool.submit(post, backend, item := new_item())
        if by == "an operator":
            blocked = f"SELECT count(*) FROM pg_locks WHERE pid = {session} AND NOT granted".encode()
            wait_until(lambda: watcher.execute(blocked).fetchall() == [(1,)], SECONDS, "a statement that waits")
            watcher.execute("SELECT pg_cancel_backend(%s)", [session])
        answer = waiting.result(SECONDS)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        holder.rollback()
        assert post(backend, item).status_code == 201
        assert storing_session(watcher) == session
    assert "cancelled" in backend.printed
    assert "database (storing)" not in backend.printed


# ---- `created` at its limits ----------------------------------------------------------------------------------------

PUT_ROW = "INSERT INTO logs VALUES (gen_random_uuid(), {}, '1.2.3.4', 'GET', '/absurd', 200)"


def test_a_row_at_the_end_of_time_makes_no_line_wrong_and_the_log_says_what_to_mend(
    start_backend: StartBackend,
) -> None:
    backend = start_backend()
    with past_the_guard(backend.database_url) as connection:
        connection.execute(PUT_ROW.format("'2999-12-31T23:59:59.999999Z'"))
        for _ in range(2):
            for document in (new_item(), [new_item(), new_item()]):
                answer = post(backend, document)
                assert answer.status_code == 503
                assert "Retry-After" in answer.headers
        connection.execute("DELETE FROM logs")
    assert post(backend, new_item()).status_code == 201
    begun = backend.wait_for_line("storing failing: .*logs_created_range.*")
    assert "ORDER BY created DESC" in begun[0]
    assert backend.printed.count("storing failing") == 1
    backend.wait_for_line("storing back after")


def test_created_far_ahead_of_the_clock_is_said_in_the_log_and_by_readyz(start_backend: StartBackend) -> None:
    backend = start_backend()
    with past_the_guard(backend.database_url) as connection:
        connection.execute(PUT_ROW.format("now() + interval '50 seconds'"))
        assert post(backend, new_item()).status_code == 201
        assert "warning" not in requests.get(f"{backend.url}/readyz", timeout=SECONDS).json()
        assert "ahead" not in backend.printed
        connection.execute(PUT_ROW.format("now() + interval '1 hour'"))
        assert post(backend, new_item()).status_code == 201
        warning = requests.get(f"{backend.url}/readyz", timeout=SECONDS).json()["warning"]
        assert "ahead of the database's clock" in warning
        backend.wait_for_line(r"`created` in the future: 3,[56]\d\d s ahead of the database's clock")
        connection.execute("DELETE FROM logs")
    assert post(backend, new_item()).status_code == 201
    backend.wait_for_line("`created` near the clock again after")


# ---- A server in recovery -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_in_recovery_is_never_taken_for_the_database(start_backend: StartBackend) -> None:
    with new_postgres() as primary:
        url = primary.create_logs()
        writer = start_backend(DATABASE_URL=url)
        assert post(writer, [new_item() for _ in range(10)]).status_code == 201
        with standby_of(primary) as standby:
            lagging = standby.socket_folder
            with psycopg.connect(standby.url("postgres"), autocommit=True) as connection:
                connection.execute("SELECT pg_wal_replay_pause()")
            assert post(writer, [new_item() for _ in range(10)]).status_code == 201
            name = url.split("/")[3].split("?")[0]
            both = f"postgresql://postgres@/{name}?host={lagging},{primary.socket_folder}"
            backend = start_backend(DATABASE_URL=both)
            for _ in range(5):
                assert len(backend.records()) == 20
            assert post(backend, new_item()).status_code == 201
            alone = start_backend(DATABASE_URL=f"postgresql://postgres@/{name}?host={lagging}&target_session_attrs=any")
            with ThreadPoolExecutor(3) as pool:
                asked = [
                    pool.submit(requests.get, url, timeout=SECONDS) for url in (alone.data_url, f"{alone.url}/readyz")
                ]
                asked.append(pool.submit(post, alone, new_item()))
                assert [one.result(SECONDS).status_code for one in asked] == [503] * 3
            assert "in recovery" in alone.printed


def test_an_attempt_to_connect_that_timed_out_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was frozen, and goes on, would wait for the rest of it, and so would whoever wants to stop it."""
    monkeypatch.setattr("psycopg.connection.timeout_from_conninfo", lambda options: 0.1)  # libpq knows none below 2 s
    gc.disable()
    try:
        with socket.create_server(("127.0.0.1", 0)) as frozen:
            host, port = frozen.getsockname()
            with suppress(psycopg.errors.ConnectionTimeout):
                service.open_connection(psycopg.Connection, {"host": host, "port": port})
            connection, _ = frozen.accept()
            connection.settimeout(SECONDS)
            with connection:
                while connection.recv(8):  # what it had said until then; without an end this times out
                    pass
    finally:
        gc.enable()
