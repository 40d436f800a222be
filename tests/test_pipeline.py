"""What the three services promise together: from a log file to the shared file, each line once and in order."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fakes import Proxy, proxy_to
from harness import Backend, Service, assert_same, count_lines, line_of, read_records
from waiting import wait_until

Start = Callable[..., Service]
StartBackend = Callable[..., Backend]


def combined_log(count: int, first: int = 0) -> tuple[str, list[str]]:
    """So many different lines of a combined log, and what the pipeline makes of them."""
    dice = random.Random(first)
    raw, lines = [], []
    for n in range(first, first + count):
        ip = dice.choice((f"203.0.113.{dice.randrange(256)}", f"2001:db8::{dice.randrange(1, 65536):x}"))
        method, status = dice.choice(("GET", "POST", "HEAD", "PUT")), dice.choice((200, 206, 301, 404, 500))
        path = dice.choice((f"/page/{n}", f"/search?q=%22{n}%22&x='y'", f"/é/{n}", f'/back\\\\slash/\\"{n}'))
        uri = dice.choice(("", "", "https://example.org")) + path
        when = f"{n % 28 + 1:02}/Nov/2026:{n % 24:02}:{n % 60:02}:00 +0000"
        request = f'"{method} {uri} HTTP/1.{n % 2}"'
        raw.append(f'{ip} - - [{when}] {request} {status} {dice.randrange(9999)} "-" "agent/{n} (a \\"b\\")"')
        meant = uri.replace("\\\\", "%5C").replace('\\"', "%22").replace("é", "%C3%A9")
        lines.append(f"{ip} {method} {meant} {status}")
    return "".join(f"{line}\n" for line in raw), lines


@pytest.fixture
def export(start: Start, shared: Path) -> Callable[[str], Service]:
    """Starts an exporter from an address."""
    return lambda url: start("background.py", URL=url, DIRECTORY=shared.parent, REQUEST_DELAY=50)


def test_a_followed_access_log_is_in_the_shared_file_line_by_line_in_its_order_and_in_the_records_shape(
    start: Start, backend: Backend, export: Callable[[str], Service], shared: Path, tmp_path: Path
) -> None:
    text, lines = combined_log(600)
    source, journal = tmp_path / "access.log", tmp_path / "logs.txt"
    source.write_text(text)
    exporters = [export(backend.data_url) for _ in range(2)]
    client = start("client.py", URL=backend.data_url, LOG_FILE=journal, SOURCE=source)
    wait_until(lambda: count_lines(shared) >= 600, what="600 records in the shared file")
    assert [line_of(record) for record in read_records(shared)] == lines

    for n in range(600, 660, 20):  # it keeps following
        text, more = combined_log(20, n)
        with source.open("a") as file:
            file.write(text)
        lines += more
        wait_until(lambda: count_lines(shared) >= n + 20, what=f"{n + 20} records in the shared file")  # noqa: B023
    for exporter in exporters:  # one may have written all before the other has begun
        exporter.wait_for_line("appending")
    assert [service.end() for service in (client, *exporters)] == [0, 0, 0]

    records = read_records(shared)
    assert [line_of(record) for record in records] == lines
    assert_same(journal, records)
    assert records == backend.records()
    form = re.compile(
        r'\{"id":"[0-9a-f-]{36}","created":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z",'
        r'"log":\{"ip":"[^"]+","method":"[A-Z]+","uri":"([^"\\]|\\.)+","status_code":[1-5]\d\d\}\}'
    )
    assert all(form.fullmatch(line) for line in shared.read_text().splitlines())
    members: list[Any] = []
    first = shared.read_text().splitlines()[0]
    json.loads(first, object_pairs_hook=lambda pairs: members.append([name for name, _ in pairs]))
    assert members == [["ip", "method", "uri", "status_code"], ["id", "created", "log"]]


@pytest.fixture
def addresses() -> Iterator[Callable[[Backend], Proxy]]:
    """Gives a backend an address that stays when another process takes its place."""
    with ExitStack() as stack:
        yield lambda backend: stack.enter_context(proxy_to(backend))


def test_two_clients_two_backends_and_four_exporters_agree_after_one_of_each_was_killed(
    start: Start,
    start_backend: StartBackend,
    addresses: Callable[[Backend], Proxy],
    export: Callable[[str], Service],
    shared: Path,
    tmp_path: Path,
) -> None:
    backends = [start_backend()]
    backends.append(start_backend(DATABASE_URL=backends[0].database_url))
    proxies = [addresses(backend) for backend in backends]
    journals = [tmp_path / "logs-1.txt", tmp_path / "logs-2.txt"]

    def generate(n: int) -> Service:
        settings = {"THREADS_AMOUNT": 8, "REQUEST_DELAY_LIMIT": 10}
        return start("client.py", URL=proxies[n].data_url, LOG_FILE=journals[n], **settings)

    clients = [generate(n) for n in range(2)]
    exporters = [export(proxies[n % 2].data_url) for n in range(4)]

    def grown(more: int) -> None:
        """Until so many lines more have come out at the end."""
        goal = count_lines(shared) + more
        wait_until(lambda: count_lines(shared) >= goal, 60, f"{goal} records in the shared file")

    def kill(service: Service) -> None:
        assert service.process.poll() is None
        service.kill()
        service.process.wait(20)

    grown(300)
    kill(clients[0])
    clients[0] = generate(0)
    grown(300)
    kill(exporters[0])
    exporters[0] = export(proxies[0].data_url)
    grown(300)
    kill(backends[0])
    kill(exporters[1])
    grown(300)  # through the other one
    clients[0].wait_for_line("backend unreachable", 60)
    backends[0] = start_backend(DATABASE_URL=backends[1].database_url)
    proxies[0].upstream = backends[0].url
    exporters[1] = export(proxies[1].data_url)
    grown(300)

    clients[0].wait_for_line("backend back after", 60)
    assert [client.end() for client in clients] == [0, 0]
    for n in range(2):  # what a slow machine did not deliver in the 5 seconds after SIGTERM
        rest = start("client.py", URL=proxies[n].data_url, LOG_FILE=journals[n], SOURCE="-")
        assert rest.process.wait(60) == 0
    wait_until(lambda: count_lines(shared) >= count_lines(*journals), 60, "all lines in the shared file", poll=0.1)
    for exporter in exporters:
        exporter.wait_for_line("appending")
    assert [service.end() for service in exporters] == [0] * 4
    both = tmp_path / "both.txt"
    both.write_bytes(b"".join(journal.read_bytes() for journal in journals))
    records = read_records(shared)
    assert_same(both, records)
    assert records == backends[0].records() == backends[1].records()
