"""openapi.json says what the backend does: nothing more, nothing less, and Schemathesis finds no exception."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize(("schema", "pattern"), [("LogLine", service.LINE), ("Moment", service.MOMENT)])
def test_the_document_and_the_backend_read_by_the_same_pattern(schema: str, pattern: str | re.Pattern[str]) -> None:
    assert SCHEMAS[schema]["pattern"] == re.compile(pattern).pattern


def test_the_document_has_every_route_and_the_backend_has_every_path() -> None:
    unused: Any = None  # nothing is asked, so no database is needed
    inspected = falcon.inspect.inspect_app(service.create_app(unused, unused, service.Settings()))
    routes = {
        (route.path, method.method)
        for route in inspected.routes
        for method in route.methods or ()
        if not method.internal and method.method != "OPTIONS"
    }
    routes |= {(f"{route.prefix.rstrip('/')}/{{file}}", "GET") for route in inspected.static_routes or ()}
    documented = {(path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item}
    assert routes == documented


def test_the_document_names_every_file_of_the_documentation_page() -> None:
    [parameter] = DOCUMENT["paths"]["/docs/assets/{file}"]["get"]["parameters"]
    assert parameter["schema"]["enum"] == sorted(path.name for path in (ROOT / "static/swagger-ui").iterdir())


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_batch_has_at_most_the_documented_number_of_lines(backend: Backend, kind: str) -> None:
    assert SCHEMAS["Batch"]["maxItems"] == MOST_LINES
    for lines, status in ((MOST_LINES, 201), (MOST_LINES + 1, 400)):
        body = json.dumps([{"log": LINE}] * lines) if kind == "application/json" else f"{LINE}\n" * lines
        answer = requests.post(backend.data_url, data=body, headers={"Content-Type": kind}, timeout=60)
        assert answer.status_code == status, answer.text[:1000]
    assert len(backend.records()) == MOST_LINES


def test_schemathesis_finds_nothing(backend: Backend, tmp_path: Path) -> None:
    """Every check and every phase; schemathesis_hooks.py has the two things that it has to be told."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        str(ROOT / "openapi.json"),
        f"--url={backend.url}",
        "--checks=all",
        "--phases=examples,coverage,fuzzing,stateful",
        "--max-examples=100",  # for each operation and phase; the whole run takes about 15 seconds
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
