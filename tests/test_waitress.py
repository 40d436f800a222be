"""What backend.py leans on in waitress beyond its public interface stands in one list, which is checked at start-up."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import ROOT, Service, driver

import backend

CLASSES = [cls for cls in vars(backend).values() if isinstance(cls, type) and cls.__module__ == "backend"]


def test_every_name_of_the_list_is_there() -> None:
    backend.check_waitress()
    assert backend.WAITRESS_NAMES


def test_every_private_name_that_is_used_stands_in_the_list() -> None:
    listed = {name for names in backend.WAITRESS_NAMES.values() for name in names}
    own = {name for cls in CLASSES for name in vars(cls)}
    tree = ast.parse((ROOT / "backend.py").read_text())
    assigned = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    foreign = {name for name in used - own - assigned if not name.startswith("__") and not hasattr(builtins, name)}
    assert foreign <= listed | {"_exit"}, foreign - listed


def test_every_method_that_is_overridden_stands_in_the_list() -> None:
    listed = {name for names in backend.WAITRESS_NAMES.values() for name in names}
    for cls in CLASSES:
        theirs = [base for base in cls.__mro__[1:] if base.__module__.startswith("waitress")]
        overridden = {name for name in vars(cls) for base in theirs if not name.startswith("__") and name in vars(base)}
        assert overridden <= listed, (cls, overridden - listed)


@pytest.mark.parametrize(
    ("where", "name"), [("waitress.channel.HTTPChannel", "_flush_some"), ("waitress.wasyncore", "readwrite")]
)
def test_a_waitress_that_lacks_one_is_refused_in_one_line(
    start: Callable[..., Service], tmp_path: Path, where: str, name: str
) -> None:
    program = f"import backend, waitress.channel, waitress.wasyncore\ndel {where}.{name}\nsys.exit(backend.main([]))\n"
    service = start(
        driver(tmp_path, "changed.py", program), HOST="127.0.0.1", BACKEND_PORT=0, DATABASE_URL="postgresql:///nowhere"
    )
    assert service.process.wait(30) == 1
    [line] = service.printed.splitlines()
    assert name in line
    assert "locks/" in line
