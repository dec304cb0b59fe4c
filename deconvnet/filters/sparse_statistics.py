"""Sums over the images of sparse maps, taken over the entries that are not zero alone.

What the filter update needs, Z'y and Z'Z (learning.py), in float64, on the CPU. Of maps with one
percent of entries a pair of filters meets at few places, and their correlation costs ten times less
than by way of Fourier; it is also exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary

# Up to this share of entries that are not zero; beyond it Fourier is faster.
MAX_DENSITY = 0.02


@dataclass(frozen=True)
class SparseMaps:
    """The entries of maps z of the given shape (N, K, rows, columns) that are not zero."""

    image: np.ndarray
    k: np.ndarray
    i: np.ndarray
    j: np.ndarray
    z: np.ndarray
    shape: tuple[int, int, int, int]

    @classmethod
    def from_dense(cls, z: Tensor) -> SparseMaps | None:
        """Those of z, or None if it is not on the CPU or they are not few."""
        if z.device.type != "cpu" or torch.count_nonzero(z) > MAX_DENSITY * z.numel():
            return None
        image, k, i, j = (index.numpy() for index in z.nonzero(as_tuple=True))
        k, i, j = (index.astype(np.int32) for index in (k, i, j))
        return cls(image, k, i, j, z.numpy()[image, k, i, j].astype(np.float64), tuple(z.shape))

    def filter_gradient(self, y: Tensor, size: tuple[int, int], boundary: Boundary) -> Tensor:
        """Z'y (K, C, h, w) in float64, of images y (N, C, H, W) (convolution.filter_gradient)."""
        from deconvnet.sparse_coding import kernels  # loads numba

        gradient = np.zeros((self.shape[1], y.shape[1], *size))
        axes = [kernels.footprint(boundary, *of) for of in zip(y.shape[2:], size, strict=True)]
        for part, image in zip(self._by_image(), y.numpy(), strict=True):
            of = (self.k[part], self.i[part], self.j[part], self.z[part])
            kernels.towards_filters(gradient, image, *of, *axes)
        return torch.from_numpy(gradient)

    def correlations(self, size: tuple[int, int], wrap: bool) -> Tensor:
        """(K, K, 2h-1, 2w-1), float64: sums of z_k[i] z_l[i + shift], shift 0 in the middle.

        wrap: whether maps go on at their other side.
        """
        from deconvnet.sparse_coding import kernels  # loads numba

        K, (h, w) = self.shape[1], size
        gram = np.zeros((K, K, 2 * h - 1, 2 * w - 1))
        for part in self._by_image():
            k, i, j, z = self.k[part], self.i[part], self.j[part], self.z[part]
            own = np.ones(len(k), bool)
            rows, columns = self.shape[2:]
            if wrap:
                k, i, j, z, own = _continued(k, i, j, z, own, rows, h - 1)
                k, j, i, z, own = _continued(k, j, i, z, own, columns, w - 1)
                i, j, rows, columns = i + h - 1, j + w - 1, rows + 2 * h - 2, columns + 2 * w - 2
            order, starts = kernels.by_bands(i, j, rows, columns, rows)
            sorted_ = (of[order] for of in (k, i, j, z))
            kernels.correlations(*sorted_, starts, own[order], gram)
        return torch.from_numpy(gram)

    def _by_image(self) -> list[slice]:
        ends = np.searchsorted(self.image, np.arange(self.shape[0] + 1))
        return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _continued(
    k: np.ndarray, i: np.ndarray, j: np.ndarray, z: np.ndarray, own: np.ndarray, size: int, by: int
) -> tuple[np.ndarray, ...]:
    """Entries with copies of those that are near an end of the axis i beyond its other end."""
    first, last = i < by, i >= size - by
    copies = [np.concatenate([of, of[first], of[last]]) for of in (k, i, j, z, own)]
    start, middle = len(i), len(i) + np.count_nonzero(first)
    copies[1][start:middle] += size
    copies[1][middle:] -= size
    copies[4][start:] = False
    return tuple(copies)
