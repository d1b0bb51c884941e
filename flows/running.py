"""What the commands of `alpaca` do around a verb: load the model, show progress, print rows, read what was saved."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from rich.console import Console, RenderableType

from alpaca_core import Calibration, Policy, RowError, load_model, progress
from alpaca_core.errors import InvalidRequest
from alpaca_core.metering import Metered
from alpaca_core.rows import Progress
from alpaca_core.spec import Value
from prefect_alpaca.flows import terminal
from prefect_alpaca.flows.options import one_line, spec_of

Kind = TypeVar("Kind", Calibration, Policy)


@contextmanager
def quiet(doing: str) -> Iterator[None]:
    """Say on standard error, in a terminal, what takes so long, and keep libraries off standard output."""
    with redirect_stdout(sys.stderr), Console(stderr=True).status(terminal.text(doing)):
        yield


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Metered]:
    """Load the model, and keep libraries off standard output as long as it is there."""
    spec = spec_of(options)
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        with quiet(f"Loading {spec.base_model} …"):
            model = stack.enter_context(load_model(spec))
        yield Metered(model)


@contextmanager
def progress_bar(verb: str, rows: int, model: Metered) -> Iterator[Progress]:
    """Draw a progress bar on standard error where that is a terminal, and say how fast it was in its place."""
    model.restart()
    with progress.progress_bar(verb, rows) as advance:
        yield advance
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(terminal.text(f"{verb}: {model.speed(rows)}", "dim"))


def print_rows(
    options: argparse.Namespace, rows: Sequence[Value | RowError], views: Callable[[], Sequence[RenderableType]]
) -> int:
    """Print the rows as JSON Lines, or as they look in a terminal, and return the exit code."""
    if options.json:
        for row in rows:
            print_json(row.model_dump(mode="json"))
    else:
        note = terminal.escape_note(rows)
        terminal.console.print(*views(), *([terminal.text(note, "yellow")] if note else []), sep="\n")
    return 1 if any(isinstance(row, RowError) for row in rows) else 0


def print_json(value: object) -> None:
    """Print JSON that is one line in every locale: letters as themselves where standard output is UTF-8."""
    line, encoding = json.dumps(value, ensure_ascii=False), getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf8 = line.encode(encoding, "replace") == line.encode("utf-8", "surrogatepass")
    is_line = len(line.splitlines()) == 1  # U+2028 and its like end a line for some readers
    print(line if is_utf8 and is_line else json.dumps(value), flush=True)


def saved(kind: type[Kind], name: str | None) -> Kind | None:
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
