"""The task `cascade`: judge by logits, and reason about close rows only."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import alpaca_core
from alpaca_core import Label, ModelSpec, RowError, Sampling
from alpaca_core.calibration import Calibration
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import GREEDY, YES_NO, TemplateName
from prefect_alpaca.tasks.rows import Json, run_name, run_verb


@task(task_run_name=run_name("cascade", "texts", "text"), cache_policy=NO_CACHE, result_serializer="json")
def cascade(
    model: ModelSpec,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label] = YES_NO,
    *,
    margin: float = 0.2,
    sampling: Sampling = GREEDY,
    instruction: str | None = None,
    show_labels: bool | None = None,
    calibration: Calibration | None = None,
    reasoned_calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.cascade` as a task: a `CascadeJudgment` or a `RowError` for each text, as JSON."""
    return run_verb(
        alpaca_core.cascade,
        model,
        texts,
        labels,
        margin=margin,
        sampling=sampling,
        instruction=instruction,
        show_labels=show_labels,
        calibration=calibration,
        reasoned_calibration=reasoned_calibration,
        template=template,
        adapter=adapter,
    )
