"""The verbs on a real model, the embedded one, against its own network used the slow way."""

import math
from typing import Any

import pytest
import torch

from alpaca_core import (
    Answer,
    Completion,
    ModelSpec,
    RowError,
    Sampling,
    answer,
    chain_of_thought,
    conclude,
    generate,
    judge,
    next_tokens,
    show_tokens,
    verify,
)
from alpaca_core.engines.weights import load_weights
from alpaca_core.labels import as_labels, find_spellings
from alpaca_core.model import LanguageModel
from alpaca_core.prompts import template_of, with_labels
from tests.core.hostile import HOSTILE, code_of

QUESTION = "Is looking at the logits of answers a good way to ask a language model?"
TOPICS = ["World news", "Sports", "Business", "Not sure"]


@pytest.fixture(scope="module")
def network() -> Any:
    """The embedded model as transformers runs it; the engine keeps none."""
    return load_weights(ModelSpec(device="cpu")).network


def log_probabilities(network: Any, ids: list[int]) -> torch.Tensor:
    """log P of every next token after `ids`, from one plain call of the network."""
    with torch.inference_mode():
        found: torch.Tensor = network(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        return found


def test_a_judgment_equals_the_sum_over_its_spellings_token_by_token(embedded: LanguageModel, network: Any) -> None:
    text = "The central bank left interest rates where they were."
    judgment = judge(embedded, [text], TOPICS, instruction="Which topic is this?")[0]
    labels = as_labels(TOPICS)
    prompt = template_of(embedded, None).encode(with_labels("Which topic is this?", labels), text)
    spellings = find_spellings(embedded.tokenizer, labels, prompt.ids)
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def log_p(sequence: tuple[int, ...]) -> float:
        total = 0.0
        for cut, token in enumerate(sequence):
            if sequence[:cut] not in known:
                known[sequence[:cut]] = log_probabilities(network, [*prompt.ids, *sequence[:cut]])
            total += float(known[sequence[:cut]][token])
        return total

    masses = [sum(math.exp(log_p(sequence)) for sequence in spellings.sequences(index)) for index in range(4)]
    assert judgment.coverage == pytest.approx(sum(masses), rel=1e-4)
    for name, mass in zip(TOPICS, masses, strict=True):
        assert judgment.probabilities[name] == pytest.approx(mass / sum(masses), abs=1e-5)


def test_the_notebooks_last_chapter(embedded: LanguageModel) -> None:
    best = next_tokens(embedded, [QUESTION], n=49)[0]
    assert len(best) == 49
    assert [token.probability for token in best] == sorted((token.probability for token in best), reverse=True)
    everything = next_tokens(embedded, [QUESTION], n=10**6)[0]
    assert math.fsum(token.probability for token in everything) == pytest.approx(1.0, abs=1e-5)
    by_id = {token.id: token.probability for token in everything}
    prompt = template_of(embedded, None).encode(QUESTION)
    spellings = find_spellings(embedded.tokenizer, as_labels(["Yes", "No"]), prompt.ids)
    single = sum(by_id[tokens[0]] for tokens in spellings.sequences(0) if len(tokens) == 1)
    judgment = judge(embedded, [QUESTION])[0]
    assert judgment.probabilities["Yes"] * judgment.coverage >= single - 1e-6
    assert judgment.probabilities["Yes"] * judgment.coverage == pytest.approx(single, rel=0.2)


def test_greedy_text_is_that_of_transformers(embedded: LanguageModel, network: Any) -> None:
    ids = list(template_of(embedded, None).encode("Name three colours of alpacas.").ids)
    expected = network.generate(
        torch.tensor([ids]),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=list(embedded.info.eos_ids),
    )[0, len(ids) :].tolist()
    completion = generate(embedded, ["Name three colours of alpacas."], Sampling(max_new_tokens=24))[0]
    assert isinstance(completion, Completion)
    assert list(completion.token_ids) == [token for token in expected if not embedded.tokenizer.is_special(token)]
    assert completion.prompt_tokens == len(ids)


def test_a_row_is_the_same_alone_and_in_any_batch(embedded: LanguageModel) -> None:
    prompts = ["Name a colour.", "Which animals give wool, and what is made of it? Name three.", "Hi", "Count to five."]
    warm = Sampling(temperature=0.9, top_p=0.9, max_new_tokens=12, seed=5)
    together = generate(embedded, prompts, warm)
    backwards = generate(embedded, prompts[::-1], warm)[::-1]
    alone = [generate(embedded, [prompt], warm)[0] for prompt in prompts]
    assert together == backwards == alone
    judged = judge(embedded, prompts)
    for prompt, judgment in zip(prompts, judged, strict=True):
        assert judge(embedded, [prompt])[0].probabilities == judgment.probabilities


def test_other_seeds_and_samples_differ_and_the_same_ones_repeat(embedded: LanguageModel) -> None:
    def draw(seed: int, index: int) -> str:
        warm = Sampling(temperature=1.0, max_new_tokens=5, seed=seed)
        return generate(embedded, ["Tell me a story."], warm, sample_indices=[index])[0].text

    drawn = {(seed, index): draw(seed, index) for seed in (0, 1) for index in (0, 1)}
    assert len(set(drawn.values())) == 4
    assert draw(1, 1) == drawn[1, 1]


def test_hostile_rows_cost_themselves_only(embedded: LanguageModel) -> None:
    short = Sampling(max_new_tokens=3)
    good = generate(embedded, ["Name a colour."], short)[0]
    rows = generate(embedded, ["Name a colour.", *HOSTILE, "Name a colour."], short)
    assert rows[0].token_ids == rows[-1].token_ids == good.token_ids
    for hostile, row in zip(HOSTILE, rows[1:-1], strict=True):
        expected = code_of(hostile, embedded.info.context_length)
        assert (row.code if isinstance(row, RowError) else None) == expected
        if expected is None:
            assert generate(embedded, [hostile], short)[0].token_ids == row.token_ids
    judged = judge(embedded, ["Is it so?", *HOSTILE])
    assert [isinstance(row, RowError) for row in judged[1:]] == [isinstance(row, RowError) for row in rows[1:-1]]


def test_exactly_the_context_fits_one_more_does_not(embedded: LanguageModel) -> None:
    room = embedded.info.context_length - 8
    text = "word " * 8200
    ids = embedded.tokenizer.encode(text)[: room + 2]
    exact, over = (embedded.tokenizer.decode(ids[:length]) for length in (room, room + 1))
    shown = show_tokens(embedded, [exact, over])
    assert [len(tokens) for tokens in shown] == [room, room + 1]
    rows = generate(embedded, [over, text * 4], Sampling(max_new_tokens=8), template="raw")
    assert [row.code for row in rows] == ["prompt_too_long", "prompt_too_long"]
    assert "Shorten the prompt by 1 tokens" in rows[0].message


def test_the_chain_equals_its_verbs(embedded: LanguageModel) -> None:
    questions = ["Two cans hold 5 pierogi each. How many pierogi are there?", "What is the first name of Einstein?"]
    sampling = Sampling(max_new_tokens=24)
    answers = answer(embedded, questions, sampling, conclusion_tokens=12)
    thoughts = [row.text.strip() for row in chain_of_thought(embedded, questions, sampling)]
    conclusions = conclude(embedded, questions, thoughts, Sampling(max_new_tokens=12))
    checks = verify(embedded, questions, [row.text.strip() for row in conclusions])
    for row, thought, conclusion, check in zip(answers, thoughts, conclusions, checks, strict=True):
        assert isinstance(row, Answer)
        assert (row.reasoning, row.answer, row.final_answer) == (
            thought,
            conclusion.text.strip(),
            conclusion.final_answer,
        )
        assert row.p_correct == pytest.approx(check.p_correct, abs=1e-6)
    direct = conclude(embedded, questions, None, Sampling(max_new_tokens=12))
    assert [row.text for row in direct] != [row.text for row in conclusions]


def test_sampled_judgments_come_near_the_logits(embedded: LanguageModel) -> None:
    exact = judge(embedded, [QUESTION])[0]
    sampled = judge(embedded, [QUESTION], method="sampled", samples=64)[0]
    deviation = math.sqrt(exact.coverage * (1 - exact.coverage) / 64)
    assert abs(sampled.coverage - exact.coverage) < 5 * deviation


def test_a_setting_of_the_notebook_beams_with_a_temperature(embedded: LanguageModel) -> None:
    beams = Sampling(temperature=0.8, num_beams=4, max_new_tokens=8)
    prompts = ["Name a colour.", "Which animals give wool? Name three."]
    assert generate(embedded, prompts, beams) == [generate(embedded, [prompt], beams)[0] for prompt in prompts]
