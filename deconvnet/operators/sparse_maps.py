"""Deconvolution of maps whose few values are known by their places, and its adjoint, on a CPU.

    z maps (N, K, rows, columns), zero but for V values of each image · f filters (K, C, h, w)
    places: of one image, where its values are

After pooling over maps, 26 of 27 coefficients are zero, and a convolution spends its time on them.
Here every value paints its filter, and the adjoint correlates only at the places of the values
(`sparse_kernels`, compiled): a ninth of the time or less. Images share the work among threads. The
result of an image does not depend on them, nor on the other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.operators.convolution import Boundary, deconvolve
from deconvnet.support.thread_pool import run_all

# A convolution is as fast if more than one of so many coefficients has a value, ...
SPARSE = 3
# ... or if it takes no more multiplications than this: loading compiled code takes a second.
FEW_PRODUCTS = 2**20

# What `sparse_kernels.by_place` returns.
Places = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pays(f: Tensor, values: int, shape: tuple[int, int, int], boundary: Boundary) -> bool:
    """Whether maps of this (K, rows, columns) with so many values are painted faster one by one.

    False also where only a convolution is possible: on a GPU, with gradients, and if the border is
    reflected.
    """
    K, rows, columns = shape
    possible = (
        f.device.type == "cpu"
        and f.dtype in (torch.float32, torch.float64)
        and not (torch.is_grad_enabled() and f.requires_grad)
        and boundary != "reflect"
    )
    few = SPARSE * values <= K * rows * columns
    return possible and few and f.numel() * rows * columns > FEW_PRODUCTS


def deconvolve_sparse(z: Tensor, f: Tensor, *, boundary: Boundary = "valid") -> Tensor:
    """`deconvolve` of maps (N, K, rows, columns) that are mostly zero, image by image.

    Images with more values than `pays` are convolved, as are maps that require a gradient.
    """
    shape = tuple(z.shape[1:])
    differentiated = torch.is_grad_enabled() and z.requires_grad
    if differentiated or z.dtype != f.dtype or not pays(f, 0, shape, boundary):
        return deconvolve(z, f, boundary=boundary)
    deconvolver = SparseDeconvolver(f, boundary, shape[1:])
    indices = [deconvolver.nonzero(maps) for maps in z]
    few = [n for n, found in enumerate(indices) if pays(f, len(found), shape, boundary)]
    values = [z[n].flatten()[indices[n]] for n in few]
    painted = deconvolver.paint(values, [deconvolver.places(indices[n]) for n in few])
    if len(few) == len(z):
        return painted
    images = {n: painted[at : at + 1] for at, n in enumerate(few)}
    for n in set(range(len(z))) - set(few):
        images[n] = deconvolve(z[n : n + 1], f, boundary=boundary)
    return torch.cat([images[n] for n in range(len(z))])


class SparseDeconvolver:
    """Paints with filters f (K, C, h, w) onto images of maps (rows, columns), and correlates."""

    def __init__(self, f: Tensor, boundary: Boundary, maps: tuple[int, int]):
        # Imported here because it loads numba.
        from deconvnet.operators import sparse_kernels

        self.kernels = sparse_kernels
        self.f, self.boundary, self.maps = f, boundary, tuple(maps)
        self.size = tuple(f.shape[2:])
        self.flat = _column_by_column(f)
        self.frame = tuple(m + s - 1 for m, s in zip(self.maps, self.size, strict=True))

    def nonzero(self, maps: Tensor) -> Tensor:
        """The flat indices (V,) of the values in the maps (K, rows, columns) of one image."""
        return torch.from_numpy(self.kernels.nonzero(maps.contiguous().numpy().ravel()))

    def places(self, indices: Tensor) -> Places:
        """Where the values of one image are, from their flat indices (V,) into its maps."""
        return self.kernels.by_place(indices.numpy(), *self.maps)

    def paint(self, values: Sequence[Tensor], places: Sequence[Places]) -> Tensor:
        """The images (N, C, H, W) of the values (V,) of every image at their places."""
        frames = self.f.new_zeros(len(places), self.f.shape[1], *self.frame)
        run_all(
            [
                partial(self.kernels.paint, frame, self.flat, self.size, x.numpy(), *where)
                for frame, x, where in zip(frames.numpy(), values, places, strict=True)
            ]
        )
        return self._inside(frames)

    def correlate(self, y: Tensor, places: Sequence[Places]) -> Tensor:
        """(N, V): the correlations of the images with the filters at as many places in each."""
        values = y.new_empty(len(y), len(places[0][1]))
        frames = self._framed(y).numpy()
        run_all(
            [
                partial(self.kernels.correlate_at, frame, self.flat, self.size, x, *where)
                for frame, x, where in zip(frames, values.numpy(), places, strict=True)
            ]
        )
        return values

    def _inside(self, frames: Tensor) -> Tensor:
        """The images of frames: without the border or, if it wraps, with the border added."""
        for axis, maps, side in zip((2, 3), self.maps, self.size, strict=True):
            first, size = 0, maps
            if self.boundary == "circular":
                frames.narrow(axis, 0, side - 1).add_(frames.narrow(axis, maps, side - 1))
            elif self.boundary == "zero":
                first = (side - 1) // 2
            else:
                first, size = side - 1, maps - side + 1
            frames = frames.narrow(axis, first, size)
        return frames.contiguous()

    def _framed(self, y: Tensor) -> Tensor:
        """The images with the border that filters reach, the adjoint of `_inside`."""
        h, w = self.size
        if self.boundary == "circular":
            return F.pad(y, (0, w - 1, 0, h - 1), mode="circular")
        if self.boundary == "zero":
            return F.pad(y, ((w - 1) // 2, w // 2, (h - 1) // 2, h // 2))
        return F.pad(y, (w - 1, w - 1, h - 1, h - 1))


def _column_by_column(f: Tensor) -> np.ndarray:
    """(K, w B): the filters (K, C, h, w) with the h C numbers of a column together, B >= h C."""
    K, C, h, w = f.shape
    # A multiple of the vectors of common processors.
    B = -(-h * C // 8) * 8
    columns = f.permute(0, 3, 2, 1).reshape(K, w, h * C)
    return F.pad(columns, (0, B - h * C)).reshape(K, w * B).detach().contiguous().numpy()
