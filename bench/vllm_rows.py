"""vLLM in a process of its own: it reads a job in JSON and writes what it found, so that its torch need not be ours.

    ALPACA_BENCH_VLLM=/path/to/site-packages python bench/engine.py ...
    ALPACA_BENCH_VLLM_PYTHON=/path/to/python python bench/engine.py ...

The first names a folder that holds vLLM and what it wants to have before anything else, the second an interpreter
that has it. Without either it is looked for where this runs. A job is

    {"model": FOLDER, "dtype": "bfloat16", "context": 256, "rows": 256, "memory": 0.85, "calls": [CALL, ...]}

and each call does its rounds, of which the first warms up, and counts only where there is no other:

    {"name": ..., "rounds": [[[token, ...], ...], ...], "tokens": 128, "temperature": 0.0, "labels": null,
     "seeds": null, "shared": false, "keep": false}

`labels` are tokens whose log-probabilities are wanted, `seeds` one for each prompt of each round, `shared` lets
prompts find what others computed, `keep` returns tokens and log-probabilities of all rounds. Prompts are token ids,
the end of text is switched off, nothing is turned back into text. Written against the source of
vLLM 0.22.0, `vllm/sampling_params.py`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def run(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run a job in its process.

    Returns:
        ``version``, ``load_s`` and ``calls``: for each name its ``seconds`` of each timed round, and ``rows`` where
        they are kept, pairs of tokens and log-probabilities; ``failed`` with the reason where it did not end, beside
        the calls that did; ``left_out`` where vLLM is not installed.
    """
    site, python = os.environ.get("ALPACA_BENCH_VLLM"), os.environ.get("ALPACA_BENCH_VLLM_PYTHON")
    if not (site or python or find_spec("vllm")):
        return {"left_out": "vLLM is not installed, and ALPACA_BENCH_VLLM names no folder that holds it", "calls": {}}
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if python:
        environment.pop("PYTHONPATH", None)
    if site:
        environment["PYTHONPATH"] = os.pathsep.join([site, environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "job.json"), Path(folder, "found.json")
        given.write_text(json.dumps(job), encoding="utf-8")
        command = [python or sys.executable, __file__, str(given), str(found)]
        log = Path(folder, "log.txt")
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=seconds)
                ending = f"ended with code {code}"
            except subprocess.TimeoutExpired:
                code, ending = -1, f"took longer than {seconds:.0f} s"
            finally:
                _end(process)
        result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {"calls": {}}
        if code:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            told = [line for line in lines if "Error" in line or "error:" in line] or lines
            result["failed"] = " | ".join([ending, *(line[-300:] for line in told[-3:])])
        return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of its own children, which hold the GPU's memory."""
    import signal

    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        time.sleep(2)
    process.wait()


def main() -> None:
    """Run the job of the first file, and write the second after every call."""
    given, found = map(Path, sys.argv[1:])
    job = json.loads(given.read_text(encoding="utf-8"))
    started = time.perf_counter()
    import vllm

    llm = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["context"],
        max_num_seqs=job["rows"],
        gpu_memory_utilization=job["memory"],
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        generation_config="vllm",
        disable_log_stats=True,
    )
    result: dict[str, Any] = {"version": vllm.__version__, "load_s": time.perf_counter() - started, "calls": {}}
    for call in job["calls"]:
        result["calls"][call["name"]] = _call(vllm, llm, call)
        found.write_text(json.dumps(result), encoding="utf-8")


def _call(vllm: Any, llm: Any, call: dict[str, Any]) -> dict[str, Any]:
    took, rows = [], []
    for prompts, seeds in zip(call["rounds"], call["seeds"] or [None] * len(call["rounds"]), strict=True):
        settings = [
            vllm.SamplingParams(
                temperature=call["temperature"],
                seed=seeds[row] if seeds else None,
                max_tokens=call["tokens"],
                ignore_eos=True,
                detokenize=False,
                logprob_token_ids=call["labels"],
                skip_reading_prefix_cache=not call["shared"],
            )
            for row in range(len(prompts))
        ]
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        took.append(time.perf_counter() - start)
        if call["keep"]:
            rows += [_row(output.outputs[0], call["labels"]) for output in outputs]
    return {"seconds": took[1:] or took, "rows": rows}


def _row(output: Any, labels: list[int] | None) -> list[Any]:
    first = output.logprobs[0] if labels else {}
    return [list(output.token_ids), [first[label].logprob for label in labels or ()]]


if __name__ == "__main__":
    main()
