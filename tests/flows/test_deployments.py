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
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

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
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def prefect(*arguments: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """The API of a server with our deployments, and a worker that waits in somebody else's project."""
    place = tmp_path_factory.mktemp("prefect")
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
    }
    server = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    worker = (sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--limit", "1")
    with (
        running(*server, cwd=place, environment=environment, log=place / "server.log"),
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as api,
    ):
        wait_for(lambda: api.api_healthcheck() is None, place / "server.log")
        prefect("work-pool", "create", "gpu", "--type", "process", environment=environment)
        prefect("deploy", "--all", environment=environment)
        with running(*worker, cwd=elsewhere, environment=environment, log=place / "worker.log"):
            yield api


def wait_for(happened: Any, log: Path | None = None) -> None:
    end = time.monotonic() + PATIENCE
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
