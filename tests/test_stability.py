"""Filters that are learned again: those of planted data are found, and nothing is learned twice."""

import json

import numpy as np
import pytest
import torch

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
)
from deconvnet.filters.matching import match_filters
from deconvnet.stability import measure_stability
from deconvnet.training.loop import train

CHANNELS, MAPS = 6, 4


def arrays(seed=0):
    """Arrays (12, 6, 8, 8): sparse non-negative sums of the first four unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    z = 0.2 + torch.rand(12, MAPS, 8, 8, generator=generator)
    z = z * (torch.rand(z.shape, generator=generator) < 0.1)
    return torch.cat([z, torch.zeros(12, CHANNELS - MAPS, 8, 8)], 1)


@pytest.fixture(scope="module")
def net():
    learning = LearningSettings(epochs=6, batch_size=4)
    solver = SolverSettings("fista")
    settings = LayerSettings(MAPS, 1, lam=10.0, non_negative=True, learning=learning, solver=solver)
    preprocessing = PreprocessingSettings("none", [], scale="none", channels=CHANNELS)
    net = DeconvNet([settings], preprocessing)
    train(net, arrays())
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stability")


@pytest.fixture(scope="module")
def result(net, folder):
    return measure_stability(net, arrays(), seeds=1, folder=folder)


def test_filters_of_planted_data_are_found_from_another_seed_and_from_both_halves(net, result):
    planted = match_filters(net.layer(1).filters, torch.eye(CHANNELS)[:MAPS, :, None, None])
    assert planted.mean_matched > 0.98
    assert result.seeds[0].mean_matched > 0.98 and result.between_halves.mean_matched > 0.98
    assert (result.over_seeds > 0.95).all() and (result.over_halves > 0.95).all()
    assert result.chance < 0.9  # of six channels


def test_what_was_learned_is_kept_and_not_learned_again(net, folder, result):
    names = ["half-1", "half-2", "seed-1"]
    assert sorted(path.stem for path in folder.glob("*.safetensors")) == names
    learned = []
    again = measure_stability(net, arrays(), seeds=1, folder=folder, note=learned.append)
    assert not learned
    np.testing.assert_array_equal(again.over_seeds, result.over_seeds)
    with pytest.raises(ValueError, match="seed-1.safetensors: was learned with other settings"):
        measure_stability(
            DeconvNet([LayerSettings(MAPS, 1, lam=9.0)], net.preprocessing.settings),
            arrays(),
            folder=folder,
        )


def test_a_filter_counts_by_its_worse_half_and_by_the_mean_over_seeds(result):
    expected = np.minimum(*(match.best for match in result.halves))
    np.testing.assert_array_equal(result.over_halves, expected)
    np.testing.assert_array_equal(result.over_seeds, result.seeds[0].best)


def test_the_table_fits_into_80_columns_and_json_takes_the_values(result):
    assert max(map(len, str(result).splitlines())) <= 80
    values = json.loads(json.dumps(result.as_dict()))
    assert values["num_maps"] == MAPS and len(values["seeds"][0]["best"]) == MAPS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0, "halves": False}, "nothing to compare with"),
        ({"seeds": -1}, "seeds=-1: must be a whole number"),
        ({"seeds": "two"}, "seeds='two': must be a number"),
    ],
)
def test_wrong_input_is_refused_in_one_line(net, given, message):
    with pytest.raises(ValueError, match=message):
        measure_stability(net, arrays(), **given)
    with pytest.raises(ValueError, match="1 image cannot be halved"):
        measure_stability(net, arrays()[:1])
