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
    Answer,
    Judgment,
    LanguageModel,
    RowError,
    Sampling,
    answer,
    cascade,
    decide,
    fit_calibration,
    fit_display,
    fit_policy,
    is_outlier,
    judge,
    measure_cascade,
    measure_order,
    rate,
)
from alpaca_core.cascading import reasoned_question, reasoned_texts
from alpaca_core.consistency import normal_form
from alpaca_core.fitting import PRIDE_ROWS
from alpaca_core.spec import Value

Rows = list[dict[str, Any]]

DRAWS, DRAWN = 200, 500
"""Policies that are fitted, and labelled rows that each is fitted on."""
PRECISION, CONFIDENCE = 0.9, 0.95
REASONING, SAMPLES = 96, 5
"""Tokens of a reasoning, and samples that vote."""
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
    areas: list[float | None] = []
    for topic in TOPICS:
        own = texts[topic][EXAMPLES : EXAMPLES + rows]
        others = [text for other in TOPICS if other != topic for text in texts[other][: rows // 3]]
        judged = is_outlier(model, [*own, *others], texts[topic][:EXAMPLES])
        areas.append(_area([False] * len(own) + [True] * len(others), judged, "p_outlier"))
    return float(numpy.mean([area for area in areas if area is not None]))


def ratings(model: LanguageModel, data: Path, rows: int) -> float | None:
    """The AUROC of the score of GSM8K solutions: whether right ones are rated higher."""
    some = random.Random(0).sample(rows_of(data / "gsm8k_solutions_dev.jsonl"), rows)
    texts = [f"Question: {row['question']}\nSolution: {row['solution']}" for row in some]
    rated = rate(model, texts, "How correct is this solution?")
    return _area([row["is_correct"] for row in some], rated, "score")


def cascades(model: LanguageModel, task: Task, data: Path, fit: int, rows: int) -> dict[str, Any]:
    """What reasoning about close rows only does, at every margin, from one run that reasons about all."""
    texts, gold = shuffled(task, data)
    known, judged = slice(fit), slice(fit, fit + rows)
    question = {name: value for name, value in task.question.items() if name in ("instruction", "show_labels")}
    sampling = Sampling(max_new_tokens=REASONING)
    calibration = fit_calibration(model, texts[known], task.labels, gold[known], **question)
    settings: dict[str, Any] = {"margin": 1.0, "sampling": sampling, **question}
    reasoned = reasoned_texts(cascade(model, texts[known], task.labels, **settings))
    again = {**question, "instruction": reasoned_question(question.get("instruction"))}
    second = fit_calibration(model, reasoned, task.labels, gold[known], **again)
    run = cascade(model, texts[judged], task.labels, calibration=calibration, reasoned_calibration=second, **settings)
    return {"set": task.name, **measure_cascade(run, gold[judged]).model_dump(mode="json")}


def consistency(model: LanguageModel, data: Path, rows: int) -> dict[str, Any]:
    """Share of right answers on MultiArith: at once, after reasoning, and by a vote of samples."""
    some = random.Random(0).sample(rows_of(data / "multiarith_dev.jsonl"), rows)
    questions, right = [row["question"] for row in some], [normal_form(str(row["answer"])) for row in some]
    greedy, warm = Sampling(max_new_tokens=REASONING), Sampling(temperature=0.7, max_new_tokens=REASONING)
    ways: dict[str, dict[str, Any]] = {
        "at once": {"sampling": greedy, "reason": False, "verify": True},
        "reasoned": {"sampling": greedy},
        f"{SAMPLES} samples, shares alone": {"sampling": warm, "samples": SAMPLES, "verify": False},
        f"{SAMPLES} samples, P(correct) too": {"sampling": warm, "samples": SAMPLES},
    }
    found = {}
    for way, settings in ways.items():
        answers = answer(model, questions, **settings)
        hits = [isinstance(row, Answer) and _number_in(row) == label for row, label in zip(answers, right, strict=True)]
        sure = [(hit, row) for hit, row in zip(hits, answers, strict=True) if isinstance(row, Answer)]
        found[way] = {
            "accuracy": sum(hits) / len(hits),
            "auroc_p_correct": _area([hit for hit, _ in sure], [row for _, row in sure], "p_correct"),
            "auroc_share": _area([hit for hit, _ in sure], [row for _, row in sure], "share"),
        }
    return {"rows": len(some), **found}


def _number_in(row: Answer) -> str | None:
    """The answer without what it counts: 10 of `10 pierogi`."""
    return normal_form(row.final_answer).split(" ")[0] if row.final_answer else None


def _area(positive: Sequence[bool], results: Sequence[Value | RowError], field: str) -> float | None:
    known = [
        (right, value)
        for right, row in zip(positive, results, strict=True)
        if (value := getattr(row, field, None)) is not None
    ]
    if len({right for right, _ in known}) < 2:
        return None  # nothing to tell apart
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
