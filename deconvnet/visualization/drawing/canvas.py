"""Tiles, grids and captions for all pictures, as tensors (3, H, W) in [0, 1].

Signed tiles are shaded symmetrically about mid-grey, which is zero. Pixels are enlarged by whole
factors without smoothing where this fills the room, and reduced with smoothing. A hairline around
each tile separates white tiles from the paper.

Tiles of one row are signals: wherever tiles are resized, these become pictures of their curves.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from deconvnet.visualization.drawing.letters import font_for, legible

# The background; all sizes are in pixels.
PAPER = 1.0
HAIRLINE = 0.75
TILE = 44
GAP = 3
PAGE = 1600
FONT = 13
LINE = 20
# The distance of two lines of a text, relative to the size of its letters.
SPACING = 1.4
# The least share of the available width that a tile fills.
FILLED = 0.8
# Pictures are at most this many times as long as they are wide: a signal has only one row.
ELONGATED = 4
# Curves of signals: their least width, their height, and the grey of zero.
CURVE_WIDTH, CURVE_HEIGHT, CURVE_ZERO = 96, 48, 0.8
# The fraction of the non-zero pixels of a tile that stay between black and white.
CONTRAST = 0.98


def tile_grid(
    tiles: Tensor, *, columns: int | None = None, tile_width: int = TILE, page_width: int = PAGE
) -> Tensor:
    """Tiles (K, 3, h, w) in [0, 1] as a grid on white, each about `tile_width` pixels wide.

    Wider tiles keep their size as long as the grid is at most `page_width` pixels wide.
    """
    tiles = tiles.cpu().float()
    columns = columns or _columns(len(tiles))
    room = (page_width - GAP) // columns - GAP
    zoom = max(1, round(tile_width / tiles.shape[3]))
    width = zoom * tiles.shape[3]
    return arrange_tiles(resize_tiles(tiles, min(width, max(room, 1))), columns)


def arrange_tiles(tiles: Tensor, columns: int) -> Tensor:
    """Tiles (K, 3, h, w) as a grid on white, each in a hairline, without resizing them."""
    K, _, h, w = tiles.shape
    rows = -(-K // columns)
    page = torch.full((3, rows * (h + GAP) + GAP, columns * (w + GAP) + GAP), PAPER)
    for k, picture in enumerate(tiles):
        top, left = GAP + k // columns * (h + GAP), GAP + k % columns * (w + GAP)
        page[:, top - 1 : top + h + 1, left - 1 : left + w + 1] = HAIRLINE
        page[:, top : top + h, left : left + w] = picture
    return page


def resize_tiles(tiles: Tensor, width: int, *, least: int | None = None) -> Tensor:
    """Resize tiles (K, 3, h, w) to at most this width, and at least `least`.

    least: by default, four fifths of the width. Tiles are enlarged by a whole factor if one fits,
    and interpolated otherwise. Values stay in the range of each tile, which may be signed. Set the
    contrast of a tile after it is resized: the fine structure of a reduced tile averages to little
    contrast. Elongated tiles are `thickened` first. Tiles of one row, in [0, 1], become curves.
    """
    tiles = thickened(as_curves(tiles.cpu().float()))
    h, w = tiles.shape[2:]
    zoom = width // w
    if zoom * w >= (FILLED * width if least is None else least):
        return tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size = (max(1, round(h * width / w)), width)
    low, high = (bound(tiles.flatten(1), 1).view(-1, 1, 1, 1) for bound in (torch.amin, torch.amax))
    resized = F.interpolate(tiles, size, mode="bilinear", antialias=True)
    return torch.minimum(torch.maximum(resized, low), high)


def thickened(tiles: Tensor) -> Tensor:
    """Tiles (K, C, h, w) with rows or columns repeated until they are about ELONGATED times as long
    as they are wide, if they are longer."""
    h, w = tiles.shape[2:]
    rows, columns = max(1, w // (ELONGATED * h)), max(1, h // (ELONGATED * w))
    if rows > 1:
        tiles = tiles.repeat_interleave(rows, 2)
    return tiles.repeat_interleave(columns, 3) if columns > 1 else tiles


def as_curves(tiles: Tensor, *, height: int = CURVE_HEIGHT) -> Tensor:
    """Tiles (K, C, 1, w) of one row, in [0, 1], as pictures (K, 3, height, w') of curves; C = 1, 3.

    0 is at the bottom, 1 at the top, and a grey line at 1/2, the zero of `shade_signed`. The planes
    are red, green and blue curves, black where they meet. Tiles of more rows, or of one column, are
    returned as they are.
    """
    if tiles.shape[2] > 1 or tiles.shape[3] == 1:
        return tiles
    tiles = tiles.cpu().float().expand(-1, 3, -1, -1)
    width = tiles.shape[3] * max(1, math.ceil(CURVE_WIDTH / tiles.shape[3]))
    heights = F.interpolate(tiles[:, :, 0], width, mode="linear") * (height - 1)
    ends = torch.cat([heights[..., 1:], heights[..., -1:]], 2)
    low, high = torch.minimum(heights, ends)[:, :, None], torch.maximum(heights, ends)[:, :, None]
    rows = torch.arange(height - 1, -1, -1).view(1, 1, -1, 1)
    inked = (rows >= low.round()) & (rows <= high.round())  # (K, 3, h', w')
    page = torch.full(inked.shape, PAPER)
    page[:, :, height // 2] = CURVE_ZERO
    for plane in range(3):
        # The ink of a curve takes the two other colours away.
        for other in {0, 1, 2} - {plane}:
            page[:, other][inked[:, plane]] = 0.0
    return page


def shade_signed(tiles: Tensor, magnitude: float | Tensor | None = None) -> Tensor:
    """Signed tiles (K, 1 or 3, h, w) as colours (K, 3, h, w): 0 is grey, +magnitude is white.

    By default, the magnitude is the largest of each tile: then the contrast of a tile has no
    meaning, only its shape.
    """
    if magnitude is None:
        magnitude = tiles.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return (0.5 + 0.5 * tiles / magnitude).clamp(0, 1).expand(-1, 3, -1, -1)


def quantile_magnitude(tiles: Tensor, quantile: float = 0.99) -> Tensor:
    """(K, 1, 1, 1): this quantile of the magnitudes of the non-zero values of each tile (K, ...).

    As a scale for `shade_signed`, it keeps a few bright pixels from leaving all others grey.
    """
    values = tiles.abs().flatten(1)
    counts = (values > 0).sum(1)
    # How many values are above the quantile: few, so only these are sorted.
    above = counts - 1 - (quantile * (counts - 1).double()).long()
    largest = values.topk(1 + max([0, *above.tolist()])).values
    magnitudes = largest.gather(1, above.clamp(min=0)[:, None])
    return magnitudes.where(counts[:, None] > 0, 1).view(-1, 1, 1, 1)


def shade_projections(
    tiles: np.ndarray | Tensor,
    *,
    width: int | None = None,
    least: int | None = None,
    contrast: float = CONTRAST,
) -> Tensor:
    """Signed tiles (M, 3, h, w) as colours in [0, 1]; zero is grey.

    width, least: if given, tiles are resized (`resize_tiles`) before the contrast is set; those of
    one row become curves. contrast: the fraction of the non-zero pixels of a tile that stay between
    black and white.
    """
    signed = torch.as_tensor(np.asarray(tiles), dtype=torch.float32)
    signed = torch.nan_to_num(signed, 0.0, 0.0, 0.0)
    is_signal = signed.shape[2] == 1
    if width is not None and not is_signal:
        signed = resize_tiles(signed, width, least=least)
    shaded = shade_signed(signed, quantile_magnitude(signed, contrast))
    return resize_tiles(shaded, width, least=least) if width is not None and is_signal else shaded


def text_block(
    lines: str, width: int, height: int, *, size: int = FONT, color: str = "black"
) -> Tensor:
    """Lines of text on white, (3, height, width)."""
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    lines = legible(lines)
    font = font_for(lines, size)
    draw.multiline_text((GAP, GAP), lines, fill=color, font=font, spacing=4)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


def text_width(text: str, *, size: int = FONT) -> int:
    """The width of a line of `text_block` in pixels."""
    text = legible(text)
    return math.ceil(font_for(text, size).getlength(text)) + 2 * GAP


def paragraph(text: str, width: int, *, size: int = FONT, color: str = "black") -> Tensor:
    """(3, height, width): text broken into lines of at most this width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if text_width(longer, size=size) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    step = max(round(SPACING * size), LINE)
    return vstack([text_block(line, width, step, size=size, color=color) for line in lines])


def plain_number(value: float) -> str:
    """Three significant digits, or all digits before the point: 0.0718, 8.82, 52.3, 1350."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def with_title(title: str, picture: Tensor) -> Tensor:
    """A picture with a title above it, which may be wider than the picture."""
    width = max(picture.shape[2], text_width(title))
    return vstack([text_block(title, width, LINE), picture])


def hstack(pictures: list[Tensor], gap: int = 0) -> Tensor:
    """Pictures from left to right, aligned at the top."""
    return _stacked(pictures, 2, gap)


def vstack(pictures: list[Tensor], gap: int = 0) -> Tensor:
    """Pictures from top to bottom, aligned at the left."""
    return _stacked(pictures, 1, gap)


def _stacked(pictures: list[Tensor], axis: int, gap: int) -> Tensor:
    """Pictures one after the other along an axis, aligned at the beginning of the other axis."""
    sizes = [max(picture.shape[side] for picture in pictures) for side in (1, 2)]
    sizes[axis - 1] = sum(picture.shape[axis] + gap for picture in pictures) - gap
    page, start = pictures[0].new_full((3, *sizes), PAPER), 0
    for picture in pictures:
        _, h, w = picture.shape
        page.narrow(axis, start, picture.shape[axis])[:, :h, :w] = picture
        start += picture.shape[axis] + gap
    return page


def _columns(count: int) -> int:
    """The number of columns that makes a grid a bit wider than high with the fewest empty cells."""
    widths = range(math.ceil(math.sqrt(count)), math.ceil(math.sqrt(2.6 * count)) + 1)
    return min(widths, key=lambda width: (-count % width, width))
