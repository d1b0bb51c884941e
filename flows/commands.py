"""The commands of `alpaca`: each turns options into a call of the core, prints, and returns the exit code."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from alpaca_core import (
    Calibration,
    Judgment,
    Policy,
    RowError,
    Token,
    TokenProbability,
    answer,
    cascade,
    classify,
    generate,
    is_outlier,
    judge,
    next_tokens,
    prompts,
    rate,
    same_meaning,
    show_tokens,
)
from alpaca_core.errors import InvalidRequest
from alpaca_core.loading import import_adapter
from alpaca_core.rows import map_rows
from alpaca_core.spec import YES_NO, Value
from prefect_alpaca.flows import terminal
from prefect_alpaca.flows.doctor import Check, examine
from prefect_alpaca.flows.options import reference_of, sampling_of, spec_of, texts_of
from prefect_alpaca.flows.routing import route
from prefect_alpaca.flows.running import opened, print_json, print_rows, progress_bar, quiet, saved


class TokenRow(Value):
    """A text as tokens, and the likeliest tokens after it where they were asked for."""

    text: str
    tokens: tuple[Token, ...]
    next: tuple[TokenProbability, ...] = ()


def run_generate(options: argparse.Namespace) -> int:
    """Generate a response to each prompt."""
    texts, sampling = texts_of(options.texts), sampling_of(options)
    inputs = None if options.input is None else [options.input] * len(texts)
    with opened(options) as model, progress_bar("generate", len(texts), model) as progress:
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
    with opened(options) as model, progress_bar("answer", len(texts), model) as progress:
        rows = answer(
            model,
            texts,
            sampling,
            conclusion_tokens=options.conclusion_tokens,
            reason=options.reason,
            verify=options.verify,
            max_attempts=options.max_attempts,
            min_p_correct=options.min_p_correct,
            samples=options.samples,
            progress=progress,
        )
    return print_rows(
        options, rows, lambda: [terminal.answer_view(text, row) for text, row in zip(texts, rows, strict=True)]
    )


def run_judge(options: argparse.Namespace) -> int:
    """Judge each text by the model's logits."""
    texts = texts_of(options.texts)
    labels = options.labels or YES_NO
    calibration, policy = _calibration_and_policy(options)
    with opened(options) as model, progress_bar("judge", len(texts), model) as progress:
        rows = judge(
            model,
            texts,
            labels,
            instruction=options.instruction,
            show_labels=options.show_labels,
            letters=options.letters,
            rotate_labels=options.rotate_labels,
            min_coverage=options.min_coverage,
            all_segmentations=options.all_segmentations,
            calibration=calibration,
            method=options.method,
            samples=options.samples,
            seed=options.seed,
            progress=progress,
        )
    return _print_judgments(options, texts, rows, policy)


def run_cascade(options: argparse.Namespace) -> int:
    """Judge each text by the logits, and reason about close ones."""
    texts, sampling = texts_of(options.texts), sampling_of(options)
    calibration = saved(Calibration, options.calibration)
    reasoned_calibration = saved(Calibration, options.reasoned_calibration)
    with opened(options) as model, progress_bar("cascade", len(texts), model) as progress:
        rows = cascade(
            model,
            texts,
            options.labels or YES_NO,
            margin=options.margin,
            sampling=sampling,
            instruction=options.instruction,
            show_labels=options.show_labels,
            calibration=calibration,
            reasoned_calibration=reasoned_calibration,
            progress=progress,
        )
    return print_rows(options, rows, lambda: [terminal.cascade_view(texts, rows)])


def run_classify(options: argparse.Namespace) -> int:
    """Sort texts into categories."""
    texts = texts_of(options.texts)
    calibration, policy = _calibration_and_policy(options)
    with opened(options) as model, progress_bar("classify", len(texts), model) as progress:
        rows = classify(
            model,
            texts,
            options.labels,
            instruction=options.instruction or prompts.CLASSIFY,
            min_coverage=options.min_coverage,
            calibration=calibration,
            template=options.template or "raw",
            progress=progress,
        )
    return _print_judgments(options, texts, rows, policy)


def run_same_meaning(options: argparse.Namespace) -> int:
    """Judge whether the two texts of each pair mean the same."""
    texts = texts_of(options.texts)
    if len(texts) % 2:
        raise InvalidRequest(f"texts are compared two by two, but got {len(texts)} of them. Add one, or drop one.")
    firsts, seconds = texts[::2], texts[1::2]
    calibration = saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("same-meaning", len(firsts), model) as progress:
        rows = same_meaning(
            model, firsts, seconds, min_coverage=options.min_coverage, calibration=calibration, progress=progress
        )
    shown = [f"{first}\n{second}" for first, second in zip(firsts, seconds, strict=True)]
    return _print_judgments(options, shown, rows, None)


def run_is_outlier(options: argparse.Namespace) -> int:
    """Judge whether each text is of another kind than the reference rows."""
    texts, reference = texts_of(options.texts), reference_of(options.reference)
    calibration = saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("is-outlier", len(texts), model) as progress:
        rows = is_outlier(model, texts, reference, calibration=calibration, progress=progress)
    return print_rows(options, rows, lambda: [terminal.outliers_view(texts, rows)])


def run_rate(options: argparse.Namespace) -> int:
    """Rate each text on a scale."""
    texts = texts_of(options.texts)
    calibration = saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("rate", len(texts), model) as progress:
        rows = rate(
            model,
            texts,
            options.criterion,
            worst=options.worst,
            best=options.best,
            calibration=calibration,
            progress=progress,
        )
    return print_rows(options, rows, lambda: [terminal.ratings_view(texts, rows)])


def _print_judgments(
    options: argparse.Namespace, texts: Sequence[str], judged: Sequence[Judgment | RowError], policy: Policy | None
) -> int:
    rows: Sequence[Judgment | RowError] = route(judged, policy) if policy else judged
    return print_rows(options, rows, lambda: [terminal.judgments_view(texts, rows)])


def _calibration_and_policy(options: argparse.Namespace) -> tuple[Calibration | None, Policy | None]:
    calibration, policy = saved(Calibration, options.calibration), saved(Policy, options.policy)
    if policy:
        policy.check(calibration.digest if calibration else None)  # before the model is loaded
    return calibration, policy


def run_tokens(options: argparse.Namespace) -> int:
    """Show each text as the model's tokens."""
    texts = texts_of(options.texts)
    with opened(options) as model:
        shown = show_tokens(model, texts)
        after: Sequence[tuple[TokenProbability, ...] | RowError] = [()] * len(texts)
        if options.next:
            with progress_bar("tokens", len(texts), model) as progress:
                after = next_tokens(model, texts, options.next, progress=progress)
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
