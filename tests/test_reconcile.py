"""`background.py reconcile`: what the database lost and the file still has is given back; each line once in both."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from fakes import NDJSON, FakeBackend, Reply, Request, fake_backend, post_lines, some_lines
from harness import (
    ROOT,
    Backend,
    Service,
    clean_environment,
    count_lines,
    driver,
    held,
    line_of,
    past_the_guard,
    read_records,
)
from test_successor import with_retention
from waiting import wait_until

Start = Callable[..., Service]
Reconcile = Callable[..., subprocess.CompletedProcess[str]]
LOSE = "DELETE FROM logs WHERE created > (SELECT created FROM logs ORDER BY created OFFSET %s - 1 LIMIT 1)"


@pytest.fixture
def export(start: Start, shared: Path) -> Callable[..., Service]:
    return lambda url: start("background.py", URL=url, DIRECTORY=shared.parent, REQUEST_DELAY=20)


@pytest.fixture
def reconcile(shared: Path) -> Reconcile:
    def run(url: str, *options: str, answer: str = "", program: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", "-S", program or str(ROOT / "background.py"), "reconcile", *options],
            env=clean_environment({"URL": url, "DIRECTORY": str(shared.parent)}),
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def exported(export: Callable[..., Service], backend: Backend, *files: Path) -> Service:
    exporter = export(backend.data_url)
    wait_for(backend, *files)
    return exporter


def wait_for(backend: Backend, *files: Path) -> None:
    records = backend.records()
    wait_until(lambda: last_id(files[-1]) == records[-1]["id"], 60, f"the last record in {files[-1]}", poll=0.05)


def last_id(file: Path) -> str:
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return str(json.loads(lines[-1])["id"]) if lines and lines[-1].endswith(b"\n") else ""


def lose(backend: Backend, kept: int) -> None:
    """The database is one that was restored from an older backup."""
    with psycopg.connect(backend.database_url) as connection:
        connection.execute(LOSE, [kept])


def assert_each_line_once_in_both(backend: Backend, lines: list[str], *files: Path) -> None:
    wait_for(backend, *files)
    records = read_records(*files)
    assert records == backend.records()
    assert sorted(map(line_of, records)) == sorted(lines)


@pytest.fixture
def incident(backend: Backend, export: Callable[..., Service], shared: Path) -> tuple[list[str], list[Path]]:
    """A file in two parts with 60 and 40 records, of which the database has 45, and 20 new ones; the lines, the files.

    Two of the lost ones were sent again by their clients meanwhile.
    """
    lines = some_lines(100)
    post_lines(backend, lines[:60])
    exporter = exported(export, backend, shared)
    part = shared.rename(shared.with_name("data.txt.1"))
    post_lines(backend, lines[60:])
    wait_for(backend, shared)
    assert exporter.end() == 0
    again = [json.loads(line) for line in shared.read_bytes().splitlines()[:2]]
    lose(backend, 45)
    new = some_lines(20, "new")
    post_lines(backend, new)
    with psycopg.connect(backend.database_url) as connection:
        for record in again:
            log = record["log"]
            values = [record["id"]], [log["ip"]], [log["method"]], [log["uri"]], [log["status_code"]]
            connection.execute("SELECT store_logs(%s::uuid[], %s::inet[], %s, %s, %s::smallint[])", values)
    return lines + new, [part, shared]


def test_what_a_restored_database_lost_is_given_back_and_exported_again(
    backend: Backend,
    export: Callable[..., Service],
    reconcile: Reconcile,
    shared: Path,
    incident: tuple[list[str], list[Path]],
) -> None:
    lines, files = incident
    lost = b"".join(file.read_bytes() for file in files).splitlines(keepends=True)[45:]
    exporters = [export(backend.data_url) for _ in range(2)]
    for exporter in exporters:
        exporter.wait_for_line("nothing is appended.*reconcile")
    done = reconcile(backend.data_url, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "55 records behind it" in done.stdout
    assert "see" in done.stdout
    assert_each_line_once_in_both(backend, lines, *files)
    assert shared.with_name("data.txt.cut").read_bytes().splitlines(keepends=True) == lost
    for exporter in exporters:
        exporter.wait_for_line("database back after", 60)  # it looks less often the longer the reconcile took
    post_lines(backend, some_lines(10, "later"))
    assert_each_line_once_in_both(backend, lines + some_lines(10, "later"), *files)
    done = reconcile(backend.data_url, "--yes")
    assert (done.returncode, done.stdout[:13]) == (0, "nothing to do")


@pytest.mark.parametrize(("option", "answer"), [("--dry-run", ""), ("", "n\n"), ("", ""), ("", "y\n")])
def test_it_says_what_it_will_do_and_asks(
    backend: Backend, reconcile: Reconcile, incident: tuple[list[str], list[Path]], option: str, answer: str
) -> None:
    _, files = incident
    before = [file.read_bytes() for file in files], backend.records()
    done = reconcile(backend.data_url, *[option] * bool(option), answer=answer)
    assert done.stderr == ""
    assert "55 records behind it" in done.stdout
    assert str(files[0]) in done.stdout
    assert done.returncode == (0 if answer == "y\n" or option else 1)
    assert (([file.read_bytes() for file in files], backend.records()) == before) == (answer != "y\n")


# kill -9 at a step of the reconcile; of a write only one half is done then
KILLED = """
import http.client, os, signal
import background

left = {at}

def watch(owner, name):
    real = getattr(owner, name)
    def step(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            print("killed at", name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, name, step)

for name in ("fsync", "ftruncate", "replace", "unlink", "open"):
    watch(os, name)
watch(http.client.HTTPConnection, "request")
watch(http.client.HTTPConnection, "getresponse")
sys.exit(background.main(["reconcile", "--yes"]))
"""


@pytest.mark.slow
def test_killed_anywhere_and_run_again_it_ends_in_the_same_state(
    reconcile: Reconcile, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    """Exporters run all the time; three parts, the common record in the oldest of them."""
    died = set()
    for at in range(1, 60):
        with fake_backend() as fake:
            files = lost_in_three_parts(fake, export, shared)
            program = driver(tmp_path, "killed.py", KILLED.format(at=at))
            done = reconcile(fake.data_url, program=program)
            died.update(re.findall(r"killed at (\w+)", done.stdout))
            exporter = export(fake.data_url)
            killed = done.returncode == -signal.SIGKILL
            if killed and fake.records()[-1]["id"] == "n4":
                exporter.wait_for_line("nothing is appended|and was written up to")
            done = reconcile(fake.data_url, "--yes")
            assert (done.returncode, done.stderr) == (0, ""), done.stdout
            wait_until(lambda: last_id(shared) == fake.records()[-1]["id"], what="the last record")
            assert exporter.end() == 0
            parts = [file for file in files if file.exists()]
            assert [record["id"] for record in read_records(*parts)] == list(fake.stored)
            assert len(fake.stored) == 65
            assert count_lines(shared.with_name("data.txt.cut")) == 35
            for file in shared.parent.iterdir():
                file.unlink()
        if not killed:
            break
    assert not killed
    assert died >= {"fsync", "ftruncate", "replace", "unlink", "request", "getresponse"}


def lost_in_three_parts(fake: FakeBackend, export: Callable[..., Service], shared: Path) -> list[Path]:
    """20 records in each of three files; the database has 25 of them, and 5 new ones."""
    files = [shared.with_name("data.txt.2"), shared.with_name("data.txt.1"), shared]
    exporter = export(fake.data_url)
    for n, file in enumerate(files):
        fake.add(some_lines(20, f"p{n}"))
        wait_until(lambda: last_id(shared) == fake.records()[-1]["id"], what="the records")
        wait_until(lambda: not shared.with_name("data.txt.lock").exists(), what="the end of the turn")
        if file != shared:
            shared.rename(file)
    assert exporter.end() == 0
    fake.stored = dict(list(fake.stored.items())[:25])
    for n in range(5):
        fake._add(f"n{n}", f"192.0.2.1 GET /new/{n} 200")
        fake.stored[f"n{n}"]["created"] = f"2026-01-01T00:00:00.{25 + n:06}Z"
    return files


@pytest.mark.parametrize("kind", ["refused", "conflict", "away", "half", "a page", "a list"])
def test_unless_every_line_is_stored_nothing_is_cut(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path, kind: str
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    before = [file.read_bytes() for file in files]

    def answer(request: Request) -> Reply | None:
        if request.method == "GET":
            return fake.export(request)
        counts = {"accepted": 34, "duplicates": 0, "rejected": [{"index": 3, "reason": "stored with another line"}]}
        return {
            "refused": Reply(400, b'{"detail": "no"}'),
            "conflict": Reply(201, json.dumps(counts).encode()),
            "away": None,
            "half": Reply(201, json.dumps(counts | {"rejected": []}).encode()),
            "a page": Reply(200, b'{"status": "ok"}'),
            "a list": Reply(200, b"[]"),
        }[kind]

    fake.answer = answer
    done = reconcile(fake.data_url, "--yes")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("cannot reconcile, nothing was cut: ")
    assert [file.read_bytes() for file in files] == before
    fake.answer = fake.serve
    assert reconcile(fake.data_url, "--yes").returncode == 0


def test_a_compressed_part_that_may_hold_the_common_point_is_refused_by_name(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    compressed = files[1].with_name("data.txt.1.gz")
    compressed.write_bytes(gzip.compress(files[1].read_bytes()))
    text = files[1].read_bytes()
    files[1].unlink()
    before = shared.read_bytes()
    done = reconcile(fake.data_url, "--yes")
    assert done.returncode == 1
    assert f"{compressed} is compressed" in done.stdout
    assert (shared.read_bytes(), len(fake.stored)) == (before, 30)
    files[1].write_bytes(text)
    assert reconcile(fake.data_url, "--yes").returncode == 0


@pytest.mark.parametrize("kind", ["another database", "no records here", "a part is missing"])
def test_what_it_cannot_mend_is_refused_and_nothing_is_changed(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path, kind: str
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    if kind == "another database":
        fake.stored = {f"x{n}": record | {"id": f"x{n}"} for n, record in enumerate(fake.records())}
    for file in files if kind == "no records here" else files[2:] if kind == "a part is missing" else ():
        file.rename(tmp_path / file.name)
    before = {file: file.read_bytes() for file in files if file.exists()}
    stored = fake.records()
    done = reconcile(fake.data_url, "--yes")
    assert (done.returncode, done.stderr) == (1, "")
    wanted = "bring that part back" if kind == "a part is missing" else "no record in common"
    assert done.stdout.splitlines()[-1].startswith("cannot reconcile")
    assert wanted in done.stdout
    assert before == {file: file.read_bytes() for file in files if file.exists()}
    assert fake.records() == stored
    assert not shared.with_name("data.txt.cut").exists()


def assert_refused(done: subprocess.CompletedProcess[str], wanted: str) -> None:
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("cannot reconcile")
    assert wanted in done.stdout.splitlines()[-1]


def test_what_was_cut_may_be_compressed_and_is_no_part(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    assert reconcile(fake.data_url, "--yes").returncode == 0
    cut = shared.with_name("data.txt.cut")
    cut.with_name("data.txt.cut.gz").write_bytes(gzip.compress(cut.read_bytes()))
    cut.unlink()
    done = reconcile(fake.data_url, "--yes")
    assert (done.returncode, done.stdout[:13]) == (0, "nothing to do"), done.stdout
    exporter = export(fake.data_url)
    wait_until(lambda: last_id(shared) == fake.records()[-1]["id"], what="the records")
    assert exporter.end() == 0
    assert [record["id"] for record in read_records(files[0], files[1], shared)] == list(fake.stored)


def test_a_copy_that_is_being_made_is_not_mended(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    lost_in_three_parts(fake, export, shared)
    half = shared.read_bytes()[:-20]
    copy = shared.with_name("the copy")
    copy.write_bytes(half)
    assert_refused(reconcile(fake.data_url, "--yes"), str(copy))
    assert copy.read_bytes() == half


@pytest.mark.parametrize("name", ["data.txt.bak", "a copy", "data.txt.3"])
def test_a_copy_of_the_file_in_the_folder_is_named_and_not_cut(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path, name: str
) -> None:
    """As people make one before they try what they have not done before."""
    fake.add(some_lines(20))
    exporter = export(fake.data_url)
    wait_until(lambda: last_id(shared) == fake.records()[-1]["id"], what="the records")
    assert exporter.end() == 0
    fake.stored = dict(list(fake.stored.items())[:15])
    copy = shared.with_name(name)
    copy.write_bytes(shared.read_bytes())
    done = reconcile(fake.data_url, "--yes")
    assert_refused(done, "do not follow on each other: is one of them a copy? Move it out of the folder")
    assert f"{copy} " in done.stdout
    assert copy.read_bytes() == shared.read_bytes()
    assert len(fake.stored) == 15
    copy.unlink()
    assert reconcile(fake.data_url, "--yes").returncode == 0
    assert count_lines(shared) == 15
    assert len(fake.stored) == 20


def test_what_retention_has_deleted_is_not_taken_for_lost(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    """The records around the common one, and those that the database no longer keeps, are few enough to be looked at
    at once."""
    files = lost_in_three_parts(fake, export, shared)
    before = [record["id"] for record in read_records(*files)]
    gone = with_retention(fake, 22)
    fake.answer = lambda request: gone(request) if request.method == "GET" else fake.store(request)
    done = reconcile(fake.data_url, "--yes")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "35 records behind it" in done.stdout
    exporter = export(fake.data_url)
    wait_until(lambda: last_id(shared) == fake.records()[-1]["id"], what="the last record")
    assert exporter.end() == 0
    exported = [record["id"] for record in read_records(*[file for file in files if file.exists()])]
    assert exported == list(fake.stored)
    assert set(before) < set(exported)


def test_a_database_that_keeps_nothing_of_the_file_is_refused(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    lost_in_three_parts(fake, export, shared)
    fake.answer = with_retention(fake, 26)
    assert_refused(reconcile(fake.data_url, "--yes"), "no record in common is left")


def test_records_that_were_lost_in_the_middle_are_given_back_too(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    fake.add(some_lines(60))
    exporter = export(fake.data_url)
    wait_until(lambda: last_id(shared) == fake.records()[-1]["id"], what="the records")
    assert exporter.end() == 0
    everything = fake.records()
    fake.stored = {record["id"]: record for record in everything[:20] + everything[30:50]}
    fake.answer = lambda request: fake.store(request) if request.method == "POST" else by_created(fake, request)
    done = reconcile(fake.data_url, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 records behind it" in done.stdout
    assert count_lines(shared) == 20
    assert set(fake.stored) == {record["id"] for record in everything}


def by_created(fake: FakeBackend, request: Request) -> Reply:
    """For a database that lacks records in the middle."""
    records = [record for record in fake.records() if record["created"] >= request.query["date_from"]]
    lines = [json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records]
    return Reply(200, b"".join(lines), NDJSON)


NO_RECORDS = {
    "no line": b'{"id":"a","created":"2026-01-02T00:00:00.000000Z","log":{"ip":"192.0.2.1"}}\n',
    "no JSON": b'{"id":"a","created":"2026-01-02T00:00:00.000000Z","log":{}]}\n',
    "a number": b'{"id":"a","created":"2026-01-02T00:00:00.000000Z","log":5}\n',
    "out of order": b'{"id":"a","created":"2025-01-02T00:00:00.000000Z","log":{}}\n',
    "Windows line end": b'{"id":"a","created":"2026-01-02T00:00:00.000000Z","log":{}}\r\n',
}


@pytest.mark.parametrize("kind", NO_RECORDS)
def test_a_line_that_cannot_be_sent_is_shown_before_any_change(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path, kind: str
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    lines = files[2].read_bytes().splitlines(keepends=True)
    files[2].write_bytes(b"".join([*lines[:10], NO_RECORDS[kind]]))
    before = [file.read_bytes() for file in files], fake.records()
    done = reconcile(fake.data_url, "--yes")
    assert_refused(done, str(files[2]) if kind not in ("no line", "a number") else '"created":"2026-01-02')
    assert ([file.read_bytes() for file in files], fake.records()) == before
    assert not shared.with_name("data.txt.cut").exists()


def test_ctrl_c_at_the_question_ends_it_and_changes_nothing(
    start: Start, fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    before = [file.read_bytes() for file in files], fake.records()
    asking = driver(tmp_path, "asking.py", 'import background\nsys.exit(background.main(["reconcile"]))\n')
    program = start(asking, stdin=subprocess.PIPE, URL=fake.data_url, DIRECTORY=shared.parent)
    program.wait_for_line(r"Go on\? \[y/N\]")
    program.kill(signal.SIGINT)
    assert program.process.wait(20) == -signal.SIGINT
    assert "Traceback" not in program.printed
    assert ([file.read_bytes() for file in files], fake.records()) == before
    exporter = export(fake.data_url)
    exporter.wait_for_line("nothing is appended.*reconcile")


def test_no_post_is_larger_than_what_the_backend_takes(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path
) -> None:
    """The longest URIs that there are, which JSON may write in three times as many bytes."""
    fake.add([f"192.0.2.1 GET /{n}{'é' * 4090} 200" for n in range(700)])
    exporter = export(fake.data_url)
    wait_until(lambda: count_lines(shared) == 700, what="the records")
    assert exporter.end() == 0
    fake.stored = dict(list(fake.stored.items())[:5])
    assert reconcile(fake.data_url, "--yes").returncode == 0
    assert len(fake.stored) == 700
    assert max(len(request.body) for request in fake.requests) < 16 * 1024**2


def test_while_another_process_has_the_turn_nothing_is_changed(
    reconcile: Reconcile, fake: FakeBackend, export: Callable[..., Service], shared: Path, tmp_path: Path
) -> None:
    files = lost_in_three_parts(fake, export, shared)
    before = [file.read_bytes() for file in files]
    impatient = "import background\nbackground.TURN_SECONDS = 0.5\nsys.exit(background.main(['reconcile', '--yes']))\n"
    with held(shared.with_name("data.txt.lock")):
        done = reconcile(fake.data_url, program=driver(tmp_path, "impatient.py", impatient))
    assert_refused(done, f"no turn for 0 s: another process has {shared}.lock")
    assert [file.read_bytes() for file in files] == before


def test_a_failed_over_database_with_its_clock_behind_is_reconciled_too(
    reconcile: Reconcile, backend: Backend, export: Callable[..., Service], shared: Path
) -> None:
    """New records have the times of those that were lost."""
    lines = some_lines(50)
    post_lines(backend, lines)
    exporter = exported(export, backend, shared)
    lost = read_records(shared)[30:]
    lose(backend, 30)
    with past_the_guard(backend.database_url) as connection:
        for n, record in enumerate(lost):
            values = (f"00000000-0000-8000-9000-{n:012x}", record["created"], f"/new/{n}")
            connection.execute(
                "INSERT INTO logs (id, created, ip, method, uri, status_code)"
                " VALUES (%s, %s, '192.0.2.1', 'GET', %s, 200)",
                values,
            )
    exporter.wait_for_line("nothing is appended")
    assert reconcile(backend.data_url, "--yes").returncode == 0
    assert_each_line_once_in_both(backend, lines + [f"192.0.2.1 GET /new/{n} 200" for n in range(20)], shared)
