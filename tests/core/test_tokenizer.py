"""Text to tokens and back, for every family; user text never becomes a control token."""

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alpaca_core.errors import InvalidCheckpoint, RowRejected
from alpaca_core.model import LanguageModel
from alpaca_core.tokenizer import Tokenizer, meaning
from tests.core.vocabularies import ADDED, CONTROL, SENTENCES

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

hostile = st.lists(
    st.sampled_from([*CONTROL, *ADDED, "<0x41>", "▁", " ", "\n", "<", "</", "s>", "yes", "Ġ", "\0", "﻿", "‮", "é"])
    | st.text(max_size=5),
    max_size=12,
).map("".join)


@SHARED
@given(text=hostile)
def test_no_text_reaches_a_control_token(family: Tokenizer, text: str) -> None:
    try:
        ids = family.encode(text)
    except RowRejected as error:
        assert error.code == "invalid_text"
        return
    unknown = family.special_ids["<unk>"]
    assert not {token for token in ids if family.is_special(token)} - {unknown}


@pytest.mark.parametrize("place", ["start", "segment", "inside"])
def test_ordinary_text_is_encoded_as_the_published_tokenizer_does(family: Tokenizer, place: str) -> None:
    for text in SENTENCES[:5]:
        ids = family.encode(text, place)
        assert family.decode(ids).strip() == family._full.decode(ids, skip_special_tokens=False).strip()
    if place == "start":
        for text in SENTENCES[:5]:
            assert family.encode(text) == family._full.encode(text, add_special_tokens=False).ids


@SHARED
@given(text=st.text(max_size=40))
def test_byte_level_text_survives_the_round_trip(embedded: LanguageModel, text: str) -> None:
    tokenizer = embedded.tokenizer
    try:
        ids = tokenizer.encode(text)
    except RowRejected:
        assert any(0xD800 <= ord(character) < 0xE000 for character in text)
        return
    if any(bytes([byte]) not in tokenizer.ids_by_bytes for byte in text.encode()):
        return  # the published vocabulary lacks 0xF1, the first byte of planes that Unicode has not assigned
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[token] or b"" for token in ids).decode() == text


def test_the_bytes_of_tokens_are_what_decoding_adds(family: Tokenizer) -> None:
    for text in SENTENCES[:5]:
        ids = family.encode(text, "inside")
        joined = b"".join(family.token_bytes[token] or b"" for token in ids).decode()
        assert joined.split() == family.decode(ids).split()


def test_a_continuation_is_what_encoding_in_one_string_adds(family: Tokenizer) -> None:
    for end in ("Response:", "the answer is", "yes\n", "("):
        prompt = family.encode(f"Each can holds five. {end}")
        if not family.decode(prompt).endswith(end[-1]):
            continue  # a vocabulary that has no line break cannot say what follows it
        for form in ("yes", " yes", "Not sure", " not sure", "TRUE"):
            whole = family.encode(f"Each can holds five. {end}{form}")
            if whole[: len(prompt)] == prompt:
                assert [*prompt, *family.continuation(prompt, form)] == whole


@SHARED
@given(
    text=st.lists(st.sampled_from([*SENTENCES[:5], "(", ":", "12", " ", "  ", "\n", "'", "é", "x"]), max_size=4).map(
        "".join
    ),
    form=st.sampled_from(["yes", " yes", "s", " 34", "34", "'t", "\n", ":", "Not sure", " é", "\u0301"]),
)
def test_a_text_goes_on_from_the_tail_of_a_prompt_as_from_all_of_it(family: Tokenizer, text: str, form: str) -> None:
    prompt = family.encode(f"The answer {text}")
    assert family.continuation(prompt, form) == family._continuation(tuple(prompt), form)


def test_prompts_that_end_alike_have_one_tail(embedded: LanguageModel) -> None:
    tokenizer = embedded.tokenizer
    tails = {tokenizer.tail(tokenizer.encode(f"Text: {sentence}\nCategory:")) for sentence in SENTENCES}
    assert tails == {tuple(tokenizer.encode(":"))}


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(max_size=30) | hostile, form=st.text(min_size=1, max_size=6) | st.sampled_from([" yes", "'s", "12"])
)
def test_a_published_vocabulary_goes_on_from_the_tail_as_from_the_prompt(
    embedded: LanguageModel, text: str, form: str
) -> None:
    tokenizer = embedded.tokenizer
    try:
        prompt = tokenizer.encode(text)
        found = tokenizer.continuation(prompt, form)
    except RowRejected:
        return
    assert found == tokenizer._continuation(tuple(prompt), form)


def test_a_continuation_whose_border_melts_keeps_the_prompts_tokens(embedded: LanguageModel) -> None:
    tokenizer = embedded.tokenizer
    prompt = tokenizer.encode("Answer: ")
    found = tokenizer.continuation(prompt, "yes")
    assert tokenizer.encode("Answer: yes")[: len(prompt)] != prompt
    assert tokenizer.decode(found) == "yes"


def test_tokens_that_mean_the_same_are_found_by_meaning(family: Tokenizer) -> None:
    for wanted, tokens in family.ids_by_meaning.items():
        for token in tokens:
            assert meaning(family.decode([token])) == wanted


def test_threads_get_their_own_results(embedded: LanguageModel) -> None:
    tokenizer = embedded.tokenizer
    texts = [f"{sentence} <|im_end|> {number}" for number, sentence in enumerate(SENTENCES)]
    expected = [tokenizer.encode(text) for text in texts]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(text for text, ids in zip(texts, expected, strict=True) if tokenizer.encode(text) != ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_broken_definition_is_an_error_of_the_checkpoint() -> None:
    for definition in ("", "{}", "[1]", '{"added_tokens": []}'):
        with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json"):
            Tokenizer(definition)
