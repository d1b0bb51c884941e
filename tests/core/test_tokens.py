"""Tokens as people look at them, and the fake that flows are tested with."""

import math

import pytest

from alpaca_core import (
    ModelSpec,
    RowError,
    Sampling,
    answer,
    describe_tokens,
    generate,
    judge,
    next_tokens,
    show_tokens,
    special_tokens,
)
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel


def test_tokens_shown_one_by_one_are_those_of_the_text() -> None:
    fake = FakeModel("")
    shown = show_tokens(fake, ["alpaca é"])[0]
    assert describe_tokens(fake, [token.id for token in shown]) == shown
    assert describe_tokens(fake, [256]) == special_tokens(fake)


def test_a_text_of_megabytes_is_its_rows_error() -> None:
    long, short = show_tokens(FakeModel(""), ["x" * 100_001, "x"])
    assert isinstance(long, RowError)
    assert long.code == "prompt_too_long"
    assert len(short) == 1


def test_a_hopeless_text_is_refused_before_it_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeModel("")
    monkeypatch.setattr(fake.tokenizer, "encode", lambda text: pytest.fail(f"{len(text)} characters were split"))
    hopeless = "x" * ((100_000 + 1) * fake.tokenizer.longest_piece)
    (row,) = show_tokens(fake, [hopeless])
    assert isinstance(row, RowError)
    assert (row.code, "at least 100,001" in row.message) == ("prompt_too_long", True)


@pytest.mark.parametrize("ids", [[-1], [257], ["a"], [1.0], 3, [None], [2**70]], ids=repr)
def test_a_token_that_does_not_exist_is_refused(ids: object) -> None:
    with pytest.raises(InvalidRequest, match="token"):
        describe_tokens(FakeModel(""), ids)


@pytest.mark.parametrize("n", [0, -1, 2.5, "all", -(10**5000)], ids=["zero", "negative", "float", "text", "huge"])
def test_next_tokens_counts_from_one(n: object) -> None:
    with pytest.raises(InvalidRequest, match="n counts"):
        next_tokens(FakeModel(""), ["?"], n)


def test_a_low_temperature_comes_near_the_likeliest_reply() -> None:
    fake = FakeModel({"rare": 1e-3, "common": 0.999})
    rows = generate(fake, ["?"] * 20, Sampling(temperature=1e-6), sample_indices=range(20))
    assert {row.text for row in rows} == {"common"}
    tie = generate(FakeModel({"a": 1e-9, "b": 1e-9}), ["?"] * 50, Sampling(temperature=0.01), sample_indices=range(50))
    assert {row.text for row in tie} == {"a", "b"}


@pytest.mark.parametrize("replies", [{"a": -1.0}, {"a": 0.0}, {"a": math.inf}, {"a": math.nan, "b": 1.0}], ids=repr)
def test_a_fake_without_a_distribution_is_refused(replies: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match="probabilities"):
        FakeModel(replies)


@pytest.mark.parametrize("index", [-1, 2**64, 10**5000, 1.5, "1", None], ids=lambda index: str(type(index)))
def test_a_sample_index_that_counts_nothing_is_refused(index: object) -> None:
    with pytest.raises(InvalidRequest, match="that of row 1 is not"):
        generate(FakeModel("a"), ["?", "?"], sample_indices=[0, index])


@pytest.mark.parametrize("model", [None, "smollm2", ModelSpec()], ids=lambda model: type(model).__name__)
def test_a_model_is_a_loaded_one(model: object) -> None:
    for verb in (generate, show_tokens, next_tokens, judge, answer):
        with pytest.raises(InvalidRequest, match="load_model"):
            verb(model, ["?"])


@pytest.mark.parametrize(
    "settings", [{"template": ["chat"]}, {"template": 10**5000}, {"adapter": ["a", "b"]}], ids=list
)
def test_a_template_or_adapter_is_a_name(settings: dict[str, object]) -> None:
    for verb in (generate, judge, answer, next_tokens):
        with pytest.raises(InvalidRequest, match=next(iter(settings))):
            verb(FakeModel("Yes"), ["?"], **settings)


def test_sampling_is_a_value() -> None:
    with pytest.raises(InvalidRequest, match="sampling is a Sampling"):
        generate(FakeModel("a"), ["?"], None)
