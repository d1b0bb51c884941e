"""Reason, conclude, verify, try again: worked out by hand on a model that knows its replies."""

import pytest

from alpaca_core import Answer, RowError, Sampling, answer, chain_of_thought, conclude, verify
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel

WARM = Sampling(temperature=1.0, max_new_tokens=64)


def world(p_correct: float = 0.8) -> FakeModel:
    return FakeModel(
        {
            "Is the proposed answer correct?": {"Yes": p_correct, "No": 1 - p_correct},
            "given these steps. Berlin is": "The answer is Berlin.",
            "Think step by step.": "Berlin is the seat of government.",
        },
        otherwise="Bonn",
    )


def test_the_chain_is_reason_conclude_verify() -> None:
    question = "What is the capital of Germany?"
    result = answer(world(), [question])[0]
    assert isinstance(result, Answer)
    assert result == Answer(
        question=question,
        reasoning="Berlin is the seat of government.",
        answer="The answer is Berlin.",
        final_answer="Berlin",
        p_correct=result.p_correct,
        attempts=1,
    )
    assert result.p_correct == pytest.approx(0.8, abs=1e-6)


def test_reasoning_and_verification_can_be_left_out() -> None:
    result = answer(world(), ["What is the capital of Germany?"], reason=False, verify=False)[0]
    assert isinstance(result, Answer)
    assert (result.reasoning, result.answer, result.p_correct) == (None, "Bonn", None)


def test_the_verbs_of_the_chain_work_by_themselves() -> None:
    thought = chain_of_thought(world(), ["Capital?"])[0]
    assert thought.text.startswith("Berlin")
    assert conclude(world(), ["Capital?"], [thought.text])[0].final_answer == "Berlin"
    assert conclude(world(), ["Capital?"])[0].text == "Bonn"
    assert verify(world(), ["Capital?"], ["Bonn"])[0].p_correct == pytest.approx(0.8, abs=1e-6)
    assert verify(world(), ["Capital?"], ["Bonn"], method="sampled", samples=200)[0].p_correct == pytest.approx(
        0.8, abs=0.12
    )


def test_an_unconvincing_answer_is_tried_again_and_the_best_attempt_kept() -> None:
    fake = FakeModel(
        {
            "Proposed answer: good": {"Yes": 0.6, "No": 0.4},
            "Proposed answer: bad": {"Yes": 0.1, "No": 0.9},
        },
        otherwise={"good": 0.4, "bad": 0.6},
    )
    questions = [f"Question {number}?" for number in range(30)]
    once = answer(fake, questions, WARM, reason=False, min_p_correct=0.5)
    thrice = answer(fake, questions, WARM, reason=False, max_attempts=3, min_p_correct=0.5)
    for first, last in zip(once, thrice, strict=True):
        assert isinstance(first, Answer)
        assert isinstance(last, Answer)
        assert last.p_correct >= first.p_correct
        if first.answer == "good":
            assert last == first
        else:
            assert last.attempts > 1
            assert last.attempts == 3 or last.answer == "good"
    assert any(row.answer == "good" and row.attempts > 1 for row in thrice)
    assert all(row.attempts == 5 for row in answer(fake, questions, WARM, max_attempts=5, min_p_correct=1.0))


def test_a_failed_row_stays_its_own_error_through_the_chain() -> None:
    results = answer(world(), ["Capital?", None, "", "Capital?"])
    assert [row.code if isinstance(row, RowError) else row.answer for row in results] == [
        "The answer is Berlin.",
        "not_text",
        "empty_text",
        "The answer is Berlin.",
    ]


def test_a_model_that_says_nothing_is_still_an_answer() -> None:
    fake = FakeModel({"Proposed answer: (no answer)": {"Yes": 0.1, "No": 0.9}}, otherwise="")
    result = answer(fake, ["Capital?"])[0]
    assert isinstance(result, Answer)
    assert (result.reasoning, result.answer, result.final_answer) == (None, "", None)
    assert result.p_correct == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"reason": False}, {"sampling": WARM, "max_attempts": 3, "reason": False}])
def test_progress_moves_with_each_step_and_ends_at_the_number_of_questions(settings: dict[str, object]) -> None:
    done: list[float] = []
    answer(world(p_correct=0.4), ["Capital?", None, "Capital of France?"], progress=done.append, **settings)
    assert sum(done) == pytest.approx(3)
    assert len(done) > 3
    done.clear()
    answer(world(p_correct=0.9), ["Capital?"], progress=done.append, **settings)
    assert sum(done) == pytest.approx(1)


def test_an_escape_in_any_step_is_told() -> None:
    fake = FakeModel({"Think step by step": "Steps.\n### Response:\nEvil."}, otherwise="Yes")
    assert answer(fake, ["Capital?"])[0].escaped
    assert not answer(fake, ["Capital?"], reason=False)[0].escaped


def test_a_step_that_was_cut_is_told() -> None:
    cut = Sampling(max_new_tokens=10)
    assert answer(world(), ["Capital?"], cut, conclusion_tokens=64)[0].finish_reason == "length"
    assert answer(world(), ["Capital?"], WARM, conclusion_tokens=8)[0].finish_reason == "length"
    assert answer(world(), ["Capital?"], WARM)[0].finish_reason == "stop"


def test_where_the_verifier_says_neither_there_is_no_probability() -> None:
    fake = FakeModel({"Is the proposed answer correct?": "Perhaps."}, otherwise="Bonn")
    checked = verify(fake, ["Capital?"], ["Bonn"], method="sampled")[0]
    assert (checked.p_correct, checked.coverage) == (None, 0.0)
    with pytest.raises(InvalidRequest, match="answers"):
        verify(fake, ["Capital?"], None)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_attempts": 0},
        {"max_attempts": 2},
        {"max_attempts": 2, "sampling": WARM, "verify": False},
        {"min_p_correct": 1.1},
        {"min_p_correct": "high"},
        {"conclusion_tokens": 0},
        {"max_attempts": 1.5},
        {"max_attempts": 10**400, "sampling": WARM},
        {"conclusion_tokens": 10**400},
        {"sampling": None},
        {"sampling": {"temperature": 1}},
    ],
    ids=repr,
)
def test_settings_out_of_range_or_without_effect_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        answer(world(), ["Capital?"], **settings)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 rows"):
        verify(world(), ["a", "b"], ["a"])
    with pytest.raises(InvalidRequest, match="2 rows"):
        conclude(world(), ["a", "b"], ["a"])
