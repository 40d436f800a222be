"""--help, --version and --check of a service, and its settings: code, --help, env file and README say the same."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import psycopg
import pytest
from harness import (
    ROOT,
    Backend,
    Postgres,
    backend_command,
    clean_environment,
    driver,
    execute,
    new_postgres,
    standby_of,
)

import backend as backend_module

SECONDS = 30
MODULES: dict[str, ModuleType] = {"backend": backend_module}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(service: str, *arguments: str, **settings: str | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / f"{service}.py"), *arguments],
        env=clean_environment(settings), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


def words(text: str) -> str:
    """However it is broken into lines."""
    return " ".join(text.split())


def env_comments(service: str) -> dict[str, str]:
    """What stands above each variable of the env file."""
    text = (ROOT / "env" / f"{service}.env").read_text().partition("\n\n")[2]
    found = re.findall(r"((?:# .*\n)+)([A-Z_]+)=", text)
    return {name: words(comment.replace("# ", "")) for comment, name in found}


# ---- --help and --version -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", MODULES)
def test_help_lists_each_setting_just_as_the_env_file_explains_it(service: str) -> None:
    done = run(service, "--help", THREADS="nonsense")  # whatever the settings are
    assert (done.returncode, done.stderr) == (0, "")
    about, settings = done.stdout.split("Settings are ")
    for argument in ("--help", "--version", "--check"):
        assert re.search(rf"^  {argument} +\S", about, re.MULTILINE)
    found = re.split(r"^  ([A-Z_]+) +", settings, flags=re.MULTILINE)
    listed = dict(zip(found[1::2], map(words, found[2::2]), strict=True))
    assert listed == env_comments(service)
    defaults = {item.name.upper(): str(item.default) or "empty" for item in fields(MODULES[service].Settings)}
    assert {name: text.rsplit("; default ", 1)[1] for name, text in listed.items()} == defaults
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("service", MODULES)
def test_version_is_that_of_the_project(service: str) -> None:
    done = run(service, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{service}.py {VERSION}\n", "")


@pytest.mark.parametrize("service", MODULES)
@pytest.mark.parametrize("arguments", [["--verbose"], ["--check", "x"]])
def test_unknown_arguments_are_one_line_and_status_2(service: str, arguments: list[str]) -> None:
    done = run(service, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "--help" in line


# ---- --check of the backend -----------------------------------------------------------------------------------------


def check(**settings: str | int) -> tuple[int, list[str]]:
    """The exit status, and the lines."""
    with redirect_stdout(StringIO()) as printed:
        status = backend_module.check(
            {"HOST": "127.0.0.1", "BACKEND_PORT": "0"} | {name: str(value) for name, value in settings.items()}
        )
    return status, printed.getvalue().splitlines()


def test_check_says_ok_of_each_thing_where_the_backend_could_serve(postgres: Postgres) -> None:
    done = run("backend", "--check", DATABASE_URL=postgres.create_logs(), BACKEND_PORT=0)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "ok      settings",
        "ok      database",
        "ok      schema",
        "ok      port",
    ]


def test_check_names_a_wrong_setting_and_what_it_must_be() -> None:
    assert check(THREADS="many") == (1, ["FAILED  settings: THREADS is 'many': must be a whole number from 2 to 256"])


def test_check_says_what_to_do_about_a_database_that_is_away_and_hides_the_password() -> None:
    status, lines = check(DATABASE_URL="postgresql://logs:hidden@127.0.0.1:1/logs")
    assert status == 1
    assert re.fullmatch(
        "FAILED  database: could not connect: .*Connection refused.*: start PostgreSQL, or .*", lines[1]
    )
    assert lines[2] == "FAILED  schema: unknown without the database"
    assert "hidden" not in "".join(lines)


def test_check_names_the_migrations_that_are_missing_and_applies_none(postgres: Postgres) -> None:
    url = postgres.create_logs()
    backend_command("rollback", url)
    last = sorted(path.stem for path in (ROOT / "migrations").glob("*.sql") if "rollback" not in path.name)[-1]
    for _ in range(2):
        status, lines = check(DATABASE_URL=url)
        assert (status, lines[2]) == (1, f"FAILED  schema: missing: {last}: run `make migrate`")
    empty = postgres.create_database()
    status, lines = check(DATABASE_URL=empty)
    assert status == 1
    assert "0001.create-logs" in lines[2]
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


CANNOT_STORE = {
    "read-only": (
        "ALTER ROLE {} SET default_transaction_read_only = on",
        "cannot execute INSERT in a read-only transaction",
    ),
    "reader": ("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}", "permission denied for table logs"),
    "patchy": ("DROP FUNCTION server_v1(bigint, integer)", "function server_v1(bigint, integer) does not exist"),
}


@pytest.mark.parametrize("role", CANNOT_STORE)
def test_check_fails_where_no_line_could_be_stored(postgres: Postgres, role: str) -> None:
    url, (change, reason) = postgres.create_logs(), CANNOT_STORE[role]
    execute(url, f'CREATE ROLE "{role}" LOGIN')
    try:
        execute(url, f'GRANT SELECT ON _yoyo_migration TO "{role}"')
        if role == "read-only":
            execute(url, f'GRANT SELECT, INSERT ON logs TO "{role}"')
        execute(url, change.format(f'"{role}"'))
        status, lines = check(DATABASE_URL=url.replace("postgres@", f"{role}@"))
        assert (status, lines[2]) == (1, f"FAILED  schema: no line could be stored: {reason}")
    finally:
        execute(url, f'DROP OWNED BY "{role}"')
        execute(url, f'DROP ROLE "{role}"')


def test_check_stores_nothing_and_sets_the_isolation_as_the_backend_does(postgres: Postgres) -> None:
    url = postgres.create_logs()
    with psycopg.connect(url) as connection:
        connection.execute(
            f'ALTER DATABASE "{connection.info.dbname}" SET default_transaction_isolation = serializable'.encode()
        )
    assert check(DATABASE_URL=url)[0] == 0
    assert execute(url, "SELECT count(*) FROM logs") == [(0,)]


def test_check_takes_a_schema_of_a_newer_version(postgres: Postgres) -> None:
    url = postgres.create_logs()
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO _yoyo_migration VALUES ('later', '9999.later', now())")
    status, lines = check(DATABASE_URL=url)
    assert (status, lines[2].split(", ")[1]) == (0, "and 1 of a newer version")


def test_check_says_of_a_taken_port_that_it_is_taken(backend: Backend) -> None:
    port = int(urlsplit(backend.url).port or 0)
    status, lines = check(DATABASE_URL=backend.database_url, BACKEND_PORT=port)
    assert status == 1
    assert lines[3].startswith(f"FAILED  port: 127.0.0.1:{port} is taken: ")


def test_check_of_the_embedded_database_starts_nothing(tmp_path: Path) -> None:
    text = f"import backend, embedded, pathlib\nembedded.HERE = pathlib.Path({str(tmp_path)!r})\n"
    program = driver(tmp_path, "elsewhere.py", f"{text}sys.exit(backend.main(['--check']))\n")
    done = subprocess.run(
        [sys.executable, program],
        env=clean_environment({"BACKEND_PORT": 0}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "embedded, not in use now" in done.stdout
    assert not (tmp_path / "var").exists()


@pytest.mark.slow
def test_check_tells_a_standby_from_the_database() -> None:
    with new_postgres() as primary:
        name = primary.create_logs().split("/")[3].split("?")[0]
        with standby_of(primary) as standby:
            status, lines = check(DATABASE_URL=f"{standby.url(name)}&target_session_attrs=any")
            both, said = check(DATABASE_URL=f"{standby.url(name)},{primary.socket_folder}")
    assert (status, lines[1]) == (1, "FAILED  database: the server is in recovery, a standby: name the primary")
    assert (both, said[1].split(":")[0]) == (0, "ok      database")  # as when it serves
