"""How tiles are stored: small ones as they are, larger ones as WebP pictures, one for each map.

Tiles of a hundred pixels hardly compress without loss, and a network has tens of thousands of them.
At these qualities WebP needs about a tenth of the space. What it loses is hard to see; what counts
as a number (units, values, boxes) is stored exactly.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from deconvnet.visualization.drawing.tile_sheet import GREY, from_sheet, to_sheet

# Tiles up to this side are stored without loss.
SMALL = 24
# WebP's quality, from 0 to 100: of projections, whose fine structure matters, of those of dense
# texture, in which artefacts hide, and of photographs.
PROJECTIONS, DENSE_PROJECTIONS, PHOTOGRAPHS = 60, 40, 65
# A picture that needs more bits for a pixel is dense texture.
DENSE_BITS = 0.75
# Of a projection in memory, before the sheet of its map is complete.
PASSING = 90
# From 0 to 6: as fast as 0 and a quarter smaller; 4 needs twice the time to save a twentieth.
METHOD = 2
# The share of the non-zero values of a tile that may exceed the range of its bytes.
CLIPPED = 1e-3


def is_picture(size: Sequence[int]) -> bool:
    """Whether tiles of this size (h, w) are stored as pictures; signals are not: they are drawn as
    curves, in which any loss would be visible."""
    return max(size) > SMALL and size[0] > 1 and features.check("webp")


def to_bytes(tiles: Tensor) -> np.ndarray:
    """Tiles (U, C, h, w) in int8: 127 is the magnitude that at most one in a thousand of the
    non-zero values of the tile exceeds."""
    parts = []
    for tile in tiles:
        magnitudes = tile[tile != 0].abs()
        count = len(magnitudes)
        above = count - math.ceil((1 - CLIPPED) * count) + 1
        scale = magnitudes.topk(above).values[-1] if count else tile.new_ones(())
        parts.append((127 * (tile / scale).clamp(-1, 1)).round().to(torch.int8))
    return torch.stack(parts).numpy()


def reduced(tiles: Tensor, size: Sequence[int]) -> Tensor:
    """Tiles (U, C, H, W) in this size (h, w)."""
    if tuple(tiles.shape[2:]) == tuple(size):
        return tiles
    return F.interpolate(tiles, tuple(size), mode="bilinear", antialias=True)


def encode_signed(tiles: np.ndarray, signs: np.ndarray) -> bytes:
    """Signed tiles (n, C, h, w) int8 with C = 1 or 3, times signs (n,), as one picture; zero is
    grey."""
    page = _page(_unsigned(tiles * signs[:, None, None, None]))
    content = webp(page, PROJECTIONS, METHOD)
    return webp(page, DENSE_PROJECTIONS, METHOD) if is_dense(content, page) else content


def decode_signed(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """The tiles of `encode_signed` times their signs, of this shape (n, C, h, w)."""
    tiles = _tiles(content, shape).astype(np.int16) - GREY
    return tiles.clip(-127, 127).astype(np.int8)


def encode_passing(tile: np.ndarray) -> bytes:
    """One signed tile (C, h, w) int8 with hardly any loss."""
    return webp(_page(_unsigned(tile[None])), PASSING, 0)


def encode_photographs(tiles: np.ndarray, counts: list[int]) -> dict[str, np.ndarray]:
    """Arrays from which `decode_photographs` makes the tiles again.

    tiles: (M, k, 3, h, w) uint8. counts: how many of the k tiles of each map are not empty; of
    large ones, only these are stored.
    """
    if not is_picture(tiles.shape[3:]):
        return {"tiles": tiles}
    pictures = [
        webp(_page(row[:count]), PHOTOGRAPHS, METHOD) if count else b""
        for row, count in zip(tiles, counts, strict=True)
    ]
    return {"shape": np.array(tiles.shape), "counts": np.array(counts), **pack(pictures)}


def decode_photographs(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The tiles (M, k, 3, h, w) of `encode_photographs`; empty ones are grey."""
    if "tiles" in arrays:
        return arrays["tiles"]
    shape = tuple(arrays["shape"].tolist())
    tiles = np.full(shape, GREY, np.uint8)
    for row, (count, content) in enumerate(zip(arrays["counts"], unpack(arrays), strict=True)):
        if count:
            tiles[row, :count] = _tiles(content, (int(count), *shape[2:]))
    return tiles


def pack(pictures: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Pictures as arrays that `unpack` reads."""
    sizes = np.array([len(picture) for picture in pictures])
    return {"sizes": sizes, "webp": np.frombuffer(b"".join(pictures), np.uint8)}


def unpack(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """The pictures of `pack`."""
    ends, content = arrays["sizes"].cumsum(), arrays["webp"].tobytes()
    return [content[end - size : end] for size, end in zip(arrays["sizes"], ends, strict=True)]


def is_dense(content: bytes, page: np.ndarray) -> bool:
    """Whether a picture (h, w, 3) that was compressed to this content is dense texture."""
    return 8 * len(content) > DENSE_BITS * page[..., 0].size


def webp(page: np.ndarray, quality: int, method: int) -> bytes:
    """A picture (h, w, 3) as the content of a WebP file; method: of WebP, 0 is the fastest."""
    buffer = io.BytesIO()
    page = np.ascontiguousarray(page)
    Image.fromarray(page).save(buffer, "webp", quality=quality, method=method)
    return buffer.getvalue()


def _unsigned(tiles: np.ndarray) -> np.ndarray:
    return (tiles.astype(np.int16) + GREY).astype(np.uint8)


def _page(tiles: np.ndarray) -> np.ndarray:
    """Tiles (n, C, h, w) uint8 in a picture (H, W, 3)."""
    return to_sheet(list(tiles.repeat(3 // tiles.shape[1], 1).transpose(0, 2, 3, 1)))


def _tiles(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `_page`: tiles of this shape (n, C, h, w)."""
    n, C, h, w = shape
    with Image.open(io.BytesIO(content)) as picture:
        page = np.asarray(picture.convert("RGB"))
    return from_sheet(page, n, h, w).transpose(0, 3, 1, 2)[:, :C]
