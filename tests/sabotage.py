"""Services with one invariant broken on purpose: what shows that the oracle would notice.

`with sabotaged(folder, "created-is-now"): ...` starts all services from a copy in which that one thing is wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import ROOT, SERVICES

# name -> the file, what stands there, what stands there instead; and so on
SABOTAGES = {
    "created-is-now": (
        "migrations/0012.follow-replication.sql",
        "SELECT greatest(clock_timestamp(), max(logs.created) + interval '1 microsecond')",
        "SELECT coalesce(now(), max(logs.created))",
    ),
    "stamp-without-lock": (
        "migrations/0012.follow-replication.sql",
        "    PERFORM pg_advisory_xact_lock(7021961410472345601);",
        "    ",
    ),
    "position-before-answer": (
        "client.py",
        "        self._connection.request(",
        "        self._journal.acknowledge(lines)\n        self._connection.request(",
    ),
    "id-of-its-own-for-each-try": (
        "client.py",
        """items = [f'{{"id":"{name}",""",
        """items = [f'{{"id":"{uuid.uuid4()}",""",
    ),
    "lock-by-existence": (
        "background.py",
        "            except FileExistsError:\n                try:",
        "            except FileExistsError:\n                raise BlockingIOError from None\n                try:",
    ),
    "no-lock": (  # nor what notices that somebody else has written
        "background.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "        if os.fstat(self._descriptor).st_size != size:\n", "        if False:\n",
        "        self._check_place(size, len(lines))\n", "",
    ),
    "position-before-write": (
        "background.py",
        "        try:\n            rest",
        "        here = identity(os.fstat(self._descriptor))\n"
        "        self._write_position(last_record(lines), here, self._first)\n"
        "        try:\n            rest",
    ),
    "torn-tail-stays": (
        "background.py",
        "        os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(torn))\n",
        "        pass\n",
    ),
    "predecessor-is-not-checked": (
        "background.py",
        "    if created_of(first) != known.created or not matches(known.line, first):\n        raise",
        "    if created_of(first) < known.created:\n        raise",
    ),
    "file-is-not-looked-at": (
        "background.py",
        "                    with self._file.opened(folder) as last:\n",
        "                    with self._file.opened(folder):\n                        last = self._before\n",
    ),
}  # fmt: skip


@contextmanager
def sabotaged(folder: Path, name: str) -> Iterator[None]:
    """All services that are started inside come from a copy with that sabotage; "" for a faithful copy."""
    copy = folder / "services"
    shutil.copytree(ROOT / "migrations", copy / "migrations")
    shutil.copytree(ROOT / "static", copy / "static")
    for file in ("backend.py", "client.py", "background.py", "openapi.json"):
        shutil.copy(ROOT / file, copy)
    if name:
        file, *words = SABOTAGES[name]
        text = (copy / file).read_text()
        for right, wrong in zip(words[::2], words[1::2], strict=True):
            assert right in text, f"{file} has changed: mend the sabotage {name}"
            text = text.replace(right, wrong)
        (copy / file).write_text(text)
    SERVICES.append(copy)
    try:
        yield
    finally:
        SERVICES.pop()
