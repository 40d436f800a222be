"""What becomes of the lines that real servers write: the README's table of formats, and linear time for any line."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend
from harness import Service, line_of
from nginx import running_nginx
from waiting import wait_until

import client

Start = Callable[..., Service]
TIME = "[24/Nov/2026:18:43:46 +0000]"

# source line -> what is sent to the backend; a form that is not known is sent as it is
KNOWN = {
    # four fields
    "192.0.2.1 GET /a 200": "192.0.2.1 GET /a 200",
    "192.0.2.1:51234 GET /a 200": "192.0.2.1 GET /a 200",
    "\t::1 GET https://example.org/a?b=c 404 \r": "::1 GET https://example.org/a?b=c 404",
    # common and combined
    f'192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'192.0.2.1 - john doe {TIME} "GET /a HTTP/1.1" 200 12 "-" "x"': "192.0.2.1 GET /a 200",
    f'192.0.2.1 ident "" {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'192.0.2.1 - - {TIME} "GET /a HTTP/2.0" 200 12 "-" "[x] \\"y\\" 404" rt=0.1 [up] - "more" 500': (
        "192.0.2.1 GET /a 200"
    ),
    f'2001:db8::1 - - {TIME} "GET /a HTTP/3.0" 200 12': "2001:db8::1 GET /a 200",
    f'192.0.2.1 - - {TIME} "GET /a" 200 12': "192.0.2.1 GET /a 200",
    # quoted strings are undone
    f'192.0.2.1 - - {TIME} "GET /admin\\" 200 HTTP/1.1" 403 12': "192.0.2.1 GET /admin%22%20200 403",
    f'192.0.2.1 - - {TIME} "GET /a\\x22b\\\\c HTTP/1.1" 200 12': "192.0.2.1 GET /a%22b%5Cc 200",
    f'192.0.2.1 - - {TIME} "GET /\\xE4\\xc3\\xa9 HTTP/1.1" 200 12': "192.0.2.1 GET /%E4%C3%A9 200",
    # what a URI may not have is percent-encoded
    f'192.0.2.1 - - {TIME} "GET /secret file HTTP/1.1" 400 12': "192.0.2.1 GET /secret%20file 400",
    f'192.0.2.1 - - {TIME} "GET /<é>|%20 HTTP/1.1" 200 12': "192.0.2.1 GET /%3C%C3%A9%3E%7C%20 200",
    # requests without a path
    f'192.0.2.1 - - {TIME} "OPTIONS * HTTP/1.0" 200 12': "192.0.2.1 OPTIONS * 200",
    f'192.0.2.1 - - {TIME} "CONNECT example.org:443 HTTP/1.1" 405 12': "192.0.2.1 CONNECT example.org:443 405",
    f'192.0.2.1 - - {TIME} "PRI * HTTP/2.0" 400 12': "192.0.2.1 PRI * 400",
    # no request line
    f'192.0.2.1 - - {TIME} "" 400 0': "192.0.2.1 - - 400",
    f'192.0.2.1 - - {TIME} "-" 408 0': "192.0.2.1 - - 408",
    f'192.0.2.1 - - {TIME} "\\x16\\x03\\x01 \\x00" 400 0': "192.0.2.1 - %16%03%01%20%00 400",
    f'192.0.2.1 - - {TIME} "SSH-2.0-OpenSSH_9.2" 400 0': "192.0.2.1 - SSH-2.0-OpenSSH_9.2 400",
    # something in front of the address
    f'example.org:443 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'198.51.100.1:80 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'203.0.113.7, 198.51.100.2 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'203.0.113.7,198.51.100.2 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'203.0.113.7 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'"203.0.113.7, 198.51.100.2" 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'- 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'203.0.113.7, 198.51.100.2 - - {TIME} "GET /a HTTP/1.1" 200 12': "203.0.113.7 GET /a 200",
    # ingress-nginx, with the older form of its address
    f'192.0.2.1 - - {TIME} "GET /a HTTP/2.0" 200 5 "-" "curl" 33 0.001 [default-web-80] [] 10.0.0.9:80 5 0.0 200 4f1': (
        "192.0.2.1 GET /a 200"
    ),
    f'192.0.2.1 - [192.0.2.1] - - {TIME} "GET /a HTTP/1.1" 200 5': "192.0.2.1 GET /a 200",
    # an address loses its port, its zone and its brackets
    f'192.0.2.1:51234 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'[2001:db8::1]:443 - - {TIME} "GET /a HTTP/1.1" 200 12': "2001:db8::1 GET /a 200",
    f'fe80::1%eth0 - - {TIME} "GET /a HTTP/1.1" 200 12': "fe80::1 GET /a 200",
    # wrapped by a container engine, or by syslog
    f'2026-11-24T18:43:46.123456789Z stdout F 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    json.dumps({"log": f'192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12\n', "stream": "stdout", "time": "x"}): (
        "192.0.2.1 GET /a 200"
    ),
    f'<190>Nov  4 18:43:46 10.0.0.5 nginx: 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'Nov 24 18:43:46 web nginx[12]: 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': "192.0.2.1 GET /a 200",
    f'<165>1 2026-11-24T18:43:46Z web nginx 12 - - 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 12': (
        "192.0.2.1 GET /a 200"
    ),
    f'<165>1 2026-11-24T18:43:46Z web nginx - - [a b="\\]c"][d e="f"] 192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 200 1': (
        "192.0.2.1 GET /a 200"
    ),
    '<190>Nov 24 18:43:46 nginx: {"remote_addr":"192.0.2.1","request":"GET /a HTTP/1.1","status":200}': (
        "192.0.2.1 GET /a 200"
    ),
    f'Nov 24 18:43:46 2001:db8::1 - - {TIME} "GET /a HTTP/1.1" 200 12': "2001:db8::1 GET /a 200",
    # JSON of nginx, Caddy and Traefik
    '{"remote_addr": "192.0.2.1", "request": "GET /a b HTTP/1.1", "status": "200"}': "192.0.2.1 GET /a%20b 200",
    '{"remote_addr": "192.0.2.1", "request_method": "GET", "request_uri": "/é", "status": 200}': (
        "192.0.2.1 GET /%C3%A9 200"
    ),
    '{"remote_addr":"192.0.2.1","request":"GET /\\x22\\xE4 HTTP/1.1","status":200}': "192.0.2.1 GET /%22%E4 200",
    json.dumps(
        {"request": {"remote_ip": "192.0.2.1", "client_ip": "203.0.113.7", "method": "GET", "uri": "/a"}, "status": 200}
    ): "192.0.2.1 GET /a 200",
    json.dumps({"request": {"remote_addr": "192.0.2.1:5", "method": "GET", "uri": "/a"}, "status": 200}): (
        "192.0.2.1 GET /a 200"
    ),
    json.dumps(
        {"ClientHost": "192.0.2.1", "RequestMethod": "GET", "RequestPath": "/a", "DownstreamStatus": 200}
    ): "192.0.2.1 GET /a 200",
    '2026-11-24T18:43:46.1Z stderr F {"remote_addr":"192.0.2.1","request":"GET /a HTTP/1.1","status":200}': (
        "192.0.2.1 GET /a 200"
    ),
}
# The backend refuses these, and says why: they have four fields, but one is not what it should be
REFUSED = {
    f'host.example.org - - {TIME} "GET /a HTTP/1.1" 200 12': "host.example.org GET /a 200",
    f'www.example.org:80 host.example.org - - {TIME} "GET /a HTTP/1.1" 200 12': "host.example.org GET /a 200",
    f'unix: - - {TIME} "GET /a HTTP/1.1" 200 12': "unix: GET /a 200",
    f'192.0.2.1 - - {TIME} "GET /a HTTP/1.1" 000 0': "192.0.2.1 GET /a 000",
    "no log line": "no log line",
    "{}": "{}",
    '{"status": 200': '{"status": 200',
}


@pytest.mark.parametrize("line", KNOWN)
def test_a_line_of_a_known_form_becomes_four_fields(line: str) -> None:
    assert client.Parser("x").lines(f"{line}\n".encode()) == [KNOWN[line].encode()]
    assert client.journal_line(line.encode()) == (KNOWN[line].encode(), True)


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_backend_will_refuse_is_sent_so_that_its_reason_is_the_right_one(line: str) -> None:
    assert client.journal_line(line.encode()) == (REFUSED[line].encode(), False)


def test_bytes_that_are_not_utf_8_are_percent_encoded_and_a_mark_at_the_start_is_skipped() -> None:
    assert client.Parser("x").lines(b"\xef\xbb\xbf192.0.2.1 GET /\xe4 200\n") == [b"192.0.2.1 GET /%E4 200"]
    common = f'192.0.2.1 - - {TIME} "GET /\\xff HTTP/1.1" 200 12'.encode().replace(b"\\xff", b"\xff")
    assert client.Parser("x").lines(common) == [b"192.0.2.1 GET /%FF 200"]


HOSTILE = [
    b"[" * 60_000,
    b'"' * 60_001,
    b'\\"' * 60_000,
    b'"\\"' * 40_000 + b"\\",
    b'a "b" ' * 20_000,
    b":" * 60_000,
    b"1.1.1.1 - " * 12_000,
    b"1.1.1.1 - - [x] " + b'"GET /' + b"a" * 120_000,
    b"1.1.1.1, " * 12_000 + b'"GET / HTTP/1.1" 200',
    b"<1>1 " * 24_000,
    b'{"a":' * 20_000,
    b" " * 120_000 + b"x",
    b"2026-11-24T18:43:46Z stdout P " * 4_000,
    b'{"log":"a","stream":"stdout","attrs":' + b"{" * 120_000,
    b'{"log":"' + b"\\n" * 60_000,
    b'<1>1 a b c d e [a="' + b"\\]" * 60_000,
    b'1.1.1.1 - - [x] "GET ' + b"/ " * 60_000 + b'" 200',
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_any_line_is_read_in_linear_time(line: bytes) -> None:
    """Twice as long, at most some three times as long: quadratic would be four, and a second, at this length."""
    took = []
    for text in (line, line * 2):
        began = time.process_time()
        client.Parser("x").lines(text)
        took.append(time.process_time() - began)
    assert took[1] < max(3.2 * took[0], 0.3), took


def test_a_pattern_of_ones_own_is_tried_instead_of_the_known_forms(
    start: Start, fake: FakeBackend, tmp_path: Path
) -> None:
    source, journal = tmp_path / "own.log", tmp_path / "logs.txt"
    source.write_text('at noon 192.0.2.1:99 did "PUT /a b HTTP/1.1" -> 201\nat one [::1]:5 did "GET /" -> 404\n')
    pattern = r'(?P<ip>\S+) did "(?P<request>[^"]*)" -> (?P<status>\d+)'
    start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source, SOURCE_PATTERN=pattern)
    wait_until(lambda: len(fake.stored) == 2, what="both lines")
    assert [line_of(record) for record in fake.records()] == ["192.0.2.1 PUT /a%20b 201", "::1 GET / 404"]
    own = re.compile(rb"(?P<status>\d+) (?P<method>\S+) (?P<uri>.*) by (?P<ip>\S+)")
    assert client.journal_line(b"x 200 GET /a b by 192.0.2.1", own) == (b"192.0.2.1 GET /a%20b 200", True)
    assert client.journal_line(b"192.0.2.1 GET /a 200", own) == (b"192.0.2.1 GET /a 200", False)


def test_a_file_of_an_unknown_form_is_told_once_with_an_example_and_a_hint(
    start: Start, fake: FakeBackend, tmp_path: Path
) -> None:
    source, journal = tmp_path / "other.log", tmp_path / "logs.txt"
    source.write_text("".join(f"2026-11-24 nothing that is known {n}\n" for n in range(250)))
    service = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    service.wait_for_line(r"ERROR.*other\.log.*first 100 lines.*nothing that is known 0.*SOURCE_PATTERN")
    with source.open("a") as file:
        file.write("more of it\n" * 250)
    wait_until(lambda: journal.read_bytes().count(b"\n") == 500, what="all lines in the journal")
    assert service.printed.count("SOURCE_PATTERN") == 1


# ---- A real server --------------------------------------------------------------------------------------------------

ESCAPED_LINE_FEEDS = [
    rb'{"log":"x\n192.0.2.66 GET /forged 200\n","stream":"stdout","time":""}',
    rb'{"remote_addr":"192.0.2.1","method":"GET","uri":"/","status":"200\n192.0.2.66 GET /forged 200"}',
    rb'{"remote_addr":"192.0.2.1","method":"GET / 200\n192.0.2.66 GET","uri":"/forged","status":200}',
]


@pytest.mark.parametrize("line", ESCAPED_LINE_FEEDS)
def test_a_source_line_is_one_journal_line_whatever_its_json_escapes(line: bytes) -> None:
    [one] = client.Parser("source").lines(line + b"\n")
    assert b"\n" not in one
    assert client.PLAIN(one) is None


JSON_LOG = """
  log_format json '{{"remote_addr":"$remote_addr","request":"$request","status":$status}}';
  access_log {folder}/json.log json;
"""
ODD_REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /a%20b?q=%22 HTTP/1.1\r\nHost: x\r\n\r\n",
    b'GET /"quoted" HTTP/1.1\r\nHost: x\r\n\r\n',
    b"GET /\xe4\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /secret file HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /back\\slash HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
    b"GET\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /a HTTP/1.0\r\n\r\n",
    b"GET /http09\r\n",
    b"GET /no-host HTTP/1.1\r\n\r\n",
    b"PROPFIND /dav HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://example.org/absolute HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /" + b"l" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"",
]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Its port, and the folder of its logs."""
    folder = tmp_path / "nginx"
    with running_nginx(folder, 'location / { return 200 "x"; }', JSON_LOG.format(folder=folder)) as port:
        yield port, folder


def test_every_line_that_a_real_nginx_writes_under_odd_traffic_is_one_that_the_backend_takes(
    nginx: tuple[int, Path], start: Start, fake: FakeBackend, tmp_path: Path
) -> None:
    port, folder = nginx
    for request in ODD_REQUESTS:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    count = len(ODD_REQUESTS) - 1  # of an empty one it writes nothing
    logs = [folder / name for name in ("access.log", "json.log")]
    wait_until(lambda: all(log.read_bytes().count(b"\n") == count for log in logs), what="its logs")
    form = re.compile(r"127\.0\.0\.1 (-|[A-Za-z]+) [!-~]{1,8192} [1-5][0-9][0-9]")
    for log in logs:
        lines = client.Parser(log.name).lines(log.read_bytes())
        assert len(lines) == count
        assert [line for line in lines if not form.fullmatch(line.decode())] == []
    settings: dict[str, Any] = {"LOG_FILE": tmp_path / "logs.txt", "SOURCE": folder / "access.log"}
    start("client.py", URL=fake.data_url, **settings)
    wait_until(lambda: len(fake.stored) == count, what="all lines")
    stored = {line_of(record) for record in fake.records()}
    assert {"127.0.0.1 GET /%E4%FF 200", "127.0.0.1 GET /back%5Cslash 200", "127.0.0.1 GET /%22quoted%22 200"} <= stored
