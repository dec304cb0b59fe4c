"""Deconvolution against scipy, loops, Fourier transforms and autograd."""

import re

import numpy as np
import pytest
import scipy.signal
import torch
from torch.testing import assert_close

from deconvnet.operators import convolution
from deconvnet.operators.convolution import (
    connected,
    correlate,
    correlate_strips,
    deconvolve,
    filter_gradient,
    fourier_size,
    map_size,
)

BOUNDARIES = ["valid", "circular"]
SHAPES = {
    "square": (2, 3, 1, (9, 11), (5, 5)),
    "3 channels": (2, 4, 3, (9, 11), (5, 5)),
    "even": (2, 3, 1, (9, 10), (4, 4)),
    "rectangular": (1, 3, 2, (8, 11), (2, 5)),
    "1x1 filters": (2, 3, 2, (5, 6), (1, 1)),
    "filters of the size of the image": (2, 3, 1, (5, 4), (5, 4)),
    "prime sizes": (1, 2, 2, (17, 13), (7, 3)),
}


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def problem(name, boundary, dtype=torch.float64):
    """(maps, filters, image) with nothing in common but their shapes."""
    N, K, C, image, size = SHAPES[name]
    rows, columns = map_size(image, size, boundary)
    z = rand(N, K, rows, columns, seed=1).to(dtype)
    return z, rand(K, C, *size, seed=2).to(dtype), rand(N, C, *image, seed=3).to(dtype)


cases = pytest.mark.parametrize("name", SHAPES)
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


def painted_by_a_loop(z, f, image, boundary):
    """Every coefficient adds its filter, at the place that the module promises."""
    (N, _, rows, columns), (_, C, h, w), (H, W) = z.shape, f.shape, image
    y = np.zeros((N, C, H, W))
    shift = (h - 1, w - 1) if boundary == "valid" else (0, 0)
    for i, j, a, b in np.ndindex(rows, columns, h, w):
        row, column = i - shift[0] + a, j - shift[1] + b
        if boundary == "circular":
            row, column = row % H, column % W
        if 0 <= row < H and 0 <= column < W:
            y[:, :, row, column] += z[:, :, i, j].numpy() @ f[:, :, a, b].numpy()
    return torch.from_numpy(y)


@cases
@boundaries
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_deconvolve_agrees_with_a_loop_over_all_coefficients(name, boundary, method):
    z, f, y = problem(name, boundary)
    expected = painted_by_a_loop(z, f, y.shape[2:], boundary)
    assert_close(
        deconvolve(z, f, boundary=boundary, method=method), expected, rtol=1e-12, atol=1e-12
    )


@cases
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_valid_deconvolve_is_the_valid_convolution_of_scipy(name, method):
    z, f, y = problem(name, "valid")
    painted = deconvolve(z, f, method=method)
    assert painted.shape == y.shape
    for n, c in np.ndindex(*y.shape[:2]):
        expected = sum(
            scipy.signal.convolve2d(z[n, k], f[k, c], mode="valid") for k in range(len(f))
        )
        np.testing.assert_allclose(painted[n, c], expected, rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_valid_correlate_is_the_full_correlation_of_scipy(name, method):
    z, f, y = problem(name, "valid")
    maps = correlate(y, f, method=method)
    assert maps.shape == z.shape
    for n, k in np.ndindex(*z.shape[:2]):
        expected = sum(
            scipy.signal.correlate2d(y[n, c], f[k, c], mode="full") for c in range(f.shape[1])
        )
        np.testing.assert_allclose(maps[n, k], expected, rtol=1e-12, atol=1e-12)


@cases
@boundaries
def test_spatial_and_fourier_forms_agree(name, boundary):
    z, f, y = problem(name, boundary)
    for function, arguments in (
        (deconvolve, (z, f)),
        (correlate, (y, f)),
        (filter_gradient, (z, y, f.shape[2:])),
    ):
        spatial = function(*arguments, boundary=boundary, method="spatial")
        fourier = function(*arguments, boundary=boundary, method="fourier")
        assert spatial.abs().max() > 0.1
        assert_close(fourier, spatial, rtol=1e-11, atol=1e-11)


@cases
@boundaries
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_correlate_and_filter_gradient_are_the_gradients_of_deconvolve(name, boundary, method):
    z, f, y = problem(name, boundary)
    z.requires_grad_()
    f.requires_grad_()
    # A different code path from the one that is checked, so that both cannot err alike.
    other = "fourier" if method == "spatial" else "spatial"
    painted = deconvolve(z, f, boundary=boundary, method=other)
    expected_z, expected_f = torch.autograd.grad(painted, (z, f), y)
    with torch.no_grad():
        maps = correlate(y, f, boundary=boundary, method=method)
        gradient = filter_gradient(z, y, f.shape[2:], boundary=boundary, method=method)
    assert_close(maps, expected_z, rtol=1e-11, atol=1e-11)
    assert_close(gradient, expected_f, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_an_impulse_paints_the_unflipped_filter(channels, method):
    f = rand(2, channels, 3, 4)
    z = torch.zeros(1, 2, 10, 12, dtype=torch.float64)
    z[0, 1, 5, 6] = 1
    valid = deconvolve(z, f, method=method)
    assert valid.shape == (1, channels, 8, 9)
    # top left corner at (i-h+1, j-w+1) = (3, 3)
    assert_close(valid[0, :, 3:6, 3:7], f[1], rtol=1e-12, atol=1e-13)
    valid[0, :, 3:6, 3:7] = 0
    assert valid.abs().max() < 1e-13
    circular = deconvolve(z, f, boundary="circular", method=method)
    assert circular.shape == (1, channels, 10, 12)
    # top left corner at (i, j) = (5, 6)
    assert_close(circular[0, :, 5:8, 6:10], f[1], rtol=1e-12, atol=1e-13)
    circular[0, :, 5:8, 6:10] = 0
    assert circular.abs().max() < 1e-13


def test_the_corner_coefficients_paint_one_corner_of_their_filter_or_wrap():
    f = rand(1, 1, 3, 4)
    z = torch.zeros(1, 1, 7, 9, dtype=torch.float64)
    z[0, 0, 0, 0] = 1
    assert deconvolve(z, f)[0, 0, 0, 0] == f[0, 0, 2, 3]
    z = z.roll((-1, -1), (2, 3))
    assert deconvolve(z, f)[0, 0, -1, -1] == f[0, 0, 0, 0]
    wrapped = deconvolve(z, f, boundary="circular")[0, 0]
    assert_close(wrapped.roll((1, 1), (0, 1))[:3, :4], f[0, 0])


@boundaries
def test_the_path_for_one_channel_agrees_with_that_for_many(boundary):
    z, f, _ = problem("square", boundary)
    twice = deconvolve(z, torch.cat([f, -2 * f], 1), boundary=boundary)
    once = deconvolve(z, f, boundary=boundary)
    assert_close(twice, torch.cat([once, -2 * once], 1), rtol=1e-12, atol=1e-12)


@boundaries
@pytest.mark.parametrize("method", ["spatial", "fourier"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int64])
def test_disconnected_planes_take_no_part(boundary, method, dtype):
    z, f, y = problem("3 channels", boundary)
    g = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    zeroed = f.clone()
    zeroed[g == 0] = 0
    options = dict(boundary=boundary, method=method)
    g = g.to(dtype)
    painted = deconvolve(z, zeroed, **options)
    assert_close(deconvolve(z, f, g, **options), painted)
    assert (painted - deconvolve(z, f, **options)).abs().max() > 0.1
    assert_close(correlate(y, f, g, **options), correlate(y, zeroed, **options))
    gradient = filter_gradient(z, y, f.shape[2:], **options)
    expected = torch.where(g.bool()[:, :, None, None], gradient, torch.zeros_like(gradient))
    assert_close(filter_gradient(z, y, f.shape[2:], g, **options), expected)
    assert torch.equal(connected(f, g), zeroed) and connected(f, None) is f


@boundaries
def test_filter_gradient_sums_over_the_images(boundary):
    z, f, y = problem("3 channels", boundary)
    total = filter_gradient(z, y, 5, boundary=boundary)
    parts = [filter_gradient(z[n : n + 1], y[n : n + 1], 5, boundary=boundary) for n in range(2)]
    assert_close(total, parts[0] + parts[1], rtol=1e-12, atol=1e-12)


@cases
@boundaries
@pytest.mark.parametrize("method", ["spatial", "fourier"])
def test_float32_stays_float32_and_agrees_with_float64(name, boundary, method):
    exact = problem(name, boundary)
    single = problem(name, boundary, torch.float32)
    options = dict(boundary=boundary, method=method)

    def results(z, f, y):
        yield deconvolve(z, f, **options)
        yield correlate(y, f, **options)
        yield filter_gradient(z, y, f.shape[2:], **options)

    for found, expected in zip(results(*single), results(*exact), strict=True):
        assert found.dtype == torch.float32
        # Sums of some hundred terms of size 1: a few hundred roundings of 6e-8 of the largest.
        assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_maps_are_larger_than_the_image_only_where_nothing_wraps():
    assert map_size((100, 150), (7, 9)) == (106, 158)
    assert map_size((100, 150), (7, 9), "circular") == (100, 150)


def test_fourier_sizes_are_the_next_products_of_2_3_5_and_7():
    exponents = np.ndindex(10, 7, 5, 4)
    smooth = sorted(2**a * 3**b * 5**c * 7**d for a, b, c, d in exponents)
    for length in range(1, 500):
        assert fourier_size((length, 1)) == (next(n for n in smooth if n >= length), 1)
        assert fourier_size((length, 1), "circular") == (length, 1)


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


def test_wrong_shapes_are_refused_with_what_was_expected():
    z, f, y = problem("3 channels", "valid")
    with refused("boundary='same': choose 'valid' or 'circular'"):
        deconvolve(z, f, boundary="same")
    with refused("filters must have the shape (K, C, h, w), got (4, 3, 5)"):
        deconvolve(z, f[..., 0])
    with refused("maps must have the shape (N, 4, rows, columns) for 4 filters, got (2, 3, "):
        deconvolve(z[:, :3], f)
    with refused("maps must have the shape (N, 4, rows, columns) for 4 filters, got (4, "):
        deconvolve(z[0], f)
    with refused("maps of 4x15 are smaller than the 5x5 filters"):
        deconvolve(z[:, :, :4], f)
    with refused("images must have the shape (N, 3, H, W) for filters of 3 channels, got (2, 1, "):
        correlate(y[:, :1], f)
    with refused("images of 4x11 are smaller than the 5x5 filters"):
        correlate(y[:, :, :4], f, boundary="circular")
    with refused("connectivity of shape (3, 4) does not fit filters of shape (4, 3, 5, 5)"):
        deconvolve(z, f, torch.ones(3, 4))
    with refused("do not fit images of shape (2, 3, 9, 11) and 5x5 filters with boundary 'valid'"):
        filter_gradient(z[:, :, 1:], y, 5)
    with refused("expected (2, K, 9, 11)"):
        filter_gradient(z, y, 5, boundary="circular")
    with refused("expected (1, K, 13, 15)"):
        filter_gradient(z, y[:1], 5)


# Maps in strips

EVERY = ("valid", "circular", "zero", "reflect")


@cases
@pytest.mark.parametrize("boundary", EVERY)
@pytest.mark.parametrize("numbers", [1, 50, 700, 10**6])
def test_strips_join_to_the_whole_maps(name, boundary, numbers):
    _, f, y = problem(name, boundary)
    expected = correlate(y, f, boundary=boundary, method="fourier")
    maps = torch.full_like(expected, float("nan"))
    times = torch.zeros(expected.shape[0], expected.shape[2])
    for images, rows, part in correlate_strips(y, f, boundary, numbers=numbers):
        assert part.shape[0] * part.shape[2] == times[images, rows].numel()
        maps[images, :, rows] = part
        times[images, rows] += 1
        small = numbers + len(f) * f.shape[2] * expected.shape[3]
        assert boundary == "reflect" or part.numel() <= small
    # Each row of each image once.
    assert (times == 1).all()
    assert_close(maps, expected, rtol=1e-10, atol=1e-11)


@cases
@pytest.mark.parametrize("boundary", EVERY)
def test_large_images_are_correlated_as_small_ones_are(name, boundary, monkeypatch):
    z, f, y = problem(name, boundary)
    expected = correlate(y, f, boundary=boundary)
    monkeypatch.setattr(convolution, "STRIP", 10)
    monkeypatch.setitem(correlate_strips.__kwdefaults__, "numbers", 10)
    assert expected.numel() > 4 * 10
    with torch.no_grad():
        found = correlate(y, f, boundary=boundary)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Where gradients are asked for they are those of the adjoint.
    leaf, filters = y.clone().requires_grad_(), f.clone().requires_grad_()
    found = correlate(leaf, filters, boundary=boundary)
    assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    towards = torch.autograd.grad((found * z).sum(), (leaf, filters))
    assert_close(towards[0], deconvolve(z, f, boundary=boundary), rtol=1e-10, atol=1e-11)
    gradient = filter_gradient(z, y, f.shape[2:], boundary=boundary)
    assert_close(towards[1], gradient, rtol=1e-10, atol=1e-11)
