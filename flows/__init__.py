"""Tasks chained into flows that deploy as they are, and the command line.

Flows are imported when they are first named: the command line lives here too, and starts without Prefect.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_alpaca.flows.answering import answer_question
    from prefect_alpaca.flows.cascading import cascade_texts
    from prefect_alpaca.flows.choosing import generate_and_judge
    from prefect_alpaca.flows.judging import classify_texts, judge_texts
    from prefect_alpaca.flows.uses import compare_texts, find_outliers, rate_texts

__all__ = [
    "answer_question",
    "cascade_texts",
    "classify_texts",
    "compare_texts",
    "find_outliers",
    "generate_and_judge",
    "judge_texts",
    "rate_texts",
]

_ROOMS = {
    "answer_question": "answering",
    "cascade_texts": "cascading",
    "classify_texts": "judging",
    "compare_texts": "uses",
    "find_outliers": "uses",
    "generate_and_judge": "choosing",
    "judge_texts": "judging",
    "rate_texts": "uses",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
