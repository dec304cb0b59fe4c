"""Tiles, grids and captions for all pictures, as tensors (3, H, W) in [0, 1].

Signed tiles are shaded symmetrically about mid-grey, which is zero. Pixels are enlarged by whole
factors without smoothing where this fills the room, and reduced with smoothing. A hairline around
each tile separates white tiles from the paper.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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
    contrast.
    """
    tiles = tiles.cpu().float()
    h, w = tiles.shape[2:]
    zoom = width // w
    if zoom * w >= (FILLED * width if least is None else least):
        return tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size = (max(1, round(h * width / w)), width)
    low, high = (bound(tiles.flatten(1), 1).view(-1, 1, 1, 1) for bound in (torch.amin, torch.amax))
    resized = F.interpolate(tiles, size, mode="bilinear", antialias=True)
    return torch.minimum(torch.maximum(resized, low), high)


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
    # In ascending order zeros come first, so the values that count are the last ones.
    last = values.shape[1] - counts + (quantile * (counts - 1).double()).long()
    ranks = (last.clamp(0, values.shape[1] - 1) + 1).tolist()
    # To sort the pixels of large tiles would take ten times as long.
    found = [tile.kthvalue(rank).values for tile, rank in zip(values, ranks, strict=True)]
    magnitudes = torch.stack(found) if found else values.new_ones(0)
    return magnitudes.where(counts > 0, 1).view(-1, 1, 1, 1)


def shade_projections(
    tiles: np.ndarray | Tensor, *, width: int | None = None, contrast: float = CONTRAST
) -> Tensor:
    """Signed tiles (M, 3, h, w) as colours in [0, 1]; zero is grey.

    width: if given, tiles are resized to at most this many pixels before the contrast is set.
    contrast: the fraction of the non-zero pixels of a tile that stay between black and white.
    """
    signed = torch.as_tensor(np.asarray(tiles), dtype=torch.float32)
    signed = torch.nan_to_num(signed, 0.0, 0.0, 0.0)
    if width is not None:
        signed = resize_tiles(signed, width)
    return shade_signed(signed, quantile_magnitude(signed, contrast))


def text_block(
    lines: str, width: int, height: int, *, size: int = FONT, color: str = "black"
) -> Tensor:
    """Lines of text on white, (3, height, width)."""
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = font_of(size)
    draw.multiline_text((GAP, GAP), lines, fill=color, font=font, spacing=4)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


def text_width(text: str, *, size: int = FONT) -> int:
    """The width of a line of `text_block` in pixels."""
    return math.ceil(font_of(size).getlength(text)) + 2 * GAP


def paragraph(text: str, width: int, *, size: int = FONT, color: str = "black") -> Tensor:
    """(3, height, width): text broken into lines of at most this width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if text_width(longer, size=size) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    step = round(SPACING * size)
    return vstack([text_block(line, width, step, size=size, color=color) for line in lines])


def plain_number(value: float) -> str:
    """Three significant digits, or all digits before the point: 0.0718, 8.82, 52.3, 1350."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures; reading it takes as long as drawing a line of text."""
    return ImageFont.load_default(size)


def with_title(title: str, picture: Tensor) -> Tensor:
    """A picture with a title above it, which may be wider than the picture."""
    width = max(picture.shape[2], text_width(title))
    return vstack([text_block(title, width, LINE), picture])


def hstack(pictures: list[Tensor], gap: int = 0) -> Tensor:
    """Pictures from left to right, aligned at the top."""
    widths = [picture.shape[2] for picture in pictures]
    height, width = max(picture.shape[1] for picture in pictures), sum(widths)
    page, left = torch.full((3, height, width + gap * (len(pictures) - 1)), PAPER), 0
    for picture, width in zip(pictures, widths, strict=True):
        page[:, : picture.shape[1], left : left + width] = picture
        left += width + gap
    return page


def vstack(pictures: list[Tensor], gap: int = 0) -> Tensor:
    """Pictures from top to bottom, aligned at the left."""
    heights = [picture.shape[1] for picture in pictures]
    height, width = sum(heights), max(picture.shape[2] for picture in pictures)
    page, top = torch.full((3, height + gap * (len(pictures) - 1), width), PAPER), 0
    for picture, height in zip(pictures, heights, strict=True):
        page[:, top : top + height, : picture.shape[2]] = picture
        top += height + gap
    return page


def _columns(count: int) -> int:
    """The number of columns that makes a grid a bit wider than high with the fewest empty cells."""
    widths = range(math.ceil(math.sqrt(count)), math.ceil(math.sqrt(2.6 * count)) + 1)
    return min(widths, key=lambda width: (-count % width, width))
