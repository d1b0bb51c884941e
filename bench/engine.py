"""Tokens and judgments a second, ours beside transformers', in one process and in turn.

    python bench/engine.py --rows 16 --out figures.json
    python bench/engine.py --seven-billion /tmp/llama-7b --rows 1 64 256

Without `--seven-billion` the embedded model is measured, with it a random checkpoint of LLaMA-7B's shape. Greedy,
prompts of random tokens, the end of text switched off, prefill counted, the best of `--repeat`. "ours, by modules" is
this project's loop around transformers' network, which other families use. Ceilings are measured in the same run:
a copy, and a matrix product, in the model's dtype. Before anything is timed, rows are compared alone and in company.
"""

import argparse
import itertools
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from seven_billion import machine, make_base

from alpaca_core import ModelSpec, Sampling
from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.transformers import TransformersModel
from alpaca_core.engines.weights import load_weights
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie

LABELS = Trie.of([[5], [9]])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seven-billion", type=Path, help="folder of the random checkpoint, made if it is not there")
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="rows at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a response")
    parser.add_argument("--judged", type=int, default=64, help="prompts to judge")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    spec = ModelSpec()
    if options.seven_billion:
        make_base(options.seven_billion, 32)
        spec = ModelSpec(base_model=str(options.seven_billion))
    figures: dict[str, Any] = {"machine": machine() | {"processor": platform.processor()}, "rows": {}}
    loaded = load_weights(spec)
    info = loaded.info.model_copy(update={"eos_ids": ()})
    network: Any = loaded.network
    for rows in options.rows:
        native = NativeModel(network, loaded.tokenizer, info, rows)
        modules = TransformersModel(network, loaded.tokenizer, info, rows)
        figures["rows"][rows] = measure(network, native, modules, rows, options)
    figures["ceilings"] = ceilings(native._device, native._dtype)
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def measure(network: Any, native: Any, modules: Any, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one number of rows."""
    found: dict[str, Any] = {"alone as in company": independent(native, rows, options)}
    found["tokens/s"] = in_turn(
        {
            "transformers": lambda: generated_by_transformers(network, prompts(rows, options.prompt), options.tokens),
            "ours, by modules": lambda: generated(modules, rows, options),
            "ours": lambda: generated(native, rows, options),
        },
        rows * options.tokens,
        options.repeat,
    )
    for shared in (0, options.prompt // 2, 3 * options.prompt // 4):
        found[f"items/s, {shared} of {options.prompt} tokens shared"] = in_turn(
            {
                "transformers": lambda cut=shared: judged_by_transformers(network, options, rows, cut),
                "ours, by modules": lambda cut=shared: judged(modules, options, cut),
                "ours": lambda cut=shared: judged(native, options, cut),
            },
            options.judged,
            options.repeat,
        )
    return found


def in_turn(ways: dict[str, Callable[[], None]], work: int, repeat: int) -> dict[str, Any]:
    """Time each way once after the other, several times; work a second at best, and ratios to the first."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeat):
        for name, way in ways.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    first = best[next(iter(best))]
    return {name: {"per s": round(work / took, 1), "ratio": round(first / took, 2)} for name, took in best.items()}


SEEDS = itertools.count()


def prompts(count: int, length: int, shared: int = 0) -> list[tuple[int, ...]]:
    """New prompts at each call, so that nothing is found in a cache but what this call shares."""
    draw = random.Random(next(SEEDS))
    head = [draw.randrange(300, 30_000) for _ in range(shared)]
    return [(*head, *(draw.randrange(300, 30_000) for _ in range(length - shared))) for _ in range(count)]


def generated(model: Any, rows: int, options: argparse.Namespace) -> None:
    sampling = Sampling(max_new_tokens=options.tokens)
    for _, row in model.generate([GenerateRow(prompt, sampling) for prompt in prompts(rows, options.prompt)]):
        assert not isinstance(row, RowError), row


def generated_by_transformers(network: Any, given: list[tuple[int, ...]], tokens: int) -> None:
    ids = torch.tensor(given, device=network.device)
    with torch.inference_mode():
        network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )


def judged(model: Any, options: argparse.Namespace, shared: int) -> None:
    given = prompts(options.judged, options.prompt, shared)
    for _, row in model.loglikelihood([ScoreRow(prompt, LABELS) for prompt in given]):
        assert not isinstance(row, RowError), row


def judged_by_transformers(network: Any, options: argparse.Namespace, rows: int, shared: int) -> None:
    given = prompts(options.judged, options.prompt, shared)
    with torch.inference_mode():
        for first in range(0, len(given), max(rows, 16)):
            ids = torch.tensor(given[first : first + max(rows, 16)], device=network.device)
            network(ids, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)[:, [5, 9]].tolist()


def independent(model: Any, rows: int, options: argparse.Namespace) -> dict[str, str]:
    """Compare rows at temperature 1, and judged rows bit by bit, in company and alone."""
    given = prompts(max(rows, 8), options.prompt, options.prompt // 2)
    sampled = [GenerateRow(prompt, Sampling(max_new_tokens=16, temperature=1.0)) for prompt in given]
    scored = [ScoreRow(prompt, LABELS) for prompt in given]
    together = dict(model.generate(sampled)), dict(model.loglikelihood(scored))
    model._memory.pages.forget()
    few = range(min(16, len(given)))
    same = sum(dict(model.generate([sampled[place]]))[0] == together[0][place] for place in few)
    bits = sum(dict(model.loglikelihood([scored[place]]))[0] == together[1][place] for place in few)
    return {"tokens": f"{same} of {len(few)}", "scores": f"{bits} of {len(few)}"}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of a copy, read and written, and GFLOP/s of a matrix product, at best of five."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.randn(size, device=device).to(dtype)
    target = torch.empty_like(source)
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
    product = 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix)
    return {"copy GB/s": round(copied / 1e9, 1), "product GFLOP/s": round(product / 1e9, 1)}


if __name__ == "__main__":
    main()
