"""What reading and storing cost the database: what the records cost, whatever the filter, the values, their places in
the table, and the planner's statistics.

Measured in buffers (pages of 8 KiB that a statement looks at, in memory or not), which do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from harness import Postgres, past_the_guard

pytestmark = pytest.mark.slow  # filling the table and building its indexes three times

ROWS = 2_000_000
EDGE = 1000  # rows at either end that have values of their own
MAX_ROWS = 4000
MOST_LOOKED_AT = 50_000  # rows, in one statement: see read_part_v1
FIXED = 250  # buffers: the ways down to each range of the index that a filter has
BEGIN, MIDDLE, END = (datetime(2026, 1, day, tzinfo=UTC) for day in (1, 12, 31))

# One row for each second. By turns: who comes often, and those who come once in a while; at the ends: those who come
# only there
FILL = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT ('00000000-0000-8000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
       '2026-01-01Z'::timestamptz + n * interval '1 second',
       CASE WHEN n <= %(edge)s THEN inet '192.0.2.1'
            WHEN n > %(rows)s - %(edge)s THEN inet '2001:db8::1'
            WHEN n %% 20000 = 7 THEN inet '192.0.2.7'
            WHEN n %% 3 = 0 THEN inet '10.0.0.1'
            ELSE inet '10.0.0.0' + n %% 70000 END,
       CASE WHEN n <= %(edge)s THEN 'HEAD'
            WHEN n > %(rows)s - %(edge)s THEN 'DELETE'
            WHEN n %% 20000 = 8 THEN 'PUT'
            WHEN n %% 20000 = 9 THEN 'BREW'
            WHEN n %% 11 = 0 THEN 'PROPFIND'
            WHEN n %% 7 = 0 THEN 'POST'
            ELSE 'GET' END,
       '/' || n,
       CASE WHEN n <= %(edge)s THEN 301
            WHEN n > %(rows)s - %(edge)s THEN 503
            WHEN n %% 20000 IN (7, 8, 10) THEN 418
            WHEN n %% 13 = 0 THEN 404
            ELSE 200 END
  FROM generate_series(1, %(rows)s) AS n
"""
INDEXES = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid)
  FROM pg_index
 WHERE indrelid = 'logs'::regclass
   AND NOT indisunique
"""
# What the planner knows of the table
FORGET = """
DELETE FROM pg_statistic WHERE starelid = 'logs'::regclass;
UPDATE pg_class SET reltuples = -1, relpages = 0 WHERE oid = 'logs'::regclass;
"""
READ = """
read_part_v1(%(date_from)s::timestamptz, %(date_to)s, %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
             %(rows)s, ',', 16000000)
"""
STORE = "store_logs_v2('{00000000-0000-8000-8000-000000000001}', '{192.0.2.1}', '{HEAD}', '{/1}', '{301}')"

END_OF_WINDOW = "window_end_v2('1970-01-01Z', NULL)"
STATS_WINDOW = "stats_window_v1('1970-01-01Z', NULL)"
COUNT_STEP = "count_minutes_v1(50000)"
STATS = """
stats_counts_v1(%(date_from)s::timestamptz, %(date_to)s, %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
                '{}', 1000000)
"""
TOP = """
stats_top_v1(%(date_from)s::timestamptz, %(date_to)s, %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
             %(field)s, 10, 10000)
"""


@pytest.fixture(scope="module")
def table(postgres: Postgres) -> Iterator[psycopg.Connection[Any]]:
    """A connection whose kept plans are from when the table was empty. It has 2 million rows now.

    What the planner was told last is from a table of 2,000 rows, all alike.
    """
    url = postgres.create_logs()
    with psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        with past_the_guard(url) as filler:
            filler.execute("ALTER TABLE logs SET (autovacuum_enabled = FALSE)")
            filler.execute(FILL, {"rows": 2000, "edge": 2000})
            filler.execute("ANALYZE logs")
            filler.execute("TRUNCATE logs")
            for _ in range(10):  # from the sixth time on a plan is kept
                connection.execute(f"SELECT {STORE}, {STATS_WINDOW}, {COUNT_STEP}, seconds_ahead_v1()".encode())
            filler.execute("DELETE FROM logs")
            indexes = filler.execute(INDEXES).fetchall()
            for name, _ in indexes:
                filler.execute(f"DROP INDEX {name}".encode())
            filler.execute(FILL, {"rows": ROWS, "edge": EDGE})
            for _, definition in indexes:
                filler.execute(definition.encode())
        yield connection


@pytest.fixture(scope="module", params=["statistics of a small table", "no statistics", "true statistics"])
def connection(table: psycopg.Connection[Any], request: pytest.FixtureRequest) -> psycopg.Connection[Any]:
    if request.param == "no statistics":
        table.execute(FORGET)
    if request.param == "true statistics":
        table.execute("ANALYZE logs")
    return table


def buffers(connection: psycopg.Connection[Any], call: str, parameters: dict[str, Any]) -> int:
    """How many a statement looks at, those of the statements inside of its function included."""
    statement = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM {call}".encode()
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def read(connection: psycopg.Connection[Any], **window: Any) -> tuple[int, datetime, int]:
    """The number of records in one part, where the next one starts, and the buffers that it took."""
    parameters = {**NO_FILTER, "date_from": BEGIN, "date_to": END, "rows": MAX_ROWS, **window}
    row = connection.execute(f"SELECT count, next_from FROM {READ}".encode(), parameters).fetchone()
    assert row is not None
    return row[0], row[1], buffers(connection, READ, parameters)


NO_FILTER = {"method": None, "status_code": None, "ip": None}

# Common, rare, only early, only late, absent
ONE_FILTER: list[dict[str, Any]] = [
    {},
    {"method": "GET"},
    {"method": "PROPFIND"},
    {"method": "PUT"},
    {"method": "BREW"},
    {"method": "HEAD"},
    {"method": "DELETE"},
    {"method": "PATCH"},
    {"method": "NONE"},
    {"status_code": 200},
    {"status_code": 418},
    {"status_code": 301},
    {"status_code": 503},
    {"status_code": 204},
    {"ip": "10.0.0.1"},
    {"ip": "192.0.2.7"},
    {"ip": "192.0.2.1"},
    {"ip": "2001:db8::1"},
    {"ip": "192.0.2.99"},
    {"ip": "2001:db8::2"},
    # a method and a status are one range of one index
    {"method": "GET", "status_code": 200},
    {"method": "PUT", "status_code": 418},
    {"method": "DELETE", "status_code": 503},
    {"method": "GET", "status_code": 503},
]


def name_of(filters: dict[str, Any]) -> str:
    return " ".join(map(str, filters.values())) or "all"


COUNTED: dict[str, int] = {}


def records_of(connection: psycopg.Connection[Any], filters: dict[str, Any]) -> int:
    """How many there are in the table, by reading all of it."""
    if name_of(filters) not in COUNTED:
        wanted = " AND ".join(f"{column} = %({column})s" for column in filters) or "TRUE"
        row = connection.execute(f"SELECT count(*) FROM logs WHERE {wanted}".encode(), filters).fetchone()
        assert row is not None
        COUNTED[name_of(filters)] = row[0]
    return COUNTED[name_of(filters)]


@pytest.mark.parametrize("filters", ONE_FILTER, ids=name_of)
@pytest.mark.parametrize("rows", [1, MAX_ROWS])
def test_a_part_costs_what_its_records_cost(
    connection: psycopg.Connection[Any], filters: dict[str, Any], rows: int
) -> None:
    records = records_of(connection, filters)
    count, next_from, cost = read(connection, **filters, rows=rows)
    assert count == min(rows, records)
    assert (next_from == END) == (records < rows)
    assert cost <= 2 * count + FIXED


@pytest.mark.parametrize("filters", ONE_FILTER, ids=name_of)
def test_a_part_from_the_middle_on_costs_what_its_records_cost(
    connection: psycopg.Connection[Any], filters: dict[str, Any]
) -> None:
    count, _, cost = read(connection, **filters, date_from=MIDDLE, rows=100)
    assert count == 100 or records_of(connection, filters) <= EDGE
    assert cost <= 2 * count + FIXED


PAIRS: list[dict[str, Any]] = [
    {"ip": "10.0.0.1", "method": "PUT"},
    {"ip": "10.0.0.1", "status_code": 204},
    {"ip": "10.0.0.1", "method": "DELETE"},
    {"ip": "192.0.2.7", "status_code": 418},
    {"ip": "2001:db8::1", "method": "DELETE"},
    {"ip": "192.0.2.99", "method": "GET"},
    {"method": "PROPFIND", "status_code": 418},
    {"method": "BREW", "status_code": 200},
    {"ip": "10.0.0.1", "method": "PROPFIND", "status_code": 204},
]


@pytest.mark.parametrize("filters", PAIRS, ids=name_of)
def test_with_several_filters_each_statement_is_bounded_and_together_they_find_all(
    connection: psycopg.Connection[Any], filters: dict[str, Any]
) -> None:
    found, next_from = 0, BEGIN
    while next_from < END:
        count, next_from, cost = read(connection, **filters, date_from=next_from)
        found += count
        assert cost <= 1.2 * MOST_LOOKED_AT + FIXED
    assert found == records_of(connection, filters)


@pytest.mark.parametrize("call", [END_OF_WINDOW, STATS_WINDOW, "seconds_ahead_v1()", STORE])
def test_storing_and_the_end_of_a_window_cost_the_same_in_a_large_table(
    connection: psycopg.Connection[Any], call: str
) -> None:
    with connection.transaction(force_rollback=True):
        assert buffers(connection, call, {}) <= FIXED


HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.mark.parametrize("length", [HOUR, DAY], ids=["an hour", "a day"])
@pytest.mark.parametrize("filters", ONE_FILTER, ids=name_of)
def test_what_is_not_counted_yet_costs_what_its_records_cost(
    connection: psycopg.Connection[Any], filters: dict[str, Any], length: timedelta
) -> None:
    window = {**NO_FILTER, **filters, "date_from": MIDDLE, "date_to": MIDDLE + length}
    with connection.transaction(force_rollback=True):
        connection.execute("UPDATE counting SET counted_to = '-infinity'")
        assert buffers(connection, STATS, window) <= length.total_seconds() + FIXED


@pytest.mark.parametrize("filters", ONE_FILTER, ids=name_of)
@pytest.mark.parametrize("field", ["ip", "uri"])
def test_the_most_frequent_cost_what_the_newest_records_cost(
    connection: psycopg.Connection[Any], filters: dict[str, Any], field: str
) -> None:
    window = {**NO_FILTER, **filters, "date_from": BEGIN, "date_to": END, "field": field}
    assert buffers(connection, TOP, window) <= 2 * min(10_000, records_of(connection, filters)) + FIXED


@pytest.mark.parametrize("filters", ONE_FILTER, ids=name_of)
def test_what_is_counted_costs_a_part_of_what_its_records_cost(
    connection: psycopg.Connection[Any], filters: dict[str, Any]
) -> None:
    while connection.execute("SELECT counted_to_v1() < %s", [MIDDLE + DAY]).fetchall() == [(True,)]:
        assert buffers(connection, COUNT_STEP, {}) <= 50_000
    window = {**NO_FILTER, **filters, "date_from": MIDDLE + HOUR / 7, "date_to": MIDDLE + DAY - HOUR / 7}
    records = records_of(connection, filters) / ROWS * DAY.total_seconds() if "ip" in filters else 0
    assert buffers(connection, STATS, window) <= DAY.total_seconds() / 60 + 2 * records + 2 * FIXED
