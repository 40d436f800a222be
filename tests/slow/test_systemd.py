"""docs/recipes.md on systemd, from a checkout to running services, on a real systemd.

It boots in namespaces of its own, with /etc, /opt, /run, /var/lib and /var/log of its own and none of this machine's
services, and shares the network with the tests. Needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fakes import Proxy
from harness import ROOT, Postgres, is_running, kept_port, line_of, read_records
from recipes import BLOCKS
from waiting import wait_until

SECONDS = 60.0
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # Debian's Python: of one below /root the services would see nothing
NOT_COPIED = shutil.ignore_patterns(".*", "var", "artifacts", "__pycache__", "tests", "bench")
UNITS = [f"logpipeline-{name}" for name in ("backend", "client", "background@1", "background@2")]

# $1: the checkout. Whatever a boot would start is taken away; what is left are targets without content
BOOT = """
mount --make-rprivate /
mount -t proc proc /proc
umount --recursive --lazy /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /mnt
cp -a /etc /mnt/etc
mkdir /mnt/units
for target in sysinit basic multi-user network-online shutdown umount local-fs; do
    printf '[Unit]\\nDefaultDependencies=no\\n' >/mnt/units/$target.target
done
rm -rf /mnt/etc/systemd/system /mnt/etc/init.d/* /mnt/etc/rc?.d/*
mkdir /mnt/etc/systemd/system
mount --bind /mnt/etc /etc
mount --bind /mnt/units /usr/lib/systemd/system
for folder in /usr/lib/systemd/system-generators /opt /run /var/lib /var/log; do
    mount -t tmpfs -o mode=755 tmpfs $folder
done
cp -a "$1" /opt/logpipeline
exec env -i container=lxc PATH=$PATH /usr/lib/systemd/systemd --system --unit=multi-user.target --log-target=console
"""


class Machine:
    """A booted systemd; commands run beside it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    def run(self, script: str) -> str:
        """What it prints, without the last line feed. Fails the test unless it succeeds."""
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc", "sh", "-e", "-c", script],
            env={**os.environ, "PATH": SYSTEM_PATH}, capture_output=True, text=True, timeout=5 * SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    def show(self, unit: str, *properties: str) -> list[str]:
        return [self.run(f"systemctl show --value --property={name} {unit}") for name in properties]

    def status_of(self, unit: str) -> str:
        """What the kernel says of its main process."""
        [pid] = self.show(unit, "MainPID")
        return self.run(f"cat /proc/{pid}/status")


@contextmanager
def control_group() -> Iterator[Path]:
    """One of its own, for all that the systemd makes; gone with it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    [top] = [where for _, where, kind, *_ in mounts if kind == "cgroup2"][:1]
    group = Path(top) / f"systemd-of-a-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        wait_until(lambda: "populated 0" in (group / "cgroup.events").read_text(), SECONDS, "the end of all in it")
        for folder in sorted((folder for folder, *_ in os.walk(group)), reverse=True):
            os.rmdir(folder)


@contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=NOT_COPIED)
    enter = 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"'
    spaces = ("unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc", "--cgroup")
    with control_group() as group, (folder / "boot.out").open("wb") as output:
        command = ["sh", "-c", enter, "sh", str(group), *spaces, "sh", "-e", "-c", BOOT, "sh", str(checkout)]
        boot = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "PATH": SYSTEM_PATH}
        )
        try:
            yield Machine(wait_until(lambda: init_of(boot), SECONDS, "systemd"))
        finally:
            print((folder / "boot.out").read_text(errors="replace")[-5000:])
            boot.send_signal(signal.SIGKILL)
            boot.wait(20)


def init_of(boot: subprocess.Popen[bytes]) -> int:
    """The process id of the systemd, once it answers."""
    assert boot.poll() is None, "no systemd: root?"
    for name in Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split():
        process = Path("/proc", name)
        if (process / "comm").read_text() == "systemd\n" and (process / "root/run/systemd/private").exists():
            return int(name)
    return 0


class ToPostgres(Proxy):
    """PostgreSQL by TCP: the services of the machine do not see the folder of its socket."""

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.upstream)
        return connection


SET = """
cd /etc/logpipeline
sed -i 's|^DATABASE_URL=$|DATABASE_URL={database}|; s|^API_TOKEN=$|API_TOKEN=token|
        s|^BACKEND_PORT=.*|BACKEND_PORT={port}|; s|localhost:8000|127.0.0.1:{port}|
        s|^SOURCE=$|SOURCE=/var/log/nginx/*.log|; s|^WORKERS=.*|WORKERS=2|; s|^REQUEST_DELAY=.*|REQUEST_DELAY=50|' *.env
mkdir -p /var/log/nginx
install -m 0640 -g adm /dev/null /var/log/nginx/access.log
"""


def test_the_units_run_the_services_without_rights_and_lose_nothing(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.create_logs()
    database = re.sub(r".*/(\w+)\?host=(.*)", r"\1", url)
    proxy = ToPostgres(f"{postgres.socket_folder}/.s.PGSQL.5432")
    with kept_port() as place, booted(tmp_path) as machine:
        source = machine.root / "var/log/nginx/access.log"
        shared = machine.root / "var/lib/logpipeline/exporter/var/shared/data.txt"
        machine.run(BLOCKS["install"])
        where = f"postgresql://postgres@{proxy.url.removeprefix('http://')}/{database}"
        machine.run(SET.format(database=where, port=place.getsockname()[1]))
        machine.run(BLOCKS["start"])
        lines: list[str] = []

        def write(count: int) -> None:
            new = [f"192.0.2.1 GET /{n} 200" for n in range(len(lines), len(lines) + count)]
            with source.open("a") as file:
                file.write("".join(f"{line}\n" for line in new))
            lines.extend(new)

        def arrived() -> bool:
            return shared.exists() and shared.read_bytes().count(b"\n") >= len(lines)

        write(100)
        wait_until(arrived, SECONDS, "the first lines")
        for unit in UNITS:
            status = machine.status_of(unit)
            assert not re.search(r"^Uid:\s0\b", status, re.MULTILINE)
            assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
            assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
            assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)

        for unit in UNITS:  # restarted by systemd
            machine.run(f"systemctl kill --signal=KILL --kill-whom=main {unit}")
        write(100)
        wait_until(arrived, SECONDS, "the lines after the kills")
        assert [line_of(record) for record in read_records(shared)] == lines
        assert machine.show(UNITS[0], "NRestarts") == ["1"]

        machine.run(f"systemctl stop {' '.join(UNITS)}")
        assert [machine.show(unit, "Result") for unit in UNITS] == [["success"]] * 4
        machine.run("echo THREADS=0 >>/etc/logpipeline/backend.env; systemctl start logpipeline-backend")
        wait_until(lambda: machine.show(UNITS[0], "ActiveState") == ["failed"], SECONDS, "a refusal of the setting")
        assert machine.show(UNITS[0], "ExecMainStatus", "NRestarts") == ["2", "0"]
        pid = machine.pid
    proxy.close()
    assert not is_running(pid)
