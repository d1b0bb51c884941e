"""The order of labels in the prompt: against worlds in which every place has its own, known pull."""

import math
from collections.abc import Sequence

import pytest

from alpaca_core import Judgment, Label, fit_calibration, fit_display, judge, measure_order
from alpaca_core.asking import averaged
from alpaca_core.errors import InvalidLabels, InvalidRequest
from alpaca_core.testing import FakeModel

LABELS = ["dry", "wet", "windy"]
TRUTH = {
    "sun": {"dry": 0.7, "wet": 0.1, "windy": 0.2},
    "rain": {"dry": 0.1, "wet": 0.8, "windy": 0.1},
    "gale": {"dry": 0.3, "wet": 0.3, "windy": 0.4},
}
PULL = (5.0, 1.0, 0.5)
TEXTS = list(TRUTH) * 4


class Placed(FakeModel):
    """Replies with a label by its truth times the pull of its place in the prompt; half of the time with nothing."""

    def __init__(self, pull: Sequence[float] = PULL) -> None:
        super().__init__("", context_length=65_536)
        self._pull = pull

    def _distribution_after(self, prompt_ids: Sequence[int]) -> dict[str, float]:
        prompt = self.tokenizer.decode(prompt_ids)
        truth = next((row for text, row in TRUTH.items() if f"Input:\n{text}\n" in prompt), dict.fromkeys(LABELS, 1.0))
        if "Answer with" not in prompt:
            weights = dict.fromkeys(LABELS, 1.0)
        else:
            shown = sorted(LABELS, key=prompt.index)
            said = "ABC" if "Answer with a letter" in prompt else shown
            weights = {said[place]: truth[name] * self._pull[place] for place, name in enumerate(shown)}
        total = 2 * sum(weights.values())
        return {"something else": 0.5, **{name: weight / total for name, weight in weights.items()}}


def shares(row: object) -> dict[str, float]:
    assert isinstance(row, Judgment)
    return row.probabilities


@pytest.mark.parametrize("letters", [False, True])
def test_pride_finds_the_truth_behind_the_places(letters: bool) -> None:
    fitted = fit_calibration(
        Placed(), TEXTS, LABELS, method="pride", instruction="Weather?", show_labels=True, letters=letters
    )
    judged = judge(
        Placed(), list(TRUTH), LABELS, instruction="Weather?", show_labels=True, letters=letters, calibration=fitted
    )
    for text, row in zip(TRUTH, judged, strict=True):
        assert shares(row) == pytest.approx(TRUTH[text], abs=1e-9)
    total = sum(PULL)
    assert fitted.bias == pytest.approx([-math.log(pull / total) for pull in PULL], abs=1e-9)


@pytest.mark.parametrize("letters", [False, True])
def test_rotated_judgments_are_the_average_over_every_rotation(letters: bool) -> None:
    rotated = judge(Placed(), TEXTS, LABELS, instruction="Weather?", rotate_labels=True, letters=letters)
    turns = [
        judge(Placed(), TEXTS, LABELS[turn:] + LABELS[:turn], instruction="Weather?", show_labels=True, letters=letters)
        for turn in range(3)
    ]
    for row, *each in zip(rotated, *turns, strict=True):
        expected = {name: sum(shares(turn)[name] for turn in each) / 3 for name in LABELS}
        assert shares(row) == pytest.approx(expected, abs=1e-12)
        assert isinstance(row, Judgment)
        assert row.coverage == pytest.approx(0.5, abs=1e-12)


def test_letters_name_the_labels() -> None:
    row = judge(Placed((1.0, 1.0, 1.0)), ["rain"], LABELS, instruction="Weather?", letters=True)[0]
    assert shares(row) == pytest.approx(TRUTH["rain"], abs=1e-12)


def test_the_flip_rate_is_that_of_judging_in_every_rotation() -> None:
    effect = measure_order(Placed(), TEXTS, LABELS, instruction="Weather?")
    turns = [
        [
            row.label
            for row in judge(Placed(), TEXTS, LABELS[turn:] + LABELS[:turn], instruction="Weather?")
            if isinstance(row, Judgment)
        ]
        for turn in range(3)
    ]
    flips = [[label != first for label in others] for first, *others in zip(*turns, strict=True)]
    assert effect.n == len(TEXTS)
    assert effect.flip_rate.value == pytest.approx(sum(map(sum, flips)) / (2 * len(flips)))
    assert effect.unstable == pytest.approx(sum(map(any, flips)) / len(flips))
    assert effect.flip_rate.value
    assert effect.by_place[0] > 0.5  # that place pulls


def test_after_pride_no_order_matters() -> None:
    fitted = fit_calibration(Placed(), TEXTS, LABELS, method="pride", instruction="Weather?", show_labels=True)
    effect = measure_order(Placed(), TEXTS, LABELS, instruction="Weather?", show_labels=True, calibration=fitted)
    assert effect.flip_rate.value == 0.0
    assert effect.by_place == pytest.approx([1 / 3] * 3)


def test_other_calibrations_stay_with_their_labels() -> None:
    fitted = fit_calibration(Placed(), TEXTS, LABELS, method="batch", instruction="Weather?", show_labels=True)
    effect = measure_order(Placed(), TEXTS, LABELS, instruction="Weather?", show_labels=True, calibration=fitted)
    assert effect.flip_rate.value


def test_a_row_that_fails_costs_itself_only() -> None:
    effect = measure_order(Placed(), [*TEXTS, " "], LABELS, instruction="Weather?")
    assert (effect.n, effect.failed) == (len(TEXTS), 1)


def test_the_way_to_ask_is_chosen_on_labelled_rows() -> None:
    gold = [max(TRUTH[text], key=TRUTH[text].__getitem__) for text in TEXTS]
    display = fit_display(Placed(), TEXTS, LABELS, gold, instruction="Weather?")
    assert display.show_labels  # without labels in the prompt, this world knows nothing
    assert set(display.considered) == {"hidden", "names", "letters"}
    chosen = "letters" if display.letters else "names"
    assert display.considered[chosen] == min(display.considered.values())
    row = judge(
        Placed(),
        ["rain"],
        LABELS,
        instruction="Weather?",
        show_labels=display.show_labels,
        letters=display.letters,
        calibration=display.calibration,
    )[0]
    assert isinstance(row, Judgment)
    assert row.label == "wet"


def test_shares_are_averaged_and_so_are_coverages() -> None:
    turns = [[math.log(0.3), math.log(0.1)], [math.log(0.01), math.log(0.03)], [-math.inf, -math.inf]]
    masses = [math.exp(mass) for mass in averaged(turns)]
    assert sum(masses) == pytest.approx((0.4 + 0.04) / 3)
    assert masses[0] / sum(masses) == pytest.approx((0.75 + 0.25) / 2)


def test_an_exact_label_counts_in_no_other_case() -> None:
    fake = FakeModel({"A": 0.2, "a": 0.5, "B": 0.3})
    either = judge(fake, ["?"], ["A", "B"])[0]
    exact = judge(fake, ["?"], [Label(name="A", exact=True), Label(name="B", exact=True)])[0]
    assert shares(either) == pytest.approx({"A": 0.7, "B": 0.3})
    assert shares(exact) == pytest.approx({"A": 0.4, "B": 0.6})
    twins = judge(fake, ["?"], [Label(name="A", exact=True), Label(name="a", exact=True)])[0]
    assert shares(twins) == pytest.approx({"A": 2 / 7, "a": 5 / 7})
    with pytest.raises(InvalidLabels, match="mean the same"):
        judge(fake, ["?"], [Label(name="A", exact=True), Label(name=" A", exact=True)])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"letters": True, "show_labels": False}, "letters=True"),
        ({"rotate_labels": True, "show_labels": False}, "rotate_labels=True"),
        ({"rotate_labels": True, "method": "sampled"}, "sampled"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        judge(Placed(), ["sun"], LABELS, instruction="Weather?", **settings)  # type: ignore[arg-type]


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="names none"):
        measure_order(Placed(), TEXTS, LABELS, show_labels=False)
    with pytest.raises(InvalidRequest, match="names none"):
        fit_calibration(Placed(), TEXTS, LABELS, method="pride", show_labels=False)
    with pytest.raises(InvalidRequest, match="chooses show_labels"):
        fit_display(Placed(), TEXTS, LABELS, ["dry"] * len(TEXTS), show_labels=True)
    with pytest.raises(InvalidLabels, match="A to Z"):
        judge(Placed(), ["sun"], [f"label {place}" for place in range(27)], letters=True)
