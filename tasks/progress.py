"""A progress bar on a run's page, cheap enough to leave on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.logging import get_logger

from alpaca_core.rows import Progress

PATIENCE = 5.0
"""Seconds of work before a bar is drawn, so that quick tasks leave none behind."""

INTERVAL = 2.0
"""Seconds between two updates, each of which is a request to the Prefect API."""


@contextmanager
def progress_bar(description: str, rows: int) -> Iterator[Progress]:
    """Show the rows done so far as a progress artifact of the task run; outside a run show nothing.

    Args:
        description: Stands beside the bar.
        rows: How many there are.

    Yields:
        A callable that takes the number of rows just finished.
    """
    done = 0
    bar: UUID | None = None
    due = time.monotonic() + PATIENCE

    def advance(finished: int) -> None:
        nonlocal done, due
        done += finished
        if time.monotonic() >= due and TaskRunContext.get():
            draw()
            due = time.monotonic() + INTERVAL

    def draw() -> None:
        nonlocal bar
        percent = 100.0 * done / rows
        try:
            if bar is None:
                bar = cast(UUID, create_progress_artifact(percent, description=description))
            else:
                update_progress_artifact(bar, percent)
        except httpx.HTTPError as error:  # the rows are worth more than their bar
            get_logger("alpaca").debug("Progress could not be shown: %s", error)

    yield advance
    if bar is not None:
        draw()
