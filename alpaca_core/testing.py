"""A model for tests of your own flows: no weights, no torch, and probabilities that you choose."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence

from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.model import (
    Completion,
    GenerateRow,
    LanguageModel,
    ModelInfo,
    RowError,
    ScoreRow,
    check_fits,
)
from alpaca_core.tokenizer import Tokenizer

__all__ = ["FakeModel"]

Reply = str | Mapping[str, float]
"""A reply, or several, each with its probability."""

_EOS = 256


class FakeModel(LanguageModel):
    """A language model over bytes that knows its replies by heart.

    It is a real distribution over texts: `generate` draws from the replies, and `loglikelihood` adds up
    those that go on in the same way, so that a verb's result can be worked out by hand. Of what no reply
    begins with the probability is 0, so a judgment abstains on a text that was not foreseen.

    Args:
        replies: The reply to every prompt; or by a part of the prompt, the first part that is found; a
            reply may be a mapping of several replies to their probabilities, which are scaled to sum to 1.
        otherwise: The reply to prompts in which no part is found.
        context_length: Most bytes of prompt and response together.

    Raises:
        InvalidRequest: If probabilities are negative, or sum to 0.

    Example:
        >>> from alpaca_core import judge
        >>> fake = FakeModel({"rain": {"Yes": 0.25, "No": 0.75}})
        >>> judge(fake, ["Will it rain?"])[0].label
        'No'
    """

    def __init__(
        self, replies: str | Mapping[str, Reply | float], otherwise: Reply = "", *, context_length: int = 65_536
    ) -> None:
        parts: dict[str, Reply] = {}
        if isinstance(replies, str):
            otherwise = replies
        else:
            chances = {text: value for text, value in replies.items() if isinstance(value, int | float)}
            parts = {part: value for part, value in replies.items() if not isinstance(value, int | float)}
            otherwise = chances or otherwise
        self._replies = [(part, _distribution(reply)) for part, reply in parts.items()]
        self._otherwise = _distribution(otherwise)
        self._tokenizer = _byte_tokenizer()
        told = json.dumps([self._replies, self._otherwise]).encode()
        self._info = ModelInfo(
            name="fake",
            digest=hashlib.sha256(told).hexdigest(),
            engine="fake",
            device="cpu",
            dtype="float64",
            quantization="none",
            context_length=context_length,
            vocab_size=_EOS + 1,
            eos_ids=(_EOS,),
            template="alpaca",
            rows_independent=True,
        )

    @property
    def info(self) -> ModelInfo:
        """What this fake is."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """A tokenizer whose tokens 0 to 255 are the bytes, and 256 the end."""
        return self._tokenizer

    def close(self) -> None:
        """Do nothing; there is nothing to give back."""

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        """Reply: with the likeliest reply at temperature 0, else with one drawn by the row's own noise."""
        for index, row in enumerate(rows):
            try:
                check_fits(len(row.prompt_ids), row.sampling.max_new_tokens, self._info)
                yield index, self._reply(row)
            except RowRejected as error:
                yield index, RowError.of(error)

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        """Score: the share of the replies that go on with a token, among those that began as its path."""
        for index, row in enumerate(rows):
            try:
                check_fits(len(row.prompt_ids), row.continuations.deepest, self._info, "the labels")
                yield index, self._scores(row)
            except RowRejected as error:
                yield index, RowError.of(error)

    def _distribution_after(self, prompt_ids: Sequence[int]) -> dict[str, float]:
        prompt = self._tokenizer.decode(prompt_ids)
        return next((replies for part, replies in self._replies if part in prompt), self._otherwise)

    def _reply(self, row: GenerateRow) -> Completion:
        self._info.adapter(row.adapter)
        replies = self._distribution_after(row.prompt_ids)
        if row.sampling.temperature == 0:
            reply = max(replies, key=replies.__getitem__)
        else:
            key = json.dumps([row.sampling.seed, row.sample_index, row.prompt_ids])
            top = max(replies.values())  # scaled by it, so that a low temperature leaves one weight above 0
            weights = [(chance / top) ** (1 / row.sampling.temperature) for chance in replies.values()]
            reply = random.Random(key).choices(list(replies), weights)[0]
        ids = self._tokenizer.encode(reply, "inside")
        kept = ids[: row.sampling.max_new_tokens]
        return Completion(
            text=self._tokenizer.decode(kept),
            token_ids=tuple(kept),
            finish_reason="stop" if len(ids) < row.sampling.max_new_tokens else "length",
            prompt_tokens=len(row.prompt_ids),
            completion_tokens=len(kept),
        )

    def _scores(self, row: ScoreRow) -> list[float]:
        self._info.adapter(row.adapter)
        replies = {
            (*self._tokenizer.encode(reply, "inside"), _EOS): probability
            for reply, probability in self._distribution_after(row.prompt_ids).items()
        }

        def mass(path: tuple[int, ...]) -> float:
            return math.fsum(probability for reply, probability in replies.items() if reply[: len(path)] == path)

        trie = row.continuations
        paths: list[tuple[int, ...]] = []
        scores = []
        for token, parent in zip(trie.tokens, trie.parents, strict=True):
            before = paths[parent] if parent >= 0 else ()
            paths.append((*before, token))
            whole = mass(before)
            share = mass(paths[-1]) / whole if whole else 0.0
            scores.append(math.log(share) if share else -math.inf)
        return scores


def _distribution(reply: Reply) -> dict[str, float]:
    if isinstance(reply, str):
        return {reply: 1.0}
    total = math.fsum(reply.values())
    if not 0 < total < math.inf or any(probability < 0 for probability in reply.values()):
        raise InvalidRequest(f"probabilities are at least 0, with a sum above 0, but got {dict(reply)!r:.80}.")
    return {text: probability / total for text, probability in reply.items()}


def _byte_tokenizer() -> Tokenizer:
    """Bytes as tokens: a byte-level vocabulary without merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": _EOS, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False}
    definition = {
        "version": "1.0",
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {character[byte]: byte for byte in range(256)}, "merges": []},
    }
    return Tokenizer(json.dumps(definition), eos_ids=(_EOS,))
