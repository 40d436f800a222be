"""Waiting in tests: for a condition, to a deadline; never for a time to pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02


def wait_until(
    condition: Callable[[], T], timeout: float = 30.0, what: str = "the condition", poll: float = POLL_SECONDS
) -> T:
    """The first true value of `condition`, asked again and again. Fails the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        is_last = time.monotonic() > deadline  # before the look: this process itself may have been held up in it
        if value := condition():
            return value
        if is_last:
            raise AssertionError(f"waited {timeout:.0f} s in vain for {what}")
        threading.Event().wait(poll)
