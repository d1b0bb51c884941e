"""A progress bar in a terminal, for any verb: ``with progress_bar("judge", len(texts)) as progress``."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from tqdm import tqdm

from alpaca_core.rows import Progress

TICK = 1.0
"""Seconds of work before a terminal shows a bar, and between two moves of its clock."""

_LOOK = "{desc}: {percentage:3.0f}% |{bar}| of {total_fmt} rows [{elapsed}<{remaining}]"


@contextmanager
def progress_bar(verb: str, rows: int) -> Iterator[Progress]:
    """Draw a bar on standard error where that is a terminal, and wipe it at the end.

    Its clock ticks even while no row finishes. Work that takes less than a second draws none.

    Args:
        verb: Stands beside the bar.
        rows: How many there are.

    Yields:
        What a verb takes as `progress`: a callable that takes the number of rows just finished.

    Example:
        >>> from alpaca_core import judge
        >>> from alpaca_core.testing import FakeModel
        >>> with progress_bar("judge", 2) as progress:
        ...     rows = judge(FakeModel({"Yes": 0.9, "No": 0.1}), ["Is it?", "Is that?"], progress=progress)
    """
    over = threading.Event()

    def tick() -> None:
        while not over.wait(TICK):
            bar.delay = 0.0  # from now on there is something to wipe, which tqdm tells by its own updates alone
            bar.refresh()

    width, height = Console(stderr=True).size  # tqdm draws nothing in a terminal that does not tell its size
    with tqdm(
        total=rows,
        desc=verb,
        bar_format=_LOOK,
        ncols=width - 1,
        nrows=height,
        delay=TICK,
        disable=None,
        leave=False,
        file=sys.stderr,
    ) as bar:
        clock = threading.Thread(target=tick, daemon=True)
        if not bar.disable:
            clock.start()
        try:
            yield bar.update
        finally:
            over.set()
            if not bar.disable:
                clock.join()
