"""Self-consistency: grouping against brute force, the normal form against fractions, the combination by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core.consistency import PRIOR_DRAWS, agreeing, group, normal_form, pooled, tally

WRITTEN = [
    "10",
    " 10.0 ",
    "$10",
    "10.00",
    "+10",
    "-10",
    "１０",
    "10%",
    "10 %",
    "10.0 cans",
    "$10 cans",
    "7",
    "7 cans",
    "7 bags",
    "ten",
    "Ten",
    None,
]
P_TRUE = st.one_of(st.none(), st.floats(0, 1))
SAMPLES = st.lists(st.tuples(st.sampled_from(WRITTEN), P_TRUE), min_size=1, max_size=8)


@pytest.mark.parametrize(
    "same",
    [
        ["1000", "1,000", "$1,000.00", "1000.", "+1000", "€ 1000", "\\$1,000", "１０００", "01000"],
        ["0.5", ".5", "0.50", "$.50", "-0.5".lstrip("-")],
        ["-3", "\N{MINUS SIGN}3", "-3.0", "-$3", "$-3"],
        ["0", "-0", "0.000", "00"],
        ["50%", "50 %", "50.0%", "50\\%"],
        ["1,000.0 cans", "$1000 Cans", "1000  cans", "1000 € cans"],
        ["New York", "new  york", " NEW YORK", "ｎｅｗ york"],
        ["1,000,000", "1000000"],
    ],
)
def test_answers_that_say_the_same_have_one_form(same: list[str]) -> None:
    assert len({normal_form(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    "apart",
    [
        ["10", "-10", "10%", "100", "1.0", "10 km", "10 miles", "0.10", "010.1", "10 x"],
        ["1, 2", "12", "1,2", "1 2", "1,23"],
        ["12:30", "1230", "12.30", "12/30"],
        ["", "$", ".", "-", "%", ",", "0"],
        ["50¢", "50"],
        ["Paris", "Paris, France", "pari"],
    ],
)
def test_answers_that_say_something_else_stay_apart(apart: list[str]) -> None:
    assert len({normal_form(answer) for answer in apart}) == len(apart)


@given(st.decimals(-(10**9), 10**9, places=4), st.sampled_from(["{}", "{:,}", "${:,}", " {:f} ", "{:,}000", "0{}"]))
def test_a_number_keeps_its_value_however_it_is_written(number: object, written: str) -> None:
    text = written.format(number).replace("$-", "-$").replace("0-", "-0")
    assert Fraction(normal_form(text)) == Fraction(str(number))


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40), st.integers(0, 9), st.integers(0, 9))
def test_two_numbers_have_one_form_only_if_they_are_equal(one: int, other: int, shift: int, far: int) -> None:
    forms = [normal_form(f"{Fraction(n, 1)}.{'0' * s}") for n, s in ((one, shift), (other, far))]
    assert (forms[0] == forms[1]) == (one == other)


@given(st.text())
def test_a_form_is_its_own_form(answer: str) -> None:
    assert normal_form(normal_form(answer)) == normal_form(answer)


def test_a_long_number_is_still_a_number() -> None:
    assert normal_form("$" + "9" * 100_000 + ".0") == "9" * 100_000


def brute_force(answers: list[str | None]) -> set[frozenset[int]]:
    """Samples in one group with each that says the same, however far that leads."""
    forms = {place: normal_form(answer) for place, answer in enumerate(answers) if answer is not None}

    def same(one: str, other: str) -> bool:
        things = {form for form in forms.values() if form.startswith(f"{one} ") and one in ("10", "7")}
        return one == other or things == {other}

    groups = {place: {place} for place in forms}
    for _ in forms:
        for one in forms:
            for other in forms:
                if same(forms[one], forms[other]):
                    groups[one] = groups[other] = groups[one] | groups[other]
    return {frozenset(group) for group in groups.values()}


@given(SAMPLES)
def test_groups_are_those_of_brute_force(samples: list[tuple[str | None, float | None]]) -> None:
    answers = [answer for answer, _ in samples]
    assert {frozenset(each) for each in group(answers)} == brute_force(answers)


def test_a_number_says_the_same_with_a_thing_unless_there_are_several() -> None:
    assert group(["10", "10 pierogi", "$10.00", "10.0  Pierogi"]) == [[0, 1, 2, 3]]
    assert group(["2", "2 am", "2 pm", "2.0"]) == [[0, 3], [1], [2]]
    assert group(["10", "10 or 20", "10 x 5", "10% more", "10%"]) == [[0], [1], [2], [3, 4]]
    assert group([None, "ten pierogi", "ten", None]) == [[1], [2]]
    assert group([]) == []


@given(SAMPLES)
def test_the_vote_is_that_of_brute_force(samples: list[tuple[str | None, float | None]]) -> None:
    answers, p_correct = [list(each) for each in zip(*samples, strict=True)]
    found = tally(answers, p_correct)
    verified = any(p is not None for p in p_correct)
    weights = [(p or 0.0) if verified else 1.0 for p in p_correct]

    places = [place for place, answer in enumerate(answers) if answer is not None]
    groups = brute_force(answers)
    assert sum(vote.count for vote in found.votes) == len(places)
    assert len(found.votes) == len(groups)
    if not groups:
        assert (found.votes, found.share) == ((), 0.0)
        assert weights[found.winner] == max(weights)
        return
    heaviest = max(sum(weights[place] for place in sorted(group)) for group in groups)
    won = next(group for group in groups if found.winner in group)
    assert sum(weights[place] for place in won) == pytest.approx(heaviest)
    assert weights[found.winner] == max(weights[place] for place in won)
    assert found.share == found.votes[0].share == len(won) / len(answers)
    assert found.votes[0].answer == answers[found.winner]
    if not verified:
        assert found.p_correct is None
        return
    known = [p for p in p_correct if p is not None]
    share = heaviest / sum(weights) if sum(weights) else len(won) / len(answers)
    n, k, mean = len(answers), PRIOR_DRAWS, sum(known) / len(known)
    assert found.p_correct == pytest.approx(share * (n + k * mean) / (n + k))


@given(SAMPLES.filter(lambda samples: all(answer for answer, _ in samples)))
def test_a_vote_is_certain_only_if_the_verifier_is(samples: list[tuple[str | None, float | None]]) -> None:
    answers, p_correct = [list(each) for each in zip(*samples, strict=True)]
    found = tally(answers, p_correct).p_correct
    if found is not None and any(p is not None and p < 0.999 for p in p_correct):
        assert 0.0 < found < 1.0


def test_the_verifier_can_overrule_the_majority() -> None:
    answers = ["7", "7", "7.0", "10", "10"]
    assert tally(answers, [None] * 5).votes[0].count == 3
    found = tally(answers, [0.1, 0.2, 0.1, 0.9, 0.95])
    assert (found.winner, found.share) == (4, 0.4)
    assert [(vote.answer, vote.count) for vote in found.votes] == [("10", 2), ("7", 3)]
    assert [vote.p_correct for vote in found.votes] == pytest.approx([0.925, 0.4 / 3])
    assert found.p_correct == pytest.approx(1.85 / 2.25 * (5 + 2 * 0.45) / 7)


def test_a_sample_without_an_answer_counts_against_the_others() -> None:
    found = tally(["10", None, None, "10"], [0.5] * 4)
    assert (found.share, len(found.votes)) == (0.5, 1)
    assert found.p_correct == pytest.approx(0.5 * (4 + 1) / 6)
    nothing = tally([None, None], [0.2, 0.6])
    assert (nothing.winner, nothing.votes, nothing.share) == (1, (), 0.0)
    assert nothing.p_correct == pytest.approx(2 * 0.6 / 4)


def test_ties_go_to_more_samples_and_then_to_the_earlier_one() -> None:
    assert tally(["a", "b"], [None, None]).winner == 0
    assert tally(["a", "b", "b"], [0.5, 0.25, 0.25]).winner == 1
    assert tally(["a", "b", "b"], [0.0, 0.0, 0.0]).winner == 1


def test_agreement_is_counted_by_form() -> None:
    assert agreeing("$1,000", ["1000", "1000.0", "999", None, "a thousand"]) == 2
    assert agreeing("10", ["10 cans", "10", "10 cans in all"]) == 1
    assert agreeing("10 cans", ["10", "ten"]) == 1
    assert agreeing("Nile", ["the Nile", " NILE "]) == 1


@given(st.integers(1, 50), st.data())
def test_the_pool_lies_between_agreement_and_p_true(draws: int, data: st.DataObject) -> None:
    agreed, p_true = data.draw(st.integers(0, draws)), data.draw(st.floats(0.001, 0.999))
    found = pooled(agreed, draws, p_true)
    low, high = sorted([agreed / draws, p_true])
    assert low - 1e-12 <= found <= high + 1e-12
    assert 0.0 < found < 1.0
    assert pooled(agreed, draws, None) == pytest.approx((agreed + 1) / (draws + 2))
