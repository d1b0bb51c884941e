"""Log-probabilities of whole tries of continuations: the prompts are read once, and each inner node once.

The inner nodes of every trie are laid out as one sequence a row, on the prompts' cache: a mask shows each its
prompt and its ancestors only, and its position is its depth (the tree attention of SpecInfer, arXiv 2305.09781,
section 4.2). Leaves are never read: their log-probability is in the logits of their parent.

That sequence is read in parts of whole branches, each of which needs the prompt and itself only, so that
attention does not grow with the square of the trie. From the states of a part a few logits at a time are made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpaca_core.engines.batching import Network, growing_cache, pad_left, shorten
from alpaca_core.errors import RowRejected
from alpaca_core.model import ScoreRow, Trie

_WIDTH = 256
"""Inner nodes of a row that are read in one pass."""

_LOGITS = 2**25
"""Logits that are held at once: 128 MiB of float32; one node of each row is the least."""

Ints = NDArray[numpy.int64]


@torch.inference_mode()
def score(
    network: Network, rows: Sequence[ScoreRow], device: torch.device, width: int = _WIDTH, most_logits: int = _LOGITS
) -> list[list[float] | RowRejected]:
    """Score the tries of one batch of rows.

    Args:
        network: What is run.
        rows: Rows that fit the model's context, with prompts that are not empty.
        device: Where the token ids are wanted.
        width: Inner nodes of a row that are read in one pass.
        most_logits: Logits that are held at once; one node of each row is the least.

    Returns:
        For each row log P of each node given the path to it, in nats; an error where one is not finite.
    """
    layout = _Layout(rows, width)
    edges = _Edges(rows, layout, device)
    tokens, above, depths = (
        torch.from_numpy(table).to(device) for table in (layout.tokens, layout.above, layout.depths)
    )
    ids, seen, positions = pad_left([row.prompt_ids for row in rows], device)
    cache = growing_cache(layout.room) if layout.parts else None
    logits = network.logits(network.states(ids, positions, seen, cache)[:, -1:])  # B, 1, V
    edges.read(logits, first=-1)
    few = max(1, most_logits // logits.numel())
    for part in layout.parts:
        assert cache is not None
        shorten(cache, ids.shape[1] + part.first - part.begin)
        own = slice(part.first, part.last)
        visible = _visible(seen, above, part, layout.deepest)
        states = network.states(tokens[:, own], positions[:, -1:] + depths[:, own], visible, cache)  # B, C, width
        for first in range(0, part.last - part.first, few):
            edges.read(network.logits(states[:, first : first + few]), part.first + first)
    return edges.results()


@dataclass(frozen=True, slots=True)
class _Part:
    """Slots from `first` up to `last`, read in one pass, for which the cache must hold those from `begin` on."""

    first: int
    last: int
    begin: int


class _Layout:
    """Each inner node's slot, which is a column of its row; tries of one batch are cut at the same columns.

    Where tries differ, a row that has no more nodes for a part has spare slots there. A spare slot repeats its
    prompt's last token: like other padding it must not bring a foreign embedding into the row.

    Args:
        rows: The batch; a trie that rows share is laid out once.
        width: Slots of a part.
    """

    def __init__(self, rows: Sequence[ScoreRow], width: int) -> None:
        tries = {id(row.continuations): row.continuations for row in rows}
        cuts = {key: _Cut(trie, width) for key, trie in tries.items()}
        self.parts: list[_Part] = []
        for sizes, go_on in zip(
            zip_longest(*(cut.sizes for cut in cuts.values()), fillvalue=0),
            zip_longest(*(cut.goes_on for cut in cuts.values()), fillvalue=False),
            strict=True,
        ):
            first = self.parts[-1].last if self.parts else 0
            self.parts.append(_Part(first, first + max(sizes), self.parts[-1].begin if any(go_on) else first))
        self.room = max((part.last - part.begin for part in self.parts), default=0)
        self.deepest = max((cut.deepest for cut in cuts.values()), default=0)
        for cut in cuts.values():
            cut.place([part.first for part in self.parts], self.parts[-1].last if self.parts else 0)
        own = [cuts[id(row.continuations)] for row in rows]
        spare = numpy.array([[row.prompt_ids[-1]] for row in rows])
        self.tokens = numpy.where([cut.taken for cut in own], [cut.tokens for cut in own], spare)  # B, S
        self.above = numpy.stack([cut.above for cut in own])
        self.depths = numpy.stack([cut.depths for cut in own])
        self.parents = [cut.parents for cut in own]


class _Cut:
    """A trie's inner nodes, branch by branch, cut into parts of at most `width`.

    A branch is what hangs on one first token; its nodes are in the trie's order, so that ancestors come first.
    A branch that is larger than a part goes on in the next one.
    """

    def __init__(self, trie: Trie, width: int) -> None:
        self._trie = trie
        branches: list[int] = []
        for node, parent in enumerate(trie.parents):
            branches.append(node if parent < 0 else branches[parent])
        inner = numpy.array(sorted(set(trie.parents) - {-1}), dtype=numpy.int64)
        branch = numpy.array(branches, dtype=numpy.int64)[inner]
        self._order = inner[branch.argsort(kind="stable")]
        self.deepest = trie.deepest
        self.sizes: list[int] = []
        self.goes_on: list[bool] = []
        for size in numpy.unique(branch, return_counts=True)[1].tolist():
            if self.sizes and self.sizes[-1] + size <= width:
                self.sizes[-1] += size
                continue
            for first in range(0, size, width):
                self.sizes.append(min(width, size - first))
                self.goes_on.append(first > 0)

    def place(self, starts: Sequence[int], slots: int) -> None:
        """Give the nodes their slots, where parts start at `starts` and a row has `slots` in all."""
        spans = [numpy.arange(start, start + size) for start, size in zip(starts, self.sizes, strict=False)]
        places = numpy.concatenate([numpy.empty(0, dtype=numpy.int64), *spans])
        slot = numpy.full(len(self._trie.tokens) + 1, -1)  # of each node; the last is that of parent -1, the prompt
        slot[self._order] = places
        parents = numpy.array(self._trie.parents, dtype=numpy.int64)
        self.parents: Ints = slot[parents]
        self.taken = numpy.zeros(slots, dtype=numpy.bool_)
        self.taken[places] = True
        self.tokens = numpy.zeros(slots, dtype=numpy.int64)
        self.tokens[places] = numpy.array(self._trie.tokens, dtype=numpy.int64)[self._order]
        self.above = numpy.arange(slots)
        self.above[places] = numpy.where(self.parents[self._order] < 0, places, self.parents[self._order])
        self.depths = numpy.ones(slots, dtype=numpy.int64)
        self.depths[places] = numpy.array(self._trie.depths(), dtype=numpy.int64)[self._order]


class _Edges:
    """The nodes of every row's trie, each an edge out of the prompt or a slot, and what they score."""

    def __init__(self, rows: Sequence[ScoreRow], layout: _Layout, device: torch.device) -> None:
        self._counts = [len(parents) for parents in layout.parents]
        slots = numpy.concatenate(layout.parents)
        self._order = slots.argsort(kind="stable")
        self._slots = slots[self._order]
        tokens = numpy.concatenate([numpy.array(row.continuations.tokens, dtype=numpy.int64) for row in rows])
        row = numpy.repeat(numpy.arange(len(rows)), self._counts)
        self._where = torch.from_numpy(numpy.stack([row, slots, tokens])[:, self._order]).to(device)  # 3, E
        self._scores = torch.zeros(len(slots), device=device)
        self._finite = torch.ones(len(rows), dtype=torch.bool, device=device)

    def read(self, logits: Tensor, first: int) -> None:
        """Score the edges out of the slots from `first` on; logits are ``(batch, slots, vocab)``."""
        norms = logits.logsumexp(-1)  # B, C
        self._finite &= norms.isfinite().all(-1)
        begin, end = numpy.searchsorted(self._slots, [first, first + logits.shape[1]]).tolist()
        row, slot, token = self._where[:, begin:end]
        self._scores[begin:end] = logits[row, slot - first, token] - norms[row, slot - first]

    def results(self) -> list[list[float] | RowRejected]:
        """Give each row's scores, in its trie's order."""
        scores = numpy.empty(len(self._order), dtype=numpy.float32)
        scores[self._order] = self._scores.cpu().numpy()
        found = zip(numpy.split(scores, numpy.cumsum(self._counts)[:-1]), self._finite.tolist(), strict=True)
        return [own.tolist() if good and numpy.isfinite(own).all() else _not_finite() for own, good in found]


def _visible(seen: Tensor, above: Tensor, part: _Part, deepest: int) -> Tensor:
    """What a part's slots see: the prompt, their ancestors and themselves; ``(batch, 1, slots, time)``."""
    own = seen.new_zeros((len(seen), part.last - part.first, part.last - part.begin))
    reached = torch.arange(part.first, part.last, device=seen.device).expand(len(seen), -1)  # B, C
    for _ in range(deepest):
        own.scatter_(2, (reached - part.begin)[:, :, None], True)
        reached = above.gather(1, reached)
    return torch.cat([seen[:, None].expand(-1, part.last - part.first, -1), own], dim=-1)[:, None]


def _not_finite() -> RowRejected:
    return RowRejected(
        "not_finite",
        "logits must be finite, but this row's hold NaN or infinity. "
        "Check the weights and the adapter, or load the model in bfloat16 or float32.",
    )
