"""The flows `compare-texts`, `find-outliers` and `rate-texts`; `classify-texts` stands beside `judge-texts`."""

from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from alpaca_core import Judgment, ModelSpec, Outlier, Rating, RowError
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import OptionalText
from alpaca_core.uses import MOST_REFERENCES, outlier_question, pairs, rating_question
from prefect_alpaca import tasks
from prefect_alpaca.flows.judging import calibrated_by, saved_calibration
from prefect_alpaca.flows.report import bar, cell, inline, leave, quote, table
from prefect_alpaca.flows.terminal import columns
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.rows import counted


def _compare_name() -> str:
    return f"compare {counted(len(flow_run.get_parameters()['firsts']), 'pair')}"


@flow(name="compare-texts", flow_run_name=_compare_name, persist_result=True, result_serializer="json")
def compare_texts(
    firsts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "The company said its profit rose by a third.",
        "The company said its profit rose by a third.",
    ],
    seconds: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006
        "Profit grew by 33 percent, according to the company.",
        "The company will open three new shops in spring.",
    ],
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.0,
    calibration: OptionalText = None,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Judge whether the two texts of each pair mean the same, by the model's logits.

    Args:
        firsts: One text of each pair, one row each.
        seconds: The other text of each pair, in the same order.
        min_coverage: Give no label where yes and no had less of the model's probability than this.
        calibration: Name of a calibration that was saved for this model and question.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model compares.

    Returns:
        A `Judgment`, ``Yes`` or ``No``, or a `RowError` for each pair, as JSON.

    Raises:
        AlpacaError: If every pair failed, or the lists differ in length.
    """
    pairs(firsts, seconds)  # refuses lists that differ in length before a model is loaded
    calibrated = saved_calibration(calibration)
    status = tasks.load_model(model)
    judgments = tasks.values(
        Judgment,
        tasks.same_meaning(model, firsts, seconds, min_coverage=min_coverage, calibration=calibrated, adapter=adapter),
    )
    rows = list(zip(firsts, seconds, judgments, strict=True))
    leave(
        "compare-texts",
        f"Meaning of {counted(len(rows), 'pair')}",
        "Whether the texts of each pair mean the same, how probable that is, and the coverage: the model's mass on "
        "yes and no together.",
        status,
        calibrated_by(calibration, calibrated)
        + table(["Same meaning", "P(same)", "Coverage", "First", "Second"], [_pair_cells(*row) for row in rows]),
        [_pair_row(*row) for row in rows],
        judgments,
    )
    return [judgment.model_dump(mode="json") for judgment in judgments]


def _outliers_name() -> str:
    return f"look for outliers in {counted(len(flow_run.get_parameters()['rows']), 'row')}"


@flow(name="find-outliers", flow_run_name=_outliers_name, persist_result=True, result_serializer="json")
def find_outliers(
    rows: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "The soup was cold and the waiter rude.",
        "Lovely terrace, and the fish was the best I ever had.",
        "Restart the router, then hold the button for ten seconds.",
    ],
    reference: Annotated[list[str], Field(min_length=2, max_length=MOST_REFERENCES)] = [  # noqa: B006
        "Great pizza, friendly staff, we will be back.",
        "We waited an hour for a burger that was burnt.",
        "Small portions, but every dish was a delight.",
    ],
    calibration: OptionalText = None,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Find the rows that are of another kind than the reference rows, by the model's logits.

    Args:
        rows: What is judged, one row each.
        reference: Rows of one kind, 2 to 64 of them, which the model is shown with each row that it judges.
        calibration: Name of a calibration that was saved for this model and these reference rows.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model judges.

    Returns:
        An `Outlier` or a `RowError` for each row, in order, as JSON.

    Raises:
        AlpacaError: If every row failed, or the reference rows show nothing.
    """
    outlier_question(reference)  # refuses a reference that shows nothing before a model is loaded
    calibrated = saved_calibration(calibration)
    status = tasks.load_model(model)
    outliers = tasks.values(Outlier, tasks.is_outlier(model, rows, reference, calibration=calibrated, adapter=adapter))
    judged = list(enumerate(zip(rows, outliers, strict=True), 1))
    shown = "\n".join(f"- {inline(row)}" for row in reference)
    leave(
        "find-outliers",
        f"Outliers among {counted(len(rows), 'row')}",
        "How probably each row is of another kind than the reference rows, the likeliest outlier first.",
        status,
        f"{calibrated_by(calibration, calibrated)}The kind to be, by {counted(len(reference), 'row')}:\n\n{shown}\n\n"
        + table(
            ["Row", "P(outlier)", "Coverage", "Text"],
            [_outlier_cells(place, *row) for place, row in sorted(judged, key=lambda each: -_p_outlier(each[1][1]))],
        ),
        [{"row": place, **_outlier_row(*row)} for place, row in judged],
        outliers,
    )
    return [outlier.model_dump(mode="json") for outlier in outliers]


def _rate_name() -> str:
    return f"rate {counted(len(flow_run.get_parameters()['texts']), 'text')}"


@flow(name="rate-texts", flow_run_name=_rate_name, persist_result=True, result_serializer="json")
def rate_texts(
    texts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "The alpaca, wary at first, ate from the child's open hand.",
        "Alpaca it hand of child did eaten was good good.",
    ],
    criterion: str = "How fluent is this text?",
    worst: Annotated[int, Field(ge=0)] = 1,
    best: Annotated[int, Field(ge=1)] = 5,
    calibration: OptionalText = None,
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Rate texts on a scale by the mean of the model's probabilities of all its steps.

    Args:
        texts: What is rated, one row each.
        criterion: What counts, as a question about each text.
        worst: The lowest step of the scale.
        best: The highest step of the scale, at most 100 above the lowest.
        calibration: Name of a calibration that was saved for this model, criterion and scale.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model rates.

    Returns:
        A `Rating` or a `RowError` for each text, as JSON.

    Raises:
        AlpacaError: If every text failed, or the scale is none.
    """
    rating_question(criterion, worst, best)  # refuses a scale that is none before a model is loaded
    calibrated = saved_calibration(calibration)
    status = tasks.load_model(model)
    ratings = tasks.values(
        Rating,
        tasks.rate(model, texts, criterion, worst=worst, best=best, calibration=calibrated, adapter=adapter),
    )
    rows = list(zip(texts, ratings, strict=True))
    leave(
        "rate-texts",
        f"Ratings of {counted(len(rows), 'text')}",
        f"The score of each text from {worst} to {best}, the mean of the distribution beside it.",
        status,
        f"{quote(criterion)}\n\nFrom {worst} (worst) to {best} (best).\n\n{calibrated_by(calibration, calibrated)}"
        + table(["Score", f"{worst} to {best}", "Coverage", "Text"], [_rating_cells(*row) for row in rows]),
        [_rating_row(*row, range(worst, best + 1)) for row in rows],
        ratings,
    )
    return [rating.model_dump(mode="json") for rating in ratings]


def _pair_cells(first: str, second: str, judgment: Judgment | RowError) -> list[str]:
    texts = [cell(first), cell(second)]
    if isinstance(judgment, RowError):
        return [f"failed: {inline(judgment.code)}", "", "", *texts]
    share = bar(judgment.probabilities["Yes"]) if judgment.label else ""
    return [f"**{judgment.label}**" if judgment.label else "none", share, f"{judgment.coverage:.2g}", *texts]


def _pair_row(first: str, second: str, judgment: Judgment | RowError) -> Json:
    done = judgment if isinstance(judgment, Judgment) else None
    return {
        "first": cell(first),
        "second": cell(second),
        "same_meaning": done.label if done else None,
        "p_same": round(done.probabilities["Yes"], 4) if done else None,
        "coverage": float(f"{done.coverage:.3g}") if done else None,
        "error": inline(judgment.message) if isinstance(judgment, RowError) else None,
    }


def _p_outlier(outlier: Outlier | RowError) -> float:
    """What rows are sorted by: those of which nothing is known come last."""
    return outlier.p_outlier if isinstance(outlier, Outlier) and outlier.p_outlier is not None else -1.0


def _outlier_cells(place: int, text: str, outlier: Outlier | RowError) -> list[str]:
    if isinstance(outlier, RowError):
        return [str(place), f"failed: {inline(outlier.code)}", "", cell(text)]
    share = "unknown" if outlier.p_outlier is None else bar(outlier.p_outlier)
    return [str(place), share, f"{outlier.coverage:.2g}", cell(text)]


def _outlier_row(text: str, outlier: Outlier | RowError) -> Json:
    done = outlier if isinstance(outlier, Outlier) else None
    return {
        "text": cell(text),
        "p_outlier": round(done.p_outlier, 4) if done and done.p_outlier is not None else None,
        "coverage": float(f"{done.coverage:.3g}") if done else None,
        "error": inline(outlier.message) if isinstance(outlier, RowError) else None,
    }


def _rating_cells(text: str, rating: Rating | RowError) -> list[str]:
    if isinstance(rating, RowError):
        return [f"failed: {inline(rating.code)}", "", "", cell(text)]
    if rating.score is None:
        return ["none", "", f"{rating.coverage:.2g}", cell(text)]
    return [f"**{rating.score:.2f}**", columns(rating.distribution), f"{rating.coverage:.2g}", cell(text)]


def _rating_row(text: str, rating: Rating | RowError, scale: range) -> Json:
    done = rating if isinstance(rating, Rating) else None
    return {
        "text": cell(text),
        "score": round(done.score, 4) if done and done.score is not None else None,
        **{f"P({step})": round(done.distribution[str(step)], 4) if done else None for step in scale},
        "coverage": float(f"{done.coverage:.3g}") if done else None,
        "error": inline(rating.message) if isinstance(rating, RowError) else None,
    }
