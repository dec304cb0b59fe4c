"""What estimators accept: arrays, lists and tensors, checked by scikit-learn, in any units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from deconvnet.support.validation import as_tensor

FLOATS = (np.float64, np.float32)
# Limits on the images inferred at a time: their number, and their number of coefficients (64 MiB).
MAX_CHUNK, MAX_CHUNK_COEFFICIENTS = 64, 2**24
# Images per filter update: a tenth of all, within these bounds.
MIN_BATCH, MAX_BATCH = 8, 64


def as_array(X: ArrayLike) -> ArrayLike:
    """A tensor of any dtype and device as an array; anything else unchanged."""
    if not isinstance(X, Tensor):
        return X
    X = as_tensor(X, "X").cpu()
    return (X.float() if X.dtype == torch.bfloat16 else X).numpy()


def validated_rows(
    estimator: BaseEstimator, X: ArrayLike, *, ndims: Sequence[int], reset: bool
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """(rows (N, numbers), the shape of each sample or None if X has rows), as float32 or float64.

    X: rows, or an array of one of ndims. reset: the estimator notes the number of features;
    otherwise X must have it.
    """
    shape, X = None, as_array(X)
    if (X.ndim if hasattr(X, "ndim") else np.asarray(X).ndim) in ndims:
        X = check_array(X, dtype=FLOATS, allow_nd=True)
        shape, X = X.shape[1:], X.reshape(len(X), -1)
    return validate_data(estimator, X, dtype=FLOATS, reset=reset), shape


def center_and_scale(images: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of each channel over all images (N, C, H, W), (C, 1, 1), and the root mean square of
    what is left, or 1 if nothing is.
    """
    mean = images.mean((0, 2, 3), dtype=np.float64)[:, None, None]
    # In float64, one image at a time: X may be large, and its squares overflow float32.
    squares = sum(float(np.square(image - mean).mean()) for image in images)
    scale = math.sqrt(squares / len(images))
    # If all numbers are equal, only rounding errors are left.
    return mean, scale if scale > 1e-12 * np.abs(mean).max() else 1.0


def batch_size_of(batch_size: int | None, images: int) -> int:
    """The images per filter update: as given, or None for a tenth of all, within bounds."""
    return int(batch_size or min(max(images // 10, MIN_BATCH), MAX_BATCH))


def chunk_of(coefficients: int) -> int:
    """How many images with this number of coefficients are inferred at a time."""
    return min(MAX_CHUNK, max(1, MAX_CHUNK_COEFFICIENTS // coefficients))


def is_positive_int(value: object) -> bool:
    return isinstance(value, Integral) and value >= 1
