"""The tasks of what people judge texts for: `classify`, `same_meaning`, `is_outlier`, `rate`."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import alpaca_core
from alpaca_core import Calibration, Label, ModelSpec, RowError, prompts
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import TemplateName
from prefect_alpaca.tasks.rows import Json, labels_of, run_name, run_verb


@task(task_run_name=run_name("classify", "texts", "text"), cache_policy=NO_CACHE, result_serializer="json")
def classify(
    model: ModelSpec,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label],
    *,
    instruction: str = prompts.CLASSIFY,
    min_coverage: float = 0.0,
    calibration: Calibration | None = None,
    template: TemplateName | None = "raw",
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.classify` as a task: a `Judgment` or a `RowError` for each text, as JSON."""
    return run_verb(
        alpaca_core.classify,
        model,
        texts,
        labels_of(labels),
        instruction=instruction,
        min_coverage=min_coverage,
        calibration=calibration,
        template=template,
        adapter=adapter,
    )


@task(task_run_name=run_name("compare", "firsts", "pair"), cache_policy=NO_CACHE, result_serializer="json")
def same_meaning(
    model: ModelSpec,
    firsts: Sequence[str | RowError],
    seconds: Sequence[str | RowError],
    *,
    min_coverage: float = 0.0,
    calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.same_meaning` as a task: a `Judgment` or a `RowError` for each pair, as JSON."""
    return run_verb(
        alpaca_core.same_meaning,
        model,
        firsts,
        seconds,
        min_coverage=min_coverage,
        calibration=calibration,
        template=template,
        adapter=adapter,
    )


@task(task_run_name=run_name("look for outliers in", "rows", "row"), cache_policy=NO_CACHE, result_serializer="json")
def is_outlier(
    model: ModelSpec,
    rows: Sequence[str | RowError],
    reference: Sequence[str],
    *,
    calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.is_outlier` as a task: an `Outlier` or a `RowError` for each row, as JSON."""
    return run_verb(
        alpaca_core.is_outlier,
        model,
        rows,
        reference,
        calibration=calibration,
        template=template,
        adapter=adapter,
    )


@task(task_run_name=run_name("rate", "texts", "text"), cache_policy=NO_CACHE, result_serializer="json")
def rate(
    model: ModelSpec,
    texts: Sequence[str | RowError],
    criterion: str,
    *,
    worst: int = 1,
    best: int = 5,
    calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.rate` as a task: a `Rating` or a `RowError` for each text, as JSON."""
    return run_verb(
        alpaca_core.rate,
        model,
        texts,
        criterion,
        worst=worst,
        best=best,
        calibration=calibration,
        template=template,
        adapter=adapter,
    )
