"""One exchange with a host: how long to try, what a reply says, and how to end one that somebody reads."""

import random
import time
from contextlib import suppress
from typing import Any

import httpx
import orjson

from alpaca_core.errors import AlpacaError, HostUnavailable
from alpaca_core.host.protocol import read_error

_LIVES = 8
"""Times that signs of life let patience begin anew: a host that lives and dies by turns is not tried for ever."""


class Wait:
    """Sleeps longer each time; raises what it was told last when patience has ended."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._ends = time.monotonic() + patience
        self._pause = 0.05
        self._lives, self._alive = _LIVES, False

    def life(self) -> None:
        """Note a sign of life: what was waited for so far has not been in vain."""
        self._alive = True

    def __call__(self, problem: Exception) -> None:
        if self._alive and self._lives:
            self._ends = time.monotonic() + self._patience
            self._lives -= 1
        self._alive = False
        if time.monotonic() > self._ends:
            if isinstance(problem, AlpacaError):
                raise problem
            raise HostUnavailable(
                f"the host cannot be reached ({problem}). Read its log, and run it again."
            ) from problem
        time.sleep(self._pause * random.uniform(0.5, 1.5))
        self._pause = min(2.0, 1.5 * self._pause)


def ask(http: httpx.Client, method: str, path: str, wait: Wait, **settings: Any) -> dict[str, Any]:
    """Ask for what may take long; empty lines before the answer are signs of life."""
    with http.stream(method, path, **settings) as response:
        content = bytearray()
        for chunk in response.iter_bytes():
            wait.life()
            content += chunk
    return checked(response.status_code, content)


def checked(status: int, content: bytes | bytearray) -> dict[str, Any]:
    """Return a reply's JSON; raise the error that it holds: an answer that took long was begun as if it were none."""
    try:
        told = orjson.loads(content)
    except ValueError:
        told = None
    if isinstance(told, dict) and "error" in told:
        raise read_error(told["error"])
    if status == 200 and isinstance(told, dict):
        return told
    raise HostUnavailable(f"a host answers in JSON, but this gave status {status}. Check ALPACA_HOST.")


def hang_up(response: httpx.Response) -> None:
    """Shut a response's connection down, so that a thread that reads it wakes up."""
    stream = response.extensions.get("network_stream")
    sock = stream.get_extra_info("socket") if stream is not None else None
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(2)
