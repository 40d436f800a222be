"""The overview page in a real browser: what it shows is what the API says, whatever happens to the backend."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from browser import WAIT_MS, Tab, new_browser, new_tab
from fakes import post_lines, some_lines
from harness import Backend, Postgres, kill, line_of, past_the_guard
from nginx import running_nginx
from playwright.sync_api import Browser, Locator, Page, expect
from waiting import wait_until

TOKEN = "s3cret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PHONE = {"width": 390, "height": 844}
MOST_LINES = 100  # on the screen


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with new_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Backend]) -> Backend:
    """A backend for tests that each look at an address of their own."""
    return start_shared()


@pytest.fixture(scope="module")
def one_tab(browser: Browser) -> Iterator[Tab]:
    """Opening one takes a second of two cores."""
    with new_tab(browser) as tab:
        tab.page.clock.install()
        yield tab


@pytest.fixture
def tab(one_tab: Tab) -> Tab:
    """An empty page, as if nothing had been there before."""
    one_tab.page.unroute_all()
    one_tab.page.mouse.move(1, 1)
    one_tab.page.goto("about:blank")
    one_tab.forget()
    return one_tab


def hurry(page: Page) -> None:
    """Half a minute passes for the page, so that it polls."""
    page.clock.fast_forward(30_000)


def expect_in_time(page: Page, locator: Locator, text: str) -> None:
    """It comes to be that as time passes for the page: what was asked before has not seen it yet."""

    def is_shown() -> bool:
        hurry(page)
        return locator.text_content() == text

    wait_until(is_shown, WAIT_MS / 1000, text)


def open_page(tab: Tab, backend: Backend, **view: Any) -> Page:
    """Opens it in a view; returns when its numbers are there."""
    tab.page.goto(f"{backend.url}/?{urlencode(view)}")
    expect_numbers(tab.page)
    return tab.page


def expect_numbers(page: Page) -> None:
    expect(page.locator("main")).to_have_attribute("aria-busy", "false")


def total(page: Page) -> Locator:
    return page.locator("#total")


def shown_lines(page: Page) -> list[str]:
    """The lines on the screen as they were sent, the oldest first."""
    rows = page.locator("#lines li").all_inner_texts()
    return [f"{ip} {method} {uri} {status}" for _, status, method, ip, uri in map(str.splitlines, reversed(rows))]


def expect_lines(page: Page, lines: list[str]) -> None:
    """Exactly these, in their order."""
    expect(page.locator("#lines li")).to_have_count(len(lines))
    assert shown_lines(page) == lines


def lines_of(ip: str, *fields: str) -> list[str]:
    return [f"{ip} {field}" for field in fields]


# ---- What is shown --------------------------------------------------------------------------------------------------


def test_with_nothing_stored_the_page_says_zero_and_none(tab: Tab, backend: Backend) -> None:
    page = open_page(tab, backend)
    expect(total(page)).to_have_text("0")
    for name in ("methods", "statuses", "addresses", "uris", "lines"):
        expect(page.locator(f"#{name}")).to_be_empty()
    expect(page.locator("#chart canvas")).to_be_visible()
    tab.save_screenshot("overview-empty.png")
    tab.assert_quiet(backend.url)


def test_ten_records_are_counted_charted_tabulated_and_listed_once(tab: Tab, shared: Backend) -> None:
    fields = ["GET /a 200"] * 4 + [
        "POST /b 201",
        "GET /b 304",
        "GET /c 404",
        "GET /c 404",
        "PUT /d 500",
        "GET /<b> 503",
    ]
    lines = lines_of("192.0.2.10", *fields)
    post_lines(shared, lines)
    page = open_page(tab, shared, ip="192.0.2.10")
    expect(total(page)).to_have_text("10")
    expect(page.locator("#classes li")).to_have_text(["1xx 0", "2xx 5", "3xx 1", "4xx 2", "5xx 2"])
    expect(page.locator("#methods li")).to_have_text(["GET8", "POST1", "PUT1"])
    expect(page.locator("#statuses li")).to_have_text(["2004", "2011", "3041", "4042", "5001", "5031"])
    expect(page.locator("#addresses li")).to_have_text(["192.0.2.1010"])
    expect(page.locator("#uris li").first).to_have_text("/a4")
    expect_lines(page, lines)
    created = [record["created"] for record in shared.records("?ip=192.0.2.10")]
    assert page.locator("#lines time").all_inner_texts() == created[::-1]
    expect(page.locator("#chart")).to_have_attribute("aria-label", re.compile("5 of class 2xx, .* 2 of class 5xx"))
    page.get_by_text("The chart as a table").click()
    rows = page.locator("#as-table tbody tr")
    expect(rows).to_have_count(60)
    cells = [[int(cell) for cell in row.split("\t")[1:]] for row in rows.all_inner_texts()]
    assert [sum(column) for column in zip(*cells, strict=True)] == [0, 5, 1, 2, 2]
    tab.save_screenshot("overview-ten.png")
    tab.assert_quiet(shared.url)


def test_what_comes_in_is_shown_once_and_in_its_order(tab: Tab, shared: Backend) -> None:
    before, during = lines_of("192.0.2.12", "GET /0 200"), [f"192.0.2.12 GET /{n} 200" for n in range(1, 8)]
    post_lines(shared, before)
    page = open_page(tab, shared, ip="192.0.2.12")
    for line in during:
        post_lines(shared, [line])
    hurry(page)
    expect_lines(page, before + during)
    expect_in_time(page, total(page), "8")
    kinds = ("/api/stats top=0", "/api/stats top=10", "/api/data")
    assert [tab.most_at_once[kind] for kind in kinds] == [1, 1, 1]
    tab.assert_quiet(shared.url)


def test_paused_the_list_stands_still_and_then_goes_on_without_a_gap(tab: Tab, shared: Backend) -> None:
    lines = lines_of("192.0.2.13", "GET /before 200", "GET /during 200", "GET /after 200")
    post_lines(shared, lines[:1])
    page = open_page(tab, shared, ip="192.0.2.13")
    expect_lines(page, lines[:1])
    page.get_by_role("button", name="Pause").click()
    post_lines(shared, lines[1:2])
    expect_in_time(page, total(page), "2")
    expect_lines(page, lines[:1])
    post_lines(shared, lines[2:])
    page.get_by_role("button", name="Resume").click()
    expect_lines(page, lines)


def test_a_machine_that_slept_in_mid_request_asks_again_soon(browser: Browser, shared: Backend) -> None:
    """The page rests nine times as long as a request took; an hour of sleep is no work of the backend's."""
    slept: list[str] = []
    with new_tab(browser) as tab:  # of its own, as its clock is another one afterwards
        tab.page.clock.install()

        def sleep_once(route: Any) -> None:
            if not slept:
                slept.append(route.request.url)
                tab.page.clock.fast_forward(3_600_000)
            route.continue_()

        tab.page.route("**/api/stats?*", sleep_once)
        page = open_page(tab, shared, ip="192.0.2.199")
        assert len(slept) == 1
        post_lines(shared, lines_of("192.0.2.199", "GET /after 200"))
        for _ in range(20):  # ten minutes
            hurry(page)
            page.wait_for_timeout(100)
        expect(total(page)).to_have_text("1")


def test_under_the_pointer_lines_stand_still_and_new_ones_wait(tab: Tab, shared: Backend) -> None:
    lines = lines_of("192.0.2.14", "GET /same 200", "GET /same 200")  # no other list grows and moves this one
    post_lines(shared, lines[:1])
    page = open_page(tab, shared, ip="192.0.2.14")
    expect(page.locator("#uris li")).to_have_count(1)
    page.locator("#lines li").hover()
    post_lines(shared, lines[1:])
    hurry(page)
    expect(page.locator("#lines-state")).to_have_text("Standing still; new: 1. ")
    expect_lines(page, lines[:1])
    page.mouse.move(1, 1)
    expect_lines(page, lines)


def test_a_flood_is_shown_by_its_newest_lines_and_the_page_says_so(tab: Tab, shared: Backend) -> None:
    page = open_page(tab, shared)
    page.get_by_role("button", name="Pause").click()
    flood = some_lines(9_000, tag="flood")
    post_lines(shared, flood)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#lines-state")).to_contain_text("some were left out")
    expect(page.locator("#lines li").first).to_contain_text("/flood/8999")
    shown = shown_lines(page)
    assert shown == flood[-len(shown) :]
    assert 50 <= len(shown) <= MOST_LINES


def test_a_hidden_tab_asks_for_nothing_and_catches_up_when_it_is_shown(tab: Tab, shared: Backend) -> None:
    page = open_page(tab, shared, ip="192.0.2.15")
    expect(page.locator("#lines-state")).to_be_empty()
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    page.clock.run_for(10_000)  # what was in flight or due is over
    page.wait_for_load_state("networkidle")
    asked = len(tab.requests)
    page.clock.run_for(60_000)
    assert len(tab.requests) == asked
    lines = lines_of("192.0.2.15", "GET /while-hidden 200")
    post_lines(shared, lines)
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    expect_lines(page, lines)
    expect(total(page)).to_have_text("1")


HOSTILE = [
    "/<script>document.title='owned'</script>",
    "/<img/src=x/onerror=document.title='owned'>",
    '/"><svg/onload=document.title=1>',
    "/&lt;b&gt;&amp;",
    "/\u202etxt.exe",
    "/javascript:alert(1)",
]


def test_markup_in_a_uri_is_shown_as_text(tab: Tab, shared: Backend) -> None:
    lines = lines_of("192.0.2.16", *(f"GET {uri} 200" for uri in HOSTILE), "<B> /method 200".replace("<B>", "b'|"))
    post_lines(shared, lines)
    page = open_page(tab, shared, ip="192.0.2.16")
    expect_lines(page, lines)
    assert sorted(page.locator("#uris bdi").all_inner_texts()) == sorted([*HOSTILE, "/method"])
    expect(page.locator("main img, main script, main svg, main b")).to_have_count(0)
    expect(page).to_have_title("Log pipeline")
    tab.assert_quiet(shared.url)


def test_the_policy_forbids_inline_code_text_as_html_and_other_hosts(tab: Tab, shared: Backend) -> None:
    policy = requests.get(shared.url, timeout=30).headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    page = open_page(tab, shared)
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
        "document.body.setAttribute('onclick', 'x')",
        "document.body.append(Object.assign(document.createElement('script'), { text: 'x' }))",
    ):
        script = f"(() => {{ try {{ {attempt}; return 'done' }} catch (error) {{ return error.name }} }})()"
        assert page.evaluate(script) == "TypeError", attempt
    assert page.evaluate("fetch('http://192.0.2.1/').then(() => 'done', () => 'refused')") == "refused"
    expect(page).to_have_title("Log pipeline")


def test_files_of_the_pages_are_sent_with_headers_that_protect_them(shared: Backend) -> None:
    for path in ("/", "/overview/overview.js", "/docs", "/docs/openapi.json"):
        headers = requests.get(shared.url + path, timeout=30).headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert headers["Referrer-Policy"] == "no-referrer", path


# ---- Views ----------------------------------------------------------------------------------------------------------


def asked(page: Page) -> dict[str, str]:
    return {name: value for name, [value] in parse_qs(urlsplit(page.url).query).items()}


def test_filters_are_set_and_taken_off_by_pressing_what_is_shown(tab: Tab, shared: Backend) -> None:
    post_lines(shared, lines_of("192.0.2.20", "GET /a 200", "GET /b 404", "POST /c 404"))
    post_lines(shared, lines_of("192.0.2.21", "GET /d 404"))
    page = open_page(tab, shared, ip="192.0.2.20")
    expect(total(page)).to_have_text("3")
    page.locator("#statuses").get_by_role("button", name="404").click()
    expect(total(page)).to_have_text("2")
    page.locator("#lines").get_by_role("button", name="POST").click()
    expect(total(page)).to_have_text("1")
    assert asked(page) == {"ip": "192.0.2.20", "status_code": "404", "method": "POST"}
    expect(page.locator("#status")).to_have_text("1 record, address 192.0.2.20, status 404, method POST")
    page.locator("#filters").get_by_role("button", name="Method POST").click()
    expect(total(page)).to_have_text("2")
    expect(page.locator("#statuses").get_by_role("button", pressed=True)).to_have_text("4042")
    page.locator("#statuses").get_by_role("button", pressed=True).click()
    expect(total(page)).to_have_text("3")
    page.go_back()
    expect(total(page)).to_have_text("2")
    page.locator("#addresses").get_by_role("button").click()
    expect(page.locator("#lines li").filter(has_text="192.0.2.21")).to_have_count(1)
    tab.assert_quiet(shared.url)


def test_a_view_can_be_sent_as_a_link(tab: Tab, browser: Browser, shared: Backend) -> None:
    post_lines(shared, lines_of("192.0.2.22", "GET /a 200", "GET /b 500"))
    page = open_page(tab, shared, ip="192.0.2.22", status_code=500, window="1d", zone="local")
    page.get_by_role("button", name="Custom").click()
    page.get_by_role("button", name="Show", exact=True).click()
    expect(total(page)).to_have_text("1")
    assert {"date_from", "date_to"} <= asked(page).keys()
    with new_tab(browser) as other:
        other.page.goto(page.url)
        expect(total(other.page)).to_have_text("1")
        for name in ("frame", "filters", "windows", "zones", "classes"):
            assert other.page.locator(f"#{name}").inner_html() == page.locator(f"#{name}").inner_html(), name
        assert shown_lines(other.page) == shown_lines(page)


@pytest.mark.parametrize(
    "window", [pytest.param("15m", marks=pytest.mark.slow), "1h", pytest.param("1d", marks=pytest.mark.slow)]
)
def test_each_window_shows_its_time_and_no_record_outside(tab: Tab, shared: Backend, window: str) -> None:
    seconds = {"15m": 900, "1h": 3600, "1d": 86_400}[window]
    ip = f"192.0.3.{list('mhd').index(window[-1])}"
    with past_the_guard(shared.database_url) as connection:
        connection.execute(
            "INSERT INTO logs (id, created, ip, method, uri, status_code)"
            " SELECT gen_random_uuid(), now() - make_interval(secs => ago), %s::inet, 'GET', '/' || ago, 200"
            "   FROM unnest(%s::int[]) AS ago",
            [ip, [seconds * 2, seconds + 1, int(seconds * 0.9), seconds // 2, 0]],
        )
    page = open_page(tab, shared, window=window, ip=ip)
    expect(total(page)).to_have_text("3")
    expect(page.locator("#lines li")).to_have_count(3)
    expect(page.locator("#windows").get_by_role("button", pressed=True)).to_have_count(1)
    start, end = (
        datetime.strptime(text, "%Y-%m-%d %H:%M%z")
        for text in page.locator("#frame").inner_text().replace(",", " to ").split(" to ")[:2]
    )
    assert end - start == timedelta(seconds=seconds)
    assert start < datetime.now(UTC) - timedelta(seconds=seconds * 0.9)


def test_a_window_of_ones_own_is_chosen_in_utc_or_in_local_time(browser: Browser, shared: Backend) -> None:
    with new_tab(browser, timezone_id="Asia/Kolkata") as tab:
        page = open_page(tab, shared)
        page.get_by_role("button", name="Custom").click()
        page.get_by_label("From (UTC)").fill("2026-01-02T03:00")
        page.get_by_label("to (UTC)").fill("2026-01-02T03:45")
        page.get_by_role("button", name="Show", exact=True).click()
        assert asked(page) == {"date_from": "2026-01-02T03:00:00.000Z", "date_to": "2026-01-02T03:45:00.000Z"}
        expect(page.locator("#frame")).to_have_text("2026-01-02 03:00Z to 2026-01-02 03:45Z")
        page.get_by_role("button", name="Local time").click()
        expect(page.locator("#frame")).to_have_text("2026-01-02 08:30+05:30 to 2026-01-02 09:15+05:30")
        expect(page.get_by_label("From (local time, Asia/Calcutta)")).to_have_value("2026-01-02T08:30")
        page.get_by_label("From (local time").fill("2026-01-02T08:45")
        page.get_by_role("button", name="Show", exact=True).click()
        assert asked(page)["date_from"] == "2026-01-02T03:15:00.000Z"
        page.get_by_label("From (local time").fill("2026-01-03T00:00")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text("The first date must be earlier than the second one.")


@pytest.mark.slow
def test_dragging_over_the_chart_chooses_that_part_of_the_window(tab: Tab, shared: Backend) -> None:
    page = open_page(tab, shared, date_from="2026-01-02T03:00Z", date_to="2026-01-02T04:00Z")
    box = page.locator("#chart .u-over").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.251, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.499, box["y"] + 60, steps=4)
    page.mouse.up()
    expect(page.locator("#frame")).to_have_text("2026-01-02 03:15Z to 2026-01-02 03:30Z")


def test_an_address_that_means_nothing_is_told_and_does_no_harm(tab: Tab, shared: Backend) -> None:
    page = open_page(tab, shared, window="3w", status_code="<b>", date_from="yesterday", zone="x")
    said = page.locator("#status")
    for text in ("15m, 1h, 1d", "<b> is no status", "date_from must be a date"):
        expect(said).to_contain_text(text)
    expect(page.get_by_role("button", name="Hour")).to_have_attribute("aria-pressed", "true")
    tab.assert_quiet(shared.url)


def test_what_the_api_refuses_is_said_in_its_words(tab: Tab, shared: Backend) -> None:
    tab.page.goto(f"{shared.url}/?ip=1.2.3.999")
    expect(tab.page.locator("#status")).to_contain_text("The parameter ip is '1.2.3.999'")


# ---- Download -------------------------------------------------------------------------------------------------------


def test_without_a_token_the_browser_downloads_the_window_as_ndjson(tab: Tab, shared: Backend) -> None:
    post_lines(shared, lines_of("192.0.2.30", "GET /a 200", "GET /b 404", "GET /c 404"))
    page = open_page(tab, shared, ip="192.0.2.30", status_code=404)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as NDJSON").click()
    assert re.fullmatch(r"records-\d{8}T\d{6}Z-\d{8}T\d{6}Z\.ndjson", download.value.suggested_filename)
    records = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert records == shared.records("?ip=192.0.2.30&status_code=404")


# ---- The token ------------------------------------------------------------------------------------------------------


def test_the_token_is_asked_for_once_and_kept_for_the_tab(
    browser: Browser, start_backend: Callable[..., Backend]
) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    body = "\n".join(lines_of("192.0.2.40", "GET /a 200", "GET /b 404"))
    requests.post(backend.data_url, data=body, headers=BEARER | {"Content-Type": "text/plain"}, timeout=30)
    with new_tab(browser) as tab:
        page = tab.page
        page.goto(backend.url)
        field = page.get_by_label("API token")
        expect(field).to_be_focused()
        expect(page.locator("main")).to_be_hidden()
        tab.save_screenshot("overview-token.png")
        for wrong, said in (("wrong", "The backend does not accept this token."), ("wröng", "A token has letters")):
            field.fill(wrong)
            field.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text(said)
        field.fill(f" {TOKEN} ")
        field.press("Enter")
        expect(total(page)).to_have_text("2")
        expect(page.locator("#lines li")).to_have_count(2)
        page.locator("#statuses").get_by_role("button", name="404").click()
        expect(total(page)).to_have_text("1")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download as NDJSON").click()
        [record] = download.value.path().read_text().splitlines()
        assert line_of(json.loads(record)) == "192.0.2.40 GET /b 404"
        page.reload()
        expect(total(page)).to_have_text("1")
        expect(field).to_be_hidden()
        assert all(TOKEN not in url for url in tab.requests)
        other = page.context.new_page()
        other.goto(backend.url)
        expect(other.get_by_label("API token")).to_be_focused()
        assert {text for text in tab.complaints if "401" not in text} == set()


# ---- When something is wrong ----------------------------------------------------------------------------------------


def only_failed_loads(tab: Tab) -> bool:
    """What a browser itself notes of each request that fails; no page can keep it from that."""
    return all("Failed to load resource" in text for text in tab.complaints)


def test_the_backend_goes_away_and_comes_back_and_each_line_is_shown_once(
    tab: Tab, start_backend: Callable[..., Backend]
) -> None:
    backend = start_backend()
    lines = some_lines(30)
    post_lines(backend, lines[:10])
    page = open_page(tab, backend)
    expect_lines(page, lines[:10])
    kill(backend)  # its port stays its own
    hurry(page)
    expect(page.locator("#status")).to_contain_text("No usable answer from the backend since")
    tab.save_screenshot("overview-away.png")
    page.get_by_role("button", name="Pause").click()  # what is not asked any more cannot hold up the good news
    other = start_backend(DATABASE_URL=backend.database_url)
    post_lines(other, lines[10:20])
    start_backend(DATABASE_URL=backend.database_url, BACKEND_PORT=urlsplit(backend.url).port)
    hurry(page)
    expect(page.locator("#status")).to_contain_text("The backend answers again")
    page.get_by_role("button", name="Resume").click()
    page.mouse.move(1, 1)  # else it may come to stand over the lines
    post_lines(other, lines[20:])
    hurry(page)
    expect_lines(page, lines)
    expect_in_time(page, total(page), "30")
    assert only_failed_loads(tab), tab.complaints


def test_without_its_database_the_backends_own_words_are_shown(tab: Tab, start_backend: Callable[..., Backend]) -> None:
    tab.page.goto(start_backend(DATABASE_URL="postgresql://logs@127.0.0.1:1/logs").url)
    expect(tab.page.locator("#status")).to_contain_text("The database")
    expect(tab.page.locator("#status")).to_contain_text("Retrying.")
    assert only_failed_loads(tab), tab.complaints


def test_a_reply_that_breaks_off_is_asked_for_again_and_not_doubled(tab: Tab, shared: Backend) -> None:
    lines = [f"192.0.2.50 GET /{n} 200" for n in range(20)]
    post_lines(shared, lines)
    answers: dict[str, Callable[[Any], None]] = {
        "it answered 404": lambda route: route.fulfill(status=404, content_type="text/html", body="<h1>A proxy's</h1>"),
        "its reply broke off": lambda route: route.fulfill(
            status=200, content_type="application/json", body=route.fetch().text()[:-30]
        ),
        "The backend answers again": lambda route: route.continue_(),
    }
    given = iter(answers)
    wanted = [next(given)]  # until it was seen: the page asks again after a second
    tab.page.route("**/api/data?*", lambda route: answers[wanted[-1]](route))
    page = open_page(tab, shared, ip="192.0.2.50")
    for said in answers:
        expect(page.locator("#status")).to_contain_text(said)
        wanted.append(next(given, said))
        hurry(page)
    expect_lines(page, lines)


def test_what_has_expired_is_told_and_the_rest_is_shown(
    tab: Tab, postgres: Postgres, start_backend: Callable[..., Backend]
) -> None:
    url = postgres.create_logs()
    with past_the_guard(url) as connection:
        connection.execute(
            "INSERT INTO logs (id, created, ip, method, uri, status_code)"
            " SELECT gen_random_uuid(), now() - n * interval '10 hours', '192.0.2.60', 'GET', '/' || n, 200"
            "   FROM generate_series(0, 5) AS n"
        )
    backend = start_backend(DATABASE_URL=url, RETENTION_DAYS=1)
    backend.wait_for_line("deleted 2 records")
    day = datetime.now(UTC).date()
    page = open_page(tab, backend, date_from=day - timedelta(days=3), date_to=day + timedelta(days=1))
    expect(page.locator("#status")).to_contain_text("have expired and were deleted")
    expect(total(page)).to_have_text("4")
    expect(page.locator("#lines li")).to_have_count(4)
    assert only_failed_loads(tab), tab.complaints


def test_behind_a_proxy_that_adds_a_prefix_everything_works(browser: Browser, shared: Backend, tmp_path: Path) -> None:
    post_lines(shared, lines_of("192.0.2.70", "GET /a 200"))
    server = (
        f"location /logs/ {{ proxy_pass {shared.url}/; proxy_http_version 1.1; proxy_set_header Host $http_host; }}"
    )
    with running_nginx(tmp_path / "nginx", server) as port, new_tab(browser) as tab:
        page = tab.page
        page.goto(f"http://127.0.0.1:{port}/logs/?ip=192.0.2.70")
        expect(total(page)).to_have_text("1")
        post_lines(shared, lines_of("192.0.2.70", "GET /b 404"))
        expect_lines(page, lines_of("192.0.2.70", "GET /a 200", "GET /b 404"))
        page.locator("#lines").get_by_role("button", name="404").click()
        expect(page.locator("#lines li")).to_have_count(1)
        assert urlsplit(page.url).path == "/logs/"
        with page.expect_download() as download:
            page.get_by_role("link", name="Download as NDJSON").click()
        assert len(download.value.path().read_text().splitlines()) == 1
        page.get_by_role("link", name="API").click()
        expect(page.get_by_role("link", name="/api/health")).to_be_visible()
        tab.assert_quiet(f"http://127.0.0.1:{port}")


# ---- For everybody --------------------------------------------------------------------------------------------------


def violations(page: Page) -> list[str]:
    """What an accessibility audit has against the page as it is."""
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['help']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), pytest.param("dark", 1280, marks=pytest.mark.slow)])
def test_an_accessibility_audit_finds_nothing_and_nothing_is_cut_off(
    browser: Browser, shared: Backend, scheme: str, width: int
) -> None:
    lines = [f"192.0.2.80 GET /{n}{'/long' * 300} {100 + n * 37 % 500}" for n in range(15)]
    post_lines(shared, [*lines, "2001:db8:1111:2222:3333:4444:5555:6666 UPDATEREDIRECTREFERENCE-METHODX /a 200"])
    with new_tab(browser, color_scheme=scheme, viewport={"width": width, "height": 844}) as tab:
        page = open_page(tab, shared)
        assert violations(page) == []
        assert fits(page)
        page.get_by_text("The chart as a table").click()
        page.get_by_role("button", name="Custom").click()
        page.locator("#statuses").get_by_role("button").first.click()
        expect(page.locator("#filters li")).to_have_count(1)
        page.get_by_role("button", name="Custom").click()
        assert violations(page) == []
        assert fits(page)
        tab.save_screenshot(f"overview-{scheme}-{width}.png")
        tab.assert_quiet(shared.url)


def fits(page: Page) -> bool:
    """No sideways scrolling."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_all_of_it_can_be_done_by_keyboard(tab: Tab, shared: Backend) -> None:
    post_lines(shared, lines_of("192.0.2.81", "GET /a 200", "GET /b 404", "POST /c 200"))
    page = open_page(tab, shared, ip="192.0.2.81")
    reached = []
    while (focus := press_tab(page)) not in reached and focus != "BODY":
        reached.append(focus)
    for wanted in ("API", "15 minutes", "Custom", "Local time", "Download as NDJSON", "Address 192.0.2.81 ✕"):
        assert wanted in reached
    for wanted in ("The chart as a table", "GET2", "4041", "192.0.2.813", "Pause", "404", "192.0.2.81"):
        assert wanted in reached
    page.locator("#methods button").last.focus()
    post_lines(shared, lines_of("192.0.2.81", *["POST /c 200"] * 2))
    expect_in_time(page, page.locator("#methods li").first, "POST3")
    expect(page.locator("#methods button").first).to_be_focused()  # also where it has moved
    page.locator("#statuses button").last.focus()
    page.keyboard.press("Enter")
    expect(total(page)).to_have_text("1")
    expect(page.locator("#statuses button")).to_be_focused()


def press_tab(page: Page) -> str:
    page.keyboard.press("Tab")
    return str(page.evaluate("document.activeElement === document.body ? 'BODY' : document.activeElement.textContent"))


# ---- A million records ----------------------------------------------------------------------------------------------

MILLION = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), now() - (1000001 - n) * interval '0.08 seconds', '192.0.2.0'::inet + n % 200,
       (ARRAY['GET', 'POST', 'PUT'])[1 + n % 3], '/page/' || n % 1000, 200 + n % 5 * 75
  FROM generate_series(1, 1000000) AS n
"""
FIRST_DATA_SECONDS = 1.0  # from the start of the navigation to the first number on the screen
NOTE_FIRST_NUMBER = """
addEventListener("DOMContentLoaded", () => {
  const total = document.getElementById("total");
  new MutationObserver(() => { window.firstNumberAt ??= performance.now(); }).observe(total, { childList: true });
});
"""


@pytest.fixture(scope="module")
def million(postgres: Postgres, start_shared: Callable[..., Backend]) -> Backend:
    backend = start_shared(API_TOKEN=TOKEN)
    with past_the_guard(backend.database_url) as connection:
        connection.execute(MILLION)
    return backend


@pytest.fixture
def signed_in(browser: Browser, million: Backend) -> Iterator[Page]:
    with new_tab(browser) as tab:
        tab.page.goto(million.url)
        tab.page.get_by_label("API token").fill(TOKEN)
        tab.page.get_by_label("API token").press("Enter")
        expect_numbers(tab.page)
        yield tab.page


@pytest.mark.slow
@pytest.mark.parametrize("window", ["1h", "1d"])
def test_of_a_million_records_the_first_data_are_there_in_a_second(
    signed_in: Page, million: Backend, window: str
) -> None:
    page = signed_in
    page.add_init_script(NOTE_FIRST_NUMBER)
    took = []
    for _ in range(7):
        page.goto(f"{million.url}/?window={window}")
        expect(page.locator("#lines li")).not_to_have_count(0)
        took.append(page.evaluate("firstNumberAt") / 1000)
    assert int(total(page).inner_text().replace(",", "")) > {"1h": 40_000, "1d": 990_000}[window]
    assert median(took) < FIRST_DATA_SECONDS, took


@pytest.mark.slow
def test_with_a_token_100_000_records_come_as_a_file_and_curl_gets_all(
    signed_in: Page, million: Backend, tmp_path: Path
) -> None:
    page = signed_in
    page.goto(f"{million.url}/?window=1d&method=GET")
    expect_numbers(page)
    with page.expect_download(timeout=60_000) as download:
        page.get_by_role("button", name="Download as NDJSON").click()
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == 100_000
    command = page.locator("#curl code").inner_text()
    assert TOKEN not in page.content()
    subprocess.run(["sh", "-c", command], env={**os.environ, "API_TOKEN": TOKEN}, cwd=tmp_path, check=True, timeout=120)
    all_lines = (tmp_path / "records.ndjson").read_text().splitlines()
    assert all_lines[:100_000] == lines
    assert {json.loads(line)["log"]["method"] for line in all_lines} == {"GET"}
    assert len(all_lines) > 330_000
