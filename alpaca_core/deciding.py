"""Decide by confidence: accept a judgment, send it to a person, or abstain, at a precision that holds.

The threshold comes from tests in a fixed sequence, as in Learn then Test (Angelopoulos et al. 2021, arXiv
2110.01052), by the exact bound of Clopper and Pearson 1934. SGR (Geifman & El-Yaniv 2017, 1705.08500) is kin.
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
from alpaca_core.spec import Value, check_kind

STEPS_PER_DOUBLING = 16
"""Each step is at most 4.4 % larger than the one before: 2 to the power of 1/16."""

Action = Literal["accept", "review", "abstain"]


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

    def check(self, *calibrations: str | None) -> None:
        """Refuse judgments of other calibrations than the policy's, named by digest; None is none.

        Raises:
            InvalidRequest: With both.
        """
        if others := set(calibrations) - {self.calibration}:
            raise InvalidRequest(
                f"this policy is for judgments of the calibration {_named({self.calibration})}, but got some of "
                f"{_named(others)}. Calibrate them alike, or fit a policy on them."
            )


class Decision(Value):
    """What to do with a judgment, its label, and its confidence: the top probability."""

    action: Action
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

    `find_threshold` says how, and why the statement holds. It is about rows drawn like these ones and judged
    alike, and about one policy: it is void where the best of many is kept, or where these rows chose the
    prompt, the model or the calibration. Fit those on other rows.

    Args:
        judgments: From `judge`. Rows that failed are left out; a judgment without a label is never accepted.
        gold: The right label of each row, spelt as the judgments spell it.
        precision: Share of right labels asked for among accepted judgments, above 0 and below 1.
        confidence: Of the statement, above 0 and below 1.
        review: Passed on to the policy, from 0 to 1.

    Raises:
        InvalidRequest: For settings out of range, lists that differ in length, an unknown gold label, mixed
            calibrations, or so few rows that nothing could pass.
    """
    for name, value in (("precision", precision), ("confidence", confidence)):
        if not isinstance(value, int | float) or not 0.0 < value < 1.0:
            raise InvalidRequest(f"{name} lies above 0 and below 1, but got {value!r:.80}. Use 0.9 to 0.99.")
    if not isinstance(review, int | float) or not 0.0 <= review <= 1.0:
        raise InvalidRequest(f"review lies between 0 and 1, but got {review!r:.80}. Use 0 to review every other row.")
    if len(calibrations := _calibrations(judgments)) > 1:
        raise InvalidRequest(
            f"a policy is for judgments of one calibration, but these have {_named(calibrations)}. Fit one for each."
        )
    judged = [
        (judgment, _checked(label, judgment, row))
        for row, (judgment, label) in enumerate(zip(judgments, column("gold", gold, judgments), strict=True))
        if isinstance(judgment, Judgment)
    ]
    labelled = [(_confidence(row), row.label == label) for row, label in judged if row.label is not None]
    if len(labelled) < (needed := rows_needed(precision, confidence)):
        raise InvalidRequest(
            f"precision {precision} at confidence {confidence} needs at least {needed:,} judgments with a label, all "
            f"of them right, but got {len(labelled):,}. Label more rows, or ask for less."
        )
    found = find_threshold(labelled, precision, confidence)
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
        InvalidRequest: For judgments of another calibration than the policy's, or what is no policy.
    """
    remedy = "Fit one with fit_policy, or read its JSON with Policy.model_validate."
    check_kind("policy", policy, Policy, remedy).check(*_calibrations(judgments))

    def decision(judgment: Judgment) -> Decision:
        confidence = _confidence(judgment)
        action: Action = "review" if confidence >= policy.review else "abstain"
        if policy.accept is not None and confidence >= policy.accept:
            action = "accept"
        if judgment.label is None:
            action = "abstain"
        return Decision(action=action, label=judgment.label, confidence=confidence)

    return map_rows(decision, judgments)


def find_threshold(rows: Sequence[tuple[float, bool]], precision: float, confidence: float) -> Threshold:
    """Return the lowest confidence to accept from that `precision` can be stated for.

    Steps are sizes: the n most confident rows, for the sizes of `_steps`, which follow from the number of rows
    and the settings alone. They are walked from the strictest down. A step passes where the lower bound of its
    precision, at its level, is at least `precision`; its level then goes on to the next step, and is lost
    otherwise. ``1 - confidence`` is shared evenly among the starts. The last step that passes is the answer
    (fallback procedure: Wiens 2003, Pharmaceutical Statistics 2:211).

    Why that holds for rows drawn independently from one source, whatever the judge, where no two confidences tie:

    - Given the confidence t of row n + 1, the n rows above it are a random sample of all rows above t, so the
      number of right ones is binomial. The threshold lies directly above t.
    - Call a step false where its true precision is below `precision`. Which steps are, follows from how many
      rows lie above each confidence at which the true precision crosses `precision`. Between two crossings it
      is exactly `precision`, so given these numbers a false step still passes with at most its level.
    - A false step's level was collected since the false step before it, so all of them together pass with at
      most ``1 - confidence``, whether or not precision rises with confidence.

    A grid of confidences of which those with too few rows are skipped would not have this proof: where the walk
    begins then says something about the precision below. Tied rows stay together, so a step may take more rows
    than its size, and the proof is no longer exact; 1,858 searches for the worst such world found none in which
    more than 0.9 times ``1 - confidence`` of the policies were wrong.

    Args:
        rows: Confidence of each row, and whether its label is the right one; at least one, in any order.
        precision: Asked for.
        confidence: Of the statement.
    """
    rising = sorted(row[0] for row in rows)
    right = list(accumulate(int(row[1]) for row in sorted(rows, reverse=True)))  # among the n + 1 most confident
    found, level = Threshold(None, 0, 0.0), 0.0
    for size, share in _steps(len(rows), rows_needed(precision, confidence)):
        level += share * (1.0 - confidence)
        below = bisect_left(rising, rising[-size])  # rows less confident than the step's last one
        accepted = len(rows) - below
        bound = lower_bound(right[accepted - 1], accepted, level)
        if bound >= precision:
            found = Threshold(math.nextafter(rising[below - 1], math.inf) if below else 0.0, accepted, bound)
        else:
            level = 0.0
    return found


def _steps(rows: int, needed: int) -> Iterator[tuple[int, float]]:
    """Yield the sizes of the steps, smallest first, and the share of the level that each gets by itself.

    Starts are all rows, half of them, a quarter … down to twice the rows that could pass at all, or that many
    where half is less: few, since they share the level, yet no early unlucky step shall end it all.
    """
    doublings = max((rows // (2 * needed)).bit_length() - 1, int(rows > 2 * needed))
    smallest = min(max(2 * needed, rows / 2**doublings), rows)
    steps = doublings * STEPS_PER_DOUBLING
    for step in range(steps + 1):
        share = 1 / (doublings + 1) if step % STEPS_PER_DOUBLING == 0 else 0.0
        yield round(smallest * (rows / smallest) ** (step / max(steps, 1))), share


def lower_bound(right: int, rows: int, level: float) -> float:
    """Return the one-sided lower Clopper-Pearson bound: where `right` or more of `rows` have probability `level`."""
    from scipy import special

    return float(special.betaincinv(right, rows - right + 1, level)) if right and level else 0.0


def rows_needed(precision: float, confidence: float) -> int:
    """Return the smallest n with ``precision**n <= 1 - confidence``: n rows, all right, prove `precision`."""
    return max(1, math.ceil(round(math.log1p(-confidence) / math.log(precision), 9)))


def _confidence(judgment: Judgment) -> float:
    return min(max(judgment.probabilities.values(), default=0.0), 1.0)


def _checked(label: object, judgment: Judgment, row: int) -> object:
    if not isinstance(label, str) or label not in judgment.probabilities:
        known = ", ".join(repr(name) for name in judgment.probabilities)
        raise InvalidRequest(
            f"gold names a label of its row ({known:.200}), but row {row} has {label!r:.80}. Spell it alike."
        )
    return label


def _calibrations(judgments: Sequence[object]) -> set[str | None]:
    check_rows("judgments", judgments)
    for row, each in enumerate(judgments):
        if not isinstance(each, Judgment | RowError):
            raise InvalidRequest(f"judgments come from judge, but row {row} is {each!r:.80}. Judge the text first.")
    return {judgment.calibration for judgment in judgments if isinstance(judgment, Judgment)}


def _named(calibrations: set[str | None]) -> str:
    return ", ".join(sorted("none" if each is None else repr(each) for each in calibrations))
