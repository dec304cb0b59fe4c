"""Filters of a gram without shifts against closed forms, gradient steps and their constraint."""

import pytest
import torch
from torch.testing import assert_close

from deconvnet.filters import block_descent, sparse_statistics
from deconvnet.filters.constraint import FilterConstraint
from deconvnet.filters.statistics import FilterStatistics, filter_statistics
from deconvnet.filters.update import Diverged, update_filters
from deconvnet.operators.convolution import BOUNDARIES, deconvolve

K, C = 7, 5
CONSTRAINTS = {
    "unit norm": FilterConstraint(),
    "non-negative": FilterConstraint(non_negative=True),
    "norm of planes": FilterConstraint("plane"),
    "connectivity": FilterConstraint(
        connectivity=(torch.arange(K * C).view(K, C) % 3 > 0).double()
    ),
}
every_constraint = pytest.mark.parametrize("name", CONSTRAINTS)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def statistics(positions=30):
    """Sums over codes of which half are zero, and which do not use the last filter."""
    z, y = rand(positions, K, seed=1).relu(), 3 + rand(positions, C, seed=2)
    z[:, -1] = 0
    return FilterStatistics((z.T @ y)[..., None, None], (z.T @ z)[..., None, None])


def cost(f, s):
    v = f.flatten(1)
    return float((v * (s.gram[..., 0, 0] @ v / 2 - s.linear.flatten(1))).sum())


@every_constraint
def test_no_other_value_of_a_single_filter_is_better(name, monkeypatch):
    monkeypatch.setattr(block_descent, "LEAST_DECREASE", 0.0)
    constraint, s = CONSTRAINTS[name], statistics()
    start = constraint.project(rand(K, C, 1, 1))
    f = update_filters(start, s, constraint, iterations=300)
    assert_close(f, constraint.project(f), rtol=0, atol=1e-12)
    assert_close(f[-1], start[-1])
    lowest = cost(f, s)
    assert lowest < cost(start, s)
    for k in range(K):
        for seed in range(5):
            other = f.clone()
            other[k] = f[k] + 0.3 * rand(C, 1, 1, seed=seed)
            assert cost(constraint.project(other), s) >= lowest - 1e-9


@every_constraint
def test_every_pass_lowers_the_cost(name, monkeypatch):
    monkeypatch.setattr(block_descent, "LEAST_DECREASE", 0.0)
    monkeypatch.setattr(block_descent, "BLOCK", 3)
    constraint, s = CONSTRAINTS[name], statistics()
    start = constraint.project(rand(K, C, 1, 1))
    passes = [update_filters(start, s, constraint, iterations=n) for n in range(1, 6)]
    costs = [cost(f, s) for f in [start, *passes]]
    assert all(after <= before + 1e-12 for before, after in zip(costs, costs[1:], strict=False))
    # The blocks, which are only for speed, change nothing.
    monkeypatch.setattr(block_descent, "BLOCK", 100)
    assert_close(update_filters(start, s, constraint, iterations=5), passes[-1])


def test_one_filter_alone_becomes_its_closed_form():
    s = statistics()
    one = FilterStatistics(s.linear[:1], s.gram[:1, :1])
    f = update_filters(rand(1, C, 1, 1), one)
    assert_close(f[0], s.linear[0] / s.linear[0].norm())


def test_filters_of_patches_are_updated_as_those_of_as_many_channels():
    s, f = statistics(), FilterConstraint().project(rand(K, 1, 1, C))
    patches = update_filters(f, s.of_filters(f))
    channels = update_filters(f.view(K, C, 1, 1), s)
    assert_close(patches.flatten(), channels.flatten())
    # With a taper, the norm of filters is not constant, and the steps are those of the gradient.
    tapered = FilterConstraint(taper=0.3)
    start = tapered.project(f)
    moved = update_filters(start, s.of_filters(f), tapered)
    assert_close(moved, tapered.project(moved))
    assert cost(moved, s) < cost(start, s)


def test_sums_that_are_not_finite_are_refused():
    s = statistics()
    s.linear[0, 0] = torch.nan
    with pytest.raises(Diverged, match="the sums over the images are not finite"):
        update_filters(rand(K, C, 1, 1), s)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("curvature", [None, torch.tensor([0.5, 2.0]).double()])
def test_the_sums_with_1x1_filters_are_matrix_products(boundary, curvature, monkeypatch):
    f, b = rand(K, C, 1, 1, seed=3), rand(2, C, 4, 3, seed=4)
    z = torch.where(rand(2, K, 4, 3, seed=5) > 0.5, rand(2, K, 4, 3, seed=6), 0.0)
    weight = torch.ones(2).double() if curvature is None else curvature
    gram = torch.einsum("n,nkij,nlij->kl", weight, z, z)
    residual = b - deconvolve(z, f, boundary=boundary)
    slope = torch.einsum("nkij,ncij->kc", z, residual)
    for density in (0.0, 1.0):
        monkeypatch.setattr(sparse_statistics, "POINTWISE_DENSITY", density)
        bound = None if curvature is None else curvature.view(2, 1, 1, 1)
        s = filter_statistics(z, residual, f, boundary=boundary, curvature=bound)
        assert_close(s.gram[..., 0, 0], gram)
        assert_close(s.linear[..., 0, 0], gram @ f[..., 0, 0] + slope)
