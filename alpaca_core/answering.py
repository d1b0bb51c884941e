"""Reason, conclude, verify; try again where the answer does not convince, or let several samples vote."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from alpaca_core import reasoning, verification
from alpaca_core.consistency import Vote, tally
from alpaca_core.errors import InvalidRequest, brief
from alpaca_core.model import DEFAULT_ADAPTER, Completion, LanguageModel, RowError, shapes_of
from alpaca_core.prompts import NO_ANSWER
from alpaca_core.reasoning import Conclusion
from alpaca_core.rows import Progress, check_rows, map_rows
from alpaca_core.spec import GREEDY, MOST_NEW_TOKENS, Sampling, TemplateName, Value
from alpaca_core.verification import Verification

MOST_ATTEMPTS = 1_000
"""Attempts at one question."""

MOST_SAMPLES = 1_000
"""Samples of one question."""


class Answer(Value):
    """An answer, how it came about, and how sure the model is of it.

    `reasoning` is None without a chain of thought, `p_correct` without verification or where the verifier
    had nothing to go by, `final_answer` where none stands out in the answer. `attempts` says how many it
    took; the best one is kept. `finish_reason` is ``length`` where the reasoning or the answer was cut at
    its limit of tokens. `escaped` says that a line in one of the prompts that equalled a template's
    marker got a leading space. `shape` is that of the model's passes, as in `Completion`; where it changed
    meanwhile, both are named.

    Of several samples it is the likeliest one of those that agree with the winning answer; `share` is their
    share of all samples, None where only one was asked for, `p_correct` combines it with what the verifier
    says (`consistency.tally`), and `votes` are all answers that were given, from the heaviest down. Where no
    sample has a final answer, it is the likeliest sample, with a share of 0.
    """

    question: str
    reasoning: str | None
    answer: str
    final_answer: str | None
    p_correct: float | None
    attempts: int
    finish_reason: Literal["stop", "length"] = "stop"
    escaped: bool = False
    share: float | None = None
    votes: tuple[Vote, ...] = ()
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Steps:
    """The three verbs that `attempt` calls, without their model: the core's own, or a flow's tasks."""

    chain_of_thought: Callable[..., Sequence[Completion | RowError]]
    conclude: Callable[..., Sequence[Conclusion | RowError]]
    verify: Callable[..., Sequence[Verification | RowError]]


def answer(
    model: LanguageModel,
    questions: Sequence[str | RowError],
    sampling: Sampling = GREEDY,
    *,
    conclusion_tokens: int = 32,
    reason: bool = True,
    verify: bool = True,
    max_attempts: int = 1,
    min_p_correct: float = 0.5,
    samples: int = 1,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Answer | RowError]:
    """Answer each question: reason, conclude, verify; below `min_p_correct` try again and keep the best.

    With `samples` above 1 each question is answered so many times instead, and the samples vote
    (self-consistency, Wang et al. 2022, arXiv 2203.11171), each with the weight of its P(correct) where it
    has one (Li et al. 2023, arXiv 2206.02336, section 3). `consistency.py` says what counts as the same
    answer. Samples that failed have no say.

    Args:
        model: From `load_model`.
        questions: What is asked.
        sampling: How tokens are chosen, in reasoning and conclusion.
        conclusion_tokens: Most tokens of a conclusion; that of a reasoning is the sampling's.
        reason: Whether to think step by step first.
        verify: Whether to judge the answer.
        max_attempts: Most attempts at one question; more than one needs a temperature above 0 and `verify`.
        min_p_correct: P(correct) that ends the attempts, between 0 and 1.
        samples: Answers to each question that vote; more than one needs a temperature above 0, and excludes
            more than one attempt.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of questions just finished; each step is a part of one.

    Returns:
        An `Answer` for each question, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: For settings out of range, or that would have no effect.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> fake = FakeModel({"Answer yes or no": {"Yes": 0.8, "No": 0.2}, "given these steps": "Berlin"}, "Think.")
        >>> answer(fake, ["What is the capital of Germany?"])[0].answer
        'Berlin'
    """
    steps = Steps(
        partial(reasoning.chain_of_thought, model),
        partial(reasoning.conclude, model),
        partial(verification.verify, model),
    )
    return attempt(
        steps,
        questions,
        sampling,
        conclusion_tokens=conclusion_tokens,
        reason=reason,
        verify=verify,
        max_attempts=max_attempts,
        min_p_correct=min_p_correct,
        samples=samples,
        template=template,
        adapter=adapter,
        progress=progress,
    )


def attempt(
    steps: Steps,
    questions: Sequence[str | RowError],
    sampling: Sampling,
    *,
    conclusion_tokens: int,
    reason: bool,
    verify: bool,
    max_attempts: int,
    min_p_correct: float,
    samples: int = 1,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Answer | RowError]:
    """Run the chain on any steps; `answer` says what the arguments mean."""
    check_rows("questions", questions)
    check_attempts(
        sampling,
        conclusion_tokens=conclusion_tokens,
        verify=verify,
        max_attempts=max_attempts,
        min_p_correct=min_p_correct,
        samples=samples,
    )
    once = partial(
        _attempt_once,
        steps,
        sampling=sampling,
        conclusion_tokens=conclusion_tokens,
        reason=reason,
        verify=verify,
        options={"template": template, "adapter": adapter},
    )
    if samples > 1:
        repeated = [question for question in questions for _ in range(samples)]
        indices = list(range(samples)) * len(questions)
        drawn = once(repeated, indices, progress=progress and (lambda done: progress(done / samples)))
        return [_most_agreed(drawn[start : start + samples]) for start in range(0, len(drawn), samples)]
    results: dict[int, Answer | RowError] = {}
    pending = list(range(len(questions)))
    share = 1 / max_attempts
    for index in range(max_attempts):
        tried = once(
            [questions[place] for place in pending],
            [index] * len(pending),
            progress=progress and (lambda done: progress(done * share)),
        )
        for place, new in zip(pending, tried, strict=True):
            results[place] = _better(results.get(place), new)
        left = [place for place in pending if _unconvincing(results[place], min_p_correct)]
        if progress:
            progress((len(pending) - len(left)) * (max_attempts - 1 - index) * share)
        pending = left
        if not pending:
            break
    return [results[place] for place in range(len(questions))]


def check_attempts(
    sampling: Sampling,
    *,
    conclusion_tokens: int,
    verify: bool,
    max_attempts: int,
    min_p_correct: float,
    samples: int = 1,
) -> None:
    """Refuse settings of `answer` that are out of range, or would have no effect.

    Raises:
        InvalidRequest: With the setting's name.
    """
    if not isinstance(min_p_correct, int | float) or not 0.0 <= min_p_correct <= 1.0:
        raise InvalidRequest(f"min_p_correct lies between 0 and 1, but got {min_p_correct!r:.80}. Use 0.5.")
    if not isinstance(sampling, Sampling):
        raise InvalidRequest(f"sampling is a Sampling, but got {sampling!r:.80}. Leave it out for greedy responses.")
    for name, value, most in (
        ("max_attempts", max_attempts, MOST_ATTEMPTS),
        ("samples", samples, MOST_SAMPLES),
        ("conclusion_tokens", conclusion_tokens, MOST_NEW_TOKENS),
    ):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise InvalidRequest(f"{name} is a whole number from 1 to {most:,}, but got {brief(value)}. Change it.")
    if max_attempts > 1 and (sampling.temperature == 0 or not verify):
        raise InvalidRequest(
            f"max_attempts={max_attempts} has no effect without verify=True and a temperature above 0: every "
            "attempt would be the first again, or none be chosen. Set both, or max_attempts=1."
        )
    if samples > 1 and sampling.temperature == 0:
        raise InvalidRequest(
            f"samples={samples} has no effect at temperature 0, where every sample would be the first again. "
            "Set a temperature such as 0.7, or samples=1."
        )
    if samples > 1 and max_attempts > 1:
        raise InvalidRequest(
            f"samples vote or attempts are tried until one convinces, but got samples={samples} and "
            f"max_attempts={max_attempts}. Set one of the two to 1."
        )


def _attempt_once(
    steps: Steps,
    questions: Sequence[str | RowError],
    indices: Sequence[int],
    *,
    sampling: Sampling,
    conclusion_tokens: int,
    reason: bool,
    verify: bool,
    options: dict[str, Any],
    progress: Progress | None,
) -> list[Answer | RowError]:
    short = sampling.model_copy(update={"max_new_tokens": conclusion_tokens})
    if progress:
        count = reason + 1 + verify
        options = {**options, "progress": lambda done: progress(done / count)}
    thoughts: Sequence[Completion | RowError | None] = [None] * len(questions)
    if reason:
        thoughts = steps.chain_of_thought(questions, sampling, sample_indices=indices, **options)
    reasonings = map_rows(lambda thought: (thought and thought.text.strip()) or None, thoughts)
    conclusions = steps.conclude(questions, reasonings, short, sample_indices=indices, **options)
    checks: Sequence[Verification | RowError | None] = [None] * len(questions)
    if verify:
        said = map_rows(lambda conclusion: conclusion.text.strip() or NO_ANSWER, conclusions)
        checks = steps.verify(questions, said, **options)

    def combine(
        question: str, index: int, thought: Completion | None, conclusion: Conclusion, check: Verification | None
    ) -> Answer:
        cut = any(step.finish_reason == "length" for step in (thought, conclusion) if step)
        return Answer(
            question=question,
            reasoning=(thought and thought.text.strip()) or None,
            answer=conclusion.text.strip(),
            final_answer=conclusion.final_answer,
            p_correct=check.p_correct if check else None,
            attempts=index + 1,
            finish_reason="length" if cut else "stop",
            escaped=any(step.escaped for step in (thought, conclusion, check) if step),
            shape=shapes_of(thought, conclusion, check),
        )

    return map_rows(combine, questions, indices, thoughts, conclusions, checks)


def _better(best: Answer | RowError | None, new: Answer | RowError) -> Answer | RowError:
    """Keep the likelier of two attempts, and count both; a failed attempt never costs an earlier answer."""
    if best is None or isinstance(best, RowError):
        return new
    if isinstance(new, RowError):
        return best.model_copy(update={"attempts": best.attempts + 1})
    return max(best, new, key=lambda each: each.p_correct or 0.0).model_copy(update={"attempts": new.attempts})


def _unconvincing(row: Answer | RowError, min_p_correct: float) -> bool:
    return isinstance(row, Answer) and (row.p_correct or 0.0) < min_p_correct


def _most_agreed(drawn: Sequence[Answer | RowError]) -> Answer | RowError:
    """Let the samples of one question vote; an error where all of them failed."""
    answers = [row for row in drawn if isinstance(row, Answer)]
    if not answers:
        return drawn[0]
    found = tally([row.final_answer for row in answers], [row.p_correct for row in answers])
    voted = {"attempts": 1, "share": found.share, "p_correct": found.p_correct, "votes": found.votes}
    return answers[found.winner].model_copy(update=voted)
