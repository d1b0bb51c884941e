"""A loaded network is what its files say, or there is an error."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from alpaca_core.engines.sharing import container_room
from alpaca_core.engines.weights import Weights, bytes_needed, find, load_weights
from alpaca_core.errors import DeviceUnavailable, InvalidCheckpoint, NotEnoughMemory, UnsafeCheckpoint
from alpaca_core.spec import ModelSpec

IDS = [1, 9, 40, 41, 100, 7]


def load(base: Path, **settings: Any) -> Weights:
    return load_weights(ModelSpec(base_model=str(base), **{"device": "cpu"} | settings))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_network_is_that_of_the_folder(tiny: Path, dtype: str, logits: Callable[..., torch.Tensor]) -> None:
    loaded = load(tiny, dtype=dtype)
    oracle = LlamaForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype))
    assert torch.equal(logits(loaded.network, IDS), logits(oracle, IDS))
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert loaded.network.config._attn_implementation == "sdpa"


def test_the_information_says_what_was_loaded(tiny: Path) -> None:
    loaded = load(tiny)
    info = loaded.info
    assert (info.name, info.engine, info.device, info.dtype) == (str(tiny), "transformers", "cpu", "float32")
    assert (info.context_length, info.vocab_size, info.eos_ids) == (128, loaded.network.config.vocab_size, (2,))
    assert (info.template, info.chat_template, info.adapters, info.revision) == ("auto", None, (), None)
    held = [*loaded.network.parameters(), *loaded.network.buffers()]
    assert info.memory_gib * 2**30 == sum(4 * tensor.numel() for tensor in held)
    assert 0 < info.load_seconds < 60
    assert loaded.tokenizer.eos_ids == info.eos_ids
    assert info.model_validate_json(info.model_dump_json()) == info


def test_the_digest_covers_all_that_can_change_a_result(
    tiny: Path, base: Path, make_adapter: Callable[..., Path]
) -> None:
    one, two = str(make_adapter("one")), str(make_adapter("two", seed=2))
    named = [{"name": "a", "source": one}, {"name": "b", "source": two}]
    recipes: list[dict[str, Any]] = [
        {},
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"quantization": "nf4"},
        {"adapter": one},
        {"adapter": two},
        {"adapter": one, "merge_adapter": True},
        {"adapters": named},
        {"adapters": named[:1]},
    ]
    digests = [load(tiny, **recipe).info.digest for recipe in recipes]
    for template in ("alpaca", "alpaca-lora"):
        (Path(one) / "alpaca.json").write_text(json.dumps({"template": template}))
        recipes.append({"adapter": one})
        digests.append(load(tiny, adapter=one).info.digest)
    (Path(one) / "alpaca.json").unlink()
    assert len(set(digests)) == len(recipes)
    assert load(base, dtype="float32", template="raw", batch_size=1).info.digest == digests[0]
    assert load(tiny, adapters=named[::-1]).info.digest == digests[7]
    edit_tensors(base, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert load(base).info.digest not in digests


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.06), ("nf4", 0.4)])  # of the logits' own spread
def test_quantized_networks_are_near_the_plain_one_and_smaller(
    tiny: Path, quantization: str, tolerance: float, logits: Callable[..., torch.Tensor]
) -> None:
    plain, quantized = load(tiny), load(tiny, quantization=quantization)
    expected, found = logits(plain.network, IDS), logits(quantized.network, IDS)
    assert (found - expected).abs().mean() < tolerance * expected.std()
    assert quantized.info.memory_gib < plain.info.memory_gib
    assert quantized.info.quantization == quantization


def test_a_row_s_int8_result_does_not_depend_on_an_outlier_in_its_neighbour(tiny: Path, base: Path) -> None:
    # LLM.int8() at its default threshold picks outlier columns over the whole batch; ours is 0
    edit_tensors(base, lambda tensors: tensors["model.embed_tokens.weight"][100].mul_(1000))
    network = load(base, quantization="int8").network
    with torch.no_grad():
        calm, loud = (network(torch.tensor([[5, 6, 7], [5, 6, last]])).logits[0] for last in (8, 100))
    assert torch.equal(calm, loud)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "1 missing keys.*layers.1.mlp.up_proj"),
        (lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}), "1 unexpected keys.*extra.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), "1 mismatched keys.*norm.weight"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "must be finite.*model.norm.weight"),
        (lambda tensors: tensors["lm_head.weight"][3].fill_(float("-inf")), "must be finite.*lm_head.weight"),
    ],
    ids=["missing", "unexpected", "misshapen", "NaN", "infinity"],
)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_wrong_tensors_are_refused(
    base: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str, quantization: str
) -> None:
    edit_tensors(base, change)
    with pytest.raises(InvalidCheckpoint, match=message):
        load(base, quantization=quantization)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_no_number_inside_a_quantized_weight_hides(base: Path, quantization: str, dtype: str, number: float) -> None:
    edit_tensors(base, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 5].fill_(number))
    with pytest.raises(InvalidCheckpoint, match=r"must be finite.*layers.0.mlp.up_proj.*Fetch the model again, or use"):
        load(base, quantization=quantization, dtype=dtype)


def test_a_weight_that_is_too_large_for_int8_is_refused(base: Path) -> None:
    # bitsandbytes goes by float16, where it would be infinity, and so would its row's scale
    edit_tensors(base, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 5].fill_(1e5))
    load(base, quantization="nf4")
    with pytest.raises(InvalidCheckpoint, match=r"finite in torch.float16.*0.mlp.up_proj.*quantization='nf4'"):
        load(base, quantization="int8")


def test_a_weight_that_is_too_large_for_the_dtype_is_refused(base: Path) -> None:
    edit_tensors(base, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    load(base)
    with pytest.raises(InvalidCheckpoint, match=r"finite in torch.float16.*float32"):
        load(base, dtype="float16")


@pytest.mark.parametrize("layers", [1, 3])
def test_a_wrong_layer_count_is_refused(base: Path, layers: int) -> None:
    edit(base / "config.json", num_hidden_layers=layers)
    with pytest.raises(InvalidCheckpoint, match=r"9 (missing|unexpected) keys"):
        load(base)


def test_tensors_that_transformers_ignores_are_no_error(base: Path) -> None:
    edit_tensors(base, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(base)


def test_tied_embeddings_need_no_head(base: Path) -> None:
    edit_tensors(base, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InvalidCheckpoint, match="lm_head"):
        load(base)
    edit(base / "config.json", tie_word_embeddings=True)
    network: Any = load(base).network
    assert network.lm_head.weight is network.model.embed_tokens.weight


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_torn_weight_file_is_refused(base: Path, keep: int) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidCheckpoint, match=r"model.safetensors"):
        load(base)


def test_a_repository_s_own_code_is_never_run(base: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    (base / "modeling.py").write_text(f"import os; os.mkdir({str(evidence)!r})")
    edit(base / "config.json", auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"})
    load(base)  # transformers knows the family by itself
    edit(base / "config.json", model_type="another")
    with pytest.raises(UnsafeCheckpoint, match=r"code is never run.*modeling.Model"):
        load(base)
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "another"}, "no model's"),
        ({"hidden_size": "wide"}, "no model's"),
        ({"model_type": "t5"}, "LLaMA-like"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already"),
    ],
)
def test_a_configuration_that_cannot_be_loaded_is_refused(base: Path, changes: dict[str, Any], message: str) -> None:
    edit(base / "config.json", **changes)
    with pytest.raises(InvalidCheckpoint, match=message):
        load(base)


def test_another_family_of_causal_models_is_loaded_too(base: Path, logits: Callable[..., torch.Tensor]) -> None:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    oracle = AutoModelForCausalLM.from_config(config).eval()
    (base / "model.safetensors").unlink()
    oracle.save_pretrained(base)
    loaded = load(base)
    assert loaded.info.context_length == 64
    assert torch.equal(logits(loaded.network, IDS), logits(oracle, IDS))


@pytest.mark.parametrize("device", ["cuda:99", "cuda"])
def test_a_gpu_that_is_not_there_is_named(tiny: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceUnavailable, match=f"device='{device}'.*sees {torch.cuda.device_count()}.*'cpu'"):
        load(tiny, device=device)


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu(tiny: Path) -> None:
    info = load(tiny, device="auto").info
    expected = ("cuda:0", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    assert (info.device, info.dtype) == expected


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_device_map_places_the_model(tiny: Path, logits: Callable[..., torch.Tensor], device_map: str) -> None:
    loaded = load(tiny, device="auto", device_map=device_map, dtype="float32")
    assert loaded.info.device == device_map
    if not torch.cuda.is_available():
        assert torch.equal(logits(loaded.network, IDS), logits(load(tiny).network, IDS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_the_memory_that_is_needed_is_known_before(tiny: Path, quantization: str, dtype: str) -> None:
    spec = ModelSpec(base_model=str(tiny), quantization=quantization, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    needed = bytes_needed(find(spec)[0], quantization, getattr(torch, dtype))
    held = load_weights(spec).info.memory_gib * 2**30
    assert needed == pytest.approx(held, rel=0.001 if quantization == "none" else 0.1)


def test_a_device_map_that_transformers_does_not_know_is_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="device_map"):
        ModelSpec.model_validate({"device_map": "cuda"})


STAT = "anon 5\nactive_file 30\ninactive_file 20\nshmem 7\n"


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, math.inf),
        ({"memory.max": "1000\n", "memory.current": "800\n", "memory.stat": STAT}, 250),
        ({"memory.max": "max\n", "memory.current": "800\n", "memory.stat": STAT}, math.inf),
        ({"memory.max": "1000\n", "memory.current": "800\n"}, math.inf),
        ({"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "900\n",
          "memory/memory.stat": f"cache 50\n{STAT}"}, 150),
    ],
    ids=["none", "version 2", "no limit", "not told", "version 1"],
)  # fmt: skip
def test_a_container_s_limit_is_read(tmp_path: Path, files: dict[str, str], room: float) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert container_room(tmp_path) == room


def test_a_container_s_limit_counts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpaca_core.engines.sharing.container_room", lambda: 2**18)
    with pytest.raises(NotEnoughMemory, match=r"0.0 GiB free"):
        load(tiny)


def test_too_little_memory_is_said_before_loading(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**18, total=2**40))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(NotEnoughMemory, match=r"0.0 GiB as none/torch.float32, but cpu.*quantization='int8'"):
        load(tiny)


def test_weights_that_do_not_fit_into_the_stated_share_are_not_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    taken = psutil.Process().memory_info().rss / psutil.virtual_memory().total
    with pytest.raises(NotEnoughMemory, match=r"within a memory_share of .*raise memory_share"):
        load(tiny, memory_share=taken / 2)


def test_a_share_changes_no_digest(tiny: Path) -> None:
    assert load(tiny, memory_share=0.99).info.digest == load(tiny).info.digest


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_running_out_of_memory_while_loading_is_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(NotEnoughMemory, match="ran out of memory"):
        load(tiny)


@pytest.mark.parametrize(
    ("quantization", "kernel"),
    [
        ("int8", "alpaca_core.engines.quantizing.int8_vectorwise_quant"),
        ("nf4", "bitsandbytes.functional.quantize_4bit"),
    ],
)
def test_running_out_of_memory_while_quantizing_is_said(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    quantization: str,
    kernel: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernel, fail)
    with pytest.raises(NotEnoughMemory, match="ran out of memory"):
        load(tiny, quantization=quantization)
    assert caplog.records == []  # transformers' report has a traceback for each tensor


def test_loading_and_running_say_nothing_but_what_matters(
    tiny: Path,
    make_adapter: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    logits: Callable[..., torch.Tensor],
) -> None:
    adapter = str(make_adapter())
    capfd.readouterr()
    recwarn.clear()
    for quantization in ("none", "int8", "nf4"):
        logits(load(tiny, quantization=quantization, adapter=adapter).network, IDS)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn] == []
    logging.getLogger("bitsandbytes.autograd._functions").warning("something that matters")
    assert [record.message for record in caplog.records] == ["something that matters"]
