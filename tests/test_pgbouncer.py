"""PgBouncer in transaction mode between the backend and PostgreSQL: sessions are shared, and it may be killed.

Whatever a promise needs of a session has to be set in the transaction itself: another client of the pooler may have
set it otherwise, and has, in these tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import requests
from harness import Backend, Postgres, Service, assert_same, backend_command, backend_with, count_lines, kept_port
from test_retention import DAY, fill, kept_from, retaining, text, times
from waiting import wait_until

SECONDS = 60
LINE = "192.0.2.1 GET /a 200"

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin") or ""  # Debian keeps it there

CONFIGURATION = """
[databases]
* = host={host} user={user}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {sessions}
logfile = {folder}/log
"""


class PgBouncer:
    """A pooler on a port of its own, before every database of a cluster."""

    def __init__(self, postgres: Postgres, folder: Path, port: int, sessions: int, user: str) -> None:
        self._folder, self.port = folder, port
        self._owner = Path(postgres.socket_folder).stat()
        text = CONFIGURATION.format(host=postgres.socket_folder, user=user, port=port, sessions=sessions, folder=folder)
        (folder / "pgbouncer.ini").write_text(text)
        try:
            self.start()
        except BaseException:
            self.kill()
            raise

    def start(self) -> None:
        # It refuses to run as root, and has to reach the socket
        who: dict[str, Any] = {}
        if os.geteuid() == 0:
            who = {"user": self._owner.st_uid, "group": self._owner.st_gid, "extra_groups": []}
        self.process = subprocess.Popen(
            [PROGRAM, "-q", str(self._folder / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **who,
        )
        wait_until(self._listens, SECONDS, f"pgbouncer; its log:\n{self.log}")

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def log(self) -> str:
        path = self._folder / "log"
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        self.process.kill()  # of one that has ended already, it does nothing
        self.process.wait(SECONDS)

    def url(self, name: str) -> str:
        """Of the database with that name, or of the one that a direct URL names."""
        return f"postgresql://any@127.0.0.1:{self.port}/{urlsplit(name).path.removeprefix('/')}"


@contextmanager
def pgbouncer(postgres: Postgres, sessions: int = 20, user: str = "postgres") -> Iterator[PgBouncer]:
    if not PROGRAM:
        pytest.fail("pgbouncer is missing; install it: apt-get install pgbouncer")
    # Not in pytest's folder, which is closed to pgbouncer's user
    with kept_port() as place, TemporaryDirectory(prefix="pgbouncer-") as folder:
        os.chmod(folder, 0o777)
        pooler = PgBouncer(postgres, Path(folder), place.getsockname()[1], sessions, user)
        try:
            yield pooler
        finally:
            pooler.kill()


@pytest.fixture
def pooler(postgres: Postgres) -> Iterator[PgBouncer]:
    with pgbouncer(postgres) as one:
        yield one


def post(backend: Backend) -> requests.Response:
    document = {"id": str(uuid.uuid4()), "log": LINE}
    return requests.post(backend.data_url, json=document, timeout=SECONDS)


# ---- Kills ----------------------------------------------------------------------------------------------------------


def test_journal_and_table_are_equal_though_pgbouncer_is_killed_again_and_again(
    start: Callable[..., Service],
    start_backend: Callable[..., Backend],
    postgres: Postgres,
    pooler: PgBouncer,
    journal: Path,
) -> None:
    direct = postgres.create_logs()
    backend = start_backend(DATABASE_URL=pooler.url(direct))
    client = start("client.py", URL=backend.data_url, LOG_FILE=journal, THREADS_AMOUNT=8, REQUEST_DELAY_LIMIT=10)
    with psycopg.connect(direct, autocommit=True) as watcher:

        def stored() -> int:
            [count] = watcher.execute("SELECT count(*) FROM logs").fetchone() or (0,)
            return int(count)

        for _ in range(6):
            enough = stored() + 100
            wait_until(lambda: stored() >= enough, SECONDS, "lines in the table")  # noqa: B023
            pooler.kill()
            lines = count_lines(journal)
            wait_until(lambda: count_lines(journal) > lines, SECONDS, "a line that cannot be stored")  # noqa: B023
            pooler.start()
        position = Path(f"{journal}.position")
        enough = stored() + 100
        wait_until(lambda: stored() >= enough and position.exists(), SECONDS, "lines in the table")
        assert client.end() == 0
    client.wait_for_line(" 0 refused, ")
    rest = start("client.py", URL=backend.data_url, LOG_FILE=journal, SOURCE="-")  # what SIGTERM left, if it is slow
    assert rest.process.wait(SECONDS) == 0
    rest.wait_for_line(" 0 refused, 0 bytes left")
    assert_same(journal, backend.records())


def test_an_export_whose_pgbouncer_is_killed_is_whole_or_breaks_off(
    start_backend: Callable[..., Backend], postgres: Postgres, pooler: PgBouncer
) -> None:
    backend = start_backend(DATABASE_URL=pooler.url(postgres.create_logs()))
    lines = "\n".join(f"192.0.2.1 GET /{n}/{'x' * 400} 200" for n in range(10_000)).encode()
    for _ in range(4):
        assert requests.post(backend.data_url, data=lines, headers={"Content-Type": "text/plain"}, timeout=SECONDS).ok
    with requests.get(backend.data_url, stream=True, timeout=SECONDS) as answer:
        pieces = answer.iter_content(65536)
        text = next(pieces)
        pooler.kill()
        pooler.start()
        try:
            text += b"".join(pieces)
        except requests.RequestException:
            return
    records = json.loads(text)
    assert [record["log"]["uri"].split("/")[1] for record in records] == [str(n % 10_000) for n in range(40_000)]


# ---- Shared sessions ------------------------------------------------------------------------------------------------

# At the commit, when a SET clause of the function is over
NOTE_DURABILITY = """
CREATE TABLE durability (setting text);

CREATE FUNCTION note_durability() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO durability VALUES (current_setting('synchronous_commit'));
    RETURN NULL;
END
$$;

CREATE CONSTRAINT TRIGGER note_durability AFTER INSERT ON logs
   DEFERRABLE INITIALLY DEFERRED
   FOR EACH ROW EXECUTE FUNCTION note_durability();
"""


def test_what_is_stored_is_durable_though_the_role_and_the_shared_session_have_it_off(
    start_backend: Callable[..., Backend], postgres: Postgres
) -> None:
    url = postgres.create_logs()
    with psycopg.connect(url, autocommit=True) as direct:
        direct.execute(NOTE_DURABILITY)
        direct.execute("CREATE ROLE careless LOGIN SUPERUSER")
        try:
            direct.execute("ALTER ROLE careless SET synchronous_commit = off")
            with pgbouncer(postgres, sessions=1, user="careless") as pooler:
                backend = start_backend(DATABASE_URL=pooler.url(url))
                for _ in range(5):
                    with psycopg.connect(pooler.url(url), autocommit=True) as careless:  # on the session of all
                        careless.execute("SET synchronous_commit = off")
                    assert post(backend).status_code == 201
                backend.destroy()
            settings = direct.execute("SELECT setting FROM durability").fetchall()
        finally:
            wait_until(lambda: is_alone(direct), SECONDS, "the end of the pooler's session")
            direct.execute("DROP ROLE careless")
    assert settings == [("on",)] * 5


def is_alone(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    return not connection.execute("SELECT 1 FROM pg_stat_activity WHERE usename = 'careless'").fetchall()


def test_created_is_in_utc_and_dates_are_understood_whatever_zone_the_shared_session_has(
    start_backend: Callable[..., Backend], postgres: Postgres
) -> None:
    url = postgres.create_logs()
    with pgbouncer(postgres, sessions=1) as pooler:
        backend = start_backend(DATABASE_URL=pooler.url(url))
        for zone in ("Asia/Tokyo", "America/New_York"):
            with psycopg.connect(pooler.url(url), autocommit=True) as other:
                other.execute(f"SET TimeZone = '{zone}'; SET DateStyle = 'SQL, DMY'".encode())
            stored = post(backend)
            assert stored.status_code == 201
            with psycopg.connect(pooler.url(url), autocommit=True) as other:
                other.execute(f"SET TimeZone = '{zone}'".encode())
            created = stored.json()["created"]
            [record] = backend.records(f"?date_from={created}")
            assert record["created"] == created
            with psycopg.connect(url) as direct:
                row = direct.execute("SELECT max(created) FROM logs").fetchone()
            assert row is not None
            assert created == text(row[0].astimezone(UTC))


# ---- Retention ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_retention_is_exact_though_pgbouncer_is_killed_again_and_again(
    start_backend: Callable[..., Backend], postgres: Postgres, pooler: PgBouncer, tmp_path: Path
) -> None:
    """Two backends share its sessions, and with them the lock of who deletes."""
    direct = postgres.create_logs()
    fill(direct, 6000, seconds_ago=2 * DAY)
    fill(direct, 1)
    script = retaining(tmp_path, DAY, step_rows=10)
    with psycopg.connect(direct, autocommit=True) as watcher:
        before, own = times(watcher), watcher.info.backend_pid
        settings = {"DATABASE_URL": pooler.url(direct), "RETENTION_DAYS": 1}
        both = [start_backend(script=script, **settings) for _ in range(2)]
        for enough in (5500, 5000):
            wait_until(lambda: len(times(watcher)) <= enough, SECONDS, "some deletion", poll=0.01)  # noqa: B023
            pooler.kill()
            wait_until(lambda: sessions(direct) == {own}, SECONDS, "the end of its sessions")
            left = times(watcher)
            assert len(left) > 2
            assert left == before[-len(left) :]
            assert kept_from(watcher) == before[-len(left) - 1] + timedelta(microseconds=1)
            pooler.start()
        wait_until(lambda: len(times(watcher)) == 2, SECONDS, "the end of what has expired")
        start = kept_from(watcher)
    assert start == before[-3] + timedelta(microseconds=1)
    for backend in both:
        answer = requests.get(f"{backend.data_url}?date_from={before[10].isoformat()[:19]}", timeout=SECONDS)
        assert (answer.status_code, answer.json()["kept_from"]) == (410, text(start))
        assert len(backend.records()) == 2


# ---- Statements that take too long -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["direct", "pgbouncer"])
def test_a_statement_cancelled_for_its_time_is_no_outage(
    start_backend: Callable[..., Backend], postgres: Postgres, pooler: PgBouncer, tmp_path: Path, way: str
) -> None:
    direct = postgres.create_logs()
    url = direct if way == "direct" else pooler.url(direct)
    nobody_counts = "import backend\nbackend.count_minutes = lambda session: None"  # which would wait as well
    script = backend_with(tmp_path, nobody_counts, STATEMENT_SECONDS=2)
    backend = start_backend(script=script, DATABASE_URL=url)
    assert post(backend).status_code == 201
    assert backend.records("?limit=1")
    before, printed = sessions(direct), len(backend.printed)
    waiting = "SELECT pid, waitstart FROM pg_locks WHERE NOT granted AND relation = 'logs'::regclass"
    tries: set[tuple[Any, ...]] = set()
    with psycopg.connect(direct) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("LOCK TABLE logs IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        asking = pool.submit(requests.get, f"{backend.data_url}?limit=1", timeout=SECONDS)

        def is_answered() -> bool:
            tries.update(holder.execute(f"{waiting} AND waitstart IS NOT NULL".encode()))  # it comes a moment later
            return asking.done()

        wait_until(is_answered, SECONDS, "an answer")
        assert time.monotonic() - began >= 2
        assert holder.execute(waiting.encode()).fetchall() == []  # it does not wait on, unseen
    answer = asking.result()
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 1
    assert len(tries) == 1  # there was no second one
    lines = backend.printed[printed:].splitlines()
    assert len(lines) == 1, lines
    assert "back after" not in lines[0]
    assert backend.records("?limit=1")
    assert len(backend.printed[printed:].splitlines()) == 1  # nothing had to come back
    assert sessions(direct) == before


def sessions(url: str) -> set[int]:
    """The server's processes for other clients of that database."""
    with psycopg.connect(url, autocommit=True) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
        return {pid for (pid,) in rows}


# ---- Migrations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["migrate", "rollback"])
def test_migrations_through_pgbouncer_are_refused_with_one_line(
    postgres: Postgres, pooler: PgBouncer, command: str
) -> None:
    direct = postgres.create_logs()
    for _ in range(2):
        refused = backend_command(command, pooler.url(direct), check=False)
        assert refused.returncode == 1
        [line] = (refused.stdout + refused.stderr).splitlines()
        assert re.search("(?i)pooler|pgbouncer", line)
        assert re.search("direct|own address", line)
    assert backend_command("migrate", direct).returncode == 0  # no lock was left behind
