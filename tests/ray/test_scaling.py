"""More replicas under load, what one and two are worth on two cores, and programs that cannot serve."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from alpaca_core.errors import HostUnavailable
from alpaca_core.host.cluster import Replicas, run_ray
from alpaca_core.model import ScoreRow
from alpaca_core.spec import ModelSpec
from tests.ray.conftest import TRIE, Expected, Serve, client, generated

pytestmark = pytest.mark.end_to_end
ROWS_JUDGED = 160
"""Of 1,024 in four requests: enough for both replicas at any time."""


def test_a_replica_is_added_under_load(serve: Serve, spec: ModelSpec, expected: Expected) -> None:
    with serve(spec, 1, 2) as served:
        assert len(served.replicas()) == 1
        model = client(served, spec)
        came = threading.Event()

        def watch() -> None:
            served.wait_for(2, 400)
            came.set()

        threading.Thread(target=watch, daemon=True).start()
        ends = time.monotonic() + 400
        calls = 0
        while time.monotonic() < ends and not (came.is_set() and calls > 1):
            calls += 1
            assert generated(model) == expected[0]
        assert came.is_set()
        before = served.wait_for(2)
        assert generated(model) == expected[0]
        after = served.wait_for(2)
        assert all(after[pid].rows > before[pid].rows for pid in before)


def test_a_model_that_cannot_be_loaded_ends_the_program(cluster: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster)
        with pytest.raises(HostUnavailable, match="no replica could be started") as raised:
            run_ray(ModelSpec(base_model=str(tmp_path)), "127.0.0.1", 8129, None, Replicas(1, 1, 0))
    assert str(tmp_path) in str(raised.value)


def test_two_replicas_do_more_than_one_on_one_core(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Each engine has a core; by the CPU time of the busier one, since other processes use the cores, too."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two replicas are compared on two cores, but there is one")
    spec = ModelSpec(device="cpu", batch_size=8)
    rows = [ScoreRow(tuple(100 + (7 * number + place) % 5000 for place in range(64)), TRIE) for number in range(1024)]
    rates = []
    for count in (1, 2):
        with serve(spec, count, count) as served:
            engines = [psutil.Process(status.engine_pid) for status in served.wait_for(count).values()]
            for core, engine in zip(cores, engines, strict=False):
                engine.cpu_affinity([core])
            model = client(served, spec)
            before, began = [busy(engine) for engine in engines], time.perf_counter()
            done = 0
            for _ in model.loglikelihood(rows):
                done += 1
                if done == ROWS_JUDGED:
                    break
            clock = time.perf_counter() - began
            most = max(busy(engine) - spent for engine, spent in zip(engines, before, strict=True))
            rates.append((round(done / most, 2), round(done / clock, 2)))
    with capsys.disabled():
        print(f"\nrows a second, of the busiest engine's CPU and of the clock: one replica {rates[0]}, two {rates[1]}")
    assert rates[1][0] > 1.5 * rates[0][0]


def busy(process: psutil.Process) -> float:
    """Seconds of CPU that a process has had."""
    times = process.cpu_times()
    return float(times.user + times.system)
