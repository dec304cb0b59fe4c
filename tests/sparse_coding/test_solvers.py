"""Inference against certificates, scikit-learn and dense algebra; batches and restarts."""

import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch.testing import assert_close

from deconvnet.network.tiling import MAP_BYTES
from deconvnet.operators.arithmetic import convolution_matrix
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.operators.linear import Deconvolution, Scaling, Unpooling, norm
from deconvnet.operators.pooling import max_pool, unpool
from deconvnet.sparse_coding.admm import admm
from deconvnet.sparse_coding.half_quadratic import half_quadratic
from deconvnet.sparse_coding.iteration import Start, Until
from deconvnet.sparse_coding.prior import Prior, penalty, shrink
from deconvnet.sparse_coding.problem import METHODS, Problem, SolverSettings, duality_gap
from deconvnet.sparse_coding.proximal_gradient import fista, ista
from deconvnet.sparse_coding.solve import (
    SOLVERS,
    default_solver,
    lam_from_ratio,
    solve,
    sparse_code,
)

EXACT = ("admm", "fista", "ista")
BOUNDARIES = ("valid", "circular")


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit(f):
    return f / torch.linalg.vector_norm(f, dim=(1, 2, 3), keepdim=True)


def problem(boundary="valid", *, K=3, C=1, size=3, image=(6, 7), N=2, seed=0):
    f = unit(rand(K, C, size, size, seed=seed))
    return Deconvolution(f, boundary), rand(N, C, *image, seed=seed + 100)


def two_layers(N=2):
    """R_2 with the switches of its images, and the images."""
    y = rand(N, 1, 9, 9, seed=7)
    F1 = Deconvolution(unit(rand(3, 1, 3, 3, seed=8)))
    z1 = F1.adjoint(y)
    p, switches = max_pool(z1, (1, 2, 2))
    F2 = Deconvolution(unit(rand(4, p.shape[1], 3, 3, seed=9)))
    return F1 @ Unpooling(switches, z1.shape[1:]) @ F2, y


def three_layers(N=2):
    """R_3 with switches over maps and places, partial windows, and a scale; and the images."""
    y = rand(N, 1, 11, 10, seed=17)
    A = Deconvolution(unit(rand(3, 1, 3, 3, seed=18)))
    for level, window in enumerate([(2, 2, 2), (3, 2, 2)]):
        z = A.adjoint(y)
        p, switches = max_pool(z, window)
        F = Deconvolution(unit(rand(4, p.shape[1], 3, 2, seed=19 + level)))
        A = A @ Unpooling(switches, z.shape[1:]) @ Scaling(0.7) @ F
    return A, y


# Operators with the window of the pooling on their maps, none of which divides them.
WINDOWED = {
    "F": (problem, (2, 3, 3)),
    "F, circular": (lambda: problem("circular", C=2), (2, 4, 3)),
    "R_2": (two_layers, (3, 2, 2)),
    "R_3": (three_layers, (3, 3, 2)),
}
windowed = pytest.mark.parametrize("name", WINDOWED)


def to_the_end(method, iterations=3000):
    return SolverSettings(method=method, iterations=iterations, tolerance=1e-8)


def steady(method, iterations=3000):
    """The same with one gradient step for all iterations."""
    return dataclasses.replace(to_the_end(method, iterations), adaptive=False)


def gradient_steps(
    A, b, z, *, lam, prior=None, momentum, adaptive=True, step=None, iterations, callback=None
):
    """(z, step, iterations) of FISTA or ISTA by itself, without what `solve` does around it."""
    watch = callback and (lambda i, method: callback(i, method.maps(), method.penalty()))
    found = (fista if momentum else ista)(
        Problem(A, b, lam, prior or Prior()),
        Start(z, step),
        SolverSettings("fista", adaptive=adaptive),
        Until(iterations, callback=watch),
    )
    return found.z, found.step, found.iterations


def objective(A, b, z, lam, p=1.0):
    fit = lam / 2 * (b - A(z)).square().sum((1, 2, 3))
    return fit + torch.stack([penalty(image, p) for image in z])


def lasso(A, b, lam):
    """The minimum for every image, by coordinate descent on the dense matrix."""
    M = convolution_matrix(A.f, b.shape[2:], boundary=A.boundary).numpy()
    maps = (A.f.shape[0], *map_size(b.shape[2:], A.f.shape[2:], A.boundary))
    model = Lasso(alpha=1 / (lam * len(M)), fit_intercept=False, tol=1e-14, max_iter=200_000)
    found = [model.fit(M, image.flatten().numpy()).coef_.reshape(maps) for image in b]
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("channels", "lam"), [(1, 3.0), (2, 3.0), (1, 30.0)])
def test_all_methods_reach_the_certified_minimum_and_that_of_scikit_learn(boundary, channels, lam):
    A, b = problem(boundary, C=channels, N=1)
    minimum = objective(A, b, lasso(A, b, lam), lam)
    for method in EXACT:
        # ista needs ten times the iterations of the others; its certificate closes last.
        settings = to_the_end(method, 1000 if method == "ista" else 3000)
        solution = solve(A, b, lam=lam, settings=settings)
        bound = 1e-3 if method == "ista" else 1e-6
        certificate = duality_gap(A, b, solution.z, lam) / minimum
        assert (certificate <= (0.1 if method == "ista" else 1e-6)).all(), method
        assert (solution.objective <= (1 + bound) * minimum).all(), method
        assert (solution.objective >= (1 - 1e-9) * minimum).all(), method
        assert_close(solution.objective, objective(A, b, solution.z, lam), rtol=1e-12, atol=0)
    first = 0.01 * lam
    slow = SolverSettings(
        "half_quadratic", beta_start=first, beta_factor=1.045, beta_end=first * 1.045**199
    )
    assert len(slow.betas()) == 200
    start = Start(torch.zeros_like(solution.z))
    x = half_quadratic(Problem(A, b, lam), start, slow, Until(1)).z
    # The last steps of the schedule freeze what the earlier ones left undone.
    assert (objective(A, b, x, lam) <= 1.01 * minimum).all()


def test_maps_agree_with_scikit_learn_where_the_minimum_is_unique():
    # One map and a circular border: a square, well conditioned matrix.
    f = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    f[0, 0] = 0.15 * rand(3, 3, seed=4)
    f[0, 0, 0, 0] = 1
    A, b = Deconvolution(f, "circular"), rand(2, 1, 6, 7, seed=5)
    expected = lasso(A, b, 2.0)
    assert 0 < (expected != 0).sum() < expected.numel()
    for method in EXACT:
        found = solve(A, b, lam=2.0, settings=to_the_end(method)).z
        assert_close(found, expected, rtol=0, atol=1e-6)
        assert torch.equal(found != 0, expected != 0)


def test_duality_gap_bounds_the_distance_to_the_minimum_everywhere():
    A, b = problem()
    lam = 10.0
    minimum = objective(A, b, lasso(A, b, lam), lam)
    for seed, size in enumerate((0.0, 0.01, 0.1, 1.0)):
        z = size * rand(*A.adjoint(b).shape, seed=seed)
        excess = objective(A, b, z, lam) - minimum
        assert (excess > 0).all()
        assert (duality_gap(A, b, z, lam) >= excess).all()


@pytest.mark.parametrize("p", [1.0, 0.8, 0.5, 0.0])
@pytest.mark.parametrize("make", [problem, lambda: problem("circular", C=2), two_layers])
def test_ista_never_raises_the_objective(p, make):
    A, b = make()
    values = []
    solve(
        A,
        b,
        lam=20.0,
        prior=Prior(p=p),
        settings=SolverSettings(method="ista", iterations=60, tolerance=0),
        callback=lambda i, z, beta: values.append(objective(A, b, z, 20.0, p)),
    )
    values = torch.stack(values)
    assert (values.diff(dim=0) <= 1e-12 * values[:-1]).all()
    # From zero, at the start, to something better. (p = 0 may stay there: 0 is a local minimum.)
    assert p == 0 or (values[-1] < 10 * b.square().sum((1, 2, 3))).all()


def in_each_window(z, window):
    """(N, K', H', W'): the number of non-zero coefficients of each window."""
    number = (z != 0).double()[:, None]
    volume = window[0] * window[1] * window[2]
    mean = torch.nn.functional.avg_pool3d(
        number, window, ceil_mode=True, count_include_pad=True, divisor_override=volume
    )
    return (mean * volume).round()[:, 0]


@windowed
@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_objective_never_rises_while_switches_are_inferred_with_the_maps(name, p, momentum):
    make, window = WINDOWED[name]
    A, b = make()
    lam, values, switches = 20.0, [], []

    def watch(i, z, beta):
        values.append(objective(A, b, z, lam, p))
        switches.append(max_pool(z, window)[1])
        assert in_each_window(z, window).max() <= 1

    z = torch.zeros_like(A.adjoint(b))
    prior = Prior(p, window=window)
    gradient_steps(
        *(A, b, z), lam=lam, prior=prior, momentum=momentum, iterations=50, callback=watch
    )
    values = torch.stack([objective(A, b, z, lam, p), *values])
    assert (values.diff(dim=0) <= 1e-12 * values[:-1]).all()
    assert (values[-1] < 0.9 * values[0]).all()
    # Through several layers some maxima are dropped for others on the way.
    assert (switches[0] != switches[-1]).any() or not name.startswith("R_")


@windowed
@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_objective_never_rises_with_switches_that_are_frozen(name, p, momentum):
    make, window = WINDOWED[name]
    A, b = make()
    maps = A.adjoint(b)
    start, switches = max_pool(maps, window)
    A, values = A @ Unpooling(switches, maps.shape[1:]), []
    gradient_steps(
        A,
        b,
        torch.zeros_like(start),
        lam=20.0,
        prior=Prior(p),
        momentum=momentum,
        iterations=50,
        callback=lambda i, z, beta: values.append(objective(A, b, z, 20.0, p)),
    )
    values = torch.stack([10.0 * b.square().sum((1, 2, 3)), *values])
    assert (values.diff(dim=0) <= 1e-12 * values[:-1]).all()
    assert (values[-1] < 0.95 * values[0]).all()


@windowed
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_with_frozen_switches_the_safe_step_alone_never_raises_the_objective(name, p):
    make, window = WINDOWED[name]
    A, b = make()
    lam, maps = 20.0, A.adjoint(b)
    switches = max_pool(maps, window)[1]
    A = A @ Unpooling(switches, maps.shape[1:])
    step = 1 / (lam * A.squared_norm(b))
    z = torch.zeros(switches.shape, dtype=b.dtype)
    values = [objective(A, b, z, lam, p)]
    for _ in range(40):
        z = shrink(z - step * lam * A.adjoint(A(z) - b), 1 / step, p)
        values.append(objective(A, b, z, lam, p))
    values = torch.stack(values)
    assert (values.diff(dim=0) <= 1e-12 * values[:-1]).all()
    # That is what ista does where steps do not adapt, and none has to be shortened.
    settings = SolverSettings(method="ista", iterations=40, tolerance=0, adaptive=False)
    found = solve(A, b, lam=lam, prior=Prior(p=p), settings=settings)
    assert_close(found.z, z, rtol=1e-9, atol=1e-10)
    assert_close(found.step, step, rtol=1e-12, atol=0)


@functools.cache
def least_objective(name, lam):
    A, b = WINDOWED[name][0]()
    return solve(A, b, lam=lam, settings=steady("fista", 400)).objective


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("method", ["ista", "fista"])
@pytest.mark.parametrize("name", ["F", "R_2"])
def test_a_step_that_is_far_too_long_is_halved_until_it_serves(method, name, adaptive):
    A, b = WINDOWED[name][0]()
    lam, betas, values = 5.0, [], []
    safe = 1 / (lam * A.squared_norm(b))
    settings = SolverSettings(
        method=method,
        step=50 * safe.max().item(),
        adaptive=adaptive,
        iterations=250 if method == "ista" else 120,
        tolerance=0,
    )

    def watch(i, z, beta):
        betas.append(beta)
        values.append(objective(A, b, z, lam))

    found = solve(A, b, lam=lam, settings=settings, callback=watch)
    values = torch.stack([lam / 2 * b.square().sum((1, 2, 3)), *values])
    assert (values.diff(dim=0) <= 1e-12 * values[:-1]).all()
    assert_close(1 / betas[-1], found.step)
    if not adaptive:
        halved = (settings.step / found.step).log2()
        assert torch.equal(halved, halved.round()) and (halved >= 4).all()
        # Longer than this a gradient step diverges; far shorter it would crawl.
        assert (found.step < 2.1 * safe).all() and (found.step > 0.2 * safe).all()
    expected = least_objective(name, lam)
    assert_close(found.objective, expected, rtol=1e-2 if method == "ista" else 1e-3, atol=0)


@pytest.mark.parametrize("method", ["ista", "fista"])
def test_the_step_that_served_is_returned_and_the_next_visit_begins_with_it(method):
    A, b = two_layers()
    z = torch.zeros_like(A.adjoint(b))
    for adaptive in (False, True):
        settings = SolverSettings(method=method, training_iterations=5, adaptive=adaptive)
        first = solve(A, b, lam=20.0, settings=settings, training=True)
        assert first.step.shape == (2, 1, 1, 1)
        options = dict(lam=20.0, momentum=method == "fista", adaptive=adaptive, iterations=5)
        z, step, _ = gradient_steps(A, b, torch.zeros_like(z), **options)
        assert torch.equal(step, first.step) and torch.equal(z, first.z)
        given = dict(state=first.state, step=first.step)
        again = solve(A, b, lam=20.0, settings=settings, training=True, **given)
        z, step, _ = gradient_steps(A, b, z, step=step, **options)
        assert torch.equal(step, again.step) and torch.equal(z, again.z)
        assert (again.objective < first.objective).all()
        if not adaptive:
            assert_close(again.step, 1 / (20.0 * A.squared_norm(b)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["ista", "fista"])
def test_an_image_whose_maps_were_zero_for_long_is_explained_as_soon_as_it_pays(method):
    A, b = problem()
    A, b = Deconvolution(A.f.float()), b.float()
    settings = SolverSettings(method=method, iterations=200, tolerance=0, training_iterations=5)
    below = 0.9 / A.adjoint(b).abs().max().item()
    idle = solve(A, b, lam=below, settings=settings)
    assert not idle.z.any() and torch.isfinite(idle.step).all()
    given = dict(state=idle.state, step=idle.step)
    found = solve(A, b, lam=20.0, settings=settings, training=True, **given)
    fresh = solve(A, b, lam=20.0, settings=settings, training=True)
    assert torch.isfinite(found.step).all()
    # An iteration or two may go by until the step is of the right size again.
    assert (found.objective < 1.5 * fresh.objective).all()


@pytest.mark.parametrize("method", ["admm", "half_quadratic"])
def test_methods_without_gradient_steps_return_none(method):
    A, b = problem()
    settings = SolverSettings(method=method, iterations=1)
    assert solve(A, b, lam=20.0, settings=settings).step is None


@windowed
@pytest.mark.parametrize("method", ["ista", "fista"])
def test_steps_that_adapt_do_not_fall_behind_those_that_are_always_safe(name, method):
    make, window = WINDOWED[name]
    A, b = make()
    for prior in (Prior(window=window), Prior()):
        found = [
            solve(
                A,
                b,
                lam=20.0,
                settings=SolverSettings(
                    method=method, iterations=10, tolerance=0, adaptive=adaptive
                ),
                prior=prior,
            ).objective.sum()
            for adaptive in (True, False)
        ]
        assert found[0] < 1.1 * found[1]


@pytest.mark.parametrize("make", [two_layers, three_layers])
def test_half_quadratic_on_a_slow_schedule_and_ista_come_near_the_minimum(make):
    A, b = make()
    lam = 20.0
    minimum = solve(A, b, lam=lam, settings=steady("fista", 500))
    assert (duality_gap(A, b, minimum.z, lam) <= 1e-2 * minimum.objective).all()
    slow = SolverSettings(
        method="half_quadratic", iterations=1, beta_start=0.2, beta_factor=1.3, beta_end=1e3
    )
    for settings in (slow, steady("ista", 300), to_the_end("ista", 150)):
        found = solve(A, b, lam=lam, settings=settings)
        excess = found.objective / minimum.objective - 1
        assert (excess > -1e-3).all() and (excess < 0.05).all(), (settings, excess)


@windowed
@pytest.mark.parametrize("method", ["admm", "half_quadratic", "fista", "ista"])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_maps_found_with_a_window_have_one_entry_in_each_at_most(name, method, p):
    make, window = WINDOWED[name]
    A, b = make()
    iterations = 1 if method == "half_quadratic" else 30
    settings = SolverSettings(method=method, iterations=iterations)
    found = solve(A, b, lam=20.0, prior=Prior(p=p, window=window), settings=settings)
    counts = in_each_window(found.z, window)
    assert counts.sum() == torch.count_nonzero(found.z) > 0
    assert counts.max() == 1
    # No worse than all zeros, and consistent with the reported terms.
    assert_close(found.objective, objective(A, b, found.z, 20.0, p), rtol=1e-10, atol=0)
    assert_close(found.residual, b - A(found.z), rtol=0, atol=0)
    if method in ("fista", "ista"):
        assert (found.objective < 10.0 * b.square().sum((1, 2, 3))).all()


@windowed
def test_where_maps_with_a_window_no_longer_move_they_are_the_minimum_of_their_switches(name):
    make, window = WINDOWED[name]
    A, b = make()
    lam = 20.0
    found = solve(A, b, lam=lam, prior=Prior(window=window), settings=to_the_end("fista"))
    pooled, switches = max_pool(found.z, window)
    assert torch.equal(unpool(pooled, switches, found.z.shape), found.z)
    frozen = A @ Unpooling(switches, found.z.shape[1:])
    assert (duality_gap(frozen, b, pooled, lam) <= 1e-5 * found.objective).all()
    minimum = solve(frozen, b, lam=lam, settings=to_the_end("fista", 800))
    assert_close(found.objective, minimum.objective, rtol=1e-5, atol=0)
    # Without the constraint there is more to explain with.
    free = solve(A, b, lam=lam, settings=to_the_end("fista", 100)).objective
    assert (free < 0.99 * found.objective).all()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_maps_are_zero_exactly_up_to_the_closed_form_lam(boundary):
    A, b = problem(boundary, N=1)
    lam = 1 / A.adjoint(b).abs().max().item()
    for method in EXACT:
        below = solve(A, b, lam=0.99 * lam, settings=to_the_end(method, 100))
        assert (below.z == 0).all() and torch.equal(below.residual, b)
        assert below.objective.item() == pytest.approx(0.99 * lam / 2 * b.square().sum().item())
        assert duality_gap(A, b, below.z, 0.99 * lam).item() == pytest.approx(0, abs=1e-12)
        above = solve(A, b, lam=1.01 * lam, settings=to_the_end(method, 100))
        assert 0 < torch.count_nonzero(above.z) < 5
        strongest = A.adjoint(b).abs().argmax()
        assert above.z.flatten()[strongest] != 0


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_exact_z_step_is_the_cg_z_step_and_a_dense_solve(boundary, channels):
    A, b = problem(boundary, C=channels)
    lam, beta, p = 30.0, 4.0, 0.8
    z = rand(*A.adjoint(b).shape, seed=3)
    one, start = Problem(A, b, lam, Prior(p)), Start(z)
    once = SolverSettings("half_quadratic", beta_start=beta, beta_end=beta)
    solution = half_quadratic(one, start, once, Until(1))
    x, exact = solution.z, solution.state
    by_cg = dataclasses.replace(once, z_step="cg", cg_iterations=500)
    by_cg = half_quadratic(one, start, by_cg, Until(1)).state
    assert torch.equal(x, shrink(exact, beta, p))
    M = convolution_matrix(A.f, b.shape[2:], boundary=boundary)
    system = lam * M.T @ M + beta * torch.eye(M.shape[1], dtype=M.dtype)
    right = lam * b.flatten(1) @ M + beta * shrink(z, beta, p).flatten(1)
    expected = torch.linalg.solve(system, right.T).T.view(z.shape)
    # The residuals are 1e-6 (cg) and 1e-5 (valid) of their right hand sides, nothing (circular).
    assert_close(by_cg, expected, rtol=0, atol=1e-4)
    assert_close(exact, expected, rtol=0, atol=1e-11 if boundary == "circular" else 1e-4)


@pytest.mark.parametrize("z_step", ["exact", "cg"])
@pytest.mark.parametrize("p", [1.0, 0.8])
@pytest.mark.parametrize("make", [problem, lambda: problem("circular", C=2), two_layers])
def test_the_schedule_of_the_papers_gives_finite_maps_that_beat_none(z_step, p, make):
    A, b = make()
    settings = SolverSettings(method="half_quadratic", z_step=z_step, iterations=1)
    assert settings.betas() == pytest.approx([6.0**i for i in range(7)])
    solution = solve(A, b, lam=20.0, prior=Prior(p=p), settings=settings)
    assert torch.isfinite(solution.z).all()
    assert (solution.objective < 10 * b.square().sum((1, 2, 3))).all()
    assert solution.iterations == 7


CHEAP = {
    "admm": SolverSettings(iterations=40, tolerance=1e-2),
    "fista": SolverSettings(method="fista", iterations=40, tolerance=1e-2),
    "ista": SolverSettings(method="ista", iterations=40, tolerance=1e-2),
    "half_quadratic": SolverSettings(method="half_quadratic", iterations=1),
    "half_quadratic by cg": SolverSettings(method="half_quadratic", z_step="cg", iterations=1),
}


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_maps_of_an_image_do_not_depend_on_its_companions(name, boundary, dtype):
    A, b = problem(boundary, N=3)
    A, b = Deconvolution(A.f.to(dtype), boundary), b.to(dtype)
    # Companions that stop at once, and ones that need all iterations.
    others = b.clone()
    others[0], others[2] = 1e-4 * others[0], 50 * others[2]
    options = dict(lam=20.0, settings=CHEAP[name])
    together, differently = solve(A, b, **options), solve(A, others, **options)
    for part in ("z", "state", "residual", "objective"):
        assert torch.equal(getattr(together, part)[1], getattr(differently, part)[1]), part
    # Alone it is the same up to the rounding of transforms, which group images for speed.
    alone = solve(A, b[1:2], **options)
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    if dtype == torch.float32 and CHEAP[name].method in ("fista", "ista"):
        # Whether a step is shortened may turn on a rounding, and the course then differs a little.
        bound = 1e-3
    assert_close(alone.z[0], together.z[1], rtol=0, atol=bound * together.z[1].abs().max().item())


@pytest.mark.parametrize("name", CHEAP)
def test_the_maps_of_an_image_do_not_depend_on_its_companions_in_a_stack(name):
    A, b = two_layers()
    others = torch.stack([b[0], 50 * b[1]])
    options = dict(lam=20.0, settings=CHEAP[name])
    assert torch.equal(solve(A, b, **options).z[0], solve(A, others, **options).z[0])


@pytest.mark.parametrize("name", CHEAP)
def test_permuting_the_images_permutes_the_maps(name):
    A, b = problem(N=3)
    order = torch.tensor([2, 0, 1])
    options = dict(lam=20.0, settings=CHEAP[name])
    assert_close(
        solve(A, b[order], **options).z, solve(A, b, **options).z[order], rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_restart_from_the_minimum_stays_there(method, boundary):
    A, b = problem(boundary)
    settings = to_the_end(method, 400)
    first = solve(A, b, lam=20.0, settings=settings)
    again = solve(A, b, lam=20.0, settings=settings, state=first.state, training=True)
    assert again.iterations == settings.training_iterations
    # Where the border does not wrap, a visit begins with an inexact z-step, from nothing.
    kick = 1e-5 if (method, boundary) == ("admm", "valid") else 1e-10
    assert (again.objective <= (1 + kick) * first.objective).all()
    from_zero = solve(A, b, lam=20.0, settings=settings, training=True)
    assert (from_zero.objective > 1.01 * first.objective).all()


def test_visits_of_few_iterations_add_up_to_one_long_run():
    # Circular, because there every z-step is exact and nothing but the state passes between visits.
    A, b = problem("circular", C=2)
    for settings in (
        SolverSettings(adaptive=False, tolerance=0, iterations=30, training_iterations=5),
        SolverSettings(method="ista", tolerance=0, iterations=30, training_iterations=5),
    ):
        whole = solve(A, b, lam=20.0, prior=Prior(p=0.8), settings=settings)
        state = step = None
        for _ in range(6):
            given = dict(state=state, step=step, training=True)
            visit = solve(A, b, lam=20.0, prior=Prior(p=0.8), settings=settings, **given)
            state, step = visit.state, visit.step
        assert_close(visit.z, whole.z, rtol=1e-10, atol=1e-11)
        assert_close(visit.state, whole.state, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("method", EXACT)
def test_exponents_below_one_give_sparser_maps_at_a_similar_error(method):
    A, b = problem(K=4, image=(7, 7))
    lam, p = 30.0, 0.7
    convex = solve(A, b, lam=lam, settings=to_the_end(method, 150))
    # A splitting with a fixed beta settles slowly where the prior is not convex.
    settings = to_the_end(method, 1000 if method == "admm" else 150)
    found = solve(A, b, lam=lam, prior=Prior(p=p), settings=settings)
    nonzero = [torch.count_nonzero(s.z) for s in (found, convex)]
    assert nonzero[0] < 0.8 * nonzero[1]
    for solution in (found, convex):
        assert (norm(solution.residual) < 0.1 * norm(b)).all()
    assert (found.objective < objective(A, b, convex.z, lam, p)).all()


def test_admm_and_fista_agree_on_two_layers_with_switches():
    A, b = two_layers()
    lam = 20.0
    values = {}
    for method in ("admm", "fista"):
        settings = SolverSettings(method, iterations=5000, gap=5e-6)
        solution = solve(A, b, lam=lam, settings=settings)
        values[method] = solution.objective
        assert (duality_gap(A, b, solution.z, lam) <= 1e-5 * solution.objective).all()
    assert_close(values["admm"], values["fista"], rtol=1e-5, atol=0)
    assert (values["admm"] < 0.9 * lam / 2 * b.square().sum((1, 2, 3))).all()


def planted(boundary, N=2, K=4, size=5, image=(24, 24), count=12):
    """Images of a few strong, far apart coefficients under random filters."""
    generator = torch.Generator().manual_seed(3)
    f = unit(rand(K, 1, size, size, seed=2))
    z = torch.zeros(N, K, *map_size(image, (size, size), boundary), dtype=torch.float64)
    for n in range(N):
        # Cells of a 4 x 4 grid, so that no two are closer than 3 pixels.
        cells = torch.randperm(16, generator=generator)[:count].tolist()
        for cell in cells:
            k = int(torch.randint(K, (1,), generator=generator))
            sign = 1 - 2 * int(torch.randint(2, (1,), generator=generator))
            i, j = (5 + 5 * (cell // 4), 5 + 5 * (cell % 4))
            i, j = (x + int(torch.randint(3, (1,), generator=generator)) for x in (i, j))
            z[n, k, i, j] = sign * (1 + float(torch.rand(1, generator=generator)))
    return f, z, deconvolve(z, f, boundary=boundary)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("p", [1.0, 0.8])
def test_planted_sparse_maps_are_recovered(boundary, p):
    f, z, y = planted(boundary)
    solution = sparse_code(
        y,
        f,
        lam=200.0,
        p=p,
        boundary=boundary,
        settings=SolverSettings(iterations=300, tolerance=1e-6),
    )
    assert torch.equal(solution.z.abs() > 0.1, z != 0)
    assert_close(solution.z, z, rtol=0, atol=0.02)


def test_sparse_code_is_solve_on_the_deconvolution_of_the_filters():
    f, b = unit(rand(3, 2, 3, 3)), rand(2, 2, 6, 7, seed=1)
    for boundary in BOUNDARIES:
        found = sparse_code(b, f.float(), lam=1.0, p=0.9, boundary=boundary)
        A = Deconvolution(f.float().double(), boundary)
        expected = solve(A, b, lam=1.0, prior=Prior(p=0.9), settings=default_solver(b, 0.9))
        assert torch.equal(found.z, expected.z) and found.z.dtype == torch.float64
        assert torch.equal(found.residual, b - A(found.z))
        assert (found.z == 0).any() and (found.z != 0).any()


def test_the_default_without_coordinate_descent_is_of_the_accuracy_of_that_with_it(textures):
    y = textures(1, 1, 24, 24).double()
    y = y - torch.nn.functional.avg_pool2d(y, 9, 1, 4, count_include_pad=False)
    patches = y.unfold(2, 7, 3).unfold(3, 7, 3).reshape(-1, 1, 7, 7)
    f = unit(patches[:: len(patches) // 12][:12] + 1e-3)
    elsewhere = default_solver(torch.empty(0, device="meta"))
    assert elsewhere.method == "admm" and elsewhere.gap is None
    for lam_ratio in (0.1, 0.01, 0.003):
        certain = SolverSettings("coordinate", iterations=2000, gap=5e-6)
        minimum = sparse_code(y, f, lam_ratio=lam_ratio, settings=certain).objective
        here, there = (
            (
                sparse_code(y, f, lam_ratio=lam_ratio, settings=settings).objective / minimum - 1
            ).item()
            for settings in (None, elsewhere)
        )
        assert there < 3 * here + 5e-5, lam_ratio  # of a tolerance of 1e-4


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("p", [1.0, 0.8])
def test_single_precision_is_kept_and_ends_where_double_does(name, p):
    A, b = problem()
    double = solve(A, b, lam=20.0, prior=Prior(p=p), settings=CHEAP[name])
    single = solve(
        Deconvolution(A.f.float()), b.float(), lam=20.0, prior=Prior(p=p), settings=CHEAP[name]
    )
    assert single.z.dtype == single.state.dtype == single.residual.dtype == torch.float32
    assert single.objective.dtype == torch.float64
    # For p < 1 one rounding can decide whether a coefficient jumps.
    assert_close(single.objective, double.objective, rtol=1e-4 if p == 1 else 0.05, atol=0)


@pytest.mark.parametrize("name", CHEAP)
def test_the_callback_sees_every_iteration_and_last_the_solution(name):
    A, b = problem()
    seen = []
    solution = solve(
        A, b, lam=20.0, settings=CHEAP[name], callback=lambda *event: seen.append(event)
    )
    assert [i for i, *_ in seen] == list(range(1, solution.iterations + 1))
    assert torch.equal(seen[-1][1], solution.z)
    assert (seen[-1][1] == 0).any()
    assert all(beta.shape == (2, 1, 1, 1) and (beta > 0).all() for *_, beta in seen)


def test_images_of_zeros_have_maps_of_zeros():
    A, b = problem()
    b[0] = 0
    for settings in CHEAP.values():
        solution = solve(A, b, lam=20.0, settings=settings)
        assert (solution.z[0] == 0).all() and (solution.z[1] != 0).any()
        assert solution.objective[0] == 0


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("p", [1.0, 0.8])
def test_a_non_finite_image_is_reported_and_leaves_the_other_images_unchanged(name, p):
    A, b = problem()
    broken = b.clone()
    broken[0, 0, 2, 3] = float("nan")
    found = solve(A, broken, lam=20.0, prior=Prior(p=p), settings=CHEAP[name])
    assert found.objective[0].isnan()
    assert torch.equal(
        found.z[1], solve(A, b, lam=20.0, prior=Prior(p=p), settings=CHEAP[name]).z[1]
    )


@windowed
@pytest.mark.parametrize("method", ["admm", "half_quadratic", "fista", "ista"])
def test_with_a_window_too_the_maps_of_an_image_do_not_depend_on_its_companions(name, method):
    make, window = WINDOWED[name]
    A, b = make()
    iterations = 1 if method == "half_quadratic" else 15
    settings = SolverSettings(method=method, iterations=iterations, tolerance=1e-2)
    options = dict(lam=20.0, prior=Prior(window=window), settings=settings)
    expected = solve(A, b, **options)
    for factor in (50.0, 1e-4, 0.0, float("nan")):
        others = torch.stack([b[0] * factor, b[1]])
        found = solve(A, others, **options)
        for part in ("z", "state", "residual", "objective"):
            assert torch.equal(getattr(found, part)[1], getattr(expected, part)[1]), part
        if factor != factor:
            assert found.objective[0].isnan()


def test_steps_that_are_given_are_used():
    A, b = problem()
    z = torch.zeros_like(A.adjoint(b))
    step = torch.tensor([0.01, 0.002], dtype=torch.float64).view(2, 1, 1, 1)
    found, used, count = gradient_steps(A, b, z, lam=5.0, momentum=False, step=step, iterations=1)
    assert count == 1
    assert_close(found, shrink(step * 5.0 * A.adjoint(b), 1 / step, 1.0))


def test_admm_without_relaxation_is_the_textbook_iteration():
    A, b = problem("circular")
    lam, beta = 20.0, 30.0
    M = convolution_matrix(A.f, b.shape[2:], boundary="circular")
    system = lam * M.T @ M + beta * torch.eye(M.shape[1], dtype=M.dtype)
    x = u = torch.zeros(2, M.shape[1], dtype=M.dtype)
    for _ in range(7):
        z = torch.linalg.solve(system, (lam * b.flatten(1) @ M + beta * (x - u)).T).T
        x = shrink(z + u, beta)
        u = u + z - x
    zeros = torch.zeros_like(A.adjoint(b))
    settings = SolverSettings("admm", rho=beta / lam, relaxation=1.0, adaptive=False)
    found = admm(Problem(A, b, lam), Start(zeros), settings, Until(7))
    assert_close(found.z.flatten(1), x, rtol=1e-10, atol=1e-11)
    assert_close(found.state.flatten(1), x + u, rtol=1e-10, atol=1e-11)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_wrong_images_filters_and_weights_are_refused():
    f, b = unit(rand(3, 2, 3, 3)), rand(2, 2, 6, 7)
    with refused(
        "images must have the shape (N, C, H, W), got (2, 6, 7): use images[None] for one"
    ):
        sparse_code(b[0], f, lam=1.0)
    shape = "filters must have the shape (K, 2, h, w) for images (N, 2, H, W), got "
    with refused(f"{shape}(2, 3, 3): use filters[:, None] for grey filters (K, h, w), or"):
        sparse_code(b, f[0], lam=1.0)
    with refused(f"{shape}(3, 3, 2, 3): use torch.as_tensor(filters).permute(3, 2, 0, 1) for"):
        sparse_code(b, f.permute(2, 3, 1, 0), lam=1.0)
    with refused(f"{shape}(3, 1, 3, 3): use images.mean(1, keepdim=True) for grey images, or"):
        sparse_code(b, f[:, :1], lam=1.0)
    with refused("got (3, 2, 3, 3); images (N, H, W, C) need .permute(0, 3, 1, 2)"):
        sparse_code(rand(2, 20, 9, 2), f, lam=1.0)
    with refused("images must be a tensor or a numpy array, got str: use deconvnet.read_image("):
        sparse_code("photo.jpg", f, lam=1.0)
    for lam in (0.0, -1.0, float("nan")):
        with refused(f"lam={lam}: must be positive"):
            sparse_code(b, f, lam=lam)
    with refused("p=1.5: the exponent"):
        sparse_code(b, f, lam=1.0, p=1.5)
    with refused("boundary='mirror': choose 'valid' or 'circular'"):
        sparse_code(b, f, lam=1.0, boundary="mirror")
    for value in (float("nan"), float("inf")):
        for images, filters in ((b * value, f), (b, f * value)):
            with refused("images and filters must be finite"):
                sparse_code(images, filters, lam=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(method="lars"),
            "solver.method=lars: choose one of admm, half_quadratic, fista, ista",
        ),
        (dict(z_step="fft"), "solver.z_step=fft: choose one of exact, cg"),
        (dict(iterations=0), "solver.iterations=0: must be at least 1"),
        (dict(training_iterations=0), "solver.training_iterations=0: must be at least 1"),
        (dict(cg_iterations=-1), "solver.cg_iterations=-1: must be at least 1"),
        (dict(rho=0.0), "solver.rho=0.0: must be positive"),
        (dict(step=-1.0), "solver.step=-1.0: must be positive"),
        (dict(step=0.0), "solver.step=0.0: must be positive"),
        (dict(beta_start=-1.0), "solver.beta_start=-1.0: must be positive"),
        (dict(tolerance=1.0), "solver.tolerance=1.0: must"),
        (dict(relaxation=2.0), "solver.relaxation=2.0: must lie between 0 and 2"),
        (dict(beta_factor=1.0), "the schedule must rise"),
        (dict(beta_end=0.5), "the schedule must rise"),
        (dict(beta_end=float("inf")), "beta_end=inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with refused(message):
        SolverSettings(**settings)


def test_the_schedule_ends_at_its_bound_and_never_above():
    assert SolverSettings(beta_start=1, beta_factor=10, beta_end=1e5).betas() == pytest.approx(
        [1, 10, 100, 1e3, 1e4, 1e5]
    )
    assert SolverSettings(beta_start=2, beta_factor=3, beta_end=53).betas() == [2, 6, 18]
    assert SolverSettings(beta_start=2, beta_end=2).betas() == [2]


@functools.cache
def signed_maps():
    A, b = problem(image=(8, 9))
    return solve(A, b, lam=20.0, settings=to_the_end("fista", 300)).z


@functools.cache
def non_negative_minimum():
    A, b = problem(image=(8, 9))
    certain = SolverSettings("coordinate", iterations=500, gap=1e-9)
    return solve(A, b, lam=20.0, prior=Prior(non_negative=True), settings=certain).objective


@pytest.mark.parametrize("gap", [None, 1e-6])
@pytest.mark.parametrize("method", ["fista", "ista", "admm", "coordinate"])
def test_a_start_with_negative_coefficients_ends_at_the_non_negative_minimum(method, gap):
    A, b = problem(image=(8, 9))
    start = signed_maps()
    assert (start < 0).any()
    prior = Prior(non_negative=True)
    options = dict(lam=20.0, prior=prior)
    settings = dataclasses.replace(to_the_end(method, 1000), gap=gap)
    expected = non_negative_minimum()
    found = solve(A, b, settings=settings, state=start, **options)
    assert (found.z >= 0).all()
    assert_close(found.objective, expected, rtol=1e-4, atol=0)
    assert (duality_gap(A, b, start, 20.0, prior) == torch.inf).all()


@pytest.mark.parametrize("method", ["fista", "ista"])
@pytest.mark.parametrize("non_negative", [False, True])
def test_a_start_with_several_coefficients_in_a_window_ends_with_one(method, non_negative):
    A, b = problem(image=(8, 9))
    start = signed_maps()
    prior = Prior(window=(1, 2, 2), non_negative=non_negative)
    assert (prior(start) == torch.inf).all() and torch.isfinite(prior.value(start)).all()
    found = solve(A, b, lam=20.0, prior=prior, settings=to_the_end(method, 50), state=start)
    p, switches = max_pool(found.z, (1, 2, 2))
    assert torch.equal(unpool(p, switches, found.z.shape), found.z)
    assert torch.isfinite(prior(found.z)).all()
    begun = prior.feasible(start)
    before = 10.0 * (b - A(begun)).square().sum((1, 2, 3)) + prior(begun)
    assert (found.objective <= before * (1 + 1e-12)).all()


def test_what_the_prior_does_not_allow_costs_infinity_and_what_it_allows_its_value():
    z = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 2.0, 0.0, 1.0]]).view(2, 1, 1, 4)
    assert Prior()(z).tolist() == [3.0, 3.0]
    assert Prior(non_negative=True)(z).tolist() == [torch.inf, 3.0]
    assert Prior(window=(1, 1, 2))(z).tolist() == [3.0, 3.0]
    assert Prior(window=(1, 1, 4))(z).tolist() == [torch.inf, torch.inf]
    assert torch.equal(Prior(window=(1, 1, 4)).feasible(z), z * (z.abs() == 2))


@pytest.mark.parametrize("offset", [0.5, 10.0, 1e3])
@pytest.mark.parametrize("method", ["coordinate", "admm", "fista"])
def test_a_constant_that_no_filter_explains_does_not_stop_it_early(method, offset):
    f = rand(4, 1, 3, 3, seed=1)
    f = unit(f - f.mean((2, 3), keepdim=True))
    b = rand(2, 1, 24, 25, seed=2)
    b = b - b.mean((2, 3), keepdim=True)
    settings = SolverSettings(method, iterations=500, tolerance=1e-4)
    plain, found = (
        sparse_code(y, f, lam=2.0, boundary="circular", settings=settings) for y in (b, b + offset)
    )
    assert norm(found.z - plain.z).max() < 1e-2 * norm(plain.z).min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["coordinate", "fista", "ista"])
def test_a_lam_ratio_of_one_leaves_nothing(method, dtype):
    for seed in range(20):
        A, b = problem(seed=seed, K=4, C=1 + seed % 2)
        for options in ({}, {"group": 2}, {"non_negative": True}):
            found = sparse_code(
                b.to(dtype),
                A.f.to(dtype),
                lam_ratio=1.0,
                settings=SolverSettings(method),
                **options,
            )
            assert not found.z.any()


def test_a_solution_of_nothing_can_be_printed():
    for image in (torch.zeros(2, 1, 9, 9), torch.zeros(2, 1, 9, 9).double()):
        found = sparse_code(
            image, problem()[0].f, lam=5.0, settings=SolverSettings("coordinate", gap=0.01)
        )
        assert str(found).endswith("at most 0.00% above the minimum")


def test_every_method_of_the_settings_has_its_solver():
    assert tuple(SOLVERS) == METHODS == tuple(MAP_BYTES)


def test_a_quantile_of_lambda_max_is_not_moved_by_one_bright_image():
    y = torch.randn(5, 1, 9, 9, dtype=torch.float64)
    A = Deconvolution(torch.randn(3, 1, 3, 3, dtype=torch.float64), "valid")
    alone = torch.tensor([1 / lam_from_ratio(A, image[None], 1.0) for image in y])
    found = 1 / lam_from_ratio(A, y, 0.1, lam_max_quantile=0.5)
    assert_close(torch.tensor(found), 0.1 * alone.median(), rtol=1e-6, atol=0)
    y[alone.argmax()] *= 100
    assert 1 / lam_from_ratio(A, y, 0.1, lam_max_quantile=0.5) == found
    assert 1 / lam_from_ratio(A, y, 0.1) > 50 * found
    solution = sparse_code(y, A.f, lam_ratio=0.1, lam_max_quantile=0.5)
    assert 1 / solution.lam == found
    with pytest.warns(FutureWarning, match="quantile is now called lam_max_quantile"):
        assert 1 / lam_from_ratio(A, y, 0.1, quantile=0.5) == found
    for quantile in (0, 1.5):
        with pytest.raises(ValueError, match=rf"_quantile={quantile}: must lie in \(0, 1\]"):
            lam_from_ratio(A, y, 0.1, lam_max_quantile=quantile)
    with pytest.raises(ValueError, match="lam_max_quantile=0.5: needs lam_ratio instead of lam"):
        sparse_code(y, A.f, lam=1.0, lam_max_quantile=0.5)
