"""The flow `judge-texts`: which label each text gets, how probable, and how much of the model's mass labels had."""

from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from alpaca_core import Calibration, Judgment, ModelSpec, RowError
from alpaca_core.judging import MOST_SAMPLES, Method
from alpaca_core.model import DEFAULT_ADAPTER
from prefect_alpaca import tasks
from prefect_alpaca.flows.options import label_name, label_of
from prefect_alpaca.flows.report import bar, cell, inline, leave, quote, table
from prefect_alpaca.flows.terminal import printable
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.named import load_named
from prefect_alpaca.tasks.rows import counted


def _run_name() -> str:
    return f"judge {counted(len(flow_run.get_parameters()['texts']), 'text')}"


@flow(name="judge-texts", flow_run_name=_run_name, persist_result=True, result_serializer="json")
def judge_texts(
    texts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "The keeper saved two penalties, and the cup goes to the second division.",
        "Shares of the chip maker fell after it lowered its forecast.",
    ],
    labels: Annotated[list[str], Field(min_length=2)] = ["World", "Sports", "Business", "Technology"],  # noqa: B006
    instruction: str | None = "Classify this headline.",
    show_labels: bool | None = False,
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.0,
    calibration: str | None = None,
    method: Method = "logits",
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 10,
    seed: Annotated[int, Field(ge=0)] = 0,
    adapter: str | None = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Judge texts by the model's logits: a label, the probability of every label, and the coverage.

    Args:
        texts: What is judged, one row each.
        labels: The choices, one row each; other words that mean the same may follow, as in Yes=y,true.
        instruction: The question about each text; without one each text is the question itself.
        show_labels: Name the labels in the prompt, which large models need and small ones are led astray by.
        min_coverage: Give no label where all labels together had less of the model's probability than this.
        calibration: Name of a calibration that was saved for this model, question and labels.
        method: Read the logits, or draw samples in words and count.
        samples: How many samples of each text are drawn where the method is sampled.
        seed: Of the samples.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model judges.

    Returns:
        A `Judgment` or a `RowError` for each text, as JSON.

    Raises:
        AlpacaError: If every text failed, or the labels cannot be told apart.
    """
    instruction = instruction if instruction and instruction.strip() else None  # a form sends an emptied field as ""
    choices = [label_of(label) for label in labels]
    names = [label_name(label) for label in choices]
    calibrated = load_named(Calibration, calibration) if calibration else None
    status = tasks.load_model(model)
    judgments = tasks.values(
        Judgment,
        tasks.judge(
            model,
            texts,
            choices,
            instruction=instruction,
            show_labels=show_labels,
            min_coverage=min_coverage,
            calibration=calibrated,
            method=method,
            samples=samples,
            seed=seed,
            adapter=adapter,
        ),
    )
    rows = list(zip(texts, judgments, strict=True))
    leave(
        "judge-texts",
        f"Judgments of {counted(len(rows), 'text')}",
        "The label of each text, its probability, and the coverage: the model's mass on all labels together.",
        status,
        (f"{quote(instruction)}\n\n" if instruction else "")
        + (
            f"Calibrated by {inline(calibration)}, digest {calibrated.digest[:12]}\n\n"
            if calibration and calibrated
            else ""
        )
        + table(["Label", "Probability", "Coverage", "Text"], [_cells(text, judgment) for text, judgment in rows]),
        [_table_row(text, judgment, names) for text, judgment in rows],
        judgments,
    )
    return [judgment.model_dump(mode="json") for judgment in judgments]


def _cells(text: str, judgment: Judgment | RowError) -> list[str]:
    if isinstance(judgment, RowError):
        return [f"failed: {inline(judgment.code)}", "", "", cell(text)]
    if judgment.label is None:
        return ["none", "", f"{judgment.coverage:.2g}", cell(text)]
    share = bar(judgment.probabilities[judgment.label])
    return [f"**{cell(judgment.label)}**", share, f"{judgment.coverage:.2g}", cell(text)]


def _table_row(text: str, judgment: Judgment | RowError, names: list[str]) -> Json:
    done = judgment if isinstance(judgment, Judgment) else None
    return {
        "text": cell(text),
        "label": cell(done.label) if done and done.label else None,
        "coverage": round(done.coverage, 4) if done else None,
        **{f"P({printable(name)})": round(done.probabilities[name], 4) if done else None for name in names},
        "error": inline(judgment.message) if isinstance(judgment, RowError) else None,
    }
