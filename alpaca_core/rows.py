"""Rows of a batch: checked, mapped, run, put in order. A row that fails costs itself only.

A `RowError` among the rows that a verb is given stays what it is, so that verbs chain.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.model import RowError

Progress = Callable[[float], object]
"""Called with the number of rows just finished, in parts where a row takes several steps; ``tqdm.update`` is one."""

Row = TypeVar("Row")
Result = TypeVar("Result")


def check_rows(name: str, rows: object) -> None:
    """Refuse a batch that is no sequence: one string is the usual slip, and would run letter by letter.

    Raises:
        InvalidRequest: For anything but a list or tuple of rows.
    """
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence):
        raise InvalidRequest(f"{name} is a list of rows, but got {type(rows).__name__}. Put one row into a list.")


def column(name: str, values: Sequence[Row] | None, rows: Sequence[object]) -> Sequence[Row | None]:
    """Return `values`, one for each row; all None where there are none.

    Raises:
        InvalidRequest: If the lists differ in length.
    """
    if values is None:
        return [None] * len(rows)
    check_rows(name, values)
    if len(values) != len(rows):
        raise InvalidRequest(f"{name} holds one value for each of {len(rows):,} rows, but got {len(values):,}.")
    return values


def map_rows(make: Callable[..., Result], *columns: Sequence[Any]) -> list[Result | RowError]:
    """Make something of each row; a rejected row becomes a `RowError`, and one that is an error stays it."""
    results: list[Result | RowError] = []
    for values in zip(*columns, strict=True):
        error = next((value for value in values if isinstance(value, RowError)), None)
        try:
            results.append(make(*values) if error is None else error)
        except RowRejected as rejection:
            results.append(RowError.of(rejection))
    return results


def run_rows(
    primitive: Callable[[Sequence[Row]], Iterator[tuple[int, Result | RowError]]],
    rows: Sequence[Row | RowError],
    progress: Progress | None = None,
    share: float = 1.0,
) -> list[Result | RowError]:
    """Run the rows that are no `RowError` yet on a model's primitive, and return results in the rows' order.

    Args:
        primitive: A method of `LanguageModel`.
        rows: The batch.
        progress: Called with `share` for each row that has finished.
        share: What one of these rows is of a row that the caller was given.
    """
    results: list[Result | RowError | None] = [row if isinstance(row, RowError) else None for row in rows]
    places = [place for place, result in enumerate(results) if result is None]
    if progress and len(places) < len(rows):
        progress((len(rows) - len(places)) * share)
    for index, result in primitive([row for row in rows if not isinstance(row, RowError)]):
        results[places[index]] = result
        if progress:
            progress(share)
    missing = [place for place, result in enumerate(results) if result is None]
    if missing:
        raise RuntimeError(f"the engine returned no result for rows {missing[:5]}; this is a bug of the engine.")
    return [result for result in results if result is not None]
