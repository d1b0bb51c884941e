"""A model behind a host passes the tests that engines pass, and gives the same bits as the engine in this process."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from alpaca_core.errors import InvalidRequest
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import Sampling
from tests.engines.test_decoding import (  # noqa: F401
    mixed_rows,
    test_a_completion_holds_the_response_only_and_no_special_token,
    test_a_last_token_that_ends_the_response_is_a_stop,
    test_a_row_whose_logits_are_not_finite_fails_alone,
    test_greedy_rows_equal_an_argmax_loop_and_transformers_generate,
    test_seed_and_sample_index_give_other_responses_and_are_repeatable,
)
from tests.engines.test_scoring import (  # noqa: F401
    example_rows,
    test_a_leaf_is_never_read_so_a_damaged_one_still_scores,
    test_a_row_scores_the_same_alone_and_in_any_batch,
    test_scores_equal_a_token_by_token_loop,
    test_the_whole_vocabulary_as_leaves_is_the_next_token_table,
)
from tests.engines.test_transformers import (  # noqa: F401
    test_a_bad_row_gets_an_error_and_its_neighbours_their_results,
    test_a_closed_model_says_so,
    test_a_continuation_outside_the_vocabulary_is_refused,
    test_a_merged_adapter_cannot_be_left_out,
    test_a_prompt_and_response_that_fill_the_context_exactly_run,
    test_a_zero_lora_equals_its_base,
    test_an_adapter_per_row_equals_separate_models,
    test_no_rows_give_no_results,
    test_rows_that_name_no_adapter_get_the_bare_base_of_a_model_without_one,
    test_two_threads_use_different_adapters_at_once,
)
from tests.waiting import until

NAMES = ("default", "other")
STRANGE = [(), (1,) * 251, (1,) * 5000, (258,), (1, -1), (2**31,), (1, 2**63, 2), (-(10**30),)]


@pytest.fixture
def both(
    make_hosted: Callable[..., Any], make_network: Callable[..., Any], add_adapters: Callable[..., Any]
) -> tuple[Any, Any, Any]:
    return make_hosted(add_adapters(make_network(), NAMES), NAMES)  # type: ignore[no-any-return]


def generated(rows: list[GenerateRow]) -> Callable[[Any], dict[int, Any]]:
    return lambda model: dict(model.generate(rows))


def test_bits_kinds_and_errors_are_those_of_the_engine_in_this_process(both: tuple[Any, Any, Any]) -> None:
    hosted, engine, _ = both
    exact = engine.info.rows_independent
    rows = mixed_rows([*NAMES, None, "nobody"])
    rows += [GenerateRow(prompt, Sampling(max_new_tokens=6)) for prompt in STRANGE]
    rows += [GenerateRow((1,), Sampling(max_new_tokens=2, temperature=1.0), index) for index in (-1, 2**63, 2**70)]
    found, expected = dict(hosted.generate(rows)), dict(engine.generate(rows))
    assert found == expected
    assert {type(each) for each in found.values()} == {type(each) for each in expected.values()}
    assert hosted.info == engine.info
    assert hosted.tokenizer.definition == engine.tokenizer.definition
    wide = Trie.of([[token] for token in range(258)])[0]
    scored = [*example_rows(adapter="other"), *example_rows(adapter=None), ScoreRow((3, 4), wide)]
    scored += [ScoreRow(prompt, Trie.of([[1, 2]])[0]) for prompt in STRANGE]
    scored += [ScoreRow((1,), Trie.of([sequence])[0]) for sequence in ([258], [-1], [2**40], [1] * 300)]
    found, expected = dict(hosted.loglikelihood(scored)), dict(engine.loglikelihood(scored))
    assert sorted(found) == sorted(expected)
    for place, result in expected.items():
        if isinstance(result, RowError) or exact:
            assert found[place] == result
            assert getattr(found[place], "shape", "") == getattr(result, "shape", "")
        else:
            assert found[place] == pytest.approx(result, abs=1e-4)


def test_tries_that_no_engine_takes_are_refused_as_a_request(both: tuple[Any, Any, Any]) -> None:
    hosted, _, _ = both
    for trie in (Trie((1, 2), (0, 1)), Trie((1, 1), (-1, -1)), Trie((1,), ()), Trie((1, 2), (-1, 1))):
        with pytest.raises(InvalidRequest):
            list(hosted.loglikelihood([ScoreRow((1,), trie)]))
    assert len(list(hosted.loglikelihood(example_rows()))) == len(example_rows())


def test_closing_an_iterator_takes_its_rows_out_within_a_step(
    make_hosted: Callable[..., Any], make_network: Callable[..., Any]
) -> None:
    hosted, engine, warm = make_hosted(make_network(max_position_embeddings=100_000), eos_ids=(), batch_size=2)
    long = GenerateRow((1,), Sampling(max_new_tokens=50_000))
    short = GenerateRow((1,), Sampling(max_new_tokens=1))
    running = hosted.generate([short if place % 256 == 0 else long for place in range(1000)])  # first of each request
    next(running)
    until(lambda: warm.scheduler.running > 1)
    running.close()
    until(lambda: not warm.scheduler.running and not warm.scheduler.waiting, 2.0)
    ((_, found),) = hosted.generate([GenerateRow((1,), Sampling(max_new_tokens=3))])
    assert found.completion_tokens == 3
    assert not hasattr(engine, "_memory") or until(lambda: not engine._memory.pages.in_use, 2.0)
    dropped = hosted.generate([long])
    del dropped  # one that was never begun
    ((_, found),) = hosted.generate([GenerateRow((1,), Sampling(max_new_tokens=3))])
    assert found.completion_tokens == 3


def test_many_more_rows_than_a_request_holds_come_out_once(both: tuple[Any, Any, Any]) -> None:
    hosted, _, _ = both
    rows = [GenerateRow((place % 250,), Sampling(max_new_tokens=1)) for place in range(1500)]
    found = list(hosted.generate(rows))
    assert sorted(index for index, _ in found) == list(range(1500))
    said = dict(found)
    assert all(said[place] == said[place % 250] for place in range(1500))


def test_rows_that_are_large_together_are_sent_in_requests_that_are_small_enough(
    make_hosted: Callable[..., Any], make_network: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alpaca_core.host.application.MOST_BYTES", 100_000)
    monkeypatch.setattr("alpaca_core.host.client._CHUNK_BYTES", 50_000)
    hosted, engine, _ = make_hosted(make_network(max_position_embeddings=2048))
    rows = [ScoreRow(tuple((place + other) % 250 for other in range(400)), Trie.of([[1]])[0]) for place in range(150)]
    assert sorted(index for index, _ in hosted.loglikelihood(rows)) == list(range(150))
    too_long = GenerateRow((1,) * 2_000_000, Sampling(max_new_tokens=1))
    assert dict(hosted.generate([too_long])) == dict(engine.generate([too_long]))


def test_threads_use_one_model_at_once(both: tuple[Any, Any, Any]) -> None:
    hosted, _, warm = both
    calls: list[Callable[[Any], dict[int, Any]]] = []
    for seed in range(16):
        rows = mixed_rows([*NAMES, None])
        random.Random(seed).shuffle(rows)
        calls.append(generated(rows[:12]))
    expected = [call(hosted) for call in calls]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda call: call(hosted), calls)) == expected
    until(lambda: not warm.scheduler.clients)


def test_a_model_that_is_closed_in_the_middle_says_so(both: tuple[Any, Any, Any]) -> None:
    hosted, _, warm = both
    running = hosted.generate([GenerateRow((1,), Sampling(max_new_tokens=200)) for _ in range(300)])
    next(running)
    hosted.close()
    with pytest.raises(InvalidRequest, match="closed"):
        list(running)
    with pytest.raises(InvalidRequest, match="closed"):
        list(hosted.generate([GenerateRow((1,), Sampling())]))
    until(lambda: not warm.scheduler.clients)
