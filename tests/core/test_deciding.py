"""Decisions: the bound, the walk, the guarantee in simulated worlds whose truth is known, power, ties, bad input."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy
import pytest
from numpy.typing import NDArray
from scipy import stats

from alpaca_core import Judgment, RowError, judge
from alpaca_core.deciding import (
    Decision,
    Policy,
    Threshold,
    decide,
    find_threshold,
    fit_policy,
    lower_bound,
    rows_needed,
)
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel

Floats = NDArray[numpy.float64]

FAILED = RowError(code="empty_text", message="a text is not empty")
GRID = (numpy.arange(1_000_000) + 0.5) / 1_000_000  # quantiles of the confidence: the whole population of a world


def judgment(confidence: float, label: str | None = "Yes", calibration: str | None = None) -> Judgment:
    probabilities = {"Yes": confidence, "No": 1 - confidence}
    return Judgment(text="?", label=label, probabilities=probabilities, coverage=1.0, calibration=calibration)


def policy(accept: float | None, review: float = 0.0, calibration: str | None = None) -> Policy:
    return Policy(
        accept=accept,
        review=review,
        precision=0.9,
        confidence=0.95,
        rows=100,
        accepted=50,
        bound=0.91,
        calibration=calibration,
    )


# The bound


@pytest.mark.parametrize("level", [0.05, 0.2])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_the_bound_is_where_the_binomial_tail_reaches_the_level(n: int, level: float) -> None:
    for k in range(1, n + 1):
        p = lower_bound(k, n, level)
        tail = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
        assert tail == pytest.approx(level, abs=1e-9)
    assert lower_bound(0, n, level) == 0.0


@pytest.mark.parametrize(("precision", "confidence", "rows"), [(0.9, 0.95, 29), (0.5, 0.75, 2), (0.1, 0.9, 1)])
def test_rows_needed_by_hand(precision: float, confidence: float, rows: int) -> None:
    assert rows_needed(precision, confidence) == rows


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_with_the_rows_needed_all_right_a_policy_accepts_and_with_one_fewer_it_is_refused(
    precision: float, confidence: float
) -> None:
    n = rows_needed(precision, confidence)
    rows = [judgment(0.6)] * n
    fitted = fit_policy(rows, ["Yes"] * n, precision=precision, confidence=confidence)
    assert (fitted.accept, fitted.accepted) == (0.0, n)
    with pytest.raises(InvalidRequest, match=f"at least {n:,} .* got {n - 1:,}"):
        fit_policy(rows[1:], ["Yes"] * (n - 1), precision=precision, confidence=confidence)


# The walk


def naive(rows: list[tuple[float, bool]], precision: float, confidence: float) -> Threshold:
    """The same steps, straight from the words of the docstring."""
    n, least = len(rows), 2 * rows_needed(precision, confidence)
    starts = [float(n)]
    while starts[-1] / 2 >= least:
        starts.append(starts[-1] / 2)
    if n > least and len(starts) == 1:
        starts.append(least)
    doublings, first = len(starts) - 1, starts[-1]
    found, level = Threshold(None, 0, 0.0), 0.0
    for step in range(16 * doublings + 1):
        if step % 16 == 0:
            level += (1 - confidence) / (doublings + 1)
        size = round(n * (first / n) ** (1 - step / (16 * doublings))) if doublings else n
        last = sorted((each for each, _ in rows), reverse=True)[size - 1]
        accepted = [right for each, right in rows if each >= last]
        test = stats.binomtest(sum(accepted), len(accepted), alternative="greater")
        bound = test.proportion_ci(confidence_level=1 - level).low if level else 0.0
        level = level if bound >= precision else 0.0
        if bound >= precision:
            found = Threshold(max((each for each, _ in rows if each < last), default=None), len(accepted), bound)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_walk_is_the_naive_one(seed: int) -> None:
    random = numpy.random.default_rng(seed)
    confidences = random.random(random.integers(30, 400)).round(random.choice([1, 2, 8]))
    rows = [(float(each), bool(random.random() < 0.7 + 0.3 * each)) for each in confidences]
    precision, confidence = float(random.choice([0.5, 0.8, 0.9])), float(random.choice([0.8, 0.95]))
    found, told = find_threshold(rows, precision, confidence), naive(rows, precision, confidence)
    assert found[1:] == pytest.approx(told[1:])
    if found.accept is not None:
        assert found.accept == (0.0 if told.accept is None else math.nextafter(told.accept, 1.0))
        assert found.accepted == sum(each >= found.accept for each, _ in rows)
        assert found.bound >= precision


# The guarantee


def crossing(rank: Floats) -> Floats:
    """Right more often than not far from any order: the precision crosses 0.9 four times on the way down."""
    return numpy.select([rank > 0.95, rank > 0.7, rank > 0.6, rank > 0.3], [0.85, 0.93, 0.75, 0.97], 0.6)


WORLDS: dict[str, tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]] = {
    # by a row's rank among all, from 0 to 1: its confidence, and its chance of being right
    "calibrated": (lambda rank: 0.5 + rank / 2, lambda rank: 0.5 + rank / 2),
    "overconfident": (lambda rank: 0.5 + 0.5 * rank**0.1, lambda rank: 0.5 + 0.42 * rank),
    "useless": (lambda rank: 0.5 + rank / 2, lambda rank: 0.5 + 0 * rank),
    "just below": (lambda rank: 0.5 + rank / 2, lambda rank: 0.8999 + 0 * rank),
    "just below at the top": (lambda rank: 0.5 + rank / 2, lambda rank: numpy.where(rank > 0.5, 0.8999, 0.7)),
    "more confident, less right": (lambda rank: 0.5 + rank / 2, lambda rank: 0.95 - 0.102 * rank),
    "crossing": (lambda rank: 0.5 + rank / 2, crossing),
    "ten samples, crossing": (lambda rank: 0.5 + numpy.floor(10 * rank) / 20, crossing),
    "ten samples, just below": (lambda rank: 0.5 + numpy.floor(10 * rank) / 20, lambda rank: 0.8999 + 0 * rank),
    "half are sure, just below": (lambda rank: numpy.minimum(0.5 + rank, 1.0), lambda rank: 0.8999 + 0 * rank),
    "easy": (lambda rank: 0.5 + rank / 2, lambda rank: numpy.where(rank > 0.3, 0.97, 0.6)),
}


def simulate(world: str, sets: int = 2000, rows: int = 300, precision: float = 0.9) -> list[Threshold]:
    confidence_of, chance_of = WORLDS[world]
    random = numpy.random.default_rng(0)
    rank = random.random((sets, rows))
    confidences = confidence_of(rank).tolist()
    right = (random.random((sets, rows)) < chance_of(rank)).tolist()
    return [
        find_threshold(list(zip(*each, strict=True)), precision, 0.95) for each in zip(confidences, right, strict=True)
    ]


def true_precisions(world: str, found: list[Threshold]) -> Floats:
    """The precision in the population of what each threshold accepts; 1 where it accepts nothing."""
    confidence_of, chance_of = WORLDS[world]
    whole = numpy.append(numpy.cumsum(chance_of(GRID)[::-1])[::-1], 0.0)
    first = numpy.searchsorted(confidence_of(GRID), [2.0 if each.accept is None else each.accept for each in found])
    accepted = len(GRID) - first
    return numpy.where(accepted, whole[first] / numpy.maximum(accepted, 1), 1.0)


@pytest.mark.parametrize("world", WORLDS)
def test_few_policies_are_less_precise_than_they_say(world: str) -> None:
    found = simulate(world)
    wrong = int((true_precisions(world, found) < 0.9).sum())
    assert stats.binomtest(wrong, len(found), 0.05, alternative="greater").pvalue > 1e-3, wrong / len(found)


def test_the_guarantee_is_used_and_not_only_kept() -> None:
    wrong = (true_precisions("just below", simulate("just below")) < 0.9).mean()
    assert wrong > 0.02


# Power


def test_in_an_easy_world_most_of_what_could_be_accepted_is() -> None:
    found = simulate("easy")
    possible = 0.7 + 0.7 * 0.07 / 0.3  # where the precision of 0.97, diluted by rows of 0.6, has fallen to 0.9
    assert numpy.mean([each.accepted for each in found]) / 300 > 0.7 * possible
    assert numpy.mean([each.accept is None for each in found]) < 0.1
    assert numpy.mean([each.accepted for each in simulate("easy", 200, 3000)]) / 3000 > 0.9 * possible


@pytest.mark.parametrize("world", ["calibrated", "easy", "crossing"])
def test_more_precision_accepts_fewer(world: str) -> None:
    shares = [
        numpy.mean([each.accepted for each in simulate(world, 300, precision=precision)])
        for precision in (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    ]
    assert all(less <= more for more, less in pairwise(shares))


# Fitting and deciding


def test_a_policy_says_what_it_was_fitted_on() -> None:
    sure, unsure = [judgment(0.9 + place / 10_000) for place in range(100)], [judgment(0.6)] * 100
    gold = ["No"] * 3 + ["Yes"] * 97 + ["Yes", "No"] * 50
    fitted = fit_policy([*sure, *unsure], gold, review=0.55)
    assert fitted.accept is not None
    assert 0.6 < fitted.accept < 0.9 + 1e-9
    assert fitted == Policy(
        accept=math.nextafter(0.6, 1.0),
        review=0.55,
        precision=0.9,
        confidence=0.95,
        rows=200,
        accepted=100,
        bound=lower_bound(97, 100, 0.025),
    )
    actions = [each.action for each in decide([*sure, *unsure, judgment(0.52)], fitted) if isinstance(each, Decision)]
    assert actions == ["accept"] * 100 + ["review"] * 100 + ["abstain"]


def test_where_nothing_can_be_accepted_the_rest_goes_to_review() -> None:
    rows = [judgment(0.9)] * 100
    fitted = fit_policy(rows, ["Yes", "No"] * 50)
    assert (fitted.accept, fitted.accepted, fitted.bound) == (None, 0, 0.0)
    assert {each.action for each in decide(rows, fitted) if isinstance(each, Decision)} == {"review"}


def test_rows_that_failed_are_left_out_and_rows_without_a_label_are_never_accepted() -> None:
    rows = [judgment(0.9)] * 40
    plain = fit_policy(rows, ["Yes"] * 40)
    more = fit_policy([FAILED, *rows, judgment(0.99, None)], ["not a label", *["Yes"] * 40, "No"])
    assert more == plain.model_copy(update={"rows": 41})
    assert decide([FAILED, judgment(0.99, None)], more) == [
        FAILED,
        Decision(action="abstain", label=None, confidence=0.99),
    ]


def test_decisions_at_ties() -> None:
    rows = [judgment(each) for each in (0.8, math.nextafter(0.8, 0), 0.6, math.nextafter(0.6, 0))]
    decided = decide(rows, policy(0.8, review=0.6))
    assert [each.action for each in decided if isinstance(each, Decision)] == ["accept", "review", "review", "abstain"]
    assert [each.action for each in decide(rows[:1], policy(None, review=0.9)) if isinstance(each, Decision)] == [
        "abstain"
    ]


def test_tied_rows_are_accepted_together_or_not_at_all() -> None:
    rows = [judgment(1.0)] * 60 + [judgment(0.7)] * 60 + [judgment(0.6)] * 60
    fitted = fit_policy(rows, ["Yes"] * 120 + ["No"] * 60)
    assert (fitted.accept, fitted.accepted) == (math.nextafter(0.6, 1.0), 120)
    assert [each.action for each in decide(rows, fitted) if isinstance(each, Decision)].count("accept") == 120


def test_a_probability_that_rounding_lifts_over_one_is_one() -> None:
    above = math.nextafter(1.0, 2.0)
    rows = [judgment(above)] * 60 + [judgment(1.0)] * 60
    fitted = fit_policy(rows, ["Yes"] * 120)
    assert (fitted.accept, fitted.accepted) == (0.0, 120)
    decided = decide(rows[:1], fitted)[0]
    assert isinstance(decided, Decision)
    assert decided.confidence == 1.0


def test_from_the_judge_to_the_decision() -> None:
    model = FakeModel({"wet": {"Yes": 0.9, "No": 0.1}, "odd": {"Yes": 0.55, "No": 0.45}})
    texts = ["wet"] * 60 + ["odd"] * 60
    fitted = fit_policy(judge(model, texts), ["Yes"] * 60 + ["No"] * 60, precision=0.8)
    decided = decide(judge(model, ["wet", "odd", ""]), fitted)
    assert [each.action if isinstance(each, Decision) else each.code for each in decided] == [
        "accept",
        "review",
        "empty_text",
    ]


def test_policies_and_decisions_are_json_and_back() -> None:
    fitted = fit_policy([judgment(0.1 + 0.2 + place / 1000) for place in range(300)], ["Yes"] * 200 + ["No"] * 100)
    for each in (fitted, policy(None, calibration="ab12")):
        assert Policy.model_validate_json(each.model_dump_json()) == each
    decision = decide([judgment(0.1 + 0.2)], fitted)[0]
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_a_policy_is_for_judgments_of_its_calibration() -> None:
    calibrated = [judgment(0.9, calibration="ab12")] * 40
    fitted = fit_policy([*calibrated, FAILED], ["Yes"] * 41)
    assert fitted.calibration == "ab12"
    assert decide([*calibrated, FAILED], fitted)[-1] == FAILED
    assert decide([FAILED], fitted) == [FAILED]
    with pytest.raises(InvalidRequest, match=r"'ab12', but .* none"):
        decide([*calibrated, judgment(0.9)], fitted)
    with pytest.raises(InvalidRequest, match=r"none, but .* 'ab12'"):
        decide(calibrated, policy(0.8))
    fitted.check("ab12")
    with pytest.raises(InvalidRequest, match=r"'ab12', but .* none"):
        fitted.check(None)
    with pytest.raises(InvalidRequest, match="one calibration"):
        fit_policy([*calibrated, judgment(0.9)], ["Yes"] * 41)


# Bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gold": ["Yes"] * 39}, "40"),
        ({"gold": "Yes" * 40}, "list"),
        ({"gold": ["Yes"] * 39 + ["yes"]}, "row 39 has 'yes'"),
        ({"gold": [None] * 40}, "row 0 has None"),
        ({"gold": [["Yes"]] * 40}, "row 0 has"),
        ({"judgments": judgment(0.9)}, "list"),
        ({"judgments": ["Yes"] * 40}, "row 0 is 'Yes'"),
        ({"judgments": [], "gold": []}, "at least 29"),
        ({"judgments": [FAILED] * 40}, "at least 29"),
        ({"judgments": [judgment(0.9, None)] * 40}, "got 0"),
        ({"precision": 0.0}, "precision"),
        ({"precision": 1.0}, "precision"),
        ({"precision": math.nan}, "precision"),
        ({"precision": "high"}, "precision"),
        ({"precision": 0.9999999999999999}, "at least"),
        ({"confidence": 0.0}, "confidence"),
        ({"confidence": 1}, "confidence"),
        ({"confidence": None}, "confidence"),
        ({"review": -0.1}, "review"),
        ({"review": 1.1}, "review"),
        ({"review": math.nan}, "review"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_bad_input_is_refused(changes: dict[str, object], says: str) -> None:
    settings: dict[str, object] = {"judgments": [judgment(0.9)] * 40, "gold": ["Yes"] * 40, **changes}
    judgments, gold = settings.pop("judgments"), settings.pop("gold")
    with pytest.raises(InvalidRequest, match=says):
        fit_policy(judgments, gold, **settings)


def test_only_judgments_are_decided() -> None:
    with pytest.raises(InvalidRequest, match="list"):
        decide(judgment(0.9), policy(0.8))
    with pytest.raises(InvalidRequest, match="row 1 is 'Yes'"):
        decide([judgment(0.9), "Yes"], policy(0.8))
    assert decide([], policy(0.8)) == []


@pytest.mark.parametrize("given", [{"a": 1}, "strict", None, 0.9], ids=repr)
def test_what_is_no_policy_is_refused_with_the_way_to_one(given: object) -> None:
    with pytest.raises(InvalidRequest, match=r"policy is a Policy, but got .* fit_policy"):
        decide([judgment(0.9)], given)
