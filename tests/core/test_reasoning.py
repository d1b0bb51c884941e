"""The final answer in a conclusion."""

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
