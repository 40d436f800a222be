"""What the store promises: `created` in the order of commits, durable answers, windows that cost what they hold."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urljoin, urlsplit

import psycopg
import pytest
import requests
from harness import WAITING_TO_STORE, Backend, Postgres, Service, driver, past_the_guard
from waiting import wait_until

SECONDS = 60  # for one answer on a busy machine
LINE = "1.2.3.4 GET /a 200"
STORE = "SELECT store_logs_v2(ARRAY[%s]::uuid[], '{1.2.3.4}', '{GET}', '{/held}', '{200}')"
STARTED = Callable[..., Backend]

# ---- Asking ---------------------------------------------------------------------------------------------------------


def post(backend: Backend, line: str = LINE, name: str = "") -> requests.Response:
    document = {"log": line, "id": name or str(uuid.uuid4())}
    return requests.post(backend.data_url, json=document, timeout=SECONDS)


def store(backend: Backend, line: str = LINE) -> dict[str, Any]:
    answer = post(backend, line)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def ids(records: Sequence[dict[str, Any]]) -> list[str]:
    return [record["id"] for record in records]


class Poller:
    """Follows `next` in a thread of its own, from the first moment on, until it is told to stop."""

    def __init__(self, address: str) -> None:
        self.records: list[dict[str, Any]] = []
        self._address = address
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._done = self._pool.submit(self._run)

    def _run(self) -> None:
        quiet = False
        while not quiet:
            stopping = self._stop.is_set()
            quiet = not self._step() and stopping

    def _step(self) -> int:
        answer = requests.get(self._address, timeout=SECONDS)
        assert answer.status_code == 200, answer.text
        self._address = urljoin(answer.url, answer.links["next"]["url"])
        page = answer.json()
        self.records += page
        return len(page)

    def finish(self) -> list[dict[str, Any]]:
        """Everything that came, once nothing more does."""
        self._stop.set()
        self._done.result(SECONDS)
        self._pool.shutdown()
        return self.records


def store_from_many_threads(backends: Sequence[Backend], posts: int) -> list[dict[str, Any]]:
    """The answers to that many posts by 16 threads, started together."""
    together = threading.Barrier(16)

    def run(n: int) -> list[dict[str, Any]]:
        together.wait(SECONDS)
        return [store(backends[m % len(backends)], f"1.2.3.4 GET /{m} 200") for m in range(n, posts, 16)]

    with ThreadPoolExecutor(16) as pool:
        return [answer for answers in pool.map(run, range(16)) for answer in answers]


def assert_followed(answers: list[dict[str, Any]], *pollers: Poller) -> None:
    """Each poller saw each answered record once, in the order of `created`, which is unique."""
    answers = sorted(answers, key=lambda answer: str(answer["created"]))
    assert len({answer["created"] for answer in answers}) == len(answers)
    for poller in pollers:
        seen = [{"id": record["id"], "created": record["created"]} for record in poller.finish()]
        assert seen == answers


# ---- The order of commits -------------------------------------------------------------------------------------------


def test_who_follows_next_while_16_threads_store_sees_each_record_once_in_order(backend: Backend) -> None:
    pollers = [Poller(f"{backend.data_url}?limit=7"), Poller(backend.data_url)]
    assert_followed(store_from_many_threads([backend], 480), *pollers)


def test_two_backends_on_one_database_keep_one_order(start_backend: STARTED) -> None:
    first = start_backend()
    second = start_backend(DATABASE_URL=first.database_url)
    pollers = [Poller(f"{first.data_url}?limit=7"), Poller(second.data_url)]
    assert_followed(store_from_many_threads([first, second], 480), *pollers)


@contextmanager
def held_store(backend: Backend) -> Iterator[tuple[psycopg.Connection[Any], str]]:
    """A transaction that has stored a record and is not committed yet."""
    name = str(uuid.uuid4())
    with psycopg.connect(backend.database_url) as connection:
        connection.execute(STORE, [name])
        yield connection, name


def waiting_sessions(backend: Backend) -> int:
    """How many sessions wait for a lock that another one holds."""
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        return len(connection.execute(WAITING_TO_STORE).fetchall())


def post_while_held(pool: ThreadPoolExecutor, backends: Sequence[Backend]) -> list[Future[requests.Response]]:
    """Posts to each backend, and a look at each one's session as it waits."""
    posts = [pool.submit(post, backend) for backend in backends for _ in range(4)]
    wait_until(lambda: waiting_sessions(backends[0]) == len(backends), SECONDS, "sessions that wait for the lock")
    return posts


def test_nothing_is_seen_early_and_nothing_lost_while_a_transaction_that_stores_is_open(start_backend: STARTED) -> None:
    first = start_backend()
    second = start_backend(DATABASE_URL=first.database_url)
    before = store(first)
    poller = Poller(first.data_url)
    with ThreadPoolExecutor() as pool, held_store(first) as (connection, held):
        posts = post_while_held(pool, [first, second])
        assert ids(second.records()) == [before["id"]]
        connection.commit()
        answers = [answer.result() for answer in posts]
    assert {answer.status_code for answer in answers} == {201}
    records = first.records()
    assert ids(records)[:2] == [before["id"], held]
    assert sorted(ids(records)[2:]) == sorted(answer.json()["id"] for answer in answers)
    assert poller.finish() == records


def test_nothing_remains_of_a_transaction_that_was_rolled_back(start_backend: STARTED) -> None:
    backend = start_backend()
    with ThreadPoolExecutor() as pool, held_store(backend) as (connection, _):
        posts = post_while_held(pool, [backend])
        connection.rollback()
        answers = [answer.result() for answer in posts]
    assert sorted(ids(backend.records())) == sorted(answer.json()["id"] for answer in answers)


def confirmed(backend: Backend, name: str) -> int:
    """The status of another POST under that id; 0 for another 503."""
    status = post(backend, name=name).status_code
    return status if status != 503 else 0


def test_a_post_that_waits_too_long_gets_503_and_is_stored_once_when_sent_again(start_backend: STARTED) -> None:
    backend = start_backend()
    name = str(uuid.uuid4())
    with held_store(backend) as (connection, held):
        answer = post(backend, name=name)
        assert answer.status_code == 503
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert int(answer.headers["Retry-After"]) > 0
        connection.commit()
    again = wait_until(lambda: confirmed(backend, name), SECONDS, "a confirmation")
    assert again in (200, 201)
    assert ids(backend.records()) == [held, name]


def test_created_goes_on_above_the_newest_record_when_the_clock_was_set_back(backend: Backend) -> None:
    future, name = datetime.now(UTC) + timedelta(hours=1), str(uuid.uuid4())
    insert = "INSERT INTO logs VALUES (%s, %s, '1.2.3.4', 'GET', '/future', 200)"
    with past_the_guard(backend.database_url) as connection:
        connection.execute(insert, [name, future])
    answers = store_from_many_threads([backend], 32)
    assert all(datetime.fromisoformat(answer["created"]) > future for answer in answers)
    records = backend.records()
    assert ids(records) == [name, *ids(sorted(answers, key=lambda answer: str(answer["created"])))]
    assert datetime.fromisoformat(records[-1]["created"]) - future < timedelta(seconds=1)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_with_an_old_snapshot_may_not_store(backend: Backend, level: str) -> None:
    with psycopg.connect(backend.database_url) as connection:
        connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
        with pytest.raises(psycopg.Error, match="READ COMMITTED"):
            connection.execute(STORE, [str(uuid.uuid4())])
    assert backend.records() == []


def test_a_database_whose_default_is_an_old_snapshot_is_served_all_the_same(
    start_backend: STARTED, postgres: Postgres
) -> None:
    url = postgres.create_logs()
    alter_database(url, "default_transaction_isolation = 'serializable'")
    backend = start_backend(DATABASE_URL=url)
    stored = store(backend)
    assert ids(backend.records()) == [stored["id"]]


def alter_database(url: str, setting: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{connection.info.dbname}" SET {setting}'.encode())


# ---- Lost answers ---------------------------------------------------------------------------------------------------


class LossyPath:
    """Stands before PostgreSQL's socket, and loses the answer to the next statement that stores, when told to."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.lose_next = threading.Event()
        self.lost = 0
        self._server = str(server)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / server.name))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """A close alone leaves the thread in accept(): restarted by a stop signal, that has the next path's socket."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            storing = threading.Event()
            threading.Thread(target=self._pump, args=(client, server, storing, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, storing, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, storing: threading.Event, answers: bool) -> None:
        with source, suppress(OSError):
            while data := source.recv(65536):
                if not answers and b"store_logs" in data and self.lose_next.is_set():
                    self.lose_next.clear()
                    storing.set()
                if answers and storing.is_set():  # the server answers after its commit
                    self.lost += 1
                    break
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "one line"])
def test_lines_whose_first_answer_was_lost_are_stored_once_and_counted_as_the_first_try_did(
    start_backend: STARTED, postgres: Postgres, kind: str
) -> None:
    url = postgres.create_logs()
    with TemporaryDirectory(prefix="lossy-") as folder:
        path = LossyPath(Path(postgres.socket_folder) / ".s.PGSQL.5432", Path(folder))
        try:
            backend = start_backend(DATABASE_URL=url.replace(postgres.socket_folder, folder))
            store(backend)
            path.lose_next.set()
            lines = [f"1.2.3.4 GET /{n} 200" for n in range(3)]
            bodies = {
                "application/json": json.dumps([{"log": line} for line in lines]),
                "text/plain": "\n".join(lines),
                "one line": json.dumps({"log": lines[0]}),
            }
            about = {"Content-Type": "text/plain" if kind == "text/plain" else "application/json"}
            answer = requests.post(backend.data_url, data=bodies[kind], headers=about, timeout=SECONDS)
            assert path.lost == 1
            records = backend.records()[1:]
        finally:
            path.close()
    assert answer.status_code == 201
    if kind == "one line":
        [record] = records
        assert answer.json() == {"id": record["id"], "created": record["created"]}
    else:
        assert answer.json() == {"accepted": 3, "duplicates": 0, "rejected": []}
        assert [record["log"]["uri"] for record in records] == ["/0", "/1", "/2"]


# ---- On disk --------------------------------------------------------------------------------------------------------

RECORD_DURABILITY = """
CREATE TABLE durability (synchronous_commit text);
CREATE FUNCTION record_durability() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO durability VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
CREATE TRIGGER record_durability AFTER INSERT ON logs FOR EACH ROW EXECUTE FUNCTION record_durability();
"""


@pytest.mark.parametrize(("configured", "used"), [("off", "on"), ("on", "on"), ("remote_apply", "remote_apply")])
def test_a_confirmed_record_is_on_disk_whatever_the_database_is_set_to(
    start_backend: STARTED, postgres: Postgres, configured: str, used: str
) -> None:
    url = postgres.create_logs()
    alter_database(url, f"synchronous_commit = '{configured}'")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(RECORD_DURABILITY)
        store(start_backend(DATABASE_URL=url))
        assert connection.execute("SHOW synchronous_commit").fetchone() == (configured,)
        assert connection.execute("SELECT * FROM durability").fetchall() == [(used,)]


def test_created_is_in_utc_whatever_the_database_is_set_to(start_backend: STARTED, postgres: Postgres) -> None:
    url = postgres.create_logs()
    alter_database(url, "timezone = 'Asia/Kolkata'")
    alter_database(url, "datestyle = 'SQL, DMY'")
    backend = start_backend(DATABASE_URL=url)
    created = store(backend)["created"]
    [record] = backend.records()
    assert record["created"] == created
    assert abs(datetime.fromisoformat(created) - datetime.now(UTC)) < timedelta(minutes=5)


# ---- Many processes -------------------------------------------------------------------------------------------------


def children(service: Service) -> set[int]:
    with open(f"/proc/{service.pid}/task/{service.pid}/children") as file:
        return set(map(int, file.read().split()))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def sessions(backend: Backend) -> int:
    """Sessions that store: each worker has one as soon as it got a POST."""
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        [count] = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND query LIKE '%store_logs%'"
        ).fetchone() or (0,)
    return int(count)


@pytest.fixture
def pair(start_backend: STARTED) -> Backend:
    """A backend with two workers, both up."""
    backend = start_backend(WORKERS=2)
    wait_until(lambda: len(children(backend)) == 2, SECONDS, "two workers")
    return backend


def test_two_workers_both_serve_and_keep_one_order(pair: Backend) -> None:
    poller = Poller(f"{pair.data_url}?limit=7")
    answers: list[dict[str, Any]] = []

    def both_stored() -> bool:
        answers.extend(store_from_many_threads([pair], 32))
        return sessions(pair) == 2

    wait_until(both_stored, SECONDS, "posts at both workers")
    assert_followed(answers, poller)


def is_replaced(backend: Backend, worker: int) -> bool:
    workers = children(backend)
    return worker not in workers and len(workers) == 2


def test_a_killed_worker_is_replaced_and_the_port_keeps_answering(pair: Backend) -> None:
    before = store(pair)
    for victim in children(pair):
        os.kill(victim, signal.SIGKILL)
        wait_until(partial(is_replaced, pair, victim), SECONDS, "another worker")
    answers = store_from_many_threads([pair], 32)
    assert sorted(ids(pair.records())) == sorted([before["id"], *ids(answers)])
    assert pair.process.poll() is None


# The same backend, but the machine lets it start a process only at the fourth try
NO_PROCESSES = """
import os
import backend

fork, refused = os.fork, [1, 2, 3]

def fork_late():
    if refused:
        refused.pop()
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = fork_late
sys.exit(backend.main([]))
"""


def test_a_worker_that_cannot_be_started_yet_is_started_later(start_backend: STARTED, tmp_path: Path) -> None:
    backend = start_backend(script=driver(tmp_path, "no_processes.py", NO_PROCESSES), WORKERS=2)
    wait_until(lambda: len(children(backend)) == 2, SECONDS, "two workers")
    assert store(backend)
    assert backend.printed.count("starting a worker failing: Resource temporarily unavailable") == 1
    backend.wait_for_line("starting a worker works again after")


def test_the_end_of_the_parent_ends_its_workers_and_frees_the_port(pair: Backend, start_backend: STARTED) -> None:
    store(pair)
    workers = children(pair)
    pair.kill(signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, workers)), SECONDS, "the end of the workers")
    port = urlsplit(pair.url).port
    again = start_backend(DATABASE_URL=pair.database_url, BACKEND_PORT=port)
    assert again.url == pair.url
    assert len(again.records()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_ends_all_processes_with_status_0_and_frees_the_port(
    start_backend: STARTED, number: signal.Signals, workers: int
) -> None:
    backend = start_backend(WORKERS=workers)
    store(backend)
    processes = {backend.pid, *children(backend)}
    backend.kill(number)
    assert backend.process.wait(SECONDS) == 0
    assert not any(map(is_running, processes))
    with socket.create_server(("127.0.0.1", int(urlsplit(backend.url).port or 0))):
        pass
    assert "Traceback" not in backend.printed


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_on_the_address_for_any_the_backend_takes_ipv4_and_ipv6(start_backend: STARTED, address: str) -> None:
    backend = start_backend(HOST="::")
    with socket.create_connection((address, int(urlsplit(backend.url).port or 0)), timeout=SECONDS):
        pass


def test_a_taken_port_is_one_clear_line(start_backend: STARTED, start: Callable[..., Service]) -> None:
    backend = start_backend()
    port = urlsplit(backend.url).port
    second = start("backend.py", HOST="127.0.0.1", BACKEND_PORT=port, DATABASE_URL=backend.database_url)
    assert second.process.wait(SECONDS) == 1
    [line] = second.printed.splitlines()
    assert f"127.0.0.1:{port}" in line


# ---- The cost of a window -------------------------------------------------------------------------------------------

ROWS = 200_000
FILL = """
INSERT INTO logs
SELECT gen_random_uuid(), timestamptz '2020-01-01Z' + n * interval '1 second',
       ('10.' || n %% 200 || '.0.1')::inet,
       CASE n %% 1000 WHEN 7 THEN 'PATCH' WHEN 8 THEN 'TRACE' ELSE (ARRAY['GET', 'POST', 'PUT'])[1 + n %% 3] END,
       '/' || n,
       CASE n %% 1000 WHEN 9 THEN 418 ELSE (ARRAY[200, 404])[1 + n %% 2] END
  FROM generate_series(1, %s) AS n
"""
# Rows that were fetched from the table in any way, and those among them that came of reading it from end to end
COST = """
SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'logs')::bigint,
       (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'logs')
"""
# A session reports what it has read at its end
END_SESSIONS = """
SELECT pg_terminate_backend(pid, 30000)
  FROM pg_stat_activity
 WHERE datname = current_database()
   AND pid <> pg_backend_pid()
   AND backend_type = 'client backend'
"""


@pytest.fixture(scope="module")
def large(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A backend whose table has 200,000 rows, one for each second."""
    url = postgres.create_logs()
    with past_the_guard(url) as connection:
        connection.execute(FILL, [ROWS])
        connection.execute("VACUUM (ANALYZE) logs")
    backend = Backend(tmp_path_factory.mktemp("large") / "backend.out", url)
    with psycopg.connect(url, autocommit=True) as connection:
        counted = b"SELECT counted_to_v1() > max(created) FROM logs"  # it reads rows for that, in the background
        wait_until(lambda: connection.execute(counted).fetchone() == (True,), SECONDS, "the end of its counting")
    yield backend
    backend.destroy()


def cost_of(backend: Backend, query: str) -> tuple[int, int, int]:
    """Records in the answer; entries read in indexes for it; rows read by sequential scans for it."""
    with psycopg.connect(backend.database_url, autocommit=True) as connection:
        connection.execute(END_SESSIONS)
        before = connection.execute(COST).fetchone()
        records = len(backend.records(query))
        connection.execute(END_SESSIONS)
        after = connection.execute(COST).fetchone()
    assert before is not None
    assert after is not None
    return records, after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("?date_from=2020-01-02&date_to=2020-01-02T00:10:00", 600),
        ("?date_from=2020-01-03T07:30:00", 201),
        ("?date_from=2030-01-01", 0),
        ("?date_to=2020-01-01T00:10:00", 599),
        ("?limit=10", 10),
        ("?date_from=2020-01-02&limit=10", 10),
        ("?method=PATCH", 200),
        ("?method=NONE", 0),
        ("?method=PATCH&limit=10", 10),
        ("?status_code=418", 200),
        ("?status_code=500", 0),
        ("?status_code=418&limit=10", 10),
        ("?ip=10.199.0.1&limit=10", 10),
        ("?ip=10.7.0.1", 1000),
        ("?ip=192.0.2.1", 0),
        ("?ip=10.7.0.1&date_from=2020-01-02&date_to=2020-01-02T01:00:00", 18),
        ("?method=GET&date_from=2020-01-02&date_to=2020-01-02T00:10:00", 200),
        ("?status_code=200&date_from=2020-01-02&limit=10", 10),
        ("?ip=10.7.0.1&method=PATCH", 200),
        ("?method=TRACE&status_code=418", 0),
    ],
)
def test_a_window_costs_what_its_records_cost_and_not_what_the_table_holds(
    large: Backend, query: str, rows: int
) -> None:
    records, read_in_indexes, read_in_sequence = cost_of(large, query)
    assert abs(records - rows) <= 4
    assert read_in_sequence == 0
    assert read_in_indexes <= 6 * rows + 500, f"{read_in_indexes} index entries for {records} records"


def test_storing_costs_the_same_in_a_large_table(large: Backend) -> None:
    with psycopg.connect(large.database_url, autocommit=True) as connection:
        connection.execute(END_SESSIONS)
        before = connection.execute(COST).fetchone()
        store(large)
        connection.execute(END_SESSIONS)
        after = connection.execute(COST).fetchone()
    assert before is not None
    assert after is not None
    assert after[0] - before[0] < 100
    assert after[1] == before[1]
