"""The client: writes access-log lines to a journal and delivers each of them to the backend exactly once.

    python client.py [replay JOURNAL | --check]       (--help has all of it; settings: env/client.env)

The way of a line:
  1. A source has it: the generating threads, standard input, or files that are followed (SOURCE).
  2. It is joined, if it came in pieces; `journal_line` makes it `IP METHOD URI STATUS`, whatever its format.
  3. The source is flushed to disk; .source says, durably, which of its bytes become which bytes of the journal.
  4. The line is appended to LOG_FILE, under the mutex; its id is this start's identity and its byte offset.
  5. The courier flushes the journal to disk and POSTs the line with its neighbours; unanswered, they are sent again.
  6. Stored, it is delivered; refused by the backend, it is in .rejected with the reason; by a proxy, it is held back.
  7. .position follows each answer, .journal every two seconds and durably: no more than that is ever sent again.
  8. A journal that is delivered and has ROTATE_BYTES becomes LOG_FILE.1, and a new one begins.
What cannot be mended exactly ends the client with one line that says what was found and what to do. It needs nothing
but the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import glob
import gzip
import http.client
import itertools
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, get_type_hints
from urllib.parse import urlsplit

VERSION = "0.2.0"
T = TypeVar("T")
log = logging.getLogger("client")

# ---- Limits ---------------------------------------------------------------------------------------------------------

POLL_SECONDS = 0.05  # between looks at what may have changed
GLOB_SECONDS = 1.0  # between looks for new files that match SOURCE
HTTP_SECONDS = 30.0  # the backend answers a POST within 10 s, by 503 if need be
ANSWER_SECONDS = 60.0  # from the first byte sent to the last one received, however they trickle
ANSWER_BYTES = 16 * 1024 * 1024  # 10,000 refusals with their reasons are shorter
MAX_DELAY_SECONDS = 30.0  # between attempts to reach the backend
MAX_WISH_SECONDS = 3600.0  # of a Retry-After
HELD_SECONDS = 1.0, 600.0  # the first and the longest pause between attempts with a line that is refused on the way
HELD_BYTES = 4 * 1024 * 1024  # of lines that are held back; beyond, they hold up the others
LASTING_REFUSALS = 3  # of one batch by something on the way; then it is narrowed down to the line
HELD_IN_A_ROW = 16  # lines refused on the way with none accepted between: then it is an outage, and pauses grow
DURABLE_SECONDS = 2.0  # between durable positions: what is sent again after a power cut
ROTATED_SECONDS = 2.0  # a renamed file must have been quiet for so long before the next one is read
UNTERMINATED_SECONDS = 10.0  # and for so long before its last line counts as whole without a line feed
WATCHED_SECONDS = 3600.0  # a renamed file is looked at for so long: its writer may go on
WATCHED_FILES = 32  # of one source; with more of them, the oldest only until they are quiet
FINISHED_FILES = 32  # of one source that are known again by their checksums when nobody looks at them any more
SHUTDOWN_SECONDS = 4.0  # for delivering what is left after SIGTERM; with the last metrics the process ends within 5 s
PROGRESS_SECONDS = 10.0
METRICS_SECONDS = 2.0  # between two states of METRICS_FILE
METRICS_END_SECONDS = 1.0  # for its last one, at the end
BACKLOG_STEP = 0.001  # of how long lines have waited: so exactly their age is known; an outage of a year takes 1 MB
CHECK_SECONDS = 10.0  # for an answer to --check
TIME_SECONDS = 600.0  # between notes in .journal of what time it is
TIMES = 256  # of them for one journal; then every second one goes
TIMES_ROTATED = 16  # of them for a renamed one
CLOCK_SECONDS = 6 * 3600  # by which clocks of the backend and of a database that took over may differ, in a replay
OVERTAKEN_SECONDS = 3600  # of these, by which retention may go on during a replay
AHEAD_SECONDS = 60  # of these, between the clocks of several backends
KEPT_SECONDS = 1.0  # between looks at what it has deleted, during a replay
OUTAGE_REASONS = 10  # of one outage are told; more would be a flood
CHUNK_BYTES = 256 * 1024  # of a source at a time; a longer line is refused
BATCH_BYTES = 1024 * 1024  # of the journal in one POST, whatever BATCH_SIZE says; a line is shorter
TAIL_BYTES = 4 * 1024 * 1024  # of a file that is opened again; a line, or a note in .rejected, is shorter
KNOWN_BYTES = 256  # at the beginning of a file, and before the offset, by which it is known again
MARK_BYTES = 64 * 1024  # of a source between two checkpoints
MARKS = 16  # checkpoints for each source: the newest are close together, older ones further and further apart
ZERO_RUN = 16  # so many NULs in a line are no part of it: a power cut, or a writer behind a truncation, left them
OVERLONG_BYTES = 200  # of an overlong line are noted
SILENT_LINES = 100  # a source that has only unknown lines at its beginning is told after so many


# ---- Settings -------------------------------------------------------------------------------------------------------


def within(low: int, high: int, besides: str = "") -> Callable[[str], bool]:
    return lambda text: bool(re.fullmatch("[0-9]{1,15}", text)) and (low <= int(text) <= high or text == besides)


def like(expression: str) -> Callable[[str], bool]:
    return lambda text: bool(re.fullmatch(expression, text))


def is_url(text: str) -> bool:
    try:
        host = (urlsplit(text).hostname or "").encode("idna")
        return bool(host and re.fullmatch(r'https?://[^\s/?#@]+(/[!"$->@-~]*)?', text)) and urlsplit(text).port != 0
    except ValueError:  # its port, brackets, or a part of the host that is too long
        return False


def is_pattern(text: str) -> bool:
    try:
        groups = re.compile(text.encode()).groupindex.keys()
    except (re.error, UnicodeEncodeError):
        return False
    return groups >= {"ip", "status"} and (groups >= {"method", "uri"} or "request" in groups)


FilePath = Annotated[str, like(r"[^\0]*[^/\0]"), "the path of a file"]
SourceNames = Annotated[str, like(r"(?s:.*[^\s,].*)"), "paths or patterns of files, or - for standard input"]
Pattern = Annotated[str, is_pattern, "a regular expression that names ip, status, and method and uri, or request"]
LogFormat = Annotated[str, like("text|json"), "text or json"]
Secret = Annotated[str, like("[A-Za-z0-9._~+/=-]+"), "letters, digits and ._~+/=- (its value is not shown)"]


@dataclass(frozen=True)
class Settings:
    """Every environment variable by its lower-case name: what is right, also in words, its meaning, its default.

    The one table of them: --help prints it, and a test compares it with env/client.env and the README.
    """

    url: Annotated[str, is_url, "like http://host:port/path", "Where lines are sent"] = "http://localhost:8000/api/data"
    threads_amount: Annotated[
        int, within(1, 999), "a whole number from 1 to 999", "Threads that make up lines while SOURCE is empty"
    ] = 3
    request_delay_limit: Annotated[
        int, within(0, 9_999_999), "a whole number of milliseconds from 0 to 9999999",
        "Upper bound of each thread's random pause between two lines",
    ] = 5000  # fmt: skip
    log_file: Annotated[
        FilePath, "The journal; %n in it becomes the lowest number from 1 that no other running client holds"
    ] = "logs.txt"
    source: Annotated[
        SourceNames,
        "Where lines come from, empty for made-up ones; files are followed like tail -F, through rotation; several"
        " paths, and patterns such as /var/log/nginx/*.log, stand between blanks or commas (in a name, ? stands for"
        " these)",
    ] = ""
    source_pattern: Annotated[
        Pattern,
        "What is searched in each line in place of the known forms, for lines of a form of their own, such as"
        ' (?P<ip>[^ ]+) did "(?P<request>[^"]*)" (?P<status>[0-9]+)',
    ] = ""
    batch_size: Annotated[int, within(1, 10_000), "a whole number from 1 to 10000", "Most lines in one request"] = 1000
    rotate_bytes: Annotated[
        int, within(65_536, 10**15, besides="0"), "0 (never), or a whole number of bytes from 65536",
        "Size at which a delivered journal is renamed to LOG_FILE.1, and a new one begun; the same for the file of"
        " refused lines",
    ] = 268_435_456  # fmt: skip
    keep_files: Annotated[
        int, within(0, 999), "a whole number from 0 to 999", "How many renamed ones stay; the oldest go"
    ] = 4
    metrics_file: Annotated[
        FilePath,
        "Where metrics are written every 2 s, for the textfile collector of node-exporter, such as"
        " /var/lib/prometheus/node-exporter/logpipeline-client.prom, empty for nowhere; %n in it becomes the number of"
        " LOG_FILE",
    ] = ""
    log_format: Annotated[LogFormat, "Form of a log line, plain text or a JSON object"] = "text"
    api_token: Annotated[Secret, "Token for a backend that wants one"] = ""

    @property
    def sources(self) -> list[str]:
        return [] if self.source == "-" else re.findall(r"[^\s,]+", self.source)


class Setting(NamedTuple):
    """What the table says of one variable."""

    name: str  # of the variable
    kind: type
    is_right: Callable[[str], bool]
    allowed: str
    meaning: str
    default: Any

    @property
    def text(self) -> str:
        """What --help and the env file say."""
        return f"{self.meaning}: {self.allowed}; default {'empty' if self.default == '' else self.default}"


def settings_table() -> Iterator[Setting]:
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        is_right, allowed, meaning = hint.__metadata__
        yield Setting(name.upper(), hint.__origin__, is_right, allowed, meaning, getattr(Settings, name))


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment; an empty value means the default. Raises ValueError with one line."""
    values: dict[str, Any] = {}
    for name, kind, is_right, allowed, *_ in settings_table():
        text = re.sub(r"""^(['"])(.*)\1$""", r"\2", environ.get(name, "").strip()).strip()
        if text and not is_right(text):
            hidden = "not shown" in allowed or (name == "URL" and "@" in text)
            raise ValueError(f"{name} is {'(hidden)' if hidden else repr(text)}: must be {allowed}")
        values |= {name.lower(): kind(text)} if text else {}
    settings = Settings(**values)
    for path in (settings.metrics_file, f"{settings.metrics_file}.new") if settings.metrics_file else ():
        if is_of_journal(settings, path) or any(is_of_source(source, path) for source in settings.sources):
            raise ValueError(f"METRICS_FILE is {settings.metrics_file!r}: must be a file of its own, not LOG_FILE, a"
                             " file beside it, a SOURCE, or named like a rotated one")  # fmt: skip
    return settings


def is_of_journal(settings: Settings, path: str) -> bool:
    """It is LOG_FILE or a file beside it, whatever number stands for %n."""
    numbered = "(?:[0-9]+|%n)".join(map(re.escape, os.path.realpath(settings.log_file).split("%n")))
    found = re.match(numbered, real := os.path.realpath(path))
    return found is not None and not without_companion(real[found.end() :])


def is_of_source(source: str, path: str) -> bool:
    """It is that source, one of that pattern, or named like a rotated one."""
    folder, name = os.path.split(source)
    folder, (other, base) = os.path.realpath(folder), os.path.split(os.path.realpath(path))
    is_member = covers(name, base) or is_rotated(base, name)
    return covers(source, path) or os.path.realpath(source) == os.path.realpath(path) or (
        is_member and covers(folder, other))  # fmt: skip


def refuse(reason: str) -> NoReturn:
    """What cannot be used ends the client at once. Raises SystemExit."""
    print(f"client: {reason}", file=sys.stderr)
    raise SystemExit(2)


COMMANDS = {
    "": "deliver, until SIGTERM, SIGINT or the end of standard input",
    "replay [--all] JOURNAL...": "send again what was delivered of these journals and their renamed parts, under the"
    " same ids, after the database has lost records; where retention deletes: what was written since; with --all also"
    " what it may have deleted, which then is stored anew; exit status 0 or 1",
    "--check": "say whether it could: settings, backend, files, a line each; changes nothing; exit status 0 or 1",
    "--help": "this text",
    "--version": f"client.py {VERSION}",
}


def help_text() -> str:
    def item(name: str, text: str, width: int) -> str:
        first, others = f"  {name:<{width}}  ", " " * (width + 4)
        return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

    return "\n".join([
        f"usage: python client.py [{' | '.join(name.split(' ')[0] for name in COMMANDS if name)}]",
        "",
        "The client of the log pipeline: writes access-log lines to a journal, and delivers each of them to the",
        "backend exactly once.",
        "",
        *(item(name, text, 25) for name, text in COMMANDS.items()),
        "",
        "Settings are environment variables, read once at start; an empty one is the default:",
        "",
        *(item(setting.name, setting.text, 19) for setting in settings_table()),
    ])  # fmt: skip


# ---- Log ------------------------------------------------------------------------------------------------------------

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f]")


class LogFormatter(logging.Formatter):
    """One line an event, in UTC: `2026-11-25T00:20:46.123Z INFO client[1234]: message`, or the same as JSON.

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


# ---- A line ---------------------------------------------------------------------------------------------------------

METHODS = ("GET", "GET", "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
STATUS_CODES = (200, 200, 200, 201, 204, 301, 304, 400, 401, 403, 404, 500, 503)

# Every pattern here needs linear time for any line: no repetition can end at two places (or it is possessive).
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}"  # a method, by RFC 9110
URI = rb"A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-"  # what may stand in one, by RFC 3986
# Most lines of Apache and nginx: address - user [time] "METHOD URI PROTOCOL" status ...
USUAL = re.compile(
    rb'([0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f:]{2,39}) - [^\s"\[]+ \[[^\]"]+\] "([A-Z]{1,32}) (['
    + URI
    + rb']+) HTTP/[0-9.]{1,9}"'
    rb" ([1-5][0-9]{2})(?: .*)?"
).fullmatch
PLAIN = re.compile(rb"(\S+) (" + TOKEN + rb") ([^\s\0-\x1f\x7f]+) ([1-5][0-9]{2})").fullmatch
CRI = re.compile(rb"[0-9-]{10}T[0-9:.]+(?:Z|[+-][0-9:]{5}) (stdout|stderr) ([FP])\S* ").match
DOCKER = re.compile(  # as its json-file driver writes it, and nobody else
    rb'\{"log":"([^"\\]*+(?:\\.[^"\\]*+)*+)","stream":"(stdout|stderr)",(?:"attrs":\{.*\},)?"time":"[^"]*"\}'
).match
WRAPPED = b"20", b'{"log":"'  # all that these two match begins so
SYSLOG = re.compile(  # RFC 3164, also without a host, or with the time of RFC 3339; RFC 5424
    rb"(?:<[0-9]{1,3}>)?(?:[A-Z][a-z]{2} [ 0-9][0-9] [0-9:]{8}|[0-9-]{10}T[0-9:.]+(?:Z|[+-][0-9:]{5}))"
    rb" (?:[A-Za-z][^\s:]*: |\S+ [^\s:]+: ?)"
    rb"|<[0-9]{1,3}>1 \S+ \S+ \S+ \S+ \S+ (?:-|(?:\[[^\]\\]*+(?:\\.[^\]\\]*+)*+\])++) (?:\xef\xbb\xbf)?"
).match
WORDS = re.compile(  # a quoted string with escapes, something in brackets, or what stands between blanks
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?$)|\[[^\]]*+(?:\]|$)|[^\s"\[]\S*+', re.DOTALL
)
ADDRESS = re.compile(
    rb"\[([0-9A-Fa-f:.]+)(?:%[^\]]*)?\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)(?:%\S*)?"
).fullmatch
ESCAPE = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|(.))", re.DOTALL)
ESCAPED = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"v": b"\v", b"f": b"\f", b'"': b'"', b"\\": b"\\"}
REQUEST = re.compile(rb"(" + TOKEN + rb")[ \t]+(.*\S)", re.DOTALL).fullmatch
PROTOCOL = re.compile(rb"[ \t]+[A-Z]{2,9}/[0-9](?:\.[0-9])?$")
FOREIGN = re.compile(rb"[^" + URI + rb"]")

# Where JSON lines of nginx, Caddy and Traefik have what; `request` may be a line (nginx) or an object (Caddy)
IP_NAMES = ("remote_addr", "remote_ip", "client_ip", "ClientHost", "ClientAddr")
METHOD_NAMES = ("request_method", "method", "RequestMethod")
URI_NAMES = ("request_uri", "uri", "RequestPath")
STATUS_NAMES = ("status", "DownstreamStatus", "OriginStatus")


class Parsed(NamedTuple):
    """A source line as it goes into the journal, and whether it is one that the backend should take."""

    line: bytes
    known: bool = True


def generate_line() -> bytes:
    ip = ".".join(str(random.randint(1, 254)) for _ in range(4))
    path = "/".join(f"{random.randrange(16**4):04x}" for _ in range(random.randint(1, 3)))
    return f"{ip} {random.choice(METHODS)} https://domain.com/{path} {random.choice(STATUS_CODES)}".encode()


def journal_line(line: bytes, pattern: re.Pattern[bytes] | None = None) -> Parsed:
    """A source line of any known form as four fields; any other as it is: the backend will refuse it with a reason.

    The forms, with `pattern` none but that: four fields; common and combined format, with virtual host, port or
    forwarded addresses in front; JSON of nginx, Caddy and Traefik; each of them behind a header of syslog or of a
    container engine.
    """
    line = text = line.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n")
    if pattern:
        return from_pattern(pattern, line)
    for header in (CRI, SYSLOG):
        if found := header(text):
            text = text[found.end() :].lstrip()
    if found := PLAIN(text) or USUAL(text):
        ip = address_of(found[1])
        return Parsed(percent_encoded_if_not_utf8(b" ".join((ip or found[1], *found.groups()[1:]))), bool(ip))
    return (from_json(text) if text.startswith(b"{") else from_access_log(text)) or Parsed(line, False)


def from_pattern(pattern: re.Pattern[bytes], line: bytes) -> Parsed:
    found = pattern.search(line)
    if not found:
        return Parsed(line, False)
    named = {name: text or b"" for name, text in found.groupdict().items()}
    if "request" in named:
        method, uri = request_fields(unescaped(named["request"]))
    else:
        method, uri = named["method"], percent_encoded(unescaped(named["uri"])) or b"-"
    return four_fields(named["ip"], method, uri, named["status"])


def four_fields(ip: bytes, method: bytes, uri: bytes, status: bytes) -> Parsed:
    """An address without port and zone; what is none (a host name, `unix:`) is left for the backend to refuse."""
    known = address_of(ip)
    parts = known or percent_encoded(ip) or b"-", method, uri, status or b"-"
    return Parsed(b" ".join(parts), bool(known and re.fullmatch(rb"[1-5][0-9]{2}", status)))


def address_of(text: bytes) -> bytes | None:
    """An IPv4 or IPv6 address without what a log has around it: a port, a zone, brackets."""
    if found := ADDRESS(text):
        bare: bytes = found[1] or found[2] or found[3]
        with suppress(OSError):
            socket.inet_pton(socket.AF_INET6 if b":" in bare else socket.AF_INET, bare.decode())
            return bare
    return None


def from_access_log(line: bytes) -> Parsed | None:
    """Common and combined format: the first quoted string with a status behind it is the request."""
    before: list[bytes] = []
    request = b""
    for found in WORDS.finditer(line):
        word = found[0]
        if request and re.fullmatch(rb"[0-9]{3}|-", word):
            method, uri = request_fields(unescaped(request[1:-1]))
            return four_fields(remote_address(before), method, uri, word)
        if request:
            before.append(request)
        request = word if len(word) > 1 and word.startswith(b'"') and word.endswith(b'"') else b""
        if not request:
            before.append(word)
    return None


def remote_address(words: Sequence[bytes]) -> bytes:
    """Which of the words in front of the request is the remote address, as %h of Apache and $remote_addr of nginx.

    It is the last of the first addresses that follow each other: a virtual host, or a forwarded address, stands before
    it. A list by commas (X-Forwarded-For) is passed over, unless it stands in place of the address: then its first.
    """
    listed = False  # the word before ended with a comma
    single: list[bytes] = []
    in_list: list[bytes] = []
    for word in words:
        parts = [part for part in word.strip(b'"').split(b",") if part]
        addresses = [part for part in parts if address_of(part)]
        if addresses and len(addresses) == len(parts):
            (in_list if listed or b"," in word else single).extend(addresses)
        elif single or in_list:
            break
        listed = word.endswith(b",")
    if single:
        return single[-1]
    if in_list:
        return in_list[0]
    named = [word for word in words[: words.index(b"-") if b"-" in words else 1] if word[:1] not in (b'"', b"[")]
    return named[-1] if named else b"-"


def unescaped(text: bytes) -> bytes:
    r"""Undoes \", \\, \xHH and the like of nginx and Apache."""
    if b"\\" not in text:
        return text
    return ESCAPE.sub(
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else ESCAPED.get(found[2], found[0]), text
    )


def percent_encoded(text: bytes) -> bytes:
    """Blanks, controls, bytes beyond ASCII, and whatever else may not stand in a URI (RFC 3986) become %HH."""
    return FOREIGN.sub(lambda found: b"%%%02X" % found[0][0], text)


def percent_encoded_if_not_utf8(line: bytes) -> bytes:
    try:
        line.decode()
        return line
    except UnicodeDecodeError:
        return re.sub(rb"[\x80-\xff]", lambda found: b"%%%02X" % found[0][0], line)


def request_fields(request: bytes) -> tuple[bytes, bytes]:
    """Method and URI of METHOD URI [PROTOCOL]; what is no request line is the URI of the method -."""
    request = request.strip(b" \t\r\n")
    if found := REQUEST(request):
        uri = percent_encoded(PROTOCOL.sub(b"", found[2]))
        if uri:
            return found[1], uri
    return b"-", percent_encoded(request) or b"-"


def from_json(text: bytes) -> Parsed | None:
    """A JSON line of nginx, Caddy or Traefik, or a line that Docker has wrapped in one."""
    try:
        entry = read_json(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("log"), str) and "status" not in entry:
        return journal_line(as_bytes(entry["log"]))
    inner = entry["request"] if isinstance(entry.get("request"), dict) else {}

    def one_of(names: Iterable[str]) -> bytes:
        values = (place[name] for name in names for place in (entry, inner) if name in place)
        return as_bytes(next((value for value in values if isinstance(value, (str, int))), ""))

    status, ip = one_of(STATUS_NAMES), one_of(IP_NAMES)
    if not status or not ip:
        return None
    if isinstance(entry.get("request"), str):
        method, uri = request_fields(as_bytes(entry["request"]))
    else:
        method, uri = one_of(METHOD_NAMES) or b"-", percent_encoded(one_of(URI_NAMES)) or b"-"
    return four_fields(ip, method, uri, status)


def read_json(text: bytes) -> Any:
    r"""Also with the \xHH of nginx without escape=json, which is no JSON. Raises ValueError, RecursionError."""
    characters = text.decode(errors="surrogateescape")
    with suppress(ValueError):
        return json.loads(characters)
    return json.loads(re.sub(r"\\x([0-9A-Fa-f]{2})", lambda x: rf"\u{'00' if x[1] < '8' else 'dc'}{x[1]}", characters))


def as_bytes(value: str | int) -> bytes:
    """The bytes that a JSON string, or number, stands for."""
    try:
        return str(value).encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a pair
        return str(value).encode(errors="surrogatepass")


TOO_LONG = b"a line of %d bytes, too long to be stored"
ONLY_BEGUN = b"the first %d bytes of a line whose end never came"


def overlong(first: bytes, length: int, what: bytes = TOO_LONG) -> bytes:
    """What is noted of a line that cannot be read as a whole: four fields it has not, so it will be refused."""
    return first[:OVERLONG_BYTES].replace(b"\n", b" ") + b" ... " + what % length


def without_zeros(data: bytes) -> bytes:
    """NULs in front of a line, and long runs of them, are no part of it."""
    return re.sub(rb"(?m)^\0+|\0{%d,}+" % ZERO_RUN, b"\n", data)


Begun = tuple[tuple[str, str, int], ...]  # of lines whose end is to come: the stream, as Latin-1 the text, its length


class Pieces:
    """Joins what a container engine has cut a long line into: CRI's P, or a `log` of Docker that ends without \\n.

    What has begun is kept in the state of its file, so that a restart, or the next file of a rotation, goes on with it.
    """

    def __init__(self, begun: Begun = ()) -> None:
        self._begun = {stream.encode(): ([text.encode("latin-1")], length) for stream, text, length in begun}

    @property
    def begun(self) -> Begun:
        return tuple(
            (stream.decode(), b"".join(texts).decode("latin-1"), length)
            for stream, (texts, length) in self._begun.items()
        )

    def joined(self, line: bytes) -> tuple[bytes, int]:
        """The line with all its pieces, and its length; of one that is too long the beginning; b"" if more follow."""
        if found := CRI(line):
            stream, start, end, more = found[1], found.end(), len(line), found[2] == b"P"
        elif found := DOCKER(line):
            text = found[1]
            backslashes = len(text) - 1 - len(text[:-1].rstrip(b"\\"))  # in front of the last character
            stream, (start, end), more = found[2], found.span(1), not (text.endswith(b"n") and backslashes % 2)
        else:
            return line, len(line)
        if not more and stream not in self._begun:
            return line, len(line)
        texts, length = self._begun.pop(stream, ([], 0))
        texts.append(line[start:end])
        length += end - start
        if length > CHUNK_BYTES:
            texts = [b"".join(texts)[:OVERLONG_BYTES]]
        if more:
            self._begun[stream] = texts, length
            return b"", 0
        return b"".join(texts) if length > CHUNK_BYTES else line[:start] + b"".join(texts) + line[end:], length

    def given_up(self) -> list[bytes]:
        """What is noted, as refused, of lines that have no end."""
        begun, self._begun = self._begun, {}
        return [overlong(b"".join(texts), length, ONLY_BEGUN) for texts, length in begun.values()]


class Parser:
    """Makes journal lines of a source's bytes; counts what it skips."""

    def __init__(self, name: str, pattern: str = "") -> None:
        self._name = name
        self._pattern = re.compile(pattern.encode()) if pattern else None
        self._usual: Callable[[bytes], re.Match[bytes] | None] = USUAL if not pattern else lambda _: None
        self._silent = 0  # lines of no known form from its beginning on; -1: it has others
        self.zeros = 0

    def lines(self, data: bytes, pieces: Pieces | None = None) -> list[bytes]:
        """The journal lines of whole lines; says what is odd about them."""
        if b"\0" in data:
            data, before = without_zeros(data), len(data)
            self.skipped(before - len(data))
        found, unknown = self._parsed(data, pieces or Pieces())
        if found and self._silent >= 0:
            self._look_at(found, unknown)
        return found

    def same_lines(self, data: bytes, pieces: Pieces) -> list[bytes]:
        """What `lines` has given for it before."""
        return self._parsed(without_zeros(data), pieces)[0]

    def _parsed(self, data: bytes, pieces: Pieces) -> tuple[list[bytes], int]:
        """The lines, and how many of them are in no known form."""
        found, unknown = [], 0
        for line in data.split(b"\n"):
            if usual := self._usual(line):
                found.append(b"%b %b %b %b" % usual.groups())
            elif line:
                whole, length = pieces.joined(line) if line.startswith(WRAPPED) else (line, 0)
                if not whole:
                    continue
                too_long = length > len(whole)
                parsed = Parsed(overlong(whole, length), False) if too_long else journal_line(whole, self._pattern)
                if parsed.line:
                    found.append(parsed.line.replace(b"\n", b" "))  # JSON may have one escaped: no line of its own
                    unknown += not parsed.known
        return found, unknown

    def _look_at(self, found: Sequence[bytes], unknown: int) -> None:
        """Said once: a source of which nothing will be stored."""
        self._silent = self._silent + unknown if unknown == len(found) else -1
        if self._silent >= SILENT_LINES:
            self._silent = -1
            log.error("%s: none of its first %d lines is in a known format, such as %.200r; set SOURCE_PATTERN",
                      self._name, SILENT_LINES, found[0].decode(errors="replace"))  # fmt: skip

    def skipped(self, count: int) -> None:
        """NULs that were not part of a line."""
        self.zeros += count
        if count > ZERO_RUN:
            log.warning("%s: skipped %d NUL bytes between lines, %d so far", self._name, count, self.zeros)


# ---- What is kept on disk -------------------------------------------------------------------------------------------


class Spoilt(Exception):
    """A file is not what it should be, and going on would lose or repeat lines: somebody has to look at it."""


class DiskFailure(Exception):
    """An fsync failed. A later one may succeed without the data being on disk, so this process ends (as PostgreSQL)."""


Spans = tuple[tuple[int, str], ...]  # (first offset, identity) of what each start appended, in order
Times = tuple[tuple[int, int], ...]  # (offset, seconds since the epoch): what is behind it was appended after that


class Rotated(NamedTuple):
    """A renamed part of the journal, known by its content, under whatever name it is now."""

    size: int
    crc: int  # of all of it
    spans: Spans
    times: Times


@dataclass(frozen=True)
class JournalState:
    """What .journal holds. A line's id is the identity of the span that its offset is in, and that offset."""

    part: int = 1  # which LOG_FILE this is: the first, or that after so many rotations
    spans: Spans = ()
    acknowledged: int = 0  # all lines before it are delivered, or held
    held: tuple[tuple[str, str], ...] = ()  # (id, line) of what is refused on the way; of older parts, too
    head: str = ""  # what the delivered bytes begin with
    floor: int = 0  # up to where the part before this one was delivered
    times: Times = ()  # by the backend's clock
    rotated: tuple[Rotated, ...] = ()  # the newest last, as many as are kept

    @property
    def times_before(self) -> Times:
        """Of the part that comes after this one."""
        return tuple((0, seconds) for _, seconds in self.times[-1:])

    @property
    def rotated_before(self) -> tuple[Rotated, ...]:
        """Without this part, which a rotation that did not get to its end may have added."""
        return tuple(one for one in self.rotated if one.spans[:1] != self.spans[:1])


class Mark(NamedTuple):
    """A checkpoint of a followed file: up to `offset` its bytes have this checksum and are in this part, from to."""

    offset: int
    crc: int  # of all bytes since the state's `base`
    part: int
    journal: int
    journal_after: int
    open: int = 0  # 1: in the middle of a line that comes in pieces, so that nobody can go on from here


class Finished(NamedTuple):
    """A file that was read to this size, has this checksum, and is not looked at any more."""

    inode: int
    size: int
    crc: int


@dataclass(frozen=True)
class FileState:
    """What .source holds of a file that is followed: up to where it was read, and how it is known again."""

    inode: int = 0
    path: str = ""  # where it was, links resolved
    offset: int = 0
    modified: int = 0  # its time stamp then, in nanoseconds
    head: str = ""  # its first bytes, as Latin-1
    tail: str = ""  # the bytes before the offset
    head_crc: int = 0  # as the version before this one had it, instead of both; 0: not known
    base: int = 0  # what is before this has no marks
    marks: tuple[Mark, ...] = ()
    left_at: float = 0.0  # when another file was seen in its place, in seconds since the epoch; 0: it is the newest
    begun: Begun = ()  # what is before the offset of lines whose ends are behind it

    def back_to(self, count: int) -> FileState:
        """As it was at one of its marks, or at the last one before that where all lines had ended."""
        if count == len(self.marks):
            return self
        while count and self.marks[count - 1].open:
            count -= 1
        offset = self.marks[count - 1].offset if count else self.base
        return replace(self, offset=offset, marks=self.marks[:count], tail="", begun=())

    def with_mark(self, mark: Mark) -> FileState:
        """With one more; neighbours become one: short ones, and older ones when there are many."""
        marks = [*self.marks, mark]
        starts = [self.base, *(one.offset for one in marks)]

        def joined(n: int) -> int | None:
            """The length of what marks n and n + 1 cover, if they can become one."""
            follows = marks[n].part == marks[n + 1].part and marks[n].journal_after == marks[n + 1].journal
            return marks[n + 1].offset - starts[n] if follows else None

        n = len(marks) - 2
        if n < 0 or (length := joined(n)) is None or length > MARK_BYTES:
            if len(marks) <= MARKS:
                return replace(self, marks=tuple(marks))
            lengths = [(length, n) for n in range(len(marks) - 4) if (length := joined(n)) is not None]
            n = min(lengths)[1] if lengths else -1
        if n < 0:  # other sources' lines between all of them: the oldest one goes
            return replace(self, base=self.base, marks=(marks[1]._replace(part=0), *marks[2:]))
        marks[n : n + 2] = [marks[n + 1]._replace(journal=marks[n].journal)]
        return replace(self, marks=tuple(marks))


@dataclass(frozen=True)
class Chunk:
    """What .source says of the last bytes that were moved into the journal."""

    source: str
    index: int  # of the file among the states of that source
    before: FileState | None  # None: there was none of it
    identity: str
    part: int
    journal: int
    journal_after: int
    crc: int | None  # of these bytes of the journal; None: not known


@dataclass(frozen=True)
class SourceState:
    """What .source holds: the files of each source, the newest last, and the last chunk."""

    sources: Mapping[str, tuple[FileState, ...]] = field(default_factory=dict)
    chunk: Chunk | None = None
    finished: Mapping[str, tuple[Finished, ...]] = field(default_factory=dict)  # of each source, the last one last


def read_state(path: str) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file, and only then. Raises Spoilt."""
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Spoilt(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise Spoilt(f"{path} holds no JSON object")
    return state


def typed(kind: Any, values: Any, path: str) -> Any:
    """A dataclass from what JSON has of it. Raises Spoilt for a name or type that is not its own."""
    try:
        made = kind(**values)
        for item in fields(kind):
            value, wanted = getattr(made, item.name), type(item.default)
            if wanted in (int, str, float) and not isinstance(value, (int, float) if wanted is float else wanted):
                raise TypeError(f"{item.name} is {value!r}")
            if wanted is int and value < 0:
                raise ValueError(f"{item.name} is {value}")
        return made
    except (TypeError, ValueError) as error:
        raise Spoilt(f"{path} is spoilt: {error}") from error


def read_journal_state(path: str) -> JournalState | None:
    """Raises Spoilt. The version before this one had a single identity, and the position elsewhere."""
    values = read_state(path)
    if values is None:
        return None
    try:
        if "identity" in values:
            values = {"spans": [(0, values["identity"])]}
        spans = as_spans(values.pop("spans"))
        held = tuple((str(record_id), str(line)) for record_id, line in values.pop("held", ()))
        times = as_times(values.pop("times", ()))
        rotated = tuple(
            Rotated(int(size), int(crc), as_spans(its_spans), as_times(its_times))
            for size, crc, its_spans, its_times in values.pop("rotated", ())
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Spoilt(f"{path} is spoilt: {error!r}") from error
    known = {"spans": spans, "held": held, "times": times, "rotated": rotated}
    state: JournalState = typed(JournalState, values | known, path)
    return state


def as_spans(values: Iterable[Any]) -> Spans:
    """Raises TypeError, ValueError, AttributeError."""
    return tuple((int(offset), str(uuid.UUID(f"{name}{0:012x}"))[:24]) for offset, name in values)


def as_times(values: Iterable[Any]) -> Times:
    """Raises TypeError, ValueError."""
    return tuple((int(offset), int(seconds)) for offset, seconds in values)


def read_state_of(journal: str) -> JournalState | None:
    """Raises Spoilt, also if it is missing where it should be."""
    state = read_journal_state(f"{journal}.journal")
    beside = [name for name in ("position", "source") if os.path.exists(f"{journal}.{name}")]
    if state is None and beside and os.path.getsize(journal):
        raise Spoilt(f"{journal}.journal is missing, but {journal}.{beside[0]} is there")
    return state


def delivered_state(journal: str) -> JournalState | None:
    """.journal, or the position beside it that is further on. Raises Spoilt."""
    state, position = read_state_of(journal), read_position(journal)
    if state is None:
        return None
    acknowledged = position.get("acknowledged")
    names = [name for _, name in state.spans]
    fits = position.get("identity", names[0] if len(names) == 1 else None) in names
    if isinstance(acknowledged, int) and fits and acknowledged > state.acknowledged:
        return replace(state, acknowledged=acknowledged)
    return state


def read_position(journal: str) -> dict[str, Any]:
    """A hint beside what is durable: missing or spoilt, it costs some re-sends."""
    try:
        return read_state(f"{journal}.position") or {}
    except Spoilt as error:
        log.warning("%s; sending some lines again", error)
        return {}


def read_source_state(path: str) -> SourceState:
    """Raises Spoilt. The version before this one knew one file, and not of which source: that is kept as ""."""
    values = read_state(path)
    if values is None:
        return SourceState()
    try:
        if "sources" not in values:
            return old_source_state(values)
        sources = {name: tuple(file_state(one, path) for one in states) for name, states in values["sources"].items()}
        chunk = values["chunk"]
        if chunk is not None:
            chunk = Chunk(**{**chunk, "before": chunk["before"] and file_state(chunk["before"], path)})
            if not all(isinstance(n, int) for n in (chunk.index, chunk.part, chunk.journal, chunk.journal_after)):
                raise TypeError("its chunk has no numbers")
        finished = values.get("finished", {}).items()
        known = {name: tuple(Finished(*map(int, one)) for one in files) for name, files in finished}
        return SourceState(sources, chunk, known)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Spoilt(f"{path} is spoilt: {error!r}") from error


def file_state(values: Mapping[str, Any], path: str) -> FileState:
    marks = tuple(Mark(*map(int, mark)) for mark in values["marks"])
    begun = tuple((str(stream), str(text), int(length)) for stream, text, length in values.get("begun", ()))
    state: FileState = typed(FileState, {**values, "marks": marks, "begun": begun}, path)
    return state


def old_source_state(values: Mapping[str, Any]) -> SourceState:
    """Raises KeyError, TypeError."""
    inode, before, after, here, there = (
        values[name] for name in ("inode", "offset", "offset_after", "journal", "journal_after")
    )
    if not all(isinstance(number, int) for number in (inode, before, after, here, there)):
        raise TypeError("numbers are wanted")
    earlier = FileState(inode, offset=before, base=before, head_crc=values.get("head_before", 0))
    latest = FileState(inode, offset=after, base=after, head_crc=values.get("head", 0))
    return SourceState({"": (latest,)}, Chunk("", 0, earlier, "", 1, here, there, None))


def write_state(path: str, state: str, durable: bool = True) -> None:
    """Replaces a small file as a whole. Raises OSError, DiskFailure."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(state)
        file.flush()
        if durable:
            flush_to_disk(file.fileno(), path)
    os.replace(f"{path}.new", path)
    if durable:
        flush_folder(path)


def as_json(state: Any) -> str:
    return json.dumps(state, default=vars)


def flush_to_disk(file: int, path: str) -> None:
    """Raises DiskFailure."""
    try:
        os.fsync(file)
    except OSError as error:
        raise DiskFailure(
            f"{path} could not be flushed to disk ({error}); what is there is read again at the next start"
        ) from error


def flush_folder(path: str) -> None:
    """A new name, or a renamed one, lasts only when its folder is on disk. Raises OSError, DiskFailure."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush_to_disk(folder, path)
    finally:
        os.close(folder)


def read_tail(file: int, path: str) -> bytes:
    """The last lines of a file, after cutting off what a crash left of one that was not written to its end."""
    size = os.fstat(file).st_size
    tail = os.pread(file, TAIL_BYTES, max(0, size - TAIL_BYTES))
    torn = len(tail) - tail.rfind(b"\n") - 1
    if torn:
        log.warning("%s: cut off %d bytes of a line that was not written to its end", path, torn)
        os.ftruncate(file, size - torn)
    return tail if torn < TAIL_BYTES else read_tail(file, path)


def without(states: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    return {name: state for name, state in states.items() if name not in names}


def crc_of(file: int, start: int, end: int, crc: int = 0) -> int | None:
    """The checksum of these bytes of a file, going on from `crc`; None if it is shorter."""
    while start < end:
        data = os.pread(file, min(CHUNK_BYTES, end - start), start)
        if not data:
            return None
        crc, start = zlib.crc32(data, crc), start + len(data)
    return crc


def shift_parts(path: str, keep: int) -> None:
    """Makes room for a new `path`.1 beside the `keep` - 1 newest of the old ones. Raises OSError."""
    for number in sorted(part_numbers(path), reverse=True):
        if number >= keep:
            os.unlink(f"{path}.{number}")
        else:
            os.replace(f"{path}.{number}", f"{path}.{number + 1}")


PART_NUMBER = re.compile(r"\.[1-9][0-9]{0,5}$")


COMPANION = re.compile(r"\.(?:journal|position|source|rejected|part|new|[0-9]{1,6})$")


def without_companion(path: str) -> str:
    """The journal that a file of this name would be beside; any other path as it is."""
    return journal_names(path)[-1]


def journal_names(path: str) -> list[str]:
    """What the journal may be called that has this file: LOG_FILE may itself end like a part of another, as log.1."""
    names = [path]
    while (shorter := COMPANION.sub("", names[-1])) != names[-1]:
        names.append(shorter)
    return names


def part_numbers(path: str) -> list[int]:
    found = (re.fullmatch(r"\.([1-9][0-9]{0,5})", name[len(path) :]) for name in glob.glob(f"{glob.escape(path)}.*"))
    return [int(number[1]) for number in found if number]


# ---- The journal ----------------------------------------------------------------------------------------------------


class Journal:
    """LOG_FILE, and beside it .journal, .position, .source, .rejected, and older parts (.1 is the newest).

    Why no line is lost or stored twice:
      * A line is in the journal, and that on disk, before it is sent. What is not acknowledged is sent again, by this
        process or by the next one. The position is moved after the answer; a stale or lost one costs re-sends only.
      * A line's id is the identity of the start that appended it, with the line's byte offset in its last 48 bits, so
        whoever sends it, and however often, sends the same id; the backend stores an id once.
      * An id is never used for two lines: each start makes an identity, durably before its first line, so a copy of
        the journal, a backup that was restored, or a journal that was shortened, goes on under a name of its own;
        within a start only one process appends (flock), and what is cut off again was never sent.
    Why a line of a followed file is in it once: before its lines are appended, .source says on disk from where to
    where they reach there and here, with the checksum of both. If all of them are here, reading goes on behind them;
    if not, what is here is cut off (the append did not end, or not on disk: none was sent) and read again.
    Why a rotation is neither: it begins when all is delivered, and that is on disk. Whatever of it a crash leaves
    undone, the next start finds LOG_FILE shorter than what was delivered of it, so that nothing of it is due.
    """

    def __init__(self, path: str, file: int, rotate_bytes: int = 0, keep_files: int = 0) -> None:
        """Takes over the open and locked file as it was left. Raises OSError, Spoilt and DiskFailure."""
        self.path = path
        self.refused_are = f"in {path}.rejected"
        self.outage = Outage(f"LOG_FILE {path}", "cannot be written")
        self.draining = False  # the backend takes lines, so a journal that is due for rotation will soon be delivered
        self._file = file
        self._rotate_bytes, self._keep_files = rotate_bytes, keep_files
        self._mutex = threading.Lock()
        read_tail(file, path)
        self.size = os.fstat(file).st_size
        flush_folder(path)
        self.state = delivered_state(path) or JournalState()
        stored = read_source_state(f"{path}.source")
        self.sources, self.finished, self._chunk = dict(stored.sources), dict(stored.finished), stored.chunk
        self._source_texts: dict[str, tuple[tuple[FileState, ...], str]] = {}  # what is in .source of each of them
        self._finished_text = ""
        self._take_back_chunk()
        self._take_back_sources(max(self.size, self.state.acknowledged))
        self.state = self._with_new_span(self._checked(self.state))
        self.acknowledged = self.state.acknowledged
        self.held = {record_id: line.encode("latin-1") for record_id, line in self.state.held}
        self._saved = self._torn = self._said = False
        self._rejected = -1
        self._crc = 0, 0, 0  # of this part, the bytes before that, their checksum
        self._noted: set[str] = set()  # ids in .rejected that may be refused again
        self._unflushed_notes = False
        self._durable, self._durable_held, self._durable_at = -1, self.state.held, time.monotonic()
        try:
            self._save()
        except OSError as error:  # what is there can be delivered; nothing is appended before this is on disk
            log.warning("%s.journal: %s; waiting", path, error)

    # -- how it was left

    def _checked(self, state: JournalState) -> JournalState:
        """Is LOG_FILE what was delivered up to there? If it was shortened, or is another, it goes on as that."""
        if state.acknowledged <= self.size:
            check_head(self._file, self.size, self.path, state)
            return state
        head = state.head.encode("latin-1")
        same = os.pread(self._file, len(head), 0) == head[: self.size]
        if same and head and self.size:
            log.warning(
                "%s was cut from %d bytes to %d; all that is left was delivered",
                self.path,
                state.acknowledged,
                self.size,
            )
            return replace(state, acknowledged=self.size)
        log.warning("%s is shorter than what was delivered of it: it begins anew", self.path)
        return self._next_part(state, state.acknowledged)

    def _next_part(self, state: JournalState, floor: int, spans: Spans = ()) -> JournalState:
        times, rotated = state.times_before, state.rotated
        return JournalState(state.part + 1, spans, held=state.held, floor=floor, times=times, rotated=rotated)

    def _with_new_span(self, state: JournalState) -> JournalState:
        """What this process appends gets an identity of its own; the last 1,000 stay for whoever looks up an id."""
        spans = [span for span in state.spans if span[0] < self.size] or ([(0, new_identity())] if self.size else [])
        due = [n for n, span in enumerate(spans) if span[0] <= state.acknowledged][-1:] or [0]
        times = tuple(one for one in state.times if one[0] <= self.size)  # others are of bytes that are gone
        spans = [*spans[min(due[0], max(0, len(spans) - 1000)) :], (self.size, new_identity())]
        return replace(state, spans=tuple(spans), times=times)

    def _take_back_chunk(self) -> None:
        """Cuts off the lines of a source that were not appended to their end, or not to disk; they are read again."""
        chunk, state = self._chunk, self.state
        names = {name for _, name in state.spans}
        if not chunk or chunk.part != state.part or (chunk.identity and chunk.identity not in names):
            return
        if state.acknowledged >= chunk.journal_after or self.size < chunk.journal or self.size > chunk.journal_after:
            return
        whole = self.size == chunk.journal_after
        if whole and chunk.crc in (None, crc_of(self._file, chunk.journal, chunk.journal_after)):
            return
        if state.acknowledged > chunk.journal:
            raise Spoilt(f"{self.path} has other bytes behind {chunk.journal} than were appended there")
        log.warning(
            "%s: cut off %d bytes of an append that did not end; reading them again",
            self.path,
            self.size - chunk.journal,
        )
        self.size = chunk.journal
        os.ftruncate(self._file, self.size)
        flush_to_disk(self._file, self.path)
        files = list(self.sources.get(chunk.source, ()))
        files[chunk.index :] = [chunk.before, *files[chunk.index + 1 :]] if chunk.before else files[chunk.index + 1 :]
        self._write_sources(self.sources | {chunk.source: tuple(files)})

    def _take_back_sources(self, end: int) -> None:
        """A journal that was restored or removed has less of the sources than .source says: that is read again."""
        state = self.state

        def is_here(mark: Mark) -> bool:
            if mark.part == state.part:
                return mark.journal_after <= end
            return mark.part < max(1, state.part - 1) or (mark.part < state.part and mark.journal_after <= state.floor)

        for name, files in self.sources.items():
            self.sources[name] = tuple(one.back_to(sum(map(is_here, one.marks))) for one in files)
            for before, after in zip(files, self.sources[name], strict=True):
                if before != after:
                    log.warning("%s has less of %s than was read; reading again from byte %d on, some lines twice",
                                self.path, name, after.offset)  # fmt: skip

    def lines_of(self, mark: Mark) -> Iterator[bytes]:
        """The lines that were appended between the mark before that one and that one, as far as they are here."""
        offset = mark.journal
        for line in raw_lines(self._file, offset) if mark.part == self.state.part else ():
            if offset >= mark.journal_after:
                return
            yield line[:-1]
            offset += len(line)

    # -- appending

    def owns(self, path: str) -> bool:
        """It is LOG_FILE or a file beside it."""
        real, own = os.path.realpath(path), os.path.realpath(self.path)
        return real.startswith(own) and not without_companion(real[len(own) :])

    def place(self) -> tuple[int, int, int, list[str]]:
        """Of one moment: the part, up to where it is delivered, its size, and the ids of what is held back."""
        with self._mutex:
            return self.state.part, self.acknowledged, self.size, list(self.held)

    def left(self) -> int:
        """Bytes that are not delivered."""
        return max(0, self.size - self.acknowledged) + sum(len(line) + 1 for line in tuple(self.held.values()))

    def rests(self) -> bool:
        """It is due for rotation, and soon delivered: whoever appends waits for that."""
        return self.draining and 0 < self._rotate_bytes <= self.size and self.acknowledged < self.size

    def append(self, lines: Sequence[bytes], move: Move | None = None) -> None:
        """Whole lines to the end, or nothing; `move` says where they are from. Raises OSError, Spoilt, DiskFailure."""
        data = b"".join(line + b"\n" for line in lines)
        with self._mutex:
            self._with_room(lambda: self._append(data, move))

    def _append(self, data: bytes, move: Move | None) -> None:
        if not self._saved:  # a rotation could not write the new identity
            self._save()
        if self._torn:  # an append and its truncation both failed
            os.ftruncate(self._file, self.size)
            self._torn = False
        if os.fstat(self._file).st_size != self.size:
            raise Spoilt(f"{self.path} was changed by somebody else while it was in use")
        if move:
            flush_to_disk(self._file, self.path)  # .source may be ahead of the disk by these lines, and by no others
            self._note_move(move, data)
        try:
            rest = data
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self._torn = True
            os.ftruncate(self._file, self.size)
            self._torn = False
            raise
        self.size += len(data)

    def _note_move(self, move: Move, data: bytes) -> None:
        """Says in .source, durably, what is about to be appended. Nothing is changed if that fails."""
        end = self.size + len(data)
        part, (_, identity) = self.state.part, self.state.spans[-1]
        files = self.sources.get(move.source, ())
        before = files[move.index] if move.index < len(files) else None
        chunk = Chunk(move.source, move.index, before, identity, part, self.size, end, zlib.crc32(data))
        mark = Mark(move.after.offset, move.crc, part, self.size, end, int(bool(move.after.begun)))
        state = move.after.with_mark(mark)
        files = (*files[: move.index], state, *files[move.index + 1 :])
        self._write_sources(self.sources | {move.source: files}, chunk=chunk)

    def keep_files_of(self, source: str, files: Sequence[FileState]) -> None:
        """Which files a source consists of now. Nothing is changed if that fails. Raises OSError, DiskFailure."""
        with self._mutex:
            known = self.sources.get(source, ())
            if known != tuple(files):
                stay = {(one.inode, one.head) for one in files}  # numbers are used again
                lost = [one for one in known if (one.inode, one.head) not in stay and one.marks and not one.base]
                gone = (Finished(one.inode, one.offset, one.marks[-1].crc) for one in lost)
                finished = (*self.finished.get(source, ()), *gone)[-FINISHED_FILES:]
                flush_to_disk(self._file, self.path)
                sources, known_again = self.sources | {source: tuple(files)}, self.finished | {source: finished}
                self._with_room(lambda: self._write_sources(sources, known_again))

    def adopt(self, olds: Sequence[str], source: str) -> None:
        """The files of the old sources, the newest last, are those of this one. Raises OSError, DiskFailure."""
        with self._mutex:
            files = {source: tuple(one for old in olds for one in self.sources.get(old, ()))}
            flush_to_disk(self._file, self.path)
            sources, finished = without(self.sources, olds) | files, without(self.finished, olds)
            self._with_room(lambda: self._write_sources(sources, finished))

    def forget(self, source: str) -> None:
        """It is gone for good. Raises OSError, DiskFailure."""
        with self._mutex:
            flush_to_disk(self._file, self.path)
            self._write_sources(without(self.sources, [source]), without(self.finished, [source]))

    def _write_sources(
        self,
        sources: dict[str, tuple[FileState, ...]],
        finished: dict[str, tuple[Finished, ...]] | None = None,
        chunk: Chunk | None = None,
    ) -> None:
        """Writes .source, and is in that state then. What has not changed is not made a text of again."""
        finished = self.finished if finished is None else finished
        known, texts = self._source_texts, {}
        for name, files in sources.items():
            same = name in known and known[name][0] is files
            texts[name] = known[name] if same else (files, f"{json.dumps(name)}: {as_json(files)}")
        if finished is not self.finished or not self._finished_text:
            self._finished_text = as_json(finished)
        all_files = ", ".join(text for _, text in texts.values())
        text = f'{{"sources": {{{all_files}}}, "chunk": {as_json(chunk)}, "finished": {self._finished_text}}}'
        write_state(f"{self.path}.source", text)
        self.sources, self.finished, self._chunk, self._source_texts = sources, finished, chunk, texts

    # -- delivering: one thread at a time

    def pending(self, count: int) -> list[tuple[str, bytes]]:
        """The next lines to send with their ids, oldest first. Raises OSError, DiskFailure."""
        with self._mutex:  # an append to a full disk may begin a new part
            offset, end, spans = self.acknowledged, self.size, self.state.spans
        flush_to_disk(self._file, self.path)  # else a power cut could take a line whose id is in the database already
        return lines_with_ids(self._file, offset, end, spans, count)

    def acknowledge(self, lines: Sequence[tuple[str, bytes]]) -> None:
        """The next lines, as `pending` gave them, are stored, or noted as refused."""
        with self._mutex:
            self.acknowledged += sum(len(line) + 1 for _, line in lines)
            if self._noted:
                self._noted.difference_update(record_id for record_id, _ in lines)
            self._keep_position(durable=time.monotonic() > self._durable_at + DURABLE_SECONDS)

    def hold(self, record_id: str, line: bytes) -> None:
        """The next line is kept apart, and those behind it go on. Raises OSError, DiskFailure."""
        with self._mutex:
            self.held[record_id] = line
            self.acknowledged += len(line) + 1
            self._keep_position(durable=True)

    def release(self, record_id: str) -> None:
        """A line that was held back is stored, or noted as refused. Raises OSError, DiskFailure."""
        with self._mutex:
            del self.held[record_id]
            self._keep_position(durable=True)

    def note_time(self, seconds: int) -> None:
        """The backend's clock has shown this, so whatever is appended from now on is stored later."""
        with self._mutex:
            times = (*(one for one in self.state.times if one[0] < self.size), (self.size, seconds))
            self.state = replace(self.state, times=times[::2] if len(times) > TIMES else times)

    def make_durable(self, at_once: bool = False) -> None:
        """The position, if it has moved since it was durable, and some seconds ago. Raises DiskFailure."""
        if at_once or time.monotonic() > self._durable_at + DURABLE_SECONDS:
            with self._mutex:
                if self.acknowledged != self._durable:
                    self._keep_position(durable=True)

    def _keep_position(self, durable: bool) -> None:
        """What is held back is in .journal before a position beside it is past that: else it would be lost."""
        self._flush_notes()
        self._update_state()
        if durable or self._durable_held != self.state.held:
            try:
                self._save()
            except OSError:  # a full disk: more is sent again, and stored once all the same
                return
        position = {"identity": self.state.spans[-1][1], "acknowledged": self.acknowledged}
        with suppress(OSError):  # stale is safe
            write_state(f"{self.path}.position", as_json(position), durable=False)

    def _update_state(self) -> None:
        """`state`, as it is now; `head` is what the delivered bytes begin with."""
        head = self.state.head
        if len(head) < KNOWN_BYTES:
            head = os.pread(self._file, min(KNOWN_BYTES, self.acknowledged), 0).decode("latin-1")
        held = tuple((record_id, line.decode("latin-1")) for record_id, line in self.held.items())
        self.state = replace(self.state, acknowledged=self.acknowledged, held=held, head=head)

    def reject(self, record_id: str, line: bytes, reason: str) -> None:
        """Notes a refused line, once. Raises OSError; on disk it is before the position moves past it."""
        if self._rejected >= 0 and not is_at(self._rejected, f"{self.path}.rejected"):
            self._close_rejected()  # somebody has moved it away to read it, or deleted it
        if self._rejected < 0:
            self._open_rejected()
        if record_id in self._noted:
            return
        note = json.dumps({"id": record_id, "reason": reason, "log": line.decode(errors="backslashreplace")})
        with self._mutex:
            self._with_room(lambda: append_whole(self._rejected, note.encode() + b"\n"))
        self._noted.add(record_id)
        self._unflushed_notes = True

    def _open_rejected(self) -> None:
        """What may be refused again is noted among the last ones, if at all."""
        path = f"{self.path}.rejected"
        self._rejected = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        flush_folder(path)
        tail = read_tail(self._rejected, path)
        self._noted |= {name.decode() for name in re.findall(rb'^{"id": "([0-9a-f-]{36})"', tail, re.MULTILINE)}

    def _close_rejected(self) -> None:
        """Without a number that may soon be that of another open file."""
        self._flush_notes()
        os.close(self._rejected)
        self._rejected = -1

    def _flush_notes(self) -> None:
        if self._unflushed_notes:
            flush_to_disk(self._rejected, f"{self.path}.rejected")
            self._unflushed_notes = False

    def _save(self) -> None:
        """Writes .journal, durably. Raises OSError, DiskFailure."""
        write_state(f"{self.path}.journal", as_json(self.state))
        self._saved, self._durable_held = True, self.state.held
        self._durable, self._durable_at = self.state.acknowledged, time.monotonic()

    # -- rotation

    def rotate_if_due(self) -> None:
        """Begins a new LOG_FILE, or .rejected, when the old one is large enough; LOG_FILE when all is delivered."""
        if not self._rotate_bytes:
            return
        try:
            if self.size >= self._rotate_bytes:
                self._checksum(self.acknowledged)  # outside the mutex: a gigabyte takes a second
            with self._mutex:
                if self.size >= self._rotate_bytes and self.acknowledged == self.size:
                    self._rotate()
            if self._rejected >= 0 and os.fstat(self._rejected).st_size >= self._rotate_bytes:
                self._rotate_rejected()
        except OSError as error:
            if not self._said:
                log.warning("%s cannot be rotated: %s; going on with it", self.path, error)
            self._said = True

    def _rotate(self) -> None:
        """The mutex is held, and all of it is delivered. At any moment LOG_FILE is a file that this process has locked.

        First that all is delivered becomes durable: from then on a LOG_FILE that is shorter has nothing that is due.
        With it, how the part will be known, and what its ids are.
        """
        self._update_state()
        if self._keep_files:
            state = self.state
            times = state.times[:: max(1, len(state.times) // TIMES_ROTATED)]
            part = Rotated(self.size, self._checksum(self.size), state.spans, times)
            self.state = replace(state, rotated=(*state.rotated_before, part)[-self._keep_files :])
        self._save()
        file = os.open(f"{self.path}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                os.unlink(f"{self.path}.part")
            os.link(self.path, f"{self.path}.part")  # first, as a file system may have no links
            shift_parts(self.path, self._keep_files)
            if self._keep_files:
                os.replace(f"{self.path}.part", f"{self.path}.1")
            else:
                os.unlink(f"{self.path}.part")
            os.replace(f"{self.path}.new", self.path)
        except OSError:
            os.close(file)
            raise
        os.close(self._file)
        self._file = file
        self._begin_part()
        flush_folder(self.path)
        self._save()
        log.info("%s begins anew; the delivered one has become %s.1", self.path, self.path)

    def _begin_part(self) -> None:
        """In memory, and before the next line on disk: the new file's lines have an identity of their own."""
        floor, self.size, self.acknowledged, self._saved = self.size, 0, 0, False
        self.state = self._next_part(self.state, floor, ((0, new_identity()),))

    def _checksum(self, end: int) -> int:
        """Of all bytes before that; those of the last time, if it was of this part, are not read again."""
        part = self.state.part
        known, start, crc = self._crc
        if known != part:
            start, crc = 0, 0
        crc = crc_of(self._file, start, end, crc) or 0
        self._crc = part, end, crc
        return crc

    def _rotate_rejected(self) -> None:
        """First that the noted lines are done with becomes durable: the new file does not have their ids."""
        path = f"{self.path}.rejected"
        with self._mutex:
            self._flush_notes()
            self._update_state()
            self._save()
        shift_parts(path, self._keep_files)
        if self._keep_files:
            os.replace(path, f"{path}.1")
        else:
            os.unlink(path)
        self._close_rejected()
        self._open_rejected()

    def _with_room(self, write: Callable[[], None]) -> None:
        """The mutex is held. What a full disk does not let it write is tried again once something has given way."""
        try:
            write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room():
                raise
            write()

    def _make_room(self) -> bool:
        """On a full disk delivered lines give way: old parts, the oldest first; then this one. False: none."""
        parts = [(number, path) for path in (self.path, f"{self.path}.rejected") for number in part_numbers(path)]
        if parts:
            number, path = max(parts)
            log.warning("the disk is full: removing %s.%d, which is delivered", path, number)
            os.unlink(f"{path}.{number}")
            return True
        if self.acknowledged < self.size or self.size < MARK_BYTES or not self._rotate_bytes:
            return False
        self._update_state()
        self.state = replace(self.state, rotated=self.state.rotated_before)  # who replays it sees that it is gone
        self._save()  # as in a rotation, and with the same effect after a crash
        log.warning("the disk is full: emptying %s, which is delivered", self.path)
        os.ftruncate(self._file, 0)
        self._begin_part()
        return True


def new_identity() -> str:
    """The first 24 characters of a random UUID, made a version 8 of RFC 9562; neighbouring ids keep the index dense."""
    fresh = str(uuid.uuid4())
    return f"{fresh[:14]}8{fresh[15:24]}"


def check_head(file: int, size: int, path: str, state: JournalState) -> None:
    """Raises Spoilt if a LOG_FILE that is long enough is not the one of that state."""
    if not is_head(file, size, state):
        raise Spoilt(f"{path} is not the journal of which {state.acknowledged} bytes were delivered")


def is_head(file: int, size: int, state: JournalState) -> bool:
    """As a client would take it for the LOG_FILE of that state."""
    head = state.head.encode("latin-1")
    return state.acknowledged <= size and os.pread(file, len(head), 0) == head


def lines_with_ids(file: int, offset: int, end: int, spans: Spans, count: int) -> list[tuple[str, bytes]]:
    """The next lines of a journal with their ids, oldest first, as many as go into a POST."""
    wanted = BATCH_BYTES
    while b"\n" not in (data := os.pread(file, min(wanted, end - offset), offset)) and wanted < end - offset:
        wanted *= 2  # a line that was put there by hand
    due = [*[span for span in spans if span[0] <= offset][-1:], *[span for span in spans if span[0] > offset]]
    lines = []
    for line in data.split(b"\n", count)[:-1]:
        while len(due) > 1 and offset >= due[1][0]:
            del due[0]
        lines.append((f"{due[0][1]}{offset:012x}", line))
        offset += len(line) + 1
    return lines


def is_at(file: int, path: str) -> bool:
    """The open file is the one at that path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def append_whole(file: int, data: bytes) -> None:
    """Appends all of it, or cuts off again what was written of it. Raises OSError."""
    size = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        os.ftruncate(file, size)
        raise


def open_journal(path: str, settings: Settings | None = None) -> Journal:
    """Raises BlockingIOError if another client has it, and what Journal raises."""
    settings = settings or Settings()
    if "%n" in path:
        path, file = locked_numbered(path, settings.sources)
    else:
        path = os.path.realpath(path) if os.path.islink(path) else path
        file = locked(path)
    return Journal(path, file, settings.rotate_bytes, settings.keep_files)


def locked(path: str) -> int:
    """The open file, whose lock nobody else has while we live. Raises BlockingIOError."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "not a regular file", path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # rotated away, as below
        except BlockingIOError:
            os.close(file)
            raise
        os.close(file)  # its client rotated it between our two steps, and has the lock of the new one


def locked_numbered(path: str, sources: Sequence[str]) -> tuple[str, int]:
    """The first of %n = 1, 2, 3... that no other client has, and that has no state of other sources.

    A journal that has state of these sources is the only one that may follow them. Raises BlockingIOError, Spoilt.
    """

    def belongs(name: str) -> list[bool]:
        """For each source that it has state of, whether it is one of ours."""
        known = read_source_state(f"{name}.source").sources
        return [any(covers(source, one) for source in sources) for one in known]

    names = (path.replace("%n", str(number)) for number in itertools.count(1))
    for name in itertools.takewhile(os.path.exists, names):
        if any(belongs(name)):
            return name, locked(name)
    for number in itertools.count(1):
        name = path.replace("%n", str(number))
        with suppress(BlockingIOError):
            file = locked(name)
            if not belongs(name):
                return name, file
            os.close(file)
    raise AssertionError("there is always one more number")


# ---- Sources --------------------------------------------------------------------------------------------------------

NUMBERED = re.compile(r"[._-](?:[0-9][0-9A-Za-z:.+_-]*|old)")  # what a rotation puts behind a name
SHORT_NUMBER = re.compile(r"[_-](?!(?:19|20)[0-9]{2}-?[01][0-9])[0-9]{1,5}(?![0-9])")  # no date, no seconds
DATED = re.compile(r"[._-](?:19|20)[0-9]{2}-?[01][0-9][0-9A-Za-z:.+_-]*")  # or before its ending
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip")  # the first of them can be read
SECOND = 10**9  # nanoseconds; what compresses a file may leave it a time stamp of whole seconds


@dataclass(frozen=True)
class Move:
    """Bytes of a followed file that become lines of the journal."""

    source: str
    index: int  # of the file among those of its source
    after: FileState  # without their mark
    crc: int  # of the file's bytes from the state's base on


class Read(NamedTuple):
    """What came of a file: its lines, and the bytes that they are; of more than a chunk only how many."""

    lines: list[bytes]
    length: int
    data: bytes = b""
    begun: Begun = ()


class OpenFile:
    """A file of a source, open at the place up to which it was read."""

    def __init__(self, file: int, state: FileState, final: bool = False) -> None:
        self.file = file
        self.state = state
        self.final = final  # a decompressed copy: nothing is appended to it
        self.replaces = False  # the file before it was deleted when this one came
        self.quiet_since = float("inf")  # seen with a newer file in its place, and with nothing new
        self._scanned = 0  # bytes behind the offset that are part of an overlong line, or NULs
        self._zeros = False

    def read(self, parser: Parser) -> Read | None:
        """The next chunk of whole lines; None if there is nothing new. Raises OSError."""
        quiet = time.monotonic() - self.quiet_since
        ended = self.final or quiet > UNTERMINATED_SECONDS
        if self._scanned:
            return self._scan(parser, ended)
        data = os.pread(self.file, CHUNK_BYTES, self.state.offset)
        end = data.rfind(b"\n") + 1
        if not end and ended and len(data) < CHUNK_BYTES:
            end = len(data)
        if end:
            pieces = Pieces(self.state.begun)
            return Read(parser.lines(data[:end], pieces), end, data[:end], pieces.begun)
        zeros = len(data) - len(data.lstrip(b"\0"))
        if 0 < zeros < len(data):
            parser.skipped(zeros)
            return Read([], zeros, data[:zeros], self.state.begun)
        if len(data) < CHUNK_BYTES:
            return None
        self._scanned, self._zeros = len(data), zeros > 0
        return Read([], 0)

    def close(self) -> None:
        os.close(self.file)

    @property
    def is_deleted(self) -> bool:
        return not self.final and not os.fstat(self.file).st_nlink

    def _scan(self, parser: Parser, ended: bool) -> Read | None:
        """Goes on in a line that is longer than a chunk, or in NULs, which may yet become something else."""
        start = self.state.offset
        first = os.pread(self.file, OVERLONG_BYTES, start)
        if self._zeros and not first.startswith(b"\0"):
            self._scanned = 0
            return Read([], 0)
        data = os.pread(self.file, CHUNK_BYTES, start + self._scanned)
        end = len(data) - len(data.lstrip(b"\0")) if self._zeros else data.find(b"\n") + 1
        over = end < len(data) if self._zeros else end > 0
        if over or (ended and not data):
            length, self._scanned = self._scanned + end, 0
            if self._zeros:
                parser.skipped(length)
            return Read([] if self._zeros else [overlong(first, length)], length, begun=self.state.begun)
        self._scanned += len(data)
        return Read([], 0) if data else None

    def after(self, got: Read, modified: int) -> tuple[FileState, int]:
        """Its state behind what was read, without the mark, and the checksum for that. Raises OSError."""
        state = self.state
        end = state.offset + got.length
        crc = state.marks[-1].crc if state.marks else 0
        if got.data:
            crc = zlib.crc32(got.data, crc)
            tail = (state.tail.encode("latin-1") + got.data)[-KNOWN_BYTES:]
        else:
            crc = crc_of(self.file, state.offset, end, crc) or 0
            tail = os.pread(self.file, KNOWN_BYTES, max(0, end - KNOWN_BYTES))
        head = (state.head + got.data[:KNOWN_BYTES].decode("latin-1"))[:KNOWN_BYTES]
        if not got.data or len(state.head) < min(state.offset, KNOWN_BYTES):  # of the version before: not known
            head = os.pread(self.file, min(end, KNOWN_BYTES), 0).decode("latin-1")
        known = replace(state, head=head, tail=tail.decode("latin-1"), head_crc=0)
        return replace(known, offset=end, modified=modified, begun=got.begun), crc


def is_same(file: int, state: FileState) -> bool:
    """Is this the file of which so much was read? The bytes decide: at its beginning, and before the offset."""
    if os.fstat(file).st_size < state.offset:
        return False
    if state.head_crc:
        return zlib.crc32(os.pread(file, min(KNOWN_BYTES, state.offset), 0)) == state.head_crc
    head, tail = state.head.encode("latin-1"), state.tail.encode("latin-1")
    same = os.pread(file, len(head), 0) == head
    return same and os.pread(file, len(tail), state.offset - len(tail)) == tail


def parted(file: int, state: FileState, journal: Journal, parser: Parser) -> FileState:
    """The state at the place where a file ceases to be what was read of it: after a power cut, or an edit.

    By the checksums of the marks, then line by line against what the journal has of it. A file whose first line is
    another one was truncated or replaced: its state is that of one of which nothing was read.
    """
    status = os.fstat(file)
    fresh = FileState(status.st_ino, state.path, modified=status.st_mtime_ns)
    first = (state.head.encode("latin-1").partition(b"\n")[0] + b"\n")[:KNOWN_BYTES]
    if not state.head or status.st_size < state.base or os.pread(file, len(first), 0) != first:
        return fresh
    kept, offset, crc = 0, state.base, 0
    for number, mark in enumerate(state.marks, 1):
        if (found := crc_of(file, offset, mark.offset, crc)) != mark.crc:
            break
        offset, crc = mark.offset, mark.crc
        kept = kept if mark.open else number
    rest, pieces = state.marks[kept:], Pieces()
    lines = itertools.chain.from_iterable(map(journal.lines_of, rest))
    offset = state.marks[kept - 1].offset if kept else state.base
    here = rest[0].journal if rest else 0
    for raw in raw_lines(file, offset):
        begun = pieces.begun
        again = parser.same_lines(raw, pieces)
        if again and again != list(itertools.islice(lines, len(again))):
            pieces = Pieces(begun)
            break
        here += sum(len(line) + 1 for line in again)
        offset += len(raw)
    state = replace(state.back_to(kept), offset=offset, inode=fresh.inode, head=state.head[:offset], begun=pieces.begun)
    if rest and offset > (state.marks[-1].offset if state.marks else 0):
        found = crc_of(file, state.base, offset) or 0
        state = state.with_mark(Mark(offset, found, rest[0].part, rest[0].journal, here, int(bool(pieces.begun))))
    return replace(state, tail=os.pread(file, min(KNOWN_BYTES, offset), max(0, offset - KNOWN_BYTES)).decode("latin-1"))


def copied_bytes(file: int, one: OpenFile) -> int:
    """How much of a file was copied from one that is read anyway, and is gone: all that both have, or nothing.

    If that one is still there, under a name of the rotation, files may well be equal that are no copies.
    """
    both = min(os.fstat(file).st_size, os.fstat(one.file).st_size) if one.is_deleted else 0
    return both if crc_of(file, 0, both) == crc_of(one.file, 0, both) else 0


def missed_since(known: Sequence[FileState], found: Sequence[OpenFile | None], newest: FileState) -> FileState | None:
    """The file since which others may have been missed: nothing was read of it, so its content does not tell it."""
    unread = [state for state, one in zip(known[:-1], found, strict=False) if not one and not state.offset]
    if known and not newest.offset:
        unread.append(known[-1])
    since = min(unread, key=lambda state: state.modified, default=None)
    return since if since and since.modified else None


def raw_lines(file: int, offset: int) -> Iterator[bytes]:
    """The whole lines of a file from there on, with their ends."""
    while end := (data := os.pread(file, CHUNK_BYTES, offset)).rfind(b"\n") + 1:
        yield from data[:end].splitlines(keepends=True) if b"\r" not in data else re.findall(rb"[^\n]*\n", data[:end])
        offset += end


def covers(source: str, path: str) -> bool:
    """A source, or a pattern of sources, has that file."""
    return source == path or bool(re.fullmatch(glob_expression(source), path))


def glob_expression(pattern: str) -> str:
    parts = {"*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part) or (part if part[0] == "[" and len(part) > 2 else re.escape(part))
                   for part in re.findall(r"\[[^\]]+\]|.", pattern, re.DOTALL)).replace("[!", "[^")  # fmt: skip


@functools.lru_cache(maxsize=4096)
def bases_of(path: str) -> tuple[str, ...]:
    """What the file may have been called before a rotation put a number, a date or .gz behind its name."""
    folder, name = os.path.split(path)
    plain = name.removesuffix(next(filter(name.endswith, COMPRESSED), ""))
    places = [found.start() for found in re.finditer("[._-]", plain)]
    bases = [plain[:n] for n in places if n and is_numbered(plain, plain[:n])]
    return tuple(os.path.join(folder, base) for base in (*bases, *([plain] if plain != name else [])))


def is_numbered(name: str, base: str) -> bool:
    """A rotation has made that name of `base`. Behind one without an ending a short number after - or _ says nothing of
    the kind: worker-2 and web-01.example.com are files of their own beside worker and web."""
    if not name.startswith(base) or not NUMBERED.fullmatch(name, len(base)):
        return False
    return "." in base or not SHORT_NUMBER.match(name, len(base))


def suffix_of(path: str, base: str) -> str | None:
    """What a rotation put behind the name of `base`, or before its ending; None if the file is no part of it.

    access.log.1, access.log-20260101.gz and, with its date inside, access-20260101.log are parts of access.log.
    """
    (folder, name), (base_folder, base_name) = os.path.split(path), os.path.split(base)
    stem, dot, ending = base_name.partition(".")
    if folder != base_folder or not name.startswith(stem):
        return None
    plain = name.removesuffix(next(filter(name.endswith, COMPRESSED), ""))
    if is_numbered(plain, base_name) or base_name == plain != name:
        return plain[len(base_name) + 1 :]
    inside = plain.removesuffix(dot + ending)
    return inside[len(stem) + 1 :] if DATED.fullmatch(inside, len(stem)) else None


def is_rotated(path: str, base: str) -> bool:
    return suffix_of(path, base) is not None


def in_order(members: Iterable[tuple[int, str, str, int]]) -> list[tuple[int, str, int]]:
    """The oldest first, from (time stamp, suffix, path, inode): numbers count up with age, dates go with time.

    Time stamps tell where the names do not; one that was compressed may have any.
    """
    known = sorted(members)
    if all(re.fullmatch("[0-9]{1,4}", suffix) for _, suffix, _, _ in known):
        known.sort(key=lambda one: -int(one[1]))
    elif all(re.match("(19|20)[0-9]{2}|[0-9]{9}", suffix) for _, suffix, _, _ in known):
        known.sort(key=lambda one: one[1])
    return [(modified, path, inode) for modified, _, path, inode in known]


def open_regular(path: str) -> int:
    """Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


def open_member(path: str, head: bytes = b"") -> tuple[int, bool]:
    """A file of a source's rotation, and whether it is a decompressed copy.

    Raises OSError, EOFError, zlib.error; ValueError for a compressed one that begins otherwise, which is soon seen.
    """
    if not path.endswith(".gz"):
        return open_regular(path), False
    with gzip.open(path) as packed, tempfile.TemporaryFile() as unpacked:
        if head and packed.read(len(head)) != head:
            raise ValueError("another file")
        packed.seek(0)
        shutil.copyfileobj(packed, unpacked)
        unpacked.flush()
        return os.dup(unpacked.fileno()), True


class Rotation:
    """What there is of a rotation's files beside the one at the path, whatever it is called by now.

    What decides whether a file is one that was read is its content:
      * renamed: it has the inode, and at its beginning and before the offset the bytes that were read
      * copied and truncated, or compressed: these bytes, under another inode, and in a name that a rotation makes
      * compressed after it was read: the size and checksum of one that was deleted, or is not looked at any more
      * never seen, as there were two rotations between two looks: its name, and that it is newer than the last one
    """

    def __init__(self, path: str, journal: Journal) -> None:
        self.path = path
        self._journal = journal
        self._told: set[str] = set()  # files that cannot be read

    def open_at_path(self) -> OpenFile:
        file = open_regular(self.path)
        try:
            return OpenFile(file, self._state_of(file, os.path.realpath(self.path)))
        except OSError:
            os.close(file)
            raise

    def find(self, state: FileState, taken: set[int], by_inode: bool = False) -> OpenFile | None:
        """The file of that state, by its inode or, copied or compressed, by its content alone."""
        head = state.head.encode("latin-1")
        is_packed = state.path.endswith(COMPRESSED)
        for _ in range(2):  # a rename may hide it from one look
            for modified, path, inode in self._candidates(state):
                same = inode == state.inode and path.endswith(COMPRESSED) == is_packed  # numbers are used again
                by_content = not by_inode and state.offset and (state.head or state.head_crc)
                if inode in taken or not (same or by_content):
                    continue
                try:
                    file, final = open_member(path, head)
                except (OSError, EOFError, zlib.error, ValueError):  # gone again, or not readable: it is not found
                    continue
                size = os.fstat(file).st_size
                another = state.left_at and not state.offset and size and modified != state.modified
                if is_same(file, state) and not another:  # it was empty: by its time it is read in the right order
                    return OpenFile(file, replace(state, inode=inode, path=path), final)
                os.close(file)
        return None

    def members_since(
        self, state: FileState, known: Sequence[OpenFile], until: float = float("inf")
    ) -> list[tuple[int, str, int]]:
        """Time stamps, paths and inodes of the rotation's files that are newer than this one, and not known."""
        found, inodes = [], {one.state.inode for one in known}
        since = state.modified + (not state.offset)  # time stamps are coarse: one that was never read is newer than all
        for entry in self._entries(state):
            with suppress(FileNotFoundError):
                status = entry.stat()
                packed = entry.name.endswith(COMPRESSED)
                newer = (since // SECOND * SECOND if packed else since) <= status.st_mtime_ns <= until
                unknown = status.st_ino not in inodes
                suffix = self._suffix(entry.path, state) if newer and unknown and entry.is_file() else None
                if suffix is not None:
                    found.append((status.st_mtime_ns, suffix, entry.path, status.st_ino))
        return in_order(found)

    def opened(self, members: Sequence[tuple[int, str, int]], known: Sequence[OpenFile]) -> list[OpenFile]:
        """Those that were never the newest when we looked, and were not read either, in their order. Raises OSError."""
        read = [(one.size, one.crc) for one in self._journal.finished.get(self.path, ())]
        for one in known if any(path.endswith(".gz") for _, path, _ in members) else ():
            if one.is_deleted:
                size = os.fstat(one.file).st_size
                read.append((size, crc_of(one.file, 0, size) or 0))
        opened = (self._open_between(*one, read, known) for one in members)
        return [one for one in opened if one]

    def _state_of(self, file: int, path: str) -> FileState:
        """Of one that nobody looks at. It may have been read before: a link was switched back, or it was touched."""
        status = os.fstat(file)
        fresh = FileState(status.st_ino, path, modified=status.st_mtime_ns)
        for one in reversed(self._journal.finished.get(self.path, ())):
            if one.inode == status.st_ino and crc_of(file, 0, one.size) == one.crc:
                return replace(fresh, offset=one.size, base=one.size)
        return fresh

    def _candidates(self, state: FileState) -> list[tuple[int, str, int]]:
        """Time stamps, paths and inodes: any file of that inode first; then what may be a copy, the oldest first.

        A copy is newer than what was read, by the time stamp that it may have kept, to the second. What has compressed
        it may have left any: those come last.
        """
        found = []
        for entry in self._entries(state):
            with suppress(FileNotFoundError):
                inode, modified = entry.stat().st_ino, entry.stat().st_mtime_ns
                older = modified < state.modified // SECOND * SECOND
                member = self._suffix(entry.path, state) is not None
                copied = member and (not older or entry.name.endswith(".gz"))
                copied |= entry.path == os.path.realpath(self.path)
                ours = self._journal.owns(entry.path)  # plain lines are the same there
                if entry.is_file() and not ours and (inode == state.inode or copied):
                    found.append((inode != state.inode, older, modified, entry.path, inode))
        return [(modified, path, inode) for *_, modified, path, inode in sorted(found)]

    def _entries(self, state: FileState) -> list[os.DirEntry[str]]:
        """Where its files may be: beside the target of a link, of today's and of that time's."""
        paths = (state.path or self.path, os.path.realpath(self.path), self.path)
        folders = dict.fromkeys(os.path.realpath(os.path.dirname(path) or ".") for path in paths)
        return [entry for folder in folders if os.path.isdir(folder) for entry in os.scandir(folder)]

    def _suffix(self, path: str, state: FileState) -> str | None:
        """What a rotation put behind a name that this source has, or had; None if it is no part of it."""
        names = {os.path.basename(one) for one in (self.path, os.path.realpath(self.path), state.path) if one}
        found = (suffix_of(path, os.path.join(os.path.dirname(path), name)) for name in sorted(names, key=len))
        return next((suffix for suffix in found if suffix is not None), None)

    def _open_between(
        self, modified: int, path: str, inode: int, read: list[tuple[int, int]], known: Sequence[OpenFile]
    ) -> OpenFile | None:
        """`read` has size and checksum of files that are known: each may have become one compressed one since then."""
        plain = path.removesuffix(next(filter(path.endswith, COMPRESSED), ""))
        if plain != path and os.path.exists(plain):
            return None
        if path.endswith(COMPRESSED[1:]):
            self._tell_unreadable(path, "it is compressed")
            return None
        try:
            file, final = open_member(path)
        except (OSError, EOFError, zlib.error) as error:
            self._tell_unreadable(path, str(error))
            return None
        size = os.fstat(file).st_size
        if final and size in dict(read) and (one := (size, crc_of(file, 0, size) or 0)) in read:
            read.remove(one)
            os.close(file)
            return None
        state = FileState(inode, path, modified=modified) if final else self._state_of(file, path)
        copied = max((copied_bytes(file, one) for one in known if not final), default=0)
        if copied > state.offset:
            state = replace(state, offset=copied, base=copied)
        return OpenFile(file, state, final)

    def _tell_unreadable(self, path: str, why: str) -> None:
        if path not in self._told:
            self._told.add(path)
            log.error("%s: %d bytes of it in %s cannot be read (%s); unpack them and deliver them with SOURCE=-",
                      self.path, os.path.getsize(path), path, why)  # fmt: skip


class FollowedFile:
    """One path of SOURCE: the file that is there, those that were renamed from there, and whatever becomes of them.

    Files of a rotation are read in their order: a newer one when the one before has been quiet. A renamed one stays
    open for an hour, as its writer may go on. One that is no longer what was read of it is read on where the two part,
    and what is gone is said.
    """

    def __init__(self, path: str, journal: Journal, pattern: str = "") -> None:
        self.path = path
        self.files: list[OpenFile] = []  # the newest last
        self.outage = Outage(f"SOURCE {path}", "cannot be followed")
        self._journal = journal
        self._rotation = Rotation(path, journal)
        self._parser = Parser(path, pattern)
        self._syncs = True
        self._gone_since = float("inf")

    def step(self) -> bool:
        """Moves one chunk of lines into the journal; False if there is nothing new. Raises OSError, DiskFailure."""
        if not self.files:
            self.open()
        unseen = None
        try:
            self._look_for_newer()  # before the reading: what is written until then is read
        except OSError as error:  # of a file that cannot be opened; the others are read all the same
            unseen = error
        self._keep()  # once more, if the disk was full
        for index, one in enumerate(self.files):
            if self._move(index):
                one.quiet_since = self._gone_since = float("inf")
                return True
            if not self._is_over(index):
                break
        self._forget_old()
        if unseen:
            raise unseen
        return False

    def _is_over(self, index: int) -> bool:
        """With nothing new in it, it is the next one's turn. The writer of the one that was renamed last may go on."""
        one, behind = self.files[index], len(self.files) - 1 - index
        if not behind:
            return True
        now = time.monotonic()
        one.quiet_since = min(one.quiet_since, now)
        if behind == 1 and not one.final and now - one.quiet_since <= ROTATED_SECONDS:
            return False
        following = self.files[index + 1]
        if not following.state.offset:
            self._begin(one, following)
        elif one.state.begun and now - one.quiet_since > UNTERMINATED_SECONDS:
            self._give_up_pieces(index)
        return True

    def _begin(self, one: OpenFile, following: OpenFile) -> None:
        """Before a file is read: what it shares with the one before it, which was read to its end. Raises OSError."""
        state = following.state
        found = parted(following.file, one.state, self._journal, self._parser) if following.replaces else None
        if found and found.offset:  # an edited copy of it, as sed -i makes one
            state = replace(found, path=state.path, left_at=state.left_at)
            self._say_parted(one.state, state)
        elif one.state.begun:  # a container's log was rotated in the middle of a line
            state = replace(state, begun=one.state.begun)
            one.state = replace(one.state, begun=())
        if state != following.state:
            following.state = state
            self._keep()

    def _give_up_pieces(self, index: int) -> None:
        """Lines whose ends never came are noted as refused. Raises OSError, DiskFailure."""
        state, pieces = self.files[index].state, Pieces(self.files[index].state.begun)
        crc = state.marks[-1].crc if state.marks else 0
        self._journal.append(pieces.given_up(), Move(self.path, index, replace(state, begun=()), crc))
        self.files[index].state = self._journal.sources[self.path][index]

    def _move(self, index: int) -> bool:
        """The file is checked after the reading: a truncated one may have grown past the offset until then.

        What was read is what followed the offset if the bytes before that are the same afterwards.
        """
        one = self.files[index]
        modified = one.state.modified if one.final else os.fstat(one.file).st_mtime_ns
        got = one.read(self._parser)
        if got and got.length:
            if self._syncs and not one.final:
                self._flush(one)
            after, crc = one.after(got, modified)
            if not is_same(one.file, one.state):
                self._part(index)
            else:
                self._journal.append(got.lines, Move(self.path, index, after, crc))
                one.state = self._journal.sources[self.path][index]
        elif got is None and not is_same(one.file, one.state):
            self._part(index)
            return True
        return got is not None

    def _flush(self, one: OpenFile) -> None:
        """What is in the journal must not be gone from the source after a power cut. Raises DiskFailure."""
        try:
            os.fsync(one.file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):
                raise DiskFailure(f"{one.state.path} could not be flushed to disk ({error})") from error
            self._syncs = False  # a file system that has nothing to flush

    def _part(self, index: int) -> None:
        """A file is no longer what was read of it. If a copy of that is beside it, that is read to its end first."""
        one = self.files[index]
        if copy := self._rotation.find(one.state, {other.state.inode for other in self.files}):
            copy.state = replace(copy.state, left_at=time.time())
            status = os.fstat(one.file)
            fresh = FileState(status.st_ino, one.state.path, modified=status.st_mtime_ns)
            self.files[index : index + 1] = [copy, OpenFile(one.file, fresh)]
            log.warning("%s was truncated after it had been copied; reading on in the copy", self.path)
        else:
            state = parted(one.file, one.state, self._journal, self._parser)
            self.files[index] = OpenFile(one.file, state, one.final)
            self._say_parted(one.state, state)
        self._keep()

    def _say_parted(self, before: FileState, after: FileState) -> None:
        if after.offset:
            log.warning("%s is not what was read of it beyond byte %d of %d; reading on there",
                        self.path, after.offset, before.offset)  # fmt: skip
        else:
            log.warning("%s was truncated or replaced: reading it from its beginning; %d bytes of what was there were"
                        " read; if there were more, these are lost", self.path, before.offset)  # fmt: skip

    def _keep(self) -> None:
        self._journal.keep_files_of(self.path, [one.state for one in self.files])

    # -- which files there are

    def open(self) -> None:
        """Those that were followed last, under whatever name, else the one at the path. Raises OSError, DiskFailure."""
        known = self._journal.sources.get(self.path, ())
        found: list[OpenFile | None] = [None] * len(known)
        for by_inode in (True, False):  # first, so that none takes another one's file for a copy of its own
            for n, state in enumerate(known):
                taken = {one.state.inode for one in found if one}
                found[n] = found[n] or self._rotation.find(state, taken, by_inode)
        files, between = [one for one in found if one], []
        try:
            if not known:
                files = [self._rotation.open_at_path()]
            elif not found[-1]:
                files.append(self._changed(known[-1]))
            if since := missed_since(known, found, files[-1].state):
                members = self._rotation.members_since(since, files, until=self._modified(files[-1]))
                files[-1:-1] = between = self._rotation.opened(members, files)
            unread = [state for state, one in zip(known, found, strict=True)
                      if not state.offset and one in (None, files[-1])]  # fmt: skip
            if between and (begun := next((state.begun for state in unread if state.begun), ())):
                files[-1].state = replace(files[-1].state, begun=())  # these lines go on in the oldest one
                between[0].state = replace(between[0].state, begun=begun)
        except OSError:
            for one in files:
                one.close()
            raise
        for state, is_there in zip(known, found, strict=True):
            if is_there or (between and not state.offset):
                continue
            newest = files[-1].state
            if state is known[-1] and (newest.offset or newest.inode == state.inode):
                self._say_parted(state, newest)
            else:
                self._say_gone(state)
        self.files = files
        self._keep()

    def _modified(self, newest: OpenFile) -> float:
        """What is newer than this file follows it, if it was renamed; nothing does if it is still in its place."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(newest.file)):
                return float("inf")
        return newest.state.modified if newest.final else os.fstat(newest.file).st_mtime_ns

    def _changed(self, state: FileState) -> OpenFile:
        """The newest file is not there as it was: what is at the path goes on from where they part. Raises OSError."""
        at_path = self._rotation.open_at_path()
        parting = parted(at_path.file, state, self._journal, self._parser)
        if parting.offset:
            at_path.state = replace(parting, path=at_path.state.path)
        return at_path

    def _say_gone(self, state: FileState) -> None:
        begun = sum(length for _, _, length in state.begun)
        log.warning(
            "%s: the file that was at %s is gone; %d bytes of it were read; if there were more, these are lost%s",
            self.path,
            state.path or self.path,
            state.offset,
            f", and so are {begun} of them, of a line that had not ended" if begun else "",
        )

    def _look_for_newer(self) -> None:
        """Another file is at the path: it, and those that were there between, follow the newest one. Raises OSError."""
        newest = self.files[-1]
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(newest.file)):
                return
            at_path = self._rotation.open_at_path()
        except FileNotFoundError:  # renamed, and the new one is not there yet
            return
        modified = newest.state.modified or os.fstat(newest.file).st_mtime_ns
        try:
            members = self._rotation.members_since(replace(newest.state, modified=modified), [*self.files, at_path])
            between = self._rotation.opened(members, [*self.files, at_path])
        except OSError:
            at_path.close()
            raise
        at_path.replaces = newest.is_deleted and not members  # else it may have been compressed
        status = os.fstat(at_path.file)
        if back := [one for one in self.files if os.path.samestat(os.fstat(one.file), status)]:
            at_path.close()  # renamed, or linked, to there again
            at_path = back[0]
            at_path.state, at_path.quiet_since = replace(at_path.state, left_at=0.0), float("inf")
            self.files.remove(at_path)
        now = time.time()
        for one in (newest, *between):
            one.state = replace(one.state, left_at=now)
        self.files += [*between, at_path]
        self._forget_old()

    def _forget_old(self) -> None:
        """A renamed file is closed after an hour; also at once if the clock was set back, as it has been quiet.

        Sooner if it is a decompressed copy, or if there are many: each takes a descriptor, and a deleted one its space.
        """
        now, quiet_since = time.time(), time.monotonic() - UNTERMINATED_SECONDS
        many = len(self.files) - 1 - WATCHED_FILES

        def stays(n: int, one: OpenFile) -> bool:
            if one.quiet_since == float("inf") or one.state.begun:
                return True
            watched = 0 <= now - one.state.left_at <= WATCHED_SECONDS
            return watched and not one.final and (n >= many or one.quiet_since > quiet_since)

        stay = [one for n, one in enumerate(self.files[:-1]) if stays(n, one)]
        for one in self.files[:-1]:
            if one not in stay:
                one.close()
        self.files[:-1] = stay
        self._keep()

    def is_gone(self) -> bool:
        """For an hour there has been nothing at its path, and what was there is deleted and has been quiet."""
        if not self.files or os.path.exists(self.path) or not all(one.is_deleted or one.final for one in self.files):
            self._gone_since = float("inf")
            return False
        self._gone_since = min(self._gone_since, time.monotonic())
        return time.monotonic() - self._gone_since > WATCHED_SECONDS

    def close(self) -> None:
        for one in self.files:
            one.close()


class Sources:
    """All files that SOURCE names, now and later."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        """Raises SystemExit if one of them is the journal, BlockingIOError if another client follows one of them."""
        self._settings = settings
        self._journal = journal
        self._followed: dict[str, FollowedFile] = {}
        self._claims: dict[str, socket.socket] = {}
        self._told: set[str] = set()  # patterns that match nothing, and journals of other clients
        self._looked_at = float("-inf")
        for path in settings.sources:
            if self._journal.owns(path):
                refuse(f"SOURCE {path} is LOG_FILE {journal.path}: lines would go round in circles")
        self.look()

    def look(self) -> None:
        """Follows files that have come, and leaves those that are gone. Raises OSError, DiskFailure.

        BlockingIOError if another client follows one. access.log.1 is a part of access.log, also where both are named,
        or where there was no access.log yet: what was followed under the one name belongs to the other one.
        """
        if time.monotonic() < self._looked_at + GLOB_SECONDS:
            return
        self._looked_at = time.monotonic()
        paths = {path for source in self._settings.sources for path in self._matching(source)}
        numbered = {path: [base for base in bases_of(path) if base in paths] for path in sorted(paths)}
        new = sorted(paths.difference(self._followed), key=lambda path: (not numbered[path], path))  # .1 first
        followed_now = {os.path.realpath(path) for path in self._followed} if new else set()
        for path in new:
            real, known = os.path.realpath(path), self._journal.sources
            is_read = path not in known and any(base in known for base in numbered[path])
            if not (real in followed_now or is_read or self._journal.owns(path)):  # a link and its target are one
                self._follow(path)
                followed_now.add(real)
        for path, followed in list(self._followed.items()):
            if path not in self._settings.sources and followed.is_gone():
                self._journal.forget(path)
                self._leave(path)

    def _follow(self, path: str) -> None:
        """Raises OSError, DiskFailure."""
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # of its folder: `step` says so
            self._claim(path)
        self._adopt_old_state(path)
        parts = [part for part in self._followed if path in bases_of(part)]
        if parts and path not in self._journal.sources:
            for part in parts:
                if not self._followed[part].files:
                    with suppress(FileNotFoundError):
                        self._followed[part].open()
            read = [part for part in parts if part in self._journal.sources]
            self._journal.adopt(sorted(read, key=lambda part: self._journal.sources[part][-1].modified), path)
            for part in parts:
                self._leave(part)
        self._followed[path] = FollowedFile(path, self._journal, self._settings.source_pattern)

    def _claim(self, path: str) -> None:
        """Before a file is opened; where its folder comes later, not before that. Raises OSError, BlockingIOError."""
        if path not in self._claims:
            self._claims[path] = claimed(path)

    def _leave(self, path: str) -> None:
        self._followed.pop(path).close()
        if claim := self._claims.pop(path, None):
            claim.close()

    def _matching(self, source: str) -> list[str]:
        """Without what a rotation made of another one of them: that is read as part of that one."""
        if not glob.has_magic(source):
            return [source]
        paths = [path for path in sorted(glob.glob(source)) if os.path.isfile(path) and not path.endswith(COMPRESSED)]
        if not paths and source not in self._told:
            self._told.add(source)
            log.warning("SOURCE %s matches no file; waiting", source)
        known = {*self._followed, *self._journal.sources}
        status = [os.fstat(one.file) for followed in self._followed.values() for one in followed.files]
        here, opened = {*paths, *known}, {(one.st_dev, one.st_ino) for one in status}
        return [
            path for path in paths if path in known or not (self._is_part(path, here, opened) or self._is_journal(path))
        ]

    def _is_part(self, path: str, paths: set[str], opened: set[tuple[int, int]]) -> bool:
        """A rotation made it: it is open already, or has such a name, or one with a date and is older than a source."""
        try:
            status = os.stat(path)
        except FileNotFoundError:  # renamed, or deleted, since it was seen
            return True
        if (status.st_dev, status.st_ino) in opened or any(base in paths for base in bases_of(path)):
            return True
        for base in self._journal.sources if DATED.search(path) else ():
            if is_rotated(path, base):
                states, finished = self._journal.sources[base], self._journal.finished.get(base, ())
                inodes = {*(one.inode for one in states), *(one.inode for one in finished)}
                if status.st_ino in inodes or status.st_mtime_ns <= modified_at(base, states):
                    return True
        return False

    def _is_journal(self, path: str) -> bool:
        """Another client's, or beside it: lines would be stored twice."""
        journal = next((name for name in journal_names(path) if os.path.exists(f"{name}.journal")), "")
        if not journal or self._journal.owns(path):
            return False
        if journal not in self._told:
            self._told.add(journal)
            log.warning("SOURCE: %s is the journal of another client; not following it", journal)
        return True

    def _adopt_old_state(self, path: str) -> None:
        """The version before this one did not say of which source its state is: of the only one, or by inode."""
        states = self._journal.sources.get("", ())
        only = len(self._settings.sources) == 1 and not glob.has_magic(path)
        if states and path not in self._journal.sources and (only or inode_of(path) == states[-1].inode):
            self._journal.adopt([""], path)

    def step(self) -> bool:
        """A chunk of each; False if there is nothing new. One that cannot be read does not hold up the others.

        Raises Spoilt if another client follows one.
        """
        moved = False
        for path, followed in list(self._followed.items()):
            try:
                self._claim(path)
                moved |= followed.step()
                followed.outage.end()
            except BlockingIOError as error:
                raise Spoilt(f"SOURCE {path} is followed by another client") from error
            except OSError as error:
                followed.outage.begin(error)
        return moved


def modified_at(path: str, states: Sequence[FileState]) -> int:
    """When a source was last written to, as far as that is known."""
    with suppress(OSError):
        return os.stat(path).st_mtime_ns
    return max((state.modified for state in states), default=0)


def inode_of(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def claimed(path: str) -> socket.socket:
    """No other client on this machine follows that path while we live: its lines would be stored twice.

    A name in Linux's abstract namespace is freed with the process, whatever ends it, and needs no right to write
    beside the source; a lock on the source itself could stop its writer. Raises BlockingIOError; OSError if its folder
    is not there.
    """
    real = os.path.realpath(path)
    folder = os.stat(os.path.dirname(real))
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if sys.platform == "linux":
        name = os.path.basename(real).encode(errors="surrogateescape")
        address = b"\0log-pipeline %d %d %x " % (folder.st_dev, folder.st_ino, zlib.crc32(name)) + name[-40:]
        try:
            claim.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BlockingIOError(errno.EAGAIN, "is followed by another client", path) from error
            raise
    return claim


def follow(sources: Sources, journal: Journal, stop: threading.Event) -> None:
    """Moves the lines of all sources into the journal until `stop`. A file that is not there yet is waited for."""
    said = ""
    while not stop.is_set():
        try:
            sources.look()
            said = ""
        except BlockingIOError as error:
            raise Spoilt(f"SOURCE {error.filename} is followed by another client") from error
        except OSError as error:  # of a folder that cannot be read, or a full disk
            if said != str(error):
                log.warning("SOURCE: %s; waiting", error)
            said = str(error)
        if journal.rests() or not sources.step():
            stop.wait(POLL_SECONDS)


class Cutter:
    """Cuts a stream into whole lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._overlong = 0  # bytes of a line that is longer than a chunk, as far as they came
        self._first = b""

    def feed(self, data: bytes, ended: bool) -> tuple[list[bytes], bytes]:
        """A note of a line that was too long, if one has ended, and the whole lines behind it."""
        notes = []
        if self._overlong:
            end = data.find(b"\n") + 1 or len(data)
            self._overlong += end
            if data[:end].endswith(b"\n") or ended:
                notes.append(overlong(self._first, self._overlong))
                self._overlong = 0
            data = data[end:]
        self._rest = (self._rest + data).lstrip(b"\0") if not self._rest else self._rest + data
        end = len(self._rest) if ended else self._rest.rfind(b"\n") + 1
        lines, self._rest = self._rest[:end], self._rest[end:]
        if len(self._rest) >= CHUNK_BYTES:
            self._first, self._overlong, self._rest = self._rest[:OVERLONG_BYTES], len(self._rest), b""
        return notes, lines


def read_stdin(journal: Journal, pattern: str, stop: threading.Event) -> None:
    """Moves the lines of standard input into the journal until its end, or until `stop`."""
    cutter, parser, pieces, ended = Cutter(), Parser("standard input", pattern), Pieces(), False
    while not ended and not stop.is_set():
        if journal.rests():
            stop.wait(POLL_SECONDS)
        elif select.select([0], [], [], POLL_SECONDS)[0]:
            try:
                data = os.read(0, CHUNK_BYTES)
            except OSError as error:
                raise Spoilt(f"standard input cannot be read: {error}") from error
            ended = not data
            notes, whole = cutter.feed(data, ended)
            lines = [*notes, *parser.lines(whole, pieces), *(pieces.given_up() if ended else ())]
            append_patiently(journal, lines, stop)


def generate(delay_milliseconds: int, journal: Journal, courier: Courier, stop: threading.Event) -> None:
    """Makes up lines and delivers them until `stop`."""
    while not stop.wait(random.uniform(0, delay_milliseconds / 1000)):
        if not journal.rests():
            append_patiently(journal, [generate_line()], stop)
        courier.deliver()


def append_patiently(journal: Journal, lines: Sequence[bytes], stop: threading.Event) -> None:
    """While the disk does not let it, it is retried, until `stop`."""
    while True:
        try:
            journal.append(lines)
            return journal.outage.end()
        except OSError as error:
            journal.outage.begin(error)
        if stop.wait(POLL_SECONDS):
            return log.error("LOG_FILE %s: still failing at shutdown", journal.path)


# ---- Delivery -------------------------------------------------------------------------------------------------------


class NotDelivered(Exception):
    """All lines of a POST are kept and sent again. `kind` tells one reason of an outage from another."""

    def __init__(self, kind: str, text: str, lasting: bool = False, is_own: bool = False) -> None:
        super().__init__(text)
        self.kind = kind
        self.lasting = lasting  # it may be about one line, for ever: a proxy's or firewall's 4xx
        self.is_own = is_own  # it is in the form of the backend's own errors


class Answer(NamedTuple):
    status: int
    kind: str  # its media type
    body: bytes
    location: str


class Taken(NamedTuple):
    """What the backend says of the lines of a POST; those that it does not name are stored."""

    refused: list[dict[str, Any]]  # for good, with `index` and `reason`
    duplicates: int = 0  # that were stored already


@dataclass
class Held:
    """When a line that is refused on the way is tried again."""

    pause: float
    due: float


class Courier:
    """Sends what is in the journal, in its order. Any thread may call `deliver`; one at a time sends, for all.

    A batch that something on the way refuses again and again (a proxy's 413, a firewall's 403) is halved until it is
    one line: that is held back and tried again with growing pauses, and those behind it go on. Only the backend's own
    answer ends the life of a line. When line after line is refused so, with none accepted between, it is an outage.
    """

    def __init__(self, settings: Settings, journal: Journal | Replay) -> None:
        self._connection = connection_to(settings.url, HTTP_SECONDS)
        self._path = urlsplit(settings.url).path or "/"
        self._headers = headers_for(settings)
        self._journal = journal
        self._batch_size = self._limit = settings.batch_size
        self._turn = threading.Lock()
        self.counts = {name: 0 for name in METRICS if name.endswith("_total")}
        self.delivered_at: float | None = None  # the last time, in seconds since the epoch
        self._backend, self._disk = Outage("backend"), Outage("delivery", "held up")
        self._not_before = 0.0
        self._reasons: set[str] = set()  # of refusals that were said
        self._refusals = 0  # in a row, on the way, of whole batches
        self._failures = 0  # in a row, of what looks like an outage
        self._narrow_until = 0.0  # such a refusal was seen to last: the next one is narrowed down at once
        self._held = {record_id: Held(HELD_SECONDS[0], 0.0) for record_id in journal.held}
        self._in_a_row: dict[str, NotDelivered] = {}  # lines held since the last one that was accepted
        self._deadline = float("inf")
        self._socket: socket.socket | None = None
        self._said_at = self._time_due = time.monotonic()

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
            try:
                self._journal.make_durable()
                if not self._journal.left() or time.monotonic() < self._not_before:
                    return False
                return self._deliver_next()
            except OSError as error:  # the journal's disk; what is sent again is stored once
                self._connection.close()
                self._put_off(self._disk, error, str(error.errno))
                return True

    def _deliver_next(self) -> bool:
        """Raises OSError for the journal's disk, DiskFailure."""
        now = time.monotonic()
        due = next((name for name, held in self._held.items() if held.due <= now), None)
        lines = [(due, self._journal.held[due])] if due else self._journal.pending(self._limit)
        if not lines:
            return False
        kept = self._connection.sock is not None
        try:
            taken = self._send(lines)
        except NotDelivered as error:
            self._connection.close()
            self.counts["posts_retried_total"] += 1
            if due:  # whatever it is now: those that were never sent do not wait for this one
                held = self._held[due]
                held.pause = min(HELD_SECONDS[1], held.pause * 2)
                held.due = time.monotonic() + held.pause * random.uniform(0.75, 1.0)
            closed = kept and error.kind == "connection"  # long ago, perhaps: try a new one
            if not due and (error.lasting or (not closed and self._is_about_these(error))):
                self._narrow(lines, error)
            elif not error.lasting and not closed:
                self._put_off(self._backend, error, error.kind)
            return True
        self._settle(lines, taken, due)
        return True

    # -- what went wrong

    def _put_off(self, outage: Outage, reason: Exception, kind: str) -> None:
        """All lines are kept and sent again, after a pause."""
        self._journal.draining = False
        outage.begin(reason, kind)
        now = time.monotonic()
        self._not_before = now + pause_of(outage.seconds, max(0.0, self._not_before - now))

    def _is_about_these(self, error: NotDelivered) -> bool:
        """It looks like an outage, and lasts, but an empty batch comes through to the backend.

        So do firewalls that close the connection or answer by a page with 200, and what makes a proxy say 502. What the
        backend says itself, too many requests, or for how long to wait, is taken for what it is.
        """
        now = time.monotonic()
        self._failures += 1
        lasts = self._failures >= LASTING_REFUSALS or now <= self._narrow_until
        if not lasts or error.is_own or error.kind in ("429", "503") or self._not_before > now:
            return False
        try:
            self._send([])
        except NotDelivered as answer:
            self._connection.close()
            return answer.is_own and answer.kind == "400"
        return True

    def _narrow(self, lines: Sequence[tuple[str, bytes]], error: NotDelivered) -> None:
        """Whatever is refused on the way: too much at once is sent in parts at once, anything else if it lasts."""
        self._refusals += 1
        now = time.monotonic()
        if error.kind != "413" and self._refusals < LASTING_REFUSALS and now > self._narrow_until:
            return self._put_off(self._backend, error, error.kind)
        self._narrow_until = now + HELD_SECONDS[1]
        if len(lines) > 1:
            self._limit = len(lines) // 2
            return None
        record_id, line = lines[0]
        if sum(map(len, self._journal.held.values())) + len(line) > HELD_BYTES:
            return self._put_off(self._backend, error, error.kind)
        self._journal.hold(record_id, line)
        self._held[record_id] = Held(HELD_SECONDS[0], now + HELD_SECONDS[0])
        self._in_a_row[record_id] = error
        if len(self._in_a_row) > HELD_IN_A_ROW:
            self._put_off(self._backend, error, error.kind)

    def _name_held(self) -> None:
        """A line was accepted, so those that were held before it are refused for what they are."""
        for record_id, error in list(self._in_a_row.items())[:10]:
            log.error("the line at byte %d of the journal (id %s) is refused on the way: %s; holding it back",
                      int(record_id[24:], 16), record_id, error)  # fmt: skip
        if len(self._in_a_row) > 10:
            log.error("and %d lines more", len(self._in_a_row) - 10)
        for record_id in self._in_a_row if len(self._in_a_row) > HELD_IN_A_ROW else ():  # it was an outage
            self._held[record_id].due = 0.0
        self._in_a_row.clear()

    # -- what went right

    def _settle(self, lines: Sequence[tuple[str, bytes]], taken: Taken, held: str | None) -> None:
        """The backend has answered for each of these lines. Raises OSError, DiskFailure."""
        self._backend.end()
        for item in taken.refused:
            record_id, line = lines[item["index"]]
            self._journal.reject(record_id, line, str(item["reason"]))
            self._say_refused(record_id, str(item["reason"]))
        self.counts["lines_stored_total"] += len(lines) - taken.duplicates - len(taken.refused)
        self.counts["lines_duplicate_total"] += taken.duplicates
        self.counts["lines_refused_total"] += len(taken.refused)
        self.delivered_at = time.time()
        self._disk.end()
        self._refusals = self._failures = 0
        self._journal.draining = True
        if held:
            del self._held[held]
            self._in_a_row.pop(held, None)
            done = "refused" if taken.refused else "delivered"
            log.info("the line with the id %s, which was held back, is %s", held, done)
        else:
            self._name_held()
            self._limit = min(self._batch_size, self._limit * 2)
        # last: with nothing left, the process may end and say how many these were
        if held:
            self._journal.release(held)
        else:
            self._journal.acknowledge(lines)
        self._journal.rotate_if_due()
        if time.monotonic() > self._said_at + PROGRESS_SECONDS:
            self.say("going on")

    def _say_refused(self, record_id: str, reason: str) -> None:
        """Each new reason when it comes; not each line that has it. What is quoted in it may differ for each line."""
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|[0-9]+", "", reason)
        if kind not in self._reasons and len(self._reasons) < 100:
            self._reasons.add(kind)
            log.error("the backend refuses the line at byte %d of the journal: %.300s; such lines are %s",
                      int(record_id[24:], 16), reason, self._journal.refused_are)  # fmt: skip

    def say(self, what: str) -> None:
        self._said_at = time.monotonic()
        held = f", {len(self._held)} held back" if self._held else ""
        delivered = self.counts["lines_stored_total"] + self.counts["lines_duplicate_total"]
        refused, left = self.counts["lines_refused_total"], self._journal.left()
        log.info("%s; %d lines delivered, %d refused%s, %d bytes left in the journal %s",
                 what, delivered, refused, held, left, self._journal.path)  # fmt: skip

    # -- HTTP

    def _send(self, lines: Sequence[tuple[str, bytes]]) -> Taken:
        """POSTs lines; what the backend says of them. Raises NotDelivered."""
        self.counts["lines_sent_total"] += len(lines)
        quoted = json.encoder.encode_basestring_ascii  # json.dumps of dictionaries takes three times as long
        items = [f'{{"id":"{name}","log":{quoted(line.decode(errors="surrogateescape"))}}}' for name, line in lines]
        body = f"[{','.join(items)}]"
        self._deadline = time.monotonic() + ANSWER_SECONDS
        if self._speaks_unasked():
            self._connection.close()
        try:
            self._connection.request("POST", self._path, body, self._headers)
            self._socket = self._connection.sock  # which the connection forgets if the answer ends with it
            response = self._connection.getresponse()
            text = response.read(ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            lost = isinstance(error, (ConnectionResetError, BrokenPipeError, http.client.HTTPException))
            kind = "connection" if lost else str(getattr(error, "errno", "")) + type(error).__name__
            raise NotDelivered(kind, str(error) or type(error).__name__) from error
        finally:
            self._deadline = float("inf")
        if response.will_close:
            self._connection.close()
        self._not_before = time.monotonic() + wish_of(response.headers.get("Retry-After", ""))
        if len(text) > ANSWER_BYTES:
            raise NotDelivered("endless", f"answer {response.status} is longer than {ANSWER_BYTES} bytes")
        kind = response.headers.get_content_type()
        taken = read_answer(Answer(response.status, kind, text, response.headers.get("Location", "")), len(lines))
        if time.monotonic() >= self._time_due and (seconds := moment_of(response.headers.get("Date", ""))):
            self._journal.note_time(int(seconds))
            self._time_due = time.monotonic() + TIME_SECONDS
        return taken

    def _speaks_unasked(self) -> bool:
        """Something is to be read before anything was asked: it was closed, or this is an answer to nothing.

        What a proxy sends twice, or behind the end of an answer, must not be taken for the answer to the next lines.
        """
        if self._connection.sock is None:
            return False
        poll = select.poll()  # select takes no descriptors from 1024 on
        poll.register(self._connection.sock, select.POLLIN)
        return bool(poll.poll(0))

    def look_at_the_time(self) -> None:
        """An answer that takes too long, a byte at a time perhaps, is cut off: whoever reads it gets an error."""
        if time.monotonic() > self._deadline and self._socket is not None:
            self._deadline = float("inf")
            with suppress(OSError):  # closed meanwhile
                self._socket.shutdown(socket.SHUT_RDWR)


def connection_to(url: str, seconds: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if url.startswith("https:") else http.client.HTTPConnection
    return kind(urlsplit(url).netloc, timeout=seconds)


def headers_for(settings: Settings) -> dict[str, str]:
    token = {"Authorization": f"Bearer {settings.api_token}"} if settings.api_token else {}
    return {"Content-Type": "application/json", **token}


def wish_of(retry_after: str) -> float:
    """Seconds to wait, from a Retry-After in either form (RFC 9110, 10.2.3); 0 for anything else."""
    if re.fullmatch("[0-9]+", retry_after):
        return min(MAX_WISH_SECONDS, float(retry_after))
    return min(MAX_WISH_SECONDS, max(0.0, moment_of(retry_after) - time.time()))


def moment_of(date: str) -> float:
    """An HTTP date, in seconds since the epoch; 0 for anything else."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, LookupError):
        return 0.0


def pause_of(outage_seconds: float, wish: float) -> float:
    """Seconds to the next attempt: as long again as the outage has been; or what the backend says (Retry-After), and a
    little more, so that not all clients come at once. It knows what it can bear, and after the failover of its database
    nobody is to sleep for as long again as that took."""
    if wish:
        return wish * random.uniform(1.0, 1.5)
    return min(MAX_DELAY_SECONDS, max(0.2, outage_seconds)) * random.uniform(0.5, 1.0)


def read_answer(answer: Answer, count: int) -> Taken:
    """What became of so many lines. Raises NotDelivered: all of them are to be sent again.

    Only an answer of the backend itself may end the life of a line: a proxy's 400, a wrong address or a wrong token
    will be mended by somebody, and until then the lines wait.
    """
    try:
        taken = taken_lines(answer, count)
    except (ValueError, LookupError, TypeError, RecursionError):
        taken = None
    if taken and is_complete(taken.refused, count):
        return taken
    text = " ".join(answer.body[:300].decode(errors="replace").split())
    where = f" to {answer.location[:300]!r}" if answer.location else ""
    lasting = 400 <= answer.status < 500 and answer.status not in (401, 404, 405, 407, 408, 421, 425, 429)
    is_own = answer.kind == "application/problem+json"
    raise NotDelivered(str(answer.status), f"answer {answer.status}{where}: {text}", lasting, is_own)


def is_complete(refused: Sequence[Any], count: int) -> bool:
    """Each is about a line of its own, and says why."""
    if not all(isinstance(one, dict) and isinstance(one.get("reason"), str) for one in refused):
        return False
    places = [one.get("index") for one in refused]
    return all(isinstance(place, int) and place in range(count) for place in places) and len(set(places)) == len(places)


def taken_lines(answer: Answer, count: int) -> Taken | None:
    """None if it is not the backend that has answered for these lines. Raises ValueError, LookupError, TypeError."""
    if answer.status in (200, 201) and answer.kind == "application/json":
        result = json.loads(answer.body)
        if result["accepted"] + result["duplicates"] + len(result["rejected"]) == count:
            return Taken(list(result["rejected"]), result["duplicates"])
    elif answer.status in (400, 413) and answer.kind == "application/problem+json":
        problem = json.loads(answer.body)
        if "rejected" in problem:
            return Taken(list(problem["rejected"])) if len(problem["rejected"]) == count else None
        return Taken([{"index": 0, "reason": problem["detail"]}]) if count == 1 else None
    return None


# ---- Metrics --------------------------------------------------------------------------------------------------------

METRICS_PREFIX = "logpipeline_client_"
METRICS = {  # what ends in _total is a counter
    "up": "1 while the client runs, 0 after its orderly end; how old this file is tells of any other end.",
    "lines_sent_total": "Lines in POSTs, counted each time they are sent.",
    "lines_stored_total": "Lines that the backend has stored when they were sent.",
    "lines_duplicate_total": "Lines that were stored already when they were sent again.",
    "lines_refused_total": "Lines that the backend refuses for good; they are in LOG_FILE.rejected, with the reason.",
    "lines_held_back": "Lines that something on the way refuses; they are tried again.",
    "posts_retried_total": "POSTs without a usable answer; their lines are sent again.",
    "bytes_left": "Bytes of the journal that are not delivered.",
    "oldest_undelivered_seconds": "Age of the journal's oldest line that is not delivered, held back ones included, to"
    " within 2 s; lines that an earlier run left count from when it last delivered, else from the start of this one.",
    "last_delivery_timestamp_seconds": "When the backend last answered for lines of this run, in Unix time.",
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


class Backlog:
    """Since when the oldest line waits. That costs appending nothing: how long the journal was at each look is enough.

    Only one thread may look.
    """

    def __init__(self, journal: Journal) -> None:
        """The position moved when an earlier run last delivered."""
        self._journal = journal
        try:
            age = max(0.0, time.time() - os.stat(f"{journal.path}.position").st_mtime)
        except FileNotFoundError:
            age = 0.0
        self._looks: deque[tuple[tuple[int, int], float]] = deque()  # (part, size), and when; of what is not delivered
        self._held: dict[str, float] = {}  # ids of what is held back, and since when it waits
        self._look(time.monotonic() - age)

    def oldest_seconds(self) -> float:
        now = time.monotonic()
        self._look(now)
        since = (*self._held.values(), *(when for _, when in itertools.islice(self._looks, 1)))
        return now - min(since, default=now)

    def _look(self, now: float) -> None:
        part, delivered, size, held = self._journal.place()
        self._held = {one: self._held[one] if one in self._held else self._appended_at(one, now) for one in held}
        while self._looks and self._looks[0][0] <= (part, delivered):
            self._looks.popleft()
        if not self._looks:
            due = size > delivered
        else:
            end, when = self._looks[-1]
            due = (part, size) > end and now - when >= (now - self._looks[0][1]) * BACKLOG_STEP
        if due:
            self._looks.append(((part, size), now))

    def _appended_at(self, record_id: str, now: float) -> float:
        """As its offset says: it was held back since the last look, so that what that saw is still known."""
        offset = int(record_id[24:], 16)
        return next((when for (_, size), when in self._looks if size > offset), now)


def metrics_path(settings: Settings, journal: str) -> str:
    """METRICS_FILE, with the number that LOG_FILE has."""
    before, *_ = settings.log_file.split("%n")
    number = re.match("[0-9]*", journal[len(before) :])
    return settings.metrics_file.replace("%n", number[0] if number and "%n" in settings.log_file else "%n")


def metrics_of(courier: Courier, journal: Journal, backlog: Backlog) -> dict[str, float | None]:
    return {
        **courier.counts,
        "lines_held_back": len(journal.held),
        "bytes_left": journal.left(),
        "oldest_undelivered_seconds": round(backlog.oldest_seconds(), 3),
        "last_delivery_timestamp_seconds": courier.delivered_at,
    }


# ---- Check ----------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A check has failed. The message says what was found, and what to do."""


def check_all(environ: Mapping[str, str]) -> int:
    """A line for each thing that has to be right; the exit status. Nothing is changed, and no line is stored."""
    try:
        settings = read_settings(environ)
    except ValueError as error:
        print(f"FAILED  settings: {error}", flush=True)
        return 1
    checks: dict[str, Callable[[], None]] = {
        "settings": lambda: None,
        f"backend: {settings.url}": partial(check_backend, settings),
        f"LOG_FILE: {settings.log_file}": partial(check_journal, settings.log_file),
        **{f"SOURCE: {source}": partial(check_source, settings, source) for source in settings.sources},
    }
    if settings.source == "-":
        checks["SOURCE: -"] = check_stdin
    if settings.metrics_file:
        checks[f"METRICS_FILE: {settings.metrics_file}"] = partial(check_metrics_file, settings.metrics_file)
    failures = 0
    for what, look in checks.items():
        try:
            look()
            print(f"ok      {what}", flush=True)
        except Failed as failure:
            failures += 1
            print(f"FAILED  {what}: {failure}", flush=True)
    return min(1, failures)


def check_backend(settings: Settings) -> None:
    """A batch of no lines is stored nowhere, but takes the right address and token. Raises Failed."""
    path = urlsplit(settings.url).path or "/"
    answer = ask(settings, "POST", path, "[]")
    said = f"answer {answer.status}: {' '.join(answer.body.decode(errors='replace').split())}"
    if answer.status == 401:
        raise Failed(f"{said}: set API_TOKEN to the backend's token")
    if answer.status not in (200, 201) and (answer.status, answer.kind) != (400, "application/problem+json"):
        raise Failed(f"{said}: correct URL, or look at the backend and at what stands between")
    ready = ask(settings, "GET", f"{path.removesuffix('/api/data').rstrip('/')}/readyz")
    if ready.status == 503:  # anything else may be a proxy's: it need not let this through
        raise Failed(f"not ready: {' '.join(ready.body.decode(errors='replace').split())}: look at the backend's log")


def ask(settings: Settings, method: str, path: str, body: str | None = None) -> Answer:
    """Raises Failed if there is no answer."""
    try:
        with closing(connection_to(settings.url, CHECK_SECONDS)) as connection:
            connection.request(method, path, body, headers_for(settings))
            response = connection.getresponse()
            return Answer(response.status, response.headers.get_content_type(), response.read(300), "")
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"unreachable: {error or type(error).__name__}: start it, or correct URL") from error


def check_journal(log_file: str) -> None:
    """The folder, and what an earlier run left, or earlier runs where the name has %n. Raises Failed."""
    check_folder(os.path.dirname(os.path.realpath(log_file)), can_be_made=True)
    numbered = (log_file.replace("%n", str(number)) for number in itertools.count(1))
    for path in itertools.takewhile(os.path.exists, numbered) if "%n" in log_file else [os.path.realpath(log_file)]:
        try:
            if os.path.exists(path):
                state = read_state_of(path)
                with open(open_regular(path), "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if state and state.acknowledged <= size:
                        check_head(file.fileno(), size, path, state)
                read_source_state(f"{path}.source")
        except Spoilt as error:
            raise Failed(f"{error}: restore it, or move LOG_FILE away with all that is named after it") from error
        except OSError as error:
            raise Failed(f"{error}: name another file, or change its owner or mode") from error
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise Failed(f"{path} is not writable: change its owner or mode")


def check_folder(folder: str, can_be_made: bool) -> None:
    """Raises Failed if no file can be made in it."""
    while can_be_made and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise Failed(f"{folder} is no folder: make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failed(f"the folder {folder} is not writable: change its owner or mode")


def check_source(settings: Settings, source: str) -> None:
    """Raises Failed."""
    paths = [source]
    if glob.has_magic(source):  # which leaves out what cannot be followed, and all of our own
        found = (path for path in glob.glob(source) if os.path.isfile(path) and not path.endswith(COMPRESSED))
        paths = [path for path in found if not is_of_journal(settings, path)]
    if not paths:
        raise Failed("no file matches: correct SOURCE, unless one will come")
    for path in paths:
        if path == source and is_of_journal(settings, path):
            raise Failed("it is LOG_FILE, or beside it: lines would go round in circles: name another file")
        try:
            os.close(open_regular(path))
        except OSError as error:
            raise Failed(f"{error}: correct SOURCE, or change the file's owner or mode") from error


def check_stdin() -> None:
    """Raises Failed."""
    if not is_open(0):
        raise Failed("standard input is closed: redirect it")


def check_metrics_file(path: str) -> None:
    """Raises Failed."""
    check_folder(os.path.dirname(os.path.realpath(path)), can_be_made=False)
    try:
        with suppress(FileNotFoundError), open(open_regular(path), "rb") as file:
            check_metrics(file.fileno())
    except OSError as error:
        raise Failed(f"{error}: name another file") from error


# ---- Replay ---------------------------------------------------------------------------------------------------------

# Sends again what was delivered, for a database that has lost it: by a failover to a standby that was behind, or by a
# restore. It only reads, so the clients of these journals may run meanwhile, and it may be killed and run again.
#
# Why each line goes under its own id, and so is stored once:
#   * Only what was delivered is sent: it has been sent under that id before. What was not may still be cut off, and
#     read again under another id; its client delivers it, to whatever database there is.
#   * LOG_FILE goes by .journal, which was read while the file was LOG_FILE: what it calls delivered is of starts that
#     it knows. A renamed part goes by its content, all of it, so it does not matter what it is called by now. Of two
#     parts that are equal the ids of both are true, and each is taken once.
#   * A client whose disk is full empties LOG_FILE in place and appends to it again, but not before .journal names other
#     ids. So .journal is read again after each read of LOG_FILE: if it has the same ids still, for that file or for a
#     renamed part, what was read was from before.
# Why nothing is stored anew that retention has deleted, with its id: if it has deleted nothing, there is no such line.
# If it has, only what was appended after `kept_from` is sent, as that has a later `created`. The journal has no times,
# but .journal has: how long the journal was when the backend's clock, by the Date of an answer, had shown what. What a
# clock had shown before it was set back is not believed. CLOCK_SECONDS allow for a database, or its successor, whose
# clock is behind the backend's, and for retention that goes on meanwhile, by OVERTAKEN_SECONDS: that is looked at all
# the time. What is left out is said.
# The limits: rows that were deleted by hand come back; so does what retention deletes between such a look and the POST
# after it, which takes turning it on, or RETENTION_DAYS down, in that moment.
# Why no line is left out in silence: all files are opened at a moment between two rotations, and each is gone through
# from its first line to its last delivered one, past nothing that the backend has not answered for.


NOTHING_DELETED = float("-inf")  # in place of a `kept_from`


class Replayed(NamedTuple):
    """An open file, whose lines from `start` to `end` are to be sent."""

    path: str
    file: int
    spans: Spans
    start: int
    end: int
    journal: str  # that it was when .journal was read; "": a renamed part, which nobody changes


class Replay:
    """What a courier takes for its journal: the lines of several files, with no position that anybody keeps."""

    refused_are = "counted"
    draining = False

    def __init__(self, files: Iterable[Replayed]) -> None:
        self.held: dict[str, bytes] = {}
        self._files = deque(one for one in files if one.start < one.end)
        self._left = sum(one.end - one.start for one in self._files)
        self._offset = self._files[0].start if self._files else 0
        self.path = ", ".join(one.path for one in self._files)

    def left(self) -> int:
        return self._left

    def pending(self, count: int) -> list[tuple[str, bytes]]:
        """Raises Failed, Spoilt."""
        one = self._files[0]
        lines = lines_with_ids(one.file, self._offset, one.end, one.spans, count)
        if not lines or (one.journal and not is_unchanged(one)):
            raise Failed(f"{one.path} was emptied, cut or removed, as a full disk makes its client do: run this again")
        return lines

    def acknowledge(self, lines: Sequence[tuple[str, bytes]]) -> None:
        length = sum(len(line) + 1 for _, line in lines)
        self._offset, self._left = self._offset + length, self._left - length
        if self._offset >= self._files[0].end:
            os.close(self._files.popleft().file)
            self._offset = self._files[0].start if self._files else 0

    def hold(self, record_id: str, line: bytes) -> None:
        self.held[record_id] = line
        self.acknowledge([(record_id, line)])

    def release(self, record_id: str) -> None:
        del self.held[record_id]

    def reject(self, record_id: str, line: bytes, reason: str) -> None:
        """The courier counts it, and logs each new reason."""

    def note_time(self, seconds: int) -> None:
        """As what follows, this is done by the client whose journal it is."""

    def make_durable(self) -> None: ...

    def rotate_if_due(self) -> None: ...


def is_unchanged(one: Replayed) -> bool:
    """LOG_FILE is still that, or was renamed as a whole. Raises Spoilt."""
    state = read_journal_state(f"{one.journal}.journal") or JournalState()
    parts = state.spans, *(part.spans for part in state.rotated)
    return any(spans_before(one.end, spans) == one.spans for spans in parts)


def spans_before(end: int, spans: Spans) -> Spans:
    return tuple(span for span in spans if span[0] < end)


class ReplayCourier(Courier):
    """Looks at what retention has deleted before it sends anything."""

    def __init__(self, settings: Settings, journal: Replay, latest: float) -> None:
        """`latest` is the last `kept_from` with which it goes on."""
        super().__init__(settings, journal)
        self._settings, self._latest, self._look_due = settings, latest, 0.0

    def _send(self, lines: Sequence[tuple[str, bytes]]) -> Taken:
        """Raises NotDelivered, Failed."""
        if self._latest < float("inf") and time.monotonic() >= self._look_due:
            if ask_kept_from(self._settings)[0] > self._latest:
                raise Failed("retention has deleted more since this began: run it again")
            self._look_due = time.monotonic() + KEPT_SECONDS
        return super()._send(lines)


def replay(settings: Settings, paths: Sequence[str], everything: bool) -> int:
    """Sends journals again, and says how many of their lines were stored; the exit status.

    It does not begin without a backend that is ready; then an outage is waited for as in a delivery, until interrupted.
    """
    try:
        check_backend(settings)
        kept_from, now = (NOTHING_DELETED, 0.0) if everything else ask_kept_from(settings)
        files: list[Replayed] = []
        complete = True
        names = set(map(os.path.realpath, paths))
        for path in sorted(one for one in names if PART_NUMBER.sub("", one) not in names - {one}):
            found, all_known = find_files(path, kept_from, now)
            files += found
            complete &= all_known
        journal = Replay(files)
        if not journal.left():
            raise Failed("there is nothing to send")
        print(f"sending {journal.left()} bytes of {journal.path} to {settings.url}", flush=True)
        courier = ReplayCourier(settings, journal, float("inf") if everything else kept_from + OVERTAKEN_SECONDS)
        start(watch, courier)
        while journal.left():
            if not courier.deliver():
                time.sleep(POLL_SECONDS)
    except NotDelivered as error:
        print(f"cannot replay: it is not known what retention has deleted: {error}; if nothing, use --all", flush=True)
        return 1
    except (Failed, Spoilt, OSError) as failure:
        print(f"cannot replay: {failure}", flush=True)
        return 1
    stored, known, refused = (courier.counts[f"lines_{name}_total"] for name in ("stored", "duplicate", "refused"))
    print(f"done: {stored} lines stored, {known} were there already, {refused} refused")
    if journal.held:
        print(f"{len(journal.held)} lines were refused on the way to the backend: run this again once that is mended")
    sys.stdout.flush()
    return 0 if complete and not journal.held else 1


def watch(courier: Courier) -> None:
    while True:
        time.sleep(POLL_SECONDS)
        courier.look_at_the_time()


def find_files(path: str, kept_from: float, now: float) -> tuple[list[Replayed], bool]:
    """The file, and with LOG_FILE its renamed parts; whether all their ids are known. Says what is left out. Raises
    Failed, Spoilt, OSError."""
    journal = next((one for one in (path, PART_NUMBER.sub("", path)) if os.path.exists(f"{one}.journal")), path)
    opened, state = open_files(path, journal)
    if state is None or not state.spans:
        raise Failed(f"{path} is no journal, or {journal}.journal is missing, which has the ids of its lines")
    current = Rotated(state.acknowledged, 0, state.spans, state.times)
    parts = [*state.rotated, current]
    younger = younger_from([part.times for part in parts], kept_from, now)
    left = dict(zip(parts, younger, strict=True))  # a part is one file
    found: list[Replayed] = []
    complete, seen = True, list[os.stat_result]()
    for name, file in opened:
        size = (status := os.fstat(file)).st_size
        if not size or any(os.path.samestat(status, other) for other in seen):
            continue  # a rotation is about to begin it, or was killed when it had both names
        seen.append(status)
        is_log_file = name == journal or (os.path.exists(journal) and os.path.samestat(status, os.stat(journal)))
        if is_log_file:
            part = current if is_head(file, size, state) else None
        else:
            part = part_of(file, size, [one for one in left if one is not current])
        if part:
            found.append(lines_to_send(name, file, part, left.pop(part), journal if is_log_file else ""))
            complete &= part.spans[0][0] == 0
            if size > part.size:
                print(f"left out: {size - part.size} bytes of {name} that its client has not delivered yet")
        else:
            print(f"left out: {name}, whose ids {journal}.journal does not have: it was renamed by an older version, or"
                  " compressed, cut or edited since")  # fmt: skip
            complete = False
    return found, complete


def open_files(path: str, journal: str) -> tuple[list[tuple[str, int]], JournalState | None]:
    """The file and its renamed parts, and .journal from when they all had these names. Raises Spoilt, OSError."""
    while True:
        opened: list[tuple[str, int]] = []
        try:
            numbers = sorted(part_numbers(path))
            for name in (path, *(f"{path}.{number}" for number in numbers)):
                opened.append((name, open_regular(name)))
            state = delivered_state(journal)
            same = all(os.path.samestat(os.fstat(file), os.stat(name)) for name, file in opened)
            if same and numbers == sorted(part_numbers(path)):
                return opened, state
        except FileNotFoundError:
            if not os.path.exists(path):
                raise
        for _, file in opened:  # there was a rotation
            os.close(file)


def part_of(file: int, size: int, parts: Sequence[Rotated]) -> Rotated | None:
    """Which of these it is, by all of its content."""
    same = [part for part in parts if part.size == size]
    crc = crc_of(file, 0, size) if same else None
    return next((part for part in same if part.crc == crc), None)


def lines_to_send(path: str, file: int, part: Rotated, younger: int, journal: str) -> Replayed:
    """Says what is left out of it. Raises Failed."""
    named = min(part.size, part.spans[0][0])
    start = min(part.size, max(named, younger))
    spans = spans_before(part.size, part.spans)
    for offset in (start, part.size, *(offset for offset, _ in spans)):
        if offset and os.pread(file, 1, offset - 1) != b"\n":
            raise Failed(f"no line of {path} ends at byte {offset}, as its .journal says: it was edited")
    if named:
        count = count_lines(file, 0, named)
        print(f"left out: {count} lines of {path} from before the last 1,000 starts, whose ids are no longer known")
    if start > named:
        count = count_lines(file, named, start)
        print(f"left out: {count} lines of {path} that retention may have deleted; --all sends these, too, and what it"
              " has deleted is then stored anew")  # fmt: skip
    return Replayed(path, file, spans, start, part.size, journal)


def count_lines(file: int, start: int, end: int) -> int:
    return sum(os.pread(file, min(CHUNK_BYTES, end - at), at).count(b"\n") for at in range(start, end, CHUNK_BYTES))


def younger_from(times: Sequence[Times], kept_from: float, now: float) -> list[int]:
    """For each part, the oldest first, the offset from which on it was certainly appended after that.

    A time that is later than one that was noted after it is of a clock that was ahead, and says nothing.
    """
    if kept_from == NOTHING_DELETED:
        return [0] * len(times)
    starts, believed = [], now
    for of_part in reversed(times):
        start = sys.maxsize
        for offset, seconds in reversed(of_part):
            if seconds <= believed + AHEAD_SECONDS:
                believed = min(believed, seconds)
                start = offset if seconds > kept_from + CLOCK_SECONDS else start
        starts.append(start)
    return starts[::-1]


def ask_kept_from(settings: Settings) -> tuple[float, float]:
    """Up to when the database has deleted records, and the backend's clock, in seconds since the epoch. Raises
    NotDelivered."""
    path = f"{urlsplit(settings.url).path or '/'}?date_from=1970-01-02T00:00:00Z&limit=1"
    try:
        with closing(connection_to(settings.url, HTTP_SECONDS)) as connection:
            connection.request("GET", path, headers=headers_for(settings) | {"Accept": "application/x-ndjson"})
            response = connection.getresponse()
            text, kind = response.read(ANSWER_BYTES), response.headers.get_content_type()
    except (OSError, http.client.HTTPException) as error:
        raise NotDelivered(type(error).__name__, str(error) or type(error).__name__) from error
    now = moment_of(response.headers.get("Date", ""))
    if (response.status, kind) == (200, "application/x-ndjson"):
        return NOTHING_DELETED, now
    with suppress(ValueError, LookupError, TypeError):
        if (response.status, kind) == (410, "application/problem+json"):
            return datetime.fromisoformat(json.loads(text)["kept_from"]).timestamp(), now
    said = " ".join(text[:300].decode(errors="replace").split())
    raise NotDelivered(str(response.status), f"answer {response.status} to a GET: {said}")


# ---- Main -----------------------------------------------------------------------------------------------------------


def start(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def fail(failure: threading.ExceptHookArgs) -> None:
    """The end of a thread that failed is the end of all, which is as safe as kill -9."""
    if isinstance(failure.exc_value, (Spoilt, DiskFailure)):
        log.critical("%s", failure.exc_value)
    else:
        log.critical("%s failed", failure.thread and failure.thread.name, exc_info=failure.exc_value)
    os._exit(1)


def run(settings: Settings, journal: Journal, sources: Sources, signals: Sequence[int]) -> None:
    """Produces and delivers until a signal came, or until standard input has ended and all of it is delivered."""
    courier, stop = Courier(settings, journal), threading.Event()
    state = partial(metrics_of, courier, journal, Backlog(journal))
    metrics = MetricsFile(metrics_path(settings, journal.path), state)
    metrics.start()
    start(courier.deliver_always)
    if settings.source == "-":
        producers = [start(read_stdin, journal, settings.source_pattern, stop)]
    elif settings.source:
        producers = [start(follow, sources, journal, stop)]
    else:
        arguments = settings.request_delay_limit, journal, courier, stop
        producers = [start(generate, *arguments) for _ in range(settings.threads_amount)]
    deadline = float("inf")
    while (any(thread.is_alive() for thread in producers) or journal.left()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        courier.look_at_the_time()
        if signals and not stop.is_set():
            stop.set()
            deadline = time.monotonic() + SHUTDOWN_SECONDS
    with suppress(OSError, DiskFailure):  # more is sent again
        journal.make_durable(at_once=True)
    metrics.end()
    courier.say("stopped")


def journals_to_replay(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Those that `replay` is given, none if it is something else that is asked for; and whether with --all."""
    options = [word for word in arguments[1:] if word.startswith("-")]
    if arguments[:1] != ["replay"] or options not in ([], ["--all"]):
        return [], False
    return [word for word in arguments[1:] if word not in options], bool(options)


def main(arguments: Sequence[str] = ()) -> int:
    command, (journals, everything) = " ".join(arguments), journals_to_replay(arguments)
    if command not in COMMANDS and not journals:
        known = ", ".join(filter(None, COMMANDS))
        print(f"client: unknown arguments {command!r}; known are {known}", file=sys.stderr)
        return 2
    if command == "--check":
        return check_all(os.environ)
    if command in COMMANDS and command:
        print(help_text() if command == "--help" else COMMANDS[command], flush=True)
        return 0
    try:
        settings = read_settings(os.environ)
    except ValueError as error:
        refuse(str(error))
    log_as("client", settings.log_format)
    if journals:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, as safely as kill -9
        return replay(settings, journals, everything)
    if settings.source == "-" and not is_open(0):
        refuse("SOURCE is '-', but standard input is closed")
    threading.excepthook = fail
    signals: list[int] = []  # that came; not an Event: a second signal in its set() would wait for its lock for ever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    allow_descriptors()
    what = f"LOG_FILE {settings.log_file}"
    try:
        journal = open_journal(settings.log_file, settings)
        what = f"SOURCE {settings.source}"
        sources = Sources(settings, journal)
    except BlockingIOError as error:
        if error.filename:
            log.error("SOURCE %s is followed by another client: with two journals its lines would be stored twice",
                      error.filename)  # fmt: skip
        else:
            log.error("LOG_FILE %s is in use by another client", settings.log_file)
        return 1
    except Spoilt as error:
        log.error("%s; restore it, or move LOG_FILE away with all that is named after it, to begin anew", error)
        return 1
    except (OSError, DiskFailure) as error:
        log.error("%s cannot be used: %s", what, error)
        return 1
    log.info("journal %s, delivering to %s", journal.path, settings.url)
    run(settings, journal, sources, signals)
    return 0


def allow_descriptors() -> None:
    """A followed file takes two; the usual limit of 1,024 is low for programs with select() alone."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where the system has a lower one, that is as good as it gets
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    os._exit(
        main(sys.argv[1:])
    )  # a second signal would kill the interpreter in its own end, which knows no handlers any more
