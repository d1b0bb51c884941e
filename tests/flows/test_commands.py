"""The commands of the four uses and of policies: what the core says, one JSON object a row, errors of one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import alpaca_core
from alpaca_core import Calibration, LanguageModel, ModelSpec, Policy
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import cli, running

FAKE = FakeModel(
    {
        "swallowed": {" card lost": 0.6, " top up": 0.2, " Hm": 0.2},
        "money": {" top up": 0.1, "Hm": 0.9},
        "Sentence 1: It rains.\nSentence 2: Rain falls.": {"Yes": 0.7, "No": 0.3},
        "too?\nbolt": {"Yes": 0.2, "No": 0.8},
        "too?": "?",
        "with a number": {"1": 0.1, "3": 0.3, "5": 0.4, "well": 0.2},
        "unsure": {"Yes": 0.6, "No": 0.4},
        "sure": {"Yes": 0.9, "No": 0.1},
        "lost": {"Yes": 0.45, "No": 0.55},
    },
    otherwise={"Yes": 0.5, "No": 0.5},
)
KINDS = ["--label", "card lost", "--label", "top up"]
SURE = [{"text": f"{number} sure", "label": "Yes"} for number in range(60)]
UNSURE = [{"text": f"{number} unsure", "label": ["Yes", "No"][number % 2]} for number in range(40)]


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
    """A function: run the command line, expect an exit code, and return the rows that it printed as JSON."""

    def run(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
        assert cli.main([*arguments, "--json"]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dumped(rows: Any) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json") for row in rows]


def test_classify_is_the_cores(said: Any) -> None:
    texts = ["It was swallowed.", " ", "I want money on it."]
    expected = alpaca_core.classify(FAKE, texts, ["card lost", "top up"], min_coverage=0.5)
    assert said("classify", *texts, *KINDS, "--min-coverage", "0.5", code=1) == dumped(expected)
    asked = "What is swallowed? {text}"
    expected = alpaca_core.classify(FAKE, ["x"], ["card lost", "top up"], instruction=asked, template="alpaca")
    assert said("classify", "x", *KINDS, "--instruction", asked, "--template", "alpaca") == dumped(expected)


def test_same_meaning_takes_texts_two_by_two(said: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = alpaca_core.same_meaning(FAKE, ["It rains.", "It rains."], ["Rain falls.", ""])
    assert said("same-meaning", "It rains.", "Rain falls.", "It rains.", "", code=1) == dumped(expected)
    assert cli.main(["same-meaning", "a", "b", "c"]) == 2
    assert capsys.readouterr().err == (
        "alpaca: texts are compared two by two, but got 3 of them. Add one, or drop one.\n"
    )


def test_is_outlier_reads_reference_rows_from_arguments_and_files(said: Any, tmp_path: Path) -> None:
    expected = dumped(alpaca_core.is_outlier(FAKE, ["bolt", "pear"], ["apple", "plum"]))
    lines, objects = tmp_path / "rows.txt", tmp_path / "rows.jsonl"
    lines.write_text("\ufeffapple\r\n\nplum\n", encoding="utf-8")
    written(objects, [{"text": "apple"}, {"text": "plum"}])
    for reference in (["apple", "plum"], [str(lines)], [str(objects)]):
        options = [each for row in reference for each in ("--reference", row)]
        assert said("is-outlier", "bolt", "pear", *options) == expected
    assert expected[1]["p_outlier"] is None


def test_rate_takes_a_criterion_and_a_scale(said: Any) -> None:
    expected = alpaca_core.rate(FAKE, ["A text.", " "], "Good?", worst=0, best=3)
    assert said("rate", "A text.", " ", "--criterion", "Good?", "--worst", "0", "--best", "3", code=1) == dumped(
        expected
    )


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["classify", "It was swallowed.", "[bold]money[/bold]", " ", *KINDS], ["card lost", "[bold]", "failed"]),
        (["classify", "It was swallowed.", *KINDS], ["card lost", "0.75", "coverage"]),
        (["same-meaning", "It rains.", "Rain falls.", "a", "b"], ["Yes", "0.70", "Rain falls."]),
        (["is-outlier", "bolt", "pear", " ", "--reference", "a", "--reference", "b"], ["0.80", "unknown", "failed"]),
        (["rate", "A text.", " ", "--criterion", "Good?"], ["3.75", "▃▁▆▁█", "failed"]),
    ],
)
def test_people_get_something_to_read(
    arguments: list[str], shows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == int("failed" in shows)
    printed = capsys.readouterr().out
    assert [each for each in shows if each not in printed] == []


def test_a_policy_is_fitted_written_and_used(said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = written(tmp_path / "rows.jsonl", SURE + UNSURE), tmp_path / "policy.json"
    (fitted,) = said("fit-policy", rows, "--precision", "0.9", "--confidence", "0.95", "--out", str(out))
    judged = alpaca_core.judge(FAKE, [row["text"] for row in SURE + UNSURE])
    expected = alpaca_core.fit_policy(judged, [row["label"] for row in SURE + UNSURE])
    assert Policy.model_validate(fitted) == expected
    assert json.loads(out.read_text()) == fitted
    printed = said("judge", "0 sure", "1 unsure", " ", "--policy", str(out), code=1)
    assert [row.get("action") for row in printed] == ["accept", "review", None]
    assert [row.get("confidence") for row in printed] == pytest.approx([0.9, 0.6, None])
    assert [row.get("decided_by") for row in printed] == ["model", "model", None]
    assert cli.main(["judge", "0 sure", "1 unsure", "--policy", str(out)]) == 0
    assert "review" in capsys.readouterr().out
    assert cli.main(["judge", "0 sure", "--policy", str(out)]) == 0
    assert "accept" in capsys.readouterr().out
    assert cli.main(["fit-policy", rows]) == 0
    assert "a label is accepted from probability" in capsys.readouterr().out


@pytest.mark.usefixtures("prefect_api")
def test_a_policy_of_calibrated_categories_is_saved_and_used_by_name(
    said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], loads: list[ModelSpec]
) -> None:
    rows = [{"text": f"{number} swallowed", "label": "card lost"} for number in range(40)]
    rows += [{"text": f"{number} money", "label": "top up"} for number in range(20)]
    file = written(tmp_path / "rows.jsonl", rows)
    (calibration,) = said("calibrate", file, *KINDS, "--for", "classify", "--name", "kinds")
    digest = Calibration.model_validate(calibration).digest
    (policy,) = said("fit-policy", file, *KINDS, "--for", "classify", "--calibration", "kinds", "--name", "kinds")
    assert policy["calibration"] == digest
    (row,) = said("classify", "1 swallowed", *KINDS, "--calibration", "kinds", "--policy", "kinds")
    assert (row["action"], row["label"], row["calibration"]) == ("accept", "card lost", digest)
    loads.clear()
    assert cli.main(["classify", "1 swallowed", *KINDS, "--policy", "kinds"]) == 2
    assert (
        f"this policy is for judgments of the calibration '{digest}', but got some of none" in capsys.readouterr().err
    )
    assert cli.main(["classify", "1 swallowed", *KINDS, "--policy", "none-such"]) == 2
    assert "no policy named 'none-such'" in capsys.readouterr().err
    assert loads == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a"], "--label"),
        (["classify", "a", "--label", "b"], "at least two labels"),
        (["is-outlier", "a"], "--reference"),
        (["is-outlier", "a", "--reference", "b"], "2 to 64 rows"),
        (["is-outlier", "a", "--reference", "absent.txt"], "no file 'absent.txt'"),
        (["rate", "a"], "--criterion"),
        (["rate", "a", "--criterion", "Good?", "--best", "1"], "a scale runs"),
        (["fit-policy", "ROWS", "--precision", "1"], "--precision: it lies above 0 and below 1"),
        (["fit-policy", "ROWS", "--confidence", "nan"], "--confidence: it lies above 0 and below 1"),
        (["fit-policy", "ROWS", "--confidence", "high"], "--confidence: it lies above 0 and below 1"),
        (["fit-policy", "ROWS", "--review", "2"], "review lies between 0 and 1"),
        (["fit-policy", "ROWS", "--precision", "0.999"], "needs at least"),
        (["fit-policy", "ROWS", "--label", "a", "--label", "b"], "gold names a label"),
        (
            ["fit-policy", "ROWS", "--for", "classify", "--show-labels"],
            "--rotate-labels have no use",
        ),
        (["fit-policy", "BARE"], 'lines with a "label"'),
        (["fit-policy", "ABSENT"], "Check the path"),
        (["judge", "a", "--policy", "ROWS"], "rows.jsonl is no policy"),
        (["rate", "a", "--criterion", "Good?", "--calibration", "ROWS"], "rows.jsonl is no calibration"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "ROWS": written(tmp_path / "rows.jsonl", SURE),
        "BARE": written(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in SURE]),
        "ABSENT": str(tmp_path / "absent.jsonl"),
    }
    try:
        code: object = cli.main([files.get(each, each) for each in arguments])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("alpaca")
    assert message in printed.err
