"""Constraints on maps, filters, borders and pixels that go beyond the papers' problem."""

import dataclasses
import functools
import itertools
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch.testing import assert_close

from deconvnet.filters.constraint import FilterConstraint, normalize
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.statistics import filter_statistics
from deconvnet.filters.update import LearningSettings, update_filters, update_filters_by_cg
from deconvnet.network.layer import Layer, LayerProblem, LayerSettings
from deconvnet.operators.arithmetic import convolution_matrix, receptive_field
from deconvnet.operators.convolution import (
    correlate,
    deconvolve,
    filter_gradient,
    map_size,
    per_channel,
)
from deconvnet.operators.linear import (
    Deconvolution,
    Identity,
    Unpooling,
    VerticalStack,
    WeightedUnpooling,
)
from deconvnet.operators.pooling import max_pool, unpooling_weights
from deconvnet.sparse_coding.prior import Prior, shrink
from deconvnet.sparse_coding.problem import SolverSettings, duality_gap
from deconvnet.sparse_coding.solve import SOLVERS, lam_from_ratio, solve, sparse_code

BOUNDARIES = ("valid", "circular", "zero", "reflect")
NEW = ("zero", "reflect")
METHODS = ("admm", "fista", "ista", "half_quadratic")
SIZES = [(3, 3), (4, 5), (1, 2), (5, 1)]

every_boundary = pytest.mark.parametrize("boundary", BOUNDARIES)
new_boundary = pytest.mark.parametrize("boundary", NEW)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def problem(boundary="valid", *, K=4, C=1, size=(3, 3), image=(6, 7), N=2, mask=False, seed=0):
    """An operator of unit filters, and what it is to explain (masked, if there is a mask)."""
    f = normalize(rand(K, C, *size, seed=seed))
    b = rand(N, C, *image, seed=seed + 1)
    pixels = masks(*b.shape) if mask else None
    return Deconvolution(f, boundary, pixels), b if pixels is None else pixels * b


def masks(*shape):
    """Weights of pixels from 0.5 to 2, a quarter of which are 0."""
    mask = 0.5 + 1.5 * uniform(*shape, seed=11)
    return mask * (uniform(*shape, seed=12) > 0.25)


def dense(A, image):
    """A for one image as a matrix, by what it makes of impulses."""
    maps = (A.f.shape[0], *map_size(image, A.f.shape[2:], A.boundary))
    return A(torch.eye(math.prod(maps), dtype=A.f.dtype).view(-1, *maps)).flatten(1).T


def to_the_end(method, gap=1e-5):
    return SolverSettings(method=method, iterations=3000, gap=gap)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


# The prior


def value(x, p, w, group):
    """The prior of a vector (..., K) of maps at one place, written out."""
    lengths = x.unflatten(-1, (-1, group)).square().sum(-1).sqrt()
    return (w * ((lengths != 0).double() if p == 0 else lengths**p)).sum(-1)


@pytest.mark.parametrize("p", [0.0, 0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("non_negative", [False, True])
def test_nothing_on_a_grid_costs_less_than_the_proximal_map(p, group, non_negative):
    zeros = 0
    for seed, w, beta in itertools.product(range(4), (0.0, 0.4, 3.0), (0.5, 4.0)):
        v = 1.5 * rand(group, seed=seed) / beta**0.5
        weights = torch.tensor(w, dtype=torch.float64)
        prior = Prior(p, weights=weights, group=group, non_negative=non_negative)
        given = beta if seed % 2 else torch.full((1, 1, 1, 1), beta, dtype=torch.float64)
        x = prior.shrink(v.view(1, -1, 1, 1), given).flatten()

        def cost(x, v=v, w=w, beta=beta):
            return value(x, p, w, group) + beta / 2 * (x - v).square().sum(-1)

        reach = 1.2 * v.abs().max().item()
        middle = torch.zeros_like(v)
        for _ in range(5):  # the whole, then finer and finer around the best
            axis = torch.linspace(-reach, reach, 17, dtype=torch.float64)
            grid = torch.cartesian_prod(*[axis] * group).view(-1, group) + middle
            grid = torch.cat([grid, torch.zeros_like(v)[None]])
            grid = grid.clamp(min=0) if non_negative else grid
            middle, reach = grid[cost(grid).argmin()], reach / 4
            assert cost(x) <= cost(middle) + 1e-12
        assert not non_negative or (x >= 0).all()
        zeros += not x.any()
    assert zeros > 5


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("group", [1, 2])
def test_the_value_of_the_prior_is_that_of_a_loop(p, group):
    z = rand(2, 4, 3, 5)
    z = z * (z.abs() > 0.5)
    weights = uniform(4 // group, 3, 5, seed=1).repeat_interleave(group, 0)
    expected = torch.zeros(2, dtype=torch.float64)
    for n, i, j in itertools.product(range(2), range(3), range(5)):
        expected[n] += value(z[n, :, i, j], p, weights[::group, i, j], group)
    assert_close(Prior(p, weights=weights, group=group)(z), expected, rtol=1e-12, atol=0)
    assert_close(Prior(p, group=group)(z), Prior(p, weights=torch.ones(4) * 3, group=group)(z) / 3)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("non_negative", [False, True])
def test_the_dual_norm_is_where_the_proximal_map_begins(group, non_negative):
    weights = torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=torch.float64)
    prior = Prior(weights=weights, group=group, non_negative=non_negative)
    c = rand(3, 4, 5, 6)
    s = prior.dual_norm(c).view(-1, 1, 1, 1)
    assert not prior.shrink(0.9999 * c / s, 1.0).any()
    assert prior.shrink(1.0001 * c / s, 1.0).flatten(1).any(1).all()
    # It bounds <c, z> by the prior of any z.
    for seed in range(20):
        z = rand(3, 4, 5, 6, seed=seed) * (uniform(3, 4, 5, 6, seed=seed) > 0.97)
        z = z.abs() if non_negative else z
        assert ((c * z).sum((1, 2, 3)) <= prior.dual_norm(c) * prior(z) + 1e-12).all()


def test_a_weight_of_zero_leaves_the_dual_norm_finite_only_where_nothing_is_asked():
    prior = Prior(weights=torch.tensor([0.0, 2.0]), non_negative=True)
    c = torch.tensor([[-1.0, 3.0], [0.0, 1.0], [1e-9, 0.0]]).view(3, 2, 1, 1)
    assert prior.dual_norm(c).tolist() == [1.5, 0.5, math.inf]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_weights_of_one_change_no_bit(method, p):
    A, b = problem(C=2)
    A, b = Deconvolution(A.f.float()), b.float()
    settings = SolverSettings(method=method, iterations=20 if method != "half_quadratic" else 1)
    plain = solve(A, b, lam=20.0, prior=Prior(p=p), settings=settings)
    for weights in (torch.ones(4), torch.ones(2, 4, 8, 9)):
        found = solve(A, b, lam=20.0, prior=Prior(p=p, weights=weights), settings=settings)
        for part in ("z", "state", "residual", "objective"):
            assert torch.equal(getattr(found, part), getattr(plain, part))
    ones = Prior(p, weights=torch.ones(4))
    # As if nobody had seen that they are ones.
    object.__setattr__(ones, "entry_weights", torch.ones(4, 1, 1))
    v = rand(2, 4, 5, 6).float()
    for beta in (0.7, torch.tensor([0.7, 3.0]).view(2, 1, 1, 1)):
        for prior in (ones, Prior(p)):
            assert p < 1 or torch.equal(prior.shrink(v, beta), shrink(v, beta, p))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(p=1.5), "p=1.5: the exponent"),
        (dict(group=0), "group=0: must be at least 1"),
        (dict(weights=torch.tensor([1.0, -2.0])), "weights=-2.0: must be finite and not negative"),
        (dict(weights=torch.tensor([1.0, math.nan])), "weights=nan: must be finite"),
        (dict(weights=torch.tensor([1.0, 2.0]), group=2), "have one weight at each position"),
        (dict(window=(1, 2, 2), group=2), "window=(1, 2, 2): not together with"),
        (dict(window=(1, 2, 2), weights=torch.ones(2)), "window=(1, 2, 2): not together with"),
    ],
)
def test_a_prior_that_makes_no_sense_is_refused(options, message):
    with refused(message):
        Prior(**options)


def test_maps_that_do_not_fit_the_prior_are_refused():
    A, b = problem()
    with refused("weights of shape (3,): expected (4,), or a shape that broadcasts to maps"):
        sparse_code(b, A.f, lam=2.0, weights=torch.ones(3) * 2)
    with refused("group=3: must divide the 4 maps"):
        sparse_code(b, A.f, lam=2.0, group=3)
    with refused("p=0.5: only the prior with p=1 has a dual norm"):
        Prior(0.5).dual_norm(b)


# Borders


def painted(z, f, boundary):
    """Zeiler et al.'s sum over maps, impulse by impulse on a canvas, in numpy."""
    (_, C, h, w), (H, W) = f.shape, z.shape[1:]
    rim = max(h, w)
    mode = {"zero": "constant", "reflect": "reflect"}[boundary]
    z = np.pad(z.numpy(), ((0, 0), (rim, rim), (rim, rim)), mode=mode)
    canvas = np.zeros((C, H + 4 * rim, W + 4 * rim))
    for k, i, j in np.ndindex(*z.shape):
        top, left = i + rim - (h - 1) // 2, j + rim - (w - 1) // 2
        canvas[:, top : top + h, left : left + w] += z[k, i, j] * f[k].numpy()
    return torch.from_numpy(canvas[:, 2 * rim : 2 * rim + H, 2 * rim : 2 * rim + W])


@new_boundary
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_what_maps_paint_is_what_impulses_paint_on_a_canvas(boundary, size, method):
    # numpy mirrors as often as it must; torch and we only once, which is all that filters reach.
    f, z = rand(3, 2, *size), rand(2, 3, 6, 7, seed=1)
    found = deconvolve(z, f, boundary=boundary, method=method)
    expected = torch.stack([painted(one, f, boundary) for one in z])
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_close(
        convolution_matrix(f, (6, 7), boundary=boundary) @ z[0].flatten(), expected[0].flatten()
    )


@new_boundary
@pytest.mark.parametrize("size", [*SIZES, (6, 7)])
@pytest.mark.parametrize("method", ["spatial", "fourier"])
@pytest.mark.parametrize("connected", [False, True])
def test_the_adjoints_are_those_of_the_dense_matrix(boundary, size, method, connected):
    f, z, y = rand(3, 2, *size), rand(2, 3, 6, 7, seed=1), rand(2, 2, 6, 7, seed=2)
    g = torch.tensor([[1, 0], [1, 1], [0, 1]]) if connected else None
    M = convolution_matrix(f, (6, 7), boundary=boundary, g=g)
    found = correlate(y, f, g, boundary=boundary, method=method)
    assert_close(found.flatten(1), y.flatten(1) @ M, rtol=1e-10, atol=1e-12)
    leaf = f.clone().requires_grad_()
    (deconvolve(z, leaf, g, boundary=boundary) * y).sum().backward()
    gradient = filter_gradient(z, y, size, g, boundary=boundary, method=method)
    assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-12)


def test_many_channels_are_painted_as_few_are():
    f, z = rand(2, 20, 3, 3), rand(1, 2, 6, 7, seed=1)
    for boundary in NEW:
        each = [deconvolve(z, f[:, c : c + 1], boundary=boundary) for c in range(20)]
        assert_close(deconvolve(z, f, boundary=boundary), torch.cat(each, 1))


@new_boundary
def test_images_smaller_than_the_filters_are_refused(boundary):
    with refused("images of 4x9 are smaller than the 5x5 filters"):
        correlate(rand(1, 1, 4, 9), rand(2, 1, 5, 5), boundary=boundary)
    with refused("maps of 4x9 are smaller than the 5x5 filters"):
        deconvolve(rand(1, 2, 4, 9), rand(2, 1, 5, 5), boundary=boundary)
    with refused("choose 'valid' or 'circular' or 'zero' or 'reflect'"):
        deconvolve(rand(1, 2, 9, 9), rand(2, 1, 5, 5), boundary="mirror")


@pytest.mark.parametrize("size", [3, 4])
def test_the_field_of_a_unit_with_a_centred_frame_is_where_its_impulse_paints(size):
    z = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    z[0, 0, 4, 4] = 1
    seen = deconvolve(z, torch.ones(1, 1, size, size).double(), boundary="zero")[0, 0, :, 4]
    first, last = receptive_field([size], [], "zero").pixels(4)
    assert torch.nonzero(seen).flatten().tolist() == list(range(first, last))


# Operators


@every_boundary
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (4, 2)])
def test_operators_have_the_adjoint_solve_and_norm_of_their_matrix(boundary, mask, size):
    A, b = problem(boundary, C=2, size=size, mask=mask)
    y, lam = rand(*b.shape, seed=5), 7.0
    beta = torch.tensor([0.5, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    found = A.solve(b, lam, beta, tolerance=1e-10, max_iterations=300)
    for n in range(2):
        one = Deconvolution(A.f, boundary, A.mask[n : n + 1] if mask else None)
        M = dense(one, (6, 7))
        assert_close(one.adjoint(y[n : n + 1]).flatten(), M.T @ y[n].flatten())
        gram = M @ M.T
        system = beta[n].squeeze() * torch.eye(len(gram), dtype=M.dtype) + lam * gram
        assert_close(found[n].flatten(), torch.linalg.solve(system, b[n].flatten()))
        largest = torch.linalg.eigvalsh(gram)[-1]
        bound = A.squared_norm(b).expand(2, 1, 1, 1)[n].squeeze()
        assert largest * (1 - 1e-9) <= bound < (8 if mask else 1.7) * largest


@every_boundary
def test_a_mask_of_ones_changes_nothing_and_the_masked_matrix_has_weighted_rows(boundary):
    A, b = problem(boundary, C=2, N=1)
    ones = Deconvolution(A.f, boundary, torch.ones(1, 1, 6, 7))
    z = A.adjoint(b)
    assert torch.equal(ones(z), A(z)) and torch.equal(ones.adjoint(b), z)
    mask = masks(1, 2, 6, 7)
    rows = mask.flatten()[:, None] * convolution_matrix(A.f, (6, 7), boundary=boundary)
    assert_close(dense(Deconvolution(A.f, boundary, mask), (6, 7)), rows)


def test_masks_that_do_not_fit_are_refused():
    A, b = problem(C=2)
    with refused("mask must have the shape (N or 1, 1 or 2, H, W), got (2, 3, 6, 7)"):
        sparse_code(b, A.f, lam=2.0, mask=torch.ones(2, 3, 6, 7))
    with refused("mask of shape (2, 1, 6, 6) does not fit images of shape (2, 2, 6, 7)"):
        sparse_code(b, A.f, lam=2.0, mask=torch.ones(2, 1, 6, 6))
    with refused("mask of shape (3, 1, 6, 7) does not fit"):
        sparse_code(b, A.f, lam=2.0, mask=torch.ones(3, 1, 6, 7))
    with refused("mask=-1.0: must be finite and not negative"):
        sparse_code(b, A.f, lam=2.0, mask=-torch.ones(1, 1, 6, 7))


# Inference


def lasso(A, b, lam, *, weights=None, positive=False):
    """The minimum for one image by coordinate descent on the dense matrix, its columns scaled."""
    maps = A.adjoint(b).shape
    w = torch.ones(maps[1]) if weights is None else weights
    w = (w.view(-1, 1, 1) if w.ndim == 1 else w).expand(maps).flatten().numpy()
    M = dense(A, b.shape[2:]).numpy() / w
    alpha = 1 / (lam * len(M))
    model = Lasso(alpha, fit_intercept=False, positive=positive, tol=1e-13, max_iter=200_000)
    return torch.from_numpy(model.fit(M, b.flatten().numpy()).coef_ / w).view(maps)


def objective(A, b, z, lam, prior):
    return lam / 2 * (b - A(z)).square().sum((1, 2, 3)) + prior(z)


@every_boundary
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("non_negative", "weighted"), [(False, True), (True, False)])
def test_the_minimum_is_that_of_scikit_learn(boundary, mask, non_negative, weighted):
    A, b = problem(boundary, C=2, N=1, image=(5, 5), mask=mask)
    weights = torch.tensor([0.5, 1.0, 2.0, 8.0]).double() if weighted else None
    prior = Prior(weights=weights, non_negative=non_negative)
    lam, expected = 1.5, lasso(A, b, 1.5, weights=weights, positive=non_negative)
    minimum = objective(A, b, expected, lam, prior)
    for method in ("admm", "fista"):
        found = solve(A, b, lam=lam, settings=to_the_end(method), prior=prior)
        assert (duality_gap(A, b, found.z, lam, prior) <= 1.1e-5 * minimum).all(), method
        assert_close(found.objective, minimum, rtol=1.1e-5, atol=0)
        assert found.lam == lam
    assert not non_negative or (found.z >= 0).all()


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("non_negative", [False, True])
def test_admm_fista_and_the_certificate_agree_for_every_convex_prior(group, non_negative):
    for boundary, mask in (("circular", True), ("reflect", False)):
        A, b = problem(boundary, C=2, image=(5, 6), mask=mask)
        weights = 0.2 + uniform(2, 4 // group, *map_size((5, 6), (3, 3), boundary), seed=3)
        prior = Prior(
            weights=weights.repeat_interleave(group, 1), group=group, non_negative=non_negative
        )
        found = [
            solve(A, b, lam=1.5, prior=prior, settings=to_the_end(m)) for m in ("admm", "fista")
        ]
        for one in found:
            gap = duality_gap(A, b, one.z, 1.5, prior)
            assert (gap <= 1.1e-5 * one.objective).all() and (gap > -1e-12).all()
        assert_close(found[0].objective, found[1].objective, rtol=1.1e-5, atol=0)
        alive = found[0].z.unflatten(1, (-1, group)) != 0
        assert 0 < alive.sum() < alive.numel()
        # A group is there as a whole, or not at all.
        assert non_negative or torch.equal(alive.all(2), alive.any(2))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"group": 2}, {"non_negative": True}])
@pytest.mark.parametrize("weighted", [False, True])
def test_where_the_prior_is_not_convex_fista_still_never_rises_and_all_lower_it(
    p, options, weighted
):
    A, b = problem(C=2)
    weights = torch.tensor([0.5, 0.5, 2.0, 2.0]) if weighted else None
    prior = Prior(p, weights=weights, **options)
    costs = []

    def watch(_, z, __):
        costs.append(objective(A, b, z, 20.0, prior))

    for method in METHODS:
        settings = SolverSettings(method=method, iterations=1 if method == "half_quadratic" else 20)
        found = solve(A, b, lam=20.0, prior=prior, settings=settings, callback=watch)
        assert (found.objective < 10 * b.square().sum((1, 2, 3))).all(), method
        assert not prior.non_negative or (found.z >= 0).all()
        if method == "fista":
            assert (torch.stack(costs).diff(dim=0) <= 1e-9).all()
        costs.clear()


def test_doubled_weights_are_half_the_lam():
    A, b = problem(N=1)
    settings, weights = SolverSettings(iterations=30, tolerance=0, adaptive=False), torch.ones(4)
    for p in (0.5, 1.0):
        for method in ("fista", "ista"):
            settings = dataclasses.replace(settings, method=method)
            twice = solve(A, b, lam=20.0, prior=Prior(p=p, weights=2 * weights), settings=settings)
            plain = solve(A, b, lam=10.0, prior=Prior(p=p), settings=settings)
            assert_close(twice.z, plain.z, rtol=1e-9, atol=1e-12)
            assert_close(twice.objective, 2 * plain.objective, rtol=1e-9, atol=0)


def test_a_map_of_weight_zero_is_free():
    A, b = problem(N=1)
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
    settings = SolverSettings(method="fista", iterations=2000, tolerance=1e-7)
    found = solve(A, b, lam=2.0, prior=Prior(weights=weights), settings=settings)
    # Nothing that the free map could still explain is left over.
    assert A.adjoint(found.residual)[:, 0].abs().max() < 1e-3 * A.adjoint(b)[:, 0].abs().max()
    assert found.sparsity == pytest.approx(found.z[:, 1:].abs().sum().item())
    assert duality_gap(A, b, found.z, 2.0, prior=Prior(weights=weights)) == math.inf


@every_boundary
def test_what_the_mask_hides_does_not_matter(boundary):
    A, b = problem(boundary, C=2)
    mask = masks(2, 1, 6, 7)
    found = sparse_code(b, A.f, lam=20.0, boundary=boundary, mask=mask)
    other = torch.where(mask > 0, b, torch.full_like(b, math.nan))
    assert torch.equal(sparse_code(other, A.f, lam=20.0, boundary=boundary, mask=mask).z, found.z)
    with refused("images and filters must be finite"):
        sparse_code(other, A.f, lam=20.0, boundary=boundary)


@pytest.mark.parametrize(
    ("boundary", "mask"),
    [("zero", False), ("reflect", False), ("valid", True), ("circular", True), ("reflect", True)],
)
def test_few_warm_steps_keep_admm_on_the_course_of_the_exact_solve(boundary, mask, textures):
    y = textures(2, 1, 18, 20) - 0.5
    f = initial_filters(6, y, 5, "patches", torch.Generator().manual_seed(1))
    hidden = (uniform(2, 1, 18, 20, seed=4) > 0.3).float() if mask else None
    A, b = Deconvolution(f, boundary, hidden), y if hidden is None else hidden * y
    costs = []
    for steps in (A.inexact_cg_steps, 20):
        A.inexact_cg_steps = steps
        settings = SolverSettings(iterations=30, tolerance=0)
        costs.append(solve(A, b, lam=30.0, settings=settings).objective)
    assert (costs[0] < 1.15 * costs[1]).all(), costs


# Stopping by the duality gap


@functools.cache
def weighted_groups_and_their_minimum():
    A, b = problem("zero", C=2, N=2)
    prior = Prior(group=2, weights=torch.tensor([1.0, 1.0, 3.0, 3.0]).double())
    settings = to_the_end("admm", gap=1e-5)
    return A, b, prior, solve(A, b, lam=5.0, settings=settings, prior=prior).objective


@pytest.mark.parametrize("method", ["admm", "fista", "ista"])
@pytest.mark.parametrize("gap", [0.1, 5e-3])
def test_an_image_stops_at_its_duality_gap_which_bounds_the_distance_to_the_minimum(method, gap):
    A, b, prior, minimum = weighted_groups_and_their_minimum()
    settings = SolverSettings(method=method, iterations=1000, gap=gap)
    found = solve(A, b, lam=5.0, settings=settings, prior=prior)
    assert found.iterations < 1000 and found.gap.dtype == torch.float64
    assert (found.gap <= gap * found.objective).all()
    assert (found.objective - minimum <= found.gap + 1e-9).all()
    # Each image separately, and no later than necessary.
    alone = solve(A, b[:1], lam=5.0, settings=settings, prior=prior)
    assert_close(alone.z, found.z[:1], rtol=1e-7, atol=1e-7)
    if alone.iterations > 10:
        fewer = SolverSettings(method=method, iterations=alone.iterations - 10, gap=1e-9)
        early = solve(A, b[:1], lam=5.0, settings=fewer, prior=prior)
        assert early.gap > gap * early.objective


def test_a_gap_is_asked_for_only_where_there_is_one():
    A, b = problem()
    for p, window in ((0.5, None), (1.0, (1, 2, 2))):
        with refused("solver.gap=0.01: only a minimum for p=1 without a window"):
            solve(A, b, lam=2.0, prior=Prior(p=p, window=window), settings=SolverSettings(gap=0.01))
    with refused("solver.gap=0.0: must be positive"):
        SolverSettings(gap=0.0)
    with refused("solver.gap=0.1: half_quadratic"):
        SolverSettings(method="half_quadratic", gap=0.1)
    with refused("solver.gap=0.1: needs p=1 and pooling=after, got p=0.8"):
        LayerSettings(4, p=0.8, solver=SolverSettings(gap=0.1))
    visit = solve(A, b, lam=2.0, settings=SolverSettings(gap=0.1), training=True)
    assert visit.gap is None and visit.iterations == 5


# lam as a ratio


@pytest.mark.parametrize("options", [{}, {"group": 2}, {"non_negative": True}])
def test_just_below_a_lam_ratio_of_one_some_maps_are_non_zero(options):
    A, b = problem(C=2)
    options = dict(options, weights=torch.tensor([0.5, 0.5, 2.0, 2.0]).double())
    settings = SolverSettings(method="fista", iterations=60, tolerance=0)
    for lam_ratio, alive in ((1.0, False), (0.99, True)):
        found = sparse_code(b, A.f, lam_ratio=lam_ratio, settings=settings, **options)
        assert bool((found.z.abs() > 1e-9).any()) is alive
        assert found.lam == lam_from_ratio(A, b, lam_ratio, Prior(**options))


def test_a_lam_ratio_keeps_its_meaning_when_the_data_are_rescaled():
    A, b = problem(C=2)
    settings = SolverSettings(iterations=50)
    found = sparse_code(b, A.f, lam_ratio=0.1, settings=settings)
    scaled = sparse_code(50 * b, A.f, lam_ratio=0.1, settings=settings)
    assert scaled.lam == pytest.approx(found.lam / 50)
    assert_close(scaled.z, 50 * found.z, rtol=1e-6, atol=1e-6)
    brightest = A.adjoint(b).abs().max().item()
    assert found.lam == pytest.approx(1 / (0.1 * brightest))


def test_either_lam_or_lam_ratio_is_given_and_the_ratio_lies_between_0_and_1():
    A, b = problem()
    with refused("lam=None, lam_ratio=None: give one of the two"):
        sparse_code(b, A.f)
    with refused("lam=1.0, lam_ratio=0.1: give one of the two"):
        sparse_code(b, A.f, lam=1.0, lam_ratio=0.1)
    for lam_ratio in (0.0, 1.1, math.nan):
        with refused(f"lam_ratio={lam_ratio}: must lie in (0, 1]"):
            sparse_code(b, A.f, lam_ratio=lam_ratio)
    with refused("lam_ratio=0.1: needs all weights to be positive"):
        sparse_code(b, A.f, lam_ratio=0.1, weights=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    with refused("lam_ratio=0.1: needs images that the filters can explain"):
        sparse_code(0 * b, A.f, lam_ratio=0.1)
    with refused("p=0.5: only the prior with p=1"):
        sparse_code(b, A.f, lam_ratio=0.1, p=0.5)


# Filters


def sums_of(A, b, seed=3):
    z = rand(*A.adjoint(b).shape, seed=seed)
    z = z * (z.abs() > 1)
    return z, filter_statistics(z, b - A(z), A.f, boundary=A.boundary)


def model_cost(f, sums):
    """1/2 f'(gram)f - (linear)'f by a loop over pairs of filter pixels."""
    h, w = f.shape[2:]
    product = torch.zeros_like(f)
    for a, b, i, j in np.ndindex(h, h, w, w):
        product[:, :, a, i] += sums.gram[:, :, a - b + h - 1, i - j + w - 1] @ f[:, :, b, j]
    return (f * (0.5 * product - sums.linear)).sum()


@new_boundary
@pytest.mark.parametrize("size", [(3, 3), (4, 2)])
def test_the_sums_lie_above_the_true_cost_and_touch_it(boundary, size):
    A, b = problem(boundary, C=2, size=size)
    z, sums = sums_of(A, b)

    def true_cost(f):
        return 0.5 * (b - deconvolve(z, f, boundary=boundary)).square().sum()

    constant = true_cost(A.f) - model_cost(A.f, sums)
    for seed in range(20):
        change = 10.0 ** (-seed / 5) * rand(*A.f.shape, seed=50 + seed)
        excess = model_cost(A.f + change, sums) + constant - true_cost(A.f + change)
        assert -1e-9 <= excess < 1e3 * change.square().sum()
    lower = update_filters(A.f, sums, iterations=20)
    assert true_cost(lower) < true_cost(A.f)


CONSTRAINTS = [{"non_negative": True}, {"zero_mean": True}]


def holds(f, constraint, norm="filter"):
    unit = torch.linalg.vector_norm(f, dim=(2, 3) if norm == "plane" else (1, 2, 3))
    kind = (f >= 0).all() if "non_negative" in constraint else f.mean((2, 3)).abs().max() < 1e-12
    return bool(kind) and torch.allclose(unit, torch.ones_like(unit))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_a_normalised_filter_is_the_nearest_of_its_kind(constraint, norm):
    f = rand(3, 2, 3, 4)
    found = FilterConstraint(norm, **constraint).project(f)
    assert holds(found, constraint, norm)
    distance = (f - found).square().sum()
    for seed in range(200):
        other = found + 10.0 ** (-seed % 4) * rand(*f.shape, seed=seed)
        other = FilterConstraint(norm, **constraint).project(other)
        assert (f - other).square().sum() >= distance * (1 - 1e-12)
    assert_close(FilterConstraint(norm, **constraint).project(found), found, rtol=1e-12, atol=1e-14)


def test_a_filter_of_which_nothing_is_left_becomes_its_fallback():
    fallback = normalize(rand(2, 1, 3, 3).abs())
    f = torch.stack([-torch.ones(1, 3, 3), torch.ones(1, 3, 3)]).double()
    found = FilterConstraint(non_negative=True).project(f, fallback=fallback)
    assert torch.equal(found[0], fallback[0]) and (found[1] == 1 / 3).all()
    even, zero_mean = 0.1 * torch.ones(2, 1, 3, 3), FilterConstraint(zero_mean=True)
    assert not zero_mean.project(even).any()
    assert torch.equal(zero_mean.project(even, fallback=even), even)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("norm", ["filter", "plane"])
@every_boundary
def test_updates_satisfy_the_constraint_and_lower_the_cost(constraint, norm, boundary):
    A, b = problem(boundary, K=3, C=2)
    A = Deconvolution(FilterConstraint(norm, **constraint).project(A.f), boundary)
    z, sums = sums_of(A, b)

    def cost(f):
        return (b - deconvolve(z, f, boundary=boundary)).square().sum().item()

    found = update_filters(A.f, sums, FilterConstraint(norm, **constraint), iterations=20)
    assert holds(found, constraint, norm) and cost(found) < cost(A.f)
    by_cg = update_filters_by_cg(
        A.f,
        lambda: [(z, b - A(z), Identity())],
        FilterConstraint(norm, **constraint),
        boundary=boundary,
    )
    assert holds(by_cg, constraint, norm)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_many_updates_end_where_no_step_along_the_constraints_goes_lower(constraint):
    A, b = problem(K=3)
    sums = sums_of(A, b)[1]
    settled = update_filters(A.f, sums, FilterConstraint(**constraint), iterations=500)
    lowest = model_cost(settled, sums)
    for seed in range(30):
        step = 10.0 ** -(2 + seed % 4) * rand(*A.f.shape, seed=seed)
        other = FilterConstraint(**constraint).project(settled + step)
        assert model_cost(other, sums) >= lowest - 1e-9


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("init", ["patches", "random"])
def test_filters_start_as_they_are_asked_to_be(constraint, init):
    generator = torch.Generator().manual_seed(0)
    for b in (rand(3, 2, 9, 9), -uniform(3, 2, 9, 9), torch.zeros(3, 2, 9, 9).double()):
        f = initial_filters(5, b, 4, init, generator, constraint=FilterConstraint(**constraint))
        assert holds(f, constraint)
    settings = LayerSettings(5, 3, learning=LearningSettings(init=init, **constraint))
    layer = Layer(settings, 2, generator).double()
    first = layer.filters.clone()
    assert holds(normalize(first), constraint) or "zero_mean" in constraint
    layer.set_filters(rand(5, 2, 3, 3))
    assert holds(layer.filters, constraint)
    kept = layer.filters.clone()
    layer.set_filters(-torch.ones(5, 2, 3, 3).double())
    assert torch.equal(layer.filters, kept)


def test_filters_cannot_be_both():
    with refused("learning.zero_mean=True: not with non_negative"):
        LearningSettings(zero_mean=True, non_negative=True)
    with refused("learning.zero_mean=True: filter_size=1 leaves only zeros"):
        LayerSettings(4, 1, learning=LearningSettings(zero_mean=True))


# Layers


@every_boundary
def test_a_layer_passes_on_what_its_settings_ask_of_the_maps(boundary):
    settings = LayerSettings(4, 3, lam=20.0, boundary=boundary, group=2, non_negative=True)
    layer = Layer(settings, 1, torch.Generator().manual_seed(0))
    b = rand(2, 1, 6, 7).float()
    found = layer.infer(LayerProblem(b))
    asked = dict(boundary=boundary, group=2, non_negative=True, settings=SolverSettings())
    expected = sparse_code(b, layer.filters, lam=20.0, **asked)
    assert torch.equal(found.z, expected.z) and (found.z >= 0).all() and found.z.any()
    assert found.z.shape[2:] == map_size((6, 7), (3, 3), boundary)


def test_groups_that_do_not_fit_a_layer_are_refused():
    with refused("group=3: must divide num_maps=4"):
        LayerSettings(4, group=3)
    with refused("group=0: must be at least 1"):
        LayerSettings(4, group=0)
    with refused("group=2: must be 1 with pooling=in_loop"):
        LayerSettings(4, group=2, pool=[1, 2, 2], pooling="in_loop")


# Grey filters for colour images


def test_grey_filters_explain_every_channel_at_the_same_places():
    f, b = normalize(rand(3, 1, 3, 3)), rand(1, 2, 5, 6, seed=1)
    both = per_channel(f, 2)
    assert both.shape == (6, 2, 3, 3)
    for k, c, d in np.ndindex(3, 2, 2):
        assert torch.equal(both[2 * k + c, d], f[k, 0] if c == d else torch.zeros(3, 3).double())
    settings = to_the_end("admm", gap=1e-8)
    # Without groups each channel is coded separately,
    alone = sparse_code(b, both, lam=2.0, settings=settings)
    for c in range(2):
        one = sparse_code(b[:, c : c + 1], f, lam=2.0, settings=settings)
        assert_close(alone.z[:, c::2], one.z, rtol=0, atol=1e-3)
    # with them they share their places,
    joint = sparse_code(b, both, lam=2.0, group=2, settings=settings)
    alive = joint.z.unflatten(1, (-1, 2)) != 0
    assert torch.equal(alive.any(2), alive.all(2)) and alive.any() and not alive.all()
    assert not torch.equal(alone.z[:, ::2] != 0, alone.z[:, 1::2] != 0)
    # and a grey image, the same in all channels, has the maps of the grey problem.
    grey = sparse_code(b[:, :1].repeat(1, 2, 1, 1), both, lam=2.0, group=2, settings=settings)
    one = sparse_code(b[:, :1], f, lam=2.0 * 2**0.5, settings=settings)
    assert_close(grey.z[:, ::2], one.z, rtol=0, atol=1e-3)
    with refused("filters must have the shape (K, 1, h, w), got (6, 2, 3, 3)"):
        per_channel(both, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("through", ["mask and weights", "R_2", "R_2 spread, and the maps"])
def test_images_that_are_solved_some_at_a_time_are_those_of_the_whole_batch(
    method, through, monkeypatch
):
    if through == "mask and weights":
        A, b = problem(N=5, mask=True)
        weights = uniform(*A.zeros(b).shape, seed=9) + 0.5
    else:
        b, weights = rand(5, 1, 9, 9), None
        first, above = (Deconvolution(normalize(rand(4, c, 3, 3, seed=c))) for c in (1, 4))
        maps = first.adjoint(b)
        pooled, switches = max_pool(maps, (1, 2, 2))
        A = first @ Unpooling(switches, maps.shape[1:]) @ above
        if "spread" in through:
            spreading = unpooling_weights("no_place", switches, maps.shape[1:], (1, 2, 2))
            down = first @ WeightedUnpooling(spreading.double(), (1, 2, 2))
            both = VerticalStack([Identity(), down], [1.0, 0.7], [pooled.shape, b.shape])
            A, b = both @ above, both.join([pooled, b])
    step = torch.linspace(0.01, 0.02, 5, dtype=b.dtype).view(-1, 1, 1, 1)
    settings = SolverSettings(method=method, iterations=1 if method == "half_quadratic" else 8)
    prior = Prior(weights=weights)
    run = partial(solve, A, b, lam=5.0, prior=prior, settings=settings, step=step)
    whole = run()
    sizes = []
    original = type(A).__call__
    monkeypatch.setattr(type(A), "__call__", lambda A, z: sizes.append(len(z)) or original(A, z))
    largest = max(A.max_intermediate_numel, A.zeros(b)[0].numel())
    monkeypatch.setattr("deconvnet.sparse_coding.solve.BATCH_BYTES", 2 * 8 * largest)
    parts = run()
    assert set(sizes) == {2, 1}
    for key, expected in vars(whole).items():
        if isinstance(expected, torch.Tensor):
            assert_close(getattr(parts, key), expected, rtol=1e-9, atol=1e-9, msg=key)
    assert parts.iterations == whole.iterations


@pytest.mark.parametrize("method", ["admm", "coordinate"])
def test_a_chunk_bounds_how_many_images_are_in_work_at_a_time(method, monkeypatch):
    b, f = rand(5, 1, 8, 8), normalize(rand(4, 1, 3, 3))
    settings = SolverSettings(method, iterations=30, gap=1e-6)
    whole = sparse_code(b, f, lam=3.0, settings=settings)
    sizes = []
    solver = SOLVERS[method]
    monkeypatch.setattr(
        "deconvnet.sparse_coding.solve.SOLVERS",
        {method: lambda problem, *rest: sizes.append(len(problem.b)) or solver(problem, *rest)},
    )
    parts = sparse_code(b, f, lam=3.0, settings=settings, chunk=2)
    assert sizes == [2, 2, 1]
    assert_close(parts.z, whole.z, rtol=1e-9, atol=1e-9)
    assert_close(parts.gap, whole.gap, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="chunk=0: must be at least 1"):
        sparse_code(b, f, lam=3.0, chunk=0)
