"""/docs in a real browser: it opens with no internet, lists every operation, and "Try it out" works as it comes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from harness import ROOT, Backend
from playwright.sync_api import Locator, Page, Request, expect, sync_playwright

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
DOCUMENT = json.loads((ROOT / "openapi.json").read_text())
WAIT_MS = 15_000  # for anything to appear on a busy machine


@dataclass
class Docs:
    """The opened page, with what the browser complained about and what it asked for."""

    page: Page
    origin: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("console", lambda message: self.note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.note("error", str(error)))
        self.page.on("requestfailed", lambda request: self.note("error", f"{request.url}: {request.failure}"))
        self.page.on("request", self.note_request)

    def note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def note_request(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):  # these stay inside the page
            self.requests.append(request.url)

    def operation(self, operation_id: str) -> Locator:
        return self.page.locator(f".opblock[id$='-{operation_id}']")

    def try_out(self, operation_id: str) -> Locator:
        """Opens an operation and presses its buttons, nothing else; the status of the answer."""
        operation = self.operation(operation_id)
        operation.locator(".opblock-summary-control").click()
        operation.get_by_role("button", name="Try it out").click()
        operation.get_by_role("button", name="Execute").click()
        return operation.locator(".live-responses-table tbody .response-col_status")

    def save_screenshot(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / name, full_page=True)

    def assert_quiet(self) -> None:
        """No complaint, and no request to anywhere but the backend."""
        assert self.complaints == []
        assert {"{0.scheme}://{0.netloc}".format(urlsplit(url)) for url in self.requests} == {self.origin}


@pytest.fixture
def docs(backend: Backend) -> Iterator[Docs]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing; install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        docs = Docs(page, backend.url)
        docs.listen()
        page.goto(f"{backend.url}/docs")
        yield docs
        browser.close()


def test_docs_list_every_operation_and_ask_nobody_else(docs: Docs) -> None:
    operations = {
        (method.upper(), path, operation["operationId"])
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
    }
    expect(docs.page.locator(".opblock")).to_have_count(len(operations))
    for method, path, operation_id in operations:
        operation = docs.operation(operation_id)
        expect(operation.locator(".opblock-summary-method")).to_have_text(method)
        expect(operation.locator(".opblock-summary-path")).to_have_attribute("data-path", path)
    docs.save_screenshot("docs.png")
    docs.assert_quiet()


def test_try_it_out_stores_a_line_and_reads_it_back_without_editing(docs: Docs, backend: Backend) -> None:
    expect(docs.try_out("storeLines")).to_have_text(re.compile("^201"))
    expect(docs.try_out("readRecords")).to_have_text(re.compile("^200"))
    shown = docs.operation("readRecords").locator(".live-responses-table tbody .response-col_description pre").first
    [record] = backend.records()
    expect(shown).to_contain_text(record["id"])
    docs.save_screenshot("docs-try-it-out.png")
    docs.assert_quiet()


def test_the_vendored_files_are_those_that_swagger_ui_published() -> None:
    folder = ROOT / "static/swagger-ui"
    sums = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == {p.name for p in folder.iterdir()} - {
        "SHA256SUMS",
        "VERSION",
        "docs.js",
        "index.html",
    }
    for wanted, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted, name
