"""The doctor: what is right, what is broken, and what to do about it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

import alpaca_core
from alpaca_core import LanguageModel, ModelSpec
from alpaca_core.errors import DigestMismatch
from alpaca_core.testing import FakeModel
from prefect_alpaca.flows import cli, doctor


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is a fake; everything else is this machine's."""

    @contextmanager
    def load(spec: ModelSpec) -> Iterator[LanguageModel]:
        yield FakeModel({"?": {"Yes": 0.5, "No": 0.5}})

    monkeypatch.setattr(doctor, "load_model", load)
    monkeypatch.setattr(doctor, "verify_checkpoint", lambda spec: {spec.base_model: "0" * 64})


def states(*, verify: bool = False) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(ModelSpec(), verify=verify)}


def test_a_sound_machine_has_nothing_broken() -> None:
    checks = states(verify=True)
    assert {"python", "libraries", "machine", "gpu", "files", "model", "prefect api"} <= set(checks)
    assert [check for check in checks.values() if check.state == "broken"] == []


def test_a_library_out_of_range_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.165.0" if name == "fastapi" else "99")
    check = states()["libraries"]
    assert check.state == "broken"
    assert "fastapi<0.151 is needed, 0.165.0 is installed" in check.found
    assert "make install" in check.remedy


def test_a_full_disk_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALPACA_CACHE", str(tmp_path / "not" / "there" / "yet"))
    assert states()["machine"].state == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    assert "ALPACA_CACHE" in states()["machine"].remedy


def test_a_model_that_cannot_be_loaded_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: ModelSpec) -> LanguageModel:
        raise DigestMismatch("the bytes have changed. Fetch it again.")

    monkeypatch.setattr(doctor, "load_model", load)
    monkeypatch.setattr(doctor, "verify_checkpoint", load)
    checks = states(verify=True)
    assert (checks["model"].state, checks["files"].state) == ("broken", "broken")
    assert checks["model"].found == "the bytes have changed. Fetch it again."


def test_an_api_that_does_not_answer_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert cli.main(["doctor", "--json"]) == 1
    [check] = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["state"] == "broken"]
    assert check["name"] == "prefect api"
    assert "prefect server start" in check["remedy"]


@pytest.mark.parametrize("error", [OSError("libcudart.so is missing"), RuntimeError("CUDA driver\nerror")])
def test_an_error_that_nobody_expected_is_broken_too(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: ModelSpec) -> LanguageModel:
        raise error

    monkeypatch.setattr(doctor, "load_model", load)
    monkeypatch.setattr(doctor, "verify_checkpoint", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: load(ModelSpec()))
    checks = states(verify=True)
    for name in ("gpu", "files", "model"):
        assert checks[name].state == "broken"
        assert checks[name].found == f"{type(error).__name__}: {' '.join(str(error).split())}"
        assert checks[name].remedy


def test_a_model_that_does_not_exist_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "load_model", alpaca_core.load_model)
    assert cli.main(["doctor", "--model", "/nonexistent", "--json"]) == 1
    [check] = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["state"] == "broken"]
    assert check["name"] == "model"
    assert "'/nonexistent'" in check["found"]


class Service(BaseHTTPRequestHandler):
    """Some web service: it answers everything with its server's answer."""

    answer: ClassVar[tuple[int, bytes]] = (200, b"")

    def do_GET(self) -> None:
        code, body = self.answer
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where `Service` listens, as host and port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("scheme", "answer", "remedy"),
    [
        ("http", (200, b"<html>Hello</html>"), "correct PREFECT_API_URL"),
        ("http", (200, b'{"hello": 1}'), "correct PREFECT_API_URL"),
        ("http", (404, b"nothing here"), "correct PREFECT_API_URL"),
        ("http", (500, b""), "correct PREFECT_API_URL"),
        ("http", (401, b'{"detail": "Unauthorized"}'), "PREFECT_API_AUTH_STRING"),
        ("http", (403, b""), "PREFECT_API_KEY"),
        ("https", (200, b""), "correct PREFECT_API_URL"),
        ("ftp", (200, b""), "correct PREFECT_API_URL"),
    ],
)
def test_a_service_that_is_not_prefects_is_broken(
    scheme: str, answer: tuple[int, bytes], remedy: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "answer", answer)
    with temporary_settings({PREFECT_API_URL: f"{scheme}://{address}/api"}):
        checks = states()
    assert "work pool" not in checks
    assert checks["prefect api"].state == "broken"
    assert f"{scheme}://{address}/api" in checks["prefect api"].found
    assert remedy in checks["prefect api"].remedy


def test_a_work_pool_that_cannot_be_read_is_broken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "answer", (200, b'"3.8.8"'))
    with temporary_settings({PREFECT_API_URL: f"http://{address}/api"}):
        checks = states()
    assert (checks["prefect api"].state, checks["work pool"].state) == ("ok", "broken")


@pytest.mark.usefixtures("prefect_api")
def test_an_api_without_the_work_pool_gets_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "prefect work-pool create gpu --type process" in " ".join(capsys.readouterr().out.split())
