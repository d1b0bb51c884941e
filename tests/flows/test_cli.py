"""The command line: exit codes, one JSON object a row, errors of one line."""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import alpaca_core
from alpaca_core import Calibration, Label, LanguageModel, ModelSpec, Sampling
from alpaca_core.errors import ModelNotFound
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import cli, commands, running, terminal
from prefect_alpaca.flows.options import label_of

FAKE = FakeModel(
    {
        "Proposed answer": {"Yes": 0.8, "No": 0.2},
        "given these steps": "The answer is 10.",
        "step by step": "5 and 5.",
        "Paris": {"Yes": 0.75, "No": 0.25},
        "Topic?": {"Sports": 0.6, "World": 0.3, "foot": 0.1},
        "escape": "\x1b[31mred [bold]not bold[/bold]",
    },
    {"Blue and green.": 0.5, "Red and grey.": 0.5},
)


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[ModelSpec]:
    """The specs that the command line loads; what it gets is the fake."""
    asked: list[ModelSpec] = []

    @contextmanager
    def load(spec: ModelSpec) -> Iterator[LanguageModel]:
        asked.append(spec)
        print("a library that prints")
        yield FAKE

    monkeypatch.setattr(running, "load_model", load)
    return asked


def objects(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


pytestmark = pytest.mark.usefixtures("specs")


def test_generate_prints_one_object_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "Two colours?", "Two more?", "--temperature", "1", "--seed", "5", "--json"]) == 0
    expected = alpaca_core.generate(FAKE, ["Two colours?", "Two more?"], Sampling(temperature=1.0, seed=5))
    assert objects(capsys.readouterr().out) == [row.model_dump(mode="json") for row in expected]


def test_answer_prints_the_named_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["answer", "How many pierogi?", "--json"]) == 0
    [row] = objects(capsys.readouterr().out)
    assert {"question", "reasoning", "answer", "p_correct", "attempts"} <= set(row)
    assert (row["reasoning"], row["answer"], row["attempts"]) == ("5 and 5.", "The answer is 10.", 1)
    assert row["p_correct"] == pytest.approx(0.8)


def test_answer_shows_what_samples_vote_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["answer", "Two colours?", "--no-reason", "--samples", "9", "--temperature", "1"]
    assert cli.main([*arguments, "--json"]) == 0
    row = objects(capsys.readouterr().out)[0]
    expected = alpaca_core.answer(FAKE, ["Two colours?"], Sampling(temperature=1.0), reason=False, samples=9)[0]
    assert row == expected.model_dump(mode="json")
    assert len(row["votes"]) == 2
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "Agreement" in shown
    for vote in row["votes"]:
        assert f"{vote['answer']}  {vote['count']} of 9, mean P(correct) {vote['p_correct']:.2f}" in shown


def test_answer_can_leave_steps_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["answer", "How many?", "--no-reason", "--no-verify", "--json"]) == 0
    [row] = objects(capsys.readouterr().out)
    assert row["reasoning"] is None
    assert row["p_correct"] is None


def test_judge_takes_labels_aliases_and_an_instruction(capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["--label", "World", "--label", "Sports=foot,ball"]
    assert cli.main(["judge", "A late goal", *labels, "--instruction", "Topic?", "--json"]) == 0
    [row] = objects(capsys.readouterr().out)
    assert {"text", "label", "probabilities", "coverage"} <= set(row)
    assert row["label"] == "Sports"
    assert row["probabilities"] == pytest.approx({"World": 0.3, "Sports": 0.7})


def test_judge_asks_yes_or_no_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge", "Is Paris the capital of France?", "--json"]) == 0
    assert objects(capsys.readouterr().out)[0]["probabilities"] == pytest.approx({"Yes": 0.75, "No": 0.25})


def test_tokens_shows_ids_and_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokens", "paca", "--next", "2", "--json"]) == 0
    [row] = objects(capsys.readouterr().out)
    assert [(token["id"], token["text"], token["special"]) for token in row["tokens"]] == [
        (ord(letter), letter, False) for letter in "paca"
    ]
    assert sorted(token["text"] for token in row["next"]) == ["B", "R"]


@pytest.mark.parametrize(
    ("piped", "rows"),
    [
        (b"Is Paris big?\nIs Paris old?\n", ["Is Paris big?", "Is Paris old?"]),
        (b"Is Paris big?\r\nIs Paris old?", ["Is Paris big?", "Is Paris old?"]),
        ("Paris\x0b\x1c\x85\u2028?\r\r\n".encode(), ["Paris\x0b\x1c\x85\u2028?\r"]),
        ("\ufeffZażółć Paris?\n".encode(), ["Zażółć Paris?"]),
        (b"bad \xff\n\nParis?\n", ["invalid_text", "empty_text", "Paris?"]),
        (b"", []),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_rows_come_from_standard_input(
    piped: bytes, rows: list[str], encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding))
    assert cli.main(["judge", "Paris?", "-", "--json"]) == int("invalid_text" in rows)
    printed = objects(capsys.readouterr().out)
    assert [row.get("text", row.get("code")) for row in printed] == ["Paris?", *rows]


def test_standard_input_that_is_closed_is_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["judge", "-", "--json"]) == 2
    assert capsys.readouterr().err.startswith("alpaca: - reads standard input, but that is closed.")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "utf-16"])
def test_every_line_is_json_whatever_the_locale(encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(commands, "import_adapter", lambda source, **_: tmp_path)
    texts = ["é Paris", "\U0001f999\u2028", "\udcff"]
    printed = io.BytesIO()
    with io.TextIOWrapper(printed, encoding, write_through=True) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["tokens", *texts, "--json"]) == 1
        assert cli.main(["import-adapter", "bad \udcff", "--json"]) == 0
        assert cli.main(["tokens", texts[0]]) == 0
        lines = printed.getvalue().decode(encoding).splitlines()[:4]
    rows = [json.loads(line) for line in lines]
    assert [row.get("text", row.get("code")) for row in rows[:3]] == [*texts[:2], "invalid_text"]
    assert rows[3]["source"] == "bad \udcff"
    assert ("é" in lines[0]) == (encoding == "utf-8")


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_reader_that_goes_away_is_no_traceback(
    form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", Console())  # rich keeps it quiet from then on
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        try:
            code: object = cli.main(["tokens", "Paris?", *form])
        except SystemExit as stopped:
            code = stopped.code
    assert code == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("form", [["--json"], []])
def test_a_full_disk_is_one_line(
    form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True))
    assert cli.main(["tokens", "Paris?", *form]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["judge"], ["tokens", "--next", "2"]], ids=" ".join)
def test_a_terminal_shows_progress_beside_the_json(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert cli.main([*command, "Paris?", "--model", "[/bold]", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(objects(printed.out)) == 1
    assert "Loading [/bold]" in printed.err
    assert command[0] in printed.err
    assert f"{command[0]}: 1 row in " in printed.err
    assert " rows/s, " in printed.err


@pytest.mark.parametrize("command", ["generate", "answer", "judge", "tokens"])
def test_a_failed_row_gives_exit_code_1_and_the_others_are_printed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "Paris?", " ", "\ud800", "--json"]) == 1
    rows = objects(capsys.readouterr().out)
    assert [row.get("code") for row in rows] == [None, "empty_text", "invalid_text"]
    assert cli.main([command, "Paris?", " "]) == 1
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a", "--top-p", "0.5"],
        ["generate", "a", "--top-k", "0", "--temperature", "1"],
        ["generate", "a", "--temperature", "nan"],
        ["generate", "a", "--max-new-tokens", "many"],
        ["generate", "a", "--quantization", "int3"],
        ["generate"],
        ["judge", "a", "--label", "one"],
        ["judge", "a", "--label", "no", "--label", "No "],
        ["judge", "a", "--label", "b", "--label", "c=, "],
        ["judge", "a", "--label", "b", "--label", "c="],
        ["judge", "a", "--label", "b", "--label", "=c"],
        ["judge", "a", "--label", "b", "--label", "c=d,,e"],
        ["judge", "a", "--label", "b", "--label", ""],
        ["judge", "a", "--model", ""],
        ["judge", "a", "--min-coverage", "2"],
        ["judge", "a", "--device", "tpu"],
        ["answer", "a", "--max-attempts", "2"],
        ["answer", "a", "--samples", "2"],
        ["tokens", "a", "--next", "-1"],
        ["tokens", "a", "--mistyped"],
        ["sing", "a"],
        [],
    ],
)
def test_bad_input_gives_exit_code_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line != "a library that prints"]
    assert len(lines) == 1
    assert lines[0].startswith("alpaca")
    options = [argument for argument in arguments if argument in ("--label", "--model", "--top-k", "--device")]
    assert not options or options[0] in lines[0] or "labels" in lines[0]


def test_a_model_that_cannot_be_loaded_gives_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(spec: ModelSpec) -> LanguageModel:
        raise ModelNotFound(f"there is no {spec.base_model!r}.\nLook again.")

    monkeypatch.setattr(running, "load_model", load)
    assert cli.main(["judge", "a", "--model", "no/such"]) == 2
    assert capsys.readouterr().err == "alpaca: there is no 'no/such'. Look again.\n"


def test_options_name_the_model(specs: list[ModelSpec]) -> None:
    cli.main(["judge", "Paris?"])
    cli.main(["judge", "Paris?", "--model", "alpaca-7b", "--quantization", "nf4", "--template", "alpaca"])
    cli.main(["judge", "Paris?", "--model", "some/model", "--revision", "abc", "--device", "cpu", "--dtype", "float32"])
    assert specs == [
        ModelSpec(),
        ModelSpec.preset("alpaca-7b").model_copy(update={"quantization": "nf4", "template": "alpaca"}),
        ModelSpec(base_model="some/model", revision="abc", device="cpu", dtype="float32"),
    ]


@pytest.mark.parametrize("command", ["generate", "answer", "judge", "cascade", "rate"])
def test_an_escaped_line_is_told_below_the_rows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--criterion", "Good?"] if command == "rate" else []
    cli.main([command, "Paris?", "Paris?\n### Response:", *options])
    assert "leading space: row 2" in " ".join(capsys.readouterr().out.split())
    cli.main([command, "Paris?", *options])
    assert "leading space" not in capsys.readouterr().out


def test_labels_are_read_with_their_aliases() -> None:
    assert label_of("not sure") == "not sure"
    assert label_of("Yes=y,true") == Label(name="Yes", aliases=("y", "true"))
    assert label_of("a=b=c") == Label(name="a", aliases=("b=c",))


@pytest.mark.parametrize("command", ["generate", "answer", "judge", "tokens"])
def test_people_get_something_to_read_without_escape_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "Paris?"]) == 0
    assert cli.main([command, "escape \x1b[31m", "[bold]Paris[/bold]?"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out
    assert "[bold]" in printed.out
    assert "a library that prints" not in printed.out


@pytest.mark.parametrize(
    "command",
    [
        *("", "generate", "answer", "judge", "classify", "same-meaning", "is-outlier", "rate", "calibrate"),
        *("cascade", "measure", "fit-policy", "tokens", "import-adapter", "serve", "host", "doctor"),
    ],
)
def test_every_command_and_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"] if command else ["--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_every_option_says_what_it_is() -> None:
    parsers: list[argparse.ArgumentParser] = [cli._parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                assert action.help, (parser.prog, action.option_strings)
    assert len(parsers) == 17


def test_import_adapter_says_where_the_result_lies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {}

    def convert(source: str, **settings: object) -> Path:
        asked[source] = settings
        return tmp_path

    monkeypatch.setattr(commands, "import_adapter", convert)
    assert cli.main(["import-adapter", "some/adapter", "--template", "alpaca", "--out", "there", "--json"]) == 0
    assert asked == {"some/adapter": {"template": "alpaca", "revision": None, "out": Path("there")}}
    assert objects(capsys.readouterr().out) == [{"source": "some/adapter", "folder": str(tmp_path)}]


@pytest.mark.end_to_end
def test_the_embedded_model_judges_from_a_shell() -> None:
    command = [sys.executable, "-m", "prefect_alpaca.flows.cli", "judge", "Is ice cold?", "Is fire cold?", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    rows = objects(done.stdout)
    assert [row["text"] for row in rows] == ["Is ice cold?", "Is fire cold?"]
    assert [sum(row["probabilities"].values()) for row in rows] == pytest.approx([1, 1])
    assert all(0 < row["coverage"] <= 1 for row in rows)


def labelled(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


LABELLED = [{"text": f"Topic? {number}", "label": ["Sports", "World"][number % 2]} for number in range(12)]
TOPICS = ["--label", "Sports", "--label", "World", "--instruction", "About?"]


def test_a_calibration_is_fitted_written_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "topics.json"
    assert cli.main(["calibrate", labelled(tmp_path, *LABELLED), *TOPICS, "--out", str(written), "--json"]) == 0
    (fitted,) = objects(capsys.readouterr().out)
    assert fitted == json.loads(written.read_text())
    assert (fitted["rows"], fitted["bound"]["labels"]) == (12, ["Sports", "World"])
    assert cli.main(["judge", "Topic? x", *TOPICS, "--calibration", str(written), "--json"]) == 0
    (row,) = objects(capsys.readouterr().out)
    expected = alpaca_core.judge(
        FAKE, ["Topic? x"], ["Sports", "World"], instruction="About?", calibration=Calibration.model_validate(fitted)
    )
    assert row == expected[0].model_dump(mode="json")


def test_without_labels_the_texts_alone_are_fitted_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"text": row["text"], "other": 1} for row in LABELLED]
    assert cli.main(["calibrate", labelled(tmp_path, *texts), *TOPICS]) == 0
    printed = capsys.readouterr().out
    assert "batch" in printed
    assert "12 rows" in printed
    assert "not kept" in printed


@pytest.mark.usefixtures("prefect_api")
def test_a_calibration_is_saved_and_used_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", labelled(tmp_path, *LABELLED), *TOPICS, "--name", "topics-cli"]) == 0
    assert "not kept" not in capsys.readouterr().out
    assert cli.main(["judge", "Topic? x", *TOPICS, "--calibration", "topics-cli", "--json"]) == 0
    assert objects(capsys.readouterr().out.splitlines()[-1])[0]["calibration"]
    assert cli.main(["judge", "Topic? x", *TOPICS, "--calibration", "none-such"]) == 2
    assert "no calibration named 'none-such'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((*LABELLED, "{"), "line 13 is '{'"),
        ((*LABELLED, {"label": "World"}), "line 13"),
        ((*LABELLED, {"text": "Topic?"}), "has both"),
        (({"text": "Topic?", "label": "Sports"},), "10 rows at least"),
        (({**LABELLED[0], "label": "Weather"}, *LABELLED), "'Weather' is none"),
    ],
)
def test_what_cannot_be_fitted_on_is_one_line(
    rows: tuple[object, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", labelled(tmp_path, *rows), *TOPICS]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("alpaca: ")
    assert message in error


def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["judge", "x", "--calibration", labelled(tmp_path, {"a": 1})]) == 2
    assert cli.main(["calibrate", str(tmp_path / "absent")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_replicas_without_ray_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--replicas", "--most-replicas", "--gpus"):
        assert cli.main(["serve", option, "2"]) == 2
        assert "Add --ray" in capsys.readouterr().err
