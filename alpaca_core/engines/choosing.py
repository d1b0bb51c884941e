"""The next token of many rows, each with its own settings and at its own length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from alpaca_core.engines.noise import RowKey, gumbel
from alpaca_core.engines.sampling import COLDEST, Warper
from alpaca_core.spec import Sampling

_PLAIN = Sampling(temperature=1.0)
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Choice:
    """How one row chooses: its settings, and the name of its noise."""

    sampling: Sampling
    key: RowKey

    @property
    def cut(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.sampling.top_k is not None or self.sampling.top_p is not None


def choose(logits: Tensor, choices: Sequence[Choice | None], counts: Sequence[int]) -> Tensor:
    """Choose a token of each row.

    Args:
        logits: ``(rows, vocab)`` float32.
        choices: One for each row; None where nobody will look.
        counts: Tokens of each response so far.

    Returns:
        Tokens ``(rows,)``; -1 where a row's logits are not finite.
    """
    if logits.device.type == "cuda":
        return torch.where(logits.isfinite().all(-1), _on_gpu(logits, choices, counts), -1)
    finite = logits.mul(0).sum(-1) == 0  # NaN where not; a tenth of the time of `isfinite`
    return torch.where(finite, _on_cpu(logits, choices, counts), -1)


def _on_cpu(logits: Tensor, choices: Sequence[Choice | None], counts: Sequence[int]) -> Tensor:
    """Noise is dear here, so it is made for the rows alone that need it."""
    tokens = _first_most(logits)
    drawn = [place for place, choice in enumerate(choices) if choice and choice.sampling.temperature > 0]
    if drawn:
        mine = [choice for choice in (choices[place] for place in drawn) if choice]
        warper = Warper([choice.sampling for choice in mine], logits.device)
        keys = torch.tensor([choice.key for choice in mine])
        noise = gumbel(keys, torch.tensor([counts[place] for place in drawn]), logits.shape[-1])
        tokens[drawn] = warper(logits[drawn]).add_(noise).argmax(-1)
    return tokens


def _first_most(logits: Tensor) -> Tensor:
    """What `argmax` finds, in a sixth of the time: the block with the most is looked for first."""
    rows, vocab = logits.shape
    wide = pad(logits, (0, -vocab % _BLOCK), value=-torch.inf) if vocab % _BLOCK else logits
    blocks = wide.view(rows, -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    return block * _BLOCK + blocks[torch.arange(rows), block].argmax(-1)


def _on_gpu(logits: Tensor, choices: Sequence[Choice | None], counts: Sequence[int]) -> Tensor:
    from alpaca_core.engines.choice_kernels import cut, draw

    def tensor(values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)

    settings = [choice.sampling if choice else _PLAIN for choice in choices]
    temperatures = tensor([setting.temperature for setting in settings], torch.float64)
    if any(choice and choice.cut for choice in choices):
        ranks = tensor([min(setting.top_k or 0, logits.shape[1]) for setting in settings], torch.long)
        masses = tensor([torch.inf if setting.top_p is None else setting.top_p for setting in settings], torch.float64)
        logits = cut(logits, temperatures.clamp(min=COLDEST), ranks, masses)
    keys = tensor([choice.key if choice else (0, 0, 0, 0) for choice in choices], torch.long)
    return draw(logits, keys, tensor(counts, torch.long), temperatures)
