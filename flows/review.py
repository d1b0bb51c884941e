"""The review band of a policy: a table of its own, and a pause in which a person gives its labels."""

from collections.abc import Sequence
from typing import Any, Literal

from prefect.artifacts import create_table_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field, create_model

from alpaca_core import Calibration, Policy, RowError
from alpaca_core.errors import InvalidRequest
from prefect_alpaca.flows.report import MOST_CELL_CHARACTERS, MOST_TABLE_ROWS, cut
from prefect_alpaca.flows.routing import Routed
from prefect_alpaca.flows.terminal import printable
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.named import load_named
from prefect_alpaca.tasks.rows import counted

MOST_ASKED = 50
"""Rows that a person is asked about at once; where more are to be reviewed the run pauses again."""

MOST_NAMED = 3
"""Labels whose probabilities stand beside a row that a person is asked about."""

INTERVAL = 5
"""Seconds between two looks whether a person has answered, each of which is a request to the Prefect API."""


def saved_policy(name: str | None, calibration: Calibration | None, *, ask_a_person: bool) -> Policy | None:
    """Return the policy of a name, None for none.

    Raises:
        InvalidRequest: If there is none of that name, if it is for judgments of another calibration, or if a
            person is to be asked without one.
    """
    if not name:
        if ask_a_person:
            raise InvalidRequest(
                "ask_a_person asks about the rows that a policy sends to review, but policy is None. "
                "Name a policy, or ask nobody."
            )
        return None
    policy = load_named(Policy, name)
    policy.check(calibration.digest if calibration else None)
    return policy


def leave_review(key: str, rows: Sequence[tuple[Routed | RowError, Json]]) -> None:
    """Leave the review band as a table artifact named `key` and ``-review``; empty where nothing is in it.

    Args:
        key: Of the flow's page.
        rows: All rows, each with its line of the flow's table.
    """
    band = [{"row": place, **line} for place, (row, line) in enumerate(rows, 1) if in_review(row)]
    about = f"{counted(len(band), 'text')} that a person should look at; row counts from 1."
    create_table_artifact(band[:MOST_TABLE_ROWS], key=f"{key}-review", description=about)


def in_review(row: Routed | RowError) -> bool:
    """Whether a policy sends a row to a person."""
    return isinstance(row, Routed) and row.action == "review"


def ask_person(
    rows: Sequence[Routed | RowError], timeout: int
) -> tuple[list[Routed | RowError], FlowPauseTimeout | None]:
    """Pause the flow run until a person has given the labels of the review band, and take them over.

    The run's process waits, with its model. The person resumes the run in the UI, whose form offers the labels
    of each row and begins with the model's; or by the API.

    Args:
        rows: All of them; those that are not to be reviewed come back as they are.
        timeout: Seconds to wait for each `MOST_ASKED` rows.

    Returns:
        The rows with the labels that were given; and the error, if nobody gave the others in time, since what
        there is by then is worth showing.
    """
    decided = list(rows)
    band = [place for place, row in enumerate(rows) if in_review(row)]
    for start in range(0, len(band), MOST_ASKED):
        asked = {place: row for place in band[start:][:MOST_ASKED] if isinstance(row := rows[place], Routed)}
        form = _form(asked, start, len(band))
        try:
            given = pause_flow_run(wait_for_input=form, timeout=timeout, poll_interval=INTERVAL)
        except FlowPauseTimeout as error:
            return decided, error
        for place, row in asked.items():
            decided[place] = row.model_copy(
                update={"label": getattr(given, _field(place)), "decided_by": "person"},
            )
    return decided, None


def _form(asked: dict[int, Routed], start: int, total: int) -> type[RunInput]:
    """One choice for each row, beginning with the model's label."""
    fields: dict[str, Any] = {}
    for place, row in asked.items():
        likeliest = sorted(row.probabilities.items(), key=lambda item: -item[1])[:MOST_NAMED]
        fields[_field(place)] = (
            Literal[tuple(row.probabilities)],
            Field(
                default=row.label,
                title=f"{place + 1}. {printable(cut(row.text, MOST_CELL_CHARACTERS))}",
                description=", ".join(f"{printable(name)} {share:.2f}" for name, share in likeliest),
            ),
        )
    form: type[RunInput] = create_model("Review", __base__=RunInput, **fields)
    some = f"{start + 1} to {start + len(asked)} of {total:,}" if total > len(asked) else f"{total:,}"
    return form.with_initial_data(
        description=f"Which label is right? To be reviewed: {some}. Each begins with the model's label."
    )


def _field(place: int) -> str:
    return f"row_{place + 1}"
