"""`make run`: the whole pipeline on one machine, from a bare checkout, until Ctrl-C.

    python run.py        (settings: env/*.env; a variable of the environment wins)

It starts the backend (by default with a PostgreSQL of its own under var/), waits until that is ready, then
starts one client and two background instances, passes on what they print, and says how far the lines are.
It promises: Ctrl-C ends all of it within 10 seconds and leaves no process behind; started again, it goes on
where it stopped; if a part ends by itself, it says which, and ends the others.
It does not restart parts; containers do.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TextIO

import backend
import background
import client
from embedded import stop_leftover_database

HERE = Path(__file__).resolve().parent

READY_SECONDS = 60.0  # a first start makes a database cluster, seconds on a slow disk
PROGRESS_SECONDS = 3.0
TICK_SECONDS = 0.1  # how late a signal or the end of a part may be noticed

# When each step of the end is over at the latest, in seconds from its beginning. It is 10 seconds in all.
# The client takes up to 5 s to deliver what it has if the backend is slow; usually each step is over at once.
CLIENT_ENDS, REST_IS_WRITTEN, BACKGROUND_ENDS, BACKEND_ENDS, DATABASE_ENDS = 5.5, 6.5, 7.5, 9.0, 9.8

LOG_FILE = "var/logs.txt"  # in place of the client's own default, which is for the folder of whoever starts it by hand

# ---- Settings ----------------------------------------------------------------------------------------------


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=value lines; comments and empty lines are passed over."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def environment(service: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What a service is started with: its env file, and above it the environment of this program."""
    values = read_env_file(HERE / "env" / f"{service}.env")
    if values.get("LOG_FILE") == client.Settings.log_file:
        values["LOG_FILE"] = LOG_FILE
    return {**values, **environ}


# ---- What a person reads -----------------------------------------------------------------------------------


class Screen:
    """Standard output. On a terminal the last line is how far the lines are, and renews itself; else each is a line of
    its own. If the output is gone (terminal closed, `| head`), it goes on in silence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the main thread and of those that pass on what parts print
        self._last = ""  # on a terminal, what the line says that renews itself
        self._renews = sys.stdout.isatty()

    def say(self, text: str, who: str = "run") -> None:
        """One line."""
        with self._lock:
            self._print(f"{self._clear}{who:<12} | {text}\n{self._last}")

    def show(self, text: str) -> None:
        """How far the lines are; "" takes that away from a terminal."""
        if not self._renews:
            if text:
                self.say(text)
            return
        with self._lock:
            columns = os.get_terminal_size().columns if text else 0
            line = f"{'run':<12} | {text}"[: columns - 1] if text else ""
            clear, self._last = self._clear, line
            self._print(clear + line)

    @property
    def _clear(self) -> str:
        return "\r\x1b[K" if self._last else ""

    def _print(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


screen = Screen()
say = screen.say


class LineCount:
    """How many lines a growing file has. Reads only what is new; what was rotated away stays counted."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self.lines = 0

    def update(self, end: Callable[[], int] = lambda: sys.maxsize) -> int:
        """Counts on; in the file that has the name now, up to the byte offset `end`."""
        with contextlib.suppress(OSError):
            if self._file is not None and not self._is_named():
                self._count(sys.maxsize)
                self._file.close()
                self._file = None
            self._file = self._file or open(self._path, "rb")  # noqa: SIM115
            self._count(end())
        return self.lines

    def _is_named(self) -> bool:
        """Whether the file that was counted last is still the one of that name."""
        assert self._file is not None
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))

    def _count(self, end: int) -> None:
        assert self._file is not None
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)
        while chunk := self._file.read(max(0, min(1024**2, end - self._file.tell()))):
            self.lines += chunk.count(b"\n")


class Progress:
    """How many lines the client has journalled, the backend has acknowledged, and the shared file holds."""

    def __init__(self, journal: str, shared_file: str) -> None:
        self._position = f"{journal}.position"
        self._sent, self._answered = LineCount(journal), LineCount(journal)
        self._refused = LineCount(f"{journal}.rejected")
        self._written = LineCount(shared_file)
        self._before = (self.count(), time.monotonic())

    def count(self) -> tuple[int, int, int]:
        stored = self._answered.update(self._acknowledged) - self._refused.update()
        return self._sent.update(), stored, self._written.update()

    def _acknowledged(self) -> int:
        """The byte offset of the journal up to which the client had an answer from the backend."""
        try:
            return int(json.loads(Path(self._position).read_text("utf-8"))["acknowledged"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def line(self) -> str:
        """Totals, and rates since the last time; and which part is behind."""
        counts, now = self.count(), time.monotonic()
        before, then = self._before
        self._before = (counts, now)
        rates = [(new - old) / (now - then) for new, old in zip(counts, before, strict=True)]
        words = zip(("sent", "stored", "written"), counts, rates, strict=True)
        return "   ".join(f"{word} {count:,} ({rate:,.0f}/s)" for word, count, rate in words) + self._behind(before)

    def _behind(self, before: tuple[int, int, int]) -> str:
        """What was there a while ago should have gone on by now."""
        (sent, stored, _), (_, stored_now, written_now) = before, self._before[0]
        late = {"backend": sent - self._refused.lines - stored_now, "background": stored - written_now}
        return "".join(f"   {part} is behind by {lines:,}" for part, lines in late.items() if lines > 0)


# ---- Parts -------------------------------------------------------------------------------------------------


class Failed(Exception):
    """The run cannot go on; the message says why in one line."""


class Part:
    """A child process in a session of its own, so that the terminal's Ctrl-C reaches only this program."""

    def __init__(self, name: str, arguments: list[str], environ: Mapping[str, str]) -> None:
        self.name = name
        self.address = ""  # where it listens, once it has said so
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**environ, "PYTHONUNBUFFERED": "1"},
            stdin=None if environ.get("SOURCE") == "-" and name == "client" else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_on, args=[self.process.stdout], daemon=True)
        self._reader.start()

    def _pass_on(self, output: TextIO) -> None:
        for line in output:
            say(line.rstrip("\n"), self.name)
            found = re.search(r"listening on http://(\S+:[0-9]+)", line)
            if found:
                self.address = found[1].replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs. What it printed last has been shown by then."""
        if self.process.poll() is not None:
            self._reader.join(1)
        return self.process.returncode

    def ask_to_end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Waits for its end; at the deadline kills it."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"{self.name} did not end in time: killed")
            self.kill_group()
            self.process.wait()
        self._reader.join(1)

    def kill_group(self) -> None:
        """The process and its children; also those that a process which died by itself has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def is_ready(address: str) -> bool:
    """Whether the backend there has its database and its tables."""
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# ---- The run -----------------------------------------------------------------------------------------------


class Run:
    """The parts of one run, from the first to the last."""

    def __init__(self, environ: Mapping[str, str], signals: list[int]) -> None:
        """Raises Failed if a setting is wrong."""
        self._signals = signals
        self._backend = environment("backend", environ)
        self._client = environment("client", environ)
        self._background = environment("background", environ)
        try:
            backend_settings = backend.read_settings(self._backend)
            client_settings = client.read_settings(self._client)
            background_settings = background.read_settings(self._background)
        except ValueError as error:
            raise Failed(str(error)) from None
        self.embedded = backend_settings.embedded
        self._database = "PostgreSQL of DATABASE_URL" if backend_settings.database_url else backend_settings.db_host
        self._url_is_open = "URL" not in environ and client_settings.url == client.Settings.url
        self._parts: list[Part] = []
        self.journal = client_settings.log_file.replace("%n", "1")
        self.shared_file = os.path.join(background_settings.directory, background_settings.file_name)

    def start(self) -> None:
        """All parts, one after the other. Raises Failed."""
        if not self.embedded:
            self._migrate()
        address = self._start_backend()
        if self._url_is_open:  # the backend's true port is known only now
            self._client["URL"] = self._background["URL"] = f"http://{address}/api/data"
        if not self._signals:
            self._parts.append(Part("client", ["client.py"], self._client))
            for number in (1, 2):
                self._parts.append(Part(f"background-{number}", ["background.py"], self._background))
            self._say_where(address)

    def _migrate(self) -> None:
        migration = Part("migrate", ["backend.py", "migrate"], self._backend)
        self._parts.append(migration)
        while migration.status is None and not self._signals:
            time.sleep(TICK_SECONDS)
        if migration.status:
            raise Failed(f"the migrations failed with exit status {migration.status}")
        if migration.status == 0:
            self._parts.remove(migration)

    def _start_backend(self) -> str:
        """Its address, as soon as it answers there."""
        backend = Part("backend", ["backend.py"], self._backend)
        self._parts.append(backend)
        deadline = time.monotonic() + READY_SECONDS
        while not self._signals and not (backend.address and is_ready(backend.address)):
            self._check()
            if time.monotonic() > deadline:
                raise Failed(f"the backend was not ready within {READY_SECONDS:.0f} s")
            time.sleep(TICK_SECONDS)
        return backend.address

    def _say_where(self, address: str) -> None:
        for what, where in (
            ("look at it", f"http://{address}/"),
            ("try the API", f"http://{address}/docs"),
            ("client's lines", self.journal),
            ("shared file", self.shared_file),
            ("database", "PostgreSQL in var/postgres" if self.embedded else self._database),
            ("stop", "Ctrl-C"),
        ):
            say(f"{what:<15} {where}")

    def follow(self) -> None:
        """Until a signal comes: says how far the lines are. Raises Failed when a part ends by itself."""
        progress = Progress(self.journal, self.shared_file)
        next_line = time.monotonic() + PROGRESS_SECONDS
        while not self._signals:
            time.sleep(TICK_SECONDS)
            self._check()
            if time.monotonic() >= next_line:
                screen.show(progress.line())
                next_line += PROGRESS_SECONDS

    def _check(self) -> None:
        """Raises Failed if a part has ended. Only a client may: at the end of its standard input."""
        for part in list(self._parts):
            if part.status == 0 and part.name == "client":
                say("the client has come to the end of its input; the rest goes on until Ctrl-C")
                self._parts.remove(part)
            elif part.status is not None:
                raise Failed(f"{part.name} ended with exit status {part.status}, so the run ends")

    def end(self) -> None:
        """First who sends, then who writes, then who stores, so that little is left for the next run."""
        begun = time.monotonic()
        self._end_parts("client", begun + CLIENT_ENDS)
        self._wait_for_the_rest(begun + REST_IS_WRITTEN)
        self._end_parts("background", begun + BACKGROUND_ENDS)
        self._end_parts("", begun + BACKEND_ENDS)
        for part in self._parts:
            if part.status != 0:
                part.kill_group()
        killed = any(part.name == "backend" and part.status != 0 for part in self._parts)
        if self.embedded and killed and (left := stop_leftover_database(begun + DATABASE_ENDS)):
            say(f"the database, process {left}, has not ended in time")

    def _end_parts(self, name: str, deadline: float) -> None:
        parts = [part for part in self._parts if part.name.startswith(name) and part.status is None]
        for part in parts:
            part.ask_to_end()
        for part in parts:
            part.wait(deadline)

    def _wait_for_the_rest(self, deadline: float) -> None:
        """Background instances may need a poll or two for what the backend has stored last."""
        progress = Progress(self.journal, self.shared_file)
        writers = {"backend", "background-1", "background-2"}
        while writers == {part.name for part in self._parts if part.status is None}:
            _, stored, written = progress.count()
            if written >= stored or time.monotonic() > deadline:
                break
            time.sleep(TICK_SECONDS)


@contextlib.contextmanager
def only_run_here() -> Iterator[None]:
    """One run in a folder at a time. The kernel frees the lock of a run that was killed. Raises Failed."""
    try:
        os.makedirs("var", exist_ok=True)
        file = open("var/run.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise Failed(f"the folder {HERE / 'var'} cannot be used: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"`make run` is at work in {HERE} already; end that one first") from None
        yield


def main() -> int:
    os.chdir(HERE)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        with only_run_here():
            run = Run(os.environ, signals)
            try:
                run.start()
                run.follow()
                screen.show("")
                say("ending all parts")
            finally:
                run.end()
    except Failed as error:
        say(str(error))
        return 1
    say("all parts have ended; `make run` goes on from here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
