"""An asynchronous failover loses a tail: it is told, and what the file and the journals still have is given back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from fakes import append, some_lines
from harness import (
    ROOT,
    Backend,
    Postgres,
    Service,
    clean_environment,
    clock_set_back,
    count_lines,
    execute,
    line_of,
    new_postgres,
    read_records,
    standby_of,
    stop,
)
from test_replication import SECONDS, both_hosts, promote
from waiting import wait_until

import client

Pair = tuple[Postgres, Postgres]
COUNT = "SELECT count(*) FROM logs"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary, and a standby that no commit waits for."""
    with new_postgres() as primary:
        execute(primary.url("postgres"), "ALTER SYSTEM SET wal_retrieve_retry_interval = '100ms'")
        with standby_of(primary) as standby:
            yield primary, standby


def run(script: str, *arguments: str, **settings: str | Path) -> str:
    """What was printed, to a successful end."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / script), *arguments],
        env=clean_environment({name: str(value) for name, value in settings.items()}),
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for_rows(url: str, count: int) -> None:
    wait_until(lambda: execute(url, COUNT) == [(count,)], SECONDS, f"{count} records")


def journal_lines(journal: Path) -> dict[str, str]:
    """All lines of a journal and its renamed parts, by their ids."""
    files, complete = client.find_files(str(journal), client.NOTHING_DELETED, 0.0)
    assert complete
    lines: dict[str, str] = {}
    for one in files:
        found = client.lines_with_ids(one.file, 0, one.end, one.spans, 10_000)
        lines |= {name: line.decode() for name, line in found}
        os.close(one.file)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clock", "first"), [("equal", "reconcile"), ("an hour behind", "reconcile"), ("an hour behind", "replay")]
)
def test_what_an_asynchronous_failover_lost_is_given_back_once(
    pair: Pair,
    start: Callable[..., Service],
    start_backend: Callable[..., Backend],
    journal: Path,
    shared: Path,
    tmp_path: Path,
    clock: str,
    first: str,
) -> None:
    """The standby lacks 1,500 records that were exported, and 1,500 that were not; 1,000 come after it was promoted."""
    primary, standby = pair
    direct = primary.create_logs()
    there = standby.url(direct.split("/")[3].split("?")[0])
    backend = start_backend(DATABASE_URL=both_hosts(pair, direct))
    source = tmp_path / "source"
    append(source, some_lines(2000, "kept"))
    start("client.py", URL=backend.data_url, LOG_FILE=journal, SOURCE=source, ROTATE_BYTES=65536)
    exporting: dict[str, str | Path] = {"URL": backend.data_url, "DIRECTORY": shared.parent}
    exporters = [start("background.py", **exporting, REQUEST_DELAY=20) for _ in range(2)]
    wait_until(lambda: count_lines(shared) == 2000, SECONDS, "the export")
    wait_until(lambda: count_rows(there) == 2000, SECONDS, "the standby")
    standby.stop("immediate")
    append(source, some_lines(1500, "exported"))
    wait_until(lambda: count_lines(shared) == 3500, SECONDS, "the export")
    stop(*(one.pid for one in exporters))
    append(source, some_lines(1500, "delivered"))
    wait_for_rows(direct, 5000)
    wait_until(lambda: len(journal_lines(journal)) == 5000, SECONDS, "the acknowledgement")
    primary.kill()
    standby.start()
    promote(standby)
    with ExitStack() as stack:
        if clock == "an hour behind":
            stack.enter_context(clock_set_back(there))
        append(source, some_lines(1000, "new"))
        wait_for_rows(there, 3000)
        for exporter in exporters:
            exporter.kill(signal.SIGCONT)  # all of them first: one may have been stopped in its turn
        for exporter in exporters:
            exporter.wait_for_line(
                f"{shared} ends in record .* nothing is appended.*run background.py reconcile", SECONDS
            )
        assert count_lines(shared) == 3500
        if first == "replay":
            printed = run("client.py", "replay", str(journal), URL=backend.data_url)
            assert printed.splitlines()[-1] == "done: 3000 lines stored, 3000 were there already, 0 refused"
            assert count_lines(shared) == 3500
        printed = run("background.py", "reconcile", "--yes", **exporting)
        assert "1500 records behind it" in printed
        if first == "reconcile":
            wait_until(lambda: count_lines(shared) == 4500, SECONDS, "what the file had")
            printed = run("client.py", "replay", str(journal), URL=backend.data_url)
            assert printed.splitlines()[-1] == "done: 1500 lines stored, 4500 were there already, 0 refused"
        wait_until(lambda: count_lines(shared) == 6000, SECONDS, "what the journal had")
        printed = run("client.py", "replay", str(journal), URL=backend.data_url)
        assert printed.splitlines()[-1] == "done: 0 lines stored, 6000 were there already, 0 refused"
    records = read_records(shared)
    assert records == backend.records()
    assert {record["id"]: line_of(record) for record in records} == journal_lines(journal)
    assert len(records) == 6000
    assert sorted(map(line_of, records)) == sorted(source.read_text().splitlines())
    created = [record["created"] for record in records]
    assert created == sorted(set(created))
    assert re.fullmatch("equal: 6000 records\n", run("background.py", "verify", **exporting))


def count_rows(url: str) -> int:
    """0 as long as the standby does not have the database."""
    try:
        return int(execute(url, COUNT)[0][0])
    except psycopg.OperationalError:
        return 0
