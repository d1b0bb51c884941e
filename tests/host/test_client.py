"""The client's patience: signs of life count, and what a host says at last is told as it is."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from alpaca_core.errors import AlpacaError, HostUnavailable, InvalidAdapter
from alpaca_core.host.application import application
from alpaca_core.host.client import HostModel
from alpaca_core.host.exchange import _LIVES, Wait
from alpaca_core.host.neighbours import connection
from alpaca_core.host.protocol import ModelReply, TokenizerReply
from alpaca_core.model import GenerateRow
from alpaca_core.spec import ModelSpec, Sampling
from tests.engines.conftest import wrapped
from tests.host.conftest import NativeModel, ThreadedWarm, served

LOAD, PATIENCE = 3.0, 1.0
"""Seconds; a load takes longer than both a read and all of the client's patience."""


class Slow(ThreadedWarm):
    """Answers when it has been loaded, which takes a while; `refusal` is what comes of it then."""

    refusal: AlpacaError | None = None

    async def model(self, spec: ModelSpec) -> ModelReply:
        await asyncio.sleep(LOAD)
        if self.refusal:
            raise self.refusal
        return await super().model(spec)

    async def tokenizer(self) -> TokenizerReply:
        await asyncio.sleep(LOAD)
        return await super().tokenizer()


@pytest.fixture
def slow(
    make_network: Callable[..., Any], tokenizer: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Slow, Callable[[], HostModel]]]:
    """A host that loads for long, and how it is asked by a client that waits for less."""
    monkeypatch.setattr("alpaca_core.host.application._PULSE", 0.2)
    warm = Slow(wrapped(NativeModel, tokenizer, make_network()), 8)
    path = runtime / "slow.sock"
    with served(application(warm), path):  # type: ignore[arg-type]
        yield warm, lambda: HostModel(ModelSpec(), lambda: connection(path, PATIENCE), patience=PATIENCE)


def test_a_load_that_takes_longer_than_the_clients_patience_is_waited_for(
    slow: tuple[Slow, Callable[[], HostModel]],
) -> None:
    warm, ask = slow
    model = ask()
    ((_, found),) = model.generate([GenerateRow((1,), Sampling(max_new_tokens=2))])
    assert getattr(found, "completion_tokens", found) == 2
    assert model.tokenizer.definition == warm.loaded.tokenizer.definition
    model.close()


@pytest.mark.parametrize("refusal", [InvalidAdapter("it is of another base."), HostUnavailable("it died.")])
def test_what_a_long_load_comes_to_is_told_by_its_own_kind(
    slow: tuple[Slow, Callable[[], HostModel]], refusal: AlpacaError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alpaca_core.host.exchange._LIVES", 1)
    warm, ask = slow
    warm.refusal = refusal
    with pytest.raises(type(refusal), match=str(refusal)):
        ask()


def test_signs_of_life_let_patience_begin_anew_but_not_for_ever() -> None:
    wait, problem = Wait(0.2), httpx.ReadError("broken")
    for _ in range(_LIVES):
        time.sleep(0.3)
        wait.life()
        wait(problem)
    time.sleep(0.3)
    wait.life()
    with pytest.raises(HostUnavailable, match="cannot be reached"):
        wait(problem)


@pytest.mark.parametrize(("shape", "asked", "told"), [("16x2048", 32, 1), ("32x2048", 32, 0), ("", 32, 0)])
def test_a_host_of_another_shape_is_told_once(
    make_network: Callable[..., Any],
    tokenizer: Any,
    runtime: Path,
    caplog: pytest.LogCaptureFixture,
    shape: str,
    asked: int,
    told: int,
) -> None:
    """The shape of a GPU's engine, which a model on a CPU is given here: bits depend on it there alone."""
    model = wrapped(NativeModel, tokenizer, make_network())
    model.info = model.info.model_copy(update={"shape": shape})
    path = runtime / "shaped.sock"
    with served(application(ThreadedWarm(model, 8)), path):  # type: ignore[arg-type]
        for _ in range(3):
            HostModel(ModelSpec(batch_size=asked), lambda: connection(path, 20.0)).close()
    warned = [record.getMessage() for record in caplog.records if record.name == "alpaca_core.host.client"]
    assert len(warned) == told
    assert all(shape in line and f"batch_size of {asked}" in line and "Ask for the same" in line for line in warned)
