"""Decide by confidence: accept a judgment, send it to a person, or abstain, at a precision that holds.

The threshold is found by testing a fixed sequence of steps, as in Learn then Test (Angelopoulos et al. 2021,
arXiv 2110.01052, fixed sequence testing with several starts), each by the exact binomial bound of Clopper and
Pearson 1934. A relative is selection with guaranteed risk (Geifman & El-Yaniv 2017, arXiv 1705.08500).
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from pydantic import Field

from alpaca_core.errors import InvalidRequest
from alpaca_core.judging import Judgment
from alpaca_core.model import RowError
from alpaca_core.rows import check_rows, column, map_rows
from alpaca_core.spec import Value

STEPS_PER_DOUBLING = 16
"""Each step accepts 4.4 % more rows than the one before: 2 to the power of 1/16."""


class Policy(Value):
    """From which confidence on a judgment is accepted or reviewed, and what holds for the accepted ones.

    Confidence is a judgment's top probability. The statement: with probability `confidence` over the
    labelled rows, at least the share `precision` of the judgments that the policy accepts is right.

    Args:
        accept: Confidence from which a judgment is accepted; None where none can be at that precision.
        review: Confidence from which a judgment that is not accepted goes to a person; below it the row abstains.
        precision: Share of right labels among accepted judgments, asked for.
        confidence: Of the statement.
        rows: Labelled rows that were judged; those without a label count, those that failed do not.
        accepted: How many of them the policy accepts.
        bound: Lower Clopper-Pearson bound of their precision, at the level that their step was tested at:
            at least `precision`, or 0 where none is accepted.
        calibration: Digest of the calibration that the judgments had; None for none.

    Raises:
        pydantic.ValidationError: For values out of range.
    """

    accept: float | None = Field(ge=0.0, le=1.0)
    review: float = Field(default=0.0, ge=0.0, le=1.0)
    precision: float = Field(gt=0.0, lt=1.0)
    confidence: float = Field(gt=0.0, lt=1.0)
    rows: int = Field(ge=1)
    accepted: int = Field(ge=0)
    bound: float = Field(ge=0.0, le=1.0)
    calibration: str | None = None


class Decision(Value):
    """What to do with a judgment, its label, and its confidence: the top probability."""

    action: Literal["accept", "review", "abstain"]
    label: str | None
    confidence: float


class Threshold(NamedTuple):
    """A confidence to accept from, how many of the rows that were tested it accepts, and their bound."""

    accept: float | None
    accepted: int
    bound: float


def fit_policy(
    judgments: Sequence[Judgment | RowError],
    gold: Sequence[str],
    *,
    precision: float = 0.9,
    confidence: float = 0.95,
    review: float = 0.0,
) -> Policy:
    """Find the lowest confidence from which judgments are right often enough, on rows whose labels are known.

    `find_threshold` says how, and why the statement holds. It is about rows drawn like these ones, by the
    same model, prompt and labels, and about one policy: fitting many and keeping the best voids it.

    Args:
        judgments: From `judge`. Rows that failed are left out; a judgment without a label is never accepted.
        gold: The right label of each row, spelt as the judgments spell it.
        precision: Share of right labels asked for among accepted judgments, above 0 and below 1.
        confidence: Of the statement, above 0 and below 1.
        review: Passed on to the policy, from 0 to 1.

    Raises:
        InvalidRequest: For settings out of range, lists that differ in length, an unknown gold label, judgments
            of different calibrations, or so few rows that nothing could pass.
    """
    for name, value in (("precision", precision), ("confidence", confidence)):
        if not isinstance(value, int | float) or not 0.0 < value < 1.0:
            raise InvalidRequest(f"{name} lies above 0 and below 1, but got {value!r:.80}. Use 0.9 to 0.99.")
    if not isinstance(review, int | float) or not 0.0 <= review <= 1.0:
        raise InvalidRequest(f"review lies between 0 and 1, but got {review!r:.80}. Use 0 to review every other row.")
    calibrations = _calibrations(judgments)
    if len(calibrations) > 1:
        raise InvalidRequest(
            f"a policy is for judgments of one calibration, but these have {_named(calibrations)}. Fit one for each."
        )
    judged = [
        (judgment, _checked(label, judgment, row))
        for row, (judgment, label) in enumerate(zip(judgments, column("gold", gold, judgments), strict=True))
        if isinstance(judgment, Judgment)
    ]
    labelled = [(judgment, label) for judgment, label in judged if judgment.label is not None]
    needed = rows_needed(precision, confidence)
    if len(labelled) < needed:
        raise InvalidRequest(
            f"precision {precision} at confidence {confidence} needs at least {needed:,} judgments with a label, all "
            f"of them right, but got {len(labelled):,}. Label more rows, or ask for less."
        )
    found = find_threshold(
        [_confidence(judgment) for judgment, _ in labelled],
        [judgment.label == label for judgment, label in labelled],
        precision,
        confidence,
    )
    return Policy(
        **found._asdict(),
        review=review,
        precision=precision,
        confidence=confidence,
        rows=len(judged),
        calibration=next(iter(calibrations)),
    )


def decide(judgments: Sequence[Judgment | RowError], policy: Policy) -> list[Decision | RowError]:
    """Accept, review or abstain from each judgment. A judgment without a label abstains.

    Returns:
        A `Decision` for each judgment, in order; a `RowError` stays what it is.

    Raises:
        InvalidRequest: For judgments of another calibration than the policy's.
    """
    if others := _calibrations(judgments) - {policy.calibration}:
        raise InvalidRequest(
            f"this policy is for judgments of the calibration {_named({policy.calibration})}, but got some of "
            f"{_named(others)}. Calibrate them alike, or fit a policy on them."
        )

    def decision(judgment: Judgment) -> Decision:
        confidence = _confidence(judgment)
        action: Literal["accept", "review", "abstain"] = "abstain"
        if judgment.label is not None and policy.accept is not None and confidence >= policy.accept:
            action = "accept"
        elif judgment.label is not None and confidence >= policy.review:
            action = "review"
        return Decision(action=action, label=judgment.label, confidence=confidence)

    return map_rows(decision, judgments)


def find_threshold(
    confidences: Sequence[float], right: Sequence[bool], precision: float, confidence: float
) -> Threshold:
    """Return the lowest confidence to accept from that `precision` can be stated for.

    Steps are sizes, not confidences: the n most confident rows, for the sizes of `_steps`, which follow from
    the number of rows and the settings alone. They are walked from the strictest down. A step passes where
    the lower bound of its precision at its level is at least `precision`; it then hands its level to the
    next, and otherwise the level is lost. `1 - confidence` is shared evenly among the starts. The last step
    that passed is the answer (fallback procedure: Wiens 2003, Pharmaceutical Statistics 2:211).

    Why it holds, for rows drawn independently from one source and confidences without ties:

    - Given the confidence t of row n + 1, the n rows above are a random sample of all rows above t, so their
      number of right ones is binomial. The threshold lies directly above t. A threshold fixed in advance would
      do as well, but skipping those with few rows would not: how many rows lie above each is no longer
      ancillary for the precision above the last.
    - Which steps are false (their true precision is below) follows from the numbers of rows above each
      confidence at which the true precision crosses `precision`. Between two crossings the precision is
      exactly `precision`, so given those numbers every false step still passes with at most its level.
    - A false step passes with a level collected since the false step before it, so all together have at most
      ``1 - confidence`` (FWER), whether or not precision rises with confidence.

    Tied rows stay together: a step takes all rows of its last confidence. The argument is then no longer exact;
    in thousands of worlds searched for the worst, the error stayed below ``1 - confidence``. Rows may also be
    taken as given: the statement then is about the mean chance of being right at these confidences.

    Args:
        confidences: Of the rows, in any order; at least one.
        right: Whether each row's label is the right one.
        precision: Asked for.
        confidence: Of the statement.
    """
    rows, rising = len(confidences), sorted(confidences)
    ranked = sorted(zip(confidences, right, strict=True), key=lambda pair: -pair[0])
    correct = list(accumulate(int(each) for _, each in ranked))
    found = Threshold(None, 0, 0.0)
    level = 0.0
    for size, share in _steps(rows, rows_needed(precision, confidence)):
        level += share * (1.0 - confidence)
        below = bisect_left(rising, rising[rows - size])  # rows less confident than the step's last one
        bound = lower_bound(correct[rows - below - 1], rows - below, level)
        if bound >= precision:
            found = Threshold(math.nextafter(rising[below - 1], math.inf) if below else 0.0, rows - below, bound)
        else:
            level = 0.0
    return found


def _steps(rows: int, needed: int) -> Iterator[tuple[int, float]]:
    """Yield the sizes of the steps, smallest first, and the share of the level that each gets by itself.

    Starts are all rows, half of them, a quarter …, down to twice the rows that could pass at all: few starts,
    since they share the level, yet one early unlucky step does not stop the walk.
    """
    doublings = max((rows // (2 * needed)).bit_length() - 1, 0)
    for step in range(doublings * STEPS_PER_DOUBLING, -1, -1):
        starts = step % STEPS_PER_DOUBLING == 0
        yield math.ceil(rows / 2 ** (step / STEPS_PER_DOUBLING)), starts / (doublings + 1)


def lower_bound(right: int, rows: int, level: float) -> float:
    """Return the one-sided lower Clopper-Pearson bound: where `right` or more of `rows` have probability `level`."""
    from scipy import special  # type: ignore[import-untyped]

    return float(special.betaincinv(right, rows - right + 1, level)) if right and level else 0.0


def rows_needed(precision: float, confidence: float) -> int:
    """Return the smallest n with ``precision**n <= 1 - confidence``: n rows, all right, prove `precision`."""
    return max(1, math.ceil(round(math.log1p(-confidence) / math.log(precision), 9)))


def _confidence(judgment: Judgment) -> float:
    return min(max(judgment.probabilities.values()), 1.0)


def _checked(label: object, judgment: Judgment, row: int) -> object:
    if not isinstance(label, str) or label not in judgment.probabilities:
        known = ", ".join(repr(name) for name in judgment.probabilities)
        raise InvalidRequest(
            f"gold holds one of a row's labels ({known:.200}), but row {row} has {label!r:.80}. Mend it."
        )
    return label


def _calibrations(judgments: Sequence[object]) -> set[str | None]:
    check_rows("judgments", judgments)
    for row, judgment in enumerate(judgments):
        if not isinstance(judgment, Judgment | RowError):
            raise InvalidRequest(f"judgments come from judge, but row {row} is {judgment!r:.80}. Judge the text first.")
    return {getattr(judgment, "calibration", None) for judgment in judgments if isinstance(judgment, Judgment)}


def _named(calibrations: set[str | None]) -> str:
    return ", ".join(sorted("none" if each is None else repr(each) for each in calibrations))
