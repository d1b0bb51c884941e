"""What a host costs and gives: loads, second runs, and many clients beside one.

    python bench/host.py --out host.json                                              # embedded model
    python bench/host.py --model /tmp/7b/base --device cuda --quantization int8 --batch 256 --out host.json

A host of its own is started in a folder of its own, and ended. Times are wall clock, in seconds.

- load: the first client, until it may ask; beside it the same load in a process without a host.
- second run: a new process, from its start to the first result, with the warm host and without; and of it, what
  opening the model takes.
- many: `clients` threads, each with a connection of its own and `rows` rows of mixed settings (greedy, sampled, beams,
  judged) over all adapters, begin at once; beside it one client that sends all of those rows in one call of each kind.
  The ratio is that of rows a second. "worst wait over median" is of the times that clients waited for all of theirs,
  and "worst first result" of those until the first.
- same: whether every client got, bit for bit, what one client gets.
- beside: a judged row and a response of 8 tokens, ten of each one after another, with the host idle, and while another
  client's rows, twenty times those of `many`, are under way: median and worst.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from seven_billion import machine

from alpaca_core import ModelSpec, NamedAdapter, Sampling
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import hosts, stop
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie

Rows = list[GenerateRow | ScoreRow]

_FIRST = """
import sys, time
began = time.perf_counter()
from alpaca_core import ModelSpec, load_model
from alpaca_core.model import GenerateRow
from alpaca_core.spec import Sampling
spec = ModelSpec.model_validate_json(sys.argv[1])
imported = time.perf_counter()
with load_model(spec) as model:
    opened = time.perf_counter()
    list(model.generate([GenerateRow((5, 6), Sampling(max_new_tokens=1))]))
print(imported - began, opened - imported, time.perf_counter() - opened)
"""


def main() -> None:
    """Measure, and print the figures as JSON."""
    options = parser().parse_args()
    named = tuple(NamedAdapter(name=f"adapter-{place}", source=str(path)) for place, path in enumerate(options.adapter))
    spec = ModelSpec(
        base_model=options.model,
        device=options.device,
        quantization=options.quantization,
        batch_size=options.batch,
        adapters=named,
    )
    told = {name: str(value) for name, value in vars(options).items()}
    figures: dict[str, Any] = {"machine": machine(), "options": told}
    with folder_of_its_own():
        figures["alone"] = first_result(spec, "off")
        began = time.perf_counter()
        with at_host(spec, "auto") as model:
            figures["load_seconds"] = time.perf_counter() - began
            figures["second_run"] = [first_result(spec, "auto") for _ in range(options.repeat)]
            vocabulary, names = model.info.vocab_size, [None, *(adapter.name for adapter in named)]
            work = [rows_of(place, options, vocabulary, names) for place in range(options.clients)]
            list(model.generate([GenerateRow((5, 6), Sampling(max_new_tokens=8))]))  # whatever is done once
            figures["one"], expected = one(model, work)
            figures["many"], found = many(spec, work)
            figures["beside"] = beside(spec, work, vocabulary)
            figures["mib"] = resident()
        figures["same"] = found == expected
        figures["ratio"] = figures["many"]["rows_per_second"] / figures["one"]["rows_per_second"]
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Options and what they are by default."""
    found = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--model", default=ModelSpec().base_model, help="base model")
    found.add_argument("--adapter", type=Path, nargs="*", default=[], help="folders of LoRA weights")
    found.add_argument("--device", default="auto", help="auto, cpu or cuda")
    found.add_argument("--quantization", default="none", help="none, int8 or nf4")
    found.add_argument("--batch", type=int, default=32, help="rows of a decode step")
    found.add_argument("--clients", type=int, default=32)
    found.add_argument("--rows", type=int, default=8, help="of each client")
    found.add_argument("--prompt", type=int, default=48, help="tokens of the longest prompt")
    found.add_argument("--tokens", type=int, default=16, help="tokens of a response")
    found.add_argument("--repeat", type=int, default=3, help="second runs")
    found.add_argument("--out", type=Path, help="JSON file")
    return found


@contextmanager
def folder_of_its_own() -> Iterator[None]:
    """Let hosts live in a new folder until the block ends, and end with it."""
    before = os.environ.get("ALPACA_RUNTIME")
    with tempfile.TemporaryDirectory(prefix="alpaca-", dir="/tmp") as folder:
        os.environ["ALPACA_RUNTIME"] = folder
        try:
            yield
        finally:
            for path, _ in hosts():
                stop(path)
            os.environ.pop("ALPACA_RUNTIME")
            os.environ.update({"ALPACA_RUNTIME": before} if before else {})


def first_result(spec: ModelSpec, choice: str) -> dict[str, float]:
    """Time a new process up to its first token; `choice` is as in ``ALPACA_HOST``."""
    began = time.perf_counter()
    environment = os.environ | {"ALPACA_HOST": choice}
    command = [sys.executable, "-c", _FIRST, spec.model_dump_json()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imports, opened, first = map(float, done.stdout.split())
    whole = time.perf_counter() - began
    return {"process": whole, "imports": imports, "open": opened, "first_token": first}


def rows_of(place: int, options: argparse.Namespace, vocabulary: int, adapters: Sequence[str | None]) -> Rows:
    """Rows of one client: a quarter each greedy, sampled, beams and judged."""
    draw = random.Random(place)
    tokens = options.tokens
    settings = [
        Sampling(max_new_tokens=tokens),
        Sampling(max_new_tokens=tokens, temperature=0.9, top_p=0.95, seed=place),
        Sampling(max_new_tokens=max(1, tokens // 2), num_beams=2),
    ]
    trie = Trie.of([[5], [6, 7], [8, 9, 10]])[0]
    rows: Rows = []
    for number in range(options.rows):
        prompt = tuple(draw.randrange(vocabulary) for _ in range(draw.randint(options.prompt // 2, options.prompt)))
        adapter = adapters[draw.randrange(len(adapters))]
        kind = number % 4
        rows.append(
            ScoreRow(prompt, trie, adapter) if kind == 3 else GenerateRow(prompt, settings[kind], number, adapter)
        )
    return rows


def run(model: Any, rows: Rows, seen: list[float] | None = None) -> list[Any]:
    """Run rows of both kinds at once; note when results came, in `seen`."""
    found: dict[int, Any] = {}

    def take(kind: type, verb: Any) -> None:
        places = [place for place, row in enumerate(rows) if isinstance(row, kind)]
        for index, result in verb([rows[place] for place in places]):
            found[places[index]] = result
            if seen is not None:
                seen.append(time.perf_counter())

    threads = [
        threading.Thread(target=take, args=each)
        for each in ((GenerateRow, model.generate), (ScoreRow, model.loglikelihood))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [plain(found[place]) for place in range(len(rows))]


def plain(result: Any) -> Any:
    """What of a result has to be the same."""
    assert not isinstance(result, RowError), result
    return list(result) if isinstance(result, list) else list(result.token_ids)


def one(model: Any, work: list[Rows]) -> tuple[dict[str, float], list[Any]]:
    """One client sends all rows."""
    rows = [row for each in work for row in each]
    began = time.perf_counter()
    found = run(model, rows)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "rows_per_second": len(rows) / seconds}, found


def many(spec: ModelSpec, work: list[Rows]) -> tuple[dict[str, float], list[Any]]:
    """Clients send their rows, all at once."""
    start = threading.Barrier(len(work) + 1, timeout=600.0)

    def client(rows: Rows) -> tuple[list[Any], float, float]:
        with at_host(spec, "auto") as model:
            seen: list[float] = []
            start.wait()
            began = time.perf_counter()
            found = run(model, rows, seen)
            return found, time.perf_counter() - began, min(seen) - began

    with ThreadPoolExecutor(len(work)) as pool:
        calls = [pool.submit(client, rows) for rows in work]
        start.wait()
        began = time.perf_counter()
        ended = [call.result() for call in calls]
        seconds = time.perf_counter() - began
    waits, first = [each[1] for each in ended], [each[2] for each in ended]
    figures = {
        "seconds": seconds,
        "rows_per_second": sum(map(len, work)) / seconds,
        "median_wait": statistics.median(waits),
        "worst_wait": max(waits),
        "worst_wait_over_median": max(waits) / statistics.median(waits),
        "median_first_result": statistics.median(first),
        "worst_first_result": max(first),
    }
    return figures, [result for each in ended for result in each[0]]


def beside(spec: ModelSpec, work: list[Rows], vocabulary: int) -> dict[str, Any]:
    """Time single questions, with the host idle and beside a large run."""
    draw = random.Random("questions")
    large = [row for each in work for row in each if isinstance(row, GenerateRow)] * 20
    begun, stop = threading.Event(), threading.Event()

    def run_them() -> None:
        with at_host(spec, "auto") as model:
            for _ in model.generate(large):
                begun.set()
                if stop.is_set():
                    return

    def questions(model: Any) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for kind in ("judged", "8 tokens"):
            times = []
            for _ in range(10):
                prompt = tuple(draw.randrange(vocabulary) for _ in range(32))
                began = time.perf_counter()
                if kind == "judged":
                    ((_, result),) = model.loglikelihood([ScoreRow(prompt, Trie.of([[5], [6]])[0])])
                else:
                    ((_, result),) = model.generate([GenerateRow(prompt, Sampling(max_new_tokens=8))])
                assert not isinstance(result, RowError), result
                times.append(time.perf_counter() - began)
            found[kind] = [statistics.median(times), max(times)]
        return found

    with at_host(spec, "auto") as model:
        alone = questions(model)
        thread = threading.Thread(target=run_them)
        thread.start()
        begun.wait(600.0)
        crowded = questions(model)
        stop.set()
        thread.join()
    return {"rows of the large run": len(large), "idle": alone, "beside it": crowded}


def resident() -> dict[str, Any]:
    """The hosts that run, their engines, and the main memory of each, in MiB."""
    found = [status for _, status in hosts()]
    pids = {"hosts": [each.pid for each in found], "engines": [each.engine_pid for each in found]}
    return {name: [psutil.Process(pid).memory_info().rss >> 20 for pid in each] for name, each in pids.items()}


if __name__ == "__main__":
    main()
