"""What people judge texts for: `classify`, `same_meaning`, `is_outlier`, `rate`. Each is `judge` with a prompt."""

from collections.abc import Sequence

from alpaca_core import prompts
from alpaca_core.calibration import Calibration
from alpaca_core.errors import InvalidRequest
from alpaca_core.judging import Judgment, judge
from alpaca_core.model import DEFAULT_ADAPTER, LanguageModel, RowError
from alpaca_core.prompts import user_text
from alpaca_core.rows import Progress, check_rows, column, map_rows
from alpaca_core.spec import Label, TemplateName, Value

MOST_REFERENCES = 64
"""Reference rows that one question about outliers shows."""


class Outlier(Value):
    """Whether a text is of another kind than the reference: P(outlier), and the mass of yes and no together.

    `p_outlier` is None where that mass is 0. `shape` is that of the model's passes, as in `Completion`.
    """

    text: str
    p_outlier: float | None
    coverage: float
    escaped: bool = False
    shape: str = ""


class Rating(Value):
    """A text's score: the mean of `distribution`, the probability of each step of the scale.

    `score` is None where no step had any mass. `shape` is that of the model's passes, as in `Completion`.
    """

    text: str
    score: float | None
    distribution: dict[str, float]
    coverage: float
    escaped: bool = False
    shape: str = ""


def classify(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label],
    *,
    instruction: str = prompts.CLASSIFY,
    min_coverage: float = 0.0,
    calibration: Calibration | None = None,
    template: TemplateName | None = "raw",
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Judgment | RowError]:
    """Sort texts into categories, a few or hundreds, each of one word or several.

    The prompt ends where a category is about to follow, and does not list them; all are scored through one
    trie. `fit_calibration` with the same instruction, template and ``show_labels=False`` takes away what the
    model favours whatever the text.

    Args:
        model: From `load_model`.
        texts: What is sorted.
        labels: The categories, at least two.
        instruction: Another prompt, with ``{text}`` where the text stands.
        min_coverage: As `judge`.
        calibration: As `judge`.
        template: ``raw`` goes on with the text; a model's own template suits an instruction that asks.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of texts just judged.

    Returns:
        A `Judgment` for each text, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidLabels, InvalidRequest: As `judge`.
    """
    return judge(
        model,
        texts,
        labels,
        instruction=instruction,
        show_labels=False,
        min_coverage=min_coverage,
        calibration=calibration,
        template=template,
        adapter=adapter,
        progress=progress,
    )


def pairs(firsts: Sequence[str | RowError], seconds: Sequence[str | RowError]) -> list[str | RowError]:
    """Write each pair of sentences as the text that `same_meaning` judges.

    Raises:
        InvalidRequest: If the lists differ in length.
    """
    check_rows("firsts", firsts)

    def pair(first: object, second: object) -> str:
        return prompts.PAIR.format(first=user_text("a sentence", first), second=user_text("a sentence", second))

    return map_rows(pair, firsts, column("seconds", seconds, firsts))


def same_meaning(
    model: LanguageModel,
    firsts: Sequence[str | RowError],
    seconds: Sequence[str | RowError],
    *,
    min_coverage: float = 0.0,
    calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Judgment | RowError]:
    """Judge whether the two sentences of each pair mean the same: ``Yes`` or ``No``.

    Args:
        model: From `load_model`.
        firsts: One sentence of each pair.
        seconds: The other.
        min_coverage: As `judge`.
        calibration: From `fit_calibration` on `pairs`, with ``instruction=prompts.SAME_MEANING``.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of pairs just judged.

    Returns:
        A `Judgment` for each pair, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: If the lists differ in length; as `judge`.
    """
    return judge(
        model,
        pairs(firsts, seconds),
        instruction=prompts.SAME_MEANING,
        min_coverage=min_coverage,
        calibration=calibration,
        template=template,
        adapter=adapter,
        progress=progress,
    )


def outlier_question(reference: Sequence[str]) -> str:
    """Write the instruction by which `is_outlier` shows its reference rows.

    Raises:
        InvalidRequest: For fewer than two reference rows, more than `MOST_REFERENCES`, or one that is blank.
    """
    check_rows("reference", reference)
    if not 2 <= len(reference) <= MOST_REFERENCES:
        raise InvalidRequest(
            f"reference holds 2 to {MOST_REFERENCES} rows of one kind, but got {len(reference)}. Choose some of them."
        )
    for row in reference:
        if not isinstance(row, str) or not row.strip() or prompts.TEXT in row:
            raise InvalidRequest(
                f"a reference row is a text without {prompts.TEXT}, which marks the judged row, but got {row!r:.80}. "
                "Drop it."
            )
    shown = "\n".join(f"- {' '.join(row.split())}" for row in reference)
    return prompts.IS_OUTLIER.replace("{reference}", shown)


def is_outlier(
    model: LanguageModel,
    rows: Sequence[str | RowError],
    reference: Sequence[str],
    *,
    calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Outlier | RowError]:
    """Judge whether each row is of another kind than the reference rows.

    Args:
        model: From `load_model`.
        rows: What is judged.
        reference: 2 to `MOST_REFERENCES` rows of one kind; all prompts begin with them.
        calibration: From `fit_calibration` with ``instruction=outlier_question(reference)``.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of rows just judged.

    Returns:
        An `Outlier` for each row, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: For a reference that shows nothing; as `judge`.
    """
    judged = judge(
        model,
        rows,
        instruction=outlier_question(reference),
        calibration=calibration,
        template=template,
        adapter=adapter,
        progress=progress,
    )

    def outlier(judgment: Judgment) -> Outlier:
        known = judgment.label is not None
        return Outlier(
            text=judgment.text,
            p_outlier=judgment.probabilities["No"] if known else None,
            coverage=judgment.coverage,
            escaped=judgment.escaped,
            shape=judgment.shape,
        )

    return map_rows(outlier, judged)


def rate(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    criterion: str,
    *,
    worst: int = 1,
    best: int = 5,
    calibration: Calibration | None = None,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Rating | RowError]:
    """Rate texts on a scale: the mean of the probabilities of all steps (G-Eval, arXiv 2303.16634, section 2).

    Args:
        model: From `load_model`.
        texts: What is rated.
        criterion: What counts, such as ``How fluent is this text?``.
        worst: The lowest step.
        best: The highest step; at most 100 steps above it.
        calibration: From `fit_calibration` with ``instruction=rating_question(criterion, worst, best)``, the
            steps as labels, and ``show_labels=False``.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of texts just rated.

    Returns:
        A `Rating` for each text, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidRequest: For a scale that is none; as `judge`.
    """
    instruction = rating_question(criterion, worst, best)
    judged = judge(
        model,
        texts,
        [str(step) for step in range(worst, best + 1)],
        instruction=instruction,
        show_labels=False,
        calibration=calibration,
        template=template,
        adapter=adapter,
        progress=progress,
    )

    def rating(judgment: Judgment) -> Rating:
        mean = sum(int(step) * share for step, share in judgment.probabilities.items())
        return Rating(
            text=judgment.text,
            score=None if judgment.label is None else mean,
            distribution=judgment.probabilities,
            coverage=judgment.coverage,
            escaped=judgment.escaped,
            shape=judgment.shape,
        )

    return map_rows(rating, judged)


def rating_question(criterion: str, worst: int = 1, best: int = 5) -> str:
    """Write the instruction by which `rate` asks.

    Raises:
        InvalidRequest: For a criterion that says nothing, or a scale that is none.
    """
    if not isinstance(criterion, str) or not criterion.strip():
        raise InvalidRequest(f"criterion says what counts, but got {criterion!r:.80}. Ask something.")
    if not isinstance(worst, int) or not isinstance(best, int) or not 0 <= worst < best <= worst + 100:
        raise InvalidRequest(f"a scale runs from worst up to best, but got {worst!r} to {best!r}. Use 1 to 5.")
    return prompts.RATE.format(criterion=criterion, text=prompts.TEXT, worst=worst, best=best)
