"""HTTP by hand, on a bare socket: what no library would send, and every byte of what comes back."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

SECONDS = 60  # for one answer on a busy machine


@dataclass(frozen=True)
class Answer:
    """One answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def connect(url: str, receive_buffer: int = 0, seconds: float = SECONDS) -> socket.socket:
    """A connection to the server at that URL; a small buffer makes a reader that is felt at the other end."""
    address = urlsplit(url)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(seconds)
    connection.connect((str(address.hostname), int(address.port or 0)))
    return connection


def request(first_line: str, *headers: str, body: bytes = b"", host: str = "a") -> bytes:
    """A request as it stands on the wire. No header is added but Host; host="" leaves that out too."""
    lines = [first_line, *([f"Host: {host}"] if host else []), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def post(body: str, *headers: str, kind: str = "application/json") -> bytes:
    """A POST of a body with its length."""
    data = body.encode()
    about = (f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers)
    return request("POST /api/data HTTP/1.1", *about, body=data)


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """The status and the body of each answer, in their order."""
    answers: list[tuple[int, bytes]] = []
    with connection.makefile("rb") as stream:
        while len(answers) < count:
            status, length = int(stream.readline().split()[1]), 0
            while (header := stream.readline().strip()) != b"":
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            if status != 100:
                answers.append((status, stream.read(length)))
    return answers


def read_to_end(connection: socket.socket) -> bytes:
    """Everything up to the server's close. Fails the test if it does not close within the connection's time."""
    received = bytearray()
    try:
        while piece := connection.recv(65536):
            received += piece
    except TimeoutError:
        raise AssertionError(f"the connection stays open; received so far: {bytes(received[:500])!r}") from None
    except ConnectionError:  # closed while bytes of ours were unread; what came before counts
        pass
    return bytes(received)


def exchange(url: str, data: bytes, seconds: float = SECONDS) -> list[Answer]:
    """The answers to these bytes, up to the server's close."""
    with connect(url, seconds=seconds) as connection:
        with suppress(ConnectionError):  # it may close while we are still sending
            connection.sendall(data)
        return split_answers(read_to_end(connection))


def split_answers(received: bytes) -> list[Answer]:
    """The answers in a stream of whole ones, each with a Content-Length, in chunks or without a body."""
    answers = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, f"a torn head: {received[:500]!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        found = re.fullmatch(r"HTTP/1\.[01] ([1-5][0-9]{2}) .*", first)
        assert found, f"no status line: {first!r}"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", 0))
        if headers.get("transfer-encoding") == "chunked":
            size = rest.index(b"0\r\n\r\n") + 5
        answers.append(Answer(int(found[1]), headers, rest[:size]))
        received = rest[size:]
    return answers
