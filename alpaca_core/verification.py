"""Ask the model whether an answer is right: P(True) of Kadavath et al. 2022 (arXiv 2207.05221), by the judge."""

from collections.abc import Sequence

from alpaca_core import prompts
from alpaca_core.judging import Judgment, Method, judge
from alpaca_core.model import DEFAULT_ADAPTER, LanguageModel, RowError
from alpaca_core.prompts import user_text
from alpaca_core.rows import Progress, check_rows, column, map_rows
from alpaca_core.spec import TemplateName, Value


class Verification(Value):
    """What the model thinks of an answer: P(correct), and the mass that yes and no had together.

    `p_correct` is None where that mass is 0, since nothing tells the two apart then.
    """

    question: str
    answer: str
    p_correct: float | None
    coverage: float
    escaped: bool = False


def verify(
    model: LanguageModel,
    questions: Sequence[str | RowError],
    answers: Sequence[str | RowError],
    *,
    reasonings: Sequence[str | RowError | None] | None = None,
    method: Method = "logits",
    samples: int = 10,
    seed: int = 0,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Verification | RowError]:
    """Judge whether each answer is correct.

    Args:
        model: From `load_model`.
        questions: What was asked.
        answers: What was answered, one for each question.
        reasonings: The steps that led there, shown to the model; None shows none.
        method: ``logits``, or ``sampled``: ask `samples` times in words and count.
        samples: Responses drawn for each answer by ``sampled``.
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
        method=method,
        samples=samples,
        seed=seed,
        template=template,
        adapter=adapter,
        progress=progress,
    )

    def verification(question: str, answer: str, judgment: Judgment) -> Verification:
        return Verification(
            question=question,
            answer=answer,
            p_correct=None if judgment.label is None else judgment.probabilities["Yes"],
            coverage=judgment.coverage,
            escaped=judgment.escaped,
        )

    return map_rows(verification, questions, answers, judged)
