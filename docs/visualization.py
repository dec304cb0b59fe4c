"""Draws the pictures of docs/visualization.md from the output of `deconvnet visualize`.

python docs/visualization.py NETWORK FOLDER RUN [--checkerboard]

for example runs/FashionMNIST/epoch-010.safetensors runs/FashionMNIST/epoch-010 runs/photographs.
NETWORK is a network file of `deconvnet train-cnn`, FOLDER the output for this network, and RUN a
run folder of `deconvnet train` with its output. --checkerboard prints the table of that section
instead.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deconvnet.images.datasets import LazyImages, lazy_images
from deconvnet.images.sources import DataSettings
from deconvnet.visualization.drawing.canvas import (
    arrange_tiles,
    hstack,
    shade_projections,
    with_title,
)
from deconvnet.visualization.models.zoo import LoadedModel, load_model
from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.checkerboard import checkerboard
from deconvnet.visualization.search.projection_grids import layer_grid
from deconvnet.visualization.search.top_projections import TopProjections, load_top_projections
from deconvnet.visualization.searched_network import shuffled_model

HERE = Path(__file__).parent
# Maps to show of the trained network, of the network learned here, and of the controls.
TRAINED_MAPS, LEARNED_MAPS = (2, 1), (4, 2)


def main() -> None:
    network, trained, learned = map(Path, sys.argv[1:4])
    if "--checkerboard" in sys.argv:
        return table(network, trained / "visualization")
    few_colors(grid(trained / "visualization", "relu4", TRAINED_MAPS), "grid")
    checkerboards(network, trained / "visualization")
    figures = trained / "visualization" / "figures"
    for name in ("relu5-evolution", "occlusion-0", "invariance"):
        pixels = torch.from_numpy(np.array(Image.open(figures / f"{name}.png").convert("RGB")))
        few_colors(pixels.permute(2, 0, 1) / 255, name.removeprefix("relu5-"))
    few_colors(grid(learned / "visualization", "layer2", LEARNED_MAPS), "layer2", 256)


def grid(place: Path, layer: str, counts: tuple[int, int]) -> Tensor:
    """The first maps of the random sample that stands in the grid of a layer, and the control."""
    projections, control = (
        load_top_projections(place / folder / f"{layer}.npz")
        for folder in ("projections", "control/projections")
    )
    manifest = json.loads((place / "manifest.json").read_text())
    entry = manifest["layers"][layer]
    rows = [projections.maps.tolist().index(number) for number in entry["shown"][: counts[0]]]
    return layer_grid(
        projections,
        rows,
        info=LayerInfo(layer, entry["kind"], tuple(entry["shape"]), tuple(entry["field"])),
        num_images=manifest["images"]["count"],
        control=control,
        control_maps=counts[1],
    )


def checkerboards(network: Path, place: Path) -> None:
    """The same units with and without the pattern of uneven transposed convolutions."""
    projections = load_top_projections(place / "projections" / "relu4.npz")
    rows = (-projections.checkerboard[:, 0]).argsort()[:6]
    pages = []
    for overlap in ("sum", "normalised"):
        tiles = project(load_model(network), projections, rows, overlap, place)
        page = arrange_tiles(shade_projections(tiles, width=128), 3)
        pages.append(with_title(f'overlap="{overlap}"', page))
    few_colors(hstack(pages, 12), "checkerboard")


def table(network: Path, place: Path) -> None:
    """Print how uneven the strongest unit of every map is, for trained and shuffled weights."""
    layers = [f"relu{number}" for number in range(1, 6)]
    print("| | " + " | ".join(layers) + " |\n|" + "---|" * (len(layers) + 1))
    trained = load_model(network)
    images = searched_images(trained, place)
    projector = Projector(trained.module, normalization=trained.normalization)
    shuffled = shuffled_model(trained, projector, images, seed=0)
    for name, model, folder in (
        ("trained", trained, "projections"),
        ("shuffled", shuffled, "control/projections"),
    ):
        for overlap in ("sum", "normalised"):
            cells = []
            for layer in layers:
                projections = load_top_projections(place / folder / f"{layer}.npz")
                rows = [row for row in range(len(projections.maps)) if projections.count(row)]
                tiles = project(model, projections, rows, overlap, place)
                cells.append(f"{checkerboard(tiles, (2, 2)).median():.3f}")
            print(f"| {name}, `{overlap}` | {' | '.join(cells)} |")


def project(
    model: LoadedModel, projections: TopProjections, rows: Sequence[int], overlap: str, place: Path
) -> Tensor:
    """Project the strongest unit of the maps in some rows; signed RGB tiles."""
    images = searched_images(model, place)
    projector = Projector(model.module, normalization=model.normalization, overlap=overlap)
    tiles = []
    for row in rows:
        number, *unit = projections.units[row, 0].tolist()
        x = projector.prepare(images[number][None])
        tiles.append(projector.signed_rgb(projector(x, projections.layer, [(0, *unit)]).tiles()))
    return torch.cat(tiles)


def searched_images(model: LoadedModel, place: Path) -> LazyImages:
    """The images of the search: as many as the manifest says, spread evenly over the data set."""
    images = lazy_images(DataSettings(**model.training["data"]), crop=model.crop)
    count = json.loads((place / "manifest.json").read_text())["images"]["count"]
    chosen = [round(n * (len(images) - 1) / (count - 1)) for n in range(count)]
    return LazyImages([images.items[n] for n in chosen], crop=images.crop)


def few_colors(picture: Tensor, name: str, count: int = 64) -> None:
    """Write a PNG with few colours, a third of the usual size."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    target = HERE / f"visualization-{name}.png"
    Image.fromarray(pixels).quantize(count, Image.Quantize.FASTOCTREE).save(target, optimize=True)


if __name__ == "__main__":
    main()
