"""Cosines of filters over shifts, and one-to-one matching, against brute force."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deconvnet.filters.matching import filter_cosines, match_filters


def random_filters(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_cosine_of_1x1_filters_is_that_of_vectors():
    f, g = random_filters(5, 7, 1, 1), random_filters(4, 7, 1, 1, seed=1)
    expected = F.cosine_similarity(f.flatten(1)[:, None], g.flatten(1)[None], dim=2)
    np.testing.assert_allclose(filter_cosines(f, g), expected, atol=1e-12)
    np.testing.assert_allclose(filter_cosines(f, g, either_sign=True), expected.abs(), atol=1e-12)


@pytest.mark.parametrize("either_sign", [False, True])
def test_the_cosine_of_larger_filters_is_the_largest_over_all_shifts(either_sign):
    f, g = random_filters(3, 2, 3, 2), random_filters(4, 2, 2, 4, seed=1)
    found = filter_cosines(f, g, either_sign=either_sign)
    for k, j in itertools.product(range(3), range(4)):
        around = F.pad(f[k], (3, 3, 1, 1))  # zeros, as wide as g reaches beyond f
        products = F.conv2d(around[None], g[j : j + 1]) / (f[k].norm() * g[j].norm())
        expected = products.abs().max() if either_sign else products.max()
        assert found[k, j] == pytest.approx(float(expected), abs=1e-12)


def test_a_filter_that_is_shifted_within_its_window_is_the_same_filter():
    f = torch.zeros(1, 2, 3, 3)
    f[0, :, 0, :2] = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert filter_cosines(f, f.roll((1, 1), (2, 3)))[0, 0] == pytest.approx(1)


def test_a_filter_of_zeros_is_like_no_other():
    f = random_filters(2, 3, 1, 1).float()
    f[0] = 0
    assert (filter_cosines(f, f)[0] == 0).all()


def test_the_matching_is_one_to_one_and_has_the_largest_total_cosine():
    f, g = random_filters(4, 6, 1, 1), random_filters(5, 6, 1, 1, seed=1)
    cosines, match = filter_cosines(f, g), match_filters(f, g)
    totals = [cosines[range(4), list(order)].sum() for order in itertools.permutations(range(5), 4)]
    assert match.matched.sum() == pytest.approx(max(totals))
    assert len(set(match.partners.tolist())) == 4
    np.testing.assert_array_equal(match.best, cosines.max(1))
    np.testing.assert_array_equal(match.nearest, cosines.argmax(1))


def test_filters_in_another_order_match_themselves():
    f = random_filters(6, 3, 3, 3)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    match = match_filters(f, f[order])
    assert order[match.partners].tolist() == list(range(6))
    assert match.mean_matched == match.mean_best == pytest.approx(1)


def test_filters_beyond_a_smaller_dictionary_have_no_partner():
    match = match_filters(random_filters(3, 4, 1, 1), random_filters(2, 4, 1, 1, seed=1))
    assert sorted(match.partners.tolist())[0] == -1
    assert np.isnan(match.matched).sum() == 1 and np.isfinite(match.mean_matched)


def test_filters_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"g must have the shape \(K, 3, h, w\)"):
        filter_cosines(random_filters(2, 3, 1, 1), random_filters(2, 2, 1, 1))
