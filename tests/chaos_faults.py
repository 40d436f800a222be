"""The faults of `make chaos`: each strikes an Arena, and returns what proves that it did, or "" if nothing was there.

A fault ends what it has begun, whatever happens: after it all parts can work again.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psycopg
from arena import SECONDS, UNSEEN_ROWS, Arena, Disk, Slot
from harness import Service, children_of, clock_set_back, count_lines, journal_ids, past_the_guard, seconds_behind, stop
from waiting import wait_until

import background

T = TypeVar("T")
FOREVER = resource.RLIM_INFINITY
GARBAGE = b'{"acknowledged": nonsense\0'
LATE_SECONDS = 30.0 + SECONDS  # the client gives up after 30 s, or later if it is stopped
CROWD, READERS = 300, 20


@dataclass(frozen=True)
class Strike:
    """One fault: when, on which of its possible targets, for how long."""

    at: float  # seconds from the start
    kind: str
    target: int
    seconds: float


Fault = Callable[[Arena, Strike], str]


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def one_of(slots: Sequence[Slot], strike: Strike) -> Slot:
    return slots[strike.target % len(slots)]


def found(condition: Callable[[], T], seconds: float = SECONDS, poll: float = 0.01) -> T | None:
    """The first true value, or None if it does not come in time. Files come and go meanwhile, and disks are full."""

    def look() -> T | None:
        try:
            return condition()
        except OSError:
            return None

    with suppress(AssertionError):
        return wait_until(look, seconds, poll=poll)
    return None


def saying(slots: Sequence[Slot], pattern: str) -> Callable[[], bool]:
    """Whether one of the services has said something like that since now."""

    def count(slot: Slot) -> int:
        return len(re.findall(pattern, slot.service.printed))

    before = {slot.service.output: count(slot) for slot in slots}
    return lambda: any(count(slot) > before.get(slot.service.output, 0) for slot in slots)


@contextmanager
def shared_folder_struck(arena: Arena, pattern: str) -> Iterator[Callable[[], bool]]:
    """One fault of the shared folder at a time; gives whether an exporter has said what is wrong. It begins when one
    has no outage: of one that goes on they say only how it began."""
    with arena.shared_lock:
        found(lambda: not all(map(has_outage, arena.exporters)), poll=0.1)
        yield saying(arena.exporters, pattern)


def has_outage(exporter: Slot) -> bool:
    said = re.findall(r"background\[\d+\]: shared file (?:cannot be written|(back after))", exporter.service.printed)
    return bool(said) and not said[-1]


# ---- Processes ------------------------------------------------------------------------------------------------------


def kill(slots: Sequence[Slot], strike: Strike) -> str:
    slot = one_of(slots, strike)
    with slot.lock:
        status = slot.end(signal.SIGKILL, SECONDS)
        pause(strike.seconds / 3)
        slot.again()
    assert status == -signal.SIGKILL
    return "killed"


def terminate(slots: Sequence[Slot], strike: Strike) -> str:
    """It ends by itself, in its stated time (10 s at most, and as much for a busy machine), with status 0."""
    slot = one_of(slots, strike)
    with slot.lock:
        status = slot.end(signal.SIGTERM, 20)
        assert status == 0, f"exit status {status}:\n{slot.service.printed}"
        pause(strike.seconds / 3)
        slot.again()
    return "exit status 0"


def stop_and_go(slots: Sequence[Slot], strike: Strike) -> str:
    slot = one_of(slots, strike)
    with slot.lock:
        processes = slot.processes
        stop(*processes)
        pause(strike.seconds * 2)
        resume(processes)
    return f"{processes} were stopped"


def resume(processes: Sequence[int]) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill_worker(arena: Arena, strike: Strike) -> str:
    slot = arena.backends[1]
    with slot.lock:
        workers = wait_until(lambda: children_of(slot.service.pid), SECONDS, "workers")
        victim = one(workers, strike)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(set(children_of(slot.service.pid)) - {victim}) >= len(workers), SECONDS, "a new worker")
    return f"worker {victim} was replaced"


def one(pids: Sequence[int], strike: Strike) -> int:
    return pids[strike.target % len(pids)]


# ---- Clients --------------------------------------------------------------------------------------------------------


def kill_client_and_spoil(arena: Arena, strike: Strike) -> str:
    """kill -9, and the position is not what it should be before the next start."""
    number = strike.target % len(arena.clients)
    slot, position = arena.clients[number], Path(f"{arena.journals[number]}.position")
    with slot.lock:
        content = spoilt(position, strike)
        slot.end(signal.SIGKILL, SECONDS)
        replace(position, content)
        slot.again()
    return f"{position.parent.name}: {content!r:.40}"


def spoilt(position: Path, strike: Strike) -> bytes | None:
    """Nothing, emptiness, garbage, or what it was a while ago."""
    content = (None, b"", GARBAGE, b"stale")[strike.target % 4]
    if content == b"stale":
        content = found(position.read_bytes)
        found(lambda: position.read_bytes() != content, 5)
    return content


def replace(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        wait_until(lambda: found(lambda: file.write_bytes(content) >= 0, 1), SECONDS, f"room for {file}")


def start_second_client(arena: Arena, strike: Strike) -> str:
    """On a journal that another one has: it says so and ends."""
    number = strike.target % len(arena.clients)
    with arena.clients[number].lock:
        second = Service("client.py", arena.output(), **arena.client_settings(number))
        status = second.process.wait(SECONDS)
    assert status == 1, f"exit status {status}:\n{second.printed}"
    assert "is in use by another client" in second.printed, second.printed
    return "it was turned away"


def limit_client_files(arena: Arena, strike: Strike) -> str:
    number = strike.target % len(arena.clients)
    return limit_file_size(arena.clients[number], arena.journals[number], strike)


def limit_exporter_files(arena: Arena, strike: Strike) -> str:
    return limit_file_size(one_of(arena.exporters, strike), arena.file, strike)


def limit_file_size(slot: Slot, file: Path, strike: Strike) -> str:
    """Files cannot grow: what a full disk looks like to one process. What it says still fits."""
    with slot.lock:
        size = slot.service.output.stat().st_size + 64 * 1024
        if not found(lambda: file.stat().st_size > size):
            return ""
        said = saying([slot], "File too large")
        resource.prlimit(slot.service.pid, resource.RLIMIT_FSIZE, (size, FOREVER))
        try:
            struck = found(said, SECONDS, poll=0.1)
            pause(strike.seconds)
        finally:
            resource.prlimit(slot.service.pid, resource.RLIMIT_FSIZE, (FOREVER, FOREVER))
    return f"could not write past {size}" if struck else ""


# ---- The followed file ----------------------------------------------------------------------------------------------


def rename_source(arena: Arena, strike: Strike) -> str:
    with arena.source.held(all_read=False) as part:
        arena.source.path.rename(part)
        arena.source.path.touch()
    return part.name


def truncate_source(arena: Arena, strike: Strike) -> str:
    with arena.source.held(all_read=True) as part:
        shutil.copy(arena.source.path, part)
        os.truncate(arena.source.path, 0)
    return f"copied to {part.name}"


def shorten_source(arena: Arena, strike: Strike) -> str:
    """Another, shorter file takes the place of the followed one, which is gone."""
    with arena.source.held(all_read=True) as part:
        shutil.copy(arena.source.path, part)
        other = part.with_name("shorter")
        other.touch()
        other.replace(arena.source.path)
    return f"copied to {part.name}"


def write_refused_lines(arena: Arena, strike: Strike) -> str:
    """Lines that the backend refuses for good; the oracle looks for the note of each."""
    lines = [f"{strike.at} no line", f"192.0.2.1 GET /{strike.at} 999", f"300.0.2.1 GET /{strike.at} 200"]
    arena.source.append_refused(lines[: strike.target % 3 + 1])
    return f"{strike.target % 3 + 1} lines"


# ---- The network ----------------------------------------------------------------------------------------------------


def cut_replies(arena: Arena, strike: Strike) -> str:
    proxy = arena.proxies[strike.target % len(arena.proxies)]
    before = proxy.cuts
    dice = random.Random(strike.at)
    proxy.cut_next(*(dice.randrange(dice.choice((400, 20_000))) for _ in range(5)))
    return f"{proxy.cuts - before} so far" if found(lambda: proxy.cuts > before) else ""


def hold_traffic(arena: Arena, strike: Strike) -> str:
    proxy = arena.proxies[strike.target % len(arena.proxies)]
    before = proxy.held
    proxy.flowing.clear()
    try:
        struck = found(lambda: proxy.held > before)
        pause(strike.seconds * 2)
    finally:
        proxy.flowing.set()
    return f"{proxy.held - before} pieces" if struck else ""


def delay_answer(arena: Arena, strike: Strike) -> str:
    proxy = arena.proxies[strike.target % len(arena.proxies)]
    before = proxy.late
    proxy.delay_next(LATE_SECONDS)
    return "nobody waited any more" if found(lambda: proxy.late > before, LATE_SECONDS + SECONDS) else ""


def double_posts(arena: Arena, strike: Strike) -> str:
    proxy = arena.proxies[strike.target % len(arena.proxies)]
    before = proxy.doubled
    proxy.double_next(-1, 0, strike.seconds / 3)
    return "the copies were answered" if found(lambda: proxy.doubled >= before + 2) else ""


# ---- Backends and their connections ---------------------------------------------------------------------------------


@contextmanager
def held_backend(arena: Arena, strike: Strike) -> Iterator[tuple[str, int]]:
    """The address of a backend that nothing strikes meanwhile."""
    number = strike.target % len(arena.backends)
    with arena.backends[number].lock:
        yield "127.0.0.1", arena.ports[number]


def crowd(arena: Arena, strike: Strike) -> str:
    """Hundreds of connections at once that say nothing, or half of a request; others are served meanwhile."""
    halves = (b"", b"POST /api/data HTTP/1.1\r\nContent-", b"POST /api/data HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
    with held_backend(arena, strike) as address, ExitStack() as stack:
        for n in range(CROWD):
            one = stack.enter_context(socket.create_connection(address, timeout=SECONDS))
            one.sendall(halves[n % 3])
        with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/api/health", timeout=10) as answer:
            assert answer.status == 200
        pause(strike.seconds)
    return f"{CROWD} connections"


def silent_readers(arena: Arena, strike: Strike) -> str:
    """Exports that nobody reads on, and that are cut off after a while."""
    dice = random.Random(strike.at)
    with held_backend(arena, strike) as address, ExitStack() as stack:

        def open_export() -> bool:
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
            one.settimeout(SECONDS)
            one.connect(address)
            one.sendall(b"GET /api/data HTTP/1.1\r\nHost: a\r\n\r\n")
            head = one.recv(12)
            one.recv(dice.choice((1, 1000, 100_000)))
            return head.endswith(b" 200")

        first = found(open_export, poll=0.5)
        opened = sum(bool(found(open_export, 1)) for _ in range(READERS)) if first else 0
        pause(strike.seconds * 2)
    return f"{opened + 1} exports" if first else ""


def fill_temporary(arena: Arena, strike: Strike) -> str:
    """A large request, of lines that are in a journal and have their ids, is confirmed only when there is room."""
    address = arena.ports[strike.target % len(arena.ports)]
    lines = found(lambda: list(journal_ids(arena.journals[0]).items())[:9])
    items = json.dumps([{"id": key, "log": line} for key, line in lines or ()])
    body = (" " * 2_000_000 + items).encode()

    def post() -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{address}/api/data", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    with filled(arena, arena.temporary, Disk.fill) as is_full, arena.backends[strike.target % len(arena.ports)].lock:
        status = post()
        assert status in (0, 500, 503), f"a POST that there was no room for was answered {status}"
        proof = f"answered {status}" if is_full() else ""
        pause(strike.seconds)
    wait_until(lambda: post() in (200, 201), SECONDS, "the large POST to be stored")
    return proof


# ---- The shared folder ----------------------------------------------------------------------------------------------


def owner_of_turn(arena: Arena) -> int:
    """The process that has the flock of the lock file at the path; 0 if there is none."""
    inode = arena.lock_file.stat().st_ino
    owners = re.search(rf"FLOCK +ADVISORY +\w+ +(\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", Path("/proc/locks").read_text())
    return int(owners[1]) if owners else 0


@contextmanager
def caught_in_turn(arena: Arena) -> Iterator[Slot | None]:
    """An exporter that is stopped (SIGSTOP) and has the turn; its slot is locked."""

    def catch() -> Slot | None:
        pid = owner_of_turn(arena)
        slot = next((slot for slot in arena.exporters if slot.service.pid == pid), None)
        if slot is None or not slot.lock.acquire(blocking=False):
            return None
        if slot.service.pid == pid and slot.service.process.poll() is None:
            stop(pid)
            if found(lambda: owner_of_turn(arena) == pid, 0):
                return slot
            resume([pid])
        slot.lock.release()
        return None

    slot = found(catch, poll=0.001)
    try:
        yield slot
    finally:
        if slot:
            resume([slot.service.pid])
            slot.lock.release()


def kill_in_turn(arena: Arena, strike: Strike) -> str:
    with caught_in_turn(arena) as slot:
        if slot is None:
            return ""
        pid = slot.service.pid
        slot.end(signal.SIGKILL, SECONDS)
        pause(strike.seconds / 3)
        slot.again()
        return f"{pid} had the lock"


def stop_in_turn(arena: Arena, strike: Strike) -> str:
    """Nobody may write beside it: what the file is when it was stopped, it is when it goes on."""
    with caught_in_turn(arena) as slot:
        pause(strike.seconds * 2)
        return f"{slot.service.pid} had the lock" if slot else ""


def spoil_export_position(arena: Arena, strike: Strike) -> str:
    content = spoilt(arena.file.with_name("data.txt.position"), strike)
    with arena.shared_lock:  # another fault may look whether the exporters leave the position as it is
        replace(arena.file.with_name("data.txt.position"), content)
    return f"{content!r:.40}"


def bar_export_position(arena: Arena, strike: Strike) -> str:
    """It cannot be written: a folder is in its place. The file grows all the same, or waits if it is a new one."""
    position, bar = arena.file.with_name("data.txt.position"), arena.file.with_name("data.txt.position.new")
    with shared_folder_struck(arena, "shared file cannot be written: .*Is a directory") as said:
        if not found(lambda: made(lambda: bar.mkdir()), poll=0.001):
            return ""
        try:
            old, goal = found(position.read_bytes, 0), (found(lambda: count_lines(*arena.files())) or 0) + 20
            struck = found(lambda: said() or count_lines(*arena.files()) > goal, poll=0.1)
            proof = "it stayed" if struck and found(position.read_bytes, 0) in (old, None) else ""
        finally:
            bar.rmdir()
    return proof


def made(make: Callable[[], None]) -> bool:
    make()
    return True


def rename_shared_file(arena: Arena, strike: Strike) -> str:
    arena.parts += 1
    part = f"data.txt.{arena.parts:04d}"
    return part if found(lambda: made(lambda: os.rename(arena.file, arena.shared / part))) else ""


def leave_lock(arena: Arena, strike: Strike) -> str:
    content = (b"", b"4711\n", b"\xff\0garbage")[strike.target % 3]

    def leave() -> None:
        with arena.lock_file.open("xb") as file:
            file.write(content)

    return f"{content!r}" if found(lambda: made(leave), poll=0.001) else ""


def remove_lock(arena: Arena, strike: Strike) -> str:
    def remove() -> bool:
        if arena.lock_file.is_symlink():  # that one is another fault's
            return False
        arena.lock_file.unlink()
        return True

    return "removed" if found(remove, poll=0.0005) else ""


def remove_lock_twice(arena: Arena, strike: Strike) -> str:
    """The second one is that of who came after the first."""
    return "removed two" if remove_lock(arena, strike) and remove_lock(arena, strike) else ""


def bar_lock(arena: Arena, strike: Strike) -> str:
    """Something else is in the lock file's place; exporters leave it alone, say so, and wait."""
    path = arena.lock_file
    make, remove = (path.mkdir, path.rmdir) if strike.target % 2 else (lambda: path.symlink_to("away"), path.unlink)
    with shared_folder_struck(arena, "data.txt.lock is (no lock file of ours|not a regular file)") as said:
        if not found(lambda: made(make), poll=0.0005):
            return ""

        def said_of_bar() -> bool:
            with suppress(FileExistsError):  # another fault, which removes lock files, may have removed this one
                made(make)
            return said()

        try:
            struck = found(said_of_bar, poll=0.1)
            pause(strike.seconds)
        finally:
            with suppress(FileNotFoundError):
                remove()
    return ("a directory" if strike.target % 2 else "a symbolic link") if struck else ""


def tear_tail(arena: Arena, strike: Strike) -> str:
    """What a writer leaves that dies in the middle of a record."""
    turn = background.Turn(str(arena.shared), arena.file.name)

    def tear() -> bool:
        with suppress(background.Unusable), turn.taken() as ours:
            if ours:
                with open(arena.file, "ab") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.write(b'{"id":"01234567-89ab-cdef')
                return True
        return False

    return "half a record" if found(tear, poll=0.002) else ""


# ---- Full disks -----------------------------------------------------------------------------------------------------


@contextmanager
def filled(arena: Arena, folder: Path, fill: Callable[[Disk], None]) -> Iterator[Callable[[], bool]]:
    """The disk of that folder is full; gives what tells whether it truly is."""
    disk = arena.disks[folder]
    with disk.lock:
        fill(disk)
        try:
            yield disk.is_full
        finally:
            disk.make_room()


def fill_shared(arena: Arena, strike: Strike) -> str:
    return fill_for_exporters(arena, strike, Disk.fill)


def fill_shared_names(arena: Arena, strike: Strike) -> str:
    """No lock file can be made, and no new position."""
    return fill_for_exporters(arena, strike, Disk.fill_names)


def fill_for_exporters(arena: Arena, strike: Strike, fill: Callable[[Disk], None]) -> str:
    with (
        shared_folder_struck(arena, "shared file cannot be written: .*No space left") as said,
        filled(arena, arena.shared, fill) as is_full,
    ):

        def stays_full() -> bool:
            """A lock file, or a half of a write, that was there when the disk was filled has made room when it went."""
            fill(arena.disks[arena.shared])
            return said() and is_full()

        struck = found(stays_full, poll=0.1)
        pause(strike.seconds)
    return "they said so" if struck else ""


def fill_journal(arena: Arena, strike: Strike) -> str:
    slot, journal = arena.clients[0], arena.journals[0]
    with slot.lock:
        said = saying([slot], "No space left")
        with filled(arena, journal.parent, Disk.fill) as is_full:
            struck = found(said, poll=0.1) and is_full()
            pause(strike.seconds)
    return "it said so" if struck else ""


def fill_journal_names(arena: Arena, strike: Strike) -> str:
    """The journal grows on; its position cannot be written."""
    journal, disk = arena.journals[0], arena.disks[arena.journals[0].parent]
    position = Path(f"{journal}.position")
    with arena.clients[0].lock, filled(arena, journal.parent, Disk.fill_names) as is_full:

        def stays() -> bool:
            """A new position that was there already made room for another one, when it took the old one's place."""
            disk.fill_names()
            old, lines = found(position.read_bytes, 0), count_lines(journal)
            wait_until(lambda: count_lines(journal) > lines + 50, SECONDS, "a growing journal")
            return is_full() and found(position.read_bytes, 0) == old

        struck = found(stays)
        pause(strike.seconds)
    return "the position stayed" if struck else ""


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------


def crash_postgres(arena: Arena, strike: Strike) -> str:
    return restart(arena, strike, lambda: arena.postgres.stop("immediate"))


def kill_postgres(arena: Arena, strike: Strike) -> str:
    return restart(arena, strike, lambda: arena.postgres.kill())


def restart_postgres(arena: Arena, strike: Strike) -> str:
    return restart(arena, strike, lambda: arena.postgres.stop())


def restart(arena: Arena, strike: Strike, end: Callable[[], None]) -> str:
    with arena.postgres_lock:
        before = arena.postgres.pid
        end()
        pause(strike.seconds)
        arena.postgres.start()
        return f"{before} ended, {arena.postgres.pid} began"


def move_postgres(arena: Arena, strike: Strike) -> str:
    """The dump of the database is restored in a younger cluster, and the backends go on there."""
    with arena.postgres_lock, ExitStack() as stack:
        before = arena.postgres.pid
        for slot in arena.backends:
            stack.enter_context(slot.lock)
            slot.end(signal.SIGTERM, 20)
            stack.callback(slot.again)  # runs before the lock is released
        arena.move_database()
    return f"from {before} to {arena.postgres.pid}"


def pause_postgres(arena: Arena, strike: Strike) -> str:
    """For longer than the backend and the exporters wait."""
    with arena.postgres_lock:
        arena.postgres.pause()
        pids = arena.postgres.pids
        pause(10 + strike.seconds)
        arena.postgres.resume()
    return f"{len(pids)} processes"


def use_up_connections(arena: Arena, strike: Strike) -> str:
    said = ""
    with arena.postgres_lock:
        with ExitStack() as stack:
            try:
                for _ in range(200):
                    stack.enter_context(psycopg.connect(arena.url))
            except psycopg.OperationalError as error:
                said = str(error)
            pause(strike.seconds)
        wait_until(lambda: connects(arena.url), SECONDS, "a free connection")  # the next fault may need one
    return "too many clients" if "too many clients" in said else ""


def connects(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


def fill_postgres(arena: Arena, strike: Strike) -> str:
    """Its table cannot grow. A statement of our own takes what room is left in it, says so, and is taken back."""
    with arena.postgres_lock, past_the_guard(arena.url) as connection:
        row = connection.execute("SELECT pg_relation_size('logs')").fetchone()
        arena.postgres.limit_file_size(row[0] if row else 0)
        try:
            connection.execute(UNSEEN_ROWS, [row[0] // 500 if row else 0])
            raise AssertionError("the table could grow")
        except psycopg.Error as error:
            pause(strike.seconds)
            return "could not extend" if "could not extend" in str(error) else ""
        finally:
            arena.postgres.limit_file_size(None)


def hold_stamped_transaction(arena: Arena, strike: Strike) -> str:
    """It has stamped and does not commit for a while."""
    with arena.postgres_lock, psycopg.connect(arena.url) as connection:
        connection.execute("SELECT first_created FROM store_logs_v2('{}', '{}', '{}', '{}', '{}')")
        with psycopg.connect(arena.url, autocommit=True) as watcher:
            struck = found(lambda: waiting_sessions(watcher))
            pause(strike.seconds * 2)
    return "others waited" if struck else ""


def waiting_sessions(watcher: psycopg.Connection[tuple[int]]) -> int:
    row = watcher.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone()
    return row[0] if row else 0


def set_clock_back(arena: Arena, strike: Strike) -> str:
    """`created` goes on from the newest record meanwhile."""
    with arena.postgres_lock, clock_set_back(arena.url) as connection:
        pause(strike.seconds * 2)
        # a session that waited for its turn to stamp since before has still looked at the true clock
        behind = found(lambda: (seconds := seconds_behind(connection)) > strike.seconds and seconds, poll=0.1)
    return f"{behind:.1f} s behind" if behind else ""


# ---- All of them ----------------------------------------------------------------------------------------------------

KINDS: dict[str, Fault] = {
    "kill -9 a client": lambda arena, strike: kill(arena.clients, strike),
    "kill -9 a client, spoil its position": kill_client_and_spoil,
    "kill -9 a backend": lambda arena, strike: kill(arena.backends[:1], strike),
    "kill -9 the parent of workers": lambda arena, strike: kill(arena.backends[1:], strike),
    "kill -9 a worker": kill_worker,
    "kill -9 an exporter": lambda arena, strike: kill(arena.exporters, strike),
    "kill -9 an exporter in its turn": kill_in_turn,
    "SIGTERM a client": lambda arena, strike: terminate(arena.clients, strike),
    "SIGTERM a backend": lambda arena, strike: terminate(arena.backends, strike),
    "SIGTERM an exporter": lambda arena, strike: terminate(arena.exporters, strike),
    "stop and continue a client": lambda arena, strike: stop_and_go(arena.clients, strike),
    "stop and continue a backend": lambda arena, strike: stop_and_go(arena.backends, strike),
    "stop and continue an exporter": lambda arena, strike: stop_and_go(arena.exporters, strike),
    "stop an exporter in its turn": stop_in_turn,
    "start a second client on a journal": start_second_client,
    "limit the size of a client's files": limit_client_files,
    "limit the size of an exporter's files": limit_exporter_files,
    "rename the followed file": rename_source,
    "truncate the followed file": truncate_source,
    "replace the followed file": shorten_source,
    "write lines that are refused": write_refused_lines,
    "cut replies": cut_replies,
    "hold traffic": hold_traffic,
    "answer a POST too late": delay_answer,
    "send POSTs twice": double_posts,
    "crowd a backend": crowd,
    "read exports and do not read on": silent_readers,
    "rename the shared file": rename_shared_file,
    "tear the shared file's tail": tear_tail,
    "spoil the exporters' position": spoil_export_position,
    "bar the exporters' position": bar_export_position,
    "leave a lock file": leave_lock,
    "remove the lock file": remove_lock,
    "remove the lock file twice": remove_lock_twice,
    "bar the lock file": bar_lock,
    "crash PostgreSQL": crash_postgres,
    "kill -9 PostgreSQL": kill_postgres,
    "restart PostgreSQL": restart_postgres,
    "pause PostgreSQL": pause_postgres,
    "dump and restore PostgreSQL": move_postgres,
    "use up PostgreSQL's connections": use_up_connections,
    "fill PostgreSQL's disk": fill_postgres,
    "hold a stamped transaction": hold_stamped_transaction,
    "set the database's clock back": set_clock_back,
}

# These need disks that can be filled
DISK_KINDS: dict[str, Fault] = {
    "fill the shared folder": fill_shared,
    "no name for a lock file": fill_shared_names,
    "fill a journal's disk": fill_journal,
    "no name for a client's position": fill_journal_names,
    "fill the backends' temporary folder": fill_temporary,
}
