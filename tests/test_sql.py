"""What the schema promises by itself, whoever calls it, in whatever session: storing, the guard, and reading."""

from __future__ import annotations

import json
import random
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness import Postgres, new_postgres, past_the_guard, standby_of
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import namedtuple_row
from waiting import wait_until

SECONDS = 60
MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Connection = psycopg.Connection[Any]
Line = tuple[str, str, str, str, int]  # id, IP, method, URI, status

STORE = "SELECT * FROM store_logs_v2(%s::uuid[], %s::inet[], %s::text[], %s::text[], %s::smallint[])"
STORE_V1 = "SELECT * FROM store_logs(%s::uuid[], %s::inet[], %s::text[], %s::text[], %s::smallint[])"
INSERT = "INSERT INTO logs (id, created, ip, method, uri, status_code) VALUES (%s, %s, '1.2.3.4', 'GET', '/past', 200)"
ROWS = "SELECT id::text, created, host(ip) AS ip, method, uri, status_code FROM logs ORDER BY created"


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create_logs()


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    """Each statement is a transaction of its own."""
    with psycopg.connect(url, autocommit=True, row_factory=namedtuple_row) as connection:
        yield connection


def line(uri: str = "/a", ip: str = "1.2.3.4", method: str = "GET", status: int = 200, name: str = "") -> Line:
    return (name or str(uuid.uuid4()), ip, method, uri, status)


def store(connection: Connection, *lines: Line, statement: str = STORE) -> Any:
    columns = [list(column) for column in zip(*lines, strict=True)] or [[]] * 5
    return connection.execute(statement.encode(), columns).fetchone()


def rows(connection: Connection) -> list[Any]:
    return connection.execute(ROWS).fetchall()


# ---- Storing --------------------------------------------------------------------------------------------------------


def test_lines_are_stored_a_microsecond_apart_in_their_order(connection: Connection) -> None:
    lines = [line(f"/{n}") for n in range(5)]
    stored = store(connection, *lines)
    assert (stored.known, stored.known_created, stored.conflicting) == (None, None, None)
    assert rows(connection) == [
        (name, stored.first_created + n * MICROSECOND, *rest) for n, (name, *rest) in enumerate(lines)
    ]
    assert store(connection).first_created > stored.first_created + 4 * MICROSECOND
    assert len(rows(connection)) == 5


def test_the_same_line_under_the_same_id_is_known_however_its_address_is_written(connection: Connection) -> None:
    first = line(ip="::1")
    created = store(connection, first).first_created
    again = store(connection, line(), (first[0], "0:0:0:0:0:0:0:1", *first[2:]))
    assert (again.known, again.known_created, again.conflicting) == ([2], [created], None)
    assert [row.id == first[0] for row in rows(connection)] == [True, False]


@pytest.mark.parametrize(
    "different", [{"ip": "1.2.3.5"}, {"ip": "::1"}, {"method": "get"}, {"uri": "/A"}, {"status": 201}], ids=str
)
def test_another_line_under_the_same_id_is_told_and_stored_nowhere(
    connection: Connection, different: dict[str, Any]
) -> None:
    first = line()
    store(connection, first)
    stored = store(connection, line(name=first[0], **different), line("/b"))
    assert (stored.known, stored.known_created, stored.conflicting) == (None, None, [1])
    assert [row.uri for row in rows(connection)] == ["/a", "/b"]


def test_an_id_that_stands_twice_in_a_call_is_compared_with_its_first_line(connection: Connection) -> None:
    first = line()
    stored = store(connection, line("/b"), first, first, line("/c", name=first[0]))
    assert (stored.known, stored.conflicting) == ([3], [4])
    assert stored.known_created == [stored.first_created + MICROSECOND]
    assert [row.uri for row in rows(connection)] == ["/b", "/a"]


def test_the_first_version_of_the_function_stores_as_it_did(connection: Connection) -> None:
    first = line()
    created = store(connection, first, statement=STORE_V1)
    assert (created.repeated, created.repeated_created) == (None, None)
    again = store(connection, line("/b"), line("/c", name=first[0]), first, statement=STORE_V1)
    assert (again.repeated, again.repeated_created) == ([2, 3], [created.first_created] * 2)
    assert [row.uri for row in rows(connection)] == ["/a", "/b"]


@pytest.mark.parametrize("statement", [STORE, STORE_V1], ids=["v2", "v1"])
@pytest.mark.parametrize(
    ("session", "used"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_a_commit_is_on_disk_whatever_the_session_is_set_to(
    connection: Connection, session: str, used: str, statement: str
) -> None:
    connection.execute(f"SET synchronous_commit = {session}".encode())
    with connection.transaction():
        store(connection, line(), statement=statement)
        assert connection.execute("SHOW synchronous_commit").fetchone() == (used,)
    assert connection.execute("SHOW synchronous_commit").fetchone() == (session,)


def test_a_commit_of_a_session_without_durability_is_flushed_all_the_same(connection: Connection) -> None:
    connection.execute("SET synchronous_commit = off")
    with connection.transaction():
        store(connection, line())
        written = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    assert connection.execute("SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn", written).fetchone() == (True,)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_old_snapshot_is_refused_with_what_to_do(connection: Connection, level: str) -> None:
    connection.execute(f"SET default_transaction_isolation = '{level}'".encode())
    with pytest.raises(psycopg.Error, match=r"READ COMMITTED.*ALTER ROLE.*default_transaction_isolation") as refused:
        store(connection, line())
    assert refused.value.sqlstate == "25000"


def test_a_temporary_table_of_the_same_name_neither_takes_lines_nor_gives_any(connection: Connection) -> None:
    connection.execute("CREATE TEMPORARY TABLE logs (LIKE public.logs INCLUDING ALL)")
    stored = store(connection, line())
    assert connection.execute("SELECT created FROM public.logs").fetchall() == [(stored.first_created,)]
    assert [record["created"] for record in read_all(connection)] == [stored.first_created]


def test_how_far_created_is_ahead_of_the_clock_is_told(url: str, connection: Connection) -> None:
    assert abs(store(connection, line()).ahead_seconds) < 1
    assert connection.execute("SELECT seconds_ahead_v1()").fetchone() == (0,)
    with past_the_guard(url) as other:
        other.execute(INSERT, [uuid.uuid4(), datetime.now(UTC) + timedelta(hours=1)])
    assert 3500 < store(connection, line()).ahead_seconds <= 3600
    assert 3500 < connection.execute("SELECT seconds_ahead_v1()").fetchone()[0] <= 3600  # type: ignore[index]


# ---- The guard ------------------------------------------------------------------------------------------------------

PAST = [
    "INSERT INTO logs VALUES (gen_random_uuid(), now(), '1.2.3.4', 'GET', '/past', 200)",
    "INSERT INTO logs SELECT gen_random_uuid(), now(), '1.2.3.4', 'GET', '/past', 200 WHERE FALSE",
    "UPDATE logs SET uri = '/past'",
    "MERGE INTO logs USING (SELECT 1) AS one ON FALSE"
    " WHEN NOT MATCHED THEN INSERT VALUES (gen_random_uuid(), now(), '1.2.3.4', 'GET', '/past', 200)",
]


def assert_refused(connection: Connection, statement: str) -> None:
    with pytest.raises(psycopg.Error, match="store_logs_v2") as refused, connection.transaction():
        connection.execute(statement.encode())
    assert refused.value.sqlstate == "LP002"
    assert not isinstance(refused.value, (psycopg.DataError, psycopg.IntegrityError))  # not the fault of a line


@pytest.mark.parametrize("statement", PAST, ids=["insert", "insert nothing", "update", "merge"])
def test_a_row_that_comes_past_the_function_is_refused(connection: Connection, statement: str) -> None:
    store(connection, line())
    assert_refused(connection, statement)
    assert [row.uri for row in rows(connection)] == ["/a"]


def test_a_copy_past_the_function_is_refused(connection: Connection) -> None:
    with pytest.raises(psycopg.Error, match="store_logs_v2"), connection.cursor().copy("COPY logs FROM STDIN") as copy:
        copy.write(f"{uuid.uuid4()}\t2026-01-01Z\t1.2.3.4\tGET\t/past\t200\n")
    assert rows(connection) == []


@pytest.mark.parametrize("statement", [STORE, STORE_V1], ids=["v2", "v1"])
def test_the_guard_is_closed_again_when_the_function_has_stored(connection: Connection, statement: str) -> None:
    first = line()
    with connection.transaction():
        for lines in ([first], [first, line("/b")], []):  # each of the function's ways
            store(connection, *lines, statement=statement)
            assert_refused(connection, PAST[0])
    assert [row.uri for row in rows(connection)] == ["/a", "/b"]


def test_the_guard_is_closed_again_when_the_function_has_failed(connection: Connection) -> None:
    with connection.transaction():
        with pytest.raises(errors.CheckViolation), connection.transaction():
            store(connection, line(status=99))
        assert_refused(connection, PAST[0])


def test_old_records_may_be_deleted(connection: Connection) -> None:
    store(connection, line(), line("/b"))
    connection.execute("DELETE FROM logs WHERE uri = '/a'")
    assert [row.uri for row in rows(connection)] == ["/b"]


def run(postgres: Postgres, program: str, *arguments: str | Path) -> None:
    done = subprocess.run([postgres.programs / program, *arguments], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["all of it", "all of it as SQL", "the data alone"])
def test_a_dump_can_be_restored_and_is_guarded_again(
    postgres: Postgres, url: str, connection: Connection, tmp_path: Path, way: str
) -> None:
    store(connection, *(line(f"/{n}", method=method) for n, method in enumerate(["GET", "BREW"] * 500)))
    dump = tmp_path / "dump"
    if way == "the data alone":
        target = postgres.create_logs()
        run(postgres, "pg_dump", "-Fc", "--table=logs", "-f", dump, url)
        run(postgres, "pg_restore", "--data-only", "--disable-triggers", "--exit-on-error", "-d", target, dump)
    elif way == "all of it":
        target = postgres.create_database()
        run(postgres, "pg_dump", "-Fc", "-f", dump, url)
        run(postgres, "pg_restore", "--exit-on-error", "-d", target, dump)
    else:
        target = postgres.create_database()
        run(postgres, "pg_dump", "-f", dump, url)
        run(postgres, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", dump, target)
    with psycopg.connect(target, autocommit=True, row_factory=namedtuple_row) as restored:
        assert rows(restored) == rows(connection)
        assert [record["log"]["uri"] for record in read_all(restored, method="BREW")][:2] == ["/1", "/3"]
        assert_refused(restored, PAST[0])
        assert store(restored, line()).first_created > rows(connection)[-1].created


@pytest.fixture
def primary() -> Iterator[Postgres]:
    """A PostgreSQL of its own, which may be set otherwise and is small enough to copy."""
    with new_postgres() as cluster:
        yield cluster


def test_logical_replication_applies_rows_past_the_guard(primary: Postgres) -> None:
    with psycopg.connect(primary.url("postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET wal_level = 'logical'")
    primary.stop()
    primary.start()
    source, target = primary.create_logs(), primary.create_logs()
    with (
        psycopg.connect(source, autocommit=True, row_factory=namedtuple_row) as publisher,
        psycopg.connect(target, autocommit=True, row_factory=namedtuple_row) as subscriber,
    ):
        store(publisher, line())
        publisher.execute("CREATE PUBLICATION logs FOR TABLE logs")
        publisher.execute("SELECT pg_create_logical_replication_slot('logs', 'pgoutput')")
        subscriber.execute(
            f"CREATE SUBSCRIPTION logs CONNECTION '{source}' PUBLICATION logs WITH (create_slot = FALSE)".encode()
        )
        wait_until(lambda: rows(subscriber) == rows(publisher), SECONDS, "the first copy")
        store(publisher, line("/b"))
        wait_until(lambda: rows(subscriber) == rows(publisher), SECONDS, "what came since")
        assert_refused(subscriber, PAST[0])
        subscriber.execute("DROP SUBSCRIPTION logs")


# ---- The range of `created` -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "created", ["infinity", "-infinity", "9999-12-31 23:59:59.999999Z", "3000-01-01Z", "1969-12-31 23:59:59.999999Z"]
)
def test_a_row_outside_of_the_years_1970_to_2999_is_refused_even_past_the_guard(url: str, created: str) -> None:
    with past_the_guard(url) as connection, pytest.raises(errors.CheckViolation) as refused:
        connection.execute(INSERT, [uuid.uuid4(), created])
    assert refused.value.diag.constraint_name == "logs_created_range"


def test_where_created_cannot_grow_any_more_the_error_names_its_range(url: str, connection: Connection) -> None:
    with past_the_guard(url) as other:
        other.execute(INSERT, [uuid.uuid4(), "2999-12-31 23:59:59.999998Z"])
    store(connection, line())
    with pytest.raises(errors.CheckViolation) as refused:
        store(connection, line())
    assert refused.value.diag.constraint_name == "logs_created_range"


# ---- A server in recovery -------------------------------------------------------------------------------------------


def test_a_standby_is_refused_for_reading_and_for_storing(primary: Postgres) -> None:
    url = primary.create_logs()
    with psycopg.connect(url, autocommit=True) as connection:
        store(connection, line())
    calls = [
        "SELECT window_end_v1('1970-01-01Z', NULL)",
        "SELECT * FROM read_part_v1('1970-01-01Z', '2100-01-01Z', NULL, NULL, NULL, 10, ',', 1000000)",
        "SELECT * FROM count_part_v1('1970-01-01Z', '2100-01-01Z', NULL, NULL, NULL, 10)",
        "SELECT seconds_ahead_v1()",
        "SELECT window_end_v2('1970-01-01Z', NULL)",
        "SELECT delete_expired_v1('1 day', 10)",
        "SELECT store_logs_v2('{}', '{}', '{}', '{}', '{}')",
        "SELECT store_logs('{}', '{}', '{}', '{}', '{}')",
    ]
    name = conninfo_to_dict(url)["dbname"]
    with standby_of(primary) as standby, psycopg.connect(standby.url(str(name)), autocommit=True) as lagging:
        wait_until(lambda: lagging.execute("SELECT count(*) FROM logs").fetchone() == (1,), SECONDS, "the row")
        for call in calls:
            with pytest.raises(psycopg.Error, match=r"in recovery.*target_session_attrs=read-write") as refused:
                lagging.execute(call.encode())
            assert refused.value.sqlstate == "LP001"


# ---- Reading --------------------------------------------------------------------------------------------------------

READ = """
SELECT count, next_from, bytes, part
  FROM read_part_v1(%(date_from)s::timestamptz, %(date_to)s::timestamptz, %(method)s::text, %(status_code)s::smallint,
                    %(ip)s::inet, %(max_rows)s, %(separator)s, %(max_bytes)s)
"""
COUNT = """
SELECT count, next_from
  FROM count_part_v1(%(date_from)s::timestamptz, %(date_to)s::timestamptz, %(method)s::text, %(status_code)s::smallint,
                     %(ip)s::inet, %(max_rows)s)
"""
NO_FILTER = {"method": None, "status_code": None, "ip": None}


def read_parts(connection: Connection, **window: Any) -> Iterator[Any]:
    """The parts of a window, from its start to its end."""
    defaults = {"date_from": EPOCH, "date_to": None, "max_rows": 4000, "max_bytes": 10**6, "separator": "\n"}
    window = {**defaults, **NO_FILTER, **window}
    end = connection.execute(
        "SELECT window_end_v1(%(date_from)s, %(date_to)s)",
        {name: window[name] for name in ("date_from", "date_to")},
        binary=True,
    ).fetchone()
    assert end is not None
    window["date_to"] = end[0]
    while window["date_from"] < window["date_to"]:
        part = connection.execute(READ, window, binary=True).fetchone()
        assert part is not None
        yield part
        assert part.next_from > window["date_from"]
        window["date_from"] = part.next_from


def read_all(connection: Connection, **window: Any) -> list[dict[str, Any]]:
    records = []
    for part in read_parts(connection, **window):
        lines = part.part.split("\n") if part.count else []
        assert len(lines) == part.count
        records += [json.loads(text) for text in lines]
    return [{**record, "created": datetime.fromisoformat(record["created"])} for record in records]


@pytest.fixture(scope="module")
def mixed(postgres: Postgres) -> Iterator[tuple[Connection, list[Any]]]:
    """A database with 3,000 lines of all kinds, and its rows."""
    dice = random.Random(8)
    methods = ["GET"] * 8 + ["POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW", "get", "NULL"]
    addresses = ["1.2.3.4"] * 4 + ["255.255.255.255", "0.0.0.0", "::1", "2001:db8::ff", "::ffff:1.2.3.4"]
    with psycopg.connect(postgres.create_logs(), autocommit=True, row_factory=namedtuple_row) as connection:
        for _ in range(30):
            lines = [
                line(f"/{n}", dice.choice(addresses), dice.choice(methods), dice.choice([200] * 5 + [100, 404, 599]))
                for n in range(100)
            ]
            store(connection, *lines)
        yield connection, rows(connection)


def matching(rows: Sequence[Any], **filters: Any) -> list[Any]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in filters.items())]


def test_each_filter_and_each_pair_gives_its_records_in_parts_of_any_size(mixed: tuple[Connection, list[Any]]) -> None:
    connection, everything = mixed
    for method in (None, "GET", "PATCH", "BREW", "NULL", "TRACE"):
        for status_code in (None, 200, 404, 599, 204):
            for ip in (None, "1.2.3.4", "::1", "::ffff:1.2.3.4", "9.9.9.9"):
                given = {"method": method, "status_code": status_code, "ip": ip}
                filters = {name: value for name, value in given.items() if value is not None}
                wanted = [(row.id, row.created) for row in matching(everything, **filters)]
                for max_rows in (97, 4000):
                    read = read_all(connection, **filters, max_rows=max_rows)
                    assert [(record["id"], record["created"]) for record in read] == wanted, filters


def test_a_window_holds_what_was_created_from_its_start_to_before_its_end(mixed: tuple[Connection, list[Any]]) -> None:
    connection, everything = mixed
    window = {"date_from": everything[1000].created, "date_to": everything[2000].created}
    for filters in ({}, {"method": "GET"}, {"ip": "::1"}, {"method": "BREW"}, {"status_code": 404}):
        wanted = [row.id for row in matching(everything[1000:2000], **filters)]
        assert [record["id"] for record in read_all(connection, **window, **filters)] == wanted


def test_the_end_of_a_limited_window_is_behind_its_last_record(mixed: tuple[Connection, list[Any]]) -> None:
    connection, everything = mixed
    end = everything[-1].created + MICROSECOND
    for filters in ({}, {"method": "GET"}, {"ip": "::1"}, {"method": "BREW"}, {"status_code": 404}):
        window = {"date_from": EPOCH, "date_to": end, "max_rows": 10, **NO_FILTER, **filters}
        assert connection.execute(COUNT, window).fetchone() == (
            10,
            matching(everything, **filters)[9].created + MICROSECOND,
        )
        window["max_rows"] = 5000
        assert connection.execute(COUNT, window).fetchone() == (len(matching(everything, **filters)), end)


def test_a_part_is_as_long_as_it_may_be_in_bytes_and_one_record_at_least(url: str, connection: Connection) -> None:
    store(connection, *(line("/" + '"' * 1000) for _ in range(200)), line("/" + "x" * 8000))
    for max_bytes in (100_000, 20_000, 100):
        parts = list(read_parts(connection, max_bytes=max_bytes))
        assert sum(part.count for part in parts) == 201
        assert all(part.bytes == len(part.part) for part in parts)
        assert all(part.bytes <= max_bytes or part.count == 1 for part in parts)
    assert [part.count for part in parts] == [1] * 201


def test_a_record_reads_the_same_in_any_session(connection: Connection) -> None:
    store(connection, line('/"\\é', "2001:db8:0::1", "GET", 404, "0e8d4a1c-53a6-4c5e-9f0e-7d2f8a6b1c3d"))
    connection.execute("SET TimeZone = 'Asia/Kolkata'; SET DateStyle = 'SQL, DMY'")
    [part] = read_parts(connection)
    connection.execute("RESET DateStyle")
    [row] = rows(connection)
    created = row.created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert part.part == (
        '{"id":"0e8d4a1c-53a6-4c5e-9f0e-7d2f8a6b1c3d","created":"' + created + '",'
        '"log":{"ip":"2001:db8::1","method":"GET","uri":"/\\"\\\\é","status_code":404}}'
    )


def test_a_method_that_was_stored_by_hand_makes_no_export_unreadable(connection: Connection) -> None:
    methods = ["GET", "POST", 'G"T', "G\\T", "G\nT", "\x1b", "\u00e9", "get", "NULL"]
    store(connection, *(line(method=method) for method in methods))
    records = [json.loads(text) for part in read_parts(connection) for text in part.part.split("\n")]
    assert [record["log"]["method"] for record in records] == methods
    assert all(record["log"] | {"method": ""} == records[0]["log"] | {"method": ""} for record in records)


def test_an_empty_table_has_an_empty_window_at_its_start(connection: Connection) -> None:
    assert connection.execute("SELECT window_end_v1('2026-01-01Z', NULL)").fetchone() == (
        datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert list(read_parts(connection)) == []
    assert connection.execute("SELECT seconds_ahead_v1()").fetchone() == (0,)
