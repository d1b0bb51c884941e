"""Warping against transformers' own, and drawn frequencies against the exact distribution."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from alpaca_core.engines import sampling
from alpaca_core.engines.noise import row_key
from alpaca_core.engines.sampling import Sampler, Warper
from alpaca_core.spec import Sampling

CPU = torch.device("cpu")
WARM = st.builds(
    Sampling,
    temperature=st.floats(0.1, 4.0),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 0.95),
)


def warped_by_transformers(scores: torch.Tensor, setting: Sampling, min_keep: int) -> torch.Tensor:
    unused = torch.empty(0)
    scores = TemperatureLogitsWarper(setting.temperature)(unused, scores)
    if setting.top_k:
        scores = TopKLogitsWarper(setting.top_k, min_tokens_to_keep=min_keep)(unused, scores)
    if setting.top_p:
        scores = TopPLogitsWarper(setting.top_p, min_tokens_to_keep=min_keep)(unused, scores)
    return scores


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(WARM, min_size=1, max_size=4),
    seed=st.integers(0, 999),
    min_keep=st.integers(1, 3),
    head=st.sampled_from([4, 1024]),
)
def test_rows_with_settings_of_their_own_are_warped_as_by_transformers(
    rows: list[Sampling], seed: int, min_keep: int, head: int
) -> None:
    scores = torch.randn(len(rows), 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_HEAD", head)
        ours = Warper(rows, CPU, min_keep)(scores)
    for row, setting in enumerate(rows):
        theirs = warped_by_transformers(scores[row : row + 1], setting, min_keep)[0]
        torch.testing.assert_close(ours[row], theirs)


def test_equal_scores_that_straddle_the_mass_are_cut_to_the_smallest_set() -> None:
    kept = Warper([Sampling(temperature=1.0, top_p=0.45)], CPU)(torch.zeros(1, 10))
    assert kept.isfinite()[0].tolist() == [True] * 5 + [False] * 5


def test_equal_scores_at_the_last_rank_are_all_kept_as_by_transformers() -> None:
    setting = Sampling(temperature=1.0, top_k=2)
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert Warper([setting], CPU)(scores).isfinite()[0].tolist() == [True, True, True, False]
    assert warped_by_transformers(scores, setting, 1).isfinite()[0].tolist() == [True, True, True, False]


def test_a_top_k_beyond_the_vocabulary_keeps_it_all() -> None:
    kept = Warper([Sampling(temperature=1.0, top_k=10**400), Sampling(temperature=1.0, top_k=3)], CPU)(
        torch.arange(8.0).expand(2, -1)
    )
    assert kept.isfinite().sum(-1).tolist() == [8, 3]


@pytest.mark.parametrize("temperature", [1e-300, 1e-20, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 1.001, -5.0]] * 20)
    settings = [Sampling(temperature=temperature, seed=seed) for seed in range(20)]
    keys = [row_key(seed, [1], 0) for seed in range(20)]
    assert Sampler(settings, keys, CPU)(logits, 0) == [1] * 20


def exact(logits: Any, setting: Sampling) -> Any:
    """The distribution by its definition: scale, cut to k, cut to p, share."""
    shares = np.exp(logits / setting.temperature)
    order = np.argsort(-shares)
    if setting.top_k:
        shares[order[setting.top_k :]] = 0.0
    shares /= shares.sum()
    if setting.top_p:
        needed = 1 + int(np.searchsorted(np.cumsum(shares[order]), setting.top_p))
        shares[order[needed:]] = 0.0
    return shares / shares.sum()


@pytest.mark.parametrize(
    "setting",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.5),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.7, top_k=7, top_p=0.6),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_exact_frequencies(setting: Sampling) -> None:
    draws = 20_000
    logits = np.random.default_rng(5).normal(size=11) * 1.5
    keys = [row_key(setting.seed, [1, 2], sample) for sample in range(draws)]
    drawn = Sampler([setting] * draws, keys, CPU)(torch.tensor(logits).float().expand(draws, -1), position=3)
    counts, expected = np.bincount(drawn, minlength=11), exact(logits, setting) * draws
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 0.001


def test_greedy_rows_in_a_mixed_batch_take_the_likeliest() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    settings = [Sampling(temperature=row % 2 * 3.0) for row in range(6)]
    chosen = Sampler(settings, [row_key(0, [row], 0) for row in range(6)], CPU)(logits, 0)
    assert chosen[::2] == logits.argmax(-1)[::2].tolist()
    assert chosen[1::2] != logits.argmax(-1)[1::2].tolist()
