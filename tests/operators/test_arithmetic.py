"""Sizes, overlaps and matrices against torch, loops and numbers by hand; fields against impulses;
and what the guide to deconvolution shows."""

import importlib.util
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deconvnet.operators.arithmetic import (
    Field,
    Window,
    chain_field,
    convolution_matrix,
    convolution_size,
    correlation_matrix,
    is_uneven,
    overlap,
    receptive_field,
    transposed_convolution_size,
    undoing_output_padding,
    undoing_padding,
)
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.operators.linear import Deconvolution, Unpooling
from deconvnet.operators.pooling import pooled_shape


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Values along an axis: sizes, kernels, strides, paddings, dilations.
AXES = [
    (size, kernel, {"stride": stride, "padding": padding, "dilation": dilation})
    for size, kernel, stride, padding, dilation in itertools.product(
        (5, 8, 13), (1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2, 3)
    )
    if dilation * (kernel - 1) < size + 2 * padding
]


def test_sizes_of_convolutions_are_those_of_torch():
    for size, kernel, window in AXES:
        y = F.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), **window)
        assert y.shape[2] == convolution_size(size, kernel, **window)


def test_sizes_of_transposed_convolutions_are_those_of_torch():
    seen = 0
    for (size, kernel, window), extra in itertools.product(AXES, (0, 1, 2)):
        if extra >= max(window["stride"], window["dilation"]):
            continue
        y, f = torch.zeros(1, 1, size), torch.zeros(1, 1, kernel)
        expected = F.conv_transpose1d(y, f, output_padding=extra, **window).shape[2]
        assert transposed_convolution_size(size, kernel, output_padding=extra, **window) == expected
        seen += 1
    assert seen > 400


def test_a_transposed_convolution_returns_to_the_size_with_the_undoing_output_padding():
    for size, kernel, window in AXES:
        extra = undoing_output_padding(size, kernel, **window)
        windows = convolution_size(size, kernel, **window)
        back = transposed_convolution_size(windows, kernel, output_padding=extra, **window)
        assert back == size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convolution_size(3, 4), "kernel=4, dilation=1: spans 4 pixels, more than the 3"),
        (lambda: convolution_size(5, 3, dilation=3), "spans 7 pixels, more than the 5 of size=5"),
        (lambda: convolution_size(4, 3, stride=0), "stride=0: must be a whole number, at least 1"),
        (lambda: convolution_size(4, 3, padding=-1), "padding=-1: must be .* at least 0"),
        (lambda: convolution_size(4, 2.0), "kernel=2.0: must be a whole number"),
        (lambda: transposed_convolution_size(0, 3), "size=0: must be .* at least 1"),
        (lambda: transposed_convolution_size(2, 3, padding=2), "padding=2: crops all of the 4"),
        (
            lambda: transposed_convolution_size(2, 3, stride=2, output_padding=2),
            "output_padding=2: must be less than stride=2 or dilation=1",
        ),
        (lambda: overlap(2, 3, output_padding=1), "output_padding=1: must be less than stride=1"),
        (lambda: undoing_padding(3, 3), r"padding=3: at most dilation \* \(kernel - 1\) = 2"),
        (lambda: undoing_output_padding(2, 3), "kernel=3, dilation=1: spans 3 pixels"),
        (lambda: is_uneven(3, stride=0), "stride=0: must be"),
        (lambda: chain_field([(3, 1), (2, 0)]), "stride=0: must be"),
        (lambda: chain_field([(3, 1, 0, 1, 1)]), r"must be \(kernel, stride, padding, dilation\)"),
        (
            lambda: correlation_matrix(torch.zeros(1, 1, 3, 3), (5, 2)),
            "kernel=3, dilation=1: spans 3 pixels, more than the 2",
        ),
        (lambda: correlation_matrix(torch.zeros(3, 3), (5, 5)), "weight must have the shape"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_transpose_is_the_convolution_with_the_turned_kernel_and_the_undoing_padding():
    for kernel, padding, dilation in itertools.product((1, 2, 3, 5), (0, 1, 2), (1, 2)):
        if padding > dilation * (kernel - 1):
            continue
        f = rand(4, 3, kernel, kernel)
        y = rand(2, 4, 9, 7, seed=1)
        undoing = undoing_padding(kernel, padding, dilation=dilation)
        turned = f.flip(2, 3).transpose(0, 1)
        again = F.conv2d(y, turned, padding=undoing, dilation=dilation)
        expected = F.conv_transpose2d(y, f, padding=padding, dilation=dilation)
        assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_a_stride_is_undone_by_zeros_between_the_outputs_and_behind_the_last():
    for size, kernel, window in AXES:
        stride, padding, dilation = window.values()
        if padding > dilation * (kernel - 1):
            continue
        f = rand(1, 1, kernel)
        y = rand(1, 1, convolution_size(size, kernel, **window), seed=1)
        extra = undoing_output_padding(size, kernel, **window)
        spread = y.new_zeros(1, 1, stride * (y.shape[2] - 1) + 1 + extra)
        spread[..., ::stride][..., : y.shape[2]] = y
        undoing = undoing_padding(kernel, padding, dilation=dilation)
        again = F.conv1d(spread, f.flip(2), padding=undoing, dilation=dilation)
        expected = F.conv_transpose1d(y, f, output_padding=extra, **window)
        assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_a_3x3_kernel_takes_4x4_to_2x2_and_its_transpose_back():
    assert convolution_size(4, 3) == 2
    assert transposed_convolution_size(2, 3) == 4
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    matrix = correlation_matrix(weight, (4, 4))
    # One row for each output, with the kernel where its window lies in the image of 16 pixels.
    expected = [
        [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0, 0, 0, 0, 0],
        [0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0],
        [0, 0, 0, 0, 0, 1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9],
    ]
    assert matrix.tolist() == expected
    x, y = rand(1, 1, 4, 4).float(), rand(1, 1, 2, 2, seed=1).float()
    assert_close((matrix @ x.flatten()).view(1, 1, 2, 2), F.conv2d(x, weight))
    assert_close((matrix.T @ y.flatten()).view(1, 1, 4, 4), F.conv_transpose2d(y, weight))


def test_a_transposed_convolution_by_hand():
    # [[1, 2], [4, 5]]: each value pastes the kernel times itself, one pixel from the last.
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    y = torch.tensor([[1.0, 2], [4, 5]])
    expected = [[1, 4, 7, 6], [8, 26, 38, 27], [23, 62, 74, 48], [28, 67, 76, 45]]
    pasted = correlation_matrix(weight, (4, 4)).T @ y.flatten()
    assert pasted.view(4, 4).tolist() == expected
    padded = F.pad(y[None, None], (2, 2, 2, 2))
    assert F.conv2d(padded, weight.rot90(2, (2, 3)))[0, 0].tolist() == expected
    assert undoing_padding(3, 0) == 2


def test_overlaps_by_hand():
    # ones(3, 3) through a 2x2 kernel of ones: corners get one term, edges two, the inside four.
    counts = overlap(3, 2)
    assert counts.tolist() == [1, 2, 2, 1]
    plane = correlation_matrix(torch.ones(1, 1, 2, 2), (4, 4)).sum(0).view(4, 4)
    assert plane.tolist() == [[1, 2, 2, 1], [2, 4, 4, 2], [2, 4, 4, 2], [1, 2, 2, 1]]
    assert torch.equal(torch.outer(counts, counts), plane.long())
    # ones(2, 2) with stride 2: the pasted kernels lie side by side.
    assert overlap(2, 2, stride=2).tolist() == [1, 1, 1, 1]
    # A stride of 2 does not divide a kernel of 3, but one of 4.
    assert overlap(4, 3, stride=2).tolist() == [1, 1, 2, 1, 2, 1, 2, 1, 1]
    assert overlap(4, 4, stride=2, padding=1).tolist() == [1, 2, 2, 2, 2, 2, 2, 1]


def test_overlaps_are_what_ones_paint_with_a_kernel_of_ones():
    for (size, kernel, window), extra in itertools.product(AXES, (0, 1)):
        if extra >= max(window["stride"], window["dilation"]):
            continue
        ones = torch.ones(1, 1, size), torch.ones(1, 1, kernel)
        painted = F.conv_transpose1d(*ones, output_padding=extra, **window)[0, 0]
        counts = overlap(size, kernel, output_padding=extra, **window)
        assert torch.equal(counts, painted.round().long())


def test_overlaps_are_uneven_where_they_differ_in_the_middle():
    found = set()
    for kernel, stride, dilation in itertools.product(range(1, 9), range(1, 6), range(1, 5)):
        border = dilation * (kernel - 1)
        counts = overlap(60, kernel, stride=stride, dilation=dilation)
        middle = counts[border : len(counts) - border]
        assert len(middle) > 2 * stride
        uneven = is_uneven(kernel, stride=stride, dilation=dilation)
        assert uneven == (len(middle.unique()) > 1)
        found.add(uneven)
    assert found == {False, True}


CHAINS = [
    [(3,)],
    [(3, 2, 1)],
    [(5, 1, 2, 2), (2, 2)],
    [(4, 2, 1), (3, 2, 1), (3, 1, 2, 2)],
    [Window(7, stride=2, padding=3), Window(3, stride=2, padding=1), (3, 1, 1), (3, 1, 1)],
]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("pooling", [False, True])
def test_the_field_of_a_chain_is_where_a_nan_reaches_a_unit(chain, pooling):
    # One image for each pixel, with a NaN there.
    y = torch.zeros(60, 1, 60)
    y[torch.arange(60), 0, torch.arange(60)] = torch.nan
    for number, link in enumerate(chain):
        window = link if isinstance(link, Window) else Window(*link)
        along = (window.stride, window.padding, window.dilation)
        if pooling and number == 1 and window.padding <= window.kernel // 2:
            y = F.max_pool1d(y, window.kernel, *along)
        else:
            y = F.conv1d(y, torch.ones(1, 1, window.kernel), None, *along)
    field = chain_field(chain)
    for unit in range(y.shape[2]):
        seen = torch.nonzero(y[:, 0, unit].isnan()).flatten()
        first, end = field.pixels(unit)
        if first >= 0 and end <= 60:
            assert (seen.min().item(), seen.max().item() + 1) == (first, end)
        else:
            assert first <= seen.min() and seen.max() < end


def test_the_field_of_the_last_pooling_of_alexnet_is_195_pixels():
    convolutions = [(11, 4, 2), (3, 2), (5, 1, 2), (3, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]
    field = chain_field(convolutions)
    assert (field.size, field.stride) == (163, 16)
    assert chain_field([*convolutions, (3, 2)]).size == 195


SHAPES = [
    {"stride": stride, "padding": padding, "dilation": dilation}
    for stride, padding, dilation in itertools.product((1, 2, 3), (0, 1), (1, 2))
] + [{"stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)}]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_matrix_of_a_convolution_is_that_of_torch_and_its_transpose_the_transposed_one(groups):
    for window in SHAPES:
        weight, image = rand(4, 2, 3, 2), (7, 6)
        matrix = correlation_matrix(weight, image, groups=groups, **window)
        x = rand(1, 2 * groups, *image, seed=1)
        expected = F.conv2d(x, weight, groups=groups, **window)
        assert_close(matrix @ x.flatten(), expected.flatten(), rtol=1e-12, atol=1e-12)
        y = rand(*expected.shape, seed=2)
        along = [
            {key: value if isinstance(value, int) else value[axis] for key, value in window.items()}
            for axis in (0, 1)
        ]
        extra = [
            undoing_output_padding(image[axis], weight.shape[2 + axis], **along[axis])
            for axis in (0, 1)
        ]
        back = F.conv_transpose2d(y, weight, output_padding=extra, groups=groups, **window)
        assert back.shape == x.shape
        assert_close(matrix.T @ y.flatten(), back.flatten(), rtol=1e-12, atol=1e-12)


def test_a_row_of_the_matrix_holds_the_weights_at_the_pixels_of_its_window():
    weight = rand(2, 3, 2, 3)
    matrix = correlation_matrix(weight, (5, 6), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    expected = torch.zeros(2, 3, 2, 3, 5, 6, dtype=weight.dtype)
    for k, i, j, c, m, n in np.ndindex(2, 3, 2, 3, 2, 3):
        row, column = 2 * i + m - 1, j + 2 * n
        if 0 <= row < 5:
            expected[k, i, j, c, row, column] = weight[k, c, m, n]
    assert_close(matrix, expected.view(12, 90), rtol=0, atol=0)


def test_a_deconvolution_of_maps_is_the_transposed_convolution_cropped_to_the_image():
    # `deconvolve` with boundary "valid" is conv_transpose2d with the padding h - 1: the maps are
    # larger than the image by what is cropped.
    f, z = rand(3, 2, 4, 3), rand(2, 3, 9, 8, seed=1)
    expected = F.conv_transpose2d(z, f, padding=(3, 2))
    assert_close(deconvolve(z, f), expected, rtol=1e-12, atol=1e-12)
    assert transposed_convolution_size(9, 4, padding=3) == expected.shape[2]
    matrix = correlation_matrix(f, expected.shape[2:], padding=(3, 2))
    assert_close(matrix.T, convolution_matrix(f, expected.shape[2:]), rtol=0, atol=0)


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


DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "deconvolution.md").read_text()


def test_the_guide_links_to_files_and_headings_that_exist():
    links = re.findall(r"\]\(([^)]+)\)", GUIDE)
    assert len(links) > 12
    for link in links:
        file, _, heading = link.partition("#")
        text = (DOCS / (file or "deconvolution.md")).read_bytes()
        if heading:
            titles = re.findall(r"^#+ (.*)$", text.decode(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, link


def test_the_pictures_of_the_guide_are_those_that_its_script_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "deconvolution.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    shown = re.findall(r"\]\(deconvolution-(\w+)\.png\)", GUIDE)
    assert sorted(shown) == sorted(pictures.PICTURES)
    for name in shown:
        assert (DOCS / f"deconvolution-{name}.png").stat().st_size < 60_000
    # Those that take no more than a moment.
    for name in ("convolution", "projection", "overlaps"):
        pictures.save(pictures.PICTURES[name](), tmp_path / f"{name}.png")
        assert 5_000 < (tmp_path / f"{name}.png").stat().st_size < 60_000
