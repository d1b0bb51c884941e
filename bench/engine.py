"""How fast the engine is beside others and beside the machine's limit, in one process and in turn.

    python bench/engine.py --out engine.json --plot docs/images/speed.png
    python bench/engine.py --seven-billion /tmp/7b --rows 1 64 256 --judged 512 --sections generate judge --seconds 240

Without `--seven-billion` the embedded model is measured (or `--model`, a folder), with it a random checkpoint of
LLaMA-7B's shape, made where it is not there. Prompts are random words, greedy, the end of text is switched off, the
pass over the prompts counts. Each way runs once to warm up, then in turn; the best of `--repeat` counts. "ours" is
what `load_model` runs. A way that fails or takes too long is told, and the run goes on; figures are written after each
measurement. Sections, each in `--seconds` at most and some more for what must end:

- generate, judge: ours beside transformers, vLLM (in its own process, before ours is loaded: `vllm_rows.py`), CAPPr,
  lm-evaluation-harness and the notebook's loop, which is measured on few tokens;
- settings: ours beside transformers at temperature 1, with top-k, with top-p, with beams, at the most rows;
- int8: with a LoRA beside it, ours and transformers' (which keeps outliers at threshold 6, as the notebook does);
- chain: reason, conclude, verify, per question, beside the notebook's loop;
- ready: seconds until everything is compiled and captured, in a new process;
- growth: how cost grows with rows, prompts and labels.
"""

import argparse
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import drawing
import stages
import torch
import vllm_rows
from limits import Limit, ceilings
from others import CONTINUOUS, Others
from ours import Loaded, adapter_for, folder_of
from seven_billion import machine, make_base
from timing import OURS, Figures, Way, in_turn, settle, why

from alpaca_core import ModelSpec

SECTIONS = ("generate", "judge", "settings", "int8", "chain", "ready", "growth")


def main() -> None:
    """Measure the sections that are asked for, print a table, draw."""
    options = parser().parse_args()
    figures = Figures(options.out)
    failed = False
    run = Run(options, figures)
    if {"generate", "judge"} & {*options.sections}:
        run.ask_vllm()
    for section in options.sections:
        started = time.perf_counter()
        figures.put("sections", section, {})
        try:
            run.measure_ceilings()
            getattr(run, section)()
        except Exception as error:  # of ours: it is told, and what comes next is still measured
            failed = True
            figures.put("sections", section, "failed", why(error))
        figures.put("sections", section, "section_s", round(time.perf_counter() - started, 1))
        print(drawing.table(figures.found, section), flush=True)
    if options.plot:
        drawing.draw_speed(figures.found, options.plot)
        drawing.draw_growth(figures.found, options.plot.with_stem(f"{options.plot.stem}-growth"))
    raise SystemExit(failed)


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seven-billion", type=Path, help="folder of the random checkpoint, made if it is not there")
    parser.add_argument("--model", help="another base model, as ModelSpec.base_model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="rows at once")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a response")
    parser.add_argument("--judged", type=int, default=64, help="prompts to judge")
    parser.add_argument("--questions", type=int, default=256, help="questions of the chain")
    parser.add_argument("--reason", type=int, default=256, help="tokens that the chain reasons with")
    parser.add_argument("--conclude", type=int, default=32, help="tokens that it answers with")
    parser.add_argument("--few", type=int, default=16, help="tokens, or an eighth of it items, of the notebook's loop")
    parser.add_argument("--grow-rows", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--grow-prompt", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1_024, 2_000])
    parser.add_argument("--grow-labels", type=int, nargs="+", default=[2, 5, 10, 20, 50, 100, 200, 500])
    parser.add_argument("--ways", nargs="+", help="beside ours only those whose name holds one of these")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120, help="of a section")
    parser.add_argument("--vllm-seconds", type=float, default=400, help="of vLLM's process, its start included")
    parser.add_argument("--out", type=Path, help="the figures as JSON; sections of an earlier run there are kept")
    parser.add_argument("--plot", type=Path, help="a PNG; growth goes beside it")
    return parser


class Run:
    """One run: what is measured, and what was found.

    Args:
        options: As `parser` reads them.
        figures: Where everything is written.
    """

    def __init__(self, options: argparse.Namespace, figures: Figures) -> None:
        self.options, self.figures = options, figures
        base: dict[str, Any] = {"base_model": options.model} if options.model else {}
        if options.seven_billion:
            make_base(options.seven_billion / "base", 32)
            base["base_model"] = str(options.seven_billion / "base")
        self.spec = ModelSpec(dtype=options.dtype, batch_size=max(options.rows), **base)
        settle()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = options.dtype if options.dtype != "auto" else "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, chosen)
        self.ceilings: dict[str, float] = {}
        told = {"processor": platform.processor() or platform.machine()}
        figures.put("machine", machine() | told | {"threads": torch.get_num_threads()})
        figures.put("model", options.model or ("LLaMA-7B's shape" if options.seven_billion else "embedded"))
        figures.put("dtype", chosen)
        self._loaded: Loaded | None = None
        self._loaded_spec = self.spec
        self._vllm: dict[str, Any] = {"calls": {}}
        self._adapter: str | None = None

    @property
    def shared(self) -> list[int]:
        """Tokens that all judged prompts begin with: none, half, three quarters."""
        return [0, self.options.prompt // 2, self.options.prompt * 3 // 4]

    def loaded(self, spec: ModelSpec | None = None) -> Loaded:
        """Load a spec, the plain one unless another is asked for; it stays until another is."""
        wanted = spec or self.spec
        if self._loaded is None or self._loaded_spec != wanted:
            self.unload()
            self._loaded, self._loaded_spec = Loaded(wanted), wanted
        return self._loaded

    def unload(self) -> None:
        """Free the network's memory."""
        if self._loaded is not None:
            self._loaded.close()
            del self._loaded._weights, self._loaded.network
        self._loaded = None
        settle()

    def adapted(self, **more: Any) -> ModelSpec:
        """Return the spec with a random LoRA beside it."""
        self._adapter = self._adapter or adapter_for(self.spec, self.options.seven_billion)
        return self.spec.model_copy(update={"adapter": self._adapter, **more})

    def limit(self, *, int8: bool = False) -> Limit:
        """Return the limit of the network that is loaded."""
        assert self._loaded is not None
        return Limit(self._loaded.config, self.dtype.itemsize, self.ceilings, int8)

    def measure_ceilings(self) -> None:
        """Measure the machine again, and keep the best so far."""
        for name, value in ceilings(self.device, self.dtype).items():
            self.ceilings[name] = max(value, self.ceilings.get(name, 0.0))
        settle()
        self.figures.put("ceilings", self.ceilings)

    def ask_vllm(self) -> None:
        """Let vLLM do all that it is compared with, in one process, while nothing of ours is loaded."""
        words, options = Loaded.words_of(self.spec), self.options
        plain = {"temperature": 0.0, "seeds": None, "labels": None, "shared": False, "keep": False}
        rounds = range(options.repeat + 1)
        calls: list[dict[str, Any]] = [
            plain | {
                "name": f"generate {rows}",
                "rounds": [words.draw(rows, options.prompt) for _ in rounds],
                "tokens": options.tokens,
            }
            for rows in options.rows
        ] + [
            plain | {
                "name": f"judge {shared}",
                "rounds": [words.draw(options.judged, options.prompt, shared) for _ in rounds],
                "tokens": 1,
                "labels": [5, 9],
                "shared": shared > 0,
            }
            for shared in self.shared
        ]  # fmt: skip
        job = {
            "model": str(folder_of(self.spec)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "context": options.prompt + options.tokens,
            "rows": max(256, *options.rows),
            "memory": 0.85,
            "calls": calls,
        }
        self._vllm = vllm_rows.run(job, options.vllm_seconds)
        self.figures.put("vllm", {name: value for name, value in self._vllm.items() if name != "calls"})

    def _of_vllm(self, name: str, units: int) -> dict[str, Any]:
        call = self._vllm["calls"].get(name)
        if call is None:
            reasons = {key: self._vllm[key] for key in ("left_out", "failed") if key in self._vllm}
            return reasons or {"left_out": "vLLM was not asked"}
        best = min(call["seconds"])
        return {"per_s": units / best, "units": units, "seconds": best}

    def case(
        self,
        section: str,
        name: str,
        limit: float,
        ways: dict[str, Way],
        share: float,
        prompts: tuple[int, ...],
        release: Callable[[], object] | None = None,
    ) -> None:
        """Measure one case of a section in its share of the section's seconds; `prompts` says which are drawn before.

        Continuous batching takes most of the memory that is left, so it comes last and with nothing beside it; so
        does what had no memory beside the others. Where `release` is given, ours comes first and gives its cache
        back before others begin, and `release` gives back what they keep before what comes last.
        """
        path = ("sections", section, "cases", name)
        self.figures.put(*path, "limit", limit)
        chosen = self.options.ways or [""]
        ways = {way: ways[way] for way in ways if way.startswith(OURS) or any(part in way for part in chosen)}

        def measure(some: dict[str, Way], seconds: float) -> dict[str, dict[str, Any]]:
            return in_turn(
                some, self.options.repeat, seconds, lambda way, entry: put(*path, "ways", way, entry), prepare
            )

        assert self._loaded is not None
        prepare = partial(self._loaded.words.prepare, *prompts)
        put, seconds = self.figures.put, self.options.seconds * share
        apart = {way: ways[way] for way in ways if way == CONTINUOUS}
        if release is not None:
            measure({way: ways[way] for way in ways if way.startswith(OURS)}, 1.0)
            self._close()
            ways = {way: ways[way] for way in ways if not way.startswith(OURS)}
        found = measure({way: ways[way] for way in ways if way not in apart}, seconds * (0.6 if apart else 1.0))
        apart |= {way: ways[way] for way in found if "OutOfMemory" in found[way].get("failed", "")}
        for way in apart:
            self._close()
            if release is not None:
                release()
            measure({way: ways[way]}, 0.4 * seconds / len(apart))

    def _close(self) -> None:
        assert self._loaded is not None
        self._loaded.close()

    def generate(self) -> None:
        """New tokens per second."""
        options = self.options
        self.figures.put("sections", "generate", "unit", "tok/s")
        for rows in options.rows:
            loaded = self.loaded()
            loaded.model(rows)
            others = Others(loaded.network, loaded.tokenizer, loaded.words, rows)
            ways = {"ours": lambda rows=rows, loaded=loaded: loaded.generate(rows, options.prompt, options.tokens)}
            ways |= others.ways_to_generate(rows, options.prompt, options.tokens, options.few)
            name = f"{rows} at once"
            limit = self.limit().generate(rows, options.prompt, options.tokens)
            on_gpu = self.device.type == "cuda"  # where memory is short, and ours takes what it can
            drawn = rows, options.prompt
            self.case("generate", name, limit, ways, 1 / len(options.rows), drawn, others.release if on_gpu else None)
            others.release()
            told = self._of_vllm(f"generate {rows}", rows * options.tokens)
            self.figures.put("sections", "generate", "cases", name, "ways", "vLLM", told)

    def judge(self) -> None:
        """Prompts judged per second between two labels."""
        options = self.options
        self.figures.put("sections", "judge", "unit", "items/s")
        loaded = self.loaded()
        others = Others(loaded.network, loaded.tokenizer, loaded.words, max(options.rows))
        for shared in self.shared:
            loaded.model(max(options.rows))
            ways = {"ours": lambda shared=shared: loaded.judge(options.judged, options.prompt, shared)}
            ways |= others.ways_to_judge(options.judged, options.prompt, shared, max(2, options.few // 8))
            name = f"{shared} of {options.prompt} tokens shared"
            limit = self.limit().judge(options.judged, options.prompt, shared)
            drawn = options.judged, options.prompt, shared
            self.case("judge", name, limit, ways, 1 / len(self.shared), drawn)
            told = self._of_vllm(f"judge {shared}", options.judged)
            self.figures.put("sections", "judge", "cases", name, "ways", "vLLM", told)

    def settings(self) -> None:
        """New tokens per second by sampling and by beams."""
        stages.settings(self)

    def int8(self) -> None:
        """Both in 8 bits, with a LoRA beside them."""
        stages.int8(self)

    def chain(self) -> None:
        """Reason, conclude, verify."""
        stages.chain(self)

    def ready(self) -> None:
        """Seconds to the first results of a new process."""
        stages.ready(self)

    def growth(self) -> None:
        """How cost grows with rows, prompts and labels."""
        stages.growth(self)


if __name__ == "__main__":
    main()
