"""The demo: two flows on the examples, and a page that a person can read."""

import logging
from pathlib import Path

import pytest

from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import demo
from prefect_alpaca.tasks import use_model

from .conftest import Left

ROOT = Path(__file__).parents[2]


def test_the_demo_shows_every_question_and_headline(
    left: Left, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(logging.getLogger("prefect.task_runs"), "handlers", [])
    with use_model(
        FakeModel({"Proposed answer": {"Yes": 0.5, "No": 0.5}, "headline": {"World": 0.5, "Sports": 0.4}}, "So it is.")
    ):
        demo.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("P(correct)") == 4
    assert printed.count("So it is.") == 8
    assert printed.count("World") == 12
    assert "chain_of_thought: 4 rows" in printed
    assert "judge: 12 rows" in printed
    assert "To try next" in printed
    assert left("answer-question")[0].name == "answer 4 questions"
    assert left("judge-texts")[0].name == "judge 12 texts"


@pytest.mark.parametrize(
    ("file", "column", "most"), [("questions.jsonl", "question", 4), ("headlines.jsonl", "text", 12)]
)
def test_the_examples_stay_small(file: str, column: str, most: int) -> None:
    texts = demo._column(ROOT / "examples" / file, column)
    assert 0 < len(texts) <= most
    assert len(set(texts)) == len(texts)
