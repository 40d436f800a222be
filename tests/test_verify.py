"""`background.py verify`: what an operator runs after an incident."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from fakes import FakeBackend, Reply, Request, post_lines, some_lines
from harness import ROOT, Backend, Service, clean_environment, read_records
from waiting import wait_until

Verify = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def shared(backend: Backend, start: Callable[..., object], tmp_path: Path) -> Path:
    """A shared file in two parts, 300 and 200 records, that equals the database."""
    file = tmp_path / "shared" / "data.txt"
    exporter = start("background.py", URL=backend.data_url, DIRECTORY=file.parent, REQUEST_DELAY=20)
    for count, tag in ((300, "a"), (200, "b")):
        post_lines(backend, some_lines(count, tag))
        wait_until(partial(has_lines, file, count), 30, "the records")
        if tag == "a":
            file.rename(file.with_name("data.txt.1"))
    exporter.end()  # type: ignore[attr-defined]
    return file


def has_lines(file: Path, count: int) -> bool:
    return file.exists() and file.read_bytes().count(b"\n") >= count


def run_verify(url: str, shared: Path, *window: str, **settings: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "background.py"), "verify", *window],
        env=clean_environment({"URL": url, "DIRECTORY": str(shared.parent), **settings}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def verify(backend: Backend, shared: Path) -> Verify:
    def run(*window: str, url: str = backend.data_url, **settings: int) -> subprocess.CompletedProcess[str]:
        return run_verify(url, shared, *window, **settings)

    return run


def test_a_file_that_equals_the_database_is_called_equal(verify: Verify) -> None:
    done = verify()
    assert (done.returncode, done.stdout) == (0, "equal: 500 records\n")


def test_a_window_counts_its_own_records_only(verify: Verify, shared: Path) -> None:
    records = read_records(shared.with_name("data.txt.1"), shared)
    window = records[100]["created"], records[350]["created"]
    assert verify(*window).stdout == "equal: 250 records\n"
    assert verify(window[1]).stdout == "equal: 150 records\n"
    assert verify("2020-01-01", "2020-01-02").stdout == "equal: 0 records\n"


def test_a_missing_record_is_named(verify: Verify, shared: Path) -> None:
    lines = shared.read_text().splitlines(keepends=True)
    shared.write_text("".join(lines[:50] + lines[51:]))
    done = verify()
    assert done.returncode == 1
    assert "after 350 equal records the file lacks" in done.stdout
    assert lines[50].strip() in done.stdout


def test_a_missing_end_is_named(verify: Verify, shared: Path) -> None:
    lines = shared.read_text().splitlines(keepends=True)
    shared.write_text("".join(lines[:-1]))
    assert f"after 499 equal records the file lacks {lines[-1].strip()}" in verify().stdout


def test_a_record_too_many_is_named(verify: Verify, shared: Path) -> None:
    more = shared.read_text().splitlines(keepends=True)[-1].replace('"created":"2', '"created":"3')
    with shared.open("a") as file:
        file.write(more)
    done = verify()
    assert done.returncode == 1
    assert f"after 500 equal records the database lacks {more.strip()}" in done.stdout


def test_a_record_that_differs_is_named(verify: Verify, shared: Path) -> None:
    shared.write_text(shared.read_text().replace("/b/7 ", "/b/8 ").replace('"/b/7"', '"/x/7"'))
    done = verify()
    assert done.returncode == 1
    assert "a record differs" in done.stdout
    assert '"/x/7"' in done.stdout


@pytest.mark.parametrize("what", ["twice", "exchanged", "torn"])
def test_a_line_that_cannot_be_there_is_named(verify: Verify, shared: Path, what: str) -> None:
    lines = shared.read_text().splitlines(keepends=True)
    changed = {
        "twice": [*lines[:11], lines[10], *lines[11:]],
        "exchanged": [*lines[:10], lines[11], lines[10], *lines[12:]],
        "torn": [*lines[:11], lines[11][:50] + "\n", *lines[12:]],
    }[what]
    shared.write_text("".join(changed))
    done = verify()
    assert done.returncode == 1
    # read in the order of the file: what comes first there is said first, also a record that is lacking before it
    expected = {"twice": "line 12 of", "exchanged": "lacks", "torn": "line 12 of"}[what]
    assert expected in done.stdout
    assert str(shared) in done.stdout or what == "exchanged"


def test_half_a_record_at_the_end_is_one_that_is_not_written_yet(verify: Verify, shared: Path) -> None:
    """An exporter may be writing it at this moment."""
    lines = shared.read_bytes().splitlines(keepends=True)
    shared.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    assert f"after 499 equal records the file lacks {lines[-1].decode().strip()} (its end:" in verify().stdout
    before = verify("2020-01-01", json.loads(lines[-1])["created"])
    assert (before.returncode, before.stdout) == (0, "equal: 499 records\n")


def test_what_comes_while_it_compares_is_not_called_missing(
    fake: FakeBackend, start: Callable[..., Service], tmp_path: Path
) -> None:
    """A record is stored, and exported, after the database has been asked for the last time."""
    shared = tmp_path / "shared/data.txt"
    fake.add(some_lines(20))
    exporter = start("background.py", URL=fake.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    wait_until(partial(has_lines, shared, 20), 30, "the records")
    assert exporter.end() == 0
    asked = len(fake.requests)

    def answer(request: Request) -> Reply:
        reply = fake.export(request)
        if len(fake.requests) == asked + 2:  # the first one that finds no more
            fake.add(some_lines(1, "late"))
            with shared.open("a") as file:
                file.write(json.dumps(fake.records()[-1], separators=(",", ":")) + "\n")
        return reply

    fake.answer = answer
    done = run_verify(fake.data_url, shared)
    assert (done.returncode, done.stdout) == (0, "equal: 21 records\n")


def test_parts_that_keep_files_cannot_have_deleted_are_missing(verify: Verify, shared: Path) -> None:
    """With fewer of them than it keeps, none was deleted."""
    first = read_records(shared.with_name("data.txt.1"))[0]
    shared.with_name("data.txt.1").unlink()
    done = verify(KEEP_FILES=2)
    assert done.returncode == 1
    assert f"after 0 equal records the file lacks {json.dumps(first, separators=(',', ':'))}" in done.stdout
    for name in ("data.txt.20260101T000000.000000Z", "data.txt.20260102T000000.000000Z.gz"):
        shared.with_name(name).touch()
    done = verify(KEEP_FILES=2)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "equal: 200 records")


def test_a_backend_that_is_away_is_no_difference(verify: Verify) -> None:
    done = verify(url="http://127.0.0.1:1/api/data")
    assert done.returncode == 1
    assert done.stdout.startswith("cannot compare: ")


def test_other_words_are_answered_with_those_that_are_known(verify: Verify) -> None:
    done = verify("yesterday")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("background: unknown arguments 'verify yesterday'; known are verify [date_from [date_to]], ")
