"""How projections of units become a table of tiles: reduced, in eight bits, without repetitions.

Of activations whose patches look the same, only the strongest is shown: overlapping crops of one
photograph would otherwise fill a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.effective_field import EffectiveField
from deconvnet.visualization.projection.projection import Projection
from deconvnet.visualization.search.checkerboard import checkerboard
from deconvnet.visualization.search.near_duplicates import distinct
from deconvnet.visualization.search.tile_codec import encode_full
from deconvnet.visualization.search.top_projections import EMPTY, TopProjections

# Larger tiles are reduced to this side, in pixels.
LARGEST = 112
# And those that are kept in full size, to this one.
LARGEST_FULL = 384
# The share of the non-zero values of a tile that may exceed the range of its bytes.
CLIPPED = 1e-3


class RankedUnit(NamedTuple):
    """A unit (image, map, row, column), the row and rank of its projection in the result, and its
    rank in the table of activations."""

    row: int
    rank: int
    place: int
    unit: tuple[int, int, int, int]


class ProjectedUnits(NamedTuple):
    """Some units with their projections by method, and their windows (U, 4), tiles, patches and
    surroundings (U, h, w)."""

    units: list[RankedUnit]
    projections: dict[str, Projection]
    windows: Tensor
    tiles: dict[str, Tensor]
    patches: Tensor
    around: np.ndarray

    @property
    def first(self) -> Projection:
        """The projection by the method to show first."""
        return next(iter(self.projections.values()))


def empty_table(
    layer: str,
    maps: list[int],
    k: int,
    part: ProjectedUnits,
    effective: EffectiveField | None,
    full_size: bool,
) -> TopProjections:
    """Arrays for k projections of each map; part: some of them, for their size."""
    planes, *tile = next(iter(part.tiles.values())).shape[1:]
    size = _limited(tile, LARGEST)
    scale = min(1.0, LARGEST / max(tile))
    shape = (len(maps), k)
    rows = np.full((*shape, 4), -1, dtype=np.int64)
    numbers = np.full(shape, np.nan, dtype=np.float32)
    return TopProjections(
        layer,
        np.array(maps),
        units=rows,
        values=numbers,
        boxes=rows.copy(),
        windows=rows.copy(),
        border=np.zeros(shape, dtype=bool),
        tiles={method: np.zeros((*shape, planes, *size), dtype=np.int8) for method in part.tiles},
        patches=np.full((*shape, 3, *size), 128, dtype=np.uint8),
        checkerboard=numbers.copy(),
        scale=scale,
        effective=effective,
        reports={method: projection.report for method, projection in part.projections.items()},
        full={method: np.full(shape, b"", dtype=object) for method in part.tiles}
        if full_size and scale < 1
        else {},
        full_shape=_limited(tile, LARGEST_FULL),
    )


def fill_in(result: TopProjections, part: ProjectedUnits) -> None:
    """Write the projections of some units into the result."""
    size, first = result.patches.shape[3:], part.first
    pixels = 255 * _reduced(part.patches.float().cpu(), size)
    patches = pixels.round().clamp(0, 255).byte().numpy()
    tiles = {
        method: _as_bytes(_reduced(tile.float().cpu(), size)) for method, tile in part.tiles.items()
    }
    full = {
        method: _as_bytes(_reduced(part.tiles[method].float().cpu(), result.full_shape))
        for method in result.full
    }
    uneven = [overlap for overlap in first.report.uneven if all(overlap.period)]
    # Among several patterns, the finest is the most visible.
    boards = checkerboard(first.tiles(), uneven[-1].period) if uneven else None
    border = (first.boxes != first.fields).any(1)
    for index, ranked in enumerate(part.units):
        at = ranked.row, ranked.rank
        for method in tiles:
            result.tiles[method][at] = tiles[method][index]
        for method in full:
            result.full[method][at] = encode_full(full[method][index])
        result.patches[at] = patches[index]
        result.units[at] = ranked.unit
        result.boxes[at] = first.boxes[index].numpy()
        result.windows[at] = part.windows[index].numpy()
        result.border[at] = bool(border[index])
        result.values[at] = float(first.values[index])
        if boards is not None:
            result.checkerboard[at] = float(boards[index])


def _as_bytes(tiles: Tensor) -> np.ndarray:
    """Tiles (U, C, h, w) in int8: 127 is the magnitude that at most one in a thousand of the
    non-zero values of the tile exceeds."""
    parts = []
    for tile in tiles:
        magnitudes = tile[tile != 0].abs().sort().values
        last = math.ceil((1 - CLIPPED) * len(magnitudes)) - 1
        scale = magnitudes[last] if len(magnitudes) else tile.new_ones(())
        parts.append((127 * (tile / scale).clamp(-1, 1)).round().to(torch.int8))
    return torch.stack(parts).numpy()


def drop_repetitions(result: TopProjections, around: np.ndarray) -> None:
    """Drop activations whose patches look like that of a stronger one of the map; around: (M, k, h,
    w), their surroundings."""
    for row in range(len(result.maps)):
        count = result.count(row)
        kept = distinct(result.patches[row, :count], around[row, :count])
        if len(kept) == count:
            continue
        _keep(around[row], kept, 0)
        for name, value in EMPTY.items():
            _keep(getattr(result, name)[row], kept, value)
        for tiles in result.tiles.values():
            _keep(tiles[row], kept, 0)
        for pictures in result.full.values():
            _keep(pictures[row], kept, b"")


def _keep(array: np.ndarray, kept: list[int], empty: float | bytes) -> None:
    """Move the kept entries of an array (k, ...) to its front."""
    array[: len(kept)] = array[kept]
    array[len(kept) :] = empty


def _limited(size: Sequence[int], largest: int) -> tuple[int, int]:
    """Rows and columns, reduced so that the larger is at most `largest`."""
    scale = min(1.0, largest / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def _reduced(tiles: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tiles.shape[2:]) == tuple(size):
        return tiles
    return F.interpolate(tiles, size, mode="bilinear", antialias=True)
