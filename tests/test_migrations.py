"""Migrations: from nothing, from older databases, beside each other, killed half-way, and back again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
import pytest
import requests
from harness import ROOT, Backend, Postgres, backend_command, clean_environment, kept_port, new_postgres, past_the_guard
from waiting import wait_until

SECONDS = 60  # for one process on a busy machine
STEPS = len([path for path in ROOT.glob("migrations/*.sql") if ".rollback." not in path.name])
LIMITING_CREATED, BUILDING_INDEXES = 4, 6  # the number of migrations before these
INDEXES_OF_FILTERS = {"logs_kind_created_idx", "logs_other_method_created_idx", "logs_ip_number_created_idx"}

CATALOG = """
SELECT 'column' AS kind, attname AS name, format_type(atttypid, atttypmod) || attnotnull::text AS definition
  FROM pg_attribute WHERE attrelid = to_regclass('logs') AND attnum > 0
 UNION ALL
SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = to_regclass('logs')
 UNION ALL
SELECT 'index', relname, pg_get_indexdef(indexrelid) || indisvalid::text || indisready::text
  FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = to_regclass('logs')
 UNION ALL
SELECT 'function', proname, pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
 UNION ALL
SELECT 'trigger', tgname, pg_get_triggerdef(oid) || tgenabled::text
  FROM pg_trigger WHERE tgrelid = to_regclass('logs') AND NOT tgisinternal
 UNION ALL
SELECT 'relation', relname, relkind::text
  FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname !~ '^_?yoyo'
 ORDER BY kind, name, definition
"""
# These change when something is made anew, even if it looks the same
IDENTITIES = """
SELECT relname, pg_class.oid, relfilenode FROM pg_class WHERE relnamespace = 'public'::regnamespace
 UNION ALL
SELECT proname, oid, xmin::text::oid FROM pg_proc WHERE pronamespace = 'public'::regnamespace
 ORDER BY 1, 2, 3
"""
INDEXES = """
SELECT relname, indisvalid AND indisready
  FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
 WHERE indrelid = 'logs'::regclass
"""
CONTENT = "SELECT count(*), md5(string_agg(logs::text, ',' ORDER BY created)) FROM logs"
FILL = """
INSERT INTO logs
SELECT gen_random_uuid(), timestamptz '2020-01-01Z' + n * interval '1 second',
       ('10.' || n %% 200 || '.0.1')::inet, 'GET', '/' || n, 200 + n %% 10
  FROM generate_series(1, %s) AS n
"""
BLOCKED = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid() AND wait_event_type = 'Lock'
"""


def query(url: str, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def migrate(url: str) -> None:
    backend_command("migrate", url)


def indexes(url: str) -> dict[str, bool]:
    """The indexes of the table, and whether each can be used."""
    return dict(row for row in query(url, INDEXES))


def begin(command: str, url: str) -> subprocess.Popen[str]:
    """Starts `backend.py migrate` or `rollback`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "backend.py"), command],
        env=clean_environment({"DATABASE_URL": url}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def older(postgres: Postgres) -> Callable[[int], str]:
    """The URL of a new database at which the migrations had got to that number."""
    names = {STEPS: "template_logs"}
    for step in reversed(range(STEPS)):
        names[step] = f"older_{step}"
        url = postgres.create_database(names[step], names[step + 1])
        backend_command("rollback", url)
    return lambda step: postgres.create_database(template=names[step])


@pytest.fixture(scope="module")
def catalog(postgres: Postgres) -> list[tuple[Any, ...]]:
    """What a database looks like with all migrations."""
    return query(postgres.create_logs(), CATALOG)


# ---- Forth and back -------------------------------------------------------------------------------------------------


def test_an_empty_database_gets_all_there_is(postgres: Postgres, catalog: list[tuple[Any, ...]]) -> None:
    url = postgres.create_database()
    migrate(url)
    assert query(url, CATALOG) == catalog
    assert all(indexes(url).values())
    assert indexes(url).keys() >= INDEXES_OF_FILTERS


def test_applied_again_nothing_changes(postgres: Postgres) -> None:
    url = postgres.create_logs()
    before = [query(url, sql) for sql in (CATALOG, IDENTITIES, "SELECT * FROM _yoyo_migration ORDER BY 1")]
    migrate(url)
    assert [query(url, sql) for sql in (CATALOG, IDENTITIES, "SELECT * FROM _yoyo_migration ORDER BY 1")] == before


@pytest.mark.slow
def test_each_migration_can_be_taken_back_one_at_a_time_and_applied_again(
    postgres: Postgres, older: Callable[[int], str], catalog: list[tuple[Any, ...]]
) -> None:
    catalogs = [query(older(step), CATALOG) for step in range(STEPS + 1)]
    assert catalogs[0] == []
    assert catalogs[STEPS] == catalog
    assert all(one != another for one, another in pairwise(catalogs))
    url = older(0)
    backend_command("rollback", url)  # nothing is left to take back
    migrate(url)
    assert query(url, CATALOG) == catalog


def test_every_migration_has_its_way_back_and_names_without_gaps() -> None:
    names = sorted(path.name for path in (ROOT / "migrations").glob("*.sql"))
    forth = [name for name in names if ".rollback." not in name]
    assert [name.replace(".rollback", "") for name in names if ".rollback." in name] == forth
    assert [name[:5] for name in forth] == [f"{n:04}." for n in range(1, STEPS + 1)]


def test_several_processes_at_once_all_end_well(postgres: Postgres, catalog: list[tuple[Any, ...]]) -> None:
    url = postgres.create_database()
    for process in [begin("migrate", url) for _ in range(3)]:
        finish(process)
    assert query(url, CATALOG) == catalog
    assert query(url, "SELECT count(*) FROM _yoyo_migration") == [(STEPS,)]


# ---- Killed half-way ------------------------------------------------------------------------------------------------

# What another transaction does so that the step after the n-th cannot go on
BLOCKS = [
    "CREATE TABLE logs ()",
    "CREATE FUNCTION store_logs(uuid[], inet[], text[], text[], smallint[]) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "LOCK TABLE logs IN ROW EXCLUSIVE MODE",  # as a writer does; CREATE INDEX CONCURRENTLY waits for its end half-way
    "LOCK TABLE logs IN ROW EXCLUSIVE MODE",  # CREATE TRIGGER waits for it
    "LOCK TABLE logs IN ACCESS SHARE MODE",  # as a backup does; ALTER TABLE waits for it
    "LOCK TABLE logs IN SHARE UPDATE EXCLUSIVE MODE",  # as VACUUM does; VALIDATE CONSTRAINT waits for it
    "LOCK TABLE logs IN ROW EXCLUSIVE MODE",
    "CREATE FUNCTION window_end_v1(timestamptz, timestamptz) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "LOCK TABLE logs IN ROW EXCLUSIVE MODE",  # DROP INDEX CONCURRENTLY waits for its end half-way
    "CREATE FUNCTION kept_from_v1() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION stats_window_v1(timestamptz, timestamptz) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE FUNCTION confirm_v1() RETURNS int LANGUAGE sql AS 'SELECT 1'",
]
OLD = range(len(BLOCKS) - 3)  # these migrations change no more
STEPS_BLOCKED = [pytest.param(n, marks=[pytest.mark.slow] if n in OLD else []) for n in range(len(BLOCKS))]


def blocked(url: str, but: int = 0) -> int:
    """The process id of a session that waits for a lock, once there is one."""
    return wait_until(
        lambda: next((pid for (pid,) in query(url, BLOCKED) if pid != but), 0), SECONDS, "a blocked session"
    )


@pytest.mark.parametrize("released_before", [True, False], ids=["released", "still held"])
@pytest.mark.parametrize("step", STEPS_BLOCKED)
def test_a_run_that_was_killed_half_way_is_healed_by_the_next(
    older: Callable[[int], str], catalog: list[tuple[Any, ...]], step: int, released_before: bool
) -> None:
    url = older(step)
    with psycopg.connect(url) as holder:
        holder.execute(BLOCKS[step].encode())
        killed = begin("migrate", url)
        session = blocked(url)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(SECONDS) == -signal.SIGKILL
        assert query(url, CATALOG) != catalog
        if released_before:
            holder.rollback()
        following = begin("migrate", url)
        if not released_before:
            blocked(url, but=session)
            holder.rollback()
    finish(following)
    assert query(url, CATALOG) == catalog


def test_the_lock_row_of_a_killed_run_holds_up_nobody(
    older: Callable[[int], str], catalog: list[tuple[Any, ...]]
) -> None:
    url = older(STEPS - 1)
    query(url, "INSERT INTO yoyo_lock (locked, ctime, pid) VALUES (1, now(), 1)")
    migrate(url)
    assert query(url, CATALOG) == catalog


def test_an_invalid_index_that_was_left_behind_is_built_anew(
    older: Callable[[int], str], catalog: list[tuple[Any, ...]]
) -> None:
    url = older(BUILDING_INDEXES)
    for name in INDEXES_OF_FILTERS:
        query(url, f"CREATE INDEX {name} ON logs (uri)")
        query(url, f"UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = '{name}'::regclass")
    migrate(url)
    assert query(url, CATALOG) == catalog


# ---- Older and other databases --------------------------------------------------------------------------------------


def test_an_older_database_with_data_is_upgraded_and_keeps_it(
    older: Callable[[int], str], catalog: list[tuple[Any, ...]]
) -> None:
    url = older(2)
    assert not INDEXES_OF_FILTERS & indexes(url).keys()
    query(url, FILL, 50_000)
    before = query(url, CONTENT)
    migrate(url)
    assert query(url, CONTENT) == before
    assert query(url, CATALOG) == catalog
    backend_command("rollback", url)
    assert query(url, CONTENT) == before


def test_a_backend_keeps_storing_while_its_database_is_upgraded(
    older: Callable[[int], str], start_backend: Callable[..., Backend]
) -> None:
    backend = start_backend(DATABASE_URL=older(2))
    query(backend.database_url, FILL, 20_000)
    process = begin("migrate", backend.database_url)
    statuses: list[int] = []
    while process.poll() is None or not statuses:
        statuses.append(
            requests.post(backend.data_url, json={"log": "1.2.3.4 GET /a 200"}, timeout=SECONDS).status_code
        )
    finish(process)
    assert set(statuses) == {201}
    assert query(backend.database_url, "SELECT count(*) FROM logs") == [(20_000 + len(statuses),)]


def test_writers_go_on_while_a_migration_waits_for_a_long_reader(
    older: Callable[[int], str], catalog: list[tuple[Any, ...]]
) -> None:
    url = older(LIMITING_CREATED)
    options = "-c statement_timeout=30s -c idle_session_timeout=0 -c idle_in_transaction_session_timeout=0"
    own = f"{url}&{urlencode({'options': options}, quote_via=quote)}"  # for this test
    for limit in ("statement_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout"):
        query(own, f"ALTER DATABASE {url.split('/')[3].split('?')[0]} SET {limit} = '1s'")  # not for a migration
    with psycopg.connect(own) as backup, psycopg.connect(own, autocommit=True) as writer:
        backup.execute("LOCK TABLE logs IN ACCESS SHARE MODE")
        process = begin("migrate", url)
        blocked(own)
        began, rounds = time.monotonic(), 0
        while rounds < 3 or time.monotonic() - began < 1.5:
            blocked(own)
            writer.execute("SELECT store_logs('{}', '{}', '{}', '{}', '{}')")
            assert process.poll() is None
            rounds += 1
    finish(process)
    assert query(own, CATALOG) == catalog


def test_rows_with_an_absurd_created_stop_the_migration_that_names_them_until_they_are_mended(
    older: Callable[[int], str], catalog: list[tuple[Any, ...]]
) -> None:
    url = older(LIMITING_CREATED)
    name = str(uuid.uuid4())
    with past_the_guard(url) as connection:
        connection.execute("INSERT INTO logs VALUES (%s, 'infinity', '1.2.3.4', 'GET', '/', 200)", [name])
        for _ in range(2):
            done = backend_command("migrate", url, check=False)
            assert done.returncode == 1
            [line] = done.stderr.splitlines()
            assert f"{name} (created infinity)" in line
            assert "SET session_replication_role = replica" in line
        connection.execute("UPDATE logs SET created = now()")
    migrate(url)
    assert query(url, CATALOG) == catalog


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Connections to it are refused."""
    with kept_port() as place:
        yield place.getsockname()[1]


def command_without_database(command: str, **settings: str | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "backend.py"), command],
        env=clean_environment(settings),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.parametrize("command", ["migrate", "rollback"])
@pytest.mark.parametrize("address", ["url", "parts", "hosts", "socket"])
def test_an_unreachable_database_is_one_clear_line_without_the_password(
    command: str, address: str, closed_port: int
) -> None:
    settings: dict[str, str | int] = {
        "url": {"DATABASE_URL": f"postgresql://logs:hidden@127.0.0.1:{closed_port}/logs"},
        "parts": {"DB_HOST": "127.0.0.1", "DB_PORT": closed_port, "DB_PASS": "hidden"},
        "hosts": {"DATABASE_URL": f"postgresql://logs:hidden@127.0.0.1:{closed_port},127.0.0.1:{closed_port}/logs"},
        "socket": {"DATABASE_URL": "postgresql://logs:hidden@/logs?host=/nowhere"},
    }[address]  # type: ignore[assignment]
    done = command_without_database(command, **settings)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "/nowhere" in line if address == "socket" else str(closed_port) in line
    assert "hidden" not in line


def test_a_database_that_does_not_exist_is_one_clear_line(postgres: Postgres) -> None:
    done = backend_command("migrate", postgres.url("no_such_database"), check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "no_such_database" in line


def test_a_database_that_lacks_characters_is_refused_in_one_line(
    postgres: Postgres, start_backend: Callable[..., Backend]
) -> None:
    url = database_of_encoding(postgres, "LATIN1")
    done = backend_command("migrate", url, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "LATIN1" in line
    assert "ENCODING 'UTF8'" in line
    backend = start_backend(DATABASE_URL=url)
    assert requests.post(backend.data_url, json={"log": "::1 GET /a 200"}, timeout=SECONDS).status_code == 503
    backend.wait_for_line(r"database \(storing\) failing: .*LATIN1.*ENCODING 'UTF8'")


def test_a_database_without_an_encoding_keeps_every_character(
    postgres: Postgres, start_backend: Callable[..., Backend]
) -> None:
    url = database_of_encoding(postgres, "SQL_ASCII")
    migrate(url)
    backend = start_backend(DATABASE_URL=url)
    line = {"id": str(uuid.uuid4()), "log": "::1 GET /\u65e5\u672c/\U0001f600 200"}
    for status in (201, 200):
        assert requests.post(backend.data_url, json=line, timeout=SECONDS).status_code == status
    assert [record["log"]["uri"] for record in backend.records()] == ["/\u65e5\u672c/\U0001f600"]


def database_of_encoding(postgres: Postgres, encoding: str) -> str:
    """The URL of a new, empty database."""
    name = f"in_{encoding.lower()}"
    query(postgres.url("postgres"), f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    return postgres.url(name)


def test_a_url_without_a_database_means_that_of_the_user(postgres: Postgres) -> None:
    query(postgres.url("postgres"), "CREATE ROLE nameless SUPERUSER LOGIN")
    query(postgres.url("postgres"), "CREATE DATABASE nameless")
    done = backend_command("migrate", postgres.url("").replace("postgres@", "nameless@"))
    [line] = done.stderr.splitlines()
    assert "migrations applied in the default database at" in line
    assert query(postgres.url("nameless"), "SELECT count(*) FROM logs") == [(0,)]


def test_an_unknown_command_says_which_there_are() -> None:
    done = command_without_database("up")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "migrate" in line
    assert "rollback" in line


def test_a_password_in_an_address_is_not_printed(postgres: Postgres) -> None:
    url = postgres.create_database().replace("postgres@", "postgres:hidden@")
    for command in ("migrate", "migrate", "rollback"):
        done = backend_command(command, url)
        assert "hidden" not in done.stdout + done.stderr


def store_and_read(backend: Backend) -> None:
    name = str(uuid.uuid4())
    answer = requests.post(backend.data_url, json={"log": "::1 GET /a 200", "id": name}, timeout=SECONDS)
    assert answer.status_code == 201, answer.text
    batch = [{"log": "::1 GET /a 200", "id": name}, {"log": "::1 GET /b 200"}]
    answer = requests.post(backend.data_url, json=batch, timeout=SECONDS)
    assert answer.json() == {"accepted": 1, "duplicates": 1, "rejected": []}
    assert [record["log"]["uri"] for record in backend.records("?ip=::1&limit=5")] == ["/a", "/b"]
    assert requests.get(f"{backend.url}/readyz", timeout=SECONDS).status_code == 200


def test_of_several_hosts_the_one_that_takes_writes_is_found(
    postgres: Postgres, start_backend: Callable[..., Backend], closed_port: int
) -> None:
    name = postgres.create_database().split("@/")[1].split("?")[0]
    alive = quote(postgres.socket_folder, safe="")
    url = f"postgresql://postgres@127.0.0.1:{closed_port},{alive}/{name}?target_session_attrs=read-write"
    migrate(url)
    store_and_read(start_backend(DATABASE_URL=url))


def test_the_database_may_be_named_in_parts(postgres: Postgres, start_backend: Callable[..., Backend]) -> None:
    name = postgres.create_logs().split("@/")[1].split("?")[0]
    parts = {"DB_HOST": postgres.socket_folder, "DB_USER": "postgres", "DB_NAME": name, "DB_PASSWORD": "any"}
    backend = start_backend(DATABASE_URL=" ", **parts)
    store_and_read(backend)


@pytest.fixture
def postgres_16() -> Iterator[str]:
    """The URL of a database of an older PostgreSQL."""
    with new_postgres(version=16) as cluster:
        yield cluster.create_database()


@pytest.mark.slow
def test_postgresql_16_serves_as_well(
    postgres_16: str, start_backend: Callable[..., Backend], catalog: list[tuple[Any, ...]]
) -> None:
    assert query(postgres_16, "SHOW server_version_num")[0][0].startswith("16")
    with ThreadPoolExecutor() as pool:
        for process in pool.map(lambda _: begin("migrate", postgres_16), range(2)):
            finish(process)
    assert [row[1] for row in query(postgres_16, CATALOG) if row[0] in ("index", "function", "column")] == [
        row[1] for row in catalog if row[0] in ("index", "function", "column")
    ]
    store_and_read(start_backend(DATABASE_URL=postgres_16))
    for _ in range(STEPS):
        backend_command("rollback", postgres_16)
    assert query(postgres_16, CATALOG) == []
