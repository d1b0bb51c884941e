"""The sections of `bench/engine.py` that measure more than one network or one size."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from others import Others, cappr_table
from ours import Loaded, folder_of
from peft import PeftModel
from timing import Left, TooLong, limited, settle, why
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alpaca_core import Sampling, chain_of_thought, conclude, prompts, verify
from alpaca_core.model import RowError, Trie

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "4 beams": {"num_beams": 4},
}


def settings(run: Any) -> None:
    """Generate by each of some settings; where there are beams, so many fewer rows."""
    options = run.options
    run.figures.put("sections", "settings", "unit", "tok/s")
    loaded = run.loaded()
    most = max(options.rows)
    others = Others(loaded.network, loaded.tokenizer, loaded.words, most)
    for name, told in SETTINGS.items():
        loaded.model(most)
        beams = told.get("num_beams", 1)
        sizes = max(1, most // beams), options.prompt, options.tokens
        ways: dict[str, Callable[[], int]] = {
            "ours": lambda: loaded.generate(*sizes, **told),  # noqa: B023 -- called in this turn
            "transformers": lambda: others.generate_by(*sizes, told),  # noqa: B023
        }
        limit = run.limit().generate(most, options.prompt, options.tokens) / beams
        release = others.release if run.device.type == "cuda" else None
        run.case("settings", f"{sizes[0]} at once, {name}", limit, ways, 1 / len(SETTINGS), sizes[:2], release)


def int8(run: Any) -> None:
    """Generate and judge in 8 bits with a LoRA on q, k, v and o, unmerged."""
    options = run.options
    run.figures.put("sections", "int8", "unit", "per s")
    loaded = run.loaded(run.adapted(quantization="int8"))
    for rows in options.rows:
        others = Others(as_the_notebook(run), loaded.tokenizer, loaded.words, rows)
        loaded.model(rows)
        theirs = others.ways_to_generate(rows, options.prompt, options.tokens, options.few)
        ways: dict[str, Callable[[], int]] = {
            "ours": lambda: loaded.generate(rows, options.prompt, options.tokens)  # noqa: B023 -- called in this turn
        }
        ways |= {name: theirs[name] for name in ("transformers", "the notebook's loop")}
        limit = run.limit(int8=True).generate(rows, options.prompt, options.tokens)
        release = others.release if run.device.type == "cuda" else None
        drawn = rows, options.prompt
        run.case("int8", f"tok/s, {rows} at once", limit, ways, 1 / (1 + len(options.rows)), drawn, release)
    loaded.model(max(options.rows))
    theirs = others.ways_to_judge(options.judged, options.prompt, 0, max(2, options.few // 8))
    ways = {"ours": lambda: loaded.judge(options.judged, options.prompt, 0)}
    ways |= {name: theirs[name] for name in ("transformers", "the notebook's loop")}
    limit = run.limit(int8=True).judge(options.judged, options.prompt, 0)
    drawn = options.judged, options.prompt
    run.case("int8", "items/s, nothing shared", limit, ways, 1 / (1 + len(options.rows)), drawn)


def as_the_notebook(run: Any) -> Any:
    """Load the model as the notebook does: int8 with outliers kept apart, PEFT's LoRA beside it; once in a run."""
    if not hasattr(run, "_notebook"):
        on_gpu = run.device.type == "cuda"
        network = AutoModelForCausalLM.from_pretrained(
            folder_of(run.spec),
            dtype=torch.float16 if on_gpu else torch.float32,
            device_map={"": 0} if on_gpu else None,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        )
        run._notebook = PeftModel.from_pretrained(network, run.adapted().adapter).eval()
    return run._notebook


def chain(run: Any) -> None:
    """Questions per second through reason, conclude and verify."""
    options, count = run.options, run.options.questions
    put = run.figures.put
    put("sections", "chain", "unit", "questions/s")
    case = f"{options.reason} + {options.conclude} tokens and a judgment, {count} questions"
    ways = ("sections", "chain", "cases", case, "ways")
    precise = str(run.dtype).removeprefix("torch.")
    for name, spec in (
        ("ours, int8 + LoRA", run.adapted(quantization="int8")),
        (f"ours, {precise} + LoRA", run.adapted()),
    ):
        loaded = run.loaded(spec)
        model = loaded.model(max(options.rows))
        asked = [loaded.words.text(each) for each in loaded.words.draw(count + 2, 32)]
        put(*ways, name, {"failed": "was cut off"})
        _ask(model, asked[:2], 2, 2)
        start = time.perf_counter()
        _ask(model, asked[2:], options.reason, options.conclude)
        took = time.perf_counter() - start
        put(*ways, name, {"per_s": count / took, "units": count, "seconds": took})
    try:
        with limited(options.seconds):
            put(*ways, "the notebook's loop", _of_the_notebook(run, loaded))
    except (Exception, TooLong) as error:
        put(*ways, "the notebook's loop", {"failed": why(error)})


def _ask(model: Any, questions: list[str], reason: int, answer: int) -> None:
    thoughts = chain_of_thought(model, questions, Sampling(max_new_tokens=reason))
    reasonings = [_text(thought) for thought in thoughts]
    conclusions = conclude(model, questions, reasonings, Sampling(max_new_tokens=answer))
    checks = verify(model, questions, [_text(conclusion) or prompts.NO_ANSWER for conclusion in conclusions])
    assert not any(isinstance(check, RowError) for check in checks), checks


def _text(row: Any) -> str | None:
    assert not isinstance(row, RowError), row
    return row.text.strip() or None


def _of_the_notebook(run: Any, loaded: Loaded) -> dict[str, Any]:
    """Time the notebook's loop over one question, or a few of its tokens where a whole one takes too long."""
    others = Others(as_the_notebook(run), loaded.tokenizer, loaded.words, 1)
    few, long, short = run.options.few, run.options.reason, run.options.conclude
    question, steps, answer = (loaded.words.text(loaded.words.draw(1, size)[0]) for size in (32, long, short))
    reason = others.alpaca(prompts.CHAIN_OF_THOUGHT.format(question=question))
    final = others.alpaca(prompts.CONCLUDE.format(question=question, reasoning=steps))
    check = others.alpaca(prompts.VERIFY.format(question=question, answer=answer))

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    others.ask(reason, 1)
    first, more = (seconds(lambda tokens=tokens: others.ask(reason, tokens)) for tokens in (1, 1 + few))
    a_token = max(more - first, 0.0) / few
    last = seconds(lambda: others.ask(final, 1)) + seconds(lambda: others.weigh(check))
    expected = first + last + (long + short - 2) * a_token
    if expected > run.options.seconds / 3:
        told = f"worked out from {few} tokens of one question, its prompts and its judgment"
        return {"per_s": 1 / expected, "units": 1, "seconds": expected, "note": told}
    whole = seconds(lambda: (others.ask(reason, long), others.ask(final, short), others.weigh(check)))
    return {"per_s": 1 / whole, "units": 1, "seconds": whole, "note": "one question, whole"}


def ready(run: Any) -> None:
    """Start processes; the first warms the page cache, and on a GPU ours comes again, to find what is compiled."""
    run.__dict__.pop("_notebook", None)
    run.unload()
    run.figures.put("sections", "ready", "unit", "s")
    specs = {"plain": run.spec, "int8 + LoRA": run.adapted(quantization="int8")}
    known = {"base_model": str(folder_of(run.spec)), "dtype": str(run.dtype).removeprefix("torch.")}
    for name, who, given in [
        ("transformers", "transformers", known),
        ("ours", "ours", specs["plain"].model_dump(mode="json")),
        *[("ours, again", "ours", specs["plain"].model_dump(mode="json"))] * (run.device.type == "cuda"),
        ("ours, int8 + LoRA", "ours", specs["int8 + LoRA"].model_dump(mode="json")),
    ]:
        command = [sys.executable, str(Path(__file__).with_name("ready.py")), who, json.dumps(given)]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, str(max(run.options.rows))], capture_output=True, text=True, timeout=run.options.seconds
            )
            entry = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-400:]}
        except subprocess.TimeoutExpired:
            entry = {"failed": f"took longer than {run.options.seconds:.0f} s"}
        run.figures.put("sections", "ready", name, entry | {"process": round(time.perf_counter() - start, 2)})


def growth(run: Any) -> None:
    """Seconds for more rows, longer prompts and more labels; a size that would take too long ends its line."""
    options, loaded = run.options, run.loaded()
    rows, few = max(options.rows), max(2, options.few // 8)
    loaded.model(rows)
    half = options.prompt // 2
    tokens = min(16, options.tokens)

    def labelled(items: int, labels: int) -> int:
        return loaded.judge(items, options.prompt, half, Trie.of(loaded.words.labels(labels))[0])

    def cappr(labels: int) -> int:
        loaded.close()  # the last line: our cache has most of the memory by now
        items, batch = (64, max(1, rows // labels)) if run.device.type == "cuda" else (few, few)
        others = Others(loaded.network, loaded.tokenizer, loaded.words, batch)
        names = tuple(loaded.words.text(label) for label in loaded.words.labels(labels))
        texts = [loaded.words.text(each) for each in loaded.words.draw(items, options.prompt)]
        return len(cappr_table(loaded.network, others._tokenizer, texts, names, batch))

    fits = [min(size, loaded.info.context_length - tokens - 1) for size in options.grow_prompt]
    lines: dict[str, tuple[Sequence[int], dict[str, Callable[[int], int]]]] = {
        "rows": (
            options.grow_rows,
            {
                f"judge, {half} of {options.prompt} tokens shared": lambda size: loaded.judge(
                    size, options.prompt, half
                ),
                f"generate {tokens} tokens": lambda size: loaded.generate(size, options.prompt, tokens) // tokens,
            },
        ),
        "prompt": (
            sorted(set(fits)),
            {
                "judge": lambda size: loaded.judge(options.judged, size, 0),
                f"generate {tokens} tokens, {rows} at once": lambda size: loaded.generate(rows, size, tokens) // tokens,
            },
        ),
        "labels": (options.grow_labels, {"ours": lambda size: labelled(options.judged, size), "CAPPr": cappr}),
    }
    for axis, (sizes, ways) in lines.items():
        for name, way in ways.items():
            _grow(run, axis, name, sizes, way, options.seconds / (4 if axis == "rows" else 8))
    for size in lines["prompt"][0]:
        run.figures.put("sections", "growth", "limit", "judge", size, run.limit().judge(options.judged, size, 0))


def _grow(run: Any, axis: str, name: str, sizes: Sequence[int], way: Callable[[int], int], seconds: float) -> None:
    """Measure one line: rows per second at each size, after a first call at the smallest."""
    end, before = time.perf_counter() + seconds, 0.0
    for place, size in enumerate([sizes[0], *sizes]):
        left = end - time.perf_counter()
        expected = before * (size / sizes[max(place - 2, 0)]) if place > 1 else 0.0
        if expected > left:
            told = {"left_out": f"would take about {expected:.0f} s, and {max(left, 0):.0f} s were left"}
            run.figures.put("sections", "growth", axis, name, size, told)
            return
        try:
            start = time.perf_counter()
            with limited(max(2 * left, 10.0)):
                units = way(size)
            before = time.perf_counter() - start
        except Left as reason:
            run.figures.put("sections", "growth", axis, name, size, {"left_out": str(reason)})
            return
        except (Exception, TooLong) as error:
            settle()
            run.figures.put("sections", "growth", axis, name, size, {"failed": why(error)})
            return
        if place:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            entry = {"per_s": units / before, "units": units, "seconds": before, "peak_host_gib": round(memory, 2)}
            run.figures.put("sections", "growth", axis, name, size, entry)
