"""What a client may name, folders and adapters of any kind, at a host with a real engine: it says no, and stays."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alpaca_core.host.application import application
from alpaca_core.host.keeping import WarmModel
from alpaca_core.host.settings import Settings
from alpaca_core.spec import ModelSpec
from tests.host.conftest import own_folder, served, spec_of
from tests.host.test_protocol import ANYTHING, GOOD, JSON, SCORE, check, check_well

CONFIGS: list[object] = [
    *([], {}, 5, None, "x", {"peft_type": "LORA"}, {"peft_type": "LORA", "r": 0}, {"peft_type": ["LORA"]}),
    *({"peft_type": "LORA", "r": 10**400}, {"peft_type": "LORA", "x" * 5000: "y" * 5000}, {"weight_map": []}),
    *({"weight_map": {"a": 5, "b": [], "c": "../../x"}}, {"model_type": "llama"}, {"eos_token_id": {"a": 1}}),
]
FILES = ["adapter_config.json", "adapter_model.safetensors", "alpaca.json", "config.json", "tokenizer.json"]
FILES += ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer_config.json"]
SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def http(base: Path, cache: Path) -> Iterator[httpx.Client]:
    """A client of a host whose engine is a process, and which looks for what it is asked for on this disk alone."""
    with pytest.MonkeyPatch.context() as patch, own_folder(cache):
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        warm = WarmModel(spec_of(base, "poet"), Settings())
        with served(application(warm)) as url, httpx.Client(base_url=url, timeout=120.0) as client:
            assert client.post("/v1/model", json={"spec": spec_of(base).model_dump(mode="json")}).status_code == 200
            yield client


@pytest.fixture(autouse=True)
def well(http: httpx.Client) -> Iterator[None]:
    yield
    check_well(http)
    status = http.get("/v1/status").json()
    assert (status["state"], status["restarts"]) == ("ready", 0)


@pytest.fixture(scope="module")
def odd(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for folders that are made, and what a name may mean beside them."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "pickle.bin").write_bytes(b"\x80\x04N.")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    (folder / "closed").mkdir(mode=0)
    shutil.copytree(base, folder / "both")
    shutil.copytree(base.parent / f"{base.name}-adapters" / "poet", folder / "both", dirs_exist_ok=True)
    return folder


NAMED = [
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "~nobody/x",
    "/dev/null",
    "/proc/self/mem",
    "a\x00b",
    "x" * 5000,
    "/" + "x" * 300,
]
NAMED += ["owner/name", "tloen/alpaca-lora-7b", "http://x/y", "x.gguf", "\u202e", "é" * 200]
HERE = ["empty", "file", "pickle.bin", "dangling", "loop", "pipe", "closed", "both", "nothing", "file/x", "made"]


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec of which one thing or another is strange; names that begin with a colon are of the test's folders."""
    name = st.sampled_from(NAMED) | st.sampled_from([f":{each}" for each in HERE]) | st.text(max_size=20)
    spec: dict[str, Any] = {"base_model": draw(st.just(":base") | name), "device": "cpu"}
    if draw(st.booleans()):
        spec["adapter"] = draw(name | st.just(":base"))
    if draw(st.booleans()):
        entry = st.fixed_dictionaries({"name": st.text(max_size=8) | st.just("default"), "source": name})
        spec["adapters"] = draw(st.lists(entry, max_size=3))
    fields = ("revision", "device", "quantization", "dtype", "batch_size", "template", "merge_adapter", "device_map")
    for field in draw(st.lists(st.sampled_from([*fields, "adapter_revision", "engine", "more"]), max_size=2)):
        strange = st.sampled_from([None, True, 0, "", "int8", "auto", "cuda:1", "vllm", "bfloat16", 10**30])
        spec[field] = draw(strange | ANYTHING)
    return spec


FILLED = st.dictionaries(
    st.sampled_from(FILES),
    st.sampled_from([json.dumps(each).encode() for each in CONFIGS])
    | st.sampled_from([b"", b"{", b"\xff\xfe", b"[" * 100_000, None])
    | st.binary(max_size=30),
)


@SETTINGS
@given(spec=specs(), files=FILLED)
@example({"base_model": ":base", "device": "cpu", "adapter": ":made"}, {FILES[0]: None, FILES[1]: b"x"})
@example(
    {"base_model": ":made", "device": "cpu"}, {"config.json": b"{}", FILES[6]: json.dumps({"weight_map": 1}).encode()}
)
def test_any_spec_is_answered_or_refused(
    http: httpx.Client, odd: Path, base: Path, spec: dict[str, Any], files: dict[str, bytes | None]
) -> None:
    shutil.rmtree(odd / "made", ignore_errors=True)
    (odd / "made").mkdir()
    for name, content in files.items():
        if content is None:
            (odd / "made" / name).mkdir()
        else:
            (odd / "made" / name).write_bytes(content)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(each) for each in value]
        if isinstance(value, dict):
            return {key: placed(each) for key, each in value.items()}
        if isinstance(value, str) and value.startswith(":"):
            return str(base if value == ":base" else odd / value[1:])
        return value

    check(http.post("/v1/model", content=json.dumps({"spec": placed(spec)}), headers=JSON))


def test_weights_of_no_kind_are_refused_by_the_engine_and_disturb_nobody(
    http: httpx.Client, base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base.parent / f"{base.name}-adapters" / "poet", tmp_path / "poet"))
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    spec = spec_of(base).model_copy(update={"adapter": str(folder)})
    reply = http.post("/v1/model", json={"spec": spec.model_dump(mode="json")})
    assert reply.json()["error"]["type"] == "InvalidAdapter", reply.text
    spec = spec_of(base, "poet")
    assert http.post("/v1/model", json={"spec": spec.model_dump(mode="json")}).json()["adapters"].keys() >= {"poet"}


LOOKS = ["/health", "/metrics", "/v1/status", "/v1/tokenizer", "/openapi.json"]


@SETTINGS
@given(
    method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]),
    path=st.sampled_from([*LOOKS, "/v1/model", "/v1/generate", "/v1/stop"])
    | st.text(max_size=20).map(lambda text: "/" + text.encode(errors="surrogatepass").hex()),
    query=st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=2),
    body=st.sampled_from([b"", b"{", json.dumps(GOOD).encode(), json.dumps(SCORE).encode(), b"\xff" * 70_000]),
    header=st.sampled_from(["alpaca-client", "alpaca-model", "authorization", "range", "accept", "expect", "x"]),
    value=st.binary(max_size=70).map(lambda raw: bytes(byte for byte in raw if byte > 32 and byte != 127)),
)
def test_any_look_is_answered_or_refused(
    http: httpx.Client, method: str, path: str, query: dict[str, str], body: bytes, header: str, value: bytes
) -> None:
    headers = [(b"content-type", b"application/json"), (header.encode(), value)]
    reply = http.request(method, path, params=query, content=body, headers=headers)  # type: ignore[arg-type]
    if method == "HEAD":
        assert reply.status_code < 500
    else:
        check(reply)
    if method == "GET" and path in LOOKS:
        assert reply.status_code == 200


def test_a_spec_alone_is_what_the_host_was_asked_for(http: httpx.Client, base: Path) -> None:
    reply = http.post("/v1/model", json={"spec": ModelSpec(base_model=str(base), device="cpu").model_dump(mode="json")})
    assert reply.json()["info"]["name"] == str(base)
