"""Measuring judgments: every measure against scikit-learn or a loop, and intervals against simulated truth."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
from scipy import stats
from sklearn import metrics

from alpaca_core import Judgment, RowError, bootstrap
from alpaca_core.bootstrap import NLL_FLOOR, Rows, Weighted, draw
from alpaca_core.errors import InvalidRequest
from alpaca_core.measuring import Estimate, Measurement, measure, reliability_diagram

MEASURES = ("accuracy", "macro_f1", "brier", "nll", "auroc", "aurc", "ece")
FAILED = RowError(code="empty_text", message="a text is blank")

Case = tuple[list[Judgment], list[str]]


def judgment(probabilities: dict[str, float], label: str | None = "", coverage: float = 0.5) -> Judgment:
    likeliest = max(probabilities, key=probabilities.__getitem__) if label == "" else label
    return Judgment(text="?", label=likeliest, probabilities=probabilities, coverage=coverage)


def world(seed: int, n: int, labels: int, *, ties: bool = False, heat: float = 1.0) -> Case:
    """Judgments and right labels that follow their probabilities to the power of 1 / heat: above 1 is too sure."""
    random = numpy.random.default_rng(seed)
    shares = random.dirichlet(numpy.full(labels, 0.7), size=n)
    if ties:
        shares = random.multinomial(10, shares) / 10
    truth = (shares + 1e-9) ** (1 / heat)
    truth /= truth.sum(axis=1, keepdims=True)
    right = (truth.cumsum(axis=1) < random.random((n, 1))).sum(axis=1).clip(max=labels - 1)
    judgments = [judgment({f"l{label}": p for label, p in enumerate(row)}) for row in shares.tolist()]
    return judgments, [f"l{label}" for label in right]


def sure_world(random: numpy.random.Generator, n: int, gap: float) -> Case:
    """Two labels; confidence is uniform from 0.5 to 1, and accuracy lower by `gap`: the true ECE."""
    sure = random.uniform(0.5, 1.0, n)
    right = random.random(n) < sure - gap
    return [judgment({"a": p, "b": 1 - p}) for p in sure.tolist()], ["a" if hit else "b" for hit in right]


def confidences(judgments: list[Judgment]) -> list[float]:
    return [max(each.probabilities.values()) for each in judgments]


def value(measurement: Measurement, name: str) -> float | None:
    estimate = getattr(measurement, name)
    assert isinstance(estimate, Estimate)
    return estimate.value


CASES = [(seed, n, labels, ties) for seed, (n, labels) in enumerate([(40, 2), (60, 3), (300, 5)]) for ties in (0, 1)]


@pytest.mark.parametrize(("seed", "n", "labels", "ties"), CASES)
def test_values_are_those_of_scikit_learn(seed: int, n: int, labels: int, ties: bool) -> None:
    judgments, gold = world(seed, n, labels, ties=ties)
    names = [f"l{label}" for label in range(labels)]
    given = [each.label for each in judgments]
    shares = numpy.array([[each.probabilities[name] for name in names] for each in judgments])
    found = measure(judgments, gold, resamples=0)
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(gold, given))
    assert found.macro_f1.value == pytest.approx(metrics.f1_score(gold, given, average="macro"))
    assert found.nll.value == pytest.approx(metrics.log_loss(gold, shares, labels=names))
    if labels == 2:
        is_first = [right == "l0" for right in gold]
        assert found.brier.value == pytest.approx(2 * metrics.brier_score_loss(is_first, shares[:, 0]))
        assert found.auroc.value == pytest.approx(metrics.roc_auc_score(is_first, shares[:, 0]))
    else:
        assert found.auroc.value == pytest.approx(metrics.roc_auc_score(gold, shares, multi_class="ovr"))


@pytest.mark.parametrize(("seed", "n", "labels", "ties"), CASES)
def test_auroc_counts_pairs_and_brier_sums_squares(seed: int, n: int, labels: int, ties: bool) -> None:
    judgments, gold = world(seed, n, labels, ties=ties)
    areas = []
    for name in ["l0"] if labels == 2 else [f"l{label}" for label in range(labels)]:
        scores = [(each.probabilities[name], right == name) for each, right in zip(judgments, gold, strict=True)]
        pairs = [(a > b) + (a == b) / 2 for (a, yes), (b, no) in itertools.product(scores, scores) if yes and not no]
        areas.append(sum(pairs) / len(pairs))
    squares = [
        (p - (name == right)) ** 2
        for each, right in zip(judgments, gold, strict=True)
        for name, p in each.probabilities.items()
    ]
    found = measure(judgments, gold, resamples=0)
    assert found.auroc.value == pytest.approx(sum(areas) / len(areas))
    assert found.brier.value == pytest.approx(sum(squares) / n)


@pytest.mark.parametrize("seed", range(5))
def test_aurc_is_the_mean_over_all_orders_of_equal_confidences(seed: int) -> None:
    judgments, gold = world(seed, 7, 2, ties=True)
    rows = [
        (max(each.probabilities.values()), each.label != right) for each, right in zip(judgments, gold, strict=True)
    ]
    areas = [
        sum(sum(wrong for _, wrong in order[:k]) / k for k in range(1, 8)) / 7
        for order in itertools.permutations(rows)
        if all(before[0] >= after[0] for before, after in itertools.pairwise(order))
    ]
    assert measure(judgments, gold, resamples=0).aurc.value == pytest.approx(sum(areas) / len(areas))


def test_aurc_without_ties_is_the_mean_risk_of_the_most_confident() -> None:
    judgments, gold = world(1, 200, 3)
    order = sorted(zip(confidences(judgments), judgments, gold, strict=True), key=lambda row: -row[0])
    wrong = [each.label != right for _, each, right in order]
    risks = [sum(wrong[:k]) / k for k in range(1, 201)]
    assert measure(judgments, gold, resamples=0).aurc.value == pytest.approx(sum(risks) / 200)


@pytest.mark.parametrize("bins", [1, 3, 10, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_ece_is_what_a_loop_over_bins_says(ties: bool, bins: int) -> None:
    judgments, gold = world(2, 97, 3, ties=ties)
    rows = sorted(
        (max(each.probabilities.values()), each.label == right) for each, right in zip(judgments, gold, strict=True)
    )
    held: dict[int, list[tuple[float, bool]]] = {}
    for sure, hit in rows:
        places = [place for place, (other, _) in enumerate(rows) if other == sure]
        held.setdefault(math.floor(bins * (places[0] + places[-1] + 1) / 2 / 97), []).append((sure, hit))
    gaps = [abs(sum(hit for _, hit in each) - sum(sure for sure, _ in each)) for each in held.values()]
    found = measure(judgments, gold, bins=bins, resamples=0)
    assert found.ece.value == pytest.approx(sum(gaps) / 97)
    assert [each.n for each in found.reliability] == [len(held[place]) for place in sorted(held)]
    for each, place in zip(found.reliability, sorted(held), strict=True):
        hits = sum(hit for _, hit in held[place])
        wilson = stats.binomtest(hits, each.n).proportion_ci(method="wilson")
        assert each.confidence == pytest.approx(sum(sure for sure, _ in held[place]) / each.n)
        assert each.accuracy == Estimate(value=hits / each.n, low=wilson.low, high=wilson.high)


def test_bins_hold_equally_many_rows_where_no_confidences_are_equal() -> None:
    judgments, gold = world(3, 95, 4)
    assert {each.n for each in measure(judgments, gold, resamples=0).reliability} <= {9, 10}


@pytest.mark.parametrize(("labels", "ties"), [(2, True), (2, False), (3, True), (4, False)])
def test_a_resample_measures_what_its_repeated_rows_do(labels: int, ties: bool) -> None:
    judgments, gold = world(4, 60, labels, ties=ties)
    names = list(judgments[0].probabilities)
    rows = Rows(
        [names.index(right) for right in gold],
        [names.index(str(each.label)) for each in judgments],
        [list(each.probabilities.values()) for each in judgments],
    )
    weights = numpy.concatenate(list(draw(60, 60, 8, numpy.random.default_rng(0))), axis=1)
    assert weights.sum(axis=0).tolist() == [60.0] * 8
    found = Weighted(rows, 10).measures(weights)
    for resample, counts in enumerate(weights.T.astype(int)):
        repeated = [row for row, count in enumerate(counts) for _ in range(count)]
        alone = measure([judgments[row] for row in repeated], [gold[row] for row in repeated], resamples=0)
        for name in MEASURES:
            assert found[name][resample] == pytest.approx(value(alone, name), abs=1e-12), name


def test_intervals_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    judgments, gold = world(5, 200, 3)
    hits = [each.label == right for each, right in zip(judgments, gold, strict=True)]
    scipys = stats.bootstrap(
        (hits,), numpy.mean, n_resamples=9999, method="percentile", random_state=numpy.random.default_rng(0)
    ).confidence_interval
    found = measure(judgments, gold, resamples=9999)
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((scipys.low, scipys.high), abs=0.006)
    monkeypatch.setattr(bootstrap, "BLOCK", 1000)
    assert measure(judgments, gold, resamples=9999).accuracy == found.accuracy


@pytest.mark.parametrize("labels", [2, 4])
def test_neither_the_order_of_rows_nor_the_names_of_labels_matter(labels: int) -> None:
    judgments, gold = world(6, 80, labels, ties=True)
    found = measure(judgments, gold)
    order = numpy.random.default_rng(1).permutation(80)
    moved = measure([judgments[row] for row in order], [gold[row] for row in order])
    for name in MEASURES:
        assert value(moved, name) == pytest.approx(value(found, name)), name
    assert moved.histogram == found.histogram
    assert moved.ece_if_calibrated == pytest.approx(found.ece_if_calibrated, rel=0.05)

    names = {f"l{label}": f"{9 - label} x" for label in range(labels)}
    renamed = [
        judgment({names[name]: p for name, p in each.probabilities.items()}, names[str(each.label)])
        for each in judgments
    ]
    assert measure(renamed, [names[right] for right in gold]) == found
    turned = [judgment(dict(reversed(each.probabilities.items())), each.label) for each in judgments[1:]]
    assert measure([judgments[0], *turned], gold) == found


def test_a_calibrated_judge_shows_the_error_that_a_calibrated_judge_would() -> None:
    random = numpy.random.default_rng(0)
    found = [measure(*sure_world(random, 300, gap=0), resamples=0) for _ in range(100)]
    errors = [value(each, "ece") or 0.0 for each in found]
    expected = [each.ece_if_calibrated for each in found]
    assert stats.ttest_1samp(numpy.subtract(errors, expected), 0).pvalue > 0.001
    assert numpy.std(expected) < 0.003
    too_sure = measure(*sure_world(random, 300, gap=0.2), resamples=0)
    assert (too_sure.ece.value or 0) > 2 * too_sure.ece_if_calibrated


def test_intervals_hold_the_truth_in_about_95_of_100_data_sets() -> None:
    truth = measure(*world(7, 100_000, 3, heat=1.5), resamples=0)
    times = 200
    held = dict.fromkeys(MEASURES[:-1], 0)
    for seed in range(times):
        found = measure(*world(1000 + seed, 150, 3, heat=1.5), resamples=300)
        for name in held:
            estimate, true = getattr(found, name), value(truth, name)
            assert estimate.low <= estimate.value <= estimate.high
            held[name] += estimate.low <= true <= estimate.high
    assert all(0.90 <= count / times <= 0.985 for count in held.values()), held


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.2])
def test_the_interval_of_the_calibration_error_holds_the_true_one_in_90_of_100(gap: float) -> None:
    random = numpy.random.default_rng(8)
    found = [measure(*sure_world(random, 200, gap), resamples=200).ece for _ in range(100)]
    held = sum((each.low or 0) <= gap <= (each.high or 0) for each in found)
    assert stats.binomtest(held, 100, 0.9, alternative="less").pvalue > 0.001  # plain percentiles hold 0, 2 and 95


def test_a_perfect_judge() -> None:
    judgments = [judgment({"a": 1.0, "b": 0.0}), judgment({"a": 0.0, "b": 1.0})] * 10
    found = measure(judgments, ["a", "b"] * 10)
    assert [value(found, name) for name in MEASURES] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert found.ece_if_calibrated == 0.0
    assert found.accuracy == Estimate(value=1.0, low=1.0, high=1.0)
    assert found.reliability[0].accuracy.low == pytest.approx(20 / (20 + stats.norm.ppf(0.975) ** 2))


def test_the_worst_judge() -> None:
    judgments = [judgment({"a": 1.0, "b": 0.0}), judgment({"a": 0.0, "b": 1.0})] * 10
    found = measure(judgments, ["b", "a"] * 10)
    assert [value(found, name) for name in MEASURES] == pytest.approx([0, 0, 2, -math.log(NLL_FLOOR), 0, 1, 1])


def test_a_label_that_is_right_for_no_row_leaves_auroc_undefined() -> None:
    judgments, _ = world(9, 30, 3)
    found = measure(judgments, ["l0", "l1"] * 15)
    assert found.auroc == Estimate(value=None)
    assert found.macro_f1.value is not None
    alike = measure(judgments, ["l0"] * 30)
    assert alike.auroc == Estimate(value=None)
    assert (alike.accuracy.value or 0) > 0


def test_no_interval_where_most_resamples_leave_the_measure_undefined() -> None:
    judgments, _ = world(10, 3, 3)
    found = measure(judgments, ["l0", "l1", "l2"])
    assert found.auroc.value is not None
    assert (found.auroc.low, found.auroc.high) == (None, None)
    assert found.brier.low is not None


def test_one_row() -> None:
    found = measure([judgment({"a": 0.75, "b": 0.25}, coverage=0.5)], ["a"])
    assert found.n == 1
    assert found.accuracy == Estimate(value=1.0, low=1.0, high=1.0)
    assert (found.brier.value, found.nll.value) == pytest.approx((0.125, -math.log(0.75)))
    assert (found.aurc.value, found.ece.value, found.auroc.value) == (0.0, 0.25, None)
    assert found.ece_if_calibrated == pytest.approx(2 * 0.75 * 0.25, abs=0.03)
    assert found.coverage == dict.fromkeys(("5%", "25%", "50%", "75%", "95%"), 0.5)


def test_rows_that_failed_or_abstained_are_counted_and_left_out() -> None:
    judgments, gold = world(11, 50, 3)
    abstained = judgment({"l0": 0.5, "l1": 0.3, "l2": 0.2}, None, coverage=0.0)
    rows = [FAILED, *judgments, abstained, abstained, abstained]
    found, alone = measure(rows, ["l0", *gold, "l1", "l2", "l2"]), measure(judgments, gold)
    assert (found.n, found.failed, found.abstained) == (50, 1, 3)
    assert [value(found, name) for name in MEASURES] == [value(alone, name) for name in MEASURES]
    assert found.answered.value == 50 / 54
    assert (found.answered.low or 1) < 50 / 54 < (found.answered.high or 0)
    assert alone.answered == Estimate(value=1.0, low=1.0, high=1.0)
    assert (found.coverage["5%"], alone.coverage["5%"]) == (pytest.approx(0.3), 0.5)  # place 2.6 of 0, 0, 0, 0.5 …
    assert sum(found.histogram) == sum(each.n for each in found.reliability) == 50


def test_confidence_is_that_of_the_given_label() -> None:
    found = measure([judgment({"a": 0.7, "b": 0.3}, "b")], ["b"])
    assert found.reliability[0].confidence == 0.3


def test_a_seed_gives_the_same_measurement_and_none_changes_a_value() -> None:
    judgments, gold = world(12, 60, 2)
    found, other = measure(judgments, gold, seed=1), measure(judgments, gold, seed=2)
    assert measure(judgments, gold, seed=1) == found
    assert found.accuracy.value == other.accuracy.value
    assert found.brier != other.brier
    without = measure(judgments, gold, resamples=0, seed=1)
    assert without.brier == Estimate(value=found.brier.value)
    assert without.ece_if_calibrated == found.ece_if_calibrated


def test_a_measurement_is_json_and_back() -> None:
    judgments, _ = world(13, 30, 3)
    found = measure(judgments, ["l0", "l1"] * 15)
    assert Measurement.model_validate_json(found.model_dump_json()) == found


AB = judgment({"a": 0.6, "b": 0.4})


@pytest.mark.parametrize(
    ("judgments", "gold", "settings", "said"),
    [
        ([AB], ["a", "b"], {}, "one value for each of 1 rows, but got 2"),
        ([AB], "a", {}, "list"),
        (AB, ["a"], {}, "list"),
        ([AB, AB], ["a", "A"], {}, r"\['a', 'b'\], but row 1 has 'A'"),
        ([AB, FAILED], ["a", "c"], {}, "row 1 has 'c'"),
        ([AB], [None], {}, "row 0 has None"),
        ([AB], [["a"]], {}, "row 0 has"),
        ([AB, judgment({"a": 0.6, "c": 0.4})], ["a", "a"], {}, "same labels, but row 1"),
        ([judgment({"a": 0.6, "b": 0.4}, "c")], ["a"], {}, "row 0 has 'c'"),
        ([judgment({"a": 0.6, "b": 0.6})], ["a"], {}, "sum to 1, but row 0"),
        ([judgment({"a": 1.5, "b": -0.5})], ["a"], {}, "row 0"),
        ([judgment({}, "a")], ["a"], {}, "row 0"),
        (["a"], ["a"], {}, "row 0 is 'a'"),
        ([], [], {}, "0 rows"),
        ([FAILED], ["a"], {}, "1 failed and 0 abstained"),
        ([judgment({"a": 0.6, "b": 0.4}, None)], ["a"], {}, "0 failed and 1 abstained"),
        ([AB], ["a"], {"bins": 0}, "bins is a whole number from 1, but got 0"),
        ([AB], ["a"], {"bins": 2.5}, "2.5"),
        ([AB], ["a"], {"resamples": -1}, "resamples"),
        ([AB], ["a"], {"seed": -1}, "seed"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(judgments: object, gold: object, settings: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        measure(judgments, gold, **settings)


def test_a_diagram_is_a_picture(tmp_path: Path) -> None:
    found = measure(*world(14, 120, 3))
    png = reliability_diagram(found, str(tmp_path / "new" / "reliability.PNG"))
    assert png == tmp_path / "new" / "reliability.PNG"
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    svg = reliability_diagram(found, tmp_path / "reliability.svg")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    reliability_diagram(measure([AB], ["b"], resamples=0), tmp_path / "one.png")
    with pytest.raises(InvalidRequest, match=r"\.pdf"):
        reliability_diagram(found, tmp_path / "reliability.pdf")


def test_libraries_are_imported_when_they_are_used_and_pyplot_never(tmp_path: Path) -> None:
    program = f"""
import sys
from alpaca_core.judging import Judgment
from alpaca_core.measuring import measure, reliability_diagram
print([name for name in ("scipy", "sklearn", "matplotlib") if name in sys.modules])
found = measure([Judgment(text="?", label="a", probabilities={{"a": 0.6, "b": 0.4}}, coverage=1)], ["a"])
print("matplotlib" in sys.modules)
reliability_diagram(found, {str(tmp_path / "one.png")!r})
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False", "False"]
