"""Progress: a bar for long work, none for short, and never a reason to fail."""

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterTaskRunId
from prefect.client.schemas.objects import Artifact
from prefect.runtime import task_run

from prefect_alpaca.tasks import progress as room

pytestmark = pytest.mark.usefixtures("prefect_api")


@task
def work(rows: int) -> str:
    """Finish rows one by one."""
    with room.progress_bar("rows done", rows) as advance:
        for _ in range(rows):
            advance(1)
    return str(task_run.id)


@flow
def run(rows: int) -> str:
    """Run the work as Prefect would."""
    return work(rows)


def bars_of(run_id: str) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(task_run_id=ArtifactFilterTaskRunId(any_=[run_id])))


def test_long_work_leaves_a_full_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 0.0)
    bars = [bar for bar in bars_of(run(3)) if bar.type == "progress"]
    assert [(bar.data, bar.description) for bar in bars] == [(100.0, "rows done")]


def test_short_work_leaves_none() -> None:
    assert [bar for bar in bars_of(run(3)) if bar.type == "progress"] == []


def test_a_bar_that_cannot_be_drawn_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise httpx.ConnectError("the server is away")

    monkeypatch.setattr(room, "PATIENCE", 0.0)
    monkeypatch.setattr(room, "create_progress_artifact", away)
    assert run(3)


def test_outside_a_run_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 0.0)
    monkeypatch.setattr(room, "create_progress_artifact", pytest.fail)
    with room.progress_bar("rows done", 2) as advance:
        advance(2)
