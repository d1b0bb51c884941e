"""Is an answer right? P(True) of Kadavath et al. 2022 (arXiv 2207.05221) by the judge, with or without agreement."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from alpaca_core import prompts
from alpaca_core.consistency import agreeing, pooled
from alpaca_core.errors import InvalidRequest
from alpaca_core.judging import Judgment, judge
from alpaca_core.model import DEFAULT_ADAPTER, LanguageModel, RowError, shapes_of
from alpaca_core.prompts import user_text
from alpaca_core.reasoning import CONCLUSION, Conclusion, chain_of_thought, conclude, final_answer
from alpaca_core.rows import Progress, check_rows, column, map_rows
from alpaca_core.spec import Sampling, TemplateName, Value

VerifyMethod = Literal["logits", "sampled", "consistent"]

DRAW_TEMPERATURE = 0.7
"""Of the answers that ``consistent`` draws: Wang et al. 2022 (arXiv 2203.11171, section 3.1) use 0.5 to 0.7."""

FIRST_DRAW = 2**32
"""Sample index of the first of them: far from those of `answer`, whose own sample would else agree with itself."""


class Verification(Value):
    """What the model thinks of an answer: P(correct), and the mass that yes and no had together.

    `p_correct` is None where that mass is 0 and nothing else was asked, since nothing tells the two apart
    then. `share` is that of the draws which agree with the answer, None where none were made. `shape` is that of
    the model's passes, as in `Completion`.
    """

    question: str
    answer: str
    p_correct: float | None
    coverage: float
    escaped: bool = False
    share: float | None = None
    shape: str = ""


def verify(
    model: LanguageModel,
    questions: Sequence[str | RowError],
    answers: Sequence[str | RowError],
    *,
    reasonings: Sequence[str | RowError | None] | None = None,
    method: VerifyMethod = "logits",
    samples: int = 10,
    seed: int = 0,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Verification | RowError]:
    """Judge whether each answer is correct.

    By ``consistent`` the model also answers each question itself, `samples` times (self-consistency, Wang et
    al. 2022, arXiv 2203.11171), and P(correct) is ``(agreeing + k * P(True)) / (samples + k)``: P(True), read
    from the logits, counts as k = `consistency.PRIOR_DRAWS` draws of its own. So it lies between agreement and
    P(True), leans on agreement the more is drawn, and is 0 or 1 only where both are. Draws that failed are
    left out, and where all did, the row fails; a draw without a final answer agrees with nothing.

    Args:
        model: From `load_model`.
        questions: What was asked.
        answers: What was answered, one for each question.
        reasonings: The steps that led there, shown to the model; None shows none.
        method: ``logits``; ``sampled``: ask `samples` times in words and count; or ``consistent``.
        samples: Responses drawn for each answer by ``sampled``, reasonings and conclusions by ``consistent``
            (at `DRAW_TEMPERATURE`, of at most 256 and 32 tokens).
        seed: Of the samples.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of rows just finished.

    Returns:
        A `Verification` for each answer, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: If the lists differ in length, or a setting is out of range.
    """
    check_rows("questions", questions)
    check_rows("answers", answers)
    if method not in get_args(VerifyMethod):
        raise InvalidRequest(
            f"method is 'logits', 'sampled' or 'consistent', but got {method!r:.80}. Name one of them."
        )

    def ask(question: object, answer: object, reasoning: object) -> str:
        asked, answered = user_text("a question", question), user_text("an answer", answer)
        if reasoning is None:
            return prompts.VERIFY.format(question=asked, answer=answered)
        steps = user_text("a reasoning", reasoning)
        return prompts.VERIFY_WITH_REASONING.format(question=asked, answer=answered, reasoning=steps)

    texts = map_rows(ask, questions, column("answers", answers, questions), column("reasonings", reasonings, questions))
    judged = judge(
        model,
        texts,
        method="sampled" if method == "sampled" else "logits",
        samples=samples,
        seed=seed,
        template=template,
        adapter=adapter,
        progress=progress if method != "consistent" else _part(progress, 1 / 3),
    )
    drawn: Sequence[list[Conclusion] | RowError | None] = [None] * len(questions)
    if method == "consistent":
        asked = map_rows(lambda question, _: question, questions, judged)
        drawn = _draw(model, asked, samples, seed, template, adapter, _part(progress, 1 / (3 * samples)))

    def verification(question: str, answer: str, judgment: Judgment, drawn: list[Conclusion] | None) -> Verification:
        p_correct = None if judgment.label is None else judgment.probabilities["Yes"]
        share = None
        if drawn is not None:
            agreed = agreeing(final_answer(answer) or answer, [conclusion.final_answer for conclusion in drawn])
            share, p_correct = agreed / len(drawn), pooled(agreed, len(drawn), p_correct)
        return Verification(
            question=question,
            answer=answer,
            p_correct=p_correct,
            coverage=judgment.coverage,
            escaped=judgment.escaped,
            share=share,
            shape=shapes_of(judgment, *(drawn or ())),
        )

    return map_rows(verification, questions, answers, judged, drawn)


def _draw(
    model: LanguageModel,
    questions: Sequence[str | RowError],
    draws: int,
    seed: int,
    template: TemplateName | None,
    adapter: str | None,
    progress: Progress | None,
) -> list[list[Conclusion] | RowError]:
    """Let the model answer each question itself, so many times; an error where every draw failed."""
    sampling = Sampling(temperature=DRAW_TEMPERATURE, seed=seed)
    short = sampling.model_copy(update={"max_new_tokens": CONCLUSION.max_new_tokens})
    repeated = [question for question in questions for _ in range(draws)]
    indices = list(range(FIRST_DRAW, FIRST_DRAW + draws)) * len(questions)
    options: dict[str, Any] = {"template": template, "adapter": adapter, "progress": progress}
    thoughts = chain_of_thought(model, repeated, sampling, sample_indices=indices, **options)
    reasonings = map_rows(lambda thought: thought.text.strip() or None, thoughts)
    drawn = conclude(model, repeated, reasonings, short, sample_indices=indices, **options)

    def finished(row: Sequence[Conclusion | RowError]) -> list[Conclusion] | RowError:
        kept = [each for each in row if isinstance(each, Conclusion)]
        return kept or next(each for each in row if isinstance(each, RowError))

    return [finished(drawn[start : start + draws]) for start in range(0, len(drawn), draws)]


def _part(progress: Progress | None, share: float) -> Progress | None:
    return progress and (lambda done: progress(done * share))
