"""Hosts side by side: which one makes room for another model, which one stays, and one that nobody needs any more."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from alpaca_core.errors import NotEnoughMemory
from alpaca_core.host.application import application
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import connection, end_an_idle_one, hosts, status_of, stop
from alpaca_core.host.place import find_base_apart, key_of
from alpaca_core.model import GenerateRow
from alpaca_core.spec import ModelSpec, Sampling
from tests.engines.conftest import wrapped
from tests.host.conftest import NativeModel, ThreadedWarm, own_folder, processes, served, spec_of
from tests.waiting import until

SHORT = [GenerateRow((1, 2), Sampling(max_new_tokens=2))]
LONG = [GenerateRow((1, 2), Sampling(max_new_tokens=50_000))] * 2
_CROWDED = """
import os, sys
if "alpaca_core.host.engine" in sys.orig_argv:
    import psutil
    from alpaca_core.engines import opening
    from alpaca_core.errors import NotEnoughMemory
    plain = opening.open_model
    def others():
        for each in psutil.process_iter():
            try:
                mine = each.environ().get("ALPACA_RUNTIME") == os.environ["ALPACA_RUNTIME"]
                if mine and each.pid != os.getpid() and "alpaca_core.host.engine" in each.cmdline():
                    yield each
            except psutil.Error:
                pass
    def open_model(spec):
        if len(list(others())) >= 2:
            raise NotEnoughMemory("there is room for two engines. Use a smaller model.")
        return plain(spec)
    opening.open_model = open_model
"""
"""A device that has room for two engines, whichever: no part of the project, only of these tests' processes."""


@pytest.fixture
def crowded(cache: Path, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "sitecustomize.py").write_text(_CROWDED)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with own_folder(cache, PYTHONPATH=path) as folder:
        yield folder


def keys() -> set[str]:
    return {status.key for _, status in hosts()}


@pytest.mark.end_to_end
def test_a_model_that_finds_no_room_ends_the_host_that_has_been_idle_for_longest_and_no_busy_one(
    checkpoint: Callable[..., Path], crowded: Path
) -> None:
    specs = [spec_of(checkpoint(seed)) for seed in range(4)]
    key = [key_of(spec, find_base_apart(spec)) for spec in specs]
    for spec in (specs[0], specs[1], specs[0]):  # of the two the second has been idle for longer
        with at_host(spec, "auto") as model:
            assert len(list(model.generate(SHORT))) == 1
    assert keys() == {key[0], key[1]}
    with at_host(specs[2], "auto") as third, ThreadPoolExecutor(2) as pool:
        assert len(list(third.generate(SHORT))) == 1
        assert keys() == {key[0], key[2]}
        # both are busy now: neither makes room, and the next one says what it lacks
        with at_host(specs[0], "auto") as first:
            running = [model.generate(LONG) for model in (first, third)]
            calls = [pool.submit(next, each) for each in running]
            until(lambda: all(status.running for _, status in hosts()))
            with pytest.raises(NotEnoughMemory, match="room for two"), at_host(specs[3], "auto"):
                pass
            assert {key[0], key[2]} <= keys()
            assert all(status.restarts == 0 for _, status in hosts())
            assert not any(call.done() and call.exception() for call in calls)
            first.close()
            third.close()
    until(lambda: not any(status.running for _, status in hosts()))
    # not for the sake of itself, nor for a model of another device
    for path, status in hosts():
        if status.key == key[0]:
            assert stop(path)
    assert not end_an_idle_one(specs[2], key[2])
    assert not end_an_idle_one(spec_of(Path(specs[3].base_model), device="cuda:1"), key[3])
    assert key[2] in keys()
    assert end_an_idle_one(specs[3], key[3])
    assert key[2] not in keys()


def test_a_host_to_which_somebody_has_come_meanwhile_stays(
    make_network: Callable[..., Any], tokenizer: Any, runtime: Path
) -> None:
    """What is asked is what was seen: idle for so long. Whoever came since may be about to send rows."""
    warm: Any = ThreadedWarm(wrapped(NativeModel, tokenizer, make_network(max_position_embeddings=100_000)), 8)
    path, left = runtime / "x.sock", []

    def leave() -> None:
        left.append(True)
        path.unlink()

    with served(application(warm, leave=leave), path), connection(path, 20.0) as http:
        time.sleep(0.3)
        seen = warm.idle()
        body = {"rows": [{"prompt_ids": [1], "sampling": {"max_new_tokens": 90_000}, "adapter": None}]}
        with http.stream("POST", "/v1/generate", json=body):
            until(lambda: warm.scheduler.running)
            for idle in (0.0, seen, 1e-9):
                assert not stop(path, idle)
        until(lambda: not warm.scheduler.running)
        assert not stop(path, seen)  # it is idle again, but for less long
        assert not left
        assert status_of(path) is not None
        until(lambda: warm.idle() > seen)
        assert stop(path, seen)
        assert left


def test_spread_models_and_those_of_their_devices_make_room_for_one_another(
    make_network: Callable[..., Any], tokenizer: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("alpaca_core.host.place._DRIVER", runtime)
    two = ModelSpec(engine="vllm", tensor_parallel_size=2)
    for there, wanted, goes in (
        ("cuda:0+cuda:1+cuda:2+cuda:3", ModelSpec(device="cuda:1"), True),
        ("cuda:1", ModelSpec(device_map="auto"), True),
        ("cuda:1", two, True),
        ("cuda:2", two, False),
        ("cuda:2+cuda:3", two, False),
        ("cpu", ModelSpec(device_map="auto"), False),
        ("cuda:1", ModelSpec(), False),
    ):
        warm: Any = Placed(wrapped(NativeModel, tokenizer, make_network()), there)
        path = runtime / "x.sock"
        with served(application(warm, leave=path.unlink), path):
            assert end_an_idle_one(wanted, "another") == goes, (there, wanted)
        path.unlink(missing_ok=True)


class Placed(ThreadedWarm):
    """A host that is said to be on other devices than it is."""

    def __init__(self, model: Any, device: str) -> None:
        super().__init__(model, 8)
        self._device = device

    def status(self) -> Any:
        return super().status().model_copy(update={"device": self._device})


@pytest.mark.end_to_end
def test_a_host_that_nobody_needs_ends_by_itself(base: Path, cache: Path) -> None:
    with own_folder(cache, ALPACA_HOST_IDLE="1") as folder:
        with at_host(spec_of(base), "auto") as model:
            assert len(list(model.generate(SHORT))) == 1
            ((path, _),) = hosts()
            # not while it has something to do, however long that takes
            ((_, found),) = model.generate([GenerateRow((1,), Sampling(max_new_tokens=3000))])
            assert getattr(found, "finish_reason", found) == "length"
        until(lambda: not processes(folder), 15.0)
        assert not path.exists()
        with at_host(spec_of(base), "auto") as model:  # and begins anew for whoever comes then
            assert len(list(model.generate(SHORT))) == 1
