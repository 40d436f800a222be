"""Where one request ends and the next begins: nothing that one brought is ever counted to another.

Each broken shape is sent with the token, and behind it on the same connection a request without one. Whatever becomes
of the first, the second is not served: either it is refused for its own lack of a token, or the connection is closed.
"""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress

import pytest
import requests
from harness import Backend
from raw_http import Answer, connect, exchange, read_answers, read_to_end, request, split_answers

SECONDS = 60
PROMPT_SECONDS = 9  # an answer that waits for nothing, on a busy machine: who waits for more says 408 after 10 s
TOKEN = "s3cret"
AUTHORIZATION = f"Authorization: Bearer {TOKEN}"
GET = "GET /api/data?limit=1 HTTP/1.1"
POST = "POST /api/data HTTP/1.1"
HEALTH = "GET /api/health HTTP/1.1"
PLAIN = "Content-Type: text/plain"
CHUNKED = "Transfer-Encoding: chunked"
LINE = b"192.0.2.1 GET /framing 200\n"
CHUNKS = b"1b\r\n%b\r\n0\r\n\r\n" % LINE
SMUGGLED = request(GET, AUTHORIZATION)  # in a body: it must never be answered
FOLLOWING = request(GET, "Connection: close")  # without the token


@pytest.fixture(scope="module")
def guarded(start_shared: Callable[..., Backend]) -> Backend:
    """A backend that wants a token, with a record that must not be given away."""
    backend = start_shared(API_TOKEN=TOKEN)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert requests.post(backend.data_url, json={"log": "192.0.2.1 GET / 200"}, headers=headers, timeout=SECONDS).ok
    return backend


def with_length(body: bytes, *lengths: str, line: str = POST, more: str = PLAIN) -> bytes:
    return request(line, AUTHORIZATION, more, *(f"Content-Length: {length}" for length in lengths), body=body)


def in_chunks(body: bytes, *codings: str, line: str = POST) -> bytes:
    return request(line, AUTHORIZATION, PLAIN, *(codings or (CHUNKED,)), body=body)


REFUSED: dict[str, tuple[bytes, *tuple[int, ...]]] = {
    "length and chunks": (with_length(CHUNKS, str(len(CHUNKS)), more=CHUNKED), 400),
    "chunks and length": (with_length(b"0\r\n\r\n" + SMUGGLED, str(5 + len(SMUGGLED)), more=CHUNKED), 400),
    "length 0 and chunks": (with_length(CHUNKS, "0", more=CHUNKED), 400),
    "length and another coding": (with_length(LINE, str(len(LINE)), more="Transfer-Encoding: identity"), 400, 501),
    "length and an empty coding": (with_length(LINE, str(len(LINE)), more="Transfer-Encoding: "), 400),
    "chunks in HTTP/1.0": (in_chunks(CHUNKS, line="POST /api/data HTTP/1.0"), 400),
    "length and chunks in 1.0": (with_length(CHUNKS, "5", more=CHUNKED, line="POST /api/data HTTP/1.0"), 400),
    "chunked twice": (in_chunks(CHUNKS, CHUNKED, CHUNKED), 400),
    "chunked twice in a list": (in_chunks(CHUNKS, "Transfer-Encoding: chunked, chunked"), 400),
    "chunked with a vertical tab": (in_chunks(CHUNKS, "Transfer-Encoding: \x0bchunked"), 400),
    "another coding": (in_chunks(CHUNKS, "Transfer-Encoding: gzip"), 501),
    "chunked is not the last": (in_chunks(CHUNKS, "Transfer-Encoding: chunked, gzip"), 501),
    "two different lengths": (with_length(LINE + SMUGGLED, str(len(LINE)), str(len(LINE + SMUGGLED))), 400),
    "the same length twice": (with_length(LINE, str(len(LINE)), str(len(LINE))), 400),
    "a list of lengths": (with_length(LINE, f"{len(LINE)}, {len(LINE)}"), 400),
    "a length with a sign": (with_length(LINE, f"+{len(LINE)}"), 400),
    "a negative length": (with_length(LINE, "-27"), 400),
    "a hexadecimal length": (with_length(LINE, "0x1b"), 400),
    "an empty length": (with_length(LINE, ""), 400),
    "a length of 5,000 digits": (with_length(LINE, "7" * 5000), 400),
    "a chunk size with a sign": (in_chunks(b"+1b\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "a chunk size with 0x": (in_chunks(b"0x1b\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "a chunk size with an underscore": (in_chunks(b"1_b\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "a chunk size that is none": (in_chunks(b"zz\r\n" + SMUGGLED), 400),
    "a chunk longer than its size": (in_chunks(b"5\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "a chunk size ended by a bare LF": (in_chunks(b"1b\n%b\r\n0\r\n\r\n" % LINE), 400),
    "a chunk size with a bare LF before its end": (in_chunks(b"1b\n\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "the last size with a bare LF": (in_chunks(b"1b\r\n%b\r\n0\n\r\n\r\n" % LINE), 400),
    "an extension with a bare LF before its end": (in_chunks(b"1b;a\n\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "an empty chunk size": (in_chunks(b"\r\n1b\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "a trailer with a bare LF": (in_chunks(b"1b\r\n%b\r\n0\r\nX: a\nY: b\r\n\r\n" % LINE), 400),
    "a trailer that is no header": (in_chunks(b"1b\r\n%b\r\n0\r\nno colon\r\n\r\n" % LINE), 400),
    "a trailer with a NUL": (in_chunks(b"1b\r\n%b\r\n0\r\nX: a\0\r\n\r\n" % LINE), 400),
    "a chunk of 16 exabytes": (in_chunks(b"ffffffffffffffff\r\n" + LINE), 413),
    "a chunk size of 8,000 digits": (in_chunks(b"f" * 8000 + b"\r\n" + LINE), 413),
    "128 blanks in a header": (request(GET, AUTHORIZATION, f"X: a{' ' * 128}b"), 400),
    "an extension with a bare LF": (in_chunks(b"1b;\n\r\n%b\r\n0\r\n\r\n" % LINE), 400),
    "no Host": (request(GET, AUTHORIZATION, host=""), 400),
    "two Hosts": (request(GET, AUTHORIZATION, "Host: b"), 400),
    "the same Host twice": (request(GET, AUTHORIZATION, "Host: a"), 400),
    "a target that is no URL": (request("GET http://[ HTTP/1.1", AUTHORIZATION), 400),
    "another target that is no URL": (request("GET http://[::1]x:y/ HTTP/1.1", AUTHORIZATION), 400),
    "a line ended by a bare LF": (request(f"{GET}\nX: y", AUTHORIZATION), 400),
    "a header ended by a bare LF": (request(GET, f"{AUTHORIZATION}\nX: y"), 400),
    "two bare LFs": (request(GET, f"{AUTHORIZATION}\n\n{SMUGGLED.decode()}"), 400),
    "a header with a bare CR": (request(GET, f"{AUTHORIZATION}\rX: y"), 400),
    "a header with a NUL": (request(GET, AUTHORIZATION, "X: a\0b"), 400),
    "a space before a colon": (request(GET, AUTHORIZATION, "Content-Length : 5"), 400),
    "a folded first header": (request(GET, " Host: a", AUTHORIZATION, host=""), 400),
    "a header without a name": (request(GET, AUTHORIZATION, ": a"), 400),
    "two spaces in the first line": (request("GET  /api/data HTTP/1.1", AUTHORIZATION), 400),
    "tabs in the first line": (request("GET\t/api/data\tHTTP/1.1", AUTHORIZATION), 400),
    "a tab in the target": (request("GET /api\t/data HTTP/1.1", AUTHORIZATION), 400),
    "a NUL in the target": (request("GET /api/data\0 HTTP/1.1", AUTHORIZATION), 400),
    "a target that is not ASCII": (request("GET /api/data?ip=\xe9 HTTP/1.1", AUTHORIZATION), 400),
    "HTTP/1.2": (request("GET /api/data HTTP/1.2", AUTHORIZATION), 505),
    "HTTP/2.0": (request("GET /api/data HTTP/2.0", AUTHORIZATION), 505),
    "HTTP/0.9": (request("GET /api/data HTTP/0.9", AUTHORIZATION), 505),
    "no version": (request("GET /api/data", AUTHORIZATION), 400, 505),
    "no version and no headers": (b"GET /api/health\r\n\r\n", 400, 505),
    "HTTP/1.10": (request("GET /api/data HTTP/1.10", AUTHORIZATION), 400),
    "http/1.1": (request("GET /api/data http/1.1", AUTHORIZATION), 400),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_a_broken_request_is_refused_and_nothing_behind_it_is_read(guarded: Backend, shape: str) -> None:
    data, *statuses = REFUSED[shape]
    before, stored = len(guarded.printed), stored_records(guarded)
    answers = exchange(guarded.url, data + FOLLOWING, PROMPT_SECONDS)
    assert [answer.status for answer in answers] in ([status] for status in statuses), answers
    assert_problem(answers[0])
    assert not re.search("(?i)traceback|exception", guarded.printed[before:])
    assert stored_records(guarded) == stored


# These are whole requests in a rare form, or may be refused: what follows is in any case its own request
BORDERLINE: dict[str, bytes] = {
    "a GET with a body": with_length(SMUGGLED, str(len(SMUGGLED)), line=GET),
    "a GET with chunks": in_chunks(b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED), line=GET),
    "a HEAD with a body": with_length(SMUGGLED, str(len(SMUGGLED)), line="HEAD /nothing HTTP/1.1"),
    "a refused POST with a body": with_length(SMUGGLED, str(len(SMUGGLED)), more="Content-Type: text/xml"),
    "a DELETE with a body": with_length(SMUGGLED, str(len(SMUGGLED)), line="DELETE /api/data HTTP/1.1"),
    "a folded header": request(GET, AUTHORIZATION, "X: a\r\n b"),
    "a folded coding": in_chunks(CHUNKS, "Transfer-Encoding:\r\n chunked"),
    "a header with an underscore": with_length(b"", "0", more="Transfer_Encoding: chunked"),
    "a length with an underscore": request(GET, AUTHORIZATION, "Content_Length: 300"),
    "a coding in capitals": in_chunks(CHUNKS, "Transfer-Encoding: CHUNKED"),
    "an empty coding before chunked": in_chunks(CHUNKS, "Transfer-Encoding: , chunked"),
    "a length with leading zeros": with_length(LINE, f"000{len(LINE)}"),
    "leading zeros of a chunk": in_chunks(b"0000001b\r\n%b\r\n000\r\n\r\n" % LINE),
    "a chunk's extension": in_chunks(b"1b;a=b\r\n%b\r\n0\r\n\r\n" % LINE),
    "a trailer": in_chunks(b"1b\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (LINE, TOKEN.encode())),
    "blank lines before": b"\r\n\r\n" + request(GET, AUTHORIZATION),
    "another absolute form": request("GET http://b/api/data?limit=1 HTTP/1.1", AUTHORIZATION),
    "an upgrade": request(GET, AUTHORIZATION, "Connection: Upgrade", "Upgrade: websocket"),
    "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("together", [True, False], ids=["pipelined", "one-after-the-other"])
@pytest.mark.parametrize("shape", BORDERLINE)
def test_what_follows_an_odd_request_is_answered_on_its_own_terms(guarded: Backend, shape: str, together: bool) -> None:
    before = len(guarded.printed)
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(BORDERLINE[shape] + (FOLLOWING if together else b""))
        if not together:
            connection.recv(1, socket.MSG_PEEK)
            with suppress(ConnectionError):
                connection.sendall(FOLLOWING)
        received = read_to_end(connection)
    first, *others = split_answers(without_lengths(received) if "HEAD" in shape else received)
    assert 100 < first.status < 600
    assert [answer.status for answer in others] in ([], [401]), others
    assert not re.search("(?i)traceback|exception", guarded.printed[before:])


BROKEN_HEADS = {
    "no Host": b"HEAD /api/health HTTP/1.1\r\n\r\n",
    "HTTP/1.2": request("HEAD /api/health HTTP/1.2"),
    "a coding": request("HEAD /api/health HTTP/1.1", "Transfer-Encoding: gzip"),
}


@pytest.mark.parametrize("shape", BROKEN_HEADS)
def test_the_refusal_of_a_head_has_no_body_either(guarded: Backend, shape: str) -> None:
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(BROKEN_HEADS[shape])
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"501", b"505")
    assert body == b""


@pytest.mark.parametrize("value", ["close", "TE, close", "close, TE", "keep-alive,\tClose"])
def test_a_connection_that_is_to_be_closed_is_closed_after_the_answer(guarded: Backend, value: str) -> None:
    data = request(HEALTH, f"Connection: {value}", "TE: trailers") + FOLLOWING
    [answer] = exchange(guarded.url, data, PROMPT_SECONDS)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def without_lengths(received: bytes) -> bytes:
    """The answer to a HEAD has a length, and no body: only its status counts here."""
    head, _, rest = received.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0] + b"\r\n\r\n" + rest


def assert_problem(answer: Answer) -> None:
    assert answer.headers["content-type"].split(";")[0] == "application/problem+json"
    body = json.loads(answer.body)
    assert body["status"] == answer.status
    assert len(body["detail"]) > 10


def stored_records(backend: Backend) -> int:
    return len(requests.get(backend.data_url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=SECONDS).json())


# ---- Expect ---------------------------------------------------------------------------------------------------------

EXPECT = "Expect: 100-continue"


@pytest.mark.parametrize("line", [GET, HEALTH, "GET /nothing HTTP/1.1", POST, "DELETE /api/data HTTP/1.1"])
@pytest.mark.parametrize("length", [(), ("Content-Length: 0",)], ids=["no-length", "0"])
def test_who_expects_to_continue_without_a_body_is_answered_and_leaves_nothing(
    guarded: Backend, line: str, length: tuple[str, ...]
) -> None:
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(request(line, AUTHORIZATION, EXPECT, *length))
        [(status, _)] = read_answers(connection, 1)
        assert status == {GET: 200, HEALTH: 200}.get(line, status)
        with suppress(ConnectionError):
            connection.sendall(FOLLOWING)
        assert [answer.status for answer in split_answers(read_to_end(connection))] in ([], [401])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((PLAIN, "Content-Length: 27"), 401),
        ((AUTHORIZATION, "Content-Type: text/xml", "Content-Length: 27"), 415),
        ((AUTHORIZATION, PLAIN, "Content-Length: 17000000"), 413),
        ((PLAIN, CHUNKED), 401),
    ],
    ids=["token", "type", "size", "chunked"],
)
def test_who_expects_to_continue_and_is_refused_is_told_so_instead(
    guarded: Backend, headers: tuple[str, ...], status: int
) -> None:
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(request(POST, EXPECT, *headers))
        assert connection.recv(12, socket.MSG_PEEK) == f"HTTP/1.1 {status}".encode()  # and no 100
        assert read_answers(connection, 1)[0][0] == status
        with suppress(ConnectionError):
            connection.sendall(FOLLOWING)
        assert [answer.status for answer in split_answers(read_to_end(connection))] in ([], [401])


def test_who_expects_to_continue_behind_another_request_gets_both_answers(guarded: Backend) -> None:
    record_id = str(uuid.uuid4())
    body = json.dumps({"id": record_id, "log": "192.0.2.1 PUT /expected 200"}).encode()
    head = request(POST, AUTHORIZATION, EXPECT, "Content-Type: application/json", f"Content-Length: {len(body)}")
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(request(GET, AUTHORIZATION) + head)
        assert read_answers(connection, 1)[0][0] == 200
        connection.sendall(body + FOLLOWING)
        statuses = [answer.status for answer in split_answers(read_to_end(connection)) if answer.status != 100]
    assert statuses == [201, 401]


def test_continue_is_said_once_for_each_request_that_waits_for_it(guarded: Backend) -> None:
    head = request(POST, AUTHORIZATION, EXPECT, PLAIN, "Content-Length: 29")
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        for _ in range(3):
            connection.sendall(head)
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(b"192.0.2.1 PUT /continued 200\n")
            assert read_answers(connection, 1)[0][0] == 201


def test_an_expectation_that_is_not_known_is_refused_or_ignored(guarded: Backend) -> None:
    [answer] = exchange(guarded.url, request(HEALTH, "Expect: 200-ok", "Connection: close"), PROMPT_SECONDS)
    assert answer.status in (200, 417)
