"""The tasks: the core's verbs under their own names, JSON out, nothing cached."""

import inspect
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from prefect import flow
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

import alpaca_core
from alpaca_core import (
    CascadeJudgment,
    Completion,
    Conclusion,
    Judgment,
    Label,
    ModelSpec,
    Outlier,
    Rating,
    RowError,
    Sampling,
    Verification,
)
from alpaca_core.cascading import reasoned_question
from alpaca_core.errors import InvalidRequest
from alpaca_core.spec import Value
from alpaca_core.testing import FakeModel
from prefect_alpaca import tasks
from tests.waiting import until

VERBS = [
    *("generate", "chain_of_thought", "conclude", "verify", "judge", "cascade"),
    *("classify", "same_meaning", "is_outlier", "rate"),
]
FAKE = FakeModel({"Yes": {"Yes": 0.9, "No": 0.1}, "?": {"Yes": 0.75, "No": 0.25, "Who knows": 0.5}}, "Because.")
GOOD_AND_BAD = ["Is it so?", "   ", "Say Yes.", "\ud800"]
CALLS: list[tuple[str, type[Value], tuple[Any, ...], dict[str, Any]]] = [
    ("generate", Completion, (GOOD_AND_BAD, Sampling(temperature=1.0)), {"sample_indices": [3, 1, 4, 1]}),
    ("generate", Completion, (["Add"], Sampling(max_new_tokens=2)), {"inputs": ["1 and 1"], "template": "alpaca-lora"}),
    ("chain_of_thought", Completion, (GOOD_AND_BAD,), {}),
    ("conclude", Conclusion, (GOOD_AND_BAD, ["Since.", None, None, ""]), {}),
    ("verify", Verification, (GOOD_AND_BAD, ["a", "b", "c", "d"]), {"reasonings": None}),
    ("verify", Verification, (["Is it so?"], ["so"]), {"method": "sampled", "samples": 4, "seed": 7}),
    ("verify", Verification, (GOOD_AND_BAD, ["a"] * 4), {"method": "consistent", "samples": 3, "seed": 7}),
    ("judge", Judgment, (GOOD_AND_BAD,), {}),
    ("judge", Judgment, (GOOD_AND_BAD, ["Yes", "No", "Who knows"]), {"instruction": "Which?", "min_coverage": 0.5}),
    ("cascade", CascadeJudgment, (GOOD_AND_BAD,), {"margin": 0.6, "sampling": Sampling(max_new_tokens=8)}),
    ("cascade", CascadeJudgment, (GOOD_AND_BAD, ["Yes", "Who knows"]), {"margin": 1, "instruction": "Which?"}),
    ("classify", Judgment, (GOOD_AND_BAD, ["Yes", "No"]), {"min_coverage": 0.95}),
    ("same_meaning", Judgment, (GOOD_AND_BAD, ["a", "b", "c", "d"]), {"template": "raw"}),
    ("is_outlier", Outlier, (GOOD_AND_BAD, ["It is.", "So it is."]), {}),
    ("is_outlier", Outlier, (["Nothing to say"], ["It is.", "So it is."]), {}),
    ("rate", Rating, (GOOD_AND_BAD, "Is it short"), {"worst": 0, "best": 10}),
]


@pytest.mark.parametrize("verb", VERBS)
def test_a_task_takes_what_its_verb_takes_with_a_spec_for_the_model(verb: str) -> None:
    core = dict(inspect.signature(getattr(alpaca_core, verb)).parameters)
    task = dict(inspect.signature(getattr(tasks, verb).fn).parameters)
    assert task.pop("model").annotation is ModelSpec
    del core["model"], core["progress"]
    assert list(task) == list(core)
    assert [each.default for each in task.values()] == [each.default for each in core.values()]
    assert [each.kind for each in task.values()] == [each.kind for each in core.values()]


@pytest.mark.parametrize(("verb", "kind", "arguments", "settings"), CALLS)
def test_a_task_returns_the_verbs_values_as_json(
    verb: str, kind: type[Value], arguments: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    expected = getattr(alpaca_core, verb)(FAKE, *arguments, **settings)
    with tasks.use_model(FAKE):
        rows = getattr(tasks, verb).fn(ModelSpec(), *arguments, **settings)
    assert json.loads(json.dumps(rows)) == rows
    assert tasks.values(kind, rows) == expected


@pytest.mark.parametrize("verb", [*VERBS, "load_model"])
def test_nothing_is_cached_and_results_are_stored_as_json(verb: str) -> None:
    task = getattr(tasks, verb)
    assert task.cache_policy == NO_CACHE
    assert task.result_serializer == "json"


def test_load_model_returns_the_models_status() -> None:
    with tasks.use_model(FAKE):
        status = tasks.load_model.fn(ModelSpec())
    assert status["digest"] == FAKE.info.digest
    assert {"name", "device", "dtype", "memory_gib", "load_seconds", "adapters"} <= set(status)
    assert json.loads(json.dumps(status)) == status


def test_rows_that_failed_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with tasks.use_model(FAKE), caplog.at_level(logging.INFO, "prefect.alpaca"):
        logging.getLogger("prefect").propagate = True
        try:
            rows = tasks.judge.fn(ModelSpec(), GOOD_AND_BAD)
        finally:
            logging.getLogger("prefect").propagate = False
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    failed = [row for row in tasks.values(Judgment, rows) if isinstance(row, RowError)]
    assert len(failed) == 2
    assert warnings == [f"2 of 4 rows failed; the first, row 2: {failed[0].message}"]


def test_what_a_task_takes_may_have_become_json() -> None:
    labels = [Label(name="Yes", aliases=("y",)), Label(name="No")]
    fitted = alpaca_core.fit_calibration(FAKE, ["Is it?"] * 10, labels, instruction="Which?")
    again = alpaca_core.fit_calibration(FAKE, ["Is it?"] * 10, labels, instruction=reasoned_question())
    expected = alpaca_core.classify(FAKE, ["Is it?"], labels, instruction="Which? {text}")
    model = json.loads(ModelSpec().model_dump_json())
    with tasks.use_model(FAKE):
        plain = [json.loads(label.model_dump_json()) for label in labels]
        rows = tasks.classify.fn(model, ["Is it?"], plain, instruction="Which? {text}")
        judged = tasks.judge.fn(
            model, ["Is it?"], labels, instruction="Which?", calibration=json.loads(fitted.model_dump_json())
        )
        cascaded = tasks.cascade.fn(
            model, ["Is it?"], labels, margin=1, reasoned_calibration=json.loads(again.model_dump_json())
        )
    assert tasks.values(Judgment, rows) == expected
    assert judged[0]["calibration"] == fitted.digest
    assert cascaded[0]["calibration"]


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("rows", [None, 5, "one text", b"bytes", {"a"}, iter(["a"])])
@pytest.mark.parametrize("verb", ["generate", "chain_of_thought", "conclude", "judge"])
def test_a_batch_that_is_no_list_fails_before_the_model_is_loaded(
    verb: str, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow
    def call() -> None:
        getattr(tasks, verb)(ModelSpec(), rows)

    monkeypatch.setattr(alpaca_core, "load_model", pytest.fail)
    with pytest.raises(InvalidRequest, match="rows is a list of rows, but got"):
        call()


@pytest.mark.parametrize("verb", ["generate", "chain_of_thought", "conclude", "judge", "cascade"])
def test_a_batch_without_rows_gives_none(verb: str) -> None:
    with tasks.use_model(FAKE):
        assert getattr(tasks, verb).fn(ModelSpec(), []) == []


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("classify", ("one text", ["a", "b"])),
        ("same_meaning", ("one text", ["b"])),
        ("is_outlier", ({"a"}, ["b", "c"])),
        ("rate", (None, "Is it?")),
    ],
)
def test_a_use_of_no_list_fails_before_the_model_is_loaded(
    verb: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alpaca_core, "load_model", pytest.fail)
    with pytest.raises(InvalidRequest, match="rows is a list of rows, but got"):
        getattr(tasks, verb).fn(ModelSpec(), *arguments)


@pytest.mark.usefixtures("prefect_api")
def test_runs_are_named_by_what_they_do() -> None:
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (tasks.load_model, (), "load smollm2-135m-instruct"),
        (tasks.generate, (["a", "b"],), "generate 2 responses"),
        (tasks.chain_of_thought, (["a"],), "reason about 1 question"),
        (tasks.conclude, (["a"],), "conclude 1 question"),
        (tasks.verify, (["a"], ["b"]), "verify 1 answer"),
        (tasks.judge, (["a"] * 12,), "judge 12 texts"),
        (tasks.cascade, (["a"] * 3,), "cascade 3 texts"),
        (tasks.classify, (["a"], ["b", "c"]), "classify 1 text"),
        (tasks.same_meaning, (["a"] * 2, ["b"] * 2), "compare 2 pairs"),
        (tasks.is_outlier, (["a"] * 3, ["b", "c"]), "look for outliers in 3 rows"),
        (tasks.rate, (["a"] * 2, "Is it?"), "rate 2 texts"),
    ]

    @flow
    def all_of_them() -> str:
        from prefect.runtime import flow_run

        for task, rows, _ in calls:
            task(ModelSpec(), *rows)
        return str(flow_run.id)

    with tasks.use_model(FAKE):
        run = all_of_them()
    own = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    with get_client(sync_client=True) as client:
        # Prefect's server writes task runs down from events, which it reads when it comes to them
        ran = until(lambda: len(found := client.read_task_runs(flow_run_filter=own)) >= len(calls) and found, 60.0)
    assert sorted(each.name for each in ran) == sorted(name for _, _, name in calls)
