"""Tiles side by side in one picture: how a page finds one of them, and how they are taken apart.

Tiles are bytes (h, w, 3). All cells have the size of the largest tile, with gaps between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Between two cells, in pixels, and its grey, which is the zero of signed tiles.
GAP = 2
GREY = 128


def sheet_columns(count: int, h: int, w: int) -> int:
    """The columns of a sheet of `count` cells: few tiles are one row, many fill a square."""
    return count if count <= 10 else math.ceil(math.sqrt(count * h / w))


def to_sheet(tiles: Sequence[np.ndarray | None]) -> np.ndarray:
    """(H, W, 3): tiles in rows; smaller ones are centred in their cells, None leaves one empty."""
    present = [tile for tile in tiles if tile is not None]
    h, w = (max(tile.shape[axis] for tile in present) for axis in (0, 1))
    columns = sheet_columns(len(tiles), h, w)
    rows = -(-len(tiles) // columns)
    page = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), GREY, np.uint8)
    for number, tile in enumerate(tiles):
        if tile is None:
            continue
        th, tw = tile.shape[:2]
        top = number // columns * (h + GAP) + (h - th) // 2
        left = number % columns * (w + GAP) + (w - tw) // 2
        page[top : top + th, left : left + tw] = tile
    return page


def from_sheet(page: np.ndarray, count: int, h: int, w: int) -> np.ndarray:
    """(count, h, w, 3): the tiles of a sheet (H, W, 3); ValueError if it has another size."""
    columns = sheet_columns(count, h, w)
    rows = -(-count // columns)
    size = rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3
    if page.shape != size:
        raise ValueError(f"sheet of shape {page.shape} in place of {size}")
    cells = np.pad(page, [(0, GAP), (0, GAP), (0, 0)])
    cells = cells.reshape(rows, h + GAP, columns, w + GAP, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * columns, h + GAP, w + GAP, 3)[:count, :h, :w]
