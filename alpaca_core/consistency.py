"""Self-consistency: answers that say the same are one group, and the group with the most weight wins.

Wang et al. 2022, arXiv 2203.11171, count samples; the voting verifier of Li et al. 2023, arXiv 2206.02336,
section 3, weighs each by the probability that it is correct.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from alpaca_core.spec import Value
from alpaca_core.tokenizer import meaning

PRIOR_DRAWS = 2
"""Draws that P(True) counts as beside those that were made; at 1/2 that is Laplace's rule of succession."""

_NUMBER = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?(%?)")
_DIGIT = re.compile(r"[0-9]")


class Vote(Value):
    """Samples that gave one answer: how many, their share of all samples, and their mean P(correct).

    `answer` is in the words of the likeliest of them; `p_correct` is None where none of them has one.
    """

    answer: str
    count: int
    share: float
    p_correct: float | None


@dataclass(frozen=True, slots=True)
class Tally:
    """What samples agree on: the votes from the heaviest down, and of the first its likeliest sample's place.

    Where no sample has an answer there are no votes, and `winner` is the likeliest sample of all.
    """

    votes: tuple[Vote, ...]
    winner: int
    share: float
    p_correct: float | None


def normal_form(answer: str) -> str:
    """Reduce an answer to what it says, so that equal answers are equal texts.

    A number, alone or with words after it, is written without sign of currency, thousands' commas and zeros
    that say nothing; per cent stay apart from numbers. Any other text is its `meaning`, with single spaces.

    Example:
        >>> normal_form("$1,000.00"), normal_form("10.0 Pierogi"), normal_form("New  York")
        ('1000', '10 pierogi', 'new york')
    """
    text = " ".join(meaning(answer).split())
    plain = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$").replace("\\%", "%").replace(" %", "%")
    plain = "".join(each for each in plain if each == "¢" or unicodedata.category(each) != "Sc")
    first, *words = plain.split() or [""]
    value = _number(first)
    return text if value is None else " ".join([value, *words])


def _number(text: str) -> str | None:
    found = _NUMBER.fullmatch(text)
    if found is None or not (found[2] or found[3]):
        return None
    whole, part = found[2].replace(",", "").lstrip("0") or "0", (found[3] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return ("-" if found[1] == "-" and value != "0" else "") + value + found[4]


def group(answers: Sequence[str | None]) -> list[list[int]]:
    """Group the answers to one question that say the same: those of equal `normal_form`.

    A number alone also says the same as that number of something (10, and 10 pierogi), unless the number
    comes with several things, which may be different ones (2 am, 2 pm).

    Args:
        answers: None for no answer, which is in no group.

    Returns:
        The places of each group's answers, groups and places in their order.
    """
    forms = [None if answer is None else normal_form(answer) for answer in answers]
    things: dict[str, set[str]] = {}
    for form in forms:
        number, _, words = (form or "").partition(" ")
        if words and _number(number) and not _DIGIT.search(words):
            things.setdefault(number, set()).add(form or "")
    groups: dict[str, list[int]] = {}
    for place, form in enumerate(forms):
        if form is not None:
            named = things.get(form, set())
            groups.setdefault(min(named) if len(named) == 1 else form, []).append(place)
    return list(groups.values())


def tally(answers: Sequence[str | None], p_correct: Sequence[float | None]) -> Tally:
    """Let the samples of one question vote: `group` their answers, and weigh the groups.

    A sample weighs its P(correct), nothing where it has none while others do, and 1 where none has any. It
    has no say without an answer, but counts among all. Ties go to the group with more samples, then to the
    earlier one. The winner's P(correct) is

        (weight of its group / weight of all) * (n + k * mean P(correct)) / (n + k)

    with n samples and k = `PRIOR_DRAWS`. The first factor is the voting verifier's. By itself it would be 1
    for any unanimous samples, though the model thought each of them wrong, so the second counts P(True) as k
    further draws, which agree as far as the model is sure. The groups' values sum to at most 1 and rank them
    as their weights do.

    Args:
        answers: The final answer of each sample, None where it has none; at least one sample.
        p_correct: P(correct) of each sample, None where it has none.
    """
    unverified = all(each is None for each in p_correct)
    weights = [1.0 if unverified else each or 0.0 for each in p_correct]

    def weight(places: Sequence[int]) -> float:
        return math.fsum(weights[place] for place in places)

    def likeliest(places: Sequence[int]) -> int:
        return max(places, key=weights.__getitem__)  # the first of those that tie

    def vote(places: Sequence[int]) -> Vote:
        said, known = answers[likeliest(places)], [p for place in places if (p := p_correct[place]) is not None]
        return Vote(
            answer=said or "",
            count=len(places),
            share=len(places) / len(answers),
            p_correct=math.fsum(known) / len(known) if known else None,
        )

    ranked = sorted(group(answers), key=lambda places: (-weight(places), -len(places), places[0]))
    everyone = range(len(answers))
    if not ranked:
        winner = likeliest(everyone)
        own = p_correct[winner]
        return Tally((), winner, 0.0, None if own is None else pooled(0, len(answers), own))
    first, total = ranked[0], weight(everyone)
    agreed = weight(first) / total if total else len(first) / len(answers)
    mean = math.fsum(p for p in p_correct if p is not None) / max(sum(p is not None for p in p_correct), 1)
    return Tally(
        votes=tuple(vote(places) for places in ranked),
        winner=likeliest(first),
        share=len(first) / len(answers),
        p_correct=None if unverified else agreed * pooled(len(answers), len(answers), mean),
    )


def agreeing(answer: str, drawn: Sequence[str | None]) -> int:
    """Count the draws that say the same as an answer; one without an answer agrees with none."""
    return len(group([answer, *drawn])[0]) - 1


def pooled(agreed: int, draws: int, p_true: float | None) -> float:
    """Combine agreement with P(True): the mean of a Beta posterior, with P(True) as a prior of `PRIOR_DRAWS` draws.

    It is a linear pool of the two, as in Chen & Mueller 2023 (arXiv 2308.16175), whose weight on agreement grows
    with the number of draws: n / (n + k). It is 0 or 1 only where P(True) is, too. Without P(True) the prior is 1/2.
    """
    return (agreed + PRIOR_DRAWS * (0.5 if p_true is None else p_true)) / (draws + PRIOR_DRAWS)
