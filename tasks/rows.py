"""What every task over rows does: run the verb, show progress, log, and turn values into JSON and back."""

from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar

from pydantic import TypeAdapter

from alpaca_core import Calibration, Label, ModelSpec, RowError
from alpaca_core.metering import Metered
from alpaca_core.rows import check_rows
from alpaca_core.spec import Value
from prefect_alpaca.tasks.model import loaded, run_logger
from prefect_alpaca.tasks.progress import progress_bar
from prefect_alpaca.tasks.speed import note

Json = dict[str, Any]
"""One row as JSON: the fields of the verb's value, or ``code`` and ``message`` of a `RowError`."""

Kind = TypeVar("Kind", bound=Value)


def counted(number: int, noun: str) -> str:
    """Write a number of things: ``1 text``, ``12 texts``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def run_name(doing: str, rows: str, noun: str) -> Callable[..., str]:
    """Name a task's runs by what they do to how many rows, such as ``judge 12 texts``.

    Args:
        doing: What is done.
        rows: The parameter that holds the rows.
        noun: What one row is.
    """

    def name(parameters: dict[str, Any]) -> str:
        given = parameters[rows]
        return f"{doing} {counted(len(given), noun)}" if isinstance(given, Sized) else doing  # the task says why not

    return name


def run_verb(
    verb: Callable[..., Sequence[Value | RowError]],
    spec: ModelSpec,
    rows: Sequence[object],
    *arguments: object,
    **settings: object,
) -> list[Json]:
    """Run a core verb on this process's model: a progress bar, its speed in the log, a warning for rows that failed.

    Args:
        verb: Takes the model, the rows, the arguments and the settings, and `progress`.
        spec: The recipe of the model; it may come as JSON.
        rows: The batch.
        arguments: What follows the rows.
        settings: Keyword arguments; a calibration may come as JSON.

    Returns:
        The rows as JSON, in order.
    """
    check_rows("rows", rows)
    spec = ModelSpec.model_validate(spec)
    for name in ("calibration", "reasoned_calibration"):
        if settings.get(name) is not None:
            settings[name] = Calibration.model_validate(settings[name])
    model, logger = Metered(loaded(spec)), run_logger()
    with progress_bar(verb.__name__, len(rows)) as progress:
        results = verb(model, rows, *arguments, progress=progress, **settings)
    batch, speed = counted(len(rows), "row"), model.speed(len(rows))
    note(speed)
    logger.info("%s: %s by %s on %s", verb.__name__, speed, model.info.name, model.info.device)
    failed = [result for result in results if isinstance(result, RowError)]
    if failed:
        first = next(place for place, result in enumerate(results, 1) if isinstance(result, RowError))
        logger.warning("%d of %s failed; the first, row %d: %s", len(failed), batch, first, failed[0].message)
    return [result.model_dump(mode="json") for result in results]


def labels_of(labels: object) -> Any:
    """Turn the labels that come as JSON into `Label`; the verb says what is wrong with others."""
    if not isinstance(labels, list | tuple):
        return labels
    return [Label.model_validate(label) if isinstance(label, dict) else label for label in labels]


def values(kind: type[Kind], rows: Sequence[Json]) -> list[Kind | RowError]:
    """Turn a task's rows back into the core's values.

    Args:
        kind: What the verb returns: `Completion`, `Conclusion`, `Verification`, `Judgment`.
        rows: JSON rows of a task.

    Example:
        >>> values(RowError, [{"code": "empty_text", "message": "a text holds at least one visible character."}])
        [RowError(code='empty_text', message='a text holds at least one visible character.')]
    """
    adapter: TypeAdapter[list[Kind | RowError]] = TypeAdapter(list[kind | RowError])  # type: ignore[valid-type]
    return adapter.validate_python(rows)
