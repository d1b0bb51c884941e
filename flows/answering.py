"""The flow `answer-question`: reason, conclude, verify, try again or vote; the core's `answer` as a chain of tasks."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from alpaca_core import Answer, Completion, Conclusion, ModelSpec, RowError, Sampling, Verification
from alpaca_core.answering import MOST_ATTEMPTS, MOST_SAMPLES, Steps, attempt, check_attempts
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import GREEDY, MOST_NEW_TOKENS, OptionalText, Value
from prefect_alpaca import tasks
from prefect_alpaca.flows.report import bar, cell, failure, inline, leave, quote, sections, table
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.rows import counted

Kind = TypeVar("Kind", bound=Value)


def _run_name() -> str:
    return f"answer {counted(len(flow_run.get_parameters()['questions']), 'question')}"


@flow(name="answer-question", flow_run_name=_run_name, persist_result=True, result_serializer="json")
def answer_question(
    questions: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "Each of 2 cans holds 5 pierogi. How many pierogi are there in all?"
    ],
    reason: bool = True,
    verify: bool = True,
    max_attempts: Annotated[int, Field(ge=1, le=MOST_ATTEMPTS)] = 1,
    min_p_correct: Annotated[float, Field(ge=0, le=1)] = 0.5,
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1,
    conclusion_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 32,
    sampling: Sampling = GREEDY,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Answer questions: reason step by step, conclude, and ask the model whether that is right.

    Args:
        questions: What is asked, one row each.
        reason: Think step by step before the answer.
        verify: Read P(correct) of each answer from the model.
        max_attempts: Most attempts at one question; more than one needs a temperature above 0.
        min_p_correct: P(correct), between 0 and 1, that ends the attempts.
        samples: Answers to each question that vote; more than one needs a temperature above 0.
        conclusion_tokens: Most tokens of a conclusion.
        sampling: How the tokens of reasoning and conclusion are chosen.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model answers.

    Returns:
        An `Answer` or a `RowError` for each question, as JSON.

    Raises:
        AlpacaError: If every question failed, or a setting would have no effect.
    """
    settings: dict[str, Any] = {
        "conclusion_tokens": conclusion_tokens,
        "verify": verify,
        "max_attempts": max_attempts,
        "min_p_correct": min_p_correct,
        "samples": samples,
    }
    check_attempts(sampling, **settings)  # before a model is loaded
    status = tasks.load_model(model)
    answers = attempt(
        Steps(
            chain_of_thought=_step(Completion, tasks.chain_of_thought, model),
            conclude=_step(Conclusion, tasks.conclude, model),
            verify=_step(Verification, tasks.verify, model),
        ),
        questions,
        sampling,
        reason=reason,
        adapter=adapter,
        **settings,
    )
    rows = list(zip(questions, answers, strict=True))
    leave(
        "answer-question",
        f"Answers to {counted(len(rows), 'question')}",
        "The answer to each question, how sure the model is of it, and the reasoning that led there.",
        status,
        sections([(question, _section(answer)) for question, answer in rows]),
        [_table_row(question, answer) for question, answer in rows],
        answers,
    )
    return [answer.model_dump(mode="json") for answer in answers]


def _step(kind: type[Kind], task: Callable[..., list[Json]], model: ModelSpec) -> Callable[..., list[Kind | RowError]]:
    def step(*rows: object, **settings: object) -> list[Kind | RowError]:
        return tasks.values(kind, task(model, *rows, **settings))

    return step


def _section(answer: Answer | RowError) -> str:
    if isinstance(answer, RowError):
        return failure(answer)
    parts = [f"**{inline(answer.final_answer or answer.answer)}**"]
    if answer.p_correct is not None:
        tries = f" · best of {answer.attempts} attempts" if answer.attempts > 1 else ""
        parts.append(f"P(correct) {bar(answer.p_correct)}{tries}")
    if answer.share is not None:
        parts += [f"Agreement {bar(answer.share)}", _votes(answer)]
    if answer.reasoning:
        parts += ["Reasoning:", quote(answer.reasoning)]
    if answer.final_answer:
        parts += ["Answer:", quote(answer.answer)]
    if answer.finish_reason == "length":
        parts.append("*Cut at its limit of tokens: the reasoning, the answer or both.*")
    return "\n\n".join(parts)


def _votes(answer: Answer) -> str:
    if not answer.votes:
        return "*No sample has an answer that stands out.*"
    rows = [
        [
            cell(vote.answer),
            str(vote.count),
            f"{vote.share:.2f}",
            "" if vote.p_correct is None else f"{vote.p_correct:.2f}",
        ]
        for vote in answer.votes
    ]
    return table(["Answer", "Samples", "Share", "Mean P(correct)"], rows)


def _table_row(question: str, answer: Answer | RowError) -> Json:
    done = answer if isinstance(answer, Answer) else None
    return {
        "question": cell(question),
        "answer": cell(done.final_answer or done.answer) if done else None,
        "p_correct": round(done.p_correct, 4) if done and done.p_correct is not None else None,
        "share": round(done.share, 4) if done and done.share is not None else None,
        "attempts": done.attempts if done else None,
        "error": inline(answer.message) if isinstance(answer, RowError) else None,
    }
