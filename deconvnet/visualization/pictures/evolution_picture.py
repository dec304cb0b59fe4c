"""The picture of an evolution: a row for each map, a column for each epoch (figure 4)."""

from __future__ import annotations

from torch import Tensor

from deconvnet.visualization.evolution.evolution import Evolution, evenly_spaced
from deconvnet.visualization.pictures.canvas import (
    GAP,
    LINE,
    PAGE,
    arrange_tiles,
    hstack,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    text_block,
    vstack,
    with_title,
)

SHOWN_MAPS = 16
# Rows in a block; then in pixels, the typical and the largest width of a tile, and that of a label.
BLOCK = 8
TILE = 84
LARGEST = 112
LABEL = 62


def evolution_picture(e: Evolution, *, maps: int = SHOWN_MAPS) -> Tensor:
    """A picture (3, H, W) in [0, 1]: a row for each map, a column for each epoch.

    If there are more maps than `maps`, evenly spaced ones are shown. Each tile is shaded about grey
    on its own scale. A black line marks a tile whose image differs from that of the previous epoch;
    a jump there need not be a change of the feature.
    """
    if maps < 1:
        raise ValueError(f"maps={maps}: must be at least 1")
    rows = evenly_spaced(len(e.maps), maps)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    page = PAGE // len(blocks) - 4 * GAP
    room = min(LARGEST, (page - LABEL) // len(e.epochs) - GAP)
    count = f"{len(rows)} of {len(e.maps)} maps" if len(rows) < len(e.maps) else f"{len(rows)} maps"
    title = (
        f"{count}, strongest activation in each epoch; black line: from another image than before"
    )
    return with_title(title, hstack([_block(e, block, room) for block in blocks], 4 * GAP))


def _block(e: Evolution, rows: list[int], room: int) -> Tensor:
    """Some rows of the picture, with map numbers on the left and epochs above."""
    tiles, images = e.tiles[:, rows].transpose(0, 1).flatten(0, 1).float(), e.images[:, rows]
    side = tiles.shape[-1]
    width = min(max(1, round(TILE / side)) * side, max(room, 1))
    tiles = resize_tiles(shade_signed(tiles, quantile_magnitude(tiles)), width)
    page, step = arrange_tiles(tiles, len(e.epochs)), tiles.shape[-1] + GAP
    for column, row in (images[1:] != images[:-1]).nonzero().tolist():
        page[:, GAP + row * step : (row + 1) * step, (column + 1) * step + GAP // 2] = 0
    names = [text_block(f"map {e.maps[row]}", LABEL, step) for row in rows]
    heads = [text_block(str(epoch), step, LINE) for epoch in e.epochs]
    return hstack(
        [vstack([text_block("epoch", LABEL, LINE), *names]), vstack([hstack(heads), page])]
    )
