"""Measures the pipeline against what people would use instead, side by side: `make bench`.

Each row of the table is a contest: ours and the reference take turns, ROUNDS times, on the same machine, the same
PostgreSQL with its default durability, and the same lines. What counts is the ratio of the two medians; the spread says
how far the rounds lie apart. The table is printed; that of a whole run goes into the README, results.json, ratios.svg.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from fakes import some_lines
from harness import ROOT, Backend, Postgres, Service, backend_with, cpu_seconds, past_the_guard, peak_memory_bytes
from psycopg.conninfo import conninfo_to_dict
from waiting import wait_until

HERE = Path(__file__).resolve().parent
TOOLS = ("wrk", "rsyslogd", "curl")
MIB = 1024**2
SECONDS = 300  # no part takes nearly as long

SHIPPED = 100_000  # lines
EXPORTED = 1_000_000  # records
WINDOW, SMALL_TABLE, LARGE_TABLE = 1000, 100_000, 10_000_000  # records
EXPORTERS = 8

# The JSON of a record, as GET gives it
RECORD = """
SELECT '{"id":"' || id
       || '","created":"' || to_char(created AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
       || '","log":{"ip":"' || host(ip)
       || '","method":"' || method
       || '","uri":' || to_json(uri)
       || ',"status_code":' || status_code
       || '}}'
  FROM logs
 ORDER BY created
"""

# Control characters as quote and delimiter leave the JSON as it is
COPY_JSON = f"COPY ({' '.join(RECORD.split())}) TO STDOUT (FORMAT csv, QUOTE e'\\x01', DELIMITER e'\\x02')"

FILL = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT ('00000000-0000-8000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
       '2026-01-01T00:00:00Z'::timestamptz + n * interval '1 millisecond',
       ('10.' || n / 65536 %% 256 || '.' || n / 256 %% 256 || '.' || n %% 256)::inet,
       (ARRAY['GET', 'POST', 'PUT', 'DELETE'])[n %% 4 + 1],
       'https://domain.com/example/' || to_hex(n),
       (ARRAY[200, 201, 301, 404, 500])[n %% 5 + 1]
  FROM generate_series(1, %s) AS n
"""

TICKS_PER_SECOND = float(os.sysconf("SC_CLK_TCK"))
OWN_STAT = "SELECT pg_read_file('/proc/self/stat')"  # of the session itself

# ---- Contests -------------------------------------------------------------------------------------------------------


@dataclass
class Contest:
    """One row of the table. A ratio above 1 means that ours is better, unless `smaller_is_better` says otherwise."""

    number: int
    work: str
    reference: str
    unit: str
    aim: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ours) / statistics.median(self.theirs) if self.theirs else None

    def alternate(self, rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
        for _ in range(rounds):
            self.theirs.append(theirs())
            self.ours.append(ours())
            print(f"    {self.work}: {self.ours[-1]:,.4g} to {self.theirs[-1]:,.4g} {self.unit}", flush=True)


def spread(values: list[float]) -> str:
    """How far the rounds lie from their median."""
    middle = statistics.median(values)
    return f"±{max(abs(value - middle) for value in values) / middle:.0%}" if len(values) > 1 and middle else ""


class Bench:
    """The parts that contests run on: a PostgreSQL and a folder. What is started inside `part` ends with it."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder = folder
        self.rounds = rounds
        self.postgres = Postgres(folder / "postgres")
        self._numbers = itertools.count()

    def new_folder(self) -> Path:
        path = self.folder / f"round_{next(self._numbers)}"
        path.mkdir(mode=0o777)
        return path

    def backend(self, stack: ExitStack, url: str = "", **settings: Any) -> Backend:
        backend = Backend(self.new_folder() / "backend.out", url or self.postgres.create_logs(), **settings)
        stack.callback(backend.destroy)
        return backend

    def service(self, stack: ExitStack, script: str, **settings: Any) -> Service:
        service = Service(script, self.new_folder() / "out", **settings)
        stack.callback(service.destroy)
        return service

    def run(self, stack: ExitStack, *command: str | Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    def psql(self, url: str, *commands: str, output: Path | None = None) -> None:
        options = [part for command in commands for part in ("-c", command)]
        with ExitStack() as stack:
            stdout: Any = stack.enter_context(output.open("wb")) if output else subprocess.DEVNULL
            program = self.postgres.programs / "psql"
            subprocess.run([program, "-q", "-v", "ON_ERROR_STOP=1", url, *options], check=True, stdout=stdout)


@contextmanager
def new_bench(rounds: int) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        bench = Bench(folder, rounds)
        try:
            yield bench
        finally:
            bench.postgres.stop("immediate")


def count(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM logs").fetchone()
        assert row is not None
        return int(row[0])


def wait_for_count(url: str, wanted: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:

        def all_there() -> bool:
            row = connection.execute("SELECT count(*) FROM logs").fetchone()
            return row is not None and int(row[0]) >= wanted

        wait_until(all_there, SECONDS, f"{wanted} records", poll=0.1)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---- 1: one line per POST -------------------------------------------------------------------------------------------


def wrk(url: str, seconds: int = 6) -> float:
    """Requests per second over 32 connections. Fails if one was not answered well."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "--timeout", "20s", "-s", str(HERE / "one_line.lua"), url]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+)", printed)
    assert found, printed
    assert found[3] == "0", printed
    return int(found[1]) / int(found[2]) * 1e6


def single_lines(bench: Bench) -> Iterator[Contest]:
    contest = Contest(1, "one line per POST, 32 connections", "falcon + waitress, 201 and nothing stored",
                      "requests/s", "≥ 0.75")  # fmt: skip

    def ours() -> float:
        with ExitStack() as stack:
            backend = bench.backend(stack)
            wrk(backend.data_url, 1)
            before = count(backend.database_url)
            rate = wrk(backend.data_url)
            assert count(backend.database_url) - before >= rate * 6 * 0.99
            return rate

    def theirs() -> float:
        with ExitStack() as stack:
            process = bench.run(stack, sys.executable, HERE / "reference.py", "32")
            assert process.stdout is not None
            url = process.stdout.readline().decode().split()[-1] + "/api/data"
            wrk(url, 1)
            return wrk(url)

    contest.alternate(bench.rounds, ours, theirs)
    yield contest


# ---- 2: batches -----------------------------------------------------------------------------------------------------


def post_bodies(url: str, kind: str, bodies: list[bytes], connections: int) -> float:
    """Seconds for all of them. Requests are made beforehand, so that the sender costs next to nothing."""
    host, port = url.split("/")[2].split(":")
    head = f"POST /api/data HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: "
    requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]

    def send(part: list[bytes]) -> None:
        with socket.create_connection((host, int(port))) as connection:
            for request in part:
                connection.sendall(request)
                answer = b""
                while b'"rejected"' not in answer:
                    more = connection.recv(65536)
                    assert more, answer
                    answer += more
                assert re.match(rb'HTTP/1.1 201.*"accepted": 1000', answer, re.DOTALL), answer

    with ThreadPoolExecutor(connections) as pool:
        began = time.perf_counter()
        list(pool.map(send, [requests[n::connections] for n in range(connections)]))
        return time.perf_counter() - began


def own_cpu_seconds(printed: str) -> float:
    """User and system time of the session that printed its /proc/self/stat last."""
    found = re.search(r"\(postgres\) (.+)", printed)
    assert found, printed
    return sum(map(int, found[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def sessions_cpu_seconds(url: str) -> float:
    """User and system time so far of all sessions of a database."""
    with psycopg.connect(url, autocommit=True) as connection:
        pids = connection.execute(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        ).fetchall()
        return cpu_seconds(*(pid for (pid,) in pids))


def batches(bench: Bench) -> Iterator[Contest]:
    lines = some_lines(200_000)
    rows = [line.split() for line in lines]
    ours_cpu: list[float] = []
    theirs_cpu: list[float] = []

    def copied(lines_each: int = len(lines)) -> float:
        url, printed = bench.postgres.create_logs(), bench.folder / "printed"
        folder, commands = bench.new_folder(), []
        for start in range(0, len(rows), lines_each):
            source = folder / f"{start}.csv"
            with source.open("w") as file:
                for n, (ip, method, uri, status) in enumerate(rows[start : start + lines_each], start):
                    created = f"2026-11-23T{n // 36000:02}:{n // 600 % 60:02}:{n // 10 % 60:02}.{n % 10}Z"
                    file.write(f"{new_id(n)},{created},{ip},{method},{uri},{status}\n")
            commands.append(f"\\copy logs (id, created, ip, method, uri, status_code) FROM '{source}' (FORMAT csv)")
        began = time.perf_counter()
        bench.psql(url, "SET session_replication_role = replica", *commands, OWN_STAT, output=printed)
        seconds = time.perf_counter() - began
        theirs_cpu.append(own_cpu_seconds(printed.read_text()))
        return len(rows) / seconds

    def posted(kind: str) -> float:
        with ExitStack() as stack:
            backend = bench.backend(stack, WORKERS=2)
            bodies = []
            for start in range(0, len(lines), 1000):
                part = lines[start : start + 1000]
                items = [{"id": new_id(start + n), "log": line} for n, line in enumerate(part)]
                text = json.dumps(items) if kind == "application/json" else "".join(f"{line}\n" for line in part)
                bodies.append(text.encode())
            seconds = post_bodies(backend.data_url, kind, bodies, connections=4)
            ours_cpu.append(sessions_cpu_seconds(backend.database_url))
            assert count(backend.database_url) == len(lines)
            return len(lines) / seconds

    for kind in ("application/json", "text/plain"):
        contest = Contest(2, f"1,000 lines per POST, 4 connections, 2 workers, {kind}",
                          "psql \\copy of the same rows", "lines/s", "≥ 0.8")  # fmt: skip
        contest.alternate(bench.rounds, lambda kind=kind: posted(kind), copied)  # type: ignore[misc]
        contest.notes = {
            "PostgreSQL's CPU, µs a line": round(1e6 * statistics.median(ours_cpu) / len(lines), 1),
            "with \\copy": round(1e6 * statistics.median(theirs_cpu) / len(lines), 1),
        }
        by_thousand = statistics.median(copied(1000) for _ in range(bench.rounds))
        contest.notes["\\copy with a commit for each 1,000 lines"] = f"{by_thousand:,.0f} lines/s"
        ours_cpu.clear()
        theirs_cpu.clear()
        yield contest


def new_id(number: int) -> str:
    """Like the client's: a random part, and an offset that grows."""
    return f"{PREFIX}{number * 60:012x}"


PREFIX = str(uuid.UUID(int=uuid.uuid4().int & ~(0xF << 76) | 0x8 << 76))[:24]


# ---- 3 and 9: a file is shipped -------------------------------------------------------------------------------------


def access_log(path: Path, lines: int) -> None:
    """A file in the combined log format."""
    dice = random.Random(1)
    with path.open("w") as file:
        for n in range(lines):
            ip = f"{dice.randrange(1, 224)}.{dice.randrange(256)}.{dice.randrange(256)}.{dice.randrange(256)}"
            request = f"{dice.choice(('GET', 'GET', 'POST'))} /shop/{n % 977}/item-{n}?ref=start HTTP/1.1"
            file.write(f'{ip} - - [23/Nov/2026:18:43:46 +0000] "{request}" {dice.choice((200, 301, 404))} '
                       f'{dice.randrange(9999)} "https://domain.com/" "Mozilla/5.0 (X11; Linux x86_64)"\n')  # fmt: skip


RSYSLOG = """
module(load="imfile")
{module}
global(workDirectory="{folder}" maxMessageSize="16k")
main_queue(queue.type="LinkedList" queue.size="200000" queue.dequeueBatchSize="1000")
input(type="imfile" File="{source}" Tag="access" ruleset="access")
template(name="row" type="string" option.sql="on" string="{template}")
ruleset(name="access" queue.type="LinkedList" queue.size="200000" queue.dequeueBatchSize="1000") {{
    action({action} template="row")
}}
"""
FIELDS = tuple(f"%msg:F,32:{number}%" for number in (1, 6, 7, 9))  # of the combined format: IP, "METHOD, URI, STATUS
INSERT = (
    "insert into logs (id, created, ip, method, uri, status_code) values (gen_random_uuid(), clock_timestamp(), "
    f"'{FIELDS[0]}', ltrim('{FIELDS[1]}', chr(34)), '{FIELDS[2]}', {FIELDS[3]})"
)


def rsyslog(bench: Bench, stack: ExitStack, source: Path, **parts: str) -> subprocess.Popen[bytes]:
    folder = bench.new_folder()
    config = folder / "rsyslog.conf"
    config.write_text(RSYSLOG.format(folder=folder, source=source, **parts))
    return bench.run(stack, "rsyslogd", "-n", "-f", config, "-i", folder / "pid")


def rsyslog_to_postgres(bench: Bench, stack: ExitStack, source: Path, url: str) -> subprocess.Popen[bytes]:
    name = conninfo_to_dict(url)["dbname"]
    return rsyslog(
        bench, stack, source, module='module(load="ompgsql")', template=INSERT,
        action=f'type="ompgsql" server="{bench.postgres.socket_folder}" db="{name}" user="postgres" pass=""',
    )  # fmt: skip


def shipping(bench: Bench) -> Iterator[Contest]:
    source = bench.folder / "access.log"
    access_log(source, SHIPPED)
    contest = Contest(3, f"{SHIPPED:,} lines of a file into the table", "rsyslog, imfile + ompgsql", "lines/s", "≥ 5")

    def ours() -> float:
        with ExitStack() as stack:
            backend = bench.backend(stack)
            began = time.perf_counter()
            bench.service(stack, "client.py", URL=backend.data_url, SOURCE=source, LOG_FILE=bench.new_folder() / "logs")
            wait_for_count(backend.database_url, SHIPPED)
            return SHIPPED / (time.perf_counter() - began)

    def theirs() -> float:
        with ExitStack() as stack:
            url = bench.postgres.create_logs()
            bench.psql(url, "ALTER TABLE logs DISABLE TRIGGER logs_guard")  # which refuses rows of others
            began = time.perf_counter()
            rsyslog_to_postgres(bench, stack, source, url)
            wait_for_count(url, SHIPPED)
            return SHIPPED / (time.perf_counter() - began)

    contest.alternate(bench.rounds, ours, theirs)
    yield contest


def whole_pipeline(bench: Bench) -> Iterator[Contest]:
    source = bench.folder / "access.log"
    access_log(source, SHIPPED)
    contest = Contest(9, f"{SHIPPED:,} lines from file to shared file, all parts on one machine",
                      "rsyslog, imfile + omfile, through memory", "lines/s", "stated")  # fmt: skip
    ours_cpu, theirs_cpu = [], []

    def ours() -> float:
        with ExitStack() as stack:
            backend = bench.backend(stack)
            folder = bench.new_folder()
            exporters = [bench.service(stack, "background.py", URL=backend.data_url, DIRECTORY=folder) for _ in "ab"]
            for exporter in exporters:
                exporter.wait_for_line("appending")
            postgres_before = cpu_seconds(*bench.postgres.pids)
            before = cpu_seconds(backend.pid)
            began = time.perf_counter()
            client = bench.service(stack, "client.py", URL=backend.data_url, SOURCE=source, LOG_FILE=folder / "logs")
            wait_for_lines(folder / "data.txt", SHIPPED)
            seconds = time.perf_counter() - began
            pids = [backend.pid, client.pid, *(exporter.pid for exporter in exporters)]
            ours_cpu.append(cpu_seconds(*pids) - before + cpu_seconds(*bench.postgres.pids) - postgres_before)
            return SHIPPED / seconds

    def theirs() -> float:
        with ExitStack() as stack:
            target = bench.new_folder() / "data.txt"
            began = time.perf_counter()
            process = rsyslog(bench, stack, source, module="", action=f'type="omfile" file="{target}"',
                              template=" ".join((*FIELDS, "\\n")))  # fmt: skip
            wait_for_lines(target, SHIPPED)
            seconds = time.perf_counter() - began
            theirs_cpu.append(cpu_seconds(process.pid))
            return SHIPPED / seconds

    contest.alternate(bench.rounds, ours, theirs)
    contest.notes = {
        "CPU seconds per million lines, ours": round(statistics.median(ours_cpu) / SHIPPED * 1e6, 1),
        "CPU seconds per million lines, rsyslog": round(statistics.median(theirs_cpu) / SHIPPED * 1e6, 1),
    }
    yield contest


def wait_for_lines(path: Path, wanted: int) -> None:
    """Counts what is new only: a look must cost little."""
    seen = lines = 0
    deadline = time.monotonic() + SECONDS
    while lines < wanted:
        assert time.monotonic() < deadline, f"{lines} of {wanted} lines in {path}"
        if size(path) > seen:
            with path.open("rb") as file:
                file.seek(seen)
                data = file.read()
            seen, lines = seen + len(data), lines + data.count(b"\n")
        else:
            time.sleep(0.01)


# ---- 4 and 6: exports -----------------------------------------------------------------------------------------------


def filled(bench: Bench, records: int) -> str:
    """The URL of a database with so many records. Indexes are built afterwards, which is quicker."""
    url = bench.postgres.create_logs()
    with past_the_guard(url) as connection:
        indexes = connection.execute(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
            " WHERE indrelid = 'logs'::regclass AND NOT indisunique"
        ).fetchall()
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        connection.execute(FILL, [records])
        for _, definition in indexes:
            connection.execute(definition)
        connection.execute("VACUUM ANALYZE logs")
        connection.execute("CHECKPOINT")
    return url


def curl(url: str, target: Path, accept: str = "application/x-ndjson") -> float:
    """Seconds."""
    began = time.perf_counter()
    subprocess.run(["curl", "-sSf", "-H", f"Accept: {accept}", "-o", target, url], check=True)
    return time.perf_counter() - began


def exports(bench: Bench) -> Iterator[Contest]:
    url = filled(bench, EXPORTED)
    copied, fetched = bench.folder / "copied", bench.folder / "fetched"

    def copy() -> float:
        began = time.perf_counter()
        bench.psql(url, COPY_JSON, output=copied)
        return EXPORTED / (time.perf_counter() - began)

    for name, accept in (("NDJSON", "application/x-ndjson"), ("a JSON array", "application/json")):
        contest = Contest(4, f"{EXPORTED:,} records over HTTP as {name}", "psql COPY of the same JSON to a file",
                          "records/s", "≥ 0.9; < 100 MB")  # fmt: skip
        with ExitStack() as stack:
            backend = bench.backend(stack, url)

            def export(backend: Backend = backend, accept: str = accept) -> float:
                return EXPORTED / curl(backend.data_url, fetched, accept)

            contest.alternate(bench.rounds, export, copy)
            contest.notes["backend's peak memory, MB"] = round(peak_memory_bytes(backend.pid) / MIB)
        text = fetched.read_bytes()
        assert (text if name == "NDJSON" else text[1:-2].replace(b",\n", b"\n") + b"\n") == copied.read_bytes()
        yield contest

    contest = Contest(6, f"background.py catches up {EXPORTED:,} records, flushed to disk",
                      "curl of the same export to a file", "records/s", "≥ 0.8; < 100 MB")  # fmt: skip
    memory = []
    with ExitStack() as outer:
        backend = bench.backend(outer, url)

        def catch_up() -> float:
            with ExitStack() as stack:
                folder = bench.new_folder()
                began = time.perf_counter()
                exporter = bench.service(stack, "background.py", URL=backend.data_url, DIRECTORY=folder)
                file = folder / "data.txt"
                wait_until(lambda: size(file) >= size(copied), SECONDS, "all records", poll=0.01)
                wait_until(lambda: not (folder / "data.txt.lock").exists(), SECONDS, "the end of the turn", poll=0.005)
                seconds = time.perf_counter() - began
                memory.append(peak_memory_bytes(exporter.pid))
                assert file.read_bytes() == copied.read_bytes()
                file.unlink()
                return EXPORTED / seconds

        contest.alternate(bench.rounds, catch_up, lambda: EXPORTED / curl(backend.data_url, fetched))
    contest.notes["background.py's peak memory, MB"] = round(max(memory) / MIB)
    yield contest


# ---- 5: windows -----------------------------------------------------------------------------------------------------


def windows(bench: Bench) -> Iterator[Contest]:
    contest = Contest(5, f"a window of {WINDOW:,} records in a table of {LARGE_TABLE:,}",
                      f"the same in a table of {SMALL_TABLE:,}", "ms", "≤ 1.3")  # fmt: skip
    with ExitStack() as stack:
        large, small = (bench.backend(stack, filled(bench, records)).data_url for records in (LARGE_TABLE, SMALL_TABLE))
        dice = random.Random(1)

        def fetch(url: str, records: int) -> float:
            """The median of 100 windows, in milliseconds."""
            times = []
            target = bench.folder / "window"
            for _ in range(100):
                first = dice.randrange(records - WINDOW)
                start, end = (1767225600 + (first + n) / 1000 for n in (0, WINDOW))
                times.append(fetch_window(f"{url}?date_from={start:.3f}&date_to={end:.3f}", target))
            return statistics.median(times) * 1000

        contest.alternate(bench.rounds, lambda: fetch(large, LARGE_TABLE), lambda: fetch(small, SMALL_TABLE))
    yield contest


def fetch_window(url: str, target: Path, records: int = WINDOW) -> float:
    """Seconds."""
    written = subprocess.run(
        ["curl", "-sSf", "-o", target, "-w", "%{time_total}", url], check=True, capture_output=True
    )
    assert len(json.loads(target.read_bytes())) == records
    return float(written.stdout)


# ---- 7: many exporters on one file ----------------------------------------------------------------------------------


def crowd(bench: Bench) -> Iterator[Contest]:
    contest = Contest(7, f"{EXPORTERS} background instances on one file, steady stream", "one instance",
                      "records/s", "≥ 0.9; each once")  # fmt: skip

    def stream(instances: int) -> float:
        """Records per second in the file, from the first POST to the last record."""
        with ExitStack() as stack:
            backend = bench.backend(stack)
            folder = bench.new_folder()
            for _ in range(instances):
                service = bench.service(stack, "background.py", URL=backend.data_url, DIRECTORY=folder)
                service.wait_for_line("appending")
            began = time.perf_counter()
            for n in range(100):  # 10 s
                lines = some_lines(500, tag=f"t{n}")
                post_bodies(backend.data_url, "text/plain", ["".join(f"{line}\n" for line in lines * 2).encode()], 1)
                time.sleep(max(0.0, began + (n + 1) * 0.1 - time.perf_counter()))
            wait_for_lines(folder / "data.txt", 100_000)
            seconds = time.perf_counter() - began
            ids = [json.loads(line)["id"] for line in (folder / "data.txt").open()]
            assert len(ids) == len(set(ids)) == count(backend.database_url) == 100_000
            return 100_000 / seconds

    contest.alternate(bench.rounds, lambda: stream(EXPORTERS), lambda: stream(1))
    yield contest


# ---- 8: how long a line takes ---------------------------------------------------------------------------------------


def latency(bench: Bench) -> Iterator[Contest]:
    period_ms = 1000
    contest = Contest(8, "one line from generated to in the shared file, light load, 99th percentile",
                      f"the poll period of {period_ms} ms", "ms", "≤ the period + 100 ms")  # fmt: skip
    for _ in range(bench.rounds):
        with ExitStack() as stack:
            backend = bench.backend(stack)
            folder = bench.new_folder()
            bench.service(stack, "background.py", URL=backend.data_url, DIRECTORY=folder, REQUEST_DELAY=period_ms)
            bench.service(stack, "client.py", URL=backend.data_url, LOG_FILE=folder / "logs.txt",
                          REQUEST_DELAY_LIMIT=200)  # fmt: skip
            with ThreadPoolExecutor(2) as pool:
                generated, written = pool.map(arrivals, (folder / "logs.txt", folder / "data.txt"), (400, 400))
        times = sorted((end - start) * 1000 for start, end in zip(generated, written, strict=True))
        contest.ours.append(times[int(len(times) * 0.99)])
        contest.theirs.append(period_ms)
        print(f"    {contest.work}: {contest.ours[-1]:.0f} ms, median {statistics.median(times):.0f} ms", flush=True)
    yield contest


def arrivals(path: Path, wanted: int) -> list[float]:
    """When each line was there, to about a millisecond. One client's lines are in the file in its order."""
    times: list[float] = []
    seen = 0
    deadline = time.monotonic() + SECONDS
    while len(times) < wanted:
        assert time.monotonic() < deadline, f"{len(times)} of {wanted} lines in {path}"
        if size(path) > seen:
            with path.open("rb") as file:
                file.seek(seen)
                data = file.read()
            seen += len(data)
            times += [time.perf_counter()] * data.count(b"\n")
        time.sleep(0.001)
    return times[:wanted]


# ---- 10: idle connections -------------------------------------------------------------------------------------------

IDLE = 3000
ONE_LINE = (
    b"POST /api/data HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 34\r\n\r\n"
    b'{"log": "203.0.113.7 GET / 200\\n"}'
)


def post_lines_one_by_one(address: tuple[str, int], posts: int) -> None:
    with socket.create_connection(address) as connection:
        for _ in range(posts):
            connection.sendall(ONE_LINE)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536) or b" closed }"
            assert answer.startswith(b"HTTP/1.1 201"), answer


def idle_connections(bench: Bench) -> Iterator[Contest]:
    contest = Contest(10, f"CPU of one line per POST, 4 connections, {IDLE:,} idle ones beside",
                      "the same without idle ones", "us of the backend", "≤ 1.3")  # fmt: skip
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def cpu_per_post(idle: int) -> float:
        posts = 2_000
        with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
            backend = bench.backend(stack)
            host, port = backend.url.split("/")[2].split(":")
            address = (host, int(port))
            for _ in range(idle):
                stack.enter_context(socket.create_connection(address))
            post_lines_one_by_one(address, 500)
            before = cpu_seconds(backend.pid)
            list(pool.map(lambda _: post_lines_one_by_one(address, posts), range(4)))
            return (cpu_seconds(backend.pid) - before) / (4 * posts) * 1e6

    contest.alternate(bench.rounds, lambda: cpu_per_post(IDLE), lambda: cpu_per_post(0))
    yield contest


# ---- 11: retention --------------------------------------------------------------------------------------------------

EXPIRED = 1_000_000  # records: more than are deleted while it is measured
BATCHES = 100


def retention(bench: Bench) -> Iterator[Contest]:
    template = str(conninfo_to_dict(filled(bench, EXPIRED))["dbname"])
    inserts = Contest(11, "1,000 lines per POST while expired records are deleted", "the same without retention",
                      "lines/s", "≥ 0.9")  # fmt: skip
    reads = Contest(11, f"a window of {WINDOW:,} records while expired records are deleted",
                    "the same without retention", "ms", "≤ 1.2")  # fmt: skip
    body = "".join(f"{line}\n" for line in some_lines(WINDOW)).encode()
    bodies = [body] * BATCHES
    windows: dict[int, float] = {}

    def measure(days: int) -> float:
        """Lines stored per second; the median time of a window goes into `windows`, in milliseconds."""
        with ExitStack() as stack:
            folder = bench.new_folder()
            url = bench.postgres.create_database(template=template)
            script = backend_with(folder, EXPIRY_PAUSE_SECONDS=0.1)
            backend = bench.backend(stack, url, script=script, RETENTION_DAYS=days)
            began = time.time() - 60
            post_bodies(backend.data_url, "text/plain", [body], 1)  # now all else has expired
            if days:
                backend.wait_for_line("retention: deleting")
            address = f"{backend.data_url}?date_from={began:.3f}"
            times = [fetch_window(address, folder / "window") for _ in range(100)]
            windows[days] = statistics.median(times) * 1000
            rate = BATCHES * WINDOW / post_bodies(backend.data_url, "text/plain", bodies, 4)
            left = count(url) - (BATCHES + 1) * WINDOW
            assert 1 < left < EXPIRED if days else left == EXPIRED, f"{left} of the expired records are left"
            return rate

    for _ in range(bench.rounds):
        inserts.alternate(1, lambda: measure(1), lambda: measure(0))
        reads.alternate(1, lambda: windows[1], lambda: windows[0])
    yield inserts
    yield reads


# ---- Table ----------------------------------------------------------------------------------------------------------

MARKS = ("<!-- make bench -->", "<!-- end of make bench -->")  # in the README


def write_between(marks: tuple[str, str], file: Path, text: str) -> None:
    """In place of what stands there."""
    before, _, rest = file.read_text().partition(marks[0])
    file.write_text(f"{before}{marks[0]}\n{text}{marks[1]}{rest.partition(marks[1])[2]}")


COLUMNS = ("#", "work", "ours", "reference", "unit", "ratio", "aim", "beside that")


def figure(values: list[float]) -> str:
    """The median, to three digits, and how far the rounds lie apart."""
    middle = float(f"{statistics.median(values):.3g}")
    return f"{middle:{',.0f' if middle >= 100 else 'g'}} {spread(values)}".strip()


def cells(contest: Contest) -> tuple[str, ...]:
    beside = ", ".join(f"{name} {value}" for name, value in contest.notes.items())
    return (
        str(contest.number), contest.work, figure(contest.ours), f"{figure(contest.theirs)} ({contest.reference})",
        contest.unit, f"{contest.ratio:.2f}", contest.aim, beside,
    )  # fmt: skip


def table(contests: list[Contest]) -> str:
    """Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, contests)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def chart(contests: list[Contest]) -> str:
    """SVG: a bar for each ratio, the reference's 1 as a line. Wide ratios are cut off at the edge and written out."""
    left, unit, most, high = 470, 180, 2.0, 26
    rows = []
    for n, contest in enumerate(contests):
        y = 40 + n * high
        width = min(contest.ratio or 0, most) * unit
        rows.append(
            f'<text x="{left - 10}" y="{y + 13}" text-anchor="end">{contest.work.replace("&", "&amp;")}</text>'
            f'<rect x="{left}" y="{y}" width="{width:.0f}" height="18" fill="#3b7dd8"/>'
            f'<text x="{left + width + 6:.0f}" y="{y + 13}">{contest.ratio:.2f}</text>'
        )
    height = 50 + len(contests) * high
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + most * unit + 60:.0f}" height="{height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<text x="{left + unit}" y="20" text-anchor="middle">the reference = 1</text>\n'
        + "\n".join(rows)
        + f'\n<line x1="{left + unit}" y1="28" x2="{left + unit}" y2="{height - 10}" stroke="#c33"/>\n</svg>\n'
    )


def machine(postgres: Postgres) -> dict[str, Any]:
    with psycopg.connect(postgres.url("postgres")) as connection:
        row = connection.execute("SELECT version(), current_setting('fsync'), current_setting('synchronous_commit')")
        version, fsync, commit = row.fetchone() or ("", "", "")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "postgresql": str(version).split(" on ")[0],
        "fsync": fsync,
        "synchronous_commit": commit,
    }


CONTESTS = {
    1: single_lines, 2: batches, 3: shipping, 4: exports, 5: windows, 7: crowd, 8: latency, 9: whole_pipeline,
    10: idle_connections, 11: retention,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="*", default=[], help="rows of the table; 6 comes with 4")
    options = parser.parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"bench: not here: {', '.join(missing)} (Debian: wrk rsyslog rsyslog-pgsql curl)", file=sys.stderr)
        return 2
    contests: list[Contest] = []
    with new_bench(options.rounds) as bench:
        about = machine(bench.postgres)
        print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
        for number, contest in CONTESTS.items():
            if number in options.only or not options.only:
                contests += contest(bench)
    contests.sort(key=lambda contest: contest.number)
    print(table(contests))
    if not options.only:
        results = [asdict(contest) | {"ratio": contest.ratio} for contest in contests]
        (HERE / "results.json").write_text(json.dumps({"machine": about, "contests": results}, indent=1) + "\n")
        (HERE / "ratios.svg").write_text(chart(contests))
        write_between(MARKS, ROOT / "README.md", table(contests))
    return 0


if __name__ == "__main__":
    sys.exit(main())
