"""The failover test: three PostgreSQL under Patroni are struck under load; then the oracle, and a table of times.

    python tests/chaos_patroni.py --patroni PROGRAM [--etcd 3] [--postgres 18] [--minutes 10] [--seed 1] [--only KIND]

Two clients, two backends that know all three servers, two exporters on one shared file. Every half minute the leader is
struck, and is back before the next strike. In the end the lines of journals, database and shared file are compared by
id and content. Exit 0 if they are equal, the cluster has lost nothing that it had confirmed, and all strikes were
survived.

The table says for how long no line was acknowledged, and what of it was ours: from the moment when a new leader has
confirmed a write of the probe, which asks each server for itself, to the first line that a client knows to be stored.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from arena import Slot, assert_stored_and_exported, failures_at_rest, verify
from harness import Backend, Service, backend_command, count_lines, execute, journal_ids
from patroni_cluster import Cluster, Node, Probe, Programs, adopt_orphans
from waiting import wait_until

SECONDS_BETWEEN = 30.0  # from one strike to the next, if all are back by then
LEADER_SECONDS = 120.0  # for another leader: the time to live of the lock, and what a busy machine takes
REST_SECONDS = 120.0  # until all must be at rest at the end
MOST_SECONDS_OF_OURS = 15.0  # more than that is a failure; AIM_SECONDS is what it should be, on a machine with room
AIM_SECONDS = 2.0
CLIENTS, EXPORTERS, THREADS, DELAY_MILLISECONDS = 2, 2, 3, 30  # some 300 lines/s

# ---- The strikes ----------------------------------------------------------------------------------------------------

Heal = Callable[[], None]


def kill_node(cluster: Cluster, leader: Node, dice: random.Random) -> Heal:
    leader.kill()
    return leader.start


def freeze_node(cluster: Cluster, leader: Node, dice: random.Random) -> Heal:
    """It goes on when another one leads, or some seconds later: for all it knows it is still the leader."""
    leader.pause()
    seconds = dice.uniform(0.0, 8.0)

    def go_on() -> None:
        threading.Event().wait(seconds)
        leader.resume()

    return go_on


def kill_patroni(cluster: Cluster, leader: Node, dice: random.Random) -> Heal:
    """Its PostgreSQL goes on as a primary until Patroni is started again: nothing shuts it off meanwhile."""
    leader.kill_patroni()
    return leader.start


def switch_over(cluster: Cluster, leader: Node, dice: random.Random) -> Heal:
    def is_taken() -> bool:
        """Patroni refuses when it does not reach the candidate in time: then nothing has happened."""
        wish = {"leader": leader.name, "candidate": cluster.standby().name}
        status, text = leader.ask("/switchover", wish, seconds=LEADER_SECONDS)
        return status == 200 or "unknown" in text

    wait_until(is_taken, LEADER_SECONDS, "a switchover", poll=2.0)
    return lambda: None


KINDS: dict[str, Callable[[Cluster, Node, random.Random], Heal]] = {
    "kill -9 the leader's node": kill_node,
    "freeze the leader's node": freeze_node,
    "switch over": switch_over,
    "kill -9 the leader's Patroni": kill_patroni,
}


HEADINGS = ("at", "strike", "leader", "then", "no ack. for", "of it ours", "whole after", "old leader back by")


class Outcome(NamedTuple):
    """What became of a strike; times in seconds."""

    at: float
    kind: str
    old: str
    new: str
    silence: float  # the longest time without an acknowledgement
    ours: float  # of it, after the new leader has confirmed a write
    back: float  # until three nodes were in step again
    by: str  # how the old leader came back

    def cells(self) -> tuple[str, ...]:
        times = (f"{seconds:.1f} s" for seconds in (self.silence, self.ours, self.back))
        return f"{self.at:.0f} s", self.kind, self.old, self.new, *times, self.by


# ---- The pipeline ---------------------------------------------------------------------------------------------------


class Pipeline:
    """Clients, backends and exporters, on a database of the cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._folder, self._cluster = folder, cluster
        self._started = itertools.count()
        self.file = folder / "shared" / "data.txt"
        self.backends: list[Backend] = []
        self.clients: list[Slot] = []
        self.exporters: list[Slot] = []

    def start(self) -> None:
        execute(self._cluster.wait_whole().url("postgres"), "CREATE DATABASE logs")
        backend_command("migrate", self._cluster.url("logs"))
        for n in range(CLIENTS):
            self.backends.append(Backend(self._output(), self._cluster.url("logs")))
            self.clients.append(Slot(self._client(n)))
        for n in range(EXPORTERS):
            self.exporters.append(Slot(self._exporter(n)))

    @property
    def journals(self) -> list[Path]:
        return [self._folder / f"client{n}" / "logs.txt" for n in range(CLIENTS)]

    def _output(self) -> Path:
        return self._folder / f"output.{next(self._started)}"

    def _client(self, n: int, **settings: Any) -> Callable[[], Service]:
        settings |= {"URL": self.backends[n].data_url, "LOG_FILE": str(self.journals[n])}
        settings |= {"THREADS_AMOUNT": THREADS, "REQUEST_DELAY_LIMIT": DELAY_MILLISECONDS}
        return lambda: Service("client.py", self._output(), **settings)

    def exporter_settings(self, n: int) -> dict[str, Any]:
        return {"URL": self.backends[n].data_url, "DIRECTORY": str(self.file.parent), "REQUEST_DELAY": 200}

    def _exporter(self, n: int) -> Callable[[], Service]:
        return lambda: Service("background.py", self._output(), **self.exporter_settings(n))

    def drain(self) -> None:
        """All lines of the journals go on to the shared file, in time; then all parts end."""
        deadline = time.monotonic() + REST_SECONDS

        def left() -> float:
            return max(1.0, deadline - time.monotonic())

        for n, slot in enumerate(self.clients):
            assert slot.end(signal.SIGTERM, left()) == 0, slot.service.printed
            rest = self._client(n, SOURCE="-")()
            assert rest.process.wait(left()) == 0, rest.printed
        total = sum(map(count_lines, self.journals))
        wait_until(lambda: count_lines(self.file) >= total, left(), f"{total} lines in the shared file", poll=0.2)
        for slot in self.exporters:
            assert slot.end(signal.SIGTERM, left()) == 0, slot.service.printed
        verify(self.exporter_settings(0))
        for backend in self.backends:
            assert backend.end() == 0, backend.printed

    def compare(self, leader: Node) -> int:
        """The oracle; the number of lines. Raises AssertionError."""
        wanted = {key: line for journal in self.journals for key, line in journal_ids(journal).items()}
        assert_stored_and_exported(wanted, leader.url("logs"), [self.file])
        return len(wanted)

    def destroy(self) -> None:
        for slot in (*self.clients, *self.exporters):
            slot.service.destroy()
        for backend in self.backends:
            backend.destroy()


class Acknowledgements:
    """When clients came to know that lines are stored: the moments at which a position file has changed."""

    def __init__(self, journals: Sequence[Path]) -> None:
        self._positions = {Path(f"{journal}.position"): b"" for journal in journals}
        self._ended = threading.Event()
        self.moments: list[float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            for path, before in self._positions.items():
                with suppress(FileNotFoundError):
                    if (position := path.read_bytes()) != before:
                        self._positions[path] = position
                        self.moments.append(time.monotonic())

    def since(self, moment: float) -> list[float]:
        return self.moments[bisect_left(self.moments, moment) :]

    def longest_silence(self, begin: float, end: float) -> float:
        """The longest time between two of them, from the last one before `begin` to the first one after `end`."""
        first = max(0, bisect_right(self.moments, begin) - 1)
        moments = self.moments[first : bisect_left(self.moments, end) + 1]
        return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


# ---- The run --------------------------------------------------------------------------------------------------------


class Run:
    """Strikes a cluster under load, one strike after the other: what became of each, and what went wrong."""

    def __init__(self, cluster: Cluster, pipeline: Pipeline, seed: int, kinds: Sequence[str]) -> None:
        self.outcomes: list[Outcome] = []
        self.failures: list[str] = []
        self.lines = self.confirmed = 0
        self._cluster, self._pipeline, self._kinds = cluster, pipeline, kinds
        self._dice = random.Random(seed)
        self._probe = Probe(cluster)
        self._acknowledgements = Acknowledgements(pipeline.journals)
        self._begin = time.monotonic()

    def strike_all(self, seconds: float) -> None:
        """Every kind comes up before one comes up again."""
        kinds = itertools.cycle(self._kinds)
        while (began := time.monotonic()) < self._begin + seconds:
            try:
                outcome = self._strike(next(kinds))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return
            self.outcomes.append(outcome)
            print("  ".join(outcome.cells()), flush=True)
            pause = began + SECONDS_BETWEEN - time.monotonic() + self._dice.uniform(0.0, 2.0)
            threading.Event().wait(max(1.0, pause))

    def _strike(self, kind: str) -> Outcome:
        leader, timeline = self._cluster.wait_whole(), self._probe.timeline
        printed = len(leader.printed)
        began = time.monotonic()
        heal = KINDS[kind](self._cluster, leader, self._dice)
        written = wait_until(lambda: self._probe.above(timeline), LEADER_SECONDS, "writes to a new leader")[0]
        since = self._acknowledgements.since
        acknowledged = wait_until(lambda: since(written.at), LEADER_SECONDS, "an acknowledged line")[0]
        heal()
        self._cluster.wait_whole()
        return Outcome(
            began - self._begin,
            kind,
            leader.name,
            written.node,
            self._acknowledgements.longest_silence(began - 1.0, acknowledged),
            acknowledged - written.at,
            time.monotonic() - began,
            way_back(leader.printed[printed:]),
        )

    def rest(self) -> None:
        """All comes to rest, and is compared."""
        self.failures += failures_at_rest(self._pipeline.drain, self._compare)
        self._acknowledgements.end()

    def _compare(self) -> None:
        self._probe.end()
        leader = self._cluster.wait_whole()
        self.confirmed, lost = len(self._probe.written), self._probe.lost(leader)
        if lost:
            self.failures.append(f"the cluster lost {len(lost)} rows of the probe that it had confirmed: {lost[:3]}")
        self.lines = self._pipeline.compare(leader)

    def judge(self) -> list[str]:
        """What speaks against a good verdict."""
        late = [outcome for outcome in self.outcomes if outcome.ours > MOST_SECONDS_OF_OURS]
        return [
            *self.failures,
            *([] if self.outcomes else ["nothing was struck"]),
            *(f"{outcome.kind}: {outcome.ours:.1f} s of ours" for outcome in late),
        ]

    def print_table(self) -> None:
        rows = [HEADINGS, *(outcome.cells() for outcome in self.outcomes)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print()
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        above = sum(outcome.ours > AIM_SECONDS for outcome in self.outcomes)
        print(f"\nours: {above} of {len(self.outcomes)} above {AIM_SECONDS:g} s")


def way_back(printed: str) -> str:
    """How a node came back, from what its Patroni has printed."""
    if "replica has been created" in printed:
        return "a new copy"
    return "pg_rewind" if "running pg_rewind" in printed else "replication"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patroni", required=True, help="the program")
    parser.add_argument("--etcd", type=int, choices=(2, 3), default=3, help="the version of etcd's protocol")
    parser.add_argument("--postgres", type=int, choices=(16, 18), default=18, help="the version of PostgreSQL")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--keep", action="store_true", help="keep all files, also if all is well")
    parser.add_argument("--only", choices=list(KINDS), action="append", help="this kind of strike; all by default")
    options = parser.parse_args(arguments)
    programs = Programs(options.patroni, options.etcd, options.postgres)
    print(f"{programs.describe()}; seed {options.seed}", flush=True)
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="patroni-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        cluster = Cluster(folder)
        pipeline = Pipeline(folder, cluster)
        stack.callback(cluster.destroy)
        stack.callback(pipeline.destroy)
        cluster.start(programs)
        pipeline.start()
        run = Run(cluster, pipeline, options.seed, options.only or list(KINDS))
        run.strike_all(options.minutes * 60)
        run.rest()
    against = run.judge()
    run.print_table()
    verdict = "FAILED" if against else "equal"
    count = f"{len(run.outcomes)} strikes, {run.lines} lines, {run.confirmed} rows of the probe"
    print(f"seed {options.seed}: {count}, verdict: {verdict}")
    print(*against, sep="\n", end="\n" if against else "")
    if against or options.keep:
        print(f"files and outputs are kept in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
