"""1,000 rows at temperature 1 and 1,000 judged ones have the same bits in any company, at the embedded model's widths.

The widths matter: whether a product's sums depend on its number of rows is a matter of how large it is.
"""

import pickle
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_core.engines.native import NativeModel
from alpaca_core.model import GenerateRow, ModelInfo, ScoreRow, Trie
from alpaca_core.spec import Sampling
from alpaca_core.testing import FakeModel

ROWS = 1000
VOCAB = 2048
TRIE = Trie.of([[5], [9, 11], [9, 12, 13]])[0]


def make_model(batch_size: int = 16, *, narrow: bool = False) -> NativeModel:
    """Two layers of the embedded model's widths, with random weights; `narrow` are those that float16 holds exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.data.mul_(3.0 if weight.dim() == 2 else 1.0)  # so that rows differ by more than chance
        weight.data = weight.half().float() if narrow else weight.data
    info = ModelInfo(
        name="wide", digest="0" * 64, engine="transformers", device="cpu", dtype="float32", quantization="none",
        context_length=256, vocab_size=VOCAB, eos_ids=(7,),
    )  # fmt: skip
    return NativeModel(network, FakeModel("").tokenizer, info, batch_size)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 2 to 76 tokens, of which two thirds begin alike."""
    draw = random.Random(seed)
    head = [draw.randrange(VOCAB) for _ in range(40)]
    return [
        (*head[: draw.choice([0, 33, 40])], *(draw.randrange(VOCAB) for _ in range(draw.randrange(2, 37))))
        for _ in range(count)
    ]


def results(model: NativeModel, rows: Sequence[tuple[int, ...]]) -> list[Any]:
    """What rows say at temperature 1, and the scores of their labels."""
    said = dict(model.generate([GenerateRow(row, Sampling(max_new_tokens=4, temperature=1.0)) for row in rows]))
    scored = dict(model.loglikelihood([ScoreRow(row, TRIE) for row in rows]))
    return [(said[place].token_ids, scored[place]) for place in range(len(rows))]  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> None:
    """The first results are those of whatever number of threads there is; it changes none."""
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return make_model()


@pytest.fixture(scope="module")
def expected(model: NativeModel) -> list[Any]:
    return results(model, prompts(ROWS))


def test_the_engine_says_that_rows_are_independent(model: NativeModel) -> None:
    assert model.info.rows_independent


def test_another_order_changes_no_bit(model: NativeModel, expected: list[Any]) -> None:
    order = random.Random(1).sample(range(ROWS), ROWS)
    model._memory.pages.forget()
    found = results(model, [prompts(ROWS)[place] for place in order])
    assert found == [expected[place] for place in order]


@pytest.mark.parametrize(("shards", "batch_size"), [(2, 64), (3, 16), (7, 5)])
def test_shards_and_batch_sizes_change_no_bit(expected: list[Any], shards: int, batch_size: int) -> None:
    rows = prompts(ROWS)
    for shard in range(shards):
        found = results(make_model(batch_size), rows[shard::shards])
        assert found == expected[shard::shards]


def test_other_neighbours_change_no_bit(model: NativeModel, expected: list[Any]) -> None:
    model._memory.pages.forget()
    mixed = [row for pair in zip(prompts(ROWS)[:300], prompts(300, seed=9), strict=True) for row in pair]
    assert results(model, mixed)[::2] == expected[:300]


def test_alone_one_row_at_a_time_no_bit_differs(model: NativeModel, expected: list[Any]) -> None:
    for row, result in zip(prompts(ROWS)[:64], expected, strict=False):
        model._memory.pages.forget()
        assert results(model, [row]) == [result]


def test_a_second_process_on_one_thread_finds_the_same_bits(tmp_path: Path, expected: list[Any]) -> None:
    program = """
import pickle, sys
import torch
torch.set_num_threads(1)
from tests.engines.test_same_row import ROWS, make_model, prompts, results
pickle.dump(results(make_model(32), prompts(ROWS)[::-1])[::-1], open(sys.argv[1], "wb"))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "found")], check=True, cwd=Path(__file__).parents[2])
    assert pickle.loads((tmp_path / "found").read_bytes()) == expected


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no FBGEMM")
def test_weights_of_16_bits_change_no_bit_in_any_company() -> None:
    rows = prompts(200)
    model = make_model(narrow=True)
    assert model._llama is not None
    assert model._llama.narrow
    assert model._recovery.shape.steps == 1, "a step of one row computes one"
    expected = results(model, rows)
    for row, result in zip(rows[:64], expected, strict=False):
        model._memory.pages.forget()
        assert results(model, [row]) == [result]
    order = random.Random(1).sample(range(200), 200)
    for batch_size in (5, 64):
        assert results(make_model(batch_size, narrow=True), [rows[place] for place in order]) == [
            expected[place] for place in order
        ]
