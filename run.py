"""`make run`: the whole pipeline on one machine, from a bare checkout, until Ctrl-C.

    python run.py        (settings: env/*.env; a variable of the environment wins)

It starts the backend (by default with a PostgreSQL of its own under var/), then a client and two background instances,
passes on what they print, and says how far the lines are, as these say in the METRICS_FILE that it gives each of them.
It promises: Ctrl-C ends all of it within 10 seconds and leaves no process behind; started again, it goes on where it
stopped; if a part ends by itself, it says which, and ends the others. It does not restart parts; containers do.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TextIO

import backend
import background
import client
from embedded import stop_leftover_database

HERE = Path(__file__).resolve().parent
EXPORTERS = ("background-1", "background-2")

TICK_SECONDS = 0.1  # how late a signal or the end of a part may be noticed
PROGRESS_SECONDS = 4.0  # two states of METRICS_FILE
BEHIND_SECONDS = 6.0  # whoever is later is named; a poll and the age of METRICS_FILE are normal

# When each step of the end is over at the latest, in seconds from its beginning. It is 10 seconds in all.
# The client takes up to 5 s to deliver what it has if the backend is slow; usually each step is over at once.
CLIENT_ENDS, REST_IS_WRITTEN, BACKGROUND_ENDS, BACKEND_ENDS, DATABASE_ENDS = 5.5, 6.0, 7.5, 9.0, 9.8

# ---- Settings -------------------------------------------------------------------------------------------------------


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=value lines; comments and empty lines are passed over."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def environment(service: str) -> dict[str, str]:
    """What a service is started with: its env file, and above it the environment of this program. Of the defaults, that
    of LOG_FILE is not for here, and that of URL has to wait for the backend's true port."""
    values = read_env_file(HERE / "env" / f"{service}.env")
    for name in ("LOG_FILE", "URL"):
        if values.get(name) == getattr(client.Settings, name.lower()):
            del values[name]
    return {"LOG_FILE": "var/logs.txt", **values, **os.environ}


# ---- What a person reads --------------------------------------------------------------------------------------------


class Screen:
    """Standard output. If it is gone (terminal closed, `| head`), the run goes on in silence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the main thread and of those that pass on what parts print
        self._last = ""

    def say(self, text: str, who: str = "run", renews: bool = False) -> None:
        """One line. On a terminal one that renews itself stays below what parts print, until the run says another."""
        line, terminal = f"{who:<12} | {text}", sys.stdout.isatty()
        with self._lock:
            if who == "run":
                self._last = line[: shutil.get_terminal_size().columns - 1] if renews and terminal else ""
            above = "" if renews and terminal else f"{line}\n"
            try:
                print(f"\r\x1b[K{above}{self._last}" if terminal else above, end="", flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


say = Screen().say


def metrics_of(part: str) -> Mapping[str, float]:
    """What a part wrote into its METRICS_FILE, and how long ago; 0 for what is not there, as when it has just begun."""
    found: dict[str, float] = defaultdict(float)
    path = Path(f"var/{part}.prom")
    with suppress(FileNotFoundError):
        found["age"] = time.time() - path.stat().st_mtime
        for name, value in re.findall(r"^logpipeline_[a-z]+_(\w+)\{.*\} (\S+)$", path.read_text("utf-8"), re.MULTILINE):
            found[name] = float(value)
    return found


class Progress:
    """How many lines this run's client has delivered, how many its background instances have written, and who is late:
    by what it says, or because it says nothing more."""

    def __init__(self) -> None:
        self._delivered, self._written, self._said_at = 0.0, 0.0, time.monotonic()

    def say_if_due(self) -> None:
        seconds = time.monotonic() - self._said_at
        if seconds < PROGRESS_SECONDS:
            return
        sends, *write = map(metrics_of, ("client", *EXPORTERS))
        delivered = sends["lines_stored_total"] + sends["lines_duplicate_total"]
        written = sum(one["records_written_total"] for one in write)
        text = f"delivered {delivered:,.0f} ({(delivered - self._delivered) / seconds:,.0f}/s)"
        text += f"   written {written:,.0f} ({(written - self._written) / seconds:,.0f}/s)"
        late = {  # a client that has come to the end of its input says that it is not up
            "client": sends["oldest_undelivered_seconds"] + sends["age"] * sends["up"],
            "background": min(one["lag_seconds"] + one["age"] for one in write),
        }
        text += "".join(f"   {who} is {late[who]:,.0f} s behind" for who in late if late[who] > BEHIND_SECONDS)
        say(text, renews=True)
        self._delivered, self._written, self._said_at = delivered, written, time.monotonic()


# ---- The parts ------------------------------------------------------------------------------------------------------


class Part:
    """A child process in a session of its own, so that the terminal's Ctrl-C reaches only this program."""

    def __init__(self, name: str, command: str, environ: Mapping[str, str]) -> None:
        self.name = name
        self.address = ""  # where it listens, once it has said so
        metrics = Path(f"var/{name}.prom")
        metrics.unlink(missing_ok=True)  # an earlier run's
        self.process = subprocess.Popen(
            [sys.executable, *command.split()],
            env={**environ, "METRICS_FILE": str(metrics), "PYTHONUNBUFFERED": "1"},
            stdin=None if name == "client" and environ.get("SOURCE") == "-" else subprocess.DEVNULL,
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
            if found := re.search(r"listening on http://(\S+:[0-9]+)", line):
                self.address = found[1].replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")

    def wait(self, deadline: float) -> int:
        """Its exit status. Past the deadline it is killed; so are the children that one which failed has left."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"{self.name} did not end in time: killed")
        if self.process.returncode != 0:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self._reader.join(1)  # what it printed last is shown by now
        return self.process.wait()


def is_behind(settings: background.Settings, seconds: float) -> bool:
    """Whether the backend says, within that time, that it has a newer record than the shared file."""
    with suppress(*background.UNREACHABLE), closing(background.Folder(settings.directory)) as folder:
        position = background.SharedFile(settings.directory, settings.file_name).position(folder)
        source = background.Source(settings, seconds)
        source.ask_for_one()
        return source.newest > (position.created if position else "")
    return False


# ---- The run -------------------------------------------------------------------------------------------------------


def only_run_here() -> TextIO:
    """Keeps others out of the folder as long as it is open; the kernel closes it after a kill. Ends a second run."""
    try:
        os.makedirs("var", exist_ok=True)
        file = open("var/run.lock", "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        sys.exit(f"`make run` is at work in {HERE} already; end that one first")
    except OSError as error:
        sys.exit(f"the folder {HERE / 'var'} cannot be used: {error.strerror}")


class Run:
    """The parts of one run, from the first to the last. What it cannot go on after is one line, and SystemExit."""

    def __init__(self, signals: list[int]) -> None:
        self._signals = signals
        self._parts: list[Part] = []
        self._environ = {service: environment(service) for service in ("backend", "client", "background")}
        try:
            self._backend = backend.read_settings(self._environ["backend"])
            self._client = client.read_settings(self._environ["client"])
            self._background = background.read_settings(self._environ["background"])
        except ValueError as error:
            sys.exit(str(error))
        named = backend.name_of_database
        self._database = "var/postgres" if self._backend.embedded else named(self._backend.conninfo)

    def start(self) -> None:
        """All parts, one after the other."""
        if not self._backend.embedded:  # else the backend does it
            self._start("migrate", "backend.py migrate")
            self.wait_until(lambda: not self._parts)
        server = self._start("backend", "backend.py")
        self.wait_until(lambda: server.address)
        for service in ("client", "background"):
            self._environ[service].setdefault("URL", f"http://{server.address}/api/data")
        self._background = background.read_settings(self._environ["background"])
        self._start("client", "client.py")
        for name in EXPORTERS:
            self._start(name, "background.py")
        say(f"look at it      http://{server.address}/")
        say(f"try the API     http://{server.address}/docs")
        say(f"client's lines  {self._client.log_file.replace('%n', '1')}")
        say(f"shared file     {os.path.join(self._background.directory, self._background.file_name)}")
        say(f"database        {self._database}")
        say("stop            Ctrl-C")

    def _start(self, name: str, command: str) -> Part:
        part = Part(name, command, self._environ[command.split(".")[0]])
        self._parts.append(part)
        return part

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Goes no further after a signal, nor if a part has ended that should not: all but the migrations, and a client
        that has read all of its standard input."""
        while not condition():
            if self._signals:
                sys.exit()
            time.sleep(TICK_SECONDS)
            for part in [part for part in self._parts if part.process.poll() is not None]:
                status = part.wait(0)
                if status != 0 or part.name not in ("migrate", "client"):
                    sys.exit(f"{part.name} ended with exit status {status}, so the run ends")
                self._parts.remove(part)
                if part.name == "client":
                    say("the client has come to the end of its input; the rest goes on until Ctrl-C")

    def close(self) -> None:
        """Ends first who sends, then who writes, then who stores, so that little is left for the next run."""
        say("ending all parts")
        begun = time.monotonic()
        self._end("client", begun + CLIENT_ENDS)
        while (left := begun + REST_IS_WRITTEN - time.monotonic()) > 0 and is_behind(self._background, left):
            time.sleep(TICK_SECONDS)  # the background instances may need a poll or two for what was stored last
        self._end("background", begun + BACKGROUND_ENDS)
        self._end("", begun + BACKEND_ENDS)
        if self._backend.embedded and (pid := stop_leftover_database(begun + DATABASE_ENDS)):
            say(f"the database, process {pid}, has not ended in time")
        say("all parts have ended; `make run` goes on from here")

    def _end(self, name: str, deadline: float) -> None:
        parts = [part for part in self._parts if part.name.startswith(name)]
        for part in parts:
            part.process.terminate()
        for part in parts:
            part.wait(deadline)
            self._parts.remove(part)


def main() -> None:
    os.chdir(HERE)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    with only_run_here(), closing(Run(signals)) as run:
        run.start()
        run.wait_until(Progress().say_if_due)  # which is never true


if __name__ == "__main__":
    main()
