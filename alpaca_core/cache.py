"""The user's cache: folders that are whole or absent, and the digests of files that others wrote.

What is prepared here (an unpacked GGUF file, a converted tokenizer, an imported adapter) is built beside
its place, with a manifest that holds the SHA-256 of every file, and renamed into it under a file lock:
two processes never build the same folder, and a killed one leaves nothing that is taken for whole.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from alpaca_core.errors import DigestMismatch, LoadError
from alpaca_core.spec import TemplateName, Value, digest_of

logger = logging.getLogger(__name__)

MANIFEST = "alpaca.json"
"""Name of the manifest in a prepared folder, and of the sidecar of an adapter."""

_LEDGER = TypeAdapter(dict[str, tuple[int, int, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]])
"""Size, time and SHA-256 of files, by name."""


class Manifest(Value):
    """What a prepared folder was made from and holds; an adapter's also says how it wants to be asked.

    `source_sha256` and `sha256` are by file name, hexadecimal. Beside an adapter of one's own, a file
    with `template` alone will do.
    """

    source: str | None = None
    revision: str | None = None
    source_sha256: dict[str, str] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)
    template: TemplateName | None = None
    versions: dict[str, str] = Field(default_factory=dict)


def cache_folder() -> Path:
    """Return ``$ALPACA_CACHE``, else ``$XDG_CACHE_HOME/prefect-alpaca``, else ``~/.cache/prefect-alpaca``."""
    if chosen := os.environ.get("ALPACA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefect-alpaca"


def sha256_of(path: Path) -> str:
    """Hash a file in full; hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(folder: Path, build: Callable[[Path], Manifest], *, replace: bool = False, check: bool = True) -> Manifest:
    """Return the manifest of a prepared folder, building the folder first where it is absent.

    Args:
        folder: Where it belongs. Another process that builds it is waited for.
        build: Fills an empty folder, and says what it was made from.
        replace: Build anew, whatever is there.
        check: Hash what is there; without it the manifest is taken at its word, by one who does not read the files.

    Raises:
        DigestMismatch: If what is there is not what was prepared.
        LoadError: If the cache cannot be written.
    """
    if replace or not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(_lock(folder)):
                if replace or not folder.exists():
                    _build(folder, build)
        except OSError as error:
            raise LoadError(
                f"{folder} must be written once, but that failed ({error}). "
                "Free space there, or set ALPACA_CACHE to a folder with space that you may write to."
            ) from error
    return verified(folder) if check else recorded(folder)


def _lock(folder: Path) -> Path:
    """The lock of a folder: in the cache, so that none is left beside a folder of the user's."""
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{digest_of(str(folder.resolve()))[:32]}.lock"


def _build(folder: Path, build: Callable[[Path], Manifest]) -> None:
    logger.info("preparing %s, once", folder)
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process: the lock says that it is nobody's now
    try:
        scratch.mkdir()
        made = build(scratch)
        manifest = made.model_copy(update={"sha256": {path.name: sha256_of(path) for path in scratch.iterdir()}})
        (scratch / MANIFEST).write_text(manifest.model_dump_json(indent=2, exclude_defaults=True), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def verified(folder: Path) -> Manifest:
    """Hash every file of a prepared folder, and return its manifest.

    Raises:
        DigestMismatch: If a file is missing, unknown or changed.
    """
    manifest = recorded(folder)
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(there ^ set(manifest.sha256)):
        raise _mismatch(folder, f"{name} is {'unknown' if name in there else 'missing'}")
    for name, expected in manifest.sha256.items():
        if (found := sha256_of(folder / name)) != expected:
            raise _mismatch(folder, f"{name} has the SHA-256 {found[:16]}…, not {expected[:16]}…")
    return manifest


def recorded(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder.

    Raises:
        DigestMismatch: If there is none.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise _mismatch(folder, f"{MANIFEST} is missing")
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None where there is none.

    Raises:
        DigestMismatch: If it is there and cannot be read.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise _mismatch(folder, f"{MANIFEST} cannot be read ({error})") from error


def _mismatch(folder: Path, why: str) -> DigestMismatch:
    return DigestMismatch(
        f"{folder} must hold the bytes that were prepared, but {why}. Delete that folder and try again."
    )


def known_digests(folder: Path, names: Iterable[str], *, again: bool = False) -> dict[str, str]:
    """Return the SHA-256 of files that others wrote, hashing only what is new or was written since.

    Digests are kept in the cache with size and time of the file, so that 13 GB are not read at each load.

    Args:
        folder: Where the files are.
        names: Files in it.
        again: Hash all of them, and compare with what was kept.

    Returns:
        Hexadecimal digests by file name.

    Raises:
        DigestMismatch: If bytes have changed under the same size and time, or are not those that the
            hub's cache names a file by.
        OSError: If one of them cannot be read, or is none: a folder, a pipe.
    """
    ledger = cache_folder() / "digests" / f"{digest_of(str(folder))[:32]}.json"
    try:
        kept = _LEDGER.validate_json(ledger.read_bytes())
    except (OSError, ValidationError):  # not there, or torn: the files are hashed again
        kept = {}
    now: dict[str, tuple[int, int, str]] = {}
    for name in sorted(names):
        path = folder / name
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        entry = kept.get(name)
        unchanged = entry is not None and entry[:2] == (found.st_size, found.st_mtime_ns)
        if entry is None or again or not unchanged:
            digest = sha256_of(path)
            if (unchanged and entry and digest != entry[2]) or not _is_named_so(path, digest):
                raise DigestMismatch(
                    f"{path} must keep its bytes, but they have changed on the disk. Fetch or import it again."
                )
            entry = found.st_size, found.st_mtime_ns, digest
        now[name] = entry
    if now != {name: kept.get(name) for name in now}:
        _write(ledger, {**kept, **now})
    return {name: digest for name, (_, _, digest) in now.items()}


def _is_named_so(path: Path, digest: str) -> bool:
    """The hub's cache names large files by their SHA-256: a download that went wrong shows."""
    blob = path.resolve()
    return blob.parent.name != "blobs" or len(blob.name) != len(digest) or blob.name == digest


def _write(path: Path, value: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            json.dump(value, scratch)
        os.replace(scratch.name, path)
    except OSError as error:
        raise LoadError(
            f"digests are kept in {path.parent}, but it cannot be written ({error}). "
            "Set ALPACA_CACHE to a folder that you may write to."
        ) from error
