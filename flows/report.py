"""What a run leaves for people: a Markdown page and a table, in which no text can pose as markup."""

import html
import re
from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from alpaca_core.errors import AlpacaError
from alpaca_core.model import RowError
from prefect_alpaca.flows.terminal import escape_note, printable
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.speed import speed_of_run

MOST_SHOWN = 100
"""Rows that a page shows; the table and the result have more."""

MOST_TABLE_ROWS = 1_000
"""Rows of a table; all of them are in the run's result."""

MOST_CHARACTERS = 2_000
"""Characters of one text on a page."""

MOST_CELL_CHARACTERS = 120
"""Characters of one text in a table, whose cells do not wrap."""

_MARKUP = re.compile(r"([\\`*_\[\]|~])")
_BLOCK = re.compile(r"^(\d*)([#+=:.)-])")


def inline(text: str, most: int = MOST_CHARACTERS) -> str:
    """Write a text on one line of Markdown, every character of it as itself, and at most so many."""
    line = " ".join(printable(cut(text, most)).split())
    escaped = _MARKUP.sub(r"\\\1", html.escape(line, quote=False))
    return _BLOCK.sub(r"\1\\\2", escaped) or "*blank*"


def cell(text: str) -> str:
    """Write a text for a cell of a table; Prefect reads the cells of a table artifact as Markdown, too."""
    return inline(text, MOST_CELL_CHARACTERS)


def cut(text: str, most: int) -> str:
    """Cut a text to a readable length."""
    return text if len(text) <= most else f"{text[:most]} …"


def quote(text: str) -> str:
    """Write a text as a quotation, line by line."""
    lines = printable(cut(text, MOST_CHARACTERS)).splitlines()
    return "\n>\n".join(f"> {inline(line)}" for line in lines if line.strip())


def bar(share: float) -> str:
    """Draw a share between 0 and 1, with its number.

    Example:
        >>> bar(0.72)
        '▰▰▰▰▰▰▰▱▱▱ 0.72'
    """
    full = round(10 * share)
    return "▰" * full + "▱" * (10 - full) + f" {share:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows[:MOST_SHOWN]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + _more(len(rows))


def sections(parts: Sequence[tuple[str, str]], numbers: Sequence[int] | None = None) -> str:
    """Write numbered sections, each of a heading that is a text and a body that is Markdown already.

    Args:
        parts: Heading and body of each.
        numbers: Of the sections; from 1 on unless said.
    """
    numbered = list(zip(numbers or range(1, len(parts) + 1), parts, strict=True))[:MOST_SHOWN]
    written = [f"### {number}. {inline(title)}\n\n{body}" for number, (title, body) in numbered]
    return "\n\n---\n\n".join(written) + _more(len(parts))


def _more(rows: int) -> str:
    return f"\n\n*and {rows - MOST_SHOWN:,} more, in the run's result*" if rows > MOST_SHOWN else ""


def failure(error: RowError) -> str:
    """Say why a row failed."""
    return f"**Failed** (`{error.code}`): {inline(error.message)}"


def leave(
    key: str, title: str, about: str, status: Json, page: str, rows: Sequence[Json], results: Sequence[object]
) -> None:
    """Leave a Markdown artifact named `key`, and a table artifact named `key` and ``-table``.

    Args:
        key: Lower-case with dashes.
        title: What was done, in a few words.
        about: What both artifacts show of each row, in a sentence.
        status: Of the model, from the task `load_model`.
        page: Markdown.
        rows: The table, a row for each result; where text was escaped it gets a column that says so.
        results: Values of the core and `RowError`, which are counted.

    Raises:
        AlpacaError: If every result is a `RowError`. A run with some results completes, and its page
            shows the others.
    """
    failed = [result for result in results if isinstance(result, RowError)]
    by = f"{inline(status['name'])} on {status['device']}, digest {status['digest'][:12]}"
    if speed := speed_of_run(len(results)):
        by += f" · {speed.rates}"
    if failed:
        by += f" · **{len(failed)} of {len(results)} failed**"
    if note := escape_note(results):
        by += f" · {note}"
        pairs = zip(rows, results, strict=True)
        rows = [{**row, "escaped": getattr(result, "escaped", None)} for row, result in pairs]
    create_markdown_artifact(f"# {title}\n\n{by}\n\n{page}\n", key=key, description=about)
    create_table_artifact(list(rows[:MOST_TABLE_ROWS]), key=f"{key}-table", description=about)
    if failed and len(failed) == len(results):
        raise AlpacaError(f"all {len(results)} rows failed, the first because {failed[0].message}")
