"""Settings: every variable is checked at the start, and the env files say what the code says."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import ROOT, Backend, Postgres, Service, clean_environment, count_lines, read_records
from waiting import wait_until

import backend as backend_module
import background
import client

SECONDS = 30  # for one process on a busy machine
MODULES: dict[str, ModuleType] = {"backend": backend_module, "client": client, "background": background}
STANDARD_LIBRARY_ONLY = ["client", "background"]

WRONG = {
    "backend": {
        "HOST": ["two words", "http://localhost/"],
        "BACKEND_PORT": ["65536", "-1", "80.0", "http", "\u0668\u0660", "99999999999999999999"],
        "WORKERS": ["0", "65"],
        "THREADS": ["1", "257"],
        "LEVEL": ["loud", "info,debug"],
        "LOG_FORMAT": ["xml", "JSON"],
        "DB_HOST": ["two words"],
        "DB_PORT": ["0", "65536"],
        "DATABASE_URL": [
            "postgresql://a:hidden@/logs?host=one,two&port=1,2,3",
            "hidden",
            "mysql://a:hidden@localhost/logs",
            "postgresql://a:hidden@[::1/logs",
            "postgresql://a:hidden@localhost:port/logs",
            "postgresql://a:hidden@localhost/logs?no=option",
        ],
        "BACKEND_CORS_ORIGINS": ["example.org", "https://example.org/path", "https://a.example,,https://b.example"],
        "API_TOKEN": ["hidden token", "hidden\u00e4"],
        "RETENTION_DAYS": ["-1", "36501", "1.5", "1d"],
        "DRAIN_SECONDS": ["-1", "3601", "0.5", "5s"],
    },
    "client": {
        "URL": [
            "ftp://localhost/",
            "localhost:8000",
            "http://",
            "http://a b/",
            "http://a/?b=c",
            "http://h:abc/",
            "http://h:99999/",
            "http://[::1/",
        ],
        "THREADS_AMOUNT": ["0", "1000", "three", "-3"],
        "REQUEST_DELAY_LIMIT": ["-1", "5s", "10000000"],
        "LOG_FILE": ["logs/"],
        "SOURCE_PATTERN": ["(", "(?P<ip>x)", "(?P<ip>x)(?P<status>x)(?P<uri>x)"],
        "BATCH_SIZE": ["0", "10001", "1e3"],
        "ROTATE_BYTES": ["65535", "-1", "1M"],
        "KEEP_FILES": ["-1", "1000", "all"],
        "METRICS_FILE": ["metrics/", "logs.txt", "logs.txt.position"],
        "LOG_FORMAT": ["xml", "JSON"],
        "API_TOKEN": ["hidden token"],
    },
    "background": {
        "URL": ["ftp://localhost/", "/api/data", "http://[::1/", "http://h:abc/", "http://h:99999/"],
        "FILE_NAME": ["a/b", "..", "x" * 300],
        "REQUEST_DELAY": ["0", "-1", "1.5", "10000000"],
        "ROTATE_BYTES": ["-1", "1MB", "1000000000000"],
        "KEEP_FILES": ["-1", "all", "1000000"],
        "METRICS_FILE": ["metrics/", "var/shared/data.txt", "var/shared/data.txt.position"],
        "LOG_FORMAT": ["xml", "JSON"],
        "API_TOKEN": ["hidden token"],
    },
}
# Any text is right, as far as can be known without trying it
FREE = {"backend": {"DB_USER", "DB_PASS", "DB_NAME"}, "client": {"SOURCE"}, "background": {"DIRECTORY"}}
# What keeps a service that takes a wrong value for a right one away from the defaults: a fixed port, ./var
HARMLESS = {"HOST": "127.0.0.1", "BACKEND_PORT": "0", "DATABASE_URL": "postgresql:///logs?host=/nowhere"}
SECRET = {"API_TOKEN", "DATABASE_URL", "DB_PASS"}


def names_of(service: str) -> list[str]:
    return [item.name.upper() for item in dataclasses.fields(MODULES[service].Settings)]


def python(
    service: str, folder: Path, *arguments: str, given: str = "", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end, as bare as that service may be run."""
    bare = ["-I", "-S"] if service in STANDARD_LIBRARY_ONLY else []
    return subprocess.run(
        [sys.executable, *bare, *arguments],
        env=clean_environment(settings),
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


# ---- Wrong values ---------------------------------------------------------------------------------------------------


Outcome = tuple[int, str, list[str]]  # exit status, what it printed, what it left in its folder

Outcomes = dict[tuple[str, str], Outcome]

# Loads a service once, and starts it for each line of its input, a folder and settings, in a process of its own
START_EACH = """
import importlib, json, os, sys
root, service = sys.argv[1:]
sys.path.insert(0, root)
module = importlib.import_module(service)
for line in sys.stdin:
    folder, settings = json.loads(line)
    if not (pid := os.fork()):
        os.chdir(folder)
        os.dup2(os.open(folder + ".out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(folder + ".err", os.O_CREAT | os.O_WRONLY), 2)
        os.environ.update(settings)
        status = module.main([])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module", params=WRONG)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Outcome]:
    """How a service ended with each wrong value."""
    service = request.param
    cases = [(name, value) for name, values in WRONG[service].items() for value in values]
    folders = [tmp_path_factory.mktemp("settings") for _ in cases]
    starts = zip(folders, cases, strict=True)
    lines = "".join(json.dumps([str(folder), {name: value}]) + "\n" for folder, (name, value) in starts)
    done = python(service, folders[0], "-c", START_EACH, str(ROOT), service, given=lines, **HARMLESS)
    assert (done.returncode, done.stderr) == (0, "")

    def outcome(status: int, folder: Path) -> Outcome:
        out, err = (Path(f"{folder}.{name}").read_text() for name in ("out", "err"))
        assert out == ""
        return status, err, sorted(os.listdir(folder))

    return dict(zip(cases, map(outcome, map(int, done.stdout.split()), folders), strict=True))


@pytest.mark.parametrize("service", WRONG)
def test_each_variable_has_a_wrong_value_here_or_takes_any_text(service: str) -> None:
    assert WRONG[service].keys() | FREE[service] == set(names_of(service))


def test_each_wrong_value_is_one_line_that_says_what_is_allowed_and_status_2(outcomes: Outcomes) -> None:
    for (name, value), (status, printed, left) in outcomes.items():
        assert (status, len(printed.splitlines()), left) == (2, 1, []), (name, value, printed)
        assert name in printed
        assert "must be" in printed
        hides = name in SECRET
        assert ("hidden" not in printed.replace("(hidden)", "")) if hides else (repr(value) in printed), printed


@pytest.mark.parametrize("service", STANDARD_LIBRARY_ONLY)
def test_an_address_with_a_password_is_refused_without_showing_it(service: str) -> None:
    with pytest.raises(ValueError, match=r"URL is \(hidden\): must be like http://") as refused:
        MODULES[service].read_settings({"URL": "http://user:secret@localhost/api/data"})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("service", WRONG)
def test_the_migrations_check_settings_too_and_the_first_wrong_one_is_named(service: str, tmp_path: Path) -> None:
    values = {name: values[0] for name, values in WRONG[service].items()}
    arguments = [str(ROOT / f"{service}.py"), *(["migrate"] if service == "backend" else [])]
    done = python(service, tmp_path, *arguments, **values)
    assert done.returncode == 2
    assert next(iter(WRONG[service])) in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 1


# ---- Right values ---------------------------------------------------------------------------------------------------


def test_the_backend_takes_quoted_and_spaced_values_and_empty_ones_as_defaults(
    start_backend: Callable[..., Backend], postgres: Postgres
) -> None:
    empty = dict.fromkeys(names_of("backend"), "")
    url = f" '{postgres.create_logs()}' "
    backend = start_backend(
        **{**empty, "HOST": "'127.0.0.1'", "BACKEND_PORT": ' "0" ', "DATABASE_URL": url, "THREADS": "''"}
    )
    assert backend.url.startswith("http://127.0.0.1:")
    assert backend.records() == []


def test_the_client_takes_quoted_and_spaced_values_and_empty_ones_as_defaults(
    backend: Backend, start: Callable[..., Service], tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.write(write, b"1.2.3.4 GET /quoted 200\n")
    os.close(write)
    settings = {**dict.fromkeys(names_of("client"), ""), "URL": f' "{backend.data_url}" ', "SOURCE": "'-'"}
    service = start("client.py", stdin=read, **settings)
    os.close(read)
    assert service.process.wait(SECONDS) == 0, service.printed
    assert (tmp_path / "logs.txt").read_text() == "1.2.3.4 GET /quoted 200\n"
    assert [record["log"]["uri"] for record in backend.records()] == ["/quoted"]


def test_the_background_takes_quoted_and_spaced_values_and_empty_ones_as_defaults(
    backend: Backend, start: Callable[..., Service], tmp_path: Path
) -> None:
    settings = {"URL": f"'{backend.data_url}'", "DIRECTORY": ' "shared" ', "REQUEST_DELAY": "' 20 '"}
    service = start("background.py", **{**dict.fromkeys(names_of("background"), ""), **settings})
    start("client.py", URL=backend.data_url, REQUEST_DELAY_LIMIT=" 20 ")
    file = tmp_path / "shared" / "data.txt"
    wait_until(lambda: count_lines(file), SECONDS, f"records in {file}; {service.printed}")
    assert service.end() == 0  # until then it may be in the middle of a write
    assert read_records(file)


# ---- The env files --------------------------------------------------------------------------------------------------


def env_file(service: str) -> list[str]:
    return (ROOT / "env" / f"{service}.env").read_text().splitlines()


def assignments(service: str) -> dict[str, str]:
    lines = [line for line in env_file(service) if line and not line.startswith("#")]
    pairs = [line.split("=", 1) for line in lines]
    assert len({name for name, _ in pairs}) == len(pairs), "a name stands twice"
    return {name: value for name, value in pairs if name}


@pytest.mark.parametrize("service", MODULES)
def test_the_env_file_lists_just_the_settings_of_the_code_with_their_defaults(service: str) -> None:
    defaults = {item.name.upper(): str(item.default) for item in dataclasses.fields(MODULES[service].Settings)}
    assert assignments(service) == defaults


def comments(service: str) -> dict[str, str]:
    """What stands above each setting, less the marks and the line breaks."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in env_file(service):
        if line.startswith("# "):
            above.append(line.removeprefix("# "))
        else:
            found[line.partition("=")[0]] = " ".join(above)
            above.clear()
    return found


@pytest.mark.parametrize("service", MODULES)
def test_the_env_file_explains_each_setting_with_its_default_above_it(service: str) -> None:
    for name, value in assignments(service).items():
        assert f"; default {value or 'empty'}" in comments(service)[name]


@pytest.mark.parametrize("service", STANDARD_LIBRARY_ONLY)
def test_the_env_file_says_of_each_setting_what_help_says(service: str) -> None:
    table = {setting.name: setting.text for setting in MODULES[service].settings_table()}
    assert list(table) == names_of(service)
    assert {name: comments(service)[name] for name in table} == table


@pytest.mark.parametrize("service", MODULES)
def test_a_shell_reads_the_env_file_as_written(service: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"set -a; . '{ROOT}/env/{service}.env'; set +a; env -0"],
        env=clean_environment({}), cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    environment = dict(item.split("=", 1) for item in done.stdout.split("\0") if item)
    assert {name: environment[name] for name in names_of(service)} == assignments(service)


# ---- The files themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", STANDARD_LIBRARY_ONLY)
def test_it_imports_the_standard_library_only(service: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{service}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported
    assert imported <= sys.stdlib_module_names
    assert not imported & {"importlib", "ctypes", "site"}


# Imports a file twice: the second time everything that it imports is there already, and the environment is gone.
IMPORT_WITHOUT_ENVIRONMENT = """
import importlib, os, sys, threading
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
del os.environ, os.environb
os.getenv = None
importlib.reload(module)
assert threading.active_count() == 1, threading.enumerate()
"""


@pytest.mark.parametrize("service", MODULES)
def test_importing_it_does_nothing(service: str, tmp_path: Path) -> None:
    nonsense: dict[str, Any] = dict.fromkeys(names_of(service), "\u00e4 nonsense")
    done = python(service, tmp_path, "-c", IMPORT_WITHOUT_ENVIRONMENT, str(ROOT), service, **nonsense)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
