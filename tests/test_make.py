"""The commands of the Makefile and the env files: read the same by a shell, by make and by `make run`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "var", "artifacts", "__pycache__")


def printed(*command: str, cwd: Path = ROOT) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=True).stdout


def variables(text: str) -> dict[str, str]:
    """NAME=value lines, less what a shell or make adds by itself."""
    own = {"PWD", "OLDPWD", "SHLVL", "_"}
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: value for name, _, value in pairs if name not in own}


@pytest.mark.parametrize("service", ["backend", "client", "background"])
def test_an_env_file_reads_the_same_by_a_shell_by_make_and_by_the_run(service: str, tmp_path: Path) -> None:
    by_run = run.read_env_file(ROOT / f"env/{service}.env")
    by_shell = variables(printed("env", "-i", "sh", "-c", f"set -a; . ./env/{service}.env; exec env"))
    names = " ".join(by_run)
    (tmp_path / "Makefile").write_text(
        f"include {ROOT}/env/{service}.env\n$(foreach name,{names},$(info $(name)=$($(name))))\nall: ;\n"
    )
    by_make = variables(printed("env", "-i", shutil.which("make") or "make", "-s", "all", cwd=tmp_path))
    assert by_run == by_shell == by_make


def test_help_lists_every_target(tmp_path: Path) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    listed = re.findall(r"^make ([a-z-]+) +\S", printed("make"), re.MULTILINE)
    internal = {"test-tools", "ha-tools", "bench-tools"}
    assert set(re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE)) - internal == set(listed)
    assert {"run", "test", "lint", "migrate", "migrate-down", "compose-up", "compose-down"} <= set(listed)


def make_in_copy(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """make in a copy of the checkout, with the environment that these tests run in instead of a new one."""
    if not folder.exists():
        shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    ready = f"{sys.prefix}/.ready-to-run"
    return subprocess.run(
        ["make", f"VENV={sys.prefix}", f"--old-file={ready}", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_migrate_applies_all_and_migrate_down_takes_the_last_one_back(open_folder: Path) -> None:
    names = sorted(path.stem for path in ROOT.glob("migrations/*.sql") if ".rollback" not in path.name)
    folder = open_folder / "checkout"
    for target, expected in (
        ("migrate", names),
        ("migrate", [": none"]),
        ("migrate-down", names[-1:]),
        ("migrate", names[-1:]),
    ):
        result = make_in_copy(folder, target)
        assert result.returncode == 0, result.stderr
        assert all(name in result.stderr for name in expected), (target, result.stderr)


def test_the_environment_wins_over_the_env_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
    settings = folder / "env/backend.env"
    settings.write_text(settings.read_text("utf-8").replace("DB_HOST=embedded", "DB_HOST=from-the-file.invalid"))
    by_file = make_in_copy(folder, "migrate")
    assert by_file.returncode != 0
    assert "from-the-file.invalid" in by_file.stderr
    by_environment = make_in_copy(folder, "migrate", DB_HOST="127.0.0.1", DB_PORT="1")
    assert by_environment.returncode != 0
    assert "127.0.0.1" in by_environment.stderr
    assert "from-the-file" not in by_environment.stderr


def test_an_old_python_is_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text(
        '#!/bin/sh\ncase "$1 $2" in --version*) echo Python 3.8.1 ;; *print*) echo 3.8 ;; *) exit 1 ;; esac\n'
    )
    old.chmod(0o755)
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_COPIED)
    result = subprocess.run(
        ["make", "run", f"PYTHON={old}"],
        cwd=tmp_path / "checkout",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.8.1" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "checkout").glob(".venv*"))
