"""Dead, duplicate and off-centre filters."""

import torch
from filter_problems import rand

from deconvnet.filters.care import centring_shifts, dead_filters, duplicate_filters, shift
from deconvnet.filters.constraint import normalize
from deconvnet.operators.convolution import deconvolve


def test_dead_filters_are_those_whose_maps_are_almost_zero():
    def dead(*energy):
        return dead_filters(torch.tensor(energy, dtype=torch.float64))

    assert dead(1.0, 0.0, 2.0, 1e-7, 1e-5) == [1, 3]
    assert dead(1e-20, 3e-20) == []
    assert dead(0.0, 0.0) == [0, 1]


def test_duplicate_filters_are_the_weaker_ones_of_pairs_equal_up_to_sign_and_shift():
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


def test_off_centre_filters_are_shifted_to_the_middle_without_changing_the_image():
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


def test_a_pattern_of_three_pixels_that_is_cut_off_by_one_is_shifted_back():
    pattern = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    for rows, columns in ((1, 0), (0, -1), (-1, 1)):
        shifts = centring_shifts(shift(pattern, rows, columns))
        assert shifts == {0: (-rows, -columns)}
    assert centring_shifts(pattern) == {}
