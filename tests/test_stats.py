"""GET /api/stats: its numbers are those of the records that GET /api/data gives, however they are counted."""

from __future__ import annotations

import json
import random
import threading
import uuid
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
import pytest
import requests
from fakes import post_lines, some_lines
from harness import ROOT, Backend, Postgres, backend_command, backend_with, kill, past_the_guard
from waiting import wait_until

import backend as service

SECONDS = 30
IMPATIENT = f"-c statement_timeout={SECONDS}s"  # what should not wait fails instead
MINUTE, MICROSECOND = timedelta(minutes=1), timedelta(microseconds=1)
Connection = psycopg.Connection[Any]
Record = dict[str, Any]
Stats = dict[str, Any]

BEGIN = datetime(2026, 1, 1, 12, 0, 17, 250_000, tzinfo=UTC)
METHODS = ["GET", "GET", "GET", "POST", "PUT", "get", "BREW", "PROPFIND"]
STATUS_CODES = [100, 200, 200, 200, 204, 301, 404, 404, 418, 503, 599]
IPS = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "::1", "2001:db8::8"]
INSERT = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), created, ip, method, uri, status_code
  FROM unnest(%s::timestamptz[], %s::inet[], %s::text[], %s::text[], %s::smallint[])
       AS line (created, ip, method, uri, status_code)
"""


def put(url: str, moments: list[datetime], dice: random.Random) -> None:
    """A record for each moment, with values by chance."""
    columns = [
        moments,
        [dice.choice(IPS) for _ in moments],
        [dice.choice(METHODS) for _ in moments],
        [f"/{dice.choice('abcÀ')}?<{dice.randrange(20)}>" for _ in moments],
        [dice.choice(STATUS_CODES) for _ in moments],
    ]
    with past_the_guard(url) as connection:
        connection.execute(INSERT, columns)


def some_moments(count: int, minutes: float, dice: random.Random) -> list[datetime]:
    """From BEGIN on: in clusters with gaps, and at the very edges of minutes."""
    moments: set[datetime] = set()
    while len(moments) < count:
        moment = BEGIN + timedelta(minutes=dice.choice([dice.random() ** 3, dice.random()]) * minutes)
        if dice.random() < 0.2:
            moment = moment.replace(second=0, microsecond=0) + dice.choice([-1, 0, 0, 1]) * MICROSECOND
        moments.add(moment)
    return sorted(moments)


def as_query(window: dict[str, Any]) -> dict[str, str]:
    return {
        name: service.format_date(value) if isinstance(value, datetime) else str(value)
        for name, value in window.items()
    }


def without_limits(window: dict[str, Any]) -> dict[str, Any]:
    """What of it /api/data knows."""
    return {name: value for name, value in window.items() if name not in ("buckets", "top")}


def stats_of(backend: Backend, **window: Any) -> Stats:
    answer = requests.get(f"{backend.url}/api/stats", params=as_query(window), timeout=SECONDS)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json"), answer.text
    return dict(answer.json())


def records_of(backend: Backend, **window: Any) -> list[Record]:
    answer = requests.get(backend.data_url, params=as_query(window), timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    return list(answer.json())


def count_by(records: list[Record], name: str) -> Counter[Any]:
    return Counter(record["log"][name] for record in records)


def assert_counts(stats: Stats, records: list[Record], top: int = 10, most: int = 1_000_000) -> None:
    """The numbers of a reply are those of its records; `top` addresses and URIs are listed, of the newest `most`."""
    assert stats["total"] == len(records)
    assert stats["methods"] == count_by(records, "method")
    assert list(stats["methods"].values()) == sorted(stats["methods"].values(), reverse=True)
    assert stats["status_codes"] == {str(code): n for code, n in count_by(records, "status_code").items()}
    assert list(stats["status_codes"]) == sorted(stats["status_codes"])
    starts = [bucket["date_from"] for bucket in stats["buckets"]]
    classes = Counter((bisect(starts, one["created"]) - 1, one["log"]["status_code"] // 100) for one in records)
    assert [[bucket[f"{n}xx"] for n in range(1, 6)] for bucket in stats["buckets"]] == [
        [classes[place, n] for n in range(1, 6)] for place in range(len(starts))
    ]
    newest = records[-most:]
    assert stats["top_of"] == len(newest)
    for name, listed in (("ip", stats["top_ips"]), ("uri", stats["top_uris"])):
        counts = count_by(newest, name)
        assert [one["count"] for one in listed] == [count for _, count in counts.most_common(top)]
        assert all(counts[one[name]] == one["count"] for one in listed)
        assert len({one[name] for one in listed}) == len(listed)


def assert_buckets(stats: Stats, number: int) -> None:
    """They are as many as were asked for, without a gap, and of the same width: exactly, or to the minute."""
    edges = [datetime.fromisoformat(bucket["date_from"]) for bucket in stats["buckets"]]
    edges.append(datetime.fromisoformat(stats["buckets"][-1]["date_to"]))
    assert len(stats["buckets"]) == number
    assert (stats["buckets"][0]["date_from"], stats["buckets"][-1]["date_to"]) == (stats["date_from"], stats["date_to"])
    assert all(one["date_to"] == following["date_from"] for one, following in pairwise(stats["buckets"]))
    span = edges[-1] - edges[0]
    if span < number * MINUTE:
        assert all(abs(edge - edges[0] - n * span / number) <= MICROSECOND for n, edge in enumerate(edges))
    else:
        assert all(edge.second == edge.microsecond == 0 for edge in edges[1:-1])
        assert all(abs(edge - edges[0] - n * span / number) <= MINUTE / 2 for n, edge in enumerate(edges))


def a_window(moments: list[datetime], dice: random.Random) -> dict[str, Any]:
    """Of any length, at the edges of minutes or anywhere, some of it before or after all records; with some filters."""
    first, last = moments[0] - 3 * MINUTE, moments[-1] + 3 * MINUTE
    points = [first + dice.random() * (last - first) for _ in range(2)]
    points += [dice.choice(moments) + dice.choice([0, 0, 1]) * MICROSECOND for _ in range(2)]
    points += [point.replace(second=0, microsecond=0) for point in points]
    date_from, date_to = sorted(dice.sample(points, 2))
    window: dict[str, Any] = {"date_from": date_from, "date_to": date_to, "buckets": dice.choice([1, 2, 7, 60, 300])}
    filters: dict[str, list[Any]] = {"method": METHODS, "status_code": [*STATUS_CODES, 201], "ip": [*IPS, "192.0.2.9"]}
    for name in dice.sample(list(filters), dice.choice([0, 0, 1, 1, 2, 3])):
        window[name] = dice.choice(filters[name])
    return window


def assert_exact(backend: Backend, window: dict[str, Any]) -> None:
    """What is counted in a window is what /api/data gives of it, as long as its end is below the newest record."""
    stats = stats_of(backend, **window)
    assert_counts(stats, records_of(backend, **without_limits(window)))
    assert_buckets(stats, window["buckets"])


def numbers_and_records(database: service.Database, window: dict[str, Any]) -> tuple[Stats, list[Record]]:
    """Without a process in between, which would count in the background."""
    stats = service.read_stats(database.read, database.replication, service.parse_stats(as_query(window)))
    asked = service.parse_window(as_query(without_limits(window)))
    records = b"".join(
        part.text + b"\n" for part in service.Window(database.read, database.replication, asked, b"\n").parts()
    )
    return stats, [json.loads(record) for record in records.split()]


def assert_exact_in(database: service.Database, window: dict[str, Any]) -> None:
    stats, records = numbers_and_records(database, window)
    assert_counts(stats, records)
    assert_buckets(stats, window["buckets"])


# ---- Exact ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(start_shared: Callable[..., Backend]) -> tuple[Backend, list[datetime]]:
    """A backend on a table of 3,000 records in two hours, and their times."""
    backend = start_shared()
    moments = some_moments(3000, 120, random.Random(1))
    put(backend.database_url, moments, random.Random(2))
    return backend, moments


@pytest.mark.parametrize("seed", range(2))
def test_the_numbers_are_those_of_the_records(counted: tuple[Backend, list[datetime]], seed: int) -> None:
    backend, moments = counted
    dice = random.Random(seed)
    for _ in range(40):
        assert_exact(backend, a_window(moments, dice))


def test_left_out_it_begins_with_the_first_minute_and_ends_now(counted: tuple[Backend, list[datetime]]) -> None:
    backend, moments = counted
    before = datetime.now(UTC)
    for start in ({}, {"date_from": 0}, {"date_from": "-1"}, {"date_from": "1000-01-01"}):
        stats = stats_of(backend, **start)
        assert datetime.fromisoformat(stats["date_from"]) == moments[0].replace(second=0, microsecond=0)
        assert before <= datetime.fromisoformat(stats["date_to"]) <= datetime.now(UTC)
        assert_counts(stats, records_of(backend))
        assert_buckets(stats, 60)


def test_of_an_empty_table_everything_is_zero(backend: Backend) -> None:
    for window in ({}, {"date_from": "2026-01-01"}, {"date_from": "2026-01-01", "date_to": "2026-01-02"}):
        stats = stats_of(backend, **window)
        assert_counts(stats, [])
        assert len(stats["buckets"]) == 60


@pytest.mark.parametrize(
    "window",
    [
        {"date_from": "2026-01-01T12:30:00Z", "date_to": "2026-01-01T12:30:00Z"},
        {"date_from": "2026-01-02", "date_to": "2026-02-01"},
        {"date_from": "2999-01-01"},
        {"date_from": "9999-12-31T23:59:59.999999Z"},
        {"date_from": "1970-01-02", "date_to": "1980-01-01", "buckets": 1000},
        {"date_from": "1000-01-01", "date_to": "1000-01-02"},
        {"date_to": "1970-01-01"},
    ],
    ids=str,
)
def test_a_window_without_records_is_zeros(counted: tuple[Backend, list[datetime]], window: dict[str, Any]) -> None:
    stats = stats_of(counted[0], **window)
    assert_counts(stats, [])
    assert len(stats["buckets"]) == window.get("buckets", 60)


def test_a_window_of_all_years_has_its_records_in_one_bucket(counted: tuple[Backend, list[datetime]]) -> None:
    window = {"date_from": "1970-01-02", "date_to": "9999-12-31T23:59:59.999999Z", "buckets": 300}
    stats = stats_of(counted[0], **window)
    assert_buckets(stats, 300)
    assert [sum(bucket[f"{n}xx"] for n in range(1, 6)) for bucket in stats["buckets"]].count(3000) == 1


@pytest.mark.parametrize("top", [0, 1, 3, 100])
def test_as_many_addresses_and_uris_are_listed_as_were_asked_for(
    counted: tuple[Backend, list[datetime]], top: int
) -> None:
    backend, _ = counted
    assert_counts(stats_of(backend, top=top), records_of(backend), top)


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("buckets=0", "buckets"),
        ("buckets=1001", "buckets"),
        ("top=101", "top"),
        ("top=-1", "top"),
        ("top=1&top=2", "top"),
        ("limit=5", "limit"),
        ("method=G(T", "method"),
        ("date_from=2026", "date_from"),
        ("date_from=2026-01-02&date_to=2026-01-01", "date_from"),
    ],
)
def test_a_wrong_parameter_is_400_and_named(counted: tuple[Backend, list[datetime]], query: str, wrong: str) -> None:
    answer = requests.get(f"{counted[0].url}/api/stats?{query}", timeout=SECONDS)
    assert (answer.status_code, answer.headers["Content-Type"]) == (400, "application/problem+json")
    assert wrong in answer.json()["detail"]


def test_head_is_get_without_the_body(counted: tuple[Backend, list[datetime]]) -> None:
    backend, moments = counted
    window = f"?date_from={moments[0]:%Y-%m-%d}&date_to={moments[-1]:%Y-%m-%dT%H:%M}"
    got = requests.get(f"{backend.url}/api/stats{window}", timeout=SECONDS)
    head = requests.head(f"{backend.url}/api/stats{window}", timeout=SECONDS)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == got.headers["Content-Length"]


@pytest.mark.parametrize("filters", [{}, {"ip": "192.0.2.1"}, {"status_code": 200}, {"ip": "::1", "method": "GET"}])
def test_addresses_and_uris_are_counted_over_the_newest_and_it_is_said_over_how_many(
    counted: tuple[Backend, list[datetime]], monkeypatch: pytest.MonkeyPatch, filters: dict[str, Any]
) -> None:
    monkeypatch.setattr(service, "STATS_ROWS", 50)
    stats, records = numbers_and_records(service.Database(counted[0].database_url, 1), {"buckets": 60, **filters})
    assert len(records) > 50
    assert_counts(stats, records[-50:] if "ip" in filters else records, most=50)


# ---- The table of minutes -------------------------------------------------------------------------------------------

IN_LOGS = """
SELECT minute_of(created), method, status_code, count(*)
  FROM logs
 WHERE created < counted_to_v1()
   AND minute_of(created) >= coalesce(kept_from_v1(), '-infinity')
 GROUP BY 1, 2, 3
"""
IN_MINUTES = """
SELECT minute, method, status_code, count
  FROM minutes
 WHERE minute >= coalesce(kept_from_v1(), '-infinity')
"""
DIFFERENCES = f"(({IN_LOGS}) EXCEPT ALL ({IN_MINUTES})) UNION ALL (({IN_MINUTES}) EXCEPT ALL ({IN_LOGS}))"


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create_logs()


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True, options=IMPATIENT) as connection:
        yield connection


def query(connection: Connection, sql: str, *parameters: Any) -> Any:
    """The first value."""
    [(value, *_)] = connection.execute(sql.encode(), parameters).fetchall()
    return value


def count_step(connection: Connection, rows: int = 1_000_000) -> int | None:
    """How many records a step has counted; None if another session is at it."""
    number: int | None = query(connection, "SELECT counted FROM count_minutes_v1(%s)", rows)
    return number


def delete_step(connection: Connection, kept: timedelta, rows: int = 1000) -> int | None:
    """One step of retention, which keeps so much before the newest record; how many records have gone."""
    number: int | None = query(connection, "SELECT deleted FROM delete_expired_v1(%s, %s)", kept, rows)
    return number


def assert_true_counts(connection: Connection, counted: int) -> None:
    """So many records are in the table of minutes, each where it belongs."""
    assert connection.execute(DIFFERENCES.encode()).fetchall() == []
    assert query(connection, f"SELECT coalesce(sum(count), 0) FROM ({IN_MINUTES}) AS counts") == counted


def test_the_numbers_are_exact_whatever_has_been_counted_so_far(url: str, connection: Connection) -> None:
    dice = random.Random(1)
    moments = some_moments(500, 20, dice)
    put(url, moments, dice)
    database = service.Database(url, 1)
    for step in range(12):
        assert_true_counts(connection, min(step * 47, 500))
        for _ in range(6):
            assert_exact_in(database, a_window(moments, dice))
        assert count_step(connection, 47) == max(0, min(47, 500 - step * 47))
    assert_true_counts(connection, 500)


def test_what_is_counted_is_read_in_minutes_and_not_again_in_records(url: str, connection: Connection) -> None:
    """With every number of the table of minutes doubled, whole minutes count double."""
    put(url, some_moments(500, 20, random.Random(1)), random.Random(2))
    count_step(connection, 400)
    counted_to = query(connection, "SELECT counted_to_v1()")
    connection.execute("UPDATE minutes SET count = 2 * count")
    database = service.Database(url, 1)

    def total(**window: Any) -> int:
        return int(
            service.read_stats(database.read, database.replication, service.parse_stats(as_query(window)))["total"]
        )

    assert total(buckets=1) == 900
    assert total(buckets=1, date_to=counted_to) == 800
    assert total(date_to="2026-01-01T12:21Z") == 500  # a third of a minute each
    assert total(ip="::1") == query(connection, "SELECT count(*) FROM logs WHERE ip = '::1'")
    for start, end, buckets, factor in ((2, 7, 5, 2), (2, 7, 6, 1), (2.5, 3.4, 1, 1), (2, 2.9, 1, 1), (2, 3, 1, 2)):
        begin = BEGIN.replace(second=0, microsecond=0)
        window = {"date_from": begin + start * MINUTE, "date_to": begin + end * MINUTE}
        records = query(connection, "SELECT count(*) FROM logs WHERE created >= %s AND created < %s", *window.values())
        assert records > 0
        assert total(**window, buckets=buckets) == factor * records


def test_one_session_counts_at_a_time_and_the_others_do_not_wait(url: str, connection: Connection) -> None:
    put(url, some_moments(100, 5, random.Random(1)), random.Random(2))
    with psycopg.connect(url) as other:
        assert count_step(other, 40) == 40
        assert count_step(connection, 40) is None
        assert_true_counts(connection, 0)
        other.rollback()
    assert count_step(connection, 40) == 40
    assert_true_counts(connection, 40)


def test_storing_and_counting_do_not_wait_for_each_other(url: str, connection: Connection) -> None:
    store = "SELECT first_created FROM store_logs_v2(%s::uuid[], %s::inet[], %s::text[], %s::text[], %s::smallint[])"
    lines = [[[str(uuid.uuid4())], ["::1"], ["GET"], [f"/{n}"], [200]] for n in range(2)]
    connection.execute(store, lines[0])
    with psycopg.connect(url, options=IMPATIENT) as counter, psycopg.connect(url, options=IMPATIENT) as sender:
        assert count_step(counter) == 1
        sender.execute(store, lines[1])
        sender.execute(store, lines[0])  # sent again
        counter.rollback()
        assert count_step(counter) == 1
        counter.commit()
        sender.commit()
    assert count_step(connection) == 1
    assert_true_counts(connection, 2)


def test_a_reply_is_of_one_snapshot(url: str, connection: Connection) -> None:
    """While others count, delete and have all counted anew, each statement counts the records that it sees."""
    moments = some_moments(3000, 30, random.Random(1))
    put(url, moments, random.Random(2))
    look = """
    SELECT (SELECT sum((one ->> 1)::bigint)
              FROM json_array_elements(
                       stats_counts_v1('1970-01-02Z', '2999-01-01Z', NULL, NULL, NULL, '{}', 1000000) -> 'methods'
                   ) AS one),
           (SELECT count(*) FROM logs), counted_to_v1()::text
    """

    looks = 0

    def change() -> None:
        for step in range(300):
            count_step(connection, 37)
            delete_step(connection, 10 * MINUTE, rows=5)
            if step % 100 == 99:
                connection.execute("DELETE FROM logs WHERE FALSE")
            if step % 20 == 0:  # however slow the reader is, it sees this
                wait_until(lambda enough=looks + 2: looks >= enough, SECONDS, "a look", poll=0.001)  # type: ignore[misc]

    seen = set()
    with psycopg.connect(url, autocommit=True) as reader, ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        while not changing.done():
            [(counted, there, counted_to)] = reader.execute(look.encode()).fetchall()
            assert counted == there
            seen.add((there, counted_to))
            looks += 1
        changing.result()
    assert len(seen) > 10


def test_a_session_that_is_ended_while_it_counts_has_counted_nothing(url: str, connection: Connection) -> None:
    put(url, some_moments(100, 5, random.Random(1)), random.Random(2))
    assert count_step(connection, 40) == 40
    with suppress(psycopg.errors.AdminShutdown), psycopg.connect(url) as ended:
        assert count_step(ended, 40) == 40
        connection.execute("SELECT pg_terminate_backend(%s)", [ended.info.backend_pid])
        wait_until(lambda: count_step(connection, 0) is not None, SECONDS, "the lock of the ended session")
    assert_true_counts(connection, 40)


def test_a_step_costs_what_it_counts_however_much_was_counted_before(url: str, connection: Connection) -> None:
    put(url, some_moments(10_000, 600, random.Random(1)), random.Random(2))
    explain = b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT count_minutes_v1(100)"
    costs = []
    with psycopg.connect(url) as backup:  # keeps all versions alive
        backup.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        backup.execute("SELECT count(*) FROM logs")
        while query(connection, "SELECT counted_to_v1() <= max(created) FROM logs"):
            [(plans,)] = connection.execute(explain).fetchall()
            costs.append(plans[0]["Plan"]["Shared Hit Blocks"] + plans[0]["Plan"]["Shared Read Blocks"])
    assert len(costs) == 100
    # Before that the index has one page. A single step may also read anew what the session knew of the schema.
    assert median(costs[-10:]) <= 1.3 * median(costs[20:30])


# ---- What changes the past ------------------------------------------------------------------------------------------


def test_retention_takes_the_counts_with_the_records(url: str, connection: Connection) -> None:
    """And no others. Also where `kept_from` is inside of a minute, where retention is ahead of counting, and where a
    backend from before deletes, by the same function."""
    dice = random.Random(3)
    moments = some_moments(600, 30, dice)
    put(url, moments, dice)
    database = service.Database(url, 1)
    gone = 0
    while True:
        if gone > 100:  # counting is behind, then it catches up, then it is ahead
            count_step(connection, 40)
        counted_to = query(connection, "SELECT counted_to_v1()::text")
        deleted = delete_step(connection, 4 * MINUTE, rows=23)
        if not deleted:
            break
        gone += deleted
        kept_from = query(connection, "SELECT kept_from_v1()")
        assert query(connection, "SELECT count(*) FROM minutes WHERE minute < %s", kept_from) == 0
        assert query(connection, "SELECT counted_to_v1()::text") == counted_to
        assert connection.execute(DIFFERENCES.encode()).fetchall() == []
        asked = a_window(moments, dice)
        assert_exact_in(database, asked | {"date_from": max(kept_from, asked["date_from"]), "date_to": moments[-1]})
        assert_exact_in(database, {"date_to": moments[-1], "buckets": 7})
    assert gone > 400


def test_retention_waits_for_counts_that_it_has_to_delete(url: str, connection: Connection) -> None:
    moments = some_moments(600, 30, random.Random(1))
    put(url, moments, random.Random(2))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    with (
        psycopg.connect(url) as counter,
        psycopg.connect(url, autocommit=True, options=IMPATIENT) as deleter,
        ThreadPoolExecutor(1) as pool,
    ):
        assert count_step(counter, 300) == 300
        deleted = pool.submit(delete_step, deleter, 4 * MINUTE, rows=200)
        wait_until(lambda: deleted.done() or query(connection, waiting), SECONDS, "the step of retention")
        counter.commit()
        assert deleted.result() == 200
    assert query(connection, "SELECT count(*) FROM minutes WHERE minute < kept_from_v1()") == 0
    assert query(connection, "SELECT count(*) FROM minutes") > 0


def test_a_start_before_what_is_kept_is_410_and_left_out_it_is_what_is_kept(
    start_backend: Callable[..., Backend], url: str, connection: Connection
) -> None:
    moments = some_moments(600, 30, random.Random(1))
    put(url, moments, random.Random(2))
    assert delete_step(connection, MINUTE, rows=300)
    backend = start_backend(DATABASE_URL=url)
    kept_from = service.format_date(query(connection, "SELECT kept_from_v1()"))
    gone = requests.get(f"{backend.url}/api/stats?date_from=2026-01-01T12:00:00Z", timeout=SECONDS)
    assert (gone.status_code, gone.headers["Content-Type"]) == (410, "application/problem+json")
    assert gone.json()["kept_from"] == kept_from
    stats = stats_of(backend)
    assert stats["date_from"] >= kept_from
    assert_counts(stats, records_of(backend))
    assert stats_of(backend, date_from=stats["date_from"], date_to=stats["date_to"]) == stats


BY_HAND = {
    "some are deleted": "DELETE FROM logs WHERE status_code = 200",
    "all are deleted": "DELETE FROM logs",
    "the table is emptied": "TRUNCATE logs",
    "deleted past the guard": "SET session_replication_role = replica; DELETE FROM logs WHERE status_code = 200",
    "changed past the guard": "SET session_replication_role = replica; UPDATE logs SET method = 'PUT'",
    "inserted past the guard": "SET session_replication_role = replica; INSERT INTO logs SELECT gen_random_uuid(), "
    "created + interval '100 microseconds', ip, method, uri, status_code FROM logs WHERE status_code = 404",
}


@pytest.mark.parametrize("change", BY_HAND.values(), ids=BY_HAND)
def test_what_is_changed_by_hand_is_counted_anew(url: str, connection: Connection, change: str) -> None:
    """Also by new records that are older, after the clock was set back and the table emptied."""
    dice = random.Random(1)
    moments = some_moments(500, 20, dice)
    put(url, moments, dice)
    database = service.Database(url, 1)
    assert count_step(connection) == 500
    before = query(connection, "SELECT count(*) FROM logs WHERE method = 'PUT'")
    connection.execute(change.encode())
    for _ in range(2):
        assert_exact_in(database, {"buckets": 3})
        assert_exact_in(database, a_window(moments, dice))
        count_step(connection)
    assert query(connection, "SELECT count(*) FROM logs") != 500 or before < 500
    assert_true_counts(connection, query(connection, "SELECT count(*) FROM logs"))
    if query(connection, "SELECT count(*) FROM logs") == 0:
        put(url, [moment - 60 * MINUTE for moment in moments], dice)
        assert count_step(connection) == 500
        assert_exact_in(database, {"buckets": 3})


def test_what_is_mended_with_the_guard_off_is_counted_anew(url: str, connection: Connection) -> None:
    put(url, some_moments(500, 20, random.Random(1)), random.Random(2))
    assert count_step(connection) == 500
    connection.execute("ALTER TABLE logs DISABLE TRIGGER logs_guard")
    connection.execute("UPDATE logs SET method = 'PATCH' WHERE status_code = 404")
    connection.execute("ALTER TABLE logs ENABLE TRIGGER logs_guard")
    assert_exact_in(service.Database(url, 1), {"buckets": 3})
    assert count_step(connection) == 500
    assert_true_counts(connection, 500)


def test_storing_keeps_the_counts_however_triggers_were_enabled(url: str, connection: Connection) -> None:
    """pg_restore --disable-triggers ends by enabling all of them, which is not what they were."""
    put(url, some_moments(500, 20, random.Random(1)), random.Random(2))
    connection.execute("ALTER TABLE logs DISABLE TRIGGER ALL")
    connection.execute("ALTER TABLE logs ENABLE TRIGGER ALL")
    assert count_step(connection) == 500
    line = "ARRAY[gen_random_uuid()], '{::1}', '{GET}', '{/}', '{200}'"
    connection.execute(f"SELECT store_logs_v2({line})".encode())
    assert_true_counts(connection, 500)
    assert_exact_in(service.Database(url, 1), {"buckets": 3})
    assert count_step(connection) == 1


def test_a_change_by_hand_that_is_taken_back_changes_no_count(url: str, connection: Connection) -> None:
    put(url, some_moments(500, 20, random.Random(1)), random.Random(2))
    assert count_step(connection, 300) == 300
    with psycopg.connect(url) as other:
        other.execute("DELETE FROM logs WHERE status_code = 200")
        assert count_step(connection) is None  # nobody counts what may go
        other.rollback()
    assert_true_counts(connection, 300)
    assert count_step(connection) == 200


def test_counting_retention_and_changes_by_hand_wait_in_no_circle(url: str) -> None:
    """PostgreSQL would end one of them, as a deadlock."""
    moments = some_moments(2000, 30, random.Random(1))
    done = threading.Event()
    steps: list[Callable[[Connection], object]] = [
        lambda connection: count_step(connection, 100),
        lambda connection: delete_step(connection, 10 * MINUTE, rows=10),
        lambda connection: connection.execute("DELETE FROM logs WHERE uri = '/a?<1>'"),
    ]
    turns = [0] * len(steps)

    def again_and_again(number: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not done.is_set():
                steps[number](connection)
                turns[number] += 1

    def empty_and_fill() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("TRUNCATE logs")
            put(url, moments, random.Random(2))
            connection.execute("DELETE FROM logs WHERE status_code = 404")

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(again_and_again, number) for number in range(len(steps))]
        rounds = 0
        try:  # until each of them has met the others, however slow it is
            while rounds < 10 or (min(turns) <= 10 and not any(one.done() for one in others)):
                empty_and_fill()
                rounds += 1
        finally:
            done.set()
        for one in others:
            one.result()
    with psycopg.connect(url, autocommit=True) as connection:
        while count_step(connection):
            pass
        assert connection.execute(DIFFERENCES.encode()).fetchall() == []


def test_taken_back_retention_is_what_it_was(postgres: Postgres) -> None:
    url = postgres.create_logs()
    definition = "SELECT pg_get_functiondef('delete_expired_v1(interval, integer)'::regprocedure)"
    with psycopg.connect(url, autocommit=True) as connection:
        while query(connection, "SELECT to_regclass('minutes') IS NOT NULL"):
            backend_command("rollback", url)
        taken_back = query(connection, definition)
        connection.execute((ROOT / "migrations/0010.create-retention.sql").read_bytes())
        assert query(connection, definition) == taken_back


# ---- The backend ----------------------------------------------------------------------------------------------------


def test_killed_while_it_counts_it_goes_on_where_it_was(
    start_backend: Callable[..., Backend], tmp_path: Path, url: str, connection: Connection
) -> None:
    put(url, some_moments(20_000, 600, random.Random(1)), random.Random(2))
    counted = "SELECT coalesce(sum(count), 0)::bigint FROM minutes"
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    script = backend_with(tmp_path, COUNTING_STEP_ROWS=20)  # of 1,000 steps most are left, should the kill come late
    killed_at = [0]
    for _ in range(3):
        backend = start_backend(script=script, DATABASE_URL=url)
        wait_until(lambda: query(connection, counted) >= killed_at[-1] + 200, SECONDS, "some counts", poll=0.001)
        kill(backend)
        wait_until(lambda: query(connection, others) == 0, SECONDS, "the end of its sessions")
        killed_at.append(query(connection, counted))
        assert_true_counts(connection, killed_at[-1])
    assert killed_at[-1] < 20_000
    start_backend(script=backend_with(tmp_path), DATABASE_URL=url)
    wait_until(lambda: query(connection, counted) == 20_000, SECONDS, "the rest")
    assert_true_counts(connection, 20_000)


FAST_CLOCK = r"""
DO $$
DECLARE
    fast text := format('(%L::timestamptz + (clock_timestamp() - %1$L) * 600)', clock_timestamp());
BEGIN
    EXECUTE replace(pg_get_functiondef('store_logs_v2'::regproc), 'clock_timestamp()', fast);
    EXECUTE replace(pg_get_functiondef('delete_expired_v1'::regproc), 'clock_timestamp()', fast);
END
$$
"""


def test_beside_an_inserter_counting_and_retention_all_is_exact(
    start_backend: Callable[..., Backend], tmp_path: Path, url: str, connection: Connection
) -> None:
    """Two backends count and delete, ten minutes pass in a second, and both answer for windows that are closed."""
    connection.execute(FAST_CLOCK.encode())
    script = backend_with(
        tmp_path, COUNTING_STEP_ROWS=50, COUNTING_PAUSE_SECONDS=0.01, DAY_SECONDS=900, EXPIRY_PAUSE_SECONDS=0.02
    )
    both = [start_backend(script=script, DATABASE_URL=url, RETENTION_DAYS=1) for _ in range(2)]
    done = threading.Event()
    inserted = 0

    def insert() -> None:
        nonlocal inserted
        while not done.is_set():
            post_lines(both[inserted % 2], some_lines(20, tag=f"t{inserted}"))
            inserted += 1

    dice = random.Random(1)
    exact = overtaken = 0
    with ThreadPoolExecutor(1) as pool:
        inserting = pool.submit(insert)
        try:
            wait_until(lambda: query(connection, "SELECT kept_from_v1()") is not None, SECONDS, "the first deletion")
            while exact < 40 or (inserted <= 10 and not inserting.done()):
                moments = [row[0] for row in connection.execute("SELECT created FROM logs ORDER BY created").fetchall()]
                window = a_window(moments, dice)
                window["date_to"] = min(window["date_to"], moments[-1])
                oldest = moments[min(5 + 10 * overtaken, len(moments) // 2)]  # of 1.5 s, the slower the younger
                window["date_from"] = min(max(window["date_from"], oldest), window["date_to"])
                try:
                    assert_exact(dice.choice(both), window)
                    exact += 1
                except AssertionError as error:
                    if '"status": 410' not in str(error):
                        raise
                    overtaken += 1
                    assert overtaken < 400
        finally:
            done.set()
        inserting.result()
    assert query(connection, "SELECT count(*) FROM minutes") > 0
    assert query(connection, "SELECT count(*) FROM minutes WHERE minute < minute_of(kept_from_v1())") == 0
    assert connection.execute(DIFFERENCES.encode()).fetchall() == []
