"""Images in array files: .npy and .npz files of (N, C, H, W), with any number of channels.

Arrays are not pixels: they may have any units, are neither resized nor cropped, and are read as
float32. A .npy file is mapped into memory, so that single images of a large file can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.images.decoding import check_file, reason, shown_name, user_path
from deconvnet.images.item import Item

ARRAY_SUFFIXES = (".npy", ".npz")


def is_array_file(path: str | Path) -> bool:
    """Whether a path names an array file, by its suffix."""
    return Path(path).suffix.lower() in ARRAY_SUFFIXES


def array_items(path: str | Path) -> Iterator[Item]:
    """The images of an array file, named by their numbers; ValueError if it is none."""
    file = user_path(path)
    name = shown_name(file.stem)
    for number in range(array_shape(path)[0]):
        yield Item(f"{name}-{number}", partial(read_array_image, path, number))


def array_shape(path: str | Path) -> tuple[int, int, int, int]:
    """(N, C, H, W) of an array file; ValueError, in one line, if it holds no images."""
    return tuple(_array(path).shape)


def read_array_image(path: str | Path, number: int) -> Tensor:
    """One image (C, H, W) of an array file, float32."""
    with np.errstate(over="ignore"):
        image = torch.from_numpy(np.array(_array(path)[number], dtype=np.float32))
    if not torch.isfinite(image).all():
        raise ValueError(
            f"{shown_name(path)}: image {number} has values that are NaN, infinite or beyond the "
            "range of float32"
        )
    return image


def _array(path: str | Path) -> np.ndarray:
    file = user_path(path)
    try:
        check_file(file)
        status = file.stat()
        array = _opened(file, status.st_mtime_ns, status.st_size)
    except Exception as error:  # numpy and zipfile raise many types of exceptions
        raise ValueError(f"cannot read {shown_name(path)}: {reason(error)}") from error
    if array.ndim != 4 or array.dtype.kind not in "buif" or math.prod(array.shape) == 0:
        use = ": save x[:, None] for grey images (N, H, W), or x[:, :, None] for signals (N, C, T)"
        raise ValueError(
            f"{shown_name(path)}: must be images (N, C, H, W) of real numbers, got "
            f"{array.dtype} of shape {tuple(array.shape)}{use if array.ndim == 3 else ''}"
        )
    return array


@lru_cache(maxsize=4)
def _opened(file: Path, modified: int, size: int) -> np.ndarray:
    """The array in a file; modified, size: so that a file that has changed is opened again."""
    loaded = np.load(file, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if len(loaded.files) != 1:
            names = ", ".join(map(shown_name, loaded.files)) or "none"
            raise ValueError(f"must hold one array, but holds {names}")
        return loaded[loaded.files[0]]
