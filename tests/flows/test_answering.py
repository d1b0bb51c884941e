"""The flow `answer-question` equals the core's `answer`, and leaves what a person can read."""

from typing import Any

import pytest
from prefect.client.schemas.objects import State

import alpaca_core
from alpaca_core import Answer, ModelSpec, RowError, Sampling
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import answer_question
from prefect_alpaca.flows.report import inline
from prefect_alpaca.tasks import use_model, values

from .conftest import Left

pytestmark = pytest.mark.usefixtures("prefect_api")

FAKE = FakeModel(
    {
        "Proposed answer: 10": {"Yes": 0.9, "No": 0.1},
        "Proposed answer: 7": {"Yes": 0.2, "No": 0.8},
        "Proposed answer": {"Yes": 0.4, "No": 0.6},
        "given these steps": {"10": 0.3, "7": 0.3, "It is 8 or 9.": 0.4},
        "Think step by step": {"5 and 5.": 0.5, "Let me *think* | <b>hard</b>.": 0.5},
    },
    "Straight away.",
)
QUESTIONS = ["How many pierogi?", "  ", "How many cans?", "How many alpacas?"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reason": False},
        {"verify": False},
        {"reason": False, "verify": False, "conclusion_tokens": 3},
        {"sampling": Sampling(temperature=1.0, seed=3), "max_attempts": 4, "min_p_correct": 0.8},
        {"sampling": Sampling(temperature=1.5, max_new_tokens=9), "max_attempts": 3, "min_p_correct": 1.0},
        {"sampling": Sampling(temperature=1.0, seed=3), "samples": 5},
        {"sampling": Sampling(temperature=1.0), "samples": 4, "verify": False, "reason": False},
    ],
)
def test_the_flow_equals_the_core(settings: dict[str, Any]) -> None:
    sampling = settings.pop("sampling", Sampling(max_new_tokens=128))
    expected = alpaca_core.answer(FAKE, QUESTIONS, sampling, **settings)
    with use_model(FAKE):
        rows = answer_question(QUESTIONS, sampling=sampling, **settings)
    assert values(Answer, rows) == expected
    assert any(isinstance(row, RowError) for row in expected)


def test_a_run_has_a_name_a_page_and_a_table(left: Left) -> None:
    with use_model(FAKE):
        rows = answer_question(QUESTIONS, sampling=Sampling(temperature=1.0), max_attempts=3, min_p_correct=0.8)
    run, page, table = left("answer-question")
    assert run.name == "answer 4 questions"
    assert "How many pierogi?" in page
    assert "1 of 4 failed" in page
    assert FAKE.info.digest[:12] in page
    assert "<b>" not in page
    assert [row["attempts"] for row in table] == [row.get("attempts") for row in rows]
    assert [row["error"] for row in table] == [None, inline(rows[1]["message"]), None, None]
    assert all(set(row) == set(table[0]) for row in table)


def test_votes_are_shown_on_the_page_and_in_the_table(left: Left) -> None:
    with use_model(FAKE):
        rows = answer_question(QUESTIONS, sampling=Sampling(temperature=1.0), samples=5)
    _, page, table = left("answer-question")
    for row in rows:
        for vote in row.get("votes", []):
            assert f"| {vote['answer']} | {vote['count']} | {vote['share']:.2f} | {vote['p_correct']:.2f} |" in page
    assert page.count("Agreement") == 3
    assert [row["share"] for row in table] == [row.get("share") for row in rows]


def test_the_defaults_run_as_they_are(left: Left) -> None:
    with use_model(FAKE):
        state = answer_question(return_state=True)
    assert state.is_completed()
    assert left("answer-question")[0].name == "answer 1 question"


def test_a_run_in_which_everything_failed_fails_and_says_why(left: Left) -> None:
    with use_model(FAKE):
        state: State[Any] = answer_question(["", "\t"], return_state=True)
    assert state.is_failed()
    assert "all 2 rows failed" in str(state.message)
    assert "2 of 2 failed" in left("answer-question")[1]
    with pytest.raises(AlpacaError, match="all 2 rows failed"):
        state.result()


def test_settings_without_effect_fail_the_run_before_a_model_is_loaded() -> None:
    with pytest.raises(InvalidRequest, match="max_attempts=2 has no effect"):
        answer_question(["How many?"], max_attempts=2, model=ModelSpec(base_model="no such model"))
