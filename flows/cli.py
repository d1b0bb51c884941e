"""The command line `alpaca`: the core's verbs for a terminal.

Exit codes: 0 all is well, 1 a row failed (the others are still printed) or nobody reads on, 2 the call or the model is
wrong.
With ``--json`` standard output holds one JSON object a row and nothing else; progress is on standard error.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console, RenderableType
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TimeElapsedColumn

from alpaca_core import (
    Calibration,
    Label,
    LanguageModel,
    RowError,
    Token,
    TokenProbability,
    answer,
    fit_calibration,
    generate,
    judge,
    load_model,
    next_tokens,
    show_tokens,
)
from alpaca_core.calibration import CalibrationMethod
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.judging import Method
from alpaca_core.loading import import_adapter
from alpaca_core.rows import Progress, map_rows
from alpaca_core.spec import YES_NO, TemplateName, Value
from prefect_alpaca.flows import terminal
from prefect_alpaca.flows.doctor import Check, examine
from prefect_alpaca.flows.options import (
    Parser,
    label_of,
    labelled_texts,
    model_options,
    one_line,
    row_options,
    sampling_of,
    sampling_options,
    spec_of,
    texts_of,
)


class TokenRow(Value):
    """A text as tokens, and the likeliest tokens after it where they were asked for."""

    text: str
    tokens: tuple[Token, ...]
    next: tuple[TokenProbability, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not end the program
    try:
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        code = run(options)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # as in `alpaca … | head -1`; what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AlpacaError, ValidationError, OSError) as error:
        print(f"alpaca: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser(prog="alpaca", description="A local language model: generate, answer, judge, look inside.")
    parser.add_argument("--version", action="version", version=f"prefect-alpaca {version('prefect-alpaca')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rows, model, sampling = row_options(), model_options(), sampling_options()

    def command(
        name: str, takes: str, run: Callable[[argparse.Namespace], int], about: str, *parents: Parser
    ) -> Callable[..., Any]:
        usage, description = f"alpaca {name} [options] {takes}", f"{about[0].upper()}{about[1:]}."
        added = commands.add_parser(name, usage=usage, help=about, description=description, parents=parents)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("generate", "TEXT ...", _generate, "generate a response to each prompt", rows, model, sampling)
    add("--input", metavar="TEXT", help="what every prompt is an instruction for")

    about = "reason about each question, answer it, and ask whether that is right"
    add = command("answer", "TEXT ...", _answer, about, rows, model, sampling)
    add("--no-reason", dest="reason", action="store_false", help="answer without thinking step by step first")
    add("--no-verify", dest="verify", action="store_false", help="leave P(correct) out")
    add("--max-attempts", type=int, default=1, metavar="N", help="attempts at most; needs a temperature (default 1)")
    add("--min-p-correct", type=float, default=0.5, metavar="P", help="P(correct) that ends them (default 0.5)")
    add("--samples", type=int, default=1, metavar="N", help="answers that vote; needs a temperature (default 1)")
    add("--conclusion-tokens", type=int, default=32, metavar="N", help="most tokens of the answer (default 32)")

    add = command("judge", "TEXT ...", _judge, "judge each text by the model's logits", rows, model)
    about = "a choice, and other words that mean it; once for each (default: Yes=y,true and No=n,false)"
    add("--label", dest="labels", action="append", type=_label, metavar="NAME[=ALIAS,...]", help=about)
    add("--instruction", metavar="TEXT", help="the question about every text; without it each text is the question")
    add("--show-labels", action=argparse.BooleanOptionalAction, help="name the labels in the prompt")
    add("--min-coverage", type=float, default=0.0, metavar="P", help="give no label below this coverage (default 0)")
    add("--all-segmentations", action="store_true", help="count every way to cut a label into tokens")
    add(
        "--calibration",
        metavar="NAME",
        help="a file of `alpaca calibrate`, or a name that it saved at the Prefect server",
    )
    add("--method", choices=get_args(Method), default="logits", help="read the logits (default), or sample and count")
    add("--samples", type=int, default=10, metavar="N", help="samples a text where the method is sampled (default 10)")
    add("--seed", type=int, default=0, metavar="N", help="of the samples (default 0)")

    about = "fit a calibration of a question on texts, with or without their right labels"
    add = command("calibrate", "FILE", _calibrate, about, model)
    add("file", metavar="FILE", help='JSON Lines of {"text": ..., "label": ...}, the label where it is known')
    about = "as for judge; once for each (default: Yes=y,true and No=n,false)"
    add("--label", dest="labels", action="append", type=_label, metavar="NAME[=ALIAS,...]", help=about)
    add("--instruction", metavar="TEXT", help="as for judge")
    add("--show-labels", action=argparse.BooleanOptionalAction, help="as for judge")
    add("--method", choices=get_args(CalibrationMethod), help="how to fit (default: the best on the labelled rows)")
    add("--out", type=Path, metavar="FILE", help="write it here; `alpaca judge --calibration FILE` reads it")
    add("--name", metavar="NAME", help="save it under this name at the Prefect server")
    add("--json", action="store_true", help="print it as one JSON object")

    add = command("tokens", "TEXT ...", _tokens, "show each text as the model's tokens", rows, model)
    add("--next", type=int, default=0, metavar="N", help="also the N likeliest next tokens, with the text as prompt")

    add = command("import-adapter", "SOURCE", _import_adapter, "convert LoRA weights that are published as a pickle")
    add("source", metavar="SOURCE", help="hub repository, folder or file of an adapter_model.bin")
    add("--template", choices=get_args(TemplateName), help="prompt template that it was trained with")
    add("--revision", metavar="COMMIT", help="commit of the hub repository")
    add("--out", type=Path, metavar="FOLDER", help="new folder for the result (default: the cache)")
    add("--json", action="store_true", help="print one JSON object")

    add = command("doctor", "", _doctor, "check this machine and a model, and say what to do", model)
    add("--verify", action="store_true", help="also hash all files of the model again")
    add("--json", action="store_true", help="print one JSON object a check, on one line")
    return parser


def _label(text: str) -> str | Label:
    try:
        return label_of(text)
    except InvalidRequest as error:  # with it argparse names the option
        raise argparse.ArgumentTypeError(str(error)) from error


def _generate(options: argparse.Namespace) -> int:
    texts, sampling = texts_of(options.texts), sampling_of(options)
    inputs = None if options.input is None else [options.input] * len(texts)
    with _model(options) as model, _progress("generate", len(texts)) as progress:
        rows = generate(model, texts, sampling, inputs=inputs, progress=progress)
    return _print(
        options,
        rows,
        lambda: [
            terminal.completion_view(text, row, several=len(texts) > 1) for text, row in zip(texts, rows, strict=True)
        ],
    )


def _answer(options: argparse.Namespace) -> int:
    texts, sampling = texts_of(options.texts), sampling_of(options)
    with _model(options) as model, _progress("answer", len(texts)) as progress:
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
    return _print(
        options, rows, lambda: [terminal.answer_view(text, row) for text, row in zip(texts, rows, strict=True)]
    )


def _judge(options: argparse.Namespace) -> int:
    texts = texts_of(options.texts)
    labels = options.labels or YES_NO
    calibration = _saved_calibration(options.calibration) if options.calibration else None
    with _model(options) as model, _progress("judge", len(texts)) as progress:
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
    return _print(options, rows, lambda: [terminal.judgments_view(texts, rows)])


def _saved_calibration(name: str) -> Calibration:
    if Path(name).is_file():
        return Calibration.model_validate_json(Path(name).read_bytes())
    from prefect_alpaca.tasks.calibrations import load_calibration

    with _quiet(f"Asking the Prefect server for {name} …"):
        return load_calibration(name)


def _calibrate(options: argparse.Namespace) -> int:
    texts, gold = labelled_texts(options.file)
    with _model(options) as model, _progress("calibrate", len(texts)) as progress:
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
        from prefect_alpaca.tasks.calibrations import save_calibration

        with _quiet(f"Saving {options.name} at the Prefect server …"):
            save_calibration(options.name, fitted)
    if options.json:
        _print_json(fitted.model_dump(mode="json"))
    else:
        terminal.console.print(terminal.calibration_view(fitted))
    return 0


def _tokens(options: argparse.Namespace) -> int:
    texts = texts_of(options.texts)
    with _model(options) as model:
        shown = show_tokens(model, texts)
        after = next_tokens(model, texts, options.next) if options.next else [()] * len(texts)
    rows = map_rows(lambda text, tokens, best: TokenRow(text=text, tokens=tokens, next=best), texts, shown, after)
    return _print(
        options,
        rows,
        lambda: [
            terminal.failure(row) if isinstance(row, RowError) else terminal.tokens_view(row.text, row.tokens, row.next)
            for row in rows
        ],
    )


def _import_adapter(options: argparse.Namespace) -> int:
    with _quiet(f"Converting {options.source} …"):
        folder = import_adapter(options.source, template=options.template, revision=options.revision, out=options.out)
    if options.json:
        _print_json({"source": options.source, "folder": str(folder)})
    else:
        print(f"{options.source} lies converted in {folder}, where the loader finds it by its name.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    healthy = True
    checks = examine(spec_of(options), verify=options.verify)
    while check := _next(checks):
        healthy = healthy and check.state != "broken"
        if options.json:
            _print_json(asdict(check))
        else:
            terminal.console.print(terminal.check_view(check.name, check.state, check.found, check.remedy))
    return 0 if healthy else 1


def _next(checks: Iterator[Check]) -> Check | None:
    with _quiet("Looking …"):
        return next(checks, None)


@contextmanager
def _quiet(doing: str) -> Iterator[None]:
    """Say on standard error, in a terminal, what takes so long, and keep libraries off standard output."""
    with redirect_stdout(sys.stderr), Console(stderr=True).status(terminal.text(doing)):
        yield


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[LanguageModel]:
    """Load the model, and keep libraries off standard output as long as it is there."""
    spec = spec_of(options)
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        with _quiet(f"Loading {spec.base_model} …"):
            model = stack.enter_context(load_model(spec))
        yield model


@contextmanager
def _progress(verb: str, rows: int) -> Iterator[Progress]:
    """Draw a progress bar on standard error where that is a terminal, and wipe it at the end."""
    console, columns = Console(stderr=True), (SpinnerColumn(), *Bar.get_default_columns(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=rows)
        yield lambda finished: bar.advance(task, finished)


def _print(
    options: argparse.Namespace, rows: Sequence[Value | RowError], views: Callable[[], Sequence[RenderableType]]
) -> int:
    """Print the rows as JSON Lines, or as they look in a terminal, and return the exit code."""
    if options.json:
        for row in rows:
            _print_json(row.model_dump(mode="json"))
    else:
        terminal.console.print(*views(), sep="\n")
    return 1 if any(isinstance(row, RowError) for row in rows) else 0


def _print_json(value: object) -> None:
    """Print JSON that is one line in every locale: letters as themselves where standard output is UTF-8."""
    line, encoding = json.dumps(value, ensure_ascii=False), getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf8 = line.encode(encoding, "replace") == line.encode("utf-8", "surrogatepass")
    is_line = len(line.splitlines()) == 1  # U+2028 and its like end a line for some readers
    print(line if is_utf8 and is_line else json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
