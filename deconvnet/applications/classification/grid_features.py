"""Features of fixed size from maps of any size: means or maxima of each map in each grid cell.

z maps (N, K, H, W)   a grid of g x g cells of (nearly) equal size covers a map
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional

Grid = int | Sequence[int]

POOLINGS = ("mean", "max")


def grid_features(
    z: Tensor, grid: Grid, *, pooling: str = "mean", split_signs: bool = False
) -> Tensor:
    """The means or maxima of |z| over the cells of one or several grids: (N, K * num_cells(grid)).

    z: (N, K, H, W). grid: g for g x g cells, or several such as (1, 2, 4) for a spatial pyramid
    (Lazebnik et al. 2006, with means instead of counts). pooling: mean | max. split_signs: of
    max(0, z) and of max(0, -z) instead of |z|, twice as many features. Features are ordered by
    grid, sign (the positive coefficients first), map, row, column. If a map has fewer than g rows
    or columns, cells overlap.
    """
    if z.ndim != 4:
        raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(z.shape)}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: choose one of {', '.join(POOLINGS)}")
    pool = functional.adaptive_avg_pool2d if pooling == "mean" else functional.adaptive_max_pool2d
    parts = [z.clamp(min=0), (-z).clamp(min=0)] if split_signs else [z.abs()]
    return torch.cat([pool(part, g).flatten(1) for g in _sides(grid) for part in parts], 1)


def grid_maxima(z: Tensor, grid: Grid) -> Tensor:
    """The maxima of max(0, z) and of max(0, -z) over the cells: (N, 2K * num_cells(grid)).

    z, grid, and the order of the features: as in `grid_features`.
    """
    return grid_features(z, grid, pooling="max", split_signs=True)


def num_cells(grid: Grid) -> int:
    """The number of cells of a grid, or of all grids of a pyramid."""
    return sum(g * g for g in _sides(grid))


def _sides(grid: Grid) -> list[int]:
    sides = [grid] if isinstance(grid, Integral) else grid
    valid = isinstance(sides, Sequence) and all(isinstance(g, Integral) and g > 0 for g in sides)
    if not valid or len(sides) == 0:
        raise ValueError(
            f"grid={grid!r}: must be a whole number from 1, or several such as (1, 2, 4)"
        )
    return [int(g) for g in sides]
