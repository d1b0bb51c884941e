"""Where hosts live, and which one a spec means: folders that others could reach are refused."""

import ast
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import alpaca_core.host
from alpaca_core.errors import HostUnavailable, InvalidAdapter, InvalidRequest, ModelNotFound
from alpaca_core.host.exchange import checked
from alpaca_core.host.launcher import at_host, chosen
from alpaca_core.host.place import absolute, find_base_apart, key_of, runtime_folder
from alpaca_core.host.settings import Settings
from alpaca_core.spec import ModelSpec
from tests.host.conftest import ADAPTERS, processes, spec_of


def test_a_runtime_folder_is_made_for_its_user_alone(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    monkeypatch.setenv("ALPACA_RUNTIME", str(runtime / "a" / "b"))
    before = os.umask(0)
    try:
        assert runtime_folder() == runtime / "a" / "b"
    finally:
        os.umask(before)
    assert (runtime / "a" / "b").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("ALPACA_RUNTIME")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert runtime_folder() == runtime / "alpaca"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(runtime))
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
