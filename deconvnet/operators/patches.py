"""Patches of images, and the images that patches paint together.

    y images (N, C, H, W)   z maps (N, K, rows, columns)   f filters (K, C, h, w)

The patch at a position of the maps is the part of the image that an impulse there would paint. With
patches as channels, 1x1 filters explain each patch by the coefficients at its position alone.
Neighbouring patches overlap: the image that they paint together is their average.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deconvnet.operators.convolution import Boundary, correlate, deconvolve
from deconvnet.operators.linear import LinearOperator
from deconvnet.operators.sparse_maps import deconvolve_sparse
from deconvnet.support.validation import check_tensors

# With "reflect" the maps, not the image, are continued, so there is no patch that they explain.
PATCH_BOUNDARIES = ("valid", "circular", "zero")


def extract_patches(y: Tensor, size: tuple[int, int], boundary: Boundary = "valid") -> Tensor:
    """(N, C h w, rows, columns): the patch (C, h, w) at every position of the maps, E y.

    y: (N, C, H, W); size: (h, w); rows and columns: as `map_size`. Beyond the border the image is
    zero or, with boundary "circular", begins again at the opposite side. E is the adjoint of
    `deconvolve` with one impulse as the filter of each of the C h w maps.
    """
    check_tensors(y=y)
    if boundary not in PATCH_BOUNDARIES:
        raise ValueError(f"boundary={boundary}: patches need {' or '.join(PATCH_BOUNDARIES)}")
    h, w = size
    if boundary == "circular":
        y = F.pad(y, (0, w - 1, 0, h - 1), mode="circular")
    elif boundary == "zero":
        y = F.pad(y, ((w - 1) // 2, w // 2, (h - 1) // 2, h // 2))
    else:
        y = F.pad(y, (w - 1, w - 1, h - 1, h - 1))
    rows, columns = y.shape[2] - h + 1, y.shape[3] - w + 1
    return F.unfold(y, (h, w)).view(len(y), -1, rows, columns)


class PatchAverage(LinearOperator):
    """P: maps (N, K, rows, columns) -> image (N, C, H, W), the average of the patches they paint.

    The patch of a position is the sum over k of z_k f_k there, times its norm. f: (K, C, h, w);
    norms: (N, 1, rows, columns), None: 1 everywhere. size: (rows, columns) of the maps.
    """

    def __init__(
        self, f: Tensor, norms: Tensor | None, size: tuple[int, int], boundary: Boundary = "valid"
    ):
        self.f, self.norms, self.boundary = f, norms, boundary
        ones = f.new_ones(1, 1, *size), f.new_ones(1, 1, *f.shape[2:])
        # Rounded, as it is a whole number: the number of patches that contain a pixel.
        self.coverage = deconvolve(*ones, boundary=boundary).round()

    def __getitem__(self, images: slice) -> PatchAverage:
        if self.norms is None:
            return self
        size = tuple(self.norms.shape[2:])
        return PatchAverage(self.f, self.norms[images], size, self.boundary)

    def __call__(self, z: Tensor) -> Tensor:
        z = z if self.norms is None else self.norms * z
        return deconvolve_sparse(z, self.f, boundary=self.boundary) / self.coverage

    def adjoint(self, y: Tensor) -> Tensor:
        z = correlate(y / self.coverage, self.f, boundary=self.boundary)
        return z if self.norms is None else self.norms * z

    def curvature(self) -> float | Tensor:
        squares = float(self.f.detach().double().square().sum((1, 2, 3)).amax())
        squares = squares / float(self.coverage.amax()) ** 2
        if self.norms is None:
            return squares
        return squares * self.norms.double().square().amax((1, 2, 3), keepdim=True)
