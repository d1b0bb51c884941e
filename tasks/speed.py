"""How fast the tasks of a flow run were, for the page that the run leaves."""

import threading
from collections import OrderedDict

from prefect.runtime import flow_run

from alpaca_core.metering import Speed

MOST_RUNS = 100
"""Runs that are kept in mind; most leave a page, which takes theirs out."""

_lock = threading.Lock()
_by_run: "OrderedDict[str, list[Speed]]" = OrderedDict()


def note(speed: Speed) -> None:
    """Keep in mind how fast a task of this flow run was; outside a run, nothing."""
    if run := flow_run.id:
        with _lock:
            _by_run.setdefault(run, []).append(speed)
            while len(_by_run) > MOST_RUNS:
                _by_run.popitem(last=False)


def speed_of_run(rows: int) -> Speed | None:
    """Add up what the tasks of this flow run did for so many rows of its own, and forget it.

    Returns:
        None outside a run, and where its tasks ran in other processes. `seconds` are those that the tasks
        took in sum, waiting for a model to be loaded left out.
    """
    with _lock:
        speeds = _by_run.pop(str(flow_run.id), [])
    if not speeds:
        return None
    return Speed(
        rows=rows,
        seconds=sum(speed.seconds for speed in speeds),
        tokens_read=sum(speed.tokens_read for speed in speeds),
        tokens_written=sum(speed.tokens_written for speed in speeds),
    )
