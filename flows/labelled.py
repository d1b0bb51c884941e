"""The commands of `alpaca` that work on a file of labelled texts: each asks as the command that it is for."""

import argparse
from typing import Any

from rich.console import RenderableType

from alpaca_core import (
    Calibration,
    Measurement,
    OrderEffect,
    Policy,
    RowError,
    fit_calibration,
    fit_policy,
    judge,
    measure,
    measure_order,
    prompts,
)
from alpaca_core.errors import InvalidRequest
from alpaca_core.measuring import reliability_diagram
from alpaca_core.spec import YES_NO
from prefect_alpaca.flows import terminal
from prefect_alpaca.flows.options import check_gold, labelled_texts
from prefect_alpaca.flows.running import opened, print_json, progress_bar, quiet, saved


class Measured(Measurement):
    """A measurement, and what the order of the labels does where that was asked for."""

    order: OrderEffect | None = None


def run_calibrate(options: argparse.Namespace) -> int:
    """Fit a calibration, write it, save it, show it."""
    texts, gold = labelled_texts(options.file)
    with opened(options) as model, progress_bar("calibrate", len(texts), model) as progress:
        fitted = fit_calibration(
            model,
            texts,
            options.labels or YES_NO,
            gold,
            method=options.method,
            progress=progress,
            **_question(options),
        )
    return _keep(options, fitted, terminal.calibration_view(fitted))


def run_fit_policy(options: argparse.Namespace) -> int:
    """Fit a policy on judgments of labelled texts, write it, save it, show it."""
    texts, gold = _with_labels(options, "a policy is fitted")
    calibration = saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("judge", len(texts), model) as progress:
        judged = judge(
            model,
            texts,
            options.labels or YES_NO,
            calibration=calibration,
            progress=progress,
            **_question(options),
        )
    policy = fit_policy(judged, gold, precision=options.precision, confidence=options.confidence, review=options.review)
    return _keep(options, policy, terminal.policy_view(policy))


def run_measure(options: argparse.Namespace) -> int:
    """Measure judgments of labelled texts, draw and show what was found."""
    texts, gold = _with_labels(options, "judgments are measured")
    calibration = saved(Calibration, options.calibration)
    labels, question = options.labels or YES_NO, _question(options)
    order = None
    with opened(options) as model:
        if options.order:  # first, since it is refused where the prompt names no labels
            with progress_bar("order", len(texts), model) as progress:
                order = measure_order(model, texts, labels, calibration=calibration, progress=progress, **question)
        with progress_bar("judge", len(texts), model) as progress:
            judged = judge(model, texts, labels, calibration=calibration, progress=progress, **question)
        with quiet("Measuring …"):
            measured = Measured(**measure(judged, gold).model_dump(), order=order)
            if options.diagram:
                reliability_diagram(measured, options.diagram)
    if options.json:
        print_json(measured.model_dump(mode="json"))
    else:
        failed = [(place, row) for place, row in enumerate(judged, 1) if isinstance(row, RowError)]
        terminal.console.print(terminal.measurement_view(measured, measured.order, failed))
    return 1 if measured.failed or (order and order.failed) else 0


def _with_labels(options: argparse.Namespace, doing: str) -> tuple[list[str], list[str]]:
    """Read texts and their right labels, which are checked before the model is loaded."""
    texts, gold = labelled_texts(options.file)
    if gold is None:
        raise InvalidRequest(f'{doing} on lines with a "label", but {options.file} has none. Label them.')
    check_gold(gold, options.labels or YES_NO)
    return texts, gold


def _question(options: argparse.Namespace) -> dict[str, Any]:
    """Return how the command that `options` are for asks about a text."""
    if options.command == "judge":
        names = ("instruction", "show_labels", "letters", "rotate_labels")
        return {name: getattr(options, name) for name in names}
    if options.show_labels or options.letters or options.rotate_labels:
        raise InvalidRequest(
            "classify never names its labels in the prompt, so --show-labels, --letters and --rotate-labels have no "
            "use. Drop them."
        )
    return {
        "instruction": options.instruction or prompts.CLASSIFY,
        "show_labels": False,
        "template": options.template or "raw",
    }


def _keep(options: argparse.Namespace, value: Calibration | Policy, view: RenderableType) -> int:
    """Write, save and show what was fitted."""
    if options.out:
        options.out.write_text(value.model_dump_json(indent=2), encoding="utf-8")
    if options.name:
        from prefect_alpaca.tasks.named import save_named

        with quiet(f"Saving {options.name} at the Prefect server …"):
            save_named(options.name, value)
    if options.json:
        print_json(value.model_dump(mode="json"))
    else:
        terminal.console.print(view)
        if not (options.out or options.name):
            terminal.console.print("This is not kept anywhere: --out FILE or --name NAME keeps it.")
    return 0
