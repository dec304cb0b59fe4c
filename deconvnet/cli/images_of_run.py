"""The training images of a run: reading a few of them, and their scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.datasets import load_images, stream_images
from deconvnet.images.fit import reduced_size
from deconvnet.images.photographs import SHORT_SIDE
from deconvnet.training.run_folder import training_data


def read_training_images(run: Path, count: int) -> tuple[Tensor, Tensor | None] | None:
    """Evenly spaced training images (n, 3, H, W) of a run, and their frames.

    None for a network file. Prints the source. Never downloads, whatever the settings of the run,
    which may come from a stranger.
    """
    data = training_data(run)
    if data is None:
        return None
    data = replace(data, download=False)
    where = data.path or data.dataset or ""
    print(f"reading images that the run was trained on: {data.source} {where}".rstrip())
    if data.source == "photographs":
        loaded = load_images(data)
        indices = _evenly_spaced(len(loaded.images), count)
        return loaded.images[indices], None if loaded.frames is None else loaded.frames[indices]
    # Pictures show whole images, whatever pixels were hidden from learning.
    stream = stream_images(replace(data, mask=None))
    return stream.read(_evenly_spaced(len(stream), count))


@dataclass(frozen=True)
class TrainingScale:
    """The scale of the training images of a run: `side` pixels along the short side of a whole
    image, or along its long side if fit is "pad"."""

    side: int
    fit: str

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of an image of H x W pixels at this scale; smaller images are not enlarged."""
        return reduced_size(size, self.side, fit=self.fit)

    def __str__(self) -> str:
        which = "long" if self.fit == "pad" else "short"
        return f"{self.side} pixels along the {which} side, the scale of the training images"


def training_scale(run: Path) -> TrainingScale | None:
    """The scale of the training images of a run; None if it is not recorded.

    Photographs are reduced before they are cropped; the images of other sources are resized to the
    size of the crops, unless they are left as they are.
    """
    data = training_data(run)
    if data is None or data.size is None:
        return None
    if data.source == "photographs":
        return TrainingScale(round(SHORT_SIDE * data.scale), "crop")
    return TrainingScale(data.size, data.fit)


def _evenly_spaced(total: int, count: int) -> Tensor:
    return torch.linspace(0, total - 1, min(count, total)).round().long()
