"""kill -9 at every single step of a turn and of a delivery: each system call that can leave something half done."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import FakeBackend, fake_backend, some_lines
from harness import ROOT, Service, assert_same, is_stopped, read_records
from waiting import wait_until

Start = Callable[..., Service]

# Twice from the first step on: what an empty folder asks for, and what the killed ones left
STEPS = [*range(1, 26), *range(1, 41)]
EXPORTER_STEPS = [*range(1, 46), *range(10, 66)]  # a first turn has more of them

# Whose turn it is among the client's threads varies, so some run is killed at each of these by name
CLIENT_STEPS = ("open", "flock", "pread", "write", "fsync", "replace", "request", "getresponse")

# The service as it is, but it kills itself at its KILL_AT-th step, or step of that name; of a write only one half is
# done then.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import fcntl, http.client, os, signal
import SERVICE as service

left, only = int(os.environ["KILL_AT"]), os.environ.get("KILL_IN", "")

def watch(owner, name, halve=False):
    real = getattr(owner, name)
    def step(*arguments, **options):
        global left
        left -= only in ("", name)
        if left == 0 and only in ("", name):
            if halve:
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            print("killed at", name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, name, step)

for name in ("open", "pread", "fsync", "ftruncate", "link", "replace", "unlink", "close", "stat"):
    watch(os, name)
watch(os, "write", halve=True)
watch(fcntl, "flock")
watch(http.client.HTTPConnection, "request")
watch(http.client.HTTPConnection, "getresponse")
sys.exit(service.main(ARGUMENTS))
"""


@pytest.fixture
def step_program(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(service: str, arguments: str) -> Path:
        path = tmp_path / f"{service}_steps.py"
        path.write_text(PROGRAM.replace("SERVICE", service).replace("ARGUMENTS", arguments))
        return path

    return write


def killed_at(service: Service) -> str:
    """Waits for the end; the step that it died at."""
    assert service.process.wait(30) == -9, service.printed
    return str(re.findall(r"killed at (\w+)", service.printed)[-1])


@pytest.mark.slow
def test_an_exporter_killed_at_any_step_leaves_what_the_next_one_goes_on_from(
    start: Start, step_program: Callable[[str, str], Path], tmp_path: Path
) -> None:
    program = step_program("background", "[]")
    folder = tmp_path / "shared"
    lines: list[str] = []
    died: list[str] = []
    with fake_backend() as fake:
        settings = {"URL": fake.data_url, "DIRECTORY": folder, "REQUEST_DELAY": 1}
        for number, step in enumerate(EXPORTER_STEPS):
            lines += add(fake, some_lines(20, tag=f"s{number}"))
            died.append(killed_at(start(program, KILL_AT=step, **settings)))
        for step in range(1, 25):  # the first steps once more, with a torn tail to be cut off
            with (folder / "data.txt").open("ab") as file:
                file.write(b'{"id":"01234567-89ab')
            died.append(killed_at(start(program, KILL_AT=step, **settings)))
            cut_torn_tail(folder / "data.txt")
        lines += add(fake, some_lines(20, tag="last"))
        start("background.py", **settings)
        shared = folder / "data.txt"
        wait_until(lambda: shared.read_bytes().count(b"\n") >= len(lines), 30, "all records")
        (tmp_path / "journal").write_text("\n".join(lines) + "\n")
        assert_same(tmp_path / "journal", read_records(shared))
    assert set(died) >= {"open", "flock", "stat", "pread", "write", "fsync", "replace", "unlink", "close", "ftruncate"}


STOPPED_IN = ("open", "flock", "stat", "pread", "write", "fsync", "link", "replace", "unlink", "close")
STOPS = [*((step, "") for step in range(1, 40)), *((nth, name) for nth in (1, 2) for name in STOPPED_IN)]


@pytest.mark.slow
def test_an_exporter_stopped_at_any_step_finds_what_the_others_did(start: Start, tmp_path: Path) -> None:
    """While it is stopped two others go on, or wait for it if it has the lock; someone removes the lock file and
    renames the shared file. Then it goes on too, or is killed."""
    program = tmp_path / "stopped_at_a_step.py"
    text = PROGRAM.replace("SERVICE", "background").replace("ARGUMENTS", "[]").replace(", halve=True)", ")")
    program.write_text(text.replace("killed at", "stopped at").replace("SIGKILL", "SIGSTOP"))
    folder = tmp_path / "shared"
    folder.mkdir()
    shared, lock = folder / "data.txt", folder / "data.txt.lock"
    stopped: list[str] = []
    parts: list[Path] = []
    dice = random.Random(17)
    with fake_backend() as fake:
        settings = {"URL": fake.data_url, "DIRECTORY": folder}
        others = [start("background.py", **settings, REQUEST_DELAY=30) for _ in range(2)]

        def is_at_its_step(sleeper: Service) -> bool:
            add(fake, some_lines(1, tag=f"m{len(fake.stored)}"))
            if dice.random() < 0.2 and in_file(fake, shared):
                parts.append(shared.rename(shared.with_name(f"data.txt.{len(parts)}")))
            return "stopped at" in sleeper.printed and is_stopped(sleeper.pid)

        for number, (step, name) in enumerate(STOPS):
            sleeper = start(str(program), KILL_AT=step, KILL_IN=name, **settings, REQUEST_DELAY=1)
            wait_until(lambda: is_at_its_step(sleeper), 60, f"a stop at {step} {name}", poll=0.01)  # noqa: B023
            stopped += re.findall(r"stopped at (\w+)", sleeper.printed)
            add(fake, some_lines(5, tag=f"t{number}"))
            if dice.random() < 0.5:
                lock.unlink(missing_ok=True)
            if dice.random() < 0.5 and shared.exists():
                parts.append(shared.rename(shared.with_name(f"data.txt.{len(parts)}")))
            known = len(fake.requests)
            wait_until(lambda: len(fake.requests) > known + 3, 30, "the others' polls")  # noqa: B023
            sleeper.kill(dice.choice((signal.SIGCONT, signal.SIGKILL)))
            add(fake, some_lines(5, tag=f"u{number}"))
            wait_until(lambda: in_file(fake, shared), 30, "the last record")
            sleeper.kill()
            sleeper.process.wait(30)
        assert [other.end() for other in others] == [0, 0]
        parts = [part for part in parts if part.stat().st_size]
        assert read_records(*parts, shared) == fake.records()
    assert set(stopped) >= set(STOPPED_IN)


def in_file(fake: FakeBackend, shared: Path) -> bool:
    return shared.exists() and fake.records()[-1]["id"].encode() in shared.read_bytes()


def cut_torn_tail(file: Path) -> None:
    """Only one torn tail can be there: a second one would be appended to the first."""
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rfind(b"\n") + 1])


def add(fake: FakeBackend, lines: list[str]) -> list[str]:
    fake.add(lines)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["generated", "followed"])
def test_a_client_killed_at_any_step_loses_and_repeats_nothing(
    start: Start, step_program: Callable[[str, str], Path], tmp_path: Path, mode: str
) -> None:
    """Between journal write, send, answer and position write, and in each of them."""
    program = step_program("client", "")
    journal, source = tmp_path / "journal" / "logs.txt", tmp_path / "source"
    source.touch()
    died: list[str] = []
    with fake_backend() as fake:
        settings: dict[str, object] = {"URL": fake.data_url, "LOG_FILE": journal, "REQUEST_DELAY_LIMIT": 5}
        if mode == "followed":
            settings["SOURCE"] = source
        kills = [*((step, "") for step in STEPS), *((1, name) for name in CLIENT_STEPS)]
        for number, (step, name) in enumerate(kills):
            with source.open("a") as file:
                file.write("\n".join(some_lines(20, tag=f"s{number}")) + "\n")
            died.append(killed_at(start(program, KILL_AT=step, KILL_IN=name, **settings)))
        if mode == "followed":
            client = start("client.py", **settings)
            client.wait_for_line("delivering to")
            wait_until(lambda: journal.read_bytes().count(b"\n") >= 20 * len(kills), 30, "the rest of the source")
            assert client.end() == 0
            assert journal.read_text() == source.read_text()
        assert start("client.py", **(settings | {"SOURCE": "-"})).process.wait(30) == 0
        assert_same(journal, fake.records())
    assert set(died) >= set(CLIENT_STEPS)
