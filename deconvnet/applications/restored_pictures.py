"""What the commands show: images restored from files, and what was taken for what."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.applications.restoration import Restorer
from deconvnet.images.datasets import load_images, stream_images
from deconvnet.images.decoding import read_image
from deconvnet.images.files import distinct_names, image_files
from deconvnet.monitoring.monitor import hidden, save_picture
from deconvnet.network import tiling
from deconvnet.network.metrics import psnr, snr
from deconvnet.network.network import Progress, load
from deconvnet.network.tiling import MEMORY
from deconvnet.storage import ownership
from deconvnet.training.run_folder import training_data
from deconvnet.visualization import image_parts_picture
from deconvnet.visualization.pictures.canvas import hstack, text_block, vstack

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
    job: Callable[[Restorer, Tensor, int, Progress], Restored],
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
    """Do job(restorer, image (1, 1 or 3, H, W), depth, progress) with every image; save and say
    what it made.

    Pictures go to `output`, by default to this folder beside the run: NAME-layerN.png of every
    layer up to `layer` (None: all), and NAME-compared.png with all side by side. None of them may
    be one of the files that are read: the images, the clean ones, the network, the mask. Whatever
    can be known to be wrong with one of the images is said before the first is restored.
    """
    path = Path(run)
    net = load(path).to(device)
    depth = net.depth if layer is None else layer
    net.layer(depth)
    restorer = Restorer(net, strength=strength)
    beside = path if path.is_dir() else path.parent
    target = Path(output).expanduser() if output else beside / folder
    paths = image_files(images)
    names = distinct_names(paths)
    cleaned = [] if clean is None else image_files(clean)
    endings = [f"layer{number}" for number in range(1, depth + 1)] + ["compared"]
    read = [path, *paths, *cleaned, *([] if mask is None else [mask])]
    check_targets([target / f"{name}-{end}.png" for name in names for end in endings], read)
    sizes = sizes_of(paths)
    for file, size in sizes.items():
        with named(file):
            restorer.check(size, depth, memory)
    if mask is not None:
        _check_mask(mask, sizes)
    fit(restorer, path, cleaned)
    for name, image in pictures(paths, device):
        with progress_bar(name) as progress:
            done = job(restorer, image, depth, progress)
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


def reconstruct(
    run: str,
    images: object,
    *,
    layer: int | None = None,
    parts: bool = False,
    output: str | None = None,
    memory: float = MEMORY,
    device: torch.device,
) -> None:
    """Save what a layer (None: the highest) makes of every image as NAME-layerN.png, by default
    beside the run in `reconstructions`; parts: with a picture of what the image is made of.
    """
    path = Path(run)
    net = load(path).to(device)
    layer = net.depth if layer is None else layer
    net.layer(layer)
    paths = image_files(images)
    names = distinct_names(paths)
    beside = path if path.is_dir() else path.parent
    folder = Path(output).expanduser() if output else beside / "reconstructions"
    endings = [".png", "-parts.png"] if parts else [".png"]
    targets = [folder / f"{name}-layer{layer}{end}" for name in names for end in endings]
    check_targets(targets, [path, *paths])
    for file, size in sizes_of(paths).items():
        with named(file):
            net.preprocessing.check_size(size)
            net.check_size(size, layer)
            if not tiling.fits(net, size, layer, memory):
                if parts:
                    raise ValueError(
                        "parts=true: needs the maps of the whole image at once, for which "
                        f"{size[0]}x{size[1]} pixels are too many with memory={memory:g}"
                    )
                tiling.plan_image(net, size, layer, memory)
    for name, image in pictures(paths, device, colour=True):
        with progress_bar(name, "tile") as progress:
            made = tiling.reconstruct(net, image, layer, memory=memory, progress=progress)
        if parts:
            picture = image_parts_picture(net, net.infer(image, depth=layer), image[0], layer)
            save_picture(folder / f"{name}-layer{layer}-parts.png", picture)
        target = folder / f"{name}-layer{layer}.png"
        save_picture(target, made.pixels[0])
        shown = image if made.pixels.shape[1] == 3 else image.mean(1, keepdim=True)
        tqdm.write(
            f"{target}   layer {layer}: {made.snr:.2f} dB preprocessed, "
            f"{snr(shown, made.pixels):.2f} dB in pixels, {made.density:.2%} of z not zero"
        )


def check_targets(targets: list[Path], inputs: list[Path]) -> None:
    """Refuse, before any work, results that could not be written or would replace an input."""
    ownership.check_not_inputs(targets, inputs)
    for path in targets:
        ownership.check_writable(path)
    for folder in dict.fromkeys(path.parent for path in targets):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"output={folder}: nothing can be written to this folder")


def sizes_of(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """(H, W) of every file, read as a whole: what cannot be read is better known at the start."""
    return {path: tuple(read_image(path).shape[1:]) for path in paths}


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors within say which file they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def progress_bar(name: str, unit: str = "step") -> Iterator[Progress]:
    """A progress bar on a terminal, as a function progress(done, total)."""
    done = 0
    with tqdm(desc=name, unit=unit, leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(now: int, total: int) -> None:
            nonlocal done
            bar.total = total
            bar.update(now - done)
            done = now

        yield progress


def fit(restorer: Restorer, run: Path, clean: list[Path]) -> None:
    """Fit a restorer to clean images, or to those that the network of a run has learned from.

    Without either, as with a network file, its maps count alike. Nothing is downloaded because a
    run, which may be a stranger's, says so.
    """
    if clean:
        restorer.fit(picture[0] for _, picture in pictures(clean, restorer.filters.device))
        return
    try:
        found = learned_images(run, ENOUGH)
    except (ValueError, OSError) as error:
        reason = str(error).replace("data.path", "path")
        print(f"not fitted to images that the run learned from, all maps count alike: {reason}")
        return
    if found is not None:
        restorer.fit(image.to(restorer.filters.device) for image in found[0])


def learned_images(run: Path, count: int) -> tuple[Tensor, Tensor | None] | None:
    """Some of the images (n, 3, H, W) that a run has learned from, evenly among all, and their
    frames; None for a network file.

    What is read is said, and nothing is downloaded: the run may be a stranger's.
    """
    data = training_data(run)
    if data is None:
        return None
    data = replace(data, download=False)
    where = data.path or data.dataset or ""
    print(f"reading images that the run learned from: {data.source} {where}".rstrip())
    if data.source == "photographs":
        found = load_images(data)
        chosen = _evenly(len(found.images), count)
        return found.images[chosen], None if found.frames is None else found.frames[chosen]
    found = stream_images(data)
    return found.read(_evenly(len(found), count))


def _evenly(total: int, count: int) -> Tensor:
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def _check_mask(path: Path, sizes: dict[Path, tuple[int, int]]) -> None:
    """Refuse a file of what is missing that does not fit every image, or leaves nothing."""
    mask = _mask_of(path)
    for file, size in sizes.items():
        if tuple(mask.shape[2:]) != size:
            raise ValueError(
                f"missing={path}: {mask.shape[2]}x{mask.shape[3]} pixels, the image {file} has "
                f"{size[0]}x{size[1]}"
            )
    if not mask.any():
        raise ValueError(f"missing={path}: is black everywhere: nothing is seen of the image")


def _mask_of(path: Path) -> Tensor:
    """(1, 1, H, W): 0 where a file is black."""
    return (read_image(path).mean(0)[None, None] > 0.5).float()


def pictures(
    images: object, device: torch.device, *, colour: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, image (1, 1 or 3, H, W)) of every file that a setting names; grey ones have 1, unless
    all are to be in colour.

    With a progress bar, if there are several.
    """
    paths = image_files(images)
    each = list(zip(paths, distinct_names(paths), strict=True))
    for path, name in tqdm(each, unit="image", leave=False, disable=hidden(len(each) > 1)):
        image = read_image(path)[None].to(device)
        grey = not colour and bool((image == image[:, :1]).all())
        yield name, image[:, :1] if grey else image


def seen(missing: str, image: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
    """(mask (1, 1, H, W) of what is seen, whether the image is complete and part of it hidden).

    missing: a share of the pixels, "box", "half", or a file that is black where pixels are missing.
    """
    H, W = image.shape[2:]
    mask = torch.ones(1, 1, H, W)
    share = share_of(missing)
    if share is not None:
        mask = (torch.rand(1, 1, H, W, generator=generator) >= share).float()
    elif missing == "box":
        mask[..., 3 * H // 8 : 5 * H // 8, 3 * W // 8 : 5 * W // 8] = 0
    elif missing == "half":
        mask[..., W // 2 :] = 0
    else:
        mask = _mask_of(mask_file(missing))
        if mask.shape[2:] != (H, W):
            raise ValueError(
                f"missing={missing}: {mask.shape[2]}x{mask.shape[3]} pixels, the image has {H}x{W}"
            )
        return mask.to(image.device), False
    return mask.to(image.device), True


def share_of(missing: str) -> float | None:
    """The share of the pixels that a setting says are missing, if it is one."""
    try:
        share = float(missing)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"missing={missing}: must lie between 0 and 1")
    return share


def mask_file(missing: str) -> Path | None:
    """The file that says what is missing, if it is one."""
    if missing in ("box", "half") or share_of(missing) is not None:
        return None
    path = Path(missing).expanduser()
    if not path.is_file():
        raise ValueError(f"missing={missing}: no such file; or a share such as 0.5, box, or half")
    return path


def quality(clean: Tensor, image: Tensor) -> str:
    """How near an image comes to the clean one, cut off where pixels end."""
    image = image.clamp(0, 1)
    return f"{float(psnr(clean, image)):.2f} dB (SNR {snr(clean, image):.2f})"


def strip(columns: list[tuple[str, Tensor]]) -> Tensor:
    """Images (1, C, H, W) of one size side by side, each under its label, as (3, H', W')."""
    parts = []
    for label, image in columns:
        pixels = image[0].clamp(0, 1).cpu().expand(3, -1, -1)
        parts.append(vstack([text_block(label, pixels.shape[2], LABEL), pixels]))
    return hstack(parts, gap=4)
