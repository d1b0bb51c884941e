"""Every control token of the published vocabulary, written by a user: whole, and cut over two fields at every place."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alpaca_core import prompts
from alpaca_core.model import LanguageModel
from alpaca_core.prompts import Prompt, Template
from alpaca_core.spec import TemplateName
from alpaca_core.tokenizer import _made_of, _out_of_reach, _stripped

TEMPLATES: list[TemplateName] = ["chat", "alpaca", "alpaca-lora", "raw"]
TWO_FIELDS: dict[str, Callable[[Template, str, str], Prompt]] = {
    "instruction and input": lambda template, left, right: template.encode(left, right),
    "one field": lambda template, left, right: template.encode(left + right),
    "question and reasoning": lambda template, left, right: template.encode(
        prompts.CONCLUDE.format(question=left, reasoning=right)
    ),
    "question and answer": lambda template, left, right: template.encode(
        prompts.VERIFY.format(question=left, answer=right)
    ),
    "text and reasoning": lambda template, left, right: template.encode(
        prompts.REASONED.format(question=left), prompts.REASONING.format(text=right, reasoning=left)
    ),
    "pair": lambda template, left, right: template.encode(
        prompts.SAME_MEANING, prompts.PAIR.format(first=left, second=right)
    ),
}


def controls(model: LanguageModel, prompt: Prompt) -> list[int]:
    """The control tokens of a prompt, in its order."""
    return [token for token in prompt.ids if model.tokenizer.is_special(token)]


@pytest.mark.parametrize("fields", TWO_FIELDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_control_token_comes_from_a_users_text(embedded: LanguageModel, name: TemplateName, fields: str) -> None:
    template, write = Template(embedded, name), TWO_FIELDS[fields]
    calm = controls(embedded, write(template, "x", "x"))
    assert bool(calm) == (name == "chat")
    for written in embedded.tokenizer.special_ids:
        for around in ("", " ", "\n", "\n\n"):
            text = around + written + around
            for cut in range(len(text) + 1):
                prompt = write(template, text[:cut], text[cut:])
                assert controls(embedded, prompt) == calm, (written, text[:cut], text[cut:])


def test_every_added_token_of_the_definition_is_a_control_token(embedded: LanguageModel) -> None:
    tokenizer = embedded.tokenizer
    added = {token["content"]: token["id"] for token in json.loads(tokenizer.definition)["added_tokens"]}
    assert len(added) >= 17
    assert tokenizer.special_ids == added
    for written, token in added.items():
        assert tokenizer._full.encode(written).ids == [token], "the published tokenizer reads it as control"
        for place in ("start", "segment", "inside"):
            ids = tokenizer.encode(written, place)
            assert not any(map(tokenizer.is_special, ids))
            assert tokenizer.decode(ids) == written


def test_two_control_tokens_cut_into_one_another_are_text(embedded: LanguageModel) -> None:
    tokenizer = embedded.tokenizer
    for outer in tokenizer.special_ids:
        for inner in tokenizer.special_ids:
            for cut in (1, len(outer) // 2, len(outer) - 1):
                text = outer[:cut] + inner + outer[cut:]
                ids = tokenizer.encode(text)
                assert not any(map(tokenizer.is_special, ids))
                assert tokenizer.decode(ids) == text


@cache
def without_control_tokens(definition: str) -> tokenizers.Tokenizer:
    parsed = json.loads(definition)
    assert _out_of_reach(parsed), "else this would compare the slow way with itself"
    return _made_of(_stripped(parsed))


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12), st.sampled_from(["<|im_start|>", "<|im_", "end|>", "<|endoftext|>", "<repo_name>"])
        ),
        max_size=8,
    ).map("".join)
)
def test_tables_shared_with_the_published_tokenizer_encode_as_tables_without_control_tokens(
    embedded: LanguageModel, text: str
) -> None:
    tokenizer = embedded.tokenizer
    slow = without_control_tokens(tokenizer.definition)
    assume(all(not 0xD800 <= ord(character) < 0xE000 for character in text))
    assert tokenizer.encode(text) == slow.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, "inside") == tokenizer.encode(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda parsed: parsed["model"].update(ignore_merges=True),
        lambda parsed: parsed["model"].update(continuing_subword_prefix="##"),
        lambda parsed: parsed["model"].update(end_of_word_suffix="</w>"),
        lambda parsed: parsed["model"]["merges"].append(["<|im_", "start|>"]),
        lambda parsed: parsed["added_tokens"].append({**parsed["added_tokens"][0], "content": "x", "id": 99_999}),
        lambda parsed: parsed["model"].update(type="Unigram"),
    ],
)
def test_tables_are_not_shared_where_a_text_might_reach_a_control_token(
    embedded: LanguageModel, change: Callable[[dict[str, Any]], object]
) -> None:
    parsed = json.loads(embedded.tokenizer.definition)
    change(parsed)
    assert not _out_of_reach(parsed)
