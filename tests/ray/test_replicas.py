"""Two replicas on two nodes behind one address: the same rows as in this process, whatever dies meanwhile."""

import os
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from alpaca_core.errors import InvalidRequest
from alpaca_core.host.client import HostModel
from alpaca_core.host.protocol import GenerateJson
from alpaca_core.model import GenerateRow
from alpaca_core.spec import ModelSpec, Sampling
from tests.ray.conftest import (
    LONG,
    QUESTIONS,
    ROWS,
    TOKEN,
    Expected,
    Generated,
    Serve,
    Served,
    client,
    generated,
    judged,
)

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def two(serve: Serve, spec: ModelSpec) -> Iterator[Served]:
    with serve(spec) as served:
        yield served


def test_replicas_share_the_rows_of_a_call_and_change_none(two: Served, spec: ModelSpec, expected: Expected) -> None:
    before = two.wait_for(2)
    model = client(two, spec)
    assert generated(model) == expected[0]
    assert judged(model) == expected[1]
    after = two.wait_for(2)
    done = [after[pid].rows - before[pid].rows for pid in before]
    assert sum(done) == len(ROWS) + len(QUESTIONS)
    assert min(done) >= len(ROWS) // 4


def test_results_come_through_the_proxy_as_rows_end(two: Served) -> None:
    rows = [LONG, GenerateRow((5, 6), Sampling(max_new_tokens=1))] * 64
    body = {"rows": [GenerateJson.of(row).model_dump(mode="json") for row in rows]}
    started = time.monotonic()
    times = []
    with two.http() as http, http.stream("POST", "/v1/generate", json=body) as response:
        times = [time.monotonic() - started for line in response.iter_lines() if line]
    assert len(times) == len(rows)
    assert times[0] < 0.5 * times[-1]


def test_a_client_that_hangs_up_takes_its_rows_out(two: Served) -> None:
    body = {"rows": [GenerateJson.of(LONG).model_dump(mode="json")] * 1024}
    with two.http() as http, http.stream("POST", "/v1/generate", json=body) as response:
        next(response.iter_lines())
        done = max(status.rows for status in two.replicas().values())
    time.sleep(2.0)
    left = two.replicas()
    assert [status.waiting + status.running for status in left.values()] == [0] * len(left)
    assert max(status.rows for status in left.values()) < done + 900


def test_the_token_is_asked_for_behind_the_proxy(two: Served) -> None:
    assert httpx.get(f"{two.url}/health").status_code == 200
    for path in ("/v1/status", "/metrics", "/v1/tokenizer"):
        assert httpx.get(f"{two.url}{path}").status_code == 401
        assert httpx.get(f"{two.url}{path}", headers={"Authorization": f"Bearer {TOKEN}x"}).status_code == 401
    assert httpx.post(f"{two.url}/v1/generate", json={"rows": []}).status_code == 401


def test_replicas_load_no_other_adapter_on_a_clients_word(two: Served, spec: ModelSpec) -> None:
    with two.http() as http:
        told = http.post("/v1/stop", json={}).json()["error"]
    assert told["type"] == "InvalidRequest"
    other = spec.model_copy(update={"quantization": "int8"})
    with pytest.raises(InvalidRequest, match="this host keeps"):
        HostModel(other, two.http, patience=1.0)


@pytest.mark.parametrize("victim", ["pid", "engine_pid"])
def test_no_row_is_lost_when_a_replica_is_killed(two: Served, spec: ModelSpec, expected: Expected, victim: str) -> None:
    before = two.wait_for(2)
    model = client(two, spec)
    found: Generated = {}
    for place, result in model.generate(ROWS):
        assert place not in found
        found[place] = result
        if len(found) == 100:
            busiest = max(two.replicas().values(), key=lambda status: status.running)
            os.kill(getattr(busiest, victim), signal.SIGKILL)
    assert found == expected[0]
    after = two.wait_for(2)
    assert (set(after) == set(before)) == (victim == "engine_pid")
    assert sum(status.restarts for status in after.values()) == (victim == "engine_pid")
    for engine in {status.engine_pid for status in before.values()} - {each.engine_pid for each in after.values()}:
        assert engine is not None
        assert not psutil.pid_exists(engine)
