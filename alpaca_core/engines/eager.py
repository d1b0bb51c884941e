"""The forward pass between its matrix products, in plain torch: what runs where there is no Triton.

`kernels` has the same functions for CUDA. Shapes: ``N`` tokens, ``H`` query heads, ``G`` key heads, ``D``
numbers a head, ``P`` pages of 32 tokens. Of a row's results each depends on the row alone, bit for bit:
attention is called with shapes that follow from the row's own length, one row's next to another's.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from alpaca_core.engines.packing import TILE, Packed

_STRIDE = 2
"""Pages by which the part of the cache that a decode step reads grows."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32 as transformers does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(both: Tensor) -> Tensor:
    """SiLU of the first half of each row, times the second half."""
    gate, up = both.chunk(2, -1)
    return silu(gate).mul_(up)


def read_tiles(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, packed: Packed, heads: int
) -> Tensor:
    """Rotate, store keys and values, and attend from every tile to its context and to itself.

    Args:
        qkv: ``(N, (H + 2 G) D)``.
        keys: Of one layer, ``(P, 32, G, D)``; written. So are `values`.
        cos: ``(positions, D / 2)`` float32; so is `sin`.
        packed: The tiles.
        heads: ``H``.

    Returns:
        ``(N, H D)``; of tokens in no tile anything.
    """
    q, k, v = _rotated(qkv, cos, sin, packed.positions, keys, heads)
    _store(k, v, keys, values, packed.places)
    out = q.new_zeros(q.shape[0], heads * keys.shape[3])
    lanes = torch.arange(TILE, device=q.device)
    sees = (packed.sees[:, :, None] >> lanes) & 1 != 0  # n, TILE, TILE
    at = packed.starts[:, None] + lanes.minimum(packed.counts[:, None] - 1)  # spare lanes repeat the last token
    slots = torch.arange(int(packed.table.shape[1]) * TILE, device=q.device)
    for depth in sorted(set(packed.depths)):
        mine = torch.tensor([place for place, each in enumerate(packed.depths) if each == depth], device=q.device)
        index, seen = at[mine], sees[mine]
        near_k, near_v = k[index], v[index]  # n, TILE, G, D
        if depth:
            pages = packed.table[mine, :depth]
            near_k = torch.cat([_gathered(keys, pages), near_k], 1)
            near_v = torch.cat([_gathered(values, pages), near_v], 1)
            far = slots[: depth * TILE] < packed.contexts[mine, None]
            seen = torch.cat([far[:, None].expand(-1, TILE, -1), seen], -1)
        found = _attend(q[index], near_k, near_v, seen)  # n, TILE, H D
        real = lanes < packed.counts[mine, None]
        out[index[real]] = found[real]
    return out


def step(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    table: Tensor,
    heads: int,
    longest: int,
) -> Tensor:
    """Rotate, store and attend for one new token of each row.

    Args:
        qkv: ``(N, (H + 2 G) D)``; the other tensors as in `read_tiles`.
        lengths: Tokens of each row before this one.
        table: Pages of each row, ``(N, pages)``; spare entries name page 0.
        heads: ``H``.
        longest: Of use to `kernels`.

    Returns:
        ``(N, H D)``.
    """
    q, k, v = _rotated(qkv, cos, sin, lengths, keys, heads)
    page = table.gather(1, (lengths // TILE)[:, None].long())[:, 0]
    _store(k, v, keys, values, page * TILE + lengths % TILE)
    depths = ((lengths // (TILE * _STRIDE) + 1) * _STRIDE).tolist()
    out = q.new_empty(q.shape[0], heads * keys.shape[3])
    for depth in sorted(set(depths)):
        mine = torch.tensor([place for place, each in enumerate(depths) if each == depth], device=q.device)
        pages = table[mine, :depth]
        pages = torch.where(pages > 0, pages, page[mine, None])  # a spare entry repeats a page of the row's own
        seen = torch.arange(pages.shape[1] * TILE, device=q.device) <= lengths[mine, None]
        found = _attend(q[mine, None], _gathered(keys, pages), _gathered(values, pages), seen[:, None])
        out[mine] = found[:, 0]
    return out


def _rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``(N, heads, D)`` each; the first two turned to their positions."""
    kv, width = keys.shape[2:]
    both, v = qkv.view(len(qkv), -1, width).split([heads + kv, kv], 1)
    first, second = both.float().chunk(2, -1)
    c, s = cos[positions][:, None], sin[positions][:, None]
    both = torch.cat([first * c - second * s, second * c + first * s], -1).to(qkv.dtype)
    return both[:, :heads], both[:, heads:], v


def _store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    page, offset = places.long() // TILE, places.long() % TILE
    keys[page, offset] = k
    values[page, offset] = v


def _gathered(store: Tensor, pages: Tensor) -> Tensor:
    """``(P, 32, G, D)`` at pages ``(n, depth)``, as ``(n, depth * 32, G, D)``; four times as fast as by indexing."""
    return store.index_select(0, pages.flatten()).view(len(pages), -1, *store.shape[2:])


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``(n, queries, H, D)`` to ``(n, time, G, D)``; heads that share keys stand in one matrix product."""
    n, queries, heads, _ = q.shape
    kv = k.shape[2]
    q = q.unflatten(2, (kv, heads // kv)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # n, G, H / G * queries, D
    mask = seen[:, None].expand(-1, heads // kv, -1, -1).reshape(n, 1, heads // kv * queries, -1)
    found: Tensor = scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return found.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2)  # type: ignore[no-any-return]
