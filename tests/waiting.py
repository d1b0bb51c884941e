"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 20.0, pause: float = 0.02) -> Any:
    """Wait until something holds; return what it gave."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"waited for {seconds} s"
        time.sleep(pause)
    return found
