"""`make run`: what a person sees who has just cloned the repository, and what is left after Ctrl-C."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from harness import ROOT, children_of, count_lines
from waiting import wait_until

import background
import client
import run as program

NOT_COPIED = shutil.ignore_patterns(".*", "var", "artifacts", "__pycache__")
START_SECONDS = 60.0
END_SECONDS = 10.0
BUSY_SECONDS = 5.0  # more, if the machine has no time for it


class Run:
    """run.py at work in a copy of the checkout, in a process group of its own like a command of a shell."""

    def __init__(
        self, folder: Path, stdin: int | IO[bytes] = subprocess.DEVNULL, stdout: int | None = None, **settings: str
    ) -> None:
        self.folder = folder
        self._output = folder.parent / f"{folder.name}.output"
        plain = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        fast = {"BACKEND_PORT": "0", "REQUEST_DELAY_LIMIT": "50", "REQUEST_DELAY": "100"}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "run.py"],
                cwd=folder,
                env={**plain, **fast, **settings},
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    @property
    def output(self) -> str:
        return self._output.read_text("utf-8")

    @property
    def shared(self) -> list[str]:
        """The shared file's lines."""
        return lines_of(self.folder / "var/shared/data.txt")

    @property
    def journal(self) -> list[str]:
        return lines_of(self.folder / "var/logs.txt")

    def parts(self, script: str) -> list[int]:
        """The process ids of the parts that run that script; not those of a part's own workers."""
        children = children_of(self.process.pid)
        return [pid for pid, command in self.processes().items() if pid in children and script in command.split("\0")]

    def processes(self) -> dict[int, str]:
        """Whatever of this folder's runs is alive, also PostgreSQL; process ids and command lines."""
        return {
            int(entry.name): command
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit()
            for command in [read_or_nothing(entry / "cmdline")]
            if str(self.folder) in command or link_or_nothing(entry / "cwd").startswith(str(self.folder))
        }

    def press_ctrl_c(self, patience_seconds: float = START_SECONDS) -> float:
        """As a terminal does: SIGINT to the whole group. The seconds until the end."""
        begun = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        self.wait(patience_seconds)
        return time.monotonic() - begun

    def wait(self, seconds: float = START_SECONDS) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        """Whatever of it is left: first as a person would, then by force."""
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.press_ctrl_c(END_SECONDS)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.processes(), START_SECONDS, "the end of all that was killed")

    def wait_for_all_parts(self) -> None:
        """It says how to stop it when the last one has been started, which may be after the first records."""
        wait_until(lambda: "Ctrl-C" in self.output, START_SECONDS, "the start of all parts")

    def wait_for_records(self, more_than: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, f"the run has ended: {self.output}"
            return count_lines(self.folder / "var/shared/data.txt") > more_than  # whole ones

        wait_until(there, START_SECONDS, f"more than {more_than} records")


def read_or_nothing(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def link_or_nothing(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def lines_of(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []


def as_line(record: str) -> str:
    log = json.loads(record)["log"]
    return f"{log['ip']} {log['method']} {log['uri']} {log['status_code']}"


def assert_each_line_is_there_once(run: Run) -> None:
    assert Counter(map(as_line, run.shared)) == Counter(run.journal)
    ids = [json.loads(record)["id"] for record in run.shared]
    assert len(set(ids)) == len(ids)
    created = [json.loads(record)["created"] for record in run.shared]
    assert all(earlier < later for earlier, later in itertools.pairwise(created))


def assert_no_process_is_left(run: Run) -> None:
    """All have ended, PostgreSQL but for its last step: before it goes the pid file, for which the backend waits."""
    assert not (run.folder / "var/postgres/postmaster.pid").exists()
    for script, seconds in ((".py", BUSY_SECONDS), ("", START_SECONDS)):  # ours, then all
        wait_until(lambda: not [c for c in run.processes().values() if script in c], seconds, "their end")  # noqa: B023


StartRun = Callable[..., Run]


@pytest.fixture
def start_run(open_folder: Path) -> Iterator[StartRun]:
    """Starts a run in a copy of the checkout; in the same one each time. Nothing of it survives the test."""
    folder = open_folder / "checkout"
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    runs: list[Run] = []

    def start(**options: Any) -> Run:
        runs.append(Run(folder, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.end()
        print(run.output)


def test_lines_come_out_and_the_screen_says_where_and_how_many(start_run: StartRun) -> None:
    run = start_run()
    run.wait_for_records(20)
    progress = r"run +\| delivered [1-9][\d,]* \([\d,]+/s\)   written [1-9][\d,]* \([\d,]+/s\)\n"
    wait_until(lambda: re.search(progress, run.output), START_SECONDS, "progress")
    for text in (r"http://127\.0\.0\.1:\d+/docs", "var/logs.txt", "var/shared/data.txt", "var/postgres", "Ctrl-C"):
        assert re.search(text, run.output), text
    assert len(run.output.splitlines()) < 40, "a person can follow it"


def test_the_progress_names_who_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "PROGRESS_SECONDS", 0.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    (tmp_path / "var").mkdir()
    progress = program.Progress()

    def after(
        seconds_old: float = 0.0, up: int = 1, oldest: float = 0.0, lags: tuple[float, float] = (1.0, 1.0)
    ) -> str:
        stored = {
            "up": up,
            "lines_stored_total": 1000,
            "lines_duplicate_total": 234,
            "oldest_undelivered_seconds": oldest,
        }
        texts = {"client": client.exposition(stored, "client")}
        for name, lag in zip(program.EXPORTERS, lags, strict=True):
            texts[name] = background.exposition({"up": 1, "records_written_total": 600, "lag_seconds": lag}, name)
        for name, text in texts.items():
            file = tmp_path / f"var/{name}.prom"
            file.write_text(text)
            os.utime(file, (now - seconds_old,) * 2)
        progress.say_if_due()
        return re.sub(r"\([\d,]+/s\)", "", capsys.readouterr().out).split("written 1,200 ")[1].strip()

    assert after() == ""
    assert after(oldest=61.0) == "client is 61 s behind"
    assert after(lags=(61.0, 1.0)) == "", "the other one has written it"
    assert after(lags=(61.0, 71.0)) == "background is 61 s behind"
    assert after(seconds_old=60.0) == "client is 60 s behind   background is 61 s behind", "they say nothing more"
    assert after(seconds_old=60.0, up=0) == "background is 61 s behind", "a client may have ended"


@pytest.mark.slow
def test_on_a_terminal_the_progress_is_the_last_line_and_renews_itself(start_run: StartRun) -> None:
    terminal, its_end = pty.openpty()
    run = start_run(stdout=its_end)
    os.close(its_end)
    os.set_blocking(terminal, False)
    screen = ""

    def shows(text: str) -> bool:
        nonlocal screen
        with contextlib.suppress(BlockingIOError):
            screen += os.read(terminal, 65536).decode()
        return text in screen

    for text in (
        "\r\x1b[Krun          | stop            Ctrl-C\r\n",
        "\r\x1b[Krun          | delivered ",
        " s behind\r\nrun          | delivered ",  # it stays below what another part says
    ):
        wait_until(lambda: shows(text), START_SECONDS, repr(text))  # noqa: B023
    os.killpg(run.process.pid, signal.SIGINT)
    wait_until(lambda: shows("| all parts have ended; `make run` goes on from here\r\n"), START_SECONDS, "the end")
    os.close(terminal)
    assert run.wait() == 0
    assert "run          | delivered" not in screen.partition("\r\x1b[Krun          | ending all parts\r\n")[2]


@pytest.mark.slow
def test_standard_input_comes_out_and_its_end_is_not_that_of_the_run(start_run: StartRun, tmp_path: Path) -> None:
    lines = [f"192.0.2.{n} GET /{n} 200" for n in range(100)]
    (tmp_path / "access.log").write_text("".join(f"{line}\n" for line in lines))
    with (tmp_path / "access.log").open("rb") as file:
        run = start_run(stdin=file, SOURCE="-")
    run.wait_for_records(99)
    wait_until(lambda: "the client has come to the end of its input" in run.output, START_SECONDS, "its end")
    assert list(map(as_line, run.shared)) == lines
    wait_until(lambda: "| delivered 100 " in run.output, START_SECONDS, "progress")
    assert run.process.poll() is None
    assert run.press_ctrl_c() < END_SECONDS + BUSY_SECONDS
    assert run.process.returncode == 0


@pytest.mark.slow
def test_without_its_output_the_run_goes_on(start_run: StartRun) -> None:
    reading, writing = os.pipe()
    run = start_run(stdout=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)  # as `| head -1` does
    run.wait_for_records(20)
    already_written = len(run.shared)
    run.wait_for_records(already_written + 20)
    run.press_ctrl_c()
    assert run.process.returncode == 0
    assert_no_process_is_left(run)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["client.py", "background.py", "backend.py"])
def test_ctrl_c_ends_in_ten_seconds_also_what_hangs(start_run: StartRun, script: str) -> None:
    run = start_run()
    run.wait_for_all_parts()
    run.wait_for_records(20)
    for pid in run.parts(script):
        os.kill(pid, signal.SIGSTOP)
    assert run.press_ctrl_c() < END_SECONDS + BUSY_SECONDS
    assert run.process.returncode == 0
    assert re.search(rf"{script.removesuffix('.py')}(-\d)? did not end in time: killed", run.output)
    assert_no_process_is_left(run)


def test_ctrl_c_ends_all_processes_in_ten_seconds_and_the_next_run_goes_on(start_run: StartRun) -> None:
    first = start_run(REQUEST_DELAY="2000")  # so that at its end there is something left to write
    first.wait_for_all_parts()
    first.wait_for_records(50)
    assert len(first.parts("client.py")) == 1
    assert len(first.parts("background.py")) == 2
    assert first.press_ctrl_c() < END_SECONDS + BUSY_SECONDS
    assert first.process.returncode == 0
    assert_no_process_is_left(first)
    assert_each_line_is_there_once(first)
    before = first.shared

    second = start_run()
    second.wait_for_records(len(before) + 50)
    second.press_ctrl_c()
    assert second.process.returncode == 0
    assert second.shared[: len(before)] == before
    assert_each_line_is_there_once(second)
    assert_no_process_is_left(second)


@pytest.mark.slow
def test_sigterm_to_the_run_is_the_same_as_ctrl_c(start_run: StartRun) -> None:
    run = start_run()
    run.wait_for_records(5)
    run.process.terminate()
    assert run.wait(END_SECONDS + BUSY_SECONDS) == 0
    assert_no_process_is_left(run)


def test_ctrl_c_while_it_starts_leaves_nothing_either(start_run: StartRun) -> None:
    run = start_run()
    wait_until(lambda: run.parts("backend.py"), START_SECONDS, "the backend's process")
    assert run.press_ctrl_c() < END_SECONDS + BUSY_SECONDS
    assert run.process.returncode == 0
    assert_no_process_is_left(run)


def test_a_second_run_in_the_same_folder_is_turned_away(start_run: StartRun) -> None:
    first = start_run()
    first.wait_for_records(5)
    already_written = len(first.shared)
    output = subprocess.run(
        [sys.executable, "run.py"], cwd=first.folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert output.returncode == 1
    assert len(output.stderr.splitlines()) == 1
    assert "already" in output.stderr
    assert output.stdout == ""
    first.wait_for_records(already_written)
    assert first.process.poll() is None


@pytest.mark.parametrize(
    ("script", "workers"),
    [
        ("client.py", 1),
        pytest.param("background.py", 1, marks=pytest.mark.slow),
        pytest.param("backend.py", 1, marks=pytest.mark.slow),
        ("backend.py", 2),
    ],
)
def test_if_a_part_dies_the_run_says_which_and_ends_the_others(start_run: StartRun, script: str, workers: int) -> None:
    run = start_run(WORKERS=str(workers))
    run.wait_for_records(5)
    os.kill(run.parts(script)[0], signal.SIGKILL)
    assert run.wait(END_SECONDS + BUSY_SECONDS) == 1
    assert re.fullmatch(
        rf"{script.removesuffix('.py')}(-\d)? ended with exit status -9, .*", run.output.splitlines()[-1]
    )
    assert_no_process_is_left(run)


@pytest.mark.slow
def test_after_a_killed_backend_the_next_run_completes_the_file(start_run: StartRun) -> None:
    first = start_run()
    first.wait_for_records(20)
    os.kill(first.parts("backend.py")[0], signal.SIGKILL)
    first.wait()
    second = start_run()
    second.wait_for_records(len(first.shared) + 20)
    second.press_ctrl_c()
    assert_each_line_is_there_once(second)


def test_a_taken_port_is_one_clear_line(start_run: StartRun) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = start_run(BACKEND_PORT=port)
        assert run.wait() == 1
    assert_one_line_says(run, port, "in use")


def test_an_unreachable_database_is_one_clear_line(start_run: StartRun) -> None:
    run = start_run(DB_HOST="127.0.0.1", DB_PORT="1")
    assert run.wait() == 1
    assert_one_line_says(run, "database", "127.0.0.1", "refused")


@pytest.mark.parametrize(
    ("variable", "value"), [("DIRECTORY", "run.py/shared"), ("LOG_FILE", "run.py/logs.txt")], ids=["shared", "journal"]
)
def test_an_unwritable_folder_is_one_clear_line(start_run: StartRun, variable: str, value: str) -> None:
    run = start_run(**{variable: value})
    assert run.wait() == 1
    complaints = [line for line in run.output.splitlines() if "ERROR" in line]
    assert any(variable in line and value in line for line in complaints)
    assert "Traceback" not in run.output
    assert_no_process_is_left(run)


def test_a_checkout_that_cannot_be_written_to_is_one_clear_line(start_run: StartRun, open_folder: Path) -> None:
    (open_folder / "checkout/var").write_text("a file where the folder should be")
    run = start_run()
    assert run.wait() == 1
    assert_one_line_says(run, str(open_folder / "checkout/var"))
    assert len(run.output.splitlines()) == 1


def test_a_wrong_setting_is_one_clear_line(start_run: StartRun) -> None:
    run = start_run(THREADS="many")
    assert run.wait() == 1
    assert_one_line_says(run, "THREADS", "many", "2 to 256")


def assert_one_line_says(run: Run, *words: str) -> None:
    """One line of output has all the words, there is no stack trace, and no process is left."""
    assert any(all(word in line for word in words) for line in run.output.splitlines()), run.output
    assert "Traceback" not in run.output
    assert_no_process_is_left(run)
