"""What those who run rows have in common: requests whose rows come back one by one, and a line in which rows wait."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from alpaca_core.engines.decoding import Reply
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.packing import Tile, prompt_tiles
from alpaca_core.engines.recovering import too_large
from alpaca_core.engines.shapes import Shape
from alpaca_core.errors import RowRejected
from alpaca_core.model import GenerateRow, Scores

Outcome = Reply | Scores | RowRejected


class Request:
    """The rows of one caller: how many are still out, and what has come back.

    Args:
        count: Rows.
        ended: Where results are put, each with its row's index; several requests may share it.
    """

    def __init__(self, count: int, ended: deque[tuple[int, Outcome]] | None = None) -> None:
        self.left = count
        self.ended: deque[tuple[int, Outcome]] = deque() if ended is None else ended
        self.cancelled = False

    def end(self, index: int, outcome: Outcome) -> None:
        """Put a row's result there, unless nobody wants it any more."""
        if not self.cancelled:
            self.ended.append((index, outcome))
        self.left -= 1  # after that: whoever reads both without a lock misses nothing

    def take(self) -> Iterator[tuple[int, Outcome]]:
        """Take out what has come back."""
        while self.ended:
            yield self.ended.popleft()


@dataclass(eq=False, slots=True, kw_only=True)
class Generated:
    """A row that gets a response; `drawn` counts its tokens so far."""

    request: Request
    index: int
    row: GenerateRow
    adapter: int
    pages: list[int] = field(default_factory=list)
    drawn: int = 0

    @property
    def size(self) -> int:
        """Tokens that its pages have room for."""
        return len(self.row.prompt_ids) + self.row.sampling.max_new_tokens


Row = TypeVar("Row", bound=Generated)


class Generating(ABC, Generic[Row]):
    """Runs rows that get responses, step by step, as a `recovering.Worker`. Its methods are called under a lock.

    Args:
        llama: The weights.
        memory: The cache.

    Attributes:
        shape: Slots, and the sizes of passes over prompts.
        finished: Rows that have come out of passes.
    """

    shape: Shape

    def __init__(self, llama: Llama, memory: Memory) -> None:
        self._llama, self._memory = llama, memory
        self._waiting: deque[Row] = deque()
        self._most = 0  # rows at once
        self.finished = 0

    @abstractmethod
    def _started(self) -> list[Row]:
        """The rows that are on their way."""

    @abstractmethod
    def _settle(self) -> None:
        """Look at all that has been computed."""

    @abstractmethod
    def _take(self, shape: Shape) -> None:
        """Use a shape, when no row is on its way."""

    @abstractmethod
    def _line_up(self, rows: Sequence[Row]) -> None:
        """Put rows back to the front of the line, to begin again."""

    @torch.inference_mode()
    def begin_again(self, shape: Shape) -> None:
        """Put the rows on their way back in line, and take another shape."""
        self._settle()
        self._line_up(self._started())
        most = min(self._most, shape.slots) if shape.slots <= self.shape.slots else shape.slots
        self._take(shape)
        self._most = most

    def give_up(self) -> None:
        """End the first row in line with an error: there is no memory for it."""
        row = self._waiting.popleft()
        self._end(row, too_large(row.size, self._llama.device))

    def _retreat(self) -> bool:
        """Take fewer rows at once; False where it was one alone.

        Rows whose prompts were to be read go back in line, or else the younger half of those that have begun.
        """
        self._settle()
        unread = [row for row in self._started() if not row.drawn]
        begun = sorted((row for row in self._started() if row.drawn), key=lambda row: -row.drawn)
        most = len(begun) + len(unread) // 2 if unread else len(begun) // 2
        self._line_up(unread or begun[most:])
        self._most = max(1, most)
        return most > 0 or not (unread or begun)

    def _admit(self, count: int) -> Iterator[tuple[Row, list[Tile]]]:
        """Take the pages of the first rows in line, up to `count`; yield each with the tiles of it to be read."""
        for _ in range(count):
            row = self._waiting[0]
            prompt = row.row.prompt_ids
            try:
                taken = self._memory.take(self, row.adapter, prompt, row.size)
            except RowRejected as rejection:
                self._end(self._waiting.popleft(), rejection)
                continue
            if taken is None:
                self._memory.wait(self, started=bool(self._started()))
                return
            row.pages, known = taken
            self._waiting.popleft()
            yield row, list(prompt_tiles(prompt, row.pages, known, row.adapter))

    def _end(self, row: Row, outcome: Reply | RowRejected) -> None:
        """Hand out what a row has come to, and give its pages back where it failed."""
        row.request.end(row.index, outcome)
        if isinstance(outcome, RowRejected):
            self._memory.release(row.pages, spoilt=True)
            row.pages = []
