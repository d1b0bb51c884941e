"""Matrix products of the forward pass: dense or quantized weights, and LoRA beside them, chosen per row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

EIGHT = 8
"""Rows of a decode step's product on the CPU."""


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank updates of several adapters for one projection, side by side.

    All rows meet all adapters, and what is not theirs is set to zero in between: one small product more
    whatever the rows' adapters are, and a row's sum has only zeros added to it.

    Args:
        down: ``(ranks, in)``: the adapters' A, one below the other.
        up: ``(out, ranks)``: their B, times alpha / r.
        owners: ``(ranks,)``: which adapter each rank belongs to.
    """

    down: Tensor
    up: Tensor
    owners: Tensor

    def add(self, y: Tensor, x: Tensor, adapters: Tensor) -> Tensor:
        """Add to `y` what each row's adapter makes of its `x`; `adapters` has their numbers."""
        inner = linear(x, self.down) * (adapters[:, None] == self.owners)
        return y.addmm_(inner, self.up.t())


class Projection:
    """One or more linear layers of the same input, as one product where their weights are dense.

    On the CPU a decode step's product is made of eight rows at a time, and that of a pass over prompts of
    a multiple of sixteen: MKL takes other ways for other small numbers, but a row's sums come out the same
    at every place of these. On a GPU the number of rows is the caller's promise.

    Args:
        modules: `nn.Linear`, or bitsandbytes' modules, perhaps wrapped by PEFT.
        names: PEFT's names of the adapters, by their number.
    """

    def __init__(self, modules: Sequence[Any], names: Sequence[str] = ()) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        self._modules: Sequence[nn.Module] = ()
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if all(type(base) is nn.Linear for base in bases):
            self._fuse(bases)
        else:
            self._modules = bases
        self.lora = _lora(modules, names)

    def __call__(
        self, x: Tensor, adapters: Tensor | None = None, *, stepping: bool = False, add_to: Tensor | None = None
    ) -> Tensor:
        """Project ``(N, in)`` to ``(N, out)``; with `add_to` the result is added to that tensor, in place.

        Args:
            x: The input.
            adapters: Number of each row's adapter, -1 for none.
            stepping: Whether this is a decode step.
            add_to: What the result is added to.
        """
        if stepping and x.device.type == "cpu" and len(x) > EIGHT:
            targets = add_to.split(EIGHT) if add_to is not None else [None] * len(x)
            parts = [self._apply(part, target) for part, target in zip(x.split(EIGHT), targets, strict=False)]
            y = torch.cat(parts) if add_to is None else add_to
        else:
            y = self._apply(x, add_to)
        return y if self.lora is None or adapters is None else self.lora.add(y, x, adapters)

    def _apply(self, x: Tensor, add_to: Tensor | None) -> Tensor:
        if self.weight is None:
            y = torch.cat([module(x) for module in self._modules], -1)
            return y if add_to is None else add_to.add_(y)
        if add_to is None:
            return linear(x, self.weight, self.bias)
        add_to.addmm_(x, self.weight.t())
        return add_to if self.bias is None else add_to.add_(self.bias)

    def _fuse(self, bases: Sequence[nn.Linear]) -> None:
        """Put weights into one tensor, of which the layers keep views: the memory is not taken twice."""
        if len(bases) == 1:
            self.weight, self.bias = bases[0].weight, bases[0].bias
            return
        self.weight = torch.cat([base.weight for base in bases])
        first = 0
        for base in bases:
            base.weight.data = self.weight[first : first + base.out_features]
            first += base.out_features
        if bases[0].bias is not None:
            self.bias = torch.cat([base.bias for base in bases])


def _lora(modules: Sequence[Any], names: Sequence[str]) -> Lora | None:
    outs = [module.out_features for module in modules]
    downs, ups, owners = [], [], []
    for place, module in enumerate(modules):
        for number, name in enumerate(names):
            if name not in getattr(module, "lora_A", ()):
                continue
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            whole = up.new_zeros(sum(outs), up.shape[1])
            first = sum(outs[:place])
            whole[first : first + outs[place]] = up * module.scaling[name]
            downs.append(down)
            ups.append(whole)
            owners += [number] * len(down)
    if not downs:
        return None
    return Lora(torch.cat(downs), torch.cat(ups, 1), torch.tensor(owners, device=downs[0].device))
