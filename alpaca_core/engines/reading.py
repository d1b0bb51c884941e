"""Log-probabilities of tries of continuations, over tiles: what prompts share is computed once.

Prompts are read in their alphabetical order, so that those that begin alike follow one another and find the
pages that they share; only of their last tokens, and of the inner nodes of the tries, are logits made. A
pass is started before the results of the one before are looked at, so that a GPU does not wait for the host.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.packing import TILE, Tile, prompt_tiles, text_tiles, trie_tiles
from alpaca_core.engines.recovering import ShortOfMemory, persevere, too_large
from alpaca_core.engines.results import Arriving
from alpaca_core.engines.shapes import Shape
from alpaca_core.engines.working import Request
from alpaca_core.errors import RowRejected
from alpaca_core.model import ScoreRow, Scores, Trie

_HEADS = 128
"""States whose logits are made at once on a GPU."""
_FEW_HEADS = 16
"""Likewise on the CPU."""
_PATIENCE = 4
"""Passes over prompts for which inner nodes wait that do not fill one."""


@dataclass(slots=True)
class _Reading:
    """A row on its way: `open` counts its tiles whose results have not arrived."""

    request: Request
    index: int
    row: ScoreRow
    adapter: int
    children: dict[int, list[int]]  # of each inner node, and of -1, the prompt's end
    scores: list[float]
    pages: list[int] = field(default_factory=list)
    open: int = 0
    finite: bool = True

    @property
    def size(self) -> int:
        """Tokens of the prompt, and of the longest path."""
        return len(self.row.prompt_ids) + self.row.continuations.deepest


_Batch = list[tuple[Tile, tuple[_Reading, list[int]]]]
"""Tiles, whose they are, and the node that each of the last tokens is; -1 is the prompt's end."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What one pass has found: the scores of edges, and the norms of the logits that they came from."""

    batch: _Batch
    edges: list[tuple[list[tuple[_Reading, int]], Arriving]]
    norms: list[tuple[list[_Reading], Arriving]]

    def settle(self) -> Iterator[_Reading]:
        """Write the scores into their rows; give out the rows that are complete now."""
        for to, scores in self.edges:
            for (reading, node), score in zip(to, scores.numbers(), strict=True):
                reading.scores[node] = score
                reading.finite &= -torch.inf < score
        for readings, norms in self.norms:
            for reading, norm in zip(readings, norms.numbers(), strict=False):
                reading.finite &= -torch.inf < norm < torch.inf
        for _, (reading, _) in self.batch:
            reading.open -= 1
            if not reading.open:
                yield reading


class Reader:
    """Scores the rows of all requests, pass by pass, as a `recovering.Worker`. Its methods are called under a lock.

    Rows that are submitted together are a line, in the order of their prompts; lines take turns, a pass each.

    Args:
        llama: The weights.
        memory: The cache.
        shape: The sizes of passes.

    Attributes:
        shape: The sizes of passes.
        finished: Rows that have come out of passes.
    """

    def __init__(self, llama: Llama, memory: Memory, shape: Shape) -> None:
        self._llama, self._memory = llama, memory
        self.shape = shape
        self.finished = 0
        self._most = math.inf  # rows at once
        self._lines: deque[deque[_Reading]] = deque()
        self._nodes: _Batch = []  # tiles of tries whose prompts have been read
        self._passed = 0  # times that they were left for prompts
        self._passes: deque[_Pass] = deque()
        self._held: dict[int, _Reading] = {}

    def submit(self, rows: Sequence[tuple[Request, int, ScoreRow, int]]) -> None:
        """Line up rows that fit the context, each with its request, its index there and the number of its adapter."""
        tries = {id(row.continuations): row.continuations for _, _, row, _ in rows}
        children = {key: _children(trie) for key, trie in tries.items()}  # made once for rows that share a trie
        line = [
            _Reading(
                request, index, row, adapter, children[id(row.continuations)], [0.0] * len(row.continuations.tokens)
            )
            for request, index, row, adapter in rows
        ]
        if line:
            self._lines.append(deque(sorted(line, key=lambda each: (each.adapter, each.row.prompt_ids))))

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Take the rest of a request's rows out."""
        request.cancelled = True
        lines = (deque(each for each in line if each.request is not request) for line in self._lines)
        self._lines = deque(line for line in lines if line)
        if any(reading.request is request for reading in self._held.values()):
            self._settle()
        for reading in [each for each in self._held.values() if each.request is request]:
            self._nodes = [each for each in self._nodes if each[1][0] is not reading]
            self._leave(reading)
        if not self._lines:
            self._memory.leave(self)

    @torch.inference_mode()
    def advance(self) -> None:
        """Read the next prompts, and inner nodes when they fill a pass.

        After an error all rows that are not complete are back in line, and their results will be the same.

        Raises:
            ShortOfMemory: If one row alone ran out of memory; it is the first in line again.
        """
        if not (self._lines or self._held):
            return
        before, finished = len(self._passes), self.finished
        try:
            many = sum(len(tile.ids) for tile, _ in self._nodes) >= self.shape.tokens
            due = many or self._passed == _PATIENCE
            tiles = [] if due else self._prompts()
            self._read(tiles, every=False)
            self._passed = self._passed + 1 if tiles and self._nodes else 0
            if due or not tiles:
                nodes, self._nodes = self._nodes, []
                self._read(nodes, every=True)
        except ShortOfMemory:
            self._settle()
            self._most = max(1, len(self._held) // 2)
            alone = len(self._held) == 1 and self.finished == finished
            self._line_up()
            if alone:
                raise
            return
        except BaseException:
            self._line_up()
            raise
        if len(self._passes) > before and (self._lines or self._nodes):
            self._settle(keep=1)  # that one runs while we look at others
        else:
            self._settle()

    def begin_again(self, shape: Shape) -> None:
        """Put the rows on their way back in line, and take another shape."""
        self._line_up()
        if shape.tokens > self.shape.tokens:
            self._most = math.inf
        self.shape = shape

    def give_up(self) -> None:
        """End the first row in line with an error: there is no memory for it."""
        reading = self._next()
        reading.request.end(reading.index, too_large(reading.size, self._llama.device))

    def close(self) -> None:
        """Let go of what takes memory."""
        self._passes.clear()

    def _settle(self, keep: int = 0) -> None:
        """Look at the results of all passes but the last `keep`, and hand out the rows that are complete."""
        while len(self._passes) > keep:
            for reading in self._passes.popleft().settle():
                self._leave(reading)
                outcome = Scores(reading.scores, self.shape.name) if reading.finite else _not_finite()
                reading.request.end(reading.index, outcome)
                self.finished += 1
                self._most = math.inf

    def _leave(self, reading: _Reading) -> None:
        del self._held[id(reading)]
        self._memory.release(reading.pages, spoilt=not reading.finite)

    def _line_up(self) -> None:
        """Put the rows on their way back to the front of the line, to begin again."""
        held = list(self._held.values())
        for reading in held:
            self._memory.release(reading.pages)
            reading.pages, reading.open, reading.finite = [], 0, True
        self._held.clear()
        self._nodes.clear()
        self._passes.clear()
        self._memory.pages.forget()
        if held:
            self._lines.appendleft(deque(held))

    def _next(self) -> _Reading:
        """Take the next row out of its line."""
        reading = self._lines[0].popleft()
        if not self._lines[0]:
            self._lines.popleft()
        return reading

    def _prompts(self) -> _Batch:
        """Start rows until a pass is full: the tiles of their prompts; those of their nodes wait."""
        batch: _Batch = []
        room = self.shape.tokens
        next_rows = islice(chain(*self._lines), int(min(4 * self.shape.most_ends, self._most)))
        self._memory.expect([len(each.row.prompt_ids) for each in next_rows])
        while self._lines and len(self._held) < self._most:
            reading = self._lines[0][0]
            prompt = reading.row.prompt_ids
            begun = self._memory.pages.known(str(reading.adapter), prompt)
            left, cuts = len(prompt) - begun, -(-len(prompt) // TILE) - begun // TILE
            if batch and (left > room or len(batch) + cuts > self.shape.most_ends):
                self._lines.rotate(-1)
                break
            try:
                taken = self._memory.take(self, reading.adapter, prompt, len(prompt))
                if taken is not None:
                    reading.pages, known = taken
                    inner = self._inner(reading)
            except RowRejected as rejection:
                self._next().request.end(reading.index, rejection)
                continue
            if taken is None or inner is None:  # until rows end that hold pages; nobody overtakes this one
                self._memory.wait(self, started=bool(self._held))
                break
            self._held[id(self._next())] = reading
            tiles = list(prompt_tiles(prompt, reading.pages, known, reading.adapter))
            batch += [(tile, (reading, [-1] if tile is tiles[-1] else [])) for tile in tiles]
            self._nodes += inner
            reading.open = len(tiles) + len(inner)
            room -= left
        return batch

    def _inner(self, reading: _Reading) -> _Batch | None:
        """The tiles of a row's inner nodes; None, and the row's pages given back, where pages are short.

        Raises:
            RowRejected: Where they are too few for this row alone; its pages are given back.
        """
        trie, prompt = reading.row.continuations, reading.row.prompt_ids
        inner = set(trie.parents) - {-1}
        if max((trie.depths()[node] for node in inner), default=0) <= TILE:
            tiles = trie_tiles(trie, reading.pages, len(prompt), reading.adapter)
            return [(tile, (reading, nodes)) for tile, nodes in tiles]
        batch: _Batch = []
        for path in trie.paths(inner):
            text = (*prompt, *(trie.tokens[node] for node in path))
            try:
                # what is behind the prompt is read later, when others may have looked for it
                taken = self._memory.take(self, reading.adapter, text, len(text), kept=len(prompt))
            except RowRejected:
                self._memory.release(reading.pages, spoilt=True)
                raise
            if taken is None:
                self._memory.release(reading.pages, spoilt=True)
                if not self._memory.pages.in_use:
                    raise too_large(reading.size, self._llama.device)
                return None
            reading.pages += taken[0]
            for tile, nodes in text_tiles(text, taken[0], len(prompt), path, reading.adapter):
                batch.append((tile, (reading, nodes)))
        return batch

    def _read(self, tiles: _Batch, *, every: bool) -> None:
        """Start passes over tiles."""
        for batch in self.shape.passes(tiles):
            run = partial(self._pass, batch, every=every)
            self._passes.append(persevere(run, self._llama.device))

    def _pass(self, batch: _Batch, *, every: bool) -> _Pass:
        """Start one pass, and the scores of its nodes' children."""
        packed = self.shape.pack([tile for tile, _ in batch], self._llama.device)
        states = self._llama.read(packed, self._memory.cache, every=every)
        wanted: list[tuple[int, _Reading, int]] = []  # place among the states, whose, which node
        first = 0
        for place, (tile, (reading, nodes)) in enumerate(batch):
            lanes = range(first + len(tile.ids) - len(nodes), first + len(tile.ids)) if every else [place] * len(nodes)
            wanted += [(lane, reading, node) for lane, node in zip(lanes, nodes, strict=True)]
            first += len(tile.ids)
        found = _Pass(batch, [], [])
        size = _HEADS if self.shape.fixed else _FEW_HEADS
        for begin in range(0, len(wanted), size):
            self._score(states, wanted[begin : begin + size], size, found)
        return found

    def _score(self, states: Tensor, wanted: Sequence[tuple[int, _Reading, int]], size: int, found: _Pass) -> None:
        """Score the children of some nodes, by logits of a fixed number of states."""
        places = [place for place, _, _ in wanted]
        index = torch.tensor([*places, *places[:1] * (size - len(places))]).to(states.device, non_blocking=True)
        logits = self._llama.logits(states[index])  # size, V
        norms = norms_of(logits)
        lanes: list[int] = []
        tokens: list[int] = []
        to: list[tuple[_Reading, int]] = []
        for lane, (_, reading, node) in enumerate(wanted):
            children = reading.children[node]
            lanes += [lane] * len(children)
            tokens += [reading.row.continuations.tokens[child] for child in children]
            to += [(reading, child) for child in children]
        lane, token = torch.tensor([lanes, tokens], dtype=torch.long).to(states.device, non_blocking=True)
        found.edges.append((to, Arriving(logits[lane, token] - norms[lane])))
        found.norms.append(([reading for _, reading, _ in wanted], Arriving(norms)))


def norms_of(logits: Tensor) -> Tensor:
    """Log of the sum of each row's exponentials, ``(N, vocab)`` to ``(N,)``, the same bits wherever the row stands.

    On a GPU torch adds a row up in another order where it begins off a multiple of 16 bytes, as every other row of
    32,001 tokens does; so rows get a multiple of 4 numbers.
    """
    return pad(logits, (0, -logits.shape[1] % 4), value=-math.inf).logsumexp(-1)


def _children(trie: Trie) -> dict[int, list[int]]:
    """The children of each inner node, and of the prompt's end."""
    children: dict[int, list[int]] = {-1: []}
    for node, parent in enumerate(trie.parents):
        children.setdefault(parent, []).append(node)
    return children


def _not_finite() -> RowRejected:
    return RowRejected(
        "not_finite",
        "logits must be finite, but this row's hold NaN or infinity. "
        "Check the weights and the adapter, or load the model in bfloat16 or float32.",
    )
