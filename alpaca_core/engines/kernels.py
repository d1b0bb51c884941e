"""The forward pass between its matrix products, in Triton.

The same functions as in `eager`, on CUDA. Every loop over keys has fixed blocks that start at the row's own
beginning, and what a mask hides is not loaded: so a row's numbers come out the same in any company.
Letters as in `eager`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpaca_core.engines.packing import PAGE, TILE, Packed

_SEGMENT = 256
"""Tokens of a row that one program of a decode step reads; longer rows are joined from several."""
_LOG2_E = 1.4426950408889634


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm[(x.shape[0],)](x, weight, out, eps, width, triton.next_power_of_2(width), num_warps=8)
    return out


@triton.jit
def _norm(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(x_ptr + row * WIDTH + at, inside, 0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / WIDTH + eps)
    weight = tl.load(weight_ptr + at, inside, 0.0)
    tl.store(out_ptr + row * WIDTH + at, weight * (wide * scale).to(x.dtype), inside)


def silu_mul(both: Tensor) -> Tensor:
    """SiLU of the first half of each row, times the second half."""
    width = both.shape[-1] // 2
    out = both.new_empty(both.shape[0], width)
    _silu_mul[(both.shape[0], triton.cdiv(width, 1024))](both, out, width, 1024, num_warps=4)
    return out


@triton.jit
def _silu_mul(both_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(both_ptr + row * 2 * WIDTH + at, inside, 0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * WIDTH + WIDTH + at, inside, 0.0)
    tl.store(out_ptr + row * WIDTH + at, (gate * tl.sigmoid(gate)).to(up.dtype) * up, inside)


def plan_tiles(packed: Packed, cos: Tensor, sin: Tensor) -> tuple[Packed, Tensor, Tensor]:
    """Plan a pass over tiles: all is left to the kernels."""
    return packed, cos, sin


def plan_step(
    lengths: Tensor, table: Tensor, cos: Tensor, sin: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Plan a step of rows none of which has more than `longest` tokens."""
    return lengths, table, cos, sin, longest


def read_tiles(qkv: Tensor, keys: Tensor, values: Tensor, plan: tuple[Packed, Tensor, Tensor], heads: int) -> Tensor:
    """Rotate, store keys and values, and attend from every tile to its context and to itself."""
    packed, cos, sin = plan
    kv, width = keys.shape[2:]
    steps = keys.stride()[:3]
    _store[(qkv.shape[0], 2)](
        qkv, cos, sin, packed.positions, packed.places, keys, values, *steps, heads, kv, width, PAGE,
        triton.next_power_of_2(kv), num_warps=4,
    )  # fmt: skip
    out = qkv.new_empty(qkv.shape[0], heads * width)  # what is in no tile stays as it is, and in its row
    _read_tiles[(packed.starts.shape[0], heads)](
        qkv, out, keys, values, *steps, cos, sin, packed.positions, packed.starts, packed.counts, packed.lanes,
        packed.contexts, packed.sees, packed.table, packed.table.stride(0), width**-0.5 * _LOG2_E, heads, kv, width,
        TILE, PAGE, 2 * TILE, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _store(qkv_ptr, cos_ptr, sin_ptr, position_ptr, place_ptr, keys_ptr, values_ptr, page_step, token_step,
           head_step, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
           LANES: tl.constexpr):  # fmt: skip
    """One program for a token's keys, which are turned where they stand, too, and one for its values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, half = tl.arange(0, LANES)[:, None], tl.arange(0, D // 2)[None]
    good = head < KV
    at = qkv_ptr + token * (HEADS + 2 * KV) * D + (HEADS + part * KV + head) * D + half
    first, second = tl.load(at, good), tl.load(at + D // 2, good)
    place = tl.load(place_ptr + token)
    to = (place // PAGE).to(tl.int64) * page_step + (place % PAGE) * token_step + head * head_step + half
    if part == 0:
        turn = tl.load(position_ptr + token).to(tl.int64) * (D // 2) + half
        cos, sin = tl.load(cos_ptr + turn), tl.load(sin_ptr + turn)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
        tl.store(at, first, good)
        tl.store(at + D // 2, second, good)
        tl.store(keys_ptr + to, first, good)
        tl.store(keys_ptr + to + D // 2, second, good)
    else:
        tl.store(values_ptr + to, first, good)
        tl.store(values_ptr + to + D // 2, second, good)


@triton.jit
def _weigh(score, v, most, total, acc):
    """Take one block of scores and values into a running softmax (online softmax, arXiv 1805.02867)."""
    new = tl.maximum(most, tl.max(score, 1))
    old, p = tl.exp2(most - new), tl.exp2(score - new[:, None])
    return new, total * old + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")


@triton.jit
def _read_tiles(qkv_ptr, out_ptr, keys_ptr, values_ptr, page_step, token_step, head_step, cos_ptr, sin_ptr,
                position_ptr, start_ptr, count_ptr, lane_ptr, context_ptr, sees_ptr, table_ptr, table_step, scale,
                HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    kv = head // (HEADS // KV)
    width: tl.constexpr = (HEADS + 2 * KV) * D
    start, count = tl.load(start_ptr + tile).to(tl.int64), tl.load(count_ptr + tile)
    context, begin = tl.load(context_ptr + tile), tl.load(lane_ptr + tile)
    lane, at = tl.arange(0, LANES), tl.arange(0, D)
    real = (lane >= begin) & (lane < begin + count)
    token = start + lane - begin
    pages = table_ptr + tile.to(tl.int64) * table_step
    rows = qkv_ptr + token[:, None] * width
    q = tl.load(rows + head * D + at[None], real[:, None], 0.0)
    other = tl.load(rows + head * D + ((at + D // 2) % D)[None], real[:, None], 0.0)
    turn = tl.load(position_ptr + token, real, 0).to(tl.int64)[:, None] * (D // 2) + (at % (D // 2))[None]
    sin = tl.load(sin_ptr + turn) * tl.where(at < D // 2, -1.0, 1.0)[None]
    q = (q.to(tl.float32) * tl.load(cos_ptr + turn) + other.to(tl.float32) * sin).to(q.dtype)
    most = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    for first in range(0, context, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        seen = slot < context
        page = tl.load(pages + slot // PAGE, seen, 0).to(tl.int64)
        near = page * page_step + (slot % PAGE) * token_step + kv * head_step
        k = tl.load(keys_ptr + near[None] + at[:, None], seen[None], 0.0)
        v = tl.load(values_ptr + near[:, None] + at[None], seen[:, None], 0.0)
        score = tl.where(seen[None], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        most, total, acc = _weigh(score, v, most, total, acc)
    if begin == 0:
        k = tl.load(qkv_ptr + token[None] * width + (HEADS + kv) * D + at[:, None], real[None], 0.0)
        v = tl.load(rows + (HEADS + KV + kv) * D + at[None], real[:, None], 0.0)
    else:  # somebody else has computed the first half
        slot, there = context + lane, lane < begin + count
        page = tl.load(pages + slot // PAGE, there, 0).to(tl.int64)
        near = page * page_step + (slot % PAGE) * token_step + kv * head_step
        k = tl.load(keys_ptr + near[None] + at[:, None], there[None], 0.0)
        v = tl.load(values_ptr + near[:, None] + at[None], there[:, None], 0.0)
    sees = ((tl.load(sees_ptr + tile * LANES + lane)[:, None] >> lane[None]) & 1) != 0
    most, total, acc = _weigh(
        tl.where(sees, tl.dot(q, k, input_precision="ieee") * scale, float("-inf")), v, most, total, acc
    )
    to = out_ptr + token[:, None] * (HEADS * D) + head * D + at[None]
    tl.store(to, (acc / total[:, None]).to(q.dtype), real[:, None])


def step(
    qkv: Tensor, keys: Tensor, values: Tensor, plan: tuple[Tensor, Tensor, Tensor, Tensor, int], heads: int
) -> Tensor:
    """Rotate, store and attend for one new token of each row."""
    lengths, table, cos, sin, longest = plan
    rows, (kv, width) = qkv.shape[0], keys.shape[2:]
    group, parts = heads // kv, triton.cdiv(longest, _SEGMENT)
    lanes = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    out = qkv.new_empty(rows, heads * width)
    sums = torch.empty(rows, heads, parts, width, device=qkv.device)
    norms = torch.empty(rows, heads, parts, 2, device=qkv.device)
    _step[(rows, kv, parts)](
        qkv, sums, norms, keys, values, *keys.stride()[:3], cos, sin, lengths, table, table.stride(0),
        width**-0.5 * _LOG2_E, parts, heads, kv, width, PAGE, 2 * TILE, _SEGMENT, group, lanes, num_warps=2,
    )  # fmt: skip
    _join[(rows, heads)](sums, norms, out, lengths, parts, heads, width, _SEGMENT, num_warps=1)
    return out


@triton.jit(do_not_specialize=["PARTS"])
def _step(qkv_ptr, sum_ptr, norm_ptr, keys_ptr, values_ptr, page_step, token_step, head_step, cos_ptr, sin_ptr,
          length_ptr, table_ptr, table_step, scale, PARTS, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
          PAGE: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr,
          LANES: tl.constexpr):  # fmt: skip
    """One program a row, key head and segment of the row; the first one stores the new key and value.

    The number of segments is no constant, and `_join` runs for one segment, too: a kernel that is compiled otherwise
    where all rows are short gave such rows other bits.
    """
    row, kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_ptr + row)
    first = part * SEGMENT
    if (part > 0) & (first >= length):
        return
    at, lane = tl.arange(0, D), tl.arange(0, LANES)
    turn = length.to(tl.int64) * (D // 2) + at % (D // 2)
    cos = tl.load(cos_ptr + turn)
    sin = tl.load(sin_ptr + turn) * tl.where(at < D // 2, -1.0, 1.0)
    partner = (at + D // 2) % D
    base = qkv_ptr + row * (HEADS + 2 * KV) * D
    head, good = kv * GROUP + lane, (lane < GROUP)[:, None]
    q = tl.load(base + head[:, None] * D + at[None], good, 0.0)  # LANES, D
    other = tl.load(base + head[:, None] * D + partner[None], good, 0.0)
    q = (q.to(tl.float32) * cos[None] + other.to(tl.float32) * sin[None]).to(q.dtype)
    most = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    if part == 0:
        own_k = tl.load(base + (HEADS + kv) * D + at)
        far_k = tl.load(base + (HEADS + kv) * D + partner)
        own_k = (own_k.to(tl.float32) * cos + far_k.to(tl.float32) * sin).to(own_k.dtype)
        own_v = tl.load(base + (HEADS + KV + kv) * D + at)
        own = tl.load(table_ptr + row * table_step + length // PAGE).to(tl.int64)
        to = own * page_step + (length % PAGE) * token_step + kv * head_step + at
        tl.store(keys_ptr + to, own_k)
        tl.store(values_ptr + to, own_v)
        most = tl.sum(q.to(tl.float32) * own_k.to(tl.float32)[None], 1) * scale
        total += 1.0
        acc += own_v.to(tl.float32)[None]
    for begin in range(first, tl.minimum(first + SEGMENT, length), BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        seen = slot < length
        page = tl.load(table_ptr + row * table_step + slot // PAGE, seen, 0).to(tl.int64)
        near = page * page_step + (slot % PAGE) * token_step + kv * head_step
        v = tl.load(values_ptr + near[:, None] + at[None], seen[:, None], 0.0)
        if LANES == 1:  # too few for the matrix unit
            k = tl.load(keys_ptr + near[:, None] + at[None], seen[:, None], 0.0)  # BLOCK, D
            score = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1)[None]
            score = tl.where(seen[None], score * scale, float("-inf"))
            new = tl.maximum(most, tl.max(score, 1))
            old, p = tl.exp2(most - new), tl.exp2(score - new[:, None])
            most, total = new, total * old + tl.sum(p, 1)
            acc = acc * old[:, None] + tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None]
        else:
            k = tl.load(keys_ptr + near[None] + at[:, None], seen[None], 0.0)  # D, BLOCK
            score = tl.where(seen[None], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
            most, total, acc = _weigh(score, v, most, total, acc)
    place = (row * HEADS + head) * PARTS + part
    tl.store(sum_ptr + place[:, None] * D + at[None], acc, good)
    tl.store(norm_ptr + place * 2, most, lane < GROUP)
    tl.store(norm_ptr + place * 2 + 1, total, lane < GROUP)


@triton.jit(do_not_specialize=["PARTS"])
def _join(sum_ptr, norm_ptr, out_ptr, length_ptr, PARTS, HEADS: tl.constexpr, D: tl.constexpr, SEGMENT: tl.constexpr):
    """Join the segments of one row and head, in their order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, D)
    base = (row * HEADS + head) * PARTS
    most, total = tl.load(norm_ptr + base * 2), tl.load(norm_ptr + base * 2 + 1)
    acc = tl.load(sum_ptr + base * D + at)
    for part in range(1, tl.cdiv(tl.load(length_ptr + row), SEGMENT)):
        other = tl.load(norm_ptr + (base + part) * 2)
        new = tl.maximum(most, other)
        old, fresh = tl.exp2(most - new), tl.exp2(other - new)
        total = total * old + tl.load(norm_ptr + (base + part) * 2 + 1) * fresh
        acc = acc * old + tl.load(sum_ptr + (base + part) * D + at) * fresh
        most = new
    tl.store(out_ptr + (row * HEADS + head) * D + at, (acc / total).to(out_ptr.dtype.element_ty))


def one_row(x: Tensor, weight: Tensor, add_to: Tensor | None) -> Tensor:
    """Multiply one row by a matrix, ``(1, in)`` and ``(out, in)``, as fast as the matrix can be read."""
    size, inner = weight.shape
    out = x.new_empty(1, size) if add_to is None else add_to
    rows, block = (2, 2048) if inner <= 4096 else (1, 4096)  # the best of thirteen at LLaMA-7B's shapes, one H100
    _one_row[(triton.cdiv(size, rows),)](x, weight, out, size, inner, rows, block, add_to is not None, num_warps=8)
    return out


@triton.jit
def _one_row(x_ptr, weight_ptr, out_ptr, SIZE, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
             ADD: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    good = row < SIZE
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, INNER, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < INNER, 0.0).to(tl.float32)
        near = weight_ptr + row[:, None].to(tl.int64) * INNER + at[None]
        weight = tl.load(near, good[:, None] & (at < INNER)[None], 0.0, eviction_policy="evict_first")
        sums += weight.to(tl.float32) * x[None]
    y = tl.sum(sums, 1)
    if ADD:
        y += tl.load(out_ptr + row, good, 0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), good)


def ranks_of(x: Tensor, down: Tensor, adapters: Tensor, owners: Tensor) -> Tensor:
    """Multiply rows by the A of several LoRA adapters side by side, and leave to each row what its own adapter made.

    With so few columns cuBLAS cuts sums into parts, by the number of rows; here a row's sums are the same among any.

    Args:
        x: ``(N, in)``.
        down: ``(ranks, in)``.
        adapters: Number of each row's adapter.
        owners: Which adapter each rank belongs to.

    Returns:
        ``(N, ranks)``.
    """
    rows, inner = x.shape
    out = x.new_empty(rows, len(down))
    block = min(64, max(16, triton.next_power_of_2(len(down))))
    _ranks_of[(triton.cdiv(rows, 16), triton.cdiv(len(down), block))](
        x, down, adapters, owners, out, rows, inner, len(down), 16, block, 128, num_warps=4, num_stages=4
    )
    return out


@triton.jit
def _ranks_of(x_ptr, down_ptr, adapter_ptr, owner_ptr, out_ptr, ROWS, INNER, RANKS, BLOCK: tl.constexpr,
              WIDE: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real, good = row < ROWS, rank < RANKS
    sums = tl.zeros((BLOCK, WIDE), tl.float32)
    for first in range(0, INNER, STEP):
        at = first + tl.arange(0, STEP)
        x = tl.load(x_ptr + row[:, None] * INNER + at[None], real[:, None] & (at < INNER)[None], 0.0)
        near = down_ptr + rank[None] * INNER + at[:, None]
        sums = tl.dot(x, tl.load(near, good[None] & (at < INNER)[:, None], 0.0), sums, input_precision="ieee")
    own = tl.load(adapter_ptr + row, real, -1)[:, None] == tl.load(owner_ptr + rank, good, -2)[None]
    to = out_ptr + row[:, None] * RANKS + rank[None]
    tl.store(to, tl.where(own, sums, 0.0).to(out_ptr.dtype.element_ty), real[:, None] & good[None])


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row by its largest number (LLM.int8(), arXiv 2208.07339, section 3.1): int8, and the largest."""
    rows, width = x.shape
    out, most = torch.empty_like(x, dtype=torch.int8), torch.empty(rows, device=x.device)
    _to_int8[(rows,)](x, out, most, width, triton.next_power_of_2(width), num_warps=8)
    return out, most


@triton.jit
def _to_int8(x_ptr, out_ptr, most_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * WIDTH + at, at < WIDTH, 0.0).to(tl.float32)
    most = tl.max(tl.abs(x))
    turned = x * (127.0 / tl.maximum(most, 1e-30))
    turned = tl.floor(tl.abs(turned) + 0.5) * tl.where(turned < 0, -1.0, 1.0)
    tl.store(out_ptr + row * WIDTH + at, turned.to(tl.int8), at < WIDTH)
    tl.store(most_ptr + row, tl.where(tl.max(tl.where(x == x, 0, 1)) == 1, float("nan"), most))


def from_int8(sums: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, add: bool) -> Tensor:
    """Scale a product of int8 matrices back by the largest numbers of its rows and columns, into or onto `out`."""
    size, block = out.shape[1], 1024
    _from_int8[(out.shape[0], triton.cdiv(size, block))](sums, rows, columns, out, size, block, add, num_warps=4)
    return out


@triton.jit
def _from_int8(sums_ptr, row_ptr, column_ptr, out_ptr, SIZE, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    scale = tl.load(row_ptr + row) * tl.load(column_ptr + at, inside, 0.0) * (1.0 / 16129.0)
    y = tl.load(sums_ptr + row * SIZE + at, inside, 0).to(tl.float32) * scale
    if ADD:
        y += tl.load(out_ptr + row * SIZE + at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + at, y.to(out_ptr.dtype.element_ty), inside)
