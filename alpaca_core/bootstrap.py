"""Measures of judged rows that are drawn with replacement: formulas of how often each row was drawn.

A thousand resamples of ten thousand rows then take seconds, where scikit-learn would take minutes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

NLL_FLOOR = 2.0**-52
"""Least probability that the negative log-likelihood counts, as in scikit-learn: 0 costs 36.04 nats."""

BLOCK = 500_000
"""Drawn rows that are counted at a time: 4 MB."""

Floats = NDArray[numpy.float64]
Indices = NDArray[numpy.intp]


class Rows:
    """Judged rows as arrays.

    Args:
        gold: (n,) numbers of the right labels.
        chosen: (n,) numbers of the given labels.
        probabilities: (n, labels); `confidence` (n,) is that of the given label.
    """

    def __init__(self, gold: Sequence[int], chosen: Sequence[int], probabilities: Sequence[Sequence[float]]) -> None:
        self.gold: Indices = numpy.array(gold, dtype=numpy.intp)
        self.chosen: Indices = numpy.array(chosen, dtype=numpy.intp)
        self.probabilities: Floats = numpy.array(probabilities, dtype=float)
        self.n, self.labels = self.probabilities.shape
        self.correct: Floats = (self.gold == self.chosen).astype(float)
        self.confidence: Floats = self.probabilities[numpy.arange(self.n), self.chosen]


class Weighted:
    """The measures of `rows`, whose meaning `measuring.Measurement` says, for many resamples at once.

    Every method takes weights, (n, resamples): how often each row was drawn, whole numbers. What a resample
    leaves undefined is NaN.

    Args:
        rows: What is measured.
        bins: Of the calibration error.
    """

    def __init__(self, rows: Rows, bins: int) -> None:
        self._rows, self._bins = rows, bins
        each = numpy.arange(rows.n)
        nll = -numpy.log(numpy.maximum(rows.probabilities[each, rows.gold], NLL_FLOOR))
        off = rows.probabilities.copy()
        off[each, rows.gold] -= 1
        self._means = {"accuracy": rows.correct, "brier": numpy.square(off).sum(axis=1), "nll": nll}
        self._label_sums = [
            totals(group, rows.labels, rows.correct if hits else None)
            for group, hits in ((rows.gold, True), (rows.gold, False), (rows.chosen, False))
        ]
        confidences, self.group = numpy.unique(rows.confidence, return_inverse=True)
        self._group_sums = [
            totals(self.group, len(confidences), counted)
            for counted in (None, 1 - rows.correct, rows.confidence - rows.correct)
        ]
        self._ranks = [self._rank(label) for label in range(1 if rows.labels == 2 else rows.labels)]

    def measures(self, weights: Floats) -> dict[str, Floats]:
        """Return every measure by name, (resamples,)."""
        with numpy.errstate(divide="ignore", invalid="ignore"):
            found: dict[str, Floats] = {
                name: (per_row @ weights) / weights.sum(axis=0) for name, per_row in self._means.items()
            }
            found["macro_f1"] = self._macro_f1(weights)
            found["auroc"] = numpy.mean([self._area(weights, *sums) for sums in self._ranks], axis=0)
            found["aurc"] = self._aurc(weights)
            found["ece"] = self._ece(weights)
        return found

    def bins_of(self, weights: Floats) -> Indices:
        """Return the bin of each group of equal confidence, (groups, resamples): the one that its middle row is in."""
        sizes = self._group_sums[0] @ weights
        upto = sizes.cumsum(axis=0)
        bins = self._bins * (2 * upto - sizes) // (2 * upto[-1:])
        return numpy.asarray(numpy.nan_to_num(bins).clip(max=self._bins - 1), dtype=numpy.intp)

    def _macro_f1(self, weights: Floats) -> Floats:
        hits, gold, chosen = (sums @ weights for sums in self._label_sums)
        sizes = gold + chosen
        return numpy.asarray((2 * hits / numpy.maximum(sizes, 1)).sum(axis=0) / (sizes > 0).sum(axis=0))

    def _rank(self, label: int) -> tuple[Any, Any]:
        """Sums for the rank statistic of one label: its rows by score; all rows below, at, between these scores."""
        scores = self._rows.probabilities[:, label]
        positive = self._rows.gold == label
        levels = numpy.unique(scores[positive])
        place = numpy.searchsorted(levels, scores, "left") + numpy.searchsorted(levels, scores, "right")
        return totals(place // 2, len(levels), positive.astype(float)), totals(place, 2 * len(levels) + 1)

    def _area(self, weights: Floats, by_level: Any, by_place: Any) -> Floats:
        """ROC area: Mann and Whitney's U, the pairs that positives win by mid-rank, over all pairs."""
        positives, upto = by_level @ weights, (by_place @ weights).cumsum(axis=0)
        total = positives.sum(axis=0)
        won = (positives * (upto[0:-1:2] + upto[1::2])).sum(axis=0) - total**2
        return numpy.asarray(won / (2 * total * (upto[-1] - total)))

    def _aurc(self, weights: Floats) -> Floats:
        """After j of a group's m rows in random order, `above` rows went before, and errors grew by wrong * j / m."""
        sizes, wrong = (sums @ weights for sums in self._group_sums[:2])
        above = sizes.sum(axis=0) - sizes.cumsum(axis=0)
        wrong_above = wrong.sum(axis=0) - wrong.cumsum(axis=0)
        most = int(weights.sum(axis=0).max(initial=0))
        harmonic = numpy.concatenate([[0.0], numpy.cumsum(1 / numpy.arange(1, most + 1))])
        inverse = harmonic[(above + sizes).astype(int)] - harmonic[above.astype(int)]  # sum over j of 1 / (above + j)
        rate = wrong / numpy.maximum(sizes, 1)
        risks = wrong_above * inverse + rate * (sizes - above * inverse)
        return numpy.asarray(risks.sum(axis=0) / weights.sum(axis=0))

    def _ece(self, weights: Floats) -> Floats:
        resamples = weights.shape[1]
        place = self.bins_of(weights) * resamples + numpy.arange(resamples)
        gaps = numpy.bincount(place.ravel(), (self._group_sums[2] @ weights).ravel(), self._bins * resamples)
        return numpy.asarray(numpy.abs(gaps.reshape(self._bins, resamples)).sum(axis=0) / weights.sum(axis=0))


def totals(group: Indices, groups: int, counted: Floats | None = None) -> Any:
    """Return a sparse matrix, (groups, n), that sums `counted` of each row (1 unless said) by group, times weights."""
    from scipy import sparse

    values = numpy.ones(len(group)) if counted is None else counted
    some = numpy.flatnonzero(values)  # a row that counts nothing needs no group
    return sparse.csr_array((values[some], (group[some], some)), shape=(groups, len(group)))


def draw(rows: int, measured: int, resamples: int, random: numpy.random.Generator) -> Iterator[Floats]:
    """Draw `rows` rows with replacement, and yield how often the first `measured` came, (measured, resamples)."""
    block = max(BLOCK // rows, 1)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = random.integers(rows, size=(size, rows)) + rows * numpy.arange(size)[:, None]
        counts = numpy.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        yield numpy.ascontiguousarray(counts.T[:measured], dtype=float)


def calibrated_errors(rows: Rows, bin_of: Indices, bins: int, draws: int, random: numpy.random.Generator) -> Floats:
    """Return the calibration error, (draws,), of judges that are right as often as their confidence says.

    Args:
        rows: Whose confidences these are.
        bin_of: (n,) bin of each row.
        bins: How many there are.
        draws: How many judges.
        random: Of the simulation.
    """
    by_bin = totals(bin_of, bins)
    confidence = rows.confidence[:, None]
    block = max(BLOCK // rows.n, 1)
    found = [
        numpy.abs(by_bin @ (confidence - (random.random((rows.n, min(block, draws - start))) < confidence))).sum(axis=0)
        for start in range(0, draws, block)
    ]
    return numpy.asarray(numpy.concatenate(found) / rows.n)
