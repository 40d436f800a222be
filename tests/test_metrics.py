"""/metrics: it counts what happened, over all workers, also while the database hangs; and what refuses is named."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import falcon.inspect
import psycopg
import pytest
import requests
from harness import ROOT, STORING_LOCK, WAITING_TO_STORE, Backend, backend_with, children_of
from raw_http import connect, exchange, post, request
from scraping import Samples, refusals, scrape
from waiting import wait_until

import backend as service

SECONDS = 30
TOKEN = "metrics-token"
KEY = {"Authorization": f"Bearer {TOKEN}"}
PLAIN = {"Content-Type": "text/plain"}
IDS = [f"00000000-0000-4000-8000-{n:012d}" for n in range(10)]

StartBackend = Callable[..., Backend]


# ---- What is counted ------------------------------------------------------------------------------------------------


def settled(url: str, requests_before: int) -> Samples:
    """A scrape when so many requests have been counted: one is when its answer is ended, a moment after it has come."""

    def counted() -> Samples:
        samples = scrape(url)
        done = [value for name, value in samples.by("requests_total").items() if "/metrics" not in name]
        return samples if sum(done) >= requests_before else Samples()

    return wait_until(counted, SECONDS, f"{requests_before} requests")


def test_lines_are_counted_as_stored_duplicate_or_rejected_just_as_the_answers_say(backend: Backend) -> None:
    line, other, bad = "192.0.2.1 GET /a 200", "192.0.2.1 GET /b 200", "nothing"
    bodies: list[Any] = [
        {"log": line, "id": IDS[0]}, {"log": line, "id": IDS[0]}, {"log": other, "id": IDS[0]}, {"log": bad},
        [{"log": line}, {"log": line, "id": IDS[0]}, {"log": other, "id": IDS[0]}, {"log": bad}],
        [{"log": line, "id": IDS[1]}, {"log": line, "id": IDS[1]}, {"log": other, "id": IDS[1]}],
        [{"log": other, "id": IDS[0]}, {"log": other, "id": IDS[0]}, {"log": line}],
        [{"log": other, "id": IDS[0]}, {"log": bad}],
        [{"log": bad}, {"log": bad}],
    ]  # fmt: skip
    wanted = [0, 0, 0]
    for body in bodies:
        answer = requests.post(backend.data_url, json=body, timeout=SECONDS)
        said = answer.json()
        if isinstance(body, dict):
            wanted[{201: 0, 200: 1}.get(answer.status_code, 2)] += 1
        else:
            wanted[0] += said.get("accepted", 0)
            wanted[1] += said.get("duplicates", 0)
            wanted[2] += len(said["rejected"])
    text = requests.post(backend.data_url, data=f"{line}\n{bad}\n", headers=PLAIN, timeout=SECONDS).json()
    wanted = [wanted[0] + text["accepted"], wanted[1], wanted[2] + len(text["rejected"])]
    assert min(wanted) > 2
    samples = scrape(backend.url)
    assert [samples[f"lines_{what}_total"] for what in ("stored", "duplicate", "rejected")] == wanted
    assert samples["lines_stored_total"] == len(backend.records())


def test_requests_are_counted_by_method_route_and_status_with_their_time(backend: Backend) -> None:
    requests.post(backend.data_url, json={"log": "192.0.2.1 GET /a 200"}, timeout=SECONDS)
    for path in ("/api/data", "/api/data?limit=0", "/nothing/a", "/nothing/b", "/docs/assets/x", "/api/health"):
        requests.get(f"{backend.url}{path}", timeout=SECONDS)
    requests.request("LINK", backend.data_url, timeout=SECONDS)
    requests.head(backend.data_url, timeout=SECONDS)
    samples = settled(backend.url, 8)
    assert {name: value for name, value in samples.by("requests_total").items() if "/metrics" not in name} == {
        'requests_total{method="GET",route="/api/data",status="200"}': 1,
        'requests_total{method="GET",route="/api/data",status="400"}': 1,
        'requests_total{method="GET",route="/api/health",status="200"}': 1,
        'requests_total{method="GET",route="/docs/assets/{file}",status="404"}': 1,
        'requests_total{method="GET",route="other",status="404"}': 2,
        'requests_total{method="HEAD",route="/api/data",status="200"}': 1,
        'requests_total{method="POST",route="/api/data",status="201"}': 1,
        'requests_total{method="other",route="/api/data",status="400"}': 1,
    }
    assert samples['request_duration_seconds_count{method="GET",route="/api/data"}'] == 2
    assert samples['request_duration_seconds_bucket{le="+Inf",method="GET",route="/api/data"}'] == 2
    assert 0 < samples['request_duration_seconds_sum{method="GET",route="/api/data"}'] < SECONDS


def test_commits_are_counted_by_their_lines_and_a_post_takes_as_long_as_its_commit(backend: Backend) -> None:
    lines = [{"log": f"192.0.2.1 GET /{n} 200"} for n in range(30)]
    with psycopg.connect(backend.database_url) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(STORING_LOCK)
        waiting = pool.submit(requests.post, backend.data_url, json=lines, timeout=SECONDS)
        wait_until(lambda: scrape(backend.url)["queue_bytes"] > 1000, SECONDS, "lines in the queue")
        wait_until(lambda: len(holder.execute(WAITING_TO_STORE).fetchall()) == 1, SECONDS, "a statement that waits")
        time.sleep(0.5)  # how long the commit takes at least
        holder.rollback()
        assert waiting.result(SECONDS).status_code == 201
    samples = scrape(backend.url)
    assert (samples["group_lines_count"], samples["group_lines_sum"]) == (1, 30)
    assert (samples['group_lines_bucket{le="20.0"}'], samples['group_lines_bucket{le="50.0"}']) == (0, 1)
    assert samples["commit_duration_seconds_sum"] > 0.4
    assert samples['request_duration_seconds_sum{method="POST",route="/api/data"}'] > 0.4
    wait_until(lambda: scrape(backend.url)["queue_bytes"] == 0, SECONDS, "an empty queue")


def with_the_database(backend: Backend) -> Samples:
    """A scrape has little time for the database; on a busy machine one may have to do without."""

    def answered() -> Samples:
        samples = scrape(backend.url)
        return samples if samples["database_up"] else Samples()

    return wait_until(answered, SECONDS, "the database's answer")


def test_the_state_of_database_and_connections_is_that_of_the_moment(backend: Backend) -> None:
    samples = with_the_database(backend)
    assert samples["created_ahead_seconds"] == 0
    assert "newest_created_timestamp_seconds" not in samples
    requests.post(backend.data_url, json={"log": "192.0.2.1 GET /a 200"}, timeout=SECONDS)
    [record] = backend.records()
    newest = datetime.fromisoformat(record["created"]).astimezone(UTC).timestamp()
    assert with_the_database(backend)["newest_created_timestamp_seconds"] == pytest.approx(newest, abs=1e-5)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(backend.url))
        wait_until(lambda: scrape(backend.url)["connections_idle"] >= 5, SECONDS, "five idle connections")
        assert scrape(backend.url)["connections"] >= 5
    wait_until(lambda: scrape(backend.url)["connections_idle"] < 5, SECONDS, "their end")
    assert 2 <= scrape(backend.url)["database_sessions"] <= 5


def test_while_the_database_hangs_metrics_say_so_though_no_thread_is_left(start_backend: StartBackend) -> None:
    backend = start_backend(THREADS=2)
    with psycopg.connect(backend.database_url) as holder, ThreadPoolExecutor(4) as pool:
        holder.execute("LOCK TABLE logs IN ACCESS EXCLUSIVE MODE")
        readers = [pool.submit(requests.get, backend.data_url, timeout=SECONDS) for _ in range(4)]
        samples = scrape(backend.url)
        assert not any(reader.done() for reader in readers), "they hold all threads"
        assert samples["database_up"] == 0
        assert "created_ahead_seconds" not in samples
        holder.rollback()
        assert {reader.result(SECONDS).status_code for reader in readers} == {200}
    wait_until(lambda: scrape(backend.url)["database_up"] == 1, SECONDS, "the database")


# ---- Several workers ------------------------------------------------------------------------------------------------

COUNTERS = re.compile(r".*(_total|_count|_sum|_bucket)(\{.*)?")


def both_at_work(backend: Backend, deaths: int) -> Samples:
    """What two workers say when so many have died before them."""

    def at_work() -> Samples:
        samples = scrape(backend.url)
        return samples if (samples["workers"], samples["worker_deaths_total"]) == (2, deaths) else Samples()

    return wait_until(at_work, SECONDS, f"two workers after {deaths} deaths")


def test_any_worker_answers_for_all_and_no_counter_falls_when_one_is_killed(start_backend: StartBackend) -> None:
    backend = start_backend(WORKERS=2)
    line = {"log": "192.0.2.1 GET /a 200"}

    def store(count: int) -> None:
        with ThreadPoolExecutor(8) as pool:  # a connection each, so that both workers get some
            sent = [pool.submit(requests.post, backend.data_url, json=line, timeout=SECONDS) for _ in range(count)]
            assert {one.result().status_code for one in sent} == {201}

    def wait_for(count: int) -> Samples:
        def counted() -> Samples:
            samples = scrape(backend.url)
            return samples if samples["lines_stored_total"] >= count else Samples()

        return wait_until(counted, SECONDS, f"{count} lines")

    store(40)
    wait_for(40)
    before = both_at_work(backend, deaths=0)
    assert before["lines_stored_total"] == 40
    assert before["commit_duration_seconds_count"] > 1
    for killed, victim in enumerate(children_of(backend.pid), 1):
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in children_of(backend.pid), SECONDS, "its end")  # noqa: B023
        wait_until(lambda: len(children_of(backend.pid)) == 2, SECONDS, "another")
        after = both_at_work(backend, deaths=killed)
        fallen = {name: (old, after.get(name, 0)) for name, old in before.items() if after.get(name, 0) < old}
        assert not {name: fall for name, fall in fallen.items() if COUNTERS.fullmatch(name)}
        before = after
    store(20)
    assert wait_for(60)["lines_stored_total"] == 60


# ---- Refusals -------------------------------------------------------------------------------------------------------

MANY = 30  # refusals; that an outage ends between them, as the machine had no time for the next one, is rare


def assert_refusals(url: str, wanted: Mapping[str, int]) -> None:
    """One is counted when its answer is ended, which may be a moment after that has come."""
    wait_until(lambda: sum(refusals(url).values()) >= sum(wanted.values()), SECONDS, "the refusals to be counted")
    assert refusals(url) == wanted


def assert_told_in_two_lines(backend: Backend, begins: str, ends: str) -> None:
    """One when it begins and one when it is over, not one for each refusal."""

    def told() -> list[bool]:
        return [bool(re.search(ends, found[0])) for found in re.finditer(f"{begins}|{ends}", backend.printed)]

    wait_until(lambda: told()[-1:] == [True], SECONDS, "its end to be told")
    assert told() == [False, True] * (len(told()) // 2)
    assert len(told()) // 2 < MANY / 3


def test_each_refusal_is_counted_by_its_reason(start_backend: StartBackend, tmp_path: Path) -> None:
    backend = start_backend()
    impatient = start_backend(script=backend_with(tmp_path, HEAD_SECONDS=0.3, BODY_GRACE_SECONDS=0.3))
    line, other = {"log": "192.0.2.1 GET /a 200", "id": IDS[0]}, {"log": "192.0.2.1 GET /b 200", "id": IDS[0]}
    json_type, close = "Content-Type: application/json", "Connection: close"
    for data in (
        request("GET /api/data?limit=0 HTTP/1.1", close), request("GET / /api/data HTTP/1.1"),
        request("GET /nothing HTTP/1.1", close), request("DELETE /api/data HTTP/1.1", close),
        post(json.dumps(line), close), post(json.dumps(other), close),
        post("x", close, kind="text/html"), request("GET /api/data HTTP/2.0"),
        request("POST /api/data HTTP/1.1", json_type, "Content-Length: 99999999"),
        request("GET /api/data HTTP/1.1", "Origin: https://page.example", close),
        request("GET /api/data HTTP/1.1", f"X: {'x' * 40_000}"),
    ):  # fmt: skip
        exchange(backend.url, data)
    for data in (b"GET /api/data HTT", request("POST /api/data HTTP/1.1", json_type, "Content-Length: 99999")):
        exchange(impatient.url, data)
    assert_refusals(backend.url, {
        "bad_request": 2, "no_endpoint": 1, "method": 1, "conflict": 1, "media_type": 1, "http_version": 1,
        "too_large": 1, "origin": 1, "head_too_large": 1,
    })  # fmt: skip
    assert_refusals(impatient.url, {"head_too_slow": 1, "body_too_slow": 1})


def test_a_full_queue_is_counted_for_each_post_and_told_in_two_lines(
    start_backend: StartBackend, tmp_path: Path
) -> None:
    backend = start_backend(script=backend_with(tmp_path, QUEUE_BYTES=1000, OVERLOAD_SECONDS=0.2))
    with psycopg.connect(backend.database_url) as holder, ThreadPoolExecutor(2) as pool:
        holder.execute(STORING_LOCK)
        text = f"192.0.2.1 GET /{'x' * 800} 200"
        waiting = []
        for _ in range(2):  # one in hand, and one in the queue
            waiting.append(pool.submit(requests.post, backend.data_url, data=text, headers=PLAIN, timeout=SECONDS))
            wait_until(lambda: scrape(backend.url)["queue_bytes"] > 800 * len(waiting), SECONDS, "it in the queue")
        for _ in range(MANY):
            answer = requests.post(backend.data_url, data=text, headers=PLAIN, timeout=SECONDS)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert_refusals(backend.url, {"queue_full": MANY})
        holder.rollback()
        assert [one.result(SECONDS).status_code for one in waiting] == [201, 201]
    assert_told_in_two_lines(
        backend,
        r"WARNING \S+ write queue full: 1000 bytes wait for a commit; answering 503",
        r"INFO \S+ write queue below its limit again after [0-9.]+ s",
    )


def test_too_many_unfinished_bodies_are_counted_and_told_in_two_lines(
    start_backend: StartBackend, tmp_path: Path
) -> None:
    backend = start_backend(script=backend_with(tmp_path, BODIES_BYTES=100_000, OVERLOAD_SECONDS=0.2))
    head = request("POST /api/data HTTP/1.1", "Content-Type: text/plain", "Content-Length: 90000")
    with ExitStack() as stack:
        for _ in range(MANY + 1):
            sender = stack.enter_context(connect(backend.url))
            with suppress(ConnectionError):  # it may be refused before it has sent all
                sender.sendall(head + b"x" * 60_000)
        assert_refusals(backend.url, {"body_budget": MANY})
    assert_told_in_two_lines(
        backend, "unfinished bodies over their limit", "unfinished bodies below their limit again after"
    )


def test_a_database_that_is_away_is_the_reason_of_each_503(start_backend: StartBackend, tmp_path: Path) -> None:
    script = backend_with(tmp_path, STATEMENT_SECONDS=0.2)
    backend = start_backend(script=script, DATABASE_URL="postgresql://logs@127.0.0.1:1/logs")
    line = {"log": "192.0.2.1 GET /a 200"}
    assert requests.post(backend.data_url, json=line, timeout=SECONDS).status_code == 503
    assert requests.get(backend.data_url, timeout=SECONDS).status_code == 503
    assert_refusals(backend.url, {"database": 2})
    assert scrape(backend.url)["database_up"] == 0


def test_every_reason_that_the_code_gives_is_one_that_metrics_know() -> None:
    tree = ast.parse((ROOT / "backend.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [word.value for call in calls for word in call.keywords if word.arg == "why"]
    reasons = {value.value for value in given if isinstance(value, ast.Constant)}
    assert {"queue_full", "export_places"} <= reasons <= set(service.REFUSALS)


# ---- The page itself ------------------------------------------------------------------------------------------------


def test_metrics_need_the_token_and_promtool_finds_nothing(start_backend: StartBackend) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    assert requests.get(f"{backend.url}/metrics", timeout=SECONDS).status_code == 401
    requests.get(backend.data_url, headers=KEY, timeout=SECONDS)
    answer = requests.get(f"{backend.url}/metrics", headers=KEY, timeout=SECONDS)
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    promtool = shutil.which("promtool")
    assert promtool, "install Debian's prometheus: make test does"
    done = subprocess.run([promtool, "check", "metrics"], input=answer.text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    token = 'refusals_total{reason="token"}'
    wait_until(lambda: scrape(backend.url, **KEY)[token] == 1, SECONDS, "the refusal")


def test_metrics_tell_all_routes_apart() -> None:
    unused: Any = None
    app = service.create_app(unused, unused, unused, service.Settings(), unused)
    inspected = falcon.inspect.inspect_app(app)
    assert {route.path for route in inspected.routes} == set(service.ROUTES)
