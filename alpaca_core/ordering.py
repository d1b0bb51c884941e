"""The order of the labels that a prompt names: what it changes, and whether to name them at all."""

from collections.abc import Sequence
from typing import Unpack

import numpy

from alpaca_core.asking import LETTERS, Asking, Question
from alpaca_core.calibration import Calibration, check_calibration
from alpaca_core.errors import InvalidRequest
from alpaca_core.fitting import fit_calibration
from alpaca_core.measuring import Estimate
from alpaca_core.model import LanguageModel, RowError
from alpaca_core.rows import Progress, check_rows
from alpaca_core.spec import YES_NO, Label, Value

RESAMPLES = 1_000
"""Sets of rows drawn for the interval of a flip rate."""


class OrderEffect(Value):
    """What the order of the labels in the prompt does to judgments.

    Args:
        n: Rows that could be judged in every rotation of the labels; `failed` could not.
        flip_rate: Share of the other rotations in which a row gets another label than in the order given:
            the mean over rows, with its 95 % bootstrap interval.
        unstable: Share of rows that do not get the same label in every rotation.
        by_place: For each place among the labels, the share of all judgments that went to what stood there;
            one over the number of labels where order changes nothing.
    """

    n: int
    failed: int
    flip_rate: Estimate
    unstable: float
    by_place: tuple[float, ...]


def measure_order(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label] = YES_NO,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **question: Unpack[Question],
) -> OrderEffect:
    """Measure how often a judgment depends on the order in which the prompt names the labels.

    Each text is judged in every rotation of the labels, as `judge` would with the labels in that order.

    Args:
        model: From `load_model`.
        texts: What is judged.
        labels: As `judge`; the prompt names them.
        calibration: From `fit_calibration`, for the order given. What ``pride`` takes away belongs to a place, and
            goes with the place in other rotations; what other methods take away belongs to a label.
        seed: Of the interval.
        progress: Called with the number of texts just read; a rotation is a part of one.
        question: As `judge`; `rotate_labels` would leave no order to measure.

    Raises:
        InvalidRequest: If the prompt names no labels, no text could be judged, or as `judge`.
    """
    check_rows("texts", texts)
    asking = Asking(model, labels, **question)
    if asking.rotates or not asking.shows_labels:
        raise InvalidRequest(
            "an order is measured of labels that the prompt names, but this question names none, or rotates them. "
            "Use show_labels=True or letters=True; otherwise no order can matter."
        )
    check_calibration(calibration, asking.binding())
    found = asking.turned_log_masses(texts, asking.adapter, progress)
    judged = [turns for turns in found if not isinstance(turns, RowError)]
    if not judged:
        raise InvalidRequest(f"measuring needs a row that can be judged, but all {len(found):,} failed. Mend the rows.")
    count = len(asking.labels)
    chosen = numpy.array([[_chosen(turn, masses, calibration) for turn, masses in enumerate(row)] for row in judged])
    flips = (chosen[:, 1:] != chosen[:, :1]).mean(1)
    places = (chosen - numpy.arange(count)) % count  # in turn k, label k stands first
    return OrderEffect(
        n=len(judged),
        failed=len(found) - len(judged),
        flip_rate=_mean(flips, seed),
        unstable=float((flips > 0).mean()),
        by_place=tuple((numpy.bincount(places.ravel(), minlength=count) / places.size).tolist()),
    )


class Display(Value):
    """How a prompt should name the labels, and the calibration that goes with it.

    Args:
        show_labels: As `judge`.
        letters: As `judge`.
        calibration: Fitted for that way of asking.
        considered: Cross-validated mean negative log-likelihood of each way, in nats, by its name: ``hidden``,
            ``names``, ``letters``.
    """

    show_labels: bool
    letters: bool
    calibration: Calibration
    considered: dict[str, float]


def fit_display(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label],
    gold: Sequence[str],
    *,
    progress: Progress | None = None,
    **question: Unpack[Question],
) -> Display:
    """Choose on labelled rows whether the prompt names the labels, and whether it gives them letters.

    Each way gets the calibration that `fit_calibration` picks for it; the one with the lowest cross-validated
    negative log-likelihood wins.

    Args:
        model: From `load_model`.
        texts: Like those that will be judged.
        labels: As `judge`.
        gold: The name of the right label of each text.
        progress: Called with the number of texts just read; each way is a part of one.
        question: As `judge`, without `show_labels` and `letters`, which are chosen.

    Raises:
        InvalidLabels, InvalidRequest: As `fit_calibration`; if `show_labels` or `letters` is given.
    """
    check_rows("texts", texts)
    if given := {"show_labels", "letters"} & question.keys():
        raise InvalidRequest(
            f"fit_display chooses show_labels and letters, but got {', '.join(given)}. Leave them out."
        )
    ways = {"hidden": (False, False), "names": (True, False), "letters": (True, True)}
    if len(labels) > len(LETTERS):
        del ways["letters"]
    if question.get("rotate_labels"):
        del ways["hidden"]
    share = 1 / len(ways)
    fitted: dict[str, Calibration] = {}
    part = progress and (lambda done: progress(done * share))
    for way, (show_labels, letters) in ways.items():
        asked: Question = {**question, "show_labels": show_labels, "letters": letters}
        fitted[way] = fit_calibration(model, texts, labels, gold, progress=part, **asked)
    considered = {way: calibration.nll for way, calibration in fitted.items() if calibration.nll is not None}
    best = min(considered, key=considered.__getitem__)
    show_labels, letters = ways[best]
    return Display(show_labels=show_labels, letters=letters, calibration=fitted[best], considered=considered)


def _chosen(turn: int, masses: Sequence[float], calibration: Calibration | None) -> int:
    """The number of the label that a row gets in one rotation."""
    if calibration is None:
        scores: Sequence[float] = masses
    elif calibration.method == "pride":
        bias = calibration.bias[-turn:] + calibration.bias[:-turn] if turn else calibration.bias
        scores = calibration.model_copy(update={"bias": bias}).apply(masses)
    else:
        scores = calibration.apply(masses)
    return max(range(len(scores)), key=scores.__getitem__)


def _mean(values: "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]", seed: int) -> Estimate:
    from scipy.stats import bootstrap

    mean = float(values.mean())
    if len(values) < 2 or values.min() == values.max():
        return Estimate(value=mean)
    found = bootstrap((values,), numpy.mean, n_resamples=RESAMPLES, method="percentile", rng=seed)
    return Estimate(value=mean, low=float(found.confidence_interval.low), high=float(found.confidence_interval.high))
