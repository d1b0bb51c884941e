"""Where LoRA weights lie on the disk, and what their configuration says. Nothing is unpickled here.

A plain LoRA is all that is taken: what would change the base, need code, or mean something that is not
understood here is refused, rather than dropped.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alpaca_core.cache import MANIFEST, Manifest, cache_folder, known_digests, read_manifest
from alpaca_core.checkpoints import fetch, local_path, read_json, unreadable
from alpaca_core.errors import DigestMismatch, InvalidAdapter, InvalidCheckpoint, ModelNotFound, UnsafeCheckpoint, brief
from alpaca_core.model import DEFAULT_ADAPTER, AdapterInfo
from alpaca_core.spec import ModelSpec, TemplateName, digest_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

PUBLISHED_PICKLES: dict[str, TemplateName] = {"tloen/alpaca-lora-7b": "alpaca-lora"}
"""Hub repositories that are known to hold a pickle only, and the template they were trained with."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
"""Fields that say how an adapter was trained, or have no effect while others are unset."""


class LoraFields(BaseModel):
    """The part of ``adapter_config.json`` that a plain LoRA (arXiv 2106.09685) needs; names are PEFT's.

    Fields that this class does not name must be unset: DoRA, replaced modules and the like.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: int = Field(8, ge=1)
    lora_alpha: int | float = 8
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    # the others change the base weights before training, so what they save belongs to another base
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal", None] = True

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`; the initial weights are all overwritten."""
        fields = set(LoraFields.model_fields) - {"peft_type", "init_lora_weights"}
        return self.model_dump(mode="json", include=fields)


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA weights on the disk, and what results say of them."""

    info: AdapterInfo
    folder: Path
    lora: LoraFields


def find_adapters(spec: ModelSpec, *, again: bool = False) -> tuple[Adapter, ...]:
    """Find a spec's adapters, fetching them where needed; its own one comes first.

    Args:
        spec: Names them by `adapter`, `adapter_revision` and `adapters`.
        again: Hash every file again.

    Raises:
        ModelNotFound: If there is no such folder or repository.
        UnsafeCheckpoint: If there is only a pickle, and it was not imported.
        DigestMismatch: If bytes are not those that were imported or seen before.
        InvalidAdapter: If it is no plain LoRA, or a file of it cannot be read.
    """
    asked = [(adapter.name, adapter.source, adapter.revision) for adapter in spec.adapters]
    if spec.adapter:
        asked.insert(0, (DEFAULT_ADAPTER, spec.adapter, spec.adapter_revision))
    return tuple(_find(name, source, revision, again) for name, source, revision in asked)


def imported_folder(source: str, revision: str | None) -> Path:
    """Return where the converted copy of a pickled adapter belongs."""
    path = local_path(source)
    key = str(path.resolve()) if path.exists() else source
    readable = re.sub(r"[^\w.-]", "-", key)[-60:]
    return cache_folder() / "adapters" / f"{readable}-{digest_of([key, revision])[:16]}"


def pickle_of(path: Path) -> Path:
    """Return the pickle that a folder or file stands for."""
    return path if path.is_file() else path / PICKLE


def read_lora(path: Path) -> LoraFields:
    """Read an ``adapter_config.json``.

    Raises:
        InvalidAdapter: If it is none of a plain LoRA.
    """
    try:
        fields = LoraFields.model_validate(read_json(path))
    except InvalidCheckpoint as error:
        raise InvalidAdapter(str(error)) from error
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InvalidAdapter(
            f"an adapter is a plain LoRA in PEFT's format, but {path} has {wrong['loc'][0]}={brief(wrong['input'])} "
            f"({wrong['msg']}). Train or convert it as a plain LoRA."
        ) from error
    extra = fields.model_extra or {}
    unknown = [f"{name:.40}={brief(value)}" for name, value in extra.items() if value and name not in _WITHOUT_EFFECT]
    if unknown:
        raise InvalidAdapter(
            f"an adapter is a plain LoRA, but {path} also sets {', '.join(unknown[:8])}. "
            "Merge it into its base and load that as base_model."
        )
    return fields


def _find(name: str, source: str, revision: str | None, again: bool) -> Adapter:
    try:
        folder, commit = _locate(source, revision)
        manifest = _sidecar(folder)
        sha256 = known_digests(folder, (CONFIG, WEIGHTS), again=again or bool(manifest.sha256))
    except OSError as error:
        raise InvalidAdapter(
            f"an adapter is files that this user can read, but with {brief(source, 200)} that failed "
            f"({unreadable(error)}). Mend the file, or fetch the adapter again."
        ) from error
    for file, digest in sha256.items():
        if manifest.sha256.get(file, digest) != digest:
            raise DigestMismatch(
                f"{folder / file} must have the SHA-256 that {MANIFEST} beside it records, but it has changed. "
                "Import or fetch the adapter again."
            )
    info = AdapterInfo(
        name=name,
        source=source,
        digest=digest_of(sha256),
        revision=commit or manifest.revision,
        template=manifest.template,
    )
    return Adapter(info, folder, read_lora(folder / CONFIG))


def _sidecar(folder: Path) -> Manifest:
    try:
        return read_manifest(folder) or Manifest()
    except DigestMismatch as error:
        if cache_folder().resolve() in folder.resolve().parents:
            raise
        raise InvalidAdapter(
            f'{folder / MANIFEST} must be JSON such as {{"template": "alpaca"}}, but cannot be read '
            f"({error.__cause__}). Fix or remove that file."
        ) from error


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    local, imported = local_path(source), imported_folder(source, revision)
    if imported.exists() and not (local / WEIGHTS).exists():
        _check_current(source, local, imported)
        return imported, None
    if source in PUBLISHED_PICKLES and not local.exists():
        raise _only_a_pickle(source, revision)
    folder, commit = fetch(source, revision, (CONFIG, WEIGHTS, MANIFEST))
    if (folder / WEIGHTS).exists() and (folder / CONFIG).exists():
        return folder, commit
    if pickle_of(folder).exists() or (commit and (folder / CONFIG).exists()):
        raise _only_a_pickle(source, revision)
    raise ModelNotFound(f"an adapter is {CONFIG} and {WEIGHTS}, but {folder} lacks one of them. Name another folder.")


def _check_current(source: str, local: Path, imported: Path) -> None:
    """Refuse the converted copy of a pickle that has been written again since."""
    pickle = pickle_of(local)
    manifest = read_manifest(imported)
    if manifest and pickle.exists() and known_digests(pickle.parent, (CONFIG, pickle.name)) != manifest.source_sha256:
        raise DigestMismatch(
            f"{pickle} or its {CONFIG} has changed since it was imported. Run `alpaca import-adapter {source}` again."
        )


def _only_a_pickle(source: str, revision: str | None) -> UnsafeCheckpoint:
    pinned = f" --revision {revision}" if revision else ""
    return UnsafeCheckpoint(
        f"adapters are read from {WEIGHTS}, but {source!r} is published as {PICKLE}, a pickle, which can run code. "
        f"Convert it once, safely: `alpaca import-adapter {source}{pinned}`."
    )
