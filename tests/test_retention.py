"""Retention: old records go in their order, the newest stays, and no reader passes by what was deleted in silence."""

from __future__ import annotations

import http.client
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import psycopg
import pytest
import requests
from fakes import post_lines, some_lines
from harness import Backend, Postgres, Service, backend_with, count_lines, kill, past_the_guard, read_records
from waiting import wait_until

import backend as service

SECONDS = 30  # for one step on a busy machine
Connection = psycopg.Connection[Any]
RETENTION_LOCK = "SELECT pg_advisory_xact_lock(7021961410472345603)"  # that of delete_expired_v1
# `rows` records, the last one so many seconds ago, with a second between two
FILL = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), date_trunc('second', now()) - (%(seconds_ago)s + %(rows)s - n) * interval '1 second',
       '192.0.2.1', 'GET', '/' || n || repeat('x', %(padding)s), 200
  FROM generate_series(1, %(rows)s) AS n
"""
DAY = 86_400


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create_logs()


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def fill(url: str, rows: int, seconds_ago: float = 0, padding: int = 0) -> None:
    with past_the_guard(url) as connection:
        connection.execute(FILL, {"rows": rows, "seconds_ago": seconds_ago, "padding": padding})


def times(connection: Connection) -> list[datetime]:
    """Of all records, in their order."""
    return [created.astimezone(UTC) for (created,) in connection.execute("SELECT created FROM logs ORDER BY created")]


def delete(connection: Connection, seconds: float = DAY, rows: int = 1000) -> tuple[int | None, datetime | None]:
    row = connection.execute("SELECT * FROM delete_expired_v1(make_interval(secs => %s), %s)", [seconds, rows])
    deleted, kept_from = row.fetchone() or (None, None)
    return deleted, kept_from


def delete_all(connection: Connection, seconds: float = DAY) -> int:
    """What has expired, in steps; how many records that were."""
    total = 0
    while deleted := delete(connection, seconds)[0]:
        total += deleted
    return total


def buffers(connection: Connection, call: str) -> int:
    """Pages that a statement looks at."""
    explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM {call}"
    [(plans,)] = connection.execute(explain.encode()).fetchall()
    return int(plans[0]["Plan"]["Shared Hit Blocks"] + plans[0]["Plan"]["Shared Read Blocks"])


def kept_from(connection: Connection) -> datetime | None:
    [row] = connection.execute("SELECT kept_from_v1()").fetchall()
    return None if row[0] is None else row[0].astimezone(UTC)


def text(moment: datetime | None) -> str:
    assert moment is not None
    return service.format_date(moment)


def get(backend: Backend, query: str = "", **headers: str) -> requests.Response:
    return requests.get(f"{backend.data_url}{query}", headers=headers, timeout=SECONDS)


# ---- What is deleted ------------------------------------------------------------------------------------------------


def test_a_record_goes_with_the_first_record_after_it_that_has_expired(url: str, connection: Connection) -> None:
    fill(url, 10, seconds_ago=0)
    before = times(connection)
    for first in range(9):  # the newest of those that have expired stays until its successor has too
        seconds = (before[-1] - before[first]).total_seconds() - 0.5
        delete_all(connection, seconds)
        assert times(connection) == before[first:]
        assert kept_from(connection) == (before[first - 1] + timedelta(microseconds=1) if first else None)


def test_the_newest_stays_and_the_next_created_follows_it(url: str, connection: Connection) -> None:
    fill(url, 10, seconds_ago=2 * DAY)
    fill(url, 1, seconds_ago=-3600)  # by a clock that was ahead
    [*_, newest] = times(connection)
    assert delete_all(connection, 0.001) == 9
    assert delete_all(connection, 0.001) == 0
    assert times(connection)[-1] == newest
    row = connection.execute("SELECT first_created FROM store_logs_v2('{}', '{}', '{}', '{}', '{}')").fetchone()
    assert row is not None
    assert row[0] == newest + timedelta(microseconds=1)


def test_a_quiet_system_keeps_its_last_records(url: str, connection: Connection) -> None:
    fill(url, 10, seconds_ago=5 * 365 * DAY)
    assert delete(connection) == (0, None)
    assert len(times(connection)) == 10


def test_an_empty_table_and_a_single_record_are_left_alone(url: str, connection: Connection) -> None:
    assert delete(connection) == (0, None)
    fill(url, 1, seconds_ago=365 * DAY)
    assert delete(connection) == (0, None)


def test_a_step_deletes_so_many_at_most_the_oldest_first(url: str, connection: Connection) -> None:
    fill(url, 25, seconds_ago=2 * DAY)
    fill(url, 1)
    before = times(connection)
    steps = [delete(connection, rows=10) for _ in range(4)]
    assert [deleted for deleted, _ in steps] == [10, 10, 4, 0]
    moments = [before[n] + timedelta(microseconds=1) for n in (9, 19, 23, 23)]
    assert [moment for _, moment in steps] == moments
    assert times(connection) == before[24:]


@pytest.mark.parametrize("age", ["0", "-1 day"])
def test_an_age_that_would_delete_everything_is_refused(url: str, connection: Connection, age: str) -> None:
    fill(url, 10, seconds_ago=DAY)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="must be more than 0"):
        connection.execute("SELECT delete_expired_v1(%s::interval, 10)", [age])
    assert len(times(connection)) == 10


def test_one_session_deletes_at_a_time_and_the_others_do_not_wait(url: str, connection: Connection) -> None:
    fill(url, 30, seconds_ago=2 * DAY)
    fill(url, 1)
    with psycopg.connect(url) as other:
        assert delete(other, rows=10)[0] == 10
        assert delete(connection, rows=10) == (None, None)  # nothing is known of what is not committed
        other.rollback()
    assert len(times(connection)) == 31
    assert delete(connection, rows=10)[0] == 10


def test_what_was_deleted_and_kept_from_are_one_transaction(url: str, connection: Connection) -> None:
    """A session that is ended in the middle of a step leaves both as they were."""
    fill(url, 30, seconds_ago=2 * DAY)
    fill(url, 1)
    before = times(connection)
    with suppress(psycopg.errors.AdminShutdown), psycopg.connect(url) as ended:
        assert delete(ended, rows=10)[0] == 10
        connection.execute("SELECT pg_terminate_backend(%s)", [ended.info.backend_pid])
        wait_until(lambda: delete(connection, rows=10)[0] is not None, SECONDS, "the lock of the ended session")
    assert times(connection) == before[10:]
    assert kept_from(connection) == before[9] + timedelta(microseconds=1)


def test_a_part_and_its_kept_from_are_of_one_snapshot(url: str, connection: Connection) -> None:
    """While another session deletes and commits, what a statement reads from `kept_from` on is whole."""
    fill(url, 3000, seconds_ago=2 * DAY)
    fill(url, 1)
    look = """
    SELECT count, kept_from_v1(),
           (SELECT count(*) FROM logs WHERE created < kept_from_v1()), (SELECT count(*) FROM logs)
      FROM read_part_v1('1970-01-01Z', '2999-01-01Z', NULL, NULL, NULL, 4000, ',', 100000000)
    """
    before = times(connection)
    seen: list[int] = []  # how many records were gone

    def delete_beside_it() -> None:
        for n in range(300):
            delete(connection, rows=5)
            if n % 100 == 99:  # however long the reader stands still, it sees something of each hundred
                known = len(seen)
                wait_until(lambda: len(seen) > known + 1, SECONDS, "two looks")  # noqa: B023

    with psycopg.connect(url, autocommit=True) as reader, ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(delete_beside_it)
        while not deleting.done():
            [(count, moment, behind, total)] = reader.execute(look.encode()).fetchall()
            gone = 0 if moment is None else before.index(moment - timedelta(microseconds=1)) + 1
            assert (count, behind, total) == (3001 - gone, 0, 3001 - gone)
            seen.append(gone)
        deleting.result()
    assert len(set(seen)) > 2


def test_a_step_costs_what_it_deletes_however_much_was_deleted_before(url: str, connection: Connection) -> None:
    """Index entries of what was deleted stay until the next VACUUM; nobody walks through them again."""
    fill(url, 50_000, seconds_ago=2 * DAY)
    fill(url, 1)
    connection.execute("ALTER TABLE logs SET (autovacuum_enabled = FALSE)")
    with psycopg.connect(url) as backup:  # keeps all versions alive
        backup.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        backup.execute("SELECT count(*) FROM logs")
        first = [buffers(connection, "delete_expired_v1('1 day', 100)") for _ in range(5)][-1]
        for _ in range(450):
            delete(connection, rows=100)
        assert buffers(connection, "delete_expired_v1('1 day', 100)") <= 1.5 * first + 20


@pytest.mark.parametrize(
    "filters", ["NULL, NULL, NULL", "'GET', NULL, NULL", "NULL, 200::smallint, NULL", "NULL, NULL, '::1'"]
)
def test_a_window_costs_the_same_right_after_much_was_deleted(url: str, connection: Connection, filters: str) -> None:
    """Also the very first one: no entry of a deleted record has been marked as dead by another reader."""
    fill(url, 50_000, seconds_ago=2 * DAY)
    fill(url, 100)
    connection.execute("ALTER TABLE logs SET (autovacuum_enabled = FALSE)")
    call = f"read_part_v1(now() - interval '1 day', '2999-01-01Z', {filters}, 101, ',', 100000)"
    before = buffers(connection, call), buffers(connection, call)  # the first one reads the catalog too
    assert delete_all(connection) == 49_999
    assert buffers(connection, call) <= before[1] + 50


# Halts a store between finding that ids are taken and looking at their rows, as long as somebody has this lock
HALT = """
CREATE FUNCTION halt() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END';
CREATE TRIGGER logs_halt AFTER INSERT ON logs FOR EACH STATEMENT EXECUTE FUNCTION halt();
"""


def test_a_repeated_line_is_not_told_to_be_new_as_its_record_is_deleted(url: str, connection: Connection) -> None:
    fill(url, 2, seconds_ago=2 * DAY)
    fill(url, 1)
    created, record = connection.execute("SELECT created, id FROM logs ORDER BY created").fetchall()[0]
    connection.execute(HALT)
    repeat = "SELECT known_created FROM store_logs_v2(%s::uuid[], '{192.0.2.1}', '{GET}', '{/1}', '{200}')"
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"

    def are_waiting(number: int) -> bool:
        return connection.execute(waiting).fetchall() == [(number,)]

    with (
        psycopg.connect(url) as halter,
        psycopg.connect(url, autocommit=True) as sender,
        psycopg.connect(url, autocommit=True) as deleter,
        ThreadPoolExecutor(2) as pool,
    ):
        halter.execute("SELECT pg_advisory_xact_lock(1)")
        sent = pool.submit(lambda: sender.execute(repeat, [[record]]).fetchall())
        wait_until(lambda: are_waiting(1), SECONDS, "the halt of the store")
        deleted = pool.submit(delete, deleter)
        wait_until(lambda: deleted.done() or are_waiting(2), SECONDS, "the deletion")
        halter.rollback()
        assert sent.result() == [([created],)]
        assert deleted.result()[0] == 1


# ---- The backend ----------------------------------------------------------------------------------------------------


def retaining(folder: Path, day_seconds: float = 1.0, step_rows: int = 1000, before: str = "") -> str:
    """A driver for a backend whose days are shorter, and that looks for what has expired all the time."""
    return backend_with(folder, before, DAY_SECONDS=day_seconds, EXPIRY_PAUSE_SECONDS=0.02, EXPIRY_STEP_ROWS=step_rows)


def test_by_default_nothing_is_deleted(start_backend: Callable[..., Backend], tmp_path: Path, url: str) -> None:
    fill(url, 10, seconds_ago=1000 * DAY)
    fill(url, 1)
    backend = start_backend(script=retaining(tmp_path), DATABASE_URL=url)
    post_lines(backend, some_lines(10))
    answer = get(backend)
    assert len(answer.json()) == 21
    assert "Kept-From" not in answer.headers


def test_two_backends_delete_all_that_has_expired_and_say_so(
    start_backend: Callable[..., Backend], tmp_path: Path, url: str, connection: Connection
) -> None:
    fill(url, 20_000, seconds_ago=2 * DAY)
    fill(url, 1)
    script = retaining(tmp_path, DAY)
    both = [start_backend(script=script, DATABASE_URL=url, RETENTION_DAYS=1) for _ in range(2)]
    wait_until(lambda: len(times(connection)) == 2, SECONDS, "the end of what has expired")

    def told() -> int:
        return sum(map(int, re.findall("retention: deleted ([0-9]+) records", both[0].printed + both[1].printed)))

    wait_until(lambda: told() == 19_999, SECONDS, "the number in the logs")
    for one in both:
        begun = one.printed.count("retention: deleting records older than RETENTION_DAYS=1\n")
        assert begun == one.printed.count("retention: deleted ")
        assert one.end() == 0


def test_while_another_one_deletes_a_backend_leaves_it_to_that_one(
    start_backend: Callable[..., Backend], tmp_path: Path, url: str, connection: Connection
) -> None:
    fill(url, 2000, seconds_ago=2 * DAY)
    fill(url, 1)
    with psycopg.connect(url) as other:
        other.execute(RETENTION_LOCK)
        backend = start_backend(script=retaining(tmp_path, DAY), DATABASE_URL=url, RETENTION_DAYS=1)
        wait_until(lambda: asked_in_vain(connection), SECONDS, "the backend's question")
        assert len(times(connection)) == 2001
    wait_until(lambda: len(times(connection)) == 2, SECONDS, "the backend's deletion")
    backend.wait_for_line("retention: deleted 1999 records")


def asked_in_vain(connection: Connection) -> bool:
    """Whether a backend has called delete_expired_v1 as its last statement."""
    sql = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%FROM delete_expired_v1(%'"
    return bool(connection.execute(f"{sql} AND pid <> pg_backend_pid() AND state = 'idle'").fetchall())


def test_killed_in_the_middle_it_goes_on_where_it_was(
    start_backend: Callable[..., Backend], tmp_path: Path, url: str, connection: Connection
) -> None:
    fill(url, 30_000, seconds_ago=2 * DAY)
    fill(url, 1)
    before = times(connection)
    killed_at = [len(before)]
    script = retaining(tmp_path, DAY, step_rows=20)  # 1,500 steps with their rests: seconds, in which a kill comes
    for _ in range(3):
        wanted = killed_at[-1] - 300
        backend = start_backend(script=script, DATABASE_URL=url, RETENTION_DAYS=1)
        wait_until(lambda: count(connection) <= wanted, SECONDS, "some deletion", poll=0.001)  # noqa: B023
        kill(backend)
        wait_until(lambda: not sessions(connection), SECONDS, "the end of its sessions")
        left = times(connection)
        assert left == before[-len(left) :]
        assert kept_from(connection) == before[-len(left) - 1] + timedelta(microseconds=1)
        killed_at.append(len(left))
    assert 2 < killed_at[3] < killed_at[2] < killed_at[1] < 30_001
    start_backend(script=retaining(tmp_path, DAY), DATABASE_URL=url, RETENTION_DAYS=1)
    wait_until(lambda: count(connection) == 2, SECONDS, "the rest")
    assert times(connection) == before[-2:]


def count(connection: Connection) -> int:
    [(number,)] = connection.execute("SELECT count(*) FROM logs").fetchall()
    return int(number)


def sessions(connection: Connection) -> int:
    """Those of backends."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    [(number,)] = connection.execute(sql).fetchall()
    return int(number)


def test_an_outage_of_the_database_is_told_and_retention_goes_on_after_it(
    start_backend: Callable[..., Backend], tmp_path: Path, url: str, connection: Connection
) -> None:
    backend = start_backend(script=retaining(tmp_path, DAY), DATABASE_URL=url, RETENTION_DAYS=1)
    connection.execute("ALTER FUNCTION delete_expired_v1 RENAME TO away")
    backend.wait_for_line(r"WARNING \S+ database \(retention\) failing: function delete_expired_v1.*does not exist")
    connection.execute("ALTER FUNCTION away RENAME TO delete_expired_v1")
    backend.wait_for_line(r"database \(retention\) back after")
    fill(url, 3, seconds_ago=2 * DAY)
    fill(url, 1)
    wait_until(lambda: count(connection) == 2, SECONDS, "the deletion")


def test_a_line_that_is_sent_again_after_its_record_was_deleted_is_stored_again(
    start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(script=retaining(tmp_path, 0.2), RETENTION_DAYS=1)
    item = {"id": str(uuid.uuid4()), "log": "192.0.2.1 GET /again 200"}

    def send() -> int:
        return requests.post(backend.data_url, json=item, timeout=SECONDS).status_code

    assert send() == 201
    assert send() == 200
    with psycopg.connect(backend.database_url, autocommit=True) as connection:

        def is_gone() -> bool:
            post_lines(backend, some_lines(1))
            return not connection.execute("SELECT 1 FROM logs WHERE id = %s", [item["id"]]).fetchall()

        wait_until(is_gone, SECONDS, "the end of the record")
    assert send() == 201


# ---- What readers are told ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trimmed(start_shared: Callable[..., Backend]) -> Backend:
    """A backend on a table of 10 records, from which those before the 7th have been deleted. Nothing is changed any
    more."""
    backend = start_shared(BACKEND_CORS_ORIGINS="https://page.example")
    fill(backend.database_url, 10)
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        created = times(connection)
        delete_all(connection, (created[-1] - created[6]).total_seconds() - 0.5)
        assert times(connection) == created[6:]
    return backend


@pytest.fixture
def look(trimmed: Backend) -> Iterator[Connection]:
    """A connection to its database."""
    with psycopg.connect(trimmed.database_url, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("filters", ["", "&limit=2", "&method=GET", "&status_code=200&limit=1", "&ip=192.0.2.1"])
@pytest.mark.parametrize("microseconds_before", [1, 10**9])
def test_a_start_before_what_is_kept_is_410_and_names_it(
    trimmed: Backend, look: Connection, filters: str, microseconds_before: int
) -> None:
    start = kept_from(look)
    assert start is not None
    asked = text(start - timedelta(microseconds=microseconds_before))
    answer = get(trimmed, f"?date_from={asked}{filters}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (410, "application/problem+json")
    problem = answer.json()
    assert problem["kept_from"] == text(start)
    assert text(start) in problem["detail"]
    assert (problem["status"], problem["title"]) == (410, "Gone")


@pytest.mark.parametrize("start", ["", "&date_from=0", "&date_from=-1", "&date_from=1000-01-01"])
@pytest.mark.parametrize("filters", ["", "&method=GET", "&limit=3"])
def test_without_a_start_all_that_is_kept_comes_and_a_header_says_from_where(
    trimmed: Backend, look: Connection, start: str, filters: str
) -> None:
    answer = get(trimmed, f"?date_to=2999-01-01{start}{filters}")
    assert answer.status_code == 200
    assert answer.headers["Kept-From"] == text(kept_from(look))
    kept = [text(created) for created in times(look)]
    assert [record["created"] for record in answer.json()] == kept[: 3 if "limit" in filters else 4]


def test_from_kept_from_on_and_later_all_is_as_ever(trimmed: Backend, look: Connection) -> None:
    for start, records in ((kept_from(look), 4), (times(look)[-1] + timedelta(microseconds=1), 0)):
        answer = get(trimmed, f"?date_from={text(start)}")
        assert (answer.status_code, len(answer.json())) == (200, records)
        assert "Kept-From" not in answer.headers


def test_a_window_that_ends_before_what_is_kept_is_empty_and_next_begins_there(
    trimmed: Backend, look: Connection
) -> None:
    answer = get(trimmed, "?date_to=1999-01-01")
    assert (answer.status_code, answer.json()) == (200, [])
    assert answer.links["next"]["url"].endswith(f"date_from={text(kept_from(look))}")
    following = requests.get(urljoin(answer.url, answer.links["next"]["url"]), timeout=SECONDS)
    assert len(following.json()) == 4


def test_newest_is_the_newest_record_whatever_was_asked_for(trimmed: Backend, look: Connection) -> None:
    newest = text(times(look)[-1])
    for query in (
        "",
        "?limit=1",
        "?method=PUT",
        f"?date_from={newest}",
        "?date_from=2100-01-01",
        "?date_to=1999-01-01",
    ):
        assert get(trimmed, query).headers["Newest"] == newest
        assert requests.head(trimmed.data_url + query, timeout=SECONDS).headers["Newest"] == newest


def test_an_empty_table_has_no_newest(backend: Backend) -> None:
    assert get(backend).headers.keys().isdisjoint({"Newest", "Kept-From"})


def test_a_page_of_an_allowed_origin_sees_the_headers(trimmed: Backend) -> None:
    answer = get(trimmed, Origin="https://page.example")
    assert answer.headers["Access-Control-Expose-Headers"] == "Link, Newest, Kept-From"
    assert "Kept-From" in answer.headers


# ---- Readers that are overtaken -------------------------------------------------------------------------------------


@pytest.fixture
def database(url: str) -> service.Database:
    fill(url, 10_000, seconds_ago=2 * DAY)
    fill(url, 1)
    return service.Database(url, 1)


def read_window(
    database: service.Database, connection: Connection, deleting_before: str, nth: int, **asked: Any
) -> tuple[service.Window, Iterator[service.Part]]:
    """A window; 5,000 records are deleted right before the n-th time (from 1) that a statement is run for it."""
    statements: list[str] = []

    def read(sql: str, parameters: Any = None) -> Any:
        statements.append(sql)
        if sql == deleting_before and statements.count(sql) == nth:
            assert delete(connection, rows=5000)[0] == 5000
        return database.read(sql, parameters)

    window = service.Window(read, database.replication, {**service.parse_window({}), **asked}, b"\n")
    return window, window.parts()


def records_in(parts: list[service.Part]) -> int:
    return sum(part.text.count(b'{"id"') for part in parts)


def test_an_export_that_deleting_overtakes_fails(database: service.Database, connection: Connection) -> None:
    """Not told apart from the last part of a whole one, it would lack 1,000 records in the middle."""
    _, parts = read_window(database, connection, service.READ_PART, 2)
    assert next(parts).text.count(b'{"id"') == 4000
    with pytest.raises(service.Unavailable) as failed:
        list(parts)
    assert failed.value.description == service.OVERTAKEN
    _, parts = read_window(database, connection, "", 0)
    assert records_in(list(parts)) == 5001


def test_an_export_that_deleting_stays_behind_is_whole(database: service.Database, connection: Connection) -> None:
    _, parts = read_window(database, connection, service.READ_PART, 3)
    assert records_in(list(parts)) == 10_001


def test_the_first_part_of_all_that_is_kept_may_begin_later(database: service.Database, connection: Connection) -> None:
    window, parts = read_window(database, connection, service.READ_PART, 1)
    assert records_in(list(parts)) == 5001
    assert window.kept_from == kept_from(connection)


@pytest.mark.parametrize("statement", [service.READ_PART, service.COUNT_PART])
@pytest.mark.parametrize("limit", [None, 3])
def test_a_start_that_is_deleted_before_its_part_is_read_is_410(
    database: service.Database, connection: Connection, statement: str, limit: int | None
) -> None:
    if statement == service.COUNT_PART and limit is None:
        limit = 9000
    start = times(connection)[10]
    _, parts = read_window(database, connection, statement, 1, date_from=start, limit=limit)
    with pytest.raises(service.Gone) as gone:
        list(parts)
    assert gone.value.more == {"kept_from": text(kept_from(connection))}


def test_a_limit_counts_what_is_kept(database: service.Database, connection: Connection) -> None:
    window, parts = read_window(database, connection, service.COUNT_PART, 1, limit=4)
    assert records_in(list(parts)) == 4
    assert window.kept_from == kept_from(connection)


@pytest.mark.parametrize(("nth", "reason"), [(None, "Records of this window have expired"), (0, "Records before 20")])
def test_the_reply_of_an_export_that_is_overtaken_is_cut(
    start_backend: Callable[..., Backend], url: str, connection: Connection, nth: int | None, reason: str
) -> None:
    """Its reader pauses after the first bytes; what the sockets and the backend hold is less than what is deleted."""
    fill(url, 30_000, seconds_ago=2 * DAY, padding=2000)
    fill(url, 1)
    backend = start_backend(DATABASE_URL=url)
    address = urlsplit(backend.url)
    export = http.client.HTTPConnection(address.netloc, timeout=SECONDS)
    query = "" if nth is None else f"?date_from={text(times(connection)[nth])}"
    export.request("GET", f"/api/data{query}", headers={"Accept": "application/x-ndjson"})
    response = export.getresponse()
    body = response.read(1000)
    assert delete_all(connection) == 29_999
    with pytest.raises(http.client.IncompleteRead) as broken:
        response.read()
    body += broken.value.partial
    export.close()
    assert 0 < body.count(b"\n") < 29_999
    backend.wait_for_line(f"export aborted: {reason}")


# ---- The whole ------------------------------------------------------------------------------------------------------


def test_an_exporter_beside_it_loses_nothing(
    start_backend: Callable[..., Backend], start: Callable[..., Service], tmp_path: Path, shared: Path
) -> None:
    """The table holds what a second brings; the shared file has all of it.

    Nothing new is stored before the exporter has what is there: as age counts from the newest record, it is never too
    late, however long it stands still.
    """
    backend = start_backend(script=retaining(tmp_path, 1.0), RETENTION_DAYS=1)
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    sent: list[str] = []
    deadline = time.monotonic() + 60
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        while len(sent) - count(connection) < 3000:
            lines = some_lines(200, tag=f"t{len(sent)}")
            post_lines(backend, lines)
            sent += lines
            wait_until(partial(has_lines, shared, len(sent)), SECONDS, f"all lines; {exporter.printed}", poll=0.005)
            assert time.monotonic() < deadline, f"{count(connection)} records of {len(sent)} are still there"
    assert exporter.end() == 0
    records = read_records(shared)
    assert [record["log"]["uri"] for record in records] == [line.split()[2] for line in sent]
    assert all(one["created"] < other["created"] for one, other in pairwise(records))


def has_lines(file: Path, number: int) -> bool:
    return count_lines(file) >= number


def test_an_exporter_that_comes_too_late_says_so_and_ends(
    trimmed: Backend, start: Callable[..., Service], look: Connection, shared: Path
) -> None:
    """The file's last record was deleted long ago, and others after it that the file does not have."""
    log = {"ip": "192.0.2.1", "method": "GET", "uri": "/", "status_code": 200}
    last = {"id": str(uuid.uuid4()), "created": "2026-01-01T00:00:00.000000Z", "log": log}
    shared.write_text(json.dumps(last, separators=(",", ":")) + "\n")
    exporter = start("background.py", URL=trimmed.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    assert exporter.process.wait(SECONDS) == 1
    wanted = (
        f"ERROR.* of {last['created']}, and the database has deleted what was stored before {text(kept_from(look))}"
    )
    assert len(re.findall(wanted, exporter.printed)) == 1
    assert count_lines(shared) == 1


def sizes(connection: Connection) -> tuple[int, int]:
    """Of the table and of its indexes, in bytes."""
    [row] = connection.execute("SELECT pg_table_size('logs'), pg_indexes_size('logs')").fetchall()
    return row[0], row[1]


def test_under_a_steady_stream_the_table_and_its_indexes_do_not_grow(
    start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    """20 cycles: what came in the cycle before expires, and VACUUM runs once, as autovacuum does in time.

    A cycle whose space is not used again would add a fifth or more; a page more or less is where the keys fall.
    """
    day = 0.003  # the 3,000 records of one POST lie 1 µs apart
    nobody_counts = "import backend\nbackend.count_minutes = lambda session: None"  # VACUUM leaves what it still sees
    backend = start_backend(script=retaining(tmp_path, day, before=nobody_counts), RETENTION_DAYS=1)
    measured = []
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE logs SET (autovacuum_enabled = FALSE)")
        for cycle in range(20):
            post_lines(backend, some_lines(3000, tag=f"cycle{cycle}"))

            def rest(cycle: int = cycle) -> bool:
                return count(connection) == 3001 or cycle == 0

            wait_until(rest, SECONDS, "the end of the cycle before")
            connection.execute("VACUUM logs")
            measured.append(sizes(connection))
        assert kept_from(connection) is not None
    for sizes_of_one in zip(*measured, strict=True):
        assert max(sizes_of_one[6:]) <= 1.05 * max(sizes_of_one[:6]), measured
