"""Pooling and unpooling against a slow loop over windows."""

import itertools
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconvnet.operators import pooling
from deconvnet.operators.pooling import (
    UNPOOLINGS,
    max_pool,
    pool,
    pooled_shape,
    strongest,
    unpool,
    unpooling_weights,
    weighted_pool,
    weighted_unpool,
)

CASES = {
    "2-D": ((4, 6, 9), (1, 2, 3)),
    "3-D": ((4, 6, 9), (2, 3, 3)),
    "partial at every border": ((5, 7, 8), (2, 3, 3)),
    "window larger than the maps": ((2, 2, 3), (3, 4, 5)),
    "nothing to pool": ((3, 4, 5), (1, 1, 1)),
    "groups only": ((7, 3, 2), (3, 1, 1)),
}
cases = pytest.mark.parametrize("name", CASES)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def windows_of(shape, window):
    """(place among the pooled maps, the ranges of maps, rows and columns) of every window."""
    sizes = [-(-size // step) for size, step in zip(shape, window, strict=True)]
    for place in itertools.product(*map(range, sizes)):
        yield (
            place,
            [
                range(p * step, min((p + 1) * step, size))
                for p, step, size in zip(place, window, shape, strict=True)
            ],
        )


def pooled_by_a_loop(z, window):
    """(pooled, switches): of the elements of a window in order, the best by (magnitude, sign)."""
    N, K, H, W = z.shape
    sizes = [-(-size // step) for size, step in zip((K, H, W), window, strict=True)]
    pooled = torch.empty(N, *sizes, dtype=z.dtype)
    switches = torch.empty(N, *sizes, dtype=torch.int64)
    for n, (place, ranges) in itertools.product(range(N), windows_of((K, H, W), window)):
        best = None
        for k, i, j in itertools.product(*ranges):
            value = z[n, k, i, j].item()
            if best is None or (abs(value), value > 0) > (abs(best[0]), best[0] > 0):
                best = (value, (k * H + i) * W + j)
        pooled[(n, *place)], switches[(n, *place)] = best
    return pooled, switches


def assert_pools_as_the_loop(z, window):
    pooled, switches = max_pool(z, window)
    expected, where = pooled_by_a_loop(z, window)
    assert torch.equal(pooled, expected)
    assert switches.dtype == torch.int64
    assert torch.equal(switches, where)


@cases
def test_max_pool_keeps_the_largest_magnitude_of_every_window_with_its_sign(name):
    shape, window = CASES[name]
    z = rand(2, *shape)
    pooled, _ = max_pool(z, window)
    assert_pools_as_the_loop(z, window)
    if name == "partial at every border":
        assert (pooled < 0).any() and (pooled > 0).any()


@cases
def test_of_equal_magnitudes_the_positive_wins_and_then_the_first(name):
    shape, window = CASES[name]
    generator = torch.Generator().manual_seed(1)
    # Small integers: most windows hold several extrema, of both signs or of one.
    for largest in (1, 2, 5):
        z = torch.randint(-largest, largest + 1, (3, *shape), generator=generator).double()
        assert_pools_as_the_loop(z, window)


@cases
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_the_completion_of_a_partial_window_never_wins(name, value):
    shape, window = CASES[name]
    assert_pools_as_the_loop(torch.full((2, *shape), value, dtype=torch.float64), window)
    if value:
        assert_pools_as_the_loop(value * (rand(2, *shape).abs() + 1e-300), window)
        pooled, _ = max_pool(value * (rand(2, *shape).abs() + 1e-3), window)
        assert (pooled * value > 0).all()


def test_float32_maps_with_many_zeros_as_after_shrinkage():
    z = rand(2, 6, 9, 10).float()
    assert_pools_as_the_loop(z * (z.abs() > 1.5), (3, 3, 3))


@cases
def test_unpooled_maxima_are_in_place_with_their_sign_and_all_else_is_zero(name):
    shape, window = CASES[name]
    z = rand(2, *shape)
    pooled, switches = max_pool(z, window)
    unpooled = unpool(pooled, switches, z.shape)
    kept = unpooled != 0
    assert torch.equal(unpooled[kept], z[kept])
    assert kept.sum() == pooled.numel()
    again, switches_again = max_pool(unpooled, window)
    assert torch.equal(again, pooled) and torch.equal(switches_again, switches)


@cases
def test_compiled_switches_are_those_of_the_largest_magnitudes(name, monkeypatch):
    shape, window = CASES[name]
    z = rand(3, *shape).float()
    monkeypatch.setattr(pooling, "COMPILED", 0)
    assert torch.equal(strongest(z, window), max_pool(z, window)[1])
    assert torch.equal(strongest(z.mT.contiguous().mT, window), max_pool(z, window)[1])


def test_a_nan_in_a_window_survives_compiled_pooling_as_any_other(monkeypatch):
    z = rand(1, 4, 6, 9).float()
    z[0, 1, 2, 3] = float("nan")
    for threshold in (0, pooling.COMPILED):
        monkeypatch.setattr(pooling, "COMPILED", threshold)
        assert pool(z, strongest(z, (2, 3, 3))).isnan().sum() == 1


@cases
def test_pool_is_the_adjoint_of_unpool_and_undoes_it(name):
    shape, window = CASES[name]
    z, other = rand(2, *shape, seed=1), rand(2, *shape, seed=2)
    pooled, switches = max_pool(z, window)
    assert torch.equal(pool(z, switches), pooled)
    assert torch.equal(pool(unpool(pooled, switches, z.shape), switches), pooled)
    left = (unpool(pooled, switches, z.shape) * other).sum()
    right = (pooled * pool(other, switches)).sum()
    assert_close(left, right, rtol=1e-12, atol=1e-12)


@cases
def test_switches_are_in_range_and_unique_within_an_image(name):
    shape, window = CASES[name]
    for z in (rand(3, *shape), torch.zeros(3, *shape)):
        _, switches = max_pool(z, window)
        assert switches.min() >= 0 and switches.max() < torch.Size(shape).numel()
        for image in switches:
            assert image.unique().numel() == image.numel()


@cases
def test_images_are_pooled_by_themselves(name):
    shape, window = CASES[name]
    z = rand(3, *shape)
    together = max_pool(z, window)
    for n in range(3):
        for whole, single in zip(together, max_pool(z[n : n + 1], window), strict=True):
            assert torch.equal(whole[n], single[0])


def test_pooled_sizes_are_rounded_up():
    assert pooled_shape((15, 156, 156), (3, 3, 3)) == (5, 52, 52)
    assert pooled_shape((7, 10, 11), (3, 4, 5)) == (3, 3, 3)
    for (shape, window), seed in zip(CASES.values(), range(9), strict=False):
        pooled, switches = max_pool(rand(1, *shape, seed=seed), window)
        assert pooled.shape[1:] == switches.shape[1:] == pooled_shape(shape, window)


def test_sizes_of_the_four_layers_of_the_iccv_2011_network():
    size, count = 150, []
    expected = [
        ((15, 156, 156), (5, 52, 52)),
        ((50, 58, 58), (25, 20, 20)),
        ((100, 26, 26), (50, 9, 9)),
        ((150, 15, 15), (75, 5, 5)),
    ]
    for groups, (maps, pooled) in zip((3, 2, 2, 2), expected, strict=True):
        assert size + 7 - 1 == maps[1]
        assert pooled_shape(maps, (groups, 3, 3)) == pooled
        count.append(torch.Size(maps).numel() + torch.Size(pooled).numel())
        size = pooled[1]
    assert count == [378_560, 178_200, 71_650, 35_625]


def weights_by_a_loop(kind, switches, shape, window):
    """Weights of equal size at the places of a window that `kind` cannot tell apart."""
    weights = torch.zeros(len(switches), *shape, dtype=torch.float64)
    for n, (pooled, ranges) in itertools.product(range(len(weights)), windows_of(shape, window)):
        there = np.unravel_index(switches[(n, *pooled)].item(), shape)
        middle = tuple((first[0] + first[-1]) // 2 for first in ranges)
        places = [
            place
            for place in itertools.product(*ranges)
            if {
                "switches": place == there,
                "no_map": place[1:] == there[1:],
                "no_place": place[0] == there[0],
                "centre": place == middle,
                "average": True,
                "everywhere": True,
            }[kind]
        ]
        for place in places:
            weights[(n, *place)] = 1.0 if kind == "everywhere" else len(places) ** -0.5
    return weights


@cases
@pytest.mark.parametrize("kind", UNPOOLINGS)
def test_weights_forget_what_their_kind_says_and_have_unit_length_in_every_window(name, kind):
    shape, window = CASES[name]
    _, switches = max_pool(rand(2, *shape), window)
    weights = unpooling_weights(kind, switches, shape, window)
    assert weights.dtype == torch.float32
    expected = weights_by_a_loop(kind, switches, shape, window)
    assert_close(weights.double().expand_as(expected), expected, rtol=2e-7, atol=0)
    for n, (_, (maps, rows, columns)) in itertools.product(range(2), windows_of(shape, window)):
        inside = weights.expand_as(expected)[n, maps][:, rows][:, :, columns]
        squares = inside.double().square().sum().item()
        assert squares == pytest.approx(inside.numel() if kind == "everywhere" else 1, rel=1e-6)


@cases
def test_weighted_pooling_is_the_adjoint_of_weighted_unpooling(name):
    shape, window = CASES[name]
    pooled = rand(2, *pooled_shape(shape, window), seed=1)
    z = rand(2, *shape, seed=2)
    for weights in (rand(2, *shape, seed=3), rand(1, *shape, seed=4)):
        unpooled = weighted_unpool(pooled, weights, window)
        pooled_back = weighted_pool(z, weights, window)
        assert unpooled.shape == z.shape and pooled_back.shape == pooled.shape
        left, right = (unpooled * z).sum((1, 2, 3)), (pooled * pooled_back).sum((1, 2, 3))
        scale = unpooled.flatten(1).norm(dim=1) * z.flatten(1).norm(dim=1)
        assert ((left - right).abs() <= 1e-12 * scale).all()
        for place, (maps, rows, columns) in windows_of(shape, window):
            value = pooled[(slice(None), *place)].view(2, 1, 1, 1)
            inside = weights.expand_as(z)[:, maps][:, :, rows][..., columns]
            found = unpooled[:, maps][:, :, rows][..., columns]
            assert_close(found, inside * value, rtol=1e-14, atol=0)


@cases
@pytest.mark.parametrize("kind", [kind for kind in UNPOOLINGS if kind != "everywhere"])
def test_gathering_with_the_weights_undoes_spreading(name, kind):
    shape, window = CASES[name]
    pooled, switches = max_pool(rand(2, *shape), window)
    weights = unpooling_weights(kind, switches, shape, window).double()
    # The weights are float32.
    found = weighted_pool(weighted_unpool(pooled, weights, window), weights, window)
    assert_close(found, pooled, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "window"),
    [("switches", (2, 3, 3)), ("no_map", (1, 2, 3)), ("no_place", (3, 1, 1))],
)
def test_where_there_is_nothing_to_forget_spreading_is_unpooling(kind, window):
    shape = (5, 7, 8)
    pooled, switches = max_pool(rand(2, *shape), window)
    weights = unpooling_weights(kind, switches, shape, window).double()
    expected = unpool(pooled, switches, (2, *shape))
    assert torch.equal(weighted_unpool(pooled, weights, window), expected)


@cases
def test_the_strongest_are_the_switches_of_max_pooling_where_no_two_tie(name):
    shape, window = CASES[name]
    for seed in range(3):
        z = rand(2, *shape, seed=seed)
        assert z.abs().unique().numel() == z.numel()
        assert torch.equal(strongest(z, window), max_pool(z, window)[1])
    # Where they do tie, another place of the same magnitude.
    z = torch.randint(-2, 3, z.shape, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(pool(z, strongest(z, window)).abs(), max_pool(z, window)[0].abs())


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_wrong_shapes_and_windows_are_refused():
    z = rand(2, 3, 4, 5)
    pooled, switches = max_pool(z, (1, 2, 2))
    with refused("maps must have the shape (N, K, H, W), got (3, 4, 5)"):
        max_pool(z[0], (1, 2, 2))
    for window in [(2, 2), (1, 0, 2), (1, 2, -1)]:
        with refused(f"pooling window {window}: expected three numbers (groups, h, w)"):
            max_pool(z, window)
    with refused("pooled maps of shape (2, 2, 2, 3) do not fit switches of shape (2, 3, 2, 3)"):
        unpool(pooled[:, :2], switches, z.shape)
    with refused("2 pooled images cannot be unpooled to the shape (3, 3, 4, 5)"):
        unpool(pooled, switches, (3, 3, 4, 5))
    choices = ", ".join(UNPOOLINGS)
    with refused(f"unpooling=random: choose one of {choices}"):
        unpooling_weights("random", switches, (3, 4, 5), (1, 2, 2))
