"""Beams on our own forward pass: transformers' results, the same bits in any company, pages, failures."""

import hashlib
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core.engines import native, searching
from alpaca_core.engines.beams import Beams
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.packing import PAGE
from alpaca_core.engines.searching import follow
from alpaca_core.engines.shapes import Shape
from alpaca_core.model import GenerateRow
from alpaca_core.spec import Sampling
from tests.engines.test_beams import by_transformers
from tests.engines.test_native import texts

SETTINGS = [
    Sampling(num_beams=4, max_new_tokens=40),
    Sampling(num_beams=3, max_new_tokens=9, temperature=1.2),
    Sampling(max_new_tokens=12, temperature=1.0),
    Sampling(num_beams=20, max_new_tokens=4),
    Sampling(num_beams=2, max_new_tokens=35, temperature=0.9, top_k=20, top_p=0.9, seed=5),
    Sampling(num_beams=5, max_new_tokens=1),
]
NAMES = ("default", "other", None)


@pytest.fixture
def make_native(make_network: Callable[..., Any], make_model: Callable[..., Any]) -> Callable[..., NativeModel]:
    def make(batch_size: int = 8, adapters: tuple[str, ...] = (), network: Any = None, **settings: Any) -> NativeModel:
        network = network or make_network(max_position_embeddings=1024, spread=3.0)
        if not isinstance(model := make_model(network, adapters, batch_size=batch_size, **settings), NativeModel):
            pytest.skip("for the engine of our own")
        return model

    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A digest, for each search that has ended, of every bit of the logits that it was shown."""
    searches: dict[Beams, Any] = {}
    ended: list[str] = []
    plain = Beams.advance

    def advance(self: Beams, logits: torch.Tensor, noise: torch.Tensor | None) -> None:
        plain(self, logits, noise)
        searches.setdefault(self, hashlib.sha256()).update(logits.numpy().tobytes())
        if self.done:
            ended.append(searches.pop(self).hexdigest())

    monkeypatch.setattr(Beams, "advance", advance)
    return ended


def rows_of(prompts: list[tuple[int, ...]], names: tuple[str | None, ...] = (None,)) -> list[GenerateRow]:
    """A row for each prompt; which settings and adapter it has follows from the prompt alone."""
    told = [sum(prompt) + len(prompt) for prompt in prompts]
    return [
        GenerateRow(prompt, SETTINGS[number % len(SETTINGS)], number % 3, names[number % len(names)])
        for prompt, number in zip(prompts, told, strict=True)
    ]


def said(model: Any, rows: list[GenerateRow]) -> list[Any]:
    found = dict(model.generate(rows))
    return [found[place] for place in range(len(rows))]


def test_beams_across_pages_are_those_of_transformers(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any]
) -> None:
    eos = [3, 9]
    ends = Counter[str]()
    for seed in range(3):
        network = make_network(60, seed, spread=2.0)
        draw = random.Random(seed)
        rows = [
            GenerateRow(tuple(draw.randrange(60) for _ in range(length)), Sampling(num_beams=beams, max_new_tokens=new))
            for length, beams, new in [(1, 3, 70), (31, 2, 40), (32, 4, 35), (33, 3, 40), (64, 2, 66), (40, 18, 30)]
        ]
        for row, ours in zip(rows, said(make_native(network=network, eos_ids=eos), rows), strict=True):
            (theirs,) = by_transformers(network, torch.tensor([row.prompt_ids]), eos, row.sampling)
            assert ours.token_ids == theirs
            ends[ours.finish_reason] += 1
            ends["long"] += len(theirs) > PAGE
    assert min(ends["stop"], ends["length"], ends["long"]) > 1


@pytest.mark.parametrize("length", [1, 31, 32, 33])
def test_as_many_beams_as_sequences_find_the_best_of_all(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any], length: int
) -> None:
    for seed in range(4):
        network = make_network(4, seed, spread=1.0)
        prompt = tuple(random.Random(seed).choices(range(4), k=length))
        scores: dict[tuple[int, ...], float] = {}
        for sequence in product(range(4), repeat=3):
            cut = sequence[: sequence.index(0) + 1] if 0 in sequence else sequence
            with torch.no_grad():
                logits = network(torch.tensor([[*prompt, *cut[:-1]]])).logits[0, length - 1 :].double().log_softmax(-1)
            scores[cut] = math.fsum(float(logits[place, token]) for place, token in enumerate(cut)) / len(cut)
        best = max(scores, key=lambda cut: scores[cut])
        row = GenerateRow(prompt, Sampling(num_beams=64, max_new_tokens=3))
        (found,) = said(make_native(network=network, eos_ids=[0]), [row])
        assert found.token_ids == (best[:-1] if best[-1] == 0 else best)


def test_a_search_sees_the_same_bits_in_any_order_shard_batch_size_and_alone(
    make_native: Callable[..., NativeModel],
    add_adapters: Callable[..., Any],
    make_network: Callable[..., Any],
    seen: list[str],
) -> None:
    names = ("default", "other")
    network = add_adapters(make_network(max_position_embeddings=1024, hidden_size=64, spread=3.0), names)

    def run(batch_size: int, places: list[int]) -> list[Any]:
        return said(make_native(batch_size, names, network), [rows[place] for place in places])

    rows = rows_of(texts(24), NAMES)
    assert {row.sampling for row in rows} == set(SETTINGS)
    expected = run(8, list(range(24)))
    bits = sorted(seen)
    order = random.Random(1).sample(range(24), 24)
    seen.clear()
    assert run(40, order) == [expected[place] for place in order]
    assert sorted(seen) == bits
    seen.clear()
    for shard in range(3):
        assert run(3, order[shard::3]) == [expected[place] for place in order[shard::3]]
    assert sorted(seen) == bits
    seen.clear()
    for place in order[:10]:
        assert run(1, [place]) == [expected[place]]
    assert len(seen) > 5
    assert Counter(seen) <= Counter(bits)


def test_rows_without_beams_are_no_different_beside_searches(make_native: Callable[..., NativeModel]) -> None:
    rows = rows_of(texts(18))
    plain = [place for place, row in enumerate(rows) if row.sampling.num_beams == 1]
    expected = said(make_native(), rows)
    assert said(make_native(), [rows[place] for place in plain]) == [expected[place] for place in plain]


def test_passes_of_a_fixed_size_give_the_same_results(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU has them: all slots in each pass, and a row with more beams in several."""
    rows = rows_of(texts(18))
    expected = said(make_native(), rows)
    for shape in (Shape(1, 64, fixed=True), Shape(16, 64, fixed=True)):
        monkeypatch.setattr(native, "first_shape", lambda *_, shape=shape: shape)
        found = said(make_native(), rows)
        assert {row.shape for row in found} == {shape.name}
        assert [row.token_ids for row in found] == [row.token_ids for row in expected]


def test_searches_and_rows_without_beams_take_turns(make_native: Callable[..., NativeModel]) -> None:
    settings = [Sampling(num_beams=beams, max_new_tokens=new) for beams, new in [(1, 40), (3, 10), (3, 40), (1, 10)]]
    rows = [GenerateRow((7, place), setting) for place, setting in enumerate(settings)]
    assert [place for place, _ in make_native(eos_ids=[]).generate(rows)] == [3, 1, 0, 2]


def test_a_search_reads_a_prompt_once_and_beginnings_that_others_have_read_not_at_all(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_native()
    read: list[int] = []
    plain = Llama.read
    monkeypatch.setattr(
        Llama,
        "read",
        lambda self, packed, *args, **kwargs: (
            read.append(int(packed.counts.sum())) or plain(self, packed, *args, **kwargs)
        ),
    )
    head = texts(1, seed=3)[0][:1] * 100
    said(model, [GenerateRow((*head, token), SETTINGS[0]) for token in range(3)])
    assert sum(read) == 101 + 2 * (101 - 96)


def test_searches_wait_for_pages_where_memory_is_short(make_native: Callable[..., NativeModel]) -> None:
    rows = rows_of(texts(18))
    expected = said(make_native(30), rows)
    model = make_native(30)
    model._memory._limit = 2 + max(-(-len(row.prompt_ids) // PAGE) + 2 * row.sampling.num_beams for row in rows)
    assert said(model, rows) == expected
    huge = GenerateRow((1,) * 100, Sampling(num_beams=60, max_new_tokens=200))
    error, *others = said(model, [huge, *rows[:3]])
    assert error.code == "not_enough_memory"
    assert "num_beams" in error.message
    assert others == expected[:3]


def test_a_spoilt_search_is_an_error_and_leaves_nothing_behind(
    make_native: Callable[..., NativeModel], make_network: Callable[..., Any]
) -> None:
    network = make_network(max_position_embeddings=1024, spread=3.0)
    rows = rows_of([prompt for prompt in texts(18) if 99 not in prompt])
    expected = said(make_native(network=network), rows)
    with torch.no_grad():
        network.model.embed_tokens.weight[99] = torch.nan
        network.lm_head.weight[99] = 0.0  # a beam that comes to it spoils its row
    spoilt = [GenerateRow((*(1,) * length, 99), SETTINGS[0]) for length in (0, 31, 32, 70)]
    model = make_native(6, network=network)
    alone = [said(model, [row])[0] for row in rows]
    same = [place for place, found in enumerate(alone) if found == expected[place]]
    assert len(same) > 5
    found = said(model, [*spoilt[:2], *rows, *spoilt[2:]])
    assert {error.code for error in [*found[:2], *found[-2:]]} == {"not_finite"}
    assert found[2:-2] == alone == said(model, rows)
    assert not model._memory.pages.in_use


def test_a_step_that_fails_loses_no_search_and_changes_no_result(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    rows = rows_of(texts(10))
    model = make_native(6)
    expected = said(model, rows)
    bits = sorted(seen)
    seen.clear()
    model._memory.pages.forget()
    fails = random.Random(0)
    calls, failed = Counter[str](), Counter[str]()

    def failing(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            calls[name] += 1
            if calls[name] == 2 or fails.random() < 0.02:
                failed[name] += 1
                raise torch.OutOfMemoryError("injected")
            return plain(*args, **settings)

        return call

    places = [(Llama, "step"), (Llama, "read"), (Llama, "logits"), (Beams, "_candidates"), (searching, "follow")]
    for place, name in places:
        monkeypatch.setattr(place, name, failing(name, getattr(place, name)))
    assert said(model, rows) == expected
    assert sorted(seen) == bits
    assert set(failed) == {name for _, name in places}
    assert not model._memory.pages.in_use
    plain = searching.follow

    def follow_all_but_one(tables: Any, parents: Any, held: int, pages: Any) -> Any:
        if len(tables) > 20:
            raise torch.OutOfMemoryError("always")
        return plain(tables, parents, held, pages)

    rows = [GenerateRow(rows[0].prompt_ids, Sampling(num_beams=23, max_new_tokens=30)), *rows[1:]]
    monkeypatch.setattr(searching, "follow", follow_all_but_one)
    error, *others = said(model, rows)
    assert error.code == "not_enough_memory"
    assert others == expected[1:]
    assert not model._memory.pages.in_use


def test_prompts_that_cannot_be_read_together_are_read_one_after_the_other(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [GenerateRow((token, 3, 5), Sampling(num_beams=3, max_new_tokens=6)) for token in range(6)]
    model = make_native(20)
    expected = said(model, rows)
    model._memory.pages.forget()
    plain = Llama.read

    def read(self: Llama, packed: Any, *args: Any, **settings: Any) -> torch.Tensor:
        if len(packed.starts) > 1:
            raise torch.OutOfMemoryError("injected")
        return plain(self, packed, *args, **settings)

    monkeypatch.setattr(Llama, "read", read)
    assert said(model, rows) == expected
    assert not model._memory.pages.in_use


def test_passes_shrink_until_they_fit_and_searches_say_so(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(texts(12))
    monkeypatch.setattr(native, "first_shape", lambda *_: Shape(8, 512, fixed=True))
    model = make_native(8)
    plain = Llama.step

    def step(self: Llama, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("injected")
        return plain(self, tokens, *args)

    monkeypatch.setattr(Llama, "step", step)
    found = said(model, rows)
    assert model.info.shape == "2x128"
    assert {row.shape for row in found} == {"2x128", "8x512"}  # of one token none takes a step
    monkeypatch.setattr(native, "first_shape", lambda *_: Shape(2, 128, fixed=True))
    small = said(make_native(2), rows)
    assert [row.token_ids for row in small] == [row.token_ids for row in found]


def test_threads_share_steps_and_a_cancelled_search_gives_all_pages_back(
    make_native: Callable[..., NativeModel],
) -> None:
    rows = rows_of(texts(16))
    model = make_native(8)
    expected = said(model, rows)
    found: dict[int, Any] = {}

    def work(place: int) -> None:
        found[place] = said(model, rows[place::4])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for taken in (1, 2, 3):
        cancelled = model.generate([GenerateRow(row.prompt_ids, SETTINGS[taken % 2]) for row in rows])
        for _ in range(taken):
            next(cancelled)
        cancelled.close()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(4)] == [expected[place::4] for place in range(4)]
    assert not model._memory.pages.in_use


@given(st.data())
def test_each_beam_finds_its_own_tokens_in_its_pages(data: st.DataObject) -> None:
    """A cache of one number a token, written as `Searcher` writes it."""
    beams = data.draw(st.integers(1, 6), "beams")
    prompt = data.draw(st.integers(1, 2 * PAGE + 1), "prompt")
    steps = data.draw(st.integers(0, PAGE + 3), "steps")
    draw = data.draw(st.randoms(use_true_random=False))
    whole = -(-(prompt + steps) // PAGE)
    pages = draw.sample(range(1, 500), prompt // PAGE + beams * (whole - prompt // PAGE))  # what a row takes
    cache = {page: [-1] * PAGE for page in pages}
    paths = [list(range(prompt))]
    tables = [pages[: -(-prompt // PAGE)]]
    for place, token in enumerate(paths[0]):
        cache[tables[0][place // PAGE]][place % PAGE] = token
    for step in range(steps):
        parents = draw.choices(range(len(paths)), k=draw.randint(1, beams))
        tables, copies = follow(tables, parents, prompt + step, pages)
        assert len(copies) <= len(parents) - len(set(parents))
        for target, content in [(target, list(cache[source])) for source, target in copies]:
            cache[target] = content
        paths = [[*paths[parent], draw.randrange(1000)] for parent in parents]
        for path, table in zip(paths, tables, strict=True):
            cache[table[-1]][(prompt + step) % PAGE] = path[-1]
        for path, table in zip(paths, tables, strict=True):
            assert [cache[table[place // PAGE]][place % PAGE] for place in range(len(path))] == path
            assert len(table) == -(-len(path) // PAGE)
