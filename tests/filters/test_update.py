"""The filter update against autograd, dense normal equations and planted filters."""

import re

import pytest
import torch
from filter_problems import (
    boundaries,
    cost_through,
    gram_times,
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

from deconvnet.filters.constraint import FilterConstraint, normalize
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.statistics import filter_statistics
from deconvnet.filters.update import (
    Diverged,
    LearningSettings,
    update_filters,
    update_filters_by_cg,
)
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.operators.linear import Deconvolution, Identity, Unpooling
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import solve


def batch(z, f, b, boundary, g=None):
    """What `update_filters_by_cg` goes through: these maps, all at once, nothing below them."""
    residual = b - deconvolve(z, f, g, boundary=boundary)
    return lambda: [(z, residual, Identity())]


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
        updated = update_filters(
            f, sums_of(z, f, b, boundary), FilterConstraint(norm), iterations=1 + seed
        )
        before, after = (true_cost(v, z, b, boundary).item() for v in (f, updated))
        assert after <= before * (1 + 1e-12)
        lowered += after < before * (1 - 1e-3)
        axes = (2, 3) if norm == "plane" else (1, 2, 3)
        length = torch.linalg.vector_norm(updated, dim=axes)
        assert_close(length, torch.ones_like(length), rtol=1e-12, atol=0)
    assert lowered >= 10


@boundaries
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_adaptive_steps_lower_the_cost_as_much_and_never_raise_it(boundary, norm):
    constraint, parts = FilterConstraint(norm), []
    for seed in range(6):
        z, f, b = problem(boundary, K=1 + seed % 4, C=1 + seed % 3, seed=10 * seed)
        # Maps of very different energy; every other time, they also resemble each other.
        z = z * torch.logspace(0, -3, len(f), dtype=torch.float64).view(-1, 1, 1)
        z = z + (seed % 2) * z.mean(1, keepdim=True)
        f = normalize(f, norm)
        sums = sums_of(z, f, b, boundary)
        few, many = (
            update_filters(f, sums, constraint, iterations=n, adaptive=adaptive)
            for n, adaptive in ((10, True), (300, False))
        )
        before, after, least = (model_cost(v, sums).item() for v in (f, few, many))
        assert after < before and true_cost(few, z, b, boundary) < true_cost(f, z, b, boundary)
        parts.append((before - after) / (before - least))
    assert min(parts) > 0.7 and sum(parts) > 0.9 * len(parts)


@boundaries
def test_more_iterations_never_end_at_a_higher_cost(boundary):
    rose = 0
    for seed in range(3):
        z, f, b = problem(boundary, K=4, seed=10 * seed)
        # Smooth maps that resemble each other: momentum overshoots.
        z = torch.nn.functional.avg_pool2d(z, 3, 1, padding=1) + 0.5 * z.mean(1, keepdim=True)
        sums = sums_of(z, f, b, boundary)
        updates = [update_filters(f, sums, iterations=n) for n in range(15, 41)]
        costs = torch.stack([model_cost(f, sums)] + [model_cost(v, sums) for v in updates])
        assert (costs.diff() <= 1e-12 * costs.abs().max()).all()
        rose += (costs.diff() == 0).any().item()
    # Some iteration was no better than the one before, so that the best one had to be kept.
    assert rose


@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_updates_converge_to_a_stationary_point_on_the_spheres(norm):
    z, f, b = problem("circular", N=6)
    f = normalize(f, norm)
    sums = sums_of(z, f, b, "circular")
    updated = update_filters(f, sums, FilterConstraint(norm), iterations=1000)
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
    for v in (updated, brute):
        gradient = model_gradient(v, sums)
        tangent = gradient - (gradient * v).sum(axes, keepdim=True) * v
        assert tangent.norm() < 1e-5 * sums.linear.norm()
    assert_close(model_cost(updated, sums), model_cost(brute, sums), rtol=1e-6, atol=0)
    assert_close(updated, brute, rtol=0, atol=1e-3)


@boundaries
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_disconnected_planes_stay_zero(boundary, norm):
    g = torch.tensor([[1, 0], [0, 1], [1, 1]])
    z, f, b = problem(boundary)
    sums = sums_of(z, f, b, boundary, g)
    constraint = FilterConstraint(norm, connectivity=g)
    f0 = normalize(f * g[:, :, None, None], norm)
    for start in (f, f0):
        updates = [
            update_filters(start, sums, constraint),
            update_filters_by_cg(
                start, batch(z, start, b, boundary, g), constraint, boundary=boundary
            ),
        ]
        for updated in updates:
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
    updated = update_filters_by_cg(
        f, batch(z, f, b, boundary), FilterConstraint(norm), iterations=500, boundary=boundary
    )
    # cg stops at a residual of 1e-6; times the condition of Z'Z.
    assert_close(updated, normalize(expected, norm), rtol=0, atol=1e-4)


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
    updated = update_filters_by_cg(f, batch(z, f, b, boundary), iterations=2, boundary=boundary)
    assert_close(updated, normalize(x.view(f.shape)), rtol=1e-9, atol=1e-10)


def test_a_filter_without_maps_does_not_change():
    z, f, b = problem("valid")
    z[:, 1] = 0
    updated = update_filters(f, sums_of(z, f, b, "valid"))
    assert_close(updated[1], f[1], rtol=1e-12, atol=1e-14)
    assert (updated[0] - f[0]).abs().max() > 1e-3
    updated = update_filters_by_cg(f, batch(z, f, b, "valid"))
    assert_close(updated[1], f[1], rtol=1e-12, atol=1e-14)


def visits(batches, f, g=None, boundary="valid"):
    """What `update_filters_by_cg` goes through, and how often it did."""
    count = []

    def go():
        count.append(1)
        for z, b, T in batches:
            yield z, b - T(deconvolve(z, f, g, boundary=boundary)), T

    return go, count


@boundaries
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_cg_through_a_layer_ends_at_the_dense_least_squares_solution_with_unit_norm(boundary, norm):
    batches, f = through_a_layer(boundary=boundary)
    TZ, b = matrix_through(batches, f, boundary=boundary)
    expected = torch.linalg.lstsq(TZ, b).solution.view(f.shape)
    go, count = visits(batches, f, boundary=boundary)
    updated = update_filters_by_cg(f, go, FilterConstraint(norm), iterations=300, boundary=boundary)
    # cg stops at a residual of 1e-6; times the condition of the normal equations.
    assert_close(updated, normalize(expected, norm), rtol=0, atol=1e-4)
    assert 10 < len(count) < 200


def test_cg_through_a_layer_ignores_disconnected_planes():
    g = torch.tensor([[1, 0, 1], [0, 1, 0]])
    batches, f = through_a_layer()
    f = normalize(f * g[:, :, None, None])
    TZ, b = matrix_through(batches, f, g)
    connected = g[:, :, None, None].expand_as(f).flatten().bool()
    assert not TZ[:, ~connected].any()
    expected = torch.zeros_like(f).flatten()
    expected[connected] = torch.linalg.lstsq(TZ[:, connected], b).solution
    go, _ = visits(batches, f, g)
    updated = update_filters_by_cg(f, go, FilterConstraint(connectivity=g), iterations=300)
    assert_close(updated, normalize(expected.view(f.shape)), rtol=0, atol=1e-4)


@boundaries
def test_the_first_step_of_cg_follows_the_gradient_through_the_whole_chain(boundary):
    batches, f = through_a_layer(boundary=boundary)
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cost_through(batches, leaf, boundary=boundary), leaf)
    # As far as a parabola through three costs says: the cost is quadratic.
    costs = [cost_through(batches, f - t * gradient, boundary=boundary) for t in (0, 1, 2)]
    curvature = costs[2] - 2 * costs[1] + costs[0]
    step = (gradient.square().sum() / curvature).item()
    go, count = visits(batches, f, boundary=boundary)
    updated = update_filters_by_cg(f, go, iterations=1, boundary=boundary)
    assert_close(updated, normalize(f - step * gradient), rtol=1e-9, atol=1e-10)
    # Once for the right hand side, once for each step.
    assert len(count) == 2


def test_cg_treats_the_batches_as_if_they_were_one():
    batches, f = through_a_layer()
    for iterations in (1, 3):
        split, _ = visits(batches, f)
        single = [
            (z[n : n + 1], b[n : n + 1], alone(T, n)) for z, b, T in batches for n in range(2)
        ]
        one, _ = visits(single[::-1], f)
        updates = [
            update_filters_by_cg(f, go, FilterConstraint("plane"), iterations=iterations)
            for go in (split, one)
        ]
        assert_close(updates[0], updates[1], rtol=1e-10, atol=1e-11)


def alone(T, n):
    """The way down of one image."""
    (F1, U), S = (T.outer.outer, T.outer.inner), T.inner
    return F1 @ Unpooling(U.switches[n : n + 1], U.shape) @ S


def similarities(learned, planted):
    """Of every planted filter with every learned one, the best over sign and shift."""
    size = learned.shape[-1] - 1
    learned, planted = normalize(learned), normalize(planted)
    return torch.nn.functional.conv2d(planted, learned, padding=size).abs().amax((2, 3))


def learn(b, boundary, seed):
    """(filters, solution) after 30 visits to all images, from pieces of them."""
    f = initial_filters(4, b, 7, "patches", torch.Generator().manual_seed(seed))
    state = None
    for _ in range(30):
        A, settings = Deconvolution(f, boundary), SolverSettings()
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
    results = [learn(b, boundary, seed) for seed in (24, 1024)]
    f, solution = min(results, key=lambda result: result[1].objective.sum().item())
    similarity = similarities(f, planted)
    assert similarity.amax(1).min() > 0.95
    # One for each: a permutation.
    assert sorted(similarity.argmax(1).tolist()) == [0, 1, 2, 3]
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_stops_where_its_cost_is_not_finite(value):
    z, f, b = problem()
    sums = sums_of(z, f, b, "valid")
    sums.linear[0, 0, 0, 0] = value
    with pytest.raises(Diverged, match="not finite"):
        update_filters(f, sums)
    b[0, 0, 0, 0] = value
    with pytest.raises(Diverged, match="not finite"):
        update_filters_by_cg(f, batch(z, f, b, "valid"))


def test_settings_keep_their_old_names_with_a_warning():
    with pytest.warns(FutureWarning, match="revive is now called reinit_unused"):
        assert not LearningSettings(revive=False).reinit_unused
    with pytest.warns(FutureWarning, match="memory is now called averaging_epochs"):
        assert LearningSettings(memory=2.5).averaging_epochs == 2.5
