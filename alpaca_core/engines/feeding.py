"""Engines step by step: rows of any callers come in at any time, and out as they end."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alpaca_core.engines.reading import Reader
from alpaca_core.engines.running import Runner
from alpaca_core.engines.searching import Searcher
from alpaca_core.engines.working import Request
from alpaca_core.errors import RowRejected
from alpaca_core.model import Completion, GenerateRow, LanguageModel, RowError, ScoreRow

Result = Completion | list[float] | RowError


class NativeFeed:
    """A `Feed` of the native engine: in turn a decode step, a step of beams, and a pass over judged rows.

    Args:
        runner: For rows without beams.
        searcher: For rows with beams.
        reader: For judged rows; those that come between two steps are a line.
        advance: Lets one of them take a step.
        number: Checks a row and gives the number of its adapter, or raises `RowRejected`.
        completion: Of a row and what it has come to.
    """

    def __init__(
        self,
        runner: Runner,
        searcher: Searcher,
        reader: Reader,
        advance: Callable[[Runner | Searcher | Reader], None],
        number: Callable[[GenerateRow | ScoreRow], int],
        completion: Callable[[GenerateRow, Any], Completion | RowError],
    ) -> None:
        self._runner, self._searcher, self._reader = runner, searcher, reader
        self._advance, self._number, self._completion = advance, number, completion
        self._rows: dict[int, tuple[GenerateRow | ScoreRow, Request]] = {}
        self._judged: list[tuple[Request, int, ScoreRow, int]] = []  # since the last step
        self._ended: deque[tuple[int, Any]] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: int, row: GenerateRow | ScoreRow) -> None:
        """Line up a row; one that is refused comes out as a `RowError` at the next step."""
        request = Request(1, self._ended)
        self._rows[key] = row, request
        try:
            number = self._number(row)
        except RowRejected as rejection:
            request.end(key, rejection)
            return
        if isinstance(row, ScoreRow):
            self._judged.append((request, key, row, number))
        else:
            self._worker(row).submit(request, [(key, row, number)])

    def drop(self, key: int) -> None:
        """Take a row out, if it is still there."""
        if key in self._rows:
            row, request = self._rows.pop(key)
            self._judged = [each for each in self._judged if each[1] != key]
            (self._reader if isinstance(row, ScoreRow) else self._worker(row)).cancel(request)

    def step(self) -> list[tuple[int, Result]]:
        """Take one step of each kind; return the rows that have ended."""
        judged, self._judged = self._judged, []
        self._reader.submit(judged)
        for worker in (self._runner, self._searcher, self._reader):
            self._advance(worker)
        ended = [(key, outcome, self._rows.pop(key)[0]) for key, outcome in self._ended if key in self._rows]
        self._ended.clear()
        return [(key, self._result(row, outcome)) for key, outcome, row in ended]

    def _worker(self, row: GenerateRow) -> Runner | Searcher:
        return self._searcher if row.sampling.num_beams > 1 else self._runner

    def _result(self, row: GenerateRow | ScoreRow, outcome: Any) -> Result:
        if isinstance(row, GenerateRow):
            return self._completion(row, outcome)
        found: list[float] | RowError = RowError.of(outcome) if isinstance(outcome, RowRejected) else outcome
        return found


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
