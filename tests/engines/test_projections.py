"""Matrix products on a CPU against float64, and a row's bits among any number of rows."""

import pytest
import torch
from torch import Tensor, nn

from alpaca_core.engines.eager import norm, silu_mul
from alpaca_core.engines.projections import Gate, Norm, Projection, _Half, _Packed, _packs, halves

needs_fbgemm = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no FBGEMM")


def layer(out: int, width: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    """A layer of float32 numbers that `dtype` holds exactly."""
    made = nn.Linear(width, out, bias=bias).requires_grad_(False)
    made.weight.data = made.weight.to(dtype).float()
    return made


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@needs_fbgemm
def test_numbers_of_float16_can_be_kept_in_16_bits_and_others_cannot() -> None:
    torch.manual_seed(0)
    assert halves([layer(96, 80, torch.float16), layer(96, 80, torch.bfloat16)])
    tiny, huge, broken, cut = (layer(96, 80, torch.float16) for _ in range(4))
    tiny.weight.data[3, 5] = 2.0**-20 * 1.0078125  # bfloat16 holds it
    huge.weight.data[3, 5] = 70000.0
    broken.weight.data[3, 5] = torch.nan
    for other in (tiny, huge, broken, cut.double(), layer(96, 80, torch.float32)):
        assert not halves([layer(96, 80, torch.float16), other])


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("out", "width"), [(96, 80), (960, 576), (576, 1536), (333, 1030)])
def test_products_are_those_of_float64(dtype: torch.dtype, out: int, width: int, few: bool) -> None:
    torch.manual_seed(0)
    one, two = layer(out, width, dtype, bias=True), layer(out, width, dtype, bias=True)
    if few and not halves([one, two]):
        pytest.skip("float16 does not hold them, or there is no FBGEMM")
    x, weight = torch.randn(48, width), torch.rand(width)

    def parts(x: Tensor) -> list[Tensor]:
        return [x.double() @ each.weight.double().t() + each.bias.double() for each in (one, two)]

    gate, up = parts(x)
    assert close(Projection([one, two], few=few)(x), torch.cat([gate, up], 1))
    onto = torch.randn(48, out)
    assert close(Projection([one], few=few)(x, add_to=onto.clone()), onto.double() + gate)
    gated = Gate(one, two, (), silu_mul, Norm(norm, weight, 1e-5), few=few)(x, torch.full((48,), -1))
    gate, up = parts(nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5))
    assert close(gated, nn.functional.silu(gate) * up)


@needs_fbgemm
@pytest.mark.parametrize(("out", "width"), [(96, 80), (960, 576), (576, 1536), (333, 1030)])
def test_a_row_has_the_same_bits_among_any_number_of_rows(out: int, width: int) -> None:
    torch.manual_seed(0)
    half = _Half(layer(out, width, torch.float16).weight)
    x = torch.randn(256, width)
    whole = half(x)
    for count in [*range(1, 40), 119, 120, 121, 255]:
        assert torch.equal(half(x[:count]), whole[:count])
        assert torch.equal(half(x[-count:]), whole[-count:])


def test_packed_weights_are_for_float32_on_a_cpu() -> None:
    assert not _packs(torch.zeros(16, 16, dtype=torch.bfloat16))
    if _packs(torch.zeros(16, 16)):
        assert isinstance(Projection([layer(16, 16, torch.float32)])._weights, _Packed)
