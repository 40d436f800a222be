"""docs/recipes.md: each of its blocks runs as it stands there, with the real programs."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import psycopg
import pytest
import requests
from browser import new_browser, new_tab
from fakes import Reply, Request, fake_backend, proxy_to
from harness import ROOT, Backend, Postgres, Service, kept_port, line_of, past_the_guard, read_records
from nginx import running_nginx
from playwright.sync_api import expect
from recipes import BLOCKS, SECONDS, TOKEN, Recipes, program, shell_reads
from test_alerts import value
from waiting import wait_until

KEY = {"Authorization": f"Bearer {TOKEN}"}
UNITS = sorted((ROOT / "ops/systemd").glob("*.service"))
MOST_EXPOSED = 1.5  # of 10, as the page says
SYSLOG = ROOT / ".syslog"  # Debian's daemons, unpacked by `make test-slow`
SYSLOG_LIBRARIES = ":".join(f"{SYSLOG}{folder}" for folder in ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu"))

StartBackend = Callable[..., Backend]


def store(backend: Backend, *lines: str) -> None:
    body = "\n".join(lines).encode()
    answer = requests.post(backend.data_url, body, headers=KEY | {"Content-Type": "text/plain"}, timeout=SECONDS)
    assert answer.json()["accepted"] == len(lines)


def records(backend: Backend) -> list[dict[str, Any]]:
    return list(requests.get(backend.data_url, headers=KEY, timeout=SECONDS).json())


def stored_lines(backend: Backend) -> Counter[str]:
    return Counter(map(line_of, records(backend)))


def test_each_block_is_run_by_a_test_and_each_place_stands_on_the_page() -> None:
    assert len(BLOCKS) >= 18
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in BLOCKS if f'"{name}"' not in tests] == []
    page = "".join(BLOCKS.values())
    assert [place for place in Recipes(ROOT).places if place not in page] == []
    fences = re.findall(r"^```(.+)$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    assert len(fences) == len(BLOCKS)


# ---- systemd --------------------------------------------------------------------------------------------------------


def test_systemd_takes_the_units_as_they_stand_and_calls_them_hardened(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    assert len(UNITS) == 3
    for unit in UNITS:
        copy = tmp_path / unit.name
        copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
    done = subprocess.run(
        [analyze, "verify", *tmp_path.glob("*.service")], capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stderr) == (0, "")
    for unit in UNITS:
        done = subprocess.run(
            [analyze, "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED * 10:.0f}", unit],
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-200:] + done.stderr
        assert "exposure level" in done.stdout


def systemd_reads(folder: Path, file: Path) -> dict[str, str]:
    """The variables of an env file by systemd's own parser: that of EnvironmentFile= reads environment.d too. What is
    empty is not printed there; the generator quotes its output for a shell."""
    configuration = folder / "environment.d"
    configuration.mkdir()
    (configuration / "10.conf").write_text(file.read_text())
    generator = "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator"
    with (folder / "printed").open("w") as printed:
        subprocess.run([generator], env={"XDG_CONFIG_HOME": str(folder)}, stdout=printed, check=True)
    found = shell_reads(folder / "printed")
    return {name: found.get(name, "") for name in re.findall(r"^([A-Z_]+)=", file.read_text(), re.MULTILINE)}


QUOTED = """
API_TOKEN="abc.def=="
SOURCE='/var/log/nginx/*.log /srv/app/access.log'
SOURCE_PATTERN='(?P<ip>[^ ]+) did "(?P<request>[^"]*)" (?P<status>[0-9]+)'
# A comment
LOG_FILE=logs-%n.txt
"""


@pytest.mark.parametrize("name", ["backend", "client", "background", "quoted"])
def test_systemd_reads_an_env_file_as_a_shell_does(name: str, tmp_path: Path) -> None:
    file = ROOT / f"env/{name}.env"
    if name == "quoted":
        file = tmp_path / "quoted.env"
        file.write_text(QUOTED)
    by_systemd = systemd_reads(tmp_path, file)
    assert len([value for value in by_systemd.values() if value]) >= 4
    assert by_systemd == shell_reads(file)


# ---- Reading --------------------------------------------------------------------------------------------------------


def test_curl_pages_through_all_and_stops_at_a_broken_reply(start_backend: StartBackend, tmp_path: Path) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    lines = [f"192.0.2.{n} GET /{n} {500 if n % 3 == 0 else 200}" for n in range(20)]
    store(backend, *lines)
    with proxy_to(backend) as proxy:
        page = Recipes(tmp_path, {"http://localhost:8000": proxy.url, "limit=10000": "limit=3"})
        done = page.run("page")
        assert done.returncode == 0, done.stderr
        shown = [line.split("\t") for line in done.stdout.splitlines()]
        assert [f"{ip} {method} {uri} 500" for _, ip, method, uri in shown] == [x for x in lines if x.endswith("500")]
        proxy.cut_next(10_000, 450)
        assert page.run("page").returncode != 0


def test_a_python_script_follows_for_ever_and_goes_on_where_it_stopped(
    start_backend: StartBackend, tmp_path: Path
) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    page = Recipes(tmp_path)
    script, output = page.write("follow.py"), tmp_path / f"{Path(sys.executable).name}.out"

    def seen() -> list[str]:
        return [line_of(json.loads(line)) for line in output.read_text().splitlines()]

    lines: list[str] = []
    for turn in range(3):
        new = [f"192.0.2.1 GET /{turn}/{n} 200" for n in range(3)]
        store(backend, *new)
        lines += new
        newest = records(backend)[-1]["created"]
        with page.running(sys.executable, script, API=backend.url, API_TOKEN=TOKEN):
            wait_until(partial(is_past, tmp_path / "follow.next", newest), SECONDS, "`next`")
        assert seen() == lines


def is_past(state: Path, created: str) -> bool:
    """Whether the address that is kept begins behind that record."""
    return state.exists() and state.read_text().partition("date_from=")[2] > created


@pytest.fixture
def exported(start: Callable[..., Service], start_backend: StartBackend, tmp_path: Path) -> list[dict[str, Any]]:
    """What a shared file holds: ordinary lines, and odd ones."""
    backend = start_backend(API_TOKEN=TOKEN)
    odd = ('203.0.113.7 GET /a"b",c 404', "2001:db8::1 - =1+2 400", '192.0.2.9 GET /a\\b\\" 200', "::1 PURGE * 503")
    store(backend, *(f"192.0.2.{n} GET /{n}?q=%20 200" for n in range(50)), *odd)
    folder = tmp_path / "shared"
    start("background.py", URL=backend.data_url, DIRECTORY=folder, API_TOKEN=TOKEN)
    file = folder / "data.txt"
    wait_until(lambda: file.exists() and len(file.read_bytes().splitlines()) == 54, SECONDS, "the shared file")
    return read_records(file)


def test_the_shared_file_becomes_what_goaccess_reads_and_csv(exported: list[dict[str, Any]], tmp_path: Path) -> None:
    program("goaccess")
    page = Recipes(tmp_path)
    done = page.run("goaccess")
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r'"(valid_requests|failed_requests)": ?(\d+)', (tmp_path / "report.html").read_text()))
    assert counts == {"valid_requests": "54", "failed_requests": "0"}
    [first, *_] = (tmp_path / "access.log").read_text().splitlines()
    time = datetime.fromisoformat(exported[0]["created"]).strftime("%d/%b/%Y:%H:%M:%S +0000")
    assert first == f'192.0.2.0 - - [{time}] "GET /0?q=%20 HTTP/1.1" 200 0 "-" "-"'
    done = page.run("csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "records.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [[record["created"], *map(str, record["log"].values())] for record in exported]


# ---- psql -----------------------------------------------------------------------------------------------------------

ROWS = 20_000
FILL = """
INSERT INTO logs (id, created, ip, method, uri, status_code)
SELECT gen_random_uuid(), now() - (%(rows)s - n) * interval '1 minute',
       CASE WHEN n %% 500 = 7 THEN inet '192.0.2.1' ELSE inet '10.0.0.0' + n %% 900 END,
       'GET', '/' || n %% 40, CASE WHEN n %% 10 = 0 THEN 503 ELSE 200 END
  FROM generate_series(1, %(rows)s) AS n
"""


@pytest.fixture(scope="module")
def table(postgres: Postgres) -> str:
    """A table of two weeks, a line a minute, and all counted; its URL."""
    url = postgres.create_logs()
    with past_the_guard(url) as connection:
        connection.execute(FILL, {"rows": ROWS})
        connection.execute("SELECT count_minutes_v1(1000000)")
        connection.execute("ANALYZE logs, minutes")
    return url


@pytest.mark.parametrize(
    ("name", "rows", "most_buffers"),
    [("newest", 20, 20), ("address", 20, 60), ("failing", 10, 60), ("days", 15, None), ("state", 1, 40)],
)
def test_a_query_for_psql_reads_what_it_says(
    name: str, rows: int, most_buffers: int | None, table: str, postgres: Postgres
) -> None:
    psql = [
        str(postgres.programs / "psql"),
        table,
        "--no-psqlrc",
        "--tuples-only",
        "--no-align",
        "--set=ON_ERROR_STOP=1",
    ]
    query = BLOCKS[name]
    done = subprocess.run([*psql, "--command", query], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = [line.split("|") for line in done.stdout.splitlines()]
    assert len(found) <= rows
    assert found
    with psycopg.connect(table) as connection:
        explained = connection.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode()).fetchall()
        plan = explained[0][0][0]["Plan"]
        pages = connection.execute("SELECT relpages FROM pg_class WHERE relname = 'logs'").fetchall()[0][0]
    if most_buffers is not None:
        assert most_buffers < pages / 3
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= most_buffers
    else:
        assert set(re.findall(r'"Relation Name": "(\w+)"', json.dumps(plan))) == {"minutes"}
        assert sum(int(lines) for _, lines, _ in found) == ROWS
        assert sum(int(errors) for _, _, errors in found) == ROWS / 10


# ---- nginx ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_nginx_logs_is_stored_once_through_logrotate(start_backend: StartBackend, tmp_path: Path) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    folder = tmp_path / "web"
    places = {"http://localhost:8000": backend.url, "/var/log/nginx": str(folder), "/run/nginx.pid": f"{folder}/pid"}
    page = Recipes(tmp_path, places)
    rules = page.write("/etc/logrotate.d/nginx")
    wanted = Counter(["127.0.0.1 GET /first 204"])
    with running_nginx(folder, "location / { return 204; }") as port, page.running(*page.command("follow-nginx")):
        requests.get(f"http://127.0.0.1:{port}/first", timeout=SECONDS)
        wait_until(lambda: stored_lines(backend), SECONDS, "the client, which does not look for files from before it")
        for turn in range(4):
            for n in range(50):
                requests.get(f"http://127.0.0.1:{port}/{turn}/{n}", timeout=SECONDS)
                wanted[f"127.0.0.1 GET /{turn}/{n} 204"] += 1
            rotate = [program("logrotate"), "--force", "--state", str(tmp_path / "state"), str(rules)]
            done = subprocess.run(rotate, capture_output=True, text=True, timeout=SECONDS)
            assert (done.returncode, done.stderr) == (0, "")
        assert len(list(folder.glob("access.log.*"))) == 4
        requests.get(f"http://127.0.0.1:{port}/last", timeout=SECONDS)
        wanted["127.0.0.1 GET /last 204"] += 1
        wait_until(lambda: stored_lines(backend).total() >= wanted.total(), SECONDS, "all lines")
    assert stored_lines(backend) == wanted


@contextmanager
def tls_proxy(page: Recipes, backend: Backend, port: int) -> Iterator[tuple[str, Path]]:
    """nginx with the page's server block; the pipeline's address behind it, and the certificate."""
    certificate = page.folder / "site.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", page.folder / "site.key", "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    page.places |= {
        "http://127.0.0.1:8000": backend.url,
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/ssl/logs.example.com": str(page.folder / "site"),
    }
    with running_nginx(page.folder / "nginx", "", page.block("/etc/nginx/conf.d/logpipeline.conf")):
        yield f"https://127.0.0.1:{port}/logs", certificate


@pytest.mark.slow
def test_behind_tls_and_a_prefix_all_works_that_works_without(
    start: Callable[..., Service], start_backend: StartBackend, tmp_path: Path
) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    source = tmp_path / "access.log"
    lines = [f"192.0.2.1 GET /{n}/{'x' * 100} 200" for n in range(9_000)]
    source.write_text("".join(f"{line}\n" for line in lines))
    with kept_port() as place, tls_proxy(Recipes(tmp_path), backend, place.getsockname()[1]) as (url, certificate):
        ours = {"URL": f"{url}/api/data", "API_TOKEN": TOKEN, "SSL_CERT_FILE": str(certificate)}
        start("client.py", SOURCE=source, LOG_FILE=tmp_path / "journal.txt", BATCH_SIZE=9_000, **ours)
        start("background.py", DIRECTORY=tmp_path / "shared", **ours)
        shared = tmp_path / "shared/data.txt"
        wait_until(lambda: shared.exists() and shared.read_bytes().count(b"\n") >= 9_000, SECONDS, "the shared file")
        assert list(map(line_of, read_records(shared))) == lines

        session = requests.Session()
        session.trust_env = False  # else a variable there may name other authorities
        session.verify = str(certificate)
        assert session.get(f"{url}/api/data", timeout=SECONDS).status_code == 401
        assert session.get(url, timeout=SECONDS).url == f"{url}/"
        session.headers.update(KEY)
        address, followed = f"{url}/api/data?limit=5000", []
        while True:
            answer = session.get(address, timeout=SECONDS)
            assert answer.status_code == 200, answer.text
            if not answer.json():
                break
            followed += answer.json()
            address = urljoin(answer.url, answer.links["next"]["url"])
        assert followed == read_records(shared)
        assert_pages_work(url)


def assert_pages_work(url: str) -> None:
    """In a browser: the overview asks for the token and shows the lines; what a page sends is not foreign; /docs."""
    post = "token => fetch('api/data', {method: 'POST', body: '192.0.2.2 GET /page 200', headers: {'Content-Type': "
    post += "'text/plain', Authorization: `Bearer ${token}`}}).then(answer => answer.status)"
    with new_browser() as browser, new_tab(browser, ignore_https_errors=True) as tab:
        tab.page.set_default_timeout(SECONDS * 1000)
        tab.page.goto(f"{url}/")
        tab.page.get_by_label("API token").fill(TOKEN)
        tab.page.get_by_label("API token").press("Enter")
        expect(tab.page.locator("#total")).to_have_text(re.compile("9.?000"), timeout=SECONDS * 1000)
        assert tab.page.evaluate(post, TOKEN) == 201
        expect(tab.page.locator("#lines")).to_contain_text("/page", timeout=SECONDS * 1000)
        tab.page.goto(f"{url}/docs")
        expect(tab.page.locator(".opblock[id$='-readRecords']")).to_be_visible(timeout=SECONDS * 1000)
        assert {text for text in tab.complaints if "Failed to load resource" not in text} == set()
        assert [asked for asked in tab.requests if not asked.startswith(f"{url}/")] == []


# ---- syslog ---------------------------------------------------------------------------------------------------------


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def rsyslog(page: Recipes) -> Iterator[None]:
    page.write("/usr/local/bin/logpipeline-post")
    rules = page.write("/etc/rsyslog.d/logpipeline.conf")
    main = page.folder / "rsyslog.conf"
    main.write_text(f'global(workDirectory="{page.folder}")\ninclude(file="{rules}")\n')
    modules = f"{SYSLOG}/usr/lib/x86_64-linux-gnu/rsyslog"
    command = (f"{SYSLOG}/usr/sbin/rsyslogd", "-n", "-f", main, "-i", page.folder / "rsyslog.pid", "-M", modules)
    with page.running(*command, LD_LIBRARY_PATH=SYSLOG_LIBRARIES):
        yield


@contextmanager
def syslog_ng(page: Recipes) -> Iterator[None]:
    rules = page.write("/etc/syslog-ng/conf.d/logpipeline.conf")
    main = page.folder / "syslog-ng.conf"
    main.write_text(f'@version: 3.38\n@include "{rules}"\n')
    [modules] = (SYSLOG / "usr/lib/syslog-ng").glob("[0-9]*")
    command = (
        f"{SYSLOG}/usr/sbin/syslog-ng", "--foreground", "--no-caps", "--stderr", f"--module-path={modules}",
        f"--cfgfile={main}", f"--persist-file={page.folder}/persist", f"--control={page.folder}/control",
        f"--pidfile={page.folder}/syslog-ng.pid",
    )  # fmt: skip
    with page.running(*command, LD_LIBRARY_PATH=f"{SYSLOG_LIBRARIES}:{modules.parent}"):
        yield


SyslogDaemon = Callable[[Recipes], Any]
DAEMONS = pytest.mark.parametrize("daemon", [rsyslog, syslog_ng])
QUICK = {'resumeInterval="5"': 'resumeInterval="1"', "time-reopen(5)": "time-reopen(1)"}


@pytest.mark.slow
@DAEMONS
def test_what_nginx_sends_to_a_syslog_daemon_is_stored_once(
    daemon: SyslogDaemon, start_backend: StartBackend, tmp_path: Path
) -> None:
    backend, udp = start_backend(API_TOKEN=TOKEN), free_udp_port()
    wanted: Counter[str] = Counter()
    with ExitStack() as stack:
        proxy = stack.enter_context(proxy_to(backend))
        page = Recipes(tmp_path, {"http://localhost:8000": proxy.url, "5514": str(udp), **QUICK})
        stack.enter_context(daemon(page))
        wait_until(lambda: is_bound(udp), SECONDS, "the daemon")
        syslog = page.block("/etc/nginx/conf.d/syslog.conf")
        port = stack.enter_context(running_nginx(tmp_path / "nginx", "location / { return 204; }", syslog))

        def visit(name: str) -> None:
            requests.get(f"http://127.0.0.1:{port}/{name}?q=\"'\\", timeout=SECONDS)
            wanted[f"127.0.0.1 GET /{name}?q=%22'%5C 204"] += 1

        proxy.cut_next(0, 0)  # stored, but nobody hears of it
        for n in range(10):
            visit(f"first-{n}")
        wait_until(lambda: stored_lines(backend).total() >= 10 and proxy.cuts == 2, SECONDS, "the first lines")
        backend.end()
        for n in range(5):
            visit(f"away-{n}")
        port_of_backend = urlsplit(backend.url).port
        again = start_backend(DATABASE_URL=backend.database_url, BACKEND_PORT=port_of_backend, API_TOKEN=TOKEN)
        visit("again")
        wait_until(lambda: stored_lines(again).total() >= 16, SECONDS, "all lines")
    assert stored_lines(again) == wanted


def is_bound(port: int) -> bool:
    return f":{port:04X} " in Path("/proc/net/udp").read_text()


@pytest.mark.slow
@DAEMONS
def test_a_syslog_daemon_retries_refusals_and_drops_what_is_no_line(daemon: SyslogDaemon, tmp_path: Path) -> None:
    udp = free_udp_port()
    lines = [f"192.0.2.1 GET /{n} 200" for n in range(5)]
    refusals: list[int] = []
    dropped: list[str] = []
    taken: dict[str, str] = {}

    def answer(request: Request) -> Reply:
        if refusals:
            return Reply(refusals.pop())
        items = json.loads(request.body)
        items = items if isinstance(items, list) else [items]
        good = [item for item in items if item["log"].strip() in lines]
        taken.update((item["id"].lower(), item["log"].strip()) for item in good)
        dropped.extend(item["log"].strip() for item in items if item not in good)
        return Reply(201 if good else 400, b"{}")

    def send(*some: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for line in some:
                sender.sendto(f"<190>Nov 25 03:50:09 web nginx: {line}".encode(), ("127.0.0.1", udp))

    with fake_backend() as fake, ExitStack() as stack:
        fake.answer = answer
        page = Recipes(tmp_path, {"http://localhost:8000": fake.url, "5514": str(udp), **QUICK})
        stack.enter_context(daemon(page))
        wait_until(lambda: is_bound(udp), SECONDS, "the daemon")
        send("no line")
        wait_until(lambda: dropped, SECONDS, "the answer 400")
        refusals += [503] * 5 + [401, 403, 404, 408, 429, 500, 502, 504]
        send(*lines)
        wait_until(lambda: len(taken) >= 5, 2 * SECONDS, "all lines")
        assert dropped == ["no line"]
        if daemon is rsyslog:
            refused = tmp_path / "refused.log"
            wait_until(lambda: refused.exists() and "no line" in refused.read_text(), SECONDS, "the refused line")
        assert refusals == []
        assert list(taken.values()) == lines
        assert all(str(uuid.UUID(name)) == name for name in taken)
        assert {request.headers["Authorization"] for request in fake.requests} == {f"Bearer {TOKEN}"}


# ---- Prometheus -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prometheus_sees_backend_client_and_exporter(start_backend: StartBackend, tmp_path: Path) -> None:
    backend = start_backend(API_TOKEN=TOKEN)
    with ExitStack() as stack:
        server, node = (stack.enter_context(kept_port()).getsockname()[1] for _ in range(2))
        page = Recipes(tmp_path, {"http://localhost:8000": backend.url, "localhost:9100": f"localhost:{node}"})
        page.places |= {"localhost:8000": backend.url[7:], "15s": "1s", "/opt/logpipeline": f"{tmp_path}/checkout"}
        (tmp_path / "checkout/ops").mkdir(parents=True)
        for file in ("prometheus.yml", "alerts.yml"):
            (tmp_path / "checkout/ops" / file).write_text(page.here((ROOT / "ops" / file).read_text()))
        for service in ("client", "background"):
            text = page.here((ROOT / f"env/{service}.env").read_text()).replace("API_TOKEN=", f"API_TOKEN={TOKEN}")
            (tmp_path / f"{service}.env").write_text(text)
        done = page.run("prometheus")
        assert done.returncode == 0, done.stdout + done.stderr
        assert page.run("metrics-files").returncode == 0
        for service, files in (("client", ["client.env"]), ("background", ["background.env", "background-1.env"])):
            read = "".join(f". {tmp_path}/{file}; " for file in files)
            command = f"set -a; {read} exec {sys.executable} {ROOT}/{service}.py"
            stack.enter_context(page.running("sh", "-c", command))
        folder = f"--collector.textfile.directory={tmp_path}/metrics"
        only = ("--collector.disable-defaults", "--collector.textfile", folder)
        stack.enter_context(page.running(program("prometheus-node-exporter"), *only, f"--web.listen-address=:{node}"))
        where = (f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{server}")
        stack.enter_context(page.running(program("prometheus"), f"--config.file={tmp_path}/prometheus.yml", *where))
        for what in ('up{job="logpipeline-backend"}', "logpipeline_client_up", "logpipeline_exporter_up"):
            wait_until(partial(is_up, f"http://127.0.0.1:{server}", what), SECONDS, what)


def is_up(prometheus: str, what: str) -> bool:
    return value(prometheus, what) == "1"
