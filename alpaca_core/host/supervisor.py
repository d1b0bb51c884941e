"""The engine's process, seen from the host: started, listened to, and ended when it hangs."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from alpaca_core.errors import AlpacaError, HostUnavailable, LoadError
from alpaca_core.host.protocol import MOST_BYTES, TokenizerReply, read_error
from alpaca_core.model import ModelInfo
from alpaca_core.spec import ModelSpec

_LINE = 4 * MOST_BYTES
_LOADING = 60.0
"""Seconds without a sign of life after which an engine that loads is ended: imports may hold it for a while."""
_LONGEST_LOAD = 3600.0
"""Seconds of a load, which reads what lies on the disk, after which signs of life count no more."""
_END = 5.0
"""Seconds between the end of an engine's connection and that of its process, the one or the other first."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine says when it is ready."""

    info: ModelInfo
    tokenizer: TokenizerReply


def memory_kills(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the processes of this one's control group that the kernel has killed because memory was short.

    Args:
        groups: Names the group of version 2 in a line ``0::PATH``.
        root: Where groups are mounted.

    Returns:
        ``oom_kill`` of the group's ``memory.events``; 0 where there is none.
    """
    with suppress(OSError, LookupError, ValueError):
        path = next(line[3:] for line in [*groups.read_text().splitlines(), "0::/"] if line.startswith("0::"))
        told = (root / path.lstrip("/") / "memory.events").read_text().split()
        return int(told[told.index("oom_kill") + 1])
    return 0


def plain_environment() -> dict[str, str]:
    """The environment for host and engine: without what belongs to the run that happens to start them, or is secret."""
    strange = ("PREFECT_", "ALPACA_HOST_TOKEN")
    return {name: value for name, value in os.environ.items() if not name.startswith(strange)}


class Engine:
    """One process of `alpaca_core.host.engine`.

    Args:
        spec: The model that it loads.
        heard: Called with each message of results.
        log: Where its standard output and error go; None is the host's.
        inherited: Descriptors that it keeps open as long as it lives.
    """

    def __init__(
        self,
        spec: ModelSpec,
        heard: Callable[[dict[str, Any]], None],
        log: IO[bytes] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        self._spec, self._heard, self._log, self._inherited = spec, heard, log, tuple(inherited)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._last = 0.0  # when it gave a sign of life, or got work after it had none
        self._ended_here = self._killed = False

    @property
    def pid(self) -> int | None:
        """Of the process; None before it is started."""
        return self._process.pid if self._process else None

    async def start(self, hang: float) -> Loaded:
        """Start it, and wait until the model is loaded.

        Args:
            hang: Seconds without a sign of life after which it is killed, if they are many enough for a load.

        Raises:
            LoadError: What the load raised there, or that the process ended by itself.
            HostUnavailable: If the process was killed while it loaded.
        """
        message = await self._begin("load", hang)
        return Loaded(ModelInfo.model_validate(message["ready"]), TokenizerReply.model_validate(message["tokenizer"]))

    async def refusals(self, hang: float) -> dict[str, AlpacaError]:
        """Start it to see which of a spec's adapters do not go on its base: without the weights, and not on the device.

        Returns:
            What speaks against each of those, by name.

        Raises:
            LoadError, HostUnavailable: As `start`.
        """
        message = await self._begin("check", hang)
        return {name: read_error(error) for name, error in message["checked"].items()}

    async def _begin(self, task: str, hang: float) -> dict[str, Any]:
        """Start the process with its first message; return its answer."""
        ours, its = socket.socketpair()
        with its:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "alpaca_core.host.engine", str(its.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=plain_environment(),
                pass_fds=(its.fileno(), *self._inherited),
                start_new_session=True,  # a terminal's Ctrl-C is for the host, which lets rows end
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LINE)
        self.send({task: self._spec.model_dump(mode="json")})
        self._last = time.monotonic()
        watch = asyncio.create_task(self._watch(max(hang, _LOADING), lambda: True))
        try:
            begun = time.monotonic()
            while (message := await self._read()) is not None and "loading" in message:
                if time.monotonic() - begun < _LONGEST_LOAD:
                    self._last = time.monotonic()
        finally:
            watch.cancel()
        if message is not None and "failed" not in message:
            return message
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _END)
        await self.stop()
        if message is not None:
            raise read_error(message["failed"])
        code = await self._process.wait()
        kind = HostUnavailable if code < 0 else LoadError
        raise kind(f"an engine's process {_ended(code)} while it loaded the model. Read the host's log.")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; it goes nowhere if the process is dead."""
        assert self._writer is not None
        with suppress(OSError, RuntimeError):
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def work_begins(self) -> None:
        """Note that it has something to do from now on."""
        self._last = time.monotonic()

    async def listen(self, hang: float, busy: Callable[[], bool]) -> int:
        """Pass messages on until the process has ended; return its exit code, negative for a signal from outside.

        Args:
            hang: Seconds without a sign of life, while `busy`, after which it is killed.
            busy: Whether it has something to do.
        """
        assert self._process is not None
        watch = asyncio.create_task(self._watch(hang, busy))
        ends = [asyncio.create_task(self._pass_on()), asyncio.create_task(self._process.wait())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(ends, timeout=_END)  # a process that it has begun may hold the connection open
            await self.stop()
        finally:
            for task in (watch, *ends):
                task.cancel()
        code = await self._process.wait()
        return abs(code) if self._ended_here else code

    async def _pass_on(self) -> None:
        while (message := await self._read()) is not None:
            self._last = time.monotonic()
            try:
                self._heard(message)
            except Exception:
                logging.getLogger(__name__).exception("an engine said what its host does not understand")
                return

    async def stop(self) -> None:
        """End the process, whatever it does, and all that it has begun."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._ended_here |= self._process.returncode is None
            self._kill()
            await self._process.wait()

    def _kill(self) -> None:
        """Kill its session, which it leads: workers of its own may hang, and hold memory, when it is gone."""
        assert self._process is not None
        if not self._killed:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._killed = True  # later its number may be another's

    async def _watch(self, hang: float, busy: Callable[[], bool]) -> None:
        assert self._process is not None
        while True:
            await asyncio.sleep(min(1.0, hang / 4))
            if busy() and time.monotonic() - self._last > hang:
                self._ended_here = True
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGABRT)  # its log gets the stack where it hangs
                    await asyncio.sleep(1.0)
                self._kill()

    async def _read(self) -> dict[str, Any] | None:
        try:
            line = await self._reader.readline()
            return dict(json.loads(line)) if line.endswith(b"\n") else None
        except (OSError, ValueError):  # it died in mid-line
            return None


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
