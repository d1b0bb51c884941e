"""Generation in slots: rows of any callers share decode steps, and a row that ends makes room for the next.

What is known of a slot stands in tensors on the device. A step reads and writes them there, so that the next
one can start before anyone has looked at the tokens; the host follows one step behind, and finds out then
which rows have ended (a slot computes one token too many, which nobody reads).
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from alpaca_core.engines.choosing import Choice, choose
from alpaca_core.engines.decoding import Reply, not_finite
from alpaca_core.engines.graphs import Stepper
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.noise import row_key
from alpaca_core.engines.packing import TILE, Tile, prompt_tiles
from alpaca_core.engines.results import Arriving
from alpaca_core.engines.shapes import Shape
from alpaca_core.errors import RowRejected
from alpaca_core.model import GenerateRow

_Whose = TypeVar("_Whose")


class Request:
    """The rows of one caller: how many are still out, and what has come back."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.ended: list[tuple[int, Reply | RowRejected]] = []
        self.cancelled = False


@dataclass(eq=False, slots=True)
class _Row:
    """A row on its way. `drawn` counts the tokens that the device has chosen, `tokens` holds those known here."""

    request: Request
    index: int
    row: GenerateRow
    adapter: int
    choice: Choice
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    drawn: int = 0
    tokens: list[int] = field(default_factory=list)
    over: bool = False


class Runner:
    """Runs the rows of all requests. Its methods are called under a lock.

    Args:
        llama: The weights.
        memory: The cache.
        shape: Slots, and the sizes of passes over prompts.
        eos_ids: Tokens that end a response.
    """

    def __init__(self, llama: Llama, memory: Memory, shape: Shape, eos_ids: Collection[int]) -> None:
        self._llama, self._memory, self._shape = llama, memory, shape
        self._eos_ids = frozenset(eos_ids)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row | None] = [None] * shape.slots
        self._behind: deque[tuple[Arriving, list[_Row]]] = deque()
        device, slots = llama.device, shape.slots + 1  # the last one is nobody's
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self._running = torch.zeros(slots, dtype=torch.int32, device=device)
        self._adapters = torch.full((slots,), -1, dtype=torch.long, device=device)
        self._table = torch.zeros(slots, -(-len(llama.cos) // TILE), dtype=torch.int32, device=device)
        self._stepper = Stepper(llama, memory, self._tokens, self._lengths, self._table, self._adapters)

    def submit(self, request: Request, rows: Sequence[tuple[int, GenerateRow, int]]) -> None:
        """Line up rows of a request that fit the context, each with its index and the number of its adapter."""
        for index, row, adapter in rows:
            choice = Choice(row.sampling, row_key(row.sampling.seed, row.prompt_ids, row.sample_index))
            self._waiting.append(_Row(request, index, row, adapter, choice))

    def cancel(self, request: Request) -> None:
        """Take the rest of a request's rows out."""
        request.cancelled = True
        self._waiting = deque(row for row in self._waiting if row.request is not request)
        self._leave([row for row in self._rows if row and row.request is request])

    @torch.inference_mode()
    def advance(self) -> None:
        """Start waiting rows, take one decode step, and look at the step before.

        After an error no row is lost, and none will have another result: a step that failed has changed nothing
        that a second one would not write again.
        """
        self._start()
        if any(self._rows):
            self._step()
        while self._behind and (len(self._behind) > self._shape.fixed or not any(self._rows)):
            self._look(*self._behind.popleft())

    def close(self) -> None:
        """Let go of what takes memory."""
        self._stepper.close()

    def _start(self) -> None:
        """Read the prompts of waiting rows, as many as there are free slots and pages."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        if not self._waiting or len(free) < min(len(self._waiting), self._shape.slots // 8):
            return  # a pass over prompts costs the same for one row as for many
        next_rows = [self._waiting[place].row for place in range(min(len(free), len(self._waiting)))]
        self._memory.expect([len(row.prompt_ids) + row.sampling.max_new_tokens for row in next_rows])
        tiles: list[tuple[Tile, _Row | None]] = []
        while self._waiting and free:
            row = self._waiting[0]
            prompt = row.row.prompt_ids
            taken = self._memory.take(row.adapter, prompt, len(prompt) + row.row.sampling.max_new_tokens)
            if taken is None:
                break
            self._waiting.popleft()
            row.pages, row.slot = taken[0], free.pop(0)
            self._rows[row.slot] = row
            mine = list(prompt_tiles(prompt, row.pages, taken[1], row.adapter))
            tiles += [(tile, row if tile is mine[-1] else None) for tile in mine]
        try:
            for ends, logits in read_prompts(self._llama, self._memory, self._shape, tiles):
                self._join(ends, logits)
        except BaseException:
            unread = [row for row in self._rows if row and not row.drawn]
            self._leave(unread)
            self._memory.pages.forget()
            self._waiting.extendleft(reversed(unread))
            raise

    def _join(self, ends: dict[int, _Row], logits: Tensor) -> None:
        """Give rows their slots, with the first token chosen from the logits at their places."""
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
        self._drew(rows, drawn)

    def _step(self) -> None:
        """Compute and choose one more token of every row."""
        members = [row for row in self._rows if row]
        longest = max(len(row.row.prompt_ids) + row.drawn for row in members)
        if self._shape.fixed:
            lanes, rows = None, list(self._rows)
        else:
            spare = self._shape.padded(len(members)) - len(members)
            lanes = torch.tensor([*(row.slot for row in members), *[self._shape.slots] * spare])
            rows = [*members, *[None] * spare]
        logits = self._stepper(lanes, longest)
        choices = [row.choice if row else None for row in rows]
        tokens = choose(logits, choices, [row.drawn if row else 0 for row in rows])
        if lanes is None:
            self._tokens[:-1] = tokens.clamp(min=0)
        else:
            self._tokens[lanes] = tokens.clamp(min=0)
        self._lengths += self._running
        self._drew(members, tokens, [place for place, row in enumerate(rows) if row])

    def _drew(self, rows: list[_Row], tokens: Tensor, places: Sequence[int] | None = None) -> None:
        """Note that each row has one more token; rows that have all of theirs give up their slots."""
        for row in rows:
            row.drawn += 1
        self._leave([row for row in rows if row.drawn == row.row.sampling.max_new_tokens], over=False)
        if places is not None and len(places) < len(tokens):
            tokens = tokens[torch.tensor(places).to(tokens.device, non_blocking=True)]
        self._behind.append((Arriving(tokens), rows))

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
                self._end(row, Reply(tuple(row.tokens), True))
            else:
                row.tokens.append(token)
                if len(row.tokens) == row.row.sampling.max_new_tokens:
                    self._end(row, Reply(tuple(row.tokens), False))
            if row.over:
                ended.append(row)
        self._leave(ended)

    def _end(self, row: _Row, outcome: Reply | RowRejected) -> None:
        row.over = True
        row.request.left -= 1
        row.request.ended.append((row.index, outcome))
        if isinstance(outcome, RowRejected):
            self._memory.release(row.pages, spoilt=True)
            row.pages = []

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


def outcomes(request: Request) -> Iterator[tuple[int, Reply | RowRejected]]:
    """Take out what has come back."""
    ended, request.ended = request.ended, []
    yield from ended


def read_prompts(
    llama: Llama, memory: Memory, shape: Shape, tiles: Sequence[tuple[Tile, _Whose | None]]
) -> Iterator[tuple[dict[int, _Whose], Tensor]]:
    """Read tiles of prompts, pass by pass.

    Args:
        llama: The weights.
        memory: The cache, with pages taken for the tiles.
        shape: The sizes of passes.
        tiles: Each with the row whose prompt it ends; None where it ends none.

    Yields:
        For each pass in which prompts end, the rows by their places, and logits ``(places, vocab)``.
    """
    for batch in shape.passes(tiles):
        packed = shape.pack([tile for tile, _ in batch], llama.device)
        states = llama.read(packed, memory.cache, every=False)
        ends = {place: row for place, (_, row) in enumerate(batch) if row}
        if ends:
            yield ends, llama.logits(states)
