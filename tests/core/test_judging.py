"""The verb `judge`: probabilities, coverage, abstention, sampling, and rows that fail by themselves."""

import math

import pytest
from scipy import stats

from alpaca_core import Label, RowError, judge
from alpaca_core.errors import InvalidLabels, InvalidRequest
from alpaca_core.testing import FakeModel
from tests.core.worlds import TableModel, tiny_tokenizer

WORDS = ["y", "e", "s", "n", "o", " ", "Y", "N", "E", "S", "O", "no", "yes", " no", "es"]


def test_probabilities_are_the_shares_of_the_replies() -> None:
    judgment = judge(FakeModel({"Yes": 0.3, "No.": 0.1, "Perhaps": 0.6}), ["Is it so?"])[0]
    assert judgment.label == "Yes"
    assert judgment.coverage == pytest.approx(0.4, abs=1e-6)
    assert judgment.probabilities == pytest.approx({"Yes": 0.75, "No": 0.25}, abs=1e-6)


def test_sampling_agrees_with_the_logits() -> None:
    model = TableModel(tiny_tokenizer(WORDS), seed=3)
    exact = judge(model, ["yes"], template="raw")[0]
    n = 4000
    sampled = judge(model, ["yes"], template="raw", method="sampled", samples=n)[0]
    shares = [exact.coverage * share for share in exact.probabilities.values()]
    counts = [sampled.coverage * share * n for share in sampled.probabilities.values()]
    test = stats.chisquare([*counts, n - sum(counts)], [n * share for share in (*shares, 1 - exact.coverage)])
    assert test.pvalue > 1e-4


def test_a_text_is_the_instruction_unless_there_is_one() -> None:
    fake = FakeModel({"### Input:\nrain\n": "No", "### Instruction:\nrain\n": "Yes"})
    assert judge(fake, ["rain"])[0].label == "Yes"
    assert judge(fake, ["rain"], instruction="Is it dry?")[0].label == "No"


def test_an_instruction_may_say_where_the_text_stands() -> None:
    fake = FakeModel({"Weather: {text} cloud?": {"Yes": 0.9, "No": 0.1}}, otherwise="No")
    placed = judge(fake, ["{text} cloud"], instruction="Weather: {text}?")[0]
    assert placed.probabilities == judge(fake, ["Weather: {text} cloud?"])[0].probabilities
    assert placed.label == "Yes"


def test_labels_stand_in_the_prompt_by_default_unless_they_are_yes_and_no() -> None:
    fake = FakeModel({"Answer with one of: wet, dry.": "wet", "### Response:": "dry"})
    assert judge(fake, ["?"], ["wet", "dry"])[0].label == "wet"
    assert judge(fake, ["?"], ["wet", "dry"], show_labels=False)[0].label == "dry"
    shown = FakeModel({"Answer with one of": "Yes", "### Response:": "No"})
    assert judge(shown, ["?"])[0].label == "No"
    assert judge(shown, ["?"], show_labels=True)[0].label == "Yes"
    many = [f"label{number}x" for number in range(21)]
    assert judge(FakeModel({"Answer with one of": many[0], "?": many[1]}), ["?"], many)[0].label == many[1]


def test_yes_and_no_in_any_case_are_not_shown() -> None:
    fake = FakeModel({"Answer with one of": "Yes"}, otherwise="No")
    assert judge(fake, ["?"], ["no", "YES"])[0].label == "no"
    assert judge(fake, ["?"], ["yes", "no", "unsure"])[0].label == "yes"


def test_progress_moves_while_samples_are_drawn() -> None:
    done: list[float] = []
    judge(FakeModel("Yes"), ["?"], method="sampled", samples=4, progress=done.append)
    assert done == [0.25] * 4


def test_below_min_coverage_the_judgment_abstains_and_says_why() -> None:
    fake = FakeModel({"Yes": 0.02, "Who knows": 0.98})
    assert judge(fake, ["?"])[0].label == "Yes"
    judgment = judge(fake, ["?"], min_coverage=0.05)[0]
    assert judgment.label is None
    assert judgment.reason is not None
    assert "0.05" in judgment.reason
    assert judgment.probabilities["Yes"] == pytest.approx(1.0, abs=1e-6)


def test_samples_that_spell_no_label_abstain() -> None:
    judgment = judge(FakeModel("Who knows"), ["?"], method="sampled", samples=3)[0]
    assert (judgment.label, judgment.coverage) == (None, 0.0)
    assert math.fsum(judgment.probabilities.values()) == pytest.approx(1.0)


def test_a_text_that_a_fake_did_not_foresee_abstains() -> None:
    rows = judge(FakeModel({"rain": {"wet": 1.0}}), ["rain", "snow"], ["wet", "dry"])
    assert [(row.label, row.coverage) for row in rows] == [("wet", 1.0), (None, 0.0)]


def test_a_bad_row_costs_itself_only() -> None:
    rows = ["Is it so?", None, "", " \n", "\ud800", 3, float("nan"), ["x"], "Is it so?"]
    judged = judge(FakeModel({"Yes": 0.9, "No": 0.1}), rows)
    codes = [row.code if isinstance(row, RowError) else row.label for row in judged]
    assert codes == [
        "Yes", "not_text", "empty_text", "empty_text", "invalid_text", "not_text", "not_text", "not_text", "Yes"
    ]  # fmt: skip
    assert judged[0] == judged[-1]


def test_a_row_beyond_the_context_is_its_own_error() -> None:
    short = FakeModel("Yes", context_length=400)
    judged = judge(short, ["Is it so?", "x" * 500, "y" * 10_000_000])
    assert [row.code if isinstance(row, RowError) else row.label for row in judged] == [
        "Yes",
        "prompt_too_long",
        "prompt_too_long",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"min_coverage": -0.1},
        {"min_coverage": 1.5},
        {"min_coverage": math.nan},
        {"method": "guess"},
        {"min_coverage": "half"},
        {"method": "sampled", "samples": 0},
        {"method": "sampled", "samples": 2.5},
        {"method": "sampled", "seed": -1},
        {"method": "sampled", "samples": 10**4000},
        {"method": "sampled", "seed": -(10**5000)},
        {"instruction": ""},
        {"instruction": 7},
        {"instruction": "\ud800"},
        {"instruction": "x" * 70_000},
        {"method": "sampled", "all_segmentations": True},
        {"adapter": "nobody"},
        {"template": "chat"},
        {"template": "vicuna"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        judge(FakeModel("Yes"), ["?"], **settings)


def test_one_string_is_not_a_batch() -> None:
    with pytest.raises(InvalidRequest, match="list"):
        judge(FakeModel("Yes"), "Is it so?")


def test_labels_are_refused_before_rows_are_looked_at() -> None:
    with pytest.raises(InvalidLabels):
        judge(FakeModel("Yes"), [], ["same", "SAME"])
    assert judge(FakeModel("Yes"), []) == []


def test_progress_counts_every_row_once() -> None:
    for method in ("logits", "sampled"):
        done: list[float] = []
        judge(FakeModel("Yes"), ["?", None, "!"], method=method, progress=done.append)
        assert sum(done) == pytest.approx(3)


def test_judgments_are_json_and_back() -> None:
    judgment = judge(FakeModel({"dry": 0.5, "wet": 0.5}), ["?"], [Label(name="dry"), Label(name="wet")])[0]
    assert type(judgment).model_validate_json(judgment.model_dump_json()) == judgment
