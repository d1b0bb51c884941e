"""The next token of each row: the likeliest, or one drawn by the row's own noise.

Temperature, top-k and top-p are applied in this order and with transformers' definitions
(`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`), but for all rows at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alpaca_core.engines.noise import RowKey, gumbel
from alpaca_core.spec import Sampling

COLDEST = 1e-30
"""Colder is as good as greedy, and would overflow."""
_ALL = 2**31
"""No vocabulary is larger."""
_HEAD = 1024
"""Tokens that top-p ranks first; only where they do not reach the mass, the whole vocabulary is sorted."""


class Warper:
    """Scales scores by the temperature, and sets those of tokens that cannot be drawn to minus infinity.

    Args:
        settings: One for each row of scores, or one for all of them; temperatures are above 0.
        device: Of the scores.
        min_keep: Tokens that top-k and top-p leave at least.
    """

    def __init__(self, settings: Sequence[Sampling], device: torch.device, min_keep: int = 1) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        self._min_keep = min_keep
        self._temperature = column([max(setting.temperature, COLDEST) for setting in settings])
        ranks = [max(min(setting.top_k, _ALL), min_keep) if setting.top_k else 0 for setting in settings]
        self._most = max(ranks)
        self._rank = column(list(ranks)).long()  # 0: unset
        self._nuclear = any(setting.top_p is not None for setting in settings)
        self._mass = column([setting.top_p or torch.inf for setting in settings])

    def __call__(self, scores: Tensor) -> Tensor:
        """Warp `scores` of shape ``(rows, vocab)``; the result is float64."""
        scores = scores.double() / self._temperature
        if self._most:
            scores = self._keep_likeliest(scores)
        return self._keep_nucleus(scores) if self._nuclear else scores

    def _keep_likeliest(self, scores: Tensor) -> Tensor:
        top = scores.topk(min(self._most, scores.shape[-1])).values
        place = (self._rank - 1).clamp(0, top.shape[-1] - 1).expand(len(scores), 1)
        least = top.gather(-1, place).masked_fill(self._rank == 0, -torch.inf)
        return scores.masked_fill(scores < least, -torch.inf)

    def _keep_nucleus(self, scores: Tensor) -> Tensor:
        """Keep the smallest set of likeliest tokens that reaches the mass; of equal ones, the first."""
        total = scores.logsumexp(-1, keepdim=True)
        vocab = scores.shape[-1]
        for width in (min(_HEAD, vocab), vocab):
            ranked = scores.topk(width).values
            shares = (ranked - total).exp()
            kept = shares.cumsum(-1) - shares < self._mass  # the likelier ones alone do not reach it
            kept[:, : self._min_keep] = True
            if not (kept[:, -1:] & self._mass.isfinite()).any():
                break
        least = ranked.masked_fill(~kept, torch.inf).amin(-1, keepdim=True).masked_fill(self._mass.isinf(), -torch.inf)
        equals = scores == least
        allowed = (kept & (ranked == least)).sum(-1, keepdim=True)
        return scores.masked_fill((scores < least) | (equals & (equals.cumsum(-1) > allowed)), -torch.inf)


class Sampler:
    """Chooses the next token of rows without beams.

    Greedy rows cost one argmax; noise is made for the others alone (Gumbel-max).

    Args:
        settings: One for each row.
        keys: Names of the rows' noise.
        device: Of the logits.
    """

    def __init__(self, settings: Sequence[Sampling], keys: Sequence[RowKey], device: torch.device) -> None:
        drawn = [row for row, setting in enumerate(settings) if setting.temperature > 0]
        self._drawn = torch.tensor(drawn, dtype=torch.long, device=device)
        self._keys = torch.tensor([keys[row] for row in drawn], dtype=torch.long, device=device)
        self._warper = Warper([settings[row] for row in drawn], device) if drawn else None

    def __call__(self, logits: Tensor, position: int) -> list[int]:
        """Choose by logits of shape ``(rows, vocab)``, after `position` tokens of response."""
        tokens = logits.argmax(-1)
        if self._warper:
            scores = self._warper(logits[self._drawn])
            tokens[self._drawn] = scores.add_(gumbel(self._keys, position, scores.shape[-1])).argmax(-1)
        chosen: list[int] = tokens.tolist()
        return chosen
