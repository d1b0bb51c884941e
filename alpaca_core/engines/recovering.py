"""What is done where memory runs out: try again, take fewer rows at once, take smaller passes, give one row up.

In this order:

1. A pass that runs out of memory gives back what is spare and runs again, a few times. It has changed nothing
   that it does not write again.
2. Then fewer rows are taken at once, half of them each time, in passes of the same shape: that finds the row at
   fault where it is one, and leaves its neighbours alone. The others wait until a row has come out.
3. Where one row alone fails, passes take the next smaller shape. Rows on their way begin again, so that each
   result comes of one shape.
4. A row that fails alone at the smallest shape gets an error. Where no row had come out since the shapes began to
   shrink, it was that row and not the shape, and the shape from before is taken again; of several such rows one
   after the other, when the next row has come out.

Each failure leaves fewer rows at once, a smaller shape or fewer rows, and only a row that has come out or was given
up undoes the first two, so there is an end.
"""

import gc
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from alpaca_core.engines.shapes import Shape
from alpaca_core.errors import RowRejected

ATTEMPTS = 6
"""Times that a pass is run before it counts as too large."""

_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of the errors that torch has no class for."""

_collect_after = 0.0
_passes = 0

_Found = TypeVar("_Found")


class ShortOfMemory(Exception):
    """A pass ran out of memory again and again."""


def passes() -> int:
    """Count the passes that this process has run: while rows run, the number grows as long as the engine gets on.

    Each brings a token or scores to all rows that are in it, or reads a part of their prompts.
    """
    return _passes


def count_pass() -> None:
    """Note that a pass has been run, where that is not done by `persevere`."""
    global _passes
    _passes += 1


class Stopped(BaseException):
    """Memory ran out in a step of a library that takes each `Exception` for one tensor's and goes on to the next."""


def ran_out(error: BaseException | None) -> bool:
    """Say whether an error, or one that it came of, means that memory ran out.

    A CUDA graph's capture that runs out ends in another error on top.
    """
    while error is not None:
        if isinstance(error, ShortOfMemory | torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES):
            return True
        error = error.__context__
    return False


def persevere(run: Callable[[], _Found], device: torch.device) -> _Found:
    """Run a pass; where memory runs out, give back what is spare and run it again.

    Args:
        run: A pass that may be run again after it has failed.
        device: Where memory is given back.

    Raises:
        ShortOfMemory: After `ATTEMPTS` times.
    """
    for attempt in range(ATTEMPTS):
        try:
            found = run()
        except Exception as error:
            if not ran_out(error):
                raise
            message = str(error)
        else:
            count_pass()
            return found
        # Out here the error is gone, and with it the frames that hold the failed pass's tensors.
        if attempt == 1:
            _collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise ShortOfMemory(message)


def _collect() -> None:
    """Collect garbage, but not for more than a tenth of the time: it takes as long as passes, and seldom helps."""
    global _collect_after
    started = time.monotonic()
    if started >= _collect_after:
        gc.collect()
        _collect_after = started + 10 * (time.monotonic() - started)


def too_large(tokens: int, device: torch.device) -> RowRejected:
    """Make the error of a row that finds no memory even alone; `tokens` is what it may hold in all."""
    return RowRejected(
        "not_enough_memory",
        f"a row of {tokens:,} tokens, its response counted, needs more memory than {device} has left, even alone. "
        "Lower max_new_tokens or num_beams, shorten the prompt or the labels, or load the model in fewer bits.",
    )


class Worker(Protocol):
    """Whoever runs rows, step by step; `Recovery` tells it what to do where memory is short."""

    shape: Shape
    finished: int  # rows that have come out

    def advance(self) -> None:
        """Take a step, if there is one to take.

        Raises:
            ShortOfMemory: If one row alone ran out of memory. It is the first in line again.
        """
        ...

    def begin_again(self, shape: Shape) -> None:
        """Put all rows on their way back in line, and take this shape from now on."""
        ...

    def give_up(self) -> None:
        """End the first row in line with an error."""
        ...


class Recovery:
    """The shape that all workers of a model have now. Its methods are called under a lock.

    Args:
        shape: The first and largest.
        changed: Called after the shape has become another.

    Attributes:
        shape: What passes have now.
    """

    def __init__(self, shape: Shape, changed: Callable[[Shape], None]) -> None:
        self.shape = shape
        self._changed = changed
        self._before: Shape | None = None  # where the shapes began to shrink, if no row has come out since
        self._given_up = 0  # rows since the last one that came out

    def advance(self, worker: Worker) -> None:
        """Let a worker take a step; where memory is short, change what the next one takes."""
        if worker.shape != self.shape:
            worker.begin_again(self.shape)
        finished = worker.finished
        try:
            worker.advance()
            return
        except ShortOfMemory:
            pass
        finally:
            if worker.finished > finished:
                if self._given_up > 1:
                    self._return(worker)
                self._before, self._given_up = None, 0
        if (smaller := self.shape.smaller) is not None:
            self._before = self._before or self.shape
            self._take(smaller, worker)
        else:
            worker.give_up()
            self._given_up += 1
            if self._given_up == 1:  # the way down again for each of many rows would take long
                self._return(worker)

    def _return(self, worker: Worker) -> None:
        """Take the shape from before rows were given up: it was them."""
        if self._before is not None:
            self._take(self._before, worker)
            self._before = None

    def _take(self, shape: Shape, worker: Worker) -> None:
        self.shape = shape
        worker.begin_again(shape)
        self._changed(shape)
