"""A model that is kept warm: its engine, loaded again when it dies or has to have another adapter."""

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import IO, Any

import psutil

from alpaca_core.adapters import find_adapters
from alpaca_core.errors import AlpacaError, HostUnavailable, InvalidRequest, LoadError
from alpaca_core.host.beside import by_digest, check_known
from alpaca_core.host.loader import Loader, MakeRoom, no_room
from alpaca_core.host.place import device_of, find_base_apart, key_of
from alpaca_core.host.protocol import Kind, ModelReply, Status, TokenizerReply
from alpaca_core.host.scheduler import Scheduler, Ticket
from alpaca_core.host.settings import Settings as Settings
from alpaca_core.host.supervisor import Loaded, memory_kills
from alpaca_core.identity import as_asked
from alpaca_core.model import DEFAULT_ADAPTER, ModelInfo
from alpaca_core.spec import ModelSpec, NamedAdapter

_LOG = logging.getLogger(__name__)
_IN_VAIN = 64
"""Engines that may die, one after the other, without a result in between: then it is not the rows."""
_DRAIN = 30.0
"""Seconds that rows get to end before an engine is replaced on purpose; those that have not are run again."""


class WarmModel:
    """One base model in one engine, for any number of clients.

    Args:
        spec: What is loaded first.
        settings: How it behaves.
        log: Where the engine's output goes; None is this process's.
        inherited: Descriptors that the engine keeps open as long as it lives.
        make_room: Called where the model does not fit beside others.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        log: IO[bytes] | None = None,
        inherited: Sequence[int] = (),
        make_room: MakeRoom = no_room,
    ) -> None:
        self._spec, self.settings = spec, settings
        self._started = time.monotonic()
        self._loader = Loader(spec, settings, self._heard, lambda: self.scheduler.adapters, log, inherited, make_room)
        self.key = self._loader.key
        self._beside = self._loader.beside
        self.scheduler = Scheduler(self._send, settings.queue)
        self.loaded: Loaded | None = None
        self.error: AlpacaError | None = None
        self._ready = asyncio.Event()
        self._changing = asyncio.Lock()
        self._asked: dict[int, dict[str, NamedAdapter]] = {}  # by clients that wait for adapters, and share a load
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0

    def start(self) -> None:
        """Begin to load the model."""
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the engine. Rows that have not come out get an error."""
        self._loader.leaving = True
        await self._halt()
        self.error = HostUnavailable("the host has been stopped. Run it again.")
        self._ready.set()
        self.scheduler.fail(self.error)

    async def model(self, spec: ModelSpec) -> ModelReply:
        """Wait until the model is loaded, with a spec's adapters; say what it is.

        Raises:
            InvalidRequest: If the spec means another base, or bits of it, or device, than this host has.
            LoadError: If the model, or an adapter, cannot be loaded.
        """
        self.scheduler.used = time.monotonic()
        if self.settings.fixed:
            check_known(spec, self._spec)
            where = {"device": self._spec.device, "device_map": self._spec.device_map}  # which is not the client's
            spec = spec.model_copy(update=where)
        base, adapters = await asyncio.to_thread(lambda: (find_base_apart(spec), find_adapters(spec)))
        if (key := key_of(spec, base)) != self.key:
            raise InvalidRequest(
                f"this host keeps {self._spec.base_model!r} (quantization {self._spec.quantization}, dtype "
                f"{self._spec.dtype}, device {device_of(self._spec)}; key {self.key}), but the spec means "
                f"{spec.base_model!r}, key {key}. Ask its own host, or start one."
            )
        names = {DEFAULT_ADAPTER: DEFAULT_ADAPTER}  # part of the base
        if not spec.merge_adapter:
            wanted = by_digest(spec, adapters)
            self._beside.name(adapter.name for adapter in wanted.values())
            await self._have(wanted)
            if not wanted.keys() <= self._beside.here.keys():
                raise HostUnavailable("an adapter became another while it was loaded. Load the model again.")
            names = {found.info.name: wanted[found.info.digest].name for found in adapters}
        loaded = await self._when_ready()
        infos = [found.info for found in adapters]
        info = as_asked(loaded.info, base.digest, infos, spec.template, spec.merge_adapter)
        told = info.model_copy(update={"name": spec.base_model})
        return ModelReply(info=told, adapters=names, identity=self._loader.identity)

    async def tokenizer(self) -> TokenizerReply:
        """Wait until the model is loaded; return what its tokenizer is made of.

        Raises:
            LoadError, HostUnavailable: If it cannot be loaded.
        """
        return (await self._when_ready()).tokenizer

    def submit(self, client: str, kind: Kind, rows: list[dict[str, Any]], identity: str = "") -> Ticket:
        """Line up rows. It waits for no load: rows wait in line.

        Args:
            client: Whose turn they take.
            kind: What is done with them.
            rows: As in the protocol.
            identity: Of the model that they were written for, as a reply said; empty asks for none.

        Raises:
            HostBusy: If too many rows wait.
            HostUnavailable: If they were written for another host, in whose place this one has come.
            LoadError, HostUnavailable: If the model cannot be loaded.
        """
        if self.error is not None:
            raise self.error
        named = {row["adapter"] for row in rows}
        if identity not in ("", self._loader.identity) or not named <= {None, DEFAULT_ADAPTER, *self._beside.names}:
            raise HostUnavailable(
                "rows are for one model and adapters of it, as a reply to /v1/model calls them, but this host, which "
                "may have begun since, has others. Ask it again."
            )
        self._beside.name(named)
        return self.scheduler.submit(client, kind, rows)

    @property
    def leaving(self) -> bool:
        """Whether it has been stopped."""
        return self._loader.leaving

    def idle(self) -> float:
        """Seconds since there was something to do; 0 while it loads."""
        if self.scheduler.running or self.scheduler.waiting or not self._ready.is_set():
            return 0.0
        return time.monotonic() - self.scheduler.used

    def status(self) -> Status:
        """Look at it."""
        scheduler = self.scheduler
        pid = self._loader.engine.pid if self._loader.engine else None
        return Status.model_validate(
            {
                "version": version("prefect-alpaca"),
                "pid": os.getpid(),
                "engine_pid": pid,
                "key": self.key,
                "device": device_of(self._spec),
                "state": self._state(),
                "info": self.loaded.info if self.loaded else None,
                "uptime": time.monotonic() - self._started,
                "idle": self.idle(),
                "memory_gib": _resident(pid) / 2**30,
                "waiting": scheduler.waiting,
                "running": scheduler.running,
                "clients": scheduler.clients,
                "rows": scheduler.rows,
                "tokens": scheduler.tokens,
                "tokens_per_second": scheduler.speed()[1],
                "restarts": self.restarts,
                "queue_limit": scheduler.limit,
            }
        )

    def _state(self) -> str:
        if self.leaving:
            return "leaving"
        return "failed" if self.error else "ready" if self._ready.is_set() else "loading"

    async def _have(self, own: dict[str, NamedAdapter]) -> None:
        """Load the engine again with adapters that it has not, and with those that others wait for.

        The engine goes on until a process of its own has found that they go on the base. What can fail then is memory.
        """
        self._asked[id(own)] = own
        try:
            async with self._changing:
                if own.keys() <= self._beside.here.keys():
                    return
                missing = self._lacking(own)
                if self.settings.fixed:  # known by name, but with other bytes than when it was started
                    names = ", ".join(repr(each.source) for each in missing.values())
                    raise InvalidRequest(f"this host serves the adapters that it was started with, but not {names}.")
                checked = dict[str, NamedAdapter]()
                for _ in range(2):  # the second time for whoever has come during the first
                    if new := {digest: each for digest, each in self._waited_for(own).items() if digest not in checked}:
                        await self._loader.check(new)
                        checked |= new
                missing = self._lacking(own)  # unless the check was against it
                shared = self._waited_for(own)
                await self._change(missing, {digest: shared[digest] for digest in shared.keys() & checked.keys()})
        finally:
            self._asked.pop(id(own), None)

    def _waited_for(self, own: dict[str, NamedAdapter]) -> dict[str, NamedAdapter]:
        """What the engine lacks of clients that wait, this one first; nothing of one that is refused any of it."""
        found: dict[str, NamedAdapter] = {}
        for asked in (own, *self._asked.values()):
            with suppress(LoadError):  # of which its own client hears
                found |= self._lacking(asked)
        return found

    def _lacking(self, asked: dict[str, NamedAdapter]) -> dict[str, NamedAdapter]:
        """What the engine has to be loaded again for.

        Raises:
            LoadError: If it has been refused.
        """
        return self._beside.missing(asked, self.scheduler.adapters)

    async def _change(self, own: dict[str, NamedAdapter], shared: dict[str, NamedAdapter]) -> None:
        """Let running rows end, and load the engine again with shared adapters, or a client's own where that fails."""
        await self._when_ready()
        self.scheduler.pause()
        ends = time.monotonic() + _DRAIN
        while self.scheduler.running and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        await self._halt()
        self._ready.clear()
        self.scheduler.died(0.0)
        try:
            await self._load_more(own, shared)
        finally:
            self._task = asyncio.create_task(self._keep())

    async def _load_more(self, own: dict[str, NamedAdapter], shared: dict[str, NamedAdapter]) -> None:
        for adapters in (shared, own):
            try:
                self._begin(await self._loader.load_more(adapters))
                return
            except LoadError as error:
                if adapters.keys() == own.keys():
                    self._beside.refuse(own, error)
                    raise
                _LOG.warning("adapters of several clients are loaded one client's at a time: %s", error)
                self._asked.clear()  # nobody is refused for what another has brought

    async def _halt(self) -> None:
        """End the engine, and whoever listens to it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._loader.halt()

    async def _keep(self) -> None:
        """Load an engine where there is none, listen to it, and load another when it dies."""
        while not self.leaving:
            if not self._ready.is_set():
                try:
                    self._begin(await self._loader.load())
                except AlpacaError as error:
                    self._fail(error)
                    return
            assert self._loader.engine is not None
            kills = deque([memory_kills()], maxlen=3)  # of late: those of days ago are somebody else's

            def busy(kills: deque[int] = kills) -> bool:
                kills.append(memory_kills())
                return self.scheduler.running > 0

            code = await self._loader.engine.listen(self.settings.hang, busy)
            self.restarts += 1
            self._ready.clear()
            # SIGTERM and SIGKILL come from a person, unless the system says that it was short of memory
            outside = code == -signal.SIGTERM or (code == -signal.SIGKILL and memory_kills() == kills[0])
            self.scheduler.died(0.25 if outside else 1.0)
            if self.scheduler.in_vain >= _IN_VAIN:
                self._fail(LoadError(f"an engine gives results, but {_IN_VAIN} died without one. Read the host's log."))
                return

    def _fail(self, error: AlpacaError) -> None:
        """Be of no use any more: the state is failed for good, and whoever asks gets the error."""
        _LOG.error("the model is given up: %s", error)
        self.error = error
        self._ready.set()
        self.scheduler.fail(error)

    def _begin(self, loaded: Loaded) -> None:
        """Give a loaded engine its rows."""
        self.loaded = loaded
        self._ready.set()
        self.scheduler.begin(self._spec.batch_size)

    async def _when_ready(self) -> Loaded:
        if self.error is None:
            await self._ready.wait()
        if self.error is not None:
            raise self.error
        assert self.loaded is not None
        return self.loaded

    def _send(self, message: dict[str, Any]) -> None:
        engine = self._loader.engine
        assert engine is not None
        if "add" in message and self.scheduler.running == len(message["add"]):
            engine.work_begins()
        engine.send(message)

    def _heard(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self.scheduler.heard(message["ended"], message["tokens"])
        elif "info" in message and self.loaded is not None:
            self.loaded = replace(self.loaded, info=ModelInfo.model_validate(message["info"]))


def _resident(pid: int | None) -> int:
    """Bytes of memory that a process has; 0 where there is none."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0
