"""vLLM gets the checkpoints that the other engines get, and refuses what they refuse."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_core import load_model
from alpaca_core.errors import (
    DeviceUnavailable,
    EngineUnavailable,
    InvalidAdapter,
    InvalidCheckpoint,
    LoadError,
    NotEnoughMemory,
    UnsafeCheckpoint,
)
from alpaca_core.host.neighbours import hosts, stop
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import ModelSpec, NamedAdapter, Sampling

ON_VLLM = find_spec("vllm") is not None
on_vllm = pytest.mark.skipif(not ON_VLLM, reason="vLLM is not installed here; `make test-vllm` runs this")
PROMPTS = [(3, 4, 5), (100, 7), (30,) * 20]
TRIE = Trie.of([[5], [6, 7], [6, 8, 9], [10, 11, 12, 13]])[0]


@pytest.fixture
def wide(base: Path) -> Path:
    """The tiny checkpoint with heads of 32, the smallest that vLLM has for a CPU."""
    torch.manual_seed(0)
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = json.loads((base / "config.json").read_text())
    shape = {name: config[name] for name in (*kept, "max_position_embeddings", "vocab_size")}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **ends, head_dim=32, initializer_range=0.2)).save_pretrained(base)
    return base


def spec(base: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(base_model=str(base), **{"device": "cpu"} | settings)


def results(found: ModelSpec, adapters: tuple[str | None, ...] = ("default",)) -> tuple[list[Any], list[Any]]:
    """Scores and greedy tokens of a few rows."""
    with load_model(found) as model:
        rows = [(prompt, name) for name in adapters for prompt in PROMPTS]
        scored = dict(model.loglikelihood([ScoreRow(prompt, TRIE, name) for prompt, name in rows]))
        greedy = Sampling(max_new_tokens=8)
        said = dict(model.generate([GenerateRow(prompt, greedy, 0, name) for prompt, name in rows]))
    return [scored[place] for place in range(len(rows))], [said[place].token_ids for place in range(len(rows))]


def assert_close(found: tuple[list[Any], list[Any]], expected: tuple[list[Any], list[Any]]) -> None:
    for mine, other in zip(found[0], expected[0], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine": "vllm", "quantization": "int8"}, "plain weights"),
        ({"engine": "vllm", "device_map": "auto"}, "tensor_parallel_size"),
        ({"engine": "vllm", "adapter": "x", "merge_adapter": True}, "merge_adapter"),
        ({"tensor_parallel_size": 2}, 'engine="vllm"'),
        ({"engine": "vllm", "tensor_parallel_size": 0}, "greater than or equal to 1"),
        ({"engine": "llama.cpp"}, "'auto' or 'vllm'"),
    ],
)
def test_a_recipe_that_an_engine_would_not_follow_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ModelSpec(**settings)


@pytest.mark.skipif(ON_VLLM, reason="vLLM is installed here")
def test_without_vllm_the_error_says_how_to_get_it(tiny: Path) -> None:
    with (
        pytest.raises(EngineUnavailable, match=r"pip install 'prefect-alpaca\[vllm\]'"),
        load_model(spec(tiny, engine="vllm")),
    ):
        pass


@on_vllm
def test_it_finds_what_our_own_engine_finds(wide: Path) -> None:
    assert_close(results(spec(wide, engine="vllm")), results(spec(wide)))


@on_vllm
def test_adapters_are_named_by_rows_and_the_bare_base_is_none(wide: Path, make_adapter: Callable[..., Path]) -> None:
    one = make_adapter("one", base=wide, target_modules=["q_proj", "v_proj", "down_proj"])
    other = make_adapter("other", base=wide, seed=2, r=3, lora_alpha=9, use_rslora=True)
    patterned = make_adapter("patterned", base=wide, seed=3, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})
    settings: dict[str, Any] = {
        "adapter": str(one),
        "adapters": (NamedAdapter(name="b", source=str(other)), NamedAdapter(name="c", source=str(patterned))),
    }
    names = ("default", "b", None, "c")
    expected = results(spec(wide, **settings), names)
    assert_close(results(spec(wide, engine="vllm", **settings), names), expected)
    assert len({str(row) for row in expected[0]}) == len(expected[0])


@on_vllm
def test_a_host_runs_it_for_several_processes(
    wide: Path, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = spec(wide, engine="vllm", adapter=str(make_adapter("one", base=wide)))
    expected = results(adapted, ("default", None))
    with tempfile.TemporaryDirectory(prefix="alpaca-", dir="/tmp") as folder:
        monkeypatch.setenv("ALPACA_RUNTIME", folder)
        monkeypatch.setenv("ALPACA_HOST", "auto")
        try:
            assert_close(results(adapted, ("default", None)), expected)
            assert_close(results(adapted, ("default", None)), expected)
            ((_, status),) = hosts()
            assert status.engine_pid is not None
            assert psutil.Process(status.engine_pid).ppid() == status.pid
        finally:
            assert all(stop(path) for path, _ in list(hosts()))


@on_vllm
def test_an_adapter_that_does_not_fit_is_refused(wide: Path, tiny: Path, make_adapter: Callable[..., Path]) -> None:
    for adapter, match in (
        (make_adapter("foreign", base=tiny), "another base"),
        (make_adapter("head", base=wide, target_modules=["q_proj", "lm_head"]), "lm_head"),
    ):
        with pytest.raises(InvalidAdapter, match=match), load_model(spec(wide, engine="vllm", adapter=str(adapter))):
            pass


@on_vllm
def test_the_information_says_what_it_is(wide: Path) -> None:
    with load_model(spec(wide)) as ours, load_model(spec(wide, engine="vllm")) as model:
        info = model.info
        assert (info.engine, info.rows_independent, info.shape) == ("vllm", False, "")
        assert (info.device, info.dtype, info.context_length) == ("cpu", "float32", 128)
        assert info.digest != (ours.info.unshaped_digest or ours.info.digest)
        same = {"name", "context_length", "vocab_size", "eos_ids", "adapters", "template", "revision", "dtype"}
        assert info.model_dump(include=same) == ours.info.model_dump(include=same)


def drop_layer(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def add_layer(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        change(tensors)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})

    return edit


@on_vllm
@pytest.mark.parametrize(
    "damage",
    [
        drop_layer,
        add_layer,
        edited(lambda tensors: tensors.pop("lm_head.weight")),
        edited(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        edited(lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(32)})),
        edited(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)})),
        edited(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 5].fill_(float("nan"))),
        lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-40]),
    ],
    ids=["layer less", "layer more", "no head", "tensor missing", "tensor more", "misshapen", "not finite", "torn"],
)
def test_a_damaged_checkpoint_is_refused(wide: Path, damage: Callable[[Path], object]) -> None:
    damage(wide)
    with pytest.raises(InvalidCheckpoint), load_model(spec(wide, engine="vllm")):
        pass


@on_vllm
def test_a_pickle_is_not_opened(wide: Path) -> None:
    tensors = load_file(wide / "model.safetensors")
    torch.save(tensors, wide / "pytorch_model.bin")
    (wide / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpoint), load_model(spec(wide, engine="vllm")):
        pass


@on_vllm
def test_a_device_or_a_memory_that_is_not_there_is_an_error(wide: Path) -> None:
    for settings, kind in (({"device": "cuda"}, DeviceUnavailable), ({"memory_share": 1e-6}, NotEnoughMemory)):
        refused: type[LoadError] = kind
        with pytest.raises(refused), load_model(spec(wide, engine="vllm", **settings)):
            pass


@on_vllm
def test_nothing_listens_beyond_loopback_and_the_process_is_as_before(wide: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    setter = torch.set_num_threads
    with load_model(spec(wide, engine="vllm")) as model:
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        assert after == state
        assert torch.set_num_threads is setter
        process = psutil.Process()
        listening = [each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN"]
        assert set(listening) <= {"127.0.0.1", "::1"}
        assert list(model.generate([])) == []
    assert process.children(recursive=True) == []


@on_vllm
def test_a_model_that_is_closed_gives_its_memory_back(wide: Path) -> None:
    process = psutil.Process()
    results(spec(wide, engine="vllm"))
    before = process.memory_info().rss
    for _ in range(3):
        results(spec(wide, engine="vllm"))
    assert process.memory_info().rss - before < 200 * 2**20


@on_vllm
def test_two_models_run_side_by_side(wide: Path, tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    second = Path(shutil.copytree(wide, tmp_path / "second"))
    edited(lambda tensors: tensors["lm_head.weight"].mul_(2))(second)
    expected = [results(spec(each)) for each in (wide, second)]
    adapter = make_adapter("beside", base=wide)
    with load_model(spec(wide, engine="vllm", adapter=str(adapter))):
        for each, ours in zip((wide, second), expected, strict=True):
            assert_close(results(spec(each, engine="vllm")), ours)


@on_vllm
def test_on_the_embedded_model_scores_and_greedy_tokens_are_those_of_transformers(embedded: ModelSpec) -> None:
    from alpaca_core.engines.weights import load_weights

    texts = ["The capital of France is", "Alpacas are", "1, 2, 3, 4,", "def add(a, b):\n    return"]
    with load_model(embedded.model_copy(update={"engine": "vllm", "memory_share": 0.5})) as model:
        prompts = [tuple(model.tokenizer.encode(text)) for text in texts]
        tries = [Trie.of([[each] for each in range(0, 49_152, 7)] + [[5, 6], [5, 7, 8]])[0] for _ in prompts]
        rows = [ScoreRow(prompt, trie) for prompt, trie in zip(prompts, tries, strict=True)]
        found = dict(model.loglikelihood(rows))
        said = dict(model.generate([GenerateRow(prompt, Sampling(max_new_tokens=12)) for prompt in prompts]))
    oracle: Any = load_weights(embedded).network
    for place, prompt in enumerate(prompts):
        assert not isinstance(found[place], RowError)
        with torch.no_grad():
            expected = oracle(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        mine = torch.tensor(found[place][: 49_152 // 7 + 1]).double()
        assert (mine - expected[::7]).abs().max() < 1e-3
        ids = torch.tensor([prompt])
        theirs = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        tokens = theirs[0, len(prompt) :].tolist()
        assert said[place].token_ids == tuple(token for token in tokens if token != 2)


@on_vllm
def test_layers_split_over_two_workers_find_the_same(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if len(psutil.Process().cpu_affinity() or ()) > 1 else "0|0")
    with load_model(spec(wide, engine="vllm", tensor_parallel_size=2)) as model:
        assert len(list(model.generate([GenerateRow((1,), Sampling(max_new_tokens=1))]))) == 1
        processes = psutil.Process().children(recursive=True)
        workers = [each for each in processes if "Worker" in each.name()]
        assert len(workers) == 2
        listening = [each for worker in workers for each in worker.net_connections("inet") if each.status == "LISTEN"]
        assert {each.laddr.ip for each in listening} <= {"127.0.0.1", "::1"}
    assert_close(results(spec(wide, engine="vllm", tensor_parallel_size=2)), results(spec(wide)))
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)
