"""A judgment together with what a policy says to do with it, as flows and the command line return it."""

from collections.abc import Sequence
from typing import Literal

from alpaca_core import Decision, Judgment, Policy, RowError, decide
from alpaca_core.deciding import Action
from alpaca_core.rows import map_rows


class Routed(Judgment):
    """A judgment, what is done with it, and who gave its label.

    `action` and `confidence` are those of `decide`. Where a person decided, `label` is the person's, and all
    other fields stay the model's.
    """

    action: Action
    confidence: float
    decided_by: Literal["model", "person"] = "model"


def route(judgments: Sequence[Judgment | RowError], policy: Policy) -> list[Routed | RowError]:
    """Accept, review or abstain from each judgment.

    Raises:
        InvalidRequest: For judgments of another calibration than the policy's.
    """

    def routed(judgment: Judgment, decision: Decision) -> Routed:
        return Routed(**judgment.model_dump(), action=decision.action, confidence=decision.confidence)

    return map_rows(routed, judgments, decide(judgments, policy))


def statement(policy: Policy) -> str:
    """Say in a sentence or two what a policy accepts and reviews, and what holds for it."""
    wanted, rows = f"at least {policy.precision:.4g} of the labels are right", f"{policy.rows:,} labelled rows"
    if policy.accept is None:
        accepts = f"nothing is accepted, since no probability was found from which {wanted} (in {rows})"
    else:
        accepts = (
            f"a label is accepted from probability {policy.accept:.3f} on, where {wanted} "
            f"(confidence {policy.confidence:.4g}; {policy.accepted:,} of {rows} were accepted)"
        )
    others = f"others go to a person from {policy.review:.3f} on" if policy.review else "all others go to a person"
    return f"{accepts}; {others}."
