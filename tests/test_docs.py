"""/docs in a real browser: it opens with no internet, lists every operation, and "Try it out" works as it comes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Tab, new_browser, new_tab
from harness import ROOT, Backend
from nginx import running_nginx
from playwright.sync_api import Browser, Locator, expect

DOCUMENT = json.loads((ROOT / "openapi.json").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with new_browser() as browser:
        yield browser


@pytest.fixture
def docs(browser: Browser, backend: Backend) -> Iterator[Tab]:
    with new_tab(browser) as tab:
        tab.page.goto(f"{backend.url}/docs")
        yield tab


def operation(docs: Tab, operation_id: str) -> Locator:
    return docs.page.locator(f".opblock[id$='-{operation_id}']")


def try_out(docs: Tab, operation_id: str) -> Locator:
    """Opens an operation and presses its buttons, nothing else; the status of the answer."""
    opened = operation(docs, operation_id)
    opened.locator(".opblock-summary-control").click()
    opened.get_by_role("button", name="Try it out").click()
    opened.get_by_role("button", name="Execute").click()
    return opened.locator(".live-responses-table tbody .response-col_status")


def test_docs_list_every_operation_and_ask_nobody_else(docs: Tab, backend: Backend) -> None:
    operations = {
        (method.upper(), path, operation["operationId"])
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
    }
    expect(docs.page.locator(".opblock")).to_have_count(len(operations))
    for method, path, operation_id in operations:
        shown = operation(docs, operation_id)
        expect(shown.locator(".opblock-summary-method")).to_have_text(method)
        expect(shown.locator(".opblock-summary-path")).to_have_attribute("data-path", path)
    docs.save_screenshot("docs.png")
    docs.assert_quiet(backend.url)


def test_try_it_out_stores_a_line_and_reads_it_back_without_editing(docs: Tab, backend: Backend) -> None:
    expect(try_out(docs, "storeLines")).to_have_text(re.compile("^201"))
    expect(try_out(docs, "readRecords")).to_have_text(re.compile("^200"))
    shown = operation(docs, "readRecords").locator(".live-responses-table tbody .response-col_description pre").first
    [record] = backend.records()
    expect(shown).to_contain_text(record["id"])
    docs.save_screenshot("docs-try-it-out.png")
    docs.assert_quiet(backend.url)


@pytest.mark.slow
def test_try_it_out_works_behind_a_proxy_that_adds_a_prefix(browser: Browser, backend: Backend, tmp_path: Path) -> None:
    server = (
        f"location /logs/ {{ proxy_pass {backend.url}/; proxy_http_version 1.1; proxy_set_header Host $http_host; }}"
    )
    with running_nginx(tmp_path / "nginx", server) as port, new_tab(browser) as docs:
        docs.page.goto(f"http://127.0.0.1:{port}/logs/docs")
        expect(try_out(docs, "storeLines")).to_have_text(re.compile("^201"))
        assert len(backend.records()) == 1
        docs.assert_quiet(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("name", "ours"), [("swagger-ui", {"docs.js", "index.html"}), ("uplot", set())], ids=["swagger-ui", "uplot"]
)
def test_the_vendored_files_are_those_that_were_published(name: str, ours: set[str]) -> None:
    folder = ROOT / "static" / name
    sums = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == {p.name for p in folder.iterdir()} - {"SHA256SUMS", "VERSION"} - ours
    for wanted, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted, name
