"""Exactly once, whatever dies, stops or fills up: faults on real processes, and equality of what is there afterwards.

Each test proves that its fault struck, and ends with the oracle: the lines of the journal, the records of the database
and those of the shared file are the same ones.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import requests
from chaos import schedule
from chaos_faults import DISK_KINDS, KINDS
from fakes import FakeBackend, fake_backend, post_lines, proxy_to, some_lines
from harness import (
    ROOT,
    STORING_LOCK,
    WAITING_TO_STORE,
    Backend,
    Postgres,
    Service,
    assert_same,
    backend_with,
    children_of,
    clock_set_back,
    count_lines,
    driver,
    held,
    is_running,
    is_stopped,
    kill,
    new_postgres,
    past_the_guard,
    read_records,
    seconds_behind,
    stop,
)
from waiting import wait_until

Start = Callable[..., Service]
StartBackend = Callable[..., Backend]

SECONDS = 60  # for what takes one or two: the machine may be busy

# ---- Processes ------------------------------------------------------------------------------------------------------


# ---- Files ----------------------------------------------------------------------------------------------------------


def grow(file: Path, lines: int) -> None:
    """Waits until a file has so many lines more."""
    goal = count_lines(file) + lines
    wait_until(lambda: count_lines(file) >= goal, SECONDS, f"{goal} lines in {file}")


def catch_up(file: Path, journal: Path) -> None:
    """Waits until a file has as many lines as the journal has at this moment."""
    goal = count_lines(journal)
    wait_until(lambda: count_lines(file) >= goal, SECONDS, f"{goal} lines in {file}")


def deliver_rest(start: Start, ended: Service) -> None:
    """What a client had no time left for after SIGTERM, one that adds no lines delivers: its input is empty."""
    assert start("client.py", **{**ended.settings, "SOURCE": "-"}).process.wait(SECONDS) == 0


def assert_equal_everywhere(journal: Path, backend: Backend, *shared: Path) -> None:
    """The oracle. The journal's client has ended or is idle."""
    assert journal.read_bytes().endswith(b"\n")
    wait_until(lambda: count_lines(*shared) >= count_lines(journal), SECONDS, f"all lines in {shared}", poll=0.05)
    assert all(file.read_bytes()[-1:] in (b"", b"\n") for file in shared)
    records = read_records(*shared)
    assert_same(journal, records)
    assert backend.records() == records


def assert_exported(records: list[dict[str, Any]], *shared: Path) -> None:
    """The shared file and its parts come to hold just these records, in this order."""
    wait_until(lambda: count_lines(*shared) >= len(records), SECONDS, f"{len(records)} records in {shared}", poll=0.05)
    assert read_records(*shared) == records


def end_of_turn(fake: FakeBackend) -> None:
    """Waits until the only exporter, which is in its turn, polls again: it has closed the lock file that it removed."""
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known, SECONDS, "a poll after the turn")


def store_many(url: str, count: int) -> None:
    """So many records straight into the table, a microsecond apart."""
    with past_the_guard(url) as connection:
        connection.execute(
            "INSERT INTO logs (id, created, ip, method, uri, status_code)"
            " SELECT gen_random_uuid(), '2026-01-01Z'::timestamptz + n * interval '1 microsecond',"
            " '192.0.2.1', 'GET', '/backlog/' || n, 200 FROM generate_series(1, %s) AS n",
            [count],
        )
        connection.execute("VACUUM ANALYZE logs")


def until_full(step: Callable[[], Any]) -> None:
    """Repeats a step until the disk is full."""
    while True:
        try:
            step()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return
            raise


class TinyDisk:
    """A small file system of its own, in a mount namespace: it needs root or user namespaces, and never outlives us.

    `path` is where this test sees it. Services see it at `folder`, if their program begins with `entered`.
    """

    def __init__(self, folder: Path, options: str) -> None:
        folder.mkdir()
        self.folder = folder
        own_user = [] if os.geteuid() == 0 else ["--map-root-user"]
        mount = 'mount -t tmpfs -o "$1" tiny "$2" && echo mounted && exec sleep infinity'
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *own_user, "sh", "-c", mount, "sh", options, str(folder)], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n", "a tmpfs could not be mounted: root or user namespaces?"
        self.path = Path(f"/proc/{self._holder.pid}/root{folder}")
        self._fillers: list[Path] = []

    @property
    def entered(self) -> str:
        return (
            "import ctypes, os\n"
            "for kind in ('user', 'mnt'):\n"
            f"    theirs = f'/proc/{self._holder.pid}/ns/{{kind}}'\n"
            "    if os.readlink(theirs) != os.readlink(f'/proc/self/ns/{kind}'):\n"
            "        if ctypes.CDLL(None).setns(os.open(theirs, os.O_RDONLY), 0):\n"
            "            raise SystemExit(f'cannot enter the {kind} namespace')\n"
        )

    def program(self, folder: Path, script: str) -> str:
        """A service that sees this disk."""
        run = f"import runpy\nrunpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        return driver(folder, f"on_tiny_disk_{script}", self.entered + run)

    def fill(self, left_bytes: int = 0) -> None:
        """Takes all room, but for whole pages of 4 KiB."""
        filler = self.path / "filler"
        self._fillers.append(filler)
        with filler.open("wb", buffering=0) as file:
            until_full(lambda: file.write(b"f" * 4096))
        os.truncate(filler, filler.stat().st_size - left_bytes)

    def fill_names(self) -> None:
        """Takes all inodes: existing files can grow, and none can be created."""
        until_full(self._add_name)

    def _add_name(self) -> None:
        filler = self.path / f"filler.{len(self._fillers)}"
        filler.touch()
        self._fillers.append(filler)

    def make_room(self) -> None:
        while self._fillers:
            self._fillers.pop().unlink()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait(20)
        if self._holder.stdout:
            self._holder.stdout.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], TinyDisk]]:
    """Makes one: tiny_disk("size=1m")."""
    with ExitStack() as stack:

        def make(options: str) -> TinyDisk:
            disk = TinyDisk(tmp_path / "tiny", options)
            stack.callback(disk.close)
            return disk

        yield make


# ---- Killed backends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "workers"), [(moment, workers) for moment in ("before", "in", "after") for workers in (1, 2)]
)
def test_kill_9_of_a_backend_before_in_and_after_the_commit_stores_each_line_once(
    start: Start, start_backend: StartBackend, journal: Path, tmp_path: Path, moment: str, workers: int
) -> None:
    """With two workers it is their parent that is killed: they end after it, with what they have in hand."""
    source = tmp_path / "access.log"
    source.write_text("".join(f"{line}\n" for line in some_lines(500)))
    backend = start_backend(WORKERS=workers)
    count = 1 if workers == 1 else 3
    wait_until(lambda: len(children_of(backend.pid)) == count - 1, SECONDS, "the workers")
    processes = [backend.pid, *children_of(backend.pid)]

    with psycopg.connect(backend.database_url, autocommit=True) as watcher:

        def waiting() -> list[Any]:
            return watcher.execute(WAITING_TO_STORE).fetchall()

        def count_stored() -> int:
            row = watcher.execute("SELECT count(*) FROM logs").fetchone()
            assert row is not None
            return int(row[0])

        with psycopg.connect(backend.database_url) as holder:
            holder.execute(STORING_LOCK)
            client = start("client.py", URL=backend.data_url, LOG_FILE=journal, SOURCE=source)
            wait_until(waiting, SECONDS, "a statement that is about to store")
            if moment == "before":  # its transaction never commits
                kill(backend)
                wait_until(lambda: not any(map(is_running, processes)), SECONDS, "the end of the workers")
                watcher.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY(%s)",
                                [[pid for (pid,) in waiting()]])  # fmt: skip
                wait_until(lambda: not waiting(), SECONDS, "the end of the statement")
                holder.rollback()
                assert count_stored() == 0
            elif moment == "in":  # the server goes on with the statement of a dead process
                kill(backend)
                holder.rollback()
                wait_until(lambda: count_stored() == 500, SECONDS, "the commit")
            else:  # the answer of the database is there, and nobody reads it
                stop(*processes)
                holder.rollback()
                wait_until(lambda: count_stored() == 500, SECONDS, "the commit")
                kill(backend)
                for worker in processes[1:]:
                    os.kill(worker, signal.SIGCONT)

    wait_until(lambda: not any(map(is_running, processes)), SECONDS, "the end of the workers")
    again = start_backend(DATABASE_URL=backend.database_url, BACKEND_PORT=urlsplit(backend.url).port, WORKERS=workers)
    with source.open("a") as file:
        file.write("192.0.2.1 GET /last 200\n")
    wait_until(lambda: len(again.records()) >= 501, SECONDS, "all records", poll=0.1)
    assert client.end() == 0
    client.wait_for_line("stopped; 501 lines delivered, 0 refused, 0 bytes left")
    assert journal.read_text() == source.read_text()
    assert_same(journal, again.records())


# ---- The network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_seconds", [-1, 0, 0.3], ids=["before", "together", "later"])
def test_a_post_that_the_network_delivers_twice_is_stored_once(
    start: Start, backend: Backend, journal: Path, shared: Path, after_seconds: float
) -> None:
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    with proxy_to(backend) as proxy:
        proxy.double_next(*[after_seconds] * 50)
        client = start("client.py", URL=proxy.data_url, LOG_FILE=journal, THREADS_AMOUNT=8, REQUEST_DELAY_LIMIT=40)
        wait_until(lambda: proxy.doubled == 50, SECONDS, "the answers to 50 copies")
        assert client.end() == 0
        deliver_rest(start, client)
    assert_equal_everywhere(journal, backend, shared)
    assert exporter.end() == 0


@pytest.mark.slow
def test_an_export_may_be_cut_at_any_byte_of_a_reply(start: Start, backend: Backend, shared: Path) -> None:
    """A record at a time; of the reply that has it one byte more comes through each time, from its first byte to its
    last chunk; where it is shorter, the next one is cut."""
    post_lines(backend, ["192.0.2.1 GET /0000 200"])
    with requests.get(backend.data_url, headers={"Accept": "application/x-ndjson"}, timeout=SECONDS) as reply:
        size = len(reply.content) + sum(len(f"{name}: {value}\r\n") for name, value in reply.headers.items()) + 40
    with proxy_to(backend) as proxy:
        start("background.py", URL=proxy.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=1)
        for kept in range(size):
            wait_until(lambda: count_lines(shared) == kept + 1, SECONDS, "the record", poll=0.002)  # noqa: B023
            held = proxy.held
            proxy.flowing.clear()
            wait_until(lambda: proxy.held > held, SECONDS, "a request", poll=0.001)  # noqa: B023
            post_lines(backend, [f"192.0.2.1 GET /{kept:04} 200"])
            proxy.cut_next(kept)
            proxy.flowing.set()
        wait_until(lambda: proxy.cuts == size, SECONDS, "the last cut")
    assert_exported(backend.records(), shared)
    assert len(backend.records()) == size + 1


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize("what", ["backend", pytest.param("database", marks=pytest.mark.slow)])
def test_an_export_that_ends_before_its_end_is_not_taken_for_a_whole_one(
    start_backend: StartBackend, victim: Postgres, what: str, accept: str
) -> None:
    backend = start_backend(DATABASE_URL=victim.create_logs())
    store_many(backend.database_url, 100_000)
    received = bytearray()
    with requests.get(backend.data_url, headers={"Accept": accept}, stream=True, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        pieces = answer.iter_content(65536)
        received += next(pieces)
        if what == "backend":
            kill(backend)
        else:
            victim.stop("immediate")
        with pytest.raises(requests.exceptions.ChunkedEncodingError):  # what any HTTP library says of a cut reply
            deque(map(received.extend, pieces))
    if what == "database":
        victim.start()
        wait_until(lambda: requests.get(f"{backend.data_url}?limit=1", timeout=SECONDS).ok, SECONDS, "its return")
    assert 0 < received.count(b'"uri":"/backlog/') < 100_000
    with pytest.raises(ValueError, match=r".+"):
        json.loads(received)


# ---- The lock -------------------------------------------------------------------------------------------------------

# Takes turns until it is told to end, and notes each on a page of its own: when it began, the latest moment at which it
# was certainly inside, and whether it came out. A killed contender's last turn ends with the latest stamp.
CONTENDER = """
import mmap, os, random, struct, threading, time
import background

directory, notes, ending = (os.environ[name] for name in ("DIRECTORY", "NOTES", "ENDING"))
TURN = struct.Struct("<ddq")
descriptor = os.open(notes, os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.ftruncate(descriptor, 1 << 22)
page = mmap.mmap(descriptor, 1 << 22)
turn = background.Turn(directory, "data.txt")
at = 0
while not os.path.exists(ending):
    with turn.taken() as ours:
        if ours:
            began = time.monotonic()
            for pause in (0, 0, 0.0003, 0):
                TURN.pack_into(page, at, began, time.monotonic(), 0)
                threading.Event().wait(pause)
            TURN.pack_into(page, at, began, time.monotonic(), 1)
            at += TURN.size
    threading.Event().wait(random.uniform(0, 0.001))
"""
TURN_NOTE = struct.Struct("<ddq")


@pytest.mark.slow
def test_in_10000_turns_of_8_contenders_that_are_killed_at_random_no_two_overlap(
    start: Start, shared: Path, tmp_path: Path
) -> None:
    dice = random.Random(8)
    program = driver(tmp_path, "contender.py", CONTENDER)
    notes: list[Path] = []
    ending = tmp_path / "ending"

    def contend() -> Service:
        notes.append(tmp_path / f"turns.{len(notes)}")
        return start(program, DIRECTORY=shared.parent, NOTES=notes[-1], ENDING=ending)

    def turns_of(note: Path) -> list[tuple[float, float, int]]:
        pages = note.read_bytes() if note.exists() else b""
        return list(itertools.takewhile(itemgetter(0), TURN_NOTE.iter_unpack(pages[: len(pages) // 24 * 24])))

    contenders = [contend() for _ in range(8)]
    wait_until(lambda: all(map(turns_of, notes)), SECONDS, "a turn of each contender")

    def stopped_inside() -> Service | None:
        """One that was stopped (SIGSTOP) during its turn, if this attempt has found one."""
        chosen = dice.choice(contenders)
        stop(chosen.pid)
        if turns_of(Path(str(chosen.settings["NOTES"])))[-1][2] == 0:
            return chosen
        chosen.kill(signal.SIGCONT)
        return None

    for n in range(20):
        if n % 2:
            chosen = dice.choice(contenders)
        else:
            found = wait_until(stopped_inside, SECONDS, "one that was stopped during its turn", poll=0)
            assert found is not None
            chosen = found
        kill(chosen)
        contenders[contenders.index(chosen)] = contend()
        wait_until(lambda: turns_of(notes[-1]), SECONDS, "a turn of the new one")
    wait_until(lambda: sum(len(turns_of(note)) for note in notes) >= 10_000, SECONDS, "10,000 turns", poll=0.2)
    ending.touch()
    assert [contender.process.wait(SECONDS) for contender in contenders] == [0] * 8

    turns = sorted(turn for note in notes for turn in turns_of(note))
    assert len(turns) >= 10_000
    assert sum(not ended for _, _, ended in turns) >= 10  # killed during their turns
    last = 0.0
    for began, latest, _ in turns:
        assert began > last, f"two were inside at {began}"
        last = latest
    assert [entry.name for entry in shared.parent.iterdir()] == []  # nothing is left, not even a lock file


# SIGSTOP between making the lock file and locking it, the first time only
STOPPED_BEFORE_LOCKING = """
import fcntl, os, signal
import background

locked = []
flock = fcntl.flock

def stop_before(descriptor, operation):
    if not locked:
        locked.append(True)
        os.kill(os.getpid(), signal.SIGSTOP)
    flock(descriptor, operation)

fcntl.flock = stop_before
sys.exit(background.main([]))
"""


@pytest.mark.parametrize("then", ["taken over", "removed", "made anew"])
def test_an_instance_stopped_between_making_the_lock_file_and_locking_it_lets_others_go_on_and_joins_them(
    start: Start, fake: FakeBackend, shared: Path, tmp_path: Path, then: str
) -> None:
    settings = {"URL": fake.data_url, "DIRECTORY": shared.parent, "REQUEST_DELAY": 20}
    lock = shared.with_name("data.txt.lock")
    fake.add(some_lines(3000))
    sleeper = start(driver(tmp_path, "stopped.py", STOPPED_BEFORE_LOCKING), **settings)
    wait_until(lambda: is_stopped(sleeper.pid), what="the stop")
    assert lock.exists()
    inode = lock.stat().st_ino

    if then == "taken over":
        other = start("background.py", **settings)
        assert_exported(fake.records(), shared)
        fake.add(some_lines(3000, "more"))
        assert_exported(fake.records(), shared)
        sleeper.kill(signal.SIGCONT)
        fake.add(some_lines(3000, "both"))
        assert_exported(fake.records(), shared)
        assert [other.end(), sleeper.end()] == [0, 0]
        return

    lock.unlink()
    if then == "made anew":  # the stopped one's file is another one than that at the path
        lock.touch()
        assert lock.stat().st_ino != inode
    sleeper.kill(signal.SIGCONT)
    others = [start("background.py", **settings) for _ in range(3)]
    fake.add(some_lines(3000, "more"))
    assert_exported(fake.records(), shared)
    for service in others:
        service.wait_for_line("appending to")
    assert [service.end() for service in (sleeper, *others)] == [0] * 4
    assert not lock.exists()
    assert read_records(shared) == fake.records()


# SIGSTOP when half of the first records is in the file
STOPPED_IN_MID_WRITE = """
import os, signal
import background

write, stopped = os.write, []

def write_half(descriptor, data):
    if stopped or b'"created"' not in bytes(data):
        return write(descriptor, data)
    stopped.append(True)
    written = write(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGSTOP)
    return written

os.write = write_half
sys.exit(background.main([]))
"""


@pytest.mark.parametrize("then", ["continued", "killed"])
def test_nobody_writes_beside_an_instance_stopped_in_mid_write_and_if_it_is_killed_the_next_goes_on_at_once(
    start: Start, fake: FakeBackend, shared: Path, tmp_path: Path, then: str
) -> None:
    settings = {"URL": fake.data_url, "DIRECTORY": shared.parent, "REQUEST_DELAY": 20}
    fake.add(some_lines(1001))
    sleeper = start(driver(tmp_path, "stopped.py", STOPPED_IN_MID_WRITE), **settings)
    wait_until(lambda: is_stopped(sleeper.pid), what="the stop")
    half = shared.read_bytes()
    assert half[-1:] != b"\n"
    others = [start("background.py", **settings) for _ in range(3)]
    for other in others:
        other.wait_for_line("appending to")
    fake.add(some_lines(1000, "more"))
    cursor, known = fake.records()[-1]["created"], len(fake.requests)
    wait_until(
        lambda: sum(request.query["date_from"] >= cursor for request in fake.requests[known:]) > 60, what="their polls"
    )
    assert shared.read_bytes() == half
    began = time.monotonic()
    sleeper.kill(signal.SIGCONT if then == "continued" else signal.SIGKILL)
    assert_exported(fake.records(), shared)
    assert time.monotonic() - began < 15  # on a busy machine; no age has to pass
    if then == "killed":
        said = "".join(other.printed for other in others)
        assert f"cut off {len(half) - half.rfind(bytes([10])) - 1} bytes of a record" in said
    else:
        assert sleeper.end() == 0
    fake.add(some_lines(1000, "after"))
    assert_exported(fake.records(), shared)
    assert [other.end() for other in others] == [0, 0, 0]


@pytest.mark.parametrize("position", [None, b"", b"garbage", b"stale"], ids=["missing", "empty", "garbage", "stale"])
def test_after_a_rename_the_position_may_be_missing_stale_empty_or_garbage(
    start: Start, fake: FakeBackend, shared: Path, position: bytes | None
) -> None:
    beside, parts = shared.with_name("data.txt.position"), [shared]

    def export(tag: str) -> None:
        known = beside.read_bytes() if beside.exists() else b""
        fake.add(some_lines(100, tag))
        instance = start("background.py", URL=fake.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
        assert_exported(fake.records(), *parts)
        wait_until(lambda: beside.exists() and beside.read_bytes() != known, what="the position")
        kill(instance)

    export("first")
    stale = beside.read_bytes()
    export("second")
    parts.insert(0, shared.rename(shared.with_name("data.txt.1")))
    if position is None:
        beside.unlink()
    else:
        beside.write_bytes(stale if position == b"stale" else position)
    export("third")
    export("fourth")


# As somebody else: the interpreter's own folder may be closed to that user, so all is imported before
AS_NOBODY = """
import encodings.idna, json, os
import background

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(background.main([]))
"""


def test_a_lock_file_that_may_not_be_opened_is_named_and_waited_for(
    start: Start, fake: FakeBackend, open_folder: Path, tmp_path: Path
) -> None:
    shared = open_folder / "shared/data.txt"
    shared.parent.mkdir()
    shared.parent.chmod(0o777)
    lock = shared.with_name("data.txt.lock")
    lock.touch(mode=0)
    lock.chmod(0)
    fake.add(some_lines(100))
    settings = {"URL": fake.data_url, "DIRECTORY": shared.parent, "REQUEST_DELAY": 20}
    instance = start(driver(tmp_path, "nobody.py", AS_NOBODY), **settings)
    instance.wait_for_line(r"WARNING.*data.txt.lock is no lock file of ours \(Permission denied\); remove it")
    assert not shared.exists()
    assert lock.stat().st_mode & 0o777 == 0
    lock.unlink()
    assert_exported(fake.records(), shared)
    instance.wait_for_line("back after")
    assert instance.end() == 0


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim() -> Iterator[Postgres]:
    """A PostgreSQL that the tests of this file may ill-treat."""
    with new_postgres() as cluster:
        yield cluster


@pytest.mark.slow
def test_postgresql_may_crash_be_killed_and_be_restarted_under_load_and_all_heals_without_a_restart_of_ours(
    start: Start, start_backend: StartBackend, victim: Postgres, journal: Path, shared: Path
) -> None:
    backend = start_backend(DATABASE_URL=victim.create_logs())
    client = start("client.py", URL=backend.data_url, LOG_FILE=journal, THREADS_AMOUNT=8, REQUEST_DELAY_LIMIT=40)
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    for crash in (partial(victim.stop, "immediate"), victim.kill, victim.stop):
        grow(shared, 200)
        crash()
        grow(journal, 100)  # the client keeps its lines
        answer = requests.get(backend.data_url, timeout=SECONDS)
        assert (answer.status_code, bool(answer.headers.get("Retry-After"))) == (503, True), answer.text
        victim.start()
        catch_up(shared, journal)
    grow(shared, 100)
    assert client.end() == 0
    deliver_rest(start, client)
    assert_equal_everywhere(journal, backend, shared)
    assert exporter.end() == 0
    assert 3 <= backend.printed.count("back after") <= 18, backend.printed  # a dying server may answer once more


@pytest.mark.slow
def test_readers_go_on_without_a_gap_or_a_copy_after_a_dump_was_restored_in_a_younger_postgresql(
    start: Start, start_backend: StartBackend, postgres: Postgres, journal: Path, shared: Path
) -> None:
    with new_postgres(version=16) as old:
        before = start_backend(DATABASE_URL=old.create_logs())
        new_url = postgres.create_database()
        with proxy_to(before) as proxy:
            client = start("client.py", URL=proxy.data_url, LOG_FILE=journal, THREADS_AMOUNT=8, REQUEST_DELAY_LIMIT=40)
            exporters = [
                start("background.py", URL=proxy.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20) for _ in range(2)
            ]
            grow(shared, 300)
            assert before.end() == 0  # an operator stops the writing before the last dump
            dump = subprocess.run(
                [postgres.programs / "pg_dump", before.database_url], capture_output=True, check=True, timeout=SECONDS
            )
            subprocess.run(
                [postgres.programs / "psql", "-v", "ON_ERROR_STOP=1", "-X", "-q", new_url],
                input=dump.stdout, stdout=subprocess.DEVNULL, check=True, timeout=SECONDS,
            )  # fmt: skip
            after = start_backend(DATABASE_URL=new_url)
            proxy.upstream = after.url
            grow(shared, 300)
            assert client.end() == 0
            deliver_rest(start, client)
            assert_equal_everywhere(journal, after, shared)
            assert [exporter.end() for exporter in exporters] == [0, 0]
    with psycopg.connect(new_url) as connection:
        row = connection.execute("SELECT current_setting('server_version_num')::int / 10000").fetchone()
    assert row == (18,)


def test_with_two_backends_and_a_clock_set_back_who_stamps_early_and_commits_late_is_emitted_once_in_order(
    start: Start, start_backend: StartBackend, shared: Path, tmp_path: Path
) -> None:
    backends = [start_backend()]
    backends.append(start_backend(DATABASE_URL=backends[0].database_url))
    journals = [tmp_path / "logs-1.txt", tmp_path / "logs-2.txt"]
    clients = [
        start("client.py", URL=backend.data_url, LOG_FILE=journal, THREADS_AMOUNT=4, REQUEST_DELAY_LIMIT=20)
        for backend, journal in zip(backends, journals, strict=True)
    ]
    exporters = [
        start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20) for backend in backends
    ]
    grow(shared, 200)
    early_line = "192.0.2.1 GET /early 200"
    with clock_set_back(backends[0].database_url) as watcher:
        grow(shared, 200)
        wait_until(lambda: seconds_behind(watcher) > 0.1, SECONDS, "a clock that is behind")
        with psycopg.connect(backends[0].database_url) as early:
            early.execute(
                "SELECT store_logs_v2(ARRAY[%s]::uuid[], '{192.0.2.1}', '{GET}', '{/early}', '{200}')",
                [str(uuid.uuid4())],
            )
            wait_until(lambda: len(watcher.execute(WAITING_TO_STORE).fetchall()) == 2, SECONDS, "both backends to wait")
            lines = count_lines(*journals)
            wait_until(lambda: count_lines(*journals) > lines + 100, SECONDS, "lines that wait")
            assert early_line not in shared.read_text()
            early.commit()
        grow(shared, 200)
    grow(shared, 200)
    for client in clients:
        assert client.end() == 0
        deliver_rest(start, client)
    everything = tmp_path / "all.txt"
    everything.write_text("".join(journal.read_text() for journal in journals) + f"{early_line}\n")
    assert_equal_everywhere(everything, backends[0], shared)
    assert backends[1].records() == backends[0].records()
    assert [exporter.end() for exporter in exporters] == [0, 0]


# ---- Full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_for_the_exporters_position_alone_holds_up_nothing_and_makes_no_copy(
    start: Start, fake: FakeBackend, tiny_disk: Callable[[str], TinyDisk], tmp_path: Path
) -> None:
    """All names are taken but the lock file's."""
    disk = tiny_disk("size=4m,nr_inodes=30")
    file, position = disk.path / "data.txt", disk.path / "data.txt.position"
    program = disk.program(tmp_path, "background.py")
    settings = {"URL": fake.data_url, "DIRECTORY": disk.folder, "REQUEST_DELAY": 20}
    fake.add(some_lines(1000))
    instance = start(program, **settings)
    assert_exported(fake.records(), file)
    end_of_turn(fake)
    with held(disk.path / "data.txt.lock"):
        disk.fill_names()
        known = position.read_bytes()
    for n in range(3):
        fake.add(some_lines(500, f"more{n}"))
        assert_exported(fake.records(), file)
    assert position.read_bytes() == known
    kill(instance)
    fake.add(some_lines(500, "after"))
    again = start(program, **settings)
    assert_exported(fake.records(), file)
    disk.make_room()
    fake.add(some_lines(500, "last"))
    assert_exported(fake.records(), file)
    wait_until(lambda: position.read_bytes() != known, SECONDS, "a new position")
    assert again.end() == 0


@pytest.mark.parametrize("what", ["room", "names"])
def test_a_full_disk_under_the_shared_file_or_for_its_lock_is_waited_for_and_leaves_whole_lines(
    start: Start, fake: FakeBackend, tiny_disk: Callable[[str], TinyDisk], tmp_path: Path, what: str
) -> None:
    disk = tiny_disk("size=4m,nr_inodes=30")
    file = disk.path / "data.txt"
    fake.add(some_lines(1000))
    program = disk.program(tmp_path, "background.py")
    instance = start(program, URL=fake.data_url, DIRECTORY=disk.folder, REQUEST_DELAY=20)
    assert_exported(fake.records(), file)
    end_of_turn(fake)
    if what == "room":
        disk.fill(left_bytes=3 * 4096)
    else:
        disk.fill_names()
    fake.add(some_lines(1000, "more"))
    instance.wait_for_line("WARNING.*No space left")
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 5, what="more polls")
    with held(disk.path / "data.txt.lock") if what == "room" else nullcontext():  # else what fitted may be there yet
        assert read_records(file) == fake.records()[:1000]
    kill(instance)  # nothing of it is lost with the process
    again = start(program, URL=fake.data_url, DIRECTORY=disk.folder, REQUEST_DELAY=20)
    again.wait_for_line("WARNING.*No space left")
    disk.make_room()
    assert_exported(fake.records(), file)
    again.wait_for_line("back after")
    assert again.end() == 0


@pytest.mark.parametrize("what", ["room", "names"])
def test_a_full_disk_under_the_journal_or_for_its_position_costs_no_line_and_makes_no_copy(
    start: Start, fake: FakeBackend, tiny_disk: Callable[[str], TinyDisk], tmp_path: Path, what: str
) -> None:
    disk = tiny_disk("size=1m,nr_inodes=30")
    journal, position = disk.path / "logs.txt", disk.path / "logs.txt.position"
    program = disk.program(tmp_path, "client.py")
    settings = {"URL": fake.data_url, "LOG_FILE": disk.folder / "logs.txt", "REQUEST_DELAY_LIMIT": 10}
    client = start(program, **settings)
    wait_until(lambda: len(fake.stored) > 100 and position.exists(), SECONDS, "100 lines")
    if what == "room":
        disk.fill()
        client.wait_for_line("LOG_FILE .* cannot be written: .*No space left on device; retrying")

        def is_delivered() -> bool:
            lines = journal.read_bytes()  # at its end what fitted of one more may stand, until that is cut off
            return lines.endswith(b"\n") and len(fake.stored) == lines.count(b"\n")

        wait_until(is_delivered, SECONDS, "delivery of what there is, in whole lines")
    else:

        def stopped_between_positions() -> bool:
            """A new one that is there already would make room when it replaces the old one."""
            stop(client.pid)
            if (disk.path / "logs.txt.position.new").exists():
                client.kill(signal.SIGCONT)
                return False
            return True

        wait_until(stopped_between_positions, SECONDS, "a moment without a half-written position")
        disk.fill_names()
        client.kill(signal.SIGCONT)
        acknowledged, known = position.read_text(), len(fake.stored)
        wait_until(lambda: len(fake.stored) > known + 200, SECONDS, "200 lines more")
        assert position.read_text() == acknowledged  # the fault struck: it stays behind
    kill(client)
    disk.make_room()
    posts = len(fake.requests)
    again = start(program, **settings)
    wait_until(lambda: len(fake.requests) > posts + 50, SECONDS, "new lines")
    assert again.end() == 0
    again.wait_for_line("stopped.* 0 bytes left")
    assert_same(journal, fake.records())
    if what == "names":
        before, after = fake.requests[:posts], fake.requests[posts:]  # the dead one's last request may be in either
        ids_before, ids_after = ({item["id"] for request in part for item in request.items} for part in (before, after))
        assert len(ids_before & ids_after) >= 200  # all behind the stale position was sent again


@pytest.mark.parametrize("what", ["room", "names"])
def test_a_full_disk_for_the_refused_lines_leaves_each_of_them_there_once_and_whole(
    start: Start, backend: Backend, tiny_disk: Callable[[str], TinyDisk], tmp_path: Path, what: str
) -> None:
    disk = tiny_disk("size=1m,nr_inodes=30")
    journal, rejected = disk.path / "logs.txt", disk.path / "logs.txt.rejected"
    refused = ["r" * 5500, "s" * 5500, "t" * 5500]  # each longer than a page of the disk
    lines = some_lines(30)
    program = disk.program(tmp_path, "client.py")
    with fake_backend(listening=False) as nowhere:  # the lines get into the journal and no further
        client = start(program, URL=nowhere.data_url, LOG_FILE=disk.folder / "logs.txt", SOURCE=tmp_path / "source")
        (tmp_path / "source").write_text("".join(f"{line}\n" for line in lines[:10] + refused + lines[10:]))
        wait_until(lambda: count_lines(journal) == 33, SECONDS, "all lines in the journal")
        kill(client)
    if what == "room":
        rejected.touch()
        disk.fill(left_bytes=4096)
    else:
        disk.fill_names()
    client = start(program, URL=backend.data_url, LOG_FILE=disk.folder / "logs.txt", SOURCE=tmp_path / "source")
    client.wait_for_line("delivery held up: .*No space left")
    wait_until(lambda: not rejected.exists() or rejected.stat().st_size == 0, SECONDS, "the part that fitted to go")
    disk.make_room()
    with (tmp_path / "source").open("a") as file:
        file.write("192.0.2.1 GET /last 200\n")
    wait_until(lambda: len(backend.records()) >= 31, SECONDS, "all records", poll=0.1)
    assert client.end() == 0
    assert [note["log"] for note in read_notes(rejected)] == refused
    assert [f"/{n}" for n in range(30)] == [
        f"/{record['log']['uri'].split('/')[2]}" for record in backend.records()[:30]
    ]
    assert len(backend.records()) == 31


def read_notes(rejected: Path) -> list[dict[str, str]]:
    """Fails on a torn note."""
    return [json.loads(line) for line in rejected.read_text().splitlines()] if rejected.exists() else []


def test_a_full_folder_for_temporary_files_fails_large_requests_only_and_confirms_none(
    start: Start, postgres: Postgres, tiny_disk: Callable[[str], TinyDisk], tmp_path: Path
) -> None:
    disk = tiny_disk("size=16m")
    url = postgres.create_logs()
    program = disk.program(tmp_path, "backend.py")
    backend = start(program, HOST="127.0.0.1", BACKEND_PORT=0, DATABASE_URL=url, TMPDIR=disk.folder)
    data_url = backend.wait_for_line(r"listening on (http://\S+)")[1] + "/api/data"

    def post(lines: list[str]) -> int:
        """The status; 0 if the connection ended without an answer."""
        items = [{"id": str(uuid.uuid4()), "log": line} for line in lines]
        try:
            answer = requests.post(data_url, json=items, timeout=SECONDS)
        except requests.ConnectionError:
            return 0
        if answer.status_code == 201:
            confirmed.extend(item["id"] for item in items)
        return answer.status_code

    confirmed: list[str] = []
    large = some_lines(9000, padding="p" * 100)  # some 2 MB; over 1 MB a body goes into a file
    free = os.statvfs(disk.path).f_bfree
    assert post(large) == 201
    wait_until(lambda: os.statvfs(disk.path).f_bfree == free, SECONDS, "the end of that file")
    disk.fill(left_bytes=8192)
    assert post(large) in (0, 500, 503)
    assert post(["192.0.2.1 GET /small 200"]) == 201
    assert post(large) in (0, 500, 503)
    disk.make_room()
    assert post(large) == 201
    stored = [record["id"] for record in requests.get(data_url, timeout=SECONDS).json()]
    assert stored == confirmed
    assert backend.end() == 0


# ---- Crowds ---------------------------------------------------------------------------------------------------------


def test_100_slow_and_1000_silent_connections_hold_up_nobody(start_backend: StartBackend, tmp_path: Path) -> None:
    """Slow ones are left alone for as long as this takes on any machine: who waits for them waits for that long."""
    patience = 20 * SECONDS
    backend = start_backend(script=backend_with(tmp_path, HEAD_SECONDS=patience, BODY_GRACE_SECONDS=patience))
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    address = (str(urlsplit(backend.url).hostname), int(urlsplit(backend.url).port or 0))
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(address, timeout=SECONDS))

        silent = [connect() for _ in range(1000)]
        slow = [connect() for _ in range(100)]
        for n, one in enumerate(slow):  # half of a head, or half of a body
            one.sendall(
                b"POST /api/data HTTP/1.1\r\nHost: a\r\nContent-" if n % 2 else
                b"POST /api/data HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 25\r\n\r\n192."
            )  # fmt: skip
        descriptors = Path(f"/proc/{backend.pid}/fd")
        wait_until(lambda: len(list(descriptors.iterdir())) > 1100, SECONDS, "1,100 connections")

        for n in range(20):
            for one in slow[1:]:  # a byte now and then
                one.sendall(b"1")
            began = time.monotonic()
            answer = requests.post(backend.data_url, json={"log": f"192.0.2.1 GET /{n} 200"}, timeout=SECONDS)
            assert answer.status_code == 201
            assert len(backend.records("?limit=5")) == min(5, n + 1)
            assert time.monotonic() - began < 30
        slow[0].sendall(b"0.2.1 GET /slow/0 200")  # a slow one that comes to its end is served as well
        assert slow[0].recv(100).startswith(b"HTTP/1.1 201")
        silent[0].sendall(b"GET /api/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert silent[0].recv(100).startswith(b"HTTP/1.1 200")
    assert len(backend.records()) == 21


# ---- Shutdown -------------------------------------------------------------------------------------------------------


def end_within(service: Service, seconds: float) -> None:
    """SIGTERM: exit status 0 in the time that the README states, and 10 s for a busy machine."""
    began = time.monotonic()
    assert service.end(SECONDS) == 0
    assert time.monotonic() - began < seconds + 10, service.printed


def test_sigterm_of_each_service_under_load_loses_nothing_and_says_what_is_left(
    start: Start, start_backend: StartBackend, journal: Path, shared: Path
) -> None:
    backend = start_backend(WORKERS=2)
    port = urlsplit(backend.url).port

    def generate() -> Service:
        return start("client.py", URL=backend.data_url, LOG_FILE=journal, THREADS_AMOUNT=8, REQUEST_DELAY_LIMIT=10)

    def export() -> Service:
        return start("background.py", URL=backend.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)

    client, exporter = generate(), export()
    grow(shared, 500)
    wait_until(lambda: len(children_of(backend.pid)) == 2, SECONDS, "two workers")
    processes = [backend.pid, *children_of(backend.pid)]
    end_within(backend, 5)
    assert not any(map(is_running, processes))
    assert backend.printed.count("lines were left without an answer") == 2
    backend = start_backend(DATABASE_URL=backend.database_url, BACKEND_PORT=port, WORKERS=2)
    grow(shared, 500)

    end_within(client, 5)
    client.wait_for_line(r"stopped; \d+ lines delivered, 0 refused, \d+ bytes left")
    client = generate()
    grow(shared, 500)
    end_within(exporter, 5)
    exporter.wait_for_line(r"stopped; \d+ records written, \d+ left to the others")
    exporter = export()
    grow(shared, 500)

    with psycopg.connect(backend.database_url) as holder:  # now nobody can store, and the client has to give up
        holder.execute(STORING_LOCK)
        grow(journal, 200)
        end_within(client, 5)
        left = client.wait_for_line(r"stopped; .* refused, (\d+) bytes left")[1]
        assert int(left) > 0
    client = generate()
    grow(shared, 500)
    end_within(client, 5)
    deliver_rest(start, client)
    assert_equal_everywhere(journal, backend, shared)
    end_within(exporter, 5)
    end_within(backend, 5)


def test_sigterm_of_the_backend_answers_what_it_has_stored_and_stores_what_it_has_answered(
    start_backend: StartBackend,
) -> None:
    """Posters without a second attempt: each 201 is a record, each record without a 201 had no answer at all."""
    backend = start_backend()
    sent: dict[str, int] = {}
    running = threading.Event()

    def post_on(_: int) -> None:
        with requests.Session() as session:
            while True:
                name = str(uuid.uuid4())
                sent[name] = 0
                try:
                    answer = session.post(
                        backend.data_url, json={"id": name, "log": "192.0.2.1 GET / 200"}, timeout=SECONDS
                    )
                except requests.ConnectionError:
                    return
                sent[name] = answer.status_code
                if len(sent) > 300:
                    running.set()

    with ThreadPoolExecutor(16) as pool:
        posters = [pool.submit(post_on, n) for n in range(16)]
        assert running.wait(SECONDS)
        end_within(backend, 5)
        for poster in posters:
            poster.result(SECONDS)
    again = start_backend(DATABASE_URL=backend.database_url)
    stored = {record["id"] for record in again.records()}
    assert set(sent.values()) <= {0, 201, 503}
    assert {name for name, status in sent.items() if status == 201} <= stored <= sent.keys()
    assert len(stored) > 250


def settings_of(name: str, backend: Backend, shared: Path, journal: Path) -> dict[str, Any]:
    """What one more service beside this backend is started with."""
    if name == "backend":
        return {"HOST": "127.0.0.1", "BACKEND_PORT": 0, "DATABASE_URL": backend.database_url}
    own = {"LOG_FILE": journal} if name == "client" else {"DIRECTORY": shared.parent}
    return {"URL": backend.data_url, **own}


# The same service; each call that its handler of SIGTERM makes is interrupted by a SIGINT
INTERRUPTED = """
import os
import signal
import {service} as service

def interrupt(frame, event, _):
    if event.endswith("call"):
        os.kill(os.getpid(), signal.SIGINT)

def install(number, handler):
    def handle(*arguments):
        sys.setprofile(interrupt)
        try:
            handler(*arguments)
        finally:
            sys.setprofile(None)

    set_handler(number, handle if number == signal.SIGTERM else handler)

set_handler, signal.signal = signal.signal, install
sys.exit(service.main({arguments}))
"""


@pytest.mark.parametrize(
    ("name", "arguments", "ready"),
    [("backend", "[]", "listening on"), ("client", "", "delivering to"), ("background", "[]", "appending to")],
)
def test_a_signal_that_interrupts_the_handler_of_another_one_ends_the_service_all_the_same(
    start: Start, backend: Backend, shared: Path, journal: Path, tmp_path: Path, name: str, arguments: str, ready: str
) -> None:
    program = driver(tmp_path, f"interrupted_{name}.py", INTERRUPTED.format(service=name, arguments=arguments))
    service = start(program, **settings_of(name, backend, shared, journal))
    service.wait_for_line(ready)
    service.kill(signal.SIGTERM)
    assert service.process.wait(SECONDS) == 0


@pytest.mark.parametrize(
    ("name", "ready"), [("backend", "listening on"), ("client", "delivering to"), ("background", "appending to")]
)
def test_signals_that_come_until_the_very_end_change_nothing(
    start: Start, backend: Backend, shared: Path, journal: Path, name: str, ready: str
) -> None:
    for _ in range(3):
        service = start(f"{name}.py", **settings_of(name, backend, shared, journal))
        service.wait_for_line(ready)
        while service.process.poll() is None:
            service.kill(signal.SIGTERM)
            time.sleep(0.0005)
        assert service.process.returncode == 0


# ---- Refused lines --------------------------------------------------------------------------------------------------

# kill -9 of the client right after a note in .rejected, before the position
KILLED_AFTER_A_NOTE = """
import os, signal
import client

reject, notes = client.Journal.reject, []

def kill_after(journal, *note):
    reject(journal, *note)
    notes.append(note)
    if len(notes) == int(os.environ["KILL_AFTER"]):
        os.kill(os.getpid(), signal.SIGKILL)

client.Journal.reject = kill_after
sys.exit(client.main())
"""


@pytest.mark.parametrize("notes", [1, 2, 3])
def test_kill_9_between_the_note_of_a_refused_line_and_the_position_leaves_one_note(
    start: Start, backend: Backend, journal: Path, tmp_path: Path, notes: int
) -> None:
    source = tmp_path / "access.log"
    refused = ["not a line", "192.0.2.1 GET / 999", "192.0.2.1 G/T / 200"]
    lines = some_lines(9)
    source.write_text("".join(f"{line}\n" for line in [*refused[:2], *lines, refused[2]]))
    settings = {"URL": backend.data_url, "LOG_FILE": journal, "SOURCE": source}
    rejected = tmp_path / "logs.txt.rejected"
    client = start(driver(tmp_path, "killed.py", KILLED_AFTER_A_NOTE), KILL_AFTER=notes, **settings)
    assert client.process.wait(SECONDS) == -signal.SIGKILL
    assert len(read_notes(rejected)) == notes
    assert not (tmp_path / "logs.txt.position").exists()
    again = start("client.py", **settings)
    with source.open("a") as file:
        file.write("192.0.2.1 GET /last 200\n")
    wait_until(lambda: len(backend.records()) >= 10, SECONDS, "all records", poll=0.1)
    assert again.end() == 0
    assert [note["log"] for note in read_notes(rejected)] == refused
    assert len(backend.records()) == 10


# ---- make chaos -----------------------------------------------------------------------------------------------------


def test_a_seed_gives_chaos_one_schedule_in_which_every_kind_comes_up_before_one_comes_up_again() -> None:
    kinds = list(KINDS | DISK_KINDS)
    strikes = schedule(7, 600, kinds)
    assert strikes == schedule(7, 600, kinds) != schedule(8, 600, kinds)
    assert len(strikes) >= 20 * 10
    names = [strike.kind for strike in strikes]
    rounds = [names[start : start + len(kinds)] for start in range(0, len(names), len(kinds))]
    assert all(len(set(one)) == len(one) for one in rounds)
    assert len({strike.kind for strike in schedule(7, 90, kinds)}) > 40
