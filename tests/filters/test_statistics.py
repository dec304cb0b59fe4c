"""Sums over images against loops, autograd and the true cost."""

import numpy as np
import pytest
import torch
from filter_problems import (
    boundaries,
    cost_through,
    matrix_through,
    model_cost,
    model_gradient,
    problem,
    rand,
    sums_of,
    through_a_layer,
    true_cost,
)
from torch.testing import assert_close

from deconvnet.filters.statistics import filter_statistics
from deconvnet.filters.update import update_filters
from deconvnet.operators.convolution import deconvolve


@boundaries
def test_the_gram_is_the_correlation_of_the_maps_at_every_shift(boundary):
    z, f, b = problem(boundary)
    h, w = f.shape[2:]
    gram = sums_of(z, f, b, boundary).gram
    assert gram.dtype == torch.float64 and gram.shape == (3, 3, 2 * h - 1, 2 * w - 1)
    rows, columns = z.shape[2:]
    for i, j in np.ndindex(2 * h - 1, 2 * w - 1):
        shift = (i - h + 1, j - w + 1)
        if boundary == "circular":
            moved = z.roll((-shift[0], -shift[1]), (2, 3))
        else:
            moved = torch.zeros_like(z)
            for a, c in np.ndindex(rows, columns):
                if 0 <= a + shift[0] < rows and 0 <= c + shift[1] < columns:
                    moved[:, :, a, c] = z[:, :, a + shift[0], c + shift[1]]
        expected = torch.einsum("nkab,njab->kj", z, moved)
        assert_close(gram[:, :, i, j], expected, rtol=1e-10, atol=1e-10)
    assert_close(gram, gram.flip(2, 3).transpose(0, 1), rtol=1e-10, atol=1e-10)
    energy = z.square().sum((0, 2, 3))
    assert_close(sums_of(z, f, b, boundary).energy, energy, rtol=1e-12, atol=0)


@boundaries
def test_the_gradient_of_the_sums_is_that_of_the_true_cost(boundary):
    z, f, b = problem(boundary)
    leaf = f.clone().requires_grad_()
    (expected,) = torch.autograd.grad(true_cost(leaf, z, b, boundary), leaf)
    assert_close(model_gradient(f, sums_of(z, f, b, boundary)), expected, rtol=1e-10, atol=1e-10)


def test_where_the_border_wraps_the_sums_are_the_true_cost_of_all_filters():
    z, f, b = problem("circular")
    sums = sums_of(z, f, b, "circular")
    constant = true_cost(f, z, b, "circular") - model_cost(f, sums)
    assert constant.item() == pytest.approx(0.5 * b.square().sum().item(), rel=1e-10)
    for seed in range(5):
        other = 3 * rand(*f.shape, seed=50 + seed)
        expected = true_cost(other, z, b, "circular")
        assert_close(model_cost(other, sums) + constant, expected, rtol=1e-10, atol=1e-9)


def test_where_the_border_does_not_wrap_the_sums_lie_above_the_true_cost_and_touch_it():
    z, f, b = problem("valid")
    sums = sums_of(z, f, b, "valid")
    constant = true_cost(f, z, b, "valid") - model_cost(f, sums)
    for seed in range(20):
        other = f + 10.0 ** (-seed / 5) * rand(*f.shape, seed=50 + seed)
        excess = model_cost(other, sums) + constant - true_cost(other, z, b, "valid")
        size = (other - f).square().sum()
        # Quadratic in the step: a wrong gradient would show as an excess of another order.
        assert 1e-3 * size < excess < 1e3 * size


@boundaries
def test_the_sums_of_a_bound_lie_above_the_cost_through_a_layer_and_touch_it(boundary):
    batches, f = through_a_layer(boundary=boundary)
    sums = None
    for z, b, T in batches:
        residual = b - T(deconvolve(z, f, boundary=boundary))
        curvature = T.squared_norm(b)
        new = filter_statistics(z, T.adjoint(residual), f, boundary=boundary, curvature=curvature)
        sums = new if sums is None else sums + new
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cost_through(batches, leaf, boundary=boundary), leaf)
    assert_close(model_gradient(f, sums), gradient, rtol=1e-10, atol=1e-9)
    constant = cost_through(batches, f, boundary=boundary) - model_cost(f, sums)
    TZ, _ = matrix_through(batches, f, boundary=boundary)
    # The direction in which the cost is most curved, and any others.
    steepest = torch.linalg.svd(TZ, full_matrices=False).Vh[0].view(f.shape)
    for seed in range(20):
        step = 10.0 ** (-seed / 5) * (rand(*f.shape, seed=50 + seed) if seed % 4 else steepest)
        excess = model_cost(f + step, sums) + constant
        excess = excess - cost_through(batches, f + step, boundary=boundary)
        assert 1e-3 * step.square().sum() < excess < 1e4 * step.square().sum()
    # So that what lowers the one lowers the other.
    before = cost_through(batches, f, boundary=boundary)
    for iterations in (1, 10, 100):
        updated = update_filters(f, sums, iterations=iterations)
        assert cost_through(batches, updated, boundary=boundary) < before * (1 - 1e-3)


def test_a_curvature_of_one_is_no_bound_but_the_sums_themselves():
    z, f, b = problem("valid")
    residual = b - deconvolve(z, f)
    ones = torch.ones(len(z), 1, 1, 1, dtype=z.dtype)
    plain, bound = (
        filter_statistics(z, residual, f),
        filter_statistics(z, residual, f, curvature=ones),
    )
    assert torch.equal(plain.gram, bound.gram) and torch.equal(plain.linear, bound.linear)


@boundaries
def test_sums_of_batches_add_to_those_of_their_union_in_any_order(boundary):
    z, f, b = problem(boundary, N=5)
    whole = sums_of(z, f, b, boundary)
    parts = sums_of(z[:2], f, b[:2], boundary) + sums_of(z[2:], f, b[2:], boundary)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = sums_of(z[order], f, b[order], boundary)
    for other in (parts, permuted, whole * 2 + whole * -1):
        assert_close(other.linear, whole.linear, rtol=1e-11, atol=1e-11)
        assert_close(other.gram, whole.gram, rtol=1e-11, atol=1e-11)
    assert_close(update_filters(f, permuted), update_filters(f, whole), rtol=1e-9, atol=1e-10)


def test_statistics_without_a_filter_keep_those_of_the_others():
    z, f, b = problem("valid")
    sums = sums_of(z, f, b, "valid")
    without = sums.without([1])
    assert without.linear[1].abs().sum() == 0
    assert without.gram[1].abs().sum() == without.gram[:, 1].abs().sum() == 0
    keep = torch.tensor([0, 2])
    assert torch.equal(without.linear[keep], sums.linear[keep])
    assert torch.equal(without.gram[keep][:, keep], sums.gram[keep][:, keep])
    assert sums.gram[1].abs().sum() > 0


def test_maps_in_single_precision_give_sums_in_double_precision_that_agree():
    z, f, b = problem("valid")
    sums = sums_of(z, f, b, "valid")
    single = sums_of(z.float(), f.float(), b.float(), "valid")
    for updated, expected in ((single.linear, sums.linear), (single.gram, sums.gram)):
        assert updated.dtype == torch.float64
        assert (updated - expected).abs().max() < 1e-5 * expected.abs().max()
    assert update_filters(f.float(), single).dtype == torch.float32
