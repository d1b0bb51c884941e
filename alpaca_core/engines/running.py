"""Generation in slots: rows of any callers share decode steps, and a row that ends makes room for the next.

What is known of a slot stands in tensors on the device. A step reads and writes them there, so that the next
one can start before anyone has looked at the tokens; the host follows one step behind, and finds out then
which rows have ended (a slot computes one token too many, which nobody reads).
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from alpaca_core.engines.choosing import Choice, choose
from alpaca_core.engines.decoding import Reply, not_finite
from alpaca_core.engines.graphs import Stepper
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.noise import row_key
from alpaca_core.engines.packing import PAGE, Tile
from alpaca_core.engines.recovering import ShortOfMemory, persevere
from alpaca_core.engines.results import Arriving
from alpaca_core.engines.shapes import Shape
from alpaca_core.engines.working import Generated, Generating, Request
from alpaca_core.errors import RowRejected
from alpaca_core.model import GenerateRow

_Whose = TypeVar("_Whose")


@dataclass(eq=False, slots=True, kw_only=True)
class _Row(Generated):
    """A row on its way. `drawn` counts the tokens that the device has chosen, `tokens` holds those known here."""

    choice: Choice
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    over: bool = False


class Runner(Generating[_Row]):
    """Runs the rows without beams of all requests, in slots.

    Args:
        llama: The weights.
        memory: The cache.
        shape: Slots, and the sizes of passes over prompts.
        eos_ids: Tokens that end a response.
    """

    def __init__(self, llama: Llama, memory: Memory, shape: Shape, eos_ids: Collection[int]) -> None:
        super().__init__(llama, memory)
        self._eos_ids = frozenset(eos_ids)
        self._behind: deque[tuple[Arriving, list[_Row]]] = deque()
        device, slots = llama.device, shape.slots + 1  # the last one is nobody's
        self._first = (
            torch.zeros(slots, dtype=torch.long, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.full((slots,), -1, dtype=torch.long, device=device),
            torch.zeros(slots, -(-len(llama.cos) // PAGE), dtype=torch.int32, device=device),
        )
        self._take(shape)

    def _take(self, shape: Shape) -> None:
        """Use the slots of a shape, all of them free; a smaller one takes no memory of its own."""
        self.shape = shape
        self._most = shape.slots  # rows at once
        self._rows: list[_Row | None] = [None] * shape.slots
        self._tokens, self._lengths, self._running, self._adapters, self._table = (
            state[: shape.slots + 1] for state in self._first
        )
        self._stepper = Stepper(self._llama, self._memory, self._tokens, self._lengths, self._table, self._adapters)

    def submit(self, request: Request, rows: Sequence[tuple[int, GenerateRow, int]]) -> None:
        """Line up rows of a request that fit the context, each with its index and the number of its adapter."""
        for index, row, adapter in rows:
            choice = Choice(row.sampling, row_key(row.sampling.seed, row.prompt_ids, row.sample_index))
            self._waiting.append(_Row(request=request, index=index, row=row, adapter=adapter, choice=choice))

    def cancel(self, request: Request) -> None:
        """Take the rest of a request's rows out."""
        request.cancelled = True
        self._waiting = deque(row for row in self._waiting if row.request is not request)
        self._leave([row for row in self._rows if row and row.request is request])
        # those whose last token is on its way have left their slots, but not their pages
        self._leave([row for _, rows in self._behind for row in rows if row.request is request])
        if not self._waiting:
            self._memory.leave(self)

    @torch.inference_mode()
    def advance(self) -> None:
        """Start waiting rows, take one decode step, and look at the step before.

        After an error no row is lost, and none will have another result: a step that failed has changed nothing
        that a second one would not write again.

        Raises:
            ShortOfMemory: If one row alone ran out of memory; it is the first in line again.
        """
        try:
            self._start()
            if any(self._rows):
                self._step()
        except ShortOfMemory:
            if not self._retreat():
                raise
        while self._behind and (len(self._behind) > self.shape.fixed or not any(self._rows)):
            self._look(*self._behind.popleft())

    def _started(self) -> list[_Row]:
        return [row for row in self._rows if row]

    def _line_up(self, rows: Sequence[_Row]) -> None:
        self._leave(rows)
        for row in rows[::-1]:
            row.over = True  # what may still arrive for it
            again = _Row(request=row.request, index=row.index, row=row.row, adapter=row.adapter, choice=row.choice)
            self._waiting.appendleft(again)

    def _settle(self) -> None:
        while self._behind:
            self._look(*self._behind.popleft())

    def close(self) -> None:
        """Let go of what takes memory."""
        self._stepper.close()

    def _start(self) -> None:
        """Read the prompts of waiting rows, as many as there are free slots and pages."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        free = free[: max(0, self._most - (len(self._rows) - len(free)))]
        if not self._waiting or not free or len(free) < min(len(self._waiting), self._most // 8):
            return  # a pass over the prompts of few costs more a row than one of many
        next_rows = [self._waiting[place] for place in range(min(len(free), len(self._waiting)))]
        self._memory.expect([row.size for row in next_rows])
        tiles: list[tuple[Tile, _Row | None]] = []
        try:
            for row, mine in self._admit(len(next_rows)):
                row.slot = free.pop(0)
                self._rows[row.slot] = row
                tiles += [(tile, row if tile is mine[-1] else None) for tile in mine]
            for batch in self.shape.passes(tiles):
                if found := persevere(partial(self._read, batch), self._llama.device):
                    self._drew(*found)
        except BaseException as error:
            self._memory.pages.forget()
            if not isinstance(error, ShortOfMemory):
                self._line_up([row for row in self._started() if not row.drawn])
            raise

    def _read(self, batch: Sequence[tuple[Tile, _Row | None]]) -> tuple[list[_Row], Arriving] | None:
        """Read a pass of tiles; the rows whose prompts end in it get their slots, and their first tokens are chosen."""
        ends, logits = read_pass(self._llama, self._memory, self.shape, batch)
        if logits is None:
            return None
        rows = list(ends.values())
        choices: list[Choice | None] = [None] * len(logits)
        for place, row in ends.items():
            choices[place] = row.choice
        tokens = choose(logits, choices, [0] * len(choices))

        def tensor(values: Sequence[object], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self._llama.device, non_blocking=True)

        slots = tensor([row.slot for row in rows], torch.long)
        width = max(len(row.pages) for row in rows)
        pages = [[*row.pages, *[0] * (width - len(row.pages))] for row in rows]
        drawn = tokens[tensor(list(ends), torch.long)]
        self._tokens[slots] = drawn.clamp(min=0)
        self._lengths[slots] = tensor([len(row.row.prompt_ids) for row in rows], torch.int32)
        self._running[slots] = 1
        self._adapters[slots] = tensor([row.adapter for row in rows], torch.long)
        self._table[slots, :width] = tensor(pages, torch.int32)
        return rows, Arriving(drawn)

    def _step(self) -> None:
        """Compute and choose one more token of every row.

        Nothing is written to the slots, and nothing noted, before all that takes memory is done.
        """
        members = self._started()
        longest = max(len(row.row.prompt_ids) + row.drawn for row in members)
        if self.shape.fixed:
            lanes, rows = None, list(self._rows)
        else:
            spare = self.shape.step(len(members)) - len(members)
            lanes = torch.tensor([*(row.slot for row in members), *[self.shape.slots] * spare])
            rows = [*members, *[None] * spare]
        places = [place for place, row in enumerate(rows) if row]

        def chosen() -> tuple[Tensor, Arriving]:
            logits = self._stepper(lanes, longest)
            choices = [row.choice if row else None for row in rows]
            tokens = choose(logits, choices, [row.drawn if row else 0 for row in rows])
            if len(places) == len(rows):
                return tokens.clamp(min=0), Arriving(tokens)
            return tokens.clamp(min=0), Arriving(tokens[torch.tensor(places).to(tokens.device, non_blocking=True)])

        tokens, arriving = persevere(chosen, self._llama.device)
        if lanes is None:
            self._tokens[:-1] = tokens
        else:
            self._tokens[lanes] = tokens
        self._lengths += self._running
        self._drew(members, arriving)

    def _drew(self, rows: list[_Row], tokens: Arriving) -> None:
        """Note that each row has one more token; rows that have all of theirs give up their slots."""
        for row in rows:
            row.drawn += 1
        self._behind.append((tokens, rows))
        self._leave([row for row in rows if row.drawn == row.row.sampling.max_new_tokens], over=False)

    def _look(self, tokens: Arriving, rows: Sequence[_Row]) -> None:
        """Hand tokens to their rows, and out the rows that have ended."""
        ended: list[_Row] = []
        for row, number in zip(rows, tokens.numbers(), strict=True):
            if row.over or row.request.cancelled:
                continue
            token = int(number)
            if token < 0:
                self._end(row, not_finite(len(row.tokens)))
            elif token in self._eos_ids:
                self._end(row, Reply(tuple(row.tokens), True, self.shape.name))
            else:
                row.tokens.append(token)
                if len(row.tokens) == row.row.sampling.max_new_tokens:
                    self._end(row, Reply(tuple(row.tokens), False, self.shape.name))
            if row.over:
                ended.append(row)
        if ended:
            self.finished += len(ended)
            self._most = self.shape.slots
        self._leave(ended)

    def _end(self, row: _Row, outcome: Reply | RowRejected) -> None:
        row.over = True
        super()._end(row, outcome)

    def _leave(self, rows: Sequence[_Row], *, over: bool = True) -> None:
        """Empty the slots of rows; `over` gives their pages back, too."""
        slots = [row.slot for row in rows if row.slot >= 0]
        if slots:
            index = torch.tensor(slots).to(self._llama.device, non_blocking=True)
            for state in (self._running, self._lengths, self._table):
                state[index] = 0
            self._adapters[index] = -1
        for row in rows:
            if row.slot >= 0:
                self._rows[row.slot], row.slot = None, -1
            if over:
                self._memory.release(row.pages)
                row.pages = []


def read_pass(
    llama: Llama, memory: Memory, shape: Shape, batch: Sequence[tuple[Tile, _Whose | None]]
) -> tuple[dict[int, _Whose], Tensor | None]:
    """Read a pass of tiles of prompts, each with the row whose prompt it ends; None where it ends none.

    Returns:
        The rows whose prompts end here by their places, and if there are some logits, ``(places, vocab)``.
    """
    packed = shape.pack([tile for tile, _ in batch], llama.device)
    states = llama.read(packed, memory.cache, every=False)
    ends = {place: row for place, (_, row) in enumerate(batch) if row}
    return ends, llama.logits(states) if ends else None
