"""Whether a row's tokens and probabilities depend on its company: ours, transformers and vLLM.

    python bench/same_row.py --rows 24 --alone 4 --out same.json                      # embedded model
    python bench/same_row.py --seven-billion /tmp/7b --quantization int8 --adapter random --who ours --out same.json

Rows have 3 to 220 tokens, and half of them begin alike. All are generated at temperature 1 and judged between two
labels, and again: in another order; in three shardings, each shard a call of its own; among as many other rows; in a
second process; and some alone, one row at a time. Tokens are compared with those of the first run, log-probabilities
of the labels bit by bit; "furthest" is the largest difference of a label's share of both. Between our runs all pages
are forgotten.

transformers draws all rows of a batch from one generator, so at temperature 1 no row could be the same in other
company: it is run greedily, and its rows are padded on the left, in batches as they come. vLLM gets a seed for each
request, and its prefix cache is on, as it is unless it is told otherwise (where it runs: `vllm_rows.py`). It comes
first, since it starts where most of the memory is free alone.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch
import vllm_rows
from ours import Loaded, adapter_for, folder_of
from seven_billion import machine, make_base
from timing import Figures, settle, why

from alpaca_core import ModelSpec, Sampling
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie

LABELS = (5, 9)
WHO = ("ours", "transformers", "vLLM")
AGAIN = "in a second process"
Prompts = list[tuple[int, ...]]
Row = list[Any]
"""Tokens, and log-probabilities of the labels."""
Calls = Callable[[list[Prompts], list[list[int]]], list[Row]]
"""Runs calls one after the other, each of prompts with the numbers of their rows; gives all rows in that order."""


def main() -> None:
    """Compare, and print a table."""
    options = parser().parse_args()
    spec = spec_of(options)
    if options.first:
        found = WAYS[options.who[0]](spec, options)(*first(spec, options))
        options.first.write_text(json.dumps(found), encoding="utf-8")
        return
    figures = Figures(options.out)
    figures.put("machine", machine())
    figures.put("options", {name: str(value) for name, value in vars(options).items() if value is not None})
    settle()
    for who in sorted(options.who, key="vLLM".__ne__):  # first the one that wants the memory for itself
        started = time.perf_counter()
        figures.put("runs", who, {})
        try:
            if who == "vLLM":
                of_vllm(spec, options, figures)
            else:
                of_a_model(who, spec, options, figures)
        except Exception as error:
            figures.put("runs", who, "failed", why(error))
        settle()
        print(table(who, figures.found["runs"][who], time.perf_counter() - started), flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a base model, as ModelSpec.base_model; the embedded one unless said")
    parser.add_argument("--seven-billion", type=Path, help="folder of the random checkpoint, made if it is not there")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "nf4"))
    parser.add_argument("--adapter", help="a LoRA's folder, or `random` for one that is made; vLLM runs without")
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 16, help="rows at once")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=64, help="rows that are also run one at a time")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a response")
    parser.add_argument("--longest", type=int, default=220, help="tokens of the longest prompt")
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO))
    parser.add_argument("--cases", nargs="+", help="only these, by the names that the table has")
    parser.add_argument("--vllm-seconds", type=float, default=300, help="of each of vLLM's two processes")
    parser.add_argument("--out", type=Path, help="write the log here as JSON")
    parser.add_argument("--first", type=Path, help=argparse.SUPPRESS)  # of the second process
    return parser


def spec_of(options: argparse.Namespace) -> ModelSpec:
    """Turn the options into a recipe."""
    base: dict[str, Any] = {"base_model": options.model} if options.model else {}
    if options.seven_billion:
        make_base(options.seven_billion / "base", 32)
        base["base_model"] = str(options.seven_billion / "base")
    spec = ModelSpec(dtype=options.dtype, quantization=options.quantization, batch_size=options.batch, **base)
    if options.adapter == "random":
        options.adapter = adapter_for(spec, options.seven_billion)
    return spec.model_copy(update={"adapter": options.adapter}) if options.adapter else spec


def draw(spec: ModelSpec, options: argparse.Namespace, seed: int) -> Prompts:
    """Draw prompts, the same in each process."""
    dice, head = random.Random(seed), random.Random("head")
    words = Loaded.words_of(spec).words
    begin = head.choices(words, k=options.longest // 2)
    found = []
    for row in range(options.rows):
        length = dice.randint(3, options.longest)
        shared = begin[: length - 1] if row % 2 else []
        found.append((*shared, *dice.choices(words, k=length - len(shared))))
    return found


def first(spec: ModelSpec, options: argparse.Namespace) -> tuple[list[Prompts], list[list[int]]]:
    """The call that all others are compared with: all rows at once."""
    return [draw(spec, options, 0)], [list(range(options.rows))]


def cases(spec: ModelSpec, options: argparse.Namespace) -> dict[str, tuple[list[Prompts], list[list[int]]]]:
    """The other calls; a number beyond the rows is one of other rows, whose results are not looked at."""
    rows, others = draw(spec, options, 0), draw(spec, options, 1)
    every = list(range(len(rows)))
    mixed = random.Random(2).sample(every, len(every))
    among = random.Random(3).sample(range(2 * len(rows)), 2 * len(rows))
    orders = {
        "in another order": [mixed],
        "in 2 shards": [every[place::2] for place in range(2)],
        "in 3 shards": [every[place::3] for place in range(3)],
        "in 7 shards": [every[place::7] for place in range(7)],
        "among other rows": [among],
        "alone": [[row] for row in mixed[: options.alone]],
    }
    orders = {name: order for name, order in orders.items() if not options.cases or name in options.cases}
    known = [*rows, *others]
    return {name: ([[known[row] for row in part] for part in parts], parts) for name, parts in orders.items()}


def compare(reference: list[Row], found: list[Row], parts: list[list[int]]) -> dict[str, Any]:
    """Count the rows of a case that are what they were, and say how far a probability moved at most."""
    pairs = [
        (reference[row], now)
        for row, now in zip([row for part in parts for row in part], found, strict=True)
        if row < len(reference)
    ]
    differences = [abs(_share(then) - _share(now)) for then, now in pairs]
    return {
        "rows": len(pairs),
        "same_tokens": sum(list(then[0]) == list(now[0]) for then, now in pairs),
        "same_bits": sum(list(then[1]) == list(now[1]) for then, now in pairs),
        "furthest": max(differences, default=0.0),
    }


def _share(row: Row) -> float:
    """The first label's share of both."""
    return 1 / (1 + exp(row[1][1] - row[1][0]))


def of_a_model(who: str, spec: ModelSpec, options: argparse.Namespace, figures: Figures) -> None:
    """Run all cases on one loaded model, and the first again in a second process."""
    calls = WAYS[who](spec, options)
    reference = calls(*first(spec, options))
    for name, (prompts, parts) in cases(spec, options).items():
        figures.put("runs", who, name, compare(reference, calls(prompts, parts), parts))
    del calls
    settle()
    if options.cases and AGAIN not in options.cases:
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "first.json")
        given = sys.argv[1:] if options.adapter is None else [*sys.argv[1:], "--adapter", options.adapter]
        command = [sys.executable, __file__, *given, "--who", who, "--first", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            figures.put("runs", who, AGAIN, {"failed": done.stderr[-400:]})
            return
        again = json.loads(out.read_text(encoding="utf-8"))
    parts = [list(range(len(reference)))]
    figures.put("runs", who, AGAIN, compare(reference, again, parts))


def ours(spec: ModelSpec, options: argparse.Namespace) -> Calls:
    """Ours: what `load_model` runs."""
    loaded = Loaded(spec)
    model = loaded.model(options.batch)
    trie = Trie.of([[label] for label in LABELS])[0]
    sampling = Sampling(max_new_tokens=options.tokens, temperature=1.0)

    def call(prompts: Prompts) -> list[Row]:
        if hasattr(model, "_memory"):
            model._memory.pages.forget()
        written = dict(model.generate([GenerateRow(prompt, sampling) for prompt in prompts]))
        scores = dict(model.loglikelihood([ScoreRow(prompt, trie) for prompt in prompts]))
        failed = [row for found in (written, scores) for row in found.values() if isinstance(row, RowError)]
        assert not failed, failed[0]
        return [[list(written[place].token_ids), scores[place]] for place in range(len(prompts))]

    return lambda parts, _: [row for part in parts for row in call(part)]


def transformers(spec: ModelSpec, options: argparse.Namespace) -> Calls:
    """transformers: `generate` and a forward pass on the same network, in padded batches."""
    loaded = Loaded(spec)
    network = loaded.network
    network.generation_config.eos_token_id = None

    def call(prompts: Prompts) -> list[Row]:
        time = max(map(len, prompts))
        ids = torch.tensor([[0] * (time - len(each)) + list(each) for each in prompts], device=network.device)
        lengths = torch.tensor([len(each) for each in prompts], device=network.device)
        mask = torch.arange(time, device=network.device) >= time - lengths[:, None]
        with torch.inference_mode():
            written = network.generate(
                ids, attention_mask=mask.long(), max_new_tokens=options.tokens, do_sample=False, pad_token_id=0
            )[:, time:].tolist()
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = network(ids, attention_mask=mask.long(), position_ids=positions, logits_to_keep=1).logits
        scores = logits[:, -1].float().log_softmax(-1)[:, list(LABELS)].tolist()
        return [list(pair) for pair in zip(written, scores, strict=True)]

    def calls(parts: list[Prompts], _: Sequence[object]) -> list[Row]:
        size = options.batch
        return [row for part in parts for at in range(0, len(part), size) for row in call(part[at : at + size])]

    return calls


WAYS: dict[str, Callable[[ModelSpec, argparse.Namespace], Calls]] = {"ours": ours, "transformers": transformers}


def of_vllm(spec: ModelSpec, options: argparse.Namespace, figures: Figures) -> None:
    """Run all cases in one process of vLLM's, and the first again in another."""
    asked = {"first": first(spec, options)} | cases(spec, options)
    found: dict[str, list[Row]] = {}
    for names, process in ((list(asked), "one"), (["first"], "another")):
        told = vllm_rows.run(_job(spec, options, {name: asked[name] for name in names}), options.vllm_seconds)
        for name in names:
            if {f"{name} tokens", f"{name} scores"} <= told["calls"].keys():
                written, scored = (told["calls"][f"{name} {kind}"]["rows"] for kind in ("tokens", "scores"))
                label = name if process == "one" else AGAIN
                found[label] = [[row[0], scores[1]] for row, scores in zip(written, scored, strict=True)]
        for reason in ("left_out", "failed"):
            if reason in told:
                figures.put("runs", "vLLM", reason, told[reason])
        if "first" not in found:
            return
        figures.put("runs", "vLLM", "version", told["version"])
    for name, rows in found.items():
        if name != "first":
            figures.put("runs", "vLLM", name, compare(found["first"], rows, asked.get(name, asked["first"])[1]))


def _job(spec: ModelSpec, options: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "tokens": {"temperature": 1.0, "tokens": options.tokens, "labels": None},
        "scores": {"temperature": 0.0, "tokens": 1, "labels": list(LABELS)},
    }
    chosen = options.dtype if options.dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"
    return {
        "model": str(folder_of(spec)),
        "dtype": chosen,
        "context": options.longest + options.tokens,
        "rows": options.batch,
        "memory": 0.85,
        "calls": [
            settings | {"name": f"{name} {kind}", "rounds": parts, "seeds": numbers, "shared": True, "keep": True}
            for name, (parts, numbers) in asked.items()
            for kind, settings in kinds.items()
        ],
    }


def table(who: str, runs: dict[str, Any], seconds: float) -> str:
    """Write what was found for one of them as a Markdown table."""
    lines = [f"\n### {who} ({seconds:.0f} s)\n"]
    lines += [f"{reason}: {runs[reason]}\n" for reason in ("failed", "left_out") if reason in runs]
    lines += ["| | same tokens | same bits of the labels' scores | furthest |", "|---|---|---|---|"]
    for name, found in runs.items():
        if isinstance(found, dict) and "rows" in found:
            count = found["rows"]
            cells = [f"{found[key]:,} of {count:,}" for key in ("same_tokens", "same_bits")]
            lines.append(f"| {name} | {' | '.join(cells)} | {found['furthest']:.2g} |")
        elif isinstance(found, dict):
            lines.append(f"| {name} | failed: {found['failed']!r} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
