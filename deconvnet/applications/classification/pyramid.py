"""Maps of any size as a fixed number of features: how strong every map is in each part of an image.

z maps (N, K, H, W)   a grid of g x g cells covers a map, its cells as equal as H and W allow
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional

Grid = int | Sequence[int]


def grid_features(z: Tensor, grid: Grid) -> Tensor:
    """The means of |z| over the cells of a grid, or of several grids: (N, K * cells(grid)).

    z: (N, K, H, W). grid: g for g x g cells, or several, (1, 2, 4), for a pyramid (Lazebnik et al.
    2006, but means instead of counts). Grid by grid the order is map, row, column. Cells of a map
    with fewer than g rows or columns overlap.
    """
    if z.ndim != 4:
        raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(z.shape)}")
    strength = z.abs()
    parts = [functional.adaptive_avg_pool2d(strength, g).flatten(1) for g in _sides(grid)]
    return torch.cat(parts, 1)


def cells(grid: Grid) -> int:
    """How many cells the grid has, or all grids of a pyramid together."""
    return sum(g * g for g in _sides(grid))


def _sides(grid: Grid) -> list[int]:
    sides = [grid] if isinstance(grid, Integral) else grid
    whole = isinstance(sides, Sequence) and all(isinstance(g, Integral) and g > 0 for g in sides)
    if not whole or len(sides) == 0:
        raise ValueError(f"grid={grid!r}: must be a whole number from 1, or several, as (1, 2, 4)")
    return [int(g) for g in sides]
