"""Calls that share an engine: none waits for ever for memory, and rows that nobody wants are not computed."""

import gc
import threading
from collections.abc import Callable

import pytest
import torch

from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.packing import PAGE, TILE
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import Sampling
from tests.engines.test_native import TRIE, results, texts


def test_judging_while_an_open_call_holds_all_pages_lets_that_one_go_on(
    make_native: Callable[..., NativeModel],
) -> None:
    prompts = texts(12)
    expected = results(make_native(), prompts)
    model = make_native()
    model._memory._limit = 2 + max(len(prompt) + 12 for prompt in prompts) // PAGE
    found = []
    for place, said in model.generate([GenerateRow(prompt, Sampling(max_new_tokens=12)) for prompt in prompts]):
        assert not isinstance(said, RowError)
        ((_, scores),) = model.loglikelihood([ScoreRow(prompts[place], TRIE)])
        found.append((place, scores))
    assert sorted(found) == [(place, scores) for place, (scores, _) in enumerate(expected)]


@pytest.mark.parametrize("kind", ["judged", "beams"])
def test_a_large_row_is_not_overtaken_for_ever_by_small_ones(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Rows of one page come without end while a row waits that needs half of the cache."""
    long = tuple(range(1, 200))
    large = ScoreRow(long, TRIE) if kind == "judged" else GenerateRow(long, Sampling(num_beams=2, max_new_tokens=4))

    def steps() -> int | None:
        model = make_native(32)
        model._memory._limit = 24
        feed = model.feed()
        keys = iter(range(1, 10**6))

        def add() -> None:
            key = next(keys)
            feed.add(key, GenerateRow((3, 4), Sampling(max_new_tokens=2 + key % 12), key))

        for _ in range(40):
            add()
        for _ in range(14):
            for _ in feed.step():
                add()
        feed.add(0, large)
        for count in range(150):
            for key, _ in feed.step():
                if key == 0:
                    return count
                add()
        return None

    found = steps()
    assert found is not None
    assert found < 40
    monkeypatch.setattr(Memory, "wait", lambda *_, **__: None)
    assert steps() is None, "the scene shows nothing: without a line the large row comes through, too"


def test_a_row_that_nobody_overtook_and_that_fits_nowhere_holds_nobody_up(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages would fit into the share, but there is no memory for them."""
    plain = Llama.new_cache

    def tight(self: Llama, pages: int) -> torch.Tensor:
        if pages > 30:
            raise torch.OutOfMemoryError("injected")
        return plain(self, pages)

    monkeypatch.setattr(Llama, "new_cache", tight)
    feed = make_native(8).feed()
    for key in range(1, 40):
        feed.add(key, GenerateRow((3, key), Sampling(max_new_tokens=4 + key % 9)))
    found = dict(feed.step())
    feed.add(0, ScoreRow((1,) * 700, TRIE))
    for _ in range(150):
        found |= dict(feed.step())
    assert isinstance(found[0], RowError)
    assert found[0].code == "not_enough_memory"
    assert sorted(found) == list(range(40))


def test_judged_rows_that_are_dropped_are_read_no_further(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Llama.read
    monkeypatch.setattr(
        Llama,
        "read",
        lambda self, packed, *rest, **how: read.append(int(packed.counts.sum())) or plain(self, packed, *rest, **how),
    )
    model = make_native()
    prompts = [prompt for prompt in texts(60) if len(prompt) > 50]
    expected = dict(model.loglikelihood([ScoreRow(prompts[7], TRIE)]))[0]
    model._memory.pages.forget()
    feed = model.feed()
    for key, prompt in enumerate(prompts):
        feed.add(key, ScoreRow(prompt, TRIE))
    found = dict(feed.step())
    for key in range(len(prompts)):
        if key != 7:
            feed.drop(key)
    read.clear()
    for _ in range(20):
        found |= dict(feed.step())
    assert found[7] == expected
    assert sum(read) <= len(prompts[7]) + TILE
    assert len(feed) == 0
    assert not model._memory.pages.in_use


def test_a_row_with_labels_of_several_tokens_is_not_left_for_rows_that_keep_coming(
    make_native: Callable[..., NativeModel],
) -> None:
    model = make_native()
    expected = dict(model.loglikelihood([ScoreRow((7, 8, 9), TRIE)]))[0]
    feed = model.feed()
    keys = iter(range(1, 10**6))
    short = Trie.of([[5], [6]])[0]

    def add() -> None:
        key = next(keys)
        feed.add(key, ScoreRow(tuple((key * place) % 251 for place in range(1, 120)), short))

    for _ in range(40):
        add()
    feed.add(0, ScoreRow((7, 8, 9), TRIE))
    for count in range(60):
        found = dict(feed.step())
        for _ in found:
            add()
        if 0 in found:
            assert found[0] == expected
            assert count < 12
            return
    raise AssertionError("it never came out")


def test_a_generator_that_is_collected_in_mid_step_gives_its_rows_back_after_it(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_native()
    rows = [GenerateRow((3, key), Sampling(max_new_tokens=4 + key)) for key in range(12)]
    expected = dict(model.generate(rows))
    abandoned = model.generate(rows)
    next(abandoned)
    cycle: list[object] = [abandoned]
    cycle.append(cycle)
    del abandoned, cycle
    plain, collected = Llama.step, []

    def step(self: Llama, *args: object) -> torch.Tensor:
        collected.append(gc.collect())
        return plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Llama, "step", step)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(dict(model.generate(rows))), daemon=True)
    thread.start()
    thread.join(60)
    assert found == [expected]
    assert any(collected)
    assert not model._memory.pages.in_use
