"""What people type, turned into the core's values: options, each with the name of its field, and labels."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn, get_args

from pydantic import BaseModel, Field, ValidationError

from alpaca_core import Label, ModelSpec, Sampling
from alpaca_core.errors import InvalidRequest
from alpaca_core.labels import MOST_LABELS
from alpaca_core.measuring import DIAGRAMS
from alpaca_core.spec import EMBEDDED_MODEL, TemplateName

Choices = Annotated[list[str], Field(min_length=2, max_length=MOST_LABELS)]
"""The labels of a flow, each as `label_of` reads it."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` lists what there is)\n")


def model_options() -> Parser:
    """Which model works; for every command that loads one."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="embedded",
        metavar="NAME",
        help=f"hub repository, folder, .gguf file, or a preset: embedded ({EMBEDDED_MODEL}, the default), alpaca-7b",
    )
    group.add_argument("--revision", metavar="COMMIT", help="commit of the model's hub repository")
    group.add_argument("--adapter", metavar="NAME", help="LoRA weights on top: hub repository or folder")
    group.add_argument("--adapter-revision", metavar="COMMIT", help="commit of the adapter's hub repository")
    group.add_argument(
        "--quantization",
        choices=_choices("quantization"),
        help="bitsandbytes quantization (default: the preset's, else none)",
    )
    group.add_argument("--dtype", choices=_choices("dtype"), help="of the weights; bfloat16 on a GPU, float32 on a CPU")
    group.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--engine", choices=_choices("engine"), help="auto is our own; vllm needs the extra vllm")
    about = "GPUs over which vLLM splits each layer"
    group.add_argument("--tensor-parallel-size", type=int, metavar="N", help=about)
    group.add_argument("--template", choices=get_args(TemplateName), help="prompt template instead of the model's own")
    group.add_argument("--batch-size", type=int, metavar="ROWS", help="rows computed together at most (default 32)")
    group.add_argument("--memory-share", type=float, metavar="SHARE", help="of the device's memory (default 0.9)")
    return parser


def sampling_options() -> Parser:
    """How tokens are chosen; for every command that generates."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, the default; 1 is the model's own")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the k likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens up to this mass")
    group.add_argument("--num-beams", type=int, metavar="N", help="beams kept side by side (default 1: no beam search)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of one response (default 256)")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same text (default 0)")
    return parser


def row_options() -> Parser:
    """The rows to work on, and how results are printed."""
    parser = Parser(add_help=False)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a row each; - reads the lines of standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row, on one line")
    return parser


def spec_of(options: argparse.Namespace) -> ModelSpec:
    """Return the model that the options ask for; an option that was given overrides its preset."""
    try:
        base = ModelSpec.preset(options.model).model_dump(exclude_unset=True)
    except InvalidRequest:
        base = {"base_model": options.model}
    source = ("revision", "adapter", "adapter_revision")
    run = (
        "engine",
        "tensor_parallel_size",
        "quantization",
        "dtype",
        "device",
        "template",
        "batch_size",
        "memory_share",
    )
    return ModelSpec.model_validate(base | _given(options, (*source, *run)))


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return the sampling that the options ask for."""
    fields = ("temperature", "top_k", "top_p", "num_beams", "max_new_tokens", "seed")
    return Sampling.model_validate(_given(options, fields))


def label_of(text: str) -> str | Label:
    """Read a label: a name, or a name and its aliases as ``Yes=y,true``.

    Raises:
        InvalidRequest: If the name or an alias is blank.
    """
    name, found, listed = text.partition("=")
    aliases = listed.split(",") if found else []
    if not name.strip():
        raise InvalidRequest(f"a label has a name, as in Yes or Yes=y,true, but got {text!r:.80}. Drop it, or name it.")
    if not all(alias.strip() for alias in aliases):
        raise InvalidRequest(
            f"other words for a label follow it as in Yes=y,true, but one of them is blank in {text!r:.80}. "
            "Drop its comma or equals sign, or write a word there."
        )
    return Label(name=name, aliases=tuple(aliases)) if found else text


def label_name(label: str | Label) -> str:
    """Return how results call a label."""
    return label if isinstance(label, str) else label.name


def check_gold(gold: Sequence[str], labels: Sequence[str | Label]) -> None:
    """Refuse right labels that are none of the labels, before a model is loaded.

    Raises:
        InvalidRequest: For the first such row, counted from 0.
    """
    names = [label_name(label) for label in labels]
    for row, label in enumerate(gold):
        if label not in names:
            known = ", ".join(map(repr, names))
            raise InvalidRequest(
                f"gold names a label of its row ({known:.200}), but row {row} has {label!r:.80}. Spell it alike."
            )


def texts_of(arguments: list[str]) -> list[str]:
    """Return the texts: the arguments, or the lines of standard input for ``-``.

    Lines are UTF-8 whatever the locale is, and end at a line feed alone. Bytes that are not UTF-8 become lone
    surrogates, as they do in arguments, so that they are the error of their own row.
    """
    texts: list[str] = []
    for argument in arguments:
        texts += _lines() if argument == "-" else [argument]
    return texts


def _lines() -> list[str]:
    if sys.stdin is None:
        raise InvalidRequest("- reads standard input, but that is closed. Pipe lines into it, or give texts.")
    lines = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def labelled_texts(path: str) -> tuple[list[str], list[str] | None]:
    """Read a file of JSON Lines: its texts, and their right labels where every line has one.

    Args:
        path: The file, or ``-`` for standard input.

    Raises:
        InvalidRequest: If it cannot be read, or a line is no object with a ``text``.
    """
    lines = _lines() if path == "-" else _content(path, "a file of JSON Lines").split("\n")
    rows = [_labelled(place, line) for place, line in enumerate(lines, 1) if line.strip()]
    gold = [row.label for row in rows if row.label is not None]
    if gold and len(gold) < len(rows):
        raise InvalidRequest(f'either every line has a "label" or none, but {path} has both. Keep one kind.')
    return [row.text for row in rows], gold or None


def reference_of(arguments: list[str]) -> list[str]:
    """Return reference rows: the arguments, or the rows of a file in place of an argument that names one.

    A file whose name ends in ``.jsonl`` holds JSON Lines, as `labelled_texts` reads them; any other a row on
    each line that is not blank.

    Raises:
        InvalidRequest: If a file cannot be read, or a word ends like the name of one that is not there.
    """
    rows: list[str] = []
    for argument in arguments:
        if not os.path.isfile(argument):  # and not Path.is_file, which raises for a long text
            if argument.endswith((".jsonl", ".txt")) and not any(map(str.isspace, argument)):
                raise InvalidRequest(f"--reference is a row or a file of rows, but there is no file {argument!r:.200}.")
            rows.append(argument)
        elif argument.endswith(".jsonl"):
            rows += labelled_texts(argument)[0]
        else:
            rows += [line.strip() for line in _content(argument, "a file of rows").split("\n") if line.strip()]
    return rows


def port_of(text: str) -> int:
    """Read a port of TCP.

    Raises:
        argparse.ArgumentTypeError: For anything else, so that argparse names the option.
    """
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 2**16):
        raise argparse.ArgumentTypeError(f"it lies between 1 and {2**16 - 1:,}, but got {text!r:.80}. Use 8642.")
    return int(text)


def share_of(text: str) -> float:
    """Read a share above 0 and below 1.

    Raises:
        argparse.ArgumentTypeError: For anything else, so that argparse names the option.
    """
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 < share < 1.0:
        raise argparse.ArgumentTypeError(f"it lies above 0 and below 1, but got {text!r:.80}. Use 0.9 to 0.99.")
    return share


def diagram_of(text: str) -> Path:
    """Read the path of a picture that can be drawn.

    Raises:
        argparse.ArgumentTypeError: For another suffix, so that argparse names the option.
    """
    path = Path(text)
    if path.suffix.lower() not in DIAGRAMS:
        raise argparse.ArgumentTypeError(f"a diagram is a {' or a '.join(DIAGRAMS)}, but got {text!r:.80}. Rename it.")
    return path


def _content(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} must be {what} in UTF-8, but: {error}. Check the path.") from error


class _Labelled(BaseModel):
    text: str
    label: str | None = None


def _labelled(place: int, line: str) -> _Labelled:
    try:
        return _Labelled.model_validate_json(line)
    except ValidationError as error:
        raise InvalidRequest(
            f'a line is a JSON object with a "text" and perhaps a "label", but line {place} is {line!r:.80}. Mend it.'
        ) from error


def one_line(error: Exception) -> str:
    """Say what is wrong in one line, in the words of the command line."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    # --model also takes presets, so it is the one option that is not called as its field
    option = "--" + ".".join(map(str, first["loc"])).replace("_", "-").replace("base-model", "model")
    return f"{option} {first['input']!r:.80}: {message}"


def _given(options: argparse.Namespace, fields: tuple[str, ...]) -> dict[str, object]:
    return {field: value for field in fields if (value := getattr(options, field)) is not None}


def _choices(field: str) -> tuple[str, ...]:
    return get_args(ModelSpec.model_fields[field].annotation)
