"""METRICS_FILE of client.py and background.py: true figures, a whole file at any moment, and nobody else's file."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import NDJSON, FakeBackend, Reply, Request, append, refusal, some_lines
from harness import Service, count_lines, driver, held, kill, stop
from waiting import wait_until

import background
import client

SERVICES = {"client": client, "background": background}
Start = Callable[..., Service]

# The same service, but it does not take 2 s for each state
QUICK = """
import os
import SERVICE as service

service.METRICS_SECONDS = float(os.environ.get("EACH_SECONDS", "0.02"))
service.METRICS_END_SECONDS = 20.0  # a busy disk may be late
sys.exit(service.main([]))
"""


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    folder = tmp_path / "textfile"
    folder.mkdir()
    return folder / "some name.prom"


@pytest.fixture
def run(start: Start, fake: FakeBackend, tmp_path: Path, metrics_file: Path) -> Callable[..., Service]:
    """Starts a service that writes its metrics quickly: run("client")."""

    def run_service(service: str, **settings: Any) -> Service:
        program = driver(tmp_path, f"quick_{service}.py", QUICK.replace("SERVICE", service))
        own: dict[str, Any] = {"LOG_FILE": tmp_path / "logs.txt", "SOURCE": tmp_path / "access.log"}
        if service == "background":
            own = {"DIRECTORY": tmp_path / "shared", "REQUEST_DELAY": "20"}
        return start(program, **{"URL": fake.data_url, "METRICS_FILE": metrics_file, **own, **settings})

    return run_service


def read_metrics(file: Path) -> dict[str, float]:
    """Its figures by their names, less the prefix. Raises AssertionError for a file that is not whole."""
    text = file.read_text()
    lines = text.splitlines()
    assert text.endswith("\n"), text
    values = {}
    for described, typed, sample in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        found = re.fullmatch(r"(logpipeline_(?:client|exporter)_([a-z_]+))\{name=\"some name\"\} (\S+)", sample)
        assert found, sample
        assert described.startswith(f"# HELP {found[1]} ")
        assert typed == f"# TYPE {found[1]} {'counter' if found[1].endswith('_total') else 'gauge'}"
        values[found[2]] = float(found[3])
    assert "up" in values
    return values


def wait_for_metrics(file: Path, seconds: float = 30, **wanted: float) -> dict[str, float]:
    """Waits until these have just these values."""

    def look() -> dict[str, float]:
        found = read_metrics(file) if file.exists() else {}
        return found if wanted.items() <= found.items() else {}

    try:
        return wait_until(look, seconds, f"{wanted}")
    except AssertionError as error:
        raise AssertionError(f"{error}; it has {file.read_text() if file.exists() else 'none'}") from error


# ---- What they say --------------------------------------------------------------------------------------------------


def refusing(fake: FakeBackend, count: int) -> Callable[[Request], Reply]:
    """The first so many lines of each batch are refused for good; the others are stored, or known already."""

    def answer(request: Request) -> Reply:
        refused = [{"index": n, "reason": "no"} for n in range(count)]
        rest = Request("POST", {}, {}, json.dumps(request.items[count:]).encode(), 0.0, 0)
        result = json.loads(fake.store(rest).body)
        return Reply(201, json.dumps({**result, "rejected": refused}).encode())

    return answer


def test_the_client_counts_what_becomes_of_its_lines(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    before = time.time()
    fake.answer = refusal(503)
    append(tmp_path / "access.log", some_lines(10))
    shipper = run("client")
    sizes = {"bytes_left": sum(len(line) + 1 for line in some_lines(10)), "lines_stored_total": 0, "up": 1}
    waiting = wait_for_metrics(metrics_file, **sizes)
    assert "last_delivery_timestamp_seconds" not in waiting
    wait_until(lambda: read_metrics(metrics_file)["oldest_undelivered_seconds"] > 0.5, what="an older line")
    stored_meanwhile = [*fake.requests[-1].items[7:]]  # by an attempt whose answer was lost, say
    fake.store(Request("POST", {}, {}, json.dumps(stored_meanwhile).encode(), 0.0, 0))
    fake.answer = refusing(fake, 2)
    delivered = {"bytes_left": 0, "oldest_undelivered_seconds": 0, "lines_held_back": 0}
    counts = {"lines_stored_total": 5, "lines_duplicate_total": 3, "lines_refused_total": 2}
    done = wait_for_metrics(metrics_file, **counts, **delivered)
    assert done["posts_retried_total"] == len(fake.requests) - 1 > 0
    assert done["lines_sent_total"] == 10 * len(fake.requests)
    assert before < done["last_delivery_timestamp_seconds"] < time.time()
    assert shipper.end() == 0
    assert read_metrics(metrics_file) == {**done, "up": 0}


def test_the_client_counts_a_line_that_is_held_back_as_not_delivered(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    too_large = Reply(413, b"", "text/html")
    fake.answer = lambda request: too_large if b"/a/3 " in request.body else fake.serve(request)
    append(tmp_path / "access.log", some_lines(10))
    run("client")
    wait_for_metrics(metrics_file, lines_held_back=1, lines_stored_total=9, bytes_left=len(some_lines(10)[3]) + 1)
    wait_until(lambda: read_metrics(metrics_file)["oldest_undelivered_seconds"] > 0.5, what="an older line")
    fake.answer = fake.serve
    wait_for_metrics(metrics_file, lines_held_back=0, lines_stored_total=10, oldest_undelivered_seconds=0, bytes_left=0)


def test_lines_of_an_earlier_run_wait_since_that_last_delivered(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    append(tmp_path / "access.log", some_lines(10))
    first = run("client")
    wait_for_metrics(metrics_file, lines_stored_total=10, bytes_left=0)
    fake.answer = refusal(503)
    append(tmp_path / "access.log", some_lines(10, "b"))
    wait_until(lambda: count_lines(tmp_path / "logs.txt") == 20, what="the lines in the journal")
    kill(first)
    position = tmp_path / "logs.txt.position"
    os.utime(position, (time.time() - 3600, time.time() - 3600))
    run("client")
    wait_until(lambda: read_metrics(metrics_file)["oldest_undelivered_seconds"] >= 3600, what="an hour")
    assert read_metrics(metrics_file)["oldest_undelivered_seconds"] < 3700
    fake.answer = fake.serve
    wait_for_metrics(metrics_file, bytes_left=0, oldest_undelivered_seconds=0, lines_stored_total=10)


@pytest.mark.parametrize("seed", range(20))
def test_the_age_of_the_oldest_line_is_right_to_one_look(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is appended, delivered, held back and rotated between the looks, which come 10 s apart."""
    dice, clock = random.Random(seed), [1000.0]
    monkeypatch.setattr(client, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    part, delivered, appended = 1, 0, 0
    since: dict[int, float] = {}  # when the line at an offset of this part was appended
    held_back: dict[str, float] = {}
    journal: Any = SimpleNamespace(path="/nowhere", place=lambda: (part, delivered, appended, list(held_back)))
    backlog = client.Backlog(journal)
    for _ in range(300):
        for _ in range(10):
            clock[0] += 1.0
            if dice.random() < 0.7:
                since[appended] = clock[0]
                appended += 1
            while delivered < appended and dice.random() < 0.4:
                when = since.pop(delivered)
                if dice.random() < 0.05:
                    held_back[f"{part:024}{delivered:012x}"] = when
                delivered += 1
            if held_back and dice.random() < 0.1:
                held_back.pop(dice.choice(list(held_back)))
        if delivered == appended and dice.random() < 0.5:
            part, delivered, appended = part + 1, 0, 0
        true = clock[0] - min((*since.values(), *held_back.values()), default=clock[0])
        assert true - 10 <= backlog.oldest_seconds() <= true


def test_a_long_outage_takes_little_memory_and_its_age_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, delivered, appended = [0.0], 0, 0
    monkeypatch.setattr(client, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    journal: Any = SimpleNamespace(path="/nowhere", place=lambda: (1, delivered, appended, []))
    backlog = client.Backlog(journal)
    for look in range(1, 20_001):  # some two days
        clock[0], appended = 10.0 * look, look
        assert backlog.oldest_seconds() == clock[0] - 10.0
    assert len(backlog._looks) < 5000
    delivered = appended // 2  # what was appended a day ago
    assert backlog.oldest_seconds() == pytest.approx(100_000, rel=0.003)


def test_the_exporter_counts_what_it_writes_and_its_lag(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    before, file = time.time(), tmp_path / "shared/data.txt"
    newest = "2026-01-01T00:01:40.500009Z"  # 100.5 s after the 10th record
    fake.answer = lambda request: Reply(200, fake.ndjson(request), NDJSON, {"Newest": newest})
    exporter = run("background")
    wait_for_metrics(metrics_file, up=1, records_written_total=0, diverged=0)
    assert "last_write_timestamp_seconds" not in read_metrics(metrics_file)
    fake.add(some_lines(10))
    wait_until(lambda: count_lines(file) == 10, what="the records")
    written = {"records_written_total": 10, "bytes_written_total": file.stat().st_size, "waiting_bytes": 0}
    found = wait_for_metrics(metrics_file, **written, turns_lost_total=0, rotations_total=0)
    assert 100.5 <= found["lag_seconds"] < 110
    assert before < found["last_write_timestamp_seconds"] < time.time()
    fake.answer = refusal(503)
    wait_until(lambda: read_metrics(metrics_file)["lag_seconds"] > found["lag_seconds"] + 1, what="a growing lag")
    assert exporter.end() == 0
    assert read_metrics(metrics_file).items() >= {**written, "up": 0}.items()


def test_an_exporter_that_cannot_write_does_not_call_the_file_up_to_date(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    """Neither one that has never had anything to say of the file, nor a new one beside a file that others wrote."""
    file, hours = tmp_path / "shared/data.txt", 5 * 3600
    newest = "2026-01-01T05:00:00.000000Z"
    fake.answer = lambda request: Reply(200, fake.ndjson(request), NDJSON, {"Newest": newest})
    fake.add(some_lines(10))
    file.mkdir(parents=True)
    exporter = run("background")
    wait_for_metrics(metrics_file, up=1)
    wait_until(lambda: read_metrics(metrics_file)["lag_seconds"] > hours - 1, what="the lag of an empty file")
    file.rmdir()
    wait_for_metrics(metrics_file, records_written_total=10)
    assert exporter.end() == 0
    with held(file.with_name("data.txt.lock")):
        run("background")
        wait_for_metrics(metrics_file, up=1)
        wait_until(lambda: read_metrics(metrics_file)["lag_seconds"] > hours - 1, what="the lag of a file of others")


def test_the_exporter_counts_turns_that_others_had_and_says_what_waits(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "shared/data.txt"
    fake.add(some_lines(1))
    run("background")
    wait_for_metrics(metrics_file, records_written_total=1)
    lost = read_metrics(metrics_file)["turns_lost_total"]
    with held(file.with_name("data.txt.lock")):
        fake.add(some_lines(10, "more"))
        wait_until(lambda: read_metrics(metrics_file)["turns_lost_total"] > lost + 1, what="lost turns")
        assert 1000 < read_metrics(metrics_file)["waiting_bytes"] < 10_000
    wait_for_metrics(metrics_file, records_written_total=11, waiting_bytes=0)


def test_the_exporter_says_that_it_diverged_and_counts_its_rotations(
    run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(100))
    run("background", ROTATE_BYTES=5000)
    wait_for_metrics(metrics_file, records_written_total=100, diverged=0)
    parts = [path.name for path in (tmp_path / "shared").glob("data.txt.2*")]
    assert len(parts) > 2
    wait_for_metrics(metrics_file, rotations_total=len(parts))
    right, fake.stored = fake.stored, {}
    wait_for_metrics(metrics_file, diverged=1, records_written_total=100)
    fake.stored = right
    wait_for_metrics(metrics_file, diverged=0)


@pytest.mark.parametrize("service", SERVICES)
def test_promtool_finds_nothing_wrong_with_a_file(
    service: str, run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(10))
    append(tmp_path / "access.log", some_lines(10, "b"))
    one = run(service)
    wait_for_metrics(metrics_file, **({"lines_stored_total": 10} if service == "client" else {"waiting_bytes": 0}))
    wait_until(lambda: len(read_metrics(metrics_file)) == len(SERVICES[service].METRICS), what="all of them")
    assert one.end() == 0
    with metrics_file.open() as text:
        done = subprocess.run(["promtool", "check", "metrics"], stdin=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- How they are written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_a_reader_finds_a_whole_file_at_any_moment_and_its_folder_tidy(
    service: str, run: Callable[..., Service], metrics_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "access.log").touch()
    one = run(service, EACH_SECONDS="0")
    wait_for_metrics(metrics_file, up=1)
    changes: set[int] = set()

    def look() -> bool:
        for _ in range(100):
            read_metrics(metrics_file)
            changes.add(metrics_file.stat().st_mtime_ns)
        return len(changes) > 100

    wait_until(look, poll=0)
    assert one.end() == 0
    assert read_metrics(metrics_file)["up"] == 0
    assert [path.name for path in metrics_file.parent.iterdir()] == [metrics_file.name]


@pytest.mark.parametrize("service", SERVICES)
def test_a_file_that_cannot_be_written_is_two_lines_and_stops_nothing(
    service: str, run: Callable[..., Service], fake: FakeBackend, metrics_file: Path, tmp_path: Path
) -> None:
    metrics_file.parent.rmdir()
    fake.add(some_lines(10))
    append(tmp_path / "access.log", some_lines(10, "b"))
    one = run(service)
    where = f"METRICS_FILE {metrics_file}"
    one.wait_for_line(rf"WARNING .*: {where} cannot be written: .*No such file or directory.*; retrying")
    if service == "client":
        wait_until(lambda: len(fake.stored) == 20, what="delivery")
    else:
        wait_until(lambda: count_lines(tmp_path / "shared/data.txt") == 10, what="the records")
    metrics_file.parent.mkdir()
    wait_for_metrics(metrics_file, up=1)
    one.wait_for_line(rf"INFO .*: {where} back after [0-9.]+ s\n")
    assert one.end() == 0
    assert one.printed.count(where) == 2


@pytest.mark.parametrize(
    ("service", "kind"),
    [("background", "notes"), *(("client", kind) for kind in ("notes", "a folder", "a pipe", "another service's"))],
)
def test_what_is_there_and_is_no_such_file_is_left_alone(
    service: str, kind: str, run: Callable[..., Service], metrics_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "access.log").touch()
    if kind == "a folder":
        metrics_file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(metrics_file)
    else:
        metrics_file.write_text("my notes\n" if kind == "notes" else "# HELP logpipeline_backend_up Another one.\n")
    before = metrics_file.stat()
    one = run(service)
    one.wait_for_line("METRICS_FILE .* cannot be written: it is another kind of file, which is left alone; retrying")
    assert one.end() == 0
    after = metrics_file.stat()
    assert (before.st_ino, before.st_mode, before.st_mtime_ns) == (after.st_ino, after.st_mode, after.st_mtime_ns)


@pytest.mark.parametrize("first_ends", [kill, Service.end], ids=["killed", "ended"])
def test_of_two_with_one_file_the_second_says_so_and_takes_it_over_later(
    run: Callable[..., Service], metrics_file: Path, tmp_path: Path, first_ends: Callable[[Service], Any]
) -> None:
    (tmp_path / "access.log").touch()
    (tmp_path / "other.log").touch()
    first = run("client")
    wait_for_metrics(metrics_file, up=1)
    second = run("client", LOG_FILE=tmp_path / "other.txt", SOURCE=tmp_path / "other.log")
    second.wait_for_line("METRICS_FILE .* cannot be written: another process writes it; each needs one of its own;")
    stop(first.pid)  # between two states: it would have been written meanwhile
    before = metrics_file.stat()
    append(tmp_path / "other.log", some_lines(5))
    wait_until(lambda: "0 bytes left" in second.printed or count_lines(tmp_path / "other.txt") == 5, what="lines")
    assert metrics_file.stat().st_ino == before.st_ino
    first.kill(signal.SIGCONT)
    first_ends(first)
    wait_for_metrics(metrics_file, up=1, lines_stored_total=5)
    second.wait_for_line("METRICS_FILE .* back after")
    assert second.end() == 0


def test_a_client_with_a_numbered_journal_numbers_its_metrics_too(
    run: Callable[..., Service], tmp_path: Path, metrics_file: Path
) -> None:
    settings = {
        "LOG_FILE": tmp_path / "logs-%n.txt",
        "SOURCE": "",
        "METRICS_FILE": metrics_file.parent / "client-%n.prom",
    }
    both = [run("client", **settings) for _ in range(2)]
    files = [metrics_file.parent / f"client-{n}.prom" for n in (1, 2)]
    wait_until(lambda: all(file.exists() for file in files), what="a file for each")
    assert [one.end() for one in both] == [0, 0]
    for n, file in enumerate(files, 1):
        assert f'logpipeline_client_up{{name="client-{n}"}} 0\n' in file.read_text()


@pytest.mark.parametrize(
    ("service", "settings"),
    [
        ("client", {"LOG_FILE": "./link/log", "METRICS_FILE": "log"}),
        ("client", {"LOG_FILE": "log", "METRICS_FILE": "./log.position"}),
        ("client", {"LOG_FILE": "log.new", "METRICS_FILE": "log"}),  # which is written as log.new first
        ("client", {"LOG_FILE": "log.1", "METRICS_FILE": "log.1.position"}),
        ("client", {"LOG_FILE": "logs-%n.txt", "METRICS_FILE": "logs-12.txt"}),
        ("client", {"LOG_FILE": "logs-%n.txt", "METRICS_FILE": "logs-%n.txt.journal"}),
        ("client", {"SOURCE": "access.log", "METRICS_FILE": "link/access.log"}),
        ("client", {"SOURCE": "other.log ./link/*", "METRICS_FILE": "client.prom"}),
        ("client", {"SOURCE": "access.log", "METRICS_FILE": "access.log.1"}),
        ("background", {"DIRECTORY": "link", "METRICS_FILE": "data.txt"}),
        ("background", {"DIRECTORY": ".", "METRICS_FILE": "link/data.txt.lock"}),
        ("background", {"DIRECTORY": ".", "FILE_NAME": "data.txt.new", "METRICS_FILE": "data.txt"}),
        ("background", {"DIRECTORY": ".", "METRICS_FILE": "data.txt-20261124"}),
    ],
)
def test_a_file_that_another_setting_has_is_refused(
    service: str, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a file of its own, not") as refused:
        SERVICES[service].read_settings(settings)
    assert str(refused.value).startswith(f"METRICS_FILE is {settings['METRICS_FILE']!r}: ")
    assert "\n" not in str(refused.value)
