"""The flow `cascade-texts` equals the core's `cascade`; its page says what was spent, and compares margins."""

import json
from typing import Any

import pytest
from prefect.client.orchestration import get_client

import alpaca_core
from alpaca_core import CascadeJudgment, Sampling, fit_calibration, measure_cascade
from alpaca_core.cascading import MARGINS, reasoned_question, reasoned_texts
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import cascade_texts
from prefect_alpaca.flows.terminal import savings
from prefect_alpaca.tasks import use_model, values
from prefect_alpaca.tasks.named import save_named

from .conftest import Left, artifacts_of

pytestmark = pytest.mark.usefixtures("prefect_api")

LABELS = ["World", "Sports=sport"]
CHOICES = ["World", alpaca_core.Label(name="Sports", aliases=("sport",))]
FAKE = FakeModel(
    {
        "reasoning below": {"World": 0.2, "sport": 0.8},
        "step by step": "*Ball* <b>\nand goal.",
        "goal": {"World": 0.1, "Sports": 0.9},
        "ball": {"World": 0.55, "Sports": 0.45},
        "vote": {"World": 0.7, "Sports": 0.3},
    }
)
TEXTS = ["A goal | <i>late</i>.", "A ball.", " ", "A vote."]
REASONING = len("*Ball* <b>\nand goal.")
"""Tokens of it, which are bytes."""


def test_the_flow_equals_the_core(left: Left) -> None:
    settings: dict[str, Any] = {"margin": 0.2, "sampling": Sampling(max_new_tokens=64), "instruction": "Which topic?"}
    settings["show_labels"] = True
    expected = alpaca_core.cascade(FAKE, TEXTS, CHOICES, **settings)
    with use_model(FAKE):
        rows = cascade_texts(TEXTS, LABELS, **settings)
    assert values(CascadeJudgment, rows) == expected
    run, page, table = left("cascade-texts")
    assert run.name == "cascade 4 texts"
    assert [row["label"] for row in table] == ["Sports", "Sports", None, "World"]
    assert [row["first_label"] for row in table] == ["Sports", "World", None, "World"]
    assert [row["reasoned"] for row in table] == [False, True, None, False]
    assert [row["reasoning_tokens"] for row in table] == [0, REASONING, None, 0]
    assert [row["P(Sports)"] for row in table] == pytest.approx([0.9, 0.8, None, 0.3])
    assert all("right_label" not in row for row in table)
    assert "| 1 | **Sports** | ▰▰▰▰▰▰▰▰▰▱ 0.90 | by logits | Sports 0.90 | A goal" in page
    assert "| 2 | **Sports** | ▰▰▰▰▰▰▰▰▱▱ 0.80 | reasoned | World 0.55 | A ball. |" in page
    assert "| 3 | failed: empty\\_text |" in page
    assert "### 2. A ball.\n\nWorld 0.55 → **Sports 0.80**\n\n> \\*Ball\\* &lt;b&gt;\n>\n> and goal." in page
    assert "### 1." not in page
    assert "<i>" not in page


def test_the_page_says_what_was_spent_and_estimates_what_was_saved(left: Left) -> None:
    with use_model(FAKE):
        cascade_texts(TEXTS, LABELS, "Which topic?")
    _, page, _ = left("cascade-texts")
    assert f"reasoned about 1 of 3; tokens spent: {REASONING}; " in page
    assert f"about {2 * REASONING} (an estimate" in page


def reasoned(tokens: int | None) -> CascadeJudgment:
    return CascadeJudgment(
        text="a",
        label="Yes",
        probabilities={"Yes": 1.0, "No": 0.0},
        coverage=1.0,
        first={"Yes": 1.0, "No": 0.0},
        first_label="Yes",
        reasoning=None if tokens is None else "So.",
        reasoning_tokens=tokens or 0,
    )


def test_savings_are_the_mean_reasoning_for_each_spared_text() -> None:
    failed = alpaca_core.RowError(code="empty_text", message="empty")
    assert savings([reasoned(10), reasoned(None), reasoned(21), failed, reasoned(None), reasoned(None)]) == (
        "reasoned about 2 of 5; tokens spent: 31; tokens saved against reasoning about all: "
        "about 46 (an estimate: 15.5, the mean of a reasoning, for each other text)"
    )
    assert savings([reasoned(None)]).endswith("unknown, since none was reasoned about")
    assert savings([reasoned(3), failed]).endswith("tokens spent: 3; tokens saved against reasoning about all: 0")


def test_with_right_labels_every_margin_is_measured_exactly(left: Left) -> None:
    gold = ["Sports", "Sports", "World", "World"]
    run_of_all = alpaca_core.cascade(FAKE, TEXTS, CHOICES, margin=1, instruction="Which topic?")
    expected = measure_cascade(run_of_all, gold, sorted({*MARGINS, 0.15}))
    with use_model(FAKE):
        rows = cascade_texts(TEXTS, LABELS, "Which topic?", margin=0.15, gold=gold)
    assert values(CascadeJudgment, rows) == run_of_all
    run, page, table = left("cascade-texts")
    with get_client(sync_client=True) as client:
        found = artifacts_of(client, run.id)
    measured = alpaca_core.CascadeMeasurement.model_validate(
        {**expected.model_dump(), "points": json.loads(str(found["cascade-texts-margins"]))}
    )
    assert measured == expected
    assert [row["right_label"] for row in table] == gold
    assert f"in {3 * REASONING} tokens, so these figures are exact for the 3 texts" in page
    assert f"| 0: logits only | 0% | 0 | {3 * REASONING} (100%) | 0.667 | +0.000 |" in page
    assert f"| **0.15** | 33% | {REASONING} | {2 * REASONING} (67%) | 1.000 | +0.333 |" in page
    assert f"| 1: reasoning about all | 100% | {3 * REASONING} | 0 (0%) | 0.667 | +0.000 |" in page
    assert "an estimate" not in page


def test_an_empty_list_of_right_labels_is_none(left: Left) -> None:
    with use_model(FAKE):
        rows = cascade_texts(TEXTS, LABELS, "Which topic?", gold=[])
    assert [row.get("reasoning") is None for row in rows] == [True, False, True, True]
    assert "an estimate" in left("cascade-texts")[1]


def test_a_reasoning_may_be_blank_and_a_label_missing(left: Left) -> None:
    silent = FakeModel({"reasoning below": "?", "step by step": "", "Is it?": {"Yes": 0.5, "No": 0.5}})
    with use_model(silent):
        (row,) = cascade_texts(["Is it?"], ["Yes", "No"], " ", gold=["No"])
    assert (row["label"], row["reasoning"]) == (None, "")
    _, page, _ = left("cascade-texts")
    assert "Yes 0.50 → **none**\n\n*The reasoning is blank.*" in page
    assert "| 1 | none |  | reasoned | Yes 0.50 | Is it? |" in page
    assert "| 1: reasoning about all | 100% | 0 | 0 | 0.000 | +0.000 |" in page


def test_calibrations_are_chosen_by_their_names(left: Left) -> None:
    settings: dict[str, Any] = {"instruction": "Which topic?", "show_labels": False}
    first = fit_calibration(FAKE, TEXTS[:1] * 10, CHOICES, **settings)
    run_of_all = alpaca_core.cascade(FAKE, TEXTS[:2] * 5, CHOICES, margin=1, **settings)
    again = {**settings, "instruction": reasoned_question("Which topic?")}
    second = fit_calibration(FAKE, reasoned_texts(run_of_all), CHOICES, **again)
    save_named("first", first)
    save_named("second", second)
    with use_model(FAKE):
        rows = cascade_texts(TEXTS, LABELS, calibration="first", reasoned_calibration="second", **settings)
    expected = alpaca_core.cascade(FAKE, TEXTS, CHOICES, calibration=first, reasoned_calibration=second, **settings)
    assert values(CascadeJudgment, rows) == expected
    _, page, _ = left("cascade-texts")
    assert f"Calibrated by first, digest {first.digest[:12]}" in page
    assert f"After a reasoning calibrated by second, digest {second.digest[:12]}" in page


def test_the_defaults_run_as_they_are(left: Left) -> None:
    with use_model(FakeModel({"step by step": "So."}, otherwise={"World": 0.5, "Sports": 0.5})):
        rows = cascade_texts()
    assert [row["reasoning"] for row in rows] == ["So.", "So."]
    assert left("cascade-texts")[0].state_name == "Completed"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels": ["a=", "b"]}, "other words for a label"),
        ({"gold": ["World"]}, "one value for each of 2 rows, but got 1"),
        ({"gold": ["World", "sports"]}, "row 1 has 'sports'"),
        ({"calibration": "none-such"}, "no calibration named"),
        ({"reasoned_calibration": "none-such"}, "no calibration named"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_model_is_loaded(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alpaca_core, "load_model", pytest.fail)
    with pytest.raises(InvalidRequest, match=said):
        cascade_texts(**settings)


@pytest.mark.parametrize("gold", [None, ["World"]])
def test_a_run_in_which_everything_failed_fails_and_says_why(gold: list[str] | None) -> None:
    with use_model(FAKE), pytest.raises(AlpacaError, match="all 1 rows failed"):
        cascade_texts([" "], gold=gold)
