"""The oracle notices a broken invariant: each sabotage fails the scenario that the faithful services pass."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fakes import Answer, FakeBackend, Request, fake_backend, some_lines
from harness import SERVICES, Postgres, Service, assert_same, backend_command, driver, is_stopped, read_records
from sabotage import sabotaged
from waiting import wait_until

Start = Callable[..., Any]
Scenario = Callable[[Path, Postgres, Start, Start], None]
STORE = "SELECT first_created FROM store_logs_v2(%s, %s, %s, %s, %s)"


def row(number: int) -> list[list[Any]]:
    return [[f"00000000-0000-8000-8000-{number:012x}"], ["1.2.3.4"], ["GET"], [f"/{number}"], [200]]


def early_stamp_late_commit(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """A transaction stamps first and commits last, while an exporter follows."""
    url = postgres.create_database()
    backend_command("migrate", url)
    backend = start_backend(DATABASE_URL=url)
    start("background.py", URL=backend.data_url, DIRECTORY=str(folder), REQUEST_DELAY=20)
    shared = folder / "data.txt"
    with psycopg.connect(url) as early:
        early.execute(STORE, row(1))
        with psycopg.connect(url, autocommit=True) as late:
            thread = threading.Thread(target=late.execute, args=(STORE, row(2)))
            thread.start()
            # faithful: the second waits for the first; broken: it is stored and exported before the first commits
            wait_until(lambda: waits_for_lock(postgres, thread) or (shared.exists() and shared.stat().st_size > 0), 30)
            early.commit()
            thread.join(30)
    with psycopg.connect(url, autocommit=True) as last:
        last.execute(STORE, row(3))
    journal = folder / "journal"
    journal.write_text("".join(f"1.2.3.4 GET /{number} 200\n" for number in (1, 2, 3)))
    wait_until(lambda: shared.exists() and '"/3"' in shared.read_text(), 30, "the last record")
    assert_same(journal, read_records(shared))


def early_begin_late_store(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """A transaction begins first and stores last, after another one's record has been exported."""
    url = postgres.create_database()
    backend_command("migrate", url)
    backend = start_backend(DATABASE_URL=url)
    start("background.py", URL=backend.data_url, DIRECTORY=str(folder), REQUEST_DELAY=20)
    shared = folder / "data.txt"
    with psycopg.connect(url) as early, psycopg.connect(url, autocommit=True) as late:
        early.execute("SELECT now()")
        late.execute(STORE, row(2))
        wait_until(lambda: shared.exists() and '"/2"' in shared.read_text(), 30, "the record that was stored first")
        early.execute(STORE, row(1))
        early.commit()
        late.execute(STORE, row(3))
    (folder / "journal").write_text("".join(f"1.2.3.4 GET /{number} 200\n" for number in (1, 2, 3)))
    wait_until(lambda: '"/3"' in shared.read_text(), 30, "the last record")
    assert_same(folder / "journal", read_records(shared))


def waits_for_lock(postgres: Postgres, thread: threading.Thread) -> bool:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        found = connection.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        ).fetchone()
    return thread.is_alive() and found is not None and found[0] > 0


def client_killed_before_the_answer(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """kill -9 of a client whose POST was taken in and neither stored nor answered."""
    with fake_backend() as fake:
        serve, unanswered = hang_up(fake)
        client = start("client.py", URL=fake.data_url, LOG_FILE=str(folder / "logs.txt"), SOURCE=source(folder, 50))
        wait_until(lambda: unanswered, 30, "a POST that gets no answer")
        client.kill()
        client.process.wait(60)
        fake.answer = serve
        start("client.py", URL=fake.data_url, LOG_FILE=str(folder / "logs.txt"), SOURCE=str(folder / "source"))
        wait_until(lambda: len(fake.stored) >= 50, 30, "all lines to be stored")
        assert_same(folder / "logs.txt", fake.records())


def answer_lost_after_storing(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """The backend stores a batch, and its answer gets lost."""
    with fake_backend() as fake:
        serve = fake.answer
        lost: list[int] = []

        def lose_the_first(request: Any) -> Any:
            reply = serve(request)
            if lost:
                return reply
            lost.append(len(request.items))
            return None

        fake.answer = lose_the_first
        start("client.py", URL=fake.data_url, LOG_FILE=str(folder / "logs.txt"), SOURCE=source(folder, 50))
        position = folder / "logs.txt.position"
        wait_until(lambda: position.exists() and json.loads(position.read_text())["acknowledged"] > 0, 30, "an answer")
        assert lost == [50]
        assert_same(folder / "logs.txt", fake.records())


def export_ten(fake: FakeBackend, folder: Path, start: Start) -> tuple[Service, Path]:
    """An exporter that has written ten records, and the shared file."""
    fake.add(some_lines(10))
    shared = folder / "data.txt"
    exporter: Service = start("background.py", URL=fake.data_url, DIRECTORY=str(folder), REQUEST_DELAY=20)
    wait_until(lambda: shared.exists() and shared.read_bytes().count(b"\n") >= 10, 30, "the first records")
    return exporter, shared


def torn_tail_of_a_killed_exporter(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """An exporter died in the middle of a record, holding the lock, whose file it leaves behind."""
    with fake_backend() as fake:
        first, shared = export_ten(fake, folder, start)
        first.kill()
        first.process.wait(60)
        with shared.open("ab") as file:
            file.write(b'{"id":"01234567-89ab')
        (folder / "data.txt.lock").touch()
        fake.add(some_lines(10, tag="b"))
        start("background.py", **first.settings)
        wait_until(lambda: shared.read_bytes().count(b"\n") >= 20, 30, "the next records")
        (folder / "journal").write_text("\n".join([*some_lines(10), *some_lines(10, tag="b")]) + "\n")
        assert_same(folder / "journal", read_records(shared))


def exporter_killed_before_its_write(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """An exporter died in its turn, when it was about to write to the file that has its first records already."""
    with fake_backend() as fake:
        first, shared = export_ten(fake, folder, start)
        assert first.end() == 0
        fake.add(some_lines(10, tag="b"))
        second: Service = start(driver(folder, "killed.py", KILLED_BEFORE_WRITING), **first.settings)
        assert second.process.wait(60) == -signal.SIGKILL
        assert shared.read_bytes().count(b"\n") == 10
        part = shared.rename(folder.parent / "moved_away")  # now the position alone says where to go on
        fake.add(some_lines(10, tag="c"))
        start("background.py", **first.settings)
        wait_until(lambda: shared.exists() and b"/c/9" in shared.read_bytes(), 30, "the last record")
        lines = [*some_lines(10), *some_lines(10, tag="b"), *some_lines(10, tag="c")]
        (folder / "journal").write_text("\n".join(lines) + "\n")
        assert_same(folder / "journal", read_records(part, shared))


# Its first system call that writes is that of the records: the position is written by the file object
KILLED_BEFORE_WRITING = """
import os, signal
import background

os.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(background.main([]))
"""


def two_exporters_one_stopped_in_its_turn(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """An exporter is stopped when it is about to write; another one has the same records; the first goes on."""
    with fake_backend() as fake:
        lines = some_lines(1000)
        fake.add(lines)
        settings = {"URL": fake.data_url, "DIRECTORY": str(folder), "REQUEST_DELAY": 20}
        shared = folder / "data.txt"
        first = start(driver(folder, "stopped.py", STOPPED_BEFORE_WRITING), **settings)
        wait_until(lambda: is_stopped(first.pid), 30, "the stop in a turn")
        second: Service = start("background.py", **settings)
        second.wait_for_line("appending to")
        # a faithful one fetches again and again what it may not write; one that writes beside the first does so now
        wait_until(lambda: len(fake.requests) > 5, 30, "the second to have tried for a while")
        os.kill(first.pid, signal.SIGCONT)
        wait_until(lambda: shared.read_bytes().count(b"\n") >= 1000, 30, "all records")
        assert first.end() == 0
        assert second.end() == 0
        (folder / "journal").write_text("\n".join(lines) + "\n")
        assert_same(folder / "journal", read_records(shared))


# It has looked at the file and knows what it is going to append
STOPPED_BEFORE_WRITING = """
import os, signal
import background

append = background.SharedFile.append

def stop_and_append(*arguments):
    background.SharedFile.append = append
    os.kill(os.getpid(), signal.SIGSTOP)
    append(*arguments)

background.SharedFile.append = stop_and_append
sys.exit(background.main([]))
"""


def database_swapped_for_a_while(folder: Path, postgres: Postgres, start: Start, start_backend: Start) -> None:
    """The exporter's URL leads to another database, and back."""
    with fake_backend() as fake:
        exporter, shared = export_ten(fake, folder, start)
        right = dict(fake.stored)
        fake.stored = {f"other{n}": record | {"id": f"other{n}"} for n, record in enumerate(right.values())}
        fake.add(some_lines(10, tag="other"))
        wait_until(lambda: "nothing is appended" in exporter.printed or shared.read_bytes().count(b"\n") > 10, 30, "it")
        fake.stored = right
        fake.add(some_lines(10, tag="b"))
        wait_until(lambda: shared.read_bytes().count(b"\n") >= 20, 30, "the next records")
        (folder / "journal").write_text("\n".join([*some_lines(10), *some_lines(10, tag="b")]) + "\n")
        assert_same(folder / "journal", read_records(shared))


def source(folder: Path, count: int) -> str:
    (folder / "source").write_text("\n".join(some_lines(count)) + "\n")
    return str(folder / "source")


def hang_up(fake: FakeBackend) -> tuple[Answer, list[Request]]:
    """Requests are taken in and get no answer. What is to be set as `answer` to serve again, and those whose lot is
    decided: one that has only come in would still be served."""
    unanswered: list[Request] = []
    serve, fake.answer = fake.answer, unanswered.append
    return serve, unanswered


SCENARIOS: dict[str, Scenario] = {
    "created-is-now": early_begin_late_store,
    "stamp-without-lock": early_stamp_late_commit,
    "position-before-answer": client_killed_before_the_answer,
    "id-of-its-own-for-each-try": answer_lost_after_storing,
    "lock-by-existence": torn_tail_of_a_killed_exporter,
    "torn-tail-stays": torn_tail_of_a_killed_exporter,
    "position-before-write": exporter_killed_before_its_write,
    "no-lock": two_exporters_one_stopped_in_its_turn,
    "predecessor-is-not-checked": database_swapped_for_a_while,
    "file-is-not-looked-at": two_exporters_one_stopped_in_its_turn,
}


@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS.values()), key=repr))
def test_faithful_services_pass(
    scenario: Scenario, tmp_path: Path, postgres: Postgres, start: Start, start_backend: Start
) -> None:
    with sabotaged(tmp_path, ""):
        assert SERVICES[-1] == tmp_path / "services"
        scenario(folder(tmp_path), postgres, start, start_backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_oracle_notices(
    name: str, tmp_path: Path, postgres: Postgres, start: Start, start_backend: Start, services: list[Service]
) -> None:
    with sabotaged(tmp_path, name), pytest.raises(AssertionError) as raised:
        SCENARIOS[name](folder(tmp_path), postgres, start, start_backend)
    print(raised.value)
    for service in services:  # it was the invariant that broke, not the service
        assert "Traceback" not in service.printed, service.printed


def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    return path
