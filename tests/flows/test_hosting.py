"""`alpaca serve` and `alpaca host`: who may ask, and what is told of hosts."""

from pathlib import Path

import pytest

from alpaca_core.errors import InvalidRequest
from prefect_alpaca.flows import cli
from prefect_alpaca.flows.hosting import token_of

GOOD = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALPACA_HOST_TOKEN", raising=False)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "10.0.0.5", "fe80::1", "::ffff:10.0.0.5", "gpu-box", "localhost.example", "127.1", ""]
)
def test_a_host_that_others_can_reach_does_not_start_without_a_token(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ([], ["--ray"]):
        assert cli.main(["serve", "--address", address, *more]) == 2
        assert "wants a token" in capsys.readouterr().err
    monkeypatch.setenv("ALPACA_HOST_TOKEN", f" {GOOD}\n")
    assert token_of(address, None) == GOOD


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "localhost", "::ffff:127.0.0.1"])
def test_a_host_for_this_machine_alone_needs_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_of(address, None) is None
    monkeypatch.setenv("ALPACA_HOST_TOKEN", GOOD)
    assert token_of(address, None) == GOOD


@pytest.mark.parametrize("token", [GOOD[1:], "x", GOOD + "\n" + GOOD, GOOD + "é", GOOD + "\x7f"])
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_token_that_could_be_guessed_or_not_be_sent_is_refused(
    address: str, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    with pytest.raises(InvalidRequest, match="at least 16 ASCII"):
        token_of(address, file)
    monkeypatch.setenv("ALPACA_HOST_TOKEN", token)
    with pytest.raises(InvalidRequest, match="at least 16 ASCII"):
        token_of(address, None)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff" * 20, None])
def test_a_file_without_a_token_is_no_leave_to_serve_without(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on this machine alone, nor with a token in the environment, which was not what was asked for."""
    monkeypatch.setenv("ALPACA_HOST_TOKEN", GOOD)
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidRequest, match="--token-file holds the token"):
        token_of("127.0.0.1", file)


def test_a_file_that_others_may_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_text(GOOD + "\n")
    for mode in (0o600, 0o400):
        file.chmod(mode)
        assert token_of("0.0.0.0", file) == GOOD
        assert capsys.readouterr().err == ""
    for mode in (0o644, 0o440, 0o602):
        file.chmod(mode)
        assert token_of("0.0.0.0", file) == GOOD
        assert f"(mode {mode:o}); chmod 600 it" in capsys.readouterr().err
