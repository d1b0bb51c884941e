"""How a host behaves, as its environment says."""

import math
import os
from dataclasses import dataclass, replace

from alpaca_core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Settings:
    """How a host behaves. Times in seconds.

    Args:
        hang: Without a sign of life from a busy engine for so long, it is replaced.
        idle: The host exits after so long with nothing to do; None is never.
        queue: Rows that may wait.
        fixed: Serve the spec's own adapters, and load no others on a client's word.
    """

    hang: float = 120.0
    idle: float | None = 1800.0
    queue: int = 100_000
    fixed: bool = False

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read ``ALPACA_HOST_HANG``, ``ALPACA_HOST_IDLE`` (seconds) and ``ALPACA_HOST_QUEUE`` (rows).

        Raises:
            InvalidRequest: For what is no number above 0.
        """
        found = cls()
        return replace(
            found,
            hang=_number("ALPACA_HOST_HANG", found.hang),
            idle=_number("ALPACA_HOST_IDLE", found.idle or 0),
            queue=math.ceil(_number("ALPACA_HOST_QUEUE", found.queue)),
        )

    def served(self) -> "Settings":
        """These, for a host that others reach over a network: it stays, and loads nothing on their word."""
        return replace(self, idle=None, fixed=True)


def _number(name: str, otherwise: float) -> float:
    text = os.environ.get(name, "")
    try:
        number = float(text) if text else otherwise
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise InvalidRequest(f"{name} is a number above 0, but is {text!r:.40}. Set it, or unset it.")
    return number
