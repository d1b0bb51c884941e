"""The models of this process: each opened once, here or at a host, and shared by every task that runs here.

Specs that differ only in their template share one. A model is kept until the process ends; at a host it stays warm.
"""

import atexit
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger

import alpaca_core
from alpaca_core import Completion, LanguageModel, ModelSpec, RowError
from alpaca_core.model import GenerateRow, ModelInfo, ScoreRow
from alpaca_core.spec import TemplateName
from alpaca_core.tokenizer import Tokenizer

# A lock and not functools.cache: under the thread runner a cached loader ran once in each of four threads.
_lock = threading.Lock()
_models: dict[ModelSpec, LanguageModel] = {}
_open = ExitStack()
_stand_ins: dict[object, LanguageModel] = {}
atexit.register(_open.close)


def loaded(spec: ModelSpec) -> LanguageModel:
    """Return this process's model of a spec, loading it where no task has yet."""
    stand_ins = list(_stand_ins.values())  # a copy: another thread may end its block meanwhile
    if stand_ins:
        return stand_ins[-1]
    # A template decides no weight. A batch size does not either, but belongs to the engine, as its adapter in use does.
    recipe = spec.model_copy(update={"template": "auto"})
    with _lock:
        if recipe not in _models:
            run_logger().info("Loading %s, or finding it warm", spec.base_model)
            _models[recipe] = _open.enter_context(alpaca_core.load_model(recipe))
        model = _models[recipe]
    return model if spec == recipe else _Templated(model, spec.template)


@dataclass(frozen=True, slots=True)
class _Templated:
    """A model that is asked by another template: the same weights, another `info`."""

    model: LanguageModel
    template: TemplateName

    @property
    def info(self) -> ModelInfo:
        return self.model.info.model_copy(update={"template": self.template})  # which may change: its shape does

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    def generate(self, rows: Sequence[GenerateRow]) -> Iterator[tuple[int, Completion | RowError]]:
        return self.model.generate(rows)

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> Iterator[tuple[int, list[float] | RowError]]:
        return self.model.loglikelihood(rows)


@contextmanager
def use_model(model: LanguageModel) -> Iterator[LanguageModel]:
    """Let every task of this process use `model`, whatever its spec says, until the block ends.

    It is how flows are tested without a model, and how a model that is loaded already is used.

    Args:
        model: An `alpaca_core.testing.FakeModel`, or any loaded model.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> from prefect_alpaca.tasks import judge
        >>> with use_model(FakeModel({"goal": {"Sports": 0.9, "World": 0.1}})):
        ...     judge.fn(ModelSpec(), ["A late goal."], ["World", "Sports"])[0]["label"]
        'Sports'
    """
    block = object()  # and not the model, which an outer block may use too
    _stand_ins[block] = model
    try:
        yield model
    finally:
        del _stand_ins[block]


def run_logger() -> "logging.Logger | logging.LoggerAdapter[Any]":
    """Return the run's logger; outside a run, as in a call of a task's ``fn``, one that Prefect does not send."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("alpaca")
