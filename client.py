"""The client: writes access-log lines to a journal and delivers each of them to the backend exactly once.

    python client.py            (settings: env/client.env; standard library only)

Its threads generate a line after a random pause, append it to the common LOG_FILE under a lock, and POST it. With
SOURCE the lines come from a file that is followed, or from standard input (-), in the common or combined log format
or as `IP METHOD URI STATUS`.
It promises: a line that is in the journal is stored once, whichever process is killed, however often it is sent; a
line that the backend refuses for good is in LOG_FILE.rejected with the reason, once. When the backend is away the
client waits. It does not: shorten or rename the journal; move it away, with its companions, while no client runs.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import math
import os
import random
import re
import select
import signal
import sys
import threading
import time
import typing
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlsplit

log = logging.getLogger("client")

# ---- Limits ---------------------------------------------------------------------------------------------------------

HTTP_SECONDS = 30.0  # the backend answers a POST within 10 s, by 503 if need be
BATCH_BYTES = 512 * 1024  # of journal in one POST, whatever BATCH_SIZE says
CHUNK_BYTES = 256 * 1024  # read from a source at a time; a longer line is taken in pieces, which the backend refuses
NOTE_BYTES = 8 * CHUNK_BYTES  # a note in .rejected is shorter
HEAD_BYTES = 256  # of a followed file, by which it is known again
MAX_DELAY_SECONDS = 30.0  # between attempts to reach the backend
FOLLOW_SECONDS = 0.2  # between looks at a followed file that has nothing new
ROTATED_SECONDS = 2.0  # a renamed file must have been quiet for so long before the new one is read
SHUTDOWN_SECONDS = 5.0  # for delivering what is left after SIGTERM
PROGRESS_SECONDS = 10.0

# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name, what it may be, its default; env/client.env explains them."""

    url: Annotated[str, r"https?://[^\s/?#]+(/[^\s?#]*)?", "like http://host:8000/api/data"] = (
        "http://localhost:8000/api/data"
    )
    threads_amount: Annotated[int, range(1, 1000)] = 3
    request_delay_limit: Annotated[int, range(10_000_000)] = 5000  # milliseconds
    log_file: Annotated[str, r"[^\0]*[^/\0]", "the path of a file"] = "logs.txt"
    source: Annotated[str, r"[^\0]+", "the path of a file, or - for standard input"] = ""
    batch_size: Annotated[int, range(1, 10_001)] = 1000
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
            print(f"client: {name.upper()} is {shown}: must be {allowed[0]}", file=sys.stderr)
            raise SystemExit(2)
        if text:
            values[name] = hint.__origin__(text)
    return Settings(**values)


# ---- Lines ----------------------------------------------------------------------------------------------------------

METHODS = ("GET", "GET", "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
STATUS_CODES = (200, 200, 200, 201, 204, 301, 304, 400, 401, 403, 404, 500, 503)

# Common and combined log format of Apache and nginx: host ident user [time] "METHOD URI PROTOCOL" status size ...
ACCESS_LOG = re.compile(rb'(\S+) \S+ .*?\[[^\]]*\] "([^\s"]+) (\S+)(?: [^\s"]*)?" ([0-9]{3})(?: .*)?')


def generate_line(dice: random.Random) -> bytes:
    ip = ".".join(str(dice.randint(1, 254)) for _ in range(4))
    path = "/".join(f"{dice.randrange(16**4):04x}" for _ in range(dice.randint(1, 3)))
    return f"{ip} {dice.choice(METHODS)} https://domain.com/{path} {dice.choice(STATUS_CODES)}".encode()


def journal_line(line: bytes) -> bytes:
    """A source line as it goes into the journal: four fields if it is in a known log format, else as it is."""
    line = line.strip(b" \t\r\n")
    found = ACCESS_LOG.fullmatch(line)
    return b" ".join(found.groups()) if found else line


# ---- The journal ----------------------------------------------------------------------------------------------------


class InUse(Exception):
    """Another client has this journal."""


class Journal:
    """LOG_FILE and its companions: the identity (.journal), how far it is delivered (.position), .rejected, .source.

    Why no line is lost or stored twice:
      * A line is in the journal, and that on disk, before it is sent. What is not acknowledged is sent again: by this
        process, or by the next one from the position on.
      * A line's id is the journal's own UUID with the line's byte offset in its last 48 bits, so whoever sends it,
        and however often, sends the same id; the backend stores an id once.
      * An offset is never used for two lines: only one process appends (flock), a torn tail was never sent, and when
        the journal has become shorter than what was acknowledged, it is another journal and gets another UUID.
      * The position is moved after the answer. A stale or unreadable one costs re-sends, not copies.
    The id is a UUID version 8 (RFC 9562); neighbouring lines have neighbouring ids, which keeps the index dense.
    """

    def __init__(self, path: str) -> None:
        """Opens or creates it. Raises InUse, or OSError."""
        self.path = path
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._mutex = threading.Lock()
        self._closed = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise InUse(path) from None
        self.size = cut_torn_tail(self._file, path)
        self._end_of_source_lines()
        self._synced = 0
        self.grown, self.moved = threading.Event(), threading.Event()  # appended to; acknowledged
        self.acknowledged = read_state(f"{path}.position").get("acknowledged", 0)
        self.identity = self._own_identity()
        self.acknowledged = min(self.acknowledged, self.size)
        self.rejected = f"{path}.rejected"
        self._last_rejected = self._read_last_rejected()

    def _end_of_source_lines(self) -> None:
        """Takes back the lines of a source that a killed process did not append to their end: see SourceState."""
        state = read_source_state(f"{self.path}.source")
        if state.journal <= self.size < state.journal_after:
            os.ftruncate(self._file, state.journal)
            self.size = state.journal
            taken_back = replace(state, journal_after=state.journal, offset_after=state.offset)
            write_state(f"{self.path}.source", asdict(taken_back))

    def _own_identity(self) -> str:
        """The first 24 characters of each id. Kept apart from the position: that one may be lost, this one must not."""
        with suppress(FileNotFoundError), open(f"{self.path}.journal", encoding="utf-8") as file:
            if self.acknowledged <= self.size:
                return str(json.load(file)["identity"])
            log.warning("%s is shorter than what was delivered of it: it begins anew", self.path)
            self.acknowledged = 0
            write_state(f"{self.path}.position", {"acknowledged": 0})
        identity = str(uuid.UUID(int=uuid.uuid4().int & ~(0xF << 76) | 0x8 << 76))[:24]
        write_state(f"{self.path}.journal", {"identity": identity})
        return identity

    def append(self, lines: Sequence[bytes]) -> None:
        """Whole lines to the end, or nothing; nothing either once it is closed. Raises OSError."""
        data = b"".join(line + b"\n" for line in lines)
        with self._mutex:
            if self._closed:
                return
            append_whole(self._file, data)
            self.size += len(data)
        self.grown.set()

    def close(self) -> None:
        """Nothing is appended any more."""
        with self._mutex:
            self._closed = True

    def sync(self) -> None:
        """To disk. Raises OSError."""
        end = self.size
        if self._synced < end:
            os.fsync(self._file)
            self._synced = end

    def pending(self, count: int) -> list[tuple[str, bytes, int]]:
        """The next lines to send, oldest first: the id, the line, and the offset behind it."""
        end = self.size
        self.sync()  # else a power cut could take a line whose id is in the database already
        size = BATCH_BYTES
        data = b""
        while not data and self.acknowledged < end:
            data = os.pread(self._file, min(size, end - self.acknowledged), self.acknowledged)
            data = data[: data.rfind(b"\n") + 1]
            size *= 2
        lines, offset = [], self.acknowledged
        for line in data.split(b"\n", count)[: min(count, data.count(b"\n"))]:
            behind = offset + len(line) + 1
            lines.append((f"{self.identity}{offset:012x}", line, behind))
            offset = behind
        return lines

    def acknowledge(self, behind: int) -> None:
        self.acknowledged = behind
        self.moved.set()
        with suppress(OSError):  # stale is safe
            write_state(f"{self.path}.position", {"acknowledged": behind}, durable=False)

    def reject(self, record_id: str, line: bytes, reason: str) -> None:
        """Notes a refused line, once: the notes are in the order of the journal, so the last one says what is there."""
        if self._last_rejected < record_id or not record_id.startswith(self._last_rejected[:24]):
            note = json.dumps({"id": record_id, "reason": reason, "log": line.decode(errors="backslashreplace")})
            descriptor = os.open(self.rejected, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                append_whole(descriptor, note.encode() + b"\n")
                self._last_rejected = record_id
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _read_last_rejected(self) -> str:
        """The id of the last whole note."""
        try:
            with open(self.rejected, "r+b") as file:
                size = cut_torn_tail(file.fileno(), self.rejected)
                notes = os.pread(file.fileno(), NOTE_BYTES, max(0, size - NOTE_BYTES)).splitlines()
                return str(json.loads(notes[-1])["id"]) if notes else ""
        except FileNotFoundError:
            return ""


def cut_torn_tail(descriptor: int, path: str) -> int:
    """Cuts off what follows the last line feed, the rest of a write that a crash cut short; the new size."""
    end = start = os.fstat(descriptor).st_size
    while start:
        start = max(0, start - CHUNK_BYTES)
        newline = os.pread(descriptor, CHUNK_BYTES, start).rfind(b"\n")
        if newline >= 0:
            start += newline + 1
            break
    if start < end:
        log.warning("%s: cut off %d bytes of a line that was not written to its end", path, end - start)
        os.ftruncate(descriptor, start)
    return start


def append_whole(descriptor: int, data: bytes) -> None:
    """Appends all of it, or cuts off again what was written of it. Raises OSError."""
    size = os.fstat(descriptor).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def read_state(path: str) -> dict[str, int]:
    """A small JSON object of numbers; empty if there is none or it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
            return {name: value for name, value in state.items() if isinstance(value, int)}
    except (OSError, ValueError, AttributeError):
        return {}


def write_state(path: str, state: Mapping[str, Any], durable: bool = True) -> None:
    """Replaces a small JSON object as a whole. Raises OSError."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def open_journal(path: str) -> Journal:
    """The journal at a path. With %n in it: the first of path 1, 2, 3... that no running client has. Raises InUse."""
    number = 1
    while True:
        try:
            return Journal(path.replace("%n", str(number)))
        except InUse:
            if "%n" not in path:
                raise
            number += 1


# ---- Sources --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceState:
    """Up to where a followed file is in the journal; on disk before the lines are appended.

    If the journal has reached `journal_after`, those lines are in it, and reading goes on at `offset_after`. If it has
    not, what there is of them is cut off (none was sent, as the append did not end) and read again from `offset`.
    """

    device: int = 0
    inode: int = 0
    head: int = 0  # checksum of the first HEAD_BYTES, or of those up to offset_after
    offset: int = 0
    offset_after: int = 0
    journal: int = 0
    journal_after: int = 0


def read_source_state(path: str) -> SourceState:
    state = read_state(path)
    return SourceState(**{name: state[name] for name in vars(SourceState()) if name in state})


class FollowedFile:
    """SOURCE as a file: its lines, and what is appended to it, through renaming, truncating and restarts."""

    def __init__(self, path: str, journal: Journal) -> None:
        self._path = path
        self._journal = journal
        self._state_path = f"{journal.path}.source"
        self._state = read_source_state(self._state_path)
        self._file = -1
        self._quiet_since = 0.0

    def step(self) -> bool:
        """Moves one chunk of lines into the journal; False if there is nothing new. Raises OSError."""
        if self._file < 0:
            self._open()
        if not self._goes_on():
            log.warning("%s was truncated or replaced; reading it from its beginning", self._path)
            self._state = replace(self._state, offset_after=0)
        offset = self._state.offset_after
        data = os.pread(self._file, CHUNK_BYTES, offset)
        replaced = not data.count(b"\n") and len(data) < CHUNK_BYTES and self._is_replaced()
        end = data.rfind(b"\n") + 1 or (len(data) if replaced or len(data) == CHUNK_BYTES else 0)
        if end:
            self._quiet_since = 0.0
            self._move(data[:end], offset + end)
        elif replaced:
            os.close(self._file)
            self._file = -1
            self._state = SourceState(journal=self._journal.size, journal_after=self._journal.size)
        return end > 0 or replaced

    def _move(self, data: bytes, offset_after: int) -> None:
        lines = [line for line in map(journal_line, data.split(b"\n")) if line]
        status = os.fstat(self._file)
        size = self._journal.size
        state = SourceState(
            status.st_dev,
            status.st_ino,
            zlib.crc32(os.pread(self._file, min(HEAD_BYTES, offset_after), 0)),
            self._state.offset_after,
            offset_after,
            size,
            size + sum(len(line) + 1 for line in lines),
        )
        self._journal.sync()  # the state must never be ahead of the journal by more than one chunk
        write_state(self._state_path, asdict(state))
        self._journal.append(lines)
        self._state = state

    def _open(self) -> None:
        """Opens the file that was followed last, also under another name, else the one at the path."""
        folder = os.path.dirname(self._path) or "."
        if self._state.inode:
            for entry in os.scandir(folder):
                if entry.is_file() and self._names(entry.stat()):
                    self._file = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                    if self._goes_on() or os.path.samefile(entry.path, self._path):
                        return
                    os.close(self._file)  # another file that got the inode of the one we followed
                    self._file = -1
            log.warning("%s was replaced while no client ran; what came after byte %d of the old one is not here",
                        self._path, self._state.offset_after)  # fmt: skip
            self._state = SourceState(journal=self._journal.size, journal_after=self._journal.size)
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def _names(self, status: os.stat_result) -> bool:
        return (self._state.device, self._state.inode) == (status.st_dev, status.st_ino)

    def _goes_on(self) -> bool:
        """The open file begins as the one that was followed, and is not shorter than what was read of it."""
        offset = self._state.offset_after
        head = os.pread(self._file, min(HEAD_BYTES, offset), 0)
        return os.fstat(self._file).st_size >= offset and (not offset or zlib.crc32(head) == self._state.head)

    def _is_replaced(self) -> bool:
        """Another file is at the path, and ours has been quiet since: its writer has let go of it."""
        try:
            other = not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False
        now = time.monotonic()
        self._quiet_since = (self._quiet_since or now) if other else 0.0
        return other and now - self._quiet_since > ROTATED_SECONDS


def follow(path: str, journal: Journal, stop: threading.Event) -> None:
    """Moves the lines of a file into the journal until `stop`. A file that is not there yet is waited for."""
    file = FollowedFile(path, journal)
    trouble = ""
    while not stop.is_set():
        try:
            moved = file.step()
            trouble = ""
        except OSError as error:
            moved = False
            if trouble != str(error):
                trouble = str(error)
                log.warning("SOURCE %s: %s; trying on", path, trouble)
        if not moved:
            stop.wait(FOLLOW_SECONDS)


def read_stdin(journal: Journal, stop: threading.Event) -> None:
    """Moves the lines of standard input into the journal until its end, or until `stop`."""
    rest, ended = b"", False
    while not ended and not stop.is_set():
        if select.select([0], [], [], FOLLOW_SECONDS)[0]:
            data = os.read(0, CHUNK_BYTES)
            rest, ended = rest + data, not data
            end = len(rest) if ended else rest.rfind(b"\n") + 1 or (len(rest) if len(rest) > CHUNK_BYTES else 0)
            append_patiently(journal, [line for line in map(journal_line, rest[:end].split(b"\n")) if line], stop)
            rest = rest[end:]


def append_patiently(journal: Journal, lines: Sequence[bytes], stop: threading.Event) -> None:
    """Appends, or waits until there is room for it."""
    said = False
    while lines:
        try:
            return journal.append(lines)
        except OSError as error:
            if not said:
                log.warning("cannot write to %s: %s; waiting", journal.path, error)
            said = True
        if stop.wait(1.0):
            return log.error("%d lines did not get into %s", len(lines), journal.path)


# ---- Delivery -------------------------------------------------------------------------------------------------------


class NotDelivered(Exception):
    """The outcome is open or the backend cannot take it now: send the same again."""

    def __init__(self, reason: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class Courier:
    """Sends what is in the journal, in its order. Any thread may call `deliver`; one at a time sends, for all."""

    def __init__(self, settings: Settings, journal: Journal, give_up: threading.Event) -> None:
        parts = urlsplit(settings.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=HTTP_SECONDS)
        self._path = parts.path or "/"
        self._headers = {"Content-Type": "application/json"}
        if settings.api_token:
            self._headers["Authorization"] = f"Bearer {settings.api_token}"
        self._journal = journal
        self._give_up = give_up
        self._turn = threading.Lock()
        self._batch_size = self._count = settings.batch_size
        self._failures = 0
        self._down_since = 0.0
        self.delivered = 0
        self.refused = 0

    def deliver(self) -> None:
        """Sends the next batch, unless another thread is at it.

        No line is forgotten: who finds the turn taken has appended before, and the owner of the turn looks at the
        journal's size after giving it back, and wakes the thread that delivers always if there is more to send.
        """
        if self._journal.acknowledged < self._journal.size and self._turn.acquire(blocking=False):
            try:
                self._give_up.wait(self._send_next())
            finally:
                self._turn.release()
            if self._journal.acknowledged < self._journal.size:
                self._journal.grown.set()

    def _send_next(self) -> float:
        """One batch; the seconds to wait before the next one."""
        try:
            lines = self._journal.pending(self._count)
            self._send(lines)
        except (NotDelivered, OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            self._connection.close()
            self._failures += 1
            if self._failures == 1 and not isinstance(error, NotDelivered):
                return 0.0  # a kept connection that the backend has closed: a new one may do
            if not self._down_since:
                self._down_since = time.monotonic()
                log.warning("not delivered: %s; keeping all lines and trying on", describe(error))
            wish = error.retry_after_seconds if isinstance(error, NotDelivered) else 0.0
            backoff = min(MAX_DELAY_SECONDS, math.ldexp(0.1, min(self._failures, 20)))
            return wish + random.uniform(0.5, 1.0) * backoff
        if self._down_since:
            log.info("delivering again after %.1f s", time.monotonic() - self._down_since)
        self._failures, self._down_since = 0, 0.0
        return 0.0

    def _send(self, lines: Sequence[tuple[str, bytes, int]]) -> None:
        """POSTs lines and notes the outcome. Raises NotDelivered and what http.client and the disk raise."""
        items = [{"id": record_id, "log": line.decode(errors="surrogateescape")} for record_id, line, _ in lines]
        self._connection.request("POST", self._path, json.dumps(items), self._headers)
        response = self._connection.getresponse()
        body = response.read()
        answer = read_answer(response, body, len(lines) > 1)
        if "rejected" not in answer and len(lines) > 1:
            self._count = len(lines) // 2  # as a whole it is too much or too odd: find out for which line
            return
        refused = answer.get("rejected", [{"index": 0, "reason": answer.get("detail", "")}])
        if answer.get("accepted", 0) + answer.get("duplicates", 0) + len(refused) != len(lines):
            raise NotDelivered(f"the answer does not account for {len(lines)} lines: {body[:300]!r}")
        for item in refused:
            record_id, line, _ = lines[item["index"]]
            self._journal.reject(record_id, line, str(item["reason"]))
        self._journal.acknowledge(lines[-1][2])
        self.delivered += len(lines) - len(refused)
        self.refused += len(refused)
        self._count = self._batch_size


def read_answer(response: http.client.HTTPResponse, body: bytes, several: bool) -> dict[str, Any]:
    """What the backend says of a batch; without "rejected" it refuses the request as a whole. Raises NotDelivered.

    Only an answer of the backend itself may end the life of a line: a proxy's 400, a wrong address or a wrong token
    will be mended by somebody, and until then the lines wait.
    """
    kind = response.headers.get_content_type()
    if response.status in (200, 201) and kind == "application/json":
        answer = json.loads(body)
        if isinstance(answer, dict) and {"accepted", "duplicates", "rejected"} <= answer.keys():
            return answer
    elif response.status in (400, 413) and kind == "application/problem+json":
        return dict(json.loads(body))
    elif response.status == 413 and several:
        return {}  # a proxy's limit
    wish = response.headers.get("Retry-After", "")
    seconds = float(wish) if re.fullmatch("[0-9]{1,4}", wish) else 0.0
    raise NotDelivered(f"answer {response.status}: {' '.join(body[:300].decode(errors='replace').split())}", seconds)


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, NotDelivered) else f"{type(error).__name__}: {error}"


# ---- Main -----------------------------------------------------------------------------------------------------------


def generate(settings: Settings, journal: Journal, courier: Courier, stop: threading.Event) -> None:
    """The life of one generating thread."""
    dice = random.Random()
    while not stop.wait(dice.uniform(0, settings.request_delay_limit / 1000)):
        append_patiently(journal, [generate_line(dice)], stop)
        courier.deliver()


def deliver_always(journal: Journal, courier: Courier, stop: threading.Event) -> None:
    """The life of the thread that delivers what an earlier run left, and what comes from a source."""
    while not stop.is_set():
        journal.grown.wait(PROGRESS_SECONDS)
        journal.grown.clear()
        courier.deliver()


class Crew:
    """Threads that end with the process. One that fails is logged and ends all."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.failed = False

    def start(self, target: Any, *arguments: Any) -> threading.Thread:
        def work() -> None:
            try:
                target(*arguments)
            except Exception:
                log.exception("%s failed", target.__name__)
                self.failed = True
                self.stop.set()

        thread = threading.Thread(target=work, name=target.__name__, daemon=True)
        thread.start()
        return thread


def run(settings: Settings, journal: Journal, stop: threading.Event) -> int:
    """Produces and delivers until `stop`, or until standard input has ended and all of it is delivered."""
    give_up = threading.Event()
    courier = Courier(settings, journal, give_up)
    crew = Crew(stop)
    journal.grown.set()
    crew.start(deliver_always, journal, courier, give_up)
    if settings.source == "-":
        producers = [crew.start(read_stdin, journal, stop)]
    elif settings.source:
        producers = [crew.start(follow, settings.source, journal, stop)]
    else:
        producers = [crew.start(generate, settings, journal, courier, stop) for _ in range(settings.threads_amount)]

    said, said_at = 0, time.monotonic()
    while not stop.is_set():
        time.sleep(0.1)
        if not any(thread.is_alive() for thread in producers) and journal.acknowledged == journal.size:
            break
        now = time.monotonic()
        if now - said_at >= PROGRESS_SECONDS:
            if courier.delivered != said:
                rate = (courier.delivered - said) / (now - said_at)
                log.info("%d lines delivered (%.0f/s), %d refused, %d bytes of the journal waiting",
                         courier.delivered, rate, courier.refused, journal.size - journal.acknowledged)  # fmt: skip
            said, said_at = courier.delivered, now

    deadline = time.monotonic() + SHUTDOWN_SECONDS
    for thread in producers:
        thread.join(1.0 if settings.source else 0)
    journal.close()
    while journal.acknowledged < journal.size and time.monotonic() < deadline:
        journal.moved.wait(0.1)
        journal.moved.clear()
    give_up.set()
    log.info("stopped; %d lines delivered, %d refused, %d bytes left in %s for the next start",
             courier.delivered, courier.refused, journal.size - journal.acknowledged, journal.path)  # fmt: skip
    return int(crew.failed)


def main() -> int:
    settings = read_settings(os.environ)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s client: %(message)s")
    stop = threading.Event()  # the main thread never waits for it: a handler cannot set what its own thread has locked
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        journal = open_journal(settings.log_file)
    except InUse as error:
        log.error("LOG_FILE %s is in use by another client", error)
        return 1
    except OSError as error:
        log.error("LOG_FILE %s cannot be used: %s", settings.log_file, error.strerror or error)
        return 1
    except (ValueError, LookupError, TypeError) as error:
        log.error("%s.journal, which names the journal, cannot be read (%s): restore it", settings.log_file, error)
        return 1
    log.info("journal %s, delivering to %s", journal.path, settings.url)
    return run(settings, journal, stop)


if __name__ == "__main__":
    sys.exit(main())
