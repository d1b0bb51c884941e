"""A Ray cluster of two nodes on loopback, and the program that serves a model from it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from alpaca_core.host.client import HostModel
from alpaca_core.host.protocol import Status
from alpaca_core.loading import load_model
from alpaca_core.model import Completion, GenerateRow, LanguageModel, RowError, ScoreRow, Trie
from alpaca_core.spec import ModelSpec, Sampling
from tests.loading.conftest import tiny  # noqa: F401  # a fixture

TOKEN = secrets.token_hex(16)
SERVE = """
import sys
from alpaca_core.host.cluster import Replicas, run_ray
from alpaca_core.spec import ModelSpec
spec, port, least, most, patience = sys.argv[1:]
run_ray(ModelSpec.model_validate_json(spec), "127.0.0.1", int(port), TOKEN,
        Replicas(int(least), int(most), gpus=0, wanted=1.0, patience=float(patience)))
""".replace("TOKEN", repr(TOKEN))

TRIE, _ = Trie.of([(10, 11), (10, 12), (13,)])
ROWS = [
    GenerateRow((5, 6, 7 + number % 200), Sampling(max_new_tokens=100, temperature=1.0), number)
    for number in range(1500)
]
QUESTIONS = [ScoreRow((8, 9 + number % 200, 7), TRIE) for number in range(300)]
LONG = GenerateRow((5, 6), Sampling(max_new_tokens=120))

Generated = dict[int, Completion | RowError]
Expected = tuple[Generated, dict[int, list[float]]]


class Served:
    """A model at one URL, whoever answers there."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url, self.process = url, process

    def http(self) -> httpx.Client:
        """Open a client that bears the token."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)

    def replicas(self, tries: int = 12) -> dict[int, Status]:
        """Ask several times; return the status of each replica that answered, by its process."""
        found = {}
        for _ in range(tries):
            try:
                with self.http() as client:
                    status = Status.model_validate(client.get("/v1/status", timeout=5).raise_for_status().json())
                found[status.pid] = status
            except httpx.HTTPError:  # the proxy holds requests back until there is a replica
                return found
        return found

    def wait_for(self, count: int, seconds: float = 180.0) -> dict[int, Status]:
        """Wait until so many replicas answer."""
        ends = time.monotonic() + seconds
        while len(found := self.replicas()) < count:
            assert self.process.poll() is None, "the program that serves has ended"
            assert time.monotonic() < ends, f"{len(found)} of {count} replicas after {seconds} s"
            time.sleep(0.5)
        return found


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes, a core each."""
    if find_spec("ray") is None:
        pytest.skip("needs Ray: `make test-ray` installs it into a .venv-ray of its own")
    before = dict(os.environ)
    # Before ray is imported. It takes the address of this machine for 127.0.0.1, unless it cannot form clusters.
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    node = {"node_ip_address": "127.0.0.1", "num_cpus": 1}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        made.add_node(**node)
        yield made.address
    finally:
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def serve(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Serve a model, as ``with serve(spec, least, most, patience) as served``."""
    logs = tmp_path_factory.mktemp("serve")

    @contextmanager
    def run(spec: ModelSpec, least: int = 2, most: int = 2, patience: float = 1.0) -> Iterator[Served]:
        port = free_port()
        log = Path(logs / f"{port}.log")
        arguments = [spec.model_dump_json(), str(port), str(least), str(most), str(patience)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments],
                stdout=out,
                stderr=out,
                env={**os.environ, "RAY_ADDRESS": cluster},
            )
        served = Served(f"http://127.0.0.1:{port}", process)
        try:
            served.wait_for(least)
            yield served
        except BaseException:
            print(log.read_text()[-3000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0

    return run


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def spec(tiny: Path) -> ModelSpec:  # noqa: F811
    return ModelSpec(base_model=str(tiny), device="cpu")


@pytest.fixture(scope="session")
def expected(spec: ModelSpec) -> Expected:
    """What an engine in this process says."""
    with load_model(spec) as model:
        return generated(model), judged(model)


def client(served: Served, spec: ModelSpec) -> HostModel:
    return HostModel(spec, served.http)


def judged(model: LanguageModel) -> dict[int, list[float]]:
    """Score all questions."""
    return {place: told for place, told in model.loglikelihood(QUESTIONS) if isinstance(told, list)}


def generated(model: LanguageModel) -> Generated:
    """Run all rows; none may come twice."""
    found: Generated = {}
    for place, result in model.generate(ROWS):
        assert place not in found
        found[place] = result
    return found
