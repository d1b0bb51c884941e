"""Compare the judge with CAPPr, and with first-token and top-20 readings, on the same network and rows.

    python bench/peers.py --data FOLDER --out peers.json

FOLDER as for `bench/judging.py`; CAPPr comes by ``pip install --no-deps cappr==0.9.6``. All read one network in one
process, in turn, `--repeats` times; the fastest time of each counts.

- CAPPr (https://github.com/kddubey/cappr) averages a completion's token log-probabilities unless it is told otherwise
  (`cappr.utils.classify.agg_log_probs`, argument ``func``). With their sum it says what the judge says of one spelling
  a label: its name behind a space.
- A first-token reading takes the probability of the first token of that spelling.
- A top-20 reading sees the 20 likeliest next tokens, as APIs give them, and counts those that begin a label's
  spelling. In both, labels that begin alike are equal, and the first of equals wins.

Mass missed is the share of the mass of all spellings that a reading does not see: other spellings, or those that
begin with other tokens. "batch" takes away what a reading favours over these rows (2309.17249), without labels.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import sets
import tokenizers
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedTokenizerFast

from alpaca_core import ModelSpec, classify, judge, load_model, prompts
from alpaca_core.errors import InvalidLabels
from alpaca_core.labels import Spellings, as_labels, find_spellings
from alpaca_core.model import ScoreRow, Trie
from alpaca_core.prompts import template_of

Masses = NDArray[numpy.float64]
"""Log masses, ``(rows, labels)``, in nats."""

TOP = 20


@dataclass(frozen=True)
class Task:
    """A labelled set."""

    name: str
    texts: list[str]
    gold: list[str]
    labels: list[str]

    @property
    def prompts(self) -> list[str]:
        """What `classify` asks of each text."""
        return [prompts.CLASSIFY.replace(prompts.TEXT, text) for text in self.texts]


def read_tasks(data: Path, rows: int) -> list[Task]:
    """Read the sets; rows are chosen by a fixed seed."""
    found = []
    for task in sets.tasks(data):
        if task.name in ("AG News", "banking77"):
            texts, gold = sets.shuffled(task, data, rows)
            found.append(Task(task.name, texts, gold, [str(label) for label in task.labels]))
    return found


class Ours:
    """The judge, and what can be read with its two primitives."""

    def __init__(self, model: Any, task: Task) -> None:
        self._model, self._task = model, task
        writer = template_of(model, "raw")
        self._ids = [writer.encode(prompt, None).ids for prompt in task.prompts]
        self._names = self._spelt()
        self._spellings = [find_spellings(model.tokenizer, as_labels(task.labels), ids) for ids in self._ids]

    def _spelt(self) -> list[list[tuple[int, ...]]]:
        names = [f" {label}" for label in self._task.labels]
        return [[self._model.tokenizer.continuation(ids, name) for name in names] for ids in self._ids]

    def _forget(self) -> None:
        """Forget what was worked out about labels, so that each run finds it anew, as CAPPr does."""
        self._model.tokenizer._continue.cache_clear()
        self._model.tokenizer._remembered.cache_clear()

    def all_spellings(self) -> Masses:
        """What `classify` says, from the text on."""
        self._forget()
        judged: list[Any] = classify(self._model, self._task.texts, self._task.labels)
        shares = numpy.array([[row.coverage * share for share in row.probabilities.values()] for row in judged])
        with numpy.errstate(divide="ignore"):
            return numpy.asarray(numpy.log(shares))

    def one_spelling(self) -> Masses:
        """A trie of one spelling a label, and nothing else; its tokens are found first."""
        self._forget()
        names = self._spelt()
        made: dict[tuple[tuple[int, ...], ...], tuple[Trie, list[int]]] = {}
        tries = [made.setdefault(key, Trie.of(key)) for key in map(tuple, names)]
        scores = self._score([trie for trie, _ in tries])
        pairs = zip(tries, scores, strict=True)
        return numpy.array([[_paths(trie, score)[end] for end in ends] for (trie, ends), score in pairs])

    def next_tokens(self) -> Masses:
        """The whole table of the next token, ``(rows, vocabulary)``."""
        size = self._model.info.vocab_size
        return numpy.array(self._score([Trie(tuple(range(size)), (-1,) * size)] * len(self._ids)))

    def first_token(self, table: Masses) -> tuple[Masses, Callable[[int], set[int]]]:
        """Masses by the first token of each name, and the tokens that this looks at in a row."""
        firsts = [[name[0] for name in names] for names in self._names]
        return numpy.take_along_axis(table, numpy.array(firsts), axis=1), lambda row: set(firsts[row])

    def top_tokens(self, table: Masses) -> tuple[Masses, Callable[[int], set[int]]]:
        """Masses by the likeliest tokens that begin a spelling, and the tokens that this looks at in a row."""
        best = [set(row.tolist()) for row in numpy.argsort(-table, axis=1)[:, :TOP]]
        masses = numpy.full((len(table), len(self._task.labels)), -math.inf)
        for row, spellings in enumerate(self._spellings):
            begins = {(label, path[0]) for label in range(masses.shape[1]) for path in spellings.sequences(label)}
            for label, token in begins:
                if token in best[row]:
                    masses[row, label] = numpy.logaddexp(masses[row, label], table[row, token])
        return masses, lambda row: best[row]

    def unseen(self, looks_at: Callable[[int], set[int]]) -> list[float]:
        """The share of each row's mass, over all spellings, that begins with tokens not looked at."""
        shares = []
        for row, scores in enumerate(self._score([spellings.trie for spellings in self._spellings])):
            spellings, seen = self._spellings[row], looks_at(row)
            paths = _paths(spellings.trie, scores)
            masses = {node: math.exp(paths[node]) for node in _outermost(spellings)}
            missed = sum(mass for node, mass in masses.items() if _first(spellings.trie, node) not in seen)
            shares.append(missed / sum(masses.values()))
        return shares

    def left_out(self) -> float | None:
        """The median share of the mass of all segmentations that the default leaves out; None for too many."""
        try:
            asked: list[Any] = judge(
                self._model, self._task.texts, self._task.labels, all_segmentations=True, **sets.COMPLETION
            )
        except InvalidLabels:
            return None
        usual: list[Any] = judge(self._model, self._task.texts, self._task.labels, **sets.COMPLETION)
        return float(numpy.median([1 - few.coverage / every.coverage for few, every in zip(usual, asked, strict=True)]))

    def _score(self, tries: Sequence[Trie]) -> list[list[float]]:
        rows = [ScoreRow(ids, trie) for ids, trie in zip(self._ids, tries, strict=True)]
        return [scores for _, scores in sorted(self._model.loglikelihood(rows))]


def _paths(trie: Trie, scores: Sequence[float]) -> list[float]:
    paths: list[float] = []
    for score, parent in zip(scores, trie.parents, strict=True):
        paths.append(score + (paths[parent] if parent >= 0 else 0.0))
    return paths


def _outermost(spellings: Spellings) -> list[int]:
    """The ends without another above them; their masses sum to the coverage."""
    below: list[bool] = []
    for parent in spellings.trie.parents:
        below.append(parent >= 0 and (below[parent] or parent in spellings.ends))
    return [node for node in spellings.ends if not below[node]]


def _first(trie: Trie, node: int) -> int:
    while trie.parents[node] >= 0:
        node = trie.parents[node]
    return trie.tokens[node]


class Cappr:
    """CAPPr on our network. Of two batch sizes the faster is used, until one is slower than that before it."""

    def __init__(self, model: Any, task: Task, batches: Sequence[int]) -> None:
        bring_back()
        from cappr.huggingface import classify as cappr  # type: ignore[import-not-found]
        from cappr.utils.classify import agg_log_probs  # type: ignore[import-not-found]

        self._cappr, self._add_up, self._task = cappr, agg_log_probs, task
        definition = tokenizers.Tokenizer.from_str(model.tokenizer.definition)
        end = model.tokenizer.piece(model.tokenizer.eos_ids[0])
        self._model = model._network, PreTrainedTokenizerFast(tokenizer_object=definition, eos_token=end)
        self.batch = batches[0]
        best = math.inf
        for batch in batches:
            some = (task.prompts * batch)[: max(batch, 2)]
            try:
                self._read(some[:1], batch)
                started = time.perf_counter()
                self._read(some, batch)
            except torch.OutOfMemoryError:
                break
            seconds = (time.perf_counter() - started) / len(some)
            if seconds > best:
                break
            self.batch, best = batch, seconds

    def sums(self) -> Masses:
        """Sums of log-probabilities."""
        self._found = self._read(self._task.prompts, self.batch)
        return numpy.asarray(self._add_up(self._found, func=numpy.sum))

    def means(self) -> Masses:
        """What it takes unless it is told otherwise: their means. Of the last `sums`."""
        return numpy.asarray(self._add_up(self._found, func=numpy.mean))

    def sums_with_prefix(self) -> Masses:
        """Sums, with what all prompts begin with in its cache."""
        prefix = prompts.CLASSIFY.partition(f" {prompts.TEXT}")[0]
        rest = [prompt.removeprefix(f"{prefix} ") for prompt in self._task.prompts]
        with self._cappr.cache(self._model, prefix) as cached:
            return numpy.asarray(self._add_up(self._read(rest, self.batch, cached), func=numpy.sum))

    def _read(self, asked: list[str], batch: int, model: Any = None) -> Any:
        return self._cappr.log_probs_conditional(
            asked, self._task.labels, model or self._model, batch_size=batch, show_progress_bar=False
        )


def bring_back() -> None:
    """Put back what CAPPr 0.9.6 calls: two methods of transformers 4's caches, and numpy 1's name of a warning."""

    def of_tuples(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
        cache = DynamicCache()
        for place, (keys, values) in enumerate(layers):
            cache.update(keys, values, place)
        return cache

    caches: Any = DynamicCache
    caches.from_legacy_cache = staticmethod(of_tuples)
    numpy.VisibleDeprecationWarning = numpy.exceptions.VisibleDeprecationWarning  # type: ignore[attr-defined]
    caches.to_legacy_cache = lambda cache: tuple((layer.keys, layer.values) for layer in cache.layers)


def run(model: Any, task: Task, repeats: int, batches: Sequence[int]) -> dict[str, Any]:
    """Compare on one set."""
    ours, cappr = Ours(model, task), Cappr(model, task, batches)
    timed: dict[str, Callable[[], Masses]] = {
        "ours, all spellings": ours.all_spellings,
        "ours, one spelling": ours.one_spelling,
        "CAPPr, sum": cappr.sums,
        "CAPPr, sum, prefix cached": cappr.sums_with_prefix,
    }
    found: dict[str, Masses] = {}
    seconds = dict.fromkeys(timed, math.inf)
    for _ in range(repeats):
        for name, reading in timed.items():
            started = time.perf_counter()
            found[name] = reading()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            print(task.name, name, f"{len(task.texts) / seconds[name]:.2f} items/s", flush=True)
    found["CAPPr, mean"] = cappr.means()
    table = ours.next_tokens()
    found["first token"], firsts = ours.first_token(table)
    found[f"top {TOP}"], tops = ours.top_tokens(table)

    results = {name: _figures(masses, task) for name, masses in found.items()}
    for name, taken in seconds.items():
        results[name]["items_per_second"] = len(task.texts) / taken
    one, every = (numpy.exp(found[f"ours, {name}"]).sum(1) for name in ("one spelling", "all spellings"))
    results["ours, one spelling"]["mass_missed"] = float(numpy.median(1 - one / every))
    results["first token"]["mass_missed"] = float(numpy.median(ours.unseen(firsts)))
    results[f"top {TOP}"]["mass_missed"] = float(numpy.median(ours.unseen(tops)))
    results["first token"]["labels_missed"] = float(numpy.mean([_shared(row) for row in found["first token"]]))
    results[f"top {TOP}"]["labels_missed"] = float(numpy.isneginf(found[f"top {TOP}"]).sum(1).mean())
    mine = _shares(found["ours, one spelling"])
    differences = {
        name: float(abs(mine - _shares(found[name])).max()) for name in ("CAPPr, sum", "CAPPr, sum, prefix cached")
    }
    return {
        "rows": len(task.texts),
        "labels": len(task.labels),
        "cappr_batch": cappr.batch,
        "largest_difference_of_probabilities": differences,
        "left_out_by_default": ours.left_out(),
        "readings": results,
    }


def _shares(masses: Masses) -> Masses:
    top = masses.max(1, keepdims=True)
    shares = numpy.exp(masses - numpy.where(numpy.isfinite(top), top, 0.0))
    return numpy.asarray(shares / numpy.maximum(shares.sum(1, keepdims=True), 1e-300))


def _shared(row: Masses) -> int:
    """Labels that another one cannot be told from."""
    _, counts = numpy.unique(row, return_counts=True)
    return int(counts[counts > 1].sum())


def _figures(masses: Masses, task: Task) -> dict[str, float | None]:
    gold = numpy.array([task.labels.index(label) for label in task.gold])
    z = numpy.log(_shares(masses)) if numpy.isfinite(masses).all() else None
    return {
        "accuracy": float((masses.argmax(1) == gold).mean()),
        "accuracy_batch": None if z is None else float(((z - z.mean(0)).argmax(1) == gold).mean()),
        "coverage": float(numpy.median(numpy.exp(masses).sum(1))),
    }


def table(figures: dict[str, Any]) -> str:
    """Write the figures as a Markdown table, and what does not go into one below it."""
    lines = ["| set, labels, rows | reading | items/s | accuracy | batch | coverage | labels missed | mass missed |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    notes = []
    for name, found in figures["sets"].items():
        for place, (reading, row) in enumerate(found["readings"].items()):
            told = reading.startswith("ours") or "sum" in reading  # others are no probabilities of labels
            cells = [
                f"{name}, {found['labels']}, {found['rows']:,}" if place == 0 else "",
                f"{reading}, batches of {found['cappr_batch']}" if reading == "CAPPr, sum" else reading,
                _written(row.get("items_per_second"), ".3g"),
                _written(row["accuracy"], ".3f"),
                _written(row["accuracy_batch"], ".3f"),
                _written(row["coverage"] if told else None, ".2g"),
                _written(row.get("labels_missed"), ".1f"),
                _written(row.get("mass_missed"), ".1%"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        furthest = max(found["largest_difference_of_probabilities"].values())
        notes.append(
            f"{name}: CAPPr and one spelling differ by {furthest:.1g} at most; the default leaves out "
            f"{_written(found['left_out_by_default'], '.2%')} of the mass of all segmentations."
        )
    return "\n".join([*lines, "", *notes])


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    """Compare, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=ModelSpec().base_model)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64, help="of ours")
    parser.add_argument("--cappr-batches", default="1,2,4,8,16,32,64", help="of CAPPr: the fastest is used")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", help="names of sets, separated by semicolons")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.cappr_batches.split(",")]
    spec = ModelSpec(base_model=options.model, dtype="float32", batch_size=options.batch_size)
    figures: dict[str, Any] = {"machine": platform.platform(), "sets": {}}
    with load_model(spec) as model:
        figures["model"] = model.info.model_dump(mode="json", exclude={"chat_template"})
        for task in read_tasks(options.data, options.rows):
            if not options.only or task.name in options.only.split(";"):
                figures["sets"][task.name] = run(model, task, options.repeats, batches)
                options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
