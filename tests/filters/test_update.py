"""Filter learning against autograd, loops, dense normal equations and planted filters."""

import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconvnet.filters.care import centring_shifts, dead_filters, duplicate_filters, shift
from deconvnet.filters.constraint import FilterConstraint, normalize
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.statistics import filter_statistics
from deconvnet.filters.update import LearningSettings, update_filters, update_filters_by_cg
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.operators.linear import Deconvolution, Identity, Scaling, Unpooling
from deconvnet.operators.pooling import max_pool
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import solve

BOUNDARIES = ("valid", "circular")
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(boundary="valid", *, N=3, K=3, C=2, size=(3, 4), image=(7, 9), seed=0):
    """(sparse maps, filters of unit norm, what is explained)."""
    rows, columns = map_size(image, size, boundary)
    z = rand(N, K, rows, columns, seed=seed)
    z = z * (z.abs() > 0.8)
    return z, normalize(rand(K, C, *size, seed=seed + 1)), rand(N, C, *image, seed=seed + 2)


def true_cost(f, z, b, boundary, g=None):
    return 0.5 * (b - deconvolve(z, f, g, boundary=boundary)).square().sum()


def sums_of(z, f, b, boundary, g=None):
    residual = b - deconvolve(z, f, g, boundary=boundary)
    return filter_statistics(z, residual, f, g, boundary=boundary)


def batch(z, f, b, boundary, g=None):
    """What `update_filters_by_cg` goes through: these maps, all at once, nothing below them."""
    residual = b - deconvolve(z, f, g, boundary=boundary)
    return lambda: [(z, residual, Identity())]


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


def test_where_it_does_not_the_sums_lie_above_the_true_cost_and_touch_it():
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
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_updates_never_raise_the_true_cost_and_keep_unit_norms(boundary, norm):
    lowered = 0
    for seed in range(12):
        K, C = 1 + seed % 4, 1 + seed % 3
        image = (7, 9) if seed % 2 else (4, 12)
        z, f, b = problem(boundary, K=K, C=C, image=image, seed=10 * seed)
        # Maps of very different energy, as those of rare filters.
        z = z * torch.logspace(0, -3, K, dtype=torch.float64).view(-1, 1, 1)
        f = normalize(f, norm)
        found = update_filters(
            f, sums_of(z, f, b, boundary), FilterConstraint(norm), iterations=1 + seed
        )
        before, after = (true_cost(v, z, b, boundary).item() for v in (f, found))
        assert after <= before * (1 + 1e-12)
        lowered += after < before * (1 - 1e-3)
        axes = (2, 3) if norm == "plane" else (1, 2, 3)
        length = torch.linalg.vector_norm(found, dim=axes)
        assert_close(length, torch.ones_like(length), rtol=1e-12, atol=0)
    assert lowered >= 10


@boundaries
def test_more_iterations_never_end_at_a_higher_cost(boundary):
    rose = 0
    for seed in range(3):
        z, f, b = problem(boundary, K=4, seed=10 * seed)
        # Smooth maps that resemble each other: momentum overshoots.
        z = torch.nn.functional.avg_pool2d(z, 3, 1, padding=1) + 0.5 * z.mean(1, keepdim=True)
        sums = sums_of(z, f, b, boundary)
        found = [update_filters(f, sums, iterations=n) for n in range(30, 61)]
        costs = torch.stack([model_cost(f, sums)] + [model_cost(v, sums) for v in found])
        assert (costs.diff() <= 1e-12 * costs.abs().max()).all()
        rose += (costs.diff() == 0).any().item()
    # Some iteration was no better than the one before, so that the best one had to be kept.
    assert rose


@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_updates_converge_to_a_stationary_point_on_the_spheres(norm):
    z, f, b = problem("circular", N=6)
    f = normalize(f, norm)
    sums = sums_of(z, f, b, "circular")
    found = update_filters(f, sums, FilterConstraint(norm), iterations=1000)
    # Z'Z as a matrix between the pixels of two filters, the same for every channel.
    K, C, h, w = f.shape
    impulses = torch.eye(K * h * w, dtype=f.dtype).view(K, h, w, -1).movedim(3, 1)
    matrix = gram_times(sums.gram, impulses).movedim(1, 3).reshape(K * h * w, -1)
    step = 1 / torch.linalg.matrix_norm(matrix, 2)
    brute = f
    for _ in range(3000):
        pixels = brute.movedim(1, 3).reshape(-1, C)
        gradient = (matrix @ pixels).view(K, h, w, C).movedim(3, 1) - sums.linear
        brute = normalize(brute - step * gradient, norm)
    axes = (2, 3) if norm == "plane" else (1, 2, 3)
    for v in (found, brute):
        gradient = model_gradient(v, sums)
        tangent = gradient - (gradient * v).sum(axes, keepdim=True) * v
        assert tangent.norm() < 1e-5 * sums.linear.norm()
    assert_close(model_cost(found, sums), model_cost(brute, sums), rtol=1e-6, atol=0)
    assert_close(found, brute, rtol=0, atol=1e-3)


@boundaries
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_disconnected_planes_stay_zero(boundary, norm):
    g = torch.tensor([[1, 0], [0, 1], [1, 1]])
    z, f, b = problem(boundary)
    sums = sums_of(z, f, b, boundary, g)
    constraint = FilterConstraint(norm, connectivity=g)
    f0 = normalize(f * g[:, :, None, None], norm)
    for start in (f, f0):
        found = [
            update_filters(start, sums, constraint),
            update_filters_by_cg(
                start, batch(z, start, b, boundary, g), constraint, boundary=boundary
            ),
        ]
        for updated in found:
            planes = torch.linalg.vector_norm(updated, dim=(2, 3))
            assert torch.equal(planes != 0, g.bool())
            axes = (2, 3) if norm == "plane" else (1, 2, 3)
            length = torch.linalg.vector_norm(updated, dim=axes)
            assert_close(length[length > 0], torch.ones_like(length[length > 0]))
    assert true_cost(
        update_filters(f0, sums_of(z, f0, b, boundary, g), constraint), z, b, boundary
    ) < (true_cost(f0, z, b, boundary))


def dense_system(z, f, b, boundary):
    """Z as a matrix from the filters to the images."""
    impulses = torch.eye(f.numel(), dtype=f.dtype).view(-1, *f.shape)
    return torch.stack([deconvolve(z, e, boundary=boundary).flatten() for e in impulses], 1)


@boundaries
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_cg_to_the_end_is_the_solution_of_the_normal_equations_with_unit_norm(boundary, norm):
    z, f, b = problem(boundary, image=(12, 13))
    Z = dense_system(z, f, b, boundary)
    expected = torch.linalg.solve(Z.T @ Z, Z.T @ b.flatten()).view(f.shape)
    found = update_filters_by_cg(
        f, batch(z, f, b, boundary), FilterConstraint(norm), iterations=500, boundary=boundary
    )
    # cg stops at a residual of 1e-6; times the condition of Z'Z.
    assert_close(found, normalize(expected, norm), rtol=0, atol=1e-4)


@boundaries
def test_cg_steps_before_the_norm_are_those_of_the_textbook(boundary):
    z, f, b = problem(boundary, image=(12, 13))
    Z = dense_system(z, f, b, boundary)
    x = f.flatten()
    r = Z.T @ (b.flatten() - Z @ x)
    d = r
    for _ in range(2):
        q = Z.T @ (Z @ d)
        alpha = r @ r / (d @ q)
        x, new = x + alpha * d, r - alpha * q
        d, r = new + (new @ new) / (r @ r) * d, new
    found = update_filters_by_cg(f, batch(z, f, b, boundary), iterations=2, boundary=boundary)
    assert_close(found, normalize(x.view(f.shape)), rtol=1e-9, atol=1e-10)


def test_a_filter_without_maps_keeps_its_form():
    z, f, b = problem("valid")
    z[:, 1] = 0
    found = update_filters(f, sums_of(z, f, b, "valid"))
    assert_close(found[1], f[1], rtol=1e-12, atol=1e-14)
    assert (found[0] - f[0]).abs().max() > 1e-3
    found = update_filters_by_cg(f, batch(z, f, b, "valid"))
    assert_close(found[1], f[1], rtol=1e-12, atol=1e-14)


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


def visits(batches, f, g=None, boundary="valid"):
    """What `update_filters_by_cg` goes through, and how often it did."""
    count = []

    def go():
        count.append(1)
        for z, b, T in batches:
            yield z, b - T(deconvolve(z, f, g, boundary=boundary)), T

    return go, count


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


@boundaries
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_cg_through_a_layer_ends_at_the_dense_least_squares_solution_with_unit_norm(boundary, norm):
    batches, f = through_a_layer(boundary=boundary)
    TZ, b = matrix_through(batches, f, boundary=boundary)
    expected = torch.linalg.lstsq(TZ, b).solution.view(f.shape)
    go, count = visits(batches, f, boundary=boundary)
    found = update_filters_by_cg(f, go, FilterConstraint(norm), iterations=300, boundary=boundary)
    # cg stops at a residual of 1e-6; times the condition of the normal equations.
    assert_close(found, normalize(expected, norm), rtol=0, atol=1e-4)
    assert 10 < len(count) < 200


def test_cg_through_a_layer_leaves_out_what_is_disconnected():
    g = torch.tensor([[1, 0, 1], [0, 1, 0]])
    batches, f = through_a_layer()
    f = normalize(f * g[:, :, None, None])
    TZ, b = matrix_through(batches, f, g)
    connected = g[:, :, None, None].expand_as(f).flatten().bool()
    assert not TZ[:, ~connected].any()
    expected = torch.zeros_like(f).flatten()
    expected[connected] = torch.linalg.lstsq(TZ[:, connected], b).solution
    go, _ = visits(batches, f, g)
    found = update_filters_by_cg(f, go, FilterConstraint(connectivity=g), iterations=300)
    assert_close(found, normalize(expected.view(f.shape)), rtol=0, atol=1e-4)


@boundaries
def test_the_first_step_of_cg_goes_down_the_gradient_through_the_whole_chain(boundary):
    batches, f = through_a_layer(boundary=boundary)
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cost_through(batches, leaf, boundary=boundary), leaf)
    # As far as a parabola through three costs says: the cost is quadratic.
    costs = [cost_through(batches, f - t * gradient, boundary=boundary) for t in (0, 1, 2)]
    curvature = costs[2] - 2 * costs[1] + costs[0]
    step = (gradient.square().sum() / curvature).item()
    go, count = visits(batches, f, boundary=boundary)
    found = update_filters_by_cg(f, go, iterations=1, boundary=boundary)
    assert_close(found, normalize(f - step * gradient), rtol=1e-9, atol=1e-10)
    # Once for the right hand side, once for each step.
    assert len(count) == 2


def test_cg_goes_on_through_the_batches_as_if_they_were_one():
    batches, f = through_a_layer()
    for iterations in (1, 3):
        split, _ = visits(batches, f)
        single = [
            (z[n : n + 1], b[n : n + 1], alone(T, n)) for z, b, T in batches for n in range(2)
        ]
        one, _ = visits(single[::-1], f)
        found = [
            update_filters_by_cg(f, go, FilterConstraint("plane"), iterations=iterations)
            for go in (split, one)
        ]
        assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)


def alone(T, n):
    """The way down of one image."""
    (F1, U), S = (T.outer.outer, T.outer.inner), T.inner
    return F1 @ Unpooling(U.switches[n : n + 1], U.shape) @ S


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
        found = update_filters(f, sums, iterations=iterations)
        assert cost_through(batches, found, boundary=boundary) < before * (1 - 1e-3)


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


def test_sums_without_a_filter_know_the_others_only():
    z, f, b = problem("valid")
    sums = sums_of(z, f, b, "valid")
    without = sums.without([1])
    assert without.linear[1].abs().sum() == 0
    assert without.gram[1].abs().sum() == without.gram[:, 1].abs().sum() == 0
    keep = torch.tensor([0, 2])
    assert torch.equal(without.linear[keep], sums.linear[keep])
    assert torch.equal(without.gram[keep][:, keep], sums.gram[keep][:, keep])
    assert sums.gram[1].abs().sum() > 0


def test_maps_in_single_precision_give_sums_in_double_that_agree():
    z, f, b = problem("valid")
    sums = sums_of(z, f, b, "valid")
    single = sums_of(z.float(), f.float(), b.float(), "valid")
    for found, expected in ((single.linear, sums.linear), (single.gram, sums.gram)):
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert update_filters(f.float(), single).dtype == torch.float32


def test_dead_filters_are_those_whose_maps_are_as_good_as_empty():
    def dead(*energy):
        return dead_filters(torch.tensor(energy, dtype=torch.float64))

    assert dead(1.0, 0.0, 2.0, 1e-7, 1e-5) == [1, 3]
    assert dead(1e-20, 3e-20) == []
    assert dead(0.0, 0.0) == [0, 1]


def test_double_filters_are_the_weaker_ones_of_pairs_equal_up_to_sign_and_shift():
    blob = rand(1, 2, 3, 3)
    f = 0.01 * rand(6, 2, 7, 7, seed=1)
    f[0, :, 0:3, 0:3] += blob[0]
    f[1, :, 4:7, 2:5] -= blob[0]
    f[2, :, 1:4, 4:7] += blob[0]
    f[3, :, 2:5, 2:5] += blob[0].flip(1)
    f[4, :, 2:5, 2:5] += rand(2, 3, 3, seed=2)
    f[5] = rand(2, 7, 7, seed=3)
    energy = torch.tensor([2.0, 3.0, 1.0, 5.0, 0.0, 9.0])
    assert duplicate_filters(normalize(f), energy) == [0, 2]
    assert duplicate_filters(normalize(f), energy.flip(0)) == [1, 2]
    assert duplicate_filters(normalize(f[[3, 4, 5]]), energy[:3]) == []
    assert duplicate_filters(7 * f, energy) == [0, 2]
    # Equal energies: the first stays.
    assert duplicate_filters(normalize(f), torch.ones(6)) == [1, 2]


@pytest.mark.parametrize("init", ["random", "patches"])
def test_first_filters_are_of_unit_norm_and_follow_the_generator(init):
    b = rand(3, 2, 20, 16).float()

    def draw(seed):
        return initial_filters(8, b, 5, init, torch.Generator().manual_seed(seed))

    f = draw(0)
    assert f.shape == (8, 2, 5, 5) and f.dtype == torch.float32
    assert_close(torch.linalg.vector_norm(f, dim=(1, 2, 3)), torch.ones(8))
    torch.manual_seed(5)
    assert torch.equal(f, draw(0)) and not torch.equal(f, draw(1))
    assert duplicate_filters(f, torch.ones(8), similarity=0.999) == []


def test_patches_are_strong_pieces_of_what_is_explained():
    b = rand(2, 1, 30, 30)
    b[:, :, :, :15] *= 1e-3
    f = initial_filters(6, b, 5, "patches", torch.Generator().manual_seed(0))
    pieces = normalize(b.unfold(2, 5, 1).unfold(3, 5, 1).reshape(-1, 1, 5, 5)).flatten(1)
    similar = pieces @ f.flatten(1).T
    # Up to the trace of noise; and none from the dark half.
    assert (similar.amax(0) > 1 - 1e-5).all()
    column = similar.argmax(0) % 26
    assert (column > 10).all()


def test_patches_of_an_empty_image_still_have_unit_norm():
    f = initial_filters(4, torch.zeros(1, 1, 9, 9), 3, "patches", torch.Generator().manual_seed(0))
    assert_close(torch.linalg.vector_norm(f, dim=(1, 2, 3)), torch.ones(4))


def test_normalize_leaves_zeros_or_takes_the_fallback():
    f, other = rand(3, 2, 3, 3), normalize(rand(3, 2, 3, 3, seed=1), "plane")
    f[1], f[2, 0] = 0, 0
    assert (normalize(f)[1] == 0).all() and torch.isfinite(normalize(f)).all()
    found = FilterConstraint("plane").project(f, fallback=other)
    assert torch.equal(found[1], other[1]) and torch.equal(found[2, 0], other[2, 0])
    assert_close(found[0, 0], f[0, 0] / f[0, 0].norm())


def similarities(found, planted):
    """Of every planted filter with every found one, the best over sign and shift."""
    size = found.shape[-1] - 1
    found, planted = normalize(found), normalize(planted)
    return torch.nn.functional.conv2d(planted, found, padding=size).abs().amax((2, 3))


def learn(b, boundary, seed):
    """(filters, solution) after 30 visits to all images, from pieces of them."""
    f = initial_filters(4, b, 7, "patches", torch.Generator().manual_seed(seed))
    state = None
    for _ in range(30):
        A, settings = Deconvolution(f, boundary), SolverSettings(training_iterations=10)
        solution = solve(A, b, lam=3.0, settings=settings, state=state, training=True)
        state = solution.state
        f = update_filters(
            f, filter_statistics(solution.z, solution.residual, f, boundary=boundary)
        )
    return f, solution


@pytest.mark.slow
@boundaries
def test_planted_filters_are_recovered_up_to_sign_shift_and_order(boundary):
    # 5x5 filters, strongest in the middle; the learned ones have a margin of one pixel to shift.
    position = torch.arange(5, dtype=torch.float64) - 2
    window = torch.exp(-(position[:, None].square() + position.square()) / (2 * 0.65**2))
    planted = normalize(window * rand(4, 1, 5, 5, seed=21))
    generator = torch.Generator().manual_seed(22)
    z = rand(12, 4, *map_size((24, 24), (5, 5), boundary), seed=23)
    z = z.sign() * (1 + z.abs()) * (torch.rand(z.shape, generator=generator) < 0.008)
    b = deconvolve(z, planted, boundary=boundary)
    first = initial_filters(4, b, 7, "patches", torch.Generator().manual_seed(24))
    assert similarities(first, planted).amax(1).min() < 0.85

    # The cost has local minima where a filter sits at the edge of its frame, so of several starts
    # the one with the lowest cost counts: no knowledge of the truth is used.
    results = [learn(b, boundary, seed) for seed in (24, 1024, 2024)]
    f, solution = min(results, key=lambda result: result[1].objective.sum().item())
    found = similarities(f, planted)
    assert found.amax(1).min() > 0.95
    # One for each: a permutation.
    assert sorted(found.argmax(1).tolist()) == [0, 1, 2, 3]
    assert solution.residual.square().sum() < 0.1 * b.square().sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(update="adam"), "learning.update=adam: choose one of proximal, cg"),
        (dict(norm="all"), "learning.norm=all: choose one of filter, plane"),
        (dict(init="zeros"), "learning.init=zeros: choose one of patches, random"),
        (dict(epochs=0), "learning.epochs=0: must be at least 1"),
        (dict(update_iterations=0), "learning.update_iterations=0: must be at least 1"),
        (dict(batch_size=0), "learning.batch_size=0: must be at least 1, or null"),
        (dict(averaging_epochs=-0.5), "learning.averaging_epochs=-0.5: must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LearningSettings(**settings)
    LearningSettings(batch_size=None, averaging_epochs=0)


def test_off_center_filters_are_found_and_moved_to_the_middle_without_changing_the_image():
    f = torch.zeros(3, 2, 7, 7, dtype=torch.float64)
    f[0, :, 0:3, 1:4] = 1.0
    f[1, :, 2:5, 2:5] = 1.0
    f[2, 1, 6, 6] = -1.0
    moves = centring_shifts(f)
    assert moves == {0: (2, 1), 2: (-3, -3)}
    z = torch.zeros(1, 3, 26, 26, dtype=torch.float64)
    z[0, :, 12, 13] = torch.tensor([1.0, -2.0, 3.0])
    before = deconvolve(z, f)
    for k, (rows, columns) in moves.items():
        f[k] = shift(f[k], rows, columns)
        z[:, k] = shift(z[:, k], -rows, -columns)
    assert centring_shifts(f) == {}
    assert torch.equal(deconvolve(z, f), before)


def test_shift_brings_in_zeros_or_wraps():
    plane = torch.arange(12.0).view(3, 4)
    assert shift(plane, 1, -2).tolist() == [[0, 0, 0, 0], [2, 3, 0, 0], [6, 7, 0, 0]]
    assert torch.equal(shift(plane, 1, -2, wrap=True), plane.roll((1, -2), (0, 1)))
