"""The engine as a `LanguageModel`: adapters, threads, cancelling, refused rows, quantized and spread networks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alpaca_core.errors import InvalidRequest
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import Sampling

TRIE = Trie.of([[5], [6, 7], [6, 8, 9]])[0]
PROMPTS = [(1, 2, 3, 4), (9,), (30, 31)]


def both(model: Any, adapter: str | None = "default") -> tuple[list[Any], list[Any]]:
    """Responses and scores of the same rows, in order."""
    settings = [Sampling(max_new_tokens=6), Sampling(max_new_tokens=6, temperature=1.0)]
    generated = dict(model.generate([GenerateRow(prompt, each, 0, adapter) for prompt in PROMPTS for each in settings]))
    scored = dict(model.loglikelihood([ScoreRow(prompt, TRIE, adapter) for prompt in PROMPTS]))
    return [generated[place].token_ids for place in sorted(generated)], [scored[place] for place in sorted(scored)]


def assert_same(found: tuple[list[Any], list[Any]], expected: tuple[list[Any], list[Any]]) -> None:
    assert found[0] == expected[0]
    for mine, other in zip(found[1], expected[1], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_an_adapter_per_row_equals_separate_models(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    names = ["default", "pirate", "poet"]
    model = make_model(add_adapters(make_network(), names), names)
    bare = both(make_model(make_network()))
    for name in ["poet", None, "default", "pirate", None, "poet"]:
        alone = both(make_model(add_adapters(make_network(), [name]), [name]), name) if name else bare
        assert_same(both(model, name), alone)
        assert name is None or alone[0] != bare[0]


def test_rows_that_name_no_adapter_get_the_bare_base_of_a_model_without_one(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    bare = both(make_model(make_network()), None)
    assert_same(both(make_model(make_network()), "default"), bare)
    only_named = make_model(add_adapters(make_network(), ["pirate"]), ["pirate"])
    assert_same(both(only_named, "default"), bare)


def test_a_zero_lora_equals_its_base(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    adapted = add_adapters(make_network())
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert_same(both(make_model(adapted, ["default"])), both(make_model(make_network())))


def test_two_threads_use_different_adapters_at_once(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    names = ["default", "pirate"]
    model = make_model(add_adapters(make_network(), names), names)
    wanted = [*names, None] * 4
    expected = {name: both(model, name) for name in (*names, None)}
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(wanted, pool.map(lambda name: both(model, name), wanted), strict=True):
            assert_same(found, expected[name])


def test_closing_the_iterator_stops_the_work(
    make_network: Callable[..., Any], make_transformers: Callable[..., Any]
) -> None:
    network = make_network()
    steps: list[int] = []
    network.register_forward_pre_hook(lambda *_: steps.append(1))
    model = make_transformers(network, eos_ids=(), batch_size=2)
    generating = model.generate([GenerateRow((1,), Sampling(max_new_tokens=3))] * 20)
    next(generating)
    generating.close()
    assert len(steps) == 3
    scoring = model.loglikelihood([ScoreRow((1,), TRIE)] * 20)
    next(scoring)
    scoring.close()
    assert len(steps) == 5
    assert len(list(model.generate([GenerateRow((1,), Sampling(max_new_tokens=3))]))) == 1


def test_no_state_of_inference_leaks_to_the_caller(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    model = make_model(make_network(), batch_size=1)
    for _ in model.generate([GenerateRow((1,), Sampling(max_new_tokens=2))] * 2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    for _ in model.loglikelihood([ScoreRow((1,), TRIE)] * 2):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompt", "adapter", "code"),
    [
        ((), "default", "empty_text"),
        ((1,) * 251, "default", "prompt_too_long"),
        ((1,) * 5000, "default", "prompt_too_long"),
        ((1,), "nobody", "unknown_adapter"),
        ((258,), "default", "not_text"),
        ((1, -1), "default", "not_text"),
    ],
)
def test_a_bad_row_gets_an_error_and_its_neighbours_their_results(
    make_network: Callable[..., Any], make_model: Callable[..., Any], prompt: tuple[int, ...], adapter: str, code: str
) -> None:
    network = make_network()
    model = make_model(network)
    sampling = Sampling(max_new_tokens=6)
    good = GenerateRow((1, 2), sampling)
    found = dict(model.generate([good, GenerateRow(prompt, sampling, adapter=adapter), good]))
    assert isinstance(found[1], RowError)
    assert found[1].code == code
    assert found[0] == found[2] == next(model.generate([good]))[1]
    deep = Trie.of([[1] * 6])[0]
    scored = dict(model.loglikelihood([ScoreRow((1, 2), deep), ScoreRow(prompt, deep, adapter)]))
    assert isinstance(scored[1], RowError)
    assert scored[1].code == code
    assert len(scored[0]) == 6


def test_a_prompt_and_response_that_fill_the_context_exactly_run(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    model = make_model(make_network(), eos_ids=())
    ((_, found),) = model.generate([GenerateRow((1,) * 250, Sampling(max_new_tokens=6))])
    assert found.completion_tokens == 6
    ((_, scores),) = model.loglikelihood([ScoreRow((1,) * 250, Trie.of([[1] * 6])[0])])
    assert len(scores) == 6


def test_a_continuation_outside_the_vocabulary_is_refused(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    ((_, found),) = make_model(make_network()).loglikelihood([ScoreRow((1,), Trie.of([[1, 258]])[0])])
    assert isinstance(found, RowError)


def test_a_merged_adapter_cannot_be_left_out(make_network: Callable[..., Any], make_model: Callable[..., Any]) -> None:
    merged = make_model(make_network(), ["default"])
    found = dict(merged.loglikelihood([ScoreRow((1,), TRIE), ScoreRow((1,), TRIE, adapter=None)]))
    assert isinstance(found[0], list)
    assert isinstance(found[1], RowError)
    assert "merge_adapter" in found[1].message


def test_no_rows_give_no_results(make_network: Callable[..., Any], make_model: Callable[..., Any]) -> None:
    model = make_model(make_network())
    assert list(model.generate([])) == list(model.loglikelihood([])) == []


def test_a_closed_model_says_so(make_network: Callable[..., Any], make_model: Callable[..., Any]) -> None:
    model = make_model(make_network(), eos_ids=(), batch_size=1)
    running = model.generate([GenerateRow((1,), Sampling(max_new_tokens=1))] * 2)
    next(running)
    model.close()
    model.close()
    with pytest.raises(InvalidRequest, match="closed"):
        next(running)


def test_dropout_is_off_even_in_a_network_left_in_training_mode(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    names = ["default"]
    training = add_adapters(make_network(), names, dropout=0.5).train()
    assert_same(both(make_model(training, names)), both(make_model(add_adapters(make_network(), names), names)))


@pytest.mark.parametrize("bits", [{"load_in_8bit": True, "llm_int8_threshold": 0.0}, {"load_in_4bit": True}])
def test_a_quantized_network_with_a_lora_scores_as_it_does_token_by_token(
    make_network: Callable[..., Any],
    make_model: Callable[..., Any],
    add_adapters: Callable[..., Any],
    tmp_path: Path,
    bits: dict[str, Any],
) -> None:
    make_network(64, spread=2.0, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu", dtype=torch.float32
    )
    adapted = add_adapters(quantized).eval()
    model = make_model(adapted, ["default"])
    for adapter in ("default", None):
        rows = [ScoreRow(prompt, TRIE, adapter) for prompt in PROMPTS]
        found = dict(model.loglikelihood(rows))
        for place, row in enumerate(rows):
            layers = adapted.base_model
            (layers.enable_adapter_layers if adapter else layers.disable_adapter_layers)()
            paths = [(), (), (6,), (6,), (6, 8)]
            for path, token, mine in zip(paths, TRIE.tokens, found[place], strict=True):
                with torch.no_grad():
                    logits = adapted(torch.tensor([[*row.prompt_ids, *path]])).logits[0, -1].float()
                assert mine == pytest.approx(float(logits.log_softmax(-1)[token]), abs=0.02)
        responses = dict(
            model.generate([GenerateRow(prompt, Sampling(max_new_tokens=5), 0, adapter) for prompt in PROMPTS])
        )
        assert {len(each.token_ids) for each in responses.values()} == {5}


def test_a_network_whose_weights_are_elsewhere_until_used_gives_the_same(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    offloaded = cpu_offload(make_network(), execution_device=torch.device("cpu"))
    assert offloaded.model.embed_tokens.weight.device.type == "meta"
    assert_same(both(make_model(offloaded)), both(make_model(make_network())))
