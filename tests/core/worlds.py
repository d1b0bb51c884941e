"""Small worlds whose truth can be worked out by hand: vocabularies, and a language model given as a table."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence

from alpaca_core.model import Completion, GenerateRow, LanguageModel, ModelInfo, RowError, ScoreRow
from alpaca_core.tokenizer import Tokenizer


def tiny_tokenizer(pieces: Sequence[str], special: Sequence[str] = ("</s>",)) -> Tokenizer:
    """A byte-level BPE whose whole vocabulary is `pieces`, each merged from two of the others where possible."""
    written = [piece.replace(" ", "Ġ") for piece in pieces]
    vocab = {piece: place for place, piece in enumerate([*written, *special])}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in written
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[piece], "content": piece, **flags} for piece in special],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return Tokenizer(json.dumps(definition), eos_ids=(len(pieces),))


class TableModel(LanguageModel):
    """A language model whose next-token probabilities are drawn once for each context, from a hash of it."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.seed = seed
        self._tokenizer = tokenizer
        self._info = ModelInfo(
            name="table",
            digest=str(seed),
            engine="table",
            device="cpu",
            dtype="float64",
            quantization="none",
            context_length=10_000,
            vocab_size=tokenizer.vocab_size,
            eos_ids=tokenizer.eos_ids,
            template="raw",
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def probabilities(self, context: Sequence[int]) -> list[float]:
        key = hashlib.sha256(json.dumps([self.seed, list(context)]).encode()).digest()
        noise = random.Random(key)
        weights = [noise.expovariate(1.0) for _ in range(self._info.vocab_size)]
        return [weight / sum(weights) for weight in weights]

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        for index, row in enumerate(rows):
            noise = random.Random(json.dumps([row.sampling.seed, row.sample_index, row.prompt_ids]))
            ids: list[int] = []
            while len(ids) < row.sampling.max_new_tokens:
                probabilities = self.probabilities([*row.prompt_ids, *ids])
                ids += noise.choices(range(len(probabilities)), probabilities)
            yield (
                index,
                Completion(
                    text=self._tokenizer.decode(ids),
                    token_ids=tuple(ids),
                    finish_reason="length",
                    prompt_tokens=len(row.prompt_ids),
                    completion_tokens=len(ids),
                ),
            )

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        for index, row in enumerate(rows):
            trie = row.continuations
            paths: list[list[int]] = []
            scores = []
            for token, parent in zip(trie.tokens, trie.parents, strict=True):
                before = paths[parent] if parent >= 0 else []
                scores.append(math.log(self.probabilities([*row.prompt_ids, *before])[token]))
                paths.append([*before, token])
            yield index, scores
