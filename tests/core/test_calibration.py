"""Calibrations: each method against what it is defined by, and bound to what it was fitted on."""

import json
import math
from collections.abc import Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core import Judgment, RowError, cascade, classify, judge, measure_order
from alpaca_core.calibration import FLOOR, Binding, Calibration
from alpaca_core.errors import InvalidRequest
from alpaca_core.fitting import _FITS, _cross_validated, _pick, _Rows, fit_calibration
from alpaca_core.testing import FakeModel

LABELS = ["dry", "wet"]
SKEWED = FakeModel(
    {
        "cloud": {"dry": 0.6, "wet": 0.4},
        "sun": {"dry": 0.9, "wet": 0.1},
        "rain": {"dry": 0.5, "wet": 0.5},
    },
    otherwise={"dry": 0.8, "wet": 0.2},
)
TEXTS = ["cloud", "sun", "rain", "cloud"] * 5
GOLD = ["wet", "dry", "wet", "wet"] * 5


def simulated(rows: int, labels: int, scale: object, bias: object, seed: int = 0) -> _Rows:
    """Rows whose gold labels are drawn from ``softmax(scale * z + bias)``."""
    draw = numpy.random.default_rng(seed)
    z = draw.normal(size=(rows, labels)) * 2
    z -= numpy.log(numpy.exp(z).sum(1, keepdims=True))
    scores = numpy.asarray(scale) * z + numpy.asarray(bias)
    gold = (scores + draw.gumbel(size=scores.shape)).argmax(1)
    return _Rows(z, gold, z[:3], None)


def test_temperature_finds_the_scale_that_the_labels_were_drawn_with() -> None:
    scale, bias = _FITS["temperature"](simulated(20_000, 4, 0.4, 0.0))
    assert scale == pytest.approx([0.4] * 4, abs=0.02)
    assert not bias.any()


def test_vector_finds_every_scale_and_bias() -> None:
    scale, bias = _FITS["vector"](simulated(40_000, 3, [0.5, 1.0, 1.5], [0.7, 0.0, -0.7]))
    assert scale == pytest.approx([0.5, 1.0, 1.5], abs=0.06)
    assert bias - bias.mean() == pytest.approx([0.7, 0.0, -0.7], abs=0.1)


def test_the_base_gives_its_temperature() -> None:
    rows = simulated(500, 4, 1.0, 0.0)
    sharpened = rows.z * 3
    sharpened -= numpy.log(numpy.exp(sharpened).sum(1, keepdims=True))
    scale, bias = _FITS["base"](_Rows(sharpened, None, rows.free, rows.z))
    assert scale == pytest.approx([1 / 3] * 4, abs=1e-3)
    assert not bias.any()


def test_batch_takes_the_mean_log_probability_away() -> None:
    fitted = fit_calibration(SKEWED, TEXTS, LABELS, method="batch", instruction="Weather?")
    raw = judge(SKEWED, TEXTS, LABELS, instruction="Weather?")
    mean = [sum(math.log(row.probabilities[name]) for row in raw) / len(raw) for name in LABELS]
    assert fitted.bias == pytest.approx([-each for each in mean], abs=1e-6)
    assert fitted.scale == (1.0, 1.0)


def test_contextual_makes_an_input_without_content_even() -> None:
    fitted = fit_calibration(SKEWED, TEXTS, LABELS, method="contextual", instruction="Weather?")
    even = judge(SKEWED, ["N/A"], LABELS, instruction="Weather?", calibration=fitted)[0]
    assert even.probabilities == pytest.approx({"dry": 0.5, "wet": 0.5}, abs=1e-6)
    cloud = judge(SKEWED, ["cloud"], LABELS, instruction="Weather?", calibration=fitted)[0]
    odds = (0.6 / 0.8) / (0.4 / 0.2)
    assert cloud.probabilities["dry"] == pytest.approx(odds / (1 + odds), abs=1e-6)
    assert cloud.label == "wet"


@pytest.mark.parametrize("method", ["none", "contextual", "batch", "temperature", "vector", None])
def test_a_rows_result_depends_on_no_other_row(method: str | None) -> None:
    fitted = fit_calibration(SKEWED, TEXTS, LABELS, GOLD, method=method, instruction="Weather?")
    together = judge(SKEWED, ["cloud", "", "rain"], LABELS, instruction="Weather?", calibration=fitted)
    alone = [judge(SKEWED, [each], LABELS, instruction="Weather?", calibration=fitted)[0] for each in ("cloud", "rain")]
    assert [together[0], together[2]] == alone
    assert isinstance(together[1], RowError)
    raw = judge(SKEWED, ["cloud"], LABELS, instruction="Weather?")[0]
    assert isinstance(raw, Judgment)
    assert alone[0].coverage == raw.coverage
    assert alone[0].calibration == fitted.digest
    assert (raw.calibration, raw.probabilities == alone[0].probabilities) == (None, method == "none")
    assert math.fsum(alone[0].probabilities.values()) == pytest.approx(1.0)


def test_labelled_rows_choose_by_likelihood_and_never_below_the_raw_accuracy() -> None:
    for seed, (scale, bias) in enumerate([(1.0, 0.0), (0.3, 0.0), (1.0, [2.0, 0.0, -2.0]), (0.4, [1.0, -1.0, 0.0])]):
        rows = simulated(400, 3, scale, bias, seed)
        chosen, nll, reason = _pick(rows)
        assert nll == _cross_validated(rows, chosen)[0] <= _cross_validated(rows, "none")[0]
        assert _cross_validated(rows, chosen)[1] >= _cross_validated(rows, "none")[1]
        assert "lowest negative log-likelihood" in reason
    assert fit_calibration(SKEWED, TEXTS, LABELS, GOLD, instruction="Weather?").nll is not None


def test_without_labels_the_reason_says_which_was_taken() -> None:
    fitted = fit_calibration(SKEWED, [*TEXTS, None], LABELS)
    assert (fitted.method, fitted.rows, fitted.nll) == ("batch", 20, None)
    assert "no gold labels" in fitted.reason


def test_few_rows_stay_near_what_is_known_without_labels() -> None:
    rows = simulated(10, 77, 1.0, 0.0)
    scale, _ = _FITS["vector"](rows)
    assert abs(scale - 1).max() < 3
    assert numpy.isfinite(_cross_validated(rows, "vector")[0])


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"labels": ["wet", "dry"]}, "labels"),
        ({"labels": ["dry", "damp"]}, "labels"),
        ({"instruction": "Forecast?"}, "question"),
        ({"instruction": None}, "question"),
        ({"show_labels": False}, "question"),
        ({"template": "raw"}, "question"),
        ({"all_segmentations": True}, "question"),
        ({"model": FakeModel("dry")}, "model"),
    ],
)
def test_it_holds_for_what_it_was_fitted_on_and_for_nothing_else(changed: dict[str, object], what: str) -> None:
    fitted = fit_calibration(SKEWED, TEXTS, LABELS, instruction="Weather?")
    asked = {"model": SKEWED, "labels": LABELS, "instruction": "Weather?"} | changed
    with pytest.raises(InvalidRequest, match=f"has the {what} "):
        judge(texts=["cloud"], calibration=fitted, **asked)


def test_it_is_json_and_back_and_its_digest_covers_it() -> None:
    fitted = fit_calibration(SKEWED, TEXTS, LABELS, GOLD)
    again = Calibration.model_validate(json.loads(fitted.model_dump_json()))
    assert (again, again.digest) == (fitted, fitted.digest)
    assert fitted.model_copy(update={"bias": (0.0, 0.0)}).digest != fitted.digest


@given(st.lists(st.floats(max_value=0.0, min_value=-1e300) | st.just(-math.inf), min_size=3, max_size=3))
def test_applied_it_gives_a_distribution_whatever_the_masses_are(masses: list[float]) -> None:
    bound = Binding(model="m", adapter=None, question="q", labels=("a", "b", "c"))
    fitted = Calibration(method="vector", scale=(0.0, 1.0, 9.0), bias=(-3.0, 0.0, 40.0), bound=bound, rows=10)
    log_p = fitted.apply(masses)
    assert math.fsum(math.exp(each) for each in log_p) == pytest.approx(1.0)
    assert all(math.isfinite(each) for each in log_p)
    assert FLOOR < 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": TEXTS[:5]}, "10 rows at least"),
        ({"texts": "cloud"}, "list"),
        ({"gold": GOLD[:3]}, "a label for each of 20"),
        ({"gold": ["damp"] * 20}, "'damp' is none"),
        ({"method": "isotonic"}, "'isotonic'"),
        ({"method": "vector"}, "gold labels"),
        ({"method": "base"}, "no adapter"),
        ({"instruction": ""}, "instruction"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        fit_calibration(**{"model": SKEWED, "texts": TEXTS, "labels": LABELS} | settings)


@pytest.mark.parametrize("given", [{"a": 1}, "headlines", 1.5], ids=repr)
@pytest.mark.parametrize("verb", [judge, cascade, classify, measure_order])
def test_what_is_no_calibration_is_refused_with_the_way_to_one(verb: Callable[..., object], given: object) -> None:
    with pytest.raises(InvalidRequest, match=r"calibration is a Calibration, but got .* fit_calibration"):
        verb(SKEWED, ["cloud"], LABELS, calibration=given)


def test_samples_have_no_use_for_a_calibration() -> None:
    fitted = fit_calibration(SKEWED, TEXTS, LABELS)
    with pytest.raises(InvalidRequest, match="sampled"):
        judge(SKEWED, ["cloud"], LABELS, calibration=fitted, method="sampled")


@pytest.mark.parametrize("fields", [{"scale": (1.0,)}, {"bias": ()}, {"scale": (1.0, -1.0)}, {"bias": (math.nan, 0.0)}])
def test_a_calibration_that_is_none_is_refused(fields: dict[str, object]) -> None:
    whole = fit_calibration(SKEWED, TEXTS, LABELS).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"scale|bias"):
        Calibration.model_validate(whole | fields)
