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
from PIL import Image, features

# Tiles up to this side are stored without loss.
SMALL = 24
# WebP's quality of projections, whose fine structure matters, and of photographs.
PROJECTIONS, PHOTOGRAPHS = 60, 65
# Of projections in full size.
FULL_SIZE = 45
# Of a picture of dense texture, which at the usual quality needs more bits for a pixel than this:
# its artefacts hide in the texture.
DENSE, DENSE_BITS = 14, 0.75
# From 0 to 6: as fast as 0 and a quarter smaller; 4 needs twice the time to save a twentieth.
METHOD = 2
# Tiles begin at multiples of this, the side of WebP's blocks, so that none affects another.
BLOCK = 16
# Zero of signed tiles.
GREY = 128


def encode_tiles(tiles: np.ndarray, counts: list[int]) -> dict[str, np.ndarray]:
    """Arrays from which `decode_tiles` makes the tiles again.

    tiles: (M, k, C, h, w) with C = 1 or 3, int8 for signed tiles, uint8 for photographs. counts:
    how many of the k tiles of each map are not empty; only these are stored.
    """
    shape = np.array(tiles.shape)
    is_signal = tiles.shape[3] == 1  # drawn as curves, in which any loss would be visible
    if max(tiles.shape[3:]) <= SMALL or is_signal or not features.check("webp"):
        return {"shape": shape, "tiles": tiles}
    quality = PHOTOGRAPHS if tiles.dtype == np.uint8 else PROJECTIONS
    pictures = [
        _encoded(_sheet(_unsigned(row[:count])), quality) if count else b""
        for row, count in zip(tiles, counts, strict=True)
    ]
    return {
        "shape": shape,
        "signed": np.array(tiles.dtype == np.int8),
        "counts": np.array(counts),
        "sizes": np.array([len(picture) for picture in pictures]),
        "webp": np.frombuffer(b"".join(pictures), np.uint8),
    }


def decode_tiles(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The tiles (M, k, C, h, w) of `encode_tiles`; empty ones are zero, or grey in photographs."""
    if "tiles" in arrays:
        return arrays["tiles"]
    shape, signed = tuple(arrays["shape"].tolist()), bool(arrays["signed"])
    tiles = np.zeros(shape, np.int8) if signed else np.full(shape, GREY, np.uint8)
    end = 0
    for row, (count, size) in enumerate(zip(arrays["counts"], arrays["sizes"], strict=True)):
        start, end = end, end + int(size)
        if count:
            with Image.open(io.BytesIO(arrays["webp"][start:end].tobytes())) as picture:
                page = np.asarray(picture.convert("RGB"))
            shown = _tiles_of(page, int(count), shape[2:])
            tiles[row, :count] = shown.astype(np.int16) - GREY if signed else shown
    return tiles


def encode_full(tile: np.ndarray) -> bytes:
    """A signed tile (C, h, w) int8 of any size as a picture of its own."""
    page = np.ascontiguousarray(_unsigned(tile).repeat(3 // len(tile), 0).transpose(1, 2, 0))
    if len(page) == 1:
        return _encoded(page, 100, lossless=True)
    content = _encoded(page, FULL_SIZE)
    return _encoded(page, DENSE) if is_dense(content, page) else content


def is_dense(content: bytes, page: np.ndarray) -> bool:
    """Whether a picture (h, w, 3) that was compressed to this content is dense texture."""
    return 8 * len(content) > DENSE_BITS * page[..., 0].size


def decode_full(pictures: Sequence[bytes], planes: int) -> np.ndarray:
    """The tiles (n, planes, h, w) int8 of `encode_full`."""
    pages = []
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as page:
            pages.append(np.asarray(page.convert("RGB")).transpose(2, 0, 1)[:planes])
    return (np.stack(pages).astype(np.int16) - GREY).clip(-127, 127).astype(np.int8)


def pack(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """An array of bytes objects as arrays that `unpack` reads."""
    sizes = np.array([len(picture) for picture in pictures.flat]).reshape(pictures.shape)
    return {"sizes": sizes, "bytes": np.frombuffer(b"".join(pictures.flat), np.uint8)}


def unpack(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The array of `pack`."""
    pictures = np.full(arrays["sizes"].shape, b"", dtype=object)
    content, end = arrays["bytes"].tobytes(), 0
    for index, size in enumerate(arrays["sizes"].flat):
        start, end = end, end + int(size)
        pictures.flat[index] = content[start:end]
    return pictures


def _unsigned(tiles: np.ndarray) -> np.ndarray:
    return tiles if tiles.dtype == np.uint8 else (tiles.astype(np.int16) + GREY).astype(np.uint8)


def _sheet(tiles: np.ndarray) -> np.ndarray:
    """Tiles (n, C, h, w) side by side in a picture (H, W, 3)."""
    n, _, h, w = tiles.shape
    columns = _columns(n)
    rows = -(-n // columns)
    margins = [(0, 0), (0, 0), (0, -h % BLOCK), (0, -w % BLOCK)]
    cells = np.pad(tiles, margins, mode="edge").repeat(3 // tiles.shape[1], 1)
    cells = np.pad(cells, [(0, rows * columns - n), (0, 0), (0, 0), (0, 0)], mode="edge")
    H, W = cells.shape[2:]
    page = cells.reshape(rows, columns, 3, H, W).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(page.reshape(rows * H, columns * W, 3))


def _tiles_of(page: np.ndarray, n: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_sheet`."""
    C, h, w = shape
    columns = _columns(n)
    H, W = h + -h % BLOCK, w + -w % BLOCK
    cells = page.reshape(-1, H, columns, W, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, H, W)
    return cells[:n, :C, :h, :w]


def _columns(n: int) -> int:
    return math.ceil(math.sqrt(n))


def _encoded(page: np.ndarray, quality: int, *, lossless: bool = False) -> bytes:
    file = io.BytesIO()
    # A Pillow without WebP keeps projections in full size as PNG files.
    name = "WEBP" if features.check("webp") else "PNG"
    Image.fromarray(page).save(file, name, quality=quality, method=METHOD, lossless=lossless)
    return file.getvalue()
