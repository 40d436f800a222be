"""The arena of `make chaos`: all parts of the pipeline as processes, on disks that can fill up, and the oracle."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from fakes import Proxy
from harness import (
    SERVICES,
    Backend,
    Postgres,
    Service,
    children_of,
    clean_environment,
    count_lines,
    is_running,
    journal_ids,
    kept_port,
    line_of,
    past_the_guard,
    read_records,
)
from waiting import wait_until

REST_SECONDS = 180.0  # until all must be at rest after the last strike
SECONDS = 120.0  # for what takes one or two: the machine may be busy, and other faults may stand in the way
CLIENTS, EXPORTERS, THREADS = 2, 4, 8
WORKERS = (1, 2)  # of each backend
OLD_POSTGRES = 16  # the version at the start; a fault moves the database to a younger cluster
MIB = 1024**2

# ---- Disks ----------------------------------------------------------------------------------------------------------

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20, 0x4000, 0x40000, 2


def call(name: str, *arguments: Any) -> None:
    """A system call of the C library. Raises OSError."""
    if getattr(LIBC, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: Path, flags: int, options: str = "") -> None:
    call("mount", source.encode(), bytes(target), b"tmpfs", ctypes.c_ulong(flags), options.encode())


def enter_own_mounts() -> None:
    """From now on what this process and its children mount is theirs, and ends with them. No other thread may run yet.

    An ordinary user gets it by a user namespace, in which it keeps its name. Raises OSError where it is not allowed.
    """
    user, group = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWNS | (CLONE_NEWUSER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    mount("none", Path("/"), MS_REC | MS_PRIVATE)


class Disk:
    """A file system of its own at a folder (tmpfs), that is full when it is told to be. Who fills it holds `lock`."""

    SIZE, NAMES = 1024 * MIB, 10_000

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        folder.mkdir()
        mount("chaos", folder, 0, f"size={self.SIZE},nr_inodes={self.NAMES},mode=755")

    def fill(self) -> None:
        """Leaves no room: no file can get another page."""
        self._shrink(lambda now: f"size={max(4096, (now.f_blocks - now.f_bfree) * now.f_frsize)}")

    def fill_names(self) -> None:
        """Leaves no names: existing files can grow, none can be created."""
        self._shrink(lambda now: f"nr_inodes={now.f_files - now.f_ffree}")

    def make_room(self) -> None:
        mount("chaos", self.folder, MS_REMOUNT, f"size={self.SIZE},nr_inodes={self.NAMES}")

    def is_full(self) -> bool:
        """Whether a new file with two pages of content is refused for want of room or names."""
        probe = self.folder / "probe"
        try:
            probe.write_bytes(b"p" * 8192)
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            probe.unlink(missing_ok=True)
        return False

    def _shrink(self, options: Callable[[os.statvfs_result], str]) -> None:
        def shrunk() -> bool:
            try:
                mount("chaos", self.folder, MS_REMOUNT, options(os.statvfs(self.folder)))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return False  # more has been used since we asked how much it is
            return True

        wait_until(shrunk, SECONDS, f"a full {self.folder}", poll=0)

    def keep(self) -> None:
        """Moves what is on it to the disk below, where it outlives this process."""
        copy = Path(f"{self.folder}.copy")
        shutil.copytree(self.folder, copy, symlinks=True)
        self.remove()
        copy.rename(self.folder)

    def remove(self) -> None:
        call("umount2", bytes(self.folder), MNT_DETACH)
        self.folder.rmdir()


# ---- Parts ----------------------------------------------------------------------------------------------------------

READY = {"client.py": "delivering to", "background.py": "appending to", "backend.py": "listening on"}


class Slot:
    """A place for one service, which is started again after each death. Who strikes it holds `lock`."""

    def __init__(self, start: Callable[[], Service]) -> None:
        self._start = start
        self.lock = threading.Lock()
        self.again()

    def again(self) -> None:
        self.service = self._start()
        self.service.wait_for_line(READY[self.service.script], SECONDS)

    @property
    def processes(self) -> list[int]:
        """Its own and that of its workers."""
        return [self.service.pid, *children_of(self.service.pid)]

    def end(self, number: int, seconds: float) -> int:
        """Sends a signal; the exit status, once its workers have ended too."""
        processes = self.processes
        assert self.service.process.poll() is None, f"{self.service.script} ended by itself:\n{self.service.printed}"
        self.service.kill(number)
        status = self.service.process.wait(seconds)
        wait_until(lambda: not any(map(is_running, processes)), SECONDS, "the end of the workers")
        return status


class FollowedFile:
    """An access log that is written all the time: by `writer`, a thread, and by the faults that hold it."""

    def __init__(self, path: Path, journal: Path, seed: int) -> None:
        self.path = path
        self.journal = journal  # of the client that follows it
        self.lines = 0
        self.refused: list[str] = []  # lines that the backend refuses for good
        self.writer = threading.Thread(target=self._write, daemon=True)
        self._ended = threading.Event()
        self._seed = seed
        self._begin = 0  # the lines before the file that is at the path now
        self._parts = 0
        self._lock = threading.Lock()
        path.touch()

    def _write(self) -> None:
        dice = random.Random(self._seed)
        while not self._ended.wait(0.05):
            with self._lock:
                self._append(dice.randrange(20))

    def end(self) -> None:
        """Returns when `writer` has written its last line."""
        self._ended.set()
        self.writer.join()

    def _append(self, count: int) -> None:
        numbers = range(self.lines, self.lines + count)
        with self.path.open("a") as file:
            file.writelines(f"10.0.{number % 256}.1 GET /source/{number} 200\n" for number in numbers)
        self.lines += count

    def append_refused(self, lines: Sequence[str]) -> None:
        with self._lock, self.path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
            self.lines += len(lines)
            self.refused.extend(lines)

    @contextmanager
    def held(self, all_read: bool) -> Iterator[Path]:
        """The writer waits, and the client has begun to read the file, or has read all of it: then what is done to
        the file loses nothing, by the README's promise. Gives a new name beside it; another file begins afterwards."""
        with self._lock:
            if self.lines == self._begin:
                self._append(1)
            goal = self.lines if all_read else self._begin + 1
            wait_until(lambda: count_lines(self.journal) >= goal, SECONDS, f"line {goal} in {self.journal}", poll=0.01)
            self._parts += 1
            yield Path(f"{self.path}.{self._parts:04d}")
            self._begin = self.lines

    def written(self) -> Counter[str]:
        """All lines that it ever had."""
        parts = self.path.parent.glob(f"{self.path.name}*")
        return Counter(line for part in parts for line in part.read_text().splitlines())


class Arena:
    """All parts, started. Who strikes PostgreSQL, or bars the shared folder, holds that one's lock."""

    def __init__(self, folder: Path, seed: int, with_disks: bool) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.journals = [folder / f"client{n}" / "logs.txt" for n in range(CLIENTS + 1)]
        self.temporary = folder / "temporary"
        self.disks = {path: Disk(path) for path in self._disk_folders() if with_disks}
        self.temporary.mkdir(exist_ok=True)
        self.parts = 0  # of the shared file
        self.postgres_lock, self.shared_lock = threading.Lock(), threading.Lock()
        self._started = itertools.count(1)
        self._clusters: list[Postgres] = []
        self.postgres = self._new_cluster(version=OLD_POSTGRES)
        self.url = self.postgres.create_logs()
        make_large(self.url)
        self.source = FollowedFile(folder / "access.log", self.journals[-1], seed)
        self._places = [kept_port() for _ in WORKERS]
        self.ports = [place.getsockname()[1] for place in self._places]
        self.backends = [Slot(self._backend(n)) for n in range(len(WORKERS))]
        self.proxies = [Proxy(f"http://127.0.0.1:{port}") for port in self.ports]
        self.clients = [Slot(self._client(n)) for n in range(CLIENTS + 1)]
        self.exporters = [Slot(self._exporter(n)) for n in range(EXPORTERS)]

    def _disk_folders(self) -> list[Path]:
        return [self.shared, self.journals[0].parent, self.temporary]

    @property
    def file(self) -> Path:
        return self.shared / "data.txt"

    @property
    def lock_file(self) -> Path:
        return self.shared / "data.txt.lock"

    def output(self) -> Path:
        return self.folder / f"output.{next(self._started)}"

    def _backend(self, number: int) -> Callable[[], Service]:
        settings: dict[str, Any] = {"BACKEND_PORT": self.ports[number], "WORKERS": WORKERS[number]}
        return lambda: Backend(self.output(), self.url, TMPDIR=str(self.temporary), **settings)

    def client_settings(self, number: int) -> dict[str, Any]:
        settings: dict[str, Any] = {"THREADS_AMOUNT": THREADS, "REQUEST_DELAY_LIMIT": 40}
        settings |= {"URL": self.proxies[number % len(WORKERS)].data_url, "LOG_FILE": str(self.journals[number])}
        return settings | ({"SOURCE": str(self.source.path)} if number == CLIENTS else {})

    def _client(self, number: int) -> Callable[[], Service]:
        return lambda: Service("client.py", self.output(), **self.client_settings(number))

    def exporter_settings(self, number: int) -> dict[str, Any]:
        url = self.proxies[number % len(WORKERS)].data_url
        return {"URL": url, "DIRECTORY": str(self.shared), "REQUEST_DELAY": 100}

    def _exporter(self, number: int) -> Callable[[], Service]:
        return lambda: Service("background.py", self.output(), **self.exporter_settings(number))

    def move_database(self) -> None:
        """Dump and restore into a cluster that is made for it. The backends are stopped, as nothing may write."""
        new = self._new_cluster()
        url = new.create_database()
        restore = [str(new.programs / "psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--dbname={url}"]
        dump = subprocess.run([new.programs / "pg_dump", self.url], capture_output=True, check=True, timeout=SECONDS)
        subprocess.run(restore, input=dump.stdout, capture_output=True, check=True, timeout=SECONDS)
        make_large(url)
        old, self.postgres, self.url = self.postgres, new, url
        old.stop()

    def _new_cluster(self, **version: int) -> Postgres:
        self._clusters.append(Postgres(self.folder / f"postgres.{len(self._clusters)}", **version))
        return self._clusters[-1]

    def files(self) -> list[Path]:
        """The shared file's parts, oldest first."""
        return [*sorted(self.shared.glob("data.txt.[0-9]*")), self.file]

    # -- the end

    def drain(self) -> None:
        """All lines that are in a source or a journal go on to the shared file, in time; then all parts end."""
        deadline = time.monotonic() + REST_SECONDS

        def left() -> float:
            return max(1.0, deadline - time.monotonic())

        self.source.end()
        wait_until(lambda: count_lines(self.journals[-1]) >= self.source.lines, left(), "the rest of the followed file")
        for slot, journal in zip(self.clients, self.journals, strict=True):
            assert slot.end(signal.SIGTERM, left()) == 0, slot.service.printed
            rest = Service("client.py", self.output(), URL=self.proxies[0].data_url, LOG_FILE=str(journal), SOURCE="-")
            assert rest.process.wait(left()) == 0, rest.printed
        total = sum(map(count_lines, self.journals)) - len(self.source.refused)
        wait_until(lambda: count_lines(*self.files()) >= total, left(), f"{total} lines in the shared file", poll=0.2)
        for slot in self.exporters:
            assert slot.end(signal.SIGTERM, left()) == 0, slot.service.printed
        verify(self.exporter_settings(0))
        for slot in self.backends:
            assert slot.end(signal.SIGTERM, left()) == 0, slot.service.printed

    def compare(self) -> int:
        """The oracle; the number of lines. Raises AssertionError for the first thing that is not equal.

        Journals, but for the lines that were refused and are noted, = database = shared file, by id and by content.
        """
        wanted: dict[str, str] = {}
        for journal in self.journals:
            lines = journal_ids(journal)
            notes = read_notes(journal)
            same({note["id"]: lines.get(note["id"], "no line") for note in notes},
                 {note["id"]: note["log"] for note in notes}, "journal", "notes of refused lines")  # fmt: skip
            refused = self.source.refused if journal == self.journals[-1] else []
            assert Counter(note["log"] for note in notes) == Counter(refused), f"not once each in {journal}.rejected"
            wanted |= {key: line for key, line in lines.items() if key not in {note["id"] for note in notes}}
        assert_stored_and_exported(wanted, self.url, self.files())
        assert Counter(self.journals[-1].read_text().splitlines()) == self.source.written(), (
            "the followed file differs from its journal"
        )
        return len(wanted)

    def destroy(self) -> None:
        for slot in (*self.clients, *self.exporters, *self.backends):
            slot.service.destroy()
        for cluster in self._clusters:
            if cluster.running:
                cluster.resume()
                cluster.stop("immediate")

    def keep(self) -> None:
        for disk in self.disks.values():
            disk.keep()

    def remove(self) -> None:
        for disk in self.disks.values():
            disk.remove()
        shutil.rmtree(self.folder)


# Of 1.5 kB each, older than all others
UNSEEN_ROWS = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), '1999-01-01Z'::timestamptz + n * interval '1 microsecond',
       '192.0.2.1', 'GET', '/' || repeat('x', 1500), 200
  FROM generate_series(1, %s) AS n
"""


def make_large(url: str) -> None:
    """Lets the table be larger than a segment of the write-ahead log, by rows that nobody ever sees: then a limit on
    the size of files can stop the one and not the other."""
    with past_the_guard(url) as connection:
        connection.execute("ALTER TABLE logs SET (autovacuum_enabled = FALSE)")
        with connection.transaction():
            connection.execute(UNSEEN_ROWS, [15_000])
            connection.execute("DELETE FROM logs WHERE created < '2000-01-01Z'")
        row = connection.execute("SELECT pg_relation_size('logs')").fetchone()
        assert row is not None
        assert row[0] > 17 * MIB


def verify(settings: dict[str, Any]) -> None:
    """What an operator runs after an incident."""
    command = [sys.executable, str(SERVICES[-1] / "background.py"), "verify"]
    done = subprocess.run(command, env=clean_environment(settings), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"verify: {done.stdout}{done.stderr}"


def read_notes(journal: Path) -> list[dict[str, str]]:
    rejected = Path(f"{journal}.rejected")
    return [json.loads(line) for line in rejected.read_text().splitlines()] if rejected.exists() else []


def failures_at_rest(drain: Callable[[], object], compare: Callable[[], object]) -> list[str]:
    """Compares also what does not come to rest: that says what is missing."""
    failures = []
    for step, failure in ((drain, "NOT AT REST"), (compare, "NOT EQUAL")):
        try:
            step()
        except Exception as error:
            failures.append(f"{failure}: {type(error).__name__}: {error}")
    return failures


def assert_stored_and_exported(wanted: dict[str, str], url: str, files: Sequence[Path]) -> None:
    """The lines of all journals, by id, are those of the database and of the shared file, once each."""
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT id::text, host(ip), method, uri, status_code FROM logs ORDER BY created")
        stored = {row[0]: " ".join(map(str, row[1:])) for row in rows}
    records = read_records(*files)
    same(wanted, stored, "journals", "database")
    same(wanted, {record["id"]: line_of(record) for record in records}, "journals", "shared file")
    assert len(records) == len(wanted), f"{len(records) - len(wanted)} records stand twice in the shared file"
    created = [record["created"] for record in records]
    assert all(a < b for a, b in itertools.pairwise(created)), "created does not strictly increase"


def same(wanted: dict[str, str], found: dict[str, str], left: str, right: str) -> None:
    if wanted != found:
        missing = [f"{key} {wanted[key]}" for key in wanted if key not in found]
        surplus = [f"{key} {found[key]}" for key in found if key not in wanted]
        other = [key for key in wanted if key in found and wanted[key] != found[key]]
        raise AssertionError(
            f"{right} lacks {len(missing)} lines of the {left} ({missing[:3]}), has {len(surplus)} others"
            f" ({surplus[:3]}), and {len(other)} differ ({other[:3]})"
        )
