"""Which files client.py takes for which, through rotations of any kind: each line that was written is journalled once.

The clients live in this process, on a clock that a test moves; what they meet are real files.
"""

from __future__ import annotations

import gzip
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import append, some_lines

import client


class Clock:
    """Of all clients of a test; and of its files, which are seldom written to at the same moment."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.written = 1.6e9

    def stamp(self, path: Path, seconds: float = 1.0) -> None:
        self.written += seconds
        os.utime(path, (self.written, self.written))


class Host:
    """A client's files, and the client, which may be killed and started again."""

    def __init__(self, folder: Path, clock: Clock, source: str = "access.log") -> None:
        self.folder, self.clock = folder / "logs", clock
        self.folder.mkdir()
        self.log = self.folder / "access.log"
        (folder / "state").mkdir()
        sources = " ".join(str(self.folder / name) for name in source.split())
        self._settings = client.Settings(source=sources, log_file=str(folder / "state" / "journal"))
        self._running: list[tuple[client.Journal, client.Sources]] = []

    @property
    def is_up(self) -> bool:
        return bool(self._running)

    @property
    def journalled(self) -> list[str]:
        return Path(self._settings.log_file).read_text().splitlines()

    @property
    def sources(self) -> client.Sources:
        return self._running[0][1]

    def up(self) -> None:
        journal = client.open_journal(self._settings.log_file, self._settings)
        self._running.append((journal, client.Sources(self._settings, journal)))

    def kill(self) -> None:
        journal, sources = self._running.pop()
        os.close(journal._file)
        for path in list(sources._followed):
            sources._leave(path)

    def steps(self, *seconds: float) -> None:
        for passed in seconds:
            self.clock.now += passed
            self.sources.look()
            self.sources.step()

    def settle(self) -> None:
        """Reads all that there is."""
        if not self.is_up:
            self.up()
        self.steps(*[1.1, 3.0, 12.0] * 20)

    def write(self, lines: list[str], path: Path | None = None, seconds: float = 1.0) -> None:
        append(path or self.log, lines)
        self.clock.stamp(path or self.log, seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    times = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1.7e9 + clock.now)
    monkeypatch.setattr(client, "time", times)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here is about power cuts, and there are many
    return clock


@pytest.fixture
def host_of(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def make(source: str = "access.log") -> Host:
        folder = tmp_path / str(len(hosts))
        folder.mkdir()
        hosts.append(Host(folder, clock, source))
        return hosts[-1]

    yield make
    for host in hosts:
        if host.is_up:
            host.kill()


def descriptors(folder: Path) -> int:
    """How many this process has of files in a folder: others come and go with what earlier tests have left."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(f"{folder}/") for link in links if os.path.islink(link))


def pack(path: Path, clock: Clock, stamp: str) -> None:
    """As gzip (keep), pigz (second), the kubelet (now) and reproducible archives (zero) do."""
    packed = path.with_name(f"{path.name}.gz")
    with gzip.open(packed, "wb") as file:
        file.write(path.read_bytes())
    kept = path.stat().st_mtime_ns
    if stamp == "now":
        clock.stamp(packed)
    else:
        time = {"keep": kept, "second": kept // 10**9 * 10**9, "zero": 0}[stamp]
        os.utime(packed, ns=(time, time))
    path.unlink()


# ---- Random histories -----------------------------------------------------------------------------------------------


class History:
    """What web servers, logrotate, compressors and kill -9 may do, one thing after the other, by dice."""

    def __init__(self, host: Host, dice: random.Random) -> None:
        self.host, self.dice = host, dice
        self.style = dice.choice(("number", "date", "date inside"))
        self.stamp = dice.choice(("keep", "second", "now", "zero"))
        self.lines: list[str] = []
        self._rotations = 0
        self._late = False  # the file that was renamed last is watched: its writer may go on

    def write(self, path: Path | None = None) -> None:
        new = [f"192.0.2.1 GET /{len(self.lines) + n} 200" for n in range(self.dice.randrange(1, 5))]
        self.lines += new
        self.host.write(new, path, self.dice.choice((0.001, 0.3, 5, 100)))

    def read(self, steps: int = 0) -> None:
        if self.host.is_up:
            self.host.steps(
                *(self.dice.choice((0.05, 0.05, 1.1, 3, 12)) for _ in range(steps or self.dice.randrange(12)))
            )

    def old(self) -> list[Path]:
        """The oldest first."""
        paths = [path for path in self.host.folder.iterdir() if path != self.host.log]
        return sorted(paths, key=lambda path: -int(path.name.split(".")[2]) if self.style == "number" else path.name)

    def _next_name(self) -> Path:
        self._rotations += 1
        folder, date = self.host.folder, 20260101 + self._rotations
        if self.style == "number":
            for path in self.old():
                parts = path.name.split(".")
                path.rename(folder / ".".join(("access", "log", str(int(parts[2]) + 1), *parts[3:])))
        names = {"number": "access.log.1", "date": f"access.log-{date}", "date inside": f"access-{date}.log"}
        return folder / names[self.style]

    def rotate(self) -> None:
        if self.stamp == "zero" and not self.host.is_up:
            return  # what was never seen, and has no time, is nobody's
        self.host.log.rename(self._next_name())
        self.host.log.touch()
        self.host.clock.stamp(self.host.log, 0.1)
        self._late = self.host.is_up
        if self.dice.random() < 0.6:
            self.write()
        self.read(2 if self.stamp == "zero" else 0)

    def copy_and_truncate(self) -> None:
        self.read(40)  # what comes between its two steps is lost
        if self.host.log.stat().st_size and (self.stamp != "zero" or self.host.is_up):
            copy = self._next_name()
            shutil.copy(self.host.log, copy)
            self.host.clock.stamp(copy)
            os.truncate(self.host.log, 0)
            self.host.clock.stamp(self.host.log)
            self._late = False
        self.read(10)

    def compress(self) -> None:
        plain = [path for path in self.old() if path.suffix != ".gz"]
        if len(plain) > 1:  # the newest one may still be written to
            pack(plain[0], self.host.clock, self.stamp)

    def write_late(self) -> None:
        plain = [path for path in self.old() if path.suffix != ".gz"]
        if plain and self._late and self.host.is_up:
            self.read(1)
            self.write(plain[-1])

    def an_hour(self) -> None:
        self.read(40)
        self.host.clock.now += 4000
        self.read(3)
        self._late = False

    def kill_or_start(self) -> None:
        if self.host.is_up:
            self.host.kill()
            self._late = False
        else:
            self.host.up()
            self.read(1)

    def finish(self) -> None:
        """What was begun is written to its end."""

    def go_on(self, count: int) -> None:
        deeds: list[Callable[[], None]] = [self.write, self.read, self.rotate, self.kill_or_start, self.compress]
        deeds += [self.copy_and_truncate, self.write_late, self.an_hour]
        for deed in self.dice.choices(deeds, (8, 8, 4, 4, 2, 1, 1, 1), k=count):
            deed()


class Containers(History):
    """An engine writes the lines of two streams in pieces; rotations, and all else, come between any two of them."""

    def __init__(self, host: Host, dice: random.Random) -> None:
        super().__init__(host, dice)
        self._to_write: list[str] = []

    def write(self, path: Path | None = None) -> None:
        for _ in range(self.dice.randrange(1, 5)):
            line = f"192.0.2.1 GET /{len(self.lines)}/{'x' * self.dice.choice((0, 5, 50))} 200"
            self.lines.append(line)
            stream, size = self.dice.choice(("stdout", "stderr")), self.dice.choice((7, 20, 1000))
            *begun, end = (line[start : start + size] for start in range(0, len(line), size))
            head = f"2026-11-24T18:43:46.123456789Z {stream}"
            self._to_write += [*(f"{head} P {piece}" for piece in begun), f"{head} F {end}"]
        self._write_pieces(self.dice.randrange(len(self._to_write) + 1))

    def _write_pieces(self, count: int) -> None:
        pieces, self._to_write = self._to_write[:count], self._to_write[count:]
        self.host.write(pieces, seconds=self.dice.choice((0.001, 0.3, 5, 100)))

    def finish(self) -> None:
        self._write_pieces(len(self._to_write))

    def compress(self) -> None:
        """With a later time stamp, a file of which nothing was read is found, but read too late for its pieces."""
        if self.stamp != "now" or self.host.is_up:
            self.read(40)
            super().compress()

    def copy_and_truncate(self) -> None:
        """No engine does that, nor what comes next."""

    def write_late(self) -> None:
        pass


def live_through(host: Host, seed: str, kind: type[History]) -> None:
    history = kind(host, random.Random(seed))
    history.write()
    host.up()
    history.read(3)
    history.go_on(30)
    history.finish()
    host.settle()
    wanted, got = Counter(history.lines), Counter(host.journalled)
    assert got == wanted, f"{seed}, {history.style}, {history.stamp}: missing {wanted - got}, too many {got - wanted}"
    host.kill()


KINDS = pytest.mark.parametrize("kind", [History, Containers])
PATTERNS = pytest.mark.parametrize("source", ["access.log", "*.log", "*"])


@KINDS
@PATTERNS
def test_whatever_happens_to_files_each_line_is_journalled_once(
    host_of: Callable[..., Host], source: str, kind: type[History]
) -> None:
    for number in range(8):
        live_through(host_of(source), f"{source} {number}", kind)


@pytest.mark.slow
@KINDS
@PATTERNS
def test_whatever_happens_to_files_for_long_each_line_is_journalled_once(
    host_of: Callable[..., Host], source: str, kind: type[History]
) -> None:
    for number in range(1000, 1200):
        live_through(host_of(source), f"{source} {number}", kind)


# ---- By content -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamp", ["keep", "second", "now", "zero"])
def test_what_is_compressed_while_no_client_runs_is_read_on(host_of: Callable[..., Host], stamp: str) -> None:
    host, lines = host_of(), some_lines(30)
    host.write(lines[:10])
    host.settle()
    host.kill()
    host.write(lines[10:20], seconds=0.3)
    pack(host.log.rename(host.log.with_suffix(".log.1")), host.clock, stamp)
    host.write(lines[20:])
    host.settle()
    assert host.journalled == lines


def test_a_file_that_is_compressed_long_after_it_was_read_is_no_new_one(host_of: Callable[..., Host]) -> None:
    """The kubelet: it compresses at the next rotation, and the compressed file is newer than the last line."""
    host, lines = host_of(), some_lines(40)
    for n in range(0, 40, 10):
        for path in host.folder.glob("access.log.*"):
            if path.suffix != ".gz":
                pack(path, host.clock, "now")
        if n:
            host.log.rename(host.log.with_name(f"access.log.20260101-0{n}"))
        host.write(lines[n : n + 10])
        host.settle()
        host.clock.now += 4000
        host.settle()
    assert len(list(host.folder.glob("*.gz"))) == 2
    assert host.journalled == lines


def test_files_of_equal_content_are_each_read(host_of: Callable[..., Host]) -> None:
    """Health checks, in a form without a time; two rotations while no client runs, and two while it does."""
    host, same = host_of(), ["192.0.2.1 GET /health 200"] * 50
    for rotation in range(5):
        if rotation:
            for number in range(rotation - 1, 0, -1):
                host.log.with_name(f"access.log.{number}").rename(host.log.with_name(f"access.log.{number + 1}"))
            host.log.rename(host.log.with_name("access.log.1"))
        host.write(same)
        if rotation == 0:
            host.settle()
            host.kill()
        if rotation == 2:
            host.settle()
    host.settle()
    assert host.journalled == same * 5


@pytest.mark.parametrize("hours", [0, 2])
def test_a_link_that_is_switched_back_is_read_on(host_of: Callable[..., Host], hours: int) -> None:
    host, lines = host_of(), some_lines(40)
    blue, green = host.folder / "blue", host.folder / "green"
    for n, target in enumerate((blue, green, blue, green)):
        host.write(lines[n * 10 : n * 10 + 10], target)
        host.log.unlink(missing_ok=True)
        host.log.symlink_to(target)
        host.settle()
        host.clock.now += hours * 3600
        host.settle()
    assert host.journalled == lines


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_an_edited_copy_in_place_of_the_file_is_read_on(
    host_of: Callable[..., Host], running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """sed -i makes a new file of the same name; here it drops the last lines, and then others are written."""
    host, lines = host_of(), some_lines(40)
    host.write(lines[:30])
    host.settle()
    if not running:
        host.kill()
    edited = host.folder / "sedXY"
    host.write(lines[:20] + lines[30:], edited)
    edited.replace(host.log)
    host.settle()
    assert host.journalled == lines
    assert "is not what was read of it beyond byte" in caplog.text


def test_a_file_with_the_number_of_a_deleted_one_is_no_part_of_it(host_of: Callable[..., Host]) -> None:
    """File systems give the numbers of deleted files away at once: here, that of one that was empty."""
    host, lines = host_of(), some_lines(30)
    host.write([])
    host.up()
    host.steps(0)
    old = host.log.rename(host.log.with_name("access.log.2"))
    host.write(lines[:10])
    host.settle()
    host.kill()
    number = old.stat().st_ino
    host.log.rename(host.log.with_name("access.log.1"))
    host.write(lines[10:20], host.log.with_name("access.log-1"))
    old.replace(host.log)  # what a reused number looks like
    host.write(lines[20:])
    assert host.log.stat().st_ino == number
    host.settle()
    assert host.journalled == lines


def test_what_was_rotated_before_anything_was_read_is_read_in_order(host_of: Callable[..., Host]) -> None:
    host, lines = host_of(), some_lines(30)
    host.write([])
    host.up()
    host.steps(0)
    host.kill()
    for n in (0, 10):
        host.write(lines[n : n + 10])
        host.log.rename(host.log.with_name(f"access.log.2026010{n}"))
    host.write(lines[20:])
    host.settle()
    assert host.journalled == lines


def test_a_new_file_of_equal_lines_is_no_edited_copy_of_a_compressed_one(host_of: Callable[..., Host]) -> None:
    """logrotate, with compress, between two looks: the old file is deleted, as sed -i would have done."""
    host, same = host_of(), ["192.0.2.1 GET /health 200"] * 20
    host.write(same)
    host.settle()
    pack(host.log.rename(host.log.with_name("access.log.1")), host.clock, "keep")
    host.write(same[:5])
    host.settle()
    host.write(same)
    host.settle()
    assert host.journalled == same * 2 + same[:5]


def test_files_that_were_compressed_late_are_read_in_the_order_of_their_names(host_of: Callable[..., Host]) -> None:
    """The kubelet stamps what it compresses with the time of that, after the file that follows was written."""
    for names in (("3", "2", "1"), ("20261124-184346", "20261124-194346", "20261125-184346")):
        host, lines = host_of(), some_lines(50)
        host.write(lines[:10])
        host.settle()
        host.kill()
        for n, name in zip((10, 20, 30), names, strict=True):
            host.log.rename(host.log.with_name(f"access.log.{name}"))
            host.write(lines[n : n + 10])
        for name in names[1::-1]:
            pack(host.log.with_name(f"access.log.{name}"), host.clock, "now")
        host.write(lines[40:])
        host.settle()
        assert host.journalled == lines


# ---- Many files -----------------------------------------------------------------------------------------------------


def test_a_rotation_every_moment_neither_holds_reading_up_nor_takes_descriptors(host_of: Callable[..., Host]) -> None:
    host, lines = host_of(), some_lines(300)
    host.up()
    most = 0
    for n in range(0, 300, 3):
        if n:
            host.log.rename(host.log.with_name(f"access.log.{n}"))
        host.write(lines[n : n + 3], seconds=0.01)
        host.steps(0.5)
        most = max(most, sum(len(one.files) for one in host.sources._followed.values()))
        for old in host.folder.glob("access.log.*"):
            if int(old.suffix[1:]) < n - 60:
                old.unlink()
    behind = 300 - len(host.journalled)
    host.settle()
    assert host.journalled == lines
    assert behind < 30, f"{behind} lines behind"
    assert most < client.WATCHED_FILES + 30


def test_a_new_file_that_cannot_be_opened_does_not_hold_up_the_old_one(
    host_of: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    host, lines = host_of(), some_lines(30)
    host.write(lines[:10])
    host.settle()
    renamed = host.log.rename(host.log.with_name("access.log.1"))
    os.mkfifo(host.log)
    host.write(lines[10:20], renamed)
    before = descriptors(host.folder)
    host.settle()
    assert host.journalled == lines[:20]
    assert caplog.text.count("not a regular file") == 1
    assert descriptors(host.folder) == before
    host.log.unlink()
    host.write(lines[20:])
    host.settle()
    assert host.journalled == lines


def test_a_deleted_file_of_a_pattern_is_closed_and_forgotten_after_an_hour(host_of: Callable[..., Host]) -> None:
    """Pods come and go: neither descriptors nor states may pile up."""
    host = host_of("*.log")
    for n in range(5):
        pod = host.folder / f"pod{n}.log"
        host.write(some_lines(3, f"p{n}"), pod)
        host.settle()
        pod.unlink()
    host.settle()
    assert len(host.sources._followed) == 5
    host.clock.now += 3700
    host.settle()
    assert host.sources._followed == {}
    assert host.sources._journal.sources == {}
    assert descriptors(host.folder) == 0
    host.write(new := some_lines(3, "again"), host.folder / "pod0.log")
    host.settle()
    assert host.journalled[-3:] == new


# ---- Names ----------------------------------------------------------------------------------------------------------


def test_files_with_a_date_inside_that_were_rotated_while_no_client_ran_are_read_once(
    host_of: Callable[..., Host],
) -> None:
    host, lines = host_of("*.log"), some_lines(40)
    host.write(lines[:10])
    host.settle()
    host.kill()
    for n in (10, 20):
        host.write(lines[n : n + 5])
        host.log.rename(host.log.with_name(f"access-202601{n}.log"))
        host.write(lines[n + 5 : n + 10])
    host.write(lines[30:])
    host.settle()
    host.clock.now += 4000
    host.settle()
    assert host.journalled == lines


@pytest.mark.parametrize("source", ["*", "access.log access.log.1", "access.log.1 access.log"])
def test_a_rotated_file_that_was_there_first_is_read_once(host_of: Callable[..., Host], source: str) -> None:
    host, lines = host_of(source), some_lines(40)
    first = host.log.with_name("access.log.1")
    host.write(lines[:10], first)
    host.settle()
    host.write(lines[10:20])
    host.settle()
    for path, name in ((first, "access.log.2"), (host.log, "access.log.1")):
        path.rename(host.log.with_name(name))
    host.write(lines[20:30])
    host.settle()
    host.clock.now += 4000
    host.settle()
    host.kill()
    for name, new in (
        ("access.log.2", "access.log.3"),
        ("access.log.1", "access.log.2"),
        ("access.log", "access.log.1"),
    ):
        host.log.with_name(name).rename(host.log.with_name(new))
    host.write(lines[30:])
    host.settle()
    assert host.journalled == lines


@pytest.mark.parametrize(("log_file", "name"), [("logs-2.txt", "logs-2.txt"), ("journal.%n", "journal.1")])
def test_a_pattern_does_not_follow_journals_of_other_clients(
    host_of: Callable[..., Host], caplog: pytest.LogCaptureFixture, log_file: str, name: str
) -> None:
    """Nor one that is named like a rotated one."""
    host = host_of("*")
    other = client.open_journal(str(host.folder / log_file))
    other.append([b"192.0.2.1 GET /other 200"])
    host.write(some_lines(5))
    host.settle()
    assert host.journalled == some_lines(5)
    assert caplog.text.count(f"{name} is the journal of another client") == 1


def test_a_pattern_follows_neighbours_whose_names_end_in_a_number(host_of: Callable[..., Host]) -> None:
    host = host_of("*")
    lines = []
    for name in ("worker", "worker-2", "worker_1", "worker-3.example.com"):
        host.write([f"192.0.2.1 GET /{name} 200"], host.folder / name)
        lines.append(f"192.0.2.1 GET /{name} 200")
    host.settle()
    assert sorted(host.journalled) == sorted(lines)


@pytest.mark.parametrize(
    ("name", "base", "is_part"),
    [
        *[(f"worker{end}", "worker", True) for end in (".1", "-20261125", "-2026-11-25", "_20261125_12", "-old")],
        *[(f"worker{end}", "worker", True) for end in (".2026-11-25", "-1764054000", ".1.gz", "-20261125-12.gz")],
        *[(f"worker{end}", "worker", False) for end in ("-2", "_1", "-2.1", "-01.example.com", "-2026", "-2-20261125")],
        ("worker-2.1", "worker-2", True),
        ("worker-2-20261125", "worker-2", True),
        ("access.log-1", "access.log", True),
    ],
)
def test_a_number_behind_a_name_is_a_rotations_where_it_cannot_be_a_name(name: str, base: str, is_part: bool) -> None:
    path, of = f"/logs/{name}", f"/logs/{base}"
    assert (client.suffix_of(path, of) is not None) is (of in client.bases_of(path)) is is_part


def test_a_journal_whose_name_a_source_begins_with_is_none_of_it(tmp_path: Path) -> None:
    journal = client.open_journal(str(tmp_path / "access"))
    for name in ("access", "access.journal", "access.source.new", "access.rejected.3"):
        assert journal.owns(str(tmp_path / name))
    for name in ("access.log", "access.log.1", "other.journal"):
        assert not journal.owns(str(tmp_path / name))


# ---- What is lost is said -------------------------------------------------------------------------------------------


def test_a_followed_file_that_was_deleted_while_no_client_ran_is_told(
    host_of: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    host, lines = host_of(), some_lines(30)
    host.write(lines[:10])
    host.settle()
    read = host.log.stat().st_size
    host.kill()
    host.write(some_lines(5, "lost"))
    host.log.unlink()
    host.write(lines[20:])
    host.settle()
    assert host.journalled == lines[:10] + lines[20:]
    assert f"{read} bytes" in caplog.text
    assert "if there were more, these are lost" in caplog.text


def test_a_renamed_file_that_was_deleted_while_no_client_ran_is_told(
    host_of: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    host, lines = host_of(), some_lines(30)
    host.write(lines[:10])
    host.settle()
    renamed = host.log.rename(host.log.with_name("access.log.1"))
    host.write(lines[10:20])
    host.settle()
    host.kill()
    renamed.unlink()
    host.write(lines[20:])
    host.settle()
    assert host.journalled == lines
    assert caplog.text.count("is gone;") == 1


def test_a_pattern_that_matches_nothing_is_told_once(
    host_of: Callable[..., Host], caplog: pytest.LogCaptureFixture
) -> None:
    host = host_of("*.log")
    host.settle()
    assert caplog.text.count("matches no file; waiting") == 1
    host.write(some_lines(3))
    host.settle()
    assert host.journalled == some_lines(3)
