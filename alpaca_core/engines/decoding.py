"""The decode loop: one batch of rows, token by token, each row out as soon as it ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca_core.engines.batching import Network, growing_cache, pad_left
from alpaca_core.engines.beams import Beams
from alpaca_core.engines.noise import gumbel, row_key
from alpaca_core.engines.sampling import Sampler
from alpaca_core.errors import RowRejected
from alpaca_core.model import GenerateRow
from alpaca_core.spec import Sampling

_ROOM = 64
"""Tokens that the cache takes space for ahead."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a row generated, without the token that ended it, whether one did, and the name of the passes' shape."""

    token_ids: tuple[int, ...]
    stopped: bool
    shape: str = ""


class _Line:
    """A row without beams: one lane, whose tokens the sampler chooses together with those of other lines."""

    def __init__(self, sampling: Sampling, eos_ids: Collection[int]) -> None:
        self.sampling = sampling
        self.parents, self.tails = [0], [0]
        self.done = False
        self.tokens: list[int] = []
        self._eos_ids = eos_ids

    def append(self, token: int) -> None:
        self.tails = [token]
        self.tokens.append(token)
        self.done = token in self._eos_ids or len(self.tokens) == self.sampling.max_new_tokens


class Decoding:
    """One batch on its way. A row holds one lane of the batch, or one for each live beam.

    Rows that end give their lanes up, so a batch gets cheaper as it goes.

    Args:
        network: What is run.
        rows: Rows that fit the model's context, with prompts that are not empty.
        eos_ids: Tokens that end a response.
        device: Where the token ids are wanted.
    """

    def __init__(
        self, network: Network, rows: Sequence[GenerateRow], eos_ids: Collection[int], device: torch.device
    ) -> None:
        self._network = network
        self._eos_ids = eos_ids
        self._device = device
        self._ids, self._seen, self._positions = pad_left([row.prompt_ids for row in rows], device)
        self._cache = growing_cache(_ROOM)
        self._keys = [row_key(row.sampling.seed, row.prompt_ids, row.sample_index) for row in rows]
        self._live = [(place, self._start(row.sampling)) for place, row in enumerate(rows)]
        self._sampler: Sampler | None = None
        self._length = 0  # tokens of response so far

    @property
    def live(self) -> bool:
        """Whether a row is still running."""
        return bool(self._live)

    def _start(self, sampling: Sampling) -> _Line | Beams:
        if sampling.num_beams > 1:
            return Beams(sampling, self._eos_ids, self._device)
        return _Line(sampling, self._eos_ids)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Reply | RowRejected]]:
        """Generate one token a lane; return the rows that ended, by their place in the batch."""
        states = self._network.states(self._ids, self._positions, self._seen, self._cache)
        logits = self._network.logits(states[:, -1:])[:, -1]  # L, V
        finite = logits.isfinite().all(-1).tolist()
        chosen, noise = self._choose(logits), self._noise(logits.shape[-1])
        ended: list[tuple[int, Reply | RowRejected]] = []
        live, lanes, first = [], [], 0
        for place, row in self._live:
            last = first + len(row.parents)
            if not all(finite[first:last]):
                ended.append((place, not_finite(self._length)))
            else:
                if isinstance(row, Beams):
                    row.advance(logits[first:last], noise.get(place))
                else:
                    row.append(chosen[first])
                if row.done:
                    stopped = row.tokens[-1] in self._eos_ids
                    ended.append((place, Reply(tuple(row.tokens[:-1] if stopped else row.tokens), stopped)))
                else:
                    live.append((place, row))
                    lanes += [first + parent for parent in row.parents]
            first = last
        if len(live) < len(self._live):
            self._sampler = None
        self._live = live
        self._length += 1
        if live:
            self._follow(lanes, [token for _, row in live for token in row.tails])
        return ended

    def _choose(self, logits: Tensor) -> dict[int, int]:
        """Choose the next token of the lines; by lane."""
        lines, first = {}, 0
        for place, row in self._live:
            if isinstance(row, _Line):
                lines[first] = row.sampling, self._keys[place]
            first += len(row.parents)
        if not lines:
            return {}
        if self._sampler is None:
            settings, keys = zip(*lines.values(), strict=True)
            self._sampler = Sampler(settings, keys, self._device)
        mine = logits if len(lines) == first else logits[list(lines)]
        return dict(zip(lines, self._sampler(mine, self._length), strict=True))

    def _noise(self, vocab: int) -> dict[int, Tensor]:
        """Draw the noise of all sampled beams at once; by place."""
        drawn = {place: len(row.parents) for place, row in self._live if isinstance(row, Beams) and row.sampled}
        keys = torch.tensor([self._keys[place] for place in drawn], dtype=torch.long, device=self._device)
        size = max(drawn.values(), default=0) * vocab
        return dict(zip(drawn, gumbel(keys.view(-1, 4), self._length, size), strict=True)) if drawn else {}

    def _follow(self, lanes: list[int], tokens: list[int]) -> None:
        """Make the next step's input: which lanes go on, and with what."""
        if lanes != list(range(len(self._seen))):
            kept = torch.tensor(lanes, device=self._device)
            self._cache.reorder_cache(kept)  # type: ignore[arg-type]
            self._seen, self._positions = self._seen[kept], self._positions[kept]
        self._ids = torch.tensor(tokens, device=self._device)[:, None]  # L, 1
        self._positions = self._positions[:, -1:] + 1
        self._seen = torch.nn.functional.pad(self._seen, (0, 1), value=True)  # L, T + 1


def not_finite(length: int) -> RowRejected:
    """The error of a row whose logits are no numbers, after this many tokens of response."""
    return RowRejected(
        "not_finite",
        f"logits must be finite, but after {length:,} tokens of response this row's hold NaN or infinity. "
        "Check the weights and the adapter, or load the model in bfloat16 or float32.",
    )
