"""A row's own noise: the same in any batch, at any place in it, and on any device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3) turns a
counter and a key into four random words, with no state to carry along. The key and half of the counter
say whose noise it is: seed, prompt and sample index. The other half says which one: token and position.
torch's own generators cannot do that; their stream depends on the shape of the batch and on the device.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

RowKey = tuple[int, int, int, int]
"""Four 32-bit words that name a row's noise."""


def row_key(seed: int, prompt_ids: Sequence[int], sample_index: int) -> RowKey:
    """Name the noise of one sample of one prompt, by SHA-256.

    Args:
        seed: Of the row's `Sampling`.
        prompt_ids: The prompt's tokens: other prompts get other noise under the same seed.
        sample_index: Counts the samples that are drawn of one prompt.

    Example:
        >>> row_key(0, [1, 2], 0) == row_key(0, [1, 2], 0) != row_key(0, [1, 2], 1)
        True
    """
    prompt = hashlib.sha256(struct.pack(f"<{len(prompt_ids)}I", *prompt_ids)).hexdigest()
    words = struct.unpack("<4I", hashlib.sha256(f"{seed} {sample_index} {prompt}".encode()).digest()[:16])
    return (words[0], words[1], words[2], words[3])


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn four counter words and two key words into four random words.

    Words are 32 bits held in int64. A product of two needs 64 bits unsigned; int64 holds the same bits,
    and the mask after the shift takes off the sign that the shift drags in.

    Args:
        counter: Four tensors of words, of shapes that broadcast.
        key: Two tensors of words, likewise.

    Returns:
        Four tensors of words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((odd >> 32) & _WORD) ^ c1 ^ k0, odd & _WORD
        c2, c3 = ((even >> 32) & _WORD) ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(keys: Tensor, position: int | Tensor, size: int) -> Tensor:
    """Draw numbers between 0 and 1, never 0 and never 1.

    Args:
        keys: Row keys, of shape ``(rows, 4)``, int64.
        position: Tokens that the responses hold so far; one number, or one for each row.
        size: Numbers a row: the vocabulary, once for each of its beams.

    Returns:
        float64 of shape ``(rows, size)``. Number ``i`` of a row depends on its key, `position` and ``i``.
    """
    k0, k1, name0, name1 = keys[:, :, None].unbind(1)  # each (rows, 1)
    block = torch.arange((size + 3) // 4, device=keys.device)
    so_far = position[:, None] if isinstance(position, Tensor) else torch.full_like(k0, position)
    words = philox((block, so_far, name0, name1), (k0, k1))
    return (torch.stack(words, dim=-1).flatten(1)[:, :size].double() + 0.5) * 2.0**-32


def gumbel(keys: Tensor, position: int | Tensor, size: int) -> Tensor:
    """Draw standard Gumbel noise; arguments and shape as in `uniform`.

    Scores plus Gumbel noise are largest at token ``i`` with the softmax probability of ``i``, and their
    largest k are a sample without replacement (Kool et al. 2019, arXiv 1903.06059, section 2.2).
    """
    return uniform(keys, position, size).log_().neg_().log_().neg_()
