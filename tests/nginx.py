"""A real nginx in front of a test."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import kept_port
from waiting import wait_until

CONFIGURATION = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log combined;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
  scgi_temp_path {folder};
  {http}
  server {{ listen 127.0.0.1:{port}; {server} }}
}}
"""


@contextmanager
def running_nginx(folder: Path, server: str, http: str = "") -> Iterator[int]:
    """Its port. `server` and `http` go into the blocks of these names; its logs are in the folder."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert program, "nginx is missing: apt-get install nginx-light"
    folder.mkdir()
    with kept_port() as place:
        port = place.getsockname()[1]
        text = CONFIGURATION.format(folder=folder, port=port, server=server, http=http)
        (folder / "nginx.conf").write_text(text)
        process = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.PIPE)
        try:
            wait_until(lambda: is_listening(port) or process.poll() is not None, what="nginx")
            yield port
        finally:
            process.send_signal(signal.SIGQUIT)
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0, said


def is_listening(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0
