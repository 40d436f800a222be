"""An exporter: follows the backend's records and appends them to one file that any number of exporters share.

    python background.py                                 (settings: env/background.env; standard library only)
    python background.py verify [date_from [date_to]]    compare the shared file with the database, exit 0 or 1

It promises: the shared file and its rotated parts hold each record once, whole, in the order of `created`, whichever
instances are killed, stopped, started twice, or run out of disk. First come the records from the epoch until now, then
what came since. It is single-threaded; what it cannot write now it keeps in memory, up to a bound, and fetches on.
It does not: delete or rename the shared file. Rename it whenever you like; a new one is begun at the next turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import select
import signal
import stat
import sys
import time
import typing
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

log = logging.getLogger("background")

# ---- Limits ---------------------------------------------------------------------------------------------------------

PORTION_BYTES = 4 * 1024**2  # read from the backend between two attempts to write: some 20,000 records
MEMORY_BYTES = 32 * 1024**2  # records waiting for their turn; past it fetching stops and the database keeps the rest
HTTP_SECONDS = 10.0  # without a byte from the backend
BUSY_SECONDS = 0.05  # between attempts to get a turn when the memory is full
MAX_DELAY_SECONDS = 30.0  # between attempts to reach the backend
PROGRESS_SECONDS = 10.0
TAIL_BYTES = 64 * 1024  # read at a time when looking for the last line: a record has at most 17 KiB
NDJSON = "application/x-ndjson"
COMPANIONS = (".lock", ".position", ".position.new")  # of the shared file
EPOCH = "1970-01-01T00:00:00.000000Z"

# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name, what it may be, its default: see env/background.env."""

    url: Annotated[str, r"https?://[^\s/?#]+(/[^\s?#]*)?", "like http://host:8000/api/data"] = (
        "http://localhost:8000/api/data"
    )
    directory: Annotated[str, r"[^\0]+", "a folder"] = "var/shared"
    file_name: Annotated[str, r"(?!\.{1,2}$)[^/\0]{1,200}", "a name of 200 characters at most, without a /"] = (
        "data.txt"
    )
    request_delay: Annotated[int, range(1, 10_000_000)] = 1000  # milliseconds
    api_token: Annotated[str, r"[A-Za-z0-9._~+/=-]+", "letters, digits and ._~+/=- (its value is not shown)"] = ""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; an empty value means the default. A wrong one: one line and exit status 2."""
    values: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Settings, include_extras=True).items():
        text = environ.get(name.upper(), "").strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1].strip()
        rule, *allowed = hint.__metadata__
        if isinstance(rule, range):
            good = bool(re.fullmatch("[0-9]{1,9}", text)) and int(text) in rule
            allowed = [f"a whole number from {rule[0]} to {rule[-1]}"]
        else:
            good = bool(re.fullmatch(rule, text))
        if text and not good:
            shown = "(hidden)" if "not shown" in allowed[0] else repr(text)
            print(f"background: {name.upper()} is {shown}: must be {allowed[0]}", file=sys.stderr)
            raise SystemExit(2)
        if text:
            values[name] = hint.__origin__(text)
    return Settings(**values)


# ---- Records --------------------------------------------------------------------------------------------------------

# A record is one JSON line. Inside a string a quote is written \", so this text stands for the member alone.
CREATED = re.compile(rb'"created":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z)"')
RECORD_START = b'{"id":"'


def created_of(line: bytes) -> str | None:
    """When a record was stored, as text that sorts by time; None if the line is no record."""
    found = CREATED.search(line)
    whole = line.startswith(RECORD_START) and line.endswith(b"}\n")
    return found[1].decode() if found and whole else None


def just_after(created: str) -> str:
    moment = datetime.fromisoformat(created) + timedelta(microseconds=1)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


@dataclass
class Portion:
    """Whole lines as they came, with the `created` of each."""

    data: bytes
    created: list[str]

    def after(self, last: str) -> Portion | None:
        """What of it is later than `last`; None if nothing is."""
        known = bisect_right(self.created, last)
        if not known:
            return self
        if known == len(self.created):
            return None
        lines = self.data.split(b"\n", known)
        return Portion(lines[known], self.created[known:])


def check_portion(data: bytes, after: str) -> Portion:
    """Whole lines as a Portion. Raises ValueError unless they are records, each later than the one before."""
    created = [found.decode() for found in CREATED.findall(data)]
    starts = data.startswith(RECORD_START) + data.count(b"\n" + RECORD_START)
    if not len(created) == starts == data.count(b"}}\n") == data.count(b"\n"):
        raise ValueError("the answer is not a list of records")
    if created[0] < after or not all(map(operator.lt, created, created[1:])):
        raise ValueError("the records are not in the order of `created`")
    return Portion(data, created)


# ---- The backend ----------------------------------------------------------------------------------------------------


class Unreachable(Exception):
    """The backend cannot be had now; retry_after_seconds is its own wish, if it had one."""

    def __init__(self, reason: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class Feed:
    """Records from the backend, in portions. `cursor` is where the next request begins.

    The cursor only ever moves to 1 µs after a line that has come whole, so it does not matter where a reply is cut
    off: a line without its line feed is not used, and the next request begins right after the last whole one.
    """

    def __init__(self, url: str, token: str, cursor: str = EPOCH, date_to: str = "") -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=HTTP_SECONDS)
        self._path = parts.path or "/"
        self._headers = {"Accept": NDJSON} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._response: http.client.HTTPResponse | None = None
        self._rest = b""
        self._date_to = f"&date_to={date_to}" if date_to else ""
        self.cursor = cursor

    def move(self, cursor: str) -> None:
        """Goes on from there, if that is further: another instance has written the records up to it."""
        if cursor > self.cursor:
            self.close()
            self.cursor = cursor

    def close(self) -> None:
        self._connection.close()
        self._response, self._rest = None, b""

    def fetch(self) -> Portion | None:
        """The next records, or None when there are none at the moment. Raises Unreachable."""
        try:
            self._response = self._response or self._open()
            data = self._rest + self._read(self._response)
            end = data.rfind(b"\n") + 1
            self._rest = data[end:]
            portion = check_portion(data[:end], self.cursor) if end else None
            if self._rest and self._response is None:  # it ended in the middle of a line
                self._rest = b""
                if portion is None:
                    raise ValueError(f"the answer broke off: {data[:200]!r}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        if portion:
            self.cursor = just_after(portion.created[-1])
        return portion

    def _open(self) -> http.client.HTTPResponse:
        query = f"date_from={quote(self.cursor, safe=':')}{self._date_to}"
        self._connection.request("GET", f"{self._path}?{query}", headers=self._headers)
        response = self._connection.getresponse()
        if response.status != 200 or response.headers.get_content_type() != NDJSON:
            detail = " ".join(response.read(500).decode(errors="replace").split())
            self.close()
            wish = response.headers.get("Retry-After", "")
            seconds = float(wish) if re.fullmatch("[0-9]{1,4}", wish) else 0.0
            raise Unreachable(f"answer {response.status} ({response.headers.get_content_type()}): {detail}", seconds)
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """Up to PORTION_BYTES; after the end of the reply there is no response any more. Raises OSError."""
        try:
            data = response.read(PORTION_BYTES)
            cut = bool(response.length) and len(data) < PORTION_BYTES  # less than Content-Length promised
        except http.client.IncompleteRead as error:
            data, cut = error.partial, True
        if cut and b"\n" not in data:
            raise ConnectionAbortedError("the answer broke off")
        if cut or len(data) < PORTION_BYTES:
            self._response = None
        if cut:
            self._connection.close()
        return data


# ---- The lock -------------------------------------------------------------------------------------------------------


class Unusable(Exception):
    """A file or folder is not what it should be, and a person has to look at it. The message says what and where."""


class Turn:
    """The right to write, marked by a lock file: made with O_EXCL at the start of writing, removed at its end.

    Why there are never two writers:
      * Who owns the turn is whoever holds the flock of the very file that is at the path (same device and inode),
        whoever made that file. Making and locking are two steps; a process stopped between them finds, when it goes
        on, the flock taken, or its file no longer at the path, and has no turn.
      * Only the owner removes the file, as its last act. Who then gets the flock of the removed file finds it gone
        from the path.
      * The kernel drops the flock of a process that dies, however it dies, so a leftover file is free at once, with
        no age, pid or clock to go by. A stopped owner keeps it: nobody writes beside it.
      * Should somebody remove the file by hand while it is held, a second instance can make and lock a new one. It
        then finds the shared file itself under the first one's flock (see SharedFile) and writes nothing.
    """

    def __init__(self, directory: str, file_name: str) -> None:
        self.path = os.path.join(directory, f"{file_name}.lock")

    @contextlib.contextmanager
    def taken(self) -> Iterator[bool]:
        """True inside if the turn is ours. Does not wait. Raises Unusable or OSError."""
        lock = self._lock_file()
        try:
            yield lock is not None
        finally:
            if lock is not None:
                self._remove(lock)

    def _lock_file(self) -> int | None:
        """The descriptor of the locked file at the path; None if another instance has it."""
        try:
            lock = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise Unusable(f"{self.path} is no lock file of ours ({error.strerror}); remove it") from error
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                raise Unusable(f"{self.path} is no lock file of ours (not a regular file); remove it")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(self.path, follow_symlinks=False)):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def _remove(self, lock: int) -> None:
        try:
            if os.path.samestat(os.fstat(lock), os.stat(self.path, follow_symlinks=False)):
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        finally:
            os.close(lock)


# ---- The shared file ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """What the file beside the shared file says: up to where all is written, and into which file."""

    created: str = ""
    device: int = -1
    inode: int = -1

    def names(self, status: os.stat_result) -> bool:
        return (self.device, self.inode) == (status.st_dev, status.st_ino)


class SharedFile:
    """The file that all instances append to. Its methods are called by the owner of the turn only.

    The file is its own checkpoint: its last whole line says what is there already, however the last writer ended. A
    torn tail has no line feed and is cut off, so the file is always a sequence of whole lines.
    It may be renamed at any moment. The position beside it names the file (device and inode) before the first byte
    is appended to it, so the last line is found in the renamed file, as long as that stays in the folder; after that,
    the `created` in the position is what is left to go by.
    """

    def __init__(self, directory: str, file_name: str) -> None:
        self.path = os.path.join(directory, file_name)
        self._directory, self._name = directory, file_name
        self._position_path = f"{self.path}.position"
        self._descriptor = -1

    @contextlib.contextmanager
    def opened(self) -> Iterator[str]:
        """The file, open, locked and whole; gives the `created` of the last record in it or in its renamed parts.

        Raises Unusable, BlockingIOError if another instance is writing to it or to its renamed predecessor, OSError.
        """
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unusable(f"{self.path} is not a regular file")
            position = self._read_position()
            last = max(position.created, self._last_created(self._descriptor, self.path, mend=True))
            if not position.names(status):
                last = max([last, *self._last_of_renamed(position)])
                self._write_position(Position(last, status.st_dev, status.st_ino), durable=True)
            yield last
        finally:
            os.close(self._descriptor)

    def start(self) -> str:
        """From where on records may be missing, for who has no turn yet: the position is never ahead of the file."""
        created = self._read_position().created
        return just_after(created) if created else EPOCH

    def append(self, data: bytes, last: str) -> None:
        """Whole lines to the end and to disk, or nothing: what was written of them is cut off again. Raises OSError."""
        size = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        status = os.fstat(self._descriptor)
        with contextlib.suppress(OSError):  # stale is safe: the last line of the file it names is looked at anyway
            self._write_position(Position(last, status.st_dev, status.st_ino), durable=False)

    def _last_created(self, descriptor: int, path: str, mend: bool) -> str:
        """The `created` of the last whole line, "" if there is none; `mend` cuts off a torn tail. Raises Unusable."""
        end = os.fstat(descriptor).st_size
        tail, start = b"", end
        while start and tail.count(b"\n") < 2:
            start = max(0, start - TAIL_BYTES)
            tail = os.pread(descriptor, end - start, start)
        whole = tail.rfind(b"\n") + 1
        last = tail[tail.rfind(b"\n", 0, max(0, whole - 1)) + 1 : whole]
        torn = tail[whole:]
        created = created_of(last) if last else ""
        if created is None or not (RECORD_START.startswith(torn[:7]) or not torn.strip(b"\0")):
            raise Unusable(f"{path} does not end in a record: is it another program's file? Move it away")
        if torn and mend:
            log.warning("%s: cut off %d bytes of a record that was not written to its end", path, len(torn))
            os.ftruncate(descriptor, end - len(torn))
        return created

    def _last_of_renamed(self, position: Position) -> Iterator[str]:
        """The last `created` of each earlier shared file in the folder: of the one that the position names, which may
        have a torn tail, and of those that are called FILE_NAME.something."""
        for entry in os.scandir(self._directory):
            if not entry.is_file(follow_symlinks=False) or entry.name == self._name:
                continue
            named = position.names(entry.stat())
            if named or (entry.name.startswith(f"{self._name}.") and not entry.name.endswith(COMPANIONS)):
                with open(entry.path, "r+b" if named else "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    try:
                        yield self._last_created(file.fileno(), entry.path, mend=named)
                    except Unusable:
                        log.info("%s is no part of the shared file: passed over", entry.path)

    def _read_position(self) -> Position:
        """Empty if there is none or if it cannot be read: then the files themselves say it."""
        try:
            with open(self._position_path, encoding="utf-8") as file:
                text = json.load(file)
            datetime.fromisoformat(text["created"] or EPOCH)
            return Position(str(text["created"]), int(text["device"]), int(text["inode"]))
        except (OSError, ValueError, TypeError, KeyError):
            return Position()

    def _write_position(self, position: Position, durable: bool) -> None:
        new = f"{self._position_path}.new"
        with open(new, "w", encoding="utf-8") as file:
            json.dump(vars(position), file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(new, self._position_path)


# ---- The exporter ---------------------------------------------------------------------------------------------------


class Exporter:
    """Fetches when it may, writes when it can. Nothing is fetched while it owns the turn."""

    def __init__(self, feed: Feed, turn: Turn, file: SharedFile) -> None:
        self._feed = feed
        self._turn = turn
        self._file = file
        self._waiting: deque[Portion] = deque()
        self._trouble: dict[str, float] = {}  # what is out of order, and since when
        self._failures = 0
        self._fetch_at = 0.0  # not before this time, on the monotonic clock
        self._started = False
        self.written = 0

    @property
    def waiting_bytes(self) -> int:
        return sum(len(portion.data) for portion in self._waiting)

    @property
    def waiting_records(self) -> int:
        return sum(len(portion.created) for portion in self._waiting)

    def step(self, poll_seconds: float) -> float:
        """One fetch and one attempt to write; the seconds to wait before the next step."""
        if not self._started:
            self._started = True
            if not self.write():  # else the file has said where to begin
                self._feed.move(self._file.start())
        pause = max(0.0, self._fetch_at - time.monotonic())
        if pause or self.waiting_bytes >= MEMORY_BYTES:
            return pause if not self._waiting or self.write() else BUSY_SECONDS
        try:
            portion = self._feed.fetch()
        except Unreachable as error:
            self._note("backend", str(error))
            self._failures += 1
            backoff = random.uniform(0.5, 1.0) * min(
                MAX_DELAY_SECONDS, math.ldexp(poll_seconds, min(self._failures, 10))
            )
            self._fetch_at = time.monotonic() + max(error.retry_after_seconds, backoff)
            return 0.0
        self._failures = 0
        self._fine("backend")
        if portion:
            self._waiting.append(portion)
        if self._waiting and not self.write() and not portion:
            return min(poll_seconds, BUSY_SECONDS)
        return 0.0 if portion else poll_seconds

    def write(self) -> bool:
        """Writes all that waits if the turn can be had; whether it could. Trouble is said once."""
        try:
            with self._turn.taken() as ours:
                if ours:
                    self._write_waiting()
        except BlockingIOError:
            self._note("lock", f"{self._turn.path} was removed while another instance is writing; waiting for that one")
            return False
        except (Unusable, OSError) as error:
            self._note("shared file", str(error))
            return False
        if ours:
            self._fine("lock")
            self._fine("shared file")
        return ours

    def _write_waiting(self) -> None:
        with self._file.opened() as last:
            left = [portion.after(last) for portion in self._waiting]
            self._waiting = deque(portion for portion in left if portion)
            if last:
                self._feed.move(just_after(last))
            while self._waiting:
                portion = self._waiting[0]
                self._file.append(portion.data, portion.created[-1])
                self.written += len(portion.created)
                self._waiting.popleft()

    def _note(self, what: str, reason: str) -> None:
        if what not in self._trouble:
            self._trouble[what] = time.monotonic()
            log.warning("%s: %s; trying on", what, reason)

    def _fine(self, what: str) -> None:
        if what in self._trouble:
            log.info("%s: back after %.1f s", what, time.monotonic() - self._trouble.pop(what))


# ---- Verifying -------------------------------------------------------------------------------------------------------

UTC_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?"


class Difference(Exception):
    """The first place where the shared file and the database differ."""


def stored_records(settings: Settings, date_from: str, date_to: str) -> Iterator[tuple[str, bytes]]:
    """The records of the database by the API: when each was stored, and the whole line. Raises Unreachable."""
    feed = Feed(settings.url, settings.api_token, date_from, date_to)
    while portion := feed.fetch():
        yield from zip(portion.created, portion.data.splitlines(keepends=True), strict=True)


def shared_records(settings: Settings, date_from: str, date_to: str) -> Iterator[tuple[str, bytes]]:
    """The records of the shared file and its renamed parts, in order. Raises Difference for what cannot be there."""
    last, parts = "", []
    for entry in os.scandir(settings.directory):
        if entry.name == settings.file_name or entry.name.startswith(f"{settings.file_name}."):
            with open(entry.path, "rb") as file:
                if first := created_of(file.readline(TAIL_BYTES)):
                    parts.append((first, entry.path))
    for _, path in sorted(parts):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                created = created_of(line)
                if created is None or created <= last:
                    fault = "is no record" if created is None else "is not later than the one before"
                    raise Difference(f"line {number} of {path} {fault}: {line[:200]!r}")
                last = created
                if date_from <= created and (not date_to or created < date_to):
                    yield created, line


def verify(settings: Settings, date_from: str = EPOCH, date_to: str = "") -> int:
    """Compares the shared file with the database in a window, record by record; the number of records.

    Raises Difference, Unreachable, OSError.
    """
    stored, shared = stored_records(settings, date_from, date_to), shared_records(settings, date_from, date_to)
    count = 0
    for in_database, in_file in itertools.zip_longest(stored, shared):
        if in_database != in_file:
            if in_file is None or (in_database is not None and in_database[0] < in_file[0]):
                raise Difference(f"after {count} equal records the file lacks {in_database[1].decode()}")
            if in_database is None or in_file[0] < in_database[0]:
                raise Difference(f"after {count} equal records the database lacks {in_file[1].decode()}")
            raise Difference(f"a record differs: file {in_file[1].decode()} database {in_database[1].decode()}")
        count += 1
    return count


def verify_command(settings: Settings, window: Sequence[str]) -> int:
    try:
        count = verify(settings, *(text.removesuffix("Z") for text in window))
    except (Difference, Unreachable, OSError) as error:
        print(f"not equal: {error}" if isinstance(error, Difference) else f"cannot compare: {error}")
        return 1
    print(f"equal: {count} records")
    return 0


# ---- Main -----------------------------------------------------------------------------------------------------------


def catch_signals() -> int:
    """A descriptor that can be read from once SIGTERM or SIGINT has come (the self-pipe trick): nothing is interrupted,
    and no lock is needed, as it would be for an Event."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reading


def run(exporter: Exporter, poll_seconds: float) -> None:
    """Steps until a signal, says from time to time how far it is, and tries once more to write at the end."""
    signals = catch_signals()
    said, said_at, delay = 0, time.monotonic(), 0.0
    while not select.select([signals], [], [], delay)[0]:
        delay = exporter.step(poll_seconds)
        now = time.monotonic()
        if now - said_at >= PROGRESS_SECONDS:
            if exporter.written != said:
                rate = (exporter.written - said) / (now - said_at)
                log.info("%d records written (%.0f/s), %d waiting", exporter.written, rate, exporter.waiting_records)
            said, said_at = exporter.written, now
    exporter.write()
    log.info("stopped; %d records written, %d left to the others", exporter.written, exporter.waiting_records)


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(os.environ)
    if arguments[:1] == ["verify"] and all(re.fullmatch(f"{UTC_TIME}Z?", text) for text in arguments[1:3]):
        return verify_command(settings, arguments[1:3])
    if arguments:
        print(
            "usage: python background.py [verify [date_from [date_to]]], dates like 2026-11-23T18:43Z", file=sys.stderr
        )
        return 2
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s background: %(message)s")
    try:
        os.makedirs(settings.directory, exist_ok=True)
        turn = Turn(settings.directory, settings.file_name)
        if not os.access(settings.directory, os.W_OK | os.X_OK):
            raise PermissionError("the folder is not writable")
    except OSError as error:
        log.error("DIRECTORY %s cannot be used: %s", settings.directory, error.strerror or error)
        return 1
    file = SharedFile(settings.directory, settings.file_name)
    log.info("appending to %s from %s", file.path, settings.url)
    run(Exporter(Feed(settings.url, settings.api_token), turn, file), settings.request_delay / 1000)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
