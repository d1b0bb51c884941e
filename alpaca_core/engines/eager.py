"""The forward pass between its matrix products, in plain torch: what runs where there is no Triton.

`kernels` has the same functions for CUDA. Shapes: ``N`` tokens, ``H`` query heads, ``G`` key heads, ``D``
numbers a head, ``P`` pages of 16 tokens. Of a row's results each depends on the row alone, bit for bit:
attention is called with shapes that follow from the row's own length, one row's next to another's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from alpaca_core.engines.packing import PAGE, TILE, Packed

_STRIDE = 2
"""Pages by which the part of the cache that a decode step reads grows."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; in float32 as fewer calls than torch's own makes."""
    if x.dtype != torch.float32:
        return rms_norm(x, (x.shape[-1],), weight, eps)
    length = vector_norm(x, dim=-1, keepdim=True)
    return torch.mul(x, length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def silu_mul(both: Tensor) -> Tensor:
    """SiLU of the first half of each row, times the second half."""
    gate, up = both.chunk(2, -1)
    return silu(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class _Group:
    """Tiles, or rows of a step, that see as many pages: what they read, and what of it they may see."""

    index: Tensor  # of the queries, (n, queries)
    pages: Tensor | None  # (n, depth)
    near: bool  # whether the queries' own keys are beside them in the pass, behind those in the pages
    sees: Tensor  # (n, queries, time), 0 or -inf
    real: Tensor  # places of the queries that are there, among n * queries


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of a pass have in common: angles, where keys and values go, and what is seen."""

    cos: Tensor  # N, 1, D / 2
    sin: Tensor
    places: Tensor  # N
    groups: list[_Group]


def plan_tiles(packed: Packed, cos: Tensor, sin: Tensor) -> Plan:
    """Plan a pass over tiles.

    Args:
        packed: The tiles.
        cos: ``(positions, D / 2)`` float32; so is `sin`.
        sin: As `cos`.
    """
    device = packed.ids.device
    lanes = torch.arange(TILE, device=device)
    sees = (packed.sees[:, :, None] >> lanes) & 1 != 0  # n, TILE, TILE
    within = lanes - packed.lanes[:, None]  # n, TILE
    at = packed.starts[:, None] + within.clamp(min=0).minimum(packed.counts[:, None] - 1)  # spare lanes repeat a token
    slots = torch.arange(int(packed.table.shape[1]) * PAGE, device=device)
    kinds = list(zip(packed.depths, (packed.lanes == 0).tolist(), strict=True))
    groups = []
    for depth, near in sorted(set(kinds)):
        mine = torch.tensor([place for place, each in enumerate(kinds) if each == (depth, near)], device=device)
        before = depth * PAGE if near else depth * PAGE - TILE
        far = slots[:before] < packed.contexts[mine, None]
        seen = torch.cat([far[:, None].expand(-1, TILE, -1), sees[mine]], -1)
        real = (within[mine] >= 0) & (within[mine] < packed.counts[mine, None])
        pages = packed.table[mine, :depth] if depth else None
        groups.append(_Group(at[mine], pages, near, _hidden(seen), real.flatten().nonzero()[:, 0]))
    return Plan(cos[packed.positions][:, None], sin[packed.positions][:, None], packed.places.long(), groups)


def plan_step(lengths: Tensor, table: Tensor, cos: Tensor, sin: Tensor, longest: int) -> Plan:
    """Plan a step.

    Args:
        lengths: Tokens of each row before the new one, ``(N,)``.
        table: Pages of each row, ``(N, pages)``; spare entries name page 0.
        cos: As in `plan_tiles`.
        sin: Likewise.
        longest: Of use to `kernels`.
    """
    page = table.gather(1, (lengths // PAGE)[:, None].long())[:, 0]
    depths = ((lengths // (PAGE * _STRIDE) + 1) * _STRIDE).tolist()
    groups = []
    for depth in sorted(set(depths)):
        mine = torch.tensor([place for place, each in enumerate(depths) if each == depth], device=lengths.device)
        pages = table[mine, :depth]
        pages = torch.where(pages > 0, pages, page[mine, None])  # a spare entry repeats a page of the row's own
        seen = torch.arange(pages.shape[1] * PAGE, device=lengths.device) <= lengths[mine, None]
        groups.append(_Group(mine[:, None], pages, False, _hidden(seen[:, None]), torch.arange(len(mine))))
    return Plan(cos[lengths][:, None], sin[lengths][:, None], page.long() * PAGE + lengths % PAGE, groups)


def _hidden(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def read_tiles(qkv: Tensor, keys: Tensor, values: Tensor, plan: Plan, heads: int) -> Tensor:
    """Rotate, store keys and values, and attend from every tile to its context and to itself.

    Args:
        qkv: ``(N, (H + 2 G) D)``.
        keys: Of one layer, ``(P, 16, G, D)``; written. So are `values`.
        values: As `keys`.
        plan: As `plan_tiles` made it.
        heads: ``H``.

    Returns:
        ``(N, H D)``; of tokens in no tile anything.
    """
    q, k, v = _rotated(qkv, keys, values, plan, heads)
    out = q.new_zeros(q.shape[0], heads * keys.shape[3])
    for group in plan.groups:
        found = _attend(q[group.index], _seen(k, keys, group), _seen(v, values, group), group.sees)  # n, TILE, H D
        out.index_copy_(0, group.index.flatten()[group.real], found.flatten(0, 1)[group.real])
    return out


def step(qkv: Tensor, keys: Tensor, values: Tensor, plan: Plan, heads: int) -> Tensor:
    """Rotate, store and attend for one new token of each row; the arguments as in `read_tiles`."""
    q, _, _ = _rotated(qkv, keys, values, plan, heads)
    out = q.new_empty(q.shape[0], heads * keys.shape[3])
    for group in plan.groups:
        assert group.pages is not None
        near = _gathered(keys, group.pages), _gathered(values, group.pages)
        if len(group.index) == len(q):  # in their order
            return _attend(q[:, None], *near, group.sees)[:, 0]
        out[group.index] = _attend(q[group.index], *near, group.sees)
    return out


def _rotated(qkv: Tensor, keys: Tensor, values: Tensor, plan: Plan, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``(N, heads, D)`` each, the first two turned to their positions; the rest is stored."""
    kv, width = keys.shape[2:]
    both, v = qkv.view(len(qkv), -1, width).split([heads + kv, kv], 1)
    first, second = both.float().chunk(2, -1)
    turned = torch.empty(both.shape, device=qkv.device)
    left, right = turned.chunk(2, -1)
    torch.mul(first, plan.cos, out=left).addcmul_(second, plan.sin, value=-1)
    torch.mul(second, plan.cos, out=right).addcmul_(first, plan.sin)
    q, k = turned.to(qkv.dtype).split([heads, kv], 1)
    keys.flatten(0, 1).index_copy_(0, plan.places, k)
    values.flatten(0, 1).index_copy_(0, plan.places, v)
    return q, k, v


def _seen(states: Tensor, store: Tensor, group: _Group) -> Tensor:
    """The keys, or values, that a group's queries may see: those in pages, then those of the pass."""
    near = states[group.index] if group.near else None  # n, TILE, G, D
    if group.pages is None:
        assert near is not None
        return near
    far = _gathered(store, group.pages)
    return far if near is None else torch.cat([far, near], 1)


def _gathered(store: Tensor, pages: Tensor) -> Tensor:
    """``(P, 16, G, D)`` at pages ``(n, depth)``, as ``(n, depth * 16, G, D)``; four times as fast as by indexing."""
    return store.index_select(0, pages.flatten()).view(len(pages), -1, *store.shape[2:])


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """``(n, queries, H, D)`` to ``(n, time, G, D)``; heads that share keys stand in one matrix product."""
    queries, heads = q.shape[1:3]
    kv = k.shape[2]
    q = q.unflatten(2, (kv, heads // kv)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # n, G, H / G * queries, D
    mask = seen if queries == 1 else seen.repeat(1, heads // kv, 1)
    k, v, mask = k.transpose(1, 2), v.transpose(1, 2), mask[:, None].to(q.dtype)
    found: Tensor = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return found.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2)  # type: ignore[no-any-return]
