"""Which process runs a spec's model, and how its host is started where none runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from alpaca_core.adapters import find_adapters
from alpaca_core.cache import cache_folder
from alpaca_core.errors import HostUnavailable, InvalidRequest
from alpaca_core.host.client import HostModel
from alpaca_core.host.neighbours import ANY_NUMBER, connection
from alpaca_core.host.place import absolute, find_base_apart, is_loopback, key_of, runtime_folder
from alpaca_core.host.supervisor import plain_environment
from alpaca_core.spec import ModelSpec

_START = 120.0
"""Seconds for a host to listen; its predecessor's engine may have to end first."""
_ATTEMPTS = 3
"""Times that a host is started which somebody kills before it listens."""
_STREAM = httpx.Timeout(60.0, connect=10.0)
_ANY = ("0.0.0.0", "::")
"""All addresses of a machine, as a server is told; a client that connects there gets this one."""


def chosen() -> str:
    """Say where models run: ``off`` (in this process), ``auto`` (at this machine's host), or a host's URL.

    It is ``$ALPACA_HOST``; unset, it is ``auto`` in a flow run that a worker or a served deployment started, whose
    process ends with the run, and ``off`` elsewhere.

    Raises:
        InvalidRequest: For anything else.
    """
    choice = os.environ.get("ALPACA_HOST", "").strip()
    if choice in ("off", "auto") or choice.startswith(("http://", "https://")):
        return choice
    if choice:
        raise InvalidRequest(f"ALPACA_HOST is off, auto or a host's URL (http://…), but is {choice!r:.80}. Set it so.")
    return "auto" if os.environ.get("PREFECT__FLOW_RUN_ID") else "off"


@contextmanager
def at_host(spec: ModelSpec, choice: str) -> Iterator[HostModel]:
    """Use the model that a host keeps.

    Args:
        spec: The recipe.
        choice: ``auto``, which starts the host of this machine where none runs, or a URL.

    Raises:
        HostUnavailable: If the host cannot be reached or started.
        LoadError: If it cannot load the model.
    """
    if choice == "auto":
        there = absolute(spec)
        model = HostModel(there, lambda: local(there), called=spec)
    else:
        model = HostModel(spec, lambda: remote(choice))
    try:
        yield model
    finally:
        model.close()


def remote(url: str) -> httpx.Client:
    """Open a client of a host's URL, with ``$ALPACA_HOST_TOKEN`` where that is set.

    What is for this machine goes through no proxy, whatever the environment says: the token is not the proxy's.

    Raises:
        InvalidRequest: If it is no URL.
    """
    token = os.environ.get("ALPACA_HOST_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        name = httpx.URL(url).host
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"ALPACA_HOST is a host's URL (http://…), but {url!r:.200} is none ({error}).") from error
    near = is_loopback(name) or name in _ANY
    return httpx.Client(base_url=url, headers=headers, timeout=_STREAM, limits=ANY_NUMBER, trust_env=not near)


def local(spec: ModelSpec) -> httpx.Client:
    """Open a client of this machine's host of a spec, which is started first where none answers.

    Raises:
        HostUnavailable: If it cannot be started.
        LoadError: If the spec's files cannot be found.
    """
    key = key_of(spec, find_base_apart(spec))
    folder = runtime_folder()
    path = folder / f"{key}.sock"
    if not _answers(path):
        find_adapters(spec)  # what is wrong with them is told here, by its own kind
        try:
            with FileLock(folder / f"{key}.start", timeout=2 * _START):
                for attempt in range(_ATTEMPTS):
                    if _answers(path) or _start(spec, key, folder, last=attempt == _ATTEMPTS - 1):
                        break
        except Timeout:
            raise HostUnavailable(
                f"a host starts within {2 * _START:.0f} s, but another process has held {folder / key}.start for so "
                "long. End that process."
            ) from None
        except OSError as error:
            raise HostUnavailable(
                f"a host's files are in {folder}, but it cannot be written ({error.strerror or error}). "
                "Free space there, or set ALPACA_RUNTIME to another folder, or ALPACA_HOST=off."
            ) from error
    client = connection(path, 60.0)
    client.timeout = _STREAM
    return client


def _answers(path: Path) -> bool:
    try:
        with connection(path, 10.0) as client:
            return client.get("/health").status_code == 200
    except (httpx.HTTPError, OSError):
        return False


def _start(spec: ModelSpec, key: str, folder: Path, *, last: bool) -> bool:
    """Start the host as a process of its own, which outlives this one, and wait until it listens.

    Returns:
        Whether it does; False where it was killed before, unless it was the `last` attempt.
    """
    path = folder / f"{key}.log"
    # its own folder of work is another, and paths may be relative to this one
    places = {"ALPACA_RUNTIME": str(folder.absolute()), "ALPACA_CACHE": str(cache_folder().absolute())}
    with suppress(FileNotFoundError):  # of the one before, which may say why it died
        path.replace(path.with_suffix(".log.1"))
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "alpaca_core.host.server", key],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=plain_environment() | places,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as given:  # it has ended already, and its log says why
        given.write(spec.model_dump_json().encode())
    ends = time.monotonic() + _START
    while time.monotonic() < ends:
        if (code := process.poll()) is not None:
            if code in (-signal.SIGKILL, -signal.SIGTERM) and not last:
                return False
            raise HostUnavailable(f"the host ended with code {code} as it started: {_tail(path)}")
        if _answers(folder / f"{key}.sock"):
            return True
        time.sleep(0.03)
    process.kill()
    process.wait()
    raise HostUnavailable(f"a host listens within {_START:.0f} s, but this one did not: {_tail(path)}")


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return (lines[-1] if lines else "it said nothing")[:500] + f" (its log is {path})"
