"""Adapters beside the base compute base + (alpha / r) B A, and wrong ones are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from alpaca_core.engines.weights import Weights, load_weights
from alpaca_core.errors import InvalidAdapter, NotEnoughMemory
from alpaca_core.loading import import_adapter, load_model
from alpaca_core.model import ScoreRow, Trie
from alpaca_core.spec import ModelSpec

IDS = [1, 9, 40, 41, 100, 7]
Logits = Callable[[Any, list[int]], torch.Tensor]


def load(base: Path, **settings: Any) -> Weights:
    return load_weights(ModelSpec(base_model=str(base), device="cpu", **settings))


def by_hand(base: Path, adapter: Path) -> LlamaForCausalLM:
    """The base with each adapted weight replaced by its sum, from the definition."""
    network = LlamaForCausalLM.from_pretrained(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." in key:
            weight = network.get_parameter(key.removeprefix("base_model.model.").replace("lora_A.", ""))
            weight.data += config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")] @ a
    return network


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("merge_adapter", [False, True])
def test_an_adapted_network_is_the_sum_by_definition(
    tiny: Path, make_adapter: Callable[..., Path], logits: Logits, merge_adapter: bool
) -> None:
    adapter = make_adapter()
    loaded = load(tiny, adapter=str(adapter), merge_adapter=merge_adapter)
    expected = logits(by_hand(tiny, adapter), IDS)
    torch.testing.assert_close(logits(loaded.network, IDS), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(loaded.network, PeftModel) != merge_adapter
    assert [adapter.name for adapter in loaded.info.adapters] == ["default"]
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_several_adapters_stay_apart_and_the_base_stays_whole(
    tiny: Path, make_adapter: Callable[..., Path], logits: Logits
) -> None:
    # names that are parts of one another, of PEFT's own keys and names, of modules and of their methods
    names = ["default", "a", "lora", "q_proj", "lora_A", "weight", "base_layer", "keys", "training", "adapter0", "0-_"]
    changes: list[dict[str, Any]] = [{}, {"r": 8, "target_modules": ["gate_proj"]}]
    folders = {
        name: make_adapter(f"folder{place}", seed=place, **changes[place % 2]) for place, name in enumerate(names)
    }
    named = [{"name": name, "source": str(folder)} for name, folder in folders.items() if name != "default"]
    spec = ModelSpec(base_model=str(tiny), device="cpu", adapter=str(folders["default"]), adapters=named)  # type: ignore[arg-type]
    row = ScoreRow(tuple(IDS), Trie.of([[token] for token in range(260)])[0])
    rows = [replace(row, adapter=name) for name in [*names, None]]
    with load_model(spec) as model:
        found = dict(model.loglikelihood(rows))
    for place, folder in enumerate(folders.values()):
        expected = logits(by_hand(tiny, folder), IDS)[-1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(found[place]), expected, atol=1e-4, rtol=1e-4)
    bare = logits(load(tiny).network, IDS)[-1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(found[len(names)]), bare, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(up|down)_proj"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True},
        {"exclude_modules": ["layers.0.self_attn.q_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_every_kind_of_plain_lora_is_what_peft_makes_of_it(
    tiny: Path, make_adapter: Callable[..., Path], logits: Logits, config: dict[str, Any]
) -> None:
    # PEFT stores a copy of the base's embedding beside an adapter of it
    adapter = change(make_adapter(**config), lambda t: [t.pop(key) for key in list(t) if "base_layer" in key])
    oracle = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny), adapter).eval()
    assert torch.equal(logits(load(tiny, adapter=str(adapter)).network, IDS), logits(oracle, IDS))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_adapters_go_beside_quantized_weights(
    tiny: Path, make_adapter: Callable[..., Path], logits: Logits, quantization: str
) -> None:
    adapter = make_adapter()
    network: Any = load(tiny, adapter=str(adapter), quantization=quantization).network
    adapted = logits(network, IDS)
    with network.disable_adapter():
        bare = logits(network, IDS)
    oracle = logits(by_hand(tiny, adapter), IDS) - logits(load(tiny).network, IDS)
    assert torch.corrcoef(torch.stack([(adapted - bare).flatten(), oracle.flatten()]))[0, 1] > 0.75


def test_adapter_weights_have_the_network_s_dtype(tiny: Path, make_adapter: Callable[..., Path]) -> None:
    named = [{"name": "b", "source": str(make_adapter())}]
    network = load(tiny, adapter=str(make_adapter("two")), adapters=named, dtype="bfloat16").network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_the_notebook_s_adapter_loads_once_it_is_imported(
    tiny: Path, make_pickled: Callable[..., Path], logits: Logits
) -> None:
    source = make_pickled()
    folder = import_adapter(source, template="alpaca-lora")
    loaded = load(tiny, adapter=str(source))
    torch.testing.assert_close(logits(loaded.network, IDS), logits(by_hand(tiny, folder), IDS), atol=1e-4, rtol=1e-4)
    assert loaded.info.adapters[0].template == "alpaca-lora"


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), "another base: it lacks .*q_proj.lora_B"),
        (lambda t: t.update({KEY.replace(".0.", ".7."): t[KEY].clone()}), "another base: it has .*layers.7"),
        (lambda t: t.update({KEY: torch.ones(3, 4)}), r"another base: .*is \(3, 4\), where the base wants \(64, 4\)"),
        (lambda t: t[KEY].fill_(float("nan")), "must be finite"),
        (lambda t: [t.update({key: torch.zeros_like(t[key])}) for key in t if "lora_B" in key], "adds zero everywhere"),
        (lambda t: [t.update({key: torch.zeros_like(t[key])}) for key in t if "lora_A" in key], "adds zero everywhere"),
        (lambda t: [t.update({"x." + key: t.pop(key)}) for key in list(t)], "another base"),
        (lambda t: t.clear(), "another base: it lacks"),
    ],
    ids=["missing", "extra layer", "misshapen", "NaN", "B zero", "A zero", "other keys", "empty"],
)
def test_an_adapter_that_does_not_fit_or_does_nothing_is_refused(
    tiny: Path, make_adapter: Callable[..., Path], edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = change(make_adapter(), edit)
    with pytest.raises(InvalidAdapter, match=message):
        load(tiny, adapter=str(folder))


def test_an_adapter_for_modules_that_the_base_lacks_is_refused(tiny: Path, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query_key_value"]}))
    with pytest.raises(InvalidAdapter, match=r"query_key_value.*another base"):
        load(tiny, adapter=str(folder))


def test_an_alpha_of_zero_is_refused(tiny: Path, make_adapter: Callable[..., Path]) -> None:
    folder = make_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    with pytest.raises(InvalidAdapter, match="adds zero everywhere"):
        load(tiny, adapter=str(folder))


def test_a_torn_adapter_is_refused(tiny: Path, make_adapter: Callable[..., Path]) -> None:
    weights = make_adapter() / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(InvalidAdapter, match="cannot be read"):
        load(tiny, adapter=str(weights.parent))


@pytest.mark.parametrize("name", ["with.dot", "with blank", "", "line\n", "ä", "a/b"])
def test_a_name_is_letters_digits_and_dashes(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        ModelSpec.model_validate({"adapters": [{"name": name, "source": "x"}]})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("step", ["peft.tuners.lora.layer.LoraLayer.update_layer", "torch.Tensor.to"])
def test_an_adapter_that_does_not_fit_the_memory_is_said_to(
    tiny: Path, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    folder = make_adapter()
    whole = torch.Tensor.to

    def fail(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, torch.Tensor) and tensor.shape != (64, 4):
            return whole(tensor, *args, **kwargs)
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(NotEnoughMemory, match=rf"cpu ran out of memory.* and '{folder}'.*quantization='int8'"):
        load(tiny, adapter=str(folder))
