"""The two parts of a network against transformers' own forward pass over both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
)

from alpaca_core.engines.heads import split
from alpaca_core.model import GenerateRow, ScoreRow, Trie
from alpaca_core.spec import Sampling

SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
FAMILIES = [
    LlamaConfig(**SHAPE),
    GraniteConfig(**SHAPE, logits_scaling=4.0),
    CohereConfig(**SHAPE, logit_scale=0.25),
    Gemma3TextConfig(**SHAPE, head_dim=8, final_logit_softcapping=2.0, layer_types=["full_attention"] * 2),
    MixtralConfig(**SHAPE, num_local_experts=4),
    PhiConfig(**SHAPE),
    GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=16),
]


def make(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).eval()
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0.0, 0.3)
    return network


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_body_and_head_are_the_network_whatever_its_family_does_to_logits(config: Any) -> None:
    network = make(config)
    body, head = split(network)
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
    with torch.no_grad():
        states = body(input_ids=ids).last_hidden_state
        assert torch.equal(head(inputs_embeds=states).logits, network(ids).logits)
        assert torch.equal(head(inputs_embeds=states[:, 1:3]).logits, network(ids).logits[:, 1:3])


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_every_family_scores_and_generates_as_transformers_does(config: Any, make_model: Callable[..., Any]) -> None:
    network = make(config)
    model = make_model(network)
    branches = [[5, 6, 7], [5, 6, 9], [5, 3], [8]]
    trie, ends = Trie.of(branches)
    prompts = [(10, 11, 12, 13), (9, 40)]
    scored = dict(model.loglikelihood([ScoreRow(prompt, trie) for prompt in prompts]))
    generated = dict(model.generate([GenerateRow(prompt, Sampling(max_new_tokens=4)) for prompt in prompts]))
    for place, prompt in enumerate(prompts):
        for branch, end in zip(branches, ends, strict=True):
            with torch.no_grad():
                logits = network(torch.tensor([[*prompt, *branch[:-1]]])).logits[0, -1]
            assert scored[place][end] == pytest.approx(float(logits.log_softmax(-1)[branch[-1]]), abs=1e-4)
        expected = network.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert list(generated[place].token_ids) == [token for token in expected[0, len(prompt) :] if token < 256]


def test_an_adapter_on_the_head_counts_for_its_rows_alone(make_model: Callable[..., Any]) -> None:
    network = make(LlamaConfig(**SHAPE))
    trie = Trie.of([[5, 6], [7]])[0]
    plain = make_model(make(LlamaConfig(**SHAPE)))
    adapted: Any = get_peft_model(network, LoraConfig(r=4, target_modules=["lm_head"]), adapter_name="default")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.4)
        expected = adapted(torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1)
    rows = [ScoreRow((1, 2), trie), ScoreRow((1, 2), trie, adapter=None)]
    found = dict(make_model(adapted, ["default"]).loglikelihood(rows))
    assert found[0][2] == pytest.approx(float(expected[7]), abs=1e-4)
    assert found[1] == pytest.approx(dict(plain.loglikelihood(rows[1:]))[0], abs=1e-4)
    assert found[0] != pytest.approx(found[1], abs=1e-2)
