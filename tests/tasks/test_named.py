"""Calibrations and policies kept by name at a Prefect server."""

import pytest

from alpaca_core import Calibration, Policy, fit_calibration
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.tasks.named import load_named, save_named

pytestmark = pytest.mark.usefixtures("prefect_api")

POLICY = Policy(accept=0.1 + 0.2, review=0.1, precision=0.9, confidence=0.95, rows=120, accepted=60, bound=0.91)


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return fit_calibration(FakeModel({"dry": 0.6, "wet": 0.4}), ["?"] * 10, ["dry", "wet"])


def test_a_saved_value_comes_back_whole(fitted: Calibration) -> None:
    save_named("weather-1", fitted)
    assert load_named(Calibration, "weather-1") == fitted
    assert load_named(Calibration, "weather-1").digest == fitted.digest
    for policy in (POLICY, POLICY.model_copy(update={"accept": None, "calibration": fitted.digest})):
        save_named("weather-1", policy)
        assert load_named(Policy, "weather-1") == policy
    assert load_named(Calibration, "weather-1") == fitted, "one name, two kinds"


def test_a_name_is_taken_over_by_the_newest(fitted: Calibration) -> None:
    newer = fitted.model_copy(update={"bias": (1.0, -1.0)})
    save_named("weather-2", fitted)
    save_named("weather-2", newer)
    assert load_named(Calibration, "weather-2") == newer


@pytest.mark.parametrize("name", ["Weather!", "we ather", "../weather", ""])
def test_a_name_that_prefect_does_not_take_is_refused(name: str, fitted: Calibration) -> None:
    with pytest.raises(InvalidRequest, match=r"a calibration's name is of lower-case"):
        save_named(name, fitted)
    with pytest.raises(InvalidRequest, match=r"a policy's name is of lower-case"):
        save_named(name, POLICY)


@pytest.mark.parametrize("name", ["nothing-there", "Weather!"])
def test_a_name_that_is_not_there_is_said_so(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"no calibration named .*alpaca calibrate"):
        load_named(Calibration, name)
    with pytest.raises(InvalidRequest, match=r"no policy named .*alpaca fit-policy"):
        load_named(Policy, name)
