"""The proximal map against published values, brute force and closed forms."""

import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconvnet.sparse_coding.prior import Prior, penalties, penalty, shrink, threshold

# (beta, v): the minimiser for p = 1/2, 2/3, 0.8 and 1, to 8 decimals.
EXPONENTS = (0.5, 2 / 3, 0.8, 1.0)
GOLDEN = {
    (1, 0.7): (0, 0, 0, 0),
    (1, 1.6): (1.1295448, 0.91272878, 0.75338341, 0.6),
    (1, 2.5): (2.1597754, 1.96801515, 1.78775682, 1.5),
    (10, 0.3): (0, 0.18245983, 0.18828052, 0.2),
    (10, 0.7): (0.63737125, 0.62189671, 0.61173734, 0.6),
    (1000, 0.05): (0.04771092, 0.04816773, 0.04853486, 0.049),
}
# p: the thresholds at beta = 1, 10 and 100, to 6 digits.
THRESHOLDS = {
    0.8: (1.39799, 0.205197, 0.0301188),
    2 / 3: (1.47558, 0.262399, 0.0466618),
    0.5: (1.5, 0.323165, 0.0696238),
}
ALL_EXPONENTS = (0.0, 0.01, 0.1, 0.3, 0.5, 2 / 3, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def cost(x, v, beta, p):
    prior = (x != 0).double() if p == 0 else x.abs() ** p
    return prior + beta / 2 * (x - v) ** 2


@pytest.mark.parametrize(("beta", "v"), GOLDEN)
@pytest.mark.parametrize("column", range(4))
def test_shrink_gives_the_published_values(beta, v, column):
    expected = GOLDEN[beta, v][column]
    found = shrink(scalar(v), beta, EXPONENTS[column]).item()
    assert found == pytest.approx(expected, abs=6e-9)
    assert shrink(scalar(-v), beta, EXPONENTS[column]).item() == -found


@pytest.mark.parametrize("p", THRESHOLDS)
def test_thresholds_are_the_published_ones(p):
    for beta, expected in zip((1, 10, 100), THRESHOLDS[p], strict=True):
        x, tau = threshold(beta, p)
        assert tau == pytest.approx(expected, rel=5e-6)
        assert x / tau == pytest.approx(2 * (1 - p) / (2 - p), rel=1e-12)


@pytest.mark.parametrize("p", ALL_EXPONENTS)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 37.0, 1e6])
def test_shrink_jumps_from_zero_at_the_threshold_where_both_cost_the_same(p, beta):
    x, tau = threshold(beta, p)
    v = scalar([tau * (1 - 1e-9), tau * (1 + 1e-9)])
    below, above = shrink(v, beta, p).tolist()
    assert below == 0
    # p = 1 has no jump: the remainder is the rounding of v - tau.
    assert above == pytest.approx(x, rel=1e-6, abs=2e-9 * tau)
    if p < 1:
        assert cost(scalar(x), tau, beta, p) == pytest.approx(beta / 2 * tau**2, rel=1e-9)


def test_at_the_threshold_itself_the_result_is_zero():
    # Cases whose threshold is a binary fraction, so that v is exactly there.
    for p, beta, tau in ((0.0, 2.0, 1.0), (0.0, 8.0, 0.5), (0.5, 1.0, 1.5), (1.0, 4.0, 0.25)):
        assert threshold(beta, p)[1] == tau
        for sign in (-1, 1):
            assert shrink(scalar([sign * tau]), beta, p) == 0
            assert shrink(scalar([sign * tau]), scalar([beta]), p) == 0


def brute_force(v, beta, p):
    """The lowest cost over a grid between 0 and v, then finer and finer ones around its best.

    Two basins can tie: the best points of both halves are refined, and 0 is a candidate.
    """
    lowest = cost(scalar(0.0), v, beta, p).item()
    for low, high in ((0.0, 0.5), (0.5, 1.0)):
        low, high = low * v, high * v
        for _ in range(12):
            grid = torch.linspace(low, high, 2001, dtype=torch.float64)
            costs = cost(grid, v, beta, p)
            best = grid[costs.argmin()].item()
            lowest = min(lowest, costs.min().item())
            reach = abs(high - low) / 200
            low, high = best - reach, best + reach
    return lowest


def random_cases(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        p = float(random.uniform(0.0, 1.0)) or 1.0
        beta = float(10 ** random.uniform(-3, 6))
        # Around the threshold, where the decision is made, and far from it.
        v = threshold(beta, p)[1] * float(10 ** random.normal(0, 0.4))
        yield p, beta, v * random.choice([-1, 1])


def test_nothing_found_by_brute_force_costs_less_than_shrink():
    zeros = 0
    for p, beta, v in random_cases(400):
        x = shrink(scalar(v), beta, p)
        found, lowest = cost(x, v, beta, p).item(), brute_force(v, beta, p)
        # The cost of the best grid point is above the minimum; rounding of the cost alone is 1e-15.
        assert found <= lowest * (1 + 1e-12), (p, beta, v)
        assert found >= lowest * (1 - 1e-6), (p, beta, v)
        zeros += x.item() == 0
    assert 50 < zeros < 350


def test_descent_from_several_starts_ends_at_shrink_or_higher():
    for p, beta, v in random_cases(60):
        x = shrink(scalar(v), beta, p)
        found = cost(x, v, beta, p)
        starts = scalar([0.02, 0.1, 0.3, 0.6, 1.0, 1.5]) * v
        for _ in range(200):
            # Majorise |x|^p by a parabola and solve: each step lowers the cost.
            weight = p * starts.abs().clamp(min=1e-12 * abs(v)) ** (p - 2)
            starts = beta * v / (beta + weight)
        assert (cost(starts, v, beta, p) >= found * (1 - 1e-12)).all(), (p, beta, v)
        if x != 0:
            # Convergence is linear and slowest near the threshold and for p near 1.
            assert ((starts - x).abs() <= 1e-6 * abs(v)).any(), (p, beta, v)


@pytest.mark.parametrize("p", [p for p in ALL_EXPONENTS if 0 < p < 1])
def test_nonzero_results_are_stationary_to_rounding(p):
    for beta in (1e-3, 1.0, 1e6):
        v = threshold(beta, p)[1] * torch.logspace(1e-6, 3, 500, dtype=torch.float64)
        x = shrink(v, beta, p)
        assert (x > 0).all()
        # A Newton step from here would move x by less than this, relative to x.
        slope = p * x ** (p - 1) / beta
        assert ((slope + x - v).abs() / (x * (1 - (1 - p) * slope / x))).max() < 1e-12


def test_p_0_is_the_hard_threshold():
    v = 3 * rand(1000)
    for beta in (0.5, 2.0, 8.0):
        kept = v.abs() > (2 / beta) ** 0.5
        assert torch.equal(shrink(v, beta, 0.0), torch.where(kept, v, torch.zeros_like(v)))
        assert 0 < kept.sum() < 1000


@pytest.mark.parametrize("beta", [0.5, scalar([0.5]), scalar([2.0])])
def test_p_1_is_the_soft_threshold(beta):
    v = 3 * rand(1000)
    expected = torch.sign(v) * (v.abs() - 1 / beta).clamp(min=0)
    assert_close(shrink(v, beta, 1.0), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("p", ALL_EXPONENTS)
def test_shrink_is_odd_and_never_reverses_nor_lengthens(p):
    v = 3 * rand(2000)
    x = shrink(v, 1.3, p)
    assert torch.equal(shrink(-v, 1.3, p), -x)
    assert (x * v >= 0).all() and (x.abs() <= v.abs()).all()
    assert 0 < (x == 0).sum() < 2000


@pytest.mark.parametrize("p", ALL_EXPONENTS)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e6])
def test_shrink_is_monotone(p, beta):
    v = torch.linspace(0, 4 * threshold(beta, p)[1], 20001, dtype=torch.float64)
    x = shrink(v, beta, p)
    assert (x.diff() >= 0).all() and x[-1] > 0


@pytest.mark.parametrize("p", ALL_EXPONENTS)
def test_non_negative_gives_the_minimum_over_non_negative_values(p):
    v = 3 * rand(1000)
    for beta in (1.3, scalar([1.3])):
        x = shrink(v, beta, p, non_negative=True)
        positive = v > 0
        assert torch.equal(x[positive], shrink(v, beta, p)[positive])
        assert (x[~positive] == 0).all() and (x > 0).any()


@pytest.mark.parametrize("p", ALL_EXPONENTS)
def test_a_tensor_of_betas_acts_as_its_numbers_do(p):
    v = 3 * rand(3, 2, 4, 5)
    betas = [0.2, 1.0, 50.0]
    together = shrink(v, scalar(betas).view(3, 1, 1, 1), p)
    for image, beta, expected in zip(v, betas, together, strict=True):
        assert_close(shrink(image, beta, p), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("p", ALL_EXPONENTS)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e5])
def test_float32_stays_float32_and_agrees_with_float64(p, beta):
    tau = threshold(beta, p)[1]
    v = (2 * tau * rand(4000)).float()
    # Within a rounding of the threshold the two may decide differently.
    v = v[(v.abs() / tau - 1).abs() > 1e-6]
    x = shrink(v, beta, p)
    assert x.dtype == torch.float32 and torch.isfinite(x).all()
    assert_close(x.double(), shrink(v.double(), beta, p), rtol=1e-6, atol=5e-7 * tau)
    per_image = shrink(v, torch.tensor(beta), p)
    assert per_image.dtype == torch.float32
    assert_close(per_image, x, rtol=1e-6, atol=5e-7 * tau)


@pytest.mark.parametrize("p", ALL_EXPONENTS)
def test_not_a_number_stays_visible(p):
    v = scalar([1.0, float("nan"), 3.0])
    for beta in (1.0, scalar([1.0])):
        assert shrink(v, beta, p).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("p", ALL_EXPONENTS)
def test_penalty_is_the_sum_of_powers_in_float64(p):
    x = rand(3, 4).float()
    x[0] = 0
    expected = sum(abs(value) ** p for value in x.flatten().tolist() if value)
    found = penalty(x, p)
    assert found.dtype == torch.float64 and found.shape == ()
    # The powers are those of float32.
    assert found.item() == pytest.approx(expected, rel=1e-6)


def lowest_cost_of_a_window(v, beta, p, non_negative):
    """Over every choice of the one entry that may differ from zero, and over its value."""
    kept = [
        beta / 2 * value**2 if non_negative and value < 0 else brute_force(value, beta, p)
        for value in v
    ]
    return min(
        cost + beta / 2 * sum(other**2 for j, other in enumerate(v) if j != i)
        for i, cost in enumerate(kept)
    )


@pytest.mark.parametrize("p", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("non_negative", [False, True])
def test_with_a_window_shrink_is_the_minimum_over_maps_of_one_entry_per_window(p, non_negative):
    window, shape, betas = (2, 2, 3), (3, 3, 4), [0.7, 6.0]
    # Around the threshold of each image, and two coefficients that differ only in sign.
    tau = [threshold(beta, p)[1] for beta in betas]
    v = 1.5 * scalar(tau).view(2, 1, 1, 1) * rand(2, *shape, seed=3)
    v[:, 0, 0, 0], v[:, 1, 1, 1] = scalar(tau) * 2, scalar(tau) * -2
    beta = scalar(betas).view(2, 1, 1, 1)
    x = shrink(v, beta, p, non_negative=non_negative, window=window)
    assert not (non_negative and (x < 0).any())
    zeros = 0
    for n, k, i, j in np.ndindex(2, 2, 2, 2):
        part = (n, slice(2 * k, 2 * k + 2), slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3))
        assert torch.count_nonzero(x[part]) <= 1
        found = cost(x[part], v[part], betas[n], p).sum().item()
        lowest = lowest_cost_of_a_window(v[part].flatten().tolist(), betas[n], p, non_negative)
        assert lowest * (1 - 1e-6) <= found <= lowest * (1 + 1e-12)
        zeros += not x[part].any()
    assert 0 < zeros < 16
    for n, number in enumerate(betas):
        alone = shrink(v[n : n + 1], number, p, non_negative=non_negative, window=window)
        assert_close(alone[0], x[n], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_a_window_of_one_place_changes_nothing_and_float32_stays(p):
    v = 3 * rand(2, 3, 4, 5)
    assert torch.equal(shrink(v, 1.3, p, window=(1, 1, 1)), shrink(v, 1.3, p))
    single = shrink(v.float(), 1.3, p, window=(2, 3, 3))
    assert single.dtype == torch.float32
    assert_close(single.double(), shrink(v, 1.3, p, window=(2, 3, 3)), rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_visible_in_its_window():
    v = 3 * rand(2, 3, 4, 5)
    expected = shrink(v, 1.3, window=(2, 2, 2))
    v[0, 1, 1, 1] = float("nan")
    found = shrink(v, 1.3, window=(2, 2, 2))
    assert found[0, :2, :2, :2].isnan().any() and found.isnan().sum() == 1
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, 2], expected[0, 2])


@pytest.mark.parametrize("p", ALL_EXPONENTS)
def test_penalties_are_those_of_every_image_by_itself(p):
    x = rand(3, 2, 4, 5)
    x[0], x[1, 0] = 0, 0
    found = penalties(x, p)
    assert found.dtype == torch.float64 and found.shape == (3,)
    expected = [sum(abs(v) ** p for v in image.flatten().tolist() if v) for image in x]
    assert_close(found, scalar(expected), rtol=1e-12, atol=0)
    # In single precision they are summed in it.
    assert_close(penalties(x.float(), p), scalar(expected), rtol=1e-6, atol=0)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_exponents_and_weights_out_of_range_are_refused():
    v = rand(3)
    for p in (-0.1, 1.1, float("nan")):
        with refused(f"p={p}: the exponent of the sparse prior must lie between 0 and 1"):
            shrink(v, 1.0, p)
        with refused(f"p={p}: "):
            penalty(v, p)
        with refused(f"p={p}: "):
            penalties(v, p)
    with refused("non_negative='x': must be True or False"):
        Prior(non_negative="x")
    for beta in (0.0, -1.0, float("nan")):
        with refused(f"beta={beta}: must be positive"):
            shrink(v, beta)
