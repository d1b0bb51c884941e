"""Calibrations and policies kept by name, as blocks of the Prefect server."""

from typing import TypeVar, cast

from prefect.blocks.core import Block
from pydantic import Field

from alpaca_core import Calibration, Policy
from alpaca_core.errors import InvalidRequest


class CalibrationBlock(Block):
    """A calibration, bound to the model and the question that it was fitted on."""

    _block_type_name = "Alpaca Calibration"
    _block_type_slug = "alpaca-calibration"

    calibration: Calibration = Field(description="From alpaca_core.fit_calibration.")


class PolicyBlock(Block):
    """A policy: which judgments are accepted, and which go to a person."""

    _block_type_name = "Alpaca Policy"
    _block_type_slug = "alpaca-policy"

    policy: Policy = Field(description="From alpaca_core.fit_policy.")


Kind = TypeVar("Kind", Calibration, Policy)

# What keeps a kind, what it is called, and the command that fits one.
_BLOCKS: dict[type, tuple[type[Block], str, str]] = {
    Calibration: (CalibrationBlock, "calibration", "calibrate"),
    Policy: (PolicyBlock, "policy", "fit-policy"),
}


def save_named(name: str, value: Calibration | Policy) -> None:
    """Keep a value under a name, where others of its kind are; one that is there already is replaced.

    Args:
        name: Lower-case letters, digits and dashes.
        value: From `fit_calibration` or `fit_policy`.

    Raises:
        InvalidRequest: If Prefect does not take the name.
    """
    block, kind, _ = _BLOCKS[type(value)]
    try:
        block(**{kind: value}).save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    except ValueError as error:
        raise InvalidRequest(
            f"a {kind}'s name is of lower-case letters, digits and dashes, but got {name!r:.80}. Rename it."
        ) from error


def load_named(wanted: type[Kind], name: str) -> Kind:
    """Return the value of a name.

    Args:
        wanted: `Calibration` or `Policy`.
        name: As it was saved.

    Raises:
        InvalidRequest: If there is none.
    """
    block, kind, command = _BLOCKS[wanted]
    try:
        return cast(Kind, getattr(block.load(name, _sync=True), kind))  # type: ignore[call-arg]
    except ValueError as error:
        raise InvalidRequest(
            f"there is no {kind} named {name!r:.80} on this Prefect server. "
            f"Fit one with `alpaca {command} FILE --name NAME`, or keep one of your own with save_named."
        ) from error
