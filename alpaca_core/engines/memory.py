"""The key-value cache of a model, its pages, and how large it may get."""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from alpaca_core.engines.llama import Llama
from alpaca_core.engines.packing import TILE
from alpaca_core.engines.pages import Pages
from alpaca_core.errors import NotEnoughMemory

_SHARE = 0.8
"""Of the memory that is free when the first row comes, what the cache may take in the end."""


class Memory:
    """Takes memory for pages as rows come, up to a share of what is free.

    Args:
        llama: Whose keys and values are kept.

    Attributes:
        cache: As `Llama.new_cache` makes it.
        version: Counts the times that `cache` became another tensor.
    """

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.pages = Pages(1)
        self.cache: Tensor = llama.new_cache(1)
        self.version = 0
        self._limit: int | None = None

    def take(self, adapter: int, prompt: Sequence[int], size: int) -> tuple[list[int], int] | None:
        """Take the pages of a row, as `Pages.take` does; None where rows have to end first.

        Raises:
            NotEnoughMemory: If no row holds a page, and the memory is too small for this one.
        """
        taken = self.pages.take(str(adapter), prompt, size)
        if taken is None and self._grow(self.pages.count + -(-size // TILE)):
            taken = self.pages.take(str(adapter), prompt, size)
        if taken is None and not self.pages.in_use:
            raise NotEnoughMemory(
                f"a row of {size:,} tokens, those of all beams counted, needs more memory for keys and values than "
                f"{self._llama.device} has left. Lower max_new_tokens or num_beams, shorten the prompt, or load the "
                "model in fewer bits."
            )
        return taken

    def expect(self, sizes: Sequence[int]) -> None:
        """Make room for rows of these numbers of tokens at once, where nothing has to be copied for it."""
        wanted = 1 + sum(-(-size // TILE) for size in sizes)
        if not self.pages.in_use and wanted > self.pages.count:
            self._grow(wanted)

    def release(self, pages: Sequence[int], *, spoilt: bool = False) -> None:
        """Give a row's pages back; those of a row that was not finite are wiped, since a mask does not stop NaN."""
        left = self.pages.release(pages, spoilt=spoilt)
        if spoilt and left:
            self.cache[:, :, torch.tensor(left, device=self._llama.device)] = 0

    def close(self) -> None:
        """Give the memory back."""
        self.cache = self.cache[:, :, :0].clone()

    def _grow(self, least: int) -> bool:
        if self._limit is None:
            self._limit = self._most()
        count = min(self._limit, max(least, self.pages.count * 3 // 2))
        if count <= self.pages.count:
            return False
        try:
            if self.pages.in_use:
                larger = self._llama.new_cache(count)
                larger[:, :, : self.pages.count] = self.cache
            else:  # there is nothing to copy, so the memory is not needed twice
                self.pages.forget()
                self.cache = self.cache[:, :, :0].clone()
                larger = self._llama.new_cache(count)
        except (torch.OutOfMemoryError, MemoryError):
            self._limit = self.pages.count
            if not self.pages.in_use:
                self.cache = self._llama.new_cache(self.pages.count)
            return False
        self.cache = larger
        self.pages.add(count)
        self.version += 1
        return True

    def _most(self) -> int:
        """Pages that fit into the share."""
        if self._llama.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._llama.device)
        else:
            free = psutil.virtual_memory().available
        return int(_SHARE * free / (self.cache.numel() * self.cache.element_size()))
