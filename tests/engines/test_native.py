"""Our own forward pass: the same bits in any company, shared prompts, long texts, short memory, failures."""

import gc
import json
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alpaca_core.engines import llama, native
from alpaca_core.engines.llama import Llama, runs
from alpaca_core.engines.native import NativeModel, tried
from alpaca_core.engines.packing import PAGE
from alpaca_core.engines.shapes import Shape
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import Sampling

TRIE = Trie.of([[5], [6, 7], [6, 8, 9], [10, 11, 12, 13]])[0]
SETTINGS = [
    Sampling(max_new_tokens=9),
    Sampling(max_new_tokens=12, temperature=1.0),
    Sampling(max_new_tokens=7, temperature=1.3, top_p=0.8, seed=4),
    Sampling(max_new_tokens=5, temperature=0.8, top_k=9),
]


def texts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 1 to 400 tokens, half of which begin alike for 40 to 90 tokens."""
    draw = random.Random(seed)
    head = [draw.randrange(256) for _ in range(90)]
    lengths = [draw.choice([1, 7, 31, 32, 33, 64, 100, 310]) for _ in range(count)]
    begins = [head[: draw.choice([0, 0, 40, 64, 90])] for _ in range(count)]
    return [
        (*begin, *(draw.randrange(256) for _ in range(length))) for begin, length in zip(begins, lengths, strict=True)
    ]


def results(model: Any, prompts: list[tuple[int, ...]], adapters: tuple[str | None, ...] = (None,)) -> list[Any]:
    """What each prompt scores and says; which settings and adapter it has follows from the prompt alone."""
    told = [sum(prompt) for prompt in prompts]
    names = [adapters[number % len(adapters)] for number in told]
    scored = dict(model.loglikelihood([ScoreRow(p, TRIE, n) for p, n in zip(prompts, names, strict=True)]))
    rows = [
        GenerateRow(prompt, SETTINGS[number % len(SETTINGS)], number % 3, name)
        for prompt, number, name in zip(prompts, told, names, strict=True)
    ]
    said = dict(model.generate(rows))
    return [(scored[place], said[place]) for place in range(len(prompts))]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_order_shard_batch_size_and_alone(
    make_native: Callable[..., NativeModel],
    add_adapters: Callable[..., Any],
    make_network: Callable[..., Any],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    names = ("default", "other")
    network = add_adapters(make_network(max_position_embeddings=1024, hidden_size=64, intermediate_size=100), names)
    chosen = (*names, None)
    prompts = texts(30)
    expected = results(make_native(8, names, network), prompts, chosen)
    order = random.Random(1).sample(range(30), 30)
    shuffled = results(make_native(30, names, network), [prompts[place] for place in order], chosen)
    assert shuffled == [expected[place] for place in order]
    for shard in range(3):
        places = order[shard::3]
        assert results(make_native(3, names, network), [prompts[place] for place in places], chosen) == [
            expected[place] for place in places
        ]
    for place in order[:8]:
        assert results(make_native(1, names, network), [prompts[place]], chosen) == [expected[place]]


def test_another_process_finds_the_same_bits(tmp_path: Path, make_native: Callable[..., NativeModel]) -> None:
    program = """
import json, sys
import torch
torch.set_num_threads(1)
from tests.engines.test_native import TRIE, embedded_results
json.dump(embedded_results(reverse=True), open(sys.argv[1], "w"))
"""
    make_native()  # skips for the other engine
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "found")], check=True, cwd=Path(__file__).parents[2])
    assert json.loads((tmp_path / "found").read_text()) == embedded_results()


def embedded_results(*, reverse: bool = False) -> list[Any]:
    """Scores and tokens of a few rows on the embedded model, in JSON."""
    from alpaca_core import load_model

    prompts = [tuple(token % 400 + 100 for token in prompt[:60]) for prompt in texts(6, seed=2)]
    with load_model() as model:
        found = results(model, prompts[::-1] if reverse else prompts)
    listed = [[scores, list(completion.token_ids)] for scores, completion in found]
    return listed[::-1] if reverse else listed


def test_pages_of_earlier_calls_are_used_and_change_nothing(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_native()
    read: list[int] = []
    plain = Llama.read
    monkeypatch.setattr(
        Llama,
        "read",
        lambda self, packed, *args, **kwargs: (
            read.append(int(packed.counts.sum())) or plain(self, packed, *args, **kwargs)
        ),
    )
    prompt = texts(1)[0][:1] * 200
    rows = [ScoreRow((*prompt, token), Trie.of([[1], [2]])[0]) for token in range(4)]
    first = dict(model.loglikelihood(rows))
    assert sum(read) == 201 + 3 * (201 - 192)
    read.clear()
    assert dict(model.loglikelihood(rows)) == first
    assert sum(read) == 4 * (201 - 192)
    generated = dict(model.generate([GenerateRow(row.prompt_ids, SETTINGS[0]) for row in rows]))
    model._memory.pages.forget()
    assert dict(model.generate([GenerateRow(row.prompt_ids, SETTINGS[0]) for row in rows])) == generated


def test_a_beginning_of_any_length_is_shared_in_units_of_16_tokens(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Llama.read
    monkeypatch.setattr(
        Llama,
        "read",
        lambda self, packed, *rest, **how: read.append(int(packed.counts.sum())) or plain(self, packed, *rest, **how),
    )
    draw = random.Random(3)
    for shared in [*range(1, 36), 47, 48, 49, 63, 64, 65, 80]:
        first, other = ([draw.randrange(256) for _ in range(90)] for _ in range(2))
        prompts = [tuple(first), (*first[:shared], *other[: draw.choice([1, 5, 16, 17, 40])])]
        expected = results(make_native(), prompts[1:])
        model = make_native()
        results(model, prompts[:1])
        read.clear()
        dict(model.loglikelihood([ScoreRow(prompts[1], Trie.of([[1], [2]])[0])]))
        common = next(
            place for place in range(len(prompts[1]) + 1) if prompts[1][: place + 1] != prompts[0][: place + 1]
        )
        assert sum(read) == len(prompts[1]) - min(common, len(prompts[1]) - 1) // 16 * 16
        model = make_native()
        assert results(model, prompts)[1:] == expected
        assert results(model, prompts)[1:] == expected


def test_paths_longer_than_a_tile_and_wide_tries_score_as_token_by_token(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any]
) -> None:
    network = make_network(max_position_embeddings=1024)
    draw = random.Random(5)
    long = [draw.randrange(256) for _ in range(80)]
    for sequences in ([long, [*long[:50], 3, 4]], [[draw.randrange(6), draw.randrange(9), 1, 2] for _ in range(60)]):
        trie = Trie.of(sequences)[0]
        row = ScoreRow(tuple(range(45)), trie)
        ((_, found),) = make_native(network=network).loglikelihood([row])
        for node in range(len(trie.tokens)):
            path = [trie.tokens[each] for each in trie.path(node)]
            with torch.no_grad():
                logits = network(torch.tensor([[*row.prompt_ids, *path[:-1]]])).logits[0, -1]
            assert found[node] == pytest.approx(float(logits.log_softmax(-1)[path[-1]]), abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=None, head_dim=16),
        Qwen2Config(),
        LlamaConfig(attention_bias=True, mlp_bias=False),
        LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        LlamaConfig(
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        ),
        LlamaConfig(
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            }
        ),
    ],
    ids=lambda config: f"{config.model_type}-{(config.rope_parameters or {}).get('rope_type')}",
)
def test_families_and_scaled_positions_are_those_of_transformers(make_model: Callable[..., Any], config: Any) -> None:
    kinds = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    for name, value in (
        ("vocab_size", 258), ("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 2),
        ("num_attention_heads", 4), ("num_key_value_heads", 2), ("max_position_embeddings", 256),
        ("eos_token_id", None),
    ):  # fmt: skip
        setattr(config, name, value)
    torch.manual_seed(0)
    network = kinds[config.model_type](config).eval()
    for weight in network.parameters():
        weight.data.normal_(0.0, 0.3)
    model = make_model(network)
    assert runs(network)
    prompt = tuple(range(1, 150))
    ((_, found),) = model.loglikelihood([ScoreRow(prompt, Trie.of([[token] for token in range(258)])[0])])
    with torch.no_grad():
        expected = network(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert found == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_spoilt_row_leaves_nothing_behind_in_its_pages(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any]
) -> None:
    network = make_network(max_position_embeddings=1024)
    expected = results(make_native(network=network), texts(12))
    clean = [place for place, prompt in enumerate(texts(12)) if 99 not in prompt]
    with torch.no_grad():
        network.model.embed_tokens.weight[99] = torch.nan
    model = make_native(2, network=network)
    for _ in range(2):
        for prompt in ((99,), (1,) * 70 + (99,), (99,) * 70):
            ((_, scored),) = model.loglikelihood([ScoreRow(prompt, TRIE)])
            ((_, said),) = model.generate([GenerateRow(prompt, SETTINGS[0])])
            assert isinstance(scored, RowError)
            assert isinstance(said, RowError)
        found = results(model, texts(12))
        assert [found[place] for place in clean] == [expected[place] for place in clean]


def test_rows_wait_for_pages_where_memory_is_short_and_one_that_never_fits_says_so(
    make_native: Callable[..., NativeModel],
) -> None:
    prompts = texts(20)
    expected = results(make_native(), prompts)
    model = make_native()
    model._memory._limit = 1 + max(len(prompt) + 12 for prompt in prompts) // PAGE + 3
    assert results(model, prompts) == expected
    large = results(model, [*prompts[:3], (1,) * 700, *prompts[3:]])
    assert [each.code for each in large.pop(3)] == ["not_enough_memory"] * 2
    assert large == expected


def test_a_cache_has_no_more_pages_than_kernels_can_count(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = texts(20)
    model = make_native()
    expected = results(model, prompts)
    held = model._memory.pages.count
    most = 1 + max(len(prompt) + 12 for prompt in prompts) // PAGE + 3
    assert most < held
    monkeypatch.setattr(Llama, "most_pages", most)
    model._memory.forget()
    assert results(model, prompts) == expected
    assert 1 < model._memory.pages.count == model._memory.cache.shape[2] <= most
    assert {each.code for each in results(model, [(1,) * 700])[0]} == {"not_enough_memory"}


@pytest.mark.parametrize("fault", ["other bits", "an error"])
def test_large_products_with_a_fault_are_left_to_the_library(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    class Trying:
        large = True

        def leave_large(self) -> None:
            self.large = False

        def steady(self, counts: range, most: int) -> bool:
            assert most == 4096
            assert list(counts) == list(range(256, 4096, 256))
            if self.large and fault == "an error":
                raise RuntimeError("no such instruction")
            return not self.large

    trying = Trying()
    shape = Shape(slots=64, tokens=4096, fixed=True, grain=4096)
    assert tried(trying, shape) == (replace(shape, grain=256), True)  # type: ignore[arg-type]
    assert not trying.large
    assert ("no such instruction" in caplog.text) == (fault == "an error")


def test_threads_share_steps_and_a_cancelled_caller_takes_only_its_own_rows(
    make_native: Callable[..., NativeModel],
) -> None:
    prompts = texts(24)
    model = make_native(6)
    expected = results(model, prompts)
    found: dict[int, Any] = {}

    def work(place: int) -> None:
        found[place] = results(model, prompts[place::4])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    cancelled = model.generate([GenerateRow(prompt, Sampling(max_new_tokens=50)) for prompt in prompts])
    next(cancelled)
    cancelled.close()
    for thread in threads:
        thread.join()
    for place in range(4):
        assert found[place] == expected[place::4]
    assert not model._memory.pages.in_use


def test_a_prompt_that_is_another_ones_continuation_finds_no_page_that_is_not_yet_written(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any]
) -> None:
    network = make_network(max_position_embeddings=1024)
    draw = random.Random(8)
    prompt, long = (tuple(draw.randrange(256) for _ in range(length)) for length in (40, 70))
    rows = [
        ScoreRow(prompt, Trie.of([long])[0]),
        ScoreRow((*prompt, *long), TRIE),
        ScoreRow((*prompt, *long[:30]), TRIE),
    ]
    expected = [dict(make_native(network=network).loglikelihood([row]))[0] for row in rows]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        found = dict(make_native(network=network).loglikelihood([rows[place] for place in order]))
        assert [found[place] for place in range(3)] == [expected[place] for place in order]
    model = make_native(1, network=network)
    closed = model.loglikelihood([ScoreRow((token,), TRIE) for token in range(40)] + rows[:1])
    next(closed)
    closed.close()
    assert dict(model.loglikelihood(rows[1:])) == {0: expected[1], 1: expected[2]}
    assert not model._memory.pages.in_use


def test_a_caller_that_leaves_takes_the_pages_of_its_last_tokens_with_it(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "first_shape", lambda *_: Shape(8, 512, fixed=True))
    model = make_native(8)
    lengths = (7, 8, 50)
    leaving = model.generate([GenerateRow((5, 6), Sampling(max_new_tokens=length)) for length in lengths])
    next(leaving)
    leaving.close()
    assert not model._memory.pages.in_use
    dict(model.generate([GenerateRow((5, 6), Sampling(max_new_tokens=3))]))
    assert not model._memory.pages.in_use


def test_the_network_that_was_loaded_is_not_kept(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any]
) -> None:
    network = make_network(max_position_embeddings=1024)
    weights = [weakref.ref(layer.mlp.up_proj) for layer in network.model.layers]
    model = make_native(network=network)
    expected = results(model, texts(3))
    del network
    gc.collect()
    assert not any(weight() for weight in weights)
    assert results(model, texts(3)) == expected


def test_what_is_no_plain_llama_is_left_to_transformers(make_network: Callable[..., Any]) -> None:
    assert runs(make_network())
    assert not runs(make_network(hidden_act="gelu"))
    assert not runs(make_network(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    assert not runs(make_network(hidden_size=24))  # heads of 6 numbers
    assert {LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM} <= llama._FAMILIES
