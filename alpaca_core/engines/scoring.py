"""Log-probabilities of whole tries of continuations: two forward passes a batch, whatever the tries hold.

The first reads the prompts. The second reads the inner nodes of every trie as one sequence a row, on the
prompts' cache: a mask shows each node its prompt and its ancestors only, and its position is its depth
(the tree attention of SpecInfer, arXiv 2305.09781, section 4.2). Leaves are never read: their
log-probability is in the logits of their parent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alpaca_core.engines.batching import Forward, growing_cache, pad_left
from alpaca_core.errors import RowRejected
from alpaca_core.model import ScoreRow

_LOGITS = 2**26
"""Logits of inner nodes that are held at once: 256 MiB of float32. More are computed in several passes."""


@torch.inference_mode()
def score(
    forward: Forward, rows: Sequence[ScoreRow], device: torch.device, most_logits: int = _LOGITS
) -> list[list[float] | RowRejected]:
    """Score the tries of one batch of rows.

    Args:
        forward: The network.
        rows: Rows that fit the model's context, with prompts that are not empty.
        device: Where the token ids are wanted.
        most_logits: Logits of inner nodes that are held at once; one node of each row is the least.

    Returns:
        For each row log P of each node given the path to it, in nats; an error where one is not finite.
    """
    # Inner nodes get slots, counted from 0 in their trie's order, so that ancestors come first.
    inner = [sorted(set(row.continuations.parents) - {-1}) for row in rows]
    slots = [{node: slot for slot, node in enumerate([-1, *nodes], start=-1)} for nodes in inner]
    edges = _Edges(rows, slots, device)
    count = max(map(len, inner))
    ids, seen, positions = pad_left([row.prompt_ids for row in rows], device)
    cache = growing_cache(count) if count else None
    logits = forward(ids, positions, seen, cache, 1)
    edges.read(logits, first=-1)
    if count:
        tokens, above, depths = _slot_tables(rows, inner, slots, device)
        places = positions[:, -1:] + depths
        deepest, width = int(depths.max()), max(1, most_logits // logits.numel())
        for first in range(0, count, width):
            last = min(first + width, count)
            visible = _visible(seen, above, first, last, deepest)
            edges.read(forward(tokens[:, first:last], places[:, first:last], visible, cache, 0), first)
    return edges.results()


class _Edges:
    """The nodes of every row's trie, each an edge out of the prompt or a slot, and what they score."""

    def __init__(self, rows: Sequence[ScoreRow], slots: Sequence[dict[int, int]], device: torch.device) -> None:
        tries = [row.continuations for row in rows]
        self._counts = [len(trie.tokens) for trie in tries]
        parents = [[slot[parent] for parent in trie.parents] for trie, slot in zip(tries, slots, strict=True)]
        self._tokens = _table([trie.tokens for trie in tries], [0] * len(rows), device)  # B, M
        self._parents = _table(parents, [-2] * len(rows), device)  # -2: no slot, so never read
        self._scores = torch.zeros(self._tokens.shape, device=device)
        self._finite = torch.ones(len(rows), dtype=torch.bool, device=device)

    def read(self, logits: Tensor, first: int) -> None:
        """Score the edges out of the slots from `first` on; logits are ``(batch, slots, vocab)``."""
        norms = logits.logsumexp(-1)  # B, C
        slot = self._parents - first
        inside = (slot >= 0) & (slot < logits.shape[1])
        slot = slot.clamp(0, logits.shape[1] - 1)
        edges = logits.flatten(1).gather(1, slot * logits.shape[-1] + self._tokens)
        self._scores = torch.where(inside, edges - norms.gather(1, slot), self._scores)
        self._finite &= norms.isfinite().all(-1)

    def results(self) -> list[list[float] | RowRejected]:
        """Give each row's scores, in its trie's order."""
        finite = (self._finite & self._scores.isfinite().all(-1)).tolist()
        found = zip(self._scores.tolist(), self._counts, finite, strict=True)
        return [scores[:count] if good else _not_finite() for scores, count, good in found]


def _slot_tables(
    rows: Sequence[ScoreRow], inner: Sequence[Sequence[int]], slots: Sequence[dict[int, int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, parent slot and depth of each slot, each ``(batch, slots)``.

    A slot without a parent slot is its own parent. So is a spare one at the end of a row, which repeats
    the prompt's last token: like other padding it must not bring a foreign embedding into the row.
    """
    tokens, above, depths = [], [], []
    count = max(map(len, inner))
    for row, nodes, slot in zip(rows, inner, slots, strict=True):
        trie, deep = row.continuations, row.continuations.depths()
        tokens.append([trie.tokens[node] for node in nodes])
        depths.append([deep[node] for node in nodes])
        parents = [slot[trie.parents[node]] for node in nodes] + [-1] * (count - len(nodes))
        above.append([own if parent < 0 else parent for own, parent in enumerate(parents)])
    ones = [1] * len(rows)
    spare = [row.prompt_ids[-1] for row in rows]
    return _table(tokens, spare, device), _table(above, ones, device), _table(depths, ones, device)


def _visible(seen: Tensor, above: Tensor, first: int, last: int, deepest: int) -> Tensor:
    """What slots see: the prompt, their ancestors and themselves; ``(batch, 1, last - first, time)``."""
    own = seen.new_zeros((len(seen), last - first, last))
    reached = torch.arange(first, last, device=seen.device).expand(len(seen), -1)  # B, C
    for _ in range(deepest):
        own.scatter_(2, reached[:, :, None], True)
        reached = above.gather(1, reached)
    return torch.cat([seen[:, None].expand(-1, last - first, -1), own], dim=-1)[:, None]


def _table(lists: Sequence[Sequence[int]], fill: Sequence[int], device: torch.device) -> Tensor:
    """Put lists of any length into one tensor; what is missing at the end of each is its `fill`."""
    width = max(map(len, lists))
    rows = [[*values, *[spare] * (width - len(values))] for values, spare in zip(lists, fill, strict=True)]
    return torch.tensor(rows, dtype=torch.long, device=device)


def _not_finite() -> RowRejected:
    return RowRejected(
        "not_finite",
        "logits must be finite, but this row's hold NaN or infinity. "
        "Check the weights and the adapter, or load the model in bfloat16 or float32.",
    )
