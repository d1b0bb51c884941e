"""Generation against an argmax loop and transformers' `generate`; each row alone and in company."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from alpaca_core.model import Completion, GenerateRow, RowError
from alpaca_core.spec import Sampling

PROMPTS = [(1, 2, 3), (200, 14), (9,), (30, 31, 32, 33, 34, 35, 36, 37, 38), (4, 4, 4, 4, 4)]
SETTINGS = [
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=7, temperature=0.9),
    Sampling(max_new_tokens=9, temperature=1.5, top_k=20, seed=3),
    Sampling(max_new_tokens=5, temperature=1.1, top_p=0.9),
    Sampling(max_new_tokens=8, temperature=0.7, top_k=30, top_p=0.8, seed=2**64 - 1),
    Sampling(max_new_tokens=6, num_beams=3),
    Sampling(max_new_tokens=10, num_beams=2, temperature=1.2, top_p=0.95),
    Sampling(max_new_tokens=1),
]


def mixed_rows(adapters: Sequence[str | None] = ("default",)) -> list[GenerateRow]:
    return [
        GenerateRow(prompt, setting, sample_index=place % 3, adapter=adapters[(place + other) % len(adapters)])
        for place, prompt in enumerate(PROMPTS)
        for other, setting in enumerate(SETTINGS)
    ]


def argmax_loop(network: Any, prompt: Sequence[int], steps: int, eos: Sequence[int]) -> tuple[int, ...]:
    """Greedy decoding without a cache, a batch or a mask."""
    tokens = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(network(torch.tensor([tokens])).logits[0, -1].argmax())
        if token in eos:
            break
        tokens.append(token)
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_rows_equal_an_argmax_loop_and_transformers_generate(
    make_network: Callable[..., Any], make_model: Callable[..., Any], attention: str, tied: bool
) -> None:
    network = make_network(80, seed=2, attn_implementation=attention, tie_word_embeddings=tied)
    eos = [3, 17, 40, 55]
    prompts = [tuple(token % 80 for token in prompt) for prompt in PROMPTS]
    found = dict(
        make_model(network, eos_ids=eos).generate([GenerateRow(each, Sampling(max_new_tokens=70)) for each in prompts])
    )
    for place, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=70,
            eos_token_id=eos,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        expected = argmax_loop(network, prompt, 70, eos)
        assert found[place].token_ids == expected
        assert tuple(theirs[:-1] if theirs[-1] in eos else theirs) == expected
        assert (found[place].finish_reason == "stop") == (theirs[-1] in eos)


@pytest.mark.independent
def test_a_row_gives_the_same_tokens_alone_in_any_batch_and_in_any_order(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    names = ["default", "other"]
    network = add_adapters(make_network(seed=1), names)
    rows = mixed_rows(["default", "other", None])
    alone = [next(make_model(network, names).generate([row]))[1] for row in rows]
    together = dict(make_model(network, names, batch_size=64).generate(rows))
    assert [together[place] for place in range(len(rows))] == alone
    backwards = dict(make_model(network, names, batch_size=7).generate(rows[::-1]))
    assert [backwards[place] for place in range(len(rows))] == alone[::-1]


def test_a_completion_holds_the_response_only_and_no_special_token(
    make_network: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    network = make_network(258, spread=0.0)  # every token is as likely, the two control tokens too
    rows = [GenerateRow((place,), Sampling(max_new_tokens=30, temperature=1.0)) for place in range(60)]
    raw = [found for _, found in make_model(network, eos_ids=(5, 6, 7, 257), batch_size=60).generate(rows)]
    for completion in raw:
        assert isinstance(completion, Completion)
        assert not {256, 257, 5, 6, 7} & set(completion.token_ids)
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert completion.completion_tokens == len(completion.token_ids)
        assert completion.prompt_tokens == 1
    assert any(completion.finish_reason == "length" and completion.completion_tokens < 30 for completion in raw)


def test_a_last_token_that_ends_the_response_is_a_stop(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network(50, seed=6)
    path = argmax_loop(network, (1, 2), 4, ())
    (found,) = make_model(network, eos_ids=(path[-1],)).generate([GenerateRow((1, 2), Sampling(max_new_tokens=4))])
    before = path[: path.index(path[-1])]
    assert found[1].finish_reason == "stop"
    assert found[1].token_ids == before


def test_rows_come_out_as_soon_as_they_end(
    make_network: Callable[..., Any], make_transformers: Callable[..., Any]
) -> None:
    network = make_network()
    steps: list[int] = []
    network.register_forward_pre_hook(lambda *_: steps.append(1))
    lengths = [9, 2, 30, 5]
    rows = [GenerateRow((1, 2, place), Sampling(max_new_tokens=length)) for place, length in enumerate(lengths)]
    seen = [(place, len(steps)) for place, _ in make_transformers(network, eos_ids=()).generate(rows)]
    assert seen == [(1, 2), (3, 5), (0, 9), (2, 30)]


def test_a_row_whose_logits_are_not_finite_fails_alone(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network(seed=5)
    rows = [row for row in mixed_rows() if 99 not in row.prompt_ids]
    healthy = dict(make_model(network, eos_ids=(7,), batch_size=64).generate(rows))
    with torch.no_grad():
        network.model.embed_tokens.weight[99] = torch.nan
    poisoned = [GenerateRow(prompt, setting) for prompt in [(99,), (1, 99, 2)] for setting in SETTINGS]
    found = dict(make_model(network, eos_ids=(7,), batch_size=64).generate([*poisoned, *rows]))
    for place in range(len(poisoned)):
        assert isinstance(found[place], RowError)
        assert found[place].code == "not_finite"
    for place, before in healthy.items():
        after = found[place + len(poisoned)]
        # A row that says token 99 by itself reads the poisoned embedding, and may fail; no other may.
        assert after == before or 99 in before.token_ids


def test_seed_and_sample_index_give_other_responses_and_are_repeatable(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    model = make_model(make_network(), eos_ids=())

    def respond(seed: int, sample: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, max_new_tokens=8, seed=seed)
        ((_, found),) = model.generate([GenerateRow((1, 2), sampling, sample_index=sample)])
        assert isinstance(found, Completion)
        return found.token_ids

    responses = {(seed, sample): respond(seed, sample) for seed in range(3) for sample in range(3)}
    assert len(set(responses.values())) == 9
    assert respond(2, 1) == responses[2, 1]
