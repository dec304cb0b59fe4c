"""The sums of statistics.py computed from the non-zero coefficients of sparse maps, on the CPU.

    z maps (N, K, rows, columns)   y images (N, C, H, W)   f filters (K, C, h, w)

If one percent of the coefficients are non-zero, few pairs of coefficients are close to each other,
and correlating the maps takes a tenth of the time of Fourier transforms. The sums are exact, in
float64.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary
from deconvnet.sparse_coding.active_set import footprint
from deconvnet.support.thread_pool import run_all

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
        if z.device.type != "cpu":
            return None
        # On a flat array of bytes, numpy counts and searches several times as fast as torch.
        nonzero = (z.detach().numpy() != 0).ravel()
        most = POINTWISE_DENSITY if pointwise else MAX_DENSITY
        if np.count_nonzero(nonzero) > most * z.numel():
            return None
        image, k, i, j = np.unravel_index(np.flatnonzero(nonzero), z.shape)
        k, i, j = (index.astype(np.int32) for index in (k, i, j))
        return cls(image, k, i, j, z.numpy()[image, k, i, j].astype(np.float64), tuple(z.shape))

    def times(self, factors: Tensor) -> SparseMaps:
        """The maps of every image multiplied by its factor (N, 1, 1, 1)."""
        return replace(self, z=self.z * factors.flatten().numpy()[self.image])

    def energy(self) -> Tensor:
        """(K,), float64: the sum of squares of each map."""
        energy = np.bincount(self.k, self.z * self.z, minlength=self.shape[1])
        # Without coefficients, numpy counts in integers.
        return torch.from_numpy(energy.astype(np.float64))

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
        images = list(zip(self._slices_by_image(), y.numpy(), strict=True))

        def add(maps: tuple[int, int]) -> None:
            for part, image in images:
                k = self.k[part]
                coefficients = (k, self.i[part], self.j[part], self.z[part])
                ends = np.searchsorted(k, maps)
                kernels.towards_filters(gradient, image, *coefficients, *ends, rows, columns)

        run_all([functools.partial(add, maps) for maps in self._shares()])
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
        parts = self._slices_by_image()
        pairs = [self._neighbours(part, size, wrap) for part in parts]
        columns = self.shape[3] + 2 * w - 2

        def add(maps: tuple[int, int]) -> None:
            for part, (near, starts) in zip(parts, pairs, strict=True):
                k = self.k[part]
                coefficients = (k, self.i[part], self.j[part], self.z[part])
                ends = np.searchsorted(k, maps)
                kernels.correlations(gram, *coefficients, *ends, near, starts, columns)

        run_all([functools.partial(add, maps) for maps in self._shares()])
        # A shift back is a shift forth with the two maps exchanged.
        back = gram[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        gram[:, :, : h - 1] = back[:, :, : h - 1]
        gram[:, :, h - 1, : w - 1] = back[:, :, h - 1, : w - 1]
        return torch.from_numpy(gram)

    def _neighbours(
        self, part: slice, size: tuple[int, int], wrap: bool
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """(near, starts) of one image, as `kernels.correlations` takes them."""
        (h, w), (rows, columns) = size, self.shape[2:]
        k, i, j, z = self.k[part], self.i[part], self.j[part], self.z[part]
        if wrap:
            k, i, j, z = _continued(k, i, j, z, rows, 0, h - 1)
            k, j, i, z = _continued(k, j, i, z, columns, w - 1, w - 1)
        j = j + np.int32(w - 1)
        positions = (rows + h - 1) * (columns + 2 * w - 2)
        place = i * (columns + 2 * w - 2) + j
        order = place.argsort(kind="stable")
        starts = np.zeros(positions + 1, np.int64)
        np.cumsum(np.bincount(place, minlength=positions), out=starts[1:])
        return (k[order], j[order], z[order]), starts

    def _shares(self) -> list[tuple[int, int]]:
        """Ranges of maps with about as many coefficients each, one for each thread.

        Threads add to sums of their own, so that their number does not change the result.
        """
        shares, ends = torch.get_num_threads(), np.bincount(self.k, minlength=1).cumsum()
        inner = np.searchsorted(ends, np.arange(1, shares) * len(self.k) / shares)
        return list(itertools.pairwise([0, *inner.tolist(), self.shape[1]]))

    def _slices_by_image(self) -> list[slice]:
        ends = np.searchsorted(self.image, np.arange(self.shape[0] + 1))
        return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def _continued(
    k: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    z: np.ndarray,
    size: int,
    before: int,
    after: int,
) -> tuple[np.ndarray, ...]:
    """The coefficients, with copies of those from the other end of axis i (of this size) up to
    `before` positions before its first and up to `after` positions after its last.
    """
    last, first = i >= size - before, i < after
    k, i, j, z = (np.concatenate([each, each[last], each[first]]) for each in (k, i, j, z))
    copies = len(last), len(last) + np.count_nonzero(last)
    i[copies[0] : copies[1]] -= size
    i[copies[1] :] += size
    return k, i, j, z
