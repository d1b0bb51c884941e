"""What is said of a row that does not fit: advice that helps where it is followed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core.errors import RowRejected
from alpaca_core.model import check_fits
from alpaca_core.testing import FakeModel

INFO = FakeModel("", context_length=100).info


@given(st.integers(1, 300), st.integers(1, 300))
def test_each_piece_of_advice_makes_a_row_fit_by_itself(prompt: int, new: int) -> None:
    if prompt + new <= 100:
        check_fits(prompt, new, INFO)
        return
    with pytest.raises(RowRejected) as rejected:
        check_fits(prompt, new, INFO)
    remedy = str(rejected.value).partition("reads 100. ")[2]
    if by := re.search(r"Shorten the prompt by (\d+) tokens", remedy):
        assert prompt - int(by[1]) >= 1
        assert prompt - int(by[1]) + new == 100
    if to := re.search(r"Lower max_new_tokens to (\d+)", remedy):
        check_fits(prompt, int(to[1]), INFO)
        assert prompt + int(to[1]) == 100
    if "or lower max_new_tokens" in remedy:
        check_fits(prompt, 1, INFO)
    if by is None and to is None:  # neither is enough
        assert remedy == "Shorten the prompt, and lower max_new_tokens."
        assert min(prompt, new) >= 100


def test_a_short_prompt_is_not_to_be_shortened() -> None:
    with pytest.raises(RowRejected, match=r"reads 100. Lower max_new_tokens to 69\.$"):
        check_fits(31, 9000, INFO)
