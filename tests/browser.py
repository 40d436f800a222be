"""A real headless Chromium: pages of the backend, what they complain about, and whom they ask."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from harness import ROOT
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
# Root may not use the sandbox; the rest keeps Chromium from asking its maker's servers for anything.
CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ARTIFACTS = Path(os.environ.get("ARTIFACTS") or ROOT / "var" / "artifacts")
WAIT_MS = 60_000  # for anything to appear on a busy machine


@dataclass
class Tab:
    """A page, with what the browser complained about and what it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    in_flight: Counter[str] = field(default_factory=Counter)  # by kind
    most_at_once: Counter[str] = field(default_factory=Counter)

    def listen(self) -> None:
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.note_request)
        for event in ("requestfinished", "requestfailed"):
            self.page.on(event, self.note_end)

    def forget(self) -> None:
        for noted in (self.complaints, self.requests, self.in_flight, self.most_at_once):
            noted.clear()

    def note_request(self, request: Request) -> None:
        if request.url.startswith(("data:", "blob:")):  # these stay inside the page
            return
        self.requests.append(request.url)
        self.in_flight[kind_of(request)] += 1
        self.most_at_once |= self.in_flight

    def note_end(self, request: Request) -> None:
        self.in_flight[kind_of(request)] -= 1

    def save_screenshot(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / name, full_page=True)

    def assert_quiet(self, *origins: str) -> None:
        """Nothing on the console, and no request to anywhere else."""
        assert self.complaints == []
        assert {"{0.scheme}://{0.netloc}".format(urlsplit(url)) for url in self.requests} <= set(origins)


def kind_of(request: Request) -> str:
    """Its path; of /api/stats with what decides its cost."""
    url = urlsplit(request.url)
    return url.path + "".join(f" top={top}" for top in parse_qs(url.query).get("top", ()))


@contextmanager
def new_browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing; install it: apt-get install chromium")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def new_tab(browser: Browser, **options: Any) -> Iterator[Tab]:
    """A tab of a new profile; options are those of Browser.new_context, such as color_scheme."""
    with browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}) as context:
        context.set_default_timeout(WAIT_MS)
        tab = Tab(context.new_page())
        tab.listen()
        yield tab
