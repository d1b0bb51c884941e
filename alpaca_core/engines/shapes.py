"""How many tokens and rows a pass computes: on a GPU always the same numbers, since others change last bits."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from alpaca_core.engines.packing import TILE, Packed, Tile, pack

_Item = TypeVar("_Item")
_SIXTEEN = 16
_LEAST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of passes.

    Args:
        slots: Rows that a decode step computes.
        tokens: Tokens that a pass over tiles reads at most.
        fixed: Whether passes are filled up to these numbers. If not, they are to a multiple of 16, with which
            a row has the same bits for any number: `Llama.steady`.
    """

    slots: int
    tokens: int
    fixed: bool

    @property
    def smaller(self) -> "Shape | None":
        """The next smaller shape: half the slots and half the tokens, down to 1 and 64; None at the end.

        The tokens stay a multiple of 32. What comes after a shape depends on that shape alone.

        Example:
            >>> Shape(4, 200, fixed=True).smaller
            Shape(slots=2, tokens=96, fixed=True)
            >>> Shape(1, 64, fixed=True).smaller is None
            True
        """
        slots, tokens = max(1, self.slots // 2), max(_LEAST_TOKENS, self.tokens // 2 // TILE * TILE)
        if slots >= self.slots and tokens >= self.tokens:
            return None
        return Shape(slots, min(tokens, self.tokens), self.fixed)

    @property
    def name(self) -> str:
        """What results call this shape, such as ``256x4096``; empty where their bits do not depend on it."""
        return f"{self.slots}x{self.tokens}" if self.fixed else ""

    @property
    def most_ends(self) -> int:
        """Tiles of a pass of which the last tokens' states are wanted."""
        return self.tokens // _SIXTEEN

    def passes(self, items: Iterable[tuple[Tile, _Item]]) -> Iterator[list[tuple[Tile, _Item]]]:
        """Fill one pass after the other, in the order given."""
        batch: list[tuple[Tile, _Item]] = []
        room = self.tokens
        for tile, item in items:
            if len(tile.ids) > room or len(batch) == self.most_ends:
                yield batch
                batch, room = [], self.tokens
            batch.append((tile, item))
            room -= len(tile.ids)
        if batch:
            yield batch

    def pack(self, tiles: Sequence[Tile], device: torch.device) -> Packed:
        """Put the tiles of a pass side by side, filled up as this shape says."""
        if self.fixed:
            return pack(tiles, self.tokens, self.most_ends, device)
        return pack(tiles, self.padded(sum(len(tile.ids) for tile in tiles)), self.padded(len(tiles)), device)

    def padded(self, count: int) -> int:
        """Fill a number up to a multiple of 16."""
        return -(-count // _SIXTEEN) * _SIXTEEN
