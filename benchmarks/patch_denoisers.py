"""Denoisers by sparse codes of patches: one to be trained, and one from unsupervised filters.

Both code overlapping patches of an image, each alone and without its mean, as the channels of an
image of one row, and average what the codes paint. `Denoiser` learns every part of it:

    z = s SparseCode(filters, lam)(patch / s)       thresholds learned for every map; s for a patch
    x = z + a z / (|z| + b)                         undoes the shrinkage of what is large, by map
    patch = decoder x + mean + u <wide, around>     moves the mean towards that of the surroundings
    image = weighted mean of the patches            exp(place + v - decay sum |z|) at each pixel

around: the surroundings of a patch, twice as wide, at half the resolution, minus its mean. s, v and
u are learned functions of the patch and of these: of ENERGIES responses to linear filters, without
their sign.

    y images (N, 1, H, W), in [0, 1]   L patches of an image   filters (K, side side, 1, 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet import SolverSettings, sparse_code
from deconvnet.nn import SparseCode

# Patches are so small that FISTA is near the minimum soon: on trained filters the gradient after 30
# iterations had a cosine of 0.994 with the exact one in 0.23 s, that of coordinate descent (to a
# tolerance of 1e-3) one of 0.89 in 0.35 s.
DIFFERENTIABLE = SolverSettings("fista", iterations=25, tolerance=1e-9)
HARD = SolverSettings("coordinate", iterations=30, tolerance=1e-3)
# Patches of a row, whose channels fit into a cache together.
ROW = 128
# The first thresholds in units of the standard deviation of the noise. Shrinkage is undone to this
# part for coefficients far above KNEE, in [0, 1] grey levels.
THRESHOLD, UNDONE, KNEE = 2.0, 0.7, 0.05
ENERGIES = 24


class Denoiser(torch.nn.Module):
    """Noisy grey images (N, 1, H, W) -> denoised ones, by sparse codes of their patches."""

    def __init__(self, filters: Tensor, sigma: float):
        super().__init__()
        K, channels = filters.shape[:2]
        self.patch, threshold = math.isqrt(channels), THRESHOLD * sigma
        self.code = SparseCode(
            filters,
            1 / threshold,
            boundary="circular",
            threshold_per_map=True,
            settings=DIFFERENTIABLE,
        )
        self.decoder = torch.nn.Parameter(self.code.filters.detach()[:, :, 0, 0].clone())
        self.undone = torch.nn.Parameter(torch.full((K, 1), UNDONE * threshold))
        self.log_knee = torch.nn.Parameter(torch.full((K, 1), math.log(KNEE)))
        self.responses = torch.nn.Linear(2 * channels, ENERGIES)
        self.measures = torch.nn.Linear(ENERGIES, 3)
        torch.nn.init.normal_(self.measures.weight, std=0.01)
        self.measures.bias.data = torch.tensor([0.0, 0.0, -2.0])
        self.wide = torch.nn.Parameter(torch.full((channels, 1), 1 / channels))
        self.place = torch.nn.Parameter(torch.zeros(channels, 1))
        self.decay = torch.nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor, stride: int = 1) -> Tensor:
        """Images from their patches at every `stride`-th place of both axes."""
        patches, around = (part(y, self.patch, stride) for part in (patches_of, surroundings_of))
        mean = patches.mean(1, keepdim=True)
        patches, around = patches - mean, around - mean
        energies = self.responses(5 * torch.cat((patches, around), 1).mT).abs().log1p()
        log_s, v, u = self.measures(energies).mT.split(1, dim=1)
        mean = mean + u.sigmoid() * (self.wide.T @ around)
        z = log_s.exp() * coded(patches / log_s.exp(), self.code)
        x = z + self.undone * z / (z.abs() + self.log_knee.exp())
        weight = (self.place + v - self.decay * z.abs().sum(1, True)).exp()
        return averaged(self.decoder.T @ x + mean, weight, y.shape, stride)


def hard_denoised(y: Tensor, filters: Tensor, threshold: float, stride: int) -> Tensor:
    """Denoised images, by codes of their patches with p = 0 and this hard threshold."""
    patches = patches_of(y, math.isqrt(filters.shape[1]), stride)
    mean = patches.mean(1, keepdim=True)
    # A coefficient c of a unit filter is worth its cost of 1 if lam c^2 / 2 exceeds it.
    problem = dict(lam=2 / threshold**2, p=0.0, boundary="circular", settings=HARD)
    z = coded(patches - mean, lambda rows: sparse_code(rows, filters, **problem).z)
    weight = 1 / (1 + (z != 0).sum(1, keepdim=True))
    return averaged(filters[:, :, 0, 0].T @ z + mean, weight, y.shape, stride)


def patches_of(y: Tensor, side: int, stride: int = 1) -> Tensor:
    """(N, side side, L): the patches of grey images (N, 1, H, W) at every `stride`-th place, and
    the last ones of each axis, which `padded` brings to such a place.
    """
    return F.unfold(padded(y, side, stride), side, stride=stride)


def surroundings_of(y: Tensor, side: int, stride: int = 1) -> Tensor:
    """(N, side side, L): the means of 2x2 pixels in squares of twice the side, around each of the
    patches of `patches_of`; images (N, 1, H, W) are mirrored at their borders.
    """
    before, after = side // 2, side - side // 2
    wide = F.pad(padded(y, side, stride), (before, after, before, after), mode="reflect")
    return F.unfold(F.avg_pool2d(wide, 2, 1), side, dilation=2, stride=stride)


def padded(y: Tensor, side: int, stride: int) -> Tensor:
    """Images mirrored at the bottom and the right, so that patches cover all pixels."""
    bottom, right = (-(size - side) % stride for size in y.shape[2:])
    return F.pad(y, (0, right, 0, bottom), mode="reflect") if bottom or right else y


def folded(patches: Tensor, shape: torch.Size, stride: int = 1) -> Tensor:
    """The sum of patches at their places in images of this shape; without a stride, the adjoint of
    `patches_of`.
    """
    side, (H, W) = math.isqrt(patches.shape[1]), shape[2:]
    rows, columns = (size + -(size - side) % stride for size in (H, W))
    return F.fold(patches, (rows, columns), side, stride=stride)[..., :H, :W]


def averaged(patches: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """Images (N, 1, H, W): the weighted mean of the patches that cover each pixel."""
    total = folded(weight.expand_as(patches), shape, stride)
    return folded(weight * patches, shape, stride) / total


def coded(patches: Tensor, code: Callable[[Tensor], Tensor]) -> Tensor:
    """The maps (N, K, L) of patches (N, channels, L), which are arranged in short rows: images
    (rows, channels, 1, ROW), of which `code` gives the maps.
    """
    N, channels, L = patches.shape
    flat = patches.transpose(0, 1).reshape(channels, N * L)
    rows = F.pad(flat, (0, -N * L % ROW)).view(channels, -1, 1, ROW).transpose(0, 1)
    z = code(rows.contiguous()).transpose(0, 1).flatten(1)[:, : N * L]
    return z.unflatten(1, (N, L)).transpose(0, 1)
