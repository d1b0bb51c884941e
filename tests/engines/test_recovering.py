"""Memory that runs out: tried again, fewer rows, smaller shapes, one row's error; the same results, and an end."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core import answer, fit_calibration, is_outlier, judge, rate, verify
from alpaca_core.engines import memory, native
from alpaca_core.engines.llama import Llama
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.packing import PAGE
from alpaca_core.engines.recovering import ATTEMPTS, ShortOfMemory, persevere, ran_out
from alpaca_core.engines.shapes import Shape
from alpaca_core.engines.transformers import TransformersModel
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import Sampling
from tests.engines.test_native import results, texts

PASSES = [(Llama, "step"), (Llama, "read"), (Llama, "logits"), (TransformersModel, "_states")]
"""What computes, on either engine."""

LONG = Sampling(max_new_tokens=40)
CPU = torch.device("cpu")


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let passes run out of memory where a function of their name and arguments says so; a list of those that ran."""

    def install(fails: Callable[..., object]) -> list[str]:
        ran: list[str] = []

        def failing(name: str, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def call(*args: Any, **settings: Any) -> torch.Tensor:
                if fails(name, *args):
                    raise torch.OutOfMemoryError("injected")
                ran.append(name)
                return plain(*args, **settings)

            return call

        for owner, name in PASSES:
            monkeypatch.setattr(owner, name, failing(name, getattr(owner, name)))
        return ran

    return install


@pytest.fixture
def make_fixed(make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch) -> Callable[..., NativeModel]:
    """A model whose passes have one size, as on a GPU."""

    def make(slots: int, tokens: int) -> NativeModel:
        monkeypatch.setattr(native, "first_shape", lambda *_: Shape(slots, tokens, fixed=True))
        return make_native(slots)

    return make


def codes(rows: list[Any]) -> set[str]:
    """The codes of rows of which both results failed."""
    assert all(isinstance(each, RowError) for row in rows for each in row)
    return {each.code for row in rows for each in row}


def test_memory_that_runs_out_one_time_in_five_changes_no_result_and_costs_no_pass(
    make_network: Callable[..., Any], make_model: Callable[..., Any], inject: Callable[..., list[str]]
) -> None:
    model, prompts = make_model(make_network(max_position_embeddings=1024), batch_size=4), texts(16)
    ran = inject(lambda *_: False)
    expected = results(model, prompts)
    undisturbed = len(ran)
    draw, failed = random.Random(0), []

    def fails(name: str, *_: object) -> bool:
        failed.append(name) if (now := draw.random() < 0.2) else None
        return now

    fresh = make_model(make_network(max_position_embeddings=1024), batch_size=4)
    ran = inject(fails)  # wraps the first one, which fails never
    assert results(fresh, prompts) == expected
    assert len(failed) > undisturbed / 20
    assert undisturbed <= len(ran) <= undisturbed / 0.75
    if isinstance(fresh, NativeModel):
        assert not fresh._memory.pages.in_use


@pytest.mark.parametrize("most", [64, 100, 200])
def test_passes_shrink_until_they_fit_and_results_say_so(
    make_fixed: Callable[..., NativeModel], inject: Callable[..., list[str]], most: int
) -> None:
    model, prompts = make_fixed(8, 512), texts(20)
    assert model.info.shape == "8x512"
    inject(lambda name, _, packed, *rest: name == "read" and len(packed.ids) > most)
    found = results(model, prompts)
    assert model.info.shape == {64: "1x64", 100: "1x64", 200: "2x128"}[most]
    small = make_fixed(*map(int, model.info.shape.split("x")))
    assert small.info.digest == model.info.digest
    assert results(small, prompts) == found
    assert {said.shape for _, said in found} == {scored.shape for scored, _ in found} == {model.info.shape}


def test_what_verbs_return_names_the_shape(
    make_fixed: Callable[..., NativeModel], inject: Callable[..., list[str]]
) -> None:
    model = make_fixed(8, 512)
    texts = ["Is it so?", "Is that so?"]
    fitted = fit_calibration(model, texts * 5, method="batch")
    inject(lambda name, _, packed, *rest: name == "read" and len(packed.ids) > 128)
    rows = judge(model, texts, calibration=fitted)
    assert model.info.shape == "2x128"
    rows += judge(model, texts, calibration=fitted)  # which holds for any shape
    rows += judge(model, texts, ["so", "not"], rotate_labels=True)
    rows += judge(model, texts, method="sampled", samples=2)
    rows += [*answer(model, texts), *is_outlier(model, texts, ["It is.", "So it is."]), *rate(model, texts, "Is it?")]
    rows += verify(model, texts, texts)
    assert [row.shape for row in rows if not isinstance(row, RowError)] == ["2x128"] * len(rows)


def test_a_row_comes_of_one_shape_though_it_shrinks_while_rows_are_on_their_way(
    make_fixed: Callable[..., NativeModel], inject: Callable[..., list[str]]
) -> None:
    prompts = texts(12)
    model = make_fixed(4, 256)
    steps = 0

    def fails(name: str, _: object, tokens: Any, *rest: object) -> bool:
        nonlocal steps
        steps += name == "step"
        return name == "step" and steps > 20 and len(tokens) > 2

    inject(fails)
    rows = [GenerateRow(prompt, LONG) for prompt in prompts]
    found = dict(model.generate(rows))
    assert model.info.shape == "2x128"
    by_shape = {
        name: dict(make_fixed(*sizes).generate(rows)) for name, sizes in [("4x256", (4, 256)), ("2x128", (2, 128))]
    }
    assert found == {place: by_shape[said.shape][place] for place, said in found.items()}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("poisoned", [[3], [0, 5, 11], [7, 8]])
def test_a_poisoned_prompt_costs_itself_only(
    make_fixed: Callable[..., NativeModel],
    make_native: Callable[..., NativeModel],
    inject: Callable[..., list[str]],
    fixed: bool,
    poisoned: list[int],
) -> None:
    model = make_fixed(4, 256) if fixed else make_native(4)
    poison = 99
    prompts = [tuple(98 if token == poison else token for token in prompt) for prompt in texts(14)]
    expected = {model.info.shape: results(model, prompts), "1x64": results(make_fixed(1, 64), prompts)}
    for place in poisoned:
        prompts[place] = (*prompts[place][:20], poison, *prompts[place][20:])
    model._memory.pages.forget()
    info = model.info
    inject(lambda name, _, packed, *rest: name == "read" and poison in packed.ids)
    found = results(model, prompts)
    assert codes([found[place] for place in poisoned]) == {"not_enough_memory"}
    good = [place for place in range(14) if place not in poisoned]
    for place in good:
        scored, said = found[place]
        assert (scored, said) == (expected[scored.shape][place][0], expected[said.shape][place][1])
    small = sum(each.shape == "1x64" for place in good for each in found[place])
    assert small <= len(poisoned) - 1, "rows that came out between one that was given up and the larger shape"
    assert model.info == info
    assert not model._memory.pages.in_use


@pytest.mark.parametrize("fixed", [False, True])
def test_a_poisoned_step_costs_its_row_only(
    make_fixed: Callable[..., NativeModel], make_native: Callable[..., NativeModel], inject: Callable[..., list[str]],
    fixed: bool,
) -> None:  # fmt: skip
    model = make_fixed(8, 256) if fixed else make_native(8)
    rows = [GenerateRow(prompt, LONG) for prompt in texts(20)]
    expected = dict(model.generate(rows))
    seen = [set(said.token_ids[:-1]) for _, said in sorted(expected.items())]
    poison = next(token for token in range(258) if sum(token in tokens for tokens in seen) in {2, 3})
    poisoned = {place for place, tokens in enumerate(seen) if poison in tokens}
    info = model.info

    def fails(name: str, _: object, tokens: Any, lengths: Any = None, *rest: object) -> bool:
        return name == "step" and bool(((tokens == poison) & (lengths > 0)).any())

    inject(fails)
    found = dict(model.generate(rows))
    assert {place for place, said in found.items() if isinstance(said, RowError)} == poisoned
    assert {found[place].code for place in poisoned} == {"not_enough_memory"}
    assert all(found[place] == said for place, said in expected.items() if place not in poisoned)
    assert model.info == info


def test_where_no_pass_ever_fits_each_row_gets_an_error_and_the_model_goes_on_after(
    make_network: Callable[..., Any],
    make_model: Callable[..., Any],
    inject: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompts = make_model(make_network(max_position_embeddings=1024), batch_size=8), texts(9)
    expected = results(model, prompts)
    with monkeypatch.context() as patch:
        for owner, name in PASSES:
            patch.setattr(owner, name, lambda *_, **__: torch.empty(10**15))  # what torch itself raises
        found = results(model, prompts)
    assert codes(found) == {"not_enough_memory"}
    assert "Lower max_new_tokens" in found[0][0].message
    assert results(model, prompts) == expected


def test_a_batch_too_large_for_transformers_is_run_in_halves(
    make_network: Callable[..., Any], make_transformers: Callable[..., Any], inject: Callable[..., list[str]]
) -> None:
    model = make_transformers(make_network(max_position_embeddings=1024), batch_size=8)
    prompts = texts(12)
    expected = results(model, prompts)
    inject(lambda name, _, adapter, ids, *rest: name == "_states" and (len(ids) > 2 or 99 in ids))
    found = results(model, prompts)
    for place, prompt in enumerate(prompts):
        scored, said = found[place]
        if 99 in prompt:
            assert codes([found[place]]) == {"not_enough_memory"}
        elif 99 in expected[place][1].token_ids[:-1]:
            assert said.code == "not_enough_memory"
        else:
            assert said == expected[place][1]
            assert scored == pytest.approx(expected[place][0], abs=1e-4)


def test_callers_in_threads_go_through_smaller_shapes_together(
    make_fixed: Callable[..., NativeModel], inject: Callable[..., list[str]]
) -> None:
    prompts = texts(18)
    expected = results(make_fixed(1, 64), prompts)
    model = make_fixed(8, 512)
    inject(lambda name, _, packed, *rest: name == "read" and len(packed.ids) > 64)
    found: dict[int, Any] = {}

    def work(place: int) -> None:
        found[place] = results(model, prompts[place::3])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(3)] == [expected[place::3] for place in range(3)]
    assert not model._memory.pages.in_use


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_the_cache_stays_within_what_is_left_of_the_share(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    model = make_native(8)
    page = model._memory.cache.numel() * model._memory.cache.element_size()
    left = 120 * page * share
    monkeypatch.setattr(memory, "room", lambda device, asked: left - held(model))
    prompts = texts(20)
    expected = results(make_native(8), prompts)
    sizes = []
    plain = Llama.new_cache
    monkeypatch.setattr(Llama, "new_cache", lambda self, pages: sizes.append(pages * page) or plain(self, pages))
    found = results(model, prompts)
    assert max(sizes) <= left
    fits = [len(prompt) + 12 <= 0.8 * left / page * PAGE - 64 for prompt in prompts]
    assert any(fits)
    assert all(row == other for row, other, fit in zip(found, expected, fits, strict=True) if fit)
    assert model._memory.pages.count > 5


def held(model: NativeModel) -> int:
    return model._memory.cache.numel() * model._memory.cache.element_size()


def test_a_cache_that_cannot_grow_beside_itself_grows_when_its_rows_have_ended(
    make_native: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = make_native(4), texts(12)
    expected = results(make_native(4), prompts)
    plain = Llama.new_cache

    def tight(self: Llama, pages: int) -> torch.Tensor:
        if pages + (model._memory.pages.count if model._memory.pages.in_use else 0) > 80:
            raise torch.OutOfMemoryError("injected")
        return plain(self, pages)

    monkeypatch.setattr(Llama, "new_cache", tight)
    assert results(model, prompts) == expected
    ((_, found),) = model.loglikelihood([ScoreRow((1,) * 1000, Trie.of([[1] * 5])[0])])
    assert isinstance(found, list)


@given(st.integers(1, 4096), st.integers(1, 128), st.booleans(), st.sampled_from([16, 256, 4096]))
def test_shapes_shrink_to_an_end_which_the_first_one_decides(slots: int, half: int, fixed: bool, grain: int) -> None:
    shape = Shape(slots, 32 * half, fixed, min(grain, 32 * half))
    listed = [shape]
    while (smaller := listed[-1].smaller) is not None:
        assert (smaller.slots, smaller.tokens) != (listed[-1].slots, listed[-1].tokens)
        assert smaller.slots <= max(1, listed[-1].slots // 2)
        assert smaller.tokens <= listed[-1].tokens
        assert smaller.tokens % 32 == 0
        assert smaller.grain == smaller.tokens or (smaller.grain == shape.grain and smaller.tokens % smaller.grain == 0)
        listed.append(smaller)
    assert len(listed) <= 14
    assert (listed[-1].slots, listed[-1].tokens) == (1, min(64, 32 * half))


def test_a_pass_is_run_again_a_few_times_and_other_errors_pass_through() -> None:
    calls = []

    def run() -> str:
        calls.append(1)
        if len(calls) < ATTEMPTS:
            raise MemoryError
        return "done"

    assert persevere(run, CPU) == "done"
    with pytest.raises(ShortOfMemory):
        persevere(lambda: torch.empty(10**15), CPU)
    with pytest.raises(ZeroDivisionError):
        persevere(lambda: 1 // 0, CPU)


def test_an_error_on_top_of_one_of_memory_counts_as_that() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("in a capture")
        finally:
            raise RuntimeError("capture failed")
    except RuntimeError as error:
        assert ran_out(error)
    assert not ran_out(RuntimeError("capture failed"))
    assert not ran_out(None)
