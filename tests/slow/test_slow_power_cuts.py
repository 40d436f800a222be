"""200 power cuts of a host that runs client.py beside the server whose log it follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Service
from test_power_cuts import after_power_cuts


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_100_power_cuts_of_the_clients_host_lose_no_line_that_survived_and_repeat_none(
    start: Callable[..., Service], tmp_path: Path, kind: str
) -> None:
    assert after_power_cuts(start, tmp_path, kind, 100, seed=8) > 100 * 200
