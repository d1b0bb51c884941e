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
from prefect_alpaca.flows import commands, hosting, labelled
from prefect_alpaca.flows.options import (
    Parser,
    diagram_of,
    label_of,
    model_options,
    one_line,
    port_of,
    row_options,
    sampling_options,
    share_of,
)


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
    add("--samples", type=int, default=1, metavar="N", help="answers that vote; needs a temperature (default 1)")
    add("--conclusion-tokens", type=int, default=32, metavar="N", help="most tokens of the answer (default 32)")

    def labels(about: str, *, required: bool = False) -> None:
        repeated = f"{about}; once for each{'' if required else ' (default: Yes=y,true and No=n,false)'}"
        kind = {"action": "append", "type": _label, "metavar": "NAME[=ALIAS,...]", "required": required}
        add("--label", dest="labels", help=repeated, **kind)

    def saved(name: str, by: str) -> None:
        about = f"a file of {by}, or a name saved at the Prefect server"
        add(f"--{name}", metavar="NAME", help=about)

    def show_labels() -> None:
        about = "name the labels in the prompt (default: where there are at most 20 and they are not yes and no)"
        add("--show-labels", action=argparse.BooleanOptionalAction, help=about)

    def shown_labels() -> None:
        show_labels()
        add("--letters", action="store_true", help="call them A, B, C ... there, and read the letter")
        add("--rotate-labels", action="store_true", help="ask in every rotation of them, and average")

    def min_coverage() -> None:
        about = "give no label below this coverage (default 0)"
        add("--min-coverage", type=float, default=0.0, metavar="P", help=about)

    add = command("judge", "TEXT ...", commands.run_judge, "judge each text by the model's logits", rows, model)
    labels("a choice, and other words that mean it")
    add("--instruction", metavar="TEXT", help="the question about every text; without it each text is the question")
    shown_labels()
    min_coverage()
    add("--all-segmentations", action="store_true", help="count every way to cut a label into tokens")
    saved("calibration", "`alpaca calibrate`")
    saved("policy", "`alpaca fit-policy`")
    add("--method", choices=get_args(Method), default="logits", help="read the logits (default), or sample and count")
    add("--samples", type=int, default=10, metavar="N", help="samples a text where the method is sampled (default 10)")
    add("--seed", type=int, default=0, metavar="N", help="of the samples (default 0)")

    about = "judge each text by the logits, and reason about close ones before they are judged again"
    add = command("cascade", "TEXT ...", commands.run_cascade, about, rows, model, sampling)
    labels("a choice, and other words that mean it")
    add("--instruction", metavar="TEXT", help="the question about every text; without it each text is the question")
    show_labels()
    about = "reason where the top probability is less than this above the second (default 0.2; 0 never, 1 always)"
    add("--margin", type=float, default=0.2, metavar="P", help=about)
    saved("calibration", "`alpaca calibrate`")
    saved("reasoned-calibration", "alpaca_core.fit_calibration on reasoned texts")

    about = "sort each text into a category, of few or hundreds"
    add = command("classify", "TEXT ... --label NAME ...", commands.run_classify, about, rows, model)
    labels("a category, and other words that mean it", required=True)
    add("--instruction", metavar="TEXT", help="another prompt, with {text} where the text stands")
    min_coverage()
    saved("calibration", "`alpaca calibrate --for classify`")
    saved("policy", "`alpaca fit-policy --for classify`")

    about = "judge whether the two texts of each pair mean the same"
    add = command("same-meaning", "TEXT TEXT ...", commands.run_same_meaning, about, rows, model)
    min_coverage()
    saved("calibration", "alpaca_core.fit_calibration")

    about = "judge whether each text is of another kind than reference rows"
    add = command("is-outlier", "TEXT ... --reference ROW ...", commands.run_is_outlier, about, rows, model)
    about = "a row of the kind to be, or a file of such rows, one a line or .jsonl; once for each"
    add("--reference", action="append", required=True, metavar="ROW", help=about)
    saved("calibration", "alpaca_core.fit_calibration")

    about = "rate each text on a scale by the mean of its steps' probabilities"
    add = command("rate", "TEXT ... --criterion TEXT", commands.run_rate, about, rows, model)
    add("--criterion", required=True, metavar="TEXT", help="what counts, such as: How fluent is this text?")
    add("--worst", type=int, default=1, metavar="N", help="the lowest step (default 1)")
    add("--best", type=int, default=5, metavar="N", help="the highest step (default 5)")
    saved("calibration", "alpaca_core.fit_calibration")

    def labelled_rows(what: str) -> None:
        add("file", metavar="FILE", help=f'JSON Lines of {{"text": ..., "label": ...}}, {what}')
        labels("as for judge")
        add("--instruction", metavar="TEXT", help="as for judge")
        shown_labels()
        about = "the command that it is for, whose prompt is asked (default judge)"
        add("--for", dest="command", choices=("judge", "classify"), default="judge", help=about)

    def kept(used: str) -> None:
        add("--out", type=Path, metavar="FILE", help=f"write it here; `alpaca judge --{used} FILE` reads it")
        add("--name", metavar="NAME", help="save it under this name at the Prefect server")
        add("--json", action="store_true", help="print it as one JSON object")

    about = "fit a calibration of a question on texts, with or without their right labels"
    add = command("calibrate", "FILE", labelled.run_calibrate, about, model)
    labelled_rows("the label where it is known")
    kept("calibration")
    add("--method", choices=get_args(CalibrationMethod), help="how to fit (default: the best on the labelled rows)")

    about = "fit a policy on labelled texts: which labels to accept, to review, or to abstain from"
    add = command("fit-policy", "FILE", labelled.run_fit_policy, about, model)
    labelled_rows("other texts than the calibration's")
    kept("policy")
    saved("calibration", "`alpaca calibrate`")
    about = "share of right labels among accepted ones (default 0.9)"
    add("--precision", type=share_of, default=0.9, metavar="P", help=about)
    about = "probability that the precision holds (default 0.95)"
    add("--confidence", type=share_of, default=0.95, metavar="P", help=about)
    about = "top probability below which a label is not worth a person's look (default 0: all are)"
    add("--review", type=float, default=0.0, metavar="P", help=about)

    about = "measure on labelled texts how often judgments are right, and how far their probabilities can be trusted"
    add = command("measure", "FILE", labelled.run_measure, about, model)
    labelled_rows("other texts than the calibration's")
    saved("calibration", "`alpaca calibrate`")
    about = "draw accuracy against confidence into this .svg or .png"
    add("--diagram", type=diagram_of, metavar="FILE", help=about)
    about = "also how often a label depends on the order in which the prompt names them; reads each text once a label"
    add("--order", action="store_true", help=about)
    add("--json", action="store_true", help="print one JSON object")

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

    about = "serve a model to other processes and machines, which name it by ALPACA_HOST=http://HOST:PORT"
    add = command("serve", "", hosting.run_serve, about, model)
    add(
        "--address",
        default="127.0.0.1",
        metavar="HOST",
        help="where to listen (default 127.0.0.1); others need a token",
    )
    add("--port", type=port_of, default=8642, metavar="N", help="likewise (default 8642)")
    add("--token-file", type=Path, metavar="FILE", help="holds the token that requests bear (else ALPACA_HOST_TOKEN)")
    add("--ray", action="store_true", help="as replicas on the Ray cluster of RAY_ADDRESS, else of this machine")
    add("--replicas", type=int, default=1, metavar="N", help="with --ray: replicas at least (default 1)")
    add("--most-replicas", type=int, metavar="N", help="with --ray: replicas at most, under load (default: as many)")
    add(
        "--gpus",
        type=float,
        metavar="N",
        help="with --ray: GPUs of a replica (default 1, or --tensor-parallel-size; 0 with --device cpu)",
    )

    about = "look at the hosts that keep models warm on this machine, or end them"
    add = command("host", "status|stop [KEY ...]", hosting.run_host, about)
    about = "status tells model, queue and speed; stop ends hosts at once: runs that are using one start it again"
    add("action", choices=("status", "stop"), help=about)
    add("keys", nargs="*", metavar="KEY", help="beginnings of the keys of hosts to end (default: all)")
    add("--json", action="store_true", help="print one JSON object a host, on one line")

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
