"""The HTTP API: a real backend on a real PostgreSQL, asked as a client would ask it."""

from __future__ import annotations

import json
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import psycopg
import pytest
import requests
from harness import Backend, Postgres, Service, backend_command, kept_port, line_of
from waiting import wait_until

LINE = "1.2.3.4 GET https://domain.com/example/ab 200"
CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
SECONDS = 60  # for one answer on a busy machine
NDJSON = {"Accept": "application/x-ndjson"}
TOKEN = "s3cret.~+/="
ORIGIN = "https://page.example:8443"

# ---- One backend for most tests; each looks only at what it stored itself -------------------------------------------


@pytest.fixture(scope="module")
def services() -> Iterator[list[Service]]:
    """As in conftest.py, for the length of this file."""
    started: list[Service] = []
    yield started
    for service in reversed(started):
        service.destroy()


@pytest.fixture(scope="module")
def start_here(
    services: list[Service], postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Backend]:
    folder = tmp_path_factory.mktemp("api")

    def start(url: str = "", **settings: Any) -> Backend:
        service = Backend(folder / f"{len(services)}.out", url or postgres.create_logs(), **settings)
        services.append(service)
        return service

    return start


@pytest.fixture(scope="module")
def backend(start_here: Callable[..., Backend]) -> Backend:
    return start_here()


@pytest.fixture(scope="module")
def guarded(start_here: Callable[..., Backend]) -> Backend:
    """A backend that wants a token and knows two origins."""
    return start_here(API_TOKEN=TOKEN, BACKEND_CORS_ORIGINS=f"https://other.example, {ORIGIN}")


# ---- Asking ---------------------------------------------------------------------------------------------------------


def post(backend: Backend, document: Any, **more: Any) -> requests.Response:
    return requests.post(backend.data_url, json=document, timeout=SECONDS, **more)


def post_bytes(backend: Backend, body: Any, media_type: str = "application/json", **headers: str) -> requests.Response:
    headers = {"Content-Type": media_type, **headers}
    return requests.post(backend.data_url, data=body, headers=headers, timeout=SECONDS)


def post_text(backend: Backend, text: str | bytes) -> requests.Response:
    return post_bytes(backend, text if isinstance(text, bytes) else text.encode(), "text/plain")


def get(backend: Backend, query: str = "", headers: dict[str, str] | None = None, **params: Any) -> requests.Response:
    return requests.get(backend.data_url + query, params=params, headers=headers, timeout=SECONDS)


def raw(backend: Backend, data: bytes, half_close: bool = False) -> bytes:
    """What the server answers to these bytes, until it closes the connection."""
    address = urlsplit(backend.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=SECONDS) as connection:
        answer = b""
        with suppress(ConnectionError):  # it may close while we are still sending; what came before counts
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
        return answer


def store(backend: Backend, line: str = LINE, **more: Any) -> dict[str, Any]:
    """Stores a line: {"id", "created"}."""
    answer = post(backend, {"log": line, **more})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def record_of(backend: Backend, stored: dict[str, Any]) -> dict[str, Any]:
    [record] = get(backend, date_from=stored["created"], limit=1).json()
    assert record["id"] == stored["id"]
    return dict(record)


def lines_since(backend: Backend, stored: dict[str, Any]) -> list[str]:
    """The lines stored after that one."""
    return [line_of(record) for record in get(backend, date_from=stored["created"]).json()[1:]]


def next_of(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return urljoin(answer.url, answer.links["next"]["url"])


def follow(address: str, enough: Callable[[list[dict[str, Any]]], bool], quiet_rounds: int = 2) -> list[dict[str, Any]]:
    """All records that come by following `next`, until it is enough, and a few rounds further."""
    records: list[dict[str, Any]] = []

    def step() -> int:
        nonlocal address
        answer = requests.get(address, timeout=SECONDS)
        address = next_of(answer)
        page = answer.json()
        records.extend(page)
        return len(page)

    wait_until(lambda: (step(), enough(records))[1], SECONDS, "all records", poll=0)
    for _ in range(quiet_rounds):
        step()
    return records


def assert_problem(answer: requests.Response, status: int, *words: str) -> dict[str, Any]:
    """An RFC 9457 problem of that status, whose detail has these words."""
    assert answer.status_code == status, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["Content-Type"].split(";")[0] == "application/problem+json"
    return check_problem(answer.text, status, *words)


def check_problem(text: str, status: int, *words: str) -> dict[str, Any]:
    assert "Traceback" not in text
    body = dict(json.loads(text))
    assert isinstance(body["type"], str)
    assert body["title"]
    assert body["status"] == status
    assert len(body["detail"]) > 10
    for word in words:
        assert word in body["detail"], f"{word!r} is not in {body['detail']!r}"
    return body


def assert_raw_problem(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, answer[:500]
    assert b"content-type: application/problem+json" in head.lower()
    check_problem(body.decode(), status)


def assert_increasing(records: list[dict[str, Any]]) -> None:
    created = [record["created"] for record in records]
    assert all(map(CREATED.fullmatch, created))
    assert created == sorted(set(created))


# ---- One line -------------------------------------------------------------------------------------------------------


def test_a_line_is_stored_with_201_and_comes_back_as_it_was(backend: Backend) -> None:
    stored = store(backend)
    assert stored.keys() == {"id", "created"}
    assert record_of(backend, stored) == {
        "id": stored["id"],
        "created": stored["created"],
        "log": {"ip": "1.2.3.4", "method": "GET", "uri": "https://domain.com/example/ab", "status_code": 200},
    }


def test_the_older_client_with_its_trailing_newline_works_unchanged(backend: Backend) -> None:
    answer = post_bytes(backend, b'{"log": "1.2.3.4 GET https://domain.com/example/ab 200\\n"}')
    assert answer.status_code == 201
    assert line_of(record_of(backend, answer.json())) == LINE


@pytest.mark.parametrize("white", [" ", "\n", "\r\n", "\t", " \t\r\n "])
def test_white_space_around_a_line_is_not_part_of_it(backend: Backend, white: str) -> None:
    assert line_of(record_of(backend, store(backend, white + LINE + white))) == LINE


def test_a_line_sent_again_under_its_id_is_stored_once_and_answered_200(backend: Backend) -> None:
    name = str(uuid.uuid4())
    stored = store(backend, id=name)
    again = post(backend, {"log": LINE, "id": name.upper()})
    assert (again.status_code, again.json()) == (200, stored)
    assert stored["id"] == name
    assert lines_since(backend, stored) == []


OTHERS = {
    "address": "1.2.3.5 GET https://domain.com/example/ab 200",
    "method": "1.2.3.4 get https://domain.com/example/ab 200",
    "URI": "1.2.3.4 GET https://domain.com/example/aB 200",
    "status": "1.2.3.4 GET https://domain.com/example/ab 201",
    "all": "9.9.9.9 PUT /another 500",
}


@pytest.mark.parametrize("part", OTHERS)
def test_another_line_under_an_id_that_is_taken_is_a_409_and_stored_nowhere(backend: Backend, part: str) -> None:
    stored = store(backend, id=str(uuid.uuid4()))
    assert_problem(post(backend, {"log": OTHERS[part], "id": stored["id"]}), 409, "id")
    assert line_of(record_of(backend, stored)) == LINE
    assert lines_since(backend, stored) == []


@pytest.mark.parametrize("address", ["2001:DB8::1", "2001:db8:0:0:0:0:0:1", "2001:db8::0.0.0.1"])
def test_the_same_line_is_what_the_database_takes_for_the_same(backend: Backend, address: str) -> None:
    stored = store(backend, "2001:db8::1 GET /same 200", id=str(uuid.uuid4()))
    again = post(backend, {"log": f" {address}\tGET  /same 200\n", "id": stored["id"]})
    assert (again.status_code, again.json()) == (200, stored)


def test_another_line_under_a_taken_id_is_rejected_in_a_batch_and_the_others_are_stored(backend: Backend) -> None:
    taken = store(backend, id=str(uuid.uuid4()))
    items = [
        {"log": "1.2.3.4 GET /new 200", "id": str(uuid.uuid4())},
        {"log": OTHERS["all"], "id": taken["id"]},
        {"log": LINE, "id": taken["id"]},
        {"log": "nonsense"},
        {"log": "1.2.3.4 GET /newer 200"},
    ]
    answer = post(backend, items[:2] + items[3:])
    body = answer.json()
    assert (answer.status_code, body["accepted"], body["duplicates"]) == (201, 2, 0)
    assert [item["index"] for item in body["rejected"]] == [1, 2]
    assert "id" in body["rejected"][0]["reason"]
    assert "4 fields" in body["rejected"][1]["reason"]
    assert lines_since(backend, taken) == ["1.2.3.4 GET /new 200", "1.2.3.4 GET /newer 200"]
    again = post(backend, [items[0], items[2]])
    assert (again.status_code, again.json()) == (201, {"accepted": 0, "duplicates": 2, "rejected": []})


def test_a_batch_of_nothing_but_taken_ids_with_other_lines_is_a_400_with_every_reason(backend: Backend) -> None:
    taken = [store(backend, id=str(uuid.uuid4()))["id"] for _ in range(3)]
    last = store(backend)
    problem = assert_problem(post(backend, [{"log": OTHERS["all"], "id": name} for name in taken]), 400)
    assert [item["index"] for item in problem["rejected"]] == [0, 1, 2]
    assert all("id" in item["reason"] for item in problem["rejected"])
    assert lines_since(backend, last) == []


def test_of_two_lines_that_race_for_an_id_one_is_stored_and_the_other_told_409(backend: Backend) -> None:
    for _ in range(10):
        name, lines = str(uuid.uuid4()), [f"1.2.3.4 GET /{n} 200" for n in range(8)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda line: post(backend, {"log": line, "id": name}), lines))  # noqa: B023
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
        [(won, answer)] = [pair for pair in zip(lines, answers, strict=True) if pair[1].status_code == 201]
        assert line_of(record_of(backend, answer.json())) == won


def test_a_line_that_stands_twice_under_the_id_of_another_is_rejected_twice(backend: Backend) -> None:
    stored = store(backend, id=str(uuid.uuid4()))
    other = {"id": stored["id"], "log": "9.9.9.9 PUT /another 500"}
    answer = post(backend, [other, other, {"log": LINE}])
    assert (answer.json()["accepted"], answer.json()["duplicates"]) == (1, 0)
    assert [item["index"] for item in answer.json()["rejected"]] == [0, 1]
    body = assert_problem(post(backend, [other, other]), 400)
    assert [item["index"] for item in body["rejected"]] == [0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "7",
        "0123456789abcdef0123456789abcdef",
        "{01234567-89ab-cdef-0123-456789abcdef}",
        "\ud800",
        "\0",
        7,
        None,
        [],
    ],
)
def test_an_id_that_is_no_uuid_is_refused(backend: Backend, name: Any) -> None:
    assert_problem(post(backend, {"log": LINE, "id": name}), 400, '"id"')


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("", "IP METHOD URI STATUS"),
        (" \n", "IP METHOD URI STATUS"),
        ("1.2.3.4 GET /a", "3"),
        ("1.2.3.4 GET /a b 200", "5"),
        ("1.2.3.4 GET /a 200\n1.2.3.4 GET /b 200", "U+000A"),
        ("1.2.3 GET /a 200", "IP address"),
        ("256.1.1.1 GET /a 200", "IP address"),
        ("01.2.3.4 GET /a 200", "IP address"),
        ("1.2.3.4/24 GET /a 200", "IP address"),
        ("::g GET /a 200", "IP address"),
        ("1::2::3 GET /a 200", "IP address"),
        ("fe80::1%eth0 GET /a 200", "IP address"),
        ("1:2:3:4:5:6:7:8:9 GET /a 200", "IP address"),
        ("\u0661.2.3.4 GET /a 200", "IP address"),
        ("1.2.3.4 G@T /a 200", "method"),
        ("1.2.3.4 GÉT /a 200", "method"),
        (f"1.2.3.4 {'M' * 33} /a 200", "method"),
        ("1.2.3.4 GET /a\u00a0b 200", "URI"),
        ("1.2.3.4 GET /a\u2028b 200", "URI"),
        ("1.2.3.4 GET /a\u3000b 200", "URI"),
        ("1.2.3.4 GET /a\ufeffb 200", "URI"),
        ("1.2.3.4 GET /a\0b 200", "U+0000"),
        ("1.2.3.4 GET /a\x1bb 200", "U+001B"),
        ("1.2.3.4 GET /a\x7fb 200", "U+007F"),
        ("1.2.3.4 GET /a\u0085b 200", "U+0085"),
        ("1.2.3.4 GET /a\ud800b 200", "UTF-8"),
        ("1.2.3.4 GET /a 99", "status"),
        ("1.2.3.4 GET /a 600", "status"),
        ("1.2.3.4 GET /a 0200", "status"),
        ("1.2.3.4 GET /a 20x", "status"),
        ("1.2.3.4 GET /a \u0662\u0660\u0660", "status"),
        ("1.2.3.4 GET /a -200", "status"),
    ],
)
def test_a_line_that_is_none_is_refused_with_what_to_mend(backend: Backend, line: str, word: str) -> None:
    before = store(backend)
    assert_problem(post(backend, {"log": line}), 400, word)
    assert lines_since(backend, before) == []


@pytest.mark.parametrize(
    "line",
    [
        "1.2.3.4 GET /a 100",
        "1.2.3.4 GET /a 599",
        f"1.2.3.4 {'M' * 32} /a 200",
        "1.2.3.4 !#$%&'*+-.^_`|~ /a 200",
        "1.2.3.4 get /a 200",
        "0.0.0.0 GET / 200",
        "255.255.255.255 OPTIONS / 200",
        "1.2.3.4 GET /ä/日本/😀 200",
        "1.2.3.4 GET mailto:a@b 200",
        r"""1.2.3.4 GET /"quoted'\back\\slash\n\u0041/</script> 200""",
        "1.2.3.4 GET /%00%ff?a=b&c={}[]|^`,: 200",
        "1.2.3.4 GET http://[2001:db8::1]:80/ 200",
        "1.2.3.4 OPTIONS * 200",
        "1.2.3.4 CONNECT domain.com:443 405",
        "1.2.3.4 - - 408",
        "1.2.3.4 GET a 200",
        "1.2.3.4 GET 1http://a 400",
        "1.2.3.4 - %16%03%01 400",
        r"1.2.3.4 - \x16\x03\x01 400",
        "1.2.3.4 GET ../../etc/passwd 400",
        "1.2.3.4 GET // 400",
        "1.2.3.4 GET :// 400",
        '1.2.3.4 GET " 400',
        "1.2.3.4 GET \u00e9 400",
        "1.2.3.4 GET ${jndi:ldap://a/b} 400",
    ],
)
def test_a_line_comes_back_unharmed_in_both_forms(backend: Backend, line: str) -> None:
    stored = store(backend, line)
    assert line_of(record_of(backend, stored)) == line
    answer = get(backend, headers=NDJSON, date_from=stored["created"])
    assert line_of(json.loads(answer.content)) == line


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("/" + "a" * 8191, 201),
        ("/" + "a" * 8192, 400),
        ("/a" + "ä" * 4095, 201),
        ("/" + "ä" * 4096, 400),
        ("/" + "\\" * 8191, 201),
        ("a" * 8192, 201),
        ("*" * 8193, 400),
    ],
)
def test_a_uri_has_8192_bytes_at_most(backend: Backend, uri: str, status: int) -> None:
    answer = post(backend, {"log": f"1.2.3.4 GET {uri} 200"})
    assert answer.status_code == status
    if status == 400:
        assert_problem(answer, 400, "8192")
    else:
        assert record_of(backend, answer.json())["log"]["uri"] == uri


# ---- Bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nul",
        b'{"log": "1.2.3.4 GET /a 200"} {}',
        b"{'log': '1.2.3.4 GET /a 200'}",
        b'{"log": "1.2.3.4 GET /a 200\n"}',
        b'\xef\xbb\xbf{"log": "1.2.3.4 GET /a 200"}',
        '{"log": "1.2.3.4 GET /a 200"}'.encode("utf-16"),
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"log":' * 100_000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_not_json_is_refused(backend: Backend, body: bytes) -> None:
    assert_problem(post_bytes(backend, body), 400, "body")


GOOD = b'{"log": "1.2.3.4 GET /number 200"}'


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
@pytest.mark.parametrize(
    "body",
    [
        b"%b",
        b'{"log": %b}',
        b"[%b]",
        GOOD[:-1] + b', "id": %b}',
        b"[" + GOOD + b", %b]",
        b"[" + GOOD + b', {"x": [%b]}]',
    ],
    ids=lambda body: repr(body[-12:]),
)
def test_what_json_does_not_call_a_number_is_refused_everywhere(backend: Backend, body: bytes, number: bytes) -> None:
    before = store(backend)
    assert_problem(post_bytes(backend, body % number), 400, "JSON")
    assert lines_since(backend, before) == []


@pytest.mark.parametrize(
    "body", [b'{"log": "1.2.3.4 GET /\xff 200"}', b"\xff\xfe", b'{"log": "1.2.3.4 GET /\xed\xa0\x80 200"}']
)
def test_a_json_body_that_is_not_utf8_is_refused(backend: Backend, body: bytes) -> None:
    assert_problem(post_bytes(backend, body), 400, "UTF-8")


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"7",
        b'"1.2.3.4 GET /a 200"',
        b"{}",
        b'{"log": null}',
        b'{"log": 1e999}',
        b'{"log": 1' + b"0" * 9999 + b"}",
        b'{"log": ["1.2.3.4 GET /a 200"]}',
        b'{"LOG": "1.2.3.4 GET /a 200"}',
        b'{"log": "1.2.3.4 GET /a 200", "more": 1}',
        b'{"log": "1.2.3.4 GET /a 200", "\\ud800\\u0000": 1}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_json_of_another_shape_is_refused(backend: Backend, body: bytes) -> None:
    assert_problem(post_bytes(backend, body), 400, "log")


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json; charset=utf-8",
        'Application/JSON;charset="UTF-8"',
        "application/json;charset=us-ascii",
        "text/plain",
        "text/plain; charset=UTF-8; format=flowed",
    ],
)
def test_media_types_may_be_written_in_any_way_that_means_utf8(backend: Backend, media_type: str) -> None:
    body = LINE if media_type.startswith("text") else json.dumps({"log": LINE})
    assert post_bytes(backend, body, media_type).status_code == 201


@pytest.mark.parametrize(
    ("media_type", "encoding"),
    [
        ("text/xml", "identity"),
        ("text/csv", "identity"),
        ("application/jsonl", "identity"),
        ("application/x-www-form-urlencoded", "identity"),
        ("multipart/form-data; boundary=a", "identity"),
        ("application/json; charset=latin-1", "identity"),
        ("text/plain; charset=utf-16", "identity"),
        ("", "identity"),
        ("application/json", "gzip"),
        ("text/plain", "br"),
    ],
)
def test_another_media_type_charset_or_compression_is_refused_with_415(
    backend: Backend, media_type: str, encoding: str
) -> None:
    answer = post_bytes(backend, json.dumps({"log": LINE}), media_type, **{"Content-Encoding": encoding})
    assert_problem(answer, 415, "application/json", "text/plain")


def test_a_body_without_a_content_type_is_refused_with_415(backend: Backend) -> None:
    answer = requests.post(backend.data_url, data=LINE.encode(), timeout=SECONDS)
    assert "Content-Type" not in answer.request.headers
    assert_problem(answer, 415, "Content-Type")


def test_a_body_may_come_in_chunks(backend: Backend) -> None:
    body = json.dumps({"log": LINE}).encode()
    answer = post_bytes(backend, (body[n : n + 7] for n in range(0, len(body), 7)))
    assert answer.status_code == 201


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_gets_its_413(backend: Backend, chunked: bool) -> None:
    part = b"x" * 1024**2
    assert_problem(post_bytes(backend, (part for _ in range(17)) if chunked else part * 17), 413, "16777216")


@pytest.mark.parametrize(("length", "status"), [(b"1000000000000", 413), (b"-5", 400), (b"five", 400), (b"5, 6", 400)])
def test_a_length_that_cannot_be_is_refused_before_the_body_comes(backend: Backend, length: bytes, status: int) -> None:
    assert_raw_problem(raw(backend, head(length)), status)


def head(length: bytes | int) -> bytes:
    """The head of a POST that announces a body of that length."""
    number = str(length).encode() if isinstance(length, int) else length
    return (
        b"POST /api/data HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + number + b"\r\n\r\n"
    )


@pytest.mark.parametrize("half_close", [False, True])
@pytest.mark.parametrize("cut", [1, 10])
def test_a_body_cut_short_stores_nothing(backend: Backend, half_close: bool, cut: int) -> None:
    before = store(backend)
    body = json.dumps({"log": LINE}).encode()
    if half_close:
        assert b" 20" not in raw(backend, head(len(body)) + body[:-cut], half_close=True)
    else:
        hang_up_after(backend, head(len(body)) + body[:-cut])
    assert post(backend, {"log": "1.2.3.4 GET /after 200"}).status_code == 201
    assert lines_since(backend, before) == ["1.2.3.4 GET /after 200"]


def hang_up_after(backend: Backend, data: bytes) -> None:
    address = urlsplit(backend.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=SECONDS) as connection:
        connection.sendall(data)


def test_a_whole_request_is_answered_also_when_the_sender_has_closed_its_side(backend: Backend) -> None:
    body = json.dumps({"log": LINE}).encode()
    assert raw(backend, head(len(body)) + body, half_close=True).startswith(b"HTTP/1.1 201 ")


# ---- Batches --------------------------------------------------------------------------------------------------------


def test_an_array_is_stored_as_a_batch_in_its_order(backend: Backend) -> None:
    before = store(backend)
    lines = [f"1.2.3.4 GET /array/{n} 200" for n in range(100)]
    answer = post(backend, [{"log": line} for line in lines])
    assert (answer.status_code, answer.json()) == (201, {"accepted": 100, "duplicates": 0, "rejected": []})
    assert lines_since(backend, before) == lines


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_text_is_a_line_per_record(backend: Backend, end: str, last: str) -> None:
    before = store(backend)
    lines = [f"1.2.3.4 GET /text/{n} 200" for n in range(3)]
    answer = post_text(backend, end.join(lines) + end * bool(last))
    assert (answer.status_code, answer.json()) == (201, {"accepted": 3, "duplicates": 0, "rejected": []})
    assert lines_since(backend, before) == lines


def test_bad_lines_of_a_text_do_not_hold_up_good_ones(backend: Backend) -> None:
    before = store(backend)
    answer = post_text(backend, b"1.2.3.4 GET /a 200\n\nnonsense\n1.2.3.4 GET /\xff 200\n\r\n1.2.3.4 GET /b 200\r\n")
    body = answer.json()
    assert (answer.status_code, body["accepted"], body["duplicates"]) == (201, 2, 0)
    assert [item["index"] for item in body["rejected"]] == [1, 2, 3, 4]
    empty, nonsense, invalid, blank = (item["reason"] for item in body["rejected"])
    assert "IP METHOD URI STATUS" in empty
    assert "4 fields" in nonsense
    assert "UTF-8" in invalid
    assert blank == empty
    assert lines_since(backend, before) == ["1.2.3.4 GET /a 200", "1.2.3.4 GET /b 200"]


def test_bad_items_of_an_array_do_not_hold_up_good_ones(backend: Backend) -> None:
    bad: list[Any] = [
        None,
        7,
        LINE,
        [],
        {},
        {"log": ""},
        {"log": "a\ud800\0"},
        {"log": LINE, "id": "x"},
        {"log": LINE, "x": 1},
    ]
    answer = post(backend, [{"log": LINE}, *bad, {"log": LINE}])
    body = answer.json()
    assert (answer.status_code, body["accepted"], body["duplicates"]) == (201, 2, 0)
    assert [item["index"] for item in body["rejected"]] == list(range(1, len(bad) + 1))
    assert all(len(item["reason"]) > 10 for item in body["rejected"])


def test_nothing_accepted_at_all_is_a_400_with_every_reason(backend: Backend) -> None:
    for answer in (post_text(backend, "a\nb"), post(backend, [{"log": "a"}, "b"])):
        rejected = assert_problem(answer, 400)["rejected"]
        assert [item["index"] for item in rejected] == [0, 1]
        assert all(item["reason"] for item in rejected)


def test_the_same_id_twice_in_one_batch_is_a_duplicate_if_the_line_is_the_same(backend: Backend) -> None:
    before = store(backend)
    name = str(uuid.uuid4())
    answer = post(backend, [{"log": LINE, "id": name}, {"log": LINE + "\n", "id": name.upper()}, {"log": LINE}])
    assert (answer.status_code, answer.json()) == (201, {"accepted": 2, "duplicates": 1, "rejected": []})
    assert lines_since(backend, before) == [LINE, LINE]


def test_the_same_id_twice_in_one_batch_is_refused_if_the_line_differs(backend: Backend) -> None:
    before = store(backend)
    name = str(uuid.uuid4())
    answer = post(backend, [{"log": LINE, "id": name}, {"log": "5.6.7.8 PUT /b 500", "id": name}])
    body = answer.json()
    assert (answer.status_code, body["accepted"], body["duplicates"]) == (201, 1, 0)
    assert [item["index"] for item in body["rejected"]] == [1]
    assert "id" in body["rejected"][0]["reason"]
    assert lines_since(backend, before) == [LINE]


def test_a_batch_sent_again_is_accepted_with_nothing_but_duplicates(backend: Backend) -> None:
    batch = [{"log": f"1.2.3.4 GET /again/{n} 200", "id": str(uuid.uuid4())} for n in range(10)]
    before = store(backend)
    assert post(backend, batch).json()["accepted"] == 10
    answer = post(backend, batch)
    assert (answer.status_code, answer.json()) == (201, {"accepted": 0, "duplicates": 10, "rejected": []})
    assert len(lines_since(backend, before)) == 10


def test_a_batch_sent_again_with_more_lines_stores_just_those(backend: Backend) -> None:
    batch = [{"log": f"1.2.3.4 GET /more/{n} 200", "id": str(uuid.uuid4())} for n in range(6)]
    before = store(backend)
    post(backend, batch[1::2])
    answer = post(backend, batch)
    assert answer.json() == {"accepted": 3, "duplicates": 3, "rejected": []}
    assert lines_since(backend, before) == [batch[n]["log"] for n in (1, 3, 5, 0, 2, 4)]


def test_an_empty_batch_is_refused(backend: Backend) -> None:
    assert_problem(post(backend, []), 400, "10000")
    assert_problem(post_text(backend, ""), 400, "10000")


def test_a_batch_has_10000_lines_at_most(backend: Backend) -> None:
    before = store(backend)
    assert_problem(post_text(backend, f"{LINE}\n" * 10_001), 400, "10000")
    assert_problem(post(backend, [{"log": LINE}] * 10_001), 400, "10000")
    assert lines_since(backend, before) == []
    assert post_text(backend, f"{LINE}\n" * 10_000).json()["accepted"] == 10_000


# ---- Windows --------------------------------------------------------------------------------------------------------


def test_the_older_exporter_with_its_dates_works_unchanged(backend: Backend) -> None:
    first, second = store(backend), store(backend)
    everything = get(backend, date_from="1970-01-01 00:00:00").json()
    assert [record["id"] for record in everything[-2:]] == [first["id"], second["id"]]
    later = first["created"].removesuffix("Z").replace("T", " ")
    assert [record["id"] for record in get(backend, date_from=later).json()] == [first["id"], second["id"]]


@pytest.mark.parametrize("space", ["+", "%20", " "])
def test_a_space_in_a_date_may_be_escaped_in_any_way(backend: Backend, space: str) -> None:
    address = urlsplit(backend.url)
    path = f"/api/data?date_from=2026-11-23{space}18:43:46.610595&date_to=2026-11-23T18%3A43%3A46.610595Z"
    answer = raw(backend, f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split()[1]) == (400 if space == " " else 200)  # a bare one is no HTTP
    assert space == " " or answer.endswith(b"[]\n")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-01 00:00:00", "1970-01-01T00:00:00.000000Z"),
        ("2001-02-03", "2001-02-03T00:00:00.000000Z"),
        ("2001-02-03T04:05", "2001-02-03T04:05:00.000000Z"),
        ("2001-02-03T04:05:06", "2001-02-03T04:05:06.000000Z"),
        ("2001-02-03 04:05:06.789012", "2001-02-03T04:05:06.789012Z"),
        ("2001-02-03T04:05:06.7Z", "2001-02-03T04:05:06.700000Z"),
        ("2001-02-03t04:05:06.789012z", "2001-02-03T04:05:06.789012Z"),
        ("2001-02-03T04:05:06.789012999Z", "2001-02-03T04:05:06.789012Z"),
        ("2001-02-03T04:05:06.789012+02:00", "2001-02-03T02:05:06.789012Z"),
        ("2001-02-03T04:05:06+0530", "2001-02-02T22:35:06.000000Z"),
        ("2001-02-03 04:05:06.789012+00", "2001-02-03T04:05:06.789012Z"),
        ("2001-02-03T04:05-08", "2001-02-03T12:05:00.000000Z"),
        ("2001-02-03 04:05:06-23:59", "2001-02-04T04:04:06.000000Z"),
        ("2000-02-29", "2000-02-29T00:00:00.000000Z"),
        ("1000-01-01", "1000-01-01T00:00:00.000000Z"),
        ("0", "1970-01-01T00:00:00.000000Z"),
        ("-1.5", "1969-12-31T23:59:58.500000Z"),
        ("981173106", "2001-02-03T04:05:06.000000Z"),
        ("981173106.789012", "2001-02-03T04:05:06.789012Z"),
        ("981173106.7", "2001-02-03T04:05:06.700000Z"),
    ],
)
def test_a_date_is_understood_in_every_accepted_form(backend: Backend, text: str, moment: str) -> None:
    store(backend)
    answer = get(backend, date_from=text, date_to=text)  # an empty window; the next one starts at its end
    assert (answer.status_code, answer.json()) == (200, [])
    assert answer.links["next"]["url"] == f"?date_from={moment}"


def test_an_offset_is_understood_also_with_an_unescaped_plus(backend: Backend) -> None:
    store(backend)
    answer = get(backend, "?date_from=2001-02-03T04:05:06+02:00&date_to=2001-02-03T04:05:06+02:00")
    assert answer.links["next"]["url"] == "?date_from=2001-02-03T02:05:06.000000Z"


BAD_DATES = [
    "", " ", "yesterday", "2026-11", "2026-13-01", "2026-02-30", "2025-02-29", "1900-02-29", "2026-1-1",
    "2026-11-23T24:00:00", "2026-11-23T18:60:00", "2026-11-23T18:43:60Z", "2026-11-23T18", "2026-11-23T18:43:46.",
    "2026-11-23T18:43:46+24:00", "2026-11-23T18:43:46 UTC", " 2026-11-23", "2026-11-23\n", "2026-11-23T18:43:46Z\0",
    "0001-01-01", "0000-00-00", "10000-01-01", "-2026-11-23", "1764000000000", "1e9", "0x10", "nan", "inf",
    "2026-11-23T18:43:46+24", "2026-11-23+02", "99999999999", "20260101", "20261231", "19700101",
    "\u0662\u0660\u0662\u0666-11-23", "\U0001f600",
]  # fmt: skip


@pytest.mark.parametrize("name", ["date_from", "date_to"])
@pytest.mark.parametrize("text", BAD_DATES, ids=ascii)
def test_a_bad_date_is_refused_by_name(backend: Backend, name: str, text: str) -> None:
    assert_problem(get(backend, f"?{urlencode({name: text})}"), 400, name)


def test_a_window_from_the_earliest_to_the_latest_date_has_everything(backend: Backend) -> None:
    stored = store(backend)
    records = get(backend, date_from="1000-01-01", date_to="9999-12-31T23:59:59.999999Z").json()
    assert records[-1]["id"] == stored["id"]


def test_offsets_beyond_the_ends_of_the_calendar_do_no_harm(backend: Backend) -> None:
    for text in ("9999-12-31T23:59:59-23:59", "1000-01-01T00:00:00+23:59"):
        answer = get(backend, date_from=text)
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert_problem(answer, 400, "date_from")


def test_a_reversed_window_is_refused_and_an_empty_one_is_not(backend: Backend) -> None:
    assert_problem(get(backend, date_from="2001-02-03", date_to="2001-02-02"), 400, "date_from", "date_to")
    assert get(backend, date_from="2001-02-03", date_to="2001-02-03").json() == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("limit", value)
            for value in ("", "0", "-1", "+1", "1.5", "1e3", "abc", "1000001", "9" * 30, "\uff11", "1 ")
        ),
        *(("status_code", value) for value in ("", "99", "600", "2xx", "-200", "200.0", "\u0662\u0660\u0660")),
        *(("method", value) for value in ("", "G T", "M" * 33, "GÉT", "GET\n", "GET\0")),
        *(
            ("ip", value)
            for value in ("", "1.2.3", "256.1.1.1", "1.2.3.4/24", "::g", "fe80::1%eth0", "1.2.3.4\0", "localhost")
        ),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_parameter(backend: Backend, name: str, value: str) -> None:
    assert_problem(get(backend, f"?{urlencode({name: value})}"), 400, name)


@pytest.mark.parametrize("query", ["?ip=%ff", "?date_from=%ed%a0%80", "?method=%00", "?limit=%"])
def test_bytes_that_are_no_utf8_in_a_query_are_refused(backend: Backend, query: str) -> None:
    assert_problem(get(backend, query), 400, query[1:].partition("=")[0])


@pytest.mark.parametrize("query", ["?page=1", "?Limit=1", "?date_from=0&x", "?%00=1", "?%ff=1"])
def test_an_unknown_parameter_is_refused(backend: Backend, query: str) -> None:
    assert_problem(get(backend, query), 400, "date_from", "limit")


@pytest.mark.parametrize("query", ["?limit=1&limit=1", "?date_from=0&date_from=1", "?ip=::1&method=GET&ip=::2"])
def test_a_parameter_given_twice_is_refused(backend: Backend, query: str) -> None:
    assert_problem(get(backend, query), 400, query[1:].partition("=")[0])


def test_a_window_has_its_start_and_not_its_end(backend: Backend) -> None:
    first, second, third = (store(backend) for _ in range(3))
    records = get(backend, date_from=first["created"], date_to=third["created"]).json()
    assert [record["id"] for record in records] == [first["id"], second["id"]]


def test_a_window_without_an_end_has_the_newest_record(backend: Backend) -> None:
    stored = store(backend)
    assert get(backend).json()[-1]["id"] == stored["id"]


def test_created_increases_strictly_and_is_written_in_utc_with_six_decimals(backend: Backend) -> None:
    before = store(backend)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: store(backend, f"1.2.3.4 GET /{n} 200"), range(50)))
    records = get(backend, date_from=before["created"]).json()[1:]
    assert_increasing(records)
    assert sorted(answer["created"] for answer in answers) == [record["created"] for record in records]


def largest_limit(backend: Backend) -> int:
    """As the API's own description states it."""
    document = requests.get(f"{backend.url}/docs/openapi.json", timeout=SECONDS).json()
    parameters = document["paths"]["/api/data"]["get"]["parameters"]
    [limit] = [parameter for parameter in parameters if parameter.get("name") == "limit"]
    return int(limit["schema"]["maximum"])


def test_limit_goes_as_far_as_the_description_says(backend: Backend) -> None:
    most = largest_limit(backend)
    assert get(backend, limit=most).status_code == 200
    assert_problem(get(backend, limit=most + 1), 400, "limit", str(most))


def test_limit_gives_the_first_records(backend: Backend) -> None:
    stored = [store(backend) for _ in range(4)]
    for limit in range(1, 6):
        records = get(backend, date_from=stored[0]["created"], limit=limit).json()
        assert [record["id"] for record in records] == [one["id"] for one in stored[:limit]]
    assert len(get(backend, date_from=stored[0]["created"], limit=largest_limit(backend)).json()) == 4


# ---- Filters --------------------------------------------------------------------------------------------------------

IPS = ("10.0.0.1", "2001:db8::10")
METHODS = ("GET", "POST", "get")
STATUS_CODES = (200, 404)
FILTERED = [f"{ip} {method} /filter {status}" for ip in IPS for method in METHODS for status in STATUS_CODES]


@pytest.fixture(scope="module")
def filtered(backend: Backend) -> dict[str, Any]:
    """One record of each kind, after this one."""
    before = store(backend)
    end = post(backend, [{"log": line} for line in FILTERED])
    assert end.json()["accepted"] == len(FILTERED)
    return {"date_from": before["created"], "date_to": store(backend)["created"]}


@pytest.mark.parametrize("ip", [None, *IPS])
@pytest.mark.parametrize("method", [None, *METHODS, "PUT"])
@pytest.mark.parametrize("status_code", [None, *STATUS_CODES, 500])
def test_filters_alone_and_together_give_just_what_they_name(
    backend: Backend, filtered: dict[str, Any], ip: str | None, method: str | None, status_code: int | None
) -> None:
    def wanted(line: str) -> bool:
        one, two, _, three = line.split(" ")
        return ip in (None, one) and method in (None, two) and status_code in (None, int(three))

    answer = get(backend, ip=ip, method=method, status_code=status_code, **filtered)
    expected = [line for line in [LINE, *FILTERED] if wanted(line)]
    assert [line_of(record) for record in answer.json()] == expected


IPV6_SPELLINGS = ["2001:DB8::1", "2001:db8:0:0:0:0:0:1", "2001:0DB8:0000::0001", "2001:db8::0.0.0.1", "2001:db8:0::1"]


def test_an_ipv6_address_is_the_same_in_every_spelling(backend: Backend) -> None:
    before = store(backend)
    for spelling in IPV6_SPELLINGS:
        store(backend, f"{spelling} GET /v6 200")
    assert lines_since(backend, before) == ["2001:db8::1 GET /v6 200"] * len(IPV6_SPELLINGS)
    for spelling in IPV6_SPELLINGS:
        records = get(backend, date_from=before["created"], ip=spelling).json()
        assert len(records) == len(IPV6_SPELLINGS), spelling


@pytest.mark.parametrize(
    "ip", ["::", "::1", "1::", "::ffff:1.2.3.4", "1:2:3:4:5:6:7:8", "1:0:0:2::", "::2:3:4:5:6:7:8", "FE80::ABCD"]
)
def test_an_address_comes_back_as_postgresql_writes_it(backend: Backend, ip: str) -> None:
    stored = store(backend, f"{ip} GET /v6 200")
    with psycopg.connect(backend.database_url) as connection:
        row = connection.execute("SELECT host(%s::inet)", [ip]).fetchone()
    assert row is not None
    assert record_of(backend, stored)["log"]["ip"] == row[0]
    assert [record["id"] for record in get(backend, date_from=stored["created"], ip=row[0]).json()] == [stored["id"]]


# ---- Following `next` -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("date_to", ["", "&date_to=2999-01-01"])
def test_following_next_sees_each_record_once_while_others_are_stored(backend: Backend, date_to: str) -> None:
    first = store(backend)
    with ThreadPoolExecutor(4) as pool:
        stored = [pool.submit(store, backend, f"1.2.3.4 GET /follow/{n} 200") for n in range(100)]
        address = f"{backend.data_url}?date_from={first['created']}&limit=7{date_to}"
        records = follow(address, lambda records: len(records) >= 101)
        expected = sorted([first, *(one.result() for one in stored)], key=lambda one: str(one["created"]))
    assert [record["id"] for record in records] == [one["id"] for one in expected]
    assert_increasing(records)


def test_following_next_without_a_limit_sees_each_record_once(backend: Backend) -> None:
    first = store(backend)
    with ThreadPoolExecutor(4) as pool:
        stored = [pool.submit(store, backend, f"1.2.3.4 GET /all/{n} 200") for n in range(100)]
        records = follow(f"{backend.data_url}?date_from={first['created']}", lambda records: len(records) >= 101)
        expected = {first["id"], *(one.result()["id"] for one in stored)}
    assert len(records) == 101
    assert {record["id"] for record in records} == expected


def test_following_next_keeps_the_filters(backend: Backend) -> None:
    first = store(backend)
    post_text(backend, "\n".join(f"10.9.0.{n % 2} PUT /{n} {200 + n % 3}" for n in range(120)))
    query = f"?date_from={first['created']}&limit=7&ip=10.9.0.1&method=PUT&status_code=201"
    records = follow(backend.data_url + query, lambda records: len(records) >= 20)
    assert [line_of(record) for record in records] == [
        f"10.9.0.1 PUT /{n} 201" for n in range(120) if n % 2 == 1 and n % 3 == 1
    ]


def test_following_next_past_an_end_goes_on_after_it_without_a_gap(backend: Backend) -> None:
    stored = [store(backend, f"1.2.3.4 GET /{n} 200") for n in range(20)]
    query = f"?date_from={stored[0]['created']}&date_to={stored[10]['created']}&limit=3"
    records = follow(backend.data_url + query, lambda records: len(records) >= 20)
    assert [record["id"] for record in records] == [one["id"] for one in stored]


def test_a_method_that_needs_escaping_survives_in_next(backend: Backend) -> None:
    method = "%&+#'a"
    stored = [store(backend, f"1.2.3.4 {method} /{n} 200") for n in range(5)]
    address = next_of(get(backend, date_from=stored[0]["created"], method=method, limit=2))
    assert [record["id"] for record in requests.get(address, timeout=SECONDS).json()] == [
        one["id"] for one in stored[2:4]
    ]


def test_next_on_a_quiet_system_is_the_address_to_poll(backend: Backend) -> None:
    stored = store(backend)
    address = next_of(get(backend, date_from=stored["created"]))
    for _ in range(2):
        answer = requests.get(address, timeout=SECONDS)
        assert answer.json() == []
        assert next_of(answer) == address
    later = store(backend)
    assert [record["id"] for record in requests.get(address, timeout=SECONDS).json()] == [later["id"]]


def test_an_empty_system_can_be_followed_from_its_first_moment(start_here: Callable[..., Backend]) -> None:
    backend = start_here()
    answer = get(backend)
    assert (answer.status_code, answer.json(), get(backend, headers=NDJSON).content) == (200, [], b"")
    address = next_of(answer)
    stored = [store(backend, f"1.2.3.4 GET /{n} 200") for n in range(3)]
    records = follow(address, lambda records: len(records) >= 3)
    assert [record["id"] for record in records] == [one["id"] for one in stored]


def test_a_window_that_was_closed_never_changes(backend: Backend) -> None:
    start = store(backend)["created"]
    post_text(backend, f"{LINE}\n" * 10)
    answer = get(backend, date_from=start)
    end = urlsplit(next_of(answer)).query.removeprefix("date_from=")
    post_text(backend, f"{LINE}\n" * 10)
    assert get(backend, date_from=start, date_to=end).json() == answer.json()


# ---- Forms of the answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("application/json;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("application/json, application/x-ndjson;q=0.5", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
    ],
)
def test_accept_chooses_json_or_a_record_per_line(backend: Backend, accept: str, media_type: str) -> None:
    first, second = store(backend), store(backend)
    answer = get(backend, headers={"Accept": accept}, date_from=first["created"])
    assert answer.headers["Content-Type"].split(";")[0] == media_type
    assert answer.links["next"]["url"]
    lines = answer.text.splitlines()
    records = [json.loads(line) for line in lines] if media_type.endswith("ndjson") else answer.json()
    assert [record["id"] for record in records] == [first["id"], second["id"]]
    assert answer.content.endswith(b"\n")


@pytest.mark.parametrize(("wanted", "accept"), [("ndjson", "application/json"), ("json", "application/x-ndjson")])
def test_the_parameter_format_wins_over_accept_and_stays_in_next(backend: Backend, wanted: str, accept: str) -> None:
    stored = store(backend)
    answer = get(backend, headers={"Accept": accept}, date_from=stored["created"], format=wanted)
    following = requests.get(next_of(answer), headers={"Accept": accept}, timeout=SECONDS)
    for part in (answer, following):
        assert part.headers["Content-Type"].endswith(wanted)
        assert f"&format={wanted}" in part.headers["Link"]
    assert_problem(get(backend, format="csv"), 400, "format", "json or ndjson")


@pytest.fixture(scope="module")
def large(start_here: Callable[..., Backend]) -> Backend:
    """A backend with 25,000 records."""
    backend = start_here()
    for start in range(0, 25_000, 5_000):
        post_text(backend, "\n".join(f'1.2.3.4 GET /"large"/{n} 200' for n in range(start, start + 5_000)))
    return backend


@pytest.mark.parametrize("headers", [{}, NDJSON], ids=["json", "ndjson"])
def test_a_large_export_is_complete_and_streamed(large: Backend, headers: dict[str, str]) -> None:
    answer = get(large, headers=headers)
    assert answer.headers["Transfer-Encoding"] == "chunked"
    records = [json.loads(line) for line in answer.text.splitlines()] if headers else answer.json()
    assert [record["log"]["uri"] for record in records] == [f'/"large"/{n}' for n in range(25_000)]
    assert_increasing(records)
    assert requests.get(next_of(answer), timeout=SECONDS).json() == []


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_http_1_0_which_cannot_tell_a_break_from_the_end_gets_no_export_in_parts(large: Backend, accept: str) -> None:
    head = f"HTTP/1.0\r\nHost: a\r\nAccept: {accept}\r\n\r\n"
    refused = raw(large, f"GET /api/data {head}".encode())
    assert_raw_problem(refused, 505)
    assert b"HTTP/1.1" in refused
    assert b"limit=4000" in refused
    assert b"\r\nLink: " not in refused
    answer = raw(large, f"GET /api/data?limit=4000 {head}".encode())
    assert b"\r\nContent-Length: " in answer
    assert answer.count(b'{"id":"') == 4_000


@pytest.mark.parametrize("limit", [1_999, 2_000, 2_001, 3_999, 4_000])
def test_a_window_of_thousands_goes_on_where_it_ended(large: Backend, limit: int) -> None:
    answer = get(large, limit=limit)
    following = requests.get(next_of(answer), timeout=SECONDS)
    uris = [record["log"]["uri"] for record in [*answer.json(), *following.json()]]
    assert uris == [f'/"large"/{n}' for n in range(2 * limit)]


def test_a_reader_that_hangs_up_during_an_export_leaves_its_place_to_others(large: Backend) -> None:
    for _ in range(40):
        with closing(requests.get(large.data_url, stream=True, timeout=SECONDS)) as answer:
            next(answer.iter_content(1024))
    assert len(get(large, limit=10).json()) == 10
    wait_until(lambda: get(large).status_code == 200, SECONDS, "a place for a large export")


# ---- HTTP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/api", "/api/data/", "/api/data/1", "/nothing", "/docs/assets/../../backend.py", "/%00"]
)
def test_an_unknown_address_is_a_404(backend: Backend, path: str) -> None:
    assert_raw_problem(raw(backend, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, "/api/data", {"GET", "POST"}) for method in ("PUT", "PATCH", "DELETE")),
        *((method, path, {"GET"}) for method in ("POST", "DELETE") for path in ("/api/health", "/readyz")),
    ],
)
def test_a_method_that_an_address_does_not_know_is_a_405_with_those_it_knows(
    backend: Backend, method: str, path: str, allowed: set[str]
) -> None:
    answer = requests.request(method, backend.url + path, timeout=SECONDS)
    assert_problem(answer, 405)
    assert {word.strip() for word in answer.headers["Allow"].split(",")} - {"OPTIONS", "HEAD"} == allowed


@pytest.mark.parametrize(
    "path", ["/", "/api/data", "/api/data?limit=1", "/api/health", "/readyz", "/docs", "/docs/openapi.json"]
)
def test_head_is_answered_as_get_without_the_body(backend: Backend, path: str) -> None:
    store(backend)
    heads = []
    for method in ("GET", "HEAD"):
        answer = raw(backend, f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert bool(body) == (method == "GET")
        heads.append({line for line in head.split(b"\r\n")[1:] if not line.startswith(b"Date: ")})
    left_out = heads[0] - heads[1]  # RFC 9110, 9.3.2: what is known only when the body is made
    assert heads[1] <= heads[0]
    assert all(line.startswith((b"Content-Length: ", b"Transfer-Encoding: ")) for line in left_out)


def test_head_of_a_large_export_has_no_body_and_its_connection_goes_on(large: Backend) -> None:
    with requests.Session() as session:
        for _ in range(20):  # more than there are places for exports: none is kept
            answer = session.head(large.data_url, timeout=SECONDS)
            assert (answer.status_code, answer.content) == (200, b"")
            assert session.get(f"{large.data_url}?limit=1", timeout=SECONDS).json()


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/api/data?limit=0", 400)])
def test_head_of_what_get_refuses_is_refused_without_a_body(backend: Backend, path: str, status: int) -> None:
    answer = raw(backend, f"HEAD {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split()[1]) == status
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /api/health HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /api/health HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (
            b"POST /api/data HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        (b"POST /api/data HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /api/health HTTP/1.1\r\n" + b"X: a\r\n" * 60_000, 431),
    ],
    ids=["garbage", "tls", "space", "colon", "chunk", "coding", "address", "headers"],
)
def test_broken_http_is_answered_by_a_problem_and_the_server_lives(backend: Backend, data: bytes, status: int) -> None:
    assert_raw_problem(raw(backend, data), status)
    assert requests.get(f"{backend.url}/api/health", timeout=SECONDS).json() == {"successful": True}


def test_a_connection_serves_many_requests_of_all_outcomes(backend: Backend) -> None:
    with requests.Session() as session:
        for _ in range(3):
            assert session.post(backend.data_url, json={"log": LINE}, timeout=SECONDS).status_code == 201
            assert session.post(backend.data_url, json={"log": "x"}, timeout=SECONDS).status_code == 400
            assert session.get(f"{backend.data_url}?limit=1", timeout=SECONDS).status_code == 200
            assert session.get(f"{backend.url}/nothing", timeout=SECONDS).status_code == 404
        assert session.post(backend.data_url, data=b"x" * 17 * 1024**2, timeout=SECONDS).status_code in (413, 415)
        assert session.get(f"{backend.data_url}?limit=1", timeout=SECONDS).status_code == 200


# ---- Token and origins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff"]
)
def test_without_the_token_data_is_neither_given_nor_taken(guarded: Backend, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for method, body in (("GET", None), ("POST", {"log": LINE}), ("DELETE", None)):
        answer = requests.request(method, guarded.data_url, json=body, headers=headers, timeout=SECONDS)
        assert_problem(answer, 401, "Bearer")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert TOKEN not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])  # RFC 9110, section 11.1: case-insensitive
def test_with_the_token_data_is_given_and_taken(guarded: Backend, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {TOKEN}"}
    answer = post(guarded, {"log": LINE}, headers=headers)
    assert answer.status_code == 201
    assert get(guarded, headers=headers).json()[-1]["id"] == answer.json()["id"]


@pytest.mark.parametrize("path", ["/", "/api/health", "/readyz", "/docs", "/docs/openapi.json"])
def test_health_and_pages_need_no_token(guarded: Backend, path: str) -> None:
    assert requests.get(guarded.url + path, timeout=SECONDS).status_code == 200


def test_a_page_of_a_known_origin_may_ask_with_a_token(guarded: Backend) -> None:
    for method in ("GET", "POST"):
        asked = {
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        answer = requests.options(guarded.data_url, headers={"Origin": ORIGIN, **asked}, timeout=SECONDS)
        assert answer.status_code in (200, 204)
        assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert method in answer.headers["Access-Control-Allow-Methods"]
        allowed = answer.headers["Access-Control-Allow-Headers"].lower()
        assert allowed == "*" or ("authorization" in allowed and "content-type" in allowed)


def test_a_page_of_a_known_origin_sees_next_and_errors(guarded: Backend) -> None:
    headers = {"Origin": ORIGIN, "Authorization": f"Bearer {TOKEN}"}
    answer = get(guarded, headers=headers)
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["Access-Control-Expose-Headers"] == "Link, Newest, Kept-From"
    refused = get(guarded, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, ORIGIN)


@pytest.mark.parametrize("origin", ["https://evil.example", "https://page.example", "null"])
def test_a_page_of_another_origin_sees_nothing(guarded: Backend, origin: str) -> None:
    assert "Access-Control-Allow-Origin" not in get(guarded, headers={"Origin": origin}).headers


def test_without_origins_no_page_elsewhere_sees_anything(backend: Backend) -> None:
    assert "Access-Control-Allow-Origin" not in get(backend, headers={"Origin": ORIGIN}).headers


# ---- Without a database ---------------------------------------------------------------------------------------------


Unready = dict[str, tuple[Backend, "Future[requests.Response]"]]


@pytest.fixture(scope="module", autouse=True)
def unready(start_here: Callable[..., Backend], postgres: Postgres) -> Iterator[Unready]:
    """Backends whose database is away, or has no tables, and each one's answer to a POST.

    That takes ten seconds, hence `autouse`: other tests run in the meantime.
    """
    with kept_port() as place, ThreadPoolExecutor() as pool:
        away = start_here(f"postgresql://logs:hidden@127.0.0.1:{place.getsockname()[1]}/logs")
        empty = start_here(postgres.create_database())
        pair = {"away": away, "empty": empty}
        yield {state: (backend, pool.submit(post, backend, {"log": LINE})) for state, backend in pair.items()}


@pytest.mark.parametrize("state", ["away", "empty"])
def test_without_a_usable_database_post_is_503_and_says_when_to_try_again(unready: Unready, state: str) -> None:
    answer = unready[state][1].result(SECONDS)
    assert_problem(answer, 503)
    assert int(answer.headers["Retry-After"]) > 0
    assert "hidden" not in answer.text


@pytest.mark.parametrize("state", ["away", "empty"])
@pytest.mark.parametrize("path", ["/readyz", "/api/data", "/api/data?limit=1"])
def test_without_a_usable_database_get_is_503_and_says_when_to_try_again(
    unready: Unready, state: str, path: str
) -> None:
    answer = requests.get(unready[state][0].url + path, timeout=SECONDS)
    assert_problem(answer, 503)
    assert int(answer.headers["Retry-After"]) > 0
    assert "hidden" not in answer.text + unready[state][0].printed


@pytest.mark.parametrize("state", ["away", "empty"])
def test_without_a_usable_database_the_process_is_healthy(unready: Unready, state: str) -> None:
    answer = requests.get(f"{unready[state][0].url}/api/health", timeout=SECONDS)
    assert (answer.status_code, answer.json()) == (200, {"successful": True})


def test_once_the_database_is_migrated_the_same_process_serves(unready: Unready) -> None:
    backend, answer = unready["empty"]
    assert answer.result(SECONDS).status_code == 503
    assert "migrate" in get(backend).json()["detail"]
    backend_command("migrate", backend.database_url)
    wait_until(lambda: requests.get(f"{backend.url}/readyz", timeout=SECONDS).ok, SECONDS, "a backend that is ready")
    stored = store(backend)
    assert [record["id"] for record in backend.records()] == [stored["id"]]


def test_with_its_database_the_backend_is_ready(backend: Backend) -> None:
    assert requests.get(f"{backend.url}/readyz", timeout=SECONDS).status_code == 200
