"""What the README shows works as it is shown, and its table of settings is complete."""

from __future__ import annotations

import re
import subprocess

import pytest
from harness import ROOT, Backend

import backend as backend_service
import background as background_service
import client as client_service

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
CURL_EXAMPLES = [line for block in BLOCKS for line in block.splitlines() if "curl" in line]


def test_there_are_examples() -> None:
    assert len(CURL_EXAMPLES) >= 7


@pytest.mark.parametrize("command", CURL_EXAMPLES)
def test_a_curl_example_succeeds(command: str, backend: Backend) -> None:
    strict = command.replace("curl ", "curl --silent --show-error --fail ")
    done = subprocess.run(
        ["bash", "-c", strict.replace("http://localhost:8000", backend.url)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    if "-d " in command or "--data-binary" in command:
        sent = len(re.findall(r"[0-9:] (?:GET|PUT) ", command))
        assert len(backend.records()) == sent
    if "--dump-header" in command:
        assert 'rel="next"' in done.stdout


def test_the_table_lists_every_setting_with_its_default() -> None:
    for module in (backend_service, client_service, background_service):
        defaults = vars(module.Settings())
        for name, default in defaults.items():
            shown = f"`{default}`" if default != "" else ""
            assert re.search(rf"\| `{name.upper()}` \| {re.escape(shown)} ?\|", README), f"{name.upper()} = {shown}"


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/ha.md"])
def test_the_tests_that_a_document_names_are_there(document: str) -> None:
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", (ROOT / document).read_text())
    assert len(named) > 5
    for name in named:
        assert name in files or any(f"def {name}(" in text for text in files.values()), name
