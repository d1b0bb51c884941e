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


def test_a_candidate_without_a_label_is_the_last_choice(left: Left) -> None:
    # by their shares alone, 1/2 each, the unforeseen would win
    fake = FakeModel({"Stay away.": {"Yes": 0.1, "No": 0.9}, "invite": {"Stay away.": 0.3, "What?": 0.7}}, "What?")
    with use_model(fake):
        rows = generate_and_judge(["Please invite."], "Friendly?", candidates=12, sampling=SAMPLING)
    assert {each["text"] for each in rows[0]["candidates"]} == {"Stay away.", "What?"}
    assert {each["text"] for each in rows[0]["candidates"] if each["probability"] is None} == {"What?"}
    assert (rows[0]["text"], rows[0]["probability"]) == ("Stay away.", pytest.approx(0.1))
    assert "| no label | What? |" in left("generate-and-judge")[1]


def test_where_no_candidate_has_a_label_the_first_is_shown_without_a_probability(left: Left) -> None:
    with use_model(FakeModel("What?")):
        rows = generate_and_judge(["Please invite."], "Friendly?", sampling=SAMPLING)
    assert (rows[0]["text"], rows[0]["probability"]) == ("What?", None)
    _, page, table = left("generate-and-judge")
    assert table[0]["probability"] is None
    assert "0.50" not in page
    assert "no candidate a label" in page


def test_an_escape_before_either_model_is_told(left: Left) -> None:
    fake = FakeModel({"Friendly": {"Yes": 0.8, "No": 0.2}, "aloud": "Come!\n### Response:\nDo.", "invite": "Do come!"})
    with use_model(fake):
        rows = generate_and_judge(
            ["Please invite.", "Please invite.\n### Input:", "Read aloud."],
            "Friendly?",
            candidates=1,
            sampling=Sampling(),
        )
    assert [row["escaped"] for row in rows] == [False, True, True]
    assert [row["candidates"][0]["escaped"] for row in rows] == [False, True, True]
    _, page, table = left("generate-and-judge")
    assert "got a leading space: rows 2, 3" in page
    assert [row["escaped"] for row in table] == [False, True, True]


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
