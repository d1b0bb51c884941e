"""What is shipped: the wheel works alone, the pins fit the ranges, `make` and CI say what they do."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"alpaca_core": "alpaca_core", "tasks": "prefect_alpaca.tasks", "flows": "prefect_alpaca.flows"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, without a network."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, source)
    [built] = dist.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, package in FOLDERS.items():
        place = Path(package.replace(".", "/"))
        files = [*(ROOT / folder).rglob("*.py"), ROOT / folder / "py.typed"]
        expected |= {str(place / path.relative_to(ROOT / folder)) for path in files}
    assert held == expected


@pytest.mark.end_to_end
def test_the_installed_wheel_judges_where_other_tasks_lie_about(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # The libraries are those of the tests; an editable install's hook among them does not follow.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    for name in ("tasks", "flows", "prefect_alpaca"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')")
    (tmp_path / "prefect_alpaca" / "__init__.py").unlink()
    where = run(python, "-c", "import prefect_alpaca.tasks as it; print(it.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment)
    printed = run(environment / "bin" / "alpaca", "judge", "Is ice cold?", "--json", cwd=tmp_path)
    row = json.loads(printed)
    assert row["text"] == "Is ice cold?"
    assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_prefect_finds_the_tasks_as_a_collection() -> None:
    [found] = entry_points(group="prefect.collections", name="prefect_alpaca")
    assert found.load().__name__ == "prefect_alpaca.tasks"


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = PROJECT["project"]
    groups = project["optional-dependencies"]
    extras = [line for name in groups if name != "vllm" for line in groups[name]]  # its environment is its own
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, line
    assert lines == sorted(lines, key=str.lower)
    assert "+" not in "".join(lines), "a local version, such as torch's +cpu, exists on one kind of machine only"


def test_every_import_is_of_a_declared_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    distributions = packages_distributions()
    elsewhere = {"triton", "vllm", "ray"}  # torch for CUDA brings triton; the others are extras, in their own tests
    known = sys.stdlib_module_names | {"alpaca_core", "prefect_alpaca"} | elsewhere
    undeclared = [
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for module in imported(path)
        if (top := module.split(".")[0]) not in known
        and not declared & {canonicalize_name(name) for name in distributions.get(top, [])}
    ]
    assert undeclared == []


def imported(path: Path) -> list[str]:
    """The modules that a file imports, those inside functions and for types alone too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]


def test_make_alone_lists_every_target_with_what_it_does() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    listed = [line.split()[1] for line in run("make", "--no-print-directory").splitlines()]
    assert sorted(listed) == sorted(phony[1].split())
    assert all(len(line.split()) > 3 for line in run("make", "--no-print-directory").splitlines())


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 10)\nexec(sys.argv[1])' \"$2\"\n"
    )
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make: Python 3.11 or newer is needed" in done.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_tests_and_then_the_checks() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make test", "make check"]
