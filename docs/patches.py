"""Draws the picture of layers of patches in docs/networks.md.

python docs/patches.py RUN

RUN: the folder of a run of `deconvnet train +experiment=patches`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deconvnet import load
from deconvnet.visualization.drawing.canvas import (
    GAP,
    arrange_tiles,
    resize_tiles,
    shade_signed,
    vstack,
    with_title,
)
from deconvnet.visualization.evolution.evolution import load_evolution
from deconvnet.visualization.pictures.layer_pictures import shade_features
from deconvnet.visualization.projection.feature_projection import signed_filters

# Columns and width of a tile in each layer, and the number of features of layer 2.
FILTERS, FEATURES, SHOWN = (25, 30), (15, 51), 75


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    run = Path(sys.argv[1])
    picture = vstack([filters(run), features(run / "evolution" / "layer2.npz")], 4 * GAP)
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).convert("L").save(Path(__file__).parent / "patches.png", optimize=True)


def filters(run: Path) -> Tensor:
    """All filters of layer 1."""
    tiles = shade_signed(signed_filters(load(run))).expand(-1, 3, -1, -1)
    columns, width = FILTERS
    page = arrange_tiles(resize_tiles(tiles, width), columns)
    return with_title(f"layer 1: {len(tiles)} filters of 5x5 pixels", page)


def features(file: Path) -> Tensor:
    """The strongest activations of some maps of layer 2 in pixel space."""
    last = load_evolution(file).with_positive_values()
    tiles, values = last.tiles[-1], last.values[-1]
    active = torch.nonzero(values)[:, 0]
    chosen = active[np.linspace(0, len(active) - 1, SHOWN).round().astype(int)]
    shaded = shade_features(tiles[chosen], values[chosen]).expand(-1, 3, -1, -1)
    columns, width = FEATURES
    page = arrange_tiles(resize_tiles(shaded, width), columns)
    return with_title(f"layer 2: {SHOWN} of {len(active)} maps, in pixel space", page)


if __name__ == "__main__":
    main()
