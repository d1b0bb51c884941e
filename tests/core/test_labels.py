"""The spellings of labels, against their definition; their masses, against brute force over a whole vocabulary."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest

from alpaca_core import Label, fit_calibration, judge
from alpaca_core.errors import InvalidLabels, InvalidRequest
from alpaca_core.labels import MOST_LABELS, TooManySpellings, as_labels, find_spellings, forms, log_sum
from alpaca_core.model import GenerateRow, ScoreRow, Trie
from alpaca_core.spec import YES_NO
from alpaca_core.testing import FakeModel
from alpaca_core.tokenizer import Tokenizer, meaning
from tests.core.worlds import TableModel, tiny_tokenizer

PIECES = ["a", "b", "A", "B", " ", "ab", " a", "ba", "aa", "Ab"]
LABELS = ["a", "b", "ab", "ba", "aab"]


def every_spelling(tokenizer: Tokenizer, labels: tuple[Label, ...], longest: int) -> dict[tuple[int, ...], int]:
    """All sequences whose text is a form of one label alone, without those that extend another of their label."""
    known = [token for token in range(tokenizer.vocab_size) if not tokenizer.is_special(token)]
    meant: dict[tuple[int, ...], set[int]] = {}
    for length in range(1, longest + 1):
        for sequence in itertools.product(known, repeat=length):
            text = "".join(PIECES[token] for token in sequence)
            for index, label in enumerate(labels):
                single = length == 1 and meaning(text) in {meaning(form) for form in forms(label)}
                if text in forms(label) or single:
                    meant.setdefault(sequence, set()).add(index)
    own = {sequence: next(iter(found)) for sequence, found in meant.items() if len(found) == 1}
    return {
        sequence: index
        for sequence, index in own.items()
        if not any(own.get(sequence[:cut]) == index for cut in range(1, len(sequence)))
    }


@pytest.mark.parametrize(
    "names", [names for size in (2, 3, 4) for names in itertools.combinations(LABELS, size)], ids=" ".join
)
def test_probabilities_equal_brute_force_over_every_response(names: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer(PIECES)
    model = TableModel(tokenizer, seed=len(names))
    labels = as_labels(names)
    longest = max(map(len, names)) + 1
    spellings = every_spelling(tokenizer, labels, longest)

    # Every response of `longest` tokens says the label of the longest spelling that it begins with.
    masses = [0.0] * len(names)
    prompt = tuple(tokenizer.encode("b"))

    def walk(path: tuple[int, ...], probability: float, said: int | None) -> None:
        said = spellings.get(path, said)
        if len(path) == longest or not any(each[: len(path)] == path for each in spellings):
            if said is not None:
                masses[said] += probability
            return
        for token, share in enumerate(model.probabilities((*prompt, *path))):
            walk((*path, token), probability * share, said)

    walk((), 1.0, None)

    judgment = judge(model, ["b"], names, show_labels=False, all_segmentations=True, template="raw")[0]
    assert judgment.coverage == pytest.approx(sum(masses), abs=1e-12)
    for name, mass in zip(names, masses, strict=True):
        assert judgment.probabilities[name] == pytest.approx(mass / sum(masses), abs=1e-12)


def test_the_default_counts_canonical_forms_and_single_tokens_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer(PIECES)
    labels = as_labels(["ab", "b"])
    found = find_spellings(tokenizer, labels, tokenizer.encode("a"))
    for index, label in enumerate(labels):
        expected = {tuple(tokenizer.encode(form, "inside")) for form in forms(label)}
        expected |= {
            (token,) for token, piece in enumerate(PIECES) if meaning(piece) in {meaning(form) for form in forms(label)}
        }
        text_of = {sequence: "".join(PIECES[token] for token in sequence) for sequence in expected}
        complete = {sequence for sequence, text in text_of.items() if text in forms(label) or len(sequence) == 1}
        shortest = {
            sequence for sequence in complete if not any(sequence[:cut] in complete for cut in range(1, len(sequence)))
        }
        assert set(found.sequences(index)) == shortest


def test_a_sequence_that_would_mean_two_labels_counts_for_neither_and_is_reported() -> None:
    labels = [Label(name="north", aliases=("n",)), Label(name="never", aliases=("N",))]
    judgment = judge(FakeModel({"n": 0.5, "north": 0.3, "never": 0.2}), ["?"], labels, show_labels=False)[0]
    assert judgment.notes
    assert all("'north' and 'never'" in note for note in judgment.notes)
    assert judgment.coverage == pytest.approx(0.5, abs=1e-6)
    assert judgment.probabilities == pytest.approx({"north": 0.6, "never": 0.4}, abs=1e-6)


def test_a_label_that_begins_another_is_worth_what_does_not_go_on_to_it() -> None:
    replies = {"no": 0.5, "not sure": 0.2, "no way": 0.1, "yes": 0.2}
    judgment = judge(FakeModel(replies), ["?"], ["no", "not sure", "yes"], show_labels=False)[0]
    assert judgment.coverage == pytest.approx(1.0, abs=1e-6)
    assert judgment.probabilities == pytest.approx({"no": 0.6, "not sure": 0.2, "yes": 0.2}, abs=1e-6)


def test_three_labels_inside_one_another_are_told_apart() -> None:
    replies = {"a": 0.4, "ab": 0.3, "abc": 0.2, "x": 0.1}
    judgment = judge(FakeModel(replies), ["?"], ["a", "ab", "abc"], show_labels=False)[0]
    assert judgment.coverage == pytest.approx(0.9, abs=1e-6)
    assert judgment.probabilities == pytest.approx({"a": 4 / 9, "ab": 3 / 9, "abc": 2 / 9}, abs=1e-6)


def test_an_alias_that_extends_its_label_adds_nothing() -> None:
    plain = judge(FakeModel({"yes": 0.4, "yes sir": 0.2, "no": 0.4}), ["?"], ["yes", "no"])[0]
    label = Label(name="yes", aliases=("y", "true", "yes sir"))
    aliased = judge(FakeModel({"yes": 0.4, "yes sir": 0.2, "no": 0.4}), ["?"], [label, "no"])[0]
    assert aliased.probabilities == plain.probabilities
    assert aliased.coverage == plain.coverage <= 1.0


def test_yes_and_no_given_as_strings_keep_their_default_aliases() -> None:
    assert as_labels(["Yes", "No"]) == YES_NO
    assert as_labels(["yes", "maybe"])[0].aliases == YES_NO[0].aliases
    assert as_labels(["maybe", "never"])[0].aliases == ()


def test_a_default_alias_gives_way_to_a_label_that_means_it() -> None:
    assert as_labels(["yes", "no", "true"])[0].aliases == ("y",)
    assert as_labels(["yes", Label(name="other", aliases=("Y",))])[0].aliases == ("true",)
    judgment = judge(FakeModel({"true": 0.5, "yes": 0.3, "no": 0.2}), ["?"], ["yes", "no", "true"])[0]
    assert judgment.probabilities == pytest.approx({"yes": 0.3, "no": 0.2, "true": 0.5}, abs=1e-6)


def test_title_case_capitalises_words_and_nothing_inside_them() -> None:
    assert "Don't Know" in forms(Label(name="don't know"))
    assert "Sci-Tech" in forms(Label(name="sci-tech"))
    assert "Été  Indien" in forms(Label(name="été  indien"))


def test_long_label_sets_have_no_limit_of_nodes_unless_all_segmentations_are_counted() -> None:
    names = [f"{number} {'word ' * 9}{number}" for number in range(MOST_LABELS)]
    assert judge(FakeModel(names[7]), ["?"], names)[0].label == names[7]


@pytest.mark.parametrize(
    "labels",
    [
        [],
        ["one"],
        "text",
        ["a", "a"],
        ["a", " A "],
        ["ﬁne", "fine"],
        ["a", ""],
        ["a", "  "],
        ["a", None],
        ["a", 3],
        ["Ⅳ", "iv"],
        pytest.param({"a", "b"}, id="a set"),
        ["a", "\ud800"],
    ],
    ids=repr,
)
def test_labels_that_cannot_be_told_apart_are_refused(labels: list[str]) -> None:
    with pytest.raises(InvalidLabels):
        judge(FakeModel("a"), ["?"], labels)


class Untouched(TableModel):
    """Fails the test where a judgment begins to work."""

    def generate(self, rows: Sequence[GenerateRow]) -> NoReturn:
        pytest.fail("generated")

    def loglikelihood(self, rows: Sequence[ScoreRow]) -> NoReturn:
        pytest.fail("scored")


@pytest.mark.parametrize(
    ("labels", "settings", "says"),
    [
        ([], {}, "at least two labels, but got \\[\\]"),
        (["a"], {}, "at least two labels, but got \\['a'\\]"),
        (["a", "b", "a"], {}, "'a' is there twice"),
        (["a", "b", "\N{FULLWIDTH LATIN SMALL LETTER A}"], {}, "Unicode form, but 'a' and 'ａ' mean the same"),
        (["a", "zebra"], {}, "every spelling of 'zebra' is .* not in the model's vocabulary"),
        ([f"a{'b' * number}" for number in range(1000)], {}, "at most 512 labels, but got 1,000"),
        (["a" * 60, "b"], {"all_segmentations": True}, "8,192"),
        (["a", "b"], {"calibration": "of another model"}, "this one has the model"),
    ],
    ids=["none", "one", "twice", "equal after NFKC", "no spelling", "a thousand", "segmentations", "calibration"],
)
def test_each_bad_set_of_labels_has_its_own_error_before_any_work(
    labels: list[str], settings: dict[str, Any], says: str
) -> None:
    tokenizer = tiny_tokenizer(PIECES)
    asked: dict[str, Any] = {"template": "raw", "show_labels": False}
    if "calibration" in settings:
        fitted = fit_calibration(TableModel(tokenizer, seed=1), ["b", "a"] * 5, labels, method="batch", **asked)
        settings = {"calibration": fitted}
    with pytest.raises(InvalidRequest, match=says):
        judge(Untouched(tokenizer, seed=2), ["b"], labels, **asked, **settings)


def test_a_label_outside_the_vocabulary_is_refused_before_any_work() -> None:
    tokenizer = tiny_tokenizer(PIECES)
    with pytest.raises(InvalidLabels, match="'xyz'"):
        find_spellings(tokenizer, as_labels(["a", "xyz"]), tokenizer.encode("b"))


def test_a_label_whose_every_spelling_is_anothers_too_is_refused() -> None:
    labels = [Label(name="north", aliases=("south",)), Label(name="south", aliases=())]
    with pytest.raises(InvalidLabels, match="'south'"):
        judge(FakeModel("north"), ["?"], labels)


def test_too_many_segmentations_are_an_error_and_not_a_long_wait() -> None:
    tokenizer = tiny_tokenizer(["a", "aa", "b", "aaa"])
    with pytest.raises(TooManySpellings, match="8,192"):
        find_spellings(tokenizer, as_labels(["a" * 60, "b"]), tokenizer.encode("b"), all_segmentations=True)


def test_hundreds_of_labels_are_judged() -> None:
    names = [f"intent {number}" for number in range(MOST_LABELS)]
    judgment = judge(FakeModel({"intent 7": 0.75, "intent 70": 0.25}), ["?"], names)[0]
    assert judgment.label == "intent 7"
    assert judgment.probabilities["intent 70"] == pytest.approx(0.25, abs=1e-4)
    assert math.fsum(judgment.probabilities.values()) == pytest.approx(1.0)


def test_a_trie_tells_shared_beginnings_once() -> None:
    trie, ends = Trie.of([(1, 2, 3), (1, 2), (1, 4), (5,)])
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(trie.tokens, trie.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert [paths[end] for end in ends] == [(1, 2, 3), (1, 2), (1, 4), (5,)]
    assert len(paths) == len(set(paths)) == 5
    assert trie.depths() == tuple(len(path) for path in paths)


def test_log_sum_is_exact_where_exp_underflows() -> None:
    assert log_sum([-2000.0, -2000.0]) == pytest.approx(-2000.0 + math.log(2))
    assert log_sum([]) == -math.inf
    assert log_sum([-math.inf, -math.inf]) == -math.inf
