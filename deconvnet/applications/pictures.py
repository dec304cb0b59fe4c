"""What the commands show: images restored from files, and what was taken for what."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet import files
from deconvnet.applications.restoration import Restorer, psnr
from deconvnet.data import distinct_names, image_files, load_images, read_image
from deconvnet.monitor import hidden, save_picture
from deconvnet.network import DeconvNet, load, snr
from deconvnet.run import training_data
from deconvnet.visualization.tiles import LINE, below, beside, text

# Grey levels of an image file.
LEVELS = 255
# Images to fit a restorer to, which has only a number for each map to learn.
ENOUGH = 16
LABEL = 34


@dataclass(frozen=True)
class Restored:
    """An image as it was given, what layers 1, 2, ... make of it, all (1, C, H, W); the image that
    it should be, if that is known; and a word on what was done.
    """

    given: Tensor
    layers: list[Tensor]
    clean: Tensor | None
    note: str


def restore(
    run: str,
    images: object,
    job: Callable[[Restorer, Tensor, int], Restored],
    *,
    folder: str,
    output: str | None = None,
    layer: int | None = None,
    strength: float,
    clean: object = None,
    inputs: Sequence[Path] = (),
    device: torch.device,
) -> None:
    """Do job(restorer, image (1, 1 or 3, H, W), depth) with every image; save and say what it made.

    Pictures go to `output`, by default to this folder beside the run: NAME-layerN.png of every
    layer up to `layer` (None: all), and NAME-compared.png with all side by side. None of them may
    be one of the files that are read: the images, the clean ones, the network, and `inputs`.
    """
    path = Path(run)
    net = load(path).to(device)
    depth = net.depth if layer is None else layer
    net.layer(depth)
    beside = path if path.is_dir() else path.parent
    target = Path(output).expanduser() if output else beside / folder
    paths = image_files(images)
    names = distinct_names(paths)
    endings = [f"layer{number}" for number in range(1, depth + 1)] + ["compared"]
    read = [path, *paths, *inputs, *([] if clean is None else image_files(clean))]
    check_targets([target / f"{name}-{end}.png" for name in names for end in endings], read)
    restorer = _fitted(net, path, clean, strength)
    for name, image in pictures(images, device):
        done = job(restorer, image, depth)
        columns = {"given": done.given}
        for number, found in enumerate(done.layers, 1):
            columns[f"layer {number}"] = found
            save_picture(target / f"{name}-layer{number}.png", found[0])
        figures = {}
        if done.clean is not None:
            figures = {key: quality(done.clean, each) for key, each in columns.items()}
            columns["clean"] = done.clean
        labels = [(f"{key}\n{figures.get(key, '')}", each) for key, each in columns.items()]
        compared = target / f"{name}-compared.png"
        save_picture(compared, strip(labels))
        said = "   ".join(f"{key} {value}" for key, value in figures.items())
        tqdm.write(f"{compared}   {done.note}   {said}".rstrip())


def check_targets(targets: list[Path], inputs: list[Path]) -> None:
    """Refuse, before any work, results that could not be written or would replace an input."""
    files.check_inputs(targets, inputs)
    for path in targets:
        files.check(path)
    for folder in dict.fromkeys(path.parent for path in targets):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"output={folder}: nothing can be written to this folder")


def _fitted(net: DeconvNet, run: Path, clean: object, strength: float) -> Restorer:
    """A restorer, fitted to clean images, or to those that the network of a run has learned from.

    Without either, as with a network file, the maps of the restorer count alike.
    """
    restorer = Restorer(net, strength=strength)
    if clean is not None:
        return restorer.fit(picture[0] for _, picture in pictures(clean, net.device))
    data = training_data(run)
    if data is None:
        return restorer
    images = load_images(data).images
    chosen = torch.linspace(0, len(images) - 1, min(ENOUGH, len(images))).round().long()
    return restorer.fit(images[chosen].to(net.device))


def pictures(images: object, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, image (1, 1 or 3, H, W)) of every file that a setting names; grey ones have 1.

    With a progress bar, if there are several.
    """
    paths = image_files(images)
    named = list(zip(paths, distinct_names(paths), strict=True))
    for path, name in tqdm(named, unit="image", leave=False, disable=hidden(len(named) > 1)):
        image = read_image(path)[None].to(device)
        grey = bool((image == image[:, :1]).all())
        yield name, image[:, :1] if grey else image


def seen(missing: str, image: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
    """(mask (1, 1, H, W) of what is seen, whether the image is complete and part of it hidden).

    missing: a share of the pixels, "box", "half", or a file that is black where pixels are missing.
    """
    H, W = image.shape[2:]
    mask = torch.ones(1, 1, H, W)
    try:
        share = float(missing)
    except ValueError:
        share = None
    if share is not None:
        if not 0 < share < 1:
            raise ValueError(f"missing={missing}: must lie between 0 and 1")
        mask = (torch.rand(1, 1, H, W, generator=generator) >= share).float()
    elif missing == "box":
        mask[..., 3 * H // 8 : 5 * H // 8, 3 * W // 8 : 5 * W // 8] = 0
    elif missing == "half":
        mask[..., W // 2 :] = 0
    else:
        if not Path(missing).expanduser().is_file():
            raise ValueError(
                f"missing={missing}: no such file; or a share such as 0.5, box, or half"
            )
        mask = (read_image(Path(missing).expanduser()).mean(0)[None, None] > 0.5).float()
        if mask.shape[2:] != (H, W):
            raise ValueError(
                f"missing={missing}: {mask.shape[2]}x{mask.shape[3]} pixels, the image has {H}x{W}"
            )
        return mask.to(image.device), False
    return mask.to(image.device), True


def quality(clean: Tensor, image: Tensor) -> str:
    """How near an image comes to the clean one, cut off where pixels end."""
    image = image.clamp(0, 1)
    return f"{float(psnr(clean, image)):.2f} dB (SNR {snr(clean, image):.2f})"


def strip(columns: list[tuple[str, Tensor]]) -> Tensor:
    """Images (1, C, H, W) of one size side by side, each under its label, as (3, H', W')."""
    parts = []
    for label, image in columns:
        pixels = image[0].clamp(0, 1).cpu().expand(3, -1, -1)
        parts.append(below([text(label, pixels.shape[2], LABEL), pixels]))
    return beside(parts, gap=4)


def confusion_picture(matrix: np.ndarray, names: list[str]) -> Tensor:
    """(3, H, W): row by row what the images of a class were taken for, white none, dark blue all.

    Names of the classes are on the left and, from bottom to top, above.
    """
    side = LINE
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    dark = torch.tensor([0.03, 0.19, 0.42]).view(3, 1, 1)
    # A root, so that a few in a hundred are seen.
    ink = torch.from_numpy(shares).float().sqrt()
    cells = 1 - ink * (1 - dark)
    cells = cells.repeat_interleave(side, 1).repeat_interleave(side, 2)
    cells[:, ::side], cells[:, :, ::side] = 0.9, 0.9
    width = 9 * max(map(len, names)) + 8
    labels = [text(name, width, side) for name in names]
    above = torch.cat([torch.rot90(label, 1, (1, 2)) for label in labels], 2)
    corner = torch.ones(3, width, width)
    rows = beside([below(labels), cells])
    return below([beside([corner, above]), rows])
