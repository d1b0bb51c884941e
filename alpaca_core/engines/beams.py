"""Beam search over one row, greedy or sampled.

The results are those of transformers' ``generate(num_beams=k, early_stopping=False, length_penalty=1.0)``
(`GenerationMixin._beam_search`): hypotheses are ranked by log-probability per token, the ending one
counted; a search stops when its best live beam is no better than the worst of k ended ones.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from alpaca_core.engines.sampling import Warper
from alpaca_core.spec import Sampling


class Beams:
    """The live beams of one row, and the best hypotheses that have ended.

    Beams that cannot exist are left out: the first step has one, and a tiny vocabulary may yield
    fewer than `num_beams` later.

    Args:
        sampling: The row's settings. With a temperature above 0, candidates are drawn without
            replacement by Gumbel-top-k, where greedy search takes the best.
        eos_ids: Tokens that end a hypothesis.
        device: Of the logits.

    Attributes:
        parents: For each live beam, which of the beams before it continues.
        tails: For each live beam, its last token.
        done: Whether the search is over; then `tokens` is the best hypothesis.
        sampled: Whether steps need noise.
    """

    def __init__(self, sampling: Sampling, eos_ids: Collection[int], device: torch.device) -> None:
        self.parents: list[int] = [0]
        self.tails: list[int] = []
        self.done = False
        self._sampling = sampling
        self._eos_ids = frozenset(eos_ids)
        # Each beam offers its ending tokens and one more at least, so that a beam lives on.
        self._offers = 1 + max(1, len(self._eos_ids))
        self.sampled = sampling.temperature > 0
        self._warper = Warper([sampling], device, min_keep=self._offers) if self.sampled else None
        self._live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        self._ended: list[tuple[float, tuple[int, ...]]] = []

    @property
    def tokens(self) -> tuple[int, ...]:
        """The best hypothesis that has ended."""
        return self._ended[0][1]

    def advance(self, logits: Tensor, noise: Tensor | None) -> None:
        """Take one step, by logits of shape ``(beams, vocab)`` after each live beam.

        With `noise`, standard Gumbel, one number for each of the logits in their order, it is sampled. After an
        error nothing has changed.
        """
        width, length = self._sampling.num_beams, len(self._live[0][1]) + 1
        candidates = self._candidates(logits, noise)
        live = []
        for rank, (score, beam, token) in enumerate(candidates):
            path = (*self._live[beam][1], token)
            if token in self._eos_ids or length == self._sampling.max_new_tokens:
                if rank < width:
                    self._ended.append((score / length, path))
            else:
                live.append((score, path, beam))
        live = sorted(live, key=lambda hypothesis: -hypothesis[0])[:width]
        self._live = [(score, path) for score, path, _ in live]
        self.parents = [beam for _, _, beam in live]
        self.tails = [path[-1] for _, path, _ in live]
        self._ended = sorted(self._ended, key=lambda hypothesis: -hypothesis[0])[:width]
        full = len(self._ended) == width
        self.done = not live or (full and live[0][0] / length <= self._ended[-1][0])

    def _candidates(self, logits: Tensor, noise: Tensor | None) -> list[tuple[float, int, int]]:
        """Score, beam and token of the candidates, in the order in which they are taken."""
        scores = logits.log_softmax(-1)
        if self._warper:
            scores = self._warper(scores)
        before = torch.tensor([score for score, _ in self._live], dtype=scores.dtype, device=scores.device)
        scores = (scores + before[:, None]).flatten()  # (beams * vocab,)
        order = scores if noise is None else scores + noise[: len(scores)]
        taken = order.topk(min(self._offers * self._sampling.num_beams, len(scores))).indices
        pairs = zip(scores[taken].tolist(), taken.tolist(), strict=True)
        return [(score, *divmod(place, logits.shape[-1])) for score, place in pairs if score > -torch.inf]
