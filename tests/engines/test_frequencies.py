"""Pairs of tokens come as often as the definition says, through the whole engine, on a vocabulary of eleven."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from alpaca_core.model import GenerateRow
from alpaca_core.spec import Sampling
from tests.engines.test_sampling import exact

PROMPT = (3, 1, 4, 1, 5)
SAMPLES = 4_000


@pytest.mark.parametrize(
    "setting",
    [
        Sampling(max_new_tokens=2, temperature=1.0),
        Sampling(max_new_tokens=2, temperature=2.0),
        Sampling(max_new_tokens=2, temperature=1.5, top_k=4),
        Sampling(max_new_tokens=2, temperature=1.5, top_p=0.8),
        Sampling(max_new_tokens=2, temperature=1.7, top_k=6, top_p=0.7, seed=2),
    ],
    ids=str,
)
def test_pairs_of_tokens_have_their_exact_frequencies(
    make_network: Callable[..., Any], make_model: Callable[..., Any], setting: Sampling
) -> None:
    network = make_network(11, seed=3, spread=1.0)

    def shares(tokens: tuple[int, ...]) -> Any:
        with torch.no_grad():
            return exact(network(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].double().numpy(), setting)

    first = shares(())
    expected = {(a, b): first[a] * shares((a,))[b] for a, b in product(range(11), repeat=2)}
    model = make_model(network, eos_ids=(), batch_size=250)
    rows = [GenerateRow(PROMPT, setting, sample) for sample in range(SAMPLES)]
    drawn = Counter(completion.token_ids for _, completion in model.generate(rows))
    assert {pair for pair in drawn if expected[pair] == 0} == set()
    common = [pair for pair, share in expected.items() if share * SAMPLES >= 5]
    rest = 1 - sum(expected[pair] for pair in common)
    observed = np.array([*(drawn[pair] for pair in common), SAMPLES - sum(drawn[pair] for pair in common)])
    wanted = np.array([*(expected[pair] for pair in common), rest]) * SAMPLES
    kept = wanted > 1e-9
    assert stats.chisquare(observed[kept], wanted[kept]).pvalue > 0.001
