"""Which page of the key-value cache holds what: prompts that begin alike share pages, within a call and across calls.

A page holds 16 tokens of one text, at a multiple of 16 from its beginning, and its contents are a
function of that beginning alone. So a full page of a prompt is kept under the digest of all tokens up to
its end, and whoever comes with the same beginning reads it instead of computing it (the prefix cache of
vLLM, arXiv 2309.06180, section 4.4; here a hit changes no bit of a result).
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from alpaca_core.engines.packing import PAGE


class Pages:
    """Hands out pages, and knows those of earlier prompts.

    Page 0 is never handed out: it takes what is computed for nobody.

    Args:
        count: Pages there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, 0, -1))
        self._users: dict[int, int] = {}  # page -> rows that hold it
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that no row holds, oldest first

    @property
    def available(self) -> int:
        """Pages that could be handed out now."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> bool:
        """Whether a row holds a page."""
        return bool(self._users)

    def add(self, count: int) -> None:
        """Hand out page numbers up to `count` from now on."""
        self._free[:0] = range(count - 1, self.count - 1, -1)
        self.count = count

    def known(self, root: str, prompt: Sequence[int]) -> int:
        """Count the tokens of a prompt that pages hold already."""
        count = 0
        for key in self._keys_of(root, prompt[: len(prompt) - 1]):
            if key not in self._by_key:
                break
            count += PAGE
        return count

    def take(
        self, root: str, prompt: Sequence[int], size: int, kept: int | None = None
    ) -> tuple[list[int], int] | None:
        """Take the pages of a row: known ones for its beginning, others for the rest.

        Args:
            root: What else the contents depend on: the adapter.
            prompt: The row's prompt. Its last token is always left to be computed.
            size: Tokens that the row will hold at most.
            kept: Tokens of the prompt that others may find, once it has been read; None are all. The caller reads
                them before anyone else can take pages.

        Returns:
            Pages, and how many tokens of the prompt they hold already; None where too few are left.
        """
        keys = list(self._keys_of(root, prompt))
        known = [self._by_key[key] for key in keys[: self.known(root, prompt) // PAGE]]
        for page in known:
            self._hold(page)
        fresh = -(-size // PAGE) - len(known)
        if fresh > self.available:
            self.release(known)
            return None
        pages = known + [self._new() for _ in range(fresh)]
        for key, page in zip(keys[: None if kept is None else kept // PAGE], pages, strict=False):
            if key not in self._by_key:
                self._by_key[key], self._keys[page] = page, key
        return pages, len(known) * PAGE

    def release(self, pages: Sequence[int], *, spoilt: bool = False) -> list[int]:
        """Give pages back; return those that no other row holds.

        With `spoilt` these are forgotten, since nothing good can come of their contents. What another row holds
        is as good as that row.
        """
        left = []
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                left.append(page)
                if spoilt:
                    self._forget(page)
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        return left

    def forget(self) -> None:
        """Forget all beginnings, since a pass that should have written some of them failed."""
        for page in list(self._keys):
            self._forget(page)
        self._free += self._idle
        self._idle.clear()

    def _forget(self, page: int) -> None:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._by_key[key]

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._users[page] = self._users.get(page, 0) + 1

    def _new(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    @staticmethod
    def _keys_of(root: str, prompt: Sequence[int]) -> Iterator[bytes]:
        """The digest of each beginning that fills a page."""
        digest = hashlib.sha256(root.encode()).digest()
        for first in range(0, len(prompt) // PAGE * PAGE, PAGE):
            page = struct.pack(f"<{PAGE}I", *prompt[first : first + PAGE])
            digest = hashlib.sha256(digest + page).digest()
            yield digest
