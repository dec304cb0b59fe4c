"""The images that a gallery refers to, each written once for all layers.

photographs/<n>.webp        sheets of thumbnails
photographs/whole/<n>.webp  an image that is larger than its thumbnail, for enlarged examples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deconvnet.images.decoding import shown_name
from deconvnet.visualization.gallery.sprites import (
    Picture,
    check_picture,
    to_tile,
    write_picture,
    write_sprite_sheet,
)

# The longest side of a thumbnail in pixels, and for many images, so that a page stays small.
SIDE, SMALL_SIDE, MANY = 160, 112, 300
# The largest side of a whole image, and the most pixels of all whole images together (some 5 MB).
WHOLE, PIXELS = 512, 40_000_000
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
        """Write all images; returns the sheets of thumbnails, and for each image its name, its
        size, that of its thumbnail, its maps, and its own file."""
        whole = min(WHOLE, math.isqrt(PIXELS // max(1, len(self._used))))
        side = SIDE if len(self._used) <= MANY else SMALL_SIDE
        entries, sheets, tiles = [], [], []
        for number, (_, maps) in self._used.items():
            where = f"photograph {number}"
            picture = check_picture(self.images[number], where)
            tiles.append(to_tile(picture, where, side))
            pixels = [int(n) for n in picture.shape[1:]]
            name = shown_name(self.names[number])
            file = None
            if max(pixels) > side and whole > side:
                at = f"photographs/whole/{len(entries) + 1}"
                file = write_picture(root, at, picture, whole, photographs=True)
            entries.append([name, pixels, list(tiles[-1].shape[:2]), maps, file])
            if len(tiles) == SHEET:
                sheets.append(self._sheet(root, len(sheets), tiles))
                tiles = []
        if tiles:
            sheets.append(self._sheet(root, len(sheets), tiles))
        return {"images": entries, "sheets": sheets, "per_sheet": SHEET}

    def _sheet(self, root: Path, number: int, tiles: list[np.ndarray]) -> dict:
        return write_sprite_sheet(root, f"photographs/{number + 1}", tiles)
