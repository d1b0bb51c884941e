"""A model that is kept warm: its engine, loaded again when it dies or has to have another adapter."""

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import IO, Any

import psutil

from alpaca_core.adapters import find_adapters
from alpaca_core.errors import (
    AlpacaError,
    DigestMismatch,
    HostError,
    HostUnavailable,
    InvalidAdapter,
    InvalidRequest,
    LoadError,
    NotEnoughMemory,
)
from alpaca_core.host.beside import Beside, by_digest, check_known, still_there
from alpaca_core.host.place import device_of, find_base_apart, key_of
from alpaca_core.host.protocol import Kind, ModelReply, Status, TokenizerReply
from alpaca_core.host.scheduler import Scheduler, Ticket
from alpaca_core.host.settings import Settings as Settings
from alpaca_core.host.supervisor import Engine, Loaded, memory_kills
from alpaca_core.identity import as_asked, identity
from alpaca_core.model import DEFAULT_ADAPTER, ModelInfo
from alpaca_core.spec import ModelSpec, NamedAdapter, digest_of

_LOG = logging.getLogger(__name__)
_LOADS = 5
"""Loads in a row that may fail after one that did not: whatever is in the way may go."""
_FIRST_LOADS = 3
"""Before one did not, or with new adapters: times that an engine may die as it loads. What it says itself is final."""
_IN_VAIN = 64
"""Engines that may die, one after the other, without a result in between: then it is not the rows."""
_DRAIN = 30.0
"""Seconds that rows get to end before an engine is replaced on purpose; those that have not are run again."""

MakeRoom = Callable[[], Awaitable[bool]]
"""Ends another host of this device that has nothing to do; says whether there was one."""


async def no_room() -> bool:
    """Find no host that could go."""
    return False


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
        self._log, self._inherited, self._make_room = log, inherited, make_room
        self._started = time.monotonic()
        self._merged = [found.info.digest for found in find_adapters(spec)] if spec.merge_adapter else []
        self._beside = Beside(spec, settings.idle)
        self._base = find_base_apart(spec)
        # of the same commit at each load: a hub may get a newer one
        self._pinned = spec.model_copy(update={"revision": self._base.revision or spec.revision})
        self.key = key_of(spec, self._base)
        told = [self._base.digest, self._merged, spec.quantization, spec.dtype, spec.engine]
        self.identity = digest_of(told)[:16]
        self.scheduler = Scheduler(self._send, settings.queue)
        self.loaded: Loaded | None = None
        self.error: AlpacaError | None = None
        self.leaving = False
        self._engine: Engine | None = None
        self._ready = asyncio.Event()
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._was_loaded = False
        self.restarts = 0

    def start(self) -> None:
        """Begin to load the model."""
        self._task = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the engine. Rows that have not come out get an error."""
        self.leaving = True
        await self._halt()
        self.scheduler.fail(HostUnavailable("the host has been stopped. Run it again."))

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
        return ModelReply(info=told, adapters=names, identity=self.identity)

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
        if identity not in ("", self.identity) or not named <= {None, DEFAULT_ADAPTER, *self._beside.names}:
            raise HostUnavailable(
                "rows are for one model and adapters of it, as a reply to /v1/model calls them, but this host, which "
                "may have begun since, has others. Ask it again."
            )
        self._beside.name(named)
        return self.scheduler.submit(client, kind, rows)

    def idle(self) -> float:
        """Seconds since there was something to do; 0 while it loads."""
        if self.scheduler.running or self.scheduler.waiting or not self._ready.is_set():
            return 0.0
        return time.monotonic() - self.scheduler.used

    def status(self) -> Status:
        """Look at it."""
        scheduler = self.scheduler
        pid = self._engine.pid if self._engine else None
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

    async def _have(self, wanted: dict[str, NamedAdapter]) -> None:
        """Load the engine again with adapters that it has not.

        The engine goes on until a process of its own has found that they go on the base. What can fail then is memory.
        """
        async with self._changing:
            if wanted.keys() <= self._beside.here.keys():
                return
            missing = self._beside.missing(wanted, self.scheduler.adapters)
            names = ", ".join(repr(adapter.source) for adapter in missing.values())
            if self.settings.fixed:  # known by name, but with other bytes than when it was started
                raise InvalidRequest(f"this host serves the adapters that it was started with, but not {names}.")
            await self._check(missing)
            await self._when_ready()
            self.scheduler.pause()
            ends = time.monotonic() + _DRAIN
            while self.scheduler.running and time.monotonic() < ends:
                await asyncio.sleep(0.02)
            await self._halt()
            self._ready.clear()
            self.scheduler.died(0.0)
            before = self._beside.here
            self._beside.add(missing)
            try:
                await self._load_again(_FIRST_LOADS, HostError)
            except AlpacaError as error:  # it is for those alone who asked for these adapters
                if not isinstance(error, LoadError):
                    error = LoadError(f"an engine has to live through its load, but with {names}: {error}")
                self._beside.refuse(missing, error)
                self._beside.here = before
                raise error from None
            finally:
                self._task = asyncio.create_task(self._keep())

    async def _check(self, adapters: Mapping[str, NamedAdapter]) -> None:
        """See whether adapters go on the base, beside the engine, which goes on.

        Raises:
            InvalidAdapter: If they do not.
        """
        trial = Engine(self._with(adapters), self._heard, self._log)
        try:
            await trial.check_adapters(self.settings.hang)
        except InvalidAdapter as error:
            self._beside.refuse(adapters, error)
            raise
        except (AlpacaError, OSError) as error:  # then a load will tell
            _LOG.warning("adapters are loaded unchecked: %s", error)
        finally:
            await trial.stop()

    async def _halt(self) -> None:
        """End the engine, and whoever listens to it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._engine is not None:
            await self._engine.stop()

    async def _keep(self) -> None:
        """Load an engine where there is none, listen to it, and load another when it dies."""
        while not self.leaving:
            if not self._ready.is_set():
                times, passing = (_LOADS, AlpacaError) if self._was_loaded else (_FIRST_LOADS, HostError)
                try:
                    await self._load_again(times, passing)
                except AlpacaError as error:
                    self._fail(error)
                    return
            assert self._engine is not None
            kills = deque([memory_kills()], maxlen=3)  # of late: those of days ago are somebody else's

            def busy(kills: deque[int] = kills) -> bool:
                kills.append(memory_kills())
                return self.scheduler.running > 0

            code = await self._engine.listen(self.settings.hang, busy)
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

    async def _load_again(self, times: int, passing: type[AlpacaError]) -> None:
        """Load, so many times where it may help.

        Args:
            times: At most.
            passing: The kind of error that another attempt may not find.

        Raises:
            LoadError: If the model cannot be loaded, or its files have become another model's.
            HostUnavailable: If the engine cannot be started, or dies again and again.
        """
        for failures in range(1, times + 1):
            try:
                await self._load()
                return
            except DigestMismatch:
                raise
            except (AlpacaError, OSError) as found:
                error = found if isinstance(found, AlpacaError) else _no_process(found)
                if failures == times or self.leaving or not isinstance(error, passing):
                    raise error from None
            await asyncio.sleep(failures)

    async def _load(self) -> None:
        spec = self._pinned
        if not spec.merge_adapter:
            # rows of one that is not there any more get an error, and nobody else notices
            self._beside.tidy(await asyncio.to_thread(still_there, self._beside.here), self.scheduler.adapters)
            spec = self._with(self._beside.here)
        while True:
            if self.leaving:
                raise HostUnavailable("the host is being stopped. Run it again.")
            self._engine = Engine(spec, self._heard, self._log, self._inherited)
            try:
                loaded = await self._engine.start(self.settings.hang)
            except NotEnoughMemory:
                if not await self._make_room():
                    raise
            else:
                break
        if not self._is_ours(loaded.info):
            await self._engine.stop()
            if {adapter.digest for adapter in loaded.info.adapters} != set(self._beside.here or self._merged):
                raise HostUnavailable("adapters became others while they were loaded. Load the model again.")
            raise DigestMismatch(
                f"a host keeps one model, but files of {spec.base_model!r} or its adapters have become others since it "
                "began. Load the model again: its own host starts."
            )
        self.loaded, self._was_loaded = loaded, True
        self._ready.set()
        self.scheduler.begin(self._spec.batch_size)

    def _with(self, adapters: Mapping[str, NamedAdapter]) -> ModelSpec:
        told = {"adapter": None, "adapter_revision": None, "adapters": tuple(adapters.values())}
        return self._pinned.model_copy(update=told)

    def _is_ours(self, info: ModelInfo) -> bool:
        """Whether an engine has loaded the bytes that this host's key stands for, and adapters that are their names."""
        if self._spec.merge_adapter:
            same = [adapter.digest for adapter in info.adapters] == self._merged
        else:
            same = {adapter.digest for adapter in info.adapters} == set(self._beside.here)
        told = identity(
            self._base.digest, info.adapters, info.quantization, info.dtype, self._spec.merge_adapter, info.engine
        )
        return same and told == (info.unshaped_digest or info.digest)

    async def _when_ready(self) -> Loaded:
        await self._ready.wait()
        if self.error is not None:
            raise self.error
        assert self.loaded is not None
        return self.loaded

    def _send(self, message: dict[str, Any]) -> None:
        assert self._engine is not None
        if "add" in message and self.scheduler.running == len(message["add"]):
            self._engine.work_begins()
        self._engine.send(message)

    def _heard(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self.scheduler.heard(message["ended"], message["tokens"])
        elif "info" in message and self.loaded is not None:
            self.loaded = replace(self.loaded, info=ModelInfo.model_validate(message["info"]))


def _no_process(error: OSError) -> HostUnavailable:
    return HostUnavailable(f"an engine is a process of its own, but none can be started ({error}). Try again later.")


def _resident(pid: int | None) -> int:
    """Bytes of memory that a process has; 0 where there is none."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0
