"""One exchange with a host: how long to try, what a reply says, and how to end one that somebody reads."""

import random
import time
from contextlib import suppress
from typing import Any

import httpx
import orjson

from alpaca_core.errors import AlpacaError, HostUnavailable
from alpaca_core.host.protocol import read_error


class Wait:
    """Sleeps longer each time; raises what it was told last when patience has ended."""

    def __init__(self, patience: float) -> None:
        self._ends = time.monotonic() + patience
        self._pause = 0.05

    def __call__(self, problem: Exception) -> None:
        if time.monotonic() > self._ends:
            if isinstance(problem, AlpacaError):
                raise problem
            raise HostUnavailable(
                f"the host cannot be reached ({problem}). Read its log, and run it again."
            ) from problem
        time.sleep(self._pause * random.uniform(0.5, 1.5))
        self._pause = min(2.0, 1.5 * self._pause)


def checked(response: httpx.Response) -> dict[str, Any]:
    """Return a reply's JSON; raise the error that it holds."""
    try:
        told = orjson.loads(response.content)
    except ValueError:
        told = None
    if response.status_code == 200 and isinstance(told, dict):
        return told
    if isinstance(told, dict) and "error" in told:
        raise read_error(told["error"])
    raise HostUnavailable(f"a host answers in JSON, but this gave status {response.status_code}. Check ALPACA_HOST.")


def hang_up(response: httpx.Response) -> None:
    """Shut a response's connection down, so that a thread that reads it wakes up."""
    stream = response.extensions.get("network_stream")
    sock = stream.get_extra_info("socket") if stream is not None else None
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(2)
