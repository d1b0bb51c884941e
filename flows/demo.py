"""What `make demo` runs: two flows on real input, in one process with one load of the model."""

import json
import logging
import os
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

# Before Prefect reads them: `Steps` shows what is worth reading of its logs, and nothing is reported to anybody.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")  # the model is loaded before any flow
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect.settings import PREFECT_API_URL
from rich.rule import Rule

from alpaca_core import Answer, Judgment, ModelSpec, Sampling
from alpaca_core.errors import AlpacaError
from prefect_alpaca import tasks
from prefect_alpaca.flows import answer_question, judge_texts
from prefect_alpaca.flows.terminal import answer_view, console, judgments_view, text

EXAMPLES = Path("examples")

NEXT = """\
  source .venv/bin/activate
  alpaca judge "Is an alpaca a bird?"
  alpaca answer "What do alpacas eat?" --temperature 0.7 --max-attempts 3
  alpaca doctor
  prefect server start               # then deploy the flows: see the README
"""


class Steps(logging.Handler):
    """Prints what each task says once it is done."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message, unless it is the engine's own."""
        message = record.getMessage()
        if not message.startswith("Finished in state"):
            console.print(text(f"  {message}", "dim"))


def main() -> None:
    """Answer the example questions, judge the example headlines, and say what to try next."""
    started = time.monotonic()
    model = ModelSpec()
    questions = _column(EXAMPLES / "questions.jsonl", "question")
    headlines = _column(EXAMPLES / "headlines.jsonl", "text")
    api = PREFECT_API_URL.value() or "a Prefect server of its own, for as long as it runs"
    console.print(text(f"{model.base_model} as Prefect flows, on {api}", "bold"))
    # torch takes seconds to import, and so does Prefect's server to start, in a process of its own: both at once.
    threading.Thread(target=import_module, args=("alpaca_core.engines.transformers",), daemon=True).start()
    with console.status("Loading (the first time the model is unpacked, which takes half a minute) …"):
        tasks.load_model(model)
    logging.getLogger("prefect.task_runs").addHandler(Steps())

    console.print(Rule(f"answer-question: {len(questions)} questions"))
    answers = answer_question(questions, sampling=Sampling(max_new_tokens=128), model=model)
    console.print()
    for question, answer in zip(questions, tasks.values(Answer, answers), strict=True):
        console.print(answer_view(question, answer))

    console.print(Rule(f"judge-texts: {len(headlines)} headlines"))
    judgments = judge_texts(headlines, model=model)
    console.print()
    console.print(judgments_view(headlines, tasks.values(Judgment, judgments)))

    console.print(Rule())
    console.print(text(f"Done in {time.monotonic() - started:.0f} s. To try next:\n", "bold"))
    console.print(text(NEXT))


def _column(path: Path, name: str) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[name] for line in lines]


if __name__ == "__main__":
    try:
        main()
    except AlpacaError as error:
        sys.exit(f"demo: {error}")
