"""What background.py promises: the shared file holds each record once, whole and in order, whatever dies or fails."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from fakes import NDJSON, Answer, FakeBackend, Reply, Request, post_lines, proxy_to, refusal, some_lines
from harness import Backend, Service, count_lines, driver, held, is_stopped, kill, peak_memory_bytes, read_records
from waiting import wait_until

import background

StartExporter = Callable[..., Service]
MIB = 1024**2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shared file, alone in its folder."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder / "data.txt"


@pytest.fixture
def lock(file: Path) -> Path:
    return file.with_name("data.txt.lock")


@pytest.fixture
def export(start: Callable[..., Service], file: Path) -> StartExporter:
    """Starts an instance that polls quickly: export(backend)."""

    def start_exporting(backend: Backend | FakeBackend, **settings: Any) -> Service:
        defaults = {"URL": backend.data_url, "DIRECTORY": file.parent, "FILE_NAME": file.name, "REQUEST_DELAY": 20}
        return start("background.py", **{**defaults, **settings})

    return start_exporting


def assert_exported(backend: Backend | FakeBackend, *files: Path) -> None:
    """The files, one after the other, come to hold what the database holds, record by record, and no more."""
    records = backend.records()
    wait_until(lambda: count_lines(*files) >= len(records), 40, f"{len(records)} records in {files}", poll=0.05)
    assert all(file.read_bytes()[-1:] in (b"", b"\n") for file in files)
    assert read_records(*files) == records
    created = [record["created"] for record in records]
    assert created == sorted(set(created))


def is_held(lock: Path) -> bool:
    """Whether a process has the flock of the file at this path."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def stop_while_writing(lock: Path, services: list[Service], feed: Callable[[], None]) -> Service:
    """Gives the instances work until one was stopped (SIGSTOP) while it had the lock and the file; that one."""
    caught: list[Service] = []

    def strike() -> bool:
        feed()
        if not any(lock.exists() for _ in range(10_000)):
            return False  # they were quicker than we could see
        for service in services:
            service.kill(signal.SIGSTOP)
        wait_until(lambda: all(is_stopped(service.pid) for service in services), poll=0)
        for service in services if is_held(lock) and is_held(lock.with_suffix("")) else ():
            opened = {os.path.realpath(one) for one in Path(f"/proc/{service.pid}/fd").iterdir()}
            if {str(lock), str(lock.with_suffix(""))} <= opened:  # the others open the lock's file too, to try it
                caught.append(service)
        for service in services:
            if service not in caught:
                service.kill(signal.SIGCONT)
        return bool(caught)

    wait_until(strike, 60, "an instance that was stopped while it held the lock", poll=0)
    assert len(caught) == 1
    return caught[0]


def stop_one_while_writing(fake: FakeBackend, lock: Path, services: list[Service]) -> Service:
    """The same, with all instances at work and some new records for each attempt."""
    wait_until(lambda: len({request.peer for request in fake.requests}) == len(services), what="requests from all")
    return stop_while_writing(lock, services, lambda: fake.add(some_lines(200, f"f{len(fake.stored)}")))


def answer_from_now_on(fake: FakeBackend, answer: Answer) -> None:
    """Returns when the one instance that is at work has been answered otherwise for the last time."""
    fake.answer = answer
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known, what="a request")


# ---- What is written ----------------------------------------------------------------------------------------------


def test_the_file_gets_what_is_there_from_the_epoch_on_and_then_what_comes(
    backend: Backend, export: StartExporter, file: Path
) -> None:
    post_lines(backend, some_lines(3000))
    instance = export(backend)
    assert_exported(backend, file)
    for n in range(3):
        post_lines(backend, some_lines(5, f"later{n}"))
        assert_exported(backend, file)
    assert instance.end() == 0
    post_lines(backend, some_lines(500, "while-none-ran"))
    export(backend)
    assert_exported(backend, file)


@pytest.mark.parametrize("instances", [2, 4])
def test_several_instances_on_one_file_write_each_record_once_and_in_order(
    backend: Backend, export: StartExporter, file: Path, instances: int
) -> None:
    post_lines(backend, some_lines(20_000))
    running = [export(backend) for _ in range(instances)]
    for n in range(20):
        post_lines(backend, some_lines(50, f"later{n}"))
        if n % 5 == 4:
            running.append(export(backend))
            running[0].wait_for_line("appending")
            assert running.pop(0).end() == 0
    assert_exported(backend, file)
    for instance in running:  # the others may have written all before the last one has begun
        instance.wait_for_line("appending")
    assert [instance.end() for instance in running] == [0] * instances


def test_instances_with_different_files_in_one_folder_do_not_get_in_each_others_way(
    fake: FakeBackend, export: StartExporter, file: Path
) -> None:
    names = ["data.txt", "other.txt", "third.txt"]
    running = [export(fake, FILE_NAME=name, REQUEST_DELAY=1) for name in names]
    for _ in range(100):
        fake.add(some_lines(20, f"n{len(fake.stored)}"))
        wait_until(lambda: count_lines(file) == len(fake.stored), what="the records", poll=0.001)
    for name in names:
        assert_exported(fake, file.with_name(name))
    assert [instance.end() for instance in running] == [0, 0, 0]
    assert [len(re.findall("removed|WARNING|ERROR", instance.printed)) for instance in running] == [0, 0, 0]


def test_sigterm_ends_it_with_exit_0_and_it_says_what_is_left(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path
) -> None:
    fake.add(some_lines(10))
    first = export(fake)
    assert_exported(fake, file)
    with held(lock):
        fake.add(some_lines(7, "left"))
        cursor = fake.records()[-1]["created"]
        wait_until(lambda: fake.requests[-1].query["date_from"] >= cursor, what="the records in its memory")
        assert first.end() == 0
    assert first.wait_for_line(r"stopped; 10 records written, 7 left")
    assert count_lines(file) == 10


def test_sigterm_does_not_wait_for_a_backend_whose_answer_trickles(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path
) -> None:
    fake.add(some_lines(10))
    exporter = export(fake)
    assert_exported(fake, file)
    answer_from_now_on(fake, lambda request: Reply(200, fake.ndjson(request), NDJSON, pause_seconds=0.2))
    sent = fake.bytes_sent
    fake.add(some_lines(10, "more"))  # which takes minutes
    wait_until(lambda: fake.bytes_sent > sent + 5, what="some of the answer")
    assert exporter.end(60) == 0
    exporter.wait_for_line(r"stopped; 10 records written, 0 left")
    assert not lock.exists()
    fake.answer = fake.serve
    export(fake)
    assert_exported(fake, file)


SIGNALLED_BEFORE_FETCHING = """
import os, signal
import background

fetch, fetches = background.Exporter._fetch, []

def signal_and_fetch(exporter):
    fetches.append(exporter)
    if len(fetches) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return fetch(exporter)

background.Exporter._fetch = signal_and_fetch
sys.exit(background.main([]))
"""


def test_a_signal_that_comes_right_before_a_fetch_is_not_missed(
    fake: FakeBackend, start: Callable[..., Service], file: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(10))
    trickle = Reply(200, b"x" * 10_000, NDJSON, pause_seconds=0.2)  # for minutes
    fake.answer = lambda request: fake.export(request) if len(fake.requests) < 3 else trickle
    program = driver(tmp_path, "signalled.py", SIGNALLED_BEFORE_FETCHING)
    exporter = start(program, URL=fake.data_url, DIRECTORY=file.parent, REQUEST_DELAY=20)
    assert exporter.process.wait(60) == 0
    exporter.wait_for_line(r"stopped; 10 records written, 0 left")


SIGNALLED_IN_A_REPLY = """
import http.client, os, signal
import background

class Reply(http.client.HTTPResponse):
    def __init__(self, *arguments, **more):
        made.append(self)
        if len(made) == 3:
            made.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        super().__init__(*arguments, **more)

made = []
http.client.HTTPConnection.response_class = Reply
sys.exit(background.main([]))
"""


def test_a_signal_while_a_reply_is_made_leaves_no_trace(
    fake: FakeBackend, start: Callable[..., Service], file: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(10))
    program = driver(tmp_path, "signalled.py", SIGNALLED_IN_A_REPLY)
    exporter = start(program, URL=fake.data_url, DIRECTORY=file.parent, REQUEST_DELAY=20)
    assert exporter.process.wait(60) == 0
    assert [line for line in exporter.printed.splitlines() if not line.startswith("20")] == []
    exporter.wait_for_line(r"stopped; 10 records written, 0 left")


def test_the_api_token_is_sent(fake: FakeBackend, export: StartExporter) -> None:
    export(fake, API_TOKEN="a.b-c")
    wait_until(lambda: fake.requests, what="a request")
    assert fake.requests[0].headers["Authorization"] == "Bearer a.b-c"


# ---- The lock -----------------------------------------------------------------------------------------------------


def test_the_lock_file_is_there_while_a_stopped_instance_writes_and_nobody_writes_beside_it(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path
) -> None:
    services = [export(fake) for _ in range(3)]
    stopped = stop_one_while_writing(fake, lock, services)
    others = [service for service in services if service is not stopped]
    size = file.stat().st_size if file.exists() else 0
    fake.add(some_lines(1000, "meanwhile"))
    cursor = fake.records()[-1]["created"]
    known = len(fake.requests)
    wait_until(
        lambda: sum(r.query["date_from"] >= cursor for r in fake.requests[known:]) > 20, what="the others' polls"
    )
    assert lock.exists()
    assert (file.stat().st_size if file.exists() else 0) == size
    stopped.kill(signal.SIGCONT)
    assert_exported(fake, file)
    wait_until(lambda: not lock.exists(), what="the end of the lock file")
    assert [service.end() for service in [stopped, *others]] == [0, 0, 0]


def test_what_waits_in_memory_is_written_when_a_stopped_writer_is_killed_also_without_a_backend(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path
) -> None:
    services = [export(fake), export(fake)]
    stopped = stop_one_while_writing(fake, lock, services)
    fake.add(some_lines(1000, "meanwhile"))
    cursor = fake.records()[-1]["created"]
    wait_until(lambda: fake.requests[-1].query["date_from"] >= cursor, what="the records in the other's memory")
    fake.answer = refusal(503)
    kill(stopped)
    assert_exported(fake, file)


# The same service, but for how long it waits for a turn before it says so
IMPATIENT = """
import background

background.TURN_SECONDS = 1.0
sys.exit(background.main([]))
"""


@pytest.mark.parametrize("renamed", [False, True], ids=["removed", "removed, and the file renamed"])
def test_a_lock_file_removed_by_hand_while_it_is_held_lets_no_second_writer_in_and_is_said(
    fake: FakeBackend, start: Callable[..., Service], file: Path, lock: Path, tmp_path: Path, renamed: bool
) -> None:
    program = driver(tmp_path, "impatient.py", IMPATIENT)
    settings = {"URL": fake.data_url, "DIRECTORY": file.parent, "REQUEST_DELAY": 20}
    services = [start(program, **settings) for _ in range(2)]
    stopped = stop_one_while_writing(fake, lock, services)
    other = next(service for service in services if service is not stopped)
    part = file.rename(file.with_name("data.txt.1")) if renamed else file
    size = part.stat().st_size
    lock.unlink()
    fake.add(some_lines(100, "meanwhile"))
    other.wait_for_line(
        "turn to write blocked: for 1 s another process has the folder .*data.txt.lock may have been removed"
    )
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 20, what="more polls")
    assert part.stat().st_size == size
    assert not renamed or not file.exists()
    assert len(re.findall("has the folder", other.printed)) == 1
    stopped.kill(signal.SIGCONT)
    fake.add(some_lines(100, "after"))
    assert_exported(fake, *([part] if renamed else []), file)


@pytest.mark.parametrize("content", [b"", b"4711\n", b"\xff\0garbage" * 100], ids=["empty", "a pid", "garbage"])
def test_a_leftover_lock_file_is_taken_over_at_once(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path, content: bytes
) -> None:
    fake.add(some_lines(100))
    lock.write_bytes(content)
    instance = export(fake)
    assert_exported(fake, file)
    wait_until(lambda: not lock.exists(), what="the end of the lock file")
    assert instance.end() == 0
    assert not re.search("WARNING|ERROR", instance.printed)


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "directory", "fifo"])
def test_what_is_no_lock_file_is_named_left_alone_and_waited_for(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path, kind: str
) -> None:
    fake.add(some_lines(100))
    target = file.parent / "target"
    if kind == "symlink":
        target.write_text("not ours")
    if kind == "directory":
        lock.mkdir()
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.symlink_to(target)
    instance = export(fake)
    instance.wait_for_line("WARNING.*data.txt.lock.*remove it")
    assert not file.exists()
    assert target.exists() == (kind == "symlink")
    assert not target.exists() or target.read_text() == "not ours"
    if kind == "directory":
        lock.rmdir()
    else:
        lock.unlink()
    assert_exported(fake, file)
    instance.wait_for_line("back after")
    assert len(re.findall("WARNING|ERROR", instance.printed)) == 1


def test_a_lock_that_cannot_be_had_for_long_costs_little_memory_and_no_record(
    fake: FakeBackend, export: StartExporter, file: Path, lock: Path
) -> None:
    fake.add(some_lines(10))
    instance = export(fake)
    assert_exported(fake, file)
    with held(lock):
        fake.add(some_lines(12_000, "long", padding="p" * 8000))  # 97 MB
        wait_until(lambda: fake.bytes_sent > 32 * MIB, what="32 MiB in its memory")
        sent = 0

        def rests() -> bool:
            nonlocal sent
            before, sent = sent, fake.bytes_sent
            return before == sent

        wait_until(rests, what="the end of fetching", poll=0.5)
        assert fake.bytes_sent < 80 * MIB  # the kernel's buffers hold some of it
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{instance.pid}/status").read_text())
        assert found
        assert int(found[1]) < 120 * 1024, f"{int(found[1]) // 1024} MiB"
        assert count_lines(file) == 10
    assert_exported(fake, file)


# ---- Kills and leftovers ------------------------------------------------------------------------------------------


def test_kill_9_at_random_moments_of_a_catch_up_leaves_a_file_that_ends_whole_and_equal(
    backend: Backend, export: StartExporter, file: Path, lock: Path
) -> None:
    dice = random.Random(5)
    post_lines(backend, some_lines(50_000, padding="p" * 800))
    torn = 0

    def size() -> int:
        return file.stat().st_size if file.exists() else 0

    for _ in range(8):
        before = size()
        goal = before + dice.choice((0, 1, 100_000, 1_000_000, 2_000_000))
        with proxy_to(backend) as proxy:
            proxy.cut_next(5_000_000, *[0] * 1000)  # more than the goal, and less than an eighth
            instance = export(backend, URL=proxy.data_url)
            wait_until(lambda: lock.exists() or size() > before, 20, "the lock file", poll=0)  # noqa: B023
            wait_until(lambda: size() >= goal, 20, "growth", poll=0)  # noqa: B023
            assert instance.process.poll() is None
            kill(instance)
        torn += count_lines(file) > 0 and file.read_bytes()[-1:] != b"\n"
        assert count_lines(file) < 50_000, "the kill came too late"
    instance = export(backend)
    assert_exported(backend, file)
    assert torn == 0 or "cut off" in "".join(path.read_text() for path in file.parent.parent.glob("*.out"))


@pytest.mark.parametrize(
    "torn",
    [b"{", b'{"id":"', b'{"id":"00000000-0000-8000-8000-000000000000","created":"2026-01-0', b"\0" * 5000, None],
    ids=["brace", "start", "half", "zeros", "all but the line feed"],
)
def test_a_torn_last_record_is_cut_off_and_written_whole(
    fake: FakeBackend, export: StartExporter, file: Path, torn: bytes | None
) -> None:
    fake.add(some_lines(100))
    kill_after(fake, export, file)
    fake.add(some_lines(50, "more"))
    if torn is None:
        torn = json.dumps(fake.records()[100], separators=(",", ":")).encode()
    with file.open("ab") as writer:
        writer.write(torn)
    export(fake).wait_for_line(f"cut off {len(torn)} bytes")
    assert_exported(fake, file)


def kill_after(backend: Backend | FakeBackend, export: StartExporter, file: Path) -> None:
    """Runs an instance until all is in the file, then kills it."""
    instance = export(backend)
    assert_exported(backend, file)
    kill(instance)


@pytest.mark.parametrize(
    "position",
    [
        None,
        b"",
        b"garbage",
        b"\0" * 100,
        b"{}",
        b"[1]",
        b'{"created": 5, "device": "x", "inode": null}',
        b"stale",
        b'{"created": "9999-12-31T23:59:59.999999Z", "device": 1, "inode": Infinity}',
        b'{"created": "2026-01-01T00:00:00.000001Z", "device": 1, "inode": 2, "first": 3, "record": [4]}',
    ],
    ids=lambda content: "missing" if content is None else repr(content)[:20],
)
def test_a_lost_stale_or_broken_position_costs_no_record_and_makes_no_copy(
    fake: FakeBackend, export: StartExporter, file: Path, position: bytes | None
) -> None:
    fake.add(some_lines(100))
    kill_after(fake, export, file)
    beside = file.with_name("data.txt.position")
    old = beside.read_bytes()
    fake.add(some_lines(100, "second"))
    instance = export(fake)
    assert_exported(fake, file)
    wait_until(lambda: beside.read_bytes() != old, what="the new position")
    kill(instance)
    if position is None:
        beside.unlink()
    else:
        beside.write_bytes(old if position == b"stale" else position)
    fake.add(some_lines(100, "third"))
    export(fake)
    assert_exported(fake, file)


# ---- Rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("created", [False, True], ids=["renamed", "renamed and created anew"])
def test_renaming_the_file_while_three_instances_write_and_are_killed_loses_and_repeats_nothing(
    backend: Backend, export: StartExporter, file: Path, created: bool
) -> None:
    dice = random.Random(7)
    post_lines(backend, some_lines(5000))
    running = [export(backend) for _ in range(3)]
    parts: list[Path] = []
    feeding = threading.Event()

    def feed() -> None:
        for n in count():
            if feeding.is_set():
                return
            post_lines(backend, some_lines(100, f"feed{n}"))

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for n in range(6):
            wait_until(lambda: count_lines(file), 20, "records", poll=0.001)
            parts.append(file.rename(file.with_name(f"data.txt.{n}")))
            if created:
                with file.open("a"):
                    pass
            if n % 2:
                kill(running.pop(dice.randrange(3)))
                running.append(export(backend))
    finally:
        feeding.set()
        feeder.join()
    post_lines(backend, some_lines(100, "last"))  # what was fed may all be in the parts
    assert_exported(backend, *parts, file)
    assert all(count_lines(part) for part in parts)


def test_the_file_may_be_renamed_out_of_its_folder_and_a_restart_goes_on_after_it(
    fake: FakeBackend, export: StartExporter, file: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(100))
    assert_exported_and_ended(fake, export, file)
    part = file.rename(tmp_path / "elsewhere")
    fake.add(some_lines(100, "more"))
    export(fake)
    assert_exported(fake, part, file)


def test_a_part_may_be_compressed_and_another_file_may_get_its_inode(
    fake: FakeBackend, export: StartExporter, file: Path
) -> None:
    fake.add(some_lines(100))
    assert_exported_and_ended(fake, export, file)
    part = file.with_name("data.txt.1.gz")
    part.write_bytes(file.read_bytes())  # stands for the compressed copy
    foreign = file.rename(file.with_name("notes.txt"))
    foreign.write_text("these are notes")  # the inode is that of the shared file that was removed
    fake.add(some_lines(100, "more"))
    export(fake)
    assert_exported(fake, part, file)
    assert foreign.read_text() == "these are notes"


def test_the_lock_file_may_get_the_inode_of_a_part_that_is_gone(file: Path) -> None:
    created = "2026-01-01T00:00:00.000000Z"
    turn = background.Turn(str(file.parent), file.name)
    with turn.taken() as ours:
        assert ours
        status = os.stat(turn.path)
        position = {"created": created, "device": status.st_dev, "inode": status.st_ino}
        file.with_name("data.txt.position").write_text(json.dumps(position))
        with background.SharedFile(str(file.parent), file.name).opened(ours) as last:
            assert last
            assert last.created == created


@pytest.mark.parametrize("name", ["data.txt.1", "old", "old.lock"])
def test_the_renamed_file_is_found_under_any_name_when_the_position_is_stale(
    fake: FakeBackend, export: StartExporter, file: Path, name: str
) -> None:
    fake.add(some_lines(100))
    assert_exported_and_ended(fake, export, file)
    position = file.with_name("data.txt.position")
    stale = position.read_bytes()
    fake.add(some_lines(100, "more"))
    assert_exported_and_ended(fake, export, file)
    position.write_bytes(stale)  # as one leaves it who is killed between the flush and the position
    part = file.rename(file.with_name(name))
    fake.add(some_lines(100, "last"))
    export(fake)
    assert_exported(fake, part, file)


def test_a_turn_does_not_fail_because_others_end_theirs_meanwhile(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    companions = [file.with_name(f"other.txt.{kind}") for kind in ("lock", "position.new")]
    for companion in companions:
        companion.touch()
    scandir = os.scandir

    def list_and_remove(folder: int) -> list[os.DirEntry[str]]:
        entries = list(scandir(folder))
        for companion in companions:
            companion.unlink(missing_ok=True)  # the folder may be listed more than once
        return entries

    monkeypatch.setattr(os, "scandir", list_and_remove)
    folder = background.Folder(str(file.parent))
    with closing(folder), background.SharedFile(str(file.parent), file.name).opened(folder) as last:
        assert last is None
    assert not any(companion.exists() for companion in companions)


def test_a_copy_of_the_file_that_is_being_made_beside_it_is_not_cut(
    fake: FakeBackend, export: StartExporter, file: Path
) -> None:
    fake.add(some_lines(100))
    assert_exported_and_ended(fake, export, file)
    half = file.read_bytes()[:-30]
    copy = file.with_name("data.txt.copy")
    copy.write_bytes(half)
    part = file.rename(file.with_name("data.txt.1"))
    fake.add(some_lines(100, "more"))
    export(fake)
    assert_exported(fake, part, file)
    assert copy.read_bytes() == half


def assert_exported_and_ended(backend: FakeBackend, export: StartExporter, file: Path) -> None:
    instance = export(backend)
    assert_exported(backend, file)
    assert instance.end() == 0


# ---- Trouble with files -------------------------------------------------------------------------------------------


NO_JSON = '{"id":"a","created":"2026-01-01T00:00:00.000000Z","log":{}]}\n'


@pytest.mark.parametrize("text", ["my notes\n", "my notes", '{"a": 1}\n', "\n", NO_JSON], ids=repr)
def test_another_programs_file_is_not_touched_and_is_named(
    fake: FakeBackend, export: StartExporter, file: Path, text: str
) -> None:
    fake.add(some_lines(100))
    file.write_text(text)
    instance = export(fake)
    instance.wait_for_line("WARNING.*data.txt.*another program")
    assert file.read_text() == text
    file.rename(file.with_name("notes"))
    assert_exported(fake, file)
    instance.wait_for_line("back after")
    assert file.with_name("notes").read_text() == text


def test_a_full_disk_leaves_whole_lines_and_is_waited_for(fake: FakeBackend, export: StartExporter, file: Path) -> None:
    fake.add(some_lines(2000))
    instance = export(fake)
    assert_exported(fake, file)
    full = file.stat().st_size + 12_345
    resource.prlimit(instance.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    fake.add(some_lines(2000, "more"))
    instance.wait_for_line("WARNING.*(?i:too large)")
    assert file.stat().st_size <= full
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 5, what="more polls")
    resource.prlimit(instance.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert_exported(fake, file)
    instance.wait_for_line("back after")
    assert len(re.findall("WARNING|ERROR", instance.printed)) == 1


# ---- Trouble with the backend -------------------------------------------------------------------------------------


def cutting(fake: FakeBackend, chunked: bool, cuts: int) -> Answer:
    """So many replies break off at any byte: before the last chunk, or before the Content-Length."""
    dice = random.Random(11)

    def answer(request: Request) -> Reply:
        body = fake.ndjson(request)
        if len(fake.requests) > cuts:
            return fake.export(request)
        kept = body[: dice.randrange(len(body) // 4)]
        return Reply(200, kept, NDJSON, chunked=chunked, length=None if chunked else len(body))

    return answer


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "counted"])
def test_replies_that_break_off_at_any_byte_are_taken_up_again_without_a_gap_or_a_copy(
    fake: FakeBackend, export: StartExporter, file: Path, chunked: bool
) -> None:
    fake.add(some_lines(3000))
    fake.answer = cutting(fake, chunked, 10)
    instance = export(fake)
    assert_exported(fake, file)
    assert len(fake.requests) > 10
    assert instance.end() == 0


def test_replies_of_the_real_backend_that_are_cut_off_are_taken_up_again(
    backend: Backend, export: StartExporter, file: Path
) -> None:
    post_lines(backend, some_lines(20_000))
    with proxy_to(backend) as proxy:
        proxy.cut_next(0, 100, 1000, 100_000, 1_000_000)
        export(backend, URL=proxy.data_url)
        assert_exported(backend, file)
        assert proxy.cuts == 5


def lines_of(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)


FALSE_REPLIES: dict[str, Callable[[FakeBackend], Reply | None]] = {
    "503": lambda _: Reply(503, b'{"detail": "away"}', "application/problem+json"),
    "401": lambda _: Reply(401, b'{"detail": "token"}', "application/problem+json"),
    "dropped": lambda _: None,
    "a page": lambda _: Reply(200, b"<html>\n<body>welcome\n</body></html>\n", "text/html"),
    "a page in one line": lambda _: Reply(200, b"<html>welcome</html>", "text/html"),
    "a JSON array": lambda fake: Reply(200, json.dumps(fake.records()[4:]).encode() + b"\n"),
    "out of order": lambda fake: Reply(200, lines_of([*fake.records()[4:5], *fake.records()[:4:-1]]), NDJSON),
    "twice": lambda fake: Reply(200, lines_of([*fake.records()[4:], *fake.records()[-1:]]), NDJSON),
    "too old": lambda fake: Reply(200, lines_of(fake.records()), NDJSON),
    "no JSON": lambda fake: Reply(200, lines_of(fake.records()[4:]).replace(b"/later/9", b'"'), NDJSON),
    "an endless line": lambda _: Reply(200, b"x" * 200 * MIB, NDJSON),
    "a foreign line": lambda fake: Reply(200, lines_of(fake.records()[4:]) + b"and so on\n", NDJSON),
    "cut in the first record": lambda fake: Reply(200, lines_of(fake.records()[4:])[:50], NDJSON, chunked=True),
}


@pytest.mark.parametrize("kind", FALSE_REPLIES)
def test_while_the_backend_is_away_or_false_nothing_is_written_and_two_lines_are_logged(
    fake: FakeBackend, export: StartExporter, file: Path, kind: str
) -> None:
    fake.add(some_lines(5))
    instance = export(fake)
    assert_exported(fake, file)
    before = file.read_bytes()
    answer_from_now_on(fake, lambda _: FALSE_REPLIES[kind](fake))
    fake.add(some_lines(10, "later"))
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 4, what="five attempts")
    assert file.read_bytes() == before
    assert peak_memory_bytes(instance.pid) < 100 * MIB
    fake.answer = fake.serve
    assert_exported(fake, file)
    assert instance.end() == 0
    said = [line for line in instance.printed.splitlines() if not re.search("appending|stopped|records written", line)]
    assert len(said) == 2, said


def test_retry_after_is_honoured(fake: FakeBackend, export: StartExporter, file: Path) -> None:
    fake.add(some_lines(10))
    busy = refusal(503, Retry_After="1")
    fake.answer = lambda request: busy(request) if len(fake.requests) < 3 else fake.serve(request)
    export(fake)
    assert_exported(fake, file)
    moments = [request.at for request in fake.requests]
    assert [later - earlier >= 1 for earlier, later in pairwise(moments[:3])] == [True, True]


def test_a_backend_that_is_killed_and_comes_back_costs_nothing(
    start_backend: Callable[..., Backend], export: StartExporter, file: Path
) -> None:
    first = start_backend()
    post_lines(first, some_lines(2000))
    with proxy_to(first) as proxy:
        instance = export(first, URL=proxy.data_url)
        assert_exported(first, file)
        kill(first)
        instance.wait_for_line("WARNING.*backend unreachable")
        second = start_backend(DATABASE_URL=first.database_url)
        post_lines(second, some_lines(2000, "after"))
        proxy.upstream = second.url
        assert_exported(second, file)
