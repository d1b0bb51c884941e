"""Families other than LLaMA answer as transformers does, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    BltConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from alpaca_core.engines.weights import load_weights
from alpaca_core.errors import InvalidCheckpoint
from alpaca_core.loading import load_model
from alpaca_core.model import GenerateRow, ScoreRow, Trie
from alpaca_core.spec import ModelSpec, Sampling

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def remake(base: Path, config: Any) -> Any:
    """Put a random network of another family in place of a checkpoint's own."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    for weight in network.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.3)
    network.save_pretrained(base)
    return network


@pytest.mark.parametrize(
    ("config", "context_length"),
    [
        (MistralConfig(**SHAPE, sliding_window=16), 16),
        (MistralConfig(**SHAPE, sliding_window=None), 64),
        (MistralConfig(**SHAPE, sliding_window=4096), 64),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1), 16),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=2), 64),
        (Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=16), 64),
        (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16), 16),
        (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16, layer_types=["full_attention"] * 2), 64),
        (Phi3Config(**SHAPE, sliding_window=None, original_max_position_embeddings=24,
                    rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}), 24),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)  # fmt: skip
def test_the_context_ends_where_attention_would_no_longer_be_to_everything(
    base: Path, config: Any, context_length: int
) -> None:
    oracle = remake(base, config)
    branches = [[5, 6, 7, 8], [5, 6, 9, 4], [5, 3, 3, 3]]
    trie, ends = Trie.of(branches)
    prompts = [tuple(range(10, 10 + context_length - 4)), (9, 40, 41)]
    sampling = Sampling(max_new_tokens=4)
    with load_model(ModelSpec(base_model=str(base), device="cpu")) as model:
        assert model.info.context_length == context_length
        scored = dict(model.loglikelihood([ScoreRow(prompt, trie) for prompt in prompts]))
        generated: Any = dict(model.generate([GenerateRow(prompt, sampling) for prompt in prompts]))
        ((_, over),) = model.loglikelihood([ScoreRow((*prompts[0], 1), trie)])
    assert getattr(over, "code", None) == "prompt_too_long"
    for place, prompt in enumerate(prompts):
        for branch, end in zip(branches, ends, strict=True):
            with torch.no_grad():
                expected = oracle(torch.tensor([[*prompt, *branch[:-1]]])).logits[0, -1].log_softmax(-1)[branch[-1]]
            assert scored[place][end] == pytest.approx(float(expected), abs=1e-4)
        expected = oracle.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
        assert [token for token in expected.tolist() if token > 2] == list(generated[place].token_ids)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2),
        BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4),
        BertConfig(**SHAPE),
        FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        Gemma2Config(**SHAPE, head_dim=8),
        JambaConfig(**SHAPE, use_mamba_kernels=False, num_experts=2),
        BltConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_what_is_no_llama_like_decoder_is_refused_before_its_weights_are_read(
    base: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.save_pretrained(base)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InvalidCheckpoint, match=rf"LLaMA-like decoder.* is a {config.model_type}"):
        load_weights(ModelSpec(base_model=str(base), device="cpu"))
