"""A label and every token sequence that spells it, as one trie for all labels.

What is counted (the definition, of which the tests are the brute force):

- A surface form of a label is its name or an alias, as given, lower, Title or UPPER (an exact label's as given
  alone), with and without one leading space.
- Its spellings after a prompt are each form's canonical tokens there, and every single token that means
  the same as a form: equal after strip, casefold and NFKC (an exact label's after strip alone). With
  `all_segmentations`, every sequence of tokens whose bytes are those of a form, too.
- A sequence that would spell two labels is dropped and reported. Of one label's spellings, one that
  extends another is dropped, so that nothing counts twice.
- A spelling that begins one of another label (`no`, `not sure`) is worth what does not go on to that one.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from alpaca_core.errors import InvalidLabels
from alpaca_core.model import Trie
from alpaca_core.spec import YES_NO, Label
from alpaca_core.tokenizer import Tokenizer, meaning

MOST_LABELS = 512
"""Most labels of one judgment: up to hundreds. The trie, and with it the time of a row, grows with them."""

MAX_NODES = 8_192
"""Most nodes of a trie of all segmentations; the attention mask over them is quadratic."""


class TooManySpellings(InvalidLabels):
    """All segmentations of the labels would need more than `MAX_NODES` nodes."""


@dataclass(frozen=True)
class Spellings:
    """The spellings of a set of labels after one prompt.

    Args:
        trie: Of all spellings.
        ends: The nodes that end a spelling, each with the index of the label that it spells.
        notes: What was dropped, for people.
    """

    trie: Trie
    ends: dict[int, int]
    notes: tuple[str, ...]

    def sequences(self, label: int) -> list[tuple[int, ...]]:
        """Return the spellings of one label, by its index, as token ids."""
        return [self._path(node) for node, spelt in self.ends.items() if spelt == label]

    def log_masses(self, scores: Sequence[float], labels: int) -> list[float]:
        """Add up each label's spellings.

        Args:
            scores: For each node of the trie log P(token | prompt, path), in nats.
            labels: How many labels there are.

        Returns:
            For each label the log of the probability that the response begins with one of its spellings
            and does not go on to another label's; -inf where that is none. Their exps sum to at most 1.
        """
        paths: list[float] = []
        for score, parent in zip(scores, self.trie.parents, strict=True):
            paths.append(score + (paths[parent] if parent >= 0 else 0.0))
        beyond = dict.fromkeys(self._nested.values(), 0.0)
        for node, above in self._nested.items():
            if paths[above] > -math.inf:
                beyond[above] += math.exp(paths[node] - paths[above])
        masses: list[list[float]] = [[] for _ in range(labels)]
        for node, label in self.ends.items():
            gone = beyond.get(node, 0.0)
            if gone < 1.0:
                masses[label].append(paths[node] + math.log1p(-gone) if gone else paths[node])
        return [log_sum(each) for each in masses]

    def label_of(self, token_ids: Sequence[int]) -> int | None:
        """Return the label whose spelling a response begins with, the longest where several do."""
        node, found = -1, None
        for token in token_ids:
            next_node = self._children.get((node, token))
            if next_node is None:
                break
            node = next_node
            found = self.ends.get(node, found)
        return found

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        edges = zip(self.trie.parents, self.trie.tokens, strict=True)
        return {edge: node for node, edge in enumerate(edges)}

    @cached_property
    def _nested(self) -> dict[int, int]:
        """The ends with another above them, and the nearest such."""
        nearest: list[int] = []
        for parent in self.trie.parents:
            nearest.append(parent if parent < 0 or parent in self.ends else nearest[parent])
        return {node: nearest[node] for node in self.ends if nearest[node] >= 0}

    def _path(self, node: int) -> tuple[int, ...]:
        tokens: list[int] = []
        while node >= 0:
            tokens.insert(0, self.trie.tokens[node])
            node = self.trie.parents[node]
        return tuple(tokens)


def log_sum(values: Sequence[float]) -> float:
    """Return log(sum(exp(values))), in nats; -inf for none."""
    top = max(values, default=-math.inf)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(value - top) for value in values))


def as_labels(labels: Sequence[str | Label]) -> tuple[Label, ...]:
    """Check a set of labels; plain strings become `Label`; a bare yes or no gets its default aliases.

    Raises:
        InvalidLabels: For no list, fewer than two, more than `MOST_LABELS`, one that is no text, or two that mean
            the same.
    """
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence) or len(labels) < 2:
        raise InvalidLabels(f"a judgment needs at least two labels, but got {labels!r:.80}. Name them in a list.")
    if len(labels) > MOST_LABELS:
        raise InvalidLabels(
            f"a judgment has at most {MOST_LABELS} labels, but got {len(labels):,}. "
            "Judge groups of labels first, then the labels of the likeliest group."
        )
    for label in labels:
        if not isinstance(label, str | Label) or (isinstance(label, str) and not label.strip()):
            raise InvalidLabels(
                f"a label is a word or words, but got {label!r:.80}. Use a text, or Label(name, aliases)."
            )
    plain = [Label(name=label) if isinstance(label, str) else label for label in labels]
    for text in (text for label in plain for text in (label.name, *label.aliases)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidLabels(
                f"a label must be encodable as UTF-8, but {text!r:.80} holds a lone surrogate. Mend it."
            )
    taken = {meaning(text) for label in plain for text in (label.name, *label.aliases)}
    known = {meaning(label.name): tuple(alias for alias in label.aliases if alias not in taken) for label in YES_NO}
    checked = [
        label.model_copy(update={"aliases": known.get(meaning(label.name), ())}) if isinstance(given, str) else label
        for given, label in zip(labels, plain, strict=True)
    ]
    seen: dict[tuple[bool, str], Label] = {}
    for label in checked:
        twin = seen.setdefault((label.exact, label.name.strip() if label.exact else meaning(label.name)), label)
        if twin is not label and twin.name == label.name:
            raise InvalidLabels(f"each label is named once, but {label.name!r} is there twice. Drop one.")
        if twin is not label:
            raise InvalidLabels(
                f"labels must differ in more than case, outer spaces and Unicode form, but {twin.name!r} and "
                f"{label.name!r} mean the same. Drop one, or make it an alias."
            )
    return tuple(checked)


def _title(text: str) -> str:
    """Begin each word with a capital; `str.title` would write ``Don'T``."""
    return re.sub(r"[^\W\d_]+(['\u2019][^\W\d_]+)*", lambda word: word[0].capitalize(), text)


def forms(label: Label) -> list[str]:
    """Return a label's surface forms: as given, lower, Title, UPPER; with and without one leading space."""
    texts = [text.strip() for text in (label.name, *label.aliases)]
    cased = [form for text in texts for form in (text, text.lower(), _title(text), text.upper())]
    cased = texts if label.exact else cased
    return list(dict.fromkeys(space + form for form in cased for space in ("", " ")))


def find_spellings(
    tokenizer: Tokenizer, labels: tuple[Label, ...], prompt_ids: Sequence[int], *, all_segmentations: bool = False
) -> Spellings:
    """Find every spelling of the labels after a prompt.

    Args:
        tokenizer: Of the model that will be asked.
        labels: From `as_labels`.
        prompt_ids: The prompt; only its last tokens can matter.
        all_segmentations: Count every way to cut a form into tokens, not only the canonical one.

    Returns:
        The spellings; cached, since most prompts of a batch end alike.

    Raises:
        InvalidLabels: If a label is left without a spelling.
        TooManySpellings: If all segmentations need more than `MAX_NODES` nodes.
    """
    return tokenizer.remember(_find, labels, tokenizer.tail(prompt_ids), all_segmentations)


def _find(tokenizer: Tokenizer, labels: tuple[Label, ...], tail: tuple[int, ...], all_segmentations: bool) -> Spellings:
    meant: dict[tuple[int, ...], set[int]] = {}
    for index, label in enumerate(labels):
        for form in forms(label):
            canonical = tokenizer.continuation(tail, form)
            # A vocabulary that lacks a character may drop it without a word; then these tokens say something else.
            found = [canonical] if meaning(tokenizer.decode(canonical)) == meaning(form) else []
            alike = tokenizer.ids_by_meaning.get(meaning(form), ())
            found += [
                (token,) for token in alike if not label.exact or tokenizer.decode([token]).strip() == form.strip()
            ]
            if all_segmentations:
                found += _segmentations(tokenizer, form)
            for sequence in found:
                meant.setdefault(sequence, set()).add(index)
            if all_segmentations and len(meant) > MAX_NODES:
                raise TooManySpellings(
                    f"all segmentations may have {MAX_NODES:,} nodes, but {label.name!r} goes beyond. "
                    "Use shorter labels, or leave all_segmentations off."
                )
    notes = []
    kept: dict[tuple[int, ...], int] = {}
    for sequence in sorted(meant, key=len):
        if len(meant[sequence]) > 1:
            names = " and ".join(repr(labels[index].name) for index in sorted(meant[sequence]))
            notes.append(f"{tokenizer.decode(sequence)!r} would mean {names}, so it counts for neither")
            continue
        (index,) = meant[sequence]
        if all(kept.get(sequence[:length]) != index for length in range(1, len(sequence))):
            kept[sequence] = index
    for index, label in enumerate(labels):
        if index not in kept.values():
            raise InvalidLabels(
                f"each label needs a spelling of its own, but every spelling of {label.name!r} is another label's "
                "too, or not in the model's vocabulary. Rename the label, or change its aliases."
            )
    trie, ends = Trie.of(list(kept))
    if all_segmentations and len(trie.tokens) > MAX_NODES:
        raise TooManySpellings(
            f"all segmentations may have {MAX_NODES:,} nodes, but these labels have {len(trie.tokens):,}. "
            "Use shorter labels, or leave all_segmentations off."
        )
    return Spellings(trie, dict(zip(ends, kept.values(), strict=True)), tuple(notes))


def _segmentations(tokenizer: Tokenizer, form: str) -> Iterable[tuple[int, ...]]:
    """Yield every token sequence whose bytes are the form's; give up once there are clearly too many."""
    content = form.encode("utf-8")
    ids = tokenizer.ids_by_bytes
    # Sequences from each place on; a place that cannot reach the end has none and is never entered.
    ways = [0] * len(content) + [1]
    for start in reversed(range(len(content))):
        ways[start] = sum(
            len(ids.get(content[start:stop], ())) * ways[stop] for stop in range(start + 1, len(content) + 1)
        )
    if ways[0] > MAX_NODES:
        raise TooManySpellings(
            f"all segmentations may have {MAX_NODES:,} nodes, but {form!r} alone can be cut in {ways[0]:,} ways. "
            "Use shorter labels, or leave all_segmentations off."
        )

    def cut(start: int) -> Iterator[tuple[int, ...]]:
        if start == len(content):
            yield ()
        for stop in range(start + 1, len(content) + 1):
            if ways[stop]:
                for token in ids.get(content[start:stop], ()):
                    for rest in cut(stop):
                        yield (token, *rest)

    return cut(0)
