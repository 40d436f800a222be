"""Only the true successor of the file's last record is appended; what cannot be mended exactly stops and is told."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fakes import NDJSON, FakeBackend, Reply, Request, fake_backend, post_lines, proxy_to, some_lines
from harness import ROOT, Backend, Service, clean_environment, count_lines, driver, held, kill, read_records
from waiting import wait_until

import background

Start = Callable[..., Service]
OLDER = "older"
REFUSED = r"WARNING background\[\d+\]: database diverged: .*nothing is appended"

# The same service, but for how often it says what it says again and again
IMPATIENT = """
import background

background.REMIND_SECONDS = 0.2
background.PROGRESS_SECONDS = 0.2
sys.exit(background.main([]))
"""


@pytest.fixture
def export(start: Start, shared: Path, tmp_path: Path) -> Callable[..., Service]:
    """Starts an instance that polls quickly: export(url), or one of version 0.1.0: export(url, OLDER)."""
    settings = {"DIRECTORY": shared.parent, "REQUEST_DELAY": 20}
    older = tmp_path / "exporter_0_1_0.py"
    shutil.copy(ROOT / "tests" / "data" / older.name, older)
    return lambda url, script="background.py": start(str(older) if script == OLDER else script, URL=url, **settings)


def exported(records: list[dict[str, Any]], *files: Path) -> bool:
    wait_until(lambda: count_lines(*files) >= len(records), 40, f"{len(records)} records in {files}", poll=0.05)
    assert read_records(*files) == records
    return True


def verify(url: str, shared: Path, *window: str, **settings: int) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "background.py"), "verify", *window],
        env=clean_environment({"URL": url, "DIRECTORY": str(shared.parent), **settings}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr, done.stderr
    return done.stdout


def assert_nothing_is_appended(fake: FakeBackend, shared: Path, content: bytes) -> None:
    """Through a number of further requests."""
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 3, what="further requests")
    assert shared.read_bytes() == content


# ---- The database is not the one that the file was written from -----------------------------------------------------


def test_a_restored_database_is_told_and_nothing_is_appended(
    export: Callable[..., Service], backend: Backend, shared: Path
) -> None:
    post_lines(backend, some_lines(67))
    exporter = export(backend.data_url)
    exported(backend.records(), shared)
    content = shared.read_bytes()
    with psycopg.connect(backend.database_url) as connection:
        connection.execute(
            "DELETE FROM logs WHERE created > (SELECT created FROM logs ORDER BY created OFFSET 19 LIMIT 1)"
        )
    last = json.loads(content.splitlines()[-1])
    exporter.wait_for_line(REFUSED)
    line = next(line for line in exporter.printed.splitlines() if "nothing is appended" in line)
    for word in (str(shared), last["id"], last["created"], "reconcile", "begin anew", "nothing from then on"):
        assert word in line
    post_lines(backend, some_lines(47, "acknowledged"))
    again = export(backend.data_url)  # also who comes new says it
    again.wait_for_line(f"{REFUSED}.*reconcile")
    assert shared.read_bytes() == content
    assert "not equal" in verify(backend.data_url, shared)
    assert [exporter.end(), again.end()] == [0, 0]


@pytest.mark.parametrize("kind", ["behind", "its clock behind", "another one", "empty"])
def test_a_database_that_lacks_the_last_record_is_told_and_when_it_is_back_exporting_goes_on(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, kind: str
) -> None:
    fake.add(some_lines(60))
    exporter = export(fake.data_url)
    exported(fake.records(), shared)
    content, right = shared.read_bytes(), dict(fake.stored)
    left = dict(list(right.items())[: {"behind": 40, "its clock behind": 40}.get(kind, 0)])
    if kind == "its clock behind":  # other records, of the same times
        left |= {
            name: right[key] | {"id": name} for key in list(right)[40:] for name in [f"{key[:-3]}fff"[:36] + key[-3:]]
        }
    elif kind == "another one":
        left = {f"{n}": record | {"id": f"x{n}"} for n, record in enumerate(right.values())}
    fake.stored = left  # at once: what is found between two changes would be told, too
    exporter.wait_for_line(REFUSED)
    assert_nothing_is_appended(fake, shared, content)
    assert len(re.findall("nothing is appended", exporter.printed)) == 1
    fake.stored = right
    fake.add(some_lines(20, "more"))
    exported(fake.records(), shared)
    exporter.wait_for_line("database back after")


def test_what_is_out_of_order_is_said_again_from_time_to_time(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(5))
    exporter = export(fake.data_url, driver(tmp_path, "impatient.py", IMPATIENT))
    exported(fake.records(), shared)
    fake.stored.clear()
    wait_until(lambda: exporter.printed.count("nothing is appended") >= 3, what="three reminders")


def test_two_databases_on_one_file_by_mistake_the_second_appends_nothing_and_says_so(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    with fake_backend() as other:
        fake.add(some_lines(200, "one"))
        export(fake.data_url)
        exported(fake.records(), shared)
        other.stored = {f"o{n}": record | {"id": f"o{n}"} for n, record in enumerate(fake.records())}
        stranger = export(other.data_url)
        stranger.wait_for_line(REFUSED)
        for n in range(10):
            other.add(some_lines(20, f"other{n}"))
            fake.add(some_lines(20, f"one{n}"))
        exported(fake.records(), shared)
        assert stranger.end() == 0
        stranger.wait_for_line("stopped; 0 records written")


def test_memory_that_a_restored_database_no_longer_knows_is_not_appended(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(100))
    export(fake.data_url)
    exported(fake.records(), shared)
    with held(shared.with_name("data.txt.lock")):
        fake.add(some_lines(50, "lost"))
        cursor = fake.records()[-1]["created"]
        wait_until(lambda: fake.requests[-1].query["date_from"] == cursor, what="the records in its memory")
        known = len(fake.requests)
        fake.stored = dict(list(fake.stored.items())[:110])
        wait_until(lambda: len(fake.requests) > known + 2, what="a request that finds them gone")
    fake.stored |= {f"n{n}": {**fake.records()[0], "id": f"n{n}", "created": created(110 + n)} for n in range(30)}
    exported(fake.records(), shared)


def created(microseconds: int) -> str:
    return f"2026-01-01T00:00:00.{microseconds:06}Z"


# ---- The file is not the one that was written -----------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_shortened_file_is_told_and_filled_up_again(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, running: bool
) -> None:
    fake.add(some_lines(100))
    exporter = export(fake.data_url)
    exported(fake.records(), shared)
    wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
    if not running:
        assert exporter.end() == 0
    os.truncate(shared, len(b"".join(shared.read_bytes().splitlines(keepends=True)[:30])))
    fake.add(some_lines(10, "more"))
    exporter = exporter if running else export(fake.data_url)
    exported(fake.records(), shared)
    exporter.wait_for_line("data.txt ends in .* and was written up to .*: it was shortened")


BROKEN = r"WARNING background\[\d+\]: shared file cannot be written: .*data.txt"
NO_END = f"{BROKEN} does not end in a record"
NO_RECORDS = f"{BROKEN}: not all of its last lines are records in order"
TOLD = {
    "edited": REFUSED,
    "another one's": REFUSED,
    "with a record too many": REFUSED,
    "with a member more": REFUSED,
    "with its members in another order": NO_RECORDS,
    "with a blank line": NO_RECORDS,
    "with Windows line ends": NO_END,
    "edited in the middle": NO_RECORDS,
    "with two lines swapped": NO_RECORDS,
}


@pytest.mark.parametrize("kind", TOLD)
def test_a_file_whose_last_record_is_not_the_databases_is_told_and_not_touched(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, kind: str
) -> None:
    fake.add(some_lines(100))
    assert export_and_end(fake, export, shared) == 0
    good = shared.read_bytes()
    lines = good.splitlines(keepends=True)
    bad = {
        "edited": good.replace(b'"/a/99"', b'"/a/98"'),
        "another one's": good.replace(b'"id":"0000', b'"id":"1111'),
        "with a record too many": good + lines[-1].replace(b"000099Z", b"000105Z"),
        "with a member more": good[:-3] + b',"bytes":5}}\n',
        "with its members in another order": good[: -len(lines[-1])] + b'{"log":{},' + lines[-1][1:],
        "with a blank line": good + b"\n",
        "with Windows line ends": good.replace(b"\n", b"\r\n"),
        "edited in the middle": good.replace(lines[50], b"a note\n"),
        "with two lines swapped": b"".join([*lines[:50], lines[51], lines[50], *lines[52:]]),
    }[kind]
    replacement = shared.with_name("replacement")
    replacement.write_bytes(bad)
    replacement.replace(shared)
    fake.add(some_lines(50, "more"))
    exporter = export(fake.data_url)
    exporter.wait_for_line(TOLD[kind])
    assert_nothing_is_appended(fake, shared, bad)
    assert "equal: 100" not in verify(fake.data_url, shared)
    with held(shared.with_name("data.txt.lock")):  # nobody takes it for whole while it is written
        shared.write_bytes(good)
    exported(fake.records(), shared)


def export_and_end(fake: FakeBackend, export: Callable[..., Service], *files: Path) -> int:
    exporter = export(fake.data_url)
    exported(fake.records(), *files)
    return exporter.end()


def test_an_emptied_file_is_told_and_goes_on_when_it_is_removed(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(100))
    exporter = export(fake.data_url)
    exported(fake.records(), shared)
    wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
    before = tmp_path / "before"
    before.write_bytes(shared.read_bytes())
    os.truncate(shared, 0)
    fake.add(some_lines(10, "more"))
    exporter.wait_for_line("shared file cannot be written: .*data.txt was emptied")
    assert_nothing_is_appended(fake, shared, b"")
    shared.unlink()
    exported(fake.records(), before, shared)


def test_a_folder_in_place_of_the_file_is_told_and_waited_for(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    shared.mkdir()
    fake.add(some_lines(20))
    exporter = export(fake.data_url)
    exporter.wait_for_line("shared file cannot be written: .*Is a directory: 'data.txt'")
    shared.rmdir()
    exported(fake.records(), shared)
    exporter.wait_for_line("shared file back after")


@pytest.mark.parametrize("target", ["a file", "nothing"])
def test_a_symbolic_link_in_place_of_the_file_is_not_followed(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path, target: str
) -> None:
    """What is behind it has another folder's locks; and it is the link that would be renamed."""
    fake.add(some_lines(20))
    assert export_and_end(fake, export, shared) == 0
    moved = shared.rename(tmp_path / "moved")
    shared.symlink_to(moved if target == "a file" else tmp_path / "nothing")
    content = moved.read_bytes()
    fake.add(some_lines(20, "more"))
    exporter = export(fake.data_url)
    exporter.wait_for_line("data.txt is a symbolic link, and not followed: put the file itself there")
    assert_nothing_is_appended(fake, moved, content)
    assert shared.is_symlink()
    moved.replace(shared)  # in one step: without any file at its path a new one would be begun
    exported(fake.records(), shared)


def test_no_companion_that_is_a_symbolic_link_is_followed(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(20))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in (".position", ".position.new"):
        link = shared.with_name(f"data.txt{name}")
        link.symlink_to(precious)
        exporter = export(fake.data_url)
        exporter.wait_for_line("shared file cannot be written: .*symbolic link")
        assert exporter.end() == 0
        link.unlink()
    assert precious.read_text() == "precious"
    assert export_and_end(fake, export, shared) == 0


def test_an_old_copy_in_place_of_the_file_is_told_while_the_part_has_more(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(50))
    assert export_and_end(fake, export, shared) == 0
    copy = shared.read_bytes()
    fake.add(some_lines(50, "more"))
    assert export_and_end(fake, export, shared) == 0
    part = shared.rename(shared.with_name("data.txt.1"))
    shared.write_bytes(copy)
    fake.add(some_lines(50, "last"))
    exporter = export(fake.data_url)
    exporter.wait_for_line(
        "shared file cannot be written: .*data.txt.1 goes on to .*was one of them replaced by a copy"
    )
    assert_nothing_is_appended(fake, shared, copy)
    shared.unlink()
    exported(fake.records(), part, shared)


def test_an_old_copy_of_what_is_compressed_by_now_is_told_too(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(30))
    assert export_and_end(fake, export, shared) == 0
    copy = shared.read_bytes()
    fake.add(some_lines(30, "more"))
    assert export_and_end(fake, export, shared) == 0
    part = shared.rename(shared.with_name("data.txt.1"))
    fake.add(some_lines(10, "last"))
    assert export_and_end(fake, export, part, shared) == 0
    compressed = shared.with_name("data.txt.1.gz")
    compressed.write_bytes(gzip.compress(part.read_bytes()))
    part.rename(tmp_path / part.name)
    newest = shared.read_bytes()
    shared.write_bytes(copy)
    fake.add(some_lines(10, "new"))
    exporter = export(fake.data_url)
    exporter.wait_for_line("shared file cannot be written: .*data.txt.1.gz goes on to .*replaced by a copy")
    assert_nothing_is_appended(fake, shared, copy)
    restored = tmp_path / "restored"
    restored.write_bytes(newest)
    restored.replace(shared)
    exported(fake.records(), tmp_path / part.name, shared)


def test_the_folders_volume_may_be_away_and_come_back_under_a_running_exporter(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    """Meanwhile the empty folder below it is at its path, as under an unmounted volume."""
    fake.add(some_lines(100))
    exporters = [export(fake.data_url) for _ in range(2)]
    exported(fake.records(), shared)
    for exporter in exporters:
        exporter.wait_for_line("appending")
    wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
    away, below = tmp_path / "away", tmp_path / "below"
    shared.parent.rename(away)
    shared.parent.mkdir()
    fake.add(some_lines(20, "below"))
    wait_until(
        lambda: any("another folder than before" in one.printed for one in exporters), what="a line that says so"
    )
    exported(fake.records(), shared)
    shared.parent.rename(below)
    away.rename(shared.parent)
    fake.add(some_lines(20, "back"))
    exported(fake.records(), shared)
    assert [exporter.end() for exporter in exporters] == [0, 0]


def test_of_a_folder_with_only_a_part_or_only_a_position_each_record_is_followed_on(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(40))
    assert export_and_end(fake, export, shared) == 0
    part = shared.rename(shared.with_name("data.txt.1"))
    shared.with_name("data.txt.position").unlink()
    fake.add(some_lines(40, "after-a-part"))
    exporter = export(fake.data_url)
    exported(fake.records(), part, shared)
    exporter.wait_for_line("data.txt.position is missing or broken; going on after .*data.txt.1")
    assert exporter.end() == 0
    parts = [one.rename(tmp_path / one.name) for one in (part, shared)]
    fake.add(some_lines(40, "after-a-position"))
    export(fake.data_url)
    exported(fake.records(), *parts, shared)


@pytest.mark.parametrize("kind", ["broken", "not to be read"])
def test_a_position_that_says_nothing_is_not_taken_for_none_where_nothing_else_is_there(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path, kind: str
) -> None:
    fake.add(some_lines(40))
    assert export_and_end(fake, export, shared) == 0
    part, position = shared.rename(tmp_path / "moved"), shared.with_name("data.txt.position")
    good = position.read_bytes()
    if kind == "broken":
        position.write_bytes(b"garbage")
    else:
        position.unlink()
        position.mkdir()
    exporter = export(fake.data_url)
    exporter.wait_for_line(
        "data.txt.position is broken, and no file" if kind == "broken" else "shared file cannot be written: .*Is a dir"
    )
    opened = Path(f"/proc/{exporter.pid}/fd")
    before, known = len(list(opened.iterdir())), len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 10, what="further requests")
    assert not shared.exists()
    # No attempt leaves one open; in the middle of an attempt there are some
    wait_until(lambda: len(list(opened.iterdir())) < before + 3, what="files that are closed again")
    with held(shared.with_name("data.txt.lock")):  # without a position all would be written anew
        if kind != "broken":
            position.rmdir()
        position.write_bytes(good)
    fake.add(some_lines(10, "more"))
    exported(fake.records(), part, shared)


# ---- Versions -------------------------------------------------------------------------------------------------------


def test_members_that_a_later_backend_adds_do_not_make_another_record_of_it(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(10))
    exporter = export(fake.data_url)
    exported(fake.records(), shared)
    for record in fake.stored.values():
        record["log"]["bytes"] = 5
        record["source"] = {"host": "a"}
    fake.add(some_lines(10, "more"))
    wait_until(lambda: count_lines(shared) == 20, what="20 records")
    assert [record["id"] for record in read_records(shared)] == list(fake.stored)
    assert verify(fake.data_url, shared) == "equal: 20 records\n"
    assert "WARNING" not in exporter.printed


@pytest.mark.parametrize("script", [OLDER, "background.py"])
def test_an_older_exporter_works_with_this_backend(
    export: Callable[..., Service], backend: Backend, shared: Path, script: str
) -> None:
    post_lines(backend, some_lines(5000))
    exporter = export(backend.data_url, script)
    exported(backend.records(), shared)
    for n in range(3):
        post_lines(backend, some_lines(5, f"more{n}"))
        exported(backend.records(), shared)
    assert exporter.end() == 0


def test_older_and_newer_exporters_may_share_a_file_and_follow_each_other(
    export: Callable[..., Service], backend: Backend, shared: Path
) -> None:
    post_lines(backend, some_lines(2000))
    parts: list[Path] = []
    for n, script in enumerate([OLDER, "background.py"] * 2):
        exporter = export(backend.data_url, script)
        exported(backend.records(), *parts, shared)
        assert exporter.end() == 0
        parts.append(shared.rename(shared.with_name(f"data.txt.{n}")))
        post_lines(backend, some_lines(100, f"n{n}"))
    both = [export(backend.data_url, script) for script in (OLDER, "background.py") * 2]
    for n in range(20):
        post_lines(backend, some_lines(100, f"both{n}"))
    exported(backend.records(), *parts, shared)
    for exporter in both:
        exporter.wait_for_line("appending")
    assert [exporter.end() for exporter in both] == [0] * 4


# ---- Retention ------------------------------------------------------------------------------------------------------


def with_retention(fake: FakeBackend, deleted: int) -> Callable[[Request], Reply]:
    """The first records are deleted, as the backend's retention does it."""
    kept_from = created(deleted)

    def answer(request: Request) -> Reply:
        asked = request.query["date_from"]
        if asked > background.EPOCH and asked < kept_from:
            problem = {"title": "Gone", "status": 410, "detail": "deleted", "kept_from": kept_from}
            return Reply(410, json.dumps(problem).encode(), "application/problem+json")
        lines = fake.ndjson(request).splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["created"] >= kept_from]
        headers = {} if asked > background.EPOCH else {"Kept-From": kept_from}
        return Reply(200, b"".join(kept), NDJSON, headers)

    return answer


def test_an_exporter_that_comes_too_late_says_what_it_missed_and_ends(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(20))
    assert export_and_end(fake, export, shared) == 0
    content = shared.read_bytes()
    fake.add(some_lines(30, "deleted"))
    fake.answer = with_retention(fake, 40)
    exporter = export(fake.data_url)
    assert_too_late(exporter, 19, 40)
    assert shared.read_bytes() == content
    told = verify(fake.data_url, shared).splitlines()
    assert told[0] == f"compared from {created(40)} on: the database has deleted what was before"
    assert told[1].startswith("not equal: after 0 equal records the file lacks ")
    for file in shared.parent.iterdir():  # the way on that it names
        file.unlink()
    exporter = export(fake.data_url)
    exported(fake.records()[40:], shared)
    exporter.wait_for_line(f"deleted what was stored before {created(40)}: beginning there")


def assert_too_late(exporter: Service, last: int, kept: int) -> None:
    """It has ended with status 1, and said in one line what it missed, from its last record on, and what to do."""
    assert exporter.process.wait(30) == 1
    [line] = [line for line in exporter.printed.splitlines() if "ERROR" in line]
    wanted = f"data.txt ends in record .*{created(last)}.*deleted what was stored before {created(kept)}.* missing here"
    assert re.search(f"{wanted}.*move data.txt, its parts and companions away", line)
    assert "WARNING" not in exporter.printed


@pytest.mark.parametrize("kind", ["read whole", "broken off"])
def test_what_waits_when_it_is_deleted_is_written_before_the_end(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, kind: str
) -> None:
    """It is nowhere else any more. A reply breaks off where deleting has overtaken it."""
    fake.add(some_lines(20))
    exporter = export(fake.data_url)
    exported(fake.records(), shared)
    with held(shared.with_name("data.txt.lock")):
        gone = with_retention(fake, 80)

        def break_off(request: Request) -> Reply:
            fake.add(some_lines(80, "more"))
            fake.answer = gone
            return Reply(200, b"".join(fake.ndjson(request).splitlines(True)[:31]), NDJSON, chunked=True)

        if kind == "broken off":
            fake.answer = break_off
        else:
            fake.add(some_lines(30, "more"))
            cursor = fake.records()[-1]["created"]
            wait_until(lambda: fake.requests[-1].query["date_from"] == cursor, what="the records in its memory")
            fake.answer = gone  # before there are others, which nobody is to get
            fake.add(some_lines(50, "deleted"))
        known = len(fake.requests)
        wait_until(lambda: len(fake.requests) > known + 2, what="requests that are answered by 410")
        assert exporter.process.poll() is None  # who has the turn may know more than it
    assert_too_late(exporter, 49, 80)
    assert read_records(shared) == fake.records()[:50]


def test_verify_compares_from_where_the_database_has_records_on(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    """Also where a window, or the parts that KEEP_FILES has left, begin before."""
    fake.add(some_lines(50))
    assert export_and_end(fake, export, shared) == 0
    fake.answer = with_retention(fake, 20)
    wanted = f"compared from {created(20)} on: the database has deleted what was before\nequal: 30 records\n"
    assert verify(fake.data_url, shared, created(10)) == wanted
    assert verify(fake.data_url, shared, KEEP_FILES=3).splitlines(True)[-2:] == wanted.splitlines(True)


def test_an_exporter_whose_last_record_is_the_last_deleted_one_has_missed_nothing_and_goes_on(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(20))
    assert export_and_end(fake, export, shared) == 0
    fake.answer = with_retention(fake, 20)
    exporter = export(fake.data_url)
    wait_until(lambda: len(fake.requests) > 6, what="some polls")
    fake.add(some_lines(5, "kept"))
    exported(fake.records(), shared)
    assert "WARNING" not in exporter.printed
    done = verify(fake.data_url, shared)
    assert done == f"compared from {created(20)} on: the database has deleted what was before\nequal: 5 records\n"


# ---- How far behind -------------------------------------------------------------------------------------------------


def test_it_says_how_far_the_file_is_behind_the_newest_record(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(10))
    newest = "2026-01-01T00:01:40.500009Z"  # 100.5 s after the 10th record
    fake.answer = lambda request: Reply(200, fake.ndjson(request), NDJSON, {"Newest": newest})
    exporter = export(fake.data_url, driver(tmp_path, "impatient.py", IMPATIENT))
    exporter.wait_for_line("10 records written .*, 100.5 s behind")
    assert exporter.end() == 0


def test_a_reply_that_breaks_off_in_the_overlap_is_no_missing_record(
    backend: Backend, export: Callable[..., Service], shared: Path
) -> None:
    post_lines(backend, some_lines(10))
    with proxy_to(backend) as proxy:
        exporter = export(proxy.data_url)
        exported(backend.records(), shared)
        proxy.cut_next(250, 300, 350, 400, 450)
        wait_until(lambda: proxy.cuts >= 4, what="four cuts")
        kill(exporter)
        post_lines(backend, some_lines(10, "more"))
        again = export(proxy.data_url)
        exported(backend.records(), shared)
    assert "nothing is appended" not in exporter.printed + again.printed
