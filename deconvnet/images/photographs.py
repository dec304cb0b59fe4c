"""The default images: crops of photographs that come with scikit-image and scikit-learn.

They need no download. Nothing here is random.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.images.preprocessing import local_moments

# Pixels: the median of the short sides of the photographs, before they are reduced.
SHORT_SIDE = 427
# Pixels that are examined at once: thousands of small crops one by one take several times as long,
# and several large ones at once twice as long.
TOGETHER = 2**15


def photograph_crops(
    size: int, scale: float, max_images: int | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Crops (N, 3, size, size) in [0, 1] of the photographs, and their names.

    Each photograph is reduced by the factor `scale` and cut on a regular grid of overlapping crops.
    max_images: keep this many, those with the most texture; None: all.
    """
    crops, names = [], []
    for name, photograph in _reduced_photographs(scale):
        tops, lefts = (_crop_positions(length, size) for length in photograph.shape[1:])
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                crops.append(photograph[:, top : top + size, left : left + size])
                names.append(f"{name}-{row}-{column}")
    if not crops:
        raise ValueError(
            f"data.size={size}: larger than every photograph at data.scale={scale}; choose a "
            "smaller size or a larger scale"
        )
    images = torch.stack(crops)
    order = _texture(images).argsort(descending=True, stable=True)
    chosen = order[:max_images].sort().values
    return images[chosen], tuple(names[index] for index in chosen)


def _reduced_photographs(scale: float) -> Iterator[tuple[str, Tensor]]:
    try:
        from skimage import data, transform
        from sklearn.datasets import load_sample_images

        photographs = {
            "astronaut": data.astronaut(),
            "chelsea": data.chelsea(),
            "coffee": data.coffee(),
            "rocket": data.rocket(),
            "motorcycle": data.stereo_motorcycle()[0],
        }
        samples = load_sample_images()
    except ImportError as error:
        raise ValueError(
            "data.source=photographs needs scikit-image and scikit-learn "
            f"(pip install scikit-image scikit-learn): {error}"
        ) from error
    photographs |= {
        Path(file).stem: image
        for file, image in zip(samples.filenames, samples.images, strict=True)
    }
    for name, photograph in photographs.items():
        reduced = transform.rescale(photograph, scale, anti_aliasing=True, channel_axis=2)
        pixels = torch.from_numpy(np.ascontiguousarray(reduced.transpose(2, 0, 1)))
        yield name, pixels.float().clamp(0, 1)


def _crop_positions(length: int, size: int) -> list[int]:
    """The first pixels of evenly spaced crops along one axis; empty if it is too short."""
    if length < size:
        return []
    count = max(1, round(1.6 * (length / size - 1)) + 1)
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def _texture(images: Tensor) -> Tensor:
    """(N,): the median over the pixels of the local standard deviation of images (N, 3, H, W)."""
    batches = images.split(max(1, TOGETHER // images[0, 0].numel()))
    deviations = [local_moments(batch, 13, 4.773)[1] for batch in batches]
    return torch.cat(deviations).flatten(1).median(1).values
