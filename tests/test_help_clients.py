"""--help, --version and --check of client.py and background.py: what they say is so, and nothing is changed by it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import PROBLEM, FakeBackend, Reply, Request, post_lines, some_lines
from harness import ROOT, Backend, Service, clean_environment, count_lines
from waiting import wait_until

import background
import client

SERVICES = {"client": client, "background": background}
TOKEN = "a-token"


def run(script: str, *arguments: str, cwd: Path, **settings: Any) -> tuple[int, str]:
    """Exit status, and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", script if "/" in script else str(ROOT / script), *arguments],
        env=clean_environment(settings), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each file with its content and the time of its last change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ---- --help and --version -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_help_explains_each_setting_whatever_the_settings_are(service: str, tmp_path: Path) -> None:
    status, printed = run(f"{service}.py", "--help", cwd=tmp_path, URL="nonsense", LOG_FORMAT="nonsense")
    assert status == 0
    assert printed.startswith(f"usage: python {service}.py [")
    text = " ".join(printed.split())
    for setting in SERVICES[service].settings_table():
        assert f"{setting.name} {setting.text}" in text
        assert setting.text.endswith(f"; default {setting.default}" if setting.default != "" else "; default empty")
    assert all(len(line) <= 120 for line in printed.splitlines())
    assert all(word in text for word in ("--check", "--version"))
    commands = {"client": ("replay", "--all"), "background": ("verify", "reconcile", "--dry-run", "--yes")}
    assert all(word in text for word in commands[service])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("service", SERVICES)
def test_the_version_is_that_of_the_project(service: str, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(f"{service}.py", "--version", cwd=tmp_path) == (0, f"{service}.py {version}\n")


@pytest.mark.parametrize("service", SERVICES)
def test_unknown_arguments_are_one_line_and_status_2(
    service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = "--check, --help, --version\n"
    status, printed = run(f"{service}.py", "--check", "now", cwd=tmp_path)
    assert status == 2
    assert re.fullmatch(f"{service}: unknown arguments '--check now'; known are .*{known}", printed)
    for word in ("--chek", "help", "-h", ""):
        assert SERVICES[service].main([word, word]) == 2
        assert re.fullmatch(f"{service}: unknown arguments '{word} {word}'; .*{known}", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


# ---- --check: all is well -------------------------------------------------------------------------------------------


def assert_well(status_and_printed: tuple[int, str], *what: str) -> None:
    status, printed = status_and_printed
    lines = printed.splitlines()
    assert all(line.startswith("ok      ") for line in lines), printed
    assert [line[8:].split(":")[0] for line in lines] == list(what)
    assert status == 0


def test_a_check_of_the_client_that_finds_nothing_changes_nothing(
    start: Callable[..., Service], start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    place = tmp_path / "place"
    place.mkdir()
    (place / "access.log").write_text("192.0.2.1 GET /a 200\n")
    settings = {
        "URL": backend.data_url,
        "API_TOKEN": TOKEN,
        "LOG_FILE": place / "new/logs-%n.txt",
        "SOURCE": f"{place}/access.log {place}/*.log",
        "METRICS_FILE": place / "client.prom",
    }
    before = contents(place)
    what = ["settings", "backend", "LOG_FILE", "SOURCE", "SOURCE", "METRICS_FILE"]
    assert_well(run("client.py", "--check", cwd=tmp_path, **settings), *what)
    assert contents(place) == before
    assert [path.name for path in place.iterdir()] == ["access.log"]
    shipper = start("client.py", **settings)
    shipper.wait_for_line("journal .*logs-1.txt")
    wait_until(lambda: (place / "new/logs-1.txt.position").exists(), what="the first delivery")
    assert_well(run("client.py", "--check", cwd=tmp_path, **settings), *what)  # beside one that is at work
    assert shipper.end() == 0
    assert "WARNING" not in shipper.printed
    before = contents(place)
    assert_well(run("client.py", "--check", cwd=tmp_path, **settings), *what)
    assert contents(place) == before


def test_a_check_of_the_exporter_that_finds_nothing_changes_nothing(
    start: Callable[..., Service], start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    settings = {
        "URL": backend.data_url,
        "API_TOKEN": TOKEN,
        "DIRECTORY": tmp_path / "place/shared",
        "METRICS_FILE": tmp_path / "exporter.prom",
    }
    what = ["settings", "backend", "DIRECTORY", "last record", "METRICS_FILE"]
    assert_well(run("background.py", "--check", cwd=tmp_path, **settings), *what)
    assert not (tmp_path / "place").exists()
    exporter = start("background.py", **settings, REQUEST_DELAY=20)
    shipper = start(
        "client.py", URL=backend.data_url, API_TOKEN=TOKEN, LOG_FILE=tmp_path / "log", REQUEST_DELAY_LIMIT=5
    )
    file = tmp_path / "place/shared/data.txt"
    wait_until(lambda: count_lines(file) > 10, what="some records")
    assert_well(run("background.py", "--check", cwd=tmp_path, **settings), *what)  # beside one that is at work
    assert [shipper.end(), exporter.end()] == [0, 0]
    assert "WARNING" not in exporter.printed
    with file.open("ab") as torn:
        torn.write(b'{"id":"')
    before = contents(file.parent)
    status, printed = run("background.py", "--check", cwd=tmp_path, **settings)
    assert status == 0, printed
    assert "ok      last record: data.txt" in printed
    assert contents(file.parent) == before


# ---- --check: something is wrong ------------------------------------------------------------------------------------


def failures(status_and_printed: tuple[int, str]) -> list[str]:
    """The lines of what has failed; the others say that all is well."""
    status, printed = status_and_printed
    assert status == 1
    lines = [line for line in printed.splitlines() if not line.startswith("ok      ")]
    assert all(line.startswith("FAILED  ") for line in lines), printed
    return lines


@pytest.mark.parametrize("service", SERVICES)
def test_a_wrong_setting_is_what_a_check_says_first(service: str, tmp_path: Path) -> None:
    found = failures(run(f"{service}.py", "--check", cwd=tmp_path, LOG_FORMAT="xml", API_TOKEN="hidden value"))
    assert found == ["FAILED  settings: LOG_FORMAT is 'xml': must be text or json"]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Status and text of a check in this process: check("client", URL=...)."""
    monkeypatch.chdir(tmp_path)

    def check_here(service: str, **settings: Any) -> tuple[int, str]:
        status = SERVICES[service].check_all({name: str(value) for name, value in settings.items()})
        return status, capsys.readouterr().out

    return check_here


def not_ready(request: Request) -> Reply:
    """A backend without its database: what is public and what only looks at the head works."""
    if request.method == "POST":
        return Reply(400, b'{"detail": "A batch has 1 to 10000 lines; this one has 0."}', PROBLEM)
    return Reply(503, b'{"detail": "The database does not answer."}', PROBLEM)


ANSWERS: dict[str, tuple[Callable[[Request], Reply | None], str]] = {
    "a wrong token": (lambda _: Reply(401, b'{"detail": "no token"}', PROBLEM), "answer 401.*set API_TOKEN"),
    "a wrong path": (lambda _: Reply(404, b"<h1>nothing here</h1>", "text/html"), "answer 404.*URL"),
    "a proxy's refusal": (lambda _: Reply(400, b"<h1>Bad Request</h1>", "text/html"), "answer 400.*URL"),
    "a portal": (lambda _: Reply(302, b"", "text/html", {"Location": "/login"}), "answer 302.*URL"),
    "a connection that is cut": (lambda _: None, "unreachable: .*closed connection.*: start it, or correct URL"),
    "no database": (not_ready, "The database does not answer"),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("service", SERVICES)
def test_a_check_says_what_the_backend_answers_and_what_to_do(
    service: str, kind: str, fake: FakeBackend, check: Callable[..., tuple[int, str]]
) -> None:
    answer, expected = ANSWERS[kind]
    fake.answer = answer
    [line] = failures(check(service, URL=fake.data_url))  # with no file yet nothing else is asked
    assert line.startswith(f"FAILED  backend: {fake.data_url}: ")
    assert re.search(expected, line), line
    assert fake.stored == {}


def test_a_check_does_not_miss_a_readyz_that_a_proxy_keeps_back(
    fake: FakeBackend, check: Callable[..., tuple[int, str]]
) -> None:
    fake.answer = lambda one: fake.serve(one) if one.method == "POST" else Reply(403, b"no", "text/html")
    assert_well(check("client", URL=fake.data_url), "settings", "backend", "LOG_FILE")


def test_a_check_of_the_client_says_which_file_is_wrong(
    fake: FakeBackend, tmp_path: Path, check: Callable[..., tuple[int, str]]
) -> None:
    fake.answer = lambda one: fake.serve(one) if one.method == "POST" else Reply(200)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "logs.txt").write_text("192.0.2.1 GET /a 200\n")
    (tmp_path / "logs.txt.journal").write_text("{")
    (tmp_path / "other.txt").write_text("192.0.2.1 GET /a 200\n")
    (tmp_path / "other.txt.source").write_text("{}")
    (tmp_path / "foreign").write_text("not of ours\n")
    before = contents(tmp_path)
    for settings, expected in [
        ({"LOG_FILE": "file/logs.txt"}, "LOG_FILE: file/logs.txt: .*/file is no folder: make it, or name another"),
        ({"LOG_FILE": "logs.txt"}, "LOG_FILE: logs.txt: .*logs.txt.journal cannot be read: .*: restore it, or move"),
        ({"LOG_FILE": "other.txt"}, "LOG_FILE: other.txt: .*other.txt.journal is missing, .*: restore it, or move"),
        ({"LOG_FILE": "log%n.txt", "SOURCE": "gone.log"}, "SOURCE: gone.log: .*No such file.*: correct SOURCE"),
        ({"LOG_FILE": "new", "SOURCE": "*.log"}, r"SOURCE: \*.log: no file matches"),
        ({"LOG_FILE": "new", "SOURCE": "new"}, "SOURCE: new: it is LOG_FILE"),
        ({"LOG_FILE": "new", "SOURCE": "/dev/null"}, "SOURCE: /dev/null: .*not a regular file"),
        ({"LOG_FILE": "new", "METRICS_FILE": "no/x.prom"}, "METRICS_FILE: no/x.prom: .*/no is no folder"),
        ({"LOG_FILE": "new", "METRICS_FILE": "foreign"}, "METRICS_FILE: foreign: it is another kind of file"),
    ]:
        [line] = failures(check("client", URL=fake.data_url, **settings))
        assert re.match(f"FAILED  {expected}", line), line
    assert contents(tmp_path) == before


def test_a_check_of_the_client_finds_what_its_start_would_not_go_on_from(
    fake: FakeBackend, tmp_path: Path, check: Callable[..., tuple[int, str]]
) -> None:
    fake.answer = lambda one: fake.serve(one) if one.method == "POST" else Reply(200)
    journal = client.open_journal(str(tmp_path / "logs.txt"))
    journal.append([b"192.0.2.1 GET /a 200"])
    journal.acknowledge(journal.pending(1))
    journal.make_durable(at_once=True)
    [line] = failures(check("client", URL=fake.data_url, LOG_FILE="logs.txt", SOURCE="logs.*"))
    assert re.match(r"FAILED  SOURCE: logs.\*: no file matches", line)
    (tmp_path / "logs.gz").write_bytes(b"")
    [line] = failures(check("client", URL=fake.data_url, LOG_FILE="other.txt", SOURCE="*.gz"))
    assert re.match(r"FAILED  SOURCE: \*.gz: no file matches", line)
    (tmp_path / "logs.txt").write_text("another file\n" * 10)
    [line] = failures(check("client", URL=fake.data_url, LOG_FILE="logs.txt"))
    assert re.match("FAILED  LOG_FILE: logs.txt: .* is not the journal of which 21 bytes were delivered: restore", line)


def test_a_check_of_a_client_without_its_standard_input_says_so(fake: FakeBackend, tmp_path: Path) -> None:
    command = f"exec {sys.executable} {ROOT}/client.py --check <&-"
    settings = {"URL": fake.data_url, "SOURCE": "-"}
    done = subprocess.run(["sh", "-c", command], env=clean_environment(settings), cwd=tmp_path, stdout=-1, text=True)
    assert done.returncode == 1
    assert "FAILED  SOURCE: -: standard input is closed: redirect it" in done.stdout


def test_a_check_of_the_exporter_says_if_the_database_lacks_the_last_record(
    start: Callable[..., Service], start_backend: Callable[..., Backend], shared: Path, tmp_path: Path
) -> None:
    first, other = start_backend(), start_backend()
    post_lines(first, some_lines(10))
    exporter = start("background.py", URL=first.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    wait_until(lambda: count_lines(shared) == 10, what="the records")
    assert exporter.end() == 0
    last = json.loads(shared.read_text().splitlines()[-1])
    before = contents(shared.parent)
    for renamed in (False, True):
        [line] = failures(run("background.py", "--check", cwd=tmp_path, URL=other.data_url, DIRECTORY=shared.parent))
        assert line.startswith(f"FAILED  last record: data.txt: {shared}{'.1' * renamed} ends in record {last['id']}")
        assert "reconcile" in line
        if not renamed:
            assert contents(shared.parent) == before
            shared.rename(f"{shared}.1")


def test_a_check_of_the_exporter_says_which_folder_or_file_is_wrong(
    fake: FakeBackend, tmp_path: Path, check: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/data.txt").write_text("my notes\n")
    before = contents(tmp_path)
    for settings, expected in [
        ({"DIRECTORY": "file/shared"}, "DIRECTORY: file/shared: .*/file is no folder"),
        ({"DIRECTORY": "notes"}, "last record: data.txt: notes/data.txt does not end in a record.*Move it away"),
        ({"METRICS_FILE": "no/x.prom"}, "METRICS_FILE: no/x.prom: .*/no is no folder"),
    ]:
        lines = failures(check("background", URL=fake.data_url, **settings))
        assert re.match(f"FAILED  {expected}", lines[0]), lines
    assert contents(tmp_path) == before


def test_a_check_of_the_exporter_finds_what_its_start_would_not_go_on_from(
    fake: FakeBackend, start: Callable[..., Service], shared: Path, check: Callable[..., tuple[int, str]]
) -> None:
    fake.add(some_lines(20))
    exporter = start("background.py", URL=fake.data_url, DIRECTORY=shared.parent, REQUEST_DELAY=20)
    wait_until(lambda: count_lines(shared) == 20, what="the records")
    assert exporter.end() == 0
    whole, part = shared.read_bytes(), shared.with_name("data.txt.1")

    def found() -> str:
        before = contents(shared.parent)
        [line] = failures(check("background", URL=fake.data_url, DIRECTORY=shared.parent))
        assert contents(shared.parent) == before
        return line.removeprefix("FAILED  last record: data.txt: ")

    shared.write_bytes(b"")
    assert found().startswith(f"{shared} was emptied")
    part.write_bytes(whole)
    shared.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    assert found().startswith(f"{part} goes on to ")
    part.unlink()
    shared.rename(part)
    shared.symlink_to(part)
    assert found() == f"{shared} is a symbolic link, and not followed: put the file itself there"
    part.replace(shared)
    shared.with_name("data.txt.lock").symlink_to("elsewhere")
    assert found() == f"{shared}.lock is no lock file of ours; remove it"


def test_a_check_of_the_exporter_refuses_a_network_file_system(
    fake: FakeBackend, tmp_path: Path, check: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n28 27 0:9 / {tmp_path}/nfs rw - nfs4 a rw\n")
    monkeypatch.setattr(background, "MOUNTS", str(mounts))
    [line] = failures(check("background", URL=fake.data_url, DIRECTORY="nfs/shared"))
    assert line.startswith("FAILED  DIRECTORY: nfs/shared: it is on nfs4, a network file system")
