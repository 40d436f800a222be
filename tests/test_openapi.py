"""openapi.json says what the backend does: nothing more, nothing less, and Schemathesis finds no exception."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import falcon.inspect
import pytest
import requests
from harness import ROOT, Backend, clean_environment
from openapi_spec_validator import OpenAPIV31SpecValidator

import backend as service

DOCUMENT: dict[str, Any] = json.loads((ROOT / "openapi.json").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
LINE = "1.2.3.4 GET https://domain.com/example/ab 200"
MOST_LINES = 10_000  # of one batch


def test_the_document_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert [str(error) for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


ADDRESSES = [
    "1.2.3.4", "255.255.255.255", "0.0.0.0", "::", "::1", "1::", "2001:db8::1", "2001:DB8:0:0:8:800:200C:417A",
    "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1::3:4:5:6:7:8", "::ffff:1.2.3.4", "1:2:3:4:5:6:1.2.3.4",
    "64:ff9b::192.0.2.33", "::1.2.3.4", "1::1.2.3.4", "fe80::ffff:ffff:ffff:ffff",
]  # fmt: skip
NO_ADDRESSES = [
    "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.04", "01.2.3.4", "1.2.3.-4", "1.2.3.", ".1.2.3", "a.b.c.d", "0x1.2.3.4",
    ":", ":::", "1:::2", "1::2::3", "1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7:8::", "::1:2:3:4:5:6:7:8",
    "12345::", "g::", "1:2:3:4:5:6:7:1.2.3.4", "::1.2.3", "::1.2.3.256", "1.2.3.4::", "fe80::1%eth0", "::/0",
    "1.2.3.4/8",
]  # fmt: skip
MOMENTS = [
    "2026-11-23", "2026-11-23T18:43", "2026-11-23 18:43:46", "2026-11-23t18:43:46.610595z", "2024-02-29", "2000-02-29",
    "2026-11-23T18:43:46.123456789012+05:30", "2026-11-23T18:43:46-0530", "2026-11-23T23:59:59 23:59", "1000-01-01",
    "9999-12-31T23:59:59.999999-23:59", "1000-01-01T00:00+23:59", "0", "-1", "1767225600", "9999999999.999999", "-0.5",
    "20261123.0", "20261323", "202613", "1899", "-2026",
]  # fmt: skip
NO_MOMENTS = [
    "", " ", "now", "2026-11", "2026-11-23T", "2026-11-23T18", "2026-W48-1", "2026-11-31", "2026-13-01",
    "2023-02-29", "1900-02-29", "2026-00-10", "2026-11-00", "0999-01-01", "2026-11-23T24:00", "2026-11-23T18:60",
    "2026-11-23T18:43:60", "2026-11-23T18:43:46.", "2026-11-23T18:43:46+24:00", "2026-11-23T18:43:46+05:60",
    "2026-11-23T18:43:46+5", "2026-11-23Z", "12345678901", "1e9", "1.", ".5", "--1", "+1", "\uff12026-11-23",
    "2026", "202611", "20261123", "19700101",
]  # fmt: skip


def is_read(parse: Callable[..., object], *arguments: str) -> bool:
    try:
        parse(*arguments)
    except ValueError:
        return False
    return True


def is_documented(schema: str, text: str) -> bool:
    return re.search(SCHEMAS[schema]["pattern"], text) is not None


@pytest.mark.parametrize(("texts", "good"), [(ADDRESSES, True), (NO_ADDRESSES, False)])
def test_the_document_and_the_backend_know_the_same_addresses(texts: list[str], good: bool) -> None:
    for text in texts:
        line = LINE.replace("1.2.3.4", text)
        assert is_documented("LogLine", line) is is_read(service.parse_line, line, "id") is good, text


@pytest.mark.parametrize(("texts", "good"), [(MOMENTS, True), (NO_MOMENTS, False)])
def test_the_document_and_the_backend_know_the_same_dates(texts: list[str], good: bool) -> None:
    for text in texts:
        assert is_documented("Moment", text) is is_read(service.parse_date, text) is good, text


@pytest.mark.parametrize("place", range(4))
def test_the_document_and_the_backend_know_the_same_characters_in_each_field(place: int) -> None:
    for number in (*range(0x180), *range(0x1680, 0x3002), *range(0xD7F0, 0xE010), 0xFEFF, 0xFFFF, 0x1F600):
        for value in (chr(number), f"/{chr(number)}", f"2{chr(number)}0", f"A{chr(number)}"):
            line = " ".join([*LINE.split()[:place], value, *LINE.split()[place + 1 :]])
            assert is_documented("LogLine", line) is is_read(service.parse_line, line, "id"), (number, line)


def test_the_document_has_every_route_and_the_backend_has_every_path() -> None:
    unused: Any = None  # nothing is asked, so no database is needed
    app = service.create_app(unused, unused, unused, service.Settings(), unused)
    inspected = falcon.inspect.inspect_app(app)
    routes = {
        (route.path, method.method)
        for route in inspected.routes
        for method in route.methods or ()
        if not method.internal and method.method != "OPTIONS"
    }
    routes |= {(f"{route.prefix.rstrip('/')}/{{file}}", "GET") for route in inspected.static_routes or ()}
    documented = {(path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item}
    documented |= {(path, "HEAD") for path, method in documented if method == "GET"}  # as HTTP has it
    assert routes == documented


@pytest.mark.parametrize(
    ("path", "folders"), [("/docs/assets/{file}", ("swagger-ui",)), ("/overview/{file}", ("overview", "uplot"))]
)
def test_the_document_names_every_file_of_the_pages(path: str, folders: tuple[str, ...]) -> None:
    [parameter] = DOCUMENT["paths"][path]["get"]["parameters"]
    files = [file.name for folder in folders for file in (ROOT / "static" / folder).iterdir()]
    assert parameter["schema"]["enum"] == sorted(files)


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_batch_has_at_most_the_documented_number_of_lines(backend: Backend, kind: str) -> None:
    assert SCHEMAS["Batch"]["maxItems"] == MOST_LINES
    for lines, status in ((MOST_LINES, 201), (MOST_LINES + 1, 400)):
        body = json.dumps([{"log": LINE}] * lines) if kind == "application/json" else f"{LINE}\n" * lines
        answer = requests.post(backend.data_url, data=body, headers={"Content-Type": kind}, timeout=60)
        assert answer.status_code == status, answer.text[:1000]
    assert len(backend.records()) == MOST_LINES


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.slow)])  # of each operation and phase
def test_schemathesis_finds_nothing(backend: Backend, tmp_path: Path, examples: int) -> None:
    """Every check and every phase; schemathesis_hooks.py has the two things that it has to be told."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        str(ROOT / "openapi.json"),
        f"--url={backend.url}",
        "--checks=all",
        "--phases=examples,coverage,fuzzing,stateful",
        f"--max-examples={examples}",
        "--seed=1",
        "--generation-database=none",
        "--no-color",
    ]
    modules = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": modules, "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
    run = subprocess.run(
        command, env=clean_environment(environment), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"Tested: {sum(map(len, DOCUMENT['paths'].values()))}\n" in run.stdout, run.stdout
