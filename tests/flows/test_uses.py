"""The flows of the four uses equal the core's verbs, and leave pages and tables that people can read."""

from typing import Any

import pytest

import alpaca_core
from alpaca_core import Judgment, Outlier, Rating, fit_calibration, prompts
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.spec import Value
from alpaca_core.testing import FakeModel
from alpaca_core.uses import pairs
from prefect_alpaca.flows import classify_texts, compare_texts, find_outliers, rate_texts
from prefect_alpaca.flows.terminal import columns
from prefect_alpaca.tasks import use_model, values
from prefect_alpaca.tasks.named import save_named

from .conftest import Left

pytestmark = pytest.mark.usefixtures("prefect_api")

KINDS = FakeModel(
    {"swallowed": {" card lost": 0.6, " top up": 0.2, " Hm": 0.2}, "money": {" top up": 0.01, "x": 0.99}}, otherwise="?"
)
TEXTS = ["It was swallowed | <i>whole</i>.", " ", "I want money on it."]
LABELS = ["card lost", "top up"]


def test_texts_are_sorted_into_categories(left: Left) -> None:
    expected = alpaca_core.classify(KINDS, TEXTS, LABELS, min_coverage=0.5)
    with use_model(KINDS):
        rows = classify_texts(TEXTS, LABELS, min_coverage=0.5)
    assert values(Judgment, rows) == expected
    run, page, table = left("classify-texts")
    assert run.name == "classify 3 texts"
    assert page.startswith("# Categories of 3 texts")
    assert [row["label"] for row in table] == ["card lost", None, None]
    assert [row["coverage"] for row in table] == [0.8, None, 0.01]
    assert "**card lost**" in page
    assert "Category:" not in page
    assert "<i>" not in page
    assert "Action" not in page


def test_categories_can_be_asked_for_in_other_words(left: Left) -> None:
    fake = FakeModel({"### Instruction:\nWhat is it about? It is swallowed.": {"card lost": 0.7, "top up": 0.3}})
    with use_model(fake):
        rows = classify_texts(["It is swallowed."], LABELS, "What is it about? {text}", template="alpaca")
        assert rows[0]["probabilities"]["card lost"] == pytest.approx(0.7)
        assert "What is it about?" in left("classify-texts")[1]
    with use_model(KINDS):
        assert classify_texts(TEXTS[:1], LABELS, " ")[0]["label"] == "card lost"


PAIRS = FakeModel({"Sentence 1: It rains.\nSentence 2: Rain falls.": {"Yes": 0.7, "No": 0.2, "?": 0.1}}, otherwise="No")


def test_pairs_are_compared(left: Left) -> None:
    firsts, seconds = ["It rains.", "It rains.", ""], ["Rain falls.", "*Snow* | falls.", "x"]
    expected = alpaca_core.same_meaning(PAIRS, firsts, seconds)
    with use_model(PAIRS):
        rows = compare_texts(firsts, seconds)
    assert values(Judgment, rows) == expected
    run, page, table = left("compare-texts")
    assert run.name == "compare 3 pairs"
    assert [row["same_meaning"] for row in table] == ["Yes", "No", None]
    assert [row["p_same"] for row in table] == pytest.approx([7 / 9, 0.0, None], abs=1e-4)
    assert r"\*Snow\* \| falls." in page
    assert "**Yes**" in page
    assert "1 of 3 failed" in page


REFERENCE = ["apple <b>", "plum"]
OUTLIERS = FakeModel(
    {"too?\nbolt": {"Yes": 0.1, "No": 0.3, "?": 0.6}, "too?\npear": {"Yes": 0.9, "No": 0.1}, "too?\nodd": "?"}
)


def test_the_likeliest_outlier_comes_first_on_the_page(left: Left) -> None:
    texts = ["pear", "odd", "bolt", " "]
    expected = alpaca_core.is_outlier(OUTLIERS, texts, REFERENCE)
    with use_model(OUTLIERS):
        rows = find_outliers(texts, REFERENCE)
    assert values(Outlier, rows) == expected
    run, page, table = left("find-outliers")
    assert run.name == "look for outliers in 4 rows"
    assert [row["p_outlier"] for row in table] == pytest.approx([0.1, None, 0.75, None])
    assert page.index("bolt |") < page.index("pear |") < page.index("odd |")
    assert "| unknown |" in page
    assert "- apple &lt;b&gt;" in page


RATES = FakeModel({"fine": {"1": 0.1, "3": 0.3, "5": 0.4, "well": 0.2}, "odd": "?"})


def test_texts_are_rated(left: Left) -> None:
    texts = ["A fine text.", "An odd one.", " "]
    expected = alpaca_core.rate(RATES, texts, "Is it *good*?")
    with use_model(RATES):
        rows = rate_texts(texts, "Is it *good*?")
    assert values(Rating, rows) == expected
    run, page, table = left("rate-texts")
    assert run.name == "rate 3 texts"
    assert [row["score"] for row in table] == pytest.approx([3.75, None, None])
    assert [row["P(3)"] for row in table] == pytest.approx([0.375, 0.2, None])
    assert all(set(row) == set(table[0]) for row in table)
    assert "**3.75** | ▃▁▆▁█ |" in page
    assert r"\*good\*" in page


def test_columns_show_a_distribution() -> None:
    assert columns({"1": 0.5, "2": 0.5, "3": 0.0}) == "██▁"
    assert columns({"1": 0.0, "2": 0.0}) == "▁▁"


EVERYTHING = FakeModel(
    {"Category:": {" top up": 1.0}, "Answer yes or no": {"Yes": 0.4, "No": 0.6}, "with a number": {"2": 1.0}},
    otherwise="Yes",
)


@pytest.mark.parametrize("flow", [classify_texts, compare_texts, find_outliers, rate_texts], ids=lambda flow: flow.name)
def test_the_defaults_run_as_they_are(flow: Any, left: Left) -> None:
    with use_model(EVERYTHING):
        rows = flow()
    assert len(rows) >= 2
    assert all("code" not in row for row in rows)
    assert left(flow.name)[0].state_name == "Completed"


@pytest.mark.parametrize(
    ("flow", "settings", "said"),
    [
        (classify_texts, {"labels": ["a=", "b"]}, "other words for a label"),
        (classify_texts, {"policy": "none-such"}, "no policy named"),
        (classify_texts, {"ask_a_person": True}, "Name a policy"),
        (classify_texts, {"calibration": "none-such"}, "no calibration named"),
        (compare_texts, {"firsts": ["a"]}, "one value for each of 1 rows"),
        (compare_texts, {"calibration": "none-such"}, "no calibration named"),
        (find_outliers, {"reference": ["a", " "]}, "a reference row is"),
        (find_outliers, {"calibration": "none-such"}, "no calibration named"),
        (rate_texts, {"worst": 5}, "a scale runs"),
        (rate_texts, {"best": 200}, "a scale runs"),
        (rate_texts, {"criterion": " "}, "criterion says"),
        (rate_texts, {"calibration": "none-such"}, "no calibration named"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_model_is_loaded(
    flow: Any, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alpaca_core, "load_model", pytest.fail)
    with pytest.raises(InvalidRequest, match=said):
        flow(**settings)


def test_a_run_in_which_everything_failed_fails_and_says_why() -> None:
    with use_model(EVERYTHING), pytest.raises(AlpacaError, match="all 1 rows failed"):
        rate_texts([" "])


@pytest.mark.parametrize(
    ("flow", "fake", "arguments", "kind", "fitted_on"),
    [
        (
            classify_texts,
            KINDS,
            (TEXTS, LABELS),
            Judgment,
            (TEXTS[:1], LABELS, {"instruction": prompts.CLASSIFY, "template": "raw", "show_labels": False}),
        ),
        (
            compare_texts,
            PAIRS,
            (["It rains."], ["Rain falls."]),
            Judgment,
            (pairs(["It rains."], ["Rain falls."]), ["Yes", "No"], {"instruction": prompts.SAME_MEANING}),
        ),
    ],
    ids=["classify-texts", "compare-texts"],
)
def test_a_calibration_is_chosen_by_its_name(
    flow: Any, fake: FakeModel, arguments: tuple[Any, ...], kind: type[Value], fitted_on: Any, left: Left
) -> None:
    texts, labels, settings = fitted_on
    fitted = fit_calibration(fake, texts * 10, labels, **settings)
    save_named("of-a-use", fitted)
    with use_model(fake):
        rows = flow(*arguments, calibration="of-a-use")
    assert rows[0]["calibration"] == fitted.digest
    assert values(kind, rows[:1])
    assert f"of-a-use, digest {fitted.digest[:12]}" in left(flow.name)[1]
