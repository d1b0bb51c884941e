"""`alpaca measure` and `alpaca cascade`: the core's figures and rows, and something to read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import alpaca_core
from alpaca_core import LanguageModel, Measurement, ModelSpec, OrderEffect, Sampling, prompts
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import cli, running

FAKE = FakeModel(
    {
        "reasoning below": {"World": 0.2, "Sports": 0.8},
        "step by step": "A [bold]ball[/bold].",
        "A. World\nB. Sports": {"A": 0.6, "B": 0.4},
        "goal": {"Sports": 0.9, "World": 0.1},
        "World, Sports": {"World": 0.6, "Sports": 0.4},
        "Sports, World": {"Sports": 0.7, "World": 0.3},
        "Category:": {" World": 0.3, " Sports": 0.1, "?": 0.6},
        "odd": "?",
    },
    otherwise={"World": 0.55, "Sports": 0.45},
)
TOPICS = ["--label", "World", "--label", "Sports"]
ASKED = ["--instruction", "Which topic?"]
ROWS = [{"text": f"Text {number}: {'goal' if number % 3 else 'vote'}.", "label": "Sports"} for number in range(12)]
ROWS += [{"text": f"Text {number}: vote.", "label": "World"} for number in range(12, 20)]
TEXTS, GOLD = [row["text"] for row in ROWS], [row["label"] for row in ROWS]


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ModelSpec]:
    """The specs that are loaded; what comes is the fake."""
    asked: list[ModelSpec] = []

    @contextmanager
    def load(spec: ModelSpec) -> Iterator[LanguageModel]:
        asked.append(spec)
        yield FAKE

    monkeypatch.setattr(running, "load_model", load)
    return asked


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """A function: run the command line, expect an exit code, and return the objects that it printed."""

    def run(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
        assert cli.main([*arguments, "--json"]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file of the labelled rows."""
    return written(tmp_path / "rows.jsonl", ROWS)


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        ([*ASKED, "--no-show-labels"], {"instruction": "Which topic?", "show_labels": False}),
        ([*ASKED, "--letters"], {"instruction": "Which topic?", "letters": True}),
        ([*ASKED, "--rotate-labels"], {"instruction": "Which topic?", "rotate_labels": True}),
        (["--for", "classify"], {"instruction": prompts.CLASSIFY, "show_labels": False, "template": "raw"}),
    ],
)
def test_measure_is_the_cores(options: list[str], settings: dict[str, Any], said: Any, file: str) -> None:
    (printed,) = said("measure", file, *TOPICS, *options)
    judged = alpaca_core.judge(FAKE, TEXTS, ["World", "Sports"], **settings)
    assert printed.pop("order") is None
    assert Measurement.model_validate(printed) == alpaca_core.measure(judged, GOLD)


def test_measure_takes_a_calibration(said: Any, file: str, tmp_path: Path) -> None:
    fitted = alpaca_core.fit_calibration(FAKE, TEXTS, ["World", "Sports"], GOLD, instruction="Which topic?")
    kept = tmp_path / "topics.json"
    kept.write_text(fitted.model_dump_json())
    (printed,) = said("measure", file, *TOPICS, *ASKED, "--calibration", str(kept))
    judged = alpaca_core.judge(FAKE, TEXTS, ["World", "Sports"], instruction="Which topic?", calibration=fitted)
    del printed["order"]
    assert Measurement.model_validate(printed) == alpaca_core.measure(judged, GOLD)


def test_the_order_of_the_labels_is_measured_on_request(
    said: Any, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (printed,) = said("measure", file, *TOPICS, *ASKED, "--order")
    expected = alpaca_core.measure_order(FAKE, TEXTS, ["World", "Sports"], instruction="Which topic?")
    assert OrderEffect.model_validate(printed["order"]) == expected
    assert expected.flip_rate.value == pytest.approx(12 / 20)
    assert cli.main(["measure", file, *TOPICS, *ASKED, "--order"]) == 0
    shown = capsys.readouterr().out
    assert "order flips  0.600" in shown
    assert "labels by place in the prompt: 0.800, 0.200" in shown


def test_people_get_figures_with_intervals_to_read(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = alpaca_core.measure(alpaca_core.judge(FAKE, TEXTS, ["World", "Sports"]), GOLD)
    assert cli.main(["measure", file, *TOPICS]) == 0
    shown = " ".join(capsys.readouterr().out.lower().split())
    for name in ("accuracy", "brier", "nll", "auroc", "aurc", "ece"):
        estimate = getattr(found, name)
        assert f"{name} {estimate.value:.3f} {estimate.low:.3f} to {estimate.high:.3f}" in shown
    assert f"a calibrated judge would show {found.ece_if_calibrated:.3f}" in shown
    assert "coverage, quantiles: 5% 1, 25% 1, 50% 1, 75% 1, 95% 1" in shown
    assert "rows: 20 with a label, 0 without, 0 failed" in shown
    assert "order" not in shown


def test_what_is_undefined_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "one.jsonl", [{"text": "goal", "label": "Sports"}])
    assert cli.main(["measure", path, *TOPICS]) == 0
    assert "AUROC     undefined" in capsys.readouterr().out


def test_rows_that_fail_or_have_no_label_are_counted(
    said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "bad.jsonl", [*ROWS, {"text": " ", "label": "World"}, {"text": "odd", "label": "World"}])
    (printed,) = said("measure", path, *TOPICS, "--no-show-labels", code=1)
    assert (printed["n"], printed["failed"], printed["abstained"]) == (20, 1, 1)
    assert cli.main(["measure", path, *TOPICS, "--no-show-labels"]) == 1
    shown = capsys.readouterr().out
    assert "rows: 20 with a label, 1 without, 1 failed" in shown
    assert "row 21 failed" in shown


def test_a_diagram_is_drawn(said: Any, file: str, tmp_path: Path) -> None:
    said("measure", file, *TOPICS, "--diagram", str(tmp_path / "pictures" / "topics.svg"))
    assert "<svg" in (tmp_path / "pictures" / "topics.svg").read_text()


CASCADED = ["A goal.", "A ball.", " ", "A vote."]


def test_cascade_is_the_cores(said: Any) -> None:
    options = ["--margin", "0.3", "--max-new-tokens", "8", "--temperature", "0.5", "--seed", "3"]
    sampling = Sampling(max_new_tokens=8, temperature=0.5, seed=3)
    settings: dict[str, Any] = {"margin": 0.3, "sampling": sampling, "instruction": "Which topic?"}
    expected = alpaca_core.cascade(FAKE, CASCADED, ["World", "Sports"], **settings)
    printed = said("cascade", *CASCADED, *TOPICS, *ASKED, *options, code=1)
    assert printed == [row.model_dump(mode="json") for row in expected]
    assert [row.get("reasoning_tokens") for row in printed] == [0, 8, None, 8]


def test_cascade_takes_the_calibrations_of_both_judgments(said: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"show_labels": False}
    first = alpaca_core.fit_calibration(FAKE, TEXTS, ["World", "Sports"], GOLD, **settings)
    every = alpaca_core.cascade(FAKE, TEXTS, ["World", "Sports"], margin=1, **settings)
    asked = alpaca_core.cascading.reasoned_question()
    again = alpaca_core.cascading.reasoned_texts(every)
    second = alpaca_core.fit_calibration(FAKE, again, ["World", "Sports"], GOLD, instruction=asked, **settings)
    for name, fitted in (("first", first), ("second", second)):
        (tmp_path / name).write_text(fitted.model_dump_json())
    names = ["--calibration", str(tmp_path / "first"), "--reasoned-calibration", str(tmp_path / "second")]
    printed = said("cascade", "A ball.", *TOPICS, "--margin", "1", "--no-show-labels", *names)
    expected = alpaca_core.cascade(
        FAKE, ["A ball."], ["World", "Sports"], margin=1, calibration=first, reasoned_calibration=second, **settings
    )
    assert printed == [row.model_dump(mode="json") for row in expected]


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (CASCADED, ["by logits", "reasoned", "World", "failed", "reasoned about 2 of 3", "about 20 (an estimate"]),
        (["A ball."], ["A [bold]ball[/bold].", "Sports", "0.80", "before the reasoning: World 0.60", "spent: 20"]),
        (["A goal."], ["Sports", "0.90", "coverage"]),
        ([" "], ["failed"]),
    ],
)
def test_people_read_what_a_cascade_spent(
    arguments: list[str], shows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cascade", *arguments, *TOPICS, *ASKED, "--margin", "0.3"]) == int(" " in arguments)
    printed = capsys.readouterr().out
    assert [each for each in shows if each not in printed] == []


@pytest.mark.parametrize(
    ("arguments", "message", "before_loading"),
    [
        (["measure", "BARE", *TOPICS], 'judgments are measured on lines with a "label"', True),
        (["measure", "ROWS"], "gold names a label of its row ('Yes', 'No'), but row 0 has 'Sports'", True),
        (["measure", "ABSENT", *TOPICS], "Check the path", True),
        (["measure", "ROWS", *TOPICS, "--diagram", "a.jpg"], "--diagram: a diagram is a .svg or a .png", True),
        (["measure", "ROWS", *TOPICS, "--for", "classify", "--letters"], "have no use", True),
        (["measure", "ROWS", *TOPICS, "--calibration", "ROWS"], "rows.jsonl is no calibration", True),
        (["measure", "ROWS", *TOPICS, "--for", "classify", "--order"], "this question names none", False),
        (["measure", "ROWS", *TOPICS, "--rotate-labels", "--order"], "or rotates them", False),
        (["cascade", "a", *TOPICS, "--margin", "2"], "margin lies between 0 and 1", False),
        (["cascade", "a", *TOPICS, "--margin", "wide"], "--margin", True),
        (["cascade", "a", "--top-p", "0.5"], "top_p", True),
        (["cascade", "a", "--label", "one"], "at least two labels", False),
        (["cascade", "a", "--reasoned-calibration", "ROWS"], "rows.jsonl is no calibration", True),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    before_loading: bool,
    file: str,
    tmp_path: Path,
    loads: list[ModelSpec],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = written(tmp_path / "bare.jsonl", [{"text": text} for text in TEXTS])
    files = {"ROWS": file, "BARE": bare, "ABSENT": str(tmp_path / "absent.jsonl")}
    try:
        code: object = cli.main([files.get(each, each) for each in arguments])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert (loads == []) is before_loading
