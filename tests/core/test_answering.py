"""Reason, conclude, verify, try again: worked out by hand on a model that knows its replies."""

import pytest

from alpaca_core import Answer, RowError, Sampling, answer, chain_of_thought, conclude, verify
from alpaca_core.consistency import normal_form, pooled, tally
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel
from alpaca_core.verification import DRAW_TEMPERATURE, FIRST_DRAW

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


def doubtful() -> FakeModel:
    return FakeModel(
        {
            "Proposed answer: It is 10": {"Yes": 0.9, "No": 0.1},
            "Proposed answer: $10.00": {"Yes": 0.7, "No": 0.3},
            "Proposed answer: 7": {"Yes": 0.2, "No": 0.8},
            "Proposed answer": {"Yes": 0.4, "No": 0.6},
            "given these steps. So": {"It is 10 or so.": 0.2, "$10.00": 0.2, "7": 0.4, "Who could tell 3 from 4?": 0.2},
            "Think step by step": {"So.": 0.9, "": 0.1},
        },
        otherwise="7.0",
    )


@pytest.mark.parametrize("settings", [{}, {"reason": False}, {"verify": False}])
def test_samples_vote_as_the_single_verbs_would(settings: dict[str, bool]) -> None:
    questions = [f"Question {number}?" for number in range(12)]
    found = answer(doubtful(), questions, WARM, samples=6, **settings)
    winners = set()
    for question, row in zip(questions, found, strict=True):
        asked, indices = [question] * 6, range(6)
        steps: list[str | None] = [None] * 6
        if settings.get("reason", True):
            thoughts = chain_of_thought(doubtful(), asked, WARM, sample_indices=indices)
            steps = [thought.text.strip() or None for thought in thoughts]
        short = WARM.model_copy(update={"max_new_tokens": 32})
        said = conclude(doubtful(), asked, steps, short, sample_indices=indices)
        checks: list[float | None] = [None] * 6
        if settings.get("verify", True):
            checks = [check.p_correct for check in verify(doubtful(), asked, [each.text for each in said])]
        expected = tally([each.final_answer for each in said], checks)
        assert row == Answer(
            question=question,
            reasoning=steps[expected.winner],
            answer=said[expected.winner].text,
            final_answer=said[expected.winner].final_answer,
            p_correct=expected.p_correct,
            attempts=1,
            share=expected.share,
            votes=expected.votes,
        )
        winners.add(normal_form(row.final_answer))
    assert len(winners) > 1 or not settings.get("reason", True)


def test_one_sample_is_the_plain_answer() -> None:
    plain, one = (answer(doubtful(), ["Question?"], WARM, **settings) for settings in ({}, {"samples": 1}))
    assert plain == one
    assert (plain[0].share, plain[0].votes) == (None, ())


def test_a_questions_votes_do_not_depend_on_the_other_questions() -> None:
    questions = ["Question 1?", "", "Question 2?", "Question 3?"]
    together = answer(doubtful(), questions, WARM, samples=5)
    assert together == [answer(doubtful(), [question], WARM, samples=5)[0] for question in questions]
    assert together[1].code == "empty_text"


def test_samples_that_fail_have_no_say() -> None:
    replies = {"Proposed": "Yes", "given these": "10", "Think": {"So " * 256 + ".": 0.5, "So.": 0.5}}
    fake = FakeModel(replies, context_length=995)
    row = answer(fake, ["Question?"], WARM.model_copy(update={"max_new_tokens": 770}), samples=8)[0]
    assert isinstance(row, Answer)
    assert 0 < row.votes[0].count < 8
    assert row.share == 1.0


def test_samples_without_an_answer_leave_the_likeliest() -> None:
    fake = FakeModel({"Proposed": {"Yes": 0.3, "No": 0.7}}, otherwise="There are six or seven ways.")
    row = answer(fake, ["Question?"], WARM, samples=3)[0]
    assert (row.answer, row.share, row.votes) == ("There are six or seven ways.", 0.0, ())
    assert row.p_correct == pytest.approx(2 * 0.3 / 5)


def test_verification_weighs_agreement_with_its_own_answers() -> None:
    questions, answers = ["Question 1?", "Question 2?", ""], ["The answer is $7.", "ten", "7"]
    found = verify(doubtful(), questions, answers, method="consistent", samples=40, seed=5)
    plain = verify(doubtful(), questions, answers)
    sampling = Sampling(temperature=DRAW_TEMPERATURE, seed=5)
    for question, given, row, by_logits in zip(questions[:2], answers, found, plain, strict=False):
        asked, indices = [question] * 40, range(FIRST_DRAW, FIRST_DRAW + 40)
        thoughts = chain_of_thought(doubtful(), asked, sampling, sample_indices=indices)
        steps = [thought.text or None for thought in thoughts]
        short = sampling.model_copy(update={"max_new_tokens": 32})
        drawn = [each.final_answer for each in conclude(doubtful(), asked, steps, short, sample_indices=indices)]
        agreed = sum(each in ("7", "7.0") for each in drawn) if given != "ten" else 0
        assert row.share == agreed / 40
        assert row.p_correct == pytest.approx(pooled(agreed, 40, by_logits.p_correct))
        assert row.coverage == by_logits.coverage
        assert by_logits.share is None
    assert 0 < found[0].share < 1
    assert (found[1].share, found[2].code) == (0.0, "empty_text")
    assert 0 < found[1].p_correct < 0.05


def test_verification_without_yes_or_no_still_has_the_agreement() -> None:
    row = verify(FakeModel("Bonn"), ["Capital?"], ["bonn"], method="consistent", samples=4)[0]
    assert (row.coverage, row.share) == (0.0, 1.0)
    assert row.p_correct == pytest.approx(5 / 6)


def test_a_verification_whose_draws_all_fail_fails() -> None:
    row = verify(FakeModel("Yes", context_length=600), ["Q" * 200], ["Yes"], method="consistent")[0]
    assert row.code == "prompt_too_long"
    with pytest.raises(InvalidRequest, match="'consistent'"):
        verify(world(), ["Capital?"], ["Bonn"], method="guessed")
    with pytest.raises(InvalidRequest, match="samples"):
        verify(world(), ["Capital?"], ["Bonn"], method="consistent", samples=0)


def test_progress_of_a_consistent_verification_ends_at_the_number_of_rows() -> None:
    done: list[float] = []
    verify(world(), ["Capital?", "", "x"], ["Bonn"] * 3, method="consistent", samples=4, progress=done.append)
    assert sum(done) == pytest.approx(3)


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


@pytest.mark.parametrize(
    "settings",
    [{}, {"reason": False}, {"sampling": WARM, "max_attempts": 3, "reason": False}, {"sampling": WARM, "samples": 3}],
)
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
        {"samples": 0},
        {"samples": 2},
        {"samples": 1.5, "sampling": WARM},
        {"samples": 10**400, "sampling": WARM},
        {"samples": 2, "max_attempts": 2, "sampling": WARM},
        {"sampling": None},
        {"sampling": {"temperature": 1}},
    ],
    ids=repr,
)
def test_settings_out_of_range_or_without_effect_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        answer(world(), ["Capital?"], **settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "got 0."),
        (-3, "got -3."),
        (1.5, "got 1.5."),
        ("2", "got '2'."),
        (10**5000, "got a whole number of 16,610 bits."),
    ],
    ids=["zero", "negative", "float", "text", "huge"],
)
@pytest.mark.parametrize("name", ["max_attempts", "samples", "conclusion_tokens"])
def test_a_refused_number_is_told_and_a_huge_one_in_short(name: str, given: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as refused:
        answer(world(), ["Capital?"], WARM, **{name: given})
    assert said in str(refused.value)
    assert len(str(refused.value)) < 200


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 rows"):
        verify(world(), ["a", "b"], ["a"])
    with pytest.raises(InvalidRequest, match="2 rows"):
        conclude(world(), ["a", "b"], ["a"])
