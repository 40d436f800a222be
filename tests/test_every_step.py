"""kill -9 at every single step of a turn and of a delivery: each system call that can leave something half done."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import FakeBackend, fake_backend, some_lines
from harness import ROOT, Service, assert_same, read_records
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


def cut_torn_tail(file: Path) -> None:
    """Only one torn tail can be there: a second one would be appended to the first."""
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rfind(b"\n") + 1])


def add(fake: FakeBackend, lines: list[str]) -> list[str]:
    fake.add(lines)
    return lines


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
