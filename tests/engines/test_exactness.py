"""Masses of labels on a float32 network against brute force, on five families of tokenizers.

Brute force finds the spellings by trying all tokens, and scores each by a loop over its own, without a trie, a cache
or a mask.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from alpaca_core import Label, judge
from alpaca_core.errors import InvalidLabels
from alpaca_core.labels import as_labels, forms
from alpaca_core.tokenizer import Tokenizer, meaning
from tests.core.vocabularies import FAMILIES

PROMPT = "Is Paris the capital of France"
SETS: dict[str, list[str | Label]] = {
    "shared beginnings": ["no", "not", "not it"],
    "aliases": [Label(name="yes", aliases=("true", "yes it")), Label(name="no", aliases=("false", "not"))],
    "twins of NFKC": [Label(name="\N{LATIN SMALL LIGATURE FI}ve", aliases=("five",)), "two"],
    "accents": [
        Label(name="caf\N{LATIN SMALL LETTER E WITH ACUTE}", aliases=("cafe\N{COMBINING ACUTE ACCENT}",)),
        "on",
    ],
}
Sequence_ = tuple[int, ...]


@cache
def said_by(tokenizer: Tokenizer) -> dict[int, bytes]:
    """What each token adds to a text, as the `tokenizers` library writes and reads it."""
    texts = {chr(point) for point in (*range(0x800), 0xFB01, 0x1F999)} - {"\r"}
    mapped = {text: ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0] for text in texts}
    byte_of = {sign: byte for text, signs in mapped.items() for sign, byte in zip(signs, text.encode(), strict=True)}
    found = {}
    for token in (token for token in range(tokenizer.vocab_size) if not tokenizer.is_special(token)):
        piece = tokenizer.piece(token)
        if "ByteLevel" in tokenizer.definition and set(piece) <= set(byte_of):
            found[token] = bytes(byte_of[sign] for sign in piece)
        elif piece.startswith("<0x"):
            found[token] = bytes.fromhex(piece[3:5])
        else:
            found[token] = tokenizer.decode([token]).encode()
    return found


def segmentations(tokenizer: Tokenizer, form: str) -> set[Sequence_]:
    """Every sequence of tokens that says a form, found by trying all tokens one after another."""
    found: set[Sequence_] = set()
    begun: list[tuple[Sequence_, bytes]] = [((), form.encode())]
    while begun:
        path, left = begun.pop()
        for token, content in said_by(tokenizer).items():
            if content == left:
                found.add((*path, token))
            elif content and left.startswith(content):
                begun.append(((*path, token), left[len(content) :]))
    return found


def spellings(tokenizer: Tokenizer, labels: Sequence[Label], *, every: bool) -> dict[Sequence_, int]:
    """The definition at the head of `labels.py`, read literally."""
    prompt = tokenizer.encode(PROMPT)
    meant: dict[Sequence_, set[int]] = {}
    for index, label in enumerate(labels):
        for form in forms(label):
            whole = tokenizer.encode(PROMPT + form)
            canonical = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode(form, "inside")
            found = {tuple(canonical)} if meaning(tokenizer.decode(canonical)) == meaning(form) else set()
            found |= {
                (token,) for token in range(tokenizer.vocab_size) if meaning(tokenizer.decode([token])) == meaning(form)
            }
            for sequence in found | (segmentations(tokenizer, form) if every else set()):
                meant.setdefault(sequence, set()).add(index)
    own = {sequence: next(iter(means)) for sequence, means in meant.items() if len(means) == 1}
    return {
        sequence: index
        for sequence, index in own.items()
        if all(own.get(sequence[:cut]) != index for cut in range(1, len(sequence)))
    }


def masses(network: Any, tokenizer: Tokenizer, said: dict[Sequence_, int], labels: int) -> list[float]:
    """P(the longest spelling that a response begins with is the label's), token by token."""
    prompt = [*tokenizer.prefix_ids, *tokenizer.encode(PROMPT)]

    @cache
    def after(path: Sequence_) -> torch.Tensor:
        with torch.no_grad():
            return network(torch.tensor([[*prompt, *path]])).logits[0, -1].double().log_softmax(-1)

    def probability(sequence: Sequence_) -> float:
        return math.exp(math.fsum(float(after(sequence[:cut])[token]) for cut, token in enumerate(sequence)))

    found = [0.0] * labels
    for sequence, label in said.items():
        found[label] += probability(sequence)
        above = next((sequence[:cut] for cut in range(len(sequence) - 1, 0, -1) if sequence[:cut] in said), None)
        if above is not None:
            found[said[above]] -= probability(sequence)
    return found


@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masses_equal_brute_force_in_float32(
    make_network: Callable[..., Any], make_model: Callable[..., Any], family: str, names: str
) -> None:
    tokenizer = FAMILIES[family]()
    labels = as_labels(SETS[names])
    network = make_network(tokenizer.vocab_size)
    with torch.no_grad():
        network.get_output_embeddings().weight.mul_(0.25)  # logits of a few units: float32 holds them to 1e-7
    model = make_model(network)
    model.tokenizer = tokenizer

    def ask(every: bool) -> Any:
        return judge(model, [PROMPT], labels, template="raw", show_labels=False, all_segmentations=every)[0]

    coverage = {}
    for every in (False, True):
        said = spellings(tokenizer, labels, every=every)
        if set(said.values()) != set(range(len(labels))):  # WordPiece drops accents
            with pytest.raises(InvalidLabels):
                ask(every)
            return
        expected = masses(network, tokenizer, said, len(labels))
        judgment = ask(every)
        coverage[every] = judgment.coverage
        assert judgment.coverage == pytest.approx(sum(expected), abs=1e-6)
        for label, mass in zip(labels, expected, strict=True):
            assert judgment.probabilities[label.name] == pytest.approx(mass / sum(expected), abs=1e-6)
    assert coverage[False] <= coverage[True] * (1 + 1e-6)  # the default leaves out, and adds nothing
