"""Measures how the pipeline bears growth: `make bench-scale`; ROWS=50 (million records), SETTINGS="shared_buffers=2GB".

A table of so many records and one of a million (a tenth, where that is less) take turns, ROUNDS times, in one
PostgreSQL with its own settings, which embedded.py and Compose leave as they are. What counts is the ratio of the
medians. The table is printed; that of ten million records or more, with no other settings, goes into SCALE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from harness import Backend, backend_with, cpu_seconds, execute, past_the_guard, peak_memory_bytes
from psycopg import sql
from waiting import wait_until

from bench.bench import (
    MIB,
    SECONDS,
    Bench,
    curl,
    fetch_window,
    figure,
    machine,
    new_bench,
    post_bodies,
    sessions_cpu_seconds,
    write_between,
)

HERE = Path(__file__).resolve().parent
MILLION = 1_000_000
BATCH, CONNECTIONS = 1000, 4  # lines; as in the row on batches of bench.py
FETCHES = 20  # of a window, in a round
TURNS = 4  # in which the batches of a round are posted
EPOCH = 1_767_225_600  # 2026-01-01; the n-th record was created n ms later

# Lines as a site has them: few visitors come often and many seldom (Pareto), each with an address of its own, scattered
# by a multiplication; 20 clients by turns, each with ids that grow. Of 400 records one has a rare value of each kind.
VISITORS, SCATTER = 50_000, 2_654_435_761
FREQUENT = "158.55.121.177"  # of visitor 1, who sends 4 lines in 10
METHODS = 80 * ["GET"] + 12 * ["POST"] + 4 * ["HEAD"] + 2 * ["PUT"] + ["DELETE", "OPTIONS"]
STATUSES = 75 * [200] + 10 * [304] + 8 * [404] + 4 * [301] + 2 * [500] + [403]
FILL = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT CASE WHEN %(scattered)s THEN md5(n::text)::uuid
            ELSE (substr(md5((n / 1000 %% 20)::text), 1, 20) || lpad(to_hex(n * 60), 12, '0'))::uuid END,
       '2026-01-01Z'::timestamptz + n * interval '1 millisecond',
       CASE WHEN n %% 400 = 7 THEN inet '192.0.2.7'
            ELSE inet '0.0.0.0' + CASE WHEN %(scattered)s THEN n ELSE visitor END * %(scatter)s %% 4294967296 END,
       CASE WHEN n %% 400 = 3 THEN 'PURGE'
            ELSE (%(methods)s::text[])[method] END,
       '/shop/' || n %% 977 || '/item-' || n || '?ref=start',
       CASE WHEN n %% 400 = 5 THEN 418
            ELSE (%(statuses)s::smallint[])[status] END
  FROM (SELECT n,
               least(%(visitors)s, floor(power(1 - random(), -1 / 0.7)))::bigint AS visitor,
               1 + floor(random() * 100)::integer AS method,
               1 + floor(random() * 100)::integer AS status
          FROM generate_series(%(first)s::bigint, %(last)s) AS n) AS lines
"""
CONSTANTS = {"visitors": VISITORS, "scatter": SCATTER, "methods": METHODS, "statuses": STATUSES}

# Windows by where they are: the place of their start in the table, from 0 to 1, and the query that filters
WINDOWS = {
    "at the beginning": (0.0, ""),
    "in the middle": (0.5, ""),
    "at the end": (1.0, ""),
    "of a common method": (0.5, "&method=GET"),
    "of a rare method": (0.5, "&method=PURGE"),
    "of a common status": (0.5, "&status_code=200"),
    "of a rare status": (0.5, "&status_code=418"),
    "of a common address": (0.5, f"&ip={FREQUENT}"),
    "of a rare address": (0.5, "&ip=192.0.2.7"),
}

# Tables and lines by what is in them: what clients send of a site; or what is worst for an index, each id and each
# address anywhere in it
USUAL, SCATTERED = "clients' ids, usual addresses", "random ids, random addresses"

SIZES = """
SELECT 'the table', pg_table_size('logs')
 UNION ALL
SELECT indexrelid::regclass::text, pg_relation_size(indexrelid)
  FROM pg_index
 WHERE indrelid = 'logs'::regclass
"""
STORE = """
EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)
SELECT * FROM store_logs_v2(%s::uuid[], %s::inet[], %s::text[], %s::text[], %s::smallint[])
"""
WAL_BYTES = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8"
KEPT_FROM = "SELECT extract(epoch FROM kept_from_v1())::float8"

# At the pace of autovacuum; that one would leave the indexes out as long as few pages have rows to remove
AUTOVACUUMS_PACE = "SET vacuum_cost_delay = '2ms'"
VACUUM = "VACUUM (INDEX_CLEANUP ON) logs"

# ---- Figures --------------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """One row of what is printed: the values of either table, round by round."""

    work: str
    unit: str
    aim: str  # of the ratio, such as "≥ 0.85"
    small: list[float] = field(default_factory=list)
    large: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.large) / statistics.median(self.small)

    @property
    def verdict(self) -> str:
        """The aim, and whether it was missed."""
        if not self.aim:
            return ""
        relation, wanted = self.aim.split()
        kept = self.ratio >= float(wanted) if relation == "≥" else self.ratio <= float(wanted)
        return self.aim if kept else f"{self.aim}, **missed**"

    @property
    def cells(self) -> tuple[str, ...]:
        if statistics.median(self.small) == 0:  # pages that were read, as a rule: a small table is in memory
            return (self.work, self.unit, "0", figure(self.large), "", "")
        return (self.work, self.unit, figure(self.small), figure(self.large), f"{self.ratio:.2f}", self.verdict)


Figures = dict[str, Figure]  # by their work, in the order in which they are first measured


@dataclass(frozen=True, eq=False)
class Table:
    """One of two, and the figures of both."""

    kind: str
    records: int
    small: bool
    url: str
    figures: Figures

    def add(self, work: str, unit: str, value: float, aim: str = "") -> None:
        one = self.figures.setdefault(work, Figure(work, unit, aim))
        (one.small if self.small else one.large).append(value)
        print(f"    {self.records:>12,}  {work}: {value:,.4g} {unit}", flush=True)


def markdown(small: int, large: int, figures: Figures) -> str:
    columns = ("work", "unit", f"{small:,}", f"{large:,}", "ratio", "aim")
    rows = [columns, ("---",) * len(columns), *(one.cells for one in figures.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


Pairs = list[tuple[Table, Backend]]

# ---- The tables -----------------------------------------------------------------------------------------------------


def fill(table: Table) -> None:
    """As lines come: in the order of `created`, with all indexes in place; where that would take an hour, because each
    row is elsewhere in them, the indexes are built afterwards."""
    with past_the_guard(table.url) as connection:
        indexes = drop_indexes(connection) if table.kind == SCATTERED else []
        connection.execute("SELECT setseed(0.5)")
        pid, costs, step = connection.info.backend_pid, [], table.records // 10
        for tenth in range(10):
            before, part = cpu_seconds(pid), {"first": tenth * step + 1, "last": (tenth + 1) * step}
            connection.execute(FILL, {**CONSTANTS, **part, "scattered": table.kind == SCATTERED})
            costs.append(1e6 * (cpu_seconds(pid) - before) / step)
        for definition in indexes:
            connection.execute(definition.encode())
        began = time.perf_counter()
        connection.execute("VACUUM (ANALYZE) logs")
        if table.kind == USUAL:
            print(
                "    µs of the server's CPU for a row, tenth by tenth:", *(f"{cost:.1f}" for cost in costs), flush=True
            )
            table.add("INSERT … SELECT, the last tenth: the server's CPU", "µs/record", costs[-1])
            table.add("the first VACUUM (ANALYZE)", "s", time.perf_counter() - began)


def drop_indexes(connection: psycopg.Connection[Any]) -> list[str]:
    """All but that on `created`, which is appended to; what brings them back."""
    indexes = connection.execute(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid = 'logs'::regclass AND NOT indisunique"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}".encode())
    connection.execute("ALTER TABLE logs DROP CONSTRAINT logs_pkey")
    return ["ALTER TABLE logs ADD CONSTRAINT logs_pkey PRIMARY KEY (id)", *(definition for _, definition in indexes)]


def count_minutes(table: Table) -> None:
    """As the backend does in the background for /api/stats, without its rests: nothing else is to go on later."""
    with psycopg.connect(table.url, autocommit=True) as connection:
        began = time.perf_counter()
        while connection.execute("SELECT counted FROM count_minutes_v1(50000)").fetchall() != [(0,)]:
            pass
        if table.kind == USUAL:
            table.add("counting by minute, for /api/stats", "records/s", table.records / (time.perf_counter() - began))


def weigh(table: Table) -> None:
    for name, size in execute(table.url, SIZES):
        table.add(f"size of {name}", "bytes/record", size / table.records)


# ---- Reading --------------------------------------------------------------------------------------------------------


def read(bench: Bench, pairs: Pairs, limit: int, dice: random.Random) -> None:
    """The two take turns window by window: whatever else the machine does, it does to both."""
    target = bench.folder / "read"
    for name, (place, filters) in WINDOWS.items():
        times: dict[Table, list[float]] = {table: [] for table, _ in pairs}
        for _ in range(FETCHES):
            for table, backend in pairs:
                spread = table.records // 20
                first = int(place * (table.records - spread - limit)) + dice.randrange(spread) + 1
                query = f"date_from={EPOCH + first / 1000:.3f}&limit={limit}{filters}"
                times[table].append(fetch_window(f"{backend.data_url}?{query}", target, limit))
        for table in times:
            table.add(f"a window of {limit:,} {name}", "ms", 1000 * statistics.median(times[table]), "≤ 1.3")


def export(bench: Bench, table: Table, backend: Backend, records: int) -> None:
    target = bench.folder / "read"
    first = (table.records - records) // 2 + 1
    query = f"date_from={EPOCH + first / 1000:.3f}&date_to={EPOCH + (first + records) / 1000:.3f}"
    seconds = curl(f"{backend.data_url}?{query}", target)
    assert target.read_bytes().count(b"\n") == records
    table.add(f"an export of {records:,} out of the middle", "records/s", records / seconds)
    table.add("the backend's peak memory meanwhile", "MB", peak_memory_bytes(backend.pid) / MIB)


# ---- Storing --------------------------------------------------------------------------------------------------------


def batch(kind: str, client: str, number: int, dice: random.Random) -> list[tuple[str, str]]:
    """Ids and lines; all batches of a client are different."""
    lines = []
    for n in range(number * BATCH, (number + 1) * BATCH):
        name, visitor = f"{client}{n * 60:012x}", min(VISITORS, int(dice.paretovariate(0.7)))
        if kind == SCATTERED:
            name, visitor = f"{dice.getrandbits(128):032x}", dice.getrandbits(32)
        address = ".".join(map(str, (visitor * SCATTER % 2**32).to_bytes(4, "big")))
        uri = f"/shop/{n % 977}/item-{n}?ref=start"
        lines.append((str(uuid.UUID(name)), f"{address} {dice.choice(METHODS)} {uri} {dice.choice(STATUSES)}"))
    return lines


def bodies_of(kind: str, batches: int, dice: random.Random) -> list[bytes]:
    """As JSON, from as many clients as there are connections: post_bodies takes them by turns."""
    clients = [f"{dice.getrandbits(80):020x}" for _ in range(CONNECTIONS)]
    return [
        json.dumps(
            [{"id": name, "log": line} for name, line in batch(kind, clients[n % CONNECTIONS], n, dice)]
        ).encode()
        for n in range(batches)
    ]


def checkpoint(table: Table) -> None:
    """Of the whole cluster: from here on the first change of a page, in either table, writes all of it into the WAL."""
    execute(table.url, "CHECKPOINT")


def rate_of(backend: Backend, bodies: list[bytes]) -> float:
    """Lines stored per second."""
    return len(bodies) * BATCH / post_bodies(backend.data_url, "application/json", bodies, CONNECTIONS)


def cost_of(table: Table, backend: Backend, bodies: list[bytes]) -> tuple[float, float, float]:
    """Seconds, CPU seconds of the sessions, bytes of WAL."""
    cpu, [(wal,)] = sessions_cpu_seconds(table.url), execute(table.url, WAL_BYTES)
    seconds = post_bodies(backend.data_url, "application/json", bodies, CONNECTIONS)
    used, [(written,)] = sessions_cpu_seconds(table.url) - cpu, execute(table.url, WAL_BYTES)
    return seconds, used, written - wal


def store(pairs: Pairs, batches: int, dice: random.Random) -> None:
    """In several turns, from a checkpoint on."""
    bodies = [bodies_of(table.kind, batches, dice) for table, _ in pairs]
    sums = [[0.0, 0.0, 0.0] for _ in pairs]
    checkpoint(pairs[0][0])
    for turn in range(TURNS):
        for n, (table, backend) in enumerate(pairs):
            costs = cost_of(table, backend, bodies[n][turn::TURNS])
            sums[n] = [sum(values) for values in zip(sums[n], costs, strict=True)]
    for (table, _), (seconds, cpu, wal) in zip(pairs, sums, strict=True):
        work, lines = f"storing, {table.kind}", batches * BATCH
        table.add(work, "lines/s", lines / seconds, "≥ 0.85" if table.kind == USUAL else "")
        table.add(f"{work}: the server's CPU", "µs/line", 1e6 * cpu / lines)
        table.add(f"{work}: WAL from a checkpoint on", "bytes/line", wal / lines)
        pages = pages_read(table, max(1, batches // 5), dice)
        table.add(f"{work}: pages that were not in shared_buffers", "pages/line", pages)


def pages_read(table: Table, batches: int, dice: random.Random) -> float:
    """For a line, as store_logs_v2 is told to explain."""
    client, pages = f"{dice.getrandbits(80):020x}", 0
    with psycopg.connect(table.url, autocommit=True) as connection:
        for number in range(batches):
            ids, texts = zip(*batch(table.kind, client, number, dice), strict=True)
            columns = zip(*(text.split() for text in texts), strict=True)
            row = connection.execute(STORE, [list(ids), *map(list, columns)]).fetchone()
            assert row is not None
            pages += row[0][0]["Plan"]["Shared Read Blocks"]
    return pages / batches / BATCH


# ---- Retention and vacuum -------------------------------------------------------------------------------------------


def retain(bench: Bench, table: Table, backend: Backend, step: int, batches: int, dice: random.Random) -> None:
    """`backend` deletes nothing; beside it is one that does, for a while. Then VACUUM removes what was deleted."""
    began = time.time()
    rate_of(backend, bodies_of(USUAL, CONNECTIONS, dice))  # now all else has expired
    alone, beside, meanwhile = (bodies_of(USUAL, batches, dice) for _ in range(3))

    def measure(backend: Backend, bodies: list[bytes]) -> tuple[float, float]:
        """Lines stored per second, and the milliseconds of a window."""
        target, window = bench.folder / "read", f"{backend.data_url}?date_from={began:.3f}&limit={BATCH}"
        times = [fetch_window(window, target, BATCH) for _ in range(FETCHES)]
        return rate_of(backend, bodies), 1000 * statistics.median(times)

    checkpoint(table)
    rate, window_ms = measure(backend, alone)
    checkpoint(table)
    with ExitStack() as stack:
        script = backend_with(bench.new_folder(), EXPIRY_STEP_ROWS=step)
        deleting = bench.backend(stack, table.url, script=script, WORKERS=2, RETENTION_DAYS=1)
        deleting.wait_for_line("retention: deleting")
        start, [(kept_from,)] = time.perf_counter(), execute(table.url, KEPT_FROM)
        slower, longer = measure(deleting, beside)
        [(moved_to,)], seconds = execute(table.url, KEPT_FROM), time.perf_counter() - start
    table.add(f"retention: steps of {step:,}", "steps/s", 1000 * (moved_to - kept_from) / step / seconds)
    table.add("storing while expired records are deleted", "of the rate without", slower / rate)
    table.add(f"a window of {BATCH:,} while expired records are deleted", "of the time without", longer / window_ms)

    checkpoint(table)
    with ThreadPoolExecutor(1) as pool:
        vacuum = pool.submit(seconds_of_vacuum, table)
        wait_until(lambda: vacuum.done() or is_vacuumed(table), SECONDS, "VACUUM", poll=0.002)
        slower = rate_of(backend, meanwhile)
        table.add("VACUUM with all indexes, at autovacuum's pace", "s", vacuum.result())
    table.add("storing while VACUUM runs", "of the rate without", slower / rate)


def seconds_of_vacuum(table: Table) -> float:
    with psycopg.connect(table.url, autocommit=True) as connection:
        connection.execute(AUTOVACUUMS_PACE)
        began = time.perf_counter()
        connection.execute(VACUUM)
        return time.perf_counter() - began


def is_vacuumed(table: Table) -> bool:
    return bool(execute(table.url, "SELECT FROM pg_stat_progress_vacuum WHERE datname = current_database()"))


# ---- Run ------------------------------------------------------------------------------------------------------------

MARKS = ("<!-- make bench-scale -->", "<!-- end of make bench-scale -->")  # in SCALE.md
SETTINGS = ("shared_buffers", "max_wal_size", "checkpoint_timeout")


def measure(bench: Bench, small: int, large: int) -> Figures:
    """In phases, so that the tables are of their nominal size when they are read.

    Of a million records a window has 1,000, as has a step of retention, and 100 batches are posted in a round; with
    fewer, these are fewer, too: a rare value has to be in the table often enough, and something has to be left.
    """
    figures, dice = Figures(), random.Random(1)
    batches, limit, step = max(TURNS, small // 10_000), small // 1000, small // 1000
    usual, scattered = (
        [Table(kind, records, records == small, bench.postgres.create_logs(), figures) for records in (small, large)]
        for kind in (USUAL, SCATTERED)
    )
    for table in (*usual, *scattered):
        fill(table)
        count_minutes(table)
    for table in usual:
        weigh(table)
    with ExitStack() as stack:
        pairs = [(table, bench.backend(stack, table.url)) for table in usual]
        for _ in range(bench.rounds):
            read(bench, pairs, limit, dice)
        for _ in range(bench.rounds):
            for table, backend in pairs:
                export(bench, table, backend, small)
    for tables, share in ((usual, 1), (scattered, 2)):
        with ExitStack() as stack:
            pairs = [(table, bench.backend(stack, table.url, WORKERS=2)) for table in tables]
            for _ in range(bench.rounds):
                store(pairs, max(TURNS, batches // share), dice)
    with ExitStack() as stack:
        pairs = [(table, bench.backend(stack, table.url, WORKERS=2)) for table in usual]
        for _ in range(bench.rounds):
            for table, backend in pairs:
                retain(bench, table, backend, step, max(TURNS, batches // 2), dice)
    return figures


def configure(bench: Bench, settings: list[str]) -> None:
    """Sets PostgreSQL's settings and restarts it. Raises SystemExit for one that it refuses."""
    with psycopg.connect(bench.postgres.url("postgres"), autocommit=True) as connection:
        for setting in settings:
            name, _, value = setting.partition("=")
            statement = sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
            try:
                connection.execute(statement)
            except psycopg.Error as error:
                raise SystemExit(f"bench-scale: {setting}: {error.diag.message_primary}") from error
    bench.postgres.stop()
    bench.postgres.start()


def about(bench: Bench) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    settings = {name: execute(bench.postgres.url("postgres"), f"SHOW {name}")[0][0] for name in SETTINGS}
    facts = {**machine(bench.postgres), "memory": f"{memory:.0f} GiB", **settings}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, default=10, help="million records of the larger table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="of PostgreSQL")
    options = parser.parse_args()
    large = round(options.rows * MILLION)
    if large < 10_000:
        parser.error(f"--rows is {options.rows}: it must be 0.01 or more")
    small = min(MILLION, large // 10)
    began = time.perf_counter()
    with new_bench(options.rounds) as bench:
        if options.settings:
            configure(bench, options.settings)
        facts = about(bench)
        print(facts, flush=True)
        figures = measure(bench, small, large)
    minutes = (time.perf_counter() - began) / 60
    text = f"{facts}; {options.rounds} rounds, {minutes:.0f} minutes.\n\n{markdown(small, large, figures)}"
    print(text)
    if large >= 10 * MILLION and not options.settings:
        write_between(MARKS, HERE / "SCALE.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
