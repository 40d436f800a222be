"""Power cuts of the exporters' machine on the real ext4 and XFS: images of the disk, taken while an exporter writes.

An image is what the file system had given to its device by then, so what is in the page cache only is gone. It is
mounted, which replays the file system's journal, and the next exporter goes on in it. Needs root and loop devices.
"""

from __future__ import annotations

import filecmp
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import FakeBackend, some_lines
from harness import ROOT, Service, driver, read_records, stop
from waiting import wait_until

SECONDS = 60.0
MIB = 1024**2
CUTS = 15
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
ENTERED = """
import ctypes, os, runpy

if ctypes.CDLL(None).setns(os.open("/proc/{pid}/ns/mnt", os.O_RDONLY), 0):
    raise SystemExit("cannot enter the mount namespace")
runpy.run_path({script!r}, run_name="__main__")
"""


class Mounted:
    """An image at a folder, in a mount namespace of its own, which ends with its process."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.folder = folder
        command = 'mount -o loop "$1" "$2" && echo mounted && exec sleep infinity'
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", command, "sh", image, folder], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n", "an image could not be mounted: root, and loop devices?"
        self.seen = Path(f"/proc/{self._holder.pid}/root{folder}")

    def program(self, path: Path) -> str:
        text = ENTERED.format(pid=self._holder.pid, script=str(ROOT / "background.py"))
        return driver(path, "mounted.py", text)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait(20)
        if self._holder.stdout:
            self._holder.stdout.close()


def picture(image: Path, copy: Path) -> None:
    """What is on the device at one moment: two copies that are equal, while nobody writes."""

    def taken() -> bool:
        for target in (copy, copy.with_suffix(".again")):
            subprocess.run(["cp", "--sparse=always", image, target], check=True)
        return filecmp.cmp(copy, copy.with_suffix(".again"), shallow=False)

    wait_until(taken, SECONDS, "two equal copies")


@contextmanager
def fed(fake: FakeBackend) -> Iterator[None]:
    ended = threading.Event()

    def feed() -> None:
        while not ended.wait(0.003):
            fake.add(some_lines(3, f"f{len(fake.stored)}"))

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield
    finally:
        ended.set()
        feeder.join()


@pytest.mark.parametrize("kind", MAKE)
def test_after_power_cuts_in_mid_run_parts_and_file_hold_each_record_once(
    fake: FakeBackend, start: Callable[..., Service], tmp_path: Path, kind: str
) -> None:
    dice = random.Random(3)
    image, copy, folder = tmp_path / "image", tmp_path / "copy", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as empty:
        empty.truncate(320 * MIB)
    program = shutil.which(MAKE[kind][0], path="/usr/sbin:/sbin:/usr/bin")
    assert program, f"{MAKE[kind][0]} is missing: install e2fsprogs and xfsprogs"
    subprocess.run([program, *MAKE[kind][1:], image], check=True)
    mounted = Mounted(image, folder)
    try:
        with fed(fake):
            for number in range(CUTS):
                file = mounted.seen / "data.txt"
                program = mounted.program(tmp_path)
                exporter = start(program, URL=fake.data_url, DIRECTORY=folder, REQUEST_DELAY=2, ROTATE_BYTES=30_000)
                known = len(fake.stored) + dice.randrange(10, 300)
                wait_until(lambda: len(fake.stored) > known and file.exists(), SECONDS, "records", poll=0)  # noqa: B023
                if dice.random() < 0.5:
                    file.rename(mounted.seen / f"data.txt.{number}")
                    known = len(fake.stored) + dice.randrange(30)
                    wait_until(lambda: len(fake.stored) > known, SECONDS, "records", poll=0)  # noqa: B023
                stop(exporter.pid)
                picture(image, copy)
                exporter.kill(signal.SIGKILL)
                exporter.process.wait(20)
                mounted.close()
                copy.replace(image)
                mounted = Mounted(image, folder)
        exporter = start(mounted.program(tmp_path), URL=fake.data_url, DIRECTORY=folder, REQUEST_DELAY=2)
        last, file = fake.records()[-1]["id"].encode(), mounted.seen / "data.txt"
        wait_until(lambda: file.exists() and last in file.read_bytes(), SECONDS, "the last record")
        parts = [path for path in mounted.seen.glob("data.txt*") if path.name[9:10].isdigit() and path.stat().st_size]
        parts.sort(key=lambda path: path.read_bytes().partition(b"\n")[0])
        assert read_records(*parts, file) == fake.records()
        assert len(parts) > CUTS / 3
        assert exporter.end() == 0
    finally:
        mounted.close()
