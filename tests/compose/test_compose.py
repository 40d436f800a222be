"""The system in containers, on a real engine: `make test-compose`. The tests follow one system from up to clean."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from load import Load
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".env", ".venv*", ".*_cache", "var", "artifacts", "__pycache__")
START_SECONDS = 600  # the first time, an image is built
SETTLE_SECONDS = 60
SCALE = ("--profile", "scale")
BACKENDS = ("backend", "backend-2", "backend-3")  # with that profile

KILL = """
import os, signal, sys
from contextlib import suppress
for entry in os.listdir("/proc"):
    if entry.isdigit():
        with suppress(FileNotFoundError), open(f"/proc/{entry}/cmdline") as file:  # a health check ends by itself
            if file.read().split("\\0")[1:2] == sys.argv[1:]:
                os.kill(int(entry), signal.SIGKILL)
"""


class System:
    """A project of its own, from a copy of the checkout, on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"log-pipeline-test-{secrets.token_hex(4)}"
        with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as another:
            self.port, self.proxy_port = free.getsockname()[1], another.getsockname()[1]
        shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "DB_", "MFLAGS"))},
            "COMPOSE_PROJECT_NAME": self.name,
            "COMPOSE_FILE": "docker-compose.yml:tests/compose/fast.yml",
            "BACKEND_PORT": str(self.port),
            "PROXY_PORT": str(self.proxy_port),
        }

    def run(self, *command: str, timeout: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self._environ, capture_output=True, text=True, timeout=timeout, check=False
        )

    def done(self, *command: str) -> str:
        """What a command printed that must succeed."""
        result = self.run(*command)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-5000:]}\n{result.stderr[-5000:]}"
        return result.stdout

    def compose(self, *arguments: str) -> str:
        return self.done("docker", "compose", *arguments)

    def make(self, target: str) -> str:
        return self.done("make", target)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What the engine knows about a service's containers, also ended ones."""
        ids = self.compose("ps", "--all", "--quiet", service).split()
        return json.loads(self.done("docker", "inspect", *ids)) if ids else []

    def volumes(self) -> set[str]:
        names = self.done("docker", "volume", "ls", "--quiet", "--filter", f"name={self.name}_").split()
        return {name.removeprefix(f"{self.name}_") for name in names}

    def journal(self) -> list[str]:
        """The lines of all clients' journals."""
        show = ["run", "--rm", "--no-deps", "-T", "client", "sh", "-c", "cat /journal/logs-*.txt"]
        return self.compose(*show).splitlines()

    def records(self) -> list[dict[str, Any]]:
        """What the shared file holds."""
        show = ["run", "--rm", "--no-deps", "-T", "background", "cat", "/shared/data.txt"]
        return [json.loads(line) for line in self.compose(*show).splitlines()]

    def kill(self, service: str, index: int) -> None:
        """kill -9 from within: what `docker kill` ends counts as ended by hand and stays down."""
        script = f"{service}.py"
        self.run("docker", "compose", "exec", "-T", "--index", str(index), service, "python", "-c", KILL, script)

    def healthy(self, service: str, count: int) -> bool:
        states = [container["State"].get("Health", {}).get("Status") for container in self.containers(service)]
        return states == ["healthy"] * count


def as_line(record: dict[str, Any]) -> str:
    log = record["log"]
    return f"{log['ip']} {log['method']} {log['uri']} {log['status_code']}"


def assert_all_arrives_once(system: System) -> list[dict[str, Any]]:
    """With the clients stopped: the shared file gets all their lines, each once, in order. The records."""
    journal = system.journal()
    assert journal
    wait_until(lambda: len(system.records()) >= len(journal), SETTLE_SECONDS, "all records", poll=1)
    records = system.records()
    assert Counter(map(as_line, records)) == Counter(journal)
    assert len({record["id"] for record in records}) == len(records)
    assert all(earlier["created"] < later["created"] for earlier, later in itertools.pairwise(records))
    return records


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[System]:
    """Brought up by `make compose-up`; removed with all that it stored, whatever happens."""
    system = System(tmp_path_factory.mktemp("compose") / "checkout")
    came_up = False
    try:
        print(system.make("compose-up"))
        came_up = True
        yield system
    finally:
        if request.session.testsfailed or not came_up:
            print(system.run("docker", "compose", "ps", "--all").stdout)
            print(system.run("docker", "compose", "logs", "--no-color", "--tail", "60").stdout)
        system.run("docker", "compose", "down", "--volumes", "--remove-orphans", "--timeout", "5")


def test_the_password_is_random_and_not_in_the_compose_file(system: System) -> None:
    secret = system.folder / ".env"
    name, _, password = secret.read_text().strip().partition("=")
    assert name == "DB_PASS"
    assert len(password) >= 32
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert password in system.compose("config")
    secret.rename(secret.with_name(".env-kept"))
    try:
        without = system.run("docker", "compose", "config")
    finally:
        secret.with_name(".env-kept").rename(secret)
    assert without.returncode != 0, "the file has a password of its own"
    assert "make compose-up" in without.stderr


def test_up_returns_with_everything_healthy_and_the_migrations_done_once(system: System) -> None:
    for service, count in (("db", 1), ("backend", 1), ("client", 1), ("background", 2)):
        assert system.healthy(service, count), service
    (migrate,) = system.containers("migrate")
    assert migrate["State"]["Status"] == "exited"
    assert migrate["State"]["ExitCode"] == 0
    assert migrate["RestartCount"] == 0


@pytest.mark.parametrize("service", ["backend", "client", "background"])
def test_a_service_has_no_more_rights_than_it_needs(system: System, service: str) -> None:
    assert int(system.compose("exec", "-T", service, "id", "-u")) >= 1000
    for folder in ("/", "/app", "/packages", "/etc"):
        attempt = system.run("docker", "compose", "exec", "-T", service, "touch", f"{folder}/x")
        assert attempt.returncode != 0, f"it can write to {folder}"
    for container in system.containers(service):
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["Init"]
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert host["RestartPolicy"]["Name"] == "unless-stopped"


def test_the_backend_is_reachable_and_the_database_is_not(system: System) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{system.port}/api/health", timeout=10) as answer:
        assert json.load(answer) == {"successful": True}
    (db,) = system.containers("db")
    assert not any(db["NetworkSettings"]["Ports"].values())
    assert not db["HostConfig"]["PortBindings"]
    assert db["HostConfig"]["ReadonlyRootfs"]


def test_env_files_say_the_same_to_compose_as_to_a_shell(system: System) -> None:
    config = json.loads(system.compose("-f", "docker-compose.yml", "config", "--format", "json"))
    in_containers = {
        "backend": {"HOST", "BACKEND_PORT", "DB_HOST", "DB_PORT", "DB_USER", "DB_NAME", "DB_PASS", "DRAIN_SECONDS"},
        "client": {"URL", "LOG_FILE"},
        "background": {"URL", "DIRECTORY"},
    }
    for service, otherwise in in_containers.items():
        shell = system.done("sh", "-c", f"env -i sh -c 'set -a; . ./env/{service}.env; exec env'")
        by_shell = dict(line.split("=", 1) for line in shell.splitlines() if not line.startswith(("PWD=", "_=")))
        by_compose = config["services"][service]["environment"]
        assert by_compose.keys() == by_shell.keys()
        for name in by_shell.keys() - otherwise:
            assert by_compose[name] == by_shell[name], name


def test_more_clients_and_background_instances_can_be_added(system: System) -> None:
    scale = ["--scale", "background=4", "--scale", "client=3"]
    system.compose("up", "--detach", "--wait", "--no-recreate", *scale)
    assert system.healthy("background", 4)
    assert system.healthy("client", 3)
    files = system.compose("exec", "-T", "client", "ls", "/journal").split()
    assert {"logs-1.txt", "logs-2.txt", "logs-3.txt"} <= set(files), "each client has a journal of its own"
    assert "logs-4.txt" not in files


@pytest.mark.parametrize("service", ["background", "client"])
def test_a_killed_container_comes_back_by_itself(system: System, service: str) -> None:
    count = len(system.containers(service))

    def restarts() -> int:
        return sum(container["RestartCount"] for container in system.containers(service))

    before = restarts()
    system.kill(service, 1)
    wait_until(lambda: restarts() == before + 1, SETTLE_SECONDS, f"a restart of {service}", poll=0.5)
    wait_until(lambda: system.healthy(service, count), SETTLE_SECONDS, f"a healthy {service}", poll=0.5)


def test_what_the_clients_journalled_is_in_the_shared_file_once_and_in_order(system: System) -> None:
    wait_until(lambda: len(system.records()) > 500, SETTLE_SECONDS, "500 records", poll=1)
    system.compose("stop", "client")
    assert [container["State"]["ExitCode"] for container in system.containers("client")] == [0, 0, 0]
    assert_all_arrives_once(system)


def test_down_keeps_the_data_and_up_goes_on(system: System) -> None:
    before = system.records()
    system.make("compose-down")
    assert system.volumes() == {"database", "journal", "shared"}
    assert system.containers("db") == []
    system.make("compose-up")
    wait_until(lambda: len(system.records()) > len(before) + 50, SETTLE_SECONDS, "new records", poll=1)
    system.compose("stop", "client")
    records = assert_all_arrives_once(system)
    assert records[: len(before)] == before


def test_services_end_well_when_asked_to(system: System) -> None:
    system.compose("stop", "background", "backend")
    for service in ("background", "backend"):
        assert {container["State"]["ExitCode"] for container in system.containers(service)} == {0}, service


def test_a_backend_may_drain_before_the_engine_kills_it(system: System) -> None:
    config = json.loads(system.compose("--profile", "scale", "config", "--format", "json"))["services"]
    for name in BACKENDS:
        assert int(config[name]["environment"]["DRAIN_SECONDS"]) == 5
        assert config[name]["stop_grace_period"] == "15s"  # more than 5 s and 5 s for what is in hand


def test_scaled_backends_are_replaced_one_after_the_other_and_no_request_fails(system: System) -> None:
    system.make("compose-scale")
    for service in (*BACKENDS, "proxy", "client"):
        assert system.healthy(service, 1), service
    with Load(f"http://127.0.0.1:{system.proxy_port}") as load:
        for service in BACKENDS:
            [before] = system.containers(service)
            system.compose(*SCALE, "up", "--detach", "--no-deps", "--force-recreate", "--wait", service)
            [after] = system.containers(service)
            assert before["Id"] != after["Id"]
            assert load.failures == []
    assert load.failures == []
    with urllib.request.urlopen(f"http://127.0.0.1:{system.proxy_port}/api/data", timeout=60) as answer:
        stored = Counter(record["log"]["uri"] for record in json.load(answer))
    assert {uri: stored[uri] for uri in load.sent} == load.sent
    [client] = system.containers("client")
    assert "URL=http://proxy:8000/api/data" in client["Config"]["Env"]


def test_down_ends_the_scaled_backends_and_their_proxy_too(system: System) -> None:
    system.make("compose-down")
    assert system.done("docker", "ps", "--all", "--quiet", "--filter", f"name={system.name}") == ""


def test_clean_removes_all_that_was_stored(system: System) -> None:
    system.make("compose-clean")
    assert system.volumes() == set()
    assert system.done("docker", "ps", "--all", "--quiet", "--filter", f"name={system.name}") == ""
