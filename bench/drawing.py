"""The figures of `bench/engine.py` as tables and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS, PEER, NOTEBOOK, LIMIT = "#1b6e53", "#9aa5b1", "#c9ced6", "#c0392b"


def table(figures: dict[str, Any], section: str) -> str:
    """Write a section as a Markdown table: per second, how many times that of each ours is, share of the limit."""
    found = figures["sections"].get(section, {})
    lines = [f"\n### {section}, {found.get('unit', 'per s')} ({found.get('section_s', 0):.0f} s)\n"]
    if "failed" in found:
        lines.append(f"failed: {found['failed']}\n")
    if section == "ready":
        return "\n".join(lines + _ready(found))
    if section == "growth":
        return "\n".join(lines + _growth(found))
    cases: dict[str, Any] = found.get("cases", {})
    names = list(dict.fromkeys(name for case in cases.values() for name in case.get("ways", {})))
    names.sort(key=lambda name: not name.startswith("ours"))
    if not names:
        return "\n".join(lines)
    lines += [f"| | {' | '.join(cases)} |", "|---" * (1 + len(cases)) + "|"]
    notes: dict[str, dict[str, list[str]]] = {}
    for name in names:
        cells = []
        for title, case in cases.items():
            entry = case.get("ways", {}).get(name, {})
            cells.append(_cell(entry, None if name.startswith("ours") else _ours(case["ways"]), case.get("limit")))
            told = [entry[key] for key in ("failed", "left_out", "note") if key in entry]
            if "notebook" in name and "per_s" in entry:
                told.append(f"over {entry['units']} tokens, items or questions")
            for note in told:
                notes.setdefault(note, {}).setdefault(name, []).append(title)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if any("limit" in case for case in cases.values()):
        lines.append(f"| limit | {' | '.join(_number(case.get('limit')) for case in cases.values())} |")
    lines.append("")
    for note, where in notes.items():
        told = [
            name if len(titles) == len(cases) else f"{name} ({', '.join(titles)})" for name, titles in where.items()
        ]
        lines.append(f"- {', '.join(told)}: {note}")
    return "\n".join(lines)


def _ours(ways: dict[str, Any]) -> float | None:
    return next((entry.get("per_s") for name, entry in ways.items() if name.startswith("ours")), None)


def _cell(entry: dict[str, Any], ours: float | None, limit: float | None) -> str:
    if "per_s" not in entry:
        return "failed" if "failed" in entry else "-"
    more = [f"ours {ours / entry['per_s']:.2f}x"] if ours else []
    more += [f"{entry['per_s'] / limit:.0%} of the limit"] if limit else []
    return f"{_number(entry['per_s'])} ({', '.join(more)})" if more else _number(entry["per_s"])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ready(found: dict[str, Any]) -> list[str]:
    lines = ["| | imported | loaded | first token | everything ready | process |", "|---|---|---|---|---|---|"]
    for name, entry in found.items():
        if isinstance(entry, dict):
            cells = [str(entry.get(key, "-")) for key in ("imported", "loaded", "first_token", "ready", "process")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            lines += [f"| | {entry['failed']!r} | | | | |"] if "failed" in entry else []
    return lines


def _growth(found: dict[str, Any]) -> list[str]:
    lines = ["| | | size: rows per second |", "|---|---|---|"]
    for axis in ("rows", "prompt", "labels"):
        for name, sizes in found.get(axis, {}).items():
            told = [
                f"{int(size):,}: {_number(entry.get('per_s')) if 'per_s' in entry else next(iter(entry.values()))}"
                for size, entry in sizes.items()
            ]
            lines.append(f"| {axis} | {name} | {'; '.join(told)} |")
    return lines


def draw_speed(figures: dict[str, Any], path: Path) -> None:
    """Draw each case of generation, judging and int8 as bars, with the limit as a line."""
    from matplotlib.figure import Figure

    cases = [
        (section, title, case)
        for section in ("generate", "judge", "int8")
        for title, case in figures["sections"].get(section, {}).get("cases", {}).items()
        if any("per_s" in entry for entry in case.get("ways", {}).values())
    ]
    if not cases:
        return
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    for axis, (section, title, case) in zip(axes, cases, strict=False):
        _bars(axis, case)
        unit = "" if section == "int8" else f", {figures['sections'][section]['unit']}"
        head = {"generate": "Generate", "judge": "Judge", "int8": "int8 + LoRA"}[section]
        axis.set_title(f"{head}{unit}\n{title}", fontsize=10, loc="left")
    figure.suptitle(_heading(figures), fontsize=9, x=0.01, ha="left", color="#555")
    figure.savefig(path, dpi=150)


def _bars(axis: Any, case: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    ways = sorted(
        ((name, entry["per_s"]) for name, entry in case["ways"].items() if "per_s" in entry), key=lambda way: way[1]
    )
    names, values = [name for name, _ in ways], [value for _, value in ways]
    colours = [OURS if name.startswith("ours") else NOTEBOOK if "notebook" in name else PEER for name in names]
    axis.barh(names, values, color=colours, height=0.7)
    limit = case.get("limit")
    end = max([*values, limit or 0.0])
    for place, value in enumerate(values):
        inside = value > 0.7 * end
        axis.annotate(
            _number(value),
            (value, place),
            xytext=(-4 if inside else 4, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside and names[place].startswith("ours") else "black",
            fontsize=8,
        )
    if limit:
        axis.axvline(limit, color=LIMIT, linewidth=1.5, linestyle="--")
        told = f"limit {_number(limit)} "
        axis.text(limit, len(names) - 0.45, told, color=LIMIT, fontsize=8, ha="right", va="bottom")
    axis.set_xlim(0, end * 1.06)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(-0.6, len(names) - 0.1)
    axis.tick_params(labelsize=8, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw_growth(figures: dict[str, Any], path: Path) -> None:
    """Draw how time per row grows with rows, prompts and labels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    found = figures["sections"].get("growth", {})
    titles = {"rows": "rows in a call", "prompt": "tokens of a prompt", "labels": "labels of 1 to 3 tokens"}
    if not any(axis in found for axis in titles):
        return
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for place, (name, sizes) in enumerate(found.get(key, {}).items()):
            points = [(int(size), 1000 / entry["per_s"]) for size, entry in sizes.items() if "per_s" in entry]
            colour = [OURS, "#3b6fb6"][place] if name != "CAPPr" else PEER
            _line(axis, points, label=name, color=colour, marker="o")
        if key == "prompt":
            points = [(int(size), 1000 / per_s) for size, per_s in found.get("limit", {}).get("judge", {}).items()]
            _line(axis, points, label="limit of judge", color=LIMIT, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel=title)
        sizes = sorted({int(size) for line in found.get(key, {}).values() for size in line})
        axis.set_xticks(sizes, labels=[f"{size:,}" for size in sizes], fontsize=8)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.4g}")
        axis.minorticks_off()
        axis.set_title("milliseconds per row", fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.25)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(_heading(figures), fontsize=9, x=0.01, ha="left", color="#555")
    figure.savefig(path, dpi=150)


def _line(axis: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), markersize=4, linewidth=1.6, **style)


def _heading(figures: dict[str, Any]) -> str:
    machine = figures["machine"]
    device = machine["device"] if "NVIDIA" in machine["device"] else f"{machine['threads']} CPU threads"
    return f"{figures['model']}, {figures['dtype']}, {device}, torch {machine['torch']}, {machine['date']}"
