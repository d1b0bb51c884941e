"""The final answer in a conclusion."""

import time

import pytest

from alpaca_core import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("10", "10"),
        ("10.", "10"),
        ("Albert", "Albert"),
        ("The answer is 10 pierogi.", "10 pierogi"),
        ("The final answer is: **42**.", "42"),
        ("First the answer is 3. No, the answer is 4.", "4"),
        ("5 + 5 = 10\n#### 10", "10"),
        ("So it is \\boxed{3.5}.", "3.5"),
        ("Thus \\boxed{\\frac{1}{2}}, as said.", "\\frac{1}{2}"),
        ("Thus \\boxed{ 7", "7"),
        ("The answer is {a, b}.", "{a, b}"),
        ("The answer is Dr. Smith. He signed it.", "Dr. Smith"),
        ("The answer is B. Because of C.", "B"),
        ("The answer is 3.14.", "3.14"),
        ("It is 4. The answer is", "4"),
        ("The answer is 9. So much for the answer:", "9"),
        ("Answer: Paris, the capital.", "Paris, the capital"),
        ("Monika has 1,250 pierogi in the two cans that she bought.", "1,250"),
        ("They have 2 cans, and each of these holds 5 of the pierogi.", None),
        ("There are many ways in which one might look at it.", None),
        ("", None),
        ("   ", None),
    ],
)
def test_the_final_answer_is_found_where_there_is_one(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", ["answer is" + " " * 200_000, "answer " * 30_000, "\\boxed{" * 30_000], ids=len)
def test_a_long_text_takes_no_longer_than_its_length(text: str) -> None:
    started = time.perf_counter()
    final_answer(text)
    assert time.perf_counter() - started < 2
