"""Every verb on hostile rows: each gets a typed error or a right result, alone and in a batch, and harms nobody."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_core import (
    Answer,
    CascadeJudgment,
    Completion,
    Judgment,
    Outlier,
    Rating,
    RowError,
    Sampling,
    Verification,
    answer,
    cascade,
    chain_of_thought,
    classify,
    conclude,
    generate,
    is_outlier,
    judge,
    next_tokens,
    rate,
    same_meaning,
    show_tokens,
    verify,
)
from alpaca_core.model import GenerateRow, ScoreRow
from alpaca_core.testing import FakeModel
from alpaca_core.tokens import MOST_TOKENS
from tests.core.hostile import HOSTILE, code_of

Verb = Callable[[Any, Sequence[Any]], list[Any]]

GOOD = "Is it so?"
SHORT, WARM = Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, temperature=1.0)
FAKE = FakeModel({"Yes": 0.5, "No": 0.25, "3": 0.25})
VERBS: dict[str, Verb] = {
    "generate": lambda model, rows: generate(model, rows, SHORT),
    "generate, raw": lambda model, rows: generate(model, rows, SHORT, template="raw"),
    "generate, inputs": lambda model, rows: generate(model, [GOOD] * len(rows), SHORT, inputs=rows),
    "chain_of_thought": lambda model, rows: chain_of_thought(model, rows, SHORT),
    "conclude": lambda model, rows: conclude(model, rows),
    "conclude, reasonings": lambda model, rows: conclude(model, [GOOD] * len(rows), rows),
    "verify": lambda model, rows: verify(model, rows, [GOOD] * len(rows)),
    "verify, answers": lambda model, rows: verify(model, [GOOD] * len(rows), rows),
    "verify, reasonings": lambda model, rows: verify(model, [GOOD] * len(rows), [GOOD] * len(rows), reasonings=rows),
    "verify, sampled": lambda model, rows: verify(model, rows, [GOOD] * len(rows), method="sampled", samples=3),
    "verify, consistent": lambda model, rows: verify(model, rows, [GOOD] * len(rows), method="consistent", samples=2),
    "judge": lambda model, rows: judge(model, rows),
    "judge, instruction": lambda model, rows: judge(model, rows, ["Yes", "No", "3"], instruction="What is it?"),
    "judge, text inside": lambda model, rows: judge(model, rows, instruction="Now {text} or {text}?"),
    "judge, letters": lambda model, rows: judge(model, rows, ["Yes", "No"], letters=True),
    "judge, rotated": lambda model, rows: judge(model, rows, ["Yes", "No"], rotate_labels=True),
    "judge, sampled": lambda model, rows: judge(model, rows, method="sampled", samples=3),
    "classify": lambda model, rows: classify(model, rows, ["Yes", "No"]),
    "same_meaning": lambda model, rows: same_meaning(model, rows, [GOOD] * len(rows)),
    "same_meaning, seconds": lambda model, rows: same_meaning(model, [GOOD] * len(rows), rows),
    "is_outlier": lambda model, rows: is_outlier(model, rows, ["One.", "Two."]),
    "rate": lambda model, rows: rate(model, rows, "How clear is it?"),
    "answer": lambda model, rows: answer(model, rows, SHORT),
    "answer, votes": lambda model, rows: answer(model, rows, WARM, samples=3),
    "answer, attempts": lambda model, rows: answer(model, rows, WARM, max_attempts=2, min_p_correct=1.0),
    "cascade": lambda model, rows: cascade(model, rows, margin=1, sampling=SHORT),
    "cascade, labels": lambda model, rows: cascade(
        model, rows, ["Yes", "No"], margin=1, sampling=SHORT, instruction="What is it?"
    ),
    "next_tokens": lambda model, rows: next_tokens(model, rows, 3),
    "show_tokens": lambda model, rows: show_tokens(model, rows),
}
OPTIONAL = {"generate, inputs", "conclude, reasonings", "verify, reasonings"}
"""Columns in which None is no bad row but none."""
DRAWN = {"verify, sampled", "verify, consistent", "judge, sampled", "answer, votes", "answer, attempts"}
"""Verbs whose result on this fake depends on the row, by its own noise."""
EDGELESS = {"verify, consistent", "answer, votes", "answer, attempts", "judge, text inside", "show_tokens"}
"""Verbs whose longest prompt grows by what is drawn, too, or by two tokens with each letter of the row, or never."""
TOLD: dict[type, set[str]] = {
    Judgment: {"text"},
    CascadeJudgment: {"text"},
    Outlier: {"text"},
    Rating: {"text"},
    Verification: {"question", "answer"},
    Answer: {"question"},
}
"""Fields that repeat the row."""

each_verb = pytest.mark.parametrize("name", VERBS)


class Recorder(FakeModel):
    """Remembers how much of the context the hungriest of its rows took."""

    need = 0

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        self._take([len(row.prompt_ids) + row.sampling.max_new_tokens for row in rows])
        return super().generate(rows)

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        self._take([len(row.prompt_ids) + max(row.continuations.depths()) for row in rows])
        return super().loglikelihood(rows)

    def _take(self, needs: list[int]) -> None:
        self.need = max([self.need, *needs])


def told(result: Any) -> object:
    """What a result says, without what repeats the row or counts its tokens."""
    if isinstance(result, tuple):
        return result
    return result.model_dump(exclude=TOLD.get(type(result), set()) | {"prompt_tokens", "escaped"})


def check(name: str, rows: list[Any]) -> None:
    """Every row gets what it must, alone and between good rows, which get what they get alone."""
    verb, longest = VERBS[name], MOST_TOKENS if name == "show_tokens" else FAKE.info.context_length
    [good] = verb(FAKE, [GOOD])
    assert not isinstance(good, RowError)
    together = verb(FAKE, [GOOD, *rows, GOOD])
    assert together[0] == together[-1] == good
    for row, result in zip(rows, together[1:-1], strict=True):
        assert verb(FAKE, [row]) == [result]
        expected = None if row is None and name in OPTIONAL else code_of(row, longest)
        if expected is not None:
            assert isinstance(result, RowError), f"{row!r:.80} gave {result!r:.200}"
            assert result.code == expected
            assert len(result.message) < 1_000
            result.model_dump_json()
            continue
        assert not isinstance(result, RowError), f"{row!r:.80} gave {result!r:.200}"
        if name == "show_tokens":
            assert bytes(token.id for token in result) == row.encode()
        elif name not in DRAWN:
            assert told(result) == told(good)
        if not isinstance(result, tuple):
            repeated = [getattr(result, field) for field in TOLD.get(type(result), ())]
            assert not repeated or name == "verify, reasonings" or any(row in text for text in repeated)
            assert type(result).model_validate_json(result.model_dump_json()) == result


@each_verb
def test_a_hostile_row_costs_itself_only(name: str) -> None:
    check(name, HOSTILE)


@each_verb
@settings(deadline=None, max_examples=20)
@given(
    rows=st.lists(
        st.text(max_size=40)
        | st.lists(st.sampled_from([row for row in HOSTILE if isinstance(row, str) and len(row) < 99])).map("".join)
        | st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zs", "Mn", "Co"]), max_size=8)
        | st.none()
        | st.integers()
        | st.floats()
        | st.binary(max_size=4),
        max_size=4,
    )
)
def test_any_row_gets_a_typed_error_or_a_right_result(name: str, rows: list[Any]) -> None:
    check(name, rows)


@each_verb
def test_a_row_that_failed_before_stays_its_own_error(name: str) -> None:
    failed = RowError(code="prompt_too_long", message="a step before failed.")
    results = VERBS[name](FAKE, [GOOD, failed, GOOD])
    assert results[1] == failed
    assert results[0] == results[2] == VERBS[name](FAKE, [GOOD])[0]


@each_verb
def test_no_rows_are_no_results(name: str) -> None:
    assert VERBS[name](FAKE, []) == []


@pytest.mark.parametrize("name", [name for name in VERBS if name not in EDGELESS])
def test_exactly_the_context_is_worked_on_and_one_token_more_is_an_error(name: str) -> None:
    recorder = Recorder({"Yes": 0.5, "No": 0.25, "3": 0.25}, context_length=4_000)
    assert not isinstance(VERBS[name](recorder, ["x"])[0], RowError)
    room = 1 + recorder.info.context_length - recorder.need
    rows = [GOOD, "x" * room, "x" * (room + 1), "x" * recorder.info.context_length * 4, GOOD]
    results = VERBS[name](recorder, rows)
    assert [isinstance(result, RowError) for result in results] == [False, False, True, True, False]
    assert {result.code for result in results[2:4]} == {"prompt_too_long"}
    assert "by 1 token" in results[2].message
    assert results[1:4] == [VERBS[name](recorder, [row])[0] for row in rows[1:4]]
