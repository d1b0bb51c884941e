"""The tasks that judge by logits: `judge` and `verify`."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import alpaca_core
from alpaca_core import Label, ModelSpec, RowError
from alpaca_core.calibration import Calibration
from alpaca_core.judging import Method
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import YES_NO, TemplateName
from alpaca_core.verification import VerifyMethod
from prefect_alpaca.tasks.rows import Json, run_name, run_verb


@task(task_run_name=run_name("judge", "texts", "text"), cache_policy=NO_CACHE, result_serializer="json")
def judge(
    model: ModelSpec,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label] = YES_NO,
    *,
    instruction: str | None = None,
    show_labels: bool | None = None,
    letters: bool = False,
    rotate_labels: bool = False,
    min_coverage: float = 0.0,
    all_segmentations: bool = False,
    calibration: Calibration | None = None,
    method: Method = "logits",
    samples: int = 10,
    seed: int = 0,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.judge` as a task: a `Judgment` or a `RowError` for each text, as JSON."""
    return run_verb(
        alpaca_core.judge,
        model,
        texts,
        labels,
        instruction=instruction,
        show_labels=show_labels,
        letters=letters,
        rotate_labels=rotate_labels,
        min_coverage=min_coverage,
        all_segmentations=all_segmentations,
        calibration=calibration,
        method=method,
        samples=samples,
        seed=seed,
        template=template,
        adapter=adapter,
    )


@task(task_run_name=run_name("verify", "answers", "answer"), cache_policy=NO_CACHE, result_serializer="json")
def verify(
    model: ModelSpec,
    questions: Sequence[str | RowError],
    answers: Sequence[str | RowError],
    *,
    reasonings: Sequence[str | RowError | None] | None = None,
    method: VerifyMethod = "logits",
    samples: int = 10,
    seed: int = 0,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.verify` as a task: a `Verification` or a `RowError` for each answer, as JSON."""
    return run_verb(
        alpaca_core.verify,
        model,
        questions,
        answers,
        reasonings=reasonings,
        method=method,
        samples=samples,
        seed=seed,
        template=template,
        adapter=adapter,
    )
