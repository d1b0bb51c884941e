"""The one place where a pickle is opened: a LoRA adapter that is published as nothing else.

`torch.load` runs with ``weights_only=True``, said aloud: then neither a pickle's code runs, nor does
``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`` in the environment have a say.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from alpaca_core.adapters import CONFIG, PICKLE, PUBLISHED_PICKLES, WEIGHTS, imported_folder, pickle_of, read_lora
from alpaca_core.cache import Manifest, prepare, sha256_of
from alpaca_core.checkpoints import fetch
from alpaca_core.errors import InvalidRequest, ModelNotFound, UnsafeCheckpoint
from alpaca_core.spec import TemplateName


def convert_adapter(source: str, template: TemplateName | None, revision: str | None, out: Path | None) -> Path:
    """Convert a pickled LoRA to safetensors; see `alpaca_core.loading.import_adapter`."""
    path, commit = fetch(source, revision, (CONFIG, PICKLE))
    weights = pickle_of(path)
    config = weights.with_name(CONFIG)
    if not weights.exists() and (path / WEIGHTS).exists():
        raise InvalidRequest(f"only pickles need importing, but {source!r} holds {WEIGHTS}. Load it as it is.")
    for needed in (weights, config):
        if not needed.exists():
            raise ModelNotFound(
                f"a pickled adapter is {PICKLE} and {CONFIG}, but there is no {needed}. Check the source."
            )
    if out is not None and out.exists():
        raise InvalidRequest(f"out is a folder to be made, but {out} exists. Name a new one.")

    def build(scratch: Path) -> Manifest:
        fields = read_lora(config)
        save_file(_unpickled(weights), scratch / WEIGHTS)
        settings = {"peft_type": fields.peft_type, "task_type": "CAUSAL_LM", **fields.settings()}
        (scratch / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return Manifest(
            source=source,
            revision=commit,
            source_sha256={file.name: sha256_of(file) for file in (config, weights)},
            template=template or PUBLISHED_PICKLES.get(source),
            versions={"torch": torch.__version__},
        )

    folder = out or imported_folder(source, revision)
    prepare(folder, build, replace=out is None)
    return folder


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file fails as KeyError, AttributeError, struct.error …
        first_line = str(error).strip().partition("\n")[0]
        raise UnsafeCheckpoint(
            f"a pickled adapter may hold tensors and nothing else, but {path} holds more or is torn ({first_line}). "
            "Do not open it otherwise; ask its publisher for safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(_plain(name, tensor) for name, tensor in tensors.items()):
        raise UnsafeCheckpoint(
            "a pickled adapter is a dict of tensors by name, each dense and of floating-point numbers, "
            f"but {path} is something else. Check the file."
        )
    # safetensors holds no two tensors that share memory
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _plain(name: object, tensor: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
    )
