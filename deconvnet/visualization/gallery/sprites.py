"""Picture files of a web page: sprite sheets with many tiles, and single pictures.

This module defines which types of pictures are accepted, in which format each is stored (WebP, or
PNG if tiles are so small that every pixel counts), and how tiles are arranged in a sheet;
`sprite_style` gives the CSS that shows one. Callers limit their size.

Pictures are float tensors (3, H, W), or (1, H, W), in [0, 1], or uint8 arrays (H, W, 3); several of
one size have one more axis in front. In signed pictures, zero is grey (0.5). Pictures of one row
are drawn as curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deconvnet.visualization.drawing.canvas import as_curves, thickened
from deconvnet.visualization.drawing.tile_sheet import GAP, GREY, sheet_columns, to_sheet
from deconvnet.visualization.search.tile_codec import SMALL, is_dense, webp

Picture = Tensor | np.ndarray

# WebP has a quality from 0 to 100. Tiles of many pixels are shown in about their own size, where
# less is needed, and least in dense texture, in which artefacts hide.
FINE, COARSE, DENSE, MANY_PIXELS = 66, 45, 14, 80
# From 0 to 6: smaller files in more time.
METHOD = 4
# A sheet of so few colours is a PNG file.
FEW_COLORS = 16
# Tiles in a file of many.
PAGE = 256
# Run-length encoding is ten times faster than the default, and these files are smaller.
Z_RLE = 3


def to_tiles(pictures: Picture | None, where: str, largest: int) -> list[np.ndarray]:
    """Pictures of one size as bytes (h, w, 3), reduced to a side of at most `largest`."""
    if pictures is None:
        return []
    return [to_tile(picture, where, largest) for picture in pictures]


def to_tile(picture: Picture, where: str, largest: int) -> np.ndarray:
    """A picture as bytes (h, w, 3), reduced to a side of at most `largest`; where: for errors."""
    return _bytes(check_picture(picture, where), largest)


def check_picture(picture: Picture, where: str) -> Tensor:
    """A picture of either kind as (3, H, W) in [0, 1]; ValueError if it is not a picture."""
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(np.ascontiguousarray(picture))
    shape = tuple(picture.shape)
    if picture.dtype == torch.uint8 and len(shape) == 3 and shape[2] == 3:
        picture = picture.permute(2, 0, 1) / 255
    elif not (picture.is_floating_point() and len(shape) == 3 and shape[0] in (1, 3)):
        raise ValueError(
            f"{where}: {picture.dtype} of shape {shape}; expected floats (3, H, W) in [0, 1] or "
            "uint8 (H, W, 3)"
        )
    if 0 in shape:
        raise ValueError(f"{where}: shape {shape} has no pixels")
    picture = picture.detach().cpu().float().expand(3, -1, -1)
    low, high = float(picture.min()), float(picture.max())
    # Not "low < 0 or high > 1", which is false for NaN.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{where}: values from {low:.4g} to {high:.4g}; expected [0, 1]")
    return picture.clamp(0, 1)


def write_sprite_sheet(root: Path, name: str, tiles: Sequence[np.ndarray | None]) -> dict:
    """Write tiles (h, w, 3) into one file with gaps between them; returns their layout.

    All cells have the size of the largest tile; smaller tiles are centred. None leaves a cell
    empty; the indices of these cells are in `empty`.
    """
    return write_sprite_sheets(root, name, {"": tiles})[""]


def write_sprite_pages(root: Path, name: str, tiles: Sequence[np.ndarray | None]) -> dict:
    """`write_sprite_sheet`, in several files of PAGE tiles each if there are more.

    A browser decodes a file as a whole, and thousands of tiles take hundreds of megabytes. The
    layout is that of a full page; `pages` are the files, None where all tiles are missing, and
    `per_page` is the number of tiles in each.
    """
    if len(tiles) <= PAGE:
        return write_sprite_sheet(root, name, tiles)
    present = [tile for tile in tiles if tile is not None]
    cell = np.full([max(tile.shape[axis] for tile in present) for axis in (0, 1)], GREY, np.uint8)
    files = []
    for number, start in enumerate(range(0, len(tiles), PAGE), 1):
        page = [*tiles[start : start + PAGE]]
        if any(tile is not None for tile in page):
            # All pages have the layout of the first, also the last one, and one of smaller tiles.
            page += [None] * (PAGE - len(page))
            blank = np.repeat(cell[..., None], 3, 2)
            page = [blank if tile is None else tile for tile in page]
            files.append(write_sprite_sheet(root, f"{name}-{number}", page)["file"])
        else:
            files.append(None)
    empty = [number for number, tile in enumerate(tiles) if tile is None]
    layout = {**sheet_layout(PAGE, *cell.shape), "first": 0, "count": len(tiles)}
    return {**layout, "pages": files, "per_page": PAGE} | ({"empty": empty} if empty else {})


def write_sprite_sheets(
    root: Path, name: str, groups: Mapping[str, Sequence[np.ndarray | None]]
) -> dict[str, dict]:
    """The same for several groups of tiles, one after the other in one file; layouts by group.

    `first` is the cell of a group's first tile. Groups without tiles have no layout.
    """
    tiles = [tile for group in groups.values() for tile in group]
    h, w = (max(tile.shape[axis] for tile in tiles if tile is not None) for axis in (0, 1))
    page, layout = to_sheet(tiles), sheet_layout(len(tiles), h, w)
    quality = FINE if max(h, w) < MANY_PIXELS else COARSE
    quality = quality if min(h, w) > SMALL and not _is_drawing(page) else None
    layout = {"file": _save(root, name, page, quality), **layout}
    sheets, first = {}, 0
    for key, group in groups.items():
        empty = [number for number, tile in enumerate(group) if tile is None]
        if group:
            sheets[key] = {**layout, "first": first, "count": len(group)}
            sheets[key] |= {"empty": empty} if empty else {}
        first += len(group)
    return sheets


def sheet_layout(count: int, h: int, w: int) -> dict:
    """How `count` tiles (h, w) lie in a sheet."""
    columns = sheet_columns(count, h, w)
    return {"columns": columns, "rows": -(-count // columns), "width": w, "height": h}


def write_picture(
    root: Path, name: str, picture: Tensor, largest: int, *, photographs: bool = False
) -> dict:
    """Write a picture into its own file; `pixels` are its rows and columns before any reduction."""
    page = _bytes(picture, largest)
    large = photographs and min(page.shape[:2]) > SMALL
    return {
        "file": _save(root, name, page, FINE if large else None),
        "width": page.shape[1],
        "height": page.shape[0],
        "pixels": [int(side) for side in picture.shape[1:]],
    }


def sprite_style(sheet: dict, index: int) -> str:
    """The CSS of an element that shows one tile of a sheet, at any size of the element."""
    row, column = divmod(sheet["first"] + index, sheet["columns"])
    wide, high = (
        n * (side + GAP) - GAP
        for n, side in ((sheet["columns"], sheet["width"]), (sheet["rows"], sheet["height"]))
    )
    left, top = (
        100 * n * (side + GAP) / (total - side) if total > side else 0
        for n, side, total in ((column, sheet["width"], wide), (row, sheet["height"], high))
    )
    return (
        f"background-image:url({sheet['file']});"
        f"background-size:{100 * wide / sheet['width']:.4f}% {100 * high / sheet['height']:.4f}%;"
        f"background-position:{left:.4f}% {top:.4f}%"
    )


def _bytes(picture: Tensor, largest: int) -> np.ndarray:
    """(h, w, 3) uint8: a picture (3, H, W) in [0, 1], reduced to a side of at most `largest`."""
    picture = thickened(as_curves(picture[None]))[0]
    H, W = picture.shape[1:]
    if max(H, W) > largest:
        size = [max(1, round(side * largest / max(H, W))) for side in (H, W)]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    # Zero, 0.5, becomes 128, the grey of sheets.
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _is_drawing(page: np.ndarray) -> bool:
    """Whether a picture (H, W, 3) has few colours, such as curves, which WebP blurs."""
    some = page[::3, ::3].astype(np.int32)
    return len(np.unique((some[..., 0] << 16) + (some[..., 1] << 8) + some[..., 2])) <= FEW_COLORS


def _save(root: Path, name: str, page: np.ndarray, quality: int | None) -> str:
    """Write a picture (H, W, 3) as WebP of this quality, or as PNG, in which a picture without
    colour is grey; returns its path from the page."""
    path = root / f"{name}{'.png' if quality is None else '.webp'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if quality is not None:
        content = webp(page, quality, METHOD)
        if quality == COARSE and is_dense(content, page):
            content = webp(page, DENSE, METHOD)
        path.write_bytes(content)
    else:
        grey = bool((page == page[..., :1]).all())
        page = np.ascontiguousarray(page[..., 0] if grey else page)
        Image.fromarray(page).save(path, compress_type=Z_RLE)
    return path.relative_to(root).as_posix()
