"""What the tests of flows share: reading back what a run left."""

import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

Left = Callable[[str], tuple[FlowRun, str, list[dict[str, Any]]]]


def artifacts_of(client: SyncPrefectClient, run_id: UUID) -> dict[str, Any]:
    """What a run left, by key. The API gives 200 artifacts at a time, so that it is asked about this run alone."""
    own = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    return {each.key: each.data for each in client.read_artifacts(flow_run_filter=own) if each.key}


@pytest.fixture
def left(prefect_api: None) -> Left:
    """A function: the newest run of a flow, its Markdown artifact, and its table artifact."""

    def read(flow: str) -> tuple[FlowRun, str, list[dict[str, Any]]]:
        with get_client(sync_client=True) as client:
            named = FlowFilter(name=FlowFilterName(any_=[flow]))
            run = client.read_flow_runs(flow_filter=named, sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
            found = artifacts_of(client, run.id)
        assert set(found) - {f"{flow}-review", f"{flow}-margins"} == {flow, f"{flow}-table"}
        return run, str(found[flow]), json.loads(str(found[f"{flow}-table"]))

    return read
