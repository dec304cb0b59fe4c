"""Image files of commands: checks before any work, reading, and progress bars."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.images.decoding import read_image
from deconvnet.images.files import distinct_names, image_files
from deconvnet.monitoring.monitor import hidden
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
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"output={folder}: this folder is not writable")


def image_sizes(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """(H, W) of each file. Files are read in full, so that damaged ones are known at the start."""
    return {path: tuple(read_image(path).shape[1:]) for path in paths}


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
    """(name, image (1, 1 or 3, H, W)) of each file that a setting names.

    Grey images have one plane, or three with as_rgb. Several images show a progress bar.
    """
    paths = image_files(images)
    named = list(zip(paths, distinct_names(paths), strict=True))
    for path, name in tqdm(named, unit="image", leave=False, disable=hidden(len(named) > 1)):
        image = read_image(path)[None].to(device)
        grey = not as_rgb and bool((image == image[:, :1]).all())
        yield name, image[:, :1] if grey else image


@contextmanager
def progress_bar(name: str, unit: str = "step") -> Iterator[Progress]:
    """A progress bar on a terminal, as a function progress(done, total)."""
    shown = 0
    with tqdm(desc=name, unit=unit, leave=False, dynamic_ncols=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal shown
            bar.total = total
            bar.update(done - shown)
            shown = done

        yield progress
