"""The cascade: its ends equal plain verbs, every margin equals what one run with all reasonings says."""

import pytest

from alpaca_core import CascadeJudgment, Judgment, RowError, Sampling, cascade, chain_of_thought, judge, measure
from alpaca_core.cascading import MARGINS, measure_cascade, reasoned_question, reasoned_texts
from alpaca_core.errors import InvalidLabels, InvalidRequest
from alpaca_core.fitting import fit_calibration
from alpaca_core.model import GenerateRow
from alpaca_core.testing import FakeModel

LABELS = ["Sports", "World", "Business"]
TEXTS = [f"Text {number:02}." for number in range(20)]
ASKED = "Which topic?"


class Counted(FakeModel):
    """A fake that counts the rows which it generates."""

    generated = 0

    def generate(self, rows: list[GenerateRow]) -> object:
        self.generated += len(rows)
        return super().generate(rows)


def world() -> Counted:
    """Twenty texts, the later the surer; after reasoning their labels are others, or none."""
    shares = {text: 0.34 + 0.66 * number / 19 for number, text in enumerate(TEXTS)}
    before = {text: {"Sports": p, "World": (1 - p) * 0.7, "Business": (1 - p) * 0.3} for text, p in shares.items()}
    after = {
        f"below to answer.\nWhich topic?\nAnswer with one of: Sports, World, Business.\n\n### Input:\n{text}": {
            "World": 0.2 + number / 40,
            "Business": 0.8 - number / 40,
        }
        for number, text in enumerate(TEXTS[1:])
    }
    silent = {f"### Input:\n{TEXTS[0]}\nReasoning": "Perhaps."}
    thought = {f"step by step. Which topic?\n{text}": "Well. " * (number + 1) for number, text in enumerate(TEXTS)}
    return Counted({**after, **silent, **thought, **before})


def test_a_margin_of_0_is_the_plain_judge_and_generates_nothing() -> None:
    fake = world()
    rows = cascade(fake, [*TEXTS, ""], LABELS, margin=0, instruction=ASKED)
    plain = judge(fake, [*TEXTS, ""], LABELS, instruction=ASKED)
    assert fake.generated == 0
    for row, first in zip(rows[:-1], plain[:-1], strict=True):
        assert isinstance(row, CascadeJudgment)
        assert {name: getattr(row, name) for name in Judgment.model_fields} == dict(first)
        assert (row.first, row.first_label, row.reasoning, row.reasoning_tokens) == (
            first.probabilities,
            first.label,
            None,
            0,
        )
    assert rows[-1] == plain[-1]


def test_a_margin_of_1_is_reasoning_and_judging_again_for_every_row() -> None:
    fake = world()
    sampling = Sampling(max_new_tokens=24)
    rows = cascade(fake, TEXTS, LABELS, margin=1, instruction=ASKED, sampling=sampling)
    assert fake.generated == len(TEXTS)
    assert rows[-1].first["Sports"] == 1.0
    asked = [f"{ASKED}\n{text}\nThe choices are: Sports, World, Business." for text in TEXTS]
    thoughts = chain_of_thought(fake, asked, sampling)
    again = judge(fake, reasoned_texts(rows), LABELS, instruction=reasoned_question(ASKED))
    for text, row, thought, last in zip(TEXTS, rows, thoughts, again, strict=True):
        assert (row.text, row.reasoning, row.reasoning_tokens) == (
            text,
            thought.text.strip(),
            thought.completion_tokens,
        )
        assert (row.label, row.probabilities, row.coverage, row.reason) == (
            last.label,
            last.probabilities,
            last.coverage,
            last.reason,
        )
    assert rows[0].label is None
    assert "no response" in rows[0].reason


@pytest.mark.parametrize("margin", [0, 0.05, 0.2, 0.5, 0.99, 1])
def test_one_run_with_all_reasonings_measures_every_margin(margin: float) -> None:
    gold = [LABELS[number % 3] for number in range(len(TEXTS))]
    everything = cascade(world(), TEXTS, LABELS, margin=1, instruction=ASKED)
    fake = world()
    rows = cascade(fake, TEXTS, LABELS, margin=margin, instruction=ASKED)
    found = measure_cascade(everything, gold, [margin])
    (point,) = found.points
    assert point.reasoned == fake.generated / len(TEXTS) == sum(row.reasoning is not None for row in rows) / len(TEXTS)
    assert point.tokens == sum(row.reasoning_tokens for row in rows)
    assert point.tokens + point.tokens_saved == found.tokens == sum(row.reasoning_tokens for row in everything)
    assert point.accuracy == sum(row.label == right for row, right in zip(rows, gold, strict=True)) / len(TEXTS)
    firsts = judge(world(), TEXTS, LABELS, instruction=ASKED)
    assert found.first_accuracy == measure(firsts, gold, resamples=0).accuracy.value
    assert found.reasoned_accuracy == sum(r.label == g for r, g in zip(everything, gold, strict=True)) / len(TEXTS)
    assert (found.n, found.failed) == (len(TEXTS), 0)


def test_rows_that_a_run_reasons_about_grow_with_the_margin() -> None:
    found = measure_cascade(cascade(world(), TEXTS, LABELS, margin=1, instruction=ASKED), ["World"] * len(TEXTS))
    assert [point.margin for point in found.points] == list(MARGINS)
    shares = [point.reasoned for point in found.points]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len(set(shares)) > 5


def test_a_rows_result_does_not_depend_on_the_others() -> None:
    together = cascade(world(), TEXTS, LABELS, margin=0.4, instruction=ASKED)
    assert together == [cascade(world(), [text], LABELS, margin=0.4, instruction=ASKED)[0] for text in TEXTS]
    assert {row.reasoning is None for row in together} == {True, False}


@pytest.mark.parametrize("instruction", [None, ASKED, "Text: {text}\nTopic:"])
def test_a_calibration_of_one_judgment_is_refused_for_the_other(instruction: str | None) -> None:
    fake = world()
    settings = {"instruction": instruction, "show_labels": False}
    everything = cascade(fake, TEXTS, LABELS, margin=1, **settings)
    first = fit_calibration(fake, TEXTS, LABELS, **settings)
    second = fit_calibration(
        fake, reasoned_texts(everything), LABELS, instruction=reasoned_question(instruction), show_labels=False
    )
    done = fake.generated
    for given in ({"calibration": second}, {"reasoned_calibration": first}):
        with pytest.raises(InvalidRequest, match="the question"):
            cascade(fake, TEXTS, LABELS, **settings, **given)
    assert fake.generated == done
    rows = cascade(fake, TEXTS, LABELS, margin=0.4, calibration=first, reasoned_calibration=second, **settings)
    firsts = judge(fake, TEXTS, LABELS, calibration=first, **settings)
    seconds = judge(
        fake,
        reasoned_texts(everything),
        LABELS,
        instruction=reasoned_question(instruction),
        show_labels=False,
        calibration=second,
    )
    for row, one, other in zip(rows, firsts, seconds, strict=True):
        assert row.first == one.probabilities
        assert row.probabilities == (one if row.reasoning is None else other).probabilities
    assert len({row.calibration for row in rows}) == 1
    assert rows[0].calibration not in (None, first.digest, second.digest)


def test_a_question_without_an_instruction_is_reasoned_about_as_it_is() -> None:
    fake = FakeModel({"reasoning below": "No", "step by step. Is it {text}?\n": "It is not.", "Is it": "Maybe"})
    row = cascade(fake, ["Is it {text}?"])[0]
    assert (row.label, row.first_label, row.reasoning, row.text) == ("No", None, "It is not.", "Is it {text}?")


@pytest.mark.parametrize(
    ("labels", "show_labels"),
    [
        (LABELS, None),
        (LABELS, False),
        (["yes", "No"], None),
        (["yes", "No"], True),
        ([f"l{number:02}" for number in range(20)], None),
        ([f"l{number:02}" for number in range(21)], None),
        ([f"l{number:02}" for number in range(21)], True),
    ],
    ids=str,
)
def test_the_reasoning_is_told_the_labels_where_the_judge_is(labels: list[str], show_labels: bool | None) -> None:
    fake = FakeModel(
        {
            "The choices are: " + ", ".join(labels): "I was told.",
            "step by step": "I was not.",
            "Answer with one of: " + ", ".join(labels): labels[0],
        },
        otherwise=labels[1],
    )
    row = cascade(fake, ["Which?"], labels, margin=1, show_labels=show_labels)[0]
    assert row.first_label == row.label == judge(fake, ["Which?"], labels, show_labels=show_labels)[0].label
    assert row.reasoning == ("I was told." if row.label == labels[0] else "I was not.")


def test_a_failed_row_costs_itself_only_and_a_silent_reasoning_nothing() -> None:
    fake = FakeModel(
        {"below": "Yes", "step by step. Long": "So. " * 150, "step by step": "", "?": {"Yes": 0.5, "No": 0.5}},
        context_length=1050,
    )
    rows = cascade(fake, ["", None, "Short?", "Long " * 50 + "?"], sampling=Sampling(max_new_tokens=590))
    assert [row.code if isinstance(row, RowError) else row.reasoning for row in rows] == [
        "empty_text",
        "not_text",
        "",
        "prompt_too_long",
    ]
    assert measure_cascade(rows, ["Yes"] * 4).failed == 3
    assert [isinstance(text, RowError) for text in reasoned_texts(rows)] == [True, True, False, True]


@pytest.mark.parametrize("margin", [0, 0.3, 1])
def test_progress_ends_at_the_number_of_texts(margin: float) -> None:
    done: list[float] = []
    cascade(world(), [*TEXTS, ""], LABELS, margin=margin, instruction=ASKED, progress=done.append)
    assert sum(done) == pytest.approx(len(TEXTS) + 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"margin": -0.1},
        {"margin": 1.1},
        {"margin": float("nan")},
        {"margin": "0.2"},
        {"margin": None},
        {"sampling": None},
        {"instruction": " "},
        {"template": "none"},
        {"adapter": "none"},
        {"texts": "Is it?"},
    ],
    ids=repr,
)
def test_settings_that_are_none_are_refused_before_any_work(settings: dict[str, object]) -> None:
    def refuse(rows: object) -> object:
        raise AssertionError("the model was asked")

    fake = FakeModel("Yes")
    fake.loglikelihood = lambda rows: refuse(rows) if rows else iter(())
    with pytest.raises(InvalidRequest):
        cascade(fake, **{"texts": ["Is it?"], **settings})
    with pytest.raises(InvalidLabels):
        cascade(fake, ["Is it?"], ["one"])


def test_measuring_wants_a_run_in_which_every_row_was_reasoned_about() -> None:
    plain = cascade(world(), TEXTS, LABELS, margin=0, instruction=ASKED)
    everything = cascade(world(), TEXTS, LABELS, margin=1, instruction=ASKED)
    gold = ["World"] * len(TEXTS)
    failed = RowError(code="empty_text", message="a text is blank")
    for rows, right, said in [
        (plain, gold, "margin=1"),
        (judge(world(), TEXTS, LABELS), gold, "margin=1"),
        (everything, gold[1:], "20 rows"),
        (everything, [*gold[1:], "world"], "letter by letter"),
        ([failed], ["World"], "Mend the rows"),
    ]:
        with pytest.raises(InvalidRequest, match=said):
            measure_cascade(rows, right)
    with pytest.raises(InvalidRequest, match="margin lies"):
        measure_cascade(everything, gold, [0.5, 2])
    with pytest.raises(InvalidRequest, match="margin=1"):
        reasoned_texts(plain)
