"""The units of data and filters: results that differ by nothing but the units."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from deconvnet import LearningSettings, learn_filters, learn_online
from deconvnet.dictionary import Learned
from deconvnet.filters.constraint import FilterConstraint, normalize
from deconvnet.filters.update import update_filters_by_cg
from deconvnet.images.highpass import tikhonov_lowpass
from deconvnet.network.layer import LayerSettings
from deconvnet.network.metrics import decibels
from deconvnet.operators.linear import Deconvolution, Identity, Scaling, Unpooling, VerticalStack
from deconvnet.operators.pooling import max_pool
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import METHODS, SolverSettings, duality_gap
from deconvnet.sparse_coding.solve import lam_from_ratio, solve, sparse_code
from deconvnet.support.scaling import ORDINARY, Units, exponent, magnitude, times_power

GAP = 1e-4
CERTIFIED = {
    "admm": SolverSettings("admm", iterations=2000, gap=GAP),
    "fista": SolverSettings("fista", iterations=2000, gap=GAP),
    "ista": SolverSettings("ista", iterations=2000, gap=3e-3),
    "coordinate": SolverSettings("coordinate", iterations=500, gap=GAP),
    "half_quadratic": SolverSettings("half_quadratic", iterations=1),
}
FEW = {
    **{m: SolverSettings(m, iterations=12, tolerance=0.0) for m in ("admm", "fista", "ista")},
    "coordinate": SolverSettings("coordinate", iterations=3, tolerance=0.0),
    "half_quadratic": SolverSettings("half_quadratic", iterations=1, z_step="cg"),
}
# Units of the data, and norms of the filters.
UNITS = [1e-30, 1e-13, 1e-7, 1e6, 1e18, 1e30]
NORMS = [1e-20, 1e-3, 30.0, 1e10]
every_method = pytest.mark.parametrize("method", METHODS)


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(dtype=torch.float64, K=4, C=1):
    return rand(2, C, 9, 8, seed=1, dtype=dtype), normalize(rand(K, C, 3, 3, seed=2, dtype=dtype))


def error(found, expected):
    """The relative distance; found may have left the range in which it can be squared."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_and_filters_of_any_units_have_the_same_maps_and_true_certificates(method, dtype):
    y, f = problem(dtype)
    settings = CERTIFIED[method]
    gap = settings.gap
    expected = sparse_code(y, f, lam_ratio=0.3, settings=settings)
    for s, k in [*((s, 1.0) for s in UNITS), *((1.0, k) for k in NORMS), (1e-13, 1e3), (1e9, 1e-3)]:
        found = sparse_code(s * y, k * f, lam_ratio=0.3, settings=settings)
        assert found.lam * s * k == pytest.approx(expected.lam, rel=1e-5)
        assert error(found.z.double() * (k / s), expected.z) < 3e-2, (s, k)
        assert_close(
            found.objective * (k / s),
            expected.objective,
            rtol=1e-4 if gap is None else 3 * gap,
            atol=0,
        )
        assert error(found.residual.double() / s, expected.residual) < 3e-2
        if method != "half_quadratic":
            double = Deconvolution((k * f).double()), (s * y).double()
            true = duality_gap(*double, found.z.double(), found.lam)
            for value in (found.gap, true):
                assert (value >= 0).all(), (s, k)
                assert (value <= 1.1 * gap * found.objective).all(), (s, k)


PRIORS = {
    "plain": dict(),
    "weights": dict(weights=torch.tensor([0.5, 1.0, 1.0, 2.0])),
    "groups": dict(group=2),
    "non-negative": dict(non_negative=True),
    "mask": dict(mask=(rand(2, 1, 9, 8, seed=3) > -0.5).float()),
    "weighted mask": dict(mask=rand(1, 1, 9, 8, seed=4).abs().float()),
    "count": dict(p=0.0),
    "root": dict(p=0.5),
}


@every_method
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("boundary", ["valid", "reflect"])
def test_powers_of_two_change_no_bit_but_the_exponents(method, name, boundary):
    y, f = problem(torch.float32)
    given = dict(PRIORS[name], boundary=boundary)
    p, lam, settings = given.get("p", 1.0), 8.0, FEW[method]
    expected = sparse_code(y, f, lam=lam, settings=settings, **given)
    for s, k in ((2.0**-48, 1.0), (2.0**80, 2.0**40), (1.0, 2.0**-40)):
        z = s / k
        own = dataclasses.replace(
            settings,
            beta_start=settings.beta_start * z ** (p - 2),
            beta_end=settings.beta_end * z ** (p - 2),
        )
        # ADMM follows filters that are far from unit norm, also where nothing has to be rescaled.
        found = sparse_code(s * y, k * f, lam=lam * s ** (p - 2) * k**-p, settings=own, **given)
        close = assert_close if p == 0.5 else exactly
        close(found.z.double() / z, expected.z.double(), rtol=1e-3, atol=1e-4)
        close(found.residual / s, expected.residual, rtol=1e-3, atol=1e-4)
        close(found.objective, expected.objective * z**p, rtol=1e-4, atol=0)


def exactly(found, expected, **_):
    assert torch.equal(found, expected)


@every_method
def test_state_step_and_callback_are_in_the_units_of_the_caller(method):
    y, f = problem(torch.float32)
    settings = dataclasses.replace(FEW[method], training_iterations=2)
    s = 2.0**64

    def visits(A, b, lam, settings):
        seen = []
        options = dict(lam=lam, settings=settings, training=True)
        first = solve(A, b, callback=lambda *call: seen.append(call), **options)
        step = {} if first.step is None else dict(step=first.step)
        second = solve(A, b, state=first.state, **step, **options)
        third = solve(A, b, state=second.state, chunk=1, **options)
        return first, second, third, seen

    own = dataclasses.replace(settings, beta_start=1 / s, beta_end=settings.beta_end / s)
    plain = visits(Deconvolution(f), y, 8.0, settings)
    large = visits(Deconvolution(f), s * y, 8.0 / s, own)
    for found, expected in zip(large[:3], plain[:3], strict=True):
        for part in ("z", "state", "residual"):
            assert torch.equal(getattr(found, part), s * getattr(expected, part))
        assert torch.equal(found.objective, s * expected.objective)
        assert found.lam == expected.lam / s
        if found.step is not None:
            assert torch.equal(found.step, s * expected.step.double())
    for (i, z, beta), (j, w, gamma) in zip(large[3], plain[3], strict=True):
        assert i == j and torch.equal(z, s * w) and torch.equal(beta, gamma.double() / s)


def least(y, f, lam, weights, mask):
    """The minimum of the problem of one image (H, W), boundary "valid", by L-BFGS-B in numpy."""
    (H, W), (K, h, w) = y.shape, f.shape
    painted = np.zeros((K, H + h - 1, W + w - 1, H + h - 1 + h - 1, W + w - 1 + w - 1))
    for k, i, j in np.ndindex(painted.shape[:3]):
        painted[k, i, j, i : i + h, j : j + w] = f[k]
    A = mask.ravel() * painted[..., h - 1 : h - 1 + H, w - 1 : w - 1 + W].reshape(-1, H * W)
    b, n = (mask * y).ravel(), len(A)
    price = np.repeat(weights, n // K)

    def cost(parts):
        r = (parts[:n] - parts[n:]) @ A - b
        slope = lam * A @ r
        value = lam / 2 * r @ r + price @ (parts[:n] + parts[n:])
        return value, np.concatenate([slope + price, price - slope])

    # z = z+ - z-, both >= 0.
    asked = dict(maxiter=20000, maxfun=40000, ftol=1e-14, gtol=1e-9)
    bounds = [(0, None)] * (2 * n)
    return minimize(
        cost, np.zeros(2 * n), jac=True, method="L-BFGS-B", bounds=bounds, options=asked
    ).fun


# What lies so far apart that the other methods need very many iterations to a small gap.
FAR_APART = ("one norm of 1e3", "a mask of two sizes")
UNEVEN = {
    "as they are": dict(),
    "one norm of 1e3": dict(norms=[1e3, 1.0]),
    "one norm of 1e-3": dict(norms=[1.0, 1e-3]),
    "weights of two sizes": dict(weights=[1.0, 1e-3]),
    "a mask of two sizes": dict(mask=1e3),
    "other units in the batch": dict(images=[1.0, 1e-6]),
    "an image of zeros": dict(images=[1.0, 0.0]),
    "a constant on an image": dict(constant=1e4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", UNEVEN)
def test_certificates_hold_against_a_minimum_that_others_found(kind, dtype):
    asked = UNEVEN[kind]
    y, f = rand(2, 1, 6, 5, seed=1), normalize(rand(2, 1, 3, 3, seed=2))
    f = f * torch.tensor(asked.get("norms", [1.0, 1.0])).double().view(-1, 1, 1, 1)
    y = y * torch.tensor(asked.get("images", [1.0, 1.0])).double().view(-1, 1, 1, 1)
    y[1] += asked.get("constant", 0.0)
    mask = torch.ones(1, 1, 6, 5).double()
    mask[..., :2], mask[..., 3, 3] = asked.get("mask", 1.0), 0.0
    weights = torch.tensor(asked.get("weights", [1.0, 1.0])).double()
    first = None
    for s, k, v in ((1e-30, 1.0, 1.0), (1e30, 1e3, 1e-12)):
        given = dict(mask=mask.to(dtype), weights=(v * weights).to(dtype), lam_ratio=0.3)
        y_, f_ = (s * y).to(dtype), (k * f).to(dtype)
        for method in ("coordinate", "admm", "fista"):
            iterations = 100 if kind in FAR_APART else 500
            settings = dataclasses.replace(CERTIFIED[method], iterations=iterations)
            found = sparse_code(y_, f_, settings=settings, **given)
            unit = s / k * v
            if first is None:
                lam = found.lam * s * k / v
                problems = [(image[0].numpy(), f[:, 0].numpy()) for image in y]
                more = weights.numpy(), mask[0, 0].numpy()
                first = torch.tensor([least(*problem, lam, *more) for problem in problems])
            # The rounding of the data themselves: lam is that of the brightest image.
            rounding = (1e-4 if dtype == torch.float32 else 1e-7) * first
            above = found.objective / unit - first
            assert (above >= -rounding).all(), (method, s, k, v)
            assert (above <= found.gap / unit + rounding).all(), (method, s, k, v)
            if kind not in FAR_APART:
                assert (found.gap <= 1.1 * GAP * found.objective).all(), (method, s, k, v)


@pytest.mark.parametrize("method", ["admm", "fista"])
def test_weights_masks_and_layers_of_any_units_go_along(method):
    y, f = problem(torch.float32)
    settings = CERTIFIED[method]
    weights = torch.tensor([0.5, 1.0, 1.0, 2.0])
    expected = sparse_code(y, f, lam_ratio=0.2, weights=weights, settings=settings)
    tiny = sparse_code(y, f, lam_ratio=0.2, weights=1e-25 * weights, settings=settings)
    assert error(tiny.z, expected.z) < 1e-2 and (tiny.gap <= GAP * tiny.objective).all()
    # The inverse of noise in Tesla is a mask that makes the data ordinary.
    expected = sparse_code(y, f, lam_ratio=0.2, settings=settings)
    mask = torch.full((1, 1, 9, 8), 1e13)
    found = sparse_code(1e-13 * y, f, lam_ratio=0.2, mask=mask, settings=settings)
    assert error(1e13 * found.z, expected.z) < 1e-2
    pooled, switches = max_pool(rand(2, 4, 11, 10, seed=5, dtype=torch.float32), (1, 2, 2))
    above = normalize(rand(3, 4, 3, 3, seed=6, dtype=torch.float32))

    def layers(k, s, target):
        """Layer 2 to the image or to both, whose maps are as many times as large as pixels."""
        down = Deconvolution(k * f) @ Unpooling(switches, (4, 11, 10)) @ Scaling(s)
        if target == "image":
            return down @ Deconvolution(above), y
        both = VerticalStack([Scaling(k * s), down], [1.0, 0.7], [pooled.shape, y.shape])
        return both @ Deconvolution(above), both.join([pooled, y])

    for target in ("image", "both"):
        A, b = layers(1.0, 1.0, target)
        expected = solve(A, b, lam=lam_from_ratio(A, b, 0.3), settings=settings)
        for k, s in ((1e-3, 1e-9), (1e12, 1e12)):
            A, b = layers(k, s, target)
            found = solve(A, b, lam=lam_from_ratio(A, b, 0.3), settings=settings)
            assert error(found.z.double() * k * s, expected.z) < 2e-2


@pytest.mark.parametrize("update", ["proximal", "cg"])
@pytest.mark.parametrize("method", [None, "admm"])
def test_filters_do_not_depend_on_the_units_of_the_images(update, method):
    y = rand(4, 1, 14, 13, seed=7, dtype=torch.float32)
    solver = method and SolverSettings(method)
    learning = LearningSettings(epochs=2, batch_size=2, update=update)
    learned = [
        learn_filters(s * y, 3, filter_size=3, lam_ratio=0.1, learning=learning, solver=solver)
        for s in (1.0, 2.0**-44, 2.0**-100, 2.0**90)
    ]
    streams = [
        learn_online([s * y[:2], s * y[2:]], 3, filter_size=3, lam_ratio=0.1, solver=solver)
        for s in (1.0, 2.0**-100)
    ]
    for expected, *others in (learned, streams):
        for found in others:
            # By conjugate gradients what is extreme is summed in double.
            tolerance = 1e-5 if update == "cg" else 0
            assert_close(found.filters, expected.filters, rtol=0, atol=tolerance)
            for one, other in zip(found.history, expected.history, strict=True):
                assert one.snr == pytest.approx(other.snr, abs=10 * tolerance + 1e-9)
                assert (one.density, one.dead) == (other.density, other.dead)


def test_codes_of_learned_filters_are_in_the_units_of_the_images():
    y = rand(2, 1, 12, 12, seed=8)
    f = normalize(rand(3, 1, 3, 3, seed=9))
    plain = Learned(f, [], LayerSettings(3, 3, lam=5.0)).encode(y)
    tesla = Learned(f, [], LayerSettings(3, 3, lam=5e13)).encode(1e-13 * y)
    assert_close(1e13 * tesla.z, plain.z)


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("norm", [0.01, 0.1, 0.3, 3.0, 10.0, 100.0])
def test_admm_is_as_good_for_filters_of_any_norm(p, norm):
    y, f = problem()
    expected = sparse_code(y, f, lam=5.0, p=p, settings=SolverSettings())
    found = sparse_code(y, norm * f, lam=5.0 * norm**-p, p=p, settings=SolverSettings())
    assert_close(found.objective * norm**p, expected.objective, rtol=1e-6, atol=0)


def test_admm_is_as_good_for_filters_whose_planes_have_unit_norm_and_through_scaled_layers():
    y, f = problem(C=3)
    nothing = (5.0 * y.square().sum((1, 2, 3)) / 2).sum()
    for A in (Deconvolution(normalize(f, "plane")), Scaling(20.0) @ Deconvolution(f)):
        b = A.factor * y if isinstance(A, Scaling) else y
        found = solve(A, b, lam=5.0, prior=Prior(p=0.5), settings=SolverSettings())
        coordinate = solve(
            Deconvolution(A.f if isinstance(A, Deconvolution) else 20.0 * A.inner.f),
            b,
            lam=5.0,
            prior=Prior(p=0.5),
            settings=SolverSettings("coordinate"),
        )
        assert found.objective.sum() < nothing
        assert found.objective.sum() < 1.1 * coordinate.objective.sum()


def test_filters_of_about_unit_norm_do_not_change_beta():
    y, f = problem()
    seen = []
    for norm in (1.0, 1.0001, 2.0**0.5, 4.0):
        solve(
            Deconvolution(norm * f),
            y,
            lam=3.0,
            settings=SolverSettings(iterations=1),
            callback=lambda i, z, beta: seen.append(beta[0].item()),
        )
    assert seen == [pytest.approx(7.5)] * 3 + [pytest.approx(7.5 * 16)]


def test_the_curvature_of_an_operator_is_that_of_what_an_impulse_paints():
    f = rand(4, 2, 3, 3, seed=2)
    largest = f.square().sum((1, 2, 3)).max().item()
    mask = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2).expand(1, 1, 3, 2).double()
    assert Deconvolution(f).curvature() == pytest.approx(largest)
    assert Deconvolution(f, mask=mask).curvature() == pytest.approx(4 * largest)
    each = torch.cat([mask, mask / 2])
    assert_close(
        Deconvolution(f, mask=each).curvature().flatten() / largest,
        torch.tensor([4.0, 1.0]).double(),
    )
    assert (Scaling(3.0) @ Deconvolution(f)).curvature() == pytest.approx(9 * largest)
    both = VerticalStack([Identity(), Scaling(3.0)], [1.0, 0.5], [torch.Size((1, 2))] * 2)
    assert both.curvature() == pytest.approx(1 + 9 / 4)


def test_the_parts_of_an_operator_are_normalised_and_ordinary_ones_left_alone():
    f, z = rand(4, 1, 3, 3, seed=2), rand(2, 4, 7, 6)
    ordinary = Deconvolution(f)
    for A in (
        ordinary,
        Scaling(0.7) @ ordinary,
        Identity(),
        VerticalStack([ordinary], [1.0], [z.shape]),
    ):
        assert A.normalised() == (A, 0)
    for A in (
        Deconvolution(1e-20 * f),
        Deconvolution(f, mask=torch.full((1, 1, 5, 4), 1e15).double()),
        Scaling(1e30) @ Deconvolution(1e-20 * f),
    ):
        B, e = A.normalised()
        assert torch.equal(A(z), times_power(B(z), e)) and e != 0
        assert exponent(magnitude(B(z))) == 0
    two = VerticalStack(
        [Deconvolution(1e-20 * f), ordinary], [1e20, 1.0], [torch.Size((2, 1, 5, 4))] * 2
    )
    B, e = two.normalised()
    assert_close(times_power(B(z), e), two(z))


def test_exponents_are_multiples_of_eight_and_zero_for_what_is_ordinary():
    for value in (0.0, math.nan, math.inf, 1.0, 2.0**-ORDINARY, 1e-6, 1e6):
        assert exponent(value) == 0
    for value in (1e-7, 1e7, 1e-300, 1e300, 5e-324):
        assert exponent(value) % 8 == 0
        assert 2.0**-5 < math.ldexp(value, -exponent(value)) < 2.0**5
    x = torch.tensor([1.5, 0.0, -3.0])
    assert times_power(x, 0) is x
    for e in (-240, -120, 120, 240):
        assert torch.equal(times_power(x.double(), e), x.double() * 2.0**e)
    assert magnitude(x) == 3.0 and magnitude(x[:0]) == 0.0
    units = Units(16, -8, 0, 1.0)
    assert units.maps == 24 and units.lam(1.0) == 2.0**8 and units.beta(1.0) == 2.0**24
    assert units.step(units.step(0.3), back=True) == 0.3


def test_signal_to_noise_is_a_ratio_of_any_two_energies():
    assert decibels(1e-60, 1e-62) == pytest.approx(20)
    assert decibels(3e-26, 0.0) == 300.0
    assert decibels(0.0, 0.0) == decibels(0.0, 1e-40) == -300.0


def test_conjugate_gradients_of_filters_and_of_pixels_scale_with_the_data():
    z, residual = rand(2, 3, 10, 9, seed=3).float(), rand(2, 1, 8, 7, seed=4).float()
    f = normalize(rand(3, 1, 3, 3, seed=5).float())
    found = [
        update_filters_by_cg(
            f, lambda s=s: [(s * z, s * residual, Identity())], FilterConstraint("plane")
        )
        for s in (1.0, 2.0**-100)
    ]
    assert_close(found[1], found[0], rtol=0, atol=1e-5)
    planes, mask = rand(1, 1, 12, 11, seed=6).float(), torch.ones(1, 1, 12, 11)
    mask[..., 3:5] = 0
    low = tikhonov_lowpass(planes, 2.0, mask)
    assert torch.equal(tikhonov_lowpass(2.0**-96 * planes, 2.0, mask), 2.0**-96 * low)


def test_filters_of_any_size_are_normalised():
    f = rand(3, 2, 4, 4, seed=1).float()
    for size in (2.0**-110, 2.0**-40, 2.0**100):
        assert torch.equal(normalize(size * f), normalize(f))
        assert torch.equal(normalize(size * f, "plane"), normalize(f, "plane"))
