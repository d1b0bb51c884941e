"""What the machine can do, measured, and how fast a model of a given shape could be there at most.

A pass computes its matrix products while their weights come through memory: the longer of the two counts. Keys and
values are read by another kernel, so that time is added. Attention's own products, norms and sampling count nothing,
so nobody reaches the limit.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure a copy, in GB/s read and written, and matrix products, in GFLOP/s, at the best of six.

    On a GPU the product of int8 matrices is measured, too. Whatever else the machine does makes them low, so that
    the best of several times is to be used.
    """
    cuda = device.type == "cuda"
    source = torch.randn(2**30 if cuda else 2**26, device=device).to(dtype)
    target = torch.empty_like(source)
    side = 8192 if cuda else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
    found = {"copy GB/s": copied, "product GFLOP/s": 2 * side**3 / seconds(lambda: matrix @ matrix)}
    if cuda:
        whole = torch.randint(-127, 127, (side, side), device=device, dtype=torch.int8)
        found["int8 product GFLOP/s"] = 2 * side**3 / seconds(lambda: torch._int_mm(whole, whole.t()))
    return {name: round(value / 1e9, 1) for name, value in found.items()}


@dataclass(frozen=True)
class Limit:
    """How fast a model could be under the ceilings of a machine.

    Args:
        config: Of the network, as transformers reads it.
        itemsize: Bytes of a number in the network's dtype.
        ceilings: As `ceilings` measures them.
        int8: Whether the layers are held in 8 bits; the head and the cache are not.
    """

    config: Any
    itemsize: int
    ceilings: dict[str, float]
    int8: bool = False

    def generate(self, rows: int, prompt: int, tokens: int) -> float:
        """Return new tokens per second, the pass over the prompts counted; it gives each row's first token."""
        seconds = self._pass(rows * prompt, rows)
        for step in range(1, tokens):
            seconds += self._pass(rows, rows) + self._seen(rows * (prompt + step))
        return rows * tokens / seconds

    def judge(self, rows: int, prompt: int, shared: int) -> float:
        """Return prompts judged per second, one forward pass each, where all begin with `shared` equal tokens."""
        return rows / self._pass(shared + rows * (prompt - shared), rows)

    def _pass(self, tokens: int, heads: int) -> float:
        """Seconds of a pass over so many tokens, with logits at some of them."""
        fast = self.ceilings["product GFLOP/s"] * 1e9
        layers = self.ceilings.get("int8 product GFLOP/s", 0.0) * 1e9 if self.int8 else 0.0
        size = 1 if self.int8 else self.itemsize
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        queries, keys = self.config.num_attention_heads * width, self.config.num_key_value_heads * width
        attention = self.config.hidden_size * (2 * queries + 2 * keys)
        mlp = 3 * self.config.hidden_size * self.config.intermediate_size
        weights = self.config.num_hidden_layers * (attention + mlp)
        head = self.config.hidden_size * self.config.vocab_size
        products = 2 * weights * tokens / (layers or fast) + 2 * head * heads / fast
        return max(products, (weights * size + head * self.itemsize) / self._copy)

    def _seen(self, tokens: int) -> float:
        """Seconds to read the keys and values of so many tokens."""
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        numbers = 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * width
        return tokens * numbers * self.itemsize / self._copy

    @property
    def _copy(self) -> float:
        """Bytes per second through memory; a copy moves each of its bytes twice, and that is counted."""
        return self.ceilings["copy GB/s"] * 1e9
