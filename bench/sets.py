"""The labelled sets that the judge is measured on, as questions."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca_core import Label, prompts
from alpaca_core.spec import YES_NO
from alpaca_core.uses import pairs

COMPLETION = {"instruction": prompts.CLASSIFY, "template": "raw", "show_labels": False}
ASKED = {"instruction": "Classify this article."}
TOPICS = ("World", "Sports", "Business", "Technology")
TOPICS_WITH_ALIASES = (
    Label(name="World", aliases=("Politics", "International")),
    Label(name="Sports", aliases=("Sport", "Football")),
    Label(name="Business", aliases=("Finance", "Economy")),
    Label(name="Technology", aliases=("Science", "Internet")),
)


@dataclass(frozen=True)
class Task:
    """A labelled set as a question."""

    name: str
    file: str
    text: Callable[[dict[str, Any]], str]
    gold: Callable[[dict[str, Any]], str]
    labels: Sequence[str | Label] = YES_NO
    question: dict[str, Any] = field(default_factory=dict)


def _article(row: dict[str, Any]) -> str:
    return f"{row['title']}. {row['text']}"


def _solution(row: dict[str, Any]) -> str:
    return prompts.VERIFY.format(question=row["question"], answer=row["solution"])


def _pair(row: dict[str, Any]) -> str:
    return str(pairs([row["sentence1"]], [row["sentence2"]])[0])


def _yes(field: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "Yes" if row[field] else "No"


def _intent(row: dict[str, Any]) -> str:
    return str(row["category"]).replace("_", " ")


def tasks(data: Path) -> list[Task]:
    """Return the sets; the intents of banking77 are those that occur in its file."""
    intents = sorted({_intent(row) for row in rows_of(data / "banking77_dev.jsonl")})
    ag, pair = "agnews_dev.jsonl", {"instruction": prompts.SAME_MEANING}
    return [
        Task("AG News", ag, _article, lambda row: row["label"], TOPICS, COMPLETION),
        Task("AG News, aliases", ag, _article, lambda row: row["label"], TOPICS_WITH_ALIASES, COMPLETION),
        Task(
            "AG News, asked", ag, _article, lambda row: row["label"], TOPICS, {"instruction": "Classify this article."}
        ),
        Task("MSRP", "msrp_dev.jsonl", _pair, _yes("is_paraphrase"), question=pair),
        Task("GSM8K solutions", "gsm8k_solutions_dev.jsonl", _solution, _yes("is_correct")),
        Task("banking77", "banking77_dev.jsonl", lambda row: row["text"], _intent, intents, COMPLETION),
    ]


def shuffled(task: Task, data: Path, most: int | None = None) -> tuple[list[str], list[str]]:
    """Return the texts of a set and their right labels, in an order that is always the same for as many rows."""
    found = rows_of(data / task.file)
    rows = random.Random(0).sample(found, min(most or len(found), len(found)))
    return [task.text(row) for row in rows], [task.gold(row) for row in rows]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON Lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
