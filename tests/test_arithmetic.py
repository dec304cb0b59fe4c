"""Sizes against torch, receptive fields against painted impulses, the matrix against a loop."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconvnet.arithmetic import (
    Field,
    convolution_matrix,
    convolution_size,
    receptive_field,
    transposed_convolution_size,
)
from deconvnet.convolution import deconvolve, map_size
from deconvnet.operators import Deconvolution, Unpooling
from deconvnet.pooling import pooled_shape


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_sizes_of_convolutions_are_those_of_torch():
    for size, kernel, stride, padding in itertools.product(
        (5, 8, 13), (1, 2, 3, 5), (1, 2, 3), (0, 1, 2)
    ):
        x, f = torch.zeros(1, 1, size, size), torch.zeros(1, 1, kernel, kernel)
        y = torch.nn.functional.conv2d(x, f, stride=stride, padding=padding)
        assert y.shape[2] == convolution_size(size, kernel, stride=stride, padding=padding)


def test_sizes_of_transposed_convolutions_are_those_of_torch():
    for size, kernel, stride, padding, extra in itertools.product(
        (3, 8), (3, 4, 5), (1, 2, 3), (0, 1), (0, 1, 2)
    ):
        if extra >= stride:
            continue
        x, f = torch.zeros(1, 1, size, size), torch.zeros(1, 1, kernel, kernel)
        y = torch.nn.functional.conv_transpose2d(
            x, f, stride=stride, padding=padding, output_padding=extra
        )
        assert y.shape[2] == transposed_convolution_size(
            size, kernel, stride=stride, padding=padding, output_padding=extra
        )


def test_a_valid_deconvolution_turns_maps_into_images_as_a_convolution_does():
    for image, size in ((100, 7), (24, 4), (5, 5)):
        assert convolution_size(map_size((image, 1), (size, 1))[0], size) == image


STACKS = [
    ((5,), ()),
    ((3, 4), (1,)),
    ((3, 4), (2,)),
    ((5, 3, 2), (3, 2)),
    ((2, 3, 3), (2, 3)),
]


def painted_rows(filter_sizes, pools, boundary, unit, places):
    """(first, last + 1) painted row of a top unit, with every switch of a pooling at one place.

    Everything has one column and filters are of ones, so that nothing cancels.
    """
    # Every layer pads by h - 1 the maps of what is below; a window never stands at a border here.
    rows = [240 if boundary == "valid" else 288]
    operators = []
    for level, size in enumerate(filter_sizes):
        operators.append(Deconvolution(torch.ones(1, 1, size, 1), boundary))
        rows.append(map_size((rows[-1], 1), (size, 1), boundary)[0])
        if level < len(pools):
            shape = (1, rows[-1], 1)
            pooled = pooled_shape(shape, (1, pools[level], 1))
            # An incomplete window at the end may not hold the place.
            place = torch.arange(pooled[1]) * pools[level] + places[level]
            switches = place.clamp(max=rows[-1] - 1).view(1, *pooled)
            operators.append(Unpooling(switches, shape))
            rows.append(pooled[1])
    z = torch.zeros(1, 1, rows[-1], 1)
    z[0, 0, unit] = 1
    for operator in reversed(operators):
        z = operator(z)
    painted = torch.nonzero(z[0, 0, :, 0]).flatten()
    return painted.min().item(), painted.max().item() + 1


@pytest.mark.parametrize(("filter_sizes", "pools"), STACKS)
@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_a_receptive_field_is_what_a_unit_paints_with_switches_at_all_places(
    filter_sizes, pools, boundary
):
    field = receptive_field(filter_sizes, pools, boundary)
    for unit in (12, 13, 17):
        # The corners of the windows reach furthest; places need not agree between windows.
        reached = [
            painted_rows(filter_sizes, pools, boundary, unit, places)
            for places in itertools.product(*map(range, pools))
        ]
        assert field.pixels(unit) == (min(a for a, _ in reached), max(b for _, b in reached))
        assert field.pixels(unit)[1] - field.pixels(unit)[0] == field.size
    assert field.pixels(14)[0] - field.pixels(13)[0] == field.stride == np.prod(pools, dtype=int)


def test_receptive_fields_of_the_iccv_2011_network():
    sizes = []
    for layers in range(1, 5):
        field = receptive_field((7,) * layers, (3,) * (layers - 1))
        sizes.append((field.size, field.stride))
    # A unit of layer 2 paints 7 pooled units of 3 rows each, through filters of 7: 27 pixels.
    assert sizes == [(7, 1), (27, 3), (87, 9), (267, 27)]


def test_the_first_unit_of_a_valid_layer_shows_one_pixel():
    assert receptive_field((7,), ()) == Field(size=7, stride=1, offset=-6)
    assert receptive_field((7,), ()).pixels(0) == (-6, 1)
    assert receptive_field((7,), (), "circular").pixels(3) == (3, 10)


def test_a_wrong_number_of_poolings_is_refused():
    with pytest.raises(ValueError, match="2 layers have 1 poolings, got 2"):
        receptive_field((3, 3), (2, 2))


@pytest.mark.parametrize("boundary", ["valid", "circular"])
@pytest.mark.parametrize("connectivity", [None, [[1, 0], [1, 1], [0, 1]]])
def test_the_matrix_holds_a_filter_pixel_where_a_coefficient_meets_an_image_pixel(
    boundary, connectivity
):
    f = rand(3, 2, 2, 3)
    g = None if connectivity is None else torch.tensor(connectivity)
    H, W = 5, 4
    rows, columns = map_size((H, W), (2, 3), boundary)
    matrix = convolution_matrix(f, (H, W), boundary=boundary, g=g)
    expected = torch.zeros(2, H, W, 3, rows, columns, dtype=f.dtype)
    for c, i, j, k, m, n in np.ndindex(*expected.shape):
        if boundary == "valid":
            a, b = i - (m - 1), j - (n - 2)
        else:
            a, b = (i - m) % H, (j - n) % W
        if 0 <= a < 2 and 0 <= b < 3 and (g is None or g[k, c]):
            expected[c, i, j, k, m, n] = f[k, c, a, b]
    assert_close(matrix, expected.view(2 * H * W, -1), rtol=0, atol=1e-15)
    z = rand(1, 3, rows, columns, seed=1)
    painted = deconvolve(z, f, g, boundary=boundary)
    assert_close(matrix @ z.flatten(), painted.flatten(), rtol=1e-12, atol=1e-13)
