import itertools

import numba
import numpy as np
import pytest

from deconvnet.sparse_coding import kernels
from deconvnet.sparse_coding.active_set import Filters
from deconvnet.sparse_coding.tap_loops import correlate_at, paint_at
from deconvnet.support.vectors import LONG, padded


@numba.njit(**kernels.OPTIONS)
def both(r, f, planes, k, pixel, amount):
    product = correlate_at(r, f, planes, k, pixel)
    paint_at(r, f, planes, k, pixel, amount)
    return product


# Blocks of 8, 4, 2 and 1 rows; one short vector, one long vector, and several long ones per row.
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_filters_of_all_sizes_are_correlated_and_painted_as_by_numpy(dtype):
    random = np.random.default_rng(0)
    for h, w in itertools.product((1, 2, 3, 5, 7, 8, 11, 16, 23), (1, 7, 8, 9, 16, 17, 40, 260)):
        f = random.standard_normal((3, 2, h, w)).astype(dtype)
        f[0, 0], f[2] = 0, 0  # channels without taps are skipped, be it all of them
        r = random.standard_normal((2, h + 4, w + 5 + LONG)).astype(dtype)
        top, left = 3, 5
        for k in range(3):
            seen, amount = r[:, top : top + h, left : left + w], dtype(random.standard_normal())
            expected = r.copy()
            expected[:, top : top + h, left : left + w] += amount * f[k]
            product = (seen.astype(np.float64) * f[k]).sum()
            scale = np.linalg.norm(seen) * np.linalg.norm(f[k])
            filters = Filters.from_array(padded(f))
            found = both(r, *filters, k, top * r.shape[2] + left, amount)
            eps = np.finfo(dtype).eps
            assert abs(found - product) <= 4 * eps * scale, (h, w, k)
            assert np.abs(r - expected).max() <= 2 * eps * np.abs(expected).max(), (h, w, k)
