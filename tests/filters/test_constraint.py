"""The projection onto the constraint of the filters."""

import pytest
import torch
from filter_problems import rand
from torch.testing import assert_close

from deconvnet.filters.constraint import FilterConstraint, normalize


def test_the_projection_of_a_zero_filter_is_zero_or_the_fallback():
    f, other = rand(3, 2, 3, 3), normalize(rand(3, 2, 3, 3, seed=1), "plane")
    f[1], f[2, 0] = 0, 0
    assert (normalize(f)[1] == 0).all() and torch.isfinite(normalize(f)).all()
    projected = FilterConstraint("plane").project(f, fallback=other)
    assert torch.equal(projected[1], other[1]) and torch.equal(projected[2, 0], other[2, 0])
    assert_close(projected[0, 0], f[0, 0] / f[0, 0].norm())


@pytest.mark.parametrize("norm", ["filter", "plane"])
def test_the_projection_sets_disconnected_planes_to_zero_also_in_the_fallback(norm):
    g = torch.tensor([[1, 0], [0, 1]])
    constraint = FilterConstraint(norm, connectivity=g)
    f, fallback = rand(2, 2, 3, 3), rand(2, 2, 3, 3, seed=1)
    f[1] = 0
    projected = constraint.project(f, fallback=fallback)
    assert torch.equal(projected.abs().amax((2, 3)) > 0, g.bool())
    assert torch.equal(projected[1, 1], fallback[1, 1])


def test_a_constraint_is_refused_with_an_unknown_norm_or_both_signs_and_means():
    with pytest.raises(ValueError, match="norm=all: choose one of filter, plane"):
        FilterConstraint("all")
    with pytest.raises(ValueError, match="zero_mean=True: not with non_negative"):
        FilterConstraint(non_negative=True, zero_mean=True)
