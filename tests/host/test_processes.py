"""A real host: one engine for many clients, the same bits as alone, and nothing that is left behind."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from alpaca_core.errors import HostUnavailable, InvalidAdapter, InvalidRequest
from alpaca_core.host.launcher import at_host
from alpaca_core.host.neighbours import connection
from alpaca_core.model import GenerateRow, ScoreRow, Trie
from alpaca_core.spec import ModelSpec, Sampling
from tests.host.conftest import ADAPTERS, host_of, in_process, processes, spec_of
from tests.waiting import until

SETTINGS = [
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=9, temperature=1.1, seed=3),
    Sampling(max_new_tokens=7, temperature=0.8, top_k=30, top_p=0.9),
    Sampling(max_new_tokens=6, num_beams=3),
]
TRIE = Trie.of([[5], [6, 7], [6, 8, 9], [10, 11, 12]])[0]


def work(model: Any, seed: int, adapters: tuple[str | None, ...], count: int = 12) -> dict[str, Any]:
    """Rows of all kinds, as a seed says, and what came out of them, as JSON."""
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(256) for _ in range(draw.randint(1, 90))) for _ in range(count)]
    rows = [GenerateRow(prompt, draw.choice(SETTINGS), draw.randrange(3), draw.choice(adapters)) for prompt in prompts]
    judged = [ScoreRow(prompt, TRIE, draw.choice(adapters)) for prompt in prompts]
    generated = list(model.generate(rows))
    scored = list(model.loglikelihood(judged))
    assert sorted(place for place, _ in generated) == sorted(place for place, _ in scored) == list(range(count))
    return {
        "generated": [found.model_dump(mode="json") for _, found in sorted(generated, key=lambda each: each[0])],
        "scored": [list(found) for _, found in sorted(scored, key=lambda each: each[0])],
    }


@pytest.fixture(scope="module")
def spec(base: Path) -> ModelSpec:
    return spec_of(base, *ADAPTERS)


@pytest.fixture(scope="module")
def alone(spec: ModelSpec, shared: Path) -> Iterator[Any]:
    with in_process(spec) as model:
        yield model


@pytest.fixture(scope="module")
def hosted(spec: ModelSpec, shared: Path) -> Iterator[Any]:
    with at_host(spec, "auto") as model:
        yield model


def test_a_client_sees_the_model_that_it_would_have_loaded(alone: Any, hosted: Any) -> None:
    mine, other = alone.info.model_dump(), hosted.info.model_dump()
    for told in (mine, other):
        del told["load_seconds"]
    assert other == mine
    assert work(hosted, 0, (*ADAPTERS, None)) == work(alone, 0, (*ADAPTERS, None))


def test_thirty_two_clients_find_what_each_finds_alone(
    alone: Any, hosted: Any, spec: ModelSpec, base: Path, shared: Path
) -> None:
    expected = {seed: work(alone, seed, (*ADAPTERS, None)) for seed in range(32)}
    bare = spec_of(base)
    recipes = [spec, spec_of(base, "poet", "pirate"), bare, spec_of(base, "default")]
    bare_names = [(*ADAPTERS, None), ("poet", "pirate", None), (None,), ("default", None)]
    partly = {seed: work(alone, seed, bare_names[seed % 4]) for seed in range(32)}

    def call(seed: int) -> dict[str, Any]:
        with at_host(recipes[seed % 4], "auto") as model:
            return work(model, seed, bare_names[seed % 4])

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(call, range(32)))
        same = list(pool.map(lambda seed: work(hosted, seed, (*ADAPTERS, None)), range(32)))
    assert found == [partly[seed] for seed in range(32)]
    assert same == [expected[seed] for seed in range(32)]
    assert len(processes(shared, "alpaca_core.host.engine")) == 1
    assert len(processes(shared, "alpaca_core.host.server")) == 1


def test_an_adapter_that_is_new_is_loaded_beside_the_others_and_a_bad_one_disturbs_nobody(
    alone: Any, hosted: Any, base: Path, shared: Path, tmp_path: Path
) -> None:
    """A bad one is refused to whoever asks for it; rows of others run on, before and after."""
    source = base.parent / f"{base.name}-adapters" / "poet"
    bad = tmp_path / "bad"
    bad.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    (bad / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    expected = work(alone, 5, ADAPTERS)
    ended: list[Any] = []
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            ended.append(work(hosted, 5, ADAPTERS))

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    before = host_of(shared)
    assert before is not None
    spoilt = spec_of(base).model_copy(update={"adapter": str(bad)})
    for _ in range(2):
        with pytest.raises(InvalidAdapter), at_host(spoilt, "auto"):
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert len(ended) >= 2
    assert all(each == expected for each in ended)
    after = host_of(shared)
    assert after is not None
    assert after.engine_pid == before.engine_pid
    assert work(hosted, 1, ADAPTERS) == work(alone, 1, ADAPTERS)
    assert host_of(shared).state == "ready"  # type: ignore[union-attr]


def test_paths_mean_what_they_mean_where_the_caller_works(
    alone: Any, hosted: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    near = spec_of(base).model_copy(
        update={"base_model": base.name, "adapter": os.path.relpath(base.parent / f"{base.name}-adapters")}
    )
    with at_host(near, "auto") as model, in_process(near) as expected:
        assert model.info.name == base.name
        assert model.info.digest == expected.info.digest
        assert model.info.adapters == expected.info.adapters
        assert work(model, 2, ("default",)) == work(expected, 2, ("default",))


def test_a_client_imports_no_torch(hosted: Any, spec: ModelSpec) -> None:
    program = (
        "import sys, alpaca_core\n"
        "from alpaca_core import ModelSpec, generate\n"
        "with alpaca_core.load_model(ModelSpec.model_validate_json(sys.argv[1])) as model:\n"
        "    print(len(generate(model, ['Hello'])), 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    environment = os.environ | {"ALPACA_HOST": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", program, spec.model_dump_json()], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "1 False False\n", done.stderr


def test_a_thousand_clients_leave_nothing_behind(hosted: Any, shared: Path) -> None:
    status = host_of(shared)
    assert status is not None
    host = psutil.Process(status.pid)
    (path,) = shared.glob("*.sock")
    row = {"prompt_ids": [1, 2], "sampling": {"max_new_tokens": 1}, "adapter": None}

    def client(place: int) -> None:
        body = {"rows": [row] * 3}
        with connection(path, 30.0) as http:
            headers = {"alpaca-client": f"client {place}"}
            if place % 5:
                assert http.post("/v1/generate", json=body, headers=headers).text.count("index") == 3
            else:  # one that hangs up
                with http.stream("POST", "/v1/generate", json=body, headers=headers):
                    pass

    def used() -> tuple[int, int, int]:
        return host.num_fds(), host.num_threads(), len(host.children(recursive=True))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(client, range(200)))
        until(lambda: host_of(shared).clients == 0)  # type: ignore[union-attr]
        before, memory = used(), host.memory_info().rss
        list(pool.map(client, range(1000)))
    until(lambda: host_of(shared).clients == 0)  # type: ignore[union-attr]
    until(lambda: used()[0] <= before[0] + 2)
    assert used()[1:] == before[1:]
    assert host.memory_info().rss < memory + 20 * 2**20
    after = host_of(shared)
    assert after is not None
    assert (after.waiting, after.running, after.restarts) == (0, 0, status.restarts)


def test_a_host_of_the_network_wants_its_token_and_serves_what_it_was_started_with(
    alone: Any, checkpoint: Callable[..., Path], tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(0, tmp_path / "base")
    spec = spec_of(base, "default", "poet")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    program = (
        "import sys\n"
        "from alpaca_core.host.server import run_tcp\n"
        "from alpaca_core.spec import ModelSpec\n"
        "run_tcp(ModelSpec.model_validate_json(sys.argv[1]), '127.0.0.1', int(sys.argv[2]), 'secret')\n"
    )
    command = [sys.executable, "-c", program, spec.model_dump_json(), str(port)]
    host = subprocess.Popen(command, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        with pytest.raises(InvalidRequest, match="token"), at_host(spec, url):
            pass
        monkeypatch.setenv("ALPACA_HOST_TOKEN", "secret")
        with at_host(spec, url) as model:
            expected = work(alone, 3, ("default", "poet"))
            assert work(model, 3, ("default", "poet")) == expected
            for strange in (spec_of(base, "pirate"), ModelSpec(base_model="owner/name"), ModelSpec(base_model="/etc")):
                with pytest.raises(InvalidRequest, match="started with"), at_host(strange, url):
                    pass
            with httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}) as http:
                assert http.post("/v1/stop", json={}).status_code == 422
            # Ctrl-C in its terminal, for all that runs there: rows end first
            running = model.generate([GenerateRow((1,), Sampling(max_new_tokens=600), adapter=None)] * 3)
            ended = threading.Timer(0.3, lambda: os.killpg(host.pid, signal.SIGINT))
            ended.start()
            assert all(found.completion_tokens == 600 for _, found in running)
            assert host.wait(20.0) == 0
            # another model comes in its place, at the same address: no row of the one runs on the other
            checkpoint(1, base)
            host = subprocess.Popen(command, start_new_session=True)
            until(lambda: _is_ready(url))
            with pytest.raises(HostUnavailable, match="has become another"):
                list(model.generate([GenerateRow((1,), Sampling(max_new_tokens=1))]))
    finally:
        host.kill()
        host.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").json()["state"] == "ready"  # type: ignore[no-any-return]
    except httpx.TransportError:
        return False


@pytest.mark.end_to_end
@pytest.mark.parametrize("at_first", [True, False])
def test_a_command_that_serves_ends_with_an_error_where_its_model_fails_for_good(
    at_first: bool, checkpoint: Callable[..., Path], tmp_path: Path, shared: Path
) -> None:
    base = checkpoint(0, tmp_path / "base")
    if at_first:
        (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = ["--model", str(base), "--device", "cpu", "--port", str(port)]
    command = [sys.executable, "-m", "prefect_alpaca.flows.cli", "serve", *options]
    host = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        if not at_first:
            until(lambda: _is_ready(f"http://127.0.0.1:{port}"))
            checkpoint(1, base)  # so that the next load finds another model
            (engine,) = psutil.Process(host.pid).children()
            engine.kill()
        told = host.communicate(timeout=60.0)[1]
    finally:
        host.kill()
        host.wait()
    assert host.returncode == 2
    assert "given up" in told
    assert told.strip().splitlines()[-1].startswith("alpaca: ")
    assert ("cannot be" if at_first else "have become others") in told
