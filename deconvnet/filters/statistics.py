"""The sums over images from which filters are learned.

    z maps (N, K, H+h-1, W+w-1)   b target (N, C, H, W)   f filters (K, C, h, w)
    g connectivity (K, C)   T from what the layer synthesizes to b: identity or layers below

With the maps fixed, the cost 1/2 ||T Z f - b||^2 is quadratic in the filters. Without T, two sums
over the images determine it, whose size does not depend on the number of images:

    linear  Z'b   (K, C, h, w)
    gram    Z'Z   (K, K, 2h-1, 2w-1): the correlation of each pair of maps at all shifts of filters

The sums of batches are added, and nothing else passes from inference to learning. They are float64,
because the filters depend on them alone. If every image has its own T, no sums of fixed size
represent the cost; an upper bound is used instead, ||T||^2 Z'Z with the true gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.filters.sparse_statistics import SparseMaps
from deconvnet.operators.convolution import (
    Boundary,
    connected,
    continued,
    deconvolve,
    fourier_size,
)
from deconvnet.operators.linear import Mask

# Complex numbers per block of products of spectra; on a CPU a block should fit into the cache.
BLOCK, BLOCK_ON_CPU = 2**22, 2**17


@dataclass(frozen=True)
class FilterStatistics:
    """The quadratic cost of filters f, 1/2 f'(gram)f - (linear)'f, summed over images.

    linear: (K, C, h, w), gram: (K, K, 2h-1, 2w-1) with shift 0 in the middle; float64. If z
    explains patches, gram is (K, K, 1, 1): patches at different positions have nothing in common.
    """

    linear: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, f: Tensor) -> FilterStatistics:
        """The sums over no image, for filters (K, C, h, w)."""
        K, _, h, w = f.shape
        gram = f.new_zeros(K, K, 2 * h - 1, 2 * w - 1, dtype=torch.float64)
        return cls(torch.zeros_like(f, dtype=torch.float64), gram)

    def __add__(self, other: FilterStatistics) -> FilterStatistics:
        return FilterStatistics(self.linear + other.linear, self.gram + other.gram)

    def __mul__(self, factor: float) -> FilterStatistics:
        return FilterStatistics(self.linear * factor, self.gram * factor)

    @property
    def energy(self) -> Tensor:
        """(K,): the sum of squares of each map."""
        rows, columns = self.gram.shape[2:]
        return self.gram[..., rows // 2, columns // 2].diagonal()

    def of_filters(self, f: Tensor) -> FilterStatistics:
        """The same sums for filters of patches f (K, C, h, w), not for their C h w channels."""
        return replace(self, linear=self.linear.view(f.shape))

    def without(self, filters: list[int]) -> FilterStatistics:
        """The same sums with all entries that involve these filters set to zero."""
        linear, gram = self.linear.clone(), self.gram.clone()
        linear[filters], gram[filters], gram[:, filters] = 0, 0, 0
        return FilterStatistics(linear, gram)


def filter_statistics(
    z: Tensor,
    residual: Tensor,
    f: Tensor,
    g: Tensor | None = None,
    *,
    boundary: Boundary = "valid",
    curvature: Tensor | None = None,
    maps: SparseMaps | None = None,
) -> FilterStatistics:
    """The sums over a batch of maps z (N, K, H+h-1, W+w-1) with this residual for filters f.

    residual: b - Z f (N, C, H, W); through layers below, T'(b - T Z f). curvature: (N, 1, 1, 1), an
    upper bound of ||T||^2 for each image; None: T is the identity. maps: `sparse_maps` of z, if the
    caller has them.

    gram is the correlation of the whole maps, including the parts painted beyond the border. Unless
    the border wraps, it slightly exceeds Z'Z, so the quadratic cost is an upper bound of the true
    cost that is tight at f: lowering the bound lowers the cost. `linear` is chosen so that the
    gradient at f is the true one, -Z'(b - Z f).
    """
    h, w = f.shape[2:]
    maps = sparse_maps(z, (h, w), boundary) if maps is None else maps
    if maps is None and (h, w) == (1, 1):
        gradient, gram = _pointwise_sums(z, -residual, curvature)
    elif maps is None:
        gradient, gram = _sums_by_fourier(z, -residual, (h, w), boundary, curvature)
    else:
        gradient = maps.filter_gradient(-residual, (h, w), boundary)
        weighted = maps if curvature is None else maps.times(curvature.double().sqrt())
        gram = weighted.correlations((h, w), wrap=boundary == "circular")
    return FilterStatistics(gram_product(gram, (h, w))(f.double()) - connected(gradient, g), gram)


def sparse_maps(z: Tensor, size: tuple[int, int], boundary: Boundary) -> SparseMaps | None:
    """The non-zero coefficients of maps z, if sums with filters of size (h, w) are faster so."""
    pointwise = tuple(size) == (1, 1)
    if boundary == "reflect" and not pointwise:
        return None
    return SparseMaps.from_dense(z, pointwise=pointwise)


def masked_statistics(
    z: Tensor,
    residual: Tensor,
    f: Tensor,
    mask: Mask,
    g: Tensor | None = None,
    *,
    boundary: Boundary = "valid",
) -> FilterStatistics:
    """The sums over a batch of maps z with this residual M (b - Z f) of images seen through a mask.

    Z'M^2 Z is no correlation of maps, so rho Z'Z takes its place, with the true gradient at f:

        rho = ||M Z f||^2 / ||Z f||^2, at least max(mask^2) / 2, for each image

    the part of what the maps paint that is seen. With rho = max(mask^2) the sums are an upper bound
    of the cost, that of the images with the unseen pixels filled in by Z f (expectation
    maximisation). Half of it suffices: if G is the true quadratic term and d the step to the
    minimum of the sums within a convex constraint, (gradient)'d <= -rho d'Z'Z d, so the cost
    changes by at most d'(G/2 - rho Z'Z) d <= 0. (Unit norm is not convex: there, this is a motive
    and not a proof.) If pixels are missing at random, rho Z'Z is the expectation of G, and the step
    is as long as without a mask.
    """
    painted, weights = deconvolve(z, f, g, boundary=boundary).double(), mask.mask.double()
    seen, energy = (y.square().sum((1, 2, 3)) for y in (weights * painted, painted))
    largest = weights.amax((1, 2, 3)).square().expand(len(z))
    rho = torch.where(energy > 0, seen / energy, largest)
    # Where nothing is seen the maps are 0, and any positive number will do.
    rho = torch.where(largest > 0, torch.maximum(rho, largest / 2), torch.ones_like(rho))
    # Maps scaled by s have s^2 Z'Z, and with a residual scaled by 1/s the same gradient.
    s = rho.sqrt().to(z).view(-1, 1, 1, 1)
    return filter_statistics(s * z, mask.adjoint(residual) / s, f, g, boundary=boundary)


def gram_product(gram: Tensor, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The function v (K, C, h, w) -> Z'Z v: convolution with the gram (K, K, 2h-1, 2w-1).

    One matrix product per frequency; the transform of the gram is computed once. A gram without
    shifts, (K, K, 1, 1), is a single matrix.
    """
    if gram.shape[2:] == (1, 1):
        return lambda v: (gram[..., 0, 0] @ v.flatten(1)).view(v.shape)
    h, w = size
    grid = fourier_size((2 * h - 1, 2 * w - 1))
    K = len(gram)
    spectrum = gram.new_empty(grid[0], grid[1] // 2 + 1, K, K, dtype=torch.complex128)
    # A few rows of pairs at a time: memory holds little more than the gram and its spectrum.
    rows = max(1, BLOCK // (K * grid[0] * grid[1]))
    for k in range(0, K, rows):
        kernel = F.pad(gram[k : k + rows], (0, grid[1] - 2 * w + 1, 0, grid[0] - 2 * h + 1))
        kernel = kernel.roll((1 - h, 1 - w), (2, 3))
        spectrum[:, :, k : k + rows] = torch.fft.rfft2(kernel).permute(2, 3, 0, 1)

    def product(v: Tensor) -> Tensor:
        moved = spectrum @ torch.fft.rfft2(v, grid).permute(2, 3, 0, 1)
        return torch.fft.irfft2(moved.permute(2, 3, 0, 1), grid)[..., :h, :w]

    return product


def _pointwise_sums(z: Tensor, y: Tensor, curvature: Tensor | None) -> tuple[Tensor, Tensor]:
    """Z'y (K, C, 1, 1), and the sums of z_k z_j over positions, (K, K, 1, 1), each image weighted
    by its curvature; float64.
    """
    K, C = z.shape[1], y.shape[1]
    gradient, gram = (z.new_zeros(K, n, dtype=torch.float64) for n in (C, K))
    weights = [1.0] * len(z) if curvature is None else curvature.flatten().tolist()
    for maps, image, weight in zip(z.flatten(2), y.flatten(2), weights, strict=True):
        maps = maps.double()
        gradient += maps @ image.double().T
        gram += weight * (maps @ maps.T)
    return gradient[..., None, None], gram[..., None, None]


def _sums_by_fourier(
    z: Tensor, y: Tensor, size: tuple[int, int], boundary: Boundary, curvature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Z'y (K, C, h, w), and the sums of z_k[i] z_j[i + shift], (K, K, 2h-1, 2w-1) with shift 0 in
    the middle, each image weighted by its curvature; float64.

    Only a few shifts of the correlations are needed, so the inverse Fourier transform is replaced
    by products with some of its rows. Shifts up equal shifts down with the two maps exchanged.
    Products are float64, so the result does not depend on which images share a batch.
    """
    (h, w), K = size, z.shape[1]
    z = continued(z, size, boundary)
    grid = tuple(z.shape[2:])
    if boundary != "circular":
        grid = fourier_size((grid[0] + h - 1, grid[1] + w - 1))
        y = F.pad(y, (w - 1, 0, h - 1, 0))
    spectra = torch.cat([torch.fft.rfft2(z, grid), torch.fft.rfft2(y, grid)], 1)
    spectra = spectra.permute(3, 2, 1, 0).contiguous()
    rows = _inverse_transform_rows(range(h), grid[0], z.device)
    columns = _inverse_transform_rows(range(1 - w, w), grid[1], z.device)
    block = BLOCK_ON_CPU if z.device.type == "cpu" else BLOCK
    sums_by_row = []
    for part in spectra.split(max(1, block // (grid[0] * K * spectra.shape[2]))):
        part = part.to(torch.complex128)
        maps = part[..., :K, :].conj()
        if curvature is None:
            products = maps @ part.mT
        else:
            weighted = maps * curvature.flatten()
            products = torch.cat([weighted @ part[..., :K, :].mT, maps @ part[..., K:, :].mT], 3)
        sums_by_row.append(rows @ products.flatten(2))
    # The transform of real maps is determined by its first half: all but its ends count twice.
    half = spectra.shape[0]
    columns = columns[:, :half] / (grid[0] * grid[1])
    columns[:, 1 : half - (grid[1] % 2 == 0)] *= 2
    by_row = torch.cat(sums_by_row).flatten(1)
    sums = columns.real @ by_row.real - columns.imag @ by_row.imag
    sums = sums.view(2 * w - 1, h, K, -1).permute(2, 3, 1, 0)
    down = sums[:, :K]
    up = down[:, :, 1:].transpose(0, 1).flip(2, 3)
    return sums[:, K:, :, w - 1 :].contiguous(), torch.cat([up, down], 2)


def _inverse_transform_rows(shifts: range, length: int, device: torch.device) -> Tensor:
    """(shifts, length), complex128: rows of the inverse transform, not divided by the length."""
    frequencies = torch.arange(length, device=device)
    turns = torch.tensor(shifts, device=device)[:, None] * frequencies % length
    angle = turns.double() * (2 * math.pi / length)
    return torch.polar(torch.ones_like(angle), angle)
