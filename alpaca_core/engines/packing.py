"""Tokens of many rows as one flat list, in tiles: what one forward pass reads.

A tile has 32 lanes for tokens of one row. They see the row's tokens before the tile, which lie in pages, and
those of the tile itself that a bit mask names: all up to themselves in a prompt, their ancestors in a
trie (tree attention, SpecInfer, arXiv 2305.09781, section 4.2). Tiles of a prompt start at multiples of 32, and
a token's lane follows from its place; where pages hold the first half of a tile already, only the lanes of the
second half are computed. So a token is computed from the same operands in the same order wherever its tile lies,
whatever lies beside it, and whoever computed the pages before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpaca_core.model import Trie

TILE = 32
"""Lanes of a tile."""
PAGE = 16
"""Tokens of a page, half a tile: the unit in which rows share what they have in common."""

_ALIGNED = 64
"""Numbers of 32 bits in 256 bytes."""

_CAUSAL = tuple((2 << lane) - 1 for lane in range(TILE))
_ALONE = tuple(1 << lane for lane in range(TILE))


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens of one row that are read together.

    Args:
        ids: Tokens, 1 to 32; from `lane` on they fill the tile at most.
        positions: Their places in the text that they see.
        sees: For each token the tokens of the tile that it sees, itself among them, as bits.
        pages: Pages of the row, of which the first `context` tokens are seen by all.
        context: Tokens before the tile.
        adapter: Number of the row's adapter; -1 is the bare base.
        stored: Whether keys and values are kept, in the pages after the context's.
        lane: That of the first token: 0, or 16 where the page after the context holds the lanes before.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    sees: Sequence[int]
    pages: Sequence[int]
    context: int
    adapter: int = -1
    stored: bool = True
    lane: int = 0


def prompt_tiles(ids: Sequence[int], pages: Sequence[int], first: int, adapter: int) -> Iterator[Tile]:
    """Cut the tokens from `first` on, a multiple of 16, into tiles of plain text."""
    for context in range(first // TILE * TILE, len(ids), TILE):
        start = max(first, context)
        part = ids[start : context + TILE]
        lane = start - context
        positions = range(start, start + len(part))
        yield Tile(part, positions, _CAUSAL[lane : lane + len(part)], pages, context, adapter, lane=lane)


def trie_tiles(trie: Trie, pages: Sequence[int], prompt: int, adapter: int) -> Iterator[tuple[Tile, list[int]]]:
    """Cut the inner nodes of a trie whose paths are at most 32 tokens long into tiles, ancestors repeated.

    Args:
        trie: Continuations of one prompt.
        pages: Of the prompt.
        prompt: Its tokens.
        adapter: The row's.

    Yields:
        A tile, and the node that each of its tokens is.
    """
    depths = trie.depths()
    lanes: dict[int, int] = {}
    masks: list[int] = []

    def tile() -> tuple[Tile, list[int]]:
        nodes = list(lanes)
        positions = [prompt - 1 + depths[node] for node in nodes]
        return Tile([trie.tokens[node] for node in nodes], positions, masks, pages, prompt, adapter, False), nodes

    for node in sorted(set(trie.parents) - {-1}):
        path = trie.path(node)
        if sum(each not in lanes for each in path) > TILE - len(lanes):
            yield tile()
            lanes, masks = {}, []
        for each in path:
            if each not in lanes:
                above = masks[lanes[trie.parents[each]]] if trie.parents[each] >= 0 else 0
                masks.append(above | 1 << len(lanes))
                lanes[each] = len(lanes)
    if lanes:
        yield tile()


def text_tiles(
    ids: Sequence[int], pages: Sequence[int], prompt: int, path: Sequence[int], adapter: int
) -> Iterator[tuple[Tile, list[int]]]:
    """Cut a prompt and one path of its trie, however long, into tiles of plain text, from the prompt's last page on.

    Args:
        ids: Tokens of both.
        pages: Of both.
        prompt: Tokens of the prompt.
        path: The trie's nodes that the tokens behind the prompt are.
        adapter: The row's.

    Yields:
        A tile, and the node that each of its last tokens is.
    """
    for tile in prompt_tiles(ids, pages, prompt // PAGE * PAGE, adapter):
        first = tile.positions[0]
        yield tile, list(path[max(0, first - prompt) : max(0, first + len(tile.ids) - prompt)])


@dataclass(frozen=True, slots=True)
class Packed:
    """Tiles as tensors: ``N`` tokens, spare ones at the end, and ``n`` tiles.

    `places` says where a token's keys and values go, page * 16 + offset; page 0 is read by nobody.
    `ends` are the last tokens of the tiles. `table` holds the pages of each tile's context, and behind them
    those of the tile itself where its first lane is not 0.
    """

    ids: Tensor  # N
    positions: Tensor  # N
    places: Tensor  # N
    adapters: Tensor  # N
    starts: Tensor  # n
    counts: Tensor  # n
    lanes: Tensor  # n, the first of each tile
    contexts: Tensor  # n
    sees: Tensor  # n, TILE
    table: Tensor  # n, most pages that a tile sees
    ends: Tensor  # n, padded to `most_ends`
    depths: tuple[int, ...]  # pages that each tile sees, on the host


def pack(tiles: Sequence[Tile], size: int, most_ends: int, device: torch.device) -> Packed:
    """Put tiles side by side.

    Args:
        tiles: At most `size` tokens in all.
        size: Tokens of the pass; what is left is filled up with token 0.
        most_ends: Length of `ends`; spare ones name token 0.
        device: Of the tensors.
    """
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    adapters: list[int] = []
    starts = []
    for tile in tiles:
        starts.append(len(ids))
        ids += tile.ids
        positions += tile.positions
        adapters += [tile.adapter] * len(tile.ids)
        if tile.stored:
            places += [tile.pages[place // PAGE] * PAGE + place % PAGE for place in tile.positions]
        else:
            places += [0] * len(tile.ids)
    for column, spare in ((ids, 0), (positions, 0), (places, 0), (adapters, -1)):
        column += [spare] * (size - len(column))
    depths = tuple(-(-(tile.context + (TILE if tile.lane else 0)) // PAGE) for tile in tiles)
    width = max(1, *depths)

    def table(tile: Tile, depth: int) -> list[int]:
        # a spare entry repeats a page of the row's own: a mask does not stop another row's NaN
        own = list(tile.pages[: max(1, depth)])
        return [*own, *own[-1:] * (width - len(own))]

    def sees(tile: Tile) -> list[int]:
        return [*_ALONE[: tile.lane], *tile.sees, *_ALONE[tile.lane + len(tile.sees) :]]

    ends = [start + len(tile.ids) - 1 for start, tile in zip(starts, tiles, strict=True)]
    tables = {
        "ids": ids,
        "positions": positions,
        "places": places,
        "adapters": adapters,
        "starts": starts,
        "counts": [len(tile.ids) for tile in tiles],
        "lanes": [tile.lane for tile in tiles],
        "contexts": [tile.context for tile in tiles],
        "sees": [sees(tile) for tile in tiles],
        "table": [table(tile, depth) for tile, depth in zip(tiles, depths, strict=True)],
        "ends": [*ends, *[0] * (most_ends - len(ends))],
    }
    there = dict(zip(tables, _moved([numpy.array(each) for each in tables.values()], device), strict=True))
    for name in ("ids", "adapters", "ends"):
        there[name] = there[name].long()
    return Packed(**there, depths=depths)


def _moved(tables: Sequence[NDArray[numpy.int64]], device: torch.device) -> list[Tensor]:
    """Tables of 32 bits on the device, by one copy: each would take a gap between two passes of a GPU.

    Each begins at a multiple of 256 bytes, as if it were a tensor of its own.
    """
    firsts = [0, *accumulate(-(-table.size // _ALIGNED) * _ALIGNED for table in tables)]
    whole = torch.empty(firsts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    host = whole.numpy()
    for first, table in zip(firsts, tables, strict=False):
        host[first : first + table.size] = table.astype(numpy.int32).ravel()  # masks of 32 bits wrap
    there = whole.to(device, non_blocking=True)
    return [there[first : first + table.size].view(table.shape) for first, table in zip(firsts, tables, strict=False)]
