"""The tasks that generate text: `generate`, `chain_of_thought`, `conclude`."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

import alpaca_core
from alpaca_core import ModelSpec, RowError, Sampling
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.reasoning import CONCLUSION
from alpaca_core.spec import GREEDY, TemplateName
from prefect_alpaca.tasks.rows import Json, run_name, run_verb


@task(task_run_name=run_name("generate", "prompts", "response"), cache_policy=NO_CACHE, result_serializer="json")
def generate(
    model: ModelSpec,
    prompts: Sequence[str | RowError],
    sampling: Sampling = GREEDY,
    *,
    inputs: Sequence[str | RowError | None] | None = None,
    sample_indices: Sequence[int] | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.generate` as a task: a `Completion` or a `RowError` for each prompt, as JSON."""
    return run_verb(
        alpaca_core.generate,
        model,
        prompts,
        sampling,
        inputs=inputs,
        sample_indices=sample_indices,
        template=template,
        adapter=adapter,
    )


@task(task_run_name=run_name("reason about", "questions", "question"), cache_policy=NO_CACHE, result_serializer="json")
def chain_of_thought(
    model: ModelSpec,
    questions: Sequence[str | RowError],
    sampling: Sampling = GREEDY,
    *,
    sample_indices: Sequence[int] | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.chain_of_thought` as a task: a `Completion` or a `RowError` for each question, as JSON."""
    return run_verb(
        alpaca_core.chain_of_thought,
        model,
        questions,
        sampling,
        sample_indices=sample_indices,
        template=template,
        adapter=adapter,
    )


@task(task_run_name=run_name("conclude", "questions", "question"), cache_policy=NO_CACHE, result_serializer="json")
def conclude(
    model: ModelSpec,
    questions: Sequence[str | RowError],
    reasonings: Sequence[str | RowError | None] | None = None,
    sampling: Sampling = CONCLUSION,
    *,
    sample_indices: Sequence[int] | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
) -> list[Json]:
    """`alpaca_core.conclude` as a task: a `Conclusion` or a `RowError` for each question, as JSON."""
    return run_verb(
        alpaca_core.conclude,
        model,
        questions,
        reasonings,
        sampling,
        sample_indices=sample_indices,
        template=template,
        adapter=adapter,
    )
