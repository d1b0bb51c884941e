"""How fast a run's tasks were: added up by run, in the log, and on the page that the run leaves."""

import re
import time
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run

from alpaca_core import Completion, ModelSpec
from alpaca_core.metering import Speed
from alpaca_core.testing import FakeModel
from prefect_alpaca import tasks
from prefect_alpaca.flows import generate_and_judge
from prefect_alpaca.tasks import speed as room
from tests.core.test_metering import SlowModel

pytestmark = pytest.mark.usefixtures("prefect_api")


def test_the_tasks_of_a_run_are_added_up_and_those_of_another_left_out() -> None:
    @flow
    def run(times: int) -> tuple[Speed | None, Speed | None, int, float]:
        started = time.perf_counter()
        written = 0
        for _ in range(times):
            rows = tasks.values(Completion, tasks.generate(ModelSpec(), ["a", "b"]))
            written += sum(row.completion_tokens for row in rows if isinstance(row, Completion))
        clock = time.perf_counter() - started
        return room.speed_of_run(2), room.speed_of_run(2), written, clock

    with tasks.use_model(SlowModel("Because.")):
        for times in (1, 3):
            speed, again, written, clock = run(times)
            assert again is None
            assert speed is not None
            assert (speed.rows, speed.tokens_written) == (2, written)
            assert 0.04 * times <= speed.seconds <= clock


def test_no_task_and_no_run_mean_no_speed() -> None:
    with tasks.use_model(FakeModel("a")):
        tasks.generate.fn(ModelSpec(), ["a"])
    assert room.speed_of_run(1) is None


def test_runs_that_leave_no_page_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_RUNS", 2)

    @flow
    def run() -> str:
        tasks.generate(ModelSpec(), ["a"])
        return str(flow_run.id)

    with tasks.use_model(FakeModel("a")):
        runs = [run() for _ in range(4)]
    assert [each for each in runs if each in room._by_run] == runs[2:]


def test_a_page_says_how_fast_its_rows_were_done(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Speed] = []
    plain = room.note
    monkeypatch.setattr("prefect_alpaca.tasks.rows.note", lambda speed: noted.append(speed) or plain(speed))

    with tasks.use_model(SlowModel({"Is this": {"Yes": 0.9, "No": 0.1}}, "Come.")):
        state: Any = generate_and_judge(["Invite.", "Invite again."], candidates=1, return_state=True)
    found = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        (page,) = [each.data for each in client.read_artifacts(artifact_filter=found) if each.type == "markdown"]
    told = re.search(r" · ([\d.,]+) rows/s, ([\d.,]+) tokens/s", str(page))
    assert told
    seconds = sum(speed.seconds for speed in noted)
    assert len(noted) == 2
    assert float(told[1].replace(",", "")) == pytest.approx(2 / seconds, abs=0.06)
    tokens = sum(speed.tokens_read + speed.tokens_written for speed in noted)
    assert float(told[2].replace(",", "")) == pytest.approx(tokens / seconds, abs=0.6)
