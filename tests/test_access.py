"""Who is let in: the token on every route but the public ones, in every spelling, and pages of known origins only.

What can be refused by the head alone (token, origin, route, method, size, type) is refused before the body is taken.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import Backend, Postgres, Service, driver
from raw_http import Answer, connect, exchange, read_answers, read_to_end, request, split_answers
from waiting import wait_until

from backend import read_origins, read_settings

SECONDS = 60
PROMPT_SECONDS = 9  # an answer that waits for nothing, on a busy machine: who waits for more says 408 after 10 s
TOKEN = "s3cret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ORIGIN = "https://page.example:8443"
PUBLIC = {"/", "/overview/{file}", "/api/health", "/readyz", "/docs", "/docs/assets/{file}", "/docs/openapi.json"}
LINE = b"192.0.2.1 GET /passed 200\n"
KEY = f"Authorization: Bearer {TOKEN}"
PLAIN = "Content-Type: text/plain"

# ---- The token ------------------------------------------------------------------------------------------------------

# The same backend, but it says which routes it has
TALKATIVE = """
import backend, falcon

add_route = falcon.App.add_route

def say_and_add(self, template, *arguments, **options):
    print("route", template, flush=True)
    return add_route(self, template, *arguments, **options)

falcon.App.add_route = say_and_add
sys.exit(backend.main([]))
"""


@pytest.fixture(scope="module")
def guarded(start_shared: Callable[..., Backend]) -> Backend:
    """A backend that wants a token and knows one origin."""
    return start_shared(API_TOKEN=TOKEN, BACKEND_CORS_ORIGINS=ORIGIN)


@pytest.fixture(scope="module")
def open_backend(start_shared: Callable[..., Backend]) -> Backend:
    """A backend without a token and without origins."""
    return start_shared()


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "LINK")


def spellings(path: str) -> list[str]:
    """Everything that a router, a proxy or a reader of this code might take for that path."""
    name, first, rest = path.removeprefix("/"), path[1], path[2:]
    parent, _, last = path.rpartition("/")
    return [
        path, name, f"/{path}", f"//{path}", f"{path}/", f"{path}//", f"/.{path}", f"/x/..{path}", f"{parent}/./{last}",
        f"{parent}//{last}", f"{parent}%2F{last}", f"{parent}%2f{last}", f"/%2F{name}", f"/%{ord(first):02x}{rest}",
        f"/%25{ord(first):02x}{rest}", path.upper(), path.title(), f"{path}%00", f"{path}%20", f"{path};x", f"{path}#x",
        f"{path}?limit=1", f"{name}?limit=1", f"?{path}", f"#{path}", f"/api/health/..{path}",
        f"/docs/assets/../..{path}",
        f"/docs/assets/..%2f..%2f{name}", f"/docs/assets{path}", f"/docs{path}", path.replace("/", "\\"),
        f"http://a{path}", f"http://a/{path}", f"HTTP://A{path}", f"https://b:1{path}", f"http:{path}", f"http:/{path}",
        f"ftp://a{path}", f"a:80{path}", f"x:{name}", f"/http://a{path}",
    ]  # fmt: skip


def test_no_spelling_of_a_private_route_passes_by_the_token(
    start: Callable[..., Service], postgres: Postgres, tmp_path: Path
) -> None:
    program = driver(tmp_path, "talkative.py", TALKATIVE)
    settings = {"HOST": "127.0.0.1", "BACKEND_PORT": 0, "DATABASE_URL": postgres.create_logs(), "API_TOKEN": TOKEN}
    backend = start(program, **settings)
    url = backend.wait_for_line(r"listening on (http://\S+)")[1]
    assert requests.post(f"{url}/api/data", data=LINE, headers=BEARER | {"Content-Type": "text/plain"}, timeout=SECONDS)
    assert requests.get(f"{url}/api/health", timeout=SECONDS).ok  # by now it has said all its routes
    routes = set(re.findall(r"^route (\S+)$", backend.printed, re.MULTILINE))
    assert routes >= {"/api/data"} | PUBLIC
    passed = []
    for route in sorted(routes - PUBLIC):
        for target, method in itertools.product(spellings(re.sub("{.*?}", "x", route)), METHODS):
            about = () if method in ("GET", "HEAD") else (PLAIN, f"Content-Length: {len(LINE)}")
            data = request(f"{method} {target} HTTP/1.1", "Connection: close", *about, body=LINE if about else b"")
            status, body = status_and_body(url, data)
            of_page = re.fullmatch("[?#].*|https?://[^/]+|/docs/assets/[^/]+", target) and method in ("HEAD", "OPTIONS")
            is_page = is_public_page(body) or (of_page and not body)
            if not (400 <= status < 500 or status in (501, 505) or is_page):
                passed.append(f"{method} {target}: {status}")
    assert not passed, f"{len(passed)} passed, such as {passed[:40]}"
    records = requests.get(f"{url}/api/data", headers=BEARER, timeout=SECONDS).json()
    assert len(records) == 1


def status_and_body(url: str, data: bytes) -> tuple[int, bytes]:
    with connect(url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(data)
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def is_public_page(body: bytes) -> bool:
    """Some odd spellings are those of the pages."""
    return body.startswith(b"<!") and b"<title>Log pipeline" in body


def test_the_public_routes_need_no_token(guarded: Backend) -> None:
    pages = [requests.get(guarded.url + path, timeout=SECONDS).text for path in ("/docs", "/")]
    files = [set(re.findall(r'"((?:docs/assets|overview)/[^"]+)"', page)) for page in pages]
    assert all(files)
    for path in (*(path for path in PUBLIC if "{" not in path), *set.union(*files)):
        answer = requests.get(f"{guarded.url}/{path.removeprefix('/')}", timeout=SECONDS)
        assert answer.status_code == 200, path


@pytest.mark.parametrize(
    "path", ["/api", "/api/data/1", "/nothing", "/docs/assets/nothing", "/overview/nothing", "/.git/config"]
)
def test_an_unknown_address_tells_nothing_without_the_token(guarded: Backend, path: str) -> None:
    [answer] = exchange(guarded.url, request(f"GET {path} HTTP/1.1", "Connection: close"), PROMPT_SECONDS)
    assert answer.status in (401, 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((), 401),
        (("Access-Control-Request-Method: POST",), 401),
        ((f"Origin: {ORIGIN}",), 401),
        (("Origin: https://evil.example", "Access-Control-Request-Method: POST"), 403),
        ((f"Origin: {ORIGIN}", "Access-Control-Request-Method: POST"), 200),
    ],
    ids=["bare", "no-origin", "no-method", "foreign", "preflight"],
)
def test_options_passes_without_the_token_only_as_a_preflight(
    guarded: Backend, headers: tuple[str, ...], status: int
) -> None:
    data = request("OPTIONS /api/data HTTP/1.1", "Connection: close", *headers)
    [answer] = exchange(guarded.url, data, PROMPT_SECONDS)
    assert answer.status in ({200, 204} if status == 200 else {status})


# ---- Origins --------------------------------------------------------------------------------------------------------

ROUTES = ("/", "/api/data", "/api/health", "/readyz", "/docs", "/docs/openapi.json", "/nothing")


def ask(backend: Backend, method: str, path: str, *headers: str, host: str = "a") -> Answer:
    body = LINE if method == "POST" else b""
    about = (PLAIN, f"Content-Length: {len(LINE)}") if body else ()
    data = request(f"{method} {path} HTTP/1.1", "Connection: close", *about, *headers, body=body, host=host)
    [answer] = exchange(backend.url, data, PROMPT_SECONDS)
    return answer


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_page_of_another_origin_is_refused_on_every_route(open_backend: Backend, method: str, path: str) -> None:
    before = len(open_backend.records())
    answer = ask(open_backend, method, path, "Origin: https://evil.example")
    assert answer.status == 403
    assert answer.headers["content-type"].split(";")[0] == "application/problem+json"
    assert json.loads(answer.body)["status"] == 403
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-origin" not in answer.headers
    assert len(open_backend.records()) == before


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("logs.example", "http://logs.example"),
        ("logs.example", "https://logs.example"),
        ("logs.example", "http://logs.example:80"),
        ("logs.example", "https://logs.example:443"),
        ("logs.example:80", "http://logs.example"),
        ("logs.example:443", "https://logs.example"),
        ("LOGS.example", "https://logs.EXAMPLE"),
        ("logs.example:8000", "http://logs.example:8000"),
        ("logs.example:8000", "https://logs.example:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[::1]", "http://[::1]"),
    ],
)
def test_a_page_of_the_servers_own_is_served(open_backend: Backend, host: str, origin: str) -> None:
    answer = ask(open_backend, "POST", "/api/data", f"Origin: {origin}", host=host)
    assert answer.status == 201
    assert "origin" in answer.headers["vary"].lower()


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://logs.example:8001",
        "http://logs.example",
        "http://logs.example.evil:8000",
        "http://evil.logs.example:8000",
        "http://logs.example:8000@evil",
        "http://evil@logs.example:8000",
        "http://evil/logs.example:8000",
        "http://logs.example:8000/",
        "http://logs.example:8000 http://evil",
        "logs.example:8000",
        "http://[",
        "http://logs.example:x",
        "*",
    ],
)
def test_what_only_looks_like_the_servers_own_origin_is_refused(open_backend: Backend, origin: str) -> None:
    before = len(open_backend.records())
    answer = ask(open_backend, "POST", "/api/data", f"Origin: {origin}", host="logs.example:8000")
    assert answer.status == 403
    assert len(open_backend.records()) == before


def test_two_origins_are_refused_also_if_one_is_known(guarded: Backend) -> None:
    for pair in ((ORIGIN, "https://evil.example"), ("https://evil.example", ORIGIN)):
        answer = ask(
            guarded, "POST", "/api/data", *(f"Origin: {one}" for one in pair), f"Authorization: Bearer {TOKEN}"
        )
        assert answer.status in (400, 403)


def test_a_page_of_a_known_origin_is_served_with_the_token_and_asked_for_it(guarded: Backend) -> None:
    token = f"Authorization: Bearer {TOKEN}"
    stored = ask(guarded, "POST", "/api/data", f"Origin: {ORIGIN}", token)
    assert (stored.status, stored.headers["access-control-allow-origin"]) == (201, ORIGIN)
    assert ask(guarded, "POST", "/api/data", f"Origin: {ORIGIN}").status == 401
    assert ask(guarded, "POST", "/api/data", "Origin: https://evil.example", token).status == 403


def test_an_answer_says_that_it_depends_on_the_origin(guarded: Backend, open_backend: Backend) -> None:
    for backend in (guarded, open_backend):
        for origin in ((), (f"Origin: {ORIGIN}",), ("Origin: https://evil.example",)):
            answer = ask(backend, "GET", "/api/data", *origin, f"Authorization: Bearer {TOKEN}")
            assert "origin" in answer.headers.get("vary", "").lower(), (answer.status, origin)


def test_any_origin_is_served_where_the_settings_say_so(start_backend: Callable[..., Backend]) -> None:
    backend = start_backend(BACKEND_CORS_ORIGINS="*")
    assert ask(backend, "POST", "/api/data", "Origin: https://any.example").status == 201


@pytest.mark.parametrize(
    ("setting", "origin"),
    [
        ("https://Page.Example", "https://page.example"),
        ("https://page.example:443", "https://page.example"),
        ("http://x.example, http://page.example:80", "http://page.example"),
        ("HTTPS://[2001:DB8::1]:8443", "https://[2001:db8::1]:8443"),
    ],
)
def test_an_origin_may_be_written_as_people_do(setting: str, origin: str) -> None:
    settings = read_settings({"BACKEND_CORS_ORIGINS": setting})
    assert origin in read_origins(settings.backend_cors_origins)


@pytest.mark.parametrize("setting", ["http://page.example:443", "https://page.example:80", "https://page.example:8443"])
def test_an_origin_keeps_a_port_that_is_not_the_schemes_own(setting: str) -> None:
    assert read_origins(setting) == [setting]


def test_a_client_without_an_origin_is_no_page_and_is_served(open_backend: Backend) -> None:
    assert ask(open_backend, "POST", "/api/data").status == 201


# ---- Before the body ------------------------------------------------------------------------------------------------

TEN_MB = "Content-Length: 10000000"
BY_THE_HEAD: dict[str, tuple[bytes, int]] = {
    "token": (request("POST /api/data HTTP/1.1", PLAIN, TEN_MB), 401),
    "token, chunked": (request("POST /api/data HTTP/1.1", PLAIN, "Transfer-Encoding: chunked"), 401),
    "origin": (request("POST /api/data HTTP/1.1", KEY, PLAIN, TEN_MB, "Origin: https://evil.example"), 403),
    "route": (request("POST /nothing HTTP/1.1", KEY, PLAIN, TEN_MB), 404),
    "method": (request("PUT /api/data HTTP/1.1", KEY, PLAIN, TEN_MB), 405),
    "method of another route": (request("POST /api/health HTTP/1.1", PLAIN, TEN_MB), 405),
    "size": (request("POST /api/data HTTP/1.1", KEY, PLAIN, f"Content-Length: {16 * 1024**2 + 1}"), 413),
    "size of a terabyte": (request("POST /api/data HTTP/1.1", KEY, PLAIN, "Content-Length: 1000000000000"), 413),
    "type": (request("POST /api/data HTTP/1.1", KEY, "Content-Type: text/xml", TEN_MB), 415),
    "no type": (request("POST /api/data HTTP/1.1", KEY, TEN_MB), 415),
    "compression": (request("POST /api/data HTTP/1.1", KEY, PLAIN, TEN_MB, "Content-Encoding: gzip"), 415),
    "type, chunked": (request("POST /api/data HTTP/1.1", KEY, "Content-Type: a/b", "Transfer-Encoding: chunked"), 415),
}


@pytest.mark.parametrize("reason", BY_THE_HEAD)
def test_what_the_head_decides_is_answered_before_the_body_comes(guarded: Backend, reason: str) -> None:
    data, status = BY_THE_HEAD[reason]
    [answer] = exchange(guarded.url, data, PROMPT_SECONDS)
    assert answer.status == status
    assert answer.headers["content-type"].split(";")[0] == "application/problem+json"


@pytest.mark.parametrize("reason", ["token", "type", "route", "size"])
def test_who_sends_the_whole_body_all_the_same_still_gets_the_refusal(guarded: Backend, reason: str) -> None:
    """The server reads on and discards: a close with bytes unread would reset the connection under the answer."""
    data, status = BY_THE_HEAD[reason]
    with connect(guarded.url, seconds=PROMPT_SECONDS) as connection:
        connection.sendall(data)
        for _ in range(100):
            connection.sendall(b"x" * 100_000)
        assert read_answers(connection, 1)[0][0] == status


def test_a_chunked_body_that_passes_the_limit_is_refused_when_it_does(guarded: Backend) -> None:
    stop = threading.Event()
    with connect(guarded.url) as connection:
        connection.sendall(request("POST /api/data HTTP/1.1", KEY, PLAIN, "Transfer-Encoding: chunked"))

        def send() -> None:
            with suppress(OSError):
                while not stop.is_set():
                    connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")

        sender = threading.Thread(target=send)
        sender.start()
        try:
            [answer] = split_answers(read_to_end(connection))
        finally:
            stop.set()
            sender.join(SECONDS)
    assert answer.status == 413


# The same backend, but it lingers for one second only
SHORT = """
import backend

backend.LINGER_SECONDS = 1
sys.exit(backend.main([]))
"""


def test_who_goes_on_sending_after_a_refusal_is_cut_off_in_the_end(
    start: Callable[..., Service], postgres: Postgres, tmp_path: Path
) -> None:
    settings = {"HOST": "127.0.0.1", "BACKEND_PORT": 0, "DATABASE_URL": postgres.create_logs(), "API_TOKEN": TOKEN}
    backend = start(driver(tmp_path, "short.py", SHORT), **settings)
    url = backend.wait_for_line(r"listening on (http://\S+)")[1]
    with connect(url, seconds=PROMPT_SECONDS) as connection:
        began = time.monotonic()
        connection.sendall(request("POST /api/data HTTP/1.1", PLAIN, "Content-Length: 10000000"))
        assert split_answers(read_to_end(connection))[0].status == 401

        def is_cut_off() -> bool:
            try:
                connection.sendall(b"x")
            except ConnectionError:
                return True
            return False

        wait_until(is_cut_off, 20, "the end of the connection")
        assert time.monotonic() - began >= 1  # it lingered


def test_a_refusal_leaves_no_file_descriptor_behind(guarded: Backend) -> None:
    assert exchange(guarded.url, BY_THE_HEAD["token"][0], PROMPT_SECONDS)[0].status == 401
    before = descriptors(guarded)
    for _ in range(30):
        assert exchange(guarded.url, BY_THE_HEAD["token"][0], PROMPT_SECONDS)[0].status == 401
    wait_until(lambda: descriptors(guarded) <= before, what="the closing of refused connections")


def descriptors(backend: Backend) -> int:
    """How many it has open, but for Unix sockets: sessions of PostgreSQL come and go with what it does beside."""
    sessions = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    targets = []
    for entry in Path(f"/proc/{backend.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(entry))
    return sum(target[8:-1] not in sessions for target in targets)


def test_a_connection_goes_on_after_a_refusal_whose_body_has_come(guarded: Backend) -> None:
    record_id = str(uuid.uuid4())
    with requests.Session() as session:
        assert session.post(guarded.data_url, json={"log": "x"}, timeout=SECONDS).status_code == 401
        document: Any = {"id": record_id, "log": "192.0.2.1 GET / 200"}
        assert session.post(guarded.data_url, json=document, headers=BEARER, timeout=SECONDS).status_code == 201
