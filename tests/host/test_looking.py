"""What people, the doctor and Prometheus are told of a host, against the process itself and Prometheus' own parser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from alpaca_core.host.application import application
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import connection
from alpaca_core.host.protocol import Status
from prefect_alpaca.flows import cli, doctor
from tests.engines.conftest import wrapped
from tests.host.conftest import ADAPTERS, NativeModel, ThreadedWarm, host_of, served, spec_of
from tests.host.test_processes import work

GIB = 2**30

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def status(base: Path, shared: Path) -> Iterator[Status]:
    """Of a host that has worked, and has nothing to do now."""
    with at_host(spec_of(base, *ADAPTERS), "auto") as model:
        work(model, 0, ADAPTERS)
        work(model, 1, ADAPTERS)
        found = host_of(shared)
        assert found is not None
        yield found


def check_line(told: str, status: Status) -> None:
    """Model, digest, memory, queue, tokens/s and uptime, however the line is wrapped."""
    flat, info = "".join(told.split()), status.info
    assert info is not None
    for part in (status.key[:8], info.name, info.digest[:12], "0rowswait,0run"):
        assert part in flat
    assert f"{info.memory_gib:.2f}GiBofweightsoncpu" in flat
    assert "GiBofmainmemory" in flat
    assert "tokens/s" in flat
    assert f"{status.rows}rowssofar" in flat
    assert "up" in flat


def test_host_status_tells_model_digest_memory_queue_speed_and_uptime(
    status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["host", "status"]) == 0
    check_line(capsys.readouterr().out, status)
    assert cli.main(["host", "status", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert status.info is not None
    assert told["info"]["digest"] == status.info.digest
    assert "chat_template" not in told["info"]
    resident = psutil.Process(status.engine_pid).memory_info().rss / GIB
    assert told["memory_gib"] == pytest.approx(resident, rel=0.1)
    assert told["uptime"] >= status.uptime > 0
    assert told["rows"] == status.rows == 2 * 24
    assert told["tokens"] == status.tokens > 0
    assert (told["waiting"], told["running"], told["clients"]) == (0, 0, 0)


def test_the_doctor_tells_the_same_and_what_to_do_with_one_that_failed(
    status: Status, make_network: Any, tokenizer: Any, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALPACA_HOST", raising=False)
    (check,) = doctor._hosts()
    assert (check.name, check.state) == ("host", "ok")
    check_line(check.found, status)
    monkeypatch.setenv("ALPACA_HOST", "auto")
    assert [each.found for each in doctor._hosts()][1:] == ["ALPACA_HOST=auto"]
    monkeypatch.setenv("ALPACA_HOST", "http://127.0.0.1:9")
    _, check = doctor._hosts()
    assert (check.state, "does not answer as a host" in check.found) == ("broken", True)

    class Failed(ThreadedWarm):
        def status(self) -> Status:
            return super().status().model_copy(update={"state": "failed", "info": None})

    warm: Any = Failed(wrapped(NativeModel, tokenizer, make_network()), 8)
    with served(application(warm)) as url:
        monkeypatch.setenv("ALPACA_HOST", url)
        _, check = doctor._hosts()
        assert (check.state, url in check.found) == ("broken", True)
        assert "alpaca host stop" in check.remedy


def test_no_host_is_no_fault(
    runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALPACA_HOST", raising=False)
    (check,) = doctor._hosts()
    assert check.state == "ok"
    assert cli.main(["host", "status"]) == 0
    assert "no host" in capsys.readouterr().out
    assert cli.main(["host", "stop", "0123"]) == 2
    assert "no host of this machine has a key like 0123" in capsys.readouterr().err


def test_prometheus_reads_what_the_status_says(status: Status, shared: Path) -> None:
    (path,) = shared.glob("*.sock")
    with connection(path, 20.0) as http:
        reply = http.get("/metrics").raise_for_status()
    assert reply.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(reply.text))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    samples = {sample.name: sample for family in families for sample in family.samples}
    info = status.info
    assert info is not None
    assert samples.pop("alpaca_model").labels == {"model": info.name, "digest": info.digest[:12]}
    found = {name: sample.value for name, sample in samples.items()}
    assert found.pop("alpaca_uptime_seconds") >= status.uptime
    assert found.pop("alpaca_engine_resident_bytes") == pytest.approx(status.memory_gib * GIB, rel=0.1)
    assert found.pop("alpaca_tokens_per_second") >= 0
    assert found == {
        "alpaca_ready": 1,
        "alpaca_rows_waiting": 0,
        "alpaca_rows_running": 0,
        "alpaca_rows_waiting_limit": status.queue_limit,
        "alpaca_clients": 0,
        "alpaca_weights_bytes": pytest.approx(info.memory_gib * GIB),
        "alpaca_rows_total": status.rows,
        "alpaca_tokens_total": status.tokens,
        "alpaca_engine_restarts_total": status.restarts,
    }
    documented = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    assert [name for name in found if f"`{name}`" not in documented] == []
