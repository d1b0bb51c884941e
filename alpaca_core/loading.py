"""The door to a model: from a recipe to a loaded `LanguageModel`, and what has to be done once before.

torch is imported when a model is loaded into this process, not when this module is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alpaca_core.engines.opening import open_model
from alpaca_core.errors import brief
from alpaca_core.host.launcher import at_host, chosen
from alpaca_core.model import LanguageModel
from alpaca_core.spec import ModelSpec, TemplateName, check_kind


@contextmanager
def load_model(spec: ModelSpec | None = None) -> Iterator[LanguageModel]:
    """Load a model into this process, or use the one that a host keeps warm.

    ``ALPACA_HOST`` says which: ``off`` is this process, ``auto`` this machine's host, which is started where none
    runs, and a URL another host. Unset, a deployment's runs use the host and all else loads here. Memory in this
    process is freed at the end of the block.

    Weights are read from safetensors alone, by their digest, and no code of a repository is run. The
    embedded model is unpacked once, into the cache; that takes about half a minute.

    Args:
        spec: The recipe; None is the embedded model.

    Raises:
        InvalidRequest: For a name or JSON in place of a recipe.
        ModelNotFound: If there is no such model or adapter, or the hub cannot be reached.
        DeviceUnavailable: If the device is not on this machine.
        EngineUnavailable: If vLLM is asked for, and not installed.
        NotEnoughMemory: If the weights do not fit into the spec's share of the memory.
        UnsafeCheckpoint: If only a pickle is there, or code would have to be run.
        InvalidCheckpoint: If tensors are missing, unexpected, misshapen or not finite, or the model
            is no LLaMA-like decoder.
        DigestMismatch: If bytes have changed since they were prepared.
        InvalidAdapter: If an adapter was made for another base, or changes nothing.
        HostUnavailable: If the host cannot be reached or started.

    Example:
        >>> with load_model(ModelSpec()) as model:
        ...     model.info.context_length
        8192
    """
    spec = _checked(spec)
    where = chosen()
    with open_model(spec) if where == "off" else at_host(spec, where) as model:
        yield model


def verify_checkpoint(spec: ModelSpec | None = None) -> dict[str, str]:
    """Hash every file of a spec's base model and adapters again, and compare with what is known of them.

    Args:
        spec: The recipe; None is the embedded model.

    Returns:
        The digest of each source, by the name that the spec gives it.

    Raises:
        InvalidRequest: For a name or JSON in place of a recipe.
        DigestMismatch: If bytes have changed without being written anew.
        LoadError: As `load_model`, as far as files go.
    """
    from alpaca_core.engines.weights import find

    base, adapters = find(_checked(spec), again=True)
    return {base.name: base.digest} | {adapter.info.source: adapter.info.digest for adapter in adapters}


def import_adapter(
    source: str | Path,
    *,
    template: TemplateName | None = None,
    revision: str | None = None,
    out: Path | None = None,
) -> Path:
    """Convert an adapter that is published as a pickle to safetensors, once and without running its code.

    Args:
        source: Folder or file of an ``adapter_model.bin``, or a hub repository, of which that file and
            ``adapter_config.json`` alone are fetched.
        template: Prompt template that the adapter was trained with; known ones need none.
        revision: Commit of the hub repository.
        out: New folder for the result. None is the cache, where the loader finds it by `source`.

    Returns:
        The folder of the converted adapter, with a sidecar ``alpaca.json`` that holds where it came from.

    Raises:
        ModelNotFound: If there is no pickled adapter at `source`.
        UnsafeCheckpoint: If the pickle holds anything but tensors.
        InvalidAdapter: If it is no plain LoRA.
        InvalidRequest: If there is nothing to import, or `out` exists.
    """
    from alpaca_core.engines.pickles import convert_adapter

    return convert_adapter(str(source), template, revision, out)


def _checked(spec: ModelSpec | None) -> ModelSpec:
    if spec is None:
        return ModelSpec()
    named = f"base_model={brief(spec, 60)}" if isinstance(spec, str) else "base_model=…"
    return check_kind("spec", spec, ModelSpec, f"Write ModelSpec({named}).")
