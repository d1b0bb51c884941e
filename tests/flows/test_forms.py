"""What a form sends, and what it refuses by itself: the parameters of all flows at once."""

import inspect
from typing import Any

import pytest
from prefect import Flow
from prefect.exceptions import ParameterTypeError

import prefect_alpaca.flows
from alpaca_core import answering, judging
from alpaca_core.answering import MOST_ATTEMPTS
from alpaca_core.errors import InvalidRequest
from alpaca_core.labels import MOST_LABELS
from alpaca_core.spec import MOST_NEW_TOKENS, SEEDS
from alpaca_core.testing import FakeModel
from alpaca_core.uses import MOST_REFERENCES
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


BOUNDS = [
    ("answer_question", "max_attempts", 1, MOST_ATTEMPTS),
    ("answer_question", "samples", 1, answering.MOST_SAMPLES),
    ("answer_question", "conclusion_tokens", 1, MOST_NEW_TOKENS),
    ("answer_question", "min_p_correct", 0.0, 1.0),
    ("judge_texts", "samples", 1, judging.MOST_SAMPLES),
    ("judge_texts", "seed", 0, SEEDS - 1),
    ("judge_texts", "min_coverage", 0.0, 1.0),
    ("classify_texts", "min_coverage", 0.0, 1.0),
    ("compare_texts", "min_coverage", 0.0, 1.0),
    ("cascade_texts", "margin", 0.0, 1.0),
    ("find_outliers", "reference", ["x"] * 2, ["x"] * MOST_REFERENCES),
    *(
        (flow, "labels", ["x"] * 2, ["x"] * MOST_LABELS)
        for flow in FLOWS
        if "labels" in FLOWS[flow].parameters.properties
    ),
]
"""The least and the most that the core takes."""


@pytest.mark.parametrize(
    ("flow", "name", "least", "most"), BOUNDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_form_refuses_exactly_what_the_core_refuses(flow: str, name: str, least: Any, most: Any) -> None:
    given = _required(FLOWS[flow])
    for fine in (least, most):
        assert FLOWS[flow].validate_parameters({**given, name: fine})[name] == fine
    beyond = (least[:-1], [*most, "x"]) if isinstance(most, list) else (least - 1, most + 1)
    for wrong in beyond:
        with pytest.raises(ParameterTypeError, match=name):
            FLOWS[flow].validate_parameters({**given, name: wrong})


def test_every_number_of_every_form_is_looked_at() -> None:
    """Those that the core bounds by themselves stand above; the others say why not."""
    others = {
        "candidates": "the flow's own, 1 to 64",
        "ask_timeout": "Prefect's",
        "worst": "bounded by the other end of the scale",
        "best": "bounded by the other end of the scale",
    }
    numbers = {
        (flow, name)
        for flow, each in FLOWS.items()
        for name, field in each.parameters.properties.items()
        if field.get("type") in {"integer", "number"}
    }
    assert {each for each in numbers if each[1] not in others} == {
        (flow, name) for flow, name, _, most in BOUNDS if not isinstance(most, list)
    }


def _required(flow: Flow[..., Any]) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(flow.fn).parameters.items()}
