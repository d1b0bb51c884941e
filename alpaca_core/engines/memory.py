"""The key-value cache of a model, its pages, and how large it may get."""

from collections.abc import Sequence

import torch
from torch import Tensor

from alpaca_core.engines.llama import Llama
from alpaca_core.engines.packing import PAGE
from alpaca_core.engines.pages import Pages
from alpaca_core.engines.recovering import ran_out, too_large
from alpaca_core.engines.sharing import room

_SHARE = 0.8
"""Of the room that is left when the first row comes, what the cache may take in the end; passes take the rest."""


class Memory:
    """Takes memory for pages as rows come, up to a share of what is left beside the weights.

    Args:
        llama: Whose keys and values are kept.
        share: Of the device's memory, what weights, cache and passes may take together.

    Attributes:
        cache: As `Llama.new_cache` makes it.
        version: Counts the times that `cache` became another tensor.
    """

    def __init__(self, llama: Llama, share: float) -> None:
        self._llama, self._share = llama, share
        self.pages = Pages(1)
        self.cache: Tensor = llama.new_cache(1)
        self.version = 0
        self._first: object = None  # who gets pages before all others
        self._limit: int | None = None
        self._crowded = False  # there was no memory for a second cache beside this one

    def take(
        self, who: object, adapter: int, prompt: Sequence[int], size: int, kept: int | None = None
    ) -> tuple[list[int], int] | None:
        """Take the pages of a row, as `Pages.take` does; None where rows have to end first, or somebody else is first.

        Raises:
            RowRejected: If the memory is too small for this row, however few others there are.
        """
        if self._first not in (None, who):
            return None
        needed = -(-size // PAGE)
        taken = self.pages.take(str(adapter), prompt, size, kept)
        if taken is None and self._grow(self.pages.count + needed, 1 + needed):
            taken = self.pages.take(str(adapter), prompt, size, kept)
        short = taken is None and (needed >= self._most() or not self.pages.in_use)
        if taken is not None or short:
            self._first = None
        if short:
            raise too_large(size, self._llama.device)
        return taken

    def wait(self, who: object, *, started: bool) -> None:
        """Let nobody else take pages before `who`, unless rows of his have started, or somebody else is first.

        Otherwise those whose rows are small would take each page that comes free, and a large one would wait for ever.
        """
        if self._first is None and not started:
            self._first = who

    def leave(self, who: object) -> None:
        """Let others take pages: `who` needs none now."""
        if self._first is who:
            self._first = None

    def expect(self, sizes: Sequence[int]) -> None:
        """Make room for rows of these numbers of tokens at once, where nothing has to be copied for it."""
        wanted = 1 + sum(-(-size // PAGE) for size in sizes)
        if not self.pages.in_use and wanted > self.pages.count:
            self._grow(wanted, wanted)

    def release(self, pages: Sequence[int], *, spoilt: bool = False) -> None:
        """Give a row's pages back; those of a row that was not finite are wiped, since a mask does not stop NaN."""
        left = self.pages.release(pages, spoilt=spoilt)
        if spoilt and left:
            self.cache[:, :, torch.tensor(left, device=self._llama.device)] = 0

    def forget(self) -> None:
        """Forget what earlier prompts left, and where no row holds a page give the memory back, too."""
        self.pages.forget()
        self._limit = None  # what is left may be another amount by now
        if not self.pages.in_use:
            self.pages = Pages(1)
            self.cache = self.cache[:, :, :1].clone()
            self.version += 1

    def close(self) -> None:
        """Give the memory back."""
        self.cache = self.cache[:, :, :0].clone()

    def _grow(self, wanted: int, least: int) -> bool:
        """Get more pages: `wanted` or half as many again, or else `least`, and no more than there may be."""
        held = self.pages.in_use
        counts = [min(count, self._most()) for count in (max(wanted, self.pages.count * 3 // 2), least)]
        counts = [count for count in counts if count > self.pages.count]
        if not counts or (held and self._crowded):
            return False
        if not held:  # there is nothing to copy, so the memory is not needed twice
            self.pages.forget()
            self.cache = self.cache[:, :, :0].clone()
        larger = next((cache for count in counts if (cache := self._made(count)) is not None), None)
        self._crowded = held and larger is None
        if larger is not None and held:
            larger[:, :, : self.pages.count] = self.cache
        elif larger is None and not held:
            again = self._made(self.pages.count)
            if again is None:  # somebody else has taken the memory
                self.pages, again = Pages(1), self._llama.new_cache(1)
            self.cache = again
            self.version += 1
        if larger is None:
            return False
        self.cache = larger
        self.pages.add(larger.shape[2])
        self.version += 1
        return True

    def _made(self, pages: int) -> Tensor | None:
        """A new cache; None where memory runs out."""
        try:
            return self._llama.new_cache(pages)
        except Exception as error:
            if not ran_out(error):
                raise
            return None

    def _most(self) -> int:
        """Pages that fit into the share, and that kernels can count."""
        if self._limit is None:
            left = room(self._llama.device, self._share) + self.pages.count * self._llama.page_bytes
            self._limit = max(1, min(int(_SHARE * left / self._llama.page_bytes), self._llama.most_pages))
        return self._limit
