"""The next token of many rows, each with its own settings and at its own length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca_core.engines.noise import RowKey, gumbel
from alpaca_core.engines.sampling import Warper
from alpaca_core.spec import Sampling

_PLAIN = Sampling(temperature=1.0)


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
    chosen = (_on_gpu if logits.device.type == "cuda" else _on_cpu)(logits, choices, counts)
    return torch.where(logits.isfinite().all(-1), chosen, -1)


def _on_cpu(logits: Tensor, choices: Sequence[Choice | None], counts: Sequence[int]) -> Tensor:
    """Noise is dear here, so it is made for the rows alone that need it."""
    tokens = logits.argmax(-1)
    drawn = [place for place, choice in enumerate(choices) if choice and choice.sampling.temperature > 0]
    if drawn:
        mine = [choice for choice in (choices[place] for place in drawn) if choice]
        warper = Warper([choice.sampling for choice in mine], logits.device)
        keys = torch.tensor([choice.key for choice in mine])
        noise = gumbel(keys, torch.tensor([counts[place] for place in drawn]), logits.shape[-1])
        tokens[drawn] = warper(logits[drawn]).add_(noise).argmax(-1)
    return tokens


def _on_gpu(logits: Tensor, choices: Sequence[Choice | None], counts: Sequence[int]) -> Tensor:
    """All rows are warped where one is: other numbers of rows would be summed in another order."""
    from alpaca_core.engines.kernels import draw

    settings = [choice.sampling if choice else _PLAIN for choice in choices]
    if any(choice and choice.cut for choice in choices):
        cuts = [choice.sampling if choice and choice.cut else _PLAIN for choice in choices]
        logits = logits.masked_fill(Warper(cuts, logits.device)(logits) == -torch.inf, -torch.inf)
    keys = torch.tensor([choice.key if choice else (0, 0, 0, 0) for choice in choices])
    temperatures = torch.tensor([setting.temperature for setting in settings], dtype=torch.float64)
    so_far = torch.tensor(counts)
    keys, temperatures, so_far = (each.to(logits.device, non_blocking=True) for each in (keys, temperatures, so_far))
    return draw(logits, keys, so_far, temperatures)
