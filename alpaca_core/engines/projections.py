"""Matrix products of the forward pass: dense or quantized weights, and LoRA beside them, chosen per row."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

_LEAST_INT8 = 32
"""Rows of an int8 product on a GPU; cuBLAS refuses 16 and fewer."""
_MOST_HALVES = 1 << 30
"""Numbers that a CPU keeps in 16 bits beside those in 32."""
_MANY = 256
"""Rows from which on a GPU sums adapters' products in one order, so that passes need not be full; steps have fewer."""


class _Weights(Protocol):
    """``(N, in)`` to ``(N, out)``; with a target the sum of both, for which the target may be written."""

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor: ...


class _Dense:
    """A matrix as it is, ``(out, in)``, and perhaps a bias; `large` says whether `many_rows` may be used."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self.large = True

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        if self.reads_one(x):
            return self.one_row(x, add_to=add_to)
        if add_to is None and self.reads_many(x):
            return self.many_rows(x)
        if add_to is None:
            return linear(x, self._weight, self._bias)
        add_to.addmm_(x, self._weight.t())
        return add_to if self._bias is None else add_to.add_(self._bias)

    def reads_one(self, x: Tensor) -> bool:
        """Whether `one_row` is for this input."""
        return len(x) == 1 and x.device.type == "cuda" and self._bias is None

    def one_row(self, x: Tensor, **told: Any) -> Tensor:
        """Call `matrix_kernels.one_row`, as it is told."""
        from alpaca_core.engines.matrix_kernels import one_row

        return one_row(x, self._weight, **told)

    def reads_many(self, x: Tensor) -> bool:
        """Whether `many_rows` is for this input."""
        if not self.large or x.device.type != "cuda" or self._bias is not None:
            return False
        from alpaca_core.engines.matrix_kernels import takes_many

        return takes_many(x, self._weight)

    def many_rows(self, x: Tensor, *, gated: bool = False) -> Tensor:
        """Call `matrix_kernels.many_rows`, as it is told."""
        from alpaca_core.engines.matrix_kernels import many_rows

        return many_rows(x, self._weight, gated=gated)


class _Packed:
    """A float32 matrix on a CPU in the order in which oneDNN reads it, as torch.compile packs it when it freezes.

    A product of few rows takes longest over bringing the matrix into that order, which is done once here. And a row's
    sums are the same in products of any number of rows but one, which those of `_Dense` are not.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)  # rows: of no matter
        self._bias = bias

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        run = torch.ops.mkldnn._linear_pointwise
        if add_to is None:
            y: Tensor = run(x, self._packed, self._bias, "none", [], "")
            return y
        y = run.binary(x, add_to, self._packed, self._bias, "add")
        return y


class _Half:
    """A float32 matrix of numbers that float16 holds exactly, on a CPU: FBGEMM widens them again within its product.

    Half as many bytes come from memory, and no number is rounded. A row's sums are the same in products of any number
    of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y if add_to is None else add_to.add_(y)


class _PackedGate:
    """SiLU of one product times another, of two packed matrices, each step as part of its product."""

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        self._gate, self._up = _Packed(gate.weight, gate.bias), _Packed(up.weight, up.bias)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate, self._up
        open_ = torch.ops.mkldnn._linear_pointwise(x, gate._packed, gate._bias, "swish", [], "")
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, open_, up._packed, up._bias, "mul")
        return y


def _product(weight: Tensor, bias: Tensor | None = None) -> _Weights:
    return (_Packed if _packs(weight) else _Dense)(weight, bias)


def halves(layers: Iterable[Any]) -> bool:
    """Say whether float16 holds the float32 weights of all layers exactly, and there is a product that reads it.

    It is half as much again to keep in memory, so large models go without.
    """
    weights = [getattr(layer, "base_layer", layer).weight for layer in layers]
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    runs = plain and "fbgemm" in torch.backends.quantized.supported_engines
    small = sum(weight.numel() for weight in weights) <= _MOST_HALVES
    return runs and small and all(torch.equal(weight.half().float(), weight) for weight in weights)


def _packs(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _plain(layers: Sequence[nn.Linear], *, few: bool) -> _Weights:
    """Plain layers with the same input as one product; the layers keep views of its weights."""
    weight: Tensor = layers[0].weight
    bias: Tensor | None = layers[0].bias
    if len(layers) > 1:
        weight = torch.cat([layer.weight for layer in layers])
        parts = weight.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part
        if bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
    return _Half(weight, bias) if few else _product(weight, bias)


class _Int8:
    """bitsandbytes' int8 weights at threshold 0, in one tensor, for a GPU.

    Its own modules cast to float16 and call five kernels a product; here it is three, and one for all layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._weight = torch.cat([layer.weight.data for layer in layers])
        self._columns = torch.cat([_scales(layer) for layer in layers])
        parts = self._weight.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part
            if layer.weight.CB is not None:
                layer.weight.CB = part
            else:
                layer.state.CB = part

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        from alpaca_core.engines.matrix_kernels import from_int8, to_int8

        turned, rows = to_int8(x)
        sums = torch._int_mm(pad(turned, (0, 0, 0, max(0, _LEAST_INT8 - len(x)))), self._weight.t())
        out = x.new_empty(len(x), len(self._weight)) if add_to is None else add_to
        return from_int8(sums, rows, self._columns, out, add=add_to is not None)


def _scales(layer: Any) -> Tensor:
    scales: Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scales


class _Modules:
    """Layers that are called as they are, one after the other."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = torch.cat([layer(x) for layer in self._layers], -1)
        return y if add_to is None else add_to.add_(y)


class _Lora:
    """Low-rank updates of several adapters for one projection, side by side.

    All rows meet all adapters, and what is not theirs is set to zero in between: one small product more
    whatever the rows' adapters are, and a row's sum has only zeros added to it.

    Args:
        down: ``(ranks, in)``: the adapters' A, one below the other.
        up: ``(out, ranks)``: their B, times alpha / r.
        owners: ``(ranks,)``: which adapter each rank belongs to.
    """

    def __init__(self, down: Tensor, up: Tensor, owners: Tensor) -> None:
        self._matrix, self._owners = down, owners
        self._down, self._up = _product(down), _product(up)
        self.ranks = len(owners)

    def add(self, y: Tensor, x: Tensor, adapters: Tensor) -> Tensor:
        """Add to `y` what each row's adapter makes of its `x`; `adapters` has their numbers."""
        if x.device.type == "cuda" and len(x) >= _MANY:
            from alpaca_core.engines.matrix_kernels import ranks_of

            return self._up(ranks_of(x, self._matrix, adapters, self._owners), add_to=y)
        return self._up(self._down(x) * (adapters[:, None] == self._owners), add_to=y)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: what computes it, its weight, and what is added to the mean of squares."""

    run: Callable[[Tensor, Tensor, float], Tensor]
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension."""
        return self.run(x, self.weight, self.eps)


class Projection:
    """One or more linear layers of the same input, as one product where their weights allow it.

    A row's sums come out the same at every place of a product of a fixed number of rows; with float32 on a CPU that
    has oneDNN, of any multiple of 16. Which numbers come is the caller's promise.

    Args:
        modules: `nn.Linear`, or bitsandbytes' modules, perhaps wrapped by PEFT.
        names: PEFT's names of the adapters, by their number.
        norm: What the input goes through first.
        few: Whether it is for few rows, as those of a decode step, of layers that `halves` names.
    """

    def __init__(
        self, modules: Sequence[Any], names: Sequence[str] = (), norm: Norm | None = None, *, few: bool = False
    ) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        kinds = {type(base).__name__ for base in bases}
        on_gpu = bases[0].weight.device.type == "cuda"
        plain = partial(_plain, few=few)
        make = plain if kinds == {"Linear"} else _Int8 if kinds == {"Linear8bitLt"} and on_gpu else _Modules
        self._weights: _Weights = make(bases)
        self._norm = norm
        self._lora = _beside(modules, names)
        self.ranks = self._lora.ranks if self._lora else 0  # of all adapters together

    def __call__(self, x: Tensor, adapters: Tensor | None = None, add_to: Tensor | None = None) -> Tensor:
        """Project ``(N, in)`` to ``(N, out)``.

        Args:
            x: The input.
            adapters: Number of each row's adapter, -1 for none.
            add_to: What the result is added to; it may be written.
        """
        if add_to is None and self._alone(x):
            return self._one_row(x)
        x = self._norm(x) if self._norm else x
        y = self._weights(x, add_to)
        return y if self._lora is None or adapters is None else self._lora.add(y, x, adapters)

    def gated(self, x: Tensor) -> Tensor | None:
        """SiLU of the first half times the second as part of the product; None where no kernel does that.

        Some do for one row, with the norm, and for many on some GPUs, of plain weights without adapters.
        """
        if self._alone(x):
            return self._one_row(x, gated=True)
        if self._lora is None and isinstance(self._weights, _Dense) and self._weights.reads_many(x):
            return self._weights.many_rows(self._norm(x) if self._norm else x, gated=True)
        return None

    def leave_large(self) -> None:
        """Leave products of many rows to the library."""
        if isinstance(self._weights, _Dense):
            self._weights.large = False

    def _alone(self, x: Tensor) -> bool:
        """Whether one kernel projects this one row, with what comes before."""
        return self._lora is None and isinstance(self._weights, _Dense) and self._weights.reads_one(x)

    def _one_row(self, x: Tensor, *, gated: bool = False) -> Tensor:
        assert isinstance(self._weights, _Dense)
        told = {"norm": self._norm.weight, "eps": self._norm.eps} if self._norm else {}
        return self._weights.one_row(x, gated=gated, **told)


class Gate:
    """The gate of an MLP: SiLU of one layer's output, times another layer's.

    Args:
        gate: As `Projection` takes it.
        up: Likewise.
        names: PEFT's names of the adapters, by their number.
        silu_mul: SiLU of the first half of each row, times the second half.
        norm: What the input goes through first.
        few: As `Projection` takes it.
    """

    def __init__(
        self,
        gate: Any,
        up: Any,
        names: Sequence[str],
        silu_mul: Callable[[Tensor], Tensor],
        norm: Norm,
        *,
        few: bool = False,
    ) -> None:
        self._silu_mul, self._norm = silu_mul, norm
        self._fused: _PackedGate | None = None
        self.ranks = 0
        if not few and all(type(layer) is nn.Linear and _packs(layer.weight) for layer in (gate, up)):
            self._fused = _PackedGate(gate, up)
        else:
            self._both = Projection([gate, up], names, norm, few=few)
            self.ranks = self._both.ranks

    def __call__(self, x: Tensor, adapters: Tensor) -> Tensor:
        """From ``(N, in)`` to ``(N, out)``; `adapters` has the number of each row's, -1 for none."""
        if self._fused:
            return self._fused(self._norm(x))
        gated = self._both.gated(x)
        return self._silu_mul(self._both(x, adapters)) if gated is None else gated

    def leave_large(self) -> None:
        """Leave products of many rows to the library."""
        if not self._fused:
            self._both.leave_large()


def is_steady(run: Callable[..., Tensor], rows: Sequence[Tensor], counts: Sequence[int]) -> bool:
    """Try whether the first of some rows have the same results without those behind them.

    A sum in another order shows in some of the many numbers that are compared.

    Args:
        run: What makes results of rows, one by one.
        rows: Its arguments, ``(N, ...)`` each.
        counts: How many rows are tried.
    """
    whole = run(*rows)
    few = (count for count in counts if count < len(whole))
    return all(torch.equal(whole[:count], run(*(each[:count] for each in rows))) for count in few)


def random_rows(count: int, width: int, like: Tensor) -> Tensor:
    """Draw ``(count, width)`` numbers, the same at each call, in the dtype and on the device of another tensor."""
    drawn = torch.randn(count, width, device=like.device, generator=torch.Generator(like.device).manual_seed(0))
    return drawn.to(like.dtype)


def _beside(modules: Sequence[Any], names: Sequence[str]) -> _Lora | None:
    """The adapters of some layers, each changing its own part of the output."""
    sizes = [module.out_features for module in modules]
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    owners: list[int] = []
    for place, module in enumerate(modules):
        for number, name in enumerate(names):
            if name not in getattr(module, "lora_A", ()):
                continue
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            whole = up.new_zeros(sum(sizes), up.shape[1])
            first = sum(sizes[:place])
            whole[first : first + sizes[place]] = up * module.scaling[name]
            downs.append(down)
            ups.append(whole)
            owners += [number] * len(down)
    if not downs:
        return None
    return _Lora(torch.cat(downs), torch.cat(ups, 1), torch.tensor(owners, device=downs[0].device))
