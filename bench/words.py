"""Prompts of random words, each of which is one token, so that text and tokens have the same length."""

import itertools
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import numpy

from alpaca_core import prompts
from alpaca_core.tokenizer import Tokenizer

_SEEDS = itertools.count()
_END = 256


class Words:
    """Draws prompts: new ones at each call, so that nothing is found in a cache but what that call shares.

    Args:
        tokenizer: Whose words they are of: pieces of ASCII letters behind a space, or any piece where it has few.
        vocab_size: Of the network.

    Attributes:
        words: Their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        known = range(min(vocab_size, tokenizer.vocab_size))
        plain = [token for token in known if not tokenizer.is_special(token)]
        words = [token for token in plain if re.fullmatch("[Ġ▁][A-Za-z]{2,}", tokenizer.piece(token))]
        self.words = words if len(words) >= 1000 else plain
        self._table = numpy.array(self.words)
        self._drawn: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}

    def prepare(self, count: int, length: int, shared: int = 0) -> None:
        """Draw what the next such `draw` gives out, before a clock is started."""
        self._drawn = {(count, length, shared): self.draw(count, length, shared)}

    def draw(self, count: int, length: int, shared: int = 0) -> list[tuple[int, ...]]:
        """Draw prompts of `length` tokens that begin with the same `shared` ones."""
        if (count, length, shared) in self._drawn:
            return self._drawn.pop((count, length, shared))
        dice = numpy.random.default_rng(next(_SEEDS))  # of the standard library's it would take as long as judging
        head, rest = (
            self._table[dice.integers(len(self._table), size=size)].tolist()
            for size in (shared, (count, length - shared))
        )
        return [(*head, *each) for each in rest]

    def text(self, tokens: tuple[int, ...]) -> str:
        """Return tokens as text."""
        return self._tokenizer.decode(tokens).strip()

    def labels(self, count: int) -> list[tuple[int, ...]]:
        """Draw labels of one, two and three tokens, in turn; four of those with more begin alike."""
        drawn = random.Random(count).sample(self.words, k=2 * count)
        own, firsts = drawn[:count], drawn[count:]
        longest = [(firsts[place // 6], own[place], own[place - 1]) for place in range(count)]
        return [label[: 1 + place % 3] if place % 3 else (own[place],) for place, label in enumerate(longest)]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer with LLaMA's rules and made-up words, for a model with random weights.

    The words of our prompts are in it, so that a template has about as many tokens as with LLaMA's own.
    """
    ours = {word for text in vars(prompts).values() if isinstance(text, str) for word in re.findall("[A-Za-z]+", text)}
    ours |= {"Yes", "No", "yes", "no", "YES", "NO"}
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["</s>", "<unk>", "▁", "\n"]
    pieces += [character for character in string.printable if not character.isspace()]
    pieces += [piece for word in sorted(ours) for piece in (f"▁{word}", word) if len(piece) > 1]
    made = ("▁" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    known = set(pieces)
    pieces += itertools.islice((piece for piece in made if piece not in known), vocab_size - len(pieces))
    space: dict[str, Any] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    end = {"id": _END, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False}
    definition = {
        "version": "1.0",
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "pre_tokenizer": space,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": _END + 1,
            "byte_fallback": True,
            # one word is likelier than the letters that it is made of
            "vocab": [[piece, -10.0 if len(piece) > 1 else -20.0] for piece in pieces],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
