"""Judge by logits: the probability of each label, read from the model and not from sampled text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from alpaca_core.errors import InvalidLabels, InvalidRequest, RowRejected
from alpaca_core.labels import Spellings, as_labels, find_spellings, log_sum
from alpaca_core.model import DEFAULT_ADAPTER, GenerateRow, LanguageModel, RowError, ScoreRow
from alpaca_core.prompts import Prompt, template_of, user_text, with_labels
from alpaca_core.rows import Progress, check_rows, map_rows, run_rows
from alpaca_core.spec import YES_NO, Label, Sampling, TemplateName, Value
from alpaca_core.tokenizer import meaning

MOST_SHOWN_LABELS = 20
"""Labels that the prompt names by default, unless they are yes and no."""

MOST_SAMPLES = 10_000
"""Responses that ``sampled`` draws for one text."""

Method = Literal["logits", "sampled"]


class Judgment(Value):
    """How probable each label is for a text.

    `label` is the likeliest, or None where the judgment abstains, and `reason` says why. `probabilities`
    sum to 1; `coverage` is the mass that all labels had together before that, at most 1. `escaped` says
    that a line of the text that equalled a template's marker got a leading space. `notes` name spellings
    that were dropped because they would mean two labels.
    """

    text: str
    label: str | None
    probabilities: dict[str, float]
    coverage: float
    reason: str | None = None
    escaped: bool = False
    notes: tuple[str, ...] = ()


def judge(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label] = YES_NO,
    *,
    instruction: str | None = None,
    show_labels: bool | None = None,
    min_coverage: float = 0.0,
    all_segmentations: bool = False,
    method: Method = "logits",
    samples: int = 10,
    seed: int = 0,
    template: TemplateName | None = None,
    adapter: str | None = DEFAULT_ADAPTER,
    progress: Progress | None = None,
) -> list[Judgment | RowError]:
    """Judge each text: which label, how probable, and how much of the model's mass the labels had.

    One forward pass over the prompt gives every single-token spelling of every label; one more, over the
    inner nodes of the spellings' trie, gives the rest. `labels.py` defines what is counted.

    Args:
        model: From `load_model`.
        texts: What is judged; without `instruction` each text is the instruction itself.
        labels: At least two; a text, or a `Label` with aliases. Yes and no unless said.
        instruction: The question about every text, which is then its input.
        show_labels: Whether the prompt names the labels; by default where there are at most 20 and they
            are not yes and no.
        min_coverage: Abstain below this coverage, between 0 and 1. Good judgments exist at 0.03.
        all_segmentations: Count every way to cut a label into tokens, up to `labels.MAX_NODES`.
        method: ``logits``, or ``sampled``: draw `samples` responses and count those that begin with a label.
        samples: Responses drawn for each text by ``sampled``.
        seed: Of the samples.
        template: Overrides the model's.
        adapter: Name of the LoRA weights to use; None for the bare base.
        progress: Called with the number of texts just judged.

    Returns:
        A `Judgment` for each text, in order; a `RowError` in place of each that failed.

    Raises:
        InvalidLabels: Before any work, for labels that cannot be told apart or spelt.
        InvalidRequest: For settings out of range, or an unknown adapter or template.

    Example:
        >>> from alpaca_core.testing import FakeModel
        >>> judgment = judge(FakeModel({"Paris": {"Yes": 0.9, "No": 0.1}}), ["Is Paris in France?"])[0]
        >>> judgment.label, round(judgment.probabilities["Yes"], 2)
        ('Yes', 0.9)
    """
    check_rows("texts", texts)
    checked = as_labels(labels)
    _check_settings(instruction, min_coverage, all_segmentations, method, samples, seed)
    writer = template_of(model, template, adapter)
    if show_labels is None:
        yes_no = {meaning(label.name) for label in checked} == {meaning(label.name) for label in YES_NO}
        show_labels = len(checked) <= MOST_SHOWN_LABELS and not yes_no

    def question_about(text: str) -> _Question:
        question, input = (text, None) if instruction is None else (instruction, text)
        prompt = writer.encode(with_labels(question, checked) if show_labels else question, input)
        spellings = find_spellings(model.tokenizer, checked, prompt.ids, all_segmentations=all_segmentations)
        return _Question(prompt, spellings)

    def ask(text: object) -> _Question:
        try:
            return question_about(user_text("a text", text))
        except InvalidLabels as error:
            raise RowRejected("no_spelling", str(error)) from error

    try:
        question_about("?")  # what is wrong with labels or instruction is wrong with every row
    except RowRejected as error:
        raise InvalidRequest(f"instruction and labels cannot be asked: {error}") from error
    asked = map_rows(ask, texts)
    if method == "logits":
        masses = _masses_by_logits(model, asked, len(checked), adapter, progress)
    else:
        masses = _masses_by_samples(model, asked, len(checked), samples, seed, adapter, progress)
    return map_rows(
        lambda text, question, mass: _judgment(text, checked, mass, question, min_coverage), texts, asked, masses
    )


def _check_settings(
    instruction: object, min_coverage: object, all_segmentations: bool, method: object, samples: object, seed: object
) -> None:
    if instruction is not None and not (isinstance(instruction, str) and instruction.strip()):
        raise InvalidRequest(
            f"instruction is the question about every text, but got {instruction!r:.80}. Ask something, or use None."
        )
    if not isinstance(min_coverage, int | float) or not 0.0 <= min_coverage <= 1.0:
        raise InvalidRequest(
            f"min_coverage lies between 0 and 1, but got {min_coverage!r:.80}. Use 0 to never abstain."
        )
    if method not in get_args(Method):
        raise InvalidRequest(f"method is 'logits' or 'sampled', but got {method!r:.80}. Name one of them.")
    if not isinstance(samples, int) or not 1 <= samples <= MOST_SAMPLES:
        raise InvalidRequest(f"samples lies between 1 and {MOST_SAMPLES:,}, but got {samples!r:.80}. Use 10 to 100.")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InvalidRequest(f"seed is a whole number from 0 to 2**64 - 1, but got {seed!r:.80}. Use 0.")
    if method == "sampled" and all_segmentations:
        raise InvalidRequest(
            "all_segmentations reads logits, so method='sampled' has no use for it. Drop one of the two."
        )


@dataclass(frozen=True, slots=True)
class _Question:
    prompt: Prompt
    spellings: Spellings


def _masses_by_logits(
    model: LanguageModel,
    asked: Sequence[_Question | RowError],
    labels: int,
    adapter: str | None,
    progress: Progress | None,
) -> list[list[float] | RowError]:
    rows = map_rows(lambda question: ScoreRow(question.prompt.ids, question.spellings.trie, adapter), asked)
    return map_rows(
        lambda question, scores: question.spellings.log_masses(scores, labels),
        asked,
        run_rows(model.loglikelihood, rows, progress),
    )


def _masses_by_samples(
    model: LanguageModel,
    asked: Sequence[_Question | RowError],
    labels: int,
    samples: int,
    seed: int,
    adapter: str | None,
    progress: Progress | None,
) -> list[list[float] | RowError]:
    """Count labels among sampled responses, as people do it; its mean is what the logits say outright."""

    def draw(question: _Question, index: int) -> GenerateRow:
        sampling = Sampling(temperature=1.0, max_new_tokens=max(question.spellings.trie.depths()), seed=seed)
        return GenerateRow(question.prompt.ids, sampling, index, adapter)

    questions = [question for question in asked for _ in range(samples)]
    rows = map_rows(draw, questions, list(range(samples)) * len(asked))
    drawn = map_rows(
        lambda question, response: (question.spellings.label_of(response.token_ids),),
        questions,
        run_rows(model.generate, rows, progress, 1 / samples),
    )

    masses: list[list[float] | RowError] = []
    for place in range(len(asked)):
        found = drawn[place * samples : (place + 1) * samples]
        error = next((each for each in found if isinstance(each, RowError)), None)
        counts = [sum(each == (label,) for each in found) for label in range(labels)]
        masses.append(error or [math.log(count / samples) if count else -math.inf for count in counts])
    return masses


def _judgment(
    text: str,
    labels: tuple[Label, ...],
    masses: list[float],
    question: _Question,
    min_coverage: float,
) -> Judgment:
    total = log_sum(masses)
    names = [label.name for label in labels]
    coverage = min(math.exp(total), 1.0)
    if total == -math.inf:
        probabilities = [1.0 / len(names)] * len(names)
        reason: str | None = "no response began with a label, so nothing tells them apart"
    else:
        probabilities = [math.exp(mass - total) for mass in masses]
        below = coverage < min_coverage
        reason = f"coverage {coverage:.3g} is below min_coverage {min_coverage:.3g}" if below else None
    return Judgment(
        text=text,
        label=names[max(range(len(names)), key=probabilities.__getitem__)] if reason is None else None,
        probabilities=dict(zip(names, probabilities, strict=True)),
        coverage=coverage,
        reason=reason,
        escaped=question.prompt.escaped,
        notes=question.spellings.notes,
    )
