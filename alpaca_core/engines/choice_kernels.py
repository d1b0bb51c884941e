"""The choice of tokens, in Triton: what cannot be drawn, and what is.

A row is cut by one program, in blocks that begin at its first token, so its numbers are the same in any company.
Nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def cut(logits: Tensor, temperatures: Tensor, ranks: Tensor, masses: Tensor) -> Tensor:
    """Set the logits of tokens that top-k and top-p leave out to minus infinity, as `sampling.Warper` does.

    The last token that is kept is found by halving the range of its logit, which as a whole number takes 32 sums.

    Args:
        logits: ``(N, vocab)`` float32.
        temperatures: ``(N,)`` float64, above 0.
        ranks: top-k of each row, ``(N,)`` int64; 0 where it has none.
        masses: top-p of each row, ``(N,)`` float64; infinity where it has none.
    """
    out = torch.empty_like(logits)
    _cut[(len(logits),)](logits, out, temperatures, ranks, masses, logits.shape[1], 4096, num_warps=8)
    return out


@triton.jit
def _ordered(x):
    """Turn float32 numbers into whole ones of the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # no -0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _weight(base, first, floor, top, temperature, VOCAB, BLOCK: tl.constexpr):
    """What a block's tokens weigh whose logits are above `floor`; the likeliest weighs 1."""
    at = first + tl.arange(0, BLOCK)
    x = tl.load(base + at, at < VOCAB, float("-inf"))
    heavy = (at < VOCAB) & (_ordered(x) > floor)
    return tl.where(heavy, tl.exp((x.to(tl.float64) - top) / temperature), 0.0)


@triton.jit
def _cut(logits_ptr, out_ptr, temperature_ptr, rank_ptr, mass_ptr, VOCAB, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * VOCAB
    temperature, rank, mass = tl.load(temperature_ptr + row), tl.load(rank_ptr + row), tl.load(mass_ptr + row)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, VOCAB, BLOCK):
        best = tl.maximum(best, tl.load(base + first + lane, first + lane < VOCAB, float("-inf")))
    most = tl.max(best, 0)
    top = most.to(tl.float64)
    highest = _ordered(most)
    # top-k: the largest number that at least `rank` logits reach
    least = highest * 0 - 2147483648
    if (rank > 0) & (rank < VOCAB):
        above = highest
        while least < above:
            middle = (least + above + 1) >> 1
            count = tl.zeros((BLOCK,), tl.int64)
            for first in range(0, VOCAB, BLOCK):
                x = tl.load(base + first + lane, first + lane < VOCAB, float("-inf"))
                count += ((first + lane < VOCAB) & (_ordered(x) >= middle)).to(tl.int64)
            if tl.sum(count, 0) >= rank:
                least = middle
            else:
                above = middle - 1
    # top-p: the smallest number above which the others of these do not weigh as much as is asked for
    allowed = highest * 0 + VOCAB
    if mass < float("inf"):
        sums = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, VOCAB, BLOCK):
            sums += _weight(base, first, least - 1, top, temperature, VOCAB, BLOCK)
        wanted = tl.sum(sums, 0) * mass
        above = highest
        while least < above:
            middle = (least + above) >> 1
            sums = tl.zeros((BLOCK,), tl.float64)
            for first in range(0, VOCAB, BLOCK):
                sums += _weight(base, first, middle, top, temperature, VOCAB, BLOCK)
            if tl.sum(sums, 0) < wanted:
                above = middle
            else:
                least = middle + 1
        sums = tl.zeros((BLOCK,), tl.float64)
        equal = tl.full((BLOCK,), float("-inf"), tl.float32)
        for first in range(0, VOCAB, BLOCK):
            sums += _weight(base, first, least, top, temperature, VOCAB, BLOCK)
            x = tl.load(base + first + lane, first + lane < VOCAB, float("-inf"))
            equal = tl.maximum(equal, tl.where(_ordered(x) == least, x, float("-inf")))
        each = tl.exp((tl.max(equal, 0).to(tl.float64) - top) / temperature)
        count = tl.ceil((wanted - tl.sum(sums, 0)) / each)
        allowed = tl.maximum(tl.minimum(count, allowed.to(tl.float64)).to(tl.int64), 1)
    seen = highest * 0  # tokens that equal the last one that is kept, so far
    for first in range(0, VOCAB, BLOCK):
        inside = first + lane < VOCAB
        x = tl.load(base + first + lane, inside, float("-inf"))
        number = _ordered(x)
        last = ((number == least) & inside).to(tl.int64)
        keep = (number > least) | ((last > 0) & (seen + tl.cumsum(last, 0) <= allowed))
        tl.store(out_ptr + row * VOCAB + first + lane, tl.where(keep, x, float("-inf")), inside)
        seen += tl.sum(last, 0)


def draw(logits: Tensor, keys: Tensor, counts: Tensor, temperatures: Tensor) -> Tensor:
    """Choose a token of each row: the likeliest, or by the row's own Gumbel noise, as `noise.gumbel` has it.

    Args:
        logits: ``(N, vocab)`` float32; minus infinity is never chosen.
        keys: Row keys, ``(N, 4)``.
        counts: Tokens of each response so far.
        temperatures: float64; 0 is greedy.

    Returns:
        Tokens, ``(N,)``.
    """
    rows, vocab = logits.shape
    block = 2048
    parts = triton.cdiv(vocab, block)
    best = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
    which = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    _draw[(rows, parts)](logits, best, which, keys, counts, temperatures, vocab, parts, block, num_warps=4)
    return which.gather(1, best.argmax(1, keepdim=True))[:, 0]


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _draw(logits_ptr, best_ptr, which_ptr, key_ptr, count_ptr, temperature_ptr, VOCAB, PARTS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """The best token of one part of the vocabulary."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, word = part * (BLOCK // 4) + tl.arange(0, BLOCK // 4), tl.arange(0, 4)[None]
    token = block[:, None] * 4 + word
    score = tl.load(logits_ptr + row * VOCAB + token, token < VOCAB, float("-inf")).to(tl.float64)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        key = key_ptr + row * 4
        zero = tl.zeros((BLOCK // 4,), tl.uint32)
        w0, w1, w2, w3 = _philox(
            block.to(tl.uint32), zero + tl.load(count_ptr + row).to(tl.uint32),
            zero + tl.load(key + 2).to(tl.uint32), zero + tl.load(key + 3).to(tl.uint32),
            zero + tl.load(key).to(tl.uint32), zero + tl.load(key + 1).to(tl.uint32),
        )  # fmt: skip
        late = tl.where(word == 2, w2[:, None], w3[:, None])
        words = tl.where(word == 0, w0[:, None], tl.where(word == 1, w1[:, None], late))
        uniform = (words.to(tl.float64) + 0.5) * 2.0**-32
        score = score / temperature - tl.log(-tl.log(uniform))
    score = tl.where(token < VOCAB, score, float("-inf"))
    best = tl.max(tl.max(score, 1), 0)
    tl.store(best_ptr + row * PARTS + part, best)
    tl.store(which_ptr + row * PARTS + part, tl.min(tl.min(tl.where(score == best, token, VOCAB - 1), 1), 0))
