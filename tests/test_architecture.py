"""The house: which room may import which, what each package exports, and how long a file may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alpaca_core
import prefect_alpaca.flows
import prefect_alpaca.tasks

ROOT = Path(__file__).parents[1]

ROOMS = [  # from the top floor down: a room imports only what stands below it
    "prefect_alpaca.flows.demo",
    "prefect_alpaca.flows.cli",
    "prefect_alpaca.flows.commands",
    "prefect_alpaca.flows.labelled",
    "prefect_alpaca.flows.doctor",
    "prefect_alpaca.flows.hosting",
    "prefect_alpaca.flows.running",
    "prefect_alpaca.flows",
    "prefect_alpaca.flows.answering",
    "prefect_alpaca.flows.choosing",
    "prefect_alpaca.flows.uses",
    "prefect_alpaca.flows.cascading",
    "prefect_alpaca.flows.judging",
    "prefect_alpaca.flows.review",
    "prefect_alpaca.flows.report",
    "prefect_alpaca.flows.options",
    "prefect_alpaca.flows.terminal",
    "prefect_alpaca.flows.routing",
    "prefect_alpaca.tasks",
    "prefect_alpaca.tasks.named",
    "prefect_alpaca.tasks.loading",
    "prefect_alpaca.tasks.generation",
    "prefect_alpaca.tasks.judging",
    "prefect_alpaca.tasks.cascading",
    "prefect_alpaca.tasks.uses",
    "prefect_alpaca.tasks.rows",
    "prefect_alpaca.tasks.speed",
    "prefect_alpaca.tasks.model",
    "prefect_alpaca.tasks.progress",
    "alpaca_core",
    "alpaca_core.loading",
    "alpaca_core.host.launcher",
    "alpaca_core.host.client",
    "alpaca_core.host.cluster",
    "alpaca_core.host.exchange",
    "alpaca_core.host.server",
    "alpaca_core.host.application",
    "alpaca_core.host.metrics",
    "alpaca_core.host.neighbours",
    "alpaca_core.host.keeping",
    "alpaca_core.host.loader",
    "alpaca_core.host.settings",
    "alpaca_core.host.beside",
    "alpaca_core.host.scheduler",
    "alpaca_core.host.supervisor",
    "alpaca_core.host.place",
    "alpaca_core.host.engine",
    "alpaca_core.host.protocol",
    "alpaca_core.host.routing",
    "alpaca_core.host",
    "alpaca_core.engines.opening",
    "alpaca_core.engines.vllm",
    "alpaca_core.engines.vllm_model",
    "alpaca_core.engines.vllm_rows",
    "alpaca_core.engines.native",
    "alpaca_core.engines.feeding",
    "alpaca_core.engines.reading",
    "alpaca_core.engines.searching",
    "alpaca_core.engines.running",
    "alpaca_core.engines.working",
    "alpaca_core.engines.choosing",
    "alpaca_core.engines.results",
    "alpaca_core.engines.graphs",
    "alpaca_core.engines.memory",
    "alpaca_core.engines.llama",
    "alpaca_core.engines.projections",
    "alpaca_core.engines.matrix_kernels",
    "alpaca_core.engines.kernels",
    "alpaca_core.engines.choice_kernels",
    "alpaca_core.engines.eager",
    "alpaca_core.engines.pages",
    "alpaca_core.engines.transformers",
    "alpaca_core.engines.engine",
    "alpaca_core.engines.checking",
    "alpaca_core.engines.heads",
    "alpaca_core.engines.scoring",
    "alpaca_core.engines.decoding",
    "alpaca_core.engines.beams",
    "alpaca_core.engines.sampling",
    "alpaca_core.engines.noise",
    "alpaca_core.engines.batching",
    "alpaca_core.engines.weights",
    "alpaca_core.engines.quantizing",
    "alpaca_core.engines.recovering",
    "alpaca_core.engines.sharing",
    "alpaca_core.engines.shapes",
    "alpaca_core.engines.packing",
    "alpaca_core.engines.pickles",
    "alpaca_core.engines.lora",
    "alpaca_core.engines.conversion",
    "alpaca_core.engines",
    "alpaca_core.adapters",
    "alpaca_core.checkpoints",
    "alpaca_core.cache",
    "alpaca_core.metering",
    "alpaca_core.progress",
    "alpaca_core.testing",
    "alpaca_core.answering",
    "alpaca_core.ordering",
    "alpaca_core.cascading",
    "alpaca_core.measuring",
    "alpaca_core.bootstrap",
    "alpaca_core.verification",
    "alpaca_core.consistency",
    "alpaca_core.uses",
    "alpaca_core.fitting",
    "alpaca_core.deciding",
    "alpaca_core.judging",
    "alpaca_core.asking",
    "alpaca_core.calibration",
    "alpaca_core.reasoning",
    "alpaca_core.tokens",
    "alpaca_core.generation",
    "alpaca_core.labels",
    "alpaca_core.prompts",
    "alpaca_core.rows",
    "alpaca_core.identity",
    "alpaca_core.model",
    "alpaca_core.tokenizer",
    "alpaca_core.spec",
    "alpaca_core.errors",
]
FOLDERS = {"alpaca_core": "alpaca_core", "tasks": "prefect_alpaca.tasks", "flows": "prefect_alpaca.flows"}


def modules() -> dict[str, Path]:
    """Every module of the project, by the name it is imported by."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """The modules that a file imports, those inside functions too where `everywhere`; typing-only ones never."""
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(inner) for node in typing_only for inner in ast.walk(node)}
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in ROOMS else str(node.module)


def mapped() -> list[str]:
    """The paths of the README's file map, in its order; a line that is set in lies in the folder above it."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are", 1)[1]
    folders: list[str] = []
    paths = []
    for line in section.split("```")[1].splitlines()[1:]:
        found = re.match(r"( *)(\S+)  +\S", line)
        assert found, f"{line!r} names no file and says what it is"
        depth, name = len(found[1]) // 2, found[2]
        folders[depth:] = [name] if name.endswith("/") else []
        paths.append("".join([*folders[:depth], name]))
    return paths


def test_every_module_has_its_floor() -> None:
    assert sorted(modules()) == sorted(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_run_downwards(name: str) -> None:
    upwards = [
        imported
        for imported in imports(modules()[name], everywhere=True)
        if imported in ROOMS and ROOMS.index(imported) <= ROOMS.index(name)
    ]
    assert upwards == []


def test_the_readme_maps_every_file_once_and_none_that_is_gone() -> None:
    tree = [
        str(path.relative_to(ROOT))
        for folder in ("alpaca_core", "tasks", "flows", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(mapped()) == len(set(mapped()))
    assert [path for path in mapped() if not (ROOT / path).exists()] == []
    assert sorted(set(tree) - set(mapped())) == []


def test_the_readme_maps_the_core_from_the_top_down() -> None:
    names = {path: name for name, path in modules().items()}
    order = [names[ROOT / path] for path in mapped() if path.startswith("alpaca_core/") and path.endswith(".py")]
    upwards = [
        f"{name} imports {imported}"
        for name in order
        for imported in imports(modules()[name], everywhere=True)
        if imported in order and order.index(imported) <= order.index(name)
    ]
    assert upwards == []


@pytest.mark.parametrize("name", [name for name in ROOMS if name.startswith("alpaca_core")])
def test_the_core_never_imports_prefect(name: str) -> None:
    assert [imported for imported in imports(modules()[name], everywhere=True) if "prefect" in imported] == []


@pytest.mark.parametrize("name", [name for name in ROOMS if not name.startswith("alpaca_core.engines.")])
def test_only_engines_import_torch_when_they_are_imported(name: str) -> None:
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
    assert [each for each in imports(modules()[name], everywhere=False) if each.split(".")[0] in heavy] == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import alpaca_core", ["torch", "transformers", "prefect"]),
        ("import prefect_alpaca.tasks", ["torch", "transformers"]),
        ("import prefect_alpaca.flows", ["torch", "transformers", "prefect"]),
        (
            "from prefect_alpaca.flows import answer_question, generate_and_judge, judge_texts",
            ["torch", "transformers"],
        ),
        ("import prefect_alpaca.flows.cli", ["torch", "transformers", "prefect"]),
    ],
)
def test_importing_is_light(statement: str, absent: list[str]) -> None:
    program = f"{statement}\nimport sys\nprint([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_alpaca_core_exports_sorted_and_pinned_names() -> None:
    assert alpaca_core.__all__ == [
        "Answer",
        "Calibration",
        "CascadeJudgment",
        "CascadeMeasurement",
        "Completion",
        "Conclusion",
        "Decision",
        "Display",
        "Judgment",
        "Label",
        "LanguageModel",
        "Measurement",
        "ModelInfo",
        "ModelSpec",
        "NamedAdapter",
        "OrderEffect",
        "Outlier",
        "Policy",
        "Rating",
        "RowError",
        "Sampling",
        "Token",
        "TokenProbability",
        "Verification",
        "Vote",
        "answer",
        "cascade",
        "chain_of_thought",
        "classify",
        "conclude",
        "decide",
        "describe_tokens",
        "final_answer",
        "fit_calibration",
        "fit_display",
        "fit_policy",
        "generate",
        "is_outlier",
        "judge",
        "load_model",
        "measure",
        "measure_cascade",
        "measure_order",
        "next_tokens",
        "rate",
        "same_meaning",
        "show_tokens",
        "special_tokens",
        "verify",
    ]
    assert alpaca_core.__all__ == sorted(alpaca_core.__all__)
    assert all(hasattr(alpaca_core, name) for name in alpaca_core.__all__)


def test_tasks_export_sorted_and_pinned_names() -> None:
    assert prefect_alpaca.tasks.__all__ == [
        "Json",
        "cascade",
        "chain_of_thought",
        "classify",
        "conclude",
        "generate",
        "is_outlier",
        "judge",
        "load_model",
        "rate",
        "same_meaning",
        "use_model",
        "values",
        "verify",
    ]
    assert all(hasattr(prefect_alpaca.tasks, name) for name in prefect_alpaca.tasks.__all__)


def test_flows_export_sorted_and_pinned_names() -> None:
    assert prefect_alpaca.flows.__all__ == [
        "answer_question",
        "cascade_texts",
        "classify_texts",
        "compare_texts",
        "find_outliers",
        "generate_and_judge",
        "judge_texts",
        "rate_texts",
    ]
    assert all(hasattr(prefect_alpaca.flows, name) for name in prefect_alpaca.flows.__all__)
    assert set(prefect_alpaca.flows.__all__) <= set(dir(prefect_alpaca.flows))
    assert not hasattr(prefect_alpaca.flows, "no_such_flow")


@pytest.mark.parametrize("path", modules().values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"util", "utils", "helper", "helpers", "common", "misc", "manager"}


@pytest.mark.parametrize("path", modules().values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
