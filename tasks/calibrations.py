"""Calibrations kept by name, as blocks of the Prefect server."""

from typing import cast

from prefect.blocks.core import Block
from pydantic import Field

from alpaca_core import Calibration
from alpaca_core.errors import InvalidRequest


class CalibrationBlock(Block):
    """A calibration, bound to the model and the question that it was fitted on."""

    _block_type_name = "Alpaca Calibration"
    _block_type_slug = "alpaca-calibration"

    calibration: Calibration = Field(description="From alpaca_core.fit_calibration.")


def save_calibration(name: str, calibration: Calibration) -> None:
    """Keep a calibration under a name; one that is there already is replaced.

    Args:
        name: Lower-case letters, digits and dashes.
        calibration: From `fit_calibration`.

    Raises:
        InvalidRequest: If Prefect does not take the name.
    """
    try:
        CalibrationBlock(calibration=calibration).save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    except ValueError as error:
        raise InvalidRequest(
            f"a calibration's name is of lower-case letters, digits and dashes, but got {name!r:.80}. Rename it."
        ) from error


def load_calibration(name: str) -> Calibration:
    """Return the calibration of a name.

    Raises:
        InvalidRequest: If there is none.
    """
    try:
        block = cast(CalibrationBlock, CalibrationBlock.load(name, _sync=True))  # type: ignore[call-arg]
    except ValueError as error:
        raise InvalidRequest(
            f"there is no calibration named {name!r:.80} on this Prefect server. "
            "Fit one with alpaca_core.fit_calibration, and keep it with save_calibration."
        ) from error
    return block.calibration
