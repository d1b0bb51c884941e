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
import time
from pathlib import Path
from typing import Any

import acting
from sets import Task, shuffled, tasks

from alpaca_core import (
    Calibration,
    Judgment,
    LanguageModel,
    Measurement,
    ModelSpec,
    RowError,
    fit_calibration,
    judge,
    load_model,
    measure,
)

METHODS = ("none", "contextual", "batch", "temperature", "vector")
MORE = ("order", "precision", "outliers", "ratings", "cascades", "consistency")


def run(model: LanguageModel, task: Task, data: Path, fit: int, rows: int) -> dict[str, Any]:
    """Measure one set, raw and calibrated."""
    texts, gold = shuffled(task, data)
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


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=ModelSpec().base_model)
    parser.add_argument("--fit", type=int, default=200, help="rows that calibrations are fitted on; 500 of banking77")
    parser.add_argument("--rows", type=int, default=1000, help="rows that all is measured on; 700 of banking77 at most")
    parser.add_argument("--only", help=f"sets and sections, separated by semicolons; sections are {', '.join(MORE)}")
    options = parser.parse_args()
    wanted = options.only.split(";") if options.only else None
    figures: dict[str, Any] = {"machine": platform.platform(), "sets": {}}
    with load_model(ModelSpec(base_model=options.model, dtype="float32", batch_size=64)) as model:
        figures["model"] = model.info.model_dump(mode="json", exclude={"chat_template"})
        sets = {task.name: task for task in tasks(options.data)}
        for name, task in sets.items():
            if not wanted or name in wanted:
                many = len(task.labels) > 20
                fit, rows = (max(options.fit, 500), min(options.rows, 700)) if many else (options.fit, options.rows)
                figures["sets"][name] = run(model, task, options.data, fit, rows)
                options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        topics = sets["AG News, aliases"]
        sections = {
            "order": lambda: acting.order(model, topics, options.data, options.fit, options.rows),
            "precision": lambda: acting.precision(model, options.data, topics, options.fit, options.rows),
            "outliers": lambda: acting.outliers(model, options.data, options.rows // 5),
            "ratings": lambda: acting.ratings(model, options.data, options.rows),
            "cascades": lambda: [
                acting.cascades(model, sets[name], options.data, options.fit, options.rows // 2)
                for name in ("AG News, asked", "GSM8K solutions")
            ],
            "consistency": lambda: acting.consistency(model, options.data, min(options.rows // 4, 300)),
        }
        for name, section in sections.items():
            if not wanted or name in wanted:
                figures[name] = section()
                options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
                print(name, figures[name], flush=True)
    print(table(figures))
    if "order" in figures:
        print(acting.order_table(figures["order"]))


if __name__ == "__main__":
    main()
