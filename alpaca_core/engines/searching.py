"""Beam search in lanes: each live beam of a row is one, and the beams of a row share the pages they have in common.

A row takes all pages that it may come to need when it starts: those of its prompt once, and for each beam
those of the response. So a search that has begun never waits for memory. Which beam holds which of these pages
is known here alone: full ones are shared, and one that is partly filled is copied when a second beam goes on from
it (as vLLM does, arXiv 2309.06180, section 4.4).
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from alpaca_core.engines.beams import Beams
from alpaca_core.engines.decoding import Reply, not_finite
from alpaca_core.engines.graphs import Stepper
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.noise import gumbel, row_key
from alpaca_core.engines.packing import PAGE, Tile
from alpaca_core.engines.recovering import ShortOfMemory, persevere
from alpaca_core.engines.running import read_pass
from alpaca_core.engines.shapes import Shape
from alpaca_core.engines.working import Generated, Generating, Request
from alpaca_core.errors import RowRejected
from alpaca_core.model import GenerateRow


@dataclass(eq=False, slots=True, kw_only=True)
class _Row(Generated):
    """A row on its way; `drawn` counts the tokens of its live beams.

    `tables` are the pages of the beams that the last step read, `parents` says which of them go on, and is empty
    once the tables have followed; `tails` are the tokens to read next.
    """

    beams: Beams | None = None
    tables: list[list[int]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)

    @property
    def lanes(self) -> int:
        """Lanes that it takes at most."""
        return self.row.sampling.num_beams

    @property
    def held(self) -> int:
        """Tokens of each beam that the cache holds: all but the last one."""
        return len(self.row.prompt_ids) + self.drawn - 1

    @property
    def size(self) -> int:
        """Tokens that all its pages have room for: the full ones of the prompt are there once."""
        prompt = len(self.row.prompt_ids)
        whole = -(-(prompt + self.row.sampling.max_new_tokens) // PAGE)
        return PAGE * (prompt // PAGE + self.lanes * (whole - prompt // PAGE))


class Searcher(Generating[_Row]):
    """Runs the rows with beams of all requests.

    Rows run together as long as they have no more beams than there are slots; one that has more runs alone, in
    several passes a step.

    Args:
        llama: The weights.
        memory: The cache.
        shape: Slots, and the sizes of passes over prompts.
        eos_ids: Tokens that end a response.
    """

    def __init__(self, llama: Llama, memory: Memory, shape: Shape, eos_ids: Collection[int]) -> None:
        super().__init__(llama, memory)
        self._eos_ids = frozenset(eos_ids)
        self._live: list[_Row] = []
        device, lanes = llama.device, shape.lanes + 1  # the last one is nobody's
        self._first = (
            torch.zeros(lanes, dtype=torch.long, device=device),
            torch.zeros(lanes, dtype=torch.int32, device=device),
            torch.zeros(lanes, -(-len(llama.cos) // PAGE), dtype=torch.int32, device=device),
            torch.full((lanes,), -1, dtype=torch.long, device=device),
        )
        self._take(shape)

    def _take(self, shape: Shape) -> None:
        """Use the lanes of a shape; a smaller one takes no memory of its own."""
        self.shape = shape
        self._most = shape.slots  # rows at once
        self._width = shape.lanes
        states = [state[: self._width + 1] for state in self._first]
        self._tokens, self._lengths, self._table, self._adapters = states
        self._stepper = Stepper(self._llama, self._memory, self._tokens, self._lengths, self._table, self._adapters)

    def submit(self, request: Request, rows: Sequence[tuple[int, GenerateRow, int]]) -> None:
        """Line up rows of a request that fit the context, each with its index and the number of its adapter."""
        for index, row, adapter in rows:
            self._waiting.append(_Row(request=request, index=index, row=row, adapter=adapter))

    def cancel(self, request: Request) -> None:
        """Take the rest of a request's rows out."""
        request.cancelled = True
        self._waiting = deque(row for row in self._waiting if row.request is not request)
        for row in [row for row in self._live if row.request is request]:
            self._leave(row)
        if not self._waiting:
            self._memory.leave(self)

    @torch.inference_mode()
    def advance(self) -> None:
        """Start waiting rows, and take one step of every beam.

        After an error no row is lost, and none will have another result: each has taken a step as a whole or not
        at all, and what was written into pages for it will be written again.

        Raises:
            ShortOfMemory: If one row alone ran out of memory; it is the first in line again.
        """
        try:
            self._start()
            if self._live:
                self._step()
        except ShortOfMemory:
            if not self._retreat():
                raise

    def _started(self) -> list[_Row]:
        return list(self._live)

    def _settle(self) -> None:
        """Nothing is computed that is not looked at."""

    def _line_up(self, rows: Sequence[_Row]) -> None:
        for row in rows[::-1]:
            self._leave(row)
            self._waiting.appendleft(_Row(request=row.request, index=row.index, row=row.row, adapter=row.adapter))

    def close(self) -> None:
        """Let go of what takes memory."""
        self._stepper.close()

    def _start(self) -> None:
        """Read the prompts of waiting rows, as many as there are free lanes and pages."""
        free = self.shape.slots - sum(row.lanes for row in self._live)
        rows: list[_Row] = []
        for row in self._waiting:
            if (row.lanes > free and (rows or self._live)) or len(rows) + len(self._live) >= self._most:
                break
            rows.append(row)
            free -= row.lanes
        some = len(rows) < len(self._waiting) and sum(row.lanes for row in rows) < self.shape.slots // 8
        if not rows or (self._live and some):
            return  # a pass over the prompts of few costs more a row than one of many
        self._memory.expect([row.size for row in rows])
        tiles: list[tuple[Tile, _Row | None]] = []
        try:
            for row, mine in self._admit(len(rows)):
                self._live.append(row)
                row.tables = [row.pages[: -(-len(row.row.prompt_ids) // PAGE)]]
                tiles += [(tile, row if tile is mine[-1] else None) for tile in mine]
            for batch in self.shape.passes(tiles):
                read = partial(read_pass, self._llama, self._memory, self.shape, batch)
                ends, logits = persevere(read, self._llama.device)
                for place, row in ends.items():
                    assert logits is not None
                    self._go_on(row, logits[place : place + 1])
        except BaseException as error:
            self._memory.pages.forget()
            if not isinstance(error, ShortOfMemory):
                self._line_up([row for row in self._live if not row.drawn])
            raise

    def _step(self) -> None:
        """Read the last token of every beam, and choose how each row goes on."""
        persevere(self._follow, self._llama.device)
        rows = list(self._live)
        logits = persevere(self._logits, self._llama.device)
        for row, mine in zip(rows, logits.split([len(row.tables) for row in rows]), strict=True):
            self._go_on(row, mine)

    def _logits(self) -> Tensor:
        """Logits after the last token of every beam, row after row, ``(beams, vocab)``."""
        lanes = [(row, beam) for row in self._live for beam in range(len(row.tables))]
        passes = [lanes[first : first + self._width] for first in range(0, len(lanes), self._width)]
        # a pass writes its logits to where the one before had them
        found = [self._pass(part)[: len(part)].clone() for part in passes]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _follow(self) -> None:
        """Let the tables of all rows follow their beams; the copies are made at once, or after an error none."""
        behind = [row for row in self._live if row.parents]
        tables, copies = [], []
        for row in behind:
            table, more = follow(row.tables, row.parents, row.held, row.pages)
            tables.append(table)
            copies += more
        if copies:
            sources, targets = torch.tensor(copies).to(self._llama.device, non_blocking=True).unbind(1)
            cache = self._memory.cache
            cache.index_copy_(2, targets, cache.index_select(2, sources))
        for row, table in zip(behind, tables, strict=True):
            row.tables, row.parents = table, []

    def _pass(self, lanes: Sequence[tuple[_Row, int]]) -> Tensor:
        """Logits after the last tokens of some beams, ``(lanes, vocab)``, and behind them those of spare lanes."""
        size = self._width if self.shape.fixed else self.shape.step(len(lanes))
        spare = size - len(lanes)
        tables = [row.tables[beam] for row, beam in lanes]
        width = max(map(len, tables))

        def write(state: Tensor, values: Sequence[object], nothing: object) -> None:
            told = torch.tensor([*values, *[nothing] * spare], dtype=state.dtype)
            state[:size] = told.to(state.device, non_blocking=True)

        write(self._tokens, [row.tails[beam] for row, beam in lanes], 0)
        write(self._lengths, [row.held for row, _ in lanes], 0)
        write(self._adapters, [row.adapter for row, _ in lanes], -1)
        self._table.zero_()
        write(self._table[:, :width], [[*table, *[0] * (width - len(table))] for table in tables], [0] * width)
        chosen = None if self.shape.fixed else torch.arange(size)
        return self._stepper(chosen, 1 + max(row.held for row, _ in lanes))

    def _go_on(self, row: _Row, logits: Tensor) -> None:
        persevere(partial(self._choose, row, logits), self._llama.device)

    def _choose(self, row: _Row, logits: Tensor) -> None:
        """Take a row's next step, by the logits after each of its beams; all of it, or after an error none."""
        # A sum over a row of logits may depend on where in memory it begins, so it begins where memory of its own does.
        logits = logits.clone()
        if not logits.isfinite().all():
            self._come_out(row, not_finite(row.drawn))
            return
        sampling = row.row.sampling
        beams = row.beams or Beams(sampling, self._eos_ids, logits.device)
        noise = None
        if beams.sampled:
            key = row_key(sampling.seed, row.row.prompt_ids, row.row.sample_index)
            noise = gumbel(torch.tensor([key], device=logits.device), row.drawn, logits.numel())[0]
        beams.advance(logits, noise)
        row.beams, row.parents, row.tails, row.drawn = beams, beams.parents, beams.tails, row.drawn + 1
        if beams.done:
            stopped = beams.tokens[-1] in self._eos_ids
            tokens = beams.tokens[:-1] if stopped else beams.tokens
            self._come_out(row, Reply(tokens, stopped, self.shape.name))

    def _come_out(self, row: _Row, outcome: Reply | RowRejected) -> None:
        self.finished += 1
        self._most = self.shape.slots
        self._end(row, outcome)

    def _end(self, row: _Row, outcome: Reply | RowRejected) -> None:
        row.request.end(row.index, outcome)
        self._leave(row, spoilt=isinstance(outcome, RowRejected))

    def _leave(self, row: _Row, *, spoilt: bool = False) -> None:
        """Take a row out of its lanes, and give its pages back."""
        if row in self._live:
            self._live.remove(row)
        self._memory.release(row.pages, spoilt=spoilt)
        row.pages, row.tables = [], []


def follow(
    tables: Sequence[Sequence[int]], parents: Sequence[int], held: int, pages: Sequence[int]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Give each beam a table of pages, the last of which is its own and has room for one more token.

    The first beam that continues another takes over the page that is partly filled; the next ones get copies.

    Args:
        tables: Pages of the beams before.
        parents: Which of these each beam continues.
        held: Tokens that each beam holds.
        pages: All pages of the row.

    Returns:
        A table for each beam, and which page is to be copied to which. All are read before one is written: a
        page of a beam that has ended may be written to.
    """
    full, begun = divmod(held, PAGE)
    found = [list(tables[parent][:full]) for parent in parents]
    if begun:
        for parent in set(parents):
            found[parents.index(parent)].append(tables[parent][full])
    taken = {page for table in found for page in table}
    free = (page for page in pages if page not in taken)
    copies = []
    for table, parent in zip(found, parents, strict=True):
        if len(table) == full:
            table.append(next(free))
            if begun:
                copies.append((tables[parent][full], table[-1]))
    return found, copies
