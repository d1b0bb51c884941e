"""The command line `alpaca`: the core's verbs for a terminal.

Exit codes: 0 all is well, 1 a row failed (the others are still printed) or nobody reads on, 2 the call or the model is
wrong.
With ``--json`` standard output holds one JSON object a row and nothing else; progress is on standard error.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from alpaca_core import Label
from alpaca_core.calibration import CalibrationMethod
from alpaca_core.errors import AlpacaError, InvalidRequest
from alpaca_core.judging import Method
from alpaca_core.spec import TemplateName
from prefect_alpaca.flows import commands
from prefect_alpaca.flows.options import Parser, label_of, model_options, one_line, row_options, sampling_options


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
    named = parser.add_subparsers(required=True, metavar="COMMAND")
    rows, model, sampling = row_options(), model_options(), sampling_options()

    def command(
        name: str, takes: str, run: Callable[[argparse.Namespace], int], about: str, *parents: Parser
    ) -> Callable[..., Any]:
        usage, description = f"alpaca {name} [options] {takes}", f"{about[0].upper()}{about[1:]}."
        added = named.add_parser(name, usage=usage, help=about, description=description, parents=parents)
        added.set_defaults(run=run)
        return added.add_argument

    add = command(
        "generate", "TEXT ...", commands.run_generate, "generate a response to each prompt", rows, model, sampling
    )
    add("--input", metavar="TEXT", help="what every prompt is an instruction for")

    about = "reason about each question, answer it, and ask whether that is right"
    add = command("answer", "TEXT ...", commands.run_answer, about, rows, model, sampling)
    add("--no-reason", dest="reason", action="store_false", help="answer without thinking step by step first")
    add("--no-verify", dest="verify", action="store_false", help="leave P(correct) out")
    add("--max-attempts", type=int, default=1, metavar="N", help="attempts at most; needs a temperature (default 1)")
    add("--min-p-correct", type=float, default=0.5, metavar="P", help="P(correct) that ends them (default 0.5)")
    add("--conclusion-tokens", type=int, default=32, metavar="N", help="most tokens of the answer (default 32)")

    add = command("judge", "TEXT ...", commands.run_judge, "judge each text by the model's logits", rows, model)
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
    add = command("calibrate", "FILE", commands.run_calibrate, about, model)
    add("file", metavar="FILE", help='JSON Lines of {"text": ..., "label": ...}, the label where it is known')
    about = "as for judge; once for each (default: Yes=y,true and No=n,false)"
    add("--label", dest="labels", action="append", type=_label, metavar="NAME[=ALIAS,...]", help=about)
    add("--instruction", metavar="TEXT", help="as for judge")
    add("--show-labels", action=argparse.BooleanOptionalAction, help="as for judge")
    add("--method", choices=get_args(CalibrationMethod), help="how to fit (default: the best on the labelled rows)")
    add("--out", type=Path, metavar="FILE", help="write it here; `alpaca judge --calibration FILE` reads it")
    add("--name", metavar="NAME", help="save it under this name at the Prefect server")
    add("--json", action="store_true", help="print it as one JSON object")

    add = command("tokens", "TEXT ...", commands.run_tokens, "show each text as the model's tokens", rows, model)
    add("--next", type=int, default=0, metavar="N", help="also the N likeliest next tokens, with the text as prompt")

    add = command(
        "import-adapter", "SOURCE", commands.run_import_adapter, "convert LoRA weights that are published as a pickle"
    )
    add("source", metavar="SOURCE", help="hub repository, folder or file of an adapter_model.bin")
    add("--template", choices=get_args(TemplateName), help="prompt template that it was trained with")
    add("--revision", metavar="COMMIT", help="commit of the hub repository")
    add("--out", type=Path, metavar="FOLDER", help="new folder for the result (default: the cache)")
    add("--json", action="store_true", help="print one JSON object")

    add = command("doctor", "", commands.run_doctor, "check this machine and a model, and say what to do", model)
    add("--verify", action="store_true", help="also hash all files of the model again")
    add("--json", action="store_true", help="print one JSON object a check, on one line")
    return parser


def _label(text: str) -> str | Label:
    try:
        return label_of(text)
    except InvalidRequest as error:  # with it argparse names the option
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
