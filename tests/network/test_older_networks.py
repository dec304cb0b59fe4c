"""Network files that an earlier version wrote, with settings under their old names.

tests/fixtures/older_network holds a network of two layers, three learned filters, and what the
earlier version made of two images (expected.npz).
"""

import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from deconvnet import Learned, load

FIXTURE = Path(__file__).parents[1] / "fixtures" / "older_network"
NETWORK, FILTERS = FIXTURE / "network.safetensors", FIXTURE / "filters.safetensors"
# Each renamed key, by the settings that it is in.
RENAMED = {
    "preprocessing": {
        "window": "contrast_size",
        "sigma": "contrast_sigma",
        "divide": "contrast_divide",
    },
    "solver": {"coupling": "rho"},
    "learning": {"memory": "averaging_epochs", "revive": "reinit_unused"},
}


def loaded(path, reader=load):
    """What the file holds, and the warnings about old names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        content = reader(path)
    assert {warning.category for warning in caught} == {FutureWarning}
    return content, [str(warning.message) for warning in caught]


@pytest.fixture
def expected():
    with np.load(FIXTURE / "expected.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_an_older_network_has_the_same_filters_maps_and_reconstructions(expected):
    net, _ = loaded(NETWORK)
    for number in (1, 2):
        assert torch.equal(net.layer(number).filters, expected[f"filters{number}"])
    codes = net.infer(expected["images"])
    assert_close(codes.layer(1).z, expected["maps1"], rtol=0, atol=1e-4)
    for number in (1, 2):
        found = net.reconstruct(codes, number)
        assert_close(found, expected[f"reconstruction{number}"], rtol=0, atol=1e-4)


def test_every_old_name_in_a_network_is_named_with_the_file_and_the_layer():
    _, messages = loaded(NETWORK)
    places = {"preprocessing": ["preprocessing"]}
    places |= {key: [f"layer{n}.{key}" for n in (1, 2)] for key in ("solver", "learning")}
    assert sorted(messages) == sorted(
        f"{NETWORK}: {place}: {old} is now called {new}; the old name will go"
        for key, names in RENAMED.items()
        for place in places[key]
        for old, new in names.items()
    )


def test_the_values_under_the_old_names_are_those_under_the_new_ones():
    net, _ = loaded(NETWORK)
    preprocessing, layer = net.preprocessing.settings, net.layer(1).settings
    contrast = (preprocessing.contrast_size, preprocessing.contrast_sigma)
    assert (*contrast, preprocessing.contrast_divide) == (5, 1.25, False)
    assert layer.solver.rho == 1.5
    assert (layer.learning.averaging_epochs, layer.learning.reinit_unused) == (2.0, False)


def test_an_older_network_that_is_saved_again_loads_without_a_warning(tmp_path):
    net, _ = loaded(NETWORK)
    net.save(tmp_path / "net.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(tmp_path / "net.safetensors")
    assert [asdict(layer.settings) for layer in again.layers] == [
        asdict(layer.settings) for layer in net.layers
    ]


def test_older_filters_are_the_same_and_their_old_names_are_named():
    learned, messages = loaded(FILTERS, Learned.load)
    with np.load(FIXTURE / "expected_filters.npz") as arrays:
        assert torch.equal(learned.filters, torch.from_numpy(arrays["filters"]))
    assert learned.settings.solver.rho == 1.5
    assert any(
        message == f"{FILTERS}: layer.solver: coupling is now called rho; the old name will go"
        for message in messages
    )
