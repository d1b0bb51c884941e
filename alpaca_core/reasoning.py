"""Think first, then answer: `chain_of_thought` (Wei et al. 2022, arXiv 2201.11903) and `conclude`."""

import re
from collections.abc import Sequence

from alpaca_core import prompts
from alpaca_core.generation import Slot, complete
from alpaca_core.model import DEFAULT_ADAPTER, Completion, LanguageModel, RowError
from alpaca_core.prompts import user_text
from alpaca_core.rows import Progress, check_rows, column, map_rows
from alpaca_core.spec import GREEDY, Sampling, TemplateName

CONCLUSION = Sampling(max_new_tokens=32)


class Conclusion(Completion):
    """A final response; `final_answer` is the answer in it, None where none stands out."""

    final_answer: str | None


def chain_of_thought(
    model: LanguageModel,
    questions: Sequence[str | RowError],
    sampling: Sampling = GREEDY,
    *,
    sample_indices: Sequence[int] | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Completion | RowError]:
    """Let the model reason about each question, step by step, before it answers.

    Args:
        model: From `load_model`.
        questions: What is asked.
        sampling: How tokens are chosen.
        sample_indices: Which sample of its question each row is; 0 unless said.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of rows just finished.

    Returns:
        A `Completion` for each question, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: As `generate`.
    """
    check_rows("questions", questions)

    def slot(question: object) -> Slot:
        return prompts.CHAIN_OF_THOUGHT.format(question=user_text("a question", question)), None

    slots = map_rows(slot, questions)
    return complete(model, slots, sampling, sample_indices, template, adapter, progress)


def conclude(
    model: LanguageModel,
    questions: Sequence[str | RowError],
    reasonings: Sequence[str | RowError | None] | None = None,
    sampling: Sampling = CONCLUSION,
    *,
    sample_indices: Sequence[int] | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Conclusion | RowError]:
    """Answer each question, given its reasoning or straight away.

    Args:
        model: From `load_model`.
        questions: What is asked.
        reasonings: The steps for each question; None answers without any, to compare the two.
        sampling: How tokens are chosen; greedy, 32 tokens unless it says otherwise.
        sample_indices: Which sample of its question each row is; 0 unless said.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of rows just finished.

    Returns:
        A `Conclusion` for each question, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: As `generate`; also if `reasonings` and `questions` differ in length.
    """
    check_rows("questions", questions)

    def slot(question: object, reasoning: object) -> Slot:
        asked = user_text("a question", question)
        if reasoning is None:
            return prompts.CONCLUDE_DIRECTLY.format(question=asked), None
        return prompts.CONCLUDE.format(question=asked, reasoning=user_text("a reasoning", reasoning)), None

    slots = map_rows(slot, questions, column("reasonings", reasonings, questions))
    return map_rows(
        lambda completion: Conclusion(**completion.model_dump(), final_answer=final_answer(completion.text)),
        complete(model, slots, sampling, sample_indices, template, adapter, progress),
    )


_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?%?"
_MARKER = re.compile(r"(?:####|\\boxed\{|\b(?:final\s+)?answer\s*(?:is|:|=))[\s:]*", re.IGNORECASE)
_END = re.compile(r"\n|(?<!\bDr|\bMr|\bMs|\bSt)(?<!\bMrs)(?<!\bProf)[.!?](?:\s|$)")
_SHORT = 5


def final_answer(text: str) -> str | None:
    """Extract the answer from a conclusion.

    In this order: what the last ``answer is``, ``answer:``, ``####`` or ``\\boxed{`` announces; the whole
    text where it is at most five words; the number where the text holds exactly one.

    Args:
        text: A conclusion.

    Returns:
        The answer without its full stop, or None where none stands out.

    Example:
        >>> final_answer("5 + 5 is 10. The answer is 10 pierogi.")
        '10 pierogi'
        >>> final_answer("Monika has 10 pierogi, since the cans are shared.")
        '10'
        >>> final_answer("One could see this in many ways, and none is better.") is None
        True
    """
    text = text.rstrip()
    markers = [marker for marker in _MARKER.finditer(text) if marker.end() < len(text)]
    if markers:
        announced = text[markers[-1].end() :]
        boxed = _in_braces(announced) if "{" in markers[-1][0] else None
        return _bare(boxed or _END.split(announced, maxsplit=1)[0]) or None
    if len(text.split()) <= _SHORT:
        return _bare(text) or None
    numbers = {_bare(number) for number in re.findall(_NUMBER, text)}
    return numbers.pop() if len(numbers) == 1 else None


def _in_braces(text: str) -> str | None:
    """Return what stands before the brace that closes one opened before the text; None where none does."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return None


def _bare(text: str) -> str:
    return text.strip().strip("*`\"'“” ").rstrip(".,;:!").strip("*`\"'“” ")
