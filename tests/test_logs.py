"""What the backend logs: one line an event in UTC, text or JSON; one per request at debug; outages in two lines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import requests
from harness import Backend, Postgres, Service, backend_with, children_of
from raw_http import exchange, request
from scraping import scrape
from waiting import wait_until

from backend import LogFormatter

SECONDS = 30
TOKEN = "log-token"
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (DEBUG|INFO|WARNING|ERROR) backend\[(\d+)\]: (.+)")

StartBackend = Callable[..., Backend]

# The same backend, but one of its answers fails in a way that nobody expected
BROKEN = """
import backend as changed

def fail(self, request, response):
    raise RuntimeError("first\\nsecond \\x1b[31mred")

changed.Api.on_get_health = fail
"""


def events(service: Service) -> list[tuple[datetime, str, int, str]]:
    """Time, level, process and message of each line. Fails for a line of another form."""
    has_ended = service.process.poll() is not None
    lines, _, begun = service.printed.rpartition("\n")
    assert not (has_ended and begun), begun
    found = [(line, LINE.fullmatch(line)) for line in lines.splitlines()]
    assert all(match for _, match in found), [line for line, match in found if not match]
    matches = [match for _, match in found if match]
    return [(datetime.fromisoformat(one[1]), one[2], int(one[3]), one[4]) for one in matches]


def test_each_line_has_its_time_in_utc_its_level_and_its_process(start_backend: StartBackend) -> None:
    began = datetime.now(UTC) - timedelta(seconds=1)
    backend = start_backend(WORKERS=2, TZ="America/New_York")
    wait_until(lambda: len(children_of(backend.pid)) == 2, SECONDS, "two workers")
    workers = set(children_of(backend.pid))
    requests.get(backend.data_url, timeout=SECONDS)
    assert backend.end() == 0
    told = events(backend)
    assert all(began <= time <= datetime.now(UTC) for time, *_ in told)
    assert {pid for _, _, pid, message in told if message.startswith("listening")} == {backend.pid}
    assert {pid for _, _, pid, message in told if message.startswith("stopped")} == workers


def test_a_bug_is_one_line_with_its_traceback_as_text_and_as_json(start_backend: StartBackend, tmp_path: Path) -> None:
    script = backend_with(tmp_path, BROKEN)
    text = start_backend(script=script)
    with_json = start_backend(script=script, LOG_FORMAT="json")
    for backend in (text, with_json):
        answer = requests.get(f"{backend.url}/api/health", timeout=SECONDS)
        assert (answer.status_code, answer.headers["Content-Type"]) == (500, "application/problem+json")
        assert "RuntimeError" not in answer.text
        backend.wait_for_line("RuntimeError")
        assert backend.end() == 0
    [failure] = [message for _, level, _, message in events(text) if level == "ERROR"]
    assert failure.startswith("GET /api/health failed | Traceback (most recent call last): | ")
    assert failure.endswith(r"| RuntimeError: first | second \x1b[31mred")
    objects = [json.loads(line) for line in with_json.printed.splitlines()]
    assert {tuple(event) for event in objects} == {("time", "level", "service", "pid", "message")}
    assert {(event["service"], event["pid"]) for event in objects} == {("backend", with_json.pid)}
    [bug] = [event["message"] for event in objects if event["level"] == "error"]
    assert bug.splitlines()[0] == "GET /api/health failed"
    assert bug.endswith("RuntimeError: first\nsecond \x1b[31mred")


def test_at_debug_each_request_is_a_line_and_the_token_is_in_none(start_backend: StartBackend) -> None:
    backend = start_backend(LEVEL="debug", API_TOKEN=TOKEN)
    key = {"Authorization": f"Bearer {TOKEN}"}
    requests.post(backend.data_url, json={"log": "192.0.2.1 GET /a 200"}, headers=key, timeout=SECONDS)
    body = requests.get(f"{backend.data_url}?method=GET&limit=5", headers=key, timeout=SECONDS)
    requests.get(f"{backend.url}/metrics", headers={"Authorization": "Bearer wrong-key"}, timeout=SECONDS)
    exchange(backend.url, request("GET /a%1bb HTTP/1.1", "Connection: close"))
    exchange(backend.url, b"nonsense\r\n\r\n")
    assert backend.end() == 0
    pattern = re.compile(r"127\.0\.0\.1 (\S+) (\S+) (\d+), (\d+) bytes, \d+\.\d ms")
    found = [pattern.fullmatch(message) for _, level, _, message in events(backend) if level == "DEBUG"]
    lines = [one.groups() for one in found if one]
    size_of = {line[:3]: int(line[3]) for line in lines}  # a line comes after its answer, hence in no certain order
    assert set(size_of) == {
        ("POST", "/api/data", "201"),
        ("GET", "/api/data?method=GET&limit=5", "200"),
        ("GET", "/metrics", "401"),
        ("GET", "/a%1bb", "404"),
        ("-", "-", "400"),
    }
    assert len(lines) == len(size_of)
    assert len(body.content) < size_of["GET", "/api/data?method=GET&limit=5", "200"] < len(body.content) + 1000
    assert not re.search(f"{TOKEN}|wrong-key", backend.printed)


def test_without_debug_requests_leave_no_line(backend: Backend) -> None:
    for path in ("/api/data", "/api/health", "/nothing"):
        requests.get(f"{backend.url}{path}", timeout=SECONDS)
    assert backend.end() == 0
    told = [message for *_, message in events(backend)]
    assert told[-1].startswith("stopped")
    assert not [message for message in told if "GET" in message or "/nothing" in message]


def test_progress_is_one_line_for_all_workers_and_none_while_nothing_comes(
    start_backend: StartBackend, tmp_path: Path
) -> None:
    backend = start_backend(script=backend_with(tmp_path, PROGRESS_SECONDS=0.3), WORKERS=2)
    for count in (1, 2):
        for _ in range(5):
            requests.post(backend.data_url, json=[{"log": "192.0.2.1 GET /a 200"}, {"log": "x"}], timeout=SECONDS)
        backend.wait_for_line(rf" {5 * count} lines stored \([0-9]+/s\), 0 duplicate, {5 * count} rejected; ")
        for _ in range(5):
            requests.get(backend.data_url, timeout=SECONDS)  # as exporters do all the time
    wait_until(lambda: scrape(backend.url)["queue_bytes"] == 0, SECONDS, "an empty queue to be noted")
    requests.get(f"{backend.url}/nothing", timeout=SECONDS)  # a refusal is worth a line, too
    last = backend.wait_for_line(
        r" 10 lines stored \(0/s\), 0 duplicate, 10 rejected; (\d+) requests, 1 refused; 0 bytes queued"
    )
    assert int(last[1]) >= 20
    assert backend.end() == 0
    progress = [(pid, message) for _, _, pid, message in events(backend) if " lines stored (" in message]
    assert {pid for pid, _ in progress} == {backend.pid}
    news = [re.findall(r"\d+ (?:lines|rejected|refused)", message) for _, message in progress]
    assert len(news) == len({tuple(one) for one in news}), "a line that has nothing new"


def test_an_outage_is_told_when_it_begins_with_each_new_reason_once_and_when_it_is_over(
    start_backend: StartBackend, postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.create_logs()
    backend = start_backend(script=backend_with(tmp_path, STATEMENT_SECONDS=2), DATABASE_URL=url)
    name = url.split("/")[3].split("?")[0]

    def read() -> int:
        return requests.get(backend.data_url, timeout=SECONDS).status_code

    def told(level: str) -> list[str]:
        lines = events(backend)
        return [message for _, its_level, _, message in lines if its_level == level and "(reading)" in message]

    assert read() == 200
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:

        def administer(command: str) -> None:
            connection.execute(f'ALTER DATABASE "{name}" {command}'.encode())
            terminate = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(terminate, [name])

        administer("ALLOW_CONNECTIONS false")
        assert {read() for _ in range(4)} == {503}
        assert len(told("WARNING")) == 1
        connection.execute(f'ALTER DATABASE "{name}" RENAME TO "{name}_away"'.encode())
        assert {read() for _ in range(4)} == {503}
        connection.execute(f'ALTER DATABASE "{name}_away" RENAME TO "{name}"'.encode())
        administer("ALLOW_CONNECTIONS true")
        assert read() == 200
    first, second = told("WARNING")
    assert re.fullmatch(r"database \(reading\) unreachable: .*not currently accepting connections.*; retrying", first)
    assert re.fullmatch(r"database \(reading\) unreachable: .*does not exist.*; retrying", second)
    [over] = [message for message in told("INFO") if "back" in message]
    assert re.fullmatch(r"database \(reading\) back after \d+\.\d s", over)


def test_the_formatter_lets_no_message_begin_a_line_of_its_own() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "a\r\nb\u2028c\x85d\x00e \udcff", (), None)
    line = LogFormatter("backend", False).format(record)
    assert line.endswith("]: a | b | c | d\\x00e \\udcff")
    assert len(line.splitlines()) == 1
    assert json.loads(LogFormatter("backend", True).format(record))["message"] == "a\r\nb\u2028c\x85d\x00e \\udcff"
