"""Batches are read at once where all is good and one by one where it is not: both must come to the same."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

import backend

GOOD = "192.0.2.1 GET /a 200"
ALSO_GOOD = (
    "  \t192.0.2.1\t \tGET   /b\t404 \t",
    "192.0.2.1 GET /carriage-return 200\r",
    "\r192.0.2.1 GET /a 200",
    "2001:DB8::1 GET /v6 200",
    "::ffff:192.0.2.1 PROPFIND /mapped 599",
    "192.0.2.1 GET /ünïcödé/日本/😀 200",
    "192.0.2.1 GET " + "ü" * 2048 + " 200",
    "192.0.2.1 !#$%&'*+-.^_`|~ 200 200",
)
BAD = (
    "",
    " ",
    "\r",
    "192.0.2.1",
    f"{GOOD} {GOOD}",
    f"x {GOOD}",
    f"{GOOD} x",
    "192.0.2.1 GET /a 600",
    "192.0.2.1 GET /a 2000",
    "192.0.2.1 GET /a \uff12\uff10\uff10",
    "192.0.2.256 GET /a 200",
    "192.0.2 GET /a 200",
    "1:2:3 GET /a 200",
    ". GET /a 200",
    "192.0.2.1 GET /a\x0bb 200",
    "192.0.2.1 GET /a\x00 200",
    "192.0.2.1 GET /a\x85b 200",
    "192.0.2.1 GET /a\u2028b 200",
    "192.0.2.1\u00a0GET /a 200",
    "192.0.2.1 " + "M" * 33 + " /a 200",
    "192.0.2.1 GET /" + "a" * 8192 + " 200",
    "192.0.2.1 GET /" + "ü" * 4096 + " 200",
    f"{GOOD}\r\r{GOOD}",
)
WITH_LINE_FEED = (f"{GOOD}\n", f"\n{GOOD}", f"{GOOD}\n{GOOD}", "192.0.2.1 GET\n/a 200", "192.0.2.1 GET /a\n200", "\n")
ID = "01234567-89ab-cdef-0123-456789abcdef"
BAD_ITEMS: tuple[Any, ...] = (
    None, 7, "text", [], [GOOD, ID], {}, {"id": ID}, {"log": None, "id": ID}, {"log": [GOOD], "id": ID},
    {"log": GOOD, "id": None}, {"log": GOOD, "id": 7}, {"log": GOOD, "id": f"{ID}\n"}, {"log": GOOD, "id": f" {ID}"},
    {"log": GOOD, "id": ID.replace("-", "")}, {"log": GOOD, "id": ID, "more": 1}, {"log": GOOD, "ID": ID},
    {"log": "192.0.2.1 GET /\ud800 200", "id": ID},
)  # fmt: skip


def outcome(read: Callable[[], backend.Ticket], first_column: int = 0) -> Any:
    """All that a ticket is and answers, or why there is none."""
    try:
        ticket = read()
    except backend.BadRequest as error:
        return error.description, getattr(error, "rejected", None), error.to_dict()
    created = datetime(2026, 1, 1, tzinfo=UTC)
    stored = backend.Stored(created, {}, frozenset())
    known = stored._replace(known={ticket.count - 1: created})
    refused = stored._replace(conflicting=frozenset([0] if ticket.count > 1 else []))
    answers = [(ticket.answer(one), ticket.tally(one)) for one in (stored, known, refused)]
    return ticket.columns[first_column:], ticket.count, ticket.rejected, ticket.repeats, ticket.size, answers


def with_ids(lines: Sequence[str]) -> list[Any]:
    return [{"id": str(uuid.uuid4()), "log": line} for line in lines]


def assert_text_is_read_alike(lines: Sequence[bytes]) -> None:
    at_once = outcome(lambda: backend.read_lines(b"".join(line + b"\n" for line in lines)), first_column=1)
    assert at_once == outcome(lambda: backend.read_one_by_one(lines, backend.parse_text), first_column=1)


def assert_items_are_read_alike(items: Sequence[Any]) -> None:
    at_once = outcome(lambda: backend.read_items(items))
    assert at_once == outcome(lambda: backend.read_one_by_one(items, backend.parse_item))


@pytest.fixture
def no_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read here is read at once."""

    def fail(*arguments: object) -> None:
        raise AssertionError(f"read one by one: {arguments}")

    monkeypatch.setattr(backend, "read_one_by_one", fail)


@pytest.mark.usefixtures("no_single")
def test_a_batch_of_good_lines_is_read_at_once_whatever_they_look_like() -> None:
    lines = [GOOD, *ALSO_GOOD, GOOD]
    assert backend.read_items(with_ids(lines)).count == len(lines)
    assert backend.read_lines("\n".join(lines).encode()).count == len(lines)
    assert backend.read_lines(GOOD.encode()).columns[1:] == (b"192.0.2.1", b"GET", b"/a", b"200")


@pytest.mark.parametrize("line", [*ALSO_GOOD, *BAD], ids=lambda line: json.dumps(line[:30]))
def test_a_line_means_the_same_wherever_in_a_batch_it_stands(line: str) -> None:
    for lines in ([line, GOOD, GOOD], [GOOD, line, GOOD], [GOOD, GOOD, line], [line], [line, line]):
        assert_text_is_read_alike([each.encode() for each in lines])
        assert_items_are_read_alike(with_ids(lines))


@pytest.mark.parametrize("line", WITH_LINE_FEED, ids=json.dumps)
def test_a_line_feed_inside_of_a_json_line_makes_no_second_line(line: str) -> None:
    for lines in ([line, GOOD, GOOD], [GOOD, line, GOOD], [GOOD, GOOD, line], [line], [line, line], [line, "", GOOD]):
        assert_items_are_read_alike(with_ids(lines))


def test_bytes_that_are_no_utf_8_spoil_their_own_line_only() -> None:
    for spoilt in (b"192.0.2.1 GET /\xff 200", b"\xff", b"192.0.2.1 GET /\xed\xa0\x80 200"):
        for lines in ([spoilt, GOOD.encode()], [GOOD.encode(), spoilt], [spoilt]):
            assert_text_is_read_alike(lines)


@pytest.mark.parametrize("item", BAD_ITEMS, ids=lambda item: json.dumps(item)[:50])
def test_what_is_no_item_is_told_wherever_in_a_batch_it_stands(item: Any) -> None:
    good = with_ids([GOOD, GOOD])
    for items in ([item, *good], [good[0], item, good[1]], [*good, item], [item]):
        assert_items_are_read_alike(items)


def test_an_id_that_stands_twice_is_one_record_or_is_refused() -> None:
    one, other = with_ids([GOOD, "192.0.2.1 GET /other 200"])
    for twice in (one, {**one, "id": one["id"].upper()}, {**other, "id": one["id"]}, {"log": GOOD, "id": ID.upper()}):
        for items in ([one, twice], [one, other, twice], [other, twice, one, twice]):
            assert_items_are_read_alike(items)
