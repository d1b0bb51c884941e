"""The commands of `alpaca`: each turns options into a call of the core, prints, and returns the exit code."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.console import RenderableType

from alpaca_core import (
    Calibration,
    Judgment,
    Policy,
    RowError,
    Token,
    TokenProbability,
    answer,
    classify,
    fit_calibration,
    fit_policy,
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
from prefect_alpaca.flows.options import labelled_texts, one_line, reference_of, sampling_of, spec_of, texts_of
from prefect_alpaca.flows.routing import route
from prefect_alpaca.flows.running import opened, print_json, print_rows, progress_bar, quiet

Kind = TypeVar("Kind", Calibration, Policy)


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
    with opened(options) as model, progress_bar("judge", len(texts)) as progress:
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


def run_classify(options: argparse.Namespace) -> int:
    """Sort texts into categories."""
    texts = texts_of(options.texts)
    calibration, policy = _calibration_and_policy(options)
    with opened(options) as model, progress_bar("classify", len(texts)) as progress:
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
    calibration = _saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("same-meaning", len(firsts)) as progress:
        rows = same_meaning(
            model, firsts, seconds, min_coverage=options.min_coverage, calibration=calibration, progress=progress
        )
    shown = [f"{first}\n{second}" for first, second in zip(firsts, seconds, strict=True)]
    return _print_judgments(options, shown, rows, None)


def run_is_outlier(options: argparse.Namespace) -> int:
    """Judge whether each text is of another kind than the reference rows."""
    texts, reference = texts_of(options.texts), reference_of(options.reference)
    calibration = _saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("is-outlier", len(texts)) as progress:
        rows = is_outlier(model, texts, reference, calibration=calibration, progress=progress)
    return print_rows(options, rows, lambda: [terminal.outliers_view(texts, rows)])


def run_rate(options: argparse.Namespace) -> int:
    """Rate each text on a scale."""
    texts = texts_of(options.texts)
    calibration = _saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("rate", len(texts)) as progress:
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
    calibration, policy = _saved(Calibration, options.calibration), _saved(Policy, options.policy)
    if policy:
        policy.check(calibration.digest if calibration else None)  # before the model is loaded
    return calibration, policy


def _saved(kind: type[Kind], name: str | None) -> Kind | None:
    """Return a calibration or a policy: from a file, or from the Prefect server by its name."""
    if not name:
        return None
    if Path(name).is_file():
        try:
            return kind.model_validate_json(Path(name).read_bytes())
        except ValidationError as error:
            what = kind.__name__.lower()
            raise InvalidRequest(f"{name} is no {what}: {one_line(error)}. Name a file that holds one.") from error
    from prefect_alpaca.tasks.named import load_named

    with quiet(f"Asking the Prefect server for {name} …"):
        return load_named(kind, name)


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
            progress=progress,
            **_question(options),
        )
    return _keep(options, fitted, terminal.calibration_view(fitted))


def run_fit_policy(options: argparse.Namespace) -> int:
    """Fit a policy on judgments of labelled texts, write it, save it, show it."""
    texts, gold = labelled_texts(options.file)
    if gold is None:
        raise InvalidRequest(f'a policy is fitted on lines with a "label", but {options.file} has none. Label them.')
    calibration = _saved(Calibration, options.calibration)
    with opened(options) as model, progress_bar("judge", len(texts)) as progress:
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
