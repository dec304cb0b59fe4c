"""The picture of an evolution: a row for each map, a column for each epoch (figure 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    GAP,
    LINE,
    PAGE,
    hstack,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    text_block,
    text_width,
    vstack,
)
from deconvnet.visualization.drawing.sheet import CARD, Sheet
from deconvnet.visualization.evolution.evolution import Evolution, evenly_spaced

SHOWN_MAPS = 16
# Rows in a column of the picture; then in pixels, the typical and the largest width of a tile, and
# that of a label.
BLOCK = 8
TILE, CARD_TILE = 84, 40
LARGEST = 112
LABEL = 50


def evolution_picture(e: Evolution, *, maps: int = SHOWN_MAPS) -> Tensor:
    """A picture (3, H, W) in [0, 1]: a row for each map, a column for each epoch.

    If there are more maps than `maps`, evenly spaced ones are shown. Each tile is shaded about grey
    on its own scale, and shows the activation as if it were positive. The number of the image is
    below a tile if it is not that of the previous epoch; a jump there need not be a change of the
    feature.
    """
    return _sheet(e, maps, TILE, PAGE // 2).picture()


def evolution_cards(e: Evolution, *, maps: int = SHOWN_MAPS) -> list[Tensor]:
    """The picture as cards of TensorBoard."""
    return _sheet(e, maps, CARD_TILE, CARD).cards()


def _sheet(e: Evolution, maps: int, tile: int, most: int) -> Sheet:
    """The rows of the picture as cells that are at most `most` wide, with tiles of about `tile`."""
    if maps < 1:
        raise ValueError(f"maps={maps}: must be at least 1")
    e, rows = e.with_positive_values(), evenly_spaced(len(e.maps), maps)
    room = min(LARGEST, (most - LABEL) // len(e.epochs) - 2 * GAP)
    cells = [_row(e, row, tile, max(room, 1)) for row in rows]
    step = (cells[0].shape[2] - LABEL) // len(e.epochs)
    heads = [text_block(str(epoch), step, LINE) for epoch in e.epochs]
    count = f"{len(rows)} of {len(e.maps)} maps" if len(rows) < len(e.maps) else f"{len(rows)} maps"
    return Sheet(
        cells,
        columns=-(-len(cells) // BLOCK),
        head=hstack([text_block("epoch", LABEL, LINE), *heads]),
        title=f"{count}: strongest activation in each epoch; below it the number of a new image",
    )


def _row(e: Evolution, row: int, tile: int, room: int) -> Tensor:
    """A row: the number of the map, and a tile for each epoch above the number of its image."""
    tiles, images = e.tiles[:, row].float(), e.images[:, row].tolist()
    side = tiles.shape[-1]
    width = min(max(1, round(tile / side)) * side, room)
    tiles = resize_tiles(shade_signed(tiles, quantile_magnitude(tiles)), width)
    cells = [text_block(f"map {e.maps[row]}", LABEL, tiles.shape[2] + LINE)]
    for n, shown in enumerate(tiles):
        is_new = images[n] >= 0 and (n == 0 or images[n] != images[n - 1])
        caption = _caption(images[n], width) if is_new else ""
        below = text_block(caption, width, LINE)
        cells.append(torch.nn.functional.pad(vstack([shown, below]), (0, GAP), value=1.0))
    return hstack(cells)


def _caption(image: int, width: int) -> str:
    return f"image {image}" if width >= text_width("image 00000") else f"{image}"
