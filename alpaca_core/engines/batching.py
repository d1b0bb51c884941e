"""Rows into batches, prompts into one left-padded tensor, and a key-value cache that grows in place."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Network(Protocol):
    """A network as the loops see it: with the batch's adapter chosen, and in two parts, as `heads.py` cuts it."""

    def states(self, ids: Tensor, positions: Tensor, seen: Tensor, cache: Cache | None) -> Tensor:
        """Read tokens.

        Args:
            ids: The new tokens, ``(batch, new)``.
            positions: Theirs.
            seen: Which tokens may be seen, ``(batch, time)`` of all so far, or ``(batch, 1, new, time)`` for each.
            cache: Of the tokens so far; None where this is the only pass.

        Returns:
            The body's last states, ``(batch, new, width)``, in its dtype.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Return the float32 logits that the head reads from states, ``(batch, new, vocab)``."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A row's place in its request, what it may share a batch with, how long it is, and how much of it it takes."""

    index: int
    group: Hashable
    length: int
    lanes: int = 1
    new_tokens: int = 0


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[int]]:
    """Put jobs of one group and of near lengths together.

    The longest come first, so that a batch too large for the memory fails at once and not at the end.

    Args:
        jobs: Rows to run.
        size: Lanes that are computed together at most; a row that takes more is alone.

    Yields:
        Indices of the rows of one batch.

    Example:
        >>> list(batches([Job(0, None, 5), Job(1, None, 9), Job(2, None, 7)], size=2))
        [[1, 2], [0]]
    """
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    for members in groups.values():
        batch: list[int] = []
        room = size
        for job in sorted(members, key=lambda job: -job.length):
            if batch and job.lanes > room:
                yield batch
                batch, room = [], size
            batch.append(job.index)
            room -= job.lanes
        yield batch


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Align prompts at their ends, so that the next token of each is computed in the last column.

    A prompt is padded with its own first token. What stands there is masked, but a mask does not stop
    NaN: with a shared padding token, one damaged embedding would reach every row.

    Returns:
        Token ids, which of them are not padding, and positions, each of shape ``(batch, time)``.
    """
    time = max(map(len, prompts))
    ids = torch.tensor([[prompt[0]] * (time - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(time, device=device) - (time - lengths)[:, None]
    return ids, positions >= 0, positions.clamp(min=0)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, with room for tokens to come.

    transformers' own layer copies all it holds for each token that is added: one read and one write of the
    cache on top of the attention's one read. This one copies where the room is used up.

    Args:
        room: Tokens that space is taken for ahead.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._stores: list[Tensor] = []  # keys, values: (lanes, heads, tokens and room, width)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, and return all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = [states[..., :0, :] for states in (key_states, value_states)]
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if end > self._stores[0].shape[-2]:
            self._stores = [self._grown(store, used, end + self._room) for store in self._stores]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[..., used:end, :] = states
        return self._show(end)

    def shorten(self, tokens: int) -> None:
        """Keep the first tokens only; `crop` wants their number in some versions of transformers, and not in others."""
        if self.is_initialized:
            self._show(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these lanes, in this order; one may come more than once."""
        used = self.get_seq_length()
        self._stores = [store.index_select(0, beam_idx.to(store.device)) for store in self._stores]
        self._show(used)

    @staticmethod
    def _grown(store: Tensor, used: int, size: int) -> Tensor:
        grown = store.new_empty((*store.shape[:-2], size, store.shape[-1]))
        grown[..., :used, :] = store[..., :used, :]
        return grown

    def _show(self, used: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values = self._stores[0][..., :used, :], self._stores[1][..., :used, :]
        return keys, values


def shorten(cache: Cache, tokens: int) -> None:
    """Keep the first tokens of a `growing_cache` only."""
    for layer in cache.layers:
        cast(GrowingLayer, layer).shorten(tokens)


def growing_cache(room: int) -> Cache:
    """Make an empty key-value cache of `GrowingLayer`, one for each layer that the model turns out to have."""
    return Cache(layer_class_to_replicate=cast(type[GrowingLayer], partial(GrowingLayer, room)))
