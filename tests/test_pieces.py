"""Long lines that container engines cut into pieces: client.py stores each as one, or refuses it; never a piece."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import PROBLEM, FakeBackend, Reply, Request, assert_stored, stored
from harness import Service, kill
from waiting import wait_until

import client

Start = Callable[..., Service]
PIECE_BYTES = 16 * 1024  # of containerd and Docker
LONG = "a" * 40_000


def combined(uri: str, agent: str = "curl") -> str:
    return f'192.0.2.1 - - [24/Nov/2026:18:43:46 +0000] "GET {uri} HTTP/1.1" 200 12 "-" "{agent}"'


def parts_of(line: str, size: int) -> list[str]:
    return [line[start : start + size] for start in range(0, len(line), size)]


def cri(line: str, stream: str = "stdout", size: int = PIECE_BYTES) -> list[str]:
    """As containerd and CRI-O write a line."""
    *parts, last = parts_of(line, size)
    tagged = [*((part, "P") for part in parts), (last, "F")]
    return [f"2026-11-24T18:43:46.123456789Z {stream} {tag} {part}\n" for part, tag in tagged]


def docker(line: str, stream: str = "stdout", size: int = PIECE_BYTES) -> list[str]:
    """As Docker's json-file driver does."""
    parts = parts_of(f"{line}\n", size)
    entries = ({"log": part, "stream": stream, "time": "2026-11-24T18:43:46.123456789Z"} for part in parts)
    return [json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries]


ENGINES = {"cri": cri, "docker": docker}
Engine = Callable[..., list[str]]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


def lines_of(*written: Sequence[str]) -> list[str]:
    data = "".join(piece for pieces in written for piece in pieces).encode()
    return [line.decode() for line in client.Parser("x").lines(data)]


# ---- Lines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 50, 100, PIECE_BYTES])
def test_a_line_in_pieces_is_one_line(engine: Engine, size: int) -> None:
    """Wherever it is cut: also inside an escape of JSON, and before the last character."""
    line = combined("/" + "b" * 100, 'say \\"GET /forged HTTP/1.1\\" 200 \\\\')
    assert lines_of(engine(line, size=size), engine(combined("/next"))) == [
        f"192.0.2.1 GET /{'b' * 100} 200",
        "192.0.2.1 GET /next 200",
    ]


def test_pieces_of_the_two_streams_are_kept_apart(engine: Engine) -> None:
    out = engine(combined("/out", LONG))
    err = engine(combined("/err", LONG), "stderr")
    mixed = [piece for pair in zip(out, err, strict=True) for piece in pair]
    between = [*out[:1], *engine(combined("/short"), "stderr"), *out[1:]]
    assert lines_of(mixed) == ["192.0.2.1 GET /out 200", "192.0.2.1 GET /err 200"]
    assert lines_of(between) == ["192.0.2.1 GET /short 200", "192.0.2.1 GET /out 200"]


def test_json_without_a_line_feed_that_is_not_dockers_is_a_whole_line() -> None:
    line = json.dumps({"log": combined("/a"), "stream": "stdout"})
    assert lines_of([f"{line}\n"]) == ["192.0.2.1 GET /a 200"]


def test_a_pattern_of_ones_own_is_tried_on_the_joined_line() -> None:
    parser = client.Parser("x", r'(?P<ip>[0-9.]+) .*"(?P<request>[^"]*)" by .* -> (?P<status>\d+)')
    pieces = cri(f'192.0.2.1 "GET /a HTTP/1.1" by {LONG} -> 200')
    assert parser.lines("".join(pieces).encode()) == [b"192.0.2.1 GET /a 200"]


def test_a_line_in_pieces_that_is_too_long_is_noted_with_its_length(engine: Engine) -> None:
    first, forged = combined("/a", "x" * 300_000), ' 192.0.2.9 GET /forged 200 "'
    noted, following = lines_of(engine(first + forged), engine(combined("/next")))
    assert noted.startswith("192.0.2.1 - - [24/Nov")
    length = re.search(r"\.\.\. a line of (\d+) bytes, too long", noted)
    assert length
    assert len(first + forged) <= int(length[1]) < len(first + forged) + 20  # Docker's with its escapes
    assert len(noted) < 400
    assert following == "192.0.2.1 GET /next 200"


def test_many_tiny_pieces_take_linear_time(engine: Engine) -> None:
    line = combined("/a", "x" * 100_000)
    assert lines_of(engine(line, size=1)) == ["192.0.2.1 GET /a 200"]


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder / "0.log"


@pytest.fixture
def follow(start: Start, fake: FakeBackend, journal: Path, source: Path) -> Callable[..., Service]:
    def start_following(**settings: Any) -> Service:
        return start("client.py", **{"URL": fake.data_url, "LOG_FILE": journal, "SOURCE": source, **settings})

    return start_following


def write(path: Path, *written: Sequence[str]) -> None:
    with path.open("a") as file:
        file.write("".join(piece for pieces in written for piece in pieces))


def wait_for_offset(journal: Path, offset: int) -> None:
    """So much of the newest file was read, and that is on disk."""

    def is_read() -> bool:
        state = Path(f"{journal}.source")
        states = list(json.loads(state.read_text())["sources"].values()) if state.exists() else []
        return bool(states) and states[0][-1]["offset"] == offset

    wait_until(is_read, what=f"{offset} bytes to be read")


def test_a_line_in_pieces_is_joined_over_a_kill(
    follow: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path, engine: Engine
) -> None:
    pieces = engine(combined("/long", LONG))
    write(source, engine(combined("/before")), pieces[:1])
    service = follow()
    for piece in pieces[1:]:
        wait_for_offset(journal, source.stat().st_size)
        kill(service)
        write(source, [piece])
        service = follow()
    write(source, engine(combined("/after")))
    assert_stored(fake, [f"192.0.2.1 GET {uri} 200" for uri in ("/before", "/long", "/after")])


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_line_in_pieces_is_joined_over_rotations(
    follow: Callable[..., Service], fake: FakeBackend, source: Path, journal: Path, engine: Engine, running: bool
) -> None:
    """Its beginning in one file, a piece that is all there is of the next one, its end in the third."""
    first, second, *rest = engine(combined("/long", LONG))
    write(source, engine(combined("/before")), [first])
    service = follow()
    wait_for_offset(journal, source.stat().st_size)
    if not running:
        kill(service)
    source.rename(source.with_name("0.log.20261124-184346"))
    write(source, [second])
    source.rename(source.with_name("0.log.20261124-184347"))
    write(source, rest, engine(combined("/after")))
    if not running:
        follow()
    assert_stored(fake, [f"192.0.2.1 GET {uri} 200" for uri in ("/before", "/long", "/after")])


def test_a_restored_journal_reads_no_piece_as_a_line(tmp_path: Path, engine: Engine) -> None:
    """What is read again after the journal lost its end begins where all lines had ended."""
    source, path = tmp_path / "0.log", tmp_path / "logs.txt"
    wanted = []
    opened = client.open_journal(str(path))
    followed = client.FollowedFile(str(source), opened)
    kept = b""
    for n in range(8):
        *begun, end = engine(combined(f"/{n}", LONG))
        write(source, begun)
        followed.step()
        write(source, [end])
        followed.step()
        wanted.append(f"192.0.2.1 GET /{n} 200")
        kept = path.read_bytes() if n == 4 else kept
    assert path.read_text().splitlines() == wanted
    os.close(opened._file)
    path.write_bytes(kept[:-20])
    again = client.FollowedFile(str(source), client.open_journal(str(path)))
    while again.step():
        pass
    assert set(path.read_text().splitlines()) == set(wanted)


def test_a_source_that_lost_its_end_in_pieces_is_read_on(tmp_path: Path, engine: Engine) -> None:
    """A power cut took its last bytes, in the middle of a piece; then the engine writes on."""
    source, path = tmp_path / "0.log", tmp_path / "logs.txt"
    write(source, *(engine(combined(f"/{n}", LONG)) for n in range(5)))
    opened = client.open_journal(str(path))
    while client.FollowedFile(str(source), opened).step():
        pass
    os.close(opened._file)
    whole = source.read_text().splitlines(keepends=True)
    source.write_text("".join(whole[:-1]))
    opened = client.open_journal(str(path))
    followed = client.FollowedFile(str(source), opened)
    followed.step()
    write(source, whole[-1:], engine(combined("/new", LONG)))
    while followed.step():
        pass
    lines = path.read_text().splitlines()
    assert lines[:5] == [f"192.0.2.1 GET /{n} 200" for n in range(5)]
    assert lines[-1] == "192.0.2.1 GET /new 200"
    assert set(lines) == {f"192.0.2.1 GET /{n} 200" for n in (*range(5), "new")}


def refusing(fake: FakeBackend) -> Callable[[Request], Reply]:
    """Refuses what has not four fields."""

    def answer(request: Request) -> Reply:
        good = [item for item in request.items if len(item["log"].split()) == 4]
        refused = [{"index": n, "reason": "no"} for n, item in enumerate(request.items) if item not in good]
        if not good:
            return Reply(400, json.dumps({"detail": "no", "rejected": refused}).encode(), PROBLEM)
        body = json.loads(fake.serve(replace(request, body=json.dumps(good).encode())).body)
        return Reply(201, json.dumps({**body, "rejected": refused}).encode())

    return answer


def test_the_beginning_of_a_line_without_an_end_is_refused(
    start: Start, fake: FakeBackend, journal: Path, tmp_path: Path, engine: Engine
) -> None:
    fake.answer = refusing(fake)
    source = tmp_path / "input"
    write(source, engine(combined("/before")), engine(combined("/begun", LONG))[:2], engine(combined("/err"), "stderr"))
    with source.open() as file:
        service = start("client.py", stdin=file.fileno(), URL=fake.data_url, LOG_FILE=journal, SOURCE="-")
        assert service.process.wait(60) == 0
    assert stored(fake) == ["192.0.2.1 GET /before 200", "192.0.2.1 GET /err 200"]
    [note] = [json.loads(line) for line in Path(f"{journal}.rejected").read_text().splitlines()]
    length = re.search(r"the first (\d+) bytes of a line whose end never came", note["log"])
    assert length
    assert 2 * PIECE_BYTES <= int(length[1]) < 2 * PIECE_BYTES + 20
