"""`client.py replay`: what the database lost and a journal still has is stored again, under its own id, and once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from fakes import JSON, NDJSON, PROBLEM, Answer, FakeBackend, Reply, Request, fake_backend, some_lines, stored
from harness import ROOT, Backend, Service, clean_environment, driver, execute, journal_ids, line_of
from test_delivery import conflicts
from waiting import wait_until

import client

Start = Callable[..., Service]
DAY = 86400
NOW = 1_780_000_000  # any time
ONE = "192.0.2.1 GET /always/the/same 200"


def run(script: str, *arguments: str, lines: Sequence[str] = (), **settings: Any) -> tuple[int, str, str]:
    """Exit status, what was printed, what was logged. The lines are in a file: a pipe would cut them into pieces."""
    with TemporaryFile("w+") as given:
        given.write("".join(f"{line}\n" for line in lines))
        given.seek(0)
        done = subprocess.run(
            [sys.executable, "-I", "-S", script, *map(str, arguments)], env=clean_environment(settings),
            stdin=given, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def replay(url: str, *paths: Any, **settings: Any) -> tuple[int, str]:
    """Exit status, and what was printed; a client's log has nothing."""
    status, printed, logged = run(str(ROOT / "client.py"), "replay", *paths, URL=url, **settings)
    assert logged == ""
    return status, printed


def deliver(url: str, journal: Path, lines: Sequence[str], **settings: Any) -> None:
    """A client's whole life, from its start to its end, when all is delivered."""
    wanted = {"URL": url, "LOG_FILE": journal, "SOURCE": "-", **settings}
    status, _, logged = run(str(ROOT / "client.py"), lines=lines, **wanted)
    assert status == 0, logged


def rotate(url: str, journal: Path, lines: Sequence[str]) -> None:
    """All are delivered, and then the journal is renamed."""
    deliver(url, journal, lines, ROTATE_BYTES=0)
    ours = client.open_journal(str(journal), client.Settings(rotate_bytes=65536))
    ours.rotate_if_due()
    os.close(ours._file)
    assert journal.stat().st_size == 0


def state_of(journal: Path) -> dict[str, Any]:
    return dict(json.loads(Path(f"{journal}.journal").read_text()))


def change_state(journal: Path, **values: Any) -> None:
    Path(f"{journal}.journal").write_text(json.dumps(state_of(journal) | values))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each file that belongs to a journal with its content and the time of its last change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("logs.txt*")}


def sent(fake: FakeBackend) -> list[dict[str, str]]:
    """All lines of all POSTs, as often as they came."""
    return [item for request in fake.requests if request.method == "POST" for item in request.items]


def knowing(fake: FakeBackend, kept_from: float = 0.0) -> Answer:
    """Stores as the real one does, is ready, and says what retention has deleted."""
    store = conflicts(fake)
    moment = datetime.fromtimestamp(kept_from, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    gone = json.dumps({"title": "Gone", "status": 410, "detail": "deleted", "kept_from": moment}).encode()

    def answer(request: Request) -> Reply | None:
        if request.method == "POST":
            return store(request)
        if "date_from" not in request.query:
            return Reply(200, b'{"ready": true}', JSON)
        return Reply(410, gone, PROBLEM) if kept_from else Reply(200, b"", NDJSON)

    return answer


@pytest.fixture
def ready(fake: FakeBackend) -> FakeBackend:
    fake.answer = knowing(fake)
    return fake


# ---- What is sent ---------------------------------------------------------------------------------------------------


def test_what_the_database_lost_is_stored_again_under_the_same_ids(backend: Backend, journal: Path) -> None:
    """Of three parts, the first of two starts, the database has the beginning, and some of the end."""
    lines = some_lines(8000)
    deliver(backend.data_url, journal, lines[:2000])
    rotate(backend.data_url, journal, lines[2000:4000])
    rotate(backend.data_url, journal, lines[4000:7000])
    deliver(backend.data_url, journal, lines[7000:])
    before = {record["id"]: line_of(record) for record in backend.records()}
    assert sorted(before.values()) == sorted(lines)
    assert before.items() >= journal_ids(journal).items()
    files = contents(journal.parent)
    order = "SELECT id FROM logs ORDER BY created LIMIT %s OFFSET %s"
    execute(backend.database_url, f"DELETE FROM logs WHERE id IN ({order})", 6500, 1000)
    status, printed = replay(backend.data_url, journal)
    assert printed.splitlines()[-1] == "done: 6500 lines stored, 1500 were there already, 0 refused"
    assert status == 0
    assert {record["id"]: line_of(record) for record in backend.records()} == before
    assert contents(journal.parent) == files
    status, printed = replay(backend.data_url, journal, f"{journal}.2", BATCH_SIZE=10_000)
    assert (status, printed.splitlines()[-1]) == (0, "done: 0 lines stored, 8000 were there already, 0 refused")
    execute(backend.database_url, "INSERT INTO retention (kept_from) VALUES (now())")
    status, printed = replay(backend.data_url, journal)
    assert (status, printed.splitlines()[-1]) == (1, "cannot replay: there is nothing to send")
    assert f"left out: 1000 lines of {journal} that retention may have deleted" in printed
    change_state(journal, times=[[0, int(datetime.now(UTC).timestamp())]])
    execute(backend.database_url, "UPDATE retention SET kept_from = now() - interval '1 day'")
    status, printed = replay(backend.data_url, journal)
    assert status == 0
    assert re.search("done: 0 lines stored, [0-9]{4} were there already, 0 refused\n$", printed)


def test_a_renamed_part_is_known_by_its_content(ready: FakeBackend, journal: Path, tmp_path: Path) -> None:
    rotate(ready.data_url, journal, some_lines(3000))
    rotate(ready.data_url, journal, some_lines(3000, "b"))
    wanted = ready.stored
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(f"{journal}.journal", elsewhere)
    shutil.copy(f"{journal}.1", elsewhere / "logs.txt.7")
    shutil.copy(f"{journal}.2", elsewhere / "logs.txt.2")
    ready.stored = {}
    for name in ("logs.txt.7", "logs.txt.2"):
        status, printed = replay(ready.data_url, elsewhere / name)
        assert (status, printed.splitlines()[-1][:23]) == (0, "done: 3000 lines stored")
    assert {name: line_of(record) for name, record in ready.stored.items()} == {
        name: line_of(record) for name, record in wanted.items()
    }


def test_of_two_equal_parts_both_are_sent(ready: FakeBackend, journal: Path) -> None:
    for _ in range(2):
        rotate(ready.data_url, journal, [ONE] * 2000)
    assert Path(f"{journal}.1").read_bytes() == Path(f"{journal}.2").read_bytes()
    wanted = set(ready.stored)
    assert len(wanted) == 4000
    ready.stored = {}
    assert replay(ready.data_url, journal)[0] == 0
    assert set(ready.stored) == wanted


def test_what_a_client_has_not_delivered_is_left_to_it(ready: FakeBackend, journal: Path) -> None:
    """It may yet be cut off, and read again under another id."""
    deliver(ready.data_url, journal, some_lines(10))
    with journal.open("a") as file:
        file.write("192.0.2.1 GET /whole 200\n192.0.2.1 GET /torn")
    ready.requests.clear()
    status, printed = replay(ready.data_url, journal)
    assert status == 0
    assert f"left out: 44 bytes of {journal} that its client has not delivered yet" in printed
    assert [item["log"] for item in sent(ready)] == some_lines(10)


def test_a_position_that_is_ahead_of_the_durable_one_counts(ready: FakeBackend, journal: Path) -> None:
    """The client that was killed does not send these lines again."""
    deliver(ready.data_url, journal, some_lines(10))
    change_state(journal, acknowledged=0)
    ready.requests.clear()
    assert replay(ready.data_url, journal)[0] == 0
    assert [item["log"] for item in sent(ready)] == some_lines(10)


def test_what_the_backend_refuses_is_counted_and_its_reason_told(ready: FakeBackend, journal: Path) -> None:
    deliver(ready.data_url, journal, some_lines(10))
    fifth = list(ready.stored)[5]
    ready.stored[fifth]["log"]["uri"] = "/other"
    status, printed, logged = run(str(ROOT / "client.py"), "replay", str(journal), URL=ready.data_url)
    assert (status, printed.splitlines()[-1]) == (0, "done: 0 lines stored, 9 were there already, 1 refused")
    [line] = logged.splitlines()
    offset = sum(len(line) + 1 for line in some_lines(5))
    assert line.endswith(
        f"ERROR client: the backend refuses the line at byte {offset} of the journal: This id belongs to another line.;"
        " such lines are counted"
    ) or re.search(
        f"the line at byte {offset} of the journal: This id belongs to another line.; such lines are counted", line
    )


# ---- Beside a client ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_works_beside_a_client_that_rotates_all_the_time(
    ready: FakeBackend, start: Start, journal: Path, tmp_path: Path
) -> None:
    """Records are lost again and again; in the end each line is there once, under its id."""
    source = tmp_path / "source"
    source.touch()
    shipper = start(
        "client.py", URL=ready.data_url, LOG_FILE=journal, SOURCE=source, ROTATE_BYTES=65536, KEEP_FILES=999
    )
    everything: dict[str, str] = {}
    for n in range(25):
        lines = some_lines(1500, f"part{n}")
        with source.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
        if n % 6 == 3:
            wait_until(lambda: len(ready.stored) > 1000, what="some records")
            known = {name: line_of(record) for name, record in list(ready.stored.items())}
            everything |= known
            for name in list(known)[::2]:
                del ready.stored[name]
            status, printed = replay(ready.data_url, journal)
            assert status == 0, printed
    wait_until(lambda: client_is_done(journal, source), what="delivery")
    assert shipper.end() == 0
    everything |= {name: line_of(record) for name, record in ready.stored.items()}
    assert replay(ready.data_url, journal)[0] == 0
    assert {name: line_of(record) for name, record in ready.stored.items()} == everything
    assert sorted(everything.values()) == sorted(source.read_text().splitlines())
    assert state_of(journal)["part"] > 5


def client_is_done(journal: Path, source: Path) -> bool:
    size = 0
    for part in (journal, *journal.parent.glob(f"{journal.name}.[0-9]*")):
        with suppress(FileNotFoundError):  # renamed meanwhile: then it is not all of it
            size += part.stat().st_size
    return size == source.stat().st_size


def delivered(path: Path, lines: Sequence[str]) -> client.Journal:
    """A journal of this process, as a client has it."""
    journal = client.open_journal(str(path), client.Settings(rotate_bytes=65536))
    journal.append([line.encode() for line in lines])
    journal.acknowledge(journal.pending(len(lines)))
    journal.make_durable(at_once=True)
    return journal


def test_a_rotation_right_after_the_files_were_opened_changes_nothing(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, open_files = delivered(journal, [ONE] * 2000), client.open_files

    def opened(*arguments: Any) -> Any:
        result = open_files(*arguments)
        ours.rotate_if_due()
        return result

    monkeypatch.setattr(client, "open_files", opened)
    [one], complete = client.find_files(str(journal), client.NOTHING_DELETED, 0.0)
    assert complete
    assert Path(f"{journal}.1").exists()
    assert len(client.Replay([one]).pending(3000)) == 2000


@pytest.mark.parametrize("kind", ["renamed", "emptied", "renamed and emptied", "neither"])
def test_a_journal_that_is_emptied_meanwhile_ends_it(journal: Path, kind: str) -> None:
    """A full disk makes the client do so: what is in the same place later has other ids."""
    ours = delivered(journal, [ONE] * 2000)
    [one], complete = client.find_files(str(journal), client.NOTHING_DELETED, 0.0)
    assert complete
    running = client.Replay([one])
    before = running.pending(10)
    if "renamed" in kind:
        ours.rotate_if_due()
        assert Path(f"{journal}.1").exists()
    if "emptied" in kind:
        if "renamed" in kind:
            ours.append([ONE.encode()] * 2000)
            ours.acknowledge(ours.pending(2000))
        while ours._make_room():
            pass
    ours.append([b"192.0.2.1 GET /of/anoth/er/part 200"] * 3000)
    if kind == "emptied":
        with pytest.raises(client.Failed, match="was emptied, cut or removed"):
            running.pending(10)
    else:
        assert running.pending(10) == before


class Killed(BaseException):
    """In place of a kill -9."""


@pytest.mark.parametrize("step", range(1, 9))
def test_wherever_a_rotation_is_killed_the_ids_stay_known(
    journal: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also those of the part before, which is renamed with it."""
    wanted: dict[str, bytes] = {}
    for n in range(2):
        ours = delivered(journal, [f"192.0.2.{n} GET /part/{n} 200"] * 3000)
        wanted |= dict(client.lines_with_ids(ours._file, 0, ours.size, ours.state.spans, 3000))
        if n == 0:
            ours.rotate_if_due()
            os.close(ours._file)
    steps = iter(range(1, 99))

    def killed(real: Callable[..., Any], *arguments: Any) -> Any:
        if next(steps) == step:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as deadly:
        for name in ("replace", "link", "unlink"):
            deadly.setattr(os, name, partial(killed, getattr(os, name)))
        with suppress(Killed, FileNotFoundError):
            ours.rotate_if_due()
    assert (next(steps) > step) == (step <= 7)
    os.close(ours._file)
    os.close(delivered(journal, ["192.0.2.9 GET /after 200"])._file)
    found: dict[str, bytes] = {}
    files, complete = client.find_files(str(journal), client.NOTHING_DELETED, 0.0)
    assert complete
    for one in files:
        found |= dict(client.lines_with_ids(one.file, one.start, one.end, one.spans, 4000))
    assert len(wanted) == 6000
    assert found.items() >= wanted.items()
    assert len(found) == 6001


def test_a_rotation_that_failed_before_the_disk_was_full_is_no_renamed_part(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = delivered(journal, [ONE] * 2000)
    [one], _ = client.find_files(str(journal), client.NOTHING_DELETED, 0.0)
    running = client.Replay([one])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "link", full)
        ours.rotate_if_due()
    assert len(state_of(journal)["rotated"]) == 1
    assert running.pending(10)
    assert ours._make_room()
    assert state_of(journal)["rotated"] == []
    ours.append([b"192.0.2.1 GET /of/anoth/er/part 200"] * 3000)
    with pytest.raises(client.Failed, match="was emptied, cut or removed"):
        running.pending(10)


# ---- Retention ------------------------------------------------------------------------------------------------------


def test_where_retention_deletes_only_what_was_appended_since_is_sent(fake: FakeBackend, journal: Path) -> None:
    fake.answer = knowing(fake)
    lines = some_lines(30)
    deliver(fake.data_url, journal, lines)
    offsets = [sum(len(line) + 1 for line in lines[:n]) for n in (10, 20)]
    now = int(datetime.now(UTC).timestamp())
    change_state(journal, times=[[0, now - 30 * DAY], [offsets[0], now - 20 * DAY], [offsets[1], now - 9 * DAY]])
    fake.answer = knowing(fake, now - 10 * DAY)
    for options, first in [((), 20), (("--all",), 0)]:
        fake.requests.clear()
        status, printed = replay(fake.data_url, *options, journal)
        assert status == 0
        assert [item["log"] for item in sent(fake)] == lines[first:]
        assert (f"left out: 20 lines of {journal} that retention may have deleted" in printed) == (first > 0)
    before = len(fake.requests)
    for late in (now - 9 * DAY, now):
        fake.answer = knowing(fake, late)
        status, printed = replay(fake.data_url, journal)
        assert (status, printed.splitlines()[-1]) == (1, "cannot replay: there is nothing to send")
        assert f"left out: 30 lines of {journal} that retention may have deleted; --all" in printed
    assert all(request.method == "GET" or request.items == [] for request in fake.requests[before:])


HOUR = 3600
AGES: dict[str, tuple[list[client.Times], float, list[int]]] = {
    "no times": ([(), ()], NOW - DAY, [sys.maxsize, sys.maxsize]),
    "all later": ([((0, NOW - 2 * DAY),), ((0, NOW - DAY),)], NOW - 3 * DAY, [0, 0]),
    "some": ([((0, NOW - 9 * DAY), (7, NOW - 2 * DAY)), ((0, NOW - DAY),)], NOW - 3 * DAY, [7, 0]),
    "too close": ([((0, NOW - 9 * DAY), (7, NOW - DAY)), ((5, NOW),)], NOW - DAY - 5 * HOUR, [sys.maxsize, 5]),
    "a clock that was ahead": (
        [((0, NOW + 9 * DAY),), ((3, NOW - 5 * DAY), (9, NOW))],
        NOW - 3 * DAY,
        [sys.maxsize, 9],
    ),
    "a clock that was ahead last": ([((0, NOW - 9 * DAY), (4, NOW + 9 * DAY))], NOW - 3 * DAY, [sys.maxsize]),
    "two clocks": ([((0, NOW - 30), (4, NOW + 30))], NOW - 3 * DAY, [0]),
    "a clock that was set back": ([((0, NOW + 9 * DAY),)], NOW, [sys.maxsize]),
}


@pytest.mark.parametrize("kind", AGES)
def test_a_line_counts_as_younger_only_as_far_as_clocks_can_be_believed(kind: str) -> None:
    times, kept_from, wanted = AGES[kind]
    assert client.younger_from(times, kept_from, NOW) == wanted
    assert client.younger_from(times, client.NOTHING_DELETED, NOW) == [0] * len(times)


def test_the_journal_notes_what_time_it_was_before_its_lines(ready: FakeBackend, journal: Path) -> None:
    """Only of lines that come after an answer it is known that they are younger."""
    began = int(datetime.now(UTC).timestamp())
    deliver(ready.data_url, journal, some_lines(1000))
    [[offset, seconds]] = state_of(journal)["times"]
    assert offset == journal.stat().st_size
    assert began <= seconds <= datetime.now(UTC).timestamp()
    change_state(journal, times=[[5, 1], [offset, 2], [offset + 1, 3]])  # the last one is of bytes that a crash took
    rotate(ready.data_url, journal, some_lines(2000, "b"))
    [part] = state_of(journal)["rotated"]
    assert [time for time in part[3] if time[1] < began] == [[5, 1], [offset, 2]]
    assert state_of(journal)["times"] == [[0, part[3][-1][1]]]


def test_times_become_fewer_and_keep_the_newest(journal: Path) -> None:
    ours = client.open_journal(str(journal))
    for n in range(3 * client.TIMES):
        ours.append([ONE.encode()])
        ours.note_time(n)
    times = ours.state.times
    assert len(times) <= client.TIMES
    assert times[-1] == (journal.stat().st_size, 3 * client.TIMES - 1)
    assert all(offset == (seconds + 1) * (len(ONE) + 1) for offset, seconds in times)


def test_when_retention_goes_on_it_stops(fake: FakeBackend, journal: Path, tmp_path: Path) -> None:
    fake.answer = knowing(fake)
    deliver(fake.data_url, journal, some_lines(30))
    fake.requests.clear()
    before, after = knowing(fake), knowing(fake, NOW)
    fake.answer = lambda request: (before if len(sent(fake)) < 10 else after)(request)
    program = f"import client\nclient.KEPT_SECONDS = 0\nsys.exit(client.main(['replay', {str(journal)!r}]))\n"
    status, printed, _ = run(driver(tmp_path, "eager.py", program), URL=fake.data_url, BATCH_SIZE=10)
    assert status == 1
    assert printed.splitlines()[-1] == "cannot replay: retention has deleted more since this began: run it again"
    assert len(sent(fake)) == 10


# ---- What cannot be replayed ----------------------------------------------------------------------------------------


def missing(journal: Path) -> Path:
    Path(f"{journal}.journal").unlink()
    return journal


def foreign(journal: Path) -> Path:
    other = journal.with_name("notes.txt")
    other.write_text("my notes\n")
    return other


def nowhere(journal: Path) -> Path:
    return journal.with_name("nowhere.txt")


def folder(journal: Path) -> Path:
    return journal.parent


def companion(journal: Path) -> Path:
    return Path(f"{journal}.journal")


def spoilt(journal: Path) -> Path:
    Path(f"{journal}.journal").write_text("{")
    return journal


def replaced(journal: Path) -> Path:
    journal.write_bytes(journal.read_bytes().replace(b"/a/", b"/b/"))
    return journal


def shortened(journal: Path) -> Path:
    journal.write_bytes(journal.read_bytes()[:-100])
    return journal


def edited(journal: Path) -> Path:
    journal.write_bytes(journal.read_bytes()[:300] + b"12345" + journal.read_bytes()[300:])
    return journal


def edited_part(journal: Path) -> Path:
    part = Path(f"{journal}.1")
    part.write_bytes(part.read_bytes().replace(b"/old/5 ", b"/old/6 "))
    return part


def part_of_an_older_version(journal: Path) -> Path:
    change_state(journal, rotated=[])
    return Path(f"{journal}.1")


FILES: dict[Callable[[Path], Path], str] = {
    missing: "cannot replay: .*logs.txt.journal is missing, but .*logs.txt.position is there",
    foreign: "cannot replay: .*notes.txt is no journal, or .*notes.txt.journal is missing, which has the ids",
    nowhere: "cannot replay: .*No such file or directory: '.*nowhere.txt'",
    folder: "cannot replay: .*not a regular file",
    companion: "cannot replay: .*logs.txt.journal is no journal",
    spoilt: "cannot replay: .*logs.txt.journal cannot be read",
    replaced: "left out: .*logs.txt, whose ids .*logs.txt.journal does not have",
    shortened: "left out: .*logs.txt, whose ids .*logs.txt.journal does not have",
    edited: "cannot replay: no line of .*logs.txt ends at byte [0-9]+, as its .journal says: it was edited",
    edited_part: "left out: .*logs.txt.1, whose ids .*logs.txt.journal does not have",
    part_of_an_older_version: "left out: .*logs.txt.1, whose ids .*.journal does not have: it was renamed by an older",
}


@pytest.fixture(scope="module")
def delivered_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal with one renamed part, which tests copy."""
    journal = tmp_path_factory.mktemp("delivered") / "logs.txt"
    with fake_backend() as fake:
        rotate(fake.data_url, journal, some_lines(3000, "old"))
        deliver(fake.data_url, journal, some_lines(100))
    return journal


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str, Path], str]:
    """What a replay in this process says, which comes to nothing."""

    def refused_here(url: str, path: Path) -> str:
        assert client.replay(client.Settings(url=url), [str(path)], everything=False) == 1
        return capsys.readouterr().out

    return refused_here


@pytest.mark.parametrize("spoil", FILES)
def test_a_file_that_is_no_journal_is_one_line_and_nothing_is_sent(
    ready: FakeBackend,
    delivered_once: Path,
    tmp_path: Path,
    refused: Callable[[str, Path], str],
    spoil: Callable[[Path], Path],
) -> None:
    shutil.copytree(delivered_once.parent, tmp_path / "copy")
    path = spoil(tmp_path / "copy/logs.txt")
    if path.name == "logs.txt":
        for part in path.parent.glob("*.1"):
            part.unlink()
    printed = refused(ready.data_url, path)
    assert re.match(FILES[spoil], printed)
    assert printed.count("\n") == (2 if printed.startswith("left out") else 1)
    assert printed.splitlines()[-1].startswith("cannot replay: ")
    assert sent(ready) == []


def test_a_part_whose_ids_are_unknown_is_told_and_the_others_are_sent(
    ready: FakeBackend, delivered_once: Path, tmp_path: Path
) -> None:
    shutil.copytree(delivered_once.parent, tmp_path / "copy")
    journal = tmp_path / "copy/logs.txt"
    edited_part(journal)
    status, printed = replay(ready.data_url, journal)
    assert status == 1
    assert printed.splitlines()[0].startswith(f"left out: {journal}.1, whose ids")
    assert printed.splitlines()[-1] == "done: 100 lines stored, 0 were there already, 0 refused"
    assert [item["log"] for item in sent(ready)] == some_lines(100)


def test_lines_of_starts_that_are_forgotten_are_told(ready: FakeBackend, delivered_once: Path, tmp_path: Path) -> None:
    shutil.copytree(delivered_once.parent, tmp_path / "copy")
    journal = tmp_path / "copy/logs.txt"
    Path(f"{journal}.1").unlink()
    [[_, identity], *rest] = state_of(journal)["spans"]
    change_state(journal, spans=[[sum(len(line) + 1 for line in some_lines(40)), identity], *rest])
    status, printed = replay(ready.data_url, journal)
    assert status == 1
    assert printed.startswith(f"left out: 40 lines of {journal} from before the last 1,000 starts")
    assert [item["log"] for item in sent(ready)] == some_lines(100)[40:]


ANSWERS: dict[str, tuple[Answer, str]] = {
    "a wrong token": (lambda _: Reply(401, b'{"detail": "no token"}', PROBLEM), "answer 401.*set API_TOKEN"),
    "another server": (lambda _: Reply(404, b"nothing", "text/html"), "answer 404.*correct URL"),
    "a connection that is cut": (lambda _: None, "unreachable: .*: start it, or correct URL"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_backend_that_does_not_take_lines_is_one_line(
    fake: FakeBackend, delivered_once: Path, refused: Callable[[str, Path], str], kind: str
) -> None:
    fake.answer, wanted = ANSWERS[kind]
    printed = refused(fake.data_url, delivered_once)
    assert re.fullmatch(f"cannot replay: .*{wanted}.*\n", printed), printed
    assert sent(fake) == []


def test_where_it_cannot_ask_what_retention_deleted_it_says_how_to_go_on(
    ready: FakeBackend, delivered_once: Path
) -> None:
    able = ready.answer
    ready.answer = lambda one: Reply(403, b"<h1>POST only</h1>", "text/html") if "date_from" in one.query else able(one)
    status, printed = replay(ready.data_url, delivered_once)
    assert status == 1
    assert printed == (
        "cannot replay: it is not known what retention has deleted: answer 403 to a GET: <h1>POST only</h1>;"
        " if nothing, use --all\n"
    )
    assert sent(ready) == []
    assert replay(ready.data_url, "--all", delivered_once)[0] == 0


@pytest.mark.parametrize("arguments", [["replay"], ["replay", "--all"], ["replay", "--al", "x"], ["replays", "x"]])
def test_replay_without_a_journal_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(arguments) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch("client: unknown arguments '.*'; known are replay .*\n", printed)


# ---- What goes wrong meanwhile --------------------------------------------------------------------------------------


def test_an_outage_is_waited_for_and_ctrl_c_ends_it(
    ready: FakeBackend, start: Start, delivered_once: Path, tmp_path: Path
) -> None:
    able, away = ready.answer, True
    ready.answer = lambda one: None if away and one.method == "POST" and one.items else able(one)
    program = f"import client\nsys.exit(client.main(['replay', {str(delivered_once)!r}]))\n"
    path = driver(tmp_path, "replaying.py", program)
    first, second = (start(path, URL=ready.data_url) for _ in range(2))
    for one in (first, second):
        one.wait_for_line("backend unreachable: .*; retrying")
    first.kill(signal.SIGINT)
    assert first.process.wait(20) == -signal.SIGINT
    assert "Traceback" not in first.printed
    away = False
    assert second.process.wait(40) == 0
    assert re.search("backend back after.*\n.*done: 3100 lines stored", second.printed, re.DOTALL)


def test_a_line_that_a_firewall_refuses_does_not_hold_up_the_others(ready: FakeBackend, journal: Path) -> None:
    lines = some_lines(20)
    deliver(ready.data_url, journal, lines)
    ready.stored, able = {}, ready.answer
    ready.answer = lambda one: Reply(403, b"no", "text/html") if lines[7].encode() in one.body else able(one)
    status, printed, logged = run(str(ROOT / "client.py"), "replay", str(journal), URL=ready.data_url)
    assert status == 1
    assert printed.splitlines()[-2:] == [
        "done: 19 lines stored, 0 were there already, 0 refused",
        "1 lines were refused on the way to the backend: run this again once that is mended",
    ]
    assert "is refused on the way" in logged
    assert sorted(stored(ready)) == sorted(lines[:7] + lines[8:])
