"""More replicas under load, what one and two are worth on two cores, and programs that cannot serve."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from alpaca_core.errors import HostUnavailable
from alpaca_core.host.client import HostModel
from alpaca_core.host.cluster import Replicas, run_ray
from alpaca_core.host.launcher import remote
from alpaca_core.model import ScoreRow
from alpaca_core.spec import ModelSpec
from tests.ray.conftest import TRIE, Expected, Serve, client, free_port, generated

pytestmark = pytest.mark.end_to_end
ALONE = """
import sys
from alpaca_core.host.server import run_tcp
from alpaca_core.spec import ModelSpec
run_tcp(ModelSpec(device="cpu"), "127.0.0.1", int(sys.argv[1]), None)
"""


def test_a_replica_is_added_under_load(serve: Serve, spec: ModelSpec, expected: Expected) -> None:
    with serve(spec, 1, 2) as served:
        assert len(served.replicas()) == 1
        model = client(served, spec)
        came = threading.Event()

        def watch() -> None:
            served.wait_for(2)
            came.set()

        threading.Thread(target=watch, daemon=True).start()
        ends = time.monotonic() + 180
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
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two replicas are compared on two cores, but there is one")
    rates = {}
    for count in (1, 2):
        with serve(ModelSpec(device="cpu"), count, count) as served:
            for core, status in zip(cores, served.wait_for(count).values(), strict=False):
                psutil.Process(status.engine_pid).cpu_affinity([core])
            rates[f"{count} on a core each"] = rate(client(served, ModelSpec(device="cpu")))
    rates["a host without Ray on both"] = _alone(free_port())
    with capsys.disabled():
        print(f"\njudged items/s, embedded model: {rates}")
    assert rates["2 on a core each"] > 1.3 * rates["1 on a core each"]


def rate(model: HostModel) -> float:
    """Judge for a while; return items a second."""
    rows = [ScoreRow(tuple(100 + (7 * number + place) % 5000 for place in range(64)), TRIE) for number in range(128)]
    list(model.loglikelihood(rows[:16]))
    started = time.perf_counter()
    assert len(list(model.loglikelihood(rows[16:]))) == len(rows) - 16
    return round((len(rows) - 16) / (time.perf_counter() - started), 2)


def _alone(port: int) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with subprocess.Popen([sys.executable, "-c", ALONE, str(port)], env=environment) as process:
        try:
            return rate(HostModel(ModelSpec(device="cpu"), lambda: remote(f"http://127.0.0.1:{port}")))
        finally:
            process.terminate()
