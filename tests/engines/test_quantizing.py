"""Networks that are quantized while they are read have the bits of transformers' own way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, Qwen2Config

from alpaca_core.engines.quantizing import ends_of, recipe

STANDARD: dict[str, Callable[[torch.dtype], BitsAndBytesConfig]] = {
    "int8": lambda _: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "nf4": lambda dtype: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
}


def both(folder: Path, quantization: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Load a folder our way and transformers' own."""
    recipes = recipe(quantization, dtype), STANDARD[quantization](dtype)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=each, dtype=dtype, device_map={"": device})
        for each in recipes
    )
    return ours, theirs


def save(network: Any, folder: Path) -> None:
    """Save a network whose rows are of very different sizes, some below float16's least normal number."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() == 2 and any(part in name for part in ("proj", "c_attn", "c_fc")):
                weight.mul_(torch.exp2(torch.randint(-20, 3, (len(weight), 1), generator=noise).float()))
                weight[1, 2] = -6e-8
    network.save_pretrained(folder)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Compare weights, scales and states, what kind of parameter holds them, and what a network says of itself."""
    mine, expected = ours.state_dict(), theirs.state_dict()  # with SCB, absmax, quant_map and quant_state
    assert list(mine) == list(expected)
    for name, tensor in mine.items():
        other = expected[name]
        assert (tensor.dtype, tensor.device, tensor.stride()) == (other.dtype, other.device, other.stride()), name
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (type(weight), weight.requires_grad) == (type(other), other.requires_grad), name
        assert weight.__dict__.keys() == other.__dict__.keys(), name
        if (kept := getattr(weight, "CB", None)) is not None:
            assert kept.data_ptr() == weight.data_ptr()
            assert (weight.has_fp16_weights, weight.SCB.dtype) == (other.has_fp16_weights, torch.float32)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert ours.quantization_method == theirs.quantization_method
    assert ours.config.to_json_string() == theirs.config.to_json_string()
    ids = torch.tensor([[1, 5, 9, 9, 2]], device=ours.device)
    with torch.no_grad():
        logits = ours.eval()(ids).logits
        assert logits.isfinite().all()
        assert torch.equal(logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_bits_are_those_of_transformers_own_way(
    make_network: Callable[..., Any], tmp_path: Path, quantization: str, dtype: torch.dtype
) -> None:
    save(make_network(hidden_size=64, intermediate_size=128).to(dtype), tmp_path)
    ours, theirs = both(tmp_path, quantization, dtype, "cpu")
    assert ours.lm_head.weight.dtype == dtype
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32),  # Conv1D: weights the other way
        Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                    num_key_value_heads=2, tie_word_embeddings=True),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_other_shapes_of_layers_have_the_same_bits_too(tmp_path: Path, config: Any, quantization: str) -> None:
    torch.manual_seed(0)
    save(AutoModelForCausalLM.from_config(config), tmp_path)
    assert_same_bits(*both(tmp_path, quantization, torch.float32, "cpu"))


@pytest.mark.parametrize(("quantization", "held"), [("int8", torch.float16), ("nf4", torch.bfloat16)])
def test_the_ends_are_those_of_what_was_quantized(
    make_network: Callable[..., Any], tmp_path: Path, quantization: str, held: torch.dtype
) -> None:
    network = make_network(hidden_size=64, intermediate_size=128).bfloat16()
    save(network, tmp_path)
    ends = ends_of(both(tmp_path, quantization, torch.bfloat16, "cpu")[0])
    plain = {name: weight for name, weight in network.named_parameters() if "_proj" in name}
    assert ends.keys() == plain.keys()
    for name, weight in plain.items():
        assert torch.equal(ends[name], torch.stack([weight.to(held).min(), weight.to(held).max()])), name


def test_transformers_own_quantizers_stay_as_they_are(make_network: Callable[..., Any], tmp_path: Path) -> None:
    save(make_network(hidden_size=64, intermediate_size=128), tmp_path)
    ours, theirs = both(tmp_path, "int8", torch.float32, "cpu")
    assert type(theirs.hf_quantizer).__module__.startswith("transformers.")
    assert type(theirs.hf_quantizer) in type(ours.hf_quantizer).__mro__
