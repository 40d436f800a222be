"""The logs of client.py and background.py: an event a line, as text or as JSON, and two lines for an outage."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, append, fake_backend, refusal, some_lines
from harness import Service, count_lines, driver
from waiting import wait_until

import background
import client

SERVICES = {"client": client, "background": background}
Start = Callable[..., Service]
EVENT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z)"
    r" (DEBUG|INFO|WARNING|ERROR|CRITICAL) (client|background)\[([0-9]+)\]: (\S.*)"
)


@pytest.fixture
def run(start: Start, tmp_path: Path) -> Callable[..., Service]:
    """Starts a service whose lines, or records, are those of the test: run("client", URL=...)."""

    def run_service(service: str, script: str = "", **settings: Any) -> Service:
        own: dict[str, Any] = {"LOG_FILE": tmp_path / "logs.txt", "SOURCE": tmp_path / "access.log"}
        if service == "background":
            own = {"DIRECTORY": tmp_path / "shared", "REQUEST_DELAY": "20"}
        return start(script or f"{service}.py", **{**own, **settings})

    return run_service


def texts(service: Service) -> list[tuple[str, str]]:
    """Level and message of each event. Raises AssertionError for a line that is none."""
    events = []
    for line in service.printed.splitlines():
        found = EVENT.fullmatch(line)
        assert found, line
        assert int(found[4]) == service.pid
        moment = datetime.fromisoformat(found[1])
        assert abs(datetime.now(UTC) - moment) < timedelta(seconds=60), "not UTC"
        events.append((found[2].lower(), found[5]))
    return events


def objects(service: Service, name: str) -> list[tuple[str, str]]:
    """The same of a log in JSON."""
    events = []
    for line in service.printed.splitlines():
        event = json.loads(line)
        assert list(event) == ["time", "level", "service", "pid", "message"]
        assert (event["service"], event["pid"]) == (name, service.pid)
        assert re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\.[0-9]{3}Z", event["time"])
        assert abs(datetime.now(UTC) - datetime.fromisoformat(event["time"])) < timedelta(seconds=60)
        events.append((event["level"], event["message"]))
    return events


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("service", SERVICES)
def test_each_event_is_a_line_in_utc_with_its_level_service_and_process(
    service: str, log_format: str, run: Callable[..., Service], fake: FakeBackend, tmp_path: Path
) -> None:
    fake.answer = refusal(503)
    append(tmp_path / "access.log", some_lines(5))
    one = run(service, URL=fake.data_url, LOG_FORMAT=log_format, TZ="Asia/Kathmandu")
    one.wait_for_line("backend unreachable: ")
    fake.answer = fake.serve
    fake.add(some_lines(5, "b"))
    one.wait_for_line("backend back after ")
    assert one.end() == 0
    events = objects(one, service) if log_format == "json" else texts(one)
    events = [event for event in events if not event[1].startswith("going on; ")]  # each 10 s
    assert [level for level, _ in events] == ["info", "warning", "info", "info"]
    begun = {"client": "answer 503: ", "background": "Refused: answer 503 "}[service]
    assert re.fullmatch(f"backend unreachable: {begun}.*; retrying", events[1][1])
    assert re.fullmatch(r"backend back after [0-9]+\.[0-9] s", events[2][1])
    assert events[3][1].startswith("stopped; ")


# The same service, but for a mistake of its programmer in that function
BROKEN = """
import SERVICE as service

def fails(*_, **__):
    raise ZeroDivisionError("a line\\nand another")

OWNER.NAME = fails
sys.exit(service.main([]))
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("service", "owner", "name", "status"),
    [
        ("client", "service.Journal", "pending", 1),  # in a thread
        ("client", "service", "Courier", 1),
        ("background", "service.Exporter", "step", 1),
    ],
)
def test_a_mistake_in_the_program_is_one_event_with_its_traceback(
    service: str, owner: str, name: str, status: int, log_format: str,
    run: Callable[..., Service], fake: FakeBackend, tmp_path: Path
) -> None:  # fmt: skip
    append(tmp_path / "access.log", some_lines(5))
    text = BROKEN.replace("SERVICE", service).replace("OWNER", owner).replace("NAME", name)
    one = run(service, driver(tmp_path, f"broken_{service}.py", text), URL=fake.data_url, LOG_FORMAT=log_format)
    assert one.process.wait(20) == status
    level, message = (objects(one, service) if log_format == "json" else texts(one))[-1]
    assert level == "critical"
    between = "\n" if log_format == "json" else " | "
    assert f"failed{between}Traceback (most recent call last):{between}" in message
    assert message.endswith(f"ZeroDivisionError: a line{between}and another")


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_message_quotes_cannot_forge_a_line(service: str) -> None:
    name = "/logs/\x1b[2Ja\n2026-01-01T00:00:00.000Z INFO client[1]: b\u2028\udce4.log"
    record = logging.LogRecord(service, logging.WARNING, "", 0, "SOURCE %s: gone", (name,), None)
    as_text, as_json = (SERVICES[service].LogFormatter(service, as_json).format(record) for as_json in (False, True))
    assert len(as_text.splitlines()) == len(as_json.splitlines()) == 1
    assert as_text.endswith("SOURCE /logs/\\x1b[2Ja | 2026-01-01T00:00:00.000Z INFO client[1]: b | \\udce4.log: gone")
    assert json.loads(as_json)["message"] == f"SOURCE {name}: gone".replace("\udce4", "\\udce4")
    as_json.encode("ascii")
    as_text.encode()


def test_a_source_with_a_line_break_in_its_name_is_told_in_one_line(
    run: Callable[..., Service], fake: FakeBackend, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "a\nERROR b.log").write_text("nothing that is 200\n" * 100)
    one = run("client", URL=fake.data_url, SOURCE=f"{folder}/*.log")
    one.wait_for_line("first 100 lines")
    assert one.end() == 0
    assert any(level == "error" and "/a | ERROR b.log: none of" in message for level, message in texts(one))


# ---- Outages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_an_outage_of_the_backend_is_two_lines_in_the_same_words(
    service: str, run: Callable[..., Service], tmp_path: Path
) -> None:
    append(tmp_path / "access.log", some_lines(5))
    with fake_backend(listening=False) as fake:
        one = run(service, URL=fake.data_url)
        one.wait_for_line("backend unreachable: .*Connection refused; retrying")
        known = one.printed
        fake.add(some_lines(5, "b"))
        wait_until(lambda: count_lines(tmp_path / "logs.txt") == 5 or service == "background", what="the lines")
        assert one.printed == known
        fake.listen()
        one.wait_for_line(r"backend back after [0-9]+\.[0-9] s")
        assert one.end() == 0
    assert len([message for _, message in texts(one) if message.startswith("backend ")]) == 2


@pytest.mark.parametrize("service", SERVICES)
def test_each_new_reason_of_an_outage_is_told_once(
    service: str, run: Callable[..., Service], fake: FakeBackend, tmp_path: Path
) -> None:
    append(tmp_path / "access.log", some_lines(5))
    fake.answer = refusal(503)
    one = run(service, URL=fake.data_url)
    one.wait_for_line("backend unreachable: .*answer 503")
    fake.answer = refusal(401)
    one.wait_for_line("backend unreachable: .*answer 401")
    known = len(fake.requests)
    fake.answer = refusal(503)
    wait_until(lambda: len(fake.requests) > known + 1, what="further requests")
    fake.answer = fake.serve
    one.wait_for_line("backend back after")
    assert one.end() == 0
    assert len(re.findall("backend unreachable", one.printed)) == 2


def test_a_source_that_is_not_there_yet_is_two_lines(
    run: Callable[..., Service], fake: FakeBackend, tmp_path: Path
) -> None:
    source = tmp_path / "access.log"
    one = run("client", URL=fake.data_url)
    one.wait_for_line(rf"WARNING .*: SOURCE {source} cannot be followed: .*No such file.*; retrying")
    append(source, some_lines(5))
    one.wait_for_line(rf"INFO .*: SOURCE {source} back after [0-9.]+ s\n")
    wait_until(lambda: len(fake.stored) == 5, what="its lines")
    assert one.end() == 0
    assert len(re.findall("SOURCE", one.printed)) == 2


def test_an_outage_tells_few_reasons_and_reminds_when_that_is_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "client")
    outage = client.Outage("disk", "full")
    for n in range(100):
        outage.begin(f"reason {n}")
    assert len(caplog.messages) == client.OUTAGE_REASONS
    outage.begin("reason 0", remind_seconds=3600)
    assert len(caplog.messages) == client.OUTAGE_REASONS
    outage.begin("reason 0", remind_seconds=0)
    assert caplog.messages[-1] == "disk full: reason 0; retrying"
    assert outage
    assert outage.seconds > 0
    outage.end()
    outage.end()
    assert re.fullmatch(r"disk back after [0-9]+\.[0-9] s", caplog.messages[-1])
    assert len(caplog.messages) == client.OUTAGE_REASONS + 2
    assert not outage
    assert outage.seconds == 0


@pytest.mark.parametrize("name", ["LogFormatter", "Outage", "log_as", "MetricsFile", "exposition", "check_metrics"])
def test_what_both_services_have_is_the_same_text(name: str) -> None:
    one, other = (inspect.getsource(getattr(module, name)) for module in SERVICES.values())
    assert one.replace("client[", "[") == other.replace("background[", "[").replace("contextlib.suppress", "suppress")
