"""The long fault test: the whole pipeline under load while a seeded schedule of faults strikes; then the oracle.

    python tests/chaos.py --minutes 10 --seed 1 [--sabotage NAME]

2 generating clients with 8 threads each, a client that follows a file which is rotated, 2 backends behind proxies that
can cut and hold replies, 4 background instances, and a PostgreSQL of its own. The same seed gives the same schedule.
After the last strike all is healed, the journals are drained, and the multisets of lines in journals, database and
shared file are compared by id and content. Exit 0 if they are equal and every kind of fault did strike.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from fakes import Proxy
from harness import SERVICES, Backend, Postgres, Service, count_lines, is_stopped, line_of, read_records
from sabotage import sabotaged
from waiting import wait_until

import background

SECONDS_BETWEEN = 2.0  # strikes: 30 a minute
REST_SECONDS = 180.0  # until all must be at rest after the last one
BACKENDS, CLIENTS, EXPORTERS, THREADS = 2, 2, 4, 8
FOREVER = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Strike:
    """One fault: when, on which of its possible targets, for how long."""

    at: float  # seconds from the start
    kind: str
    target: int
    seconds: float


def schedule(seed: int, seconds: float) -> list[Strike]:
    """The strikes of a run. Every kind comes up before one comes up again."""
    dice = random.Random(seed)
    deck: list[str] = []
    strikes = []
    at = 1.0
    while at < seconds:
        if not deck:
            deck = list(KINDS)
            dice.shuffle(deck)
        strikes.append(Strike(round(at, 2), deck.pop(), dice.randrange(8), round(dice.uniform(0.3, 3.0), 2)))
        at += dice.uniform(0.5, 1.5) * SECONDS_BETWEEN
    return strikes


class HoldingProxy(Proxy):
    """A proxy that can also hold all traffic back."""

    def __init__(self, upstream: str) -> None:
        self.flowing = threading.Event()
        self.flowing.set()
        super().__init__(upstream)

    def _pump(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        self.flowing.wait()
        super()._pump(source, target, replies)


class Slot:
    """A place for one service, which is started again after each death."""

    def __init__(self, start: Callable[[], Service]) -> None:
        self._start = start
        self.service = start()
        self.lock = threading.Lock()  # one strike at a time

    def again(self) -> None:
        self.service = self._start()


class Arena:
    """All parts, and the faults that strike them. A fault returns what proves that it struck, or "" if it did not."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.shared = folder / "shared"
        self.journals = [folder / f"client{n}" / "logs.txt" for n in range(CLIENTS + 1)]
        self.source = folder / "access.log"
        self.parts = 0
        self.sources = 0
        self.source_lines = 0
        self.written = threading.Event()
        self.source_lock = threading.Lock()
        self.started = 0
        self.postgres = Postgres(folder / "postgres")
        self.postgres_lock = threading.Lock()
        self.url = self.postgres.create_logs()
        self.ports = [free_port() for _ in range(BACKENDS)]
        self.backends = [Slot(self._backend_starter(port)) for port in self.ports]
        self.proxies = [HoldingProxy(f"http://127.0.0.1:{port}") for port in self.ports]
        self.clients = [Slot(self._client_starter(n)) for n in range(CLIENTS + 1)]
        self.exporters = [Slot(self._exporter_starter(n)) for n in range(EXPORTERS)]

    # -- parts

    def output(self) -> Path:
        self.started += 1
        return self.folder / f"output.{self.started}"

    def _backend_starter(self, port: int) -> Callable[[], Service]:
        return lambda: Backend(self.output(), self.url, BACKEND_PORT=port)

    def _client_starter(self, number: int) -> Callable[[], Service]:
        settings: dict[str, Any] = {"THREADS_AMOUNT": THREADS, "REQUEST_DELAY_LIMIT": 40}
        settings |= {"URL": self.proxies[number % BACKENDS].data_url, "LOG_FILE": str(self.journals[number])}
        settings |= {"SOURCE": str(self.source)} if number == CLIENTS else {}
        return lambda: Service("client.py", self.output(), **settings)

    def _exporter_starter(self, number: int) -> Callable[[], Service]:
        url = self.proxies[number % BACKENDS].data_url
        return lambda: Service("background.py", self.output(), URL=url, DIRECTORY=str(self.shared), REQUEST_DELAY=100)

    def write_source(self) -> None:
        """Appends lines to the followed file until `written` is set."""
        dice = random.Random(self.seed)
        while not self.written.wait(0.05):
            with self.source_lock, self.source.open("a") as file:
                for _ in range(dice.randrange(20)):
                    self.source_lines += 1
                    file.write(f"10.0.{dice.randrange(256)}.1 GET /source/{self.source_lines} 200\n")

    def slots(self, group: list[Slot], strike: Strike) -> Slot:
        return group[strike.target % len(group)]

    # -- faults

    def kill(self, group: list[Slot], strike: Strike, number: int = signal.SIGKILL) -> str:
        slot = self.slots(group, strike)
        with slot.lock:
            slot.service.kill(number)
            status = slot.service.process.wait(30)
            threading.Event().wait(strike.seconds / 3)
            slot.again()
        return f"exit status {status}" if status == (-number if number == signal.SIGKILL else 0) else ""

    def stop_and_go(self, group: list[Slot], strike: Strike) -> str:
        slot = self.slots(group, strike)
        with slot.lock:
            pid = slot.service.pid
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: is_stopped(pid), 5, "the process to stop")
            threading.Event().wait(strike.seconds * 2)
            os.kill(pid, signal.SIGCONT)
        return f"{pid} was stopped"

    def terminate(self, group: list[Slot], strike: Strike) -> str:
        return self.kill(group, strike, signal.SIGTERM)

    def kill_client_with_position(self, strike: Strike) -> str:
        """kill -9, and the position file is lost, emptied or garbled before the next start."""
        number = strike.target % len(self.clients)
        slot, position = self.clients[number], Path(f"{self.journals[number]}.position")
        with slot.lock:
            slot.service.kill()
            slot.service.process.wait(30)
            spoil(position, strike)
            slot.again()
        return f"spoilt {position.name}"

    def spoil_export_position(self, strike: Strike) -> str:
        spoil(self.shared / "data.txt.position", strike)
        return "spoilt"

    def rotate_shared_file(self, strike: Strike) -> str:
        self.parts += 1
        try:
            os.rename(self.shared / "data.txt", self.shared / f"data.txt.{self.parts:04d}")
        except FileNotFoundError:
            return ""
        return f"part {self.parts}"

    def rotate_source(self, strike: Strike) -> str:
        """Only once the client has found the file after the last one: the README says what it misses otherwise."""
        state = Path(f"{self.journals[-1]}.source")
        current = self.source.stat().st_ino
        wait_until(lambda: f'"inode": {current},' in state.read_text(), 60, "the client to follow the newest file")
        with self.source_lock:
            self.sources += 1
            os.rename(self.source, f"{self.source}.{self.sources:04d}")
            self.source.touch()
        return f"source {self.sources}"

    def leave_lock(self, strike: Strike) -> str:
        with suppress(FileExistsError), open(self.shared / "data.txt.lock", "x") as file:
            file.write("garbage")
            return "left a lock file"
        return ""

    def remove_lock(self, strike: Strike) -> str:
        path = self.shared / "data.txt.lock"
        try:
            wait_until(lambda: unlinked(path), 5, "a lock file to remove", poll=0.0005)
        except AssertionError:
            return ""
        return "removed the lock file"

    def tear_tail(self, strike: Strike) -> str:
        """What a writer leaves that dies in the middle of a record."""
        turn = background.Turn(str(self.shared), "data.txt")
        for _ in range(2000):
            with turn.taken() as ours:
                if ours:
                    with suppress(BlockingIOError), open(self.shared / "data.txt", "ab") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        file.write(b'{"id":"01234567-89ab-cdef')
                    return "half a record"
            threading.Event().wait(0.002)
        return ""

    def limit_file_size(self, group: list[Slot], strike: Strike) -> str:
        """Files cannot grow: what a full disk looks like to one process."""
        slot = self.slots(group, strike)
        with slot.lock:
            pid = slot.service.pid
            files = [self.shared / "data.txt", *self.journals]
            size = min((path.stat().st_size for path in files if path.exists()), default=0)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(400, size // 2), FOREVER))
            threading.Event().wait(strike.seconds)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (FOREVER, FOREVER))
        return f"{pid} could not write past {max(400, size // 2)}"

    def crash_postgres(self, strike: Strike) -> str:
        with self.postgres_lock:
            self.postgres.stop("immediate")
            threading.Event().wait(strike.seconds)
            self.postgres.start()
        return "crashed and recovered"

    def pause_postgres(self, strike: Strike) -> str:
        with self.postgres_lock:
            self.postgres.pause()
            pids = self.postgres.pids
            threading.Event().wait(strike.seconds * 4)
            self.postgres.resume()
        return f"{len(pids)} processes"

    def use_up_connections(self, strike: Strike) -> str:
        with self.postgres_lock, ExitStack() as stack:
            try:
                for _ in range(200):
                    stack.enter_context(psycopg.connect(self.url))
            except psycopg.OperationalError:
                threading.Event().wait(strike.seconds)
                return "none was left"
        return ""

    def hold_stamp_lock(self, strike: Strike) -> str:
        """A transaction that has stamped and does not commit for a while."""
        with self.postgres_lock, psycopg.connect(self.url) as connection:
            connection.execute("SELECT first_created FROM store_logs('{}', '{}', '{}', '{}', '{}')")
            threading.Event().wait(strike.seconds * 2)
        return "held"

    def cut_replies(self, strike: Strike) -> str:
        proxy = self.proxies[strike.target % len(self.proxies)]
        before = proxy.cuts
        dice = random.Random(strike.at)
        proxy.cut_next(*(dice.randrange(400) for _ in range(5)))
        wait_until(lambda: proxy.cuts > before, 60, "a reply to be cut")
        return f"{proxy.cuts - before} replies"

    def hold_traffic(self, strike: Strike) -> str:
        proxy = self.proxies[strike.target % len(self.proxies)]
        proxy.flowing.clear()
        threading.Event().wait(strike.seconds * 2)
        proxy.flowing.set()
        return "held"

    # -- the end

    def drain(self) -> None:
        """All lines that are in a source or a journal go on to the shared file."""
        self.written.set()
        wait_until(lambda: count_lines(self.journals[-1]) >= self.source_lines, REST_SECONDS, "the followed file")
        for slot, journal in zip(self.clients, self.journals, strict=True):
            assert slot.service.end(30) == 0, slot.service.printed
            rest = Service("client.py", self.output(), URL=self.proxies[0].data_url, LOG_FILE=str(journal), SOURCE="-")
            assert rest.process.wait(REST_SECONDS) == 0, rest.printed
        total = sum(map(count_lines, self.journals))
        wait_until(
            lambda: sum(map(count_lines, self.files())) >= total, REST_SECONDS, f"{total} lines in the shared file"
        )
        for slot in (*self.exporters, *self.backends):
            assert slot.service.end(30) == 0, slot.service.printed

    def files(self) -> list[Path]:
        """The shared file's parts, oldest first."""
        parts = sorted(path for path in self.shared.glob("data.txt.[0-9]*"))
        return [*parts, self.shared / "data.txt"]

    def compare(self) -> int:
        """The oracle; the number of lines. Raises AssertionError for the first thing that is not equal."""
        wanted = {}
        for journal in self.journals:
            identity, offset = json.loads(Path(f"{journal}.journal").read_text())["identity"], 0
            for line in journal.read_bytes().splitlines(keepends=True):
                wanted[f"{identity}{offset:012x}"] = line.decode().rstrip("\n")
                offset += len(line)
        with psycopg.connect(self.url) as connection:
            rows = connection.execute("SELECT id::text, host(ip), method, uri, status_code FROM logs ORDER BY created")
            stored = {row[0]: " ".join(map(str, row[1:])) for row in rows}
        records = read_records(*self.files())
        same(wanted, stored, "journals", "database")
        same(wanted, {record["id"]: line_of(record) for record in records}, "journals", "shared file")
        assert len(records) == len(wanted), f"{len(records) - len(wanted)} records stand twice in the shared file"
        created = [record["created"] for record in records]
        assert all(a < b for a, b in itertools.pairwise(created)), "created does not strictly increase"
        source = Counter(line for path in self.folder.glob("access.log*") for line in path.read_text().splitlines())
        assert Counter(self.journals[-1].read_text().splitlines()) == source, (
            "the followed file differs from its journal"
        )
        return len(records)

    def destroy(self) -> None:
        for slot in (*self.clients, *self.exporters, *self.backends):
            slot.service.destroy()
        if self.postgres.running:
            self.postgres.resume()
            self.postgres.stop()


KINDS: dict[str, Callable[[Arena, Strike], str]] = {
    "kill -9 a client": lambda arena, strike: arena.kill(arena.clients, strike),
    "kill -9 a backend": lambda arena, strike: arena.kill(arena.backends, strike),
    "kill -9 an exporter": lambda arena, strike: arena.kill(arena.exporters, strike),
    "kill -9 a client, spoil its position": Arena.kill_client_with_position,
    "SIGTERM a client": lambda arena, strike: arena.terminate(arena.clients, strike),
    "SIGTERM a backend": lambda arena, strike: arena.terminate(arena.backends, strike),
    "SIGTERM an exporter": lambda arena, strike: arena.terminate(arena.exporters, strike),
    "stop and continue a client": lambda arena, strike: arena.stop_and_go(arena.clients, strike),
    "stop and continue a backend": lambda arena, strike: arena.stop_and_go(arena.backends, strike),
    "stop and continue an exporter": lambda arena, strike: arena.stop_and_go(arena.exporters, strike),
    "no room for an exporter": lambda arena, strike: arena.limit_file_size(arena.exporters, strike),
    "no room for a client": lambda arena, strike: arena.limit_file_size(arena.clients, strike),
    "spoil the exporters' position": Arena.spoil_export_position,
    "rename the shared file": Arena.rotate_shared_file,
    "rename the followed file": Arena.rotate_source,
    "leave a lock file": Arena.leave_lock,
    "remove the lock file": Arena.remove_lock,
    "tear the shared file's tail": Arena.tear_tail,
    "crash PostgreSQL": Arena.crash_postgres,
    "pause PostgreSQL": Arena.pause_postgres,
    "use up PostgreSQL's connections": Arena.use_up_connections,
    "hold a stamped transaction": Arena.hold_stamp_lock,
    "cut replies": Arena.cut_replies,
    "hold traffic": Arena.hold_traffic,
}


def spoil(path: Path, strike: Strike) -> None:
    """Lost, empty, or garbage."""
    if strike.target % 3 == 0:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(b"" if strike.target % 3 == 1 else b'{"acknowledged": nonsense\0')


def unlinked(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def same(wanted: dict[str, str], found: dict[str, str], left: str, right: str) -> None:
    if wanted != found:
        missing = [f"{key} {wanted[key]}" for key in wanted if key not in found]
        surplus = [f"{key} {found[key]}" for key in found if key not in wanted]
        other = [key for key in wanted if key in found and wanted[key] != found[key]]
        raise AssertionError(
            f"{right} lacks {len(missing)} lines of the {left} ({missing[:3]}), has {len(surplus)} others"
            f" ({surplus[:3]}), and {len(other)} differ ({other[:3]})"
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run(arena: Arena, strikes: list[Strike]) -> Counter[str]:
    """Strikes when each is due, several at a time if need be; how often each kind truly struck."""
    struck: Counter[str] = Counter()
    failures: list[str] = []
    begin = time.monotonic()

    def carry_out(strike: Strike) -> None:
        try:
            proof = KINDS[strike.kind](arena, strike)
        except Exception as error:
            failures.append(f"{strike}: {type(error).__name__}: {error}")
            return
        struck[strike.kind] += bool(proof)
        print(f"{strike.at:7.1f} s  {strike.kind:38} {proof or 'there was nothing to strike'}", flush=True)

    writer = threading.Thread(target=arena.write_source, daemon=True)
    writer.start()
    threads = []
    for strike in strikes:
        threading.Event().wait(max(0.0, begin + strike.at - time.monotonic()))
        threads.append(threading.Thread(target=carry_out, args=(strike,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(120)
    assert not failures, "\n".join(failures)
    return struck


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sabotage", default="", help="break one invariant on purpose: see tests/sabotage.py")
    options = parser.parse_args(arguments)
    strikes = schedule(options.seed, options.minutes * 60)
    print(f"seed {options.seed}, {len(strikes)} strikes in {options.minutes:g} minutes", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    verdict: Any = "equal"
    with ExitStack() as stack:
        if options.sabotage:
            stack.enter_context(sabotaged(folder, options.sabotage))
        arena = Arena(folder, options.seed)
        stack.callback(arena.destroy)
        struck: Counter[str] = Counter()
        lines = 0
        try:
            struck = run(arena, strikes)
            arena.drain()
            lines = arena.compare()
        except AssertionError as error:
            verdict = f"NOT EQUAL: {error}"
    print(f"\n{'fault':38} planned struck")
    for kind, planned in sorted(Counter(strike.kind for strike in strikes).items()):
        print(f"{kind:38} {planned:7d} {struck[kind]:6d}")
    never = [kind for kind in {strike.kind for strike in strikes} if not struck[kind]]
    print(f"\nseed {options.seed}: {sum(struck.values())} strikes, {lines} lines, verdict: {verdict}")
    if never:
        print(f"never struck: {', '.join(sorted(never))}")
    if verdict == "equal" and not never:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    print(f"files and outputs are kept in {folder}")
    return 1


if __name__ == "__main__":
    assert SERVICES
    sys.exit(main(sys.argv[1:]))
