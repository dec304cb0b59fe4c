"""Draws the picture of docs/start.md: what lam, the number of maps and the filter size change.

python docs/choosing.py

learns layer 1 of the default model from the default photographs, with one setting changed at a
time, prints what each network reaches, and writes docs/choosing.png.
"""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deconvnet import DeconvNet, LayerSettings
from deconvnet.images.datasets import load_images
from deconvnet.images.sources import DataSettings
from deconvnet.monitoring.monitor import Monitor
from deconvnet.training.loop import train
from deconvnet.visualization.drawing.canvas import (
    GAP,
    PAPER,
    arrange_tiles,
    hstack,
    resize_tiles,
    shade_signed,
    vstack,
    with_title,
)
from deconvnet.visualization.projection.feature_projection import signed_filters

# The settings of layer 1 of the default model, and the values of each that are tried.
DEFAULT = {"lam": 2.0, "num_maps": 24, "filter_size": 7}
TRIED = {"lam": [0.5, 2.0, 8.0], "num_maps": [8, 24, 72], "filter_size": [5, 7, 13]}
# The width of a picture of all filters.
WIDTH = 300


def main() -> None:
    images = load_images(DataSettings()).images
    learned, rows = {}, []
    for name, values in TRIED.items():
        row = []
        for value in values:
            settings = tuple((DEFAULT | {name: value}).items())
            if settings not in learned:
                learned[settings] = learn(images, **dict(settings))
                print(dict(settings), learned[settings][1], flush=True)
            tiles, result = learned[settings]
            row.append(with_title(f"{name}={value:g}: {result}", page(tiles)))
        rows.append(hstack(row, 4 * GAP))
    picture = vstack(rows, 4 * GAP).permute(1, 2, 0)
    pixels = (picture * 255).round().to(torch.uint8).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        Path(__file__).parent / "choosing.png", optimize=True
    )


def learn(images: Tensor, **settings: float) -> tuple[Tensor, str]:
    """The filters of a network of one layer, and what it reaches in words."""
    net, began = DeconvNet([LayerSettings(**settings)]), time.process_time()
    (result,) = train(net, images, monitor=Monitor(progress=False))
    seconds = time.process_time() - began
    words = f"{result.snr:.1f} dB, {result.density:.1%} non-zero, {seconds:.0f} s"
    return shade_signed(signed_filters(net)), words


def page(tiles: Tensor) -> Tensor:
    """All filters, in a square of WIDTH pixels whatever their number and size."""
    columns = int(np.ceil(np.sqrt(len(tiles))))
    size = WIDTH // columns - GAP
    filters = arrange_tiles(resize_tiles(tiles.expand(-1, 3, -1, -1), size), columns)
    square = torch.full((3, WIDTH, WIDTH), PAPER)
    square[:, : filters.shape[1], : filters.shape[2]] = filters
    return square


if __name__ == "__main__":
    main()
