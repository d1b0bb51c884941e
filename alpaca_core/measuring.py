"""Measure judgments against labelled rows: how often they are right, how far their probabilities can be trusted."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
from numpy.typing import NDArray

from alpaca_core.bootstrap import Floats, Rows, Weighted, calibrated_errors, draw
from alpaca_core.errors import InvalidRequest
from alpaca_core.judging import Judgment
from alpaca_core.model import RowError
from alpaca_core.rows import check_rows, column
from alpaca_core.spec import Value

CALIBRATED_DRAWS = 1000
"""Simulated judges behind `Measurement.ece_if_calibrated`."""

HISTOGRAM_BARS = 20
"""Bars of `Measurement.histogram`, from confidence 0 to 1."""

DIAGRAMS = (".svg", ".png")
"""What `reliability_diagram` writes, by the end of its path."""

COVERAGE_QUANTILES = (5, 25, 50, 75, 95)
"""Quantiles of `Measurement.coverage`, in percent."""


class Estimate(Value):
    """A value and its 95 % interval; None where it is undefined, or where no interval was asked for."""

    value: float | None
    low: float | None = None
    high: float | None = None


class ReliabilityBin(Value):
    """Rows of like confidence: how many, their mean confidence, and their accuracy with its Wilson interval."""

    n: int
    confidence: float
    accuracy: Estimate


class Measurement(Value):
    """How good judgments are. Every measure is over the `n` rows with a label; `answered` says how many lack one.

    Confidence is the probability of the row's label. Intervals are percentiles of one bootstrap over all rows,
    of the resamples that define the measure, and None if fewer than half do. They are too narrow for a
    handful of rows, and have no width where all rows are alike; the Wilson intervals of `reliability` have.

    Args:
        n: Rows with a label. With `failed`, those that are a `RowError`, and `abstained`, those whose label is
            None, they make up all rows.
        answered: `n` as a share of all rows.
        accuracy: Share of the `n` rows whose label is right.
        macro_f1: Mean F1 of the labels that occur among the right or the given ones.
        brier: Mean over rows of the sum over labels of (probability - 1 if right else 0)², 0 to 2 (Brier 1950).
        nll: Mean of -ln probability of the right label, in nats; `NLL_FLOOR` bounds it.
        auroc: Area under the ROC curve: of the first label's probability if there are two labels, and the mean
            over labels, each against the rest, if more. None where a label is right for no row or every row.
        aurc: Area under the risk-coverage curve: the mean error rate of the k most confident rows, over
            k = 1 … n (Geifman & El-Yaniv 2017, arXiv 1705.08500). Equal confidences come in random order: the mean.
        ece: Expected calibration error of the given label, over bins that hold equally many rows; rows of equal
            confidence share a bin (Naeini 2015; Nixon 2019, arXiv 1904.01685). It is above 0 even for a calibrated
            judge, and resampling raises it again, so percentiles would lie above the truth: its interval
            ends at the upper percentile and begins as far below the value, or at 0 where 2.5 % of simulated
            calibrated judges show more. It held the truth in 91 to 98 % of simulations, from 50 to 1,000 rows.
        ece_if_calibrated: Mean `ece` of a perfectly calibrated judge with these confidences and bins.
        coverage: Quantiles of the judgments' coverage, ``5%`` to ``95%``, those that abstain included.
        reliability: The bins of `ece`, from the least confident; none is empty.
        histogram: Rows by confidence, in bars of equal width from 0 to 1.
    """

    n: int
    failed: int
    abstained: int
    answered: Estimate
    accuracy: Estimate
    macro_f1: Estimate
    brier: Estimate
    nll: Estimate
    auroc: Estimate
    aurc: Estimate
    ece: Estimate
    ece_if_calibrated: float
    coverage: dict[str, float]
    reliability: tuple[ReliabilityBin, ...]
    histogram: tuple[int, ...]


def measure(
    judgments: Sequence[Judgment | RowError],
    gold: Sequence[str],
    *,
    bins: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> Measurement:
    """Measure judgments against the right labels, with 95 % intervals.

    Args:
        judgments: From `judge`, all with the same labels.
        gold: The right label of each row, by its name.
        bins: Of the calibration error.
        resamples: Sets of rows drawn for the intervals; 0 gives none.
        seed: Of the resamples and the simulated calibrated judge.

    Raises:
        InvalidRequest: If the lists differ in length, labels differ between rows, a right label is none of
            them, no row has a label, or a setting is out of range.

    Example:
        >>> from alpaca_core.judging import judge
        >>> from alpaca_core.testing import FakeModel
        >>> judgments = judge(FakeModel({"Paris": {"Yes": 0.9, "No": 0.1}}), ["Is Paris in France?"])
        >>> measure(judgments, ["Yes"]).accuracy.value
        1.0
    """
    for name, setting, least in (("bins", bins, 1), ("resamples", resamples, 0), ("seed", seed, 0)):
        if not isinstance(setting, int) or setting < least:
            raise InvalidRequest(f"{name} is a whole number from {least}, but got {setting!r:.80}. Leave its default.")
    judged, rows = _checked(judgments, gold)
    weighted = Weighted(rows, bins)
    one = numpy.ones((rows.n, 1))
    bin_of = weighted.bins_of(one)[weighted.group, 0]
    random, simulation = numpy.random.default_rng(seed).spawn(2)
    calibrated = calibrated_errors(rows, bin_of, bins, CALIBRATED_DRAWS, simulation)
    estimates = _estimates(rows, weighted, one, draw(len(judgments), rows.n, resamples, random), len(judgments))
    estimates["ece"] = _mirrored(estimates["ece"], calibrated)
    quantiles = numpy.percentile([judgment.coverage for judgment in judged], COVERAGE_QUANTILES)
    histogram, _ = numpy.histogram(rows.confidence.clip(max=1.0), HISTOGRAM_BARS, (0.0, 1.0))
    return Measurement(
        n=rows.n,
        failed=len(judgments) - len(judged),
        abstained=len(judged) - rows.n,
        **estimates,
        ece_if_calibrated=float(calibrated.mean()),
        coverage={f"{q}%": float(value) for q, value in zip(COVERAGE_QUANTILES, quantiles, strict=True)},
        reliability=tuple(_reliability(rows, bin_of == place) for place in numpy.unique(bin_of)),
        histogram=tuple(histogram.tolist()),
    )


def _checked(judgments: Sequence[Judgment | RowError], gold: Sequence[str]) -> tuple[list[Judgment], Rows]:
    """The rows that are no `RowError`, and of these the ones that have a label, as arrays."""
    check_rows("judgments", judgments)
    golds = column("gold", gold, judgments)
    judged: list[Judgment] = []
    answered: list[tuple[int, int, list[float]]] = []  # place, number of the given label, probabilities
    numbers: dict[str, int] = {}
    for place, judgment in enumerate(judgments):
        if isinstance(judgment, RowError):
            continue
        if not isinstance(judgment, Judgment):
            raise InvalidRequest(f"judgments come from judge, but row {place} is {judgment!r:.80}. Drop it.")
        numbers = numbers or {name: number for number, name in enumerate(judgment.probabilities)}
        if judgment.probabilities.keys() != numbers.keys():
            raise InvalidRequest(
                f"all rows have the same labels, but row {place} has {list(judgment.probabilities)!r:.80} after "
                f"{list(numbers)!r:.80}. Measure them apart."
            )
        shares = [judgment.probabilities[name] for name in numbers]
        if min(shares, default=-1.0) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise InvalidRequest(f"probabilities sum to 1, but row {place} has {shares!r:.80}. Divide by their sum.")
        judged.append(judgment)
        if judgment.label is not None:
            answered.append((place, _number(numbers, "label", judgment.label, place), shares))
    right = [_number(numbers, "right label", name, place) for place, name in enumerate(golds) if numbers]
    if not answered:
        raise InvalidRequest(
            f"measuring needs a row with a label, but of {len(judgments):,} rows {len(judgments) - len(judged):,} "
            f"failed and {len(judged):,} abstained. Lower min_coverage, or mend the rows."
        )
    places, chosen, probabilities = zip(*answered, strict=True)
    return judged, Rows([right[place] for place in places], chosen, probabilities)


def _number(numbers: dict[str, int], role: str, name: object, place: int) -> int:
    if not isinstance(name, str) or name not in numbers:
        raise InvalidRequest(
            f"a {role} is one of the judged labels, {list(numbers)!r:.200}, but row {place} has {name!r:.80}. "
            "Use a label's name, letter by letter."
        )
    return numbers[name]


def _estimates(
    rows: Rows, weighted: Weighted, one: Floats, resamples: Iterable[Floats], all_rows: int
) -> dict[str, Estimate]:
    values = {name: float(value[0]) for name, value in weighted.measures(one).items()}
    values |= {"answered": rows.n / all_rows} | _by_sklearn(rows)
    drawn: dict[str, list[Floats]] = {name: [] for name in values}
    for weights in resamples:
        for name, found in (weighted.measures(weights) | {"answered": weights.sum(axis=0) / all_rows}).items():
            drawn[name].append(found)
    return {name: _estimate(value, numpy.concatenate([[], *drawn[name]])) for name, value in values.items()}


def _by_sklearn(rows: Rows) -> dict[str, float]:
    """The values of those measures that are more than a mean; resamples of them come from `Weighted`."""
    from sklearn.metrics import f1_score, roc_auc_score

    counts = numpy.bincount(rows.gold, minlength=rows.labels)
    if min(counts) == 0 or rows.labels == 1:
        area = math.nan
    elif rows.labels == 2:
        area = roc_auc_score(rows.gold == 0, rows.probabilities[:, 0])
    else:
        area = roc_auc_score(rows.gold, rows.probabilities, multi_class="ovr", average="macro")
    f1 = f1_score(rows.gold, rows.chosen, average="macro", zero_division=0)
    return {"macro_f1": float(f1), "auroc": float(area)}


def _estimate(value: float, drawn: Floats) -> Estimate:
    if math.isnan(value):
        return Estimate(value=None)
    defined = drawn[~numpy.isnan(drawn)]
    if len(defined) == 0 or 2 * len(defined) < len(drawn):
        return Estimate(value=value)
    low, high = numpy.percentile(defined, (2.5, 97.5))
    return Estimate(value=value, low=float(low), high=float(high))


def _mirrored(ece: Estimate, calibrated: Floats) -> Estimate:
    """The interval of the calibration error, as `Measurement` defines it."""
    if ece.value is None or ece.high is None:
        return ece
    high = max(ece.value, ece.high)
    within = ece.value <= numpy.percentile(calibrated, 97.5)
    return Estimate(value=ece.value, low=0.0 if within else max(2 * ece.value - high, 0.0), high=high)


def _reliability(rows: Rows, here: NDArray[numpy.bool_]) -> ReliabilityBin:
    from scipy.stats import binomtest

    n, right = int(here.sum()), int(rows.correct[here].sum())
    interval = binomtest(right, n).proportion_ci(method="wilson")
    accuracy = Estimate(value=right / n, low=float(interval.low), high=float(interval.high))
    return ReliabilityBin(n=n, confidence=float(rows.confidence[here].mean()), accuracy=accuracy)


def reliability_diagram(measurement: Measurement, path: str | Path) -> Path:
    """Draw accuracy against confidence: the bins with their intervals over a histogram of all confidences.

    Args:
        measurement: From `measure`.
        path: Where the picture goes, a ``.svg`` or ``.png``; its folder is made.

    Returns:
        The path.

    Raises:
        InvalidRequest: For another suffix.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    path = Path(path)
    if path.suffix.lower() not in DIAGRAMS:
        raise InvalidRequest(f"a diagram is a .svg or a .png, but path ends in {path.suffix!r}. Rename it.")
    bins, ece, bars = measurement.reliability, measurement.ece, len(measurement.histogram)
    right, low, high = ([getattr(each.accuracy, name) for each in bins] for name in ("value", "low", "high"))
    sure = [each.confidence for each in bins]
    first = next(bar for bar, rows in enumerate(measurement.histogram) if rows) / bars
    start = math.floor(10 * min(first, *low)) / 10  # what no row reaches is not shown

    blue, ink, pale = "#2b6cb0", "#374151", "#d1d5db"
    figure = Figure(figsize=(5, 6.6), dpi=200, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([0, 1], [0, 1], color=ink, linestyle=(0, (4, 3)), linewidth=1, label="calibrated")
    above.vlines(sure, low, high, color=blue, linewidth=4, alpha=0.3, label="95 % interval")
    dots = {"color": blue, "markersize": 6, "markeredgecolor": "white", "clip_on": False, "zorder": 3}
    above.plot(sure, right, "o", label="rows of like confidence", **dots)
    above.set(ylabel="accuracy", xlim=(start, 1.01), ylim=(start, 1.01))
    interval = "" if ece.low is None else f" ({ece.low:.3f} to {ece.high:.3f})"
    above.set_title(
        f"n = {measurement.n:,}, ECE {ece.value:.3f}{interval}\nif calibrated, ECE {measurement.ece_if_calibrated:.3f}",
        loc="left", fontsize=11, color=ink, linespacing=1.5,
    )  # fmt: skip
    below.bar(
        [bar / bars for bar in range(bars)], measurement.histogram, 1 / bars, align="edge", color=blue, ec="white"
    )
    below.set(xlabel="confidence", ylabel="rows")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=pale, linewidth=0.5)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, columnspacing=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
