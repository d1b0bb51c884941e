"""`prefect.yaml` for real: a server, a worker in a folder with its own tasks/, and a run of each deployment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from alpaca_core.host.neighbours import hosts, stop

from .conftest import artifacts_of

ROOT = Path(__file__).parents[2]
FLOWS = [
    "answer-question",
    "cascade-texts",
    "classify-texts",
    "compare-texts",
    "find-outliers",
    "generate-and-judge",
    "judge-texts",
    "rate-texts",
]
PATIENCE = 600.0
"""Seconds; a run takes about ten on an idle machine, and they run one after another."""

pytestmark = pytest.mark.end_to_end


@contextmanager
def running(*command: str, cwd: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A process in a group of its own, which is ended, with the runs that it started, at the end of the block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def prefect(*arguments: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WATCH = """
import atexit, os, pathlib, sys
if run := os.environ.get("PREFECT__FLOW_RUN_ID"):
    note = lambda: (pathlib.Path(os.environ["WATCHED"]) / run).write_text(str("torch" in sys.modules))
    atexit.register(note)
"""


def watch(place: Path) -> None:
    """Let each flow run write down, as it ends, whether its process has imported torch."""
    for name in ("watch", "watched"):
        (place / name).mkdir()
    (place / "watch" / "sitecustomize.py").write_text(WATCH)


@contextmanager
def hosts_of(runtime: Path) -> Iterator[None]:
    """Hosts outlive the runs that start them; these end with the block, and are looked at from this process, too."""
    before = os.environ.get("ALPACA_RUNTIME")
    os.environ["ALPACA_RUNTIME"] = str(runtime)
    try:
        yield
    finally:
        assert [path for path, _ in list(hosts()) if not stop(path)] == []
        os.environ.pop("ALPACA_RUNTIME")
        if before:
            os.environ["ALPACA_RUNTIME"] = before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[SyncPrefectClient]:
    """The API of a server with our deployments, and a worker that waits in somebody else's project."""
    elsewhere = place / "project"
    for name in ("tasks", "flows"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text(f"raise RuntimeError('this {name}/ is not of prefect-alpaca')")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(place / "home"),
        "PREFECT_API_URL": url,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "ALPACA_RUNTIME": str(place / "runtime"),
        "PYTHONPATH": str(place / "watch"),
        "WATCHED": str(place / "watched"),
    }
    watch(place)
    server = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    worker = (sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--limit", "2")
    with (
        running(*server, cwd=place, environment=environment, log=place / "server.log"),
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as api,
    ):
        wait_for(lambda: api.api_healthcheck() is None, place / "server.log")
        prefect("work-pool", "create", "gpu", "--type", "process", environment=environment)
        prefect("deploy", "--all", environment=environment)
        with (
            running(*worker, cwd=elsewhere, environment=environment, log=place / "worker.log"),
            hosts_of(place / "runtime"),
        ):
            yield api


def wait_for(happened: Any, log: Path | None = None, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, log.read_text() if log else "nothing happened in time"
        time.sleep(0.5)


def finished(client: SyncPrefectClient, run: UUID) -> FlowRun:
    wait_for(lambda: (state := client.read_flow_run(run).state) is not None and state.is_final())
    return client.read_flow_run(run)


def test_each_deployment_runs_to_completed_with_its_defaults(client: SyncPrefectClient) -> None:
    started = {
        flow: client.create_flow_run_from_deployment(client.read_deployment_by_name(f"{flow}/{flow}").id).id
        for flow in FLOWS
    }
    for flow, run in started.items():
        done = finished(client, run)
        assert done.state is not None
        assert done.state.is_completed(), (flow, done.state)
        artifacts = artifacts_of(client, run)
        assert str(artifacts[flow]).startswith("# ")
        assert "smollm2" in str(artifacts[flow])
        rows = json.loads(str(artifacts[f"{flow}-table"]))
        assert rows
        assert all(row["error"] is None for row in rows)


def test_all_runs_shared_one_warm_model_and_none_imported_torch(client: SyncPrefectClient, place: Path) -> None:
    runs = [run.id for run in client.read_flow_runs(limit=200) if run.state and run.state.is_completed()]
    assert len(runs) >= len(FLOWS)
    wait_for(lambda: {str(run) for run in runs} <= {path.name for path in (place / "watched").iterdir()})
    assert {path.read_text() for path in (place / "watched").iterdir()} == {"False"}
    (status,) = [status for _, status in hosts()]
    assert status.restarts == 0
    assert status.rows > len(FLOWS)


def test_cancelling_a_run_frees_the_engine_and_hurts_no_other(client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name("answer-question/answer-question").id
    long = {"questions": [f"Tell a long story about alpaca number {number}." for number in range(200)]}
    cancelled = client.create_flow_run_from_deployment(deployment, parameters=long).id
    wait_for(lambda: sum(status.running for _, status in hosts()) > 8)
    other = client.create_flow_run_from_deployment(deployment).id
    client.set_flow_run_state(cancelled, State(type=StateType.CANCELLING), force=True)
    wait_for(lambda: sum(status.running + status.waiting for _, status in hosts()) < 8, seconds=10.0)
    wait_for(lambda: (state := client.read_flow_run(cancelled).state) is not None and state.is_cancelled())
    done = finished(client, other)
    assert done.state is not None
    assert done.state.is_completed()


def test_every_field_of_every_form_is_described(client: SyncPrefectClient) -> None:
    for flow in FLOWS:
        deployment = client.read_deployment_by_name(f"{flow}/{flow}")
        assert deployment.description
        assert deployment.tags
        schema = deployment.parameter_openapi_schema
        assert schema is not None
        models = [schema, *schema["definitions"].values()]
        fields = {name: field for model in models for name, field in model["properties"].items()}
        assert [name for name, field in fields.items() if not field.get("description")] == []
        assert [name for name in schema["properties"] if "default" not in schema["properties"][name]] == []
        assert schema.get("required", []) == []


@pytest.mark.parametrize(
    "parameters",
    [
        {"questions": []},
        {"min_p_correct": 2},
        {"max_attempts": 0},
        {"sampling": {"temperatur": 1}},
        {"sampling": {"temperature": -1}},
        {"model": {"quantization": "int3"}},
    ],
)
def test_the_server_refuses_parameters_out_of_range(client: SyncPrefectClient, parameters: dict[str, Any]) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    deployment = client.read_deployment_by_name("answer-question/answer-question")
    with pytest.raises(PrefectHTTPStatusError, match="409"):
        client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
