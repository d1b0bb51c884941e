"""The flow `judge-texts` equals the core's `judge`, and leaves a page and a table."""

import pytest

import alpaca_core
from alpaca_core import Judgment, Label
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import judge_texts
from prefect_alpaca.tasks import use_model, values
from prefect_alpaca.tasks.named import save_named

from .conftest import Left

pytestmark = pytest.mark.usefixtures("prefect_api")

FAKE = FakeModel({"goal": {"Sports": 0.6, "World": 0.2, "Tech": 0.1, "Hm": 0.1}, "chip": {"Hm": 0.99, "Tech": 0.01}})
TEXTS = ["A late goal | <i>again</i>", " ", "A new chip"]
LABELS = ["World", "Sports", "Technology=Tech,Computing"]
CHOICES = ["World", "Sports", Label(name="Technology", aliases=("Tech", "Computing"))]


def test_the_flow_equals_the_core(left: Left) -> None:
    expected = alpaca_core.judge(FAKE, TEXTS, CHOICES, instruction="Which topic?", min_coverage=0.5)
    with use_model(FAKE):
        rows = judge_texts(TEXTS, LABELS, "Which topic?", min_coverage=0.5)
    assert values(Judgment, rows) == expected
    run, page, table = left("judge-texts")
    assert run.name == "judge 3 texts"
    assert [row["label"] for row in table] == ["Sports", None, None]
    assert [row["P(Technology)"] for row in table] == pytest.approx([1 / 9, None, 1.0], abs=1e-3)
    assert "**Sports**" in page
    assert "failed: empty\\_text" in page
    assert "| none |" in page
    assert "<i>" not in page


@pytest.mark.parametrize("instruction", [None, "", " \n"])
def test_without_an_instruction_each_text_is_the_question(instruction: str | None, left: Left) -> None:
    fake = FakeModel({"### Instruction:\nIs it?": {"Yes": 0.7, "No": 0.3}})
    with use_model(fake):
        rows = judge_texts(["Is it?"], ["Yes", "No"], instruction)
    assert rows[0]["probabilities"]["Yes"] == pytest.approx(0.7)
    run, page, _ = left("judge-texts")
    assert run.state_name == "Completed"
    assert ">" not in page


def test_labels_of_odd_letters_leave_a_table(left: Left) -> None:
    with use_model(FakeModel({"Is it?": "a\x00"})):
        judge_texts(["Is it?"], ["a\x00", "<b>|"], "Which?")
    _, page, table = left("judge-texts")
    assert [name for name in table[0] if name.startswith("P(")] == ["P(a\N{REPLACEMENT CHARACTER})", "P(<b>|)"]
    assert "<b>" not in page
    assert "\x00" not in page


def test_the_defaults_run_as_they_are() -> None:
    with use_model(FakeModel({"": {"World": 0.5, "Sports": 0.5}})):
        assert len(judge_texts()) == 2


def test_a_calibration_is_chosen_by_its_name(left: Left) -> None:
    settings = {"instruction": "Which topic?", "show_labels": False}
    fitted = alpaca_core.fit_calibration(FAKE, ["A late goal"] * 10, CHOICES, **settings)
    save_named("topics", fitted)
    with use_model(FAKE):
        rows = judge_texts(TEXTS, LABELS, "Which topic?", calibration="topics")
        assert values(Judgment, rows) == alpaca_core.judge(FAKE, TEXTS, CHOICES, calibration=fitted, **settings)
        assert rows[0]["calibration"] == fitted.digest
        with pytest.raises(InvalidRequest, match="question"):
            judge_texts(TEXTS, LABELS, "Another question?", calibration="topics")
    with pytest.raises(InvalidRequest, match="no calibration named"):
        judge_texts(TEXTS, LABELS, calibration="none-such")


def test_the_page_says_that_probabilities_are_calibrated(left: Left) -> None:
    fitted = alpaca_core.fit_calibration(FAKE, ["A late goal"] * 10, CHOICES, instruction="Topic?", show_labels=False)
    save_named("shown", fitted)
    with use_model(FAKE):
        judge_texts(TEXTS, LABELS, "Topic?", calibration="shown")
    _, page, _ = left("judge-texts")
    assert f"shown, digest {fitted.digest[:12]}" in page
