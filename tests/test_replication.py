"""A standby that commits wait for, and its promotion: what was shown or acknowledged is never taken back."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import psycopg
import pytest
import requests
from harness import Backend, Postgres, Service, backend_with, execute, is_in_step, read_records, synchronous_pair
from psycopg.conninfo import conninfo_to_dict
from waiting import wait_until

import backend as service

SECONDS = 60
StartBackend = Callable[..., Backend]
Pair = tuple[Postgres, Postgres]


def new_item() -> dict[str, str]:
    return {"id": str(uuid.uuid4()), "log": "1.2.3.4 GET /a 200"}


def post(backend: Backend, item: dict[str, str]) -> requests.Response:
    return requests.post(backend.data_url, json=item, timeout=SECONDS)


def store(backend: Backend) -> str:
    item = new_item()
    answer = post(backend, item)
    assert answer.status_code == 201, answer.text
    return item["id"]


def ids(backend: Backend, query: str = "") -> list[str]:
    return [record["id"] for record in backend.records(query)]


def ready(backend: Backend) -> requests.Response:
    return requests.get(f"{backend.url}/readyz", timeout=SECONDS)


# ---- A standby that is away -----------------------------------------------------------------------------------------

STORING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%store_logs_v2%'"
STORED = "SELECT count(*) FROM logs WHERE id = %s"
CANCEL, TERMINATE = "SELECT pg_cancel_backend(%s)", "SELECT pg_terminate_backend(%s)"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with synchronous_pair() as both:
        yield both


@pytest.fixture
def url(pair: Pair) -> str:
    return pair[0].create_logs()


@contextmanager
def away(pair: Pair, stopped: bool = False) -> Iterator[None]:
    """The standby answers no more: its processes stand still, or have ended. It is back at the end."""
    primary, standby = pair
    standby.stop("immediate") if stopped else standby.pause()
    try:
        yield
    finally:
        standby.start() if stopped else standby.resume()
    wait_until(lambda: is_in_step(primary), SECONDS, "the standby")


def waiting_session(primary: Postgres) -> int:
    """A session that has stored, and waits for the standby."""
    rows = wait_until(lambda: execute(primary.url("postgres"), STORING), SECONDS, "a commit that waits")
    return int(rows[0][0])


def cancel(primary: Postgres) -> None:
    execute(primary.url("postgres"), CANCEL, waiting_session(primary))


def terminate(primary: Postgres) -> None:
    execute(primary.url("postgres"), TERMINATE, waiting_session(primary))


def restart(primary: Postgres) -> None:
    waiting_session(primary)
    primary.stop()
    primary.start()


def crash(primary: Postgres) -> None:
    waiting_session(primary)
    primary.kill()
    primary.start()


def wait_for_the_limit(primary: Postgres) -> None:
    """The backend itself cancels what takes STATEMENT_SECONDS."""
    waiting_session(primary)


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in (terminate, wait_for_the_limit, restart, crash)]


@pytest.mark.parametrize("end_of_wait", [cancel, *SLOW])
def test_what_the_standby_lacks_is_neither_acknowledged_nor_shown(
    start_backend: StartBackend, tmp_path: Path, pair: Pair, url: str, end_of_wait: Callable[[Postgres], None]
) -> None:
    limits = {"STATEMENT_SECONDS": 1.5, "BARRIER_SECONDS": 0.5, "STUCK_SECONDS": 0.5}
    backend = start_backend(script=backend_with(tmp_path, "", **limits), DATABASE_URL=url)
    first, item = store(backend), new_item()
    with away(pair, stopped=end_of_wait in (restart, crash)), ThreadPoolExecutor(1) as pool:
        posting = pool.submit(post, backend, item)
        end_of_wait(pair[0])
        assert posting.result(SECONDS).status_code == 503
        assert execute(url, STORED, item["id"]) == [(1,)]  # visible to whoever asks PostgreSQL
        for query in ("", "?limit=5", "?method=GET", "?date_to=2999-01-01"):
            assert ids(backend, query) == [first]
        assert requests.get(f"{backend.url}/api/stats", timeout=SECONDS).json()["total"] == 1
        assert post(backend, item).status_code == 503  # sent again, it is found, and still not safe
        assert ready(backend).status_code == 503
        fresh = start_backend(script=backend_with(tmp_path, "", **limits), DATABASE_URL=url)
        answer = requests.get(fresh.data_url, timeout=SECONDS)
        assert answer.status_code == 503
        assert "standby" in answer.json()["detail"]
    assert wait_until(lambda: ready(backend).status_code == 200, SECONDS, "storing to work, though nobody sends a line")
    for one in (backend, fresh):
        wait_until(lambda: requests.get(one.data_url, timeout=SECONDS).ok, SECONDS, "an answer")  # noqa: B023
        wait_until(lambda: ids(one) == [first, item["id"]], SECONDS, "the second record")  # noqa: B023
    assert post(backend, item).status_code == 200
    assert ids(backend) == [first, item["id"]]


def test_a_follower_misses_nothing_while_the_standby_is_away(
    start_backend: StartBackend, tmp_path: Path, pair: Pair, url: str
) -> None:
    script = backend_with(tmp_path, STATEMENT_SECONDS=1.0, BARRIER_SECONDS=0.5)
    backend = start_backend(script=script, DATABASE_URL=url)
    stored = [store(backend) for _ in range(3)]
    seen, address = follow(backend.data_url)
    assert seen == stored
    with away(pair):
        item = new_item()
        assert post(backend, item).status_code == 503
        answer = requests.get(address, timeout=SECONDS)
        assert answer.status_code == 503  # not an empty window: a record that it may have seen elsewhere is there
        assert int(answer.headers["Retry-After"]) > 0
        last = backend.records()[-1]["created"]
        assert ids(backend, f"?date_from={last}") == stored[-1:]  # an exporter finds its last record
    assert post(backend, item).status_code == 200
    wait_until(lambda: requests.get(address, timeout=SECONDS).ok, SECONDS, "the next window")
    assert follow(address)[0] == [item["id"]]


def follow(address: str) -> tuple[list[str], str]:
    """The ids of a window, and the address of the next one."""
    answer = requests.get(address, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    return [record["id"] for record in answer.json()], urljoin(answer.url, answer.links["next"]["url"])


@pytest.mark.slow
def test_an_exporter_is_not_told_of_a_loss_while_the_standby_is_away(
    start_backend: StartBackend, start: Callable[..., Service], tmp_path: Path, shared: Path, pair: Pair, url: str
) -> None:
    limits = {"STATEMENT_SECONDS": 1.0, "BARRIER_SECONDS": 0.2}
    writer = start_backend(script=backend_with(tmp_path, "", **limits), DATABASE_URL=url)
    reader = start_backend(script=backend_with(tmp_path, "", **limits), DATABASE_URL=url)
    first, item = store(writer), new_item()
    exporter = start("background.py", URL=reader.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    wait_until(lambda: shared.exists() and first in shared.read_text(), SECONDS, "the first record")
    reader.destroy()
    with away(pair):
        assert post(writer, item).status_code == 503
        settings = {**reader.settings, "HOST": "127.0.0.1"}
        reader = start_backend(script=backend_with(tmp_path, "", **limits), **settings)  # knows nothing any more
        exporter.wait_for_line("answer 503 .*The synchronous standby does not answer")
        assert [record["id"] for record in read_records(shared)] == [first]
    wait_until(lambda: item["id"] in shared.read_text(), SECONDS, "the second record")
    assert [record["id"] for record in read_records(shared)] == [first, item["id"]]
    assert "the database has" not in exporter.printed


@pytest.mark.slow
def test_readers_share_a_barrier_and_nobody_waits_for_one_that_hangs(
    start_backend: StartBackend, pair: Pair, url: str
) -> None:
    writer, reader = start_backend(DATABASE_URL=url), start_backend(DATABASE_URL=url, THREADS=16)
    first = store(writer)
    assert ids(reader) == [first]
    with away(pair), ThreadPoolExecutor(40) as pool, psycopg.connect(url, autocommit=True) as other:
        other.execute("SET synchronous_commit = local")
        item = new_item()
        pool.submit(post, writer, item)
        session = waiting_session(pair[0])
        other.execute(CANCEL.encode(), [session])
        began = time.monotonic()
        assert list(pool.map(ids, [reader] * 40)) == [[first]] * 40
        waited = time.monotonic() - began
        barriers = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%confirm_v1%'"
        assert execute(url, barriers) == [(1,)]
        began = time.monotonic()
        for _ in range(5):
            assert ids(reader) == [first]
        at_once = (time.monotonic() - began) / 5
    assert waited >= service.BARRIER_SECONDS > 2 * at_once
    wait_until(lambda: ids(reader) == [first, item["id"]], SECONDS, "the second record")


@pytest.mark.slow
def test_a_wait_ended_by_clearing_the_standbys_names_counts_as_none(
    start_backend: StartBackend, pair: Pair, url: str
) -> None:
    """The named limit: PostgreSQL gives no warning, and whoever clears them asks for commits that wait for nobody."""
    backend = start_backend(DATABASE_URL=url)
    direct = pair[0].url("postgres")
    try:
        with away(pair), ThreadPoolExecutor(1) as pool:
            posting = pool.submit(store, backend)
            waiting_session(pair[0])
            execute(direct, "ALTER SYSTEM SET synchronous_standby_names = ''")
            execute(direct, "SELECT pg_reload_conf()")
            assert ids(backend) == [posting.result(SECONDS)]
            execute(direct, "ALTER SYSTEM SET synchronous_standby_names = '*'")
            execute(direct, "SELECT pg_reload_conf()")
    finally:
        execute(direct, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        execute(direct, "SELECT pg_reload_conf()")
        wait_until(lambda: is_in_step(pair[0]), SECONDS, "the standby")


@pytest.mark.parametrize("level", ["error", "notice"])
def test_the_warning_arrives_whatever_the_role_wants_to_hear(pair: Pair, url: str, level: str) -> None:
    heard: list[str] = []
    with psycopg.connect(url, autocommit=True) as connection, ThreadPoolExecutor(1) as pool:
        connection.add_notice_handler(lambda notice: heard.append(str(notice.severity_nonlocalized)))
        connection.execute(f"SET client_min_messages = {level}".encode())
        with away(pair):
            calling = pool.submit(connection.execute, b"SELECT store_logs_v2('{}', '{}', '{}', '{}', '{}')")
            cancel(pair[0])
            calling.result(SECONDS)
        assert heard == ["WARNING"]
        assert connection.execute("SHOW client_min_messages").fetchone() == (level,)


# ---- Without synchronous standbys -----------------------------------------------------------------------------------


def test_without_synchronous_standbys_an_empty_call_writes_nothing(postgres: Postgres) -> None:
    with psycopg.connect(postgres.create_logs(), autocommit=True) as connection:
        for call in ("store_logs_v2('{}', '{}', '{}', '{}', '{}')", "server_v1(NULL, NULL)"):
            with connection.transaction():
                connection.execute(f"SELECT {call}".encode())
                assert connection.execute("SELECT pg_current_xact_id_if_assigned()").fetchone() == (None,)


def test_without_synchronous_standbys_no_statement_is_added(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    query = service.Session.query

    def noted(session: service.Session, sql: str, parameters: Any = None) -> Any:
        asked.append(sql)
        return query(session, sql, parameters)

    monkeypatch.setattr(service.Session, "query", noted)
    database = service.Database(postgres.create_logs(), 1)
    counts = service.Metrics(1, service.ROUTES).counts(0)
    commit = service.GroupCommit(database.storing, database.replication, counts)
    commit.start()
    for _ in range(2):
        settled = threading.Event()
        ticket = service.read_single(new_item())
        ticket.settled = settled.set
        commit.submit(ticket)
        assert settled.wait(SECONDS)
        assert isinstance(ticket.outcome, service.Stored)
    assert commit.close(SECONDS) == 0
    assert asked == [service.NEWEST, service.STORE_LOGS, service.STORE_LOGS]
    asked.clear()
    window = service.Window(database.read, database.replication, service.parse_window({}), b"\n")
    assert len(list(window.parts())) == 1
    assert asked == [service.WINDOW_END, service.READ_PART]
    assert "barrier" not in [thread.name for thread in threading.enumerate()]


# ---- Timelines ------------------------------------------------------------------------------------------------------

VALUES = (str(uuid.uuid4()).encode(), b"::1", b"GET", b"/a", b"200")
LINE = dict(zip(service.COLUMNS, map(service.Column, VALUES), strict=True))
WINDOW = {**service.parse_window({}), "rows": 1, "separator": "", "bytes": 9}
STATEMENTS = {
    name: getattr(service, name)
    for name in ("STORE_LOGS", "WINDOW_END", "READ_PART", "COUNT_PART", "SECONDS_AHEAD", "CONFIRM")
}


@pytest.fixture
def database(postgres: Postgres) -> service.Database:
    return service.Database(postgres.create_logs(), 1)


def promoted(server: service.Primary) -> service.Primary:
    return server._replace(timeline=server.timeline + 1)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_an_old_primary_refuses_who_has_met_a_higher_timeline(postgres: Postgres, statement: str) -> None:
    url = postgres.create_logs()
    with service.open_connection(psycopg.Connection, conninfo_to_dict(url)) as connection:
        server = service.set_up(connection)
        assert server is not None
        known = {"system": server.system, "timeline": server.timeline + 1}
        with pytest.raises(psycopg.Error, match=f"on timeline {server.timeline}, and timeline") as refused:
            connection.execute(STATEMENTS[statement].encode(), {**LINE, **WINDOW, **known})
        assert refused.value.sqlstate == "LP003"
    assert execute(url, "SELECT count(*) FROM logs") == [(0,)]


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "new"])
def test_a_session_leaves_a_server_from_which_another_has_taken_over(
    database: service.Database, connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, server = database.read(service.SECONDS_AHEAD)
    if connected:
        database.storing.query(service.NEWEST)
    database.hosts.meet(promoted(server), "elsewhere")
    monkeypatch.setattr(service, "STATEMENT_SECONDS", 0.5)  # for half of it, a server is looked for
    for ask in (database.storing.query, database.read):
        with pytest.raises(service.Unavailable):
            ask(service.NEWEST)


def test_a_window_is_of_one_history(database: service.Database) -> None:
    """A part that another server has answered may follow on records that this one lacks."""

    def read(sql: str, parameters: Any) -> Any:
        *values, server = database.read(sql, parameters)
        return *values, promoted(server) if sql == service.READ_PART else server

    with pytest.raises(service.Unavailable, match="503") as failed:
        list(service.Window(read, database.replication, service.parse_window({}), b"\n").parts())
    assert failed.value.description == service.FAILED_OVER


def test_another_cluster_may_have_a_lower_timeline(database: service.Database) -> None:
    *_, server = database.read(service.SECONDS_AHEAD)
    database.hosts.meet(promoted(server)._replace(system=server.system + 1), "elsewhere")
    *_, answered = database.storing.query(service.STORE_LOGS, LINE)
    assert answered == server == database.hosts.latest


# ---- Promotion ------------------------------------------------------------------------------------------------------


def both_hosts(pair: Pair, url: str) -> str:
    """The old primary stands first."""
    name = url.split("/")[3].split("?")[0]
    return f"postgresql://postgres@/{name}?host={pair[0].socket_folder},{pair[1].socket_folder}"


def promote(standby: Postgres) -> None:
    assert execute(standby.url("postgres"), "SELECT pg_promote()") == [(True,)]


class Load:
    """Eight threads that store a line after the other, each until it is acknowledged, and one that follows `next`."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.acknowledged: list[str] = []
        self.seen: list[str] = []
        self._backends = backends
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(9)
        self._running = [self._pool.submit(self._write, n) for n in range(8)]
        self._reading = self._pool.submit(self._read)

    def _write(self, n: int) -> None:
        while not self._stop.is_set():
            item = new_item()
            while (answer := post(self._backends[n % len(self._backends)], item)).status_code not in (200, 201):
                assert answer.status_code == 503, answer.text
                self._stop.wait(0.05)
            self.acknowledged.append(item["id"])

    def _read(self) -> None:
        address, quiet = self._backends[0].data_url, False
        while not quiet:
            stopping = all(one.done() for one in self._running)
            answer = requests.get(address, timeout=SECONDS)
            if answer.ok:
                self.seen += [record["id"] for record in answer.json()]
                address = urljoin(answer.url, answer.links["next"]["url"])
                quiet = stopping and not answer.json()
            else:
                assert answer.status_code == 503, answer.text
                self._stop.wait(0.05)

    def wait_for(self, more: int) -> float:
        """Until so many more are acknowledged; the seconds that this took."""
        began, enough = time.monotonic(), len(self.acknowledged) + more
        wait_until(lambda: len(self.acknowledged) >= enough, SECONDS, f"{more} acknowledged lines")
        return time.monotonic() - began

    def finish(self) -> None:
        self._stop.set()
        for one in (*self._running, self._reading):
            one.result(SECONDS)
        self._pool.shutdown()


@pytest.fixture
def promotable() -> Iterator[Pair]:
    with synchronous_pair() as both:
        yield both


def assert_equal(load: Load, primary: Postgres, url: str) -> None:
    """Each acknowledged line is in the database, and was seen once."""
    stored = [str(name) for (name,) in execute(primary.url(url.split("/")[3].split("?")[0]), "SELECT id FROM logs")]
    assert sorted(stored) == sorted(load.acknowledged)
    assert sorted(load.seen) == sorted(load.acknowledged)


def assert_is_primary(backend: Backend, primary: Postgres) -> None:
    answer = ready(backend)
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "host": primary.socket_folder, "timeline": 2})


@pytest.mark.slow
@pytest.mark.parametrize("old_primary", ["stays up", "stands still", "is killed and comes back"])
def test_no_acknowledged_line_is_lost_when_a_standby_is_promoted(
    start_backend: StartBackend, promotable: Pair, old_primary: str
) -> None:
    primary, standby = promotable
    url = both_hosts(promotable, primary.create_logs())
    backends = [start_backend(DATABASE_URL=url, WORKERS=2), start_backend(DATABASE_URL=url)]
    load = Load(backends)
    load.wait_for(200)
    if old_primary == "stands still":
        primary.pause()
    if old_primary == "is killed and comes back":
        primary.kill()
    promote(standby)
    seconds = load.wait_for(1)
    load.wait_for(200)
    if old_primary == "stands still":
        primary.resume()
    if old_primary == "is killed and comes back":
        primary.start()
    for _ in range(3):  # each session has to find its server again
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'log-pipeline'"
        execute(standby.url("postgres"), end)
        load.wait_for(100)
    load.finish()
    for backend in backends:
        backend.wait_for_line(f"the database is {standby.socket_folder} now, on timeline 2; it was .*, on timeline 1")
        assert_is_primary(backend, standby)
    assert_equal(load, standby, url)
    print(f"{old_primary}: acknowledged again {seconds:.1f} s after the promotion")
    assert seconds < 15


@pytest.mark.slow
@pytest.mark.parametrize("old_primary", ["stays up", "stands still"])
def test_a_backend_that_starts_beside_an_old_primary_finds_the_new_one(
    start_backend: StartBackend, promotable: Pair, old_primary: str
) -> None:
    primary, standby = promotable
    url = both_hosts(promotable, primary.create_logs())
    before = store(start_backend(DATABASE_URL=url))
    if old_primary == "stands still":
        primary.pause()
    promote(standby)
    backend = start_backend(DATABASE_URL=url)
    began = time.monotonic()
    after = store(backend)
    assert time.monotonic() - began < service.STATEMENT_SECONDS  # it did not ask the one that stands still
    assert ids(backend) == [before, after]
    assert_is_primary(backend, standby)


@pytest.mark.slow
def test_a_process_leaves_an_old_primary_that_works_on(start_backend: StartBackend, promotable: Pair) -> None:
    """Nobody waits for a standby here, and nobody stores a line either, so nothing fails."""
    primary, standby = promotable
    execute(primary.url("postgres"), "ALTER SYSTEM SET synchronous_standby_names = ''")
    execute(primary.url("postgres"), "SELECT pg_reload_conf()")
    direct = primary.create_logs()
    backend = start_backend(DATABASE_URL=both_hosts(promotable, direct))
    first = store(backend)
    follows = "SELECT count(*) FROM logs WHERE id = %s"
    there = standby.url(direct.split("/")[3].split("?")[0])
    wait_until(lambda: execute(there, follows, first) == [(1,)], SECONDS, "the record on the standby")
    promote(standby)
    backend.wait_for_line("the database is .* now, on timeline 2", service.LOOK_PAUSE_SECONDS + 20)
    second = store(backend)
    assert ids(backend) == [first, second]
    assert execute(direct, "SELECT count(*) FROM logs") == [(1,)]


@pytest.mark.slow
@pytest.mark.parametrize("end_of_wait", [cancel, terminate, wait_for_the_limit, restart, crash])
def test_a_record_that_a_promotion_takes_back_was_seen_by_nobody(
    start_backend: StartBackend, tmp_path: Path, promotable: Pair, end_of_wait: Callable[[Postgres], None]
) -> None:
    primary, standby = promotable
    direct = primary.create_logs()
    script = backend_with(tmp_path, STATEMENT_SECONDS=2.0, BARRIER_SECONDS=0.5)
    backend = start_backend(script=script, DATABASE_URL=both_hosts(promotable, direct))
    first, item = store(backend), new_item()
    seen, address = follow(backend.data_url)
    standby.stop("immediate")
    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(post, backend, item)
        end_of_wait(primary)
        assert posting.result(SECONDS).status_code == 503
    assert execute(direct, STORED, item["id"]) == [(1,)]
    assert requests.get(address, timeout=SECONDS).status_code == 503
    primary.kill()
    standby.start()
    promote(standby)
    assert wait_until(lambda: post(backend, item), SECONDS, "the new primary").status_code == 201
    seen += follow(address)[0]
    assert seen == ids(backend) == [first, item["id"]]
