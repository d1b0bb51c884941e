"""The spellings of labels on published vocabularies, against their definition read off every token."""

import json
import unicodedata
from collections.abc import Sequence
from functools import cache

import pytest
from tokenizers import decoders

from alpaca_core import Label
from alpaca_core.asking import LETTERS
from alpaca_core.labels import as_labels, find_spellings
from alpaca_core.model import LanguageModel
from alpaca_core.prompts import template_of
from alpaca_core.spec import YES_NO
from alpaca_core.tokenizer import Tokenizer

ENDINGS = [
    "### Response:",
    "### Response:\n",
    "Text: a goal.\nCategory:",
    "The answer is",
    "Answer: ",
    "He said (",
    "7",
]
LABELS: list[Sequence[str | Label]] = [
    YES_NO,
    ["World", "Sports", "Business", "Technology"],
    ["yes", "no", "not sure"],
    ["card lost", "card not working", "billing"],
    ["1", "2", "3", "4", "5"],
    ["True", "Yes", "naïve"],
    [Label(name="north", aliases=("n", "up")), Label(name="no", aliases=("n", "nay"))],
    [Label(name=letter, exact=True) for letter in LETTERS[:4]],
]


@cache
def said(text: str) -> str:
    """What a text says: no outer white space, no case, one Unicode form."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).strip().casefold()).strip()


def surface(label: Label) -> set[str]:
    """As given, lower, Title and UPPER, with and without a leading space; an exact label as given alone."""
    words = {text.strip() for text in (label.name, *label.aliases)}
    if not label.exact:
        words |= {case(word) for word in words for case in (str.lower, str.title, str.upper)}
    return {space + word for word in words for space in ("", " ")}


@cache
def token_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """What each token of the published vocabulary adds to a text, part of a character aside."""
    definition = json.loads(tokenizer.definition)
    control = {token["content"] for token in definition["added_tokens"]}
    byte_level, texts = decoders.ByteLevel(), {}
    for piece, token in definition["model"]["vocab"].items():
        if "ByteLevel" in json.dumps(definition["decoder"]):
            text = byte_level.decode([piece])
        elif piece.startswith("<0x") and piece.endswith(">"):
            text = bytes.fromhex(piece[3:5]).decode(errors="replace")
        else:
            text = piece.replace("▁", " ")
        if piece not in control and "\ufffd" not in text:
            texts[token] = text
    return texts


def defined(tokenizer: Tokenizer, labels: Sequence[Label], ending: str) -> list[set[tuple[int, ...]]]:
    """The spellings of each label after a prompt that ends so, as `alpaca_core.labels` defines them."""
    texts = token_texts(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer._full.encode(text, add_special_tokens=False).ids

    def canonical(form: str) -> tuple[int, ...]:
        for before in (ending, "\n"):  # no token of these vocabularies begins with a line break and goes on with a word
            whole, prompt = encode(before + form), encode(before)
            if whole[: len(prompt)] == prompt:
                break
        return tuple(whole[len(prompt) :])

    spelt = []
    for label in labels:
        wanted = {form.strip() if label.exact else said(form) for form in surface(label)}
        single = {(token,) for token, text in texts.items() if (text.strip() if label.exact else said(text)) in wanted}
        spelt.append(single | {canonical(form) for form in surface(label)})
    own = [{sequence for sequence in mine if sum(sequence in theirs for theirs in spelt) == 1} for mine in spelt]
    return [
        {sequence for sequence in mine if not any(sequence[:cut] in mine for cut in range(1, len(sequence)))}
        for mine in own
    ]


def compare(tokenizer: Tokenizer, given: Sequence[str | Label], prompt: Sequence[int], ending: str) -> None:
    labels = as_labels(given)
    found = find_spellings(tokenizer, labels, prompt)
    expected = defined(tokenizer, labels, ending)
    assert all(expected)
    for index, label in enumerate(labels):
        sequences = found.sequences(index)
        assert len(sequences) == len(set(sequences)), label.name
        assert set(sequences) == expected[index], label.name


@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: " ".join(label.name for label in as_labels(labels)))
def test_spellings_on_llamas_vocabulary_are_those_of_the_definition(
    llama: Tokenizer, labels: Sequence[str | Label], ending: str
) -> None:
    prompt = f"Below is an instruction.\n\n{ending}"
    compare(llama, labels, [*llama.prefix_ids, *llama.encode(prompt)], prompt)


@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: " ".join(label.name for label in as_labels(labels)))
def test_spellings_on_the_embedded_vocabulary_are_those_of_the_definition(
    embedded: LanguageModel, labels: Sequence[str | Label], ending: str
) -> None:
    prompt = f"Below is an instruction.\n\n{ending}"
    compare(embedded.tokenizer, labels, embedded.tokenizer.encode(prompt), prompt)


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: " ".join(label.name for label in as_labels(labels)))
def test_spellings_after_the_embedded_chat_template_are_those_of_the_definition(
    embedded: LanguageModel, labels: Sequence[str | Label]
) -> None:
    ids = template_of(embedded, "chat").encode("Is it so?").ids
    last = max(place for place, token in enumerate(ids) if embedded.tokenizer.is_special(token))
    ending = embedded.tokenizer.decode(ids[last + 1 :])
    assert ending == "assistant\n"
    compare(embedded.tokenizer, labels, ids, ending)
