"""Measure the judge on labelled sets: raw, with each calibration, and with the one that is chosen.

    python bench/judging.py --data FOLDER --out figures.json

FOLDER holds JSON Lines: ``agnews_dev.jsonl`` (label, title, text), ``banking77_dev.jsonl`` (text, category),
``msrp_dev.jsonl`` (is_paraphrase, sentence1, sentence2), ``gsm8k_solutions_dev.jsonl`` (question, solution,
is_correct). Rows are shuffled by a fixed seed; calibrations are fitted on the first `--fit` of them, and all is
measured on the next `--rows`.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca_core import (
    Calibration,
    Judgment,
    Label,
    LanguageModel,
    Measurement,
    ModelSpec,
    RowError,
    fit_calibration,
    judge,
    load_model,
    measure,
    prompts,
)
from alpaca_core.spec import YES_NO
from alpaca_core.uses import pairs

METHODS = ("none", "contextual", "batch", "temperature", "vector")
COMPLETION = {"instruction": prompts.CLASSIFY, "template": "raw", "show_labels": False}
ASKED = {"instruction": "Classify this article."}
TOPICS = ("World", "Sports", "Business", "Technology")
TOPICS_WITH_ALIASES = (
    Label(name="World", aliases=("Politics", "International")),
    Label(name="Sports", aliases=("Sport", "Football")),
    Label(name="Business", aliases=("Finance", "Economy")),
    Label(name="Technology", aliases=("Science", "Internet")),
)


@dataclass(frozen=True)
class Task:
    """A labelled set as a question."""

    name: str
    file: str
    text: Callable[[dict[str, Any]], str]
    gold: Callable[[dict[str, Any]], str]
    labels: Sequence[str | Label] = YES_NO
    question: dict[str, Any] = field(default_factory=dict)


def _article(row: dict[str, Any]) -> str:
    return f"{row['title']}. {row['text']}"


def _solution(row: dict[str, Any]) -> str:
    return prompts.VERIFY.format(question=row["question"], answer=row["solution"])


def _pair(row: dict[str, Any]) -> str:
    return str(pairs([row["sentence1"]], [row["sentence2"]])[0])


def _yes(field: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "Yes" if row[field] else "No"


def _intent(row: dict[str, Any]) -> str:
    return str(row["category"]).replace("_", " ")


def tasks(data: Path) -> list[Task]:
    """Return the sets; the intents of banking77 are those that occur in its file."""
    intents = sorted({_intent(row) for row in _rows(data / "banking77_dev.jsonl")})
    ag, pair = "agnews_dev.jsonl", {"instruction": prompts.SAME_MEANING}
    return [
        Task("AG News", ag, _article, lambda row: row["label"], TOPICS, COMPLETION),
        Task("AG News, aliases", ag, _article, lambda row: row["label"], TOPICS_WITH_ALIASES, COMPLETION),
        Task(
            "AG News, asked", ag, _article, lambda row: row["label"], TOPICS, {"instruction": "Classify this article."}
        ),
        Task("MSRP", "msrp_dev.jsonl", _pair, _yes("is_paraphrase"), question=pair),
        Task("GSM8K solutions", "gsm8k_solutions_dev.jsonl", _solution, _yes("is_correct")),
        Task("banking77", "banking77_dev.jsonl", lambda row: row["text"], _intent, intents, COMPLETION),
    ]


def run(model: LanguageModel, task: Task, data: Path, fit: int, rows: int) -> dict[str, Any]:
    """Measure one set, raw and calibrated."""
    shuffled = random.Random(0).sample(found := _rows(data / task.file), len(found))
    texts, gold = [task.text(row) for row in shuffled], [task.gold(row) for row in shuffled]
    known, judged = slice(fit), slice(fit, fit + rows)
    started = time.perf_counter()
    raw = judge(model, texts[judged], task.labels, **task.question)
    seconds = time.perf_counter() - started
    results = {}
    for method in (*METHODS, None):
        fitted = fit_calibration(
            model,
            texts[known],
            task.labels,
            gold[known],
            method=method,
            **task.question,  # type: ignore[arg-type]
        )
        measured = measure([_calibrated(row, fitted) for row in raw], gold[judged], resamples=500)
        results[method or "chosen"] = {"reason": fitted.reason, "took": fitted.method, **_figures(measured)}
        print(task.name, method or f"chosen: {fitted.method}", measured.accuracy, flush=True)
    return {"rows": len(raw), "fit": fit, "items_per_second": len(raw) / seconds, "methods": results}


def _calibrated(row: Judgment | RowError, calibration: Calibration) -> Judgment | RowError:
    """What `judge` would have said with the calibration; a judgment holds all that this takes."""
    if isinstance(row, RowError) or row.label is None:
        return row
    scores = calibration.apply([math.log(share) if share else -math.inf for share in row.probabilities.values()])
    shares = dict(zip(row.probabilities, map(math.exp, scores), strict=True))
    return row.model_copy(update={"probabilities": shares, "label": max(shares, key=shares.__getitem__)})


def _figures(measured: Measurement) -> dict[str, Any]:
    kept = {"n", "failed", "accuracy", "auroc", "ece", "nll", "brier", "ece_if_calibrated", "coverage"}
    return measured.model_dump(mode="json", include=kept)


def table(figures: dict[str, Any]) -> str:
    """Write the figures as a Markdown table."""
    lines = ["| set, rows, items/s | calibration | accuracy | AUROC | ECE | if calibrated | NLL | median coverage |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, found in figures["sets"].items():
        for method, row in found["methods"].items():
            calibration = f"**chosen: {row['took']}**" if method == "chosen" else method
            cells = [
                f"{name}, {found['rows']:,}, {found['items_per_second']:.0f}" if method == METHODS[0] else "",
                calibration,
                *(_written(row[measure]) for measure in ("accuracy", "auroc", "ece")),
                f"{row['ece_if_calibrated']:.3f}",
                f"{row['nll']['value']:.3f}",
                f"{row['coverage']['50%']:.2g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(estimate: dict[str, float | None]) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=ModelSpec().base_model)
    parser.add_argument("--fit", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--only", help="names of sets, separated by semicolons")
    options = parser.parse_args()
    spec = ModelSpec(base_model=options.model, dtype="float32", batch_size=64)
    figures: dict[str, Any] = {"machine": platform.platform(), "sets": {}}
    with load_model(spec) as model:
        figures["model"] = model.info.model_dump(mode="json", exclude={"chat_template"})
        for task in tasks(options.data):
            if not options.only or task.name in options.only.split(";"):
                figures["sets"][task.name] = run(model, task, options.data, options.fit, options.rows)
                options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
