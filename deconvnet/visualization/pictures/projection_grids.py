"""The grids of the papers: for each map, 3x3 projections next to the 3x3 patches of the images.

Every projection is shaded about grey, which is zero, by a magnitude that almost all of its pixels
do not exceed: the contrast of a tile has no meaning, only its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deconvnet.visualization.pictures.canvas import (
    GAP,
    PAPER,
    arrange_tiles,
    hstack,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    vstack,
    with_title,
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_projections import TopProjections

CONTRAST = 0.995
TILE = 56
COLUMNS = 2


def shade_projections(tiles: np.ndarray | Tensor, *, contrast: float = CONTRAST) -> Tensor:
    """Signed tiles (M, 3, h, w) as colours in [0, 1]; zero is grey.

    contrast: the fraction of the non-zero pixels of a tile that stay between black and white.
    """
    signed = torch.as_tensor(np.asarray(tiles), dtype=torch.float32)
    signed = torch.nan_to_num(signed, 0.0, 0.0, 0.0)
    return shade_signed(signed, quantile_magnitude(signed, contrast))


def projection_grid(
    projections: TopProjections,
    rows: Sequence[int] | None = None,
    *,
    columns: int = COLUMNS,
    tile_width: int = TILE,
    contrast: float = CONTRAST,
) -> Tensor:
    """A picture (3, H, W): for each map, its projections next to the patches, in the same order.

    rows: the rows of the maps in `projections`, by default all. Tiles are hatched if a map has
    fewer activations.
    """
    rows = range(len(projections.maps)) if rows is None else rows
    blocks = [_block(projections, row, tile_width, contrast) for row in rows]
    lines = [hstack(blocks[n : n + columns], 4 * GAP) for n in range(0, len(blocks), columns)]
    return vstack(lines, 2 * GAP)


def with_control(grid: Tensor, control: Tensor, *, layer: str) -> Tensor:
    """The grid of a layer next to that of the same layer with shuffled weights."""
    return hstack(
        [
            with_title(f"{layer}: strongest activations, projected, and the image there", grid),
            with_title("the same with shuffled weights: what the images alone produce", control),
        ],
        8 * GAP,
    )


def pixel_filters(projector: Projector) -> tuple[str, Tensor] | None:
    """The name of the layer whose filters see pixels, and these filters (K, 3, h, w) as signed RGB.

    In a torch module, this is the first convolution with as many input channels as an image; None
    if there is none.
    """
    if projector.is_deconvnet:
        return "layer1", projector.signed_rgb(projector.model.layer(1).filters).cpu()
    planes = 1 if projector.normalization.order == "grey" else 3
    for name, module in projector.model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == planes and module.groups == 1:
            return name, projector.signed_rgb(module.weight.detach().float()).cpu()
    return None


def sample_maps(dead: np.ndarray, count: int | None, *, seed: int = 0) -> list[int]:
    """A random sample of `count` of the maps that are not dead, in ascending order; None: all."""
    alive = np.flatnonzero(~dead)
    if count is None or len(alive) <= count:
        return alive.tolist()
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    return sorted(alive[order[:count].numpy()].tolist())


def _block(projections: TopProjections, row: int, tile_width: int, contrast: float) -> Tensor:
    count, k = projections.count(row), projections.values.shape[1]
    side = math.ceil(math.sqrt(k))
    patches = torch.from_numpy(projections.patches[row]).float() / 255
    pair = []
    projected = projections.tiles[projections.methods[0]][row]
    for tiles in (shade_projections(projected, contrast=contrast), patches):
        tiles = _of_width(tiles, tile_width)
        tiles[count:] = _hatched(tiles.shape[2:])
        pair.append(arrange_tiles(tiles, side))
    values = projections.values[row, :count]
    title = f"map {projections.maps[row]}"
    if count:
        title += f"   {values[0]:.3g} to {values[-1]:.3g}"
    return with_title(title, hstack(pair))


def _of_width(tiles: Tensor, width: int) -> Tensor:
    """Tiles resized to about this width: enlarged by a whole factor, or reduced."""
    w = tiles.shape[3]
    return resize_tiles(tiles, max(1, round(width / w)) * w if w < width else width)


def _hatched(size: tuple[int, int]) -> Tensor:
    """A tile for a missing activation."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    return torch.where((rows + columns) % 8 < 1, 0.75, PAPER).expand(3, -1, -1)
