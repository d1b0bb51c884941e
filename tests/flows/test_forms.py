"""What a form sends, and what it refuses by itself: the parameters of all flows at once."""

import inspect
from typing import Any

import pytest
from prefect import Flow

import prefect_alpaca.flows
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca import tasks
from prefect_alpaca.tasks import use_model

pytestmark = pytest.mark.usefixtures("prefect_api")

FLOWS = {name: getattr(prefect_alpaca.flows, name) for name in prefect_alpaca.flows.__all__}
OPTIONAL = ("adapter", "instruction", "calibration", "reasoned_calibration", "policy")
EMPTIED = [
    (flow, name)
    for flow, parameters in ((name, inspect.signature(each.fn).parameters) for name, each in FLOWS.items())
    for name in OPTIONAL
    if name in parameters and "None" in str(parameters[name].annotation)
]


def test_every_flow_has_its_adapter_and_it_can_be_emptied() -> None:
    assert {flow for flow, name in EMPTIED if name == "adapter"} == set(FLOWS)


@pytest.mark.parametrize("blank", ["", " \n"], ids=["empty", "blank"])
@pytest.mark.parametrize(("flow", "name"), EMPTIED)
def test_an_emptied_field_is_none(flow: str, name: str, blank: str) -> None:
    validated = FLOWS[flow].validate_parameters({**_required(FLOWS[flow]), name: blank})
    assert validated[name] is None


@pytest.mark.parametrize("flow", ["answer_question", "rate_texts"])
def test_the_tasks_of_a_run_get_the_bare_base_for_an_emptied_adapter(
    flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = []
    for name in ("chain_of_thought", "rate"):

        def spy(*rows: object, **settings: object) -> object:
            adapters.append(settings["adapter"])
            raise InvalidRequest("enough")

        monkeypatch.setattr(tasks, name, spy)
    with use_model(FakeModel("Yes")), pytest.raises(InvalidRequest, match="enough"):
        FLOWS[flow](adapter="")
    assert adapters == [None]


def _required(flow: Flow[..., Any]) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(flow.fn).parameters.items()}
