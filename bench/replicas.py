"""One replica with two threads beside two replicas with one each, on the same two cores, behind Ray Serve.

    python bench/replicas.py --out replicas.json         # in .venv-ray, which `make test-ray` makes; ten minutes

The one runs on a node of two cores, the two on two nodes of one core each, all on loopback, with the embedded model in
float32; in turn, `rounds` times. One client asks for 1,024 rows of a kind at once, of which `rows` are counted, by the
clock, after as many as the engines have begun with: so all replicas are busy as long as it runs. Judged rows have 64
tokens and a trie of 4 nodes, generated ones 64 tokens and 8 to 40 new ones. Proxy, client and Ray use the cores, too.
"""

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca_core.host.client import HostModel
from alpaca_core.host.launcher import remote
from alpaca_core.model import GenerateRow, RowError, ScoreRow, Trie
from alpaca_core.spec import ModelSpec, Sampling

SPEC = ModelSpec(device="cpu")
WAYS = {"one replica, two threads": (1, 2), "two replicas, a thread each": (2, 1)}
PROMPTS = [tuple(100 + (7 * number + place) % 5000 for place in range(64)) for number in range(1024)]
TRIE, _ = Trie.of([(10, 11), (10, 12), (13,)])
JUDGED = [ScoreRow(prompt, TRIE) for prompt in PROMPTS]
GENERATED = [
    GenerateRow(prompt, Sampling(max_new_tokens=8 + number % 33, temperature=1.0), number)
    for number, prompt in enumerate(PROMPTS)
]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=256, help="that are counted, of each kind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replicas", type=int, metavar="NUMBER", help="measure so many, once")
    options = parser.parse_args()
    if options.replicas:
        print(json.dumps(served(options.replicas, options.rows)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, (replicas, threads) in WAYS.items():
            command = [sys.executable, __file__, "--replicas", str(replicas), "--rows", str(options.rows)]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}  # Ray leaves what is set as it is
            told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[name].append(json.loads(told.splitlines()[-1]))
            print(json.dumps({name: found[name][-1]}), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def served(replicas: int, count: int) -> dict[str, float]:
    """Rows a second of so many replicas, each on a node of its own."""
    # Before ray is imported. It takes the address of this machine for 127.0.0.1, unless it cannot form clusters.
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from alpaca_core.host.cluster import Replicas, bound

    node = {"node_ip_address": "127.0.0.1", "num_cpus": 2 // replicas}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(replicas - 1):
            cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(bound(SPEC, None, Replicas(replicas, replicas, 0)), name="alpaca", route_prefix="/")
        model = HostModel(SPEC, lambda: remote(f"http://127.0.0.1:{port}"))
        return {
            "judged rows a second": rows_a_second(model.loglikelihood, JUDGED, count),
            "generated rows a second": rows_a_second(model.generate, GENERATED, count),
        }
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def rows_a_second(verb: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]], rows: Sequence[Any], count: int) -> float:
    """Count rows as they come, after the first 64, which are two batches; take the rest out."""
    began = 0.0
    for done, (_, result) in enumerate(verb(rows), 1):
        assert not isinstance(result, RowError), result
        if done == 64:
            began = time.perf_counter()
        if done == 64 + count:
            break
    return round(count / (time.perf_counter() - began), 2)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
