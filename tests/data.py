"""Data that is no part of the project: in ``shared/data`` beside its folder, or where $ALPACA_DATA says."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("ALPACA_DATA") or Path(__file__).parents[2] / "shared" / "data")


def needed(name: str) -> Path:
    """Where a file of that folder lies; the test that needs it is skipped where it is not there."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not in {FOLDER}; set ALPACA_DATA to the folder that holds it")
    return path
