"""How projections of units become a table of tiles: in eight bits, reduced, without repetitions.

Of activations whose patches look the same, only the strongest is shown: overlapping crops of one
photograph would otherwise fill a map. Projections in full size are collected as pictures with
hardly any loss, until all of a map can be put into one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from deconvnet.monitoring.picture_files import WEBP_LARGEST
from deconvnet.visualization.projection.effective_field import EffectiveField
from deconvnet.visualization.projection.projection import Projection
from deconvnet.visualization.search.checkerboard import averaged, averaged_period, checkerboard
from deconvnet.visualization.search.near_duplicates import distinct
from deconvnet.visualization.search.tile_codec import (
    decode_signed,
    encode_passing,
    encode_signed,
    is_picture,
    reduced,
    to_bytes,
)
from deconvnet.visualization.search.top_projections import EMPTY, TopProjections

# Larger tiles are reduced to this side, in pixels.
LARGEST = 112
# And those that are kept in full size, to this one.
LARGEST_FULL = 384


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


@dataclass(frozen=True)
class Table:
    """Projections of a layer, to be filled in.

    full: by method, (M, k) pictures of the projections in full size, (h, w) = full_shape; none if
    the tiles are as large.
    """

    result: TopProjections
    full: dict[str, np.ndarray]
    full_shape: tuple[int, int]

    def count(self, row: int) -> int:
        return self.result.count(row)


def empty_table(
    layer: str,
    maps: list[int],
    k: int,
    part: ProjectedUnits,
    effective: EffectiveField | None,
    full_size: bool,
) -> Table:
    """Arrays for k projections of each map; part: some of them, for their size."""
    planes, *window = next(iter(part.tiles.values())).shape[1:]
    size = _limited(window, LARGEST)
    shape = (len(maps), k)
    rows = np.full((*shape, 4), -1, dtype=np.int64)
    numbers = np.full(shape, np.nan, dtype=np.float32)
    result = TopProjections(
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
        scale=min(1.0, LARGEST / max(window)),
        effective=effective,
        reports={method: projection.report for method, projection in part.projections.items()},
    )
    # The picture of all projections of a map must not be larger than WebP allows.
    columns = 1 + math.ceil(math.sqrt(max(100, k * len(part.tiles))))
    largest = min(LARGEST_FULL, WEBP_LARGEST // columns)
    full_shape = _limited(window, max(largest, LARGEST)) if full_size else size
    is_reduced = full_shape != size and is_picture(full_shape)
    full = {method: np.full(shape, b"", dtype=object) for method in part.tiles if is_reduced}
    return Table(result, full, full_shape)


def fill_in(table: Table, part: ProjectedUnits) -> None:
    """Write the projections of some units into the table."""
    result, first = table.result, part.first
    size = result.patches.shape[3:]
    pixels = 255 * reduced(part.patches.float().cpu(), size)
    patches = pixels.round().clamp(0, 255).byte().numpy()
    shown = {}
    for method, tile in part.tiles.items():
        period = averaged_period(result.reports[method], tile.shape[2:])
        shown[method] = averaged(tile.float().cpu(), period)
    tiles = {method: to_bytes(reduced(tile, size)) for method, tile in shown.items()}
    full = {method: to_bytes(reduced(shown[method], table.full_shape)) for method in table.full}
    uneven = [overlap for overlap in first.report.uneven if all(overlap.period)]
    # Among several patterns, the finest is the most visible.
    boards = checkerboard(first.tiles(), uneven[-1].period) if uneven else None
    border = (first.boxes != first.fields).any(1)
    for index, ranked in enumerate(part.units):
        at = ranked.row, ranked.rank
        for method in tiles:
            result.tiles[method][at] = tiles[method][index]
        for method in full:
            table.full[method][at] = encode_passing(full[method][index])
        result.patches[at] = patches[index]
        result.units[at] = ranked.unit
        result.boxes[at] = first.boxes[index].numpy()
        result.windows[at] = part.windows[index].numpy()
        result.border[at] = bool(border[index])
        result.values[at] = float(first.values[index])
        if boards is not None:
            result.checkerboard[at] = float(boards[index])


def drop_repetitions(table: Table, around: np.ndarray) -> None:
    """Drop activations whose patches look like that of a stronger one of the map; around: (M, k, h,
    w), their surroundings."""
    result = table.result
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
        for pictures in table.full.values():
            _keep(pictures[row], kept, b"")


def finished(table: Table) -> TopProjections:
    """The result, with a picture of the projections in full size of each map if tiles were
    reduced."""
    result = table.result
    if not table.full:
        return result
    shape = result.tiles[result.methods[0]].shape[2], *table.full_shape
    sheets = []
    for row in range(len(result.maps)):
        pictures = [p for method in result.methods for p in table.full[method][row] if p]
        tiles = [decode_signed(picture, (1, *shape)) for picture in pictures]
        signs = np.tile(result.signs[row, : result.count(row)], len(result.methods))
        sheets.append(encode_signed(np.concatenate(tiles), signs) if tiles else b"")
    return replace(result, sheets=tuple(sheets), sheet_tile=table.full_shape)


def _keep(array: np.ndarray, kept: list[int], empty: float | bytes) -> None:
    """Move the kept entries of an array (k, ...) to its front."""
    array[: len(kept)] = array[kept]
    array[len(kept) :] = empty


def _limited(size: Sequence[int], largest: int) -> tuple[int, int]:
    """Rows and columns, reduced so that the larger is at most `largest`."""
    scale = min(1.0, largest / max(size))
    return tuple(max(1, round(side * scale)) for side in size)
