"""Beam search against transformers' own, and sampled beams against exact and transformers' frequencies."""

from collections import Counter
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from alpaca_core.engines.beams import Beams
from alpaca_core.engines.noise import gumbel, row_key
from alpaca_core.model import Completion, GenerateRow
from alpaca_core.spec import Sampling


def by_transformers(network: Any, prompts: torch.Tensor, eos: list[int], setting: Sampling) -> list[tuple[int, ...]]:
    """Responses of transformers' beam search, without the token that ended them."""
    warm = {"temperature": setting.temperature, "top_k": setting.top_k or 0, "top_p": setting.top_p or 1.0}
    found = network.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=setting.num_beams,
        early_stopping=False,
        length_penalty=1.0,
        max_new_tokens=setting.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos[0],
        do_sample=setting.temperature > 0,
        **(warm if setting.temperature else {}),
    )
    responses = []
    for tokens in found[:, prompts.shape[1] :].tolist():
        end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens))
        responses.append(tuple(tokens[:end]))
    return responses


@pytest.mark.parametrize(("vocab", "eos"), [(25, [3]), (50, [3, 4, 5, 20]), (7, [0]), (6, [1, 2])])
def test_beam_search_gives_the_responses_of_transformers(
    make_network: Callable[..., Any], make_model: Callable[..., Any], vocab: int, eos: list[int]
) -> None:
    ends = Counter[str]()
    for seed in range(8):
        network = make_network(vocab, seed, spread=1.0 + seed % 4)
        prompts = [(1, 5, 2, 4), (4, 4), (5, 1, 3)]
        settings = [Sampling(num_beams=beams, max_new_tokens=length) for beams, length in [(2, 9), (5, 12), (4, 1)]]
        rows = [GenerateRow(prompt, setting) for prompt in prompts for setting in settings]
        for place, ours in make_model(network, eos_ids=eos).generate(rows):
            row = rows[place]
            (theirs,) = by_transformers(network, torch.tensor([row.prompt_ids]), eos, row.sampling)
            assert ours.token_ids == theirs
            assert (ours.finish_reason == "stop") == (len(theirs) < row.sampling.max_new_tokens)
            ends[ours.finish_reason] += 1
    assert min(ends["stop"], ends["length"]) > 5  # both ways of ending were compared


def exact_two_steps(first: np.ndarray, then: np.ndarray, setting: Sampling, eos: int) -> dict[tuple[int, ...], float]:
    """Every run of two sampled steps with two beams, with its probability.

    Draws are without replacement: four candidates, in proportion to what is left (Plackett-Luce).
    """
    ends: dict[tuple[int, ...], float] = {}

    def draws(scores: list[float], taken: int) -> Any:
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        for order in permutations(range(len(scores)), min(taken, len(scores))):
            left, chance = 1.0, 1.0
            for place in order:
                chance *= weights[place] / left
                left -= weights[place]
            yield chance, order

    for chance, order in draws(list(first), 4):
        ended = [(first[token], (token,)) for token in order[:2] if token == eos]
        live = sorted(((first[token], (token,)) for token in order if token != eos), reverse=True)[:2]
        candidates = [(score + then[path[0]][token], (*path, token)) for score, path in live for token in range(4)]
        for more, second in draws([score for score, _ in candidates], 2):
            finals = ended + [(candidates[place][0] / 2, candidates[place][1]) for place in second]
            best = max(finals)[1]
            ends[best] = ends.get(best, 0.0) + chance * more
    return ends


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_beams_have_the_exact_distribution_of_two_steps(temperature: float) -> None:
    random = np.random.default_rng(3)
    logits = torch.tensor(random.normal(size=(5, 4))).float()  # row 4 follows the prompt
    setting = Sampling(temperature=temperature, num_beams=2, max_new_tokens=2)
    scores = (logits.double().log_softmax(-1) / temperature).numpy()
    expected = exact_two_steps(scores[4], scores, setting, eos=0)
    counts = Counter[tuple[int, ...]]()
    samples = 3000
    keys = torch.tensor([row_key(0, [1], sample) for sample in range(samples)])
    for first, then in zip(gumbel(keys, 0, 4), gumbel(keys, 1, 8), strict=True):
        beams = Beams(setting, [0], torch.device("cpu"))
        beams.advance(logits[4:], first)
        if not beams.done:
            beams.advance(logits[beams.tails], then)
        counts[beams.tokens] += 1
    assert set(counts) <= set(expected)
    ways = sorted(expected)
    observed = np.array([counts[way] for way in ways])
    assert stats.chisquare(observed, np.array([expected[way] for way in ways]) * samples).pvalue > 0.001


@pytest.mark.parametrize(
    "setting",
    [
        Sampling(temperature=1.3, num_beams=2, max_new_tokens=4),
        Sampling(temperature=0.8, num_beams=3, top_k=5, top_p=0.9, max_new_tokens=4),
    ],
    ids=str,
)
def test_sampled_beams_respond_as_often_as_those_of_transformers(
    make_network: Callable[..., Any], make_model: Callable[..., Any], setting: Sampling
) -> None:
    network = make_network(9, seed=9, spread=2.0)
    model = make_model(network, eos_ids=[2], batch_size=300)
    samples = 500
    rows = [GenerateRow((1, 5), setting, sample_index=sample) for sample in range(samples)]
    ours = Counter(outcome.token_ids for _, outcome in model.generate(rows) if isinstance(outcome, Completion))
    torch.manual_seed(0)
    theirs = Counter(by_transformers(network, torch.tensor([[1, 5]] * samples), [2], setting))
    ways = [way for way in ours | theirs if ours[way] + theirs[way] >= 20]
    table = [[counts[way] for way in ways] for counts in (ours, theirs)]
    rest = [samples - sum(row) for row in table]
    assert len(ways) > 3
    assert stats.chi2_contingency([[*row, other] for row, other in zip(table, rest, strict=True)]).pvalue > 0.001
