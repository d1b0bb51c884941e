"""The adapters beside a host's base, which clients bring and take away again: by their bytes, and where those lie."""

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from alpaca_core.adapters import Adapter, find_adapters
from alpaca_core.errors import InvalidAdapter, InvalidRequest, LoadError
from alpaca_core.spec import ModelSpec, NamedAdapter

_WHILE = 600.0
"""Seconds that adapters are refused of which an engine died, or for which there was no memory: that may change."""


class Beside:
    """Which adapters the engine has beside its base, and which it is not given again.

    An adapter leaves at the next load of the engine if no row that is still out names it, and neither a row nor a
    client that loads its model has named it for `stay` seconds: those of last night do not pile up. Whoever names it
    later has it loaded again.

    Args:
        spec: With those that are there at first.
        stay: As long as a host stays that nobody uses; None keeps them for ever.

    Attributes:
        here: Those of the engine, or of the one that is loaded next, by their digests.
    """

    def __init__(self, spec: ModelSpec, stay: float | None) -> None:
        self.here = by_digest(spec, find_adapters(spec))
        self._stay = math.inf if stay is None else stay
        self._named: dict[str | None, float] = {}  # when, by `time.monotonic`
        self._refused: dict[frozenset[str], tuple[LoadError, float]] = {}  # and until when
        self.name(self.names)

    @property
    def names(self) -> set[str]:
        """What rows call them."""
        return {adapter.name for adapter in self.here.values()}

    def name(self, names: Iterable[str | None]) -> None:
        """Note that somebody names them, now."""
        self._named.update(dict.fromkeys(names, time.monotonic()))

    def missing(self, wanted: Mapping[str, NamedAdapter], out: Collection[str | None]) -> dict[str, NamedAdapter]:
        """Give those that the engine has to be loaded again for.

        Args:
            wanted: By their digests.
            out: Names that rows which are still out have said.

        Raises:
            LoadError: If they have been refused, alone or together with the others that would stay.
        """
        together = {*self._staying(self.here, out), *wanted}
        for digests, (error, until) in self._refused.items():
            if digests <= together and time.monotonic() < until:
                raise error
        return {digest: adapter for digest, adapter in wanted.items() if digest not in self.here}

    def add(self, missing: Mapping[str, NamedAdapter]) -> None:
        """Have some more at the next load."""
        self.here = {**self.here, **missing}
        self.name(adapter.name for adapter in missing.values())

    def tidy(self, there: Mapping[str, NamedAdapter], out: Collection[str | None]) -> None:
        """Before a load, leave out what is not `there` any more (`still_there`), and what nobody has named for long."""
        self.here = self._staying(there, out)

    def refuse(self, missing: Collection[str], error: LoadError) -> None:
        """Note what came of the attempt to load some digests beside the others that are here.

        Adapters that are wrong stay wrong. What else there was may have been too little memory for all together.
        """
        if isinstance(error, InvalidAdapter):
            self._refused[frozenset(missing)] = error, math.inf
        else:
            self._refused[frozenset({*self.here, *missing})] = error, time.monotonic() + _WHILE

    def _staying(self, adapters: Mapping[str, NamedAdapter], out: Collection[str | None]) -> dict[str, NamedAdapter]:
        since = time.monotonic() - self._stay
        return {
            digest: adapter
            for digest, adapter in adapters.items()
            if adapter.name in out or self._named[adapter.name] > since
        }


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


def check_known(asked: ModelSpec, own: ModelSpec) -> None:
    """Refuse what a host of the network was not started with, before any of it is looked for or fetched.

    Raises:
        InvalidRequest: With what it was started with.
    """
    theirs, mine = _sources(asked), _sources(own)
    if theirs[0] != mine[0] or not set(theirs) <= set(mine):
        told = ", ".join(repr(source) for source, _ in mine)
        strange = ", ".join(f"{source!r:.100}" for source, _ in theirs if (source, _) not in mine) or repr(theirs[0])
        raise InvalidRequest(
            f"this host serves what it was started with ({told}), under those names and revisions, but the spec "
            f"means {strange}. Ask for the former."
        )


def _sources(spec: ModelSpec) -> list[tuple[str, str | None]]:
    """What a spec names, each with its revision, the base first."""
    own = [(spec.adapter, spec.adapter_revision)] if spec.adapter else []
    named = [(adapter.source, adapter.revision) for adapter in spec.adapters]
    return [(spec.base_model, spec.revision), *own, *named]


def _digest_of(adapter: NamedAdapter) -> str | None:
    try:
        return find_adapters(ModelSpec(adapters=(adapter,)))[0].info.digest
    except LoadError:
        return None
