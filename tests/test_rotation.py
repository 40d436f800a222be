"""The shared file may be rotated by anybody, and by the exporters themselves: parts and file hold each record once."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, Request, some_lines
from harness import (
    ROOT,
    Service,
    clean_environment,
    count_lines,
    driver,
    held,
    is_stopped,
    kill,
    peak_memory_bytes,
    read_records,
    stop,
)
from test_every_step import PROGRAM
from waiting import wait_until

Start = Callable[..., Service]
MIB = 1024**2
PART = re.compile(r"data\.txt\.[0-9]{8}T[0-9]{6}\.[0-9]{6}Z")


@pytest.fixture
def export(start: Start, fake: FakeBackend, shared: Path) -> Callable[..., Service]:
    """Starts an instance that polls quickly."""
    settings = {"URL": fake.data_url, "DIRECTORY": shared.parent, "REQUEST_DELAY": 10}
    return lambda script="background.py", **more: start(script, **(settings | more))


def read_lines(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).splitlines(keepends=True)


def parts_of(shared: Path) -> list[Path]:
    """All files in the folder that begin with a record, in the order of these records; X rather than X.gz."""
    files = [
        path for path in shared.parent.iterdir() if not path.name.endswith((".lock", ".position", ".new", ".file"))
    ]
    parts = [(lines[0], path) for path in files for lines in [read_lines(path)] if lines and lines[0][:1] == b"{"]
    return [path for _, path in sorted(parts) if not path.name.endswith(".gz") or path.with_suffix("") not in files]


def records_of(shared: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in parts_of(shared) for line in read_lines(path)]


def has_last(fake: FakeBackend, shared: Path) -> bool:
    """Whether the last record is in the file, up to its line feed: a reader may see the half of a write."""
    try:
        return fake.records()[-1]["id"].encode() in shared.read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:  # it is being rotated
        return False


def assert_all_exported(fake: FakeBackend, shared: Path) -> None:
    wait_until(lambda: has_last(fake, shared), 40, "the last record")
    assert records_of(shared) == fake.records()


def verify(fake: FakeBackend, shared: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "background.py"), "verify"],
        env=clean_environment({"URL": fake.data_url, "DIRECTORY": str(shared.parent)}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr, done.stderr
    return done.stdout


@contextmanager
def fed(fake: FakeBackend) -> Iterator[None]:
    """New records all the time."""
    ended = threading.Event()

    def feed() -> None:
        for n in count():
            fake.add(some_lines(5, f"feed{n}"))
            if ended.wait(0.004):
                return

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        ended.set()
        feeder.join()


# ---- logrotate ------------------------------------------------------------------------------------------------------


def logrotate(shared: Path, options: str) -> None:
    """One rotation by the real one."""
    folder = shared.parent.parent
    configuration, state = folder / "logrotate.conf", folder / "logrotate.state"
    configuration.write_text(f"{shared} {{\nrotate 100\n{options}\n}}\n")
    configuration.chmod(0o600)
    before = set(shared.parent.iterdir())

    def rotate() -> bool:
        """In the second of the rotation before, dateext's name is taken, and nothing is done."""
        command = [shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin") or "logrotate"]
        done = subprocess.run([*command, "-f", "-s", state, configuration], capture_output=True, text=True, timeout=60)
        if "already exists, skipping rotation" in done.stderr:
            return False
        assert done.returncode == 0, done.stderr
        parts = {path for path in set(shared.parent.iterdir()) - before if not path.name.endswith((".lock", ".new"))}
        return any(not path.name.endswith((".position", ".file")) for path in parts)

    wait_until(rotate, what="a rotation", poll=0.3)


DATEEXT = "dateext\ndateformat -%Y%m%d-%s"


@pytest.mark.parametrize("options", ["create 0600", "nocreate", "compress\ndelaycompress", DATEEXT, "extension .txt"])
def test_under_load_logrotate_loses_and_repeats_nothing(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, options: str
) -> None:
    fake.add(some_lines(100))
    exporters = [export() for _ in range(3)]
    with fed(fake):
        for n in range(3 if options == DATEEXT else 5):
            wait_until(lambda: count_lines(shared) > 20, what="records in the file", poll=0.001)
            logrotate(shared, options)
            keep_what_came_between(shared, n)
    fake.add(some_lines(5, "last"))
    assert_all_exported(fake, shared)
    assert len(parts_of(shared)) > 3
    assert verify(fake, shared).splitlines()[-1] == f"equal: {len(fake.stored)} records"
    assert [exporter.end() for exporter in exporters] == [0, 0, 0]
    assert "WARNING" not in "".join(exporter.printed for exporter in exporters)


def keep_what_came_between(shared: Path, n: int) -> None:
    """An exporter may make the new file before logrotate does, which then moves that one away, to a name that is the
    same for an hour, and replaces what has it already."""
    for backup in shared.parent.glob("*.backup"):
        with held(shared.with_name("data.txt.lock")):
            backup.rename(f"{backup}.{n}")


@pytest.mark.parametrize("options", ["compress", f"compress\n{DATEEXT}", "copytruncate", "copytruncate\ncompress"])
def test_between_two_writes_logrotate_may_also_compress_at_once_and_truncate_a_copied_file(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, options: str
) -> None:
    exporters = [export() for _ in range(2)]
    for n in range(3):
        fake.add(some_lines(50, f"n{n}"))
        assert_all_exported(fake, shared)
        with held(shared.with_name("data.txt.lock")):  # an instance that is late may still ask for a turn
            logrotate(shared, options)
        if n == 1:
            kill(exporters.pop())
            exporters.append(export())
    fake.add(some_lines(50, "last"))
    assert_all_exported(fake, shared)
    assert verify(fake, shared) == "equal: 200 records\n"
    assert "WARNING" not in "".join(exporter.printed for exporter in exporters)


def test_records_that_a_copy_before_a_truncation_lacks_are_told_and_written_again_without_the_position(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    """What copytruncate does with what is written between its copy and its truncation."""
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    shutil.copy(shared, shared.with_name("data.txt.1"))
    fake.add(some_lines(10, "between"))
    assert_all_exported_in(fake, shared)
    os.truncate(shared, 0)
    fake.add(some_lines(10, "after"))
    exporter.wait_for_line("data.txt.1 ends in .*, and was written up to .*: records were cut off")
    assert shared.read_bytes() == b""
    shared.with_name("data.txt.position").unlink()
    assert_all_exported(fake, shared)


def assert_all_exported_in(fake: FakeBackend, shared: Path) -> None:
    wait_until(lambda: count_lines(shared) == len(fake.stored), what="the records in this file")
    wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")


# ---- What is a part -------------------------------------------------------------------------------------------------


def test_a_file_with_a_position_of_its_own_is_another_exporters_and_no_part(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(50))
    other = export(FILE_NAME="data.txt.v2")
    first = export()
    assert_exported_in(fake, shared, shared.with_name("data.txt.v2"))
    assert first.end() == 0
    part = shared.rename(shared.with_name("data.txt.1"))
    fake.add(some_lines(25, "more"))
    wait_until(lambda: count_lines(shared.with_name("data.txt.v2")) == 75, what="the other's records")
    export()
    wait_until(lambda: count_lines(part, shared) >= 75, what="the first's records")
    assert read_records(part, shared) == fake.records()
    printed = verify(fake, shared)
    assert printed == "passed over, as it is no part of data.txt: data.txt.v2\nequal: 75 records\n"
    assert other.end() == 0


def assert_exported_in(fake: FakeBackend, *files: Path) -> None:
    for file in files:
        wait_until(lambda: count_lines(file) == len(fake.stored), what=f"records in {file}")  # noqa: B023


def test_another_file_of_records_that_got_the_inode_of_a_part_is_not_taken_for_it(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    part = shared.rename(tmp_path / "moved")
    fake.add(some_lines(10, "more"))
    foreign = shared.with_name("export.ndjson")
    foreign.write_bytes(
        b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in fake.records()[5:])
    )
    position = shared.with_name("data.txt.position")
    position.write_text(json.dumps(json.loads(position.read_text()) | {"inode": foreign.stat().st_ino}))
    export()
    wait_until(lambda: count_lines(part, shared) >= 60, what="the records")
    assert read_records(part, shared) == fake.records()


@pytest.mark.parametrize("then", ["kept", "renamed"])
def test_a_hard_link_to_the_file_holds_up_nothing(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, then: str
) -> None:
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    os.link(shared, shared.with_name("data.txt.keep"))
    shared.with_name("data.txt.position").unlink()
    if then == "renamed":
        shared.rename(shared.with_name("data.txt.1"))
    fake.add(some_lines(10, "more"))
    export()
    wait_until(lambda: count_lines(shared) >= (60 if then == "kept" else 10), what="the records")
    parts = [shared.with_name("data.txt.1"), shared] if then == "renamed" else [shared]
    assert read_records(*parts) == fake.records()
    assert verify(fake, shared) == "equal: 60 records\n"


# When the first records are in the file, it is copied, without them, and deleted
COPIED_AND_DELETED = """
import os, shutil
import background

write, target, done = os.write, os.environ["TARGET"], []

def copy_delete_write(descriptor, data):
    if not done and b'"created"' in bytes(data):
        done.append(True)
        path = os.path.join(os.environ["DIRECTORY"], "data.txt")
        shutil.copy(path, target)
        os.unlink(path)
    return write(descriptor, data)

os.write = copy_delete_write
sys.exit(background.main([]))
"""


# Right before the first records are written behind the last one, the file is truncated
TRUNCATED = """
import os
import background

append, done = background.SharedFile.append, []

def truncate_and_append(file, lines):
    if not done:
        done.append(True)
        os.truncate(file.path, 0)
    append(file, lines)

background.SharedFile.append = truncate_and_append
sys.exit(background.main([]))
"""


def test_a_file_truncated_between_reading_and_writing_is_read_again(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    """By copytruncate, whose copy lacks what was written after it was made."""
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    copy = shared.with_name("data.txt.1")
    copy.write_bytes(b"".join(read_lines(shared)[:40]))
    fake.add(some_lines(10, "more"))
    exporter = export(driver(tmp_path, "truncated.py", TRUNCATED))
    exporter.wait_for_line("data.txt was changed by another program since it was looked at")
    fake.add(some_lines(1, "last"))
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 3, what="more polls")
    assert shared.read_bytes() == b""
    exporter.end()
    shared.with_name("data.txt.position").unlink()  # the way on that it names from then on
    exporter = export()
    wait_until(lambda: count_lines(copy, shared) >= 61, what="the records")
    assert read_records(copy, shared) == fake.records()


# When it is about to give a new file its name, the one that was moved away is back
BACK_AGAIN = """
import os
import background

write, done = background.SharedFile._write_position, []

def write_position_and_move_back(file, *arguments):
    write(file, *arguments)
    if not done:
        done.append(True)
        os.rename(os.environ["MOVED"], file.path)

background.SharedFile._write_position = write_position_and_move_back
sys.exit(background.main([]))
"""


def test_a_file_that_comes_back_as_a_new_one_is_begun_stays(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    moved = shared.rename(tmp_path / "moved")
    fake.add(some_lines(10, "more"))
    exporter = export(driver(tmp_path, "back.py", BACK_AGAIN), MOVED=moved)
    wait_until(lambda: has_last(fake, shared), what="the records")
    assert read_records(shared) == fake.records()
    assert exporter.end() == 0
    assert "WARNING" not in exporter.printed


def test_a_new_file_is_begun_where_there_are_no_hard_links(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    no_links = """
import errno, os
import background

def link(*arguments, **options):
    raise PermissionError(errno.EPERM, "no hard links")

os.link = link
sys.exit(background.main([]))
"""
    exporter = export(driver(tmp_path, "no_links.py", no_links), ROTATE_BYTES=3_000)
    fake.add(some_lines(50))
    assert_all_exported(fake, shared)
    assert len(parts_of(shared)) > 1
    assert exporter.end() == 0


# Right after the file was renamed for its size, another one is put in its place
REPLACED_IN_A_ROTATION = """
import os, shutil
import background

replace, done = os.replace, []

def replace_and_copy(old, new, **options):
    replace(old, new, **options)
    if new.startswith("data.txt.2") and not done:
        done.append(True)
        shutil.copy(os.environ["OTHER"], os.path.join(os.environ["DIRECTORY"], "data.txt"))

os.replace = replace_and_copy
sys.exit(background.main([]))
"""


@pytest.mark.parametrize("kind", ["older", "later"])
def test_another_file_that_comes_in_a_rotation_is_not_appended_to(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path, kind: str
) -> None:
    fake.add(some_lines(10))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    fake.add(some_lines(50, "more"))
    everything = fake.export(Request("GET", {"date_from": "2026-01-01T00:00:00Z"}, {}, b"", 0, 0)).body.splitlines(True)
    other = tmp_path / "other"
    other.write_bytes(b"".join(everything[:10] if kind == "older" else everything[55:]))
    exporter = export(driver(tmp_path, "replaced.py", REPLACED_IN_A_ROTATION), ROTATE_BYTES=3_000, OTHER=other)
    told = "goes on to .*was one of them replaced by a copy" if kind == "older" else "another file has come to"
    exporter.wait_for_line(f"shared file cannot be written: .*{told}")
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 3, what="more polls")
    assert shared.read_bytes() == other.read_bytes()


def test_a_file_that_is_copied_away_and_deleted_while_it_is_written_to_costs_no_record(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    fake.add(some_lines(50, "more"))
    exporter = export(driver(tmp_path, "deleted.py", COPIED_AND_DELETED), TARGET=tmp_path / "moved")
    exporter.wait_for_line("data.txt was deleted while it was written to; its last records go into a new one")
    wait_until(lambda: count_lines(tmp_path / "moved", shared) >= 100, what="the records")
    assert read_records(tmp_path / "moved", shared) == fake.records()


def test_200_mb_without_a_line_feed_are_another_programs_and_named_in_one_line(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(10))
    with shared.open("wb") as file:
        for _ in range(200):
            file.write(b"x" * MIB)
    size = shared.stat().st_size
    exporter = export()
    exporter.wait_for_line("data.txt has no record in its last 8 MiB: is it another program's file")
    known = len(fake.requests)
    wait_until(lambda: len(fake.requests) > known + 3, what="more polls")
    assert shared.stat().st_size == size
    assert peak_memory_bytes(exporter.pid) < 120 * MIB
    assert len(re.findall("WARNING|ERROR", exporter.printed)) == 1
    shared.unlink()
    assert_all_exported(fake, shared)


def test_verify_reads_compressed_parts_under_any_name_and_a_part_rather_than_its_compressed_copy(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    exporter = export()
    for n, name in enumerate(["data.txt-20261124", "data.txt.3", "moved"]):
        fake.add(some_lines(50, f"n{n}"))
        assert_all_exported(fake, shared)
        wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
        shared.rename(shared.with_name(name))
        fake.add(some_lines(1, f"m{n}"))
        wait_until(lambda: count_lines(shared) == 1, what="the next file")
    exporter.end()
    for name in ("data.txt-20261124", "data.txt.3"):
        part = shared.with_name(name)
        part.with_name(f"{name}.gz").write_bytes(gzip.compress(part.read_bytes()))
    shared.with_name("data.txt-20261124").unlink()
    shared.with_name("data.txt.3.gz").write_bytes(shared.with_name("data.txt.3.gz").read_bytes()[:40])  # half done
    shared.with_name("notes").write_text("these are notes\n")
    told = ["data.txt.3.gz", "notes"]
    wanted = "".join(f"passed over, as it is no part of data.txt: {name}\n" for name in told)
    assert verify(fake, shared) == f"{wanted}equal: 153 records\n"


def test_verify_names_each_file_in_one_line_whatever_it_is_called(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(5))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    os.rename(os.fsencode(shared), os.fsencode(shared) + b".caf\xe9\n")
    (shared.parent / os.fsdecode(b"caf\xe9\nequal: 5 records")).write_text("no records")
    shared.with_name("moved to the archive").symlink_to("archive")
    printed = verify(fake, shared).splitlines()
    assert printed[:-1] == [
        "passed over, as it is no part of data.txt: 'caf\\udce9\\nequal: 5 records'",
        "passed over, as it is no part of data.txt: moved to the archive",
    ]
    assert printed[-1] == "equal: 5 records"


def test_verify_shows_a_line_that_is_no_text(fake: FakeBackend, export: Callable[..., Service], shared: Path) -> None:
    fake.add(some_lines(5))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    shared.write_bytes(shared.read_bytes().replace(b"/a/2", b"/\xff/2"))
    [line] = verify(fake, shared).splitlines()
    assert line.startswith("not equal: after 2 equal records a record differs")
    assert "/\\xff/2" in line


@pytest.mark.parametrize("then", ["another one", "nothing"])
def test_verify_says_that_a_file_was_renamed_meanwhile(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path, then: str
) -> None:
    """What is at its name then lacks records."""
    fake.add(some_lines(5))
    exporter = export()
    assert_all_exported(fake, shared)
    assert exporter.end() == 0
    renamed = """
import os
import background

find = background.find_parts

def find_and_rename(folder, name):
    parts = find(folder, name)
    path = os.path.join(folder.path, name)
    os.rename(path, f"{path}.1")
    if os.environ["THEN"] == "another one":
        open(path, "w").close()
    return parts

background.find_parts = find_and_rename
sys.exit(background.main(["verify"]))
"""
    program = export(driver(tmp_path, "renamed.py", renamed), THEN=then)
    assert program.process.wait(30) == 1
    assert program.printed == f"cannot compare: {shared} was renamed, replaced or deleted meanwhile; try again\n"


def test_a_file_that_was_compressed_beside_itself_and_emptied_is_followed_on(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(50))
    exporter = export()
    assert_all_exported(fake, shared)
    wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
    compressed = shared.with_name("data.txt.gz")
    compressed.write_bytes(gzip.compress(shared.read_bytes()))
    os.truncate(shared, 0)
    fake.add(some_lines(50, "more"))
    wait_until(lambda: count_lines(shared) >= 50, what="the records")
    assert [json.loads(line) for path in (compressed, shared) for line in read_lines(path)] == fake.records()
    assert verify(fake, shared) == "equal: 100 records\n"
    assert "WARNING" not in exporter.printed


# ---- Its own --------------------------------------------------------------------------------------------------------


def test_exporters_rotate_the_file_themselves_with_its_mode_and_owner_and_parts_that_sort(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(10))
    exporters = [export(ROTATE_BYTES=20_000) for _ in range(3)]
    assert_all_exported(fake, shared)
    shared.chmod(0o640)
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    os.chown(shared, owner, -1)
    for n in range(20):
        fake.add(some_lines(50, f"n{n}"))
        wait_until(lambda: has_last(fake, shared), what="the records")
    assert_all_exported(fake, shared)
    parts = parts_of(shared)
    assert len(parts) > 8
    assert parts == [*sorted(parts[:-1]), shared]
    assert all(PART.fullmatch(part.name) for part in parts[:-1])
    for part in parts[:-1]:
        first = json.loads(read_lines(part)[0])["created"]
        assert part.name == f"data.txt.{first.replace('-', '').replace(':', '')}"
        assert part.stat().st_size <= 20_000
        assert (stat.S_IMODE(part.stat().st_mode), part.stat().st_uid) == (0o640, owner)
    assert (stat.S_IMODE(shared.stat().st_mode), shared.stat().st_uid) == (0o640, owner)
    assert verify(fake, shared) == f"equal: {len(fake.stored)} records\n"
    assert "WARNING" not in "".join(exporter.printed for exporter in exporters)


ACL = "system.posix_acl_access"


def test_a_new_file_has_the_access_control_list_of_the_one_before(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    """Its mode alone would let the group read what one named user only may read."""
    entries = [(1, 6, -1), (2, 4, 65534), (4, 0, -1), (16, 4, -1), (32, 0, -1)]  # owner, a user, group, mask, others
    granted = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    export(ROTATE_BYTES=3_000)
    fake.add(some_lines(10))
    assert_all_exported(fake, shared)
    os.setxattr(shared, ACL, granted)
    for n in range(3):
        fake.add(some_lines(20, f"n{n}"))
        assert_all_exported(fake, shared)
    parts = parts_of(shared)
    assert len(parts) > 2
    assert {os.getxattr(part, ACL) for part in parts} == {granted}
    assert {stat.S_IMODE(part.stat().st_mode) for part in parts} == {0o640}


def test_a_part_that_is_being_compressed_counts_once(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    def made() -> list[str]:
        return sorted(path.name for path in shared.parent.iterdir() if PART.fullmatch(path.name))

    def rotate() -> None:
        before = made()
        while made() == before:
            fake.add(some_lines(10, f"n{len(fake.stored)}"))
            wait_until(lambda: has_last(fake, shared), what="the records")
            wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")

    export(ROTATE_BYTES=5_000, KEEP_FILES=2)
    for _ in range(3):
        rotate()
    [_, newer] = made()
    shared.with_name(f"{newer}.gz").write_bytes(b"half done")
    rotate()
    assert len(made()) == 2
    assert newer in made()


def test_of_the_parts_that_it_made_the_newest_stay_and_those_of_other_names(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    export(ROTATE_BYTES=5_000, KEEP_FILES=3)
    fake.add(some_lines(20))
    wait_until(lambda: count_lines(shared) == 20, what="the records")
    shared.rename(shared.with_name("data.txt.mine"))
    for n in range(20):
        fake.add(some_lines(20, f"n{n}"))
        wait_until(lambda: has_last(fake, shared), what="the records")
    wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
    kept = [part.name for part in parts_of(shared) if PART.fullmatch(part.name)]
    assert len(kept) == 3
    assert shared.with_name("data.txt.mine").exists()
    records = records_of(shared)[20:]
    assert records == fake.records()[-len(records) :]


def test_a_reader_of_parts_and_file_sees_each_record_once_at_any_moment(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    """All instances are stopped at a random moment, and the folder is read."""
    dice = random.Random(10)
    exporters = [export(ROTATE_BYTES=3_000, REQUEST_DELAY=1) for _ in range(2)]
    wait_until(lambda: len({request.peer for request in fake.requests}) >= 2, what="requests from both")
    rotated, looks = 0, 0
    with fed(fake):
        while looks < 60 or (rotated <= 10 and looks < 1000):
            looks += 1
            known = len(fake.stored)
            wait_until(lambda: len(fake.stored) > known + dice.randrange(10), what="records", poll=0)  # noqa: B023
            stop(*(exporter.pid for exporter in exporters))
            if shared.parent.joinpath("data.txt").exists() or parts_of(shared):
                records = whole_records(shared)
                assert records == fake.records()[: len(records)]
                rotated = len(parts_of(shared))
            for exporter in exporters:
                exporter.kill(signal.SIGCONT)
    fake.add(some_lines(2, "last"))
    assert_all_exported(fake, shared)
    assert rotated > 10


def whole_records(shared: Path) -> list[dict[str, Any]]:
    """Without a line that is being written."""
    lines = [line for path in parts_of(shared) for line in read_lines(path)]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


@pytest.mark.slow
def test_an_exporter_killed_at_any_step_of_a_rotation_leaves_what_the_next_one_goes_on_from(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    program = tmp_path / "steps.py"
    program.write_text(PROGRAM.replace("SERVICE", "background").replace("ARGUMENTS", "[]"))
    rotated = 0
    for step in range(8, 90, 2):
        fake.add(some_lines(30, f"s{step}"))
        exporter = export(str(program), KILL_AT=step, ROTATE_BYTES=2_500, REQUEST_DELAY=1)
        assert exporter.process.wait(30) == -signal.SIGKILL
        last = [line for line in exporter.printed.splitlines() if "killed at" in line][-1]
        rotated += "replace" in last
        records = whole_records(shared)
        assert records == fake.records()[: len(records)]
    assert rotated > 2
    fake.add(some_lines(30, "last"))
    export(ROTATE_BYTES=2_500)
    assert_all_exported(fake, shared)
    assert len(parts_of(shared)) > 50


# SIGSTOP when the file has been renamed, and there is no new one
STOPPED_IN_A_ROTATION = """
import os, signal
import background

replace, stopped = os.replace, []

def replace_and_stop(old, new, **options):
    replace(old, new, **options)
    if new.startswith("data.txt.2") and not stopped:
        stopped.append(new)
        os.kill(os.getpid(), signal.SIGSTOP)

os.replace = replace_and_stop
sys.exit(background.main([]))
"""


@pytest.mark.parametrize("then", ["continued", "killed"])
def test_nobody_writes_beside_an_instance_that_is_stopped_in_a_rotation(
    fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path, then: str
) -> None:
    fake.add(some_lines(50))
    sleeper = export(driver(tmp_path, "stopped.py", STOPPED_IN_A_ROTATION), ROTATE_BYTES=3_000)
    wait_until(lambda: is_stopped(sleeper.pid), what="the stop")
    other = export(ROTATE_BYTES=3_000)
    fake.add(some_lines(50, "more"))
    cursor, known = fake.records()[-1]["created"], len(fake.requests)
    wait_until(lambda: sum(r.query["date_from"] >= cursor for r in fake.requests[known:]) > 5, what="its polls")
    assert not shared.exists()
    assert len(parts_of(shared)) == 1
    sleeper.kill(signal.SIGCONT if then == "continued" else signal.SIGKILL)
    fake.add(some_lines(5, "last"))
    assert_all_exported(fake, shared)
    assert other.end() == 0


def test_a_part_of_that_name_that_is_there_already_is_named_and_nothing_is_overwritten(
    fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    bar = shared.with_name("data.txt.20260101T000000.000000Z")
    bar.write_text("mine\n")
    fake.add(some_lines(50))
    exporter = export(ROTATE_BYTES=3_000)
    exporter.wait_for_line(f"{bar.name} is there already; move it out of the folder")
    assert bar.read_text() == "mine\n"
    bar.unlink()
    assert_all_exported(fake, shared)
