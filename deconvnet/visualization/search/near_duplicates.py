"""Which examples of a map show the same part of the same photograph, shifted or not.

A data set often has a picture twice, or crops of one photograph that overlap. Two small patches may
look alike because they have the feature of the map, so what is compared is larger: the surroundings
of a patch, in grey and in few pixels. The patch lies in their middle, so that crops which end at
different distances from it can be compared where both show something.
"""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.boxes import crop

# Surroundings have at least so many pixels of the image along each side, and are reduced to SIDE.
LEAST, SIDE = 32, 32
# Surroundings are the same if their correlation, at the best shift of up to so many of their
# pixels, exceeds this.
SHIFT, SAME = 2, 0.98
# The least share of their pixels that must lie inside both images: fewer show little more than the
# feature.
COMMON = 0.25
# The mean difference of two patches that look the same, in 255ths.
EQUAL = 2.0
# A picture of a smaller standard deviation, in [0, 1], is uniform.
UNIFORM = 1e-4


def surroundings(images: Tensor, windows: Tensor) -> np.ndarray:
    """(U, SIDE, SIDE): the image (U, 3, H, W) in and around the windows (U, 4), which have one
    size; NaN beyond the image. Uniform for signals, that is, images of one row, which correlate
    with whatever has the same feature."""
    if min(images.shape[2:]) == 1:
        return np.zeros((len(images), SIDE, SIDE), np.float32)
    boxes = windows.clone()
    for axis in range(2):
        first, last = windows[:, axis], windows[:, axis + 2]
        side = max(int((last - first).max()), LEAST)
        boxes[:, axis] = (first + last - side) // 2
        boxes[:, axis + 2] = boxes[:, axis] + side
    grey = crop(images.float(), boxes, fill=math.nan).mean(1, keepdim=True)
    return F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0].cpu().numpy()


def distinct(patches: np.ndarray, around: np.ndarray) -> list[int]:
    """The indices of the examples of a map that look like none before them.

    patches: (n, 3, h, w) uint8; around: (n, SIDE, SIDE), their `surroundings`.
    """
    kept: list[int] = []
    # Every second pixel is enough.
    pixels = patches[..., ::2, ::2].astype(np.int16)
    for index in range(len(patches)):
        differences = np.abs(pixels[kept] - pixels[index]).mean((1, 2, 3))
        is_equal = (differences < EQUAL).any()
        if not is_equal and not (correlations(around[kept], around[index]) > SAME).any():
            kept.append(index)
    return kept


def correlations(others: np.ndarray, one: np.ndarray) -> np.ndarray:
    """(n,): the correlation of pictures (n, h, w) with one of them, at the best shift, over the
    pixels where neither is NaN; 0 for uniform ones, and if these are less than COMMON of all."""
    h, w = (size - 2 * SHIFT for size in one.shape)
    views = np.lib.stride_tricks.sliding_window_view(one, (h, w)).reshape(-1, h, w)
    shifted, has_shifted = _filled(views)
    middles, has_middle = _filled(others[:, SHIFT : SHIFT + h, SHIFT : SHIFT + w])
    # (n, shifts), all sums over the common pixels of two pictures.
    count = has_middle @ has_shifted.T
    means = middles @ has_shifted.T, has_middle @ shifted.T
    means = [total / np.maximum(count, 1) for total in means]
    product = middles @ shifted.T - count * means[0] * means[1]
    squares = middles**2 @ has_shifted.T, has_middle @ shifted.T**2
    variances = [
        np.maximum(total / np.maximum(count, 1) - mean**2, 0)
        for total, mean in zip(squares, means, strict=True)
    ]
    is_compared = (count >= COMMON * h * w) & (np.minimum(*variances) > UNIFORM**2)
    scale = np.maximum(count, 1) * np.sqrt(np.maximum(variances[0] * variances[1], UNIFORM**4))
    return np.where(is_compared, product / scale, 0).max(1, initial=-1)


def _filled(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures as rows (n, pixels), with zero where they are NaN, and 1 where they are not."""
    rows = pictures.reshape(len(pictures), math.prod(pictures.shape[1:])).astype(np.float64)
    known = np.isfinite(rows)
    return np.where(known, rows, 0), known.astype(np.float64)
