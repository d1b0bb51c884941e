"""Rows and tokens by second, against a clock and against what the rows themselves say."""

import time
from collections.abc import Iterator, Sequence

import pytest

from alpaca_core import Completion, RowError, answer, generate, judge
from alpaca_core.metering import Metered, Speed
from alpaca_core.model import GenerateRow, ScoreRow
from alpaca_core.prompts import template_of
from alpaca_core.testing import FakeModel


class SlowModel(FakeModel):
    """A fake that takes 20 ms a row."""

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        for each in super().generate(rows):
            time.sleep(0.02)
            yield each

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        for each in super().loglikelihood(rows):
            time.sleep(0.02)
            yield each


REPLIES = {"?": {"Yes": 0.75, "No": 0.25}}
TEXTS = ["Is it so?", "And that?", "   ", "Really?"]


def test_tokens_are_those_that_the_rows_say_and_seconds_those_of_a_clock() -> None:
    model = Metered(SlowModel(REPLIES))
    before = time.perf_counter()
    rows = generate(model, TEXTS)
    speed = model.speed(len(TEXTS))
    clock = time.perf_counter() - before
    good = [row for row in rows if isinstance(row, Completion)]
    assert len(good) == 3
    assert speed.tokens_read == sum(row.prompt_tokens for row in good)
    assert speed.tokens_written == sum(row.completion_tokens for row in good) == 3 * len("Yes")
    assert speed.seconds >= 0.06
    assert speed.seconds == pytest.approx(clock, rel=0.2)
    assert speed.rows_per_second == pytest.approx(4 / clock, rel=0.25)
    assert speed.tokens_per_second == pytest.approx((speed.tokens_read + 9) / clock, rel=0.25)


def test_of_judged_texts_the_prompts_count() -> None:
    model = Metered(FakeModel(REPLIES))
    assert judge(model, TEXTS) == judge(FakeModel(REPLIES), TEXTS)
    prompts = [template_of(model, None).encode(text, None).ids for text in TEXTS if text.strip()]
    speed = model.speed(len(TEXTS))
    assert (speed.tokens_read, speed.tokens_written) == (sum(map(len, prompts)), 0)


def test_a_chain_counts_all_its_steps_and_a_restart_none_of_them() -> None:
    model = Metered(FakeModel(REPLIES))
    rows = answer(model, ["Is it so?"])
    assert rows == answer(FakeModel(REPLIES), ["Is it so?"])
    assert model.speed(1).tokens_written == 2 * len("Yes"), "the reasoning and the conclusion"
    model.restart()
    assert model.speed(1).tokens_read == 0
    assert model.speed(1).seconds < 0.5


def test_no_time_at_all_is_no_reason_to_fail() -> None:
    assert Speed(rows=0, seconds=0.0, tokens_read=0, tokens_written=0).rows_per_second == 0
