"""Calibrations kept by name at a Prefect server."""

import pytest

from alpaca_core import Calibration, fit_calibration
from alpaca_core.errors import InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.tasks.calibrations import load_calibration, save_calibration

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return fit_calibration(FakeModel({"dry": 0.6, "wet": 0.4}), ["?"] * 10, ["dry", "wet"])


def test_a_saved_calibration_comes_back_whole(fitted: Calibration) -> None:
    save_calibration("weather-1", fitted)
    assert load_calibration("weather-1") == fitted
    assert load_calibration("weather-1").digest == fitted.digest


def test_a_name_is_taken_over_by_the_newest(fitted: Calibration) -> None:
    newer = fitted.model_copy(update={"bias": (1.0, -1.0)})
    save_calibration("weather-2", fitted)
    save_calibration("weather-2", newer)
    assert load_calibration("weather-2") == newer


@pytest.mark.parametrize("name", ["Weather!", "we ather", "../weather", ""])
def test_a_name_that_prefect_does_not_take_is_refused(name: str, fitted: Calibration) -> None:
    with pytest.raises(InvalidRequest, match="lower-case"):
        save_calibration(name, fitted)


@pytest.mark.parametrize("name", ["nothing-there", "Weather!"])
def test_a_name_that_is_not_there_is_said_so(name: str) -> None:
    with pytest.raises(InvalidRequest, match="no calibration named"):
        load_calibration(name)
