"""What a row costs on its way: schedule, JSON, HTTP, Ray Serve's proxy, Prefect. The model itself costs nothing here.

    python bench/host_costs.py --out costs.json          # all but Ray
    python bench/host_costs.py --only ray                # with the extra `ray`

Times are of the CPU, not of a clock, so that a busy machine changes them little: microseconds of one core, a row.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from alpaca_core import judge
from alpaca_core.host.application import application
from alpaca_core.host.client import HostModel
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.launcher import remote
from alpaca_core.host.protocol import (
    GenerateJson,
    GenerateRequest,
    ScoreJson,
    ScoreRequest,
    read_result,
    write_result,
)
from alpaca_core.host.scheduler import Scheduler
from alpaca_core.host.settings import Settings
from alpaca_core.model import Completion, GenerateRow, ScoreRow, Scores, Trie
from alpaca_core.spec import ModelSpec, Sampling

ROWS = 256  # of one request, as the client sends them
PROMPT = tuple(range(1000, 1064))
TRIE, _ = Trie.of([(place, 50 + place) if place % 2 else (place,) for place in range(20)])
JUDGE = ScoreRow(PROMPT, TRIE)
GENERATE = GenerateRow(PROMPT, Sampling(max_new_tokens=128))
COMPLETION = Completion(
    text="word " * 100, token_ids=tuple(range(128)), finish_reason="length", prompt_tokens=64, completion_tokens=128
)
SCORES = Scores([-1.2345678901234567 - place for place in range(len(TRIE.tokens))])
_MANY = [-1.2345678901234567 - place / 7 for place in range(1000)]
CANNED = {"generate": write_result(COMPLETION), "loglikelihood": write_result(SCORES)}


class Echo(WarmModel):
    """A warm model whose rows are answered where they would go to the engine, which idles."""

    def _send(self, message: dict[str, Any]) -> None:
        ended = [
            (key, CANNED[kind] if kind == "generate" else {"scores": _MANY[: len(row["tokens"])], "shape": ""})
            for key, kind, row in message.get("add", ())
        ]
        asyncio.get_running_loop().call_soon(self.scheduler.heard, ended, 0)


def schedule(count: int = 100_000) -> float:
    """Rows of four clients through a scheduler, with an engine that answers at once."""
    sent: deque[int] = deque()
    scheduler = Scheduler(lambda message: sent.extend(key for key, _, _ in message.get("add", ())), count)
    scheduler.begin(32)
    began = time.process_time()
    for number in range(count // ROWS):
        scheduler.submit(f"client {number % 4}", "loglikelihood", [{}] * ROWS)
    while sent:
        ended = [(sent.popleft(), CANNED["loglikelihood"]) for _ in range(min(32, len(sent)))]
        scheduler.heard(ended, 0)
    assert scheduler.waiting == 0
    return micro(time.process_time() - began, scheduler.rows)


def serialise() -> dict[str, dict[str, float]]:
    """Each side's share in turning a row and its result into JSON and back."""
    found = {}
    for name, row, form, request, result in (
        ("judge", JUDGE, ScoreJson, ScoreRequest, SCORES),
        ("generate", GENERATE, GenerateJson, GenerateRequest, COMPLETION),
    ):
        body = json.dumps({"rows": [form.of(row).model_dump(mode="json")] * ROWS}).encode()  # type: ignore[arg-type]
        asked = request.model_validate_json(body)
        told = [each.model_dump(mode="json") for each in asked.rows]
        to_engine = json.dumps({"add": [[0, name, each] for each in told]}).encode()
        back = json.dumps({"ended": [[0, write_result(result)]] * ROWS}).encode()
        line = json.dumps({"index": 0, **write_result(result)})
        found[name] = {
            "bytes asked": round(len(body) / ROWS),
            "bytes answered": len(line),
            "client: write": each(lambda r=row, f=form: json.dumps([f.of(r).model_dump(mode="json")] * 1), 1),
            "host: read": each(lambda b=body, q=request: q.model_validate(json.loads(b)), ROWS),
            "host: to the engine": each(lambda a=asked: json.dumps([e.model_dump(mode="json") for e in a.rows]), ROWS),
            "engine: read": each(
                lambda t=to_engine, f=form: [f.model_validate(e[2]) for e in json.loads(t)["add"]], ROWS
            )
            if name == "generate"
            else each(lambda t=to_engine: json.loads(t), ROWS),
            "engine: write": each(lambda r=result: json.dumps(write_result(r)), 1),
            "host: pass on": each(lambda b=back: [json.dumps(e[1]) for e in json.loads(b)["ended"]], ROWS),
            "client: read": each(lambda text=line: read_result(json.loads(text)), 1),
        }
    return found


def each(work: Callable[[], object], rows: int, seconds: float = 0.5) -> float:
    """Microseconds of CPU a row."""
    began, count = time.process_time(), 0
    while time.process_time() - began < seconds:
        work()
        count += rows
    return micro(time.process_time() - began, count)


def micro(seconds: float, rows: int) -> float:
    """Microseconds a row."""
    return round(1e6 * seconds / rows, 2)


def through(url: str, watched: dict[str, psutil.Process]) -> dict[str, Any]:
    """Rows through a host that costs nothing: CPU a row and a request, of this process and of others."""
    model = HostModel(ModelSpec(device="cpu"), lambda: remote(url))
    found: dict[str, Any] = {}
    for name, run, row in (("judge", model.loglikelihood, JUDGE), ("generate", model.generate, GENERATE)):
        for rows, calls in ((40 * ROWS, 1), (1, 200)):
            asked: list[Any] = [row] * rows
            list(run(asked[:ROWS]))
            before = {who: busy(process) for who, process in watched.items()}
            began, mine = time.perf_counter(), time.process_time()
            for _ in range(calls):
                assert len(list(run(asked))) == rows
            took, mine = time.perf_counter() - began, time.process_time() - mine
            spent = {who: busy(process) - before[who] for who, process in watched.items()} | {"client": mine}
            per = {who: micro(seconds, rows * calls) for who, seconds in spent.items()}
            found[f"{name}, {min(rows, ROWS)} rows a request"] = {
                **{f"{who}, us a row": value for who, value in per.items()},
                "rows a second": round(rows * calls / took),
            }
    texts = [
        f"My card number {number} was swallowed by the machine, and I was charged twice." for number in range(2048)
    ]
    labels = ["billing", "card lost", "card not working"]
    judge(model, texts[:64], labels)
    mine = time.process_time()
    judge(model, texts, labels)
    found["the verb judge, client, us a row"] = micro(time.process_time() - mine, len(texts))
    model.close()
    return found


def busy(process: psutil.Process) -> float:
    """Seconds of CPU that a process has had."""
    times = process.cpu_times()
    return float(times.user + times.system)


def over_http() -> dict[str, Any]:
    """The same application on loopback, without a proxy."""
    port = free_port()
    with subprocess.Popen([sys.executable, __file__, "--echo", str(port)]) as process:
        try:
            return through(f"http://127.0.0.1:{port}", {"host": psutil.Process(process.pid)})
        finally:
            process.terminate()


def echo(port: int) -> None:
    """Be that application."""
    import uvicorn

    async def run() -> None:
        app = application(Echo(ModelSpec(device="cpu"), Settings(hang=1e9).served()))
        await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False)).serve()

    asyncio.run(run())


class EchoReplica:
    """That application as a replica of Ray Serve."""

    def __init__(self) -> None:
        self._warm = Echo(ModelSpec(device="cpu"), Settings(hang=1e9).served())

    def __serve_build_asgi_app__(self) -> Any:
        return application(self._warm)

    async def check_health(self) -> None:
        """Wait for the model."""
        await self._warm.tokenizer()


def over_ray() -> dict[str, Any]:
    """The same behind Ray Serve's proxy, on a cluster of one node."""
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    import ray
    from ray import serve

    ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=1, log_to_driver=False)
    try:
        port = free_port()
        router = {"request_router_class": "alpaca_core.host.routing:FewestRequests"}
        made = serve.deployment(serve.ingress()(EchoReplica), max_ongoing_requests=1024, request_router_config=router)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(made.bind())
        titles = {"proxy": "ray::ProxyActor", "replica": "ray::ServeReplica"}
        alive = {who: next(p for p in psutil.process_iter() if title(p).startswith(t)) for who, t in titles.items()}
        return through(f"http://127.0.0.1:{port}", alive)
    finally:
        serve.shutdown()
        ray.shutdown()


def title(process: psutil.Process) -> str:
    """A process's command line."""
    try:
        return " ".join(process.cmdline()) if process.ppid() else ""
    except psutil.Error:
        return ""


def in_prefect(count: int = 200) -> dict[str, Any]:
    """Task runs one after the other, and flow runs, of nothing; milliseconds, of a clock and of the CPU."""
    from prefect import flow, task
    from prefect.testing.utilities import prefect_test_harness

    @task
    def nothing() -> None: ...

    @flow
    def tasks(number: int) -> None:
        for _ in range(number):
            nothing()

    found = {}
    with prefect_test_harness(server_startup_timeout=120):
        tasks(1)
        server = [each for each in psutil.Process().children(recursive=True) if each.is_running()]
        for name, number, runs in (("task run", count, 1), ("flow run", 0, 20)):
            before, began, mine = sum(map(busy, server)), time.perf_counter(), time.process_time()
            for _ in range(runs):
                tasks(number)
            made = max(number, 1) * runs
            clock, own = time.perf_counter() - began, time.process_time() - mine
            time.sleep(3)  # the server writes events later
            spent = {"clock": clock, "client": own, "server": sum(map(busy, server)) - before}
            found[name] = {f"{who}, ms": round(1000 * seconds / made, 2) for who, seconds in spent.items()}
    return found


def free_port() -> int:
    """Find a port that nobody listens on."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


SECTIONS: dict[str, Callable[[], Any]] = {
    "scheduler, us a row": schedule,
    "json, us a row": serialise,
    "http": over_http,
    "ray": over_ray,
    "prefect": in_prefect,
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[name.split(",")[0] for name in SECTIONS], nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--echo", type=int, metavar="PORT", help="be the host that is measured")
    options = parser.parse_args()
    if options.echo:
        return echo(options.echo)
    found = {}
    for name, measure in SECTIONS.items():
        if name.split(",")[0] in (options.only or [n.split(",")[0] for n in SECTIONS if n != "ray"]):
            found[name] = measure()
            print(json.dumps({name: found[name]}, indent=1), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
