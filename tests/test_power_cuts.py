"""Power cuts: the disk of a host that runs client.py is copied as it is at a moment, and a client goes on from that.

The disk is a loop-mounted image, and a copy of it is what a power cut leaves: what was not flushed may be missing. The
image lies on an XFS of its own, whose reflinks make the copy in one moment. The backend is another machine: it keeps
what it has. The web server's log is on the same disk, and the web server does not flush it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from fakes import PROBLEM, FakeBackend, Reply, Request, fake_backend
from harness import Service, line_of, stop
from waiting import wait_until

Start = Callable[..., Service]
LABORATORY_BYTES = 2 * 1024**3  # a sparse file
CUTS = 6  # of each file system
IMAGE_BYTES = {"ext4": 256 * 1024**2, "xfs": 300 * 1024**2}
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}


def run(*command: Any) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """It is mounted as after a power cut: the file system's own journal is replayed."""
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop,nouuid" if "xfs" in image.name else "loop", image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


class Writer:
    """A web server: it writes lines at once, and never flushes them."""

    def __init__(self, path: Path, tag: str, dice: random.Random) -> None:
        self.path, self.tag, self.lines = path, tag, 0
        self._dice = dice
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            while not self._ended.wait(0.002):
                count = self._dice.randrange(60)
                lines = (f"192.0.2.1 GET /{self.tag}/{n} 200\n" for n in range(self.lines, self.lines + count))
                file.write("".join(lines).encode())
                self.lines += count

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def cut(image: Path, copy: Path) -> None:
    """What the disk holds at one moment."""
    run("cp", "--reflink=always", image, copy)


WHOLE = re.compile(r"192\.0\.2\.1 GET /run[0-9]+/[0-9]+ 200")


def whole_lines(path: Path) -> list[str]:
    """Those that survived, without what a cut tore, or joined to the line behind it, or left as NULs."""
    lines = path.read_bytes().replace(b"\0", b"\n").split(b"\n")
    return [line.decode() for line in lines if WHOLE.fullmatch(line.decode(errors="replace"))]


def is_line(text: str) -> bool:
    """Whether the real backend would take it: `192.` that survived, and the next line behind it, has no address."""
    fields = text.split()
    try:
        ip_address(fields[0])
    except (IndexError, ValueError):
        return False
    return len(fields) == 4


def careful(fake: FakeBackend) -> Callable[[Request], Reply]:
    """Stores what is a line, and refuses what a cut has made of one."""

    def answer(request: Request) -> Reply:
        good = [item for item in request.items if is_line(item["log"])]
        refused = [{"index": n, "reason": "torn"} for n, item in enumerate(request.items) if item not in good]
        answered = json.loads(fake.serve(Request(**{**vars(request), "body": json.dumps(good).encode()})).body)
        if not good:
            return Reply(400, json.dumps({"detail": "torn", "rejected": refused}).encode(), PROBLEM)
        return Reply(201, json.dumps({**answered, "rejected": refused}).encode())

    return answer


def after_power_cuts(start: Start, folder: Path, kind: str, cuts: int, seed: int) -> int:
    """So many cuts, one after the other, each in the middle of the work; the number of lines that were stored.

    After each: no line stands in the database twice, and each that was written and survived is there.
    """
    if missing := [name for name in (MAKE[kind][0], "mount") if not shutil.which(name)]:
        raise AssertionError(f"{missing[0]} is missing: apt-get install e2fsprogs xfsprogs")
    dice = random.Random(seed)
    laboratory = folder / "laboratory"
    with laboratory.open("wb") as file:
        file.truncate(LABORATORY_BYTES)
    run("mkfs.xfs", "-q", "-m", "reflink=1", laboratory)
    with mounted(laboratory, folder / "images") as images:
        return cut_again_and_again(start, images, folder / "mnt", kind, cuts, dice)


def enough(fake: FakeBackend, survived: list[str], count: int) -> bool:
    return len(fake.stored) >= count and set(survived) <= set(map(line_of, fake.records()))


def cut_again_and_again(start: Start, folder: Path, mountpoint: Path, kind: str, cuts: int, dice: random.Random) -> int:
    image = folder / f"{kind}.0"
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES[kind])
    run(*MAKE[kind], image)
    with fake_backend() as fake:
        fake.answer = careful(fake)
        for number in range(cuts + 1):
            following = folder / f"{kind}.{number + 1}"
            with mounted(image, mountpoint) as disk:
                source = disk / "access.log"
                source.touch()
                survived = whole_lines(source)
                known = len(fake.stored)
                settings = {"URL": fake.data_url, "LOG_FILE": disk / "logs.txt", "SOURCE": source}
                service = start("client.py", ROTATE_BYTES=65_536, **settings)
                try:
                    with Writer(source, f"run{number}", dice):
                        wait_until(lambda: enough(fake, survived, known + 200), 60, "what survived, and more")  # noqa: B023
                        threading.Event().wait(dice.uniform(0, 0.1))
                        stop(service.pid)  # else it would send lines after the cut
                        cut(image, following)
                finally:
                    service.destroy()
            image.unlink()
            image = following
            stored = Counter(map(line_of, fake.records()))
            twice = [line for line, count in stored.items() if count > 1]
            assert twice == [], f"{len(twice)} lines twice after cut {number}: {twice[:3]}\n{service.printed}"
            torn = [line for line in stored if not line.startswith("192.0.2.1 GET /run")]
            assert torn == [], torn[:3]
        return len(fake.stored)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount images")
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_of_the_clients_host_loses_no_line_that_survived_and_repeats_none(
    start: Start, tmp_path: Path, kind: str
) -> None:
    assert after_power_cuts(start, tmp_path, kind, CUTS, seed=7) > CUTS * 200
