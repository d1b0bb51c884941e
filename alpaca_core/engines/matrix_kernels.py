"""Matrix products and their rounding in Triton, where torch has none as fast, or none that leaves a row its bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from alpaca_core.engines.kernels import early

_LEAST_MANY = 2048, 768
"""Rows, and tiles of 128 rows and 256 numbers, from which `many_rows` is faster than cuBLAS on Hopper."""


def one_row(
    x: Tensor, weight: Tensor, *, add_to: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
    gated: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply one row by a matrix as fast as the matrix can be read.

    Args:
        x: ``(1, in)``.
        weight: ``(out, in)``.
        add_to: What the product is added to; written.
        norm: Weight of an RMSNorm that comes before the product, whose scale is applied after it.
        eps: Of that norm.
        gated: Give SiLU of the product's first half, times the second half.
    """
    size, inner = weight.shape
    size = size // 2 if gated else size
    out = x.new_empty(1, size) if add_to is None else add_to
    block = min(4096, triton.next_power_of_2(inner))
    rows = min(16, 32768 // block) // (2 if gated or inner > block else 1)  # the best of 20 at LLaMA-7B's, one H200
    soon = early(x.device)
    _one_row[(triton.cdiv(size, rows),)](
        x, norm, weight, out, eps, size, inner, rows, block, add_to is not None, norm is not None, gated, soon,
        num_warps=8, launch_pdl=soon,
    )  # fmt: skip
    return out


@triton.jit
def _one_row(x_ptr, norm_ptr, weight_ptr, out_ptr, eps, SIZE, INNER: tl.constexpr, ROWS: tl.constexpr,
             BLOCK: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
             EARLY: tl.constexpr):  # fmt: skip
    """One program for some numbers of the product; what it needs first of the matrix is on its way while it waits."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    good = (row < SIZE)[:, None]
    at = tl.arange(0, BLOCK)
    near = weight_ptr + row[:, None].to(tl.int64) * INNER + at[None]
    far = near + SIZE.to(tl.int64) * INNER
    weight = tl.load(near, good & (at < INNER)[None], 0.0, eviction_policy="evict_first")
    if GATED:
        other = tl.load(far, good & (at < INNER)[None], 0.0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    others = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in tl.static_range(0, INNER, BLOCK):
        inside = first + at < INNER
        x = tl.load(x_ptr + first + at, inside, 0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + first + at, inside, 0.0).to(tl.float32)
        sums += weight.to(tl.float32) * x[None]
        if GATED:
            others += other.to(tl.float32) * x[None]
        if first + BLOCK < INNER:
            there = good & (first + BLOCK + at < INNER)[None]
            weight = tl.load(near + first + BLOCK, there, 0.0, eviction_policy="evict_first")
            if GATED:
                other = tl.load(far + first + BLOCK, there, 0.0, eviction_policy="evict_first")
    y = tl.sum(sums, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / INNER + eps)
        y *= scale
    if GATED:
        y = y * tl.sigmoid(y) * (tl.sum(others, 1) * scale)
    if ADD:
        y += tl.load(out_ptr + row, row < SIZE, 0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), row < SIZE)


def takes_many(x: Tensor, weight: Tensor) -> bool:
    """Whether `many_rows` is for this input: on Hopper, numbers of 16 bits in rows of whole 16 bytes."""
    rows, (size, inner) = len(x), weight.shape
    return (
        rows >= _LEAST_MANY[0]
        and triton.cdiv(rows, 128) * triton.cdiv(size, 256) >= _LEAST_MANY[1]
        and x.dtype == weight.dtype
        and x.element_size() == 2
        and inner % 8 == size % 16 == x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and x.is_contiguous()
        and weight.is_contiguous()
        and early(x.device)
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def many_rows(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """Multiply many rows by a matrix, faster than cuBLAS where power is the limit.

    A row's sums are the same among any number of rows; on an H100 they were those of cuBLAS.

    Args:
        x: ``(N, in)``, one that `takes_many` accepts.
        weight: ``(out, in)``.
        gated: Give SiLU of the product's first half, times the second half, each rounded as if it were a tensor.
    """
    (rows, inner), size = x.shape, len(weight) // (2 if gated else 1)
    out = x.new_empty(rows, size)
    high, half, deep, wide = 128, 128, 64, 128 if gated else 256
    shape, block = ((2, size, inner), [2, half, deep]) if gated else ((size, inner), [2 * half, deep])
    matrix = TensorDescriptor.from_tensor(weight.view(shape), block)
    tiles = triton.cdiv(rows, high) * triton.cdiv(size, wide)
    programs = min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    _many_rows[(programs,)](
        TensorDescriptor.from_tensor(x, [high, deep]), matrix, TensorDescriptor.from_tensor(out, [high, half]),
        rows, size, inner, programs, high, half, deep, gated, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _many_rows(x, matrix, out, ROWS, SIZE, INNER, PROGRAMS: tl.constexpr, HIGH: tl.constexpr, HALF: tl.constexpr,
               DEEP: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """One program a processor, for one tile after another; sixteen below each other read the same weights."""
    wide: tl.constexpr = HALF if GATED else 2 * HALF
    down, group = tl.cdiv(ROWS, HIGH), 16 * tl.cdiv(SIZE, wide)
    for tile in tl.range(tl.program_id(0), down * tl.cdiv(SIZE, wide), PROGRAMS, flatten=True):
        first = tile // group * 16
        below = tl.minimum(down - first, 16)
        row, column = (first + tile % below) * HIGH, tile % group // below * wide
        sums = tl.zeros((HIGH, 2 * HALF), tl.float32)
        for at in range(0, INNER, DEEP):
            weight = matrix.load([0, column, at]).reshape(2 * HALF, DEEP) if GATED else matrix.load([column, at])
            sums = tl.dot(x.load([row, at]), weight.T, sums)
        one, other = sums.reshape(HIGH, 2, HALF).permute(0, 2, 1).split()
        if GATED:
            gate = one.to(out.dtype).to(tl.float32)
            out.store([row, column], (gate * tl.sigmoid(gate)).to(out.dtype) * other.to(out.dtype))
        else:
            out.store([row, column], one.to(out.dtype))
            out.store([row, column + HALF], other.to(out.dtype))


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
