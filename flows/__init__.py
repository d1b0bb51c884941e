"""Tasks chained into flows that deploy as they are, and the command line.

Flows are imported when they are first named: the command line lives here too, and starts without Prefect.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_alpaca.flows.answering import answer_question
    from prefect_alpaca.flows.choosing import generate_and_judge
    from prefect_alpaca.flows.judging import judge_texts

__all__ = ["answer_question", "generate_and_judge", "judge_texts"]

_ROOMS = {"answer_question": "answering", "generate_and_judge": "choosing", "judge_texts": "judging"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
