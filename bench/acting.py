"""Measure what people act on: the order of labels, stated precision, outliers, ratings. Run by `bench/judging.py`."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import binomtest
from sets import ASKED, TOPICS, Task, rows_of, shuffled
from sklearn.metrics import roc_auc_score

from alpaca_core import (
    Judgment,
    LanguageModel,
    RowError,
    decide,
    fit_calibration,
    fit_display,
    fit_policy,
    is_outlier,
    judge,
    measure_order,
    rate,
)
from alpaca_core.fitting import PRIDE_ROWS
from alpaca_core.spec import Value

Rows = list[dict[str, Any]]

DRAWS, DRAWN = 200, 500
"""Policies that are fitted, and labelled rows that each is fitted on."""
PRECISION, CONFIDENCE = 0.9, 0.95
EXAMPLES = 8
"""Rows of one topic that outliers are held against."""


def order(model: LanguageModel, task: Task, data: Path, fit: int, rows: int) -> Rows:
    """How often the order of the labels decides, by how the prompt names them and what is done about it."""
    texts, gold = shuffled(task, data)
    known, judged, right = texts[:fit], texts[fit : fit + rows], gold[fit : fit + rows]
    display = fit_display(model, known, TOPICS, gold[:fit], **ASKED)
    found: Rows = []

    def add(way: str, what: str, flips: dict[str, float | None], cost: float, **question: Any) -> None:
        answers = judge(model, judged, TOPICS, **ASKED, **question)
        share = _accuracy(answers, right)
        nll = display.considered[way]
        found.append({"labels": way, "what": what, "flips": flips, "cost": cost, "accuracy": share, "nll": nll})

    add("hidden", "none", {"value": 0.0}, 1.0, show_labels=False)
    for way, letters in (("names", False), ("letters", True)):
        question: dict[str, Any] = {"show_labels": True, "letters": letters}
        pride = fit_calibration(model, known, TOPICS, method="pride", **ASKED, **question)
        for what, calibration in (("none", None), ("pride", pride)):
            effect = measure_order(model, judged, TOPICS, calibration=calibration, **ASKED, **question)
            cost = 1.0 if calibration is None else 1.0 + min(fit, PRIDE_ROWS) * len(TOPICS) / len(judged)
            add(way, what, effect.flip_rate.model_dump(), cost, calibration=calibration, **question)
        add(way, "rotate_labels", {"value": 0.0}, float(len(TOPICS)), rotate_labels=True, **question)
    return found


def precision(model: LanguageModel, data: Path, task: Task, fit: int, rows: int) -> dict[str, Any]:
    """How often a policy keeps its word: fitted on resamples of the rows, checked on all of them."""
    texts, gold = shuffled(task, data)
    fitted = fit_calibration(model, texts[:fit], task.labels, gold[:fit], **task.question)
    answers = judge(model, texts[fit : fit + rows], task.labels, calibration=fitted, **task.question)
    people = [(row, right) for row, right in zip(answers, gold[fit : fit + rows], strict=True) if _good(row)]
    kept, shares, accepted_none = 0, [], 0
    for draw in range(DRAWS):
        drawn = random.Random(draw).choices(people, k=DRAWN)
        policy = fit_policy(
            [row for row, _ in drawn], [right for _, right in drawn], precision=PRECISION, confidence=CONFIDENCE
        )
        decisions = decide([row for row, _ in people], policy)
        hits = [
            decision.label == right
            for decision, (_, right) in zip(decisions, people, strict=True)
            if not isinstance(decision, RowError) and decision.action == "accept"
        ]
        kept += not hits or sum(hits) / len(hits) >= PRECISION
        accepted_none += not hits
        shares.append(len(hits) / len(people))
    return {
        "set": task.name,
        "rows": len(people),
        "draws": DRAWS,
        "kept": kept / DRAWS,
        "p_value": float(binomtest(kept, DRAWS, CONFIDENCE, alternative="less").pvalue),
        "accepted": float(numpy.mean(shares)),
        "accepted_none": accepted_none / DRAWS,
    }


def outliers(model: LanguageModel, data: Path, rows: int) -> float:
    """The mean AUROC of P(outlier) over the topics of AG News, half of the rows from other topics."""
    texts: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for row in random.Random(0).sample(found := rows_of(data / "agnews_dev.jsonl"), len(found)):
        texts[row["label"]].append(str(row["title"]))
    areas = []
    for topic in TOPICS:
        own = texts[topic][EXAMPLES : EXAMPLES + rows]
        others = [text for other in TOPICS if other != topic for text in texts[other][: rows // 3]]
        judged = is_outlier(model, [*own, *others], texts[topic][:EXAMPLES])
        areas.append(_area([False] * len(own) + [True] * len(others), judged, "p_outlier"))
    return float(numpy.mean(areas))


def ratings(model: LanguageModel, data: Path, rows: int) -> float:
    """The AUROC of the score of GSM8K solutions: whether right ones are rated higher."""
    some = random.Random(0).sample(rows_of(data / "gsm8k_solutions_dev.jsonl"), rows)
    texts = [f"Question: {row['question']}\nSolution: {row['solution']}" for row in some]
    rated = rate(model, texts, "How correct is this solution?")
    return _area([row["is_correct"] for row in some], rated, "score")


def _area(positive: Sequence[bool], results: Sequence[Value | RowError], field: str) -> float:
    known = [
        (right, value)
        for right, row in zip(positive, results, strict=True)
        if (value := getattr(row, field, None)) is not None
    ]
    return float(roc_auc_score(*zip(*known, strict=True)))


def _good(row: Judgment | RowError) -> bool:
    return isinstance(row, Judgment) and row.label is not None


def _accuracy(answers: Sequence[Judgment | RowError], right: Sequence[str]) -> float:
    return sum(
        isinstance(row, Judgment) and row.label == label for row, label in zip(answers, right, strict=True)
    ) / len(right)


def order_table(found: Rows) -> str:
    """Write the figures of `order` as a Markdown table."""
    lines = ["| labels in the prompt | against order | flips | cost | accuracy |", "|---|---|---|---|---|"]
    for row in found:
        flips = row["flips"]
        spread = f" [{flips['low']:.3f}, {flips['high']:.3f}]" if flips.get("low") is not None else ""
        lines.append(
            f"| {row['labels']} | {row['what']} | {flips['value']:.3f}{spread} | {row['cost']:.2f}x "
            f"| {row['accuracy']:.3f} |"
        )
    return "\n".join(lines)
