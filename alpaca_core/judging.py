"""Judge by logits: the probability of each label, read from the model and not from sampled text."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from alpaca_core.asking import Asked, Asking
from alpaca_core.calibration import Calibration, check_calibration
from alpaca_core.errors import InvalidRequest, brief
from alpaca_core.labels import log_sum
from alpaca_core.model import DEFAULT_ADAPTER, GenerateRow, LanguageModel, RowError, Scores, shapes_of
from alpaca_core.rows import Progress, check_rows, map_rows, run_rows
from alpaca_core.spec import SEEDS, YES_NO, Label, Sampling, TemplateName, Value

MOST_SAMPLES = 10_000
"""Responses that ``sampled`` draws for one text."""

Method = Literal["logits", "sampled"]


class Judgment(Value):
    """How probable each label is for a text.

    `label` is the likeliest, or None where the judgment abstains, and `reason` says why. `probabilities`
    sum to 1; `coverage` is the mass that all labels had together before that, at most 1. `calibration` is
    the digest of the calibration that made the probabilities, None for the model's own. `escaped` says
    that a line of the text that equalled a template's marker got a leading space. `notes` name spellings
    that were dropped because they would mean two labels. `shape` is that of the model's passes, as in `Completion`.
    """

    text: str
    label: str | None
    probabilities: dict[str, float]
    coverage: float
    calibration: str | None = None
    reason: str | None = None
    escaped: bool = False
    notes: tuple[str, ...] = ()
    shape: str = ""


def judge(
    model: LanguageModel,
    texts: Sequence[str | RowError],
    labels: Sequence[str | Label] = YES_NO,
    *,
    instruction: str | None = None,
    show_labels: bool | None = None,
    letters: bool = False,
    rotate_labels: bool = False,
    min_coverage: float = 0.0,
    all_segmentations: bool = False,
    calibration: Calibration | None = None,
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
        instruction: The question about every text, which is then its input, or stands where it says ``{text}``.
        show_labels: Whether the prompt names the labels; by default where there are at most 20 and they
            are not yes and no.
        letters: Whether the prompt calls the labels A, B, C …, and the response is a letter.
        rotate_labels: Ask in every rotation of the labels that the prompt names, and average: exactly free of
            their order, at ``len(labels)`` times the cost (Zheng et al. 2024, arXiv 2309.03882, section 2).
            The calibration ``pride`` is nearly as good for a twentieth more.
        min_coverage: Abstain below this coverage, between 0 and 1. Coverage is no measure of being right:
            on AG News the embedded model had 70 % of the topics right at a mean coverage of 0.005.
        all_segmentations: Count every way to cut a label into tokens, up to `labels.MAX_NODES`.
        calibration: From `fit_calibration`, for this model, question and labels.
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
    _check_settings(min_coverage, all_segmentations or rotate_labels, method, samples, seed)
    asking = Asking(
        model,
        labels,
        instruction=instruction,
        show_labels=show_labels,
        letters=letters,
        rotate_labels=rotate_labels,
        all_segmentations=all_segmentations,
        template=template,
        adapter=adapter,
    )
    if calibration is not None and method == "sampled":
        raise InvalidRequest("a calibration is of logits, so method='sampled' has no use for it. Drop one of the two.")
    check_calibration(calibration, asking.binding())
    digest = calibration.digest if calibration else None
    asked = asking.about_each(texts)
    if method == "logits":
        masses = asking.read(texts, adapter, progress, asked)
    else:
        masses = _masses_by_samples(model, asked, len(asking.labels), samples, seed, adapter, progress)
    return map_rows(
        lambda text, each, mass: _judgment(text, asking.names, mass, each, min_coverage, calibration, digest),
        texts,
        asked,
        masses,
    )


def _check_settings(min_coverage: object, reads_logits: bool, method: object, samples: object, seed: object) -> None:
    if not isinstance(min_coverage, int | float) or not 0.0 <= min_coverage <= 1.0:
        raise InvalidRequest(
            f"min_coverage lies between 0 and 1, but got {min_coverage!r:.80}. Use 0 to never abstain."
        )
    if method not in get_args(Method):
        raise InvalidRequest(f"method is 'logits' or 'sampled', but got {method!r:.80}. Name one of them.")
    if not isinstance(samples, int) or not 1 <= samples <= MOST_SAMPLES:
        raise InvalidRequest(f"samples lies between 1 and {MOST_SAMPLES:,}, but got {brief(samples)}. Use 10 to 100.")
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise InvalidRequest(f"seed is a whole number from 0 to 2**64 - 1, but got {brief(seed)}. Use 0.")
    if method == "sampled" and reads_logits:
        raise InvalidRequest(
            "all_segmentations and rotate_labels read logits, so method='sampled' has no use for them. "
            "Drop one of the two."
        )


def _masses_by_samples(
    model: LanguageModel,
    asked: Sequence[Asked | RowError],
    labels: int,
    samples: int,
    seed: int,
    adapter: str | None,
    progress: Progress | None,
) -> list[list[float] | RowError]:
    """Count labels among sampled responses, as people do it; its mean is what the logits say outright."""

    def draw(each: Asked, index: int) -> GenerateRow:
        sampling = Sampling(temperature=1.0, max_new_tokens=each.spellings.trie.deepest, seed=seed)
        return GenerateRow(each.prompt.ids, sampling, index, adapter)

    repeated = [each for each in asked for _ in range(samples)]
    rows = map_rows(draw, repeated, list(range(samples)) * len(asked))
    drawn = map_rows(
        lambda each, response: (each.spellings.label_of(response.token_ids), response),
        repeated,
        run_rows(model.generate, rows, progress, 1 / samples),
    )

    masses: list[list[float] | RowError] = []
    for place in range(len(asked)):
        found = drawn[place * samples : (place + 1) * samples]
        error = next((each for each in found if isinstance(each, RowError)), None)
        if error:
            masses.append(error)
            continue
        good = [each for each in found if not isinstance(each, RowError)]
        counts = [sum(each == label for each, _ in good) for label in range(labels)]
        shapes = shapes_of(*(response for _, response in good))
        masses.append(Scores((math.log(count / samples) if count else -math.inf for count in counts), shapes))
    return masses


def _judgment(
    text: str,
    names: tuple[str, ...],
    masses: list[float],
    asked: Asked,
    min_coverage: float,
    calibration: Calibration | None,
    digest: str | None,
) -> Judgment:
    total = log_sum(masses)
    coverage = min(math.exp(total), 1.0)
    if total == -math.inf:
        reason: str | None = "no response began with a label, so nothing tells them apart"
    else:
        below = coverage < min_coverage
        reason = f"coverage {coverage:.3g} is below min_coverage {min_coverage:.3g}" if below else None
    scores = calibration.apply(masses) if calibration and total > -math.inf else [mass - total for mass in masses]
    probabilities = [1.0 / len(names)] * len(names) if total == -math.inf else [math.exp(score) for score in scores]
    return Judgment(
        text=text,
        label=names[max(range(len(names)), key=probabilities.__getitem__)] if reason is None else None,
        probabilities=dict(zip(names, probabilities, strict=True)),
        coverage=coverage,
        calibration=digest,
        reason=reason,
        escaped=asked.prompt.escaped,
        notes=asked.spellings.notes,
        shape=shapes_of(masses),
    )
