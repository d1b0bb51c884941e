"""How results look in a terminal. Texts are shown as themselves: never as markup, never as escape codes."""

import re
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from alpaca_core import (
    Answer,
    Calibration,
    CascadeJudgment,
    Completion,
    Judgment,
    Measurement,
    OrderEffect,
    Outlier,
    Policy,
    Rating,
    RowError,
    Token,
    TokenProbability,
)
from prefect_alpaca.flows.routing import Routed, statement

console = Console(highlight=False)

MOST_PLACES = 10
"""Rows that a note names by their numbers."""

_UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def printable(content: str) -> str:
    """Put a replacement character for what would not show as itself: escape codes, surrogates, bidi overrides."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", content)


def text(content: str, style: str = "") -> Text:
    """Make a text that a terminal may show."""
    return Text(printable(content), style)


def bar(share: float) -> Text:
    """Draw a share between 0 and 1, with its number."""
    full = round(10 * share)
    return Text.assemble(("▰" * full, "green"), ("▱" * (10 - full), "bright_black"), f" {share:.2f}")


def columns(distribution: Mapping[str, float]) -> str:
    """Draw a distribution as columns, the highest of them full.

    Example:
        >>> columns({"1": 0.1, "2": 0.4, "3": 0.0})
        '▃█▁'
    """
    most = max(distribution.values())
    return "".join("▁▂▃▄▅▆▇█"[round(7 * share / most) if most else 0] for share in distribution.values())


def failure(error: RowError) -> Text:
    """Say why a row failed."""
    return Text.assemble(("failed ", "bold red"), printable(error.message))


def escape_note(rows: Sequence[object]) -> str:
    """Say in which rows a line of text got a leading space; nothing where none did.

    Args:
        rows: Values of the core, those with `escaped` among them, and `RowError`.
    """
    places = [f"{place:,}" for place, row in enumerate(rows, 1) if getattr(row, "escaped", False)]
    if not places:
        return ""
    more = f" and {len(places) - MOST_PLACES:,} more" if len(places) > MOST_PLACES else ""
    where = f"row{'' if len(places) == 1 else 's'} {', '.join(places[:MOST_PLACES])}{more}"
    return f"a line of text that reads like a marker of the prompt template got a leading space: {where}"


def completion_view(prompt: str, row: Completion | RowError, *, several: bool) -> RenderableType:
    """Show a response, under its prompt where there are several."""
    body = failure(row) if isinstance(row, RowError) else text(row.text.strip())
    return Group(text(prompt, "bold"), _indented(body)) if several else body


def answer_view(question: str, row: Answer | RowError) -> RenderableType:
    """Show a question, the reasoning, the answer, and how sure the model is of it."""
    parts: list[RenderableType] = []
    if isinstance(row, RowError):
        parts.append(failure(row))
    else:
        if row.reasoning:
            parts.append(text(row.reasoning.strip(), "dim"))
        facts = Table.grid(padding=(0, 2))
        facts.add_row(Text("Answer", "green"), text(row.answer or "none", "bold"))
        if row.finish_reason == "length":
            facts.add_row("", Text("cut at its limit of tokens: the reasoning, the answer or both", "yellow"))
        if row.final_answer and row.final_answer != row.answer:
            facts.add_row(Text("Final answer", "green"), text(row.final_answer, "bold"))
        if row.p_correct is not None:
            tries = f"  best of {row.attempts} attempts" if row.attempts > 1 else ""
            facts.add_row(Text("P(correct)", "green"), bar(row.p_correct) + tries)
        if row.share is not None:
            facts.add_row(Text("Agreement", "green"), bar(row.share))
        for place, vote in enumerate(row.votes):
            sure = "" if vote.p_correct is None else f", mean P(correct) {vote.p_correct:.2f}"
            said = Text.assemble(text(vote.answer), (f"  {vote.count} of {vote.count / vote.share:.0f}{sure}", "dim"))
            facts.add_row("" if place else Text("Votes", "green"), said)
        parts.append(facts)
    return Group(text(question, "bold cyan"), _indented(Group(*parts)))


def judgments_view(texts: Sequence[str], rows: Sequence[Judgment | RowError]) -> RenderableType:
    """Show judgments as a table, one row a text; a single one in full."""
    if len(rows) == 1:
        return failure(rows[0]) if isinstance(rows[0], RowError) else judgment_view(rows[0])
    routed = any(isinstance(row, Routed) for row in rows)

    def cells(row: Judgment) -> list[RenderableType]:
        label = text(row.label, "bold") if row.label else Text("none", "yellow")
        action = [_action(row)] if isinstance(row, Routed) else []
        return [label, bar(row.probabilities[row.label]) if row.label else "", f"{row.coverage:.2g}", *action]

    headings = ["Label", "Probability", "Coverage", *(["Action"] if routed else [])]
    return _rows(texts, headings, [row if isinstance(row, RowError) else cells(row) for row in rows])


def judgment_view(row: Judgment) -> RenderableType:
    """Show one judgment: the probability of every label, and the coverage."""
    table = Table.grid(padding=(0, 2))
    for name, share in sorted(row.probabilities.items(), key=lambda item: -item[1]):
        table.add_row(text(name, "bold" if name == row.label else ""), bar(share))
    notes = [f"no label: {row.reason}" if row.reason else f"coverage {row.coverage:.2g}", *row.notes]
    action = [_action(row)] if isinstance(row, Routed) else []
    return Group(table, *action, text("; ".join(notes), "dim"))


def cascade_view(texts: Sequence[str], rows: Sequence[CascadeJudgment | RowError]) -> RenderableType:
    """Show the judgments of a cascade as a table, a single one in full with its reasoning, and what was spent."""
    if len(rows) == 1:
        return failure(rows[0]) if isinstance(rows[0], RowError) else _cascaded(rows[0])

    def cells(row: CascadeJudgment) -> list[RenderableType]:
        label = text(row.label, "bold") if row.label else Text("none", "yellow")
        share = bar(row.probabilities[row.label]) if row.label else ""
        reasoned = row.reasoning is not None
        return [label, share, "reasoned" if reasoned else "by logits", text(row.first_label or "none")]

    shown = [row if isinstance(row, RowError) else cells(row) for row in rows]
    table = _rows(texts, ["Label", "Probability", "Judged", "First label"], shown)
    return Group(table, text(savings(rows), "dim"))


def _cascaded(row: CascadeJudgment) -> RenderableType:
    if row.reasoning is None:
        return judgment_view(row)
    first = f"{row.first_label} {row.first[row.first_label]:.2f}" if row.first_label else "none"
    before = f"label before the reasoning: {first}; tokens spent: {row.reasoning_tokens:,}"
    return Group(text(row.reasoning, "dim"), judgment_view(row), text(before, "dim"))


def savings(rows: Sequence[CascadeJudgment | RowError]) -> str:
    """Say how many texts a cascade reasoned about, and what that took and saved; what it saved is an estimate."""
    judged = [row for row in rows if isinstance(row, CascadeJudgment)]
    tokens = [row.reasoning_tokens for row in judged if row.reasoning is not None]
    spent, spared = sum(tokens), len(judged) - len(tokens)
    if not tokens:
        saved = "unknown, since none was reasoned about"
    elif not spared:
        saved = "0"
    else:
        mean = spent / len(tokens)
        saved = f"about {mean * spared:,.0f} (an estimate: {mean:,.1f}, the mean of a reasoning, for each other text)"
    return (
        f"reasoned about {len(tokens):,} of {len(judged):,}; tokens spent: {spent:,}; "
        f"tokens saved against reasoning about all: {saved}"
    )


def outliers_view(texts: Sequence[str], rows: Sequence[Outlier | RowError]) -> RenderableType:
    """Show how probably each text is of another kind."""

    def cells(row: Outlier) -> list[RenderableType]:
        share = Text("unknown", "yellow") if row.p_outlier is None else bar(row.p_outlier)
        return [share, f"{row.coverage:.2g}"]

    shown = [row if isinstance(row, RowError) else cells(row) for row in rows]
    return _rows(texts, ["P(outlier)", "Coverage"], shown)


def ratings_view(texts: Sequence[str], rows: Sequence[Rating | RowError]) -> RenderableType:
    """Show each text's score, and the distribution that it is the mean of, from the worst step to the best."""

    def cells(row: Rating) -> list[RenderableType]:
        if row.score is None:
            return [Text("none", "yellow"), "", f"{row.coverage:.2g}"]
        return [Text(f"{row.score:.2f}", "bold"), Text(columns(row.distribution), "green"), f"{row.coverage:.2g}"]

    shown = [row if isinstance(row, RowError) else cells(row) for row in rows]
    return _rows(texts, ["Score", "Worst to best", "Coverage"], shown)


def measurement_view(
    measured: Measurement, order: OrderEffect | None, failed: Sequence[tuple[int, RowError]]
) -> RenderableType:
    """Show how good judgments are: each measure with its interval, and how it is read.

    Args:
        measured: From `measure`.
        order: From `measure_order`, where that was asked for.
        failed: The rows that failed, each with its number.
    """
    lines = [
        ("accuracy", measured.accuracy, "share of labels that are right"),
        ("macro F1", measured.macro_f1, "mean over labels"),
        ("Brier", measured.brier, "0 to 2; 0 is best"),
        ("NLL", measured.nll, "nats; 0 is best"),
        ("AUROC", measured.auroc, "0.5 is chance, 1 is best"),
        ("AURC", measured.aurc, "mean error rate of the k surest; 0 is best"),
        ("ECE", measured.ece, f"a calibrated judge would show {measured.ece_if_calibrated:.3f}"),
        ("answered", measured.answered, "share of rows with a label"),
    ]
    if order:
        about = f"orders that change a label; in {order.unstable:.1%} of rows one does"
        lines.append(("order flips", order.flip_rate, about))
    rows = f"rows: {measured.n:,} with a label, {measured.abstained:,} without, {measured.failed:,} failed"
    table = _table(text(rows, "bold"), "measure", "value", "95 % interval", "")
    for name, found, about in lines:
        value = "undefined" if found.value is None else f"{found.value:.3f}"
        interval = "" if found.low is None or found.high is None else f"{found.low:.3f} to {found.high:.3f}"
        table.add_row(name, Text(value, "bold"), interval, Text(about, "dim"))
    coverage = ", ".join(f"{name} {value:.2g}" for name, value in measured.coverage.items())
    notes = [text(f"coverage, quantiles: {coverage}")]
    if order:
        notes.append(text("labels by place in the prompt: " + ", ".join(f"{share:.3f}" for share in order.by_place)))
    first = [Text.assemble(f"row {place:,} ", failure(error)) for place, error in failed[:1]]
    return Group(table, *notes, *first)


def calibration_view(calibration: Calibration) -> RenderableType:
    """Show what a calibration does to each label, and why it was chosen."""
    table = _table(text(calibration.method, "bold"), "label", "scale", "bias")
    for name, scale, bias in zip(calibration.bound.labels, calibration.scale, calibration.bias, strict=True):
        table.add_row(text(name), f"{scale:.3f}", f"{bias:+.3f}")
    return Group(table, text(f"{calibration.rows} rows; {calibration.reason}", "dim"))


def policy_view(policy: Policy) -> RenderableType:
    """Show what a policy accepts and reviews, and what holds for it."""
    table = Table.grid(padding=(0, 2))
    table.add_row("accepted", bar(policy.accepted / policy.rows), f"{policy.accepted:,} of {policy.rows:,} rows")
    table.add_row("precision", bar(policy.bound), f"at least, at confidence {policy.confidence:.4g}")
    return Group(text(statement(policy)), table)


def tokens_view(content: str, tokens: Sequence[Token], best: Sequence[TokenProbability]) -> RenderableType:
    """Show a text's tokens, which of them are special, and the likeliest tokens after it."""
    table = _table(text(content, "bold"), "id", "piece", "text", "")
    for token in tokens:
        table.add_row(str(token.id), text(token.piece), text(repr(token.text)), "special" if token.special else "")
    following = _table(text("likeliest first tokens of the response", "bold"), "id", "piece", "text", "probability")
    for token in best:
        following.add_row(str(token.id), text(token.piece), text(repr(token.text)), bar(token.probability))
    return Group(table, "", following) if best else table


def check_view(name: str, state: str, found: str, remedy: str) -> RenderableType:
    """Show one check of the doctor."""
    style = {"ok": "green", "note": "yellow", "broken": "bold red"}[state]
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=6, no_wrap=True, style=style)
    table.add_column(min_width=11, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(state, text(name), text(found))
    if remedy:
        table.add_row("", "", text(remedy, "italic"))
    return table


def _action(row: Routed) -> Text:
    return Text(row.action, {"accept": "green", "review": "yellow", "abstain": "bright_black"}[row.action])


def _rows(texts: Sequence[str], headings: Sequence[str], rows: Sequence[list[RenderableType] | RowError]) -> Table:
    """Make a table of texts, each with its cells or with why it failed."""
    table = Table(box=None, pad_edge=False, header_style="green", padding=(0, 1))
    table.add_column("Text", overflow="fold", ratio=1)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for shown, cells in zip(texts, rows, strict=True):
        if isinstance(cells, RowError):
            table.add_row(Group(*([text(shown)] if shown.strip() else []), failure(cells)))
        else:
            table.add_row(text(shown), *cells)
    return table


def _indented(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 1, 2), expand=False)


def _table(title: Text, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="green", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "id" else "left", overflow="fold")
    return table
