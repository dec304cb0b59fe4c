"""Thumbnails of the images that a gallery refers to, each written once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deconvnet.images.decoding import shown_name
from deconvnet.visualization.gallery.sprites import (
    Picture,
    check_picture,
    to_tile,
    write_sprite_sheet,
)

# The longest side of a thumbnail in pixels, and for many images, so that a page stays small.
SIDE, SMALL_SIDE, MANY = 160, 112, 300
# A page that shows nine images should not need all sheets.
SHEET = 24


class Photographs:
    """The images behind the examples of a gallery; those that are used are written at the end.

    names: of all images of the data set; images: (3, H, W) in [0, 1] by number.
    """

    def __init__(self, names: Sequence[str], images: Sequence[Picture]):
        self.names, self.images = names, images
        # By number of the image: its number in the page, and the maps that it belongs to.
        self._used: dict[int, tuple[int, list[list[int]]]] = {}

    def use(self, number: int, layer: int | None = None, map: int | None = None) -> int:
        """The number in the page of an image; layer, map: by number, the map that it belongs to."""
        if not 0 <= number < len(self.names):
            raise ValueError(f"photograph {number}: there are {len(self.names)}")
        index, maps = self._used.setdefault(number, (len(self._used), []))
        if layer is not None and [layer, map] not in maps[-1:]:
            maps.append([layer, map])
        return index

    def write(self, root: Path) -> dict:
        """Write the thumbnails; returns names, sizes, the maps of each image, and the sheets."""
        side = SIDE if len(self._used) <= MANY else SMALL_SIDE
        entries, sheets, tiles = [], [], []
        for number, (_, maps) in self._used.items():
            where = f"photograph {number}"
            picture = check_picture(self.images[number], where)
            tiles.append(to_tile(picture, where, side))
            pixels = [int(n) for n in picture.shape[1:]]
            name = shown_name(self.names[number])
            entries.append([name, pixels, list(tiles[-1].shape[:2]), maps])
            if len(tiles) == SHEET:
                sheets.append(self._sheet(root, len(sheets), tiles))
                tiles = []
        if tiles:
            sheets.append(self._sheet(root, len(sheets), tiles))
        return {"images": entries, "sheets": sheets, "per_sheet": SHEET}

    def _sheet(self, root: Path, number: int, tiles: list[np.ndarray]) -> dict:
        return write_sprite_sheet(root, f"photographs/{number + 1}", tiles)
