"""Tries against a token-by-token loop, alone and in company, on every kind of network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alpaca_core.engines.scoring import score
from alpaca_core.model import RowError, ScoreRow, Trie

VOCAB = 40
TOKENS = st.integers(0, VOCAB - 1)
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=5), max_size=12)
ROWS = st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=9), SEQUENCES), min_size=1, max_size=5)


def token_by_token(network: Any, row: ScoreRow) -> list[float]:
    """Teacher forcing: for each node one forward pass over the prompt and the path to it."""
    paths: list[tuple[int, ...]] = []
    scores = []
    for token, parent in zip(row.continuations.tokens, row.continuations.parents, strict=True):
        path = paths[parent] if parent >= 0 else ()
        with torch.no_grad():
            logits = network(torch.tensor([[*row.prompt_ids, *path]])).logits[0, -1].double()
        scores.append(float(logits.log_softmax(-1)[token]))
        paths.append((*path, token))
    return scores


def rows_of(shapes: list[tuple[list[int], list[list[int]]]]) -> list[ScoreRow]:
    return [ScoreRow(tuple(prompt), Trie.of(sequences)[0]) for prompt, sequences in shapes]


def example_rows(**changes: Any) -> list[ScoreRow]:
    shapes = [
        ([1, 2, 3], [[4], [5, 6, 7], [5, 6, 8], [5, 9]]),
        ([7] * 9, [[1], [2], [3]]),
        ([11], [[1, 1, 1, 1, 1], [2, 2]]),
        ([3, 9], []),
    ]
    return [ScoreRow(row.prompt_ids, row.continuations, **changes) for row in rows_of(shapes)]


def close(found: dict[int, Any], expected: list[list[float]], within: float = 1e-4) -> None:
    assert sorted(found) == list(range(len(expected)))
    for place, scores in enumerate(expected):
        assert found[place] == pytest.approx(scores, abs=within)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_a_token_by_token_loop(
    make_network: Callable[..., Any], make_model: Callable[..., Any], attention: str, tied: bool
) -> None:
    network = make_network(VOCAB, attn_implementation=attention, tie_word_embeddings=tied)
    rows = example_rows()
    close(dict(make_model(network).loglikelihood(rows)), [token_by_token(network, row) for row in rows])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=ROWS,
    batch_size=st.integers(1, 6),
    width=st.sampled_from([1, 2, 3, 5, 256]),
    most_logits=st.sampled_from([1, VOCAB * 7, 2**26]),
)
def test_random_tries_score_as_their_nodes_do_one_by_one(
    make_network: Callable[..., Any],
    make_model: Callable[..., Any],
    make_transformers: Callable[..., Any],
    shapes: list[tuple[list[int], list[list[int]]]],
    batch_size: int,
    width: int,
    most_logits: int,
) -> None:
    network = make_network(VOCAB)
    rows = rows_of(shapes)
    expected = [token_by_token(network, row) for row in rows]
    model = make_model(network, batch_size=batch_size)
    close(dict(model.loglikelihood(rows)), expected)
    chosen = make_transformers(network)._chosen(rows[0])
    in_parts = score(chosen, rows, torch.device("cpu"), width, most_logits)
    close(dict(enumerate(in_parts)), expected)


def test_a_row_scores_the_same_alone_and_in_any_batch(
    make_network: Callable[..., Any], make_model: Callable[..., Any], add_adapters: Callable[..., Any]
) -> None:
    names = ["default", "other"]
    model = make_model(add_adapters(make_network(VOCAB), names), names)
    rows = [row for name in (*names, None) for row in example_rows(adapter=name)]
    alone = [next(model.loglikelihood([row]))[1] for row in rows]
    close(dict(model.loglikelihood(rows)), alone)
    close(dict(model.loglikelihood(rows[::-1])), alone[::-1])


def test_the_whole_vocabulary_as_leaves_is_the_next_token_table(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network(300)
    everything = [[token] for token in range(300)] + [[5, token] for token in range(300)]
    rows = [ScoreRow(prompt, Trie.of(everything)[0]) for prompt in [(1, 2, 3), (200,)]]
    for place, scores in make_model(network).loglikelihood(rows):
        assert torch.tensor(scores[:300]).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        assert torch.tensor(scores[300:]).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        with torch.no_grad():
            expected = network(torch.tensor([rows[place].prompt_ids])).logits[0, -1].log_softmax(-1)
        assert scores[:300] == pytest.approx(expected.tolist(), abs=1e-4)


def test_there_is_one_forward_pass_without_inner_nodes_and_two_with_them(
    make_network: Callable[..., Any], make_transformers: Callable[..., Any]
) -> None:
    network = make_network(VOCAB)
    lengths: list[int] = []
    heads: list[int] = []
    network.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    network.lm_head.register_forward_hook(lambda _, args, output: heads.append(output.numel() // VOCAB))
    model = make_transformers(network)
    prompt = (1, 2, 3, 4, 5)
    list(model.loglikelihood([ScoreRow(prompt, Trie.of([[1], [2]])[0])] * 2))
    assert (lengths, heads) == ([5], [2])  # logits of the last position alone
    lengths.clear()
    heads.clear()
    list(model.loglikelihood([ScoreRow(prompt, Trie.of([[1, 2], [1, 3], [4, 5, 6]])[0])] * 2))
    assert (lengths, heads) == ([5, 3], [2, 6])


def test_a_pass_reads_whole_branches_on_their_prompt_alone_and_few_logits_are_held(
    make_network: Callable[..., Any], make_transformers: Callable[..., Any]
) -> None:
    network = make_network(VOCAB)
    branches = [[token, token + 1, token + 2, 0] for token in (1, 4, 7)] + [[token, 9] for token in range(20, 27)]
    rows = [ScoreRow((1, 2, 3, 4, 5), Trie.of(branches)[0])] * 2
    expected = token_by_token(network, rows[0])
    read: list[tuple[int, int]] = []
    heads: list[int] = []
    network.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((kwargs["input_ids"].shape[1], kwargs["attention_mask"].shape[-1])),
        with_kwargs=True,
    )
    network.lm_head.register_forward_hook(lambda _, args, output: heads.append(output.numel()))
    found = score(make_transformers(network)._chosen(rows[0]), rows, torch.device("cpu"), 6, VOCAB * 8)
    assert read == [(5, 5), (6, 11), (6, 11), (4, 9)]
    assert max(heads) == VOCAB * 8
    close(dict(enumerate(found)), [expected] * 2)


def test_a_row_whose_logits_are_not_finite_fails_alone(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network(VOCAB)
    rows = example_rows()
    expected = [token_by_token(network, row) for row in rows]
    with torch.no_grad():
        network.model.embed_tokens.weight[39] = torch.nan
    in_prompt = ScoreRow((39, 1), Trie.of([[1], [2, 3]])[0])
    in_trie = ScoreRow((1, 2), Trie.of([[1], [39, 3]])[0])
    found = dict(make_model(network).loglikelihood([in_prompt, *rows, in_trie]))
    for place in (0, len(rows) + 1):
        assert isinstance(found[place], RowError)
        assert found[place].code == "not_finite"
    close({place: found[place + 1] for place in range(len(rows))}, expected)


def test_a_leaf_is_never_read_so_a_damaged_one_still_scores(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network(VOCAB)
    row = ScoreRow((1, 2), Trie.of([[1], [2, 39]])[0])
    expected = token_by_token(network, row)
    with torch.no_grad():
        network.model.embed_tokens.weight[39] = torch.nan
    close(dict(make_model(network).loglikelihood([row])), [expected])
