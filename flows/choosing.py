"""The flow `generate-and-judge`: several candidates for each prompt, each judged, the best picked."""

from itertools import product
from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from alpaca_core import Completion, Judgment, ModelSpec, RowError, Sampling
from alpaca_core.errors import InvalidRequest, RowRejected
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.rows import map_rows
from alpaca_core.spec import OptionalText, Value
from prefect_alpaca import tasks
from prefect_alpaca.flows.options import Choices, label_name, label_of
from prefect_alpaca.flows.report import bar, cell, failure, inline, leave, quote, sections, table
from prefect_alpaca.tasks import Json
from prefect_alpaca.tasks.rows import counted


class Candidate(Value):
    """One response, and the probability that the judge gave the wanted label: None where it gave no label at all.

    `escaped` says that a line of the prompt, or of the response before the judge, that equalled a template's
    marker got a leading space.
    """

    text: str
    probability: float | None
    coverage: float
    escaped: bool = False


class Choice(Value):
    """The best response to a prompt, and all that it was picked from, in the order of their samples.

    Candidates that the judge gave no label come last; where that is all of them, `text` is the first one's and
    `probability` None. `escaped` says that it is true of a candidate.
    """

    prompt: str
    text: str
    probability: float | None
    candidates: tuple[Candidate | RowError, ...]
    escaped: bool = False


def _run_name() -> str:
    asked = flow_run.get_parameters()
    return f"best of {asked['candidates']} for {counted(len(asked['prompts']), 'prompt')}"


@flow(name="generate-and-judge", flow_run_name=_run_name, persist_result=True, result_serializer="json")
def generate_and_judge(
    prompts: Annotated[list[str], Field(min_length=1)] = [  # noqa: B006 - never changed, and the form shows it
        "Write one sentence that invites people to visit an alpaca farm."
    ],
    instruction: str = "Is this a friendly invitation?",
    labels: Choices = ["Yes", "No"],  # noqa: B006
    wanted: str = "Yes",
    candidates: Annotated[int, Field(ge=1, le=64)] = 4,
    sampling: Sampling = Sampling(temperature=0.8, max_new_tokens=64),
    adapter: OptionalText = DEFAULT_ADAPTER,
    model: ModelSpec = ModelSpec(),
) -> list[Json]:
    """Generate candidates for each prompt, judge each by the model's logits, and pick the best.

    Args:
        prompts: What is asked for, one row each.
        instruction: The judge's question about each candidate.
        labels: The judge's choices, one row each; other words that mean the same may follow, as in Yes=y,true.
        wanted: The label that good candidates get.
        candidates: Responses to each prompt to pick from; more than one needs a temperature above 0.
        sampling: How the candidates' tokens are chosen.
        adapter: Which of the model's LoRA weights to use, by name; none for the bare base.
        model: Which model generates and judges.

    Returns:
        A `Choice` or a `RowError` for each prompt, as JSON.

    Raises:
        AlpacaError: If every prompt failed, or a setting would have no effect.
    """
    choices = [label_of(label) for label in labels]
    names = [label_name(label) for label in choices]
    if wanted not in names:
        raise InvalidRequest(f"wanted is one of the labels {names}, but got {wanted!r}. Name one of them.")
    if not instruction.strip():
        raise InvalidRequest(
            f"instruction is the judge's question about each candidate, but got {instruction!r:.80}. "
            f"Ask something to which good candidates get {wanted!r}."
        )
    if candidates > 1 and sampling.temperature == 0:
        raise InvalidRequest(
            f"candidates={candidates} at temperature 0 are all the same. Set a temperature above 0, or candidates=1."
        )
    status = tasks.load_model(model)
    rows = list(product(prompts, range(candidates)))
    generated = tasks.values(
        Completion,
        tasks.generate(
            model,
            [prompt for prompt, _ in rows],
            sampling,
            sample_indices=[index for _, index in rows],
            adapter=adapter,
        ),
    )
    texts = map_rows(_said, generated)
    judged = tasks.values(Judgment, tasks.judge(model, texts, choices, instruction=instruction, adapter=adapter))
    found = map_rows(lambda completion, judgment: _candidate(completion, judgment, wanted), generated, judged)
    picked = [_pick(prompt, found[place * candidates :][:candidates]) for place, prompt in enumerate(prompts)]
    leave(
        "generate-and-judge",
        f"Best of {candidates} for {counted(len(prompts), 'prompt')}",
        "The candidate that the judge likes best for each prompt, and what it was picked from.",
        status,
        f"{inline(instruction)} Wanted: **{inline(wanted)}**\n\n"
        + sections([(prompt, _section(choice, wanted)) for prompt, choice in zip(prompts, picked, strict=True)]),
        [_table_row(prompt, choice) for prompt, choice in zip(prompts, picked, strict=True)],
        picked,
    )
    return [choice.model_dump(mode="json") for choice in picked]


def _said(completion: Completion) -> str:
    if not completion.text.strip():
        raise RowRejected(
            "empty_text",
            f"a candidate has words, but the model generated nothing visible: {completion.text!r:.80}. "
            "Another seed or a higher temperature may help.",
        )
    return completion.text


def _candidate(completion: Completion, judgment: Judgment, wanted: str) -> Candidate:
    return Candidate(
        text=judgment.text,
        probability=judgment.probabilities[wanted] if judgment.label else None,
        coverage=judgment.coverage,
        escaped=completion.escaped or judgment.escaped,
    )


def _pick(prompt: str, candidates: list[Candidate | RowError]) -> Choice | RowError:
    good = [candidate for candidate in candidates if isinstance(candidate, Candidate)]
    if not good:
        return next(candidate for candidate in candidates if isinstance(candidate, RowError))
    best = max(good, key=lambda candidate: -1.0 if candidate.probability is None else candidate.probability)
    return Choice(
        prompt=prompt,
        text=best.text,
        probability=best.probability,
        candidates=tuple(candidates),
        escaped=any(candidate.escaped for candidate in good),
    )


def _section(choice: Choice | RowError, wanted: str) -> str:
    if isinstance(choice, RowError):
        return failure(choice)
    rows = [
        ["", f"failed: {inline(candidate.code)}"]
        if isinstance(candidate, RowError)
        else ["no label" if candidate.probability is None else bar(candidate.probability), cell(candidate.text)]
        for candidate in choice.candidates
    ]
    none = "*The judge gave no candidate a label; this is the first.*\n\n" if choice.probability is None else ""
    return f"{none}{quote(choice.text)}\n\n{table([f'P({cell(wanted)})', 'Candidate'], rows)}"


def _table_row(prompt: str, choice: Choice | RowError) -> Json:
    done = choice if isinstance(choice, Choice) else None
    return {
        "prompt": cell(prompt),
        "best": cell(done.text) if done else None,
        "probability": round(done.probability, 4) if done and done.probability is not None else None,
        "candidates": len(done.candidates) if done else None,
        "error": inline(choice.message) if isinstance(choice, RowError) else None,
    }
