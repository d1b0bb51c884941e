"""A calibration: what is done to the labels' log-probabilities, bound to what it was fitted on."""

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from alpaca_core.errors import InvalidRequest
from alpaca_core.labels import log_sum
from alpaca_core.spec import Value, check_kind, digest_of

CalibrationMethod = Literal["none", "contextual", "batch", "pride", "base", "temperature", "vector"]

FLOOR = -50.0
"""Log-probability, in nats, below which a label's own is not told apart: what has no mass has no logarithm."""


class Binding(Value):
    """What a calibration holds for, each by digest: `question` covers template, instruction and counting."""

    model: str
    adapter: str | None
    question: str
    labels: tuple[str, ...]


class Calibration(Value):
    """Makes probabilities of labels mean what they say, for one model and one question.

    A label's log-probability z becomes ``scale * z + bias``, and all of them are then made to sum to 1.
    Coverage stays as it is. A row's result depends on this value and on the row, on no other row.

    Args:
        method: How it was fitted; see `fit_calibration`. ``none`` changes nothing.
        scale: For each label, at least 0; an inverse temperature.
        bias: For each label, in nats.
        bound: What it was fitted on; it applies to nothing else.
        rows: How many rows it was fitted on.
        nll: Cross-validated mean negative log-likelihood in nats, where rows had labels.
        reason: Why this method.
    """

    method: CalibrationMethod
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    bound: Binding
    rows: int = Field(ge=0)
    nll: float | None = None
    reason: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not len(self.scale) == len(self.bias) == len(self.bound.labels):
            raise ValueError(
                f"a calibration has a scale and a bias for each of its {len(self.bound.labels)} labels, but got "
                f"{len(self.scale)} and {len(self.bias)}."
            )
        if any(scale < 0 for scale in self.scale):
            raise ValueError(f"a scale is at least 0, but got {min(self.scale)}.")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 over the whole value; hexadecimal."""
        return digest_of(self.model_dump(mode="json"))

    def check(self, bound: Binding) -> None:
        """Refuse another model, adapter, question or other labels.

        Raises:
            InvalidRequest: With what differs.
        """
        for name in ("model", "adapter", "labels", "question"):
            own, other = getattr(self.bound, name), getattr(bound, name)
            if own != other:
                raise InvalidRequest(
                    f"a calibration holds for what it was fitted on, but this one has the {name} {_short(own)}, "
                    f"and is asked to hold for {_short(other)}. Fit one for that {name}."
                )

    def apply(self, log_masses: Sequence[float]) -> list[float]:
        """Return calibrated log-probabilities, in nats, of labels whose log masses are given."""
        z = log_probabilities(log_masses)
        scores = [scale * each + bias for scale, each, bias in zip(self.scale, z, self.bias, strict=True)]
        total = log_sum(scores)
        return [score - total for score in scores]


def check_calibration(calibration: object, bound: Binding) -> None:
    """Refuse a calibration that holds for something else, or is none; None is fine.

    Raises:
        InvalidRequest: With what differs.
    """
    if calibration is not None:
        remedy = "Fit one with fit_calibration, or read its JSON with Calibration.model_validate."
        check_kind("calibration", calibration, Calibration, remedy).check(bound)


def log_probabilities(log_masses: Sequence[float]) -> list[float]:
    """Normalise log masses, in nats, to log-probabilities of at least `FLOOR`; all equal where none has any."""
    total = log_sum(log_masses)
    if total == -math.inf:
        return [-math.log(len(log_masses))] * len(log_masses)
    return [max(mass - total, FLOOR) for mass in log_masses]


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else f"{value!r:.80}"
