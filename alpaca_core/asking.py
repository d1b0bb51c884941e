"""What a batch of judgments asks: labels, prompts and spellings, and the labels' masses read from the logits."""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from alpaca_core.calibration import Binding
from alpaca_core.errors import InvalidLabels, InvalidRequest, RowRejected
from alpaca_core.labels import Spellings, as_labels, find_spellings, log_sum
from alpaca_core.model import DEFAULT_ADAPTER, LanguageModel, RowError, ScoreRow, Scores, shapes_of
from alpaca_core.prompts import TEXT, Prompt, template_of, user_text, with_labels
from alpaca_core.rows import Progress, map_rows, run_rows
from alpaca_core.spec import YES_NO, Label, TemplateName, digest_of
from alpaca_core.tokenizer import meaning

MOST_SHOWN_LABELS = 20
"""Labels that the prompt names by default, unless they are yes and no."""

LETTERS = string.ascii_uppercase
"""What labels are called where the prompt gives them letters."""


class Question(TypedDict, total=False):
    """How texts are asked about; each field is the argument of `judge` of that name."""

    instruction: str | None
    show_labels: bool | None
    letters: bool
    rotate_labels: bool
    all_segmentations: bool
    template: TemplateName | None
    adapter: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """One text's prompt, the spellings after it, and how many labels were moved from the front to the end."""

    prompt: Prompt
    spellings: Spellings
    turn: int = 0


class Asking:
    """A question about texts, checked before any text is looked at.

    Args:
        model: Whose tokenizer, template and context count.
        labels: At least two.
        instruction: As `judge`, and so are all that follow.
        show_labels: None shows them where there are at most `MOST_SHOWN_LABELS` and they are not yes and no,
            or where they have letters.
        letters: Whether the prompt gives them letters, and the response is one.
        rotate_labels: Whether each text is asked about in every rotation of the labels that the prompt names.
        all_segmentations: Whether every way to cut a label into tokens counts.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.

    Raises:
        InvalidLabels: For labels that cannot be told apart or spelt.
        InvalidRequest: If the question cannot be put into a prompt, a setting would have no effect, or adapter
            or template are unknown.
    """

    def __init__(
        self,
        model: LanguageModel,
        labels: Sequence[str | Label],
        *,
        instruction: str | None = None,
        show_labels: bool | None = None,
        letters: bool = False,
        rotate_labels: bool = False,
        all_segmentations: bool = False,
        template: TemplateName | None = None,
        adapter: str | None = DEFAULT_ADAPTER,
    ) -> None:
        _check_instruction(instruction)
        self.labels = as_labels(labels)
        self.adapter = adapter
        self.rotates = rotate_labels
        self._model = model
        self._instruction = instruction
        self._all_segmentations = all_segmentations
        self._writer = template_of(model, template, adapter)
        yes_no = {meaning(label.name) for label in self.labels} == {meaning(label.name) for label in YES_NO}
        few = len(self.labels) <= MOST_SHOWN_LABELS and not yes_no
        self.shows_labels = letters or rotate_labels or few if show_labels is None else show_labels
        for name, value in (("letters", letters), ("rotate_labels", rotate_labels)):
            if value and not self.shows_labels:
                raise InvalidRequest(
                    f"{name}=True is about labels in the prompt, but show_labels={show_labels} leaves them out. "
                    "Drop one of the two."
                )
        if letters and len(self.labels) > len(LETTERS):
            raise InvalidLabels(
                f"letters=True calls labels A to Z, but there are {len(self.labels)} of them. Leave letters off."
            )
        self._letters = LETTERS[: len(self.labels)] if letters else None
        self._said = tuple(Label(name=letter, exact=True) for letter in self._letters or "") or self.labels
        try:
            self.about("?")  # what is wrong with labels or instruction is wrong with every row
        except RowRejected as error:
            raise InvalidRequest(f"instruction and labels cannot be asked: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names, in order."""
        return tuple(label.name for label in self.labels)

    def binding(self) -> Binding:
        """Name what is asked, the texts aside, for a calibration to hold on to."""
        info = self._model.info
        used = info.adapter(self.adapter)
        words = [label.model_dump(mode="json") for label in self.labels]
        asked = self.slots("\N{OBJECT REPLACEMENT CHARACTER}")
        shown = [self.shows_labels, self._letters, self.rotates]
        return Binding(
            model=info.unshaped_digest or info.digest,  # the shape of passes changes last bits only
            adapter=used.digest if used else None,
            question=digest_of([self._writer.name, asked, words, shown, self._all_segmentations]),
            labels=self.names,
        )

    def about(self, text: str, turn: int = 0) -> Asked:
        """Ask about one text.

        Args:
            text: What is judged.
            turn: How many labels the prompt names last instead of first.

        Raises:
            RowRejected: If the prompt is too long, or cannot be encoded.
            InvalidLabels: If a label cannot be spelt after this prompt.
        """
        instruction, input = self.slots(text)
        if self.shows_labels:
            instruction = with_labels(instruction, self.labels[turn:] + self.labels[:turn], self._letters)
        prompt = self._writer.encode(instruction, input)
        tokenizer, every = self._model.tokenizer, self._all_segmentations
        return Asked(prompt, find_spellings(tokenizer, self._said, prompt.ids, all_segmentations=every), turn)

    def about_each(self, texts: Sequence[str | RowError], turns: Sequence[int] = (0,)) -> list[Asked | RowError]:
        """Ask about each text, once in each turn; a `RowError` stands in place of what cannot be asked."""

        def ask(text: object, turn: int) -> Asked:
            try:
                return self.about(user_text("a text", text), turn)
            except InvalidLabels as error:
                raise RowRejected("no_spelling", str(error)) from error

        return map_rows(ask, [text for text in texts for _ in turns], list(turns) * len(texts))

    def log_masses(
        self,
        asked: Sequence[Asked | RowError],
        adapter: str | None,
        progress: Progress | None = None,
        share: float = 1.0,
    ) -> list[list[float] | RowError]:
        """Read each label's mass from the logits, in nats: one row of ``len(labels)`` for each text."""

        def masses(each: Asked, scores: list[float]) -> list[float]:
            found = each.spellings.log_masses(scores, len(self.labels))
            if self._letters is not None:  # the first letter calls the label of number `turn`
                found = found[-each.turn :] + found[: -each.turn]
            return Scores(found, shapes_of(scores))

        rows = map_rows(lambda each: ScoreRow(each.prompt.ids, each.spellings.trie, adapter), asked)
        return map_rows(masses, asked, run_rows(self._model.loglikelihood, rows, progress, share))

    def turned_log_masses(
        self, texts: Sequence[str | RowError], adapter: str | None, progress: Progress | None = None
    ) -> list[list[list[float]] | RowError]:
        """Read the labels' masses in every rotation, in nats: ``(turns, labels)`` for each text."""
        turns = range(len(self.labels))
        asked = self.about_each(texts, turns)
        found = self.log_masses(asked, adapter, progress, 1 / len(turns))
        rows: list[list[list[float]] | RowError] = []
        for first in range(0, len(found), len(turns)):
            parts = found[first : first + len(turns)]
            good = [part for part in parts if not isinstance(part, RowError)]
            error = next((part for part in parts if isinstance(part, RowError)), None)
            rows.append(good if error is None else error)
        return rows

    def read(
        self,
        texts: Sequence[str | RowError],
        adapter: str | None,
        progress: Progress | None = None,
        asked: Sequence[Asked | RowError] | None = None,
    ) -> list[list[float] | RowError]:
        """Read each label's mass, in nats, as the question says: in the order given, or over all rotations.

        `asked` is what `about_each` made of the texts, where that is known already.
        """
        if self.rotates:
            return map_rows(averaged, self.turned_log_masses(texts, adapter, progress))
        return self.log_masses(self.about_each(texts) if asked is None else asked, adapter, progress)

    def slots(self, text: str) -> tuple[str, str | None]:
        """Put a text into the question: an instruction, and the input that it works on."""
        if self._instruction is None:
            return text, None
        if TEXT in self._instruction:
            return self._instruction.replace(TEXT, text), None
        return self._instruction, text


def averaged(turns: Sequence[Sequence[float]]) -> list[float]:
    """Average log masses, in nats, over turns: the mean share of each label, and the mean of the coverages.

    A turn in which no label had any mass says nothing about shares (Zheng et al. 2024, arXiv 2309.03882, eq. 1).
    """
    totals = [log_sum(turn) for turn in turns]
    said = [(turn, total) for turn, total in zip(turns, totals, strict=True) if total > -math.inf]
    if not said:
        return Scores(turns[0], shapes_of(*turns))
    coverage = log_sum(totals) - math.log(len(turns))
    shares = zip(*([mass - total for mass in turn] for turn, total in said), strict=True)
    return Scores((log_sum(share) - math.log(len(said)) + coverage for share in shares), shapes_of(*turns))


def _check_instruction(instruction: object) -> None:
    if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
        raise InvalidRequest(
            f"instruction is the question about every text, but got {instruction!r:.80}. Ask something, or use None."
        )
