"""Processes that die, hang, meet or run out of room: every call ends, with the results of a quiet run."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from alpaca_core.adapters import find_adapters
from alpaca_core.errors import DigestMismatch, HostUnavailable, InvalidAdapter
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import connection, stop
from alpaca_core.host.place import find_base_apart, key_of
from alpaca_core.model import GenerateRow, RowError
from alpaca_core.spec import ModelSpec, Sampling
from tests.host.conftest import (
    ADAPTERS,
    BREAKER,
    ENGINE,
    HANGER,
    KILLER,
    SERVER,
    engines,
    host_of,
    in_process,
    own_folder,
    processes,
    spec_of,
)
from tests.host.test_processes import work
from tests.waiting import until

KILLS = int(os.environ.get("ALPACA_SOAK_KILLS", "5"))
SEEDS = 6
LONG = Sampling(max_new_tokens=400)

OTHERS = r"has become another|have become others"


@pytest.fixture(scope="module")
def spec(base: Path) -> ModelSpec:
    return spec_of(base, *ADAPTERS)


@pytest.fixture(scope="module")
def expected(spec: ModelSpec, cache: Path) -> dict[int, Any]:
    with own_folder(cache), in_process(spec) as model:
        return {seed: work(model, seed, (*ADAPTERS, None)) for seed in range(SEEDS)}


def long_rows(count: int, tokens: int = 400) -> list[GenerateRow]:
    return [GenerateRow((place + 1, 7), Sampling(max_new_tokens=tokens)) for place in range(count)]


@pytest.mark.end_to_end
def test_calls_end_with_their_results_whoever_is_killed(
    spec: ModelSpec, expected: dict[int, Any], folder: Path
) -> None:
    draw = random.Random(int(os.environ.get("ALPACA_SOAK_SEED", "0")))
    over = threading.Event()
    ended: list[int] = []

    def client(number: int) -> None:
        while not over.is_set():
            with at_host(spec, "auto") as model:
                for _ in range(3):
                    seed = draw.randrange(SEEDS)
                    assert work(model, seed, (*ADAPTERS, None)) == expected[seed]
                    ended.append(number)

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client, number) for number in range(8)]
        try:
            until(lambda: ended or any(call.done() for call in calls), 120.0)
            for kill in range(KILLS):
                time.sleep(draw.uniform(0.0, 6.0))
                kind = SERVER if kill % 2 else ENGINE
                victims = until(lambda kind=kind: processes(folder, kind), 60.0)
                with suppress(psutil.NoSuchProcess):
                    draw.choice(victims).kill()
                assert len(engines(folder)) <= 2  # one that has been killed may still be going
            before = len(ended)
            until(lambda: len(ended) > before or any(call.done() for call in calls), 120.0)
        finally:
            over.set()
        for call in calls:
            call.result(timeout=240.0)
    assert set(ended) == set(range(8))
    status = host_of(folder)
    assert status is not None
    assert status.clients == status.waiting == status.running == 0


@pytest.mark.end_to_end
def test_one_host_starts_for_launchers_that_meet_over_what_dead_ones_left(spec: ModelSpec, folder: Path) -> None:
    key = key_of(spec, find_base_apart(spec))
    find_adapters(spec)  # digests are known, and need not be written
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(folder / f"{key}.sock"))
    stale.close()
    (folder / f"{key}.lock").write_text("4711")
    (folder / f"{key}.start").write_text("4711")
    (folder / f"{key}.log").mkdir(mode=0o700)
    (folder / f"{key}.log.1" / "full").mkdir(mode=0o700, parents=True)  # so that no log can be put aside
    with pytest.raises(HostUnavailable, match="cannot be written"), at_host(spec, "auto"):
        pass
    (folder / f"{key}.log").rmdir()
    shutil.rmtree(folder / f"{key}.log.1")
    program = (
        "import resource, sys, alpaca_core\n"
        "from alpaca_core import ModelSpec\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # nor can the host's log grow
        "with alpaca_core.load_model(ModelSpec.model_validate_json(sys.argv[1])) as model:\n"
        "    print(model.info.digest)\n"
    )
    command = [sys.executable, "-c", program, spec.model_dump_json()]
    environment = os.environ | {"ALPACA_HOST": "auto"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    clients = [subprocess.Popen(command, env=environment, **piped) for _ in range(3)]  # type: ignore[call-overload]
    told = [client.communicate(timeout=120) for client in clients]
    assert all(client.returncode == 0 for client in clients), told
    assert len({out for out, _ in told}) == 1
    assert len(processes(folder, SERVER)) == len(engines(folder)) == 1

    # SIGTERM lets rows end that can, cuts the others off, and leaves nothing; whoever was cut off asks again
    with at_host(spec, "auto") as model:
        rows = [*long_rows(2, 5), *long_rows(8, 3000)]
        running = model.generate(rows)
        found = [next(running)]
        (host,) = processes(folder, SERVER)
        host.terminate()
        began = time.monotonic()
        assert host.wait(20.0) in (0, None)
        assert time.monotonic() - began < 20.0
        found += running
        assert sorted(place for place, _ in found) == list(range(10))
    with at_host(spec, "auto"):  # which has been started already where rows were cut off
        (path,) = folder.glob("*.sock")
    assert len(engines(folder)) == 1
    assert stop(path)
    assert not path.exists()
    assert not engines(folder)
    assert until(lambda: not processes(folder))


@pytest.mark.end_to_end
def test_the_next_host_waits_for_the_engine_of_one_that_was_killed(
    spec: ModelSpec, base: Path, expected: dict[int, Any], folder: Path
) -> None:
    with at_host(spec, "auto") as model, ThreadPoolExecutor(1) as pool:
        (engine,), (host,) = engines(folder), processes(folder, SERVER)
        engine.suspend()
        host.kill()
        call = pool.submit(lambda: dict(model.generate(long_rows(3, 20))))
        for _ in range(20):
            time.sleep(0.1)
            assert [each.pid for each in engines(folder)] == [engine.pid]
        engine.resume()
        assert len(call.result(timeout=120.0)) == 3
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
        assert len(engines(folder)) == 1

        # no orphan is left where nobody comes next
        (host,) = processes(folder, SERVER)
        host.kill()
        until(lambda: not engines(folder), 5.0)

        # one that somebody else has started since has other adapters, and gets those of whoever asks again
        with at_host(spec_of(base), "auto") as other:
            list(other.generate([GenerateRow((1,), Sampling(max_new_tokens=1))]))
        assert work(model, 0, (*ADAPTERS, None)) == expected[0]


@pytest.mark.end_to_end
@pytest.mark.parametrize("in_mid_line", [False, True])
def test_no_engine_outlives_a_host_that_is_killed_while_they_speak(
    in_mid_line: bool, spec: ModelSpec, folder: Path
) -> None:
    """Results that nobody has read reset the connection; a request of which half has come is no JSON."""
    with at_host(spec, "auto"):
        pass
    (host,), (engine,), (path,) = processes(folder, SERVER), engines(folder), folder.glob("*.sock")
    tokens = [1] * 300_000 if in_mid_line else [1]  # more than a socket holds
    row = {"prompt_ids": tokens, "sampling": {"max_new_tokens": 200}, "adapter": None}

    def ask() -> None:
        with suppress(httpx.HTTPError), connection(path, 60.0) as http:
            http.post("/v1/generate", json={"rows": [row] * 4})

    with ThreadPoolExecutor(1) as pool:
        if in_mid_line:
            engine.suspend()
        call = pool.submit(ask)
        until(lambda: host_of(folder).running)  # type: ignore[union-attr]
        if not in_mid_line:
            host.suspend()
        time.sleep(2.0)  # for what the one sends while the other is frozen
        host.kill()
        engine.resume()
        until(lambda: not engines(folder), 5.0)
        call.result(10.0)


@pytest.mark.end_to_end
def test_rows_that_kill_or_hang_the_engine_cost_themselves_alone(spec: ModelSpec, deadly: Path) -> None:
    good = long_rows(12, 30)
    with in_process(spec) as alone:
        expected = [found for _, found in sorted(alone.generate(good), key=lambda each: each[0])]
    with at_host(spec, "auto") as model, at_host(spec, "auto") as neighbour, ThreadPoolExecutor(2) as pool:
        deadly_ones = (KILLER, HANGER) if KILLS > 5 else (KILLER,)  # each costs two loads, and a hang seconds more
        bad = [GenerateRow((token, 1), Sampling(max_new_tokens=5)) for token in deadly_ones]
        theirs = pool.submit(lambda: dict(neighbour.generate(good)))
        mine = dict(model.generate([*good[:3], bad[0], *good[3:6], *bad[1:], *good[6:]]))
        errors = [mine.pop(place) for place in (3, 7)[: len(bad)]]
        assert all(isinstance(error, RowError) and error.code == "engine_failed" for error in errors)
        assert [found for _, found in sorted(mine.items())] == expected
        assert [found for _, found in sorted(theirs.result(120.0).items())] == expected

        # an engine that is stopped from outside while it works is replaced, and the rows run again
        status = host_of(deadly)
        assert status is not None
        call = pool.submit(lambda: dict(model.generate(long_rows(4, 2000))))
        until(lambda: host_of(deadly).running >= 4)  # type: ignore[union-attr]
        began = time.monotonic()
        os.kill(status.engine_pid or 0, signal.SIGSTOP)
        until(lambda: host_of(deadly).restarts > status.restarts, 12.0)  # type: ignore[union-attr]
        assert time.monotonic() - began < 12.0
        assert len(call.result(timeout=120.0)) == 4
        assert len(engines(deadly)) == 1


@pytest.mark.end_to_end
def test_an_engine_that_broke_is_replaced_at_once_though_its_weights_cannot_be_freed(
    spec: ModelSpec, deadly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPACA_HOST_HANG", "1000")  # so that nothing is replaced for its silence
    good, bad = long_rows(3, 5), GenerateRow((BREAKER, 1), Sampling(max_new_tokens=5))
    with in_process(spec) as alone:
        expected = [found for _, found in sorted(alone.generate(good), key=lambda each: each[0])]
    with at_host(spec, "auto") as model, ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: dict(model.generate([bad, *good]))).result(timeout=120.0)
        error = found.pop(0)
        assert isinstance(error, RowError)
        assert error.code == "engine_failed"
        assert [found for _, found in sorted(found.items())] == expected


@pytest.mark.end_to_end
def test_a_model_that_is_replaced_on_the_disk_gets_a_host_of_its_own(
    checkpoint: Callable[..., Path], tmp_path: Path, folder: Path
) -> None:
    base = checkpoint(0, tmp_path / "base")
    spec = spec_of(base)
    rows = long_rows(4, 1500)
    with in_process(spec) as alone:
        before = dict(alone.generate(rows))
    with at_host(spec, "auto") as old:
        running = old.generate(rows)
        first = next(running)
        checkpoint(1, base)
        with in_process(spec) as alone, at_host(spec, "auto") as new:
            assert new.info.digest == alone.info.digest != old.info.digest
            assert dict(new.generate(rows[:2])) == dict(alone.generate(rows[:2])) != dict(list(before.items())[:2])
        assert dict([first, *running]) == before
        assert dict(old.generate(rows[:2])) == {place: before[place] for place in range(2)}
        assert len(processes(folder, SERVER)) == 2
        # with its files gone, the old model cannot be loaded again: a call says so, and gives nothing of the new one
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(lambda: list(old.generate(long_rows(4, 30_000))))
            until(lambda: any(status and status.running for status in statuses(folder)))
            for engine in engines(folder):
                engine.kill()
            with pytest.raises((DigestMismatch, HostUnavailable), match=OTHERS):
                call.result(timeout=120.0)
        with pytest.raises((DigestMismatch, HostUnavailable), match=OTHERS):
            list(old.generate(rows[:1]))


@pytest.mark.end_to_end
def test_an_adapter_that_cannot_be_read_any_more_costs_itself_alone(
    base: Path, folder: Path, tmp_path: Path, expected: dict[int, Any]
) -> None:
    spoilt = Path(shutil.copytree(base.parent / f"{base.name}-adapters" / "pirate", tmp_path / "spoilt"))
    config = json.loads((spoilt / "adapter_config.json").read_text())
    (spoilt / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))  # no other's bytes
    other = spec_of(base).model_copy(update={"adapter": str(spoilt)})
    with at_host(spec_of(base, *ADAPTERS), "auto") as model, at_host(other, "auto") as theirs:
        rows = [GenerateRow((1, 2), Sampling(max_new_tokens=3))]
        before = dict(theirs.generate(rows))
        (spoilt / "adapter_model.safetensors").rename(spoilt / "weights")
        (spoilt / "adapter_model.safetensors").mkdir()
        with pytest.raises(InvalidAdapter, match="no plain file"), at_host(other, "auto"):
            pass
        (engine,) = engines(folder)
        engine.kill()
        assert work(model, 0, (*ADAPTERS, None)) == expected[0]
        began = time.monotonic()
        with pytest.raises(InvalidAdapter, match="no plain file"):
            list(theirs.generate(rows))
        assert time.monotonic() - began < 60.0
        assert host_of(folder).state == "ready"  # type: ignore[union-attr]
        (spoilt / "adapter_model.safetensors").rmdir()
        (spoilt / "weights").rename(spoilt / "adapter_model.safetensors")
        assert dict(theirs.generate(rows)) == before


def statuses(folder: Path) -> list[Any]:
    from alpaca_core.host.neighbours import status_of

    return [status_of(path) for path in folder.glob("*.sock")]


@pytest.mark.end_to_end
def test_a_full_disk_is_told_at_once_and_is_no_end(spec: ModelSpec, folder: Path, tmp_path: Path) -> None:
    disk = folder / "d"
    disk.mkdir(mode=0o700)
    options = "size=64k,nr_inodes=3,mode=700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALPACA_RUNTIME", str(disk))
            (disk / "a").touch()
            (disk / "b").touch()  # no inode is left
            began = time.monotonic()
            with pytest.raises(HostUnavailable, match=r"ALPACA_RUNTIME|[Ff]ree space"), at_host(spec, "auto"):
                pass
            assert time.monotonic() - began < 20.0
    finally:
        for process in processes(disk):
            process.kill()
        until(lambda: not processes(disk))
        subprocess.run(["umount", str(disk)], check=True)
