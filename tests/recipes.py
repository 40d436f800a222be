"""The blocks of docs/recipes.md, as they stand there but for the places of one test: ports, folders, the token."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, clean_environment

TOKEN = "recipes-token"
SECONDS = 60
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```[a-z]+ (\S+)\n(.*?)^```$", (ROOT / "docs/recipes.md").read_text(), re.DOTALL | re.MULTILINE)
)


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    assert found, f"{name} is missing: `make test` installs it"
    return found


def own_group() -> str:
    return grp.getgrgid(os.getgid()).gr_name


@dataclass
class Recipes:
    """The page for one test. `places`: what stands there, and what stands for it here; the only changes to a block."""

    folder: Path
    places: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {
            "the-token": TOKEN,
            "/opt/logpipeline": str(ROOT),
            "/var/lib/logpipeline/exporter/var/shared": f"{self.folder}/shared",
            "/var/lib/prometheus/node-exporter": f"{self.folder}/metrics",
            "/var/lib/syslog-ng": f"{self.folder}",
            "/var/log/logpipeline-refused.log": f"{self.folder}/refused.log",
            "/usr/local/bin/logpipeline-post": f"{self.folder}/logpipeline-post",
            "/etc/logpipeline/": f"{self.folder}/",
            "/etc/prometheus": f"{self.folder}",
            "-g prometheus": f"-g {own_group()}",
            "-g logpipeline": f"-g {own_group()}",
            "www-data adm": f"{pwd.getpwuid(os.getuid()).pw_name} {own_group()}",
        }
        self.places = own | self.places

    def here(self, text: str) -> str:
        """The longest places first, as one may be in another."""
        pattern = "|".join(map(re.escape, sorted(self.places, key=len, reverse=True)))
        return re.sub(pattern, lambda found: self.places[found[0]], text)

    def block(self, name: str) -> str:
        return self.here(BLOCKS[name])

    def write(self, name: str) -> Path:
        """As a file of its own in the folder."""
        path = self.folder / Path(name).name
        path.write_text(self.block(name))
        path.chmod(0o755 if path.read_text().startswith("#!") else 0o644)
        return path

    def command(self, name: str) -> Sequence[str]:
        return ("sh", "-e", "-c", self.block("settings") + self.block(name))

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """A block for the shell, in the folder, to its end."""
        return subprocess.run(
            self.command(name),
            cwd=self.folder,
            env=clean_environment({}),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    @contextmanager
    def running(self, *command: str | Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A program in the folder, with what it starts; asked to end at the end. It prints into NAME.out."""
        output = self.folder / f"{Path(command[0]).name}.out"
        with output.open("ab") as file:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=clean_environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield process
        except BaseException:
            print(output.read_text(errors="replace"))
            raise
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(SECONDS)
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)


def shell_reads(path: Path) -> dict[str, str]:
    """The variables of an env file as `set -a; . file` sets them."""
    command = ["env", "-i", "sh", "-c", f"set -a; . {path}; exec env -0"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (pair.partition("=") for pair in printed.split("\0"))
    return {name: value for name, _, value in pairs if name not in ("", "PWD", "OLDPWD", "SHLVL", "_")}
