"""The client: writes access-log lines to a journal and delivers each of them to the backend exactly once.

    python client.py            (settings: env/client.env; standard library only)

Its threads generate a line after a random pause, append it to the common LOG_FILE under a lock, and POST it. With
SOURCE the lines come from a file that is followed, or from standard input (-), in the common or combined log format
or as `IP METHOD URI STATUS`. A line that is in the journal is stored once, whichever process is killed; one that the
backend refuses for good is in LOG_FILE.rejected with the reason, once. When the backend is away the client waits.
It never shortens or renames the journal: move it away, with its companions, while no client runs.
"""

from __future__ import annotations

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
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

log = logging.getLogger("client")

POLL_SECONDS = 0.05  # between looks at what may have changed
HTTP_SECONDS = 30.0  # the backend answers a POST within 10 s, by 503 if need be
MAX_DELAY_SECONDS = 30.0  # between attempts to reach the backend
ROTATED_SECONDS = 2.0  # a renamed file must have been quiet for so long before the new one is read
SHUTDOWN_SECONDS = 4.5  # for delivering what is left after SIGTERM; the process ends within 5 s
PROGRESS_SECONDS = 10.0
CHUNK_BYTES = 256 * 1024  # of a source at a time; a longer line is taken in pieces, which the backend refuses
BATCH_BYTES = 1024 * 1024  # of the journal in one POST, whatever BATCH_SIZE says; a line is shorter
TAIL_BYTES = 4 * 1024 * 1024  # of a file that is opened again; a line, or a note in .rejected, is shorter
HEAD_BYTES = 256  # of a followed file, by which it is known again


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name, what it may be, its default; env/client.env explains them."""

    url: Annotated[str, r"https?://[^\s/?#]+(/[^\s?#]*)?", "like http://host/path"] = "http://localhost:8000/api/data"
    threads_amount: Annotated[int, range(1, 1000)] = 3
    request_delay_limit: Annotated[int, range(10_000_000)] = 5000  # milliseconds
    log_file: Annotated[str, r"[^\0]*[^/\0]", "the path of a file"] = "logs.txt"
    source: Annotated[str, r"[^\0]+", "the path of a file, or - for standard input"] = ""
    batch_size: Annotated[int, range(1, 10_001)] = 1000
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
            print(f"client: {name.upper()} is {shown}: must be {allowed[0]}", file=sys.stderr)
            raise SystemExit(2)
    return Settings(**values)


# ---- The journal ----------------------------------------------------------------------------------------------------


class Journal:
    """LOG_FILE, and beside it: its identity (.journal), how far it is delivered (.position), .rejected, .source.

    Why no line is lost or stored twice:
      * A line is in the journal, and that on disk, before it is sent. What is not acknowledged is sent again, by this
        process or by the next one. The position is moved after the answer; a stale or lost one costs re-sends only.
      * A line's id is the journal's own UUID with the line's byte offset in its last 48 bits, so whoever sends it,
        and however often, sends the same id; the backend stores an id once.
      * An offset is never used for two lines: only one process appends (flock), a torn tail was never sent, and when
        the journal has become shorter than what was acknowledged, it is another journal and gets another UUID.
    Why a line of a followed file is in it once: before its lines are appended, .source says on disk from where to
    where they reach there (`offset`, `offset_after`) and here (`journal`, `journal_after`). If all of them are here,
    reading goes on behind them; if not, what is here is cut off (the append did not end: none was sent) and read again.
    """

    def __init__(self, path: str, file: int) -> None:
        """Takes over the open and locked file as it was left. Raises OSError, and what a spoilt .journal gives.

        The identity is kept apart from the position, as that may be lost or stale.
        """
        self.path = path
        self._file = file
        self._mutex = threading.Lock()
        read_tail(file, path)
        self.size = os.fstat(file).st_size
        self.source = read_state(f"{path}.source")
        if self.source.get("journal", 0) <= self.size < self.source.get("journal_after", 0):
            self._take_back_source()
        self.acknowledged = read_state(f"{path}.position").get("acknowledged", 0)
        if self.acknowledged > self.size or not os.path.exists(f"{path}.journal"):
            fresh = str(uuid.uuid4())  # made a version 8 of RFC 9562; neighbouring ids keep the index dense
            write_state(f"{path}.journal", {"identity": f"{fresh[:14]}8{fresh[15:24]}"})
        if self.acknowledged > self.size:  # after that: the old identity must not meet a position that seems to fit
            log.warning("%s is shorter than what was delivered of it: it begins anew", path)
            self.acknowledged = 0
            write_state(f"{path}.position", {"acknowledged": 0})
        with open(f"{path}.journal", encoding="utf-8") as identity:
            self._identity = str(json.load(identity)["identity"])
        self._noted = ""  # the id of the last line in .rejected

    def _take_back_source(self) -> None:
        """Cuts off the lines of SOURCE that a killed process did not append to their end; they are read again."""
        self.size = self.source["journal"]
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        head = self.source.get("head_before", 0)  # that of what was read before these lines
        self.source |= {"offset_after": self.source["offset"], "journal_after": self.size, "head": head}
        write_state(f"{self.path}.source", self.source)

    def left(self) -> int:
        """Bytes that are not delivered."""
        return self.size - self.acknowledged

    def append(self, lines: Sequence[bytes], source: Mapping[str, int] | None = None) -> None:
        """Whole lines to the end, or nothing; `source` says what they are of a followed file. Raises OSError."""
        data = b"".join(line + b"\n" for line in lines)
        with self._mutex:
            if source:
                os.fsync(self._file)  # .source may be ahead of what is on disk by these lines, and by no others
                here = {"journal": self.size, "journal_after": self.size + len(data)}
                write_state(f"{self.path}.source", {**source, **here})
            append_whole(self._file, data)
            self.size += len(data)

    def pending(self, count: int) -> list[tuple[str, bytes]]:
        """The next lines to send with their ids, oldest first. Raises OSError."""
        offset, end = self.acknowledged, self.size
        os.fsync(self._file)  # else a power cut could take a line whose id is in the database already
        data = os.pread(self._file, min(BATCH_BYTES, end - offset), offset)
        lines = []
        for line in data.split(b"\n", count)[:-1]:
            lines.append((f"{self._identity}{offset:012x}", line))
            offset += len(line) + 1
        return lines

    def acknowledge(self, lines: Sequence[tuple[str, bytes]]) -> None:
        """The next lines, as `pending` gave them, are stored or noted as refused."""
        self.acknowledged += sum(len(line) + 1 for _, line in lines)
        with suppress(OSError):  # stale is safe
            write_state(f"{self.path}.position", {"acknowledged": self.acknowledged}, durable=False)

    def reject(self, record_id: str, line: bytes, reason: str) -> None:
        """Notes a refused line, once: the notes are in the order of the journal, so the last one says what is there."""
        note = json.dumps({"id": record_id, "reason": reason, "log": line.decode(errors="backslashreplace")})
        with open(f"{self.path}.rejected", "a+b") as file:
            if not self._noted:
                own = re.compile(b'^{"id": "(%s.{12})' % self._identity.encode(), re.MULTILINE)
                self._noted = max(own.findall(read_tail(file.fileno(), file.name)), default=b"").decode()
            if record_id > self._noted:
                append_whole(file.fileno(), note.encode() + b"\n")
                self._noted = record_id
                os.fsync(file.fileno())


def open_journal(path: str, number: int = 1) -> Journal:
    """With %n in the path: the first of 1, 2, 3... that no other client has. Raises BlockingIOError if one has it."""
    name = path.replace("%n", str(number))
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        if name == path:
            raise
        return open_journal(path, number + 1)
    return Journal(name, file)


def read_tail(file: int, path: str) -> bytes:
    """The last lines of a file, after cutting off what a crash left of one that was not written to its end."""
    size = os.fstat(file).st_size
    tail = os.pread(file, TAIL_BYTES, max(0, size - TAIL_BYTES))
    torn = len(tail) - tail.rfind(b"\n") - 1
    if torn:
        log.warning("%s: cut off %d bytes of a line that was not written to its end", path, torn)
        os.ftruncate(file, size - torn)
    return tail if torn < TAIL_BYTES else read_tail(file, path)


def append_whole(file: int, data: bytes) -> None:
    """Appends all of it, or cuts off again what was written of it. Raises OSError."""
    size = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        os.ftruncate(file, size)
        raise


def read_state(path: str) -> dict[str, int]:
    """A small JSON object of numbers; empty if there is none or it cannot be read."""
    with suppress(OSError, ValueError, AttributeError), open(path, encoding="utf-8") as file:
        return {name: value for name, value in json.load(file).items() if isinstance(value, int)}
    return {}


def write_state(path: str, state: Mapping[str, Any], durable: bool = True) -> None:
    """Replaces a small JSON object as a whole. Raises OSError."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


# ---- Where lines come from ------------------------------------------------------------------------------------------

METHODS = ("GET", "GET", "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
STATUS_CODES = (200, 200, 200, 201, 204, 301, 304, 400, 401, 403, 404, 500, 503)

# Common and combined log format of Apache and nginx: host ident user [time] "METHOD URI PROTOCOL" status size ...
ACCESS_LOG = re.compile(rb'(\S+) \S+ .*?\[[^\]]*\] "([^\s"]+) (\S+)(?: [^\s"]*)?" ([0-9]{3})(?: .*)?')


def generate_line() -> bytes:
    ip = ".".join(str(random.randint(1, 254)) for _ in range(4))
    path = "/".join(f"{random.randrange(16**4):04x}" for _ in range(random.randint(1, 3)))
    return f"{ip} {random.choice(METHODS)} https://domain.com/{path} {random.choice(STATUS_CODES)}".encode()


def journal_line(line: bytes) -> bytes:
    """A source line as it goes into the journal: four fields if it is in a known log format, else as it is."""
    line = line.strip(b" \t\r\n")
    found = ACCESS_LOG.fullmatch(line)
    return b" ".join(found.groups()) if found else line


def whole_lines(data: bytes, ended: bool) -> tuple[list[bytes], int]:
    """The lines that a chunk of a source begins with, and how many bytes of it they are."""
    end = data.rfind(b"\n") + 1 or (len(data) if ended or len(data) == CHUNK_BYTES else 0)
    return [line for line in map(journal_line, data[:end].split(b"\n")) if line], end


class FollowedFile:
    """SOURCE as a file: its lines, and what is appended to it, through renaming, truncating and restarts."""

    def __init__(self, path: str, journal: Journal) -> None:
        self._path = path
        self._journal = journal
        self._inode = journal.source.get("inode", 0)
        self._head = journal.source.get("head", 0)  # checksum of the first bytes of what was read; 0: not known
        self._offset = journal.source.get("offset_after", 0)
        self._file = -1
        self._quiet_since = float("inf")  # seen with another file at its path, and with nothing new

    def step(self) -> bool:
        """Moves one chunk of lines into the journal; False if there is nothing new. Raises OSError."""
        if self._file < 0:
            self._file, self._quiet_since = self._open(), float("inf")
        left = self._is_left()  # before the reading: what is written until then is read
        data = os.pread(self._file, CHUNK_BYTES, self._offset)
        start = os.pread(self._file, HEAD_BYTES, 0) if self._offset else data[:HEAD_BYTES]
        if not self._goes_on(self._file):  # after the reading: a truncated file may have grown past the offset by then
            log.warning("%s was truncated or replaced; reading it from its beginning", self._path)
            self._offset = 0
            return True
        ended = left and b"\n" not in data
        lines, length = whole_lines(data, ended)
        if length:
            self._move(lines, self._offset + length, zlib.crc32(start[: self._offset + length]))
        elif ended:
            os.close(self._file)
            self._file, self._inode, self._offset = -1, 0, 0
        return length > 0 or ended

    def _move(self, lines: Sequence[bytes], end: int, head: int) -> None:
        inode = os.fstat(self._file).st_ino
        heads = {"head_before": self._head, "head": head}
        self._journal.append(lines, {"inode": inode, **heads, "offset": self._offset, "offset_after": end})
        self._inode, self._head, self._offset, self._quiet_since = inode, head, end, float("inf")

    def _open(self) -> int:
        """The file that was followed last, also under another name; else the one at the path."""
        folder = os.path.dirname(self._path) or "."
        looks = (os.scandir(folder) for _ in range(2 if self._inode else 0))  # a rename may hide it from one of them
        for entry in chain.from_iterable(looks):
            if entry.is_file() and entry.stat().st_ino == self._inode:
                file = os.open(entry.path, os.O_RDONLY)
                if self._goes_on(file):
                    return file
                os.close(file)  # truncated, or another file that got its inode
        return os.open(self._path, os.O_RDONLY)

    def _goes_on(self, file: int) -> bool:
        """Nothing was read yet, or it was this file, which is not shorter than that and has not begun anew."""
        status = os.fstat(file)
        head = zlib.crc32(os.pread(file, min(HEAD_BYTES, self._offset), 0))
        same = status.st_ino == self._inode and status.st_size >= self._offset and self._head in (0, head)
        return same or not self._offset

    def _is_left(self) -> bool:
        """Another file is at the path, and ours has been quiet since that was seen: its writer has let go of it."""
        with suppress(FileNotFoundError):  # renamed, and the new one is not there yet
            if not os.path.samefile(self._path, self._file):
                now = time.monotonic()
                self._quiet_since = min(self._quiet_since, now)
                return now - self._quiet_since > ROTATED_SECONDS
        self._quiet_since = float("inf")
        return False


def follow(path: str, journal: Journal, stop: threading.Event) -> None:
    """Moves the lines of a file into the journal until `stop`. A file that is not there yet is waited for."""
    file = FollowedFile(path, journal)
    while not stop.is_set():
        if not patiently(stop, f"SOURCE {path}", file.step):
            stop.wait(POLL_SECONDS)


def read_stdin(journal: Journal, stop: threading.Event) -> None:
    """Moves the lines of standard input into the journal until its end, or until `stop`."""
    rest, ended = b"", False
    while not ended and not stop.is_set():
        if select.select([0], [], [], POLL_SECONDS)[0]:
            data = os.read(0, CHUNK_BYTES - len(rest))
            rest, ended = rest + data, not data
            lines, length = whole_lines(rest, ended)
            patiently(stop, f"cannot write to {journal.path}", journal.append, lines)
            rest = rest[length:]


def generate(delay_milliseconds: int, journal: Journal, courier: Courier, stop: threading.Event) -> None:
    """Makes up lines and delivers them until `stop`."""
    while not stop.wait(random.uniform(0, delay_milliseconds / 1000)):
        patiently(stop, f"cannot write to {journal.path}", journal.append, [generate_line()])
        courier.deliver()


def patiently(stop: threading.Event, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """Does it; while the disk or the file does not let it, says so once and tries on, until `stop`."""
    said = False
    while True:
        try:
            return action(*arguments)
        except OSError as error:
            if not said:
                log.warning("%s: %s; waiting", what, error)
            said = True
        if stop.wait(POLL_SECONDS):
            return log.error("%s: stopped before that was over", what)


# ---- Delivery -------------------------------------------------------------------------------------------------------


class Courier:
    """Sends what is in the journal, in its order. Any thread may call `deliver`; one at a time sends, for all."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        url = urlsplit(settings.url)
        connection = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._connection = connection(url.netloc, timeout=HTTP_SECONDS)
        self._path = url.path or "/"
        self._headers = {"Content-Type": "application/json"}
        if settings.api_token:
            self._headers["Authorization"] = f"Bearer {settings.api_token}"
        self._journal = journal
        self._batch_size = settings.batch_size
        self._turn = threading.Lock()
        self._delivered = self._refused = 0
        self._down_since = self._not_before = 0.0
        self._said_at = time.monotonic()

    def deliver_always(self) -> None:
        """What an earlier run left, what comes from a source, and what other threads had no turn for."""
        while True:
            if not self.deliver():
                time.sleep(POLL_SECONDS)

    def deliver(self) -> bool:
        """Sends the next batch; False if there is none, another thread is at it, or it is not the time."""
        if self._turn.locked():
            return False
        with self._turn:
            if not self._journal.left() or time.monotonic() < self._not_before:
                return False
            kept = self._connection.sock is not None
            try:
                self._send(self._journal.pending(self._batch_size))
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                self._connection.close()
                if not kept or isinstance(error, ValueError):  # else it may have been closed long ago: try a new one
                    self._put_off(error)
            return True

    def _put_off(self, error: Exception) -> None:
        """Whatever went wrong, on the disk too: all lines are kept and sent again, after a pause that grows."""
        now = time.monotonic()
        if not self._down_since:
            self._down_since = now
            log.warning("not delivered: %s; keeping all lines and trying on", error)
        pause = min(MAX_DELAY_SECONDS, max(0.2, now - self._down_since))  # as long again as the outage has been
        self._not_before = max(now, self._not_before) + random.uniform(0.5, 1.0) * pause

    def _send(self, lines: Sequence[tuple[str, bytes]]) -> None:
        """POSTs lines and notes the outcome. Raises ValueError and what http.client and the disk raise."""
        items = [{"id": record_id, "log": line.decode(errors="surrogateescape")} for record_id, line in lines]
        self._connection.request("POST", self._path, json.dumps(items), self._headers)
        response = self._connection.getresponse()
        wish = response.headers.get("Retry-After", "")
        self._not_before = time.monotonic() + (float(wish) if re.fullmatch("[0-9]{1,4}", wish) else 0)
        refused = read_answer(response, len(lines))
        if refused is None:
            return self._send(lines[: len(lines) // 2])
        for item in refused:
            record_id, line = lines[item["index"]]
            self._journal.reject(record_id, line, str(item["reason"]))
        self._delivered += len(lines) - len(refused)
        self._refused += len(refused)
        if self._down_since:
            log.info("delivering again after %.1f s", time.monotonic() - self._down_since)
            self._down_since = 0.0
        self._journal.acknowledge(lines)  # last: with nothing left, the process may end and say how many these were
        if time.monotonic() > self._said_at + PROGRESS_SECONDS:
            self.say("going on")

    def say(self, what: str) -> None:
        self._said_at = time.monotonic()
        log.info("%s; %d lines delivered, %d refused, %d bytes left in the journal %s",
                 what, self._delivered, self._refused, self._journal.left(), self._journal.path)  # fmt: skip


def read_answer(response: http.client.HTTPResponse, count: int) -> list[dict[str, Any]] | None:
    """Which of so many lines are refused for good; None: all as a whole are, to be sent in parts to find out which.

    Only an answer of the backend itself may end the life of a line: a proxy's 400, a wrong address or a wrong token
    will be mended by somebody, and until then the lines wait. Raises ValueError.
    """
    body = response.read()
    kind = response.headers.get_content_type()
    if response.status in (200, 201) and kind == "application/json":
        answer = json.loads(body)
        if answer["accepted"] + answer["duplicates"] + len(answer["rejected"]) == count:
            return list(answer["rejected"])
    elif response.status == 413 and count > 1:  # a proxy's limit will do
        return None
    elif response.status in (400, 413) and kind == "application/problem+json":
        problem = json.loads(body)
        reason = problem["detail"]  # whatever has none is not the backend's
        if "rejected" not in problem:
            return None if count > 1 else [{"index": 0, "reason": reason}]
        if len(problem["rejected"]) == count:
            return list(problem["rejected"])
    raise ValueError(f"answer {response.status}: {' '.join(body[:300].decode(errors='replace').split())}")


# ---- Main -----------------------------------------------------------------------------------------------------------


def start(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def fail(failure: threading.ExceptHookArgs) -> None:
    """The end of a thread that failed is the end of all, which is as safe as kill -9."""
    log.critical("%s failed", failure.thread and failure.thread.name, exc_info=failure.exc_value)
    os._exit(1)


def run(settings: Settings, journal: Journal, signals: Sequence[int]) -> None:
    """Produces and delivers until a signal came, or until standard input has ended and all of it is delivered."""
    courier, stop = Courier(settings, journal), threading.Event()
    start(courier.deliver_always)
    if settings.source == "-":
        producers = [start(read_stdin, journal, stop)]
    elif settings.source:
        producers = [start(follow, settings.source, journal, stop)]
    else:
        arguments = settings.request_delay_limit, journal, courier, stop
        producers = [start(generate, *arguments) for _ in range(settings.threads_amount)]
    deadline = float("inf")
    while (any(thread.is_alive() for thread in producers) or journal.left()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if signals and not stop.is_set():
            stop.set()
            deadline = time.monotonic() + SHUTDOWN_SECONDS
    courier.say("stopped")


def main() -> int:
    settings = read_settings(os.environ)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s client: %(message)s")
    threading.excepthook = fail
    signals: list[int] = []  # that came; not an Event: a second signal in its set() would wait for its lock for ever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        journal = open_journal(settings.log_file)
    except BlockingIOError:
        log.error("LOG_FILE %s is in use by another client", settings.log_file)
        return 1
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.error("LOG_FILE %s or its .journal, which names it, cannot be used: %s", settings.log_file, error)
        return 1
    log.info("journal %s, delivering to %s", journal.path, settings.url)
    run(settings, journal, signals)
    return 0


if __name__ == "__main__":
    os._exit(main())  # a second signal would kill the interpreter in its own end, which knows no handlers any more
