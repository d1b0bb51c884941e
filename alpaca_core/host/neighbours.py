"""Other hosts of this machine and user: looked at, and ended where a model finds no room beside them."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx

from alpaca_core.errors import HostError
from alpaca_core.host.place import device_of, meet, runtime_folder
from alpaca_core.host.protocol import UNIX_NAME, Status
from alpaca_core.spec import ModelSpec

ANY_NUMBER = httpx.Limits(max_connections=None, max_keepalive_connections=20)
"""Of connections: a thread that has rows never waits for another thread's."""

_PATIENCE = 30.0
"""Seconds for a host to go."""


def connection(path: Path, timeout: float) -> httpx.Client:
    """Open a client of a host's Unix socket; `timeout` is in seconds, for each wait."""
    # there is no TLS here, and reading certificates takes time
    transport = httpx.HTTPTransport(uds=str(path), verify=False, limits=ANY_NUMBER)
    return httpx.Client(transport=transport, base_url=f"http://{UNIX_NAME}", timeout=timeout, trust_env=False)


def hosts() -> Iterator[tuple[Path, Status]]:
    """The sockets of all hosts that answer, with their status."""
    with suppress(HostError):
        for path in sorted(runtime_folder().glob("*.sock")):
            if (status := status_of(path)) is not None:
                yield path, status


def status_of(path: Path) -> Status | None:
    """Return the status of the host at a socket; None where none answers."""
    try:
        with connection(path, 10.0) as client:
            return Status.model_validate(client.get("/v1/status").raise_for_status().json())
    except (httpx.HTTPError, OSError, ValueError):
        return None


def stop(path: Path, idle: float | None = None) -> bool:
    """End the host at a socket, and wait until it is gone; False where it stays.

    Args:
        path: The socket.
        idle: Only where it has had nothing to do for more than so many seconds; None is whatever it does.
    """
    with suppress(httpx.HTTPError, OSError, ValueError), connection(path, 10.0) as client:
        if not client.post("/v1/stop", json={"idle": idle}).raise_for_status().json()["stopping"]:
            return False
    ends = time.monotonic() + _PATIENCE
    while time.monotonic() < ends:
        if not path.exists():
            return True
        time.sleep(0.05)
    return False


def end_an_idle_one(spec: ModelSpec, key: str) -> bool:
    """End the host of the same device, or of one of several, that has been idle for longest, if one is.

    A client that comes to it meanwhile keeps it, and the next one is asked.

    Args:
        spec: Of the model that finds no room.
        key: Of its host, which is not ended.

    Returns:
        Whether there is more room now.
    """
    device = device_of(spec)
    idle = [(status.idle, path) for path, status in hosts() if status.key != key and _may_go(status, device)]
    return any(stop(path, seconds) for seconds, path in sorted(idle, reverse=True))


def _may_go(status: Status, device: str) -> bool:
    return meet(status.device, device) and status.state == "ready" and not (status.waiting or status.running)
