"""The sums of statistics.py computed from the non-zero coefficients of sparse maps, on the CPU.

    z maps (N, K, rows, columns)   y images (N, C, H, W)   f filters (K, C, h, w)

If one percent of the coefficients are non-zero, few pairs of coefficients are close to each other,
and correlating the maps takes a tenth of the time of Fourier transforms. The sums are exact, in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary
from deconvnet.sparse_coding.active_set import footprint

# Fourier transforms are faster if a larger fraction of the coefficients is non-zero.
MAX_DENSITY = 0.02
# The same for filters of 1x1, which need matrix products instead.
POINTWISE_DENSITY = 0.05
# Positions and channels of an image that are read together with 1x1 filters.
TILE = (64, 64)


@dataclass(frozen=True)
class SparseMaps:
    """The non-zero coefficients of maps z of the given shape (N, K, rows, columns).

    image, k, i, j: index of each along the four axes, in this order of sorting; z: its value.
    """

    image: np.ndarray
    k: np.ndarray
    i: np.ndarray
    j: np.ndarray
    z: np.ndarray
    shape: tuple[int, int, int, int]

    @classmethod
    def from_dense(cls, z: Tensor, *, pointwise: bool = False) -> SparseMaps | None:
        """The non-zero coefficients of z; None if it is not on the CPU or not sparse enough for
        filters of 1x1 (`pointwise`), or for larger ones.
        """
        most = POINTWISE_DENSITY if pointwise else MAX_DENSITY
        if z.device.type != "cpu" or torch.count_nonzero(z) > most * z.numel():
            return None
        image, k, i, j = (index.numpy() for index in z.nonzero(as_tuple=True))
        k, i, j = (index.astype(np.int32) for index in (k, i, j))
        return cls(image, k, i, j, z.numpy()[image, k, i, j].astype(np.float64), tuple(z.shape))

    def times(self, factors: Tensor) -> SparseMaps:
        """The maps of every image multiplied by its factor (N, 1, 1, 1)."""
        return replace(self, z=self.z * factors.flatten().numpy()[self.image])

    def filter_gradient(
        self,
        y: Tensor,
        size: tuple[int, int],
        boundary: Boundary,
        *,
        total: Tensor | None = None,
    ) -> Tensor:
        """Z'y (K, C, h, w) in float64, for images y (N, C, H, W); as `convolution.filter_gradient`.

        size: (h, w). total: float64 sums to which the result is added, in place.
        """
        # Imported here because it loads numba, which dense maps do not need.
        from deconvnet.sparse_coding import kernels

        if total is None:
            total = torch.zeros(self.shape[1], y.shape[1], *size, dtype=torch.float64)
        gradient = total.numpy()
        if tuple(size) == (1, 1):
            self._add_pointwise_gradient(y, gradient)
            return total
        rows, columns = (
            footprint(boundary, pixels, taps)
            for pixels, taps in zip(y.shape[2:], size, strict=True)
        )
        for part, image in zip(self._slices_by_image(), y.numpy(), strict=True):
            coefficients = (self.k[part], self.i[part], self.j[part], self.z[part])
            kernels.towards_filters(gradient, image, *coefficients, rows, columns)
        return total

    def _add_pointwise_gradient(self, y: Tensor, gradient: np.ndarray) -> None:
        """Add Z'y to the gradient (K, C, 1, 1): a row of it for each coefficient."""
        from deconvnet.sparse_coding import kernels

        tile = np.empty(TILE)
        for part, image in zip(self._slices_by_image(), y.flatten(2).numpy(), strict=True):
            position = self.i[part].astype(np.int64) * self.shape[3] + self.j[part]
            order = position.argsort(kind="stable")
            kernels.towards_pointwise_filters(
                *(gradient[:, :, 0, 0], image, self.k[part][order], position[order]),
                *(self.z[part][order], tile),
            )

    def correlations(self, size: tuple[int, int], wrap: bool) -> Tensor:
        """The gram (K, K, 2h-1, 2w-1) in float64: sums of z_k[i] z_l[i + shift].

        size: (h, w); shift 0 is in the middle. wrap: maps continue at their opposite side.
        """
        from deconvnet.sparse_coding import kernels

        K, (h, w) = self.shape[1], size
        gram = np.zeros((K, K, 2 * h - 1, 2 * w - 1))
        for part in self._slices_by_image():
            k, i, j, z = self.k[part], self.i[part], self.j[part], self.z[part]
            is_original = np.ones(len(k), bool)
            rows, columns = self.shape[2:]
            if wrap:
                k, i, j, z, is_original = _wrapped(k, i, j, z, is_original, rows, h - 1)
                k, j, i, z, is_original = _wrapped(k, j, i, z, is_original, columns, w - 1)
                i, j, rows, columns = i + h - 1, j + w - 1, rows + 2 * h - 2, columns + 2 * w - 2
            order, starts = kernels.by_bands(i, j, rows, columns, rows)
            ordered = (values[order] for values in (k, i, j, z))
            kernels.correlations(*ordered, starts, is_original[order], gram)
        return torch.from_numpy(gram)

    def _slices_by_image(self) -> list[slice]:
        ends = np.searchsorted(self.image, np.arange(self.shape[0] + 1))
        return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def _wrapped(
    k: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    z: np.ndarray,
    is_original: np.ndarray,
    size: int,
    margin: int,
) -> tuple[np.ndarray, ...]:
    """The coefficients with copies of those near either end of axis i (of this size) beyond the
    other end; copies are not original.
    """
    at_start, at_end = i < margin, i >= size - margin
    k, i, j, z, is_original = (
        np.concatenate([values, values[at_start], values[at_end]])
        for values in (k, i, j, z, is_original)
    )
    copies = len(at_start)
    after_end = copies + np.count_nonzero(at_start)
    i[copies:after_end] += size
    i[after_end:] -= size
    is_original[copies:] = False
    return k, i, j, z, is_original
