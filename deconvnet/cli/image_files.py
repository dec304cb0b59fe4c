"""Image files of commands: checks before any work, reading, and progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.arrays import array_items, array_shape, is_array_file
from deconvnet.images.decoding import read_image
from deconvnet.images.files import distinct_names, image_files
from deconvnet.monitoring.progress_bar import open_bar
from deconvnet.network.network import Progress
from deconvnet.storage import ownership


def output_folder(run: Path, output: str | None, name: str) -> Path:
    """The folder for results: `output`, or a folder of this name next to the network."""
    if output:
        return Path(output).expanduser()
    return (run if run.is_dir() else run.parent) / name


def check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise ValueError if a result could not be written, or would replace an input or other file.

    The folders of the results are created.
    """
    ownership.check_not_inputs(outputs, inputs)
    for path in outputs:
        ownership.check_writable(path)
    for folder in dict.fromkeys(path.parent for path in outputs):
        ownership.make_folder(folder)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"output={folder}: this folder is not writable")


def image_names(paths: list[Path]) -> list[str]:
    """A distinct name for each image in these files; those of an array file are numbered."""
    names = []
    for path, name in zip(paths, distinct_names(paths), strict=True):
        count = array_shape(path)[0] if is_array_file(path) else None
        names += [name] if count is None else [f"{name}-{n}" for n in range(count)]
    return names


def image_sizes(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """(H, W) of each file. Files are read in full, so that damaged ones are known at the start."""
    return {
        path: array_shape(path)[2:] if is_array_file(path) else tuple(read_image(path).shape[1:])
        for path in paths
    }


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """A ValueError raised inside names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_images(
    images: object, device: torch.device, *, as_rgb: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, image (1, 1 or 3, H, W)) of each image in the files that a setting names.

    Grey images have one plane, or three with as_rgb; those of array files have all of their
    channels. Several images show a progress bar.
    """
    paths = image_files(images)
    readers = [reader for path in paths for reader in _readers(path)]
    named = list(zip(readers, image_names(paths), strict=True))
    for read, name in open_bar(named, show=len(named) > 1, unit="image", leave=False):
        image = read()[None].to(device)
        grey = not as_rgb and image.shape[1] == 3 and bool((image == image[:, :1]).all())
        yield name, image[:, :1] if grey else image


def _readers(path: Path) -> list[Callable[[], Tensor]]:
    """A function that reads each image in a file."""
    if is_array_file(path):
        return [item.read for item in array_items(path)]
    return [partial(read_image, path)]


@contextmanager
def progress_bar(name: str, unit: str = "step") -> Iterator[Progress]:
    """A progress bar on a terminal, as a function progress(done, total)."""
    shown = 0
    with open_bar(desc=name, unit=unit, leave=False, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal shown
            bar.total = total
            bar.update(done - shown)
            shown = done

        yield progress
