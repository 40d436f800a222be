"""ops/: promtool takes the rules and passes their unit tests, and a real Prometheus fires one at a real backend."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from harness import ROOT, Backend, kept_port
from waiting import wait_until

import background
import client

SECONDS = 60
OPS = ROOT / "ops"
TOKEN = "prometheus-token"


def program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing: install Debian's prometheus, as make test does"
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint-fatal", "alerts.yml"),
        ("check", "config", "--lint-fatal", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_takes_the_files_as_they_stand(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([program("promtool"), *arguments], cwd=OPS, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_each_rule_has_a_unit_test_in_which_it_fires_and_says_what_to_do() -> None:
    rules = re.split(r"^ +- alert: ", (OPS / "alerts.yml").read_text(), flags=re.MULTILINE)[1:]
    tests = (OPS / "alerts_test.yml").read_text()
    for rule in rules:
        name = rule.split()[0]
        assert f'alertname="{name}", alertstate="firing"' in tests, name
        assert re.search(r"severity: (page|ticket)", rule), name
        assert re.search(r"summary: .+\n +description: .+\n +\S", rule), name


def test_the_backend_has_each_metric_that_a_rule_asks_for(backend: Backend) -> None:
    asked = set(re.findall(r"logpipeline_backend_\w+", (OPS / "alerts.yml").read_text()))
    text = requests.get(f"{backend.url}/metrics", timeout=SECONDS).text
    assert len(asked) >= 5
    assert asked <= set(re.findall(r"^(logpipeline_backend_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("service", [client, background])
def test_client_and_exporter_have_each_metric_that_a_rule_asks_for(service: ModuleType) -> None:
    asked = set(re.findall(rf"\b{service.METRICS_PREFIX}(\w+)", (OPS / "alerts.yml").read_text()))
    assert len(asked) >= 2
    assert asked <= service.METRICS.keys()


@contextmanager
def prometheus(folder: Path, backend: Backend) -> Iterator[str]:
    """Prometheus with the files of ops/, but for the backend's address and token, and in quick motion; its URL."""
    config, rules = (OPS / "prometheus.yml").read_text(), (OPS / "alerts.yml").read_text()
    config = config.replace("15s", "1s").replace("localhost:8000", backend.url.removeprefix("http://"))
    config = re.sub("# (authorization:|  credentials_file:)", r"\1", config)
    config = config.replace("/etc/prometheus/logpipeline-token", str(folder / "token"))
    (folder / "prometheus.yml").write_text(config.partition("  - job_name: node")[0])
    (folder / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 1s", rules))
    (folder / "token").write_text(TOKEN)
    with kept_port() as place:
        address = f"127.0.0.1:{place.getsockname()[1]}"
        command = [
            program("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}",
        ]  # fmt: skip
        with (folder / "prometheus.out").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(SECONDS)


def ask(url: str, path: str, **parameters: str) -> Any:
    """What Prometheus's API says; None until it is ready."""
    try:
        answer = requests.get(f"{url}/api/v1/{path}", params=parameters, timeout=SECONDS)
    except requests.ConnectionError:
        return None
    return answer.json()["data"] if answer.status_code != 503 else None


def value(url: str, query: str) -> str:
    found = (ask(url, "query", query=query) or {"result": []})["result"]
    return found[0]["value"][1] if found else ""


def test_prometheus_scrapes_the_backend_with_the_token_and_wakes_somebody_when_it_is_gone(
    start_backend: Callable[..., Backend], tmp_path: Path
) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    key = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "text/plain"}
    assert requests.post(backend.data_url, data="192.0.2.1 GET /a 200", headers=key, timeout=SECONDS).ok
    with prometheus(tmp_path, backend) as url:
        stored = "logpipeline_backend_lines_stored_total"
        wait_until(lambda: value(url, stored) == "1", SECONDS, "a scrape")
        wait_until(lambda: value(url, 'up{job="logpipeline-backend"}') == "1", SECONDS, "it to be up")
        # a scrape here has a second: where the machine has none to spare, one may have failed before
        wait_until(lambda: ask(url, "alerts") == {"alerts": []}, SECONDS, "all to be well")
        assert backend.end() == 0
        wait_until(lambda: value(url, 'ALERTS{alertstate="firing"}') == "1", SECONDS, "an alert")
        [alert] = ask(url, "alerts")["alerts"]
        assert alert["labels"]["alertname"] == "BackendDown"
        assert alert["annotations"]["summary"] == f"The backend at {backend.url[7:]} does not answer"
