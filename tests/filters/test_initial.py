"""Filters that learning starts from."""

import pytest
import torch
from filter_problems import rand
from torch.testing import assert_close

from deconvnet.filters.care import duplicate_filters
from deconvnet.filters.constraint import normalize
from deconvnet.filters.initial import initial_filters


@pytest.mark.parametrize("init", ["random", "patches"])
def test_initial_filters_have_unit_norm_and_follow_the_generator(init):
    b = rand(3, 2, 20, 16).float()

    def draw(seed):
        return initial_filters(8, b, 5, init, torch.Generator().manual_seed(seed))

    f = draw(0)
    assert f.shape == (8, 2, 5, 5) and f.dtype == torch.float32
    assert_close(torch.linalg.vector_norm(f, dim=(1, 2, 3)), torch.ones(8))
    torch.manual_seed(5)
    assert torch.equal(f, draw(0)) and not torch.equal(f, draw(1))
    assert duplicate_filters(f, torch.ones(8), similarity=0.999) == []


def test_patches_are_taken_from_where_the_contrast_is():
    b = rand(2, 1, 30, 30)
    b[:, :, :, :15] *= 1e-3
    f = initial_filters(6, b, 5, "patches", torch.Generator().manual_seed(0))
    pieces = normalize(b.unfold(2, 5, 1).unfold(3, 5, 1).reshape(-1, 1, 5, 5)).flatten(1)
    similar = pieces @ f.flatten(1).T
    # Up to the trace of noise; and none from the dark half.
    assert (similar.amax(0) > 1 - 1e-5).all()
    column = similar.argmax(0) % 26
    assert (column > 10).all()


def test_patches_of_an_empty_image_still_have_unit_norm():
    f = initial_filters(4, torch.zeros(1, 1, 9, 9), 3, "patches", torch.Generator().manual_seed(0))
    assert_close(torch.linalg.vector_norm(f, dim=(1, 2, 3)), torch.ones(4))
