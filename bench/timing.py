"""Ways to do one work, timed in turn; what fails, and what takes too long, is told and not the end of a run."""

import gc
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Way = Callable[[], int]
"""Does some work, and says how much: tokens or items. A slow way may do less than others of the same case."""


OURS = "ours"


class Left(Exception):
    """Why a way is not measured: not installed, or not for this machine."""


class TooLong(BaseException):
    """A way took longer than it may; no `Exception`, since some of others' loops log and forget every one of these."""


class Figures:
    """What was measured, written after every measurement, so that a run that is cut off keeps what it has.

    Args:
        out: The JSON file; None writes none. What it holds from an earlier run is kept, section by section.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self.found: dict[str, Any] = {"sections": {}}
        if out and out.exists():
            self.found = json.loads(out.read_text(encoding="utf-8"))

    def put(self, *path: Any) -> None:
        """Put a value, the last argument, under the names before it."""
        *names, last, value = path
        place = self.found
        for name in names:
            place = place.setdefault(name, {})
        place[last] = value
        if self._out:
            self._out.write_text(json.dumps(self.found, indent=1), encoding="utf-8")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block after some seconds; only the main thread can be interrupted so."""

    def end(*_: object) -> None:
        raise TooLong(f"took longer than the {seconds:.0f} s that were left")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why(error: BaseException) -> str:
    """Say in a line what an exception was, and where."""
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{place}"


def in_turn(
    ways: dict[str, Way],
    repeat: int,
    seconds: float,
    put: Callable[[str, dict[str, Any]], None],
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Time ways one after the other, several times over; the best of each counts.

    Args:
        ways: By name; `OURS` is never left out for time.
        repeat: Rounds. Before the first each way runs once; that call compiles and captures, and is told as
            `first_s`, and counts only where there was time for no other.
        seconds: Of all others together, from when on nothing is begun; a call is ended where it takes more than three
            fifths of what is left.
        put: Called with a name and its entry after each measurement.
        prepare: Called before each measurement, as long as it may take.

    Returns:
        For each way `per_s`, and `units` and `seconds` of its best call; or why there is no figure: ``failed``
        or ``left_out``.
    """
    end = time.perf_counter() + seconds
    found: dict[str, dict[str, Any]] = {}
    last = next(reversed(ways), None)
    for place in range(repeat + 1):
        for name, way in ways.items():
            entry = found.setdefault(name, {})
            begin = time.perf_counter()
            prepare()
            end += time.perf_counter() - begin
            left = end - time.perf_counter()
            if "failed" in entry or "left_out" in entry or (left <= 0 and place > (name == OURS)):
                continue
            if name == OURS:
                start = time.perf_counter()
                _measure(way, entry, place, 1e6)
                end += time.perf_counter() - start
            elif left <= 0:
                entry["left_out"] = f"the {seconds:.0f} s of this case were over"
            else:
                _measure(way, entry, place, left if name == last else max(0.6 * left, 1.0))
            put(name, entry)
    return found


def _measure(way: Way, entry: dict[str, Any], place: int, left: float) -> None:
    try:
        if place == 0:
            settle()
        start = time.perf_counter()
        with limited(left):
            units = way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        took = time.perf_counter() - start
    except Left as reason:
        entry["left_out"] = str(reason)
    except (Exception, TooLong) as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        settle()
        if place == 0:
            entry["failed"] = why(error)
        elif "note" not in entry:
            entry["note"] = f"a later call failed: {why(error)}"
    else:
        if place == 0:
            entry |= {"first_s": round(took, 3), "note": "of its first call, which warms up and compiles"}
        elif entry.get("note", "").startswith("of its first"):
            del entry["note"], entry["per_s"]
        if units / took > entry.get("per_s", 0.0):
            entry |= {"per_s": units / took, "units": units, "seconds": took}


def settle() -> None:
    """Give back the memory that nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
