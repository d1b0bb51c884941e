"""Prepared folders are whole or absent, and changed bytes are seen."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_core.cache import MANIFEST, Manifest, cache_folder, known_digests, prepare, sha256_of
from alpaca_core.errors import DigestMismatch, LoadError
from alpaca_core.spec import digest_of
from tests.waiting import until

ROOT = Path(__file__).parents[2]

SLOW_BUILD = """
import sys, time
from pathlib import Path
from alpaca_core.cache import Manifest, prepare

def build(scratch):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    (scratch / "half").write_text("half")
    time.sleep(float(sys.argv[3]))
    (scratch / "whole").write_text("whole")
    return Manifest(source="test")

print(sorted(prepare(Path(sys.argv[1]), build).sha256))
"""


def start(folder: Path, log: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW_BUILD, str(folder), str(log), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def write_one(scratch: Path) -> Manifest:
    (scratch / "weights").write_bytes(b"weights")
    return Manifest(source="here", template="alpaca")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("ALPACA_CACHE")
    assert cache_folder() == Path("/two/prefect-alpaca")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "prefect-alpaca"


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans())))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest_of(value) == digest_of(dict(reversed(value.items())))


def test_a_folder_is_built_once_and_its_files_are_hashed(tmp_path: Path) -> None:
    built = []

    def build(scratch: Path) -> Manifest:
        built.append(scratch)
        return write_one(scratch)

    folder = tmp_path / "deep" / "folder"
    first = prepare(folder, build)
    assert prepare(folder, build) == first
    assert len(built) == 1
    assert not built[0].exists()
    assert first.sha256 == {"weights": hashlib.sha256(b"weights").hexdigest()}
    assert first.template == "alpaca"


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    folder, log = tmp_path / "folder", tmp_path / "log"
    processes = [start(folder, log, 0.5) for _ in range(2)]
    outputs = {process.communicate(timeout=30)[0] for process in processes}
    assert outputs == {"['half', 'whole']\n"}
    assert log.read_text() == "built\n"


def test_the_lock_of_a_folder_is_the_same_by_any_path_to_it(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for folder in (tmp_path / "folder", tmp_path / "link" / "folder"):
        prepare(folder, write_one, replace=True)
    assert len(list((cache / "locks").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "folder", "link"}


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    folder, log = tmp_path / "folder", tmp_path / "log"
    process = start(folder, log, 60)
    until(lambda: list(tmp_path.glob(".*/half")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not folder.exists()
    assert set(prepare(folder, write_one).sha256) == {"weights"}
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_no_folder(tmp_path: Path) -> None:
    def build(scratch: Path) -> Manifest:
        write_one(scratch)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(LoadError, match=r"No space left.*ALPACA_CACHE"):
        prepare(tmp_path / "folder", build)
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_an_error_of_the_build_comes_through_and_leaves_no_folder(tmp_path: Path) -> None:
    def build(scratch: Path) -> Manifest:
        raise KeyError("torn")

    with pytest.raises(KeyError):
        prepare(tmp_path / "folder", build)
    assert not (tmp_path / "folder").exists()


def flip(path: Path) -> None:
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip(folder / "weights"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text('{"unknown": 1}'),
    ],
    ids=["flipped bit", "file gone", "file added", "manifest gone", "manifest torn", "manifest of another kind"],
)
def test_a_spoilt_folder_is_refused_and_named(tmp_path: Path, spoil: object) -> None:
    folder = tmp_path / "folder"
    prepare(folder, write_one)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(DigestMismatch, match="Delete that folder") as caught:
        prepare(folder, write_one)
    assert str(folder) in str(caught.value)


def test_replacing_builds_anew(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    prepare(folder, write_one)
    (folder / "weights").unlink()
    assert set(prepare(folder, write_one, replace=True).sha256) == {"weights"}


def test_files_are_hashed_once_until_they_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("alpaca_core.cache.sha256_of", counting)
    for name in "ab":
        (tmp_path / name).write_text(name)
    first = known_digests(tmp_path, "ab")
    assert first == {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    assert known_digests(tmp_path, "a") == {"a": first["a"]}
    assert hashed == ["a", "b"]
    (tmp_path / "b").write_text("another")
    assert known_digests(tmp_path, "ab")["b"] == hashlib.sha256(b"another").hexdigest()
    assert hashed == ["a", "b", "b"]
    known_digests(tmp_path, "ab", again=True)
    assert hashed == ["a", "b", "b", "a", "b"]


def test_bytes_that_change_under_the_same_time_are_found_when_hashed_again(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("weights")
    known_digests(tmp_path, ["weights"])
    flip(tmp_path / "weights")
    known_digests(tmp_path, ["weights"])
    with pytest.raises(DigestMismatch, match="weights must keep its bytes"):
        known_digests(tmp_path, ["weights"], again=True)


def test_a_download_that_is_not_what_the_hub_named_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    good, bad = tmp_path / "blobs" / hashlib.sha256(b"good").hexdigest(), tmp_path / "blobs" / ("0" * 64)
    for name, blob in (("good", good), ("bad", bad)):
        blob.write_bytes(name.encode())
        (tmp_path / "snapshot" / name).symlink_to(blob)
    known_digests(tmp_path / "snapshot", ["good"])
    with pytest.raises(DigestMismatch, match="bad"):
        known_digests(tmp_path / "snapshot", ["bad"])


def test_a_torn_ledger_costs_a_hash_and_no_more(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "weights").write_text("weights")
    first = known_digests(tmp_path, ["weights"])
    (ledger,) = (cache / "digests").iterdir()
    whole = json.loads(ledger.read_text())
    torn = [ledger.read_text()[:-5], "[]", "7", "null", '{"x": 1}', "\udcff"]
    entries = ["foo", [], None, whole["weights"][:2], [*whole["weights"][:2], "foo"], [*whole["weights"][:2], 7]]
    for content in [*torn, *(json.dumps({"weights": entry}) for entry in entries)]:
        ledger.write_bytes(content.encode(errors="surrogateescape"))
        assert known_digests(tmp_path, ["weights"]) == first
        assert json.loads(ledger.read_text()) == whole


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ALPACA_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="ALPACA_CACHE"):
        known_digests(tmp_path, ["file"])
    with pytest.raises(LoadError, match="ALPACA_CACHE"):
        prepare(cache_folder() / "folder", write_one)
