"""What `make demo` runs: two flows on real input, in one process with one load of the model."""

import json
import os
import time
from pathlib import Path

# Before Prefect reads them: this program prints for people, and a first run has nobody to ask.
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

from prefect.settings import PREFECT_API_URL
from rich.rule import Rule

from alpaca_core import Answer, Judgment, ModelSpec, Sampling
from prefect_alpaca import tasks
from prefect_alpaca.flows import answer_question, judge_texts
from prefect_alpaca.flows.terminal import answer_view, console, judgments_view, text

EXAMPLES = Path("examples")
LABELS = ["World", "Sports", "Business", "Technology"]
INSTRUCTION = "Classify this headline."

NEXT = """\
.venv/bin/alpaca judge "Is an alpaca a bird?"                a verb on the command line
.venv/bin/alpaca answer "…" --temperature 0.7 --max-attempts 3
.venv/bin/alpaca doctor                                      what this machine has
.venv/bin/prefect server start                               then deploy: the README says how, in five lines
"""


def main() -> None:
    """Answer the example questions, judge the example headlines, and say what to try next."""
    started = time.monotonic()
    model = ModelSpec()
    questions = _column(EXAMPLES / "questions.jsonl", "question")
    headlines = _column(EXAMPLES / "headlines.jsonl", "text")
    api = PREFECT_API_URL.value() or "a Prefect server of its own, for as long as it runs"
    console.print(text(f"{model.base_model} as Prefect flows, on {api}", "bold"))

    console.print(Rule(f"answer-question: {len(questions)} questions"))
    with console.status("Loading the model (the first time it is unpacked, which takes a minute), then thinking …"):
        answers = answer_question(questions, sampling=Sampling(max_new_tokens=128), model=model)
    for question, answer in zip(questions, tasks.values(Answer, answers), strict=True):
        console.print(answer_view(question, answer))

    console.print(Rule(f"judge-texts: {len(headlines)} headlines"))
    with console.status("Judging …"):
        judgments = judge_texts(headlines, LABELS, INSTRUCTION, show_labels=False, model=model)
    console.print(judgments_view(headlines, tasks.values(Judgment, judgments)))

    console.print(Rule())
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. To try next:\n", style="bold")
    console.print(NEXT)


def _column(path: Path, name: str) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[name] for line in lines]


if __name__ == "__main__":
    main()
