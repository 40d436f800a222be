"""Where a lock does not hold the exporter does not begin; where that depends it warns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import FakeBackend, some_lines
from harness import Service, count_lines, driver, read_records
from waiting import wait_until

import background

# The same service, in another mount table
ELSEWHERE = """
import os
import background

background.MOUNTS = os.environ["MOUNTS"]
sys.exit(background.main([]))
"""

TABLE = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
28 27 0:25 / /srv rw shared:1 master:2 - nfs4 server:/srv rw
29 28 0:26 / /srv/local\\040disk rw - xfs /dev/vdb rw
30 27 0:27 / /mnt rw - ext4 /dev/vdc rw
31 30 0:28 / /mnt rw - fuse.bindfs bindfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srv", "nfs4"),
        ("/srv/shared", "nfs4"),
        ("/srvices", "ext4"),
        ("/srv/local disk/shared", "xfs"),
        ("/mnt/shared", "fuse.bindfs"),
    ],
)
def test_the_file_system_is_that_of_the_innermost_and_last_mount(path: str, kind: str) -> None:
    assert background.file_system(path, TABLE) == kind


@pytest.fixture
def export(start: Callable[..., Service], fake: FakeBackend, shared: Path, tmp_path: Path) -> Callable[[str], Service]:
    def export_on(kind: str) -> Service:
        mounts = tmp_path / "mountinfo"
        mounts.write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n28 27 0:9 / {shared.parent} rw - {kind} a rw\n")
        return start(
            driver(tmp_path, "elsewhere.py", ELSEWHERE), URL=fake.data_url, DIRECTORY=shared.parent, MOUNTS=mounts
        )

    return export_on


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p"])
def test_a_network_file_system_is_refused_in_one_line_that_says_why(
    export: Callable[[str], Service], shared: Path, kind: str
) -> None:
    exporter = export(kind)
    assert exporter.process.wait(30) == 1
    [line] = exporter.printed.splitlines()
    assert f"DIRECTORY {shared.parent} cannot be used: it is on {kind}, a network file system" in line
    assert "lock may not hold between machines" in line
    assert list(shared.parent.iterdir()) == []


def test_a_reconcile_on_a_network_file_system_is_refused(
    fake: FakeBackend, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the exporters' own machine the folder is local, and their locks do not hold here."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"28 27 0:9 / {shared.parent} rw - nfs4 a rw\n")
    monkeypatch.setattr(background, "MOUNTS", str(mounts))
    settings = background.Settings(url=fake.data_url, directory=str(shared.parent))
    assert background.reconcile(settings, dry_run=False, agreed=True) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"cannot reconcile: DIRECTORY {shared.parent} cannot be used: it is on nfs4, a network")
    assert (list(shared.parent.iterdir()), fake.requests) == ([], [])


@pytest.mark.parametrize("kind", ["fuse.bindfs", "fuse", "virtiofs"])
def test_a_file_system_in_user_space_is_warned_about_and_used(
    export: Callable[[str], Service], fake: FakeBackend, shared: Path, kind: str
) -> None:
    fake.add(some_lines(10))
    exporter = export(kind)
    exporter.wait_for_line(f"WARNING.* is on {kind}: all instances must use this very path")
    wait_until(lambda: count_lines(shared) >= 10, what="the records")
    assert read_records(shared) == fake.records()
    assert exporter.end() == 0
