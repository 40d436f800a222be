"""GET /api/stats: its numbers are those of the records that GET /api/data gives, however they are counted."""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
import requests
from harness import Backend, past_the_guard

SECONDS = 30
MINUTE, MICROSECOND = timedelta(minutes=1), timedelta(microseconds=1)
Record = dict[str, Any]
Stats = dict[str, Any]

BEGIN = datetime(2026, 1, 1, 12, 0, 17, 250_000, tzinfo=UTC)
METHODS = ["GET", "GET", "GET", "POST", "PUT", "get", "BREW", "PROPFIND"]
STATUS_CODES = [100, 200, 200, 200, 204, 301, 404, 404, 418, 503, 599]
IPS = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "::1", "2001:db8::8"]
INSERT = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), created, ip, method, uri, status_code
  FROM unnest(%s::timestamptz[], %s::inet[], %s::text[], %s::text[], %s::smallint[])
       AS line (created, ip, method, uri, status_code)
"""


def put(url: str, moments: list[datetime], dice: random.Random) -> None:
    """A record for each moment, with values by chance."""
    columns = [
        moments,
        [dice.choice(IPS) for _ in moments],
        [dice.choice(METHODS) for _ in moments],
        [f"/{dice.choice('abcÀ')}?<{dice.randrange(20)}>" for _ in moments],
        [dice.choice(STATUS_CODES) for _ in moments],
    ]
    with past_the_guard(url) as connection:
        connection.execute(INSERT, columns)


def some_moments(count: int, minutes: float, dice: random.Random) -> list[datetime]:
    """From BEGIN on: in clusters with gaps, and at the very edges of minutes."""
    moments: set[datetime] = set()
    while len(moments) < count:
        moment = BEGIN + timedelta(minutes=dice.choice([dice.random() ** 3, dice.random()]) * minutes)
        if dice.random() < 0.2:
            moment = moment.replace(second=0, microsecond=0) + dice.choice([-1, 0, 0, 1]) * MICROSECOND
        moments.add(moment)
    return sorted(moments)


def ask(backend: Backend, path: str, **query: Any) -> requests.Response:
    asked = {
        name: f"{value:%Y-%m-%dT%H:%M:%S.%fZ}" if isinstance(value, datetime) else value
        for name, value in query.items()
    }
    return requests.get(f"{backend.url}/api/{path}", params=asked, timeout=SECONDS)


def stats_of(backend: Backend, **query: Any) -> Stats:
    answer = ask(backend, "stats", **query)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json"), answer.text
    return dict(answer.json())


def records_of(backend: Backend, **query: Any) -> list[Record]:
    answer = ask(backend, "data", **query)
    assert answer.status_code == 200, answer.text
    return list(answer.json())


def count_by(records: list[Record], name: str) -> Counter[Any]:
    return Counter(record["log"][name] for record in records)


def assert_counts(stats: Stats, records: list[Record], top: int = 10) -> None:
    """The numbers of a reply are those of its records."""
    assert stats["total"] == stats["top_of"] == len(records)
    assert stats["methods"] == count_by(records, "method")
    assert list(stats["methods"].values()) == sorted(stats["methods"].values(), reverse=True)
    assert stats["status_codes"] == {str(code): n for code, n in count_by(records, "status_code").items()}
    assert list(stats["status_codes"]) == sorted(stats["status_codes"])
    starts = [bucket["date_from"] for bucket in stats["buckets"]]
    classes = Counter((bisect(starts, one["created"]) - 1, one["log"]["status_code"] // 100) for one in records)
    assert [[bucket[f"{n}xx"] for n in range(1, 6)] for bucket in stats["buckets"]] == [
        [classes[place, n] for n in range(1, 6)] for place in range(len(starts))
    ]
    for name, listed in (("ip", stats["top_ips"]), ("uri", stats["top_uris"])):
        counts = count_by(records, name)
        assert [one["count"] for one in listed] == [count for _, count in counts.most_common(top)]
        assert all(counts[one[name]] == one["count"] for one in listed)
        assert len({one[name] for one in listed}) == len(listed)


def assert_buckets(stats: Stats, number: int) -> None:
    """They are as many as were asked for, without a gap, and of the same width: exactly, or to the minute."""
    edges = [datetime.fromisoformat(bucket["date_from"]) for bucket in stats["buckets"]]
    edges.append(datetime.fromisoformat(stats["buckets"][-1]["date_to"]))
    assert len(stats["buckets"]) == number
    assert (stats["buckets"][0]["date_from"], stats["buckets"][-1]["date_to"]) == (stats["date_from"], stats["date_to"])
    assert all(one["date_to"] == following["date_from"] for one, following in pairwise(stats["buckets"]))
    span = edges[-1] - edges[0]
    if span < number * MINUTE:
        assert all(abs(edge - edges[0] - n * span / number) <= MICROSECOND for n, edge in enumerate(edges))
    else:
        assert all(edge.second == edge.microsecond == 0 for edge in edges[1:-1])
        assert all(abs(edge - edges[0] - n * span / number) <= MINUTE / 2 for n, edge in enumerate(edges))


def a_window(moments: list[datetime], dice: random.Random) -> dict[str, Any]:
    """Of any length, at the edges of minutes or anywhere, some of it before or after all records; with some filters."""
    first, last = moments[0] - 3 * MINUTE, moments[-1] + 3 * MINUTE
    points = [first + dice.random() * (last - first) for _ in range(2)]
    points += [dice.choice(moments) + dice.choice([0, 0, 1]) * MICROSECOND for _ in range(2)]
    points += [point.replace(second=0, microsecond=0) for point in points]
    date_from, date_to = sorted(dice.sample(points, 2))
    window: dict[str, Any] = {"date_from": date_from, "date_to": date_to, "buckets": dice.choice([1, 2, 7, 60, 300])}
    filters: dict[str, list[Any]] = {"method": METHODS, "status_code": [*STATUS_CODES, 201], "ip": [*IPS, "192.0.2.9"]}
    for name in dice.sample(list(filters), dice.choice([0, 0, 1, 1, 2, 3])):
        window[name] = dice.choice(filters[name])
    return window


def assert_exact(backend: Backend, window: dict[str, Any]) -> None:
    """What is counted in a window whose end is below the newest record is what /api/data gives of it."""
    stats = stats_of(backend, **window)
    plain = {name: value for name, value in window.items() if name not in ("buckets", "top")}
    assert_counts(stats, records_of(backend, **plain))
    assert_buckets(stats, window["buckets"])


# ---- Exact ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(start_shared: Callable[..., Backend]) -> tuple[Backend, list[datetime]]:
    """A backend on a table of 3,000 records in two hours, and their times."""
    backend = start_shared()
    moments = some_moments(3000, 120, random.Random(1))
    put(backend.database_url, moments, random.Random(2))
    return backend, moments


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_the_records(counted: tuple[Backend, list[datetime]], seed: int) -> None:
    backend, moments = counted
    dice = random.Random(seed)
    for _ in range(40):
        assert_exact(backend, a_window(moments, dice))


def test_left_out_it_begins_with_the_first_minute_and_ends_now(counted: tuple[Backend, list[datetime]]) -> None:
    backend, moments = counted
    before = datetime.now(UTC)
    for start in ({}, {"date_from": 0}, {"date_from": "-1"}, {"date_from": "1000-01-01"}):
        stats = stats_of(backend, **start)
        assert datetime.fromisoformat(stats["date_from"]) == moments[0].replace(second=0, microsecond=0)
        assert before <= datetime.fromisoformat(stats["date_to"]) <= datetime.now(UTC)
        assert_counts(stats, records_of(backend))
        assert_buckets(stats, 60)


def test_of_an_empty_table_everything_is_zero(backend: Backend) -> None:
    for window in ({}, {"date_from": "2026-01-01"}, {"date_from": "2026-01-01", "date_to": "2026-01-02"}):
        stats = stats_of(backend, **window)
        assert_counts(stats, [])
        assert len(stats["buckets"]) == 60


@pytest.mark.parametrize(
    "window",
    [
        {"date_from": "2026-01-01T12:30:00Z", "date_to": "2026-01-01T12:30:00Z"},
        {"date_from": "2026-01-02", "date_to": "2026-02-01"},
        {"date_from": "2999-01-01"},
        {"date_from": "9999-12-31T23:59:59.999999Z"},
        {"date_from": "1970-01-02", "date_to": "1980-01-01", "buckets": 1000},
        {"date_from": "1000-01-01", "date_to": "1000-01-02"},
        {"date_to": "1970-01-01"},
    ],
    ids=str,
)
def test_a_window_without_records_is_zeros(counted: tuple[Backend, list[datetime]], window: dict[str, Any]) -> None:
    stats = stats_of(counted[0], **window)
    assert_counts(stats, [])
    assert len(stats["buckets"]) == window.get("buckets", 60)


def test_a_window_of_all_years_has_its_records_in_one_bucket(counted: tuple[Backend, list[datetime]]) -> None:
    window = {"date_from": "1970-01-02", "date_to": "9999-12-31T23:59:59.999999Z", "buckets": 300}
    stats = stats_of(counted[0], **window)
    assert_buckets(stats, 300)
    assert [sum(bucket[f"{n}xx"] for n in range(1, 6)) for bucket in stats["buckets"]].count(3000) == 1


@pytest.mark.parametrize("top", [0, 1, 3, 100])
def test_as_many_addresses_and_uris_are_listed_as_were_asked_for(
    counted: tuple[Backend, list[datetime]], top: int
) -> None:
    backend, _ = counted
    assert_counts(stats_of(backend, top=top), records_of(backend), top)


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("buckets=0", "buckets"),
        ("buckets=1001", "buckets"),
        ("top=101", "top"),
        ("top=-1", "top"),
        ("top=1&top=2", "top"),
        ("limit=5", "limit"),
        ("method=G(T", "method"),
        ("date_from=2026", "date_from"),
        ("date_from=2026-01-02&date_to=2026-01-01", "date_from"),
    ],
)
def test_a_wrong_parameter_is_400_and_named(counted: tuple[Backend, list[datetime]], query: str, wrong: str) -> None:
    answer = requests.get(f"{counted[0].url}/api/stats?{query}", timeout=SECONDS)
    assert (answer.status_code, answer.headers["Content-Type"]) == (400, "application/problem+json")
    assert wrong in answer.json()["detail"]


def test_head_is_get_without_the_body(counted: tuple[Backend, list[datetime]]) -> None:
    backend, moments = counted
    window = f"?date_from={moments[0]:%Y-%m-%d}&date_to={moments[-1]:%Y-%m-%dT%H:%M}"
    got = requests.get(f"{backend.url}/api/stats{window}", timeout=SECONDS)
    head = requests.head(f"{backend.url}/api/stats{window}", timeout=SECONDS)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == got.headers["Content-Length"]
