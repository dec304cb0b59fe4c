"""Coordinate descent against certificates, scikit-learn, FISTA and brute force."""

import itertools
import math
import re
import time

import numba
import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch.testing import assert_close

from deconvnet import learn_filters
from deconvnet.filters.constraint import normalize
from deconvnet.filters.update import LearningSettings
from deconvnet.operators.arithmetic import convolution_matrix
from deconvnet.operators.convolution import BOUNDARIES, correlate_strips, deconvolve, map_size
from deconvnet.operators.linear import Deconvolution, Scaling
from deconvnet.sparse_coding import kernels, pointwise_kernels, working_set
from deconvnet.sparse_coding.active_set import ActiveSet, footprint
from deconvnet.sparse_coding.coordinate_descent import (
    PriorWeights,
    check_coordinate_descent,
    coordinate_descent,
)
from deconvnet.sparse_coding.iteration import Start, Until
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Problem, SolverSettings, duality_gap
from deconvnet.sparse_coding.solve import solve, sparse_code
from deconvnet.sparse_coding.working_set import TURNS, Atoms, Bands, Turns, WorkingSetSolver, _tile

# Nearly all tests share few sizes of filters: the loops are compiled once for each.
every_boundary = pytest.mark.parametrize("boundary", BOUNDARIES)
LAM = 5.0


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def problem(boundary="valid", *, K=4, C=1, size=(3, 3), image=(8, 7), N=2, mask=False):
    """An operator of unit filters, and what it is to explain (masked, if there is a mask)."""
    f, b = normalize(rand(K, C, *size, seed=1)), rand(N, C, *image, seed=2)
    pixels = (uniform(N, 1, *image, seed=3) > 0.3) * (0.5 + uniform(N, 1, *image, seed=4))
    pixels[..., image[1] // 2 :] = 1  # some filters lie where the mask is 1
    return Deconvolution(f, boundary, pixels if mask else None), b * pixels if mask else b


PRIORS = {
    "plain": lambda shape: {},
    "weights of maps": lambda shape: dict(weights=0.5 + uniform(shape[1], seed=5)),
    "weights of entries": lambda shape: dict(weights=0.5 + uniform(*shape, seed=5)),
    "non-negative": lambda shape: dict(non_negative=True),
    "groups": lambda shape: dict(group=2),
    "groups, weights, non-negative": lambda shape: dict(
        group=2, weights=torch.tensor([0.6, 0.6, 1.5, 1.5]).double(), non_negative=True
    ),
}


def prior_of(name, A, b):
    return Prior(**PRIORS[name](A.zeros(b).shape))


def settings(gap=1e-8, **changes):
    return SolverSettings(method="coordinate", **dict(iterations=500, gap=gap) | changes)


def objective(A, b, z, prior=None, lam=LAM):
    return lam / 2 * (b - A(z)).square().sum((1, 2, 3)) + (prior or Prior())(z)


def descend(A, b, z=None, *, prior=None, iterations=100, gap=None, callback=None):
    """(z, residual, gap, rounds)."""
    problem = Problem(A, b, LAM, prior or Prior())
    watch = callback and (lambda i, method: callback(i, method.maps(), method.penalty()))
    found = coordinate_descent(
        problem,
        Start(A.zeros(b) if z is None else z),
        SolverSettings("coordinate"),
        Until(iterations, gap=gap, callback=watch),
    )
    return found.z, found.residual, found.gap, found.iterations


def dense(A, image):
    """A for one image as a matrix, by what it makes of impulses."""
    maps = (A.f.shape[0], *map_size(image, A.f.shape[2:], A.boundary))
    return A(torch.eye(math.prod(maps), dtype=A.f.dtype).view(-1, *maps)).flatten(1).T


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


# The minimum


@every_boundary
@pytest.mark.parametrize(
    ("name", "C"), [(name, C) for name in PRIORS for C in (1, 2) if C == 2 or "groups" not in name]
)
@pytest.mark.parametrize("mask", [False, True])
def test_it_ends_at_a_certified_minimum(boundary, name, C, mask):
    A, b = problem(boundary, C=C, image=(6, 7), mask=mask)
    prior = prior_of(name, A, b)
    found = solve(A, b, lam=LAM, settings=settings(1e-5), prior=prior)
    gap = duality_gap(A, b, found.z, LAM, prior)
    assert found.iterations < 500
    assert (gap <= 1.01e-5 * found.objective).all()
    # All that is returned is what it is said to be.
    assert_close(found.gap, gap, rtol=1e-6, atol=1e-11)
    assert_close(found.residual, b - A(found.z), rtol=0, atol=1e-12)
    assert_close(found.objective, objective(A, b, found.z, prior), rtol=1e-12, atol=0)
    assert found.gap.dtype == torch.float64 and found.gap.shape == (2,)
    assert found.step is None and found.lam == LAM and torch.equal(found.state, found.z)
    assert 0 < torch.count_nonzero(found.z) < found.z.numel()
    assert not prior.non_negative or (found.z >= 0).all()


@every_boundary
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["plain", "weights of entries", "non-negative"])
def test_the_minimum_is_that_of_scikit_learn(boundary, mask, name):
    A, b = problem(boundary, C=2, N=1, image=(5, 5), mask=mask)
    prior = prior_of(name, A, b)
    w = torch.ones(1).double() if prior.weights is None else prior.weights
    w = w.expand(A.zeros(b).shape).flatten().numpy()
    M = dense(A, (5, 5)).numpy() / w
    positive = name == "non-negative"
    alpha = 1 / (LAM * len(M))
    lasso = Lasso(alpha, fit_intercept=False, positive=positive, tol=1e-13, max_iter=200_000)
    expected = torch.from_numpy(lasso.fit(M, b.flatten().numpy()).coef_ / w).view_as(A.zeros(b))
    minimum = objective(A, b, expected, prior)
    found = solve(A, b, lam=LAM, settings=settings(), prior=prior)
    assert_close(found.objective, minimum, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["groups", "groups, weights, non-negative"])
@pytest.mark.parametrize(("boundary", "mask"), [("reflect", False), ("valid", True)])
def test_the_minimum_with_groups_is_that_of_fista(name, boundary, mask):
    A, b = problem(boundary, C=2, mask=mask)
    prior = prior_of(name, A, b)
    fista = SolverSettings(method="fista", iterations=2000, gap=1e-5)
    expected = solve(A, b, lam=LAM, settings=fista, prior=prior)
    found = solve(A, b, lam=LAM, settings=settings(), prior=prior)
    assert_close(found.objective, expected.objective, rtol=1.1e-5, atol=0)
    assert (found.objective <= expected.objective + 1e-9).all()


@pytest.mark.parametrize("boundary", ["valid", "reflect"])
@pytest.mark.parametrize(("name", "mask"), [("non-negative", True), ("groups", False)])
def test_the_minimum_is_the_same_however_channels_lie_in_memory(boundary, name, mask, monkeypatch):
    A, b = problem(boundary, K=8, C=16, mask=mask)
    prior = prior_of(name, A, b)
    assert Atoms(A, b, prior.group).channels_last
    last = solve(A, b, lam=LAM, settings=settings(1e-9), prior=prior)
    monkeypatch.setattr(working_set, "CHANNELS_LAST", 17)
    assert not Atoms(A, b, prior.group).channels_last
    first = solve(A, b, lam=LAM, settings=settings(1e-9), prior=prior)
    assert (last.gap <= 1e-9 * last.objective).all() and last.z.any()
    assert_close(last.objective, first.objective, rtol=2e-9, atol=0)
    assert_close(last.z, first.z, rtol=0, atol=1e-4)
    assert_close(last.residual, b - A(last.z))


@every_boundary
@pytest.mark.parametrize("image", [(2, 4), (3, 9), (13, 5)])
def test_small_and_narrow_images_have_bands_too(boundary, image):
    # (2, 4): the image is one filter; (3, 9): fewer than two filters of rows, which is one band.
    A, b = problem(boundary, size=(2, 4), image=image)
    found = solve(A, b, lam=LAM, settings=settings(1e-5))
    assert (duality_gap(A, b, found.z, LAM) <= 1.01e-5 * found.objective).all()
    z, residual, _, _ = descend(A, b, prior=Prior(0.5), iterations=20)
    assert_close(residual, b - A(z), rtol=0, atol=1e-12)


@every_boundary
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 1, 1, 9), (2, 1, 1, 1), (4, 8, 1)])
def test_weights_of_any_broadcastable_shape_equal_the_expanded_ones(boundary, shape):
    A, b = problem(boundary)
    maps = A.zeros(b).shape
    if shape[-1] == 9:
        shape = (*shape[:3], maps[3])
    if len(shape) == 3:
        shape = (4, maps[2], 1)
    weights = 0.5 + uniform(*shape, seed=6)
    found = solve(A, b, lam=LAM, settings=settings(1e-4), prior=Prior(weights=weights))
    whole = solve(
        A,
        b,
        lam=LAM,
        settings=settings(1e-4),
        prior=Prior(weights=weights.expand(maps).contiguous()),
    )
    assert_close(found.z, whole.z, rtol=0, atol=1e-12)


@every_boundary
@pytest.mark.parametrize("name", ["weights of entries", "groups"])
def test_looking_at_maps_in_strips_changes_nothing(boundary, name, monkeypatch):
    A, b = problem(boundary, C=2, image=(9, 8))
    prior = prior_of(name, A, b)
    expected = solve(A, b, lam=LAM, settings=settings(1e-4), prior=prior)
    monkeypatch.setitem(correlate_strips.__kwdefaults__, "numbers", 200)
    found = solve(A, b, lam=LAM, settings=settings(1e-4), prior=prior)
    assert_close(found.z, expected.z, rtol=0, atol=1e-11)
    assert_close(found.gap, expected.gap, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("each", [False, True])
def test_with_a_weight_of_zero_the_gap_is_that_of_the_duality_gap(group, dtype, each):
    A, b = problem(N=2)
    A, b = Deconvolution(A.f.to(dtype)), b.to(dtype)
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype)
    if each:
        weights = weights.view(4, 1, 1).expand(A.zeros(b).shape).contiguous()
    prior = Prior(weights=weights, group=group)
    found = solve(A, b, lam=LAM, settings=settings(1e-4, iterations=20), prior=prior)
    assert (found.gap == math.inf).all()
    assert (duality_gap(A, b, found.z, LAM, prior) == math.inf).all()


def test_no_gap_is_negative():
    A, b = problem(N=16)
    A, b = Deconvolution(A.f.float()), b.float()
    for lam in (0.05, 0.3, 5.0):
        found = solve(A, b, lam=lam, settings=settings(1e-9, iterations=40))
        assert (found.gap >= 0).all()
        assert (duality_gap(A, b, found.z, lam) >= 0).all()


def test_a_weight_of_zero_leaves_an_entry_free():
    for boundary in BOUNDARIES:
        A, b = problem(boundary)
        weights = torch.ones(1, *A.zeros(b).shape[1:], dtype=torch.float64)
        weights[0, 1, 4, 3] = 0
        prior = Prior(weights=weights)
        z, residual, _, _ = descend(A, b, prior=prior, iterations=60)
        slope = LAM * A.adjoint(residual)
        assert slope[:, 1, 4, 3].abs().max() < 1e-4 and (z[:, 1, 4, 3] != 0).all()
        # And all others are at their minimum: the slope is that of the prior, or held by it.
        held = torch.where(z == 0, (slope.abs() - weights).clamp(min=0), slope - weights * z.sign())
        assert held.abs().max() < 1e-4


@pytest.mark.parametrize("p", [0.5, 0.0])
def test_a_weight_of_zero_leaves_a_map_free_below_one_too(p):
    A, b = problem("circular")
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    z, residual, _, _ = descend(A, b, prior=Prior(p, weights=weights), iterations=50)
    assert z[:, 1].any() and (LAM * A.adjoint(residual))[:, 1].abs().max() < 1e-8


@pytest.mark.parametrize("hidden", ["pixels", "filter"])
def test_coefficients_that_become_zero_leave_the_working_set(hidden):
    A, b = problem("zero")
    start = solve(A, b, lam=LAM, settings=settings(1e-5)).z
    if hidden == "pixels":
        mask = torch.ones_like(b)
        mask[..., :4] = 0
        A, b = Deconvolution(A.f, "zero", mask), mask * b
    else:
        f = A.f.clone()
        f[1] = 0
        A = Deconvolution(f, "zero")
    found = solve(A, b, lam=LAM, settings=settings(1e-5), state=start)
    assert (duality_gap(A, b, found.z, LAM) <= 1.01e-5 * found.objective).all()


def test_a_filter_of_zeros_is_never_used():
    A, b = problem("zero", C=2)
    f = A.f.clone()
    f[1], f[2, 0] = 0, 0
    A = Deconvolution(f, "zero")
    found = solve(A, b, lam=LAM, settings=settings())
    assert (duality_gap(A, b, found.z, LAM) <= 1.01e-8 * found.objective).all()
    assert not found.z[:, 1].any() and found.z[:, 2].any()


# The way there


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("boundary", "mask"), [("valid", False), ("reflect", True)])
@pytest.mark.parametrize("group", [1, 2])
def test_the_objective_never_rises_from_round_to_round(p, boundary, mask, group):
    A, b = problem(boundary, C=2, mask=mask)
    prior, calls = Prior(p, group=group), []
    for start in (A.zeros(b), 0.5 * rand(*A.zeros(b).shape, seed=9)):
        calls.clear()
        z, _, _, rounds = descend(
            *(A, b, start), prior=prior, iterations=15, callback=lambda *call: calls.append(call)
        )
        maps = [start, *(z for _, z, _ in calls)]
        assert rounds == 15 and len(maps) == 16 and torch.equal(maps[-1], z)
        costs = torch.stack([objective(A, b, each, prior) for each in maps])
        assert (costs[1:] <= costs[:-1] * (1 + 1e-12)).all()
        assert (costs[-1] < 0.95 * costs[0]).all()


def test_the_callback_sees_every_round_of_all_images():
    A, b = problem(N=3)
    calls = []
    found = solve(A, b, lam=LAM, settings=settings(1e-4), callback=lambda *call: calls.append(call))
    assert [i for i, _, _ in calls] == list(range(1, found.iterations + 1))
    assert all(z.shape == found.z.shape and beta.shape == (3, 1, 1, 1) for _, z, beta in calls)
    assert torch.equal(calls[-1][1], found.z) and (calls[-1][2] == LAM).all()
    assert torch.equal(solve(A, b, lam=LAM, settings=settings(1e-4)).z, found.z)


@pytest.mark.parametrize("p", [0.5, 0.0])
@pytest.mark.parametrize("boundary", ["circular", "valid", "zero"])
@pytest.mark.parametrize("non_negative", [False, True])
def test_below_one_no_other_value_of_a_single_entry_is_better(p, boundary, non_negative):
    A, b = problem(boundary, image=(9, 8), N=1)
    z, r, gaps, _ = descend(A, b, prior=Prior(p, non_negative=non_negative), iterations=200)
    assert gaps is None and torch.equal(z, z.clamp(min=0)) == non_negative
    M, z = dense(A, (9, 8)), z.flatten()
    whole = (M != 0).sum(0) == 9
    x = torch.linspace(-3, 3, 1201, dtype=torch.float64)  # with an exact 0 in the middle
    x = x[x >= 0] if non_negative else x
    move = x - z[:, None]
    fit = LAM * (
        M.square().sum(0)[:, None] / 2 * move.square() - (M.T @ r.flatten())[:, None] * move
    )
    cost = [(v != 0).double() if p == 0 else v.abs() ** p for v in (x, z[:, None])]
    gain = -(fit + cost[0] - cost[1]).amin(1)
    assert 0 < torch.count_nonzero(z) < 0.3 * len(z) and whole.sum() > len(z) / 3
    assert gain[whole].max() < 1e-6


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_a_start_from_the_solution_stops_at_once(p):
    A, b = problem("circular", C=2)
    if p == 1:
        found = solve(A, b, lam=LAM, settings=settings(1e-6))
        again = solve(A, b, lam=LAM, settings=settings(1e-6), state=found.state)
        assert again.iterations == 0 and torch.equal(again.z, found.z)
        assert_close(again.gap, found.gap, rtol=1e-6, atol=1e-10)
    steady = settings(None, tolerance=1e-9)
    found = solve(A, b, lam=LAM, prior=Prior(p=p), settings=steady)
    assert found.gap is None and 1 < found.iterations < 500
    again = solve(A, b, lam=LAM, prior=Prior(p=p), settings=steady, state=found.state)
    assert again.iterations == 1
    assert_close(again.z, found.z, rtol=0, atol=1e-3)
    assert (again.objective <= found.objective * (1 + 1e-12)).all()


def test_training_visits_have_the_given_number_of_rounds_and_continue_each_other():
    A, b = problem()
    visit = dict(lam=LAM, settings=settings(1e-8, training_iterations=2), training=True)
    first = solve(A, b, **visit)
    second = solve(A, b, **visit, state=first.state)
    assert first.iterations == second.iterations == 2 and first.gap is None
    assert (second.objective < first.objective).all()


# What must not change the result


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_boundary
@pytest.mark.parametrize(("p", "N"), [(1.0, 1), (1.0, 3), (0.5, 1)])
def test_threads_change_no_bit(boundary, p, N, threads):
    # One image: threads share its bands. Three: they share the images.
    A, b = problem(boundary, N=N, image=(23, 11))
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(descend(A, b, prior=Prior(p), iterations=5))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


@every_boundary
def test_threads_share_a_signal_and_change_no_bit(boundary, threads):
    A, b = problem(boundary, N=1, size=(1, 3), image=(1, 40))
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append(descend(A, b, iterations=5))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
    minimum = solve(A, b, lam=LAM, settings=settings(1e-5))
    assert (duality_gap(A, b, minimum.z, LAM) <= 1.01e-5 * minimum.objective).all()


def test_bands_of_one_parity_are_further_apart_than_a_filter_reaches():
    for maps, filters in (((40, 9), (3, 3)), ((1, 640), (1, 64)), ((3, 64), (2, 8))):
        bands = Bands.of(maps, filters)
        assert bands.number > 1 and bands.number % 2 == 0
        i, j = (index.ravel().astype(np.int32) for index in np.indices(maps))
        nothing = np.zeros(len(i))
        order, starts = bands.sort(ActiveSet(i, i, j, nothing, nothing, nothing), maps)
        along, reach = (j, filters[1]) if bands.of_columns else (i, filters[0])
        assert sorted(order) == list(range(len(i))) and starts[-1] == len(i)
        for s in range(bands.number - 2):
            last, first = along[order[starts[s + 1] - 1]], along[order[starts[s + 2]]]
            assert first - last > reach


@every_boundary
@pytest.mark.parametrize(
    ("image", "size"), [((23, 11), (3, 3)), ((1, 60), (1, 3)), ((4, 4), (3, 3))]
)
def test_coefficients_and_residual_gain_momentum_together(boundary, image, size):
    A, b = problem(boundary, N=1, size=size, image=image)
    part, atoms = Problem(A, b, LAM), Atoms(A, b, 1)
    solver = WorkingSetSolver(part, atoms, PriorWeights(part, atoms))
    solver.refresh_residual([0])
    costs = []
    for momentum in (True, True, False):
        solver.correlate_residual([0], certify=False)
        solver.sweep([0], momentum=momentum)
        assert_close(solver.residual, b - A(solver.maps()), rtol=0, atol=1e-12)
        costs.append(objective(A, b, solver.maps()).item())
    assert costs[2] < costs[1] < costs[0]


@pytest.mark.parametrize("boundary", ["valid", "reflect"])
@pytest.mark.parametrize("name", ["plain", "weights of entries"])
def test_the_maps_of_an_image_do_not_depend_on_its_companions(boundary, name, monkeypatch):
    A, b = problem(boundary, C=2, N=3, mask=True)
    prior = prior_of(name, A, b)
    together = solve(A, b, lam=LAM, settings=settings(1e-4), prior=prior)
    for n in range(3):
        alone = Deconvolution(A.f, boundary, A.mask[n : n + 1])
        own = prior
        if prior.weights is not None:
            own = Prior(weights=prior.weights[n : n + 1])
        found = solve(alone, b[n : n + 1], lam=LAM, settings=settings(1e-4), prior=own)
        assert_close(found.z[0], together.z[n], rtol=0, atol=1e-12)
    monkeypatch.setattr("deconvnet.sparse_coding.coordinate_descent.BATCH_BYTES", 1)
    by_and_by = solve(A, b, lam=LAM, settings=settings(1e-4), prior=prior)
    assert_close(by_and_by.z, together.z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize("gap", [None, 1e-4])
def test_a_non_finite_image_is_reported_and_leaves_the_other_images_unchanged(p, gap):
    if p != 1 and gap:
        return
    A, b = problem(N=3)
    broken = b.clone()
    broken[1, 0, 2, 3] = float("nan")
    limit = settings(gap, iterations=20)
    found, expected = (solve(A, y, lam=LAM, prior=Prior(p=p), settings=limit) for y in (broken, b))
    assert found.objective[1].isnan() and (gap is None or not found.gap[1] <= 1)
    for n in (0, 2):
        assert_close(found.z[n], expected.z[n], rtol=0, atol=1e-12)


def test_single_precision_is_kept_and_certified_in_double():
    A, b = problem("zero")
    single = Deconvolution(A.f.float(), "zero")
    found = solve(single, b.float(), lam=LAM, settings=settings(1e-4))
    assert found.z.dtype == found.residual.dtype == torch.float32
    assert found.gap.dtype == torch.float64
    gap = duality_gap(A, b, found.z.double(), LAM)
    assert (gap <= 1.1e-4 * found.objective).all()


def test_the_arguments_are_not_modified():
    A, b = problem("valid", C=2, mask=True)
    start = rand(*A.zeros(b).shape, seed=8) * (uniform(*A.zeros(b).shape, seed=9) < 0.1)
    given = [each.clone() for each in (start, b, A.f, A.mask)]
    descend(A, b, start, iterations=5, gap=1e-3)
    assert all(map(torch.equal, given, (start, b, A.f, A.mask)))


def test_images_of_zeros_have_maps_of_zeros():
    A, b = problem()
    found = solve(A, 0 * b, lam=LAM, settings=settings())
    assert not found.z.any() and found.iterations == 0 and not found.gap.any()


# Refusals


def test_what_it_cannot_do_is_refused_with_what_can():
    A, b = problem()
    with refused("solver.method=coordinate: not through several layers; use solver.method=fista"):
        solve(A @ Scaling(0.7), b, lam=LAM, settings=settings(), state=A.zeros(b))
    with refused("solver.method=coordinate: not with pooling in the loop; use solver.method=fista"):
        solve(A, b, lam=LAM, prior=Prior(window=(1, 2, 2)), settings=settings(None))
    elsewhere = torch.empty(2, 1, 8, 7, device="meta")
    with refused("solver.method=coordinate: runs on the CPU, not on meta; use solver.method="):
        check_coordinate_descent(Problem(A, elsewhere, LAM))
    with refused("solver.gap=0.01: only a minimum for p=1"):
        solve(A, b, lam=LAM, prior=Prior(p=0.5), settings=settings(0.01))
    for asked in (
        lambda: solve(A @ Scaling(0.7), b, lam=LAM, settings=settings(), state=A.zeros(b)),
        lambda: check_coordinate_descent(Problem(A, elsewhere, LAM)),
    ):
        with pytest.raises(ValueError) as error:
            asked()
        assert "\n" not in str(error.value)


def test_sparse_code_and_the_settings_know_it():
    assert SolverSettings(method="coordinate", gap=1e-3).gap == 1e-3
    A, b = problem("reflect", C=2)
    found = sparse_code(b, A.f, lam_ratio=0.2, boundary="reflect", group=2, settings=settings(1e-6))
    gap = duality_gap(A, b, found.z, found.lam, prior=Prior(group=2))
    assert (gap <= 1.01e-6 * found.objective).all()


# Footprints, and the compiled code


def pairs(axis, place):
    """(pixel, tap) of all that an impulse at this place paints along an axis."""
    runs = zip(axis.pixel[place], axis.tap[place], axis.length[place], strict=True)
    return [(pixel + m, tap + m) for pixel, tap, length in runs for m in range(length)]


@every_boundary
@pytest.mark.parametrize(
    ("image", "size"),
    [((7, 6), (3, 2)), ((5, 9), (1, 5)), ((4, 3), (4, 3)), ((1, 2), (1, 1)), ((6, 5), (6, 4))],
)
def test_the_footprints_of_both_axes_are_the_dense_matrix(boundary, image, size):
    f = rand(1, 1, *size)
    rows, columns = (footprint(boundary, *of) for of in zip(image, size, strict=True))
    maps = map_size(image, size, boundary)
    assert (len(rows.first), len(columns.first)) == maps
    painted = torch.zeros(*image, *maps, dtype=torch.float64)
    for i, j in np.ndindex(*maps):
        for (x, u), (y, v) in itertools.product(pairs(rows, i), pairs(columns, j)):
            painted[x, y, i, j] += f[0, 0, u, v]
    expected = convolution_matrix(f, image, boundary=boundary).view(*image, *maps)
    assert_close(painted, expected, rtol=0, atol=1e-14)
    # From `first` on, the taps fall on consecutive pixels.
    for axis, taps in ((rows, size[0]), (columns, size[1])):
        whole = [sorted(pairs(axis, place)) for place in range(len(axis.first))]
        for first, of in zip(axis.first, whole, strict=True):
            consecutive = [pixel for pixel, _ in of] == list(range(of[0][0], of[0][0] + taps))
            consecutive &= [tap for _, tap in of] == list(range(taps))
            assert first == (of[0][0] if consecutive else -1)


def test_filters_larger_than_the_image_have_a_footprint_too():
    # Only with boundary "valid" they may be.
    for pixels, taps in ((2, 5), (1, 3)):
        axis = footprint("valid", pixels, taps)
        expected = [
            [(x, x - place + taps - 1) for x in range(pixels) if 0 <= x - place + taps - 1 < taps]
            for place in range(pixels + taps - 1)
        ]
        assert [pairs(axis, place) for place in range(pixels + taps - 1)] == expected
        assert (axis.first == -1).all()


@every_boundary
def test_the_footprint_of_a_long_signal_takes_a_few_arrays_of_its_length(boundary):
    started = time.process_time()
    axis = footprint(boundary, 1_000_000, 128)
    assert time.process_time() - started < 1
    assert sum(of.nbytes for of in axis) <= 40 * 1_000_200
    for place in (0, 63, 500_000, 999_999):
        assert len(pairs(axis, place)) <= 3 * 128
    assert (axis.first >= 0).sum() == 1_000_000 - (129 if boundary == "reflect" else 127)


@pytest.mark.parametrize(
    ("K", "C", "size", "image", "group"),
    [
        (2, 1, (1, 1001), (1, 1100), 1),
        (2, 1, (70, 2), (80, 5), 1),
        (2, 1024, (1, 2), (2, 6), 1),
        (66, 1, (2, 2), (4, 5), 66),
    ],
)
def test_long_filters_many_channels_and_large_groups_are_coded(K, C, size, image, group):
    A, b = problem(K=K, C=C, size=size, image=image, N=1)
    lam = 10 / A.adjoint(b).abs().max().item()
    found = solve(A, b, lam=lam, prior=Prior(group=group), settings=settings(1e-4))
    assert torch.count_nonzero(found.z) > 0
    gap = duality_gap(A, b, found.z, lam, prior=Prior(group=group))
    assert (gap <= 1.01e-4 * found.objective).all()


# Learning


@pytest.mark.slow
def test_learning_recovers_planted_filters():
    """Four 5x5 filters behind sparse maps, learned from the images alone in frames of 7x7."""
    generator = torch.Generator().manual_seed(0)
    planted = normalize(torch.randn(4, 1, 5, 5, generator=generator))
    z = torch.randn(12, 4, 36, 36, generator=generator)
    z = z.sign() * (1 + z.abs()) * (torch.rand(z.shape, generator=generator) < 0.006)
    images = deconvolve(z, planted)
    learned = learn_filters(
        images,
        4,
        filter_size=7,
        lam=3.0,
        solver=SolverSettings(method="coordinate"),
        learning=LearningSettings(epochs=30, batch_size=6),
    )
    alike = torch.nn.functional.conv2d(planted, learned.filters, padding=6).abs().amax((2, 3))
    # Each planted filter matches a different learned one, nearly equal at the best shift.
    assert alike.amax(1).min() > 0.98
    assert sorted(alike.argmax(1).tolist()) == [0, 1, 2, 3]
    costs = [stats.objective for stats in learned.history]
    assert costs[-1] < 0.8 * costs[0]


def test_learning_on_all_images_lowers_the_objective_in_every_epoch():
    _, b = problem(N=3, image=(14, 12))
    learning = LearningSettings(
        epochs=6, batch_size=None, averaging_epochs=0, reinit_unused=False, recenter=False
    )
    solver = SolverSettings(method="coordinate", training_iterations=3)
    history = learn_filters(b, 4, filter_size=3, lam=LAM, solver=solver, learning=learning).history
    costs = [stats.objective for stats in history]
    assert all(after < before for before, after in itertools.pairwise(costs)), costs


@pytest.mark.parametrize("number", [0.0, 0.3])
def test_one_number_that_is_expanded_is_a_start_like_the_same_maps_in_memory(number):
    A, b = problem()
    maps = torch.full((1, 1, 1, 1), number).double().expand(A.zeros(b).shape)
    expanded, copied = (descend(A, b, z, iterations=4) for z in (maps, maps.clone()))
    assert all(map(torch.equal, expanded[:2], copied[:2]))


@pytest.mark.parametrize(
    ("decreases", "longer"),
    [
        ((8, 4.1, 2, 1), "-+--"),  # tried where it is slow, and given up where it decreases less
        ((8, 4.1, 5, 2, 0.4, 0.3), "-+++-+"),  # kept until it overshoots, and tried again
        ((8, 4.1, math.nan, 1, 0.9), "-+---"),
    ],
)
def test_momentum_is_longer_where_an_image_converges_slowly_and_it_pays(decreases, longer):
    turns = Turns()
    turns.adapt(math.inf, 90, 100)
    for decrease, expected in zip(decreases, longer, strict=True):
        turns.adapt(decrease, 90, 100)
        assert (turns.number > TURNS) == (expected == "+"), decrease
    growing = Turns()
    for nonzero in (10, 20, 40, 80):
        growing.adapt(nonzero, nonzero, 100)
        assert growing.number == TURNS


@pytest.mark.parametrize("name", PRIORS)
def test_asking_for_a_gap_changes_no_bit_of_the_maps(name):
    A, b = problem()
    prior = prior_of(name, A, b)
    asked, not_asked = (
        descend(A, b, A.zeros(b), iterations=2, gap=gap, prior=prior) for gap in (1e-15, None)
    )
    assert torch.equal(asked[0], not_asked[0])
    assert asked[2].isfinite().all() and not_asked[2] is None


def test_every_copy_of_the_compiled_code_computes_the_same_bits():
    """A process that compiles a function runs another copy of what it calls than one that loads it
    from disk: the compiler must be free to reorder sums in no function that is called.
    """
    A, b = problem("reflect", K=2, size=(2, 2), N=1)
    part, atoms = Problem(A, b, LAM), Atoms(A, b, 1)
    solver = WorkingSetSolver(part, atoms, PriorWeights(part, atoms))
    descend = numba.njit(**kernels.OPTIONS)(kernels.descend.py_func)
    grid, active = atoms.grid(0), solver.active[0]
    starts, one = np.zeros(solver.bands.number + 1, np.int64), np.float64(1)
    r, progress = solver.frames.pixels[0], np.zeros(solver.bands.number, np.int64)
    share, momentum = (0, len(progress)), (solver.spans, r, np.empty((0, 1)))
    descend(
        *(r, atoms.filters, grid, active, solver.steps[0], starts, share, 1, 1, momentum),
        *(one, one, False, None, np.empty(1), progress, np.zeros(2, np.int64)),
    )
    (code,) = descend.inspect_llvm().values()
    called = set(re.findall(r"call[^\n@]*@[^\n(]*kernels\d*(_[a-z_]+?)B\d", code))
    assert called == {"_sweep"}
    sweep = numba.njit(**dict(kernels._EXACT, no_cpython_wrapper=False))(kernels._sweep.py_func)
    steps, none = solver.steps[0], np.empty((0, 1))
    sweep(r, *atoms.filters, steps, active.g, none, 0, 0, one, False)
    (code,) = sweep.inspect_llvm().values()
    assert "contract" in code and not re.search("reassoc|arcp|afn|fast", code)


def test_another_size_boundary_or_prior_compiles_nothing():
    def compiled():
        functions = [*vars(kernels).items(), *vars(pointwise_kernels).items()]
        return {
            name: len(function.signatures)
            for name, function in functions
            if hasattr(function, "signatures")
        }

    def code(C=1, size=(3, 3), image=(9, 12), **prior):
        sparse_code(rand(2, C, *image), rand(4, C, *size), lam_ratio=0.3, **prior)

    for arguments in ({}, dict(boundary="reflect"), dict(group=2), dict(size=(1, 1))):
        code(**arguments)
    before = compiled()
    for C, size in itertools.product((1, 3, 20), ((2, 2), (5, 5), (1, 7), (8, 8), (1, 1))):
        code(C, size)
    for boundary in BOUNDARIES:
        code(2, (4, 3), (40, 50), boundary=boundary)
    code(weights=torch.rand(4))
    code(mask=torch.ones(2, 1, 9, 12))
    code(non_negative=True)
    code(group=4, size=(4, 4))
    assert compiled() == before and before["descend"] >= 2


@every_boundary
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("image", [(8, 7), (3, 4)])  # in the smaller one no filter fits
def test_curvatures_are_the_squared_norms_of_painted_impulses(boundary, mask, image):
    A, b = problem(boundary, K=3, C=2, size=(3, 4), image=image, mask=mask)
    norms = dense(Deconvolution(A.f, boundary), image)
    if mask:
        norms = A.mask[1].expand_as(b[1]).reshape(-1, 1) * norms
    norms = norms.square().sum(0).view(3, -1)
    atoms = Atoms(A, b, 1)
    g, i, j = (index.ravel().astype(np.int32) for index in np.indices((3, *atoms.map_size)))
    assert_close(torch.from_numpy(atoms.curvatures_at(1, g, i, j)), norms.flatten())


def test_signals_grow_their_working_set_by_the_strongest_of_neighbouring_coefficients():
    everywhere = np.full((1, 640), 2.0)
    rows, columns = _tile(everywhere, (1, 64), active=0)
    assert (rows, columns) == (1, 32)
    _, j = kernels.leaders(everywhere, (rows, columns))
    assert j.tolist() == list(range(0, 640, 32))
    assert _tile(np.full((64, 64), 2.0), (8, 8), active=0) == (4, 4)
