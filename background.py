"""An exporter: follows the backend's records and appends them to one file that any number of exporters share.

    python background.py [verify | reconcile | --check]     (--help has all of it; settings: env/background.env)

The way of a record:
  1. Source.follow asks from the last known record on, including it; the first that comes has to be that one.
  2. Exporter._fetch keeps what follows in memory, up to a bound; past it the database keeps the rest.
  3. Turn: lock file, its flock, the folder's flock: one writer.
  4. SharedFile.opened cuts off a torn end and says which record is the last, in the file or in the part before it.
  5. Exporter._append_after drops what is there already; what does not follow on that record is fetched again.
  6. SharedFile.append: whole lines to disk, or none. FILE_NAME.position says up to where, and in which file.
It promises: the shared file and its renamed parts hold each record once, whole, in the order of `created`, whichever
instances are killed, stopped, started twice, or run out of disk; what does not follow is told, and not appended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import http.client
import json
import logging
import os
import random
import re
import select
import signal
import stat
import sys
import textwrap
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice, pairwise
from operator import lt
from typing import Annotated, Any, NamedTuple, get_type_hints
from urllib.parse import urlsplit

VERSION = "0.2.0"
log = logging.getLogger("background")

# ---- Limits ---------------------------------------------------------------------------------------------------------

PORTION_BYTES = 4 * 1024**2  # read from the backend between two attempts to write: some 20,000 records
MEMORY_BYTES = 32 * 1024**2  # records waiting for their turn; past it fetching stops and the database keeps the rest
HTTP_SECONDS = 10.0  # without a byte from the backend
BUSY_SECONDS = 0.05  # between attempts to get a turn
TURN_SECONDS = 10.0  # without a turn, while records wait: then it is said who has it
MAX_DELAY_SECONDS = 30.0  # between attempts to reach the backend
REMIND_SECONDS = 60.0  # between two lines about what a person has to mend
PROGRESS_SECONDS = 10.0
METRICS_SECONDS = 2.0  # between two states of METRICS_FILE
METRICS_END_SECONDS = 1.0  # for its last one, at the end
OUTAGE_REASONS = 10  # of one outage are told; more would be a flood
LINE_BYTES = 64 * 1024  # no line is longer: a record has at most 17 KiB
LOOK_BACK_BYTES = 8 * 1024**2  # of a file's end; what was not on disk yet at a power cut is one write, half of that
GIVE_BACK_LINES = 500  # in one POST of reconcile: of 25 KB each at most; the backend takes 16 MiB
NDJSON = "application/x-ndjson"
JSON = "application/json"
BEFORE_ALL = "1969-12-31T23:59:59.999999Z"  # `created` in the position of a file that nothing comes before
EPOCH = "1970-01-01T00:00:00.000000Z"
DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?Z?"
ENDING = (signal.SIGTERM, signal.SIGINT)
ACL = "system.posix_acl_access"  # the extended attribute that holds a file's access control list
MOUNTS = "/proc/self/mountinfo"
NETWORK = re.compile("nfs4?|cifs|smb3|smbfs|9p|afs|ceph|lustre|glusterfs")  # a flock may hold for one machine only
USER_SPACE = re.compile(r"fuse(\..*)?|fuseblk|virtiofs")  # the same files by another path may not share its locks

# ---- Settings -------------------------------------------------------------------------------------------------------


def is_url(text: str) -> bool:
    try:
        host = (urlsplit(text).hostname or "").encode("idna")
        return bool(host and re.fullmatch(r'https?://[^\s/?#@]+(/[!"$->@-~]*)?', text)) and urlsplit(text).port != 0
    except ValueError:  # its port, brackets, or a part of the host that is too long
        return False


Url = Annotated[str, is_url, "like http://host/path"]
FileName = Annotated[str, r"(?!\.{1,2}$)[^/\0]{1,200}", "a name of at most 200 characters without /"]
FilePath = Annotated[str, r"[^\0]*[^/\0]", "the path of a file"]
LogFormat = Annotated[str, "text|json", "text or json"]
Secret = Annotated[str, r"[A-Za-z0-9._~+/=-]+", "letters, digits and ._~+/=- (its value is not shown)"]


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name: what it may be, its meaning with its unit, its default.

    The one table of them: --help prints it, and a test compares it with env/background.env and the README.
    """

    url: Annotated[Url, "Where records are fetched"] = "http://localhost:8000/api/data"
    directory: Annotated[
        str, r"[^\0]+", "a folder", "Where the shared file is, made if missing; every instance must see the same one"
    ] = "var/shared"
    file_name: Annotated[FileName, "The shared file in that folder"] = "data.txt"
    request_delay: Annotated[int, range(1, 10_000_000), "Pause between two polls, in milliseconds"] = 1000
    rotate_bytes: Annotated[
        int, range(1_000_000_000_000), "Size in bytes at which the shared file is renamed to a part, 0 for never"
    ] = 0
    keep_files: Annotated[
        int, range(1_000_000), "How many of the parts that it made itself stay, older ones are deleted; 0 for all"
    ] = 0
    metrics_file: Annotated[
        FilePath,
        "Where metrics are written every 2 s, for the textfile collector of node-exporter, such as"
        " /var/lib/prometheus/node-exporter/logpipeline-exporter.prom, empty for nowhere; each instance needs a file of"
        " its own",
    ] = ""
    log_format: Annotated[LogFormat, "Form of a log line, plain text or a JSON object"] = "text"
    api_token: Annotated[Secret, "Token for a backend that wants one"] = ""


class Setting(NamedTuple):
    """What the table says of one variable."""

    name: str  # of the variable
    kind: type
    rule: range | str | Callable[[str], bool]
    allowed: str
    meaning: str
    default: Any

    @property
    def text(self) -> str:
        """What --help and the env file say."""
        return f"{self.meaning}: {self.allowed}; default {'empty' if self.default == '' else self.default}"

    def is_right(self, text: str) -> bool:
        if isinstance(self.rule, range):
            return bool(re.fullmatch("[0-9]{1,12}", text)) and int(text) in self.rule
        return bool(re.fullmatch(self.rule, text)) if isinstance(self.rule, str) else self.rule(text)


def settings_table() -> Iterator[Setting]:
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        rule, *allowed, meaning = hint.__metadata__
        words = allowed[0] if allowed else f"a whole number from {rule[0]} to {rule[-1]}"
        yield Setting(name.upper(), hint.__origin__, rule, words, meaning, getattr(Settings, name))


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; an empty value means the default. Raises ValueError with one line."""
    values: dict[str, Any] = {}
    for setting in settings_table():
        text = re.sub(r"""^(['"])(.*)\1$""", r"\2", environ.get(setting.name, "").strip()).strip()
        if text and not setting.is_right(text):
            hidden = "not shown" in setting.allowed or (setting.name == "URL" and "@" in text)
            raise ValueError(f"{setting.name} is {'(hidden)' if hidden else repr(text)}: must be {setting.allowed}")
        values |= {setting.name.lower(): setting.kind(text)} if text else {}
    settings = Settings(**values)
    shared = os.path.realpath(os.path.join(settings.directory, settings.file_name))
    for path in (settings.metrics_file, f"{settings.metrics_file}.new") if settings.metrics_file else ():
        if re.fullmatch(rf"{re.escape(shared)}([.-].*)?", os.path.realpath(path), re.DOTALL):
            raise ValueError(f"METRICS_FILE is {settings.metrics_file!r}: must be a file of its own, not the shared"
                             " file, nor named like one of its parts or companions")  # fmt: skip
    return settings


COMMANDS = {
    "": "export, until SIGTERM or SIGINT",
    "verify [date_from [date_to]]": "compare the shared file with the database, record by record; exit status 0 or 1",
    "reconcile [--dry-run] [--yes]": "give back to the database what it lost and the file still has",
    "--check": "say whether it could export: settings, backend, folder, last record, a line each; changes nothing; exit"
    " status 0 or 1",
    "--help": "this text; dates are like 2026-11-23T18:43Z",
    "--version": f"background.py {VERSION}",
}


def help_text() -> str:
    def item(name: str, text: str, width: int) -> str:
        first, others = f"  {name:<{width}}  ", " " * (width + 4)
        return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

    return "\n".join([
        f"usage: python background.py [{' | '.join(name.split(' ')[0] for name in COMMANDS if name)}]",
        "",
        "The exporter of the log pipeline: follows the backend's records, and appends each of them once to one file",
        "that any number of exporters share.",
        "",
        *(item(name, text, 29) for name, text in COMMANDS.items()),
        "",
        "Settings are environment variables, read once at start; an empty one is the default:",
        "",
        *(item(setting.name, setting.text, 13) for setting in settings_table()),
    ])  # fmt: skip


# ---- Log ------------------------------------------------------------------------------------------------------------

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f]")


class LogFormatter(logging.Formatter):
    """One line an event, in UTC: `2026-11-25T00:20:46.123Z INFO background[1234]: message`, or the same as JSON.

    What a message quotes from elsewhere cannot begin a line of its own or reach a terminal's escapes.
    """

    def __init__(self, service: str, as_json: bool) -> None:
        super().__init__()
        self._service, self._as_json = service, as_json

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        message = message.encode(errors="backslashreplace").decode()  # the name of a file may have any bytes
        if self._as_json:
            level, pid = record.levelname.lower(), record.process
            event = {"time": moment, "level": level, "service": self._service, "pid": pid, "message": message}
            return json.dumps(event)
        line = UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", " | ".join(message.splitlines()))
        return f"{moment} {record.levelname} {self._service}[{record.process}]: {line}"


def log_as(service: str, log_format: str) -> None:
    """Also what nobody has caught is an event, in one line."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(service, log_format == "json"))
    logging.basicConfig(level="INFO", handlers=[handler])
    sys.excepthook = lambda *failure: log.critical("failed", exc_info=failure)
    threading.excepthook = lambda failure: log.critical("a thread failed", exc_info=failure.exc_value)


class Outage:
    """What lasts is told when it begins, with its reason, and when it is over; each new reason meanwhile once.

    What a person has to mend is told again after `remind_seconds`. Safe to use from any thread.
    """

    def __init__(self, what: str, state: str = "unreachable") -> None:
        self._what, self._state = what, state
        self._lock = threading.Lock()
        self._since: float | None = None
        self._told: dict[str, float] = {}  # kinds of reasons, and when

    def __bool__(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def begin(self, reason: object, kind: str = "", remind_seconds: float = float("inf")) -> None:
        """Called as often as it is noticed. Reasons of one kind are one; usually each text is a kind."""
        kind = kind or str(reason)
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since = now
            told = self._told.get(kind)
            if len(self._told) < OUTAGE_REASONS if told is None else now - told >= remind_seconds:
                self._told[kind] = now
                log.warning("%s %s: %s; retrying", self._what, self._state, reason)

    def end(self) -> None:
        if self._since is None:  # asked without the lock: after each success
            return
        with self._lock:
            if self._since is not None:
                log.info("%s back after %.1f s", self._what, time.monotonic() - self._since)
                self._since = None
                self._told.clear()


# ---- Records --------------------------------------------------------------------------------------------------------

CREATED = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z"
RECORD = re.compile(rf'^\{{"id":"[^"]+","created":"({CREATED})",.*\}}\n'.encode(), re.MULTILINE)
RECORD_START = b'{"id":"'
CONTROL = re.compile(rb"[\x01-\x09\x0b-\x1f\x7f]")  # in no record, and in nearly all files that are not text


class Record(NamedTuple):
    """A record that another one is to follow on."""

    created: str  # text that sorts by time
    line: bytes  # as JSON; it may have fewer members than the database's: an older version wrote it
    path: str = ""  # the file that ends in it, or that names it


def created_of(line: bytes) -> str:
    """When a record was stored; "" if the line is no record."""
    found = RECORD.fullmatch(line)
    return found[1].decode() if found else ""


def is_json_record(line: bytes) -> bool:
    try:
        return bool(created_of(line)) and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def shown(text: str | bytes) -> str:
    """For a person, in one line: what cannot be printed is escaped."""
    text = (text if isinstance(text, str) else text.decode(errors="backslashreplace")).rstrip("\n")
    return text if text.isprintable() else ascii(text)


def last_record(lines: bytes) -> Record:
    line = lines[lines.rfind(b"\n", 0, -1) + 1 :]
    return Record(created_of(line), line)


def just_after(created: str) -> str:
    moment = datetime.fromisoformat(created) + timedelta(microseconds=1)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def matches(known: bytes, other: bytes) -> bool:
    """Whether these are the same record: each member that the known line has is equal in the other one."""
    if known == other:
        return True
    try:
        return is_within(json.loads(known), json.loads(other))
    except ValueError:
        return False


def is_within(known: Any, other: Any) -> bool:
    if isinstance(known, dict) and isinstance(other, dict):
        return all(name in other and is_within(value, other[name]) for name, value in known.items())
    return bool(known == other)


def is_same(one: Record | None, other: Record | None) -> bool:
    """With the same members: what was compared with the database for the one counts for the other."""
    if one is None or other is None:
        return one is other
    return one.created == other.created and matches(one.line, other.line) and matches(other.line, one.line)


def end_within(lines: bytes, record: Record) -> int:
    """Where that record ends in these lines; -1 if it is not among them."""
    found = lines.find(f'","created":"{record.created}",'.encode())  # a quote within a value would be escaped
    start, end = lines.rfind(b"\n", 0, max(found, 0)) + 1, lines.find(b"\n", found) + 1
    return end if found >= 0 and matches(record.line, lines[start:end]) else -1


def name_of(line: bytes) -> str:
    """Which record that is, for a person."""
    members = json.loads(line)
    return f"record {members.get('id', '(id unknown)')} of {members.get('created')}"


# ---- The folder and the parts in it --------------------------------------------------------------------------------

COMPANIONS = (".lock", ".position", ".position.new", ".position.file", ".cut")


class Unusable(OSError):
    """A file is not what it should be, and a person has to look at it. The message says what and where."""


def check_regular(descriptor: int, path: str) -> None:
    """Raises Unusable."""
    if not os.path.isfile(descriptor):
        raise Unusable(f"{path} is not a regular file; remove it")


def flock(descriptor: int, path: str) -> None:
    """Locks a regular file for us alone. Does not wait: raises BlockingIOError, or Unusable."""
    check_regular(descriptor, path)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Folder:
    """The folder of the shared file, by its descriptor: what is done in a turn is done in that one, also if another is
    mounted or moved to its path meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.descriptor)

    def open(self, name: str, flags: int, mode: int = 0o644) -> int:
        """No symbolic link is followed, as what is behind it may be in another folder, with locks of its own."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode, dir_fd=self.descriptor)

    def stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)

    def has(self, name: str) -> bool:
        try:
            self.stat(name)
            return True
        except FileNotFoundError:
            return False

    def replace(self, old: str, new: str) -> None:
        os.replace(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def rename(self, old: str, new: str) -> None:
        """Raises FileExistsError rather than replace a file. Where there are no hard links, one that comes to that
        name in the very same moment is replaced."""
        try:
            os.link(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
            self.unlink(old)
        except OSError:
            if self.has(new):
                raise
            self.replace(old, new)

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Names that were made, changed or removed outlive a power cut."""
        os.fsync(self.descriptor)


class Part(NamedTuple):
    """A file in the folder that begins with a record: the shared file itself, or one that it was renamed to."""

    name: str
    path: str
    first: str  # `created` of its first record; "" if a power cut left only zeros or a half of it
    status: os.stat_result
    compressed: bool
    ours: bool  # by its name; it may be a part under any other name as well
    access: bytes  # its access control list, b"" if it has none

    @property
    def identity(self) -> tuple[int, int]:
        return identity(self.status)


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def find_parts(folder: Folder, file_name: str) -> tuple[list[Part], list[str]]:
    """The parts, the shared file among them, in the order of their first records; and the names that were passed over.

    Content decides: a part begins with a record, compressed by gzip or not. What belongs to another exporter, which
    has a position of its own in this folder, is none, nor is X.gz while X is still there, nor a second or symbolic link
    to a file.
    """
    entries = list(os.scandir(folder.descriptor))
    links = {entry.name for entry in entries if entry.is_symlink() and entry.name != file_name}
    names = {entry.name for entry in entries if entry.is_file(follow_symlinks=False) or entry.name == file_name}
    owners = {file_name, *(name.removesuffix(".position") for name in names if name.endswith(".position"))}
    names -= {f"{owner}{companion}{end}" for owner in owners for companion in COMPANIONS for end in ("", ".gz")}
    ours = {name for name in names if owner_of(name, owners) == file_name}
    unowned = {name for name in names if not owner_of(name, owners)}
    looked_at = {name: look_at(folder, name, name in ours) for name in (*sorted(ours), *sorted(unowned))}
    parts: dict[tuple[int, int], Part] = {}
    for part in filter(None, looked_at.values()):
        plain = looked_at.get(part.name.removesuffix(".gz")) if part.compressed else None
        if plain and plain.name != part.name and plain.first == part.first:
            looked_at[part.name] = None
        else:
            parts.setdefault(part.identity, part)
    passed_over = {name for name in names | links if not looked_at.get(name)} - {file_name}
    return sorted(parts.values(), key=lambda part: (part.first, part.name)), sorted(map(shown, passed_over))


def made_by_rotation(folder: Folder, file_name: str) -> dict[str, list[str]]:
    """Parts with a name that ROTATE_BYTES gives, and the names they have: one that is being compressed has two."""
    pattern = re.compile(rf"({re.escape(file_name)}\.[0-9]{{8}}T[0-9]{{6}}\.[0-9]{{6}}Z)(\.gz)?")
    names: dict[str, list[str]] = {}
    for match in filter(None, map(pattern.fullmatch, os.listdir(folder.descriptor))):
        names.setdefault(match[1], []).append(match[0])
    return names


def owner_of(name: str, owners: set[str]) -> str:
    """Whose file or part that is, by its name; "" if it is nobody's. `data.txt.v2.1` is that of data.txt.v2, if there
    is one, and else of data.txt; `data.txt-20261124` is called so by logrotate's dateext."""
    return max((one for one in owners if name == one or name.startswith((f"{one}.", f"{one}-"))), key=len, default="")


def look_at(folder: Folder, name: str, ours: bool) -> Part | None:
    """None for what does not begin with a record. Of ours a power cut may have left zeros, or a half, of it."""
    try:
        with open(name, "rb", opener=folder.open) as file:
            access = access_list(file.fileno())
            status, compressed = os.fstat(file.fileno()), file.read(2) == b"\x1f\x8b"
            file.seek(0)
            first = (gzip.GzipFile(fileobj=file) if compressed else file).readline(LINE_BYTES)
    except (FileNotFoundError, EOFError, zlib.error, gzip.BadGzipFile):  # it has gone meanwhile, or is no gzip file
        return None
    except OSError:
        if ours:  # what it has must not be taken for missing
            raise
        return None
    created = created_of(first)
    torn = ours and first and not compressed and RECORD_START.startswith(first[: len(RECORD_START)].rstrip(b"\0"))
    if not stat.S_ISREG(status.st_mode) or not (created or torn):
        return None
    return Part(name, shown(os.path.join(folder.path, name)), created, status, compressed, ours, access)


def access_list(descriptor: int) -> bytes:
    """A file's access control list; b"" if it has none, or the file system knows none."""
    try:
        return os.getxattr(descriptor, ACL) if hasattr(os, "getxattr") else b""
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return b""


def lines_of(folder: Folder, part: Part) -> Iterator[bytes]:
    """Raises Unusable for a compressed part that is broken, and where another file has come to its name."""
    gone = Unusable(f"{part.path} was renamed, replaced or deleted meanwhile; try again")
    try:
        file = open(part.name, "rb", opener=folder.open)  # noqa: SIM115
    except FileNotFoundError as error:
        raise gone from error
    with file:
        if identity(os.fstat(file.fileno())) != part.identity:
            raise gone
        try:
            lines = gzip.GzipFile(fileobj=file) if part.compressed else file
            yield from iter(lambda: lines.readline(LINE_BYTES), b"")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unusable(f"{part.path} cannot be decompressed ({error}): is it being written?") from error


def read_tail(descriptor: int, path: str) -> bytes:
    """The end of a file, with its last whole line at least. Raises Unusable if that is nowhere near."""
    size, length = os.fstat(descriptor).st_size, LINE_BYTES
    while True:
        tail = os.pread(descriptor, min(size, length), max(0, size - length))
        if length >= size or tail.count(b"\n") >= 2:
            return tail
        if length > LOOK_BACK_BYTES:
            limit = LOOK_BACK_BYTES // 1024**2
            raise Unusable(f"{path} has no record in its last {limit} MiB: is it another program's file? Move it away")
        length *= 4


def last_whole(descriptor: int, path: str, mend: bool) -> Record | None:
    """The last whole record, None if there is none; `mend` cuts off a torn tail. Raises Unusable for what is no end of
    a shared file."""
    tail = read_tail(descriptor, path)
    whole, line_feed, torn = tail.rpartition(b"\n")
    last = last_record(whole + line_feed) if line_feed else None
    begun = torn.rstrip(b"\0")  # a machine that crashed may leave zeros for what was not on disk yet
    if (last and not is_json_record(last.line)) or not RECORD_START.startswith(begun[: len(RECORD_START)]):
        raise Unusable(f"{path} does not end in a record: is it another program's file? Move it away")
    if torn and mend:
        log.warning("%s: cut off %d bytes of a record that was not written to its end", path, len(torn))
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(torn))
        os.fsync(descriptor)  # a power cut must not bring it back when this is no longer the newest part
    elif torn:
        log.warning("%s: ends in %d bytes of a record that was not written to its end", path, len(torn))
    return Record(last.created, last.line, path) if last else None


def mend_after_power_cut(descriptor: int, path: str) -> None:
    """Cuts off everything from the first zero on in the last few MiB, and checks that the rest are records in order.

    What was not flushed before a power cut may be there or not, block by block; a block that is not reads as zeros, and
    may stand between others. All of it belongs to the last write, which is at most half of what is looked at: every
    write is flushed before the next begins. The database still has the records that are cut off with it.
    """
    size = os.fstat(descriptor).st_size
    start = max(0, size - LOOK_BACK_BYTES)
    end = os.pread(descriptor, size - start, start)
    skipped = end.find(b"\n") + 1 if start else 0  # the rest of a line that begins before
    start, end = start + skipped, end[skipped:]
    hole = end.find(b"\0")
    whole = end[: end.rfind(b"\n", 0, hole if hole >= 0 else None) + 1]
    created = RECORD.findall(whole)
    if created and (len(created) != whole.count(b"\n") or not all(map(lt, created, created[1:]))):
        raise Unusable(f"{path}: not all of its last lines are records in order; run background.py verify, and mend it")
    nothing_else = not start and not whole and re.match(rb"\0|\{\"id", end) and not CONTROL.search(end)
    if hole >= 0 and (created or nothing_else):
        log.warning("%s: cut off %d bytes: a power cut left zeros among them", path, len(end) - len(whole))
        os.ftruncate(descriptor, start + len(whole))
        os.fsync(descriptor)


# ---- The shared file ------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """What stands beside the file: up to where all is written, and into which file."""

    record: Record | None  # None: the file is the first one, and has none yet
    identity: tuple[int, int]  # device and inode: a hint
    first: str  # `created` of that file's first record: what it is known by; "" while it has none, or an older exporter
    knows_first: bool  # wrote this

    @property
    def created(self) -> str:
        return self.record.created if self.record else BEFORE_ALL


class SharedFile:
    """The file that all instances append to. Whoever opens it has the turn; its position may be read at any time.

    Why no record is lost or repeated in it:
      * The file is its own checkpoint: its last whole record is what the next one has to follow on, however the last
        writer ended. A torn tail has no line feed and is cut off, so it is always a sequence of whole lines.
      * It may be renamed at any moment. The position names the file (device, inode, first record) durably before the
        first byte is appended to it. So when the file is new and empty, the last record of the part that the position
        names, or the position's own if that is later, is what the next one has to follow on. A part is recognised by
        its first record; names and inodes only say where to look first.
      * The position's record is never ahead of what was flushed to the file, and may be behind. So a file that ends
        before it was shortened, and a part that does was cut: the first is mended from the database, which follows on
        any record that it has; the second is for a person, as others may have what is missing.
      * Only a folder without a record, a part and a position has no last record.
      * Other programs take no lock. So the file must have a name, and the size that is known, before a write, and just
        that much more after it; else nothing is appended, or what was does not count. A new one takes no file's place.
    What is not in the folder cannot be looked at: a part that is moved out of it, or deleted, should have been there
    until the next record was written.
    """

    def __init__(self, directory: str, file_name: str, rotate_bytes: int = 0, keep_files: int = 0) -> None:
        self.path = os.path.join(directory, file_name)
        self._name = file_name
        self._rotate_bytes = rotate_bytes
        self._keep_files = keep_files
        self.rotations = 0
        self._looked_at: tuple[int, int] | None = None  # the file that a power cut left nothing in
        self._descriptor = -1
        self._size = 0  # as we know it: nobody else may change it while it is open here
        self._first = ""  # `created` of its first record
        self._last: Record | None = None  # what the next record has to follow on
        self._folder: Folder

    @contextlib.contextmanager
    def opened(self, folder: Folder) -> Iterator[Record | None]:
        """The file, open, locked and whole; gives the record that the next one has to follow on, None for the first.

        Raises BlockingIOError if another instance is writing to it or to its renamed predecessor, Unusable, OSError.
        """
        self._folder = folder
        try:
            yield self._open()
        finally:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _open(self) -> Record | None:
        position = self.position(self._folder)
        try:
            self._descriptor = self._open_it()
        except FileNotFoundError:
            self._last = self._begin(position)
        else:
            self._last = self._find_last(position)
        return self._last

    def _open_it(self) -> int:
        try:
            return self._folder.open(self._name, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise Unusable(f"{self.path} is a symbolic link, and not followed: put the file itself there") from error

    def _find_last(self, position: Position | None) -> Record | None:
        """Of the file that is there. It is mended, and the position says from then on that the last record is in it."""
        flock(self._descriptor, self.path)
        here = identity(os.fstat(self._descriptor))
        if self._looked_at != here:
            mend_after_power_cut(self._descriptor, self.path)
        end, self._size = None, -1
        while self._size != (size := os.fstat(self._descriptor).st_size):  # it is that of what was read
            end, self._size = last_whole(self._descriptor, self.path, mend=True), size
        self._first = created_of(os.pread(self._descriptor, LINE_BYTES, 0).partition(b"\n")[0] + b"\n") if end else ""
        if not end or not self._is_known(position, here, end):
            parts = self._mended_parts(here)
            if end:
                self._check_newest(position, end, parts)
                os.fsync(self._descriptor)  # before the position says so: who wrote it may have been killed before that
            else:
                end = self._last_before(position, parts, here)
            self._write_position(end, here, self._first)
            self._folder.sync()
        self._looked_at = here
        return end

    def _is_known(self, position: Position | None, here: tuple[int, int], end: Record) -> bool:
        """Whether the position names the file that is there, and does not go further."""
        return bool(position and position.identity == here and position.created <= end.created)

    def _begin(self, position: Position | None) -> Record | None:
        """Makes the file, which is not there; the last record is that of the position or of a part."""
        parts = self._mended_parts(None)
        last = self._last_before(position, parts, None)
        before = self._named(position, parts) or next((part for part in reversed(parts) if part.ours), None)
        made = self._make(last, before.status, before.access) if before else self._make(last)
        return last if made else self._open()

    def _make(self, last: Record | None, status: os.stat_result | None = None, access: bytes = b"") -> bool:
        """Makes the file. It gets its name last, when it has the rights of the one before and the position names it: a
        kill before leaves none, and one that has the inode of a deleted file is not taken for that. False if another
        file has come to its path meanwhile, which stays."""
        new = f"{self._name}.position.file"
        with contextlib.suppress(FileNotFoundError):  # who was killed has left it; it may be the file itself by now
            self._folder.unlink(new)
        self._descriptor = self._folder.open(new, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        flock(self._descriptor, self.path)
        if status:
            self._set_rights(status, access)
        self._first, self._size, self._last = "", 0, last
        self._looked_at = identity(os.fstat(self._descriptor))
        self._write_position(last, self._looked_at, "")
        try:
            self._folder.rename(new, self._name)
        except FileExistsError:
            self._close()
            return False
        self._folder.sync()
        return True

    def _set_rights(self, status: os.stat_result, access: bytes) -> None:
        """Mode, access control list and owner. Without its list the mode alone could open a file to more people."""
        os.fchmod(self._descriptor, stat.S_IMODE(status.st_mode))
        if access:
            os.setxattr(self._descriptor, ACL, access)
        with contextlib.suppress(PermissionError):  # only root can give a file to another user
            os.fchown(self._descriptor, status.st_uid, status.st_gid)

    def _mended_parts(self, here: tuple[int, int] | None) -> list[Part]:
        """All but the file itself. None of them begins with zeros or half a record any more."""
        parts = [part for part in self._parts() if part.identity != here]
        for part in [part for part in parts if not part.first]:
            self._last_of(part, mend=True)
        return parts

    def _check_newest(self, position: Position | None, end: Record, parts: list[Part]) -> None:
        """Raises Unusable if a part goes further than the file. A compressed one that begins before the file is not
        read: the file follows on it. One that begins where the file does has the rest of what the file is a copy of."""
        for part in [part for part in parts if part.ours and not (part.compressed and part.first < self._first)]:
            if (last := self._last_of(part)) and last.created > end.created:
                raise Unusable(f"{part.path} goes on to {last.created}, {self.path} ends in {end.created}: was one of"
                               " them replaced by a copy? Move the one that is too many out of the folder")  # fmt: skip
        if position and position.created > end.created:
            log.warning("%s ends in %s, and was written up to %s: it was shortened; going on from its end",
                        self.path, end.created, position.created)  # fmt: skip

    def _last_before(self, position: Position | None, parts: list[Part], here: tuple[int, int] | None) -> Record | None:
        """The last record before an empty file. Raises Unusable if what the position says is written is not there."""
        last = position.record if position else None
        if position and (named := self._named(position, parts)):
            end = self._last_of(named, mend=named.status.st_ino == position.identity[1])
            if position.first and (not end or end.created < position.created):
                raise Unusable(f"{named.path} ends in {end.created if end else 'no record'}, and was written up to"
                               f" {position.created}: records were cut off. Put them back; or remove"
                               f" {self.path}.position, and they are written again")  # fmt: skip
            last = later(end, last)  # of the same time the one in the part, which may have been edited
        elif position and position.first and position.identity == here:
            raise Unusable(
                f"{self.path} was emptied, and no file in its folder has what was in it, up to"
                f" {position.created}. Put it back; or remove the file, to go on after that"
            )
        elif position and position.first:
            log.info("%s is a new file, and its last part is not here; going on after %s", self.path, position.created)
        newer = [part for part in parts if part.ours and (not last or part.first > last.created)]
        for part in [part for part in newer if part.first == newer[-1].first]:
            last = later(last, self._last_of(part, mend=True))
        if not last and not position and self._folder.has(f"{self._name}.position"):
            raise Unusable(f"{self.path}.position is broken, and no file here says what was written: mend it, or remove"
                           " it to begin with the first record")  # fmt: skip
        if last and last.path != f"{self.path}.position" and (not position or last.created > position.created):
            known = "is older" if position else "is missing or broken"
            log.warning("%s.position %s; going on after %s, the last record of %s",
                        self.path, known, last.created, last.path)  # fmt: skip
        return last

    def _parts(self) -> list[Part]:
        return find_parts(self._folder, self._name)[0]

    def _named(self, position: Position | None, parts: list[Part]) -> Part | None:
        """The part that the position names: where the inode leads to, or else any, if it begins with that record."""
        if not position:
            return None

        def fits(part: Part) -> bool:
            return part.first == position.first if position.first else (
                not part.first or part.first > position.created or not position.knows_first)  # fmt: skip

        def likely(part: Part) -> tuple[bool, bool, bool]:
            inode = part.identity[1] == position.identity[1]
            return part.identity == position.identity, inode, part.ours

        known = [part for part in parts if fits(part) and (likely(part)[1] or (position.first and part.ours))]
        return max(known, key=likely, default=None)

    def _last_of(self, part: Part, mend: bool = False) -> Record | None:
        """The last record of a part. It is mended if nobody else can be writing to it: this exporter's own."""
        if part.compressed:
            last = b""
            for line in lines_of(self._folder, part):
                last = line
            return Record(created_of(last), last, part.path) if created_of(last) else None
        descriptor = self._folder.open(part.name, os.O_RDWR if mend else os.O_RDONLY)
        try:
            if mend:
                flock(descriptor, part.path)
                mend_after_power_cut(descriptor, part.path)
                os.fsync(descriptor)  # whoever was killed in a write has not, and the next one goes into another file
            return last_whole(descriptor, part.path, mend)
        finally:
            os.close(descriptor)

    def append(self, lines: bytes) -> None:
        """Whole lines to the end and to disk, or nothing: what was written of them is cut off again. Raises OSError."""
        size = self._size
        if os.fstat(self._descriptor).st_size != size:
            raise Unusable(f"{self.path} was changed by another program since it was looked at; looking again")
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._check_place(size, len(lines))
        self._size = size + len(lines)
        self._first = self._first or created_of(lines[: lines.find(b"\n") + 1])
        self._last = last_record(lines)
        with contextlib.suppress(OSError):  # stale is safe: the last record of the file it names is looked at anyway
            here = identity(os.fstat(self._descriptor))
            self._write_position(self._last, here, self._first)

    def _check_place(self, size: int, written: int) -> None:
        """What was written must be in a file that has a name, and behind what was there; only then the position may say
        that it is: copying the file and deleting or truncating it (mv to another file system, copytruncate) takes no
        lock, and the copy may lack these records."""
        status = os.fstat(self._descriptor)
        if not status.st_nlink:
            raise Unusable(f"{self.path} was deleted while it was written to; its last records go into a new one")
        if status.st_size != size + written:
            os.ftruncate(self._descriptor, max(0, min(size, status.st_size - written)))
            raise Unusable(f"{self.path} was changed by another program while it was written to")

    # -- rotation

    def room_for(self, lines: bytes) -> int:
        """How many bytes of these lines may be appended now: whole lines, at least one. Rotates first if none fits."""
        if not self._rotate_bytes:
            return len(lines)
        room = self._rotate_bytes - self._size
        first = lines.find(b"\n") + 1
        if self._first and room < first:
            self.rotate()
            room = self._rotate_bytes
        return max(first, lines.rfind(b"\n", 0, max(room, 0)) + 1) if room < len(lines) else len(lines)

    def rotate(self) -> None:
        """Renames the file to its first `created`, so that parts sort, and begins a new one."""
        os.fsync(self._descriptor)  # a killed writer may have left what is in no later write's flush any more
        part = f"{self._name}.{self._first.replace('-', '').replace(':', '')}"
        if self._folder.has(part):
            raise Unusable(f"{os.path.join(self._folder.path, part)} is there already; move it out of the folder")
        with contextlib.suppress(FileNotFoundError):  # another one was quicker to rename it
            if os.path.samestat(self._folder.stat(self._name), os.fstat(self._descriptor)):
                self._folder.replace(self._name, part)
                self.rotations += 1
        last, status, access = self._last, os.fstat(self._descriptor), access_list(self._descriptor)
        self._close()
        if not self._make(last, status, access) and not is_same(self._open(), last):
            raise Unusable(f"another file has come to {self.path} while it was rotated; looking at it")
        self._delete_old()

    def _delete_old(self) -> None:
        """KEEP_FILES of the parts that rotation made stay, compressed or not; those of other names are not touched."""
        parts = made_by_rotation(self._folder, self._name)
        for part in sorted(parts)[: -self._keep_files] if self._keep_files else []:
            for name in parts[part]:
                self._folder.unlink(name)

    # -- the position

    def position(self, folder: Folder) -> Position | None:
        """None if it is missing or cannot be read: then the files themselves say where they end."""
        try:
            with open(f"{self._name}.position", encoding="utf-8", opener=folder.open) as file:
                text = json.load(file)  # another OSError than that it is not there does not mean that it is not there
            datetime.fromisoformat(text["created"])
            known = text.get("record")  # older exporters know its time only
            if not isinstance(known, dict) or known.get("created") != text["created"]:
                known = {"created": text["created"]}
            line = json.dumps(known).encode() + b"\n"
            record = Record(text["created"], line, f"{self.path}.position") if text["created"] > BEFORE_ALL else None
            named = int(text["device"]), int(text["inode"])
            return Position(record, named, str(text.get("first", "")), "first" in text)
        except (FileNotFoundError, ValueError, OverflowError, TypeError, KeyError, AttributeError):
            return None

    def _write_position(self, record: Record | None, named: tuple[int, int], first: str) -> None:
        """Older exporters read `created`, `device` and `inode` of it. Its content is flushed before it takes the old
        one's place: a power cut leaves one of the two."""
        created = record.created if record else BEFORE_ALL
        text = {"created": created, "device": named[0], "inode": named[1], "first": first}
        new = f"{self._name}.position.new"
        with open(new, "w", encoding="utf-8", opener=self._folder.open) as file:
            json.dump(text | {"record": json.loads(record.line) if record else None}, file)
            file.flush()
            os.fsync(file.fileno())
        self._folder.replace(new, f"{self._name}.position")


def later(one: Record | None, other: Record | None) -> Record | None:
    return max((record for record in (one, other) if record), key=lambda record: record.created, default=None)


# ---- The lock -------------------------------------------------------------------------------------------------------


class Turn:
    """The right to write, marked by a lock file: made with O_EXCL at the start of writing, removed at its end.

    Why there are never two writers:
      * Who owns the lock file is whoever holds the flock of the very file that is at the path (same device and inode),
        whoever made it. Making and locking are two steps; a process stopped between them finds, when it goes on, the
        flock taken, or its file no longer at the path, and has no turn.
      * Only the owner removes the file, as its last act. Who then gets the flock of the removed file finds it gone
        from the path.
      * The kernel drops the flocks of a process that dies, however it dies, so a leftover file is free at once, with
        no age, pid or clock to go by. A stopped owner keeps it: nobody writes beside it.
      * The lock file may be removed by hand while it is held; then a second one can be made and owned. So a turn also
        needs the flock of the folder itself, which has no name in it that could be removed or renamed. It is held from
        before the shared file is opened until after it is closed: there the two owners meet, whatever happens to names.
    tests/test_lock_model.py goes through all orders of these system calls, with kills, removals and renames, and
    finds two writers only where the folder's flock is left out.
    """

    def __init__(self, directory: str, file_name: str) -> None:
        self.path = os.path.join(directory, f"{file_name}.lock")
        self.blocked_by = ""  # what another process has, if there was no turn
        self._directory = directory
        self._name = f"{file_name}.lock"

    @contextlib.contextmanager
    def taken(self) -> Iterator[Folder | None]:
        """The folder, if the turn is ours; else None. Does not wait. Raises Unusable or OSError."""
        with contextlib.closing(Folder(self._directory)) as folder:
            lock = self._open(folder)
            try:
                owned = self._owns(folder, lock)
                try:
                    yield folder if owned and self._has(folder) else None
                finally:
                    if owned and self._owns(folder, lock):  # else somebody removed it, and another one's may be there
                        with contextlib.suppress(FileNotFoundError):  # or removes it at this very moment
                            folder.unlink(self._name)
            finally:
                os.close(lock)

    def _open(self, folder: Folder) -> int:
        while True:
            try:
                return folder.open(self._name, os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                try:
                    return folder.open(self._name, os.O_RDONLY)
                except FileNotFoundError:
                    continue  # its owner has removed it meanwhile
                except OSError as error:
                    raise Unusable(f"{self.path} is no lock file of ours ({error.strerror}); remove it") from error

    def _owns(self, folder: Folder, lock: int) -> bool:
        try:
            flock(lock, self.path)
            return os.path.samestat(os.fstat(lock), folder.stat(self._name))
        except (BlockingIOError, FileNotFoundError):
            self.blocked_by = f"another process has {self.path}"
            return False

    def _has(self, folder: Folder) -> bool:
        try:
            fcntl.flock(folder.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            self.blocked_by = (
                f"another process has the folder {self._directory}, where {self._name} may have been removed under it,"
                " or for another file"
            )
            return False


# ---- Fetching -------------------------------------------------------------------------------------------------------


class Refused(http.client.HTTPException):
    """The backend answered, but not with what was asked for."""

    status = 0
    retry_after_seconds = 0.0  # its own wish, if it had one
    kept_from = ""  # of a 410: what was stored before is deleted


class Missing(Exception):
    """The database does not have the record that the next one would follow on. The message says what it has."""

    def __init__(self, record: Record, found: str, kept_from: str = "") -> None:
        super().__init__(f"the database has {found}")
        self.record = record
        self.kept_from = kept_from  # what was stored before is deleted; "" if that is not why


class Interrupted(Exception):
    """A signal came while the backend was asked or read from."""


UNREACHABLE = (OSError, http.client.HTTPException, ValueError)  # raised by a Source if the backend cannot be had now


class Source:
    """The backend. What it has said of the database, besides the records, stays here."""

    def __init__(self, settings: Settings, seconds: float = HTTP_SECONDS) -> None:
        """An answer that pauses for that long has failed."""
        self.newest = ""  # `created` of the database's newest record; "" if the backend does not say it
        self.answered_at = time.monotonic()  # the last time; until then, when this began
        self.kept_from = ""  # records before it were deleted; "" if none were
        self._address = urlsplit(settings.url)
        self._token = settings.api_token
        self._seconds = seconds

    def follow(self, last: Record | None, date_from: str = EPOCH, date_to: str = "") -> Iterator[bytes]:
        """The records after `last`, or all from `date_from` on (from `kept_from`, if that is later), for ever, in whole
        lines; b"" when there are none now.

        Each request asks from the last record on, including it, and takes what follows only if that one comes first,
        so it does not matter what becomes of the database between two requests, nor where a reply breaks off: a line
        without its line feed is not used. Raises Missing, or UNREACHABLE.
        """
        border = ""  # where to go on if `last` was the last one that was deleted for its age: nothing is missed then
        with contextlib.closing(self._connect()) as connection:
            while True:
                known, awaited = last, None if border else last
                start = border or (last.created if last else date_from)
                window = f"date_from={start}" + (f"&date_to={date_to}" if date_to else "")
                try:
                    with self._get(connection, window, last) as response:
                        for lines in whole_lines(response):
                            if awaited:
                                lines, awaited = behind(awaited, lines), None
                            if lines:
                                check(lines, last.created if last else "")
                                last, border = last_record(lines), ""
                                yield lines
                    if awaited:
                        raise Missing(awaited, "nothing from then on")
                except http.client.IncompleteRead:
                    connection.close()
                    if last is known:
                        raise
                except Missing as missing:
                    if border or not missing.kept_from or missing.kept_from != just_after(missing.record.created):
                        raise
                    border = missing.kept_from
                    continue
                except Refused as error:
                    if last or not error.kept_from:
                        raise
                    date_from = self.kept_from = error.kept_from
                    continue
                if last is known:
                    yield b""

    def post(self, items: Sequence[Mapping[str, str]]) -> None:
        """Stores lines under their own ids. Raises UNREACHABLE unless each is stored, or was there already."""
        body = json.dumps(items).encode()
        with contextlib.closing(self._connect()) as connection:
            connection.request("POST", self._address.path or "/", body, self._headers({"Content-Type": JSON}))
            with connection.getresponse() as response:
                answer = refused(response) if response.status not in (200, 201) else json.load(response)
        if isinstance(answer, Refused):
            raise answer
        try:
            complete = not answer["rejected"] and answer["accepted"] + answer["duplicates"] == len(items)
        except (TypeError, KeyError):  # a proxy's page, say
            complete = False
        if not complete:
            raise ValueError(f"the backend did not take all records: {json.dumps(answer)[:500]}")

    def ask_for_one(self) -> None:
        """Whether it answers with records. Raises UNREACHABLE."""
        with (
            contextlib.closing(self._connect()) as connection,
            self._get(connection, f"date_from={EPOCH}&limit=1", None) as response,
        ):
            response.read()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        return kind(self._address.netloc, timeout=self._seconds)

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        return headers | ({"Authorization": f"Bearer {self._token}"} if self._token else {})

    def _get(
        self, connection: http.client.HTTPConnection, window: str, last: Record | None
    ) -> http.client.HTTPResponse:
        connection.request("GET", f"{self._address.path or '/'}?{window}", headers=self._headers({"Accept": NDJSON}))
        response = connection.getresponse()
        if response.status == 200 and response.headers.get_content_type() == NDJSON:
            newest = response.headers.get("Newest", "")
            self.answered_at = time.monotonic()
            self.newest = newest if re.fullmatch(CREATED, newest) else ""
            self.kept_from = response.headers.get("Kept-From", self.kept_from)
            return response
        error = refused(response)
        if last and error.kept_from:
            raise Missing(last, f"deleted what was stored before {error.kept_from}", error.kept_from)
        raise error


def refused(response: http.client.HTTPResponse) -> Refused:
    """What the backend said instead, as an exception."""
    text = response.read(4096).decode(errors="replace")
    error = Refused(f"answer {response.status} ({response.headers.get_content_type()}): {' '.join(text.split())[:500]}")
    error.status = response.status
    if re.fullmatch("[0-9]{1,4}", wish := response.headers.get("Retry-After", "")):
        error.retry_after_seconds = float(wish)
    if response.status == 410 and (found := re.search(r'"kept_from" *: *"([^"]+)"', text)):
        error.kept_from = found[1]
    return error


def behind(known: Record, lines: bytes) -> bytes:
    """What follows on a record that has to come first. Raises Missing; ValueError for what was not asked for."""
    first, line_feed, rest = lines.partition(b"\n")
    first += line_feed
    if not created_of(first) or created_of(first) < known.created:
        raise ValueError("the answer is not a list of the records that were asked for")
    if created_of(first) != known.created or not matches(known.line, first):
        raise Missing(known, f"{name_of(first)} in its place")
    return rest


def check(lines: bytes, after: str) -> None:
    """Raises ValueError unless these are records, each later than the one before and than `after`."""
    created = RECORD.findall(lines)
    if not len(created) == lines.count(RECORD_START) == lines.count(b"\n"):
        raise ValueError("the answer is not a list of records")
    if created[0].decode() <= after or not all(map(lt, created, created[1:])):
        raise ValueError("the records are not in the order of `created`")
    json.loads(last_record(lines).line)  # the one that is compared with others: a ValueError as well


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
        if len(rest) > LINE_BYTES:
            raise ValueError("the answer is not a list of records")
        if end:
            yield data[:end]
    if broken or rest or response.length:  # where less has come than its Content-Length, `read` does not tell
        raise http.client.IncompleteRead(rest)


# ---- The exporter ---------------------------------------------------------------------------------------------------


class TooLate(Exception):
    """Records were deleted before the file had them. The message says which, and what to do."""


class Exporter:
    """Fetches when it may, writes when it can. Nothing is fetched while it owns the turn.

    What waits in memory is a chain: a record, `_before`, and portions that follow on it without a gap. In a turn it
    either contains the last record of the file, and what is behind that is appended, or all of it is dropped and
    fetched again from there. Whatever became of the file or the database meanwhile, nothing else is ever appended.
    """

    def __init__(self, settings: Settings) -> None:
        self.ending = self.fetching = False  # a fetch may be interrupted: what was read can be read again
        self.too_late = False
        self.counts = {name: 0 for name in METRICS if name.endswith("_total")}
        self.written_at: float | None = None  # the last time, in seconds since the epoch
        self._settings = settings
        self._turn = Turn(settings.directory, settings.file_name)
        self._file = SharedFile(settings.directory, settings.file_name, settings.rotate_bytes, settings.keep_files)
        self._source = Source(settings)
        self._poll_seconds = self._backoff_seconds = settings.request_delay / 1000
        self._fetch_at = 0.0  # not before this time, on the monotonic clock
        self._no_turn_since = 0.0  # on the monotonic clock; 0: it was had
        self._backend, self._database = Outage("backend"), Outage("database", "diverged")
        self._no_turn, self._shared_file = (
            Outage("turn to write", "blocked"),
            Outage("shared file", "cannot be written"),
        )
        self._waiting: deque[bytes] = deque()  # portions
        self._in_file = self._hint()  # the last one that is known to be in the file
        self._looked = False  # whether it is known
        self._folder: tuple[int, int] | None = None  # the one of the last turn: device and inode
        self._begin_after(self._in_file)

    @property
    def written(self) -> int:
        return self.counts["records_written_total"]

    def _hint(self) -> Record | None:
        """Where to begin if the turn cannot be had."""
        try:
            with contextlib.closing(Folder(self._settings.directory)) as folder:
                position = self._file.position(folder)
        except OSError:  # a turn says so
            return None
        return position.record if position else None

    def _begin_after(self, record: Record | None) -> None:
        """Drops what waits, and fetches from there."""
        self._waiting.clear()
        self._before = self._last = record  # of the chain: what it follows on, and its end
        self._records = self._source.follow(record)

    @property
    def waiting_records(self) -> int:
        return sum(lines.count(b"\n") for lines in self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """May be asked by any thread."""
        return sum(map(len, tuple(self._waiting)))

    @property
    def lag_seconds(self) -> float | None:
        """How far the file is behind the database's newest record; None while that is not known."""
        newest, last = self._source.newest, self._in_file
        if not last and (waiting := tuple(self._waiting)):  # the file has nothing yet, and lacks all that waits
            last = Record(created_of(waiting[0][: waiting[0].find(b"\n") + 1]), b"")
        if not newest or not last:
            return None
        return max(0.0, (datetime.fromisoformat(newest) - datetime.fromisoformat(last.created)).total_seconds())

    @property
    def lag_at_most_seconds(self) -> float:
        """The same, if records came in ever since the backend last answered."""
        return (self.lag_seconds or 0.0) + time.monotonic() - self._source.answered_at

    @property
    def diverged(self) -> bool:
        """The database lacks the file's last record, so nothing is appended."""
        return self.too_late or bool(self._database)

    @property
    def in_order(self) -> bool:
        """Backend, database, turn and shared file are."""
        return not any((self._backend, self._database, self._no_turn, self._shared_file))

    def step(self) -> float:
        """One fetch, if it is due, and one attempt to write what waits; the seconds to wait before the next step."""
        if time.monotonic() >= self._fetch_at:
            pause = BUSY_SECONDS if self.waiting_bytes >= MEMORY_BYTES else self._fetch()
            self._fetch_at = time.monotonic() + pause
        if self._waiting:
            self.write()
        elif self._looked:
            self._no_turn_since = 0.0  # nobody asks for one
        pause = max(0.0, self._fetch_at - time.monotonic())
        return min(pause, BUSY_SECONDS) if self._waiting else pause

    def _fetch(self) -> float:
        """Gets what there is, a portion at most; the seconds to wait before the next."""
        try:
            lines = self._next_lines()
        except Missing as missing:
            return self._without_predecessor(missing)
        except UNREACHABLE as error:
            self._backend.begin(f"{type(error).__name__}: {error}", kind_of(error))
            self._records = self._source.follow(self._last)
            wish = error.retry_after_seconds if isinstance(error, Refused) else 0.0
            return wish * random.uniform(1.0, 1.5) if wish else self._back_off()  # as the client does
        self._backend.end()
        self._database.end()
        self._backoff_seconds = self._poll_seconds
        if not lines:
            return self._poll_seconds
        if self._source.kept_from and not self._last:
            log.warning("the database has deleted what was stored before %s: beginning there", self._source.kept_from)
        self._waiting.append(lines)
        self._last = last_record(lines)
        return 0.0

    def _back_off(self) -> float:
        self._backoff_seconds = min(MAX_DELAY_SECONDS, 2 * self._backoff_seconds)
        return random.uniform(0.5, 1.0) * self._backoff_seconds

    def _next_lines(self) -> bytes:
        self.fetching = True
        try:
            if self.ending:
                raise Interrupted
            return next(self._records)
        finally:
            self.fetching = False

    def _without_predecessor(self, missing: Missing) -> float:
        """The database does not know what we asked from. If that is truly the last record of the file, nobody can tell
        what is to follow it; else it was only our memory that is out of date, or the file was changed meanwhile.

        What waits is dropped, as the database may have lost it too. Where it was deleted for its age it is kept: it
        follows on the file all the same, and is nowhere else any more. Raises TooLate.
        """
        self._backend.end()
        if missing.kept_from:
            self._records = self._source.follow(self._last)
        else:
            self._begin_after(missing.record)
        self._looked = False
        self.write()
        if self._looked and is_same(self._in_file, missing.record) and self._in_file:
            if missing.kept_from:
                self.too_late = True
                raise TooLate(too_late(self._in_file, missing, self._settings))
            reason = without_predecessor(self._in_file, missing, self._settings)
            self._database.begin(reason, remind_seconds=REMIND_SECONDS)
            return self._back_off()
        return 0.0 if self._looked and not self._waiting else self._poll_seconds

    def write(self) -> None:
        """Writes what waits, if the turn can be had and it is not in the file already; learns what is in the file."""
        try:
            with self._turn.taken() as folder:
                if folder:
                    self._note_folder(identity(os.fstat(folder.descriptor)))
                    with self._file.opened(folder) as last:
                        self._append_after(last)
            self._note_turn(bool(folder))
            if folder:
                self._shared_file.end()
        except BlockingIOError:
            self.counts["turns_lost_total"] += 1
            self._shared_file.begin(f"{self._turn.path} was removed while another instance is writing")
        except Unusable as error:
            self._shared_file.begin(error, remind_seconds=REMIND_SECONDS)
        except OSError as error:
            self._shared_file.begin(error, str(error.errno))

    def _append_after(self, last: Record | None) -> None:
        if self._in_file and not last:
            log.warning("%s: neither file nor part nor position is there any more; beginning anew", self._file.path)
        self._in_file, self._looked = last, True
        if not self._drop_until(last):
            self._begin_after(last)
        while self._waiting:
            lines = self._waiting[0]
            room = self._file.room_for(lines)
            self._file.append(lines[:room])
            self._in_file = self._before = last_record(lines[:room])._replace(path=self._file.path)
            self.counts["records_written_total"] += lines.count(b"\n", 0, room)
            self.counts["bytes_written_total"] += room
            self.counts["rotations_total"] = self._file.rotations
            self.written_at = time.time()
            self._waiting.popleft()
            if room < len(lines):
                self._waiting.appendleft(lines[room:])
                if self.ending:
                    return  # many small parts would take their time, and others can write the rest

    def _drop_until(self, last: Record | None) -> bool:
        """Drops from memory what is in the file already; False if memory does not contain the file's last record."""
        if is_same(last, self._before):
            return True
        while self._waiting and last:
            lines = self._waiting.popleft()
            if last.created <= last_record(lines).created:
                end = end_within(lines, last)
                self._before = last
                if 0 <= end < len(lines):
                    self._waiting.appendleft(lines[end:])
                return end >= 0
        return False

    def _note_folder(self, now: tuple[int, int]) -> None:
        """Another one at its path, as where a volume is away: what it has is followed on, and nothing of the other."""
        if self._folder not in (None, now):
            log.warning("DIRECTORY %s is another folder than before; going on in it", self._settings.directory)
        self._folder = now

    def _note_turn(self, had: bool) -> None:
        now = time.monotonic()
        self._no_turn_since = 0.0 if had else self._no_turn_since or now
        self.counts["turns_lost_total"] += not had
        if had:
            self._no_turn.end()
        elif now - self._no_turn_since >= TURN_SECONDS:
            reason = f"for {TURN_SECONDS:.0f} s {self._turn.blocked_by}"
            self._no_turn.begin(reason, remind_seconds=REMIND_SECONDS)


def kind_of(error: Exception) -> str:
    """Errors of one kind may have numbers of their own in their texts."""
    return f"{type(error).__name__} {getattr(error, 'errno', '')} {getattr(error, 'status', '')}"


ANEW = "stop the exporters and move {}, its parts and companions away together"


def without_predecessor(last: Record, missing: Missing, settings: Settings) -> str:
    """One line for a person: what was found, in which file, and the ways out."""
    return (
        f"{last.path} ends in {name_of(last.line)}, and {missing} ({settings.url}): nothing is appended. If the"
        " database was restored or has failed over, run background.py reconcile; if it is another one, correct URL or"
        " DIRECTORY; if the file was edited, put its last record back. To begin anew,"
        f" {ANEW.format(settings.file_name)}"
    )


def too_late(last: Record, missing: Missing, settings: Settings) -> str:
    """One line for a person: from when to when records were missed, and how to go on with what is left."""
    return (
        f"{last.path} ends in {name_of(last.line)}, and {missing} ({settings.url}): the records in between are missing"
        " here for ever. Nothing is appended, and this exporter ends. To go on with what is left,"
        f" {ANEW.format(settings.file_name)}"
    )


# ---- Verifying ------------------------------------------------------------------------------------------------------


class Difference(Exception):
    """The first place where the shared file and the database differ."""


def verify(settings: Settings, date_from: str = EPOCH, date_to: str = "") -> int:
    """Compares the shared file with the database in a window, record by record; the exit status."""
    count, source = 0, Source(settings)
    try:
        with contextlib.closing(Folder(settings.directory)) as folder:
            parts, passed_over = find_parts(folder, settings.file_name)
            for name in passed_over:
                print(f"passed over, as it is no part of {settings.file_name}: {name}")
            deleted = 0 < settings.keep_files <= len(made_by_rotation(folder, settings.file_name))  # else it kept all
            if deleted and date_from < parts[0].first:
                date_from = parts[0].first
                print(f"compared from {date_from} on: older parts are deleted, as KEEP_FILES is {settings.keep_files}")
            in_database = stored_lines(source, date_from, date_to)
            in_file = shared_lines(folder, parts, lambda: max(date_from, source.kept_from), date_to)
            while any(pair := (next(in_database), next(in_file, b""))):
                stored, shared = pair
                if shared and not stored:
                    stored = next(in_database)  # what an exporter has written since the database was asked is in it now
                if not stored or not shared or not matches(shared, stored):
                    raise Difference(f"after {count} equal records {describe(stored, shared)}")
                count += 1
        verdict, status = f"equal: {count} records", 0
    except Difference as difference:
        verdict, status = f"not equal: {difference}", 1
    except (*UNREACHABLE, Missing) as error:
        verdict, status = f"cannot compare: {error}", 1
    if source.kept_from:
        print(f"compared from {source.kept_from} on: the database has deleted what was before")
    print(verdict)
    return status


def describe(stored: bytes, shared: bytes) -> str:
    in_database, in_file = (created_of(line) or "the end" for line in (stored, shared))  # which sorts after any time
    if in_database < in_file:
        still = "" if shared else " (its end: where exporters run, they may not have written it yet)"
        return f"the file lacks {shown(stored)}{still}"
    if in_file < in_database:
        return f"the database lacks {shown(shared)}"
    return f"a record differs: file {shown(shared)} database {shown(stored)}"


def stored_lines(source: Source, date_from: str, date_to: str) -> Iterator[bytes]:
    """For ever; b"" when there are none now."""
    for lines in source.follow(None, date_from, date_to):
        yield from lines.splitlines(keepends=True) or (b"",)


def shared_lines(folder: Folder, parts: list[Part], date_from: Callable[[], str], date_to: str) -> Iterator[bytes]:
    """The lines of the shared file and its renamed parts, in order. Raises Difference for one that cannot be there.

    Half a record at the very end is none: an exporter is writing it, or was killed, and the next one cuts it off.
    """
    last, last_path = "", ""
    for part in parts:
        for number, line in enumerate(lines_of(folder, part), 1):
            created = created_of(line)
            if part is parts[-1] and not line.endswith(b"\n") and RECORD_START.startswith(line[: len(RECORD_START)]):
                return
            if created <= last:
                before = "" if last_path == part.path else f" in {last_path}"
                raise Difference(
                    f"line {number} of {part.path} is no record later than the one before{before}: {shown(line[:200])}"
                )
            last, last_path = created, part.path
            if date_from() <= created and (created < date_to or not date_to):
                yield line


# ---- Reconciling ----------------------------------------------------------------------------------------------------


class Impossible(Exception):
    """Nothing was changed, or not all. The message says why, and what to do."""


@dataclass(frozen=True)
class Common:
    """Up to where the files and the database agree."""

    record: Record
    part: Part  # that has it
    end: int  # of the record, in that part
    behind: list[Part]  # newer ones, which are not common at all


class ReconciledFile(SharedFile):
    """The shared file and its parts, of which the end may be cut off."""

    def mended_parts(self, folder: Folder) -> list[Part]:
        """All parts in order; the last one ends in a whole record. Raises Unusable unless each begins after the end of
        the one before, and the file itself is the last: a copy that lies in the folder must not be cut in its place."""
        self._folder = folder
        for part in [part for part in self._parts()[-1:] if part.ours]:
            self._last_of(part, mend=True)
        parts = self._parts()
        for part, following in pairwise(parts):
            end = None if part.compressed else self._last_of(part)
            if part.name == self._name or following.first <= (end.created if end else part.first):
                raise Unusable(f"{part.path} and {following.path} do not follow on each other: is one of them a copy?"
                               " Move it out of the folder")  # fmt: skip
        return parts

    def was_cut(self, last: Record) -> bool:
        """Whether the position is ahead of the last record that is left, as a reconcile was killed in its cut. Raises
        Unusable if it is ahead for another reason."""
        position = self.position(self._folder)
        if not position or position.created <= last.created:
            return False
        if position.record and any(matches(position.record.line, line) for line in self._cut_lines()):
            return True
        raise Unusable(f"{self.path} was written up to {position.created}, and no file in its folder has what is"
                       f" behind {last.created}: bring that part back, and run this again")  # fmt: skip

    def _cut_lines(self) -> set[bytes]:
        try:
            with open(f"{self._name}.cut", "rb", opener=self._folder.open) as file:
                return {line for line in file if line.endswith(b"\n")}
        except FileNotFoundError:
            return set()

    def keep(self, lines: Iterator[bytes]) -> None:
        """Adds lines to FILE_NAME.cut, each once, to disk. What a kill has torn there is cut off, and added whole."""
        known = self._cut_lines()
        with open(f"{self._name}.cut", "a+b", opener=self._folder.open) as file:
            content_end = file.seek(0, os.SEEK_END)
            torn = len(read_tail(file.fileno(), file.name).rpartition(b"\n")[2]) if content_end else 0
            file.seek(content_end - torn)
            file.truncate()
            file.writelines(line for line in lines if line not in known)
            file.flush()
            os.fsync(file.fileno())
        self._folder.sync()

    def cut_behind(self, common: Common) -> None:
        """Cuts all behind that record: the newest part first, the position last."""
        for part, end in (*((part, 0) for part in reversed(common.behind)), (common.part, common.end)):
            descriptor = self._folder.open(part.name, os.O_RDWR)
            try:
                flock(descriptor, part.path)
                os.ftruncate(descriptor, end)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not end and part.name != self._name:
                self._folder.unlink(part.name)
        self._write_position(common.record, common.part.identity, common.part.first)
        self._folder.sync()


def reconcile(settings: Settings, dry_run: bool, agreed: bool) -> int:
    """Gives back to the database what it lost and the file still has; the exit status.

    It is the one place where HTTP is spoken under the lock: nobody may append meanwhile. Killed anywhere and run again,
    it ends in the same state: (a) records are in FILE_NAME.cut, on disk, before (b) they are sent, under their own ids,
    which the database stores once; (c) nothing is cut before all are stored. The cut goes from the newest part to the
    oldest, so what is left is always a prefix of what was there; exporters that find it half done stop, as .position is
    ahead until the end, or go on from where the files end, which is then in the database.
    """
    turn, file = Turn(settings.directory, settings.file_name), ReconciledFile(settings.directory, settings.file_name)
    deadline = time.monotonic() + TURN_SECONDS
    try:
        check_file_system(settings.directory)  # exporters where it is local would not see the lock
    except OSError as error:
        print(f"cannot reconcile: DIRECTORY {settings.directory} cannot be used: {error}")
        return 1
    try:
        while True:
            with turn.taken() as folder:
                if folder:
                    return reconcile_in(folder, settings, file, None if dry_run else agreed)
            if time.monotonic() > deadline:
                raise Impossible(f"no turn for {TURN_SECONDS:.0f} s: {turn.blocked_by}")
            time.sleep(BUSY_SECONDS)
    except Impossible as reason:
        print(f"cannot reconcile: {reason}")
    except (*UNREACHABLE, Missing) as error:
        kind = "" if isinstance(error, Unusable) else f"{type(error).__name__}: "
        print(f"cannot reconcile, nothing was cut: {kind}{error}")
    return 1


def reconcile_in(folder: Folder, settings: Settings, file: ReconciledFile, agreed: bool | None) -> int:
    """In the turn: finds what is to be done, says it, asks unless `agreed`, and does it. None: only says it."""
    source = Source(settings)
    parts = file.mended_parts(folder)
    common = find_common(folder, parts, source)
    count = sum(1 for line in lines_behind(folder, common) if as_sent(line))  # what cannot be sent ends it here
    last = last_record(b"".join(deque(lines_behind(folder, common), 1)) or common.record.line)
    if not file.was_cut(last) and not count:
        print(f"nothing to do: {common.part.path} ends in {name_of(common.record.line)}, which the database has, as it"
              " has those right before it; background.py verify looks at all of them")  # fmt: skip
        return 0
    names = ", ".join(part.path for part in (*reversed(common.behind), common.part))
    print(f"{name_of(common.record.line)} in {common.part.path} is the last one that file and database have in common.")
    print(f"{count} records behind it are to be kept in {file.path}.cut, sent to {settings.url} under their own"
          f" ids, and cut from {names}.")  # fmt: skip
    print("Exporters then append them again, with a new `created`: who follows the file sees them a second time.")
    if agreed is None:
        return 0
    if not agreed:
        print("Go on? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was changed")
            return 1
    file.keep(lines_behind(folder, common))
    give_back(source, lines_behind(folder, common))
    try:
        file.cut_behind(common)
    except OSError as error:
        raise Impossible(f"all records are in the database, and not all were cut ({error}); run this again") from error
    print(f"done: {count} records are in the database, and in {file.path}.cut")
    return 0


def find_common(folder: Folder, parts: list[Part], source: Source) -> Common:
    """The longest common prefix of files and database, searched from the end backwards. Raises Impossible."""
    for number in reversed(range(len(parts))):
        part = parts[number]
        if part.compressed:
            raise Impossible(f"{part.path} is compressed, and may have to be cut: decompress it, and run this again")
        for start, lines in blocks_backwards(folder, part):
            created = list(map(created_of, lines))
            if not created[0] or not all(map(lt, created, created[1:])):
                raise Impossible(f"not all lines of {part.path} are records in order; run background.py verify, and"
                                 " mend it")  # fmt: skip
            if count := count_equal(lines, source):
                end = start + sum(map(len, lines[:count]))
                record = Record(created[count - 1], lines[count - 1], part.path)
                return Common(record, part, end, parts[number + 1 :])
            if created[0] < source.kept_from:
                raise Impossible(f"the database has deleted what was stored before {source.kept_from}, and has nothing"
                                 f" of what {part.path} holds from then on: no record in common is left")  # fmt: skip
    raise Impossible("file and database have no record in common: it is another database, or another file")


def count_equal(lines: Sequence[bytes], source: Source) -> int:
    """How many of these lines, from the first one on, are in the database too, and nothing between them. Those that it
    has deleted for their age count if the first one after them is there."""
    stored = stored_lines(source, created_of(lines[0]), just_after(created_of(lines[-1])))
    other = next(stored, b"")  # from now on source.kept_from is known
    count = deleted = sum(created_of(line) < source.kept_from for line in lines)
    while count < len(lines) and matches(lines[count], other):
        count, other = count + 1, next(stored, b"")
    return count if count > deleted else 0


def blocks_backwards(folder: Folder, part: Part) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a part, the last ones first, in blocks: where each begins, and its lines in their order."""
    descriptor = folder.open(part.name, os.O_RDONLY)
    try:
        end = os.fstat(descriptor).st_size
        while end:
            start = max(0, end - LINE_BYTES * 16)
            data = os.pread(descriptor, end - start, start)
            skipped = (data.find(b"\n") + 1) % len(data) if start else 0  # 0 as well for what has no whole line
            yield start + skipped, data[skipped:].splitlines(keepends=True)
            end = start + skipped
    finally:
        os.close(descriptor)


def lines_behind(folder: Folder, common: Common) -> Iterator[bytes]:
    for part in (common.part, *common.behind):
        with open(part.name, "rb", opener=folder.open) as file:
            file.seek(common.end if part is common.part else 0)
            yield from file


def give_back(source: Source, lines: Iterator[bytes]) -> None:
    while batch := list(islice(lines, GIVE_BACK_LINES)):
        source.post([as_sent(line) for line in batch])


def as_sent(line: bytes) -> dict[str, str]:
    """A record as the line that it was made from, with its id. Raises Impossible."""
    try:
        record = json.loads(line)
        fields = record["log"]
        log = f"{fields['ip']} {fields['method']} {fields['uri']} {fields['status_code']}"
        return {"id": str(record["id"]), "log": log}
    except (ValueError, TypeError, KeyError) as error:
        raise Impossible(f"nothing was changed, as this line cannot be sent: {shown(line)}") from error


# ---- Metrics --------------------------------------------------------------------------------------------------------

METRICS_PREFIX = "logpipeline_exporter_"
METRICS = {  # what ends in _total is a counter
    "up": "1 while the exporter runs, 0 after its orderly end; how old this file is tells of any other end.",
    "records_written_total": "Records that this exporter has appended to the shared file.",
    "bytes_written_total": "Bytes that this exporter has appended to the shared file.",
    "lag_seconds": "How far the shared file may be behind: how much later the database's newest record was stored than"
    " the file's last one when the backend last answered, and the time since then.",
    "waiting_bytes": "Bytes of records that wait in memory for a turn to write.",
    "turns_lost_total": "Attempts to write while another process had the turn.",
    "diverged": "1 while nothing is appended because the database lacks the shared file's last record.",
    "last_write_timestamp_seconds": "When this exporter last appended records, in Unix time.",
    "rotations_total": "Times that this exporter has renamed the shared file to a part, as ROTATE_BYTES says.",
}


class MetricsFile:
    """METRICS_FILE, in the text format of Prometheus: what `read` gives, at once, then every 2 s, and at the end.

    It is replaced as a whole. A thread of its own writes it, so that a disk that hangs holds up nothing else. Who wrote
    it keeps its lock: of two processes with one METRICS_FILE the second leaves it alone and says so, as it does with
    what is no such file.
    """

    def __init__(self, path: str, read: Callable[[], Mapping[str, float | None]]) -> None:
        """With an empty path there is none."""
        self._path = path and os.path.realpath(path)
        self._read = read
        self._outage = Outage(f"METRICS_FILE {path}", "cannot be written")
        self._file = -1  # what we wrote last, locked
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        if self._path:
            self._thread.start()

    def end(self) -> None:
        """Writes the last state, if the disk lets it."""
        self._end.set()
        if self._path:
            self._thread.join(METRICS_END_SECONDS)

    def _run(self) -> None:
        while not self._end.is_set():
            self._write(up=1)
            self._end.wait(METRICS_SECONDS)
        self._write(up=0)

    def _write(self, up: int) -> None:
        name = os.path.basename(self._path).removesuffix(".prom")
        try:
            self._replace(exposition({"up": up, **self._read()}, name))
            self._outage.end()
        except OSError as error:
            self._outage.begin(error)

    def _replace(self, text: str) -> None:
        """Raises OSError. The new file is locked before the old one is looked at: of two processes that do so at once,
        one finds the other's lock on either of them, as what is new to the one is old, or new as well, to the other."""
        new = os.open(f"{self._path}.new", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        try:
            lock_metrics(new)
            self._check_old()
            with open(new, "w", encoding="utf-8", errors="replace", closefd=False) as file:
                file.truncate()
                file.write(text)
            os.replace(f"{self._path}.new", self._path)
        except OSError:
            os.close(new)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file = new

    def _check_old(self) -> None:
        """What is there is ours, or was that of a process that has ended. Raises OSError."""
        try:
            old = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            if self._file >= 0 and os.path.samestat(os.fstat(old), os.fstat(self._file)):
                return
            lock_metrics(old)
            check_metrics(old)
        finally:
            os.close(old)


def check_metrics(file: int) -> None:
    """Raises OSError if it is no file of metrics of ours."""
    begin = f"# HELP {METRICS_PREFIX}".encode()
    if not stat.S_ISREG(os.fstat(file).st_mode) or os.pread(file, len(begin), 0) not in (b"", begin):
        raise OSError("it is another kind of file, which is left alone")


def lock_metrics(file: int) -> None:
    """Raises OSError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("another process writes it; each needs one of its own") from None


def exposition(values: Mapping[str, float | None], name: str) -> str:
    """The text format of Prometheus. `name` tells several services apart whose files are in one folder."""
    label = name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return "".join(
        f"# HELP {METRICS_PREFIX}{metric} {METRICS[metric]}\n"
        f"# TYPE {METRICS_PREFIX}{metric} {'counter' if metric.endswith('_total') else 'gauge'}\n"
        f'{METRICS_PREFIX}{metric}{{name="{label}"}} {value}\n'
        for metric, value in values.items()
        if value is not None
    )


def metrics_of(exporter: Exporter) -> dict[str, float | None]:
    return {
        **exporter.counts,
        "lag_seconds": round(exporter.lag_at_most_seconds, 3),
        "waiting_bytes": exporter.waiting_bytes,
        "diverged": int(exporter.diverged),
        "last_write_timestamp_seconds": exporter.written_at,
    }


# ---- Check ----------------------------------------------------------------------------------------------------------


class UntouchedFile(SharedFile):
    """As it stands, without the turn: nothing is mended."""

    def last(self, folder: Folder) -> Record | None:
        """What the next record has to follow on. Raises Unusable, OSError for what an exporter would not go on from.

        Exporters may be at work: the position is read first and the file is opened next, so that it is not behind, and
        a file that has come to its name since then is no part that goes further.
        """
        self._folder = folder
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(folder.stat(f"{self._name}.lock").st_mode):
                raise Unusable(f"{self.path}.lock is no lock file of ours; remove it")
        position = self.position(folder)
        try:
            with open(self._open_it(), "rb") as file:
                check_regular(file.fileno(), self.path)
                here, end = identity(os.fstat(file.fileno())), last_whole(file.fileno(), self.path, mend=False)
                self._first = created_of(file.readline(LINE_BYTES))
        except FileNotFoundError:
            return self._last_before(position, self._parts(), None)
        parts = [part for part in self._parts() if part.identity != here and part.name != self._name]
        if not end:
            return self._last_before(position, parts, here)
        if not self._is_known(position, here, end):
            self._check_newest(position, end, parts)
        return end

    def _last_of(self, part: Part, mend: bool = False) -> Record | None:
        return super()._last_of(part)


class Failed(Exception):
    """A check has failed. The message says what was found, and what to do."""


def check_all(environ: Mapping[str, str]) -> int:
    """A line for each thing that has to be right; the exit status. Nothing is changed."""
    try:
        settings = read_settings(environ)
    except ValueError as error:
        print(f"FAILED  settings: {error}")
        return 1
    checks: dict[str, Callable[[], None]] = {
        "settings": lambda: None,
        f"backend: {settings.url}": partial(check_backend, settings),
        f"DIRECTORY: {settings.directory}": partial(check_directory, settings.directory),
        f"last record: {settings.file_name}": partial(check_last_record, settings),
    }
    if settings.metrics_file:
        checks[f"METRICS_FILE: {settings.metrics_file}"] = partial(check_metrics_file, settings.metrics_file)
    failures = 0
    for what, look in checks.items():
        try:
            look()
            print(f"ok      {what}")
        except Failed as failure:
            failures += 1
            print(f"FAILED  {what}: {failure}")
    return min(1, failures)


def check_backend(settings: Settings) -> None:
    """It gives a record, if it has one. Raises Failed."""
    try:
        Source(settings).ask_for_one()
    except Refused as error:
        token = "set API_TOKEN to the backend's token" if error.status == 401 else "look at the backend, or correct URL"
        raise Failed(f"{error}: {token}") from error
    except UNREACHABLE as error:
        raise Failed(f"unreachable: {error or type(error).__name__}: start it, or correct URL") from error


def check_directory(directory: str) -> None:
    """It is there, or can be made, and its locks hold. Raises Failed."""
    folder = os.path.realpath(directory)
    try:
        check_file_system(folder)
    except OSError as error:
        raise Failed(f"{error}") from error
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    check_folder(folder)


def check_folder(folder: str) -> None:
    """Raises Failed if no file can be made in it."""
    if not os.path.isdir(folder):
        raise Failed(f"{folder} is no folder: make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failed(f"the folder {folder} is not writable: change its owner or mode")


def check_last_record(settings: Settings) -> None:
    """The database has it, so that what follows can be appended. Raises Failed."""
    try:
        with contextlib.closing(Folder(settings.directory)) as folder:
            last = UntouchedFile(settings.directory, settings.file_name).last(folder)
        next(Source(settings).follow(last))
    except FileNotFoundError:  # the folder will be made
        return
    except Missing as missing:
        text = too_late if missing.kept_from else without_predecessor
        raise Failed(text(missing.record, missing, settings)) from missing
    except UNREACHABLE as error:
        hint = "" if isinstance(error, Unusable) else ": mend that first"
        raise Failed(f"{error or type(error).__name__}{hint}") from error


def check_metrics_file(path: str) -> None:
    """Raises Failed."""
    check_folder(os.path.dirname(os.path.realpath(path)))
    try:
        with contextlib.suppress(FileNotFoundError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            check_metrics(file.fileno())
    except OSError as error:
        raise Failed(f"{error}: name another file") from error


# ---- Main -----------------------------------------------------------------------------------------------------------


def pass_over_half_made(unraisable: Any) -> None:
    """A reply of http.client that the signal came upon while it was made lacks what Python wants to close, and Python
    3.13 would print that."""
    if not isinstance(unraisable.exc_value, AttributeError):
        sys.__unraisablehook__(unraisable)


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
            sys.unraisablehook = pass_over_half_made
            raise Interrupted

    for number in ENDING:
        signal.signal(number, interrupt)
    return reading


def run(exporter: Exporter, signals: int) -> int:
    """Steps until a signal, says from time to time how far it is, and tries once more to write at the end. The exit
    status: 1 if it has come too late, which no further attempt would mend."""
    said, said_at, delay, status = 0, time.monotonic(), 0.0, 0
    exporter.write()  # looks at the file, which says where to begin
    try:
        while not select.select([signals], [], [], delay)[0]:
            delay = exporter.step()
            if time.monotonic() - said_at >= PROGRESS_SECONDS:
                say_progress(exporter, exporter.written - said, time.monotonic() - said_at)
                said, said_at = exporter.written, time.monotonic()
    except Interrupted:
        pass  # by a signal: what was being fetched can be fetched again
    except TooLate as error:
        log.error("%s", error)
        status = 1
    exporter.write()
    log.info("stopped; %d records written, %d left to the others", exporter.written, exporter.waiting_records)
    return status


def say_progress(exporter: Exporter, written: int, seconds: float) -> None:
    lag = exporter.lag_seconds
    if written:
        log.info("%d records written (%.0f/s), %d waiting, %s behind", exporter.written, written / seconds,
                 exporter.waiting_records, "unknown how far" if lag is None else f"{lag:.1f} s")  # fmt: skip


def file_system(path: str, mounts: str) -> str:
    """The type of the file system of a path, by the text of /proc/self/mountinfo; "" if it does not say it."""
    found = ""
    longest = -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # of several mounts on one point the last is the one that is seen
            found, longest = after.split(" ")[0], len(point)
    return found


def check_file_system(directory: str) -> None:
    """Raises OSError for one whose locks are not kept between machines, or between paths; warns where that depends."""
    try:
        with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as mounts:
            kind = file_system(os.path.realpath(directory), mounts.read())
    except FileNotFoundError:  # no Linux
        log.warning("DIRECTORY %s must be on a local file system; here it cannot be checked", directory)
        return
    if NETWORK.fullmatch(kind):
        raise OSError(f"it is on {kind}, a network file system, where a lock may not hold between machines: two"
                      " instances could write at once. Use a local file system")  # fmt: skip
    if USER_SPACE.fullmatch(kind):
        log.warning("DIRECTORY %s is on %s: all instances must use this very path; by another path to the same folder"
                    " they may not see each other's locks, and write copies", directory, kind)  # fmt: skip


def prepare(directory: str) -> None:
    """Raises OSError if the folder cannot be used."""
    os.makedirs(directory, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError("the folder is not writable")
    check_file_system(directory)


def main(arguments: Sequence[str]) -> int:
    words = " ".join(arguments)
    if words == "--check":
        log_as("background", "text")
        return check_all(os.environ)
    if words in ("--help", "--version"):
        print(help_text() if words == "--help" else COMMANDS[words])
        return 0
    try:
        settings = read_settings(os.environ)
    except ValueError as error:
        print(f"background: {error}", file=sys.stderr)
        return 2
    log_as("background", settings.log_format)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends verify and reconcile at once, as safely as kill -9
    if re.fullmatch(f"verify( {DATE}){{0,2}}", words):
        return verify(settings, *(date.removesuffix("Z") for date in arguments[1:]))
    if re.fullmatch("reconcile( --dry-run| --yes){0,2}", words):
        return reconcile(settings, dry_run="--dry-run" in arguments, agreed="--yes" in arguments)
    if arguments:
        known = ", ".join(filter(None, COMMANDS))
        print(f"background: unknown arguments {words!r}; known are {known}", file=sys.stderr)
        return 2
    try:
        prepare(settings.directory)
    except OSError as error:
        log.error("DIRECTORY %s cannot be used: %s", settings.directory, error.strerror or error)
        return 1
    exporter = Exporter(settings)
    signals = catch_signals(exporter)  # before it says that it runs: from then on a signal ends it with status 0
    log.info("appending to %s from %s", os.path.join(settings.directory, settings.file_name), settings.url)
    metrics = MetricsFile(settings.metrics_file, partial(metrics_of, exporter))
    metrics.start()
    try:
        status = run(exporter, signals)
    finally:
        metrics.end()
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # the interpreter's own end knows no handlers
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
