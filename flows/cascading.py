"""The flow `cascade-texts`: judge by logits, reason about close texts only, and say what that saves."""

from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from pydantic import Field

from alpaca_core import CascadeJudgment, CascadeMeasurement, ModelSpec, RowError, Sampling, measure_cascade
from alpaca_core.cascading import MARGINS, CascadePoint
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.rows import column
from alpaca_core.spec import GREEDY, OptionalText
from prefect_alpaca import tasks
from prefect_alpaca.flows.judging import calibrated_by, saved_calibration
from prefect_alpaca.flows.options import Choices, check_gold, label_name, label_of
from prefect_alpaca.flows.report import bar, cell, inline, leave, quote, sections, table
from prefect_alpaca.flows.terminal import printable, savings
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.rows import counted


def _run_name() -> str:
    return f"cascade {counted(len(flow_run.get_parameters()['texts']), 'text')}"


@flow(name="cascade-texts", flow_run_name=_run_name, persist_result=True, result_serializer="json")
def cascade_texts(
    texts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "The keeper saved two penalties, and the cup goes to the second division.",
        "Shares of the chip maker fell after it lowered its forecast.",
    ],
    labels: Choices = ["World", "Sports", "Business", "Technology"],  # noqa: B006
    instruction: OptionalText = "Classify this headline.",
    show_labels: bool | None = False,
    margin: Annotated[float, Field(ge=0, le=1)] = 0.2,
    gold: list[str] | None = None,
    sampling: Sampling = GREEDY,
    calibration: OptionalText = None,
    reasoned_calibration: OptionalText = None,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Judge texts by the model's logits; think step by step about the close ones, and judge these again.

    Args:
        texts: What is judged, one row each.
        labels: The choices, one row each; other words that mean the same may follow, as in Yes=y,true.
        instruction: The question about each text; without one each text is the question itself.
        show_labels: Name the labels in all prompts, which large models need and small ones are led astray by.
        margin: Reason about a text whose top probability is less than this above the second; 1 is about all.
        gold: The right labels, in the order of the texts. With them all texts are reasoned about, and the page
            compares all margins; an empty list is none.
        sampling: How the tokens of a reasoning are chosen.
        calibration: Name of a calibration that was saved for the first judgment.
        reasoned_calibration: Name of a calibration that was saved for the judgment after a reasoning.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model judges and reasons.

    Returns:
        A `CascadeJudgment` or a `RowError` for each text, as JSON; with `gold` those of margin 1.

    Raises:
        AlpacaError: If every text failed, the labels cannot be told apart, or `gold` does not fit the texts.
    """
    gold = gold or None
    choices = [label_of(label) for label in labels]
    right = column("gold", gold, texts)
    check_gold(gold or [], choices)
    calibrated, recalibrated = saved_calibration(calibration), saved_calibration(reasoned_calibration)
    status = tasks.load_model(model)
    judgments = tasks.values(
        CascadeJudgment,
        tasks.cascade(
            model,
            texts,
            choices,
            margin=1.0 if gold else margin,
            sampling=sampling,
            instruction=instruction,
            show_labels=show_labels,
            calibration=calibrated,
            reasoned_calibration=recalibrated,
            adapter=adapter,
        ),
    )
    if gold and any(isinstance(judgment, CascadeJudgment) for judgment in judgments):
        measured = measure_cascade(judgments, gold, sorted({*MARGINS, margin}))
        about = "What a cascade of each margin does, against judging by logits only (0) and reasoning about all (1)."
        points = [point.model_dump(mode="json") for point in measured.points]
        create_table_artifact(points, key="cascade-texts-margins", description=about)
        summary = _compared(measured, margin)
    else:
        summary = f"**{savings(judgments)}.** Right labels, as `gold`, give exact figures for every margin."
    rows = list(zip(texts, judgments, right, strict=True))
    leave(
        "cascade-texts",
        f"Cascade of {counted(len(rows), 'text')}",
        "The label of each text, its probability, whether it took a reasoning, and the label before that.",
        status,
        (f"{quote(instruction)}\n\n" if instruction else "")
        + calibrated_by(calibration, calibrated)
        + calibrated_by(reasoned_calibration, recalibrated, "After a reasoning calibrated")
        + f"{summary}\n\n"
        + table(
            ["Row", "Label", "Probability", "Judged", "First label", "Text"],
            [_cells(place, text, judgment) for place, (text, judgment, _) in enumerate(rows, 1)],
        )
        + _reasonings(judgments),
        [_table_row(*row, [label_name(label) for label in choices]) for row in rows],
        judgments,
    )
    return [judgment.model_dump(mode="json") for judgment in judgments]


def _compared(measured: CascadeMeasurement, margin: float) -> str:
    """Compare margins, the one that the run was given in bold."""
    named = {0.0: "0: logits only", 1.0: "1: reasoning about all"}

    def cells(point: CascadePoint) -> list[str]:
        name = named.get(point.margin, f"{point.margin:g}")
        saved = f" ({point.tokens_saved / measured.tokens:.0%})" if measured.tokens else ""
        return [
            f"**{name}**" if point.margin == margin else name,
            f"{point.reasoned:.0%}",
            f"{point.tokens:,}",
            f"{point.tokens_saved:,}{saved}",
            f"{point.accuracy:.3f}",
            f"{point.accuracy - measured.reasoned_accuracy:+.3f}",
        ]

    headings = ["Margin", "Reasoned about", "Tokens", "Tokens saved", "Accuracy", "Against reasoning about all"]
    return (
        f"**All texts were reasoned about, in {counted(measured.tokens, 'token')}, so these figures are exact "
        f"for the {counted(measured.n, 'text')} that could be judged:**\n\n"
        + table(headings, [cells(point) for point in measured.points])
    )


def _cells(place: int, text: str, row: CascadeJudgment | RowError) -> list[str]:
    if isinstance(row, RowError):
        return [str(place), f"failed: {inline(row.code)}", "", "", "", cell(text)]
    label = f"**{cell(row.label)}**" if row.label else "none"
    share = bar(row.probabilities[row.label]) if row.label else ""
    how = "by logits" if row.reasoning is None else "reasoned"
    return [str(place), label, share, how, _said(row.first_label, row.first), cell(text)]


def _said(label: str | None, probabilities: dict[str, float]) -> str:
    return f"{cell(label)} {probabilities[label]:.2f}" if label else "none"


def _reasonings(rows: Sequence[CascadeJudgment | RowError]) -> str:
    """Quote the reasonings, each under its text and the number of its row."""
    numbers, parts = [], []
    for place, row in enumerate(rows, 1):
        if isinstance(row, CascadeJudgment) and row.reasoning is not None:
            change = f"{_said(row.first_label, row.first)} → **{_said(row.label, row.probabilities)}**"
            numbers.append(place)
            parts.append((row.text, f"{change}\n\n{quote(row.reasoning) or '*The reasoning is blank.*'}"))
    return f"\n\n## Reasonings\n\n{sections(parts, numbers)}" if parts else ""


def _table_row(text: str, row: CascadeJudgment | RowError, right: str | None, names: Sequence[str]) -> Json:
    done = row if isinstance(row, CascadeJudgment) else None
    return {
        "text": cell(text),
        **({"right_label": cell(right)} if right is not None else {}),
        "label": cell(done.label) if done and done.label else None,
        "reasoned": done.reasoning is not None if done else None,
        "reasoning_tokens": done.reasoning_tokens if done else None,
        "first_label": cell(done.first_label) if done and done.first_label else None,
        "coverage": float(f"{done.coverage:.3g}") if done else None,
        **{f"P({printable(name)})": round(done.probabilities[name], 4) if done else None for name in names},
        "error": inline(row.message) if isinstance(row, RowError) else None,
    }
