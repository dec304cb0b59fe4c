"""An image is rounded alone as in a batch: the same bits with the torch that was measured.

`convolution.NATIVE_CONVOLUTION` and `linear.NATIVE_PRODUCT` are thresholds at which torch changes
its routine, and with it the order in which it sums. torch promises neither. With another version an
image alone and in a batch may therefore differ, by rounding and no more.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deconvnet.operators.convolution import NATIVE_CONVOLUTION, correlate, deconvolve
from deconvnet.operators.linear import NATIVE_PRODUCT, _times

MEASURED = (2, 14)
measured = tuple(map(int, torch.__version__.split(".")[:2])) == MEASURED
on_the_measured_torch = pytest.mark.skipif(
    not measured, reason=f"torch {torch.__version__} is not the measured {MEASURED}"
)


@pytest.fixture(autouse=True)
def one_thread():
    # With several threads torch never takes its own routine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def assert_alone_is_as_in_the_batch(function, batch):
    together = function(batch)
    for n in range(len(batch)):
        alone = function(batch[n : n + 1])
        assert_close(alone, together[n : n + 1], rtol=1e-4, atol=1e-4)
        if measured:
            assert torch.equal(alone, together[n : n + 1])


# Below, at and above the threshold of a single image.
SIDES = (20, 50, 51, 60)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("h", "w"), [(3, 3), (5, 5), (1, 5)])
def test_an_image_is_painted_alone_as_in_a_batch(side, h, w):
    z, f = rand(3, 8, side, side), rand(8, 2, h, w, seed=1)
    assert_alone_is_as_in_the_batch(lambda z: deconvolve(z, f), z)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("h", "w"), [(3, 3), (5, 5), (1, 5)])
def test_an_image_is_correlated_alone_as_in_a_batch(side, h, w):
    y, f = rand(3, 8, side, side), rand(6, 8, h, w, seed=1)
    assert_alone_is_as_in_the_batch(lambda y: correlate(y, f), y)


@pytest.mark.parametrize("C", [2, 5, 10, 14, 15, 19, 20, 21, 25])
def test_the_spectrum_of_an_image_is_multiplied_alone_as_in_a_batch(C):
    spectrum = torch.complex(rand(5, 6, 7, C), rand(5, 6, 7, C, seed=1))
    matrices = torch.complex(rand(6, 7, C, C, seed=2), rand(6, 7, C, C, seed=3))
    assert_alone_is_as_in_the_batch(lambda spectrum: _times(spectrum, matrices), spectrum)


@on_the_measured_torch
def test_without_the_threshold_of_convolutions_a_single_small_image_differs():
    f, bits = rand(6, 8, 3, 3, seed=1), {}
    for side in SIDES:
        z = rand(2, 8, side, side)
        bits[z[0].numel() <= NATIVE_CONVOLUTION] = torch.equal(
            F.conv2d(z[:1], f), F.conv2d(z, f)[:1]
        )
    assert bits == {True: False, False: True}


@on_the_measured_torch
def test_without_the_threshold_of_products_several_small_ones_differ():
    C = 14
    assert C**2 < NATIVE_PRODUCT < 5 * C**2
    rows = torch.complex(rand(6, 7, 5, C), rand(6, 7, 5, C, seed=1))
    columns = torch.complex(rand(6, 7, C, C, seed=2), rand(6, 7, C, C, seed=3))
    alone = [rows[:, :, n : n + 1] @ columns for n in range(5)]
    assert not torch.equal(torch.cat(alone, 2), rows @ columns)
