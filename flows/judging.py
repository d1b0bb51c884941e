"""The flows `judge-texts` and `classify-texts`: labels with probabilities, routed by a policy where one is named."""

from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from prefect.exceptions import FlowPauseTimeout
from prefect.runtime import flow_run
from pydantic import Field

from alpaca_core import Calibration, Judgment, ModelSpec, Policy, RowError, prompts
from alpaca_core.errors import AlpacaError
from alpaca_core.judging import MOST_SAMPLES, Method
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import SEEDS, OptionalText, TemplateName
from prefect_alpaca import tasks
from prefect_alpaca.flows.options import Choices, label_name, label_of
from prefect_alpaca.flows.report import bar, cell, inline, leave, quote, table
from prefect_alpaca.flows.review import ask_person, leave_review, saved_policy
from prefect_alpaca.flows.routing import Routed, route, statement
from prefect_alpaca.flows.terminal import printable
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.named import load_named
from prefect_alpaca.tasks.rows import counted


def _judge_name() -> str:
    return f"judge {counted(len(flow_run.get_parameters()['texts']), 'text')}"


def _classify_name() -> str:
    return f"classify {counted(len(flow_run.get_parameters()['texts']), 'text')}"


@flow(name="judge-texts", flow_run_name=_judge_name, persist_result=True, result_serializer="json")
def judge_texts(
    texts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "The keeper saved two penalties, and the cup goes to the second division.",
        "Shares of the chip maker fell after it lowered its forecast.",
    ],
    labels: Choices = ["World", "Sports", "Business", "Technology"],  # noqa: B006
    instruction: OptionalText = "Classify this headline.",
    show_labels: bool | None = False,
    letters: bool = False,
    rotate_labels: bool = False,
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.0,
    calibration: OptionalText = None,
    method: Method = "logits",
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 10,
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0,
    policy: OptionalText = None,
    ask_a_person: bool = False,
    ask_timeout: Annotated[int, Field(ge=1)] = 3600,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Judge texts by the model's logits: a label, the probability of every label, and the coverage.

    Args:
        texts: What is judged, one row each.
        labels: The choices, one row each; other words that mean the same may follow, as in Yes=y,true.
        instruction: The question about each text; without one each text is the question itself.
        show_labels: Name the labels in the prompt, which large models need and small ones are led astray by.
        letters: Call the labels in the prompt A, B, C and so on, and read the letter.
        rotate_labels: Ask in every rotation of the labels in the prompt, and average, so that no order can matter.
        min_coverage: Give no label where all labels together had less of the model's probability than this.
        calibration: Name of a calibration that was saved for this model, question and labels.
        method: Read the logits, or draw samples in words and count.
        samples: How many samples of each text are drawn where the method is sampled.
        seed: Of the samples.
        policy: Name of a policy that was saved for judgments of this calibration: it accepts, reviews or abstains.
        ask_a_person: Pause the run until somebody has given the labels of the texts to be reviewed, 50 at once.
        ask_timeout: Seconds that the run waits for that each time, before it fails.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model judges.

    Returns:
        A `Judgment` or a `RowError` for each text, as JSON; with a policy a `Routed` judgment.

    Raises:
        AlpacaError: If every text failed, the labels cannot be told apart, the policy is for another
            calibration, or nobody answered in time.
    """
    choices = [label_of(label) for label in labels]
    calibrated = saved_calibration(calibration)
    routes = saved_policy(policy, calibrated, ask_a_person=ask_a_person)
    status = tasks.load_model(model)
    judgments = tasks.values(
        Judgment,
        tasks.judge(
            model,
            texts,
            choices,
            instruction=instruction,
            show_labels=show_labels,
            letters=letters,
            rotate_labels=rotate_labels,
            min_coverage=min_coverage,
            calibration=calibrated,
            method=method,
            samples=samples,
            seed=seed,
            adapter=adapter,
        ),
    )
    return _leave(
        "judge-texts",
        "Judgments",
        status,
        (f"{quote(instruction)}\n\n" if instruction else "")
        + calibrated_by(calibration, calibrated)
        + _routed_by(policy, routes),
        texts,
        judgments,
        [label_name(label) for label in choices],
        routes,
        ask_timeout if ask_a_person else None,
    )


@flow(name="classify-texts", flow_run_name=_classify_name, persist_result=True, result_serializer="json")
def classify_texts(
    texts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "My new card still has not come in the mail.",
        "How many euros do I get for a dollar?",
        "Somebody took my wallet with the card in it.",
    ],
    labels: Choices = [  # noqa: B006
        "card delivery",
        "lost or stolen card",
        "exchange rate",
        "top up",
    ],
    instruction: str = prompts.CLASSIFY,
    template: TemplateName = "raw",
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.0,
    calibration: OptionalText = None,
    policy: OptionalText = None,
    ask_a_person: bool = False,
    ask_timeout: Annotated[int, Field(ge=1)] = 3600,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Sort texts into categories, a few or hundreds, each of one word or several, by the model's logits.

    Args:
        texts: What is sorted, one row each.
        labels: The categories, one row each; other words that mean the same may follow, as in Yes=y,true.
        instruction: The prompt, with {text} where the text stands; it ends where a category is about to follow.
        template: How the prompt is put to the model, whatever its own way is; raw lets it go on with the prompt.
        min_coverage: Give no label where all labels together had less of the model's probability than this.
        calibration: Name of a calibration that was saved for this model, prompt and labels.
        policy: Name of a policy that was saved for judgments of this calibration: it accepts, reviews or abstains.
        ask_a_person: Pause the run until somebody has given the labels of the texts to be reviewed, 50 at once.
        ask_timeout: Seconds that the run waits for that each time, before it fails.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model sorts.

    Returns:
        A `Judgment` or a `RowError` for each text, as JSON; with a policy a `Routed` judgment.

    Raises:
        AlpacaError: If every text failed, the labels cannot be told apart, the policy is for another
            calibration, or nobody answered in time.
    """
    instruction = instruction if instruction.strip() else prompts.CLASSIFY
    choices = [label_of(label) for label in labels]
    calibrated = saved_calibration(calibration)
    routes = saved_policy(policy, calibrated, ask_a_person=ask_a_person)
    status = tasks.load_model(model)
    judgments = tasks.values(
        Judgment,
        tasks.classify(
            model,
            texts,
            choices,
            instruction=instruction,
            min_coverage=min_coverage,
            calibration=calibrated,
            template=template,
            adapter=adapter,
        ),
    )
    return _leave(
        "classify-texts",
        "Categories",
        status,
        (f"{quote(instruction)}\n\n" if instruction != prompts.CLASSIFY else "")
        + calibrated_by(calibration, calibrated)
        + _routed_by(policy, routes),
        texts,
        judgments,
        [label_name(label) for label in choices],
        routes,
        ask_timeout if ask_a_person else None,
    )


def saved_calibration(name: str | None) -> Calibration | None:
    """Return the calibration of a name, None for none.

    Raises:
        InvalidRequest: If there is none of that name.
    """
    return load_named(Calibration, name) if name else None


def calibrated_by(name: str | None, calibration: Calibration | None, calibrated: str = "Calibrated") -> str:
    """Say on a page which calibration made its probabilities, if any."""
    return f"{calibrated} by {inline(name)}, digest {calibration.digest[:12]}\n\n" if name and calibration else ""


def _routed_by(name: str | None, policy: Policy | None) -> str:
    return f"Policy {inline(name)}: {statement(policy)}\n\n" if name and policy else ""


def _leave(
    key: str,
    what: str,
    status: Json,
    head: str,
    texts: Sequence[str],
    judgments: Sequence[Judgment | RowError],
    names: Sequence[str],
    policy: Policy | None,
    ask_timeout: int | None,
) -> list[Json]:
    """Route the judgments, ask a person where that is wanted, leave page and tables, and return the rows."""
    rows: Sequence[Judgment | RowError] = judgments
    late: FlowPauseTimeout | None = None
    if policy:
        routed = route(judgments, policy)
        # before anybody is asked, who may want to read it
        leave_review(key, [(row, _routed_table_row(text, row, names)) for text, row in zip(texts, routed, strict=True)])
        if ask_timeout is not None:
            routed, late = ask_person(routed, ask_timeout)
        head += f"{_counts(routed)}\n\n"
        rows = routed
    shown, table_row = list(zip(texts, rows, strict=True)), _routed_table_row if policy else _table_row
    columns = ["Label", "Probability", "Coverage", *(["Action"] if policy else []), "Text"]
    leave(
        key,
        f"{what} of {counted(len(shown), 'text')}",
        "The label of each text, its probability, and the coverage: the model's mass on all labels together.",
        status,
        head + table(columns, [_cells(text, row, routed=policy is not None) for text, row in shown]),
        [table_row(text, row, names) for text, row in shown],
        rows,
    )
    if late:
        raise AlpacaError(
            f"nobody gave the labels of the texts to be reviewed within {ask_timeout} s. The page holds what there "
            "is; run again with a longer ask_timeout, or ask nobody."
        ) from late
    return [row.model_dump(mode="json") for row in rows]


def _counts(rows: Sequence[Routed | RowError]) -> str:
    actions = [row.action for row in rows if isinstance(row, Routed)]
    people = sum(isinstance(row, Routed) and row.decided_by == "person" for row in rows)
    said = f"**{actions.count('accept')} accepted, {actions.count('review')} to review, "
    return f"{said}{actions.count('abstain')} abstained**" + (f" · {people} labels by a person" if people else "")


def _cells(text: str, row: Judgment | RowError, *, routed: bool) -> list[str]:
    if isinstance(row, RowError):
        return [f"failed: {inline(row.code)}", "", "", *([""] if routed else []), cell(text)]
    label = f"**{cell(row.label)}**" if row.label else "none"
    share = bar(row.probabilities[row.label]) if row.label else ""
    action = []
    if isinstance(row, Routed):
        action = ["a person decided" if row.decided_by == "person" else row.action]
    return [label, share, f"{row.coverage:.2g}", *action, cell(text)]


def _table_row(text: str, row: Judgment | RowError, names: Sequence[str]) -> Json:
    done = row if isinstance(row, Judgment) else None
    return {
        "text": cell(text),
        "label": cell(done.label) if done and done.label else None,
        "coverage": float(f"{done.coverage:.3g}") if done else None,
        **{f"P({printable(name)})": round(done.probabilities[name], 4) if done else None for name in names},
        "error": inline(row.message) if isinstance(row, RowError) else None,
    }


def _routed_table_row(text: str, row: Judgment | RowError, names: Sequence[str]) -> Json:
    done = row if isinstance(row, Routed) else None
    return {
        "action": done.action if done else None,
        "confidence": round(done.confidence, 4) if done else None,
        "decided_by": done.decided_by if done else None,
        **_table_row(text, row, names),
    }
