"""Restoration of image files, the common part of `deconvnet denoise` and `deconvnet inpaint`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.applications.restoration.masks import check_mask_file
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.cli.concepts_of_run import check_takes_images
from deconvnet.cli.image_files import (
    check_outputs,
    errors_naming,
    image_sizes,
    output_folder,
    progress_bar,
    read_images,
)
from deconvnet.cli.images_of_run import read_training_images
from deconvnet.cli.unfinished_run import load_run
from deconvnet.images.files import distinct_names, image_files
from deconvnet.monitoring.monitor import save_picture
from deconvnet.network.metrics import psnr, snr
from deconvnet.network.network import Progress
from deconvnet.network.tiling import MEMORY
from deconvnet.visualization.drawing.canvas import hstack, text_block, vstack

# The largest grey level of an image file.
GREY_LEVELS = 255
# Images that a restorer is fitted to; few suffice, since it learns only one number per map.
FIT_IMAGES = 16
LABEL_HEIGHT = 34


@dataclass(frozen=True)
class Restored:
    """A damaged image and its restorations by layers 1, 2, ..., all (1, C, H, W).

    clean: the undamaged image, if it is known. note: what was done, for the printed line.
    """

    damaged: Tensor
    layers: list[Tensor]
    clean: Tensor | None
    note: str


def restore_files(
    run: str,
    images: object,
    restore: Callable[[Restorer, Tensor, int, Progress], Restored],
    *,
    folder: str,
    output: str | None = None,
    layer: int | None = None,
    strength: float,
    clean: object = None,
    memory: float = MEMORY,
    mask: Path | None = None,
    device: torch.device,
) -> None:
    """Call restore(restorer, image (1, 1 or 3, H, W), depth, progress) for each image.

    Pictures go to `output`, by default to this folder next to the run: NAME-layerN.png for each
    layer up to `layer` (None: all), and NAME-compared.png with all side by side. Foreseeable errors
    are raised before the first image is restored, also if a picture would replace an input file: an
    image, a clean one, the network or the mask.
    """
    path = Path(run)
    net = load_run(path, "layer={}").to(device)
    depth = net.depth if layer is None else layer
    net.layer(depth)
    paths = image_files(images)
    check_takes_images(path, net, paths)
    restorer = Restorer(net, strength=strength)
    results = output_folder(path, output, folder)
    names = distinct_names(paths)
    clean_paths = [] if clean is None else image_files(clean)
    endings = [f"layer{number}" for number in range(1, depth + 1)] + ["compared"]
    inputs = [path, *paths, *clean_paths, *([] if mask is None else [mask])]
    check_outputs([results / f"{name}-{end}.png" for name in names for end in endings], inputs)
    sizes = image_sizes(paths)
    for file, size in sizes.items():
        with errors_naming(file):
            restorer.plan_tiles(size, depth, memory)
    if mask is not None:
        check_mask_file(mask, sizes)
    fit_restorer(restorer, path, clean_paths)
    for name, image in read_images(paths, device):
        with progress_bar(name) as progress:
            restored = restore(restorer, image, depth, progress)
        _save(restored, results, name)


def _save(restored: Restored, folder: Path, name: str) -> None:
    """Write the pictures of one image, and print a line with its quality."""
    columns = {"given": restored.damaged}
    for number, layer in enumerate(restored.layers, 1):
        columns[f"layer {number}"] = layer
        save_picture(folder / f"{name}-layer{number}.png", layer[0])
    figures = {}
    if restored.clean is not None:
        figures = {label: quality(restored.clean, image) for label, image in columns.items()}
        columns["clean"] = restored.clean
    compared = folder / f"{name}-compared.png"
    save_picture(
        compared,
        side_by_side([(f"{key}\n{figures.get(key, '')}", image) for key, image in columns.items()]),
    )
    scores = "   ".join(f"{label} {figure}" for label, figure in figures.items())
    tqdm.write(f"{compared}   {restored.note}   {scores}".rstrip())


def fit_restorer(restorer: Restorer, run: Path, clean: list[Path]) -> None:
    """Fit a restorer to clean images, or to the training images of a run.

    Without either, as for a network file, all maps keep the same weight.
    """
    if clean:
        restorer.fit(image[0] for _, image in read_images(clean, restorer.filters.device))
        return
    try:
        training = read_training_images(run, FIT_IMAGES)
    except (ValueError, OSError) as error:
        reason = str(error).replace("data.path", "path")
        print(f"not fitted to the training images, all maps have the same weight: {reason}")
        return
    if training is not None:
        restorer.fit(image.to(restorer.filters.device) for image in training[0])


def quality(clean: Tensor, image: Tensor) -> str:
    """PSNR and SNR of an image against the clean one, with pixels clipped to [0, 1]."""
    image = image.clamp(0, 1)
    return f"{float(psnr(clean, image)):.2f} dB (SNR {snr(clean, image):.2f})"


def side_by_side(columns: list[tuple[str, Tensor]]) -> Tensor:
    """Images (1, C, H, W) of one size, each under its label, as one picture (3, H', W')."""
    parts = []
    for label, image in columns:
        pixels = image[0].clamp(0, 1).cpu().expand(3, -1, -1)
        parts.append(vstack([text_block(label, pixels.shape[2], LABEL_HEIGHT), pixels]))
    return hstack(parts, gap=4)
