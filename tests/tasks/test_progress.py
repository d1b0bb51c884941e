"""Progress: a bar for long work, none for short, and never a reason to fail."""

import os
import pty
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterTaskRunId
from prefect.client.schemas.objects import Artifact
from prefect.exceptions import ObjectNotFound
from prefect.runtime import task_run

from alpaca_core import progress as core
from prefect_alpaca.tasks import progress as room
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api")


@task
def work(rows: int, parts: int) -> str:
    """Finish rows one by one, each in parts."""
    with room.progress_bar("judge", rows) as advance:
        for _ in range(rows * parts):
            advance(1 / parts)
    return str(task_run.id)


@flow
def run(rows: int, parts: int = 1) -> str:
    """Run the work as Prefect would."""
    return work(rows, parts)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A terminal of unknown size as standard error; a function that reads what it was sent."""
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w", encoding="utf-8") as stderr:
        os.set_blocking(master, False)
        monkeypatch.setattr(core, "sys", SimpleNamespace(stderr=stderr))  # pytest keeps the real one for itself
        monkeypatch.setattr(core, "TICK", 0.01)

        def read() -> str:
            stderr.flush()
            return (screen.read(1_000_000) or b"").decode()

        yield read


def shown(terminal: Callable[[], str], text: str, times: int = 1) -> str:
    """Wait until a terminal has shown a text so many times; all that it has shown until then."""
    parts: list[str] = []

    def there() -> bool:
        parts.append(terminal())
        return "".join(parts).count(text) >= times

    until(there)
    return "".join(parts)


def all_of(terminal: Callable[[], str]) -> str:
    """All that has been sent, when nobody sends any more: the system passes it on in its own time."""
    shown = ""
    while True:
        time.sleep(0.2)
        if not (part := terminal()):
            return shown
        shown += part


def bars_of(run_id: str) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(task_run_id=ArtifactFilterTaskRunId(any_=[run_id])))


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_long_work_leaves_a_full_bar(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 0.0)
    bars = [bar for bar in bars_of(run(3, parts)) if bar.type == "progress"]
    assert [(bar.data, bar.description) for bar in bars] == [(100.0, "judge: rows done")]


def test_short_work_leaves_none() -> None:
    assert [bar for bar in bars_of(run(3)) if bar.type == "progress"] == []


def test_a_bar_of_long_work_is_drawn_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    seconds = iter(range(1_000_000))  # one passes at each look at the clock
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(room, "create_progress_artifact", lambda *_, **__: "an id")
    monkeypatch.setattr(room, "update_progress_artifact", lambda *_: drawn.append(next(seconds)))
    run(3600)
    pauses = [later - sooner for sooner, later in pairwise(drawn)]
    assert len(drawn) < 120
    assert all(pause <= max(room.INTERVAL, 0.1 * then) + 6 for pause, then in zip(pauses, drawn, strict=False))
    assert max(pauses[:-1]) <= room.MOST + 4


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("the server is away"), ObjectNotFound(OSError("404")), RuntimeError("client closed")]
)
def test_a_bar_that_cannot_be_drawn_costs_no_row(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(room, "PATIENCE", 0.0)
    monkeypatch.setattr(room, "create_progress_artifact", away)
    assert run(3)


def test_outside_a_run_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 0.0)
    monkeypatch.setattr(room, "create_progress_artifact", pytest.fail)
    with room.progress_bar("judge", 2) as advance:
        advance(2)


def test_a_batch_without_rows_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 0.0)
    assert run(0)
    with room.progress_bar("judge", 0) as advance:
        advance(0)


@pytest.mark.parametrize("draw", [room.progress_bar, core.progress_bar], ids=["task", "core"])
def test_a_terminal_shows_a_bar_that_moves_and_is_wiped(terminal: Callable[[], str], draw: Any) -> None:
    with draw("judge", 3) as advance:
        waiting = shown(terminal, "judge:   0% |", times=2)  # its clock ticks though no row has finished
        advance(1 / 3)
        advance(7 / 6)
        half = shown(terminal, "judge:  50% |")
    assert "of 3 rows [00:00<" in waiting
    assert "1.5" not in half
    assert all_of(terminal).endswith(" \r")


def test_threads_each_have_their_bar_and_leave_none(terminal: Callable[[], str]) -> None:
    with room.progress_bar("judge", 3), room.progress_bar("verify", 0):
        shown(terminal, "verify:", times=2)
    all_of(terminal)
    assert terminal() == ""


def test_without_a_terminal_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    with room.progress_bar("judge", 3) as advance:
        advance(3)
    assert capfd.readouterr().err == ""
