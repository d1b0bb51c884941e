"""A progress bar on a run's page and in a terminal, cheap enough to leave on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.logging import get_logger

from alpaca_core import progress as terminal
from alpaca_core.rows import Progress

PATIENCE = 5.0
"""Seconds of work before a bar is drawn on the run's page, so that quick tasks leave none behind."""

INTERVAL = 2.0
MOST = 60.0
"""Least and most seconds between two updates of it, each of which is a request to the Prefect API: a tenth of the time
that has passed. Many runs at once go on for long, and the server may share their cores."""


@contextmanager
def progress_bar(verb: str, rows: int) -> Iterator[Progress]:
    """Show how many rows are done: on the task run's page, and on standard error where that is a terminal.

    Args:
        verb: Stands beside the bar.
        rows: How many there are.

    Yields:
        A callable that takes the number of rows just finished, or the part of one.
    """
    done = 0.0
    artifact: UUID | None = None
    begun = time.monotonic()
    due = begun + PATIENCE

    def advance(finished: float) -> None:
        nonlocal done, due
        done += finished
        on_terminal(finished)
        if time.monotonic() >= due and TaskRunContext.get():
            draw()
            now = time.monotonic()
            due = now + min(max(INTERVAL, (now - begun) / 10), MOST)

    def draw() -> None:
        nonlocal artifact
        percent = round(100 * min(done / max(rows, 1), 1.0), 1)
        try:
            if artifact is None:
                artifact = cast(UUID, create_progress_artifact(percent, description=f"{verb}: rows done"))
            else:
                update_progress_artifact(artifact, percent)
        except Exception as error:  # of whatever kind: the rows are worth more than their bar
            get_logger("alpaca").debug("Progress could not be shown: %s", error)

    with terminal.progress_bar(verb, rows) as on_terminal:
        yield advance
    if artifact is not None:
        draw()
