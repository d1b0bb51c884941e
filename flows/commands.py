"""The commands of `alpaca`: each turns options into a call of the core, prints, and returns the exit code."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from alpaca_core import (
    Calibration,
    RowError,
    Token,
    TokenProbability,
    answer,
    fit_calibration,
    generate,
    judge,
    next_tokens,
    show_tokens,
)
from alpaca_core.loading import import_adapter
from alpaca_core.rows import map_rows
from alpaca_core.spec import YES_NO, Value
from prefect_alpaca.flows import terminal
from prefect_alpaca.flows.doctor import Check, examine
from prefect_alpaca.flows.options import labelled_texts, sampling_of, spec_of, texts_of
from prefect_alpaca.flows.running import opened, print_json, print_rows, progress_bar, quiet


class TokenRow(Value):
    """A text as tokens, and the likeliest tokens after it where they were asked for."""

    text: str
    tokens: tuple[Token, ...]
    next: tuple[TokenProbability, ...] = ()


def run_generate(options: argparse.Namespace) -> int:
    """Generate a response to each prompt."""
    texts, sampling = texts_of(options.texts), sampling_of(options)
    inputs = None if options.input is None else [options.input] * len(texts)
    with opened(options) as model, progress_bar("generate", len(texts)) as progress:
        rows = generate(model, texts, sampling, inputs=inputs, progress=progress)
    return print_rows(
        options,
        rows,
        lambda: [
            terminal.completion_view(text, row, several=len(texts) > 1) for text, row in zip(texts, rows, strict=True)
        ],
    )


def run_answer(options: argparse.Namespace) -> int:
    """Reason, answer and verify each question."""
    texts, sampling = texts_of(options.texts), sampling_of(options)
    with opened(options) as model, progress_bar("answer", len(texts)) as progress:
        rows = answer(
            model,
            texts,
            sampling,
            conclusion_tokens=options.conclusion_tokens,
            reason=options.reason,
            verify=options.verify,
            max_attempts=options.max_attempts,
            min_p_correct=options.min_p_correct,
            progress=progress,
        )
    return print_rows(
        options, rows, lambda: [terminal.answer_view(text, row) for text, row in zip(texts, rows, strict=True)]
    )


def run_judge(options: argparse.Namespace) -> int:
    """Judge each text by the model's logits."""
    texts = texts_of(options.texts)
    labels = options.labels or YES_NO
    calibration = _saved_calibration(options.calibration) if options.calibration else None
    with opened(options) as model, progress_bar("judge", len(texts)) as progress:
        rows = judge(
            model,
            texts,
            labels,
            instruction=options.instruction,
            show_labels=options.show_labels,
            min_coverage=options.min_coverage,
            all_segmentations=options.all_segmentations,
            calibration=calibration,
            method=options.method,
            samples=options.samples,
            seed=options.seed,
            progress=progress,
        )
    return print_rows(options, rows, lambda: [terminal.judgments_view(texts, rows)])


def _saved_calibration(name: str) -> Calibration:
    if Path(name).is_file():
        return Calibration.model_validate_json(Path(name).read_bytes())
    from prefect_alpaca.tasks.named import load_named

    with quiet(f"Asking the Prefect server for {name} …"):
        return load_named(Calibration, name)


def run_calibrate(options: argparse.Namespace) -> int:
    """Fit a calibration, write it, save it, show it."""
    texts, gold = labelled_texts(options.file)
    with opened(options) as model, progress_bar("calibrate", len(texts)) as progress:
        fitted = fit_calibration(
            model,
            texts,
            options.labels or YES_NO,
            gold,
            method=options.method,
            instruction=options.instruction,
            show_labels=options.show_labels,
            progress=progress,
        )
    if options.out:
        options.out.write_text(fitted.model_dump_json(indent=2), encoding="utf-8")
    if options.name:
        from prefect_alpaca.tasks.named import save_named

        with quiet(f"Saving {options.name} at the Prefect server …"):
            save_named(options.name, fitted)
    if options.json:
        print_json(fitted.model_dump(mode="json"))
    else:
        terminal.console.print(terminal.calibration_view(fitted))
    return 0


def run_tokens(options: argparse.Namespace) -> int:
    """Show each text as the model's tokens."""
    texts = texts_of(options.texts)
    with opened(options) as model:
        shown = show_tokens(model, texts)
        after = next_tokens(model, texts, options.next) if options.next else [()] * len(texts)
    rows = map_rows(lambda text, tokens, best: TokenRow(text=text, tokens=tokens, next=best), texts, shown, after)
    return print_rows(
        options,
        rows,
        lambda: [
            terminal.failure(row) if isinstance(row, RowError) else terminal.tokens_view(row.text, row.tokens, row.next)
            for row in rows
        ],
    )


def run_import_adapter(options: argparse.Namespace) -> int:
    """Convert LoRA weights that are published as a pickle."""
    with quiet(f"Converting {options.source} …"):
        folder = import_adapter(options.source, template=options.template, revision=options.revision, out=options.out)
    if options.json:
        print_json({"source": options.source, "folder": str(folder)})
    else:
        print(f"{options.source} lies converted in {folder}, where the loader finds it by its name.")
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """Check this machine and a model."""
    healthy = True
    checks = examine(spec_of(options), verify=options.verify)
    while check := _next(checks):
        healthy = healthy and check.state != "broken"
        if options.json:
            print_json(asdict(check))
        else:
            terminal.console.print(terminal.check_view(check.name, check.state, check.found, check.remedy))
    return 0 if healthy else 1


def _next(checks: Iterator[Check]) -> Check | None:
    with quiet("Looking …"):
        return next(checks, None)
