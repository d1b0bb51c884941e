"""Flow runs that share a warm model, through a real Prefect server and worker: first run, second run, many at once.

    python bench/flow_runs.py --runs 8 --out flow-runs.json         # minutes; a server and a worker on 127.0.0.1
    python bench/flow_runs.py --questions 16 --database postgresql+asyncpg://postgres@127.0.0.1:5432/prefect
    python bench/flow_runs.py --model /tmp/7b/base --dtype bfloat16 --batch-size 256 --database URL --alone 8  # a GPU

It measures how long the first and the second run of a deployment spend on their model, runs many at once, some with
other adapters and settings, compares the rows of each with those of the same run alone, and looks at the host before
and after: memory, open files, threads. Prefect's server has the lowest priority, as if it had a machine of its own; it
keeps its records in SQLite, which takes one writer at a time, or in an empty PostgreSQL database. With `--kills` the
host or its engine is killed so many times meanwhile.

"Once all were Running" is from when the last run became Running until the last one ended, "while" until the first
ended: Prefect's own work on the same cores included, rows and tokens as the host counted them when a row ended. Beside
it, before and after, one client: this process, in which a thread for each run calls the verb `answer` with the run's
questions, all at once, on the same warm host. Verifying, which writes no tokens, comes last: "while" has little of it.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from alpaca_core import ModelSpec, RowError, Sampling, answer
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import hosts, stop
from alpaca_core.model import DEFAULT_ADAPTER

ROOT = Path(__file__).parents[1]
KINDS = {"alpaca_core.host.server": "host", "alpaca_core.host.engine": "engine", "prefect.engine": "run"}
Parameters = dict[str, Any]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("flow-runs.json"))
    parser.add_argument("--runs", type=int, default=32, help="flow runs at once")
    parser.add_argument("--questions", type=int, default=4, help="of each run")
    parser.add_argument("--model", help="folder of a base model; the embedded one unless told")
    parser.add_argument("--dtype", default="auto", help="of that model")
    parser.add_argument("--batch-size", type=int, help="of that model")
    parser.add_argument("--alone", type=int, help="of the runs at once, how many are run again alone; all unless told")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="folders of LoRA weights for some of them")
    parser.add_argument(
        "--named", action="store_true", help="all adapters in the model of each run, which names its own"
    )
    parser.add_argument("--database", help="URL of an empty PostgreSQL database for Prefect's server")
    parser.add_argument("--kills", type=int, default=0, help="kill -9 of the host or its engine while many run")
    parser.add_argument("--pause", type=float, nargs=2, default=(2.0, 20.0), help="seconds between two kills")
    options = parser.parse_args()
    if options.database:
        os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = options.database
    with tempfile.TemporaryDirectory() as place, prefect_for(Path(place), options.runs) as client:
        found: dict[str, Any] = {}

        def note(**figures: Any) -> None:
            found.update(figures)
            options.out.write_text(json.dumps(found, indent=2) + "\n")
            print(json.dumps(figures, indent=2), flush=True)

        told: Parameters = {"base_model": options.model, "dtype": options.dtype} if options.model else {}
        told |= {"batch_size": options.batch_size} if options.batch_size else {}
        note(first=alone(client, told), second=alone(client, told))
        each = [parameters_of(number, options, told) for number in range(options.runs)]
        quiet = not options.kills
        if quiet:
            note(**{"one client, before": one_client(each)})
        with killed(options.kills, *options.pause) as kills:
            at_once, rows = together(client, each, quiet)
        note(kills=kills, **at_once)
        if quiet:
            note(**{"one client, after": one_client(each)})
        chosen = each[: options.alone]
        solo = [rows_of(client, ended(client, [begin(client, one)])[0].id) for one in chosen]
        same = sum(a is not None and a == b for a, b in zip(rows, solo, strict=False))
        note(
            **{
                "run alone": len(chosen),
                "rows equal to those of the run alone": same,
                "host after the runs alone": looked_at(),
            }
        )


def parameters_of(number: int, options: argparse.Namespace, model: Parameters) -> Parameters:
    """The parameters of one of many runs: other questions, settings and adapters."""
    own: Parameters = {"model": model}
    if options.adapters:
        path = options.adapters[number % len(options.adapters)]
        own = {"model": {**model, "adapter": str(path)}}
        if options.named:
            all_of_them = [{"name": each.name, "source": str(each)} for each in options.adapters]
            own = {"model": {**model, "adapters": all_of_them}, "adapter": path.name}
    samplings: list[dict[str, Any]] = [
        {"max_new_tokens": 32},
        {"max_new_tokens": 32, "temperature": 1.0, "seed": number},
        {"max_new_tokens": 24, "temperature": 0.7, "top_p": 0.9},
        {"max_new_tokens": 16, "num_beams": 2},
    ]
    asked = "Each of {} cans holds 5 pierogi. How many pierogi are there? ({})"
    return {
        "questions": [asked.format(cans, number) for cans in range(2, 2 + options.questions)],
        "sampling": samplings[(number + number // len(samplings)) % len(samplings)],
        **own,
    }


def alone(client: SyncPrefectClient, model: Parameters) -> dict[str, float]:
    """Run one flow and say how long it took, and its tasks, in seconds."""
    started = time.perf_counter()
    asked = {"questions": ["How many is a dozen?"] * 4, "sampling": {"max_new_tokens": 32}, "model": model}
    run = ended(client, [begin(client, asked)])[0]
    return {"from creation to its end": time.perf_counter() - started, **tasks_of(client, run.id)}


def one_client(parameters: list[Parameters]) -> dict[str, float]:
    """Let one client send the rows of all runs at once to the warm host; how fast they were."""
    with ExitStack() as stack, ThreadPoolExecutor(len(parameters)) as pool:
        specs = [ModelSpec.model_validate(each.get("model", {})) for each in parameters]
        models = {spec: stack.enter_context(at_host(spec, "auto")) for spec in dict.fromkeys(specs)}

        def run(spec: ModelSpec, each: Parameters) -> None:
            sampling = Sampling.model_validate(each["sampling"])
            answers = answer(models[spec], each["questions"], sampling, adapter=each.get("adapter", DEFAULT_ADAPTER))
            assert not any(isinstance(found, RowError) for found in answers), answers

        before = done_so_far()
        list(pool.map(run, specs, parameters))
        return speed(before, done_so_far())


def together(
    client: SyncPrefectClient, parameters: list[Parameters], quiet: bool
) -> tuple[dict[str, Any], list[object]]:
    """Run flows at once; return figures, those of speed where nobody is killed, and the table of each run."""
    before, begun = looked_at(), done_so_far()
    runs = [begin(client, each) for each in parameters]
    while not all(run.start_time or (run.state and run.state.is_final()) for run in read(client, runs)):
        time.sleep(0.5)
    looks, there = [done_so_far()], processes()
    while (done := read(client, runs)) and all(run.state and run.state.is_running() for run in done):
        looks.append(done_so_far())
        time.sleep(5.0)  # each look takes time of the server, on cores that the engine could use
    done = ended(client, runs, 5.0)
    over, after = done_so_far(), looked_at()
    running = [run.start_time for run in done if run.start_time]
    last = max(run.end_time for run in done if run.end_time)
    over["seconds"] = last.timestamp()
    waits = [task["reason"] for run in done if "reason" in (task := tasks_of(client, run.id))]
    figures = {
        "runs at once": len(parameters),
        "questions of each": len(parameters[0]["questions"]),
        "seconds from the last start to the last end": (last - max(running)).total_seconds(),
        "completed": sum(bool(run.state and run.state.is_completed()) for run in done),
        "median and longest seconds of a run's reasoning": [median(waits), max(waits)] if waits else [],
        "host before and after": [before, after],
        "processes when all were Running: how many, MiB of all, of the largest": there,
    }
    if quiet:
        figures |= {
            "until all were Running": speed(begun, looks[0]),
            "while all were Running": speed(looks[0], looks[-1]),
            "once all were Running": speed(looks[0], over),
        }
    return figures, [rows_of(client, run.id) for run in done]


def done_so_far() -> dict[str, float]:
    """What hosts have done, rows and tokens, and seconds: of a clock, and of CPU, theirs, of all, and of others."""
    times = psutil.cpu_times()
    found = dict.fromkeys(("rows", "tokens", "host", "engine"), 0.0)
    found |= {
        "seconds": time.time(),
        "all": sum(times) - times.idle - times.iowait - times.steal,
        "others": times.steal,
    }
    for _, status in hosts():
        found["rows"] += status.rows
        found["tokens"] += status.tokens
        for name, pid in (("host", status.pid), ("engine", status.engine_pid)):
            with suppress(psutil.Error):
                found[name] += sum(psutil.Process(pid).cpu_times()[:2]) if pid else 0.0
    return found


def speed(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Rows, tokens and seconds of the CPU in a second, between two looks; `others` are other virtual machines."""
    seconds = max(after["seconds"] - before["seconds"], 1e-9)
    done = {name: round(after[name] - before[name], 1) for name in ("seconds", "rows", "tokens")}
    cores = {
        f"cores of {name}": round((after[name] - before[name]) / seconds, 2)
        for name in ("engine", "host", "all", "others")
    }
    return {**done, **{f"{name} a second": round(done[name] / seconds, 2) for name in ("rows", "tokens")}, **cores}


def processes() -> dict[str, list[int]]:
    """The hosts, engines and runs of this measurement: how many, MiB of all, and of the largest."""
    found: dict[str, list[int]] = {name: [] for name in KINDS.values()}
    for name, process in ours():
        with suppress(psutil.Error):
            found[name].append(process.memory_info().rss >> 20)
    return {name: [len(sizes), sum(sizes), max(sizes, default=0)] for name, sizes in found.items()}


def ours() -> Iterator[tuple[str, psutil.Process]]:
    """Each of them, and which it is."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, StopIteration):
            if process.environ().get("ALPACA_RUNTIME") == os.environ["ALPACA_RUNTIME"]:
                yield next(KINDS[word] for word in process.cmdline() if word in KINDS), process


@contextmanager
def killed(times: int, least: float, most: float) -> Iterator[list[str]]:
    """Kill the host or its engine every few seconds; yield who was, what it was at, and what the host had done."""
    draw, over = random.Random(0), threading.Event()
    done: list[str] = []

    def kill() -> None:
        while len(done) < times and not over.wait(pause := draw.uniform(least, most)):
            who = draw.choice(["host", "engine"])
            for _, status in hosts():
                with suppress(ProcessLookupError):
                    if pid := status.pid if who == "host" else status.engine_pid:
                        os.kill(pid, signal.SIGKILL)
                        done.append(f"{who} after {pause:.1f} s, {status.state}, {status.rows} rows")

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def looked_at() -> list[dict[str, Any]]:
    """Memory in MiB, open files and threads of each host and its engine; nothing of one that is dead."""

    def size(pid: int | None) -> list[int]:
        with suppress(psutil.Error):
            process = psutil.Process(pid) if pid else None
            return [process.memory_info().rss >> 20, process.num_fds(), process.num_threads()] if process else []
        return []

    return [{"rows": status.rows, "host": size(status.pid), "engine": size(status.engine_pid)} for _, status in hosts()]


def begin(client: SyncPrefectClient, parameters: dict[str, Any]) -> UUID:
    """Start a run of answer-question."""
    deployment = client.read_deployment_by_name("answer-question/answer-question").id
    run: UUID = client.create_flow_run_from_deployment(deployment, parameters=parameters).id
    return run


def read(client: SyncPrefectClient, runs: list[UUID]) -> list[FlowRun]:
    """Ask how runs are."""
    own = FlowRunFilter(id=FlowRunFilterId(any_=runs))
    found = {run.id: run for run in client.read_flow_runs(flow_run_filter=own)}
    return [found[run] for run in runs]


def ended(client: SyncPrefectClient, runs: list[UUID], pause: float = 0.5) -> list[FlowRun]:
    """Wait until runs have ended; look every `pause` seconds."""
    while True:
        found = read(client, runs)
        if all(run.state and run.state.is_final() for run in found):
            return found
        time.sleep(pause)


def tasks_of(client: SyncPrefectClient, run: UUID) -> dict[str, float]:
    """How long each task of a run took, in seconds, by the first word of its name."""
    own = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    tasks = client.read_task_runs(flow_run_filter=own)
    return {
        task.name.partition(" ")[0]: (task.end_time - task.start_time).total_seconds()
        for task in tasks
        if task.start_time and task.end_time
    }


def rows_of(client: SyncPrefectClient, run: UUID) -> object:
    """The table that a run left."""
    own = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    artifacts = client.read_artifacts(flow_run_filter=own)
    return next((json.loads(str(each.data)) for each in artifacts if str(each.key).endswith("-table")), None)


@contextmanager
def prefect_for(place: Path, runs: int) -> Iterator[SyncPrefectClient]:
    """Run a server with our deployments, and a worker."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}/api"
    os.environ |= {
        "PREFECT_HOME": str(place / "home"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "ALPACA_RUNTIME": str(place / "run"),
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt"]
    with (
        started(
            ["nice", "-n", "19", *command, "server", "start", "--host", "127.0.0.1", "--port", port],
            place / "server.log",
        ) as server,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        while client.api_healthcheck() is not None:
            assert server.poll() is None, (place / "server.log").read_text()
            time.sleep(0.5)
        for line in (["work-pool", "create", "gpu", "--type", "process"], ["deploy", "--all"]):
            subprocess.run([*command, *line], cwd=ROOT, check=True, capture_output=True)
        with started([*command, "worker", "start", "--pool", "gpu", "--limit", str(runs)], place / "worker.log"):
            try:
                yield client
            finally:
                for _, process in list(ours()):  # runs that are under way, where this one fails, start hosts again
                    with suppress(psutil.Error):
                        process.kill()
                for path, _ in list(hosts()):
                    stop(path)


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, which ends with the block, and all that it has started."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=log.parent)
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
