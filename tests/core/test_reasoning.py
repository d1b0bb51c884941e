"""The final answer in a conclusion."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core import Sampling, conclude, final_answer
from alpaca_core.reasoning import _ends
from alpaca_core.testing import FakeModel


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
        ("1. To answer the question, think", None),
        ("1) We add them together. 2) We are done with it.", None),
        ("Step 1: we add the cans together first", None),
        ("**Step 2:** now the cans are added, as in step 1", None),
        ("Step 1: we add the cans, which makes 10 in all", "10"),
        ("1. Paris", "Paris"),
        ("Step 3.", "Step 3"),
        ("Step 3:", None),
        ("10) 12", "12"),
        ("Answer:", None),
        ("The answer is", None),
        ("The answer is U.S. Steel.", "U.S. Steel"),
        ("The answer is the U.S. It has 50 states.", "the U.S."),
        ("The answer is the U.S.", "the U.S."),
        ("The answer is e.g. an apple", "e.g. an apple"),
        ("The answer is J. K. Rowling. She wrote it.", "J. K. Rowling"),
        ("The answer is George W. Bush.", "George W. Bush"),
        ("The answer is Apple Inc. It makes them.", "Apple Inc"),
        ("The answer is 10. the cans are shared.", "10"),
        ("The answer is 5 p.m. on Friday! So be there.", "5 p.m. on Friday"),
        ("The answer is Vitamin C. This is known.", "Vitamin C"),
    ],
)
def test_the_final_answer_is_found_where_there_is_one(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 10 pierogi. Since the ca", "10 pierogi"),
        ("#### 10", "10"),
        ("Monika has 10 of the pierogi. They are hers, since the", "10"),
        ("It is Paris. It has been the capital of Fra", "It is Paris"),
        ("Monika has the two cans, each of which holds 5", None),
        ("Each of the 2 cans holds 5 pierogi. So there are 5 + 5 =", None),
        ("There are 2 cans", None),
        ("1. To answer the question, think about", None),
        ("1.", None),
        ("These are the steps:\n1. We add the cans.\n2.", None),
        ("1. We add 10 pierogi to the others there.\n2. We are", "10"),
        ("They are shared by both of them, and it costs 10.", "10"),
        ("The man that Mr. Smith of U.S. Steel saw 5 times", None),
        ("", None),
    ],
)
def test_of_a_text_that_was_cut_whole_sentences_alone_can_answer_unasked(text: str, answer: str | None) -> None:
    assert final_answer(text, cut=True) == answer


def test_a_conclusion_knows_that_it_was_cut() -> None:
    fake = FakeModel("Monika has the pierogi of 2 cans, which makes 10 in all.")
    for tokens, answer in ((32, None), (100, None)):
        assert conclude(fake, ["How many?"], sampling=Sampling(max_new_tokens=tokens))[0].final_answer == answer
    fake = FakeModel("There are 10 of them, and none is mine.")
    for tokens, answer in ((32, None), (100, "10")):
        assert conclude(fake, ["How many?"], sampling=Sampling(max_new_tokens=tokens))[0].final_answer == answer


@given(st.text(alphabet="aA.U !?\n", max_size=40))
def test_a_cut_text_answers_as_its_whole_sentences_do(text: str) -> None:
    assert final_answer(text, cut=True) == final_answer(text[: max(_ends(text.rstrip()), default=0)])


@pytest.mark.parametrize("text", ["answer is" + " A. B" * 50_000, "U.S. " * 40_000, "1. " * 60_000], ids=len)
def test_stops_take_no_longer_than_the_texts_length(text: str) -> None:
    started = time.perf_counter()
    final_answer(text, cut=True)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("text", ["answer is" + " " * 200_000, "answer " * 30_000, "\\boxed{" * 30_000], ids=len)
def test_a_long_text_takes_no_longer_than_its_length(text: str) -> None:
    started = time.perf_counter()
    final_answer(text)
    assert time.perf_counter() - started < 2
