"""`make bench-scale`: it runs, with a few thousand records, and bench/SCALE.md has what it measures."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from harness import ROOT, Postgres, execute

from bench import scale


def works(text: str) -> list[str]:
    """The first column of a table, without the numbers that follow from the number of records."""
    return [re.sub(r"[\d,]+", "N", row.split("|")[1].strip()) for row in text.splitlines() if row.startswith("| ")]


def test_a_missed_aim_is_marked() -> None:
    def verdict(aim: str, small: float, large: float) -> str:
        return scale.Figure("storing", "lines/s", aim, [small], [large]).cells[-1]

    assert verdict("≥ 0.85", 100, 90) == "≥ 0.85"
    assert verdict("≥ 0.85", 100, 80) == "≥ 0.85, **missed**"
    assert verdict("≤ 1.3", 100, 120) == "≤ 1.3"
    assert verdict("≤ 1.3", 100, 140) == "≤ 1.3, **missed**"
    assert verdict("", 100, 500) == ""


@pytest.mark.parametrize("kind", [scale.USUAL, scale.SCATTERED])
def test_a_table_is_filled_with_common_and_rare_values(postgres: Postgres, kind: str) -> None:
    table = scale.Table(kind, 4000, True, postgres.create_logs(), scale.Figures())
    scale.fill(table)
    scale.weigh(table)
    [(records, rare_methods, rare_statuses, rare_addresses, frequent)] = execute(
        table.url,
        "SELECT count(*), count(*) FILTER (WHERE method = 'PURGE'), count(*) FILTER (WHERE status_code = 418),"
        " count(*) FILTER (WHERE ip = '192.0.2.7'), count(*) FILTER (WHERE ip = %s) FROM logs",
        scale.FREQUENT,
    )
    assert (records, rare_methods, rare_statuses, rare_addresses) == (4000, 10, 10, 10)
    assert 1200 < frequent < 1800 if kind == scale.USUAL else frequent <= 1
    sizes = {"size of logs_pkey", "size of logs_created_key", "size of logs_kind_created_idx"}
    assert sizes < set(table.figures)


@pytest.mark.slow  # it starts a database and eight backends
def test_growth_is_measured_as_the_document_says() -> None:
    document = (ROOT / "bench/SCALE.md").read_text()
    command = [sys.executable, "-W", "ignore", "-m", "bench.scale", "--rows", "0.01", "--rounds", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ".:tests"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("| work |") :]
    assert not [row for row in table.splitlines() if re.search(r"\| +\| .*\|.*\|.*\|", row)], "a cell is empty"
    assert works(table) == works(document.partition(scale.MARKS[0])[2].partition(scale.MARKS[1])[0])
    assert (ROOT / "bench/SCALE.md").read_text() == document, "that of ten million records stays"
