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
    """A `Feed` over the methods of a model whose rows run in batches: one batch of each kind at a time.

    A row that is dropped while its batch runs is computed on with the others, until none of them is wanted.

    Args:
        model: What runs them; where it has `stepwise`, that is its `generate` with a None after each step.
        most: Rows of one batch.
    """

    def __init__(self, model: LanguageModel, most: int) -> None:
        self._run: dict[type, Callable[[Any], Iterator[tuple[int, Result] | None]]] = {
            GenerateRow: getattr(model, "stepwise", model.generate),
            ScoreRow: model.loglikelihood,
        }
        self._most = most
        self._waiting: dict[int, GenerateRow | ScoreRow] = {}
        self._batches: dict[type, _Batch] = {}

    def __len__(self) -> int:
        return len(self._waiting) + sum(len(batch.wanted) for batch in self._batches.values())

    def add(self, key: int, row: GenerateRow | ScoreRow) -> None:
        """Line up a row."""
        self._waiting[key] = row

    def drop(self, key: int) -> None:
        """Take a row out, if it is still there."""
        self._waiting.pop(key, None)
        for kind, batch in list(self._batches.items()):
            batch.wanted.discard(key)
            if not batch.wanted:
                del self._batches[kind]  # which closes what runs

    def step(self) -> list[tuple[int, Result]]:
        """Take one step of the batch of each kind; begin those of rows that have come."""
        for kind, run in self._run.items():
            if kind not in self._batches:
                keys = [key for key, row in self._waiting.items() if type(row) is kind][: self._most]
                if keys:
                    rows = [self._waiting.pop(key) for key in keys]
                    self._batches[kind] = _Batch(keys, set(keys), run(rows))
        ended: list[tuple[int, Result]] = []
        for kind, batch in list(self._batches.items()):
            found = next(batch.results, None)
            if found is not None and (key := batch.keys[found[0]]) in batch.wanted:
                batch.wanted.remove(key)
                ended.append((key, found[1]))
            if not batch.wanted:
                del self._batches[kind]
        return ended


@dataclass(slots=True)
class _Batch:
    keys: list[int]
    wanted: set[int]
    results: Iterator[tuple[int, Result] | None]
