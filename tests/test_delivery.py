"""What client.py makes of ids, answers, refusals on the way and full disks: nothing is lost, repeated or silent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    JSON,
    PROBLEM,
    FakeBackend,
    Reply,
    Request,
    append,
    assert_stored,
    fake_backend,
    refusal,
    some_lines,
    stored,
)
from harness import Service, driver, kill, line_of, peak_memory_bytes
from waiting import wait_until

import client

Start = Callable[..., Service]
MIB = 1024**2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


@pytest.fixture
def ship(start: Start, fake: FakeBackend, journal: Path, source: Path) -> Callable[..., Service]:
    """A client that follows `source`."""

    def shipping(script: str = "client.py", **settings: Any) -> Service:
        return start(script, **{"URL": fake.data_url, "LOG_FILE": journal, "SOURCE": source, **settings})

    return shipping


def acknowledged(journal: Path) -> int:
    try:
        return int(json.loads(Path(f"{journal}.position").read_text())["acknowledged"])
    except (OSError, ValueError):
        return -1


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def settled(journal: Path) -> None:
    wait_until(lambda: acknowledged(journal) == size_of(journal), what="delivery")


def notes(journal: Path) -> list[dict[str, str]]:
    file = Path(f"{journal}.rejected")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def companions(journal: Path) -> list[Path]:
    return sorted(journal.parent.glob(f"{journal.name}*"))


# ---- Ids ------------------------------------------------------------------------------------------------------------


def conflicts(fake: FakeBackend) -> Callable[[Request], Reply]:
    """The backend that tells an id which comes with another line."""

    def answer(request: Request) -> Reply:
        refused = []
        for index, item in enumerate(request.items):
            known = fake.stored.get(item["id"])
            if known and line_of(known) != item["log"]:
                refused.append({"index": index, "reason": "This id belongs to another line."})
        wrong = {one["index"] for one in refused}
        good = [item for index, item in enumerate(request.items) if index not in wrong]
        body = json.loads(fake.serve(Request(**{**vars(request), "body": json.dumps(good).encode()})).body)
        if refused and not good:
            return Reply(400, json.dumps({"detail": "no", "rejected": refused}).encode(), PROBLEM)
        return Reply(201, json.dumps(body | {"rejected": refused}).encode(), JSON)

    return answer


@pytest.mark.parametrize("delivered", [True, False], ids=["delivered", "not delivered"])
def test_a_clone_never_speaks_for_other_lines(start: Start, fake: FakeBackend, tmp_path: Path, delivered: bool) -> None:
    """A machine is copied; the lines that both have are stored once, those that each adds, as well."""
    machine, copy = tmp_path / "machine", tmp_path / "copy"
    machine.mkdir()
    journal, source, common = machine / "logs.txt", machine / "source", some_lines(100, "common")
    append(source, common)
    with fake_backend(listening=False) as nowhere:
        service = start(
            "client.py", URL=fake.data_url if delivered else nowhere.data_url, LOG_FILE=journal, SOURCE=source
        )
        wait_until(lambda: size_of(journal) == source.stat().st_size, what="the journal")
        if delivered:
            settled(journal)
        kill(service)
    shutil.copytree(machine, copy)
    fake.answer = conflicts(fake)
    for name in ("one", "two"):
        append(source, some_lines(100, name))
        service = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
        wait_until(lambda: acknowledged(journal) == source.stat().st_size, what="delivery")
        assert service.end() == 0
        assert not notes(journal)
        shutil.rmtree(machine)
        shutil.copytree(copy, machine)
    assert sorted(stored(fake)) == sorted(common + some_lines(100, "one") + some_lines(100, "two"))


def test_a_journal_restored_from_a_backup_loses_none_of_the_lines_that_come_after(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path, tmp_path: Path
) -> None:
    fake.answer = conflicts(fake)
    append(source, some_lines(100))
    service = ship()
    assert_stored(fake, some_lines(100))
    settled(journal)
    kill(service)
    backup = tmp_path / "backup"
    backup.mkdir()
    for file in companions(journal):
        shutil.copy(file, backup)
    append(source, some_lines(50, "later"))
    service = ship()
    assert_stored(fake, some_lines(100) + some_lines(50, "later"))
    settled(journal)
    kill(service)
    for file in companions(journal):
        file.unlink()
    for file in backup.iterdir():
        shutil.copy(file, tmp_path)
    append(source, some_lines(50, "last"))
    ship()
    wait_until(lambda: set(some_lines(50, "last")) <= set(stored(fake)), what="the lines after it")
    settled(journal)
    assert notes(journal) == []
    assert set(stored(fake)) == {*some_lines(100), *some_lines(50, "later"), *some_lines(50, "last")}


def test_a_journal_alone_that_was_restored_is_not_sent_again(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    append(source, some_lines(100))
    service = ship()
    assert_stored(fake, some_lines(100))
    settled(journal)
    assert service.end() == 0
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:40]))
    append(source, some_lines(10, "new"))
    service = ship()
    service.wait_for_line("was cut from .* all that is left was delivered")
    assert_stored(fake, some_lines(100) + some_lines(10, "new"))


def test_another_file_in_place_of_the_journal_ends_the_client(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    append(source, some_lines(100))
    service = ship()
    assert_stored(fake, some_lines(100))
    settled(journal)
    assert service.end() == 0
    journal.unlink()
    append(journal, some_lines(200, "other"))
    service = ship()
    assert service.process.wait(20) == 1
    assert "is not the journal of which" in service.printed
    assert len(service.printed.splitlines()) == 1


def test_a_conflict_that_the_backend_reports_is_an_error_in_the_log_and_noted(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    fake.answer = conflicts(fake)
    with fake_backend(listening=False) as nowhere:
        append(source, some_lines(3))
        service = ship(URL=nowhere.data_url)
        wait_until(lambda: journal.exists() and journal.stat().st_size > 0, what="the journal")
        kill(service)
    identity = json.loads(Path(f"{journal}.journal").read_text())["spans"][0][1]
    taken = f"{identity}{len(some_lines(3)[0]) + 1:012x}"
    other = {"ip": "192.0.2.1", "method": "GET", "uri": "/other", "status_code": 200}
    fake.stored[taken] = {"id": taken, "created": "2026-01-01T00:00:00.000000Z", "log": other}
    service = ship()
    service.wait_for_line(
        r"ERROR client\[\d+\]: the backend refuses the line at byte .*: This id belongs to another line"
    )
    settled(journal)
    assert [(note["id"], note["log"]) for note in notes(journal)] == [(taken, some_lines(3)[1])]
    assert len(fake.stored) == 3


# ---- Durability -----------------------------------------------------------------------------------------------------


def test_what_is_sent_again_after_a_power_cut_is_what_was_answered_in_the_last_seconds(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    """xfs and btrfs leave an empty position; that in .journal is durable."""
    service = ship()
    state = Path(f"{journal}.journal")
    sent = 0

    def is_durable() -> bool:
        nonlocal sent
        append(source, some_lines(10, f"n{sent}"))
        sent += 1
        wait_until(lambda: len(fake.stored) == 10 * sent, what="ten lines more")
        return bool(json.loads(state.read_text())["acknowledged"] > 0)

    wait_until(is_durable, 20, "a durable position", poll=0.2)
    settled(journal)
    kill(service)
    durable = json.loads(state.read_text())["acknowledged"]
    Path(f"{journal}.position").write_bytes(b"")
    known = len(fake.requests)
    append(source, some_lines(5, "last"))
    ship()
    wait_until(lambda: len(fake.stored) == 10 * sent + 5, what="the last lines")
    again = [int(item["id"][24:], 16) for request in fake.requests[known:] for item in request.items]
    assert min(again) == durable


def test_each_new_name_that_must_last_is_followed_by_an_fsync_of_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[str] = []
    fsync, move = os.fsync, os.replace

    def note_fsync(file: int) -> None:
        happened.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        fsync(file)

    def note_replace(old: str, new: str) -> None:
        happened.append(os.path.basename(new))
        move(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    source = tmp_path / "source"
    append(source, some_lines(3))
    journal = client.open_journal(str(tmp_path / "logs.txt"))
    assert happened[0] == "folder"  # LOG_FILE itself
    assert client.FollowedFile(str(source), journal).step()
    journal.reject("0" * 36, b"x", "no")
    assert happened[-1] == "folder"
    for name in ("logs.txt.journal", "logs.txt.source"):
        places = [n for n, what in enumerate(happened) if what == name]
        assert places
        assert {happened[n - 1] for n in places} == {"file"}
        assert {happened[n + 1] for n in places} == {"folder"}


def test_a_new_journal_is_on_disk_under_its_name_before_anything_is_noted_of_it(
    monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    opened = client.open_journal(str(journal), client.Settings(rotate_bytes=65_536, keep_files=1))
    opened.append([b"192.0.2.1 GET /1 200"] * 4000)
    while lines := opened.pending(1000):
        opened.acknowledge(lines)
    happened: list[str] = []
    fsync, move = os.fsync, os.replace

    def note_fsync(file: int) -> None:
        happened.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        fsync(file)

    def note_replace(old: str, new: str) -> None:
        happened.append(os.path.basename(new))
        move(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    opened.rotate_if_due()
    first = ["file", "logs.txt.journal", "folder"]  # all is delivered
    assert happened == [*first, "logs.txt.1", "logs.txt", "folder", *first]


def test_a_stale_position_is_not_behind_what_was_made_durable(journal: Path) -> None:
    opened = client.open_journal(str(journal))
    opened.append([b"192.0.2.1 GET /1 200"] * 10)
    opened.acknowledge(opened.pending(7))
    opened.make_durable(at_once=True)
    identity = opened.state.spans[-1][1]
    os.close(opened._file)
    Path(f"{journal}.position").write_text(json.dumps({"identity": identity, "acknowledged": 21}))
    assert len(client.open_journal(str(journal)).pending(10)) == 3


FSYNC_FAILS_ONCE = """
import os
import client

fsync, failed = os.fsync, []

def fail_once(file):
    if os.readlink(f"/proc/self/fd/{file}").endswith("/logs.txt") and os.fstat(file).st_size and not failed:
        failed.append(file)
        raise OSError(5, "Input/output error")
    fsync(file)

os.fsync = fail_once
client.main()
"""


def test_an_fsync_that_failed_once_ends_the_client(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, tmp_path: Path
) -> None:
    append(source, some_lines(10))
    service = ship(driver(tmp_path, "failing.py", FSYNC_FAILS_ONCE))
    assert service.process.wait(20) == 1
    assert "CRITICAL" in service.printed
    assert "could not be flushed to disk" in service.printed
    assert "Traceback" not in service.printed
    assert fake.stored == {}
    ship()
    assert_stored(fake, some_lines(10))


def test_an_append_that_failed_as_its_truncation_did_is_cut_off_before_the_next_one(
    monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    opened = client.open_journal(str(journal))
    opened.append([b"192.0.2.1 GET /1 200"])
    with monkeypatch.context() as patched:
        real = os.write

        def half(file: int, data: bytes) -> int:
            real(file, bytes(data)[:5])
            raise OSError(errno.EIO, "no")

        def fail(*_: Any) -> None:
            raise OSError(errno.EIO, "no")

        patched.setattr(os, "write", half)
        patched.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="no"):
            opened.append([b"192.0.2.1 GET /2 200"])
    assert journal.read_bytes() == b"192.0.2.1 GET /1 200\n192.0"
    opened.append([b"192.0.2.1 GET /3 200"])
    assert journal.read_bytes() == b"192.0.2.1 GET /1 200\n192.0.2.1 GET /3 200\n"


# ---- Refused on the way ---------------------------------------------------------------------------------------------


def firewall(fake: FakeBackend, status: int, *words: str) -> Callable[[Request], Reply | None]:
    """Refuses whatever has one of these words in it."""

    def answer(request: Request) -> Reply | None:
        if any(word.encode() in request.body for word in words):
            return Reply(status, b"<h1>no</h1>", "text/html")
        return fake.serve(request)

    return answer


@pytest.mark.parametrize("status", [403, 413, 400])
def test_a_line_that_is_refused_on_the_way_holds_up_no_other_and_is_delivered_when_it_may_pass(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path, status: int
) -> None:
    lines = some_lines(300)
    bad = ["192.0.2.1 GET /etc/passwd?1 200", "192.0.2.1 GET /etc/passwd?2 200"]
    mixed = [*lines[:100], bad[0], *lines[100:200], bad[1], *lines[200:]]
    append(source, mixed)
    fake.answer = firewall(fake, status, "/etc/passwd")
    service = ship()
    assert_stored(fake, lines)
    place = sum(len(line) + 1 for line in lines[:100])
    service.wait_for_line(rf"ERROR.*the line at byte {place} of the journal .*answer {status}")
    assert "passwd" not in service.printed
    kill(service)  # what is held back is on disk
    service = ship()
    append(source, some_lines(10, "more"))
    assert_stored(fake, lines + some_lines(10, "more"))
    assert notes(journal) == []
    fake.answer = fake.serve
    wait_until(lambda: len(fake.stored) == 312, what="the lines that were held back")
    assert sorted(stored(fake)) == sorted(mixed + some_lines(10, "more"))
    assert service.end() == 0
    service.wait_for_line("stopped; .* 0 bytes left")


POISON = "192.0.2.1 GET /etc/passwd 200"
UNCLEAR = {
    "closed": None,
    "page": Reply(200, b"<h1>Request rejected</h1>", "text/html"),
    "502": Reply(502, b"no", JSON),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("page", "502")] + ["closed"])
def test_a_line_that_never_comes_through_holds_up_no_other_whatever_that_looks_like(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, tmp_path: Path, kind: str
) -> None:
    """A firewall closes the connection, or answers by a page; an empty batch comes through."""
    fake.answer = lambda request: UNCLEAR[kind] if b"passwd" in request.body else fake.serve(request)
    lines = some_lines(4)
    append(source, [*lines[:2], POISON, *lines[2:]])
    changed = "import client\nclient.LASTING_REFUSALS = 1\nsys.exit(client.main())\n"
    service = ship(driver(tmp_path, "changed.py", changed) if kind == "closed" else "client.py")
    assert_stored(fake, lines)
    service.wait_for_line("ERROR.*the line at byte .* is refused on the way: .*; holding it back")
    fake.answer = fake.serve
    wait_until(lambda: POISON in stored(fake), what="the line that was held back")


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "busy"])
def test_an_outage_is_not_taken_for_a_line_that_never_comes_through(
    start: Start, fake: FakeBackend, journal: Path, dead: bool
) -> None:
    """Nothing at all comes through, or the backend itself says that it cannot store."""
    courier = client.Courier(client.Settings(url=fake.data_url), opened := client.open_journal(str(journal)))
    opened.append([b"192.0.2.1 GET /1 200", b"192.0.2.1 GET /2 200"])
    busy = refusal(503)
    fake.answer = lambda request: None if dead else busy(request) if request.items else fake.serve(request)
    for _ in range(client.LASTING_REFUSALS + 2):
        courier._not_before = 0.0
        courier.deliver()
    assert opened.held == {}
    assert len(fake.requests[-2].items) == 2 or not dead
    assert max(len(request.items) for request in fake.requests[-2:]) == 2


@pytest.mark.parametrize("status", [502, 404])
def test_a_held_line_that_fails_in_another_way_holds_up_no_other(fake: FakeBackend, journal: Path, status: int) -> None:
    opened = client.open_journal(str(journal))
    opened.append([POISON.encode(), b"192.0.2.1 GET /next 200"])
    [(held, line)] = opened.pending(1)
    opened.hold(held, line)
    courier = client.Courier(client.Settings(url=fake.data_url), opened)
    fake.answer = firewall(fake, status, "passwd")
    courier.deliver()
    courier._not_before = 0.0
    courier.deliver()
    assert stored(fake) == ["192.0.2.1 GET /next 200"]
    assert set(opened.held) == {held}


def test_notes_of_refused_lines_go_on_when_their_file_was_moved_away_or_deleted(journal: Path) -> None:
    opened, rejected = client.open_journal(str(journal)), Path(f"{journal}.rejected")
    opened.reject("1" * 36, b"first", "bad")
    rejected.rename(rejected.with_name("looked at"))
    opened.reject("2" * 36, b"second", "bad")
    assert [note["log"] for note in notes(journal)] == ["second"]
    rejected.unlink()
    opened.reject("3" * 36, b"third", "bad")
    opened.reject("2" * 36, b"second", "bad")  # sent again
    assert [note["log"] for note in notes(journal)] == ["third"]
    assert rejected.with_name("looked at").read_text().count("\n") == 1


def test_a_position_never_passes_a_line_that_is_held_back_before_that_is_on_disk(
    monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    """The disk is full when a line is held back, and for .journal only: kill -9 after the next answer."""
    opened = client.open_journal(str(journal))
    opened.append([b"192.0.2.1 GET /held 200", b"192.0.2.1 GET /next 200"])
    (held, line), following = opened.pending(10)
    real = client.write_state

    def full(path: str, state: str, durable: bool = True) -> None:
        if durable:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, state, durable)

    with monkeypatch.context() as patched:
        patched.setattr(client, "write_state", full)
        opened.hold(held, line)
        opened.acknowledge([following])
    os.close(opened._file)
    again = client.open_journal(str(journal))
    assert {name for name, _ in again.pending(10)} | set(again.held) >= {held}


@pytest.mark.slow
def test_what_is_held_back_is_counted_and_the_pauses_grow(
    ship: Callable[..., Service], fake: FakeBackend, source: Path
) -> None:
    append(source, [*some_lines(5), "192.0.2.1 GET /etc/passwd 200", *some_lines(5, "b")])
    fake.answer = firewall(fake, 413, "/etc/passwd")
    service = ship()
    wait_until(lambda: len(fake.stored) == 10, what="the others")

    def alone() -> list[float]:
        return [request.at for request in fake.requests if len(request.items) == 1 and b"passwd" in request.body]

    wait_until(lambda: len(alone()) >= 4, 30, "attempts")
    pauses = [later - earlier for earlier, later in pairwise(alone()[:4])]
    assert all(pause >= least for pause, least in zip(pauses, (1, 1.5, 3), strict=True)), pauses
    assert service.end() == 0
    service.wait_for_line("stopped; 10 lines delivered, 0 refused, 1 held back, [1-9][0-9]* bytes left")


def test_an_outage_that_looks_like_a_firewall_holds_few_lines_back_and_all_are_delivered_in_the_end(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    append(source, lines := some_lines(500))
    fake.answer = firewall(fake, 403, "log")
    service = ship()
    wait_until(lambda: len(fake.requests) > 40, 30, "narrowing")
    fake.answer = fake.serve
    wait_until(lambda: len(fake.stored) == 500, 60, "all lines")
    assert sorted(stored(fake)) == sorted(lines)
    assert service.end() == 0
    assert len(service.printed.splitlines()) < 40


# ---- Rotation and full disks ----------------------------------------------------------------------------------------


def test_a_delivered_journal_is_rotated_and_a_number_of_old_ones_stay(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    ship(ROTATE_BYTES=65_536, KEEP_FILES=2)
    lines: list[str] = []
    for n in range(5):
        append(source, part := some_lines(1000, f"r{n}", padding="p" * 60))
        lines += part
        assert_stored(fake, lines)
        wait_until(lambda: journal.stat().st_size == 0, what="a new journal")
    assert {file.name for file in companions(journal)} >= {"logs.txt", "logs.txt.1", "logs.txt.2"}
    assert not Path(f"{journal}.3").exists()
    assert Path(f"{journal}.1").read_text().splitlines() == lines[-1000:]
    assert len({name[:24] for name in fake.stored}) == 5  # an identity for each


def test_a_journal_is_rotated_under_a_steady_stream_too_and_the_refused_lines_as_well(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    def refuse_some(request: Request) -> Reply:
        items = request.items
        refused = [{"index": n, "reason": "no"} for n, item in enumerate(items) if "/bad/" in item["log"]]
        good = [item for item in items if "/bad/" not in item["log"]]
        fake.serve(Request(**{**vars(request), "body": json.dumps(good).encode()}))
        return Reply(201, json.dumps({"accepted": len(good), "duplicates": 0, "rejected": refused}).encode(), JSON)

    fake.answer = refuse_some
    ended = threading.Event()
    written: list[str] = []

    def write_on() -> None:
        while not ended.wait(0.01):
            append(source, part := some_lines(20, f"s{len(written)}") + some_lines(20, "bad", padding="b" * 60))
            written.extend(part)

    source.touch()
    service = ship(ROTATE_BYTES=65_536, KEEP_FILES=3)
    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        wait_until(lambda: Path(f"{journal}.3").exists() and Path(f"{journal}.rejected.2").exists(), 40, "old parts")
    finally:
        ended.set()
        writer.join()
    good = [line for line in written if "/bad/" not in line]
    assert_stored(fake, good)
    wait_until(lambda: journal.stat().st_size < 65_536, what="the last rotation")
    assert service.end() == 0


KILLED_IN_ROTATION = """
import os, signal, threading
import client

left = int(os.environ["KILL_AT"])

def watch(owner, name):
    real = getattr(owner, name)
    def step(*arguments, **options):
        global left
        if rotating == threading.get_ident():  # what another thread does meanwhile is no step of it
            left -= 1
            if left == 0:
                print("killed at", name, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, name, step)

rotating = None
rotate = client.Journal._rotate

def rotate_watched(journal):
    global rotating
    rotating = threading.get_ident()
    rotate(journal)
    rotating = None

client.Journal._rotate = rotate_watched
for name in ("open", "fsync", "replace", "link", "unlink", "close"):
    watch(os, name)
client.main()
"""


def test_kill_9_at_any_step_of_a_rotation_loses_and_repeats_nothing(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path, tmp_path: Path
) -> None:
    program = driver(tmp_path, "rotating.py", KILLED_IN_ROTATION)
    lines: list[str] = []
    died = set()
    Path(f"{journal}.1").touch()  # one that has to go
    for step in range(1, 20):
        append(source, part := some_lines(700, f"k{step}", padding="p" * 80))
        lines += part
        service = ship(program, KILL_AT=step, ROTATE_BYTES=65_536, KEEP_FILES=1)
        ended = lambda one=service: one.process.poll() is not None or "the delivered one has become" in one.printed  # noqa: E731
        wait_until(ended, what="a rotation")
        rotated = "the delivered one has become" in service.printed
        if rotated:  # it has fewer steps
            kill(service)
            break
        died.add(service.printed.split("killed at ")[-1].split()[0])
        assert_stored(fake, lines)
    ship(ROTATE_BYTES=65_536)
    append(source, last := some_lines(5, "last"))
    assert_stored(fake, lines + last)
    assert died >= {"open", "fsync", "replace", "link", "unlink", "close"}


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch, until: Callable[[], bool]) -> Iterator[None]:
    """Writes fail as on a full disk until something has made room."""
    real = os.write

    def write(file: int, data: bytes) -> int:
        if not until():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        yield


def test_on_a_full_disk_delivered_parts_give_way_the_oldest_first(
    monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    for number in (1, 2, 3):
        Path(f"{journal}.{number}").write_text("delivered\n")
    opened = client.open_journal(str(journal), client.Settings(rotate_bytes=65_536))
    with no_room(monkeypatch, lambda: not Path(f"{journal}.3").exists()):
        opened.append([b"192.0.2.1 GET /1 200"])
    assert Path(f"{journal}.2").exists()
    for number in (1, 2):
        Path(f"{journal}.{number}").unlink()
    opened.append([b"192.0.2.1 GET /2 200"] * 10_000)
    while lines := opened.pending(1000):
        opened.acknowledge(lines)
    before = opened.state.spans
    with no_room(monkeypatch, lambda: journal.stat().st_size == 0):
        opened.append([b"192.0.2.1 GET /3 200"])
    assert journal.read_bytes() == b"192.0.2.1 GET /3 200\n"
    [(name, _)] = opened.pending(10)
    assert name[:24] not in {identity for _, identity in before}


def full_for_states(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    """No block is free for a small file."""
    real = client.write_state

    def write(path: str, state: str, durable: bool = True) -> None:
        if is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, state, durable)

    monkeypatch.setattr(client, "write_state", write)


def test_on_a_full_disk_a_part_gives_way_for_what_is_noted_of_a_rotated_source(
    monkeypatch: pytest.MonkeyPatch, journal: Path, source: Path
) -> None:
    append(source, some_lines(3))
    settings = client.Settings(source=str(source), log_file=str(journal))
    sources = client.Sources(settings, client.open_journal(str(journal), settings))
    while sources.step():
        pass
    part = Path(f"{journal}.1")
    part.write_text("delivered\n")
    full_for_states(monkeypatch, part.exists)
    source.rename(f"{source}.1")
    append(source, some_lines(3, "new"))
    monkeypatch.setattr(client, "ROTATED_SECONDS", 0.0)
    wait_until(lambda: sources.step() and journal.read_text().splitlines() == some_lines(3) + some_lines(3, "new"))


def test_on_a_full_disk_what_is_not_delivered_stays(monkeypatch: pytest.MonkeyPatch, journal: Path) -> None:
    opened = client.open_journal(str(journal), client.Settings(rotate_bytes=65_536))
    opened.append([b"192.0.2.1 GET /2 200"] * 10_000)
    size = journal.stat().st_size
    with no_room(monkeypatch, lambda: False), pytest.raises(OSError, match="No space"):
        opened.append([b"192.0.2.1 GET /3 200"])
    assert journal.stat().st_size == size


# ---- Answers --------------------------------------------------------------------------------------------------------


class Drip:
    """A server that answers a POST with its head, and then for ever with what `rest` gives."""

    def __init__(self, rest: Callable[[socket.socket], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api/data"
        self.posts = 0
        self._rest = rest
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        connection.recv(65536)
        self.posts += 1
        try:
            self._rest(connection)
        except OSError:
            connection.close()

    def close(self) -> None:
        self._listener.close()


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


def trickle(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        connection.sendall(b" ")
        threading.Event().wait(0.05)


def trickling_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        threading.Event().wait(0.05)


IMPATIENT = """
import client
client.ANSWER_SECONDS = 1.0
client.main()
"""


@pytest.mark.parametrize("rest", [endless, trickle, trickling_head], ids=lambda rest: rest.__name__)
def test_an_answer_that_never_ends_takes_neither_memory_nor_for_ever(
    ship: Callable[..., Service], source: Path, tmp_path: Path, rest: Callable[[socket.socket], None]
) -> None:
    append(source, some_lines(10))
    server = Drip(rest)
    service = ship(driver(tmp_path, "impatient.py", IMPATIENT), URL=server.url)
    wait_until(lambda: server.posts >= 3, 30, "more attempts")
    server.close()
    service.wait_for_line("backend unreachable: ")
    assert peak_memory_bytes(service.pid) < 90 * MIB


def test_the_total_time_of_an_answer_is_a_minute() -> None:
    assert client.ANSWER_SECONDS == 60


@pytest.mark.parametrize(
    "value",
    [
        "http://user:pw@localhost/", "http://h:0/", "http://h:abc/", "http://h:99999/", "http://[::1/", "http:///a",
        "http://a..b/", f"http://{'a' * 64}/", "http://h/\u00fc", "ftp://h/",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_used_is_one_line_without_its_password(
    ship: Callable[..., Service], source: Path, value: str
) -> None:
    service = ship(URL=value)
    assert service.process.wait(20) == 2
    [line] = service.printed.splitlines()
    assert "URL is" in line
    assert "pw" not in line


def test_each_new_reason_of_an_outage_is_told_when_it_comes_and_where_a_redirect_leads(
    ship: Callable[..., Service], fake: FakeBackend, source: Path
) -> None:
    append(source, some_lines(10))
    fake.answer = refusal(503)
    service = ship()
    service.wait_for_line("backend unreachable: answer 503")
    fake.answer = refusal(401)
    service.wait_for_line("backend unreachable: answer 401")
    fake.answer = lambda _: Reply(301, b"", "text/html", {"Location": "https://new.example/api/data"})
    service.wait_for_line("backend unreachable: answer 301 to 'https://new.example/api/data'")
    fake.answer = fake.serve
    service.wait_for_line("backend back after")
    assert service.end() == 0
    assert service.printed.count("backend unreachable") == 3


def test_a_refusal_is_told_when_it_comes_and_again_for_each_new_reason(
    ship: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path
) -> None:
    reasons = ["'a' is no address", "'b' is no address", "the status must be 100 to 599"]

    def refuse(request: Request) -> Reply:
        refused = [{"index": n, "reason": reasons[n % 3]} for n in range(len(request.items))]
        return Reply(400, json.dumps({"detail": "no", "rejected": refused}).encode(), PROBLEM)

    fake.answer = refuse
    append(source, some_lines(30))
    service = ship()
    settled(journal)
    assert len(notes(journal)) == 30
    assert service.printed.count("ERROR") == 2
    assert service.end() == 0


def test_retry_after_as_a_date_is_honoured(ship: Callable[..., Service], fake: FakeBackend, source: Path) -> None:
    append(source, some_lines(10))
    came: list[int] = []
    until: list[int] = []  # a date has whole seconds

    def busy(request: Request) -> Reply | None:
        came.append(int(time.time()))
        until.append(came[0] + 3)
        if len(came) == 1:
            date = format_datetime(datetime.fromtimestamp(until[0], UTC), usegmt=True)
            return Reply(503, b"{}", PROBLEM, {"Retry-After": date})
        return fake.serve(request)

    fake.answer = busy
    ship()
    assert_stored(fake, some_lines(10))
    assert len(came) == 2
    assert came[1] >= until[0]


ODD_ANSWERS = {
    "204": client.Answer(204, JSON, b"", ""),
    "a page": client.Answer(200, "text/html", b"<h1>Welcome</h1>", ""),
    "too few": client.Answer(201, JSON, b'{"accepted": 1, "duplicates": 0, "rejected": []}', ""),
    "a list": client.Answer(201, JSON, b"[]", ""),
    "nothing": client.Answer(201, JSON, b"", ""),
    "a cut one": client.Answer(201, JSON, b'{"accepted": 2, "dupl', ""),
    "of another type": client.Answer(201, "text/plain", b'{"accepted": 2, "duplicates": 0, "rejected": []}', ""),
    "a status that is none": client.Answer(299, JSON, b'{"accepted": 2, "duplicates": 0, "rejected": []}', ""),
    "words": client.Answer(201, JSON, b'{"accepted": "2", "duplicates": "", "rejected": []}', ""),
    "no reason": client.Answer(201, JSON, b'{"accepted": 1, "duplicates": 0, "rejected": [{"index": 0}]}', ""),
    "no line": client.Answer(
        201, JSON, b'{"accepted": 1, "duplicates": 0, "rejected": [{"index": 2, "reason": "x"}]}', ""
    ),
    "one twice": client.Answer(
        400, PROBLEM, b'{"rejected": [{"index": 0, "reason": "x"}, {"index": 0, "reason": "x"}]}', ""
    ),
    "no object": client.Answer(201, JSON, b'{"accepted": 1, "duplicates": 0, "rejected": ["index"]}', ""),
    "too deep": client.Answer(201, JSON, b"[" * 200_000, ""),
}


@pytest.mark.parametrize("kind", ODD_ANSWERS)
def test_only_a_whole_answer_about_each_line_ends_its_life(kind: str) -> None:
    with pytest.raises(client.NotDelivered):
        client.read_answer(ODD_ANSWERS[kind], 2)


def test_an_answer_that_nobody_asked_for_is_no_answer(
    ship: Callable[..., Service], source: Path, journal: Path
) -> None:
    """A proxy answers twice; the second one would do for the next lines, which it has not even seen."""
    answer = b'{"accepted": 1, "duplicates": 0, "rejected": []}'
    whole = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(answer),
        answer,
    )
    lines, again = some_lines(2), threading.Event()
    seen: list[socket.socket] = []

    def answer_twice(connection: socket.socket) -> None:
        first = not seen
        seen.append(connection)
        connection.sendall(whole)
        if first:
            wait_until(lambda: acknowledged(journal) == size_of(journal) > 0, what="the first answer to be read")
            connection.sendall(whole)
            again.set()
        connection.recv(65536)

    server = Drip(answer_twice)
    append(source, lines[:1])
    ship(URL=server.url)
    assert again.wait(20)
    append(source, lines[1:])
    wait_until(lambda: len(seen) == 2, what="the second line to be sent on another connection")
    settled(journal)
    server.close()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0), ("99999", 3600.0), ("9" * 5000, 3600.0), ("soon", 0.0), ("", 0.0), ("-5", 0.0), ("1e3", 0.0),
        ("Mon, 01 Jan 2024 00:00:00 GMT", 0.0), ("Mon, 01 Jan 99999 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 00:00:00 GMT", 3600.0), ("Mon, 31 Feb 2026 00:00:00 GMT", 0.0), (", ,", 0.0),
    ],
)  # fmt: skip
def test_what_retry_after_may_be(text: str, seconds: float) -> None:
    assert client.wish_of(text) == seconds
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < client.wish_of(format_datetime(later, usegmt=True)) <= 90


@pytest.mark.parametrize(
    ("outage_seconds", "wish", "least", "most"),
    [(0, 0, 0.1, 0.2), (20, 0, 10, 20), (300, 0, 15, 30), (0, 1, 1, 1.5), (20, 1, 1, 1.5), (20, 60, 60, 90)],
)
def test_pauses_grow_with_an_outage_unless_the_backend_says_when(
    outage_seconds: float, wish: float, least: float, most: float
) -> None:
    pauses = [client.pause_of(outage_seconds, wish) for _ in range(200)]
    assert least <= min(pauses) < least + (most - least) / 4
    assert most - (most - least) / 4 < max(pauses) <= most


def test_a_signal_ends_a_client_that_holds_a_line_back_within_its_time(
    ship: Callable[..., Service], fake: FakeBackend, source: Path
) -> None:
    append(source, ["192.0.2.1 GET /etc/passwd 200", *some_lines(5)])
    fake.answer = firewall(fake, 413, "/etc/passwd")
    service = ship()
    wait_until(lambda: len(fake.stored) == 5, what="the others")
    began = time.monotonic()
    service.kill(signal.SIGTERM)
    assert service.process.wait(20) == 0
    assert time.monotonic() - began < client.SHUTDOWN_SECONDS + 10  # it would be tried again for ever
