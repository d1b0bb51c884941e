"""Philox against its published vectors and a big-integer version; noise that belongs to its row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from alpaca_core.engines.noise import gumbel, philox, row_key, uniform

WORDS = st.integers(0, 2**32 - 1)

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def in_torch(counter: list[int], key: list[int], device: str = "cpu") -> list[int]:
    tensors = [torch.tensor([word], device=device) for word in counter + key]
    return [int(word) for word in philox(tensors[:4], tensors[4:])]


def in_integers(counter: list[int], key: list[int]) -> list[int]:
    """Figure 2 of the paper, on Python's integers."""
    left0, right0, left1, right1 = counter
    for turn in range(10):
        keys = [(key[0] + turn * 0x9E3779B9) % 2**32, (key[1] + turn * 0xBB67AE85) % 2**32]
        high0, low0 = divmod(left0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(left1 * 0xCD9E8D57, 2**32)
        left0, right0, left1, right1 = high1 ^ right0 ^ keys[0], low1, high0 ^ right1 ^ keys[1], low0
    return [left0, right0, left1, right1]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter: str, key: str, result: str) -> None:
    assert in_torch(words(counter), words(key)) == words(result)
    assert in_integers(words(counter), words(key)) == words(result)


@settings(max_examples=50, deadline=None)
@given(counter=st.lists(WORDS, min_size=4, max_size=4), key=st.lists(WORDS, min_size=2, max_size=2))
def test_philox_equals_its_definition_on_big_integers(counter: list[int], key: list[int]) -> None:
    assert in_torch(counter, key) == in_integers(counter, key)


def test_number_i_is_word_i_mod_4_of_block_i_div_4() -> None:
    key = row_key(7, [1, 2, 3], 4)
    drawn = uniform(torch.tensor([key]), position=5, size=10)[0].tolist()
    for place, number in enumerate(drawn):
        word = in_integers([place // 4, 5, key[2], key[3]], [key[0], key[1]])[place % 4]
        assert number == (word + 0.5) / 2**32


def test_the_extreme_words_give_neither_zero_nor_one() -> None:
    extremes = (torch.tensor([0, 2**32 - 1]).double() + 0.5) * 2.0**-32
    assert 0.0 < extremes[0] < extremes[1] < 1.0


def test_a_rows_noise_is_the_same_in_any_batch() -> None:
    keys = [row_key(seed, range(seed), seed % 3) for seed in range(6)]
    together = gumbel(torch.tensor(keys), position=3, size=50)
    for place, key in enumerate(keys):
        assert torch.equal(together[place], gumbel(torch.tensor([key]), position=3, size=50)[0])


def test_a_longer_vocabulary_only_adds_noise() -> None:
    keys = torch.tensor([row_key(0, [1], 0)])
    assert torch.equal(uniform(keys, 0, 101)[:, :37], uniform(keys, 0, 37))


def test_seed_prompt_sample_and_position_each_give_other_noise() -> None:
    ways = [
        (0, (1, 2), 0, 0),
        (1, (1, 2), 0, 0),
        (0, (1, 3), 0, 0),
        (0, (1, 2), 1, 0),
        (0, (1, 2), 0, 1),
        (0, (), 0, 0),
    ]
    drawn = {
        tuple(uniform(torch.tensor([row_key(seed, prompt, sample)]), position, 8)[0].tolist())
        for seed, prompt, sample, position in ways
    }
    assert len(drawn) == len(ways)


def test_uniforms_are_uniform_and_gumbels_are_gumbel() -> None:
    keys = torch.tensor([row_key(11, [3], sample) for sample in range(4)])
    assert stats.kstest(uniform(keys, 0, 5000).flatten().numpy(), "uniform").pvalue > 0.001
    assert stats.kstest(gumbel(keys, 1, 5000).flatten().numpy(), "gumbel_r").pvalue > 0.001


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_draws_the_same_numbers() -> None:
    keys = torch.tensor([row_key(0, [1], sample) for sample in range(5)])
    assert torch.equal(uniform(keys.cuda(), 9, 1001).cpu(), uniform(keys, 9, 1001))
