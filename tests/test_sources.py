"""Where client.py stands in the files that it follows: through rotation, truncation, power cuts, edits and restarts."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, append, assert_stored, fake_backend, some_lines, stored
from harness import Service, driver, kill
from waiting import wait_until

import client

Start = Callable[..., Service]
Follow = Callable[..., Service]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder / "access.log"


@pytest.fixture
def follow(start: Start, fake: FakeBackend, journal: Path, source: Path) -> Follow:
    def start_following(**settings: Any) -> Service:
        return start("client.py", **{"URL": fake.data_url, "LOG_FILE": journal, "SOURCE": source, **settings})

    return start_following


def write(path: Path, lines: list[str]) -> Path:
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return path


def settled(journal: Path) -> None:
    """All of the journal is delivered."""
    position = Path(f"{journal}.position")

    def is_delivered() -> bool:
        return position.exists() and json.loads(position.read_text())["acknowledged"] == journal.stat().st_size

    wait_until(is_delivered, what="delivery")


# ---- The bytes before the offset decide -----------------------------------------------------------------------------


def test_a_source_that_lost_its_end_in_a_power_cut_is_read_on_from_exactly_there(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    """Lines that were read and are gone stay stored; those that were written in their place are read."""
    lines = some_lines(5000)
    write(source, lines)
    service = follow()
    assert_stored(fake, lines)
    settled(journal)
    kill(service)
    write(source, lines[:3000])  # shorter than the offset
    service = follow()
    service.wait_for_line("is not what was read of it beyond byte")
    append(source, new := some_lines(10, "new"))
    assert_stored(fake, lines + new)
    kill(service)
    assert stored(fake) == lines + new


@pytest.mark.parametrize("zeros", [0, 5000], ids=["", "zeros"])
def test_a_source_that_was_written_past_the_offset_after_a_power_cut_loses_nothing_and_tears_nothing(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path, zeros: int
) -> None:
    lines = some_lines(3000)
    write(source, lines)
    service = follow()
    assert_stored(fake, lines)
    settled(journal)
    kill(service)
    write(source, lines[:1234])
    with source.open("ab") as file:
        file.write(b"\0" * zeros)  # blocks that never got their content
    append(source, new := some_lines(4000, "after"))
    follow()
    assert_stored(fake, lines + new)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_truncated_file_that_begins_with_the_same_bytes_is_read_on_from_where_it_differs(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path, running: bool
) -> None:
    banner = [f"192.0.2.1 GET /banner/{'b' * 60}/{n} 200" for n in range(5)]  # longer than what a file is known by
    lines = banner + some_lines(50)
    write(source, lines)
    service = follow()
    assert_stored(fake, lines)
    settled(journal)
    if not running:
        kill(service)
    new = some_lines(60, "new")
    with source.open("r+b") as file:  # at once: no look between sees it empty
        file.write(b"".join(line.encode() + b"\n" for line in banner + new))
        file.truncate()
    if not running:
        follow()
    assert_stored(fake, lines + new)


def test_a_chunk_of_the_journal_that_has_its_size_and_holes_after_a_power_cut_is_read_again(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    lines = some_lines(1000)
    write(source, lines)
    with fake_backend(listening=False) as nowhere:
        service = follow(URL=nowhere.data_url)
        wait_until(lambda: journal.exists() and journal.stat().st_size == source.stat().st_size, what="the journal")
        kill(service)
    with journal.open("r+b") as file:
        file.seek(8192)
        file.write(b"\0" * 4096)
    service = follow()
    service.wait_for_line("cut off .* bytes of an append that did not end")
    assert_stored(fake, lines)


def test_a_source_is_flushed_to_disk_before_its_lines_are_in_the_journal(
    monkeypatch: pytest.MonkeyPatch, source: Path, journal: Path
) -> None:
    write(source, some_lines(10))
    synced: list[int] = []
    fsync = os.fsync

    def note(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    followed = client.FollowedFile(str(source), client.open_journal(str(journal)))
    synced.clear()
    write_all = os.write

    def check(file: int, data: bytes) -> int:
        assert source.stat().st_ino in synced
        return write_all(file, data)

    monkeypatch.setattr(os, "write", check)
    assert followed.step()


# ---- State belongs to a source, and to one journal ------------------------------------------------------------------


def test_a_source_that_is_followed_again_after_another_one_is_read_on_where_it_was_left(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    other = write(source.with_name("other.log"), some_lines(100, "other"))
    write(source, some_lines(100))
    lines = some_lines(100) + some_lines(100, "other")
    for path, count in ((source, 100), (other, 200)):
        service = follow(SOURCE=path)
        wait_until(lambda: len(fake.stored) >= count, what="all lines")  # noqa: B023
        kill(service)
    append(source, new := some_lines(5, "new"))
    follow()
    assert_stored(fake, lines + new)


def test_numbered_journals_find_their_source_whichever_client_starts_first(
    start: Start, fake: FakeBackend, source: Path, tmp_path: Path
) -> None:
    paths = [write(source.with_name(f"{name}.log"), some_lines(100, name)) for name in "ab"]
    settings = {"URL": fake.data_url, "LOG_FILE": tmp_path / "logs-%n.txt"}
    for order in (paths, paths[::-1], paths):
        services = []
        for path in order:
            services.append(start("client.py", SOURCE=path, **settings))
            services[-1].wait_for_line("delivering to")
        wait_until(lambda: len(fake.stored) >= 200, what="all lines")
        wait_until(lambda: (tmp_path / "logs-2.txt.position").exists(), what="the second journal")
        for service in services:
            kill(service)
    assert sorted(stored(fake)) == sorted(some_lines(100, "a") + some_lines(100, "b"))


def test_a_second_client_on_one_source_with_a_journal_of_its_own_says_so_and_ends(
    follow: Follow, source: Path, journal: Path
) -> None:
    write(source, some_lines(10))
    first = follow()
    first.wait_for_line("delivering to")
    second = follow(LOG_FILE=journal.with_name("second.txt"))
    assert second.process.wait(20) == 1
    assert len(second.printed.splitlines()) == 1
    assert "is followed by another client" in second.printed
    kill(first)
    follow(LOG_FILE=journal.with_name("second.txt")).wait_for_line("delivering to")


def test_of_two_clients_that_waited_for_the_folder_of_a_source_one_says_so_and_ends(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    late = source.parent / "late" / "access.log"
    both = [follow(SOURCE=late, LOG_FILE=journal.with_name(name)) for name in ("first.txt", "second.txt")]
    for service in both:
        service.wait_for_line("cannot be followed")
    late.parent.mkdir()
    write(late, some_lines(10))
    wait_until(lambda: any(service.process.poll() is not None for service in both), what="the end of one")
    [ended] = [service for service in both if service.process.poll() is not None]
    assert ended.process.wait(20) == 1
    assert "is followed by another client" in ended.printed
    assert_stored(fake, some_lines(10))


def test_more_files_are_followed_than_the_usual_limit_of_open_ones(
    start: Start, fake: FakeBackend, source: Path, journal: Path, tmp_path: Path
) -> None:
    for number in range(20):
        write(source.with_name(f"{number}.log"), [f"192.0.2.1 GET /{number} 200"])
    limits = "import client, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))\nsys.exit(client.main())\n"
    settings = {"URL": fake.data_url, "LOG_FILE": journal, "SOURCE": f"{source.parent}/*.log"}
    service = start(driver(tmp_path, "raised.py", limits.format(32, 500)), **settings)
    wait_until(lambda: len(fake.stored) == 20, what="all lines")
    kill(service)
    service = start(driver(tmp_path, "fixed.py", limits.format(20, 20)), **settings)
    assert service.process.wait(20) == 1
    assert re.search(r"SOURCE .*/\*.log cannot be used: .*Too many open files", service.printed)


SPOILT = [b"", b"garbage", b"\0" * 30, b"[]", b"{}", b'{"spans": 3}', b'{"sources": 3, "chunk": null}', b"\xff"]


@pytest.mark.parametrize("content", SPOILT, ids=repr)
@pytest.mark.parametrize("name", ["journal", "source"])
def test_a_spoilt_state_is_never_taken_for_none(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path, name: str, content: bytes
) -> None:
    write(source, some_lines(10))
    service = follow()
    assert_stored(fake, some_lines(10))
    kill(service)
    Path(f"{journal}.{name}").write_bytes(content)
    service = follow()
    assert service.process.wait(20) == 1
    [line] = service.printed.splitlines()
    assert f"{journal}.{name}" in line
    assert "move LOG_FILE away" in line
    assert len(fake.stored) == 10


def test_a_state_that_cannot_be_read_or_an_identity_that_is_gone_ends_the_client(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    write(source, some_lines(10))
    service = follow()
    assert_stored(fake, some_lines(10))
    settled(journal)
    kill(service)
    state = Path(f"{journal}.journal")
    kept = state.read_bytes()
    state.unlink()
    service = follow()
    assert service.process.wait(20) == 1
    assert f"{state} is missing" in service.printed
    state.mkdir()
    service = follow()
    assert service.process.wait(20) == 1
    assert f"{state} cannot be read" in service.printed
    state.rmdir()
    state.write_bytes(kept)
    append(source, some_lines(1, "last"))
    follow()
    assert_stored(fake, some_lines(10) + some_lines(1, "last"))


@pytest.mark.parametrize("complete", [True, False], ids=["appended", "not appended"])
def test_the_state_files_of_the_version_before_are_read(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path, complete: bool
) -> None:
    """As that version wrote them; twenty lines are delivered, ten are not."""
    lines = some_lines(40)
    write(source, lines)
    data = source.read_bytes()
    ends = [n + 1 for n, byte in enumerate(data) if byte == 10]
    journal.write_bytes(data[: ends[29] if complete else ends[24] + 7])
    identity = "0e8d4a1c-53a6-8c5e-9f0e-"
    Path(f"{journal}.journal").write_text(json.dumps({"identity": identity}))
    Path(f"{journal}.position").write_text(json.dumps({"acknowledged": ends[19]}))
    head = zlib.crc32(data[:256])
    state = {"inode": source.stat().st_ino, "head_before": head, "head": head, "offset": ends[19]}
    state |= {"offset_after": ends[29], "journal": ends[19], "journal_after": ends[29]}
    Path(f"{journal}.source").write_text(json.dumps(state))
    follow()
    assert_stored(fake, lines[20:])
    first = next(iter(fake.stored))
    assert (first[:24] == identity) == complete  # what was appended before keeps its ids
    append(source, some_lines(5, "more"))
    assert_stored(fake, lines[20:] + some_lines(5, "more"))
    assert journal.read_text().splitlines() == lines + some_lines(5, "more")


def test_a_state_without_what_this_version_keeps_besides_is_read(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    """The last version knew nothing of lines in pieces, nor of files that it had left."""
    write(source, some_lines(30))
    service = follow()
    assert_stored(fake, some_lines(30))
    settled(journal)
    kill(service)
    state = json.loads(Path(f"{journal}.source").read_text())
    del state["finished"]
    for file in state["sources"][str(source)]:
        del file["begun"]
        file["marks"] = [mark[:5] for mark in file["marks"]]
    del state["chunk"]["before"]["begun"]
    Path(f"{journal}.source").write_text(json.dumps(state))
    follow()
    append(source, some_lines(5, "more"))
    assert_stored(fake, some_lines(30) + some_lines(5, "more"))


def test_the_old_state_belongs_to_the_source_that_has_its_file(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    other = write(source.with_name("b.log"), some_lines(5, "b"))
    write(source, some_lines(30))
    data = source.read_bytes()
    journal.write_bytes(data)
    Path(f"{journal}.journal").write_text('{"identity": "0e8d4a1c-53a6-8c5e-9f0e-"}')
    Path(f"{journal}.position").write_text(json.dumps({"acknowledged": len(data)}))
    state = {"inode": source.stat().st_ino, "head": zlib.crc32(data[:256]), "offset": 0, "offset_after": len(data)}
    Path(f"{journal}.source").write_text(json.dumps(state | {"journal": 0, "journal_after": len(data)}))
    follow(SOURCE=f"{source},{other}")
    assert_stored(fake, some_lines(5, "b"))


def test_a_journal_that_got_the_inode_of_its_source_is_not_taken_for_it(source: Path, tmp_path: Path) -> None:
    """After a restore: plain lines are the same in both."""
    journal = source.with_name("logs.txt")
    lines = some_lines(40)
    write(source, lines[:20])
    opened = client.open_journal(str(journal))
    followed = client.FollowedFile(str(source), opened)
    assert followed.step()
    state = opened.sources[str(source)][0]
    opened.sources[str(source)] = (replace(state, inode=journal.stat().st_ino),)
    append(source, lines[20:])
    again = client.FollowedFile(str(source), opened)
    while again.step():
        pass
    assert journal.read_text().splitlines() == lines


# ---- Rotation -------------------------------------------------------------------------------------------------------


def rotate(path: Path) -> None:
    """As logrotate does: .1 is the newest."""
    for number in range(5, 0, -1):
        if (old := path.with_name(f"{path.name}.{number}")).exists():
            old.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))


def test_a_link_whose_target_is_rotated_while_no_client_runs_loses_nothing(
    follow: Follow, fake: FakeBackend, source: Path, tmp_path: Path
) -> None:
    """As Kubernetes and Docker have it."""
    lines = some_lines(150)
    pod = tmp_path / "pods"
    pod.mkdir()
    write(pod / "0.log", lines[:50])
    source.symlink_to(pod / "0.log")
    service = follow()
    assert_stored(fake, lines[:50])
    kill(service)
    append(pod / "0.log", lines[50:100])
    (pod / "0.log").rename(pod / "0.log.20261124-184346")
    write(pod / "0.log", lines[100:])
    follow()
    assert_stored(fake, lines)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gzip"])
def test_rotations_in_quick_succession_lose_nothing(
    follow: Follow, fake: FakeBackend, source: Path, running: bool, packed: bool
) -> None:
    lines = some_lines(200)
    write(source, lines[:50])
    service = follow()
    assert_stored(fake, lines[:50])
    if not running:
        kill(service)
    append(source, lines[50:100])
    rotate(source)
    write(source, lines[100:150])
    rotate(source)
    if packed and not running:
        for number in (1, 2):
            part = source.with_name(f"access.log.{number}")
            subprocess.run(["gzip", part], check=True)
    write(source, lines[150:])
    if not running:
        follow()
    assert_stored(fake, lines)


def test_rotated_files_from_before_the_first_start_are_left_alone(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    """Also where the file that was empty then has been replaced."""
    write(source.with_name("access.log.1"), some_lines(20, "old"))
    source.touch()
    service = follow()
    wait_until(lambda: Path(f"{journal}.source").exists(), what="its state")
    kill(service)
    write(source.with_name("new"), new := some_lines(10, "new")).replace(source)
    service = follow()
    assert_stored(fake, new)
    settled(journal)
    assert service.end() == 0
    assert stored(fake) == new


def test_what_was_compressed_so_that_it_cannot_be_read_is_told_with_its_size(
    follow: Follow, fake: FakeBackend, source: Path
) -> None:
    write(source, some_lines(50))
    service = follow()
    assert_stored(fake, some_lines(50))
    kill(service)
    source.unlink()
    source.with_name("access.log.1.zst").write_bytes(b"z" * 1234)
    write(source, new := some_lines(20, "new"))
    service = follow()
    service.wait_for_line(r"ERROR.*1234 bytes of it in \S+access.log.1.zst cannot be read")
    assert_stored(fake, some_lines(50) + new)


LEAVING_SOON = """
import client
client.ROTATED_SECONDS = 0.2
client.main()
"""


def test_a_writer_that_goes_on_in_a_renamed_file_loses_nothing_also_over_a_restart(
    start: Start, follow: Follow, fake: FakeBackend, source: Path, tmp_path: Path
) -> None:
    """Apache's graceful restart; an hour of it, here some moments after the client has gone over to the new file."""
    lines = some_lines(80)
    write(source, lines[:20])
    program = driver(tmp_path, "leaving.py", LEAVING_SOON)
    settings = {"URL": fake.data_url, "LOG_FILE": tmp_path / "logs.txt", "SOURCE": source}
    service = start(program, **settings)
    assert_stored(fake, lines[:20])
    renamed = source.rename(source.with_name("access.log.1"))
    write(source, lines[20:40])
    assert_stored(fake, lines[:40])  # it is in the new one
    append(renamed, lines[40:60])
    assert_stored(fake, lines[:60])
    kill(service)
    append(renamed, lines[60:80])
    start(program, **settings)
    assert_stored(fake, lines)


@pytest.mark.parametrize("count", [2, 200], ids=["short", "long"])
@pytest.mark.parametrize("down", [False, True], ids=["running", "down"])
def test_a_file_that_is_copied_and_then_replaced_is_read_once(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path, count: int, down: bool
) -> None:
    """The copy has a name as of a rotation, and is newer than all that was read; its content is what counts."""
    write(source, lines := some_lines(count))
    service = follow()
    assert_stored(fake, lines)
    settled(journal)
    if down:
        kill(service)
    shutil.copyfile(source, source.with_name("access.log.0001"))
    os.replace(write(source.with_name("new"), new := some_lines(100, "new")), source)
    if down:
        service = follow()
    assert_stored(fake, lines + new)
    append(source, last := some_lines(5, "last"))
    assert_stored(fake, lines + new + last)
    kill(service)
    assert stored(fake) == lines + new + last


def test_what_was_not_read_before_a_truncation_is_read_from_the_copy(
    follow: Follow, fake: FakeBackend, source: Path
) -> None:
    """copytruncate while no client runs."""
    lines = some_lines(90)
    write(source, lines[:30])
    service = follow()
    assert_stored(fake, lines[:30])
    kill(service)
    append(source, lines[30:60])
    shutil.copy(source, source.with_name("access.log.1"))
    write(source, lines[60:])
    follow()
    assert_stored(fake, lines)


# ---- Several files --------------------------------------------------------------------------------------------------


def test_a_pattern_follows_all_files_that_match_now_and_later_through_rotation(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    folder = source.parent
    wanted = []
    for name in "ab":
        write(folder / f"{name}.log", part := some_lines(20, name))
        wanted += part
    write(folder / "c.txt", some_lines(20, "not-this"))
    extra = write(journal.parent / "extra file", some_lines(5, "extra"))
    wanted += some_lines(5, "extra")
    service = follow(SOURCE=f"{folder}/*.log, {str(extra).replace(' ', '?')}")
    wait_until(lambda: len(fake.stored) >= len(wanted), what="the first lines")
    write(folder / "d.log", part := some_lines(20, "d"))
    wanted += part
    (folder / "a.log").rename(folder / "a-20261124.log")  # matches, and is read already
    write(folder / "a.log", part := some_lines(20, "a2"))
    wanted += part
    wait_until(lambda: len(fake.stored) >= len(wanted), what="all lines")
    settled(journal)
    kill(service)
    append(folder / "d.log", part := some_lines(7, "d2"))
    wanted += part
    service = follow(SOURCE=f"{folder}/*.log, {str(extra).replace(' ', '?')}")
    wait_until(lambda: len(fake.stored) >= len(wanted), what="the last lines")
    settled(journal)
    assert service.end() == 0
    assert sorted(stored(fake)) == sorted(wanted)


def test_a_link_and_its_target_are_one_source(follow: Follow, fake: FakeBackend, source: Path, journal: Path) -> None:
    write(source, some_lines(20))
    source.with_name("link.log").symlink_to(source)
    service = follow(SOURCE=f"{source.parent}/*.log")
    assert_stored(fake, some_lines(20))
    settled(journal)
    assert service.end() == 0
    assert stored(fake) == some_lines(20)


# ---- NULs -----------------------------------------------------------------------------------------------------------


def test_the_nuls_of_a_sparse_file_are_skipped_and_counted(
    follow: Follow, fake: FakeBackend, source: Path, journal: Path
) -> None:
    """A writer without O_APPEND goes on at its own offset after a truncation."""
    lines = some_lines(30)
    with source.open("wb") as file:
        file.seek(40_000_000)
        file.write(b"".join(line.encode() + b"\n" for line in lines))
    service = follow()
    assert_stored(fake, lines)
    service.wait_for_line("skipped 40000000 NUL bytes")
    settled(journal)
    assert journal.read_text().splitlines() == lines
    assert not Path(f"{journal}.rejected").exists()


# ---- Refused at the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "link", "companion", "named like a part"])
def test_a_source_that_is_the_journal_is_refused(follow: Follow, journal: Path, how: str) -> None:
    path = journal = journal.with_name("logs.1") if how == "named like a part" else journal
    if how == "link":
        path = journal.with_name("link")
        path.symlink_to(journal)
    if how == "companion":
        path = Path(f"{journal}.rejected")
    service = follow(SOURCE=path, LOG_FILE=journal)
    assert service.process.wait(20) == 2
    assert len(service.printed.splitlines()) == 1
    assert "is LOG_FILE" in service.printed


def test_a_closed_standard_input_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", client.__file__]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command],
        env={"SOURCE": "-", "LOG_FILE": str(tmp_path / "logs.txt"), "URL": "http://127.0.0.1:9/"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gzip_is_read_as_a_member_of_the_rotation_only_when_the_plain_file_is_gone(source: Path, journal: Path) -> None:
    lines = some_lines(30)
    write(source, lines[:10])
    followed = client.FollowedFile(str(source), client.open_journal(str(journal)))
    assert followed.step()
    rotate(source)
    write(source, lines[10:20])
    rotate(source)
    with gzip.open(source.with_name("access.log.1.gz"), "wb") as packed:
        packed.write(b"half")  # being written
    write(source, lines[20:])
    deadline = time.monotonic() + 20
    while journal.read_bytes().count(b"\n") < 30 and time.monotonic() < deadline:
        followed.step()
    assert journal.read_text().splitlines() == lines
