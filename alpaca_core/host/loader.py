"""What a host's engine is loaded with, and the load: tried again where that may help."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import IO, Any

from alpaca_core.adapters import find_adapters
from alpaca_core.errors import (
    AlpacaError,
    DigestMismatch,
    HostError,
    HostUnavailable,
    LoadError,
    NotEnoughMemory,
)
from alpaca_core.host.beside import Beside, still_there
from alpaca_core.host.place import find_base_apart, key_of
from alpaca_core.host.settings import Settings
from alpaca_core.host.supervisor import Engine, Loaded
from alpaca_core.identity import identity
from alpaca_core.model import ModelInfo
from alpaca_core.spec import ModelSpec, NamedAdapter, digest_of

_LOG = logging.getLogger(__name__)
_LOADS = 5
"""Loads in a row that may fail after one that did not: whatever is in the way may go."""
_FIRST_LOADS = 3
"""Before one did not, or with new adapters: times that an engine may die as it loads. What it says itself is final."""

MakeRoom = Callable[[], Awaitable[bool]]
"""Ends another host of this device that has nothing to do; says whether there was one."""


async def no_room() -> bool:
    """Find no host that could go."""
    return False


class Loader:
    """Starts engines of one base model, one after the other, with the adapters that are beside it then.

    Args:
        spec: What is loaded first.
        settings: How the host behaves.
        heard: Called with each message of an engine's results.
        out: Says which adapters rows name that are still out.
        log: Where an engine's output goes; None is this process's.
        inherited: Descriptors that an engine keeps open as long as it lives.
        make_room: Called where the model does not fit beside others.

    Attributes:
        beside: The adapters.
        engine: The process that was started last.
        key: Of the host.
        identity: Of what rows are written for.
        leaving: Whether nothing is to be loaded any more.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        heard: Callable[[dict[str, Any]], None],
        out: Callable[[], Collection[str | None]],
        log: IO[bytes] | None = None,
        inherited: Sequence[int] = (),
        make_room: MakeRoom = no_room,
    ) -> None:
        self._spec, self._hang, self._heard, self._out = spec, settings.hang, heard, out
        self._log, self._inherited, self._make_room = log, inherited, make_room
        self._merged = [found.info.digest for found in find_adapters(spec)] if spec.merge_adapter else []
        self._base = find_base_apart(spec)
        # of the same commit at each load: a hub may get a newer one
        self._pinned = spec.model_copy(update={"revision": self._base.revision or spec.revision})
        self.beside = Beside(spec, settings.idle)
        self.key = key_of(spec, self._base)
        told = [self._base.digest, self._merged, spec.quantization, spec.dtype, spec.engine]
        self.identity = digest_of(told)[:16]
        self.engine: Engine | None = None
        self.leaving = False
        self._was_loaded = False

    async def halt(self) -> None:
        """End the engine."""
        if self.engine is not None:
            await self.engine.stop()

    async def check(self, adapters: Mapping[str, NamedAdapter]) -> None:
        """See which adapters do not go on the base, by a process beside the engine, which goes on; refuse these."""
        trial = Engine(self._with(adapters), self._heard, self._log)
        bad: dict[str, AlpacaError] = {}
        try:
            bad = await trial.refusals(self._hang)
        except (AlpacaError, OSError) as error:  # then a load will tell
            _LOG.warning("adapters are loaded unchecked: %s", error)
        finally:
            await trial.stop()
        for digest, adapter in adapters.items():
            if isinstance(why := bad.get(adapter.name), LoadError):
                self.beside.refuse([digest], why)

    async def load(self) -> Loaded:
        """Load, again where that may help.

        Raises:
            LoadError: If the model cannot be loaded, or its files have become another model's.
            HostUnavailable: If the engine cannot be started, or dies again and again.
        """
        times, passing = (_LOADS, AlpacaError) if self._was_loaded else (_FIRST_LOADS, HostError)
        return await self._load_again(times, passing)

    async def load_more(self, missing: Mapping[str, NamedAdapter]) -> Loaded:
        """Load with more adapters beside those that are there, which alone are left where it fails.

        Raises:
            LoadError: If it fails, for whatever reason: that is for those alone who asked for these adapters.
            HostUnavailable: If the host is being stopped.
        """
        before = self.beside.here
        self.beside.add(missing)
        try:
            return await self._load_again(_FIRST_LOADS, HostError)
        except AlpacaError as error:
            self.beside.here = before
            if isinstance(error, LoadError) or self.leaving:
                raise
            names = ", ".join(repr(adapter.source) for adapter in missing.values())
            raise LoadError(f"an engine has to live through its load, but with {names}: {error}") from None

    async def _load_again(self, times: int, passing: type[AlpacaError]) -> Loaded:
        """Load, at most so many times, while the error is of a kind that another attempt may not find."""
        failures = 0
        while True:
            try:
                return await self._load()
            except DigestMismatch:
                raise
            except (AlpacaError, OSError) as found:
                error = found if isinstance(found, AlpacaError) else _no_process(found)
                failures += 1
                if failures == times or self.leaving or not isinstance(error, passing):
                    raise error from None
            await asyncio.sleep(failures)

    async def _load(self) -> Loaded:
        spec = self._pinned
        if not spec.merge_adapter:
            # rows of one that is not there any more get an error, and nobody else notices
            self.beside.tidy(await asyncio.to_thread(still_there, self.beside.here), self._out())
            spec = self._with(self.beside.here)
        while True:
            if self.leaving:
                raise _leaves()
            self.engine = Engine(spec, self._heard, self._log, self._inherited)
            try:
                loaded = await self.engine.start(self._hang)
            except NotEnoughMemory:
                if not await self._make_room():
                    raise
            else:
                break
        if self.leaving:
            await self.engine.stop()
            raise _leaves()
        if not self._is_ours(loaded.info):
            await self.engine.stop()
            if {adapter.digest for adapter in loaded.info.adapters} != set(self.beside.here or self._merged):
                raise HostUnavailable("adapters became others while they were loaded. Load the model again.")
            raise DigestMismatch(
                f"a host keeps one model, but files of {spec.base_model!r} or its adapters have become others since it "
                "began. Load the model again: its own host starts."
            )
        self._was_loaded = True
        return loaded

    def _with(self, adapters: Mapping[str, NamedAdapter]) -> ModelSpec:
        told = {"adapter": None, "adapter_revision": None, "adapters": tuple(adapters.values())}
        return self._pinned.model_copy(update=told)

    def _is_ours(self, info: ModelInfo) -> bool:
        """Whether an engine has loaded the bytes that the host's key stands for, and adapters that are their names."""
        if self._spec.merge_adapter:
            same = [adapter.digest for adapter in info.adapters] == self._merged
        else:
            same = {adapter.digest for adapter in info.adapters} == set(self.beside.here)
        told = identity(
            self._base.digest, info.adapters, info.quantization, info.dtype, self._spec.merge_adapter, info.engine
        )
        return same and told == (info.unshaped_digest or info.digest)


def _leaves() -> HostUnavailable:
    return HostUnavailable("the host is being stopped. Run it again.")


def _no_process(error: OSError) -> HostUnavailable:
    return HostUnavailable(f"an engine is a process of its own, but none can be started ({error}). Try again later.")
