"""The process's models: loaded once, whoever asks, and replaceable for tests."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import pytest
from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

import alpaca_core
from alpaca_core import LanguageModel, ModelSpec
from alpaca_core.testing import FakeModel
from prefect_alpaca import tasks
from prefect_alpaca.tasks import model as room


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModelSpec]]:
    """Every load that happens; each takes a moment, as real ones do."""
    happened: list[ModelSpec] = []

    @contextmanager
    def load(spec: ModelSpec) -> Iterator[LanguageModel]:
        happened.append(spec)
        time.sleep(0.05)
        yield FakeModel({"?": {"Yes": 0.75, "No": 0.25}})

    monkeypatch.setattr(alpaca_core, "load_model", load)
    monkeypatch.setattr(room, "_models", {})
    with ExitStack() as opened:
        monkeypatch.setattr(room, "_open", opened)
        yield happened


def test_threads_that_ask_at_once_share_one_load(loads: list[ModelSpec]) -> None:
    barrier = threading.Barrier(8)

    def ask(_: int) -> LanguageModel:
        barrier.wait()
        return room.loaded(ModelSpec())

    with ThreadPoolExecutor(8) as pool:
        models = set(map(id, pool.map(ask, range(8))))
    assert len(models) == len(loads) == 1


def test_each_spec_is_loaded_once_and_kept_warm(loads: list[ModelSpec]) -> None:
    first, second = ModelSpec(), ModelSpec(batch_size=1)
    assert room.loaded(first) is room.loaded(ModelSpec())
    assert room.loaded(second) is not room.loaded(first)
    assert loads == [first, second]


def test_specs_of_one_model_and_several_templates_share_one_load(loads: list[ModelSpec]) -> None:
    texts = ["Is it so?", "### Response:"]
    asked = {template: room.loaded(ModelSpec(template=template)) for template in ("raw", "auto", "alpaca-lora", "raw")}
    assert loads == [ModelSpec()]
    base = asked["auto"]
    for template, model in asked.items():
        alpaca_core.model.check_model(model)
        if template != "auto":
            assert model.info == base.info.model_copy(update={"template": template})
            expected = alpaca_core.judge(base, texts, template=template)
            assert alpaca_core.judge(model, texts) == expected
            assert alpaca_core.generate(model, texts) == alpaca_core.generate(base, texts, template=template)
    assert [row.escaped for row in alpaca_core.judge(asked["raw"], texts)] == [False, False]
    assert [row.escaped for row in alpaca_core.judge(asked["alpaca-lora"], texts)] == [False, True]


def test_a_load_that_fails_is_tried_again_by_the_next_task(
    loads: list[ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def fail(spec: ModelSpec) -> Iterator[LanguageModel]:
        raise OSError("away")
        yield

    works = alpaca_core.load_model
    monkeypatch.setattr(alpaca_core, "load_model", fail)
    with pytest.raises(OSError, match="away"):
        room.loaded(ModelSpec())
    monkeypatch.setattr(alpaca_core, "load_model", works)
    assert room.loaded(ModelSpec()).info.name == "fake"


def test_use_model_replaces_every_spec_until_its_block_ends(loads: list[ModelSpec]) -> None:
    outer, inner = FakeModel("a"), FakeModel("b")
    with tasks.use_model(outer):
        with tasks.use_model(inner):
            assert room.loaded(ModelSpec()) is inner
        assert room.loaded(ModelSpec(batch_size=1)) is outer
    assert loads == []
    assert room.loaded(ModelSpec()) not in (outer, inner)


def test_a_model_that_is_used_twice_makes_room_for_the_one_between(loads: list[ModelSpec]) -> None:
    outer, inner = FakeModel("a"), FakeModel("b")
    with tasks.use_model(outer), tasks.use_model(inner):
        with tasks.use_model(outer):
            assert room.loaded(ModelSpec()) is outer
        assert room.loaded(ModelSpec()) is inner
    assert loads == []


@pytest.mark.parametrize("line", [1, 2, 3, 4])
def test_a_block_may_end_at_any_moment_of_another_threads_look(line: int, loads: list[ModelSpec]) -> None:
    block = ExitStack()
    block.enter_context(tasks.use_model(FakeModel("a")))
    seen = 0

    def end_block(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal seen
        if frame.f_code is not room.loaded.__code__:
            return None
        seen += event == "line"
        if seen == line:
            block.close()
        return end_block

    tracer = sys.gettrace()
    sys.settrace(end_block)
    try:
        assert room.loaded(ModelSpec()).info.name == "fake"
    finally:
        sys.settrace(tracer)
        block.close()


@pytest.mark.usefixtures("prefect_api")
def test_mapped_tasks_of_the_thread_runner_load_once(loads: list[ModelSpec]) -> None:
    @flow(task_runner=ThreadPoolTaskRunner(max_workers=4))
    def mapped() -> list[str]:
        batches = [[f"Is {number} even?"] for number in range(8)]
        return [rows[0]["label"] for rows in tasks.judge.map(unmapped(ModelSpec()), batches).result()]

    assert mapped() == ["Yes"] * 8
    assert loads == [ModelSpec()]
