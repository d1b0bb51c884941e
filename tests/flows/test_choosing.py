"""The flow `generate-and-judge`: the best of n candidates, by hand."""

from typing import Any

import pytest

import alpaca_core
from alpaca_core import RowError, Sampling
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import generate_and_judge
from prefect_alpaca.flows.choosing import Choice
from prefect_alpaca.tasks import use_model, values

from .conftest import Left

pytestmark = pytest.mark.usefixtures("prefect_api")

P_YES = {"Do come!": 0.9, "Come, or not.": 0.5, "Stay away.": 0.1}
FAKE = FakeModel(
    {
        **{text: {"Yes": share, "No": 1 - share} for text, share in P_YES.items()},
        "silent": "",
        "invite": dict.fromkeys(P_YES, 1.0),
    }
)
SAMPLING = Sampling(temperature=1.0)


def test_the_likeliest_of_the_prompts_own_samples_is_picked(left: Left) -> None:
    prompts = ["Please invite one.", "Please invite two.", "Please be silent.", " "]
    with use_model(FAKE):
        rows = generate_and_judge(prompts, "Friendly?", candidates=6, sampling=SAMPLING)
    choices = values(Choice, rows)
    for prompt, choice in zip(prompts[:2], choices, strict=False):
        drawn = alpaca_core.generate(FAKE, [prompt] * 6, SAMPLING, sample_indices=range(6))
        assert isinstance(choice, Choice)
        assert [each.text for each in choice.candidates] == [each.text for each in drawn]
        assert [each.probability for each in choice.candidates] == pytest.approx([P_YES[each.text] for each in drawn])
        assert choice.text == max((each.text for each in drawn), key=P_YES.__getitem__)
    assert [row.code for row in choices if isinstance(row, RowError)] == ["empty_text", "empty_text"]
    run, page, table = left("generate-and-judge")
    assert run.name == "best of 6 for 4 prompts"
    assert "2 of 4 failed" in page
    assert [row["best"] for row in table] == [rows[0]["text"], rows[1]["text"], None, None]


def test_one_failed_candidate_costs_itself_only() -> None:
    fake = FakeModel({"Good": {"Yes": 0.8, "No": 0.2}, "invite": {"Good": 0.5, "": 0.5}})
    with use_model(fake):
        rows = generate_and_judge(["Please invite."], "Friendly?", candidates=16, sampling=SAMPLING)
    failed = [candidate for candidate in rows[0]["candidates"] if "code" in candidate]
    assert 0 < len(failed) < 16
    assert {candidate["code"] for candidate in failed} == {"empty_text"}
    assert {"nothing visible" in candidate["message"] for candidate in failed} == {True}
    assert rows[0]["text"] == "Good"


@pytest.mark.parametrize("silence", ["", " \n"])
def test_a_model_that_says_nothing_is_not_blamed_on_the_row(silence: str) -> None:
    with use_model(FakeModel(silence)), pytest.raises(AlpacaError, match="Another seed or a higher temperature may"):
        generate_and_judge(["Please invite."], "Friendly?", sampling=SAMPLING)


def test_another_label_can_be_wanted() -> None:
    with use_model(FAKE):
        rows = generate_and_judge(["Please invite."], "Friendly?", wanted="No", candidates=12, sampling=SAMPLING)
    assert rows[0]["text"] == "Stay away."


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wanted": "Maybe"}, "wanted is one of"),
        ({"sampling": Sampling()}, "temperature above 0"),
        ({"instruction": ""}, "instruction is the judge's question"),
        ({"instruction": " \t"}, "instruction is the judge's question"),
        ({"labels": ["Yes=", "No"]}, "other words for a label"),
        ({"labels": ["Yes", " "]}, "a label has a name"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_model_is_loaded(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alpaca_core, "load_model", pytest.fail)
    with pytest.raises(InvalidRequest, match=said):
        generate_and_judge(**settings)
