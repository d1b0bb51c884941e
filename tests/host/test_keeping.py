"""Adapters that clients bring to a warm model: who waits for whom, and who hears of what. Engines are stand-ins."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alpaca_core.adapters import find_adapters
from alpaca_core.engines.opening import refusals
from alpaca_core.errors import AlpacaError, HostUnavailable, InvalidAdapter, LoadError, NotEnoughMemory
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.place import find_base_apart
from alpaca_core.host.protocol import ModelReply, TokenizerReply
from alpaca_core.host.settings import Settings
from alpaca_core.host.supervisor import Loaded
from alpaca_core.identity import identity
from alpaca_core.model import ModelInfo
from alpaca_core.spec import ModelSpec
from tests.host.conftest import ADAPTERS, spec_of, started


class Engine:
    """An engine that loads at once, or as a test says, and computes nothing."""

    loads: list[str]
    """The adapters of each load, by the first letters of their folders."""
    checks: list[str]
    fails: Callable[[str], AlpacaError | None]
    bad: str
    seconds: float
    all_here: asyncio.Event
    """Set when all of the clients that a test lets ask at once have asked; the first check takes until then."""
    pid = None

    def __init__(self, spec: ModelSpec, *_: object) -> None:
        self._spec, self._ended = spec, asyncio.Event()
        self._names = "".join(sorted(Path(adapter.source).name[0] for adapter in spec.adapters))

    async def start(self, _: float) -> Loaded:
        Engine.loads.append(self._names)
        await asyncio.sleep(Engine.seconds)
        if self._ended.is_set():
            raise HostUnavailable("it was killed")
        if (error := Engine.fails(self._names)) is not None:
            raise error
        adapters = tuple(found.info for found in find_adapters(self._spec))
        told: dict[str, Any] = {"quantization": "none", "dtype": "float32", "engine": "native"}
        digest = identity(find_base_apart(self._spec).digest, adapters, merged=False, **told)
        told |= {"name": "tiny", "digest": digest, "device": "cpu", "adapters": adapters, "eos_ids": ()}
        info = ModelInfo(context_length=1024, vocab_size=258, **told)
        return Loaded(info, TokenizerReply(definition="{}", eos_ids=(), named={}))

    async def refusals(self, _: float) -> dict[str, AlpacaError]:
        Engine.checks.append(self._names)
        await Engine.all_here.wait()
        await asyncio.sleep(Engine.seconds)
        named = {Path(adapter.source).name[0]: adapter.name for adapter in self._spec.adapters}
        return {named[letter]: InvalidAdapter("it is bad") for letter in Engine.bad if letter in named}

    async def listen(self, *_: object) -> int:
        await self._ended.wait()
        return -9

    async def stop(self) -> None:
        self._ended.set()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpaca_core.host.loader.Engine", Engine)
    monkeypatch.setattr("alpaca_core.host.loader._FIRST_LOADS", 1)
    Engine.loads, Engine.checks, Engine.bad, Engine.seconds = [], [], "", 0.1
    Engine.fails = staticmethod(lambda names: None)


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelSpec]:
    """Make the spec of a base with adapters, which are called by letters: a folder of other bytes for each."""
    folder = tmp_path_factory.mktemp("adapters")
    source = base.parent / f"{base.name}-adapters" / ADAPTERS[1]
    for number, letter in enumerate("abcd"):
        shutil.copytree(source, folder / letter)
        config = folder / letter / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 10 + number}))

    def make(letters: str) -> ModelSpec:
        named = [{"name": letter, "source": str(folder / letter)} for letter in letters]
        return spec_of(base).model_copy(update={"adapters": ModelSpec(adapters=tuple(named)).adapters})  # type: ignore[arg-type]

    return make


async def when(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0.005)


async def asked(warm: WarmModel, *specs: ModelSpec) -> list[Any]:
    """Ask for models at once, in that order, and wait for what comes of each."""
    calls: list[asyncio.Task[Any]] = []
    Engine.all_here = asyncio.Event()
    for spec in specs:
        before = len(warm._asked)
        calls.append(asyncio.create_task(warm.model(spec)))
        await when(lambda before=before: len(warm._asked) > before or calls[-1].done())
    Engine.all_here.set()
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30.0)


def test_adapters_that_are_waited_for_are_checked_and_loaded_together(adapted: Callable[..., ModelSpec]) -> None:
    async def drive() -> None:
        async with started(adapted(""), Settings()) as warm:
            replies = await asked(warm, *map(adapted, "abcd"))
            assert all(isinstance(reply, ModelReply) for reply in replies)
            assert len({name for reply in replies for name in reply.adapters.values()}) == 4
            assert Engine.loads == ["", "abcd"]
            assert "".join(Engine.checks) == "abcd"
            (again,) = await asked(warm, adapted("db"))
            assert isinstance(again, ModelReply)
            assert len(Engine.loads) == 2

    asyncio.run(drive())


def test_a_bad_adapter_is_its_own_clients_alone_and_so_is_what_else_that_one_wanted(
    adapted: Callable[..., ModelSpec],
) -> None:
    Engine.bad = "c"

    async def drive() -> None:
        async with started(adapted(""), Settings()) as warm:
            first, refused, other = await asked(warm, *map(adapted, ("a", "cd", "b")))
            assert isinstance(refused, InvalidAdapter)
            assert isinstance(first, ModelReply)
            assert isinstance(other, ModelReply)
            assert Engine.loads == ["", "ab"]
            (again,) = await asked(warm, adapted("c"))
            assert isinstance(again, InvalidAdapter)
            (good,) = await asked(warm, adapted("d"))
            assert isinstance(good, ModelReply)
            assert "".join(Engine.checks).count("c") == 1

    asyncio.run(drive())


@pytest.mark.parametrize("kind", [InvalidAdapter, NotEnoughMemory, HostUnavailable])
def test_nobody_is_refused_for_what_another_has_brought(
    adapted: Callable[..., ModelSpec], kind: type[AlpacaError]
) -> None:
    """An adapter that passes the check and fails in the load, as one does that is replaced meanwhile."""
    Engine.fails = staticmethod(lambda names: kind("it is c's") if "c" in names else None)

    async def drive() -> None:
        async with started(adapted(""), Settings()) as warm:
            first, second, refused, other = await asked(warm, *map(adapted, "abcd"))
            assert isinstance(refused, LoadError)
            assert [type(reply) for reply in (first, second, other)] == [ModelReply] * 3
            tries = [names for place, names in enumerate(Engine.loads) if names != Engine.loads[place - 1]]
            assert tries[:3] == ["", "abcd", "a"]  # no engine without the first client's between them
            assert Engine.loads[-1] == "abd"
            Engine.fails = staticmethod(lambda names: None)
            (later,) = await asked(warm, adapted("ab"))
            assert isinstance(later, ModelReply)

    asyncio.run(drive())


@pytest.mark.parametrize("place", ["check", "load"])
def test_clients_that_wait_for_adapters_hear_that_the_host_is_stopped(
    adapted: Callable[..., ModelSpec], place: str
) -> None:
    async def drive() -> None:
        async with started(adapted(""), Settings()) as warm:
            calls = asyncio.create_task(asked(warm, *map(adapted, "ab")))
            await when(
                lambda: len(warm._asked) == 2 and (Engine.checks if place == "check" else len(Engine.loads) == 2)
            )
            await warm.stop()
            assert all(isinstance(each, HostUnavailable) for each in await calls)
            with pytest.raises(HostUnavailable):
                await warm.tokenizer()
            assert warm.status().state == "leaving"

    asyncio.run(drive())


def test_what_speaks_against_adapters_is_told_of_each(base: Path, tmp_path: Path) -> None:
    """One of another rank than its tensors, and one whose folder has gone, beside good ones."""
    source = base.parent / f"{base.name}-adapters" / "poet"
    shutil.copytree(source, tmp_path / "bad")
    config = tmp_path / "bad" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 7}))
    places = {"good": source, "bad": tmp_path / "bad", "gone": tmp_path / "gone", "other": source.parent / "clerk"}
    named = tuple({"name": name, "source": str(place)} for name, place in places.items())
    found = refusals(ModelSpec.model_validate({"base_model": str(base), "device": "cpu", "adapters": named}))
    assert list(found) == ["bad"]
