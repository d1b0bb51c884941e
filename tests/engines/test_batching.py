"""Batches, padding, and the cache against transformers' own."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from alpaca_core.engines.batching import Job, batches, growing_cache, pad_left

JOBS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50), st.integers(1, 6)), max_size=30)


@settings(deadline=None)
@given(shapes=JOBS, size=st.integers(1, 10))
def test_every_job_is_in_one_batch_of_its_group_that_is_not_too_large(
    shapes: list[tuple[str, int, int]], size: int
) -> None:
    jobs = [Job(index, *shape) for index, shape in enumerate(shapes)]
    found = list(batches(jobs, size))
    assert sorted(index for batch in found for index in batch) == list(range(len(jobs)))
    for batch in found:
        assert len({jobs[index].group for index in batch}) == 1
        assert len(batch) == 1 or sum(jobs[index].lanes for index in batch) <= size
    for group in "ab":
        lengths = [jobs[index].length for batch in found for index in batch if jobs[index].group == group]
        assert lengths == sorted(lengths, reverse=True)


def test_prompts_are_aligned_at_their_ends_and_padded_with_their_own_tokens() -> None:
    ids, seen, positions = pad_left([[7, 8, 9], [4]], torch.device("cpu"))
    assert ids.tolist() == [[7, 8, 9], [4, 4, 4]]
    assert seen.tolist() == [[True] * 3, [False, False, True]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(added=st.lists(st.integers(1, 5), min_size=1, max_size=12), room=st.integers(0, 7), seed=st.integers(0, 99))
def test_the_growing_cache_holds_what_transformers_cache_holds(added: list[int], room: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = growing_cache(room), DynamicCache()
    lanes = 3
    for tokens in added:
        for layer in range(2):
            keys, values = torch.randn(2, lanes, 2, tokens, 4, generator=generator)
            for mine, other in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
        kept: Any = torch.randint(lanes, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator)
        ours.reorder_cache(kept)
        theirs.reorder_cache(kept)
        lanes = len(kept)
