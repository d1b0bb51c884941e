"""vLLM's feed: rows at any time, taken back at any time, and reads of different kinds beside one another."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from alpaca_core.errors import InvalidRequest
from alpaca_core.model import Completion, Feed, GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import Sampling
from tests.engines.test_decoding import argmax_loop

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` runs this"
)

SMALL = Trie.of([[5], [6, 7], [6, 8, 9]])[0]


def through(feed: Feed) -> dict[int, Any]:
    """Step a feed until it is empty."""
    found: dict[int, Any] = {}
    while len(feed):
        for key, outcome in feed.step():
            assert key not in found
            found[key] = outcome
    return found


def plain(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens without the two control tokens, which completions leave out."""
    return tuple(token for token in tokens if token < 256)


def node_by_node(network: Any, row: ScoreRow) -> list[float]:
    """One forward pass over the prompt and the path to each inner node, without a cache."""
    trie = row.continuations
    tables: dict[int, Any] = {}
    for node in set(trie.parents):
        path = [trie.tokens[each] for each in trie.path(node)]
        with torch.no_grad():
            tables[node] = network(torch.tensor([[*row.prompt_ids, *path]])).logits[0, -1].double().log_softmax(-1)
    return [float(tables[parent][token]) for token, parent in zip(trie.tokens, trie.parents, strict=True)]


def test_rows_of_all_kinds_come_at_any_time_and_out_as_they_end(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network()
    feed: Feed = make_model(network, eos_ids=()).feed()
    feed.add(7, GenerateRow((1, 2), Sampling(max_new_tokens=30)))
    found = dict(feed.step())
    feed.add(1, ScoreRow((3, 4), SMALL))
    feed.add(2, GenerateRow((5,), Sampling(max_new_tokens=2)))
    feed.add(3, GenerateRow((5,), Sampling(max_new_tokens=3, num_beams=2)))
    feed.add(4, GenerateRow((), Sampling()))
    feed.add(5, ScoreRow((3, 4), Trie((), ())))
    assert len(feed) == 6
    order = list(found)
    while len(feed):
        for key, outcome in feed.step():
            found[key] = outcome
            order.append(key)
    assert set(order[:2]) == {4, 5}
    assert order[-1] == 7
    assert isinstance(found[4], RowError)
    assert found[5] == []
    assert found[1] == pytest.approx(node_by_node(network, ScoreRow((3, 4), SMALL)), abs=1e-4)
    assert found[7].token_ids == plain(argmax_loop(network, (1, 2), 30, ()))
    assert found[2].token_ids == plain(argmax_loop(network, (5,), 2, ()))


def test_what_is_dropped_never_comes_out_and_leaves_nothing_in_the_engine(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    model = make_model(make_network(), eos_ids=())
    feed = model.feed()
    for key in range(6):
        feed.add(key, GenerateRow((key + 1,), Sampling(max_new_tokens=9, num_beams=1 + key % 2)))
    feed.add(6, GenerateRow((), Sampling()))
    for key in (0, 1, 6, 99):
        feed.drop(key)
    assert dict(feed.step()) == {}
    for key in (2, 3):
        feed.drop(key)
    feed.add(2, ScoreRow((1,), SMALL))  # its key is free again
    found = through(feed)
    assert sorted(found) == [2, 4, 5]
    assert isinstance(found[2], list)
    assert not model._requests._engine.has_unfinished_requests()
    with pytest.raises(InvalidRequest, match="has not come out"):
        feed.add(1, ScoreRow((1,), SMALL)) or feed.add(1, ScoreRow((1,), SMALL))
    feed.clear()


def test_closing_the_iterator_stops_the_work(make_network: Callable[..., Any], make_model: Callable[..., Any]) -> None:
    model = make_model(make_network(), eos_ids=())
    lengths = [1, 50, 50]
    generating = model.generate(
        [GenerateRow((place + 1,), Sampling(max_new_tokens=n)) for place, n in enumerate(lengths)]
    )
    assert next(generating)[0] == 0
    generating.close()
    assert not model._requests._engine.has_unfinished_requests()


def test_wide_nodes_beside_narrow_ones_and_beams_get_their_own_numbers(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network()
    draw = random.Random(3)
    wide = Trie.of([[token] for token in range(258)] + [[9, token] for token in range(200)] + [[9, 3, 4], [8, 1]])[0]
    rows: list[Any] = []
    for place in range(24):
        prompt = tuple(draw.randrange(256) for _ in range(1 + place % 5))
        sampling = Sampling(max_new_tokens=6, num_beams=1 + 2 * (place % 2))
        rows += [ScoreRow(prompt, wide if place % 3 == 0 else SMALL), GenerateRow(prompt, sampling)]
    model = make_model(network, eos_ids=())
    feed = model.feed()
    for key, row in enumerate(rows):
        feed.add(key, row)
    found = through(feed)
    for key, row in enumerate(rows):
        if isinstance(row, ScoreRow):
            assert found[key] == pytest.approx(node_by_node(network, row), abs=1e-4)
        elif row.sampling.num_beams == 1:
            assert found[key].token_ids == plain(argmax_loop(network, row.prompt_ids, 6, ()))


def test_feeds_of_several_threads_share_steps_and_keep_their_rows_apart(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    network = make_network()
    model = make_model(network, eos_ids=())
    prompts = [(place + 1, 2 * place) for place in range(40)]

    def run(prompt: tuple[int, ...]) -> dict[int, Any]:
        feed = model.feed()
        feed.add(0, GenerateRow(prompt, Sampling(max_new_tokens=7)))
        feed.add(1, ScoreRow(prompt, SMALL))
        return through(feed)

    with ThreadPoolExecutor(8) as pool:
        for prompt, found in zip(prompts, pool.map(run, prompts), strict=True):
            assert found[0].token_ids == plain(argmax_loop(network, prompt, 7, ()))
            assert found[1] == pytest.approx(node_by_node(network, ScoreRow(prompt, SMALL)), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_or_refuse_is_an_error(
    make_network: Callable[..., Any], make_model: Callable[..., Any], temperature: float
) -> None:
    model = make_model(make_network(), eos_ids=())
    rows = [GenerateRow((1,), Sampling(max_new_tokens=2, temperature=each)) for each in (temperature, 1.0)]
    found = dict(model.generate(rows))
    assert found[0].code == "not_supported"
    assert 'engine="auto"' in found[0].message
    assert isinstance(found[1], Completion)
    searched = GenerateRow((1,), Sampling(max_new_tokens=2, temperature=temperature, num_beams=2))
    assert isinstance(next(model.generate([searched]))[1], Completion)  # beams are drawn by us


def test_samples_do_not_depend_on_the_process_s_random_numbers(
    make_network: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    model = make_model(make_network(), eos_ids=())
    rows = [GenerateRow((1, 2), Sampling(max_new_tokens=8, temperature=1.0, seed=2**64 - 1), each) for each in range(5)]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(dict(model.generate(rows)))
    assert found[0] == found[1]
    assert len({found[0][place].token_ids for place in range(5)}) == 5
