"""Hosts of the tests' own: in this process for the contract, as real processes for all that can die."""

import asyncio
import json
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import uvicorn

from alpaca_core.engines.native import NativeModel
from alpaca_core.engines.opening import open_model
from alpaca_core.engines.transformers import TransformersModel
from alpaca_core.host import engine
from alpaca_core.host.application import application
from alpaca_core.host.client import HostModel
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.neighbours import connection, status_of
from alpaca_core.host.protocol import ModelReply, Status, TokenizerReply
from alpaca_core.host.scheduler import Scheduler, Ticket
from alpaca_core.host.settings import Settings
from alpaca_core.model import DEFAULT_ADAPTER
from alpaca_core.spec import ModelSpec
from tests.engines.conftest import (  # noqa: F401
    add_adapters,
    make_network,
    make_transformers,
    one_thread,
    tokenizer,
    wrapped,
)
from tests.waiting import until


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for hosts of the test's own, with a path that sockets can have."""
    folder = Path(tempfile.mkdtemp(prefix="alpaca-", dir="/tmp"))
    monkeypatch.setenv("ALPACA_RUNTIME", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Wire(engine.Pipe):
    """The engine's side of the connection to its host, for an engine that is a thread of this process."""

    def __init__(self, heard: Callable[[dict[str, Any]], None]) -> None:
        self._heard = heard
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def send(self, **message: object) -> None:
        self._heard(json.loads(json.dumps(message)))


class ThreadedWarm:
    """What the application needs of a `WarmModel`, around a model of this process, run by the engine's own loop."""

    def __init__(self, model: Any, batch_size: int, limit: int = 100_000) -> None:
        self.loaded, self._batch_size = model, batch_size
        self.scheduler = Scheduler(self._send, limit)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._wire = Wire(lambda message: loop.call_soon_threadsafe(self._heard, message) and None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.scheduler.begin(self._batch_size)

    def _run(self) -> None:
        with suppress(EOFError):
            engine._run(self._wire, self.loaded, self._batch_size)

    async def stop(self) -> None:
        self._wire.inbox.put(_End())
        await asyncio.to_thread(self._thread.join, 10)

    def _send(self, message: dict[str, Any]) -> None:
        self._wire.inbox.put(json.loads(json.dumps(message)))

    def _heard(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self.scheduler.heard(message["ended"], message["tokens"])

    async def model(self, spec: ModelSpec) -> ModelReply:
        names = {adapter.name: adapter.name for adapter in self.loaded.info.adapters}
        return ModelReply(info=self.loaded.info, adapters={DEFAULT_ADAPTER: DEFAULT_ADAPTER} | names)

    async def tokenizer(self) -> TokenizerReply:
        told = self.loaded.tokenizer
        return TokenizerReply(definition=told.definition, eos_ids=told.eos_ids, named=told.named)

    def submit(self, client: str, kind: Any, rows: list[dict[str, Any]], identity: str = "") -> Ticket:
        return self.scheduler.submit(client, kind, rows)

    def idle(self) -> float:
        return 0.0 if self.scheduler.running or self.scheduler.waiting else time.monotonic() - self.scheduler.used

    def status(self) -> Status:
        told = {"version": "0", "pid": os.getpid(), "engine_pid": None, "key": "test", "device": "cpu"}
        numbers = ("uptime", "idle", "memory_gib", "tokens_per_second", "rows", "tokens", "restarts")
        counts = {name: getattr(self.scheduler, name) for name in ("waiting", "running", "clients")}
        return Status.model_validate(
            told
            | dict.fromkeys(numbers, 0)
            | counts
            | {"state": "ready", "info": self.loaded.info, "queue_limit": self.scheduler.limit}
        )


class _End(dict[str, Any]):
    def get(self, *_: object) -> Any:
        raise EOFError


@contextmanager
def served(app: Any, path: Path | None = None) -> Iterator[str]:
    """Serve an application by the real server, on a Unix socket or on TCP; gives the URL of the latter."""
    if path is None:
        listening = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    else:
        listening, url = socket.socket(socket.AF_UNIX), ""
        listening.bind(str(path))
        listening.listen(2048)
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(params=["native", "transformers"])
def make_hosted(request: pytest.FixtureRequest, tokenizer: Any, runtime: Path) -> Iterator[Callable[..., Any]]:  # noqa: F811
    """Wrap a network as an engine behind a host; also return the engine, and what the host schedules with."""
    kind = NativeModel if request.param == "native" else TransformersModel
    with ExitStack() as open_ones:

        def make(network: Any, *args: Any, **settings: Any) -> tuple[HostModel, Any, ThreadedWarm]:
            model = wrapped(kind, tokenizer, network, *args, **settings)
            warm = ThreadedWarm(model, settings.get("batch_size", 8))
            path = runtime / f"{len(list(runtime.iterdir()))}.sock"
            open_ones.enter_context(served(application(warm), path))  # type: ignore[arg-type]
            client = HostModel(ModelSpec(base_model="tiny"), lambda: connection(path, 20.0), patience=20.0)
            open_ones.callback(client.close)
            return client, model, warm

        yield make


@pytest.fixture
def make_model(make_hosted: Callable[..., Any]) -> Callable[..., HostModel]:
    """Under the name that the engines' tests ask by."""
    return lambda *args, **settings: make_hosted(*args, **settings)[0]  # type: ignore[no-any-return]


ENGINE, SERVER = "alpaca_core.host.engine", "alpaca_core.host.server"
KILLER = 99
HANGER = 98
LOOPER = 97
SLOW = 96
ASSERTER = 95
BREAKER = 94
WORKER = ("sleep", "1234")
_DEADLY = f"""
import os, sys, time
if "{ENGINE}" in sys.orig_argv:
    from alpaca_core.engines import feeding
    plain = feeding.NativeFeed.step
    def step(self):
        for row, _ in self._rows.values():
            if {KILLER} in row.prompt_ids:
                os.abort()
            if {HANGER} in row.prompt_ids:
                time.sleep(1000)
            if {LOOPER} in row.prompt_ids:
                time.sleep(0.01)
                return []
            if {SLOW} in row.prompt_ids:
                time.sleep(1.0)
            if {ASSERTER} in row.prompt_ids:
                import torch
                torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()
            if {BREAKER} in row.prompt_ids:
                from alpaca_core.engines.native import NativeModel
                NativeModel.close = lambda model: time.sleep(1000)
                raise RuntimeError("the device is gone")
        return plain(self)
    feeding.NativeFeed.step = step
    if os.environ.get("TESTS_LINGER"):
        import threading
        threading.Thread(target=time.sleep, args=(1000,)).start()
    if os.environ.get("TESTS_WORKER"):
        import subprocess
        subprocess.Popen(["{WORKER[0]}", "{WORKER[1]}"])
    if loads := os.environ.get("TESTS_SHORT"):
        from alpaca_core.engines import weights
        plain_attach = weights.attach
        def attach(network, adapters, dtype):
            with open(loads, "a") as log:
                print(len(adapters), file=log)
            if len(adapters) > 1:
                raise MemoryError
            return plain_attach(network, adapters, dtype)
        weights.attach = attach
"""
"""Makes engines die, hang, turn round, be slow, fail on the GPU or break of rows with one of six tokens, linger at
their end, begin a process of their own, or note their loads and have no memory for two adapters: part of these tests'
processes alone."""

ADAPTERS = ("default", "pirate", "poet", "clerk")

soaking = pytest.mark.skipif("ALPACA_SOAK_KILLS" not in os.environ, reason="`make soak` runs this")


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    make_network: Callable[..., Any],  # noqa: F811
    add_adapters: Callable[..., Any],  # noqa: F811
    tokenizer: Any,  # noqa: F811
) -> Callable[..., Path]:
    """Write a tiny checkpoint, of rows that end by length alone, and its adapters in folders of their names."""

    def write(seed: int = 0, folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp("checkpoint")
        network = make_network(seed=seed, max_position_embeddings=65_536)
        network.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(tokenizer.definition)
        adapted = add_adapters(make_network(seed=seed), ADAPTERS)
        adapted.save_pretrained(folder.parent / f"{folder.name}-adapters")
        return folder

    return write


@pytest.fixture(scope="session")
def base(checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint that no test writes to."""
    return checkpoint()


def spec_of(base: Path, *adapters: str, **changes: Any) -> ModelSpec:
    """The recipe of a checkpoint with adapters, one thread of one CPU."""
    folders = {name: base.parent / f"{base.name}-adapters" / (name if name != "default" else "") for name in adapters}
    named = tuple({"name": name, "source": str(folders[name])} for name in adapters if name != "default")
    own = str(folders["default"]) if "default" in adapters else None
    told = {"base_model": str(base), "device": "cpu", "batch_size": 8, "adapter": own, "adapters": named}
    return ModelSpec.model_validate(told | changes)


@asynccontextmanager
async def started(spec: ModelSpec, settings: Settings) -> AsyncIterator[WarmModel]:
    """A warm model in this process, whose engine is one of its own."""
    warm = WarmModel(spec, settings)
    warm.start()
    try:
        await warm.tokenizer()
        yield warm
    finally:
        await warm.stop()


@contextmanager
def own_folder(cache: Path, **environment: str) -> Iterator[Path]:
    """A runtime folder and an environment for hosts, all of which are ended with it, and all engines with them."""
    folder = Path(tempfile.mkdtemp(prefix="alpaca-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPACA_RUNTIME", str(folder))
        patch.setenv("ALPACA_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ALPACA_HOST_IDLE", "120")
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            yield folder
        finally:
            for process in processes(folder):
                with suppress(psutil.Error):
                    process.kill()
            until(lambda: not processes(folder))
            shutil.rmtree(folder, ignore_errors=True)


def processes(folder: Path, of: str = "alpaca_core.host") -> list[psutil.Process]:
    """The hosts and engines that were started with a runtime folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE or not any(of in part for part in process.cmdline()):
                continue
            if process.environ().get("ALPACA_RUNTIME") == str(folder):
                found.append(process)
    return found


def engines(folder: Path) -> list[psutil.Process]:
    """The engines among them."""
    return processes(folder, ENGINE)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the session's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(cache: Path) -> Iterator[Path]:
    """A runtime folder for real hosts of one test."""
    with own_folder(cache) as made:
        yield made


@pytest.fixture
def deadly(cache: Path, tmp_path: Path) -> Iterator[Path]:
    """A runtime folder whose engines can be killed by a row, and are given up soon when they hang."""
    (tmp_path / "sitecustomize.py").write_text(_DEADLY)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with own_folder(cache, PYTHONPATH=path, ALPACA_HOST_HANG="3") as folder:
        yield folder


@pytest.fixture(scope="module")
def shared(cache: Path) -> Iterator[Path]:
    """A runtime folder for a real host that the tests of a module share."""
    with own_folder(cache) as made:
        yield made


@contextmanager
def in_process(spec: ModelSpec) -> Iterator[Any]:
    """The model in this process, on one thread."""
    torch.set_num_threads(1)
    with open_model(spec) as model:
        yield model


def host_of(folder: Path) -> Status | None:
    """The status of the one host that answers in a folder."""
    found = [status for path in folder.glob("*.sock") if (status := status_of(path)) is not None]
    assert len(found) < 2
    return found[0] if found else None
