"""Rows as requests of vLLM: what is asked for a row, and what is made of the answers. vLLM itself is not imported.

A response is one request. An inner node of a trie is a prompt of its own, whose one next token is asked for with the
log-probabilities of the node's children. A beam is a prompt of its own at every step, since vLLM's engine has no
lanes; the search is that of the other engines.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from alpaca_core.engines.beams import Beams
from alpaca_core.engines.checking import check_row, completion
from alpaca_core.engines.decoding import not_finite
from alpaca_core.engines.noise import gumbel, row_key
from alpaca_core.errors import RowRejected
from alpaca_core.model import Completion, GenerateRow, ModelInfo, RowError, ScoreRow
from alpaca_core.tokenizer import Tokenizer

Outcome = Completion | list[float] | RowError

FEW = 128
"""Tokens whose log-probabilities one request may name: vLLM's `MAX_LOGPROB_TOKEN_IDS`."""
_COLDEST, _HOTTEST = 0.01, 2.0
"""Temperatures between which vLLM samples; a lower one it raises with a warning, a higher one it refuses."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request of vLLM.

    Args:
        prompt: Token ids.
        settings: Of vLLM's `SamplingParams`.
        reads: Which log-probabilities it wants: of the token it draws, of a few named ones, or of all.
        place: Which part of the row it is for.
    """

    prompt: tuple[int, ...]
    settings: Mapping[str, Any]
    reads: Literal["own", "few", "all"]
    place: int = 0


class Task(Protocol):
    """A row on its way: its first requests, and then whatever follows from an answer."""

    def begin(self) -> list[Ask]: ...

    def take(self, ask: Ask, answer: Any) -> tuple[Outcome | None, list[Ask]]:
        """Take vLLM's `CompletionOutput`; return the row's outcome, or None and more requests."""
        ...


def task_of(row: GenerateRow | ScoreRow, info: ModelInfo, tokenizer: Tokenizer) -> Task:
    """Plan a row.

    Raises:
        RowRejected: For a row that no engine runs, or a temperature that vLLM does not sample at.
    """
    check_row(row, info)
    if isinstance(row, ScoreRow):
        return _Scores(row)
    if row.sampling.num_beams > 1:
        return _Search(row, info, tokenizer)
    return _Response(row, info, tokenizer)


class _Response:
    """A response without beams: vLLM draws its tokens."""

    def __init__(self, row: GenerateRow, info: ModelInfo, tokenizer: Tokenizer) -> None:
        temperature = row.sampling.temperature
        if temperature and not _COLDEST <= temperature <= _HOTTEST:
            raise RowRejected(
                "not_supported",
                f"vLLM samples at temperatures from {_COLDEST:g} to {_HOTTEST:g}, and 0 is greedy, but this row says "
                f'{temperature:g}. Choose one of these, or load the model with engine="auto".',
            )
        self._row, self._info, self._tokenizer = row, info, tokenizer

    def begin(self) -> list[Ask]:
        row, sampling = self._row, self._row.sampling
        settings: dict[str, Any] = {
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(self._info.eos_ids),
            "logprobs": 0,  # of the drawn token alone: where logits are not finite, it is not either
        }
        if sampling.temperature:
            settings["seed"] = _seed(row)
            settings["top_k"] = min(sampling.top_k or 0, self._info.vocab_size)
            settings["top_p"] = sampling.top_p or 1.0
        return [Ask(row.prompt_ids, settings, "own")]

    def take(self, ask: Ask, answer: Any) -> tuple[Outcome | None, list[Ask]]:
        tokens = list(answer.token_ids)
        if not math.isfinite(answer.cumulative_logprob):
            return RowError.of(not_finite(_first_bad(tokens, answer.logprobs))), []
        stopped = tokens[-1] in self._info.eos_ids
        return completion(self._row, tokens[:-1] if stopped else tokens, stopped, self._tokenizer), []


class _Scores:
    """A trie: a request for each node that has children, and for the prompt itself."""

    def __init__(self, row: ScoreRow) -> None:
        self._row = row
        self._children: dict[int, list[int]] = {}
        for node, parent in enumerate(row.continuations.parents):
            self._children.setdefault(parent, []).append(node)
        self._numbers = [0.0] * len(row.continuations.tokens)
        self._left = len(self._children)

    def begin(self) -> list[Ask]:
        return [self._ask(node) for node in self._children]

    def _ask(self, node: int) -> Ask:
        trie = self._row.continuations
        prompt = (*self._row.prompt_ids, *(trie.tokens[each] for each in trie.path(node)))
        wanted = sorted({trie.tokens[child] for child in self._children[node]})
        if len(wanted) <= FEW:
            return Ask(prompt, _one_token(logprob_token_ids=wanted), "few", node)
        return Ask(prompt, _one_token(logprobs=-1, flat_logprobs=True), "all", node)

    def take(self, ask: Ask, answer: Any) -> tuple[Outcome | None, list[Ask]]:
        trie = self._row.continuations
        found = _numbers(answer)
        for child in self._children[ask.place]:
            number = self._numbers[child] = found[trie.tokens[child]]
            if not math.isfinite(number):
                return RowError.of(not_finite(len(ask.prompt) - len(self._row.prompt_ids))), []
        self._left -= 1
        return (None if self._left else self._numbers), []


class _Search:
    """A beam search: each live beam asks for the log-probabilities of all next tokens, step by step."""

    def __init__(self, row: GenerateRow, info: ModelInfo, tokenizer: Tokenizer) -> None:
        self._row, self._info, self._tokenizer = row, info, tokenizer
        self._beams = Beams(row.sampling, info.eos_ids, torch.device("cpu"))
        self._key = torch.tensor([row_key(row.sampling.seed, row.prompt_ids, row.sample_index)])
        self._paths: list[tuple[int, ...]] = [()]
        self._scores: dict[int, torch.Tensor] = {}

    def begin(self) -> list[Ask]:
        self._scores.clear()
        settings = _one_token(logprobs=-1, flat_logprobs=True)
        return [Ask((*self._row.prompt_ids, *path), settings, "all", beam) for beam, path in enumerate(self._paths)]

    def take(self, ask: Ask, answer: Any) -> tuple[Outcome | None, list[Ask]]:
        vocab, length = self._info.vocab_size, len(self._paths[0])
        scores = torch.full((vocab,), math.nan)
        scores[torch.tensor(answer.logprobs.token_ids)] = torch.tensor(answer.logprobs.logprobs)
        self._scores[ask.place] = scores
        if not self._scores[ask.place].isfinite().all():
            return RowError.of(not_finite(length)), []
        if len(self._scores) < len(self._paths):
            return None, []
        beams = self._beams
        noise = gumbel(self._key, length, len(self._paths) * vocab)[0] if beams.sampled else None
        beams.advance(torch.stack([self._scores[beam] for beam in range(len(self._paths))]), noise)
        if not beams.done:
            tails = zip(beams.parents, beams.tails, strict=True)
            self._paths = [(*self._paths[parent], token) for parent, token in tails]
            return None, self.begin()
        stopped = beams.tokens[-1] in self._info.eos_ids
        tokens = beams.tokens[:-1] if stopped else beams.tokens
        return completion(self._row, tokens, stopped, self._tokenizer), []


def _one_token(**reads: Any) -> dict[str, Any]:
    """Settings of a request that is made for log-probabilities alone, which are the model's own."""
    return {"temperature": 0.0, "max_tokens": 1, **reads}


def _seed(row: GenerateRow) -> int:
    """The seed of a row's noise: 63 bits, other ones for other prompts and other samples of one prompt."""
    first, second, *_ = row_key(row.sampling.seed, row.prompt_ids, row.sample_index)
    return (first | second << 32) & (2**63 - 1)


def _numbers(answer: Any) -> dict[int, float]:
    """The log-probabilities of an answer of one token, by token id."""
    told = answer.logprobs
    if hasattr(told, "token_ids"):  # `FlatLogprobs`
        return dict(zip(told.token_ids, told.logprobs, strict=True))
    return {token: each.logprob for token, each in told[0].items()}


def _first_bad(tokens: Iterable[int], told: Any) -> int:
    """Tokens before the first whose log-probability is not finite."""
    return next(place for place, token in enumerate(tokens) if not math.isfinite(told[place][token].logprob))
