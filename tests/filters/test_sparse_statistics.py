"""Sums over non-zero coefficients, compared with whole maps, Fourier transforms and loops."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconvnet.filters import sparse_statistics, statistics
from deconvnet.filters.constraint import normalize
from deconvnet.filters.sparse_statistics import SparseMaps
from deconvnet.filters.statistics import filter_statistics
from deconvnet.operators.convolution import connected, deconvolve, filter_gradient, map_size

BOUNDARIES = ("valid", "circular", "zero")
# (K, C, image, filter); the last: images of the size of the filters.
SHAPES = {
    "square": (3, 1, (13, 13), (3, 3)),
    "rectangular": (2, 2, (9, 16), (2, 5)),
    "even": (3, 1, (12, 11), (4, 2)),
    "1x1 filters": (4, 1, (10, 9), (1, 1)),
    "of the size of the image": (3, 2, (5, 4), (5, 4)),
}
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
cases = pytest.mark.parametrize("name", SHAPES)


@pytest.fixture(autouse=True)
def many_count_as_few(monkeypatch):
    """Tiny maps have room for more than one entry in fifty."""
    monkeypatch.setattr(sparse_statistics, "MAX_DENSITY", 0.2)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(name, boundary, N=3):
    """(maps with a tenth of entries, filters, images); the second image has no entries."""
    K, C, image, size = SHAPES[name]
    z = rand(N, K, *map_size(image, size, boundary), seed=1)
    z = z * (rand(*z.shape, seed=2) > 1.3)
    z[1] = 0
    return z, normalize(rand(K, C, *size, seed=3)), rand(N, C, *image, seed=4)


@cases
@boundaries
def test_the_gradient_is_that_of_whole_maps(name, boundary):
    z, f, y = problem(name, boundary)
    size = tuple(f.shape[2:])
    gradient = SparseMaps.from_dense(z).filter_gradient(y, size, boundary)
    assert gradient.dtype == torch.float64 and gradient.any()
    assert_close(gradient, filter_gradient(z, y, size, boundary=boundary), rtol=1e-10, atol=1e-11)
    total = gradient.clone()
    SparseMaps.from_dense(z).filter_gradient(y, size, boundary, total=total)
    assert_close(total, 2 * gradient, rtol=1e-12, atol=1e-13)


@cases
@boundaries
def test_the_gradient_is_that_of_a_loop_over_entries(name, boundary):
    z, f, y = problem(name, boundary)
    h, w = f.shape[2:]
    H, W = y.shape[2:]
    up = {"valid": (h - 1, w - 1), "circular": (0, 0), "zero": ((h - 1) // 2, (w - 1) // 2)}
    expected = torch.zeros_like(f)
    for n, k, i, j in z.nonzero().tolist():
        for a, c in np.ndindex(h, w):
            row, column = i - up[boundary][0] + a, j - up[boundary][1] + c
            if boundary == "circular":
                row, column = row % H, column % W
            if 0 <= row < H and 0 <= column < W:
                expected[k, :, a, c] += z[n, k, i, j] * y[n, :, row, column]
    gradient = SparseMaps.from_dense(z).filter_gradient(y, (h, w), boundary)
    assert_close(gradient, expected, rtol=1e-10, atol=1e-11)


@cases
@boundaries
def test_the_gradient_is_the_adjoint_of_painting(name, boundary):
    z, f, y = problem(name, boundary)
    gradient = SparseMaps.from_dense(z).filter_gradient(y, tuple(f.shape[2:]), boundary)
    painted = deconvolve(z, f, boundary=boundary)
    assert_close((gradient * f).sum(), (y * painted).sum(), rtol=1e-10, atol=1e-11)


@cases
@boundaries
def test_the_correlations_are_those_by_way_of_fourier(name, boundary):
    z, f, y = problem(name, boundary)
    size = tuple(f.shape[2:])
    gram = SparseMaps.from_dense(z).correlations(size, wrap=boundary == "circular")
    assert gram.dtype == torch.float64
    _, expected = statistics._sums_by_fourier(z, y, size, boundary, None)
    assert_close(gram, expected, rtol=1e-10, atol=1e-10)


@cases
@pytest.mark.parametrize("wrap", [False, True])
def test_the_correlations_are_those_of_a_loop_over_pairs(name, wrap):
    z, f, _ = problem(name, "circular" if wrap else "valid")
    h, w = f.shape[2:]
    rows, columns = z.shape[2:]
    expected = torch.zeros(len(f), len(f), 2 * h - 1, 2 * w - 1, dtype=torch.float64)
    for n, k, i, j in z.nonzero().tolist():
        for a, c in np.ndindex(2 * h - 1, 2 * w - 1):
            row, column = i + a - h + 1, j + c - w + 1
            if wrap:
                row, column = row % rows, column % columns
            if 0 <= row < rows and 0 <= column < columns:
                expected[k, :, a, c] += z[n, k, i, j] * z[n, :, row, column]
    gram = SparseMaps.from_dense(z).correlations((h, w), wrap)
    assert_close(gram, expected, rtol=1e-10, atol=1e-11)


@boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sums_of_an_update_are_equal_both_ways(boundary, dtype, monkeypatch):
    z, f, y = (of.to(dtype) for of in problem("rectangular", boundary))
    g = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=dtype)
    residual = y - deconvolve(z, connected(f, g), boundary=boundary)
    for connectivity in (None, g):
        monkeypatch.setattr(sparse_statistics, "MAX_DENSITY", 0.2)
        assert SparseMaps.from_dense(z) is not None
        few = filter_statistics(z, residual, f, connectivity, boundary=boundary)
        monkeypatch.setattr(sparse_statistics, "MAX_DENSITY", -1.0)
        assert SparseMaps.from_dense(z) is None
        whole = filter_statistics(z, residual, f, connectivity, boundary=boundary)
        near = 1e-10 if dtype == torch.float64 else 1e-4
        assert_close(few.linear, whole.linear, rtol=near, atol=near)
        assert_close(few.gram, whole.gram, rtol=near, atol=near)


@pytest.mark.parametrize("wrap", [False, True])
def test_threads_change_no_bit_of_the_sums(wrap, monkeypatch):
    z, f, y = problem("square", "circular" if wrap else "valid")
    maps, size = SparseMaps.from_dense(z), tuple(f.shape[2:])
    sums = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        gradient = maps.filter_gradient(y, size, "circular" if wrap else "valid")
        sums.append((gradient, maps.correlations(size, wrap), maps.energy()))
    assert all(
        torch.equal(*pair) for other in sums[1:] for pair in zip(sums[0], other, strict=True)
    )
    assert_close(sums[0][2], z.square().sum((0, 2, 3)))


def test_the_order_in_memory_does_not_matter():
    z, f, y = problem("even", "valid")
    moved = z.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not moved.is_contiguous()
    for of in (moved, z.repeat(2, 1, 1, 1)[::2][[0]]):
        few, size = SparseMaps.from_dense(of), tuple(f.shape[2:])
        images = y[: len(of)]
        expected = filter_gradient(of, images, size)
        assert_close(few.filter_gradient(images, size, "valid"), expected, rtol=1e-10, atol=1e-11)
    strided = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    gradient = SparseMaps.from_dense(z).filter_gradient(strided, size, "valid")
    assert_close(gradient, filter_gradient(z, y, size), rtol=1e-10, atol=1e-11)


def test_dense_maps_are_not_few_and_empty_ones_sum_to_zero(monkeypatch):
    monkeypatch.setattr(sparse_statistics, "MAX_DENSITY", 0.02)
    z = torch.zeros(1, 1, 10, 10)
    z[0, 0, 0, :2] = 1
    assert SparseMaps.from_dense(z).shape == (1, 1, 10, 10)
    z[0, 0, 1, 0] = float("nan")
    assert SparseMaps.from_dense(z) is None
    assert SparseMaps.from_dense(torch.zeros(2, 3, 4, 5, device="meta")) is None
    none = SparseMaps.from_dense(torch.zeros(2, 3, 6, 5))
    assert torch.equal(none.energy(), torch.zeros(3, dtype=torch.float64))
    assert not none.correlations((3, 2), wrap=True).any()
    assert not none.filter_gradient(torch.ones(2, 1, 4, 4), (3, 2), "valid").any()


@boundaries
def test_sums_weighted_by_the_curvature_of_layers_below_are_those_of_whole_maps(
    boundary, monkeypatch
):
    z, f, residual = problem("square", boundary)
    curvature = torch.tensor([0.5, 2.0, 3.0]).view(3, 1, 1, 1)
    sparse = filter_statistics(z, residual, f, boundary=boundary, curvature=curvature)
    monkeypatch.setattr(sparse_statistics, "MAX_DENSITY", 0.0)
    dense = filter_statistics(z, residual, f, boundary=boundary, curvature=curvature)
    assert_close(sparse.gram, dense.gram, rtol=1e-10, atol=1e-10)
    assert_close(sparse.linear, dense.linear, rtol=1e-10, atol=1e-10)
