"""A power cut at any moment of an exporter's life: after the restart parts and file hold each record once, whole.

An exporter runs in this process on a disk that knows what was flushed. At the cut it is thrown away, and what is on the
disk then is chosen by dice, from what file systems are known to leave: of what was not flushed any block may be there,
or read as zeros, or the size did not grow; names that were changed since the folder was flushed last, in their order,
up to some point. A file system that flushes all names with any file (ext4, XFS) and one that does so with the folder
only (F2FS) are both gone through. Then the device may have another number, and someone may rotate the file before the
start.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, some_lines
from harness import read_records
from waiting import wait_until

import background

BLOCK = 512  # of the disk; small, so that a few records span several
CUTS = 25  # at least
REAL = {name: getattr(os, name) for name in ("open", "write", "fsync", "ftruncate", "link", "replace", "unlink")}


class PowerCut(BaseException):
    """Nothing of the process comes after it: no handler, no `finally` that reaches the disk."""


class Disk:
    """A folder, and what of it was flushed. Files have a second name elsewhere, so that inodes outlive their names."""

    def __init__(self, folder: Path, dice: random.Random, names_with_files: bool) -> None:
        self.folder = folder
        self._inodes = folder.with_name("inodes")
        self._inodes.mkdir()
        self._dice = dice
        self._names_with_files = names_with_files
        self._flushed: dict[int, bytes] = {}  # content by inode
        self._names: dict[str, int] = {}  # flushed
        self._changes: list[dict[str, int]] = []  # all names, after each change since then
        self.steps_left = -1  # until the cut
        self.only = ""  # of which operation; "" for any
        self.off = False
        self.rotations = 0

    def _current(self) -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(self.folder)}

    def changed(self) -> None:
        """Names were made, changed or removed."""
        for entry in os.scandir(self.folder):
            kept = self._inodes / str(entry.inode())
            if not kept.exists():
                REAL["link"](entry.path, kept)
                self._flushed[entry.inode()] = b""
        self._changes.append(self._current())

    def step(self, name: str) -> None:
        """Before each operation."""
        self.steps_left -= self.only in ("", name)
        if self.off or self.steps_left == 0:
            self.off = True
            raise PowerCut

    def flush(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if os.path.samestat(os.fstat(descriptor), self.folder.stat()) or self._names_with_files:
            self._names, self._changes = self._current(), []
        if (file := self._inodes / str(inode)).exists():
            self._flushed[inode] = file.read_bytes()

    def after_the_cut(self) -> None:
        """Makes the folder what is on the disk."""
        names = self._dice.choice([self._names, *self._changes])
        for name in self._current():
            REAL["unlink"](self.folder / name)
        for inode in self._flushed:
            file = self._inodes / str(inode)
            file.write_bytes(self._left_of(self._flushed[inode], file.read_bytes()))
            self._flushed[inode] = file.read_bytes()
        for name, inode in names.items():
            REAL["link"](self._inodes / str(inode), self.folder / name)
        self._names, self._changes, self.off, self.steps_left = names, [], False, -1

    def _left_of(self, flushed: bytes, written: bytes) -> bytes:
        if not written.startswith(flushed):
            return self._dice.choice((flushed, written))  # it was truncated
        size = self._dice.choice((len(flushed), len(written), self._dice.randint(len(flushed), len(written))))
        content = bytearray(written[:size])
        missing = self._dice.choice((0, 0.4))  # of the blocks
        for start in range(len(flushed) - len(flushed) % BLOCK, size, BLOCK):
            if self._dice.random() < missing:
                begin, end = max(start, len(flushed)), min(size, start + BLOCK)
                content[begin:end] = bytes(end - begin)
        return bytes(content)


@pytest.fixture(params=[True, False], ids=["ext4 and XFS", "F2FS"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    folder = tmp_path / "shared"
    folder.mkdir()
    disk = Disk(folder, random.Random(612), request.param)

    def changing(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return REAL["open"](*arguments, **options)
            disk.step(name)
            result = REAL[name](*arguments, **options)
            disk.changed()
            return result

        return call

    def write(descriptor: int, data: Any) -> int:
        if disk.steps_left == 1 and disk.only in ("", "write"):
            REAL["write"](descriptor, bytes(data)[: len(data) // 2])
        disk.step("write")
        return int(REAL["write"](descriptor, data))

    def ftruncate(descriptor: int, size: int) -> None:
        disk.step("ftruncate")
        REAL["ftruncate"](descriptor, size)

    def fsync(descriptor: int) -> None:
        disk.step("fsync")
        disk.flush(descriptor)

    for name in ("open", "link", "replace", "unlink"):
        monkeypatch.setattr(os, name, changing(name))
    for function in (write, ftruncate, fsync):
        monkeypatch.setattr(os, function.__name__, function)
    return disk


def rotate(disk: Disk) -> None:
    disk.rotations += 1
    with suppress(FileNotFoundError):
        (disk.folder / "data.txt").rename(disk.folder / f"data.txt.{disk.rotations}")
        disk.changed()


def move_device(disk: Disk) -> None:
    """Another number, as after many a boot."""
    position = disk.folder / "data.txt.position"
    with suppress(FileNotFoundError, ValueError, TypeError):
        text = json.loads(position.read_text())
        position.write_text(json.dumps(text | {"device": text["device"] + 1}))


def run(exporter: background.Exporter, enough: Callable[[], bool]) -> None:
    exporter.write()
    wait_until(lambda: exporter.step() >= 0 and enough(), what="the records", poll=0)


def test_after_any_power_cut_parts_and_file_hold_each_record_once(
    disk: Disk, fake: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "background")
    dice = random.Random(8)
    settings = background.Settings(url=fake.data_url, directory=str(disk.folder), request_delay=1)
    cuts, file = 0, disk.folder / "data.txt"

    def is_conclusive() -> bool:
        """How often files were rotated, and what the cuts left, is by chance: it depends on how long steps take."""
        mended = "a power cut left zeros" in caplog.text or "not written to its end" in caplog.text
        return cuts >= CUTS and mended and len(parts_of(disk)) > 8

    for number in range(20 * CUTS):
        if is_conclusive():
            break
        fake.add(some_lines(dice.randrange(1, 30), f"n{number}"))
        exporter = background.Exporter(settings)
        disk.only = dice.choice(("", "", "write", "fsync"))
        disk.steps_left = dice.randrange(1, 5 if disk.only else 30)
        try:
            run(exporter, partial(live_on, disk, fake, dice))
        except PowerCut:
            cuts += 1
        del exporter
        disk.after_the_cut()
        if dice.random() < 0.3:
            move_device(disk)
        if dice.random() < 0.2:
            rotate(disk)
    fake.add(some_lines(5, "last"))
    exporter = background.Exporter(settings)
    last = fake.records()[-1]["id"].encode()
    run(exporter, lambda: file.exists() and last in file.read_bytes())
    assert exporter.in_order
    parts = sorted(parts_of(disk), key=lambda path: path.read_bytes().partition(b"\n")[0])
    assert read_records(*parts, file) == fake.records()
    assert is_conclusive()
    print(cuts, len(parts), len(fake.stored))


@pytest.mark.parametrize("rotated", ["by itself", "by hand", "by hand, and a position that is lost"])
def test_what_a_killed_exporter_had_not_flushed_is_not_lost_in_a_part(
    disk: Disk, fake: FakeBackend, rotated: str
) -> None:
    """Else a power cut may take it from a part, when the file and the position have gone on."""
    size = 4000 if rotated == "by itself" else 0
    settings = background.Settings(url=fake.data_url, directory=str(disk.folder), request_delay=1, rotate_bytes=size)
    file = disk.folder / "data.txt"
    for number in range(6):
        export_more(fake, settings, f"a{number}")
        disk.only, disk.steps_left = "fsync", 1  # of what it has just written
        with pytest.raises(PowerCut):
            export_more(fake, settings, f"b{number}")
        disk.only, disk.steps_left, disk.off = "", -1, False  # it was a kill; the disk goes on
        if rotated != "by itself":
            rotate(disk)
        if "lost" in rotated:
            (disk.folder / "data.txt.position").unlink()
        export_more(fake, settings, f"c{number}")
        disk.after_the_cut()
    export_more(fake, settings, "last")
    parts = sorted(
        (path for path in disk.folder.glob("data.txt.[0-9]*") if path.stat().st_size),
        key=lambda path: path.read_bytes().partition(b"\n")[0],
    )
    assert len(parts) >= 6
    assert read_records(*parts, file) == fake.records()


def export_more(fake: FakeBackend, settings: background.Settings, tag: str) -> None:
    fake.add(some_lines(30, tag))
    last, file = fake.records()[-1]["id"].encode(), Path(settings.directory, settings.file_name)
    run(background.Exporter(settings), lambda: file.exists() and last in file.read_bytes())


def parts_of(disk: Disk) -> list[Path]:
    return [path for path in disk.folder.iterdir() if path.name[9:].isdigit() and path.stat().st_size]


def live_on(disk: Disk, fake: FakeBackend, dice: random.Random) -> bool:
    """Now and then the file is rotated, and there are new records."""
    if dice.random() < 0.1:
        rotate(disk)
        fake.add(some_lines(dice.randrange(1, 30), f"g{len(fake.stored)}"))
    return False
