"""The choice of the number of maps."""

import pytest
import torch

from deconvnet import LearningSettings, choose_num_maps
from deconvnet.num_maps_choice import _smallest_sufficient
from deconvnet.operators.convolution import deconvolve


@pytest.fixture(scope="module")
def images():
    """Noisy images of two edge filters."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(5.0) - 2
    bump = torch.exp(-place.square())
    edges = torch.stack([torch.outer(bump, bump * place), torch.outer(bump * place, bump)])
    z = torch.randn(12, 2, 24, 24, generator=generator)
    z *= torch.rand(z.shape, generator=generator) < 0.02
    clean = deconvolve(z, edges[:, None])
    return clean + 0.03 * torch.randn(clean.shape, generator=generator)


def test_neither_too_few_nor_too_many_filters_are_chosen(images):
    learning = LearningSettings(epochs=6, batch_size=3)
    options = dict(lam_ratio=0.1, judges=0.5, learning=learning)
    choice = choose_num_maps(images, iter([8, 1, 4]), 5, **options)
    assert choice.candidates == [1, 4, 8] and choice.num_maps == 4
    assert choice.errors.shape == (3, 6)
    assert choice.errors[0].mean() > 1.2 * choice.errors[1].mean()
    assert choice.best.filters.shape == (4, 1, 5, 5)


def test_a_smaller_number_is_chosen_if_it_is_worse_by_at_most_a_standard_error():
    least = torch.tensor([1.0, 2.0, 3.0, 4.0])
    noise = torch.tensor([0.3, -0.2, 0.3, -0.2])
    errors = torch.stack([least + 0.2, least + noise, least])
    assert _smallest_sufficient(errors) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": []}, r"candidates=\[\]: must be a list of at least one number"),
        ({"candidates": 8}, "candidates=8: must be a list"),
        ({"candidates": [2, 0]}, "candidates=0: must be at least 1"),
        ({"judges": 0.1}, "judges=0.1: makes 1 of the 12 images judge; at least 2 must"),
        ({"judges": 1.0}, r"judges=1.0: must lie in \(0, 1\)"),
        ({"lam_ratio": None}, "lam=None, lam_ratio=None: give one of the two"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(images, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose_num_maps(
            images, **{"candidates": [2], "filter_size": 5, "lam_ratio": 0.1} | arguments
        )
    assert "\n" not in str(caught.value)
