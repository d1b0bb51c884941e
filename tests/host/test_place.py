"""Where hosts live, and which one a spec means: folders that others could reach are refused."""

import ast
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import alpaca_core.host
from alpaca_core.errors import HostUnavailable, InvalidAdapter, InvalidRequest, ModelNotFound
from alpaca_core.host.application import application
from alpaca_core.host.exchange import checked
from alpaca_core.host.launcher import at_host, chosen, remote
from alpaca_core.host.neighbours import connection
from alpaca_core.host.place import absolute, device_of, find_base_apart, is_loopback, key_of, meet, runtime_folder
from alpaca_core.host.settings import Settings
from alpaca_core.spec import ModelSpec
from tests.engines.conftest import wrapped
from tests.host.conftest import ADAPTERS, NativeModel, ThreadedWarm, processes, served, spec_of


def test_a_runtime_folder_is_made_for_its_user_alone(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    monkeypatch.setenv("ALPACA_RUNTIME", str(runtime / "a" / "b"))
    before = os.umask(0)
    try:
        assert runtime_folder() == runtime / "a" / "b"
    finally:
        os.umask(before)
    assert (runtime / "a" / "b").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("ALPACA_RUNTIME")
    monkeypatch.setattr("alpaca_core.host.place._TEMPORARY", runtime)
    for login in ("one", "two"):  # which may end before a host that it has started
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / login))
        monkeypatch.setenv("TMPDIR", str(runtime / login))
        assert runtime_folder() == runtime / f"alpaca-{os.getuid()}"


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o755, 0o770, 0o777, 0o1777])
def test_a_runtime_folder_that_others_may_enter_is_refused(
    monkeypatch: pytest.MonkeyPatch, runtime: Path, mode: int
) -> None:
    monkeypatch.setenv("ALPACA_RUNTIME", str(runtime / "open"))
    (runtime / "open").mkdir()
    (runtime / "open").chmod(mode)
    with pytest.raises(HostUnavailable, match="mode 700"):
        runtime_folder()


def test_a_runtime_folder_that_is_a_link_a_file_or_somebody_elses_is_refused(
    monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    (runtime / "own").mkdir(mode=0o700)
    (runtime / "link").symlink_to(runtime / "own")
    (runtime / "dangling").symlink_to(runtime / "nowhere")
    (runtime / "file").touch()
    names = ["link", "dangling", "file"]
    if os.getuid() == 0:
        (runtime / "other").mkdir(mode=0o700)
        os.chown(runtime / "other", 12345, -1)
        names.append("other")
        with monkeypatch.context() as patch:  # somebody else was there first
            (runtime / "tmp" / "alpaca-0").mkdir(parents=True, mode=0o700)
            os.chown(runtime / "tmp" / "alpaca-0", 12345, -1)
            patch.delenv("ALPACA_RUNTIME")
            patch.setattr("alpaca_core.host.place._TEMPORARY", runtime / "tmp")
            with pytest.raises(HostUnavailable, match="user 12345"):
                runtime_folder()
    for name in names:
        monkeypatch.setenv("ALPACA_RUNTIME", str(runtime / name))
        with pytest.raises(HostUnavailable, match="ALPACA_RUNTIME"):
            runtime_folder()


def test_a_path_that_no_socket_can_have_is_refused(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    for length in range(60, 110):
        folder = runtime / ("x" * (length - len(str(runtime)) - 1))
        monkeypatch.setenv("ALPACA_RUNTIME", str(folder))
        try:
            found = runtime_folder()
        except HostUnavailable as error:
            assert "100 bytes" in str(error)
            continue
        with socket.socket(socket.AF_UNIX) as wire:  # as the host does, before it moves it to its place
            wire.bind(str(found / f"{'0' * 16}.4194304"))


def test_one_key_for_each_base_its_bits_and_its_device(
    base: Path, checkpoint: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPACA_CACHE", str(cache))

    def key(spec: ModelSpec) -> str:
        return key_of(spec, find_base_apart(spec))

    plain = key(spec_of(base))
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert key(spec_of(base, *ADAPTERS)) == plain == key(spec_of(base, batch_size=3, memory_share=0.5, template="raw"))
    assert key(spec_of(base).model_copy(update={"base_model": str(copy)})) == plain
    assert key(spec_of(base, dtype="float32")) == plain
    others = [
        spec_of(base, dtype="bfloat16"),
        spec_of(base, quantization="int8"),
        spec_of(base, device="cuda:1"),
        spec_of(base, "default", merge_adapter=True),
        spec_of(checkpoint(1)),
    ]
    keys = [key(spec) for spec in others]
    assert len({plain, *keys}) == len(others) + 1
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert key(spec_of(base).model_copy(update={"base_model": str(copy)})) not in {plain, *keys}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,1,4")  # a GPU is the same one, wherever it is shown
    assert key(spec_of(base)) == plain
    assert key(spec_of(base, device="cuda:1")) in keys
    assert key(spec_of(base, device="cuda:2")) not in keys
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert key(spec_of(base, device="cuda:0")) == keys[2], "the second GPU, shown as the first"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The files of a machine with four GPUs."""
    for name in ("nvidiactl", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr("alpaca_core.host.place._DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr("alpaca_core.host.place._GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


TWO, FOUR = "cuda:0+cuda:1", "cuda:0+cuda:1+cuda:2+cuda:3"
SPLIT = {"engine": "vllm", "tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("shown", "changes", "device"),
    [
        (None, {}, "cuda:0"),
        ("", {}, "cpu"),  # no GPU is another thing than all of them
        ("-1", {}, "cpu"),
        ("NoDevFiles", {}, "cpu"),
        ("2", {}, "cuda:2"),
        ("2,-1,3", {"device": "cuda:1"}, "no. 1 of 1 GPUs"),
        ("", {"device": "cuda"}, "no. 0 of 0 GPUs"),
        ("GPU-8932f937,1", {"device": "cuda:1"}, "cuda:1"),
        (None, {"device": "cpu"}, "cpu"),
        (None, {"device": "cuda:7"}, "cuda:7"),
        (None, {"device_map": "auto"}, FOUR),
        ("", {"device_map": "auto"}, "cpu"),
        ("3,1", {"device_map": "balanced"}, "cuda:3+cuda:1"),
        (None, SPLIT, TWO),
        (None, SPLIT | {"device": "cuda:2"}, "cuda:2+cuda:3"),
        ("0,1", SPLIT, TWO),
        ("0", SPLIT, "no. 1 of 1 GPUs"),
    ],
)
def test_a_device_is_what_cuda_shows(
    gpus: Path, monkeypatch: pytest.MonkeyPatch, shown: str | None, changes: dict[str, Any], device: str
) -> None:
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert device_of(ModelSpec.model_validate(changes)) == device


def test_runs_of_a_gpu_and_runs_without_one_have_hosts_of_their_own(
    gpus: Path, base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPACA_CACHE", str(cache))
    spec = spec_of(base, device="auto")
    found = find_base_apart(spec)
    with_gpu = key_of(spec, found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert key_of(spec, found) == key_of(spec_of(base), found) != with_gpu


def test_devices_meet_where_one_is_in_both() -> None:
    spread = (FOUR, TWO, "cuda:1", "cuda:10", "cpu")
    met = {(one, other) for one in spread for other in spread if meet(one, other)}
    apart = {("cuda:10", each) for each in spread} | {("cpu", each) for each in spread}
    apart |= {(other, one) for one, other in apart}
    assert met == {(one, other) for one in spread for other in spread} - apart | {(each,) * 2 for each in spread}


@pytest.mark.parametrize(
    ("address", "near"),
    [
        *((each, True) for each in ("127.0.0.1", "127.8.9.1", "::1", "localhost", "::ffff:127.0.0.1")),
        *((each, False) for each in ("0.0.0.0", "::", "10.0.0.5", "::ffff:10.0.0.5", "localhost.example", "host", "")),
    ],
)
def test_an_address_is_this_machines_alone_where_it_is_so_in_numbers(address: str, near: bool) -> None:
    assert is_loopback(address) == near


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_requests_to_this_machine_go_through_no_proxy(
    make_network: Any, tokenizer: Any, runtime: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for each in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("ALPACA_HOST_TOKEN", "secret")
    warm: Any = ThreadedWarm(wrapped(NativeModel, tokenizer, make_network()), 8)
    with socket.create_server(("127.0.0.1", 0)) as proxy, served(application(warm, token="secret")) as url:
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for place in ("127.0.0.1", "localhost", "0.0.0.0"):
            with remote(url.replace("127.0.0.1", place)) as client:
                assert client.get("/v1/status", timeout=10.0).status_code == 200
        with served(application(warm), runtime / "x.sock"), connection(runtime / "x.sock", 10.0) as client:
            assert client.get("/v1/status").status_code == 200
        proxy.settimeout(0.2)
        with pytest.raises(TimeoutError):
            proxy.accept()
        with (
            remote("http://models.example") as far,
            pytest.raises(httpx.TransportError),
        ):  # which is the proxy's to find
            far.get("/v1/status", timeout=1.0)
        assert proxy.accept()


def test_a_url_that_is_none_is_refused() -> None:
    for url in ("http://x:y", "http://x\x00"):
        with pytest.raises(InvalidRequest, match="ALPACA_HOST is a host's URL"):
            remote(url)


def test_paths_are_made_absolute_and_names_are_left(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    near = ModelSpec(base_model=base.name, adapter=f"{base.name}-adapters")
    assert absolute(near).base_model == str(base)
    assert absolute(near).adapter == f"{base}-adapters"
    for name in ("owner/name", "smollm2-135m-instruct"):
        assert absolute(ModelSpec(base_model=name)).base_model == name
    (base.parent / "smollm2-135m-instruct").mkdir()
    assert absolute(ModelSpec()) == ModelSpec()


@pytest.mark.parametrize("choice", ["yes", "on", "localhost:8000", "ftp://x", "unix:/x"])
def test_a_choice_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setenv("ALPACA_HOST", choice)
    with pytest.raises(InvalidRequest, match="off, auto or a host's URL"):
        chosen()


def test_a_flow_run_of_a_worker_uses_the_host_and_all_else_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALPACA_HOST", raising=False)
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    assert chosen() == "off"
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "0")
    assert chosen() == "auto"
    monkeypatch.setenv("ALPACA_HOST", "off")
    assert chosen() == "off"


@pytest.mark.parametrize("name", ["ALPACA_HOST_HANG", "ALPACA_HOST_IDLE", "ALPACA_HOST_QUEUE"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x", "1e999"])
def test_settings_that_are_no_number_above_zero_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=name):
        Settings.from_environment()


def test_a_queue_of_less_than_a_row_is_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_HOST_QUEUE", "0.5")
    assert Settings.from_environment().queue >= 1


def test_a_host_that_is_not_there_is_told_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpaca_core.host.client._CONTACT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(HostUnavailable, match="cannot be reached"), at_host(ModelSpec(), f"http://127.0.0.1:{port}"):
        pass


def test_what_is_no_host_of_ours_is_told_so() -> None:
    for strange in (httpx.Response(200, json=[1]), httpx.Response(200, text="<html>"), httpx.Response(502, json={})):
        with pytest.raises(HostUnavailable, match="answers in JSON"):
            checked(strange.status_code, strange.content)


def test_nothing_on_the_way_can_run_code() -> None:
    """Clients, host and engine exchange JSON: no module of theirs knows pickle, or evaluates what it is sent."""
    unsafe: set[Any] = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "yaml"}
    for path in Path(alpaca_core.host.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
        assert not {name.split(".")[0] for name in imported} & unsafe
        assert not called & {"eval", "exec", "compile", "__import__"}


def test_what_is_not_there_is_told_as_where_no_host_is_and_starts_none(
    base: Path, cache: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPACA_CACHE", str(cache))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    for kind, changes in (
        (ModelNotFound, {"base_model": str(base / "none")}),
        (ModelNotFound, {"adapter": str(base / "none")}),
        (InvalidAdapter, {"adapter": str(tmp_path)}),
    ):
        with pytest.raises(kind), at_host(spec_of(base).model_copy(update=changes), "auto"):
            pass
    assert not processes(runtime)
