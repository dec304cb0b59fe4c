"""1x1 filters against scikit-learn, FISTA and the coordinate descent for larger filters."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import sparse_encode
from sklearn.linear_model import Lasso
from torch.testing import assert_close

from deconvnet import SolverSettings, sparse_code
from deconvnet.filters.constraint import normalize
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding import pointwise
from deconvnet.sparse_coding.pointwise import Gram, PointwiseSolver, is_pointwise
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Problem, duality_gap
from deconvnet.sparse_coding.solve import solve

N, C, K, SIZE, LAM = 3, 5, 12, (4, 6), 6.0
POSITION_WISE = {
    "plain": {},
    "non-negative": dict(non_negative=True),
    "weights of maps": dict(weights="maps"),
    "weights of positions": dict(weights="positions"),
    "mask": dict(mask=True),
    "mask, weights, non-negative": dict(mask=True, weights="positions", non_negative=True),
}
every_problem = pytest.mark.parametrize("name", POSITION_WISE)


def rand(*shape, seed=0, uniform=False):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand if uniform else torch.randn
    return draw(shape, generator=generator, dtype=torch.float64)


def problem(name="plain", boundary="valid"):
    """(images, filters, the options of `sparse_code`)."""
    options = dict(POSITION_WISE[name])
    shapes = {"maps": (K,), "positions": (N, K, *SIZE)}
    if "weights" in options:
        options["weights"] = 0.5 + rand(*shapes[options["weights"]], seed=5, uniform=True)
    if "mask" in options:
        pixels = rand(N, 1, *SIZE, seed=3, uniform=True)
        options["mask"] = (pixels > 0.2) * (0.5 + pixels)
    # Filters of several norms.
    f = normalize(rand(K, C, 1, 1, seed=1)) * (0.5 + rand(K, 1, 1, 1, seed=2, uniform=True))
    return rand(N, C, *SIZE, seed=4), f, dict(options, lam=LAM, boundary=boundary)


def code(y, f, options, *, gap=1e-9, **changes):
    settings = SolverSettings("coordinate", **dict(iterations=500, gap=gap) | changes)
    return sparse_code(y, f, settings=settings, **options)


def rows(maps):
    """(positions, K) of maps (N, K, H, W)."""
    return maps.movedim(1, -1).flatten(0, 2)


@every_problem
def test_the_code_of_every_position_is_that_of_scikit_learn(name):
    y, f, options = problem(name)
    z = code(y, f, options).z
    mask = options.get("mask", torch.ones(()).double()).expand(N, 1, *SIZE)
    w = options.get("weights", torch.ones(K).double())
    w = rows((w[:, None, None] if w.ndim == 1 else w).expand(z.shape))
    positive = options.get("non_negative", False)
    for p in range(0, len(w), 5):
        m, D = float(rows(mask)[p]), f.flatten(1).T
        A = (m * D / w[p]).numpy()
        lasso = Lasso(
            1 / (LAM * C), fit_intercept=False, positive=positive, tol=1e-12, max_iter=100_000
        )
        expected = torch.from_numpy(lasso.fit(A, (m * rows(y)[p]).numpy()).coef_) / w[p]
        assert_close(rows(z)[p], expected, rtol=0, atol=1e-4)
    assert 0.05 < float((z != 0).double().mean()) < 0.5


def test_the_codes_are_those_of_sparse_encode():
    y, f, options = problem()
    f = normalize(f)
    expected = sparse_encode(
        *(rows(y).numpy(), f.flatten(1).numpy()),
        algorithm="lasso_lars",
        alpha=1 / LAM,
    )
    assert_close(rows(code(y, f, options).z), torch.from_numpy(expected), rtol=0, atol=1e-4)


@every_problem
@pytest.mark.parametrize("boundary", ["valid", "circular", "reflect"])
def test_it_ends_at_a_certified_minimum(name, boundary):
    y, f, options = problem(name, boundary)
    found = code(y, f, options, gap=1e-5)
    b = y if "mask" not in options else options["mask"] * y
    A = Deconvolution(f, boundary, options.get("mask"))
    prior = Prior(weights=options.get("weights"), non_negative=options.get("non_negative", False))
    assert is_pointwise(Problem(A, b, LAM, prior))
    assert (found.gap <= 1e-5 * found.objective).all() and found.iterations < 20
    assert_close(found.residual, b - A(found.z), rtol=0, atol=1e-12)
    error = LAM / 2 * found.residual.square().sum((1, 2, 3))
    assert_close(found.objective, error + prior(found.z), rtol=1e-12, atol=0)
    # Each position scales its own dual point, so this gap is at most the general one, and is true.
    minimum = code(y, f, options, gap=1e-12).objective
    assert (found.gap <= duality_gap(A, b, found.z, LAM, prior) + 1e-12).all()
    assert (found.objective - found.gap <= minimum + 1e-10).all()


@pytest.mark.parametrize("name", ["plain", "mask, weights, non-negative"])
def test_the_minimum_is_that_of_fista_and_of_the_form_for_larger_filters(name, monkeypatch):
    y, f, options = problem(name)
    minimum = code(y, f, options).objective
    monkeypatch.setattr(pointwise, "MAX_FILTERS", 0)
    for method in ("fista", "coordinate"):
        settings = SolverSettings(method, iterations=1000, gap=1e-3)
        found = sparse_code(y, f, settings=settings, **options).objective
        assert (minimum <= found).all() and (found <= 1.001 * minimum).all()


def test_other_problems_are_left_to_the_form_for_larger_filters():
    y, f, _ = problem()
    by_channel = rand(N, C, *SIZE, uniform=True)
    same = by_channel[:, :1].expand(by_channel.shape)
    assert is_pointwise(Problem(Deconvolution(f, mask=same), y, LAM))
    others = [
        Problem(Deconvolution(f, mask=by_channel), y, LAM),
        Problem(Deconvolution(f), y, LAM, Prior(group=2)),
        Problem(Deconvolution(f), y, LAM, Prior(p=0.5)),
        Problem(Deconvolution(rand(K, C, 1, 2)), y, LAM),
    ]
    assert not any(is_pointwise(other) for other in others)


@pytest.mark.parametrize("weights", ["maps", "positions"])
def test_with_weights_of_zero_the_conditions_of_the_minimum_hold(weights):
    y, f, options = problem(f"weights of {weights}")
    w = options["weights"]
    w = w.view(1, K, 1, 1) if weights == "maps" else w
    w[:, :2] = 0
    found = code(y, f, options, gap=None, tolerance=1e-14, iterations=100)
    slope = LAM * torch.einsum("kc,nchw->nkhw", f[:, :, 0, 0], found.residual)
    excess = torch.where(found.z == 0, slope.abs() - w, (slope - w * found.z.sign()).abs())
    assert float(excess.max()) < 1e-6
    assert (found.z[:, :2] != 0).all() and (found.z[:, 2:] != 0).any()


def test_filters_of_zeros_and_masked_positions_have_no_coefficients():
    y, f, options = problem("mask")
    f[3] = 0
    options["mask"][0] = 0
    found = code(y, f, options, gap=1e-6)
    assert not found.z[0].any() and not found.z[:, 3].any() and found.z[1].any()


def test_a_working_set_of_any_size_has_room():
    """With many filters and a large lam a position has more members than the first capacity."""
    y, f = rand(1, 60, 1, 2, seed=1), normalize(rand(100, 60, 1, 1, seed=2))
    found = code(y, f, dict(lam=300.0), gap=1e-3)
    assert rows(found.z != 0).sum(1).max() > pointwise.CAPACITY
    A = Deconvolution(f)
    assert (duality_gap(A, y, found.z, 300.0) <= 2e-3 * found.objective).all()


def test_threads_change_no_bit():
    y, f, options = problem("mask, weights, non-negative")
    before = torch.get_num_threads()
    codes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            codes.append(code(y, f, options, gap=1e-4))
    finally:
        torch.set_num_threads(before)
    for key in ("z", "residual", "reconstruction", "sparsity", "gap"):
        assert all(torch.equal(getattr(c, key), getattr(codes[0], key)) for c in codes[1:])


def test_the_code_of_an_image_does_not_depend_on_its_companions(monkeypatch):
    y, f, options = problem("mask")
    together = code(y, f, options, gap=1e-4)
    for n in range(N):
        own = dict(options, mask=options["mask"][n : n + 1])
        alone = code(y[n : n + 1], f, own, gap=1e-4)
        assert_close(alone.z[0], together.z[n], rtol=0, atol=1e-12)
    monkeypatch.setattr("deconvnet.sparse_coding.coordinate_descent.BATCH_BYTES", 1)
    assert_close(code(y, f, options, gap=1e-4).z, together.z, rtol=0, atol=1e-12)


def test_training_visits_are_rounds_that_continue_each_other():
    y, f, _ = problem()
    A, settings = Deconvolution(f), SolverSettings("coordinate", 50, training_iterations=1)
    seen = []
    visits, state = [], None
    for _ in range(3):
        found = solve(A, y, lam=LAM, settings=settings, state=state, training=True)
        state = found.state
        visits.append(found.z)
        assert found.iterations == 1
    settings = SolverSettings("coordinate", 3, tolerance=0.0)
    solve(A, y, lam=LAM, settings=settings, callback=lambda i, z, beta: seen.append(z))
    assert len(seen) == 3
    assert_close(visits, seen, rtol=0, atol=1e-10)
    objectives = [LAM / 2 * (y - A(z)).square().sum() + z.abs().sum() for z in seen]
    assert objectives == sorted(objectives, reverse=True)
    certified = SolverSettings("coordinate", 50, gap=1e-6)
    first = solve(A, y, lam=LAM, settings=certified)
    again = solve(A, y, lam=LAM, settings=certified, state=first.state)
    assert again.iterations == 0 and torch.equal(again.z, first.z)


def test_a_start_near_the_minimum_still_improves():
    """No round ends early because the start is already within the slack of the first round."""
    y, f, options = problem()
    minimum = code(y, f, options).z
    A, settings = Deconvolution(f), SolverSettings("coordinate", 50, tolerance=1e-13)
    found = solve(A, y, lam=LAM, settings=settings, state=1.001 * minimum)
    assert_close(found.z, minimum, rtol=0, atol=1e-6)


def test_a_non_finite_image_is_reported_and_leaves_the_other_images_unchanged():
    y, f, _ = problem()
    A, settings = Deconvolution(f), SolverSettings("coordinate", 20, gap=1e-6)
    expected = solve(A, y, lam=LAM, settings=settings)
    for value in (torch.nan, torch.inf):
        broken, state = y.clone(), torch.zeros_like(expected.z)
        broken[1, 2, 3, 4] = value
        state[2, 1, 0, 0] = torch.nan
        found = solve(A, broken, lam=LAM, settings=settings, state=state)
        assert torch.equal(found.z[0], expected.z[0])
        assert not found.objective[1:].isfinite().any() and not (found.gap[1:] <= 1).any()


def test_single_precision_is_kept_and_certified():
    y, f, options = problem()
    expected = code(y, f, options)
    found = code(y.float(), f.float(), options, gap=1e-5)
    assert found.z.dtype == found.residual.dtype == torch.float32
    assert (found.gap <= 1e-5 * found.objective).all()
    assert_close(found.objective, expected.objective, rtol=1e-5, atol=0)


def test_the_gram_matrix_follows_filters_that_change_in_place():
    y, f, options = problem()
    code(y, f, options)
    f.numpy()[:] = f.numpy()[::-1].copy()
    gram = Gram.of(Deconvolution(f), y)
    assert_close(gram.matrix, f.flatten(1) @ f.flatten(1).T, rtol=0, atol=1e-14)
    assert Gram.of(Deconvolution(f.clone()), y) is gram


def test_rounds_work_on_images_that_have_not_stopped():
    y, f, _ = problem()
    A = Deconvolution(f)
    solver = PointwiseSolver(Problem(A, y, LAM), A.zeros(y), Gram.of(A, y))
    solver.step(torch.tensor([True, False, True]).view(3, 1, 1, 1))
    z = solver.maps()
    assert z[1].any() and not z[0].any() and not z[2].any()
    assert np.isfinite(solver.costs).all() and solver.costs[1] < solver.cost_of_zero[1]
