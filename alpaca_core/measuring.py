"""Measure judgments against labelled rows: how often they are right, how far their probabilities can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from alpaca_core.errors import InvalidRequest
from alpaca_core.judging import Judgment
from alpaca_core.model import RowError
from alpaca_core.rows import check_rows, column
from alpaca_core.spec import Value

NLL_FLOOR = 2.0**-52
"""Least probability that `Measurement.nll` counts, so a label of probability 0 costs 36 nats; as in scikit-learn."""

CALIBRATED_DRAWS = 1000
"""Simulated sets of answers behind `Measurement.ece_if_calibrated`."""

HISTOGRAM_BARS = 20
"""Bars of equal width, from confidence 0 to 1, of `Measurement.histogram`."""

COVERAGE_QUANTILES = (5, 25, 50, 75, 95)
"""Quantiles of the coverage that a measurement holds, in percent."""

BLOCK = 500_000
"""Drawn rows that are counted at a time: 4 MB."""

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.intp]


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
            ends at the upper percentile and begins as far below the value, or at 0 where a calibrated judge
            would show as much in 97.5 % of simulations.
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
    weighted = _Weighted(rows, bins)
    one = numpy.ones((rows.n, 1))
    values = {name: float(value[0]) for name, value in weighted.measures(one).items()} | _by_sklearn(rows)

    random, simulation = numpy.random.default_rng(seed).spawn(2)
    drawn = _replicates(weighted, len(judgments), resamples, random)
    estimates = {name: _estimate(value, drawn[name]) for name, value in values.items()}
    estimates["answered"] = _estimate(rows.n / len(judgments), drawn["answered"])

    bin_of = weighted.bins_of(one)[weighted.group, 0]
    calibrated = _calibrated(rows, _totals(bin_of, bins), simulation)
    ece = estimates["ece"]
    if ece.value is not None and ece.high is not None:
        within = ece.value <= numpy.quantile(calibrated, 0.975)
        low = 0.0 if within else max(2 * ece.value - ece.high, 0.0)
        estimates["ece"] = Estimate(value=ece.value, low=low, high=ece.high)
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


class _Rows:
    """Rows with a label: `gold` and `chosen` (n,) number labels; `probabilities` (n, labels), the others (n,)."""

    def __init__(self, gold: Sequence[int], chosen: Sequence[int], probabilities: Sequence[list[float]]) -> None:
        self.n = len(gold)
        self.gold: Indices = numpy.array(gold)
        self.chosen: Indices = numpy.array(chosen)
        self.probabilities: Floats = numpy.array(probabilities)
        self.correct: Floats = (self.gold == self.chosen).astype(float)
        self.confidence: Floats = self.probabilities[numpy.arange(self.n), self.chosen]


def _checked(judgments: Sequence[Judgment | RowError], gold: Sequence[str]) -> tuple[list[Judgment], _Rows]:
    """The rows that are no `RowError`, and of these the ones that have a label, as arrays."""
    check_rows("judgments", judgments)
    pairs = []
    for place, (judgment, right) in enumerate(zip(judgments, column("gold", gold, judgments), strict=True)):
        if isinstance(judgment, Judgment):
            pairs.append((place, judgment, right))
        elif not isinstance(judgment, RowError):
            raise InvalidRequest(f"judgments come from judge, but row {place} is {judgment!r:.80}. Drop it.")
    judged = [judgment for _, judgment, _ in pairs]
    answered = [(judgment, right) for _, judgment, right in pairs if judgment.label is not None]
    names = list(judged[0].probabilities) if judged else []
    for place, judgment, right in pairs:
        if judgment.probabilities.keys() != set(names):
            raise InvalidRequest(
                f"all rows have the same labels, but row {place} has {list(judgment.probabilities)!r:.80} and the "
                f"first {names!r:.80}. Measure them apart."
            )
        for role, name in (("right label", right), ("label", judgment.label or names[0])):
            if name not in names:
                raise InvalidRequest(
                    f"a {role} is one of the judged labels, {names!r:.200}, but row {place} has {name!r:.80}. Rename it."
                )
        shares = judgment.probabilities.values()
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise InvalidRequest(f"probabilities sum to 1, but row {place} has {list(shares)!r:.80}. Divide by their sum.")
    if not answered:
        raise InvalidRequest(
            f"measuring needs a row that has a label, but of {len(judgments):,} rows {len(judgments) - len(judged):,} "
            f"failed and {len(judged):,} abstained. Lower min_coverage, or mend the rows."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return judged, _Rows(
        [numbers[str(right)] for _, right in answered],
        [numbers[str(judgment.label)] for judgment, _ in answered],
        [[judgment.probabilities[name] for name in names] for judgment, _ in answered],
    )
