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
import json
import logging
import os
import random
import re
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import zip_longest
from operator import lt
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

log = logging.getLogger("background")

PORTION_BYTES = 4 * 1024**2  # read from the backend between two attempts to write: some 20,000 records
MEMORY_BYTES = 32 * 1024**2  # records waiting for their turn; past it fetching stops and the database keeps the rest
HTTP_SECONDS = 10.0  # without a byte from the backend
BUSY_SECONDS = 0.05  # between attempts to get a turn
MAX_DELAY_SECONDS = 30.0  # between attempts to reach the backend
PROGRESS_SECONDS = 10.0
TAIL_BYTES = 64 * 1024  # read at a time when looking for the last line: a record has at most 17 KiB
COMPANIONS = (".lock", ".position", ".position.new")  # of any shared file in the folder; they come and go
NDJSON = "application/x-ndjson"
BEFORE_ALL = "1969-12-31T23:59:59.999999Z"  # `created` of no record yet: all from the epoch on come after it


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name, what it may be, its default: see env/background.env."""

    url: Annotated[str, r"https?://[^\s/?#]+(/[^\s?#]*)?", "like http://host/path"] = "http://localhost:8000/api/data"
    directory: Annotated[str, r"[^\0]+", "a folder"] = "var/shared"
    file_name: Annotated[str, r"(?!\.{1,2}$)[^/\0]{1,200}", "a name of at most 200 characters, no /"] = "data.txt"
    request_delay: Annotated[int, range(1, 10_000_000)] = 1000  # milliseconds
    api_token: Annotated[str, r"[A-Za-z0-9._~+/=-]+", "letters, digits and ._~+/=- (its value is not shown)"] = ""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; an empty value means the default. A wrong one: one line and exit status 2."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        text = re.sub(r"""^(['"])(.*)\1$""", r"\2", environ.get(name.upper(), "").strip()).strip()
        rule, *allowed = hint.__metadata__
        if isinstance(rule, range):
            allowed = [f"a whole number from {rule[0]} to {rule[-1]}"]
            good = bool(re.fullmatch("[0-9]{1,9}", text)) and int(text) in rule
        else:
            good = bool(re.fullmatch(rule, text))
        if good:
            values[name] = hint.__origin__(text)
        elif text:
            shown = "(hidden)" if "not shown" in allowed[0] else repr(text)
            print(f"background: {name.upper()} is {shown}: must be {allowed[0]}", file=sys.stderr)
            raise SystemExit(2)
    return Settings(**values)


# ---- Records, and where they come from ------------------------------------------------------------------------------

RECORD = re.compile(
    rb'^\{"id":"[^"]+","created":"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{6}Z)","log":\{.*\}\}\n', re.MULTILINE
)
RECORD_START = b'{"id":"'


def created_of(line: bytes) -> str:
    """When a record was stored, as text that sorts by time; "" if the line is no record."""
    found = RECORD.fullmatch(line)
    return found[1].decode() if found else ""


def last_created(lines: bytes) -> str:
    return created_of(lines[lines.rfind(b"\n", 0, -1) + 1 :])


def just_after(created: str) -> str:
    moment = datetime.fromisoformat(created) + timedelta(microseconds=1)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def check(lines: bytes, date_from: str) -> None:
    """Raises ValueError unless these are records from `date_from` on, each later than the one before."""
    created = RECORD.findall(lines)
    if not len(created) == lines.count(RECORD_START) == lines.count(b"\n"):
        raise ValueError("the answer is not a list of records")
    if created[0].decode() < date_from or not all(map(lt, created, created[1:])):
        raise ValueError("the records are not in the order of `created`")


def later_than(last: str, lines: bytes) -> bytes:
    """What of these records is later than the last that is in the file."""
    for record in RECORD.finditer(lines):
        if record[1].decode() > last:
            return lines[record.start() :]
    return b""


class Refused(http.client.HTTPException):
    """The backend answered, but not with records."""

    retry_after_seconds = 0.0  # its own wish, if it had one


class Interrupted(Exception):
    """A signal came while the backend was asked or read from."""


UNREACHABLE = (OSError, http.client.HTTPException, ValueError)  # raised by `follow` if the backend cannot be had now


def follow(settings: Settings, date_from: str, date_to: str = "") -> Iterator[bytes]:
    """The records from `date_from` on, for ever, in whole lines; b"" when there are none at the moment.

    `date_from` only ever moves to 1 µs after a line that has come whole, so it does not matter where a reply breaks
    off: a line without its line feed is not used, and the next request begins right after the last whole one.
    """
    address = urlsplit(settings.url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    window = f"&date_to={date_to}" if date_to else ""
    with contextlib.closing(kind(address.netloc, timeout=HTTP_SECONDS)) as connection:
        while True:
            asked = date_from
            path = f"{address.path or '/'}?date_from={date_from}{window}"
            try:
                with ask(connection, path, settings.api_token) as response:
                    for lines in whole_lines(response):
                        check(lines, date_from)
                        date_from = just_after(last_created(lines))
                        yield lines
            except http.client.IncompleteRead:
                connection.close()
                if date_from == asked:
                    raise
            if date_from == asked:
                yield b""


def ask(connection: http.client.HTTPConnection, path: str, token: str) -> http.client.HTTPResponse:
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request("GET", path, headers={"Accept": NDJSON} | authorization)
    response = connection.getresponse()
    kind = response.headers.get_content_type()
    if response.status != 200 or kind != NDJSON:
        detail = " ".join(response.read(500).decode(errors="replace").split())
        refused = Refused(f"answer {response.status} ({kind}): {detail}")
        if re.fullmatch("[0-9]{1,4}", wish := response.headers.get("Retry-After", "")):
            refused.retry_after_seconds = float(wish)
        raise refused
    return response


def whole_lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The reply in portions, as it comes. Raises IncompleteRead at its end if it broke off."""
    rest, broken = b"", False
    while not (broken or response.isclosed()):
        try:
            data = rest + response.read(PORTION_BYTES)
        except http.client.IncompleteRead as error:
            data, broken = rest + error.partial, True
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if len(rest) > TAIL_BYTES:
            raise ValueError("the answer is not a list of records")
        if end:
            yield data[:end]
    if broken or rest or response.length:  # where less has come than its Content-Length, `read` does not tell
        raise http.client.IncompleteRead(rest)


# ---- The lock -------------------------------------------------------------------------------------------------------


class Unusable(OSError):
    """A file is not what it should be, and a person has to look at it. The message says what and where."""


def flock(descriptor: int, path: str) -> None:
    """Locks a regular file for us alone. Does not wait: raises BlockingIOError, or Unusable."""
    if not os.path.isfile(descriptor):
        raise Unusable(f"{path} is not a regular file; remove it")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
        lock = self._open()
        try:
            ours = self._owns(lock)
            try:
                yield ours
            finally:
                if ours and self._owns(lock):  # else somebody removed it, and another one's may be at the path
                    os.unlink(self.path)
        finally:
            os.close(lock)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            try:
                return os.open(self.path, os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:  # its owner has removed it meanwhile
                return self._open()
            except OSError as error:
                raise Unusable(f"{self.path} is no lock file of ours ({error.strerror}); remove it") from error

    def _owns(self, lock: int) -> bool:
        try:
            flock(lock, self.path)
            return os.path.samestat(os.fstat(lock), os.stat(self.path, follow_symlinks=False))
        except (BlockingIOError, FileNotFoundError):
            return False


# ---- The shared file ------------------------------------------------------------------------------------------------


class SharedFile:
    """The file that all instances append to. Whoever opens it has the turn; its position may be read at any time.

    The file is its own checkpoint: its last whole line says what is there already, however the last writer ended. A
    torn tail has no line feed and is cut off, so the file is always a sequence of whole lines.
    It may be renamed at any moment. The position beside it names the file (device and inode) before the first byte
    is appended to it, so the last line is found in the renamed file, as long as that stays in the folder; after that,
    the `created` in the position is what is left to go by.
    """

    def __init__(self, directory: str, file_name: str) -> None:
        self.path = os.path.join(directory, file_name)
        self._directory = directory
        self._descriptor = -1

    @contextlib.contextmanager
    def opened(self) -> Iterator[str]:
        """The file, open, locked and whole; gives the `created` of the last record in it or in its renamed parts.

        Raises BlockingIOError if another instance is writing to it or to its renamed predecessor, Unusable, OSError.
        """
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            flock(self._descriptor, self.path)
            created, named = self.position()
            last = max(created, last_whole(self._descriptor, self.path, mend=True))
            if named != identity(os.fstat(self._descriptor)):
                last = max([last, *self._last_of_renamed(named)])
                self._write_position(last, durable=True)
            yield last
        finally:
            os.close(self._descriptor)

    def append(self, lines: bytes) -> None:
        """Whole lines to the end and to disk, or nothing: what was written of them is cut off again. Raises OSError."""
        size = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        with contextlib.suppress(OSError):  # stale is safe: the last line of the file it names is looked at anyway
            self._write_position(last_created(lines), durable=False)

    def position(self) -> tuple[str, tuple[int, int]]:
        """Up to where all is written, and into which file. If that cannot be read, the files themselves say it."""
        try:
            with open(f"{self.path}.position", encoding="utf-8") as file:
                position = json.load(file)
            just_after(position["created"])
            return position["created"], (position["device"], position["inode"])
        except (OSError, ValueError, TypeError, KeyError):
            return BEFORE_ALL, (-1, -1)

    def _write_position(self, created: str, durable: bool) -> None:
        device, inode = identity(os.fstat(self._descriptor))
        with open(f"{self.path}.position.new", "w", encoding="utf-8") as file:
            json.dump({"created": created, "device": device, "inode": inode}, file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(file.name, f"{self.path}.position")

    def _last_of_renamed(self, named: tuple[int, int]) -> Iterator[str]:
        """The last `created` of each earlier shared file in the folder: of the one that the position names, which may
        have a torn tail, and of those that are called FILE_NAME.something."""
        for entry in os.scandir(self._directory):
            companion = entry.name.endswith(COMPANIONS) and entry.inode() != named[1]
            ours = entry.path in (self.path, f"{self.path}.lock")  # the lock may have the inode of a part that is gone
            if ours or companion or not entry.is_file(follow_symlinks=False):
                continue
            mend = identity(entry.stat()) == named
            if mend or is_part(entry.path, self.path):
                with open(entry.path, "r+b" if mend else "rb") as file:
                    flock(file.fileno(), entry.path)
                    try:
                        yield last_whole(file.fileno(), entry.path, mend)
                    except Unusable:
                        log.info("%s is no part of the shared file: passed over", entry.path)


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_part(path: str, shared: str) -> bool:
    """Whether it is called as the shared file or its renamed parts are."""
    return path == shared or (path.startswith(f"{shared}.") and not path.endswith(COMPANIONS))


def last_whole(descriptor: int, path: str, mend: bool) -> str:
    """The `created` of the last whole line; `mend` cuts off a torn tail. Raises Unusable for another program's file."""
    size = os.fstat(descriptor).st_size
    tail, start = b"", size
    while start and tail.count(b"\n") < 2:
        start = max(0, start - TAIL_BYTES)
        tail = os.pread(descriptor, size - start, start)
    whole, line_feed, torn = tail.rpartition(b"\n")
    created = last_created(whole + line_feed) if line_feed else BEFORE_ALL
    begun = torn.rstrip(b"\0")  # a machine that crashed may leave zeros for what was not on disk yet
    if not created or not RECORD_START.startswith(begun[: len(RECORD_START)]):
        raise Unusable(f"{path} does not end in a record: is it another program's file? Move it away")
    if torn and mend:
        log.warning("%s: cut off %d bytes of a record that was not written to its end", path, len(torn))
        os.ftruncate(descriptor, size - len(torn))
    return created


# ---- The exporter ---------------------------------------------------------------------------------------------------


class Exporter:
    """Fetches when it may, writes when it can. Nothing is fetched while it owns the turn."""

    def __init__(self, settings: Settings) -> None:
        self.ending = self.fetching = False  # a fetch may be interrupted: what was read can be read again
        self._settings = settings
        self._turn = Turn(settings.directory, settings.file_name)
        self._file = SharedFile(settings.directory, settings.file_name)
        self._poll_seconds = self._backoff_seconds = settings.request_delay / 1000
        self._fetch_at = 0.0  # not before this time, on the monotonic clock
        self._faults: dict[str, float] = {}  # what is out of order, and since when
        self._waiting: deque[bytes] = deque()  # portions
        self.written = 0
        self._follow_after(self._file.position()[0])  # which is never ahead of the file

    def _follow_after(self, created: str) -> None:
        self._last = created  # the last record that was fetched or is in the file
        self._records = follow(self._settings, just_after(created))

    @property
    def waiting_records(self) -> int:
        return sum(lines.count(b"\n") for lines in self._waiting)

    def step(self) -> float:
        """One fetch, if it is due, and one attempt to write what waits; the seconds to wait before the next step."""
        if time.monotonic() >= self._fetch_at:
            full = sum(map(len, self._waiting)) >= MEMORY_BYTES
            pause = BUSY_SECONDS if full else self._fetch()
            self._fetch_at = time.monotonic() + pause
        if self._waiting:
            self.write()
        pause = max(0.0, self._fetch_at - time.monotonic())
        return min(pause, BUSY_SECONDS) if self._waiting else pause

    def _fetch(self) -> float:
        """Gets what there is, a portion at most; the seconds to wait before the next."""
        try:
            lines = self._next_lines()
        except UNREACHABLE as error:
            self._note("backend", f"{type(error).__name__}: {error}")
            self._follow_after(self._last)
            self._backoff_seconds = min(MAX_DELAY_SECONDS, 2 * self._backoff_seconds)
            wish = error.retry_after_seconds if isinstance(error, Refused) else 0.0
            return max(wish, random.uniform(0.5, 1.0) * self._backoff_seconds)
        self._note("backend")
        self._backoff_seconds = self._poll_seconds
        if not lines:
            return self._poll_seconds
        self._waiting.append(lines)
        self._last = last_created(lines)
        return 0.0

    def _next_lines(self) -> bytes:
        self.fetching = True
        try:
            if self.ending:
                raise Interrupted
            return next(self._records)
        finally:
            self.fetching = False

    def write(self) -> None:
        """Writes what waits, if the turn can be had and it is not in the file already."""
        try:
            with self._turn.taken() as ours:
                if not ours:
                    return
                with self._file.opened() as last:
                    self._append_after(last)
            self._note("shared file")
        except BlockingIOError:
            self._note("shared file", f"{self._turn.path} was removed while another instance is writing")
        except OSError as error:
            self._note("shared file", str(error))

    def _append_after(self, last: str) -> None:
        if last > self._last:
            self._follow_after(last)
        while self._waiting:
            if lines := later_than(last, self._waiting[0]):
                self._file.append(lines)
                self.written += lines.count(b"\n")
            self._waiting.popleft()

    def _note(self, what: str, fault: str = "") -> None:
        """Two lines for each outage: when it begins, and how long it lasted."""
        if fault and what not in self._faults:
            self._faults[what] = time.monotonic()
            log.warning("%s: %s; trying on", what, fault)
        elif not fault and what in self._faults:
            log.info("%s: back after %.1f s", what, time.monotonic() - self._faults.pop(what))


# ---- Verifying ------------------------------------------------------------------------------------------------------


class Difference(Exception):
    """The first place where the shared file and the database differ."""


def verify(settings: Settings, date_from: str = just_after(BEFORE_ALL), date_to: str = "") -> int:
    """Compares the shared file with the database in a window, record by record; the exit status."""
    count = 0
    in_database, in_file = stored_lines(settings, date_from, date_to), shared_lines(settings, date_from, date_to)
    try:
        for stored, shared in zip_longest(in_database, in_file, fillvalue=b""):
            if stored != shared:
                raise Difference(f"after {count} equal records {describe(stored, shared)}")
            count += 1
    except Difference as difference:
        print(f"not equal: {difference}")
    except UNREACHABLE as error:
        print(f"cannot compare: {error}")
    else:
        print(f"equal: {count} records")
        return 0
    return 1


def describe(stored: bytes, shared: bytes) -> str:
    in_database, in_file = (created_of(line) or "the end" for line in (stored, shared))  # which sorts after any time
    if in_database < in_file:
        return f"the file lacks {stored.decode()}"
    if in_file < in_database:
        return f"the database lacks {shared.decode()}"
    return f"a record differs: file {shared.decode()} database {stored.decode()}"


def stored_lines(settings: Settings, date_from: str, date_to: str) -> Iterator[bytes]:
    for lines in iter(follow(settings, date_from, date_to).__next__, b""):
        yield from lines.splitlines(keepends=True)


def shared_lines(settings: Settings, date_from: str, date_to: str) -> Iterator[bytes]:
    """The lines of the shared file and its renamed parts, in order. Raises Difference for one that cannot be there."""
    last = ""
    for path in parts_in_order(settings.directory, settings.file_name):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                created = created_of(line)
                if created <= last:
                    raise Difference(f"line {number} of {path} is no record later than the one before: {line[:200]!r}")
                last = created
                if date_from <= created and (created < date_to or not date_to):
                    yield line


def parts_in_order(directory: str, file_name: str) -> list[str]:
    """Paths. What does not begin with a record, as a compressed part, is passed over."""
    parts = []
    for entry in os.scandir(directory):
        if entry.is_file() and is_part(entry.name, file_name):
            with open(entry.path, "rb") as file:
                parts.append((created_of(file.readline(TAIL_BYTES)), entry.path))
    return [path for created, path in sorted(parts) if created]


DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?Z?"


ENDING = (signal.SIGTERM, signal.SIGINT)


def catch_signals(exporter: Exporter) -> int:
    """A descriptor that can be read from once SIGTERM or SIGINT has come (the self-pipe trick): no lock is needed, as
    it would be for an Event. Only a fetch is interrupted, and only once; a write never is."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)

    def interrupt(*_: Any) -> None:
        exporter.ending = True
        if exporter.fetching:
            exporter.fetching = False
            raise Interrupted

    for number in ENDING:
        signal.signal(number, interrupt)
    return reading


def run(exporter: Exporter, signals: int) -> None:
    """Steps until a signal, says from time to time how far it is, and tries once more to write at the end."""
    said, said_at, delay = 0, time.monotonic(), 0.0
    exporter.write()  # looks at the file, which says where to begin
    with contextlib.suppress(Interrupted):
        while not select.select([signals], [], [], delay)[0]:
            delay = exporter.step()
            written, seconds = exporter.written, time.monotonic() - said_at
            if seconds >= PROGRESS_SECONDS:
                if written > said:
                    rate = (written - said) / seconds
                    log.info("%d records written (%.0f/s), %d waiting", written, rate, exporter.waiting_records)
                said, said_at = written, time.monotonic()
    exporter.write()
    log.info("stopped; %d records written, %d left to the others", exporter.written, exporter.waiting_records)


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(os.environ)
    if re.fullmatch(f"verify( {DATE}){{0,2}}", " ".join(arguments)):
        return verify(settings, *(date.removesuffix("Z") for date in arguments[1:]))
    if arguments:
        print("usage: background.py [verify [date_from [date_to]]], dates like 2026-11-23T18:43Z", file=sys.stderr)
        return 2
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s background: %(message)s")
    try:
        os.makedirs(settings.directory, exist_ok=True)
        if not os.access(settings.directory, os.W_OK | os.X_OK):
            raise PermissionError("the folder is not writable")
    except OSError as error:
        log.error("DIRECTORY %s cannot be used: %s", settings.directory, error.strerror or error)
        return 1
    exporter = Exporter(settings)
    signals = catch_signals(exporter)  # before it says that it runs: from then on it ends by itself, with 0
    log.info("appending to %s from %s", os.path.join(settings.directory, settings.file_name), settings.url)
    run(exporter, signals)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # the interpreter's own end knows no handlers
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
