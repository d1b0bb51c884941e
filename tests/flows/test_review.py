"""Policies in flows: rows are accepted, reviewed or abstained from, and a person may decide the review band."""

import contextvars
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import FlowPauseTimeout

import alpaca_core
from alpaca_core import Policy, RowError, decide, fit_calibration
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import classify_texts, judge_texts, review
from prefect_alpaca.flows.routing import Routed, route, statement
from prefect_alpaca.tasks import Json, use_model, values
from prefect_alpaca.tasks.named import save_named

from .conftest import Left, artifacts_of

pytestmark = pytest.mark.usefixtures("prefect_api")

FAKE = FakeModel(
    {
        "goal": {"Sports": 0.9, "World": 0.1},
        "treaty": {"World": 0.6, "Sports": 0.4},
        "strike": {"Sports": 0.55, "World": 0.45},
        "chip": {"World": 0.51, "Sports": 0.49},
        "nothing": "?",
    }
)
TEXTS = ["A goal.", "A <b>treaty</b> | signed", " ", "A chip.", "A strike.", "nothing"]
LABELS = ["World", "Sports"]
POLICY = Policy(accept=0.8, review=0.52, precision=0.9, confidence=0.95, rows=120, accepted=60, bound=0.91)
ACTIONS = ["accept", "review", None, "abstain", "review", "abstain"]


@pytest.fixture(autouse=True)
def saved(monkeypatch: pytest.MonkeyPatch) -> None:
    save_named("topics", POLICY)
    monkeypatch.setattr(review, "INTERVAL", 0.2)


def artifact(run: FlowRun, key: str) -> Any:
    with get_client(sync_client=True) as client:
        return json.loads(str(artifacts_of(client, run.id)[key]))


@contextmanager
def in_background(call: Callable[[], State[Any]]) -> Iterator[list[State[Any]]]:
    """A flow run in a thread; what it ended in stands in the list after the block."""
    ended: list[State[Any]] = []
    context = contextvars.copy_context()  # of the test API
    thread = threading.Thread(target=lambda: ended.append(context.run(call)))
    with use_model(FAKE):
        thread.start()
        yield ended
        thread.join(60)
    assert not thread.is_alive()


def paused(client: SyncPrefectClient, name: str, *, other_than: str = "") -> tuple[FlowRun, dict[str, Any], str]:
    """The paused run of a name, and the form that it shows, once it is there."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name]))):
            keys = run.state.state_details.run_input_keyset if run.state and run.state.is_paused() else None
            if keys and keys["schema"] != other_than:
                found = client.filter_flow_run_input(run.id, keys["schema"], 1, set())
                if found:
                    return run, json.loads(found[0].value), keys["schema"]
        time.sleep(0.1)
    raise TimeoutError(f"no run named {name} was paused")


def test_rows_are_routed_by_a_saved_policy(left: Left) -> None:
    expected = alpaca_core.judge(FAKE, TEXTS, LABELS, instruction="Topic?")
    with use_model(FAKE):
        rows = judge_texts(TEXTS, LABELS, "Topic?", show_labels=None, policy="topics")
    decisions = decide(expected, POLICY)
    for row, judgment, decision in zip(rows, expected, decisions, strict=True):
        if isinstance(judgment, RowError) or isinstance(decision, RowError):
            assert row == judgment.model_dump(mode="json")
        else:
            added = {"action": decision.action, "confidence": decision.confidence, "decided_by": "model"}
            assert row == judgment.model_dump(mode="json") | added
    assert [row.get("action") for row in rows] == ACTIONS
    run, page, table = left("judge-texts")
    assert [row["action"] for row in table] == ACTIONS
    assert all(set(row) == set(table[0]) for row in table)
    assert "1 accepted, 2 to review, 2 abstained" in page
    assert "Policy topics: a label is accepted from probability 0.800 on" in page
    assert "| abstain |" in page
    band = artifact(run, "judge-texts-review")
    assert [(row["row"], row["label"]) for row in band] == [(2, "World"), (5, "Sports")]
    assert "<b>" not in str(band)


def test_an_empty_review_band_is_an_empty_table(left: Left) -> None:
    with use_model(FAKE):
        classify_texts(["A goal."], LABELS, "Topic? {text}", policy="topics")
    assert artifact(left("classify-texts")[0], "classify-texts-review") == []


@pytest.mark.parametrize(("flow", "key"), [(judge_texts, "judge"), (classify_texts, "classify")])
def test_a_person_decides_the_review_band(flow: Any, key: str, left: Left) -> None:
    def call() -> State[Any]:
        done: State[Any] = flow(TEXTS, LABELS, policy="topics", ask_a_person=True, return_state=True)
        return done

    with in_background(call) as ended, get_client(sync_client=True) as client:
        run, form, _ = paused(client, f"{key} 6 texts")
        fields = form["properties"]
        assert list(fields) == ["row_2", "row_5"]
        assert fields["row_2"]["enum"] == LABELS
        assert [fields["row_2"]["default"], fields["row_5"]["default"]] == ["World", "Sports"]
        assert fields["row_2"]["title"] == "2. A <b>treaty</b> | signed"
        assert fields["row_5"]["description"] == "Sports 0.55, World 0.45"
        assert form.get("required", []) == []
        assert [row["row"] for row in artifact(run, f"{key}-texts-review")] == [2, 5], "to be read while it waits"
        wrong = client.resume_flow_run(run.id, run_input={"row_5": "Weather"})
        assert wrong.status == SetStateStatus.REJECT
        assert client.resume_flow_run(run.id, run_input={"row_5": "World"}).status == SetStateStatus.ACCEPT
    [state] = ended
    rows: list[Json] = state.result()
    assert [row.get("action") for row in rows] == ACTIONS
    assert [row.get("label") for row in rows] == ["Sports", "World", None, "World", "World", None]
    assert [row.get("decided_by") for row in rows] == ["model", "person", None, "model", "person", "model"]
    assert rows[4]["confidence"] == pytest.approx(0.55)
    assert all(isinstance(row, Routed | RowError) for row in values(Routed, rows))
    _, page, table = left(f"{key}-texts")
    assert [row["decided_by"] for row in table] == ["model", "person", None, "model", "person", "model"]
    assert "2 labels by a person" in page
    assert page.count("a person decided") == 2


def test_many_rows_are_asked_about_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "MOST_ASKED", 2)
    texts = [f"A treaty of {year}." for year in range(3)]

    def call() -> State[Any]:
        done: State[Any] = judge_texts(texts, LABELS, policy="topics", ask_a_person=True, return_state=True)
        return done

    with in_background(call) as ended, get_client(sync_client=True) as client:
        run, form, asked = paused(client, "judge 3 texts")
        assert list(form["properties"]) == ["row_1", "row_2"]
        assert client.resume_flow_run(run.id, run_input={"row_2": "Sports"}).status == SetStateStatus.ACCEPT
        run, form, _ = paused(client, "judge 3 texts", other_than=asked)
        assert list(form["properties"]) == ["row_3"]
        assert client.resume_flow_run(run.id, run_input={}).status == SetStateStatus.ACCEPT
    rows = ended[0].result()
    assert [row["label"] for row in rows] == ["World", "Sports", "World"]
    assert {row["decided_by"] for row in rows} == {"person"}


def test_nobody_is_asked_where_nothing_is_to_be_reviewed() -> None:
    with use_model(FAKE):
        rows = judge_texts(["A goal.", "A chip."], LABELS, policy="topics", ask_a_person=True)
    assert [row["decided_by"] for row in rows] == ["model", "model"]


def test_a_run_that_nobody_answers_fails_and_leaves_its_page(left: Left) -> None:
    with use_model(FAKE), pytest.raises(AlpacaError, match=r"nobody gave the labels .* within 1 s"):
        judge_texts(TEXTS, LABELS, policy="topics", ask_a_person=True, ask_timeout=1)
    run, page, table = left("judge-texts")
    assert run.state_name == "Failed"
    assert "2 to review" in page
    assert [row["decided_by"] for row in table if row["decided_by"]] == ["model"] * 5


def test_labels_that_were_given_before_nobody_answered_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = route(alpaca_core.judge(FAKE, ["A treaty.", "A strike."], LABELS), POLICY)
    late = FlowPauseTimeout()

    def answer_once(wait_for_input: Any, **_: object) -> Any:
        if "row_2" in wait_for_input.model_fields:
            raise late
        return wait_for_input(row_1="Sports")

    monkeypatch.setattr(review, "MOST_ASKED", 1)
    monkeypatch.setattr(review, "pause_flow_run", answer_once)
    given, error = review.ask_person(rows, 60)
    assert error is late
    assert isinstance(given[0], Routed)
    assert (given[0].label, given[0].decided_by) == ("Sports", "person")
    assert given[1:] == rows[1:]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "none-such"}, "no policy named 'none-such'"),
        ({"policy": "of-another"}, r"this policy is for .* 'ab12', but got some of none"),
        ({"policy": "topics", "calibration": "topics"}, r"this policy is for .* none, but got"),
        ({"ask_a_person": True}, "Name a policy, or ask nobody"),
    ],
)
@pytest.mark.parametrize("flow", [judge_texts, classify_texts], ids=lambda flow: flow.name)
def test_a_policy_that_cannot_hold_is_refused_before_the_model_is_loaded(
    flow: Any, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_named("topics", fit_calibration(FAKE, ["A goal."] * 10, LABELS))
    save_named("of-another", POLICY.model_copy(update={"calibration": "ab12"}))
    monkeypatch.setattr(alpaca_core, "load_model", pytest.fail)
    with pytest.raises(InvalidRequest, match=said):
        flow(TEXTS, LABELS, **settings)


def test_a_policy_says_what_it_does() -> None:
    assert statement(POLICY).startswith("a label is accepted from probability 0.800 on, where at least 0.9 of")
    assert "others go to a person from 0.520 on" in statement(POLICY)
    never = POLICY.model_copy(update={"accept": None, "review": 0.0})
    assert statement(never).startswith("nothing is accepted")
    assert "all others go to a person" in statement(never)
