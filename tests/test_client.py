"""What client.py promises: each line of its journal is stored once, each line of its source is in its journal once."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from fakes import PROBLEM, Answer, FakeBackend, Reply, Request, fake_backend, proxy_to, refusal, some_lines
from harness import (
    ROOT,
    Backend,
    Service,
    assert_same,
    clean_environment,
    count_lines,
    driver,
    kill,
    line_of,
    peak_memory_bytes,
)
from waiting import wait_until

import client

Start = Callable[..., Service]
DATA = Path(__file__).parent / "data"
MIB = 1024**2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


@pytest.fixture
def follow(start: Start, backend: Backend, journal: Path, source: Path) -> Callable[..., Service]:
    """Starts a client that follows `source` and delivers to the real backend."""

    def start_following(**settings: Any) -> Service:
        return start("client.py", **{"URL": backend.data_url, "LOG_FILE": journal, "SOURCE": source, **settings})

    return start_following


def append(path: Path, *lines: str, end: str = "\n") -> None:
    with path.open("ab") as file:
        file.write("".join(line + end for line in lines).encode())


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))


def wait_for_records(backend: Backend | FakeBackend, count: int) -> list[dict[str, Any]]:
    wait_until(lambda: len(backend.records()) >= count, 40, f"{count} records", poll=0.1)
    return backend.records()


def assert_delivered(lines: list[str], journal: Path, backend: Backend | FakeBackend) -> None:
    """All these lines, and no others, are in the journal and in the database, once each and in this order."""
    records = wait_for_records(backend, len(lines))
    assert journal.read_text().splitlines() == lines
    assert_same(journal, records)
    assert [line_of(record) for record in records] == lines


def wait_until_acknowledged(journal: Path) -> None:
    """All its lines are stored, or noted in .rejected: the position is moved last."""
    position = Path(f"{journal}.position")

    def is_acknowledged() -> bool:
        return position.exists() and json.loads(position.read_text())["acknowledged"] == journal.stat().st_size > 0

    wait_until(is_acknowledged, what="the position")


def rejected(journal: Path) -> list[dict[str, str]]:
    file = journal.with_name(f"{journal.name}.rejected")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- Generated lines ----------------------------------------------------------------------------------------------


def test_every_generated_line_is_journalled_in_its_form_and_stored_once(
    start: Start, backend: Backend, journal: Path
) -> None:
    client = start("client.py", URL=backend.data_url, LOG_FILE=journal, THREADS_AMOUNT=8, REQUEST_DELAY_LIMIT=20)
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 300, what="300 lines")
    assert client.end() == 0
    form = re.compile(r"\d{1,3}(\.\d{1,3}){3} [A-Z]+ \S+ [1-5]\d\d")
    assert all(form.fullmatch(line) for line in journal.read_text().splitlines())
    assert_same(journal, backend.records())
    assert client.wait_for_line("stopped.* 0 bytes left")


def test_each_of_several_threads_posts(fake: FakeBackend, tmp_path: Path) -> None:
    note = (
        "import sys, threading\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import client\n"
        "sys.addaudithook(lambda event, _: event == 'http.client.send' and print(threading.get_ident(), flush=True))\n"
        "client.Courier.deliver_always = lambda _: None  # on a slow backend it has all turns\n"
        "client.main()\n"
    )
    settings = {"URL": fake.data_url, "LOG_FILE": tmp_path / "log", "THREADS_AMOUNT": 4, "REQUEST_DELAY_LIMIT": 100}
    output = tmp_path / "threads"
    with output.open("wb") as file:
        environment = clean_environment({name: str(value) for name, value in settings.items()})
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", note], env=environment, stdout=file)
    try:
        wait_until(lambda: len(set(output.read_text().splitlines()[:-1])) >= 4, what="POSTs from four threads")
    finally:
        process.kill()
        process.wait()
    assert fake.requests


def test_an_id_is_the_journals_own_and_the_byte_offset_of_the_line(
    start: Start, fake: FakeBackend, journal: Path
) -> None:
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, REQUEST_DELAY_LIMIT=10)
    wait_for_records(fake, 30)
    assert client.end() == 0
    lines = journal.read_bytes()
    assert len({record_id[:24] for record_id in fake.stored}) == 1
    for record in fake.records():
        assert str(uuid.UUID(record["id"])) == record["id"]
        line = f"{line_of(record)}\n".encode()
        offset = int(record["id"][24:], 16)
        assert lines[offset : offset + len(line)] == line
    assert len(fake.stored) == lines.count(b"\n")


# ---- Sources ------------------------------------------------------------------------------------------------------


def test_lines_of_all_known_formats_arrive_and_the_last_one_waits_for_its_end(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    expected = (DATA / "access_common.lines").read_text() + (DATA / "access_combined.lines").read_text()
    lines = [*expected.splitlines(), "192.0.2.9 GET /plain 200", "::1 GET /plain 200"]
    text = (DATA / "access_common.log").read_text().replace("\n", "\r\n")
    text += "\n\r\n  \n" + (DATA / "access_combined.log").read_text()
    source.write_bytes(f"{text}192.0.2.9 GET /plain 200\n\t ::1 GET /plain 200 \r\n\n192.0.2.10 GET /ha".encode())
    client = follow()
    assert_delivered(lines, journal, backend)
    append(source, "lf 200")
    assert_delivered([*lines, "192.0.2.10 GET /half 200"], journal, backend)
    assert client.end() == 0
    assert rejected(journal) == []


def test_a_line_that_can_never_be_stored_is_in_rejected_once_with_the_reason_and_holds_up_nothing(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    good = some_lines(2000)
    bad = [b"no log line", b"\xff\xfe", b"192.0.2.1 GET /\0 200", b"999.0.2.1 GET / 200",
           b"192.0.2.1 GET /" + b"u" * 9000 + b" 200"]  # fmt: skip
    too_long = b"x" * 300_000
    mixed = [line.encode() for line in good]
    for place, line in zip((0, 3, 700, 701, 1999), bad, strict=True):
        mixed.insert(place, line)
    source.write_bytes(b"\n".join([*mixed, too_long, b"192.0.2.7 GET /after 200", b""]))
    client = follow()
    records = wait_for_records(backend, 2001)
    assert [line_of(record) for record in records] == [*good, "192.0.2.7 GET /after 200"]
    wait_until_acknowledged(journal)
    notes = rejected(journal)
    wanted = [line.decode(errors="backslashreplace") for line in bad]
    assert [note["log"] for note in notes[: len(bad)]] == wanted
    [overlong] = notes[len(bad) :]
    assert overlong["log"] == f"{'x' * 200} ... a line of 300001 bytes, too long to be stored"
    journalled = journal.read_bytes()
    for note in notes:
        assert note["reason"]
        assert note["id"][:24] == records[0]["id"][:24]
        offset = int(note["id"][24:], 16)
        assert journalled[offset:].split(b"\n", 1)[0].decode(errors="backslashreplace") == note["log"]
    kill(client)
    (journal.parent / "logs.txt.position").unlink()
    append(source, "192.0.2.8 GET /last 200")
    follow()
    wait_until(lambda: '"/last"' in json.dumps(backend.records()), what="the last line", poll=0.1)
    assert len(backend.records()) == 2002
    wait_until_acknowledged(journal)
    assert rejected(journal) == notes


def test_an_endless_line_without_a_line_feed_does_not_hold_up_what_follows_it(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    source.write_bytes(b"x" * 30_000_000)
    service = follow()
    service.wait_for_line("delivering to")
    append(source, "", *(lines := some_lines(100)))
    records = wait_for_records(backend, 100)
    assert [line_of(record) for record in records] == lines
    wait_until_acknowledged(journal)
    [note] = rejected(journal)
    assert note["log"].startswith("x" * 200 + " ")
    assert "30000001 bytes" in note["log"]
    assert peak_memory_bytes(service.pid) < 60 * MIB


def test_lines_appended_to_a_followed_file_arrive(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    lines = some_lines(50)
    client = follow()
    wait_until(lambda: "access.log" in client.printed, what="a word about the missing file")
    for n in range(0, 50, 10):
        append(source, *lines[n : n + 10])
        assert_delivered(lines[: n + 10], journal, backend)
    assert client.end() == 0


LEAVING_ON_SIGNAL = """
import signal
import client

seconds, client.ROTATED_SECONDS = client.ROTATED_SECONDS, float("inf")
signal.signal(signal.SIGUSR1, lambda *_: setattr(client, "ROTATED_SECONDS", seconds))
client.main()
"""


def test_rotation_by_rename_loses_nothing_also_of_what_is_still_written_to_the_renamed_file(
    start: Start, backend: Backend, source: Path, journal: Path, tmp_path: Path
) -> None:
    lines = some_lines(90)
    write_lines(source, lines[:30])
    settings = {"URL": backend.data_url, "LOG_FILE": journal, "SOURCE": source}
    client = start(driver(tmp_path, "leaving.py", LEAVING_ON_SIGNAL), **settings)
    assert_delivered(lines[:30], journal, backend)
    with source.open("a") as writer:
        renamed = source.rename(source.with_suffix(".1"))
        write_lines(source, lines[60:75])
        for n in (30, 45):
            for line in lines[n : n + 15]:
                writer.write(line + "\n")
                writer.flush()
            assert_delivered(lines[: n + 15], journal, backend)
    client.kill(signal.SIGUSR1)  # its 2 seconds count from here: this writer is not late, however slow the machine
    assert_delivered(lines[:75], journal, backend)
    append(source, *lines[75:])
    assert_delivered(lines, journal, backend)
    assert renamed.read_text().splitlines() == lines[:60]


KILLED_BEFORE_APPENDING = """
import os, signal
import client

os.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # .source is written by a file object
client.main()
"""


def test_a_file_that_was_truncated_and_has_grown_after_a_kill_9_in_an_append_is_read_from_its_beginning(
    start: Start, follow: Callable[..., Service], backend: Backend, source: Path, journal: Path, tmp_path: Path
) -> None:
    lines = some_lines(50)
    write_lines(source, lines)
    client = follow()
    assert_delivered(lines, journal, backend)
    assert client.end() == 0
    append(source, *some_lines(10, "unread"))
    killed = start(driver(tmp_path, "killed.py", KILLED_BEFORE_APPENDING), **client.settings)
    assert killed.process.wait(20) == -signal.SIGKILL
    write_lines(source, new := some_lines(200, "new"))
    follow()
    assert_delivered(lines + new, journal, backend)


def test_a_renamed_file_is_left_when_it_was_seen_quiet_for_a_while_however_long_the_client_was_stopped(
    monkeypatch: pytest.MonkeyPatch, source: Path, journal: Path
) -> None:
    lines = some_lines(50)
    write_lines(source, lines[:10])
    followed = client.FollowedFile(str(source), client.open_journal(str(journal)))
    assert (followed.step(), followed.step()) == (True, False)
    renamed = source.rename(source.with_suffix(".1"))
    write_lines(source, lines[40:])
    now = time.monotonic() + 600  # it was stopped between two steps
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    assert not followed.step()
    append(renamed, *lines[10:30])
    assert (followed.step(), followed.step()) == (True, False)
    now += 600
    samestat = os.path.samestat

    def stopped_here(*arguments: Any) -> bool:  # and once in a step, beside its look at the path
        append(renamed, *lines[30:40])
        monkeypatch.setattr(os.path, "samestat", samestat)
        return samestat(*arguments)

    monkeypatch.setattr(os.path, "samestat", stopped_here)
    assert (followed.step(), followed.step()) == (True, False)
    now += 600
    assert [followed.step() for _ in range(2)] == [True, False]
    assert journal.read_text().splitlines() == lines
    append(renamed, "192.0.2.1 GET /late 200")  # a writer that goes on in it
    assert [followed.step() for _ in range(2)] == [True, False]
    assert journal.read_text().splitlines() == [*lines, "192.0.2.1 GET /late 200"]


def test_rotation_while_no_client_runs_loses_nothing(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    lines = some_lines(90)
    write_lines(source, lines[:30])
    client = follow()
    assert_delivered(lines[:30], journal, backend)
    kill(client)
    append(source, *lines[30:60])
    source.rename(source.with_suffix(".1"))
    write_lines(source, lines[60:])
    follow()
    assert_delivered(lines, journal, backend)


def test_rotation_while_a_starting_client_looks_for_the_file_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, source: Path, journal: Path
) -> None:
    lines = some_lines(30)
    write_lines(source, lines[:10])
    kept = client.open_journal(str(journal))
    assert client.FollowedFile(str(source), kept).step()
    append(source, *lines[10:20])
    scandir = os.scandir

    def rotated_here(folder: str) -> Iterator[os.DirEntry[str]]:
        monkeypatch.setattr(os, "scandir", scandir)
        entries = list(scandir(folder))
        source.rename(source.with_suffix(".1"))
        write_lines(source, lines[20:])
        return iter(entries)

    monkeypatch.setattr(os, "scandir", rotated_here)
    followed = client.FollowedFile(str(source), kept)
    assert followed.step()
    assert journal.read_text().splitlines() == lines[:20]
    wait_until(lambda: followed.step() and len(journal.read_text().splitlines()) > 20, what="the new file")
    assert journal.read_text().splitlines() == lines


@pytest.mark.parametrize(("known", "look"), [(True, 1), (True, 2), (True, 3), (False, 2), (False, 3)])
def test_a_file_that_is_truncated_and_grows_while_it_is_looked_at_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, source: Path, journal: Path, known: bool, look: int
) -> None:
    """All that was in it is read; then it is truncated and grows beyond that, before one of the looks at it."""
    lines, looks, pread = some_lines(90), itertools.count(1), os.pread
    write_lines(source, lines[:30])
    followed = client.FollowedFile(str(source), client.open_journal(str(journal)))
    if known:
        assert followed.step()

    def truncated_here(file: int, size: int, offset: int) -> bytes:
        if next(looks) == look:
            write_lines(source, lines[30:])
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", truncated_here)
    for _ in range(5):
        followed.step()
    assert journal.read_text().splitlines() == lines


def test_a_file_whose_lines_were_taken_back_and_that_was_truncated_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, source: Path, journal: Path
) -> None:
    """The client is killed right before lines get into the journal; meanwhile the file begins anew, and is longer."""
    lines = some_lines(10)
    write_lines(source, lines[:1])
    killed = client.open_journal(str(journal))
    followed = client.FollowedFile(str(source), killed)
    assert followed.step()
    append(source, "192.0.2.1 GET /gone 200")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", Mock(side_effect=OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            followed.step()
    os.close(killed._file)
    write_lines(source, lines[1:])
    followed = client.FollowedFile(str(source), client.open_journal(str(journal)))
    for _ in range(3):
        followed.step()
    assert journal.read_text().splitlines() == lines


@pytest.mark.parametrize("how", ["truncated", "replaced"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_file_that_was_truncated_or_replaced_by_a_shorter_one_is_read_from_its_beginning(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path, how: str, running: bool
) -> None:
    lines = some_lines(60)
    write_lines(source, lines[:50])
    client = follow()
    assert_delivered(lines[:50], journal, backend)
    if not running:
        assert client.end() == 0
    if how == "truncated":
        write_lines(source, lines[50:])
    else:
        write_lines(source.with_suffix(".new"), lines[50:])
        source.with_suffix(".new").replace(source)
    if not running:
        follow()
    assert_delivered(lines, journal, backend)


def test_another_file_that_got_the_inode_of_the_source_is_not_taken_for_it(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    lines = some_lines(60)
    write_lines(source, lines[:50])
    client = follow()
    assert_delivered(lines[:50], journal, backend)
    assert client.end() == 0
    foreign = source.rename(source.with_name("foreign.txt"))
    write_lines(foreign, some_lines(20, "foreign"))
    write_lines(source, lines[50:])
    follow()
    assert_delivered(lines, journal, backend)


def test_standard_input_ends_the_client_at_its_end_with_all_of_it_delivered_also_to_a_backend_that_comes_up_late(
    start: Start, journal: Path
) -> None:
    lines = some_lines(5000)
    with fake_backend(listening=False) as fake:
        client = start("client.py", stdin=subprocess.PIPE, URL=fake.data_url, LOG_FILE=journal, SOURCE="-")
        assert client.process.stdin
        client.process.stdin.write("\n".join(lines).encode())  # the last line ends with the input
        client.process.stdin.close()
        client.wait_for_line("backend unreachable")
        assert client.process.poll() is None
        fake.listen()
        assert client.process.wait(30) == 0
        assert_delivered(lines, journal, fake)


def test_lines_after_an_over_long_one_on_standard_input_stay_whole(
    start: Start, backend: Backend, journal: Path
) -> None:
    lines = some_lines(6000)
    client = start("client.py", stdin=subprocess.PIPE, URL=backend.data_url, LOG_FILE=journal, SOURCE="-")
    assert client.process.stdin
    for n, length in enumerate((300_000, 340_000, 400_000, 470_000)):
        client.process.stdin.write(b"x" * length + b"\n")
        client.process.stdin.write("".join(f"{line}\n" for line in lines[n * 1500 :][:1500]).encode())
    client.process.stdin.close()
    assert client.process.wait(30) == 0
    assert [line_of(record) for record in backend.records()] == lines
    lengths = [re.search(r"a line of (\d+) bytes", note["log"]) or note["log"].count("x") for note in rejected(journal)]
    assert [int(n[1]) if isinstance(n, re.Match) else n + 1 for n in lengths] == [300_001, 340_001, 400_001, 470_001]


# ---- Restarts and kills -------------------------------------------------------------------------------------------


def test_a_restarted_client_goes_on_where_it_stopped(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    lines = some_lines(400)
    for n in range(0, 400, 100):
        append(source, *lines[n : n + 100])
        client = follow()
        assert_delivered(lines[: n + 100], journal, backend)
        assert client.end() == 0


def test_kill_9_at_random_moments_loses_and_repeats_nothing(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path
) -> None:
    dice = random.Random(3)
    lines = some_lines(20_000, padding="p" * 40)
    for n in range(8):
        append(source, *lines[n * 2500 : (n + 1) * 2500])
        before = journal.stat().st_size if journal.exists() else 0
        client = follow(BATCH_SIZE=200)
        client.wait_for_line("journal")
        if dice.random() < 0.5:
            wait_until(lambda: journal.stat().st_size > before, what="a line", poll=0)  # noqa: B023
        threading.Event().wait(dice.uniform(0, 0.15))
        assert client.process.poll() is None
        kill(client)
    follow()
    assert_delivered(lines, journal, backend)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
def test_kill_9_between_sending_and_the_answer_sends_the_same_lines_with_the_same_ids_again(
    start: Start, fake: FakeBackend, source: Path, journal: Path, stored: bool
) -> None:
    lines = some_lines(50)
    write_lines(source, lines)
    never = threading.Event()

    def stall(request: Request) -> None:
        if stored:
            fake.store(request)
        arrived.set()
        never.wait()

    arrived = threading.Event()
    fake.answer = stall
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    assert arrived.wait(20)
    kill(client)
    first = fake.requests[0].items
    fake.answer = fake.serve
    start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    wait_until(lambda: len(fake.requests) > 1, what="the lines once more")
    assert_delivered(lines, journal, fake)
    assert fake.requests[1].items[: len(first)] == first
    never.set()


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "running"])
def test_an_answer_that_was_cut_off_after_the_commit_makes_no_copy(
    follow: Callable[..., Service], backend: Backend, source: Path, journal: Path, killed: bool
) -> None:
    lines = some_lines(300)
    write_lines(source, lines)
    with proxy_to(backend) as proxy:
        proxy.cut_next(0, 20, 150)
        client = follow(URL=proxy.data_url, BATCH_SIZE=100)
        if killed:
            wait_until(lambda: proxy.cuts >= 2, what="cut answers")
            assert len(backend.records()) >= 100  # committed, and the client does not know
            kill(client)
            client = follow(URL=proxy.data_url, BATCH_SIZE=100)
        assert_delivered(lines, journal, backend)
        wait_until(lambda: proxy.cuts == 3, what="the last cut")
        assert client.end() == 0
    assert_delivered(lines, journal, backend)


@pytest.mark.parametrize(
    "position", [None, b"", b"garbage", b"\0" * 30, b'{"acknowledged": 0}', b"[]", b'{"acknowledged": "\xff"}'], ids=str
)
def test_a_lost_stale_or_broken_position_file_makes_no_copy(
    start: Start, fake: FakeBackend, source: Path, journal: Path, position: bytes | None
) -> None:
    lines = some_lines(100)
    write_lines(source, lines[:60])
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    wait_until_acknowledged(journal)
    kill(client)
    file = journal.with_name("logs.txt.position")
    posts = len(fake.requests)
    if position is None:
        file.unlink()
    else:
        file.write_bytes(position)
    append(source, *lines[60:])
    start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    assert_delivered(lines, journal, fake)
    if position is None or b"acknowledged" not in position or b"xff" in repr(position).encode():
        assert fake.requests[posts].items[0] == fake.requests[0].items[0]  # it was sent again: the fault struck


@pytest.mark.parametrize("torn", ["192.0.2.1 GET /to", "\0" * 9 * MIB], ids=["begun", "zeros"])
def test_a_torn_end_of_the_journal_is_cut_and_never_sent(
    start: Start, fake: FakeBackend, journal: Path, torn: str
) -> None:
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, REQUEST_DELAY_LIMIT=5)
    wait_for_records(fake, 20)
    kill(client)
    append(journal, torn, end="")
    cut = len(journal.read_bytes().rpartition(b"\n")[2])  # behind a line that the kill itself may have torn
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, REQUEST_DELAY_LIMIT=5)
    client.wait_for_line(f"logs.txt.*cut off {cut % (4 * MIB)} bytes")
    wait_for_records(fake, 40)
    assert client.end() == 0
    assert_same(journal, fake.records())
    assert "/to" not in {record["log"]["uri"] for record in fake.records()}


def test_a_second_client_on_one_log_file_says_so_and_exits_1(start: Start, fake: FakeBackend, journal: Path) -> None:
    first = start("client.py", URL=fake.data_url, LOG_FILE=journal, REQUEST_DELAY_LIMIT=5)
    first.wait_for_line("journal")
    second = start("client.py", URL=fake.data_url, LOG_FILE=journal, REQUEST_DELAY_LIMIT=5)
    assert second.process.wait(20) == 1
    assert re.search(rf"LOG_FILE {re.escape(str(journal))} is in use", second.printed)
    assert len(second.printed.splitlines()) == 1
    assert first.end() == 0
    assert_same(journal, fake.records())


def test_a_number_in_log_file_gives_each_client_its_own_and_adopts_what_another_left(
    start: Start, fake: FakeBackend, tmp_path: Path
) -> None:
    journals = [tmp_path / f"logs-{n}.txt" for n in (1, 2, 3)]
    append(journals[0], "192.0.2.1 GET /leftover 200")
    settings = {"URL": fake.data_url, "LOG_FILE": tmp_path / "logs-%n.txt", "REQUEST_DELAY_LIMIT": 5}
    clients = [start("client.py", **settings) for _ in journals]
    used = {client.wait_for_line(r"journal (\S+),")[1] for client in clients}
    assert used == set(map(str, journals))
    wait_for_records(fake, 50)
    assert [client.end() for client in clients] == [0, 0, 0]
    lines = Counter(line for journal in journals for line in journal.read_text().splitlines())
    assert Counter(map(line_of, fake.records())) == lines
    assert lines["192.0.2.1 GET /leftover 200"] == 1


# ---- Outages ------------------------------------------------------------------------------------------------------


def own_lines(client: Service) -> list[str]:
    """What it said besides its first and last line and its progress."""
    return [line for line in client.printed.splitlines() if not re.search(r"journal |stopped|lines delivered \(", line)]


OUTAGES: dict[str, Answer] = {
    "503": refusal(503),
    "401": refusal(401),
    "404": refusal(404),
    "dropped": lambda _: None,
    "a proxy's 400": lambda _: Reply(400, b"<h1>Bad Request</h1>", "text/html"),
    "a portal's 200": lambda _: Reply(200, b"<h1>Welcome</h1>", "text/html"),
    "a cut answer": lambda _: Reply(201, b'{"accepted": 1, "dupl', length=500),
    "a 400 that is silent about most lines": lambda _: Reply(
        400, b'{"detail": "no", "rejected": [{"index": 0, "reason": "no"}]}', PROBLEM
    ),
    "a 400 that is no object": lambda _: Reply(400, b"[]", PROBLEM),
}


@pytest.mark.parametrize("kind", OUTAGES)
def test_an_outage_costs_no_line_and_two_lines_of_log(
    start: Start, fake: FakeBackend, source: Path, journal: Path, kind: str
) -> None:
    lines = some_lines(40)
    write_lines(source, lines)
    fake.answer = lambda request: (OUTAGES[kind] if len(fake.requests) <= 3 else fake.serve)(request)
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    assert_delivered(lines, journal, fake)
    assert client.end() == 0
    assert [len(request.items) for request in fake.requests[:3]] == [40, 40, 40]
    assert len(own_lines(client)) == 2, own_lines(client)
    assert rejected(journal) == []


def test_a_backend_that_is_not_there_costs_no_line_and_two_lines_of_log(
    start: Start, source: Path, journal: Path
) -> None:
    lines = some_lines(40)
    write_lines(source, lines)
    with fake_backend(listening=False) as fake:
        client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
        client.wait_for_line("(?i)refused")
        fake.listen()
        assert_delivered(lines, journal, fake)
        assert client.end() == 0
    assert len(own_lines(client)) == 2, own_lines(client)
    assert rejected(journal) == []


def test_retry_after_is_honoured(start: Start, fake: FakeBackend, source: Path, journal: Path) -> None:
    lines = some_lines(10)
    write_lines(source, lines)
    busy = refusal(503, Retry_After="1")
    fake.answer = lambda request: busy(request) if len(fake.requests) < 3 else fake.serve(request)
    start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    assert_delivered(lines, journal, fake)
    moments = [request.at for request in fake.requests]
    assert [later - earlier >= 1 for earlier, later in pairwise(moments[:3])] == [True, True]


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b'{"detail": "too large"}', PROBLEM), (b'{"title": "too large"}', PROBLEM), (b"<h1>too large</h1>", "text/html")],
    ids=["the backend's", "a gateway's", "a proxy's"],
)
def test_a_batch_that_is_too_large_is_sent_in_smaller_ones(
    start: Start, fake: FakeBackend, source: Path, journal: Path, body: bytes, kind: str
) -> None:
    lines = some_lines(300)
    write_lines(source, lines)
    too_large = Reply(413, body, kind)
    fake.answer = lambda request: too_large if len(request.items) > 20 else fake.serve(request)
    start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source, BATCH_SIZE=100)
    assert_delivered(lines, journal, fake)
    assert max(len(request.items) for request in fake.requests) == 100
    assert rejected(journal) == []


def test_the_api_token_is_sent(start: Start, fake: FakeBackend, journal: Path) -> None:
    start("client.py", URL=fake.data_url, LOG_FILE=journal, REQUEST_DELAY_LIMIT=5, API_TOKEN="a.b-c")
    wait_for_records(fake, 1)
    assert fake.requests[0].headers["Authorization"] == "Bearer a.b-c"


def test_a_journal_that_cannot_grow_is_waited_for_and_stays_whole(
    start: Start, fake: FakeBackend, source: Path, journal: Path
) -> None:
    lines = some_lines(2000)
    write_lines(source, lines[:100])
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    wait_for_records(fake, 100)
    full = journal.stat().st_size + 10_000
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    append(source, *lines[100:])
    client.wait_for_line("(?i)too large")
    assert journal.stat().st_size <= full
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert_delivered(lines, journal, fake)


def test_after_sigterm_what_is_in_the_journal_is_delivered(
    start: Start, fake: FakeBackend, source: Path, journal: Path
) -> None:
    write_lines(source, some_lines(3000))
    answering = threading.Event()

    def serve_later(request: Request) -> Reply:
        answering.wait()
        threading.Event().wait(0.05)  # six of these are well within the time that it has
        return fake.serve(request)

    fake.answer = serve_later
    client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
    wait_until(lambda: count_lines(journal) == 3000 and fake.requests, what="all lines in the journal, and a POST")
    client.kill(signal.SIGTERM)
    answering.set()
    assert client.process.wait(20) == 0
    client.wait_for_line("stopped; 3000 lines delivered, 0 refused, 0 bytes left")


@pytest.mark.slow
def test_300_000_lines_without_a_backend_take_little_memory_and_sigterm_says_what_is_left(
    start: Start, source: Path, journal: Path
) -> None:
    lines = some_lines(300_000)
    write_lines(source, lines)
    with fake_backend(listening=False) as fake:
        client = start("client.py", URL=fake.data_url, LOG_FILE=journal, SOURCE=source)
        size = source.stat().st_size
        wait_until(lambda: journal.exists() and journal.stat().st_size == size, 60, "all lines in the journal")
        client.wait_for_line("backend unreachable")
        peak = peak_memory_bytes(client.pid)
        assert peak < 100 * MIB, f"{peak / MIB:.0f} MiB"
        assert client.end() == 0
    client.wait_for_line(f"stopped.* {size} bytes left")
    assert journal.read_bytes() == source.read_bytes()


# ---- A backend that does not answer -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def unanswered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeBackend, Service, Path]]:
    """A client whose first POST was stored and gets no answer; its time-out passes while the other tests run."""
    folder = tmp_path_factory.mktemp("unanswered")
    write_lines(folder / "source", some_lines(40))
    with fake_backend() as fake:

        def answer(request: Request) -> Reply:
            reply = fake.serve(request)
            if len(fake.requests) == 1:
                threading.Event().wait(300)
            return reply

        fake.answer = answer
        client = Service(
            "client.py",
            folder / "out",
            URL=fake.data_url,
            LOG_FILE=str(folder / "logs.txt"),
            SOURCE=str(folder / "source"),
        )
        yield fake, client, folder / "logs.txt"
        client.destroy()


def test_an_answer_that_never_comes_is_not_waited_for_beyond_the_time_out(
    unanswered: tuple[FakeBackend, Service, Path],
) -> None:
    fake, client, journal = unanswered
    wait_until(lambda: len(fake.requests) >= 2, 60, f"a second attempt; it printed:\n{client.printed}")
    assert fake.requests[1].items[0] == fake.requests[0].items[0]
    assert_delivered(some_lines(40), journal, fake)
    wait_until_acknowledged(journal)
    assert client.end() == 0
    assert rejected(journal) == []
