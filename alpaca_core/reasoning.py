"""Think first, then answer: `chain_of_thought` (Wei et al. 2022, arXiv 2201.11903) and `conclude`."""

import re
from collections.abc import Iterator, Sequence

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

    def concluded(completion: Completion) -> Conclusion:
        found = final_answer(completion.text, cut=completion.finish_reason == "length")
        return Conclusion(**completion.model_dump(), final_answer=found)

    return map_rows(concluded, complete(model, slots, sampling, sample_indices, template, adapter, progress))


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?%?")
_NUMBERING = re.compile(
    r"(?:^|(?<=[.!?]\s))[ \t*]*\(?\d{1,3}[.)]\**[ \t]+(?=\S)|\bstep[ \t]+\d+\**[:.)]*", re.IGNORECASE | re.MULTILINE
)
_HANGING = re.compile(r"(\A|[.!?:]\s{1,4})\(?\d{1,3}[.)]\**\Z")
_MARKER = re.compile(r"(?:####|\\boxed\{|\b(?:final\s+)?answer\s*(?:is|:|=))[\s:]*", re.IGNORECASE)
_STOP = re.compile(r"\n|[.!?](?=\s|$)")
_SHORT = 5

# A full stop after one of these ends a sentence only before a word that begins one: "U.S. Steel", "the U.S. It is".
_DOTTED = r"(?:[^\W\d_]\.)+[^\W\d_]"
_NAMES = "Dr|Mr|Mrs|Ms|Prof|St|Mt|Ft|Jr|Sr|Inc|Ltd|Co|Corp|vs|ca|cf|approx|etc"
_INITIAL = r"[A-Z]\.[ ][A-Z]|[A-Z][a-z]+[ ][A-Z]"
_SHORTENED = re.compile(rf"(?<![\w.])(?:{_DOTTED}|{_NAMES}|{_INITIAL})\Z")
_FIRST_INITIAL = re.compile(r"(?<![\w.])[A-Z]\Z")
_BEGINNING = re.compile(
    r"\s+(?:A|After|An|And|As|Because|But|Each|First|For|He|Here|His|However|I|If|In|It|Its|My|No|On|Our|She|Since|So|"
    r"Some|That|The|Their|Then|There|Therefore|These|They|This|Those|Thus|To|We|What|When|While|Yes|You|Your)\b"
)
_LONGEST_SHORTENED = 24


def final_answer(text: str, *, cut: bool = False) -> str | None:
    """Extract the answer from a conclusion.

    In this order: what the last ``answer is``, ``answer:``, ``####`` or ``\\boxed{`` announces; the whole
    text where it is at most five words; the number where the text holds exactly one, the numbers of steps and
    of lists aside. Of a text that was cut the last two see whole sentences only: an unfinished one may go on.

    Args:
        text: A conclusion.
        cut: Whether it was cut at its limit of tokens.

    Returns:
        The answer without its full stop, or None where none stands out.

    Example:
        >>> final_answer("5 + 5 is 10. The answer is 10 pierogi.")
        '10 pierogi'
        >>> final_answer("Monika has 10 pierogi, since the cans are shared.")
        '10'
        >>> final_answer("Step 1: we count the pierogi in one can.") is None
        True
        >>> final_answer("One could see this in many ways, and none is better.") is None
        True
    """
    text = text.rstrip()
    markers = list(_MARKER.finditer(text))
    if finished := [marker for marker in markers if marker.end() < len(text)]:
        announced = text[finished[-1].end() :]
        boxed = _in_braces(announced) if "{" in finished[-1][0] else None
        return _bare(boxed or announced[: next(_ends(announced), len(announced))]) or None
    if cut:
        text = _HANGING.sub(r"\1", _NUMBERING.sub("", text))  # else "1." were a whole sentence
        text = text[: max(_ends(text), default=0)]
    if len(text.split()) <= _SHORT and not markers:
        numbering = None if "\n" in text else _NUMBERING.match(text)
        if numbering and not text.endswith(":"):  # which step? step 3
            return _bare(text[numbering.end() :]) or _bare(text)
        return None if numbering else _bare(text) or None
    numbers = {_bare(number) for number in _NUMBER.findall(_NUMBERING.sub("", text))}
    return numbers.pop() if len(numbers) == 1 else None


def _ends(text: str) -> Iterator[int]:
    """Where sentences end: the place after each stop that ends one."""
    for stop in _STOP.finditer(text):
        place = stop.start()
        if text[place] != "." or not _goes_on(text, place):
            yield stop.end()


def _goes_on(text: str, place: int) -> bool:
    """Whether the full stop at a place belongs to a shortened word, and its sentence goes on."""
    after = text[place + 1 : place + _LONGEST_SHORTENED]
    if not after.strip() or after.lstrip(" ").startswith("\n") or _BEGINNING.match(after):
        return False
    before = max(0, place - _LONGEST_SHORTENED)
    if _SHORTENED.search(text, before, place):
        return True
    return bool(_FIRST_INITIAL.search(text, before, place) and re.match(r" [A-Z]\. [A-Z]", after))


def _in_braces(text: str) -> str | None:
    """Return what stands before the brace that closes one opened before the text; None where none does."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return None


def _bare(text: str) -> str:
    text = text.strip().strip("*`\"'“” ")
    stripped = text.rstrip(".,;:!")
    shortened = text[len(stripped) :].startswith(".") and re.search(rf"(?<![\w.]){_DOTTED}\Z", stripped)
    return (f"{stripped}." if shortened else stripped).strip("*`\"'“” ")
