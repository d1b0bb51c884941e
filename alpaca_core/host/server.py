"""Runs the application: on this machine's Unix socket until nobody needs it, or on TCP until it is ended."""

import asyncio
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from alpaca_core.errors import AlpacaError, HostUnavailable
from alpaca_core.host.application import application
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.neighbours import end_an_idle_one
from alpaca_core.host.place import runtime_folder
from alpaca_core.host.settings import Settings
from alpaca_core.spec import ModelSpec

GRACE = 15.0
"""Seconds that rows get to end after SIGTERM."""
_FILES = 65536
"""Connections and other open files, where the system lets a process have so many."""
_PREDECESSOR = 60.0
"""Seconds to wait until the host before this one, and its engine, are gone."""


def run_local(spec: ModelSpec, key: str) -> None:
    """Be this machine's host of a spec, listening on the Unix socket of its key, until it has been idle for long.

    Raises:
        HostUnavailable: If another host of this key lives, or the folder cannot be written.
    """
    _prepare()
    folder = runtime_folder()
    lock = _lock(folder / f"{key}.lock")
    try:
        listening = _listen(folder / f"{key}.sock")
    except OSError as error:
        raise HostUnavailable(f"a host listens in {folder}, but that failed ({error}). Free space there.") from error
    try:
        asyncio.run(_serve(spec, Settings.from_environment(), [listening], inherited=[lock]))
    finally:
        with suppress(OSError):
            (folder / f"{key}.sock").unlink()


def run_tcp(spec: ModelSpec, address: str, port: int, token: str | None) -> None:
    """Serve a model on TCP until the process is ended, with the spec's own adapters and no others.

    Args:
        spec: The model.
        address: Where to listen.
        port: Likewise.
        token: That requests have to bear; checked by the caller, who knows whether it may be None.

    Raises:
        HostUnavailable: If the address cannot be taken.
        AlpacaError: If the model cannot be loaded, or not again: whoever keeps the process alive is to start another.
    """
    try:
        listening = socket.create_server(
            (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise HostUnavailable(
            f"a host listens on an address of this machine, but {address}:{port} cannot be taken ({error.strerror}). "
            "Choose another --port or --address."
        ) from error
    settings = Settings.from_environment().served()
    _prepare()
    asyncio.run(_serve(spec, settings, [listening], token=token, stoppable=False))


async def _serve(
    spec: ModelSpec,
    settings: Settings,
    sockets: list[socket.socket],
    *,
    inherited: Sequence[int] = (),
    token: str | None = None,
    stoppable: bool = True,
) -> None:
    async def make_room() -> bool:
        return await asyncio.to_thread(end_an_idle_one, spec, warm.key)

    warm = WarmModel(spec, settings, inherited=inherited, make_room=make_room)

    def leave() -> None:
        config.timeout_graceful_shutdown = 0
        server.should_exit = True

    app = application(warm, token, leave if stoppable else None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=int(GRACE),
        timeout_keep_alive=60,
        backlog=2048,
    )
    server = uvicorn.Server(config)
    watch = asyncio.create_task(_leave_when_idle(warm, settings.idle, server))
    try:
        await server.serve(sockets=sockets)
    finally:
        watch.cancel()
        await warm.stop()  # where it was left at once, nobody has done so
    if settings.idle is None and warm.error is not None:
        raise warm.error


def _prepare() -> None:
    """Let signals end this process in order: uvicorn lets rows end first, and then raises the signal once more."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _leave_when_idle(warm: WarmModel, idle: float | None, server: uvicorn.Server) -> None:
    while not server.should_exit:
        await asyncio.sleep(1.0 if idle is None else min(5.0, idle / 4))
        if idle is None:
            over = warm.error is not None  # whoever started it, starts another
        else:  # one that could not be loaded stays only for those who asked for it to learn why
            over = warm.idle() > (idle if warm.error is None else min(idle, 10.0))
        server.should_exit |= over


def _lock(path: Path) -> int:
    """Take the lock of a key, for this process and the engine that inherits it: the system gives it back."""
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostUnavailable(f"a host locks {path}, but that failed ({error.strerror}). Free space there.") from error
    ends = time.monotonic() + _PREDECESSOR
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() > ends:
                os.close(held)
                raise HostUnavailable(f"one host has {path}, but another one still lives. End it.") from None
            time.sleep(0.05)


def _listen(path: Path) -> socket.socket:
    """Listen on a Unix socket that takes the place of one that a dead host has left."""
    scratch = path.with_suffix(f".{os.getpid()}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            scratch.unlink()
        listening.bind(str(scratch))
        scratch.chmod(0o600)
        listening.listen(2048)
        scratch.rename(path)
    except OSError:
        listening.close()
        with suppress(OSError):
            scratch.unlink()
        raise
    return listening


def main() -> None:
    """Be a local host: ``python -m alpaca_core.host.server KEY``, with the spec as JSON on standard input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    spec = ModelSpec.model_validate_json(sys.stdin.read())
    try:
        run_local(spec, sys.argv[1])
    except AlpacaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
