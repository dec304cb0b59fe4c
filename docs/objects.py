"""Draws the features of layers 3 and 4 that respond to one category of new images.

python docs/objects.py RUN IMAGES

RUN: a run with the output of `deconvnet visualize run=RUN images=IMAGES`. IMAGES: a folder with a
folder of images for each category. Every strip is a feature: the projections of its five strongest
activations, in five images. A feature is drawn if these images are all of one category; of each
category, those whose fifth activation is the strongest.
"""

import sys
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

import torch
from networks import write
from torch import Tensor

from deconvnet.images.files import find_images
from deconvnet.visualization.drawing.canvas import (
    GAP,
    arrange_tiles,
    hstack,
    shade_projections,
    vstack,
    with_title,
)
from deconvnet.visualization.search.projection_grids import tiles_to_show
from deconvnet.visualization.search.top_projections import TopProjections, load_top_projections

STRONGEST = 5
# By layer: the most features to draw, and the width of a tile in pixels.
LAYERS = {3: (6, 60), 4: (10, 60)}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    run, images = Path(sys.argv[1]), sys.argv[2]
    categories = [file.parent.name for file in find_images(images)]
    blocks = []
    for number, (most, width) in LAYERS.items():
        found = load_top_projections(run / "visualization" / "projections" / f"layer{number}.npz")
        rows = of_one_category(found, categories)
        alive = sum(found.count(row) >= STRONGEST for row in range(len(found.maps)))
        total = sum(map(len, rows.values()))
        print(f"layer {number}: {total} of {alive} maps,", {c: len(r) for c, r in rows.items()})
        # One of each category in turn.
        chosen = [row for row in chain(*zip_longest(*rows.values())) if row is not None][:most]
        strips = [strip(found, row, width) for row in sorted(chosen)]
        half = -(-len(strips) // 2)
        page = hstack([vstack(part, GAP) for part in (strips[:half], strips[half:])], 3 * GAP)
        blocks.append(with_title(f"layer {number}: {len(chosen)} features", page))
    write(vstack(blocks, 3 * GAP), "iccv2011-objects")


def of_one_category(found: TopProjections, categories: list[str]) -> dict[str, list[int]]:
    """By category, the rows of the maps whose strongest images are all of it, the strongest map
    first."""
    rows = defaultdict(list)
    for row in range(len(found.maps)):
        if found.count(row) < STRONGEST:
            continue
        theirs = {categories[image] for image in found.units[row, :STRONGEST, 0]}
        if len(theirs) == 1:
            rows[theirs.pop()].append(row)
    for of_category in rows.values():
        of_category.sort(key=lambda row: -abs(found.values[row, STRONGEST - 1]))
    return dict(sorted(rows.items()))


def strip(found: TopProjections, row: int, width: int) -> Tensor:
    """The projections of a map side by side."""
    tiles = tiles_to_show(found, row)["generative"][:STRONGEST]
    return arrange_tiles(shade_projections(tiles, width=width, least=width), STRONGEST)


if __name__ == "__main__":
    with torch.no_grad():
        main()
