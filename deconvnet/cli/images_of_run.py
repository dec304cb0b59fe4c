"""Reading a few of the training images of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.datasets import load_images, stream_images
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


def _evenly_spaced(total: int, count: int) -> Tensor:
    return torch.linspace(0, total - 1, min(count, total)).round().long()
