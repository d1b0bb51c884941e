"""The measurements run: every section at the smallest size, on a tiny model."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_core import ModelSpec

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Imports a script of `bench/` by name, as it imports its neighbours, and forgets it in the end."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "bench"))

    def get(name: str) -> ModuleType:
        return __import__(name)

    yield get
    sys.path.remove(str(ROOT / "bench"))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "/bench/" in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(scope="module")
def tiny(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the made-up words of `bench/words.py`."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id"), 256)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    bench("words").write_tokenizer(folder, 2000)
    return folder


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.end_to_end
def test_every_section_measures_ours_and_draws(tiny: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "engine.json", tmp_path / "speed.png"
    sizes = "--rows 2 --prompt 16 --tokens 2 --judged 4 --questions 2 --reason 4 --conclude 2 --few 2 --repeat 1"
    growth = "--grow-rows 2 4 --grow-prompt 8 16 --grow-labels 2 6 --seconds 60"
    sections = ("generate", "judge", "settings", "int8", "chain", "growth")
    told = run(
        "engine.py", "--model", tiny, *sizes.split(), *growth.split(), "--sections", *sections, "--out", out,
        "--plot", plot,
    )  # fmt: skip
    figures = json.loads(out.read_text(encoding="utf-8"))["sections"]
    for section in sections[:5]:
        assert f"### {section}" in told
        for case in figures[section]["cases"].values():
            for name, entry in case["ways"].items():
                assert entry.get("per_s", 0) > 0 or entry.keys() & {"left_out", "failed"}, (section, name, entry)
            measured = {name for name, entry in case["ways"].items() if "per_s" in entry}
            assert {name for name in case["ways"] if name.startswith("ours")} <= measured
            assert section == "settings" or "the notebook's loop" in measured
            if section != "chain":
                assert "transformers" in measured
                assert case["limit"] > 0
    for axis in ("rows", "prompt", "labels"):
        for name, sizes_of in figures["growth"][axis].items():
            assert name == "CAPPr" or all("per_s" in entry for entry in sizes_of.values())
    for picture in (plot, tmp_path / "speed-growth.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.end_to_end
def test_rows_are_compared_with_those_of_the_first_run(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "same.json"
    sizes = "--rows 6 --alone 2 --tokens 3 --longest 40 --batch 4 --who ours transformers"
    run("same_row.py", "--model", tiny, *sizes.split(), "--out", out)
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    for name, found in runs["ours"].items():
        assert found["same_tokens"] == found["rows"] == (2 if name == "alone" else 6), (name, found)
    assert runs["transformers"].keys() == runs["ours"].keys()


@pytest.mark.end_to_end
def test_a_new_process_says_when_it_is_ready(tiny: Path) -> None:
    spec = ModelSpec(base_model=str(tiny)).model_dump_json()
    told = json.loads(run("ready.py", "ours", spec, 2))
    assert 0 < told["loaded"] <= told["first_token"] <= told["ready"]


def test_what_fails_and_what_takes_too_long_is_told_and_the_others_go_on(bench: Any) -> None:
    timing = bench("timing")

    def fails() -> int:
        raise ValueError("no such thing")

    def misses() -> int:
        raise timing.Left("is not installed")

    def sleeps() -> int:
        time.sleep(60)
        return 1

    def works() -> int:
        time.sleep(0.01)
        return 7

    told: list[str] = []
    ways = {"ours": works, "fails": fails, "misses": misses, "works": works, "sleeps": sleeps}
    found = timing.in_turn(ways, 2, 5.0, lambda name, _: told.append(name), lambda: time.sleep(1.0))
    assert "no such thing" in found["fails"]["failed"]
    assert found["misses"] == {"left_out": "is not installed"}
    assert "took longer" in found["sleeps"]["failed"]
    for name in ("ours", "works"):
        assert found[name]["per_s"] == pytest.approx(7 / found[name]["seconds"])
        assert 7 / 1.0 < found[name]["per_s"] <= 7 / 0.01
    assert set(told) == set(ways)


def test_the_limit_is_every_weight_through_memory_or_every_product(bench: Any) -> None:
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    network = LlamaForCausalLM(config)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    numbers = sum(module.weight.numel() for module in linear.values())
    memory = bench("limits").Limit(config, 4, {"copy GB/s": 1e-3, "product GFLOP/s": 1e9})
    assert memory.judge(1, 20, 0) == pytest.approx(1e6 / (4 * numbers))
    kept = sum(each.numel() for each in (network(torch.zeros(1, 20).long()).past_key_values.layers[0].keys,)) * 2 * 3
    seconds = 2 * 4 * numbers / 1e6 + 4 * kept / 20 * 21 / 1e6  # a pass over 20 tokens, and one step that sees 21
    assert memory.generate(1, 20, 2) == pytest.approx(2 / seconds)

    products = bench("limits").Limit(config, 4, {"copy GB/s": 1e9, "product GFLOP/s": 1e-3})
    body = numbers - linear["lm_head"].weight.numel()
    work = 2 * body * (10 + 5 * 10) + 2 * 5 * linear["lm_head"].weight.numel()
    assert products.judge(5, 20, 10) == pytest.approx(5 * 1e6 / work)
