"""A recipe in, a model that answers out, nothing left behind."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca_core.checkpoints import EMBEDDED_SHA256, embedded_file
from alpaca_core.engines.weights import find, load_weights
from alpaca_core.errors import DigestMismatch, InvalidRequest, UnsafeCheckpoint
from alpaca_core.loading import import_adapter, load_model, verify_checkpoint
from alpaca_core.model import Completion, GenerateRow, LanguageModel, ScoreRow, Trie
from alpaca_core.spec import ModelSpec, Sampling

ROOT = Path(__file__).parents[2]


def greedy(model: LanguageModel, prompt: str, adapter: str | None = "default") -> tuple[int, ...]:
    ids = (*model.tokenizer.prefix_ids, *model.tokenizer.encode(prompt))
    ((_, completion),) = model.generate([GenerateRow(ids, Sampling(max_new_tokens=8), adapter=adapter)])
    assert isinstance(completion, Completion)
    return completion.token_ids


def first_tokens(model: LanguageModel, prompt: str, adapter: str | None = "default") -> torch.Tensor:
    """Log-probabilities of every token after a prompt."""
    leaves, _ = Trie.of([[token] for token in range(model.info.vocab_size)])
    ((_, scores),) = model.loglikelihood([ScoreRow(tuple(model.tokenizer.encode(prompt)), leaves, adapter)])
    assert isinstance(scores, list)
    return torch.tensor(scores)


def test_importing_the_door_does_not_import_torch() -> None:
    code = "import sys, alpaca_core.loading; print('torch' in sys.modules, 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"


def test_the_weights_are_gone_after_the_block(tiny: Path, make_adapter: Callable[..., Path]) -> None:
    for adapter in (None, str(make_adapter())):
        with load_model(ModelSpec(base_model=str(tiny), device="cpu", adapter=adapter)) as model:
            weight = weakref.ref(model._llama.embedding)  # type: ignore[attr-defined]
            assert greedy(model, "ab") is not None
        gc.collect()
        assert weight() is None


@pytest.mark.parametrize("given", ["huggyllama/llama-7b", {"base_model": "x"}, Path("x"), b"x"], ids=repr)
def test_what_is_no_recipe_is_refused_with_the_way_to_one(given: Any) -> None:
    with (
        pytest.raises(InvalidRequest, match=r"spec is a ModelSpec, but got .* ModelSpec\(base_model="),
        load_model(given),
    ):
        pass
    with pytest.raises(InvalidRequest, match="spec is a ModelSpec"):
        verify_checkpoint(given)


def test_a_name_is_put_into_the_recipe_that_it_needs() -> None:
    with (
        pytest.raises(InvalidRequest, match=r"Write ModelSpec\(base_model='huggyllama/llama-7b'\)"),
        load_model("huggyllama/llama-7b"),
    ):  # type: ignore[arg-type]
        pass


def test_an_error_inside_the_block_comes_through(tiny: Path) -> None:
    with pytest.raises(KeyError), load_model(ModelSpec(base_model=str(tiny), device="cpu")):
        raise KeyError("of the caller")


def test_the_preset_runs_end_to_end_once_its_adapter_is_imported(
    tiny: Path, make_pickled: Callable[..., Path], publish: Callable[..., str]
) -> None:
    # the whole path of the 7B model at a tiny shape: hub names, pickled adapter, int8
    base, adapter = publish(tiny, "huggyllama/llama-7b"), publish(make_pickled(), "tloen/alpaca-lora-7b")
    spec = ModelSpec.preset("alpaca-7b").model_copy(update={"device": "cpu"})
    with pytest.raises(UnsafeCheckpoint, match="`alpaca import-adapter tloen/alpaca-lora-7b`"), load_model(spec):
        pass
    import_adapter("tloen/alpaca-lora-7b")
    with load_model(spec) as model:
        assert (model.info.revision, model.info.adapters[0].revision) == (base, adapter)
        assert (model.info.quantization, model.info.adapters[0].template) == ("int8", "alpaca-lora")
        assert not torch.allclose(first_tokens(model, "ab"), first_tokens(model, "ab", adapter=None), atol=0.1)


def test_a_gguf_file_loads_and_a_flipped_bit_in_what_was_unpacked_is_found(
    make_gguf: Callable[..., Path], cache: Path
) -> None:
    spec = ModelSpec(base_model=str(make_gguf()), device="cpu")
    with load_model(spec) as model:
        before = first_tokens(model, "ab")
        assert model.info.chat_template == "{{ messages[0].content }}"
    (weights,) = cache.glob("models/*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DigestMismatch, match=f"{weights.parent} must hold.*Delete that folder"), load_model(spec):
        pass
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    with load_model(spec) as model:
        assert torch.equal(first_tokens(model, "ab"), before)


def test_verifying_reads_every_byte_again(base: Path, make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter()
    spec = ModelSpec(base_model=str(base), adapter=str(adapter), device="cpu")
    with load_model(spec) as model:
        adapter_digest = model.info.adapters[0].digest
    checked = verify_checkpoint(spec)
    assert checked[str(adapter)] == adapter_digest
    assert set(checked) == {str(base), str(adapter)}
    for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        stat, content = file.stat(), bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with load_model(spec):  # size and time are those that were seen
            pass
        with pytest.raises(DigestMismatch, match=file.name):
            verify_checkpoint(spec)
        content[-1] ^= 1
        file.write_bytes(content)
        assert verify_checkpoint(spec) == checked


def test_the_embedded_model_is_what_its_file_says(embedded: ModelSpec) -> None:
    with load_model(embedded) as model:
        info = model.info
        assert (info.name, info.context_length, info.vocab_size) == ("smollm2-135m-instruct", 8192, 49_152)
        assert info.eos_ids == (model.tokenizer.special_ids["<|im_end|>"],)
        assert info.chat_template
        assert "<|im_start|>" in info.chat_template
        assert model.tokenizer.decode(greedy(model, "The capital of France is")).strip().startswith("Paris")
    assert list(verify_checkpoint(embedded)) == [embedded.base_model]


def test_the_embedded_weights_are_what_gguf_s_own_reader_sees(embedded: ModelSpec) -> None:
    base, _ = find(embedded)
    assert EMBEDDED_SHA256[:16] in base.folder.name
    found = load_file(base.folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded_file()).tensors}
    for key in ("model.embed_tokens", "model.layers.17.mlp.down_proj", "model.layers.29.self_attn.v_proj"):
        source = stored[f"{names.get_name(key)}.weight"]
        expected = torch.from_numpy(gguf.dequantize(source.data, source.tensor_type).copy())
        assert torch.equal(found[f"{key}.weight"], expected.reshape(found[f"{key}.weight"].shape).bfloat16()), key


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_embedded_model_answers_quantized_with_an_adapter_beside_it(
    embedded: ModelSpec, tmp_path: Path, quantization: str, logits: Callable[..., torch.Tensor]
) -> None:
    noise = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side}.weight": 0.1
        * torch.randn((8, 576) if side == "A" else (576, 8), generator=noise)
        for layer in range(30)
        for module in ("q_proj", "o_proj")
        for side in "AB"
    }
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    spec = embedded.model_copy(update={"quantization": quantization, "adapter": str(tmp_path / "lora")})
    loaded = load_weights(spec)
    quantized: Any = loaded.network
    prompt = loaded.tokenizer.encode("The capital of France is")
    adapted = logits(quantized, prompt)[-1]
    with quantized.disable_adapter():
        bare = logits(quantized, prompt)[-1]
    assert loaded.tokenizer.decode([int(bare.argmax())]) == " Paris"
    assert adapted.isfinite().all()
    assert not torch.allclose(bare, adapted, atol=0.1)
    assert loaded.info.memory_gib < 0.3
