"""The forward pass between its matrix products, in Triton.

The same functions as in `eager`, on CUDA. Every loop over keys has fixed blocks that start at the row's own
beginning, and what a mask hides is not loaded: so a row's numbers come out the same in any company.
Letters as in `eager`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from alpaca_core.engines.packing import PAGE, TILE, Packed

_SEGMENT = 256
"""Tokens of a row that one program of a decode step reads; longer rows are joined from several."""
_FEW = 512
"""Rows times key heads that do not fill a GPU; their programs read a quarter of a segment."""
_LOG2_E = 1.4426950408889634


@cache
def early(device: torch.device) -> bool:
    """Whether a kernel's programs may be started before the kernel ahead has ended: programmatic dependent launch."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def _await(EARLY: tl.constexpr):
    """Let the kernel behind start, and wait for the end of the one ahead, whose results are read from here on."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    out = torch.empty_like(x)
    width, soon = x.shape[-1], early(x.device)
    _norm[(x.shape[0],)](x, weight, out, eps, width, triton.next_power_of_2(width), soon, num_warps=8, launch_pdl=soon)
    return out


@triton.jit
def _norm(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    _await(EARLY)
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
    out, soon = both.new_empty(both.shape[0], width), early(both.device)
    _silu_mul[(both.shape[0], triton.cdiv(width, 1024))](both, out, width, 1024, soon, num_warps=4, launch_pdl=soon)
    return out


@triton.jit
def _silu_mul(both_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    _await(EARLY)
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
    """Rotate where they stand, store keys and values, and attend from every tile to its context and to itself."""
    packed, cos, sin = plan
    kv, width = keys.shape[2:]
    steps, soon = keys.stride()[:3], early(qkv.device)
    _rotate[(qkv.shape[0], 2)](
        qkv, cos, sin, packed.positions, packed.places, keys, values, *steps, heads, kv, width, PAGE,
        triton.next_power_of_2(heads + kv), triton.next_power_of_2(kv), soon, num_warps=4, launch_pdl=soon,
    )  # fmt: skip
    out = qkv.new_empty(qkv.shape[0], heads * width)  # what is in no tile stays as it is, and in its row
    _read_tiles[(heads, packed.starts.shape[0])](
        qkv, out, keys, values, *steps, packed.places, packed.starts, packed.counts, packed.lanes, packed.contexts,
        packed.sees, packed.table, packed.table.stride(0), width**-0.5 * _LOG2_E, heads, kv, width, TILE, PAGE,
        2 * TILE, soon, num_warps=2, num_stages=2, launch_pdl=soon,
    )  # fmt: skip
    return out


@triton.jit
def _rotate(qkv_ptr, cos_ptr, sin_ptr, position_ptr, place_ptr, keys_ptr, values_ptr, page_step, token_step,
            head_step, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
            BOTH: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One program for a token's queries and keys, which are turned, keys into the cache, and one for its values."""
    _await(EARLY)
    token, half = tl.program_id(0).to(tl.int64), tl.arange(0, D // 2)[None]
    own = qkv_ptr + token * (HEADS + 2 * KV) * D
    place = tl.load(place_ptr + token)
    to = (place // PAGE).to(tl.int64) * page_step + (place % PAGE) * token_step + half
    if tl.program_id(1) == 0:
        head = tl.arange(0, BOTH)[:, None]
        good, key = head < HEADS + KV, (head >= HEADS) & (head < HEADS + KV)
        near = own + head * D + half
        turn = tl.load(position_ptr + token).to(tl.int64) * (D // 2) + half
        cos, sin = tl.load(cos_ptr + turn), tl.load(sin_ptr + turn)
        first, second = tl.load(near, good), tl.load(near + D // 2, good)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
        back = (head < HEADS) | (place < PAGE)  # a key that nobody keeps stays where it stands
        tl.store(near, first, good & back)
        tl.store(near + D // 2, second, good & back)
        stored = keys_ptr + to + (head - HEADS) * head_step
        tl.store(stored, first, key)
        tl.store(stored + D // 2, second, key)
    else:
        value = tl.arange(0, LANES)[:, None]
        there = value < KV
        far = own + (HEADS + KV + value) * D + half
        kept = values_ptr + to + value * head_step
        tl.store(kept, tl.load(far, there), there)
        tl.store(kept + D // 2, tl.load(far + D // 2, there), there)


@triton.jit
def _weigh(score, v, most, total, acc):
    """Take one block of scores and values into a running softmax (online softmax, arXiv 1805.02867)."""
    new = tl.maximum(most, tl.max(score, 1))
    old, p = tl.exp2(most - new), tl.exp2(score - new[:, None])
    return new, total * old + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")


@triton.jit(do_not_specialize=["table_step"])
def _read_tiles(qkv_ptr, out_ptr, keys_ptr, values_ptr, page_step, token_step, head_step, place_ptr, start_ptr,
                count_ptr, lane_ptr, context_ptr, sees_ptr, table_ptr, table_step, scale, HEADS: tl.constexpr,
                KV: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
                EARLY: tl.constexpr):  # fmt: skip
    """One program a head and tile; offsets have 32 bits, which `Llama.most_pages` sees to."""
    _await(EARLY)
    head, tile = tl.program_id(0), tl.program_id(1)  # heads of a token lie beside one another
    kv = head // (HEADS // KV)
    width: tl.constexpr = (HEADS + 2 * KV) * D
    start, count = tl.load(start_ptr + tile), tl.load(count_ptr + tile)
    context, begin = tl.load(context_ptr + tile), tl.load(lane_ptr + tile)
    lane, at = tl.arange(0, LANES), tl.arange(0, D)
    real = (lane >= begin) & (lane < begin + count)
    token = start + lane - begin
    pages = table_ptr + tile * table_step
    place, kept = tl.load(place_ptr + token, real, 0), tl.load(place_ptr + start) >= PAGE
    rows = qkv_ptr + token[:, None] * width
    q = tl.load(rows + head * D + at[None], real[:, None], 0.0)
    most = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, D), tl.float32)
    whole = context // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        page = tl.load(pages + slot // PAGE)
        near = page * page_step + (slot % PAGE) * token_step + kv * head_step
        k = tl.load(keys_ptr + near[None] + at[:, None])
        v = tl.load(values_ptr + near[:, None] + at[None])
        most, total, acc = _weigh(tl.dot(q, k, input_precision="ieee") * scale, v, most, total, acc)
    for first in range(whole, context, LANES):  # what is left, half a block at a time
        slot = first + lane
        seen = slot < context
        page = tl.load(pages + slot // PAGE, seen, 0)
        near = page * page_step + (slot % PAGE) * token_step + kv * head_step
        k = tl.load(keys_ptr + near[None] + at[:, None], seen[None], 0.0)
        v = tl.load(values_ptr + near[:, None] + at[None], seen[:, None], 0.0)
        score = tl.where(seen[None], tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        most, total, acc = _weigh(score, v, most, total, acc)
    if begin == 0:
        if kept:
            near = (place // PAGE) * page_step + (place % PAGE) * token_step + kv * head_step
            k = tl.load(keys_ptr + near[None] + at[:, None], real[None], 0.0)
        else:
            k = tl.load(qkv_ptr + token[None] * width + (HEADS + kv) * D + at[:, None], real[None], 0.0)
        v = tl.load(rows + (HEADS + KV + kv) * D + at[None], real[:, None], 0.0)
    else:  # somebody else has computed the first half
        slot, there = context + lane, lane < begin + count
        page = tl.load(pages + slot // PAGE, there, 0)
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
    segment = _SEGMENT if rows * kv > _FEW else _SEGMENT // 4
    group, parts = heads // kv, triton.cdiv(longest, segment)
    lanes = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    out = qkv.new_empty(rows, heads * width)
    sums = torch.empty(rows, heads, parts, width, device=qkv.device)
    norms = torch.empty(rows, heads, parts, 2, device=qkv.device)
    soon = early(qkv.device)
    _step[(rows, kv, parts)](
        qkv, sums, norms, keys, values, *keys.stride()[:3], cos, sin, lengths, table, table.stride(0),
        width**-0.5 * _LOG2_E, parts, heads, kv, width, PAGE, 2 * TILE, segment, group, lanes, soon, num_warps=2,
        launch_pdl=soon,
    )  # fmt: skip
    _join[(rows, heads)](sums, norms, out, lengths, parts, heads, width, segment, soon, num_warps=1, launch_pdl=soon)
    return out


@triton.jit(do_not_specialize=["PARTS"])
def _step(qkv_ptr, sum_ptr, norm_ptr, keys_ptr, values_ptr, page_step, token_step, head_step, cos_ptr, sin_ptr,
          length_ptr, table_ptr, table_step, scale, PARTS, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
          PAGE: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr,
          LANES: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One program a row, key head and segment of the row; the first one stores the new key and value.

    The number of segments is no constant, and `_join` runs for one segment, too: a kernel that is compiled otherwise
    where all rows are short gave such rows other bits.
    """
    _await(EARLY)
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
def _join(sum_ptr, norm_ptr, out_ptr, length_ptr, PARTS, HEADS: tl.constexpr, D: tl.constexpr, SEGMENT: tl.constexpr,
          EARLY: tl.constexpr):  # fmt: skip
    """Join the segments of one row and head, in their order."""
    _await(EARLY)
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
