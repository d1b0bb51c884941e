"""How many tokens and rows a pass computes: numbers that give a row the same bits, found by trying."""

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
        fixed: Whether a row's bits depend on these numbers, as on a GPU; a decode step has all its slots then.
        grain: Passes over tiles are filled up to a multiple of this: a row has the same bits for each (`Llama.steady`).
        steps: So are decode steps that are not `fixed`.
    """

    slots: int
    tokens: int
    fixed: bool
    grain: int = _SIXTEEN
    steps: int = _SIXTEEN

    @property
    def smaller(self) -> "Shape | None":
        """The next smaller shape: half the slots and half the tokens, down to 1 and 64; None at the end.

        The tokens stay a multiple of 32. What comes after a shape depends on that shape alone.

        Example:
            >>> Shape(4, 200, fixed=True, grain=200).smaller
            Shape(slots=2, tokens=96, fixed=True, grain=96, steps=16)
            >>> Shape(1, 64, fixed=True, grain=64).smaller is None
            True
        """
        slots, tokens = max(1, self.slots // 2), max(_LEAST_TOKENS, self.tokens // 2 // TILE * TILE)
        if slots >= self.slots and tokens >= self.tokens:
            return None
        tokens = min(tokens, self.tokens)
        return Shape(slots, tokens, self.fixed, tokens if tokens % self.grain else self.grain, self.steps)

    @property
    def name(self) -> str:
        """What results call this shape, such as ``256x4096``; empty where their bits do not depend on it."""
        return f"{self.slots}x{self.tokens}" if self.fixed else ""

    @property
    def lanes(self) -> int:
        """Rows that a full decode step computes, spare ones among them."""
        return self.step(self.slots)

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
        size = min(self.tokens, self.padded(sum(len(tile.ids) for tile in tiles)))
        return pack(tiles, size, self.most_ends if self.fixed else self.padded(len(tiles)), device)

    def step(self, count: int) -> int:
        """Lanes of a decode step of some rows."""
        return self.slots if self.fixed else -(-count // self.steps) * self.steps

    def padded(self, count: int) -> int:
        """Fill a number up to a multiple of the grain."""
        return -(-count // self.grain) * self.grain
