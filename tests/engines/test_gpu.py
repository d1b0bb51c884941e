"""On a GPU: a row's own bits, captures that fail, memory that runs out, the model's device, weights in 8 and 4 bits."""

import gc
import random
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca_core.engines import native
from alpaca_core.engines.llama import Llama, runs
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.quantizing import ends_of, recipe
from alpaca_core.engines.reading import norms_of
from alpaca_core.engines.sampling import Warper
from alpaca_core.engines.sharing import keep
from alpaca_core.model import GenerateRow
from alpaca_core.spec import Sampling
from alpaca_core.tokenizer import Tokenizer
from tests.engines.conftest import wrapped
from tests.engines.test_native import results, texts
from tests.engines.test_quantizing import assert_same_bits, both, save

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")

Make = Callable[..., NativeModel]


@pytest.fixture
def make(make_network: Callable[..., Any], tokenizer: Tokenizer) -> Make:
    """Wrap a network of two layers in bfloat16, with heads as wide as products on a GPU want them."""

    def made(device: str = "cuda:0", batch_size: int = 8) -> NativeModel:
        shape = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024}
        network = make_network(**shape).to(device, torch.bfloat16)
        model = wrapped(NativeModel, tokenizer, network, batch_size=batch_size)
        assert isinstance(model, NativeModel)
        return model

    return made


def test_a_row_has_the_same_bits_in_another_order_and_alone(make: Make) -> None:
    model, prompts = make(), texts(20)
    expected = results(model, prompts)
    order = random.Random(0).sample(range(20), 20)
    assert results(make(), [prompts[place] for place in order]) == [expected[place] for place in order]
    for place in order[:4]:
        model._memory.pages.forget()
        assert results(model, [prompts[place]]) == [expected[place]]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("adapters", [(), ("default",), ("default", "other", "third")])
def test_passes_that_are_not_full_give_the_same_bits(
    make_network: Callable[..., Any],
    add_adapters: Callable[..., Any],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    adapters: tuple[str, ...],
    large: bool,
) -> None:
    from alpaca_core.engines import matrix_kernels

    ran: list[torch.Size] = []

    def many_rows(x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
        ran.append(x.shape)
        return product(x, weight, gated=gated)

    product = matrix_kernels.many_rows
    monkeypatch.setattr(matrix_kernels, "many_rows", many_rows)
    if large:  # as if this network's matrices were those of a large one
        monkeypatch.setattr(matrix_kernels, "_LEAST_MANY", (1024, 1))

    def make() -> NativeModel:
        network = make_network(hidden_size=256, intermediate_size=512, max_position_embeddings=1024)
        network = add_adapters(network, adapters) if adapters else network
        return wrapped(NativeModel, tokenizer, network.to("cuda", torch.bfloat16), adapters, batch_size=64)

    prompts, chosen = texts(60), (*adapters, None)
    model = make()
    assert model._recovery.shape.grain < model._recovery.shape.tokens, "cuBLAS sums in another order on this GPU"
    expected = results(model, prompts, chosen)
    for place in range(6):
        model._memory.pages.forget()
        assert results(model, [prompts[place]], chosen) == [expected[place]]
    monkeypatch.setattr(native, "_GPU_GRAIN", 4096)
    full = make()
    assert model._llama is not None
    assert full._llama is not None
    if not model._llama.large:  # found to give other bits
        full._llama.leave_large()
    assert results(full, prompts, chosen) == expected
    assert bool(ran) == (large and torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.parametrize("vocab", [258, 32_000, 32_001, 32_003])
def test_a_rows_norm_does_not_depend_on_its_place(vocab: int) -> None:
    rows = torch.randn(128, vocab, device="cuda", generator=torch.Generator("cuda").manual_seed(vocab)) * 5
    expected = norms_of(rows)
    for shift in (1, 2, 3, 5, 64):
        assert torch.equal(norms_of(rows.roll(shift, 0)).roll(-shift, 0), expected)
    assert torch.allclose(expected.double(), rows.double().logsumexp(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("inner", "size"), [(8, 3), (64, 258), (576, 1_536), (4_096, 12_288), (11_008, 4_096), (5_000, 77)]
)
def test_one_row_is_norm_product_and_gate_in_one(inner: int, size: int, dtype: torch.dtype) -> None:
    from alpaca_core.engines.matrix_kernels import one_row

    draw = torch.Generator("cuda").manual_seed(inner)
    x, scale, onto = (
        3 * torch.randn(1, many, device="cuda", generator=draw).to(dtype) for many in (inner, inner, size)
    )
    weight = torch.randn(2 * size, inner, device="cuda", generator=draw).to(dtype) / inner**0.5
    normed = torch.nn.functional.rms_norm(x.double(), (inner,), scale[0].double(), 1e-6)
    gate, up = (normed @ weight.double().t()).chunk(2, -1)
    expected = {
        "plain": x.double() @ weight[:size].double().t(),
        "normed": gate,
        "gated": torch.nn.functional.silu(gate) * up,
        "added": x.double() @ weight[:size].double().t() + onto.double(),
    }
    found = {
        "plain": one_row(x, weight[:size]),
        "normed": one_row(x, weight[:size], norm=scale[0], eps=1e-6),
        "gated": one_row(x, weight, norm=scale[0], eps=1e-6, gated=True),
        "added": one_row(x, weight[:size], add_to=onto.clone()),
    }
    for name, each in found.items():
        error = (each.double() - expected[name]).norm() / expected[name].norm()
        assert error < {torch.float32: 1e-5}.get(dtype, 5e-3), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inner", "size"), [(2_100, 200, 24_576), (4_096, 4_096, 22_016), (8_192, 576, 3_088)])
def test_many_rows_are_a_product_and_a_gate_in_one(rows: int, inner: int, size: int, dtype: torch.dtype) -> None:
    from alpaca_core.engines.kernels import silu_mul
    from alpaca_core.engines.matrix_kernels import many_rows, takes_many

    draw = torch.Generator("cuda").manual_seed(inner)
    x = torch.randn(rows, inner, device="cuda", generator=draw).to(dtype)
    weight = torch.randn(size, inner, device="cuda", generator=draw).to(dtype) / inner**0.5
    if torch.cuda.get_device_capability()[0] != 9:
        assert not takes_many(x, weight)
        pytest.skip("not Hopper")
    assert takes_many(x, weight)
    found = many_rows(x, weight)
    expected = x.double() @ weight.double().t()
    assert (found.double() - expected).norm() / expected.norm() < 5e-3
    assert torch.equal(many_rows(x, weight, gated=True), silu_mul(found))
    for first, last in ((0, 256), (128, 640), (1, 2_049)):
        assert torch.equal(many_rows(x[first:last].contiguous(), weight), found[first:last])
        assert torch.equal(many_rows(x[first:last].contiguous(), weight, gated=True), silu_mul(found[first:last]))
    assert not takes_many(x[1:, : inner // 2], weight[:, : inner // 2])
    assert not takes_many(x[:1_000], weight)
    assert not takes_many(x.float(), weight.float())


@pytest.mark.parametrize("ranks", [1, 8, 40, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_ranks_of_adapters_are_those_of_a_product(ranks: int, dtype: torch.dtype) -> None:
    from alpaca_core.engines.matrix_kernels import ranks_of

    draw = torch.Generator("cuda").manual_seed(ranks)
    x = torch.randn(300, 1000, device="cuda", generator=draw).to(dtype)
    down = torch.randn(ranks, 1000, device="cuda", generator=draw).to(dtype)
    owners = torch.arange(ranks, device="cuda") % 3
    adapters = torch.arange(300, device="cuda") % 4 - 1
    expected = (x.double() @ down.double().t()) * (adapters[:, None] == owners)
    found = ranks_of(x, down, adapters, owners)
    assert (found.double() - expected).norm() / expected.norm() < {torch.float32: 1e-5}.get(dtype, 5e-3)
    assert torch.equal(ranks_of(x[:256], down, adapters[:256], owners), found[:256])
    assert not found[adapters == -1].any()


@pytest.mark.parametrize("vocab", [7, 4096, 32_000, 151_936])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_and_top_p_cut_what_they_cut_on_a_cpu(vocab: int, spread: float, ties: bool) -> None:
    from alpaca_core.engines.choice_kernels import cut

    settings = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.01, 0.7, 1.0, 3.0)
        for top_k in (None, 1, 5, 40, 5000)
        for top_p in (None, 1e-9, 0.3, 0.9, 0.999)
    ]
    logits = spread * torch.randn(len(settings), vocab, generator=torch.Generator().manual_seed(vocab))
    logits = (logits / spread * 4).round() * spread / 4 if ties else logits
    logits[:, 3] = -torch.inf
    expected = Warper(settings, torch.device("cpu"))(logits) == -torch.inf
    temperatures, ranks, masses = (
        torch.tensor(values, device="cuda", dtype=dtype)
        for values, dtype in (
            ([setting.temperature for setting in settings], torch.float64),
            ([setting.top_k or 0 for setting in settings], torch.int64),
            ([torch.inf if setting.top_p is None else setting.top_p for setting in settings], torch.float64),
        )
    )
    found = cut(logits.cuda(), temperatures, ranks, masses).cpu()
    assert torch.equal(found == -torch.inf, expected)
    assert torch.equal(found[~expected], logits[~expected])


def test_a_top_k_larger_than_any_number_of_the_machine_keeps_all(make: Make) -> None:
    rows = [GenerateRow((3, 4), Sampling(temperature=1.0, max_new_tokens=4, top_k=top_k)) for top_k in (None, 2**70)]
    found = dict(make().generate(rows))
    assert found[0] == found[1]


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_runs_out_of_memory_is_made_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    prompts, stream, failed = texts(12), torch.cuda.current_stream(), []
    expected = results(make(), prompts)
    plain = Llama.step

    def step(self: Llama, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = plain(self, tokens, *rest)
        if torch.cuda.is_current_stream_capturing() and len(failed) < 3:
            failed.append(1)
            if not ends:
                with pytest.raises(RuntimeError, match="captur"):
                    tokens.tolist()  # a capture that this ended cannot be closed
            raise torch.OutOfMemoryError("injected")
        return logits

    monkeypatch.setattr(Llama, "step", step)
    assert results(make(), prompts) == expected
    assert len(failed) == 3
    assert torch.cuda.current_stream() == stream


def test_memory_that_runs_out_one_time_in_five_changes_no_result(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, draw, failed = texts(16), random.Random(1), []
    expected = results(make(), prompts)

    def failing(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **settings: Any) -> torch.Tensor:
            if draw.random() < 0.2:
                failed.append(1)
                raise torch.OutOfMemoryError("injected")
            return plain(*args, **settings)

        return call

    for name in ("step", "read", "logits"):
        monkeypatch.setattr(Llama, name, failing(getattr(Llama, name)))
    assert results(make(), prompts) == expected
    assert failed


def test_a_callers_stream_changes_nothing(make: Make) -> None:
    model, prompts = make(), texts(8)
    expected = results(model, prompts)
    model._memory.pages.forget()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert results(model, prompts) == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_runs_while_the_first_is_current(make: Make) -> None:
    prompts = texts(8)
    expected = results(make("cuda:0"), prompts)
    with torch.cuda.device(0):
        assert results(make("cuda:1"), prompts) == expected
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_have_the_bits_of_transformers_own_way(
    make_network: Callable[..., Any], tmp_path: Path, quantization: str, dtype: torch.dtype
) -> None:
    save(make_network(hidden_size=256, intermediate_size=512).to(dtype), tmp_path)
    ours, theirs = both(tmp_path, quantization, dtype, "cuda:0")
    assert {end.device for end in ends_of(ours).values()} == {torch.device("cuda:0")}
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_are_quantized_one_at_a_time(
    make_network: Callable[..., Any], tmp_path: Path, quantization: str
) -> None:
    network = make_network(hidden_size=256, intermediate_size=512, num_hidden_layers=16).bfloat16()
    largest = max(weight.numel() for weight in network.parameters())
    network.save_pretrained(tmp_path)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=recipe(quantization, torch.bfloat16), dtype=torch.bfloat16, device_map={"": 0}
    )
    assert len(ends_of(quantized)) == 16 * 7
    # as it was read, in float16 and in 8 bits: 5 bytes a number; the whole network would be 140 times one matrix
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() < 8 * largest


def test_heads_that_are_too_small_for_triton_are_left_to_transformers(make_network: Callable[..., Any]) -> None:
    network = make_network(head_dim=8)
    assert runs(network)
    assert not runs(network.to("cuda"))


def test_a_stated_share_of_the_memory_is_kept(make_network: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """By rows that would fill it several times over; in less memory they wait for one another, and are the same."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "num_key_value_heads": 4}
    draw = random.Random(5)
    prompts = [tuple(draw.randrange(256) for _ in range(draw.randint(600, 900))) for _ in range(120)]
    device, total = torch.device("cuda", 0), torch.cuda.mem_get_info()[1]
    found, peaks = [], []
    little = 1.5 * 2**30 / total
    for share in (0.5, little):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        keep(device, share)
        try:
            network = make_network(**shape, max_position_embeddings=1024).to(device, torch.bfloat16)
            with closing(wrapped(partial(NativeModel, memory_share=share), tokenizer, network, batch_size=64)) as model:
                del network
                found.append(results(model, prompts))
        finally:
            keep(device, 1.0)
        peaks.append(torch.cuda.max_memory_reserved() / total)
    assert peaks[1] <= little < peaks[0]
    # in so little memory a pass may fail all the same; then others are smaller, and rows say so, whose bits are others
    first = found[0][0][1].shape
    for pair in zip(*found, strict=True):
        for expected, result in zip(*pair, strict=True):
            assert result.shape != first or result == expected
    assert {result.shape for row in found[0] for result in row} == {first}
