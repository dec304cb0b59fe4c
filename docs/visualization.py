"""Draws the pictures of docs/visualization.md from what scripts/visualize.py has written.

python docs/visualization.py NETWORK SURVEY RUN [--checkerboard]

for example runs/FashionMNIST/epoch-010.safetensors runs/FashionMNIST/epoch-010 runs/photographs.
The first is a network of scripts/train_cnn.py, the second the folder of its survey, the third that
of a run of scripts/train.py after scripts/visualize.py. With --checkerboard: the table of that
section instead.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deconvnet.images.datasets import lazy_images
from deconvnet.images.sources import DataSettings
from deconvnet.visualization.models.zoo import LoadedModel, load_model
from deconvnet.visualization.pictures.canvas import (
    arrange_tiles,
    hstack,
    resize_tiles,
    vstack,
    with_title,
)
from deconvnet.visualization.pictures.projection_grids import (
    projection_grid,
    shade_projections,
    with_control,
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.randomization import shuffle_weights
from deconvnet.visualization.search.top_projections import (
    TopProjections,
    checkerboard,
    load_top_projections,
)

HERE = Path(__file__).parent
# Maps that show well what the layers are about, and their rows in the files.
MAPS = {"relu2": 4, "relu4": 4}


def main() -> None:
    network, trained, learned = map(Path, sys.argv[1:4])
    if "--checkerboard" in sys.argv:
        return table(network, trained / "visualization")
    grids(trained / "visualization")
    checkerboards(network, trained / "visualization")
    figures = trained / "visualization" / "figures"
    for name in ("relu5-evolution", "occlusion-0", "invariance"):
        pixels = torch.from_numpy(np.array(Image.open(figures / f"{name}.png").convert("RGB")))
        few_colors(pixels.permute(2, 0, 1) / 255, name.removeprefix("relu5-"))
    found, control = (
        load_top_projections(learned / "visualization" / place / "layer2.npz")
        for place in ("projections", "control/projections")
    )
    rows = range(24, 32)
    grid = with_control(
        *(projection_grid(each, rows, tile_width=40) for each in (found, control)), layer="layer2"
    )
    few_colors(grid, "layer2")


def grids(place: Path) -> None:
    """Some maps of two layers, beside those of the same network with its weights shuffled."""
    parts = []
    for layer, count in MAPS.items():
        found, control = (
            load_top_projections(place / folder / f"{layer}.npz")
            for folder in ("projections", "control/projections")
        )
        rows = sorted(range(len(found.maps)), key=lambda row: -found.values[row].min())[:count]
        pair = (projection_grid(each, rows, tile_width=56) for each in (found, control))
        parts.append(with_control(*pair, layer=layer))
    few_colors(vstack(parts, 12), "grid")


def checkerboards(network: Path, place: Path) -> None:
    """The same units with and without what uneven transposed convolutions leave."""
    found = load_top_projections(place / "projections" / "relu4.npz")
    rows = (-found.checkerboard[:, 0]).argsort()[:6]
    pages = []
    for overlap in ("sum", "normalised"):
        tiles = projected(load_model(network), found, rows, overlap, place)
        page = arrange_tiles(resize_tiles(shade_projections(tiles), 128), 3)
        pages.append(with_title(f'overlap="{overlap}"', page))
    few_colors(hstack(pages, 12), "checkerboard")


def table(network: Path, place: Path) -> None:
    """How uneven the strongest unit of every map is, with trained and with shuffled weights."""
    layers = [f"relu{number}" for number in range(1, 6)]
    print("| | " + " | ".join(layers) + " |\n|" + "---|" * (len(layers) + 1))
    for name, folder in (("trained", "projections"), ("shuffled", "control/projections")):
        subject = load_model(network)
        if name == "shuffled":
            subject = replace(subject, module=shuffle_weights(subject.module))
        for overlap in ("sum", "normalised"):
            cells = []
            for layer in layers:
                found = load_top_projections(place / folder / f"{layer}.npz")
                rows = [row for row in range(len(found.maps)) if found.count(row)]
                tiles = projected(subject, found, rows, overlap, place)
                cells.append(f"{checkerboard(tiles, (2, 2)).median():.3f}")
            print(f"| {name}, `{overlap}` | {' | '.join(cells)} |")


def projected(
    subject: LoadedModel, found: TopProjections, rows: Sequence[int], overlap: str, place: Path
) -> Tensor:
    """The strongest unit of the maps in some rows, as signed RGB tiles."""
    images = lazy_images(DataSettings(**subject.training["data"]), crop=subject.crop)
    searched = json.loads((place / "manifest.json").read_text())["images"]["count"]
    projector = Projector(subject.module, normalization=subject.normalization, overlap=overlap)
    tiles = []
    for row in rows:
        number, *unit = found.units[row, 0].tolist()
        # Of all images some were searched, evenly among them.
        x = projector.prepare(images[round(number * (len(images) - 1) / (searched - 1))][None])
        tiles.append(projector.signed_rgb(projector(x, found.layer, [(0, *unit)]).tiles()))
    return torch.cat(tiles)


def few_colors(picture: Tensor, name: str) -> None:
    """A PNG of 64 colours, which takes a third of the bytes."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    target = HERE / f"visualization-{name}.png"
    Image.fromarray(pixels).quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    main()
