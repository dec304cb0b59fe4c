"""Small problems of filter learning, with their costs computed by loops, for tests of filters."""

import numpy as np
import pytest
import torch

from deconvnet.filters.constraint import normalize
from deconvnet.filters.statistics import filter_statistics
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.operators.linear import Deconvolution, Scaling, Unpooling
from deconvnet.operators.pooling import max_pool

boundaries = pytest.mark.parametrize("boundary", ("valid", "circular"))


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(boundary="valid", *, N=3, K=3, C=2, size=(3, 4), image=(7, 9), seed=0):
    """(sparse maps, filters of unit norm, target)."""
    rows, columns = map_size(image, size, boundary)
    z = rand(N, K, rows, columns, seed=seed)
    z = z * (z.abs() > 0.8)
    return z, normalize(rand(K, C, *size, seed=seed + 1)), rand(N, C, *image, seed=seed + 2)


def true_cost(f, z, b, boundary, g=None):
    return 0.5 * (b - deconvolve(z, f, g, boundary=boundary)).square().sum()


def sums_of(z, f, b, boundary, g=None):
    residual = b - deconvolve(z, f, g, boundary=boundary)
    return filter_statistics(z, residual, f, g, boundary=boundary)


def gram_times(gram, f):
    """Z'Z f by a loop over pairs of filter pixels: (a, i) and (b, j) meet at the shift a - b."""
    K, C, h, w = f.shape
    product = torch.zeros_like(f)
    for a, b, i, j in np.ndindex(h, h, w, w):
        product[:, :, a, i] += gram[:, :, a - b + h - 1, i - j + w - 1] @ f[:, :, b, j]
    return product


def model_cost(f, sums):
    return (f * (0.5 * gram_times(sums.gram, f) - sums.linear)).sum()


def model_gradient(f, sums):
    return gram_times(sums.gram, f) - sums.linear


def through_a_layer(*, seed=0, boundary="valid"):
    """Two batches (z, b, T) of two images: what maps paint with filters (2, 3, 3, 2), T takes down
    to the images through the switches of a layer below, those of every image its own.
    """
    F1 = Deconvolution(normalize(rand(5, 1, 3, 3, seed=seed)), boundary)
    batches = []
    for number in (1, 2):
        b = rand(2, 1, 14, 15, seed=seed + number)
        maps = F1.adjoint(b)
        pooled, switches = max_pool(maps, (2, 2, 2))
        T = F1 @ Unpooling(switches, maps.shape[1:]) @ Scaling(0.7)
        rows, columns = map_size(tuple(pooled.shape[2:]), (3, 2), boundary)
        z = rand(2, 2, rows, columns, seed=seed + 10 * number)
        batches.append((z * (z.abs() > 0.8), b, T))
    return batches, normalize(rand(2, 3, 3, 2, seed=seed + 5))


def cost_through(batches, f, g=None, boundary="valid"):
    errors = [b - T(deconvolve(z, f, g, boundary=boundary)) for z, b, T in batches]
    return 0.5 * sum(error.square().sum() for error in errors)


def matrix_through(batches, f, g=None, boundary="valid"):
    """T Z of all images as one matrix from the filters, and the images."""
    impulses = torch.eye(f.numel(), dtype=f.dtype).view(-1, *f.shape)
    columns = [
        torch.cat([T(deconvolve(z, e, g, boundary=boundary)).flatten() for z, _, T in batches])
        for e in impulses
    ]
    return torch.stack(columns, 1), torch.cat([b.flatten() for _, b, _ in batches])
