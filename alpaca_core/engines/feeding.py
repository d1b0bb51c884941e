"""Engines step by step: rows of any callers come in at any time, and out as they end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alpaca_core.engines.decoding import Reply
from alpaca_core.engines.reading import Reader
from alpaca_core.engines.recovering import Worker
from alpaca_core.engines.running import Request, Runner
from alpaca_core.engines.searching import Searcher
from alpaca_core.errors import RowRejected
from alpaca_core.model import Completion, GenerateRow, LanguageModel, RowError, ScoreRow

Result = Completion | list[float] | RowError


@dataclass(frozen=True, slots=True)
class Workers:
    """What a feed of the native engine drives."""

    runner: Runner
    searcher: Searcher
    reader: Callable[[list[tuple[int, ScoreRow, int]]], Reader]
    advance: Callable[[Worker[Any]], Any]
    number: Callable[[GenerateRow | ScoreRow], int]
    """Checks a row and gives the number of its adapter, or raises `RowRejected`."""
    completion: Callable[[GenerateRow, Reply | RowRejected], Completion | RowError]


class NativeFeed:
    """A `Feed` of the native engine: in turn a decode step, a step of beams, and a pass over judged rows.

    Judged rows are read together as they have come: those that come while others are read are next.

    Args:
        workers: What it drives.
        most: Judged rows that are read together at most.
    """

    def __init__(self, workers: Workers, most: int = 256) -> None:
        self._workers, self._most = workers, most
        self._generating: dict[int, tuple[GenerateRow, Request]] = {}
        self._waiting: dict[int, tuple[ScoreRow, int]] = {}
        self._scored: set[int] = set()
        self._reader: Reader | None = None
        self._ended: list[tuple[int, Result]] = []

    def __len__(self) -> int:
        return len(self._generating) + len(self._waiting) + len(self._scored) + len(self._ended)

    def add(self, key: int, row: GenerateRow | ScoreRow) -> None:
        """Line up a row; one that is refused comes out as a `RowError` at the next step."""
        try:
            number = self._workers.number(row)
        except RowRejected as rejection:
            self._ended.append((key, RowError.of(rejection)))
            return
        if isinstance(row, ScoreRow):
            self._waiting[key] = row, number
            return
        request = Request(1)
        worker = self._workers.searcher if row.sampling.num_beams > 1 else self._workers.runner
        worker.submit(request, [(key, row, number)])
        self._generating[key] = row, request

    def drop(self, key: int) -> None:
        """Take a row out, if it is still there. Of rows that are being judged only the result is dropped."""
        if key in self._generating:
            row, request = self._generating.pop(key)
            (self._workers.searcher if row.sampling.num_beams > 1 else self._workers.runner).cancel(request)
        self._waiting.pop(key, None)
        self._scored.discard(key)
        self._ended = [each for each in self._ended if each[0] != key]
        if not self._scored and self._reader is not None:
            self._reader.release()
            self._reader = None

    def step(self) -> list[tuple[int, Result]]:
        """Take one step of each kind that there are rows for; return the rows that have ended."""
        ended, self._ended = self._ended, []
        if self._generating:
            for worker in (self._workers.runner, self._workers.searcher):
                self._workers.advance(worker)
            ended += self._generated()
        if self._reader is None and self._waiting:
            keys = list(self._waiting)[: self._most]
            rows = [(key, *self._waiting.pop(key)) for key in keys]
            self._scored.update(keys)
            self._reader = self._workers.reader(rows)
        if self._reader is not None:
            for key, outcome in self._workers.advance(self._reader) or ():
                if key in self._scored:
                    self._scored.remove(key)
                    ended.append((key, RowError.of(outcome) if isinstance(outcome, RowRejected) else outcome))
            if self._reader.done:
                self._reader = None
        return ended

    def _generated(self) -> Iterator[tuple[int, Result]]:
        for key, (row, request) in list(self._generating.items()):
            if request.ended:
                del self._generating[key]
                yield key, self._workers.completion(row, request.ended[0][1])


class BatchFeed:
    """A `Feed` over the two methods of any `LanguageModel`: a step runs the rows of one kind that have come.

    Args:
        model: Whose rows end together, or nearly.
        most: Rows of one step.
    """

    def __init__(self, model: LanguageModel, most: int) -> None:
        self._model, self._most = model, most
        self._waiting: dict[int, GenerateRow | ScoreRow] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: int, row: GenerateRow | ScoreRow) -> None:
        """Line up a row."""
        self._waiting[key] = row

    def drop(self, key: int) -> None:
        """Take a row out, if it is still there."""
        self._waiting.pop(key, None)

    def step(self) -> list[tuple[int, Result]]:
        """Run rows of the kind of the first in line."""
        kind = type(next(iter(self._waiting.values()), None))
        keys = [key for key, row in self._waiting.items() if type(row) is kind][: self._most]
        rows = [self._waiting.pop(key) for key in keys]
        found: Iterator[tuple[int, Result]]
        if kind is GenerateRow:
            found = self._model.generate([row for row in rows if isinstance(row, GenerateRow)])
        else:
            found = self._model.loglikelihood([row for row in rows if isinstance(row, ScoreRow)])
        return [(keys[index], result) for index, result in found]
