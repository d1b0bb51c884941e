"""What a batch of judgments asks: labels, prompts and spellings, and the labels' masses read from the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alpaca_core.calibration import Binding
from alpaca_core.errors import InvalidLabels, InvalidRequest, RowRejected
from alpaca_core.labels import Spellings, as_labels, find_spellings
from alpaca_core.model import LanguageModel, RowError, ScoreRow
from alpaca_core.prompts import Prompt, template_of, user_text, with_labels
from alpaca_core.rows import Progress, map_rows, run_rows
from alpaca_core.spec import YES_NO, Label, TemplateName, digest_of
from alpaca_core.tokenizer import meaning

MOST_SHOWN_LABELS = 20
"""Labels that the prompt names by default, unless they are yes and no."""

Slots = tuple[str, str | None]
"""An instruction, and the input that it works on."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One text's prompt, and the spellings of the labels after it."""

    prompt: Prompt
    spellings: Spellings


class Asking:
    """A question about texts, checked before any text is looked at.

    Args:
        model: Whose tokenizer, template and context count.
        labels: At least two.
        slots: Puts a text into the question: an instruction, and the input that it works on.
        show_labels: Whether the prompt names the labels; None where there are at most
            `MOST_SHOWN_LABELS` and they are not yes and no.
        all_segmentations: As `judge`.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.

    Raises:
        InvalidLabels: For labels that cannot be told apart or spelt.
        InvalidRequest: If the question cannot be put into a prompt, or adapter or template are unknown.
    """

    def __init__(
        self,
        model: LanguageModel,
        labels: Sequence[str | Label],
        slots: Callable[[str], Slots],
        *,
        show_labels: bool | None,
        all_segmentations: bool,
        template: TemplateName | None,
        adapter: str | None,
    ) -> None:
        self.labels = as_labels(labels)
        self.adapter = adapter
        self._model = model
        self._slots = slots
        self._all_segmentations = all_segmentations
        self._writer = template_of(model, template, adapter)
        yes_no = {meaning(label.name) for label in self.labels} == {meaning(label.name) for label in YES_NO}
        few = len(self.labels) <= MOST_SHOWN_LABELS and not yes_no
        self._show_labels = few if show_labels is None else show_labels
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
        words = [[label.name, *label.aliases] for label in self.labels]
        asked = self._slots("\N{OBJECT REPLACEMENT CHARACTER}")
        return Binding(
            model=info.digest,
            adapter=used.digest if used else None,
            question=digest_of([self._writer.name, asked, words, self._show_labels, self._all_segmentations]),
            labels=self.names,
        )

    def about(self, text: str) -> Asked:
        """Ask about one text.

        Raises:
            RowRejected: If the prompt is too long, or cannot be encoded.
            InvalidLabels: If a label cannot be spelt after this prompt.
        """
        instruction, input = self._slots(text)
        if self._show_labels:
            instruction = with_labels(instruction, self.labels)
        prompt = self._writer.encode(instruction, input)
        tokenizer, every = self._model.tokenizer, self._all_segmentations
        return Asked(prompt, find_spellings(tokenizer, self.labels, prompt.ids, all_segmentations=every))

    def about_each(self, texts: Sequence[str | RowError]) -> list[Asked | RowError]:
        """Ask about each text; a `RowError` stands in place of each that cannot be asked about."""

        def ask(text: object) -> Asked:
            try:
                return self.about(user_text("a text", text))
            except InvalidLabels as error:
                raise RowRejected("no_spelling", str(error)) from error

        return map_rows(ask, texts)

    def log_masses(
        self, asked: Sequence[Asked | RowError], adapter: str | None, progress: Progress | None = None
    ) -> list[list[float] | RowError]:
        """Read each label's mass from the logits, in nats: one row of ``len(labels)`` for each text."""
        rows = map_rows(lambda each: ScoreRow(each.prompt.ids, each.spellings.trie, adapter), asked)
        return map_rows(
            lambda each, scores: each.spellings.log_masses(scores, len(self.labels)),
            asked,
            run_rows(self._model.loglikelihood, rows, progress),
        )
