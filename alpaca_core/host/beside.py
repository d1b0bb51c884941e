"""The adapters beside a host's base, which clients bring and take away again: by their bytes, and where those lie."""

from collections.abc import Mapping, Sequence

from alpaca_core.adapters import Adapter, find_adapters
from alpaca_core.errors import LoadError
from alpaca_core.spec import ModelSpec, NamedAdapter


def by_digest(spec: ModelSpec, adapters: Sequence[Adapter]) -> dict[str, NamedAdapter]:
    """Name a spec's adapters by their bytes, since those of two specs may share an engine."""
    own = [spec.adapter_revision] if spec.adapter else []
    revisions = [*own, *(adapter.revision for adapter in spec.adapters)]
    return {
        found.info.digest: NamedAdapter(name=found.info.digest[:32], source=found.info.source, revision=revision)
        for found, revision in zip(adapters, revisions, strict=True)
    }


def still_there(adapters: Mapping[str, NamedAdapter]) -> dict[str, NamedAdapter]:
    """Keep the adapters whose bytes still lie where they were found: a folder may be trained into again, or removed."""
    return {digest: adapter for digest, adapter in adapters.items() if _digest_of(adapter) == digest}


def _digest_of(adapter: NamedAdapter) -> str | None:
    try:
        return find_adapters(ModelSpec(adapters=(adapter,)))[0].info.digest
    except LoadError:
        return None
