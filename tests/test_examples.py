"""The examples that people copy run as they are: of docstrings, of the README, of the folder `examples`."""

import ast
import doctest
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import alpaca_core
from alpaca_core import LanguageModel, ModelSpec
from prefect_alpaca.flows import cli
from prefect_alpaca.tasks import use_model

ROOT = Path(__file__).parents[1]
FOLDERS = {"alpaca_core": "alpaca_core", "tasks": "prefect_alpaca.tasks", "flows": "prefect_alpaca.flows"}


def with_examples() -> Iterator[object]:
    """The modules whose docstrings hold examples, by the name they are imported by."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
                marks = [pytest.mark.end_to_end] if name == "alpaca_core.loading" else []  # it loads the model
                yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(with_examples()))
def test_the_examples_of_docstrings_give_what_they_say(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


@pytest.fixture
def block(tmp_path: Path) -> Callable[..., Path]:
    """Finds the README's one Python block with a phrase in it; given several, makes one program of them."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3, "a new block wants a test here"

    def find(*phrases: str) -> Path:
        program = tmp_path / "block.py"
        found = [[each for each in blocks if phrase in each] for phrase in phrases]
        assert [len(each) for each in found] == [1] * len(phrases)
        program.write_text("\n".join(each for (each,) in found), encoding="utf-8")
        return program

    return find


@pytest.mark.usefixtures("prefect_api")
def test_the_readmes_flow_passes_the_readmes_test_of_it(block: Callable[..., Path]) -> None:
    runpy.run_path(str(block("def triage", "assert triage")))


@pytest.mark.end_to_end
@pytest.mark.usefixtures("prefect_api")
def test_the_readmes_programs_run_on_the_embedded_model(
    block: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with alpaca_core.load_model(ModelSpec()) as model, use_model(model):

        @contextmanager
        def load_model(spec: ModelSpec) -> Iterator[LanguageModel]:
            assert spec == ModelSpec()
            yield model  # loaded once for both programs

        monkeypatch.setattr(alpaca_core, "load_model", load_model)
        runpy.run_path(str(block("with load_model")), run_name="__main__")
        *text, p_correct, yes_no, topic = capsys.readouterr().out.splitlines()
        runpy.run_path(str(block("def triage")), run_name="__main__")
        labels = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert "".join(text).strip()
    assert 0 <= float(p_correct) <= 1
    assert sum(ast.literal_eval(yes_no).values()) == pytest.approx(1)
    label, shares, coverage = re.fullmatch(r"(\w+) (\{.*\}) (\S+)", topic).groups()
    probabilities = ast.literal_eval(shares)
    assert label == max(probabilities, key=probabilities.__getitem__)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert 0 < float(coverage) <= 1
    assert len(labels) == 2
    assert set(labels) <= {"billing", "card lost", "card not working", "review"}


def test_the_notebooks_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", page)
    assert len(named) == page.count("`tests/")
    gone = [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert gone == []


def test_the_notebooks_page_names_verbs_that_exist() -> None:
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    cells = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ") and "`" in line]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert named <= set(alpaca_core.__all__)
    assert {"generate", "describe_tokens", "chain_of_thought", "verify", "judge"} <= named


@pytest.mark.parametrize("name", ["README.md", "docs/notebook.md", "docs/deploy.md"])
def test_command_lines_are_ones_that_the_program_reads(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"(?:^|`)(?:[A-Z_]+=\S+ )*(alpaca [a-z-]+(?: [^`\n]+)?)", page, re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        assert cli._parser().parse_args(shlex.split(line, comments=True)[1:]).run, line


@pytest.mark.end_to_end
def test_the_four_uses_run_on_the_embedded_model() -> None:
    command = [sys.executable, "examples/uses.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    parts = done.stdout.strip().split("\n\n")
    shown = [re.findall(r"^  (\d\.\d\d) ", part, re.MULTILINE) for part in parts]
    assert [len(numbers) for numbers in shown] == [3, 2, 2, 2]
    assert all(0 <= float(number) <= 1 for numbers in shown[:3] for number in numbers)
    assert all(1 <= float(number) <= 5 for number in shown[3])
    assert shown[2] == sorted(shown[2], reverse=True), "the likeliest outlier first"
    assert "exchange rate: How many euros do I get for a dollar?" in done.stdout
    assert "failed" not in done.stdout
