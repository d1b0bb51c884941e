"""The four uses: each equals `judge` with its prompt, and counts as it says."""

import pytest

from alpaca_core import RowError, judge, prompts
from alpaca_core.errors import InvalidRequest
from alpaca_core.fitting import fit_calibration
from alpaca_core.testing import FakeModel
from alpaca_core.uses import classify, is_outlier, outlier_question, pairs, rate, rating_question, same_meaning

INTENTS = ["card lost", "card arrival", "top up by card", "exchange rate"]


def test_a_category_follows_the_text() -> None:
    fake = FakeModel({"Text: Where is my card?\nCategory:": {" card arrival": 0.6, " Card Lost": 0.3, " other": 0.1}})
    row, failed = classify(fake, ["Where is my card?", ""], INTENTS)
    assert (row.label, row.coverage) == ("card arrival", pytest.approx(0.9))
    assert row.probabilities["card lost"] == pytest.approx(1 / 3)
    assert isinstance(failed, RowError)


def test_hundreds_of_categories_go_through_one_trie() -> None:
    names = [f"intent {number // 26} {chr(97 + number % 26)}" for number in range(300)]
    fake = FakeModel({f"number {number}.": {f" {names[number]}": 1.0} for number in (7, 77, 277)})
    rows = classify(fake, ["number 7.", "number 77.", "number 277."], names)
    assert [row.label for row in rows] == [names[7], names[77], names[277]]


def test_a_calibration_fitted_on_the_same_prompt_holds_for_a_use() -> None:
    fake = FakeModel({"coin": {" money": 0.6, " sport": 0.4}, "ball": {" money": 0.55, " sport": 0.45}})
    texts = ["coin", "ball"] * 5
    fitted = fit_calibration(
        fake, texts, ["money", "sport"], instruction=prompts.CLASSIFY, template="raw", show_labels=False
    )
    rows = classify(fake, ["coin", "ball"], ["money", "sport"], calibration=fitted)
    assert [row.label for row in rows] == ["money", "sport"]


def test_pairs_are_judged_yes_or_no() -> None:
    fake = FakeModel({"Sentence 1: It rains.\nSentence 2: Rain falls.": {"Yes": 0.7, "No": 0.2}}, otherwise="No")
    rows = same_meaning(fake, ["It rains.", "It rains.", None], ["Rain falls.", "Snow falls.", "x"])
    assert [rows[0].label, rows[1].label] == ["Yes", "No"]
    assert isinstance(rows[2], RowError)
    assert rows[0] == judge(fake, pairs(["It rains."], ["Rain falls."]), instruction=prompts.SAME_MEANING)[0]
    with pytest.raises(InvalidRequest, match="2 rows"):
        same_meaning(fake, ["a", "b"], ["a"])


def test_an_outlier_is_what_is_not_of_the_references_kind() -> None:
    fake = FakeModel(
        {"- plum\n\nIs the next of that kind, too?\nbolt": {"Yes": 0.1, "No": 0.3, "?": 0.6}}, otherwise="Yes"
    )
    rows = is_outlier(fake, ["bolt", "pear", " "], ["apple\n", "plum"])
    assert rows[0].p_outlier == pytest.approx(0.75)
    assert rows[0].coverage == pytest.approx(0.4)
    assert rows[1].p_outlier == 0.0
    assert isinstance(rows[2], RowError)
    assert is_outlier(FakeModel("?"), ["bolt"], ["apple", "plum"])[0].p_outlier is None


@pytest.mark.parametrize("reference", [["one"], [], "ab", ["a", ""], ["a", None], ["a", "{text}"], ["a"] * 65], ids=str)
def test_a_reference_that_shows_nothing_is_refused(reference: object) -> None:
    with pytest.raises(InvalidRequest):
        is_outlier(FakeModel("Yes"), ["x"], reference)


def test_a_rating_is_the_mean_of_the_distribution() -> None:
    replies = {"1": 0.1, "3": 0.3, "5": 0.4, "well": 0.2}
    row = rate(FakeModel(replies), ["A fine text."], "How fluent is it?")[0]
    assert row.score == pytest.approx((0.1 * 1 + 0.3 * 3 + 0.4 * 5) / 0.8)
    assert row.distribution == pytest.approx({"1": 0.125, "2": 0.0, "3": 0.375, "4": 0.0, "5": 0.5})
    assert row.coverage == pytest.approx(0.8)
    tens = rate(FakeModel({"1": 0.5, "10": 0.5}), ["A fine text."], "How fluent is it?", best=10)[0]
    assert tens.score == pytest.approx(5.5)
    assert rate(FakeModel("well"), ["A fine text."], "How fluent is it?")[0].score is None


@pytest.mark.parametrize(
    "settings",
    [{"criterion": ""}, {"criterion": 3}, {"worst": 5, "best": 5}, {"worst": -1}, {"best": 102}, {"best": "5"}],
    ids=str,
)
def test_a_scale_that_is_none_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        rate(FakeModel("1"), ["x"], **{"criterion": "Fluent?"} | settings)


def test_questions_hold_a_place_for_the_text() -> None:
    assert prompts.TEXT in outlier_question(["a", "b"])
    assert prompts.TEXT in rating_question("Fluent?")
    assert prompts.TEXT in prompts.CLASSIFY
