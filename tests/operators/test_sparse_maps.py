"""Painting and correlating values at their places, compared with convolutions of whole maps."""

import pytest
import torch
from torch.testing import assert_close

from deconvnet.operators import sparse_maps
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.operators.linear import (
    Composition,
    Deconvolution,
    Mask,
    UnpooledDeconvolution,
    Unpooling,
    dot,
    norm,
)
from deconvnet.operators.pooling import max_pool
from deconvnet.operators.sparse_maps import deconvolve_sparse

BOUNDARIES = ("valid", "zero", "circular")
DTYPES = (torch.float32, torch.float64)
SIZES = ((3, 3), (4, 5), (1, 4))
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True)
def small_maps_count_as_large(monkeypatch):
    monkeypatch.setattr(sparse_maps, "FEW_PRODUCTS", 0)


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def problem(boundary="valid", size=(3, 4), dtype=torch.float64, *, K=20, window=(4, 3, 2)):
    """(F, U, pooled maps, images); with up to five values at one place."""
    image = (9, 11)
    F = Deconvolution(rand(K, 2, *size, dtype=dtype), boundary)
    z = rand(3, K, *map_size(image, size, boundary), seed=1, dtype=dtype)
    # All groups have their maximum at this place.
    z[:, :, 1, 1] += 9
    pooled, switches = max_pool(z, window)
    return F, Unpooling(switches, z.shape[1:]), pooled, rand(3, 2, *image, seed=2, dtype=dtype)


def tolerance(dtype, scale):
    return dict(rtol=0, atol=100 * torch.finfo(dtype).eps * float(scale))


@dtypes
@sizes
@boundaries
def test_values_at_their_switches_paint_what_the_unpooled_maps_paint(boundary, size, dtype):
    F, U, pooled, y = problem(boundary, size, dtype)
    fused, dense = UnpooledDeconvolution(F, U), Composition(F, U)
    assert fused.sparse
    painted, correlated = dense(pooled), dense.adjoint(y)
    assert_close(fused(pooled), painted, **tolerance(dtype, painted.abs().max()))
    assert_close(fused.adjoint(y), correlated, **tolerance(dtype, correlated.abs().max()))


@boundaries
def test_correlating_at_the_switches_is_the_adjoint_of_painting(boundary):
    F, U, pooled, y = problem(boundary, (4, 5))
    A = UnpooledDeconvolution(F, U)
    painted = A(pooled)
    difference = dot(painted, y) - dot(pooled, A.adjoint(y))
    assert (difference.abs() <= 1e-13 * norm(painted) * norm(y)).all()


def test_an_image_alone_and_in_a_batch_and_on_several_threads_has_the_same_bits():
    F, U, pooled, y = problem(dtype=torch.float32)
    A = UnpooledDeconvolution(F, U)
    painted, correlated = A(pooled), A.adjoint(y)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(A(pooled), painted)
            assert torch.equal(A.adjoint(y), correlated)
    finally:
        torch.set_num_threads(before)
    for n in range(3):
        image = slice(n, n + 1)
        for alone in (A[image], UnpooledDeconvolution(F, U[image])):
            assert torch.equal(alone(pooled[image]), painted[image])
            assert torch.equal(alone.adjoint(y[image]), correlated[image])


@boundaries
def test_sparse_maps_are_painted_as_by_convolution_and_dense_ones_are_convolved(boundary):
    F, U, pooled, _ = problem(boundary, dtype=torch.float32)
    z = U(pooled)
    z[1] = rand(*z.shape[1:], seed=3)
    z[2] = 0
    painted, expected = deconvolve_sparse(z, F.f, boundary=boundary), F(z)
    assert_close(painted, expected, **tolerance(z.dtype, expected.abs().max()))
    assert torch.equal(painted[1:2], deconvolve(z[1:2], F.f, boundary=boundary))
    assert not painted[2].any()
    for n in range(3):
        image = slice(n, n + 1)
        alone = deconvolve_sparse(z[image], F.f, boundary=boundary)
        assert torch.equal(alone, painted[image])


def test_a_sparse_deconvolution_stays_sparse_in_other_units_and_under_a_mask():
    F, U, pooled, y = problem()
    sparse = Deconvolution(F.f, sparse=True)
    mask = Mask((rand(3, 1, 9, 11, seed=5) > 0).double(), y)
    assert (mask @ sparse).sparse and sparse[:1].sparse
    scaled, exponent = Deconvolution(2.0**300 * F.f, sparse=True).normalised()
    assert scaled.sparse and exponent
    assert_close((mask @ sparse)(U(pooled)), (mask @ F)(U(pooled)))
    fused, e = UnpooledDeconvolution(Deconvolution(2.0**300 * F.f), U).normalised()
    assert e == exponent and fused.sparse
    assert_close(fused(pooled), scaled(U(pooled)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_lost(value):
    F, U, pooled, y = problem(dtype=torch.float32)
    A = UnpooledDeconvolution(F, U)
    pooled[0, 0, 1, 1] = y[0, 0, 4, 4] = value
    assert not torch.isfinite(A(pooled)[0]).all() and torch.isfinite(A(pooled)[1:]).all()
    assert not torch.isfinite(A.adjoint(y)[0]).all() and torch.isfinite(A.adjoint(y)[1:]).all()
    assert not torch.isfinite(deconvolve_sparse(U(pooled), F.f)[0]).all()


def test_gradients_a_reflected_border_and_maps_with_many_values_leave_it_to_convolutions():
    F, U, pooled, y = problem()
    A, dense = UnpooledDeconvolution(F, U), Composition(F, U)
    for function, expected, array in (
        (A, dense, pooled),
        (A.adjoint, dense.adjoint, y),
        (lambda z: deconvolve_sparse(z, F.f), F, U(pooled)),
    ):
        gradients = []
        for of in (function, expected):
            leaf = array.clone().requires_grad_()
            of(leaf).square().sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
    assert not sparse_maps.pays(F.f, 1, (20, 11, 14), "reflect")
    assert not sparse_maps.pays(F.f, 20 * 11 * 14 // 2, (20, 11, 14), "valid")
    assert not sparse_maps.pays(F.f.clone().requires_grad_(), 1, (20, 11, 14), "valid")
    assert not sparse_maps.pays(F.f.to("meta"), 1, (20, 11, 14), "valid")
