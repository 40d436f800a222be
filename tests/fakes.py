"""Stand-ins for the parts around a service: a backend whose answers are scripted, and a TCP proxy that cuts replies."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from harness import Backend, line_of
from waiting import POLL_SECONDS, wait_until

JSON = "application/json"
NDJSON = "application/x-ndjson"
PROBLEM = "application/problem+json"
FIRST_CREATED = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Request:
    """What came in, and when by the monotonic clock."""

    method: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    at: float
    peer: int  # the port of the connection's other end

    @property
    def items(self) -> list[dict[str, str]]:
        return list(json.loads(self.body))


@dataclass
class Reply:
    """What goes out. A declared `length` beyond the body, or `chunked` without its last chunk, is a cut reply.

    With `pause_seconds` the body trickles: a byte, a pause, a byte.
    """

    status: int = 200
    body: bytes = b""
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    chunked: bool = False
    pause_seconds: float = 0.0


Answer = Callable[[Request], Reply | None]


def refusal(status: int, **headers: str) -> Answer:
    """Always this status, as a problem document."""
    body = json.dumps({"title": "no", "status": status, "detail": "not now"}).encode()
    return lambda request: Reply(status, body, PROBLEM, {k.replace("_", "-"): v for k, v in headers.items()})


class FakeBackend:
    """A backend in this process: stores by id and hands out as the real one, unless `answer` is set to say otherwise.

    An answer of None closes the connection without a word.
    """

    def __init__(self, listening: bool = True) -> None:
        self.requests: list[Request] = []
        self.stored: dict[str, dict[str, Any]] = {}
        self.answer: Answer = self.serve
        self.bytes_sent = 0
        self._mutex = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                with suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def answer(self) -> None:
                fake.handle(self)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.request_queue_size = 64
        self._server.server_bind()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.data_url = f"{self.url}/api/data"
        self._thread: threading.Thread | None = None
        if listening:
            self.listen()

    def listen(self) -> None:
        """Until then connections are refused."""
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._thread:
            self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(length)
        if len(body) < length:  # its sender was killed in the middle
            handler.close_connection = True
            return
        query = {name: values[0] for name, values in parse_qs(urlsplit(handler.path).query).items()}
        request = Request(
            handler.command, query, dict(handler.headers.items()), body, time.monotonic(), handler.client_address[1]
        )
        self.requests.append(request)
        reply = self.answer(request)
        if reply is None:
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        handler.send_header("Content-Type", reply.content_type)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if reply.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
        handler.end_headers()
        view = memoryview(reply.body)
        size = 1 if reply.pause_seconds else 65536
        while view:
            piece, view = view[:size], view[size:]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), bytes(piece)) if reply.chunked else piece)
            self.bytes_sent += len(piece)
            threading.Event().wait(reply.pause_seconds)
        if reply.chunked or reply.length is not None:
            handler.close_connection = True

    def serve(self, request: Request) -> Reply:
        return self.store(request) if request.method == "POST" else self.export(request)

    def store(self, request: Request) -> Reply:
        items = request.items
        with self._mutex:
            new = [item for item in items if item["id"] not in self.stored]
            for item in new:
                self._add(item["id"], item["log"])
        body = {"accepted": len(new), "duplicates": len(items) - len(new), "rejected": []}
        return Reply(201, json.dumps(body).encode())

    def add(self, lines: Sequence[str]) -> None:
        """Lines that came in by another way."""
        with self._mutex:
            for line in lines:
                self._add(f"00000000-0000-8000-8000-{len(self.stored):012x}", line)

    def _add(self, record_id: str, line: str) -> None:
        ip, method, uri, status_code = line.split()
        created = FIRST_CREATED + timedelta(microseconds=len(self.stored))
        self.stored[record_id] = {
            "id": record_id,
            "created": created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "log": {"ip": ip, "method": method, "uri": uri, "status_code": int(status_code)},
        }

    def records(self) -> list[dict[str, Any]]:
        with self._mutex:
            return list(self.stored.values())

    def ndjson(self, request: Request) -> bytes:
        """The records from `date_from` on."""
        start = datetime.fromisoformat(request.query["date_from"]) - FIRST_CREATED
        first = max(0, start // timedelta(microseconds=1))
        return b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in self.records()[first:])

    def export(self, request: Request) -> Reply:
        return Reply(200, self.ndjson(request), NDJSON)


class Proxy:
    """Passes TCP connections on to `upstream`. What it is told to do to the traffic it does, and counts.

    A client behind it sends a request when the one before is answered, as all of ours do.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.cuts = 0
        self.doubled = 0  # POSTs that were stored twice, as far as the backend's answers say
        self.late = 0  # answers to a POST that nobody waited for any more
        self.held = 0  # pieces that waited for `flowing`
        self.flowing = threading.Event()  # nothing is passed on while it is not set
        self.flowing.set()
        self._pending: list[int] = []
        self._doubles: list[float] = []
        self._delays: list[float] = []
        self._posting: set[socket.socket] = set()  # clients that wait for the answer to a POST
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.data_url = f"{self.url}/api/data"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_next(self, *kept_bytes: int) -> None:
        """Of each of the next replies only so many bytes are passed on, then both connections end."""
        self._pending.extend(kept_bytes)

    def double_next(self, *after_seconds: float) -> None:
        """Each of the next POSTs is sent once more, on a connection of its own, so many seconds after it has come.

        Less than 0: the copy goes first, and is answered before the end of the original is passed on. A copy that was
        not stored, as the database is away, does not count: another POST is sent twice in its place.
        """
        self._doubles.extend(after_seconds)

    def delay_next(self, *seconds: float) -> None:
        """The answers to the next POSTs come so much later, or not at all if their client has given up by then."""
        self._delays.extend(seconds)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread that waits in accept: its number may be taken soon
        self._listener.close()

    def _connect(self) -> socket.socket:
        target = urlsplit(self.upstream)
        return socket.create_connection((str(target.hostname), int(target.port or 80)))

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        left: int | None = None  # bytes to pass on before the cut
        request = bytearray()  # what has come of the one that is to be doubled
        with suppress(OSError):
            while data := source.recv(65536):
                if not self.flowing.is_set():
                    self.held += 1
                    self.flowing.wait()
                if replies:
                    self._delay(target, data)
                else:
                    self._double(source, data, request)
                if replies and left is None and self._pending:
                    left = self._pending.pop(0)
                cut = left is not None and len(data) > left
                try:
                    target.sendall(data[:left] if cut else data)
                except OSError:  # its reader has gone, which cuts it as well
                    self.cuts += left is not None
                    raise
                if cut:
                    self.cuts += 1
                    break
                left = None if left is None else left - len(data)
        self._posting.discard(source)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def _delay(self, client: socket.socket, data: bytes) -> None:
        if client in self._posting:
            self._posting.discard(client)
            if (seconds := next_of(self._delays)) is not None:
                deadline = time.monotonic() + seconds
                try:
                    while time.monotonic() < deadline:
                        threading.Event().wait(POLL_SECONDS)
                        client.getpeername()
                except OSError:
                    self.late += 1
                    raise

    def _double(self, client: socket.socket, data: bytes, request: bytearray) -> None:
        if data.startswith(b"POST "):  # none of our bodies has a line like that
            self._posting.add(client)
            request[:] = data if self._doubles else b""
        elif request:
            request += data
        if request and is_whole(request) and (seconds := next_of(self._doubles)) is not None:
            copy = threading.Thread(target=self._send_again, args=(bytes(request), seconds), daemon=True)
            copy.start()
            if seconds < 0:
                copy.join()
            request.clear()

    def _send_again(self, request: bytes, after_seconds: float) -> None:
        threading.Event().wait(after_seconds)
        stored = False
        with suppress(OSError), self._connect() as connection:
            connection.sendall(request)
            stored = connection.recv(65536)[:12] in (b"HTTP/1.1 201", b"HTTP/1.1 200")
            self.doubled += stored  # nothing waits, nor is called, between reading the count and writing it
        if not stored:
            self._doubles.append(after_seconds)


def next_of(pending: list[float]) -> float | None:
    """Takes one, if there is one; several threads may ask."""
    try:
        return pending.pop(0)
    except IndexError:
        return None


def is_whole(request: bytes | bytearray) -> bool:
    head, end, body = bytes(request).partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(end and length) and len(body) >= int(length[1] if length else 0)


@contextmanager
def fake_backend(listening: bool = True) -> Iterator[FakeBackend]:
    fake = FakeBackend(listening)
    try:
        yield fake
    finally:
        fake.close()


@contextmanager
def proxy_to(backend: Backend) -> Iterator[Proxy]:
    proxy = Proxy(backend.url)
    try:
        yield proxy
    finally:
        proxy.close()


def some_lines(count: int, tag: str = "a", padding: str = "") -> list[str]:
    """`count` different lines in the form of the journal."""
    methods = ("GET", "POST", "PUT", "DELETE")
    return [
        f"10.{n >> 16}.{n >> 8 & 255}.{n & 255} {methods[n % 4]} /{tag}/{n}{padding} {200 + n % 5}"
        for n in range(count)
    ]


def post_lines(backend: Backend, lines: Sequence[str]) -> None:
    """Stores lines in the backend, in their order."""
    size = 10_000 if len(lines[0]) < 1000 else 1000
    for start in range(0, len(lines), size):
        body = "\n".join(lines[start : start + size]).encode()
        request = urllib.request.Request(backend.data_url, body, {"Content-Type": "text/plain"})
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["accepted"] == len(lines[start : start + size])


def append(path: Path, lines: list[str]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(line.encode() + b"\n" for line in lines))


def stored(fake: FakeBackend) -> list[str]:
    return [line_of(record) for record in fake.records()]


def assert_stored(fake: FakeBackend, lines: list[str], seconds: float = 30) -> None:
    """Just these lines, in this order."""
    wait_until(lambda: len(fake.stored) >= len(lines), seconds, f"{len(lines)} lines")
    assert stored(fake) == lines
