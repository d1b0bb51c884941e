"""The verb `cascade`: judge by logits, and reason only where that does not tell the labels apart."""

from collections.abc import Mapping, Sequence

from alpaca_core import prompts
from alpaca_core.asking import Asking
from alpaca_core.calibration import Calibration
from alpaca_core.errors import InvalidRequest
from alpaca_core.judging import Judgment, judge
from alpaca_core.model import DEFAULT_ADAPTER, Completion, LanguageModel, RowError, shapes_of
from alpaca_core.prompts import TEXT, user_text
from alpaca_core.reasoning import chain_of_thought
from alpaca_core.rows import Progress, check_rows, column, map_rows
from alpaca_core.spec import GREEDY, YES_NO, Label, Sampling, TemplateName, Value, digest_of

MARGINS = tuple(step / 10 for step in range(11))
"""Margins that `measure_cascade` compares unless told others."""


class CascadeJudgment(Judgment):
    """A judgment, and whether it took a reasoning to come to it.

    `first` are the probabilities before any reasoning, and `first_label` the label. `reasoning` is None, and
    `reasoning_tokens` 0, where these decided; then the judgment is the first one, else the one that read
    the reasoning. `calibration` is the digest of both calibrations together, None where there is none, so
    that all rows of a cascade share it.
    """

    first: dict[str, float]
    first_label: str | None
    reasoning: str | None = None
    reasoning_tokens: int = 0


class CascadePoint(Value):
    """What a cascade does at one margin.

    Args:
        margin: Rows with a smaller one are reasoned about.
        reasoned: Their share of all rows.
        tokens: Tokens of their reasonings.
        tokens_saved: Tokens that reasoning about all rows takes beyond that.
        accuracy: Share of all rows whose label is right; a row without a label is not.
    """

    margin: float
    reasoned: float
    tokens: int
    tokens_saved: int
    accuracy: float


class CascadeMeasurement(Value):
    """What a cascade does at each margin, against judging by logits only and reasoning about all rows.

    Args:
        n: Rows that were judged. With `failed`, those that are a `RowError`, they make up all rows.
        tokens: Tokens that the reasonings of all rows take.
        first_accuracy: Share of the `n` rows whose label is right before any reasoning.
        reasoned_accuracy: The same where all rows were reasoned about.
        points: One for each margin, in their order.
    """

    n: int
    failed: int
    tokens: int
    first_accuracy: float
    reasoned_accuracy: float
    points: tuple[CascadePoint, ...]


def cascade(
    model: LanguageModel,
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
    progress: Progress | None = None,
) -> list[CascadeJudgment | RowError]:
    """Judge each text by the logits; think step by step about those that are close, and judge them again.

    A text's margin is its top probability minus the second. Cascades of cheap and dear answers are those of
    FrugalGPT (Chen et al. 2023, arXiv 2305.05176, section 3), here with one model.

    Args:
        model: From `load_model`.
        texts: What is judged; without `instruction` each text is the instruction itself.
        labels: As `judge`.
        margin: Reason about texts with a smaller margin, between 0 and 1: 0 reasons about none, and 1 about
            all, those of which the judge is certain included.
        sampling: How the tokens of a reasoning are chosen.
        instruction: As `judge`.
        show_labels: As `judge`; the reasoning is told the labels where the judge's prompt names them.
        calibration: Of the first judgment, from `fit_calibration`.
        reasoned_calibration: Of the second one, which is another question: from `fit_calibration` on
            `reasoned_texts`, with ``instruction=reasoned_question(instruction)``.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of texts just judged; each of three steps is a part of one.

    Returns:
        A `CascadeJudgment` for each text, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidLabels: As `judge`.
        InvalidRequest: As `judge`; for a margin out of range; all of it before any work.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> close = {"reasoning below": "Yes", "step by step": "1 + 1 is 2.", "Is 1": {"Yes": 0.5, "No": 0.5}}
        >>> row = cascade(FakeModel(close), ["Is 1 + 1 = 2?"])[0]
        >>> row.label, row.first["Yes"], row.reasoning
        ('Yes', 0.5, '1 + 1 is 2.')
    """
    check_rows("texts", texts)
    _check_margin(margin)

    def ask(
        texts: Sequence[str | RowError],
        instruction: str | None,
        calibration: Calibration | None,
        progress: Progress | None = None,
    ) -> list[Judgment | RowError]:
        return judge(
            model,
            texts,
            labels,
            instruction=instruction,
            show_labels=show_labels,
            calibration=calibration,
            template=template,
            adapter=adapter,
            progress=progress,
        )

    def step(done: float) -> None:
        if progress:
            progress(done / 3)

    asking = Asking(model, labels, instruction=instruction, show_labels=show_labels, template=template, adapter=adapter)
    ask([], instruction, calibration)  # without texts each step checks its settings, and works on nothing
    second = reasoned_question(instruction)
    ask([], second, reasoned_calibration)
    chain_of_thought(model, [], sampling, template=template, adapter=adapter)

    firsts = ask(texts, instruction, calibration, step)
    places = [
        place
        for place, first in enumerate(firsts)
        if isinstance(first, Judgment) and _is_close(first.probabilities, margin)
    ]
    step(2 * (len(texts) - len(places)))
    close = [texts[place] for place in places]
    questions = map_rows(lambda text: _question(asking, text), close)
    thoughts = chain_of_thought(model, questions, sampling, template=template, adapter=adapter, progress=step)
    reasonings = map_rows(lambda thought: thought.text.strip(), thoughts)
    seconds = ask(_with_reasonings(close, reasonings), second, reasoned_calibration, step)

    both = [each and each.digest for each in (calibration, reasoned_calibration)]
    digest = digest_of(both) if any(both) else None

    def result(text: str, first: Judgment, thought: Completion | None, last: Judgment) -> CascadeJudgment:
        return CascadeJudgment(
            **last.model_dump()
            | {"text": text, "calibration": digest, "escaped": first.escaped or last.escaped}
            | {"shape": shapes_of(first, thought, last)},
            first=first.probabilities,
            first_label=first.label,
            reasoning=thought.text.strip() if thought else None,
            reasoning_tokens=thought.completion_tokens if thought else 0,
        )

    results = map_rows(lambda text, first: result(text, first, None, first), texts, firsts)
    again = map_rows(result, close, [firsts[place] for place in places], thoughts, seconds)
    for place, row in zip(places, again, strict=True):
        results[place] = row
    return results


def reasoned_question(instruction: str | None = None) -> str:
    """Write the instruction of a cascade's second judgment, for `fit_calibration`."""
    return prompts.REASONED.format(question=TEXT if instruction is None else instruction)


def reasoned_texts(judgments: Sequence[CascadeJudgment | RowError]) -> list[str | RowError]:
    """Write the texts that a cascade's second judgment is about, for `fit_calibration`.

    Args:
        judgments: From `cascade` with ``margin=1``, and the settings that the calibration is for.

    Raises:
        InvalidRequest: If a row was not reasoned about.
    """
    rows = _all_reasoned(judgments)
    return _with_reasonings(
        map_rows(lambda judgment: judgment.text, rows), map_rows(lambda judgment: judgment.reasoning, rows)
    )


def measure_cascade(
    judgments: Sequence[CascadeJudgment | RowError],
    gold: Sequence[str],
    margins: Sequence[float] = MARGINS,
) -> CascadeMeasurement:
    """Measure what cascades of all margins would do, from one run in which every row was reasoned about.

    It is exact, since a row's judgments depend on no other row: `cascade` at a margin gives each row either
    its first or its second judgment, and the run has both. Rows that failed are left out, also where
    only their reasoning did.

    Args:
        judgments: From `cascade` with ``margin=1``.
        gold: The right label of each row, by its name.
        margins: To compare, each between 0 and 1.

    Raises:
        InvalidRequest: If the lists differ in length, a row was not reasoned about, a right label is none of
            the row's labels, no row was judged, or a margin is out of range.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> fake = FakeModel({"reasoning below": "Yes", "step by step": "So.", "Is": {"Yes": 0.4, "No": 0.6}})
        >>> found = measure_cascade(cascade(fake, ["Is it?"], margin=1), ["Yes"], [0.1, 0.3])
        >>> [(point.accuracy, point.tokens) for point in found.points]
        [(0.0, 0), (1.0, 3)]
    """
    check_rows("margins", margins)
    for margin in margins:
        _check_margin(margin)
    rows = _all_reasoned(judgments)
    judged = [
        (row, _known(right, row, place))
        for place, (row, right) in enumerate(zip(rows, column("gold", gold, rows), strict=True))
        if isinstance(row, CascadeJudgment)
    ]
    if not judged:
        raise InvalidRequest(f"measuring needs a row that was judged, but all {len(rows):,} failed. Mend the rows.")
    n, tokens = len(judged), sum(row.reasoning_tokens for row, _ in judged)

    def point(margin: float) -> CascadePoint:
        close = [_is_close(row.first, margin) for row, _ in judged]
        spent = sum(row.reasoning_tokens for (row, _), goes_on in zip(judged, close, strict=True) if goes_on)
        right = sum(
            (row.label if goes_on else row.first_label) == label
            for (row, label), goes_on in zip(judged, close, strict=True)
        )
        return CascadePoint(
            margin=margin, reasoned=sum(close) / n, tokens=spent, tokens_saved=tokens - spent, accuracy=right / n
        )

    return CascadeMeasurement(
        n=n,
        failed=len(rows) - n,
        tokens=tokens,
        first_accuracy=point(0.0).accuracy,
        reasoned_accuracy=point(1.0).accuracy,
        points=tuple(point(margin) for margin in margins),
    )


def _is_close(probabilities: Mapping[str, float], margin: float) -> bool:
    second, top = sorted(probabilities.values())[-2:]
    return margin >= 1 or top - second < margin


def _question(asking: Asking, text: str) -> str:
    """Write what is reasoned about: what the first judgment asks, in one text."""
    question = "\n".join(part for part in asking.slots(text) if part)
    if not asking.shows_labels:
        return question
    return prompts.REASON_ABOUT.format(question=question, labels=", ".join(name.strip() for name in asking.names))


def _with_reasonings(texts: Sequence[str | RowError], reasonings: Sequence[str | RowError]) -> list[str | RowError]:
    def write(text: object, reasoning: str) -> str:
        return prompts.REASONING.format(text=user_text("a text", text), reasoning=reasoning)

    return map_rows(write, texts, reasonings)


def _all_reasoned(judgments: Sequence[CascadeJudgment | RowError]) -> Sequence[CascadeJudgment | RowError]:
    check_rows("judgments", judgments)
    for place, row in enumerate(judgments):
        if not isinstance(row, RowError) and (not isinstance(row, CascadeJudgment) or row.reasoning is None):
            raise InvalidRequest(
                f"every row was reasoned about, but row {place} is {row!r:.80}. Run cascade with margin=1 for it."
            )
    return judgments


def _known(label: object, row: CascadeJudgment, place: int) -> object:
    if not isinstance(label, str) or label not in row.probabilities:
        raise InvalidRequest(
            f"a right label is one of the judged labels, {list(row.probabilities)!r:.200}, but row {place} has "
            f"{label!r:.80}. Use a label's name, letter by letter."
        )
    return label


def _check_margin(margin: object) -> None:
    if not isinstance(margin, int | float) or not 0.0 <= margin <= 1.0:
        raise InvalidRequest(f"margin lies between 0 and 1, but got {margin!r:.80}. Use 0.2.")
