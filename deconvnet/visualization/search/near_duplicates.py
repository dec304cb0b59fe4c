"""Which examples of a map show the same part of the same photograph, shifted or not.

A data set often has a picture twice, or crops of one photograph that overlap. Two small patches may
look alike because they have the feature of the map, so what is compared is larger: the surroundings
of a patch, in grey and in few pixels.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.boxes import crop

# Surroundings have at least so many pixels of the image along each side, and are reduced to SIDE.
LEAST, SIDE = 32, 32
# Surroundings are the same if their correlation, at the best shift of up to so many of their
# pixels, exceeds this.
SHIFT, SAME = 2, 0.98
# The mean difference of two patches that look the same, in 255ths.
EQUAL = 2.0


def surroundings(images: Tensor, windows: Tensor) -> np.ndarray:
    """(U, SIDE, SIDE): the image (U, 3, H, W) in and around the windows (U, 4), which have one
    size; uniform for signals, that is, images of one row, which correlate with whatever has the
    same feature."""
    if min(images.shape[2:]) == 1:
        return np.zeros((len(images), SIDE, SIDE), np.float32)
    boxes = windows.clone()
    for axis, size in enumerate(images.shape[2:]):
        first, last = windows[:, axis], windows[:, axis + 2]
        side = min(max(int((last - first).max()), LEAST), size)
        boxes[:, axis] = ((first + last - side) // 2).clamp(0, size - side)
        boxes[:, axis + 2] = boxes[:, axis] + side
    grey = crop(images, boxes).float().mean(1, keepdim=True)
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
    """(n,): the correlation of pictures (n, h, w) with one of them, at the best shift; 0 for
    uniform ones."""
    h, w = (size - 2 * SHIFT for size in one.shape)
    views = np.lib.stride_tricks.sliding_window_view(one, (h, w)).reshape(-1, h * w)
    shifted = _normalized(views)
    middles = _normalized(others[:, SHIFT : SHIFT + h, SHIFT : SHIFT + w].reshape(-1, h * w))
    return (middles @ shifted.T).max(1, initial=-1)


def _normalized(rows: np.ndarray) -> np.ndarray:
    """Rows with mean zero and norm one; zero if they are uniform."""
    centred = rows - rows.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(norms > 1e-4 * rows.shape[1] ** 0.5, centred / np.maximum(norms, 1e-12), 0)
