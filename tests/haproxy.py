"""A real HAProxy in front of a test, with the configuration of ops/haproxy.cfg."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import ROOT, kept_port
from waiting import wait_until

CONFIGURATION = ROOT / "ops/haproxy.cfg"
SERVER = re.compile(r"(?m)^    server (\w+) [\w-]+:8000$")
# Of what went wrong between HAProxy and a server, by the names of `show stat`
FAULTS = ("econ", "eresp", "srv_abrt", "wretr", "wredis")


class HAProxy:
    """One running HAProxy; what it logs is in the file `log` of its folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        self._socket = folder / "stats"

    def servers(self) -> dict[str, dict[str, str]]:
        """What `show stat` says of each backend, by its name."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self._socket))
            connection.sendall(b"show stat\n")
            with connection.makefile() as answer:
                rows = list(csv.DictReader(answer.read().removeprefix("# ").splitlines()))
        return {row["svname"]: row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")}

    def wait_until(self, name: str, state: str) -> None:
        """Until a server is UP or DOWN; on the way it is "UP 1/2", say."""
        wait_until(lambda: self.servers()[name]["status"] == state, 60, f"{name} to be {state}")

    def faults(self) -> dict[str, int]:
        """What went wrong, over all servers; only what did."""
        rows = self.servers().values()
        sums = {fault: sum(int(row[fault] or 0) for row in rows) for fault in FAULTS}
        return {fault: count for fault, count in sums.items() if count}


@contextmanager
def running_haproxy(folder: Path, ports: Sequence[int], changes: Mapping[str, str] | None = None) -> Iterator[HAProxy]:
    """HAProxy as it is shipped, but for the addresses; then each pattern of `changes` is replaced. The servers are
    called one, two and three."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    assert program, "haproxy is missing: apt-get install haproxy"
    folder.mkdir()
    with kept_port() as place:
        port = place.getsockname()[1]
        left = iter(ports)
        text = SERVER.sub(lambda found: f"    server {found[1]} 127.0.0.1:{next(left)}", CONFIGURATION.read_text())
        assert next(left, None) is None, "the configuration has fewer servers"
        for pattern, replacement in {
            r"resolvers containers #[^[]*?\n\n": "",
            r" resolvers containers init-addr libc,none": "",
            r"bind :8000": f"bind 127.0.0.1:{port}",
            r"(?m)^global$": f"global\n    stats socket {folder}/stats mode 600",
            **(changes or {}),
        }.items():
            text, count = re.subn(pattern, replacement, text)
            assert count == 1, f"{pattern!r} stands {count} times in {CONFIGURATION}"
        (folder / "haproxy.cfg").write_text(text)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([program, "-db", "-f", folder / "haproxy.cfg"], stdout=log, stderr=log)
        try:
            started = folder / "stats"
            wait_until(lambda: started.exists() or process.poll() is not None, what="HAProxy")
            yield HAProxy(folder, port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
