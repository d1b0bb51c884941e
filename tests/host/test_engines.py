"""A warm model and its engine's process: what is a sign of life, what ends with it, what it is loaded again for."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core.errors import HostUnavailable, InvalidCheckpoint, NotEnoughMemory
from alpaca_core.host.engine import parts
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import stop
from alpaca_core.host.scheduler import Ticket
from alpaca_core.host.settings import Settings
from alpaca_core.host.supervisor import Engine, memory_kills
from alpaca_core.model import Completion, GenerateRow, RowError
from alpaca_core.spec import ModelSpec, Sampling
from tests.host.conftest import (
    ADAPTERS,
    LOOPER,
    SERVER,
    SLOW,
    WORKER,
    engines,
    host_of,
    processes,
    soaking,
    spec_of,
    started,
)
from tests.waiting import until


@pytest.fixture(scope="module")
def spec(base: Path) -> ModelSpec:
    return spec_of(base, *ADAPTERS)


async def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def row_of(adapter: str | None, tokens: int = 30, prompt: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {"prompt_ids": prompt, "sampling": {"max_new_tokens": tokens}, "sample_index": 0, "adapter": adapter}


async def results(ticket: Ticket, count: int) -> list[Any]:
    return [await asyncio.wait_for(ticket.results.get(), 120.0) for _ in range(count)]


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=soaking), signal.SIGABRT, signal.SIGSTOP])
def test_an_engine_is_replaced_within_a_load_and_ten_seconds(how: signal.Signals, base: Path, deadly: Path) -> None:
    began = time.monotonic()
    with at_host(spec_of(base), "auto") as model, ThreadPoolExecutor(1) as pool:
        load = time.monotonic() - began
        call = pool.submit(lambda: list(model.generate([GenerateRow((1,), Sampling(max_new_tokens=2000))] * 4)))
        before = until(lambda: (found := host_of(deadly)) and found.running and found)
        began = time.monotonic()
        os.kill(before.engine_pid, how)
        hang = 3.0 if how == signal.SIGSTOP else 0.0

        def again() -> bool:
            found = host_of(deadly)
            assert found is not None
            return found.state == "ready" and found.engine_pid != before.engine_pid

        until(again, hang + load + 10.0)
        print(f"{how.name}: loaded in {load:.1f} s, ready again {time.monotonic() - began:.1f} s later")
        assert len(call.result(120.0)) == 4


@pytest.mark.end_to_end
def test_an_engine_that_turns_round_is_replaced_and_one_that_is_slow_is_not(spec: ModelSpec, deadly: Path) -> None:
    with at_host(spec, "auto") as model:
        before = host_of(deadly)
        assert before is not None
        began = time.monotonic()
        ((_, found),) = model.generate([GenerateRow((SLOW, 1), Sampling(max_new_tokens=5))])
        assert time.monotonic() - began > 4.0  # the limit is 3 s
        assert not isinstance(found, RowError)
        after = host_of(deadly)
        assert after is not None
        assert (after.engine_pid, after.restarts) == (before.engine_pid, 0)
        ((_, found),) = model.generate([GenerateRow((LOOPER, 1), Sampling(max_new_tokens=5))])
        assert isinstance(found, RowError)
        assert found.code == "engine_failed"


@pytest.mark.end_to_end
def test_processes_that_an_engine_has_begun_end_with_it(spec: ModelSpec, deadly: Path) -> None:
    row = GenerateRow((1,), Sampling(max_new_tokens=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTS_WORKER", "1")
        with at_host(spec, "auto") as model:
            (first,) = processes(deadly, WORKER[1])
            engines(deadly)[0].kill()
            until(lambda: not _lives(first), 5.0)
            assert len(list(model.generate([row]))) == 1
            (second,) = processes(deadly, WORKER[1])
            processes(deadly, SERVER)[0].kill()
            until(lambda: not _lives(second), 5.0)
            assert len(list(model.generate([row]))) == 1
            (third,) = processes(deadly, WORKER[1])
        (path,) = deadly.glob("*.sock")
        assert stop(path)
        until(lambda: not _lives(third), 5.0)


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.end_to_end
def test_an_engine_that_cannot_load_and_does_not_end_is_ended(base: Path, deadly: Path, tmp_path: Path) -> None:
    broken = tmp_path / "base"
    shutil.copytree(base, broken)
    with (broken / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)

    async def load() -> None:
        engine = Engine(spec_of(broken), lambda _: None)
        with pytest.raises(InvalidCheckpoint):
            await engine.start(3.0)
        assert engine.pid is not None
        assert not psutil.pid_exists(engine.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTS_LINGER", "1")
        asyncio.run(asyncio.wait_for(load(), 60.0))


@given(st.lists(st.tuples(st.integers(), st.integers(1, 250_000))))
def test_results_are_split_into_lines_of_bounded_size(sizes: list[tuple[int, int]]) -> None:
    def completion(tokens: int) -> Completion:
        told = {"text": "", "token_ids": (), "finish_reason": "stop", "prompt_tokens": 1}
        return Completion.model_validate(told | {"completion_tokens": tokens})

    ended = [(key, [0.0] * size if key % 2 else completion(size)) for key, size in sizes]
    found = list(parts(ended))
    assert [each for part in found for each in part] == ended
    assert all(found)
    for part in found:
        weights = [size for _, size in sizes[: len(part)]]
        del sizes[: len(part)]
        assert sum(weights[:-1]) < 100_000


@pytest.mark.end_to_end
def test_the_results_of_a_step_may_be_longer_than_a_line(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with 66,306 scores each, eight of which end together, for a host that reads lines of 4 MiB."""
    monkeypatch.setattr("alpaca_core.host.supervisor._LINE", 4 * 2**20)
    tokens = [*range(258), *(token for _ in range(258) for token in range(257))]
    parents = [*[-1] * 258, *(node for node in range(258) for _ in range(257))]
    row = {"prompt_ids": (1, 2), "tokens": tokens, "parents": parents, "adapter": None}

    async def drive() -> None:
        async with started(spec_of(base), Settings()) as warm:
            found = await results(warm.submit("a", "loglikelihood", [row] * 8), 8)
            assert [len(result["scores"]) for _, result in found] == [len(tokens)] * 8
            assert warm.restarts == 0

    asyncio.run(drive())


def test_kills_for_want_of_memory_are_read_where_they_are_told(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    assert memory_kills(groups, tmp_path) == 0
    groups.write_text("4:memory:/old\n0::/system.slice/alpaca.service\n")
    assert memory_kills(groups, tmp_path) == 0
    mine = tmp_path / "system.slice" / "alpaca.service"
    mine.mkdir(parents=True)
    (mine / "memory.events").write_text("low 0\nhigh 3\nmax 12\noom 2\noom_kill 7\noom_group_kill 0\n")
    assert memory_kills(groups, tmp_path) == 7
    assert memory_kills() >= 0


@pytest.mark.end_to_end
def test_a_kill_for_want_of_memory_counts_as_a_death_of_its_own(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    (tmp_path / "cgroup").write_text("0::/\n")
    events.write_text("oom 0\noom_kill 0\n")
    monkeypatch.setattr("alpaca_core.host.keeping.memory_kills", partial(memory_kills, tmp_path / "cgroup", tmp_path))

    async def drive() -> None:
        async with started(spec_of(base), Settings()) as warm:
            warm.submit("a", "generate", [row_of(None, 20_000)] * 3)
            weights = []
            for kills in (1, 1, 2):
                await wait_for(lambda: warm.scheduler.running == 3)
                events.write_text(f"oom {kills}\noom_kill {kills}\n")
                before = warm.restarts
                os.kill(warm.status().engine_pid or 0, signal.SIGKILL)
                await wait_for(lambda before=before: warm.restarts > before)
                weights.append({row.deaths for row in warm.scheduler._again})
            assert weights == [{1.0}, {1.25}, {2.25}]

    asyncio.run(drive())


@soaking
@pytest.mark.end_to_end
def test_adapters_that_nobody_names_leave_at_the_next_load(base: Path, folder: Path) -> None:
    async def drive() -> None:
        async with started(spec_of(base, "default", "poet"), Settings(idle=0.5)) as warm:

            async def load(name: str) -> tuple[str, set[str]]:
                reply = await warm.model(spec_of(base, name))
                assert warm.loaded is not None
                return reply.adapters[name], {adapter.name for adapter in warm.loaded.info.adapters}

            poet, both = await load("poet")
            assert len(both) == 2
            ticket = warm.submit("a", "generate", [row_of(poet)] * 20_000)
            pirate, beside = await load("pirate")
            assert warm.scheduler.waiting  # of those rows
            assert beside == {poet, pirate}
            done = ticket.results.qsize() + 20
            assert all("completion" in result for _, result in await results(ticket, done))
            warm.scheduler.drop(ticket)
            clerk, beside = await load("clerk")
            assert beside == {clerk}
            with pytest.raises(HostUnavailable, match="Ask it again"):
                warm.submit("a", "generate", [row_of(poet)])
            assert await load("poet") == (poet, {poet})

    asyncio.run(drive())


@soaking
@pytest.mark.end_to_end
def test_adapters_for_which_there_is_no_memory_are_not_tried_again_at_once(
    base: Path, deadly: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = tmp_path / "loads"
    monkeypatch.setenv("TESTS_SHORT", str(loads))

    async def drive() -> None:
        async with started(spec_of(base, "poet"), Settings()) as warm:
            for _ in range(3):
                with pytest.raises(NotEnoughMemory):
                    await warm.model(spec_of(base, "pirate"))
            reply = await warm.model(spec_of(base, "poet"))
            ((_, found),) = await results(warm.submit("a", "generate", [row_of(reply.adapters["poet"])]), 1)
            assert "completion" in found
        assert loads.read_text().split() == ["1", "2", "1"]

    asyncio.run(drive())
