"""What is installed is what was locked: a version and the hashes of its files for everything."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"backend": [], "embedded": ["embedded"], "test": ["embedded", "test"]}
PIN = re.compile(
    r"(?m)^([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)"
    r"(?: ; [^\\\n]*[^\\\n ])?((?: \\\n    --hash=sha256:[0-9a-f]{64})*)"
)


def pins(text: str) -> dict[str, str]:
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version, _ in PIN.findall(text)}


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_has_what_the_project_names_and_hashes_of_all(lock: str) -> None:
    text = (ROOT / f"locks/{lock}.txt").read_text()
    named = [
        *PROJECT["dependencies"],
        *(line for extra in EXTRAS[lock] for line in PROJECT["optional-dependencies"][extra]),
    ]
    assert pins("\n".join(named)).items() <= pins(text).items(), "run `make update-locks`"
    assert all(hashes for _, _, hashes in PIN.findall(text))
    rest = re.sub(r"(?m)^ +#.*$", "", PIN.sub("", text)).strip()
    assert not rest, "something is not pinned"


def test_the_locks_agree_with_each_other() -> None:
    backend, embedded, test = (pins((ROOT / f"locks/{lock}.txt").read_text()) for lock in EXTRAS)
    assert backend.items() <= embedded.items() <= test.items()


def test_the_image_and_the_make_targets_install_locks_only() -> None:
    installs = [
        line
        for file in ("Makefile", "Dockerfile")
        for line in (ROOT / file).read_text().splitlines()
        if "pip install" in line and "-q --disable-pip-version-check uv" not in line
    ]
    assert len(installs) >= 2
    assert all("--require-hashes" in line for line in installs)
