"""Tiles, grids and captions: what all figures are made of, as arrays (3, H, W) in [0, 1].

Signed tiles are shown symmetrically about mid-grey: grey is zero. Pixels are enlarged by whole
numbers without smoothing; what is too large is made smaller with smoothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER = 1.0
TILE = 44
GAP = 3
PAGE = 1600
FONT = 13
LINE = 20


def tile_grid(
    tiles: Tensor, *, columns: int | None = None, tile: int = TILE, page: int = PAGE
) -> Tensor:
    """Tiles (K, 3, h, w) in [0, 1] side by side on white, each about `tile` pixels wide.

    Larger ones are shown in their size, as long as the whole is at most `page` pixels wide.
    """
    tiles = tiles.cpu().float()
    K = len(tiles)
    columns = columns or _columns(K)
    room = (page - GAP) // columns - GAP
    zoom = max(1, round(tile / tiles.shape[3]))
    width = zoom * tiles.shape[3]
    return arrange_tiles(resize_tiles(tiles, min(width, max(room, 1))), columns)


def arrange_tiles(tiles: Tensor, columns: int) -> Tensor:
    """Tiles (K, 3, h, w) side by side on white as they are."""
    K, _, h, w = tiles.shape
    rows = -(-K // columns)
    page = torch.full((3, rows * (h + GAP) + GAP, columns * (w + GAP) + GAP), PAPER)
    for k, picture in enumerate(tiles):
        top, left = GAP + k // columns * (h + GAP), GAP + k % columns * (w + GAP)
        page[:, top : top + h, left : left + w] = picture
    return page


def resize_tiles(tiles: Tensor, width: int) -> Tensor:
    """Tiles (K, 3, h, w) of at most this width: enlarged by a whole number, or made smaller."""
    tiles = tiles.cpu().float()
    h, w = tiles.shape[2:]
    if w <= width:
        zoom = width // w
        return tiles.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size = (max(1, round(h * width / w)), width)
    return F.interpolate(tiles, size, mode="bilinear", antialias=True).clamp(0, 1)


def shade_signed(f: Tensor, reach: float | Tensor | None = None) -> Tensor:
    """Signed tiles (K, 1 or 3, h, w) as colours (K, 3, h, w): grey is 0, black and white -+ reach.

    By default each tile by its own largest magnitude, so that contrast between tiles means nothing
    and shape everything.
    """
    if reach is None:
        reach = f.abs().flatten(1).amax(1).clamp(min=1e-12).view(-1, 1, 1, 1)
    return (0.5 + 0.5 * f / reach).clamp(0, 1).expand(-1, 3, -1, -1)


def quantile_magnitude(f: Tensor, share: float = 0.99) -> Tensor:
    """(K, 1, 1, 1): the magnitude that this share of what is not zero in a tile (K, ...) stays
    within. A few bright pixels then do not leave all the others grey.
    """
    limits = []
    for tile in f:
        magnitudes = tile[tile != 0].abs().sort().values
        last = int(share * (len(magnitudes) - 1))
        limits.append(magnitudes[last] if len(magnitudes) else tile.new_ones(()))
    return torch.stack(limits).view(-1, 1, 1, 1)


def text_block(lines: str, width: int, height: int) -> Tensor:
    """Black lines on white."""
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT)
    draw.multiline_text((GAP, GAP), lines, fill="black", font=font, spacing=4)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255


def with_title(title: str, picture: Tensor) -> Tensor:
    """A picture below its title, which may be wider."""
    font = ImageFont.load_default(FONT)
    width = max(picture.shape[2], math.ceil(font.getlength(title)) + 2 * GAP)
    return vstack([text_block(title, width, LINE), picture])


def hstack(pictures: list[Tensor], gap: int = 0) -> Tensor:
    """Pictures from left to right, their tops in line."""
    return vstack([picture.mT for picture in pictures], gap).mT


def vstack(pictures: list[Tensor], gap: int = 0) -> Tensor:
    """Pictures from top to bottom, their left sides in line."""
    width = max(picture.shape[2] for picture in pictures)
    rows = [F.pad(picture, (0, width - picture.shape[2]), value=PAPER) for picture in pictures]
    spaced = [row for row in rows for row in (torch.full((3, gap, width), PAPER), row)]
    return torch.cat(spaced[1:], 1)


def _columns(count: int) -> int:
    """As many columns as make the page a little wider than high with the fewest gaps at its end."""
    widths = range(math.ceil(math.sqrt(count)), math.ceil(math.sqrt(2.6 * count)) + 1)
    return min(widths, key=lambda width: (-count % width, width))
